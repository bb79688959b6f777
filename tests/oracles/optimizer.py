"""One AdamW step in NumPy float64 (paper.md, section 4): decay on matrices only, gradients clipped by global norm."""

import numpy as np


def adamw(w, g, m, v, step, lr, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0):
    """(weights, first moments, second moments) after update number `step` >= 1; all lists of arrays."""
    norm = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in g))
    shrink = 1.0 if clip_norm is None or norm <= clip_norm else clip_norm / norm
    out = []
    for wi, gi, mi, vi in zip(w, g, m, v):
        gi = np.asarray(gi, np.float64) * shrink
        mi, vi = b1 * mi + (1 - b1) * gi, b2 * vi + (1 - b2) * gi**2
        update = (mi / (1 - b1**step)) / (np.sqrt(vi / (1 - b2**step)) + eps)
        decay = weight_decay if np.ndim(wi) >= 2 else 0.0
        out.append((np.asarray(wi, np.float64) - lr * (update + decay * wi), mi, vi))
    return tuple(list(x) for x in zip(*out))
