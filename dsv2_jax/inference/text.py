"""Text in and out: prompts or conversations to tokens, `generate`, tokens to text."""

from collections.abc import Mapping, Sequence

from dsv2_jax.config import check
from dsv2_jax.data import chat
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.inference import generate as tokens
from dsv2_jax.inference.sampling import GREEDY, Sampling

Message = Mapping[str, str]


def generate(
    model,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seeds: int | Sequence[int] = 0,
    cache_length: int | None = None,
    prefill_chunk: int = 512,
) -> list[str]:
    """The continuation of every prompt, up to the model's end token or `max_new_tokens`.

        model, tokenizer = dsv2_jax.from_pretrained("deepseek-ai/DeepSeek-V2-Lite")
        dsv2_jax.generate(model, tokenizer, ["An attention function can be described as"], max_new_tokens=32)

    A prompt is text, or a conversation: a list of {"role", "content"} whose last message is the user's. The text of a
    conversation's answer can be put behind it as the assistant's message. BOS comes first, once, put there here.
    `inference.generate.generate` does the same for lists of tokens (the other arguments are its own), and
    `inference.stream.stream` yields one prompt's text as it comes, up to a stop string.
    """
    check(tokenizer is not None, "tokenizer", None, "be one: the model's folder had no tokenizer.json")
    check(not isinstance(prompts, str), "prompts", prompts, "be a list: write [prompt] for a single one")
    drawn = tokens.generate(
        model,
        [encode(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos=tokenizer.eos,
        seeds=seeds,
        cache_length=cache_length,
        prefill_chunk=prefill_chunk,
    )
    texts = [tokenizer.decode(row) for row in drawn.tokens]
    return [
        text if isinstance(prompt, str) else text.removeprefix(chat.answer_space(tokenizer))
        for prompt, text in zip(prompts, texts)
    ]


def encode(tokenizer: Tokenizer, prompt: str | Sequence[Message]) -> list[int]:
    """The tokens of a text or of a conversation that waits for its answer, BOS first."""
    if isinstance(prompt, str):
        return [tokenizer.bos, *tokenizer.encode(prompt)]
    return chat.render(tokenizer, prompt, add_generation_prompt=True).tokens
