"""Latent attention on Hopper, over a paged cache: Mosaic GPU, wgmma and TMA.

A block of the grid has 64 rows (queries x heads of one sequence) and meets its keys in pairs of tiles of 64. Tile i's
scores are computed once, by warpgroup i % 2, which takes the softmax over them and hands weights and row maxima to the
other through shared memory; both then add the tile's values, each to its half of the output's columns, so that one's
softmax hides under the other's products. A third warpgroup copies: the rotary part of a tile and the two halves of its
latents arrive and are released on their own. Quantised pages it reads itself, ahead, and leaves as bfloat16: the tiles
fill shared memory. A byte of int4 holds two neighbouring lanes: one goes to each half, and queries and output follow.
Split over the keys, each part leaves its log-sum-exp, and the parts are combined after.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.latent_attention.gpu_kernels import KEYS, ROPE, ROWS, latent_attention_kernel
from kernels_pallas.latent_attention.paged import in_one_piece
from kernels_pallas.mosaic_gpu import multiprocessors, not_hopper
from kernels_pallas.select import Target
from kernels_pallas.sharded import free_axes, kernel_output

SHARED_MEMORY = 227 << 10  # bytes of a block
PART_PAIRS = 2  # what reading the queries, writing a part's float32 sums and combining them costs, in pairs of tiles


def unsupported_paged(target: Target, q_BTNC, pages, page_table_BP, offset_B, value_dim, scale, scales) -> str | None:
    if reason := not_hopper(target):
        return reason
    if free_axes():
        return "the pages lie on several devices: call it inside jax.shard_map"
    if scales is None:
        return _unfit(q_BTNC, pages.shape[1], pages.shape[2], pages.dtype, value_dim)
    _, page, width = pages.shape
    if pages.dtype not in (jnp.int4, jnp.int8, jnp.float8_e4m3fn):
        return f"pages of {pages.dtype} with scales: int4, int8 and float8_e4m3fn are read"
    if page % KEYS:
        return f"pages of {page} positions in {pages.dtype}: must be a multiple of {KEYS}"
    if pages.dtype == jnp.int4 and width < value_dim + 2 * ROPE:
        return f"entries of {width} int4: must have {2 * ROPE} lanes beside the {value_dim} values"
    lanes = 16 if pages.dtype == jnp.int4 else 8
    return _unfit(q_BTNC, page, width, jnp.dtype(jnp.bfloat16), value_dim, lanes)


def unsupported(target: Target, q_BTNC, cache_BSC, offset_B, value_dim, scale) -> str | None:
    if reason := not_hopper(target):
        return reason
    S, C = cache_BSC.shape[1:]
    if S % 8:
        return f"a cache of {S} positions is not cut into pages: make its length a multiple of 8"
    return _unfit(q_BTNC, _page_of(S), C, cache_BSC.dtype, value_dim)


def _unfit(q_BTNC, page: int, width: int, dtype, value_dim: int, lanes: int = 64) -> str | None:
    """Args: lanes: what the width of an entry must be a multiple of: a row of the swizzle where TMA reads it."""
    if (q_BTNC.dtype, dtype) != (jnp.bfloat16, jnp.bfloat16):
        return f"queries of {q_BTNC.dtype} and a cache of {dtype}: both must be bfloat16"
    if page % KEYS and (KEYS % page or page < 8):
        return f"pages of {page} positions: must be 8, 16, 32 or a multiple of {KEYS}"
    if value_dim % 128:
        return f"value width {value_dim} is no multiple of 128"
    if not 0 < q_BTNC.shape[-1] - value_dim <= ROPE or width < value_dim + ROPE:
        return f"beside the {value_dim} values, entries of {width} do not hold a rotary part padded to {ROPE} lanes"
    if width % lanes:
        return f"entries of {width} are no multiple of {lanes} lanes"
    if (needed := _shared_memory(value_dim)) > SHARED_MEMORY:
        return f"value width {value_dim} takes {needed} bytes of shared memory, above {SHARED_MEMORY}"
    return None


def _shared_memory(R: int) -> int:
    """Bytes of queries, weights (one of which is the rotary query at first), two tiles, statistics, barriers."""
    return 2 * ROWS * (R + 2 * KEYS) + 2 * 2 * KEYS * (R + ROPE) + 2 * 2 * 4 * ROWS + 2048


def _page_of(S: int) -> int:
    """Page of a cache that is not paged: the largest power of two up to KEYS that divides it."""
    return min(S & -S, KEYS)


def _evens_first(x_BMC):
    return x_BMC.reshape(*x_BMC.shape[:2], -1, 2).swapaxes(2, 3).reshape(x_BMC.shape)


def _splits(units: int, pairs: int) -> int:
    """Parts of the keys: what takes the fewest rounds of all multiprocessors, counted in pairs of tiles."""
    cores = multiprocessors()

    def rounds(splits):
        return -(-units * splits // cores) * (-(-pairs // splits) + (PART_PAIRS if splits > 1 else 1))

    return min(range(1, min(pairs, cores) + 1), key=rounds)


def paged_latent_attention(
    q_BTNC, pages, page_table_BP, offset_B, value_dim, scale, scales=None, splits=None, interpret=False
):
    """`splits`: parts of the keys; None: as many as fill the cores."""
    (B, T, N, C), (_, page, width), P, R = q_BTNC.shape, pages.shape, page_table_BP.shape[1], value_dim
    blocks, is_packed = -(-T * N // ROWS), pages.dtype == jnp.int4
    q_BMC = jnp.pad(q_BTNC.reshape(B, T * N, C), ((0, 0), (0, blocks * ROWS - T * N), (0, R + ROPE - C)))
    if is_packed:  # two lanes in a byte: the kernel sees the even lanes first, then the odd ones
        q_BMC = jnp.concatenate([_evens_first(part) for part in jnp.split(q_BMC, [R], axis=-1)], axis=-1)
        width //= 2
        pages = jax.lax.bitcast_convert_type(pages.reshape(-1, page, width, 2), jnp.int8)
    # Blocks of at most KEYS positions, in the order of the positions, to a whole number of pairs of tiles.
    size = min(page, KEYS)
    pairs = -(-P * page // (2 * KEYS))
    inside = jnp.arange(page // size, dtype=jnp.int32)
    block_BX = (page_table_BP.astype(jnp.int32)[:, :, None] * (page // size) + inside).reshape(B, -1)
    block_BX = jnp.pad(block_BX, ((0, 0), (0, pairs * 2 * KEYS // size - block_BX.shape[1])), mode="edge")

    U, splits = B * blocks, splits or _splits(B * blocks, pairs)
    last_U = jnp.minimum(jnp.arange(1, blocks + 1) * ROWS, T * N) - 1  # row of the block that sees the most
    seen_U = jnp.minimum(offset_B[:, None] + last_U // N + 1, P * page).reshape(U)
    pairs_U, part_S1 = -(-seen_U // (2 * KEYS)), jnp.arange(splits)[:, None]
    first_SU, end_SU = pairs_U * part_S1 // splits, pairs_U * (part_S1 + 1) // splits
    tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

    def shared(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled)

    output = q_BTNC.dtype if splits == 1 else jnp.float32
    o_SUMR, lse_SUM = plgpu.kernel(
        functools.partial(
            latent_attention_kernel,
            heads=N,
            blocks=blocks,
            scale=scale,
            is_packed=is_packed,
            interpret=bool(interpret),
        ),
        out_type=[
            kernel_output((splits, U, ROWS, R), output, q_BMC, pages),
            kernel_output((splits, U, ROWS), jnp.float32, q_BMC, pages),
        ],
        scratch_types=[
            shared(1, ROWS, R),
            shared(2, ROWS, KEYS),
            shared(2, 2, KEYS, R // 2),
            shared(2, KEYS, ROPE),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=KEYS // size, num_barriers=6),  # one for each copy
            plgpu.Barrier(num_barriers=6),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(splits, U),
        grid_names=("part", "unit"),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="paged_latent_attention",
        interpret=interpret,
    )(
        first_SU.astype(jnp.int32),
        (end_SU - first_SU).astype(jnp.int32),
        offset_B.astype(jnp.int32),
        block_BX,
        q_BMC.reshape(U, ROWS, R + ROPE),
        pages.reshape(-1, size, width),
        *([] if scales is None else [scales.reshape(-1, 2, page // size, size)]),
    )
    o_UMR = o_SUMR[0]
    if splits > 1:
        share_SUM = jax.nn.softmax(lse_SUM, axis=0)
        o_UMR = jnp.sum(share_SUM[..., None] * o_SUMR, axis=0).astype(q_BTNC.dtype)
    if is_packed:
        o_UMR = o_UMR.reshape(U, ROWS, 2, R // 2).swapaxes(2, 3)
    return o_UMR.reshape(B, blocks * ROWS, R)[:, : T * N].reshape(B, T, N, R)


latent_attention = in_one_piece(paged_latent_attention, _page_of)
