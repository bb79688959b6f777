"""Source files -> filtered, deduplicated, tokenised documents on disk, in one pass and bounded memory.

    <folder>/tokenizer.json
    <folder>/<source>/{train,held_out}-00000-of-00016.arrayrecord
    <folder>/manifest.json

A record is one document: little-endian uint32 ids, BOS first and EOS last. Document i of a source and split lies in
file i % virtual_shards. A document is held out by a hash of its text, so copies never lie on both sides.

All is written to `<folder>.partial`, which takes its final name once complete: what was cut short is never accepted,
and is started afresh. Equal settings and files give equal documents, in equal order. One process prepares, not each.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from dsv2_jax.config import ConfigError, DataConfig, DataError, SourceConfig, check
from dsv2_jax.data import filters
from dsv2_jax.data.dedup import Deduplicator
from dsv2_jax.data.sources import Malformed, expand, iter_records
from dsv2_jax.data.tokenizer import Tokenizer

VERSION = 1
SPLITS = ("train", "held_out")
TOKENIZER_SAMPLE_BYTES = 8 << 20  # a tokenizer is trained on about this much training text, spread over the sources
MALFORMED_LISTED = 100
_BATCH_BYTES = 1 << 20  # text tokenised at once
_AGAIN = "to prepare the data again, remove"


# --- what was asked for, and whether a folder holds it ---------------------------------------------------------------


def _file_digest(config: DataConfig, field: str) -> str | None:
    path = getattr(config, field)
    try:
        return path and hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"DataConfig.{field}={path!r}: must be a readable file ({error})") from error


def _settings(config: DataConfig, vocab_size: int) -> dict:
    """All that decides the content of the folder, as JSON values."""
    settings = {
        "version": VERSION,
        "vocab_size": vocab_size,
        "tokenizer": _file_digest(config, "tokenizer"),
        "held_out_share": config.held_out_share,
        "quality_filters": [rule.name for rule in filters.select(config.quality_filters)],
        "blocked_terms": _file_digest(config, "blocked_terms"),
        "dedup": config.dedup and dataclasses.asdict(config.dedup),
        "malformed_share": config.malformed_share,
        "virtual_shards": config.virtual_shards,
        "sources": [source.name for source in config.sources],
    }
    for source in config.sources:
        stats = [(str(path.absolute()), path.stat()) for path in expand(source)]
        listed = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        settings[f"source {source.name}"] = {
            "format": source.format,
            "text_field": source.text_field,
            "files": len(stats),
            "bytes": sum(stat.st_size for _, stat in stats),
            "digest": hashlib.sha256(listed.encode()).hexdigest(),  # of paths, sizes and times of change
        }
    return settings


def _digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _differences(old: dict, new: dict) -> str:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} now" for key in keys)


def shard_path(folder: Path, source: str, split: str, shard: int, shards: int) -> Path:
    return folder / source / f"{split}-{shard:05d}-of-{shards:05d}.arrayrecord"


def _finished(folder: Path) -> dict:
    """The manifest of a prepared folder; ConfigError if it is none or its files are not all there."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        settings, sources = manifest["settings"], manifest["sources"]
        shards = settings["virtual_shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: missing or damaged ({error!r}): {_AGAIN} {folder}") from error
    files = [shard_path(folder, name, split, i, shards) for name in sources for split in SPLITS for i in range(shards)]
    if lost := [str(file) for file in [*files, folder / "tokenizer.json"] if not file.is_file()]:
        raise ConfigError(f"{lost[0]}: missing, as are {len(lost) - 1} others: {_AGAIN} {folder}")
    return manifest


def prepare(config: DataConfig, out: str | Path, vocab_size: int, progress: bool = True) -> dict:
    """Prepares `config` in the folder `out`, or finds it there, and returns the manifest.

    vocab_size: ids of the model; the tokenizer trained here has at most as many, one that is given must not have more.
    ConfigError if `out` holds data of other settings; DataError for damaged files or too many malformed records.
    """
    out = Path(out)
    settings = _settings(config, vocab_size)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        manifest = _finished(out)
        if manifest["config_digest"] != _digest(settings):
            what = _differences(manifest["settings"], settings)
            raise ConfigError(f"{out} was prepared otherwise ({what}): remove it, or choose another folder")
        return manifest
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    total = sum(path.stat().st_size for source in config.sources for path in expand(source))
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=not progress) as bar:
            manifest = _prepare(config, partial, vocab_size, bar)
        manifest = {"version": VERSION, "config_digest": _digest(settings), **manifest, "settings": settings}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
        os.replace(partial, out)
    except (OSError, RuntimeError) as error:  # of files, and of the writers of ArrayRecord
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{out}: preparing failed ({reason}): mend that, or make room, and start again") from error
    for name, source in manifest["sources"].items():
        if source["malformed_count"]:
            first, listed = source["malformed"][0], f"{out / 'manifest.json'} lists the first {MALFORMED_LISTED}"
            what = f"{source['malformed_count']} of {source['read']} records are malformed and left out"
            tqdm.write(f"source {name!r}: {what}, {first['where']} the first ({first['error']}); {listed}")
    return manifest


# --- the pass --------------------------------------------------------------------------------------------------------


class _Cleaner:
    """Record texts -> texts that stay, with the counts of what was taken out and why."""

    def __init__(self, config: DataConfig):
        self._rules = filters.select(config.quality_filters)
        self._blocked = config.blocked_terms and filters.BlockedTerms.load(config.blocked_terms)

    def __call__(self, text: str, removed: Counter) -> str | None:
        text, reason, cut = filters.apply(self._rules, text)
        removed.update(cut)
        if not text.strip():
            reason = "empty"
        elif not reason and self._blocked and self._blocked.find(text):
            reason = "blocked_terms"
        removed.update([reason] if reason else [])
        return None if reason else text


def _held_out_rank(text: str) -> float:
    """A hash of the text, even over [0, 1)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _sample(config: DataConfig, clean: _Cleaner) -> Iterator[str]:
    """Every n-th document that may train, for n that spreads TOKENIZER_SAMPLE_BYTES over all the files."""
    total = sum(path.stat().st_size for source in config.sources for path in expand(source))
    stride, size, number = max(1, math.ceil(total / TOKENIZER_SAMPLE_BYTES)), 0, 0
    for source in config.sources:
        for record in iter_records(source):
            number += 1
            if number % stride or isinstance(record, Malformed):
                continue
            text = clean(record.text, Counter())
            if text is not None and _held_out_rank(text) >= config.held_out_share:
                size += len(text.encode())
                yield text
            if size >= TOKENIZER_SAMPLE_BYTES:
                return


def _split(texts: Iterator[str], share: float) -> Iterator[tuple[str, str]]:
    """(split, text). Where no rank falls below the share the lowest one is held out, so that both splits have some."""
    spare: list[tuple[float, str]] = []  # the lowest so far, kept back until another is held out
    held_out = False
    for text in texts:
        rank = _held_out_rank(text)
        if rank < share:
            held_out = True
            yield "held_out", text
        else:
            spare = sorted([*spare, (rank, text)])
            given = spare if held_out else spare[1:]
            spare = spare[: len(spare) - len(given)]
            yield from (("train", text) for _, text in given)
    yield from (("train" if held_out else "held_out", text) for _, text in spare)


class _Source:
    """One source on its way: its records read, counted, judged, split, and written."""

    def __init__(self, config: DataConfig, source: SourceConfig, clean, dedup: Deduplicator | None, bar: tqdm):
        self._config, self._source, self._clean, self._dedup, self._bar = config, source, clean, dedup, bar
        self.read = self.malformed_count = self._bytes = 0
        self._total_bytes = sum(path.stat().st_size for path in expand(source))
        self.malformed: list[dict[str, str]] = []
        self.removed: Counter = Counter()

    def _texts(self) -> Iterator[str]:
        for record in iter_records(self._source):
            self.read, self._bytes = self.read + 1, self._bytes + record.size
            self._bar.update(record.size)
            if isinstance(record, Malformed):
                self.malformed_count += 1
                if len(self.malformed) < MALFORMED_LISTED:
                    self.malformed.append({"where": record.where, "error": record.error})
                else:  # a hopeless source stops here, not at its end
                    self._check_malformed(math.ceil(self.read * self._total_bytes / max(1, self._bytes)))
                continue
            text = self._clean(record.text, self.removed)
            if text is None:
                continue
            if self._dedup and (reason := self._dedup.duplicate(text)):
                self.removed[reason] += 1
                continue
            yield text
        self._check_malformed(self.read)

    def _check_malformed(self, records: int) -> None:
        """`records`: how many the source has; before its end, how many its bytes let expect."""
        if self.malformed_count / max(1, records) > self._config.malformed_share:
            listed = "\n".join(f"  {item['where']}: {item['error']}" for item in self.malformed)
            limit = f"more than DataConfig.malformed_share={self._config.malformed_share}"
            of = f"{self.read} records" + (f" (about {records} in all)" if records != self.read else "")
            what = f"source {self._source.name!r}: {self.malformed_count} of {of} are malformed, {limit}"
            raise DataError(f"{what}: mend them, leave them out, or raise it:\n{listed}")

    def documents(self) -> Iterator[tuple[str, str]]:
        return _split(self._texts(), self._config.held_out_share)


class _Shards:
    """Writers of one source's files, with the counts of what went in."""

    def __init__(self, folder: Path, source: str, shards: int, tokenizer: Tokenizer, stack: contextlib.ExitStack):
        (folder / source).mkdir()
        self._writers = {}
        for split in SPLITS:
            paths = [shard_path(folder, source, split, i, shards) for i in range(shards)]
            self._writers[split] = [ArrayRecordWriter(str(path), "group_size:1") for path in paths]
            for writer in self._writers[split]:
                stack.callback(writer.close)
        self._tokenizer = tokenizer
        self.counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
        self.tokens_V = {split: np.zeros(tokenizer.vocab_size, np.int64) for split in SPLITS}

    def write(self, documents: list[tuple[str, str]]) -> None:
        encoded = self._tokenizer.encode_documents([text for _, text in documents])
        for (split, text), ids in zip(documents, encoded, strict=True):
            counts, writers = self.counts[split], self._writers[split]
            writers[counts["documents"] % len(writers)].write(np.array(ids, "<u4").tobytes())
            counts["documents"] += 1
            counts["tokens"] += len(ids)
            counts["bytes"] += len(text.encode())
        for split, tokens_V in self.tokens_V.items():
            of_split = (ids for (side, _), ids in zip(documents, encoded, strict=True) if side == split)
            ids = np.fromiter(itertools.chain.from_iterable(of_split), np.int64)
            tokens_V += np.bincount(ids, minlength=len(tokens_V))


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def unigram_bits(train_V: np.ndarray, held_out_V: np.ndarray, bos: int) -> float:
    """Bits the held-out tokens cost under the add-one-smoothed training frequencies; BOS is given, EOS is coded."""
    train_V, held_out_V = np.delete(train_V, bos), np.delete(held_out_V, bos)
    return float(held_out_V @ -np.log2((train_V + 1) / (train_V.sum() + len(train_V))))


def _prepare(config: DataConfig, folder: Path, vocab_size: int, bar: tqdm) -> dict:
    clean, dedup = _Cleaner(config), config.dedup and Deduplicator(config.dedup)
    if config.tokenizer:
        tokenizer = Tokenizer.load(config.tokenizer)
        must = f"have at most the model's vocab_size={vocab_size} ids; this one has {tokenizer.vocab_size}"
        check(tokenizer.vocab_size <= vocab_size, "DataConfig.tokenizer", config.tokenizer, must)
    else:
        bar.set_postfix_str("training the tokenizer")
        tokenizer = Tokenizer.train(_sample(config, clean), vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    sources, tokens_V = {}, {split: np.zeros(tokenizer.vocab_size, np.int64) for split in SPLITS}
    for source in config.sources:
        bar.set_postfix_str(source.name)
        reading = _Source(config, source, clean, dedup, bar)
        with contextlib.ExitStack() as stack:
            shards = _Shards(folder, source.name, config.virtual_shards, tokenizer, stack)
            for batch in _batches(reading.documents()):
                shards.write(batch)
        for split in SPLITS:
            if not shards.counts[split]["documents"]:
                found = f"{reading.read} records, removed {dict(reading.removed)}, {shards.counts}"
                raise DataError(f"source {source.name!r}: no {split} document ({found}): give it more text")
            tokens_V[split] += shards.tokens_V[split]
        sources[source.name] = {
            **shards.counts,
            "removed": dict(sorted(reading.removed.items())),
            "malformed": reading.malformed,
            "malformed_count": reading.malformed_count,
            "read": reading.read,
        }
    most, shards = max(counts["train"]["documents"] for counts in sources.values()), config.virtual_shards
    must = f"be at most {most}, the training documents of the largest source, so that every shard has one"
    check(shards <= most, "DataConfig.virtual_shards", shards, must)
    held_out_bytes = sum(counts["held_out"]["bytes"] for counts in sources.values())
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "sources": sources,
        "unigram_held_out_bits_per_byte": unigram_bits(*tokens_V.values(), tokenizer.bos) / held_out_bytes,
    }
