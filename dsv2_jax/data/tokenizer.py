"""Byte-level BPE: text <-> token ids, with BOS and EOS added here and nowhere else.

`tokenizers` does the merging. What a tokenizer.json says about added BOS and EOS, truncation and padding is ignored,
and text that spells a special token stays text: a special id is there because this code put it there. PAD is EOS.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv2_jax.config import ConfigError, check

# (BOS, EOS) as spelled by the tokenizers trained here and by the ones released with DeepSeek's weights
SPECIAL_NAMES = (
    ("<|begin_of_sentence|>", "<|end_of_sentence|>"),
    ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
# What opens a turn where a chat template says so, as V2.5's does: special then, and text where none does
ROLE_NAMES = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
MOST_IDS = 2**24  # far beyond any vocabulary: a damaged id would ask for gigabytes
# Text that byte-level BPE keeps, and a tokenizer that normalises or is of another kind does not
PROBE = "\t Ab  \u00c9e\u0301 \uff11\ufb01 0123\r\n\u4f60\u597d\uff0c\U0001f600\n "

# Byte-level BPE writes a visible Latin-1 character as itself and the other bytes, in order, as U+0100, U+0101, ...
_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = tuple(byte for byte in range(256) if byte not in _VISIBLE)
BYTE_OF = {chr(b): b for b in _VISIBLE} | {chr(0x100 + i): b for i, b in enumerate(_HIDDEN)}


class Tokenizer:
    """A byte-level BPE with a BOS and an EOS.

    bos, eos, vocab_size: ids and their number. Everything that decodes gives "" for special tokens and for ids that
    the tokenizer lacks (a model's vocabulary may be padded), and U+FFFD for bytes that are no UTF-8.
    names: how BOS and EOS are spelled. template: the chat template it came with, if any. roles: the ids of those
    `ROLE_NAMES` that the template writes.
    """

    def __init__(self, inner: tokenizers.Tokenizer, origin: str = "tokenizer", template: str | None = None):
        vocabulary = inner.get_vocab(with_added_tokens=True)
        names = next((pair for pair in SPECIAL_NAMES if set(pair) <= set(vocabulary)), None)
        if names is None:
            expected = " or ".join("/".join(pair) for pair in SPECIAL_NAMES)
            raise ConfigError(f"{origin}: has no begin and end of sentence tokens: expected {expected}")
        if missing := [byte for char, byte in BYTE_OF.items() if char not in vocabulary]:
            raise ConfigError(f"{origin}: is no byte-level BPE: it has no token for byte {missing[0]:#04x}")
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ConfigError(f"{origin}: gives one id to several tokens; get the file again")
        if (largest := max(vocabulary.values())) >= MOST_IDS:
            raise ConfigError(
                f"{origin}: has a token of id {largest}; a vocabulary has less than {MOST_IDS}; get the file again"
            )
        self.names, self.template = names, template
        self.roles = {name: vocabulary[name] for name in ROLE_NAMES if name in vocabulary and name in (template or "")}
        inner.add_special_tokens([*names, *self.roles])
        inner.encode_special_tokens = True  # never read a special token out of text
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.bos, self.eos = (vocabulary[name] for name in names)
        self.vocab_size = max(vocabulary.values()) + 1
        added = inner.get_added_tokens_decoder()  # id -> AddedToken; their content is plain text
        self._bytes = [b""] * self.vocab_size
        for token, i in vocabulary.items():
            if i not in added:
                plain = not BYTE_OF.keys() >= set(token)
                self._bytes[i] = token.encode() if plain else bytes(BYTE_OF[char] for char in token)
            elif not added[i].special and token not in self.roles:
                self._bytes[i] = token.encode()
        if (back := self.decode(self.encode(PROBE))) != PROBE:
            raise ConfigError(f"{origin}: loses text: {PROBE!r} comes back as {back!r}; byte-level BPE changes nothing")

    @classmethod
    def load(cls, path: str | Path | epath.Path) -> "Tokenizer":
        """Reads a tokenizer.json: ours, a released DeepSeek one, or any byte-level BPE with BOS and EOS named so; and
        the chat template beside it, which `dsv2_jax.data.chat` knows or refuses when it is asked to render."""
        path = epath.Path(path)
        try:
            return cls(tokenizers.Tokenizer.from_buffer(path.read_bytes()), str(path), _template(path.parent))
        except (ConfigError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and where it panics what is none
            raise ConfigError(f"{path}: not a readable tokenizer.json ({error}); get the file again") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A BPE of at most `vocab_size` ids: BOS, EOS, 256 bytes, then merges. Digits stay single, as in DeepSeek's."""
        least = len(SPECIAL_NAMES[0]) + 256
        check(vocab_size >= least, "vocab_size", vocab_size, f"be at least {least}: 256 bytes, BOS and EOS")
        inner = tokenizers.Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_NAMES[0]),
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    def save(self, path: str | Path) -> None:
        self._inner.save(str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS and EOS."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> list[int]:
        """[BOS, ids, EOS]."""
        return [self.bos, *self.encode(text), self.eos]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of each text, on all cores."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[self.bos, *encoding.ids, self.eos] for encoding in encodings]

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes, perhaps part of a character, that a token stands for."""
        return self._bytes[token] if 0 <= token < self.vocab_size else b""

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes of each token's text, 0 for special ones; over a document they sum to its bytes."""
        return np.array([len(token) for token in self._bytes], np.int32)


def _template(folder: epath.Path) -> str | None:
    """The chat template of the tokenizer in `folder`, from either file that may hold it."""
    if (file := folder / "chat_template.jinja").exists():
        return file.read_bytes().decode("utf-8", "replace")
    if not (file := folder / "tokenizer_config.json").exists():
        return None
    try:
        template = json.loads(file.read_bytes()).get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {one["name"]: one["template"] for one in template}.get("default")
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON of a tokenizer ({error!r:.120}); get it again") from None
    return template if isinstance(template, str) else None


class TextStream:
    """Decodes one token after another, holding back characters that are not complete: joined, it is `decode`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.bytes_of(int(token)))

    def finish(self) -> str:
        """What is held back, at the end."""
        return self._decoder.decode(b"", final=True)
