"""Compiles the real training or decode step for chips that need not be there, and puts beside it what it must need."""

import dataclasses
import functools
import importlib.util
import itertools
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from dsv2_jax import sharding
from dsv2_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)
from dsv2_jax.model import counting
from dsv2_jax.planning import analytic, live, program
from dsv2_jax.planning.analytic import Estimate, Job
from dsv2_jax.planning.hardware import TPU, Topology
from dsv2_jax.train.state import abstract_state
from dsv2_jax.train.step import make_train_step
from dsv2_jax.types import Batch

LARGEST = 12  # temporaries that a plan names


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step, on one device."""

    seconds: float  # of tracing, lowering and compilation
    memory: dict[str, float]  # bytes by category; they add up to the peak
    placed: float | None  # bytes, the gaps between buffers included: what must fit the chip; TPUs only
    bound: float  # bytes that the program cannot exceed: see `_total`
    largest: list[live.Buffer]  # temporaries alive where memory is fullest
    program: program.Program
    text: str  # HLO, as `program` was read from


@dataclass(frozen=True)
class Plan:
    """One mesh: what it must need, and what the compiler says, or why it was not asked."""

    job: Job
    topology: Topology
    decoding: bool
    estimate: Estimate
    compiled: Compiled | None
    not_compiled: str | None  # why

    @property
    def tokens(self) -> int:
        """Tokens a step of all devices."""
        return self.job.batch if self.decoding else self.job.tokens

    @property
    def memory(self) -> dict[str, float]:
        return self.compiled.memory if self.compiled else self.estimate.memory

    @property
    def seconds(self) -> dict[str, float]:
        """What each resource alone takes of a step; what is sent as compiled, if it was."""
        if self.compiled is None:
            return self.estimate.seconds
        network = self.compiled.program.wire_bytes / self.topology.chip.network_bandwidth
        return self.estimate.seconds | {"network": network}

    @property
    def utilisation(self) -> float:
        """The model FLOP utilisation that the longest of `seconds` allows, the others hidden behind it."""
        return analytic.utilisation(self.estimate.flops["model"], max(self.seconds.values()), self.topology)

    @property
    def device_hours(self) -> float:
        """Device-hours per trillion tokens at that utilisation."""
        return analytic.device_hours_per_trillion(self.tokens, max(self.seconds.values()), self.job.devices)

    @property
    def unhidden_device_hours(self) -> float:
        """The same, with one resource used after the other."""
        return analytic.device_hours_per_trillion(self.tokens, sum(self.seconds.values()), self.job.devices)

    @property
    def transport(self) -> str | None:
        """The cheaper way to the experts."""
        ways = self.estimate.transports
        return min(ways, key=lambda name: ways[name]["visible_seconds"]) if ways else None

    def to_dict(self) -> dict:
        """The plan as JSON values; bytes, FLOPs and seconds are of one device and one step."""
        estimate, total = self.estimate, sum(self.memory.values())
        sent = {one.name: one.nbytes for one in estimate.traffic}
        result = {
            "step": "decode" if self.decoding else "train",
            "topology": str(self.topology),
            "devices": self.job.devices,
            "mesh": str(self.job.mesh),
            "sequence": self.job.length,
            "batch": self.job.batch,
            "tokens_per_step": self.tokens,
            "microbatches": self.job.microbatches,
            "chip": dataclasses.asdict(self.topology.chip),
            "compiled": self.compiled is not None,
            "not_compiled": self.not_compiled,
            "compile_seconds": self.compiled.seconds if self.compiled else None,
            "memory": {
                "total_bytes_per_device": total,
                "hbm_bytes_per_device": self.topology.chip.hbm_bytes,
                "placed_bytes_per_device": self.compiled.placed if self.compiled else None,
                "bound_bytes_per_device": self.compiled.bound if self.compiled else None,
                "fits": total <= self.topology.chip.hbm_bytes,
                "categories": self.memory,
            },
            "collectives": None,
            "collectives_minimum": {"wire_bytes": estimate.wire_bytes, "by_purpose": sent},
            "flops": {**estimate.flops, "compiled": None},
            "hbm_bytes_estimate": estimate.hbm_bytes,
            "seconds": self.seconds,
            "utilisation_bound": self.utilisation,
            "device_hours_per_trillion_tokens": self.device_hours,
            "device_hours_per_trillion_tokens_unhidden": self.unhidden_device_hours,
            "transports": estimate.transports,
            "cheaper_transport": self.transport,
        }
        if self.compiled:
            read = self.compiled.program
            per_token = self.tokens / self.job.devices
            by_kind = {
                kind: {**row, "wire_bytes_per_token": row["wire_bytes"] / per_token}
                for kind, row in read.by_kind().items()
            }
            sent = {"wire_bytes": read.wire_bytes, "wire_bytes_of_loops_of_unknown_length": read.further_wire_bytes}
            result["collectives"] = {**sent, "by_kind": by_kind}
            result["flops"] |= {"compiled": read.flops, "unseen_kernels": read.opaque}
            result["memory"]["largest_temporaries"] = [
                {"bytes": one.nbytes, "array": str(one.shape), "source": one.source} for one in self.compiled.largest
            ]
            result["loops_counted_once"] = sorted(set(read.unknown_loops))
        return result


class DoesNotFit(Exception):
    """The compiler found no way to place the program in the chip's memory; the message is its own."""


def make_plan(job: Job, topology: Topology, *, decoding: bool = False, compiling: bool = True) -> Plan:
    """The plan of a job; `ConfigError` where the mesh cannot hold it or the compiler is missing."""
    sharding.check_mesh(job.abstract_mesh, job.model, batch_size=job.microbatch, sequence_length=job.length)
    if decoding:
        sharding.check_decoding(job.abstract_mesh)
        estimate = analytic.estimate_decoding(job, topology, _decoding_model(job))
    else:
        estimate = analytic.estimate(job, topology, _training_state(job.model))
    compiled = why = None
    if not compiling:
        why = "not asked for"
    elif not can_compile(topology):
        why = f"plan compiles for TPUs only, not for {topology.chip.name}: what follows is analytic; "
        why += "kernels_pallas/check_gpu.sh compiles the kernels alone, for sm_90a"
    else:
        compile_step = compile_decoding if decoding else compile_training
        try:
            compiled = compile_step(job, topology_devices(topology))
        except DoesNotFit as error:
            why = f"the program does not fit: {str(error).strip().splitlines()[0]}"
    return Plan(job, topology, decoding, estimate, compiled, why)


def experiment(job: Job) -> ExperimentConfig:
    """The settings of a training run that does `job` at each step; its data is never read."""
    optimizer = OptimizerConfig(peak_lr=1e-4)
    sizes = {"batch_size": job.batch, "microbatch_size": job.microbatch}
    train = TrainConfig(steps=100_000, sequence_length=job.length, optimizer=optimizer, **sizes)
    unread = DataConfig(sources=(SourceConfig(name="none", paths=("none",)),))
    return ExperimentConfig(model=job.model, train=train, data=unread)


@functools.cache
def _training_state(model: ModelConfig):
    """The abstract state of a training run; it does not depend on the mesh or the batch."""
    return abstract_state(experiment(Job(model, sharding.MeshShape(), model.max_length)))


# --- search ----------------------------------------------------------------------------------------------------------


def meshes(model: ModelConfig, topology: Topology, length: int, per_device: int, microbatches: int = 1) -> list[Job]:
    """Jobs on all meshes of the topology that can hold the model: any data, fsdp and expert, tensor up to 8."""
    found = []
    divisors = [n for n in range(1, topology.devices + 1) if topology.devices % n == 0]
    for fsdp, expert, tensor in itertools.product(divisors, divisors, (1, 2, 4, 8)):
        data, rest = divmod(topology.devices, fsdp * expert * tensor)
        if rest or data == 0:
            continue
        mesh = sharding.MeshShape(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
        job = Job(model, mesh, length, per_device, microbatches)
        try:
            sharding.check_mesh(job.abstract_mesh, model, batch_size=job.microbatch, sequence_length=length)
            analytic.stored_bytes(counting.abstract_model(model), job.mesh)
        except ConfigError:
            continue
        found.append(job)
    return found


def ranked(jobs: list[Job], topology: Topology) -> list[Plan]:
    """Analytic plans: those that fit before the others, then by the device-hours of a token with nothing hidden.

    The bound alone cannot rank: it is the same for all meshes whose network keeps up.
    """
    plans = [make_plan(job, topology, compiling=False) for job in jobs]

    def order(plan: Plan):
        needs = plan.estimate.total_bytes
        return (needs > topology.chip.hbm_bytes, plan.unhidden_device_hours, needs)

    return sorted(plans, key=order)


# --- compiling -------------------------------------------------------------------------------------------------------


def can_compile(topology: Topology) -> bool:
    """Whether steps are compiled for these chips: for TPUs they are, for GPUs only the kernels (check_gpu.sh)."""
    return topology.chip.kind == TPU


def topology_devices(topology: Topology) -> list:
    """Devices to compile for; they need not exist. `ConfigError` without libtpu, or for a shape it does not know."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            'libtpu, the compiler for TPUs, is not installed: pip install -e ".[tpu]" (no TPU is needed); '
            "or leave compilation out with --analytic"
        )
    try:
        return list(topologies.get_topology_desc(platform=TPU, topology_name=str(topology)).devices)
    except Exception as error:  # of several types, by version
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"topology={str(topology)!r}: the compiler refuses it: {first}") from None


def compile_training(job: Job, devices: list, options: dict | None = None) -> Compiled:
    """The trainer's own step, compiled for `devices`."""
    start = time.perf_counter()
    mesh, config = sharding.make_mesh(job.mesh, devices), experiment(job)
    state = abstract_state(config, mesh)
    where = NamedSharding(mesh, sharding.activation_spec(None, "batch", "sequence"))
    shape = job.microbatches, job.microbatch, job.length
    types = {field.name: jnp.int32 for field in dataclasses.fields(Batch)} | {"weights_BT": jnp.float32}
    batch = Batch(**{name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in types.items()})
    step = make_train_step(config, mesh)  # outside of `use`: what it computes now runs on this machine
    with sharding.use(mesh):
        lowered = step.lower(state, batch)
    arguments = {
        "parameters": analytic.stored_bytes(state.model, job.mesh),
        "optimizer": analytic.stored_bytes(state.moments, job.mesh),
    }
    stored = {_shard(leaf).shape for leaf in jax.tree.leaves(state.model)}
    return _compile(start, lowered, arguments, options, stored, job.model.moe_layers, int(job.microbatches > 1))


def compile_decoding(job: Job, devices: list, options: dict | None = None) -> Compiled:
    """One token for every sequence, greedily, from a cache of `job.length` tokens; weights in the compute dtype."""
    start = time.perf_counter()
    mesh = sharding.make_mesh(job.mesh, devices)
    model = _decoding_model(job)
    cache = jax.eval_shape(lambda model: model.init_cache(job.batch, job.length), model)
    rows = NamedSharding(mesh, sharding.activation_spec("batch"))
    model = sharding.with_shardings(model, mesh)
    cache, tokens_B = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows),
        (cache, jax.ShapeDtypeStruct((job.batch,), jnp.int32)),
    )

    def step(model, cache, tokens_B):
        h_BTD, cache = model.decode(tokens_B[:, None], cache)
        return jnp.argmax(model.logits(h_BTD[:, 0]), axis=-1).astype(jnp.int32), cache

    with sharding.use(mesh):
        lowered = jax.jit(step, donate_argnums=1).lower(model, cache, tokens_B)
    arguments = {"parameters": analytic.stored_bytes(model, job.mesh), "cache": _bytes_here(cache)}
    return _compile(start, lowered, arguments, options)


def _decoding_model(job: Job):
    return jax.eval_shape(lambda model: model.unstacked(), counting.abstract_model(job.model))


def _shard(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)


def _bytes_here(tree) -> int:
    return sum(shard.size * shard.dtype.itemsize for shard in map(_shard, jax.tree.leaves(tree)))


def _compile(
    start: float, lowered, arguments: dict[str, int], options: dict | None, stored=frozenset(), layers=0, depth=0
) -> Compiled:
    """Compiles, and tells the temporaries apart by their shapes where memory is fullest.

    Args:
      start: `time.perf_counter()` before tracing.
      arguments: bytes of the step's arguments by category.
      stored: shapes of the parameters' shards. A float32 array of one, outside of loops, is a gradient.
      layers: layers that are scanned. Any other array with this leading dimension is kept for the backward pass.
      depth: loops around both: that over the microbatches.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options={**dump, **(options or {})})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(str(error)) from None
        reports = "".join(path.read_text() for path in Path(folder).glob("*memory-usage-report.txt"))
    seconds = time.perf_counter() - start
    stats, text = compiled.memory_analysis(), compiled.as_text()
    on_tpu = next(iter(jax.tree.leaves(compiled.input_shardings)[0].device_set)).platform == TPU
    total, bound = _total(stats, on_tpu)
    found = re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", reports) if on_tpu else None
    placed = int(found[1]) + stats.generated_code_size_in_bytes if found else None
    memory = {**arguments, "other arguments": stats.argument_size_in_bytes - sum(arguments.values())}
    memory["program"] = stats.generated_code_size_in_bytes
    held = live.at_peak(text)
    if stored:
        outside = [one for one in held if len(one.loops) <= depth]
        gradients = [one for one in outside if one.shape.dtype == "f32" and one.shape.dims in stored]
        kept = [one for one in outside if one.shape.dims[:1] == (layers,) and one.shape.dims not in stored]
        memory["gradients"] = sum(one.nbytes for one in gradients)
        memory["activations"] = sum(one.nbytes for one in kept)
    memory["temporaries"] = total - sum(memory.values())
    return Compiled(seconds, memory, placed, bound, held[:LARGEST], program.read(text), text)


def _total(stats, on_tpu: bool) -> tuple[int, int]:
    """(Bytes at the peak, a bound of them), the program's own included.

    The peak is the compiler's, padding included, but without the gaps between buffers: up to 2% more is placed. The
    bound is what its sizes add up to. That of the temporaries has most of them twice; the compiler does not hold it
    against the chip's memory: two scans over 8 matrices, of peak 78.8 GB and bound 108.7, compile for one of 102.8.
    """
    lasting = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    bound = lasting + stats.temp_size_in_bytes
    peak = stats.peak_memory_in_bytes if on_tpu else bound  # elsewhere the peak leaves out some of the arguments
    return peak + stats.generated_code_size_in_bytes, bound + stats.generated_code_size_in_bytes
