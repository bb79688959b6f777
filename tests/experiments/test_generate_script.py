import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import common
from dsv2_jax.config import ConfigError

SCRIPT = Path(__file__).parents[2] / "experiments" / "generate.py"


def generate(monkeypatch, capsys, *flags: str) -> str:
    """What the script prints, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--max_new_tokens=12", *flags])
    assert importlib.import_module("generate").run() == 0
    return capsys.readouterr().out


def test_it_streams_repeats_itself_and_stops(run_folder, monkeypatch, capsys):
    def run(*flags, checkpoint=run_folder):
        return generate(monkeypatch, capsys, f"--checkpoint={checkpoint}", "--prompt=import ", *flags)

    greedy = run("--temperature=0", "--json")
    line = json.loads(greedy)
    assert (line["prompt"], line["ended"]) == ("import ", "length")
    assert run("--temperature=0", checkpoint=run_folder / "checkpoints" / "7") == line["text"] + "\n"
    stop = line["text"][3:5]
    assert run("--temperature=0", f"--stop={stop}") == line["text"][: line["text"].index(stop)] + "\n"
    one, again, _ = run("--prompt=import ", "--top_k=40", "--seed=1", "--json").split("\n")
    assert one == again != run("--top_k=40", "--seed=2", "--json").strip()


def test_prompts_repeat_and_come_from_standard_input(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from the pipe\n"))
    flags = ["--prompt=a", "--prompt=-", "--temperature=0"]
    printed = generate(monkeypatch, capsys, f"--checkpoint={run_folder}", *flags)
    assert "--- 1 of 2: 'a'\n" in printed
    assert "--- 2 of 2: 'from the pipe\\n'\n" in printed


def test_chat_asks_in_the_released_words(run_folder, monkeypatch, capsys):
    flags = [f"--checkpoint={run_folder}", "--temperature=0", "--json"]
    asked = json.loads(generate(monkeypatch, capsys, *flags, "--chat", "--system=os", "--prompt=import"))
    plain = json.loads(generate(monkeypatch, capsys, *flags, "--prompt=os\n\nUser: import\n\nAssistant:"))
    assert asked["text"] == plain["text"].removeprefix(" ")
    assert asked["text"] != json.loads(generate(monkeypatch, capsys, *flags, "--prompt=import"))["text"]


def script(*flags: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_help_names_every_flag():
    shown = script("--help")
    assert shown.returncode == 0
    for flag in (
        "checkpoint",
        "prompt",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "stop",
        "dtype",
        "chat",
    ):
        assert f"--{flag}" in shown.stdout


def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, run_folder, monkeypatch, capsys):
    def mistaken(*flags: str) -> str:
        """What the script says, run in this process."""
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--prompt=a", *flags])
        with pytest.raises(SystemExit) as ended:
            common.run(importlib.import_module("generate").run)
        assert ended.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setattr(common, "keep_memory", lambda: None)
    missing = script("--prompt=a", "--checkpoint=no/such/run")
    assert missing.returncode == 2
    empty = f"--checkpoint={tmp_path}"
    for said, named in (
        (missing.stderr, ["no/such/run", "experiments/quickstart.py"]),
        (mistaken(empty), [str(tmp_path), "no checkpoint", "experiments/quickstart.py"]),
        (mistaken(empty, "--temperature=-1"), ["temperature=-1.0"]),
        (mistaken(empty, "--system=x"), ["--system='x'", "--chat"]),
        (mistaken(empty, "--top_q=0.5"), ["--top_q", "--top_p"]),
        (mistaken(f"--checkpoint={run_folder}", "--max_new_tokens=500"), ["max_length=128", "500 new"]),
    ):
        assert "Traceback" not in said
        assert all(name in said for name in named), said


@pytest.mark.slow
def test_a_mesh_draws_the_same_text(run_folder, monkeypatch, capsys):
    flags = (f"--checkpoint={run_folder}", "--prompt=import ", "--temperature=0", "--dtype=float32")
    alone = generate(monkeypatch, capsys, *flags)
    assert generate(monkeypatch, capsys, *flags, "--config.mesh=expert=2,data=rest") == alone


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--config.mesh=context=8", "context=8 is for training; use tensor, expert, fsdp or data"),
        ("--config.mesh=expert=3", "it takes 3 devices and there are 8"),
        ("--config.train.steps=3", "unknown argument"),
    ],
)
def test_what_no_mesh_is_for_generation(run_folder, monkeypatch, capsys, flag, complaint):
    with pytest.raises((ConfigError, SystemExit)) as error:
        generate(monkeypatch, capsys, f"--checkpoint={run_folder}", "--prompt=import ", flag)
    assert complaint in str(error.value) + capsys.readouterr().err
