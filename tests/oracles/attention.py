"""Attention in NumPy float64: one head, one query at a time (paper.md, section 1).

`config` is any object with the settings read here; `w` a dict of arrays:
MLA  q_down [D,Q] q_norm [Q] (both absent without query compression), q_up [Q or D,N,H+P], kv_down [D,R], kv_norm [R],
     k_rope [D,P], k_up [R,N,H], v_up [R,N,Hv], out [N,Hv,D];   GQA  q [D,N,H], k [D,Nk,H], v [D,Nk,H], out [N,H,D].
"""

import numpy as np

from oracles.layers import rms_norm, softmax
from oracles.rope import rotate, softmax_scale


def attend(q_TNH, k_SKH, v_SKV, scale, visible_TS):
    """Softmax attention; query head n reads key head n // (N / K). A query that sees nothing gets zeros."""
    (t_len, heads, _), kv_heads = q_TNH.shape, k_SKH.shape[1]
    out_TNV = np.zeros((t_len, heads, v_SKV.shape[-1]))
    for t in range(t_len):
        seen = np.flatnonzero(visible_TS[t])
        for n in range(heads):
            if len(seen):
                k = n // (heads // kv_heads)
                p_S = softmax(k_SKH[seen, k] @ q_TNH[t, n] * scale)
                out_TNV[t, n] = p_S @ v_SKV[seen, k]
    return out_TNV


def causal(segments_T):
    """Token t sees tokens s <= t of its own segment."""
    return np.array(
        [[s <= t and segments_T[s] == segments_T[t] for s in range(len(segments_T))] for t in range(len(segments_T))]
    )


def mla(w, config, h_TD, segments_T, positions_T, eps=1e-6):
    """Multi-head Latent Attention, expanded to per-head keys and values."""
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    t_len, nope, rope = len(h_TD), config.nope_dim, config.rope_dim
    turn = [lambda x, p=p: rotate(x, p, config.rope_theta, config.yarn) for p in positions_T]
    query_TQ = rms_norm(h_TD @ w["q_down"], w["q_norm"], eps) if config.q_latent else h_TD
    q_TNH = np.einsum("tq,qnh->tnh", query_TQ, w["q_up"])
    c_TR = rms_norm(h_TD @ w["kv_down"], w["kv_norm"], eps)
    k_TNH = np.zeros((t_len, config.heads, nope + rope))
    v_TNV = np.einsum("tr,rnv->tnv", c_TR, w["v_up"])
    for t in range(t_len):
        shared_P = turn[t](h_TD[t] @ w["k_rope"])
        for n in range(config.heads):
            q_TNH[t, n, nope:] = turn[t](q_TNH[t, n, nope:])
            k_TNH[t, n] = np.concatenate([c_TR[t] @ w["k_up"][:, n], shared_P])
    o_TNV = attend(q_TNH, k_TNH, v_TNV, softmax_scale(nope + rope, config.yarn), causal(segments_T))
    return np.einsum("tnv,nvd->td", o_TNV, w["out"])


def gqa(w, config, h_TD, segments_T, positions_T):
    """Grouped-query attention; MHA and MQA are its ends."""
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    q_TNH, k_TKH, v_TKH = (np.einsum("td,dnh->tnh", h_TD, w[name]) for name in "qkv")
    for x_TNH in (q_TNH, k_TKH):
        for t, n in np.ndindex(*x_TNH.shape[:2]):
            x_TNH[t, n] = rotate(x_TNH[t, n], positions_T[t], config.rope_theta, config.yarn)
    o_TNH = attend(q_TNH, k_TKH, v_TKH, softmax_scale(config.head_dim, config.yarn), causal(segments_T))
    return np.einsum("tnh,nhd->td", o_TNH, w["out"])
