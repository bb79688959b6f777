"""silu(a) * b, whose backward pass needs a and b alone."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(a: jax.Array, b: jax.Array) -> jax.Array:
    """silu(a) * b, computed in float32."""
    a32 = a.astype(jnp.float32)
    return (a32 * jax.nn.sigmoid(a32) * b).astype(a.dtype)


def gradients(a: jax.Array, b: jax.Array, dh: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cotangents of a and b, in their dtype."""
    a32, dh32 = a.astype(jnp.float32), dh.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(a32)
    da = dh32 * b * sigmoid * (1 + a32 * (1 - sigmoid))
    return da.astype(a.dtype), (dh32 * a32 * sigmoid).astype(b.dtype)


swiglu.defvjp(lambda a, b: (swiglu(a, b), (a, b)), lambda residuals, dh: gradients(*residuals, dh))
