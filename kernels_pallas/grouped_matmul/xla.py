"""Grouped matmul as a loop over the live tiles with a dynamic expert index: the useful FLOPs only, on any platform.

(`lax.ragged_dot` multiplies every row by every expert where it is not native: E times the work.)
"""

import jax
import jax.numpy as jnp

from kernels_pallas.swiglu import swiglu
from kernels_pallas.tile_loop import NT, TN, add, dot, of, over_tiles
from kernels_pallas.tiles import TileLayout


@jax.custom_vjp
def grouped_matmul(x_GD: jax.Array, w_EDF: jax.Array, layout: TileLayout) -> jax.Array:
    def body(read, write, expert, y_GF):
        return write(y_GF, dot(read(x_GD), of(w_EDF, expert)))

    return over_tiles(layout, body, jnp.zeros((x_GD.shape[0], w_EDF.shape[2]), x_GD.dtype))


def _matmul_forward(x_GD, w_EDF, layout):
    return grouped_matmul(x_GD, w_EDF, layout), (x_GD, w_EDF, layout)


def _matmul_backward(residuals, dy_GF):
    x_GD, w_EDF, layout = residuals

    def body(read, write, expert, outputs):
        dx_GD, dw_EDF = outputs
        dy_BF = read(dy_GF)
        dx_GD = write(dx_GD, dot(dy_BF, of(w_EDF, expert), NT))
        return dx_GD, add(dw_EDF, expert, dot(read(x_GD), dy_BF, TN))

    dx_GD, dw_EDF = over_tiles(layout, body, (jnp.zeros_like(x_GD), jnp.zeros(w_EDF.shape, jnp.float32)))
    return dx_GD, dw_EDF.astype(w_EDF.dtype), None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


def grouped_swiglu(x_GD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, layout: TileLayout) -> jax.Array:
    return swiglu(grouped_matmul(x_GD, gate_EDF, layout), grouped_matmul(x_GD, up_EDF, layout))
