"""The attention MLA is compared with: MHA, GQA and MQA are one module with N, fewer, or one key-value head."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv2_jax import sharding
from dsv2_jax.config import ModelConfig
from dsv2_jax.model import parallel, rope
from dsv2_jax.model.layers import parameter, project
from kernels_pallas.cache_append import append
from kernels_pallas.flash_attention import flash_attention


class GQA(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) with a rotary embedding over the whole head."""

    def __init__(self, model: ModelConfig, key: jax.Array):
        config = model.attention
        q_key, kv_key, o_key = jax.random.split(key, 3)
        D, N, K, H, std = model.dim, config.heads, config.kv_heads, config.head_dim, model.init_std
        self.w_q = parameter(q_key, (D, N, H), ("embed", "heads", "head_dim"), std)
        self.w_kv = parameter(kv_key, (D, 2, K, H), ("embed", "key_value", "kv_heads", "head_dim"), std)
        self.w_o = parameter(o_key, (N, H, D), ("heads", "head_dim", "embed"), std)
        self.config, self.compute = config, model.compute

    def queries(self, h_BTD: jax.Array, cos_sin) -> jax.Array:
        return rope.rotate(project("btd,dnh->btnh", h_BTD, self.w_q), cos_sin)

    def keys_values(self, h_BTD: jax.Array, cos_sin) -> jax.Array:
        """What is cached: keys after the rotation, and values: [B, T, 2, K, H]."""
        kv_BTCKH = project("btd,dckh->btckh", h_BTD, self.w_kv)
        return jnp.stack([rope.rotate(kv_BTCKH[:, :, 0], cos_sin), kv_BTCKH[:, :, 1]], axis=2)

    def attend(self, q_BTNH, kv_BSCKH, segments_BT=None, offset_B=None) -> jax.Array:
        scale = rope.softmax_scale(self.config.head_dim, self.config.yarn)
        how = {"scale": scale, "implementation": self.compute.flash_attention}
        k_BSKH, v_BSKH = kv_BSCKH[:, :, 0], kv_BSCKH[:, :, 1]
        if offset_B is not None:
            o_BTNH = flash_attention(q_BTNH, k_BSKH, v_BSKH, offset_B=offset_B, **how)
        elif sharding.axis_size("context") > 1:
            names = ("batch", "sequence", None, "kv_heads", None)
            o_BTNH = parallel.context_attention(
                q_BTNH, kv_BSCKH, names, lambda kv, _: (kv[:, :, 0], kv[:, :, 1]), segments_BT, **how
            )
        else:
            o_BTNH = parallel.attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, **how)
        return project("btnh,nhd->btd", o_BTNH, self.w_o)

    def __call__(self, h_BTD: jax.Array, cos_sin, segments_BT: jax.Array | None) -> jax.Array:
        return self.attend(self.queries(h_BTD, cos_sin), self.keys_values(h_BTD, cos_sin), segments_BT)

    def decode(self, h_BTD, cos_sin, cache_BSC, offset_B) -> tuple[jax.Array, jax.Array]:
        """Attends from a chunk of new tokens to the cache, they themselves included; returns u_BTD and the cache."""
        kv_BTCKH = self.keys_values(h_BTD, cos_sin)
        cache_BSC = append(cache_BSC, kv_BTCKH.reshape(*kv_BTCKH.shape[:2], -1), offset_B)
        kv_BSCKH = cache_BSC.reshape(*cache_BSC.shape[:2], *kv_BTCKH.shape[2:])
        return self.attend(self.queries(h_BTD, cos_sin), kv_BSCKH, offset_B=offset_B), cache_BSC
