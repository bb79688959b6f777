"""One signature for token dispatch and combine."""

import jax

from kernels_pallas.select import select
from kernels_pallas.tiles import TileLayout
from kernels_pallas.token_dispatch import reference, tpu, xla

IMPLEMENTATIONS = {"tpu": tpu, "xla": xla, "reference": reference}  # as auto tries them


def dispatch(x_TD: jax.Array, layout: TileLayout, *, implementation: str = "auto") -> jax.Array:
    """x_GD: the token's vector in each row that serves it; zeros in padding rows."""
    if x_TD.ndim != 2 or x_TD.shape[0] != layout.row_of_choice_TK.shape[0]:
        raise ValueError(f"x_TD {x_TD.shape} does not fit a layout of {layout.row_of_choice_TK.shape[0]} tokens")
    return select("token_dispatch", implementation, IMPLEMENTATIONS).dispatch(x_TD, layout)


def combine(y_GD: jax.Array, gates_TK: jax.Array, layout: TileLayout, *, implementation: str = "auto") -> jax.Array:
    """y_TD = sum_k gates_TK[t, k] y_GD[row of (t, k)], added in float32; choices that were not computed add nothing."""
    rows, choices = layout.token_of_row_G.shape, layout.row_of_choice_TK.shape
    if y_GD.shape[:1] != rows or gates_TK.shape != choices:
        raise ValueError(f"y_GD {y_GD.shape}, gates_TK {gates_TK.shape}: the layout has {rows} rows, {choices} choices")
    return select("token_dispatch", implementation, IMPLEMENTATIONS).combine(y_GD, gates_TK, layout)
