"""The presets hold what the report and the issue state: literal values, so that none moves unseen."""

import dataclasses

import pytest

from dsv2_jax import presets
from dsv2_jax.config import BalanceConfig, MLAConfig, MoEConfig, YarnConfig


def test_peer_tiny_is_the_shape_that_is_timed():
    model = presets.get("peer_tiny")
    found = (model.layers, model.dense_layers, model.dim, model.dense_width, model.vocab_size)
    assert found == (4, 1, 256, 1024, 4096)
    attention = MLAConfig(heads=8, nope_dim=32, rope_dim=16, value_dim=32, kv_latent=64, q_latent=None)
    assert model.attention == attention
    assert model.moe == MoEConfig(
        routed_experts=16, shared_experts=2, experts_per_token=4, expert_width=128, groups=1, groups_kept=1,
        routed_scaling=1.0, normalize_gates=False, dropping=None,
        balance=BalanceConfig(expert=0.001, device=None, communication=None),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "balance"), [("v2", (0.003, 0.05, 0.02)), ("v2_lite", (0.001, None, None)), ("tiny", (0.003, 0.05, 0.02))]
)
def test_balance_coefficients(name, balance):
    assert presets.get(name).moe.balance == BalanceConfig(*balance)


@pytest.mark.parametrize("name", presets.MODELS)
def test_the_initial_standard_deviation(name):
    assert presets.get(name).init_std == (0.02 if name in ("tiny", "peer_tiny") else 0.006)


@pytest.mark.parametrize("name", ["v2", "v2_lite"])
def test_a_preset_is_as_pre_trained_and_its_released_form_differs_in_the_context_alone(name):
    model, released = presets.get(name), presets.get(f"{name}_released")
    assert model.attention.yarn is None
    assert (model.max_length, released.max_length) == (4096, 163840)
    yarn = released.attention.yarn
    assert yarn == YarnConfig(
        factor=40.0, original_length=4096, beta_slow=1.0, beta_fast=32.0, mscale=0.707, mscale_all_dim=0.707
    )
    attention = dataclasses.replace(released.attention, yarn=None)
    assert dataclasses.replace(released, attention=attention, max_length=4096) == model


def test_tiny_has_all_of_the_architecture():
    model = presets.get("tiny")
    assert model.attention.q_latent
    assert 0 < model.dense_layers < model.layers
    assert model.moe.groups > model.moe.groups_kept > 1
    assert model.moe.shared_experts > 0
    assert None not in dataclasses.astuple(model.moe.balance)
