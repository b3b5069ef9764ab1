"""Causal linear attention, with or without decay: what it knows of the past is a state of fixed size."""

import copy
import math
import numbers
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from diffattn.cores.base import AttentionCore, Rotary, apply_rotary
from diffattn.cores.linear import _interleave, _mask_keys, checked_eps
from diffattn.kernels import LinearState
from diffattn.kernels.causal_linear_attention import check_inputs, run_causal_linear_attention
from diffattn.kernels.causal_linear_attention.reference import _map, exported_eps

FEATURE_MAPS = ("relu", "elu1", None)


class CausalState:
    """What a layer with a `CausalCore` remembers: made by its `new_state`, updated in place by its calls.

    Attributes:
        numerator: S, and with it the normalizer where queries and keys do not rotate.
        denominator: the unrotated normalizer where they do; else None.
        layer: the core that it belongs to.
    """

    def __init__(self, layer: "CausalCore", numerator: LinearState, denominator: LinearState | None):
        self.layer, self.numerator, self.denominator = layer, numerator, denominator

    def __iter__(self) -> Iterator[LinearState]:
        yield self.numerator
        if self.denominator is not None:
            yield self.denominator

    def reset(self) -> None:
        """Forget everything, in place."""
        for state in self:
            state.reset()

    def clone(self) -> "CausalState":
        """An independent copy."""
        other = copy.copy(self)
        other.numerator = self.numerator.clone()
        other.denominator = None if self.denominator is None else self.denominator.clone()
        return other

    def copy_(self, other: "CausalState") -> None:
        """Take over the numbers of another state of the same layer, in place."""
        for mine, theirs in zip(self, other, strict=True):
            mine.tensor.copy_(theirs.tensor)

    def tensors(self) -> list[Tensor]:
        return [state.tensor for state in self]


class CausalCore(AttentionCore):
    """A core whose tokens see those before them and themselves, and whose past fits in a `CausalState`.

    Attributes:
        block: tokens that see one another, 1 or those of a frame.
        feature_map: what maps keys before they enter the state, or None.
    """

    # Declared, not set: a class attribute would hide a module of that name.
    block: int
    feature_map: str | nn.Module | None
    #: whether the state holds a normalizer
    normalize = False

    def new_state(
        self, batch: int, kv_heads: int, head_dim: int, value_dim: int | None = None, *, rotated: bool = False,
        device: torch.device | str | None = None,
    ) -> CausalState:  # fmt: skip
        """A state for `batch` samples, all zeros.

        Args:
            head_dim: features after the map.
            rotated: whether calls will come with `rotate`.
        """
        apart = rotated and self.normalize
        size = dict(device=device, owner=self)
        numerator = LinearState(batch, kv_heads, head_dim, value_dim, normalize=self.normalize and not rotated, **size)
        denominator = LinearState(batch, kv_heads, head_dim, 1, normalize=False, **size) if apart else None
        return CausalState(self, numerator, denominator)

    def check_state(self, state: CausalState, rotated: bool) -> None:
        """Refuse a state that is none of this layer's. Raises: TypeError or ValueError; no state has changed."""
        if not isinstance(state, CausalState):
            raise TypeError(
                f"state: got {type(state).__name__}, expected a CausalState, from this layer's new_state()"
            )
        if state.layer is not self:
            raise ValueError("state: it belongs to another layer, expected one from this layer's new_state()")
        if self.normalize and rotated != (state.denominator is not None):
            was = "with" if state.denominator is not None else "without"
            raise ValueError(f"state: made for calls {was} a rotary embedding, and this one is the other kind")


class CausalLinearAttention(CausalCore):
    """Causal linear attention (Katharopoulos et al. 2020) and its decayed kind, as `causal_linear_attention` has it.

    S_t = exp(g_t) S_(t-1) + sum_m R phi(k_m) v_m^T,   o_n = R phi(q_n) S_t / (phi(q_n) . z_t + eps)

    over the tokens m of step t. As in `LinearAttention`, R rotates the numerator alone and a scale s other than D^-0.5
    multiplies q by s D^0.5 before the map; without a normalizer q is multiplied by s itself, D^-0.5 unless given.

    Args:
        feature_map: `"relu"`, `"elu1"`, None, or an nn.Module from (B, N, H, D) to nonnegative (B, N, H, F).
        normalize: divide by the normalizer.
        decay: g. None; `"retention"`, log(1 - 2^(-5 - h)) for head h (RetNet, Sun et al. 2023, eq. 8); a number a
            key/value head, at most 0; or an nn.Module that makes it of k (B, N, Hkv, D): (B, T, Hkv) or
            (B, T, Hkv, D), at most 0, for T = N / `block`.
        block: tokens of a step. 1: tokens see those before them and themselves. The tokens of a frame: they see their
            whole frame and the frames before it (what SANA-Video calls block causal).
        eps: added to the denominator.

    Whole sequences go through `forward`; `diffattn.streaming` gives it the state between calls. Masks may hide keys,
    the same ones for all heads and queries.

    Raises: TypeError or ValueError for options other than these.
    """

    def __init__(
        self,
        feature_map: str | nn.Module | None = "relu",
        *,
        normalize: bool = True,
        decay: str | Sequence[float] | nn.Module | None = None,
        block: int = 1,
        eps: float = 1e-15,
    ):
        super().__init__()
        if not isinstance(feature_map, nn.Module) and feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: got {feature_map!r}, expected an nn.Module or one of {FEATURE_MAPS}")
        if not isinstance(block, int) or isinstance(block, bool) or block < 1:
            raise ValueError(f"block: got {block!r}, expected a positive integer, the tokens of a frame")
        if isinstance(decay, numbers.Real) or (isinstance(decay, str) and decay != "retention"):
            raise ValueError(f"decay: got {decay!r}, expected 'retention', a number a head, an nn.Module or None")
        if decay is not None and not isinstance(decay, (str, nn.Module)):
            decay = [float(g) for g in decay]
            if not decay or not all(g <= 0 for g in decay):
                raise ValueError(f"decay: got {decay}, expected numbers of 0 or less, logarithms of what is kept")
        self.feature_map = feature_map
        self.normalize = bool(normalize)
        self.decay = decay
        self.block = block
        self.eps = checked_eps(eps)
        self._head_decays: dict[tuple, Tensor] = {}

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None, state: CausalState | None = None):
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"k: got {k.shape[1]} tokens for {q.shape[1]} of q: causal attention is self-attention, each token "
                "brings its own key"
            )
        decay = self._decay_of(k)
        scale = (scale or q.shape[-1] ** -0.5) * (math.sqrt(q.shape[-1]) if self.normalize else 1.0)
        if scale != 1.0:
            q = q * scale
        feature_map = self.feature_map
        if isinstance(feature_map, nn.Module):
            q, k, feature_map = feature_map(q), feature_map(k), None
        if mask is not None:
            q, k, feature_map = _mask_keys(q, k, feature_map, mask)
        if state is not None:
            self.check_state(state, rotated=rotate is not None)
        if rotate is None:
            past = None if state is None else state.numerator
            return self._attend(q, k, v, decay, past, feature_map=feature_map, normalize=self.normalize)
        q, k, rotary = _interleave(q, k, rotate)
        q, k = _map(q, feature_map), _map(k, feature_map)
        eps = self.eps
        if self.normalize:
            q, eps = exported_eps(q, eps)
        if q.dtype == torch.float16:
            # the numerator alone is a sum over all tokens, which float16 cannot hold
            q, k = q.float(), k.float()
        past, beside = (None, None) if state is None else (state.numerator, state.denominator)
        rotary = Rotary(*rotary)
        rotated = apply_rotary(q, rotary), apply_rotary(k, rotary), v.to(q.dtype)
        if not self.normalize:
            return self._attend(*rotated, decay, past, normalize=False).to(v.dtype)
        # the denominator is the same sum of unrotated features, with values of 1
        exact = torch.promote_types(q.dtype, torch.float32)
        ones = k.new_ones(1, dtype=exact).expand(*k.shape[:3], 1)
        unrotated = q.to(exact), k.to(exact), ones
        if state is not None:
            # both before either: a refused call changes nothing
            self._check(*unrotated, decay, beside, normalize=False)
            self._check(*rotated, decay, past, normalize=False)
        denominator = self._attend(*unrotated, decay, beside, normalize=False)
        out = self._attend(*rotated, decay, past, normalize=False)
        return (out / (denominator + eps)).to(v.dtype)

    def _check(self, q, k, v, decay, state, *, normalize, feature_map=None):
        check_inputs(
            q, k, v, decay, state, feature_map=feature_map, normalize=normalize, form="auto", block=self.block,
            eps=self.eps, look=isinstance(self.decay, nn.Module),
        )  # fmt: skip

    def _attend(self, q, k, v, decay, state, *, normalize, feature_map=None):
        self._check(q, k, v, decay, state, normalize=normalize, feature_map=feature_map)
        return run_causal_linear_attention(
            q, k, v, decay, state, feature_map=feature_map, normalize=normalize, block=self.block, eps=self.eps
        )

    def _decay_of(self, k: Tensor) -> Tensor | None:
        if self.decay is None:
            return None
        if isinstance(self.decay, nn.Module):
            return self.decay(k)
        heads = k.shape[2]
        key = (heads, k.device)
        if key not in self._head_decays:
            self.check(heads, heads)
            if self.decay == "retention":
                values = [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]
            else:
                values = self.decay
            with torch.inference_mode(False):  # kept for calls with gradients too
                self._head_decays[key] = torch.tensor(values, dtype=torch.float32, device=k.device)
        return self._head_decays[key]

    def __deepcopy__(self, memo):
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy({n: x for n, x in self.__dict__.items() if n != "_head_decays"}, memo))
        other._head_decays = {}
        return other

    def check(self, heads, kv_heads):
        if isinstance(self.decay, list) and len(self.decay) != kv_heads:
            raise ValueError(f"decay: got {len(self.decay)} numbers, expected {kv_heads}, one a key/value head")

    def formula(self, heads, kv_heads):
        return ("causal linear", *(str(value) for value in self.config().values()))

    def config(self):
        def name(x):
            return type(x).__name__ if isinstance(x, nn.Module) else x

        return {
            "feature_map": name(self.feature_map),
            "normalize": self.normalize,
            "decay": name(self.decay),
            "block": self.block,
            "eps": self.eps,
        }
