"""Next-token cross-entropy, chunked so that the logits of all tokens are never held, and the balance losses."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv2_jax import sharding
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.types import Batch, MoEStats, pytree
from kernels_pallas.projection import einsum


@pytree
class LossParts:
    """Sums over a batch, to be divided once, after all microbatches and devices are added."""

    nll_sum: jax.Array  # float32, nats
    weight: jax.Array  # float32: weighted number of targets
    bytes: jax.Array  # float32: text bytes of the targets with weight
    moe: MoEStats | None  # per MoE layer


def lm_loss(
    model: Transformer, batch: Batch, *, training: bool = False, protected_B: jax.Array | None = None
) -> LossParts:
    """Sums of the negative log-likelihood and of the MoE statistics (balance losses included) over a batch."""
    h_BTD, stats = model.features(
        batch.tokens_BT, batch.segments_BT, batch.positions_BT, training=training, protected_B=protected_B
    )
    chunk = min(model.config.compute.loss_chunk, h_BTD.shape[1] // sharding.axis_size("context"))
    with jax.named_scope("cross_entropy"):
        nll_sum = cross_entropy(h_BTD, model.unembed[...], batch.targets_BT, batch.weights_BT, chunk)
    counted_BT = jnp.where(batch.weights_BT > 0, batch.bytes_BT, 0)
    return LossParts(nll_sum, jnp.sum(batch.weights_BT), jnp.sum(counted_BT, dtype=jnp.float32), stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(h_BTD, w_DV, targets_BT, weights_BT, chunk: int) -> jax.Array:
    """sum_t weight_t (logsumexp(z_t) - z_t[target_t]), z = h w in float32, `chunk` positions of each row at a time.

    Differentiable in h and w. Its gradient is computed together with its value, so that each chunk's logits are formed
    once: the cost is the three matmuls of any output layer, and the memory one chunk of logits. On a mesh each device
    takes its tokens and, over `tensor`, its part of the vocabulary; w is gathered and its gradient added up once.
    """
    return _over_devices(h_BTD, w_DV, targets_BT, weights_BT, chunk, with_gradient=False)[0]


def _over_devices(h_BTD, w_DV, targets_BT, weights_BT, chunk: int, with_gradient: bool):
    """`_over_chunks`, summed over the devices of the ambient mesh."""
    mesh = sharding.ambient()
    if mesh is None:
        return _over_chunks(h_BTD, w_DV, targets_BT, weights_BT, chunk, with_gradient)
    spec = sharding.parameter_spec(("embed", "vocab"), w_DV.shape, mesh)
    vocab_axis = "tensor" if mesh.shape["tensor"] > 1 else None
    tokens = sharding.activation_spec("batch", "sequence")
    hidden = sharding.activation_spec("batch", "sequence", "embed")
    shared = (*sharding.BATCH_AXES, "context")

    def local(h_BTD, w_DV, targets_BT, weights_BT):
        w_DV = sharding.gather(w_DV.astype(h_BTD.dtype), spec, kept=("tensor",))
        nll, dh, dw = _over_chunks(h_BTD, w_DV, targets_BT, weights_BT, chunk, with_gradient, vocab_axis)
        nll = jax.lax.psum(nll, shared)
        if not with_gradient:
            return nll
        dh = jax.lax.psum(dh, vocab_axis) if vocab_axis else dh
        dw = jax.lax.psum(sharding.scatter(dw, spec, kept=("tensor",), dtype=h_BTD.dtype), "data")
        return jax.lax.optimization_barrier((nll, dh, dw))  # or the whole dw waits until the backward pass is over

    outs = (PartitionSpec(), hidden, spec) if with_gradient else PartitionSpec()
    call = jax.shard_map(local, in_specs=(hidden, spec, tokens, tokens), out_specs=outs, check_vma=False)
    result = call(h_BTD, w_DV, targets_BT, weights_BT)
    return result if with_gradient else (result, None, None)


def _chunk_loss(h_BCD, w_DV, target_BC, weight_BC, with_gradient: bool, vocab_axis: str | None):
    """The loss of one chunk; where vocab_axis names a mesh axis, w_DV is this device's part of the vocabulary."""
    z_BCV = jnp.einsum("bcd,dv->bcv", h_BCD, w_DV, preferred_element_type=jnp.float32)
    largest_BC1 = jnp.max(z_BCV, axis=-1, keepdims=True)
    largest_BC1 = jax.lax.pmax(largest_BC1, vocab_axis) if vocab_axis else largest_BC1
    exp_BCV = jnp.exp(z_BCV - largest_BC1)
    total_BC1 = jnp.sum(exp_BCV, axis=-1, keepdims=True)
    if vocab_axis:
        total_BC1 = jax.lax.psum(total_BC1, vocab_axis)
        target_BC = target_BC - jax.lax.axis_index(vocab_axis) * w_DV.shape[1]  # elsewhere: out of range
        here_BC = (target_BC >= 0) & (target_BC < w_DV.shape[1])
        z_target_BC = jnp.take_along_axis(z_BCV, target_BC[..., None], axis=-1, mode="clip")[..., 0]
        z_target_BC = jax.lax.psum(jnp.where(here_BC, z_target_BC, 0.0), vocab_axis)
    else:
        z_target_BC = jnp.take_along_axis(z_BCV, target_BC[..., None], axis=-1)[..., 0]
    nll_BC = jnp.log(total_BC1)[..., 0] + largest_BC1[..., 0] - z_target_BC
    nll_sum = jnp.sum(jnp.where(weight_BC > 0, nll_BC * weight_BC, 0.0))
    if not with_gradient:
        return nll_sum, None, None
    is_target_BCV = target_BC[..., None] == jnp.arange(w_DV.shape[1])
    dz_BCV = exp_BCV * (weight_BC[..., None] / total_BC1) - jnp.where(is_target_BCV, weight_BC[..., None], 0.0)
    dz_BCV = dz_BCV.astype(h_BCD.dtype)
    dh_BCD = einsum("bcv,dv->bcd", dz_BCV, w_DV)
    dw_DV = jnp.einsum("bcd,bcv->dv", h_BCD, dz_BCV, preferred_element_type=jnp.float32)
    return nll_sum, dh_BCD, dw_DV


def _over_chunks(h_BTD, w_DV, targets_BT, weights_BT, chunk: int, with_gradient: bool, vocab_axis: str | None = None):
    """(sum of the loss, dh_BTD, dw_DV), the gradients None unless asked for."""
    T = h_BTD.shape[1]
    missing = -T % chunk

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))

    inputs = pad(h_BTD), pad(targets_BT), pad(weights_BT)
    compute_w_DV = w_DV.astype(h_BTD.dtype)

    def body(i, carry):
        nll_sum, dh_BTD, dw_DV = carry
        h, target, weight = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in inputs)
        nll, dh, dw = _chunk_loss(h, compute_w_DV, target, weight, with_gradient, vocab_axis)
        if with_gradient:
            dh_BTD = jax.lax.dynamic_update_slice_in_dim(dh_BTD, dh, i * chunk, axis=1)
            dw_DV += dw
        return nll_sum + nll, dh_BTD, dw_DV

    gradients = (jnp.zeros_like(inputs[0]), jnp.zeros(w_DV.shape, jnp.float32)) if with_gradient else (None, None)
    nll_sum, dh_BTD, dw_DV = jax.lax.fori_loop(0, (T + missing) // chunk, body, (jnp.float32(0), *gradients))
    return nll_sum, dh_BTD[:, :T] if with_gradient else None, dw_DV


def _forward(h_BTD, w_DV, targets_BT, weights_BT, chunk):
    nll_sum, dh_BTD, dw_DV = _over_devices(h_BTD, w_DV, targets_BT, weights_BT, chunk, with_gradient=True)
    return nll_sum, (dh_BTD, dw_DV.astype(w_DV.dtype))


def _backward(chunk, residuals, g):
    return *((g * gradient).astype(gradient.dtype) for gradient in residuals), None, None


cross_entropy.defvjp(_forward, _backward)
