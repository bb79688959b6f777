"""`import dsv2_jax` loads nothing heavy, and every public name is there when asked for."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import published
import pytest

import dsv2_jax
from dsv2_jax.data.tokenizer import Tokenizer


def test_the_import_loads_no_jax():
    code = "import sys, dsv2_jax; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", dsv2_jax.__all__)
def test_public_names_resolve(name):
    assert callable(getattr(dsv2_jax, name))
    assert name in dir(dsv2_jax)


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"'pretrian'; it offers ConfigError, .*pretrain"):
        dsv2_jax.pretrian  # noqa: B018


@pytest.mark.parametrize("name", ["from_pretrained", "generate"])
def test_what_a_notebook_calls_shows_an_example(name):
    assert f"dsv2_jax.{name}(" in inspect.getdoc(getattr(dsv2_jax, name))


def test_a_released_folder_in_three_lines(tmp_path):
    """As the examples have it: open, score, generate, the same text token by token."""
    config = published.LITE | {"num_hidden_layers": 2, "vocab_size": 300, "torch_dtype": "float32"}
    folder = published.write_folder(tmp_path, config, published.weights(config))
    Tokenizer.train(["An attention function"] * 3, 280).save(folder / "tokenizer.json")
    model, tokenizer = dsv2_jax.from_pretrained(folder)
    (text,) = dsv2_jax.generate(model, tokenizer, ["An attention"], max_new_tokens=3)
    row = [tokenizer.bos, *tokenizer.encode("An attention")]
    logits_BTV = jax.jit(dsv2_jax.Transformer.__call__)(model, jnp.array([row]))
    assert logits_BTV.dtype == jnp.float32
    first = int(logits_BTV[0, -1].argmax())
    assert text.startswith(tokenizer.decode([first]))
