import itertools
import os
import signal
import threading

import pytest

from dsv2_jax.config import DataError
from dsv2_jax.data.prefetch import Ahead, Workers


def test_workers_take_turns_and_one_killed_inside_an_item_is_an_error():
    items = [[bytes([i]) * 300_000] * 5 for i in range(2)]  # larger than a pipe: a worker waits inside an item
    workers = Workers(items)
    try:
        assert [next(workers)[0] for _ in range(4)] == [0, 1, 0, 1]
        os.kill(workers.processes[0].pid, signal.SIGKILL)
        workers.processes[0].join()
        with pytest.raises(DataError, match="data worker 0 died with exit code -9"):
            next(workers)
        assert next(workers)[0] == 1
    finally:
        workers.close()
    assert not any(process.is_alive() for process in workers.processes)
    workers.close()


def test_ahead_keeps_order_bounds_its_depth_and_brings_errors_in_their_turn():
    made = []

    def items():
        for i in range(6):
            made.append(i)
            yield i
        raise ValueError("the source failed")

    ahead = Ahead(items(), 2)
    assert next(ahead) == 0
    assert len(made) <= 4  # taken, two waiting, one in hand
    assert [next(ahead) for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="the source failed"):
        next(ahead)
    ahead.close()


def test_ahead_closes_while_its_thread_waits_for_room():
    before = threading.active_count()
    ahead = Ahead(itertools.count(), 1)
    next(ahead)
    ahead.close()
    ahead.close()
    assert threading.active_count() == before
