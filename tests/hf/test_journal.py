"""What a conversion's journal keeps when its process dies, or its disk is full."""

import pytest
from disk import file_size_limit

from dsv2_jax.hf.journal import Journal


def entries(path, identity="a model") -> list[dict]:
    with Journal(path, identity) as journal:
        return journal.entries


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "import.journal"
    with Journal(path, "a model") as journal:
        assert not journal.found
        for number in range(3):
            journal.add({"entry": number})
    return path


def test_what_was_added_is_found_again_and_more_is_added(path):
    with Journal(path, "a model") as journal:
        assert journal.found
        journal.add({"entry": 3})
    assert entries(path) == [{"entry": 0}, {"entry": 1}, {"entry": 2}, {"entry": 3}]


@pytest.mark.parametrize("cut", [1, 4, 12])
def test_a_line_that_a_crash_cut_is_left_out_and_the_next_begins_anew(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, "a model") as journal:
        assert journal.entries == [{"entry": 0}, {"entry": 1}]
        journal.add({"entry": 5})
    assert entries(path) == [{"entry": 0}, {"entry": 1}, {"entry": 5}]


def test_bytes_that_are_no_text_end_it(path):
    path.write_bytes(path.read_bytes().replace(b'{"entry": 1}', b'{"\xff\xfe": 1'))
    assert entries(path) == [{"entry": 0}]


def test_of_another_identity_nothing_is_taken(path):
    assert entries(path, "another model") == []
    assert entries(path) == []


def test_one_at_a_time(path):
    with Journal(path, "a model"), pytest.raises(BlockingIOError):
        Journal(path, "a model")


def test_a_full_disk_loses_nothing_and_locks_nothing(path):
    with file_size_limit(20):
        assert entries(path) == [{"entry": 0}, {"entry": 1}, {"entry": 2}]
        with pytest.raises(OSError, match="File too large") as kept:  # its frames hold the journal
            Journal(path, "another, whose name is longer than what can be written")
    assert kept.traceback
    assert entries(path, "another, whose name is longer than what can be written") == []
