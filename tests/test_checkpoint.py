import functools
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
from disk import file_size_limit
from flax import nnx

from dsv2_jax import checkpoint
from dsv2_jax.checkpoint import CheckpointError, Checkpoints
from dsv2_jax.types import pytree


class Block(nnx.Module):
    def __init__(self, key):
        self.w = nnx.Param(jax.random.normal(key, (4, 5)), axes=("embed", "mlp"))
        self.scale = nnx.Param(jnp.ones(5), axes=("norm",))
        self.up = nnx.Param(jax.random.normal(key, (6, 5, 4)), axes=("expert", "embed", "expert_mlp"))


class Model(nnx.Module):
    def __init__(self, key, width=7):
        self.dense_blocks = nnx.List([Block(key)])
        self.moe_blocks = jax.vmap(Block)(jax.random.split(key, 3))
        self.embed = nnx.Param(jax.random.normal(key, (width, 500)), axes=("vocab", "embed"))


@pytree
class Counters:
    step: jax.Array
    key: jax.Array


def trees(seed: int):
    model = Model(jax.random.key(seed))
    counters = Counters(jnp.int32(seed), jax.random.key_data(jax.random.key(seed + 1)))
    moments = jax.tree.map(lambda x: x + seed, optax.adam(1.0).init(model))
    return model, {"moments": moments, "counters": counters}


def abstract(width=7):
    model = jax.eval_shape(functools.partial(Model, width=width), jax.random.key(0))
    return model, jax.eval_shape(lambda: trees(0)[1])


def write(folder, *steps, **options):
    manager = Checkpoints(folder, **options)
    for step in steps:
        model, training = trees(step)
        manager.save(step, params=model, training=training, iterator={"row": step}, config={"lr": 0.1, "at": [1, step]})
    manager.wait()
    return manager


def assert_same(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def test_round_trip_of_modules_optimizer_and_documents(tmp_path):
    manager = write(tmp_path, 1, 2)
    restored = manager.restore_latest(*abstract())
    assert_same((restored.params, restored.training), trees(2))
    assert (restored.step, restored.iterator, restored.config) == (2, {"row": 2}, {"lr": 0.1, "at": [1, 2]})
    manager.close()


def test_nothing_to_restore(tmp_path):
    manager = Checkpoints(tmp_path)
    assert manager.restore_latest(*abstract()) is None
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.load_config(tmp_path)


def test_model_and_config_alone(tmp_path):
    write(tmp_path / "checkpoints", 1, 2).close()
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "training")  # it is not read
    folder = tmp_path / "checkpoints"
    for path, step, expected in (tmp_path, None, 2), (folder, 1, 1), (folder / "1", None, 1):
        assert_same(checkpoint.restore_params(path, abstract()[0], step), trees(expected)[0])
        assert checkpoint.load_config(path, step)["at"] == [1, expected]
    with pytest.raises(CheckpointError, match=r"step 3 here; steps there are: 1, 2"):
        checkpoint.load_config(tmp_path, 3)


def opened(step, item, name):
    base = {"driver": "ocdbt", "base": f"file://{step}/{item}"}
    spec = {"driver": "zarr", "kvstore": base | {"path": f"{name}/"}}
    return tensorstore.open(spec, open=True).result()


def test_arrays_have_plain_names_and_chunks_of_a_layer_and_an_expert(tmp_path):
    write(tmp_path, 1).close()
    stored = functools.partial(opened, tmp_path / "1")
    up = stored("params", "moe_blocks.up")
    assert up.shape == (3, 6, 5, 4)
    chunks = {
        "moe_blocks.up": (1, 1, 5, 4),
        "moe_blocks.w": (1, 4, 5),
        "moe_blocks.scale": (1, 5),
        "dense_blocks.0.up": (1, 5, 4),
        "dense_blocks.0.w": (4, 5),
        "embed": (7, 500),
    }
    assert {name: stored("params", name).chunk_layout.read_chunk.shape for name in chunks} == chunks
    assert stored("training", "moments.0.mu.moe_blocks.up").chunk_layout.read_chunk.shape == (1, 1, 5, 4)
    np.testing.assert_array_equal(up[2, 3].read().result(), trees(1)[0].moe_blocks.up[2, 3])


def test_large_arrays_are_divided_and_come_back_bit_for_bit(tmp_path, monkeypatch):
    """Of layers and experts one, then the longest axes; steps stored in either way lie side by side."""
    manager = write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "CHUNK", 60)
    model, training = trees(2)
    manager.save(2, params=model, training=training, iterator={}, config={})
    manager.wait()
    for item, prefix in ("params", ""), ("training", "moments.0.mu."):
        stored = functools.partial(opened, tmp_path / "2", item)
        chunks = {"embed": (1, 5), "moe_blocks.up": (1, 1, 1, 4), "moe_blocks.w": (1, 4, 1), "moe_blocks.scale": (1, 5)}
        assert {name: stored(prefix + name).chunk_layout.read_chunk.shape for name in chunks} == chunks
    restored = manager.restore_latest(*abstract())
    assert_same((restored.params, restored.training), (model, training))
    assert_same(checkpoint.restore_params(tmp_path, abstract()[0], 1), trees(1)[0])
    manager.close()


def test_a_sharded_state_is_restored_as_asked(tmp_path):
    manager = write(tmp_path, 1)
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    model, training = abstract()
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "expert"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec if x.ndim == 4 else whole), model
    )
    restored = manager.restore_latest(sharded, training)
    assert restored.params.moe_blocks.up[...].sharding == spec
    assert_same(jax.device_get(restored.params), jax.device_get(trees(1)[0]))
    # And back: its checksums do not depend on the sharding.
    manager.save(2, params=restored.params, training=restored.training, iterator={}, config={})
    manager.wait()
    assert_same(manager.restore_latest(model, training).params, trees(1)[0])
    manager.close()


@pytest.mark.parametrize(("keep_last", "keep_every", "left"), [(2, None, [6, 7]), (1, 3, [3, 6, 7])])
def test_keep_last_and_keep_every(tmp_path, keep_last, keep_every, left):
    manager = write(tmp_path, *range(1, 8), keep_last=keep_last, keep_every=keep_every)
    assert manager.steps() == left
    manager.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == left


def test_donated_arrays_may_change_while_they_are_written(tmp_path):
    model, training = trees(1)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    model = bump(jax.tree.map(jnp.copy, model))
    before = jax.tree.map(np.array, model)
    manager = Checkpoints(tmp_path)
    manager.save(1, params=model, training=training, iterator={}, config={})
    for _ in range(20):
        model = bump(model)
    manager.wait()
    assert_same(jax.device_get(manager.restore_latest(*abstract()).params), before)
    manager.close()


def _largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "parameters gone": lambda step: shutil.rmtree(step / "params"),
    "manifest gone": lambda step: (step / "params" / "manifest.ocdbt").unlink(),
    "manifest empty": lambda step: (step / "params" / "manifest.ocdbt").write_bytes(b""),
    "names cut": lambda step: (step / "params" / "_METADATA").write_text('{"tree_metadata": {"('),
    "data gone": lambda step: _largest(step / "params").unlink(),
    "data cut": lambda step: _largest(step / "params").write_bytes(b"abc"),
    "one bit": lambda step: _flip_a_bit(_largest(step / "training")),
    "moments gone": lambda step: shutil.rmtree(step / "training"),
    "iterator gone": lambda step: shutil.rmtree(step / "iterator"),
    "iterator cut": lambda step: (step / "iterator" / "metadata").write_text('{"row": '),
    "iterator changed": lambda step: (step / "iterator" / "metadata").write_text('{"row": 3}'),
    "config empty": lambda step: (step / "config" / "metadata").write_text(""),
    "checksums gone": lambda step: shutil.rmtree(step / "checksums"),
    "step metadata cut": lambda step: (step / "_CHECKPOINT_METADATA").write_text('{"item'),
    "all empty": lambda step: [p.write_bytes(b"") for p in step.rglob("*") if p.is_file()],
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    write(folder, 1, 2).close()
    return folder


# Orbax closes its event loop over reads that have failed, and Python remarks on what was pending.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(intact, tmp_path, damage):
    folder, said = tmp_path / "run", []
    shutil.copytree(intact, folder)
    DAMAGE[damage](folder / "2")
    manager = Checkpoints(folder, report=said.append)
    restored = manager.restore_latest(*abstract())
    if damage != "step metadata cut":  # a file of Orbax's own, which nothing needs
        assert restored.step == 1
        assert_same(restored.params, trees(1)[0])
        assert len(said) == 1
        assert str(folder / "2") in said[0]
        assert "damaged (" in said[0]
        assert "damaged ()" not in said[0]
        assert (folder / "2.damaged").is_dir()
    model, training = trees(2)  # the run comes by this step again
    if restored.step == 1:
        manager.save(2, params=model, training=training, iterator={"row": 2}, config={})
        manager.wait()
    assert manager.restore_latest(*abstract()).step == 2
    manager.close()


def test_all_damaged_is_an_error_that_names_each_and_moves_none(intact, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(intact, folder)
    for step in "12":
        (folder / step / "iterator" / "metadata").write_text("{")
    manager = Checkpoints(folder, report=print)
    with pytest.raises(CheckpointError) as error:
        manager.restore_latest(*abstract())
    assert all(f"{folder / step}: " in str(error.value) for step in "12")
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_another_model_is_an_error_not_damage(intact, tmp_path):
    folder, said = tmp_path / "run", []
    shutil.copytree(intact, folder)
    manager = Checkpoints(folder, report=said.append)
    with pytest.raises(CheckpointError, match=r"embed is \(7, 500\), wanted \(8, 500\)"):
        manager.restore_latest(abstract(width=8)[0], abstract()[1])
    with pytest.raises(CheckpointError, match=r"embed is \(7, 500\), wanted \(8, 500\)"):
        checkpoint.restore_params(folder, abstract(width=8)[0])
    assert not said


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that failed in other tests
@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "embed"),
        ValueError('PERMISSION_DENIED: Error reading "embed"'),
        MemoryError("12 GB"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ],
    ids=repr,
)
def test_what_keeps_a_whole_checkpoint_from_being_read_is_not_damage(intact, tmp_path, monkeypatch, error):
    folder, said = tmp_path / "run", []
    shutil.copytree(intact, folder)
    manager = Checkpoints(folder, report=said.append)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_read", fail)
        for read in (lambda: manager.restore_latest(*abstract()), lambda: checkpoint.restore_params(folder, None)):
            with pytest.raises(CheckpointError, match=rf"{folder / '2'} cannot be read: .*; allow it to be read"):
                read()
    assert not said
    assert manager.restore_latest(*abstract()).step == 2
    manager.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as for reads that have failed
def test_a_full_disk_is_a_checkpoint_error(intact, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(intact, folder)
    manager = Checkpoints(folder)
    model, training = trees(3)
    with file_size_limit(2000):
        manager.save(3, params=model, training=training, iterator={}, config={})
        with pytest.raises(CheckpointError, match=f"cannot be written in {folder}: .*: make room"):
            manager.wait()
    manager.close()
    assert Checkpoints(folder).restore_latest(*abstract()).step == 2


def test_a_save_returns_before_its_arrays_are_written(tmp_path, monkeypatch):
    """Asynchronous: the step is complete only once `wait` has returned."""
    release, finalize = threading.Event(), ocp.CheckpointManager._finalize
    monkeypatch.setattr(ocp.CheckpointManager, "_finalize", lambda *a, **k: (release.wait(10), finalize(*a, **k))[1])
    manager = Checkpoints(tmp_path)
    model, training = trees(1)
    manager.save(1, params=model, training=training, iterator={}, config={})
    assert not (tmp_path / "1").exists()
    release.set()
    manager.wait()
    assert (tmp_path / "1").exists()
    manager.close()


def test_what_a_killed_save_left_behind_is_no_checkpoint(intact, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(intact, folder)
    shutil.copytree(intact / "2", folder / "3.orbax-checkpoint-tmp")
    manager = Checkpoints(folder)
    assert manager.steps() == [1, 2]
    assert manager.restore_latest(*abstract()).step == 2
    assert checkpoint.locate(folder).name == "2"
    manager.close()


def test_documents_are_plain_json(intact):
    assert json.loads((intact / "2" / "config" / "metadata").read_text()) == {"lr": 0.1, "at": [1, 2]}
