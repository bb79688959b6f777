import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from dsv2_jax import sharding
from dsv2_jax.config import ConfigError
from dsv2_jax.inference import sampling as ours
from dsv2_jax.inference.sampling import GREEDY, Sampling
from oracles import sampling as oracle

V = 11
LOGITS = st.lists(st.sampled_from([-3.0, -0.5, -0.0, 0.0, 0.5, 2.0, 2.0000002]), min_size=V, max_size=V)  # mostly ties
SLACK = 1e-5  # of the mass: what float32 sums may decide either way

CHOICES = [Sampling(t, k, p) for t, k, p in [(1.0, None, 0.7), (0.3, None, 0.5), (2.5, 4, 0.9), (1.0, 8, 0.001)]]

sample = jax.jit(ours.sample, static_argnames="sampling")
support = jax.jit(ours.support, static_argnames="sampling")
log_probs = jax.jit(ours.log_probs, static_argnames="sampling")
row_keys = jax.jit(ours.row_keys)


def kept(logits, **settings) -> set[int]:
    return set(np.flatnonzero(support(jnp.array([logits], jnp.float32), Sampling(**settings))[0]).tolist())


@given(LOGITS, st.sampled_from([1, 2, 7, V, V + 2]))
def test_top_k_keeps_exactly_the_k_best_and_the_lowest_of_equals(logits, k):
    assert kept(logits, top_k=k) == oracle.support(np.float32(logits), 1.0, k)


@given(LOGITS, st.sampled_from(CHOICES))
def test_top_p_keeps_the_shortest_prefix_that_holds_the_mass(logits, choice):
    found = kept(logits, **vars(choice))
    least, most = (
        oracle.support(np.float32(logits), choice.temperature, choice.top_k, choice.top_p + slack)
        for slack in (-SLACK, SLACK)
    )
    assert least <= found <= most
    assert len(found) >= 1


@pytest.mark.parametrize(("p", "tokens"), [(1e-6, 1), (0.125, 1), (0.126, 2), (0.5, 4), (0.51, 5), (0.99, 8), (1.0, 8)])
def test_top_p_among_equals_keeps_the_lowest(p, tokens):
    assert kept([7.0] * 8, top_p=p) == set(range(tokens))


def test_top_p_is_a_share_of_what_top_k_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(logits, top_p=0.5) == {0, 1}
    assert kept(logits, top_k=2, top_p=0.5) == {0}


def test_logits_that_differ_by_less_than_a_temperature_can_show_are_still_ranked():
    assert kept([1e-9, 100.0, 2e-9], top_k=2, temperature=50.0) == {1, 2}


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.8}, {"temperature": 2.0, "top_k": 12, "top_p": 0.9}],
    ids=str,
)
def test_draws_follow_the_distribution(settings):
    """Pearson's chi-square over 40,000 draws; the limit is passed by chance once in a million."""
    draws, sampling = 40_000, Sampling(**settings)
    logits_V = np.random.default_rng(1).normal(size=16).astype(np.float32)
    logits_BV = jnp.broadcast_to(logits_V, (draws, 16))
    tokens_B = sample(logits_BV, sampling, row_keys(np.arange(draws)))
    counts_V = np.bincount(tokens_B, minlength=16)
    expected_V = draws * oracle.probabilities(logits_V, sampling.temperature, sampling.top_k, sampling.top_p)
    possible = expected_V > 0
    assert counts_V[~possible].sum() == 0
    freedom = possible.sum() - 1
    statistic = ((counts_V - expected_V)[possible] ** 2 / expected_V[possible]).sum()
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4.75 * np.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty


@pytest.mark.parametrize("shape", ["tensor=4", "data=2,tensor=2", "data=4"])
def test_of_equals_on_several_devices_the_lowest_is_drawn(shape):
    logits_BV = np.full((4, 12), -np.inf, np.float32)
    logits_BV[0, [4, 11]], logits_BV[1, [2, 3, 9]], logits_BV[3] = -2.5, 7.0, -1.0
    logits_BV[3, 10] = -0.5
    mesh = sharding.make_mesh(shape, jax.devices()[:4])
    with sharding.use(mesh):
        drawn_B = jax.jit(lambda x: sample(x, GREEDY))(jnp.asarray(logits_BV))
    assert drawn_B.tolist() == [4, 2, 0, 10]


def test_greedy_takes_the_lowest_of_the_best_and_no_random_number():
    logits_BV = jnp.array([[0.0, 3.0, 1.0, 3.0], [-0.0, 0.0, -1.0, -jnp.inf]])
    assert sample(logits_BV, GREEDY).tolist() == [1, 0]
    program = str(jax.make_jaxpr(lambda x: sample(x, GREEDY))(logits_BV))
    assert "sort" not in program
    assert "random" not in program


def test_a_row_draws_the_same_in_every_batch():
    logits_BV = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32)
    for sampling in (Sampling(), Sampling(top_k=5), Sampling(top_p=0.9)):
        together = sample(logits_BV, sampling, row_keys(np.arange(16))).tolist()
        alone = [sample(logits_BV[i : i + 1], sampling, row_keys(np.array([i])))[0] for i in range(16)]
        assert together == alone
        assert together != sample(logits_BV, sampling, row_keys(np.arange(16, 32))).tolist()


def test_the_coldest_temperature_and_impossible_tokens():
    logits_BV = jnp.array([[-1e4, 5e3, 5e3 - 1, -jnp.inf]] * 200)
    assert set(sample(logits_BV, Sampling(1e-6), row_keys(np.arange(200))).tolist()) == {1}
    assert 3 not in sample(logits_BV * 1e-4, Sampling(100.0), row_keys(np.arange(200))).tolist()
    assert kept([-1e4, 5e3, -np.inf], top_p=0.999, temperature=1e-6) == {1}


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_log_probs_are_of_the_unrestricted_distribution_at_the_temperature(temperature):
    logits_BV = 30 * np.random.default_rng(0).normal(size=(20, 100)).astype(np.float32)
    tokens_B = np.arange(20) * 5
    found_B = log_probs(jnp.array(logits_BV), tokens_B, Sampling(temperature, top_k=2, top_p=0.5))
    scaled_BV = logits_BV.astype(np.float64) / temperature
    total_B = np.log(np.exp(scaled_BV - scaled_BV.max(1, keepdims=True)).sum(1)) + scaled_BV.max(1)
    expected_B = scaled_BV[np.arange(20), tokens_B] - total_B
    np.testing.assert_allclose(found_B, expected_B, rtol=2e-6, atol=2e-6)
    assert found_B.dtype == jnp.float32


def test_log_probs_when_greedy_are_those_of_the_model():
    logits_BV = jnp.array([[0.0, 1.0, 2.0]])
    expected = float(jax.nn.log_softmax(logits_BV[0])[2])
    assert float(log_probs(logits_BV, jnp.array([2]), GREEDY)[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        Sampling(**settings)
