"""One process of a run of several, as a program: python two_processes.py FOLDER MESH STEPS FLAGS.

FOLDER holds text/. With --signal=NUMBER, process --to (1) sends itself that signal while it reads its fifth batch, and
leaves the time in FOLDER/signalled.
"""

import dataclasses
import os
import time
from pathlib import Path

import small
import small_training

import common
from dsv2_jax.config import CheckpointConfig, DroppingConfig

# Latent attention; a dense layer and one of experts, some of whose tokens are dropped.
MOE = small.change(small.MODEL, vocab_size=300, layers=2, moe__dropping=DroppingConfig(0.5, protected_share=0.5))


def experiment(folder: Path, mesh: str | None, steps: int, moe: bool = False):
    changes = {"batch_size": 8, "checkpoint": CheckpointConfig(every=2)}
    config = small_training.text_experiment(folder, steps=steps, optimizer__decay_at=(), **changes)
    model = MOE if moe else dataclasses.replace(config.model, dim=24)
    return dataclasses.replace(config, model=model, mesh=mesh)


def send_when_reading(number: int, folder: Path) -> None:
    from dsv2_jax.data.pipeline import TrainIterator

    original, calls = TrainIterator.next, []

    def next(self, rows: int):
        calls.append(rows)
        if len(calls) == 5:
            (folder / "signalled").write_text(str(time.time()))
            os.kill(os.getpid(), number)
        return original(self, rows)

    TrainIterator.next = next


def main() -> int:
    parser = common.argument_parser(__doc__, "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("mesh")
    parser.add_argument("steps", type=int)
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--signal", type=int)
    parser.add_argument("--to", type=int, default=1)
    common.add_process_flags(parser)
    flags = common.parse_arguments(parser)
    common.start_processes(flags)
    if flags.signal and flags.process == flags.to:
        send_when_reading(flags.signal, flags.folder)
    config = experiment(flags.folder, flags.mesh, flags.steps, flags.moe)
    code = common.exit_code(flags, config, common.train(config, str(flags.folder / "run")))
    print(f"exit code {code}")
    return code


if __name__ == "__main__":
    common.run(main)
