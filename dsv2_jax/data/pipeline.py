"""Prepared documents -> packed batches, in an order that depends on the data and the seed alone.

Virtual shard v reads the v-th prepared file of every source: each is reshuffled every epoch, the sources are mixed by
weight, and the documents packed into an endless stream of rows. Row r of the run is the next row of shard
r % virtual_shards; process p of P owns the rows, and so the shards, with r % P == p. Hence neither processes nor
workers nor batch sizes change the order, and the place in it is one small JSON value: rows consumed and, per shard,
documents finished and the offset in the next.
"""

import dataclasses
import itertools
import os
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsv2_jax.config import ConfigError, DataConfig, DataError, check
from dsv2_jax.data.packing import pack, to_batch
from dsv2_jax.data.prefetch import Ahead, Workers
from dsv2_jax.data.prepared import AGAIN, Records, check_documents, read_manifest, train_file
from dsv2_jax.types import Batch

# --- virtual shards --------------------------------------------------------------------------------------------------


class _Source:
    """The documents of one source in one shard, endless: reshuffled every epoch, by (seed, shard, source, epoch)."""

    def __init__(self, records: Records, weight: float, entropy: tuple[int, ...]):
        self.records, self.weight, self._entropy = records, weight, entropy
        self.phase = int(np.random.SeedSequence(entropy).generate_state(1)[0]) / 2**32  # in [0, 1)
        self._epoch = self._order = None

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, index = divmod(index, len(self.records))
        if epoch != self._epoch:
            # RandomState: its streams are frozen for good. (Grain's shuffle costs ms a document in small shards.)
            random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((*self._entropy, epoch))))
            self._epoch, self._order = epoch, np.arange(len(self.records), dtype=np.uint32)
            random.shuffle(self._order)
        return self.records[int(self._order[index])]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One virtual shard: an endless, mixed stream of documents, addressed by how many each source has given so far."""

    sources: tuple[_Source, ...]
    present: tuple[int, ...]  # the sources that have documents here

    def next_source(self, counts: Sequence[int]) -> int:
        """The source whose next document is due first: document j is due at (j + phase) / weight.

        Shares are exact within one document at all times, for any weights. The phases keep shards from drawing a rare
        source all at once, as they do under Grain's mix, which also rounds weights to a hundredth of the smallest.
        """
        due = [(counts[s] + self.sources[s].phase) / self.sources[s].weight for s in self.present]
        return self.present[due.index(min(due))]

    def documents(self, counts: Sequence[int]) -> Iterator[np.ndarray]:
        counts = list(counts)
        while True:
            source = self.next_source(counts)
            yield self.sources[source][counts[source]]
            counts[source] += 1

    def rows(self, cursor: Sequence[int], sequence_length: int) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
        """Yields (row_4T, cursor after it); a cursor is the documents finished per source, and the offset."""
        *counts, start = cursor
        seen = 0
        for row_4T, finished, offset in pack(self.documents(counts), sequence_length, start):
            for _ in range(finished - seen):
                counts[self.next_source(counts)] += 1
            seen = finished
            yield row_4T, (*counts, offset)


def _open_shard(prepared: Path, config: DataConfig, vocab_size: int, shard: int) -> _Shard:
    sources = []
    for source in config.sources:
        records = Records(train_file(prepared, source.name, shard, config.virtual_shards), vocab_size)
        sources.append(_Source(records, source.weight, (config.seed, shard, zlib.crc32(source.name.encode()))))
    present = tuple(i for i, source in enumerate(sources) if len(source.records))
    if not present:
        must = f"be smaller, or the data larger: shard {shard} has no training document of any source"
        raise ConfigError(f"DataConfig.virtual_shards={config.virtual_shards}: must {must}")
    return _Shard(tuple(sources), present)


@dataclasses.dataclass
class _Rows:
    """Rows `start`, `start + step`, ... of the run: pairs (row_4T, cursor of its shard after it)."""

    shards: dict[int, _Shard]
    cursors: dict[int, tuple[int, ...]]
    virtual_shards: int
    sequence_length: int
    start: int
    step: int

    def __iter__(self) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
        streams = {shard: self.shards[shard].rows(self.cursors[shard], self.sequence_length) for shard in self.shards}
        for row in itertools.count(self.start, self.step):
            yield next(streams[row % self.virtual_shards])

    def part(self, worker: int, workers: int) -> "_Rows":
        """The rows of one worker, with the shards they come from; `workers` divides the number of shards."""
        start, step = self.start + worker * self.step, workers * self.step
        owned = {row % self.virtual_shards for row in range(start, start + self.virtual_shards * self.step, step)}
        shards = {shard: self.shards[shard] for shard in sorted(owned)}
        return dataclasses.replace(self, shards=shards, start=start, step=step)


# --- the two iterators -----------------------------------------------------------------------------------------------


class TrainIterator:
    """Endless packed training rows of this process; see the module's docstring for their order.

    prepared: the prepared folder. config: its sources, weights, virtual_shards, seed and workers are read.
    token_bytes_V: `Tokenizer.token_bytes()`. process_index, process_count: which of how many processes that read
    different rows this is. prefetch: rows packed ahead; at least one step's rows of this process keep a device fed.
    workers = 0 packs in a thread; more start that many processes (at most one per owned shard, lowered to a divisor of
    their number), by "spawn": a script needs its `if __name__ == "__main__"`. They start with the first `next`.

    Raises ConfigError for settings that do not fit the data or each other; DataError, naming the file, for missing or
    damaged data, and from `next` when a worker process died. After an error the place is as before the failed `next`.
    Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        prepared: str | os.PathLike,
        config: DataConfig,
        sequence_length: int,
        token_bytes_V: np.ndarray,
        *,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 64,
    ):
        prepared, names = Path(prepared), [source.name for source in config.sources]
        check(sequence_length > 0, "sequence_length", sequence_length, "be positive")
        check(prefetch > 0, "prefetch", prefetch, "be positive")
        check(0 <= process_index < process_count, "process_index", process_index, f"lie in 0..{process_count - 1}")
        ok = config.virtual_shards % process_count == 0
        check(ok, "DataConfig.virtual_shards", config.virtual_shards, f"be a multiple of the {process_count} processes")
        manifest = read_manifest(prepared, token_bytes_V)
        for name in names:
            known = ", ".join(manifest["sources"])
            check(name in manifest["sources"], "SourceConfig.name", name, f"be prepared (are: {known}), or {AGAIN}")
        owned = range(process_index, config.virtual_shards, process_count)
        self._shards = {shard: _open_shard(prepared, config, len(token_bytes_V), shard) for shard in owned}
        if process_count == 1:
            for i, name in enumerate(names):
                found = sum(len(shard.sources[i].records) for shard in self._shards.values())
                check_documents(prepared, name, "train", found, manifest["sources"][name]["train"]["documents"])
        self._order = {  # what the meaning of a place depends on
            "virtual_shards": config.virtual_shards,
            "seed": config.seed,
            "sources": {s.name: {"weight": s.weight, **manifest["sources"][s.name]["train"]} for s in config.sources},
        }
        self._token_bytes_V, self._sequence_length, self._prefetch = token_bytes_V, sequence_length, prefetch
        self._process_index, self._process_count = process_index, process_count
        self._worker_count = max((w for w in range(1, config.workers + 1) if len(self._shards) % w == 0), default=0)
        self._row, self._workers, self._stream, self._stop = 0, None, None, lambda: None
        self._cursors = {shard: (0,) * (len(names) + 1) for shard in self._shards}

    def next(self, rows: int) -> Batch:
        """This process's share, rows / process_count, of the next `rows` rows of the run, as NumPy arrays."""
        ok = rows > 0 and rows % self._process_count == 0
        check(ok, "rows", rows, f"be a positive multiple of the {self._process_count} processes")
        try:
            if self._stream is None:
                self._start()
            packed = [next(self._stream) for _ in range(rows // self._process_count)]
        except BaseException:
            self.close()
            raise
        first = self._first_row()
        for i, (_, cursor) in enumerate(packed):
            self._cursors[(first + i * self._process_count) % self._order["virtual_shards"]] = cursor
        self._row += rows
        return to_batch([row_4T for row_4T, _ in packed], self._token_bytes_V)

    def get_state(self) -> dict:
        """The place as a JSON value, for this process's shards; `merge_states` joins those of all processes."""
        names, shards = list(self._order["sources"]), {}
        for shard, (*counts, offset) in self._cursors.items():
            shards[str(shard)] = {"documents": dict(zip(names, counts, strict=True)), "offset": offset}
        return {"version": 1, "row": self._row, **self._order, "shards": shards}

    def set_state(self, state: dict) -> None:
        """Goes to a place saved by any number of processes and workers; it must cover this process's shards."""
        for key, value in {"version": 1, **self._order}.items():
            if (saved := state.get(key)) != value:
                what = f"data state: {key} was {saved!r} when it was saved and is {value!r} now"
                raise ConfigError(f"{what}: restore it, or start the data from the beginning")
        missing = [shard for shard in self._shards if str(shard) not in state["shards"]]
        if missing:
            raise ConfigError(f"data state lacks shards {missing}: merge_states of all processes' states holds them")
        self.close()
        self._row = state["row"]
        for shard in self._shards:
            place = state["shards"][str(shard)]
            self._cursors[shard] = (*(place["documents"][name] for name in self._order["sources"]), place["offset"])

    def close(self) -> None:
        """Stops the thread or the workers. The place is kept, and `next` starts them again."""
        self._workers = self._stream = None
        self._stop()

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers: none before the first `next`, without workers and after `close`."""
        return [process.pid for process in self._workers.processes] if self._workers else []

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _first_row(self) -> int:
        return self._row + (self._process_index - self._row) % self._process_count

    def _start(self) -> None:
        shards, length = self._order["virtual_shards"], self._sequence_length
        rows = _Rows(self._shards, dict(self._cursors), shards, length, self._first_row(), self._process_count)
        self._workers = None
        if self._worker_count:
            self._workers = Workers([rows.part(w, self._worker_count) for w in range(self._worker_count)])
        self._stream = Ahead(self._workers or iter(rows), self._prefetch)
        self._stop = weakref.finalize(self, _stop, self._workers, self._stream)  # runs once; at exit at the latest


def _stop(workers: Workers | None, stream: Ahead) -> None:
    if workers is not None:
        workers.close()  # first, for the thread may be waiting for one
    stream.close()


def merge_states(states: Sequence[dict]) -> dict:
    """The states of all processes at one step as one that any number of processes resumes from."""
    if not states:
        raise ValueError("merge_states needs at least one state")
    first, shards = states[0], {}
    for state in states:
        if {**state, "shards": None} != {**first, "shards": None}:
            raise ValueError(f"data states of different steps or data: rows {first['row']} and {state['row']}")
        shards |= state["shards"]
    missing = sorted(set(map(str, range(first["virtual_shards"]))) - set(shards), key=int)
    if missing:
        raise ValueError(f"data states lack shards {', '.join(missing)}: pass the state of every process")
    return {**first, "shards": {shard: shards[shard] for shard in sorted(shards, key=int)}}


def held_out_batches(
    prepared: str | os.PathLike,
    sequence_length: int,
    batch_size: int,
    token_bytes_V: np.ndarray,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over all held-out documents, in an order that never changes; the last batch ends in rows of padding.

    The first documents of all files come first, then all second ones, so that few batches already see every source.
    A process gets its block of batch_size / process_count rows of every batch, and as many batches as the others.
    Raises as `TrainIterator` does.
    """
    prepared = Path(prepared)
    ok = 0 <= process_index < process_count and batch_size > 0 and batch_size % process_count == 0
    check(ok, "batch_size", batch_size, f"be a positive multiple of the {process_count} processes")
    files = []
    for name, source in read_manifest(prepared, token_bytes_V)["sources"].items():
        paths = sorted((prepared / name).glob("held_out-*-of-*.arrayrecord"))
        records = [Records(path, len(token_bytes_V)) for path in paths]
        check_documents(prepared, name, "held_out", sum(map(len, records)), source["held_out"]["documents"])
        files += records
    if not any(map(len, files)):
        raise DataError(f"{prepared} has no held-out document: raise DataConfig.held_out_share and {AGAIN}")
    return _held_out(files, sequence_length, batch_size, token_bytes_V, process_index, process_count)


def _held_out(files, sequence_length, batch_size, token_bytes_V, process_index, process_count) -> Iterator[Batch]:
    longest = max(map(len, files))
    documents = (records[i] for i in range(longest) for records in files if i < len(records))
    packed = (row_4T for row_4T, _, _ in pack(documents, sequence_length))
    share = batch_size // process_count
    padding = np.zeros((4, sequence_length), np.int32)
    while rows := list(itertools.islice(packed, batch_size)):
        rows += [padding] * (batch_size - len(rows))
        yield to_batch(rows[process_index * share : (process_index + 1) * share], token_bytes_V)
