"""Parameters, cached elements and FLOPs of a model, counted from abstract shapes: no memory is used.

A FLOP is one multiplication or one addition, so a matrix costs 2 a parameter and token forward and 6 with its backward.
Recomputation (`ComputeConfig.remat`) is not counted: these are the FLOPs of the model, not of the machine.
"""

import dataclasses
import functools

import jax

from dsv2_jax import presets
from dsv2_jax.config import GQAConfig, MLAConfig, ModelConfig
from dsv2_jax.model.cache import entry_width
from dsv2_jax.model.transformer import Transformer

EMBEDDING, UNEMBEDDING, ATTENTION, NORMS = "input embedding", "output matrix", "attention", "norms"
DENSE, ROUTER, SHARED, ROUTED = "dense FFN", "router", "shared experts", "routed experts"
PART_OF = {  # by attribute name, the first that occurs in a parameter's path; what is left is an FFN
    "scale": NORMS,
    "embed": EMBEDDING,
    "unembed": UNEMBEDDING,
    "attention": ATTENTION,
    "centroids": ROUTER,
    "shared": SHARED,
}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters by part of the model: all of them, and those that one token passes through."""

    parts: dict[str, int]
    active_parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters one token passes through, the input embedding left out: a token reads one row of it."""
        return self.active_with_embedding - self.active_parts[EMBEDDING]

    @property
    def active_with_embedding(self) -> int:
        return sum(self.active_parts.values())

    @property
    def active_in_matmuls(self) -> int:
        return self.active - self.active_parts[NORMS]


def abstract_model(model: ModelConfig) -> Transformer:
    """The model with `jax.ShapeDtypeStruct` in place of every array; no device is touched."""
    return jax.eval_shape(lambda: Transformer(model, jax.random.key(0)))


def _part(names: list[str]) -> str:
    """The part of the model to which the parameter at this path of attribute names belongs."""
    for name, part in PART_OF.items():
        if name in names:
            return part
    return DENSE if "dense_blocks" in names else ROUTED


@functools.cache
def parameters(model: ModelConfig) -> Parameters:
    """Counts by part, in the order in which a token meets them."""
    parts = dict.fromkeys((EMBEDDING, ATTENTION, DENSE, ROUTER, SHARED, ROUTED, NORMS, UNEMBEDDING), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_model(model)):
        parts[_part([str(getattr(key, "name", getattr(key, "key", ""))) for key in path])] += leaf.size
    active = dict(parts)
    if model.moe:
        active[ROUTED] = parts[ROUTED] * model.moe.experts_per_token // model.moe.routed_experts
    return Parameters(parts, active)


# --- the cache -------------------------------------------------------------------------------------------------------


def cached_elements(model: ModelConfig) -> int:
    """Elements a token leaves in the caches of all layers: (d_c + d_R) a layer for MLA (report, table 1)."""
    return entry_width(model.attention) * model.layers


def cached_elements_compared(model: ModelConfig) -> dict[str, int]:
    """The same for `model`, for its layers and heads under other attentions, and for DeepSeek 67B."""
    attention = model.attention
    head = attention.nope_dim if isinstance(attention, MLAConfig) else attention.head_dim
    groups = {"as MHA": attention.heads, "as GQA-8": 8, "as MQA": 1}
    others = {name: 2 * n * head * model.layers for name, n in groups.items() if attention.heads % n == 0}
    return {
        "this model": cached_elements(model),
        **others,
        "DeepSeek 67B": cached_elements(presets.get("dense_67b")),
    }


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Forward and backward: 6 * (active parameters in matmuls) + 3 * layers * heads * (qk_dim + v_dim) * (T + 1).

    The second term is attention's scores and weighted values: 2 FLOPs each for each of the (T + 1) / 2 keys a query of
    a causal sequence of T tokens sees on average, three times for forward and backward.
    """
    keys = (sequence_length + 1) / 2
    per_key = 2 * model.attention.heads * (model.attention.qk_dim + _value_dim(model.attention))
    return 6 * parameters(model).active_in_matmuls + 3 * model.layers * per_key * keys


def decode_flops_per_token(model: ModelConfig, cache_length: int) -> int:
    """One new token that attends to `cache_length` cached ones (itself among them), MLA in its absorbed form.

    2 * (active parameters in matmuls) + 2 * layers * heads * S * width; the width is (d_c + d_R) + d_c for MLA, twice
    the head's for GQA. Folding W_UK into the query and W_UV into the output costs what applying them did.
    """
    attention = model.attention
    mla = isinstance(attention, MLAConfig)
    width = 2 * attention.kv_latent + attention.rope_dim if mla else 2 * attention.head_dim
    return 2 * parameters(model).active_in_matmuls + 2 * model.layers * attention.heads * width * cache_length


def _value_dim(attention: MLAConfig | GQAConfig) -> int:
    return attention.value_dim if isinstance(attention, MLAConfig) else attention.head_dim
