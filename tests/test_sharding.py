import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from dsv2_jax import presets, sharding
from dsv2_jax.config import ConfigError
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.sharding import MeshShape, make_mesh, parse_mesh


def abstract_mesh(text: str, devices: int):
    sizes = parse_mesh(text).resolve(devices).sizes
    return jax.sharding.AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 5)


def parameters(model):
    """(name, nnx.Param) of every parameter of an abstract model."""
    tree = jax.eval_shape(functools.partial(Transformer, model), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("fsdp=16,expert=8", MeshShape(fsdp=16, expert=8)),
        (" data=2 , tensor = rest ", MeshShape(data=2, tensor=None)),
        ("context=1", MeshShape()),
    ],
)
def test_meshes_are_written_as_one_string(text, shape):
    assert parse_mesh(text) == shape
    assert parse_mesh(str(shape)) == shape


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model=8", "'model' is no axis; there are data, fsdp, expert, tensor, context"),
        ("fsdp=2,fsdp=4", "fsdp is given twice"),
        ("fsdp=0", "'fsdp=0' must be fsdp=N, N a positive number or the word rest"),
        ("fsdp", "must be fsdp=N"),
        ("fsdp=rest,data=rest", "only one axis can be the rest"),
        ("", "must name axes, such as fsdp=16,expert=8"),
    ],
)
def test_what_is_no_mesh_is_refused_by_name(text, complaint):
    with pytest.raises(ConfigError, match=r"^mesh=") as error:
        parse_mesh(text)
    assert complaint in str(error.value)


def test_the_rest_of_the_devices():
    assert parse_mesh("fsdp=rest,expert=4").resolve(128) == MeshShape(fsdp=32, expert=4)
    with pytest.raises(ConfigError, match="the other axes must divide the 8 devices"):
        parse_mesh("fsdp=rest,expert=3").resolve(8)
    with pytest.raises(ConfigError, match="it takes 4 devices and there are 8; let one axis be the rest"):
        parse_mesh("fsdp=4").resolve(8)


def test_a_mesh_has_all_five_axes():
    mesh = make_mesh("expert=4,fsdp=2")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1, "context": 1}
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert make_mesh("data=rest", jax.devices()[:2]).shape["data"] == 2


def test_a_mesh_that_does_not_fit_the_chips_names_itself(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("Failed to find assignment")

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", refuse)
    chips = [types.SimpleNamespace(platform="tpu")] * 3
    with pytest.raises(ConfigError, match="mesh='fsdp=3': it cannot be laid out on these chips: Failed to find"):
        make_mesh("fsdp=3", chips)


@pytest.mark.parametrize(
    ("preset", "mesh", "devices"),
    [
        ("v2", "fsdp=16,expert=8", 128),
        ("v2", "fsdp=4,expert=8,tensor=4", 128),
        ("v2", "data=2,fsdp=8,expert=8,context=8", 1024),
        ("v2_lite", "expert=8", 8),
        ("v2_lite", "fsdp=8", 8),
        ("dense_67b", "fsdp=16,tensor=8", 128),
        ("tiny", "tensor=4,data=2", 8),
    ],
)
def test_only_data_holds_copies(preset, mesh, devices):
    mesh = abstract_mesh(mesh, devices)
    for name, param in parameters(presets.get(preset)):
        axes = param.get_metadata("axes")
        spec = sharding.parameter_spec(axes, param.shape, mesh)
        if len(axes) < 2:
            assert spec == PartitionSpec()
            continue
        stacked = len(param.shape) - len(axes)
        parts = [names if isinstance(names, tuple) else (names,) for names in spec]
        used = [name for names in parts for name in names if name]
        assert sorted(used) == sorted(n for n in sharding.STORAGE_AXES if mesh.shape[n] > 1), name
        assert spec[:stacked] == (None,) * stacked
        for size, names in zip(param.shape, parts, strict=True):
            assert size % math.prod(mesh.shape[n] for n in names if n) == 0


def test_the_table():
    mesh = abstract_mesh("fsdp=4,expert=2,tensor=2", 16)
    spec = functools.partial(sharding.parameter_spec, mesh=mesh)
    assert spec(("expert", "embed", "expert_mlp"), (9, 8, 16, 4)) == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert spec(("expert", "expert_mlp", "embed"), (8, 4, 16)) == PartitionSpec("expert", "tensor", "fsdp")
    assert spec(("embed", "heads", "head_dim"), (16, 4, 8)) == PartitionSpec(("fsdp", "expert"), "tensor", None)
    assert spec(("embed", "kv_latent"), (16, 6)) == PartitionSpec(("fsdp", "expert", "tensor"), None)
    # 12 cannot be cut in 8: fsdp stays there, expert goes to the next that can take it.
    assert spec(("kv_latent", "heads", "head_dim"), (12, 4, 6)) == PartitionSpec("fsdp", ("tensor", "expert"), None)
    assert sharding.compute_spec(("kv_latent", "heads", "head_dim")) == PartitionSpec(None, "tensor", None)
    assert sharding.activation_spec("batch", "sequence", "heads", None) == PartitionSpec(
        ("data", "fsdp", "expert"), "context", "tensor", None
    )
    with pytest.raises(ConfigError, match=r"no dimension of a parameter of axes .* divided by fsdp=4 .*embed=6"):
        spec(("embed", "kv_latent"), (6, 6))


def test_shardings_of_a_tree_and_of_what_has_no_axes():
    mesh = make_mesh("fsdp=4,expert=2")
    tree = {"w": nnx.Param(jnp.zeros((16, 6)), axes=("embed", "mlp")), "step": jnp.int32(0)}
    shardings = sharding.tree_shardings(tree, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(tree)
    assert jax.tree.leaves(shardings["w"])[0].spec == PartitionSpec(("fsdp", "expert"), None)
    assert shardings["step"].spec == PartitionSpec()
    abstract = sharding.with_shardings(jax.eval_shape(lambda: tree), mesh)
    assert [leaf.sharding for leaf in jax.tree.leaves(abstract)] == jax.tree.leaves(shardings)


def test_gathering_outside_and_inside_a_shard_map():
    mesh = make_mesh("fsdp=4,tensor=2")
    param = nnx.Param(jnp.arange(64.0).reshape(8, 8), axes=("embed", "mlp"))
    spec = sharding.parameter_spec(("embed", "mlp"), (8, 8), mesh)
    with sharding.use(mesh):
        assert sharding.axis_size("fsdp") == 4
        whole = jax.jit(lambda p: sharding.gathered(p[...], ("embed", "mlp"), jnp.bfloat16))(param)
        inside = jax.shard_map(
            lambda w: sharding.gather(w, spec, kept=("tensor",)),
            in_specs=spec,
            out_specs=PartitionSpec(None, "tensor"),
            check_vma=False,
        )
        again = jax.jit(inside)(param[...])
    assert whole.sharding.spec == PartitionSpec(None, "tensor")
    assert whole.dtype == jnp.bfloat16
    np.testing.assert_array_equal(whole, param[...])
    np.testing.assert_array_equal(again, param[...])


@pytest.mark.parametrize(("text", "shape"), [("fsdp=4,tensor=2", (8, 8)), ("fsdp=2,context=2,tensor=2", (6, 4, 8))])
def test_scattering_adds_up_what_gathering_gave_out(text, shape):
    mesh = make_mesh(text)
    axes = ("embed", "mlp") if len(shape) == 2 else ("kv_latent", "heads", "head_dim")
    spec = sharding.parameter_spec(axes, shape, mesh)
    whole = sharding.compute_spec(axes)
    dw = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    sharers = PartitionSpec(("fsdp", "context"))  # each with a gradient of its own

    def local(dw):
        return sharding.scatter(dw[0], spec, kept=("tensor",))

    parts = 8 // mesh.shape["tensor"]
    with sharding.use(mesh):
        scatter = jax.shard_map(local, in_specs=PartitionSpec(*sharers, *whole), out_specs=spec, check_vma=False)
        found = jax.jit(scatter)(dw[:parts])
    np.testing.assert_allclose(found, dw[:parts].sum(0), rtol=1e-5, atol=1e-6)
    assert found.dtype == jnp.float32


def test_without_a_mesh_nothing_moves():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, "batch", "mlp") is x
    assert sharding.axis_size("tensor") == 1
    with sharding.use(None):
        assert sharding.ambient() is None


def test_an_activation_that_does_not_divide_stays_whole():
    with sharding.use(make_mesh("data=2,tensor=4")):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "sequence", "mlp"))(jnp.ones((3, 5, 8)))
    assert y.sharding.spec == PartitionSpec(None, None, "tensor")


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [
        ("expert=3", "expert=3 does not divide routed_experts=8; expert may be 1, 2, 4, 8"),
        ("tensor=2", "tensor=2 does not divide heads=3; tensor may be 1, 3"),
        ("context=3", "sequence_length=16 does not divide so; context may be 1, 2, 4, 8"),
        ("fsdp=4,data=2", "data x fsdp x expert = 8 devices share .* 12 is not a multiple; use 16, or move devices"),
    ],
)
def test_impossible_meshes_say_why_and_what_would_do(mesh, complaint):
    mesh = abstract_mesh(mesh, math.prod(parse_mesh(mesh).sizes))
    with pytest.raises(ConfigError, match=complaint):
        sharding.check_mesh(mesh, small.MODEL, batch_size=12, sequence_length=16)


def test_possible_meshes_pass():
    sharding.check_mesh(abstract_mesh("expert=4,data=3", 12), small.MODEL, batch_size=12, sequence_length=16)
    sharding.check_mesh(abstract_mesh("context=2", 2), small.MODEL, sequence_length=16)
    dense = small.change(small.MODEL, moe=None, dense_layers=3)
    with pytest.raises(ConfigError, match="expert=2, but the model has no experts; use fsdp"):
        sharding.check_mesh(abstract_mesh("expert=2", 2), dense)
