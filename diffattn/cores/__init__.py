"""Attention cores: nn.Modules (q, k, v) -> o that know no model."""

from diffattn.cores.base import AttentionCore, LayerInfo, Rotary, apply_rotary, rotate_heads
from diffattn.cores.causal import CausalLinearAttention, CausalState
from diffattn.cores.gqa import GroupedQueryAttention
from diffattn.cores.linear import LinearAttention
from diffattn.cores.softmax import SoftmaxAttention
from diffattn.cores.sparse_linear import SparseLinearAttention
from diffattn.cores.window import WindowAttention, set_grid

__all__ = [
    "AttentionCore",
    "CausalLinearAttention",
    "CausalState",
    "GroupedQueryAttention",
    "LayerInfo",
    "LinearAttention",
    "Rotary",
    "SoftmaxAttention",
    "SparseLinearAttention",
    "WindowAttention",
    "apply_rotary",
    "rotate_heads",
    "set_grid",
]
