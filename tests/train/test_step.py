import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import small_training
from quick import quick
from small_training import DENSE, MOE, batch, experiment

from dsv2_jax import sharding
from dsv2_jax.config import DroppingConfig
from dsv2_jax.train.loop import split
from dsv2_jax.train.loss import lm_loss
from dsv2_jax.train.placing import Placing
from dsv2_jax.train.state import abstract_state, new_state
from dsv2_jax.train.step import evaluate_batch, make_train_step
from oracles.compare import assert_close

DROPPING = small.change(MOE, moe__dropping=DroppingConfig(capacity_factor=0.5, protected_share=0.5))


@functools.cache
def _host_state(model):
    return jax.device_get(new_state(experiment(model)))


def fresh_state(model):
    """A state that a step may donate."""
    return jax.tree.map(jnp.array, _host_state(model))


def uneven(rows: int, seed: int = 0):
    """A batch whose loss weights differ by row and place, one row having none."""
    made = batch(rows, seed)
    weights = made.weights_BT * np.random.default_rng(seed).uniform(0, 2, made.weights_BT.shape) ** 3
    weights[1] = 0
    return dataclasses.replace(made, weights_BT=weights.astype(np.float32))


@pytest.fixture(scope="module")
def moe_run():
    """Three steps of the MoE model with a poisoned one in the middle: [(state before, on the host), metrics]."""
    config = experiment(MOE)
    state, step, seen = fresh_state(MOE), make_train_step(config), []
    for i in range(4):
        made = uneven(4, i)
        if i in (1, 2):
            made = dataclasses.replace(made, weights_BT=np.full_like(made.weights_BT, np.inf))
        before = jax.tree.map(np.array, state)
        state, metrics = step(state, split(made, None))
        seen.append((before, jax.device_get(metrics)))
    return seen, jax.device_get(state)


def test_state_is_created_as_its_abstract_form_says():
    config = experiment(DENSE)
    state, abstract = fresh_state(DENSE), abstract_state(config)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (state, abstract))
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.model))
    other = new_state(experiment(DENSE, seed=1))
    assert not np.array_equal(state.model.embed[...], other.model.embed[...])
    assert not np.array_equal(state.key, other.key)


def test_metrics_of_a_step_against_the_loss_and_the_counters(moe_run):
    seen, last = moe_run
    state, metrics = seen[0]
    made = uneven(4, 0)
    parts = lm_loss(state.model, made, training=True)
    nll = float(parts.nll_sum) / made.weights_BT.sum()
    assert float(metrics.nll) == pytest.approx(nll, rel=1e-5)
    assert metrics.balance_3 == pytest.approx(np.asarray(parts.moe.balance_3).sum(0) / 4, rel=1e-5)
    assert (metrics.balance_3 > 0).all()
    assert float(metrics.loss) == pytest.approx(nll + metrics.balance_3.sum(), rel=1e-5)
    counted = made.bytes_BT[made.weights_BT > 0].sum()
    assert float(metrics.bits_per_byte) == pytest.approx(float(parts.nll_sum) / math.log(2) / counted, rel=1e-5)
    assert float(metrics.tokens) == pytest.approx(made.weights_BT.sum())
    np.testing.assert_array_equal(metrics.moe.load_E, parts.moe.load_E)
    assert (last.step, last.sequences) == (4, 16)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(moe_run):
    seen, last = moe_run
    states = [state for state, _ in seen] + [last]
    for i in (1, 2):
        assert not np.isfinite(seen[i][1].loss)
        jax.tree.map(np.testing.assert_array_equal, states[i].model, states[i + 1].model)
        jax.tree.map(np.testing.assert_array_equal, states[i].moments, states[i + 1].moments)
    for i in (0, 3):
        assert np.isfinite(seen[i][1].loss)
        assert not np.array_equal(states[i].model.embed[...], states[i + 1].model.embed[...])
    assert [int(state.bad_steps) for state in states] == [0, 0, 1, 2, 0]
    assert [int(metrics.skipped) for _, metrics in seen] == [0, 1, 2, 2]
    assert [int(state.sequences) for state in states] == [0, 4, 8, 12, 16]


def test_the_state_is_donated():
    config = experiment(DENSE)
    state, step = fresh_state(DENSE), make_train_step(config)
    step(state, split(batch(4, 0), None))
    kept = [leaf.shape for leaf in jax.tree.leaves((state.model, state.moments)) if not leaf.is_deleted()]
    assert not kept


@pytest.mark.parametrize("size", quick([2, 1], 1))
def test_accumulation_does_not_change_the_step(size):
    results = {}
    for microbatch in (8, size):
        config = experiment(MOE, batch_size=8, microbatch_size=microbatch, optimizer__clip_norm=None)
        new, metrics = make_train_step(config)(fresh_state(MOE), split(uneven(8), microbatch))
        # The first moments are the gradients, to a factor; Adam's update would blow rounding up into whole steps.
        gradients = jax.tree.leaves(new.moments[1].mu)
        results[microbatch] = jax.device_get((gradients, metrics))
    moments, metrics = results[8]
    assert min(float(np.abs(leaf).max()) for leaf in moments) > 0
    other_moments, other = results[size]
    for a, b in zip(other_moments, moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * max(1.0, np.abs(b).max()))
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(metrics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_is_of_the_whole_batch_s_mean():
    config = experiment(DENSE, batch_size=4, microbatch_size=2, optimizer__clip_norm=None)
    state, made = fresh_state(DENSE), uneven(4)
    whole = jax.jit(jax.grad(lambda model: lm_loss(model, made, training=True).nll_sum / made.weights_BT.sum()))
    norm = float(optax.tree.norm(whole(state.model)))
    _, metrics = make_train_step(config)(state, split(made, 2))
    assert float(metrics.gradient_norm) == pytest.approx(norm, rel=1e-5)


def test_protected_sequences_change_with_the_step_and_evaluation_drops_nothing():
    config = experiment(DROPPING, optimizer__peak_lr=1e-9)  # the model stays, nearly
    state, step, dropped = fresh_state(DROPPING), make_train_step(config), []
    for _ in range(6):
        state, metrics = step(state, split(batch(4, 0), None))
        dropped.append(float(metrics.moe.dropped.sum()))
    assert len(set(dropped)) > 1
    assert max(dropped) > 0
    parts = evaluate_batch(state.model, batch(4, 0))
    assert float(parts.moe.dropped.sum()) == 0
    assert float(parts.weight) == batch(4, 0).weights_BT.sum()


def test_training_learns():
    config = experiment(DENSE, steps=60, optimizer__peak_lr=1e-2)
    state, step = fresh_state(DENSE), make_train_step(config)
    losses = []
    for i in range(60):
        state, metrics = step(state, split(small_training.batch(4, i), None))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.7 * losses[0]


def test_a_bfloat16_step_moves_float32_masters_by_less_than_bfloat16_could():
    model = small.change(DENSE, compute__dtype="bfloat16")
    config = experiment(model, optimizer__peak_lr=1e-6, optimizer__warmup_steps=0)
    made = split(batch(4, 0), None)
    new, metrics = make_train_step(config)(fresh_state(model), made)
    assert {leaf.dtype for leaf in jax.tree.leaves((new.model, new.moments[1].mu))} == {jnp.dtype("float32")}
    before = _host_state(model).model.dense_blocks[0].ffn.up[...]
    moved = np.abs(np.asarray(new.model.dense_blocks[0].ffn.up[...]) - before)
    large = np.abs(before) > 0.02
    assert (moved[large] > 0).all()
    assert (moved[large] < 2.0**-9 * np.abs(before[large])).all()  # half of bfloat16's spacing
    _, exact = make_train_step(experiment(DENSE))(fresh_state(DENSE), made)
    assert 0 < abs(float(metrics.nll) - float(exact.nll)) < 0.02 * float(exact.nll)  # it was computed in bfloat16


@pytest.mark.parametrize("model", quick([DENSE, DROPPING], DENSE), ids=["dense", "dropping"])
def test_copies_of_the_model_take_the_step_of_one_device(model):
    """Two microbatches on two devices: all that is added up over rows, and so every parameter."""
    made = split(uneven(8), 4)
    config = experiment(model, batch_size=8, microbatch_size=4)
    alone, expected = make_train_step(config)(fresh_state(model), made)
    mesh = sharding.make_mesh("data=2", jax.devices()[:2])
    with sharding.use(mesh):
        state = jax.device_put(fresh_state(model), sharding.tree_shardings(abstract_state(config), mesh))
        together, found = make_train_step(config, mesh)(state, Placing(mesh, 4).put(made, microbatches=True))
    if model.moe:
        assert 0 < float(expected.moe.dropped.sum()) == float(found.moe.dropped.sum())
    paths = jax.tree_util.tree_leaves_with_path((expected, alone.model))
    for (path, leaf), other in zip(paths, jax.tree.leaves((found, together.model)), strict=True):
        assert_close(other, leaf, 2e-5, jax.tree_util.keystr(path))
