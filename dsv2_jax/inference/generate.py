"""Generation through the cache: token lists in and out, or one compiled program for a fixed shape.

All but the last token of each prompt fills the cache; the last one is the first that the decoding loop shows the model.
So one loop body draws every new token, and the output matrix is never applied to a token of the prompt but the last.

What is compiled depends on the number of prompts, the cache's capacity (rounded up to a multiple of 128), the width of
a prefill chunk (`prefill_chunk`, or the power of two that holds a shorter prompt), the sampling, and on whether
log-probabilities are wanted; not on prompts, lengths, `max_new_tokens`, seeds or the end token.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import sharding
from dsv2_jax.config import check
from dsv2_jax.inference.sampling import GREEDY, Sampling, log_probs, row_keys, sample
from dsv2_jax.types import pytree

CAPACITY_STEP = 128  # tokens
NO_TOKEN = -1  # stands for an end token that is never drawn


@dataclass(frozen=True)
class Generation:
    tokens: list[list[int]]  # the continuation of each prompt, the end token included
    log_probs: list[list[float]] | None  # of these tokens: float32, at the sampling temperature, before top-k and top-p
    finished: list[bool]  # whether the row drew the end token, rather than reach `max_new_tokens`


@pytree
class State:
    """A batch in the middle of its generation. L is the most tokens a row may draw."""

    cache: Any
    pending_B: jax.Array  # int32: the newest token, not yet shown to the model
    keys_B: jax.Array  # a random key per row
    step: jax.Array  # int32: tokens drawn by each row that has not finished
    finished_B: jax.Array  # bool: the row has drawn the end token
    counts_B: jax.Array  # int32: tokens drawn by each row
    tokens_BL: jax.Array  # int32: these tokens
    log_probs_BL: jax.Array | None  # float32: theirs, if wanted


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos: int | None = None,
    seeds: int | Sequence[int] = 0,
    cache_length: int | None = None,
    prefill_chunk: int = 512,
    with_log_probs: bool = False,
) -> Generation:
    """Continue every prompt until it draws `eos`, or by `max_new_tokens`. `model.unstacked(dtype)` is the fast model.

    A row depends on its prompt and its seed alone, not on the rows beside it; an integer s means seeds s, s + 1, ...
    `cache_length` is the most tokens a row may hold, prompt included (None: what this call needs); calls that share it
    share their programs. Raises `ConfigError` where a prompt and its new tokens exceed it or the model's `max_length`.
    """
    state = start(model, prompts, max_new_tokens, seeds, cache_length, prefill_chunk, with_log_probs)
    state = advance(model, state, max_new_tokens, NO_TOKEN if eos is None else eos, sampling)
    state = jax.device_get(dataclasses.replace(state, cache=None, keys_B=None))

    def lists(values_BL):
        return [row[:count].tolist() for row, count in zip(values_BL, state.counts_B, strict=True)]

    return Generation(
        tokens=lists(state.tokens_BL),
        log_probs=lists(state.log_probs_BL) if with_log_probs else None,
        finished=state.finished_B.tolist(),
    )


@functools.partial(jax.jit, static_argnames=("new_tokens", "sampling"))
def generate_tokens(model, prompt_BT, new_tokens: int, sampling: Sampling = GREEDY, seeds_B=None) -> jax.Array:
    """The next `new_tokens` tokens of prompts of one length, [B, new_tokens]: one program, prefill and loop."""
    batch, length = prompt_BT.shape
    cache = model.init_cache(batch, _round_up(length + new_tokens - 1, 16))  # a length that the kernels can cut up
    if length > 1:
        _, cache = model.decode(prompt_BT[:, :-1], cache)
    keys_B = row_keys(jnp.arange(batch) if seeds_B is None else seeds_B)
    state = _state(cache, prompt_BT[:, -1].astype(jnp.int32), keys_B, new_tokens, False)
    return _advance(model, state, new_tokens, NO_TOKEN, sampling).tokens_BL


def start(
    model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seeds: int | Sequence[int] = 0,
    cache_length: int | None = None,
    prefill_chunk: int = 512,
    with_log_probs: bool = False,
) -> State:
    """The state in which nothing is drawn yet: prompts checked, right-padded and put in a new cache chunk by chunk."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    _check_lengths(lengths_B, max_new_tokens, cache_length, model.config.max_length)
    check(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "be positive")
    if np.ndim(seeds) == 0:
        seeds = range(int(seeds), int(seeds) + len(prompts))
    check(len(seeds) == len(prompts), "seeds", seeds, f"be one integer, or one for each of {len(prompts)} prompts")
    check(min(seeds) >= 0 and max(seeds) < 2**32, "seeds", seeds, "lie between 0 and 2**32 - 1")

    fill_B = lengths_B - 1
    chunk = min(prefill_chunk, 1 << max(int(fill_B.max()) - 1, 0).bit_length())
    tokens_BT = np.zeros((len(prompts), _round_up(int(fill_B.max()), chunk)), np.int32)
    for row_T, prompt in zip(tokens_BT, prompts, strict=True):
        row_T[: len(prompt) - 1] = prompt[:-1]
    capacity = _round_up(cache_length or int(lengths_B.max()) + max_new_tokens, CAPACITY_STEP)
    cache = model.init_cache(len(prompts), capacity)
    for first in range(0, tokens_BT.shape[1], chunk):
        chunk_BC = tokens_BT[:, first : first + chunk]
        cache = _prefill(model, chunk_BC, np.clip(fill_B - first, 0, chunk), cache)
    pending_B = jnp.array([prompt[-1] for prompt in prompts], jnp.int32)
    return _state(cache, pending_B, row_keys(np.array(seeds, np.uint32)), capacity, with_log_probs)


def _check_lengths(lengths_B: np.ndarray, max_new_tokens: int, cache_length: int | None, max_length: int) -> None:
    check(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "be positive")
    check(len(lengths_B) > 0, "prompts", [], "hold at least one prompt")
    check(lengths_B.min() > 0, "prompts", f"number {lengths_B.argmin()} is empty", "begin with BOS at least")
    needed = f"{lengths_B.max()} prompt + {max_new_tokens} new tokens"
    for name, limit in (("cache_length", cache_length), ("the model's max_length", max_length)):
        ok = limit is None or lengths_B.max() + max_new_tokens <= limit
        check(ok, name, limit, f"hold {needed}: shorten the prompt, lower max_new_tokens, or raise it")


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _state(cache, pending_B: jax.Array, keys_B: jax.Array, limit: int, with_log_probs: bool) -> State:
    batch = pending_B.shape[0]
    return State(
        cache=cache,
        pending_B=pending_B,
        keys_B=keys_B,
        step=jnp.zeros((), jnp.int32),
        finished_B=jnp.zeros(batch, bool),
        counts_B=jnp.zeros(batch, jnp.int32),
        tokens_BL=jnp.zeros((batch, limit), jnp.int32),
        log_probs_BL=jnp.zeros((batch, limit), jnp.float32) if with_log_probs else None,
    )


@functools.partial(jax.jit, donate_argnames="cache")
def _prefill(model, tokens_BC, counts_B, cache):
    _, cache = model.decode(tokens_BC, cache, counts_B)
    return cache


def _advance(model, state: State, until, eos, sampling: Sampling) -> State:
    """Draw until every row has drawn `eos` or `until` tokens. Finished rows are computed on, and not read."""

    def running(state: State):
        return (state.step < until) & ~jnp.all(state.finished_B)

    def draw(state: State) -> State:
        h_BTD, cache = model.decode(state.pending_B[:, None], state.cache)
        logits_BV = model.logits(h_BTD[:, 0])
        keys_B = None if sampling.greedy else jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.step)
        tokens_B = sample(logits_BV, sampling, keys_B)
        log_probs_BL = state.log_probs_BL
        if log_probs_BL is not None:
            log_probs_BL = log_probs_BL.at[:, state.step].set(log_probs(logits_BV, tokens_B, sampling))
        return State(
            cache=cache,
            pending_B=tokens_B,
            keys_B=state.keys_B,
            step=state.step + 1,
            finished_B=state.finished_B | (tokens_B == eos),
            counts_B=jnp.where(state.finished_B, state.counts_B, state.step + 1),
            tokens_BL=state.tokens_BL.at[:, state.step].set(tokens_B),
            log_probs_BL=log_probs_BL,
        )

    with sharding.use_of(jax.tree.leaves(model)[0]):  # tokens are drawn on the mesh of the weights, as they are scored
        return jax.lax.while_loop(running, draw, state)


advance = jax.jit(_advance, static_argnames="sampling", donate_argnames="state")
