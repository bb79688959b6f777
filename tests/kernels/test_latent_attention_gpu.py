"""Latent attention on Hopper: interpreted against the float32 reference, reasons and choices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from quick import quick

from gpu_interpreter import gpu_interpreter
from kernels_pallas import latent_attention as op
from kernels_pallas.latent_attention import gpu, gpu_kernels
from kernels_pallas.latent_attention.shapes import Case, make_case
from kernels_pallas.select import Target
from oracles.compare import TOLERANCE, assert_close, worst

H200, A100 = Target("gpu", "NVIDIA H200"), Target("gpu", "NVIDIA A100-SXM4-40GB")
SMALL = {"value_dim": 128, "rope_dim": 16, "lanes": 256}
# The interpreter of JAX 0.10 compiles anew for every block of the grid, of which these have one or two.
CASES = {
    "a part with nothing to do": (Case(8, 1, (1,), 64, **SMALL), 2),
    # pages that a tile spans, and a table that ends inside a pair of tiles
    "several queries": (Case(3, 5, (140,), 32, **SMALL), 1),
    "v2": (Case(128, 1, (193,), 64, value_dim=512, rope_dim=64, lanes=576), 1),
    "int8": (Case(2, 1, (140,), 128, dtype="int8", **SMALL), 1),
    "int4": (Case(2, 1, (140,), 128, dtype="int4", **SMALL), 1),
}
MORE = {
    "ties": (Case(2, 1, (300,), 128, ties=True, value_dim=128, rope_dim=64, lanes=192), 1),
    "float8": (Case(16, 2, (70, 333), 64, 512, 64, dtype="float8_e4m3fn"), 2),
    "v2 lite int4": (Case(16, 2, (70, 333), 64, 512, 64, dtype="int4"), 2),
    "lengths": (Case(8, 1, (1, 64, 131), 64, **SMALL), 2),
    "v2 lite, speculative": (Case(16, 4, (4, 200), 16, value_dim=512, rope_dim=64, lanes=640), 1),
    "very different lengths": (Case(3, 2, (2, 500), 8, **SMALL), 3),
    "chunked prefill": (Case(4, 70, (70, 150), 64, **SMALL), 1),
}


def mesh_of(chosen: Target, **axes) -> AbstractMesh:
    axes = axes or {"data": 1}
    device = jax.sharding.AbstractDevice(device_kind=chosen.kind, num_cores=132, platform=chosen.platform)
    kinds = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=device)


def run(case, splits=1):
    arguments, options = make_case(case, "bfloat16")
    with gpu_interpreter() as interpret:
        attend = functools.partial(gpu.paged_latent_attention, **options, splits=splits, interpret=interpret)
        return jax.block_until_ready(jax.jit(attend)(*arguments))


def expected(case):
    (q, *others), options = make_case(case, "bfloat16")
    attend = functools.partial(op.paged_latent_attention, **options, implementation="reference")
    return jax.jit(attend)(q.astype(jnp.float32), *others)


@pytest.mark.parametrize("name", quick(CASES, "v2", "int4", "a part with nothing to do"))
def test_the_kernel_matches_the_reference(name):
    case, splits = CASES[name]
    out = run(case, splits)
    assert out.dtype == jnp.bfloat16
    assert_close(out, expected(case), TOLERANCE["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_kernel_matches_the_reference_at_more_shapes(name):
    case, splits = MORE[name]
    assert_close(run(case, splits), expected(case), TOLERANCE["bfloat16"])


def test_a_cache_in_one_piece_is_pages_in_order():
    rng = np.random.default_rng(0)
    q, cache = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, 2, 4, 192), (1, 80, 192)))
    offset = jnp.array([70])
    with gpu_interpreter() as interpret:
        out = gpu.latent_attention(q, cache, offset, 128, 0.1, interpret=interpret)
    q = q.astype(jnp.float32)
    reference = op.latent_attention(q, cache, offset, value_dim=128, scale=0.1, implementation="reference")
    assert_close(out, reference, TOLERANCE["bfloat16"])


def test_a_planted_race_is_found(monkeypatch):
    """A warpgroup that does not wait for the other's weights."""
    monkeypatch.setattr(gpu_kernels, "_wait_for_weights", lambda barrier: None)
    with pytest.raises(AssertionError, match="a kernel raced"):
        run(Case(8, 1, (5,), 64, **SMALL))


def test_a_planted_off_by_one_is_far_outside_the_tolerance(monkeypatch):
    case = Case(8, 1, (3,), 64, **SMALL)
    monkeypatch.setattr(gpu_kernels, "_visible", lambda key, place: key <= place + 1)
    assert worst(run(case), expected(case)) > 5 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    ("units", "pairs", "splits"),
    [(256, 32, 1), (128, 32, 1), (8, 32, 16), (64, 32, 2), (140, 32, 4), (1, 4, 4), (1, 1000, 125), (1000, 1, 1)],
)
def test_the_keys_are_split_until_the_multiprocessors_are_busy(units, pairs, splits):
    with jax.sharding.use_abstract_mesh(mesh_of(H200)):
        assert gpu._splits(units, pairs) == splits


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def paged(page=64, width=576, value_dim=512, C=576, dtype=jnp.bfloat16, pages=jnp.bfloat16, scales=None):
    table, offset = array(8, 16, dtype=jnp.int32), array(8, dtype=jnp.int32)
    return array(8, 1, 16, C, dtype=dtype), array(64, page, width, dtype=pages), table, offset, value_dim, 0.1, scales


@pytest.mark.parametrize(
    ("target", "arguments", "reason"),
    [
        (Target("cpu", "cpu"), paged(), "a Hopper kernel, not for cpu"),
        (A100, paged(), "not for NVIDIA A100"),
        (H200, paged(pages=jnp.int4, scales=array(64, 2, 64)), "entries of 576 int4: must have 128 lanes"),
        (H200, paged(page=32, pages=jnp.int8, scales=array(64, 2, 32)), "pages of 32 positions in int8: must be"),
        (H200, paged(page=32, pages=jnp.int4, scales=array(64, 2, 32)), "pages of 32 positions in int4: must be"),
        (H200, paged(pages=jnp.float8_e5m2, scales=array(64, 2, 64)), "pages of float8_e5m2 with scales"),
        (H200, paged(dtype=jnp.float32), "queries of float32 and a cache of bfloat16: both must be bfloat16"),
        (H200, paged(page=96), "pages of 96 positions: must be 8, 16, 32 or a multiple of 64"),
        (H200, paged(page=4), "pages of 4 positions"),
        (H200, paged(value_dim=448), "value width 448 is no multiple of 128"),
        (H200, paged(width=560, C=544), "entries of 560 do not hold a rotary part padded to 64 lanes"),
        (H200, paged(width=640, C=640), "a rotary part"),
        (H200, paged(width=580, page=128, pages=jnp.int8, scales=array(64, 2, 128)), "580 are no multiple of 8 lanes"),
        (H200, paged(width=200, value_dim=128, C=144), "entries of 200 are no multiple of 64 lanes"),
        (H200, paged(width=584), "entries of 584 are no multiple of 64 lanes"),
        (H200, paged(value_dim=640, width=704, C=704), "value width 640 takes"),
    ],
)
def test_what_does_not_run_says_why(target, arguments, reason):
    assert reason in gpu.unsupported_paged(target, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        paged(),
        paged(page=16, width=640),
        paged(page=256, value_dim=128, C=144),
        paged(page=128, pages=jnp.float8_e4m3fn, scales=array(64, 2, 128)),
        paged(page=64, width=640, pages=jnp.int4, scales=array(64, 2, 64)),
    ],
)
def test_what_runs_says_nothing(arguments):
    assert gpu.unsupported_paged(H200, *arguments) is None


@pytest.mark.parametrize(
    "arguments",
    [
        paged(width=192, value_dim=128, C=144),
        paged(width=640),
        paged(width=200, value_dim=128, C=144, page=64, pages=jnp.int8, scales=array(64, 2, 64)),
        paged(width=640, page=64, pages=jnp.int4, scales=array(64, 2, 64)),
    ],
)
def test_widths_beside_those_refused_lower(arguments):
    *arrays, value_dim, scale, scales = arguments
    assert gpu.unsupported_paged(H200, *arguments) is None

    def attend(arrays, scales):
        return gpu.paged_latent_attention(*arrays, value_dim, scale, scales)

    with jax.sharding.use_abstract_mesh(mesh_of(H200)):
        program = jax.jit(attend).trace(arrays, scales).lower(lowering_platforms=("cuda",)).as_text()
    assert "@mosaic_gpu" in program


def test_a_cache_in_one_piece_says_why_too():
    q, offset = array(2, 1, 16, 576), array(2, dtype=jnp.int32)
    assert gpu.unsupported(H200, q, array(2, 1000, 576), offset, 512, 0.1) is None
    assert "of 1004 positions" in (reason := gpu.unsupported(H200, q, array(2, 1004, 576), offset, 512, 0.1))
    assert "make its length a multiple of 8" in reason
    assert "not for NVIDIA A100" in gpu.unsupported(A100, q, array(2, 1000, 576), offset, 512, 0.1)


@pytest.mark.parametrize(("target", "kernels"), [(H200, 1), (A100, 0)])
def test_it_is_automatic_on_hopper_alone(target, kernels):
    q, pages, table, offset, *_ = paged()
    attend = functools.partial(op.paged_latent_attention, value_dim=512, scale=0.1)
    with jax.sharding.use_abstract_mesh(mesh_of(target)):
        program = str(jax.make_jaxpr(attend)(q, pages, table, offset))
    assert program.count("copy_gmem_to_smem") > 0 if kernels else "copy_gmem_to_smem" not in program


@pytest.mark.parametrize("check_vma", [False, True])
def test_it_traces_on_a_mesh(check_vma):
    """Pages: inside shard_map only; a cache in one piece: the batch and the heads are split by itself."""
    q, pages, table, offset, *_ = paged()
    attend = functools.partial(op.paged_latent_attention, value_dim=512, scale=0.1, implementation="gpu")
    shares = jax.sharding.PartitionSpec("data")
    with jax.sharding.use_abstract_mesh(mesh_of(H200, data=2)):
        mapped = jax.shard_map(attend, in_specs=shares, out_specs=shares, check_vma=check_vma)
        assert jax.eval_shape(mapped, q, pages, table, offset).shape == (8, 1, 16, 512)
        with pytest.raises(ValueError, match="the pages lie on several devices"):
            jax.eval_shape(attend, q, pages, table, offset)
        whole = functools.partial(op.latent_attention, value_dim=512, scale=0.1, implementation="gpu")
        assert jax.eval_shape(whole, q, array(8, 256, 576), offset).shape == (8, 1, 16, 512)
