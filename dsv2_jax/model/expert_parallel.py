"""The routed experts on a mesh: experts over `expert`, tokens over the batch and context axes, widths over `tensor`.

With the axis `expert` as long as the model has device groups, device-limited routing bounds what crosses the wire: a
token's hidden state goes once to each device that holds any of its experts, at most M, and one gate-weighted sum comes
back from each (report, section 2.2.2). exchange.py moves the rows, local_experts.py computes with them.

Forward and backward are one `shard_map` each, tied by a `custom_vjp`: the backward pass sends hidden states and
cotangents, computes the experts' intermediate values again, and sends the hidden states' cotangents back. It keeps the
inputs only: five rows a (token, device) cross in all. Gradients of the weights are added up in float32 over the rows
of a chunk and over devices; between, and to travel, they are rounded to the compute dtype, as the weights are. (A
chunk is often all the rows of a device, and rarely less than half: two chunks' sum is rounded once, as it travels.)
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
from dsv2_jax.model import exchange, local_experts

TOKENS = sharding.activation_spec("batch", "sequence", None)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is known before tracing."""

    moe: MoEConfig
    compute: ComputeConfig
    mesh: AbstractMesh
    stored: tuple[PartitionSpec, ...]  # how the weights lie: gate, up, down of the routed experts, of the shared ones
    used: tuple[PartitionSpec, ...]  # how they are used

    @property
    def devices(self) -> int:
        return self.mesh.shape[exchange.AXIS]

    @property
    def local(self) -> local_experts.Local:
        choices = self.moe.experts_per_token / exchange.expected_devices(self.moe, self.devices)
        return local_experts.Local(self.moe.routed_experts // self.devices, choices, self.compute)

    @property
    def transport(self):
        """(pack, travel, collect)."""
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
    weights: tuple[nnx.Param, ...],
    moe: MoEConfig,
    compute: ComputeConfig,
) -> tuple[jax.Array, jax.Array]:
    """Shared and routed experts on the ambient mesh, [B, T, D], and how many rows crossed between devices.

    Args:
      expert_BTK: global expert numbers; E for a choice that is not computed (padding, dropped).
      weights: gate, up [E, D, F], down [E, F, D], stored as `sharding.parameter_spec` says; then, if there are shared
        experts, their gate, up [D, S], down [S, D].
    """
    mesh = sharding.ambient()
    axes = tuple(w.get_metadata("axes") for w in weights)
    stored = tuple(sharding.parameter_spec(names, w[...].shape, mesh) for names, w in zip(axes, weights, strict=True))
    setup = Setup(moe, compute, mesh, stored, tuple(map(sharding.compute_spec, axes)))
    B, T, _ = x_BTD.shape
    # Outside training a batch may not divide: a device without a token of its own still serves the others.
    more_B, more_T = -B % math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES), -T % mesh.shape["context"]
    if more_B or more_T:
        more = ((0, more_B), (0, more_T), (0, 0))
        x_BTD, gate_BTK = jnp.pad(x_BTD, more), jnp.pad(gate_BTK, more)
        expert_BTK = jnp.pad(expert_BTK, more, constant_values=moe.routed_experts)
    out_BTD, crossed = _moe_ffn(setup, x_BTD, expert_BTK, gate_BTK, tuple(w[...] for w in weights))
    return out_BTD[:B, :T], crossed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moe_ffn(setup: Setup, x_BTD, expert_BTK, gate_BTK, weights):
    forward = setup.map(_forward, (TOKENS, TOKENS, TOKENS, setup.stored), (TOKENS, PartitionSpec()))
    return forward(x_BTD, expert_BTK, gate_BTK, weights)


def _moe_ffn_forward(setup, *arguments):
    return _moe_ffn(setup, *arguments), arguments


def _moe_ffn_backward(setup, arguments, cotangents):
    inputs, outputs = (TOKENS, TOKENS, TOKENS, setup.stored, TOKENS), (TOKENS, TOKENS, setup.stored)
    dx_BTD, dgate_BTK, dweights = setup.map(_backward, inputs, outputs)(*arguments, cotangents[0])
    return dx_BTD, None, dgate_BTK, dweights


_moe_ffn.defvjp(_moe_ffn_forward, _moe_ffn_backward)


# --- on one device ---------------------------------------------------------------------------------------------------


def _kept(used: PartitionSpec) -> tuple[str, ...]:
    return tuple(name for name in used if name)


def _gather(setup: Setup, masters: tuple[jax.Array, ...], dtype) -> tuple[jax.Array, ...]:
    """Stored weights as they are used: cast, then gathered but for this device's experts and widths."""
    specs = zip(masters, setup.stored, setup.used, strict=True)
    return tuple(sharding.gather(sharding.cast(w, dtype), stored, _kept(used)) for w, stored, used in specs)


def _scatter(setup: Setup, dweights: tuple[jax.Array, ...], masters: tuple[jax.Array, ...], dtype):
    """The transpose of `_gather`: gradients cross in `dtype`, and are added up in float32 where the masters lie."""
    specs = zip(dweights, masters, setup.stored, setup.used, strict=True)
    return tuple(
        _add_copies(sharding.scatter(dw, stored, _kept(used), dtype), stored).astype(w.dtype)
        for dw, w, stored, used in specs
    )


def _enter(setup: Setup, x_BTD, expert_BTK, gate_BTK):
    """The tokens [T, D] of this device, their routes, S, and the number of rounds, the same on all devices."""
    (B, T, D), K = x_BTD.shape, setup.moe.experts_per_token
    routes = exchange.make_routes(expert_BTK.reshape(B * T, K), gate_BTK.reshape(B * T, K), setup.moe)
    rows = exchange.rows_per_peer(setup.moe, setup.devices, B, T, setup.compute.expert_slack)
    rounds = 1
    if rows < B * T:
        rounds = jnp.maximum(-(-jnp.max(routes.counts_PP) // rows), 1)
        rounds = jax.lax.pmax(rounds, sharding.MESH_AXES)
    return x_BTD.reshape(B * T, D), routes, functools.partial(exchange.make_round, routes, rows), rounds


def _over_rounds(setup: Setup, tokens, this_round, rounds, compute, carry, meanwhile):
    """Sends the vectors of `tokens` (a tuple of [T, D]) out, and adds up what comes back, in all rounds.

    Args:
      compute: round, the rows that arrived of each of `tokens`, carry -> rows to send back [R, D], carry.
      meanwhile: of `tokens`, independent of the exchange; the first rows travel while it is computed.

    Returns:
      The sum [T, D] in float32, the last carry, and what `meanwhile` gave.
    """
    pack, travel, collect = setup.transport

    # The scheduler is free to compute `meanwhile` at any time. It is between the two barriers, as the first rows are.
    packed, tokens_now = jax.lax.optimization_barrier(([pack(x_TD, this_round(0)) for x_TD in tokens], tokens))
    arrived = tuple(travel(part, this_round(0)) for part in packed)
    arrived, aside = jax.lax.optimization_barrier((arrived, meanwhile(*tokens_now)))
    total_TD = jnp.zeros(tokens[0].shape, jnp.float32)
    if isinstance(rounds, int):
        back_RD, carry = compute(this_round(0), arrived, carry)
        return collect(back_RD, this_round(0)), carry, aside

    def next_round(turn, arrived, back_RD, total_TD):
        here = this_round(turn)
        return tuple(travel(pack(x_TD, here), here) for x_TD in tokens), total_TD + collect(
            back_RD, this_round(turn - 1)
        )

    def step(turn, state):  # the experts are compiled once, the collectives of the usual single round lie outside
        *moving, carry = state
        arrived, total_TD = jax.lax.cond(turn > 0, next_round, lambda _, *same: (same[0], same[2]), turn, *moving)
        back_RD, carry = compute(this_round(turn), arrived, carry)
        return arrived, back_RD, total_TD, carry

    state = arrived, jnp.zeros_like(arrived[0]), total_TD, carry
    _, back_RD, total_TD, carry = jax.lax.fori_loop(0, rounds, step, state)
    return total_TD + collect(back_RD, this_round(rounds - 1)), carry, aside


def _forward(setup: Setup, x_BTD, expert_BTK, gate_BTK, masters):
    weights = _gather(setup, masters, x_BTD.dtype)
    meanwhile = functools.partial(local_experts.shared, weights[3:])
    if setup.devices == 1:
        x_TD, *choices = map(_rows, (x_BTD, expert_BTK, gate_BTK))
        out_TD, shared_TD = local_experts.routed(setup.local, x_TD, *choices, weights[:3]), meanwhile(x_TD)
        out_TD, sent = out_TD.astype(jnp.float32), jnp.zeros((), jnp.float32)
    else:
        x_TD, routes, this_round, rounds = _enter(setup, x_BTD, expert_BTK, gate_BTK)

        def compute(this, arrived, carry):
            choices = exchange.choices(this, setup.local.experts)
            return local_experts.routed(setup.local, *arrived, *choices, weights[:3]), carry

        out_TD, _, shared_TD = _over_rounds(setup, (x_TD,), this_round, rounds, compute, (), meanwhile)
        sent = jax.lax.psum(routes.sent, (*sharding.BATCH_AXES, "context"))
    out_TD = jax.lax.psum((out_TD + shared_TD).astype(x_BTD.dtype), "tensor")
    return out_TD.reshape(x_BTD.shape), sent


def _backward(setup: Setup, x_BTD, expert_BTK, gate_BTK, masters, dout_BTD):
    weights = _gather(setup, masters, x_BTD.dtype)
    zeros = tuple(map(jnp.zeros_like, weights[:3]))

    def meanwhile(x_TD, dout_TD):
        _, pull = jax.vjp(local_experts.shared, weights[3:], x_TD)
        return pull(dout_TD)

    if setup.devices == 1:
        x_TD, dout_TD, *choices = map(_rows, (x_BTD, dout_BTD, expert_BTK, gate_BTK))
        routed = local_experts.routed_backward(setup.local, x_TD, dout_TD, *choices, weights[:3], zeros)
        (dx_TD, dgate_TK, dweights), aside = routed, meanwhile(x_TD, dout_TD)
        dx_TD = dx_TD.astype(jnp.float32)
    else:
        x_TD, routes, this_round, rounds = _enter(setup, x_BTD, expert_BTK, gate_BTK)

        def compute(this, arrived, carry):
            dgate_PTK, dweights = carry
            choices = exchange.choices(this, setup.local.experts)
            dx_RD, dgate_RK, dweights = local_experts.routed_backward(
                setup.local, *arrived, *choices, weights[:3], dweights
            )
            return dx_RD, (dgate_PTK + exchange.to_choices(dgate_RK, this), dweights)

        carry, tokens = (jnp.zeros_like(routes.gate_PTK), zeros), (x_TD, _rows(dout_BTD))
        dx_TD, carry, aside = _over_rounds(setup, tokens, this_round, rounds, compute, carry, meanwhile)
        dgate_PTK, dweights = carry
        dgate_TK = exchange.gates_back(dgate_PTK)
    dshared, dx_shared_TD = aside
    dx_TD = jax.lax.psum((dx_TD + dx_shared_TD).astype(x_BTD.dtype), "tensor")
    dgate_TK = jax.lax.psum(dgate_TK, "tensor")
    dweights = _scatter(setup, (*dweights, *dshared), masters, x_BTD.dtype)
    return dx_TD.reshape(x_BTD.shape), dgate_TK.reshape(gate_BTK.shape), dweights


def _rows(x_BTK: jax.Array) -> jax.Array:
    return x_BTK.reshape(-1, x_BTK.shape[-1])


def _add_copies(dw: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over the mesh axes along which the stored weight is copied."""
    split = {name for names in spec for name in (names if isinstance(names, tuple) else (names,))}
    return jax.lax.psum(dw, tuple(axis for axis in sharding.MESH_AXES if axis not in split))
