"""Quality heuristics of two reports, and the filter of blocked content.

`RULES` is the one table: what each rule measures, the bounds it accepts, and where they come from.

    Gopher  Rae et al. 2021, arXiv 2112.11446, appendix A.1: quality filtering and repetition removal (table A1)
    C4      Raffel et al. 2020, arXiv 1910.10683, section 2.2 (the journal's version: 5 sentences, 3 words)

C4's line rules run first and edit the text; a rule about the document then keeps it or drops it, the first to object
being the one that counts. Both reports filter web pages: on code most of these rules misfire.

A word is a run of characters between spaces; each Chinese character or Japanese kana is a word of its own, since no
spaces separate them (n-gram bounds then mean characters, and are stricter). Where those are most of the words, rules
about the shape of words or about English say nothing. Lines and paragraphs are the ones that are not blank.
"""

import difflib
import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv2_jax.config import ConfigError

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{CJK}]|[^\\s{CJK}]+")
_CJK_WORD = re.compile(f"[{CJK}]")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)|[。！？]")
_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "‣", "▪", "●", "◦", "·", "-", "*")
_ELLIPSES = ("...", "…")
_TERMINAL = (".", "!", "?", '"', "”", "。", "！", "？")


def words(text: str) -> list[str]:
    return _WORD.findall(text)


class Document:
    """A text with what several rules need of it, found once."""

    def __init__(self, text: str):
        self.text = text
        self._ngrams: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @functools.cached_property
    def words(self) -> list[str]:
        return words(self.text)

    @functools.cached_property
    def spaced(self) -> bool:
        """Whether spaces separate most of the words."""
        return 2 * sum(1 for word in self.words if _CJK_WORD.match(word)) <= len(self.words)

    @functools.cached_property
    def lines(self) -> list[str]:
        return [line for raw in self.text.splitlines() if (line := raw.strip())]

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        return [part for raw in _PARAGRAPH_END.split(self.text) if (part := raw.strip())]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Characters of each word, int64."""
        return np.array([len(word) for word in self.words], np.int64)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(id of the n-gram that begins at each word, how often each id occurs); exact, from the (n-1)-grams."""
        if n not in self._ngrams:
            if n == 1:
                known: dict[str, int] = {}
                keys = np.array([known.setdefault(word, len(known)) for word in self.words], np.int64)
            else:
                shorter, counts = self.ngrams(n - 1)
                first, vocabulary = self.ngrams(1)
                keys = shorter[:-1] * len(vocabulary) + first[n - 1 :]
            _, ids, counts = np.unique(keys, return_inverse=True, return_counts=True)
            self._ngrams[n] = ids, counts
        return self._ngrams[n]


# --- what the rules measure: None where a rule has nothing to say -----------------------------------------------------


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean_word_length(document: Document) -> float | None:
    return _share(document.lengths.sum(), len(document.words)) if document.spaced else None


def _stop_words(document: Document) -> int | None:
    found = {word.strip(".,;:!?\"'()").lower() for word in document.words} if document.spaced else None
    return None if found is None else len(found & _STOP_WORDS)


def _symbols(document: Document, *symbols: str) -> float:
    return _share(sum(document.text.count(symbol) for symbol in symbols), len(document.words))


def _lines_that(document: Document, test: Callable[[str], bool]) -> float:
    return _share(sum(map(test, document.lines)), len(document.lines))


def _alphabetic(document: Document) -> float:
    return _share(sum(any(map(str.isalpha, word)) for word in document.words), len(document.words))


def _repeats(parts: list[str]) -> float:
    """Share of the parts that are copies of an earlier one."""
    return _share(len(parts) - len(set(parts)), len(parts))


def _repeated_characters(parts: list[str]) -> float:
    whole = sum(map(len, parts))
    return _share(whole - sum(map(len, set(parts))), whole)


def _top_ngram(document: Document, n: int) -> float:
    """Share of the characters in the commonest n-gram (of several, the longest), if it occurs twice at all."""
    ids, counts = document.ngrams(n)
    if not len(ids) or counts.max() < 2:
        return 0.0
    ends = np.concatenate([[0], np.cumsum(document.lengths)])
    longest = (ends[n:] - ends[:-n])[counts[ids] == counts.max()].max()
    return min(1.0, _share(counts.max() * longest, ends[-1]))


def _duplicate_ngrams(document: Document, n: int) -> float:
    """Share of the characters in n-grams that occur more than once, each character counted once."""
    ids, counts = document.ngrams(n)
    starts = np.flatnonzero(counts[ids] > 1)
    depth = np.zeros(len(document.words) + 1, np.int64)  # how many such n-grams cover each word
    np.add.at(depth, starts, 1)
    np.add.at(depth, starts + n, -1)
    return _share(document.lengths[np.cumsum(depth)[:-1] > 0].sum(), document.lengths.sum())


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Keeps a line or a document whose `measure` lies in [low, high], or, given a `pattern`, cuts out what matches."""

    name: str
    source: str
    about: str  # "text": pattern is cut out; "line": lines are dropped; "document": documents are dropped
    measure: Callable | None = None  # of a line (str) or a Document -> number, or None to abstain
    low: float = -np.inf
    high: float = np.inf
    pattern: re.Pattern | None = None

    def keeps(self, item: str | Document) -> bool:
        value = self.measure(item)
        return value is None or self.low <= value <= self.high


_C4 = "arXiv 1910.10683, section 2.2"
_QUALITY = "arXiv 2112.11446, appendix A.1, quality filtering"
_REPETITION = "arXiv 2112.11446, appendix A.1, table A1"
_LINE_SHARE = _REPETITION + " (a duplicate: any copy after the first)"
_TOP = ((2, 0.20), (3, 0.18), (4, 0.16))
_DUPLICATE = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))

RULES: tuple[Rule, ...] = (
    Rule("c4_citation_markers", _C4, "text", pattern=_CITATION),
    Rule("c4_unpunctuated_lines", _C4, "line", lambda line: line.endswith(_TERMINAL), low=1),
    Rule("c4_short_lines", _C4, "line", lambda line: len(words(line)), low=5),
    Rule("c4_javascript_lines", _C4, "line", lambda line: "javascript" in line.lower(), high=0),
    Rule("c4_policy_lines", _C4, "line", lambda line: any(p in line.lower() for p in _POLICY), high=0),
    Rule("c4_lorem_ipsum", _C4, "document", lambda d: "lorem ipsum" in d.text.lower(), high=0),
    Rule("c4_curly_bracket", _C4, "document", lambda d: "{" in d.text, high=0),
    Rule("c4_sentences", _C4, "document", lambda d: len(_SENTENCE_END.findall(d.text)), low=3),
    Rule("gopher_word_count", _QUALITY, "document", lambda d: len(d.words), low=50, high=100_000),
    Rule("gopher_mean_word_length", _QUALITY, "document", _mean_word_length, low=3, high=10),
    Rule("gopher_hashes", _QUALITY, "document", lambda d: _symbols(d, "#"), high=0.1),
    Rule("gopher_ellipses", _QUALITY, "document", lambda d: _symbols(d, *_ELLIPSES), high=0.1),
    Rule("gopher_bullet_lines", _QUALITY, "document", lambda d: _lines_that(d, lambda s: s.startswith(_BULLETS)),
         high=0.9),
    Rule("gopher_ellipsis_lines", _QUALITY, "document", lambda d: _lines_that(d, lambda s: s.endswith(_ELLIPSES)),
         high=0.3),
    Rule("gopher_alphabetic_words", _QUALITY, "document", _alphabetic, low=0.8),
    Rule("gopher_stop_words", _QUALITY, "document", _stop_words, low=2),
    Rule("gopher_duplicate_lines", _LINE_SHARE, "document", lambda d: _repeats(d.lines), high=0.30),
    Rule("gopher_duplicate_paragraphs", _LINE_SHARE, "document", lambda d: _repeats(d.paragraphs), high=0.30),
    Rule("gopher_duplicate_line_characters", _LINE_SHARE, "document", lambda d: _repeated_characters(d.lines),
         high=0.20),
    Rule("gopher_duplicate_paragraph_characters", _LINE_SHARE, "document",
         lambda d: _repeated_characters(d.paragraphs), high=0.20),
    *(Rule(f"gopher_top_{n}gram", _REPETITION, "document", functools.partial(_top_ngram, n=n), high=high)
      for n, high in _TOP),
    *(Rule(f"gopher_duplicate_{n}grams", _REPETITION, "document", functools.partial(_duplicate_ngrams, n=n), high=high)
      for n, high in _DUPLICATE),
)  # fmt: skip


def select(names: Iterable[str]) -> tuple[Rule, ...]:
    """The rules of these names ("all": every rule), in the order of the table whatever the order of the names."""
    names, known = set(names), [rule.name for rule in RULES]
    for name in sorted(names - {*known, "all"}):
        nearest = difflib.get_close_matches(name, known, 1, 0)[0]
        raise ConfigError(f"DataConfig.quality_filters: no rule {name!r}: did you mean {nearest!r}, or 'all'?")
    return tuple(rule for rule in RULES if rule.name in names or "all" in names)


def apply(rules: tuple[Rule, ...], text: str) -> tuple[str, str | None, Counter]:
    """The edited text; the rule that drops the document, or None; and markers and lines cut, by rule."""
    cut = Counter()
    for rule in rules:
        if rule.about == "text":
            text, cut[rule.name] = rule.pattern.subn("", text)
    if line_rules := [rule for rule in rules if rule.about == "line"]:
        kept = []
        for line in text.split("\n"):
            bare = line.strip()
            if reason := bare and next((rule.name for rule in line_rules if not rule.keeps(bare)), None):
                cut[reason] += 1
            else:
                kept.append(line)
        text = "\n".join(kept)
    document = Document(text)
    dropped = next((rule.name for rule in rules if rule.about == "document" and not rule.keeps(document)), None)
    return text, dropped, +cut


# --- blocked content -------------------------------------------------------------------------------------------------


def _fold(text: str) -> str:
    """Compatibility forms (full-width letters), case and white space made alike."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _alternatives(terms: list[str]) -> str:
    """A regular expression for any of the sorted terms, shared beginnings tried once."""
    groups: dict[str, list[str]] = {}
    for term in terms:
        groups.setdefault(term[:1], []).append(term)
    patterns = []
    for group in groups.values():
        ends = zip(group[0], group[-1], strict=False)  # sorted, so what these two share all share
        prefix = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
        rest = [term[len(prefix) :] for term in group]
        tails = _alternatives([tail for tail in rest if tail]) if len(group) > 1 else ""
        patterns.append(re.escape(prefix) + (f"(?:{tails}){'?' if '' in rest else ''}" if tails else ""))
    return "|".join(patterns)


class BlockedTerms:
    """Finds any of a list of terms: whole words where a term begins or ends in a letter or digit, but a term with a
    Chinese or Japanese character anywhere, since nothing marks where its words end. Case and width do not matter."""

    def __init__(self, terms: Iterable[str]):
        folded = sorted({term for raw in terms if (term := _fold(raw))})
        if not folded:
            raise ConfigError("DataConfig.blocked_terms: the file names no term: fill it, or set None")
        inside = [term for term in folded if _CJK_WORD.search(term)]
        apart = [term for term in folded if not _CJK_WORD.search(term)]
        patterns = [_alternatives(inside)] if inside else []
        if apart:
            letter = f"[^\\W{CJK}]"  # where the term itself begins or ends in another sign, any neighbour will do
            before, after = f"(?:(?<!{letter})|(?=\\W))", f"(?:(?!{letter})|(?<=\\W))"
            patterns.append(f"{before}(?:{_alternatives(apart)}){after}")
        self._pattern = re.compile("|".join(patterns))

    @classmethod
    def load(cls, path: str | Path) -> "BlockedTerms":
        """Terms of a UTF-8 text file, one a line."""
        try:
            return cls(Path(path).read_text("utf-8-sig").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"DataConfig.blocked_terms={str(path)!r}: must be a UTF-8 text file ({error})") from error

    def find(self, text: str) -> str | None:
        """The first blocked term in the text, folded; None if there is none."""
        match = self._pattern.search(_fold(text))
        return match and match.group()
