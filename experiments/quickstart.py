"""Train a small, complete DeepSeek-V2 (MLA, DeepSeekMoE, device-limited routing, all balance losses) on this machine.

Without --data it learns the source of Python's own standard library. It ends with held-out bits per byte beside a
unigram model's, three continuations drawn through the latent cache, plots, and a page that shows all of it. Started
again it goes on where it stopped, or says that the run is complete.
"""

import itertools
import pathlib

import common


def main() -> None:
    parser = common.argument_parser(
        f"{__doc__}\nAny field of dsv2_jax/config.py may follow as --config.section.field=value.",
        "python experiments/quickstart.py --data='notes/**/*.md' --workdir=runs/notes --config.train.batch_size=4",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="training steps (default: those of configs/quickstart.py)"
    )
    parser.add_argument(
        "--workdir", default="runs/quickstart", metavar="FOLDER", help="run folder (default: %(default)s)"
    )
    parser.add_argument("--data", metavar="GLOBS", help="train on these files instead: names or globs, with commas")
    arguments = common.parse_arguments(parser, fields=("model", "train", "data", "mesh"))
    overrides = [("train.steps", str(arguments.steps))] if arguments.steps is not None else []
    if arguments.data:
        overrides += [("data.sources.0.name", "data"), ("data.sources.0.paths", arguments.data)]
        overrides += [("data.virtual_shards", "1")]  # few documents do
    here = pathlib.Path(__file__).parent
    config = common.load_config(str(here / "configs" / "quickstart.py"), overrides + arguments.overrides)
    workdir = pathlib.Path(arguments.workdir)
    page = workdir / "report.html"
    shown_before = page.stat().st_mtime_ns if page.exists() else None

    result = common.train(config, arguments.workdir)
    if result["step"] < config.train.steps:
        return  # stopped by a signal; the trainer has said how to go on
    newest = (workdir / "metrics.jsonl").stat().st_mtime_ns
    if shown_before is not None and shown_before > newest:
        print(f"Its report: {page}")
        return

    from dsv2_jax.train.report import write_report

    if "held_out/bits_per_byte" in result:
        held_out, unigram = result["held_out/bits_per_byte"], result["unigram_bits_per_byte"]
        print(f"held-out bits per byte: {held_out:.4f}")
        print(f"a unigram model's:      {unigram:.4f} (ratio {held_out / unigram:.3f})")
    samples = draw_samples(config, workdir)
    for prompt, text in samples:
        print(f"\n--- {prompt!r} goes on:\n{prompt}{text}")
    print(f"\nreport: {write_report(workdir, samples)}")
    print(f'more:   python experiments/generate.py --checkpoint={workdir} --prompt="..."')


def draw_samples(config, workdir: pathlib.Path, prompt_tokens: int = 24, new_tokens: int = 96) -> list[tuple[str, str]]:
    """Three pairs (prompt, continuation): how held-out documents begin, and what the trained model makes of it."""
    from dsv2_jax.checkpoint import restore_params
    from dsv2_jax.data.pipeline import held_out_batches
    from dsv2_jax.data.tokenizer import Tokenizer
    from dsv2_jax.inference.generate import generate
    from dsv2_jax.inference.sampling import Sampling
    from dsv2_jax.model.counting import abstract_model

    tokenizer = Tokenizer.load(workdir / "data" / "tokenizer.json")
    model = restore_params(workdir, abstract_model(config.model)).unstacked()
    batches = held_out_batches(workdir / "data", config.train.sequence_length, 8, tokenizer.token_bytes())
    prompt_tokens = min(prompt_tokens, config.model.max_length // 2)
    new_tokens = min(new_tokens, config.model.max_length - prompt_tokens)
    prompts = choose_prompts(batches, tokenizer.bos, prompt_tokens)
    sampling = Sampling(temperature=0.8, top_p=0.95)
    drawn = generate(model, prompts, max_new_tokens=new_tokens, sampling=sampling, eos=tokenizer.eos)
    return [(tokenizer.decode(p), tokenizer.decode(t)) for p, t in zip(prompts, drawn.tokens, strict=True)]


def choose_prompts(batches, bos: int, most: int) -> list[list[int]]:
    """How three documents begin: `most` tokens, of short ones half; the same again where there are fewer than three."""
    found = []
    for batch in batches:
        for tokens_T, segments_T in zip(batch.tokens_BT.tolist(), batch.segments_BT.tolist(), strict=True):
            for start, (token, segment) in enumerate(zip(tokens_T, segments_T, strict=True)):
                if token == bos and segment:
                    half = (segments_T.count(segment) + 1) // 2
                    found.append(tokens_T[start : start + min(most, half)])
    found.sort(key=len, reverse=True)
    return list(itertools.islice(itertools.cycle(found or [[bos]]), 3))


if __name__ == "__main__":
    common.run(main)
