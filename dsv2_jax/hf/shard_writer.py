"""Writing a folder of safetensors files, tensor by tensor, so that no loader accepts it before it is whole."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from dsv2_jax.hf.journal import Journal
from dsv2_jax.hf.safetensors import INDEX, NAMES, SINGLE, SUMS, FolderError

JOURNAL = "export.journal"


@dataclass(frozen=True)
class _Planned:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Iterable[np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes a folder of safetensors files that no loader accepts before it is whole.

    `add` names a tensor and where its values will come from; `finish` draws them, one tensor after the other, and
    writes shards of up to `max_shard_bytes` (one tensor at least). Shards stand under *.partial and then *.complete;
    they get their names, and the index and SHA256SUMS are written, when all are there. A run that was interrupted goes
    on after the last shard that is complete with all before it, if `identity` (text that stands for the source and the
    options) is the same; else anew. `beside`: names of files that the caller writes, removed with what is given up.

    Until `close`, or the end of a `with`, no other process writes the folder.
    """

    def __init__(self, folder: str | os.PathLike, max_shard_bytes: int, identity: str = "", beside: Iterable[str] = ()):
        self.folder, self.max_shard_bytes, self.beside = pathlib.Path(folder), max_shard_bytes, tuple(beside)
        self._tensors: dict[str, _Planned] = {}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = self._open_journal(identity)

    def close(self) -> None:
        self._journal.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def add(self, name: str, shape: tuple[int, ...], dtype, pieces: Iterable[np.ndarray]) -> None:
        """One more tensor, whose values are those of `pieces`, one after another in C order; drawn in `finish`."""
        if name in self._tensors:
            raise ValueError(f"{name} is added twice")
        self._tensors[name] = _Planned(name, tuple(shape), np.dtype(dtype), pieces)

    def done_bytes(self) -> int:
        """Of the tensors added, those that an interrupted run has written."""
        return sum(tensor.bytes for shard in self._plan()[: len(self._done())] for tensor in shard)

    def finish(
        self,
        metadata: dict[str, str] | None = None,
        *,
        state: dict | None = None,
        wrote: Callable[[np.ndarray], object] | None = None,
        verify: Callable[[], object] | None = None,
    ) -> None:
        """Write all; raises `FolderError` where the folder cannot be written.

        Args:
          metadata: of every shard; {"format": "pt"}, which transformers asks for, is added.
          state: plain data that the pieces may change as they are drawn. It is kept with every complete shard, and put
            back as it was when a run goes on after that shard.
          wrote: called with every piece once it is written.
          verify: called when all is written and nothing accepted yet; if it raises, what is written is removed.
        """
        shards, done = self._plan(), self._done()
        names = _shard_names(len(shards))
        with self._journal as journal, writing(self.folder):
            if state is not None and done:
                state.clear()
                state.update(done[-1]["state"])
            digests = {line["shard"]: line["sha256"] for line in done}
            for name, shard in list(zip(names, shards))[len(done) :]:
                digest = self._write_shard(name, shard, {"format": "pt"} | (metadata or {}), wrote)
                journal.add({"shard": name, "sha256": digest, "state": state})
                digests[name] = digest
            try:
                if verify:
                    verify()
            except Exception:
                self._clear()
                journal.remove()
                raise
            self._publish(names, shards, digests)
            journal.remove()

    def _open_journal(self, identity: str) -> Journal:
        """A line per complete shard; what a run of another identity has left is removed."""
        path, whole = self.folder / JOURNAL, [self.folder / SINGLE, self.folder / INDEX]
        interrupted = path.exists()
        if not interrupted and (there := [file for file in whole if file.exists()]):
            raise FolderError(f"{there[0]} is there already; choose another folder, or remove it")
        journal = open_journal(path, identity, {"shard", "sha256", "state"}, whole=whole)
        if interrupted and not journal.found:
            self._clear()
        return journal

    def _clear(self) -> None:
        for pattern in ("*.partial", "*.complete", "model-*-of-*.safetensors", SUMS, *self.beside):
            for left in self.folder.glob(pattern):
                left.unlink()

    def _done(self) -> list[dict]:
        """The journal's last line of every shard, up to the first that has none or whose file is gone."""
        lines = {line["shard"]: line for line in self._journal.entries}
        names = _shard_names(len(self._plan()))
        return [lines[name] for name in itertools.takewhile(lambda name: name in lines and self._file(name), names)]

    def _file(self, name: str) -> pathlib.Path | None:
        """Where a complete shard is: waiting for the others, or under its name."""
        places = self.folder / f"{name}.complete", self.folder / name
        return next((place for place in places if place.exists()), None)

    def _plan(self) -> list[list[_Planned]]:
        shards, size = [[]], 0
        for tensor in self._tensors.values():
            if shards[-1] and size + tensor.bytes > self.max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.bytes
        # Wider types first, so that every tensor begins at a multiple of its width.
        return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]

    def _write_shard(self, name: str, shard: list[_Planned], metadata: dict[str, str], wrote) -> str:
        """Returns the file's SHA-256."""
        partial, header = self.folder / f"{name}.partial", _header(shard, metadata)
        digest = hashlib.sha256(header)
        with partial.open("wb") as file:
            file.write(header)
            for tensor in shard:
                start = file.tell()
                for piece in tensor.pieces:
                    if piece.dtype != tensor.dtype:
                        raise ValueError(f"{tensor.name}: a piece is {piece.dtype}, not {tensor.dtype}")
                    values = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                    file.write(values)
                    digest.update(values)
                    if wrote:
                        wrote(piece)
                if file.tell() - start != tensor.bytes:
                    raise ValueError(f"{tensor.name}: its pieces are {file.tell() - start} bytes, not {tensor.bytes}")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.folder / f"{name}.complete")
        return digest.hexdigest()

    def _publish(self, names: list[str], shards: list[list[_Planned]], digests: dict[str, str]) -> None:
        """The last rename is the one that makes loaders accept the folder."""
        (self.folder / SUMS).write_text("".join(f"{digests[name]}  {name}\n" for name in names))
        for name in names:
            if not (file := self._file(name)):
                raise FolderError(f"{self.folder / name}: has gone since it was written; run it again")
            file.rename(self.folder / name)
        for left in self.folder.glob("*.partial"):  # of a shard that was there, and begun again after one that was not
            left.unlink()
        if len(names) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards) for tensor in shard}
            total = sum(tensor.bytes for tensor in self._tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            partial = self.folder / f"{INDEX}.partial"
            partial.write_text(json.dumps(index, indent=2) + "\n")
            partial.rename(self.folder / INDEX)


def _shard_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _header(shard: list[_Planned], metadata: dict[str, str]) -> bytes:
    entries, offset = {"__metadata__": metadata}, 0
    for tensor in shard:
        offsets = [offset, offset := offset + tensor.bytes]
        entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def open_journal(path: pathlib.Path, identity: str, *fields: set[str], whole: Iterable[pathlib.Path]) -> Journal:
    """A journal whose lines each have one of these sets of fields; `FolderError` where other code wrote others, or
    where the folder is `whole` (see `Journal`)."""
    try:
        journal = Journal(path, identity, whole)
    except FileExistsError as error:
        other = f"{error.filename} is whole, of another source or of other options"
        raise FolderError(f"{other}; choose another folder, or remove {path} to keep it") from None
    if not all(isinstance(line, dict) and line.keys() in fields for line in journal.entries):
        with journal:
            raise FolderError(f"{path}: another version of this code wrote it; remove {path.parent} and start again")
    return journal


@contextlib.contextmanager
def writing(folder: pathlib.Path):
    """What the system refuses becomes a `FolderError`."""
    try:
        yield
    except BlockingIOError:
        raise FolderError(f"{folder}: another process is writing it; wait for it, or choose another folder") from None
    except OSError as error:
        file = error.filename or folder
        raise FolderError(f"{file}: cannot be written ({error.strerror}); once it can be, run it again") from error
