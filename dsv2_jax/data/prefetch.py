"""Items made ahead of need: in a thread, or in processes behind it. The order never changes."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import queue
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence

from dsv2_jax.config import DataError


def _work(items: Iterable, connection: multiprocessing.connection.Connection) -> None:
    """A worker process: sends items, blocking while the pipe is full, until the trainer's end of the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the trainer, which may want to finish its step
        signal.signal(number, signal.SIG_IGN)
    try:
        for item in items:
            connection.send(item)
    except BrokenPipeError:
        pass  # the trainer is gone
    except Exception as error:
        connection.send(error)


class Workers:
    """Makes the items of `parts` in one process each, and takes one from each in turn.

    One pipe a worker and nothing else shared: a worker killed at any point is an end of file here, and a trainer killed
    at any point a broken pipe there. Close this before the thread that iterates over it. (Grain's `mp_prefetch` was
    measured slower than no worker: 1 ms a row.)
    """

    def __init__(self, parts: Sequence[Iterable]):
        context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads and locks
        self.processes, self._connections, self._turn = [], [], 0
        # At interpreter exit multiprocessing waits for its children: they must have been killed before.
        self.close = multiprocessing.util.Finalize(self, _kill, (self.processes,), exitpriority=1)
        for worker, part in enumerate(parts):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(part, theirs), daemon=True, name=f"data-worker-{worker}")
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)

    def __next__(self):
        worker, self._turn = self._turn, (self._turn + 1) % len(self.processes)
        try:
            item = self._connections[worker].recv()
        except (EOFError, OSError) as error:  # at, or inside of, an item
            self.processes[worker].join(5)
            code = self.processes[worker].exitcode
            what = f"data worker {worker} died with exit code {code}: see its output above"
            raise DataError(f"{what}; -9 is often lack of memory, then lower DataConfig.workers") from error
        if isinstance(item, Exception):
            raise item
        return item


def _kill(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()  # it holds nothing but its pipe
    for process in processes:
        process.join()


class Ahead:
    """Takes from an iterator in a thread, up to `depth` items ahead; its error comes out where the item would have.

    (Grain's thread prefetch would do, but fails noisily in its `__del__` at interpreter exit.)
    """

    def __init__(self, items: Iterator, depth: int):
        self._queue, self._stopping = queue.Queue(depth), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True, name="data")
        self._thread.start()

    def _run(self, items: Iterator) -> None:
        try:
            while not self._stopping.is_set():
                self._queue.put(next(items))
        except Exception as error:
            self._queue.put(error)

    def __next__(self):
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self._stopping.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)  # makes room, in case the thread waits for it
