"""Cross-entropy against the oracle, forward and backward, and the memory it takes at the real vocabulary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MODEL, change, made, packed

from dsv2_jax import sharding
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.train.loss import cross_entropy, lm_loss
from dsv2_jax.types import Batch
from oracles.compare import assert_close, slope, worst
from oracles.layers import cross_entropy as oracle

EOS = 49


def inputs(B=2, T=11, D=6, V=23, dtype="float32"):
    rng = np.random.default_rng(0)
    weights_BT = rng.choice([0.0, 0.5, 1.0], size=(B, T))
    return (
        jnp.asarray(2 * rng.normal(size=(B, T, D)), dtype),
        jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(weights_BT, jnp.float32),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_matches_the_oracle(chunk, dtype):
    """Also where no chunk divides the length."""
    h_BTD, w_DV, targets_BT, weights_BT = inputs(dtype=dtype)
    value = cross_entropy(h_BTD, w_DV, targets_BT, weights_BT, chunk)
    total, _ = oracle(np.asarray(h_BTD, np.float64) @ np.asarray(w_DV, np.float64), targets_BT, weights_BT)
    assert value.dtype == jnp.float32
    assert abs(float(value) / total - 1) < (1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("chunk", [4, 11])
def test_gradient_matches_finite_differences(chunk):
    h_BTD, w_DV, targets_BT, weights_BT = inputs()

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(h_BTD, w_DV):
        return 3 * cross_entropy(h_BTD, w_DV, targets_BT, weights_BT, chunk)

    gradient = jax.jit(gradients)(h_BTD, w_DV)
    rng = np.random.default_rng(1)
    for i in range(2):
        for _ in range(3):
            direction = [rng.normal(size=x.shape) * (i == j) for j, x in enumerate((h_BTD, w_DV))]
            expected = slope(lambda x: 3 * oracle(x[0] @ x[1], targets_BT, weights_BT)[0], [h_BTD, w_DV], direction)
            size = np.linalg.norm(gradient[i]) * np.linalg.norm(direction[i])
            assert abs((np.asarray(gradient[i]) * direction[i]).sum() - expected) <= 1e-5 * size
    assert (np.asarray(gradient[0])[np.asarray(weights_BT) == 0] == 0).all()


def test_bfloat16_gradient_is_near_the_float32_one():
    h_BTD, w_DV, targets_BT, weights_BT = inputs(dtype="bfloat16")
    gradients = [
        jax.grad(lambda h, w: cross_entropy(h, w, targets_BT, weights_BT, 4), (0, 1))(h_BTD.astype(dtype), w_DV)
        for dtype in ("bfloat16", "float32")
    ]
    for rough, exact in zip(*gradients):
        assert worst(rough, exact) < 3e-2


def test_large_logits_stay_finite():
    h_BTD, w_DV, targets_BT, weights_BT = inputs()
    value, gradient = jax.value_and_grad(cross_entropy)(1e3 * h_BTD, 1e3 * w_DV, targets_BT, weights_BT, 4)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def batch(*lengths, total=16, seed=0):
    """Documents that end in EOS in one row, with padding that is EOS: PAD is EOS."""
    segments_BT, positions_BT = packed(*lengths, total=total)
    tokens_BT = np.full((1, total), EOS)
    targets_BT, weights_BT, start = np.full((1, total), EOS), np.zeros((1, total), np.float32), 0
    for i, length in enumerate(lengths):
        rng = np.random.default_rng(seed + i)
        document = np.append(rng.integers(0, 49, length), EOS)  # inputs are all but the last, targets all but the first
        tokens_BT[0, start : start + length] = document[:-1]
        targets_BT[0, start : start + length] = document[1:]
        weights_BT[0, start : start + length] = 1
        start += length
    arrays = (jnp.asarray(x) for x in (tokens_BT, targets_BT, weights_BT))
    return Batch(*arrays, segments_BT, positions_BT, jnp.ones_like(segments_BT))


LOSS = jax.jit(lm_loss, static_argnames="training")


def packed_loss_error(together):
    """Of the mean loss of two documents in one row against the token-weighted mean of the two alone."""
    model = made(lambda key: Transformer(MODEL, key))
    parts = [LOSS(model, batch(6, total=6)), LOSS(model, batch(8, total=8, seed=1))]
    expected = sum(float(p.nll_sum) for p in parts) / sum(float(p.weight) for p in parts)
    result = LOSS(model, together)
    return abs(float(result.nll_sum) / float(result.weight) / expected - 1)


def test_packed_loss_is_the_mean_of_separate_losses_by_token():
    """Acceptance cases 7 and 10: attending across documents, or leaving EOS targets out, fails the check."""
    both = batch(6, 8)
    assert packed_loss_error(both) < 1e-5
    assert packed_loss_error(dataclasses.replace(both, segments_BT=jnp.minimum(both.segments_BT, 1))) > 1e-3
    without_eos = both.weights_BT * (both.targets_BT != EOS)  # the defect: masks from the token
    assert packed_loss_error(dataclasses.replace(both, weights_BT=without_eos)) > 1e-3


def test_loss_parts_are_sums():
    """Sums over a batch equal the sum over its rows, so that microbatches may be added before the one division."""
    model = made(lambda key: Transformer(MODEL, key))
    rows = [batch(6, 8), batch(15, seed=5)]
    whole = LOSS(model, jax.tree.map(lambda *x: jnp.concatenate(x), *rows))
    added = jax.tree.map(lambda a, b: a + b, *(LOSS(model, row) for row in rows))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(added)):
        assert_close(a, b, 1e-5)
    assert float(whole.weight) == float(whole.bytes) == 29


V, D = 102400, 64


def temporaries(B, T, chunk):
    """Bytes the compiled value and gradient hold beside inputs and outputs; compiled for shapes alone, never run."""
    shapes = [((B, T, D), jnp.float32), ((D, V), jnp.float32), ((B, T), jnp.int32), ((B, T), jnp.float32)]
    function = jax.jit(
        lambda h, w, targets, weights: jax.value_and_grad(cross_entropy, (0, 1))(h, w, targets, weights, chunk)
    )
    compiled = function.lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_full_logits_are_never_held():
    """At vocabulary 102400: far less than tokens x vocabulary x 4 bytes; the same check fails with one chunk of all."""
    logits = 2048 * V * 4
    assert temporaries(1, 2048, 128) < logits / 4
    assert temporaries(1, 2048, 2048) > logits / 4


def test_loss_chunk_reaches_the_loss():
    """ComputeConfig.loss_chunk positions of each row at once, through the model, not all of them."""
    config = change(
        MODEL, vocab_size=V, max_length=1024, dim=D, layers=1, dense_layers=1, moe=None, compute__loss_chunk=64
    )
    model = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    row = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    rows = Batch(row, row, jax.ShapeDtypeStruct((2, 1024), jnp.float32), row, row, row)
    compiled = jax.jit(jax.grad(lambda model, rows: lm_loss(model, rows).nll_sum)).lower(model, rows).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * V * 4 / 4


@pytest.mark.parametrize("shape", ["data=1", "tensor=2", "context=2"])
def test_on_cpus_every_matmul_of_bfloat16_leaves_its_result_in_float32(shape):
    """Forward and backward: XLA on CPUs widens the operands of others, and multiplies at half the rate.

    (JAX's gradient of the shared experts' matmuls widens both operands first; XLA takes that back.)
    """
    config = change(MODEL, compute__dtype="bfloat16", attention__heads=4, vocab_size=64, moe__expert_width=16)
    mesh = sharding.make_mesh(shape, jax.devices()[:2] if "2" in shape else jax.devices()[:1])
    model = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    row = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    rows = Batch(row, row, jax.ShapeDtypeStruct((2, 16), jnp.float32), row, row, row)
    with sharding.use(mesh):
        lowered = jax.jit(jax.grad(lambda model, rows: lm_loss(model, rows).nll_sum)).lower(model, rows)
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    multiplied = [line for line in products if "xbf16>, tensor" in line]
    assert len(multiplied) > 30
    assert [line for line in multiplied if line.endswith("xbf16>")] == []
