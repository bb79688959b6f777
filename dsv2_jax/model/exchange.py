"""Hidden states to the devices that hold their experts, and what those made of them back: one row per (token, device).

All of this runs inside `jax.shard_map`, on one of the P devices of the mesh axis `expert`; device p holds the experts
[p E/P, (p+1) E/P). A device counts its peers in steps: in step s device `me` sends to (me + s) % P and receives from
(me - s) % P; step 0 is itself.

Rows travel in rounds, in each at most S from one device to one other, so that a buffer has P S rows however uneven the
routing is. What does not fit goes in the next round: nothing is lost. S is such that one round is the rule.
"""

import math

import jax
import jax.numpy as jnp

from dsv2_jax.config import MoEConfig
from dsv2_jax.model.router import budget
from dsv2_jax.types import pytree

AXIS = "expert"


# --- bounds ----------------------------------------------------------------------------------------------------------


def most_devices(config: MoEConfig, devices: int) -> int:
    """M: to how many devices one token can go, at most min(K, P) and no more than hold the device groups kept."""
    local, group = config.routed_experts // devices, config.experts_per_group
    if local % group == 0:
        spanned = 1
    elif group % local == 0:
        spanned = group // local
    else:
        spanned = -(-(group - 1) // local) + 1
    return min(config.experts_per_token, devices, config.groups_kept * spanned)


def expected_devices(config: MoEConfig, devices: int) -> float:
    """To how many devices a token goes if all experts are as likely: P (1 - (1 - 1/P)^K), and at most M."""
    even = devices * (1 - (1 - 1 / devices) ** config.experts_per_token)
    return min(even, most_devices(config, devices))


def rows_per_peer(config: MoEConfig, devices: int, sequences: int, length: int, slack: float) -> int:
    """S: rows from one device to one other in a round, of its sequences x length local tokens.

    The even share times `slack`; with token dropping no more than the budget of the groups on one device: only
    protected sequences send more, in further rounds.
    """
    tokens = sequences * length
    if devices == 1:
        return tokens
    rows = math.ceil(slack * tokens * expected_devices(config, devices) / devices)
    if config.dropping is not None:
        rows = min(rows, sequences * budget(config, length) * -(-config.groups // devices))
    return min(tokens, -(-rows // 8) * 8)


# --- who sends what to whom ------------------------------------------------------------------------------------------


@pytree
class Routes:
    """What one device knows of its own T tokens and of those of its peers; but for `counts_PP`, axis P counts steps."""

    counts_PP: jax.Array  # int32: rows from device (first axis) to device (second axis), by number
    token_PT: jax.Array  # int32: my tokens that go out in each step, ascending; then T
    place_TM: jax.Array  # int32: where my token stands in `token_PT` (step T + index), ascending; then P T
    arrived_PT: jax.Array  # int32: the peer's tokens that come to me, ascending; then T
    index_PT: jax.Array  # int32: where the peer's token stands in `arrived_PT`; T if it does not come
    expert_PTK: jax.Array  # int32: my expert that the peer's token chose, 0 .. E/P - 1; E/P for any other
    gate_PTK: jax.Array  # float32

    @property
    def sent(self) -> jax.Array:
        """Rows of mine that cross to another device (float32)."""
        me = jax.lax.axis_index(AXIS)
        return (jnp.sum(self.counts_PP[me]) - self.counts_PP[me, me]).astype(jnp.float32)


def make_routes(expert_TK: jax.Array, gate_TK: jax.Array, config: MoEConfig) -> Routes:
    """Every device learns all choices (an all-gather of 8 K bytes a token), so that both sides of a row agree on it."""
    P, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    T, local, step_P = expert_TK.shape[0], config.routed_experts // P, jnp.arange(P, dtype=jnp.int32)
    expert_PTK, gate_PTK = jax.lax.all_gather((expert_TK, gate_TK), AXIS)
    reached_PTP = jnp.any((expert_PTK // local)[..., None] == step_P, axis=2)
    mine_PT = reached_PTP[me].T[(me + step_P) % P]
    theirs_PT = reached_PTP[:, :, me][(me - step_P) % P]
    expert_PTK = expert_PTK[(me - step_P) % P] - me * local

    def ascending(goes_PT):
        return jnp.sort(jnp.where(goes_PT, jnp.arange(T, dtype=jnp.int32), T), axis=1)

    def index(goes_PT):
        return jnp.cumsum(goes_PT, axis=1, dtype=jnp.int32) - 1

    place_PT = jnp.where(mine_PT, step_P[:, None] * T + index(mine_PT), P * T)
    return Routes(
        counts_PP=jnp.sum(reached_PTP, axis=1, dtype=jnp.int32),
        token_PT=ascending(mine_PT),
        place_TM=jnp.sort(place_PT.T, axis=1)[:, : most_devices(config, P)],
        arrived_PT=ascending(theirs_PT),
        index_PT=jnp.where(theirs_PT, index(theirs_PT), T),
        expert_PTK=jnp.where((expert_PTK >= 0) & (expert_PTK < local), expert_PTK, local),
        gate_PTK=gate_PTK[(me - step_P) % P],
    )


# --- one round -------------------------------------------------------------------------------------------------------


@pytree
class Round:
    """The part [turn S, (turn + 1) S) of every list of tokens. R = P S rows arrive, those of step s from row s S on."""

    routes: Routes
    turn: jax.Array  # int32
    token_PS: jax.Array  # int32: mine that go out; T for none
    arrived_PS: jax.Array  # int32: theirs that come; T for none


def make_round(routes: Routes, rows: int, turn: jax.Array | int) -> Round:
    def part(table_PT):
        T = table_PT.shape[1]
        table_PT = jnp.pad(table_PT, ((0, 0), (0, -T % rows)), constant_values=T)
        return jax.lax.dynamic_slice_in_dim(table_PT, turn * rows, rows, axis=1)

    return Round(routes, jnp.int32(turn), part(routes.token_PT), part(routes.arrived_PT))


def take(x: jax.Array, index: jax.Array, fill=0) -> jax.Array:
    """x[index] along the first axis; `fill` beyond its end."""
    return x.at[index].get(mode="fill", fill_value=fill)


def choices(this: Round, none: int) -> tuple[jax.Array, jax.Array]:
    """My experts and their gates [R, K] for the rows that arrive; `none` and 0 where a choice is not mine."""
    P, T, K = this.routes.expert_PTK.shape
    row_R = jnp.where(this.arrived_PS < T, jnp.arange(P)[:, None] * T + this.arrived_PS, P * T).reshape(-1)
    expert_RK = take(this.routes.expert_PTK.reshape(P * T, K), row_R, none)
    return expert_RK, take(this.routes.gate_PTK.reshape(P * T, K), row_R)


def to_choices(y_RK: jax.Array, this: Round) -> jax.Array:
    """The transpose of `choices`: what belongs to arrived rows, laid out as the peers' tokens [P, T, K]; else 0."""
    (P, S), index_PT = this.arrived_PS.shape, this.routes.index_PT - this.turn * this.arrived_PS.shape[1]
    row_PT = jnp.where((index_PT >= 0) & (index_PT < S), jnp.arange(P)[:, None] * S + index_PT, P * S)
    return take(y_RK, row_PT)


def gates_back(dgate_PTK: jax.Array) -> jax.Array:
    """The transpose of sending gates out: of my tokens' gates [T, K] what all devices found, from peers in steps."""
    P, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    dgate_PTK = dgate_PTK[(me - jnp.arange(P)) % P]  # step s is device me - s: the same permutation undoes itself
    return jax.lax.psum_scatter(dgate_PTK, AXIS)


def _sum_of(y_GD: jax.Array, row_TM: jax.Array) -> jax.Array:
    return sum(take(y_GD, row_T).astype(jnp.float32) for row_T in row_TM.T)


def _step_and_row(this: Round) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of my tokens' M places: the step, the row among those sent in it, and whether it is in this round."""
    T, S = this.routes.token_PT.shape[1], this.token_PS.shape[1]
    step_TM, row_TM = this.routes.place_TM // T, this.routes.place_TM % T - this.turn * S
    return step_TM, row_TM, (step_TM < this.token_PS.shape[0]) & (row_TM >= 0) & (row_TM < S)


# --- stepwise: P - 1 permutes of S rows, which run everywhere and while something else is computed --------------------


def _permute(x: jax.Array, steps: int) -> jax.Array:
    P = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(p, (p + steps) % P) for p in range(P)]) if steps else x


def stepwise_pack(x_TD: jax.Array, this: Round) -> list[jax.Array]:
    """My tokens' vectors [S, D] for each step; zeros behind them."""
    return [take(x_TD, token_S) for token_S in this.token_PS]


def stepwise_travel(packed: list[jax.Array], this: Round) -> jax.Array:
    """The rows [R, D] that arrive here, in the order of `choices`; zeros in between."""
    return jnp.concatenate([_permute(x_SD, s) for s, x_SD in enumerate(packed)])


def stepwise_collect(y_RD: jax.Array, this: Round) -> jax.Array:
    """The transpose of both: rows back where they came from, and there added up by token, float32 [T, D]."""
    P, S = this.token_PS.shape
    y_GD = jnp.concatenate([_permute(y_SD, -s) for s, y_SD in enumerate(y_RD.reshape(P, S, -1))])
    step_TM, row_TM, now_TM = _step_and_row(this)
    return _sum_of(y_GD, jnp.where(now_TM, step_TM * S + row_TM, P * S))


# --- ragged: one collective with the exact bytes, on TPU and GPU ------------------------------------------------------


def _sizes(this: Round) -> tuple[jax.Array, jax.Array]:
    """Rows [P, P] from device to device in this round, and where they start among all that the first one sends."""
    S = this.token_PS.shape[1]
    n_PP = jnp.clip(this.routes.counts_PP - this.turn * S, 0, S)
    return n_PP, jnp.cumsum(n_PP, axis=1, dtype=jnp.int32) - n_PP


def _send_rows(this: Round) -> int:
    """G: rows of the send operand, at most M a token."""
    return min(this.token_PS.size, this.routes.place_TM.size)


def ragged_pack(x_TD: jax.Array, this: Round) -> jax.Array:
    """My tokens' vectors [G, D], without gaps, ordered by the receiver's number."""
    (P, S), me = this.token_PS.shape, jax.lax.axis_index(AXIS)
    n_PP, first_PP = _sizes(this)
    row_G = jnp.arange(_send_rows(this), dtype=jnp.int32)
    to_G = jnp.searchsorted(first_PP[me] + n_PP[me], row_G, side="right")
    place_G = (to_G - me) % P * S + row_G - take(first_PP[me], to_G)
    return take(x_TD, take(this.token_PS.reshape(-1), jnp.where(to_G < P, place_G, P * S), x_TD.shape[0]))


def ragged_travel(packed_GD: jax.Array, this: Round) -> jax.Array:
    """As `stepwise_travel`."""
    (P, S), me = this.token_PS.shape, jax.lax.axis_index(AXIS)
    n_PP, first_PP = _sizes(this)
    start_P = (jnp.arange(P, dtype=jnp.int32) - me) % P * S  # in the receiver's buffer
    empty_RD = jnp.zeros((P * S, packed_GD.shape[1]), packed_GD.dtype)
    sizes = first_PP[me], n_PP[me], start_P, n_PP[:, me]
    return jax.lax.ragged_all_to_all(packed_GD, empty_RD, *sizes, axis_name=AXIS)


def ragged_collect(y_RD: jax.Array, this: Round) -> jax.Array:
    """As `stepwise_collect`."""
    (P, S), me = this.token_PS.shape, jax.lax.axis_index(AXIS)
    n_PP, first_PP = _sizes(this)
    start_P = (me - jnp.arange(P, dtype=jnp.int32)) % P * S  # in my buffer
    empty_GD = jnp.zeros((_send_rows(this), y_RD.shape[1]), y_RD.dtype)
    sizes = start_P, n_PP[:, me], first_PP[:, me], n_PP[me]
    y_GD = jax.lax.ragged_all_to_all(y_RD, empty_GD, *sizes, axis_name=AXIS)
    step_TM, row_TM, now_TM = _step_and_row(this)
    row_TM = take(first_PP[me], (me + step_TM) % P) + row_TM
    return _sum_of(y_GD, jnp.where(now_TM, row_TM, y_GD.shape[0]))


TRANSPORTS = {
    "stepwise": (stepwise_pack, stepwise_travel, stepwise_collect),
    "ragged": (ragged_pack, ragged_travel, ragged_collect),
}
