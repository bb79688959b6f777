"""The Hopper kernels of the grouped matmul, interpreted, against the float32 reference, forward and backward."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from quick import quick

from gpu_interpreter import gpu_interpreter
from kernels_pallas import grouped_matmul as op
from kernels_pallas.grouped_matmul import gpu, reference
from kernels_pallas.grouped_matmul.shapes import CASES, make_case
from kernels_pallas.select import Target
from kernels_pallas.tiles import make_layout
from oracles.compare import TOLERANCE, assert_close, worst

H200 = Target("gpu", "NVIDIA H200")
# No step is cut short, so that no number which nobody wrote may reach a result.
WHOLE = dataclasses.replace(CASES["v2"], dim=64, width=96)
SMALL = {"UNIT": 16, "DEPTH": 32, "COLUMNS": 64, "CHUNK": 32, "STAGES": 2}
REAL = {name: getattr(gpu, name) for name in SMALL}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several steps, blocks and chunks in every case."""
    for name, size in SMALL.items():
        monkeypatch.setattr(gpu, name, size)


@contextlib.contextmanager
def interpreter(memory="nan"):
    """What nobody wrote, and what a copy reads beyond an array (zeros from TMA), is "nan" or "zero"."""
    with gpu_interpreter() as interpret:
        yield dataclasses.replace(interpret, out_of_bounds_reads="uninitialized", uninitialized_memory=memory)


def results(module, which, arguments, weight_GF, layout, *options):
    def loss(*arguments):
        out = getattr(module, which)(*arguments, layout, *options)
        return jnp.sum(out.astype(jnp.float32) * weight_GF), out

    every = tuple(range(len(arguments)))
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, every, has_aux=True))(*arguments)
    return out, *gradients


def check(case, which, memory):
    x_GD, matrices, weight_GF, layout = make_case(case, jnp.bfloat16)
    arguments = x_GD, *matrices[: 1 if which == "grouped_matmul" else 2]
    expected = results(reference, which, [a.astype(jnp.float32) for a in arguments], weight_GF, layout)
    with interpreter(memory) as interpret:
        found = results(gpu, which, arguments, weight_GF, layout, interpret)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == jnp.bfloat16
        assert_close(a, b, TOLERANCE["bfloat16"], "result" if i == 0 else f"gradient {i - 1}")


# Interpreting is quick, but first XLA compiles each kernel for each of its three warpgroups.
OFTEN = "single rows", "grouped_swiglu"


@pytest.mark.parametrize("which", ["grouped_matmul", pytest.param("grouped_swiglu", marks=pytest.mark.slow)])
def test_whole_blocks_match_the_reference(which):
    check(WHOLE, which, "nan")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "v2"])
def test_whole_blocks_of_every_routing_read_nothing_that_nobody_wrote(case):
    """Experts without rows, dead tiles, tiles of one row, and all of them dead: with WHOLE's widths."""
    check(dataclasses.replace(CASES[case], dim=WHOLE.dim, width=WHOLE.width), "grouped_matmul", "nan")


@pytest.mark.parametrize(
    ("case", "which"),
    [
        pytest.param(case, which, marks=() if (case, which) == OFTEN else pytest.mark.slow)
        for case in CASES
        for which in ("grouped_matmul", "grouped_swiglu")
    ],
)
def test_widths_that_no_block_divides_match_the_reference(case, which):
    check(CASES[case], which, "zero")


@pytest.mark.slow
def test_multiprocessors_share_the_blocks_out(monkeypatch):
    """Of which they have no equal number."""
    monkeypatch.setattr(gpu, "multiprocessors", lambda: 3)
    x_GD, (w_EDF, _), _, layout = make_case(WHOLE, jnp.bfloat16)
    assert (gpu._blocks(layout, len(w_EDF), gpu.CONSUMERS)[0] * 2) % 3 != 0
    with interpreter() as interpret:
        found = gpu.grouped_matmul(x_GD, w_EDF, layout, interpret)
    expected = reference.grouped_matmul(x_GD.astype(jnp.float32), w_EDF.astype(jnp.float32), layout)
    assert_close(found, expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("dtype", "which", "sizes", "memory"),
    [
        pytest.param("int8", "grouped_matmul", (48, 80), "zero", marks=pytest.mark.slow),
        # no step and no block is cut short
        pytest.param("int8", "grouped_matmul", (64, 128), "nan", marks=pytest.mark.slow),
        ("float8_e4m3fn", "grouped_swiglu", (48, 80), "zero"),
        pytest.param("float8_e4m3fn", "grouped_swiglu", (64, 128), "nan", marks=pytest.mark.slow),
        pytest.param("float8_e4m3fn", "grouped_matmul", (48, 80), "zero", marks=pytest.mark.slow),
        pytest.param("int8", "grouped_swiglu", (48, 80), "zero", marks=pytest.mark.slow),
    ],
)
def test_weights_of_one_byte_are_exact_until_the_product_is_rounded(dtype, which, sizes, memory, monkeypatch):
    monkeypatch.setattr(gpu, "COLUMNS", 128)  # a warpgroup's part of one product is 32 bytes, the narrowest swizzle
    dim, width = sizes
    case = dataclasses.replace(CASES["v2"], experts=3, dim=dim, width=width)
    x_GD, matrices, _, layout = make_case(case, jnp.bfloat16)
    matrices = matrices[: 1 if which == "grouped_matmul" else 2]
    scales = [jnp.abs(w.astype(jnp.float32)).max(axis=1) / 100 for w in matrices]
    coded = [(w / s[:, None]).astype(dtype) for w, s in zip(matrices, scales)]
    decoded = [w.astype(jnp.float32) * s[:, None] for w, s in zip(coded, scales)]
    with interpreter(memory) as interpret:
        found = gpu.quantised(which, x_GD, coded, scales, layout, interpret)
    expected = np.asarray(getattr(reference, which)(x_GD.astype(jnp.float32), *decoded, layout))
    half_an_ulp = 2.0**-8
    assert (np.abs(np.asarray(found, np.float32) - expected) <= half_an_ulp * np.abs(expected) + 1e-4).all()


@pytest.mark.parametrize("defect", quick(["next unit", "dead tiles"], "dead tiles"))
def test_a_planted_defect_is_far_outside_the_tolerance(defect, monkeypatch):
    x_GD, (w_EDF, _), _, layout = make_case(WHOLE, jnp.bfloat16)
    blocks = gpu._blocks

    def wrong(layout, experts, most):
        count, (expert, first, size) = blocks(layout, experts, most)
        if defect == "next unit":
            first = first + 1
        else:  # are not written: NaN shows
            count = jnp.sum(expert < experts, keepdims=True).astype(jnp.int32)
        return count, jnp.stack([expert, first, size])

    monkeypatch.setattr(gpu, "_blocks", wrong)
    with interpreter() as interpret:
        found = gpu.grouped_matmul(x_GD, w_EDF, layout, interpret)
    expected = reference.grouped_matmul(x_GD.astype(jnp.float32), w_EDF.astype(jnp.float32), layout)
    assert not worst(found, expected) < 0.1


def test_a_planted_race_is_found_in_the_first_of_two_kernels(monkeypatch):
    """Both warpgroups write their results through the same scratch."""
    x_GD, (w_EDF, _), _, layout = make_case(WHOLE, jnp.bfloat16)
    write = gpu._write

    def run_two():
        with interpreter() as interpret:
            with monkeypatch.context() as planted:
                planted.setattr(gpu, "_write", lambda *arguments: write(*arguments[:-1], 0))
                raced = gpu.grouped_matmul(x_GD, w_EDF, layout, interpret)
            jax.block_until_ready([raced, gpu.grouped_matmul(x_GD, w_EDF, layout, interpret)])

    with pytest.raises(AssertionError, match="a kernel raced: 1 of 2"):
        run_two()


def test_an_interpreter_that_nothing_used_fails():
    with pytest.raises(AssertionError, match="nothing was interpreted"), gpu_interpreter():
        pass


MAKE_LAYOUT = jax.jit(make_layout, static_argnums=(1, 2))
BLOCKS = jax.jit(gpu._blocks, static_argnums=(1, 2))


@pytest.mark.parametrize(("experts", "units", "most"), [(5, 1, 2), (4, 2, 2), (6, 1, 1)])
@settings(max_examples=15)
@given(data=st.data())
def test_every_unit_is_in_one_block_of_its_expert(experts, units, most, data):
    tile, T = units * gpu.UNIT, 7
    choices = data.draw(st.lists(st.integers(0, experts), min_size=T, max_size=T))
    layout = MAKE_LAYOUT(jnp.asarray(choices, jnp.int32)[:, None], experts, tile)
    count, table = BLOCKS(layout, experts, most)
    live, seen = int(layout.live_tiles) * units, []
    assert count[0] <= table.shape[1]
    for expert, first, size in np.asarray(table).T[: int(count[0])]:
        assert 1 <= size <= most
        for unit in range(first, first + size):
            expected = int(layout.expert_of_tile[unit // units]) if unit < live else experts
            assert expert == expected
            seen.append(unit)
    assert sorted(seen) == list(range(len(layout.expert_of_tile) * units))


def operands(tile=64, D=128, F=192, dtype=jnp.bfloat16, weights=None, matrices=1):
    layout = jax.eval_shape(lambda e_TK: make_layout(e_TK, 4, tile), jax.ShapeDtypeStruct((8, 2), jnp.int32))
    x_GD = jax.ShapeDtypeStruct((len(layout.token_of_row_G), D), dtype)
    return x_GD, [jax.ShapeDtypeStruct((4, D, F), weights or dtype)] * matrices, layout


@pytest.mark.parametrize(
    ("target", "arguments", "reason"),
    [
        (Target("cpu", "cpu"), {}, "a Hopper kernel, not for cpu"),
        (Target("gpu", "NVIDIA A100-SXM4-40GB"), {}, "not for NVIDIA A100-SXM4-40GB"),
        (Target("gpu", "NVIDIA B200"), {}, "not for NVIDIA B200"),
        (Target("gpu", "NVIDIA A800-SXM4-80GB"), {}, "not for NVIDIA A800"),
        (Target("gpu", "NVIDIA L20"), {}, "not for NVIDIA L20"),
        (H200, {"dtype": jnp.float32}, "rows of float32: only bfloat16"),
        (H200, {"weights": jnp.float8_e5m2}, "weights of float8_e5m2"),
        (H200, {"tile": 24}, "tiles of 24 rows are no multiple of 16"),
        (H200, {"F": 100}, "weights 128 x 100 of bfloat16: TMA reads rows that are multiples of 16 bytes"),
        (H200, {"F": 24, "weights": jnp.int8}, "weights 128 x 24 of int8: TMA reads"),
        (H200, {"D": 104, "F": 136}, "weights 104 x 136 of bfloat16: TMA takes widths up to 64 or multiples of 64"),
        (H200, {"D": 72, "F": 8}, "weights 72 x 8 of bfloat16: TMA takes"),
        (H200, {"D": 8, "F": 200}, "weights 8 x 200 of bfloat16: TMA takes"),
        (H200, {"D": 1000, "F": 1416, "matrices": 2}, "weights 1000 x 1416 of bfloat16: TMA takes"),
        (H200, {"F": 192, "weights": jnp.int8}, "weights 128 x 192 of int8: TMA takes widths up to 64 or multiples"),
        (H200, {"F": 192, "weights": jnp.float8_e4m3fn}, "of 64, the last of 128 beyond it"),
        (H200, {"F": 112, "weights": jnp.int8}, "weights 128 x 112 of int8"),
        (H200, {"D": 72, "F": 128, "weights": jnp.int8, "matrices": 2}, "weights 72 x 128 of int8"),
    ],
)
def test_what_is_unsupported_says_why(target, arguments, reason):
    assert reason in gpu.unsupported(target, *operands(**arguments))


@pytest.mark.parametrize("kind", [f"NVIDIA {x}" for x in ("H200", "H100 80GB HBM3", "GH200 480GB", "H800", "H20")])
def test_hopper_is_supported(kind):
    assert gpu.unsupported(Target("gpu", kind), *operands()) is None
    assert gpu.unsupported(Target("gpu", kind), *operands(F=256, weights=jnp.int8)) is None


def hopper_mesh(**axes) -> AbstractMesh:
    device = jax.sharding.AbstractDevice(device_kind=H200.kind, num_cores=132, platform="gpu")
    kinds = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=device)


@pytest.mark.parametrize(
    ("D", "F", "dtype", "which"),
    [
        (8, 56, "bfloat16", "grouped_matmul"),
        pytest.param(192, 64, "bfloat16", "grouped_matmul", marks=pytest.mark.slow),
        (64, 192, "bfloat16", "grouped_swiglu"),
        (40, 48, "int8", "grouped_matmul"),
        (192, 128, "int8", "grouped_matmul"),
        (192, 192, "int8", "grouped_swiglu"),
    ],
)
def test_what_is_supported_lowers_with_its_gradients(D, F, dtype, which, monkeypatch):
    for name, size in REAL.items():
        monkeypatch.setattr(gpu, name, size)
    x_GD, weights, layout = operands(D=D, F=F, weights=jnp.dtype(dtype), matrices=1 + (which == "grouped_swiglu"))
    scales = [jax.ShapeDtypeStruct((4, F), jnp.float32)] * len(weights)
    assert gpu.unsupported(H200, x_GD, weights, layout) is None

    def gradients(x_GD, weights, scales, layout):
        def loss(x_GD, weights):
            return getattr(gpu, which)(x_GD, *weights, layout).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1))(x_GD, weights)

    def coded(x_GD, weights, scales, layout):
        return gpu.quantised(which, x_GD, weights, scales, layout)

    with jax.sharding.use_abstract_mesh(hopper_mesh(data=1)):
        program = jax.jit(gradients if dtype == "bfloat16" else coded).trace(x_GD, weights, scales, layout)
        assert "@mosaic_gpu" in program.lower(lowering_platforms=("cuda",)).as_text()


def test_it_is_automatic_on_hopper_with_tiles_of_one_wgmma():
    with jax.sharding.use_abstract_mesh(hopper_mesh(data=1)):
        assert op.rows_per_tile(6, 64) == op.rows_per_tile(10**6, 64) == gpu.UNIT
        x_GD, (w_EDF,), layout = operands()
        program = str(jax.make_jaxpr(op.grouped_matmul)(x_GD, w_EDF, layout))
    assert "grouped_rows" in program


@pytest.mark.parametrize("check_vma", [False, True])
def test_kernels_and_their_gradients_trace_inside_shard_map(check_vma):
    def local(x_GD, expert_TK, gate, up):
        return op.grouped_swiglu(x_GD, gate, up, make_layout(expert_TK, 4, 16), implementation="gpu")

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, shares = (8 * 2 // 16 + 4) * 16, PartitionSpec("expert")
    arguments = array(2 * rows, 32), array(16, 2, dtype=jnp.int32), array(8, 32, 16), array(8, 32, 16)
    with jax.sharding.use_abstract_mesh(hopper_mesh(expert=2)):
        mapped = jax.shard_map(local, in_specs=shares, out_specs=shares, check_vma=check_vma)
        gradient = jax.grad(lambda x, *others: mapped(x, *others).astype(jnp.float32).sum())
        assert jax.eval_shape(gradient, *arguments).shape == (2 * rows, 32)
        with pytest.raises(ValueError, match="the rows lie on several devices"):
            jax.eval_shape(local, array(rows, 32), array(8, 2, dtype=jnp.int32), array(4, 32, 16), array(4, 32, 16))
