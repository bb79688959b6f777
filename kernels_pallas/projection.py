"""A matmul of activations by weights, as XLA multiplies them fastest: einsum, but for a few rows on a CPU."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.select import target
from kernels_pallas.tile_loop import NT

FEW_ROWS = 16  # rows up to which a matmul costs no more than reading its weights


def project(equation: str, x: jax.Array, w: jax.Array, dtype=None) -> jax.Array:
    """einsum(equation, x, w), as `dtype` (None: that of x). Equations end x and begin w with what is summed over.

    XLA on CPUs packs the second operand of a matmul anew at every call: of few rows the weights had better be the
    first, with their outputs leading. Behind barriers XLA transposes them once, before a decoding loop, which then
    holds a second copy of them, and does not swap the operands back. (A single row is a matrix-vector product.)
    """
    x_axes, w_axes, _ = equation.replace("->", ",").split(",")
    summed = len(set(x_axes) & set(w_axes))
    sizes = w.shape[:summed], w.shape[summed:]
    inner, outer = map(math.prod, sizes)
    if not 1 < x.size // inner <= FEW_ROWS or target().platform != "cpu":
        return jnp.einsum(equation, x, w, preferred_element_type=dtype)
    w_NK = jax.lax.optimization_barrier(w.reshape(inner, outer).T)
    y_NT = jax.lax.dot_general(w_NK, x.reshape(-1, inner), NT, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y_NT).T.reshape(*x.shape[: x.ndim - summed], *sizes[1])
