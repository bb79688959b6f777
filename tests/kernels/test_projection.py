"""Activations times weights: an einsum, as XLA on CPUs multiplies fastest.

Of few rows in float32 the weights are the first operand; in bfloat16 the result is in float32 before it is rounded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import made_in_the_loop
from small import normal

from kernels_pallas import projection
from oracles.compare import TOLERANCE, assert_close

EQUATIONS = {  # shapes of x behind its rows, and of w
    "btd,df->btf": ((20,), (20, 12)),
    "btd,dnh->btnh": ((20,), (20, 3, 5)),
    "btnv,nvd->btd": ((3, 5), (3, 5, 20)),
    "...d,dv->...v": ((20,), (20, 12)),
}


@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 16), (17, 1)])
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_the_einsum(equation, rows, dtype):
    inner, of_w = EQUATIONS[equation]
    x, w = normal(0, *rows, *inner, dtype=dtype), normal(1, *of_w, dtype=dtype)
    for asked in (None, jnp.float32):
        y = projection.project(equation, x, w, asked)
        assert y.dtype == (asked or dtype)
        expected = np.einsum(equation, np.asarray(x, np.float64), np.asarray(w, np.float64))
        assert_close(y, expected, TOLERANCE[str(y.dtype)])


def test_gradient():
    """Of few rows as of many."""
    x_BD, w_DF, dy_BF = normal(0, 16, 20), normal(1, 20, 12), normal(2, 16, 12)
    found = jax.grad(lambda *xw: jnp.sum(projection.project("bd,df->bf", *xw) * dy_BF), (0, 1))(x_BD, w_DF)
    for found_one, expected in zip(found, (dy_BF @ w_DF.T, x_BD.T @ dy_BF), strict=True):
        assert_close(found_one, expected, TOLERANCE["float32"])


def made_in_a_loop():
    """How many arrays as large as the weights a decoding loop makes anew in each step."""

    def decode(x_BD, w_DD):
        return jax.lax.fori_loop(0, 5, lambda _, x_BD: projection.project("bd,de->be", x_BD, w_DD), x_BD)

    return made_in_the_loop(jax.jit(decode).lower(normal(0, 4, 24), normal(1, 24, 24)).compile(), {24 * 24})


def test_weights_are_transposed_before_a_decoding_loop_and_not_in_it():
    assert made_in_a_loop() == 0


@pytest.mark.parametrize("rows", [2, 16, 17])
def test_bfloat16_lies_as_it_is_and_leaves_its_result_in_float32(rows):
    """XLA on CPUs would else widen both operands, and keep the weights so."""
    project = jax.jit(lambda x_BD, w_DF: projection.project("bd,df->bf", x_BD, w_DF))
    lowered = project.lower(*(normal(0, *shape, dtype="bfloat16") for shape in ((rows, 24), (24, 32)))).as_text()
    (product,) = [line for line in lowered.splitlines() if "dot_general" in line]
    assert f"(tensor<{rows}x24xbf16>, tensor<24x32xbf16>) -> tensor<{rows}x32xf32>" in product
    assert "optimization_barrier" not in lowered


@pytest.mark.parametrize(("rows", "first"), [(1, False), (2, True), (16, True), (17, False)])
def test_weights_come_first_for_few_rows(rows, first):
    project = jax.jit(lambda x_BD, w_DF: projection.project("bd,df->bf", x_BD, w_DF))
    (product,) = [
        line
        for line in project.lower(normal(0, rows, 24), normal(1, 24, 32)).as_text().splitlines()
        if "dot_general" in line
    ]
    assert product.endswith(f"tensor<32x{rows}xf32>" if first else f"tensor<{rows}x32xf32>")
