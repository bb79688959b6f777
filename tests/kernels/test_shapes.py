"""The full shapes that kernels are compiled, checked and timed at are those of the presets."""

import jax
import pytest

from dsv2_jax import presets
from kernels_pallas import check_gpu, support
from kernels_pallas.flash_attention import shapes as flash_shapes
from kernels_pallas.grouped_matmul import shapes as grouped_shapes
from kernels_pallas.latent_attention import shapes as latent_shapes


def model_of(name: str):
    return presets.get("v2_lite" if "lite" in name else "v2")


@pytest.mark.parametrize("name", grouped_shapes.FULL)
def test_grouped_matmul(name):
    case, model = grouped_shapes.FULL[name], model_of(name)
    moe = model.moe
    widths = moe.experts_per_token, moe.routed_experts, model.dim, moe.expert_width
    assert (case.choices, case.experts, case.dim, case.width) == widths


@pytest.mark.parametrize("name", flash_shapes.FULL)
def test_flash_attention(name):
    case, mla = flash_shapes.FULL[name], model_of(name).attention
    assert (case.heads, case.kv_heads, case.qk_dim, case.value_dim) == (mla.heads, mla.heads, mla.qk_dim, mla.value_dim)


@pytest.mark.parametrize("name", latent_shapes.FULL)
def test_latent_attention(name):
    case, mla = latent_shapes.FULL[name], model_of(name).attention
    assert (case.heads, case.value_dim, case.rope_dim) == (mla.heads, mla.kv_latent, mla.rope_dim)


def test_decoding_at_16_to_128_heads():
    heads = [case.heads for case in latent_shapes.DECODE.values()]
    assert heads == [presets.get("v2_lite").attention.heads, 32, 64, presets.get("v2").attention.heads]


def shapes_of(arguments) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(arguments)]


@pytest.mark.parametrize("name", [name for name in check_gpu.cases() if name.startswith("latent")])
def test_latent_attention_as_compiled_for_hopper(name):
    mla = model_of(name).attention
    q, pages, *_ = shapes_of(check_gpu.cases()[name][1])
    assert q[2:] == (mla.heads, mla.kv_latent + mla.rope_dim)
    assert pages[-1] in (mla.kv_latent + mla.rope_dim, 640)


def test_the_table_of_support_is_of_v2():
    v2, operations = presets.get("v2"), support.operations()
    _, w_EDF, *_ = shapes_of(operations["grouped_matmul"][1])
    assert w_EDF == (v2.moe.routed_experts, v2.dim, v2.moe.expert_width)
    q, k, v, *_ = (shape[2:] for shape in shapes_of(operations["flash_attention"][1][:3]))
    assert q == k == (v2.attention.heads, v2.attention.qk_dim)
    assert v == (v2.attention.heads, v2.attention.value_dim)
    assert shapes_of(operations["latent_attention"][1][0])[0][2:] == (
        128,
        v2.attention.kv_latent + v2.attention.rope_dim,
    )
