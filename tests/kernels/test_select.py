"""Which implementation runs: automatic by the device of the mesh in force, or the one named, or the reason why not."""

import dataclasses
import importlib
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from dsv2_jax.config import IMPLEMENTATIONS, ComputeConfig
from kernels_pallas import select as selecting
from kernels_pallas import sharded, support
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.grouped_matmul import grouped_swiglu, rows_per_tile
from kernels_pallas.grouped_matmul import tpu as grouped_tpu
from kernels_pallas.latent_attention import tpu as latent_tpu
from kernels_pallas.select import Target, select, target
from kernels_pallas.tiles import make_layout

V5P = Target("tpu", "TPU v5")


def mesh_of(chosen: Target, **axes) -> AbstractMesh:
    axes = axes or {"data": 1}
    device = jax.sharding.AbstractDevice(device_kind=chosen.kind, num_cores=1, platform=chosen.platform)
    kinds = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=device)


def test_the_config_knows_the_names_of_every_op():
    found = {}
    for op in IMPLEMENTATIONS:
        found[op] = tuple(importlib.import_module(f"kernels_pallas.{op}.api").IMPLEMENTATIONS)
    assert found == IMPLEMENTATIONS
    ops = {field.name for field in dataclasses.fields(ComputeConfig) if field.default == "auto"}
    assert ops == {*IMPLEMENTATIONS, "expert_transport"}


def test_the_target_is_the_default_device_without_a_mesh():
    assert target() == Target("cpu", "cpu")
    with jax.default_device("cpu"):
        assert target().platform == "cpu"
    with jax.default_device(jax.devices()[3]):
        assert target().platform == "cpu"


def test_the_target_is_the_mesh_in_force():
    """Under jit, vmap, checkpoint, scan, shard_map and in both passes of a custom_vjp; and a trace is not reused."""
    seen = []

    @jax.custom_vjp
    def noting(x):
        seen.append(target().platform)
        return x

    noting.defvjp(lambda x: (noting(x), None), lambda _, dx: (noting(dx),))

    def through(x):
        x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(jax.vmap(noting))(x), None), x, length=2)
        shares = jax.sharding.PartitionSpec("data")
        return jax.shard_map(noting, in_specs=shares, out_specs=shares)(x).sum()

    gradient = jax.jit(jax.grad(through))
    for chosen in (Target("cpu", "cpu"), V5P, Target("gpu", "NVIDIA H200")):
        seen.clear()
        with jax.sharding.use_abstract_mesh(mesh_of(chosen, data=2)):
            gradient.trace(jax.ShapeDtypeStruct((4,), jnp.float32))
        assert set(seen) == {chosen.platform}
        assert len(seen) >= 4


def module(reason=None):
    return types.SimpleNamespace(
        unsupported=lambda target, *arguments: reason and f"{reason} {target.kind} {arguments}"
    )


def test_automatic_takes_the_first_that_runs():
    fast, slow, everywhere = module("not on"), module(), types.SimpleNamespace()
    assert select("op", "auto", {"a": fast, "b": slow, "c": everywhere}, 1) is slow
    assert select("op", "auto", {"a": fast, "c": everywhere, "b": slow}, 1) is everywhere


def test_automatic_leaves_out_what_is_not_for_this_device():
    elsewhere, here = types.SimpleNamespace(automatic=lambda target: target.platform == "tpu"), types.SimpleNamespace()
    assert select("op", "auto", {"a": elsewhere, "b": here}) is here
    assert select("op", "a", {"a": elsewhere, "b": here}) is elsewhere
    with jax.sharding.use_abstract_mesh(mesh_of(V5P)):
        assert select("op", "auto", {"a": elsewhere, "b": here}) is elsewhere


def test_a_named_one_runs_or_raises_with_its_reason():
    implementations = {"a": module("not on"), "b": module(), "c": types.SimpleNamespace()}
    assert select("op", "c", implementations, 7) is implementations["c"]
    with pytest.raises(ValueError, match=r"op: implementation 'a' cannot run: not on cpu \(7,\)"):
        select("op", "a", implementations, 7)
    with pytest.raises(ValueError, match="op: no implementation 'd'; there are auto, a, b, c"):
        select("op", "d", implementations)


# What an op's kernels say where the table shows a "no", by name and place: on other platforms, then what their own
# lacks. A new "no" without its words here fails the test below, and so do words that no cell says.
ELSEWHERE = {
    ("tpu", place): "a TPU kernel, not for " + platform
    for place, platform in {"CPU": "cpu", "Hopper": "gpu", "other GPU": "gpu"}.items()
} | {
    ("gpu", "CPU"): "a Hopper kernel, not for cpu",
    ("gpu", "TPU v5p"): "a Hopper kernel, not for tpu",
    ("gpu", "other GPU"): "a Hopper kernel (H100, H200, H800, H20, GH200), not for NVIDIA A100-SXM4-40GB",
}
DISPATCH = {
    ("tpu", place): f"phrased for the TPU compiler, not for {platform}"
    for place, platform in {"CPU": "cpu", "Hopper": "gpu", "other GPU": "gpu"}.items()
}
HERE = {
    "flash_attention float32": {("gpu", "Hopper"): "q, k, v of float32, float32, float32: it takes bfloat16"},
    "flash_attention of one token": {
        ("tpu", "TPU v5p"): "1 queries over a cache (offset_B): fewer than the 128 of the smallest block",
        ("gpu", "Hopper"): "1 queries over a cache (offset_B): fewer than the 128 of a block",
    },
}


@pytest.mark.parametrize("op", support.operations())
def test_every_unsupported_cell_of_the_table_says_why(op):
    elsewhere = {"token_dispatch": DISPATCH, "expert_ffn": {}}.get(op, ELSEWHERE)
    said = {(name, place): reason for of, name, place, reason in support.table() if reason and of == op}
    assert said == elsewhere | HERE.get(op, {})


def test_the_table_is_printed_and_automatic_is_unique(capsys):
    support.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(support.table())
    assert sum(" automatic" in line for line in lines) == len(support.operations()) * len(support.TARGETS)
    on_cpu = [line.split(" CPU ")[0].split()[-1] for line in lines if " automatic" in line and " CPU " in line]
    assert on_cpu == ["xla"] * len(support.operations())


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def case(T=256, H=192, V=128, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((2, T, 4, width), dtype) for width in (H, H, V)]


@pytest.mark.parametrize(
    ("qkv", "options", "reason"),
    [
        (case(V=64), {}, "value width 64 is no multiple of 128"),
        (case(dtype=jnp.float16), {}, "float16"),
        (case(T=100), {"offset_B": array(2, dtype=jnp.int32)}, r"100 queries over a cache .* fewer than the 128"),
    ],
)
def test_flash_attention_on_tpu_falls_back_and_says_why(qkv, options, reason):
    def run(implementation):
        def call(*qkv, **options):
            return flash_attention(*qkv, scale=1.0, implementation=implementation, **options)

        with jax.sharding.use_abstract_mesh(mesh_of(V5P)):
            return str(jax.make_jaxpr(call)(*qkv, **options))

    with pytest.raises(ValueError, match=reason):
        run("tpu")
    assert "pallas_call" not in run("auto")


@pytest.mark.parametrize("options", [{}, {"offset_B": array(2, dtype=jnp.int32)}], ids=str)
def test_flash_attention_on_tpu_is_automatic(options):
    with jax.sharding.use_abstract_mesh(mesh_of(V5P)):
        program = jax.make_jaxpr(lambda *qkv, **options: flash_attention(*qkv, scale=1.0, **options))(
            *case(), **options
        )
    assert str(program).count("pallas_call") == 1


def test_a_mesh_axis_that_does_not_divide_leaves_the_axis_whole():
    """Batch 2 over data=2 x fsdp=3: only data splits it; 4 heads over tensor=2: split. Other axes do the same work."""
    mesh = mesh_of(V5P, data=2, fsdp=3, tensor=2, context=2)
    shapes = []

    def local(x, nothing):
        assert nothing is None
        assert sharded.free_axes() == ()
        shapes.append(x.shape)
        return x

    with jax.sharding.use_abstract_mesh(mesh):
        assert sharded.free_axes() == ("data", "fsdp", "tensor", "context")
        x = jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)
        out = jax.eval_shape(lambda x: sharded.over_mesh(local, (x, None), ("b.n", "b"), "b.n"), x)
    assert out.shape == (2, 5, 4)
    assert shapes == [(1, 5, 2)]
    assert selecting.target().platform == "cpu"


@pytest.mark.parametrize("check_vma", [False, True])
def test_kernels_and_their_gradients_trace_inside_shard_map(check_vma):
    """Whether or not it tracks which values differ between devices; outside, the rows' kernels refuse a mesh."""

    def local(x_GD, expert_TK, gate, up):
        return grouped_swiglu(x_GD, gate, up, make_layout(expert_TK, 4, 16), implementation="tpu")

    rows, shares = (8 * 2 // 16 + 4) * 16, jax.sharding.PartitionSpec("expert")
    arguments = array(2 * rows, 32), array(16, 2, dtype=jnp.int32), array(8, 32, 16), array(8, 32, 16)
    with jax.sharding.use_abstract_mesh(mesh_of(V5P, expert=2)):
        mapped = jax.shard_map(local, in_specs=shares, out_specs=shares, check_vma=check_vma)
        gradient = jax.grad(lambda x, *others: mapped(x, *others).astype(jnp.float32).sum())
        assert jax.eval_shape(gradient, *arguments).shape == (2 * rows, 32)
        with pytest.raises(ValueError, match="the rows lie on several devices"):
            jax.eval_shape(local, array(rows, 32), array(8, 2, dtype=jnp.int32), array(4, 32, 16), array(4, 32, 16))


@pytest.mark.parametrize(
    ("tile", "dim", "matrices", "reason"),
    [
        (8, 32, 1, "tiles of 8 rows are no multiple of 16"),
        (16, 40000, 1, "1 weights 40000 wide: 128 columns of them exceed 8 MiB"),
        (16, 20000, 2, "2 weights 20000 wide: 128 columns of them exceed 8 MiB"),
    ],
)
def test_grouped_matmul_on_tpu_says_why(tile, dim, matrices, reason):
    assert reason in _grouped_on_tpu(tile, dim, matrices)


def _grouped_on_tpu(tile=16, dim=32, matrices=1, dtype=jnp.bfloat16):
    layout = jax.eval_shape(lambda e_TK: make_layout(e_TK, 4, tile), jax.ShapeDtypeStruct((8, 2), jnp.int32))
    x, w = array(len(layout.token_of_row_G), dim, dtype=dtype), array(4, dim, 16, dtype=dtype)
    return grouped_tpu.unsupported(V5P, x, [w] * matrices, layout)


def test_kernels_on_tpu_refuse_what_their_matmuls_do_not_take():
    assert "rows of float16: bfloat16 and float32 are multiplied" in _grouped_on_tpu(dtype=jnp.float16)
    assert _grouped_on_tpu(dtype=jnp.float32) is None
    pages = "pages of float8_e5m2: bfloat16, float32, int4, int8, float8_e4m3fn are read"
    assert pages in _paged_on_tpu(4, 1, 128, 4, "float8_e5m2")
    assert "pages of float16" in _paged_on_tpu(4, 1, 128, 4, "float16")
    assert "queries of float16: bfloat16 and" in _paged_on_tpu(4, 1, 128, 4, queries_of=jnp.float16)
    assert _paged_on_tpu(4, 1, 128, 4, queries_of=jnp.float32) is None


def test_pages_on_several_tpus_are_refused():
    with jax.sharding.use_abstract_mesh(mesh_of(V5P, data=2)):
        assert _paged_on_tpu(4, 1, 64, 4) == "the pages lie on several devices: call it inside jax.shard_map"


@pytest.mark.parametrize(
    ("page", "dtype", "value_dim", "reason"),
    [
        (24, "bfloat16", 512, "pages of 24 positions in bfloat16: must be a multiple of 16 and divide 1024"),
        (8, "bfloat16", 512, "pages of 8 positions in bfloat16: must be a multiple of 16"),
        (64, "int8", 512, "pages of 64 positions in int8: must be a multiple of 128"),
        (64, "int4", 512, "pages of 64 positions in int4: must be a multiple of 128"),
        (64, "float8_e4m3fn", 512, "pages of 64 positions in float8_e4m3fn: must be a multiple of 128"),
        (64, "bfloat16", 500, "value width 500 is no multiple of 128"),
    ],
)
def test_latent_attention_on_tpu_says_why(page, dtype, value_dim, reason):
    assert reason in _paged_on_tpu(4, 1, page, 4, dtype, value_dim)


def _paged_on_tpu(rows, queries, page, pages, dtype="bfloat16", value_dim=512, queries_of=jnp.bfloat16):
    q, pool = array(rows, queries, 16, 576, dtype=queries_of), array(rows * pages, page, 640, dtype=jnp.dtype(dtype))
    return latent_tpu.unsupported_paged(V5P, q, pool, array(rows, pages), None, value_dim, 0.1, None)


def test_latent_attention_on_tpu_names_the_remedy():
    """Larger pages only where they help: not where the visits alone, or the pages' largest size, are too much."""
    assert "bytes of scalar memory, above 524288: use larger pages" in _paged_on_tpu(4, 1, 16, 40000)
    assert "use fewer rows or queries at once" in _paged_on_tpu(400, 1, 1024, 400)
    assert "use fewer rows or queries at once" in _paged_on_tpu(128, 4096, 16, 256)
    assert _paged_on_tpu(64, 1, 64, 512) is None  # 32768 positions of each of 64 rows

    def in_one_piece(rows, positions):
        return latent_tpu.unsupported(V5P, array(rows, 1, 16, 576), array(rows, positions, 576), None, 512, 0.1)

    assert "a cache of 191 positions is not cut into pages: make its length a multiple of 16" in in_one_piece(4, 191)
    assert in_one_piece(4, 192) is None
    assert "use a length that is a multiple of 1024" in in_one_piece(64, 32768 + 16)


def test_tiles_on_tpu_fill_a_register():
    assert rows_per_tile(6, 64) == 1
    with jax.sharding.use_abstract_mesh(mesh_of(V5P)):
        assert rows_per_tile(6, 64) == 16
        assert rows_per_tile(24576, 64) == 128
