"""Pure functions on tensors: torch and triton only, no nn.Module and no diffusers.

Layout everywhere: q (B, N, H, D), k (B, M, Hkv, D), v (B, M, Hkv, E), any strides. Hkv divides H and
key/value heads are never repeated.
"""

from diffattn.kernels._backend import exporting
from diffattn.kernels.block_sparse_attention import block_sparse_attention, linear_attention_outside
from diffattn.kernels.block_sparse_attention.window import window_attention
from diffattn.kernels.causal_linear_attention import (
    LinearState,
    bidirectional_linear_attention,
    causal_linear_attention,
)
from diffattn.kernels.frame_delta_rule import frame_delta_rule
from diffattn.kernels.gqa_attention import gqa_attention
from diffattn.kernels.linear_attention import linear_attention
from diffattn.kernels.qk_norm_rope import Rotary, apply_rotary, qk_norm_rope
from diffattn.kernels.ray_encoding import ray_encoding

__all__ = [
    "LinearState",
    "Rotary",
    "apply_rotary",
    "bidirectional_linear_attention",
    "block_sparse_attention",
    "causal_linear_attention",
    "exporting",
    "frame_delta_rule",
    "gqa_attention",
    "linear_attention",
    "linear_attention_outside",
    "qk_norm_rope",
    "ray_encoding",
    "window_attention",
]
