"""Blocked causal attention in plain XLA: blocks above the diagonal are never computed, probabilities never kept.

A block of queries meets the keys up to its end at once, so the softmax is exact without rescaling. The backward pass
recomputes the probabilities from the log-sum-exp (FlashAttention-2, arXiv 2307.08691).
"""

import functools

import jax
import jax.numpy as jnp

_SMALLEST_BLOCK = 64  # below this, small matmuls cost more than the skipped blocks save
_MOST_BLOCKS = 8  # unrolled in the program
_HIDDEN = -1e30  # finite, so that no inf - inf arises


def flash_attention(q_BTNH, k_BSKH, v_BSKV, scale, segments_BT=None, offset_B=None):
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    heads_first = [
        (q_BTNH * scale).astype(q_BTNH.dtype).swapaxes(1, 2),
        jnp.repeat(k_BSKH, group, axis=2).swapaxes(1, 2),
        jnp.repeat(v_BSKV, group, axis=2).swapaxes(1, 2),
    ]
    return _attend(*heads_first, segments_BT, offset_B).swapaxes(1, 2)


def _blocks(T: int):
    block = max(_SMALLEST_BLOCK, -(-T // _MOST_BLOCKS))
    return [slice(start, min(start + block, T)) for start in range(0, T, block)]


def _bias(rows: slice, keys: int, segments_BT, offset_B):
    """[B or 1, 1, rows, keys]: 0 where the query sees the key, else hidden."""
    place = jnp.arange(rows.start, rows.stop)[None, :, None]
    if offset_B is not None:
        place = place + offset_B[:, None, None]
    visible = place >= jnp.arange(keys)
    if segments_BT is not None:
        visible &= segments_BT[:, rows, None] == segments_BT[:, None, :keys]
    return jnp.where(visible, 0.0, _HIDDEN)[:, None]


def _keys(rows: slice, S: int, offset_B) -> int:
    return rows.stop if offset_B is None else S


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _add_first(x_BNSH, first_BNsH):
    """`x` with `first` added to its first keys.

    As `x.at[:, :, :s].add(first)`, but that is a scatter whose array of indices has no elements. In a gradient it
    becomes an operand of the shard_map around, and on one without elements the compiler of JAX 0.11.2 crashes
    (Shardy's ManualComputationUnusedInputsPattern).
    """
    first = x_BNSH[:, :, : first_BNsH.shape[2]] + first_BNsH
    return jax.lax.dynamic_update_slice_in_dim(x_BNSH, first, 0, axis=2)


@jax.custom_vjp
def _attend(q_BNTH, k_BNSH, v_BNSV, segments_BT, offset_B):
    return _forward(q_BNTH, k_BNSH, v_BNSV, segments_BT, offset_B)[0]


def _forward(q_BNTH, k_BNSH, v_BNSV, segments_BT, offset_B):
    outputs, log_sums = [], []
    for rows in _blocks(q_BNTH.shape[2]):
        keys = _keys(rows, k_BNSH.shape[2], offset_B)
        scores = _einsum("bnth,bnsh->bnts", q_BNTH[:, :, rows], k_BNSH[:, :, :keys])
        scores = scores + _bias(rows, keys, segments_BT, offset_B)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        o = _einsum("bnts,bnsv->bntv", weights.astype(v_BNSV.dtype), v_BNSV[:, :, :keys]) / total
        outputs.append(o.astype(q_BNTH.dtype))
        log_sums.append(largest + jnp.log(total))
    o_BNTV = jnp.concatenate(outputs, axis=2)
    return o_BNTV, (q_BNTH, k_BNSH, v_BNSV, segments_BT, offset_B, o_BNTV, jnp.concatenate(log_sums, axis=2))


def _backward(residuals, do_BNTV):
    # Scores lie with the keys first: two of the three gradients are then plain matmuls. XLA on CPUs is slow at those
    # that add up over the first axis of both operands.
    q_BNTH, k_BNSH, v_BNSV, segments_BT, offset_B, o_BNTV, log_sum_BNT1 = residuals
    delta_BN1T = jnp.sum(o_BNTV.astype(jnp.float32) * do_BNTV, axis=-1)[:, :, None]
    log_sum_BN1T = log_sum_BNT1.swapaxes(2, 3)
    dq, dk_BNSH, dv_BNSV = [], jnp.zeros(k_BNSH.shape, jnp.float32), jnp.zeros(v_BNSV.shape, jnp.float32)
    for rows in _blocks(q_BNTH.shape[2]):
        keys = _keys(rows, k_BNSH.shape[2], offset_B)
        q, do, k, v = q_BNTH[:, :, rows], do_BNTV[:, :, rows], k_BNSH[:, :, :keys], v_BNSV[:, :, :keys]
        scores = _einsum("bnsh,bnth->bnst", k, q) + _bias(rows, keys, segments_BT, offset_B).swapaxes(2, 3)
        p = jnp.exp(scores - log_sum_BN1T[..., rows])
        dp = _einsum("bnsv,bntv->bnst", v, do)
        ds = (p * (dp - delta_BN1T[..., rows])).astype(q.dtype)
        dq.append(_einsum("bnst,bnsh->bnth", ds, k).astype(q.dtype))
        dk_BNSH = _add_first(dk_BNSH, _einsum("bnst,bnth->bnsh", ds, q))
        dv_BNSV = _add_first(dv_BNSV, _einsum("bnst,bntv->bnsv", p.astype(do.dtype), do))
    return jnp.concatenate(dq, axis=2), dk_BNSH.astype(k_BNSH.dtype), dv_BNSV.astype(v_BNSV.dtype), None, None


_attend.defvjp(_forward, _backward)
