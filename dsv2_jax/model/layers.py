"""Parameters, RMSNorm and SwiGLU."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsv2_jax import sharding
from dsv2_jax.config import ModelConfig
from kernels_pallas import projection
from kernels_pallas.swiglu import swiglu

nnx.use_eager_sharding(False)  # the mesh is applied to the whole state at once, under jit


def parameter(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 matrix from N(0, std^2), with the logical name of each axis (sharding.py maps those to the mesh)."""
    assert len(shape) == len(axes)
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(equation: str, axes: tuple[str, ...], x: jax.Array, w: jax.Array) -> jax.Array:
    return projection.project(equation, x, sharding.gathered(w, axes, x.dtype))


def _einsum_forward(equation, axes, x, w):
    return _einsum(equation, axes, x, w), (x, w)


def _einsum_backward(equation, axes, residuals, dy):
    x, w = residuals
    x_axes, w_axes, y_axes = equation.replace("->", ",").split(",")
    dx = projection.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, sharding.gathered(w, axes, dy.dtype))
    return dx, _weight_gradient(equation, axes, x, dy, w)


def _weight_gradient(equation, axes, x, dy, w):
    x_axes, w_axes, y_axes = equation.replace("->", ",").split(",")

    def here(x, dy):
        # The first operand is transposed in memory by XLA on CPUs: let it be the narrower one.
        (a_axes, a), (b_axes, b) = sorted([(x_axes, x), (y_axes, dy)], key=lambda operand: operand[1].size)
        return jnp.einsum(f"{a_axes},{b_axes}->{w_axes}", a, b, preferred_element_type=w.dtype)

    mesh = sharding.ambient()
    names = {"b": "batch", "t": "sequence", "s": "sequence"} | dict(zip(w_axes, axes, strict=True))
    x_names, y_names = ([names[axis] for axis in letters] for letters in (x_axes, y_axes))
    if mesh is None or not (sharding.divides(x, *x_names) and sharding.divides(dy, *y_names)):
        return sharding.stored(here(x, dy), axes)
    spec = sharding.gradient_spec(axes, w.shape, mesh)

    def everywhere(x, dy):
        dw = sharding.scatter(here(x, dy), spec, kept=("tensor",), dtype=x.dtype)
        return jax.lax.psum(dw, "data")

    specs = sharding.activation_spec(*x_names), sharding.activation_spec(*y_names)
    return sharding.stored(jax.shard_map(everywhere, in_specs=specs, out_specs=spec, check_vma=False)(x, dy), axes)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def project(equation: str, x: jax.Array, w: nnx.Param) -> jax.Array:
    """einsum(equation, x, w) in the dtype of x: the one place where float32 masters become compute weights.

    The gradient of a master is added up in float32 and not rounded to the compute dtype on its way; but on a mesh what
    one device has added up is, to cross to where the master is stored, as the master is to be gathered.
    """
    return _einsum(equation, w.get_metadata("axes"), x, w[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project_local(equation: str, spec, x: jax.Array, w: jax.Array) -> jax.Array:
    """`project` inside a shard_map, with this device's part `w` of a master that is stored as `spec`.

    Its gradient is this device's part of the float32 sum over the devices that share the master (see `project`).
    """
    return projection.einsum(equation, x, sharding.gather(sharding.cast(w, x.dtype), spec, kept=("tensor",)))


def _project_local_forward(equation, spec, x, w):
    return project_local(equation, spec, x, w), (x, w)


def _project_local_backward(equation, spec, residuals, dy):
    x, w = residuals
    x_axes, w_axes, y_axes = equation.replace("->", ",").split(",")
    whole = sharding.gather(sharding.cast(w, dy.dtype), spec, kept=("tensor",))
    dx = projection.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, whole)
    dw = jnp.einsum(f"{x_axes},{y_axes}->{w_axes}", x, dy, preferred_element_type=w.dtype)
    return dx, sharding.scatter(dw, spec, kept=("tensor",), dtype=dy.dtype)


project_local.defvjp(_project_local_forward, _project_local_backward)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32), axes=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse * self.scale[...]).astype(x.dtype)


class SwiGLU(nnx.Module):
    """FFN(x) = (silu(x gate) * (x up)) down (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, width: int, key: jax.Array):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = parameter(gate_key, (config.dim, width), ("embed", "mlp"), config.init_std)
        self.up = parameter(up_key, (config.dim, width), ("embed", "mlp"), config.init_std)
        self.down = parameter(down_key, (width, config.dim), ("mlp", "embed"), config.init_std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = swiglu(project("btd,df->btf", x_BTD, self.gate), project("btd,df->btf", x_BTD, self.up))
        return project("btf,fd->btd", sharding.constrain(h_BTF, "batch", "sequence", "mlp"), self.down)
