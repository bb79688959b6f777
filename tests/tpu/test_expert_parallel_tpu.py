"""The MoE layer of V2's and Lite's shapes, compiled for eight v5p chips without any, and lowered for eight H200."""

import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from small import change

from dsv2_jax import presets, sharding
from dsv2_jax.model import exchange
from dsv2_jax.model.moe import MoE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]: libtpu"),
]
T = 2048


def narrow(preset: str):
    """The preset, its experts narrower: the routing and the rows are the model's."""
    return change(presets.get(preset), moe__expert_width=256, compute__dtype="bfloat16", compute__expert_chunk=4096)


def rows_per_peer(config) -> int:
    return exchange.rows_per_peer(config.moe, 8, 1, T, config.compute.expert_slack)


def forward(layer, y_BTD):
    return layer(y_BTD, jnp.ones(y_BTD.shape[:2], bool))[0]


def both_passes(layer, y_BTD):
    return jax.value_and_grad(lambda *inputs: forward(*inputs).astype(jnp.float32).sum(), (0, 1))(layer, y_BTD)


def compiled(config, function) -> str:
    """Scheduled HLO of `function` of the layer for eight v5p chips; one sequence of T tokens to a chip."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
    mesh = sharding.make_mesh("expert=8", topology.devices)
    place = jax.sharding.NamedSharding(mesh, sharding.activation_spec("batch", "sequence", None))
    layer = sharding.with_shardings(jax.eval_shape(lambda: MoE(config, jax.random.key(0))), mesh)
    y_BTD = jax.ShapeDtypeStruct((8, T, config.dim), jnp.bfloat16, sharding=place)
    with sharding.use(mesh):
        return jax.jit(function).lower(layer, y_BTD).compile().as_text()


def instructions(text: str) -> list[str]:
    """Of the entry computation, in the order of the schedule."""
    assert "is_scheduled=true" in text.splitlines()[0]
    return text[text.index("\nENTRY ") :].splitlines()


@pytest.mark.parametrize(("function", "permutes", "dots"), [(forward, 2 * 7, 3), (both_passes, 5 * 7, 3 + 6)])
def test_shared_experts_are_computed_while_rows_travel(function, permutes, dots):
    """Their matmuls stand between a permute's start and its done, forward and backward."""
    config = narrow("v2")
    lines = instructions(compiled(change(config, compute__expert_transport="stepwise"), function))
    rows = f"bf16[{rows_per_peer(config)},{config.dim}]"
    travelling, overlapped, started = set(), [], 0
    for line in lines:
        name = re.match(r"\s*(?:ROOT )?%([\w.-]+) = ", line)
        if name and " collective-permute-start(" in line and rows in line:
            travelling.add(name[1])
            started += 1
        elif name and " collective-permute-done(" in line:
            travelling.discard(re.search(r"collective-permute-done\(%?([\w.-]+)", line)[1])
        elif travelling and re.search(r"fusion\(|convolution\(", line) and re.search(r"shared\)*/\S*dot_general", line):
            overlapped.append(name[1])
    assert started == permutes
    assert len(overlapped) >= dots


@pytest.mark.parametrize(("preset", "most", "function"), [("v2", 3, both_passes), ("v2_lite", 6, forward)])
def test_the_ragged_send_operand_holds_at_most_m_rows_a_token(preset, most, function):
    """Dispatch: device-limited routing has M = 3 rows a token at the most, not K = 6; Lite, with no limit, min(K, P).

    It is the operand that sends tokens out, of x and in the backward pass of x and dy; on the way back those rows go
    that arrived, and the operand is what a device can hold of others in one round.
    """
    config = narrow(preset)
    assert exchange.most_devices(config.moe, 8) == most
    received = 8 * rows_per_peer(config)
    sent = min(most * T, received)  # the slack may allow Lite fewer in one round
    text = compiled(change(config, compute__expert_transport="ragged"), function)
    shapes = re.findall(r"%([\w.-]+) = \(?bf16\[([\d,]+)\]", text)
    rows = {name: math.prod(map(int, shape.split(","))) // config.dim for name, shape in shapes}  # XLA cuts rows up
    calls = re.findall(r"%([\w.-]+) = \S+ ragged-all-to-all\(%([\w.-]+), ", text)
    assert {(rows[operand], rows[output]) for output, operand in calls} == {(sent, received), (received, sent)}
    assert received < {"v2": 4, "v2_lite": 6}[preset] * T  # the slack more than an even share


@pytest.mark.parametrize(("preset", "most", "function"), [("v2", 3, both_passes), ("v2_lite", 6, forward)])
def test_the_ragged_transport_lowers_for_cuda(preset, most, function):
    """Down to where the compiler for the chip takes over; the operands are those compiled for TPUs."""
    config = change(narrow(preset), compute__expert_transport="ragged")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1, 1, 8, 1, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 5, abstract_device=device)
    layer = jax.eval_shape(lambda: MoE(config, jax.random.key(0)))
    y_BTD = jax.ShapeDtypeStruct((8, T, config.dim), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(function).trace(layer, y_BTD).lower(lowering_platforms=("cuda",)).as_text()
    received = 8 * rows_per_peer(config)
    sent = min(most * T, received)
    calls = re.findall(r"@ragged_all_to_all\(.*: \(tensor<(\d+)x\d+xbf16>, tensor<(\d+)x\d+xbf16>", text)
    assert {(int(operand), int(output)) for operand, output in calls} == {(sent, received), (received, sent)}
