"""Temperature, top-k and top-p in NumPy float64, by sorting (Holtzman et al. 2020)."""

import numpy as np


def softmax(x_V):
    e_V = np.exp(x_V - x_V.max())
    return e_V / e_V.sum()


def order(logits_V):
    """Tokens by falling logit, equals by rising index."""
    return sorted(range(len(logits_V)), key=lambda v: (-float(logits_V[v]), v))


def support(logits_V, temperature, top_k=None, top_p=None):
    """The tokens that may be drawn: the top-k, then the shortest prefix of these that holds top_p of their mass."""
    kept = order(logits_V)[:top_k]
    if top_p is None:
        return set(kept)
    mass = np.cumsum(softmax(np.asarray(logits_V, np.float64)[kept] / temperature))
    return set(kept[: 1 + int(np.sum(mass[:-1] < top_p))])


def probabilities(logits_V, temperature, top_k=None, top_p=None):
    """Of every token, 0 outside the support."""
    kept = sorted(support(logits_V, temperature, top_k, top_p))
    p_V = np.zeros(len(logits_V))
    p_V[kept] = softmax(np.asarray(logits_V, np.float64)[kept] / temperature)
    return p_V
