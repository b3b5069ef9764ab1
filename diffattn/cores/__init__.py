"""Attention cores: nn.Modules (q, k, v) -> o that know no model."""

from diffattn.cores.base import AttentionCore, LayerInfo, Rotary, apply_rotary, rotate_heads
from diffattn.cores.causal import CausalLinearAttention, CausalState
from diffattn.cores.gqa import GroupedQueryAttention
from diffattn.cores.linear import LinearAttention
from diffattn.cores.softmax import SoftmaxAttention

__all__ = [
    "AttentionCore",
    "CausalLinearAttention",
    "CausalState",
    "GroupedQueryAttention",
    "LayerInfo",
    "LinearAttention",
    "Rotary",
    "SoftmaxAttention",
    "apply_rotary",
    "rotate_heads",
]
