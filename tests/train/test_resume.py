import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_training

from dsv2_jax.train.metrics import read_rows

STEPS = 24
PROGRAM = [sys.executable, small_training.__file__]
NUMBERS = ("loss", "gradient_norm", "learning_rate", "held_out/bits_per_byte")


def start(folder: Path, steps: int = STEPS) -> subprocess.Popen:
    """The training as a process of its own: killing it takes its checkpointing threads with it."""
    paths = [str(Path(small_training.__file__).parent), str(Path(small_training.__file__).parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_NUM_CPU_DEVICES": "1"}
    output = (folder / "output.txt").open("a")
    return subprocess.Popen([*PROGRAM, str(folder), str(steps)], env=environment, stdout=output, stderr=output)


def numbers(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k in ("step", *NUMBERS)} for row in read_rows(folder / "run")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    small_training.write_text(folder)
    process = start(folder)
    assert process.wait() == 0, (folder / "output.txt").read_text()
    rows = numbers(folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    return rows


def wait_for(folder: Path, process: subprocess.Popen, row: int, saving: bool) -> None:
    """Until the run has written `row` rows, and, if asked, is writing a checkpoint; or has ended."""
    metrics, checkpoints = folder / "run" / "metrics.jsonl", folder / "run" / "checkpoints"
    while process.poll() is None:
        enough = metrics.exists() and metrics.read_bytes().count(b"\n") >= row
        if enough and (not saving or any("tmp" in path.name for path in checkpoints.glob("*"))):
            return
        time.sleep(0.001)


def kill_until_done(folder: Path, kills: int, seed: int) -> None:
    """Runs the training to its end, killed `kills` times with SIGKILL at random moments, every second in a save."""
    draw, killed = random.Random(seed), 0
    for kill in range(kills):
        process = start(folder)
        wait_for(folder, process, row=1 + STEPS * (kill + 1) // (kills + 1), saving=kill % 2 == 0)
        time.sleep(draw.uniform(0, 0.01 if kill % 2 == 0 else 0.1))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= kills - 1  # the last may come when the run has just ended
    process = start(folder)
    assert process.wait() == 0, (folder / "output.txt").read_text()


def check(folder: Path, uninterrupted: list[dict], kills: int, seed: int) -> None:
    small_training.write_text(folder)
    kill_until_done(folder, kills, seed)
    assert "resuming after step" in (folder / "output.txt").read_text()
    assert numbers(folder) == uninterrupted


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    check(tmp_path, uninterrupted, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_run_killed_many_times_resumes_bit_for_bit(uninterrupted, tmp_path, seed):
    check(tmp_path, uninterrupted, kills=8, seed=seed)


@pytest.mark.slow  # test_loop.py sends the signal inside one process
def test_sigterm_saves_and_the_run_goes_on(uninterrupted, tmp_path):
    small_training.write_text(tmp_path)
    process = start(tmp_path)
    wait_for(tmp_path, process, row=6, saving=False)
    process.terminate()
    assert process.wait() == 0
    output = (tmp_path / "output.txt").read_text()
    assert "stopped by SIGTERM after step" in output
    assert "The same command goes on" in output
    assert len(numbers(tmp_path)) < len(uninterrupted)
    assert start(tmp_path).wait() == 0
    assert numbers(tmp_path) == uninterrupted
