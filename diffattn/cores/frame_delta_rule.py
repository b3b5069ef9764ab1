"""The bidirectional gated delta rule over frames: SANA-WM's linear attention."""

import math
import numbers

from torch import Tensor

from diffattn.cores.base import AttentionCore, Rotary
from diffattn.kernels import frame_delta_rule


class FrameDeltaRule(AttentionCore):
    """Bidirectional gated delta rule over frames, `diffattn.kernels.frame_delta_rule`, on layers that hand over gates.

    Args:
        normalize: divide by the normalizer, as SANA-WM's attention does and its camera attention does not.
        eps: added to the denominator.

    Raises: ValueError for an eps that is no number of 0 or more.
    """

    def __init__(self, *, normalize: bool = True, eps: float = 1e-15):
        super().__init__()
        if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 <= eps < math.inf:
            raise ValueError(f"eps: got {eps!r}, expected a number, 0 or more")
        self.normalize = normalize
        self.eps = eps

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        rotate: tuple[Rotary | None, Rotary | None] | None = None,
        beta: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Attend; as `AttentionCore.forward`, and

        Args:
            mask: None: tokens that do not count have beta 0, frames kept 1.
            scale: what k is multiplied by; None is (D S)^-0.5 for frames of S tokens.
            rotate: of (q, k), the same tables.
            beta: (B, N, H); kept: (B, T, H), as in the kernel.
        """
        if mask is not None:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, expected None: {self} has none for pairs of tokens"
            )
        if beta is None or kept is None:
            raise ValueError(f"beta, kept: got None, expected gates: {self} serves SANA-WM's layers, which have them")
        rotary = None
        if rotate is not None and rotate[0] is not None:
            table, other = rotate
            if other is None or table.cos is not other.cos or table.sin is not other.sin or not table.interleaved:
                raise ValueError(f"rotate: {self} needs the same rotation of q and k, of pairs (2i, 2i + 1)")
            rotary = (table.cos, table.sin)
        return frame_delta_rule(
            q, k, v, beta, kept, rotary=rotary, normalize=self.normalize, scale=scale, eps=self.eps
        )

    def formula(self, heads, kv_heads):
        return ("gated delta rule", self.normalize, self.eps)

    def check(self, heads, kv_heads):
        if heads != kv_heads:
            raise ValueError(f"FrameDeltaRule: got {heads} heads and {kv_heads} key/value heads, expected as many")

    def config(self):
        return {"normalize": self.normalize, "eps": self.eps}
