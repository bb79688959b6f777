"""Folders of safetensors files: checked when opened and read slice by slice (`shard_writer` writes them).

A file is a little-endian uint64 length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, and the values in
C order. Several files (shards) are tied together by model.safetensors.index.json. The format's own library is not
used: through NumPy it reads no FP8, it checks no index, and it writes only what is in memory.
"""

import itertools
import json
import math
import os
import pathlib
from collections import Counter
from dataclasses import dataclass

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SUMS = "SHA256SUMS"  # of the files beside it, as `sha256sum` writes and checks it
SCALE = "_scale_inv"  # of an FP8 weight: its key with this ending holds one factor per block
BLOCK = 128  # rows and columns of an FP8 block
LARGEST_HEADER = 100_000_000  # bytes; a limit of the format, kept for the index too
MOST_AXES = 16

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}
DTYPES = {name: np.dtype(kind) for name, kind in DTYPES.items()}
NAMES = {kind: name for name, kind in DTYPES.items()}
FP8 = DTYPES["F8_E4M3"]

Index = tuple[slice | int, ...]


class FolderError(RuntimeError):
    """A published folder cannot be read or written; the message names the file, perhaps the key, and the remedy."""


def reason(error: BaseException) -> str:
    """An exception in one line, also where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]


@dataclass(frozen=True)
class _Tensor:
    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes into the file
    end: int


# --- reading ---------------------------------------------------------------------------------------------------------


class Folder:
    """The tensors of a folder as published: one model.safetensors, or shards and their index.

    Only headers are read when it is opened, and all of them are checked: what they say agrees with the index, with each
    other and with the length of every file. Raises `FolderError`, then and later, and nothing else for what is wrong.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        single, index = self.path / SINGLE, self.path / INDEX
        if single.is_file() and index.is_file():
            raise FolderError(f"{self.path} holds both {SINGLE} and {INDEX}; remove the one that is not of this model")
        self.listing = single if single.is_file() else index  # the file that names every key
        if single.is_file():
            self._tensors = _read_header(single)
        elif index.is_file():
            self._tensors = _read_shards(self.path, index)
        else:
            raise FolderError(f"{self.path} holds neither {SINGLE} nor {INDEX}; download the model's folder whole")
        for key, tensor in self._tensors.items():
            if tensor.dtype == FP8:
                self._check_scale(key, tensor)

    def keys(self) -> list[str]:
        """Every key, those of block scales included."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> np.dtype:
        """As stored; FP8 weights are read as float32."""
        return self._tensors[key].dtype

    def file(self, key: str) -> pathlib.Path:
        return self._tensors[key].file

    def files(self) -> list[pathlib.Path]:
        return sorted({tensor.file for tensor in self._tensors.values()})

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        """`tensor[index]`, a new array; only the bytes between the first and the last element asked for are read.

        An FP8 weight comes multiplied by its block scales, in float32.

        Args:
          index: integers and slices, of positive steps, along the leading axes.
        """
        tensor = self._tensors[key]
        box, inside = _box(tensor.shape, index)
        values = _read_box(tensor, box, key)
        if tensor.dtype == FP8:
            values = values.astype(np.float32)
            self._scale(values, key, box)
        return values[inside]

    def _check_scale(self, key: str, tensor: _Tensor) -> None:
        scale = self._tensors.get(key + SCALE)
        if scale is None:
            raise FolderError(f"{tensor.file}: {key!r} is FP8 and {key + SCALE!r}, its block scales, is missing")
        blocks = tuple(-(-size // BLOCK) for size in tensor.shape)
        if len(tensor.shape) != 2 or scale.shape != blocks or scale.dtype != np.float32:
            raise FolderError(
                f"{scale.file}: {key + SCALE!r} is {NAMES[scale.dtype]} {list(scale.shape)}; those of "
                f"{BLOCK} x {BLOCK} blocks of {key!r} {list(tensor.shape)} would be F32 {list(blocks)}"
            )

    def _scale(self, values: np.ndarray, key: str, box: list[tuple[int, int]]) -> None:
        """Multiply part of a weight, rows and columns `box`, by its scales, in place."""
        blocks = tuple(slice(first // BLOCK, -(-last // BLOCK)) for first, last in box)
        scales = self.read(key + SCALE, blocks)
        (top, _), (left, right) = box
        columns = np.arange(left, right) // BLOCK - left // BLOCK
        for number, scale in enumerate(scales[:, columns]):
            first = (top // BLOCK + number) * BLOCK
            values[max(first - top, 0) : first + BLOCK - top] *= scale


def _box(shape: tuple[int, ...], index: Index) -> tuple[list[tuple[int, int]], Index]:
    """The contiguous ranges [first, last) along every axis that hold `index`, and the index into them."""
    if len(index) > len(shape):
        raise IndexError(f"{len(index)} indices into {len(shape)} axes")
    box, inside = [], []
    for part, size in itertools.zip_longest(index, shape, fillvalue=slice(None)):
        if isinstance(part, slice):
            first, last, step = part.indices(size)
            if step < 1:
                raise IndexError(f"a slice of step {step}: it must be positive")
            box.append((first, max(first, last)))
            inside.append(slice(None, None, step))
        else:
            first = range(size)[part]
            box.append((first, first + 1))
            inside.append(0)
    return box, tuple(inside)


def _read_box(tensor: _Tensor, box: list[tuple[int, int]], key: str) -> np.ndarray:
    """Part of a tensor, run of bytes by run of bytes: a run spans the axes after the last one that is not whole."""
    counts = [last - first for first, last in box]
    values = np.empty(counts, tensor.dtype)
    if not values.size:
        return values
    whole = len(counts)
    while whole and counts[whole - 1] == tensor.shape[whole - 1]:
        whole -= 1
    outer = max(whole - 1, 0)  # one run for each index into these axes
    strides = [tensor.dtype.itemsize * math.prod(tensor.shape[axis + 1 :]) for axis in range(len(counts))]
    begin = tensor.start + sum(stride * first for stride, (first, _) in zip(strides, box))
    buffer = memoryview(values.reshape(-1).view(np.uint8))
    run = len(buffer) // math.prod(counts[:outer])
    try:
        with tensor.file.open("rb", buffering=0) as file:
            for number, place in enumerate(np.ndindex(*counts[:outer])):
                file.seek(begin + sum(map(int.__mul__, place, strides)))
                _fill(file, buffer[number * run : (number + 1) * run])
    except (OSError, EOFError) as error:
        raise FolderError(f"{tensor.file}: {key!r} cannot be read ({error}); download the file again") from error
    return values


def _fill(file, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError("the file ends within it")
        buffer = buffer[count:]


def _read_shards(folder: pathlib.Path, index: pathlib.Path) -> dict[str, _Tensor]:
    if index.stat().st_size > LARGEST_HEADER:
        raise FolderError(f"{index}: is larger than {LARGEST_HEADER} bytes; it is no index")
    try:
        document = _parse_json(index.read_bytes())
    except (OSError, ValueError) as error:
        raise FolderError(f"{index}: {error}; download it again") from None
    shard_of = document.get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(name, str) for name in shard_of.values()):
        raise FolderError(f"{index}: weight_map must name a file for every key; download it again")
    first_key = {name: key for key, name in reversed(shard_of.items())}
    tensors: dict[str, _Tensor] = {}
    problems: list[str] = []
    for name in sorted(first_key):
        where = f"{index}: puts {first_key[name]!r} into {name!r}"
        if name in ("", ".", "..") or any(char in name for char in "/\\:\0"):
            raise FolderError(f"{where}, which is no file of this folder; do not trust this index")
        try:
            if not os.path.isfile(folder / name):  # False, too, for what can be no name
                raise FolderError(f"{where}, which is missing; download it")
            tensors |= _read_shard(folder / name, shard_of)
        except FolderError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise FolderError("; ".join(problems[:5]) + more)
    return tensors


def _read_shard(path: pathlib.Path, shard_of: dict[str, str]) -> dict[str, _Tensor]:
    """The tensors of a shard, which are those that the index says are there."""
    tensors = _read_header(path)
    for key in tensors:
        if shard_of.get(key) != path.name:
            where = f"{INDEX} puts it into {shard_of[key]!r}" if key in shard_of else f"{INDEX} lacks it"
            raise FolderError(f"{path}: holds {key!r}, and {where}; download both again")
    for key, name in shard_of.items():
        if name == path.name and key not in tensors:
            raise FolderError(f"{path}: lacks {key!r}, which {INDEX} puts there; download both again")
    return tensors


def _read_header(path: pathlib.Path) -> dict[str, _Tensor]:
    """The tensors that a file says it holds, in their order in it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its header would be {length} bytes long, the file has {size}")
            document = _parse_json(file.read(length))
        metadata = document.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ is not text by name")
        tensors = {key: _parse_entry(path, key, entry, 8 + length) for key, entry in document.items()}
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
        end = 8 + length
        for key, tensor in tensors.items():
            if tensor.start != end:
                raise ValueError(f"{key!r} begins at byte {tensor.start}, what is before it ends at {end}")
            end = tensor.end
            if end > size:
                raise ValueError(f"{key!r} ends at byte {end}, the file at {size}")
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: {error}; the file is truncated or damaged, download it again") from None
    return tensors


def _parse_entry(path: pathlib.Path, key: str, entry, base: int) -> _Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key!r} must have dtype, shape and data_offsets, and no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{key!r} has dtype {dtype!r:.80}, which is none of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MOST_AXES or math.prod(filter(None, shape)) >= 1 << 60:
        raise ValueError(f"{key!r} has shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{key!r} has data_offsets {offsets!r:.80}")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise ValueError(f"{key!r}, {dtype} {shape}, takes {needed} bytes; its data_offsets are {offsets}")
    return _Tensor(path, DTYPES[dtype], tuple(shape), base + offsets[0], base + offsets[1])


def _are_sizes(values) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _parse_json(text: bytes) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"{twice!r:.80} occurs twice")
        return result

    try:
        document = json.loads(text, object_pairs_hook=unique)
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"its JSON cannot be read ({error!r:.120})") from None
    if not isinstance(document, dict):
        raise ValueError("its JSON is not an object")
    return document
