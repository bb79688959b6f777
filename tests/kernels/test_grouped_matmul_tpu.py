"""The TPU kernels of the grouped matmul under the interpreter, races watched, against the float32 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul import reference, tpu
from kernels_pallas.grouped_matmul.shapes import CASES, make_case
from oracles.compare import TOLERANCE, assert_close

INTERPRET = pltpu.InterpretParams(detect_races=True)


def gradients(module, op, arguments, weight_GF, layout, **options):
    def loss(*arguments):
        out = getattr(module, op)(*arguments, layout, **options)
        return jnp.sum(out.astype(jnp.float32) * weight_GF), out

    which = tuple(range(len(arguments)))
    (_, out), found = jax.jit(jax.value_and_grad(loss, which, has_aux=True))(*arguments)
    return out, *found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["grouped_matmul", "grouped_swiglu"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case, op, dtype):
    if dtype == "float32" and case == "single rows":
        pass
    x_GD, (gate, up), weight_GF, layout = make_case(CASES[case], dtype)
    arguments = (x_GD, gate) if op == "grouped_matmul" else (x_GD, gate, up)
    found = gradients(tpu, op, arguments, weight_GF, layout, interpret=INTERPRET)
    wide = [a.astype(jnp.float32) for a in arguments]
    for i, (a, b) in enumerate(zip(found, gradients(reference, op, wide, weight_GF, layout))):
        assert a.dtype == dtype
        assert_close(a, b, TOLERANCE[dtype], f"result {i}")
