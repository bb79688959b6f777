"""One signature for the routed experts."""

import jax

from kernels_pallas.expert_ffn import composed, reference, xla
from kernels_pallas.select import select

IMPLEMENTATIONS = {  # as auto tries them
    "composed": composed,
    "xla": xla,
    "reference": reference,
}


def expert_ffn(
    x_TD: jax.Array,
    expert_TK: jax.Array,
    gates_TK: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    most: int | None = None,
    implementation: str = "auto",
    grouped_matmul: str = "auto",
    token_dispatch: str = "auto",
) -> jax.Array:
    """y_TD = sum_k gates_TK[t, k] FFN_{expert_TK[t, k]}(x_t), each FFN a SwiGLU (DeepSeek-V2 report, section 2.2.1).

    Args:
      expert_TK: int32, distinct for one token; E for a choice that is not computed.
      most: choices that may be computed; None: all T K. More are the caller's fault, and lost.
      implementation: "composed" is made of the ops token_dispatch and grouped_matmul, whose implementations the last
        two arguments name; naming one of them asks for it, and is an error beside another.
    """
    (E, D, F), (T, K) = gate_EDF.shape, expert_TK.shape
    weights_fit = up_EDF.shape == (E, D, F) and down_EFD.shape == (E, F, D)
    if x_TD.shape != (T, D) or gates_TK.shape != (T, K) or not weights_fit:
        shapes = [a.shape for a in (x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD)]
        raise ValueError(f"x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD: {shapes} do not fit each other")
    if any(w.dtype != x_TD.dtype for w in (gate_EDF, up_EDF, down_EFD)):
        raise ValueError(f"weights and rows must have one dtype; the rows have {x_TD.dtype}")
    arguments = (x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, expert_TK.size if most is None else most)
    if (grouped_matmul, token_dispatch) != ("auto", "auto"):
        if implementation not in ("auto", "composed"):
            named = f"grouped_matmul {grouped_matmul!r} and token_dispatch {token_dispatch!r}"
            raise ValueError(f"expert_ffn: implementation {implementation!r} has no use for {named}: 'composed' has")
        implementation = "composed"
    chosen = select("expert_ffn", implementation, IMPLEMENTATIONS)
    return chosen.expert_ffn(*arguments, *((grouped_matmul, token_dispatch) if chosen is composed else ()))
