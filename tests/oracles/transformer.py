"""The whole transformer in NumPy float64, a row at a time (paper.md, section 1).

`w`: embed [V,D], norm [D], unembed [D,V], blocks: a list of dicts with attention_norm [D],
attention (oracles.attention), ffn_norm [D], and either ffn {gate, up [D,F], down [F,D]} or moe (oracles.moe).
"""

import numpy as np

from oracles.attention import gqa, mla
from oracles.layers import rms_norm, swiglu
from oracles.moe import moe


def features(w, config, tokens_T, segments_T, positions_T, capacity_factor=None, protected=False):
    """Hidden states of one row after the final norm, and the balance losses of each MoE layer."""
    x_TD = np.asarray(w["embed"], np.float64)[tokens_T]
    balance = []
    for block in w["blocks"]:
        y_TD = rms_norm(x_TD, block["attention_norm"], config.norm_eps)
        if config.attention.kind == "mla":
            x_TD = x_TD + mla(block["attention"], config.attention, y_TD, segments_T, positions_T, config.norm_eps)
        else:
            x_TD = x_TD + gqa(block["attention"], config.attention, y_TD, segments_T, positions_T)
        y_TD = rms_norm(x_TD, block["ffn_norm"], config.norm_eps)
        if "moe" in block:
            real_T = np.asarray(segments_T) > 0
            out_TD, losses, _, _ = moe(block["moe"], config.moe, y_TD, real_T, capacity_factor, protected)
            balance.append(losses)
        else:
            out_TD = swiglu(y_TD, block["ffn"]["gate"], block["ffn"]["up"], block["ffn"]["down"])
        x_TD = x_TD + out_TD
    return rms_norm(x_TD, w["norm"], config.norm_eps), np.array(balance)


def logits(w, config, tokens_T, segments_T, positions_T):
    h_TD, _ = features(w, config, tokens_T, segments_T, positions_T)
    return h_TD @ np.asarray(w["unembed"], np.float64)
