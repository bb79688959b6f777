"""The TPU kernels of the grouped matmul, interpreted, against the float32 reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick

from interpreter import interpreter
from kernels_pallas import grouped_matmul as op
from kernels_pallas.grouped_matmul import reference, tpu
from kernels_pallas.grouped_matmul.shapes import CASES, make_case
from oracles.compare import TOLERANCE, assert_close, worst


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Two blocks of columns, the last one ragged, wherever a case is wider than 128."""
    monkeypatch.setattr(tpu, "WEIGHTS", 1 << 17)
    monkeypatch.setattr(tpu, "GRADIENT", (128, 128))


def results(module, which, arguments, weight_GF, layout, **options):
    def loss(*arguments):
        out = getattr(module, which)(*arguments, layout, **options)
        return jnp.sum(out.astype(jnp.float32) * weight_GF), out

    every = tuple(range(len(arguments)))
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, every, has_aux=True))(*arguments)
    return out, *gradients


def check(case, which, dtype):
    x_GD, matrices, weight_GF, layout = make_case(CASES[case], dtype)
    arguments = x_GD, *matrices[: 1 if which == "grouped_matmul" else 2]
    expected = results(reference, which, [a.astype(jnp.float32) for a in arguments], weight_GF, layout)
    with interpreter() as interpret:
        found = results(tpu, which, arguments, weight_GF, layout, interpret=interpret)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == dtype
        assert_close(a, b, TOLERANCE[dtype], "result" if i == 0 else f"gradient {i - 1}")


@pytest.mark.parametrize("case", quick(["v2", "single rows", "none"], "v2"))
def test_matmul_matches_the_reference(case):
    check(case, "grouped_matmul", "float32")


@pytest.mark.slow
@pytest.mark.parametrize(("which", "dtype"), [("grouped_matmul", "bfloat16"), ("grouped_swiglu", "float32")])
def test_the_other_dtype_matches_the_reference(which, dtype):
    check("v2", which, dtype)


@pytest.mark.parametrize("case", quick(CASES, "v2", "one token"))
def test_swiglu_matches_the_reference(case):
    check(case, "grouped_swiglu", "bfloat16")


@pytest.mark.parametrize("dtype", [pytest.param("float8_e4m3fn", marks=pytest.mark.slow), "int8"])
def test_weights_of_one_byte_are_exact_until_the_product_is_rounded(dtype):
    x_GD, matrices, _, layout = make_case(CASES["v2"], "float32")
    scales = [jnp.abs(w).max(axis=1) / 100 for w in matrices]
    coded = [(w / s[:, None]).astype(dtype) for w, s in zip(matrices, scales)]
    decoded = [w.astype(jnp.float32) * s[:, None] for w, s in zip(coded, scales)]
    with interpreter() as interpret:
        y_GF = tpu.quantised("grouped_matmul", x_GD, coded[:1], scales[:1], layout, interpret)
        h_GF = tpu.quantised("grouped_swiglu", x_GD, coded, scales, layout, interpret)
    assert_close(y_GF, reference.grouped_matmul(x_GD, decoded[0], layout))
    assert_close(h_GF, reference.grouped_swiglu(x_GD, *decoded, layout))
    assert_close(op.grouped_matmul(x_GD, coded[0], layout, scales_EF=scales[:1]), y_GF)
    assert_close(op.grouped_swiglu(x_GD, *coded, layout, scales_EF=scales), h_GF)


@pytest.mark.parametrize("defect", ["next tile", "no zeros for an empty expert"])
def test_a_planted_defect_is_far_outside_the_tolerance(defect, monkeypatch):
    """Also: memory that was never written holds NaN, so that a gradient nobody wrote cannot pass for zero."""
    x_GD, (w_EDF, _), weight_GF, layout = make_case(CASES["v2 lite"], "float32")
    visits = tpu._visits

    def wrong(layout, experts):
        expert, tile, does = visits(layout, experts)
        if defect == "next tile":
            return expert, jnp.minimum(tile + 1, len(layout.expert_of_tile) - 1), does
        return expert, tile, jnp.where(does & tpu._ROWS, does, 0)

    def gradient():
        with interpreter() as interpret:
            return tpu._weights(x_GD, weight_GF, layout, w_EDF, interpret)

    expected = jax.grad(lambda w: jnp.sum(reference.grouped_matmul(x_GD, w, layout) * weight_GF))(w_EDF)
    monkeypatch.setattr(tpu, "_visits", wrong)
    assert worst(gradient(), expected) > 0.1
    monkeypatch.setattr(tpu, "_visits", visits)
    assert worst(gradient(), expected) < 1e-5


@pytest.mark.parametrize(
    ("width", "most", "size"), [(1408, 2048, 1408), (1536, 614, 512), (5120, 1792, 1280), (11, 128, 11)]
)
def test_blocks_waste_little(width, most, size):
    assert tpu.block(width, most) == size


@pytest.mark.parametrize("most", [128, 384, 1024])
def test_a_block_fits_and_is_whole_lanes(most):
    for width in range(1, 3000, 7):
        size = tpu.block(width, most)
        assert size <= most
        assert size == width or size % 128 == 0
        assert np.ceil(width / size) * size < width + 128 * np.ceil(width / most)
