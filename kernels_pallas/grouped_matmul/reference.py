"""Naive float32 grouped matmul: every row against every expert, one kept; differentiated by JAX."""

import jax
import jax.numpy as jnp

from kernels_pallas.tiles import TileLayout


def grouped_matmul(x_GD: jax.Array, w_EDF: jax.Array, layout: TileLayout) -> jax.Array:
    tiles = layout.expert_of_tile.shape[0]
    live = jnp.arange(tiles) < layout.live_tiles
    expert_GE = jnp.repeat(jax.nn.one_hot(layout.expert_of_tile, w_EDF.shape[0]) * live[:, None], layout.tile, axis=0)
    y_GF = jnp.einsum("gd,edf,ge->gf", x_GD.astype(jnp.float32), w_EDF.astype(jnp.float32), expert_GE)
    return y_GF.astype(x_GD.dtype)


def grouped_swiglu(x_GD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, layout: TileLayout) -> jax.Array:
    x_GD, gate_EDF, up_EDF, dtype = *(a.astype(jnp.float32) for a in (x_GD, gate_EDF, up_EDF)), x_GD.dtype
    h_GF = jax.nn.silu(grouped_matmul(x_GD, gate_EDF, layout)) * grouped_matmul(x_GD, up_EDF, layout)
    return h_GF.astype(dtype)
