"""Embedding and attention on eight devices; what crosses between them; the balance of causal work."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from quick import quick

from dsv2_jax import sharding
from dsv2_jax.config import ComputeConfig, MLAConfig
from dsv2_jax.model import parallel, rope
from dsv2_jax.model.attention import MLA
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.planning import program
from kernels_pallas.flash_attention import reference
from oracles.compare import assert_close

CONFIG = MLAConfig(heads=4, nope_dim=10, rope_dim=8, value_dim=6, kv_latent=16, q_latent=None)
MODEL = small.change(small.MODEL, dim=16, attention=CONFIG)
B, T = 2, 32

# --- the causal work of a sequence on several devices ----------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_every_pair_of_blocks_is_computed_once_and_all_devices_compute_as_many(devices, per_piece, block):
    length = 2 * devices * per_piece * block
    assert sorted(parallel.zigzag(length, devices)) == list(range(length))
    blocks = parallel.block_list(length, devices, block)
    assert blocks.shape == (devices, (2 * devices - 1) * per_piece**2 + per_piece * (per_piece + 1), 3)
    pairs = sorted((place, key) for _, place, key in blocks.reshape(-1, 3).tolist())
    n = length // block
    assert pairs == [(place, key) for place in range(n) for key in range(place + 1)]
    places = parallel.zigzag(length, devices).reshape(devices, -1, block)
    for device in range(devices):
        for own, place, _ in blocks[device]:
            np.testing.assert_array_equal(places[device, own], place * block + np.arange(block))


@pytest.mark.parametrize("gradient", [False, True])
def test_attention_flops_per_device_are_within_five_percent(gradient):
    """Of the compiled program: all devices run the same one, and no number of iterations depends on which it is."""
    length, devices, heads = 16384, 4, CONFIG.heads
    found = program.read(attention_program(gradient, length)[0])
    assert not found.unknown_loops
    flops = sum(flops * times for flops, times, _ in found.products if times > 1)  # the others are projections
    widths = CONFIG.qk_dim + CONFIG.value_dim  # scores, output; backward scores again, and four gradients
    widths += 3 * CONFIG.qk_dim + 2 * CONFIG.value_dim if gradient else 0
    causal = length * (length + 1) / 2 * 2 * heads * widths
    assert causal / devices < flops < 1.05 * causal / devices  # halves of blocks on the diagonal are computed too
    block = parallel.block_size(length, devices)
    assert flops == 2 * block**2 * heads * widths * len(parallel.block_list(length, devices, block)[0])


@pytest.mark.parametrize("segments", quick([None, (5, 17, 6)], (5, 17, 6)))
def test_attention_over_blocks_is_attention(segments):
    devices, N = 2, 3
    q, k, v = (small.normal(i, B, T, N, width) for i, width in enumerate((12, 12, 5)))
    if segments is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    else:
        segments_BT = jnp.tile(small.packed(*segments, total=T)[0], (B, 1))
    order = parallel.zigzag(T, devices).reshape(devices, -1)
    lists = parallel.block_list(T, devices, 4)

    def in_parts(q, k, v):
        kv = k.swapaxes(1, 2), v.swapaxes(1, 2)
        out = jnp.zeros((B, T, N, 5))
        for mine, blocks in zip(order, lists, strict=True):
            heads_first = q[:, mine].swapaxes(1, 2)
            o = parallel._attend(4, heads_first, *kv, segments_BT[:, mine], segments_BT, jnp.asarray(blocks))
            out = out.at[:, mine].set(o.swapaxes(1, 2))
        return out

    whole = functools.partial(reference.flash_attention, scale=1.0, segments_BT=segments_BT)
    assert_close(in_parts(q, k, v), whole(q, k, v))
    weights = small.normal(9, B, T, N, 5)
    found, expected = (
        jax.grad(lambda *x, f=f: jnp.sum(f(*x) * weights), (0, 1, 2))(q, k, v) for f in (in_parts, whole)
    )
    for name, a, b in zip("qkv", found, expected, strict=True):
        assert_close(a, b, what=f"gradient in {name}")


# --- on eight devices ------------------------------------------------------------------------------------------------


KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast|ragged-all-to-all"


def collectives(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of every result of every collective of a compiled program."""
    found = re.findall(rf"^.*? = (.*?) ({KINDS})(?:-start)?\(", text, re.MULTILINE)
    shapes = [(kind, shape) for results, kind in found for shape in re.findall(r"\w\[([\d,]*)\]", results)]
    return [(kind, tuple(int(size) for size in shape.split(",") if size)) for kind, shape in shapes]


def attention_program(gradient: bool, length: int) -> tuple[str, list[tuple[int, ...]]]:
    """Attention, or its gradient, compiled with its sequence on four devices, as text; the shapes of its weights."""
    mesh = sharding.make_mesh("context=4,data=2")
    abstract = jax.eval_shape(lambda: MLA(MODEL, jax.random.key(0)))

    def attend(mla, h_BTD, segments_BT, positions_BT):
        cos_sin = rope.rotations(positions_BT, CONFIG.rope_dim, CONFIG.rope_theta, None)
        return mla(h_BTD, cos_sin, segments_BT)

    def loss(*arguments):
        return jnp.sum(attend(*arguments) ** 2)

    def tokens(*shape, dtype="int32"):
        names = ("batch", "sequence", "embed")[: len(shape)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.activation_spec(*names)))

    with sharding.use(mesh):
        arguments = abstract, tokens(B, length, MODEL.dim, dtype="float32"), tokens(B, length), tokens(B, length)
        whole = jax.tree.map(lambda _: NamedSharding(mesh, jax.sharding.PartitionSpec()), abstract)
        placed = whole, *(x.sharding for x in arguments[1:])
        function = jax.jit(jax.grad(loss, (0, 1)) if gradient else attend, in_shardings=placed)
        text = function.lower(*arguments).compile().as_text()
    return text, [leaf.shape for leaf in jax.tree.leaves(abstract)]


def assert_only_latents_cross(gradient: bool):
    """[batch, positions, kv_latent + rope_dim], their gradients and the segments; no keys or values of heads.

    And weights: whole, or as parts of their gradients, a fourth along one axis. 24 positions: no number of positions
    that a device could send, all, its 6 or its pieces' 3, is a size of a weight.
    """
    text, weights = attention_program(gradient, length=24)
    found = collectives(text)
    width = CONFIG.kv_latent + CONFIG.rope_dim
    parts = [
        (*shape[:axis], shape[axis] // 4, *shape[axis + 1 :])
        for shape in weights
        for axis in range(len(shape))
        if shape[axis] % 4 == 0
    ]
    stored = {*weights, *parts, *((1, *part) for part in parts)}
    assert ("all-gather", (1, 24, width)) in found
    assert (("reduce-scatter", (1, 6, width)) in found) == gradient
    other = [(kind, shape) for kind, shape in found if shape not in stored]
    assert {shape for _, shape in other} <= {(1, 24, width), (1, 6, width), (1, 24), ()}, other


@pytest.mark.parametrize("gradient", [False, True])
def test_only_latents_cross_the_context_axis(gradient):
    assert_only_latents_cross(gradient)


@pytest.mark.parametrize("send", ["permute", "all-to-all"])
def test_keys_of_heads_that_cross_are_noticed(send, monkeypatch):
    attend, ring = parallel._attend, [(i, (i + 1) % 4) for i in range(4)]

    def sending(block, q, k, v, *rest):
        if send == "permute":
            k = jax.lax.ppermute(k, "context", ring)
        else:
            k = jax.lax.all_to_all(k, "context", 1, 2, tiled=True).reshape(k.shape)
        return attend(block, q, k, v, *rest)

    monkeypatch.setattr(parallel, "_attend", sending)
    for gradient in False, True:
        with pytest.raises(AssertionError, match="collective-permute" if send == "permute" else "all-to-all"):
            assert_only_latents_cross(gradient)


@pytest.mark.parametrize("attention", [CONFIG, small.GQA])
def test_a_kernel_named_for_sequences_on_several_devices_is_refused(attention):
    """What is named runs or raises; "auto" and "xla" are what runs."""

    def shape(implementation):
        model = small.change(MODEL, attention=attention, compute__flash_attention=implementation)
        with sharding.use(sharding.make_mesh("context=2,data=4")):
            abstract = jax.eval_shape(functools.partial(Transformer, model), jax.random.key(0))
            tokens = jax.ShapeDtypeStruct((4, 8), "int32")
            return jax.eval_shape(lambda model, tokens: model.features(tokens)[0], abstract, tokens).shape

    assert shape("auto") == shape("xla") == (4, 8, MODEL.dim)
    for name in ("tpu", "gpu", "reference"):
        with pytest.raises(ValueError, match=f"flash_attention: implementation '{name}' cannot run: sequences split"):
            shape(name)


@pytest.mark.parametrize("text", ["fsdp=4,tensor=2", "data=2,expert=2,context=2", "fsdp=2,context=2,tensor=2"])
def test_embedding_and_its_gradient_on_a_mesh(text):
    mesh = sharding.make_mesh(text)
    table = nnx.Param(small.normal(0, 24, 16), axes=("vocab", "embed"))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 24, (8, 6)))
    weights = small.normal(2, 8, 6, 16)

    def loss(table):
        x_BTD = parallel.embed(tokens, table, jnp.float32)
        return jnp.sum(x_BTD * weights), x_BTD

    both = jax.value_and_grad(loss, has_aux=True)
    (_, expected), expected_gradient = both(table)
    with sharding.use(mesh):
        placed = jax.device_put(table, sharding.tree_shardings(table, mesh))
        (_, found), gradient = jax.jit(both)(placed)
    assert_close(found, expected, 0)
    assert_close(gradient[...], expected_gradient[...])
    assert gradient[...].sharding.spec == sharding.parameter_spec(("vocab", "embed"), (24, 16), mesh)


@pytest.fixture(scope="module")
def scanned():
    """(model, its lowered and its compiled forward pass for fsdp=8, as text): bfloat16, two scanned layers."""
    compute = ComputeConfig(dtype="bfloat16", loss_chunk=8)
    model = dataclasses.replace(MODEL, dense_width=24, vocab_size=48, compute=compute)
    model = small.change(model, moe__expert_width=24)
    mesh = sharding.make_mesh("fsdp=8")
    abstract = jax.eval_shape(functools.partial(Transformer, model), jax.random.key(0))
    rows = NamedSharding(mesh, sharding.activation_spec("batch", "sequence"))
    tokens = jax.ShapeDtypeStruct((8, 16), "int32", sharding=rows)
    with sharding.use(mesh):
        forward = jax.jit(lambda model, tokens: model.features(tokens)[0])
        lowered = forward.lower(sharding.with_shardings(abstract, mesh), tokens)
        return abstract, lowered.as_text(), lowered.compile().as_text()


def matrices(abstract) -> dict[str, tuple[int, ...]]:
    """Shapes, stacked by layer, of all matrices of the MoE layers but the router's, which stays in float32."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract.moe_blocks)
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves if leaf.ndim > 2}
    shapes = {name: shape for name, shape in shapes.items() if "centroids" not in name}
    for name in (".attention.w_q", ".attention.w_ukv", ".ffn.gate", ".ffn.down", ".ffn.shared.up"):
        assert any(path.startswith(name) for path in shapes), name
    return shapes


def test_weights_are_gathered_one_layer_at_a_time_inside_the_scan(scanned):
    abstract, _, text = scanned
    gathered = [line for line in text.splitlines() if re.search(r"= \S+ all-gather\(", line)]
    for name, stacked in matrices(abstract).items():
        shape = ",".join(map(str, stacked[1:]))
        mine = [line for line in gathered if f"[{shape}]" in line]
        assert any("while/body" in line for line in mine), name
        assert not any(f"[{','.join(map(str, stacked))}]" in line for line in gathered), name


def test_weights_are_bfloat16_before_they_are_gathered(scanned):
    """Seen before compilation: XLA for CPUs moves bfloat16 values as float32, rounded to bfloat16 before."""
    abstract, lowered, _ = scanned
    gathered = set(re.findall(r"stablehlo.all_gather.*-> tensor<(.*)>", lowered))
    for name, stacked in matrices(abstract).items():
        dimensions = "x".join(map(str, stacked[1:]))
        assert f"{dimensions}xbf16" in gathered, name
        assert f"{dimensions}xf32" not in gathered, name


def test_choosing_experts_brings_no_scores_together(scanned):
    _, _, text = scanned
    assert re.search(r"router/\S*top_k", text)
    assert not [line for line in text.splitlines() if "all-gather(" in line and "top_k" in line]
