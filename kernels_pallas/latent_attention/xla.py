"""Latent attention as two matmuls a row: the heads of a token share the cache, so they are the rows of one matrix."""

import jax.numpy as jnp

_HIDDEN = -1e30


def latent_attention(q_BTNC, cache_BSC, offset_B, value_dim, scale):
    T, N = q_BTNC.shape[1:3]
    S = cache_BSC.shape[1]
    scores_BTNS = jnp.einsum("btnc,bsc->btns", q_BTNC, cache_BSC, preferred_element_type=jnp.float32)
    visible_BTS = (offset_B[:, None] + jnp.arange(T))[:, :, None] >= jnp.arange(S)
    scores_BTNS = jnp.where(visible_BTS[:, :, None], scores_BTNS * scale, _HIDDEN)
    weights_BTNS = jnp.exp(scores_BTNS - jnp.max(scores_BTNS, axis=-1, keepdims=True))
    total_BTN1 = jnp.sum(weights_BTNS, axis=-1, keepdims=True)
    o_BTNR = jnp.einsum(
        "btns,bsr->btnr",
        weights_BTNS.astype(cache_BSC.dtype),
        cache_BSC[..., :value_dim],
        preferred_element_type=jnp.float32,
    )
    return (o_BTNR / total_BTN1).astype(q_BTNC.dtype)
