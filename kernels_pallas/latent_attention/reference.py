"""Naive float32 latent attention."""

import jax
import jax.numpy as jnp


def latent_attention(q_BTNC, cache_BSC, offset_B, value_dim, scale):
    T, S = q_BTNC.shape[1], cache_BSC.shape[1]
    c_BSC = cache_BSC.astype(jnp.float32)
    scores_BNTS = scale * jnp.einsum("btnc,bsc->bnts", q_BTNC.astype(jnp.float32), c_BSC)
    visible_BTS = (offset_B[:, None] + jnp.arange(T))[:, :, None] >= jnp.arange(S)
    weights_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BNTS, -jnp.inf))
    return jnp.einsum("bnts,bsr->btnr", weights_BNTS, c_BSC[..., :value_dim]).astype(q_BTNC.dtype)
