"""Grouped matmul by `lax.ragged_dot`, which TPUs have as one operation. Elsewhere it does E times the work."""

import jax
import jax.numpy as jnp

from kernels_pallas.select import Target
from kernels_pallas.swiglu import swiglu
from kernels_pallas.tiles import TileLayout

_TN = jax.lax.RaggedDotDimensionNumbers(  # x_GD y_GF -> E x D x F
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def unsupported(target: Target, x_GD, weights, layout) -> str | None:
    if target.platform != "tpu":
        return f"lax.ragged_dot is native on TPU only: on {target.platform} it multiplies every row by every expert"
    return None


def _sizes(layout: TileLayout, experts: int) -> jax.Array:
    """Rows of each expert, its padding included."""
    live = jnp.arange(len(layout.expert_of_tile)) < layout.live_tiles
    tiles_E = jnp.zeros(experts, jnp.int32).at[layout.expert_of_tile].add(live.astype(jnp.int32))
    return tiles_E * layout.tile


def _live(y_GF: jax.Array, layout: TileLayout) -> jax.Array:
    """Zeros in the rows of dead tiles, which belong to no group."""
    row_G = jnp.arange(y_GF.shape[0])
    return jnp.where((row_G < layout.live_tiles * layout.tile)[:, None], y_GF, 0)


@jax.custom_vjp
def grouped_matmul(x_GD: jax.Array, w_EDF: jax.Array, layout: TileLayout) -> jax.Array:
    y_GF = jax.lax.ragged_dot(x_GD, w_EDF, _sizes(layout, w_EDF.shape[0]), preferred_element_type=jnp.float32)
    return _live(y_GF.astype(x_GD.dtype), layout)


def _forward(x_GD, w_EDF, layout):
    return grouped_matmul(x_GD, w_EDF, layout), (x_GD, w_EDF, layout)


def _backward(residuals, dy_GF):
    x_GD, w_EDF, layout = residuals
    dx_GD = grouped_matmul(dy_GF, w_EDF.swapaxes(1, 2), layout)
    dw_EDF = jax.lax.ragged_dot_general(
        x_GD, dy_GF, _sizes(layout, w_EDF.shape[0]), _TN, preferred_element_type=jnp.float32
    )
    return dx_GD, dw_EDF.astype(w_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def grouped_swiglu(x_GD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, layout: TileLayout) -> jax.Array:
    return swiglu(grouped_matmul(x_GD, gate_EDF, layout), grouped_matmul(x_GD, up_EDF, layout))
