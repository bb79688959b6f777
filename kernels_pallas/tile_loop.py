"""A loop over the live tiles of a layout, and what its steps are made of: plain XLA, for any platform."""

import jax
import jax.numpy as jnp

from kernels_pallas.tiles import TileLayout

NT = (((1,), (1,)), ((), ()))  # x_BF w_DF -> x_BD
EACH = (((2,), (1,)), ((0,), (0,)))  # x_EBD w_EDF -> x_EBF
TN = (((0,), (0,)), ((), ()))  # x_BD y_BF -> D x F


def over_tiles(layout: TileLayout, body, outputs):
    """Folds `body(read, write, expert, outputs)` over the live tiles.

    `read(x)` is the tile's rows of x; `write(y, rows)` puts them into y.
    """
    tile = layout.tile

    def step(i, outputs):
        def read(x):
            return jax.lax.dynamic_slice_in_dim(x, i * tile, tile)

        def write(y, rows):
            return jax.lax.dynamic_update_slice_in_dim(y, rows.astype(y.dtype), i * tile, 0)

        return body(read, write, layout.expert_of_tile[i], outputs)

    return jax.lax.fori_loop(0, layout.live_tiles, step, outputs)


def dot(a, b, dimensions=(((1,), (0,)), ((), ()))) -> jax.Array:
    """A matmul added up in float32."""
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def of(w_EDF: jax.Array, expert: jax.Array) -> jax.Array:
    """The expert's matrix [D, F]."""
    return jax.lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)


def add(dw_EDF: jax.Array, expert: jax.Array, dw_DF: jax.Array) -> jax.Array:
    """`dw_EDF` with `dw_DF` added to the expert's matrix, in place inside a loop."""
    old = jax.lax.dynamic_index_in_dim(dw_EDF, expert)
    return jax.lax.dynamic_update_slice_in_dim(dw_EDF, old + dw_DF[None], expert, 0)
