"""Attention of absorbed queries over a latent cache: one shared key, whose first part is also the value."""

from kernels_pallas.latent_attention.api import latent_attention

__all__ = ["latent_attention"]
