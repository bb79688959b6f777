"""Conversations as tokens, in the text the released chat models were trained on.

    BOS [system, blank line] `User: ` text, blank line, `Assistant: ` text EOS `User: ` ... [`Assistant:`]

No space follows the last `Assistant:`: the model writes it. This is the one renderer of the project; a `chat_template`
in a tokenizer_config.json is not run. BOS and EOS are put here, as ids: a message that spells them stays text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv2_jax.config import check
from dsv2_jax.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
ASSISTANT = "Assistant:"


@dataclass(frozen=True)
class Chat:
    """The tokens of a conversation; `response` marks those that an assistant wrote, each closing EOS included."""

    tokens: list[int]
    response: list[bool]


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> Chat:
    """Tokens of messages {"role", "content"}: at most one system message, first, then user and assistant in turn.

    With `add_generation_prompt` the text ends where the assistant is to write; without, it is one to learn from.
    Raises `ConfigError` naming the message that is out of turn.
    """
    _check_messages(messages, add_generation_prompt)
    tokens, response, pending = [tokenizer.bos], [False], ""

    def put(said: str, answer: str) -> None:
        # Both are merged into tokens as the one text they are; the answer begins after the bytes of what was said.
        ids, end, start = tokenizer.encode(said + answer), 0, len(said.encode())
        for token in ids:
            end += len(tokenizer.bytes_of(token))
            tokens.append(token)
            response.append(end > start)

    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            put(pending + ASSISTANT, f" {content}")
            tokens.append(tokenizer.eos)
            response.append(True)
            pending = ""
        else:
            pending += f"User: {content}\n\n" if role == "user" else f"{content}\n\n"
    put(pending + (ASSISTANT if add_generation_prompt else ""), "")
    return Chat(tokens, response)


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
