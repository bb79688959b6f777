"""A run small enough to be trained, killed and resumed in tests; as a program, it trains the folder it is given.

python small_training.py <folder with text/> <steps>
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import small

from dsv2_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)
from dsv2_jax.types import Batch

OPTIMIZER = OptimizerConfig(peak_lr=3e-3, warmup_steps=4)
TRAIN = TrainConfig(steps=12, sequence_length=16, batch_size=4, optimizer=OPTIMIZER, log_every=1)
TRAIN = dataclasses.replace(TRAIN, checkpoint=CheckpointConfig(every=3), evaluation=EvaluationConfig(every=6))
DATA = DataConfig(sources=(SourceConfig("text", ("none",)),), held_out_share=0.2, virtual_shards=2)
# The quickest to compile: one dense layer; two MoE layers, scanned.
DENSE = dataclasses.replace(small.MODEL, layers=1, dense_layers=1, moe=None, attention=small.GQA)
MOE = dataclasses.replace(small.MODEL, layers=2, dense_layers=0, attention=small.GQA)


def experiment(model=DENSE, data=DATA, **changes) -> ExperimentConfig:
    """A config; `changes` are fields of `train`."""
    return ExperimentConfig(model, small.change(TRAIN, **changes), data)


def batch(rows: int, seed: int, vocab: int = 50, length: int = 16) -> Batch:
    """Learnable rows (each token follows from the one before), two documents and some padding in each."""
    rng = np.random.default_rng(seed)
    tokens = (rng.integers(0, vocab, (rows, 1)) + 7 * np.arange(length + 1)) % vocab
    ends = rng.integers(length // 2, length + 1, (rows, 1))
    real = np.arange(length) < ends
    segments = np.where(real, 1 + (np.arange(length) >= 5), 0)
    positions = np.where(real, np.arange(length) - 5 * (segments == 2), 0)
    arrays = tokens[:, :-1], tokens[:, 1:], real, segments, positions, 3 * real
    types = np.int32, np.int32, np.float32, np.int32, np.int32, np.int32
    return Batch(*(np.asarray(a, t) for a, t in zip(arrays, types, strict=True)))


class SyntheticRows:
    """Batches that depend on the place alone; those of the steps in `poisoned` have infinite weights."""

    def __init__(self, poisoned=()):
        self.row, self.step, self.poisoned = 0, 0, set(poisoned)

    def next(self, rows: int) -> Batch:
        made = batch(rows, self.row)
        self.row, self.step = self.row + rows, self.step + 1
        if self.step in self.poisoned:
            made = dataclasses.replace(made, weights_BT=np.full_like(made.weights_BT, np.inf))
        return made

    def get_state(self) -> dict:
        return {"row": self.row, "step": self.step}

    def set_state(self, state: dict) -> None:
        self.row, self.step = state["row"], state["step"]

    def close(self) -> None:
        pass


def synthetic(poisoned=()):
    from dsv2_jax.train.loop import Data

    return Data(SyntheticRows(poisoned), lambda size: iter([batch(size, 1_000_000 + i) for i in range(3)]))


def text_experiment(folder: Path, **changes) -> ExperimentConfig:
    """A run on the real data pipeline over `folder`/text/*.txt."""
    source = SourceConfig("text", (str(folder / "text" / "*.txt"),))
    data = dataclasses.replace(DATA, sources=(source,))
    return experiment(dataclasses.replace(DENSE, vocab_size=300), data, **changes)


def write_text(folder: Path, files: int = 24) -> None:
    rng = np.random.default_rng(0)
    words = "the latent cache holds what keys and values need of a token"
    (folder / "text").mkdir(parents=True)
    for i in range(files):
        text = " ".join(rng.choice(words.split(), 60))
        (folder / "text" / f"{i:03}.txt").write_text(text + ".\n")


if __name__ == "__main__":
    from dsv2_jax.train.loop import train

    folder = Path(sys.argv[1])
    changes = {"steps": int(sys.argv[2]), "checkpoint": CheckpointConfig(every=2, keep_last=2)}
    train(text_experiment(folder, **changes), folder / "run", matmul_rate=1e9)
