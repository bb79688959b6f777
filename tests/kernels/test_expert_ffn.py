"""The routed experts as one op: every form of it against NumPy, forward and backward, with choices that are dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick

from dsv2_jax.planning import hlo
from kernels_pallas.expert_ffn import expert_ffn
from kernels_pallas.expert_ffn.api import IMPLEMENTATIONS
from oracles.compare import TOLERANCE, assert_close, worst
from oracles.layers import swiglu

# T, K, E, D, F
CASES = {
    "loop over tiles": (70, 3, 8, 20, 44),
    "tiles larger than one": (300, 2, 3, 9, 7),
    "few tokens, few experts": (2, 3, 9, 6, 5),
    "few tokens, every expert": (9, 4, 8, 10, 12),
    "few tokens, most to one expert": (16, 2, 16, 10, 12),
    "one token, one expert": (1, 1, 1, 4, 3),
    "all to one expert": (40, 1, 6, 8, 6),
    "all choices dropped": (40, 2, 4, 8, 6),
}
NAMES = tuple(IMPLEMENTATIONS)
RUN = jax.jit(expert_ffn, static_argnames=("implementation", "grouped_matmul", "token_dispatch"))


def operands(case, dtype="float32"):
    (T, K, E, D, F), rng = CASES[case], np.random.default_rng(0)
    expert_TK = np.array([rng.permutation(E)[:K] for _ in range(T)])
    if case == "all to one expert":
        expert_TK[:] = 4
    elif case == "few tokens, most to one expert":
        expert_TK[:14, 0], expert_TK[:14, 1] = 3, np.arange(14) % 3
    elif case == "all choices dropped":
        expert_TK[:] = E
    elif T > 1:
        expert_TK[rng.random((T, K)) < 0.2] = E
        expert_TK[1] = E  # a token none of whose choices is computed
    gates_TK = np.where(expert_TK < E, rng.random((T, K)) + 0.1, 0.0)
    weights = (rng.normal(size=shape) for shape in ((E, D, F), (E, D, F), (E, F, D)))
    arrays = [jnp.asarray(a, dtype) for a in (rng.normal(size=(T, D)), *weights)]
    return arrays[0], jnp.asarray(expert_TK, jnp.int32), jnp.asarray(gates_TK, jnp.float32), *arrays[1:]


def oracle(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD):
    x_TD, gates_TK, *weights = (np.asarray(a, np.float64) for a in (x_TD, gates_TK, gate_EDF, up_EDF, down_EFD))
    out_TD = np.zeros(x_TD.shape)
    for (t, k), e in np.ndenumerate(np.asarray(expert_TK)):
        if e < len(weights[0]):
            out_TD[t] += gates_TK[t, k] * swiglu(x_TD[t], *(w[e] for w in weights))
    return out_TD


FORWARD = [(name, case, dtype) for dtype in ("float32", "bfloat16") for name in NAMES for case in CASES]
ROUNDED = [("xla", case, "bfloat16") for case in CASES]


@pytest.mark.parametrize(("name", "case", "dtype"), quick(FORWARD, *FORWARD[: len(FORWARD) // 2], *ROUNDED))
def test_forward_matches_numpy(name, case, dtype):
    arguments = operands(case, dtype)
    out_TD = RUN(*arguments, implementation=name)
    assert out_TD.dtype == dtype
    assert_close(out_TD, oracle(*arguments), TOLERANCE[dtype])


def gradients(name, arguments, dtype="float32"):
    x_TD, expert_TK, gates_TK, *weights = arguments
    weight_TD = np.random.default_rng(1).normal(size=x_TD.shape)

    def loss(x_TD, gates_TK, *weights):
        out_TD = expert_ffn(x_TD, expert_TK, gates_TK, *weights, implementation=name)
        return jnp.sum(out_TD.astype(jnp.float32) * weight_TD)

    rounded = [a.astype(jnp.bfloat16).astype(dtype) for a in (x_TD, *weights)]
    return jax.jit(jax.grad(loss, range(5)))(rounded[0], gates_TK, *rounded[1:])


BACKWARD = [("xla", case) for case in CASES] + [("composed", case) for case in CASES]


@pytest.mark.parametrize(("name", "case"), quick(BACKWARD, *BACKWARD[: len(CASES)], ("composed", "loop over tiles")))
def test_backward_matches_the_reference(name, case):
    """In float32 elementwise; in bfloat16 against float32 on the same rounded numbers. The reference is plain JAX."""
    arguments = operands(case)
    computed_TK = np.asarray(arguments[1]) < CASES[case][2]  # a choice that is not computed has no gradient to compare
    expected = gradients("reference", arguments)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 4e-2)):
        for i, (actual, wanted) in enumerate(zip(gradients(name, arguments, dtype), expected)):
            assert actual.dtype == ("float32" if i == 1 else dtype)
            if i == 1:
                actual, wanted = np.asarray(actual) * computed_TK, np.asarray(wanted) * computed_TK
            assert_close(actual, wanted, tolerance, f"{dtype} gradient {i}")


def test_the_comparison_sees_a_defect():
    x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD = operands("loop over tiles")
    expected = oracle(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD)
    next_expert = jnp.where(expert_TK < 8, (expert_TK + 1) % 8, 8)
    assert worst(RUN(x_TD, next_expert, gates_TK, gate_EDF, up_EDF, down_EFD), expected) > 0.1
    assert worst(RUN(x_TD, expert_TK, gates_TK.at[-1].mul(1.1), gate_EDF, up_EDF, down_EFD), expected) > 1e-3


def test_memory_grows_with_the_tokens_and_not_with_the_experts():
    """Acceptance case 8's other side: no weights are gathered per token or per tile, and no row is made per expert."""
    T, K, D, F = 512, 2, 32, 64

    def temporaries(E):
        shapes = [(T, D), (T, K), (T, K), (E, D, F), (E, D, F), (E, F, D)]
        dtypes = [jnp.float32, jnp.int32, *[jnp.float32] * 4]
        arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
        return jax.jit(expert_ffn).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    weights = 3 * D * F * 4
    assert temporaries(64) - temporaries(8) < 56 * weights / 4


def test_errors_name_the_shapes():
    x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD = operands("loop over tiles")
    with pytest.raises(ValueError, match="do not fit"):
        expert_ffn(x_TD[1:], expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD)
    with pytest.raises(ValueError, match="do not fit"):
        expert_ffn(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD[:, 1:])
    with pytest.raises(ValueError, match="one dtype"):
        expert_ffn(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF.astype(jnp.bfloat16), down_EFD)
    with pytest.raises(ValueError, match="no implementation 'gpu'"):
        expert_ffn(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, implementation="gpu")
    for named in ({"grouped_matmul": "reference"}, {"token_dispatch": "xla"}):
        with pytest.raises(ValueError, match="implementation 'xla' has no use for"):
            expert_ffn(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, implementation="xla", **named)
    with pytest.raises(ValueError, match="grouped_matmul: no implementation 'fast'"):
        expert_ffn(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, grouped_matmul="fast")


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("few tokens")])
def test_a_token_that_is_not_a_number_harms_no_other(case):
    x_TD, *others = operands(case)
    found, expected = (RUN(x_TD.at[0].set(bad), *others, implementation="xla") for bad in (np.nan, 0.0))
    np.testing.assert_array_equal(found[1:], expected[1:])


def copied(case):
    """How many arrays as large as one or all of the experts' matrices a program makes of its arguments."""
    arguments = operands(case)
    (E, D, F), module = arguments[3].shape, hlo.parse(RUN.lower(*arguments, implementation="xla").compile().as_text())
    made = [i for computation in module.computations.values() for i in computation.values()]
    made = [i for i in made if i.opcode not in ("parameter", "get-tuple-element", "tuple", "bitcast", "while")]
    return sum(shape.size in (D * F, E * D * F) for i in made for shape in i.shapes)


def test_of_few_tokens_the_weights_are_read_where_they_lie():
    """As they are in a decoding loop; the loop over tiles copies a matrix at a time."""
    assert copied("few tokens, every expert") == 0
    assert copied("loop over tiles") > 0
