"""Checkpoints of {parameters, training state, data iterator, config}, written asynchronously and atomically with Orbax.

A run's folder holds one folder per step, which appears under its final name only when it is complete:

    120/params/       the model: a zarr tree of nested names, moe_blocks.experts.w_up and so on, no Python class names
    120/training/     optimizer moments, counters and random key, the same way
    120/iterator/     JSON: where the data stands
    120/config/       JSON: the experiment
    120/checksums/    JSON: a 32-bit sum of every array and document above, checked when they are read back

Scan-stacked arrays are stored in chunks of one layer (and one expert), and any array in chunks of at most 64 MiB, so
that export can stream slices of a model larger than memory. A checkpoint made from released weights
(`dsv2_jax.hf.convert`) has no training and no iterator, its config is {"model": ...}, and its arrays keep the type of
those weights.
"""

import contextlib
import functools
import json
import operator
import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

ARRAYS = ("params", "training")
DOCUMENTS = ("iterator", "config")
CHUNK = 64 * 2**20  # bytes of the largest piece in which an array is stored


class CheckpointError(RuntimeError):
    """No checkpoint can be used; the message names the folder, the step and what is wrong with it."""


@dataclass(frozen=True)
class Restored:
    """What one checkpoint held."""

    step: int
    params: object  # as `abstract_params`, with arrays
    training: object
    iterator: dict
    config: dict


# --- pytrees and names -----------------------------------------------------------------------------------------------


def _is_parameter(x) -> bool:
    return isinstance(x, nnx.Variable)


def _names(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _nest(flat: dict[tuple[str, ...], object]) -> dict:
    """{("a", "b"): 1} -> {"a": {"b": 1}}"""
    result = {}
    for (*parents, last), leaf in flat.items():
        node = result
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return result


def to_dict(tree) -> dict:
    """Any pytree (modules, dataclasses, optimizer states) as nested dicts of its arrays under plain, stable names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_parameter)
    return _nest({_names(path): jax.tree.leaves(leaf)[0] for path, leaf in leaves})


def from_dict(like, values: dict):
    """The inverse of `to_dict`: a pytree of the structure of `like` with the arrays of `values`."""

    def find(path, leaf):
        value = functools.reduce(operator.getitem, _names(path), values)
        return jax.tree.map(lambda _: value, leaf)

    return jax.tree_util.tree_map_with_path(find, like, is_leaf=_is_parameter)


def _save_args(tree) -> dict:
    """How each array of `to_dict(tree)` is stored: layers (axes a scan added) and experts in chunks of one.

    What is then still larger than `CHUNK`, as the embeddings are, is divided along its longest axes.
    """

    def arguments(leaf):
        if not _is_parameter(leaf):
            return ocp.SaveArgs(chunk_byte_size=CHUNK)
        axes = leaf.get_metadata("axes")
        layers = jax.tree.leaves(leaf)[0].ndim - len(axes)
        single = tuple(range(layers + (axes[0] == "expert")))
        return ocp.SaveArgs(shard_axes=single, chunk_byte_size=CHUNK)

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_parameter)
    return _nest({_names(path): arguments(leaf) for path, leaf in leaves})


def _flat(values: dict) -> dict[str, object]:
    """{"moe_blocks/attention/w_q": array}"""
    return {"/".join(_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(values)}


# --- checksums -------------------------------------------------------------------------------------------------------


@jax.jit
def _word_sums(tree: dict) -> dict:
    """The sum modulo 2^32 of the 32-bit words (or narrower) of every array: the same however the array is sharded."""

    def word_sum(x):
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(word_sum, tree)


def _array_sums(tree: dict) -> dict[str, int]:
    return {name: int(value) for name, value in _flat(jax.device_get(_word_sums(tree))).items()}


def _document_sum(document: dict) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


# --- writing and reading ---------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of a run in `folder`: the newest `keep_last`, and for good those at multiples of `keep_every`."""

    def __init__(self, folder: str | epath.Path, *, keep_last: int = 3, keep_every: int | None = None, report=print):
        self.folder = _absolute(folder)
        self.report = report
        kept = {"max_to_keep": keep_last, "keep_period": keep_every}
        options = ocp.CheckpointManagerOptions(**kept, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """The steps of which there is a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, *, params, training, iterator: dict, config: dict) -> None:
        """Start to write one checkpoint; returns when the arrays are copied, so that the caller may donate them.

        A second save waits for the first. An error of the previous save, such as a full disk, is raised here.
        """
        trees = {"params": params, "training": training}
        arrays = {name: to_dict(tree) for name, tree in trees.items()}
        documents = {"iterator": iterator, "config": config}
        sums = {name: _array_sums(tree) for name, tree in arrays.items()}
        sums |= {name: _document_sum(document) for name, document in documents.items()}
        items = {name: ocp.args.PyTreeSave(arrays[name], save_args=_save_args(tree)) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonSave(document) for name, document in documents.items()}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items, checksums=ocp.args.JsonSave(sums)), force=True)

    def wait(self) -> None:
        """Block until the checkpoint being written is complete; raises `CheckpointError` where it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait, as `wait` does, and end the threads that write."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except jax.errors.JaxRuntimeError:  # another process is gone
            raise
        except Exception as error:
            what = f"a checkpoint cannot be written in {self.folder}: {_first_line(error)}"
            remedy = "make room or mend that; started again, the run goes on from its last checkpoint"
            raise CheckpointError(f"{what}: {remedy}") from error

    def restore_latest(self, abstract_params, abstract_training) -> Restored | None:
        """The newest checkpoint that is whole, or None where there is none yet.

        `abstract_*` give the structure, shapes, types and (where set) shardings. A damaged checkpoint is reported and
        the one before it used; it is moved aside to `<step>.damaged`, so that the run can write that step again.
        Raises `CheckpointError` when every checkpoint is damaged, when a whole one holds another model, and when one
        cannot be read for another reason: no permission, no memory.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, {"params": abstract_params, "training": abstract_training})
            except Exception as error:
                damaged[step] = _damage(error, self.folder / str(step))
                restored = None
            if _everywhere(restored is not None):
                self._move_aside(damaged, instead=step)
                return restored
            damaged.setdefault(step, "damaged as another process reads it")
        if damaged:
            reasons = "\n".join(f"  {self.folder / str(step)}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"every checkpoint is damaged:\n{reasons}\n"
                f"Put back a good copy, or move {self.folder} away to start the run from the beginning."
            )
        return None

    def _restore(self, step: int, abstract: dict) -> Restored:
        values = _read(self.folder / str(step), {name: to_dict(tree) for name, tree in abstract.items()}, DOCUMENTS)
        values |= {name: from_dict(abstract[name], values[name]) for name in ARRAYS}
        return Restored(step=step, **values)

    def _move_aside(self, damaged: dict[int, str], instead: int) -> None:
        for step, reason in damaged.items():
            path = self.folder / str(step)
            self.report(f"checkpoint {path} is damaged ({reason}); using step {instead}, keeping it as {path}.damaged")
            if jax.process_index() == 0:
                target = path.with_name(f"{step}.damaged")
                number = 1
                while target.exists():
                    number += 1
                    target = path.with_name(f"{step}.damaged{number}")
                path.rename(target)
        if damaged:
            _everywhere(True)
            self._manager.reload()


def restore_params(path: str | epath.Path, abstract_params, step: int | None = None):
    """Only the model of a checkpoint (the newest, or the one of `step`); the optimizer's arrays are not read.

    `path` is a run's folder, its folder of checkpoints, or one checkpoint. Arrays stored in another type than asked for
    are cast when their checksums have been found right. Raises `CheckpointError`, also when the checkpoint holds
    another model than `abstract_params`.
    """
    folder = locate(path, step)
    try:
        values = _read(folder, {"params": to_dict(abstract_params)}, ())
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged: {_damage(error, folder)}") from error
    return from_dict(abstract_params, values["params"])


def load_config(path: str | epath.Path, step: int | None = None) -> dict:
    """The experiment's config as it was saved (`path` and `step` as for `restore_params`), in plain dicts and lists."""
    folder = locate(path, step)
    try:
        return _read_here(folder, {}, ("config",))[1]["config"]
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged: {_damage(error, folder)}") from error


def write_documents(folder: epath.Path, config: dict, sums: dict[str, int]) -> None:
    """Make `folder`, with a model's arrays in its `params` and nothing else, a checkpoint.

    `sums`: of every array, under its names joined by "/", the sum modulo 2^32 of its words.
    """
    documents = {"config": config, "checksums": {"params": sums, "config": _document_sum(config)}}
    for name, document in documents.items():
        (folder / name).mkdir(exist_ok=True)
        ocp.JsonCheckpointHandler().save(folder / name, args=ocp.args.JsonSave(document))


def load_checksums(folder: epath.Path) -> dict[str, int]:
    """Those of the model's arrays in one checkpoint, as `write_documents` takes them."""
    try:
        return ocp.JsonCheckpointHandler().restore(folder / "checksums")["params"]
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged: {_damage(error, folder)}") from error


def locate(path: str | epath.Path, step: int | None = None) -> epath.Path:
    """The folder of one checkpoint in a run's folder, in its folder of checkpoints, or `path` itself if it is one."""
    path = _absolute(path)
    if (path / "checksums").is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(int(child.name) for child in folder.glob("*") if child.name.isdigit())
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"{folder}: {wanted} here; steps there are: {', '.join(map(str, steps)) or 'none'}")
    return folder / str(steps[-1] if step is None else step)


def _absolute(path: str | epath.Path) -> epath.Path:
    path = epath.Path(path)
    return path if "://" in str(path) else path.absolute()


class _Mismatch(CheckpointError, ValueError):
    """A whole checkpoint that holds other arrays than asked for: not damage, so no older one is tried."""


# What stops the reading of a whole checkpoint; TensorStore and XLA say it in words alone.
NOT_DAMAGE = ("PERMISSION_DENIED", "Permission denied", "RESOURCE_EXHAUSTED", "Too many open files")


def _damage(error: Exception, folder: epath.Path) -> str:
    """What is damaged in the checkpoint `folder`, in one line; raises where `error` is no sign of damage."""
    if isinstance(error, _Mismatch):
        raise error
    if isinstance(error, (PermissionError, MemoryError)) or any(words in str(error) for words in NOT_DAMAGE):
        remedy = "allow it to be read, or free memory, and start again"
        raise CheckpointError(f"{folder} cannot be read: {_first_line(error)}; {remedy}") from error
    return _first_line(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:400]


def _everywhere(ok: bool) -> bool:
    """Whether `ok` holds in every process."""
    return ok if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _in_all(function):
    """What `function` gives, which waits for no other process; an error in one process is an error in all.

    So that none goes on alone to what all must do together.
    """
    result = failed = None
    try:
        result = function()
    except Exception as error:
        failed = error
    if not _everywhere(failed is None):
        raise failed or CheckpointError("damaged as another process reads it")
    return result


def _read(folder: epath.Path, abstract: dict[str, dict], documents: tuple[str, ...]) -> dict:
    """The named array trees and documents of one checkpoint, checked against their shapes and their checksums.

    All processes call it alike.
    """
    sums, values = _in_all(lambda: _read_here(folder, abstract, documents))
    for name, tree in abstract.items():
        wrong = [array for array, value in _array_sums(values[name]).items() if sums[name].get(array) != value]
        if wrong:
            raise CheckpointError(f"{name}: the checksum of {', '.join(wrong[:3])} is wrong ({len(wrong)} arrays)")
        values[name] = jax.tree.map(_cast, values[name], tree)
    return values


def _read_here(folder: epath.Path, abstract: dict[str, dict], documents: tuple[str, ...]) -> tuple[dict, dict]:
    """All checksums; the arrays as they are stored, of each this process's part, and the documents, found right."""
    sums = ocp.JsonCheckpointHandler().restore(folder / "checksums")
    values = {}
    for name, tree in abstract.items():
        if name not in sums:
            raise _Mismatch(f"{folder} holds a model alone, no {name}: a run cannot go on from it, only begin with it")
        handler = ocp.PyTreeCheckpointHandler()
        stored = handler.metadata(folder / name).tree
        _check_shapes(folder / name, tree, stored)
        values[name] = handler.restore(folder / name, args=_restore_args(tree, stored))
    for name in documents:
        values[name] = ocp.JsonCheckpointHandler().restore(folder / name)
        if _document_sum(values[name]) != sums[name]:
            raise CheckpointError(f"{name}: its checksum is wrong")
    return sums, values


def _restore_args(tree: dict, stored: dict):
    """Arrays are read as they are stored, with the sharding of the abstract leaf; without one to the first device."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def array(leaf, stored):
        return ocp.ArrayRestoreArgs(dtype=stored.dtype, sharding=leaf.sharding or default, global_shape=leaf.shape)

    return ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(array, tree, stored))


def _cast(x: jax.Array, like) -> jax.Array:
    """`x` in the type of `like`; then its own memory is given back, so that two models are never held."""
    if x.dtype == like.dtype:
        return x
    cast = jax.block_until_ready(x.astype(like.dtype))
    x.delete()
    return cast


def _check_shapes(folder: epath.Path, wanted: dict, saved: dict) -> None:
    saved = {name: tuple(leaf.shape) for name, leaf in _flat(saved).items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in _flat(wanted).items()}
    different = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
    if different:
        lines = [f"{name} is {saved.get(name, 'absent')}, wanted {wanted.get(name, 'absent')}" for name in different]
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise _Mismatch(f"{folder} holds another model or optimizer: {'; '.join(lines[:5])}{more}. Use its own config.")
