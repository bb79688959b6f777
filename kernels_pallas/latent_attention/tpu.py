"""Latent attention on TPU, over a paged cache: page table and lengths are prefetched as scalars.

A unit of work is a block of queries of one row; its visible keys are met in chunks of pages, which the kernel copies
itself, one chunk ahead, across units too. Only live chunks are visited: the list of visits is made beforehand, and its
length bounds the grid. Split over the keys, each part leaves its log-sum-exp, and the parts are combined after.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.latent_attention.paged import in_one_piece
from kernels_pallas.select import Target, target
from kernels_pallas.sharded import free_axes, kernel_output

LANES = 128
VMEM_LIMIT = 48 << 20  # bytes; v5p has 64 MiB, v5e and v6e 128
SCALARS = 512 << 10  # bytes of page table and visits, in a scalar memory of 1 MiB
CHUNK = 1024  # keys met at once
ROWS = 512  # queries x heads of a unit
PAGES = jnp.bfloat16, jnp.float32, jnp.int4, jnp.int8, jnp.float8_e4m3fn
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")  # chips that are one device
_HIDDEN = -1e30  # finite, so that no inf - inf arises
_FIRST, _LAST, _KEYS = 1, 2, 4  # what a visit does
_NN, _NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def unsupported_paged(target: Target, q_BTNC, pages, page_table_BP, offset_B, value_dim, scale, scales) -> str | None:
    if target.platform != "tpu":
        return f"a TPU kernel, not for {target.platform}"
    if free_axes():
        return "the pages lie on several devices: call it inside jax.shard_map"
    return _unfit(q_BTNC, pages.shape[1], page_table_BP.shape[1], pages.dtype, value_dim)


def unsupported(target: Target, q_BTNC, cache_BSC, offset_B, value_dim, scale) -> str | None:
    if target.platform != "tpu":
        return f"a TPU kernel, not for {target.platform}"
    S = cache_BSC.shape[1]
    if not (page := _page_of(S)):
        return f"a cache of {S} positions is not cut into pages: make its length a multiple of 16"
    return _unfit(q_BTNC, page, S // page, cache_BSC.dtype, value_dim, f"a length that is a multiple of {CHUNK}")


def _unfit(q_BTNC, page: int, P: int, dtype, value_dim: int, larger_pages="larger pages") -> str | None:
    if q_BTNC.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries of {q_BTNC.dtype}: bfloat16 and float32 are multiplied"
    if dtype not in PAGES:
        return f"pages of {dtype}: {', '.join(jnp.dtype(x).name for x in PAGES)} are read"
    least = LANES if dtype.itemsize == 1 else 32 // dtype.itemsize  # scales of coded pages lie along the lanes
    if page % least or CHUNK % page:
        return f"pages of {page} positions in {dtype}: must be a multiple of {least} and divide {CHUNK}"
    if value_dim % LANES:
        return f"value width {value_dim} is no multiple of {LANES}"
    B, T, N, _ = q_BTNC.shape
    chunks = -(-P * page // CHUNK)
    visits = 3 * -(-T // _queries(T, N)) * chunks
    if (scalars := 4 * B * (P + visits)) > SCALARS:
        remedy = larger_pages if 4 * B * (chunks + visits) <= SCALARS else "fewer rows or queries at once"
        return f"page table and visits take {scalars} bytes of scalar memory, above {SCALARS}: use {remedy}"
    return None


def _page_of(S: int) -> int:
    """Page of a cache that is not paged: the largest power of two, 16 to CHUNK, that divides it; 0 if none does."""
    page = min(S & -S, CHUNK)
    return page if page >= 16 else 0


def _queries(T: int, N: int) -> int:
    """Queries of a unit."""
    return max(1, min(T, ROWS // N))


def _work(seen_U, splits: int, chunks: int):
    """The visits of each part: int32 [splits * V] unit, chunk and what to do; and how many there are, at most V.

    Part s of S meets chunks n s // S to n (s + 1) // S of a unit's n; one visit where that is none, to write zeros.
    """
    U = len(seen_U)
    V = U * -(-chunks // splits)
    n_U, part_S1 = -(-seen_U // CHUNK), jnp.arange(splits)[:, None]
    first_SU, end_SU = n_U * part_S1 // splits, n_U * (part_S1 + 1) // splits
    visits_SU = jnp.maximum(end_SU - first_SU, 1)
    last_SU = jnp.cumsum(visits_SU, axis=1)
    visit_V = jnp.arange(V)
    unit_SV = jax.vmap(lambda last_U: jnp.searchsorted(last_U, visit_V, side="right"))(last_SU)
    unit_SV = jnp.minimum(unit_SV, U - 1)

    def of_unit(x_SU):
        return jnp.take_along_axis(x_SU, unit_SV, axis=1)

    nth_SV = visit_V - of_unit(last_SU - visits_SU)
    does_SV = _FIRST * (nth_SV == 0) + _LAST * (nth_SV == of_unit(visits_SU) - 1)
    does_SV += _KEYS * (nth_SV < of_unit(end_SU - first_SU))
    does_SV = jnp.where(visit_V < last_SU[:, -1:], does_SV, 0)
    lists = (x.astype(jnp.int32).reshape(-1) for x in (unit_SV, of_unit(first_SU) + nth_SV, does_SV))
    return *lists, jnp.max(last_SU[:, -1]).astype(jnp.int32)


def _start(copy):
    copy.start()


def _wait(copy):
    copy.wait()


def _visible(key, place):
    return key <= place


def _kernel(
    unit_ref, chunk_ref, does_ref, seen_ref, place_ref, table_ref, q_ref, pages_ref, *refs, heads, blocks, scale, R, V
):
    *scales_ref, o_ref, lse_ref, buffer, scale_buffer, arrived, largest_ref, total_ref, sum_ref = refs
    keys, page, capacity = buffer.shape[1], pages_ref.shape[1], table_ref.shape[0] * blocks // seen_ref.shape[0]
    visit = pl.program_id(1)
    at, slot = pl.program_id(0) * V + visit, visit % 2
    unit, chunk, does = unit_ref[at], chunk_ref[at], does_ref[at]

    def over_pages(at, slot, do):
        unit, chunk = unit_ref[at], chunk_ref[at]
        first = unit // blocks * capacity + chunk * (keys // page)

        def one(i, _):
            source, rows = table_ref[first + i], pl.ds(i * page, page)
            do(pltpu.make_async_copy(pages_ref.at[source], buffer.at[slot, rows], arrived.at[slot]))
            for ref in scales_ref:
                do(pltpu.make_async_copy(ref.at[source], scale_buffer.at[slot, :, rows], arrived.at[slot]))
            return 0

        live = jnp.minimum(pl.cdiv(seen_ref[unit] - chunk * keys, page), keys // page)
        jax.lax.fori_loop(0, live, one, 0)
        return live

    @pl.when((visit == 0) & (does & _KEYS != 0))
    def _():
        over_pages(at, slot, _start)

    following = jnp.minimum(at + 1, does_ref.shape[0] - 1)

    @pl.when((visit + 1 < pl.num_programs(1)) & (does_ref[following] & _KEYS != 0))
    def _():
        over_pages(following, 1 - slot, _start)

    @pl.when(does & _FIRST != 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, _HIDDEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(does & _KEYS != 0)
    def _():
        live = over_pages(at, slot, _wait)

        def clear(i, _):  # what no copy has filled may hold NaN, which no weight of zero removes
            buffer[slot, pl.ds(i * page, page)] = jnp.zeros((page, buffer.shape[2]), buffer.dtype)
            if scales_ref:
                scale_buffer[slot, :, pl.ds(i * page, page)] = jnp.zeros((2, page), jnp.float32)
            return 0

        jax.lax.fori_loop(live, keys // page, clear, 0)
        q, c = q_ref[...], buffer[slot].astype(q_ref.dtype)
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        if scales_ref:
            of_value, of_rope = scale_buffer[slot, :1], scale_buffer[slot, 1:]
            scores = dot(q[:, :R], c[:, :R], _NT) * of_value + dot(q[:, R:], c[:, R:], _NT) * of_rope
        else:
            scores = dot(q, c, _NT)
        key = chunk * keys + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        place = place_ref[unit] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) // heads
        scores = jnp.where(_visible(key, place), scores * scale, _HIDDEN)
        before = largest_ref[:, :1]
        largest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        # A row that sees nothing yet keeps _HIDDEN as its largest; its weights must be zero, not exp(0).
        weights = jnp.where(scores > _HIDDEN / 2, jnp.exp(scores - largest), 0.0)
        kept = jnp.exp(before - largest)
        total_ref[...] = total_ref[...] * kept + jnp.sum(weights, axis=1, keepdims=True)
        weights = weights * of_value if scales_ref else weights
        sum_ref[...] = sum_ref[...] * kept + dot(weights.astype(q.dtype), c[:, :R], _NN)
        largest_ref[...] = jnp.broadcast_to(largest, largest_ref.shape)

    @pl.when(does & _LAST != 0)
    def _():
        total = total_ref[...]
        o_ref[...] = (sum_ref[...] / jnp.maximum(total[:, :1], 1e-30)).astype(o_ref.dtype)
        lse_ref[...] = largest_ref[...] + jnp.log(jnp.maximum(total, 1e-30))


def paged_latent_attention(
    q_BTNC, pages, page_table_BP, offset_B, value_dim, scale, scales=None, splits=None, interpret=False
):
    """`splits`: parts of the keys; None: one for each core that shares a chip's work."""
    splits = splits or (2 if target().kind in TWO_CORES else 1)
    B, T, N, C = q_BTNC.shape
    page, width, P = *pages.shape[1:], page_table_BP.shape[1]
    queries = _queries(T, N)
    blocks, rows = -(-T // queries), -(-queries * N // 16) * 16
    q_BTNC = jnp.pad(q_BTNC, ((0, 0), (0, blocks * queries - T), (0, 0), (0, width - C)))
    q_UMC = q_BTNC.reshape(B * blocks, queries * N, width)
    q_UMC = jnp.pad(q_UMC, ((0, 0), (0, rows - queries * N), (0, 0)))
    place_U = (offset_B[:, None] + jnp.arange(blocks) * queries).reshape(-1).astype(jnp.int32)
    end_B = jnp.minimum(offset_B + T, P * page)
    seen_U = jnp.minimum(place_U + queries, jnp.repeat(end_B, blocks)).astype(jnp.int32)
    unit, chunk, does, visits = _work(seen_U, splits, -(-P * page // CHUNK))
    V = len(unit) // splits

    def of_unit(s, v, unit_ref, *_):
        return unit_ref[s * V + v], 0, 0

    def of_part(s, v, unit_ref, *_):
        return s, unit_ref[s * V + v], 0, 0

    U, R, inputs = B * blocks, value_dim, [pages] if scales is None else [pages, scales]
    output = q_BTNC.dtype if splits == 1 else jnp.float32
    o_SUMR, lse_SUML = pl.pallas_call(
        functools.partial(_kernel, heads=N, blocks=blocks, scale=scale, R=R, V=V),
        out_shape=[
            kernel_output((splits, U, rows, R), output, q_UMC, pages),
            kernel_output((splits, U, rows, LANES), jnp.float32, q_UMC, pages),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(splits, visits),
            in_specs=[pl.BlockSpec((None, rows, width), of_unit)] + [pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
            out_specs=[
                pl.BlockSpec((None, None, rows, R), of_part),
                pl.BlockSpec((None, None, rows, LANES), of_part),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, CHUNK, width), pages.dtype),
                pltpu.VMEM((2, 2, CHUNK), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, R), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="paged_latent_attention",
    )(unit, chunk, does, seen_U, place_U, page_table_BP.reshape(-1).astype(jnp.int32), q_UMC, *inputs)
    o_UMR = o_SUMR[0]
    if splits > 1:
        share_SUM1 = jax.nn.softmax(lse_SUML[..., :1], axis=0)
        o_UMR = jnp.sum(share_SUM1 * o_SUMR, axis=0).astype(q_BTNC.dtype)
    return o_UMR[:, : queries * N].reshape(B, blocks * queries, N, R)[:, :T]


latent_attention = in_one_piece(paged_latent_attention, _page_of)
