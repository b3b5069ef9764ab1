"""Maps with weights, for linear attention that learns to stand in for softmax attention."""

import torch
from torch import Tensor, nn


class HedgehogMap(nn.Module):
    """Hedgehog's feature map, one for each head (Zhang et al. 2024, "The Hedgehog & the Porcupine").

    phi(x) = softmax([s W x, -s W x]) over the 2 D features,  s = D^(1/4),  W (D, D) of each head starts as 1

    The exponentials are the paper's; the softmax is its authors' way of keeping them in range. It also makes
    phi(q).phi(k) proportional to 1 + s^2 q.k / D up to terms of third order in q and k, and s makes that the
    1 + q.k / D^(1/2) of softmax attention: of the scales 1, 2 and D^(1/4), and with bare exponentials, this one starts
    nearest to the teacher.

    Args:
        heads: of the tensors that it maps.
        head_dim: D.
    """

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.scale = head_dim**0.25
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, H, D), any floating dtype, to nonnegative (B, N, H, 2 D) of the same dtype."""
        mapped = torch.einsum("bnhd,hde->bnhe", x * self.scale, self.weight)
        # Back to x's: under autocast on a GPU a softmax returns float32.
        return torch.cat((mapped, -mapped), dim=-1).softmax(-1).to(x.dtype)


class InputMLP(nn.Sequential):
    """LinFusion's map of the hidden states before the projection (Liu et al. 2024; Huage001/LinFusion).

    f(x) = x + W2 leaky_relu(layer_norm(W1 x + b1)) + b2,  W1 (mid_dim, C), W2 (C, mid_dim)

    W2 and b2 start at 0, so f(x) = x: the pretrained projections see what they were trained on.

    Args:
        width: C, the features of x.
        mid_dim: None is C; -1 is LinFusion's word for the identity in place of the MLP: f(x) = x + x, no weights.
    """

    def __init__(self, width: int, mid_dim: int | None = None):
        if mid_dim == -1:
            super().__init__()
            return
        mid_dim = width if mid_dim is None else mid_dim
        # The names 0, 1 and 3 are those of LinFusion's files.
        norm, leaky = nn.LayerNorm(mid_dim), nn.LeakyReLU(inplace=True)
        super().__init__(nn.Linear(width, mid_dim), norm, leaky, nn.Linear(mid_dim, width))
        nn.init.zeros_(self[3].weight)
        nn.init.zeros_(self[3].bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C), any floating dtype, to the same shape and dtype."""
        return x + super().forward(x)
