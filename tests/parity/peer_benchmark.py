"""Times transformers' DeepseekV2ForCausalLM at the `peer_tiny` shape, for the ratios in README.md.

    pip install -e ".[parity]" && python tests/parity/peer_benchmark.py train --batch=8 --seq=256
    python tests/parity/peer_benchmark.py decode --batch=16 --prompt=64 --new=128

Prints one JSON line like experiments/benchmark.py does. Run both within the same minutes: machines drift.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

VOCAB = 4096


def peer_model() -> DeepseekV2ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_shared_experts=2,
        n_routed_experts=16,
        num_experts_per_tok=4,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.02,
        use_cache=True,
    )
    return DeepseekV2ForCausalLM(config)


def train(batch: int, seq: int, steps: int) -> dict:
    model = peer_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, VOCAB, (batch, seq))
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    return {"tokens_per_second": batch * seq / median, "median_step_seconds": median}


def decode(batch: int, prompt: int, new: int, repeats: int) -> dict:
    model = peer_model().eval()
    tokens = torch.randint(2, VOCAB, (batch, prompt))
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            seconds.append(time.perf_counter() - start)
            assert out.shape == (batch, prompt + new)
    median = statistics.median(seconds[1:])
    return {"tokens_per_second": batch * new / median, "median_generate_seconds": median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.what == "train":
        result = train(args.batch, args.seq, args.repeats)
    else:
        result = decode(args.batch, args.prompt, args.new, args.repeats)
    print(json.dumps({"implementation": "transformers", "what": args.what, "batch": args.batch} | result))


if __name__ == "__main__":
    main()
