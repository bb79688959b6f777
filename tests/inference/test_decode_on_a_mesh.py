"""Decoding with the weights split along `tensor`: the tokens of one device, and one sum for each part of a layer."""

import jax
import numpy as np
import pytest
from loops import bodies
from small import MODEL, change

from dsv2_jax import sharding
from dsv2_jax.inference.generate import generate_tokens
from dsv2_jax.model.transformer import Transformer

CONFIG = change(MODEL, layers=3, attention__heads=4, vocab_size=64, dense_width=64, moe__expert_width=16)
PROMPT_BT = np.random.default_rng(0).integers(0, 64, (4, 5), np.int32)


def make(key):
    return Transformer(CONFIG, key).unstacked()


@pytest.fixture(scope="module")
def on_a_mesh():
    mesh, key = sharding.make_mesh("tensor=2", jax.devices()[:2]), jax.random.key(0)
    model = jax.jit(make, out_shardings=sharding.tree_shardings(jax.eval_shape(make, key), mesh))(key)
    with sharding.use(mesh):
        yield generate_tokens.lower(model, PROMPT_BT, 6).compile(), model


def test_draws_what_one_device_draws(on_a_mesh):
    compiled, model = on_a_mesh
    alone = generate_tokens(jax.jit(make)(jax.random.key(0)), PROMPT_BT, 6)
    np.testing.assert_array_equal(compiled(model, PROMPT_BT), alone)


def test_a_step_sums_once_for_the_embedding_each_attention_and_each_ffn(on_a_mesh):
    """And twice for the likeliest of the tokens that two devices hold: its score, then its number."""
    opcodes = [instruction.opcode for instruction in max(bodies(on_a_mesh[0]), key=len)]
    assert opcodes.count("all-reduce") == 1 + 2 * CONFIG.layers + 2
    assert not {"all-gather", "all-to-all", "collective-permute", "reduce-scatter"} & set(opcodes)
