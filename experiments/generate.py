"""Continue one or several prompts with a trained or released model, printing the text as it comes.

Each prompt begins with BOS; with --chat it is a user's message and its continuation the answer. A continuation ends
before a stop string, at the model's end token, or by --max_new_tokens. --config.mesh=tensor=8 spreads the model over
devices (axes data, fsdp, expert, tensor); without it a CPU's cores are devices along tensor.
"""

import functools
import json
import os
import sys

import common
from dsv2_jax.config import DTYPES, check


def arguments():
    example = "python experiments/generate.py --checkpoint=runs/quickstart --prompt='import ' --top_p=0.95"
    parser = common.argument_parser(__doc__, example)
    add = functools.partial(parser.add_argument, metavar="N")
    add("--checkpoint", required=True, metavar="FOLDER", help=common.MODELS)
    add("--prompt", required=True, action="append", metavar="TEXT", help="may be repeated; - reads standard input")
    add("--max_new_tokens", type=int, default=128, help="default: 128")
    add("--temperature", type=float, default=1.0, metavar="T", help="divides the logits; 0 is greedy; default: 1")
    add("--top_k", type=int, help="draw from the N likeliest tokens; default: all")
    add("--top_p", type=float, metavar="P", help="then from the fewest that hold this share of the mass; default: all")
    add("--seed", type=int, default=0, help="default: 0; the same seed draws the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--dtype", choices=DTYPES, metavar="|".join(DTYPES), help="of weights and activations; default: as trained")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json; default: the one of the run")
    parser.add_argument("--chat", action="store_true", help="each prompt is a question to a chat model, apart")
    add("--system", metavar="TEXT", help="with --chat: what every conversation begins with; default: nothing")
    parser.add_argument("--json", action="store_true", help="a line {prompt, text, ended} per prompt, not streamed")
    return common.parse_arguments(parser, fields=("mesh",))


def main() -> int:
    flags = arguments()
    from dsv2_jax import sharding
    from dsv2_jax.inference.sampling import Sampling

    check(flags.chat or flags.system is None, "--system", flags.system, "stand beside --chat")
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p)
    mesh = common.make_mesh(flags.overrides)
    if mesh is not None:
        sharding.check_decoding(mesh)
    found = common.mesh_to_decode if mesh is None else mesh
    model, tokenizer = common.open_model(flags.checkpoint, flags.dtype, flags.tokenizer, found)
    with sharding.use(mesh):
        write(model, tokenizer, sampling, flags)
    return 0


def write(model, tokenizer, sampling, flags) -> None:
    """Print the continuation of every prompt."""
    from dsv2_jax.inference.stream import stream

    for number, prompt in enumerate(flags.prompt, 1):
        text = sys.stdin.read() if prompt == "-" else prompt
        limits = {"max_new_tokens": flags.max_new_tokens, "stop": flags.stop}
        asked = conversation(text, flags.system) if flags.chat else text
        pieces = stream(model, tokenizer, asked, sampling=sampling, seed=flags.seed, **limits)
        if flags.json:
            drawn, ended = collect(pieces)
            print(json.dumps({"prompt": text, "text": drawn, "ended": ended}, ensure_ascii=False), flush=True)
            continue
        if len(flags.prompt) > 1:
            print(f"--- {number} of {len(flags.prompt)}: {text!r}")
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def conversation(question: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": question}]


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
