"""Naive float32 dispatch and combine, by one-hot matrices; differentiated by JAX."""

import jax
import jax.numpy as jnp

from kernels_pallas.tiles import TileLayout


def dispatch(x_TD: jax.Array, layout: TileLayout) -> jax.Array:
    serves_GT = jax.nn.one_hot(layout.token_of_row_G, x_TD.shape[0])  # a padding row has index T: all zeros
    return (serves_GT @ x_TD.astype(jnp.float32)).astype(x_TD.dtype)


def combine(y_GD: jax.Array, gates_TK: jax.Array, layout: TileLayout) -> jax.Array:
    row_TKG = jax.nn.one_hot(layout.row_of_choice_TK, y_GD.shape[0])
    y_TD = jnp.einsum("tkg,gd,tk->td", row_TKG, y_GD.astype(jnp.float32), gates_TK.astype(jnp.float32))
    return y_TD.astype(y_GD.dtype)
