import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import small_training
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dsv2_jax.checkpoint import to_dict
from dsv2_jax.config import BatchRampConfig, ConfigError, OptimizerConfig, TrainConfig
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.train.optimizer import adamw, apply_adamw, batch_schedule, decay_mask, learning_rate, total_sequences
from oracles import optimizer as oracle


def settings(**changes) -> TrainConfig:
    base = TrainConfig(steps=100, sequence_length=8, batch_size=10, optimizer=OptimizerConfig(1.0, warmup_steps=4))
    return dataclasses.replace(base, **changes)


def test_learning_rate_by_hand():
    rate = learning_rate(settings())  # 1000 sequences: warmup over 40, decays after 600 and 900
    at = {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 59: 1.0, 60: 0.316, 89: 0.316, 90: 0.316**2, 99: 0.316**2}
    for step, expected in at.items():
        assert float(rate(jnp.int32(10 * step), 10)) == pytest.approx(expected, rel=1e-6), step


def test_no_warmup_and_no_decay():
    rate = learning_rate(settings(optimizer=OptimizerConfig(0.5, warmup_steps=0, decay_at=())))
    assert [float(rate(jnp.int32(10 * step), 10)) for step in (0, 50, 99)] == [0.5, 0.5, 0.5]


def test_batch_ramp_by_hand():
    ramp = BatchRampConfig(start=4, sequences=48, stages=3)  # stages of 16 sequences: sizes 4, 6, 8, then 10
    schedule = batch_schedule(settings(batch_ramp=ramp, microbatch_size=2))
    assert [schedule.size_at(step) for step in range(12)] == [4] * 4 + [6] * 3 + [8] * 2 + [10] * 3
    assert [schedule.sequences_at(step) for step in (0, 4, 7, 9, 10)] == [0, 16, 34, 50, 60]


def test_decay_counts_sequences_not_steps():
    config = settings(batch_ramp=BatchRampConfig(start=2, sequences=400, stages=1), microbatch_size=2)
    schedule, rate = batch_schedule(config), learning_rate(config)
    assert total_sequences(config) == 200  # all 100 steps at size 2
    rates = [float(rate(jnp.int32(schedule.sequences_at(step)), schedule.size_at(step))) for step in (59, 60)]
    assert rates == pytest.approx([1.0, 0.316], rel=1e-6)


def test_the_report_s_run_fits_an_int32():
    ramp = BatchRampConfig(start=2304, sequences=225_000_000_000 // 4096)
    config = settings(steps=216_000, sequence_length=4096, batch_size=9216, batch_ramp=ramp, microbatch_size=576)
    assert 1.9e9 < total_sequences(config) < 2**31
    rate = learning_rate(config)
    threshold = -(-total_sequences(config) * 6 // 10)
    assert float(rate(jnp.int32(threshold - 1), 9216)) == 1.0
    assert float(rate(jnp.int32(threshold), 9216)) == pytest.approx(0.316)
    with pytest.raises(ConfigError, match=r"TrainConfig\.steps"):
        total_sequences(dataclasses.replace(config, steps=300_000))


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 8), st.integers(1, 500), st.integers(1, 6))
def test_the_batch_schedule_is_rising_whole_and_adds_up(micro, start, more, sequences, stages):
    ramp = BatchRampConfig(start=micro * start, sequences=sequences, stages=stages)
    config = settings(batch_size=micro * (start + more), microbatch_size=micro, batch_ramp=ramp)
    schedule = batch_schedule(config)
    sizes = [schedule.size_at(step) for step in range(700)]
    assert sizes == sorted(sizes)
    assert all(size % micro == 0 and size > 0 for size in sizes)
    assert [schedule.sequences_at(step) for step in range(700)] == list(np.cumsum([0, *sizes[:-1]]))
    reached = next(step for step in range(700) if schedule.sequences_at(step) >= sequences)
    assert schedule.size_at(reached) == config.batch_size


@pytest.mark.parametrize("model", [small.MODEL, small_training.DENSE], ids=["moe", "dense"])
def test_exactly_the_norm_scales_do_not_decay(model):
    abstract = jax.eval_shape(functools.partial(Transformer, model), jax.random.key(0))
    names = {"/".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path): value
             for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(abstract))}  # fmt: skip
    undecayed = {name for name, decays in names.items() if not decays}
    assert undecayed == {name for name in names if "norm" in name}
    decayed = "\n".join(names.keys() - undecayed)
    assert "unembed" in decayed
    if model.moe:
        assert "moe_blocks/ffn_norm/scale/value" in undecayed  # of two axes, layers and width
        for part in ("centroids", "ffn/gate", "shared"):
            assert part in decayed


def noise(tree, seed, std):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, std, leaf.shape), leaf.dtype), tree)


def stepped(config):
    """`apply_adamw`, with the norm that it is given in a step."""

    def step(gradients, rate, finite, model, moments):
        norm = optax.tree.norm(gradients)
        return apply_adamw(config, gradients, norm, rate, finite, model, moments)

    return jax.jit(step)


def test_updates_equal_the_oracle():
    config = OptimizerConfig(peak_lr=1.0)
    model = small.made(lambda key: Transformer(small_training.DENSE, key))
    moments, update, lr = adamw(config).init(model), stepped(config), 0.01
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)[1:]} == {jnp.dtype("float32")}
    flat = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(model)]
    m = v = [np.zeros_like(leaf) for leaf in flat]
    for step in (1, 2, 3):
        gradient = noise(model, step, 0.1 if step > 1 else 1e-3)
        model, moments = update(gradient, lr, True, model, moments)
        flat, m, v = oracle.adamw(flat, jax.tree.leaves(gradient), m, v, step, lr)
        for name, actual, desired in zip(to_dict(model), jax.tree.leaves(model), flat, strict=False):
            np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=2e-6, err_msg=f"{name}, step {step}")


@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_a_step_is_that_of_optax(clip_norm):
    config = OptimizerConfig(peak_lr=1.0, clip_norm=clip_norm, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3)
    model, optimizer = small.made(lambda key: Transformer(small_training.DENSE, key)), adamw(config)
    found = expected = (model, optimizer.init(model))
    step, update = stepped(config), jax.jit(optimizer.update)
    for seed, size in enumerate((1e-3, 0.1)):  # shorter than the limit, longer
        gradient = noise(model, seed, size)
        found = step(gradient, 0.01, True, *found)
        updates, moments = update(gradient, *reversed(expected))
        expected = jax.tree.map(lambda p, u: p - 0.01 * u, expected[0], updates), moments
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for actual, desired in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), gradient)
    for actual, before in zip(*map(jax.tree.leaves, (step(gradient, 0.01, False, *found), found)), strict=True):
        np.testing.assert_array_equal(actual, before)


def test_on_cpus_no_moment_is_copied():
    """The new ones take the place of the old ones. What optax gives, kept where it is finite, copies them."""
    config, optimizer = OptimizerConfig(peak_lr=1.0), adamw(OptimizerConfig(peak_lr=1.0))
    model = nnx.Param(jax.ShapeDtypeStruct((384, 256), jnp.float32), axes=("embed", "mlp"))

    def kept_after(gradients, rate, finite, model, moments):
        updates, new = optimizer.update(gradients, moments, model)
        new = jax.tree.map(lambda p, u: p - rate * u, model, updates), new
        return jax.tree.map(functools.partial(jnp.where, finite), new, (model, moments))

    def copies(update):
        def step(x, model, moments):
            gradients = jax.grad(lambda model: jnp.sum(jnp.tanh(x @ model[...])))(model)
            return update(gradients, 0.01, jnp.isfinite(optax.tree.norm(gradients)), model, moments)

        arguments = jax.ShapeDtypeStruct((8, 384), jnp.float32), model, jax.eval_shape(optimizer.init, model)
        compiled = jax.jit(step, donate_argnums=(1, 2)).lower(*arguments).compile()
        return len(re.findall(r"= f32\[384,256\]\S* copy\(", compiled.as_text()))

    assert copies(stepped(config)) == 0 < copies(kept_after)
