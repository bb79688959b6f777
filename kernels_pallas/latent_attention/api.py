"""One signature for absorbed latent attention, over a cache in one piece and over pages."""

import types

import jax

from kernels_pallas.latent_attention import gpu, paged, reference, tpu, xla
from kernels_pallas.select import select

IMPLEMENTATIONS = {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference}  # as auto tries them
PAGED_IMPLEMENTATIONS = {
    "tpu": types.SimpleNamespace(attend=tpu.paged_latent_attention, unsupported=tpu.unsupported_paged),
    "gpu": types.SimpleNamespace(attend=gpu.paged_latent_attention, unsupported=gpu.unsupported_paged),
    "xla": types.SimpleNamespace(attend=paged.over_pages(xla.latent_attention)),
    "reference": types.SimpleNamespace(attend=paged.over_pages(reference.latent_attention, "float32")),
}


def latent_attention(
    q_BTNC: jax.Array,
    cache_BSC: jax.Array,
    offset_B: jax.Array,
    *,
    value_dim: int,
    scale: float,
    implementation: str = "auto",
) -> jax.Array:
    """o_BTNR = softmax(scale q c^T) c[..., :R], softmax in float32 (DeepSeek-V2 report, section 2.1.2, absorbed).

    For decoding: the kernels have no gradient.

    Args:
      q_BTNC: absorbed query and rotary query side by side, C = R + P.
      cache_BSC: latent and shared rotary key of each position; the query's own must already be there.
      offset_B: int32; query t of row b stands at offset_B[b] + t and sees the positions up to its own.
      value_dim: R, the leading width of the cache that is the value.
    """
    B, C = q_BTNC.shape[0], q_BTNC.shape[-1]
    if cache_BSC.shape[0] != B or cache_BSC.shape[2] != C or offset_B.shape != (B,) or not 0 < value_dim <= C:
        raise ValueError(
            f"q {q_BTNC.shape}, cache {cache_BSC.shape}, offset {offset_B.shape}, R={value_dim} do not fit"
        )
    arguments = q_BTNC, cache_BSC, offset_B, value_dim, scale
    return select("latent_attention", implementation, IMPLEMENTATIONS, *arguments).latent_attention(*arguments)


def paged_latent_attention(
    q_BTNC: jax.Array,
    pages: jax.Array,
    page_table_BP: jax.Array,
    offset_B: jax.Array,
    *,
    value_dim: int,
    scale: float,
    scales: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """The same over a cache in pages, each of which holds `page` consecutive positions of one row.

    Args:
      pages: [pages, page, C or wider]; lanes beyond C are zeros (640 for C = 576 on TPU). bfloat16 or float32; or int8,
        int4 or float8_e4m3fn with `scales`. All positions must be finite, those not written yet too. The kernels take
        pages of these lengths: on TPU multiples of 16 positions, 128 with scales, that divide 1024; on Hopper 8, 16, 32
        or multiples of 64, with scales of 64.
      page_table_BP: int32; position s of row b is entry s % page of page page_table_BP[b, s // page]. Entries beyond a
        row's last position may be read, and weigh nothing: they must be valid pages.
      offset_B: as above. Rows may be of any lengths; all have T queries, and those beyond a row's own are garbage.
      scales: float32 [pages, 2, page], of the value part and of the rest of each position (`quantise`).
    Raises:
      ValueError: the shapes do not fit, or the implementation is unknown or cannot run.
    """
    (B, _, _, C), (count, page, width) = q_BTNC.shape, pages.shape
    fits = width >= C and page_table_BP.shape[:1] == offset_B.shape == (B,) and 0 < value_dim <= C
    if not fits or page_table_BP.ndim != 2 or (scales is not None and scales.shape != (count, 2, page)):
        table, scales = page_table_BP.shape, None if scales is None else scales.shape
        raise ValueError(
            f"q {q_BTNC.shape}, pages {pages.shape}, table {table}, scales {scales}, R={value_dim} do not fit"
        )
    if (pages.dtype.itemsize == 1) != (scales is not None):
        raise ValueError(f"pages of {pages.dtype} {'without' if scales is None else 'with'} scales")
    arguments = q_BTNC, pages, page_table_BP, offset_B, value_dim, scale, scales
    return select("paged_latent_attention", implementation, PAGED_IMPLEMENTATIONS, *arguments).attend(*arguments)
