"""What every attention core is given and returns, and the rotation that some of them apply."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
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


#: The projections of a layer: of queries, keys, values, and of the output; then those of text in joint attention,
#: where it has its own.
ROLES = ("q", "k", "v", "out", "text_q", "text_k", "text_v", "text_out")


@dataclass(frozen=True)
class LayerInfo:
    """What a core is told of the layer that it is made for.

    Attributes:
        heads, kv_heads: H and Hkv.
        head_dim: D of queries and keys; None where the processor cannot tell.
        weights: role (one of `ROLES`) -> weight (out, in) and bias or None of the layer's projection, to start from:
            detached, on the layer's device or the meta device, in its dtype. Only those are listed in whose place the
            layer's processor calls a projection of the core's; empty where it calls none.
        plain_scores: whether nothing happens to q and k between their projections and their product: no norm, no
            rotation.
        fixes_key_heads: whether what happens to k before the core needs all its heads: a norm over all of them at
            once, a rotation of each by angles of its own. A core may then have fewer heads of v alone.
        loading: whether weights are loaded right after: only the shapes of what `prepare` makes matter then.
    """

    heads: int
    kv_heads: int
    head_dim: int | None = None
    weights: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    plain_scores: bool = False
    fixes_key_heads: bool = False
    loading: bool = False


class AttentionCore(nn.Module):
    """Turns queries, keys and values into the attention output, knowing nothing of the model.

    A core is configured in its constructor, copied once per layer, told about that layer in `prepare`, and holds no
    state between calls.

    Weights of its own a core keeps in child modules (offloading does not find those directly on it), most of them
    made in `prepare`. `core.parameters()` is exactly what distillation trains, `save_weights` writes and
    `load_weights` reads; a core without any computes a fixed formula. Two kinds of children its processor calls
    before and after the core itself, on processors that hand them over (`LayerInfo.weights` is empty elsewhere):

        projections: role -> nn.Linear that is called in place of the layer's (`to_q`, `add_k_proj`, ...).
            Adapters (LoRA) on the layer's act on it all the same, unless the core says in `refuses_adapters` why they
            cannot. The layer's own stay for `unpatch`, until `diffattn.finalize` drops them.
        input_maps: role of queries or keys -> module that maps the hidden states (B, N, C) before that projection.

    Both are None in a core that has none.
    """

    #: Whether `rotate` is the first thing that happens to q and k: a processor then does it in the core's place, in
    #: one pass with the norms. A subclass that does anything to q or k before has to set it to False.
    rotates_first = False

    #: Why adapters on the layer's projections cannot act on the core's own: a call with some then raises.
    refuses_adapters: str | None = None

    def __init__(self):
        super().__init__()
        self.projections: nn.ModuleDict | None = None
        self.input_maps: nn.ModuleDict | None = None

    def prepare(self, layer: LayerInfo) -> None:
        """Make the weights that the core has on this layer, as near to the layer's softmax attention as they can be.

        `patch` calls it once on the layer's own copy, before moving the copy to where and to the dtype that the layer
        computes in. It is called again when a copy becomes another layer's: it makes everything anew.

        Raises: ValueError if the core cannot serve the layer; nothing has been installed then.
        """

    def own(self, layer: LayerInfo, roles: Sequence[str]) -> None:
        """Give the core copies of some of the layer's projections, called in place of the layer's from then on.

        What it has already stays as it is. `load_weights` does this for those that a checkpoint holds.

        Raises: ValueError for a role that the layer's processor does not hand over.
        """
        made = {} if self.projections is None else dict(self.projections.items())
        for role in roles:
            if role in made:
                continue
            if role not in layer.weights:
                raise ValueError(
                    f"projections: {self} cannot have its own {role!r} here: this layer's processor hands over "
                    f"{', '.join(layer.weights) or 'none'}. Those can be replaced that are plain linear layers, one "
                    "for each role, and not fused"
                )
            made[role] = linear(*layer.weights[role])
        # In one order, whatever was asked for first.
        self.projections = nn.ModuleDict({role: made[role] for role in ROLES if role in made}) if made else None

    def projected(self, role: str, heads: Tensor) -> Tensor:
        """What becomes of the output of a layer's own projection (B, N, H, D), before its norm and rotation."""
        return heads

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


def linear(weight: Tensor, bias: Tensor | None, instead_of: Tensor | None = None) -> nn.Linear:
    """A linear layer that starts with a copy of `weight` (out, in) and `bias`.

    Args:
        instead_of: the weight of the layer's projection that it stands in for, if that is another.
    """
    out, features = weight.shape
    made = nn.utils.skip_init(nn.Linear, features, out, bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    source = weight if instead_of is None else instead_of
    # No buffer: it is neither saved nor moved. A weight on the meta device has no numbers to keep.
    made.instead_of = None if source.is_meta else samples([source])[0]
    return made


def samples(weights: Sequence[Tensor]) -> list[Tensor]:
    """64 numbers of each weight, on the CPU, that tell whether it changed: all of them in one wait for the GPU."""
    if not weights:
        return []
    parts = []
    for weight in weights:
        numbers = weight.detach().flatten()
        step = max(1, numbers.numel() // 64) | 1  # odd: not one column alone
        parts.append(numbers[::step][:64].to(weights[0].device))
    joined = torch.cat(parts).to("cpu", torch.float32, copy=True)
    return list(joined.split([len(part) for part in parts]))
