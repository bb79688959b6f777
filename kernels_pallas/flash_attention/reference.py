"""Naive float32 attention over all T x S scores; differentiated by JAX."""

import jax
import jax.numpy as jnp


def flash_attention(q_BTNH, k_BSKH, v_BSKV, scale, segments_BT=None, offset_B=None):
    (B, T, N, _), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, -1).astype(jnp.float32)
    scores_BKGTS = scale * jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH.astype(jnp.float32))
    place_BT = jnp.arange(T) + (jnp.zeros((B, 1), jnp.int32) if offset_B is None else offset_B[:, None])
    visible_BTS = place_BT[:, :, None] >= jnp.arange(S)
    if segments_BT is not None:
        visible_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    o_BTKGV = jnp.einsum("bkgts,bskv->btkgv", jax.nn.softmax(scores_BKGTS), v_BSKV.astype(jnp.float32))
    return o_BTKGV.reshape(B, T, N, -1).astype(q_BTNH.dtype)
