"""Routing as a pure function: affinities to experts, gates, balance losses, dropped tokens (report, section 2.2).

All in float32: the choice must not depend on the compute dtype.
"""

import functools
import math
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp

from dsv2_jax import sharding
from dsv2_jax.config import MoEConfig
from dsv2_jax.model.parallel import per_token, zigzag
from dsv2_jax.types import MoEStats, pytree


@pytree
class Routing:
    """The choices of [B, T] tokens. A choice that is not computed has expert E and gate 0."""

    expert_BTK: jax.Array  # int32
    gate_BTK: jax.Array  # float32
    stats: MoEStats


def choose(scores_BTE: jax.Array, config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Device-limited top-K: the K best of the experts in the M groups whose best expert scores highest (section 2.2.2).

    Returns the scores and the indices of K distinct experts, best first; equal scores go to the lower index.
    """
    if config.groups > 1:
        grouped_BTDE = scores_BTE.reshape(*scores_BTE.shape[:-1], config.groups, config.experts_per_group)
        _, kept_BTM = jax.lax.top_k(jnp.max(grouped_BTDE, axis=-1), config.groups_kept)
        kept_BTD = jnp.any(kept_BTM[..., None] == jnp.arange(config.groups), axis=-2)
        # Scores are not negative, so -1 never wins, even where the scores kept have underflowed to 0.
        scores_BTE = jnp.where(kept_BTD[..., None], grouped_BTDE, -1.0).reshape(scores_BTE.shape)
    return jax.lax.top_k(scores_BTE, config.experts_per_token)


def gates(chosen_BTK: jax.Array, config: MoEConfig) -> jax.Array:
    """g = s on the chosen experts: times the scaling factor, or divided by their sum, never both."""
    if config.normalize_gates:
        return chosen_BTK / (jnp.sum(chosen_BTK, axis=-1, keepdims=True) + 1e-20)
    return chosen_BTK * config.routed_scaling


def groups_reached(expert_BTK: jax.Array, real_BT: jax.Array, config: MoEConfig) -> jax.Array:
    """Boolean [B, T, D]: the device groups a token's hidden state must reach."""
    group_BTKD = expert_BTK[..., None] // config.experts_per_group == jnp.arange(config.groups)
    return jnp.any(group_BTKD, axis=2) & real_BT[..., None]


def balance_losses(scores_BTE: jax.Array, expert_BTK: jax.Array, real_BT: jax.Array, config: MoEConfig) -> jax.Array:
    """Expert, device, communication losses [B, 3] of every sequence, times their coefficients (equations 23 to 31)."""
    E, K, D, M = config.routed_experts, config.experts_per_token, config.groups, config.groups_kept
    T_B = jnp.maximum(jnp.sum(real_BT, axis=1), 1)[:, None]
    chosen_BTKE = (expert_BTK[..., None] == jnp.arange(E)) & real_BT[..., None, None]
    f_BE = E / (K * T_B) * jnp.sum(chosen_BTKE, axis=(1, 2))
    P_BE = jnp.sum(scores_BTE * real_BT[..., None], axis=1) / T_B
    f_BD = jnp.mean(f_BE.reshape(-1, D, E // D), axis=-1)
    P_BD = jnp.sum(P_BE.reshape(-1, D, E // D), axis=-1)
    sent_BD = D / (M * T_B) * jnp.sum(groups_reached(expert_BTK, real_BT, config), axis=1)
    losses = [jnp.sum(f_BE * P_BE, -1), jnp.sum(f_BD * P_BD, -1), jnp.sum(sent_BD * P_BD, -1)]
    coefficients = [config.balance.expert, config.balance.device, config.balance.communication]
    return jnp.stack([(alpha or 0.0) * loss for alpha, loss in zip(coefficients, losses, strict=True)], axis=-1)


def budget(config: MoEConfig, tokens: int) -> int:
    """ceil(factor T K / D): choices of one group computed in a sequence of T tokens. Exact: no rounding of 1.2."""
    factor = Fraction(str(config.dropping.capacity_factor))
    return math.ceil(factor * tokens * config.experts_per_token / config.groups)


def dropped(
    chosen_BTK: jax.Array, expert_BTK: jax.Array, real_BT: jax.Array, protected_B: jax.Array | None, config: MoEConfig
) -> jax.Array:
    """Boolean [B, T, K]: choices beyond their group's budget ceil(factor T K / D) in their sequence (section 2.2.4).

    Of the choices of one group and sequence the lowest affinities go first, among equals the later token's. Sequences
    in `protected_B` lose none.
    """
    B, T, K = expert_BTK.shape
    group_BA = jnp.where(real_BT[..., None], expert_BTK // config.experts_per_group, config.groups).reshape(B, T * K)
    affinity_BA = chosen_BTK.reshape(B, T * K)
    place_T = zigzag(T, sharding.axis_size("context"))  # of each column in its sequence
    pair_BA = jnp.broadcast_to((K * jnp.asarray(place_T)[:, None] + jnp.arange(K)).reshape(-1), (B, T * K))
    sorted_BA, _, pair_BA = jax.lax.sort((group_BA, -affinity_BA, pair_BA), dimension=1, num_keys=3)
    starts_here_BA = jnp.concatenate([jnp.ones((B, 1), bool), sorted_BA[:, 1:] != sorted_BA[:, :-1]], axis=1)
    place_BA = jnp.broadcast_to(jnp.arange(T * K), (B, T * K))
    rank_BA = place_BA - jax.lax.cummax(jnp.where(starts_here_BA, place_BA, 0), axis=1)
    budget_B = jnp.array([budget(config, n) for n in range(T + 1)], jnp.int32)[jnp.sum(real_BT, axis=1)]
    over_BA = (rank_BA >= budget_B[:, None]) & (sorted_BA < config.groups)
    over_BA = jnp.zeros((B, T * K), bool).at[jnp.arange(B)[:, None], pair_BA].set(over_BA)
    if protected_B is not None:
        over_BA &= ~protected_B[:, None]
    return over_BA.reshape(B, T, K)[:, place_T]


def route(
    logits_BTE: jax.Array,
    real_BT: jax.Array,
    config: MoEConfig,
    *,
    training: bool = False,
    protected_B: jax.Array | None = None,
) -> Routing:
    """Routes every token that is `real` (not padding); tokens are dropped in training only."""
    E = config.routed_experts
    chex.assert_shape(logits_BTE, (*real_BT.shape, E))
    scores_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    chosen_BTK, expert_BTK = per_token(functools.partial(choose, config=config), scores_BTE)
    computed_BTK = jnp.broadcast_to(real_BT[..., None], expert_BTK.shape)
    if training and config.dropping is not None:
        computed_BTK &= ~dropped(jax.lax.stop_gradient(chosen_BTK), expert_BTK, real_BT, protected_B, config)
    load_E = jnp.zeros(E, jnp.float32).at[expert_BTK].add(computed_BTK)
    assignments = jnp.sum(real_BT) * jnp.float32(config.experts_per_token)
    stats = MoEStats(
        load_E=load_E,
        assignments=assignments,
        dropped=assignments - jnp.sum(load_E),
        sends=jnp.sum(groups_reached(expert_BTK, real_BT, config), dtype=jnp.float32),
        crossed=jnp.float32(0),
        balance_3=jnp.sum(balance_losses(scores_BTE, expert_BTK, real_BT, config), axis=0),
        sequences=jnp.sum(jnp.any(real_BT, axis=1), dtype=jnp.float32),
    )
    return Routing(
        expert_BTK=jnp.where(computed_BTK, expert_BTK, E),
        gate_BTK=jnp.where(computed_BTK, gates(chosen_BTK, config), 0.0),
        stats=stats,
    )
