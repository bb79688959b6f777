"""Compiles the real training or decode step for chips that need not be there, and puts beside it what it must need."""

import dataclasses
import importlib.util
import itertools
import re
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from dsv2_jax import sharding
from dsv2_jax.config import ConfigError, DataConfig, ExperimentConfig, OptimizerConfig, SourceConfig, TrainConfig
from dsv2_jax.model import counting
from dsv2_jax.planning import analytic, program
from dsv2_jax.planning.analytic import Estimate, Job
from dsv2_jax.planning.hardware import TPU, Topology
from dsv2_jax.train.state import State, abstract_state
from dsv2_jax.train.step import make_train_step
from dsv2_jax.types import Batch


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step, on one device."""

    seconds: float  # of compilation
    memory: dict[str, float]  # bytes by category; they add up to the total
    program: program.Program


class DoesNotFit(Exception):
    """The compiler found no way to place the program in the chip's memory; the message is its own."""


def experiment(job: Job, optimizer: OptimizerConfig | None = None) -> ExperimentConfig:
    """The settings of a training run that does `job` at each step; its data is never read."""
    optimizer = optimizer or OptimizerConfig(peak_lr=1e-4)
    train = TrainConfig(steps=100_000, sequence_length=job.length, batch_size=job.batch, optimizer=optimizer)
    unread = DataConfig(sources=(SourceConfig(name="none", paths=("none",)),))
    return ExperimentConfig(model=job.model, train=train, data=unread)


# --- compiling -------------------------------------------------------------------------------------------------------


def can_compile(topology: Topology) -> bool:
    """Whether a compiler for these chips comes as a package: for TPUs it does."""
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
    mesh, config = sharding.make_mesh(job.mesh, devices), experiment(job)
    state = abstract_state(config, mesh)
    where = NamedSharding(mesh, sharding.activation_spec(None, "batch", "sequence"))
    batch = Batch(
        **{
            field.name: jax.ShapeDtypeStruct(
                (1, job.batch, job.length), jnp.float32 if field.name == "weights_BT" else jnp.int32, sharding=where
            )
            for field in dataclasses.fields(Batch)
        }
    )
    step = make_train_step(config, mesh)  # outside of `use`: what it computes now runs on this machine
    with sharding.use(mesh):
        lowered = step.lower(state, batch)
    arguments = {
        "parameters": analytic.stored_bytes(state.model, job.mesh),
        "optimizer": analytic.stored_bytes(state.moments, job.mesh),
    }
    return _compile(lowered, arguments, options)


def compile_decoding(job: Job, devices: list, options: dict | None = None) -> Compiled:
    """One token for every sequence, greedily, from a cache of `job.length` tokens; weights in the compute dtype."""
    mesh = sharding.make_mesh(job.mesh, devices)
    model = jax.eval_shape(lambda model: model.unstacked(), counting.abstract_model(job.model))
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
    return _compile(lowered, arguments, options)


def _bytes_here(tree) -> int:
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(jax.ShapeDtypeStruct(shape, dtype).size * dtype.itemsize for shape, dtype in shards)


def _compile(lowered, arguments: dict[str, int], options: dict | None) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error)) from None
    seconds = time.perf_counter() - start
    stats, text = compiled.memory_analysis(), compiled.as_text()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
    total += stats.generated_code_size_in_bytes - stats.alias_size_in_bytes
    memory = {**arguments, "other arguments": stats.argument_size_in_bytes - sum(arguments.values())}
    memory["program"] = stats.generated_code_size_in_bytes
    memory["temporaries"] = total - sum(memory.values())
    return Compiled(seconds, memory, program.read(text))
