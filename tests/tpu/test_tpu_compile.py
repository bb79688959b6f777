"""Ahead-of-time compilation for real TPU chips at the full shapes of V2 and Lite. Needs libtpu (extra `tpu`), no TPU.

The compiler refuses a kernel that does not fit the chip's vector memory, or whose layout it cannot realise.
"""

import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas.cache_append import append
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu, shapes
from kernels_pallas.grouped_matmul import tpu as grouped_tpu
from kernels_pallas.latent_attention import latent_attention, paged_latent_attention
from kernels_pallas.latent_attention import shapes as latent_shapes
from kernels_pallas.latent_attention import tpu as latent_tpu
from kernels_pallas.tiles import make_layout
from kernels_pallas.token_dispatch import combine, dispatch
from kernels_pallas.token_dispatch import shapes as dispatch_shapes
from kernels_pallas.traffic import passes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

CHIPS = {"v5p": "v5p:2x2x2", "v5e": "v5e:2x4", "v6e": "v6e:2x4"}
VERSIONS = {"v5p": "TPU_V5P", "v5e": "TPU_V5E", "v6e": "TPU_V6E"}
bf16 = jnp.bfloat16


@functools.cache
def devices(chip):
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices


def compiled(chip, function, arguments, specs=None, **axes):
    """`function` compiled for a mesh of `axes` (one device without), `arguments` (shape, dtype) laid out by `specs`."""
    axes = axes or {"data": 1}
    count = int(np.prod(list(axes.values())))
    placed = np.array(devices(chip)[:count]).reshape(*axes.values())
    mesh = Mesh(placed, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    specs = specs or [PartitionSpec()] * len(arguments)
    abstract = [jax.ShapeDtypeStruct(*a, sharding=NamedSharding(mesh, s)) for a, s in zip(arguments, specs)]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*abstract).compile()


def kernels(program) -> int:
    return len(re.findall('custom_call_target="tpu_custom_call"', program.as_text()))


def laid_out(case):
    """Rows of the case's layout; its arrays as arguments; and what makes the layout of them."""
    T, K = case.tokens, case.choices
    make = functools.partial(make_layout, experts=case.experts, tile=case.tile)
    leaves, structure = jax.tree.flatten(jax.eval_shape(make, jax.ShapeDtypeStruct((T, K), jnp.int32)))
    layout_of = functools.partial(jax.tree.unflatten, structure)
    return len(layout_of(leaves).token_of_row_G), [(leaf.shape, leaf.dtype) for leaf in leaves], layout_of


def attention_gradients(q, k, v, segments):
    def loss(q, k, v):
        return flash_attention(q, k, v, scale=0.1, segments_BT=segments).astype(jnp.float32).sum()

    return jax.grad(jax.checkpoint(loss), (0, 1, 2))(q, k, v)


def attention_shapes(B, T, N):
    return [((B, T, N, 192), bf16), ((B, T, N, 192), bf16), ((B, T, N, 128), bf16), ((B, T), jnp.int32)]


ON_CHIPS = pytest.mark.parametrize(("chip", "model"), [(chip, model) for chip in CHIPS for model in ("v2", "v2 lite")])


@ON_CHIPS
def test_flash_attention(chip, model):
    heads = 128 if model == "v2" else 16
    program = compiled(chip, attention_gradients, attention_shapes(1, 4096, heads))
    assert kernels(program) == 3  # forward, dq, dk with dv
    # Not even one head's scores of the whole sequence are held; a log-sum-exp is, in 128 lanes.
    assert program.memory_analysis().temp_size_in_bytes <= heads * 4096 * (2 * 192 + 2 * 128 + 4 * 128) * 4
    assert "4096,4096" not in program.as_text()


@ON_CHIPS
def test_flash_attention_of_a_chunk_over_a_cache(chip, model):
    N, T, S = 128 if model == "v2" else 16, 512, 4096
    shapes = [((1, T, N, 192), bf16), ((1, S, N, 192), bf16), ((1, S, N, 128), bf16), ((1,), jnp.int32)]

    def attend(q, k, v, offset):
        return flash_attention(q, k, v, scale=0.1, offset_B=offset, implementation="tpu")

    program = compiled(chip, attend, shapes)
    assert kernels(program) == 1
    # Keys, of 256 lanes, and values are laid anew, and once more with the heads first; the queries and the result too.
    # Lite's keys, as an argument, have another layout than is gathered from: a copy more.
    keys, copied = S + 1024, S * 256 if model == "v2 lite" else 0
    assert program.memory_analysis().temp_size_in_bytes <= 2 * N * ((2 * keys + 2 * T) * (256 + 128) + copied)
    assert not re.findall(r"512,(4096|4608|5120)\]", program.as_text())


def test_attention_over_a_mesh_needs_no_communication():
    batch, heads = ("fsdp",), "tensor"
    specs = [PartitionSpec(batch, None, heads)] * 3 + [PartitionSpec(batch)]
    text = compiled("v5p", attention_gradients, attention_shapes(8, 1024, 16), specs, fsdp=4, tensor=2).as_text()
    assert not re.findall("all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)


def ffn_gradients(layout_of, gates_TK, x_TD, gate, up, down, *leaves):
    """The routed experts of one layer: dispatch, SwiGLU, down, combine; and all gradients. (Sorting compiles long.)"""
    layout = layout_of(leaves)

    def loss(x_TD, gate, up, down):
        h_GF = grouped_swiglu(dispatch(x_TD, layout), gate, up, layout, implementation="tpu")
        o_GD = grouped_matmul(h_GF, down, layout, implementation="tpu")
        return combine(o_GD, gates_TK, layout).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2, 3))(x_TD, gate, up, down)


@ON_CHIPS
def test_routed_experts(chip, model):
    case = shapes.FULL[model]
    T, K, E, D, F = case.tokens, case.choices, case.experts, case.dim, case.width
    rows, integers, layout_of = laid_out(case)
    arguments = [((T, K), jnp.float32), ((T, D), bf16), ((E, D, F), bf16), ((E, D, F), bf16), ((E, F, D), bf16)]
    program = compiled(chip, functools.partial(ffn_gradients, layout_of), arguments + integers)
    # SwiGLU; the down matrix's dx and dw; SwiGLU's dx, and dw of gate and up. The down product itself is not needed.
    assert kernels(program) == 6
    # Rows of D and F in bfloat16, some in float32, and no copy of the weights.
    assert program.memory_analysis().temp_size_in_bytes <= rows * (6 * D + 8 * F) * 2


@ON_CHIPS
def test_experts_of_inference(chip, model):
    """SwiGLU that keeps nothing for gradients, and the product down, which the gradients above leave out."""
    case = shapes.FULL[model]
    E, D, F = case.experts, case.dim, case.width
    G, integers, layout_of = laid_out(case)

    def ffn(x_GD, gate, up, down, *leaves):
        h_GF = grouped_swiglu(x_GD, gate, up, layout_of(leaves), implementation="tpu")
        return grouped_matmul(h_GF, down, layout_of(leaves), implementation="tpu")

    arguments = [((G, D), bf16), ((E, D, F), bf16), ((E, D, F), bf16), ((E, F, D), bf16)]
    program = compiled(chip, ffn, arguments + integers)
    assert kernels(program) == 2
    assert program.memory_analysis().temp_size_in_bytes <= G * F * 2 + (4 << 20)  # h


MOVED = {"dispatch": 960, "combine": 760, "dispatch gradient": 760, "combine gradients": 2600}  # MiB, as its docstring


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", MOVED)
def test_rows_travel_to_their_experts_and_back_in_few_bytes(chip, name):
    """At the most x with a row of zeros, or K - 1 gathered T x D, are held; no row is held in float32."""
    function, arguments = dispatch_shapes.abstract_cases(128, "tpu")[name]
    leaves, structure = jax.tree.flatten(arguments)
    program = compiled(
        chip, lambda *leaves: function(*jax.tree.unflatten(structure, leaves)), [(x.shape, x.dtype) for x in leaves]
    )
    text = program.as_text()
    assert abs(sum(map(sum, passes(text).values())) / 2**20 - MOVED[name]) <= 2
    assert program.memory_analysis().temp_size_in_bytes <= (41 if name == "dispatch" else 203) << 20
    outside_fusions = re.sub(r"(?s)\n%?fused_computation.*?\n}", "", text)
    assert "bf16[45056,5120]" in outside_fusions
    assert "f32[45056,5120]" not in outside_fusions


@ON_CHIPS
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("which", ["grouped_matmul", "grouped_swiglu", "down"])
def test_weights_of_one_byte(chip, model, dtype, which):
    case, matrices = shapes.FULL[model], 2 if which == "grouped_swiglu" else 1
    E, D, F = case.experts, case.dim, case.width
    D, F = (F, D) if which == "down" else (D, F)
    G, integers, layout_of = laid_out(case)
    arguments = [((G, D), bf16), *[((E, D, F), jnp.dtype(dtype))] * matrices, *[((E, F), jnp.float32)] * matrices]
    op = grouped_swiglu if which == "grouped_swiglu" else grouped_matmul

    def product(x_GD, *others):
        weights, scales, leaves = others[:matrices], others[matrices : 2 * matrices], others[2 * matrices :]
        return op(x_GD, *weights, layout_of(leaves), scales_EF=scales, implementation="tpu")

    program = compiled(chip, product, arguments + integers)
    assert kernels(program) == 1
    assert program.memory_analysis().temp_size_in_bytes <= 4 << 20  # the visits; no copy of weights, widened or not


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", latent_shapes.FULL)
def test_latent_attention(chip, name):
    assert_latent_attention_compiles(chip, latent_shapes.FULL[name])


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("dtype", "page"), [("bfloat16", 16), ("int8", 128), ("float8_e4m3fn", 128), ("int4", 128)])
def test_smallest_pages(chip, dtype, page):
    """And almost all the scalar memory that page table and visits may take: 32768 positions of each row."""
    assert_latent_attention_compiles(
        chip, latent_shapes.Case(16, 1, (32768,) * (50 if page == 16 else 8), page, dtype=dtype)
    )


def assert_latent_attention_compiles(chip, case):
    B, P = len(case.lengths), max(case.lengths) // case.page
    is_coded = case.dtype != "bfloat16"
    arguments = [
        ((B, case.queries, case.heads, case.value_dim + case.rope_dim), bf16),
        ((B * P, case.page, case.lanes), jnp.dtype(case.dtype)),
        ((B, P), jnp.int32),
        ((B,), jnp.int32),
        *([((B * P, 2, case.page), jnp.float32)] * is_coded),
    ]

    def attend(q, pages, table, offset, scales=None):
        options = {"value_dim": case.value_dim, "scale": 0.1, "scales": scales, "implementation": "tpu"}
        return paged_latent_attention(q, pages, table, offset, **options)

    program = compiled(chip, attend, arguments)
    assert kernels(program) == 1
    queries = B * case.queries * case.heads
    assert program.memory_analysis().temp_size_in_bytes <= queries * (2 * 640 * 2 + 2 * 2 * (512 + 128) * 4) + (1 << 20)


@ON_CHIPS
def test_decoding_over_the_cache_of_the_model_copies_it_in_no_step(chip, model):
    """In one piece, of 576 lanes. As an argument it has another layout than the kernel reads: a copy in, one out."""
    B, S, C, N = 64, 4096, 576, 128 if model == "v2" else 16
    arguments = [((B, 1, N, C), bf16), ((B, S, C), bf16), ((B,), jnp.int32), ((B, 1, C), bf16)]

    def decode(q, cache, offset, entries):
        def step(i, cache_and_o):
            cache = append(cache_and_o[0], entries, offset + i)
            options = {"value_dim": 512, "scale": 0.1, "implementation": "tpu"}
            return cache, latent_attention(q, cache, offset + i, **options)

        return jax.lax.fori_loop(0, 16, step, (cache, jnp.zeros((B, 1, N, 512), bf16)))

    program = compiled(chip, decode, arguments)
    assert kernels(program) == 1
    assert len(re.findall(rf"= bf16\[{B},{S},{C}\]\S* copy\(", program.as_text())) == 2
    queries = B * N
    held = queries * (2 * 640 * 2 + 2 * 2 * (512 + 128) * 4) + B * S * 640 * 2 + (1 << 20)
    assert program.memory_analysis().temp_size_in_bytes <= held


@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_leave_a_quarter_of_the_vector_memory(chip):
    capacity = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[VERSIONS[chip]], 1).vmem_capacity_bytes
    assert max(grouped_tpu.VMEM_LIMIT, latent_tpu.VMEM_LIMIT) <= 0.75 * capacity


def test_a_kernel_beyond_its_budget_is_refused(monkeypatch):
    """So that compiling under VMEM_LIMIT is a check."""
    monkeypatch.setattr(latent_tpu, "VMEM_LIMIT", 2 << 20)
    with pytest.raises(Exception, match=r"(?i)vmem"):
        assert_latent_attention_compiles("v5p", latent_shapes.FULL["v2 lite"])
