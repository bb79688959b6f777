"""Grouped matmul as a loop over the live tiles with a dynamic expert index: the useful FLOPs only, on any platform.

(`lax.ragged_dot` multiplies every row by every expert where it is not native: E times the work.)
"""

import jax
import jax.numpy as jnp

from kernels_pallas.swiglu import swiglu
from kernels_pallas.tiles import TileLayout

_NT = (((1,), (1,)), ((), ()))  # x_BF w_DF -> x_BD
_TN = (((0,), (0,)), ((), ()))  # x_BD y_BF -> D x F


def _dot(a, b, dimensions=(((1,), (0,)), ((), ()))):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _over_tiles(layout: TileLayout, body, outputs):
    """Folds `body(read, expert, outputs, write)` over the live tiles.

    `read(x)` is the tile's rows of x; `write(y, rows)` puts them into y.
    """
    tile = layout.tile

    def step(i, outputs):
        def read(x):
            return jax.lax.dynamic_slice_in_dim(x, i * tile, tile)

        def write(y, rows):
            return jax.lax.dynamic_update_slice_in_dim(y, rows.astype(y.dtype), i * tile, 0)

        return body(read, layout.expert_of_tile[i], outputs, write)

    return jax.lax.fori_loop(0, layout.live_tiles, step, outputs)


def _of(w_EDF, expert):
    return jax.lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)


def _add(dw_EDF, expert, dw_DF):
    old = jax.lax.dynamic_index_in_dim(dw_EDF, expert)
    return jax.lax.dynamic_update_slice_in_dim(dw_EDF, old + dw_DF[None], expert, 0)


@jax.custom_vjp
def grouped_matmul(x_GD: jax.Array, w_EDF: jax.Array, layout: TileLayout) -> jax.Array:
    def body(read, expert, y_GF, write):
        return write(y_GF, _dot(read(x_GD), _of(w_EDF, expert)))

    return _over_tiles(layout, body, jnp.zeros((x_GD.shape[0], w_EDF.shape[2]), x_GD.dtype))


def _matmul_forward(x_GD, w_EDF, layout):
    return grouped_matmul(x_GD, w_EDF, layout), (x_GD, w_EDF, layout)


def _matmul_backward(residuals, dy_GF):
    x_GD, w_EDF, layout = residuals

    def body(read, expert, outputs, write):
        dx_GD, dw_EDF = outputs
        dy_BF = read(dy_GF)
        dx_GD = write(dx_GD, _dot(dy_BF, _of(w_EDF, expert), _NT))
        return dx_GD, _add(dw_EDF, expert, _dot(read(x_GD), dy_BF, _TN))

    dx_GD, dw_EDF = _over_tiles(layout, body, (jnp.zeros_like(x_GD), jnp.zeros(w_EDF.shape, jnp.float32)))
    return dx_GD, dw_EDF.astype(w_EDF.dtype), None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


def grouped_swiglu(x_GD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, layout: TileLayout) -> jax.Array:
    # Two loops, not one: they do not depend on each other, so that XLA on CPUs runs one on each core.
    return swiglu(grouped_matmul(x_GD, gate_EDF, layout), grouped_matmul(x_GD, up_EDF, layout))
