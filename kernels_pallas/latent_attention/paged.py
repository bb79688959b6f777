"""Latent attention over pages by one over a cache in one piece, and the other way round."""

import jax
import jax.numpy as jnp

from kernels_pallas.latent_attention.quantise import dequantise
from kernels_pallas.sharded import over_mesh


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


def in_one_piece(paged_latent_attention, page_of):
    """A kernel over pages as one over a cache in one piece: its pages, of page_of(S) positions, lie in order."""

    def latent_attention(q_BTNC, cache_BSC, offset_B, value_dim, scale, interpret=False):
        def attend(q_BTNC, cache_BSC, offset_B):
            (B, S, C), page = cache_BSC.shape, page_of(cache_BSC.shape[1])
            pages = cache_BSC.reshape(B * S // page, page, C)
            table_BP = jnp.arange(B * S // page, dtype=jnp.int32).reshape(B, S // page)
            return paged_latent_attention(q_BTNC, pages, table_BP, offset_B, value_dim, scale, interpret=interpret)

        return over_mesh(attend, (q_BTNC, cache_BSC, offset_B), ("b.n.", "b..", "b"), "b.n.")

    return latent_attention
