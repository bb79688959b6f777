import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv2_jax.config import ConfigError
from dsv2_jax.data.tokenizer import BYTE_OF, SPECIAL_NAMES, TextStream, Tokenizer

TEXTS = ["the cat sat on the mat, the dog sat on the log\n"] * 20 + [
    "你好，世界。你好，世界。 naïve café 😀😀 1234567"
] * 20
TRICKY = (
    "<|begin_of_sentence|> a <|end_of_sentence|>\n<\uff5cbegin\u2581of\u2581sentence\uff5c> \x00\r\n\ufeff  \u2028é"
)


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(TEXTS, 400)


@settings(deadline=None, max_examples=200)
@given(st.text())
@example(TRICKY)
@example("".join(SPECIAL_NAMES[0]) + "".join(SPECIAL_NAMES[1]))
def test_any_text_round_trips_and_its_bytes_are_counted_exactly(trained, text):
    ids = trained.encode_document(text)
    assert ids[0] == trained.bos
    assert ids[-1] == trained.eos
    assert ids[1:-1] == trained.encode(text)
    assert not {trained.bos, trained.eos} & set(ids[1:-1])
    assert trained.decode(ids) == text
    assert trained.token_bytes()[ids].sum() == len(text.encode())
    assert max(ids) < trained.vocab_size
    assert trained.encode_documents([text, "x"]) == [ids, trained.encode_document("x")]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 420), max_size=30))
def test_stream_is_decode_and_never_takes_text_back(trained, ids):
    """Any ids, so any bytes: cut characters, lone continuation bytes, ids beyond the vocabulary."""
    stream = TextStream(trained)
    parts = [stream.feed(i) for i in ids] + [stream.finish()]
    assert "".join(parts) == trained.decode(ids)


def test_stream_holds_back_half_characters(trained):
    stream, char = TextStream(trained), "𓀀"  # no merges for it: four tokens
    ids = trained.encode(char)
    assert len(ids) == 4
    assert [stream.feed(np.int32(i)) for i in ids] == ["", "", "", char]
    assert stream.feed(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_token_bytes_are_zero_for_special_tokens_only(trained):
    sizes = trained.token_bytes()
    assert sizes.dtype == np.int32
    assert sizes.shape == (trained.vocab_size,)
    assert set(np.flatnonzero(sizes == 0)) == {trained.bos, trained.eos}


def test_training_fills_the_vocabulary_and_repeats(trained, tmp_path):
    again = Tokenizer.train(iter(TEXTS), 400)
    again.save(tmp_path / "a.json")
    trained.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert 258 < trained.vocab_size <= 400
    assert Tokenizer.train([], 5000).vocab_size == 258  # nothing to merge: the bytes, BOS and EOS
    assert len(set(BYTE_OF.values())) == len(BYTE_OF) == 256
    assert [len(trained.encode(digits)) for digits in ("7", "1234567")] == [1, 7]


def test_loading_ignores_what_the_file_adds(trained, tmp_path):
    """A tokenizer.json that adds BOS twice, truncates and pads: none of it happens here."""
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    file = json.loads(path.read_text())
    bos = SPECIAL_NAMES[0][0]
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, special, sequence],
        "pair": [special, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [trained.bos], "tokens": [bos]}},
    }
    file["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    path.write_text(json.dumps(file))
    raw = tokenizers.Tokenizer.from_file(str(path)).encode("the cat sat on the mat").ids
    assert raw.count(trained.bos) >= 2 or len(raw) in (5, 64)  # the file does what this test says it does
    loaded = Tokenizer.load(path)
    text = "the cat sat on the mat " * 20 + TRICKY
    assert loaded.encode_document(text) == trained.encode_document(text)
    assert loaded.encode_documents([text]) == [trained.encode_document(text)]


def _renamed(path: Path, trained: Tokenizer, special: bool) -> Path:
    """The same merges under the released names, BOS and EOS added at the end as in the released files."""
    trained.save(path)
    file = json.loads(path.read_text())
    vocabulary = {token: i - 2 for token, i in file["model"]["vocab"].items() if i >= 2}
    file["model"]["vocab"] = vocabulary
    names = [*SPECIAL_NAMES[1], "<\uff5cUser\uff5c>"]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=True)
    file["added_tokens"] = [
        dict(id=len(vocabulary) + i, content=name, special=special and i < 2, **flags) for i, name in enumerate(names)
    ]
    path.write_text(json.dumps(file))
    return path


@pytest.mark.parametrize("special", [True, False])
def test_released_names_at_the_end_of_the_vocabulary(trained, tmp_path, special):
    loaded = Tokenizer.load(_renamed(tmp_path / "tokenizer.json", trained, special))
    assert (loaded.bos, loaded.eos) == (trained.vocab_size - 2, trained.vocab_size - 1)
    assert loaded.vocab_size == trained.vocab_size + 1
    text = "".join(itertools.chain(*SPECIAL_NAMES)) + "<\uff5cUser\uff5c> the cat"
    ids = loaded.encode_document(text)
    assert ids.count(loaded.bos) == ids.count(loaded.eos) == 1
    assert loaded.decode(ids) == text  # an added token that is not special is text
    assert loaded.token_bytes()[ids].sum() == len(text.encode())


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "absent.json"):
        with pytest.raises(ConfigError, match=name):
            Tokenizer.load(tmp_path / name)
    unnamed = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(ConfigError, match="begin and end of sentence"):
        Tokenizer(unnamed)
    unnamed.add_special_tokens(list(SPECIAL_NAMES[0]))
    with pytest.raises(ConfigError, match="byte-level"):
        Tokenizer(unnamed)
    with pytest.raises(ConfigError, match="vocab_size=257"):
        Tokenizer.train([], 257)


def edited(path: Path, trained: Tokenizer, edit) -> Path:
    trained.save(path)
    file = json.loads(path.read_text())
    edit(file)
    path.write_text(json.dumps(file))
    return path


def renumber(file):
    file["model"]["vocab"]["a"] = 4_000_000_000


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda file: file.update(normalizer={"type": "Lowercase"}), r"loses text: .* comes back as '\\t ab"),
        (lambda file: file.update(normalizer={"type": "NFKC"}), "loses text"),
        (lambda file: file.update(pre_tokenizer=None), "loses text"),
        (lambda file: file.update(pre_tokenizer={"type": "Whitespace"}), "loses text"),
        (lambda file: file["model"]["vocab"].update({",": 0}), "gives one id to several tokens"),
        (renumber, "has a token of id 4000000000; a vocabulary has less"),
        # The library panics, reading the one and encoding with the other: what Rust raises then is no Exception.
        (
            lambda file: file.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "not a readable",
        ),
        (lambda file: file.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "not a readable"),
    ],
)
def test_a_tokenizer_that_loses_text_or_asks_for_gigabytes_is_refused(trained, tmp_path, edit, message):
    with pytest.raises(ConfigError, match=message) as error:
        Tokenizer.load(edited(tmp_path / "tokenizer.json", trained, edit))
    assert str(tmp_path / "tokenizer.json") in str(error.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer.json of few merges, as text: most of what is mutated is no id."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    Tokenizer.train(["the cat"] * 2, 262).save(path)
    return path.read_text()


def places(node, path=()):
    """Every place in a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


ODD = [
    *("null", "-1", "0", "4294967295", "2147483648", "1.5", "true", '""', '"a"', '"\\ud800"', "[]", "{}"),
    *('[["a", ""]]', '"Unigram"', '"WordLevel"', '{"type": "Whitespace"}', '{"type": "FixedLength", "length": 0}'),
    *('{"type": "Lowercase"}', '{"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": true}'),
]


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**63))
def test_of_a_mutated_file_a_config_error_comes_out_or_a_tokenizer_that_loses_nothing(small, tmp_path_factory, seed):
    rng, file = np.random.default_rng(seed), json.loads(small)
    for _ in range(rng.integers(1, 4)):
        found = [*places(file)]
        if rng.integers(2):  # most places are tokens
            found = [place for place in found if len(place) < 3]
        *parents, last = found[rng.integers(len(found))]
        node = file
        for key in parents:
            node = node[key]
        node[last] = json.loads(ODD[rng.integers(len(ODD))])
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps(file))
    try:
        loaded = Tokenizer.load(path)
    except ConfigError as error:
        refused = str(error)
    else:
        text = "A cat, naïve café １ 你好 😀\n"
        refused = None if loaded.decode(loaded.encode_document(text)) == text else "lost"
    assert refused is None or str(path) in refused
