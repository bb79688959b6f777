"""The MoE layer on meshes of eight devices: equal to one device, forward and backward; what crosses, what is held."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import ragged_all_to_all
from flax import nnx
from small import MODEL, change, made, normal

from dsv2_jax import sharding
from dsv2_jax.config import ConfigError, DroppingConfig
from dsv2_jax.model import exchange
from dsv2_jax.model.expert_parallel import Setup
from dsv2_jax.model.moe import MoE
from oracles.compare import assert_close
from oracles.routing import choose

V2 = change(MODEL, dim=32, moe__routed_experts=16, moe__groups=8, moe__groups_kept=3, moe__expert_width=12)
LITE = change(V2, moe__groups=1, moe__groups_kept=1, moe__shared_experts=0)
SMALL = dict(compute__expert_slack=0.4, compute__expert_chunk=40)  # several rounds, several chunks
CONFIGS = {
    "v2": change(V2, **SMALL),
    "lite": change(LITE, **SMALL),
    "dropping": change(V2, moe__dropping=DroppingConfig(capacity_factor=0.5)),
    "ragged": change(V2, **SMALL, compute__expert_transport="ragged"),
}
B, T, D = 8, 16, 32
REAL = jnp.arange(T) < jnp.array([16, 16, 16, 3, 16, 0, 9, 16])[:, None]
PROTECTED = jnp.array([True] + [False] * 7)


@functools.cache
def module(config):
    return made(lambda key: MoE(config, key))


def run(moe, y_BTD):
    """Output, statistics and all gradients of a loss of the output and the balance losses."""

    def loss(moe, y_BTD):
        out_BTD, stats = moe(y_BTD, REAL, training=True, protected_B=PROTECTED)
        return jnp.sum(out_BTD * normal(1, B, T, D)) + 1e2 * jnp.sum(stats.balance_3), (out_BTD, stats)

    (_, (out_BTD, stats)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(moe, y_BTD)
    return out_BTD, stats, gradients


@functools.cache
def alone(config):
    return run(module(config), normal(0, B, T, D))


def crossing(config, devices, y_BTD):
    """By counting: distinct devices of a token's experts, but for its own; sequence b lies on device b P / B."""
    moe, count = module(config), 0
    logits_BTE = np.asarray(y_BTD, np.float64) @ np.asarray(moe.centroids[...], np.float64)
    for b in range(B):
        for t in np.flatnonzero(REAL[b]):
            experts = choose(np.exp(logits_BTE[b, t] - logits_BTE[b, t].max()), config.moe)
            count += len({e // (config.moe.routed_experts // devices) for e in experts} - {b % devices})
    return count


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        ("expert=8", "v2"),
        pytest.param("expert=8", "lite", marks=pytest.mark.slow),
        pytest.param("expert=8", "dropping", marks=pytest.mark.slow),
        pytest.param("expert=8", "ragged", marks=pytest.mark.slow),
        pytest.param("expert=4,fsdp=2", "v2", marks=pytest.mark.slow),
        pytest.param("expert=2,tensor=2,data=2", "lite", marks=pytest.mark.slow),
        ("tensor=2,fsdp=4", "v2"),
        pytest.param("tensor=4,data=2", "dropping", marks=pytest.mark.slow),
        pytest.param("context=4,expert=2", "v2", marks=pytest.mark.slow),  # the quick mesh of test_meshes
    ],
)
def test_equals_one_device(mesh, name, monkeypatch):
    if name == "ragged":
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
        monkeypatch.setattr(Setup, "transport", exchange.TRANSPORTS["ragged"])
    config, y_BTD, mesh = CONFIGS[name], normal(0, B, T, D), sharding.make_mesh(mesh)
    stats, mesh_stats = assert_equal(mesh, module(config), y_BTD, alone(config))
    assert (float(stats.dropped) > 0) == (name == "dropping")
    if name in ("v2", "lite", "ragged") and mesh.size == mesh.shape["expert"]:
        assert float(mesh_stats.crossed) == crossing(config, mesh.size, y_BTD)


def assert_equal(mesh, moe, y_BTD, expected):
    """What `run` gives on a mesh is what it gave on one device; the statistics of both."""
    out_BTD, stats, gradients = expected
    with sharding.use(mesh):
        placed = jax.device_put(moe, sharding.tree_shardings(moe, mesh))
        mesh_out_BTD, mesh_stats, mesh_gradients = run(placed, y_BTD)
    assert_close(mesh_out_BTD, out_BTD, 2e-6, "output")
    paths = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, expected), found in zip(paths, jax.tree.leaves(mesh_gradients), strict=True):
        assert_close(found, expected, 3e-6, jax.tree_util.keystr(path))
    for field in ("load_E", "assignments", "dropped", "sends", "sequences"):
        np.testing.assert_array_equal(getattr(mesh_stats, field), getattr(stats, field), field)
    assert_close(mesh_stats.balance_3, stats.balance_3, 1e-6, "balance losses")
    assert float(stats.crossed) == 0
    assert (float(mesh_stats.crossed) > 0) == (mesh.shape["expert"] > 1)
    return stats, mesh_stats


@pytest.mark.parametrize("name", ["v2", "dropping"])
def test_all_scores_equal(name):
    """Ties everywhere: every token has the same experts, and where tokens are dropped the same ones are."""
    moe, y_BTD = nnx.clone(module(CONFIGS[name])), normal(0, B, T, D)
    moe.centroids[...] = jnp.zeros_like(moe.centroids[...])
    stats, _ = assert_equal(sharding.make_mesh("expert=8"), moe, y_BTD, run(moe, y_BTD))
    assert (float(stats.dropped) > 0) == (name == "dropping")
    used = np.flatnonzero(np.asarray(stats.load_E))
    assert len(used) == CONFIGS[name].moe.experts_per_token


def test_a_batch_that_does_not_divide_runs():
    """One new token on eight devices: seven have none of their own and still compute their experts."""
    config, y_BTD = CONFIGS["v2"], normal(0, 1, 1, D)
    expected, _ = jax.jit(lambda m, y: m(y, jnp.ones((1, 1), bool)))(module(config), y_BTD)
    with sharding.use(sharding.make_mesh("expert=4,context=2")):
        found, _ = jax.jit(lambda m, y: m(y, jnp.ones((1, 1), bool)))(module(config), y_BTD)
    assert_close(found, expected, 2e-6)


def test_ragged_refuses_a_cpu():
    with sharding.use(sharding.make_mesh("expert=8")), pytest.raises(ConfigError, match=r"ragged.*stepwise"):
        jax.eval_shape(module(CONFIGS["ragged"]), normal(0, B, T, D), REAL)


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "most"),
    [(8, 3), (4, 3), (2, 2), (1, 1), (16, 6), (5, 5), (32, 6)],
)
def test_most_devices_of_v2(devices, most):
    """V2: 160 experts in 8 groups, M = 3, K = 6. Sixteen devices: two a group; five: their 32 experts straddle."""
    moe = change(V2.moe, routed_experts=160, experts_per_token=6)
    assert exchange.most_devices(moe, devices) == most


def test_most_devices_is_reached_and_never_passed():
    """Over many random routings of every small shape: the bound holds, and where groups are whole it is met."""
    rng = np.random.default_rng(0)
    for experts, groups, kept, k, devices in [(16, 8, 3, 3, 8), (24, 4, 2, 4, 6), (24, 6, 2, 5, 4), (16, 1, 1, 3, 8)]:
        moe = change(V2.moe, routed_experts=experts, groups=groups, groups_kept=kept, experts_per_token=k)
        reached = 0
        for _ in range(500):
            allowed = np.isin(np.arange(experts) // (experts // groups), rng.choice(groups, kept, replace=False))
            chosen = rng.choice(np.flatnonzero(allowed), k, replace=False)
            reached = max(reached, len({e // (experts // devices) for e in chosen}))
        assert reached == exchange.most_devices(moe, devices)


def test_rows_of_a_round():
    """The even share times the slack, at most all tokens; with dropping the budget of the device's groups."""
    moe = change(V2.moe, routed_experts=160, experts_per_token=6)
    assert exchange.rows_per_peer(moe, 8, 1, 4096, 1.25) == 1920  # 1.25 x 4096 x 3 / 8
    assert exchange.rows_per_peer(moe, 8, 2, 2048, 100.0) == 4096
    assert exchange.rows_per_peer(moe, 1, 2, 2048, 0.1) == 4096
    dropping = change(moe, dropping=DroppingConfig(capacity_factor=0.5))
    assert exchange.rows_per_peer(dropping, 8, 2, 2048, 100.0) == 2 * 768  # 2 sequences x 0.5 x 2048 x 6 / 8
    assert exchange.rows_per_peer(dropping, 4, 2, 2048, 100.0) == 2 * 2 * 768
    lite = change(moe, routed_experts=64, groups=1, groups_kept=1)
    assert exchange.rows_per_peer(lite, 8, 1, 4096, 1.0) == 2264  # 4096 (1 - (7 / 8)^6), up to a multiple of 8


# --- the program -----------------------------------------------------------------------------------------------------


def lowered(config, y_BTD, gradient=False):
    layer = jax.eval_shape(lambda: MoE(config, jax.random.key(0)))

    def loss(layer, y_BTD):
        return jnp.sum(layer(y_BTD, jnp.ones(y_BTD.shape[:2], bool))[0] ** 2)

    mesh = sharding.make_mesh("expert=8")
    with sharding.use(mesh):
        function = jax.jit(jax.grad(loss, (0, 1)) if gradient else loss)
        place = jax.sharding.NamedSharding(mesh, sharding.activation_spec("batch", "sequence", None))
        y_BTD = jax.ShapeDtypeStruct(y_BTD, config.compute.dtype, sharding=place)
        return function.lower(sharding.with_shardings(layer, mesh), y_BTD)


@pytest.mark.parametrize(("slack", "rows"), [(1.0, 24), (4.0, 64)])
def test_number_and_size_of_the_permutes(slack, rows):
    """P - 1 = 7 to send and 7 to collect, S rows each; a backward pass sends twice as many and keeps nothing.

    Once more as many stand under the condition of further rounds, unless one round holds all.
    """
    config = change(V2, compute__expert_slack=slack, compute__dtype="bfloat16")
    rounds = 1 if rows == 64 else 2
    for gradient, passes in ((False, 2), (True, 3)):  # a gradient alone needs no output
        text = lowered(config, (8, 64, D), gradient).as_text()
        permutes = re.findall(r"collective_permute.*-> tensor<(\w+)>", text)
        forward = 2 if gradient else 0  # traced, not computed: XLA removes them
        assert permutes == [f"{rows}x{D}xbf16"] * 7 * (passes + forward) * rounds


def test_memory_does_not_grow_with_k_or_e():
    """K 2 against 6 and E 8 against 64, the same tokens to a device: only weights, their gradients and choices grow."""

    def temporary(experts, k):
        moe = dict(moe__routed_experts=experts, moe__experts_per_token=k, moe__expert_width=32, moe__shared_experts=0)
        config = change(LITE, dim=128, **moe, compute__expert_chunk=256, compute__expert_slack=8.0)
        compiled = lowered(config, (8, 512, 128), gradient=True).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(8, 2), temporary(64, 6)
    rows = 8 * 512 * 128 * 4  # all that can arrive
    weights = 3 * 7 * 128 * 32 * 4
    choices = 8 * 512 * (6 - 2) * 4
    assert few > 3 * rows  # hidden states, cotangents, results
    assert many < few + 4 * weights + 16 * choices
    assert many < few + 1.5 * rows  # one row for each expert would be 4 times `rows` more
