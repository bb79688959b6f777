import json
import os
import pathlib
import subprocess
import sys

import hypothesis
import memory
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st
from shards import assert_same, tensors, write

from dsv2_jax.hf import safetensors as ours
from dsv2_jax.hf.safetensors import DTYPES, INDEX, SINGLE, SUMS, Folder, FolderError


def raw(folder, header, data=b"", length=None):
    """A single file with a header made by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / SINGLE).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return folder


# --- reading ---------------------------------------------------------------------------------------------------------


def test_files_of_the_formats_library_are_read(tmp_path):
    safetensors.numpy.save_file(tensors(), tmp_path / SINGLE, metadata={"format": "pt"})
    assert_same(Folder(tmp_path), tensors())


def test_what_is_written_the_formats_library_reads(tmp_path):
    write(tmp_path / "one", tensors(), pieces=3)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [SUMS, SINGLE]
    for name, value in safetensors.numpy.load_file(tmp_path / "one" / SINGLE).items():
        np.testing.assert_array_equal(value, tensors()[name])
    with safetensors.safe_open(tmp_path / "one" / SINGLE, "np") as file:
        assert file.metadata() == {"format": "pt"}
    folder = write(tmp_path / "many", tensors(), shard_bytes=250)
    assert_same(Folder(folder), tensors())
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors().values())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    assert len(names) > 1
    for name in names:
        loaded = safetensors.numpy.load_file(folder / name)
        assert loaded.keys() == {key for key, file in index["weight_map"].items() if file == name}
        sizes = [value.nbytes for value in loaded.values()]
        assert sum(sizes) <= 250 or len(sizes) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, INDEX, SUMS])


@pytest.mark.parametrize("kind", DTYPES)
def test_every_type_of_the_format(tmp_path, kind):
    dtype = DTYPES[kind]
    data = bytes(np.random.default_rng(0).integers(0, 2, 24 * dtype.itemsize, np.uint8))
    entry = {"dtype": kind, "shape": [4, 6], "data_offsets": [0, len(data)]}
    header = {"w": entry}
    if kind == "F8_E4M3":
        scale = np.array([[3.0]], np.float32).tobytes()
        header["w_scale_inv"] = {"dtype": "F32", "shape": [1, 1], "data_offsets": [len(data), len(data) + 4]}
        data += scale
    folder = Folder(raw(tmp_path, header, data))
    expected = np.frombuffer(data, dtype, 24).reshape(4, 6)
    expected = expected.astype(np.float32) * np.float32(3) if kind == "F8_E4M3" else expected
    np.testing.assert_array_equal(folder.read("w"), expected)
    assert folder.dtype("w") == dtype


@hypothesis.given(st.data())
def test_any_slice_is_that_of_numpy(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
    value = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    index = []
    for size in shape[: data.draw(st.integers(0, len(shape)))]:
        part = st.slices(size).filter(lambda part: part.step is None or part.step > 0)
        index.append(data.draw(part | st.integers(-size, size - 1)))
    tensor = ours._Tensor(FILE, value.dtype, shape, 3, 3 + value.nbytes)
    FILE.data = b"abc" + value.tobytes()
    folder = object.__new__(Folder)
    folder._tensors = {"w": tensor}
    np.testing.assert_array_equal(folder.read("w", tuple(index)), value[tuple(index)])


class File:
    """A path whose file is in memory."""

    data = b""

    def open(self, *_, **__):
        import io

        return io.BytesIO(self.data)


FILE = File()


def test_only_the_bytes_of_a_slice_are_read(tmp_path, monkeypatch):
    value = np.arange(6 * 5 * 4, dtype=np.float32).reshape(6, 5, 4)
    folder = Folder(write(tmp_path, {"w": value}))
    counts, fill = [], ours._fill
    monkeypatch.setattr(ours, "_fill", lambda file, buffer: (counts.append(len(buffer)), fill(file, buffer)))
    for index, runs in [
        ((slice(2, 4),), [2 * 5 * 4 * 4]),
        ((3,), [5 * 4 * 4]),
        ((slice(1, 3), slice(2, 4)), [2 * 4 * 4] * 2),
        ((slice(1, 3), slice(None), slice(1, 2)), [4] * 10),
        ((), [value.nbytes]),
    ]:
        counts.clear()
        np.testing.assert_array_equal(folder.read("w", index), value[index])
        assert counts == runs


def test_indices_that_make_no_sense(tmp_path):
    folder = Folder(write(tmp_path, {"w": np.zeros((2, 3))}))
    for index in (5,), (slice(None, None, -1),), (0, 0, 0):
        with pytest.raises(IndexError):
            folder.read("w", index)


def fp8_folder(path, shape=(300, 200)):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.1, 2, [-(-size // 128) for size in shape]).astype(np.float32)
    write(path, {"w": weight, "w_scale_inv": scale})
    rows, columns = (np.arange(size) // 128 for size in shape)
    return Folder(path), weight.astype(np.float32) * scale[rows][:, columns]


@pytest.mark.parametrize(
    "index", [(), (slice(130, 140),), (slice(0, 260), slice(127, 129)), (150,), (slice(100, 290, 7), 5)]
)
def test_fp8_is_read_with_its_block_scales_in_any_slice(tmp_path, index):
    folder, expected = fp8_folder(tmp_path)
    assert (folder.dtype("w"), folder.keys()) == (ml_dtypes.float8_e4m3fn, ["w_scale_inv", "w"])
    read = folder.read("w", index)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected[index])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, "'w_scale_inv', its block scales, is missing"),
        (
            np.zeros((3, 1), np.float32),
            r"F32 \[3, 1\]; those of 128 x 128 blocks of 'w' \[300, 200\] would be F32 \[3, 2\]",
        ),
        (np.zeros((3, 2), np.float16), r"F16 \[3, 2\]; .* would be F32 \[3, 2\]"),
    ],
)
def test_fp8_without_its_scales_is_refused(tmp_path, scale, message):
    weight = {"w": np.zeros((300, 200), ml_dtypes.float8_e4m3fn)}
    write(tmp_path, weight if scale is None else weight | {"w_scale_inv": scale})
    with pytest.raises(FolderError, match=message):
        Folder(tmp_path)


# --- what is wrong with a file ---------------------------------------------------------------------------------------


def entry(start, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


WRONG = {
    "nothing": (b"", b"", "would be 0 bytes|cannot be read"),
    "not JSON": (b"{", b"", "JSON cannot be read"),
    "a list": ([], b"", "not an object"),
    "deep": (b"[" * 100_000, b"", "JSON cannot be read"),
    "no UTF-8": (b'{"\xff": 1}', b"", "JSON cannot be read"),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "model.safetensors"),
    "entry is no object": ({"a": 3}, b"", "'a' must have dtype, shape and data_offsets"),
    "more in it": ({"a": entry(0, 1) | {"x": 1}}, b"0", "and no more"),
    "unknown type": ({"a": entry(0, 1, "F4")}, b"0", "'a' has dtype 'F4', which is none of BOOL"),
    "shape no list": ({"a": entry(0, 1, shape="1")}, b"0", "'a' has shape '1'"),
    "shape with true": ({"a": entry(0, 1, shape=[True])}, b"0", r"'a' has shape \[True\]"),
    "negative": ({"a": entry(0, 1, shape=[-1, -1])}, b"0", r"'a' has shape \[-1, -1\]"),
    "too large": ({"a": entry(0, 0, shape=[0, 1 << 40, 1 << 40])}, b"", "'a' has shape"),
    "many axes": ({"a": entry(0, 1, shape=[1] * 100)}, b"0", "'a' has shape"),
    "one offset": ({"a": entry(0, 1) | {"data_offsets": [0]}}, b"0", r"'a' has data_offsets \[0\]"),
    "shape and bytes": ({"a": entry(0, 3, "F32", [1])}, b"000", r"'a', F32 \[1\], takes 4 bytes; .* are \[0, 3\]"),
    "overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, b"000", "'b' begins at byte .* ends at"),
    "gap": ({"a": entry(0, 1), "b": entry(2, 3)}, b"000", "'b' begins at byte .* ends at"),
    "same place": ({"a": entry(0, 2), "b": entry(0, 2)}, b"00", "'b' begins at"),
    "beyond the end": ({"a": entry(0, 1), "b": entry(1, 9)}, b"0", "'b' ends at byte .*, the file at"),
    "more than said": ({"a": entry(0, 1)}, b"01", "tensors end at byte .*, the file at"),
    "twice": (b'{"a": 1, "a": 2}', b"", "'a' occurs twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is not text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named(tmp_path, case):
    header, data, message = WRONG[case]
    with pytest.raises(FolderError, match=message) as caught:
        Folder(raw(tmp_path, header, data))
    assert str(tmp_path / SINGLE) in str(caught.value)
    assert "download" in str(caught.value)


@pytest.mark.parametrize("length", [5, 200, 10**8 + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused_without_reading_it(tmp_path, length):
    with pytest.raises(FolderError, match=rf"header would be {length} bytes long|JSON"):
        Folder(raw(tmp_path, {}, b"", length))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write(tmp_path / "whole", {"a": np.arange(3.0), "b": np.arange(4.0)})
    data = (tmp_path / "whole" / SINGLE).read_bytes()
    (tmp_path / "cut").mkdir()
    for length in range(len(data)):
        (tmp_path / "cut" / SINGLE).write_bytes(data[:length])
        with pytest.raises(FolderError):
            Folder(tmp_path / "cut")


def test_a_file_cut_after_it_was_opened(tmp_path):
    folder = Folder(write(tmp_path, {"a": np.arange(300.0)}))
    os.truncate(tmp_path / SINGLE, 400)
    with pytest.raises(FolderError, match=r"model.safetensors: 'a' cannot be read \(the file ends within it\)"):
        folder.read("a")


# --- what is wrong with an index -------------------------------------------------------------------------------------


def sharded(path, **changes):
    """Two shards, and changes to the index's weight map: None removes a key."""
    write(path, {"a": np.arange(3.0), "b": np.arange(4.0)}, shard_bytes=30)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] |= changes
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if name is not None}
    (path / INDEX).write_text(json.dumps(index))
    return path


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": "model-9.safetensors"}, f"{INDEX}: puts 'b' into 'model-9.safetensors', which is missing"),
        ({"b": "../secret"}, f"{INDEX}: puts 'b' into '../secret', which is no file of this folder"),
        ({"b": "/etc/passwd"}, "puts 'b' into '/etc/passwd', which is no file of this folder"),
        ({"b": "a\\b"}, "which is no file of this folder"),
        ({"b": "a\0b"}, "which is no file of this folder"),
        ({"b": ".."}, "which is no file of this folder"),
        ({"b": ""}, "which is no file of this folder"),
        ({"b": 3}, "weight_map must name a file for every key"),
        ({"c": FIRST}, f"{FIRST}: lacks 'c', which {INDEX} puts there"),
        ({"b": FIRST}, f"{FIRST}: lacks 'b'"),
        ({"b": None, "c": SECOND}, f"{SECOND}: holds 'b', and {INDEX} lacks it"),
        ({"a": SECOND, "b": FIRST}, f"{FIRST}: holds 'a', and {INDEX} puts it into '{SECOND}'"),
        ({"a": None, "b": None}, "weight_map must name a file"),
        ({"c": "model-7", "d": "model-8"}, "which is missing; download it; "),
    ],
)
def test_a_wrong_index_is_named(tmp_path, changes, message):
    sharded(tmp_path, **changes)
    with pytest.raises(FolderError) as caught:
        Folder(tmp_path)
    assert message in str(caught.value)


def test_an_index_that_is_not_one(tmp_path):
    for text in ("", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {}, "weight_map": {}}', "[" * 100_000):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(FolderError, match=INDEX):
            Folder(tmp_path)


def test_symbolic_links_to_shards_are_followed(tmp_path):
    """As huggingface_hub lays out what it downloads."""
    sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    np.testing.assert_array_equal(Folder(tmp_path / "snapshot").read("b"), np.arange(4.0))


def test_a_folder_with_nothing_or_with_both(tmp_path):
    with pytest.raises(FolderError, match=f"neither {SINGLE} nor {INDEX}"):
        Folder(tmp_path)
    sharded(tmp_path)
    raw(tmp_path, {})
    with pytest.raises(FolderError, match=f"holds both {SINGLE} and {INDEX}; remove the one"):
        Folder(tmp_path)


# --- fuzzing ---------------------------------------------------------------------------------------------------------


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """Bits flipped, bytes set, ranges removed, repeated or moved; or a number in the text made another."""
    for _ in range(rng.integers(1, 4)):
        at, to = sorted(rng.integers(0, len(data) + 1, 2))
        match rng.integers(6):
            case 0:
                data = data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :] if at < len(data) else data
            case 1:
                data = data[:at] + rng.bytes(rng.integers(1, 9)) + data[at:]
            case 2:
                data = data[:at] + data[to:]
            case 3:
                data = data[:to] + data[at:to] + data[to:]
            case 4:
                words = [b"-1", b"1e9", b"null", b"18446744073709551615", b"[]", b'"', b"{", b"true", b"9" * 400]
                data = data[:at] + words[rng.integers(len(words))] + data[at:]
            case 5:
                digits = [i for i, byte in enumerate(data[8:], 8) if chr(byte).isdigit()]
                if digits:
                    at = digits[rng.integers(len(digits))]
                    data = data[:at] + b"%d" % rng.integers(10) + data[at + 1 :]
    return data


needs_proc = pytest.mark.skipif(not memory.AVAILABLE, reason="reads Linux's own memory figures")


@needs_proc
def test_memory_that_is_held_for_a_moment_is_noticed_after_a_larger_peak():
    """What the next test relies on; in a process of its own, where no other thread gives memory back meanwhile."""
    code = """
import memory
_ = bytearray(160_000_000)
del _
before = memory.begin()
print(memory.peak() - before)
_ = bytearray(80_000_000)
del _
print(memory.peak() - before)
"""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(memory.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    quiet, held = map(int, done.stdout.split())
    assert quiet < 20e6
    assert 60e6 < held < 100e6


@needs_proc
@pytest.mark.parametrize("name", [FIRST, INDEX])
def test_of_a_mutated_file_only_our_own_error_comes_out_and_memory_stays_bounded(tmp_path, name):
    sharded(tmp_path)
    data, refused = (tmp_path / name).read_bytes(), []

    @hypothesis.settings(max_examples=1000, database=None)
    @hypothesis.given(st.integers(0, 2**63))
    def open_mutated(seed):
        (tmp_path / name).unlink()  # some file systems write an overwritten file to disk at once
        (tmp_path / name).write_bytes(mutate(np.random.default_rng(seed), data))
        try:
            folder = Folder(tmp_path)
            _ = [folder.read(key) for key in sorted(folder.keys())]
        except FolderError as error:
            refused.append(str(error))

    before = memory.begin()
    open_mutated()
    assert all(name in message or SECOND in message for message in refused)
    "".join(refused).encode()  # can be printed
    assert len(refused) > 500  # others have other numbers in their values, or other names
    assert memory.peak() - before < 50e6
