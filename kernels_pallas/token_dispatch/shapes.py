"""Dispatch, combine and their gradients at the full shape of V2, to be compiled: the package counts their bytes."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.shapes import FULL
from kernels_pallas.tiles import make_layout
from kernels_pallas.token_dispatch import api


def abstract_cases(tile: int, implementation: str) -> dict[str, tuple]:
    """name -> (function, arguments), the arguments pytrees of jax.ShapeDtypeStruct."""
    case = dataclasses.replace(FULL["v2"], tile=tile)
    T, K, E, D = case.tokens, case.choices, case.experts, case.dim

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def dispatch(x_TD, layout):
        return api.dispatch(x_TD, layout, implementation=implementation)

    def combine(y_GD, gates_TK, layout):
        return api.combine(y_GD, gates_TK, layout, implementation=implementation)

    def dispatch_gradient(dx_GD, x_TD, layout):
        return jax.vjp(lambda x_TD: dispatch(x_TD, layout), x_TD)[1](dx_GD)

    def combine_gradients(dy_TD, y_GD, gates_TK, layout):
        return jax.vjp(lambda *arguments: combine(*arguments, layout), y_GD, gates_TK)[1](dy_TD)

    layout = jax.eval_shape(lambda e_TK: make_layout(e_TK, E, tile), array(T, K, dtype=jnp.int32))
    x_TD, y_GD, gates_TK = array(T, D), array(len(layout.token_of_row_G), D), array(T, K, dtype=jnp.float32)
    return {
        "dispatch": (dispatch, (x_TD, layout)),
        "combine": (combine, (y_GD, gates_TK, layout)),
        "dispatch gradient": (dispatch_gradient, (y_GD, x_TD, layout)),
        "combine gradients": (combine_gradients, (x_TD, y_GD, gates_TK, layout)),
    }
