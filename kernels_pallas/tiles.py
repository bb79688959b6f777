"""The tile layout: where each (token, chosen expert) pair lies among rows sorted by expert and padded to tiles.

Every tile of rows belongs to one expert, so an expert's matmul over its tiles loses no token and wastes at most one
tile; the number of tiles is bounded by ceil(pairs / tile) + experts, and only the first `live_tiles` hold rows.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileLayout:
    """G rows in tiles of B = G / len(expert_of_tile); rows of one expert are contiguous, tokens ascending."""

    expert_of_tile: jax.Array  # int32 [tiles]; beyond live_tiles: the last expert
    live_tiles: jax.Array  # int32 []: tiles that hold any row
    token_of_row_G: jax.Array  # int32; T for a padding row
    choice_of_row_G: jax.Array  # int32: which of the token's K choices the row serves; 0 for a padding row
    row_of_choice_TK: jax.Array  # int32; G for a choice that is not computed

    @property
    def tile(self) -> int:
        return self.token_of_row_G.shape[0] // self.expert_of_tile.shape[0]


def tile_size(pairs: int, experts: int, smallest: int = 16, largest: int = 128) -> int:
    """Rows of a tile: a power of two near half of what an expert gets on average, so that little is padding.

    Up to `smallest` rows a tile costs no more than the weights it reads, so that few pairs take twice their average.
    """

    def power(rows: float) -> int:
        return 1 << max(0, math.ceil(math.log2(rows)))

    average = pairs / experts
    return min(max(power(average / 2), min(smallest, power(average * 2))), largest)


def _sort(expert_A: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Experts in rising order and where each stood, equal ones as they stood."""
    pairs = expert_A.shape[0]
    pair_A = jnp.arange(pairs, dtype=jnp.int32)
    if (experts + 1) * pairs >= 2**31:
        return jax.lax.sort_key_val(expert_A, pair_A, is_stable=True)
    packed_A = jax.lax.sort(expert_A * pairs + pair_A)  # one array sorts several times faster than two on CPUs
    return packed_A // pairs, packed_A % pairs


def make_layout(expert_TK: jax.Array, experts: int, tile: int, most: int | None = None) -> TileLayout:
    """Sorts the pairs by expert. A choice with `expert_TK` = `experts` is not computed (padding, dropped tokens).

    Args:
      most: so many choices are computed at the most, which the caller knows; None: all could be.
    """
    T, K = expert_TK.shape
    pairs, most = T * K, T * K if most is None else most
    tiles = min(-(-most // tile) + experts, most)
    rows = tiles * tile
    expert_A = expert_TK.reshape(pairs)
    sorted_A, pair_A = _sort(expert_A, experts)
    first_E = jnp.searchsorted(sorted_A, jnp.arange(experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    tiles_E = -(-jnp.diff(first_E) // tile)
    last_tile_E = jnp.cumsum(tiles_E)
    expert_of_tile = jnp.searchsorted(last_tile_E, jnp.arange(tiles, dtype=jnp.int32), side="right")
    expert_of_tile = jnp.minimum(expert_of_tile, experts - 1).astype(jnp.int32)
    # Row r of expert e serves the pair at first_E[e] + (r - first row of e) of the sorted order.
    shift_E = first_E[:-1] - (last_tile_E - tiles_E) * tile
    row = jnp.arange(rows, dtype=jnp.int32).reshape(tiles, tile)
    place = (row + shift_E[expert_of_tile][:, None]).reshape(rows)
    live = place < jnp.repeat(first_E[1:][expert_of_tile], tile)
    live &= row.reshape(rows) < last_tile_E[-1] * tile
    pair_of_row = pair_A[jnp.where(live, place, 0)]
    row_of_sorted = jnp.arange(pairs, dtype=jnp.int32) - jnp.append(shift_E, 0)[sorted_A]
    row_of_sorted = jnp.where(sorted_A < experts, row_of_sorted, rows)
    row_of_pair = jnp.zeros(pairs, jnp.int32).at[pair_A].set(row_of_sorted, unique_indices=True)
    return TileLayout(
        expert_of_tile=expert_of_tile,
        live_tiles=last_tile_E[-1].astype(jnp.int32),
        token_of_row_G=jnp.where(live, pair_of_row // K, T),
        choice_of_row_G=jnp.where(live, pair_of_row % K, 0),
        row_of_choice_TK=row_of_pair.reshape(T, K),
    )
