"""Tokens to rows sorted by expert, and expert outputs back to tokens."""

from kernels_pallas.token_dispatch.api import combine, dispatch

__all__ = ["combine", "dispatch"]
