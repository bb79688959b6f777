"""Published folder -> our checkpoint, and back: one tensor at a time, so that neither is ever in memory.

Importing, a piece of one tensor is held (at most `PIECE` bytes as we store it, and a band of it as published) while the
chunk before is being written. To write several at once would be a third faster.

An imported model looks like a run's folder with one checkpoint, of step 0, that holds a model and no training state:

    checkpoints/0/{params,config,checksums}    bfloat16 tensors are stored so, all others in float32 (or as asked)
    tokenizer.json, generation_config.json ... as they were published

Both directions check everything they can before they write, go on where an interrupted run stopped, and put what they
write under its final name only when it is whole.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from dsv2_jax import checkpoint, config_io
from dsv2_jax.checkpoint import CheckpointError
from dsv2_jax.config import DTYPES, ConfigError, ModelConfig, check
from dsv2_jax.hf import digests, mapping, small_files
from dsv2_jax.hf.arrays import OCDBT, Arrays, Names, word_sum
from dsv2_jax.hf.config import differences, is_tied, model_config, read_json
from dsv2_jax.hf.journal import Journal
from dsv2_jax.hf.mapping import Entry
from dsv2_jax.hf.pretrained import load_tokenizer
from dsv2_jax.hf.safetensors import Folder, FolderError
from dsv2_jax.hf.shard_writer import JOURNAL as EXPORT_JOURNAL
from dsv2_jax.hf.shard_writer import ShardWriter, open_journal, writing

IMPORT_JOURNAL = "import.journal"
PIECE = 64 * 2**20  # bytes of a tensor that are converted and stored at once
SHARD_BYTES = 5 * 10**9

Progress = Callable[[int, int], None]  # bytes verified or converted since the last call, bytes in all


def _silent(done: int, total: int) -> None:
    pass


def import_folder(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    dtype: str | None = None,
    dry_run: bool = False,
    report: Callable[[str], None] = print,
    progress: Progress = _silent,
) -> list[str]:
    """The model of the published folder `src` as a checkpoint in the folder `dst`.

    First every file whose SHA-256 the download recorded (see `digests`) is read and compared, once however often the
    import is stopped; `progress` counts its bytes too.

    Args:
      dtype: in which all arrays are stored; None: as published where that is bfloat16, otherwise float32.
      dry_run: report every mapping, write nothing, return every problem.
      report: told, too, of how many files no SHA-256 is recorded.

    Raises `FolderError` for what is wrong with the folders, `ConfigError` with config.json or the tokenizer.
    """
    src, dst = _local(src), _local(dst)
    check(dtype in (None, *DTYPES), "dtype", dtype, f"be None or one of {', '.join(DTYPES)}")
    if dry_run:
        return _problems(src, dst, dtype, report)
    source = _Source.open(src)
    load_tokenizer(src / small_files.TOKENIZER, source.config.vocab_size)  # a wrong one while nothing is written yet
    beside = small_files.read(src)
    mapping.refuse(mapping.check(source.config, source.folder, source.tied), src)
    recorded = digests.recorded(source.folder.files())
    if unknown := len(source.folder.files()) - len(recorded):
        report(f"{src}: no SHA-256 is recorded of {unknown} files; {digests.REMEDY}")
    work, final = dst / "checkpoints" / "0.importing", dst / "checkpoints" / "0"
    stored = (dtype, PIECE, OCDBT)
    identity = _digest(_fingerprint(source.folder), sorted(recorded.values()), source.published, stored)
    with writing(dst), _open_journal(dst, identity, final) as journal:
        if not journal.found:
            shutil.rmtree(work, ignore_errors=True)
            for name in small_files.NAMES:  # of an import of another source that was stopped
                (dst / name).unlink(missing_ok=True)
        if not final.exists():
            work.mkdir(parents=True, exist_ok=True)
            entries = mapping.table(source.config, source.tied)
            kinds = _kinds(entries, source.folder, dtype)
            sums = _write_arrays(entries, source.folder, kinds, work / "params", recorded, journal, progress)
            document = {"model": config_io.to_dict(source.config), "published": source.published}
            checkpoint.write_documents(work, document, sums)
            for name, content in beside.items():
                (dst / name).write_bytes(content)
            work.rename(final)
        journal.remove()
    return []


def export_folder(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "bfloat16",
    dry_run: bool = False,
    report: Callable[[str], None] = print,
    progress: Progress = _silent,
) -> list[str]:
    """The model of our checkpoint `src` (see `checkpoint.locate`) as a published folder; transformers, vLLM load it.

    Args:
      shard_bytes: largest size of a safetensors file (a larger tensor has one of its own).
      dtype: of every tensor.
      dry_run: report every mapping, write nothing, return every problem.
      report: told, too, what is rounded, and what transformers computes otherwise.

    Raises `FolderError`, `CheckpointError`, and `ConfigError` where a published config.json cannot describe it.
    """
    dst = _local(dst)
    check(dtype in DTYPES, "dtype", dtype, f"be one of {', '.join(DTYPES)}")
    check(shard_bytes > 0, "shard_bytes", shard_bytes, "be positive")
    folder = checkpoint.locate(src, step)
    document, expected = checkpoint.load_config(folder), checkpoint.load_checksums(folder)
    config = config_io.parse(ModelConfig, document.get("model"), f"{folder}: model")
    files = small_files.published(folder, config, dtype, document.get("published") or {})
    entries, kind = mapping.table(config), np.dtype(dtype)
    total = sum(math.prod(entry.shape) for entry in entries) * kind.itemsize
    arrays, sums = Arrays(folder / "params"), {}
    for line in differences(config):
        report(f"{folder}: {line}")
    if kind.itemsize < max(arrays.dtype(entry.target).itemsize for entry in entries):
        report(f"{folder}: float32 weights are rounded to {dtype}; as float32 they would be exported as they are")
    if dry_run:
        for entry in entries:
            report(f"{_place(entry)} -> {entry.source}")
        return _complaints(*_place_checks(dst, EXPORT_JOURNAL, total))
    _check_empty(dst, EXPORT_JOURNAL)

    def verify() -> None:
        if wrong := [name for name in expected if sums.get(name) != expected[name]]:
            raise CheckpointError(f"{folder} is damaged: the checksum of {', '.join(wrong[:3])} is wrong")

    identity = _digest(str(folder), expected, document, dtype, shard_bytes)
    with ShardWriter(dst, shard_bytes, identity, beside=("config.json", *small_files.NAMES)) as writer:
        for entry in entries:
            writer.add(entry.source, entry.shape, kind, _published_pieces(entry, arrays, kind, sums))
        _check_space(dst, total - writer.done_bytes())
        progress(writer.done_bytes(), total)
        with writing(dst):
            for name, content in files.items():
                (dst / name).write_bytes(content)
        writer.finish(state=sums, wrote=lambda piece: progress(piece.nbytes, total), verify=verify)
    return []


# --- pieces of a tensor ----------------------------------------------------------------------------------------------


def _place(entry: Entry) -> str:
    index = f"[{', '.join(map(str, entry.index))}]" if entry.index else ""
    layout = f"{list(entry.shape)} transposed to {list(entry.our_shape)}" if entry.transposed else list(entry.shape)
    return f"{'.'.join(entry.target)}{index}  {layout}"


def _rows(entry: Entry, dtype: np.dtype) -> tuple[int, int]:
    """The axis of `our_shape` that is the slow one as published, and how many of its elements make a piece."""
    axis = len(entry.axes[0]) if entry.transposed else 0
    size = entry.our_shape[axis]
    row = math.prod(entry.our_shape) // size * dtype.itemsize
    return axis, min(size, max(1, PIECE // row))


def _pieces(entry: Entry, axis: int, rows: int) -> Iterator[tuple[slice, ...]]:
    """Indices into `our_shape`, together all of it."""
    whole = tuple(slice(0, size) for size in entry.our_shape)
    for first in range(0, entry.our_shape[axis], rows):
        part = slice(first, min(first + rows, entry.our_shape[axis]))
        yield (*whole[:axis], part, *whole[axis + 1 :])


# --- import ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Source:
    """A published folder, opened: its headers are right, and agree with each other."""

    published: dict
    config: ModelConfig
    tied: bool
    folder: Folder

    @classmethod
    def open(cls, src: pathlib.Path) -> "_Source":
        published, origin = read_json(src / "config.json"), str(src / "config.json")
        config, tied = model_config(published, origin), is_tied(published, origin)
        folder = Folder(src)
        mapping.check_size(config, folder)
        return cls(published, config, tied, folder)


def _problems(src: pathlib.Path, dst: pathlib.Path, dtype: str | None, report: Callable[[str], None]) -> list[str]:
    """Of an import, which is not begun; every mapping is reported."""
    tokenizer = functools.partial(load_tokenizer, src / small_files.TOKENIZER)
    try:
        source = _Source.open(src)
    except (ConfigError, FolderError) as error:
        return [str(error), *_complaints(tokenizer, *_place_checks(dst, IMPORT_JOURNAL, 0))]
    entries, present = mapping.table(source.config, source.tied), set(source.folder.keys())
    for entry in entries:
        report(f"{entry.source} -> {_place(entry)}")
    found = mapping.check(source.config, source.folder, source.tied)
    sizes = _sizes([entry for entry in entries if entry.source in present], source.folder, dtype)
    beside = functools.partial(tokenizer, source.config.vocab_size), functools.partial(small_files.read, src)
    return found + _complaints(*beside, *_place_checks(dst, IMPORT_JOURNAL, sum(sizes)))


def _kinds(entries: list[Entry], folder: Folder, dtype: str | None) -> dict[Names, np.dtype]:
    """The type in which each array is stored: that of its tensors if they agree on bfloat16."""
    if dtype:
        return {entry.target: np.dtype(dtype) for entry in entries}
    found: dict[Names, set[np.dtype]] = {}
    for entry in entries:
        found.setdefault(entry.target, set()).add(folder.dtype(entry.source))
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    return {target: bfloat16 if kinds == {bfloat16} else np.dtype(np.float32) for target, kinds in found.items()}


def _sizes(entries: list[Entry], folder: Folder, dtype: str | None) -> list[int]:
    """Bytes of every tensor as we store it."""
    kinds = _kinds(entries, folder, dtype)
    return [math.prod(entry.shape) * kinds[entry.target].itemsize for entry in entries]


def _verify(recorded: dict[pathlib.Path, str], journal: Journal, advance: Callable[[int], None]) -> None:
    """The SHA-256 of every file, but for those in the journal."""
    done = {line["verified"] for line in journal.entries if "verified" in line}
    left = {file: digest for file, digest in recorded.items() if file.name not in done}
    advance(sum(file.stat().st_size for file in recorded.keys() - left.keys()))
    digests.verify(left, advance=advance, passed=lambda file: journal.add({"verified": file.name}))


def _write_arrays(
    entries: list[Entry],
    folder: Folder,
    kinds: dict[Names, np.dtype],
    params: pathlib.Path,
    recorded: dict[pathlib.Path, str],
    journal: Journal,
    progress: Progress,
) -> dict[str, int]:
    """Every tensor of the verified files to its place in the arrays below `params`, but for those in the journal.

    Returns the checksums.
    """
    sizes, sums = [math.prod(entry.shape) * kinds[entry.target].itemsize for entry in entries], collections.Counter()
    written = [line for line in journal.entries if "entry" in line]
    for line in written:
        sums["/".join(entries[line["entry"]].target)] += line["sum"]
    done = {line["entry"] for line in written}
    left = sum(size for number, size in enumerate(sizes) if number not in done)
    _check_space(params.parent, left)
    total = sum(sizes) + sum(file.stat().st_size for file in recorded)

    def advance(size: int) -> None:
        progress(size, total)

    advance(sum(sizes) - left)
    _verify(recorded, journal, advance)
    arrays = _create_arrays(entries, kinds, params)

    def finished(number: int, word_sum_: int) -> None:
        journal.add({"entry": number, "sum": word_sum_})
        advance(sizes[number])

    try:
        for number, entry in enumerate(entries):
            if number in done:
                continue
            pieces, added = list(_pieces(entry, *_rows(entry, kinds[entry.target]))), 0
            for piece in pieces:
                values = mapping.read_finite(entry, folder, piece, kinds[entry.target])
                added += word_sum(values)
                then = functools.partial(finished, number, added) if piece is pieces[-1] else None
                arrays.write(entry.target, (*entry.index, *piece), values, then)
            sums["/".join(entry.target)] += added
        arrays.flush()
    finally:
        arrays.settle()
    return {name: value % 2**32 for name, value in sums.items()}


def _create_arrays(entries: list[Entry], kinds: dict[Names, np.dtype], params: pathlib.Path) -> Arrays:
    """Empty arrays, in chunks of one layer, one expert and one piece."""
    shapes = {entry.target: (*(i + 1 for i in entry.index), *entry.our_shape) for entry in entries}  # of the last entry
    arrays = Arrays(params)
    for entry in {entry.target: entry for entry in entries}.values():
        axis, rows = _rows(entry, kinds[entry.target])
        piece = next(_pieces(entry, axis, rows))
        chunk = (*(1 for _ in entry.index), *(part.stop for part in piece))
        arrays.create(entry.target, shapes[entry.target], kinds[entry.target], chunk)
    arrays.write_names(list(shapes))
    return arrays


# --- export ----------------------------------------------------------------------------------------------------------


def _published_pieces(entry: Entry, arrays: Arrays, dtype: np.dtype, sums: dict[str, int]) -> Iterator[np.ndarray]:
    """A tensor as published, piece after piece; what is read on the way is added to the `sums` of its array."""
    axis, rows = _rows(entry, dtype)
    stored = arrays.chunk(entry.target)[len(entry.index) + axis]
    name, inputs = "/".join(entry.target), math.prod(entry.axes[0])
    for piece in _pieces(entry, axis, -(-rows // stored) * stored):  # whole chunks: each is read once
        values = arrays.read(entry.target, (*entry.index, *piece))
        sums[name] = (sums.get(name, 0) + word_sum(values)) % 2**32
        values = values.astype(dtype, copy=False)
        if not mapping.is_finite(values):
            raise CheckpointError(f"{arrays.folder}: {_place(entry)} holds values that are not finite as {dtype}")
        yield values.reshape(inputs, -1).T if entry.transposed else values


# --- folders ---------------------------------------------------------------------------------------------------------


def _local(folder: str | os.PathLike) -> pathlib.Path:
    if "://" in str(folder):
        raise ConfigError(f"{folder}: must be a folder on a disk; convert there, and copy what comes out, or goes in")
    return pathlib.Path(folder)


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _fingerprint(folder: Folder) -> list:
    """What changes when a file of the folder is put there anew."""
    status = [(file.name, file.stat()) for file in folder.files()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in status]


def _complaints(*checks: Callable[[], object]) -> list[str]:
    """What each of the checks raises, in words."""
    found = []
    for check_ in checks:
        try:
            check_()
        except (CheckpointError, ConfigError, FolderError) as error:
            found.append(str(error))
    return found


def _place_checks(dst: pathlib.Path, journal: str, size: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Whether `size` bytes can be written to `dst`, where what an interrupted run has written counts."""
    left = dst.rglob("*") if (dst / journal).exists() else ()
    needed = size - sum(file.stat().st_size for file in left if file.is_file())
    return functools.partial(_check_empty, dst, journal), functools.partial(_check_space, dst, needed)


def _nearest(folder: pathlib.Path) -> pathlib.Path:
    """What is there already of a path."""
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))


def _check_empty(folder: pathlib.Path, journal: str) -> None:
    if not (nearest := _nearest(folder)).is_dir():
        raise FolderError(f"{nearest} is a file; name a folder")
    if folder.is_dir() and not (folder / journal).exists() and any(folder.iterdir()):
        raise FolderError(f"{folder} is not empty, and nothing there was interrupted; choose another folder")


def _open_journal(dst: pathlib.Path, identity: str, final: pathlib.Path) -> Journal:
    _check_empty(dst, IMPORT_JOURNAL)
    dst.mkdir(parents=True, exist_ok=True)
    return open_journal(dst / IMPORT_JOURNAL, identity, {"verified"}, {"entry", "sum"}, whole=[final])


def _check_space(folder: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(_nearest(folder)).free
    if free < needed:
        gigabytes = f"{needed / 1e9:.2f} GB are still to be written, {free / 1e9:.2f} GB are free"
        raise FolderError(f"{folder}: {gigabytes}; make room and run it again, or choose another disk")
