"""A chunk of queries over a cache as causal attention whose last query stands at the last key."""

import jax
import jax.numpy as jnp


def laid_to_end(k_BSKH, v_BSKV, offset_B, queries: int, keys: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values in the order in which query t of `queries` stands at key keys - queries + t, and marks_BJ.

    Args:
      keys: at least S + queries, so that none is lost wherever the chunk stands.
    Returns:
      marks_BJ: int32, 1 for a key and 0 for a place before the first one or after the last, which holds a copy.
    """
    S = k_BSKH.shape[1]
    place_BJ = jnp.minimum(offset_B, S)[:, None] + jnp.arange(queries - keys, queries)
    at = jnp.arange(len(offset_B))[:, None], jnp.clip(place_BJ, 0, S - 1)
    return k_BSKH[at], v_BSKV[at], ((place_BJ >= 0) & (place_BJ < S)).astype(jnp.int32)
