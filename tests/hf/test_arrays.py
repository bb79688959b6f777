"""What is written chunk by chunk costs what it holds, however many chunks there are."""

import numpy as np
import pytest

from dsv2_jax.hf.arrays import Arrays
from dsv2_jax.hf.safetensors import FolderError


def test_what_the_database_writes_beside_the_chunks_does_not_grow_with_them(tmp_path):
    """With its own settings it writes its whole tree with every chunk: 6 kB each here, 500 kB each at V2's size."""
    names, rng, beside = ("moe_blocks", "ffn", "up"), np.random.default_rng(0), []
    arrays = Arrays(tmp_path / "params")
    arrays.create(names, (10, 60, 64), np.dtype(np.float32), (1, 1, 64))
    values = rng.normal(size=(10, 60, 64)).astype(np.float32)
    for layer in range(10):
        for expert in range(60):
            arrays.write(names, (layer, expert), values[layer, expert])
        arrays.flush()
        size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        beside.append(size - values[: layer + 1].nbytes)
    assert beside[-1] < 600 * 3000
    assert beside[-1] - beside[-2] < 60 * 4000
    np.testing.assert_array_equal(Arrays(tmp_path / "params").read(names), values)


def test_an_error_without_a_message_is_named_by_its_kind(tmp_path):
    arrays = Arrays(tmp_path)
    with pytest.raises(FolderError, match=r"embed cannot be written; .* \(ValueError\)"):
        with arrays._complaining(("embed",), FolderError, "cannot be written; run it again"):
            raise ValueError
