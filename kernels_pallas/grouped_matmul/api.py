"""One signature for the grouped matmul, plain and with SwiGLU."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import gpu, reference, tpu, xla
from kernels_pallas.mosaic_gpu import not_hopper
from kernels_pallas.select import select, target
from kernels_pallas.tiles import TileLayout, tile_size

IMPLEMENTATIONS = {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference}  # as auto tries them


def rows_per_tile(pairs: int, experts: int) -> int:
    """Rows of a tile for this many (token, chosen expert) pairs.

    On TPU no fewer than a register of bfloat16 has; on Hopper what one wgmma multiplies, however many there are: the
    kernel takes two tiles of an expert at a time where there are two.
    """
    device = target()
    if not_hopper(device) is None:
        return gpu.UNIT
    return max(tile_size(pairs, experts), 16 if device.platform == "tpu" else 1)


def _validate(x_GD: jax.Array, weights: list[jax.Array], layout: TileLayout, scales_EF) -> None:
    rows = layout.token_of_row_G.shape[0]
    if x_GD.ndim != 2 or x_GD.shape[0] != rows:
        raise ValueError(f"x_GD {x_GD.shape}: the layout has {rows} rows")
    for w_EDF in weights:
        if w_EDF.ndim != 3 or w_EDF.shape[1] != x_GD.shape[1] or w_EDF.shape != weights[0].shape:
            raise ValueError(f"weights {[w.shape for w in weights]} do not fit x_GD {x_GD.shape}")
        if w_EDF.dtype != x_GD.dtype and scales_EF is None:
            raise ValueError(f"weights {w_EDF.dtype} and rows {x_GD.dtype} must have one dtype")
        if scales_EF is not None and w_EDF.dtype not in gpu.CODES:
            raise ValueError(f"scales with weights of {w_EDF.dtype}: int8 or float8_e4m3fn")
    E, _, F = weights[0].shape
    if scales_EF is not None and [s.shape for s in scales_EF] != [(E, F)] * len(weights):
        raise ValueError(f"scales {[s.shape for s in scales_EF]}: one {(E, F)} for each of {len(weights)} weights")


def grouped_matmul(
    x_GD: jax.Array,
    w_EDF: jax.Array,
    layout: TileLayout,
    *,
    scales_EF: Sequence[jax.Array] | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """y_GF: each row times the weights of its tile's expert, added in float32. Rows of dead tiles are zero.

    Args:
      scales_EF: [scale_EF] of weights in int8 or float8_e4m3fn: w_EDF scale_EF[:, None] is meant. Not differentiable.
    """
    return _grouped("grouped_matmul", x_GD, [w_EDF], layout, scales_EF, implementation)


def grouped_swiglu(
    x_GD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    layout: TileLayout,
    *,
    scales_EF: Sequence[jax.Array] | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """h_GF = silu(x gate) * (x up) by the weights of each tile's expert; the kernels read the rows once.

    Args:
      scales_EF: [gate's, up's], as of `grouped_matmul`.
    """
    return _grouped("grouped_swiglu", x_GD, [gate_EDF, up_EDF], layout, scales_EF, implementation)


def _grouped(which: str, x_GD, weights, layout, scales_EF, implementation):
    _validate(x_GD, weights, layout, scales_EF)
    chosen = select("grouped_matmul", implementation, IMPLEMENTATIONS, x_GD, weights, layout)
    if scales_EF is None:
        return getattr(chosen, which)(x_GD, *weights, layout)
    if hasattr(chosen, "quantised"):
        return chosen.quantised(which, x_GD, weights, scales_EF, layout)
    # Elsewhere the weights are restored before.
    restored = ((w.astype(jnp.float32) * s[:, None]).astype(x_GD.dtype) for w, s in zip(weights, scales_EF))
    return getattr(chosen, which)(x_GD, *restored, layout)
