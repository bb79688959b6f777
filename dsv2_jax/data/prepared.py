"""Reading the prepared folder: one ArrayRecord file of documents per source, split and virtual shard, and a manifest.

    manifest.json    {"vocab_size": V, "sources": {name: {"train": {"documents": n, ...}, "held_out": {...}}}, ...}
    <source>/{train,held_out}-<shard>-of-<shards>.arrayrecord    (five digits)
                     a record: the little-endian uint32 token ids of one document, BOS and EOS included

Every error names the file and the remedy.
"""

import json
from pathlib import Path

import grain
import numpy as np

from dsv2_jax.config import ConfigError, DataError

AGAIN = "prepare the data again (into an empty folder)"


class Records:
    """The documents of one prepared file by index: a random-access source for Grain."""

    def __init__(self, path: Path, vocab_size: int):
        if not path.exists():
            raise DataError(f"{path} is missing: {AGAIN}")
        try:
            self._source = grain.sources.ArrayRecordDataSource(str(path))
        except RuntimeError as error:
            raise DataError(f"{path} is truncated or no ArrayRecord file ({error}): {AGAIN}") from error
        self._path, self._vocab_size = path, vocab_size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            record = self._source[index]
        except RuntimeError as error:
            raise DataError(f"{self._path}, record {index} is damaged ({error}): {AGAIN}") from error
        if len(record) < 8 or len(record) % 4:
            what = f"{len(record)} bytes, not two or more uint32 token ids"
            raise DataError(f"{self._path}, record {index} holds {what}: {AGAIN}")
        ids = np.frombuffer(record, "<u4")
        if (largest := ids.max()) >= self._vocab_size:
            what = f"token {largest} in a vocabulary of {self._vocab_size}"
            raise DataError(f"{self._path}, record {index} holds {what}: {AGAIN}")
        return ids


def read_manifest(prepared: Path, token_bytes_V: np.ndarray) -> dict:
    """manifest.json, checked against the tokenizer's table of bytes per token."""
    path = prepared / "manifest.json"
    if not path.exists():
        raise DataError(f"{path} is missing, as if preparing had been cut short: {AGAIN}")
    try:
        manifest = json.loads(path.read_text())
        vocab_size, sources = manifest["vocab_size"], manifest["sources"]
        [source[split]["documents"] for source in sources.values() for split in ("train", "held_out")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): {AGAIN}") from error
    if vocab_size != len(token_bytes_V):
        what = f"vocab_size {vocab_size}, but the tokenizer has {len(token_bytes_V)} tokens"
        raise DataError(f"{path}: {what}: use the tokenizer.json beside it, or {AGAIN}")
    return manifest


def train_file(prepared: Path, source: str, shard: int, shards: int) -> Path:
    """The file of one shard; ConfigError where the data was prepared with another number of shards."""
    path = prepared / source / f"train-{shard:05d}-of-{shards:05d}.arrayrecord"
    if not path.exists():
        found = {name.stem.rpartition("-of-")[2] for name in path.parent.glob("train-*-of-*.arrayrecord")}
        if found and found != {f"{shards:05d}"}:
            counts = ", ".join(str(int(count)) for count in sorted(found) if count.isdigit())
            must = f"be what the data was prepared with ({counts}, see {path.parent}), or {AGAIN}"
            raise ConfigError(f"DataConfig.virtual_shards={shards}: must {must}")
    return path


def check_documents(prepared: Path, source: str, split: str, found: int, expected: int) -> None:
    """DataError unless the files hold as many documents as the manifest says: none is of an older preparation."""
    if found != expected:
        what = f"the {split} files of source {source!r} hold {found} documents, manifest.json says {expected}"
        raise DataError(f"{prepared / source}: {what}: {AGAIN}")
