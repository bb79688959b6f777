"""The portable forms of paged latent attention: gather each row's pages, then attend as over a cache in one piece."""

import jax
import jax.numpy as jnp

from kernels_pallas.latent_attention.quantise import dequantise


def gathered(pages, page_table_BP, value_dim: int, width: int, scales, dtype) -> jax.Array:
    """cache_BSC of each row's pages in the table's order, de-quantised, without the lanes beyond `width`."""
    (B, P), page = page_table_BP.shape, pages.shape[1]
    of_page = None if scales is None else scales[page_table_BP]
    cache_BPSC = dequantise(pages[page_table_BP], of_page, value_dim, dtype)
    return cache_BPSC.reshape(B, P * page, -1)[..., :width]


def over_pages(latent_attention, gather_dtype=None):
    """`latent_attention` over a cache in one piece as one over pages; `gather_dtype` None: the query's."""

    def paged_latent_attention(q_BTNC, pages, page_table_BP, offset_B, value_dim, scale, scales=None):
        dtype = jnp.dtype(gather_dtype or q_BTNC.dtype)
        cache_BSC = gathered(pages, page_table_BP, value_dim, q_BTNC.shape[-1], scales, dtype)
        return latent_attention(q_BTNC, cache_BSC, offset_B, value_dim, scale)

    return paged_latent_attention
