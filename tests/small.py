"""Small models and inputs for the tests: every width different, so that no two axes can be mistaken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax.config import BalanceConfig, ComputeConfig, GQAConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig

YARN = YarnConfig(factor=40.0, original_length=64)
MLA = MLAConfig(heads=3, nope_dim=10, rope_dim=8, value_dim=6, kv_latent=14, q_latent=18)
GQA = GQAConfig(heads=4, kv_heads=2, head_dim=8)
MOE = MoEConfig(
    routed_experts=8,
    shared_experts=2,
    experts_per_token=3,
    expert_width=11,
    groups=4,
    groups_kept=2,
    routed_scaling=16.0,
    balance=BalanceConfig(expert=0.003, device=0.05, communication=0.02),
)
MODEL = ModelConfig(
    vocab_size=50,
    layers=3,
    dim=20,
    dense_layers=1,
    dense_width=22,
    attention=MLA,
    moe=MOE,
    max_length=128,
    init_std=0.2,
    compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=8),
)


def change(config, **changes):
    """`config` with fields replaced; "attention.yarn" is written attention__yarn."""
    nested: dict = {}
    for name in [name for name in changes if "__" in name]:
        field, rest = name.split("__", 1)
        nested.setdefault(field, {})[rest] = changes.pop(name)
    changes |= {field: change(getattr(config, field), **inner) for field, inner in nested.items()}
    return dataclasses.replace(config, **changes)


def made(build):
    """The module of `build(key)` with NumPy's numbers for JAX's, whose programs take seconds to compile.

    Matrices have about the spread that MODEL gives them; norms lie around 1, so that they are not trivial.
    """

    def draw(path, leaf):
        is_norm = any(getattr(key, "name", None) == "scale" for key in path)
        return jnp.asarray(is_norm + rng.normal(0, 0.1 if is_norm else 0.22, leaf.shape), leaf.dtype)

    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(build, jax.random.key(0)))


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def packed(*lengths, total):
    """(segments [1, total], positions [1, total]) of documents of these lengths in one row, then padding."""
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(total - sum(lengths))])
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(total - sum(lengths))])
    return jnp.asarray(segments[None], jnp.int32), jnp.asarray(positions[None], jnp.int32)
