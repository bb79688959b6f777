"""Streaming, with a model that follows a script, so that every token and every cut is known."""

import dataclasses
import functools
import types

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

from dsv2_jax.config import ConfigError
from dsv2_jax.data import chat
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.inference.sampling import GREEDY
from dsv2_jax.inference.stream import StopStrings, stream
from dsv2_jax.types import pytree

TEXT = st.text("abc", max_size=30)


@pytree
class Length:
    length_B: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["script_S"], meta_fields=[])
@dataclasses.dataclass
class Scripted:
    """Scores highest the token that the script has after the ones seen; what it is shown does not matter."""

    script_S: jax.Array
    config = types.SimpleNamespace(max_length=512)

    def init_cache(self, batch, length):
        return Length(jnp.zeros(batch, jnp.int32))

    def decode(self, tokens_BT, cache, counts_B=None):
        positions_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
        counts_B = tokens_BT.shape[1] if counts_B is None else counts_B
        return positions_BT[..., None], Length(cache.length_B + counts_B)

    def logits(self, h_BD):
        return jax.nn.one_hot(self.script_S[h_BD[..., 0] + 1], 512)


@functools.cache
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat, the end"] * 4, 290)


def run(prompt, continuation, *, end=True, **options):
    """(pieces, why it ended) of streaming `continuation` (a text, then the end token) after `prompt`."""
    known = tokenizer()
    script = [known.bos, *known.encode(prompt), *known.encode(continuation), *[known.eos] * end]
    script_S = jnp.array((script + known.encode("x") * 512)[:512])
    pieces, ended = [], []

    def collect():
        ended.append((yield from stream(Scripted(script_S), known, prompt, **{"max_new_tokens": 200} | options)))

    pieces.extend(collect())
    return pieces, ended[0]


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_the_text_streams_whole_and_ends_before_the_end_token(at_once):
    text = "the cat naïve 🦉 东西 sat\n"
    pieces, ended = run("the ", text, tokens_at_once=at_once)
    assert "".join(pieces) == text
    assert ended == "eos"
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 5 or at_once > 1


def test_pieces_come_while_the_text_is_still_being_made():
    known, pieces = tokenizer(), []
    script = jnp.array([known.bos, *known.encode("the cat sat on the mat" * 20)][:512])
    for piece in stream(Scripted(script), known, "", max_new_tokens=100, tokens_at_once=4):
        pieces.append(piece)
        if len(pieces) == 2:
            break
    assert "".join(pieces) == known.decode(script[1:9].tolist())


def test_a_character_cut_by_the_limit_is_shown_as_undecodable():
    assert run("the ", "a🦉", end=False, max_new_tokens=3) == (["a\ufffd"], "length")
    assert run("the ", "a🦉", end=False, max_new_tokens=5) == (["a🦉"], "length")


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_a_stop_string_across_tokens_ends_the_text_and_is_not_printed(at_once):
    options = {"tokens_at_once": at_once, "sampling": GREEDY}
    assert "".join(run("the ", "a cat, the end", stop=["t, t", "nothing"], **options)[0]) == "a ca"
    assert run("the ", "a cat, the end", stop=["t, t"], **options)[1] == "stop"
    pieces, ended = run("the ", "owl 🦉🦉 owl", stop=["🦉 "], **options)
    assert ("".join(pieces), ended) == ("owl 🦉", "stop")
    pieces, ended = run("the ", "a cat, the", stop=["the end"], **options)
    assert ("".join(pieces), ended) == ("a cat, the", "eos")


def test_the_limit_is_exact_and_the_seed_and_errors_reach_the_generator():
    assert len("".join(run("the ", "aaaaaaaaaaaaaaaa", max_new_tokens=11)[0])) == 11
    with pytest.raises(ConfigError, match="max_length=512"):
        run("the ", "a", max_new_tokens=1000)
    with pytest.raises(ConfigError, match="stop"):
        run("the ", "a", stop=[""])


@given(st.lists(TEXT, max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_against_searching_the_whole_text(pieces, stops):
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    found, printed, arrived = StopStrings(stops), "", 0
    for piece in pieces:
        printed += found.push(piece)
        arrived += len(piece)
        assert expected.startswith(printed)
        longest = max(map(len, stops), default=1)
        assert found.found or len(printed) >= arrived - (longest - 1)  # no more is held back than a stop string needs
    assert printed + found.flush() == expected
    assert found.found == bool(ends)


def test_what_cannot_become_a_stop_string_is_not_held_back():
    stops = StopStrings(["aab"])
    passed = [stops.push(piece) for piece in ("xa", "a", "a", "c", "aa", "b", "more")]
    assert passed == ["x", "", "a", "aac", "", "", ""]
    assert stops.found


@pytest.mark.parametrize("space", [" ", ""])
def test_an_answer_to_a_conversation_has_no_space_of_its_template(monkeypatch, space):
    """The model writes the space after "Assistant:"; what is streamed is the message. Other templates have none."""
    monkeypatch.setattr(chat, "answer_space", lambda tokenizer: space)
    known, messages = tokenizer(), [{"role": "user", "content": "the cat"}]
    asked = chat.render(known, messages, add_generation_prompt=True).tokens
    script_S = jnp.array([*asked, *known.encode("  on the mat"), known.eos] + [0] * 300)
    pieces = list(stream(Scripted(script_S), known, messages, max_new_tokens=100, tokens_at_once=1))
    assert "".join(pieces) == "  on the mat".removeprefix(space)
    assert len(pieces) > 1
    assert all(pieces)
