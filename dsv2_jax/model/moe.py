"""DeepSeekMoE: shared experts for every token, routed experts for the chosen (report, section 2.2.1)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dsv2_jax import sharding
from dsv2_jax.config import ModelConfig
from dsv2_jax.model import router
from dsv2_jax.model.expert_parallel import moe_ffn
from dsv2_jax.model.layers import SwiGLU, parameter
from dsv2_jax.types import MoEStats
from kernels_pallas.expert_ffn import expert_ffn


class MoE(nnx.Module):
    """FFN(y) = sum of shared FFNs + sum_i g_i FFN_i(y). The shared experts are one SwiGLU of their joint width."""

    def __init__(self, model: ModelConfig, key: jax.Array):
        config = model.moe
        router_key, shared_key, gate_key, up_key, down_key = jax.random.split(key, 5)
        E, D, F, std = config.routed_experts, model.dim, config.expert_width, model.init_std
        self.centroids = parameter(router_key, (D, E), ("embed", "router"), std)
        if config.shared_experts:
            self.shared = SwiGLU(model, config.shared_experts * F, shared_key)
        self.gate = parameter(gate_key, (E, D, F), ("expert", "embed", "expert_mlp"), std)
        self.up = parameter(up_key, (E, D, F), ("expert", "embed", "expert_mlp"), std)
        self.down = parameter(down_key, (E, F, D), ("expert", "expert_mlp", "embed"), std)
        self.config, self.compute = config, model.compute

    def __call__(
        self, y_BTD: jax.Array, real_BT: jax.Array, *, training: bool = False, protected_B: jax.Array | None = None
    ) -> tuple[jax.Array, MoEStats]:
        with jax.named_scope("router"):
            y32_BTD, exact = y_BTD.astype(jnp.float32), jax.lax.Precision.HIGHEST
            w_DE = sharding.gathered(self.centroids[...], self.centroids.get_metadata("axes"), jnp.float32)
            logits_BTE = jnp.einsum("btd,de->bte", y32_BTD, w_DE, precision=exact)
            routing = router.route(logits_BTE, real_BT, self.config, training=training, protected_B=protected_B)
        shared = self.shared if self.config.shared_experts else None
        if sharding.ambient() is not None:
            weights = self.gate, self.up, self.down
            if shared is not None:
                weights += shared.gate, shared.up, shared.down
            choices = routing.expert_BTK, routing.gate_BTK
            out_BTD, crossed = moe_ffn(y_BTD, *choices, weights, self.config, self.compute)
            return out_BTD, dataclasses.replace(routing.stats, crossed=crossed)
        with jax.named_scope("routed"):
            out_BTD = self.routed(y_BTD, routing)
        if shared is not None:
            with jax.named_scope("shared"):
                out_BTD += shared(y_BTD)
        return out_BTD, routing.stats

    def routed(self, y_BTD: jax.Array, routing: router.Routing) -> jax.Array:
        """sum_i g_i FFN_i(y) over the chosen experts."""
        (B, T, D), K = y_BTD.shape, self.config.experts_per_token
        y_TD = expert_ffn(
            y_BTD.reshape(B * T, D),
            routing.expert_BTK.reshape(B * T, K),
            routing.gate_BTK.reshape(B * T, K),
            *(w[...].astype(y_BTD.dtype) for w in (self.gate, self.up, self.down)),
            implementation=self.compute.expert_ffn,
            grouped_matmul=self.compute.grouped_matmul,
            token_dispatch=self.compute.token_dispatch,
        )
        return y_TD.reshape(B, T, D)
