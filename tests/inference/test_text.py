"""Texts in and out: what the model is shown, and what comes back of what it drew."""

import pytest
import small

from dsv2_jax.config import ConfigError
from dsv2_jax.data import chat
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.inference import generate as tokens
from dsv2_jax.inference import text
from dsv2_jax.inference.generate import Generation
from dsv2_jax.inference.sampling import Sampling

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a norm?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is a norm? User: Assistant: Be brief."] * 3, 280)


@pytest.fixture
def draws(monkeypatch):
    """Replaces the drawing: `draws.answers` are its tokens, `draws.prompts` and `draws.rest` what it was asked."""

    class Draws:
        def __call__(self, model, prompts, **rest):
            self.prompts, self.rest = prompts, rest
            return Generation(tokens=self.answers, log_probs=None, finished=[True] * len(prompts))

    monkeypatch.setattr(tokens, "generate", draws := Draws())
    return draws


def test_bos_once_before_a_text_even_one_that_spells_it(tokenizer, draws):
    draws.answers = [[1], [1]]
    text.generate(None, tokenizer, ["What", "<|begin_of_sentence|>"])
    for prompt, source in zip(draws.prompts, ["What", "<|begin_of_sentence|>"], strict=True):
        assert prompt == [tokenizer.bos, *tokenizer.encode(source)]
        assert prompt.count(tokenizer.bos) == 1


def test_a_conversation_ends_where_the_assistant_is_to_write(tokenizer, draws):
    draws.answers = [[*tokenizer.encode(" A length."), tokenizer.eos]]
    (answer,) = text.generate(None, tokenizer, [QUESTION])
    (prompt,) = draws.prompts
    assert prompt == [tokenizer.bos, *tokenizer.encode("Be brief.\n\nUser: What is a norm?\n\nAssistant:")]
    assert answer == "A length."
    turns = [*QUESTION, {"role": "assistant", "content": answer}]
    assert chat.render(tokenizer, turns).tokens == prompt + draws.answers[0]


def test_an_answer_keeps_its_space_where_the_template_writes_none(tokenizer, draws, monkeypatch):
    draws.answers = [tokenizer.encode(" A length.")]
    monkeypatch.setattr(chat, "answer_space", lambda tokenizer: "")
    assert text.generate(None, tokenizer, [QUESTION]) == [" A length."]


def test_a_text_keeps_its_spaces_and_loses_its_end_token(tokenizer, draws):
    draws.answers = [[*tokenizer.encode("  is é"), tokenizer.eos], tokenizer.encode(" b")]
    assert text.generate(None, tokenizer, ["a", "b"]) == ["  is é", " b"]


def test_the_arguments_reach_the_drawing(tokenizer, draws):
    draws.answers = [[1]]
    sampling = Sampling(temperature=0.5)
    given = dict(max_new_tokens=3, sampling=sampling, seeds=[4], cache_length=64, prefill_chunk=8)
    text.generate(None, tokenizer, ["a"], **given)
    assert draws.rest == {**given, "eos": tokenizer.eos}


def test_mistakes(tokenizer):
    with pytest.raises(ConfigError, match=r"tokenizer=None: must be one: the model's folder had no tokenizer.json"):
        text.generate(None, None, ["a"])
    with pytest.raises(ConfigError, match=r"prompts='a': must be a list: write \[prompt\]"):
        text.generate(None, tokenizer, "a")
    with pytest.raises(ConfigError, match=r"messages\[1\].role='assistant'"):
        text.generate(None, tokenizer, [[QUESTION[1], {"role": "assistant", "content": "A length."}]])
    with pytest.raises(ConfigError, match=r"hold at least one prompt"):
        text.generate(type("Model", (), {"config": small.MODEL}), tokenizer, [])
