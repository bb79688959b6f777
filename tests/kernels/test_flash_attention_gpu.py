"""Causal attention on Hopper: interpreted against the float32 reference, forward and backward, reasons and choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from gpu_interpreter import gpu_interpreter
from kernels_pallas.flash_attention import api, gpu, gpu_kernels, reference
from kernels_pallas.flash_attention.shapes import CASES, Case, make_case
from kernels_pallas.select import Target, automatic, select
from oracles.compare import TOLERANCE, assert_close, worst

H200, A100 = Target("gpu", "NVIDIA H200"), Target("gpu", "NVIDIA A100-SXM4-40GB")
SCALE = 0.1
TWO_BLOCKS = Case(1, 200, 1, 1)
MORE = {  # slow: the interpreter of JAX 0.10 compiles anew for every block of the grid
    "one token": (CASES["one token"], SCALE),
    "narrow, one document": (Case(1, 128, 1, 1, qk_dim=64, value_dim=64, is_packed=False), 0.5),
    "ragged": (CASES["ragged"], SCALE),
    "blocks": (CASES["blocks"], SCALE),  # of every kind, and every buffer used again
    "packed blocks": (Case(1, 400, 1, 1), 0.02),
    "grouped": (CASES["grouped"], SCALE),
    "large scores": (TWO_BLOCKS, 5.0),
}


def mesh_of(chosen: Target) -> AbstractMesh:
    device = jax.sharding.AbstractDevice(device_kind=chosen.kind, num_cores=132, platform=chosen.platform)
    return AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


def value_and_gradients(attention, qkv, weight_BTNV, scale, segments_BT, **options):
    def loss(*qkv):
        out = attention(*qkv, scale, segments_BT, **options)
        return jnp.sum(out.astype(jnp.float32) * weight_BTNV), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return jax.block_until_ready({"out": out, **{f"gradient of {x}": g for x, g in zip("qkv", gradients)}})


def assert_matches(qkv, weight_BTNV, scale, segments_BT):
    wide = [x.astype(jnp.float32) for x in qkv]
    expected = value_and_gradients(reference.flash_attention, wide, weight_BTNV, scale, segments_BT)
    with gpu_interpreter() as interpret:
        found = value_and_gradients(gpu.flash_attention, qkv, weight_BTNV, scale, segments_BT, interpret=interpret)
    for what, actual in found.items():
        assert actual.dtype == jnp.bfloat16
        if np.abs(expected[what]).max() == 0:  # of q and k, where every query sees one key
            assert np.abs(actual).max() < TOLERANCE["bfloat16"]
        else:
            assert_close(actual, expected[what], TOLERANCE["bfloat16"], what)


def test_matches_the_reference():
    """On the diagonal, beside it, over documents, with padding; in the backward passes buffers are used again."""
    qkv, weight_BTNV, segments_BT = make_case(TWO_BLOCKS, "bfloat16")
    assert_matches(qkv, weight_BTNV, SCALE, segments_BT)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_matches_the_reference_at_more_shapes(name):
    case, scale = MORE[name]
    qkv, weight_BTNV, segments_BT = make_case(case, "bfloat16")
    assert_matches(qkv, weight_BTNV, scale, segments_BT)


@pytest.mark.slow
@pytest.mark.parametrize("segments", ["of one token", "that return", "falling"])
def test_matches_the_reference_with_segments(segments):
    T = TWO_BLOCKS.length
    segments_T = {
        "of one token": np.arange(T),
        "that return": np.arange(T) // 50 % 2,
        "falling": 9 - np.arange(T) // 30,
    }[segments]
    qkv, weight_BTNV, _ = make_case(TWO_BLOCKS, "bfloat16")
    assert_matches(qkv, weight_BTNV, SCALE, jnp.asarray(segments_T, jnp.int32)[None])


def assert_chunk_matches(queries, offsets, heads=1, kv_heads=1, S=300):
    rng, B = np.random.default_rng(0), len(offsets)
    shapes = (B, queries, heads, 192), (B, S, kv_heads, 192), (B, S, kv_heads, 128)
    qkv = [jnp.asarray(rng.normal(size=shape), "bfloat16") for shape in shapes]
    with gpu_interpreter() as interpret:
        found = gpu.flash_attention(*qkv, SCALE, offset_B=jnp.array(offsets), interpret=interpret)
        jax.block_until_ready(found)
    wide = (x.astype(jnp.float32) for x in qkv)
    assert_close(found, reference.flash_attention(*wide, SCALE, offset_B=jnp.array(offsets)), TOLERANCE["bfloat16"])


def test_a_chunk_over_a_cache_matches_the_reference():
    """Its tiles begin before the first key."""
    assert_chunk_matches(130, [77])


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 128, 170, 290, 300])
def test_a_chunk_over_a_cache_matches_the_reference_wherever_it_stands(offset):
    """At the cache's beginning, at a tile's, up to the cache's end, and beyond it: a padded chunk has queries there."""
    assert_chunk_matches(400 if offset == 290 else 130, [offset, 3], heads=2)


QKV = make_case(Case(1, 100, 1, 1, is_packed=False), "bfloat16")[0]


def test_a_planted_off_by_one_is_far_outside_the_tolerance(monkeypatch):
    """A query that sees the key after it."""
    hide = gpu_kernels._hide

    def peeking(x, hidden, lead, *others):
        return hide(x, hidden, None if lead is None else lead + 1, *others)

    monkeypatch.setattr(gpu_kernels, "_hide", peeking)
    with gpu_interpreter() as interpret:
        found = gpu.flash_attention(*QKV, SCALE, interpret=interpret)
    expected = reference.flash_attention(*(x.astype(jnp.float32) for x in QKV), SCALE)
    assert worst(found, expected) > 0.1


def test_a_planted_race_is_found(monkeypatch):
    """Both warpgroups load their queries to the same place."""
    load_rows = gpu_kernels._load_rows

    def crowded(barrier, *copies):
        load_rows(barrier, *((source, buffer.ref.at[0]) for source, buffer in copies))

    monkeypatch.setattr(gpu_kernels, "_load_rows", crowded)
    with pytest.raises(AssertionError, match="a kernel raced"):
        with gpu_interpreter() as interpret:
            jax.block_until_ready(gpu.flash_attention(*QKV, SCALE, interpret=interpret))


REACH = jax.jit(gpu._reach, static_argnums=1)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), min_size=1, max_size=6))
def test_blocks_left_out_are_hidden_and_those_without_a_mask_are_seen(runs):
    """In any order, of any length, with segments that return."""
    blocks = 5
    segments_T = np.resize(np.repeat(*np.transpose(runs)), blocks * gpu_kernels.BLOCK)
    equal_IRJC = (segments_T[:, None] == segments_T).reshape(blocks, gpu_kernels.BLOCK, blocks, gpu_kernels.BLOCK)
    for sign in (1, -1):
        far_I, near_I = (np.asarray(x[0]) for x in REACH(jnp.asarray(segments_T)[None], sign))
        for i in range(blocks):
            assert 0 <= near_I[i] <= far_I[i] <= (i + 1 if sign == 1 else blocks - i)
            for distance in range(i + 1 if sign == 1 else blocks - i):
                equal_RC = equal_IRJC[i, :, i - sign * distance]
                assert distance < far_I[i] or not equal_RC.any()
                assert distance >= near_I[i] or equal_RC.all()


def test_documents_in_rising_order_leave_out_every_block_they_can():
    B = gpu_kernels.BLOCK
    segments_BT = jnp.asarray(np.repeat([1, 2, 3], [B + 5, 3 * B - 5, B]))[None]
    far_BI, near_BI = gpu._reach(segments_BT, 1)
    assert far_BI.tolist() == [[1, 2, 2, 3, 1]]
    assert near_BI.tolist() == [[1, 0, 1, 2, 1]]
    far_BI, near_BI = gpu._reach(segments_BT, -1)
    assert far_BI.tolist() == [[2, 3, 2, 1, 1]]
    assert near_BI.tolist() == [[1, 0, 2, 1, 1]]


def arrays(H=192, V=128, T=300, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((1, T, 2, width), dtype) for width in (H, H, V)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((Target("tpu", "TPU v5"), *arrays()), "not for tpu"),
        ((A100, *arrays()), "not for NVIDIA A100"),
        ((H200, *arrays(T=100), 0.1, None, jnp.zeros(1, jnp.int32)), "100 queries over a cache (offset_B): fewer than"),
        ((H200, *arrays(dtype=jnp.float32)), "takes bfloat16"),
        ((H200, *arrays(H=80)), "query width 80 is no multiple of 64 up to 192"),
        ((H200, *arrays(H=256)), "query width 256"),
        ((H200, *arrays(V=96)), "value width 96 is no multiple of 64 up to 128"),
        ((H200, *arrays(V=192)), "value width 192"),
        ((H200, *arrays(), -0.1), "scale -0.1 is not positive"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_it_says_why_it_cannot_run(arguments, reason):
    assert reason in gpu.unsupported(*arguments)
    assert gpu.unsupported(H200, *arrays(), 0.1) is None


def test_it_is_automatic_on_hopper_alone_and_a_name_runs_or_raises():
    def chosen(target, name="auto", **kinds):
        with jax.sharding.use_abstract_mesh(mesh_of(target)):
            return select("flash_attention", name, api.IMPLEMENTATIONS, *arrays(**kinds), 0.1, None, None)

    assert automatic(gpu, H200)
    assert chosen(H200) is chosen(Target("gpu", "NVIDIA GH200 480GB")) is gpu
    assert chosen(A100) is chosen(H200, dtype=jnp.float32) is chosen(H200, H=80) is api.xla
    with pytest.raises(ValueError, match=r"'gpu' cannot run: a Hopper kernel .* not for NVIDIA A100"):
        chosen(A100, "gpu")
