"""Rotary embedding and YaRN against the oracle (acceptance cases 1 and 2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import YARN, normal

from dsv2_jax.config import YarnConfig
from dsv2_jax.model import rope
from oracles import rope as oracle
from oracles.compare import assert_close, worst

V2_YARN = YarnConfig(factor=40.0)  # original length 4096, mscale 0.707, as released
CASES = [
    (2, 10000.0, None),
    (64, 10000.0, None),
    (64, 10000.0, V2_YARN),
    (8, 500.0, YARN),
    (6, 10000.0, YARN),
    (64, 10000.0, dataclasses.replace(V2_YARN, mscale=1.0, beta_slow=2.0, beta_fast=16.0)),
]


ROTATE, ROTATIONS = jax.jit(rope.rotate), jax.jit(rope.rotations, static_argnums=(1, 2, 3))


def test_oracle_has_the_published_numbers():
    assert oracle.mscale(40, 0.707) ** 2 == pytest.approx(1.5896, abs=5e-5)
    plain, yarn = oracle.frequencies(64, 10000.0), oracle.frequencies(64, 10000.0, V2_YARN)
    np.testing.assert_allclose(yarn[:11], plain[:11])  # pair 10 still turns more than 32 times in 4096 tokens
    np.testing.assert_allclose(yarn[23:], plain[23:] / 40)  # pair 23 less than once
    assert (np.diff(plain[10:24] / yarn[10:24]) > 0).all()


@pytest.mark.parametrize(("dim", "theta", "yarn"), CASES, ids=str)
def test_frequencies_match_the_oracle(dim, theta, yarn):
    np.testing.assert_allclose(rope.frequencies(dim, theta, yarn), oracle.frequencies(dim, theta, yarn), rtol=1e-12)


def check_scale(softmax_scale):
    for yarn in (None, V2_YARN, dataclasses.replace(V2_YARN, mscale_all_dim=1.0)):
        assert softmax_scale(192, yarn) == pytest.approx(oracle.softmax_scale(192, yarn), rel=1e-9)


def test_yarn_multiplies_the_softmax_scale():
    """Acceptance case 1: 1.5896 at factor 40; a scale without it, inverted, or unsquared fails."""
    check_scale(rope.softmax_scale)
    assert rope.softmax_scale(192, V2_YARN) * 192**0.5 == pytest.approx(1.5896, abs=5e-5)
    for power in (0, -2, 1):
        with pytest.raises(AssertionError):
            check_scale(lambda dim, yarn: dim**-0.5 * (oracle.mscale(yarn.factor, 0.707) ** power if yarn else 1))  # noqa: B023


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dim", "theta", "yarn"), CASES, ids=str)
def test_rotation_matches_the_oracle(dim, theta, yarn, dtype):
    """Angles are float32: their error grows with the position as position * 2^-24 radians, 0.01 at 160K."""
    positions_BT = jnp.array([[0, 1, 2, 63], [4095, 5, 0, 20000]])
    x_BTNP = normal(0, 2, 4, 3, dim, dtype=dtype)
    out = ROTATE(x_BTNP, ROTATIONS(positions_BT, dim, theta, yarn))
    assert out.dtype == dtype
    for (b, t), position in np.ndenumerate(np.asarray(positions_BT)):
        expected = [oracle.rotate(np.asarray(x_P), position, theta, yarn) for x_P in x_BTNP[b, t]]
        assert_close(out[b, t], expected, 1e-6 + position * 2.0**-23 + (dtype == "bfloat16") * 4e-3)


@pytest.mark.parametrize("yarn", [None, V2_YARN], ids=["plain", "yarn"])
def test_scores_depend_on_distance_only(yarn):
    q, k = normal(1, 1, 6, 2, 16), normal(2, 1, 6, 2, 16)

    def scores(start):
        cos_sin = ROTATIONS(start + jnp.arange(6)[None], 16, 10000.0, yarn)
        return jnp.einsum("btnp,bsnp->bnts", ROTATE(q, cos_sin), ROTATE(k, cos_sin))

    assert worst(scores(300), scores(0)) < 1e-4
    assert worst(scores(0)[..., 1:, :-1], scores(0)[..., :-1, :-1]) > 0.1


def test_pairs_are_interleaved():
    """Acceptance case 2: with the two halves rotated instead, on one side or both, the scores are others."""
    q, k, angles = normal(1, 1, 9, 1, 16), normal(2, 1, 9, 1, 16), ROTATIONS(jnp.arange(9)[None], 16, 100.0, None)

    def halves(x):  # (x0, x8), (x1, x9), ... are the pairs
        def pair(y):
            return jnp.stack(jnp.split(y, 2, axis=-1), axis=-1).reshape(y.shape)

        return ROTATE(pair(x), angles)

    def pairs(x):
        return ROTATE(x, angles)

    def error(turn_q, turn_k):
        expected = np.array(
            [
                [
                    oracle.rotate(np.asarray(q[0, t, 0]), t, 100.0) @ oracle.rotate(np.asarray(k[0, s, 0]), s, 100.0)
                    for s in range(9)
                ]
                for t in range(9)
            ]
        )
        return worst(jnp.einsum("tp,sp->ts", turn_q(q)[0, :, 0], turn_k(k)[0, :, 0]), expected)

    assert error(pairs, pairs) < 1e-5
    assert error(halves, pairs) > 0.1
    assert error(pairs, halves) > 0.1
    assert error(halves, halves) > 0.1
