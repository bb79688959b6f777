"""Named shapes: DeepSeek-V2 and Lite as they are and scaled down, and routings that break kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul.api import grouped_matmul, grouped_swiglu
from kernels_pallas.tiles import TileLayout, make_layout


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    choices: int
    experts: int
    tile: int
    dim: int
    width: int
    routing: str = "random"  # as `routing` draws it


FULL = {
    "v2": Case(4096, 6, 160, 128, 5120, 1536, "balanced"),
    "v2 skewed": Case(4096, 6, 160, 128, 5120, 1536, "skewed"),
    "v2 all to one": Case(4096, 6, 160, 128, 5120, 1536, "one"),
    "v2 lite": Case(4096, 6, 64, 128, 2048, 1408, "balanced"),
    "v2 lite skewed": Case(4096, 6, 64, 128, 2048, 1408, "skewed"),
    "v2 lite all to one": Case(4096, 6, 64, 128, 2048, 1408, "one"),
}
CASES = {
    "v2": Case(24, 3, 5, 16, 160, 144),  # no width a multiple of 128, one above it
    "v2 lite": Case(20, 2, 4, 16, 128, 136),
    "single rows": Case(3, 1, 8, 16, 24, 40),
    "all to one": Case(40, 1, 4, 16, 40, 24, "one"),
    "none": Case(6, 2, 3, 16, 24, 16, "none"),
    "one token": Case(1, 1, 1, 16, 8, 8),
}


def routing(case: Case, rng: np.random.Generator) -> np.ndarray:
    """expert_TK; E for a dropped choice.

    "random": an expert without rows, a fifth of the choices dropped. "balanced": as many to every expert, up to one.
    "skewed": to the n-th expert in proportion to 1 / n (Zipf), distinct for a token. "one": all to one. "none": none.
    """
    T, K, E = case.tokens, case.choices, case.experts
    if case.routing == "balanced":
        return np.arange(T * K).reshape(T, K) % E
    if case.routing == "skewed":
        return np.argsort(np.log(np.arange(1, E + 1)) - rng.gumbel(size=(T, E)), axis=1)[:, :K]
    expert_TK = np.array([rng.permutation(E)[:K] for _ in range(T)])
    if case.routing == "one":
        expert_TK[:] = E // 2
    elif case.routing == "none":
        expert_TK[:] = E
    elif T > 1:
        expert_TK[rng.random((T, K)) < 0.2] = E
        expert_TK[expert_TK == 1] = E
    return expert_TK


def make_case(
    case: Case, dtype, rng: np.random.Generator | None = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array, TileLayout]:
    """x_GD (padding rows hold numbers too), two expert matrices EDF, a cotangent GF in float32, and the layout."""
    rng, E = rng or np.random.default_rng(0), case.experts
    expert_TK = routing(case, rng)
    layout = jax.jit(make_layout, static_argnums=(1, 2))(jnp.asarray(expert_TK, jnp.int32), E, case.tile)
    G = len(layout.token_of_row_G)
    x_GD, weight_GF = rng.normal(size=(G, case.dim)), rng.normal(size=(G, case.width))
    matrices = (jnp.asarray(rng.normal(size=(E, case.dim, case.width)), dtype) for _ in range(2))
    return jnp.asarray(x_GD, dtype), tuple(matrices), jnp.asarray(weight_GF, jnp.float32), layout


def gpu_cases() -> dict[str, tuple]:
    """For check_gpu.py: name -> (function, arguments, temporaries in bytes), at the full shapes of V2 and Lite."""
    matmul = functools.partial(grouped_matmul, implementation="gpu")
    swiglu = functools.partial(grouped_swiglu, implementation="gpu")

    def gradients(function):
        def backward(dy_GF, layout, *arguments):
            return jax.vjp(lambda *arguments: function(*arguments, layout), *arguments)[1](dy_GF)

        return backward

    def coded(function):
        return lambda x_GD, weights, scales, layout: function(x_GD, *weights, layout, scales_EF=scales)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    cases = {}
    for name in ("v2", "v2 lite"):
        case = FULL[name]
        T, K, E, D, F = case.tokens, case.choices, case.experts, case.dim, case.width
        layout = jax.eval_shape(lambda e_TK, E=E: make_layout(e_TK, E, 64), array(T, K, dtype=jnp.int32))
        G, small = len(layout.token_of_row_G), 1 << 20
        x_GD, h_GF, up_EDF, down_EFD = array(G, D), array(G, F), array(E, D, F), array(E, F, D)
        cases[f"{name} down"] = matmul, (h_GF, down_EFD, layout), small
        cases[f"{name} swiglu"] = swiglu, (x_GD, up_EDF, up_EDF, layout), small
        cases[f"{name} down gradients"] = gradients(matmul), (x_GD, layout, h_GF, down_EFD), small
        # Both products and their cotangents.
        held = 4 * 2 * G * F + small
        cases[f"{name} swiglu gradients"] = gradients(swiglu), (h_GF, layout, x_GD, up_EDF, up_EDF), held
        for dtype in (jnp.int8, jnp.float8_e4m3fn):
            of = f"{name} {jnp.dtype(dtype).name}"
            weights, scales = [array(E, D, F, dtype=dtype)] * 2, [array(E, F, dtype=jnp.float32)] * 2
            cases[f"{of} matmul"] = coded(matmul), (x_GD, weights[:1], scales[:1], layout), small
            cases[f"{of} swiglu"] = coded(swiglu), (x_GD, weights, scales, layout), small
            down, scales = [array(E, F, D, dtype=dtype)], [array(E, D, dtype=jnp.float32)]
            cases[f"{of} down"] = coded(matmul), (h_GF, down, scales, layout), small
    return cases
