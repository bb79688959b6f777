"""Pre-training, from a config and a folder to a finished checkpoint: `train` opens all it needs, `_steps` runs."""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import jax
import tqdm

from dsv2_jax import config_io, sharding
from dsv2_jax.checkpoint import Checkpoints
from dsv2_jax.config import ConfigError, ExperimentConfig, ProfileConfig, check
from dsv2_jax.data.pipeline import TrainIterator, held_out_batches, merge_states
from dsv2_jax.data.prepare import prepare
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.model.counting import training_flops_per_token
from dsv2_jax.train.metrics import BALANCE, MetricsLog, Progress, measure_matmul_rate, read_rows
from dsv2_jax.train.optimizer import batch_schedule
from dsv2_jax.train.placing import Agreement, Placing, ending_with_the_others, first_process_first, gather_json
from dsv2_jax.train.state import State, abstract_state, new_state, training_part
from dsv2_jax.train.step import evaluate_batch, make_train_step
from dsv2_jax.types import Batch

# What a resumed run may change, as dotted paths of ExperimentConfig: anything else would make it another run.
CHANGEABLE = ("train.steps", "train.log_every", "train.max_bad_steps", "train.checkpoint", "train.evaluation")
CHANGEABLE += ("train.profile", "train.microbatch_size", "model.compute", "data.workers", "mesh")
SETTLED = ("model.compute.dtype",)  # though part of one of them


class TrainingFailed(RuntimeError):
    """Loss or gradient stayed non-finite for `max_bad_steps` steps."""


class Rows(Protocol):
    """What the loop asks of the training data; `data.pipeline.TrainIterator` is one."""

    def next(self, rows: int) -> Batch: ...
    def get_state(self) -> dict: ...
    def set_state(self, state: dict) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the batches of a run come from."""

    rows: Rows  # of this reader: see placing.py
    held_out: Callable[[int], Iterator[Batch]]  # batch size -> one pass over the held-out rows
    unigram_bits_per_byte: float | None = None  # what a unigram model of the training tokens gives on the held-out text
    facts: dict = dataclasses.field(default_factory=dict)  # worth a row in the log: what each filter removed, ...
    merge: Callable[[list[dict]], dict] = merge_states  # the places of all processes' rows as one


def train(
    config: ExperimentConfig,
    workdir: str | Path,
    *,
    data: Data | None = None,
    matmul_rate: float | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict:
    """Train `config` in the folder `workdir` to its end, from the newest checkpoint there; returns `summary(workdir)`.

    Its "step" is the last one done, less than `train.steps` where a signal stopped the run.

    The folder then holds config.json, checkpoints/, metrics.jsonl and tensorboard/ (and data/, unless `data` is given).
    `matmul_rate`: FLOP/s that count as full utilisation; None measures it. `mesh`: where to compute if `config` names
    none; None is one device. SIGTERM or Ctrl-C saves and returns early.
    Several processes call it alike, with one folder that all see; a signal to any of them stops all.
    Raises `ConfigError` when the folder belongs to another run or the mesh is impossible, `DataError` when its data are
    damaged, `CheckpointError` when no checkpoint can be read or the next one written, `TrainingFailed` after
    `max_bad_steps` non-finite steps in a row.
    """
    workdir, settings, keep = Path(workdir), config.train, config.train.checkpoint
    is_main = jax.process_index() == 0
    say = tqdm.tqdm.write if is_main else lambda message: None
    mesh = open_mesh(config, mesh)
    abstract = abstract_state(config, mesh)  # raises where a parameter cannot lie on the mesh
    placing = Placing(mesh, settings.microbatch_size or settings.batch_size)
    if data is None:
        shards, must = config.data.virtual_shards, f"be a multiple of the {placing.readers} processes that read"
        check(shards % placing.readers == 0, "DataConfig.virtual_shards", shards, must)
    first_process_first(lambda: keep_config(config, workdir))

    with contextlib.ExitStack() as stack:
        data = data or first_process_first(lambda: open_data(config, workdir, placing))
        stack.callback(data.rows.close)
        folder = workdir / "checkpoints"
        checkpoints = Checkpoints(folder, keep_last=keep.keep_last, keep_every=keep.keep_every, report=say)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore_latest(abstract.model, training_part(abstract))
        start = 0 if restored is None else restored.step
        if start >= settings.steps:
            say(f"{workdir}: this run is complete ({start} steps); raise train.steps to go on")
            return summary(workdir) | {"step": start}
        if restored is None:
            state = new_state(config, mesh)
        else:
            state = State(model=restored.params, **restored.training)
            data.rows.set_state(restored.iterator)
            say(f"{workdir}: resuming after step {start} of {settings.steps}")
        del restored

        log = MetricsLog(workdir, step=start, enabled=is_main)
        stack.callback(log.close)
        if matmul_rate is None:
            matmul_rate = measure_matmul_rate(config.model.compute.dtype) * machines(mesh)
        say(f"matmul rate {matmul_rate / 1e9:.0f} GFLOP/s in {config.model.compute.dtype}; {balance_text(config)}")
        if start == 0:
            log.write(0, **data.facts, balance_losses=balance_text(config))
        full_rate = matmul_rate / training_flops_per_token(config.model, settings.sequence_length)
        progress = Progress(config, log, start=start, full_tokens_per_second=full_rate)
        stack.callback(progress.close)
        run = _Run(config, workdir, mesh, placing, data, checkpoints, log, progress, say)
        with sharding.use(mesh), ending_with_the_others():
            done = _steps(run, state, start)
    return summary(workdir) | {"step": done}


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the steps of a run share, beside the state that they change."""

    config: ExperimentConfig
    workdir: Path
    mesh: jax.sharding.Mesh | None
    placing: Placing
    data: Data
    checkpoints: Checkpoints
    log: MetricsLog
    progress: Progress
    say: Callable[[str], None]

    def save(self, step: int, state: State) -> None:
        """{state, iterator, config}; the iterator's place is that of the rows of all processes."""
        places = gather_json(self.data.rows.get_state())
        iterator = self.data.merge(places) if len(places) > 1 else places[0]
        tree = {"params": state.model, "training": training_part(state)}
        self.checkpoints.save(step, **tree, iterator=iterator, config=config_io.to_dict(self.config))

    def evaluate_held_out(self, step: int, model) -> None:
        """A row of the log: the held-out loss, beside a unigram model's, and the load of the experts in this step."""
        settings, unigram = self.config.train, self.data.unigram_bits_per_byte
        batches = self.data.held_out(settings.microbatch_size or settings.batch_size)
        row = evaluate(model, map(self.placing.put, islice(batches, settings.evaluation.batches)))
        load_LE = self.progress.load_LE
        load = {} if load_LE is None else {"expert_load": load_LE.tolist()}
        self.log.write(step, **row, unigram_bits_per_byte=unigram, **load)
        beside = "" if unigram is None else f" (unigram model: {unigram:.4f})"
        self.say(f"step {step}: held-out bits per byte {row['held_out/bits_per_byte']:.4f}{beside}")

    def kept(self) -> str:
        self.checkpoints.wait()
        steps, folder = self.checkpoints.steps(), self.checkpoints.folder
        return f"The last checkpoint is {folder / str(steps[-1])}." if steps else "There is no checkpoint yet."


def _steps(run: _Run, state: State, start: int) -> int:
    """Steps from `start` to the last one, or until a signal; returns how many are done.

    A step is dispatched before the metrics of the one before it are read, so the device never waits.
    """
    settings, progress, readers = run.config.train, run.progress, run.placing.readers
    batches, microbatch = batch_schedule(settings), settings.microbatch_size and settings.microbatch_size // readers
    train_step = make_train_step(run.config, run.mesh, run.placing.run_rows)
    agreement, pending = Agreement(run.mesh), None
    with _stop_signals() as stopped_by, _Trace(settings.profile, start, run.workdir / "profile", run.say) as trace:
        for step in range(start, settings.steps):
            trace.before(step)
            batch = split(run.data.rows.next(batches.size_at(step)), microbatch)
            state, metrics = train_step(state, run.placing.put(batch, microbatches=True))
            stopping = agreement.ask(bool(stopped_by))
            bad_steps = progress.read(pending)
            pending, done = metrics, step + 1

            last = done == settings.steps or stopping
            must_save = last or done % settings.checkpoint.every == 0
            must_evaluate = settings.evaluation and (done == settings.steps or done % settings.evaluation.every == 0)
            if must_save or must_evaluate:
                bad_steps, pending = progress.read(pending), None
            if bad_steps >= settings.max_bad_steps:
                raise TrainingFailed(
                    f"{bad_steps} steps in a row, up to step {progress.row['step']}, had a loss or gradient that is "
                    f"not finite. {run.kept()} Look at their data, or lower train.optimizer.peak_lr."
                )
            trace.after(step, state, last)
            if must_evaluate:
                run.evaluate_held_out(done, state.model)
            # Skipped steps leave the parameters as they were, but a streak of them must not push out good checkpoints;
            # the end of the run is saved always, so that the run is complete.
            if must_save and (bad_steps == 0 or done == settings.steps):
                run.save(done, state)
            if must_save or must_evaluate:
                progress.restart_clock()
            if stopping and done < settings.steps:
                who = stopped_by[0] if stopped_by else "a signal to another process"
                run.say(f"stopped by {who} after step {done}. {run.kept()} The same command goes on.")
                break
        run.checkpoints.wait()
    return done


class _Trace:
    """The profiler's trace of the steps that `profile` names (None: none), into `folder`."""

    def __init__(self, profile: ProfileConfig | None, start: int, folder: Path, say: Callable[[str], None]):
        self._steps, self._folder, self._say = range(0), folder, say
        if profile:  # of a run resumed inside the window, the rest
            self._steps = range(max(profile.start, start), profile.start + profile.steps)
        self._open = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self._open.close()

    def before(self, step: int) -> None:
        if step in self._steps[:1]:
            self._open.enter_context(jax.profiler.trace(str(self._folder)))

    def after(self, step: int, state: State, last: bool) -> None:
        if step in self._steps and (last or step == self._steps[-1]):
            jax.block_until_ready(state.step)
            self._open.close()
            self._say(f"profile of {step + 1 - self._steps.start} steps in {self._folder}")


def summary(workdir: str | Path) -> dict:
    """The last row of the training steps and the last of the held-out evaluations, from metrics.jsonl, as one dict."""
    result: dict = {}
    for row in read_rows(workdir):
        result |= row
    return result


def open_mesh(config: ExperimentConfig, default: jax.sharding.Mesh | None = None) -> jax.sharding.Mesh | None:
    """The mesh of `config`, over all devices of all processes, or `default`; checked against the run."""
    mesh = default if config.mesh is None else sharding.make_mesh(config.mesh)
    if mesh is None:
        return None
    size = config.train.microbatch_size or config.train.batch_size
    sharding.check_mesh(mesh, config.model, batch_size=size, sequence_length=config.train.sequence_length)
    return mesh


def machines(mesh: jax.sharding.Mesh | None) -> int:
    """How many times the rate of one device its mesh has: the CPU devices of a process share its cores."""
    if mesh is None:
        return 1
    return jax.process_count() if mesh.devices.flat[0].platform == "cpu" else mesh.size


def open_data(config: ExperimentConfig, workdir: Path, placing: Placing | None = None) -> Data:
    """The data of `config`, prepared in `workdir`/data the first time: the rows that `placing` says (None: all)."""
    share = {} if placing is None else {"process_index": placing.reader, "process_count": placing.readers}
    folder, length = workdir / "data", config.train.sequence_length
    manifest = prepare(config.data, folder, config.model.vocab_size)
    sizes_V = Tokenizer.load(folder / "tokenizer.json").token_bytes()
    facts = {}
    for name, source in manifest["sources"].items():
        facts |= {f"data/{name}/removed/{rule}": count for rule, count in source["removed"].items()}
        facts |= {f"data/{name}/malformed": source["malformed_count"], f"data/{name}/read": source["read"]}
    return Data(
        rows=TrainIterator(folder, config.data, length, sizes_V, **share),
        held_out=lambda batch_size: held_out_batches(folder, length, batch_size, sizes_V, **share),
        unigram_bits_per_byte=manifest["unigram_held_out_bits_per_byte"],
        facts=facts,
    )


def keep_config(config: ExperimentConfig, workdir: Path) -> None:
    """Write config.json, or check that the one there is of the same run: only CHANGEABLE fields may differ.

    A run without a checkpoint, such as one whose data could not be prepared, has nothing to lose: it begins anew.
    """
    path = workdir / "config.json"
    if path.exists() and any((workdir / "checkpoints").glob("[0-9]*")):
        kept = config_io.from_json(ExperimentConfig, path.read_text())
        # The stages of a growing batch are whole microbatches.
        same_batches = batch_schedule(kept.train) == batch_schedule(config.train)
        settled = SETTLED if same_batches else (*SETTLED, "train.microbatch_size")
        different = config_io.diff(kept, config)
        changed = [one for one in different if one[0] in settled or not _changeable(one[0])]
        if changed:
            fields = "; ".join(f"{name} was {old!r}, now {new!r}" for name, old, new in changed)
            raise ConfigError(
                f"{workdir} holds a run with other settings: {fields}. Set them back, or use a new folder."
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".json.partial")
        partial.write_text(config_io.to_json(config))
        partial.replace(path)


def _changeable(name: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in CHANGEABLE)


def split(batch: Batch, microbatch_size: int | None) -> Batch:
    """[B, T] -> [microbatches, b, T]"""
    return jax.tree.map(lambda x: x.reshape(-1, microbatch_size or x.shape[0], *x.shape[1:]), batch)


_EMPTY = "the held-out set is empty: raise data.held_out_share, or set train.evaluation=None"


def evaluate(model, batches: Iterable[Batch], empty: str = _EMPTY) -> dict[str, float]:
    """Loss (nats a token) and bits per byte over all of `batches`: sums first, in float64, one division at the end.

    Raises `ConfigError`, which says `empty`, where there is nothing to predict.
    """
    nll = weight = size = 0.0
    for batch in batches:
        parts = jax.device_get(dataclasses.replace(evaluate_batch(model, batch), moe=None))
        nll, weight, size = nll + float(parts.nll_sum), weight + float(parts.weight), size + float(parts.bytes)
    if not weight:
        raise ConfigError(empty)
    return {"held_out/loss": nll / weight, "held_out/bits_per_byte": nll / math.log(2) / size, "held_out/bytes": size}


def balance_text(config: ExperimentConfig) -> str:
    """Which balance losses are on: one that is off is off by choice, and said to be."""
    if config.model.moe is None:
        return "no experts, no balance losses"
    values = {name: getattr(config.model.moe.balance, name) for name in BALANCE}
    return "balance losses: " + ", ".join(f"{name} {'off' if v is None else v}" for name, v in values.items())


@contextlib.contextmanager
def _stop_signals():
    """A list that receives the name of the first SIGTERM or SIGINT; a second one acts as usual."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number, _):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
