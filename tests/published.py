"""Small models laid out as the released ones are: config.json, names and shapes of tensors. Imports nothing of ours.

Weights come from a seed through raw PCG64 words, whose stream NumPy guarantees, so goldens need to hold outputs only.
"""

import json
import pathlib
import zlib

import numpy as np
from safetensors.numpy import save_file

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 112,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "intermediate_size": 44,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 14,
    "n_routed_experts": 9,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "max_position_embeddings": 2560,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 110,
    "eos_token_id": 111,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
}
V2 = LITE | {
    "q_lora_rank": 28,
    "n_routed_experts": 24,
    "num_experts_per_tok": 4,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}
CONFIGS = {"lite": LITE, "v2": V2}
SEEDS = {"lite": 13, "v2": 37}  # of the goldens: no router and no greedy token is nearly undecided


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a published folder, by its name."""
    D, V, N = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    H, P, R, Q = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "q_lora_rank"))

    def ffn(prefix: str, width: int) -> dict:
        wide = {f"{prefix}.{name}_proj.weight": (width, D) for name in ("gate", "up")}
        return wide | {f"{prefix}.down_proj.weight": (D, width)}

    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for layer in range(config["num_hidden_layers"]):
        block, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        found |= {f"{block}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        if Q is None:
            found[f"{attention}.q_proj.weight"] = (N * (H + P), D)
        else:
            found |= {f"{attention}.q_a_proj.weight": (Q, D), f"{attention}.q_a_layernorm.weight": (Q,)}
            found[f"{attention}.q_b_proj.weight"] = (N * (H + P), Q)
        found |= {f"{attention}.kv_a_proj_with_mqa.weight": (R + P, D), f"{attention}.kv_a_layernorm.weight": (R,)}
        found[f"{attention}.kv_b_proj.weight"] = (N * (H + config["v_head_dim"]), R)
        found[f"{attention}.o_proj.weight"] = (D, N * config["v_head_dim"])
        if layer < config["first_k_dense_replace"]:
            found |= ffn(f"{block}.mlp", config["intermediate_size"])
            continue
        width = config["moe_intermediate_size"]
        found[f"{block}.mlp.gate.weight"] = (config["n_routed_experts"], D)
        found |= ffn(f"{block}.mlp.shared_experts", width * config["n_shared_experts"])
        for expert in range(config["n_routed_experts"]):
            found |= ffn(f"{block}.mlp.experts.{expert}", width)
    return found


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [0, 1), the same on every version of NumPy."""
    words = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(int(np.prod(shape)))
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors of a size at which nothing is trivial: unit residual stream, attention and affinities spread."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        centred = uniform(seed, name, shape) - 0.5
        if "norm" in name:
            return 1 + 0.6 * centred
        gain = 1.3
        if "embed_tokens" in name:
            gain *= shape[-1] ** 0.5
        elif name.endswith("mlp.gate.weight"):  # the router
            gain *= 2
        elif ".experts." in name and "down_proj" in name:
            gain *= config["routed_scaling_factor"] ** -0.5
        return gain * 12**0.5 * centred * shape[-1] ** -0.5

    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes(config).items()}


def tokens(config: dict, length: int, seed: int = 0) -> np.ndarray:
    """BOS and text in which the end token, which is also what padding is made of, stands here and there."""
    row_T = (uniform(seed, "tokens", (length,)) * config["bos_token_id"]).astype(np.int64)
    row_T[7::13] = config["eos_token_id"]
    row_T[0] = config["bos_token_id"]
    return row_T


def write_folder(path: pathlib.Path, config: dict, tensors: dict, shards: int = 2) -> pathlib.Path:
    """config.json, `shards` safetensors files and their index, as published; no tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    index = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        mine = {name: np.ascontiguousarray(tensors[name]) for name in index if index[name] == file}
        save_file(mine, path / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    body = {"metadata": {"total_size": size}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(body, indent=2))
    return path
