"""Decoding over the cache: equal to the teacher-forced forward, small, latent (acceptance cases 12, 13 and 17)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from quick import quick
from small import GQA, MODEL, YARN, change, made

from dsv2_jax import presets
from dsv2_jax.model import rope, router
from dsv2_jax.model.attention import MLA
from dsv2_jax.model.cache import entry_width, make_cache
from dsv2_jax.model.transformer import Transformer
from oracles.compare import worst

CONFIGS = {
    "v2": MODEL,
    "lite yarn": change(MODEL, attention__q_latent=None, attention__yarn=YARN),
    "gqa": change(MODEL, attention=GQA),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 14)), jnp.int32)
DECODE = jax.jit(lambda model, tokens, cache, counts=None: model.decode(tokens, cache, counts))
FORWARD = jax.jit(lambda model, tokens: model(tokens))


@functools.cache
def model(name, stacked=True):
    whole = made(lambda key: Transformer(CONFIGS[name], key))
    return whole if stacked else whole.unstacked()


def decoded(model, chunks, tokens=TOKENS, length=20):
    """Logits of the tokens fed through the cache in chunks of these sizes."""
    cache, out, done = model.init_cache(tokens.shape[0], length), [], 0
    for size in chunks:
        h_BTD, cache = DECODE(model, tokens[:, done : done + size], cache)
        out.append(model.logits(h_BTD))
        done += size
    assert list(cache.length_B) == [done] * tokens.shape[0]
    return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize(("stacked", "chunks"), [(True, (14,)), (False, (5, 1, 1, 4, 1, 1, 1))], ids=str)
@pytest.mark.parametrize("name", quick(CONFIGS, "v2", "lite yarn"))
def test_cached_is_uncached(name, stacked, chunks):
    out = decoded(model(name, stacked), chunks)
    assert worst(out, FORWARD(model(name), TOKENS)) < 3e-5


@pytest.mark.parametrize("name", quick(CONFIGS, "v2"))
def test_greedy_decoding_is_teacher_forcing(name):
    """Acceptance case 13: prefill in two chunks, decode greedily; every token is the argmax of the full forward."""
    loose, prompt = model(name, stacked=False), TOKENS[:, :7]
    cache = loose.init_cache(2, 20)
    _, cache = DECODE(loose, prompt[:, :4], cache)
    h_BTD, cache = DECODE(loose, prompt[:, 4:], cache)
    sequence_BT = prompt
    for _ in range(8):
        best_B1 = jnp.argmax(loose.logits(h_BTD[:, -1:]), axis=-1)
        sequence_BT = jnp.concatenate([sequence_BT, best_B1], axis=1)
        h_BTD, cache = DECODE(loose, best_B1, cache)
    logits_BTV = FORWARD(model(name), sequence_BT)
    top2_BT2 = jax.lax.top_k(logits_BTV, 2)[0]
    assert float((top2_BT2[..., 0] - top2_BT2[..., 1]).min()) > 1e-4  # no tie makes the comparison void
    np.testing.assert_array_equal(jnp.argmax(logits_BTV, -1)[:, 6:-1], sequence_BT[:, 7:])


def test_the_check_of_case_13_sees_positions_that_restart(monkeypatch):
    """Acceptance case 13: a second chunk rotated as if it began at position 0 is far from the forward pass."""
    expected, rotations = FORWARD(model("v2"), TOKENS), rope.rotations
    monkeypatch.setattr(rope, "rotations", lambda positions, *rest: rotations(positions - positions[:, :1], *rest))
    DECODE.clear_cache()
    try:
        assert worst(decoded(model("v2"), (7, 7))[:, 7:], expected[:, 7:]) > 1e-2
    finally:
        DECODE.clear_cache()


@pytest.mark.parametrize("name", quick(CONFIGS, "v2"))
def test_rows_of_different_lengths(name):
    """Right-padded prompts: each row continues at its own length, as it would alone."""
    counts_B = jnp.array([3, 6])
    h_BTD, cache = DECODE(model(name), TOKENS[:, :6], model(name).init_cache(2, 20), counts_B)
    assert list(cache.length_B) == [3, 6]
    rest = jnp.stack([TOKENS[0, 3:8], TOKENS[1, 6:11]])
    h_after, cache = DECODE(model(name), rest, cache)
    logits_BTV = FORWARD(model(name), TOKENS)
    for b, count in enumerate((3, 6)):
        assert worst(model(name).logits(h_BTD[b, :count]), logits_BTV[b, :count]) < 3e-5
        assert worst(model(name).logits(h_after[b]), logits_BTV[b, count : count + 5]) < 3e-5


def test_decoding_is_causal_and_rows_are_apart():
    first = decoded(model("v2"), (5, 9))
    second = decoded(model("v2"), (5, 9), TOKENS.at[0, 8:].set(1))
    assert worst(second[0, :8], first[0, :8]) < 1e-6
    assert worst(second[1], first[1]) < 1e-6
    assert worst(second[0, 8:], first[0, 8:]) > 1e-2


def test_cache_holds_576_numbers_a_token_and_layer():
    """Acceptance case 12: measured in bytes, for V2 and V2-Lite; MHA's cache of the same heads fails the check."""
    for name in ("v2", "v2_lite"):
        config = presets.get(name)
        cache = jax.eval_shape(lambda config=config: make_cache(config, 3, 100, False))
        arrays = jax.tree.leaves((cache.dense, cache.moe))
        per_token = sum(a.size * a.dtype.itemsize for a in arrays) / (3 * 100 * config.layers * 2)
        assert per_token == 576
        heads = config.attention.heads
        assert entry_width(change(GQA, heads=heads, kv_heads=heads, head_dim=128)) == 2 * heads * 128
    assert entry_width(presets.get("dense_67b").attention) == 2 * 8 * 128


def _largest(jaxpr):
    """Elements of the largest array any equation makes, inner jaxprs included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        sizes += [_largest(inner) for inner in jaxprs_in_params(equation.params)]
    return max(sizes)


def test_decoding_forms_no_key_or_value_of_a_head(monkeypatch):
    """Acceptance case 12: over 5000 cached tokens nothing of S x N x H arises; the expanded form would."""
    loose, S = model("v2", stacked=False), 5000
    cache = jax.eval_shape(lambda: loose.init_cache(1, S))

    def largest():
        return _largest(jax.make_jaxpr(lambda cache: loose.decode(TOKENS[:1, :1], cache))(cache).jaxpr)

    heads, nope = MODEL.attention.heads, MODEL.attention.nope_dim
    assert largest() <= S * entry_width(MODEL.attention) < S * heads * nope
    monkeypatch.setattr(MLA, "longest_absorbed", 0)
    assert largest() >= S * heads * nope


def test_router_decides_alike_in_training_and_decoding(monkeypatch):
    """Acceptance case 17: the same experts wherever the score gap exceeds 1e-5; a bfloat16 router differs."""
    seen, choose = [], router.choose

    def recording(scores_BTE, config):
        chosen_BTK, expert_BTK = choose(scores_BTE, config)
        assert scores_BTE.dtype == jnp.float32
        seen.append((scores_BTE, expert_BTK))
        return chosen_BTK, expert_BTK

    monkeypatch.setattr(router, "choose", recording)
    loose = model("v2", stacked=False)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (2, 48)), jnp.int32)

    @jax.jit
    def forward_routing():
        seen.clear()
        loose.features(tokens)
        return list(seen)

    @jax.jit
    def decode_routing():
        seen.clear()
        _, cache = loose.decode(tokens[:, :20], loose.init_cache(2, 48))
        loose.decode(tokens[:, 20:], cache)
        return [tuple(jnp.concatenate([a, b], 1) for a, b in zip(seen[i], seen[i + 2])) for i in range(2)]

    flips = close = 0
    for (scores, experts), (_, others) in jax.tree.map(np.asarray, list(zip(forward_routing(), decode_routing()))):
        same = (np.sort(experts, -1) == np.sort(others, -1)).all(-1)
        ordered = np.sort(scores, -1)
        clear = ordered[..., -MODEL.moe.experts_per_token] - ordered[..., -MODEL.moe.experts_per_token - 1] > 1e-5
        assert same[clear].all()
        close += (~clear).sum()
        rounded = jnp.asarray(scores, jnp.bfloat16).astype(jnp.float32)
        flips += (np.asarray(choose(rounded, MODEL.moe)[1]) != experts).any(-1).sum()
    assert close < 5  # so the assertion above says something
    assert flips > 0
