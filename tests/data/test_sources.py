import json
import random
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_jax.config import ConfigError, SourceConfig
from dsv2_jax.data import sources
from dsv2_jax.data.sources import DataError, Malformed, Record, expand, iter_records

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def read(*paths, **fields):
    source = SourceConfig("test", tuple(map(str, paths)), **fields)
    return list(iter_records(source))


def texts(records):
    return [record.text for record in records]


def write_arrayrecord(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_jsonl_malformed_lines_are_named_and_the_others_read(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "one"}', b"", b"{", b"[1]", b'{"other": 1, "b": 2}', b'{"text": 3}', b'{"text": "\\ud800"}',
             b'{"text": "\xff"}', b"[" * 200_000, b'{"text": null}', b'{"text": "two\\n"}']  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    records = read(path)
    assert [(r.where, r.text) for r in records if isinstance(r, Record)] == [
        (f"{path}:1", "one"),
        (f"{path}:11", "two\n"),
    ]
    errors = {int(r.where.removeprefix(f"{path}:")): r.error for r in records if isinstance(r, Malformed)}
    expected = {3: "not JSON", 4: "list, not an object", 5: "no field 'text' among ['b', 'other']", 6: "int, not text",
                7: "lone surrogate", 8: "not UTF-8: byte 0xff", 9: "not JSON", 10: "NoneType, not text"}  # fmt: skip
    assert errors.keys() == expected.keys()
    for line, words in expected.items():
        assert words in errors[line]
    assert sum(r.size for r in records) == path.stat().st_size - 1  # all but the blank line


def test_parquet_rows(tmp_path):
    path = tmp_path / "a.parquet"
    column = [f"text {i}" for i in range(150)]
    column[70], column[149] = None, "你好"
    pq.write_table(pa.table({"body": column, "other": range(150)}), path, row_group_size=40)
    records = read(path, text_field="body")
    assert len(records) == 150
    assert records[70] == Malformed(f"{path}:71", "'body' is NoneType, not text", records[70].size)
    assert [r.text for i, r in enumerate(records) if i != 70] == [t for t in column if t]
    assert sum(r.size for r in records) == path.stat().st_size
    with pytest.raises(ConfigError, match=r"text_field='text'.*body"):
        read(path)
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": bad}), path)
    assert [r.error for r in read(path)] == ["not UTF-8: invalid start byte"]


def test_arrayrecord(tmp_path):
    path = tmp_path / "a.arrayrecord"
    write_arrayrecord(path, [b"one\n", b"a\n\xff", "你好".encode(), b""])
    records = read(path)
    assert [(r.where, r.text) for r in records if isinstance(r, Record)] == [
        (f"{path}:{i}", text) for i, text in ((1, "one\n"), (3, "你好"), (4, ""))
    ]
    assert records[1].where == f"{path}:2"
    assert "not UTF-8: byte 0xff" in records[1].error
    assert sum(r.size for r in records) == path.stat().st_size


@pytest.mark.parametrize("ending", ["parquet", "arrayrecord"])
@pytest.mark.parametrize("damage", ["half", "empty", "other", "flipped"])
def test_damaged_files_are_named(tmp_path, ending, damage):
    path = tmp_path / f"a.{ending}"
    rows = [random.Random(i).randbytes(500).hex() for i in range(300)]
    if ending == "parquet":
        pq.write_table(pa.table({"text": rows}), path, compression="zstd", use_dictionary=False)
    else:
        write_arrayrecord(path, [row.encode() for row in rows])
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        offset = 70_000 if ending == "arrayrecord" else len(data) // 2
        data[offset : offset + 40] = bytes(byte ^ 0xFF for byte in data[offset : offset + 40])
    else:
        data = {"half": data[: len(data) // 2], "empty": b"", "other": b"no such format\n" * 9999}[damage]
    path.write_bytes(data)
    with pytest.raises(DataError, match=str(path)):
        read(path)


def test_short_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read(path) == [Record("one\r\ntwo\n", f"{path}:1", 12)]
    path.write_bytes(b"one\ntwo\n\xe4\xbd")
    assert read(path) == [Malformed(f"{path}:3", "not UTF-8: byte 0xe4", 10)]
    path.write_bytes(b"")
    assert read(path) == []


def test_long_text_file_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    lines = [f"{i} {'word ' * (i % 40)}\n" for i in range(3000)]
    path.write_text("".join(lines))
    records = read(path)
    assert "".join(texts(records)) == "".join(lines)
    assert len(records) >= path.stat().st_size / sources.TEXT_PIECE_BYTES
    for record in records:
        line = int(record.where.rpartition(":")[2])
        assert record.text.startswith(lines[line - 1])
        assert record.text.endswith("\n")
        assert len(record.text.encode()) == record.size <= sources.TEXT_PIECE_BYTES + 300
    assert min(record.size for record in records) > sources.TEXT_PIECE_BYTES / 2


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=60), st.integers(1, 12))
def test_a_cut_never_splits_a_character(tmp_path_factory, text, piece):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "TEXT_PIECE_BYTES", piece)
        assert "".join(texts(read(path))) == text.removeprefix("\ufeff") or "\ufeff" in text
        assert all(isinstance(record, Record) for record in read(path))


def test_files_come_once_in_sorted_order_and_formats_follow_the_ending(tmp_path):
    (tmp_path / "b" / "c.txt").mkdir(parents=True)  # a folder, however named, is no file
    for name in ("z.txt", "a.jsonl", "b/m.md", "b/[odd].txt"):
        (tmp_path / name).write_text('{"text": "in json"}')
    source = SourceConfig("s", tuple(f"{tmp_path}/{p}" for p in ("z.txt", "**/*.*", "b/[odd].txt")))
    expected = [tmp_path / name for name in ("a.jsonl", "b/[odd].txt", "b/m.md", "z.txt")]
    assert expand(source) == expected
    assert texts(iter_records(source)) == ["in json", *['{"text": "in json"}'] * 3]
    assert texts(read(tmp_path / "z.txt", format="jsonl")) == ["in json"]
    with pytest.raises(ConfigError, match=r"nothing\*' of source 'test' matches no file"):
        read(tmp_path / "z.txt", tmp_path / "nothing*")
    with pytest.raises(ConfigError, match=r"b/\*\*/\*.txt"):
        read(tmp_path / "b")


def test_stdlib_is_whole_files_in_fixed_order_without_tests():
    source = SourceConfig("python", ("stdlib",))
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = [path.relative_to(root) for path in expand(source)]
    assert len(relative) > 300
    assert Path("json/decoder.py") in relative
    assert [path.as_posix() for path in relative] == sorted(path.as_posix() for path in relative)
    forbidden = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}
    assert not any(forbidden & set(path.parts) for path in relative)
    assert len({*relative}) == len(relative)
    first = [record for record, _ in zip(iter_records(source), range(20))]
    assert first == [record for record, _ in zip(iter_records(source), range(20))]
    for record in first:
        path = Path(record.where.removesuffix(":1"))
        assert record.text == path.read_bytes().decode()


def test_real_files():
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    shakespeare = read(SHARED / "tinyshakespeare.txt")
    assert "".join(texts(shakespeare)) == (SHARED / "tinyshakespeare.txt").read_text()
    assert len(shakespeare) > 16  # enough to fill every virtual shard
    rows = [json.loads(line) for line in (SHARED / "gsm8k_train.jsonl").read_text().splitlines()]
    assert texts(read(SHARED / "gsm8k_train.jsonl", text_field="question")) == [row["question"] for row in rows]
    chinese = read(SHARED / "cmrc2018_trial.json")
    assert "".join(texts(chinese)) == (SHARED / "cmrc2018_trial.json").read_text()
