"""Rotary embedding of interleaved pairs and YaRN, in NumPy float64 (paper.md, section 5; arXiv 2309.00071)."""

import math

import numpy as np


def mscale(factor, m):
    """0.1 m ln(s) + 1: the attention temperature of YaRN; 1 where nothing is extended."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def frequencies(dim, theta, yarn=None):
    """Radians per position of each of the dim/2 pairs.

    YaRN divides a frequency by s where it turns fewer than beta_slow times over the original length, keeps it where it
    turns more than beta_fast times, and mixes linearly in the index of the pair between those two.
    """
    plain = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    if yarn is None:
        return plain

    def pair_turning(rotations):
        return dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.array([min(max((i - low) / width, 0.0), 1.0) for i in range(dim // 2)])
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def rotate(x_P, position, theta, yarn=None):
    """Turn each pair (x[2i], x[2i+1]) of one vector by position * frequency[i]; the pairs stay where they are."""
    x_P = np.asarray(x_P, np.float64)
    freqs = frequencies(len(x_P), theta, yarn)
    length = 1.0 if yarn is None else mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    out_P = np.empty_like(x_P)
    for i, freq in enumerate(freqs):
        cos, sin = math.cos(float(position) * freq), math.sin(float(position) * freq)
        a, b = x_P[2 * i], x_P[2 * i + 1]
        out_P[2 * i], out_P[2 * i + 1] = length * (a * cos - b * sin), length * (a * sin + b * cos)
    return out_P


def softmax_scale(qk_dim, yarn=None):
    """1 / sqrt(width of query and key), times mscale(s, mscale_all_dim)^2 under YaRN."""
    return qk_dim**-0.5 * (1.0 if yarn is None else mscale(yarn.factor, yarn.mscale_all_dim) ** 2)
