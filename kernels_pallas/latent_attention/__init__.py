"""Attention of absorbed queries over a latent cache: one shared key, whose first part is also the value."""

from kernels_pallas.latent_attention.api import latent_attention, paged_latent_attention
from kernels_pallas.latent_attention.quantise import dequantise, quantise

__all__ = ["dequantise", "latent_attention", "paged_latent_attention", "quantise"]
