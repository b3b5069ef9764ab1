"""What every attention core is given and returns, and the rotation that some of them apply."""

from torch import Tensor, nn

from diffattn.kernels import Rotary, apply_rotary, qk_norm_rope
from diffattn.kernels.qk_norm_rope import runs_fused


def rotate_heads(q: Tensor, k: Tensor, rotate: tuple[Rotary | None, Rotary | None] | None) -> tuple[Tensor, Tensor]:
    """Rotate q and k, each in the dtype that it has: one kernel where it can run, else `apply_rotary` of each."""
    if rotate is None:
        return q, k
    if q.dtype == k.dtype and runs_fused(q, k):
        return qk_norm_rope(q, k, rotate=rotate)
    return apply_rotary(q, rotate[0]), apply_rotary(k, rotate[1])


class AttentionCore(nn.Module):
    """Turns queries, keys and values into the attention output, knowing nothing of the model.

    A core is configured in its constructor, copied once per layer and holds no state between calls.
    """

    #: Whether `rotate` is the first thing that happens to q and k: a processor then does it in the core's place, in
    #: one pass with the norms. A subclass that does anything to q or k before has to set it to False.
    rotates_first = False

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        rotate: tuple[Rotary | None, Rotary | None] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: (B, N, H, D).
            k: (B, M, Hkv, D); Hkv divides H.
            v: (B, M, Hkv, E).
            mask: boolean (True attends) or additive, broadcastable to (B, H, N, M).
            scale: what q.k is multiplied by; None is D^-0.5.
            rotate: rotary embeddings of (q, k). The core applies them, since linear attention maps
                features first and keeps its normalizer unrotated.

        Returns: (B, N, H, E).
        """
        raise NotImplementedError

    def formula(self, heads: int, kv_heads: int) -> tuple:
        """What is computed on a layer of this shape: two cores with equal formulas are interchangeable."""
        raise NotImplementedError

    def check(self, heads: int, kv_heads: int) -> None:
        """Raises: ValueError if the core cannot serve a layer of this shape."""

    def config(self) -> dict:
        """The constructor's arguments, as JSON can hold them."""
        raise NotImplementedError

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"{type(self).__name__}({arguments})"
