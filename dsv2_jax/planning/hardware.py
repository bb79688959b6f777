"""What chips can do, as their makers publish it, and the topologies a plan can be made for.

Bandwidths of networks are those of one direction: makers often publish both directions added up.
"""

import dataclasses
import math
import re

from dsv2_jax.config import ConfigError

TPU, GPU = "tpu", "gpu"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: a TPU with its links in all directions, or a GPU with its share of NVLink and of its node's network."""

    name: str
    kind: str
    flops: float  # dense bfloat16 FLOP/s, peak
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    network_bandwidth: float  # bytes/s out of one chip: all ICI links, or NVLink
    links: int  # ICI links that bandwidth is the sum of; for a GPU 1
    node_bandwidth: float | None  # GPU: bytes/s out of one chip to other nodes
    source: str

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s through one link in one direction."""
        return self.network_bandwidth / self.links


def _tpu(name, tflops, gib, hbm, both_ways, links) -> Chip:
    source = f"https://cloud.google.com/tpu/docs/{name}"
    return Chip(name, TPU, tflops * 1e12, gib * GIB, hbm * 1e9, both_ways / 2 * 1e9, links, None, source)


def _gpu(name, tflops, gb, hbm, both_ways, node_gbit, source) -> Chip:
    return Chip(name, GPU, tflops * 1e12, gb * 1e9, hbm * 1e9, both_ways / 2 * 1e9, 1, node_gbit / 8 * 1e9, source)


# GPUs are the SXM boards; between nodes one network adapter a GPU, as in NVIDIA's own eight-GPU systems.
_H100 = "https://www.nvidia.com/en-us/data-center/h100/ ; DGX H100 data sheet (8 x 400 Gbit/s)"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/ ; DGX H200 data sheet (8 x 400 Gbit/s)"
_H800 = "arXiv 2412.19437, section 3.1, and 2405.04434, section 3.1.3; compute and memory as the H100's"
_A100 = "https://www.nvidia.com/en-us/data-center/a100/ (80 GB) ; DGX A100 data sheet (8 x 200 Gbit/s)"

CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 32, 1228, 600, 6),
        _tpu("v5e", 197, 16, 819, 400, 4),
        _tpu("v5p", 459, 95, 2765, 1200, 6),
        _tpu("v6e", 918, 32, 1640, 800, 4),
        _gpu("a100", 312, 80, 2039, 600, 200, _A100),
        _gpu("h100", 989, 80, 3350, 900, 400, _H100),
        _gpu("h200", 989, 141, 4800, 900, 400, _H200),
        _gpu("h800", 989, 80, 3350, 400, 400, _H800),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a torus (TPU: v5p:4x4x8), or GPUs a node times nodes (h800:8x256, or h100:8 for one node)."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def per_node(self) -> int:
        """Devices that reach each other at `network_bandwidth`: a whole torus, or one node of GPUs."""
        return self.devices if self.chip.kind == TPU else self.shape[0]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """ "v5p:4x4x8" -> Topology; `ConfigError` names what there is."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        known = ", ".join(_examples())
        raise ConfigError(f"topology={text!r}: {name!r} is no chip known here; there are {known}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError(f"topology={text!r}: must be {_examples()[list(CHIPS).index(name)]} or like it")
    chip, sizes = CHIPS[name], tuple(map(int, shape.split("x")))
    ranks = (1, 2) if chip.kind == GPU else (chip.links // 2,)
    if len(sizes) not in ranks:
        must = "GPUs a node x nodes" if chip.kind == GPU else f"{ranks[0]} numbers, the sides of the torus"
        raise ConfigError(f"topology={text!r}: {name} takes {must}, as in {_examples()[list(CHIPS).index(name)]}")
    return Topology(chip, sizes)


def _examples() -> list[str]:
    shapes = {6: "4x4x8", 4: "4x8", 1: "8x16"}
    return [f"{chip.name}:{shapes[chip.links]}" for chip in CHIPS.values()]
