"""experiments/plan.py: one JSON object, a page, a ranking, and errors that name the remedy."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import plan
import pytest

import common
from dsv2_jax.config import ConfigError
from dsv2_jax.model import counting

EXPERIMENTS = pathlib.Path(common.__file__).parent
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
V2_ON_H800 = ["--preset=v2", "--topology=h800:8x16", "--mesh=fsdp=16,expert=8"]


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    for name in plan.ENVIRONMENT:  # the script sets them for itself
        monkeypatch.setenv(name, os.environ.get(name, ""))


def test_as_a_program_it_prints_one_json_object():
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(EXPERIMENTS / "plan.py"), *V2_ON_H800, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["compiled"] is False
    assert "plan compiles for TPUs only, not for h800" in made["not_compiled"]
    memory = made["memory"]
    assert memory["total_bytes_per_device"] == pytest.approx(sum(memory["categories"].values()))
    assert memory["categories"]["parameters"] == pytest.approx(4 * 235.7e9 / 128, rel=2e-3)
    assert made["tokens_per_step"] == 128 * 4096
    visible = {name: row["visible_seconds"] for name, row in made["transports"].items()}
    assert visible[made["cheaper_transport"]] == min(visible["stepwise"], visible["ragged"])
    slowest = max(made["seconds"].values())
    assert made["device_hours_per_trillion_tokens"] == pytest.approx(1e12 / (128 * 4096) * slowest * 128 / 3600)


@pytest.mark.parametrize(
    ("flags", "batch"),
    [([], "256 sequences of 2048 tokens, one"), (["--microbatches=3"], "768 sequences of 2048 tokens, 3")],
)
def test_a_page(capsys, flags, batch):
    plan.main([*V2_ON_H800, "--seq=2048", "--batch-per-device=2", "--remat=dots", *flags])
    page = capsys.readouterr().out
    for part in (
        f"{batch} microbatch",
        "DOES NOT FIT",
        "dispatch and combine",
        "cheaper here",
        "172,800",
    ):
        assert part in page


def test_a_page_says_which_flops_are_not_counted():
    from dsv2_jax import presets, sharding
    from dsv2_jax.planning import hardware, program
    from dsv2_jax.planning import plan as planning

    job = planning.Job(presets.get("v2_lite"), sharding.parse_mesh("fsdp=8"), length=4096)
    made = planning.make_plan(job, hardware.parse_topology("v5p:2x2x2"), compiling=False)

    def page(opaque):
        read = program.Program([], [(3e12, 2, "")], opaque, [])
        return plan.text(dataclasses.replace(made, compiled=planning.Compiled(1.0, {}, 1e9, 2e9, [], read, "")))

    assert re.search("in the compiled program +6.00\n", page({}))
    assert re.search(
        "compiled, outside of kernels +6.00\n +not counted, as no kernel tells its own: grouped_rows x52, splash x27\n",
        page({"splash": 27, "grouped_rows": 52}),
    )


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_is_planned_without_its_data(path, capsys):
    plan.main([f"--config={path}", "--topology=h100:8", "--mesh=fsdp=8", "--json"])
    made = json.loads(capsys.readouterr().out)
    model = common.load_config(path, model_only=True)
    parameters = 4 * counting.parameters(model).total / 8
    assert made["memory"]["categories"]["parameters"] == pytest.approx(parameters, rel=0.02)
    assert made["batch"] == 8
    assert made["microbatches"] == 1


def test_search_ranks_meshes(capsys):
    plan.main(["--preset=tiny", "--topology=h100:8", "--search"])
    page = capsys.readouterr().out
    assert page.startswith("mesh ")
    assert page.count("training step on h100:8") == 3


def test_decoding_counts_weights_and_cache_once(capsys):
    plan.main(["--preset=v2_lite", "--topology=h200:8", "--mesh=fsdp=8", "--decode", "--batch-per-device=64", "--json"])
    made = json.loads(capsys.readouterr().out)
    cache = 64 * 4096 * 27 * 576 * 2
    assert made["step"] == "decode"
    assert made["memory"]["categories"] == {"parameters": pytest.approx(2 * 15.7e9 / 8, rel=0.01), "cache": cache}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--preset=v2", "--topology=v9:2x2", "--mesh=fsdp=4"], "there are v4:4x4x8, v5e:4x8, v5p:4x4x8"),
        (["--preset=v2", "--topology=h800:8", "--mesh=fsdp=4"], "takes 4 devices and there are 8"),
        (["--preset=v2", "--topology=h800:8", "--mesh=fsdp=8", "--seq=8192"], "max_length=4096"),
        (
            [f"--config={EXPERIMENTS / 'configs/v2.py'}", "--topology=h800:8", "--mesh=fsdp=8", "--config.mesh=data=8"],
            "--config.mesh: a plan takes its mesh from --mesh=AXES",
        ),
    ],
)
def test_errors_name_the_remedy(arguments, complaint):
    with pytest.raises(ConfigError, match=complaint):
        plan.main(arguments)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "give either --mesh=... or --search"),
        (["--mesh=fsdp=8", "--microbatches=0"], "--microbatches must be positive"),
        (["--mesh=fsdp=8", "--batch-per-device=0"], "--batch-per-device must be positive"),
        (["--mesh=fsdp=8", "--seq=0"], "--seq must be positive"),
        (["--mesh=fsdp=8", "--microbatches=2", "--decode"], "a decoding step has none"),
    ],
)
def test_flags_that_do_not_go_together(capsys, flags, complaint):
    with pytest.raises(SystemExit):
        plan.main(["--preset=v2", "--topology=h800:8", *flags])
    assert complaint in capsys.readouterr().err


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e \"\.\[tpu\]\""):
        plan.main(["--preset=tiny", "--topology=v5p:2x2x1", "--mesh=fsdp=4"])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason='needs libtpu: pip install -e ".[tpu]"')
@pytest.mark.parametrize("step", [[], ["--decode"]])
def test_a_compiled_plan_tells_what_is_sent(capsys, step):
    plan.main(["--preset=tiny", "--topology=v5p:2x2x1", "--mesh=fsdp=4", "--seq=256", "--json", *step])
    made = json.loads(capsys.readouterr().out)
    assert made["compiled"]
    assert made["collectives"]["by_kind"]["all-gather"]["wire_bytes"] > 0
    assert made["memory"]["fits"]
    memory = made["memory"]
    assert 0.99 * memory["total_bytes_per_device"] < memory["placed_bytes_per_device"]
    assert memory["placed_bytes_per_device"] <= memory["bound_bytes_per_device"]
    assert made["memory"]["largest_temporaries"][0]["bytes"] > 0
    assert made["compile_seconds"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason='needs libtpu: pip install -e ".[tpu]"')
def test_a_decoding_step_of_lite_is_planned_where_experts_are_shared(capsys):
    plan.main(["--preset=v2_lite", "--topology=v5p:2x2x2", "--mesh=expert=8", "--seq=1024", "--json", "--decode"])
    made = json.loads(capsys.readouterr().out)
    memory, kinds = made["memory"]["categories"], made["collectives"]["by_kind"]
    assert memory["parameters"] == pytest.approx(2 * 15.7e9 / 8, rel=0.01)
    assert memory["cache"] == pytest.approx(1024 * 27 * 576 * 2, rel=1e-4)
    assert made["memory"]["fits"]
    assert kinds["collective-permute"]["count"] == 2 * 7 * 26  # rows to experts and back, in every MoE layer
    assert any("paged_latent_attention" in name for name in made["flops"]["unseen_kernels"])
    assert any("grouped_rows" in name for name in made["flops"]["unseen_kernels"])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason='needs libtpu: pip install -e ".[tpu]"')
def test_a_search_compiles_the_best_three(capsys):
    plan.main(["--preset=tiny", "--topology=v5p:2x2x1", "--search", "--seq=256", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert [one["mesh"] for one in made["best"]] == [one["mesh"] for one in made["ranked"][:3]]
    assert all(one["compiled"] for one in made["best"])
    assert not any(one["compiled"] for one in made["ranked"])
