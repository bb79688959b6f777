"""Grouped matmul as a loop over the live tiles with a dynamic expert index: the useful FLOPs only, on any platform.

(`lax.ragged_dot` multiplies every row by every expert where it is not native: E times the work.)
"""

import jax
import jax.numpy as jnp

from kernels_pallas import swiglu
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


@jax.custom_vjp
def grouped_swiglu(x_GD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, layout: TileLayout) -> jax.Array:
    return _swiglu_forward(x_GD, gate_EDF, up_EDF, layout)[0]


def _swiglu_forward(x_GD, gate_EDF, up_EDF, layout):
    def body(read, expert, outputs, write):
        h_GF, a_GF, b_GF = outputs
        x_BD = read(x_GD)
        a_BF, b_BF = _dot(x_BD, _of(gate_EDF, expert)), _dot(x_BD, _of(up_EDF, expert))
        return write(h_GF, swiglu.swiglu(a_BF, b_BF)), write(a_GF, a_BF), write(b_GF, b_BF)

    zeros = jnp.zeros((x_GD.shape[0], gate_EDF.shape[2]), x_GD.dtype)
    h_GF, a_GF, b_GF = _over_tiles(layout, body, (zeros, zeros, zeros))
    return h_GF, (x_GD, gate_EDF, up_EDF, a_GF, b_GF, layout)


def _swiglu_backward(residuals, dh_GF):
    x_GD, gate_EDF, up_EDF, a_GF, b_GF, layout = residuals

    def body(read, expert, outputs, write):
        dx_GD, dgate_EDF, dup_EDF = outputs
        x_BD = read(x_GD)
        da_BF, db_BF = swiglu.gradients(read(a_GF), read(b_GF), read(dh_GF))
        dx_BD = _dot(da_BF, _of(gate_EDF, expert), _NT) + _dot(db_BF, _of(up_EDF, expert), _NT)
        dgate_EDF = _add(dgate_EDF, expert, _dot(x_BD, da_BF, _TN))
        return write(dx_GD, dx_BD), dgate_EDF, _add(dup_EDF, expert, _dot(x_BD, db_BF, _TN))

    zeros_EDF = jnp.zeros(gate_EDF.shape, jnp.float32)
    dx_GD, dgate_EDF, dup_EDF = _over_tiles(layout, body, (jnp.zeros_like(x_GD), zeros_EDF, zeros_EDF))
    return dx_GD, dgate_EDF.astype(gate_EDF.dtype), dup_EDF.astype(up_EDF.dtype), None


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
