"""Grouped matmul and the tile layout under it: widths that no tile divides, empty groups, all rows to one expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import grouped_matmul as op
from kernels_pallas.tiles import make_layout, tile_size
from oracles.compare import TOLERANCE, assert_close, slope, worst
from oracles.layers import swiglu
from oracles.moe import grouped_matmul as oracle

PORTABLE = ("xla", "reference")  # run on any platform
# T, K, E, tile, D, F. Widths 1408 and 1536 in small (88, 96), and odd ones; experts without tokens; a single row.
CASES = {
    "deepseek widths": (40, 3, 8, 16, 64, 88),
    "odd widths": (33, 2, 5, 8, 50, 100),
    "ragged everything": (29, 4, 7, 32, 7, 11),
    "one row": (1, 1, 4, 8, 6, 5),
    "one expert": (19, 1, 1, 4, 6, 5),
    "every expert chosen": (10, 4, 4, 4, 6, 5),
    "all to one expert": (21, 1, 6, 8, 6, 5),
    "all choices dropped": (9, 2, 3, 4, 6, 5),
}


MAKE_LAYOUT = jax.jit(make_layout, static_argnums=(1, 2))


def routing(case):
    """expert_TK: random distinct experts; in about a fifth of the choices E, that is: not computed."""
    T, K, E, tile, _, _ = CASES[case]
    rng = np.random.default_rng(0)
    expert_TK = np.array([rng.permutation(E)[:K] for _ in range(T)])
    if case == "all to one expert":
        expert_TK[:] = 4
    elif case == "all choices dropped":
        expert_TK[:] = E
    elif T > 1:
        expert_TK[rng.random((T, K)) < 0.2] = E
        expert_TK[expert_TK == 1] = E  # an expert without rows
    return jnp.asarray(expert_TK, jnp.int32), MAKE_LAYOUT(jnp.asarray(expert_TK, jnp.int32), E, tile)


def operands(case, layout, dtype="float32", matrices=1):
    (_, _, E, _, D, F), rng = CASES[case], np.random.default_rng(1)
    x_GD = rng.normal(size=(len(layout.token_of_row_G), D))
    return [jnp.asarray(x, dtype) for x in (x_GD, *(rng.normal(size=(E, D, F)) for _ in range(matrices)))]


def sizes(layout, experts):
    """Rows of each expert, its padding included."""
    live = np.asarray(layout.expert_of_tile)[: int(layout.live_tiles)]
    return np.bincount(live, minlength=experts) * layout.tile


@pytest.mark.parametrize("dtype", ["bfloat16", "int16", "float8_e5m2"])
def test_scales_are_of_codes_alone(dtype):
    _, layout = routing("deepseek widths")
    x_GD, gate_EDF, up_EDF = operands("deepseek widths", layout, "bfloat16", matrices=2)
    scales = [jnp.ones((8, 88))] * 2
    with pytest.raises(ValueError, match=f"scales with weights of {dtype}: int8 or float8_e4m3fn"):
        op.grouped_swiglu(x_GD, gate_EDF.astype("int8"), up_EDF.astype(dtype), layout, scales_EF=scales)


def worst_error(matmul, case, dtype="float32"):
    _, layout = routing(case)
    x_GD, w_EDF = operands(case, layout, dtype)
    out_GF = matmul(x_GD, w_EDF, layout)
    assert out_GF.dtype == dtype
    return worst(out_GF, oracle(np.asarray(x_GD), np.asarray(w_EDF), sizes(layout, len(w_EDF))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PORTABLE)
def test_matmul_matches_numpy(name, case, dtype):
    """Acceptance case 8: no width, tail or empty group goes wrong."""

    def matmul(*operands):
        return op.grouped_matmul(*operands, implementation=name)

    assert worst_error(jax.jit(matmul), case, dtype) <= TOLERANCE[dtype]


def test_the_check_of_case_8_sees_its_defects():
    """Acceptance case 8: a forgotten ragged width, tail tile or group's matrix is far outside the tolerance."""

    def ragged_width(x_GD, w_EDF, layout):  # whole tiles of 64 columns only
        return op.grouped_matmul(x_GD, w_EDF.at[:, :, 64:].set(0), layout)

    def ragged_contraction(x_GD, w_EDF, layout):
        return op.grouped_matmul(x_GD.at[:, 32:].set(0), w_EDF, layout)

    def tail_tile(x_GD, w_EDF, layout):
        first = layout.tile * (layout.live_tiles - 1)
        return op.grouped_matmul(x_GD, w_EDF, layout).at[first:].set(0)

    def next_expert(x_GD, w_EDF, layout):
        return op.grouped_matmul(x_GD, jnp.roll(w_EDF, 1, axis=0), layout)

    for defect in (ragged_width, ragged_contraction, tail_tile, next_expert):
        assert worst_error(defect, "odd widths") > 0.1, defect


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PORTABLE)
def test_swiglu_matches_numpy(name, case, dtype):
    _, layout = routing(case)
    x_GD, gate_EDF, up_EDF = operands(case, layout, dtype, matrices=2)
    out_GF = jax.jit(op.grouped_swiglu, static_argnames="implementation")(
        x_GD, gate_EDF, up_EDF, layout, implementation=name
    )
    x_GD, gate_EDF, up_EDF = (np.asarray(a, np.float64) for a in (x_GD, gate_EDF, up_EDF))
    expected, row = np.zeros(out_GF.shape), 0
    for e, size in enumerate(sizes(layout, len(gate_EDF))):
        rows = slice(row, row := row + size)
        expected[rows] = swiglu(x_GD[rows], gate_EDF[e], up_EDF[e], np.eye(gate_EDF.shape[2]))
    assert_close(out_GF, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["grouped_matmul", "grouped_swiglu"])
def test_backward_matches_the_reference(which, case):
    """In float32 elementwise; in bfloat16 against float32 on the same rounded numbers."""
    _, layout = routing(case)
    arguments = operands(case, layout, matrices=1 if which == "grouped_matmul" else 2)
    weight_GF = np.random.default_rng(2).normal(size=(len(arguments[0]), CASES[case][-1]))

    def gradients(name, dtype):
        def loss(*arguments):
            out = getattr(op, which)(*arguments, layout, implementation=name)
            return jnp.sum(out.astype(jnp.float32) * weight_GF)

        rounded = (a.astype(jnp.bfloat16).astype(dtype) for a in arguments)
        return jax.jit(jax.grad(loss, tuple(range(len(arguments)))))(*rounded)

    expected = gradients("reference", "float32")
    for i, (exact, rough) in enumerate(zip(gradients("xla", "float32"), gradients("xla", "bfloat16"))):
        assert_close(exact, expected[i], 1e-5, f"gradient {i}")
        assert rough.dtype == jnp.bfloat16
        assert_close(rough, expected[i], 3e-2, f"bfloat16 gradient {i}")


@pytest.mark.parametrize("name", PORTABLE)
def test_backward_matches_finite_differences(name):
    _, layout = routing("ragged everything")
    operand = operands("ragged everything", layout)
    weight_GF = np.random.default_rng(2).normal(size=(len(operand[0]), 11))
    direction = [np.random.default_rng(3 + i).normal(size=a.shape) for i, a in enumerate(operand)]

    def loss(operand):
        return jnp.sum(op.grouped_matmul(*operand, layout, implementation=name) * weight_GF)

    gradient = jax.jit(jax.grad(loss))(operand)
    for i in range(2):
        along = [d * (i == j) for j, d in enumerate(direction)]
        expected = slope(lambda x: (oracle(*x, sizes(layout, 7)) * weight_GF).sum(), operand, along)
        size = np.linalg.norm(gradient[i]) * np.linalg.norm(direction[i])
        assert abs((np.asarray(gradient[i]) * direction[i]).sum() - expected) <= 1e-5 * size


def check_layout(expert_TK, experts, tile):
    """Every computed choice has a row of its own in a live tile of its expert; no other row serves anybody."""
    (T, K), layout = expert_TK.shape, MAKE_LAYOUT(jnp.asarray(expert_TK, jnp.int32), experts, tile)
    expert_of_tile, token_of_row, choice_of_row, row_of_choice = (
        np.asarray(x)
        for x in (layout.expert_of_tile, layout.token_of_row_G, layout.choice_of_row_G, layout.row_of_choice_TK)
    )
    rows, live_rows = len(token_of_row), int(layout.live_tiles) * tile
    assert layout.tile == tile
    assert len(expert_of_tile) <= -(-T * K // tile) + experts
    assert live_rows <= rows
    assert ((expert_of_tile >= 0) & (expert_of_tile < experts)).all()
    served = {}
    for t, k in np.ndindex(T, K):
        row = row_of_choice[t, k]
        if expert_TK[t, k] == experts:
            assert row == rows
            continue
        assert row < live_rows
        assert expert_of_tile[row // tile] == expert_TK[t, k]
        assert (token_of_row[row], choice_of_row[row]) == (t, k)
        served[int(row)] = t
    assert len(served) == (expert_TK < experts).sum()
    assert all(token_of_row[row] == T for row in range(rows) if row not in served)
    # tiles are no more than each expert needs: no expert's waste exceeds one tile
    count_E = np.bincount(expert_TK.ravel(), minlength=experts + 1)[:experts]
    assert int(layout.live_tiles) == (-(-count_E // tile)).sum()


@pytest.mark.parametrize(("T", "K", "experts", "tile"), [(1, 1, 1, 4), (5, 1, 6, 1), (7, 3, 3, 2), (12, 2, 5, 8)])
@settings(max_examples=25)
@given(data=st.data())
def test_layout_loses_and_doubles_nothing(T, K, experts, tile, data):
    expert = st.one_of(st.integers(0, experts), st.just(data.draw(st.integers(0, experts))))
    check_layout(np.array(data.draw(st.lists(expert, min_size=T * K, max_size=T * K))).reshape(T, K), experts, tile)


@pytest.mark.parametrize(("pairs", "experts"), [(1, 1), (6, 160), (8192, 16), (24576, 64), (10**6, 2)])
def test_tile_size(pairs, experts):
    """A power of two, at most 128, and never so large that padding outweighs the rows."""
    tile = tile_size(pairs, experts)
    assert tile & (tile - 1) == 0
    assert 1 <= tile <= 128
    assert tile * experts <= 2 * max(pairs, experts)


def test_errors_name_the_shapes():
    _, layout = routing("odd widths")
    x_GD, w_EDF = operands("odd widths", layout)
    with pytest.raises(ValueError, match="rows"):
        op.grouped_matmul(x_GD[1:], w_EDF, layout)
    with pytest.raises(ValueError, match="do not fit"):
        op.grouped_matmul(x_GD, w_EDF[:, 1:], layout)
    with pytest.raises(ValueError, match="one dtype"):
        op.grouped_matmul(x_GD, w_EDF.astype(jnp.bfloat16), layout)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        op.grouped_matmul(x_GD, w_EDF, layout, implementation="fast")
