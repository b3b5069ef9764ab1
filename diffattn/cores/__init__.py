"""Attention cores: nn.Modules (q, k, v) -> o that know no model."""

from diffattn.cores.base import AttentionCore, LayerInfo, Rotary, apply_rotary, rotate_heads
from diffattn.cores.causal import CausalCore, CausalLinearAttention, CausalState
from diffattn.cores.fla import RWKV6, RWKV7, GatedDeltaRule, GatedLinearAttention
from diffattn.cores.frame_delta_rule import FrameDeltaRule
from diffattn.cores.gqa import GroupedQueryAttention
from diffattn.cores.linear import LinearAttention
from diffattn.cores.softmax import SoftmaxAttention
from diffattn.cores.sparse_linear import SparseLinearAttention
from diffattn.cores.window import WindowAttention, set_grid

__all__ = [
    "RWKV6",
    "RWKV7",
    "AttentionCore",
    "CausalCore",
    "CausalLinearAttention",
    "CausalState",
    "FrameDeltaRule",
    "GatedDeltaRule",
    "GatedLinearAttention",
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
