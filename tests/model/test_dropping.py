"""Device-level token dropping against the oracle (paper.md, section 2; acceptance case 16)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MOE, normal

from dsv2_jax.config import DroppingConfig
from dsv2_jax.model import router
from oracles.layers import softmax
from oracles.routing import keep
from oracles.routing import route as oracle_route

ROUTE = jax.jit(router.route, static_argnums=2, static_argnames="training")
SOFTMAX = jax.jit(jax.nn.softmax)
LENGTHS = (24, 13, 5, 0)
REAL_BT = jnp.arange(24) < jnp.array(LENGTHS)[:, None]


def config(factor):
    return dataclasses.replace(MOE, dropping=DroppingConfig(capacity_factor=factor))


def kept_by(routing):
    return np.asarray(routing.expert_BTK) < MOE.routed_experts


def check(logits_BTE, routing, factor, protected):
    dropped = 0
    for b, length in enumerate(LENGTHS):
        scores_TE = softmax(np.asarray(logits_BTE[b][:length], np.float64))
        chosen_TK, gate_TK = oracle_route(scores_TE, MOE)
        kept_TK = keep(scores_TE, chosen_TK, MOE, factor, protected[b])
        dropped += (~kept_TK).sum()
        np.testing.assert_array_equal(kept_by(routing)[b, :length], kept_TK)
        np.testing.assert_array_equal(np.asarray(routing.expert_BTK)[b, :length], np.where(kept_TK, chosen_TK, 8))
        np.testing.assert_allclose(routing.gate_BTK[b, :length], gate_TK * kept_TK, rtol=1e-5)
        assert not kept_by(routing)[b, length:].any()
    assert float(routing.stats.dropped) == dropped
    assert float(routing.stats.assignments) == 3 * sum(LENGTHS)
    assert float(routing.stats.load_E.sum()) == 3 * sum(LENGTHS) - dropped
    return dropped


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("protected", [(False,) * 4, (False, True, False, False)], ids=str)
def test_matches_the_oracle(factor, protected):
    """Acceptance case 16: exactly those beyond ceil(factor T K / D) go, T the row's real tokens; all are counted."""
    logits_BTE = 2 * normal(0, 4, 24, 8) + jnp.arange(8) / 4  # later groups are preferred: loads differ
    routing = ROUTE(logits_BTE, REAL_BT, config(factor), training=True, protected_B=jnp.array(protected))
    dropped = check(logits_BTE, routing, factor, protected)
    assert dropped == 0 if factor == 4.0 else dropped > 0 or factor > 1


def test_the_check_sees_other_budgets():
    """Acceptance case 16: a budget from the padded length, or one less, or the wrong order, fails the check."""
    logits_BTE = 2 * normal(0, 4, 24, 8) + jnp.arange(8) / 4
    none = (False,) * 4
    padded = router.dropped(*_chosen(logits_BTE), jnp.ones_like(REAL_BT), None, config(0.5))
    assert not np.array_equal(
        padded & REAL_BT[..., None],
        ~kept_by(ROUTE(logits_BTE, REAL_BT, config(0.5), training=True)) & np.asarray(REAL_BT)[..., None],
    )
    for wrong in (0.4, 0.6):
        routing = ROUTE(logits_BTE, REAL_BT, config(wrong), training=True)
        with pytest.raises(AssertionError):
            check(logits_BTE, routing, 0.5, none)
    reversed_order = ROUTE(-logits_BTE, REAL_BT, config(0.5), training=True)
    with pytest.raises(AssertionError):
        check(logits_BTE, reversed_order, 0.5, none)


def _chosen(logits_BTE):
    return router.choose(jax.nn.softmax(logits_BTE), MOE)


@pytest.mark.parametrize(("factor", "tokens", "budget"), [(1.2, 50, 45), (1.2, 60, 54), (1.6, 50, 60), (1.7, 80, 102)])
def test_the_budget_is_exact_for_decimal_factors(factor, tokens, budget):
    """All choices are in one group. In float32 some products come out a little larger; which, the compiler decides."""
    moe = dataclasses.replace(MOE, routed_experts=64, experts_per_token=6, groups=8, groups_kept=1)
    moe = dataclasses.replace(moe, dropping=DroppingConfig(capacity_factor=factor))
    logits_BTE = jnp.where(jnp.arange(64) < 8, 9.0, 0.0) + normal(3, 1, 80, 64) / 4
    real_BT = jnp.arange(80)[None] < tokens
    routing = ROUTE(logits_BTE, real_BT, moe, training=True)
    kept_TK = np.asarray(routing.expert_BTK)[0, :tokens] < 64
    assert kept_TK.sum() == budget
    scores_TE = np.asarray(SOFTMAX(logits_BTE))[0, :tokens]
    np.testing.assert_array_equal(kept_TK, keep(scores_TE, oracle_route(scores_TE, moe)[0], moe, factor))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1.0]))
def test_ties_drop_the_later_token(seed, factor):
    """Equal affinities everywhere: the choice of what goes is still exactly the oracle's."""
    logits_BTE = jnp.asarray(np.random.default_rng(seed).integers(0, 3, (4, 24, 8)) * 2, jnp.float32)
    routing = ROUTE(logits_BTE, REAL_BT, config(factor), training=True)
    # the oracle is given the float32 affinities, so that rounding breaks no tie
    scores_BTE = np.asarray(SOFTMAX(logits_BTE))
    for b, length in enumerate(LENGTHS):
        scores_TE = scores_BTE[b, :length]
        chosen_TK, _ = oracle_route(scores_TE, MOE)
        np.testing.assert_array_equal(kept_by(routing)[b, :length], keep(scores_TE, chosen_TK, MOE, factor))


def test_nothing_is_dropped_outside_training():
    """Acceptance case 16: evaluation and decoding never drop, whatever the capacity."""
    logits_BTE = normal(1, 4, 24, 8)
    routing = ROUTE(logits_BTE, REAL_BT, config(0.01))
    assert float(routing.stats.dropped) == 0
    np.testing.assert_array_equal(kept_by(routing).all(-1), REAL_BT)
    assert float(ROUTE(logits_BTE, REAL_BT, config(0.01), training=True).stats.dropped) > 0


def test_off_by_default():
    assert MOE.dropping is None
    assert float(ROUTE(normal(1, 4, 24, 8), REAL_BT, MOE, training=True).stats.dropped) == 0


def test_a_sequence_is_not_touched_by_the_others():
    """Budgets are per sequence: other rows, their protection and their order change nothing of a row."""
    logits_BTE = 2 * normal(2, 4, 24, 8)
    first = kept_by(ROUTE(logits_BTE, REAL_BT, config(0.5), training=True))
    protected_B = jnp.array([False, True, True, True])
    second = kept_by(ROUTE(logits_BTE.at[1:].set(9.0), REAL_BT, config(0.5), training=True, protected_B=protected_B))
    np.testing.assert_array_equal(first[0], second[0])
    third = kept_by(ROUTE(logits_BTE[::-1], REAL_BT[::-1], config(0.5), training=True))
    np.testing.assert_array_equal(first, third[::-1])
