"""Files -> text records, one at a time: text, JSONL, Parquet, ArrayRecord, and Python's own standard library.

A record that cannot be used (bad JSON, no such field, bad UTF-8) comes out as `Malformed`, in its place among the
others; a file that cannot be read at all (cut short, of another format) is a `DataError`. One text file piece, line,
Parquet batch or ArrayRecord record is held at once.
"""

import codecs
import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordReader

from dsv2_jax.config import ConfigError, DataError, SourceConfig

STDLIB = "stdlib"
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TEXT_PIECE_BYTES = 32 << 10  # longer text files are read as several documents, about equally long, cut at line ends
_PARQUET_ROWS = 64  # decoded at once


@dataclass(frozen=True)
class Record:
    text: str
    where: str  # "path:line"; for Parquet and ArrayRecord the line is the number of the row or record, from 1
    size: int  # bytes of its file that it accounts for, in shows of progress


@dataclass(frozen=True)
class Malformed:
    where: str
    error: str
    size: int


def stdlib_files() -> list[Path]:
    """The standard library's .py files, its tests left out, in the order of their relative paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    if not found:
        raise ConfigError(f"SourceConfig.paths: 'stdlib': no .py files in {root}: name text files instead")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def expand(source: SourceConfig) -> list[Path]:
    """The files of a source, each once: those of "stdlib" first, then the others in sorted order."""
    found = set()
    for pattern in source.paths:
        if pattern == STDLIB:
            continue
        pattern = os.path.expanduser(pattern)
        paths = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        files = {Path(path) for path in paths if os.path.isfile(path)}
        if not files:
            remedy = f"name its files, as in {pattern}/**/*.txt" if os.path.isdir(pattern) else "check the spelling"
            raise ConfigError(f"SourceConfig.paths: {pattern!r} of source {source.name!r} matches no file: {remedy}")
        found |= files
    return (stdlib_files() if STDLIB in source.paths else []) + sorted(found)


def format_of(path: Path, source: SourceConfig) -> str:
    ending = path.suffix.lower().removeprefix(".")
    return source.format or (ending if ending in ("jsonl", "parquet", "arrayrecord") else "text")


def iter_records(source: SourceConfig) -> Iterator[Record | Malformed]:
    """Every record of every file, in the order of `expand`; only standard library files are never cut in pieces."""
    whole = set(stdlib_files()) if STDLIB in source.paths else ()
    for path in expand(source):
        kind = "text" if path in whole else format_of(path, source)
        if kind == "text":
            yield from _text(path, path in whole)
        elif kind == "jsonl":
            yield from _jsonl(path, source.text_field)
        elif kind == "parquet":
            yield from _parquet(path, source.text_field)
        else:
            yield from _arrayrecord(path)


def _decoded(data: bytes, path: Path, line: int) -> Record | Malformed:
    try:
        return Record(data.removeprefix(codecs.BOM_UTF8).decode(), f"{path}:{line}", len(data))
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        return Malformed(f"{path}:{line}", f"not UTF-8: byte {data[error.start]:#04x}", len(data))


def _text(path: Path, whole: bool) -> Iterator[Record | Malformed]:
    size, line = path.stat().st_size, 1
    pieces = 1 if whole else max(1, -(-size // TEXT_PIECE_BYTES))
    target = -(-size // pieces)
    with open(path, "rb") as file:
        while data := file.read(target):
            data += file.readline(target)
            for _ in range(3):  # a line too long to end here is cut, but not inside a character
                if not data.endswith(b"\n") and 0x80 <= (file.peek(1) or b"\0")[0] < 0xC0:
                    data += file.read(1)
            yield _decoded(data, path, line)
            line += data.count(b"\n")


def _checked(value, where: str, size: int, field: str) -> Record | Malformed:
    """`value` as a record if it is text that UTF-8 can write (JSON can spell lone surrogates)."""
    if not isinstance(value, str):
        return Malformed(where, f"{field!r} is {type(value).__name__}, not text", size)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Malformed(where, f"{field!r} holds the lone surrogate {value[error.start]!a}", size)
    return Record(value, where, size)


def _jsonl(path: Path, field: str) -> Iterator[Record | Malformed]:
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            line = _decoded(data, path, number)
            if isinstance(line, Malformed):
                yield line
            elif line.text.strip():
                yield _json_record(line, field)


def _json_record(line: Record, field: str) -> Record | Malformed:
    try:
        row = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        return Malformed(line.where, f"not JSON: {error}", line.size)
    if not isinstance(row, dict):
        return Malformed(line.where, f"a JSON {type(row).__name__}, not an object", line.size)
    if field not in row:
        return Malformed(line.where, f"no field {field!r} among {sorted(row)[:8]}", line.size)
    return _checked(row[field], line.where, line.size, field)


def _unreadable(path: Path, kind: str, error: object) -> DataError:
    return DataError(f"{path}: damaged, cut short, or no {kind} file ({error}): restore it or leave it out")


def _parquet(path: Path, field: str) -> Iterator[Record | Malformed]:
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise ConfigError(f"SourceConfig.text_field={field!r}: must be a column of {path}: {schema.names}")
            number, rows = 0, max(1, file.metadata.num_rows)
            share = path.stat().st_size / rows
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[field]):
                for scalar in batch.column(0):
                    number += 1
                    where, size = f"{path}:{number}", int(number * share) - int((number - 1) * share)
                    try:
                        yield _checked(scalar.as_py(), where, size, field)
                    except UnicodeDecodeError as error:
                        yield Malformed(where, f"not UTF-8: {error.reason}", size)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "Parquet", error) from error


def _arrayrecord(path: Path) -> Iterator[Record | Malformed]:
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:1M,max_parallelism:1")
    try:
        if not reader.ok():
            raise RuntimeError("no footer")
        count, size = reader.num_records(), path.stat().st_size
        for number in range(count):
            share = size * (number + 1) // count - size * number // count
            record = _decoded(reader.read(), path, number + 1)
            where = f"{path}:{number + 1}"
            if isinstance(record, Record):
                yield Record(record.text, where, share)
            else:
                yield Malformed(where, record.error, share)
        reader.close()  # raises, too, once a file has turned out to be damaged
    except RuntimeError as error:
        raise _unreadable(path, "ArrayRecord", error) from error
