"""Latent attention on Hopper, over a paged cache: Mosaic GPU, wgmma and TMA.

A block of the grid has 64 rows (queries x heads of one sequence) and meets its keys in pairs of tiles of 64. Tile i's
scores are computed once, by warpgroup i % 2, which takes the softmax over them and hands weights and row maxima to the
other through shared memory; both then add the tile's values, each to its half of the output's columns, so that one's
softmax hides under the other's products. A third warpgroup copies: the rotary part of a tile and the two halves of its
latents arrive and are released on their own. Quantised pages it reads itself, ahead, and leaves as bfloat16: the tiles
fill shared memory. Split over the keys, each part leaves its log-sum-exp, and the parts are combined after.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.latent_attention.paged import in_one_piece
from kernels_pallas.mosaic_gpu import multiprocessors, not_hopper
from kernels_pallas.select import Target
from kernels_pallas.sharded import free_axes, kernel_output

ROWS = KEYS = ROPE = 64  # rows of a block; keys of a tile; lanes of the rotary part, zeros beyond its width
SHARED_MEMORY = 227 << 10  # bytes of a block
CHUNK = 128  # lanes that are de-quantised at once
PART_PAIRS = 2  # what reading the queries, writing a part's float32 sums and combining them costs, in pairs of tiles
_HIDDEN, _LEAST = -1e30, -1e20  # of a score, and of a maximum, so that a row that sees nothing yet has weights of 0
_REGISTERS = (40, 232), (80, 216)  # of a thread that copies, and that computes; the second where it de-quantises
_NO_INDEX = (None,) if jax.__version_info__ < (0, 11) else ()  # of plgpu.load, where the reference is indexed before
_ROPE, _HALF = 0, 1  # barriers of a tile: of the rotary part, then of each half of the latents


def unsupported_paged(target: Target, q_BTNC, pages, page_table_BP, offset_B, value_dim, scale, scales) -> str | None:
    if reason := not_hopper(target):
        return reason
    if free_axes():
        return "the pages lie on several devices: call it inside jax.shard_map"
    if scales is None:
        return _unfit(q_BTNC, pages.shape[1], pages.shape[2], pages.dtype, value_dim)
    if pages.dtype not in (jnp.int8, jnp.float8_e4m3fn) or pages.shape[1] % KEYS:
        return f"pages of {pages.shape[1]} {pages.dtype}: must be multiples of {KEYS} int8 or float8_e4m3fn"
    return _unfit(q_BTNC, pages.shape[1], pages.shape[2], jnp.dtype(jnp.bfloat16), value_dim, lanes=8)


def unsupported(target: Target, q_BTNC, cache_BSC, offset_B, value_dim, scale) -> str | None:
    if reason := not_hopper(target):
        return reason
    S, C = cache_BSC.shape[1:]
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


def _splits(units: int, pairs: int) -> int:
    """Parts of the keys: what takes the fewest rounds of all multiprocessors, counted in pairs of tiles."""
    cores = multiprocessors()

    def rounds(splits):
        return -(-units * splits // cores) * (-(-pairs // splits) + (PART_PAIRS if splits > 1 else 1))

    return min(range(1, min(pairs, cores) + 1), key=rounds)


def _visible(key, place):
    return key <= place


def _wait_for_weights(barrier):
    plgpu.barrier_wait(barrier)


def _kernel(
    first_ref,
    pairs_ref,
    offset_ref,
    block_ref,
    q_ref,
    pages_ref,
    *refs,
    heads,
    blocks,
    scale,
    interpret,
):
    *scales_ref, o_ref, lse_ref, q_smem, weight_smem, latent_smem, rope_smem, max_smem, sum_smem = refs[:-5]
    q_loaded, loaded, consumed, published, finished = refs[-5:]
    part, unit, group = (jax.lax.axis_index(name) for name in ("part", "unit", "group"))
    first, pairs = first_ref[part, unit], pairs_ref[part, unit]
    sequence = jax.lax.div(unit, jnp.int32(blocks))
    R = q_smem.shape[2]
    copies = KEYS // pages_ref.shape[1]
    halves = [pl.ds(w * (R // 2), R // 2) for w in range(2)]
    parts = [pl.ds(R, ROPE), *halves]
    copying, computing = _REGISTERS[bool(scales_ref)]

    def cast(x, layout):
        return x if interpret else plgpu.layout_cast(x, layout)  # the interpreter of JAX 0.10 has no layouts

    def read(ref, layout):
        """From global memory; a plain index, which the interpreter of JAX 0.10 asks for, takes no layout."""
        return ref[...] if interpret else plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False)

    def of_rows(x_M):
        return cast(x_M, plgpu.Layout.WGMMA.reduce(1))

    def hidden(index):
        """An index the compiler cannot see through: it would keep a tile's 36 matrix descriptors in registers."""
        return jax.lax.optimization_barrier(jnp.int32(index))

    def across(x_M, like):
        return jax.lax.broadcast_in_dim(x_M, like.shape, [0])

    @pl.when(group == 2)
    def _():
        plgpu.set_max_registers(copying, action="decrease")
        plgpu.copy_gmem_to_smem(q_ref.at[unit, :, pl.ds(0, R)], q_smem.at[0], q_loaded)
        # The rotary query stands in the second tile of weights until both warpgroups hold it in registers.
        plgpu.copy_gmem_to_smem(q_ref.at[unit, :, pl.ds(R, ROPE)], weight_smem.at[1], q_loaded)

        def released(j, slot, k):
            pl.when(j > 0)(functools.partial(plgpu.barrier_wait, consumed.at[3 * slot + k]))

        def copied(j, slot, k):
            """Part k of the pair's tile `slot` from its blocks."""
            released(j, slot, k)
            for i in range(copies):
                source = block_ref[sequence, (2 * (first + j) + slot) * copies + i]
                rows = pl.ds(i * (KEYS // copies), KEYS // copies)
                target = rope_smem.at[slot, rows] if k == _ROPE else latent_smem.at[slot, k - _HALF, rows]
                plgpu.copy_gmem_to_smem(pages_ref.at[source, :, parts[k]], target, loaded.at[3 * slot + k])

        def layout(columns):
            return plgpu.Layout.SMEM_GMEM_COPY((KEYS, columns.size), jnp.bfloat16, 128)

        def fetched(j, slot, k, columns):
            """Columns of part k as values, not yet multiplied, and their scales."""
            source, inside = block_ref[sequence, 2 * (first + j) + slot], jnp.int32(scales_ref[0].shape[2])
            place = jax.lax.div(source, inside), int(k == _ROPE), jax.lax.rem(source, inside)
            scale_K = read(scales_ref[0].at[place], layout(columns).reduce(1))
            return read(pages_ref.at[source, :, columns], layout(columns)), scale_K

        def dequantised(j, slot, k, columns, values, scale_K):
            values = values.astype(jnp.bfloat16 if values.dtype == jnp.int8 else jnp.float16).astype(jnp.float32)
            values = (values * cast(across(scale_K, values), layout(columns))).astype(jnp.bfloat16)
            at = columns.start - parts[k].start
            if at == 0:
                released(j, slot, k)
            if k == _ROPE:
                rope_smem[slot] = values
            else:
                latent_smem[slot, k - _HALF, :, pl.ds(at, columns.size)] = values
            if at + columns.size == parts[k].size:
                plgpu.commit_smem()
                plgpu.barrier_arrive(loaded.at[3 * slot + k])

        def copy_pair(j, _):
            for slot in range(2):
                for k in range(3):
                    copied(j, slot, k)
            return 0

        def dequantise_pair(j, ahead):
            following = jnp.minimum(j + 1, pairs - 1)
            for i, piece in enumerate(pieces):
                last = i + 1 == len(pieces)
                here, ahead = ahead, fetched(following if last else j, *pieces[0 if last else i + 1])
                dequantised(j, *piece, *here)
            return ahead

        width = math.gcd(R // 2, CHUNK)
        pieces = [
            (slot, k, pl.ds(at, min(width, part.size)))
            for slot in range(2)
            for k, part in enumerate(parts)
            for at in range(part.start, part.start + part.size, width)
        ]
        if scales_ref:
            jax.lax.fori_loop(0, pairs, dequantise_pair, fetched(0, *pieces[0]))
        else:
            jax.lax.fori_loop(0, pairs, copy_pair, 0)

        @pl.when(pairs > 0)
        def _():
            for k in range(6):
                plgpu.barrier_wait(consumed.at[k])

    def loaded_operand(a):
        """For the interpreter only; its loads count as the tensor cores' where `commit_smem` follows them."""
        value = a if isinstance(a, jax.Array) else a[...]
        plgpu.commit_smem()
        return value

    def times_transposed(accumulator, a, b_ref):
        if interpret:  # which has neither transposed references nor operands in registers
            a, b = loaded_operand(a), loaded_operand(b_ref)
            return accumulator + jnp.dot(a, b.T, preferred_element_type=jnp.float32)
        plgpu.wgmma(accumulator, a, b_ref.transpose((1, 0)))
        return accumulator

    def add_values(sum_MR, a, slot, half):
        values = latent_smem.at[hidden(slot), half]
        if interpret:  # which has no run_state
            a, values = loaded_operand(a), loaded_operand(values)
            return sum_MR + jnp.dot(a, values, preferred_element_type=jnp.float32)
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, values))(plgpu.ACC.init(sum_MR))

    def compute(w):
        """Warpgroup w: scores of tiles w, w + 2, ...; half w of the output."""
        plgpu.set_max_registers(computing, action="increase")
        plgpu.barrier_wait(q_loaded)
        rope_q = weight_smem[1]
        row = of_rows(jax.lax.broadcasted_iota(jnp.int32, (ROWS,), 0))
        row += jax.lax.rem(unit, jnp.int32(blocks)) * ROWS
        place_M = offset_ref[sequence] + jax.lax.div(row, jnp.full_like(row, heads))

        def scores():
            zero, own = hidden(0), hidden(w)

            def products(accumulator):
                for k, a, b in (
                    (_ROPE, rope_q, rope_smem.at[own]),
                    (_HALF, q_smem.at[zero, :, halves[0]], latent_smem.at[own, 0]),
                    (_HALF + 1, q_smem.at[zero, :, halves[1]], latent_smem.at[own, 1]),
                ):
                    plgpu.barrier_wait(loaded.at[3 * w + k])
                    accumulator = times_transposed(accumulator, a, b)
                return accumulator if interpret else accumulator[...]

            zeros = jnp.zeros((ROWS, KEYS), jnp.float32)
            s_MK = products(zeros) if interpret else pl.run_scoped(products, plgpu.ACC((ROWS, KEYS), jnp.float32))
            plgpu.barrier_arrive(consumed.at[3 * w + _ROPE])
            return s_MK

        def publish(s_MK, tile, before_M):
            """Weights of the tile, for the other warpgroup too, with the rows' maxima so far and their sums."""
            key = cast(jax.lax.broadcasted_iota(jnp.int32, s_MK.shape, 1), plgpu.Layout.WGMMA) + tile * KEYS
            s_MK = jnp.where(_visible(key, across(place_M, s_MK)), s_MK * (scale * math.log2(math.e)), _HIDDEN)
            largest_M = jnp.maximum(before_M, jnp.max(s_MK, axis=1))
            weight_MK = jnp.exp2(s_MK - across(largest_M, s_MK))
            rounded_MK = weight_MK.astype(jnp.bfloat16)
            weight_smem[w] = rounded_MK
            max_smem[w] = largest_M
            plgpu.commit_smem()
            plgpu.barrier_arrive(published.at[w])
            return rounded_MK, largest_M, jnp.sum(weight_MK, axis=1)

        def meet(weights, slot, kept_M, sum_MR):
            if slot != w:
                plgpu.barrier_wait(loaded.at[3 * slot + _HALF + w])
            sum_MR = add_values(sum_MR * across(kept_M, sum_MR), weights, slot, w)
            plgpu.barrier_arrive(consumed.at[3 * slot + _HALF + w])
            return sum_MR

        def pair(j, carry):
            sum_MR, before_M, total_M = carry
            tile = 2 * (first + j) + w
            s_MK = scores()
            if w == 0:
                weights, first_M, here_M = publish(s_MK, tile, before_M)
                kept_M = jnp.exp2(before_M - first_M)
                sum_MR = meet(weights, 0, kept_M, sum_MR)
                total_M = total_M * kept_M + here_M
                _wait_for_weights(published.at[1])
                second_M = of_rows(max_smem[1])
                kept_M = jnp.exp2(first_M - second_M)
                sum_MR = meet(weight_smem.at[1], 1, kept_M, sum_MR)
                return sum_MR, second_M, total_M * kept_M
            _wait_for_weights(published.at[0])
            first_M = of_rows(max_smem[0])
            weights, second_M, here_M = publish(s_MK, tile, first_M)
            sum_MR = meet(weight_smem.at[0], 0, jnp.exp2(before_M - first_M), sum_MR)
            sum_MR = meet(weights, 1, jnp.exp2(first_M - second_M), sum_MR)
            return sum_MR, second_M, total_M * jnp.exp2(before_M - second_M) + here_M

        least_M, zero_M = (of_rows(jnp.full((ROWS,), value, jnp.float32)) for value in (_LEAST, 0.0))
        start = cast(jnp.zeros((ROWS, R // 2), jnp.float32), plgpu.Layout.WGMMA), least_M, zero_M
        sum_MR, largest_M, total_M = jax.lax.fori_loop(0, pairs, pair, start)
        sum_smem[w] = total_M
        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)
        total_M = jnp.maximum(total_M + of_rows(sum_smem[1 - w]), 1e-30)
        o_ref[part, unit, :, halves[w]] = (sum_MR / across(total_M, sum_MR)).astype(o_ref.dtype)
        if w == 0:
            lse_ref[part, unit] = largest_M * math.log(2) + jnp.log(total_M)

    for w in range(2):
        pl.when(group == w)(functools.partial(compute, w))


def paged_latent_attention(
    q_BTNC, pages, page_table_BP, offset_B, value_dim, scale, scales=None, splits=None, interpret=False
):
    """`splits`: parts of the keys; None: as many as fill the cores."""
    (B, T, N, C), (_, page, width), P, R = q_BTNC.shape, pages.shape, page_table_BP.shape[1], value_dim
    blocks = -(-T * N // ROWS)
    q_BMC = jnp.pad(q_BTNC.reshape(B, T * N, C), ((0, 0), (0, blocks * ROWS - T * N), (0, R + ROPE - C)))
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
        functools.partial(_kernel, heads=N, blocks=blocks, scale=scale, interpret=bool(interpret)),
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
    return o_UMR.reshape(B, blocks * ROWS, R)[:, : T * N].reshape(B, T, N, R)


latent_attention = in_one_piece(paged_latent_attention, _page_of)
