"""What check_device.py runs: each op at small shapes that the kernels take, and at the full ones of V2 and Lite."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.expert_ffn import api as experts
from kernels_pallas.flash_attention import api as flash
from kernels_pallas.flash_attention import shapes as flash_shapes
from kernels_pallas.grouped_matmul import api as grouped
from kernels_pallas.grouped_matmul import shapes as grouped_shapes
from kernels_pallas.latent_attention import api as latent
from kernels_pallas.latent_attention import shapes as latent_shapes
from kernels_pallas.measuring import OnDevice
from kernels_pallas.select import target
from kernels_pallas.token_dispatch import api as dispatching

SCALE = 0.1
CODES = "int8", "float8_e4m3fn"
bf16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Check:
    """`run(implementation)(*arguments)` is a dict of results; the oracle gets the arguments in float32."""

    name: str
    run: Callable
    arguments: tuple
    implementations: tuple[str, ...]
    oracle: str = "reference"
    elsewhere: str = "xla"  # what runs where the op has no kernel of the platform


def _with_gradients(function, names: str, dy, *arguments) -> dict:
    out, backward = jax.vjp(function, *arguments)
    gradients = backward(dy.astype(out.dtype))
    return {"out": out} | {f"gradient of {name}": g for name, g in zip(names.split(), gradients, strict=True)}


# --- flash attention --------------------------------------------------------------------------------------------------


def _by_head(attend):
    """`attend(q, k, v, *others)` of one head after the other: the scores of all do not fit."""

    def one(heads, *others):
        return jax.tree.map(lambda x: x[:, :, 0], attend(*(x[:, :, None] for x in heads), *others))

    return lambda q, k, v, *others: jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 2),
        jax.lax.map(lambda heads: one(heads, *others), tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v))),
    )


def flash_check(case: flash_shapes.Case, name: str) -> Check:
    qkv, weight_BTNV, segments = flash_shapes.make_case(case, bf16, OnDevice())

    def run(implementation):
        def results(q, k, v, dy, segments):
            def attend(q, k, v):
                return flash.flash_attention(q, k, v, scale=SCALE, segments_BT=segments, implementation=implementation)

            return _with_gradients(attend, "q k v", dy, q, k, v)

        def one_head(q, k, v_dy, segments):
            v, dy = jnp.split(v_dy, 2, axis=-1)
            return results(q, k, v, dy, segments)

        if implementation != "reference" or case.heads != case.kv_heads:
            return results
        by_head = _by_head(one_head)
        return lambda q, k, v, dy, segments: by_head(q, k, jnp.concatenate([v, dy], axis=-1), segments)

    arguments = *qkv, weight_BTNV.astype(bf16), segments
    return Check(name, run, arguments, tuple(flash.IMPLEMENTATIONS))


def chunk_check(queries: int, keys: int, heads: int, offsets: tuple[int, ...], name: str) -> Check:
    rng, B = OnDevice(), len(offsets)
    shapes = (B, queries, heads, 192), (B, keys, heads, 192), (B, keys, heads, 128)
    qkv = [rng.normal(size=shape).astype(bf16) for shape in shapes]

    def run(implementation):
        def results(q, k, v, offset):
            options = {"scale": SCALE, "offset_B": offset, "implementation": implementation}
            return {"out": flash.flash_attention(q, k, v, **options)}

        return results

    return Check(name, run, (*qkv, jnp.array(offsets, jnp.int32)), tuple(flash.IMPLEMENTATIONS))


# --- the experts ------------------------------------------------------------------------------------------------------


def _tiled(case: grouped_shapes.Case) -> grouped_shapes.Case:
    return dataclasses.replace(case, tile=grouped.rows_per_tile(case.tokens * case.choices, case.experts))


def _legal(case: grouped_shapes.Case) -> grouped_shapes.Case:
    """With widths that the Hopper kernels take, of codes too."""
    return dataclasses.replace(case, dim=-(-case.dim // 64) * 64, width=-(-case.width // 128) * 128)


def grouped_check(case: grouped_shapes.Case, which: str, oracle: str, name: str) -> Check:
    """which: "matmul", "swiglu", or "down": the same product the other way round."""
    x, matrices, weight_GF, layout = grouped_shapes.make_case(_tiled(case), bf16, OnDevice())
    arguments, dy = (x, *matrices[: 2 if which == "swiglu" else 1]), weight_GF.astype(bf16)
    if which == "down":
        arguments, dy = (dy, jnp.swapaxes(matrices[0], 1, 2)), x
    operation = grouped.grouped_swiglu if which == "swiglu" else grouped.grouped_matmul

    def run(implementation):
        def results(layout, dy, *arguments):
            multiply = functools.partial(operation, layout=layout, implementation=implementation)
            return _with_gradients(
                lambda *a: multiply(*a), " ".join(("x", "gate", "up")[: len(arguments)]), dy, *arguments
            )

        return results

    return Check(name, run, (layout, dy, *arguments), tuple(grouped.IMPLEMENTATIONS), oracle)


def coded_check(case: grouped_shapes.Case, which: str, code: str, oracle: str, name: str) -> Check:
    x, matrices, _, layout = grouped_shapes.make_case(_tiled(case), bf16, OnDevice())
    matrices = matrices[: 2 if which == "swiglu" else 1]
    scales = [
        0.01 * (1 + jnp.arange(w.shape[0] * w.shape[2], dtype=jnp.float32).reshape(len(w), -1) % 7) for w in matrices
    ]
    coded = [jnp.round(30 * w).astype(code) for w in matrices]
    operation = grouped.grouped_swiglu if which == "swiglu" else grouped.grouped_matmul

    def run(implementation):
        return lambda x, w, s, layout: {"out": operation(x, *w, layout, scales_EF=s, implementation=implementation)}

    return Check(name, run, (x, coded, scales, layout), tuple(grouped.IMPLEMENTATIONS), oracle)


def dispatch_check(case: grouped_shapes.Case, name: str) -> Check:
    y, _, _, layout = grouped_shapes.make_case(dataclasses.replace(_tiled(case), width=1), bf16, OnDevice())
    rng = OnDevice()
    x, dout = (rng.normal(size=(case.tokens, case.dim)).astype(bf16) for _ in range(2))
    gates = rng.normal(size=(case.tokens, case.choices))

    def run(implementation):
        def results(x, y, gates, dout, layout):
            there = functools.partial(dispatching.dispatch, layout=layout, implementation=implementation)
            back = functools.partial(dispatching.combine, layout=layout, implementation=implementation)
            rows = _with_gradients(there, "x", y, x)
            out = _with_gradients(lambda y, gates: back(y, gates), "y gates", dout, y, gates)
            return {"rows": rows.pop("out")} | rows | out

        return results

    return Check(name, run, (x, y, gates, dout, layout), tuple(dispatching.IMPLEMENTATIONS))


def experts_check(name: str) -> Check:
    """The whole of the routed experts, of the ops above."""
    T, K, E, D, F = 300, 3, 6, 128, 192
    rng = OnDevice()
    x, dy, gate, up, down = (
        rng.normal(size=s).astype(bf16) / s[-2] ** 0.5 for s in ((T, D), (T, D), (E, D, F), (E, D, F), (E, F, D))
    )
    case = grouped_shapes.Case(T, K, E, 1, D, F)
    expert_TK = jnp.asarray(grouped_shapes.routing(case, rng), jnp.int32)
    gates_TK = jnp.abs(rng.normal(size=(T, K)))

    def run(implementation):
        of_whole = implementation if implementation == "reference" else "composed"
        of_products = "auto" if of_whole == "reference" else implementation

        def results(expert_TK, dy, x, gates, *weights):
            def ffn(x, gates, *weights):
                options = {"implementation": of_whole, "grouped_matmul": of_products}
                return experts.expert_ffn(x, expert_TK, gates, *weights, **options)

            return _with_gradients(ffn, "x gates gate up down", dy, x, gates, *weights)

        return results

    return Check(name, run, (expert_TK, dy, x, gates_TK, gate, up, down), tuple(grouped.IMPLEMENTATIONS))


# --- latent attention -------------------------------------------------------------------------------------------------


def latent_check(case: latent_shapes.Case, name: str) -> Check:
    arguments, options = latent_shapes.make_case(case, bf16, OnDevice())
    scales = options.pop("scales")

    def run(implementation):
        def results(q, pages, table, offset, scales):
            how = options | {"scales": scales, "implementation": implementation}
            return {"out": latent.paged_latent_attention(q, pages, table, offset, **how)}

        return results

    return Check(name, run, (*arguments, scales), tuple(latent.PAGED_IMPLEMENTATIONS))


def one_piece_check(heads: int, batch: int, length: int, name: str) -> Check:
    rng = OnDevice()
    q, cache = (rng.normal(size=s).astype(bf16) for s in ((batch, 1, heads, 576), (batch, length, 576)))
    offset = jnp.asarray(rng.integers(0, length, batch), jnp.int32)

    def run(implementation):
        options = {"value_dim": 512, "scale": SCALE, "implementation": implementation}
        return lambda q, cache, offset: {"out": latent.latent_attention(q, cache, offset, **options)}

    return Check(name, run, (q, cache, offset), tuple(latent.IMPLEMENTATIONS))


# --- all of them ------------------------------------------------------------------------------------------------------


def small() -> dict[str, Callable[[str], Check]]:
    """name -> name -> Check; nothing is made before it is asked for."""
    found = {
        f"flash_attention/{name}": functools.partial(flash_check, case) for name, case in flash_shapes.CASES.items()
    }
    found["flash_attention/packed blocks"] = functools.partial(flash_check, flash_shapes.Case(2, 1100, 2, 2))
    for queries, offsets in ((130, (0, 77, 170, 290)), (400, (0, 290))):
        check = functools.partial(chunk_check, queries, 300, 2, offsets)
        found[f"flash_attention/{queries} queries over a cache"] = check
    for name, case in grouped_shapes.CASES.items():
        found |= _grouped(name, _legal(case), "reference")
    found["expert_ffn/composed"] = experts_check
    found |= {
        f"latent_attention/{name}": functools.partial(latent_check, case) for name, case in latent_shapes.CASES.items()
    }
    found["latent_attention/in one piece"] = functools.partial(one_piece_check, 16, 3, 400)
    return found


def full() -> dict[str, Callable[[str], Check]]:
    """Of the experts the reference would hold rows x experts x width: the loop of xla.py, in float32, is the oracle."""
    found = {f"flash_attention/full {name}": functools.partial(flash_check, c) for name, c in flash_shapes.FULL.items()}
    for model, heads in (("v2", 128), ("v2 lite", 16)):
        check = functools.partial(chunk_check, 512, 4096, heads, (1000,))
        found[f"flash_attention/full {model}, 512 queries over a cache"] = check
        found[f"latent_attention/full {model} in one piece"] = functools.partial(one_piece_check, heads, 16, 4096)
    for name, case in grouped_shapes.FULL.items():
        found |= _grouped(f"full {name}", case, "xla")
    for name, case in (latent_shapes.FULL | latent_shapes.DECODE).items():
        found[f"latent_attention/full {name}"] = functools.partial(latent_check, _of_this_device(case))
    return found


def _grouped(name: str, case: grouped_shapes.Case, oracle: str) -> dict:
    found = {
        f"grouped_matmul/{name}, {which}": functools.partial(grouped_check, case, which, oracle)
        for which in ("matmul", "swiglu", "down")
    }
    for code in CODES:
        for which in ("matmul", "swiglu"):
            check = functools.partial(coded_check, case, which, code, oracle)
            found[f"grouped_matmul/{name}, {code} {which}"] = check
    return found | {f"token_dispatch/{name}": functools.partial(dispatch_check, case)}


def _of_this_device(case: latent_shapes.Case) -> latent_shapes.Case:
    """Hopper needs no lanes of padding in a page, but for those of packed integers."""
    is_bare = target().platform == "gpu" and case.dtype != "int4"
    return dataclasses.replace(case, lanes=case.value_dim + case.rope_dim) if is_bare else case
