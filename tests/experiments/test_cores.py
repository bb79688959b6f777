"""A script takes as many cores of a CPU as share its rows, or its weights, unless the user names the devices.

And the benchmark the dtype that they multiply fastest.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from quick import quick

import common

EXPERIMENTS = pathlib.Path(common.__file__).parent
CORES = """\
import dataclasses, os, sys
os.sched_getaffinity = lambda _: set(range(int(sys.argv[1])))
import common
config = common.load_config(sys.argv[2], [field.split("=", 1) for field in sys.argv[3:]])
mesh = common.mesh_of_cores(config)
import jax
print(mesh and mesh.shape["data"], jax.device_count())
"""
DECODING = """\
import dataclasses, json, os, sys
os.sched_getaffinity = lambda _: set(range(int(sys.argv[1])))
import common
from dsv2_jax import presets
model = dataclasses.replace(presets.get("peer_tiny"), **json.loads(sys.argv[3]))
mesh = common.mesh_to_decode(model, int(sys.argv[2]))
import jax
print(mesh and mesh.shape["tensor"], jax.device_count())
"""


def run(program, *arguments, environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    paths = os.pathsep.join([str(EXPERIMENTS), str(EXPERIMENTS.parent)])
    environment = inherited | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("cores", "rows", "fields", "environment", "found"),
    quick(
        [
            (3, 8, [], {}, "2 2"),  # batches of 8 rows are not shared by three evenly
            (3, 9, ["train.microbatch_size=3"], {}, "3 3"),
            (3, 7, [], {}, "None 1"),
            (3, 8, ["mesh=data=1"], {}, "None 1"),
            (3, 8, [], {"JAX_NUM_CPU_DEVICES": "1"}, "None 1"),
            (3, 8, [], {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, "None 4"),
            (8, 8, ["model.vocab_size=300000"], {}, "4 4"),  # of 0.9 GB each, 4 GiB hold four
        ],
        (3, 8, [], {}, "2 2"),
        (3, 8, [], {"JAX_NUM_CPU_DEVICES": "1"}, "None 1"),
    ),
)
def test_devices_are_cores_that_share_the_rows(cores, rows, fields, environment, found):
    config = EXPERIMENTS / "configs" / "quickstart.py"
    done = run(CORES, str(cores), str(config), f"train.batch_size={rows}", *fields, environment=environment)
    assert done.stdout.strip() == found, done.stderr


@pytest.mark.parametrize(
    ("cores", "rows", "changes", "environment", "found"),
    quick(
        [
            (3, 2, {}, {}, "2 2"),  # eight heads are not shared by three evenly
            (3, 2, {"dense_width": 1025}, {}, "None 1"),
            (3, 2, {}, {"JAX_NUM_CPU_DEVICES": "1"}, "None 1"),
            (64, 2, {}, {}, "8 8"),
            (3, 1, {"dense_width": 2**20}, {}, "2 2"),  # of 3 GB read a step, half a core's time is more than the waits
            (3, 1, {"layers": 2, "vocab_size": 64, "dense_width": 64}, {}, "None 1"),  # of 4 MB it is less
        ],
        (3, 2, {}, {}, "2 2"),
    ),
)
def test_cores_that_decode_share_the_weights(cores, rows, changes, environment, found):
    done = run(DECODING, str(cores), str(rows), json.dumps(changes), environment=environment)
    assert done.stdout.strip() == found, done.stderr


def test_cores_that_multiply_bfloat16_faster_do(tmp_path, monkeypatch):
    for flags, found in (
        ("avx512f avx512_bf16 avx512_fp16", "bfloat16"),
        ("avx2 avx512f", "float32"),
        (None, "float32"),
    ):
        monkeypatch.setattr(common, "CPUINFO", tmp_path / "cpuinfo" if flags else tmp_path / "none")
        (tmp_path / "cpuinfo").write_text(f"model name: one\nflags\t\t: fpu {flags} vme\n")
        assert common.dtype_of_cores("float32", 2) == found
        assert common.dtype_of_cores("float32", 1) == "float32"
        assert common.dtype_of_cores("bfloat16", 1) == "bfloat16"
    monkeypatch.setattr(common, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx512_bf16\n")
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert common.dtype_of_cores("float32", 2) == "float32"
