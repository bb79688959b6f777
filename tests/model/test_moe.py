"""The DeepSeekMoE layer against the oracle, forward and backward; work and memory that do not grow with E."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from small import MODEL, change, made, normal

from dsv2_jax.config import DroppingConfig
from dsv2_jax.model import router
from dsv2_jax.model.moe import MoE
from oracles.compare import TOLERANCE, assert_close, slope, worst
from oracles.moe import moe as oracle
from oracles.weights import moe as weights

CONFIGS = {
    "grouped": MODEL,
    "plain": change(MODEL, moe__groups=1, moe__groups_kept=1, moe__routed_scaling=1.0),
    "normalised": change(MODEL, moe__normalize_gates=True),
    "no shared": change(MODEL, moe__shared_experts=0),
    "all experts": change(MODEL, moe__experts_per_token=8, moe__groups_kept=4),
    "dropping": change(MODEL, moe__dropping=DroppingConfig(capacity_factor=0.5)),
}
REAL = jnp.arange(15) < jnp.array([[15], [9], [1]])
PROTECTED = jnp.array([True, False, False])
RUN = jax.jit(lambda module, y, real, **kwargs: module(y, real, **kwargs), static_argnames="training")


@functools.cache
def module(name):
    return made(lambda key: MoE(CONFIGS[name], key))


def expected(w, config, y_BTD, dropping=None):
    results = []
    for b, protected in enumerate(np.asarray(PROTECTED)):
        y_TD = np.asarray(y_BTD[b], np.float64)
        results.append(oracle(w, config, y_TD, np.asarray(REAL[b]), dropping and dropping.capacity_factor, protected))
    return [np.array(part) for part in zip(*results)]


def error(name, dtype="float32"):
    """Of the output against the oracle; the statistics are asserted on the way."""
    moe, y_BTD = module(name), normal(0, 3, 15, 20, dtype=dtype)
    out_BTD, stats = RUN(moe, y_BTD, REAL, training=True, protected_B=PROTECTED)
    assert out_BTD.dtype == dtype
    out, balance, load, dropped = expected(weights(moe), moe.config, y_BTD, moe.config.dropping)
    np.testing.assert_array_equal(stats.load_E, load.sum(0))
    assert float(stats.dropped) == dropped.sum()
    assert (dropped.sum() > 0) == (name == "dropping")
    alphas = [moe.config.balance.expert, moe.config.balance.device, moe.config.balance.communication]
    assert_close(stats.balance_3, (alphas * balance).sum(0), 1e-5, "balance losses")
    return worst(out_BTD, out)


@pytest.mark.parametrize("dtype", quick(["float32", "bfloat16"], "float32"))
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_matches_the_oracle(name, dtype):
    """The router reads the same numbers in float32 in both dtypes, so even bfloat16 chooses exactly as the oracle."""
    assert error(name, dtype) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["grouped", "normalised"])
@pytest.mark.parametrize("factor", [1 / 16, 16.0])
def test_the_check_sees_a_wrong_scaling(monkeypatch, name, factor):
    """Acceptance case 3: scaling left out, applied twice, or applied to normalised gates is seen."""
    gates = router.gates
    monkeypatch.setattr(router, "gates", lambda chosen, config: gates(chosen, config) * factor)
    RUN.clear_cache()
    try:
        assert error(name) > 0.1
    finally:
        RUN.clear_cache()


@pytest.mark.parametrize("name", ["grouped", "normalised", "dropping"])
def test_backward_matches_finite_differences(name):
    """Output and balance losses, with respect to the input and every parameter: the routing does not move."""
    moe, y_BTD = module(name), normal(0, 3, 15, 20)
    weight_BTD = np.asarray(normal(1, 3, 15, 20), np.float64)

    def loss(moe, y_BTD):
        out_BTD, stats = moe(y_BTD, REAL, training=True, protected_B=PROTECTED)
        return jnp.sum(out_BTD * weight_BTD) + 1e3 * jnp.sum(stats.balance_3)

    gradient, gradient_y = jax.jit(jax.grad(loss, (0, 1)))(moe, y_BTD)
    gradient = weights(gradient) | {"y": np.asarray(gradient_y, np.float64)}
    at = weights(moe) | {"y": np.asarray(y_BTD, np.float64)}
    balance = moe.config.balance
    alphas = [balance.expert, balance.device, balance.communication]

    def expected_loss(w):
        out, losses, _, _ = expected(w, moe.config, w["y"], moe.config.dropping)
        return (out * weight_BTD).sum() + 1e3 * (alphas * losses).sum()

    rng = np.random.default_rng(3)
    for part in at:
        direction = {name: rng.normal(size=value.shape) * (name == part) for name, value in at.items()}
        size = np.linalg.norm(gradient[part]) * np.linalg.norm(direction[part])
        difference = slope(expected_loss, at, direction, 1e-6)
        assert abs((gradient[part] * direction[part]).sum() - difference) <= 3e-5 * size, part


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("ops", [("expert_ffn",), ("grouped_matmul", "token_dispatch")])
def test_implementations_agree(ops, implementation):
    config = change(MODEL, **{f"compute__{op}": implementation for op in ops})
    moe, y_BTD = made(lambda key: MoE(config, key)), normal(0, 3, 15, 20)
    out_BTD, _ = RUN(moe, y_BTD, REAL)
    assert_close(out_BTD, RUN(module("grouped"), y_BTD, REAL)[0])


def test_evaluation_never_drops():
    """Acceptance case 16: without `training` a dropping layer is the layer without dropping."""
    y_BTD = normal(0, 3, 15, 20)
    out_BTD, stats = RUN(module("dropping"), y_BTD, REAL)
    np.testing.assert_array_equal(out_BTD, RUN(module("grouped"), y_BTD, REAL)[0])
    assert float(stats.dropped) == 0
    trained, stats = RUN(module("dropping"), y_BTD, REAL, training=True)
    assert float(stats.dropped) > 0
    assert worst(trained, out_BTD) > 0.01


def test_padding_changes_nothing():
    """What stands in the padding reaches no real token, and gets no routed expert."""
    y_BTD = normal(0, 3, 15, 20)
    dirty_BTD = jnp.where(REAL[..., None], y_BTD, 30.0)
    clean, other = (RUN(module("no shared"), y, REAL)[0] for y in (y_BTD, dirty_BTD))
    np.testing.assert_array_equal(np.asarray(clean)[REAL], np.asarray(other)[REAL])
    assert (np.asarray(other)[~np.asarray(REAL)] == 0).all()


def test_permuting_tokens_permutes_the_output():
    y_BTD, real_BT = normal(0, 1, 30, 20), jnp.ones((1, 30), bool)
    order = np.random.default_rng(0).permutation(30)
    out_BTD, _ = RUN(module("grouped"), y_BTD, real_BT)
    assert worst(RUN(module("grouped"), y_BTD[:, order], real_BT)[0], out_BTD[:, order]) < 1e-6


def test_router_multiplies_in_full_float32():
    """Acceptance case 17: TPUs and GPUs multiply float32 in fewer bits unless told; the router's product is told."""
    jaxpr = jax.make_jaxpr(lambda m, y: m(y, REAL)[0])(module("grouped"), normal(0, 3, 15, 20, dtype=jnp.bfloat16))
    dots = [e for e in jaxpr.eqns if e.primitive.name == "dot_general" and e.outvars[0].aval.shape[-1] == 8]
    assert len(dots) == 1
    assert all(v.aval.dtype == jnp.float32 for v in dots[0].invars)
    assert dots[0].params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def _compiled(experts, tokens=512, backward=True):
    """A layer of K = 4, D = 64, F = 96, compiled for abstract arguments, never run."""
    moe = dataclasses.replace(MODEL.moe, routed_experts=experts, experts_per_token=4, expert_width=96, shared_experts=0)
    config = change(MODEL, dim=64, moe=moe)
    layer = jax.eval_shape(lambda: MoE(config, jax.random.key(0)))

    def loss(layer, y_BTD):
        return jnp.sum(layer(y_BTD, jnp.ones(y_BTD.shape[:2], bool))[0] ** 2)

    function = jax.grad(loss, 1) if backward else loss
    return jax.jit(function).lower(layer, jax.ShapeDtypeStruct((1, tokens, 64), jnp.float32)).compile()


@pytest.mark.parametrize("backward", [False, True])
def test_memory_does_not_grow_with_the_number_of_experts(backward):
    """64 experts against 8, the same tokens and K: only the padding to tiles and the router's own arrays may grow."""
    few, many = (_compiled(e, backward=backward).memory_analysis().temp_size_in_bytes for e in (8, 64))
    weights_grow = 3 * 64 * 96 * 4 * 56 if backward else 0  # the gradient of the weights, a loop's own copy
    router_grows = 8 * 512 * 4 * 56
    assert many <= 1.6 * few + weights_grow + router_grows
    all_experts = 512 * 64 * 96 * 4  # h of every token in every expert: what an E-fold form would hold
    if not backward:
        assert many < all_experts / 2
