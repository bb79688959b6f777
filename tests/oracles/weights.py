"""A model's parameters as the dictionaries the oracles take; linear in them, so gradients map the same way."""

import numpy as np


def array(param):
    return np.asarray(param[...], np.float64)


def attention(module):
    config = module.config
    if config.kind == "gqa":
        kv_D2KH = array(module.w_kv)
        return {"q": array(module.w_q), "k": kv_D2KH[:, 0], "v": kv_D2KH[:, 1], "out": array(module.w_o)}
    down_DC, up_RNX = array(module.w_dkv), array(module.w_ukv)
    w = {
        "q_up": array(module.w_q),
        "kv_down": down_DC[:, : config.kv_latent],
        "k_rope": down_DC[:, config.kv_latent :],
        "kv_norm": array(module.kv_norm.scale),
        "k_up": up_RNX[..., : config.nope_dim],
        "v_up": up_RNX[..., config.nope_dim :],
        "out": array(module.w_o),
    }
    if config.q_latent:
        w |= {"q_down": array(module.w_dq), "q_norm": array(module.q_norm.scale)}
    return w


def ffn(module):
    return {name: array(getattr(module, name)) for name in ("gate", "up", "down")}


def moe(module):
    w = ffn(module) | {"router": array(module.centroids)}
    if module.config.shared_experts:
        w |= {f"shared_{name}": value for name, value in ffn(module.shared).items()}
    return w


def block(module):
    return {
        "attention_norm": array(module.attention_norm.scale),
        "attention": attention(module.attention),
        "ffn_norm": array(module.ffn_norm.scale),
        **({"moe": moe(module.ffn)} if module.is_moe else {"ffn": ffn(module.ffn)}),
    }


def transformer(model):
    """Of a model whose blocks are lists (`unstacked`)."""
    return {
        "embed": array(model.embed),
        "norm": array(model.final_norm.scale),
        "unembed": array(model.unembed),
        "blocks": [block(module) for module in [*model.dense_blocks, *model.moe_blocks]],
    }
