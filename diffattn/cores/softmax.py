"""Softmax attention by torch's own kernels."""

import torch.nn.functional as F

from diffattn.cores.base import AttentionCore, rotate_heads


class SoftmaxAttention(AttentionCore):
    """softmax(scale q k^T + mask) v  (Vaswani et al. 2017, eq. 1), by `F.scaled_dot_product_attention`.

    The core of layers that stay as they are: on a stock softmax layer it makes the very same call.
    """

    rotates_first = True

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        q, k = rotate_heads(q, k, rotate)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    def formula(self, heads, kv_heads):
        return ("softmax", kv_heads)

    def config(self):
        return {}
