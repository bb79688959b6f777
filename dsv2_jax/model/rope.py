"""Rotary position embedding of interleaved pairs, and YaRN (arXiv 2309.00071; DeepSeek-V2 report, section 3.1.4)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax.config import YarnConfig


def mscale(factor: float, coefficient: float) -> float:
    """0.1 m ln s + 1: how much longer contexts sharpen the attention (mscale(40, 0.707)^2 = 1.5896)."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def softmax_scale(qk_dim: int, yarn: YarnConfig | None) -> float:
    """1/sqrt(width of a query), times mscale^2 under YaRN."""
    sharpening = mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else 1.0
    return sharpening / math.sqrt(qk_dim)


def frequencies(dim: int, theta: float, yarn: YarnConfig | None) -> np.ndarray:
    """Radians a position for each of the dim/2 pairs, float64.

    YaRN keeps the frequencies that turn more than `beta_fast` times within the original length, divides those that turn
    less than `beta_slow` times by `factor`, and blends linearly over the pairs between.
    """
    kept = theta ** -(np.arange(0, dim, 2) / dim)
    if yarn is None:
        return kept

    def pair_turning(rotations: float) -> float:
        return dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    interpolated = np.clip((np.arange(dim // 2) - first) / max(last - first, 0.001), 0, 1)
    return kept * (1 - interpolated) + kept / yarn.factor * interpolated


def rotations(positions_BT: jax.Array, dim: int, theta: float, yarn: YarnConfig | None) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each pair's angle, float32 [B, T, dim/2], times YaRN's mscale / mscale_all_dim (1 as released)."""
    angle = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies(dim, theta, yarn), jnp.float32)
    factor = mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim) if yarn else 1.0
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_BTNP: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (x0, x1), (x2, x3), ... of every head by their angles, in float32."""
    cos, sin = (table[:, :, None, :, None] for table in cos_sin)
    pairs = x_BTNP.astype(jnp.float32).reshape(*x_BTNP.shape[:-1], -1, 2)
    turned = pairs * cos + pairs[..., ::-1] * jnp.concatenate([-sin, sin], axis=-1)
    return turned.reshape(x_BTNP.shape).astype(x_BTNP.dtype)
