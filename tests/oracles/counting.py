"""Parameters, cached elements and FLOPs by hand, from the numbers of the report's tables; no code of the project."""

V2 = dict(L=60, D=5120, V=102400, N=128, H=128, P=64, R=512, Q=1536, dense=12288, E=160, shared=2, K=6, F=1536)
V2_LITE = dict(L=27, D=2048, V=102400, N=16, H=128, P=64, R=512, Q=None, dense=10944, E=64, shared=2, K=6, F=1408)
DENSE_67B = dict(L=95, D=8192, V=102400, N=64, groups=8, H=128, dense=22016)


def mla(D, N, H, P, R, Q, **_):
    """Matrices and norms of one attention layer."""
    queries = D * N * (H + P) if Q is None else D * Q + Q * N * (H + P)
    keys_values = D * R + D * P + R * N * H + R * N * H
    return queries + keys_values + N * H * D, R + (Q or 0)


def moe_model(L, D, V, dense, E, shared, K, F, **attention):
    """Parts of a model whose first layer is dense; those of one token in `active`."""
    matrices, norms = mla(D, **attention)
    parts = {
        "input embedding": V * D,
        "attention": L * matrices,
        "dense FFN": 3 * D * dense,
        "router": (L - 1) * D * E,
        "shared experts": (L - 1) * 3 * D * F * shared,
        "routed experts": (L - 1) * 3 * D * F * E,
        "norms": L * (norms + 2 * D) + D,
        "output matrix": D * V,
    }
    active = {**parts, "routed experts": (L - 1) * 3 * D * F * K, "input embedding": 0}
    return parts, active


def dense_model(L, D, V, N, groups, H, dense):
    parts = {
        "input embedding": V * D,
        "attention": L * (D * N * H + 2 * D * groups * H + N * H * D),
        "dense FFN": L * 3 * D * dense,
        "router": 0,
        "shared experts": 0,
        "routed experts": 0,
        "norms": L * 2 * D + D,
        "output matrix": D * V,
    }
    return parts, {**parts, "input embedding": 0}


def causal_attention_flops(T, N, qk, v):
    """Forward FLOPs per token of one layer's scores and weighted values, every pair counted one by one."""
    pairs = sum(query + 1 for query in range(T))
    return N * pairs * (2 * qk + 2 * v) / T
