"""RMSNorm, SwiGLU and the initial parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import quick
from small import MODEL, change, made, normal

from dsv2_jax import presets
from dsv2_jax.config import GQAConfig
from dsv2_jax.model.layers import RMSNorm, SwiGLU, parameter
from dsv2_jax.model.transformer import Transformer
from oracles import layers as oracle
from oracles.compare import TOLERANCE, assert_close, slope
from oracles.weights import array, ffn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm(size, dtype):
    """Also where eps = 1e-6 matters: a mean square of 1e-6."""
    norm, x_BTD = made(lambda _: RMSNorm(20, 1e-6)), size * normal(0, 2, 3, 20, dtype=dtype)
    assert norm(x_BTD).dtype == dtype
    assert_close(norm(x_BTD), oracle.rms_norm(np.asarray(x_BTD, np.float64), array(norm.scale)), TOLERANCE[dtype])
    if size == 1e-3:
        assert not np.allclose(norm(x_BTD), RMSNorm(20, 1e-12)(x_BTD), rtol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swiglu(dtype):
    module, x_BTD = SwiGLU(MODEL, 17, jax.random.key(0)), normal(0, 2, 3, 20, dtype=dtype)
    assert module(x_BTD).dtype == dtype
    assert_close(module(x_BTD), oracle.swiglu(np.asarray(x_BTD, np.float64), **_named(ffn(module))), TOLERANCE[dtype])


def test_swiglu_gradient():
    module, x_BTD, weight = SwiGLU(MODEL, 17, jax.random.key(0)), normal(0, 1, 3, 20), np.asarray(normal(1, 1, 3, 20))
    gradient = ffn(jax.grad(lambda m: jnp.sum(m(x_BTD) * weight))(module))
    for name in gradient:
        direction = {k: np.random.default_rng(0).normal(size=v.shape) * (k == name) for k, v in gradient.items()}
        f = lambda w: (oracle.swiglu(np.asarray(x_BTD, np.float64), **_named(w)) * weight).sum()  # noqa: E731
        size = np.linalg.norm(gradient[name]) * np.linalg.norm(direction[name])
        assert abs((gradient[name] * direction[name]).sum() - slope(f, ffn(module), direction)) <= 1e-5 * size


def _named(w):
    return {"gate_DF": w["gate"], "up_DF": w["up"], "down_FD": w["down"]}


def test_parameters_are_float32_of_the_std_asked_for():
    w = parameter(jax.random.key(0), (300, 400), ("embed", "mlp"), 0.006)
    assert w[...].dtype == jnp.float32
    assert abs(float(w[...].std()) / 0.006 - 1) < 0.01
    assert abs(float(w[...].mean())) < 1e-4


ATTENTIONS = [presets.get("tiny").attention, GQAConfig(heads=8, kv_heads=2, head_dim=16)]


@pytest.mark.parametrize("attention", quick(ATTENTIONS, ATTENTIONS[0]))
def test_every_matrix_starts_at_the_std_of_the_preset_and_every_norm_at_one(attention):
    config = change(presets.get("tiny"), attention=attention)
    model = jax.jit(functools.partial(Transformer, config))(jax.random.key(0, impl="rbg"))  # quick to compile
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert len(leaves) > 20
    for path, leaf in leaves:
        if leaf.get_metadata("axes") == ("norm",):
            assert (leaf[...] == 1).all()
        else:
            spread = float(leaf[...].std()) / config.init_std
            assert abs(spread - 1) < 0.05, (jax.tree_util.keystr(path), spread)
