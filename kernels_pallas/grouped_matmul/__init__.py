"""Matmuls of rows sorted by expert with each expert's own weights."""

from kernels_pallas.grouped_matmul.api import grouped_matmul, grouped_swiglu, rows_per_tile

__all__ = ["grouped_matmul", "grouped_swiglu", "rows_per_tile"]
