"""The local launcher, with children that need no JAX; the templates, as text."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"


def start(*flags: str, code: str) -> subprocess.Popen:
    command = [sys.executable, LAUNCH / "local.py", *flags, "--", sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_every_process_is_told_which_it_is():
    code = "import os, sys; sys.stdout.write(' '.join([*sys.argv[1:], os.environ['JAX_NUM_CPU_DEVICES']]) + '\\n')"
    job = start("--processes=3", "--cpu_devices=2", code=code)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    told = [line.split() for line in out.splitlines()]
    assert sorted(words[1:] for words in told) == [["--processes=3", f"--process={i}", "2"] for i in range(3)]
    assert len({words[0] for words in told}) == 1
    assert told[0][0].startswith("--coordinator=localhost:")


@pytest.mark.parametrize(
    ("end", "how"),
    [("os.kill(os.getpid(), 9)", "was killed by SIGKILL"), ("sys.exit(3)", "ended with exit code 3")],
)
def test_the_job_ends_when_one_process_does(end, how):
    code = f"import os, sys, time\nif '--process=1' in sys.argv: {end}\ntime.sleep(100)"
    job = start("--processes=2", "--grace=0.3", code=code)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 1
    assert f"process 1 of 2 {how}; the job was ended. The same command goes on from its last checkpoint." in error


@pytest.mark.parametrize("end", ["os.abort()", "sys.exit(1)"])
def test_the_killed_process_is_named_though_another_ended_with_it(end):
    code = f"import os, sys\nif '--process=1' in sys.argv: os.kill(os.getpid(), 9)\n{end}"
    _, error = start("--processes=2", code=code).communicate(timeout=60)
    assert "process 1 of 2 was killed by SIGKILL" in error


def test_a_signal_reaches_all(tmp_path):
    code = (
        "import signal, sys, time, pathlib\n"
        f"place = pathlib.Path({str(tmp_path)!r}) / sys.argv[-1][-1]\n"
        "signal.signal(signal.SIGTERM, lambda *_: (place.with_suffix('.saved').touch(), sys.exit(0)))\n"
        "place.touch()\ntime.sleep(100)"
    )
    job = start("--processes=2", code=code)
    while not all((tmp_path / name).exists() for name in "01"):
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 0
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["0.saved", "1.saved"]


def test_a_command_is_needed():
    job = subprocess.run([sys.executable, LAUNCH / "local.py", "--processes=2"], capture_output=True, text=True)
    assert job.returncode == 2
    assert "write the command after --" in job.stderr


@pytest.mark.parametrize("name", ["slurm.sbatch", "gke_jobset.yaml", "sky.yaml"])
def test_templates_use_flags_and_files_that_exist(name):
    text = (LAUNCH / name).read_text()
    root = LAUNCH.parents[1]
    scripts = {
        word for word in text.replace('"', " ").split() if word.startswith("experiments/") and word.endswith(".py")
    }
    configs = {word.split("=", 1)[1] for word in text.split() if word.startswith("--config=experiments")}
    assert scripts
    assert all((root / path).is_file() for path in scripts | configs)
    environment = os.environ | {"PYTHONPATH": str(root)}
    pretrain = [sys.executable, root / "experiments/pretrain.py", "--help"]
    usage = subprocess.run(pretrain, capture_output=True, text=True, env=environment).stdout
    flags = {word.split("=")[0].strip('"\\') for word in text.split() if word.startswith("--")}
    ours = flags & {
        "--distributed",
        "--coordinator",
        "--processes",
        "--process",
        "--heartbeat",
        "--config",
        "--workdir",
    }
    assert "--workdir" in ours
    assert all(flag in usage for flag in ours)
