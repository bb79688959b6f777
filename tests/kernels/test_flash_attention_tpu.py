"""The TPU kernels of causal attention under the interpreter, against the float32 reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention import reference, tpu
from oracles.compare import TOLERANCE, assert_close

INTERPRET = pltpu.InterpretParams()
# B, T, N, K: one token; a ragged end; several blocks both ways; grouped key heads. Widths 192 and 128 as in the model.
CASES = {"one token": (1, 1, 1, 1), "ragged": (2, 70, 2, 2), "blocks": (1, 300, 1, 1), "grouped": (1, 130, 4, 2)}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "BLOCK_Q", 128)
    monkeypatch.setattr(tpu, "BLOCK_KV", 256)


def inputs(case, dtype):
    (B, T, N, K), rng = CASES[case], np.random.default_rng(0)
    shapes = (B, T, N, 192), (B, T, K, 192), (B, T, K, 128), (B, T, N, 128)
    q, k, v, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    starts_BT = rng.random((B, T)) < 4 / T
    segments_BT = np.where(np.arange(T) < T - T // 5, 1 + np.cumsum(starts_BT, axis=1), 0)  # the end is padding
    return (q, k, v), weight.astype(jnp.float32), jnp.asarray(segments_BT, jnp.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case, dtype):
    qkv, weight_BTNV, segments = inputs(case, dtype)
    segments = None if case == "blocks" else segments

    def value_and_gradients(attention, qkv, **options):
        def loss(*qkv):
            out = attention(*qkv, 0.1, segments, **options)
            return jnp.sum(out.astype(jnp.float32) * weight_BTNV), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
        return {"out": out, **{f"gradient of {letter}": g for letter, g in zip("qkv", gradients)}}

    expected = value_and_gradients(reference.flash_attention, [x.astype(jnp.float32) for x in qkv])
    for what, actual in value_and_gradients(tpu.flash_attention, qkv, interpret=INTERPRET).items():
        assert actual.dtype == dtype
        if case == "one token" and what[-1] in "qk":  # its softmax is 1, whatever they are
            assert np.abs(actual).max() < TOLERANCE[dtype]
        else:
            assert_close(actual, expected[what], TOLERANCE[dtype], what)
