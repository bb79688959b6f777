"""config.json of every released variant, in both spellings; no field is ignored but those known to change no number."""

import dataclasses
import json

import pytest
import small

from dsv2_jax import presets
from dsv2_jax.config import BalanceConfig, ConfigError, DroppingConfig, ModelConfig, YarnConfig
from dsv2_jax.hf import config as hf_config
from dsv2_jax.hf.config import differences, is_tied, model_config, published_config

YARN = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
YARN |= {"original_max_position_embeddings": 4096, "type": "yarn"}
CLASSES = {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": CLASSES,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2 = V2_LITE | {
    "ep_size": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V2_5 = V2 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}


def respelled(released: dict) -> dict:
    """As transformers 5 writes it again."""
    gone = ("rope_scaling", "rope_theta", "torch_dtype", "aux_loss_alpha", "seq_aux", "scoring_func", "moe_layer_freq")
    rope = {**(released["rope_scaling"] or {"rope_type": "default"}), "rope_theta": released["rope_theta"]}
    rope["rope_type"] = rope.get("type", "default")
    new = {"dtype": released["torch_dtype"], "rope_parameters": rope, "mlp_bias": False, "head_dim": 64}
    new |= {"qk_head_dim": 192, "output_router_logits": False, "pad_token_id": None, "transformers_version": "5.23.0"}
    return {name: value for name, value in released.items() if name not in (*gone, "auto_map", "ep_size")} | new


def expected(preset: str, yarn: YarnConfig | None, alpha: float | None) -> ModelConfig:
    config = small.change(presets.get(preset), attention__yarn=yarn, max_length=163840, init_std=0.02)
    return small.change(config, moe__balance=BalanceConfig(alpha, None, None))


@pytest.mark.parametrize(
    ("released", "preset", "yarn"),
    [
        (V2, "v2", YarnConfig(factor=40.0)),
        (V2_LITE, "v2_lite", YarnConfig(factor=40.0)),
        (V2_5, "v2", YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)),
        (V2_LITE | {"rope_scaling": None}, "v2_lite", None),
    ],
    ids=["V2 and V2-Chat", "Lite and Coder-V2-Lite", "Coder-V2 and V2.5", "no YaRN"],
)
def test_released_configurations_in_both_spellings(released, preset, yarn):
    released = json.loads(json.dumps(released))
    assert model_config(released) == expected(preset, yarn, 0.001)
    assert model_config(respelled(released)) == expected(preset, yarn, None)


@pytest.mark.parametrize("name", ["v2_released", "v2_lite_released", "v2", "tiny", "peer_tiny"])
def test_export_and_import_give_the_model_back(name):
    config = presets.get(name)
    json_ = json.loads(json.dumps(published_config(config, bos_token_id=7)))
    assert json_["bos_token_id"] == 7
    assert json_["architectures"] == ["DeepseekV2ForCausalLM"]
    balance = dataclasses.replace(config.moe.balance, device=None, communication=None)
    back = small.change(model_config(json_), compute=config.compute)
    assert back == small.change(config, moe__balance=balance)


def test_a_dense_model_is_exported_and_read():
    config = small.change(small.MODEL, moe=None, dense_layers=3, compute=presets.V2.compute)
    assert model_config(published_config(config)) == config
    assert model_config(V2_LITE | {"first_k_dense_replace": 30}).moe is None


def test_dropping_is_of_training_only_and_does_not_stop_an_export():
    config = small.change(small.MODEL, moe__dropping=DroppingConfig())
    assert published_config(config) == published_config(small.MODEL)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention": small.GQA}, r"attention.kind='gqa'"),
        ({"norm_eps": 1e-5}, r"rms_norm_eps=1e-05: must be 1e-6"),
        ({"moe__experts_per_token": 1, "moe__normalize_gates": True}, r"moe.normalize_gates=True: cannot be exported"),
    ],
)
def test_what_a_released_configuration_cannot_say_is_not_exported(change, named):
    with pytest.raises(ConfigError, match=named):
        published_config(small.change(small.MODEL, **change))


# --- every field -----------------------------------------------------------------------------------------------------

PERTURBED = {  # a valid value that changes the model of V2_5
    "first_k_dense_replace": 2, "hidden_size": 4096, "initializer_range": 0.01, "intermediate_size": 12000,
    "kv_lora_rank": 256, "max_position_embeddings": 4096, "moe_intermediate_size": 1408, "n_group": 4,
    "n_routed_experts": 80, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
    "num_hidden_layers": 12, "q_lora_rank": None, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "rope_theta": 5e5,
    "rope_scaling": None, "routed_scaling_factor": 1.0, "topk_group": 2, "topk_method": "greedy", "v_head_dim": 64,
    "vocab_size": 1000, "aux_loss_alpha": 0.0, "torch_dtype": "float32",
}  # fmt: skip
REFUSED = {  # a value that changes the numbers, and that we do not implement
    "architectures": ["LlamaForCausalLM"], "attention_bias": True, "attention_dropout": 0.1, "hidden_act": "gelu",
    "model_type": "deepseek_v3", "moe_layer_freq": 2, "num_attention_heads": 64, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "scoring_func": "sigmoid", "seq_aux": False,
}  # fmt: skip
NO_NUMBERS = {
    "auto_map": {}, "bos_token_id": 1, "ep_size": 8, "eos_token_id": [1, 2], "pretraining_tp": 2,
    "transformers_version": "5.0", "use_cache": False,
}  # fmt: skip


def test_every_field_of_a_released_configuration_acts_or_is_known_not_to():
    assert V2_5.keys() - {"tie_word_embeddings"} == PERTURBED.keys() | REFUSED.keys() | NO_NUMBERS.keys()
    assert (set(V2_5) | set(respelled(V2_5))) <= {
        *hf_config.FIELDS, *hf_config.MOE, *hf_config.GROUPS, *hf_config.ONLY, *hf_config.NO_NUMBERS, *hf_config.OTHERS
    }  # fmt: skip


@pytest.mark.parametrize(("name", "value"), PERTURBED.items())
def test_a_changed_field_changes_the_model(name, value):
    assert model_config(V2_5 | {name: value}) != model_config(V2_5)


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_a_value_we_do_not_implement_is_named(name, value):
    named = "num_key_value_heads" if name == "num_attention_heads" else name
    with pytest.raises(ConfigError, match=rf"^some/config.json: {named}="):
        model_config(V2_5 | {name: value}, "some/config.json")


@pytest.mark.parametrize(("name", "value"), NO_NUMBERS.items())
def test_fields_without_numbers_do_not_matter(name, value):
    assert model_config(V2_5 | {name: value}) == model_config(V2_5)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("name", "value"),
    {
        "factor": 4,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.5,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 2048,
    }.items(),
)
def test_a_changed_field_of_yarn_changes_the_model(spelling, name, value):
    released = V2_5 if spelling == "rope_scaling" else respelled(V2_5)
    assert model_config(released | {spelling: released[spelling] | {name: value}}) != model_config(released)


def without(name: str) -> dict:
    return {key: value for key, value in V2_5.items() if key != name}


def rope(**changes) -> dict:
    return V2_5 | {"rope_scaling": V2_5["rope_scaling"] | changes}


@pytest.mark.parametrize(
    ("released", "named"),
    [
        (
            {**V2_5, "num_nextn_predict_layers": 1},
            r"num_nextn_predict_layers=1: is not known and may change the numbers",
        ),
        (without("q_lora_rank"), r"q_lora_rank: is missing"),
        (without("topk_method"), r"topk_method: is missing"),
        (without("model_type"), r"model_type=None: must be 'deepseek_v2'"),
        (V2_5 | {"hidden_size": "5120"}, r"hidden_size as dim='5120': must be an integer"),
        (V2_5 | {"n_group": 7}, r"n_group as moe.groups=7: must divide routed_experts=160"),
        (V2_5 | {"n_group": None}, r"n_group as moe.groups=None: must be an integer"),
        (V2_5 | {"topk_method": "noaux_tc"}, r"topk_method='noaux_tc': must be 'greedy' or 'group_limited_greedy'"),
        (V2_5 | {"tie_word_embeddings": "no"}, r"tie_word_embeddings='no': must be true or false"),
        (V2_5 | {"torch_dtype": "float8"}, r"torch_dtype='float8': must be float16"),
        (V2_5 | {"rope_scaling": "yarn"}, r"must hold a JSON object in rope_scaling"),
        (V2_5 | {"rope_theta": "1e4"}, r"rope_theta as attention.rope_theta='1e4': must be a number"),
        (
            V2_5 | {"rope_parameters": {"rope_type": "default"}},
            r"rope_scaling=.* must be absent beside rope_parameters",
        ),
        (rope(type="linear"), r"rope_scaling.type='linear': must be 'yarn' or 'default'"),
        (rope(rope_type="default"), r"rope_scaling.type='yarn': must be .* and type and rope_type the same"),
        (rope(factor=None), r"factor as attention.yarn.factor=None: must be a number"),
        (rope(attention_factor=1.2), r"rope_scaling.attention_factor=1.2: must be None"),
        (rope(truncate=False), r"rope_scaling.truncate=False: must be True"),
        (rope(long_factor=[1]), r"rope_scaling.long_factor=\[1\]: is not known"),
        ([], r"must hold a JSON object"),
    ],
)
def test_a_mistake_is_named(released, named):
    with pytest.raises(ConfigError, match=named) as caught:
        model_config(released, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")


def test_block_scaled_fp8_is_read_and_other_quantisation_refused():
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    assert model_config(V2_5 | {"quantization_config": fp8}) == model_config(V2_5)
    for name, value in {"quant_method": "awq", "fmt": "e5m2", "weight_block_size": [64, 64], "bits": 4}.items():
        with pytest.raises(ConfigError, match=rf"quantization_config.{name}="):
            model_config(V2_5 | {"quantization_config": fp8 | {name: value}})


def test_dtypes_that_are_stated():
    stated = {"bfloat16": "bfloat16", "float32": "float32", "float16": "float32", None: "bfloat16"}
    for dtype, ours in stated.items():
        assert model_config(V2_5 | {"torch_dtype": dtype}).compute.dtype == ours


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "torch_dtype='bfloat16': must equal dtype"),
        ({"dtype": "int8"}, "dtype='int8': must be float16"),
        ({"rope_scaling": []}, "must hold a JSON object in rope_scaling"),
        ({"rope_scaling": False}, "must hold a JSON object in rope_scaling"),
        ({"rope_scaling": None, "rope_parameters": []}, "must hold a JSON object in rope_parameters"),
    ],
)
def test_what_says_nothing_or_two_things_is_named(changes, named):
    with pytest.raises(ConfigError, match=rf"^config.json: {named}"):
        model_config(V2_5 | changes)


YARN_OF = {"ours": YarnConfig(factor=40.0), "cosine alone": YarnConfig(factor=40.0, mscale_all_dim=0.0)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"attention__yarn": YARN_OF["ours"]}, []),
        ({"attention__yarn": YARN_OF["cosine alone"]}, ["mscale=0.707, mscale_all_dim=0.0: transformers applies both"]),
        ({"moe__normalize_gates": True}, ["norm_topk_prob=true"]),
        ({"moe__shared_experts": 0}, ["n_shared_experts=0"]),
        ({"dim": 50}, ["hidden_size=50: transformers refuses"]),
    ],
)
def test_what_transformers_makes_otherwise_of_an_export_is_said(changes, named):
    model = small.change(small.MODEL, dim=24, attention__heads=4)
    found = differences(small.change(model, **changes))
    assert len(found) == len(named)
    assert all(line.startswith(name) for line, name in zip(found, named))


def test_one_expert_is_scaled_even_where_gates_are_normalised():
    """The released code divides by the sum only where several experts are chosen."""
    one = V2_5 | {"num_experts_per_tok": 1, "norm_topk_prob": True}
    assert not model_config(one).moe.normalize_gates
    assert model_config(one | {"num_experts_per_tok": 2}).moe.normalize_gates


def test_ties():
    assert not is_tied(V2)
    assert not is_tied({"tie_word_embeddings": None})
    assert is_tied(V2 | {"tie_word_embeddings": True})
