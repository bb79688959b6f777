"""Named shapes: training of DeepSeek-V2 and Lite as it is and scaled down, and lengths that break kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.flash_attention.api import flash_attention


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    heads: int
    kv_heads: int
    qk_dim: int = 192
    value_dim: int = 128
    is_packed: bool = True


FULL = {
    "v2": Case(1, 4096, 128, 128),
    "v2 lite": Case(1, 4096, 16, 16),
    "v2 lite 32k": Case(1, 32768, 16, 16),
}
CASES = {
    "one token": Case(1, 1, 1, 1),
    "ragged": Case(2, 70, 2, 2),
    "blocks": Case(1, 300, 1, 1, is_packed=False),
    "grouped": Case(1, 130, 4, 2),
}


def make_case(case: Case, dtype, rng: np.random.Generator | None = None) -> tuple[tuple, jax.Array, jax.Array | None]:
    """(q, k, v), a cotangent BTNV in float32, and segments: random documents, the end of each row padding."""
    rng, B, T = rng or np.random.default_rng(0), case.batch, case.length
    heads = case.heads, case.kv_heads, case.kv_heads, case.heads
    widths = case.qk_dim, case.qk_dim, case.value_dim, case.value_dim
    *qkv, weight_BTNV = (jnp.asarray(rng.normal(size=(B, T, n, width)), dtype) for n, width in zip(heads, widths))
    if not case.is_packed:
        return tuple(qkv), weight_BTNV.astype(jnp.float32), None
    starts_BT = rng.random((B, T)) < 4 / T
    segments_BT = np.where(np.arange(T) < T - T // 5, 1 + np.cumsum(starts_BT, axis=1), 0)
    return tuple(qkv), weight_BTNV.astype(jnp.float32), jnp.asarray(segments_BT, jnp.int32)


def gpu_cases() -> dict[str, tuple]:
    """For check_gpu.py: name -> (function, arguments, temporaries in bytes), at the full shapes of V2 and Lite."""

    def attention(qkv, segments_BT=None):
        return flash_attention(*qkv, scale=192**-0.5, segments_BT=segments_BT, implementation="gpu")

    def over_cache(qkv, offset_B):
        return flash_attention(*qkv, scale=192**-0.5, offset_B=offset_B, implementation="gpu")

    def gradients(qkv, do_BTNV, segments_BT=None):
        return jax.vjp(lambda *qkv: attention(qkv, segments_BT), *qkv)[1](do_BTNV)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    cases = {}
    for name in ("v2", "v2 lite"):
        case = FULL[name]
        B, T, N, K = case.batch, case.length, case.heads, case.kv_heads
        o_BTNV, segments_BT = array(B, T, N, case.value_dim), array(B, T, dtype=jnp.int32)
        qkv = array(B, T, N, case.qk_dim), array(B, T, K, case.qk_dim), array(B, T, K, case.value_dim)
        numbers = 4 * B * N * T  # one per query and head in float32: log-sum-exp, delta, what the kernels make of them
        cases[f"{name} forward"] = attention, (qkv,), 2 * numbers
        cases[f"{name} packed forward"] = attention, (qkv, segments_BT), 2 * numbers
        # Keys and values laid anew, with room for the chunk.
        chunk_qkv, laid = (
            (array(B, 512, N, case.qk_dim), *qkv[1:]),
            2 * B * (T + 512) * K * (case.qk_dim + case.value_dim),
        )
        cases[f"{name} chunk over a cache"] = over_cache, (chunk_qkv, array(B, dtype=jnp.int32)), laid + numbers
        cases[f"{name} gradients"] = gradients, (qkv, o_BTNV), 4 * numbers
        cases[f"{name} packed gradients"] = gradients, (qkv, o_BTNV, segments_BT), 4 * numbers
    return cases
