"""A flipped bit is found where the download recorded a sum; in a header, everywhere."""

import hashlib
import pathlib
import shutil

import hypothesis
import ml_dtypes
import numpy as np
import published
import pytest
from hypothesis import strategies as st

from dsv2_jax import checkpoint
from dsv2_jax.checkpoint import CheckpointError
from dsv2_jax.hf import convert, digests, mapping
from dsv2_jax.hf.config import model_config
from dsv2_jax.hf.pretrained import from_pretrained
from dsv2_jax.hf.safetensors import INDEX, Folder, FolderError

CONFIG = published.LITE | {"num_hidden_layers": 2, "n_routed_experts": 3}
VALUES = {name: value.astype(ml_dtypes.bfloat16) for name, value in published.weights(CONFIG).items()}
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]


def as_it_is(folder):
    """No sum is recorded."""


def as_listed(folder):
    """What `sha256sum * > SHA256SUMS` writes; `*` before a name where it was told to read bytes."""
    lines = [f"{sha256(file)} {' *'[i % 2]}{file.name}" for i, file in enumerate(sorted(folder.iterdir()))]
    (folder / "SHA256SUMS").write_text("# released\n" + "\n".join(lines) + "\n")


def as_local_dir(folder):
    """As `huggingface_hub.snapshot_download(local_dir=...)` leaves a folder; small files have no SHA-256."""
    records = folder / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    for file in folder.glob("*.*"):
        etag = sha256(file) if file.suffix == ".safetensors" else "a" * 40
        (records / f"{file.name}.metadata").write_text(f"{'c' * 40}\n{etag}\n1712656091.123\n")


def as_cached(folder):
    """As in the cache of the Hub's client: links to files that are named after what they hold."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        blob = blobs / (sha256(file) if file.suffix == ".safetensors" else "b" * 40 + file.name)
        shutil.move(file, blob)
        file.symlink_to(pathlib.Path("..") / "blobs" / blob.name)


LAYOUTS = [as_listed, as_local_dir, as_cached]


def sha256(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def src(tmp_path):
    return published.write_folder(tmp_path / "snapshot", CONFIG, VALUES, shards=3)


def flip(file: pathlib.Path, bit: int):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def header_bytes(file: pathlib.Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("layout", LAYOUTS)
@hypothesis.settings(max_examples=10)
@hypothesis.given(data=st.data())
def test_one_flipped_bit_of_a_value_is_found(tmp_path_factory, layout, data):
    src = published.write_folder(tmp_path_factory.mktemp("one") / "snapshot", CONFIG, VALUES, shards=3)
    layout(src)
    file = src / data.draw(st.sampled_from(SHARDS))
    size = file.stat().st_size
    flip(file, data.draw(st.integers(8 * header_bytes(file), 8 * size - 1)))
    ours = src.parent / "ours"
    with pytest.raises(FolderError) as caught:
        convert.import_folder(src, ours)
    assert f"{file}: its SHA-256 is {sha256(file)}, " in str(caught.value)
    assert str(caught.value).endswith(f"damaged since it was published; delete {file.resolve()}, download it again")
    assert str(caught.value).count("SHA-256") == 1
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.load_config(ours)
    assert not list(ours.rglob("params"))  # nothing was converted yet
    with pytest.raises(FolderError, match="its SHA-256 is"):
        from_pretrained(src, verify=True)


@pytest.mark.parametrize("layout", [as_it_is, *LAYOUTS])
def test_what_is_whole_is_imported_and_the_files_are_counted(src, tmp_path, layout):
    layout(src)
    counts, shards = [], sum((src / name).stat().st_size for name in SHARDS)
    convert.import_folder(src, tmp_path / "ours", progress=lambda n, total: counts.append((n, total)))
    weights = sum(value.nbytes for value in VALUES.values())
    assert {total for _, total in counts} == {weights + (0 if layout is as_it_is else shards)}
    assert sum(n for n, _ in counts) == counts[0][1]
    assert len(digests.recorded([src / name for name in SHARDS])) == (0 if layout is as_it_is else 3)
    from_pretrained(src, verify=True)


def test_every_damaged_file_is_named_at_once(src, tmp_path):
    as_cached(src)
    for name in SHARDS[0], SHARDS[2]:
        flip(src / name, 8 * header_bytes(src / name) + 3)
    with pytest.raises(FolderError) as caught:
        convert.import_folder(src, tmp_path / "ours")
    named = str(caught.value).partition("; delete ")[2].removesuffix(", download them again").split()
    assert [pathlib.Path(name) for name in named] == [(src / name).resolve() for name in (SHARDS[0], SHARDS[2])]
    for name in named:  # as the Hub's client does it: what is missing is fetched
        pathlib.Path(name).unlink()
    whole = published.write_folder(tmp_path / "whole", CONFIG, VALUES, shards=3)
    for name in SHARDS[0], SHARDS[2]:
        shutil.copyfile(whole / name, (src / name).resolve())
    convert.import_folder(src, tmp_path / "ours")


def test_a_stopped_import_does_not_verify_twice(src, tmp_path, monkeypatch):
    as_listed(src)
    read, calls = digests._sha256, []

    def stopping(file, advance):
        calls.append(file.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(file, advance)

    monkeypatch.setattr(digests, "_sha256", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert.import_folder(src, tmp_path / "ours")
    counts = []
    convert.import_folder(src, tmp_path / "ours", progress=lambda n, total: counts.append((n, total)))
    assert calls == [*SHARDS, SHARDS[2]]
    assert sum(n for n, _ in counts) == counts[0][1]


def test_other_sums_are_another_import(src, tmp_path, monkeypatch):
    """A record that comes after an import has begun is not passed over."""
    with monkeypatch.context() as patch:
        patch.setattr(convert.Arrays, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert.import_folder(src, tmp_path / "ours")
    as_listed(src)
    flip(src / SHARDS[1], 8 * header_bytes(src / SHARDS[1]))
    with pytest.raises(FolderError, match=SHARDS[1]):
        convert.import_folder(src, tmp_path / "ours")


def test_records_that_cannot_be_read_are_no_sums(src):
    as_local_dir(src)
    record = src / ".cache" / "huggingface" / "download" / f"{SHARDS[0]}.metadata"
    for text in "", "one line", "two\nlines", f"c\n{'g' * 64}\n1.0", f"c\n{'a' * 65}\n1.0":
        record.write_text(text)
        assert digests.recorded([src / SHARDS[0]]) == {}
    record.write_bytes(b"\xff\xfe\n\xff")
    (src / "SHA256SUMS").mkdir()
    assert digests.recorded([src / SHARDS[0]]) == {}


def test_a_flip_anywhere_in_a_header_changes_no_value_unseen(tmp_path):
    """Every bit of a header, no sum recorded: an error of ours, or the model as it was."""
    config = published.LITE | {"num_hidden_layers": 1, "q_lora_rank": 6}
    values = {name: value.astype(ml_dtypes.bfloat16) for name, value in published.weights(config).items()}
    src = published.write_folder(tmp_path / "src", config, values, shards=4)
    shard, refused, accepted = src / "model-00001-of-00004.safetensors", 0, 0
    ours, whole = model_config(config), shard.read_bytes()
    for bit in range(8 * header_bytes(shard)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(data)
        try:
            folder = Folder(src)
            if mapping.check(ours, folder):
                raise FolderError
        except FolderError:
            refused += 1
            continue
        accepted += 1
        assert all(folder.read(name).tobytes() == value.tobytes() for name, value in values.items()), bit
    assert refused > 1000 > accepted  # accepted: the file's own remarks


def test_a_flip_in_an_index_changes_no_value_unseen(src):
    ours, whole = model_config(CONFIG), (src / INDEX).read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(whole), 500, replace=False):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << int(bit % 8)
        (src / INDEX).write_bytes(data)
        try:
            folder = Folder(src)
            if mapping.check(ours, folder):
                raise FolderError
        except FolderError:
            continue
        assert all(folder.read(name).tobytes() == value.tobytes() for name, value in VALUES.items()), bit


def test_an_export_lists_its_sums_so_that_a_flipped_bit_is_found(tmp_path):
    """Also where it was stopped between its files."""
    src, ours, back, said = published.write_folder(tmp_path / "src", CONFIG, VALUES), tmp_path / "ours", [], []
    convert.import_folder(src, ours, report=said.append)
    assert said == [f"{src}: no SHA-256 is recorded of 2 files; {digests.REMEDY}"]
    for name in ("whole", "stopped"):
        dst, calls = tmp_path / name, []

        def progress(done, total, calls=calls):
            calls.append(done)
            if len(calls) == 30:
                raise KeyboardInterrupt

        if name == "stopped":
            with pytest.raises(KeyboardInterrupt):
                convert.export_folder(ours, dst, shard_bytes=20_000, progress=progress)
            assert list(dst.glob("*.complete"))
            assert not (dst / "SHA256SUMS").exists()
        convert.export_folder(ours, dst, shard_bytes=20_000)
        back.append((dst / "SHA256SUMS").read_text())
        files = sorted(dst.glob("*.safetensors"))
        assert digests.recorded(files) == {file: sha256(file) for file in files}
        assert len(files) > 3
    assert back[0] == back[1]
    damaged = bytearray(files[1].read_bytes())
    damaged[-1] ^= 1
    files[1].write_bytes(damaged)
    said.clear()
    with pytest.raises(FolderError, match=rf"{files[1].name}: its SHA-256 is .*, .* is recorded: damaged"):
        convert.import_folder(dst, tmp_path / "again", report=said.append)
    assert not said
