"""Absorbed latent attention against NumPy: every head reads the one shared cache, whose first part is the value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.latent_attention import latent_attention
from oracles.attention import attend
from oracles.compare import TOLERANCE, assert_close

PORTABLE = ("xla", "reference")  # run on any platform
SCALE = 0.2
# B, T, N, S, R, P; and where each row's first query stands
CASES = [
    ((1, 1, 1, 1, 3, 2), [0]),
    ((3, 1, 5, 40, 12, 4), [0, 17, 39]),
    ((2, 7, 4, 33, 10, 6), [0, 26]),
]


def inputs(B, T, N, S, R, P, dtype="float32"):
    rng = np.random.default_rng(0)
    return jnp.asarray(2 * rng.normal(size=(B, T, N, R + P)), dtype), jnp.asarray(rng.normal(size=(B, S, R + P)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "offsets"), CASES, ids=str)
@pytest.mark.parametrize("name", PORTABLE)
def test_matches_numpy(name, shape, offsets, dtype):
    (_, T, _, S, R, _), (q, cache) = shape, inputs(*shape, dtype=dtype)
    run = jax.jit(latent_attention, static_argnames=("value_dim", "scale", "implementation"))
    out = run(q, cache, jnp.array(offsets), value_dim=R, scale=SCALE, implementation=name)
    assert out.dtype == dtype
    for b, offset in enumerate(offsets):
        visible_TS = np.array([[s <= offset + t for s in range(S)] for t in range(T)])
        q_TNC, c_S1C = np.asarray(q[b], np.float64), np.asarray(cache[b], np.float64)[:, None]
        assert_close(out[b], attend(q_TNC, c_S1C, c_S1C[..., :R], SCALE, visible_TS), TOLERANCE[dtype], f"row {b}")


@pytest.mark.parametrize("name", PORTABLE)
def test_positions_not_yet_written_are_invisible(name):
    """What lies in the cache beyond a query's own position changes no bit of its output."""
    q, cache = inputs(2, 3, 4, 20, 8, 4)
    offsets = jnp.array([2, 9])
    beyond = jnp.arange(20) > offsets[:, None] + 2
    dirty = jnp.where(beyond[..., None], 1e4, cache)
    clean, other = (
        latent_attention(q, c, offsets, value_dim=8, scale=SCALE, implementation=name) for c in (cache, dirty)
    )
    np.testing.assert_array_equal(clean, other)
    seen = latent_attention(q, dirty, offsets + 1, value_dim=8, scale=SCALE, implementation=name)
    assert not np.array_equal(clean, seen)


def test_errors_name_the_shapes():
    q, cache = inputs(1, 1, 2, 5, 4, 2)
    with pytest.raises(ValueError, match="do not fit"):
        latent_attention(q, cache[..., :3], jnp.array([0]), value_dim=2, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        latent_attention(q, cache, jnp.array([0]), value_dim=7, scale=1.0)
