"""Grouped matmul on Hopper: persistent blocks, one warpgroup that copies (TMA), two that multiply (wgmma).

Work is counted in units of 64 rows, the least that wgmma multiplies: a block takes up to two units of one expert, one
for each multiplying warpgroup, so that small groups waste no more than a unit and large ones read the weights once
for 128 rows. The copying warpgroup runs ahead, over the ends of blocks too. Where a width ends inside a block, which
it does by whole rows of a swizzle or before the first has ended, TMA reads zeros and writes nothing. Weights of one
byte are widened to bfloat16 between shared memory and wgmma.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.grouped_matmul.differentiable import operations
from kernels_pallas.mosaic_gpu import WARPGROUP, multiprocessors, not_hopper, read, varying_as
from kernels_pallas.select import Target
from kernels_pallas.sharded import free_axes
from kernels_pallas.tiles import TileLayout

UNIT = 64  # rows of a wgmma
DEPTH = 64  # contracted in a step: 128 bytes of bfloat16, a row of the widest swizzle
COLUMNS = 256  # of a block, over all its products
CHUNK = 64  # columns written at a time
SWIZZLE = 128  # bytes in a row of the widest one, which TMA does not cut but where it is the only one
STAGES = 4  # steps that the copies may be ahead
CONSUMERS = 2  # multiplying warpgroups
COPY_REGISTERS, MULTIPLY_REGISTERS = 40, 232  # of a thread: 128 x (40 + 2 x 232) fill the register file
CODES = jnp.int8, jnp.float8_e4m3fn


def unsupported(target: Target, x_GD, weights, layout) -> str | None:
    if reason := not_hopper(target):
        return reason
    if free_axes():
        return "the rows lie on several devices: call it inside jax.shard_map"
    if x_GD.dtype != jnp.bfloat16:
        return f"rows of {x_GD.dtype}: only bfloat16 is multiplied"
    dtype = weights[0].dtype
    if dtype != jnp.bfloat16 and dtype not in CODES:
        return f"weights of {dtype}: bfloat16, int8 and float8_e4m3fn are read"
    if layout.tile % UNIT:
        return f"tiles of {layout.tile} rows are no multiple of {UNIT}, the rows of a wgmma"
    D, F = weights[0].shape[1:]
    if D % 8 or F % (16 // dtype.itemsize):
        return f"weights {D} x {F} of {dtype}: TMA reads rows that are multiples of 16 bytes"
    # In bfloat16 both widths are read or written in rows of the swizzle, here or in the gradients.
    lanes = SWIZZLE // 2
    last = SWIZZLE if dtype in CODES and len(weights) == 1 else lanes
    if _is_cut(D, lanes) or _is_cut(F, lanes) or _is_cut(F, last):
        limit = f"up to {lanes} or multiples of {lanes}" + (f", the last of {last} beyond it" if last > lanes else "")
        return f"weights {D} x {F} of {dtype}: TMA takes widths {limit}"
    return None


def _is_cut(width: int, lanes: int) -> bool:
    return width > lanes and width % lanes != 0


# --- which rows meet which expert -------------------------------------------------------------------------------------


def _units(layout: TileLayout, experts: int) -> jax.Array:
    """int32 [experts + 1]: units of each expert, and those of the dead tiles, which lie last."""
    tiles = len(layout.expert_of_tile)
    expert = jnp.where(jnp.arange(tiles) < layout.live_tiles, layout.expert_of_tile, experts)
    return jnp.zeros(experts + 1, jnp.int32).at[expert].add(layout.tile // UNIT)


def _blocks(layout: TileLayout, experts: int, most: int) -> tuple[jax.Array, jax.Array]:
    """The number of blocks, int32 [1], and of each its expert, first unit and units (up to `most`), int32 [3, bound].

    Dead tiles are blocks too, of the expert called `experts`: their rows are written as zeros.
    """
    units_E = _units(layout, experts)
    blocks_E = -(-units_E // most)
    end_E = jnp.cumsum(blocks_E)
    total = layout.token_of_row_G.shape[0] // UNIT
    bound = (total + (most - 1) * (experts + 1)) // most
    block = jnp.arange(bound, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(end_E, block, side="right"), experts).astype(jnp.int32)
    before = most * (block - (end_E - blocks_E)[expert])
    first = (jnp.cumsum(units_E) - units_E)[expert] + before
    return end_E[-1:], jnp.stack([expert, first, jnp.minimum(units_E[expert] - before, most)])


# --- a persistent kernel over blocks of work --------------------------------------------------------------------------


class Work(NamedTuple):
    """A block of the result, as one warpgroup sees it."""

    steps: jax.Array  # of `DEPTH`
    is_mine: jax.Array | bool  # whether this warpgroup has rows in it
    load: Callable  # (step, stage): starts the step's copies
    multiply: Callable  # (accumulators, stage, count): starts the step's products
    finish: Callable  # (*sums): writes the result


def _run(total, work: Callable, ready, free, accumulators: list[tuple[int, int]]) -> None:
    """Does `work(i)` for every i < total that is this block's turn.

    Args:
      ready: barriers of the stages, on which their copies arrive.
      free: barriers of the stages, on which the multiplying warpgroups arrive when they have read one.
      accumulators: shapes of a warpgroup's sums.
    """
    me, blocks, wg = lax.axis_index("sm"), lax.axis_size("sm"), lax.axis_index("wg")
    turns = lax.div(total + (blocks - 1) - me, blocks)

    def over_turns(body):
        return lax.fori_loop(0, turns, lambda turn, count: body(work(me + turn * blocks), count), jnp.int32(0))

    @pl.when(wg == CONSUMERS)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        def turn(block, count):
            def step(k, count):
                stage = lax.rem(count, STAGES)
                plgpu.barrier_wait(free.at[stage])
                block.load(k, stage)
                return count + 1

            return lax.fori_loop(0, block.steps, step, count)

        over_turns(turn)
        for stage in range(STAGES):  # a barrier may not end in a phase that nobody saw
            plgpu.barrier_wait(free.at[stage])

    @pl.when(wg < CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        for stage in range(STAGES):
            plgpu.barrier_arrive(free.at[stage])

        def turn(block, count):
            mine = jnp.where(block.is_mine, block.steps, 0)

            def products(*sums):
                def step(k, count):
                    stage = lax.rem(count, STAGES)
                    plgpu.barrier_wait(ready.at[stage])
                    block.multiply(sums, stage, count)
                    plgpu.wgmma_wait(len(sums))  # those of the step before are done

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(count - 1, STAGES)])

                    return count + 1

                after = lax.fori_loop(0, mine, step, count)
                return [sum_[...] for sum_ in sums], after

            sums, count = pl.run_scoped(products, *(plgpu.ACC(shape, jnp.float32) for shape in accumulators))

            @pl.when(mine > 0)
            def _():
                plgpu.barrier_arrive(free.at[lax.rem(count - 1, STAGES)])

            def skip(_, count):
                stage = lax.rem(count, STAGES)
                plgpu.barrier_wait(ready.at[stage])
                plgpu.barrier_arrive(free.at[stage])
                return count + 1

            count = lax.fori_loop(mine, block.steps, skip, count)
            pl.when(block.is_mine)(lambda: block.finish(*sums))
            return count

        over_turns(turn)
        plgpu.wait_smem_to_gmem(0)


def _write(values, outs, rows, first, staging, wg) -> None:
    """Writes each of `values` [UNIT, n], in chunks, to the rows of its `out` from column `first` on."""
    chunk = staging.shape[-1]
    chunks = [(v, out, column) for v, out in zip(values, outs) for column in range(0, v.shape[1], chunk)]

    def write(value, out, column, slot):
        staging[wg, slot] = value[:, column : column + chunk].astype(staging.dtype)
        plgpu.commit_smem()
        here = out.at[rows, pl.ds(first + column, chunk)]
        plgpu.copy_smem_to_gmem(staging.at[wg, slot], here, commit_group=False)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i, (value, out, column) in enumerate(chunks):
        if i > 1:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        pl.when(first + column < out.shape[-1])(functools.partial(write, value, out, column, i % 2))
        plgpu.commit_smem_to_gmem_group()  # an empty one where there is no chunk, so that waiting counts right


def _shared(shape, dtype, row: int | None = None):
    """Scratch in shared memory, swizzled by rows of `row` columns, which a slice of it may not cut."""
    row = row or shape[-1]
    swizzle = min(row * jnp.dtype(dtype).itemsize, 128)
    lanes = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(swizzle)))


def _kernel(body, out_type, name, interpret, copies, **scratch):
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(multiprocessors(),),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=scratch
        | {
            "staging": _shared((CONSUMERS, 2, UNIT, CHUNK), jnp.bfloat16),
            "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        },
        compiler_params=WARPGROUP,
        interpret=interpret,
        kernel_name=name,
    )


def _output(shape, interpret):
    """Type of a result of bfloat16. The interpreter drops a write that TMA would clip: it gets room for all of it."""
    *lead, rows, columns = shape
    if interpret:
        rows, columns = pl.cdiv(rows, UNIT) * UNIT, pl.cdiv(columns, CHUNK) * CHUNK
    return jax.ShapeDtypeStruct((*lead, rows, columns), jnp.bfloat16)


def _transposed(ref, flipped):
    """wgmma reads a transposed operand as it lies; the interpreter cannot, and gets it copied to `flipped`."""
    if flipped is None:
        return ref.transpose((1, 0))
    flipped = flipped.at[lax.axis_index("wg")]
    flipped[...] = ref[...].T
    plgpu.commit_smem()
    return flipped


# --- rows: y = epilogue(x_0 w_0, x_1 w_1, ...) ------------------------------------------------------------------------


def _rows(xs, ws, layout, epilogue, outputs, interpret, transposed=False, scales=()):
    """`outputs` arrays [G, N] of epilogue(x w, ...); dead tiles zero.

    Args:
      xs: one, which meets every w; or one for each w, and the epilogue gets the sum of their products.
      transposed: contract the weights' last axis instead of the one before.
      scales: [E, N] of each w, of one byte an element, by which its product is multiplied.
    """
    (G, K), (E, *matrix) = xs[0].shape, ws[0].shape
    N = matrix[0] if transposed else matrix[1]
    products = 1 if len(xs) > 1 else len(ws)
    columns, depth_steps = COLUMNS // products, pl.cdiv(K, DEPTH)
    # Weights of one byte: both warpgroups have the same rows, and each widens the weights of its own columns.
    units, width = (1, columns // CONSUMERS) if scales else (CONSUMERS, columns)
    across = pl.cdiv(N, columns)

    def body(count, table, *refs, a, b, staging, ready, free, wide=None, flipped=None):
        x_refs, w_refs, scale_refs = refs[: len(xs)], refs[len(xs) :][: len(ws)], refs[len(xs) + len(ws) : -outputs]
        wg = lax.axis_index("wg")

        def work(i):
            block, n = lax.div(i, across), lax.rem(i, across)
            expert, first, size = table[0, block], table[1, block], table[2, block]
            is_live, e = expert < E, jnp.minimum(expert, E - 1)
            mine = wg * width if scales else 0

            def copy(pairs, k, stage):
                x_ref, w_refs = pairs
                rows, depth = pl.ds(first * UNIT, units * UNIT), pl.ds(k * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(x_ref.at[rows, depth], a.at[stage], ready.at[stage])
                for p, w_ref in enumerate(w_refs):
                    part = pl.ds(n * columns, columns)
                    part = w_ref.at[e, part, depth] if transposed else w_ref.at[e, depth, part]
                    plgpu.copy_gmem_to_smem(part, b.at[stage, p], ready.at[stage])

            def load(k, stage):
                if len(xs) == 1:
                    return copy((x_refs[0], w_refs), k, stage)
                for i, (x_ref, w_ref) in enumerate(zip(x_refs, w_refs)):
                    pl.when(lax.div(k, depth_steps) == i)(
                        functools.partial(copy, (x_ref, [w_ref]), k - i * depth_steps, stage)
                    )

            def multiply(sums, stage, count):
                rows = a.at[stage] if scales else a.at[stage, pl.ds(wg * UNIT, UNIT)]
                for p, total in enumerate(sums):
                    weights = b.at[stage, p]
                    if scales:
                        codes = b[stage, p, :, pl.ds(mine, width)]
                        weights = wide.at[wg, lax.rem(count, 2), p]
                        weights[...] = _widened(codes)
                        plgpu.commit_smem()
                    elif transposed:
                        weights = _transposed(weights, flipped)
                    plgpu.wgmma(total, rows, weights)

            def finish(*sums):
                here = n * columns + mine
                if scales:
                    of = (read(s_ref.at[e, pl.ds(here, width)], interpret) for s_ref in scale_refs)
                    sums = [s * lax.broadcast_in_dim(f, s.shape, (1,)) for s, f in zip(sums, of)]
                row = first * UNIT if scales else (first + wg) * UNIT
                _write(epilogue(*sums), refs[-outputs:], pl.ds(row, UNIT), here, staging, wg)

            steps = jnp.where(is_live, depth_steps * (len(ws) // products), 0)
            return Work(steps, (size > 0) if scales else wg < size, load, multiply, finish)

        _run(count[0] * across, work, ready, free, [(UNIT, width)] * products)

    tile = (columns, DEPTH) if transposed else (DEPTH, columns)
    scratch = {
        "a": _shared((STAGES, units * UNIT, DEPTH), jnp.bfloat16),
        "b": _shared((STAGES, products, *tile), ws[0].dtype, row=width if scales else None),
    }
    if scales:
        scratch["wide"] = _shared((CONSUMERS, 2, products, DEPTH, width), jnp.bfloat16)
        scales = [jnp.pad(s.astype(jnp.float32), ((0, 0), (0, across * columns - N))) for s in scales]
    if interpret and transposed:
        scratch["flipped"] = plgpu.SMEM((CONSUMERS, DEPTH, columns), jnp.bfloat16)
    out = [_output((G, N), interpret)] * outputs
    kernel = _kernel(body, out, "grouped_rows", interpret, 1 + products, **scratch)
    return [y[:, :N] for y in varying_as((*xs, *ws), *kernel(*_blocks(layout, E, units), *xs, *ws, *scales))]


def _widened(codes):
    """bfloat16 holds every int8 and float8_e4m3fn; the chip converts the latter to float16 alone."""
    return (codes if codes.dtype == jnp.int8 else codes.astype(jnp.float16)).astype(jnp.bfloat16)


# --- weights: dw = x^T dy of each expert ------------------------------------------------------------------------------


def _weights(x_GD, dy_GF, layout, w_EDF, interpret):
    """dw_EDF: the sum over an expert's rows of x^T dy, in float32, rounded once."""
    experts, D, F = w_EDF.shape
    tall = CONSUMERS * UNIT
    down, across = pl.cdiv(D, tall), pl.cdiv(F, COLUMNS)
    units_E = _units(layout, experts)
    first_E = jnp.cumsum(units_E) - units_E

    def body(first_ref, units_ref, x_ref, dy_ref, dw_ref, a, b, staging, ready, free, flipped=None):
        wg = lax.axis_index("wg")

        def work(i):
            e, d, f = lax.div(i, down * across), lax.rem(lax.div(i, across), down), lax.rem(i, across)
            first, row = first_ref[e], d * tall + wg * UNIT

            def load(k, stage):
                rows = pl.ds((first + k) * UNIT, UNIT)
                plgpu.copy_gmem_to_smem(x_ref.at[rows, pl.ds(d * tall, tall)], a.at[stage], ready.at[stage])
                plgpu.copy_gmem_to_smem(dy_ref.at[rows, pl.ds(f * COLUMNS, COLUMNS)], b.at[stage], ready.at[stage])

            def multiply(sums, stage, count):
                x = a.at[stage, :, pl.ds(wg * UNIT, UNIT)]
                plgpu.wgmma(sums[0], _transposed(x, flipped), b.at[stage])

            def finish(total):
                _write([total], [dw_ref.at[e]], pl.ds(row, UNIT), f * COLUMNS, staging, wg)

            return Work(units_ref[e], row < D, load, multiply, finish)

        _run(jnp.int32(experts * down * across), work, ready, free, [(UNIT, COLUMNS)])

    scratch = {
        "a": _shared((STAGES, UNIT, tall), jnp.bfloat16),
        "b": _shared((STAGES, UNIT, COLUMNS), jnp.bfloat16),
    }
    if interpret:
        scratch["flipped"] = plgpu.SMEM((CONSUMERS, UNIT, UNIT), jnp.bfloat16)
    kernel = _kernel(body, _output((experts, D, F), interpret), "grouped_weights", interpret, 2, **scratch)
    (dw_EDF,) = varying_as((x_GD, dy_GF), kernel(first_E, units_E, x_GD, dy_GF))
    return dw_EDF[:, :D, :F]


# --- the op -----------------------------------------------------------------------------------------------------------


grouped_matmul, grouped_swiglu, quantised = operations(_rows, _weights, lambda dx: dx)
