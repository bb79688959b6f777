import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import quick

from dsv2_jax.config import ConfigError, DataConfig, DataError, SourceConfig
from dsv2_jax.data.pipeline import TrainIterator, held_out_batches, merge_states

BOS, EOS, VOCAB, SHARDS, T = 1, 2, 300, 8, 32
TOKEN_BYTES = np.where(np.arange(VOCAB) < 3, 0, np.arange(VOCAB) % 7 + 1)


def write(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for ids in documents:
        writer.write(np.asarray(ids, "<u4").tobytes())
    writer.close()


def prepare(folder, sources, shards=SHARDS):
    """Writes the prepared folder; returns {source: {split: [documents of shard 0, ...]}}."""
    random, written, counts = np.random.default_rng(0), {}, {}
    for name, sizes in sources.items():
        written[name], counts[name] = {}, {}
        for split, size in zip(("train", "held_out"), sizes, strict=True):
            bodies = [random.integers(3, VOCAB, random.integers(6, 90)).tolist() for _ in range(size)]
            documents = [(BOS, *body, EOS) for body in bodies]
            written[name][split] = [documents[v::shards] for v in range(shards)]
            for v, part in enumerate(written[name][split]):
                write(folder / name / f"{split}-{v:05d}-of-{shards:05d}.arrayrecord", part)
            tokens = sum(map(len, documents))
            counts[name][split] = {"documents": size, "tokens": tokens, "bytes": tokens}
    manifest = {"version": 1, "vocab_size": VOCAB, "bos": BOS, "eos": EOS, "sources": counts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return written


def settings_of(weights, workers=0, shards=SHARDS, seed=0):
    sources = tuple(SourceConfig(name, ("unused",), weight) for name, weight in weights.items())
    return DataConfig(sources=sources, virtual_shards=shards, workers=workers, seed=seed)


WEIGHTS = {"code": 3.0, "web": 1.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return folder, prepare(folder, {"code": (90, 12), "web": (50, 7)})


def iterate(folder, weights=WEIGHTS, process=(0, 1), **kwargs):
    config = settings_of(weights, **kwargs)
    index, count = process
    return TrainIterator(folder, config, T, TOKEN_BYTES, process_index=index, process_count=count, prefetch=8)


def stacked(batch):
    return np.stack([np.asarray(array, np.int64) for array in vars(batch).values()], axis=1)  # [rows, planes, T]


@pytest.fixture(scope="module")
def reference(data):
    """The first 800 rows of the run, one process, no worker."""
    with iterate(data[0]) as iterator:
        return stacked(iterator.next(800))


def shard_documents(rows, shard):
    """The complete documents of one virtual shard, in order, from the global rows; every row must be full."""
    assert (rows[:, 2] == 1).all()
    documents, current = [], []
    for row in rows[shard::SHARDS]:
        for token, target, segment_start in zip(row[0], row[1], row[4] == 0, strict=True):
            assert current == [] or (current[-1] == token), "input is the previous target"
            assert current or (token == BOS and segment_start)
            current = (current or [token]) + [target]
            if target == EOS:
                documents.append(tuple(current))
                current = []
    return documents


# --- what is in the rows ---------------------------------------------------------------------------------------------


def test_epochs_cover_every_document_once_per_source_and_are_reshuffled(data, reference):
    _, written = data
    orders = set()
    for shard in range(SHARDS):
        seen = shard_documents(reference, shard)
        own = written["code"]["train"][shard]
        orders.add(tuple(own.index(ids) for ids in seen if ids in own)[:5])
        for name in WEIGHTS:
            own = written[name]["train"][shard]
            drawn = [ids for ids in seen if ids in own]
            epochs = [drawn[i : i + len(own)] for i in range(0, len(drawn) - len(own) + 1, len(own))]
            assert len(epochs) >= 2
            for epoch in epochs:
                assert sorted(epoch) == sorted(own)
            assert epochs[0] != epochs[1]
        assert {*seen} == {ids for name in WEIGHTS for ids in written[name]["train"][shard]}
    assert len(orders) > SHARDS // 2, "shards are shuffled independently"


def test_the_seed_changes_the_order_but_not_the_documents(data, reference):
    with iterate(data[0], seed=1) as iterator:
        other = stacked(iterator.next(800))
    assert (other != reference).any()
    for shard in range(SHARDS):
        first, second = shard_documents(reference, shard), shard_documents(other, shard)
        assert first[:8] != second[:8]
        assert {*first} == {*second}


def test_shares_of_documents_follow_the_weights_in_every_shard_at_all_times(data):
    weights = {"code": 0.77, "web": 0.23}
    with iterate(data[0], weights) as iterator:
        for _ in range(30):
            iterator.next(16)
            for place in iterator.get_state()["shards"].values():
                drawn = place["documents"]
                assert abs(drawn["code"] - 0.77 * sum(drawn.values())) <= 1
        assert sum(drawn.values()) > 20


def test_bytes_are_those_of_the_targets(reference):
    np.testing.assert_array_equal(reference[:, 5], TOKEN_BYTES[reference[:, 1]])


def test_a_source_missing_in_a_shard_is_skipped_there(tmp_path):
    written = prepare(tmp_path, {"code": (40, 0), "rare": (3, 0)})  # shards 3.. have no rare document
    with iterate(tmp_path, {"code": 1.0, "rare": 5.0}) as iterator:
        rows = stacked(iterator.next(160))
        state = iterator.get_state()
    for shard in range(SHARDS):
        rare = [ids for ids in shard_documents(rows, shard) if ids in written["rare"]["train"][shard]]
        assert bool(rare) == (shard < 3)
        assert state["shards"][str(shard)]["documents"]["code"] > 0


def test_a_shard_without_any_document_is_an_error(tmp_path):
    prepare(tmp_path, {"code": (5, 0)})
    with pytest.raises(ConfigError, match=r"virtual_shards=8.*smaller.*shard 5 has no training document"):
        iterate(tmp_path, {"code": 1.0})


# --- order and state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_one_global_order_whatever_the_batch_sizes(data, reference, count):
    iterators = [iterate(data[0], process=(p, count)) for p in range(count)]
    row = 0
    for size in (8, 4, 12, 4, 24):
        for p, iterator in enumerate(iterators):
            want = [r for r in range(row, row + size) if r % count == p]
            np.testing.assert_array_equal(stacked(iterator.next(size)), reference[want])
        row += size
    for iterator in iterators:
        iterator.close()


@given(st.lists(st.integers(1, 40), max_size=6), st.integers(1, 40))
@settings(max_examples=15)
def test_state_goes_on_bit_for_bit(data, reference, sizes, size):
    with iterate(data[0]) as iterator, iterate(data[0]) as other:
        for n in sizes:
            iterator.next(n)
        state = json.loads(json.dumps(iterator.get_state()))
        assert state["row"] == sum(sizes)
        after = stacked(iterator.next(size))
        np.testing.assert_array_equal(after, reference[sum(sizes) : sum(sizes) + size])
        other.set_state(state)
        assert other.get_state() == state
        np.testing.assert_array_equal(stacked(other.next(size)), after)
        iterator.set_state(state)  # back
        np.testing.assert_array_equal(stacked(iterator.next(size)), after)
        assert other.get_state() == iterator.get_state()


def test_state_of_two_processes_resumes_on_one_and_on_four(data, reference):
    states = []
    for p in range(2):
        with iterate(data[0], process=(p, 2)) as iterator:
            iterator.next(22)  # no multiple of 4 nor of the shards
            states.append(iterator.get_state())
    state = json.loads(json.dumps(merge_states(states)))
    with iterate(data[0]) as whole:
        whole.next(22)
        assert whole.get_state() == state
    for count in (1, 2, 4):
        for p in range(count):
            with iterate(data[0], process=(p, count)) as iterator:
                iterator.set_state(state)
                want = [r for r in range(22, 22 + 20) if r % count == p]
                np.testing.assert_array_equal(stacked(iterator.next(20)), reference[want])
    with iterate(data[0]) as iterator, pytest.raises(ConfigError, match=r"lacks shards.*merge_states"):
        iterator.set_state(states[0])
    with pytest.raises(ValueError, match="lack shards 1, 3, 5, 7"):
        merge_states(states[:1])
    with pytest.raises(ValueError, match="different steps"):
        merge_states([states[0], {**states[1], "row": 23}])


@pytest.mark.parametrize("change", [{"seed": 3}, {"weights": {"code": 2.0, "web": 1.0}}, {"weights": {"code": 3.0}}])
def test_state_of_another_order_is_refused(data, change):
    with iterate(data[0]) as iterator, iterate(data[0], **change) as other:
        with pytest.raises(ConfigError, match=r"data state: (seed|sources) was"):
            other.set_state(iterator.get_state())


def test_processes_must_divide_shards_and_rows(data):
    with pytest.raises(ConfigError, match="virtual_shards=8: must be a multiple of the 3 processes"):
        iterate(data[0], process=(0, 3))
    with iterate(data[0], process=(1, 2)) as iterator, pytest.raises(ConfigError, match="rows=7"):
        iterator.next(7)


# --- workers ---------------------------------------------------------------------------------------------------------


def test_workers_give_the_same_rows_and_states_and_a_dead_one_is_an_error(data, reference):
    with iterate(data[0]) as iterator:
        iterator.next(13)
        start = iterator.get_state()
    with iterate(data[0], workers=3) as iterator:  # 8 shards: two of the three are used
        iterator.set_state(start)
        np.testing.assert_array_equal(stacked(iterator.next(10)), reference[13:23])
        np.testing.assert_array_equal(stacked(iterator.next(31)), reference[23:54])
        state = iterator.get_state()
        workers = iterator.worker_pids()
        assert len(workers) == 2
        with iterate(data[0]) as without:
            without.set_state(state)
            np.testing.assert_array_equal(stacked(without.next(9)), reference[54:63])
        os.kill(workers[1], signal.SIGTERM)  # meant for the trainer: workers go on until it closes them
        os.kill(workers[0], signal.SIGKILL)
        with pytest.raises(DataError, match="data worker 0 died with exit code -9"):
            read(iterator, 100)  # what it had already sent still comes, in order
        place = iterator.get_state()
        assert gone(workers), "the other worker was stopped"
        with iterate(data[0]) as without:  # the place is still exact
            without.set_state(place)
            np.testing.assert_array_equal(stacked(without.next(4)), reference[place["row"] : place["row"] + 4])


def read(iterator, times):
    for _ in range(times):
        iterator.next(10)


def gone(pids, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid)]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


SCRIPT = """
import sys

if __name__ == "__main__":
    sys.path.insert(0, {tests!r})
    import test_pipeline

    iterator = test_pipeline.iterate({folder!r}, workers=1)
    iterator.next(40)
    print(*iterator.worker_pids(), flush=True)
    {end}
"""


SLEEPS = "import time; time.sleep(600)"  # until it is killed


@pytest.mark.parametrize("end", quick(["raise SystemExit(3)", SLEEPS], SLEEPS))
def test_workers_end_with_the_trainer_however_it_ends(data, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(data[0]), end=end))
    path = os.pathsep.join(sys.path)
    trainer = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    if "sleep" in end:
        trainer.kill()
    _, errors = trainer.communicate(timeout=60)
    assert trainer.returncode == {"r": 3, "i": -9}[end[0]], errors
    assert len(workers) == 1, errors
    assert "Traceback" not in errors
    assert gone(workers)


def test_close_keeps_the_place(data, reference):
    iterator = iterate(data[0])
    iterator.next(5)
    iterator.close()
    iterator.close()
    np.testing.assert_array_equal(stacked(iterator.next(5)), reference[5:10])
    iterator.close()


# --- held-out --------------------------------------------------------------------------------------------------------


def held_out(folder, size=4, **kwargs):
    return [stacked(batch) for batch in held_out_batches(folder, T, size, TOKEN_BYTES, **kwargs)]


def test_held_out_is_one_finite_pass_over_every_source(data):
    folder, written = data
    batches = held_out(folder)
    rows = np.concatenate(batches)
    assert all(batch.shape == batches[0].shape for batch in batches)
    seen, current = [], []
    for row in rows:
        for token, target, weight in zip(*row[:3], strict=True):
            if weight:
                current = (current or [token]) + [target]
                if target == EOS:
                    seen.append(tuple(current))
                    current = []
    documents = [ids for source in written.values() for shard in source["held_out"] for ids in shard]
    assert current == []
    assert collections.Counter(seen) == collections.Counter(documents)
    first = seen[: 2 * SHARDS]
    assert all(any(ids in shard for shard in source["held_out"] for ids in first) for source in written.values())
    real = rows[:, 2].any(axis=1)
    assert real[: real.sum()].all()
    assert (rows[real][:-1, 2] == 1).all()
    np.testing.assert_array_equal(np.concatenate(held_out(folder)), rows)


def test_held_out_blocks_of_processes_make_the_same_batches(data):
    whole = held_out(data[0])
    parts = [held_out(data[0], process_index=p, process_count=2) for p in range(2)]
    np.testing.assert_array_equal(np.stack([np.concatenate(pair) for pair in zip(*parts, strict=True)]), whole)


# --- damaged data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    prepare(tmp_path, {"code": (40, 8)})
    return tmp_path


def assert_fails(folder, error, match, **kwargs):
    with pytest.raises(error, match=match), iterate(folder, {"code": 1.0}, **kwargs) as iterator:
        read(iterator, 40)


def file_of(folder, shard=3, split="train"):
    return folder / "code" / f"{split}-{shard:05d}-of-{SHARDS:05d}.arrayrecord"


AGAIN = "prepare the data again"


def test_missing_file(damaged):
    file_of(damaged).unlink()
    assert_fails(damaged, DataError, f"train-00003-of-00008.arrayrecord is missing: {AGAIN}")


@pytest.mark.parametrize("content", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"x" * len(b)])
def test_truncated_file(damaged, content):
    path = file_of(damaged)
    path.write_bytes(content(path.read_bytes()))
    assert_fails(damaged, DataError, f"train-00003-of-00008.arrayrecord is truncated.*{AGAIN}")


def test_files_of_another_preparation(damaged):
    write(file_of(damaged), [[BOS, 5, EOS]])
    assert_fails(damaged, DataError, f"hold 36 documents, manifest.json says 40: {AGAIN}")


@pytest.mark.parametrize(
    ("ids", "what"), [([BOS, VOCAB, EOS], f"token {VOCAB} in a vocabulary"), ([BOS], "4 bytes, not two or more")]
)
def test_bad_record(damaged, ids, what):
    write(file_of(damaged), [[BOS, 5, EOS], ids, *[[BOS, 6, EOS]] * 3])
    assert_fails(damaged, DataError, f"train-00003-of-00008.arrayrecord, record 1 holds {what}.*{AGAIN}")


def test_bad_record_in_a_worker(damaged):
    write(file_of(damaged), [[BOS, 5, EOS], [BOS], *[[BOS, 6, EOS]] * 3])
    assert_fails(damaged, DataError, "record 1 holds 4 bytes", workers=1)


def test_another_number_of_virtual_shards(damaged):
    complaint = f"virtual_shards=4: must be what the data was prepared with .8,.*{AGAIN}"
    assert_fails(damaged, ConfigError, complaint, shards=4)


def test_manifest_must_be_there_whole_and_match(damaged):
    with pytest.raises(DataError, match=r"manifest.json: vocab_size 300, but the tokenizer has 301"):
        TrainIterator(damaged, settings_of({"code": 1.0}), T, np.ones(VOCAB + 1, np.int32))
    with pytest.raises(ConfigError, match=r"SourceConfig.name='web': must be prepared .are: code."):
        iterate(damaged, WEIGHTS)
    text = (damaged / "manifest.json").read_text()
    for broken in (text[:-20], "[]", "{}"):
        (damaged / "manifest.json").write_text(broken)
        assert_fails(damaged, DataError, f"manifest.json is damaged.*{AGAIN}")
    (damaged / "manifest.json").unlink()
    assert_fails(damaged, DataError, f"manifest.json is missing.*{AGAIN}")


def test_held_out_files_are_checked(damaged):
    file_of(damaged, split="held_out").unlink()
    with pytest.raises(DataError, match=f"held_out files of source 'code' hold 7 documents.*says 8: {AGAIN}"):
        held_out(damaged)
    prepare(damaged, {"code": (40, 0)})
    with pytest.raises(DataError, match=r"no held-out document: raise DataConfig.held_out_share"):
        held_out(damaged)
