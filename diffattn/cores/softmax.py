"""Softmax attention by torch's own kernels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffattn.cores.base import AttentionCore, rotate_heads
from diffattn.kernels._backend import exporting_to_onnx
from diffattn.kernels._checks import check_mask, check_qkv, check_scale


class SoftmaxAttention(AttentionCore):
    """softmax(scale q k^T + mask) v  (Vaswani et al. 2017, eq. 1), by `F.scaled_dot_product_attention`.

    The core of layers that stay as they are: on a stock softmax layer it makes the very same call.
    """

    rotates_first = True

    #: What is called in place of torch's function, with q (B, N, H, D), k, v and the keywords `attn_mask`, `scale` and
    #: `enable_gqa`. A processor sets it where the tokens are split over ranks; None is torch's.
    dispatch: Callable[..., Tensor] | None = None

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        check_qkv(q, k, v)
        check_mask(mask, q, k)
        check_scale(scale)
        q, k = rotate_heads(q, k, rotate)
        # torch.jit.trace has tensors for sizes, and torch 2.6's dynamo numbers that bool() refuses: both take an `if`
        grouped = True if k.shape[2] != q.shape[2] else False
        if self.dispatch is not None:
            return self.dispatch(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if mask is not None and mask.dim() < 2:
            mask = mask[None]  # torch wants queries and keys in it
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        if mask is not None and exporting_to_onnx():
            # Of a query with every key masked torch makes zeros, and ONNX's softmax something else.
            masked = ~mask if mask.dtype == torch.bool else mask == float("-inf")
            out = out.masked_fill(masked.all(dim=-1, keepdim=True), 0.0)
        return out.transpose(1, 2)

    def formula(self, heads, kv_heads):
        return ("softmax", kv_heads)

    def config(self):
        return {}
