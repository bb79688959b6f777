"""Named shapes: decoding of DeepSeek-V2 and Lite as it is and scaled down, and lengths that break kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.latent_attention.quantise import quantise


@dataclasses.dataclass(frozen=True)
class Case:
    heads: int
    queries: int  # new tokens of each row
    lengths: tuple[int, ...]  # of each row, the new tokens included
    page: int
    value_dim: int = 512
    rope_dim: int = 64
    lanes: int = 640  # of a page's entry
    dtype: str = "bfloat16"  # of the pages
    ties: bool = False  # all positions alike: every weight is one over their number


FULL = {
    "v2": Case(128, 1, (4096,) * 64, 64),
    "v2 speculative": Case(128, 4, (4096,) * 16, 128),
    "v2 prefill chunk": Case(128, 256, (4096,), 128),
    "v2 float8": Case(128, 1, (4096,) * 64, 128, dtype="float8_e4m3fn"),
    "v2 int8": Case(128, 1, (4096,) * 64, 128, dtype="int8"),
    "v2 int4": Case(128, 1, (4096,) * 64, 128, dtype="int4"),
    "v2 lite": Case(16, 1, (4096,) * 64, 64),
    "v2 lite speculative": Case(16, 4, (4096,) * 16, 128),
    "v2 lite float8": Case(16, 1, (4096,) * 64, 128, dtype="float8_e4m3fn"),
    "v2 lite int8": Case(16, 1, (4096,) * 64, 128, dtype="int8"),
    "v2 lite int4": Case(16, 1, (4096,) * 64, 128, dtype="int4"),
}
# One new token of 128 sequences: from 64 heads down what must move decides, at 128 the products.
DECODE = {f"{heads} heads": Case(heads, 1, (4096,) * 128, 64) for heads in (16, 32, 64, 128)}
_SMALL = {"value_dim": 128, "rope_dim": 16, "lanes": 256}
CASES = {
    "v2": Case(8, 1, (1, 64, 131), 16, **_SMALL),  # one token; a whole chunk; lengths that divide no page
    "several queries": Case(4, 7, (7, 63, 140), 16, **_SMALL),  # more than one block of them
    "v2 lite float8": Case(2, 2, (30, 145), 128, dtype="float8_e4m3fn", **_SMALL),
    "int8": Case(2, 1, (33, 200), 128, dtype="int8", **_SMALL),
    "int4": Case(2, 1, (165,), 128, dtype="int4", **_SMALL),
    "ties": Case(2, 1, (50, 128), 16, ties=True, **_SMALL),
}


def make_case(case: Case, dtype, rng: np.random.Generator | None = None) -> tuple[tuple, dict]:
    """Arguments and options of `paged_latent_attention`: pages in random order, some of nobody, `dtype` the query's."""
    rng, width = rng or np.random.default_rng(0), case.value_dim + case.rope_dim
    B, P = len(case.lengths), -(-max(case.lengths) // case.page)
    q_BTNC = jnp.asarray(rng.normal(size=(B, case.queries, case.heads, width)), dtype)
    pages = jnp.asarray(rng.normal(size=(B * P + 2, case.page, width)), jnp.float32)
    if case.ties:
        pages = jnp.broadcast_to(pages[:1, :1], pages.shape)
    scales = None
    if case.dtype in ("bfloat16", "float32"):
        pages = pages.astype(dtype)
    else:
        pages, scales = jax.jit(quantise, static_argnums=(1, 2))(pages, case.value_dim, case.dtype)
    pages = jnp.pad(pages, ((0, 0), (0, 0), (0, case.lanes - width)))
    table_BP = jnp.asarray(rng.permutation(len(pages))[: B * P].reshape(B, P), jnp.int32)
    offset_B = jnp.array(case.lengths, jnp.int32) - case.queries
    return (q_BTNC, pages, table_BP, offset_B), {"value_dim": case.value_dim, "scale": 0.1, "scales": scales}


def gpu_cases() -> dict[str, tuple]:
    """What `check_gpu` compiles: 4096 positions of V2 and Lite; pages that a tile spans, few sequences, one piece."""
    from kernels_pallas.latent_attention import api

    def paged(heads, queries, batch, page, most, dtype=jnp.bfloat16):
        count, pages = batch * 4096 // page, 4096 // page
        scales = [] if dtype == jnp.bfloat16 else [jax.ShapeDtypeStruct((count, 2, page), jnp.float32)]
        arguments = (
            jax.ShapeDtypeStruct((batch, queries, heads, 576), jnp.bfloat16),
            jax.ShapeDtypeStruct((count, page, 640 if scales else 576), dtype),
            jax.ShapeDtypeStruct((batch, pages), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            *scales,
        )

        def attend(q_BTNC, pages, table_BP, offset_B, scales=None):
            options = {"value_dim": 512, "scale": 0.1, "scales": scales, "implementation": "gpu"}
            return api.paged_latent_attention(q_BTNC, pages, table_BP, offset_B, **options)

        return attend, arguments, most << 20

    _, (q, pages, _, offset), _ = paged(128, 1, 16, 4096, 0)
    whole = functools.partial(api.latent_attention, value_dim=512, scale=0.1, implementation="gpu")
    return {
        "v2": paged(128, 1, 128, 64, 1),
        "v2, 4 queries": paged(128, 4, 128, 64, 1),
        "v2 in one piece": (whole, (q, pages, offset), 17 << 20),
        "v2 float8": paged(128, 1, 128, 128, 1, jnp.float8_e4m3fn),
        "v2 int8": paged(128, 1, 128, 128, 1, jnp.int8),
        "v2 int4": paged(128, 1, 128, 128, 35, jnp.int4),  # 18 MiB of queries, 16 of results: lanes in another order
        "lite": paged(16, 1, 128, 64, 20),
        "lite, 4 queries": paged(16, 4, 128, 64, 1),
        "lite, 8 sequences, pages of 16": paged(16, 1, 8, 16, 20),
        "lite float8": paged(16, 1, 128, 128, 20, jnp.float8_e4m3fn),
        "lite int8": paged(16, 1, 128, 128, 20, jnp.int8),
        "lite int4": paged(16, 1, 128, 128, 20, jnp.int4),  # the pages, seen as bytes, are no copy
    }
