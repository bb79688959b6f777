"""Causal attention: every implementation against NumPy, forward and backward, and what a query may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import flash_attention as package
from oracles.attention import attend
from oracles.compare import TOLERANCE, assert_close, slope, worst

flash_attention = jax.jit(package.flash_attention, static_argnames=("scale", "implementation"))
PORTABLE = ("xla", "reference")  # run on any platform
SCALE = 0.3
# B, T, N, K, H, V: one token; ragged widths; several blocks with a ragged tail; more than eight blocks' worth; MQA.
SHAPES = [(2, 1, 2, 2, 4, 4), (2, 9, 4, 2, 10, 6), (1, 150, 2, 2, 8, 12), (1, 531, 1, 1, 6, 4), (1, 70, 3, 1, 4, 10)]


def inputs(B, T, N, K, H, V, S=None, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S or T, K, H), (B, S or T, K, V)
    return [jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes]


def documents(B, T, seed=0):
    """Random documents, the last stretch of every row padding (segment 0)."""
    starts_BT = np.random.default_rng(seed).random((B, T)) < 4 / T
    segments_BT = 1 + np.cumsum(starts_BT, axis=1)
    segments_BT[:, T - T // 5 :] = 0
    return jnp.asarray(segments_BT, jnp.int32)


def oracle(q, k, v, segments=None, offsets=None):
    (B, T), S = q.shape[:2], k.shape[1]
    out = []
    for b in range(B):
        first = 0 if offsets is None else int(offsets[b])
        seen = np.arange(S) <= first + np.arange(T)[:, None]
        if segments is not None:
            seen &= segments[b] == segments[b][:, None]
        q_TNH, k_SKH, v_SKV = (np.asarray(x[b], np.float64) for x in (q, k, v))
        out.append(attend(q_TNH, k_SKH, v_SKV, SCALE, seen))
    return np.array(out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PORTABLE)
def test_forward_matches_numpy(name, shape, is_packed, dtype):
    qkv = inputs(*shape, dtype=dtype)
    segments = documents(*shape[:2]) if is_packed else None
    out = flash_attention(*qkv, scale=SCALE, segments_BT=segments, implementation=name)
    assert out.dtype == dtype
    assert_close(out, oracle(*qkv, None if segments is None else np.asarray(segments)), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PORTABLE)
def test_chunk_over_a_cache_matches_numpy(name, dtype):
    """Queries at their own offset in each row; what lies beyond (here NaN-free garbage) is not seen."""
    qkv = inputs(3, 4, 4, 2, 6, 5, S=90, dtype=dtype)
    offsets = jnp.array([0, 51, 86])
    out = flash_attention(*qkv, scale=SCALE, offset_B=offsets, implementation=name)
    assert out.dtype == dtype
    assert_close(out, oracle(*qkv, offsets=np.asarray(offsets)), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_matches_the_reference(shape):
    qkv, segments = inputs(*shape), documents(*shape[:2])
    weight = inputs(*shape, seed=1)
    weight_BTNV = jnp.tile(weight[2], (1, 1, shape[2] // shape[3], 1))

    def gradients(name, dtype):
        def loss(q, k, v):
            out = flash_attention(q, k, v, scale=SCALE, segments_BT=segments, implementation=name)
            return jnp.sum(out.astype(jnp.float32) * weight_BTNV)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*(x.astype(dtype) for x in qkv))

    expected = gradients("reference", "float32")
    for letter, a, b in zip("qkv", gradients("xla", "float32"), expected):
        assert_close(a, b, 2e-5, f"gradient of {letter}")
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in qkv]
    qkv = rounded  # the bfloat16 run and its reference see the same numbers
    expected = gradients("reference", "float32")
    for letter, a, b in zip("qkv", gradients("xla", "bfloat16"), expected):
        assert a.dtype == jnp.bfloat16
        assert_close(a, b, 5e-2, f"bfloat16 gradient of {letter}")


@pytest.mark.parametrize("name", PORTABLE)
def test_backward_matches_finite_differences(name):
    shape = (1, 6, 4, 2, 4, 3)
    qkv, segments = inputs(*shape), jnp.array([[1, 1, 1, 1, 2, 2]])
    weight_BTNV = np.random.default_rng(5).normal(size=(1, 6, 4, 3))

    def loss(qkv):
        return jnp.sum(flash_attention(*qkv, scale=SCALE, segments_BT=segments, implementation=name) * weight_BTNV)

    gradient = jax.grad(loss)(qkv)
    for i, which in enumerate("qkv"):
        for seed in range(3):
            direction = [np.zeros(x.shape) for x in qkv]
            direction[i] = np.random.default_rng(seed).normal(size=qkv[i].shape)
            expected = slope(lambda x: (oracle(*x, np.asarray(segments)) * weight_BTNV).sum(), qkv, direction)
            actual = (np.asarray(gradient[i]) * direction[i]).sum()
            size = np.linalg.norm(gradient[i]) * np.linalg.norm(direction[i])
            assert abs(actual - expected) <= 1e-5 * size, which


def test_backward_has_no_array_without_elements():
    """As an operand of shard_map one crashes the compiler of JAX 0.11.2."""

    def loss(q, k, v):
        return jnp.sum(package.flash_attention(q, k, v, scale=SCALE, implementation="xla"))

    q, k, v = inputs(1, 150, 2, 2, 8, 12)  # three blocks: gradients of the first keys are added to all keys'
    assert "[0]" not in str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v))


def leak(attention, segments=None, first_changed=100, last_changed=140, watched=slice(0, 100)):
    """Largest change of the watched outputs, and largest gradient of them, with respect to tokens they must not see."""
    qkv = inputs(1, 140, 2, 2, 6, 5)
    changed = slice(first_changed, last_changed)

    def run(qkv):
        return attention(*qkv, scale=SCALE, segments_BT=segments)[:, watched]

    others = [x.at[:, changed].set(7.0) for x in qkv]
    difference = float(jnp.abs(run(qkv) - run(others)).max())
    gradient = jax.grad(lambda qkv: jnp.sum(run(qkv) ** 2))(qkv)
    return max(difference, *(float(jnp.abs(g[:, changed]).max()) for g in gradient))


@pytest.mark.parametrize("name", PORTABLE)
def test_causal_to_the_bit(name):
    """No later token changes an earlier output, nor has an earlier output a gradient to a later token."""

    def attention(*qkv, **kwargs):
        return flash_attention(*qkv, implementation=name, **kwargs)

    def peeking(q, k, v, **kwargs):  # one key ahead
        return attention(q, jnp.roll(k, -1, 1), jnp.roll(v, -1, 1), **kwargs)

    assert leak(attention) == 0
    assert leak(peeking) > 0


@pytest.mark.parametrize("name", PORTABLE)
def test_documents_do_not_attend_to_each_other(name):
    """Acceptance case 10, in the op: a change in one document of a packed row changes no bit of the next."""
    segments = jnp.concatenate([jnp.full((1, 60), 1), jnp.full((1, 80), 2)], axis=1)

    def attention(*qkv, segments_BT, **kwargs):
        return flash_attention(*qkv, segments_BT=segments_BT, implementation=name, **kwargs)

    def forgetting(*qkv, segments_BT, **kwargs):
        return attention(*qkv, segments_BT=None, **kwargs)

    assert leak(attention, segments, 0, 60, slice(60, 140)) == 0
    assert leak(forgetting, segments, 0, 60, slice(60, 140)) > 0


@pytest.mark.parametrize("name", PORTABLE)
def test_permuting_heads_permutes_the_output(name):
    q, k, v = inputs(1, 20, 4, 4, 6, 5)
    order = jnp.array([2, 0, 3, 1])
    out = flash_attention(q, k, v, scale=SCALE, implementation=name)
    permuted = flash_attention(*(x[:, :, order] for x in (q, k, v)), scale=SCALE, implementation=name)
    assert worst(permuted, out[:, :, order]) < 1e-6


@pytest.mark.parametrize("name", PORTABLE)
def test_large_scores_stay_finite(name):
    q, k, v = inputs(1, 12, 2, 2, 6, 5)
    out = flash_attention(100 * q, 100 * k, v, scale=1.0, implementation=name)
    gradient = jax.grad(lambda q: flash_attention(q, 100 * k, v, scale=1.0, implementation=name).sum())(100 * q)
    assert np.isfinite(out).all()
    assert np.isfinite(gradient).all()


def test_errors_name_the_shapes():
    q, k, v = inputs(1, 5, 4, 2, 6, 5)
    with pytest.raises(ValueError, match="do not fit"):
        flash_attention(q, k[:, :, :, :3], v, scale=1.0)
    with pytest.raises(ValueError, match="offset_B"):
        flash_attention(q[:, :3], k, v, scale=1.0)
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        flash_attention(q, k, v, scale=1.0, implementation="cuda")
