"""The printed figures of the report, and independent formulas, against the counts from abstract shapes."""

import dataclasses

import jax
import pytest

from dsv2_jax import presets
from dsv2_jax.model import counting
from oracles import counting as oracle

ORACLES = {
    "v2": oracle.moe_model(**oracle.V2),
    "v2_lite": oracle.moe_model(**oracle.V2_LITE),
    "dense_67b": oracle.dense_model(**oracle.DENSE_67B),
}


@pytest.mark.parametrize("name", ORACLES)
def test_every_part_equals_the_formula_of_its_matrices(name):
    parts, active = ORACLES[name]
    counts = counting.parameters(presets.get(name))
    assert counts.parts == parts
    assert counts.active == sum(active.values())
    assert counts.active_in_matmuls == sum(active.values()) - active["norms"]


@pytest.mark.parametrize(
    ("name", "total", "active", "with_embedding"),
    [
        ("v2", "235.74", "20.85", "21.38"),
        ("v2_lite", "15.71", "2.45", "2.66"),
        ("dense_67b", "67.43", "66.59", "67.43"),
    ],
)
def test_the_printed_figures(name, total, active, with_embedding):
    counts = counting.parameters(presets.get(name))
    billions = [f"{count / 1e9:.2f}" for count in (counts.total, counts.active, counts.active_with_embedding)]
    assert billions == [total, active, with_embedding]


def test_yarn_changes_no_count():
    for name in ("v2", "v2_lite"):
        assert counting.parameters(presets.get(name)) == counting.parameters(presets.get(f"{name}_released"))


def test_no_array_is_made():
    leaves = jax.tree.leaves(counting.abstract_model(presets.get("v2")))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_cached_elements():
    cached = counting.cached_elements_compared(presets.get("v2"))
    assert cached == {
        "this model": 34_560,
        "as MHA": 2 * 128 * 128 * 60,
        "as GQA-8": 2 * 8 * 128 * 60,
        "as MQA": 2 * 128 * 60,
        "DeepSeek 67B": 194_560,
    }
    assert f"{1 - 34_560 * 6 / (cached['DeepSeek 67B'] * 16):.1%}" == "93.3%"
    assert counting.cached_elements(presets.get("v2_lite")) == 15_552
    assert "as GQA-8" not in counting.cached_elements_compared(presets.get("tiny"))  # its 6 heads form no 8 groups


@pytest.mark.parametrize("length", [1, 7, 4096])
@pytest.mark.parametrize("name", ORACLES)
def test_training_flops(name, length):
    shape = {"v2": oracle.V2, "v2_lite": oracle.V2_LITE, "dense_67b": oracle.DENSE_67B}[name]
    active = ORACLES[name][1]
    matrices = sum(active.values()) - active["norms"]
    attention = shape["L"] * oracle.causal_attention_flops(
        length, shape["N"], shape["H"] + shape.get("P", 0), shape["H"]
    )
    expected = 3 * (2 * matrices + attention)
    assert counting.training_flops_per_token(presets.get(name), length) == pytest.approx(expected, rel=1e-12)


def test_decode_flops():
    model = presets.get("v2")
    one, many = counting.decode_flops_per_token(model, 1), counting.decode_flops_per_token(model, 101)
    assert many - one == 100 * 60 * 128 * 2 * (576 + 512)  # scores over 576, values over 512
    assert one - (many - one) // 100 == 2 * counting.parameters(model).active_in_matmuls
    dense = presets.get("dense_67b")
    step = counting.decode_flops_per_token(dense, 2) - counting.decode_flops_per_token(dense, 1)
    assert step == 95 * 64 * 2 * (128 + 128)


def test_xla_counts_the_matmuls_of_a_forward_pass_the_same():
    """A dense model without experts: XLA's own count of the lowered forward pass, attention computed on all pairs."""
    model = presets.get("dense_67b")
    attention = dataclasses.replace(model.attention, heads=4, kv_heads=2, head_dim=64)
    small = dataclasses.replace(
        model, vocab_size=512, layers=2, dense_layers=2, dim=256, dense_width=1024, attention=attention
    )
    T = 32
    abstract = counting.abstract_model(small)
    tokens = jax.ShapeDtypeStruct((1, T), "int32")
    flops = jax.jit(lambda model, tokens: model(tokens)).lower(abstract, tokens).cost_analysis()["flops"] / T
    assert flops == pytest.approx(counting.training_flops_per_token(small, T) / 3, rel=0.05)
