"""What the model runs on a TPU, by tracing V2-Lite for one: no TPU and no compiler are needed."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from dsv2_jax.model.cache import make_cache
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.presets import V2_LITE
from dsv2_jax.sharding import MESH_AXES


@pytest.fixture
def model():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    mesh = AbstractMesh((1,) * 5, MESH_AXES, axis_types=(AxisType.Auto,) * 5, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield jax.eval_shape(functools.partial(Transformer, V2_LITE), jax.random.key(0))


def kernels(program) -> set[str]:
    return set(re.findall(r"\bname=(grouped_\w+|splash_\w+|paged_\w+)", str(program)))


def test_training_runs_on_kernels_in_both_passes(model):
    tokens_BT = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(model, tokens_BT, segments_BT):
        return model.features(tokens_BT, segments_BT, training=True)[0].astype(jnp.float32).sum()

    found = kernels(jax.make_jaxpr(jax.grad(loss))(model, tokens_BT, tokens_BT))
    assert found >= {"grouped_rows", "grouped_weights"}
    for phase in ("fwd", "dq", "dkv"):
        assert any(name.startswith(f"splash_mha_{phase}") for name in found), phase


def test_decoding_runs_on_kernels(model):
    cache = jax.eval_shape(lambda: make_cache(V2_LITE, 4, 1024, stacked=True))
    program = jax.make_jaxpr(Transformer.decode)(model, jax.ShapeDtypeStruct((4, 1), jnp.int32), cache)
    assert kernels(program) >= {"grouped_rows", "paged_latent_attention"}
