"""Projections for fewer key/value heads, made of those of a multi-head layer."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffattn.cores.base import LayerInfo, linear

Projection = tuple[Tensor, Tensor | None]


def mean_pooled(layer: LayerInfo, kv_heads: int, roles: Iterable[str] = ("k", "v")) -> nn.ModuleDict:
    """Mean of the key and value projections of each group of heads in a row (Ainslie et al. 2023, figure 1)."""

    def pool(projection: Projection) -> nn.Linear:
        weight, bias = projection
        return linear(mean(weight), None if bias is None else mean(bias), instead_of=weight)

    def mean(tensor: Tensor) -> Tensor:
        grouped = _wide(tensor).unflatten(0, (kv_heads, layer.kv_heads // kv_heads, -1))
        return grouped.mean(1).flatten(0, 1)

    return nn.ModuleDict({role: pool(layer.weights[role]) for role in roles})


def svd_pooled(layer: LayerInfo, kv_heads: int) -> nn.ModuleDict:
    """All four projections, the nearest to the layer's products that fewer key/value heads allow.

    Scores see q and k as Wq_h^T Wk_h, the output sees v as Wo_h Wv_h. With a shared K' (D, C) the nearest to the
    Wq_h^T Wk_h of a group, stacked, is their truncated SVD (Eckart and Young 1936): K' is the first D right singular
    vectors, and Wq_h becomes K' Wk_h^T Wq_h. Likewise for V' and Wo_h. Biases are one more input, which is 1.

    Raises: ValueError if a projection is not handed over, or something happens to q and k before their product.
    """
    if not {"q", "k", "v", "out"} <= layer.weights.keys() or not layer.plain_scores:
        raise ValueError(
            "pooling: 'svd' changes all four projections together, and this layer's processor does not hand them "
            "over, they are fused or no plain linear layers, text has its own, or q and k are normalized or "
            "rotated before their product: expected 'mean'"
        )
    if layer.loading:
        copies = {role: linear(*layer.weights[role]) for role in ("q", "out")}
        return nn.ModuleDict({"q": copies["q"], **mean_pooled(layer, kv_heads), "out": copies["out"]})
    heads, shared = layer.heads, layer.kv_heads // kv_heads
    q = _by_head(layer.weights["q"], heads)
    k, v = (_by_head(layer.weights[role], layer.kv_heads) for role in ("k", "v"))
    weight, bias = layer.weights["out"]
    out = weight.double().unflatten(1, (heads, -1)).permute(1, 2, 0)  # [H, D, C]
    # Query heads of layers that share key/value heads already.
    k, v = (t.repeat_interleave(heads // layer.kv_heads, dim=0) for t in (k, v))
    made: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "out": []}
    for group in range(kv_heads):
        of_group = slice(group * shared * heads // layer.kv_heads, (group + 1) * shared * heads // layer.kv_heads)
        for left, right, left_role, right_role in ((q, k, "q", "k"), (out, v, "out", "v")):
            new_left, new_right = _shared(left[of_group], right[of_group])
            made[left_role].append(new_left)
            made[right_role].append(new_right)
    q, k, v, out = (torch.cat(made[role]) for role in ("q", "k", "v", "out"))
    joined = {role: _joined(t, layer.weights[role]) for role, t in (("q", q.flatten(0, 1)), ("k", k), ("v", v))}
    out = out.permute(2, 0, 1).flatten(1).to(_wide(weight[:1, :1]).dtype)
    joined["out"] = linear(out, bias, instead_of=weight)
    return nn.ModuleDict({role: joined[role] for role in ("q", "k", "v", "out")})


def _shared(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of left (n, D, A) and right (n, D, C): left' (n, D, A) and one right' (D, C) with left'^T right' ~ left^T right.

    The two are scaled alike, as trained projections are: the same steps of training then move both.
    """
    count, width = left.shape[:2]
    # right^T (left left^T) right, summed over heads: its eigenvectors are the stack's right singular vectors.
    gram = right.flatten(0, 1).T @ (left @ left.mT @ right).flatten(0, 1)
    basis = torch.linalg.eigh(gram).eigenvectors[:, -width:].T
    if basis.shape[0] < width:  # wider heads than there are inputs
        basis = torch.cat((basis, basis.new_zeros(width - basis.shape[0], basis.shape[1])))
    left = basis @ right.mT @ left
    scale = (left.norm() / (basis.norm() * count**0.5)).sqrt().clamp_min(1e-12)
    return left / scale, basis * scale


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _by_head(projection: Projection, heads: int) -> Tensor:
    """(H, D, C), or (H, D, C + 1) with the bias as a column."""
    weight, bias = projection
    wide = weight.double() if bias is None else torch.cat((weight.double(), bias.double()[:, None]), dim=1)
    return wide.unflatten(0, (heads, -1))


def _joined(weight: Tensor, projection: Projection) -> nn.Linear:
    original, bias = projection
    weight = weight.to(_wide(original[:1, :1]).dtype)
    if bias is None:
        return linear(weight, None, instead_of=original)
    return linear(weight[:, :-1], weight[:, -1], instead_of=original)
