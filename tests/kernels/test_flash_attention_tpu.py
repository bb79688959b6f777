"""The TPU kernels of causal attention, interpreted, against the float32 reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interpreter import interpreter
from kernels_pallas.flash_attention import reference, tpu
from kernels_pallas.flash_attention.shapes import CASES, make_case
from oracles.compare import TOLERANCE, assert_close


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "BLOCK_Q", 128)
    monkeypatch.setattr(tpu, "BLOCK_KV", 256)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param("one token", "float32", marks=pytest.mark.slow),
        ("ragged", "bfloat16"),
        ("grouped", "float32"),
        pytest.param("ragged", "float32", marks=pytest.mark.slow),
        pytest.param("blocks", "bfloat16", marks=pytest.mark.slow),
        pytest.param("grouped", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_matches_the_reference(case, dtype):
    qkv, weight_BTNV, segments = make_case(CASES[case], dtype)

    def value_and_gradients(attention, qkv, **options):
        def loss(*qkv):
            out = attention(*qkv, 0.1, segments, **options)
            return jnp.sum(out.astype(jnp.float32) * weight_BTNV), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
        return {"out": out, **{f"gradient of {letter}": g for letter, g in zip("qkv", gradients)}}

    expected = value_and_gradients(reference.flash_attention, [x.astype(jnp.float32) for x in qkv])
    with interpreter() as interpret:
        found = value_and_gradients(tpu.flash_attention, qkv, interpret=interpret)
    for what, actual in found.items():
        assert actual.dtype == dtype
        if case == "one token" and what[-1] in "qk":  # its softmax is 1, whatever they are
            assert np.abs(actual).max() < TOLERANCE[dtype]
        else:
            assert_close(actual, expected[what], TOLERANCE[dtype], what)


@pytest.mark.parametrize(
    ("queries", "kv_heads", "dtype"), [(130, 2, "float32"), pytest.param(256, 1, "bfloat16", marks=pytest.mark.slow)]
)
def test_a_chunk_over_a_cache_matches_the_reference(queries, kv_heads, dtype):
    """At the cache's beginning, inside, up to its end, and beyond it, where a padded chunk has queries of nobody."""
    rng, S, offset_B = np.random.default_rng(0), 300, jnp.array([0, 77, 300 - queries, 290])
    shapes = (4, queries, 2, 192), (4, S, kv_heads, 192), (4, S, kv_heads, 128)
    qkv = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    with interpreter() as interpret:
        out = tpu.flash_attention(*qkv, 0.1, offset_B=offset_B, interpret=interpret)
    assert out.dtype == dtype
    expected = reference.flash_attention(*(x.astype(jnp.float32) for x in qkv), 0.1, offset_B=offset_B)
    assert_close(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, 128, 129, 500, 1024, 1100, 4096, 5000])
def test_blocks_divide_the_padded_length_and_pad_less_than_one(length, monkeypatch):
    monkeypatch.undo()
    padded, sizes = tpu._blocks(length)
    assert length <= padded < length + max(128, sizes.block_q)
    assert padded % sizes.block_q == padded % sizes.block_kv == sizes.block_kv % sizes.block_kv_compute == 0
    assert sizes.block_q % 128 == sizes.block_kv_compute % 128 == 0
