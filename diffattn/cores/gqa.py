"""Softmax attention whose query heads share key/value heads."""

import torch
from torch import Tensor, nn

from diffattn.cores.base import AttentionCore, LayerInfo, linear, rotate_heads
from diffattn.kernels import gqa_attention


class GroupedQueryAttention(AttentionCore):
    """Grouped-query attention (Ainslie et al. 2023); with one key/value head, multi-query (Shazeer 2019).

    Query head h reads key/value head h // (H / Hkv), in place: heads are never repeated.

    Args:
        kv_heads: key/value heads to keep. None takes the layer's own number, which is exact. On a layer
            with more, the heads of each group are mean-pooled (Ainslie et al. 2023, section 2.1): another
            mechanism, which needs distilled weights. `patch` pools the weights of the key and value
            projections into smaller ones of the core's own, which are trained and saved with it. Where the
            processor hands none over, or they are fused or no plain linear layers, the projections' outputs are
            pooled: the same numbers but for rounding, without weights to train and without the smaller matmuls.
        precision: None, the precision of the inputs, or "int8": `gqa_attention` rounds queries and keys to 8 bits.
            About 1e-2 off, for inference in half precision; the exact `patch` never takes it.

    Raises: ValueError for a precision other than these or a number of heads that is not positive.
    """

    rotates_first = True

    def __init__(self, kv_heads: int | None = None, precision: str | None = None):
        super().__init__()
        if kv_heads is not None and (not isinstance(kv_heads, int) or kv_heads < 1):
            raise ValueError(f"kv_heads: got {kv_heads!r}, expected a positive integer or None")
        if precision not in (None, "int8"):
            raise ValueError(f"precision: got {precision!r}, expected None or 'int8'")
        self.kv_heads = kv_heads
        self.precision = precision

    def prepare(self, layer: LayerInfo) -> None:
        self.projections = None
        if self.kv_heads in (None, layer.kv_heads) or not {"k", "v"} <= layer.weights.keys():
            return
        pooled = {role: pool(layer.weights[role], layer.kv_heads, self.kv_heads) for role in ("k", "v")}
        self.projections = nn.ModuleDict(pooled)

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        q, k = rotate_heads(q, k, rotate)
        if self.kv_heads is not None and k.shape[2] != self.kv_heads:
            # Equals pooling the weights that made them, which `prepare` does where it can.
            k, v = (t.unflatten(2, (self.kv_heads, -1)).mean(3) for t in (k, v))
        return gqa_attention(q, k, v, mask=mask, scale=scale, precision=self.precision)

    def check(self, heads, kv_heads):
        if self.kv_heads is not None and kv_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: got {self.kv_heads}, expected a divisor of the layer's {kv_heads} key/value heads"
            )

    def formula(self, heads, kv_heads):
        return ("softmax", self.kv_heads or kv_heads, *([self.precision] if self.precision else []))

    def config(self):
        return {"kv_heads": self.kv_heads, "precision": self.precision}


def pool(projection: tuple[Tensor, Tensor | None], heads: int, kv_heads: int) -> nn.Linear:
    """Mean of the projections of each group of heads / kv_heads heads in a row (Ainslie et al. 2023, figure 1)."""

    def mean(tensor: Tensor) -> Tensor:
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        grouped = wide.unflatten(0, (kv_heads, heads // kv_heads, -1))
        return grouped.mean(1).flatten(0, 1)

    weight, bias = projection
    return linear(mean(weight), None if bias is None else mean(bias), instead_of=weight)
