"""Softmax attention whose query heads share key/value heads."""

from torch import Tensor

from diffattn.cores.base import AttentionCore, LayerInfo, rotate_heads
from diffattn.cores.pooling import mean_pooled, svd_pooled
from diffattn.kernels import gqa_attention


class GroupedQueryAttention(AttentionCore):
    """Grouped-query attention (Ainslie et al. 2023); with one key/value head, multi-query (Shazeer 2019).

    Query head h reads key/value head h // (H / Hkv), in place: heads are never repeated.

    Args:
        kv_heads: key/value heads to keep. None takes the layer's own number, which is exact. On a layer
            with more, the heads of each group are mean-pooled (Ainslie et al. 2023, section 2.1): another
            mechanism, which needs distilled weights. `patch` pools the weights of the key and value
            projections into smaller ones of the core's own, which are trained and saved with it; in joint attention
            those of the text too. Where the processor hands none over, or they are fused or no plain linear layers,
            the projections' outputs are pooled: the same numbers but for rounding, without weights to train and
            without the smaller matmuls. A layer's norm of the keys and its rotation then act on the pooled keys.
            Where they need all heads (norms over all heads at once: Wan, LTX, HiDream; a rotation of each head by
            angles of its own: Mochi, LTX), keys are pooled after them, and the values' weights alone are pooled.
        precision: None, the precision of the inputs, or "int8": `gqa_attention` rounds queries and keys to 8 bits.
            About 1e-2 off, for inference in half precision; the exact `patch` never takes it.
        pooling: how fewer heads begin: `"mean"`, as above, or `"svd"`, which makes all four projections anew, the
            nearest to the layer's products that so few heads allow (`svd_pooled`). Only on layers that neither
            normalize nor rotate q and k and have no projections for text, and without adapters. On the emoji model
            the layers' errors start at 0.24 where those of the mean start at 0.81.

    Raises: ValueError for a precision or pooling other than these or a number of heads that is not positive.
    """

    rotates_first = True

    def __init__(self, kv_heads: int | None = None, precision: str | None = None, *, pooling: str = "mean"):
        super().__init__()
        if kv_heads is not None and (type(kv_heads) is not int or kv_heads < 1):
            raise ValueError(f"kv_heads: got {kv_heads!r}, expected a positive integer or None")
        if precision not in (None, "int8"):
            raise ValueError(f"precision: got {precision!r}, expected None or 'int8'")
        if pooling not in ("mean", "svd"):
            raise ValueError(f"pooling: got {pooling!r}, expected 'mean' or 'svd'")
        self.kv_heads = kv_heads
        self.precision = precision
        self.pooling = pooling
        #: Of which projections the outputs are pooled, and of which before their norm and rotation.
        self.pools_outputs: tuple[str, ...] = ()
        self.pools_early: tuple[str, ...] = ()
        if pooling == "svd":
            self.refuses_adapters = "pooling='svd' turned the heads into another basis than adapters were trained in"

    def prepare(self, layer: LayerInfo) -> None:
        self.projections, self.pools_outputs, self.pools_early = None, (), ()
        if self.kv_heads in (None, layer.kv_heads):
            return
        if self.pooling == "svd":
            self.projections = svd_pooled(layer, self.kv_heads)
            return
        self.pools_early = ("v", "text_v") if layer.fixes_key_heads else ("k", "v", "text_k", "text_v")
        roles = [role for role in self.pools_early if role in layer.weights]
        self.projections = mean_pooled(layer, self.kv_heads, roles) if roles else None
        self.pools_outputs = tuple(role for role in ("k", "v") if role not in roles)

    def projected(self, role, heads):
        return self._pooled(heads) if role in self.pools_early else heads

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        q, k = rotate_heads(q, k, rotate)
        return gqa_attention(q, self._pooled(k), self._pooled(v), mask=mask, scale=scale, precision=self.precision)

    def _pooled(self, heads: Tensor) -> Tensor:
        """Equals pooling the weights that made them, which `prepare` does where it can."""
        if self.kv_heads in (None, heads.shape[2]):
            return heads
        self.check(heads.shape[2], heads.shape[2])
        return heads.unflatten(2, (self.kv_heads, -1)).mean(3)

    def check(self, heads, kv_heads):
        if self.kv_heads is not None and kv_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: got {self.kv_heads}, expected a divisor of the layer's {kv_heads} key/value heads"
            )

    def formula(self, heads, kv_heads):
        return ("softmax", self.kv_heads or kv_heads, *([self.precision] if self.precision else []))

    def config(self):
        config = {"kv_heads": self.kv_heads, "precision": self.precision}
        return config if self.pooling == "mean" else config | {"pooling": self.pooling}

    def __str__(self) -> str:
        """In tables: that such a layer gains no smaller matmuls and has nothing to train, of its keys or of both."""
        names = {(): "", ("k",): ", keys of pooled outputs", ("v",): ", values of pooled outputs"}
        return f"{self!r}{names.get(self.pools_outputs, ', of pooled outputs')}"
