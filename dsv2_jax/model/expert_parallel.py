"""The routed experts on a mesh: experts over `expert`, tokens over the batch and context axes, widths over `tensor`.

With the axis `expert` as long as the model has device groups, device-limited routing bounds what crosses the wire: a
token's hidden state goes once to each device that holds any of its experts, at most M, and one gate-weighted sum comes
back from each (report, section 2.2.2). exchange.py moves the rows; here each device computes its experts on those that
arrived. A row is expanded to one row per expert in chunks, so that no buffer grows with K or E.

Forward and backward are one `shard_map` each, tied by a `custom_vjp`: the backward pass sends hidden states and
cotangents, computes the experts' intermediate values again, and sends the hidden states' cotangents back. It keeps the
inputs only: five rows a (token, device) cross in all. Gradients of the weights are added up in float32 over the rows
of a device and over devices; between devices they travel in the compute dtype, as the weights do.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from dsv2_jax import sharding
from dsv2_jax.config import ComputeConfig, ConfigError, MoEConfig
from dsv2_jax.model import exchange
from dsv2_jax.model.layers import SwiGLU
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels_pallas.tiles import TileLayout, make_layout, tile_size
from kernels_pallas.token_dispatch import combine, dispatch

TOKENS = sharding.activation_spec("batch", "sequence", None)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is known before tracing."""

    moe: MoEConfig
    compute: ComputeConfig
    mesh: AbstractMesh
    stored: tuple[PartitionSpec, ...]  # of gate, up, down

    @property
    def devices(self) -> int:
        return self.mesh.shape[exchange.AXIS]

    @property
    def local_experts(self) -> int:
        return self.moe.routed_experts // self.devices

    @property
    def transport(self):
        """(send, collect)."""
        name, device = self.compute.expert_transport, self.mesh.abstract_device
        if name == "ragged" and device is not None and device.platform == "cpu":
            raise ConfigError("ComputeConfig.expert_transport='ragged': CPUs have no ragged_all_to_all; use 'stepwise'")
        return exchange.TRANSPORTS["stepwise" if name == "auto" else name]

    def map(self, function, inputs, outputs):
        """`function` on each device. It is differentiated by the custom_vjp alone, so nothing checks replication."""
        function = functools.partial(function, self)
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def moe_ffn(
    x_BTD: jax.Array,
    expert_BTK: jax.Array,
    gate_BTK: jax.Array,
    weights: tuple[nnx.Param, nnx.Param, nnx.Param],
    shared: SwiGLU | None,
    moe: MoEConfig,
    compute: ComputeConfig,
) -> tuple[jax.Array, jax.Array]:
    """shared(x) + sum_i g_i FFN_i(x) on the ambient mesh, [B, T, D], and how many rows crossed between devices.

    Args:
      expert_BTK: global expert numbers; E for a choice that is not computed (padding, dropped).
      weights: gate, up [E, D, F], down [E, F, D], stored as `sharding.parameter_spec` says.
      shared: the shared experts, if there are any; computed while rows travel.
    """
    mesh = sharding.ambient()
    stored = tuple(sharding.parameter_spec(w.get_metadata("axes"), w[...].shape, mesh) for w in weights)
    B, T, _ = x_BTD.shape
    # Outside training a batch may not divide: a device without a token of its own still serves the others.
    more_B, more_T = -B % math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES), -T % mesh.shape["context"]
    if more_B or more_T:
        more = ((0, more_B), (0, more_T), (0, 0))
        x_BTD, gate_BTK = jnp.pad(x_BTD, more), jnp.pad(gate_BTK, more)
        expert_BTK = jnp.pad(expert_BTK, more, constant_values=moe.routed_experts)
    weights = tuple(w[...] for w in weights)
    out_BTD, crossed = _moe_ffn(Setup(moe, compute, mesh, stored), x_BTD, expert_BTK, gate_BTK, weights, shared)
    return out_BTD[:B, :T], crossed


def _shared(shared: SwiGLU | None, x_BTD: jax.Array) -> jax.Array:
    with jax.named_scope("shared"):
        return jnp.zeros_like(x_BTD) if shared is None else shared(x_BTD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moe_ffn(setup: Setup, x_BTD, expert_BTK, gate_BTK, weights, shared):
    inputs, outputs = (TOKENS, TOKENS, TOKENS, setup.stored, TOKENS), (TOKENS, PartitionSpec())
    return setup.map(_forward, inputs, outputs)(x_BTD, expert_BTK, gate_BTK, weights, _shared(shared, x_BTD))


def _moe_ffn_forward(setup, *arguments):
    return _moe_ffn(setup, *arguments), arguments


def _moe_ffn_backward(setup, arguments, cotangents):
    x_BTD, expert_BTK, gate_BTK, weights, shared = arguments
    dout_BTD, _ = cotangents
    _, pull = jax.vjp(_shared, shared, x_BTD)
    dshared, dx_BTD = pull(dout_BTD)
    inputs, outputs = (TOKENS, TOKENS, TOKENS, setup.stored, TOKENS, TOKENS), (TOKENS, TOKENS, setup.stored)
    backward = setup.map(_backward, inputs, outputs)
    dx_BTD, dgate_BTK, dweights = backward(x_BTD, expert_BTK, gate_BTK, weights, dout_BTD, dx_BTD)
    return dx_BTD, None, dgate_BTK, dweights, dshared


_moe_ffn.defvjp(_moe_ffn_forward, _moe_ffn_backward)


# --- on one device ---------------------------------------------------------------------------------------------------


def _gather(setup: Setup, masters: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """This device's experts, whole but for `expert` and `tensor`."""
    pairs = zip(masters, setup.stored, strict=True)
    return tuple(sharding.gather(w, spec, kept=("expert", "tensor")) for w, spec in pairs)


def _enter(setup: Setup, x_BTD, expert_BTK, gate_BTK):
    """The tokens [T, D] of this device, their routes, S, and the number of rounds, the same on all devices."""
    (B, T, D), K = x_BTD.shape, setup.moe.experts_per_token
    routes = exchange.make_routes(expert_BTK.reshape(B * T, K), gate_BTK.reshape(B * T, K), setup.moe)
    rows = exchange.rows_per_peer(setup.moe, setup.devices, B, T, setup.compute.expert_slack)
    rounds = 1
    if rows < B * T:
        rounds = jnp.maximum(-(-jnp.max(routes.counts_PP) // rows), 1)
        rounds = jax.lax.pmax(rounds, sharding.MESH_AXES)
    return x_BTD.reshape(B * T, D), routes, rows, rounds


def _over_rounds(this_round, rounds, send, compute, collect, total_TD, carry, meanwhile_BTD):
    """Adds to `total_TD` what comes back in all rounds; also gives the last `carry`.

    Args:
      send, compute, collect: round -> received; round, received, carry -> results [R, D], carry; results, round ->
        what to add, [T, D].
      meanwhile_BTD: independent of all this; computed before the experts, so that the first rows travel meanwhile.
    """
    received, meanwhile_BTD = jax.lax.optimization_barrier((send(this_round(0)), meanwhile_BTD))
    if isinstance(rounds, int):
        results_RD, carry = compute(this_round(0), received, carry)
        return total_TD + collect(results_RD, this_round(0)), carry, meanwhile_BTD

    def next_round(turn, received, results_RD, total_TD):
        return send(this_round(turn)), total_TD + collect(results_RD, this_round(turn - 1))

    def first_round(turn, received, results_RD, total_TD):
        return received, total_TD

    def step(turn, state):  # the experts stand once in the program, the collectives of the only usual round outside
        received, results_RD, total_TD, carry = state
        received, total_TD = jax.lax.cond(turn > 0, next_round, first_round, turn, received, results_RD, total_TD)
        results_RD, carry = compute(this_round(turn), received, carry)
        return received, results_RD, total_TD, carry

    empty_RD = jnp.zeros_like(jax.tree.leaves(received)[0])
    _, results_RD, total_TD, carry = jax.lax.fori_loop(0, rounds, step, (received, empty_RD, total_TD, carry))
    return total_TD + collect(results_RD, this_round(rounds - 1)), carry, meanwhile_BTD


def _forward(setup: Setup, x_BTD, expert_BTK, gate_BTK, masters, shared_BTD):
    send, collect = setup.transport
    x_TD, routes, rows, rounds = _enter(setup, x_BTD, expert_BTK, gate_BTK)
    weights = _gather(setup, tuple(w.astype(x_BTD.dtype) for w in masters))

    def compute(this, x_RD, carry):
        return _experts(setup, x_RD, *exchange.choices(this, setup.local_experts), weights), carry

    this_round = functools.partial(exchange.make_round, routes, rows)
    total_TD = jnp.zeros(x_TD.shape, jnp.float32)
    send = functools.partial(send, x_TD)
    out_TD, _, shared_BTD = _over_rounds(this_round, rounds, send, compute, collect, total_TD, (), shared_BTD)
    out_BTD = shared_BTD + jax.lax.psum(out_TD.astype(x_BTD.dtype), "tensor").reshape(x_BTD.shape)
    return out_BTD, jax.lax.psum(routes.sent, (*sharding.BATCH_AXES, "context"))


def _backward(setup: Setup, x_BTD, expert_BTK, gate_BTK, masters, dout_BTD, dx_shared_BTD):
    send, collect = setup.transport
    x_TD, routes, rows, rounds = _enter(setup, x_BTD, expert_BTK, gate_BTK)
    dout_TD = dout_BTD.reshape(x_TD.shape)
    weights = _gather(setup, tuple(w.astype(x_BTD.dtype) for w in masters))

    def send_both(this):
        return send(x_TD, this), send(dout_TD, this)

    def compute(this, received, carry):
        dgate_PTK, dweights = carry
        choices = exchange.choices(this, setup.local_experts)
        dx_RD, dgate_RK, dweights = _experts_backward(setup, *received, *choices, weights, dweights)
        return dx_RD, (dgate_PTK + exchange.to_choices(dgate_RK, this), dweights)

    this_round = functools.partial(exchange.make_round, routes, rows)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    carry = zeros(routes.gate_PTK.shape), tuple(zeros(w.shape) for w in weights)
    dx_TD, carry, dx_shared_BTD = _over_rounds(
        this_round, rounds, send_both, compute, collect, zeros(x_TD.shape), carry, dx_shared_BTD
    )
    dgate_PTK, dweights = carry
    dx_BTD = dx_shared_BTD + jax.lax.psum(dx_TD.astype(x_BTD.dtype), "tensor").reshape(x_BTD.shape)
    dgate_TK = jax.lax.psum(exchange.gates_back(dgate_PTK), "tensor")
    dmasters = (
        _add_copies(sharding.scatter(dw.astype(x_BTD.dtype), spec, kept=("expert", "tensor")), spec)
        for dw, spec in zip(dweights, setup.stored, strict=True)
    )
    return dx_BTD, dgate_TK.reshape(gate_BTK.shape), tuple(d.astype(w.dtype) for d, w in zip(dmasters, masters))


def _add_copies(dw: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over the mesh axes along which the stored weight is copied."""
    split = {name for names in spec for name in (names if isinstance(names, tuple) else (names,))}
    return jax.lax.psum(dw, tuple(axis for axis in sharding.MESH_AXES if axis not in split))


# --- the experts of one device ---------------------------------------------------------------------------------------


def _over_chunks(setup: Setup, body, carry, expert_RK: jax.Array):
    """Folds `body(first, rows, expert_CK, pairs, carry)` over chunks of C rows with at most `pairs` choices in all.

    A chunk is rows [first, first + C); rows of it that belong to another chunk have no choices in `expert_CK`. There
    are as many chunks as the choices need: rows without any cost nothing.
    """
    (R, K), none = expert_RK.shape, setup.local_experts
    pairs = min(max(setup.compute.expert_chunk, K), R * K)
    likely = setup.moe.experts_per_token / exchange.expected_devices(setup.moe, setup.devices)  # choices of a row
    C = min(R, -(-math.ceil(pairs / likely) // 8) * 8)
    end_R = jnp.cumsum(jnp.sum(expert_RK < none, axis=1, dtype=jnp.int32))

    def step(state):
        done, carry = state
        start = jnp.searchsorted(end_R, done, side="right").astype(jnp.int32)
        stop = jnp.minimum(jnp.searchsorted(end_R, done + pairs, side="right").astype(jnp.int32), start + C)
        first = jnp.minimum(start, R - C)
        row_C = first + jnp.arange(C)
        expert_CK = jax.lax.dynamic_slice_in_dim(expert_RK, first, C)
        expert_CK = jnp.where(((row_C >= start) & (row_C < stop))[:, None], expert_CK, none)
        return end_R[stop - 1], body(first, C, expert_CK, pairs, carry)

    return jax.lax.while_loop(lambda state: state[0] < end_R[-1], step, (jnp.int32(0), carry))[1]


@jax.custom_vjp
def _gates_of_rows(gate_TK: jax.Array, layout: TileLayout) -> jax.Array:
    return gate_TK.at[layout.token_of_row_G, layout.choice_of_row_G].get(mode="fill", fill_value=0)


def _gates_forward(gate_TK, layout):
    return _gates_of_rows(gate_TK, layout), layout


def _gates_backward(layout, dgate_G):
    return exchange.take(dgate_G, layout.row_of_choice_TK), None


_gates_of_rows.defvjp(_gates_forward, _gates_backward)


def _ffn(setup: Setup, layout: TileLayout, x_CD, gate_CK, gate_EDF, up_EDF, down_EFD) -> jax.Array:
    """sum_i g_i FFN_i(x) over this device's experts. The gate scales h, so that backward needs no row of the output."""
    matmul, moving = setup.compute.grouped_matmul, setup.compute.token_dispatch
    x_GD = dispatch(x_CD, layout, implementation=moving)
    h_GF = grouped_swiglu(x_GD, gate_EDF, up_EDF, layout, implementation=matmul)
    h_GF = (_gates_of_rows(gate_CK, layout)[:, None] * h_GF.astype(jnp.float32)).astype(h_GF.dtype)
    o_GD = grouped_matmul(h_GF, down_EFD, layout, implementation=matmul)
    return combine(o_GD, jnp.ones_like(gate_CK), layout, implementation=moving)


def _layout(setup: Setup, expert_CK: jax.Array, pairs: int) -> TileLayout:
    return make_layout(expert_CK, setup.local_experts, tile_size(pairs, setup.local_experts), pairs)


def _part(x_RD: jax.Array, first: jax.Array, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_RD, first, rows)


def _add(y_RD: jax.Array, first: jax.Array, y_CD: jax.Array) -> jax.Array:
    y_CD += _part(y_RD, first, y_CD.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(y_RD, y_CD, first, 0)


def _experts(setup: Setup, x_RD, expert_RK, gate_RK, weights) -> jax.Array:
    """y_RD: of every row the gate-weighted sum over the experts it chose here, 0 if none."""

    def body(first, rows, expert_CK, pairs, y_RD):
        layout = _layout(setup, expert_CK, pairs)
        return _add(y_RD, first, _ffn(setup, layout, _part(x_RD, first, rows), _part(gate_RK, first, rows), *weights))

    return _over_chunks(setup, body, jnp.zeros_like(x_RD), expert_RK)


def _experts_backward(setup: Setup, x_RD, dy_RD, expert_RK, gate_RK, weights, dweights):
    """Cotangents of rows and gates, and `dweights` (float32) with those of the weights added."""

    def body(first, rows, expert_CK, pairs, carry):
        dx_RD, dgate_RK, dweights = carry
        ffn = functools.partial(_ffn, setup, _layout(setup, expert_CK, pairs))
        _, pull = jax.vjp(ffn, _part(x_RD, first, rows), _part(gate_RK, first, rows), *weights)
        dx_CD, dgate_CK, *dw = pull(_part(dy_RD, first, rows))
        dweights = tuple(total + part for total, part in zip(dweights, dw, strict=True))
        return _add(dx_RD, first, dx_CD), _add(dgate_RK, first, dgate_CK), dweights

    carry = jnp.zeros_like(x_RD), jnp.zeros_like(gate_RK), dweights
    return _over_chunks(setup, body, carry, expert_RK)
