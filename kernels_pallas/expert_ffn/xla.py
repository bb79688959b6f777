"""The experts as one loop over the live tiles of rows, with a dynamic expert index: the useful FLOPs on any platform.

(Of few tokens, of which nearly every expert has one, a tile of every expert is computed at once.)

Gathering a tile's tokens, its three matmuls and adding their result to the tokens all happen in one step of the loop:
a tile stays in the cache, and XLA on CPUs runs its independent matmuls on several cores. A row's gate scales h, so that
the backward pass needs no row of the output: the gate's cotangent is h . (W_down dy).
"""

import jax
import jax.numpy as jnp

from kernels_pallas import swiglu
from kernels_pallas.projection import FEW_ROWS
from kernels_pallas.tile_loop import EACH, NT, TN, add, dot, of, over_tiles
from kernels_pallas.tiles import TileLayout, make_layout, tile_size


def expert_ffn(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, most) -> jax.Array:
    (T, K), E = expert_TK.shape, gate_EDF.shape[0]
    tile = tile_size(most, E)
    if T <= FEW_ROWS and T * K >= 2 * E:
        y_TD = _a_tile_of_each(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, tile)
    else:
        layout = make_layout(expert_TK, E, tile, most) if tile > 1 else _a_row_each(expert_TK, E)
        y_TD = _chosen_experts(x_TD, gates_TK, gate_EDF, up_EDF, down_EFD, layout)
    return y_TD.astype(x_TD.dtype)


def _a_row_each(expert_TK: jax.Array, experts: int) -> TileLayout:
    """Tiles of one row, not sorted: for few choices, whose sorting would take as long as computing them."""
    T, K = expert_TK.shape
    computed_TK, row_TK = expert_TK < experts, jnp.arange(T * K, dtype=jnp.int32).reshape(T, K)
    return TileLayout(
        expert_of_tile=jnp.minimum(expert_TK, experts - 1).reshape(T * K),
        live_tiles=jnp.int32(T * K),
        token_of_row_G=jnp.where(computed_TK, row_TK // K, T).reshape(T * K),
        choice_of_row_G=(row_TK % K).reshape(T * K),
        row_of_choice_TK=jnp.where(computed_TK, row_TK, T * K),
    )


def _a_tile_of_each(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD, tile: int) -> jax.Array:
    """The first `tile` tokens of every expert at once; what is left where an expert has more, in the loop over tiles.

    For few tokens, of which nearly every expert has one: batched matmuls read the weights where they lie, of which the
    loop would copy a matrix at a time.
    """
    T, E = x_TD.shape[0], gate_EDF.shape[0]
    chosen_ETK = expert_TK == jnp.arange(E)[:, None, None]
    mine_ET = jnp.any(chosen_ETK, axis=-1)
    place_ET = jnp.where(mine_ET, jnp.cumsum(mine_ET, axis=1) - 1, T)  # among the expert's tokens
    place_TK = jnp.sum(jnp.where(chosen_ETK, place_ET[:, :, None], 0), axis=0)
    # A place without a token computes token 0, and no token takes what it gives.
    x_EBD = x_TD[jnp.argmax(place_ET[:, None] == jnp.arange(tile)[:, None], axis=-1)]
    h_EBF = swiglu.swiglu(dot(x_EBD, gate_EDF, EACH), dot(x_EBD, up_EDF, EACH)).astype(x_TD.dtype)
    y_TKD = dot(h_EBF, down_EFD, EACH).at[expert_TK, place_TK].get(mode="clip")
    here_TK1 = ((expert_TK < E) & (place_TK < tile))[:, :, None]
    y_TD = jnp.sum(jnp.where(here_TK1, gates_TK.astype(jnp.float32)[:, :, None] * y_TKD, 0.0), axis=1)

    def with_rest(y_TD):
        layout = make_layout(jnp.where(place_TK < tile, E, expert_TK), E, tile)
        return y_TD + _chosen_experts(x_TD, gates_TK, gate_EDF, up_EDF, down_EFD, layout)

    if tile >= T:
        return y_TD
    return jax.lax.cond(jnp.any(place_TK >= tile), with_rest, lambda y_TD: y_TD, y_TD)


def _tokens(x_TD, token_B) -> jax.Array:
    # A padding row has token T and reads the last one instead: its gate is 0, and its result is not added to any token.
    return x_TD.at[token_B].get(mode="clip")


def _gates_of_rows(gates_TK, layout: TileLayout) -> jax.Array:
    place = layout.token_of_row_G, layout.choice_of_row_G
    return gates_TK.at[place].get(mode="fill", fill_value=0).astype(jnp.float32)[:, None]


@jax.custom_vjp
def _chosen_experts(x_TD, gates_TK, gate_EDF, up_EDF, down_EFD, layout: TileLayout) -> jax.Array:
    """The sum over a token's experts of `layout`, in float32."""
    return _forward(x_TD, gates_TK, gate_EDF, up_EDF, down_EFD, layout)[0]


def _forward(x_TD, gates_TK, gate_EDF, up_EDF, down_EFD, layout):
    gates_G1 = _gates_of_rows(gates_TK, layout)

    def body(read, write, expert, outputs):
        y_TD, a_GF, b_GF = outputs
        token_B = read(layout.token_of_row_G)
        x_BD = _tokens(x_TD, token_B)
        a_BF, b_BF = dot(x_BD, of(gate_EDF, expert)), dot(x_BD, of(up_EDF, expert))
        h_BF = (read(gates_G1) * swiglu.swiglu(a_BF, b_BF)).astype(x_BD.dtype)
        y_TD = y_TD.at[token_B].add(dot(h_BF, of(down_EFD, expert)), mode="drop")
        return y_TD, write(a_GF, a_BF), write(b_GF, b_BF)

    zeros_GF = jnp.zeros((gates_G1.shape[0], gate_EDF.shape[2]), x_TD.dtype)
    y_TD, a_GF, b_GF = over_tiles(layout, body, (jnp.zeros(x_TD.shape, jnp.float32), zeros_GF, zeros_GF))
    return y_TD, (x_TD, gates_TK, gate_EDF, up_EDF, down_EFD, layout, a_GF, b_GF)


def _backward(residuals, dy_TD):
    x_TD, gates_TK, gate_EDF, up_EDF, down_EFD, layout, a_GF, b_GF = residuals
    dy_TD, gates_G1 = dy_TD.astype(x_TD.dtype), _gates_of_rows(gates_TK, layout)

    def body(read, write, expert, outputs):
        dx_TD, dgates_G1, dgate_EDF, dup_EDF, ddown_EFD = outputs
        token_B, gates_B1, a_BF, b_BF = map(read, (layout.token_of_row_G, gates_G1, a_GF, b_GF))
        x_BD, dy_BD = _tokens(x_TD, token_B), _tokens(dy_TD, token_B)
        dh_BF, h_BF = dot(dy_BD, of(down_EFD, expert), NT), swiglu.swiglu(a_BF, b_BF)
        dgates_G1 = write(dgates_G1, jnp.sum(h_BF.astype(jnp.float32) * dh_BF, axis=-1, keepdims=True))
        da_BF, db_BF = swiglu.gradients(a_BF, b_BF, gates_B1 * dh_BF)
        dx_BD = dot(da_BF, of(gate_EDF, expert), NT) + dot(db_BF, of(up_EDF, expert), NT)
        dx_TD = dx_TD.at[token_B].add(dx_BD, mode="drop")
        dgate_EDF = add(dgate_EDF, expert, dot(x_BD, da_BF, TN))
        dup_EDF = add(dup_EDF, expert, dot(x_BD, db_BF, TN))
        ddown_EFD = add(ddown_EFD, expert, dot((gates_B1 * h_BF).astype(x_BD.dtype), dy_BD, TN))
        return dx_TD, dgates_G1, dgate_EDF, dup_EDF, ddown_EFD

    zeros = (jnp.zeros(a.shape, jnp.float32) for a in (x_TD, gates_G1, gate_EDF, up_EDF, down_EFD))
    dx_TD, dgates_G1, *dweights = over_tiles(layout, body, tuple(zeros))
    dgates_TK = dgates_G1[:, 0].at[layout.row_of_choice_TK].get(mode="fill", fill_value=0)
    dweights = (dw.astype(x_TD.dtype) for dw in dweights)
    return dx_TD.astype(x_TD.dtype), dgates_TK.astype(gates_TK.dtype), *dweights, None


_chosen_experts.defvjp(_forward, _backward)
