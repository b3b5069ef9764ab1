"""Pure functions on tensors: torch and triton only, no nn.Module and no diffusers.

Layout everywhere: q (B, N, H, D), k (B, M, Hkv, D), v (B, M, Hkv, E), any strides. Hkv divides H and
key/value heads are never repeated.
"""

from diffattn.kernels._backend import exporting
from diffattn.kernels.gqa_attention import gqa_attention
from diffattn.kernels.linear_attention import linear_attention

__all__ = ["exporting", "gqa_attention", "linear_attention"]
