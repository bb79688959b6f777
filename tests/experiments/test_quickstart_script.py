"""The two scripts that train, as a user starts them: on few, short files of one's own, again, and further."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import quickstart

import common
from dsv2_jax.checkpoint import load_config
from dsv2_jax.data.packing import pack, to_batch
from dsv2_jax.train.metrics import read_rows

EXPERIMENTS = pathlib.Path(common.__file__).parent
SMALL = ("--config.train.sequence_length=32", "--config.train.batch_size=2", "--config.model.layers=2")


def start(script: str, *arguments, devices: int | None = 1) -> subprocess.CompletedProcess:
    """devices: of the CPU; None leaves them to the script."""
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent), "JAX_NUM_CPU_DEVICES": str(devices)}
    if devices is None:
        del environment["JAX_NUM_CPU_DEVICES"]
    command = [sys.executable, EXPERIMENTS / script, *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def write(folder: pathlib.Path, files: int, words: int) -> str:
    """The --data flag of so many files of so many words."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i in range(files):
        (folder / f"{i}.txt").write_text(
            " ".join(rng.choice(["the", "latent", "cache", "holds", "a", "few", "of", "us"], words))
        )
    return f"--data={folder}/*.txt"


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_shown(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("goes on:\n") == 3
    assert "held-out bits per byte: " in done.stdout
    assert "a unigram model's:  " in done.stdout


@pytest.mark.slow
def test_quickstart_on_files_of_ones_own_from_start_to_a_longer_run(tmp_path):
    folder, data = tmp_path / "run", write(tmp_path / "text", files=20, words=40)
    assert_shown(start("quickstart.py", data, f"--workdir={folder}", "--steps=3"))
    for name in ("loss.png", "expert_load.png", "config.json", "report.html", "metrics.jsonl", "data/tokenizer.json"):
        assert (folder / name).stat().st_size > 100
    assert (folder / "checkpoints" / "3").is_dir()
    assert list((folder / "tensorboard").iterdir())
    assert load_config(folder)["data"]["virtual_shards"] == 1
    assert load_config(folder)["model"]["layers"] == 2

    before = contents(folder)
    again = start("quickstart.py", data, f"--workdir={folder}", "--steps=3")
    assert again.returncode == 0, again.stderr
    assert "this run is complete (3 steps)" in again.stdout
    assert f"Its report: {folder / 'report.html'}" in again.stdout
    assert contents(folder) == before

    further = start("quickstart.py", data, f"--workdir={folder}", "--steps=5", devices=None)  # a core for each row
    assert "resuming after step 3 of 5" in further.stdout
    assert_shown(further)
    assert read_rows(folder)[-1]["step"] == 5
    assert (folder / "checkpoints" / "5").is_dir()


@pytest.mark.slow
def test_quickstart_says_what_one_document_lacks_and_learns_six_short_ones_in_the_same_folder(tmp_path):
    text, where = tmp_path / "text", f"--workdir={tmp_path / 'run'}"
    one = start("quickstart.py", write(text, files=1, words=9), where, "--steps=1")
    assert one.returncode == 1
    assert one.stderr.splitlines()[-1].startswith("quickstart.py: error: source 'data': no train document (1 records")
    assert one.stderr.endswith("give it more text\n")
    assert "Traceback" not in one.stderr
    assert_shown(start("quickstart.py", write(text, files=6, words=9), where, "--steps=1"))


@pytest.mark.slow
def test_pretrain_goes_on_where_it_stopped_and_on_a_mesh(tmp_path):
    folder, data = tmp_path / "run", write(tmp_path / "text", files=20, words=40)
    data = data.replace("--data", "--config.data.sources.0.paths")
    flags = [f"--config={EXPERIMENTS / 'configs' / 'quickstart.py'}", data, "--config.data.virtual_shards=2"]
    flags += [f"--workdir={folder}"]
    first = start("pretrain.py", *flags, "--config.train.steps=2")
    assert first.returncode == 0, first.stderr
    second = start("pretrain.py", *flags, "--config.train.steps=4", "--config.mesh=fsdp=2", devices=2)
    assert second.returncode == 0, second.stderr
    assert "resuming after step 2 of 4" in second.stdout
    assert f"report: {folder / 'report.html'}" in second.stdout
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4"]
    assert load_config(folder)["mesh"] == "fsdp=2"


@pytest.mark.parametrize(
    ("lengths", "prompts"),
    [
        ([9, 8, 9], [4, 4, 4]),  # half of each, no more than 4 tokens
        ([3, 9], [4, 1, 4]),  # the longest first, then again
        ([2], [1, 1, 1]),
        ([], [1, 1, 1]),
    ],
)
def test_three_prompts_of_any_documents(lengths, prompts):
    bos, eos = 7, 8
    documents = [np.array([bos, *range(10 * i + 20, 10 * i + 18 + length), eos]) for i, length in enumerate(lengths)]
    batches = [to_batch([row_4T], np.ones(99, np.int32)) for row_4T, _, _ in pack(documents, 32)]
    found = quickstart.choose_prompts(batches, bos, 4)
    assert [len(prompt) for prompt in found] == prompts
    assert all(prompt[0] == bos and prompt.count(bos) == 1 and eos not in prompt for prompt in found)
