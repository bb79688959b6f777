"""Dispatch and combine by gathers alone, forward and backward: each one's transpose is a gather too, not a scatter."""

import jax
import jax.numpy as jnp

from kernels_pallas.tiles import TileLayout


def _rows(x_GD: jax.Array, index: jax.Array) -> jax.Array:
    return x_GD.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, layout: TileLayout) -> jax.Array:
    return _rows(x_TD, layout.token_of_row_G)


def _dispatch_forward(x_TD, layout):
    return dispatch(x_TD, layout), layout


def _dispatch_backward(layout, dx_GD):
    K = layout.row_of_choice_TK.shape[1]
    dx_TD = sum(_rows(dx_GD, layout.row_of_choice_TK[:, k]).astype(jnp.float32) for k in range(K))
    return dx_TD.astype(dx_GD.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(y_GD: jax.Array, gates_TK: jax.Array, layout: TileLayout) -> jax.Array:
    gates_TK = gates_TK.astype(jnp.float32)
    terms = (gates_TK[:, k, None] * _rows(y_GD, row_T) for k, row_T in enumerate(layout.row_of_choice_TK.T))
    return sum(terms).astype(y_GD.dtype)


def _combine_forward(y_GD, gates_TK, layout):
    return combine(y_GD, gates_TK, layout), (y_GD, gates_TK, layout)


def _combine_backward(residuals, dy_TD):
    y_GD, gates_TK, layout = residuals
    dy_TD = dy_TD.astype(jnp.float32)
    gate_G = gates_TK.at[layout.token_of_row_G, layout.choice_of_row_G].get(mode="fill", fill_value=0)
    dy_GD = gate_G.astype(jnp.float32)[:, None] * _rows(dy_TD, layout.token_of_row_G)
    dgates_KT = [jnp.sum(_rows(y_GD, row_T) * dy_TD, axis=-1) for row_T in layout.row_of_choice_TK.T]
    return dy_GD.astype(y_GD.dtype), jnp.stack(dgates_KT, axis=-1).astype(gates_TK.dtype), None


combine.defvjp(_combine_forward, _combine_backward)
