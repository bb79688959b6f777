"""Paged latent attention: every implementation against attention over each row's own positions in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interpreter import interpreter
from kernels_pallas import latent_attention as op
from kernels_pallas.latent_attention import tpu
from kernels_pallas.latent_attention.shapes import CASES, make_case
from oracles.attention import attend
from oracles.compare import TOLERANCE, assert_close, worst

# Of the queries, and of pages that hold no codes; of codes below also the other one.
DTYPES = {name: "bfloat16" if name in ("v2", "ties", "int8") else "float32" for name in CASES}
CODED = [name for name, case in CASES.items() if case.dtype != "bfloat16"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", 64)
    monkeypatch.setattr(tpu, "ROWS", 16)


def oracle(arguments, options):
    q_BTNC, pages, table_BP, offset_B = (np.asarray(x) for x in arguments)
    (B, T, N, C), R = q_BTNC.shape, options["value_dim"]
    values = pages.astype(np.float64)
    if options["scales"] is not None:
        scales = np.asarray(options["scales"], np.float64)
        values[..., :R] *= scales[:, 0, :, None]
        values[..., R:] *= scales[:, 1, :, None]
    out = np.zeros((B, T, N, R))
    for b in range(B):
        c_S1C = np.concatenate([values[i] for i in table_BP[b]])[:, None, :C]
        visible_TS = np.arange(len(c_S1C)) <= offset_B[b] + np.arange(T)[:, None]
        out[b] = attend(q_BTNC[b].astype(np.float64), c_S1C, c_S1C[..., :R], options["scale"], visible_TS)
    return out


@pytest.mark.parametrize("name", ["xla", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_portable_forms_match_numpy(case, name):
    arguments, options = make_case(CASES[case], DTYPES[case])
    run = jax.jit(functools.partial(op.paged_latent_attention, **options, implementation=name))
    out = run(*arguments)
    assert out.dtype == DTYPES[case]
    assert_close(out, oracle(arguments, options), TOLERANCE[DTYPES[case]])


def run(arguments, options, splits=1, interpret=None):
    attend = functools.partial(tpu.paged_latent_attention, **options, splits=splits, interpret=interpret)
    return jax.jit(attend)(*arguments)


@pytest.mark.parametrize(("case", "splits"), [*((case, 1) for case in CASES), ("v2", 2), ("several queries", 2)])
def test_kernel_matches_numpy(case, splits, monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", max(tpu.CHUNK, CASES[case].page))
    arguments, options = make_case(CASES[case], DTYPES[case])
    with interpreter() as interpret:
        out = run(arguments, options, splits, interpret)
    assert out.dtype == DTYPES[case]
    assert_close(out, oracle(arguments, options), TOLERANCE[DTYPES[case]])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "splits"), [("bfloat16", 1), ("bfloat16", 2), ("float32", 2)])
@pytest.mark.parametrize("case", CODED)
def test_coded_pages_match_numpy_with_queries_of_either_dtype_and_keys_split(case, dtype, splits, monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", CASES[case].page)
    arguments, options = make_case(CASES[case], dtype)
    with interpreter() as interpret:
        out = run(arguments, options, splits, interpret)
    assert out.dtype == dtype
    assert_close(out, oracle(arguments, options), TOLERANCE[dtype])


def run_on_two_cores(case):
    """Each takes a part of the keys, at the same time; and what is expected."""
    arguments, options = make_case(CASES[case], DTYPES[case])
    with interpreter("eager") as interpret:
        out = run(arguments, options, 2, dataclasses.replace(interpret, num_cores_or_threads=2))
    return out, oracle(arguments, options)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["v2", "several queries", "int4"])
def test_two_cores_share_a_chip_s_work(case, monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", max(tpu.CHUNK, CASES[case].page))
    out, expected = run_on_two_cores(case)
    assert_close(out, expected, TOLERANCE[DTYPES[case]])


@pytest.mark.slow
def test_a_planted_race_of_two_cores_is_found(monkeypatch):
    """Both write their part's result to the same place."""
    block = tpu.pl.BlockSpec

    def crowded(shape=None, index_map=None, **options):
        if shape is None or len(shape) < 4:
            return block(shape, index_map, **options)
        return block(shape, lambda s, *others: (0, *index_map(s, *others)[1:]), **options)

    monkeypatch.setattr(tpu.pl, "BlockSpec", crowded)
    with pytest.raises(AssertionError, match="a kernel raced"):
        run_on_two_cores("v2")


def test_a_planted_race_is_found_in_the_first_of_two_kernels(monkeypatch):
    """A kernel that does not wait for its copies: it reads NaN where they come late, races where they come early."""
    arguments, options = make_case(CASES["v2"], "float32")
    with monkeypatch.context() as planted:
        planted.setattr(tpu, "_wait", lambda copy: None)
        with interpreter() as interpret:
            assert not np.isfinite(run(arguments, options, interpret=interpret)).all()

    def run_two():
        with interpreter("eager") as interpret:
            with monkeypatch.context() as planted:
                planted.setattr(tpu, "_wait", lambda copy: None)
                raced = run(arguments, options, interpret=interpret)
            jax.block_until_ready([raced, run(arguments, options, interpret=interpret)])

    with pytest.raises(AssertionError, match="a kernel raced: 1 of 2"):
        run_two()


def test_an_interpreter_that_nothing_used_fails():
    with pytest.raises(AssertionError, match="nothing was interpreted"), interpreter():
        pass


def test_a_planted_off_by_one_is_far_outside_the_tolerance(monkeypatch):
    arguments, options = make_case(CASES["v2"], "float32")
    monkeypatch.setattr(tpu, "_visible", lambda key, place: key <= place + 1)
    with interpreter() as interpret:
        out = run(arguments, options, interpret=interpret)
    assert worst(out, oracle(arguments, options)) > 0.01


def test_a_cache_in_one_piece_is_pages_in_order():
    rng = np.random.default_rng(0)
    q, cache = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 2, 4, 144), (2, 80, 144)))
    offset = jnp.array([3, 77])
    with interpreter() as interpret:
        out = tpu.latent_attention(q, cache, offset, 128, 0.1, interpret=interpret)
    assert_close(out, op.latent_attention(q, cache, offset, value_dim=128, scale=0.1, implementation="reference"))


@pytest.mark.parametrize("dtype", ["int4", "int8", "float8_e4m3fn"])
def test_quantised_latents_come_back(dtype):
    """To half a step of the integers, a sixteenth of FP8's value; zeros stay zeros, large values stay finite."""
    c = jnp.asarray(
        np.random.default_rng(0).normal(size=(5, 20)) * np.array([1, 1e-6, 1e6, 0, 1])[:, None], jnp.float32
    )
    values, scales = op.quantise(c, 14, dtype)
    back = np.asarray(op.dequantise(values, scales, 14, jnp.float32))
    assert values.dtype == dtype
    assert scales.shape == (2, 5)
    step = {"int4": 0.5 / 7, "int8": 0.5 / 127, "float8_e4m3fn": 1 / 16}[dtype]
    for part in (slice(0, 14), slice(14, 20)):
        largest = np.abs(np.asarray(c[:, part])).max(axis=1, keepdims=True)
        assert (np.abs(back - c)[:, part] <= step * largest * 1.001).all()


def test_errors_name_the_shapes():
    (q, pages, table, offset), options = make_case(CASES["int8"], "float32")
    with pytest.raises(ValueError, match="do not fit"):
        op.paged_latent_attention(q, pages[..., :100], table, offset, **options)
    with pytest.raises(ValueError, match="do not fit"):
        op.paged_latent_attention(q, pages, table[:1], offset, **options)
    with pytest.raises(ValueError, match="int8 without scales"):
        op.paged_latent_attention(q, pages, table, offset, **options | {"scales": None})
    with pytest.raises(ValueError, match="cannot run: a TPU kernel, not for cpu"):
        op.paged_latent_attention(q, pages, table, offset, **options, implementation="tpu")
