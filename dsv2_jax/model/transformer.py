"""The transformer: embedding, dense layers, MoE layers, final norm, output matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv2_jax import sharding
from dsv2_jax.config import MLAConfig, ModelConfig
from dsv2_jax.model import parallel, rope
from dsv2_jax.model.attention import MLA
from dsv2_jax.model.baselines import GQA
from dsv2_jax.model.cache import Cache, make_cache
from dsv2_jax.model.layers import RMSNorm, SwiGLU, parameter
from dsv2_jax.model.moe import MoE
from dsv2_jax.types import MoEStats
from kernels_pallas.projection import project


class Block(nnx.Module):
    """x += attention(norm(x)); x += FFN(norm(x)), the FFN dense or DeepSeekMoE."""

    def __init__(self, config: ModelConfig, key: jax.Array, *, is_moe: bool):
        attention_key, ffn_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = (MLA if isinstance(config.attention, MLAConfig) else GQA)(config, attention_key)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = MoE(config, ffn_key) if is_moe else SwiGLU(config, config.dense_width, ffn_key)
        self.is_moe = is_moe

    def feed_forward(self, x_BTD, real_BT, **routing) -> tuple[jax.Array, MoEStats | None]:
        with jax.named_scope("moe" if self.is_moe else "dense"):
            y_BTD = self.ffn_norm(x_BTD)
            out_BTD, stats = self.ffn(y_BTD, real_BT, **routing) if self.is_moe else (self.ffn(y_BTD), None)
        return sharding.constrain(x_BTD + out_BTD, "batch", "sequence", "embed"), stats

    def __call__(self, x_BTD, cos_sin, segments_BT, real_BT, **routing) -> tuple[jax.Array, MoEStats | None]:
        with jax.named_scope("attention"):
            x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_sin, segments_BT)
            x_BTD = sharding.constrain(x_BTD, "batch", "sequence", "embed")
        return self.feed_forward(x_BTD, real_BT, **routing)

    def decode(self, x_BTD, cos_sin, cache_BSC, offset_B, real_BT) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("attention"):
            u_BTD, cache_BSC = self.attention.decode(self.attention_norm(x_BTD), cos_sin, cache_BSC, offset_B)
        x_BTD, _ = self.feed_forward(x_BTD + u_BTD, real_BT)
        return x_BTD, cache_BSC


def _remat(function, policy: str):
    if policy == "none":
        return function
    kept = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}[policy]
    return jax.checkpoint(function, policy=kept)


def _on_its_mesh(method):
    """A method of the model that, without a `sharding.use` around, is traced for the mesh of its parameters."""

    @functools.wraps(method)
    def traced(self, *args, **kwargs):
        with sharding.use_of(self.embed[...]):
            return method(self, *args, **kwargs)

    return traced


class Transformer(nnx.Module):
    """DeepSeek-V2, a pytree of float32 parameters. Its MoE blocks are one, whose leaves have a leading layer axis."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        embed_key, unembed_key, dense_key, moe_key = jax.random.split(key, 4)
        V, D, std = config.vocab_size, config.dim, config.init_std
        self.embed = parameter(embed_key, (V, D), ("vocab", "embed"), std)
        dense_keys = jax.random.split(dense_key, config.dense_layers)
        self.dense_blocks = nnx.List([Block(config, key, is_moe=False) for key in dense_keys])
        self.moe_blocks = nnx.List([])
        if config.moe_layers:
            make_block = functools.partial(Block, config, is_moe=True)
            self.moe_blocks = jax.vmap(make_block)(jax.random.split(moe_key, config.moe_layers))
        self.final_norm = RMSNorm(D, config.norm_eps)
        self.unembed = parameter(unembed_key, (D, V), ("embed", "vocab"), std)
        self.config = config

    @property
    def stacked(self) -> bool:
        return isinstance(self.moe_blocks, Block)

    def _enter(self, tokens_BT, positions_BT):
        attention = self.config.attention
        rotary = attention.rope_dim if isinstance(attention, MLAConfig) else attention.head_dim
        cos_sin = rope.rotations(positions_BT, rotary, attention.rope_theta, attention.yarn)
        return parallel.embed(tokens_BT, self.embed, self.config.compute.dtype), cos_sin

    @_on_its_mesh
    def features(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        training: bool = False,
        protected_B: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEStats | None]:
        """The final norm's output [B, T, D], and the MoE statistics of every MoE layer (leading axis) if there is one.

        On a mesh with `context` > 1 the columns of every argument and of the result are in the order of
        `parallel.zigzag`.

        Args:
          segments_BT: documents of a packed row 1, 2, ...; 0 is padding, which is never routed. None: one document.
          positions_BT: position of each token in its document. None: 0, 1, 2, ...
          training: tokens may be dropped, but none of the sequences in protected_B (boolean).
        """
        if positions_BT is None:
            place_T = parallel.zigzag(tokens_BT.shape[1], sharding.axis_size("context"))
            positions_BT = jnp.broadcast_to(place_T.astype(np.int32), tokens_BT.shape)
        real_BT = jnp.ones(tokens_BT.shape, bool) if segments_BT is None else segments_BT > 0
        x_BTD, cos_sin = self._enter(tokens_BT, positions_BT)

        def apply(block, x_BTD):
            return block(x_BTD, cos_sin, segments_BT, real_BT, **(routing if block.is_moe else {}))

        routing = {"training": training, "protected_B": protected_B}
        apply = _remat(apply, self.config.compute.remat)
        for block in self.dense_blocks:
            x_BTD, _ = apply(block, x_BTD)
        stats = None
        if self.stacked:
            unroll = self.config.compute.unroll
            x_BTD, stats = jax.lax.scan(lambda x, block: apply(block, x), x_BTD, self.moe_blocks, unroll=unroll)
        elif self.config.moe_layers:
            per_layer = []
            for block in self.moe_blocks:
                x_BTD, layer_stats = apply(block, x_BTD)
                per_layer.append(layer_stats)
            stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_layer)
        return self.final_norm(x_BTD), stats

    @_on_its_mesh
    def logits(self, h_D: jax.Array) -> jax.Array:
        """Scores over the vocabulary, float32 [..., V], of features [..., D]."""
        w_DV = sharding.gathered(self.unembed[...], self.unembed.get_metadata("axes"), h_D.dtype)
        return project("...d,dv->...v", h_D, w_DV, jnp.float32)

    def __call__(self, tokens_BT, segments_BT=None, positions_BT=None) -> jax.Array:
        """Next-token logits, float32 [B, T, V]."""
        return self.logits(self.features(tokens_BT, segments_BT, positions_BT)[0])

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` sequences of up to `length` tokens."""
        return make_cache(self.config, batch, length, self.stacked)

    @_on_its_mesh
    def decode(self, tokens_BT, cache: Cache, counts_B: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Appends tokens to every sequence and returns their features [B, T, D] and the longer cache.

        Args:
          counts_B: how many of a row's tokens are real (the rest, to the right, is padding and leaves nothing visible
            in the cache). None: all.

        Raises `ConfigError` on a mesh with `context` > 1.
        """
        if (mesh := sharding.ambient()) is not None:
            sharding.check_decoding(mesh)
        B, T = tokens_BT.shape
        counts_B = jnp.full(B, T, jnp.int32) if counts_B is None else counts_B
        place_T, offset_B = jnp.arange(T), cache.length_B
        real_BT = place_T < counts_B[:, None]
        x_BTD, cos_sin = self._enter(tokens_BT, offset_B[:, None] + place_T)

        def through(blocks, caches, x_BTD):
            updated = []
            for block, cache_BSC in zip(blocks, caches, strict=True):
                x_BTD, cache_BSC = block.decode(x_BTD, cos_sin, cache_BSC, offset_B, real_BT)
                updated.append(cache_BSC)
            return x_BTD, updated

        x_BTD, dense = through(self.dense_blocks, cache.dense, x_BTD)
        if self.stacked:
            x_BTD, moe = jax.lax.scan(
                lambda x_BTD, layer: layer[0].decode(x_BTD, cos_sin, layer[1], offset_B, real_BT),
                x_BTD,
                (self.moe_blocks, cache.moe),
            )
        else:
            x_BTD, moe = through(self.moe_blocks, cache.moe, x_BTD)
        return self.final_norm(x_BTD), Cache(dense=dense, moe=moe, length_B=offset_B + counts_B)

    def unstacked(self, dtype: str | None = None) -> "Transformer":
        """The same model with its MoE blocks as a list, which decodes without copying a layer's weights or cache.

        Args:
          dtype: compute dtype from here on; matrices are cast to it once, but for the router's. None: as configured.
        """
        dtype = dtype or self.config.compute.dtype
        config = dataclasses.replace(self.config, compute=dataclasses.replace(self.config.compute, dtype=dtype))

        def cast(path, leaf):
            stays = leaf.ndim < 2 or any(getattr(key, "name", None) == "centroids" for key in path)
            return leaf if stays else leaf.astype(dtype)

        model = jax.tree.map(lambda leaf: leaf, self)
        model.config = config
        if self.stacked:
            layers = range(config.moe_layers)
            model.moe_blocks = nnx.List([jax.tree.map(lambda leaf, i=i: leaf[i], self.moe_blocks) for i in layers])
        return jax.tree_util.tree_map_with_path(cast, model)
