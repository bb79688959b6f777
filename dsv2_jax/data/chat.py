"""Conversations as tokens, in the text the released chat models were trained on.

    BOS [system, blank line] `User: ` text, blank line, `Assistant: ` text EOS `User: ` ... [`Assistant:`]

No space follows the last `Assistant:`: the model writes it. V2.5 and V2-Chat-0628 were trained on tokens for the roles,

    BOS [system] USER text ASSISTANT text EOS USER ... [ASSISTANT]

in 0628 with a blank line after the system message. Which of the three it is the tokenizer's chat template says, if it
came with one. This is the one renderer of the project: a template of other words is an error. BOS, EOS, USER and
ASSISTANT are put here, as ids: a message that spells them stays text.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv2_jax.config import ConfigError, check
from dsv2_jax.data.tokenizer import ROLE_NAMES, Tokenizer

ROLES = ("system", "user", "assistant")
TEMPLATE = (  # the first form, for those who read it as jinja
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] "
    "+ '\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% else "
    "%}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' "
    "}}{% endif %}"
)


@dataclass(frozen=True)
class _Form:
    """What stands around the messages: before and after a user's, before an assistant's, after the system's."""

    user: str
    after_user: str
    assistant: str
    space: str  # between `assistant` and an answer
    after_system: str


FORMS = (
    _Form("User: ", "\n\n", "Assistant:", " ", "\n\n"),
    _Form(ROLE_NAMES[0], "", ROLE_NAMES[1], "", "\n\n"),
    _Form(ROLE_NAMES[0], "", ROLE_NAMES[1], "", ""),
)


@dataclass(frozen=True)
class Chat:
    """The tokens of a conversation; `response` marks those that an assistant wrote, each closing EOS included."""

    tokens: list[int]
    response: list[bool]


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> Chat:
    """Tokens of messages {"role", "content"}: at most one system message, first, then user and assistant in turn.

    With `add_generation_prompt` the text ends where the assistant is to write; without, it is one to learn from.
    Raises `ConfigError` naming the message that is out of turn, or where the tokenizer's chat template is not known.
    """
    _check_messages(messages, add_generation_prompt)
    form = _form(tokenizer.template, tokenizer.names)
    if form.user in ROLE_NAMES and len(tokenizer.roles) < len(ROLE_NAMES):
        raise ConfigError(
            f"the tokenizer lacks {' or '.join(ROLE_NAMES)}, which its chat_template writes; get both again"
        )
    tokens, response, pending = [tokenizer.bos], [False], ""

    def say(opening: str) -> None:
        """A word waits for the text that follows it; a token stands by itself."""
        nonlocal pending
        if opening not in tokenizer.roles:
            pending += opening
            return
        put(pending, "")
        tokens.append(tokenizer.roles[opening])
        response.append(False)
        pending = ""

    def put(said: str, answer: str) -> None:
        # Both are merged into tokens as the one text they are; the answer begins after the bytes of what was said.
        ids, end, start = tokenizer.encode(said + answer), 0, len(said.encode())
        for token in ids:
            end += len(tokenizer.bytes_of(token))
            tokens.append(token)
            response.append(end > start)

    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            pending += content + form.after_system
        elif role == "user":
            say(form.user)
            pending += content + form.after_user
        else:
            say(form.assistant)
            put(pending, form.space + content)
            tokens.append(tokenizer.eos)
            response.append(True)
            pending = ""
    if add_generation_prompt:
        say(form.assistant)
    put(pending, "")
    return Chat(tokens, response)


def answer_space(tokenizer: Tokenizer) -> str:
    """What the model writes before an answer to `render`ed messages, and is no part of it: a space, or nothing."""
    return _form(tokenizer.template, tokenizer.names).space


@functools.cache
def _form(template: str | None, names: tuple[str, str]) -> _Form:
    """The form that a chat template writes: it is run on a conversation, with a system message and without."""
    if template is None:
        return FORMS[0]
    turns = [{"role": role, "content": text} for role, text in zip([*ROLES, "user"], ("S", "Q", "A", "R"))]
    bos, eos = names
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers' own

    def written(form: _Form, system: str) -> str:
        first, second = (f"{form.user}{text}{form.after_user}{form.assistant}" for text in "QR")
        return f"{bos}{system}{first}{form.space}A{eos}{second}"

    try:
        run = environment.from_string(template).render
        given = {"add_generation_prompt": True, "bos_token": bos, "eos_token": eos}
        found = [run(messages=turns, **given), run(messages=turns[1:], **given)]
    except Exception as error:  # of whoever wrote it
        found = repr(error)
    for form in FORMS:
        if found == [written(form, f"S{form.after_system}"), written(form, "")]:
            return form
    raise ConfigError(
        f"the tokenizer's chat_template is none of DeepSeek-V2's: it writes {found!r:.400}; ask with text, or tokens, "
        "that you have put together, or take the template away if the model was trained on the first of data/chat.py"
    )


def _check_messages(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> None:
    check(len(messages) > 0, "messages", messages, "hold at least one user message")
    turn = "user"
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        ok = isinstance(message, Mapping) and set(message) == {"role", "content"}
        check(ok, name, message, "be {'role': ..., 'content': ...}")
        role, content = message["role"], message["content"]
        check(role in ROLES, f"{name}.role", role, f"be one of {', '.join(ROLES)}")
        check(isinstance(content, str), f"{name}.content", content, "be text")
        if role == "system":
            check(i == 0, f"{name}.role", role, f"be {turn!r}: a system message comes first or not at all")
            continue
        check(role == turn, f"{name}.role", role, f"be {turn!r}: user and assistant take turns, the user first")
        turn = "assistant" if role == "user" else "user"
    last = messages[-1]["role"]
    check(last != "system", f"messages[{len(messages) - 1}].role", last, "be followed by a user message")
    ok = not add_generation_prompt or last == "user"
    must = "be 'user' where a generation prompt is added: drop the answer, or add_generation_prompt"
    check(ok, f"messages[{len(messages) - 1}].role", last, must)
