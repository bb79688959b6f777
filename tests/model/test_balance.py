"""The three balance losses, per sequence, against the oracle (acceptance case 5)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MOE, normal

from dsv2_jax.config import BalanceConfig, DroppingConfig
from dsv2_jax.model import router
from oracles.compare import assert_close, slope
from oracles.layers import softmax
from oracles.routing import balance_losses, choose

LENGTHS = (17, 9, 1, 0)  # real tokens of each row
ROUTE = jax.jit(router.route, static_argnums=2, static_argnames="training")
ALPHAS = np.array([MOE.balance.expert, MOE.balance.device, MOE.balance.communication])


def inputs(seed=0):
    logits_BTE = 2 * normal(seed, len(LENGTHS), max(LENGTHS), MOE.routed_experts)
    return logits_BTE, jnp.arange(max(LENGTHS)) < jnp.array(LENGTHS)[:, None]


def losses(logits_BTE, real_BT, config=MOE):
    return ROUTE(logits_BTE, real_BT, config).stats.balance_3


def oracle(logits_BTE, alphas=ALPHAS):
    total = np.zeros(3)
    for logits_TE, length in zip(np.asarray(logits_BTE, np.float64), LENGTHS):
        scores_TE = softmax(logits_TE[:length])
        total += alphas * balance_losses(scores_TE, [choose(row_E, MOE) for row_E in scores_TE], MOE)
    return total


def check(actual):
    assert_close(actual / ALPHAS, oracle(inputs()[0]) / ALPHAS, 1e-6, "balance losses")


def test_match_the_oracle_per_sequence():
    """Acceptance case 5: one pooled over the batch, one counting padding, or one silently zero, fails the check."""
    logits_BTE, real_BT = inputs()
    check(np.asarray(losses(logits_BTE, real_BT)))
    pooled = losses(logits_BTE[real_BT][None], jnp.ones((1, sum(LENGTHS)), bool)) * 3
    padded = losses(logits_BTE, jnp.ones_like(real_BT))
    for i in range(3):
        silent = np.asarray(losses(logits_BTE, real_BT)) * (np.arange(3) != i)
        for defect in (pooled, padded, silent):
            with pytest.raises(AssertionError, match="balance losses"):
                check(np.asarray(defect))


def test_oracle_knows_perfect_and_worst_balance():
    """f_i = 1 for all i gives sum P = 1; all tokens on the same K experts with all their probability gives N / K."""
    even = dataclasses.replace(MOE, experts_per_token=1, groups_kept=1)
    np.testing.assert_allclose(balance_losses(np.full((8, 8), 1 / 8), [[e] for e in range(8)], even), 1)
    np.testing.assert_allclose(balance_losses(np.eye(8)[[5] * 4], [[5]] * 4, even), [8, 4, 4])


def test_gradient_matches_finite_differences():
    """Through the mean affinities only: the counts are constants."""
    logits_BTE, real_BT = inputs()
    gradient = jax.jit(jax.jacrev(lambda z: losses(z, real_BT)))(logits_BTE)
    for i in range(3):
        for seed in range(3):
            direction = np.random.default_rng(seed).normal(size=logits_BTE.shape)
            expected = slope(lambda z: oracle(z)[i], logits_BTE, direction, 1e-6)  # noqa: B023
            size = np.linalg.norm(gradient[i]) * np.linalg.norm(direction)
            assert size > 0
            assert abs((np.asarray(gradient[i]) * direction).sum() - expected) <= 1e-4 * size
    assert (np.asarray(gradient)[:, ~np.asarray(real_BT)] == 0).all()


@pytest.mark.parametrize("off", ["expert", "device", "communication"])
def test_none_switches_one_loss_off_and_no_other(off):
    config = dataclasses.replace(MOE, balance=dataclasses.replace(MOE.balance, **{off: None}))
    expected = np.asarray(losses(*inputs())) * [name != off for name in ("expert", "device", "communication")]
    np.testing.assert_array_equal(losses(*inputs(), config), expected)


def test_a_missing_coefficient_is_an_error():
    """Acceptance case 5: no coefficient has a default, and 0 is refused: None is the written choice."""
    with pytest.raises(TypeError, match="communication"):
        BalanceConfig(expert=0.003, device=0.05)
    with pytest.raises(ValueError, match=r"BalanceConfig.device=0"):
        BalanceConfig(expert=0.003, device=0.0, communication=0.02)


def test_dropping_does_not_hide_imbalance():
    """The losses see the router's choices, not what was left of them."""
    config = dataclasses.replace(MOE, dropping=DroppingConfig(capacity_factor=0.25))
    routing = ROUTE(*inputs(), config, training=True)
    assert float(routing.stats.dropped) > 0
    np.testing.assert_array_equal(routing.stats.balance_3, losses(*inputs()))
