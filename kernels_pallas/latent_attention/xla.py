"""Latent attention as two matmuls a row: the heads of a token share the cache, so they are the rows of one matrix."""

import jax
import jax.numpy as jnp

_HIDDEN = -1e30


def latent_attention(q_BTNC, cache_BSC, offset_B, value_dim, scale):
    T, S = q_BTNC.shape[1], cache_BSC.shape[1]
    # The cache is the first operand, as it lies in memory: XLA on CPUs would pack a second one, every token. Without
    # the barrier it would swap them.
    scores_BSTN = jnp.einsum("bsc,btnc->bstn", cache_BSC, q_BTNC, preferred_element_type=jnp.float32)
    scores_BTNS = jnp.moveaxis(jax.lax.optimization_barrier(scores_BSTN), 1, -1)
    visible_BTS = (offset_B[:, None] + jnp.arange(T))[:, :, None] >= jnp.arange(S)
    scores_BTNS = jnp.where(visible_BTS[:, :, None], scores_BTNS * scale, _HIDDEN)
    weights_BTNS = jnp.exp(scores_BTNS - jnp.max(scores_BTNS, axis=-1, keepdims=True))
    total_BTN1 = jnp.sum(weights_BTNS, axis=-1, keepdims=True)
    # Averaging the whole entry costs R + P instead of R; cutting the values out would copy the cache.
    weights_BTNS = weights_BTNS.astype(cache_BSC.dtype)
    o_BTNC = jnp.einsum("btns,bsc->btnc", weights_BTNS, cache_BSC, preferred_element_type=jnp.float32)
    return (o_BTNC[..., :value_dim] / total_BTN1).astype(q_BTNC.dtype)
