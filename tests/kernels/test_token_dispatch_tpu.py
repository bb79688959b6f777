"""The TPU form of dispatch and combine, which is plain XLA and so runs here, against the float32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick

from kernels_pallas.grouped_matmul.shapes import CASES, make_case
from kernels_pallas.token_dispatch import reference, tpu
from oracles.compare import TOLERANCE, assert_close

ALL = [(case, dtype) for case in CASES for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(("case", "dtype"), quick(ALL, *ALL[::2], ALL[1]))
def test_matches_the_reference(case, dtype):
    y_GD, _, _, layout = make_case(CASES[case], dtype)
    rng, (T, K), D = np.random.default_rng(3), layout.row_of_choice_TK.shape, y_GD.shape[1]
    x_TD = jnp.asarray(rng.normal(size=(T, D)), dtype)
    gates_TK = jnp.asarray(rng.normal(size=(T, K)), jnp.float32)
    weight_GD, weight_TD = rng.normal(size=y_GD.shape), rng.normal(size=x_TD.shape)

    def results(module, x_TD, y_GD):
        def loss(x_TD, y_GD, gates_TK):
            rows_GD, out_TD = module.dispatch(x_TD, layout), module.combine(y_GD, gates_TK, layout)
            loss = jnp.sum(rows_GD.astype(jnp.float32) * weight_GD) + jnp.sum(out_TD.astype(jnp.float32) * weight_TD)
            return loss, (rows_GD, out_TD)

        gradients, outs = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x_TD, y_GD, gates_TK)
        return [*outs, *gradients]

    expected = results(reference, x_TD.astype(jnp.float32), y_GD.astype(jnp.float32))
    found = results(tpu, x_TD, y_GD)
    for what, a, b in zip(("rows", "out", "dx", "dy", "dgates"), found, expected, strict=True):
        assert a.dtype == (jnp.float32 if what == "dgates" else dtype)
        assert_close(a, b, TOLERANCE[dtype], what)
