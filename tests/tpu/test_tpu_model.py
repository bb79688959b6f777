"""What the model runs on a TPU and on a Hopper GPU, by tracing V2-Lite for one: neither it nor a compiler is needed."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from quick import quick

from dsv2_jax.inference.generate import generate_tokens
from dsv2_jax.model.cache import make_cache
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.presets import V2_LITE
from dsv2_jax.sharding import MESH_AXES

TRAINING = {
    "TPU v5": {"grouped_rows", "grouped_weights", "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"},
    "NVIDIA H200": {"grouped_rows", "grouped_weights", "attention", "attention_dq", "attention_dk_dv"},
}


@pytest.fixture(params=quick(TRAINING, "TPU v5"))
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    platform, cores = ("tpu", 2) if "TPU" in kind else ("gpu", 132)
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    mesh = AbstractMesh((1,) * 5, MESH_AXES, axis_types=(AxisType.Auto,) * 5, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield jax.eval_shape(functools.partial(Transformer, V2_LITE), jax.random.key(0))


def kernels(program) -> set[str]:
    """Names of the kernels; JAX's own attention for TPUs appends its options to them."""
    return set(
        re.findall(r"\bname=(grouped_rows|grouped_weights|splash_mha_[a-z]+|paged_\w+|attention\w*)", str(program))
    )


def loss(model, tokens_BT, segments_BT):
    return model.features(tokens_BT, segments_BT, training=True)[0].astype(jnp.float32).sum()


TOKENS_BT = jax.ShapeDtypeStruct((1, 4096), jnp.int32)


def test_training_runs_on_kernels_in_both_passes(model, kind):
    assert kernels(jax.make_jaxpr(jax.grad(loss))(model, TOKENS_BT, TOKENS_BT)) == TRAINING[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["NVIDIA H200"])
def test_training_lowers_for_hopper(model, kind):
    """Down to where the compiler for the chip takes over, which needs none of its packages."""
    traced = jax.jit(jax.grad(loss)).trace(model, TOKENS_BT, TOKENS_BT)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert {name for name in TRAINING[kind] if f"{name}_mosaic_gpu" in program} == TRAINING[kind]
    assert "@mosaic_gpu" in program


@pytest.mark.parametrize(("tokens", "attention"), [(1, "latent"), (128, "latent"), (512, "expanded")])
def test_decoding_and_prefill_run_on_kernels(model, kind, tokens, attention):
    """A chunk of more tokens than `MLA.longest_absorbed` expands the cache."""
    cache = jax.eval_shape(lambda: make_cache(V2_LITE, 4, 1024, stacked=True))
    program = jax.make_jaxpr(Transformer.decode)(model, jax.ShapeDtypeStruct((4, tokens), jnp.int32), cache)
    expanded = {"TPU v5": "splash_mha_fwd", "NVIDIA H200": "attention"}[kind]
    assert kernels(program) == {"grouped_rows", "paged_latent_attention" if attention == "latent" else expanded}


def test_generated_tokens_attend_in_kernels(model):
    """All of the prompt but its last token is one chunk; the cache's 191 tokens are rounded up to pages."""
    program = jax.make_jaxpr(functools.partial(generate_tokens, new_tokens=64))(
        model, jax.ShapeDtypeStruct((2, 128), jnp.int32)
    )
    assert kernels(program) == {"grouped_rows", "paged_latent_attention"}
    assert "bf16[2,192,576]" in str(program)
