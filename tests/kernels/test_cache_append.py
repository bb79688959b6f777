"""New tokens' entries go where they should, and the cache is not copied in a wider dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cache_append import append


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_append_writes_where_it_should_and_nowhere_else(dtype):
    cache_BSC, offset_B = jnp.zeros((3, 6, 2), dtype), jnp.array([1, 5, 6])
    two_BSC = append(cache_BSC, jnp.ones((3, 2, 2)), offset_B)
    np.testing.assert_array_equal(two_BSC[..., 0], [[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0] * 6])
    one_BSC = append(two_BSC, jnp.full((3, 1, 2), 2.0), offset_B)
    np.testing.assert_array_equal(one_BSC[..., 1], [[0, 2, 1, 0, 0, 0], [0, 0, 0, 0, 0, 2], [0] * 6])
    assert one_BSC.dtype == dtype


def test_one_entry_is_written_into_bfloat16_without_widening_the_cache():
    """XLA on CPUs widens what it scatters into."""
    operands = jnp.zeros((2, 96, 5), jnp.bfloat16), jnp.ones((2, 1, 5), jnp.bfloat16), jnp.array([3, 9])
    compiled = jax.jit(append, donate_argnums=0).lower(*operands).compile()
    assert "f32[2,96,5]" not in compiled.as_text().split("ENTRY")[1]
