"""The experts made of two other ops: rows to their experts, three grouped matmuls, rows back to their tokens.

A row's gate scales h, so that the backward pass needs no row of the output.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu, rows_per_tile
from kernels_pallas.select import Target
from kernels_pallas.tiles import TileLayout, make_layout
from kernels_pallas.token_dispatch import combine, dispatch


def automatic(target: Target) -> bool:
    """On CPUs the one loop of xla.py is faster."""
    return target.platform != "cpu"


def expert_ffn(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, most, matmul: str, moving: str) -> jax.Array:
    experts = gate_EDF.shape[0]
    layout = make_layout(expert_TK, experts, rows_per_tile(most, experts), most)
    x_GD = dispatch(x_TD, layout, implementation=moving)
    h_GF = grouped_swiglu(x_GD, gate_EDF, up_EDF, layout, implementation=matmul)
    h_GF = (_gates_of_rows(gates_TK, layout)[:, None] * h_GF.astype(jnp.float32)).astype(h_GF.dtype)
    o_GD = grouped_matmul(h_GF, down_EFD, layout, implementation=matmul)
    return combine(o_GD, jnp.ones_like(gates_TK), layout, implementation=moving)


@jax.custom_vjp
def _gates_of_rows(gates_TK: jax.Array, layout: TileLayout) -> jax.Array:
    return gates_TK.at[layout.token_of_row_G, layout.choice_of_row_G].get(mode="fill", fill_value=0)


def _forward(gates_TK, layout):
    return _gates_of_rows(gates_TK, layout), layout


def _backward(layout, dgates_G):  # a gather too: its own transpose would be a scatter
    return dgates_G.at[layout.row_of_choice_TK].get(mode="fill", fill_value=0), None


_gates_of_rows.defvjp(_forward, _backward)
