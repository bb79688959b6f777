"""Exact causal attention for training and prefill; query/key width and value width may differ."""

from kernels_pallas.flash_attention.api import flash_attention

__all__ = ["flash_attention"]
