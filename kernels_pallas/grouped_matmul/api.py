"""One signature for the grouped matmul, plain and with SwiGLU."""

import jax

from kernels_pallas.grouped_matmul import ragged, reference, tpu, xla
from kernels_pallas.select import select
from kernels_pallas.tiles import TileLayout

IMPLEMENTATIONS = {"tpu": tpu, "ragged_dot": ragged, "xla": xla, "reference": reference}  # fastest first


def _validate(x_GD: jax.Array, weights: list[jax.Array], layout: TileLayout) -> None:
    rows = layout.token_of_row_G.shape[0]
    if x_GD.ndim != 2 or x_GD.shape[0] != rows:
        raise ValueError(f"x_GD {x_GD.shape}: the layout has {rows} rows")
    for w_EDF in weights:
        if w_EDF.ndim != 3 or w_EDF.shape[1] != x_GD.shape[1] or w_EDF.shape != weights[0].shape:
            raise ValueError(f"weights {[w.shape for w in weights]} do not fit x_GD {x_GD.shape}")
        if w_EDF.dtype != x_GD.dtype:
            raise ValueError(f"weights {w_EDF.dtype} and rows {x_GD.dtype} must have one dtype")


def grouped_matmul(x_GD: jax.Array, w_EDF: jax.Array, layout: TileLayout, *, implementation: str = "auto") -> jax.Array:
    """y_GF: each row times the weights of its tile's expert, added in float32. Rows of dead tiles are zero."""
    _validate(x_GD, [w_EDF], layout)
    chosen = select("grouped_matmul", implementation, IMPLEMENTATIONS, x_GD, [w_EDF], layout)
    return chosen.grouped_matmul(x_GD, w_EDF, layout)


def grouped_swiglu(
    x_GD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, layout: TileLayout, *, implementation: str = "auto"
) -> jax.Array:
    """h_GF = silu(x gate) * (x up) by the weights of each tile's expert, in one pass over the rows."""
    _validate(x_GD, [gate_EDF, up_EDF], layout)
    chosen = select("grouped_matmul", implementation, IMPLEMENTATIONS, x_GD, [gate_EDF, up_EDF], layout)
    return chosen.grouped_swiglu(x_GD, gate_EDF, up_EDF, layout)
