"""The config.json of released DeepSeek-V2 models and `ModelConfig`, in both directions.

Fields are read as the code released with the weights reads them. Where transformers does otherwise:

- norm_topk_prob=true: the chosen gates are divided by their sum and not scaled (transformers scales, never divides).
- mscale and mscale_all_dim apply one without the other, 1 and 0 where absent (transformers wants both or neither).

A field that is not in the tables below is an error that names it, and so is a value that we do not implement. Of the
balance losses a released configuration knows the expert one; those of devices and of communication are off (None), and
so is token dropping.
"""

import dataclasses
import json as json_library
import pathlib

from dsv2_jax import config_io
from dsv2_jax.config import DTYPES, ConfigError, MLAConfig, ModelConfig
from dsv2_jax.hf.safetensors import BLOCK

ARCHITECTURE, MODEL_TYPE = "DeepseekV2ForCausalLM", "deepseek_v2"

FIELDS = {  # released name: ours
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "dim",
    "first_k_dense_replace": "dense_layers",
    "intermediate_size": "dense_width",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "num_attention_heads": "attention.heads",
    "qk_nope_head_dim": "attention.nope_dim",
    "qk_rope_head_dim": "attention.rope_dim",
    "v_head_dim": "attention.value_dim",
    "kv_lora_rank": "attention.kv_latent",
    "q_lora_rank": "attention.q_latent",
    "rope_theta": "attention.rope_theta",
}
MOE = {
    "n_routed_experts": "moe.routed_experts",
    "n_shared_experts": "moe.shared_experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "moe_intermediate_size": "moe.expert_width",
    "routed_scaling_factor": "moe.routed_scaling",
    "norm_topk_prob": "moe.normalize_gates",
}
GROUPS = {"n_group": "moe.groups", "topk_group": "moe.groups_kept"}
YARN = {
    "factor": "attention.yarn.factor",
    "original_max_position_embeddings": "attention.yarn.original_length",
    "beta_slow": "attention.yarn.beta_slow",
    "beta_fast": "attention.yarn.beta_fast",
    "mscale": "attention.yarn.mscale",
    "mscale_all_dim": "attention.yarn.mscale_all_dim",
}
DEFAULTS = {  # where the released code and transformers agree on what an absent field means
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "beta_slow": 1,
    "beta_fast": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
ONLY = {  # what we implement of fields that change the numbers; null or absent means the first
    "hidden_act": ("silu",),
    "scoring_func": ("softmax",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "seq_aux": (True,),
    "use_mla": (True,),
}
ONLY_ROPE = {"attention_factor": (None,), "truncate": (True,), "partial_rotary_factor": (1.0,)}
NO_NUMBERS = {  # fields that change no number: ids of the tokenizer, records, how it was run
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id",
    "transformers_version", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "id2label", "label2id", "pretraining_tp", "ep_size",
    "head_dim", "qk_head_dim",  # transformers 5 writes them, and derives them from the other widths
}  # fmt: skip
OTHERS = {  # read by name below
    "model_type", "num_key_value_heads", "topk_method", "aux_loss_alpha", "tie_word_embeddings", "quantization_config",
    "rope_scaling", "rope_parameters", "dtype", "torch_dtype",
}  # fmt: skip


def read_json(path: str | pathlib.Path) -> dict:
    """The object that a JSON file holds; `ConfigError` naming the file where there is none."""
    try:
        value = json_library.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return value


def model_config(json: dict, origin: str = "config.json") -> ModelConfig:
    """The model that a config.json describes, computed in the dtype it states (float32 for float16, else bfloat16).

    Raises `ConfigError` that begins with `origin` and names the field: absent, unknown, of a wrong type, impossible, or
    one that changes the numbers in a way that is not implemented.
    """
    fields = _Fields(json, origin)
    fields.check_architecture()
    fields.check_known({*FIELDS, *MOE, *GROUPS, *ONLY, *NO_NUMBERS, *OTHERS})
    fields.check_only(ONLY)
    fields.require(
        fields.get("num_key_value_heads") in (None, fields.get("num_attention_heads")),
        "num_key_value_heads",
        "equal num_attention_heads: every head has its own key and value, formed from the shared latent",
    )
    fields.require(
        fields.get("rms_norm_eps") == 1e-6,
        "rms_norm_eps",
        "be 1e-6: implementations disagree on whether the norms of the latents follow another value",
    )
    is_tied(json, origin)
    _read_quantization(fields)
    ours = {"attention.kind": "mla", "compute.dtype": _compute_dtype(fields)}
    ours |= {path: fields.value(name) for name, path in FIELDS.items() if name != "rope_theta"}
    ours |= _rope(fields)
    ours |= _moe(fields)
    names = {path: name for table in (FIELDS, MOE, GROUPS, YARN) for name, path in table.items()}
    try:
        return config_io.parse(ModelConfig, _nest(ours))
    except ConfigError as error:
        path = next((path for path in sorted(names, key=len, reverse=True) if str(error).startswith(path)), None)
        raise ConfigError(f"{origin}: {f'{names[path]} as ' if path else ''}{error}") from None


def is_tied(json: dict, origin: str = "config.json") -> bool:
    """Whether the folder has no output matrix of its own: the embedding is used. The released ones all have one."""
    tied = json.get("tie_word_embeddings")
    if not isinstance(tied, bool | None):
        raise ConfigError(f"{origin}: tie_word_embeddings={tied!r}: must be true or false")
    return bool(tied)


def published_config(config: ModelConfig, dtype: str = "bfloat16", **ids: int | list[int] | None) -> dict:
    """The config.json, as released ones are spelled, of a folder that holds `config`'s weights in `dtype`.

    `ids` are further fields that change no number, such as bos_token_id and eos_token_id. The embeddings are untied,
    whatever folder a model came from. Raises `ConfigError` where such a file cannot say what `config` does. With
    norm_topk_prob=true transformers computes another model, the released code and ours the same.
    """
    if not isinstance(config.attention, MLAConfig):
        raise ConfigError(f"attention.kind={config.attention.kind!r}: a released DeepSeek-V2 folder holds 'mla' only")
    flat = _flatten(config_io.to_dict(config))
    json = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "torch_dtype": dtype, **ids}
    json |= {name: flat[path] for name, path in FIELDS.items()}
    json |= {name: values[0] for name, values in ONLY.items() if name != "use_mla"}
    json |= {"num_key_value_heads": config.attention.heads, "tie_word_embeddings": False, "use_cache": True}
    yarn = config.attention.yarn
    json["rope_scaling"] = {"type": "yarn", **{name: flat[path] for name, path in YARN.items()}} if yarn else None
    if config.moe:
        json |= {name: flat[path] for name, path in (MOE | GROUPS).items()}
        json["topk_method"] = "greedy" if config.moe.groups == 1 else "group_limited_greedy"
        json["aux_loss_alpha"] = config.moe.balance.expert or 0.0
    _check_complete(config, json)
    return json


def differences(config: ModelConfig) -> list[str]:
    """What transformers 5.23 makes of `published_config(config)` otherwise than the released code, a line each."""
    yarn, moe, heads, found = config.attention.yarn, config.moe, config.attention.heads, []
    if yarn and not (yarn.mscale and yarn.mscale_all_dim) and (yarn.mscale, yarn.mscale_all_dim) != (1, 0):
        named = f"mscale={yarn.mscale}, mscale_all_dim={yarn.mscale_all_dim}"
        found.append(f"{named}: transformers applies both or neither")
    if moe and moe.normalize_gates:
        found.append("norm_topk_prob=true: transformers does not divide the gates by their sum")
    if moe and not moe.shared_experts:
        found.append("n_shared_experts=0: transformers calls their matrices, which are empty, missing")
    if config.dim % heads:
        found.append(f"hidden_size={config.dim}: transformers refuses what num_attention_heads={heads} does not divide")
    return found


def _check_complete(config: ModelConfig, json: dict) -> None:
    """Raise `ConfigError` unless `json` says all of `config` that acts outside of training."""
    read = model_config(json, "this model cannot be exported")
    kept = dataclasses.replace(config, compute=read.compute)
    if config.moe:
        balance = dataclasses.replace(config.moe.balance, device=None, communication=None)
        kept = dataclasses.replace(kept, moe=dataclasses.replace(config.moe, balance=balance, dropping=None))
    for path, ours, theirs in config_io.diff(kept, read):
        raise ConfigError(f"{path}={ours!r}: cannot be exported, it would be read as {theirs!r}")


class _Fields:
    """A config.json (or its section `section`) whose complaints name the file and the field."""

    def __init__(self, json: dict, origin: str, section: str = ""):
        if not isinstance(json, dict):
            raise ConfigError(f"{origin}: must hold a JSON object{f' in {section}' if section else ''}")
        self.json, self.origin, self.section = json, origin, section

    def get(self, name: str):
        """The value; that of `DEFAULTS` where it is absent or null."""
        value = self.json.get(name)
        return DEFAULTS.get(name) if value is None else value

    def value(self, name: str):
        """The same of a field that must be there, or have a default."""
        if name not in self.json and name not in DEFAULTS:
            raise ConfigError(
                f"{self.origin}: {self.section}{name}: is missing, and implementations differ on a default"
            )
        return self.get(name)

    def require(self, condition: bool, name: str, must: str) -> None:
        if not condition:
            raise ConfigError(f"{self.origin}: {self.section}{name}={self.json.get(name)!r}: must {must}")

    def check_architecture(self) -> None:
        must = f"be {MODEL_TYPE!r}: only DeepSeek-V2 models are read"
        self.require(self.get("model_type") == MODEL_TYPE, "model_type", must)
        ok = self.get("architectures") in (None, [ARCHITECTURE])
        self.require(ok, "architectures", f"be [{ARCHITECTURE!r}]")

    def check_known(self, known: set[str]) -> None:
        if unknown := sorted(self.json.keys() - known):
            raise ConfigError(
                f"{self.origin}: {self.section}{unknown[0]}={self.json[unknown[0]]!r}: is not known and may change "
                "the numbers; remove it if it does not"
            )

    def check_only(self, only: dict[str, tuple]) -> None:
        for name, values in only.items():
            ok = self.get(name) is None or self.get(name) in values
            self.require(ok, name, f"be {' or '.join(map(repr, values))}: nothing else is implemented")


def _compute_dtype(fields: _Fields) -> str:
    """bfloat16 unless float32 is stated, or float16, whose fractions bfloat16 cannot hold."""
    names = [name for name in ("dtype", "torch_dtype") if fields.get(name) is not None]
    for name in names:
        fields.require(fields.get(name) in (*DTYPES, "float16"), name, f"be float16, {' or '.join(DTYPES)}")
        fields.require(fields.get(name) == fields.get(names[0]), name, f"equal {names[0]}: keep one")
    stated = fields.get(names[0]) if names else "bfloat16"
    return "float32" if stated == "float16" else stated


def _read_quantization(fields: _Fields) -> None:
    """FP8 weights with block scales are read as the numbers they stand for; activations are not quantised."""
    settings = fields.get("quantization_config")
    if settings is None:
        return
    inner = _Fields(settings, fields.origin, "quantization_config.")
    inner.check_known({"quant_method", "fmt", "weight_block_size", "activation_scheme", "modules_to_not_convert"})
    inner.require(inner.get("quant_method") == "fp8", "quant_method", "be 'fp8'")
    inner.require(inner.get("fmt") in (None, "e4m3"), "fmt", "be 'e4m3'")
    inner.require(
        inner.get("weight_block_size") in (None, [BLOCK, BLOCK]), "weight_block_size", f"be [{BLOCK}, {BLOCK}]"
    )


def _rope(fields: _Fields) -> dict:
    """rope_theta and rope_scaling, as released, or both in rope_parameters, as transformers 5 writes."""
    scaling, parameters = fields.get("rope_scaling"), fields.get("rope_parameters")
    fields.require(scaling is None or parameters is None, "rope_scaling", "be absent beside rope_parameters: keep one")
    place = "rope_scaling" if parameters is None else "rope_parameters"
    given = next((value for value in (scaling, parameters) if value is not None), {})
    rope = _Fields(given, fields.origin, f"{place}.")
    rope.check_known({"type", "rope_type", *YARN, *ONLY_ROPE, *(("rope_theta",) if parameters else ())})
    rope.check_only(ONLY_ROPE)
    kinds = [rope.json[name] for name in ("type", "rope_type") if rope.json.get(name) is not None] or ["default"]
    name = "type" if "type" in rope.json else "rope_type"
    ok = kinds[0] in ("default", "yarn") and kinds[0] == kinds[-1]
    rope.require(ok, name, "be 'yarn' or 'default', and type and rope_type the same")
    thetas = [given.json["rope_theta"] for given in (rope, fields) if given.json.get("rope_theta") is not None]
    rope.require(not thetas or thetas[0] == thetas[-1], "rope_theta", f"equal the rope_theta outside of {place}")
    theta = thetas[0] if thetas else DEFAULTS["rope_theta"]
    yarn = {path: rope.value(name) for name, path in YARN.items()} if kinds[0] == "yarn" else {"attention.yarn": None}
    return {"attention.rope_theta": theta, **yarn}


def _moe(fields: _Fields) -> dict:
    """The MoE layers; none where every layer is one of the first, dense ones."""
    layers, dense = fields.value("num_hidden_layers"), fields.value("first_k_dense_replace")
    if isinstance(layers, int) and isinstance(dense, int) and dense >= layers:
        return {"dense_layers": layers, "moe": None}
    ours = {path: fields.value(name) for name, path in MOE.items()}
    method = fields.value("topk_method")
    fields.require(method in ("greedy", "group_limited_greedy"), "topk_method", "be 'greedy' or 'group_limited_greedy'")
    if method == "group_limited_greedy":
        ours |= {path: fields.value(name) for name, path in GROUPS.items()}
    if ours["moe.shared_experts"] is None:
        ours["moe.shared_experts"] = 0
    if ours["moe.experts_per_token"] == 1:  # the released code does not divide one gate by itself: it scales it
        ours["moe.normalize_gates"] = False
    alpha = fields.get("aux_loss_alpha") or None
    return {**ours, "moe.balance.expert": alpha, "moe.balance.device": None, "moe.balance.communication": None}


def _nest(flat: dict) -> dict:
    """{"a.b": 1} -> {"a": {"b": 1}}"""
    nested: dict = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return nested


def _flatten(nested: dict, prefix: str = "") -> dict:
    """The inverse of `_nest`, sections included."""
    flat = {}
    for name, value in nested.items():
        flat[prefix + name] = value
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
    return flat
