"""The command lines: configs load, overrides apply, mistakes end with one clear line and exit code 2."""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pretrain
import pytest
import small_training
from jax.sharding import AbstractMesh

import common
from dsv2_jax import config_io, presets, sharding
from dsv2_jax.config import ConfigError, DroppingConfig
from dsv2_jax.planning import hardware
from dsv2_jax.train import loop, optimizer

EXPERIMENTS = pathlib.Path(common.__file__).parent
CONFIGS = sorted((EXPERIMENTS / "configs").glob("*.py"))
LARGE = [EXPERIMENTS / "configs" / f"{name}.py" for name in ("v2", "v2_lite", "dense_67b")]
QUICK = EXPERIMENTS / "configs" / "quickstart.py"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXPERIMENTS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(EXPERIMENTS.parent)})


def arguments(*argv: str) -> argparse.Namespace:
    parser = common.argument_parser("What it does.", "python x.py --workdir=y")
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    return common.parse_arguments(parser, list(argv))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_states_its_source_and_survives_json(path, tmp_path):
    experiment = common.load_config(path, [("data.sources.0.paths", "x")])
    expected = presets.get({"quickstart": "tiny"}.get(path.stem, path.stem))
    if path.stem == "v2":  # the report trains it with dropping
        dropping = DroppingConfig(capacity_factor=1.0, protected_share=0.1)
        expected = dataclasses.replace(expected, moe=dataclasses.replace(expected.moe, dropping=dropping))
    assert experiment.model == expected
    text = path.read_text()
    assert "Source:" in text
    assert "Expected" in text
    (tmp_path / "config.json").write_text(config_io.to_json(experiment))
    assert common.load_config(tmp_path / "config.json") == experiment


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_mesh_that_a_large_config_names_can_run_it(path):
    topology, text = re.search(r"(v5p:\w+) with --config\.mesh=([\w=,]+)", path.read_text()).groups()
    config = common.load_config(path, [("data.sources.0.paths", "x"), ("mesh", text)])
    shape = sharding.parse_mesh(config.mesh).resolve(hardware.parse_topology(topology).devices)
    mesh = AbstractMesh(shape.sizes, sharding.MESH_AXES)
    length = config.train.sequence_length
    for size in optimizer.batch_schedule(config.train).size:
        assert size % config.train.microbatch_size == 0
    sharding.check_mesh(mesh, config.model, batch_size=config.train.microbatch_size, sequence_length=length)


@pytest.mark.parametrize(
    ("name", "tokens", "peak", "batches", "decay"),
    [
        ("v2", 8.1e12, 2.4e-4, (2304, 4608, 6912, 9216), (0.6, 0.9)),
        ("v2_lite", 5.7e12, 4.2e-4, (4608,), (0.8, 0.9)),
        ("dense_67b", 2.0e12, 3.2e-4, (4608,), (0.8, 0.9)),
    ],
)
def test_the_recipes_of_the_report(name, tokens, peak, batches, decay):
    train = common.load_config(EXPERIMENTS / "configs" / f"{name}.py", [("data.sources.0.paths", "x")]).train
    schedule = optimizer.batch_schedule(train)
    assert optimizer.total_sequences(train) * train.sequence_length == pytest.approx(tokens, rel=1e-4)
    assert schedule.size == batches
    assert schedule.first_sequence[-1] * train.sequence_length == pytest.approx(225e9 if name == "v2" else 0, rel=1e-4)
    rate, adam = optimizer.learning_rate(train), train.optimizer
    assert (adam.peak_lr, adam.decay_at, adam.warmup_steps) == (peak, decay, 2000)
    assert (adam.b1, adam.b2, adam.weight_decay, adam.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    last = optimizer.total_sequences(train) - batches[-1]
    assert float(rate(last, batches[-1])) == pytest.approx(peak * 0.316**2, rel=1e-5)


def test_the_data_of_a_large_config_must_be_named():
    with pytest.raises(ConfigError, match=r"^data.sources.0.paths=\(\): must name .* --config.data.sources.0.paths="):
        common.load_config(EXPERIMENTS / "configs" / "v2.py")


@pytest.mark.parametrize(
    ("flags", "step", "code"),
    [
        (["--distributed"], 799, 143),
        (["--distributed"], 800, 0),
        (["--coordinator=a:1", "--processes=2", "--process=0"], 1, 143),
        ([], 799, 0),
    ],
)
def test_a_job_that_a_signal_stopped_does_not_count_as_finished(flags, step, code):
    config = common.load_config(QUICK)
    found = pretrain.parse([f"--config={QUICK}", "--workdir=w", *flags])
    assert common.exit_code(found, config, {"step": step}) == code


def test_overrides_are_collected_in_order():
    got = arguments(
        "--config=c.py", "--config.train.steps=1", "--workdir=w", "--config.a.b=x=y", "--config.train.steps=2"
    )
    assert got.overrides == [("train.steps", "1"), ("a.b", "x=y"), ("train.steps", "2")]
    experiment = common.load_config(QUICK, [("train.steps", "1"), ("train.steps", "2")])
    assert experiment.train.steps == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdr=x"], "unknown argument '--workdr=x'; did you mean --workdir?"),
        (["--work=x"], "did you mean --workdir?"),
        (["--config.train.steps"], "--config.train.steps has no value: write --config.train.steps=VALUE"),
        (["more"], "unknown argument 'more'"),
    ],
)
def test_unknown_flags_suggest_the_nearest(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        arguments(*argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("quikstart.py", None, "there is no such file; did you mean .*quickstart.py"),
        ("a.py", "x = 1", r"has no function get_config\(\)"),
        ("a.json", "{", "is not JSON"),
        ("a.txt", "", "must be a .py or .json file"),
        ("a.json", json.dumps({"modle": {}}), "modle: is not a field of ExperimentConfig; did you mean model"),
        ("a.json", "[]", r"config=\[\]: must be a section \(ExperimentConfig\)"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path, file, text, message):
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        common.load_config(tmp_path / file)


def test_a_mistyped_key_ends_the_trainer_with_one_line(tmp_path):
    done = run(
        "pretrain.py", f"--config={QUICK}", f"--workdir={tmp_path / 'run'}", "--config.train.optimizer.peak_rl=1"
    )
    assert done.returncode == 2
    suggestion = "is not a field of OptimizerConfig; did you mean train.optimizer.peak_lr?"
    assert done.stderr == f"pretrain.py: error: train.optimizer.peak_rl: {suggestion}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in EXPERIMENTS.glob("*.py") if path.name != "common.py"))
def test_help_says_what_the_script_does_its_flags_and_an_example(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"python experiments/{script}" in done.stdout
    assert "options:" in done.stdout
    assert len(done.stdout.splitlines()) > 8


def test_damaged_data_and_a_full_disk_end_a_run_with_one_line(tmp_path, monkeypatch):
    small_training.write_text(tmp_path)
    config = small_training.text_experiment(tmp_path)
    loop.open_data(config, tmp_path / "run").rows.close()
    file = tmp_path / "run" / "data" / "text" / "train-00001-of-00002.arrayrecord"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SystemExit, match=f"error: {file} is truncated or no ArrayRecord file .*prepare the data again"):
        common.train(config, str(tmp_path / "run"))

    def fail(config, workdir, mesh):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(SystemExit, match=r"error: .*No space left on device: 'metrics\.jsonl'$"):
        common.train(config, str(tmp_path / "run"))


SHOW = """\
import sys
sys.path.insert(0, {folder!r})
import common
common.keep_memory()
common.use_compilation_cache()
import jax
print(sys.stdout.write_through, sys.flags.dev_mode, sys.argv[1:], jax.config.jax_compilation_cache_dir)
"""


def show(tmp_path, *options: str, **environment: str) -> str:
    (tmp_path / "show.py").write_text(SHOW.format(folder=str(EXPERIMENTS)))
    command = [sys.executable, *options, str(tmp_path / "show.py"), "--a=b c"]
    environment = {"PYTHONPATH": str(EXPERIMENTS.parent), "HOME": "/home/x", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()


def test_a_script_keeps_pythons_own_options_when_it_starts_again(tmp_path):
    cache = "/home/x/.cache/dsv2_jax/xla"
    assert show(tmp_path) == f"False False ['--a=b c'] {cache}"
    assert show(tmp_path, "-u", "-X", "dev") == f"True True ['--a=b c'] {cache}"


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/dsv2_jax/xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine", "XDG_CACHE_HOME": "/x"}, "/mine"),
    ],
)
def test_compiled_programs_are_kept_where_the_user_says(tmp_path, environment, cache):
    assert show(tmp_path, **environment).endswith(f" {cache}")


def test_describe_prints_the_figures_of_the_report():
    printed = run("describe.py", "--preset=v2").stdout
    for figure in ("235.74 B", "20.85 B", "21.38 B", "34,560", "194,560", "93.3% less", "155.31 GFLOP"):
        assert figure in printed


def test_describe_takes_a_config_and_its_overrides():
    changed = run("describe.py", f"--config={QUICK}", "--config.model.layers=6")
    assert "6 layers" in changed.stdout
    refused = run("describe.py", "--preset=tiny", "--config.model.layers=6")
    assert refused.returncode == 2
    assert "needs a --config=FILE" in refused.stderr
    assert presets.get("tiny").layers != 6
