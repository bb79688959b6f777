"""Batches from the processes that read them to the devices that compute them, and agreement between processes."""

import contextlib
import json
import os
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from dsv2_jax import sharding
from dsv2_jax.config import ConfigError
from dsv2_jax.model.parallel import zigzag
from dsv2_jax.types import Batch


class Placing:
    """Which rows of a batch this process reads, and where they go.

    The rows of a batch are shared out among `readers`: the processes, or groups of them where the mesh puts one row on
    several (then each of a group reads the same). Reader `reader` reads rows reader, reader + readers, ... of the run,
    as `data.pipeline.TrainIterator` gives them; they go side by side to the places of its devices. Hence the rows of a
    step, and of each of its microbatches, do not depend on the number of processes.
    """

    def __init__(self, mesh: Mesh | None, batch_size: int):
        """batch_size: rows computed at once; any one the mesh can split tells who reads what."""
        self.mesh, self.reader, self.readers = mesh, 0, 1
        self.run_rows: np.ndarray | None = None  # which row of those read together stands at each place; None: in order
        if mesh is None:
            if jax.process_count() > 1:
                raise ConfigError(f"mesh=None: {jax.process_count()} processes need one, such as fsdp=rest")
            return
        places = _places(mesh, batch_size)
        groups = sorted(set(places.values()))
        if sum(map(len, groups)) != batch_size or len({len(group) for group in groups}) > 1:
            text = "; ".join(f"process {process}: {len(rows)} rows" for process, rows in sorted(places.items()))
            raise ConfigError(
                f"mesh: the processes would share the {batch_size} rows of a batch unevenly ({text}); let "
                "tensor x context divide the devices of a process, or be a multiple of them"
            )
        self.reader, self.readers = groups.index(places[jax.process_index()]), len(groups)
        if self.readers > 1:
            self.run_rows = np.zeros(batch_size, np.int32)
            for reader, held in enumerate(groups):
                self.run_rows[list(held)] = np.arange(reader, batch_size, self.readers)

    def put(self, batch: Batch, microbatches: bool = False) -> Batch:
        """This reader's rows [b, T] (or [microbatches, b, T]), NumPy arrays, as part of the batch on the mesh.

        Where `context` splits sequences, their columns are brought in the order of `zigzag`.
        """
        if self.mesh is None:
            return batch
        names = (None, "batch", "sequence") if microbatches else ("batch", "sequence")
        where = NamedSharding(self.mesh, sharding.activation_spec(*names))
        local = batch.tokens_BT.shape
        rows, order = local[-2] * self.readers, zigzag(local[-1], self.mesh.shape["context"])
        shape = (*local[:-2], rows, local[-1])
        mine = _places(self.mesh, rows)[jax.process_index()]
        at = {row: i for i, row in enumerate(mine)}

        def put(x):
            x = np.asarray(x)[..., order]

            def part(index):
                *outer, place, columns = index
                first = at[place.start or 0]
                size = len(range(*place.indices(rows)))
                return x[(*outer, slice(first, first + size), columns)]

            return jax.make_array_from_callback(shape, where, part)

        return jax.tree.map(put, batch)


def _places(mesh: Mesh, rows: int) -> dict[int, tuple[int, ...]]:
    """The rows of a batch that the devices of each process hold."""
    where = NamedSharding(mesh, sharding.activation_spec("batch"))
    places: dict[int, set[int]] = {}
    for device, (index,) in where.devices_indices_map((rows,)).items():
        places.setdefault(device.process_index, set()).update(range(*index.indices(rows)))
    return {process: tuple(sorted(held)) for process, held in places.items()}


# --- agreement between processes -------------------------------------------------------------------------------------


def gather_json(value) -> list:
    """The `value`s of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first_process_first(function: Callable[[], object]):
    """Call `function`, which prepares files that all processes share, in process 0 before the others.

    What it raises there ends the others too, as a `ConfigError` that says so.
    """
    if jax.process_count() == 1:
        return function()
    result = error = None
    if jax.process_index() == 0:
        try:
            result = function()
        except Exception as raised:
            error = raised
    (reason, *_) = gather_json(error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if reason is not None:
        raise ConfigError(f"process 0 ended: {reason}")
    return result if jax.process_index() == 0 else function()


@contextlib.contextmanager
def ending_with_the_others():
    """Ends this process with a message when another of several is gone: no cleanup can succeed that waits for it.

    If nothing fails here, JAX itself aborts the process once the other has been silent for the heartbeat timeout. What
    this process ran out of, memory, is its own failure.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        print(
            f"error: process {jax.process_index()} stopped, as another has ended or cannot be reached "
            f"({str(error).splitlines()[0][:200]}). Start all again: the run goes on from its last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


class Agreement:
    """Whether any process has raised its hand: known to all at the same step, one step late, so that nobody waits."""

    def __init__(self, mesh: Mesh | None):
        self._pending, self._where = None, None
        if jax.process_count() > 1:
            self._where = NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
            self._shape = (mesh.size,)
            whole = NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._any = jax.jit(lambda x: x.max(), out_shardings=whole)

    def ask(self, raised: bool) -> bool:
        """Says `raised` for this process; returns what all said at the call before (alone: now)."""
        if self._where is None:
            return raised
        hands = jax.make_array_from_callback(
            self._shape,
            self._where,
            lambda index: np.full(len(range(*index[0].indices(*self._shape))), raised, np.int32),
        )
        pending, self._pending = self._pending, self._any(hands)
        return pending is not None and bool(pending)
