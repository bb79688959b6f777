"""Routing against the oracle, and what must hold for any scores at all (acceptance cases 3, 4 and 17)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MOE, normal

from dsv2_jax import presets
from dsv2_jax.model import router
from oracles.compare import assert_close, slope
from oracles.layers import softmax
from oracles.routing import choose as oracle_choose
from oracles.routing import route as oracle_route

CONFIGS = {
    "grouped": MOE,
    "plain": dataclasses.replace(MOE, groups=1, groups_kept=1, experts_per_token=4),
    "all of all": dataclasses.replace(MOE, experts_per_token=8, groups_kept=4),
    "all of the kept": dataclasses.replace(MOE, experts_per_token=4, groups_kept=2),
    "one": dataclasses.replace(MOE, experts_per_token=1, groups_kept=1),
    "v2": presets.get("v2").moe,
}
ROUTE = jax.jit(router.route, static_argnums=2)
CHOOSE = jax.jit(router.choose, static_argnums=1)


def check_choice(scores_TE, expert_TK, config):
    """K distinct experts of the M groups with the best experts, best first, equal scores to the lower index."""
    for scores_E, expert_K in zip(np.asarray(scores_TE), np.asarray(expert_TK)):
        assert len(set(expert_K)) == config.experts_per_token
        assert len({e // config.experts_per_group for e in expert_K}) <= config.groups_kept
        assert list(expert_K) == oracle_choose(scores_E, config)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), zeros=st.floats(0, 1))
def test_any_scores_choose_as_the_oracle(name, seed, zeros):
    """Acceptance case 4: also where scores tie or have underflowed to 0."""
    config = CONFIGS[name]
    rng, shape = np.random.default_rng(seed), (3, config.routed_experts)
    scores_TE = np.where(rng.random(shape) < zeros, 0, rng.choice([1e-30, 0.1, 0.2, 0.5], shape)).astype(np.float32)
    chosen_TK, expert_TK = CHOOSE(scores_TE, config)
    check_choice(scores_TE, expert_TK, config)
    np.testing.assert_array_equal(chosen_TK, np.take_along_axis(np.asarray(scores_TE), np.asarray(expert_TK), 1))


@pytest.mark.parametrize("defect", ["masked scores are 0", "groups by their sum", "without groups"])
def test_the_check_of_case_4_sees_its_defects(defect):
    """Acceptance case 4: masking with 0 picks a masked expert once scores underflow; ranking groups by sum differs."""
    config = MOE
    scores_TE = jnp.array([[0.3, 0.3, 0.35, 0, 0, 0, 0, 0.05], [0, 0, 0, 0, 0.9, 0, 0.1, 0]], jnp.float32)
    grouped_TDE = scores_TE.reshape(-1, 4, 2)
    best_TD = grouped_TDE.sum(-1) if defect == "groups by their sum" else grouped_TDE.max(-1)
    _, kept_TM = jax.lax.top_k(best_TD, 1 if defect == "groups by their sum" else 2)
    kept_TD = (kept_TM[..., None] == jnp.arange(4)).any(-2) | (defect == "without groups")
    masked_TE = jnp.where(kept_TD[..., None], grouped_TDE, 0).reshape(scores_TE.shape)
    _, expert_TK = jax.lax.top_k(masked_TE, config.experts_per_token)
    check_choice(scores_TE, CHOOSE(scores_TE, config)[1], config)
    with pytest.raises(AssertionError):
        check_choice(scores_TE, expert_TK, config)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spread", [1, 30, 1000], ids=lambda s: f"spread {s}")
def test_logits_of_any_size_give_k_distinct_experts(name, spread):
    """Acceptance case 4: with logits 1000 apart all but one score underflow to 0 in float32."""
    config = CONFIGS[name]
    logits_BTE = spread * normal(0, 2, 50, config.routed_experts)
    routing = ROUTE(logits_BTE, jnp.ones((2, 50), bool), config)
    scores_BTE = jax.nn.softmax(logits_BTE)
    check_choice(scores_BTE.reshape(100, -1), routing.expert_BTK.reshape(100, -1), config)
    assert np.isfinite(routing.gate_BTK).all()


def check_gates(gates, config):
    logits_TE = np.random.default_rng(0).normal(size=(40, config.routed_experts))
    expert_TK, gate_TK = oracle_route(softmax(logits_TE), config)
    chosen_TK = jnp.asarray(np.take_along_axis(softmax(logits_TE), expert_TK, 1), jnp.float32)
    assert_close(gates(chosen_TK, config), gate_TK, 1e-6, "gates")


def test_gates_are_scaled_once_or_normalised():
    """Acceptance case 3: the scaling factor applies exactly where gates are not renormalised, once."""
    normalised = dataclasses.replace(MOE, normalize_gates=True)
    check_gates(router.gates, MOE)
    check_gates(router.gates, normalised)
    defects = [
        (MOE, lambda s, config: s),
        (MOE, lambda s, config: s * config.routed_scaling**2),
        (MOE, lambda s, config: s / s.sum(-1, keepdims=True) * config.routed_scaling),
        (normalised, lambda s, config: s / s.sum(-1, keepdims=True) * config.routed_scaling),
        (normalised, lambda s, config: s * config.routed_scaling),
    ]
    for config, defect in defects:
        with pytest.raises(AssertionError, match="gates"):
            check_gates(defect, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_route_matches_the_oracle(name):
    config = CONFIGS[name]
    logits_BTE = normal(1, 2, 30, config.routed_experts)
    routing = ROUTE(logits_BTE, jnp.ones((2, 30), bool), config)
    for b in range(2):
        expert_TK, gate_TK = oracle_route(softmax(logits_BTE[b]), config)
        np.testing.assert_array_equal(routing.expert_BTK[b], expert_TK)
        assert_close(routing.gate_BTK[b], gate_TK, 1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_of_the_gates_matches_finite_differences(normalize):
    config = dataclasses.replace(MOE, normalize_gates=normalize)
    logits_TE, weight_TK = normal(2, 20, 8), np.asarray(normal(3, 20, 3), np.float64)
    real_BT = jnp.ones((1, 20), bool)
    gradient = jax.grad(lambda z: jnp.sum(ROUTE(z[None], real_BT, config).gate_BTK[0] * weight_TK))(logits_TE)
    for seed in range(4):
        direction = np.random.default_rng(seed).normal(size=(20, 8))
        expected = slope(lambda z: (oracle_route(softmax(z), config)[1] * weight_TK).sum(), logits_TE, direction)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs((np.asarray(gradient) * direction).sum() - expected) <= 1e-5 * size


def test_padding_is_never_routed_or_counted():
    """Padding has expert E and gate 0, whatever its logits, and changes nothing of the other tokens' routing."""
    logits_BTE, real_BT = normal(4, 2, 12, 8), jnp.arange(12) < jnp.array([[7], [0]])
    routing = ROUTE(logits_BTE, real_BT, MOE)
    assert (np.asarray(routing.expert_BTK)[~np.asarray(real_BT)] == 8).all()
    assert (np.asarray(routing.gate_BTK)[~np.asarray(real_BT)] == 0).all()
    assert float(routing.stats.load_E.sum()) == float(routing.stats.assignments) == 7 * 3
    assert float(routing.stats.sequences) == 1
    assert float(routing.stats.dropped) == 0
    other = ROUTE(jnp.where(real_BT[..., None], logits_BTE, 50.0), real_BT, MOE)
    for a, b in zip(jax.tree.leaves(routing), jax.tree.leaves(other)):
        np.testing.assert_array_equal(a, b)


def test_statistics_count_what_was_chosen():
    logits_BTE = normal(5, 3, 20, 8)
    routing = ROUTE(logits_BTE, jnp.ones((3, 20), bool), MOE)
    expert_BTK = np.asarray(routing.expert_BTK)
    np.testing.assert_array_equal(routing.stats.load_E, np.bincount(expert_BTK.ravel(), minlength=8))
    assert float(routing.stats.sends) == sum(len(set(expert_K // 2)) for expert_K in expert_BTK.reshape(-1, 3))
    assert float(routing.stats.sends) <= 60 * MOE.groups_kept


def test_permuting_tokens_and_experts_permutes_the_choice():
    logits_BTE, real_BT = normal(6, 1, 16, 8), jnp.ones((1, 16), bool)
    tokens, groups = np.random.default_rng(0).permutation(16), np.array([2, 0, 3, 1])
    experts = (groups[:, None] * 2 + np.arange(2)).ravel()  # whole groups change places
    first = ROUTE(logits_BTE, real_BT, MOE)
    second = ROUTE(logits_BTE[:, tokens][:, :, experts], real_BT, MOE)
    np.testing.assert_array_equal(experts[np.asarray(second.expert_BTK)], np.asarray(first.expert_BTK)[:, tokens])


def test_decisions_are_float32_whatever_the_input():
    """Acceptance case 17: bfloat16 logits are widened first; scores that differ only in float32 keep their order."""
    logits_TE = jnp.zeros((1, 1, 8), jnp.float32).at[..., 3].set(1e-4).at[..., 6].set(2e-4)
    assert list(ROUTE(logits_TE, jnp.ones((1, 1), bool), MOE).expert_BTK[0, 0][:2]) == [6, 3]
    routing = ROUTE(normal(7, 1, 5, 8, dtype=jnp.bfloat16), jnp.ones((1, 5), bool), MOE)
    assert routing.gate_BTK.dtype == jnp.float32
    rounded = logits_TE.astype(jnp.bfloat16) + 1  # the defect: a router in bfloat16 sees ties
    assert list(ROUTE(rounded, jnp.ones((1, 1), bool), MOE).expert_BTK[0, 0][:2]) != [6, 3]
