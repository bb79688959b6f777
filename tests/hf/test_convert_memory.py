"""A conversion holds one tensor and what is being written of it, never the model."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
import tracemalloc

import memory
import ml_dtypes
import numpy as np
import published
import pytest

from dsv2_jax.hf import arrays, convert, mapping
from dsv2_jax.hf.safetensors import Folder
from dsv2_jax.hf.shard_writer import ShardWriter

ROOT = pathlib.Path(__file__).parents[2]


def write(path, **changes) -> int:
    """A published folder of noise, never in memory as a whole; its size in bytes."""
    config, total = published.V2 | changes, 0
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
    writer = ShardWriter(path, 10**9)

    def pieces(number: int, size: int):
        for first in range(0, size, noise.size):
            yield np.roll(noise, 7919 * number)[: min(noise.size, size - first)]

    for number, (name, shape) in enumerate(published.shapes(config).items()):
        size = int(np.prod(shape))
        writer.add(name, shape, noise.dtype, pieces(number, size))
        total += 2 * size
    writer.finish()
    (path / "config.json").write_text(json.dumps(config))
    return total


def assert_little_is_held(tmp_path, monkeypatch):
    """Counted: what Python and NumPy have allocated, and what TensorStore was given and has not written. It may be the
    same memory, so that a chunk counts twice: the one being written, again as such, and the one being put together."""
    chunk, largest = 2**20, 2 * 20_000 * 256
    monkeypatch.setattr(convert, "PIECE", chunk)
    monkeypatch.setattr(mapping, "BAND", 2**16)
    size = write(tmp_path / "src", hidden_size=256, moe_intermediate_size=512, vocab_size=20_000)
    assert size > 4 * (largest + chunk)
    convert.import_folder(tmp_path / "src", tmp_path / "first")  # what Python keeps of imports and caches is there now
    held, chunks, write_ = [], [(None, 0)], arrays.Arrays.write

    def counted(self, names, index, values, then):
        held.append(tracemalloc.get_traced_memory()[1] + chunks[-1][1])  # the most since the last write
        assert len(held) == 1 or held[-1] < 4 * chunk, "more than three, and what Python needs itself"
        tracemalloc.reset_peak()
        write_(self, names, index, values, then)
        assert all(future.done() for future, _ in chunks[1:]), "two are being written"
        chunks.append((self._writing[0], values.nbytes))

    monkeypatch.setattr(arrays.Arrays, "write", counted)
    tracemalloc.start()
    try:
        convert.import_folder(tmp_path / "src", tmp_path / "ours")
    finally:
        tracemalloc.stop()
    assert len(held) > size // chunk
    assert max(nbytes for _, nbytes in chunks) <= chunk
    print(f"{max(held[1:]):,} bytes held of {size:,}; largest tensor {largest:,}, chunk {chunk:,}")
    assert 4 * chunk < largest


def test_one_tensor_and_one_chunk_are_held(tmp_path, monkeypatch):
    assert_little_is_held(tmp_path, monkeypatch)


def test_a_reader_that_keeps_what_it_read_is_noticed(tmp_path, monkeypatch):
    kept, read = [], Folder.read

    def keeping(*arguments):
        kept.append(read(*arguments))
        return kept[-1]

    monkeypatch.setattr(Folder, "read", keeping)
    with pytest.raises(AssertionError, match="more than three"):
        assert_little_is_held(tmp_path, monkeypatch)


MEASURE = """
import memory
from dsv2_jax.hf import convert

convert.PIECE = 4 * 2**20
for direction, (warm, warmed, source, result) in {
    convert.import_folder: ("tiny", "tiny_ours", "large", "ours"),
    convert.export_folder: ("tiny_ours", "tiny_back", "ours", "back"),
}.items():
    direction(warm, warmed)
    before = memory.begin()
    direction(source, result)
    print(memory.peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not memory.AVAILABLE, reason="reads Linux's own memory figures")
def test_memory_does_not_grow_with_the_model(tmp_path):
    write(tmp_path / "tiny")
    size = write(tmp_path / "large", hidden_size=256, moe_intermediate_size=512, vocab_size=40_000, num_hidden_layers=5)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "PATH": "", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", textwrap.dedent(MEASURE)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = [int(line) for line in done.stdout.split()]
    assert len(grown) == 2
    assert size > 120e6
    assert max(grown) < 60e6, grown


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak(*command: str) -> int:
    """Bytes of the largest process that a command needs, started by a small one: a child inherits its parent's peak."""
    runner = [sys.executable, "-c", PEAK, *command]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(runner, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.slow
def test_several_gigabytes_need_less_than_1200_megabytes(tmp_path):
    """Both ways, at the widths of V2-Lite, by the command line as users start it."""
    widths = {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "qk_nope_head_dim": 128, "v_head_dim": 128}
    latents = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "vocab_size": 102_400}
    size = write(tmp_path / "src", **widths, **heads, **latents)
    assert size > 3e9
    script, interpreter = str(ROOT / "experiments" / "convert.py"), peak(sys.executable, "-c", "pass")
    for command, source, result in ("import", "src", "ours"), ("export", "ours", "back"):
        needed = peak(sys.executable, script, command, str(tmp_path / source), str(tmp_path / result)) - interpreter
        print(f"{command}: {size / 1e9:.2f} GB in {needed / 1e9:.2f} GB of memory")
        assert needed < 1.2e9
    src, back = Folder(tmp_path / "src"), Folder(tmp_path / "back")
    for key in src.keys():  # noqa: SIM118
        assert np.array_equal(src.read(key).view(np.uint16), back.read(key).view(np.uint16)), key
