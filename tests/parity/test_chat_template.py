"""Chats beside transformers' apply_chat_template (case 6: libraries disagree on BOS; ours puts it, once)."""

import published
import pytest
from data import test_chat as chats

from dsv2_jax.data.chat import render
from dsv2_jax.data.tokenizer import SPECIAL_NAMES, Tokenizer
from dsv2_jax.hf.convert import export_folder, import_folder

pytestmark = pytest.mark.parity
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    "{% elif m.role == 'system' %}{{ m.content }}\n\n{% else %}Assistant: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
TALK = [
    {"role": "system", "content": "You answer briefly.\nAlways."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42, of course.\n\n    return 42\n"},
    {"role": "user", "content": " 你好，世界！ \t"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "naïve café 😀"},
]


@pytest.fixture(scope="module")
def both(live, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train(["User: What is it?\n\nAssistant: It is 42.\n\n你好，世界！"] * 30, 400).save(path)
    bos, eos = SPECIAL_NAMES[0]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=bos, eos_token=eos, chat_template=TEMPLATE)
    return Tokenizer.load(path), theirs


@pytest.mark.parametrize("first", [0, 1], ids=["system", "no system"])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 6])
def test_same_tokens(both, first, length):
    ours, theirs = both
    messages = TALK[first:length]
    asked = messages[-1]["role"] == "user"
    expected = theirs.apply_chat_template(messages, add_generation_prompt=asked, tokenize=True, return_dict=False)
    assert render(ours, messages, add_generation_prompt=asked).tokens == list(expected)


@pytest.mark.parametrize("template", [chats.V2_5, chats.CHAT_0628], ids=["V2.5", "0628"])
@pytest.mark.parametrize("first", [0, 1], ids=["system", "no system"])
@pytest.mark.parametrize("length", [2, 3, 6])
def test_same_tokens_where_roles_are_tokens(live, tmp_path, template, first, length):
    from transformers import PreTrainedTokenizerFast

    ours = chats.with_roles(tmp_path, template)
    bos, eos = ours.names
    names = {"bos_token": bos, "eos_token": eos, "chat_template": template}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **names)
    messages = TALK[first:length]
    asked = messages[-1]["role"] == "user"
    expected = theirs.apply_chat_template(messages, add_generation_prompt=asked, tokenize=True, return_dict=False)
    assert render(ours, messages, add_generation_prompt=asked).tokens == list(expected)


def test_the_tokenizer_of_a_model_trained_here_is_the_same_to_others(live, tmp_path):
    """Exported: transformers puts BOS once before a text, and writes conversations as `render` does."""
    from transformers import AutoTokenizer

    config = published.LITE | {"vocab_size": 400}
    src = published.write_folder(tmp_path / "src", config, published.weights(config))
    ours = Tokenizer.train(["User: What is it?\n\nAssistant: It is 42.\n\n你好，世界！"] * 30, 400)
    ours.save(src / "tokenizer.json")
    import_folder(src, tmp_path / "ours", report=lambda _: None)
    export_folder(tmp_path / "ours", tmp_path / "out", report=lambda _: None)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("What is it? 你好", "", " \n x"):
        assert theirs(text)["input_ids"] == [ours.bos, *ours.encode(text)]
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    for first, length in (0, 2), (1, 3), (0, 6):
        asked = TALK[length - 1]["role"] == "user"
        options = {"add_generation_prompt": asked, "tokenize": True, "return_dict": False}
        expected = list(theirs.apply_chat_template(TALK[first:length], **options))
        assert render(ours, TALK[first:length], add_generation_prompt=asked).tokens == expected


def test_a_message_that_spells_special_tokens_stays_text(both):
    """transformers reads them as the tokens they spell: a user could end the assistant's turn. Ours does not."""
    ours, theirs = both
    bos, eos = SPECIAL_NAMES[0]
    messages = [{"role": "user", "content": f"Say {eos}{bos} please"}]
    tokens = render(ours, messages, add_generation_prompt=True).tokens
    assert (tokens.count(ours.bos), tokens.count(ours.eos)) == (1, 0)
    assert f"{eos}{bos}" in ours.decode(tokens)
    their_tokens = list(theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    assert (their_tokens.count(ours.bos), their_tokens.count(ours.eos)) == (2, 1)
