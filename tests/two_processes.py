"""One process of a run of several, as a program: python two_processes.py FOLDER MESH STEPS [--kill_at=STEP] FLAGS.

FOLDER holds text/. Process 1 kills itself while it reads the batch of step `kill_at`.
"""

import dataclasses
import os
import signal
from pathlib import Path

import small_training

import common
from dsv2_jax.config import CheckpointConfig


def experiment(folder: Path, mesh: str | None, steps: int):
    changes = {"batch_size": 8, "checkpoint": CheckpointConfig(every=2)}
    config = small_training.text_experiment(folder, steps=steps, optimizer__decay_at=(), **changes)
    model = dataclasses.replace(config.model, dim=24)
    return dataclasses.replace(config, model=model, mesh=mesh)


def kill_when_reading(step: int) -> None:
    from dsv2_jax.data.pipeline import TrainIterator

    original, calls = TrainIterator.next, []

    def next(self, rows: int):
        calls.append(rows)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, rows)

    TrainIterator.next = next


def main() -> None:
    parser = common.argument_parser(__doc__, "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("mesh")
    parser.add_argument("steps", type=int)
    parser.add_argument("--kill_at", type=int)
    common.add_process_flags(parser)
    flags = common.parse_arguments(parser)
    common.start_processes(flags)
    if flags.kill_at and flags.process == 1:
        kill_when_reading(flags.kill_at)
    common.train(experiment(flags.folder, flags.mesh, flags.steps), str(flags.folder / "run"))


if __name__ == "__main__":
    common.run(main)
