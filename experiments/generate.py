"""Continue one or several prompts with a trained model, printing the text as it comes.

Each prompt begins with BOS. A continuation ends before a stop string, at the model's end token, or by --max_new_tokens.
--config.mesh=tensor=8 spreads the model over devices (axes data, fsdp, expert, tensor), and --config.model.compute.*
say how it is computed; all else is as in training.
"""

import functools
import json
import os
import pathlib
import sys

import common
from dsv2_jax.config import DTYPES, ConfigError, ExperimentConfig

TRAIN = "train one with: python experiments/quickstart.py"


def arguments():
    example = "python experiments/generate.py --checkpoint=runs/quickstart --prompt='import ' --top_p=0.95"
    parser = common.argument_parser(__doc__, example)
    add = functools.partial(parser.add_argument, metavar="N")
    add("--checkpoint", required=True, metavar="FOLDER", help="a run folder (its newest checkpoint) or one checkpoint")
    add("--prompt", required=True, action="append", metavar="TEXT", help="may be repeated; - reads standard input")
    add("--max_new_tokens", type=int, default=128, help="default: 128")
    add("--temperature", type=float, default=1.0, metavar="T", help="divides the logits; 0 is greedy; default: 1")
    add("--top_k", type=int, help="draw from the N likeliest tokens; default: all")
    add("--top_p", type=float, metavar="P", help="then from the fewest that hold this share of the mass; default: all")
    add("--seed", type=int, default=0, help="default: 0; the same seed draws the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--dtype", choices=DTYPES, metavar="|".join(DTYPES), help="of weights and activations; default: as in training")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json; default: the one of the run")
    parser.add_argument("--json", action="store_true", help="a line {prompt, text, ended} per prompt, not streamed")
    return common.parse_arguments(parser, fields=("mesh", "model.compute"))


def load(path: str, dtype: str | None, tokenizer: str | None, overrides=()):
    """The model, ready to decode, the tokenizer, and the mesh, of a run folder or checkpoint."""
    if not pathlib.Path(path).is_dir():
        raise ConfigError(f"--checkpoint={path}: there is no such folder; {TRAIN}")
    import jax

    from dsv2_jax import checkpoint, config_io, sharding
    from dsv2_jax.data.tokenizer import Tokenizer
    from dsv2_jax.model.transformer import Transformer

    try:
        mapping = {**checkpoint.load_config(path), "mesh": None}  # not the one it was trained on
        for field, text in overrides:
            mapping = config_io.override(ExperimentConfig, mapping, field, text)
        experiment = config_io.parse(ExperimentConfig, mapping)
        config, mesh = experiment.model, experiment.mesh and sharding.make_mesh(experiment.mesh)
        if mesh:
            sharding.check_mesh(mesh, config)
            sharding.check_decoding(mesh)
        abstract = jax.eval_shape(functools.partial(Transformer, config), jax.random.key(0))
        model = checkpoint.restore_params(path, sharding.with_shardings(abstract, mesh))
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"--checkpoint={path}: {error}; {TRAIN}") from None
    with sharding.use(mesh):
        model = model.unstacked(dtype or config.compute.dtype)
    return model, Tokenizer.load(tokenizer or find_tokenizer(path)), mesh


def find_tokenizer(path: str) -> pathlib.Path:
    """The tokenizer.json of the run, whose folder is at most two above a checkpoint: there, or in its prepared data."""
    here = pathlib.Path(path).absolute()
    for folder in (here, *here.parents[:2]):
        for file in (folder / "tokenizer.json", folder / "data" / "tokenizer.json"):
            if file.is_file():
                return file
    raise ConfigError(f"--checkpoint={path}: there is no tokenizer.json with it; name one with --tokenizer=FILE")


def main() -> int:
    flags = arguments()
    from dsv2_jax import sharding
    from dsv2_jax.inference.sampling import Sampling

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p)
    model, tokenizer, mesh = load(flags.checkpoint, flags.dtype, flags.tokenizer, flags.overrides)
    with sharding.use(mesh):
        write(model, tokenizer, sampling, flags)
    return 0


def write(model, tokenizer, sampling, flags) -> None:
    """Print the continuation of every prompt."""
    from dsv2_jax.inference.stream import stream

    for number, prompt in enumerate(flags.prompt, 1):
        text = sys.stdin.read() if prompt == "-" else prompt
        limits = {"max_new_tokens": flags.max_new_tokens, "stop": flags.stop}
        pieces = stream(model, tokenizer, text, sampling=sampling, seed=flags.seed, **limits)
        if flags.json:
            drawn, ended = collect(pieces)
            print(json.dumps({"prompt": text, "text": drawn, "ended": ended}, ensure_ascii=False), flush=True)
            continue
        if len(flags.prompt) > 1:
            print(f"--- {number} of {len(flags.prompt)}: {text!r}")
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def collect(pieces) -> tuple[str, str]:
    """All of what a generator yields, and what it returns."""
    text = []
    while True:
        try:
            text.append(next(pieces))
        except StopIteration as end:
            return "".join(text), end.value


def run() -> int:
    """`main`, with Ctrl-C and a reader that has gone (such as head) as ordinary ends."""
    try:
        return main()
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing it at exit fails again
        return 0


if __name__ == "__main__":
    common.run(run)
