"""What a run reports: numbers of a step, load of the experts, speed against the machine; JSONL and TensorBoard."""

import functools
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
import tqdm

from dsv2_jax.config import ExperimentConfig, ModelConfig
from dsv2_jax.train.optimizer import batch_schedule
from dsv2_jax.train.step import StepMetrics
from dsv2_jax.types import MoEStats

BALANCE = ("expert", "device", "communication")


# --- numbers ---------------------------------------------------------------------------------------------------------


def violation(load_LE: np.ndarray) -> np.ndarray:
    """Largest load over mean load, minus 1, of each layer (MaxVio): 0 is balance, E - 1 is one expert for all."""
    return load_LE.max(-1) / np.maximum(load_LE.mean(-1), 1e-9) - 1


def entropy(load_LE: np.ndarray) -> np.ndarray:
    """Entropy of the load over experts of each layer, as a share of ln E: 1 is perfect balance."""
    share_LE = load_LE / np.maximum(load_LE.sum(-1, keepdims=True), 1e-9)
    logs_LE = np.log(np.where(share_LE > 0, share_LE, 1.0))
    return -(share_LE * logs_LE).sum(-1) / max(math.log(load_LE.shape[-1]), 1e-9)


def scalars(metrics: StepMetrics, model: ModelConfig) -> dict[str, float]:
    """The numbers of one step (on the host), by the names they have in metrics.jsonl and TensorBoard."""
    row = {"loss": metrics.loss, "nll": metrics.nll, "bits_per_byte": metrics.bits_per_byte}
    row |= {"learning_rate": metrics.learning_rate, "gradient_norm": metrics.gradient_norm}
    row |= {"loss_tokens": metrics.tokens, "skipped_steps": metrics.skipped}
    if metrics.moe is not None:
        on = [getattr(model.moe.balance, name) is not None for name in BALANCE]
        row |= {f"balance/{n}": v for n, v, is_on in zip(BALANCE, metrics.balance_3, on, strict=True) if is_on}
        row |= _moe_scalars(metrics.moe, model)
    return {name: float(value) for name, value in row.items()}


def _moe_scalars(moe: MoEStats, model: ModelConfig) -> dict[str, float]:
    tokens = moe.assignments.sum() / model.moe.experts_per_token  # summed over layers
    row = {
        "dropped_share": moe.dropped.sum() / max(moe.assignments.sum(), 1),
        "sends_per_token": moe.sends.sum() / max(tokens, 1),
        "crossed_per_token": moe.crossed.sum() / max(tokens, 1),
        "load/violation": violation(moe.load_E).mean(),
        "load/entropy": entropy(moe.load_E).mean(),
    }
    for layer, (v, e) in enumerate(zip(violation(moe.load_E), entropy(moe.load_E), strict=True), model.dense_layers):
        row |= {f"load/violation/layer_{layer}": v, f"load/entropy/layer_{layer}": e}
    return row


def measure_matmul_rate(dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of the first device in square matmuls, operands of `dtype`, float32 results: the best in `seconds`.

    The size grows until one product takes 5 ms, so that neither the launch nor a small cache decides.
    """
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))

    def best_time(x, limit: float) -> float:
        jax.block_until_ready(product(x, x))
        best, end = math.inf, time.perf_counter() + limit
        while time.perf_counter() < end:
            start = time.perf_counter()
            jax.block_until_ready(product(x, x))
            best = min(best, time.perf_counter() - start)
        return best

    for size in (512, 1024, 2048, 4096, 8192):
        x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
        if best_time(x, 0.05) > 5e-3:
            break
    return 2 * size**3 / best_time(x, seconds)


# --- files -----------------------------------------------------------------------------------------------------------


class MetricsLog:
    """Rows of numbers in `metrics.jsonl` and TensorBoard events of a run's folder.

    A run resumed at `step` first drops what a killed one had written beyond it, a torn last line included, so that
    every step appears once; a run from the start drops all. A number that is not finite is written as null, and left
    out of TensorBoard.
    """

    def __init__(self, workdir: str | Path, step: int = 0, enabled: bool = True):
        self._file = self._board = None
        if enabled:
            path = Path(workdir) / "metrics.jsonl"
            _keep_rows(path, step)
            self._file = path.open("a")
            self._board = tensorboardX.SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **row) -> None:
        if self._file is None:
            return
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def _keep_rows(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text().splitlines() if step > 0 else []
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    partial = path.with_suffix(".jsonl.partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(path)


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None


def read_rows(workdir: str | Path) -> list[dict]:
    """The rows of `metrics.jsonl`, oldest first; a torn last line is left out."""
    path = Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) is not None]


class Progress:
    """Reads the metrics of finished steps: into the log every `log_every` steps, and onto the progress bar."""

    def __init__(self, config: ExperimentConfig, log: MetricsLog, *, start: int, full_tokens_per_second: float):
        """`full_tokens_per_second`: what the machine would reach at its measured matmul rate."""
        self.row: dict[str, float] = {}  # of the last step read
        self.load_LE: np.ndarray | None = None
        self._config, self._log, self._full = config, log, full_tokens_per_second
        self._sizes = batch_schedule(config.train)
        hidden, steps = jax.process_index() != 0, config.train.steps
        self._bar = tqdm.tqdm(total=steps, initial=start, unit="step", disable=hidden, dynamic_ncols=True)
        self._since: float | None = None  # when the first step of the window was done; None: no step was read since
        self._tokens = 0

    def read(self, metrics: StepMetrics | None) -> int:
        """Wait for a step and report it; returns how many steps in a row, it included, were not finite."""
        if metrics is None:
            return 0
        metrics = jax.device_get(metrics)
        step, settings = int(metrics.step), self._config.train
        self.load_LE = None if metrics.moe is None else metrics.moe.load_E
        self.row = {"step": step, **scalars(metrics, self._config.model), **self._speed(step)}
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(_bar_text(self.row), refresh=False)
        if metrics.bad_steps and jax.process_index() == 0:
            self._bar.write(f"step {step} skipped: loss {metrics.loss}, gradient norm {metrics.gradient_norm}")
        if step % settings.log_every == 0 or step == settings.steps or metrics.bad_steps:
            self._log.write(**self.row)
            self._since, self._tokens = time.perf_counter(), 0
        return int(metrics.bad_steps)

    def restart_clock(self) -> None:
        """Keep what was done since the last step (a save, an evaluation) out of tokens per second."""
        self._since = None

    def close(self) -> None:
        self._bar.close()

    def _speed(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        if self._since is None:  # the first step may hold a compilation
            self._since, self._tokens = now, 0
            return {"tokens_per_second": math.nan, "mfu": math.nan}
        self._tokens += self._sizes.size_at(step - 1) * self._config.train.sequence_length
        rate = self._tokens / (now - self._since)
        return {"tokens_per_second": rate, "mfu": rate / self._full}


def _bar_text(row: dict[str, float]) -> str:
    text = f"loss {row['loss']:.3f}, {row['bits_per_byte']:.3f} bits/byte"
    if math.isnan(row["tokens_per_second"]):
        return text
    return f"{text}, {row['tokens_per_second']:,.0f} tokens/s, {100 * row['mfu']:.0f}% of matmul rate"
