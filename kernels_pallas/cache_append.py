"""New tokens' entries, written into a decoding cache."""

import jax
import jax.numpy as jnp

from kernels_pallas.select import target


def append(cache_BSC: jax.Array, entries_BTC: jax.Array, offset_B: jax.Array) -> jax.Array:
    """Writes entry t of row b at offset_B[b] + t; what would lie beyond the capacity is not written."""
    B, T, _ = entries_BTC.shape
    place_BT, entries_BTC = offset_B[:, None] + jnp.arange(T), entries_BTC.astype(cache_BSC.dtype)
    if T == 1 and cache_BSC.dtype == jnp.bfloat16 and target().platform == "cpu":
        # XLA on CPUs would widen the whole cache to write into it, and narrow it again: one pass is less.
        here_BS1 = (jnp.arange(cache_BSC.shape[1]) == place_BT)[:, :, None]
        return jnp.where(here_BS1, entries_BTC, cache_BSC)
    return cache_BSC.at[jnp.arange(B)[:, None], place_BT].set(entries_BTC, mode="drop")
