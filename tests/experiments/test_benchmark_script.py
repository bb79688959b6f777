"""The benchmark prints one JSON line whose figures agree with each other."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import common

EXPERIMENTS = pathlib.Path(common.__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        (["train", "--batch=2", "--seq=16", "--layers=2"], 2 * 16),
        (["decode", "--batch=2", "--prompt=4", "--new=8"], 2),
        (["decode", "--batch=1", "--prompt=4", "--new=8"], 1),
    ],
    ids=["train", "decode", "decode one row"],
)
def test_one_json_line(arguments, tokens):
    command = [sys.executable, str(EXPERIMENTS / "benchmark.py"), *arguments, "--preset=tiny", "--repeats=1"]
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    assert figures["preset"] == "tiny"
    assert figures["dtype"] == ("float32" if tokens == 1 else common.dtype_of_cores("float32", 2))
    assert figures["layers"] == (2 if "train" in arguments else 3)
    assert figures["command"] == " ".join(["python", "experiments/benchmark.py", *command[2:]])
    assert figures["jax"] == jax.__version__
    assert {"date", "device", "jaxlib", "runtime"} <= figures.keys()
    assert figures["tokens_per_second"] * figures["median_step_seconds"] == pytest.approx(tokens)
    reached = figures["flops_per_token"] * figures["tokens_per_second"]
    assert figures["share_of_matmul_rate"] == pytest.approx(reached / figures["matmul_flops_per_second"])
    assert 0 < figures["share_of_matmul_rate"] < 1
