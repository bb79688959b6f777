"""Conversations as tokens (acceptance cases 6 and 7)."""

import json
from pathlib import Path

import jinja2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv2_jax.config import ConfigError
from dsv2_jax.data.chat import render
from dsv2_jax.data.tokenizer import SPECIAL_NAMES, Tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
]
SPELLED = "".join(SPECIAL_NAMES[0]) + " and " + "".join(SPECIAL_NAMES[1])
# The released chat template says this, in the words of jinja.
TEMPLATE = jinja2.Template(
    "{{ bos }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n{% elif m.role == 'system' %}"
    "{{ m.content }}\n\n{% else %}Assistant: {{ m.content }}{{ eos }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
BOS, EOS = "\ue000", "\ue001"  # stand for the ids in rendered text; no message of these tests holds them


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["User: What is it?\n\nAssistant: It is 2.\n\n    return x\n"] * 30 + ["你好！你好，世界。\r\n"] * 30
    return Tokenizer.train(texts, 420)


def text_of(tokenizer, tokens):
    marks = {tokenizer.bos: BOS, tokenizer.eos: EOS}
    pieces, run = [], []
    for token in [*tokens, tokenizer.bos]:
        if token in marks:
            pieces += [tokenizer.decode(run), marks[token]]
            run = []
        else:
            run.append(token)
    return "".join(pieces[:-1])


def test_the_text_is_the_released_one(tokenizer):
    chat = render(tokenizer, [SYSTEM, *TALK[:3]], add_generation_prompt=True)
    expected = f"{BOS}Be brief.\n\nUser: What is 1+1?\n\nAssistant: It is 2.{EOS}User: 你好\n\nAssistant:"
    assert text_of(tokenizer, chat.tokens) == expected
    assert chat.tokens[0] == tokenizer.bos
    assert chat.tokens.count(tokenizer.bos) == 1


CONTENT = st.text(st.characters(exclude_characters=BOS + EOS, exclude_categories=["Cs"])) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\n\n",
        "  indented",
        "ends in space ",
        ":",
        "User: me\n\nAssistant: no",
        SPELLED,
        "    return x\r\n",
    ]
)


@st.composite
def conversations(draw):
    turns = draw(st.integers(1, 6))
    messages = [{"role": ("user", "assistant")[i % 2], "content": draw(CONTENT)} for i in range(turns)]
    return [{"role": "system", "content": draw(CONTENT)}] * draw(st.integers(0, 1)) + messages


@settings(max_examples=150)
@given(conversations())
@example([{"role": "user", "content": SPELLED}, {"role": "assistant", "content": SPELLED}])
def test_any_conversation_is_what_the_template_says(tokenizer, messages):
    """Also where messages spell BOS, EOS or the roles: case 6, BOS once, put by us."""
    asked = messages[-1]["role"] == "user"
    chat = render(tokenizer, messages, add_generation_prompt=asked)
    expected = TEMPLATE.render(messages=messages, add_generation_prompt=asked, bos=BOS, eos=EOS)
    assert text_of(tokenizer, chat.tokens) == expected
    assert chat.tokens.count(tokenizer.bos) == 1
    assert chat.tokens.count(tokenizer.eos) == sum(m["role"] == "assistant" for m in messages)
    # what stands between two special tokens is merged as one text, as where a whole rendered text is tokenized
    whole = [tokenizer.bos]
    for part in expected[1:].split(EOS):
        whole += [*tokenizer.encode(part), tokenizer.eos]
    assert chat.tokens == whole[:-1]


@settings(max_examples=150)
@given(conversations())
def test_the_marked_tokens_are_the_answers_and_their_ends(tokenizer, messages):
    """Case 7: the closing EOS is part of what is learnt, and nothing of the prompt is."""
    chat = render(tokenizer, messages)
    assert len(chat.tokens) == len(chat.response)
    marked = [token for token, mine in zip(chat.tokens, chat.response) if mine]
    answers = "".join(f" {m['content']}{EOS}" for m in messages if m["role"] == "assistant")
    assert text_of(tokenizer, marked) == answers
    others = [token for token, mine in zip(chat.tokens, chat.response) if not mine]
    assert tokenizer.eos not in others


@settings(max_examples=100)
@given(conversations())
def test_a_prompt_begins_the_conversation_it_asks_for(tokenizer, messages):
    """Generating after the prompt and learning from the whole see the same tokens."""
    if messages[-1]["role"] == "assistant":
        whole = render(tokenizer, messages)
        prompt = render(tokenizer, messages[:-1], add_generation_prompt=True)
        assert whole.tokens[: len(prompt.tokens)] == prompt.tokens
        assert prompt.response == whole.response[: len(prompt.tokens)]
        assert all(whole.response[len(prompt.tokens) :])


def check_bos(tokens, bos):
    assert tokens[0] == bos
    assert tokens.count(bos) == 1, "BOS twice"


def test_a_tokenizer_that_adds_bos_itself_adds_none_here(tokenizer, tmp_path):
    """Case 6: released tokenizer.json files ask for a BOS of their own; text rendered first would get two."""
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    file, bos = json.loads(path.read_text()), SPECIAL_NAMES[0][0]
    special, sequence = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, sequence],
        "pair": [special, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
    }
    path.write_text(json.dumps(file))
    loaded = Tokenizer.load(path)
    check_bos(render(loaded, TALK).tokens, loaded.bos)
    assert render(loaded, TALK) == render(tokenizer, TALK)
    inner = loaded._inner
    inner.encode_special_tokens = False
    rendered = TEMPLATE.render(messages=TALK, bos=bos, eos=SPECIAL_NAMES[0][1])
    with pytest.raises(AssertionError, match="BOS twice"):  # the defect
        check_bos(inner.encode(rendered).ids, loaded.bos)


@pytest.mark.parametrize(
    ("messages", "asked", "said"),
    [
        ([], False, r"messages=\[\]: must hold at least one user"),
        ([*TALK[:1], {"role": "tool", "content": "x"}], False, r"messages\[1\].role='tool': must be one of system"),
        ([*TALK[:1], SYSTEM], False, r"messages\[1\].role='system': must be 'assistant': a system message comes"),
        ([SYSTEM, SYSTEM], False, r"messages\[1\].role='system'"),
        ([SYSTEM], False, r"messages\[0\].role='system': must be followed by a user message"),
        (TALK[1:], False, r"messages\[0\].role='assistant': must be 'user'"),
        ([TALK[0], TALK[0]], False, r"messages\[1\].role='user': must be 'assistant': user and assistant take turns"),
        (TALK, True, r"messages\[3\].role='assistant': must be 'user' where a generation prompt"),
        ([{"role": "user", "content": ["parts"]}], True, r"messages\[0\].content=\['parts'\]: must be text"),
        ([{"role": "user"}], True, r"messages\[0\]=.*must be {'role'"),
        (["hello"], True, r"messages\[0\]='hello'"),
    ],
)  # fmt: skip
def test_a_message_out_of_turn_is_named(tokenizer, messages, asked, said):
    with pytest.raises(ConfigError, match=said):
        render(tokenizer, messages, add_generation_prompt=asked)


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "pick"),
    [
        ("gsm8k_test.jsonl", lambda text: [json.loads(line) for line in text.splitlines()[:100]]),
        ("cmrc2018_trial.json", lambda text: [{"question": text[i : i + 300], "answer": text[i + 300 : i + 400]}
                                              for i in range(0, 30000, 400)]),
        ("tinyshakespeare.txt", lambda text: [{"question": text[:5000], "answer": text[5000:20000]}]),
    ],
)  # fmt: skip
def test_real_questions_and_answers_round_trip(tokenizer, name, pick):
    if not (DATA / name).is_file():
        pytest.skip(f"no {name} beside the checkout")
    for item in pick((DATA / name).read_text()):
        messages = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
        chat = render(tokenizer, messages)
        assert text_of(tokenizer, chat.tokens) == TEMPLATE.render(messages=messages, bos=BOS, eos=EOS)
        answer = [token for token, mine in zip(chat.tokens, chat.response) if mine]
        assert tokenizer.decode(answer) == f" {item['answer']}"
