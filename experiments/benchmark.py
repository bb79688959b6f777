"""Time the full training step, or greedy decoding, of a preset on this machine; prints one JSON line.

Compilation is excluded. "train" is the trainer's own step: forward, backward, clipping, AdamW on float32 masters, on
random tokens. "decode" is prefill and one compiled loop through the cache, with no host round trip per token.
"""

import json
import statistics
import time

import common


def main() -> None:
    parser = common.argument_parser(
        __doc__, "python experiments/benchmark.py train --preset=peer_tiny --batch=8 --seq=256"
    )
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("--preset", default="peer_tiny", metavar="NAME", help="a model of dsv2_jax/presets.py")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="sequences (default: %(default)s)")
    parser.add_argument(
        "--seq", type=int, default=256, metavar="T", help="train: tokens a sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", type=int, default=64, metavar="T", help="decode: prompt tokens (default: %(default)s)"
    )
    parser.add_argument("--new", type=int, default=128, metavar="T", help="decode: new tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="so many of the preset's layers (default: all)")
    faster = "the preset's; of several rows bfloat16 for float32 where the CPU multiplies it at twice the rate"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help=f"compute dtype (default: {faster})")
    parser.add_argument("--remat", choices=["none", "dots", "full"], help="train: (default: the preset's)")
    arguments = common.parse_arguments(parser)
    for name in ("batch", "seq", "prompt", "new", "repeats"):
        if getattr(arguments, name) < 1:  # of --layers the config says what it may be
            parser.error(f"--{name} must be positive")

    import dataclasses
    import shlex
    import sys

    from dsv2_jax import presets
    from dsv2_jax.train.metrics import measure_matmul_rate
    from kernels_pallas.measuring import about

    def computing(model, **chosen):
        return dataclasses.replace(model, compute=dataclasses.replace(model.compute, **chosen))

    training, model = arguments.what == "train", presets.get(arguments.preset)
    if arguments.layers is not None:
        model = dataclasses.replace(model, layers=arguments.layers)
    compute = model.compute
    model = computing(model, dtype=arguments.dtype or compute.dtype, remat=arguments.remat or compute.remat)
    if training:
        mesh = common.mesh_of_cores(experiment(model, arguments))
    else:
        mesh = common.mesh_to_decode(model, arguments.batch)
    if arguments.dtype is None:
        rows = arguments.batch * (arguments.seq if training else 1)
        model = computing(model, dtype=common.dtype_of_cores(compute.dtype, rows))
    result = (train if training else decode)(model, mesh, arguments)
    rate = measure_matmul_rate(model.compute.dtype)
    flops_per_second = result["flops_per_token"] * result["tokens_per_second"]
    result |= {"matmul_flops_per_second": rate, "share_of_matmul_rate": flops_per_second / rate}
    asked = {"what": arguments.what, "preset": arguments.preset, "layers": model.layers, "batch": arguments.batch}
    asked |= {"seq": arguments.seq} if arguments.what == "train" else {"prompt": arguments.prompt, "new": arguments.new}
    run = about(shlex.join(["python", "experiments/benchmark.py", *sys.argv[1:]]))
    print(json.dumps(asked | {"dtype": model.compute.dtype, "remat": model.compute.remat} | result | run))


def timed(run, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after two that do not count (the first compiles)."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def experiment(model, arguments):
    from dsv2_jax.config import DataConfig, ExperimentConfig, OptimizerConfig, SourceConfig, TrainConfig

    optimizer = OptimizerConfig(peak_lr=1e-3)
    settings = TrainConfig(steps=1000, sequence_length=arguments.seq, batch_size=arguments.batch, optimizer=optimizer)
    unused = DataConfig(sources=(SourceConfig(name="none", paths=("none",)),))
    return ExperimentConfig(model=model, train=settings, data=unused)


def train(model, mesh, arguments) -> dict:
    import jax
    import numpy as np

    from dsv2_jax import sharding
    from dsv2_jax.model.counting import training_flops_per_token
    from dsv2_jax.train.loop import split
    from dsv2_jax.train.placing import Placing
    from dsv2_jax.train.state import new_state
    from dsv2_jax.train.step import make_train_step
    from dsv2_jax.types import Batch

    config, shape = experiment(model, arguments), (arguments.batch, arguments.seq)
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
    ones_BT = np.ones(shape, np.int32)
    positions_BT = np.broadcast_to(np.arange(arguments.seq, dtype=np.int32), shape)
    batch = Batch(tokens_BT, np.roll(tokens_BT, -1, 1), ones_BT.astype(np.float32), ones_BT, positions_BT, ones_BT)
    batch = Placing(mesh, arguments.batch).put(split(batch, None), microbatches=True)
    step, held = make_train_step(config, mesh), [new_state(config, mesh)]

    def run() -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics.loss)

    with sharding.use(mesh):
        median = statistics.median(timed(run, arguments.repeats))
    tokens, flops = arguments.batch * arguments.seq, training_flops_per_token(model, arguments.seq)
    return {"tokens_per_second": tokens / median, "median_step_seconds": median, "flops_per_token": flops}


def decode(model, mesh, arguments) -> dict:
    import jax
    import numpy as np

    from dsv2_jax import sharding
    from dsv2_jax.inference.generate import generate_tokens
    from dsv2_jax.model.counting import decode_flops_per_token
    from dsv2_jax.model.transformer import Transformer

    prompt_BT = np.random.default_rng(0).integers(0, model.vocab_size, (arguments.batch, arguments.prompt), np.int32)

    def make(key):
        return Transformer(model, key).unstacked()

    key = jax.random.key(0)
    where = None if mesh is None else sharding.tree_shardings(jax.eval_shape(make, key), mesh)
    weights = jax.jit(make, out_shardings=where)(key)

    def run() -> None:
        jax.block_until_ready(generate_tokens(weights, prompt_BT, arguments.new))

    with sharding.use(mesh):
        median = statistics.median(timed(run, arguments.repeats))
    flops = decode_flops_per_token(model, arguments.prompt + arguments.new // 2)
    tokens = arguments.batch * arguments.new
    per_step = median / arguments.new
    return {"tokens_per_second": tokens / median, "median_step_seconds": per_step, "flops_per_token": flops}


if __name__ == "__main__":
    common.run(main)
