"""Times transformers' DeepseekV2ForCausalLM at the shape of a preset, for the ratios in README.md.

    pip install -e ".[parity]" && python tests/parity/peer_benchmark.py train --batch=8 --seq=256
    python tests/parity/peer_benchmark.py decode --batch=16 --prompt=64 --new=128
    python tests/parity/peer_benchmark.py train --preset=v2_lite --layers=4 --seq=4096 --device=cuda --dtype=bfloat16

Prints one JSON line like experiments/benchmark.py does. Run both within the same minutes: machines drift. In bfloat16
both train over float32 masters, and decode with the weights in bfloat16.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import time

import torch
import transformers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from dsv2_jax import presets
from dsv2_jax.hf.config import published_config


def peer_model(args) -> DeepseekV2ForCausalLM:
    """Of the preset's shape, its config.json as we publish it; random weights of `args.dtype`."""
    model = presets.get(args.preset)
    model = dataclasses.replace(model, layers=args.layers or model.layers)
    published = {name: value for name, value in published_config(model).items() if name != "torch_dtype"}
    config = DeepseekV2Config(**published, head_dim=model.attention.rope_dim)
    torch.manual_seed(0)
    with torch.device(args.device):
        whole = DeepseekV2ForCausalLM(config)
    return whole if args.what == "train" else whole.to(getattr(torch, args.dtype))


def timed(run, args, warm: int) -> float:
    """Median seconds of `args.repeats` runs, after `warm` that do not count."""
    seconds = []
    for _ in range(args.repeats + warm):
        _wait(args)
        start = time.perf_counter()
        run()
        _wait(args)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm:])


def _wait(args) -> None:
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize()


def train(args) -> dict:
    model = peer_model(args).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.seq), device=args.device)
    rounded = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def step():
        optimizer.zero_grad(set_to_none=True)
        with rounded:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    median = timed(step, args, warm=2)
    return {"tokens_per_second": args.batch * args.seq / median, "median_step_seconds": median}


def decode(args) -> dict:
    model = peer_model(args).eval()
    tokens = torch.randint(2, model.config.vocab_size, (args.batch, args.prompt), device=args.device)
    options = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def generate():
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert out.shape == (args.batch, args.prompt + args.new)

    median = timed(generate, args, warm=1)
    return {"tokens_per_second": args.batch * args.new / median, "median_generate_seconds": median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("--preset", default="peer_tiny")
    parser.add_argument("--layers", type=int, help="so many of the preset's layers (default: all)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="as torch names it: cpu, cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    result = (train if args.what == "train" else decode)(args)
    asked = {
        name: getattr(args, name) for name in ("what", "preset", "layers", "batch", "seq", "prompt", "new", "dtype")
    }
    is_cuda = torch.device(args.device).type == "cuda"
    run = {
        "command": shlex.join(["python", "tests/parity/peer_benchmark.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if is_cuda else args.device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"implementation": "transformers"} | asked | result | run))


if __name__ == "__main__":
    main()
