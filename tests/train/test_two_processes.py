"""Two real processes over jax.distributed: the losses of one, an end when one dies, and a restart that goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_training
import two_processes

from dsv2_jax import checkpoint
from dsv2_jax.train.loop import train
from dsv2_jax.train.metrics import read_rows

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def launch(folder: Path, mesh: str, steps: int, *flags: str, devices: int = 1) -> subprocess.CompletedProcess:
    paths = [ROOT, ROOT / "tests", ROOT / "experiments"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    launcher = [sys.executable, ROOT / "experiments/launch/local.py", "--processes=2", f"--cpu_devices={devices}", "--"]
    program = [sys.executable, ROOT / "tests/two_processes.py", folder, mesh, str(steps), "--heartbeat=10", *flags]
    return subprocess.run([*launcher, *program], env=environment, capture_output=True, text=True, timeout=300)


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(folder / "run") if "loss" in row}


def alone(folder: Path, steps: int = STEPS, mesh: str | None = None) -> dict[int, float]:
    train(two_processes.experiment(folder, mesh, steps), folder / "run", matmul_rate=1e9)
    return losses(folder)


def iterator(folder: Path, step: int) -> dict:
    return json.loads((folder / "run" / "checkpoints" / str(step) / "iterator" / "metadata").read_text())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """(folder with text, losses of one process, where it left the data)."""
    folder = tmp_path_factory.mktemp("one")
    small_training.write_text(folder)
    return folder, alone(folder), iterator(folder, STEPS)


def assert_together(found: dict[int, float], expected: dict[int, float]):
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


def test_one_of_two_dies_and_the_restart_goes_on_to_the_losses_of_one_process(text, tmp_path):
    one, expected, place = text
    shutil.copytree(one / "text", tmp_path / "text")
    died = launch(tmp_path, "fsdp=2", STEPS, f"--signal={signal.SIGKILL:d}")
    assert died.returncode == 1
    assert "process 1 of 2 was killed by SIGKILL; the job was ended. The same command goes on" in died.stderr
    # by its own message where a computation fails; where it waits for the other to save, JAX ends it
    ends = ("error: process 0 stopped, as another has ended or cannot be reached", "Task 1 heartbeat timeout")
    assert any(end in died.stderr for end in ends)
    again = launch(tmp_path, "fsdp=2", STEPS)
    assert again.returncode == 0, again.stderr
    resumed = re.findall(r"resuming after step (\d) of 6", again.stdout)
    assert resumed in (["2"], ["4"])  # the last one that was complete; only process 0 prints
    assert_together(losses(tmp_path), expected)
    assert iterator(tmp_path, STEPS) == place


@pytest.mark.slow
def test_a_run_moves_between_meshes_and_process_counts(text, tmp_path):
    """2 processes of 2 devices -> 1 process on 8 -> 2 processes of 1, against one device throughout."""
    one, _, _ = text
    shutil.copytree(one / "text", tmp_path / "text")
    first = launch(tmp_path, "data=2,fsdp=2", 2, devices=2)
    assert first.returncode == 0, first.stderr
    alone(tmp_path, 4, "fsdp=4,data=2")
    last = launch(tmp_path, "fsdp=2", STEPS)
    assert last.returncode == 0, last.stderr
    assert_together(losses(tmp_path), text[1])
    assert iterator(tmp_path, STEPS) == text[2]
    assert checkpoint.load_config(tmp_path / "run")["mesh"] == "fsdp=2"


@pytest.mark.slow
def test_a_row_shared_by_two_processes(text, tmp_path):
    """`tensor` over both processes: each reads every row."""
    shutil.copytree(text[0] / "text", tmp_path / "text")
    done = launch(tmp_path, "tensor=2", STEPS)
    assert done.returncode == 0, done.stderr
    assert_together(losses(tmp_path), text[1])
    assert iterator(tmp_path, STEPS) == text[2]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_both(text, tmp_path):
    shutil.copytree(text[0] / "text", tmp_path / "text")
    stopped = launch(tmp_path, "data=2", 12, f"--signal={signal.SIGTERM:d}")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("exit code 143") == 2
    step = int(re.search(r"stopped by a signal to another process after step (\d+)\.", stopped.stdout)[1])
    assert 5 <= step <= 7
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    assert list(losses(tmp_path)) == list(range(1, step + 1))
