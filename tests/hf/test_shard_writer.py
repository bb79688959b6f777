"""Folders of shards as they are written: resumed, refused, and never accepted before they are whole."""

import itertools
import pathlib

import numpy as np
import pytest
from disk import file_size_limit
from shards import assert_same, write

from dsv2_jax.hf.journal import Journal
from dsv2_jax.hf.safetensors import INDEX, SINGLE, SUMS, Folder, FolderError
from dsv2_jax.hf.shard_writer import JOURNAL, ShardWriter


def interrupted(folder, values, at: str, **options):
    """A writer that is stopped when it comes to the tensor `at`."""

    def stop():
        raise KeyboardInterrupt
        yield

    writer = ShardWriter(folder, 100, **options)
    for name, value in values.items():
        writer.add(name, value.shape, value.dtype, stop() if name == at else [value])
    with pytest.raises(KeyboardInterrupt):
        writer.finish(state={})


VALUES = {name: np.arange(10.0) + i for i, name in enumerate("abcdef")}


@pytest.mark.parametrize("at", VALUES)
def test_nothing_is_accepted_before_it_is_whole_and_a_stopped_run_goes_on(tmp_path, at):
    interrupted(tmp_path, VALUES, at)
    with pytest.raises(FolderError, match="neither"):
        Folder(tmp_path)
    assert not list(tmp_path.glob("*.safetensors*.json"))
    drawn, state = [], {}

    def pieces(name, value):
        drawn.append(name)
        state[name] = True
        yield value

    writer = ShardWriter(tmp_path, 100)
    for name, value in VALUES.items():
        writer.add(name, value.shape, value.dtype, pieces(name, value))
    assert writer.done_bytes() == 80 * list(VALUES).index(at)
    writer.finish(state=state)
    assert drawn == [name for name in VALUES if name >= at]
    assert_same(Folder(tmp_path), VALUES)


def test_another_identity_begins_anew(tmp_path):
    interrupted(tmp_path, VALUES, "d", identity="one")
    write(tmp_path, {"x": np.arange(3.0)}, identity="two")
    assert sorted(path.name for path in tmp_path.iterdir()) == [SUMS, SINGLE]
    with pytest.raises(FolderError, match="is there already; choose another folder"):
        ShardWriter(tmp_path, 100)


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stopped(monkeypatch, at: int, *arguments, **options) -> bool:
    """Whether `write` comes to its step `at`, where it is stopped: before or after a rename, or the journal's end."""
    steps = itertools.count()

    def stopping(do):
        def step(*arguments):
            if next(steps) == at:
                raise KeyboardInterrupt
            result = do(*arguments)
            if next(steps) == at:
                raise KeyboardInterrupt
            return result

        return step

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", stopping(pathlib.Path.rename))
        patch.setattr(Journal, "remove", stopping(Journal.remove))
        try:
            write(*arguments, **options)
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize(("shard_bytes", "steps"), [(100, 28), (10**6, 6)], ids=["shards", "one file"])
def test_a_run_stopped_at_any_of_its_last_steps_goes_on(tmp_path, monkeypatch, shard_bytes, steps):
    whole = contents(write(tmp_path / "whole", VALUES, shard_bytes))
    for at in range(steps):
        assert stopped(monkeypatch, at, tmp_path / str(at), VALUES, shard_bytes)
        if (tmp_path / str(at) / JOURNAL).exists():
            write(tmp_path / str(at), VALUES, shard_bytes)
        assert contents(tmp_path / str(at)) == whole, at
    assert not stopped(monkeypatch, steps, tmp_path / "all", VALUES, shard_bytes)  # there is no such step


@pytest.mark.parametrize(("shard_bytes", "steps"), [(100, [13, 26]), (10**6, [4])], ids=["shards", "one file"])
def test_a_shard_that_is_lost_is_written_again(tmp_path, monkeypatch, shard_bytes, steps):
    """Also where its user has removed what stood in the way: what is not there is not done, whatever was noted."""
    whole = contents(write(tmp_path / "whole", VALUES, shard_bytes))
    for at in steps:  # all complete, none renamed; all but the end of the journal
        for lost in range(6 if shard_bytes == 100 else 1):
            folder = tmp_path / f"{at} {lost}"
            assert stopped(monkeypatch, at, folder, VALUES, shard_bytes)
            sorted(folder.glob("model*.safetensors*"))[lost].unlink()
            for _ in range(2):  # and stopped again in the shard after it
                if (folder / JOURNAL).exists():
                    stopped(monkeypatch, 2, folder, VALUES, shard_bytes)
            if (folder / JOURNAL).exists():
                write(folder, VALUES, shard_bytes)
            assert contents(folder) == whole


def test_a_shard_that_goes_while_it_is_published_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path, 100)
    for name, value in VALUES.items():
        writer.add(name, value.shape, value.dtype, [value])
    lost = tmp_path / "model-00003-of-00006.safetensors.complete"
    with pytest.raises(FolderError, match=r"model-00003-of-00006.safetensors: has gone since .*; run it again"):
        writer.finish(verify=lost.unlink)
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize(("shard_bytes", "last"), [(100, 26), (10**6, 4)])
def test_a_whole_folder_of_another_source_is_not_taken_for_ones_own(tmp_path, monkeypatch, shard_bytes, last):
    assert stopped(monkeypatch, last, tmp_path, VALUES, shard_bytes, identity="one")
    before = contents(tmp_path)
    for _ in range(2):
        with pytest.raises(FolderError, match="is whole, of another source or of other options; choose another folder"):
            ShardWriter(tmp_path, shard_bytes, "two")
        assert contents(tmp_path) == before
    write(tmp_path, VALUES, shard_bytes, identity="one")
    assert not (tmp_path / JOURNAL).exists()


def test_two_writers_of_one_folder(tmp_path):
    writer = ShardWriter(tmp_path, 100)
    with pytest.raises(FolderError, match="another process is writing it"):
        ShardWriter(tmp_path, 100)
    writer.finish()


def test_a_full_disk_is_named_and_nothing_accepted(tmp_path):
    writer = ShardWriter(tmp_path, 10**6)
    writer.add("w", (50_000,), np.float32, [np.zeros(50_000, np.float32)])
    message = r"cannot be written \(File too large\); once it can be, run it again"
    with file_size_limit(100_000), pytest.raises(FolderError, match=message):
        writer.finish()
    with pytest.raises(FolderError, match="neither"):
        Folder(tmp_path)


def test_what_does_not_verify_is_removed(tmp_path):
    def verify():
        raise RuntimeError("wrong sums")

    writer = ShardWriter(tmp_path, 100)
    writer.add("w", (2,), np.float32, [np.zeros(2, np.float32)])
    with pytest.raises(RuntimeError, match="wrong sums"):
        writer.finish(verify=verify)
    assert list(tmp_path.iterdir()) == []


def test_pieces_that_do_not_make_up_the_tensor(tmp_path):
    for pieces, message in [([np.zeros(2)], "16 bytes, not 24"), ([np.zeros(3, np.int64)], "a piece is int64")]:
        writer = ShardWriter(tmp_path, 100)
        writer.add("w", (3,), np.float64, pieces)
        with pytest.raises(ValueError, match=message):
            writer.finish()
