"""Causal attention on Hopper by Mosaic GPU kernels, forward and backward: no score reaches the GPU's main memory.

They take whole blocks (the sequence is padded at its end, where causality hides it). Of packed documents, blocks that
hold none of a block's own are not computed. The backward pass recomputes the probabilities from the log-sum-exp. A
chunk of queries over a cache takes the forward kernel, and computes no tile that it does not see.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention import gpu_kernels as kernels
from kernels_pallas.flash_attention.chunk import laid_to_end
from kernels_pallas.mosaic_gpu import not_hopper
from kernels_pallas.select import Target
from kernels_pallas.sharded import over_mesh

WIDTH = 64  # of a swizzled row of bfloat16 in shared memory, 128 bytes
MOST_QK, MOST_VALUE = 192, 128  # for which registers and shared memory suffice


def unsupported(target: Target, q_BTNH, k_BSKH, v_BSKV, scale=1.0, segments_BT=None, offset_B=None) -> str | None:
    if reason := not_hopper(target):
        return reason
    if offset_B is not None and q_BTNH.shape[1] < kernels.BLOCK:
        return f"{q_BTNH.shape[1]} queries over a cache (offset_B): fewer than the {kernels.BLOCK} of a block"
    if any(x.dtype != jnp.bfloat16 for x in (q_BTNH, k_BSKH, v_BSKV)):
        return f"q, k, v of {q_BTNH.dtype}, {k_BSKH.dtype}, {v_BSKV.dtype}: it takes bfloat16"
    for name, width, most in (("query", q_BTNH.shape[-1], MOST_QK), ("value", v_BSKV.shape[-1], MOST_VALUE)):
        if width % WIDTH or width > most:
            return f"{name} width {width} is no multiple of {WIDTH} up to {most}"
    if not scale > 0:
        return f"scale {scale} is not positive: the largest score would not be the largest weight"
    return None


def _reach(segments_BT, sign: int) -> tuple[jax.Array, jax.Array]:
    """far_BI, near_BI for queries (sign 1: earlier blocks) or keys (-1: later ones); any segments, in any order."""
    segments_BIR = segments_BT.reshape(len(segments_BT), -1, kernels.BLOCK)
    low_BI, high_BI = segments_BIR.min(axis=2), segments_BIR.max(axis=2)
    meets_BIJ = (low_BI[:, :, None] <= high_BI[:, None]) & (low_BI[:, None] <= high_BI[:, :, None])
    one_BI = low_BI == high_BI
    same_BIJ = meets_BIJ & one_BI[:, :, None] & one_BI[:, None]
    block = jnp.arange(low_BI.shape[1], dtype=jnp.int32)
    distance_IJ = sign * (block[:, None] - block)
    far_BI = 1 + jnp.max(jnp.where(meets_BIJ, distance_IJ, 0), axis=2)
    near_BI = jnp.min(jnp.where(same_BIJ | (distance_IJ < 0), len(block), distance_IJ), axis=2)
    return far_BI, jnp.minimum(near_BI, far_BI)


def flash_attention(q_BTNH, k_BSKH, v_BSKV, scale, segments_BT=None, offset_B=None, interpret=False):
    attend = functools.partial(_attend if offset_B is None else _attend_chunk, float(scale), interpret)
    last, letters = (segments_BT, "b.") if offset_B is None else (offset_B, "b")
    return over_mesh(attend, (q_BTNH, k_BSKH, v_BSKV, last), ("b.n.", "b.n.", "b.n.", letters), "b.n.")


def _attend(scale, interpret, q_BTNH, k_BTKH, v_BTKV, segments_BT):
    T = q_BTNH.shape[1]
    padding = (0, 0), (0, -T % kernels.BLOCK)
    padded = [jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKV)]
    if segments_BT is not None:
        segments_BT = jnp.pad(segments_BT.astype(jnp.int32), padding, constant_values=-1)
    return _whole_blocks(scale, interpret, *padded, segments_BT)[:, :T]


def _attend_chunk(scale, interpret, q_BTNH, k_BSKH, v_BSKV, offset_B):
    """A chunk of queries over a cache, forward only: a block meets the tiles from its own back to the first key's."""
    (B, T), S, block = q_BTNH.shape[:2], k_BSKH.shape[1], kernels.BLOCK
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, -T % block), (0, 0), (0, 0)))
    queries = q_BTNH.shape[1]
    k_BJKH, v_BJKV, marks_BJ = laid_to_end(k_BSKH, v_BSKV, offset_B, queries, S + -S % block + queries)
    offset_B1, first_I = jnp.minimum(offset_B, S)[:, None], jnp.arange(0, queries, block)
    far_BI = first_I // block + 1 + -(-offset_B1 // block)
    # Marks are needed in a tile that begins before the first key, and in all where the queries stand beyond the last.
    near_BI = jnp.where(offset_B1 + first_I <= S, far_BI - (offset_B1 % block > 0), 1)
    segments = jnp.ones((B, queries), jnp.int32), *(x.astype(jnp.int32) for x in (far_BI, near_BI))
    return kernels.forward(q_BTNH, k_BJKH, v_BJKV, segments, scale, interpret, marks_BJ)[0][:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole_blocks(scale, interpret, q_BTNH, k_BTKH, v_BTKV, segments_BT):
    return _forward(scale, interpret, q_BTNH, k_BTKH, v_BTKV, segments_BT)[0]


def _forward(scale, interpret, q_BTNH, k_BTKH, v_BTKV, segments_BT):
    segments = () if segments_BT is None else (segments_BT, *_reach(segments_BT, 1))
    o_BTNV, log_sum_BNT = kernels.forward(q_BTNH, k_BTKH, v_BTKV, segments, scale, interpret)
    return o_BTNV, (q_BTNH, k_BTKH, v_BTKV, segments_BT, o_BTNV, log_sum_BNT)


def _backward(scale, interpret, residuals, do_BTNV):
    q_BTNH, k_BTKH, v_BTKV, segments_BT, o_BTNV, log_sum_BNT = residuals
    delta_BTN = jnp.sum(o_BTNV.astype(jnp.float32) * do_BTNV, axis=-1)
    start_BNT = -log_sum_BNT / (scale * kernels.LOG2_E)
    starts_BN2T = jnp.stack([start_BNT, -delta_BTN.swapaxes(1, 2)], axis=2)
    arguments = q_BTNH, k_BTKH, v_BTKV, do_BTNV, starts_BN2T
    queries, keys = ((), ()) if segments_BT is None else ((segments_BT, *_reach(segments_BT, sign)) for sign in (1, -1))
    dq_BTNH = kernels.gradient_of_queries(*arguments, queries, scale, interpret)
    return dq_BTNH, *kernels.gradients_of_keys(*arguments, keys, scale, interpret), None


_whole_blocks.defvjp(_forward, _backward)
