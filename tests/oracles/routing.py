"""Routing, balance losses and token dropping of DeepSeekMoE in NumPy, one token at a time (paper.md, section 2).

`config` is any object with routed_experts, experts_per_token, groups, groups_kept, routed_scaling, normalize_gates.
"""

from decimal import Decimal

import numpy as np

from oracles.layers import softmax


def affinities(y_TD, centroids_DE):
    return softmax(np.asarray(y_TD, np.float64) @ np.asarray(centroids_DE, np.float64))


def choose(scores_E, config):
    """The K experts of one token, best first: top-K of the M groups with the best experts; ties to the lowest index."""
    per_group = config.routed_experts // config.groups
    best_G = [max(scores_E[g * per_group : (g + 1) * per_group]) for g in range(config.groups)]
    kept = sorted(range(config.groups), key=lambda g: (-best_G[g], g))[: config.groups_kept]
    allowed = [e for e in range(config.routed_experts) if e // per_group in kept]
    return sorted(allowed, key=lambda e: (-scores_E[e], e))[: config.experts_per_token]


def route(scores_TE, config):
    """(chosen experts, their gates), both [T, K]. Gates are s * routed_scaling, or s / sum(s) where normalised."""
    chosen_TK = np.array([choose(row_E, config) for row_E in scores_TE], int).reshape(-1, config.experts_per_token)
    gates_TK = np.take_along_axis(np.asarray(scores_TE, np.float64), chosen_TK, 1)
    if config.normalize_gates:
        return chosen_TK, gates_TK / gates_TK.sum(1, keepdims=True)
    return chosen_TK, gates_TK * config.routed_scaling


def balance_losses(scores_TE, chosen_TK, config):
    """Expert, device and communication loss of one sequence, without their coefficients. No row may be padding."""
    tokens, experts, groups = len(scores_TE), config.routed_experts, config.groups
    if tokens == 0:
        return np.zeros(3)
    p_E = np.asarray(scores_TE, np.float64).mean(0)
    group_of = [e // (experts // groups) for e in range(experts)]
    f_E, sent_D = np.zeros(experts), np.zeros(groups)
    for chosen_K in chosen_TK:
        for e in chosen_K:
            f_E[e] += experts / (config.experts_per_token * tokens)
        for d in {group_of[e] for e in chosen_K}:
            sent_D[d] += groups / (config.groups_kept * tokens)
    p_D = [sum(p_E[e] for e in range(experts) if group_of[e] == d) for d in range(groups)]
    f_D = [np.mean([f_E[e] for e in range(experts) if group_of[e] == d]) for d in range(groups)]
    return np.array([f_E @ p_E, np.dot(f_D, p_D), np.dot(sent_D, p_D)])


def keep(scores_TE, chosen_TK, config, capacity_factor, protected=False):
    """[T, K] bool: the assignments of one sequence that stay. No row may be padding.

    Each group takes ceil(factor T K / D) assignments; beyond it the lowest affinities go, of equals the later token.
    """
    tokens, k = np.shape(chosen_TK)
    kept_TK = np.ones((tokens, k), bool)
    if protected:
        return kept_TK
    share = Decimal(str(capacity_factor)) * tokens * k  # binary 1.2 times 50 x 6 / 8 need not be 45
    budget = int(share // config.groups) + (share % config.groups > 0)
    per_group = config.routed_experts // config.groups
    for d in range(config.groups):
        mine = [(t, j) for t in range(tokens) for j in range(k) if chosen_TK[t][j] // per_group == d]
        mine.sort(key=lambda tj: (-scores_TE[tj[0]][chosen_TK[tj[0]][tj[1]]], tj))
        for t, j in mine[budget:]:
            kept_TK[t, j] = False
    return kept_TK
