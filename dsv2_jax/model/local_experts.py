"""What one device of a mesh computes: its routed experts on the rows that arrived, and the shared experts.

A row is expanded to one row for each of its experts here, in chunks of bounded size, so that no buffer grows with the
number of experts or of choices.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from dsv2_jax.config import ComputeConfig
from kernels_pallas.expert_ffn import expert_ffn
from kernels_pallas.projection import einsum
from kernels_pallas.swiglu import swiglu


@dataclasses.dataclass(frozen=True)
class Local:
    """What is known before tracing."""

    experts: int  # E / P
    choices: float  # of a row that arrives, how many are experts of this device, on average
    compute: ComputeConfig


def shared(weights: tuple[jax.Array, ...], x_TD: jax.Array) -> jax.Array:
    """The shared experts; over `tensor`, this device's share of the sum. 0 if there are none."""
    if not weights:
        return jnp.zeros_like(x_TD)
    with jax.named_scope("shared"):
        gate_DF, up_DF, down_FD = weights
        h_TF = swiglu(einsum("td,df->tf", x_TD, gate_DF), einsum("td,df->tf", x_TD, up_DF))
        return einsum("tf,fd->td", h_TF, down_FD)


def _over_chunks(local: Local, body, carry, expert_RK: jax.Array):
    """Folds `body(first, rows, expert_CK, pairs, carry)` over chunks of C rows with at most `pairs` choices in all.

    A chunk is rows [first, first + C); rows of it that belong to another chunk have no choices in `expert_CK`. There
    are as many chunks as the choices need: rows without any cost nothing. What two chunks are sure to hold is one:
    then nothing is added up over chunks.
    """
    (R, K), none = expert_RK.shape, local.experts
    if 2 * local.compute.expert_chunk >= R * K:
        return body(0, R, expert_RK, R * K, carry)
    pairs = max(local.compute.expert_chunk, K)
    C = min(R, -(-math.ceil(pairs / local.choices) // 8) * 8)
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


def _ffn(local: Local, expert_CK, most: int, x_CD, gate_CK, gate_EDF, up_EDF, down_EFD) -> jax.Array:
    """sum_i g_i FFN_i(x) over this device's experts."""
    compute = local.compute
    return expert_ffn(
        x_CD,
        expert_CK,
        gate_CK,
        gate_EDF,
        up_EDF,
        down_EFD,
        most=most,
        implementation=compute.expert_ffn,
        grouped_matmul=compute.grouped_matmul,
        token_dispatch=compute.token_dispatch,
    )


def _part(x_RD: jax.Array, first: jax.Array, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_RD, first, rows)


def _add(y_RD: jax.Array, first: jax.Array, y_CD: jax.Array) -> jax.Array:
    y_CD += _part(y_RD, first, y_CD.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(y_RD, y_CD, first, 0)


def routed(local: Local, x_RD, expert_RK, gate_RK, weights) -> jax.Array:
    """y_RD: of every row the gate-weighted sum over the experts it chose here, 0 if none."""

    def body(first, rows, expert_CK, pairs, y_RD):
        x_CD, gate_CK = _part(x_RD, first, rows), _part(gate_RK, first, rows)
        return _add(y_RD, first, _ffn(local, expert_CK, pairs, x_CD, gate_CK, *weights))

    return _over_chunks(local, body, jnp.zeros_like(x_RD), expert_RK)


def routed_backward(local: Local, x_RD, dy_RD, expert_RK, gate_RK, weights, dweights):
    """Cotangents of rows and gates, and `dweights` with those of the weights added, in the dtype of the weights."""

    def body(first, rows, expert_CK, pairs, carry):
        dx_RD, dgate_RK, dweights = carry
        ffn = functools.partial(_ffn, local, expert_CK, pairs)
        _, pull = jax.vjp(ffn, _part(x_RD, first, rows), _part(gate_RK, first, rows), *weights)
        dx_CD, dgate_CK, *dw = pull(_part(dy_RD, first, rows))
        dweights = tuple(total + part for total, part in zip(dweights, dw, strict=True))
        return _add(dx_RD, first, dx_CD), _add(dgate_RK, first, dgate_CK), dweights

    carry = jnp.zeros_like(x_RD), jnp.zeros_like(gate_RK), dweights
    return _over_chunks(local, body, carry, expert_RK)
