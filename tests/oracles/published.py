"""The released model in NumPy float64, from its config.json and its tensors as published.

A second, independent reading of the published layout: linear weights are [out, in], heads are the slow axis of a row of
heads, kv_b_proj holds [k_C; v_C] of each head, rotary pairs are interleaved.
"""

from types import SimpleNamespace

import numpy as np

from oracles import transformer
from oracles.attention import mla
from oracles.layers import rms_norm, swiglu
from oracles.moe import moe
from oracles.routing import affinities, route


def settings(config):
    """What the other oracles read, from a config.json with rope_scaling (or none)."""
    scaling = config.get("rope_scaling")
    yarn = scaling and SimpleNamespace(
        factor=scaling["factor"],
        original_length=scaling["original_max_position_embeddings"],
        beta_slow=scaling["beta_slow"],
        beta_fast=scaling["beta_fast"],
        mscale=scaling["mscale"],
        mscale_all_dim=scaling["mscale_all_dim"],
    )
    limited = config["topk_method"] == "group_limited_greedy"
    return SimpleNamespace(
        norm_eps=config["rms_norm_eps"],
        attention=SimpleNamespace(
            kind="mla",
            heads=config["num_attention_heads"],
            nope_dim=config["qk_nope_head_dim"],
            rope_dim=config["qk_rope_head_dim"],
            kv_latent=config["kv_lora_rank"],
            q_latent=config["q_lora_rank"],
            rope_theta=config["rope_theta"],
            yarn=yarn,
        ),
        moe=SimpleNamespace(
            routed_experts=config["n_routed_experts"],
            shared_experts=config["n_shared_experts"],
            experts_per_token=config["num_experts_per_tok"],
            groups=config["n_group"] if limited else 1,
            groups_kept=config["topk_group"] if limited else 1,
            routed_scaling=config["routed_scaling_factor"],
            normalize_gates=config["norm_topk_prob"],
        ),
    )


def ffn(tensors, prefix):
    return {name: tensors[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up", "down")}


def attention(tensors, prefix, config):
    N, H, R = config["num_attention_heads"], config["qk_nope_head_dim"], config["kv_lora_rank"]

    def heads(name):  # [N * X, in] -> [in, N, X]
        matrix = tensors[f"{prefix}.{name}.weight"]
        return np.moveaxis(matrix.reshape(N, -1, matrix.shape[1]), -1, 0)

    down_CD, up_RNX = tensors[f"{prefix}.kv_a_proj_with_mqa.weight"], heads("kv_b_proj")
    w = {
        "kv_down": down_CD[:R].T,
        "k_rope": down_CD[R:].T,
        "kv_norm": tensors[f"{prefix}.kv_a_layernorm.weight"],
        "k_up": up_RNX[..., :H],
        "v_up": up_RNX[..., H:],
        "out": np.moveaxis(tensors[f"{prefix}.o_proj.weight"].reshape(-1, N, config["v_head_dim"]), 0, -1),
    }
    if config["q_lora_rank"] is None:
        return w | {"q_up": heads("q_proj")}
    down_QD = tensors[f"{prefix}.q_a_proj.weight"]
    return w | {
        "q_down": down_QD.T,
        "q_norm": tensors[f"{prefix}.q_a_layernorm.weight"],
        "q_up": heads("q_b_proj"),
    }


def experts(tensors, prefix, config):
    each = [ffn(tensors, f"{prefix}.experts.{e}") for e in range(config["n_routed_experts"])]
    shared = ffn(tensors, f"{prefix}.shared_experts")
    return {
        "router": tensors[f"{prefix}.gate.weight"].T,
        **{name: np.stack([one[name] for one in each]) for name in ("gate", "up", "down")},
        **{f"shared_{name}": matrix for name, matrix in shared.items()},
    }


def weights(tensors, config):
    """The dictionary of oracles.transformer."""
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    blocks = []
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        is_moe = layer >= config["first_k_dense_replace"]
        blocks.append(
            {
                "attention_norm": tensors[f"{at}.input_layernorm.weight"],
                "attention": attention(tensors, f"{at}.self_attn", config),
                "ffn_norm": tensors[f"{at}.post_attention_layernorm.weight"],
                **({"moe": experts(tensors, f"{at}.mlp", config)} if is_moe else {"ffn": ffn(tensors, f"{at}.mlp")}),
            }
        )
    embed_VD = tensors["model.embed_tokens.weight"]
    return {
        "embed": embed_VD,
        "norm": tensors["model.norm.weight"],
        "unembed": tensors.get("lm_head.weight", embed_VD).T,
        "blocks": blocks,
    }


def logits(tensors, config, tokens_T):
    """[T, V] of one document."""
    ones_T, places_T = np.ones(len(tokens_T), int), np.arange(len(tokens_T))
    return transformer.logits(weights(tensors, config), settings(config), tokens_T, ones_T, places_T)


def layer_by_layer(tensors, config, tokens_T):
    """What each part of each block receives and gives, for comparing one part at a time.

    A list with one dict per block: x (what enters), attention_in, attention_out, ffn_in, ffn_out, and of a MoE block
    scores [T, E], chosen [T, K] and gates [T, K]; and the features after the final norm.
    """
    w, s = weights(tensors, config), settings(config)
    ones_T, places_T = np.ones(len(tokens_T), int), np.arange(len(tokens_T))
    x_TD, blocks = w["embed"][tokens_T], []
    for block in w["blocks"]:
        seen = {"x": x_TD, "attention_in": rms_norm(x_TD, block["attention_norm"], s.norm_eps)}
        attention_in_TD = seen["attention_in"]
        seen["attention_out"] = mla(block["attention"], s.attention, attention_in_TD, ones_T, places_T, s.norm_eps)
        x_TD = x_TD + seen["attention_out"]
        seen["ffn_in"] = rms_norm(x_TD, block["ffn_norm"], s.norm_eps)
        if "moe" in block:
            seen["scores"] = affinities(seen["ffn_in"], block["moe"]["router"])
            seen["chosen"], seen["gates"] = route(seen["scores"], s.moe)
            seen["ffn_out"] = moe(block["moe"], s.moe, seen["ffn_in"], ones_T > 0)[0]
        else:
            seen["ffn_out"] = swiglu(seen["ffn_in"], *(block["ffn"][name] for name in ("gate", "up", "down")))
        x_TD = x_TD + seen["ffn_out"]
        blocks.append(seen)
    return blocks, rms_norm(x_TD, w["norm"], s.norm_eps)


def smallest_gap(scores_TE, s):
    """The least difference, over tokens, between an affinity that decides and the next: of experts, and of groups."""
    per_group = s.routed_experts // s.groups
    gaps = []
    for scores_E in scores_TE:
        if s.groups > 1:
            best_G = np.sort(scores_E.reshape(s.groups, per_group).max(1))[::-1]
            gaps.append(best_G[s.groups_kept - 1] - best_G[s.groups_kept])
            kept = np.argsort(-scores_E.reshape(s.groups, per_group).max(1), kind="stable")[: s.groups_kept]
            scores_E = scores_E.reshape(s.groups, per_group)[kept].ravel()
        ordered = np.sort(scores_E)[::-1]
        if s.experts_per_token < len(ordered):
            gaps.append(ordered[s.experts_per_token - 1] - ordered[s.experts_per_token])
    return min(gaps)
