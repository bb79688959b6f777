"""The whole transformer against the oracle, and its invariants: packed, scanned, recomputed, causal, end-of-text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from small import GQA, MODEL, YARN, change, made, packed

from dsv2_jax.config import DroppingConfig
from dsv2_jax.model.transformer import Transformer
from oracles import transformer as oracle
from oracles.compare import assert_close, slope, worst
from oracles.weights import transformer as weights

CONFIGS = {
    "v2": MODEL,
    "lite yarn": change(MODEL, attention__q_latent=None, attention__yarn=YARN, moe__normalize_gates=True),
    "dense gqa": change(MODEL, attention=GQA, moe=None, dense_layers=3),
    "gqa moe": change(MODEL, attention=GQA, dense_layers=0),
}
SEGMENTS, POSITIONS = packed(6, 8, total=16)
EOS = 49  # also what fills the padding: PAD is EOS
FEATURES = jax.jit(lambda model, *inputs, **kwargs: model.features(*inputs, **kwargs), static_argnames="training")


@functools.cache
def model(name):
    return made(lambda key: Transformer(CONFIGS[name], key))


def tokens(seed=0):
    """Two documents that end in EOS, then padding that is EOS too."""
    row = np.random.default_rng(seed).integers(0, 49, 16)
    row[[5, 13, 14, 15]] = EOS
    return jnp.asarray(row[None], jnp.int32)


def run(model, tokens_BT, segments_BT=SEGMENTS, positions_BT=POSITIONS):
    return model.logits(FEATURES(model, tokens_BT, segments_BT, positions_BT)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_the_oracle(name):
    out = run(model(name), tokens())
    assert out.dtype == jnp.float32
    expected = oracle.logits(weights(model(name).unstacked()), CONFIGS[name], tokens()[0], SEGMENTS[0], POSITIONS[0])
    assert_close(out[0, :14], expected[:14], 3e-5)


@pytest.mark.parametrize("op", ["flash_attention", "latent_attention", "grouped_matmul"])
def test_a_kernel_named_in_the_config_runs_or_raises(op):
    named = change(MODEL, **{f"compute__{op}": "tpu"})
    abstract = jax.eval_shape(functools.partial(Transformer, named), jax.random.key(0))

    def run(model):
        return model.decode(tokens()[:, :1], model.init_cache(1, 16)) if "latent" in op else model.features(tokens())

    with pytest.raises(ValueError, match=f"{op}: implementation 'tpu' cannot run: a TPU kernel, not for cpu"):
        jax.eval_shape(run, abstract)


def test_statistics_match_the_oracle():
    _, stats = FEATURES(model("v2"), tokens(), SEGMENTS, POSITIONS)
    _, balance = oracle.features(weights(model("v2").unstacked()), MODEL, tokens()[0], SEGMENTS[0], POSITIONS[0])
    alphas = [MODEL.moe.balance.expert, MODEL.moe.balance.device, MODEL.moe.balance.communication]
    assert_close(stats.balance_3, balance * alphas, 3e-5)
    assert stats.load_E.shape == (2, 8)


@pytest.mark.parametrize("name", quick(["v2", "gqa moe"], "v2"))
def test_gradient_matches_finite_differences(name):
    weight_TV = np.random.default_rng(1).normal(size=(16, 50))
    weight_TV[14:] = 0
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(run(model, tokens())[0] * weight_TV)))(model(name))
    gradient, at = weights(gradient.unstacked()), weights(model(name).unstacked())

    def f(w):
        return (oracle.logits(w, CONFIGS[name], tokens()[0], SEGMENTS[0], POSITIONS[0]) * weight_TV).sum()

    rng = np.random.default_rng(2)
    for part in ("embed", "norm", "unembed", "blocks"):
        direction = {key: jax.tree.map(lambda x: rng.normal(size=x.shape) * (key == part), at[key]) for key in at}  # noqa: B023
        leaves = list(zip(jax.tree.leaves(gradient[part]), jax.tree.leaves(direction[part])))
        size = np.sqrt(sum((g**2).sum() for g, _ in leaves) * sum((d**2).sum() for _, d in leaves))
        assert abs(sum((g * d).sum() for g, d in leaves) - slope(f, at, direction, 1e-6)) <= 1e-4 * size, part


@pytest.mark.parametrize("name", CONFIGS)
def test_causal(name):
    """A later token changes no earlier logit (to rounding: the experts' rows move), nor is there a gradient."""
    one, places = jnp.ones((1, 16), jnp.int32), jnp.arange(16)[None]
    first = run(model(name), tokens(), one, places)
    second = run(model(name), tokens().at[:, 9:].set(7), one, places)
    assert worst(second[:, :9], first[:, :9]) < 1e-6
    assert worst(second[:, 9:], first[:, 9:]) > 1e-2


def packed_error(name, segments_BT, positions_BT):
    together = run(model(name), tokens(), segments_BT, positions_BT)[0]
    errors = []
    for rows in (slice(0, 6), slice(6, 14)):
        length = rows.stop - rows.start
        row = jnp.zeros_like(tokens()).at[:, :length].set(tokens()[:, rows])
        alone = run(model(name), row, *packed(length, total=16))[0, :length]
        errors.append(worst(together[rows], alone))
    return max(errors)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_is_separate(name):
    """Acceptance case 10: each document's logits as if alone; attending across the boundary fails the same check."""
    assert packed_error(name, SEGMENTS, POSITIONS) < 1e-5
    assert packed_error(name, jnp.minimum(SEGMENTS, 1), POSITIONS) > 1e-2


def test_padding_and_end_of_text_are_told_by_segments():
    """Acceptance case 7: PAD is EOS. A document's own EOS is routed; padding is not, whatever token fills it."""
    _, stats = FEATURES(model("v2"), tokens(), SEGMENTS, POSITIONS)
    assert list(stats.assignments) == [14 * 3] * 2
    np.testing.assert_allclose(stats.load_E.sum(1), 14 * 3)
    by_token = (tokens() != EOS).astype(jnp.int32) * SEGMENTS  # the defect: masks from the token
    assert list(FEATURES(model("v2"), tokens(), by_token, POSITIONS)[1].assignments) != [14 * 3] * 2
    other, others = FEATURES(model("v2"), tokens().at[:, 14:].set(3), SEGMENTS, POSITIONS)
    np.testing.assert_array_equal(others.load_E, stats.load_E)
    assert worst(other[:, :14], FEATURES(model("v2"), tokens(), SEGMENTS, POSITIONS)[0][:, :14]) < 1e-6


@pytest.mark.parametrize("name", quick(["v2", "gqa moe"], "v2"))
def test_scanned_is_unstacked(name):
    loose = model(name).unstacked()
    assert not loose.stacked
    assert worst(run(loose, tokens()), run(model(name), tokens())) < 1e-5
    for a, b in zip(*(jax.tree.leaves(FEATURES(m, tokens(), SEGMENTS)[1]) for m in (loose, model(name)))):
        assert worst(a, b) < 1e-5


@pytest.mark.parametrize("policy", quick(["dots", "full"], "full"))
def test_recomputing_changes_nothing(policy):
    config = change(MODEL, compute__remat=policy)
    recomputed = made(lambda key: Transformer(config, key))

    def gradient(model):
        return jax.jit(jax.grad(lambda model: jnp.sum(run(model, tokens())[:, :14] ** 2)))(model)

    for a, b in zip(jax.tree.leaves(gradient(recomputed)), jax.tree.leaves(gradient(model("v2")))):
        assert worst(a, b) < 1e-4


def test_dropping_only_in_training_and_never_of_the_protected():
    """Acceptance case 16, through the model: counted per layer; nothing outside training."""
    config = change(MODEL, moe__dropping=DroppingConfig(capacity_factor=0.5))
    dropping = made(lambda key: Transformer(config, key))
    none = jnp.zeros(1, bool)
    trained, stats = FEATURES(dropping, tokens(), SEGMENTS, POSITIONS, training=True, protected_B=none)
    assert (stats.dropped > 0).all()
    np.testing.assert_allclose(stats.load_E.sum(1) + stats.dropped, stats.assignments)
    for kwargs in ({}, {"training": True, "protected_B": ~none}):
        out, stats = FEATURES(dropping, tokens(), SEGMENTS, POSITIONS, **kwargs)
        assert (stats.dropped == 0).all()
        assert_close(out, FEATURES(model("v2"), tokens(), SEGMENTS, POSITIONS)[0])
        assert worst(out[:, :14], trained[:, :14]) > 1e-2


def test_bfloat16_stays_near_float32():
    """With the same routing decisions only rounding differs: compared on the mean, routers may flip near ties."""
    rough = run(made(lambda key: Transformer(change(MODEL, compute__dtype="bfloat16"), key)), tokens())
    assert rough.dtype == jnp.float32
    exact = run(model("v2"), tokens())
    assert float(jnp.abs(rough - exact)[:, :14].mean() / jnp.abs(exact)[:, :14].mean()) < 0.1


def test_abstract_shapes_need_no_memory():
    abstract = jax.eval_shape(functools.partial(Transformer, MODEL), jax.random.key(0))
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(model("v2"))):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (b.shape, jnp.float32)
