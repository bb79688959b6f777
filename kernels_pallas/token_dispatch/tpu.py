"""Dispatch and combine on TPU: XLA's gathers, so put that no pass over all rows follows them. Not a Pallas kernel.

A kernel would copy single rows, as many as there are choices, and be bound by how fast copies are issued. And a row of
bfloat16 is not contiguous in the TPU's layout (tiles of 8 x 128, rows in pairs): a pass would lay all of them out anew,
which costs what it would save. See the package for the count of bytes.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.select import Target
from kernels_pallas.tiles import TileLayout


def unsupported(target: Target, *arguments) -> str | None:
    return None if target.platform == "tpu" else f"phrased for the TPU compiler, not for {target.platform}"


def _take(x_TD: jax.Array, index: jax.Array) -> jax.Array:
    return x_TD.at[index].get(mode="promise_in_bounds")


def _rows(x_TD: jax.Array, token_G: jax.Array) -> jax.Array:
    """x of each row's token; padding rows (token T) take a row of zeros, so that nothing is masked afterwards."""
    return _take(jnp.pad(x_TD, ((0, 1), (0, 0))), token_G)


def _sum(y_GD: jax.Array, gates_TK: jax.Array, row_TK: jax.Array) -> jax.Array:
    """sum_k gate y[row]; a choice that is not computed (row G) takes another's row times a gate of zero."""
    G, is_computed_TK = y_GD.shape[0], row_TK < y_GD.shape[0]
    gates_TK = jnp.where(is_computed_TK, gates_TK.astype(jnp.float32), 0)
    row_TK = jnp.minimum(row_TK, G - 1)
    terms = (gates_TK[:, k, None] * _take(y_GD, row_TK[:, k]) for k in range(row_TK.shape[1]))
    return sum(terms).astype(y_GD.dtype)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, layout: TileLayout) -> jax.Array:
    return _rows(x_TD, layout.token_of_row_G)


def _dispatch_backward(layout, dx_GD):
    row_TK = layout.row_of_choice_TK
    return _sum(dx_GD, jnp.ones(row_TK.shape), row_TK), None


dispatch.defvjp(lambda x_TD, layout: (dispatch(x_TD, layout), layout), _dispatch_backward)


@jax.custom_vjp
def combine(y_GD: jax.Array, gates_TK: jax.Array, layout: TileLayout) -> jax.Array:
    return _sum(y_GD, gates_TK, layout.row_of_choice_TK)


def _combine_forward(y_GD, gates_TK, layout):
    return combine(y_GD, gates_TK, layout), (y_GD, gates_TK, layout)


def _combine_backward(residuals, dy_TD):
    y_GD, gates_TK, layout = residuals
    row_TK = layout.row_of_choice_TK
    gate_G = gates_TK.at[layout.token_of_row_G, layout.choice_of_row_G].get(mode="fill", fill_value=0)
    dy_GD = gate_G.astype(jnp.float32)[:, None] * _rows(dy_TD, layout.token_of_row_G)
    rows = (_take(y_GD, jnp.minimum(row_T, y_GD.shape[0] - 1)) for row_T in row_TK.T)
    dgates_TK = jnp.stack([jnp.sum(y_TD * dy_TD.astype(jnp.float32), axis=-1) for y_TD in rows], axis=-1)
    dgates_TK = jnp.where(row_TK < y_GD.shape[0], dgates_TK, 0)
    return dy_GD.astype(y_GD.dtype), dgates_TK.astype(gates_TK.dtype), None


combine.defvjp(_combine_forward, _combine_backward)
