"""Layers of DeepSeek-V2 in NumPy float64, one obvious line each (paper.md, sections 1 and 2)."""

import numpy as np


def rms_norm(x_D, scale_D, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis."""
    x_D = np.asarray(x_D, np.float64)
    return x_D / np.sqrt((x_D**2).mean(-1, keepdims=True) + eps) * np.asarray(scale_D, np.float64)


def softmax(x_V):
    x_V = np.asarray(x_V, np.float64)
    e_V = np.exp(x_V - x_V.max(-1, keepdims=True))
    return e_V / e_V.sum(-1, keepdims=True)


def swiglu(x_D, gate_DF, up_DF, down_FD):
    """(silu(x W_gate) * (x W_up)) W_down."""
    gate_F = x_D @ np.asarray(gate_DF, np.float64)
    silu_F = gate_F / (1 + np.exp(-gate_F))
    return (silu_F * (x_D @ np.asarray(up_DF, np.float64))) @ np.asarray(down_FD, np.float64)


def cross_entropy(logits_BTV, targets_BT, weights_BT):
    """(weighted sum of -log p[target], sum of the weights), token by token."""
    total = weight = 0.0
    for b, t in np.ndindex(*np.shape(targets_BT)):
        row_V = np.asarray(logits_BTV[b][t], np.float64)
        logsumexp = row_V.max() + np.log(np.exp(row_V - row_V.max()).sum())
        total += float(weights_BT[b][t]) * (logsumexp - row_V[targets_BT[b][t]])
        weight += float(weights_BT[b][t])
    return total, weight
