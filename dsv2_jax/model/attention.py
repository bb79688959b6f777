"""Multi-head Latent Attention (DeepSeek-V2 report, section 2.1)."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv2_jax import sharding
from dsv2_jax.config import ModelConfig
from dsv2_jax.model import parallel, rope
from dsv2_jax.model.layers import RMSNorm, parameter, project, project_local
from kernels_pallas.cache_append import append
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.latent_attention import latent_attention

CosSin = tuple[jax.Array, jax.Array]


class MLA(nnx.Module):
    """Matrices the report writes apart are stored side by side, as in the released weights.

    w_dq = W_DQ; w_q = [W_UQ; W_QR] per head; w_dkv = [W_DKV; W_KR]; w_ukv = [W_UK; W_UV] per head; w_o = W_O.
    """

    def __init__(self, model: ModelConfig, key: jax.Array):
        config = model.attention
        dq_key, q_key, dkv_key, ukv_key, o_key = jax.random.split(key, 5)
        N, R, std = config.heads, config.kv_latent, model.init_std
        if config.q_latent:
            self.w_dq = parameter(dq_key, (model.dim, config.q_latent), ("embed", "q_latent"), std)
            self.q_norm = RMSNorm(config.q_latent, model.norm_eps)
        q_axis = "q_latent" if config.q_latent else "embed"
        self.w_q = parameter(
            q_key, (config.q_latent or model.dim, N, config.qk_dim), (q_axis, "heads", "head_dim"), std
        )
        self.w_dkv = parameter(dkv_key, (model.dim, R + config.rope_dim), ("embed", "kv_latent"), std)
        self.kv_norm = RMSNorm(R, model.norm_eps)
        ukv_shape = (R, N, config.nope_dim + config.value_dim)
        self.w_ukv = parameter(ukv_key, ukv_shape, ("kv_latent", "heads", "head_dim"), std)
        self.w_o = parameter(o_key, (N, config.value_dim, model.dim), ("heads", "head_dim", "embed"), std)
        self.config, self.compute = config, model.compute

    def queries(self, h_BTD: jax.Array, cos_sin: CosSin) -> tuple[jax.Array, jax.Array]:
        """Equations 6 to 8: q_C [B, T, N, H] and the rotary q_R [B, T, N, P]."""
        if self.config.q_latent:
            h_BTD = self.q_norm(project("btd,dq->btq", h_BTD, self.w_dq))
        q_BTNH = project("btd,dnh->btnh", h_BTD, self.w_q)
        q_C_BTNH, q_R_BTNP = jnp.split(q_BTNH, [self.config.nope_dim], axis=-1)
        return q_C_BTNH, rope.rotate(q_R_BTNP, cos_sin)

    def latents(self, h_BTD: jax.Array, cos_sin: CosSin) -> jax.Array:
        """Equations 1 and 3: [c_KV, k_R], all that is cached: [B, T, R + P]."""
        c_BTR, k_R_BTP = jnp.split(project("btd,dc->btc", h_BTD, self.w_dkv), [self.config.kv_latent], axis=-1)
        k_R_BTP = rope.rotate(k_R_BTP[:, :, None], cos_sin)[:, :, 0]  # one rotary key, shared by all heads
        return jnp.concatenate([self.kv_norm(c_BTR), k_R_BTP], axis=-1)

    def keys_values(self, latents_BSC, project_ukv) -> tuple[jax.Array, jax.Array]:
        """Equations 2, 4 and 5: keys and values of every head from the latents; project_ukv multiplies by w_ukv."""
        c_BSR, k_R_BSP = jnp.split(latents_BSC, [self.config.kv_latent], axis=-1)
        k_C_BSNH, v_BSNV = jnp.split(project_ukv("bsr,rnh->bsnh", c_BSR), [self.config.nope_dim], axis=-1)
        k_R_BSNP = jnp.broadcast_to(k_R_BSP[:, :, None], (*k_C_BSNH.shape[:3], self.config.rope_dim))
        return jnp.concatenate([k_C_BSNH, k_R_BSNP], axis=-1), v_BSNV

    def expanded(self, q_C_BTNH, q_R_BTNP, latents_BSC, segments_BT=None, offset_B=None) -> jax.Array:
        """Equations 9 and 10 over expanded keys and values; offset_B as for `flash_attention`."""
        q_BTNH = jnp.concatenate([q_C_BTNH, q_R_BTNP], axis=-1)
        scale = rope.softmax_scale(self.config.qk_dim, self.config.yarn)
        how = {"scale": scale, "implementation": self.compute.flash_attention}
        if offset_B is None and sharding.axis_size("context") > 1:

            def expand(latents_BSC, w, spec):
                return self.keys_values(latents_BSC, lambda equation, c: project_local(equation, spec, c, w))

            names = ("batch", "sequence", None)
            return parallel.context_attention(q_BTNH, latents_BSC, names, expand, segments_BT, w=self.w_ukv, **how)
        k_BSNH, v_BSNV = self.keys_values(latents_BSC, lambda equation, c: project(equation, c, self.w_ukv))
        if offset_B is None:
            return parallel.attention(q_BTNH, k_BSNH, v_BSNV, segments_BT, **how)
        return flash_attention(q_BTNH, k_BSNH, v_BSNV, offset_B=offset_B, **how)

    def absorbed(self, q_C_BTNH, q_R_BTNP, latents_BSC, offset_B) -> jax.Array:
        """The same, with W_UK folded into the query and W_UV into the output: no key or value of a head is formed."""
        w_uk_RNH, w_uv_RNV = jnp.split(self.w_ukv[...].astype(q_C_BTNH.dtype), [self.config.nope_dim], axis=-1)
        # As each head multiplies by them; behind a barrier they are cut once, before a decoding loop, not in it.
        w_uk_NHR, w_uv_NRV = jax.lax.optimization_barrier((w_uk_RNH.transpose(1, 2, 0), w_uv_RNV.swapaxes(0, 1)))
        q_latent_BTNR = jnp.einsum("btnh,nhr->btnr", q_C_BTNH, w_uk_NHR)
        o_BTNR = latent_attention(
            jnp.concatenate([q_latent_BTNR, q_R_BTNP], axis=-1),
            latents_BSC,
            offset_B,
            value_dim=self.config.kv_latent,
            scale=rope.softmax_scale(self.config.qk_dim, self.config.yarn),
            implementation=self.compute.latent_attention,
        )
        return jnp.einsum("btnr,nrv->btnv", o_BTNR, w_uv_NRV)

    @property
    def longest_absorbed(self) -> int:
        """Queries up to which the absorbed form needs fewer FLOPs than expanding the cache it reads."""
        expanded_width = self.config.nope_dim + self.config.value_dim
        saved = 2 * self.config.kv_latent - expanded_width
        return self.config.kv_latent * expanded_width // saved if saved > 0 else 1 << 30

    def output(self, o_BTNV: jax.Array) -> jax.Array:
        """Equation 11: u = W_O [o_1 .. o_N]."""
        return project("btnv,nvd->btd", o_BTNV, self.w_o)

    def __call__(self, h_BTD: jax.Array, cos_sin: CosSin, segments_BT: jax.Array | None) -> jax.Array:
        q_C_BTNH, q_R_BTNP = self.queries(h_BTD, cos_sin)
        return self.output(self.expanded(q_C_BTNH, q_R_BTNP, self.latents(h_BTD, cos_sin), segments_BT))

    def decode(self, h_BTD, cos_sin: CosSin, cache_BSC, offset_B) -> tuple[jax.Array, jax.Array]:
        """Attends from a chunk of new tokens to the cache, they themselves included; returns u_BTD and the cache."""
        q_C_BTNH, q_R_BTNP = self.queries(h_BTD, cos_sin)
        cache_BSC = append(cache_BSC, self.latents(h_BTD, cos_sin), offset_B)
        form = self.absorbed if h_BTD.shape[1] <= self.longest_absorbed else self.expanded
        return self.output(form(q_C_BTNH, q_R_BTNP, cache_BSC, offset_B=offset_B)), cache_BSC
