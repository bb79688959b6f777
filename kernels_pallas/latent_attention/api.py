"""One signature for absorbed latent attention."""

import jax

from kernels_pallas.latent_attention import reference, xla
from kernels_pallas.select import select

IMPLEMENTATIONS = {"xla": xla, "reference": reference}  # fastest first


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
