"""The decoding cache: for MLA, d_c + d_R numbers per token and layer and nothing else (report, table 1)."""

import dataclasses

import jax
import jax.numpy as jnp

from dsv2_jax.config import GQAConfig, MLAConfig, ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One array [B, S, C] per layer, beside the block it belongs to; stacked [L, B, S, C] where the blocks are."""

    dense: list[jax.Array]
    moe: jax.Array | list[jax.Array]
    length_B: jax.Array  # int32: tokens held by each row


def entry_width(attention: MLAConfig | GQAConfig) -> int:
    """Cached elements per token and layer."""
    if isinstance(attention, MLAConfig):
        return attention.kv_latent + attention.rope_dim
    return 2 * attention.kv_heads * attention.head_dim


def make_cache(config: ModelConfig, batch: int, length: int, stacked: bool) -> Cache:
    """An empty cache of `length` tokens a row. Compiled loops update a list of layers in place, and copy a stack."""
    shape, dtype = (batch, length, entry_width(config.attention)), jnp.dtype(config.compute.dtype)
    one_each = [jnp.zeros(shape, dtype) for _ in range(0 if stacked else config.moe_layers)]
    return Cache(
        dense=[jnp.zeros(shape, dtype) for _ in range(config.dense_layers)],
        moe=jnp.zeros((config.moe_layers, *shape), dtype) if stacked else one_each,
        length_B=jnp.zeros(batch, jnp.int32),
    )
