"""The experts made of two other ops: rows to their experts, three grouped matmuls, rows back to their tokens."""

import jax

from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels_pallas.tiles import make_layout, tile_size
from kernels_pallas.token_dispatch import combine, dispatch


def expert_ffn(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, matmul: str, moving: str) -> jax.Array:
    experts = gate_EDF.shape[0]
    layout = make_layout(expert_TK, experts, tile_size(expert_TK.size, experts))
    x_GD = dispatch(x_TD, layout, implementation=moving)
    h_GF = grouped_swiglu(x_GD, gate_EDF, up_EDF, layout, implementation=matmul)
    o_GD = grouped_matmul(h_GF, down_EFD, layout, implementation=matmul)
    return combine(o_GD, gates_TK, layout, implementation=moving)
