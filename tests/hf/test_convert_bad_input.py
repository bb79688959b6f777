"""What is wrong is named, with the file and the key, and nothing half-written is accepted afterwards."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import published
import pytest
from disk import file_size_limit

from dsv2_jax import checkpoint
from dsv2_jax.checkpoint import CheckpointError
from dsv2_jax.config import ConfigError
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.hf import convert
from dsv2_jax.hf.pretrained import from_pretrained
from dsv2_jax.hf.safetensors import INDEX, Folder, FolderError

SHARD = "model-00001-of-00002.safetensors"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


def tensors() -> dict[str, np.ndarray]:
    return {name: value.astype(ml_dtypes.bfloat16) for name, value in published.weights(published.V2).items()}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return published.write_folder(tmp_path_factory.mktemp("intact") / "src", published.V2, tensors())


@pytest.fixture(scope="module")
def imported(intact):
    convert.import_folder(intact, intact.parent / "ours")
    return intact.parent / "ours"


@pytest.fixture
def src(intact, tmp_path):
    shutil.copytree(intact, tmp_path / "src")
    return tmp_path / "src"


def edit_config(src, **changes):
    config = json.loads((src / "config.json").read_text()) | changes
    (src / "config.json").write_text(json.dumps(config))


def edit_index(src, key, name):
    index = json.loads((src / INDEX).read_text())
    index["weight_map"][key] = name
    (src / INDEX).write_text(json.dumps(index))


def edit_header(src, edit):
    """Change the header of the first shard, its length kept."""
    data = (src / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (src / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_tensors(src, **changes):
    """The folder written again with other tensors; None leaves one out."""
    values = tensors() | changes
    for path in src.glob("model*"):
        path.unlink()
    published.write_folder(src, published.V2, {name: value for name, value in values.items() if value is not None})


def first_key(src) -> str:
    return next(key for key, name in json.loads((src / INDEX).read_text())["weight_map"].items() if name == SHARD)


def flip(src, byte: int):
    data = bytearray((src / SHARD).read_bytes())
    data[byte] ^= 0x40
    (src / SHARD).write_bytes(data)


def with_tokenizer(src, text: bytes):
    Tokenizer.train(["a"], 260).save(src / "tokenizer.json")
    (src / "tokenizer_config.json").write_bytes(text)


def make_infinite(src):
    values = tensors()[EXPERT]
    values[3, 4] = np.inf
    edit_tensors(src, **{EXPERT: values})


def shift_offsets(header):
    entry = next(iter(value for key, value in header.items() if key != "__metadata__"))
    entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]


DAMAGE = {
    "truncated": (lambda src: os.truncate(src / SHARD, 50_000), [SHARD, "the file at 50000"]),
    "cut in its header": (lambda src: os.truncate(src / SHARD, 100), [SHARD, "header would be"]),
    "empty shard": (lambda src: os.truncate(src / SHARD, 0), [SHARD, "the file has 0"]),
    "a bit of the header": (lambda src: flip(src, 20), [SHARD]),
    "a bit of the header's length": (lambda src: flip(src, 5), [SHARD, "header would be"]),
    "offsets that overlap": (lambda src: edit_header(src, shift_offsets), [SHARD, "begins at byte"]),
    "a missing shard": (lambda src: (src / SHARD).unlink(), [INDEX, SHARD, "is missing; download it"]),
    "no weights": (lambda src: [p.unlink() for p in src.glob("model*")], ["neither model.safetensors nor", INDEX]),
    "a path out of the folder": (
        lambda src: edit_index(src, EXPERT, "../x"),
        [INDEX, "'../x'", "no file of this folder"],
    ),
    "an absolute path": (lambda src: edit_index(src, EXPERT, "/etc/passwd"), [INDEX, "no file of this folder"]),
    "a key in another shard": (
        lambda src: edit_index(src, first_key(src), "model-00002-of-00002.safetensors"),
        [SHARD],
    ),
    "a missing key": (lambda src: edit_tensors(src, **{EXPERT: None}), [EXPERT, "is missing"]),
    "an extra key": (
        lambda src: edit_tensors(src, more=np.zeros(3, np.float32)),
        ["more in model-", ".safetensors: belongs to no parameter"],
    ),
    "a wrong shape": (
        lambda src: edit_tensors(src, **{EXPERT: np.zeros((48, 14), np.float32)}),
        [EXPERT, "of-00002.safetensors", "[48, 14]", "[14, 48]"],
    ),
    "a wrong type": (
        lambda src: edit_tensors(src, **{EXPERT: np.zeros((14, 48), np.int32)}),
        [EXPERT, "of-00002.safetensors", "int32", "bfloat16"],
    ),
    "an infinite weight": (make_infinite, [EXPERT, "not finite", "download"]),
    "no config.json": (lambda src: (src / "config.json").unlink(), ["config.json"]),
    "config.json cut": (lambda src: (src / "config.json").write_text('{"a": '), ["config.json"]),
    "another architecture": (lambda src: edit_config(src, model_type="llama"), ["config.json", "model_type='llama'"]),
    "an unknown field": (lambda src: edit_config(src, swiglu_limit=7.0), ["config.json", "swiglu_limit=7.0"]),
    "another width": (
        lambda src: edit_config(src, hidden_size=50),
        ["model.embed_tokens.weight", "[112, 48]", "[112, 50]"],
    ),
    "a layer more": (lambda src: edit_config(src, num_hidden_layers=4), ["model.layers.3", "is missing"]),
    "more layers than tensors": (
        lambda src: edit_config(src, num_hidden_layers=10**9),
        ["config.json: num_hidden_layers=1000000000", INDEX, "tensors; download both again"],
    ),
    "more experts than tensors": (
        lambda src: edit_config(src, n_routed_experts=10**8, n_group=1, topk_group=1),
        ["config.json: n_routed_experts=100000000", INDEX],
    ),
    "scales of a weight that is not FP8": (
        lambda src: edit_tensors(src, **{EXPERT + "_scale_inv": np.ones((1, 1), np.float32)}),
        [EXPERT + "_scale_inv", "would scale a weight in FP8"],
    ),
    "a tokenizer of another model": (
        lambda src: Tokenizer.train(["a"], 260).save(src / "tokenizer.json"),
        ["tokenizer.json: has 258 ids, the model's vocabulary 112; it is the tokenizer of another model"],
    ),
    "tokenizer_config.json is no text": (
        lambda src: with_tokenizer(src, b'{"a": "\xff"}'),
        ["tokenizer_config.json: cannot be read as JSON of a tokenizer"],
    ),
    "tokenizer_config.json cannot be read": (
        lambda src: (src / "special_tokens_map.json").symlink_to("/proc/self/mem"),
        ["special_tokens_map.json: cannot be read (", "make it readable, or remove it"],
    ),
    "tokenizer.json cut": (
        lambda src: (src / "tokenizer.json").write_text('{"model": '),
        ["tokenizer.json", "not a readable"],
    ),
    "tokenizer.json of another kind": (lambda src: (src / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
}


def assert_nothing_loads(folder):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.load_config(folder)
    with pytest.raises((CheckpointError, ConfigError), match=r"no checkpoint here|there is no such folder"):
        from_pretrained(folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_published_folder(src, tmp_path, damage):
    harm, named = DAMAGE[damage]
    harm(src)
    with pytest.raises((FolderError, ConfigError)) as caught:
        convert.import_folder(src, tmp_path / "ours")
    assert all(name in str(caught.value) for name in named), str(caught.value)
    assert_nothing_loads(tmp_path / "ours")


UNREADABLE = ("a tokenizer of another model", "tokenizer_config.json cannot be read")


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in UNREADABLE])
def test_what_cannot_be_imported_cannot_be_opened(src, damage):
    harm, named = DAMAGE[damage]
    harm(src)
    with pytest.raises((FolderError, ConfigError)) as caught:
        from_pretrained(src)
    assert all(name in str(caught.value) for name in named if name != "a"), str(caught.value)


def test_a_dry_run_lists_every_damaged_shard_and_what_else_is_wrong(src, tmp_path):
    for name in (SHARD, "model-00002-of-00002.safetensors"):
        os.truncate(src / name, 50_000)
    (src / "tokenizer.json").write_text("{}")
    found = convert.import_folder(src, tmp_path / "ours", dry_run=True, report=lambda _: None)
    assert found[0].count("the file at 50000") == 2
    assert "tokenizer.json" in found[1]
    assert len(found) == 2


def test_places_that_are_on_no_disk(intact, imported):
    for start, source in (convert.import_folder, intact), (convert.export_folder, imported):
        with pytest.raises(ConfigError, match="gs://bucket/new: must be a folder on a disk"):
            start(source, "gs://bucket/new")


@pytest.mark.parametrize("size", [20, 3_000, 8_000])  # what the embedding needs is more
def test_a_disk_that_fills_up_while_importing(intact, tmp_path, size):
    with file_size_limit(size), pytest.raises(FolderError, match=r"cannot be written.* once it can be, run it again"):
        convert.import_folder(intact, tmp_path / "ours", report=lambda _: None)  # print() would fail too
    assert_nothing_loads(tmp_path / "ours")
    convert.import_folder(intact, tmp_path / "ours")
    assert checkpoint.load_config(tmp_path / "ours")["published"] == published.V2


@pytest.mark.parametrize("size", [20, 3_000, 50_000])
def test_a_disk_that_fills_up_while_exporting(imported, tmp_path, size):
    with file_size_limit(size), pytest.raises(FolderError, match=r"cannot be written \(File too large\)"):
        convert.export_folder(imported, tmp_path / "out", shard_bytes=60_000)
    with pytest.raises(FolderError, match="neither"):
        Folder(tmp_path / "out")
    convert.export_folder(imported, tmp_path / "out", shard_bytes=60_000)
    assert len(Folder(tmp_path / "out").keys()) == len(tensors())


def leave_free(monkeypatch, size: int):
    usage = shutil.disk_usage("/")

    def disk_usage(place):
        os.stat(place)  # it must be there
        return usage._replace(free=size)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def test_a_disk_that_is_too_small_is_an_error_at_once(intact, imported, tmp_path, monkeypatch):
    leave_free(monkeypatch, 100_000)
    message = r"0\.\d\d GB are still to be written, 0.00 GB are free; make room"
    for start, source in (convert.import_folder, intact), (convert.export_folder, imported):
        with pytest.raises(FolderError, match=message):
            start(source, tmp_path / start.__name__)
        written = [path for path in (tmp_path / start.__name__).rglob("*") if path.is_file()]
        assert [path.suffix for path in written] == [".journal"]
    assert_nothing_loads(tmp_path / "import_folder")


def test_an_export_that_failed_does_not_lock_its_folder(imported, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        leave_free(patch, 100_000)
        with pytest.raises(FolderError, match="make room") as kept:
            convert.export_folder(imported, tmp_path / "out")
    convert.export_folder(imported, tmp_path / "out")
    assert kept.traceback  # its frames held what was open


def test_folders_that_hold_something_else(intact, imported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for start, source in (convert.import_folder, intact), (convert.export_folder, imported):
        with pytest.raises(FolderError, match="full is not empty, and nothing there was interrupted; choose another"):
            start(source, tmp_path / "full")
        with pytest.raises(FolderError, match="file is a file; name a folder"):
            start(source, tmp_path / "file")
    assert (tmp_path / "full" / "config.json").read_text() == "mine"


def test_a_dry_run_lists_what_is_wrong_with_the_place(intact, imported, tmp_path, monkeypatch):
    """A folder that holds something else, a disk without room; where the folder is not there yet too. No byte moves."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for start, source in (convert.import_folder, intact), (convert.export_folder, imported):
        options = {"dry_run": True, "report": lambda _: None}
        assert start(source, tmp_path / "new" / "ours", **options) == []
        (problem,) = start(source, tmp_path / "full", **options)
        assert "full is not empty" in problem
        (problem,) = start(source, tmp_path / "full" / "notes" / "ours", **options)
        assert problem.endswith("notes is a file; name a folder")
        with monkeypatch.context() as patch:
            leave_free(patch, 100_000)
            (problem,) = start(source, tmp_path / "new" / "ours", **options)
            assert "0.00 GB are free; make room" in problem
            assert len(start(source, tmp_path / "full", **options)) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "notes"]


def test_a_dry_run_lists_problems_of_the_source_and_of_the_place_together(src, tmp_path, monkeypatch):
    edit_tensors(src, **{EXPERT: None})
    (src / "tokenizer.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    leave_free(monkeypatch, 0)
    found = convert.import_folder(src, tmp_path / "full", dry_run=True, report=lambda _: None)
    for problem, named in zip(found, ["is missing", "tokenizer.json", "not empty", "make room"], strict=True):
        assert named in problem


@pytest.mark.parametrize("missing", [0, 1000])
def test_what_an_interrupted_run_has_written_needs_no_room(intact, imported, tmp_path, monkeypatch, missing):
    leave_free(monkeypatch, 0)
    written = bytes(sum(2 * value.size for value in tensors().values()) - missing)
    for start, source, journal in (
        (convert.import_folder, intact, convert.IMPORT_JOURNAL),
        (convert.export_folder, imported, convert.EXPORT_JOURNAL),
    ):
        dst = tmp_path / start.__name__
        dst.mkdir()
        (dst / journal).write_text("")
        (dst / "written").write_bytes(written)
        found = start(source, dst, dry_run=True, report=lambda _: None)
        assert ["make room" in problem for problem in found] == [True] * bool(missing)


def test_a_journal_of_another_version_is_named_with_the_remedy(intact, imported, tmp_path):
    for start, source, journal, old in (
        (convert.import_folder, intact, "import.journal", {"entry": 0}),
        (convert.export_folder, imported, "export.journal", {"shard": "model.safetensors", "state": {}}),
    ):
        dst = tmp_path / start.__name__
        with file_size_limit(3_000), pytest.raises(FolderError):
            start(source, dst, report=lambda _: None)
        identity = (dst / journal).read_text().splitlines()[0]
        (dst / journal).write_text(f"{identity}\n{json.dumps(old)}\n")
        for _ in range(2):
            with pytest.raises(
                FolderError, match=rf"{journal}: another version .* remove .*{dst.name} and start again"
            ):
                start(source, dst)
        shutil.rmtree(dst)
        start(source, dst)


def test_a_place_that_cannot_be_written(intact, imported):
    for start, source in (convert.import_folder, intact), (convert.export_folder, imported):
        with pytest.raises(FolderError, match=r"/proc/no.*cannot be written"):
            start(source, "/proc/no/such/place")


def test_a_damaged_checkpoint_is_named(imported, tmp_path):
    folder = tmp_path / "ours"
    shutil.copytree(imported, folder)
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checkpoints/0"):
        convert.export_folder(folder, tmp_path / "out")
    with pytest.raises(FolderError, match="neither"):
        Folder(tmp_path / "out")


@pytest.mark.parametrize("options", [{"dtype": "float8"}, {"shard_bytes": 0}])
def test_options_that_make_no_sense(imported, tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        convert.export_folder(imported, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
