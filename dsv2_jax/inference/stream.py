"""Text out of a model as it comes: whole characters, and nothing of the string that ends it."""

from collections.abc import Generator, Iterable, Sequence

import jax

from dsv2_jax.config import check
from dsv2_jax.data import chat
from dsv2_jax.data.tokenizer import TextStream, Tokenizer
from dsv2_jax.inference.generate import advance, start
from dsv2_jax.inference.sampling import GREEDY, Sampling
from dsv2_jax.inference.text import Message, encode


def stream(
    model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Iterable[str] = (),
    cache_length: int | None = None,
    prefill_chunk: int = 512,
    tokens_at_once: int = 8,
) -> Generator[str, None, str]:
    """Yield the continuation of `prompt` piece by piece; the generator returns why it ended: "eos", "stop" or "length".

    A prompt is text or a conversation, as for `inference.text.generate`. Pieces are whole characters. The text ends
    before the first stop string to be complete, however tokens cut it: what may still become one is held back. The host
    looks at the tokens once every `tokens_at_once`.
    """
    stops, text = StopStrings(stop), TextStream(tokenizer)
    state = start(model, [encode(tokenizer, prompt)], max_new_tokens, [seed], cache_length, prefill_chunk)
    done, begins_answer = 0, not isinstance(prompt, str)
    while True:
        state = advance(model, state, min(done + tokens_at_once, max_new_tokens), tokenizer.eos, sampling)
        tokens_L, count, finished = jax.device_get((state.tokens_BL[0], state.counts_B[0], state.finished_B[0]))
        new, done = tokens_L[done:count].tolist(), int(count)
        last = finished or done == max_new_tokens
        piece = stops.push("".join(map(text.feed, new)) + (text.finish() if last else ""))
        piece += stops.flush() if last else ""
        if piece and begins_answer:
            piece, begins_answer = piece.removeprefix(chat.answer_space(tokenizer)), False
        if piece:
            yield piece
        if stops.found or last:
            return "stop" if stops.found else "eos" if finished else "length"


class StopStrings:
    """Lets text pass up to the stop string that is the first to be complete (of two at once, the longer)."""

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(stops)
        check(all(self.stops), "stop", self.stops, "not hold an empty string")
        self.found = False
        self._held = ""

    def push(self, piece: str) -> str:
        """What may be printed now that `piece` has come; the longest suffix that can begin a stop string waits."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        self.found = bool(ends)
        keep = 0 if self.found else max((_overlap(text, stop) for stop in self.stops), default=0)
        passed = min(ends)[1] if ends else len(text) - keep
        self._held = text[len(text) - keep :]
        return text[:passed]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` with which `text` ends."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
