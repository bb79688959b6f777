import json
import math
import types

import numpy as np
import pytest
import small
from small_training import experiment
from tensorboardX.proto import event_pb2

from dsv2_jax.train import metrics
from dsv2_jax.types import MoEStats


def test_violation_and_entropy_by_hand():
    load = np.array([[4.0, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]])
    np.testing.assert_allclose(metrics.violation(load), [0, 3, 1])
    np.testing.assert_allclose(metrics.entropy(load), [1, 0, 0.5], atol=1e-12)


def test_no_load_at_all_is_no_error():
    load = np.zeros((1, 4))
    assert np.isfinite(metrics.violation(load)).all()
    assert np.isfinite(metrics.entropy(load)).all()


def step_metrics(model):
    moe = MoEStats(
        load_E=np.array([[6.0, 2, 2, 2, 2, 2, 1, 1], [3, 3, 3, 3, 3, 3, 0, 0]]),
        assignments=np.array([24.0, 24]),  # 8 tokens, 3 experts each, in both layers
        dropped=np.array([6.0, 6]),
        sends=np.array([12.0, 16]),
        crossed=np.array([3.0, 5]),
        balance_3=np.zeros((2, 3)),
        sequences=np.array([2.0, 2]),
    )
    scalars = {"loss": 2.5, "nll": 2.0, "bits_per_byte": 1.0, "learning_rate": 0.1, "gradient_norm": 3.0, "tokens": 8.0}
    counters = {"step": 7, "bad_steps": 0, "skipped": 1}
    return types.SimpleNamespace(**scalars, **counters, balance_3=np.array([0.1, 0.2, 0.3]), moe=moe)


def test_scalars_by_hand():
    row = metrics.scalars(step_metrics(small.MODEL), small.MODEL)
    assert (row["balance/expert"], row["balance/device"], row["balance/communication"]) == (0.1, 0.2, 0.3)
    assert row["dropped_share"] == 0.25
    assert row["sends_per_token"] == 28 / 16
    assert row["crossed_per_token"] == 8 / 16
    assert row["load/violation/layer_1"] == pytest.approx(6 / (18 / 8) - 1)
    assert row["load/violation/layer_2"] == pytest.approx(3 / (18 / 8) - 1)
    assert row["load/violation"] == pytest.approx((row["load/violation/layer_1"] + row["load/violation/layer_2"]) / 2)
    assert row["load/entropy/layer_2"] == pytest.approx(math.log(6) / math.log(8))
    assert row["skipped_steps"] == 1


def test_speed_share_and_bar_by_hand(tmp_path, monkeypatch):
    """Four sequences of 16 tokens in half a second, on a machine that could do 1000 tokens a second."""
    clock = iter([10.0, 10.0, 10.5, 10.5])  # twice a step: when it is read, and when it is logged
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    log = metrics.MetricsLog(tmp_path)
    progress = metrics.Progress(experiment(small.MODEL), log, start=0, full_tokens_per_second=1000.0)
    made = step_metrics(small.MODEL)
    for made.step in (1, 2):  # the first may hold a compilation
        progress.read(made)
    first, second = rows(tmp_path)
    assert (first["tokens_per_second"], first["mfu"]) == (None, None)
    assert (second["tokens_per_second"], second["mfu"]) == (128.0, 0.128)
    assert progress._bar.postfix == "loss 2.500, 1.000 bits/byte, 128 tokens/s, 13% of matmul rate"
    progress.close()
    log.close()


def test_a_balance_loss_that_is_off_is_not_reported_as_zero():
    model = small.change(small.MODEL, moe__balance__device=None)
    row = metrics.scalars(step_metrics(model), model)
    assert "balance/device" not in row
    assert "balance/expert" in row


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    for step in range(5):
        log.write(step, loss=0.1 * step)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    log = metrics.MetricsLog(tmp_path, step=2)
    log.write(3, loss=9.0, note="x")
    log.close()
    assert rows(tmp_path) == [*({"step": s, "loss": 0.1 * s} for s in range(3)), {"step": 3, "loss": 9.0, "note": "x"}]
    assert metrics.read_rows(tmp_path) == rows(tmp_path)


def test_not_finite_is_null_in_valid_json(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write(1, loss=math.nan, gradient_norm=math.inf)
    log.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert rows(tmp_path) == [{"step": 1, "loss": None, "gradient_norm": None}]


def test_float32_losses_survive_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    log = metrics.MetricsLog(tmp_path)
    for step, value in enumerate(values):
        log.write(step, loss=float(value))
    log.close()
    assert [np.float32(row["loss"]) for row in rows(tmp_path)] == list(values)


def test_tensorboard_has_the_numbers(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write(3, loss=1.5, load=[[1, 2]], note="x")
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    values = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert values == [(3, "loss", 1.5)]


def test_a_disabled_log_writes_nothing(tmp_path):
    log = metrics.MetricsLog(tmp_path, enabled=False)
    log.write(1, loss=1.0)
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_rate_is_that_of_a_machine(dtype):
    assert 1e8 < metrics.measure_matmul_rate(dtype, seconds=0.02) < 1e16
