"""Latents of a byte or less: integers or FP8, with two float32 scales a position, of the value part and of the rest."""

import jax
import jax.numpy as jnp

# The largest magnitude each type is used up to; float8_e4m3fn would turn what is beyond its own into NaN.
LARGEST = {"int4": 7.0, "int8": 127.0, "float8_e4m3fn": 448.0}


def quantise(c_SC: jax.Array, value_dim: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """(values [..., S, C] of `dtype`, scales [..., 2, S] float32): value part = values times scales[0], rest: [1]."""
    parts = jnp.split(c_SC.astype(jnp.float32), [value_dim], axis=-1)
    values, scales = zip(*(_one(part, jnp.dtype(dtype)) for part in parts))
    return jnp.concatenate(values, axis=-1), jnp.stack(scales, axis=-2)


def _one(x_SC, dtype):
    scale_S = jnp.maximum(jnp.max(jnp.abs(x_SC), axis=-1), 1e-30) / LARGEST[dtype.name]
    x_SC = x_SC / scale_S[..., None]
    return (jnp.round(x_SC) if jnp.issubdtype(dtype, jnp.integer) else x_SC).astype(dtype), scale_S


def dequantise(values_SC: jax.Array, scales: jax.Array | None, value_dim: int, dtype) -> jax.Array:
    """What `quantise` was given, up to rounding; without scales the values themselves."""
    if scales is None:
        return values_SC.astype(dtype)
    width = values_SC.shape[-1]
    scale_SC = jnp.repeat(
        scales.swapaxes(-1, -2), jnp.array([value_dim, width - value_dim]), axis=-1, total_repeat_length=width
    )
    return (values_SC.astype(jnp.float32) * scale_SC).astype(dtype)
