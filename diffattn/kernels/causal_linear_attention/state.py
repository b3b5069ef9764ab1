"""What a causal layer remembers between calls."""

import torch
from torch import Tensor

from diffattn.kernels._checks import shape_of
from diffattn.kernels.causal_linear_attention.reference import split_state


class LinearState:
    """S and z of every key/value head: float32, allocated once, updated in place by `causal_linear_attention`.

    Args:
        batch, kv_heads, head_dim: B, Hkv, D of the keys.
        value_dim: E of the values; None is D.
        normalize: whether there is a z.
        owner: what the state belongs to, e.g. a layer: a call that names another owner is refused.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, value_dim: int | None = None, *, normalize: bool = True,
        device: torch.device | str | None = None, owner: object = None,
    ):  # fmt: skip
        value_dim = head_dim if value_dim is None else value_dim
        for name, n in dict(batch=batch, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim).items():
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{name}: got {n!r}, expected a positive integer")
        self.head_dim, self.value_dim, self.normalize, self.owner = head_dim, value_dim, normalize, owner
        size = head_dim * value_dim + (head_dim if normalize else 0)
        #: (B, Hkv, D E + D) float32: S by rows, then z. Without a normalizer (B, Hkv, D E).
        self.tensor = torch.zeros(batch, kv_heads, size, dtype=torch.float32, device=device)

    @property
    def S(self) -> Tensor:
        """(B, Hkv, D, E), a view."""
        return split_state(self.tensor, self.head_dim, self.value_dim)[0]

    @property
    def z(self) -> Tensor | None:
        """(B, Hkv, D), a view; None without a normalizer."""
        return split_state(self.tensor, self.head_dim, self.value_dim)[1]

    def reset(self) -> None:
        """Forget everything, in place."""
        self.tensor.zero_()

    def clone(self) -> "LinearState":
        """An independent copy, to go on from the same point twice."""
        copy = object.__new__(LinearState)
        copy.__dict__.update(self.__dict__)
        copy.tensor = self.tensor.detach().clone()
        return copy

    def __repr__(self) -> str:
        return (
            f"LinearState{shape_of(self.S)}{'' if self.normalize else ' without normalizer'} on {self.tensor.device}"
        )


def check_state(state: Tensor, k: Tensor, v: Tensor, normalize: bool, dtype: torch.dtype) -> None:
    """Refuse a state that is not the flat tensor for these keys and values.

    Raises: TypeError or ValueError, naming what came and what would fit.
    """
    B, _, kv_heads, D = k.shape
    E = v.shape[3]
    size = D * E + (D if normalize else 0)
    if state.dtype != dtype:
        raise TypeError(f"state: got {state.dtype}, expected {dtype}")
    if state.device != k.device:
        raise ValueError(f"state: on {state.device}, expected {k.device} as q")
    if state.dim() == 3 and state.shape[0] != B and state.shape[1:] == (kv_heads, size):
        raise ValueError(
            f"state: made for a batch of {state.shape[0]}, and q has a batch of {B}: a state goes on with the samples "
            "that it began with. Make a new one, or reset() does not help here"
        )
    if state.shape != (B, kv_heads, size):
        kind = "D E + D" if normalize else "D E, no normalizer"
        raise ValueError(
            f"state: got shape {shape_of(state)}, expected ({B}, {kv_heads}, {size}): (B, Hkv, {kind}) with D = {D}, "
            f"E = {E}"
        )
    if not state.is_contiguous():
        raise ValueError(f"state: got strides {state.stride()}, expected a contiguous tensor")
