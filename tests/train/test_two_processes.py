"""Two real processes over jax.distributed: the losses of one, an end when one dies, and a restart that goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
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


def alone(folder: Path, steps: int = STEPS, mesh: str | None = None, moe: bool = False) -> dict[int, float]:
    train(two_processes.experiment(folder, mesh, steps, moe), folder / "run", matmul_rate=1e9)
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


def killed(folder: Path, which: int) -> str:
    """What the launcher says of a run whose process `which` is killed; it ends within a minute (the issue's words)."""
    died = launch(folder, "fsdp=2", STEPS, f"--signal={signal.SIGKILL:d}", f"--to={which}")
    ended = time.time()
    assert died.returncode == 1
    expected = f"process {which} of 2 was killed by SIGKILL; the job was ended. The same command goes on"
    assert expected in died.stderr
    assert ended - float((folder / "signalled").read_text()) < 60
    return died.stderr


@pytest.mark.slow
def test_one_of_two_dies_and_the_restart_goes_on_to_the_losses_of_one_process(text, tmp_path):
    one, expected, place = text
    shutil.copytree(one / "text", tmp_path / "text")
    said = killed(tmp_path, 1)
    # by its own message where a computation fails; where it waits for the other to save, JAX ends it
    ends = ("error: process 0 stopped, as another has ended or cannot be reached", "Task 1 heartbeat timeout")
    assert any(end in said for end in ends)
    again = launch(tmp_path, "fsdp=2", STEPS)
    assert again.returncode == 0, again.stderr
    resumed = re.findall(r"resuming after step (\d) of 6", again.stdout)
    assert resumed in (["2"], ["4"])  # the last one that was complete; only process 0 prints
    assert_together(losses(tmp_path), expected)
    assert iterator(tmp_path, STEPS) == place


@pytest.mark.slow
def test_the_first_of_two_dies_and_the_restart_is_bit_for_bit_a_run_of_two_that_was_left_alone(text, tmp_path):
    """Process 0 is the one that all others ask who is there."""
    for name in ("killed", "whole"):
        shutil.copytree(text[0] / "text", tmp_path / name / "text")
    killed(tmp_path / "killed", 0)
    for name in ("killed", "whole"):
        done = launch(tmp_path / name, "fsdp=2", STEPS)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_what_only_one_process_cannot_read_is_damaged_for_both(text, tmp_path):
    shutil.copytree(text[0] / "text", tmp_path / "text")
    first = launch(tmp_path, "fsdp=2", 4)
    assert first.returncode == 0, first.stderr
    parts = list((tmp_path / "run/checkpoints/4/params/ocdbt.process_1").glob("d/*"))  # written and read by process 1
    assert parts
    for path in parts:
        os.truncate(path, path.stat().st_size // 2)
    again = launch(tmp_path, "fsdp=2", STEPS)
    assert again.returncode == 0, again.stderr
    assert "checkpoints/4 is damaged (damaged as another process reads it); using step 2" in again.stdout
    assert "resuming after step 2 of 6" in again.stdout
    assert_together(losses(tmp_path), text[1])


@pytest.fixture(scope="module")
def rows_of_experts(text, tmp_path_factory):
    """What one process writes of a model with experts."""
    folder = tmp_path_factory.mktemp("experts")
    shutil.copytree(text[0] / "text", folder / "text")
    alone(folder, moe=True)
    return [row for row in read_rows(folder / "run") if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["expert=2", "fsdp=2"])
def test_experts_in_two_processes(text, rows_of_experts, tmp_path, mesh):
    shutil.copytree(text[0] / "text", tmp_path / "text")
    done = launch(tmp_path, mesh, STEPS, "--moe")
    assert done.returncode == 0, done.stderr
    found = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for name in ("loss", "balance/expert", "dropped_share"):
        expected = [row[name] for row in rows_of_experts]
        np.testing.assert_allclose([row[name] for row in found], expected, rtol=1e-4, err_msg=name)
    assert min(row["dropped_share"] for row in found) > 0
    assert (max(row["crossed_per_token"] for row in found) > 0) == (mesh == "expert=2")


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
