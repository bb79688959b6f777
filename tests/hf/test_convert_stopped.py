"""Conversions that are stopped: what is there then, who goes on with it, and who begins anew."""

import operator

import pytest
from conversions import BFLOAT16, assert_holds, assert_same_bytes, tensors, write

from dsv2_jax import checkpoint
from dsv2_jax.checkpoint import CheckpointError
from dsv2_jax.config import ConfigError
from dsv2_jax.hf import arrays, convert
from dsv2_jax.hf.pretrained import from_pretrained
from dsv2_jax.hf.safetensors import Folder, FolderError
from dsv2_jax.hf.shard_writer import ShardWriter


def stop_after(monkeypatch, count: int):
    """The `count`-th piece from now on is stopped by Ctrl-C."""
    write_piece, left = arrays.Arrays.write, iter(range(count))

    def write(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write_piece(*arguments)

    monkeypatch.setattr(arrays.Arrays, "write", write)


def test_a_stopped_import_is_no_checkpoint_and_goes_on(tmp_path, monkeypatch):
    values, ours = tensors(), tmp_path / "ours"
    src, counts = write(tmp_path / "src", values), []
    done, start = 0, convert.import_folder
    for count in (40, 5, 60):
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            with pytest.raises(KeyboardInterrupt):
                start(src, ours, progress=lambda n, total: counts.append((n, total)))
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            checkpoint.load_config(ours)
        with pytest.raises((CheckpointError, FolderError, ConfigError)):
            from_pretrained(ours)
        assert counts[0][0] >= done
        done = counts[0][0]
        counts.clear()
    start(src, ours, progress=lambda n, total: counts.append((n, total)))
    assert counts[0][0] > done > 0
    assert sum(n for n, _ in counts) == counts[0][1] == sum(value.nbytes for value in values.values())
    assert_holds(ours, values)


def test_a_stopped_import_waits_for_what_is_being_written(tmp_path, monkeypatch):
    """Or it would come into the folder after another import has begun there anew."""
    begun, ended, write_piece = [], [], arrays.Arrays.write

    class Watched:
        def __init__(self, future):
            self.future = future
            begun.append(self)

        def result(self):
            ended.append(self)
            return self.future.result()

    def watched(self, *arguments):
        write_piece(self, *arguments)
        future, *rest = self._writing
        self._writing = Watched(future), *rest

    with monkeypatch.context() as patch:
        patch.setattr(arrays.Arrays, "write", watched)
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            convert.import_folder(write(tmp_path / "src"), tmp_path / "ours")
    assert len(begun) == 5
    assert ended == begun


def test_another_source_begins_anew(tmp_path, monkeypatch):
    ours, counts = tmp_path / "ours", []
    with monkeypatch.context() as patch:
        stop_after(patch, 50)
        with pytest.raises(KeyboardInterrupt):
            convert.import_folder(write(tmp_path / "one"), ours)
    values = {name: value * BFLOAT16(2) for name, value in tensors().items()}
    src = write(tmp_path / "two", values)
    convert.import_folder(src, ours, progress=lambda n, _: counts.append(n))
    assert counts[0] == 0
    assert_holds(ours, values)
    with pytest.raises(FolderError, match="is not empty, and nothing there was interrupted"):
        convert.import_folder(src, ours)


def test_a_whole_import_of_another_source_is_not_taken_for_this_one(tmp_path, monkeypatch):
    ours, one = tmp_path / "ours", write(tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(convert.Journal, "remove", lambda _: operator.truediv(1, 0))
        with pytest.raises(ZeroDivisionError):
            convert.import_folder(one, ours)
    two = write(tmp_path / "two", {name: value * BFLOAT16(2) for name, value in tensors().items()})
    for _ in range(2):
        with pytest.raises(FolderError, match=r"0 is whole, of another source or of other options; choose another"):
            convert.import_folder(two, ours)
    convert.import_folder(one, ours)
    assert not (ours / "import.journal").exists()
    assert_holds(ours, tensors())


def test_what_another_source_had_beside_its_weights_does_not_stay(tmp_path, monkeypatch):
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    (one / "special_tokens_map.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (two / name).unlink()
    ours, mine, out = (tmp_path / name for name in ("ours", "mine", "out"))
    with monkeypatch.context() as patch:
        patch.setattr(convert.pathlib.Path, "rename", lambda *_: operator.truediv(1, 0))  # all but its name is there
        with pytest.raises(ZeroDivisionError):
            convert.import_folder(one, ours)
    assert (ours / "special_tokens_map.json").exists()
    convert.import_folder(two, ours)
    assert sorted(path.name for path in ours.iterdir()) == ["checkpoints"]
    convert.import_folder(one, mine)
    assert (mine / "special_tokens_map.json").read_text() == "{}"
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", lambda *_, **__: operator.truediv(1, 0))
        with pytest.raises(ZeroDivisionError):
            convert.export_folder(mine, out)
    assert (out / "tokenizer.json").exists()
    convert.export_folder(ours, out)
    names = ["SHA256SUMS", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_a_stop_between_the_last_two_steps(tmp_path, monkeypatch):
    src, ours = write(tmp_path / "src"), tmp_path / "ours"
    with monkeypatch.context() as patch:
        patch.setattr(convert.Journal, "remove", lambda _: operator.truediv(1, 0))
        with pytest.raises(ZeroDivisionError):
            convert.import_folder(src, ours)
    assert (ours / "import.journal").exists()
    convert.import_folder(src, ours)
    assert not (ours / "import.journal").exists()
    assert_holds(ours, tensors())


def test_a_stopped_export_goes_on_and_still_checks_all_sums(tmp_path, monkeypatch):
    src, out = write(tmp_path / "src"), tmp_path / "out"
    convert.import_folder(src, tmp_path / "ours")
    read, left, counts = arrays.Arrays.read, iter(range(70)), []

    def stopping(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(arrays.Arrays, "read", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert.export_folder(tmp_path / "ours", out, shard_bytes=30_000)
    with pytest.raises(FolderError, match="neither"):
        Folder(out)
    with pytest.raises(FolderError, match="neither"):
        from_pretrained(out)
    options = {"shard_bytes": 30_000, "progress": lambda n, total: counts.append((n, total))}
    convert.export_folder(tmp_path / "ours", out, **options)
    assert 0 < counts[0][0] < counts[0][1] == sum(n for n, _ in counts)
    assert_same_bytes(src, out)
