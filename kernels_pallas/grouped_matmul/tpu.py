"""Grouped matmul on TPU: which expert's weights a tile of rows meets is prefetched as scalars.

The grid runs over the tiles of rows inside blocks of columns, so that an expert's block of weights is fetched once for
all its tiles. The contracted width is never cut: 5120 rows of weights fit the chip's memory in blocks of 768 columns,
those of two matrices in 384.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul.differentiable import operations
from kernels_pallas.select import Target
from kernels_pallas.sharded import free_axes, kernel_output
from kernels_pallas.tiles import TileLayout

LANES = 128
VMEM_LIMIT = 48 << 20  # bytes; v5p has 64 MiB, v5e and v6e 128
WEIGHTS = 8 << 20  # of it for the weight blocks of one step, of which the pipeline holds two
GRADIENT = 1024, 1536  # a block of an expert's gradient, in float32
NN, NT, TN = ((((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ())))
_FIRST, _LAST, _ROWS = 1, 2, 4  # what a visit of the weights' gradient does


def unsupported(target: Target, x_GD, weights, layout) -> str | None:
    if target.platform != "tpu":
        return f"a TPU kernel, not for {target.platform}"
    if free_axes():
        return "the rows lie on several devices: call it inside jax.shard_map"
    if x_GD.dtype not in (jnp.bfloat16, jnp.float32):
        return f"rows of {x_GD.dtype}: bfloat16 and float32 are multiplied"
    least = 32 // x_GD.dtype.itemsize
    if layout.tile % least:
        return f"tiles of {layout.tile} rows are no multiple of {least}, the rows of a register in {x_GD.dtype}"
    widest = max(weights[0].shape[1:])
    if len(weights) * widest * LANES * x_GD.dtype.itemsize > WEIGHTS:
        return f"{len(weights)} weights {widest} wide: {LANES} columns of them exceed {WEIGHTS >> 20} MiB"
    return None


def block(width: int, most: int) -> int:
    """Columns of a block, at most `most`: all, or the multiple of 128 with least padding and fewest blocks."""
    if width <= most:
        return width
    sizes = range(LANES, max(most, LANES) + 1, LANES)
    return min(sizes, key=lambda size: (-(-width // size) * (size + LANES), -size))


def _dot(a, b, dimensions):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


# --- rows: y = epilogue(x_0 w_0, x_1 w_1, ...) ------------------------------------------------------------------------


def _rows_kernel(expert_ref, live_ref, *refs, xs, dimensions, scaled, epilogue, products):
    del expert_ref
    refs = iter(refs)
    x_refs, w_refs, scale_refs = ([next(refs) for _ in range(n)] for n in (xs, products, products * scaled))
    out_refs = list(refs)
    is_live = pl.program_id(1) < live_ref[0]

    @pl.when(is_live)
    def _():
        rows = [x_ref[...] for x_ref in x_refs]
        terms = []
        for i, w_ref in enumerate(w_refs):
            x_BK = rows[min(i, xs - 1)]
            term_BN = _dot(x_BK, w_ref[...].astype(x_BK.dtype), dimensions)
            terms.append(term_BN * scale_refs[i][...] if scaled else term_BN)
        for out_ref, out_BN in zip(out_refs, epilogue(*terms)):
            out_ref[...] = out_BN.astype(out_ref.dtype)

    @pl.when(jnp.logical_not(is_live))
    def _():
        for out_ref in out_refs:
            out_ref[...] = jnp.zeros_like(out_ref)


def _rows(xs, ws, layout, epilogue, outputs, interpret, transposed=False, scales=()):
    """`outputs` arrays [G, N] of epilogue(x w, ...): each x with its w, or one x with every w; dead tiles zero.

    Args:
      transposed: contract the weights' last axis instead of the one before.
      scales: [E, N] of each w, by which its product is multiplied.
    """
    (G, K), (E, *matrix), tile = xs[0].shape, ws[0].shape, layout.tile
    N = matrix[0] if transposed else matrix[1]
    columns = block(N, WEIGHTS // (len(ws) * K * xs[0].dtype.itemsize) // LANES * LANES)

    def row_tile(i, live):
        return jnp.maximum(jnp.minimum(i, live[0] - 1), 0)

    def of_expert(n, i, expert, live):
        e = expert[row_tile(i, live)]
        return (e, n, 0) if transposed else (e, 0, n)

    in_specs = [pl.BlockSpec((tile, K), lambda n, i, expert, live: (row_tile(i, live), 0)) for _ in xs]
    in_specs += [pl.BlockSpec((None, columns, K) if transposed else (None, K, columns), of_expert) for _ in ws]
    scale_spec = pl.BlockSpec((None, 1, columns), lambda n, i, expert, live: (expert[row_tile(i, live)], 0, n))
    return pl.pallas_call(
        functools.partial(
            _rows_kernel,
            xs=len(xs),
            dimensions=NT if transposed else NN,
            scaled=bool(scales),
            epilogue=epilogue,
            products=len(ws),
        ),
        out_shape=[kernel_output((G, N), xs[0].dtype, *xs, *ws)] * outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(N, columns), G // tile),
            in_specs=[*in_specs, *(scale_spec for _ in scales)],
            out_specs=[pl.BlockSpec((tile, columns), lambda n, i, *_: (i, n))] * outputs,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="grouped_rows",
    )(layout.expert_of_tile, layout.live_tiles[None], *xs, *ws, *(s.reshape(E, 1, N) for s in scales))


# --- weights: dw = x^T dy of each expert ------------------------------------------------------------------------------


def _visits(layout: TileLayout, experts: int):
    """The tiles in order, and one visit for each expert without rows: its gradient must be written as zero too.

    Returns int32 [tiles + E]: expert, tile, and what to do (_FIRST | _LAST | _ROWS).
    """
    tiles = len(layout.expert_of_tile)
    live = (jnp.arange(tiles) < layout.live_tiles).astype(jnp.int32)
    tiles_E = jnp.zeros(experts, jnp.int32).at[layout.expert_of_tile].add(live)
    visits_E = jnp.maximum(tiles_E, 1)
    end_E = jnp.cumsum(visits_E)
    visit = jnp.arange(tiles + experts, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(end_E, visit, side="right"), experts - 1).astype(jnp.int32)
    nth = visit - (end_E - visits_E)[expert]
    tile = (jnp.cumsum(tiles_E) - tiles_E)[expert] + jnp.minimum(nth, tiles_E[expert])
    does = _FIRST * (nth == 0) + _LAST * (nth == visits_E[expert] - 1) + _ROWS * (nth < tiles_E[expert])
    return expert, jnp.minimum(tile, tiles - 1).astype(jnp.int32), jnp.where(visit < end_E[-1], does, 0)


def _weights_kernel(expert_ref, tile_ref, does_ref, x_ref, dy_ref, dw_ref, sum_ref):
    does = does_ref[pl.program_id(2)]

    @pl.when(does & _FIRST != 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(does & _ROWS != 0)
    def _():
        sum_ref[...] += _dot(x_ref[...], dy_ref[...], TN)

    @pl.when(does & _LAST != 0)
    def _():
        dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def _weights(x_GD, dy_GF, layout, w_EDF, interpret):
    """dw_EDF: the sum over an expert's rows of x^T dy, in float32, rounded once."""
    (experts, D, F), tile = w_EDF.shape, layout.tile
    d, f = block(D, GRADIENT[0]), block(F, GRADIENT[1])
    return pl.pallas_call(
        _weights_kernel,
        out_shape=kernel_output(w_EDF.shape, w_EDF.dtype, x_GD, dy_GF),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(D, d), pl.cdiv(F, f), len(layout.expert_of_tile) + experts),
            in_specs=[
                pl.BlockSpec((tile, d), lambda i, j, v, expert, tile, does: (tile[v], i)),
                pl.BlockSpec((tile, f), lambda i, j, v, expert, tile, does: (tile[v], j)),
            ],
            out_specs=pl.BlockSpec((None, d, f), lambda i, j, v, expert, tile, does: (expert[v], i, j)),
            scratch_shapes=[pltpu.VMEM((d, f), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="grouped_weights",
    )(*_visits(layout, experts), x_GD, dy_GF)


# --- the op -----------------------------------------------------------------------------------------------------------


grouped_matmul, grouped_swiglu, quantised = operations(_rows, _weights, lambda a, b: a + b)
