import dataclasses
import json
import math
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small
import small_training
from quick import quick
from small_training import DENSE, MOE, SyntheticRows, batch, experiment, synthetic

from dsv2_jax import sharding
from dsv2_jax.checkpoint import Checkpoints, load_config, restore_params
from dsv2_jax.config import (
    BatchRampConfig,
    CheckpointConfig,
    ConfigError,
    DedupConfig,
    DroppingConfig,
    ExperimentConfig,
    ProfileConfig,
)
from dsv2_jax.config_io import from_json, parse
from dsv2_jax.model.counting import training_flops_per_token
from dsv2_jax.train.loop import TrainingFailed, balance_text, evaluate, keep_config, machines, open_mesh, train
from dsv2_jax.train.loss import lm_loss
from dsv2_jax.train.metrics import read_rows
from dsv2_jax.train.state import abstract_state


def run(config, folder, data=None):
    return train(config, folder, data=data or synthetic(), matmul_rate=1e9)


def losses(folder):
    return {row["step"]: row["loss"] for row in read_rows(folder) if "loss" in row}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, summary) of an uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(experiment(), folder)


def test_what_a_run_leaves_behind(finished):
    folder, summary = finished
    config = experiment()
    assert from_json(ExperimentConfig, (folder / "config.json").read_text()) == config
    assert parse(ExperimentConfig, load_config(folder)) == config
    assert list(losses(folder)) == list(range(1, 13))
    held_out = [row["step"] for row in read_rows(folder) if "held_out/bits_per_byte" in row]
    assert held_out == [6, 12]
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir()) == [6, 9, 12]
    assert list((folder / "tensorboard").iterdir())
    assert summary["step"] == 12
    assert summary["loss"] == losses(folder)[12]
    last = next(row for row in reversed(read_rows(folder)) if "loss" in row)
    assert last["tokens_per_second"] > 0
    flops_per_second = training_flops_per_token(config.model, 16) * last["tokens_per_second"]
    assert last["mfu"] == pytest.approx(flops_per_second / 1e9)


def test_held_out_bits_per_byte_is_exact(finished):
    folder, summary = finished
    model = restore_params(folder, abstract_state(experiment()).model)
    parts = [jax.jit(lm_loss)(model, batch(4, 1_000_000 + i)) for i in range(3)]
    expected = sum(float(p.nll_sum) for p in parts) / math.log(2) / sum(float(p.bytes) for p in parts)
    assert summary["held_out/bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_a_complete_run_says_so_and_changes_nothing(finished, capsys):
    folder, summary = finished
    before = (folder / "metrics.jsonl").read_text()
    assert run(experiment(), folder) == summary
    assert "this run is complete (12 steps)" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_longer_run_goes_on_from_the_end(finished, tmp_path):
    folder = tmp_path / "run"
    run(experiment(steps=6, optimizer__decay_at=()), folder)
    run(experiment(steps=12, optimizer__decay_at=()), folder)
    assert list(losses(folder)) == list(range(1, 13))
    whole = tmp_path / "whole"
    run(experiment(steps=12, optimizer__decay_at=()), whole)
    assert losses(folder) == losses(whole)


def test_a_changed_setting_is_refused_by_name(finished):
    folder, _ = finished
    changed = experiment(dataclasses.replace(DENSE, dense_width=24), optimizer__peak_lr=1.0)
    with pytest.raises(ConfigError) as error:
        run(changed, folder)
    for part in ("model.dense_width was 22, now 24", "train.optimizer.peak_lr was 0.003, now 1.0"):
        assert part in str(error.value)
    allowed = experiment(log_every=5, max_bad_steps=3, evaluation=None, checkpoint=CheckpointConfig(every=1))
    run(allowed, folder)
    run(experiment(small.change(DENSE, compute__remat="full", compute__loss_chunk=4), microbatch_size=2), folder)
    run(experiment(), folder)
    with pytest.raises(ConfigError, match=r"model.compute.dtype was 'float32', now 'bfloat16'"):
        run(experiment(small.change(DENSE, compute__dtype="bfloat16")), folder)


def test_a_microbatch_that_changes_the_stages_of_a_growing_batch_is_refused(tmp_path):
    ramp = BatchRampConfig(start=4, sequences=40, stages=3)
    keep_config(experiment(batch_size=8, microbatch_size=2, batch_ramp=ramp), tmp_path)  # 4, 4, 6, then 8
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"train\.microbatch_size was 2, now 4"):
        keep_config(experiment(batch_size=8, microbatch_size=4, batch_ramp=ramp), tmp_path)


@pytest.mark.slow
def test_smaller_microbatches_go_on_to_the_same_losses_and_drop_the_same_tokens(tmp_path):
    """On fewer devices fewer sequences are computed at once. Which are never dropped does not depend on that."""
    model = small.change(MOE, moe__dropping=DroppingConfig(capacity_factor=0.5, protected_share=0.5))
    schedule = {"batch_size": 8, "optimizer__decay_at": (), "evaluation": None}
    for folder, smaller in ("whole", 8), ("moved", 2):
        run(experiment(model, steps=3, microbatch_size=8, **schedule), tmp_path / folder)
        run(experiment(model, steps=6, microbatch_size=smaller, **schedule), tmp_path / folder)
    whole, moved = ([row for row in read_rows(tmp_path / folder) if "loss" in row] for folder in ("whole", "moved"))
    assert [row["step"] for row in moved] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose([row[name] for row in moved], [row[name] for row in whole], rtol=1e-5)
    dropped = [row["dropped_share"] for row in moved]
    assert dropped == [row["dropped_share"] for row in whole]
    assert min(dropped) > 0


@pytest.mark.parametrize(
    ("mesh", "readers", "complaint"),
    [("fsdp=8", 1, "no dimension of a parameter"), ("data=8", 3, "virtual_shards=2: must be a multiple of the 3")],
)
def test_what_cannot_run_is_refused_before_its_data_are_prepared(tmp_path, monkeypatch, mesh, readers, complaint):
    monkeypatch.setattr("dsv2_jax.train.loop.Placing", lambda *_: SimpleNamespace(reader=0, readers=readers))
    small_training.write_text(tmp_path)
    config = dataclasses.replace(small_training.text_experiment(tmp_path, batch_size=8), mesh=mesh)
    open_mesh(config)
    with pytest.raises(ConfigError, match=complaint):
        train(config, tmp_path / "run", matmul_rate=1e9)
    assert not (tmp_path / "run").exists()


def test_settings_may_change_until_there_is_a_checkpoint(tmp_path):
    """What failed before it began, such as at its data, does not keep the folder."""
    keep_config(experiment(), tmp_path)
    keep_config(experiment(optimizer__peak_lr=1.0), tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"train\.optimizer\.peak_lr was 1\.0, now 0\.003"):
        keep_config(experiment(), tmp_path)


class Stopping(SyntheticRows):
    """Sends this process a signal while the batch of a step is read."""

    def __init__(self, step: int, number: int):
        super().__init__()
        self.at, self.number = step, number

    def next(self, rows: int):
        made = super().next(rows)
        if self.step == self.at:
            os.kill(os.getpid(), self.number)
        return made


@pytest.mark.parametrize("number", quick([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_signal_saves_and_leaves_with_a_message(finished, tmp_path, capsys, number):
    before = signal.getsignal(number)
    stopping = dataclasses.replace(synthetic(), rows=Stopping(4, number))
    summary = run(experiment(), tmp_path, stopping)
    assert signal.getsignal(number) is before
    assert summary["step"] == 4
    said = capsys.readouterr().out
    assert f"stopped by {number.name} after step 4. The last checkpoint is {tmp_path / 'checkpoints' / '4'}" in said
    run(experiment(), tmp_path)
    assert "resuming after step 4 of 12" in capsys.readouterr().out
    assert losses(tmp_path) == losses(finished[0])


@pytest.mark.slow
def test_experts_dropping_microbatches_and_a_growing_batch_resume_bit_for_bit(tmp_path):
    model = small.change(MOE, moe__dropping=DroppingConfig(capacity_factor=0.7, protected_share=0.5))
    ramp = BatchRampConfig(start=4, sequences=16, stages=2)
    config = experiment(model, batch_size=8, microbatch_size=2, batch_ramp=ramp, steps=8)
    run(config, tmp_path / "whole")
    assert any(row["dropped_share"] > 0 for row in read_rows(tmp_path / "whole") if "loss" in row)
    for step in (3, 6):  # inside the ramp, and after it
        stopping = dataclasses.replace(synthetic(), rows=Stopping(step, signal.SIGTERM))
        assert run(config, tmp_path / "parts", stopping)["step"] == step
    run(config, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    found = [restore_params(tmp_path / name, abstract_state(config).model) for name in ("parts", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_training_in_a_thread_needs_no_signals(tmp_path):
    thread = threading.Thread(target=run, args=(experiment(steps=1), tmp_path))
    thread.start()
    thread.join()
    assert list(losses(tmp_path)) == [1]


def test_a_damaged_newest_checkpoint_costs_only_its_steps(finished, tmp_path, capsys):
    run(experiment(steps=8), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3, 6, 8]
    for path in (tmp_path / "checkpoints" / "8" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(experiment(steps=8), tmp_path)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'checkpoints' / '8'} is damaged (" in said
    assert "using step 6" in said
    assert list(losses(tmp_path)) == list(range(1, 9))


def test_bad_steps_are_skipped_and_logged(tmp_path, capsys):
    summary = run(experiment(steps=8, max_bad_steps=3, log_every=4), tmp_path, synthetic(poisoned=(3, 5, 6)))
    rows = {row["step"]: row for row in read_rows(tmp_path) if "loss" in row}
    assert list(rows) == [3, 4, 5, 6, 8]  # bad ones are logged between log_every
    assert [step for step, row in rows.items() if row["loss"] is None] == [3, 5, 6]
    assert summary["skipped_steps"] == 3
    assert "step 5 skipped: loss nan" in capsys.readouterr().out


def test_a_streak_of_bad_steps_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = experiment(max_bad_steps=4, checkpoint=CheckpointConfig(every=1, keep_last=1))
    with pytest.raises(TrainingFailed, match="4 steps in a row, up to step 9, had a loss or gradient"):
        run(config, tmp_path, synthetic(poisoned=range(6, 13)))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [5]
    abstract = abstract_state(config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restore_params(tmp_path, abstract.model)))


@pytest.mark.slow
def test_balance_losses_that_are_off_are_named_and_experts_are_reported(tmp_path, capsys):
    model = small.change(MOE, moe__balance__device=None)
    summary = run(experiment(model, steps=2), tmp_path)
    text = "balance losses: expert 0.003, device off, communication 0.02"
    assert balance_text(experiment(model)) == text
    assert text in capsys.readouterr().out
    assert read_rows(tmp_path)[0] == {"step": 0, "balance_losses": text}
    assert np.asarray(summary["expert_load"]).shape == (2, 8)
    assert "balance/device" not in summary
    assert summary["balance/expert"] > 0
    json.dumps(summary, allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "profile", "steps", "traced"),
    [
        (None, ProfileConfig(start=2, steps=1), 4, 1),
        (3, ProfileConfig(start=2, steps=3), 6, 2),  # resumed inside the window
        (5, ProfileConfig(start=2, steps=3), 6, None),  # beyond it
        (None, ProfileConfig(start=2, steps=10), 4, 2),  # the run ends before the window does
    ],
)
def test_profile_leaves_a_trace_of_the_steps_it_names(tmp_path, capsys, before, profile, steps, traced):
    if before:
        run(experiment(steps=before), tmp_path)
    run(experiment(steps=steps, profile=profile), tmp_path)
    assert list(losses(tmp_path)) == list(range(1, steps + 1))
    assert bool(list((tmp_path / "profile").rglob("*.xplane.pb"))) == (traced is not None)
    assert (f"profile of {traced} steps in {tmp_path / 'profile'}" in capsys.readouterr().out) == (traced is not None)


def test_a_run_that_fails_keeps_its_trace(tmp_path):
    config = experiment(max_bad_steps=2, profile=ProfileConfig(start=2, steps=20))
    with pytest.raises(TrainingFailed):
        run(config, tmp_path, synthetic(poisoned=range(4, 13)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_an_empty_held_out_set_is_an_error(finished):
    with pytest.raises(ConfigError, match="held-out set is empty"):
        evaluate(None, [])


def test_the_real_pipeline_end_to_end(tmp_path):
    small_training.write_text(tmp_path)
    shutil.copy(tmp_path / "text" / "003.txt", tmp_path / "text" / "copy.txt")
    config = small_training.text_experiment(tmp_path, steps=3)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dedup=DedupConfig()))
    summary = train(config, tmp_path / "run", matmul_rate=1e9)
    assert summary["data/text/malformed"] == 0
    assert summary["data/text/read"] == 25
    assert summary["data/text/removed/exact_duplicate"] == 1
    assert read_rows(tmp_path / "run")[0]["data/text/removed/exact_duplicate"] == 1
    assert 0 < summary["unigram_bits_per_byte"] < summary["held_out/bits_per_byte"] < 20


def test_devices_of_a_cpu_share_its_matmul_rate():
    gpu = SimpleNamespace(devices=np.array([[SimpleNamespace(platform="gpu")] * 4]), size=4)
    assert [machines(mesh) for mesh in (None, sharding.make_mesh("data=8"), gpu)] == [1, 1, 4]
