"""Decoding with the weights split along `tensor`: the tokens of one device, and one sum for each part of a layer."""

import jax
import numpy as np
import pytest
from loops import bodies
from small import MODEL, change, made

from dsv2_jax import sharding
from dsv2_jax.inference.generate import generate_tokens
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.planning import hlo

CONFIG = change(MODEL, layers=2, attention__heads=4, vocab_size=64, dense_width=64, moe__expert_width=16)
PROMPT_BT = np.random.default_rng(0).integers(0, 64, (4, 5), np.int32)


@pytest.fixture(scope="module", params=["asked for", "that of the weights"])
def models(request):
    """(on one device, compiled for a mesh, on that mesh)."""
    mesh, alone = (
        sharding.make_mesh("tensor=2", jax.devices()[:2]),
        made(lambda key: Transformer(CONFIG, key).unstacked()),
    )
    placed = jax.device_put(alone, sharding.tree_shardings(alone, mesh))
    with sharding.use(mesh if request.param == "asked for" else None):
        return alone, generate_tokens.lower(placed, PROMPT_BT, 6).compile(), placed


def test_draws_what_one_device_draws(models):
    alone, compiled, placed = models
    np.testing.assert_array_equal(compiled(placed, PROMPT_BT), generate_tokens(alone, PROMPT_BT, 6))


def test_a_step_sums_once_for_the_embedding_each_attention_and_each_ffn(models):
    """And for the likeliest token gathers once what two devices found among theirs: score and number."""
    opcodes = [instruction.opcode for instruction in max(bodies(models[1]), key=len)]
    assert opcodes.count("all-reduce") == 1 + 2 * CONFIG.layers
    assert opcodes.count("all-gather") == 1
    assert not {"all-to-all", "collective-permute", "reduce-scatter"} & set(opcodes)


def test_each_device_attends_from_its_heads_to_the_prompt(models):
    """What the prompt's chunk gathers is weights that every device needs whole, and no query, score or value."""
    block = models[0].moe_blocks[0]
    weights = {w[...].size for w in (block.attention.w_dq, block.attention.w_dkv, block.ffn.centroids)}
    computations = hlo.parse(models[1].as_text()).computations.values()
    gathers = [i for computation in computations for i in computation.values() if i.opcode == "all-gather"]
    assert {shape.size for i in gathers for shape in i.shapes if shape.dtype == "f32"} == weights
