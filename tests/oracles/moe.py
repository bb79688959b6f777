"""The DeepSeekMoE layer and its grouped matmul in NumPy float64 (paper.md, section 2).

`w`: router [D,E], gate, up [E,D,F], down [E,F,D]; with shared experts also shared_gate, shared_up [D,S] and
shared_down [S,D].
"""

import numpy as np

from oracles.layers import swiglu
from oracles.routing import affinities, balance_losses, keep, route


def grouped_matmul(x_GD, w_EDF, sizes_E):
    """Rows in order of their group, each times its group's matrix; rows beyond the groups give zero."""
    out_GF = np.zeros((len(x_GD), w_EDF.shape[-1]))
    row = 0
    for e, size in enumerate(sizes_E):
        for _ in range(size):
            out_GF[row] = np.asarray(x_GD[row], np.float64) @ np.asarray(w_EDF[e], np.float64)
            row += 1
    return out_GF


def moe(w, config, y_TD, real_T, capacity_factor=None, protected=False):
    """One sequence through the layer: (FFN(y), the three balance losses, experts' loads, number dropped).

    Padding (real_T false) goes through the shared experts only.
    """
    y_TD = np.asarray(y_TD, np.float64)
    out_TD = np.zeros_like(y_TD)
    if config.shared_experts:
        out_TD += swiglu(y_TD, w["shared_gate"], w["shared_up"], w["shared_down"])
    real = np.flatnonzero(real_T)
    scores_TE = affinities(y_TD[real], w["router"])
    chosen_TK, gates_TK = route(scores_TE, config)
    kept_TK = np.ones(chosen_TK.shape, bool)
    if capacity_factor is not None:
        kept_TK = keep(scores_TE, chosen_TK, config, capacity_factor, protected)
    load_E = np.zeros(config.routed_experts)
    for row, t in enumerate(real):
        for e, gate, kept in zip(chosen_TK[row], gates_TK[row], kept_TK[row]):
            if kept:
                load_E[e] += 1
                out_TD[t] += gate * swiglu(y_TD[t], w["gate"][e], w["up"][e], w["down"][e])
    return out_TD, balance_losses(scores_TE, chosen_TK, config), load_E, int((~kept_TK).sum())
