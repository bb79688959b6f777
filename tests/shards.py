"""Small tensors of every kind as a folder of shards, for tests of what reads and writes them."""

import ml_dtypes
import numpy as np

from dsv2_jax.hf.safetensors import Folder
from dsv2_jax.hf.shard_writer import ShardWriter


def tensors(seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "matrix": rng.normal(size=(5, 7)).astype(np.float32),
        "half": rng.normal(size=(4, 3, 6)).astype(np.float16),
        "brain": rng.normal(size=(9, 2, 3)).astype(ml_dtypes.bfloat16),
        "count": np.arange(3, dtype=np.int64),
        "one": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }


def write(folder, values: dict[str, np.ndarray], shard_bytes=10**9, pieces=1, **options):
    writer = ShardWriter(folder, shard_bytes, **options)
    for name, value in values.items():
        writer.add(name, value.shape, value.dtype, np.array_split(value, pieces) if value.ndim else [value])
    writer.finish()
    return folder


def assert_same(folder: Folder, values: dict) -> None:
    assert sorted(folder.keys()) == sorted(values)
    for name, value in values.items():
        assert (folder.shape(name), folder.dtype(name)) == (value.shape, value.dtype)
        read = folder.read(name)
        assert read.dtype == value.dtype
        np.testing.assert_array_equal(read, value)
