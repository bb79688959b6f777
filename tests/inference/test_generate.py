"""Generation on a small model with random weights, held against its own forward pass over whole sequences.

Nearly every call has four prompts and fits the same cache, so that few programs are compiled.
"""

import dataclasses
import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
import small
from quick import quick

from dsv2_jax import presets
from dsv2_jax.config import ConfigError
from dsv2_jax.inference import generate as generation
from dsv2_jax.inference.generate import generate, generate_tokens
from dsv2_jax.inference.sampling import GREEDY, Sampling
from dsv2_jax.model.transformer import Transformer

PROMPTS = [[1, 7, 3, 9, 12, 30, 2, 2, 41, 5, 6], [1], [1, 44, 13], [1, 20, 21, 22, 23, 24, 25]]
NEW = 12
WARM = Sampling(temperature=0.7, top_k=12, top_p=0.9)


@functools.cache
def models(**changes):
    """(for teacher forcing: stacked and expanded; for decoding: unstacked and absorbed): the same weights."""
    config, rng = small.change(small.MODEL, layers=2, **changes), np.random.default_rng(0)

    def draw(path, leaf):
        is_norm = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(rng.normal(is_norm, config.init_std, leaf.shape), leaf.dtype)

    abstract = jax.eval_shape(functools.partial(Transformer, config), jax.random.key(0))
    model = jax.tree_util.tree_map_with_path(draw, abstract)  # NumPy's numbers: JAX would compile half a minute
    return model, jax.jit(Transformer.unstacked)(model)


@functools.cache
def forced_logits(tokens: tuple[int, ...], **changes):
    """Of the forward pass over one whole sequence, right-padded to one length: [T, V]."""
    model, _ = models(**changes)
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    segments = (np.arange(32) < len(tokens)).astype(np.int32)[None]
    return np.asarray(jax.jit(type(model).__call__)(model, padded, segments))[0, : len(tokens)]


def assert_greedy(prompt, continuation, **changes):
    """Every token is the argmax of the forward pass; where the two best are closer than 1e-4, either may be chosen."""
    logits_TV = forced_logits((*prompt, *continuation), **changes)[len(prompt) - 1 : -1]
    chosen_T = logits_TV[np.arange(len(continuation)), continuation]
    assert (chosen_T >= logits_TV.max(axis=1) - 1e-4).all()


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_greedy_decoding_is_the_argmax_of_the_forward_pass_across_prefill_chunks(chunk):
    found = generate(models()[1], PROMPTS, max_new_tokens=NEW, prefill_chunk=chunk)
    for prompt, continuation in zip(PROMPTS, found.tokens, strict=True):
        assert len(continuation) == NEW
        assert_greedy(prompt, continuation)
    assert len({token for row in found.tokens for token in row}) > 5  # not a model that repeats one token


LITE_YARN = {"attention__yarn": small.YARN, "attention__q_latent": None}


@pytest.mark.parametrize("changes", quick([{"attention": small.GQA}, LITE_YARN], LITE_YARN), ids=str)
def test_greedy_decoding_of_the_other_attentions(changes):
    found = generate(models(**changes)[1], PROMPTS, max_new_tokens=NEW, prefill_chunk=4)
    for prompt, continuation in zip(PROMPTS, found.tokens, strict=True):
        assert_greedy(prompt, continuation, **changes)


def test_a_stacked_model_generates_the_same():
    stacked, unstacked = models()
    found = (generate(model, PROMPTS, max_new_tokens=4, prefill_chunk=4).tokens for model in (stacked, unstacked))
    assert next(found) == next(found)


def warm(prompts, **options):
    return generate(models()[1], prompts, max_new_tokens=NEW, sampling=WARM, with_log_probs=True, **options)


def test_a_row_does_not_depend_on_the_batch():
    together = warm(PROMPTS, seeds=7, prefill_chunk=4)
    backwards = warm(PROMPTS[::-1], seeds=[10, 9, 8, 7], prefill_chunk=4)
    assert backwards.tokens == together.tokens[::-1]
    for row, prompt in enumerate(PROMPTS):
        alone = warm([prompt], seeds=7 + row, prefill_chunk=4)
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-4)


def test_seeds_repeat_and_differ():
    first = warm([PROMPTS[0]] * 4, seeds=3).tokens
    assert warm([PROMPTS[0]] * 4, seeds=[3, 4, 5, 6]).tokens == first
    assert len(set(map(tuple, first))) == 4
    assert warm([PROMPTS[0]] * 4, seeds=[3, 3, 4, 4]).tokens == [first[0], first[0], first[1], first[1]]


def test_the_end_token_ends_its_row_only():
    model = models()[1]
    free = generate(model, PROMPTS, max_new_tokens=NEW).tokens
    eos = free[0][3]
    found = generate(model, PROMPTS, max_new_tokens=NEW, eos=eos)
    for row, tokens in enumerate(free):
        assert found.finished[row] == (eos in tokens)
        assert found.tokens[row] == (tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)
    assert len(set(map(len, found.tokens))) > 1


def test_the_loop_stops_when_all_rows_have_ended():
    model = models()[1]
    prompts = [PROMPTS[0]] * 4
    eos = generate(model, prompts, max_new_tokens=NEW).tokens[0][2]
    state = generation.start(model, prompts, 100)
    state = generation.advance(model, state, 100, eos, GREEDY)
    assert int(state.step) <= 3


def test_log_probs_are_those_of_the_forward_pass_at_the_temperature_before_top_k_and_top_p():
    found = warm(PROMPTS)
    for prompt, tokens, log_probs in zip(PROMPTS, found.tokens, found.log_probs, strict=True):
        logits_TV = forced_logits((*prompt, *tokens))[len(prompt) - 1 : -1].astype(np.float64) / WARM.temperature
        expected_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(log_probs, expected_TV[np.arange(NEW), tokens], atol=1e-4)


def test_the_single_program_draws_the_same_tokens():
    model, prompts = models()[1], [PROMPTS[0], PROMPTS[0][::-1]] * 2
    assert generate_tokens(model, jnp.array(prompts), NEW, WARM).tolist() == warm(prompts).tokens
    assert jax.eval_shape(lambda: generate_tokens(model, jnp.array([[1]]), 3)).shape == (1, 3)


def test_another_prompt_length_and_seed_compile_nothing():
    model = models()[1]

    def compiled():
        return generation.advance._cache_size() + generation._prefill._cache_size()

    generate(model, [[1] * 11, [2], [3], [4]], max_new_tokens=3)
    before = compiled()
    generate(model, [[1] * 15, [2] * 5, [3], [5]], max_new_tokens=8, seeds=[8, 1, 9, 1], eos=3)
    assert compiled() == before
    state = generation.start(model, PROMPTS, 20)
    for until in (1, 8, 16):
        state = generation.advance(model, state, until, 3, GREEDY)
    assert compiled() == before


def test_what_exceeds_the_cache_or_the_model_is_refused_with_both_numbers():
    model, longest = models()[1], small.MODEL.max_length
    with pytest.raises(ConfigError, match="cache_length=10: must hold 4 prompt \\+ 7 new tokens"):
        generate(model, [[1] * 4], max_new_tokens=7, cache_length=10)
    with pytest.raises(ConfigError, match=f"max_length={longest}: must hold 2 prompt \\+ {longest - 1} new tokens"):
        generate(model, [[1], [1, 2]], max_new_tokens=longest - 1)
    prompts = [*PROMPTS[:3], [1] * (longest - 2)]
    full = generate(model, prompts, max_new_tokens=2, cache_length=longest, prefill_chunk=16)
    assert [len(tokens) for tokens in full.tokens] == [2] * 4


@pytest.mark.parametrize(
    ("prompts", "options", "named"),
    [
        ([], {}, "prompts"),
        ([[1], []], {}, "number 1 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk=0"),
        ([[1]], {"seeds": [1, 2]}, "1 prompts"),
        ([[1]], {"seeds": -1}, "seeds"),
    ],
)
def test_impossible_arguments_are_refused(prompts, options, named):
    with pytest.raises(ConfigError, match=named):
        generate(models()[1], prompts, **{"max_new_tokens": 2} | options)


# --- what the compiled programs hold ---------------------------------------------------------------------------------


def equations(jaxpr):
    """Of a jaxpr and of all jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jex.jaxprs_in_params(equation.params):
            yield from equations(inner)


def shapes(function, *args):
    program = jax.make_jaxpr(function)(*args)
    return [tuple(var.aval.shape) for equation in equations(program.jaxpr) for var in equation.outvars]


@pytest.mark.parametrize(("preset", "numbers"), [("v2", 576), ("v2_lite", 576), ("tiny", 80)])
def test_the_cache_holds_the_latent_and_one_rotary_key_per_token_and_layer(preset, numbers):
    config = presets.get(preset)
    model = jax.eval_shape(functools.partial(Transformer, config), jax.random.key(0))
    for form in (model, jax.eval_shape(Transformer.unstacked, model)):
        cache = jax.eval_shape(lambda model: model.init_cache(3, 640), form)
        held = sum(leaf.size for leaf in jax.tree.leaves(dataclasses.replace(cache, length_B=None)))
        assert held == 3 * 640 * config.layers * numbers
        assert cache.length_B.size == 3


def per_head_keys(model, tokens: int):
    """Shapes in the decoding program that could hold a key or value of every head for every cached token."""
    capacity, config = 97, model.config.attention
    cache = model.init_cache(5, capacity)
    found = shapes(lambda tokens_BT, cache: model.decode(tokens_BT, cache), jnp.zeros((5, tokens), jnp.int32), cache)
    widths = {config.nope_dim, config.rope_dim, config.value_dim, config.qk_dim, config.nope_dim + config.value_dim}
    least = capacity * config.heads * min(widths)
    return [shape for shape in found if capacity in shape and set(shape) & widths and np.prod(shape) >= least]


def test_decoding_forms_no_key_or_value_of_a_head():
    model = models()[1]
    assert per_head_keys(model, tokens=1) == []
    longest = model.dense_blocks[0].attention.longest_absorbed
    assert per_head_keys(model, tokens=longest - 1) == []
    assert per_head_keys(model, tokens=longest + 1) != []  # a long prefill chunk expands: the search can find


def test_the_loop_has_no_host_callback_and_scores_one_token_a_row():
    model, vocabulary = models()[1], small.MODEL.vocab_size
    program = jax.make_jaxpr(lambda prompt_BT: generate_tokens(model, prompt_BT, 5, WARM))(jnp.ones((2, 9), int))
    found = list(equations(program.jaxpr))
    names = {equation.primitive.name for equation in found}
    assert "while" in names
    assert not {name for name in names if "callback" in name or "feed" in name or "print" in name}
    scored = {var.aval.shape for equation in found for var in equation.outvars if var.aval.shape[-1:] == (vocabulary,)}
    assert (2, vocabulary) in scored
    assert all(np.prod(shape) <= 2 * vocabulary or len(shape) == 2 for shape in scored)


def test_the_cache_is_updated_in_place():
    model = models()[1]
    state = generation.start(model, PROMPTS, NEW)
    generation.advance(model, state, NEW, generation.NO_TOKEN, GREEDY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))
