"""Attention processors for Hugging Face diffusers: linear and multi-query, installed by one line."""

from diffattn import kernels
from diffattn._config import config
from diffattn.convert import finalize
from diffattn.cores import (
    RWKV6,
    RWKV7,
    AttentionCore,
    CausalLinearAttention,
    GatedDeltaRule,
    GatedLinearAttention,
    GroupedQueryAttention,
    LinearAttention,
    SoftmaxAttention,
    SparseLinearAttention,
    WindowAttention,
    set_grid,
)
from diffattn.patch import PatchHandle, patch, patched, status, unpatch
from diffattn.processors import LinearAttnProcessor, MQAAttnProcessor
from diffattn.streaming import Stream, streaming
from diffattn.weights import load_weights, save_weights

__version__ = "0.1.0"
__all__ = [
    "RWKV6",
    "RWKV7",
    "AttentionCore",
    "CausalLinearAttention",
    "GatedDeltaRule",
    "GatedLinearAttention",
    "GroupedQueryAttention",
    "LinearAttention",
    "LinearAttnProcessor",
    "MQAAttnProcessor",
    "PatchHandle",
    "SoftmaxAttention",
    "SparseLinearAttention",
    "Stream",
    "WindowAttention",
    "config",
    "finalize",
    "kernels",
    "load_weights",
    "patch",
    "patched",
    "save_weights",
    "set_grid",
    "status",
    "streaming",
    "unpatch",
]
