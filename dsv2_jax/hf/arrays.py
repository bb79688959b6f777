"""The arrays of a checkpoint's model on disk, slice by slice: those that Orbax writes are read, those written it reads.

An array is a zarr array in the OCDBT database `params/`, under its names joined by dots; `params/_METADATA` lists them.
"""

import contextlib
import json
import os
from collections.abc import Callable

import numpy as np
import tensorstore
from etils import epath

from dsv2_jax.checkpoint import CheckpointError
from dsv2_jax.hf.safetensors import FolderError, reason
from dsv2_jax.hf.shard_writer import writing

# Every chunk is on disk before the next is made, and with each the database writes the changed nodes of its tree anew:
# small ones, so that this does not grow with the number of chunks.
OCDBT = {"max_decoded_node_bytes": 8192}
REMEDY = "cannot be written; once it can be, run it again"

Names = tuple[str, ...]


def word_sum(values: np.ndarray) -> int:
    """The checksum of `dsv2_jax.checkpoint`: its 32-bit (or narrower) words added up modulo 2^32; parts add up too."""
    words = values.view(f"uint{8 * values.dtype.itemsize}")
    return int(words.sum(dtype=np.uint64)) % 2**32


class Arrays:
    """The arrays below `folder` (a checkpoint's `params`), opened when first used."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = epath.Path(folder)
        self._open: dict[Names, tensorstore.TensorStore] = {}
        self._writing = None  # (future, names, what to call then) of the one chunk that is being written

    def read(self, names: Names, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        with self._complaining(names, CheckpointError, "cannot be read; is the checkpoint whole?"):
            return self._array(names)[index].read().result()

    def chunk(self, names: Names) -> tuple[int, ...]:
        """What is stored, and so read, in one piece."""
        with self._complaining(names, CheckpointError, "cannot be read; is the checkpoint whole?"):
            return self._array(names).chunk_layout.read_chunk.shape

    def dtype(self, names: Names) -> np.dtype:
        with self._complaining(names, CheckpointError, "cannot be read; is the checkpoint whole?"):
            return self._array(names).dtype.numpy_dtype

    def create(self, names: Names, shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...]) -> None:
        """An array to write to; an equal one that is there already is opened."""
        metadata = {
            "zarr_format": 2,
            "shape": shape,
            "chunks": chunk,
            "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
            "compressor": {"id": "zstd", "level": 1},
            "dimension_separator": ".",
            "order": "C",
            "fill_value": None,
            "filters": None,
        }
        spec = self._spec(names)
        spec["kvstore"] |= {"config": OCDBT}
        spec |= {"metadata": metadata, "create": True, "store_data_equal_to_fill_value": True}
        with self._complaining(names, FolderError, REMEDY):
            self._open[names] = tensorstore.open(spec).result()

    def write(self, names: Names, index: tuple, values: np.ndarray, then: Callable[[], None] | None = None) -> None:
        """Start to write a chunk, when the one before is on disk; `then` is called when this one is."""
        self.flush()
        self._writing = self._array(names)[index].write(values), names, then

    def flush(self) -> None:
        """Wait for what is being written."""
        if self._writing is None:
            return
        (future, names, then), self._writing = self._writing, None
        with self._complaining(names, FolderError, REMEDY):
            future.result()
        if then:
            then()

    def settle(self) -> None:
        """Wait until nothing is being written, whatever becomes of it: after an error, nothing of it may come later."""
        if self._writing is not None:
            (future, *_), self._writing = self._writing, None
            with contextlib.suppress(Exception):
                future.result()

    def write_names(self, names: list[Names]) -> None:
        """The document by which Orbax finds the arrays, as nested dicts."""
        value = {"value_type": "jax.Array", "skip_deserialize": False}
        keys = {name: [{"key": key, "key_type": 2} for key in name] for name in names}  # 2: of a dict
        tree = {str(name): {"key_metadata": keys[name], "value_metadata": value} for name in names}
        flags = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
        file = self.folder / "_METADATA"
        with writing(file):
            file.write_text(json.dumps({"tree_metadata": tree, **flags, "custom_metadata": None}))

    @contextlib.contextmanager
    def _complaining(self, names: Names, kind: type[Exception], remedy: str):
        try:
            yield
        except Exception as error:  # TensorStore raises what its codes map to
            raise kind(f"{self.folder}: {'.'.join(names)} {remedy} ({reason(error)})") from error

    def _array(self, names: Names) -> tensorstore.TensorStore:
        if names not in self._open:
            self._open[names] = tensorstore.open(self._spec(names)).result()
        return self._open[names]

    def _spec(self, names: Names) -> dict:
        path = str(self.folder)
        base = f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(names)}/"}
        return {"driver": "zarr", "kvstore": kvstore, "open": True}
