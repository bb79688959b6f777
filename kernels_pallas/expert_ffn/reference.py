"""Naive float32 experts: every expert on every token; differentiated by JAX."""

import jax
import jax.numpy as jnp


def expert_ffn(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, most) -> jax.Array:
    x32_TD, gate_EDF, up_EDF, down_EFD = (a.astype(jnp.float32) for a in (x_TD, gate_EDF, up_EDF, down_EFD))
    gates_TE = jnp.einsum("tk,tke->te", gates_TK.astype(jnp.float32), jax.nn.one_hot(expert_TK, len(gate_EDF)))
    h_TEF = jax.nn.silu(jnp.einsum("td,edf->tef", x32_TD, gate_EDF)) * jnp.einsum("td,edf->tef", x32_TD, up_EDF)
    return jnp.einsum("te,tef,efd->td", gates_TE, h_TEF, down_EFD).astype(x_TD.dtype)
