"""The training state, one pytree, and its abstract form, from which it is created and restored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv2_jax import sharding, types
from dsv2_jax.config import ExperimentConfig
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.train.optimizer import adamw


@types.pytree
class State:
    """All that a step changes. The integers are int32 scalars."""

    model: Transformer  # float32 masters
    moments: optax.OptState
    step: jax.Array  # steps done, skipped ones included
    sequences: jax.Array  # sequences consumed; the schedules count in these
    bad_steps: jax.Array  # non-finite steps in a row, up to now
    skipped: jax.Array  # non-finite steps of the whole run
    key: jax.Array  # uint32, the data of a random key


def create_state(config: ExperimentConfig, seed: int | jax.Array) -> State:
    """The state before the first step; to be traced, not run eagerly: see `new_state` and `abstract_state`."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    model = Transformer(config.model, init_key)
    moments = adamw(config.train.optimizer).init(model)
    return State(model, moments, *(jnp.int32(0) for _ in range(4)), jax.random.key_data(train_key))


def new_state(config: ExperimentConfig, mesh: jax.sharding.Mesh | None = None) -> State:
    """The state before the first step, computed under `jit`, each device its part; the same on every mesh."""
    return make_new_state(config, mesh)(np.uint32(config.train.seed))


def make_new_state(config: ExperimentConfig, mesh: jax.sharding.Mesh | None = None):
    """The jitted function from a seed to the state."""
    less = {"xla_backend_optimization_level": 1}  # it runs once; the default level compiles twice as long
    where = None if mesh is None else sharding.tree_shardings(abstract_state(config), mesh)
    return jax.jit(functools.partial(create_state, config), out_shardings=where, compiler_options=less)


def abstract_state(config: ExperimentConfig, mesh: jax.sharding.Mesh | None = None) -> State:
    """The shapes and types of the state, and where it lies on `mesh`; no memory is used."""
    abstract = jax.eval_shape(functools.partial(create_state, config), jax.ShapeDtypeStruct((), jnp.uint32))
    return sharding.with_shardings(abstract, mesh)


def training_part(state: State) -> dict:
    """The state without the model, as a checkpoint stores it beside the parameters."""
    return {name: getattr(state, name) for name in TRAINING_PART}


TRAINING_PART = ("moments", "step", "sequences", "bad_steps", "skipped", "key")
