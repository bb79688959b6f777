"""Named models: DeepSeek-V2, V2-Lite and the dense 67B of the report, and two small ones for a laptop.

`v2` and `v2_lite` are as pre-trained: 4K context, plain RoPE. `v2_released` and `v2_lite_released` are as published: of
the same shapes, with YaRN, 160K context (report, section 3.1.4; released configurations: mscale = 0.707).
"""

import dataclasses

from dsv2_jax.config import (
    BalanceConfig,
    ComputeConfig,
    ConfigError,
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    YarnConfig,
)

# What is fastest on a CPU (experiments/benchmark.py): nothing recomputed, few layers unrolled, small chunks; float32,
# or with AVX-512 BF16 bfloat16: as fast of `tiny`, faster of wider models.
CPU = ComputeConfig(dtype="float32", remat="none", unroll=3, loss_chunk=64)

V2 = ModelConfig(
    vocab_size=102400,
    layers=60,
    dim=5120,
    dense_layers=1,
    dense_width=12288,
    attention=MLAConfig(heads=128, nope_dim=128, rope_dim=64, value_dim=128, kv_latent=512, q_latent=1536),
    moe=MoEConfig(
        routed_experts=160,
        shared_experts=2,
        experts_per_token=6,
        expert_width=1536,
        groups=8,
        groups_kept=3,
        routed_scaling=16.0,
        balance=BalanceConfig(expert=0.003, device=0.05, communication=0.02),
    ),
    max_length=4096,
)

V2_LITE = ModelConfig(
    vocab_size=102400,
    layers=27,
    dim=2048,
    dense_layers=1,
    dense_width=10944,
    attention=MLAConfig(heads=16, nope_dim=128, rope_dim=64, value_dim=128, kv_latent=512, q_latent=None),
    moe=MoEConfig(
        routed_experts=64,
        shared_experts=2,
        experts_per_token=6,
        expert_width=1408,
        balance=BalanceConfig(expert=0.001, device=None, communication=None),
    ),
    max_length=4096,
)

DENSE_67B = ModelConfig(
    vocab_size=102400,
    layers=95,
    dim=8192,
    dense_layers=95,
    dense_width=22016,
    attention=GQAConfig(heads=64, kv_heads=8, head_dim=128),
    moe=None,
    max_length=4096,
)

# The whole architecture in miniature: query compression, device-limited routing, all three balance losses.
TINY = ModelConfig(
    vocab_size=1024,
    layers=3,
    dim=128,
    dense_layers=1,
    dense_width=384,
    attention=MLAConfig(heads=4, nope_dim=32, rope_dim=16, value_dim=32, kv_latent=64, q_latent=64),
    moe=MoEConfig(
        routed_experts=16,
        shared_experts=1,
        experts_per_token=3,
        expert_width=64,
        groups=4,
        groups_kept=2,
        routed_scaling=4.0,
        balance=BalanceConfig(expert=0.003, device=0.05, communication=0.02),
    ),
    max_length=1024,
    init_std=0.02,
    compute=CPU,
)

# The shape at which this project is timed beside other implementations.
PEER_TINY = ModelConfig(
    vocab_size=4096,
    layers=4,
    dim=256,
    dense_layers=1,
    dense_width=1024,
    attention=MLAConfig(heads=8, nope_dim=32, rope_dim=16, value_dim=32, kv_latent=64, q_latent=None),
    moe=MoEConfig(
        routed_experts=16,
        shared_experts=2,
        experts_per_token=4,
        expert_width=128,
        balance=BalanceConfig(expert=0.001, device=None, communication=None),
    ),
    max_length=1024,
    init_std=0.02,
    compute=CPU,
)


def with_yarn(model: ModelConfig, yarn: YarnConfig) -> ModelConfig:
    """`model` with its context extended `yarn.factor` times."""
    attention = dataclasses.replace(model.attention, yarn=yarn)
    return dataclasses.replace(model, attention=attention, max_length=int(yarn.original_length * yarn.factor))


RELEASED_YARN = YarnConfig(factor=40.0)

MODELS = {
    "tiny": TINY,
    "peer_tiny": PEER_TINY,
    "v2_lite": V2_LITE,
    "v2_lite_released": with_yarn(V2_LITE, RELEASED_YARN),
    "v2": V2,
    "v2_released": with_yarn(V2, RELEASED_YARN),
    "dense_67b": DENSE_67B,
}


def get(name: str) -> ModelConfig:
    """The preset called `name`; `ConfigError` lists the names there are."""
    if name not in MODELS:
        raise ConfigError(f"preset={name!r}: must be one of {', '.join(MODELS)}")
    return MODELS[name]
