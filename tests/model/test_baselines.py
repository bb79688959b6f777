"""MHA, GQA and MQA against the oracle, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import GQA as CONFIG
from small import MODEL, YARN, change, made, normal, packed

from dsv2_jax.model import rope
from dsv2_jax.model.baselines import GQA
from oracles.attention import gqa as oracle
from oracles.compare import TOLERANCE, slope, worst
from oracles.weights import attention as weights

CONFIGS = {
    "mha": change(CONFIG, kv_heads=4),
    "gqa": CONFIG,
    "mqa": change(CONFIG, kv_heads=1),
    "gqa yarn": change(CONFIG, yarn=YARN),
}
SEGMENTS, POSITIONS = packed(5, 9, total=16)


@functools.cache
def module(name):
    return made(lambda key: GQA(change(MODEL, attention=CONFIGS[name]), key))


@jax.jit
def run(gqa, h_BTD, positions_BT=POSITIONS, segments_BT=SEGMENTS):
    cos_sin = rope.rotations(positions_BT, gqa.config.head_dim, gqa.config.rope_theta, gqa.config.yarn)
    return gqa(h_BTD, cos_sin, segments_BT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_matches_the_oracle(name, dtype):
    gqa, h_BTD = module(name), normal(0, 1, 16, 20, dtype=dtype)
    out = run(gqa, h_BTD, POSITIONS + 90)
    assert out.dtype == dtype
    h_TD = np.asarray(h_BTD[0], np.float64)
    expected = oracle(weights(gqa), gqa.config, h_TD, SEGMENTS[0], POSITIONS[0] + 90)
    assert worst(out[0, :14], expected[:14]) <= 2 * TOLERANCE[dtype]
    if name == "gqa":  # query heads sharing the wrong key head are seen
        wrong = weights(gqa)
        wrong["q"] = wrong["q"][:, [0, 2, 1, 3]]
        wrong["out"] = wrong["out"][[0, 2, 1, 3]]
        assert worst(out[0, :14], oracle(wrong, gqa.config, h_TD, SEGMENTS[0], POSITIONS[0] + 90)[:14]) > 0.1


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa"])
def test_backward_matches_finite_differences(name):
    gqa, h_BTD, weight_TD = module(name), normal(0, 1, 16, 20), np.asarray(normal(1, 16, 20), np.float64)
    weight_TD[14:] = 0  # padding
    gradient, gradient_h = jax.grad(lambda gqa, h: jnp.sum(run(gqa, h)[0] * weight_TD), (0, 1))(gqa, h_BTD)
    gradient = weights(gradient) | {"h": np.asarray(gradient_h[0], np.float64)}
    at = weights(gqa) | {"h": np.asarray(h_BTD[0], np.float64)}

    def expected_loss(w):
        return (oracle(w, gqa.config, w["h"], SEGMENTS[0], POSITIONS[0]) * weight_TD).sum()

    rng = np.random.default_rng(3)
    for part in at:
        direction = {name: rng.normal(size=value.shape) * (name == part) for name, value in at.items()}
        size = np.linalg.norm(gradient[part]) * np.linalg.norm(direction[part])
        expected = slope(expected_loss, at, direction)
        assert abs((gradient[part] * direction[part]).sum() - expected) <= 2e-5 * size, part


def test_gqa_with_repeated_keys_is_mha():
    gqa, h_BTD = module("gqa"), normal(0, 1, 16, 20)
    mha = GQA(change(MODEL, attention=CONFIGS["mha"]), jax.random.key(0))
    mha.w_q[...], mha.w_o[...] = gqa.w_q[...], gqa.w_o[...]
    mha.w_kv[...] = jnp.repeat(gqa.w_kv[...], 2, axis=2)
    assert worst(run(mha, h_BTD), run(gqa, h_BTD)) < 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_and_packed(name):
    """Acceptance case 10, and causality, to the bit where nothing may differ."""
    gqa, h_BTD = module(name), normal(0, 1, 16, 20)
    first, second = run(gqa, h_BTD), run(gqa, h_BTD.at[:, :5].add(1.0).at[:, 11:].add(1.0))
    np.testing.assert_array_equal(first[:, 5:11], second[:, 5:11])
    alone = run(gqa, h_BTD[:, 5:14], POSITIONS[:, 5:14], SEGMENTS[:, 5:14])
    assert worst(first[:, 5:14], alone) < 1e-5
