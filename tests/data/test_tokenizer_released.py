"""A tokenizer.json built as the released ones are: pieces cut by a chain of patterns, BOS and EOS after the vocabulary,
a post-processor that adds BOS. Text must come back to the byte, and chats be what the released tokenizer would see."""

import gzip
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from dsv2_jax.data.chat import render
from dsv2_jax.data.tokenizer import SPECIAL_NAMES, Tokenizer

CODE = "def f(x):\r\n\tif x:\n        return {'a': [1, 22, 333]}  # naïve café\n\n\n"
CHINESE = "今天天气很好，我们去公园散步吧。“好的！”他说：２０２４年。\u3000\n"
TEXTS = ["User: What is it?\n\nAssistant: It is so, because 12 + 30 = 42.\n\n"] * 20 + [CODE] * 20 + [CHINESE] * 20
BOS, EOS = SPECIAL_NAMES[1]


def split(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            split(r"[\r\n]"),
            split(r"\s?\p{Latin}+"),
            split(r"\s?[\p{P}\p{S}]+"),
            split(r"\s+$"),
            split(r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    inner.add_special_tokens([BOS, EOS])
    bos = inner.token_to_id(BOS)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    path = tmp_path_factory.mktemp("released") / "tokenizer.json"
    inner.save(str(path))
    return path


@pytest.fixture(scope="module")
def released(path):
    return Tokenizer.load(path)


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example(CODE)
@example(CHINESE)
@example(" \t\n \r\n\u3000\u2028 ".join(["", "a", "好", "1", "!", ""]))
@example(BOS + EOS + "<|begin_of_sentence|>")
@example("\u0301\u200d\ufeff👩\u200d👩\u200d👧 \U0010ffff\x00")
def test_any_text_comes_back(released, text):
    ids = released.encode(text)
    assert released.decode(ids) == text
    assert not {released.bos, released.eos} & set(ids)
    assert sum(len(released.bytes_of(i)) for i in ids) == len(text.encode())


def test_bos_and_eos_stand_after_the_vocabulary(path, released):
    assert (released.bos, released.eos) == (released.vocab_size - 2, released.vocab_size - 1)
    assert tokenizers.Tokenizer.from_file(str(path)).encode("a").ids[0] == released.bos  # the file adds one itself
    assert released.encode_document("a") == [released.bos, *released.encode("a"), released.eos]


CONTENT = st.text(max_size=20) | st.text(" \r\n\t:!a1好", max_size=8)


@settings(max_examples=200)
@given(CONTENT, CONTENT, CONTENT)
@example("x", " ", " ")
@example("x", "\n", "\t")
@example("x \n", ": ", "")
def test_a_chat_is_what_the_library_makes_of_the_rendered_text(path, released, system, question, answer):
    """One BOS, and the same merges as where the released tokenizer reads the text with its special tokens spelled."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    prompt = render(released, messages, add_generation_prompt=True)
    whole = render(released, [*messages, {"role": "assistant", "content": answer}])
    library = tokenizers.Tokenizer.from_file(str(path))
    text = f"{BOS}{system}\n\nUser: {question}\n\nAssistant: {answer}{EOS}"
    assert whole.tokens == library.encode(text, add_special_tokens=False).ids
    assert library.encode(text).ids == [released.bos, *whole.tokens]  # the defect of case 6, in the library
    assert whole.tokens[: len(prompt.tokens)] == prompt.tokens
    assert [t for t, mine in zip(whole.tokens, whole.response) if mine] == whole.tokens[len(prompt.tokens) :]


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


SMALL = ["HumanEval.jsonl.gz", "gsm8k_test.jsonl", "cmrc2018_trial.json"]
LARGE = ["gsm8k_train.jsonl", "tinyshakespeare.txt"]


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_real_text_comes_back_whole(released, name):
    if not (DATA / name).is_file():
        pytest.skip(f"no {name} beside the checkout")
    text = (gzip.open if name.endswith("gz") else open)(DATA / name, "rt", encoding="utf-8").read()
    if name.startswith("cmrc"):
        text = json.dumps(json.loads(text), ensure_ascii=False)
    assert len(text) > 100_000
    parts = [text[first : first + 10_000] for first in range(0, len(text), 10_000)]
    documents = released.encode_documents(parts)
    assert [released.decode(tokens) for tokens in documents] == parts
    assert {tokens.count(mark) for tokens in documents for mark in (released.bos, released.eos)} == {1}
