import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import published
import pytest
from disk import file_size_limit

import common
from dsv2_jax import checkpoint
from dsv2_jax.checkpoint import CheckpointError
from dsv2_jax.config import ConfigError
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.hf.safetensors import INDEX, Folder

LITE = published.LITE | {"vocab_size": 272}  # for a tokenizer
SCRIPT = pathlib.Path(common.__file__).parent / "convert.py"


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    values = {name: value.astype(ml_dtypes.bfloat16) for name, value in published.weights(LITE).items()}
    folder = published.write_folder(tmp_path_factory.mktemp("published") / "lite", LITE, values)
    Tokenizer.train(["some text\n"] * 3, 260).save(folder / "tokenizer.json")
    return folder


def run(monkeypatch, *argv, script="convert") -> int:
    """The exit code of the script, run in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    monkeypatch.setattr(common, "keep_memory", lambda: None)
    with pytest.raises(SystemExit) as ended:
        common.run(importlib.import_module(script).main)
    return ended.value.code or 0


def test_there_and_back(src, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "import", src, tmp_path / "ours") == 0
    shown = capsys.readouterr().err
    assert "import: 100%" in shown
    assert "B/s" in shown
    assert run(monkeypatch, "export", tmp_path / "ours", tmp_path / "back", "--shard-size=40KB") == 0
    one, two = Folder(src), Folder(tmp_path / "back")
    assert all(one.read(key).tobytes() == two.read(key).tobytes() for key in one.keys())  # noqa: SIM118
    assert len(two.files()) > 3
    assert run(monkeypatch, "export", tmp_path / "ours", tmp_path / "wide", "--dtype=float32") == 0
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


def test_what_is_imported_is_what_the_generation_script_opens(src, tmp_path, monkeypatch):
    assert run(monkeypatch, "import", src, tmp_path / "ours") == 0
    (model, tokenizer), (expected, _) = (
        common.open_model(str(path), None, None, None) for path in (tmp_path / "ours", src)
    )
    jax.tree.map(np.testing.assert_array_equal, model, expected)
    assert tokenizer.encode("some text") == Tokenizer.load(src / "tokenizer.json").encode("some text")


def test_a_mesh_that_cannot_hold_the_model_ends_it_at_once(src, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "import", src, tmp_path / "ours", "--config.mesh=expert=5") == 2
    assert "mesh: expert=5 does not divide routed_experts" in capsys.readouterr().err
    assert run(monkeypatch, "import", src, tmp_path / "ours", "--config.mesh=fsdp=2,tensor=1024") == 2
    assert "does not divide" in capsys.readouterr().err
    assert run(monkeypatch, "export", src, tmp_path / "ours", "--config.mesh=fsdp=2") == 2
    assert "only an import takes one" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
    assert run(monkeypatch, "import", src, tmp_path / "ours", "--config.mesh=fsdp=2") == 0  # of more devices than here


def test_a_hub_id_is_downloaded_first(src, tmp_path, monkeypatch):
    asked = []

    def download(name, **_):
        asked.append(name)
        return str(src)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert run(monkeypatch, "import", "deepseek-ai/DeepSeek-V2-Lite", tmp_path / "ours") == 0
    assert asked == ["deepseek-ai/DeepSeek-V2-Lite"]
    assert checkpoint.load_config(tmp_path / "ours")["published"] == LITE


def test_a_dry_run_prints_and_writes_nothing(src, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "import", src, tmp_path / "ours", "--dry-run") == 0
    assert "model.embed_tokens.weight -> embed  [272, 48]\n" in capsys.readouterr().out
    shutil.copytree(src, tmp_path / "wrong")
    config = LITE | {"num_hidden_layers": 4}
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    assert run(monkeypatch, "import", tmp_path / "wrong", tmp_path / "ours", "--dry-run") == 2
    shown = capsys.readouterr()
    assert "model.layers.3.input_layernorm.weight -> moe_blocks.attention_norm.scale[2]" in shown.out
    assert "model.layers.3.input_layernorm.weight: is missing" in shown.err
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["import", "{src}", "{full}"], ["full is not empty"]),
        (["import", "{full}", "{new}"], ["config.json"]),
        (["import", "no/such/folder", "{new}"], ["no/such/folder"]),
        (["export", "{full}", "{new}"], ["no checkpoint here"]),
        (["export", "{none}", "{new}"], ["there is no such folder"]),
        (["export", "{src}", "{new}", "--shard-size=5"], ["--shard-size=5", "such as 5GB"]),
        (["export", "{src}", "{new}", "--shard-size=0GB"], ["--shard-size=0GB"]),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(src, tmp_path, monkeypatch, capsys, argv, named):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    places = {"src": src, "full": tmp_path / "full", "new": tmp_path / "new", "none": tmp_path / "none"}
    assert run(monkeypatch, *(word.format(**places) for word in argv)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("convert.py: error: ")
    assert all(name in error for name in named), error
    assert not (tmp_path / "new").exists()


EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
SHARD = "model-00001-of-00002.safetensors"


def point_outside(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EXPERT] = "../x"
    (folder / INDEX).write_text(json.dumps(index))


def turn(folder):
    values = published.weights(LITE)
    for path in folder.glob("model*"):
        path.unlink()
    published.write_folder(folder, LITE, values | {EXPERT: values[EXPERT].T.copy()})


@pytest.mark.parametrize("script", ["convert", "generate"])
@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda folder: os.truncate(folder / SHARD, 50_000), [SHARD, "weight'", "the file at 50000"]),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": '), ["tokenizer.json", "not a readable"]),
        (point_outside, [INDEX, EXPERT, "'../x'"]),
        (turn, [f"{EXPERT} in {SHARD}", "[48, 14]", "[14, 48]"]),
    ],
    ids=["truncated shard", "broken tokenizer", "path out of the folder", "wrong shape"],
)
def test_a_damaged_folder_ends_in_one_line_with_file_and_key(src, tmp_path, monkeypatch, capsys, script, harm, named):
    folder, ours = tmp_path / "src", tmp_path / "ours"
    shutil.copytree(src, folder)
    harm(folder)
    generating = [f"--checkpoint={folder}", "--prompt=a"]
    argv = ["import", folder, ours] if script == "convert" else generating
    assert run(monkeypatch, *argv, script=script) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert error.startswith(f"{script}.py: error: ")
    assert all(name in error for name in named), error
    assert not ours.exists()


@pytest.mark.parametrize(("size", "named"), [(3_000, "params/_METADATA"), (7_500, "params: embed")])
def test_a_full_disk_ends_in_one_line_and_no_load_accepts_it(src, tmp_path, monkeypatch, capsys, size, named):
    ours, generating = tmp_path / "ours", [f"--checkpoint={tmp_path / 'ours'}", "--prompt=a", "--max_new_tokens=1"]
    with file_size_limit(size):
        assert run(monkeypatch, "import", src, ours) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("convert.py: error: ")
    assert all(name in error for name in (named, "cannot be written", "run it again")), error
    assert any(ours.rglob("*"))
    assert run(monkeypatch, *generating, script="generate") == 2
    assert run(monkeypatch, "export", ours, tmp_path / "back") == 2
    assert "no checkpoint here" in capsys.readouterr().err
    assert run(monkeypatch, "import", src, ours) == 0
    assert run(monkeypatch, *generating, script="generate") == 0


def test_only_where_nothing_is_the_quickstart_is_named(src, tmp_path, monkeypatch, capsys):
    def said(folder) -> str:
        assert run(monkeypatch, f"--checkpoint={folder}", "--prompt=a", script="generate") == 2
        return capsys.readouterr().err

    shutil.copytree(src, tmp_path / "src")
    os.truncate(tmp_path / "src" / SHARD, 50_000)
    assert "quickstart" not in said(tmp_path / "src")
    assert "experiments/quickstart.py" in said(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "experiments/quickstart.py" in said(tmp_path / "empty")


def test_a_tokenizer_of_another_model_is_refused_by_name(src, tmp_path):
    large = tmp_path / "large.json"
    Tokenizer.train(["some other text, with more words and so more merges"] * 9, 300).save(large)
    with pytest.raises(ConfigError, match=r"large.json: has \d+ ids, the model's vocabulary 272"):
        common.open_model(str(src), None, str(large), None)
    with pytest.raises(ConfigError, match=r"--tokenizer=no/such.json: there is no such file"):
        common.open_model(str(src), None, "no/such.json", None)


def start(*argv, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, argv)], env=environment, text=True, **options)


def test_a_reader_that_has_gone_is_no_error(src, tmp_path):
    process = start("import", src, tmp_path / "new", "--dry-run", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `head` does
    assert (process.stderr.read(), process.wait()) == ("", 0)


def test_help_shows_examples_of_both_commands():
    for command in ([], ["import"], ["export"]):
        process = start(*command, "--help", stdout=subprocess.PIPE)
        shown = process.communicate()[0]
        assert process.returncode == 0
        assert "convert.py import deepseek-ai/DeepSeek-V2-Lite" in shown
        assert "convert.py export runs/mine" in shown


STOPPING = """
import signal, sys, time
from dsv2_jax.hf import journal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have it ignored
add, left = journal.Journal.add, int(sys.argv.pop(1))

def stopping(self, entry):
    global left
    add(self, entry)
    left -= "entry" in entry  # the first line is no tensor
    if not left:
        print("now", flush=True)
        time.sleep(60)

journal.Journal.add = stopping
import common, convert
common.keep_memory = lambda: None  # it starts the script anew
common.run(convert.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_import_goes_on(src, tmp_path, signal_number):
    """Three times in the middle of its work, then left alone."""
    ours = tmp_path / "ours"
    environment = os.environ | {"PYTHONPATH": f"{SCRIPT.parents[1]}{os.pathsep}{SCRIPT.parent}"}
    for count in 1, 30, 7:
        command = [sys.executable, "-c", STOPPING, str(count), "import", str(src), str(ours)]
        process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert "now\n" in process.stdout  # after what it says of missing sums
        process.send_signal(signal_number)
        stdout, stderr = process.communicate()
        assert process.returncode == (-9 if signal_number == signal.SIGKILL else 130), stderr
        assert ("the same command goes on from here" in stdout) == (signal_number == signal.SIGINT)
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            checkpoint.load_config(ours)
    assert (ours / "import.journal").read_text().count('"entry"') == 38
    assert start("import", src, ours).wait() == 0
    assert start("export", ours, tmp_path / "back").wait() == 0
    one, two = Folder(src), Folder(tmp_path / "back")
    assert all(one.read(key).tobytes() == two.read(key).tobytes() for key in one.keys())  # noqa: SIM118
