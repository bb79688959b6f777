"""What the automatic partitioner would do badly, over all axes of the mesh by hand: embedding, top-K, attention.

Each function is the plain one where there is no ambient mesh (sharding.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from dsv2_jax import sharding
from dsv2_jax.sharding import activation_spec
from kernels_pallas.flash_attention import flash_attention

_HIDDEN = -1e30  # finite, so that no inf - inf arises
_LARGEST_BLOCK = 512  # queries, and keys, whose scores are held at once

# --- embedding -------------------------------------------------------------------------------------------------------


def embed(tokens_BT: jax.Array, table: nnx.Param, dtype) -> jax.Array:
    """The rows of `table` [V, D] for the tokens, as `dtype`.

    On a mesh the table stays where it is stored, split by columns: every device looks up its columns for the tokens of
    all that share the table, and an all-to-all brings each device all columns of its own tokens. That moves one
    activation instead of the table, and no device ever holds its gradient whole.
    """
    mesh, axes = sharding.ambient(), table.get_metadata("axes")
    if mesh is None:
        return table[tokens_BT].astype(dtype)
    if not sharding.divides(tokens_BT, "batch", "sequence"):
        return sharding.gathered(table[...], axes, dtype)[tokens_BT]
    spec = sharding.parameter_spec(axes, table.shape, mesh)
    split_vocab = mesh.shape["tensor"] > 1
    columns = spec[1] if isinstance(spec[1], tuple) else (spec[1],) if spec[1] else ()

    def lookup(tokens_BT, w):
        w = sharding.gather(w, PartitionSpec(spec[0], None), kept=("tensor",))
        tokens = tokens_BT
        for axis in columns:
            tokens = jax.lax.all_gather(tokens, axis)
        if split_vocab:
            tokens = tokens - jax.lax.axis_index("tensor") * w.shape[0]
            here = (tokens >= 0) & (tokens < w.shape[0])
            x = jnp.where(here[..., None], w[jnp.clip(tokens, 0, w.shape[0] - 1)], 0).astype(dtype)
            x = jax.lax.psum(x, "tensor")
        else:
            x = w[tokens].astype(dtype)
        for axis in reversed(columns):
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=x.ndim - 1, tiled=True)[0]
        return x

    rows = activation_spec("batch", "sequence")
    out = activation_spec("batch", "sequence", "embed")
    return jax.shard_map(lookup, in_specs=(rows, spec), out_specs=out)(tokens_BT, table[...])


def per_token(function, x_BTE: jax.Array):
    """`function` of x_BTE, which treats every token alone, each device its own: XLA has whole batches brought together
    for a top_k on CPUs and GPUs. Its results are [B, T, ...] too."""
    if sharding.ambient() is None or not sharding.divides(x_BTE, "batch", "sequence", None):
        return function(x_BTE)
    spec = activation_spec("batch", "sequence", None)
    return jax.shard_map(function, in_specs=spec, out_specs=spec)(x_BTE)


# --- attention -------------------------------------------------------------------------------------------------------


def attention(q_BTNH, k_BTKH, v_BTKV, segments_BT=None, *, scale: float, implementation: str) -> jax.Array:
    """`flash_attention` of whole sequences, each device on its rows and heads."""
    attend = functools.partial(flash_attention, scale=scale, implementation=implementation)
    if sharding.ambient() is None or not sharding.divides(q_BTNH, "batch", None, "heads", None):
        return attend(q_BTNH, k_BTKH, v_BTKV, segments_BT=segments_BT)
    heads, rows = activation_spec("batch", None, "heads", None), activation_spec("batch", None)
    segments = () if segments_BT is None else (segments_BT,)
    local = jax.shard_map(
        lambda q, k, v, *s: attend(q, k, v, segments_BT=s[0] if s else None),
        in_specs=(heads, heads, heads, *(rows for _ in segments)),
        out_specs=heads,
        check_vma=False,
    )
    return local(q_BTNH, k_BTKH, v_BTKV, *segments)


# --- sequences split over `context` ----------------------------------------------------------------------------------


def zigzag(length: int, devices: int) -> np.ndarray:
    """Which position of a sequence stands at each place when `devices` share it: device i holds the i-th and the
    i-th last of 2 `devices` equal pieces, so that all have the same number of (query, earlier key) pairs."""
    if devices == 1:
        return np.arange(length)
    pieces = np.arange(length).reshape(2 * devices, -1)
    order = [piece for i in range(devices) for piece in (i, 2 * devices - 1 - i)]
    return pieces[order].reshape(-1)


def block_list(length: int, devices: int, block: int) -> np.ndarray:
    """[devices, blocks, 3]: the (own query block, its place in the sequence, key block) that each device computes.

    All lists are of one length: with n blocks in each of the 2P pieces, (2P - 1) n^2 + n (n + 1).
    """
    places = zigzag(length, devices).reshape(devices, -1, block)[:, :, 0] // block
    lists = [[(own, place, key) for own, place in enumerate(row) for key in range(place + 1)] for row in places]
    return np.array(lists, np.int32)


def block_size(length: int, devices: int) -> int:
    """The largest block up to _LARGEST_BLOCK that a piece of the sequence is a whole number of."""
    piece = length // (2 * devices)
    return next(size for size in range(min(piece, _LARGEST_BLOCK), 0, -1) if piece % size == 0)


def context_attention(
    q_BTNH,
    own,
    own_names: tuple[str | None, ...],
    expand,
    segments_BT,
    *,
    scale: float,
    implementation: str,
    w: nnx.Param | None = None,
) -> jax.Array:
    """Causal attention where each device holds a zigzag share of every sequence.

    Only `own`, what the cache would hold of each token (MLA: the latents), crosses the axis `context`; each device
    expands all of it to the keys and values of its heads.

    Args:
      own: [B, T, ...], its dimensions' logical names in own_names.
      expand: (own of whole sequences, local part of w, how w is stored) -> (k_BSKH, v_BSKV). K divides N.
      implementation: as of `flash_attention`, of which there is one here: blocks of XLA.
      w: a parameter that `expand` needs.
    """
    if implementation not in ("auto", "xla"):
        reason = "sequences split over the mesh axis `context` are attended to by blocks of XLA"
        raise ValueError(f"flash_attention: implementation {implementation!r} cannot run: {reason}")
    mesh, length = sharding.ambient(), q_BTNH.shape[1]
    devices = mesh.shape["context"]
    block = block_size(length, devices)
    blocks, in_order = block_list(length, devices, block), np.argsort(zigzag(length, devices))
    weights = () if w is None else (w[...],)
    spec = None if w is None else sharding.parameter_spec(w.get_metadata("axes"), w.shape, mesh)

    def whole(x):
        return jnp.take(jax.lax.all_gather(x, "context", axis=1, tiled=True), in_order, axis=1)

    def local(q_BTNH, own, segments_BT, *weights):
        k_BSKH, v_BSKV = expand(whole(own), *weights, spec)
        group = q_BTNH.shape[2] // k_BSKH.shape[2]
        q = (q_BTNH * scale).astype(q_BTNH.dtype).swapaxes(1, 2)
        k, v = (jnp.repeat(x, group, axis=2).swapaxes(1, 2) for x in (k_BSKH, v_BSKV))
        mine = jnp.asarray(blocks)[jax.lax.axis_index("context")]
        return _attend(block, q, k, v, segments_BT, whole(segments_BT), mine).swapaxes(1, 2)

    if segments_BT is None:
        segments_BT = jnp.ones((q_BTNH.shape[0], length), jnp.int32)
    heads, rows = activation_spec("batch", "sequence", "heads", None), activation_spec("batch", "sequence")
    specs = (heads, activation_spec(*own_names), rows, *(spec for _ in weights))
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(q_BTNH, own, segments_BT, *weights)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _part(x, number, block: int, axis: int = 2):
    return jax.lax.dynamic_slice_in_dim(x, number * block, block, axis)


def _add(x, part, number, block: int):
    return jax.lax.dynamic_update_slice_in_dim(x, _part(x, number, block) + part, number * block, 2)


def _scores(block: int, q_BNTH, k_BNSH, segments_BT, segments_BS, entry_3):
    """Scores of one block of queries with one of keys, float32; those not visible are very low."""
    own, place, key = entry_3
    s = _einsum("bnth,bnsh->bnts", _part(q_BNTH, own, block), _part(k_BNSH, key, block))
    visible = (place * block + jnp.arange(block))[:, None] >= key * block + jnp.arange(block)
    visible &= _part(segments_BT, own, block, 1)[:, :, None] == _part(segments_BS, key, block, 1)[:, None]
    return jnp.where(visible[:, None], s, _HIDDEN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block, q_BNTH, k_BNSH, v_BNSV, segments_BT, segments_BS, blocks_L3):
    """Attention over a list of blocks with a running softmax; FlashAttention-2 (arXiv 2307.08691), by blocks of XLA."""
    return _attend_forward(block, q_BNTH, k_BNSH, v_BNSV, segments_BT, segments_BS, blocks_L3)[0]


def _attend_forward(block, q_BNTH, k_BNSH, v_BNSV, segments_BT, segments_BS, blocks_L3):
    def body(i, carry):
        own, _, key = blocks_L3[i]
        o, largest, total = (_part(x, own, block) for x in carry)
        s = _scores(block, q_BNTH, k_BNSH, segments_BT, segments_BS, blocks_L3[i])
        higher = jnp.maximum(largest, jnp.max(s, axis=-1, keepdims=True))
        p, shrink = jnp.exp(s - higher), jnp.exp(largest - higher)
        o = o * shrink + _einsum("bnts,bnsv->bntv", p.astype(v_BNSV.dtype), _part(v_BNSV, key, block))
        total = total * shrink + jnp.sum(p, axis=-1, keepdims=True)
        new = zip(carry, (o, higher, total), strict=True)
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, part, own * block, 2) for x, part in new)

    B, N, T, _ = q_BNTH.shape
    o = jnp.zeros((B, N, T, v_BNSV.shape[-1]), jnp.float32)
    largest, total = jnp.full((B, N, T, 1), _HIDDEN), jnp.zeros((B, N, T, 1))
    o, largest, total = jax.lax.fori_loop(0, len(blocks_L3), body, (o, largest, total))
    o_BNTV = (o / total).astype(q_BNTH.dtype)
    log_sum_BNT1 = largest + jnp.log(total)
    return o_BNTV, (q_BNTH, k_BNSH, v_BNSV, segments_BT, segments_BS, blocks_L3, o_BNTV, log_sum_BNT1)


def _attend_backward(block, residuals, do_BNTV):
    q_BNTH, k_BNSH, v_BNSV, segments_BT, segments_BS, blocks_L3, o_BNTV, log_sum_BNT1 = residuals
    delta_BNT1 = jnp.sum(o_BNTV.astype(jnp.float32) * do_BNTV, axis=-1, keepdims=True)

    def body(i, carry):
        dq, dk, dv = carry
        own, _, key = blocks_L3[i]
        q, do, log_sum, delta = (_part(x, own, block) for x in (q_BNTH, do_BNTV, log_sum_BNT1, delta_BNT1))
        k, v = _part(k_BNSH, key, block), _part(v_BNSV, key, block)
        p = jnp.exp(_scores(block, q_BNTH, k_BNSH, segments_BT, segments_BS, blocks_L3[i]) - log_sum)
        ds = (p * (_einsum("bntv,bnsv->bnts", do, v) - delta)).astype(q.dtype)
        dq = _add(dq, _einsum("bnts,bnsh->bnth", ds, k), own, block)
        dk = _add(dk, _einsum("bnts,bnth->bnsh", ds, q), key, block)
        return dq, dk, _add(dv, _einsum("bnts,bntv->bnsv", p.astype(do.dtype), do), key, block)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BNTH, k_BNSH, v_BNSV))
    dq, dk, dv = jax.lax.fori_loop(0, len(blocks_L3), body, zeros)
    return dq.astype(q_BNTH.dtype), dk.astype(k_BNSH.dtype), dv.astype(v_BNSV.dtype), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)
