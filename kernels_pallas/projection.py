"""A matmul of activations by weights, as XLA multiplies them fastest: einsum, but on a CPU."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.select import target
from kernels_pallas.tile_loop import NT

FEW_ROWS = 16  # rows up to which a matmul costs no more than reading its weights


def einsum(equation: str, a: jax.Array, b: jax.Array, dtype=None) -> jax.Array:
    """A matmul, of no batch axes, whose result is of `dtype` (None: that of a).

    XLA on CPUs multiplies bfloat16 as such, at twice the rate of float32 where the processor can (AVX-512 BF16), only
    if it may leave the result in float32; else it widens both operands. The rounding to `dtype` is the same. (Of
    batched matmuls into which a transpose is folded it then finds no code.)
    """
    dtype = dtype or a.dtype
    wanted = jnp.float32 if target().platform == "cpu" else dtype
    return jnp.einsum(equation, a, b, preferred_element_type=wanted).astype(dtype)


def project(equation: str, x: jax.Array, w: jax.Array, dtype=None) -> jax.Array:
    """einsum(equation, x, w), as `dtype` (None: that of x). Equations end x and begin w with what is summed over.

    XLA on CPUs packs the second operand of a matmul anew at every call: of few rows the weights had better be the
    first, with their outputs leading. Behind barriers XLA transposes them once, before a decoding loop, which then
    holds a second copy of them, and does not swap the operands back. (A single row is a matrix-vector product, which
    XLA computes in float32; of more, bfloat16 is as fast as it lies where there is AVX-512 BF16.)
    """
    x_axes, w_axes, _ = equation.replace("->", ",").split(",")
    summed = len(set(x_axes) & set(w_axes))
    sizes = w.shape[:summed], w.shape[summed:]
    inner, outer = map(math.prod, sizes)
    if not 1 < x.size // inner <= FEW_ROWS or x.dtype != jnp.float32 or target().platform != "cpu":
        return einsum(equation, x, w, dtype)
    w_NK = jax.lax.optimization_barrier(w.reshape(inner, outer).T)
    y_NT = jax.lax.dot_general(w_NK, x.reshape(-1, inner), NT, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y_NT).T.reshape(*x.shape[: x.ndim - summed], *sizes[1])
