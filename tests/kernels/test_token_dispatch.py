"""Dispatch and combine against NumPy, forward and backward, in random routings with dropped choices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from kernels_pallas.tiles import make_layout
from kernels_pallas.token_dispatch import combine, dispatch, tpu, xla
from oracles.compare import TOLERANCE, assert_close, slope

PORTABLE = ("xla", "reference")  # run on any platform
# T, K, E, tile, D
CASES = [(1, 1, 1, 1, 1), (17, 3, 5, 4, 9), (40, 2, 8, 16, 6), (12, 4, 4, 8, 5)]


def routing(T, K, E, tile, D, dtype="float32"):
    rng = np.random.default_rng(0)
    expert_TK = np.array([rng.permutation(E)[:K] for _ in range(T)])
    if T > 1:
        expert_TK[rng.random((T, K)) < 0.2] = E
        expert_TK[3] = E  # a token none of whose choices is computed
    layout = jax.jit(make_layout, static_argnums=(1, 2))(jnp.asarray(expert_TK, jnp.int32), E, tile)
    G = len(layout.token_of_row_G)
    arrays = rng.normal(size=(T, D)), rng.normal(size=(G, D)), rng.normal(size=(T, K))
    return layout, *(jnp.asarray(x, d) for x, d in zip(arrays, (dtype, dtype, "float32")))


def oracle_dispatch(x_TD, layout):
    out_GD = np.zeros((len(layout.token_of_row_G), x_TD.shape[1]))
    for (t, _), row in np.ndenumerate(np.asarray(layout.row_of_choice_TK)):
        if row < len(out_GD):
            out_GD[row] = x_TD[t]
    return out_GD


def oracle_combine(y_GD, gates_TK, layout):
    out_TD = np.zeros((len(gates_TK), y_GD.shape[1]))
    for (t, k), row in np.ndenumerate(np.asarray(layout.row_of_choice_TK)):
        if row < len(y_GD):
            out_TD[t] += float(gates_TK[t, k]) * np.asarray(y_GD[row], np.float64)
    return out_TD


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", PORTABLE)
def test_forward_matches_numpy(name, case, dtype):
    layout, x_TD, y_GD, gates_TK = routing(*case, dtype=dtype)
    rows_GD = jax.jit(dispatch, static_argnames="implementation")(x_TD, layout, implementation=name)
    np.testing.assert_array_equal(np.asarray(rows_GD, np.float64), oracle_dispatch(np.asarray(x_TD), layout))
    out_TD = jax.jit(combine, static_argnames="implementation")(y_GD, gates_TK, layout, implementation=name)
    assert rows_GD.dtype == out_TD.dtype == dtype
    assert_close(out_TD, oracle_combine(np.asarray(y_GD), np.asarray(gates_TK), layout), TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", PORTABLE)
def test_backward_matches_finite_differences(name, case):
    """Exact to rounding: both are linear in each argument."""
    layout, x_TD, y_GD, gates_TK = routing(*case)
    rng = np.random.default_rng(1)
    weight_GD, weight_TD = rng.normal(size=y_GD.shape), rng.normal(size=x_TD.shape)

    def there(x_TD):
        return jnp.sum(dispatch(x_TD, layout, implementation=name) * weight_GD)

    def back(y_GD, gates_TK):
        return jnp.sum(combine(y_GD, gates_TK, layout, implementation=name) * weight_TD)

    gradients = [jax.jit(jax.grad(there))(x_TD), *jax.jit(jax.grad(back, (0, 1)))(y_GD, gates_TK)]
    oracles = [
        (lambda x: (oracle_dispatch(x, layout) * weight_GD).sum(), x_TD),
        (lambda y: (oracle_combine(y, gates_TK, layout) * weight_TD).sum(), y_GD),
        (lambda g: (oracle_combine(y_GD, g, layout) * weight_TD).sum(), gates_TK),
    ]
    for gradient, (oracle, at) in zip(gradients, oracles):
        for _ in range(3):
            direction = rng.normal(size=at.shape)
            size = np.linalg.norm(gradient) * np.linalg.norm(direction)
            actual = (np.asarray(gradient, np.float64) * direction).sum()
            assert abs(actual - slope(oracle, at, direction, 1e-3)) <= 1e-5 * size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_matches_the_reference_elementwise(case, dtype):
    """In bfloat16 the reference sees the same rounded numbers in float32."""
    layout, *arguments = routing(*case, dtype=dtype)
    weight_TD = np.random.default_rng(1).normal(size=arguments[0].shape)

    def gradients(name, x_TD, y_GD, gates_TK):
        def loss(x_TD, y_GD, gates_TK):
            rows_GD = y_GD * dispatch(x_TD, layout, implementation=name)
            return jnp.sum(combine(rows_GD, gates_TK, layout, implementation=name).astype(jnp.float32) * weight_TD)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x_TD, y_GD, gates_TK)

    expected = gradients("reference", *(a.astype(jnp.float32) for a in arguments))
    for i, (actual, of_reference, a) in enumerate(zip(gradients("xla", *arguments), expected, arguments)):
        assert actual.dtype == a.dtype
        assert_close(actual, of_reference, TOLERANCE[dtype], f"gradient {i}")


@pytest.mark.parametrize("name", PORTABLE)
def test_there_and_back_is_each_token_times_its_computed_gates(name):
    layout, x_TD, _, gates_TK = routing(*CASES[1])
    computed_TK = np.asarray(layout.row_of_choice_TK) < len(layout.token_of_row_G)
    out_TD = combine(dispatch(x_TD, layout, implementation=name), gates_TK, layout, implementation=name)
    assert_close(out_TD, np.asarray(x_TD) * (np.asarray(gates_TK) * computed_TK).sum(1, keepdims=True))
    assert (np.asarray(out_TD[3]) == 0).all()


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Of all that a program computes, in its loops and calls too."""
    found = {tuple(v.aval.shape) for equation in jaxpr.eqns for v in equation.outvars}
    return found.union(*(shapes_in(i) for equation in jaxpr.eqns for i in jaxprs_in_params(equation.params)))


def test_nothing_is_made_of_tokens_times_experts():
    """Neither by the layout nor by dispatch, combine and their gradients."""
    T, K, E, D = 41, 3, 37, 6  # sizes of nothing else

    def experts(x_TD, gates_TK, expert_TK, implementation, planted):
        layout = make_layout(expert_TK, E, 16)
        y_GD = jnp.tanh(implementation.dispatch(x_TD, layout))
        if planted:
            gates_TK = gates_TK + jax.nn.one_hot(expert_TK, E).sum(-1)
        return implementation.combine(y_GD, gates_TK, layout).sum()

    def products(implementation, planted=False):
        arguments = jnp.ones((T, D)), jnp.ones((T, K)), jnp.zeros((T, K), jnp.int32)
        gradients = functools.partial(experts, implementation=implementation, planted=planted)
        shapes = shapes_in(jax.make_jaxpr(jax.value_and_grad(gradients, (0, 1)))(*arguments).jaxpr)
        assert (T, D) in shapes
        return [shape for shape in shapes if {E, E + 1} & set(shape) and {T, T * K} & set(shape)]

    assert products(xla) == products(tpu) == []
    assert (T, K, E) in products(xla, planted=True)


def test_errors_name_the_shapes():
    layout, x_TD, y_GD, gates_TK = routing(*CASES[1])
    with pytest.raises(ValueError, match="layout of 17 tokens"):
        dispatch(x_TD[1:], layout)
    with pytest.raises(ValueError, match="rows"):
        combine(y_GD[1:], gates_TK, layout)
    with pytest.raises(ValueError, match="choices"):
        combine(y_GD, gates_TK[1:], layout)
