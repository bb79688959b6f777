"""Every part of released models against the NumPy oracle, which reads the published tensors itself; each part is given
the oracle's own input, so that an error is seen where it arises. Past the original length, so that YaRN shows."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import published
import pytest

from dsv2_jax.hf.pretrained import from_pretrained
from dsv2_jax.model import rope, router
from oracles import published as oracle
from oracles.compare import worst
from oracles.layers import softmax
from oracles.rope import rotate
from oracles.routing import route

LENGTH = 96
SEED = 1


@functools.cache
def expected(name):
    config = published.CONFIGS[name]
    return oracle.layer_by_layer(published.weights(config, SEED), config, published.tokens(config, LENGTH, SEED))


@pytest.fixture(scope="module", params=published.CONFIGS)
def parts(request, tmp_path_factory):
    """(name, blocks, what every block made of the oracle's inputs, the logits of the whole)."""
    name = request.param
    config = published.CONFIGS[name]
    folder = published.write_folder(tmp_path_factory.mktemp(name), config, published.weights(config, SEED))
    model, _ = from_pretrained(folder, dtype="float32")

    @jax.jit
    def run(model, inputs, tokens_BT):
        attention = model.config.attention
        places_BT, real_BT = jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), bool)
        cos_sin = rope.rotations(places_BT, attention.rope_dim, attention.rope_theta, attention.yarn)
        made = []
        for block, given in zip([*model.dense_blocks, *model.moe_blocks], inputs, strict=True):
            latents_BTC = block.attention.latents(given["attention_in"], cos_sin)
            made.append(
                {
                    "attention_in": block.attention_norm(given["x"]),
                    "rotary_key": latents_BTC[..., attention.kv_latent :],
                    "attention_out": block.attention(given["attention_in"], cos_sin, None),
                    "ffn_in": block.ffn_norm(given["between"]),
                    "ffn_out": block.ffn(given["ffn_in"], real_BT)[0] if block.is_moe else block.ffn(given["ffn_in"]),
                    "block": block(given["x"], cos_sin, None, real_BT)[0],
                }
            )
            if block.is_moe:
                logits_BTE = given["ffn_in"] @ block.ffn.centroids[...]
                routing = router.route(logits_BTE, real_BT, model.config.moe)
                made[-1] |= {"chosen": routing.expert_BTK, "gates": routing.gate_BTK}
        return made, model(tokens_BT)

    blocks, _ = expected(name)
    inputs = [
        {key: jnp.asarray(block[key], jnp.float32)[None] for key in ("x", "attention_in", "ffn_in")}
        | {"between": jnp.asarray(block["x"] + block["attention_out"], jnp.float32)[None]}
        for block in blocks
    ]
    made, logits_BTV = run(model, inputs, published.tokens(config, LENGTH, SEED)[None])
    return name, model, [{key: np.asarray(value[0]) for key, value in one.items()} for one in made], logits_BTV[0]


@pytest.mark.parametrize("part", ["attention_in", "attention_out", "ffn_in", "ffn_out", "gates"])
def test_part(parts, part):
    """The norms, attention, router and experts of every block."""
    name, _, made, _ = parts
    checked = 0
    for ours, theirs in zip(made, expected(name)[0], strict=True):
        if part in ours:
            assert worst(ours[part], theirs[part]) <= 1e-5
            checked += 1
    assert checked == (2 if part == "gates" else 3)


def test_router_chooses_the_same_experts(parts):
    """Case 17: wherever the affinities that decide are further apart than 1e-5."""
    name, _, made, _ = parts
    settings = oracle.settings(published.CONFIGS[name]).moe
    near = 0
    for ours, theirs in zip(made[1:], expected(name)[0][1:], strict=True):
        for scores_E, chosen_K, wanted_K in zip(theirs["scores"], ours["chosen"], theirs["chosen"], strict=True):
            clear = oracle.smallest_gap([scores_E], settings) > 1e-5
            near += not clear
            assert set(chosen_K) == set(wanted_K) or not clear
    assert near <= 2


def test_rotary_key(parts):
    name, _, made, _ = parts
    config = published.CONFIGS[name]
    w, settings = oracle.weights(published.weights(config, SEED), config), oracle.settings(config).attention
    for ours, theirs, block in zip(made, expected(name)[0], w["blocks"], strict=True):
        key_TP = theirs["attention_in"] @ block["attention"]["k_rope"]
        turned = [rotate(key_P, t, settings.rope_theta, settings.yarn) for t, key_P in enumerate(key_TP)]
        assert worst(ours["rotary_key"], turned) <= 2e-5
        assert worst(ours["rotary_key"], key_TP) > 0.1


def test_block_and_model(parts):
    name, model, made, logits_TV = parts
    blocks, features_TD = expected(name)
    for ours, theirs in zip(made, blocks, strict=True):
        assert worst(ours["block"], theirs["x"] + theirs["attention_out"] + theirs["ffn_out"]) <= 1e-5
    unembed_DV = np.asarray(model.unembed[...], np.float64)
    assert worst(logits_TV, features_TD @ unembed_DV) <= 3e-5


@jax.jit
def chosen(moe, y_BTD):
    """The experts that the layer routes to, seen as it asks for them."""
    seen, route_ours = [], router.route
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "route", lambda *args, **kwargs: seen.append(route_ours(*args, **kwargs)) or seen[0])
        moe(y_BTD, jnp.ones(y_BTD.shape[:2], bool))
    return seen[0].expert_BTK


def test_router_of_a_bfloat16_model_decides_in_float32(tmp_path):
    """Case 17: hidden states in bfloat16, the same experts as the oracle's for these; a bfloat16 product flips some."""
    config = published.V2
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in published.weights(config, SEED).items()}
    model, _ = from_pretrained(published.write_folder(tmp_path, config, tensors))
    assert model.config.compute.dtype == "bfloat16"
    settings = oracle.settings(config).moe
    flips = clear = 0
    for layer, block in enumerate(model.moe_blocks, 1):
        y_TD = jnp.asarray(expected("v2")[0][layer]["ffn_in"], jnp.bfloat16)
        centroids_DE = block.ffn.centroids[...]
        assert centroids_DE.dtype == jnp.float32
        expert_TK = np.asarray(chosen(block.ffn, y_TD[None])[0])
        scores_TE = softmax(np.asarray(y_TD, np.float64) @ np.asarray(centroids_DE, np.float64))
        wanted_TK, _ = route(scores_TE, settings)
        rough_TE = jax.nn.softmax((y_TD @ centroids_DE.astype(jnp.bfloat16)).astype(jnp.float32))
        rough_TK = router.choose(rough_TE[None], model.config.moe)[1][0]
        for t in range(LENGTH):
            if oracle.smallest_gap(scores_TE[t : t + 1], settings) > 1e-5:
                clear += 1
                assert set(expert_TK[t]) == set(wanted_TK[t])
                flips += set(rough_TK[t].tolist()) != set(wanted_TK[t])
    assert clear > 1.8 * LENGTH
    assert flips > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": published.YARN | {"mscale_all_dim": 0.0, "mscale": 0.0}},
        {"rope_scaling": published.YARN | {"factor": 20}},
        {"rope_scaling": None},
        {"rope_theta": 5000},
        {"routed_scaling_factor": 15.0},
        {"norm_topk_prob": True},
        {"topk_group": 4},
        {"topk_method": "greedy"},
        {"num_experts_per_tok": 3},
        {"rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_the_oracle_reads_every_setting(changes):
    """Or agreeing with it would say nothing about the setting."""
    _, features_TD = expected("v2")
    config = published.V2 | changes
    tensors = published.weights(published.V2, SEED)
    _, other_TD = oracle.layer_by_layer(tensors, config, published.tokens(config, LENGTH, SEED))
    assert worst(other_TD, features_TD) > 1e-3
