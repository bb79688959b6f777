"""One signature for causal attention."""

import jax

from kernels_pallas.flash_attention import gpu, reference, tpu, xla
from kernels_pallas.select import select

IMPLEMENTATIONS = {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference}  # as auto tries them


def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    *,
    scale: float,
    segments_BT: jax.Array | None = None,
    offset_B: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """o_BTNV = softmax(scale q k^T + mask) v, softmax in float32. K divides N: consecutive queries share a key head.

    Args:
      segments_BT: int32; a query sees only keys of its own segment (packed documents). Needs S = T.
      offset_B: int32; query t of row b stands at key index offset_B[b] + t (a chunk over a cache). None: S = T, at t.
        The kernels have no gradient then.
    Raises:
      ValueError: the shapes do not fit, or the implementation is unknown or cannot run.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKV.shape[:3] != (B, S, K) or N % K:
        raise ValueError(f"q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKV.shape} do not fit each other")
    if offset_B is None and S != T:
        raise ValueError(f"{T} queries over {S} keys need offset_B: where the queries stand among the keys")
    if segments_BT is not None and (offset_B is not None or segments_BT.shape != (B, T)):
        raise ValueError(f"segments_BT {segments_BT.shape} must be {(B, T)}, without offset_B")
    arguments = q_BTNH, k_BSKH, v_BSKV, scale, segments_BT, offset_B
    return select("flash_attention", implementation, IMPLEMENTATIONS, *arguments).flash_attention(*arguments)
