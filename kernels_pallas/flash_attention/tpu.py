"""Causal attention on TPU by the splash kernels bundled with JAX, forward and backward: no score reaches HBM.

They take no scale (the queries are scaled before), whole blocks only (the sequence is padded at its end, where
causality hides it), and one row at a time (vmapped). Of a chunk of queries over a cache, forward only, all blocks
before it are computed, seen or not.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from kernels_pallas.flash_attention.chunk import laid_to_end
from kernels_pallas.select import Target
from kernels_pallas.sharded import over_mesh

LANES = 128
BLOCK_Q, BLOCK_KV = 512, 1024


def unsupported(target: Target, q_BTNH, k_BSKH, v_BSKV, scale=None, segments_BT=None, offset_B=None) -> str | None:
    if target.platform != "tpu":
        return f"a TPU kernel, not for {target.platform}"
    if offset_B is not None and q_BTNH.shape[1] < LANES:
        return f"{q_BTNH.shape[1]} queries over a cache (offset_B): fewer than the {LANES} of the smallest block"
    if v_BSKV.shape[-1] % LANES:
        return f"value width {v_BSKV.shape[-1]} is no multiple of {LANES}"
    if not q_BTNH.dtype == k_BSKH.dtype == v_BSKV.dtype or q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k, v of {q_BTNH.dtype}, {k_BSKH.dtype}, {v_BSKV.dtype}: it takes one of bfloat16, float32 for all"
    return None


def _blocks(T: int) -> tuple[int, splash.BlockSizes]:
    """Padded length and block sizes: as large as the sequence allows, so that little is padding."""
    whole = -(-T // LANES) * LANES
    block_q = min(BLOCK_Q, whole)
    padded = -(-whole // block_q) * block_q
    block_kv = BLOCK_KV if padded % BLOCK_KV == 0 else block_q
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_q,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_q,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return padded, sizes


def flash_attention(q_BTNH, k_BSKH, v_BSKV, scale, segments_BT=None, offset_B=None, interpret=False):
    q_BTNH = (q_BTNH * scale).astype(q_BTNH.dtype)
    attend = functools.partial(_attend if offset_B is None else _attend_chunk, interpret=interpret)
    last, letters = (segments_BT, "b.") if offset_B is None else (offset_B, "b")
    return over_mesh(attend, (q_BTNH, k_BSKH, v_BSKV, last), ("b.n.", "b.n.", "b.n.", letters), "b.n.")


def _attend(q_BTNH, k_BTKH, v_BTKV, segments_BT, interpret):
    T = q_BTNH.shape[1]
    padded, sizes = _blocks(T)
    qkv = (_padded(x, padded) for x in (q_BTNH, k_BTKH, v_BTKV))
    segments = None
    if segments_BT is not None:
        padded_BT = jnp.pad(segments_BT, ((0, 0), (0, padded - T)), constant_values=-1)
        segments = splash.SegmentIds(padded_BT, padded_BT)
    return _splash(*qkv, segments, sizes, interpret)[:, :T]


def _attend_chunk(q_BTNH, k_BSKH, v_BSKV, offset_B, interpret):
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    block_q = min(BLOCK_Q, -(-T // LANES) * LANES)
    block_kv = block_q * (BLOCK_KV // block_q)
    queries = -(-T // block_q) * block_q
    keys = -(-(S + queries) // block_kv) * block_kv
    k_BJKH, v_BJKV, marks_BJ = laid_to_end(k_BSKH, v_BSKV, offset_B, queries, keys)
    segments = splash.SegmentIds(jnp.ones((B, queries), jnp.int32), marks_BJ)
    sizes = splash.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=block_q)
    return _splash(_padded(q_BTNH, queries), k_BJKH, v_BJKV, segments, sizes, interpret)[:, :T]


def _padded(x_BTNH, length: int):
    return jnp.pad(x_BTNH, ((0, 0), (0, length - x_BTNH.shape[1]), (0, 0), (0, 0)))


def _splash(q_BTNH, k_BSKH, v_BSKV, segments, sizes, interpret):
    """Whole blocks; the last query stands at the last key."""
    (T, N), S = q_BTNH.shape[1:3], k_BSKH.shape[1]
    mask = masks.MultiHeadMask([masks.CausalMask((T, S), offset=S - T)] * N)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    rows = *(x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKV)), segments
    # The interpreter cannot batch a kernel that declares dimension semantics: there, row by row.
    o_BNTV = jax.lax.map(lambda row: kernel(*row), rows) if interpret else jax.vmap(kernel)(*rows)
    return o_BNTV.swapaxes(1, 2)
