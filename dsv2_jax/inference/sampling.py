"""Drawing the next token: temperature, then top-k, then top-p (Holtzman et al. 2020, arXiv 1904.09751).

Nothing is sorted. Both restrictions keep the shortest prefix, in order of falling logit and then of rising index, that
reaches a target: top-k where every token weighs 1, top-p where it weighs its probability. Where that prefix ends is
found by bisecting the bits of the logits, in 32 passes over the vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dsv2_jax import sharding
from dsv2_jax.config import check


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; hashable, so that compiled programs can depend on it. Seeds are arguments, not settings."""

    temperature: float = 1.0  # divides the logits; 0 is greedy: the likeliest token, of equals the lowest
    top_k: int | None = None  # exactly the k likeliest tokens, of equals the lowest
    top_p: float | None = None  # of those, the fewest likeliest ones whose share of the mass reaches p; at least one

    def __post_init__(self):
        ok = self.temperature == 0 or 1e-6 <= self.temperature < float("inf")
        check(ok, "Sampling.temperature", self.temperature, "be 0 (greedy) or at least 1e-6")
        check(self.top_k is None or self.top_k >= 1, "Sampling.top_k", self.top_k, "be at least 1, or None")
        ok = self.top_p is None or 1e-6 <= self.top_p <= 1
        check(ok, "Sampling.top_p", self.top_p, "lie between 1e-6 and 1, or be None (temperature 0 is greedy)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0)


def row_keys(seeds_B) -> jax.Array:
    """One random key per row, from its own seed (uint32): what a row draws does not depend on the batch it is in."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds_B, jnp.uint32))


def sample(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array | None = None) -> jax.Array:
    """Tokens [B], int32. `keys_B`, a key per row, are not read when greedy."""
    if sampling.greedy:
        return _argmax(logits_BV)
    gap_BV = _gap(logits_BV, sampling)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, gap_BV.shape[1:]))(keys_B)
    return _argmax(jnp.where(support(logits_BV, sampling), noise_BV - gap_BV, -jnp.inf))


def support(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Which tokens [B, V] may be drawn: top-k first, then top-p of the mass that top-k left."""
    logits_BV = logits_BV.astype(jnp.float32)
    kept_BV = jnp.ones(logits_BV.shape, bool)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[1]:
        kept_BV = _shortest_prefix(logits_BV, jnp.ones_like(logits_BV), sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        mass_BV = jnp.where(kept_BV, jnp.exp(-_gap(logits_BV, sampling)), 0.0)
        target_B1 = sampling.top_p * mass_BV.sum(axis=1, keepdims=True)
        kept_BV &= _shortest_prefix(logits_BV, mass_BV, target_B1)
    return kept_BV


def log_probs(logits_BV: jax.Array, tokens_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probability [B], float32, of each token at the sampling temperature (1 if greedy), before top-k and top-p."""
    gap_BV = _gap(logits_BV, sampling)
    gap_B = jnp.take_along_axis(gap_BV, tokens_B[:, None], axis=1)[:, 0]
    return -gap_B - jnp.log(jnp.exp(-gap_BV).sum(axis=1))


def _gap(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """How far below the row's best, in float32 units of the temperature (of 1 when greedy): never negative."""
    logits_BV = logits_BV.astype(jnp.float32)
    return (logits_BV.max(axis=1, keepdims=True) - logits_BV) / (sampling.temperature or 1.0)


def _argmax(x_BV: jax.Array) -> jax.Array:
    """Lowest index of the maximum. Of a vocabulary split over `tensor` each device finds its own; they meet once."""
    if sharding.axis_size("tensor") == 1 or not sharding.divides(x_BV, "batch", "vocab"):
        return _best(x_BV)[1]

    def everywhere(x_BV):
        best_B, index_B = _best(x_BV)
        index_B += jax.lax.axis_index("tensor") * x_BV.shape[1]
        bits_B = jax.lax.bitcast_convert_type(best_B, jnp.int32)
        bits_PB, index_PB = jnp.moveaxis(jax.lax.all_gather(jnp.stack([bits_B, index_B]), "tensor"), 1, 0)
        first_1B = jnp.argmax(jax.lax.bitcast_convert_type(bits_PB, jnp.float32), axis=0, keepdims=True)
        return jnp.take_along_axis(index_PB, first_1B, axis=0)[0]

    rows, all_of_them = sharding.activation_spec("batch"), sharding.activation_spec("batch", "vocab")
    return jax.shard_map(everywhere, in_specs=all_of_them, out_specs=rows, check_vma=False)(x_BV.astype(jnp.float32))


def _best(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum and its lowest index: plain reductions vectorise on CPU where XLA's paired one does not (4x)."""
    best_B = x_BV.max(axis=1)
    index_BV = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    return best_B, jnp.where(x_BV == best_B[:, None], index_BV, x_BV.shape[1] - 1).min(axis=1)


def _shortest_prefix(logits_BV: jax.Array, weight_BV: jax.Array, target) -> jax.Array:
    """Mask of the shortest prefix, by falling logit then index, whose weights sum to `target` or more (else all)."""
    bits_BV = jax.lax.bitcast_convert_type(jnp.where(logits_BV == 0, 0.0, logits_BV), jnp.int32)  # -0 ties with 0
    rank_BV = ~(bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF))  # an integer that rises as the logit falls

    def weigh(mask_BV):
        return jnp.where(mask_BV, weight_BV, 0.0).sum(axis=1, keepdims=True)

    def halve(_, bounds):
        low_B1, high_B1 = bounds
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # their mean, rounded down, without overflow
        enough_B1 = weigh(rank_BV <= middle_B1) >= target
        return jnp.where(enough_B1, low_B1, middle_B1 + 1), jnp.where(enough_B1, middle_B1, high_B1)

    limits, shape = jnp.iinfo(jnp.int32), (rank_BV.shape[0], 1)
    last_B1, _ = jax.lax.fori_loop(0, 32, halve, (jnp.full(shape, limits.min), jnp.full(shape, limits.max)))
    tied_BV = jnp.where(rank_BV == last_B1, weight_BV, 0.0)
    before_BV = weigh(rank_BV < last_B1) + jnp.cumsum(tied_BV, axis=1) - tied_BV
    return (rank_BV < last_B1) | ((rank_BV == last_B1) & (before_BV < target))
