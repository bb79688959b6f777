"""Released folders give transformers' numbers, stored in tests/goldens: no torch is needed (acceptance cases 1-4, 6, 7,
12, 13). Each defect known from other implementations is planted, and is far outside what is allowed."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from quick import quick

from dsv2_jax.hf.pretrained import from_pretrained
from dsv2_jax.inference.generate import generate
from dsv2_jax.model import rope, router
from oracles.compare import worst

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"
ALLOWED, FAR = 2e-4, 1e-2  # of the largest logit
PROMPT = 40  # tokens before the greedy ones
FORWARD = jax.jit(lambda model, tokens_BT, segments_BT=None: model(tokens_BT, segments_BT))
DECODE = jax.jit(lambda model, tokens_BT, cache: model.decode(tokens_BT, cache))


@functools.cache
def golden(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name, defect of the tensors -> the model, through the files."""

    @functools.cache
    def open_model(name, defect=None):
        config, tensors = published.CONFIGS[name], published.weights(published.CONFIGS[name], published.SEEDS[name])
        if defect:
            defect(config, tensors)
        folder = published.write_folder(tmp_path_factory.mktemp(name), config, tensors)
        model, tokenizer = from_pretrained(folder, dtype="float32")
        assert tokenizer is None
        return model

    return open_model


def error(model, name, segments_T=None):
    """Worst logit error of one pass, relative to the largest logit."""
    segments_BT = None if segments_T is None else segments_T[None]
    return worst(FORWARD(model, golden(name)["tokens"][None], segments_BT)[0], golden(name)["logits"])


@pytest.mark.parametrize("name", published.CONFIGS)
def test_logits_to_twice_the_original_length(opened, name):
    assert len(golden(name)["tokens"]) == 2 * published.YARN["original_max_position_embeddings"]
    assert error(opened(name), name) <= ALLOWED


@pytest.mark.parametrize("name", published.CONFIGS)
def test_hidden_states_of_every_layer(opened, name):
    """What enters each block, and leaves the final norm, at every eighth position."""
    model, tokens_BT = opened(name), golden(name)["tokens"][None]

    @jax.jit
    def states(model, tokens_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        x_BTD, cos_sin = model._enter(tokens_BT, positions_BT)
        found = [x_BTD]
        for block in [*model.dense_blocks, *model.moe_blocks]:
            x_BTD, _ = block(x_BTD, cos_sin, None, jnp.ones(tokens_BT.shape, bool))
            found.append(x_BTD)
        return [*found[:-1], model.final_norm(found[-1])]

    for layer, (state_BTD, expected_TD) in enumerate(
        zip(states(model, tokens_BT), golden(name)["hidden"], strict=True)
    ):
        assert worst(state_BTD[0, 3::8], expected_TD) <= 2e-5, layer


@pytest.mark.parametrize("name", quick(published.CONFIGS, "v2"))
def test_chunked_prefill_and_cached_decoding(opened, name):
    """Two chunks, the second across the original length, are expanded; single tokens are absorbed."""
    model, tokens_T = opened(name), golden(name)["tokens"]
    cache, features, done = model.init_cache(1, 128), [], 0
    assert model.moe_blocks[0].attention.longest_absorbed < 48
    for size in (48, 48, *[1] * 32):
        h_BTD, cache = DECODE(model, tokens_T[None, done : done + size], cache)
        features.append(h_BTD)
        done += size
    assert worst(model.logits(jnp.concatenate(features, 1))[0], golden(name)["logits"]) <= ALLOWED


@pytest.mark.parametrize("name", quick(published.CONFIGS, "v2"))
def test_64_greedy_tokens(opened, name):
    """Case 13: the oracle's tokens, across a chunked prefill and past the original length."""
    prompt = golden(name)["tokens"][:PROMPT].tolist()
    found = generate(opened(name), [prompt], max_new_tokens=64, prefill_chunk=16)
    assert found.tokens[0] == golden(name)["greedy"].tolist()


def test_the_cache_holds_latents_only(opened):
    """Case 12: kv_lora_rank + qk_rope_head_dim numbers a token and layer, counted in bytes."""
    for name, config in published.CONFIGS.items():
        cache = opened(name).init_cache(3, 50)
        size = sum(array.nbytes for array in jax.tree.leaves((cache.dense, cache.moe)))
        width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        assert size == 3 * 50 * config["num_hidden_layers"] * width * 4


# --- planted defects -------------------------------------------------------------------------------------------------


def rotary_rows(config, key):
    """Rows of a projection's matrix that are rotated: [heads, P]."""
    P = config["qk_rope_head_dim"]
    if key == "kv_a_proj_with_mqa":
        return config["kv_lora_rank"] + np.arange(P)[None]
    width = config["qk_nope_head_dim"] + P
    return np.arange(config["num_attention_heads"])[:, None] * width + config["qk_nope_head_dim"] + np.arange(P)


def deinterleave(config, tensors, keys):
    for key in keys:
        rows, order = rotary_rows(config, key), np.arange(config["qk_rope_head_dim"]).reshape(-1, 2).T.ravel()
        for name in [name for name in tensors if f".{key}." in name]:
            tensors[name][rows.ravel()] = tensors[name][rows[:, order].ravel()]


def rotary_queries_deinterleaved(config, tensors):
    deinterleave(config, tensors, ["q_proj", "q_b_proj"])


def rotary_key_deinterleaved(config, tensors):
    deinterleave(config, tensors, ["kv_a_proj_with_mqa"])


def heads_of_keys_and_values_apart(config, tensors):
    """kv_b_proj read as all heads' keys, then all heads' values."""
    N, H, V = (config[name] for name in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    rows = np.arange(N * (H + V))
    wrong = np.concatenate([rows[: N * H].reshape(N, H), rows[N * H :].reshape(N, V)], axis=1).ravel()
    for name in [name for name in tensors if "kv_b_proj" in name]:
        tensors[name] = tensors[name][wrong]


def gate_and_up_exchanged(config, tensors):
    for name in [name for name in tensors if "gate_proj" in name]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def experts_in_order_of_their_names(config, tensors):
    """Expert 10 between 1 and 2: the router's rows and the experts no longer belong together."""
    count = config["n_routed_experts"]
    order = np.array(sorted(range(count), key=str)) if count > 10 else np.roll(np.arange(count), 1)
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name] = tensors[name][order]


def norms_exchanged(config, tensors):
    for name in [name for name in tensors if "input_layernorm" in name]:
        other = name.replace("input", "post_attention")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def rotary_pairs_deinterleaved_on_both_sides(config, tensors):
    """Scores would stay if the frequencies were reordered with them."""
    deinterleave(config, tensors, ["q_proj", "q_b_proj", "kv_a_proj_with_mqa"])


LAYOUT_DEFECTS = [
    rotary_queries_deinterleaved,
    rotary_key_deinterleaved,
    rotary_pairs_deinterleaved_on_both_sides,
    heads_of_keys_and_values_apart,
    gate_and_up_exchanged,
    experts_in_order_of_their_names,
    norms_exchanged,
]


@pytest.mark.parametrize("defect", LAYOUT_DEFECTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", published.CONFIGS)
def test_a_wrong_layout_is_seen(opened, name, defect):
    """Case 2 and its like: shapes fit, numbers do not."""
    assert error(opened(name, defect), name) > FAR


def groups_ranked_by_sum(scores_BTE, config):
    grouped_BTDE = scores_BTE.reshape(*scores_BTE.shape[:-1], config.groups, -1)
    _, kept_BTM = jax.lax.top_k(grouped_BTDE.sum(-1), config.groups_kept)
    kept_BTD = jnp.any(kept_BTM[..., None] == jnp.arange(config.groups), axis=-2)
    masked_BTE = jnp.where(kept_BTD[..., None], grouped_BTDE, -1).reshape(scores_BTE.shape)
    return jax.lax.top_k(masked_BTE, config.experts_per_token)


CODE_DEFECTS = {
    "YaRN's softmax scale missing": ("v2", rope, "softmax_scale", lambda dim, yarn: dim**-0.5),
    "scaling omitted": ("v2", router, "gates", lambda chosen, config: chosen),
    "scaling applied twice": ("v2", router, "gates", lambda chosen, config: chosen * config.routed_scaling**2),
    "gates normalised": ("lite", router, "gates", lambda chosen, config: chosen / chosen.sum(-1, keepdims=True)),
    "groups ranked by their sum": ("v2", router, "choose", groups_ranked_by_sum),
}


@pytest.mark.parametrize("defect", CODE_DEFECTS)
def test_a_wrong_computation_is_seen(opened, monkeypatch, defect):
    """Cases 1, 3 and 4."""
    name, module, attribute, wrong = CODE_DEFECTS[defect]
    monkeypatch.setattr(module, attribute, wrong)
    FORWARD.clear_cache()
    try:
        logits_TV, expected_TV = FORWARD(opened(name), golden(name)["tokens"][None])[0], golden(name)["logits"]
    finally:
        FORWARD.clear_cache()
    assert worst(logits_TV, expected_TV) > FAR
    if attribute == "softmax_scale":  # as it was met: the first position is right, and later ones drift
        assert worst(logits_TV[:1], expected_TV[:1]) <= ALLOWED
        assert worst(logits_TV[64:], expected_TV[64:]) > FAR


@pytest.mark.parametrize("name", published.CONFIGS)
def test_bos_twice_is_seen(opened, name):
    """Case 6."""
    tokens_T, logits_TV = golden(name)["tokens"], golden(name)["logits"]
    twice_T = np.concatenate([tokens_T[:1], tokens_T[:-1]])
    assert worst(FORWARD(opened(name), twice_T[None])[0, 1:], logits_TV[:-1]) > FAR


def test_masking_what_equals_pad_is_seen(opened):
    """Case 7: PAD is EOS, and the text holds EOS; a mask made of `token != pad` hides it."""
    tokens_T, pad = golden("v2")["tokens"], published.V2["eos_token_id"]
    assert 3 < (tokens_T == pad).sum() < 20
    assert error(opened("v2"), "v2", segments_T=np.ones_like(tokens_T)) <= ALLOWED
    assert error(opened("v2"), "v2", segments_T=(tokens_T != pad).astype(np.int32)) > FAR
