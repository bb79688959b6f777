"""The local launcher, with children that need no JAX; the templates: what they start, and what JAX makes of Slurm."""

import argparse
import math
import os
import re
import shlex
import signal
import socket
import string
import subprocess
import sys
import time
from pathlib import Path

import pretrain
import pytest
import yaml
from jax.sharding import AbstractMesh

import common
from dsv2_jax import sharding
from dsv2_jax.config import ConfigError

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


def test_the_same_command_is_not_advised_where_it_is_wrong():
    job = start("--processes=2", "--grace=0.3", code="import sys; sys.exit(2)")
    _, error = job.communicate(timeout=60)
    assert job.returncode == 1
    assert error.endswith("ended with exit code 2; the job was ended.\n")


@pytest.mark.parametrize("end", ["os.abort()", "sys.exit(1)"])
def test_the_killed_process_is_named_though_another_ended_with_it(end):
    code = f"import os, sys\nif '--process=1' in sys.argv: os.kill(os.getpid(), 9)\n{end}"
    _, error = start("--processes=2", code=code).communicate(timeout=60)
    assert "process 1 of 2 was killed by SIGKILL" in error


@pytest.mark.parametrize("code", [0, 143])
def test_a_signal_reaches_all(tmp_path, code):
    code = (
        "import signal, sys, time, pathlib\n"
        f"place = pathlib.Path({str(tmp_path)!r}) / sys.argv[-1][-1]\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (place.with_suffix('.saved').touch(), sys.exit({code})))\n"
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


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--distributed", "--processes=2"], "leave out --coordinator, --processes, --process"),
        (["--processes=2", "--process=0"], r"missing: --coordinator$"),
    ],
)
def test_flags_of_processes_that_do_not_go_together(flags, complaint):
    parser = argparse.ArgumentParser()
    common.add_process_flags(parser)
    with pytest.raises(ConfigError, match=complaint):
        common.start_processes(parser.parse_args(flags))


def commands(name: str) -> list[list[str]]:
    """The words after experiments/pretrain.py, for every time a template starts it, its variables filled in."""
    text = re.sub(r" # <-.*", "", (LAUNCH / name).read_text())
    text = re.sub(r"\s*\\\n[ #]*", " ", text)  # lines that go on
    text = re.sub(r"\n +- (?=--)", " ", text)  # a list in YAML
    values = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    if name == "sky.yaml":
        values |= yaml.safe_load((LAUNCH / name).read_text())["envs"]
    found = []
    for line in re.findall(r"experiments/pretrain\.py (.*)", text):
        line = line[: line.rindex('"')] if line.count('"') % 2 else line  # inside of another command's quotes
        for submitted in re.findall(r"sbatch .*slurm\.sbatch (.*)", text):
            line = line.replace('"$@"', submitted)
        found.append(shlex.split(string.Template(line).safe_substitute(values), comments=True))
    return found


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("slurm.sbatch", [r"sbatch --nodes=(\d+)", r"--gpus-per-node=(\d+)"]),
        ("gke_jobset.yaml", [r"completions: (\d+)", r"google.com/tpu: (\d+)"]),
        ("sky.yaml", [r"num_nodes: (\d+)", r"accelerators: \w+:(\d+)"]),
    ],
)
def test_what_the_templates_start_is_a_run_that_fits_its_devices(name, counts, monkeypatch):
    monkeypatch.chdir(LAUNCH.parents[1])
    text = (LAUNCH / name).read_text()
    devices = math.prod(int(re.search(count, text)[1]) for count in counts)
    assert commands(name)
    for words in commands(name):
        flags = pretrain.parse(words)
        place = (flags.coordinator, flags.processes, flags.process)
        assert None not in place or (flags.distributed and place == (None,) * 3)
        config = common.load_config(flags.config, flags.overrides)
        shape = sharding.parse_mesh(config.mesh).resolve(devices)
        mesh = AbstractMesh(shape.sizes, sharding.MESH_AXES)
        batch, length = config.train.microbatch_size, config.train.sequence_length
        sharding.check_mesh(mesh, config.model, batch_size=batch, sequence_length=length)
        assert batch // devices <= 8  # what experiments/plan.py says fits
        hosts = int(re.search(counts[0], text)[1])
        assert config.data.virtual_shards % hosts == 0


def test_what_the_readme_starts_is_a_run(monkeypatch):
    monkeypatch.chdir(LAUNCH.parents[1])
    found = [pretrain.parse(words) for words in commands("../../README.md")]
    configs = [common.load_config(flags.config, flags.overrides) for flags in found]
    assert any(config.mesh for config in configs)
    for config in configs:
        shape = sharding.parse_mesh(config.mesh or "data=1")
        mesh, batch = AbstractMesh(shape.sizes, sharding.MESH_AXES), config.train.microbatch_size
        sharding.check_mesh(mesh, config.model, batch_size=batch, sequence_length=config.train.sequence_length)


@pytest.mark.parametrize("name", ["v2", "v2_lite", "dense_67b"])
def test_a_config_has_a_shard_for_every_process_of_the_chips_it_names(name):
    path = LAUNCH.parent / "configs" / f"{name}.py"
    sides = re.search(r"v5p:([\dx]+) ", path.read_text())[1].split("x")
    config = common.load_config(str(path), [("data.sources.0.paths", "unread")])
    most = max(math.prod(map(int, sides)), config.train.microbatch_size)  # one sequence a chip
    assert config.data.virtual_shards % (most // 4) == 0


def test_the_topology_of_the_jobset_has_its_chips():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    sides = re.search(r"tpu-topology: ([\dx]+)", text)[1].split("x")
    hosts = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert hosts["parallelism"] == hosts["completions"] == math.prod(map(int, sides)) // 4
    assert f"v5p-{2 * math.prod(map(int, sides))}" in text  # named by its cores


@pytest.mark.parametrize("name", ["slurm.sbatch", "sky.yaml"])
def test_the_shell_of_the_templates_parses(name):
    text = (LAUNCH / name).read_text()
    scripts = [text] if name == "slurm.sbatch" else [yaml.safe_load(text)[key] for key in ("setup", "run")]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert subprocess.run(["bash", "-n"], input=script + "\nif", text=True, capture_output=True).returncode


def test_what_gke_and_skypilot_cannot_do_without_is_there():
    """The fields that the JobSet API (v1alpha2) and SkyPilot require for what the templates promise."""
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z][a-z0-9-]*", jobset["metadata"]["name"])
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["name"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert {"name", "image", "command", "resources"} <= container.keys()
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    (workdir,) = [word for word in container["command"] if word.startswith("--workdir=")]
    assert workdir.startswith(f"--workdir={mounted['runs']}/")  # a run outlives its pods

    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert {"name", "num_nodes", "resources", "workdir", "envs", "volumes", "setup", "run"} <= task.keys()
    used = set(re.findall(r"\$(?!SKYPILOT)([A-Z]+)", task["run"]))
    assert used == task["envs"].keys()
    assert f'--workdir="{next(iter(task["volumes"]))}/$RUN"' in task["run"]


@pytest.mark.parametrize(("exporting", "visible"), [(True, "0,1,2,3"), (False, "0")])
def test_processes_find_each_other_through_slurm_and_see_all_devices_of_their_node(exporting, visible):
    """JAX takes one device a process from Slurm's variables, unless the template names them all."""
    exports = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("export JAX")]
    code = (
        "import common, argparse, jax\nparser = argparse.ArgumentParser()\ncommon.add_process_flags(parser)\n"
        "common.start_processes(parser.parse_args(['--distributed']))\n"
        "print(jax.process_index(), jax.process_count(), jax.config.read('jax_cuda_visible_devices'))"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{LAUNCH.parents[1]}:{LAUNCH.parent}", "JAX_PLATFORMS": "cpu"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    environment |= {"SLURM_GPUS_ON_NODE": "4", "JAX_COORDINATOR_PORT": str(port)}
    script = "\n".join([*(exports if exporting else []), 'exec "$0" -c "$1"'])
    children = [
        subprocess.Popen(
            ["bash", "-c", script, sys.executable, code],
            env=environment | {"SLURM_PROCID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    assert [child.communicate(timeout=120)[0].split() for child in children] == [[str(i), "2", visible] for i in (0, 1)]
