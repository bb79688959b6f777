"""evaluate.py: the loss of a formula written out here, the same on a mesh, and errors that name the file."""

import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv2_jax
from dsv2_jax.config import ConfigError

TEXTS = ["import os\n", "import sys, os\nimport os\n", "x"]


@pytest.fixture
def evaluate(run_folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def run(*flags: str, data: str = "a.jsonl"):
        common = [f"--checkpoint={run_folder}", f"--data={tmp_path / data}", "--seq=8", "--batch=4", "--json"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *common, *flags])
        importlib.import_module("evaluate").main()
        return json.loads(capsys.readouterr().out)

    return run


def test_the_loss_is_that_of_the_formula(evaluate, run_folder):
    model, tokenizer = dsv2_jax.from_pretrained(run_folder)
    nll, count = 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
        logits_TV = np.asarray(jax.jit(type(model).__call__)(model, jnp.array([ids[:-1]])))[0].astype(np.float64)
        log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        nll -= log_p_TV[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    assert count <= 32  # or a row would end inside a document
    found = evaluate("--seq=32")
    size = sum(map(len, TEXTS))
    assert (found["tokens"], found["bytes"]) == (count, size)
    np.testing.assert_allclose(found["loss"], nll / count, rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_byte"], nll / np.log(2) / size, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4,fsdp=2", "data=2,expert=2,context=2"])
def test_a_mesh_gives_the_same(evaluate, mesh):
    alone = evaluate()
    shared = evaluate(f"--config.mesh={mesh}", "--batch=8")
    assert shared["tokens"] == alone["tokens"]
    np.testing.assert_allclose(shared["loss"], alone["loss"], rtol=1e-5)


def test_only_the_first_batches(evaluate):
    assert evaluate("--batch=1", "--batches=1")["tokens"] == 8


def test_bad_input_is_named(evaluate, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ConfigError, match=r"--data: .*bad.jsonl:2: .*; mend the line"):
        evaluate(data="bad.jsonl")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="--data: the files hold no text"):
        evaluate(data="empty.txt")
    with pytest.raises(ConfigError, match="matches no file"):
        evaluate(data="absent.txt")
    with pytest.raises(ConfigError, match=r"^mesh: .* divided by tensor=8"):
        evaluate("--config.mesh=tensor=8")
    with pytest.raises(ConfigError, match=r"^mesh: .* 4 is not a multiple"):  # before the model is read
        evaluate("--config.mesh=data=8", "--checkpoint=absent/checkpoint")
