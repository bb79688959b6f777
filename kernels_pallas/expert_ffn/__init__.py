"""The routed experts of a DeepSeekMoE layer as one op."""

from kernels_pallas.expert_ffn.api import expert_ffn

__all__ = ["expert_ffn"]
