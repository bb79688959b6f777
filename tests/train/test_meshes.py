"""The same weights and batch on eight devices, cut in every way, give what one device gives."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import small_training
from quick import quick

from dsv2_jax import sharding
from dsv2_jax.config import DroppingConfig, MLAConfig
from dsv2_jax.model import parallel, router
from dsv2_jax.model.moe import MoE
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.train.loss import cross_entropy
from dsv2_jax.train.placing import Placing
from dsv2_jax.train.state import new_state
from dsv2_jax.train.step import make_train_step
from oracles.compare import assert_close

MESHES = ("data=8", "expert=8", "fsdp=8", "tensor=4,data=2", "expert=4,fsdp=2", "context=4,expert=2")
MLA = MLAConfig(heads=4, nope_dim=10, rope_dim=8, value_dim=6, kv_latent=16, q_latent=24)
MODEL = small.change(small.MODEL, dim=16, dense_width=24, vocab_size=48, attention=MLA, moe__expert_width=12)
DROPPING = small.change(MODEL, moe__dropping=DroppingConfig(capacity_factor=0.7, protected_share=0.5))
TIED = small.change(MODEL, moe__dropping=DroppingConfig(capacity_factor=0.6, protected_share=0.5))
GQA = small.change(MODEL, attention=dataclasses.replace(small.GQA, kv_heads=4, heads=8), moe=None, dense_layers=3)
ROWS, LENGTH = 8, 16
GAP = 1e-5  # between the scores of the last expert chosen and the next: choices must agree where it is larger


@functools.cache
def model_and_batch(config):
    model = small.made(lambda key: Transformer(config, key))
    if config is TIED:  # all affinities are equal
        model.moe_blocks.ffn.centroids[...] = jnp.zeros_like(model.moe_blocks.ffn.centroids[...])
    return model, small_training.batch(ROWS, 0, 48, LENGTH)


def evaluate(model, batch, dropping: bool):
    """(objective, (loss, MoE statistics, logits)) and its gradient, as `lm_loss` computes them, in one program."""

    def objective(model):
        protected_B = jnp.arange(ROWS) < 2 if dropping else None
        place = batch.tokens_BT, batch.segments_BT, batch.positions_BT
        h_BTD, stats = model.features(*place, training=True, protected_B=protected_B)
        nll = cross_entropy(h_BTD, model.unembed[...], batch.targets_BT, batch.weights_BT, 4)
        balance = 0.0 if stats is None else jnp.sum(stats.balance_3)
        return nll + balance, (nll, stats, model.logits(h_BTD))

    return jax.value_and_grad(objective, has_aux=True)(model)


def on_mesh(mesh, model, batch):
    """Model and batch where they belong, columns in the order of the mesh."""
    model = jax.device_put(model, sharding.tree_shardings(model, mesh))
    return model, Placing(mesh, batch_size=ROWS).put(batch)


@functools.cache
def alone(config):
    model, batch = model_and_batch(config)
    return jax.device_get(jax.jit(evaluate, static_argnums=2)(model, batch, config in (DROPPING, TIED)))


def results(config, text: str):
    mesh = sharding.make_mesh(text, jax.devices()[: math.prod(sharding.parse_mesh(text).sizes)])
    sharding.check_mesh(mesh, config, batch_size=ROWS, sequence_length=LENGTH)
    with sharding.use(mesh):
        placed = on_mesh(mesh, *model_and_batch(config))
        found = jax.jit(evaluate, static_argnums=2)(*placed, config in (DROPPING, TIED))
    (total, (nll, stats, logits)), gradient = jax.device_get(found)
    if stats is not None:  # rows that crossed between devices: the mesh's own matter
        stats = dataclasses.replace(stats, crossed=alone(config)[0][1][1].crossed)
    in_order = np.argsort(parallel.zigzag(LENGTH, mesh.shape["context"]))
    return (total, (nll, stats, logits[:, in_order])), gradient


def assert_equal_results(found, expected):
    paths = jax.tree_util.tree_leaves_with_path(expected)
    assert len(paths) == len(jax.tree.leaves(found))
    for (path, leaf), other in zip(paths, jax.tree.leaves(found), strict=True):
        assert_close(other, leaf, 2e-5, jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=pytest.mark.slow) for text in (*MESHES[:5], "data=1")] + [*MESHES[5:]]
)
def test_a_mesh_gives_the_numbers_of_one_device(text):
    """Logits, loss, every gradient, loads of all experts: so all choices, whose gaps are wide enough here."""
    assert_equal_results(results(MODEL, text), alone(MODEL))


def test_no_choice_of_an_expert_is_close():
    """What lets the test above ask for equal loads."""
    model, batch = model_and_batch(MODEL)
    gaps = []

    def route(logits_BTE, real_BT, config, **rest):
        scores = jax.nn.softmax(logits_BTE)
        wider = dataclasses.replace(config, experts_per_token=config.experts_per_token + 1)
        best, _ = router.choose(scores, wider)
        gaps.append(jnp.min(jnp.where(real_BT, best[..., -2] - best[..., -1], 1.0)))
        return original(logits_BTE, real_BT, config, **rest)

    original = router.route

    @jax.jit
    def smallest_gaps(model):
        model.features(batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        return gaps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "route", route)
        found = smallest_gaps(model.unstacked())
    assert len(found) == MODEL.moe_layers
    assert min(found) > GAP


@functools.cache
def many_tokens():
    """A MoE layer, inputs whose choices are often close, and in float64: the best experts and the gap to the next."""
    config = small.change(MODEL, moe__shared_experts=0)
    layer = MoE(config, jax.random.key(0))
    y_BTD = np.random.default_rng(0).normal(size=(ROWS, 128, config.dim)).astype(np.float32)
    score_BTE = y_BTD.astype(np.float64) @ np.asarray(layer.centroids[...], np.float64)
    score_BTE = np.exp(score_BTE) / np.exp(score_BTE).sum(-1, keepdims=True)
    return layer, y_BTD, score_BTE


def choices_that_differ(text: str, dtype=jnp.float32) -> int:
    """Tokens whose experts on a mesh are not those that `score_BTE` says, where those are not close."""
    layer, y_BTD, score_BTE = many_tokens()
    moe, original, chosen = layer.config, router.route, []

    def route(*arguments, **rest):
        chosen.append(original(*arguments, **rest))
        return chosen[-1]

    def choose(layer, y_BTD):
        layer(y_BTD.astype(dtype).astype(jnp.float32), jnp.ones(y_BTD.shape[:2], bool), training=True)
        return chosen[-1].expert_BTK

    mesh = sharding.make_mesh(text)
    with pytest.MonkeyPatch.context() as patch, sharding.use(mesh):
        patch.setattr(router, "route", route)
        where = jax.NamedSharding(mesh, sharding.activation_spec("batch", "sequence", None))
        placed = jax.device_put(layer, sharding.tree_shardings(layer, mesh)), jax.device_put(y_BTD, where)
        found_BTK = np.sort(jax.jit(choose)(*placed), axis=-1)
    with jax.enable_x64(True):
        wider = dataclasses.replace(moe, experts_per_token=moe.experts_per_token + 1)
        best, ids = map(np.asarray, router.choose(jnp.asarray(score_BTE), wider))
    clear_BT = best[..., -2] - best[..., -1] > GAP
    return np.sum(clear_BT & (found_BTK != np.sort(ids[..., :-1], axis=-1)).any(-1))


@pytest.mark.parametrize("text", quick(MESHES, *MESHES[-2:]))
def test_a_mesh_chooses_the_experts_that_exact_scores_choose(text):
    assert choices_that_differ(text) == 0


def test_rounded_scores_would_be_noticed():
    assert choices_that_differ(MESHES[-1], jnp.bfloat16) > 0


@pytest.mark.slow
@pytest.mark.parametrize("text", MESHES)
def test_a_mesh_drops_the_tokens_that_one_device_drops(text):
    found, expected = results(DROPPING, text), alone(DROPPING)
    assert np.sum(expected[0][1][1].dropped) > 0
    assert_equal_results(found, expected)


@pytest.mark.slow
def test_of_equal_affinities_the_later_tokens_drop_on_a_mesh_too():
    """Later in the sequence, whose columns `context` reorders."""
    found, expected = results(TIED, "context=4,expert=2"), alone(TIED)
    assert np.sum(expected[0][1][1].dropped) > 0
    assert_equal_results(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["context=2,data=2,tensor=2", "tensor=4,fsdp=2"])
def test_the_baseline_attention_on_a_mesh(text):
    assert_equal_results(results(GQA, text), alone(GQA))


@functools.cache
def losses(config, text: str | None, steps: int) -> list[float]:
    mesh = sharding.make_mesh(text) if text else None
    with sharding.use(mesh):
        state, step, placing = new_state(config, mesh), make_train_step(config, mesh), Placing(mesh, batch_size=ROWS)
        found = []
        for i in range(steps):
            batch = small_training.batch(ROWS, i % 5, 48, LENGTH)
            state, metrics = step(state, placing.put(jax.tree.map(lambda x: x[None], batch), microbatches=True))
            found.append(metrics.loss)
    return [float(loss) for loss in found]


def training(steps: int):
    model = small.change(MODEL, init_std=0.05, layers=2)
    return small_training.experiment(model, steps=steps, batch_size=ROWS, optimizer__warmup_steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("text", MESHES)
def test_training_stays_together_on_every_mesh(text):
    config = training(50)
    one, many = losses(config, None, 50), losses(config, text, 50)
    assert one[-1] < one[0] - 1
    np.testing.assert_allclose(many[:5], one[:5], rtol=2e-5)
    np.testing.assert_allclose(many, one, rtol=2e-3)


@pytest.mark.slow
def test_gradients_that_cross_in_bfloat16_are_as_good_as_those_of_one_device():
    """With bfloat16 compute, what a device has added up of a gradient travels as bfloat16 and is added in float32: the
    error is that of one device computing in bfloat16. Dense layers: no choice can flip."""
    dense = small.change(MODEL, moe=None, dense_layers=3)
    rounded = small.change(dense, compute__dtype="bfloat16")
    exact = jax.tree.leaves(alone(dense)[1])

    def error(gradient) -> float:
        apart = [np.sum((np.asarray(a) - b) ** 2) / np.sum(b**2) for a, b in zip(jax.tree.leaves(gradient), exact)]
        return float(np.sqrt(np.mean(apart)))

    one, many = error(alone(rounded)[1]), error(results(rounded, "fsdp=8")[1])
    assert 1e-4 < one < 0.2
    assert many < 1.1 * one
