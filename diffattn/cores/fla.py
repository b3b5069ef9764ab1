"""Recurrent cores with fla-core's kernels (`diffattn[fla]`): GLA, RWKV-6, RWKV-7 and the gated delta rule.

On a CUDA device flash-linear-attention's kernels run (chunked, or recurrent for few tokens); elsewhere the recurrences
below, token by token in plain torch.
"""

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffattn._config import config
from diffattn.cores.base import LayerInfo, rotate_heads
from diffattn.cores.causal import CausalCore, CausalState

# Up to this many tokens fla-core's recurrent kernels run.
RECURRENT_TOKENS = 64


class RecurrentCore(CausalCore):
    """What these cores share. S is D x E a head; o_t = scale q_t S_t unless the core says otherwise; tokens see
    themselves and those before them. Their gates are linear in the head's key, with weights shared by all heads.

    Args:
        head_dim: D. None: `prepare`, which `patch` calls, tells it.

    Needs as many key/value heads as query heads. Masks are refused: a key that is not there would still decay.
    """

    rotates_first = True
    block = 1
    feature_map = None
    #: gates, and how many numbers each makes for a head from its key; None is D
    GATES: tuple[tuple[str, int | None], ...] = ()

    def __init__(self, head_dim: int | None = None):
        super().__init__()
        self.head_dim = head_dim
        self.gates: nn.ModuleDict | None = None
        if head_dim is not None:
            if not isinstance(head_dim, int) or head_dim < 1:
                raise ValueError(f"head_dim: got {head_dim!r}, expected a positive integer or None")
            self._make_gates()

    def prepare(self, layer: LayerInfo) -> None:
        if layer.head_dim is None:
            raise ValueError(f"{type(self).__name__}: needs the head dim, which this layer's processor cannot tell")
        self.head_dim = layer.head_dim
        self._make_gates()

    def _make_gates(self) -> None:
        with torch.random.fork_rng(devices=()):
            self.gates = nn.ModuleDict({n: nn.Linear(self.head_dim, w or self.head_dim) for n, w in self.GATES})

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None, state: CausalState | None = None):
        if mask is not None:
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected None: {type(self).__name__} has no masks")
        if q.shape[:3] != k.shape[:3]:
            raise ValueError(f"k: got shape {tuple(k.shape)}, expected the tokens and heads of q, {tuple(q.shape)}")
        if self.gates is None or k.shape[3] != self.head_dim:
            raise ValueError(f"head_dim: made for {self.head_dim}, expected {k.shape[3]}: pass it, or call prepare()")
        before = None
        if state is not None:
            self.check_state(state, rotated=False)
            before = self._tensor(state, q, v)
        q, k = rotate_heads(q, k, rotate)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        arguments = self.arguments(q, k, v)
        if _use_fla(q):
            out, after = self.run_fla(arguments, scale, before)
        else:
            out, after = self.recurrence(arguments, scale, before)
        if state is not None:
            before.copy_(after.detach())
        return out.to(v.dtype)

    def new_state(self, batch, kv_heads, head_dim, value_dim=None, *, rotated=False, device=None):
        # rotated keys are what these remember
        return super().new_state(batch, kv_heads, head_dim, value_dim, rotated=False, device=device)

    @staticmethod
    def _tensor(state: CausalState, q: Tensor, v: Tensor) -> Tensor:
        S = state.numerator.S
        expected = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        if tuple(S.shape) != expected or S.device != q.device:
            raise ValueError(f"state: got {tuple(S.shape)} on {S.device}, expected {expected} on {q.device}")
        return S

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What fla-core's functions of this core call q, k, v and the gates."""
        raise NotImplementedError

    def run_fla(self, arguments, scale, before):
        raise NotImplementedError

    def step(self, S: Tensor, scale: float, **x: Tensor) -> tuple[Tensor, Tensor]:
        """(o_t (B, H, E), S_t) from S_(t-1) (B, H, D, E) and the arguments of one token, (B, H, ...)."""
        raise NotImplementedError

    def recurrence(self, arguments, scale, before):
        dtype = torch.promote_types(arguments["v"].dtype, torch.float32)
        arguments = {n: x.to(dtype) for n, x in arguments.items()}
        B, N, H, E = arguments["v"].shape
        S = arguments["v"].new_zeros(B, H, self.head_dim, E) if before is None else before.clone()
        outputs = []
        for t in range(N):
            o, S = self.step(S, scale, **{n: x[:, t] if x.dim() > 2 else x for n, x in arguments.items()})
            outputs.append(o)
        return torch.stack(outputs, 1) if outputs else arguments["v"].new_empty(B, 0, H, E), S

    def formula(self, heads, kv_heads):
        return (type(self).__name__,)

    def check(self, heads, kv_heads):
        if heads != kv_heads:
            raise ValueError(
                f"{type(self).__name__}: got {heads} heads and {kv_heads} key/value heads, expected as many"
            )

    def config(self):
        return {"head_dim": self.head_dim}


class _Vector(nn.Module):
    """A parameter in a module of its own, where offloading finds it."""

    def __init__(self, n: int):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(n))

    def forward(self):
        return self.value


def _read(q: Tensor, S: Tensor, scale: float) -> Tensor:
    return torch.einsum("bhd,bhde->bhe", q, S) * scale


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


class GatedLinearAttention(RecurrentCore):
    """GLA (Yang et al. 2024): S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T, g = log sigmoid(W k) / 16.

    `CausalLinearAttention(None, normalize=False, decay=...)` computes the same with diffattn's own kernels.
    """

    GATES = (("decay", None),)

    def arguments(self, q, k, v):
        return dict(q=q, k=k, v=v, g=F.logsigmoid(self.gates["decay"](k).float()) / 16)

    def run_fla(self, x, scale, before):
        if x["q"].shape[1] <= RECURRENT_TOKENS:
            from fla.ops.gla import fused_recurrent_gla

            return fused_recurrent_gla(
                x["q"], x["k"], x["v"], gk=x["g"], scale=scale, initial_state=before, output_final_state=True
            )
        from fla.ops.gla import chunk_gla

        return chunk_gla(**x, scale=scale, initial_state=before, output_final_state=True)

    def step(self, S, scale, *, q, k, v, g):
        S = S * g.exp().unsqueeze(-1) + _outer(k, v)
        return _read(q, S, scale), S


class RWKV6(RecurrentCore):
    """RWKV-6 (Peng et al. 2024): o_t = r_t (S_(t-1) + diag(u) k_t v_t^T), S_t = diag(exp(w_t)) S_(t-1) + k_t v_t^T.

    w = -exp(min(W k, 4)), u is learned, one vector for all heads.
    """

    GATES = (("decay", None),)

    def _make_gates(self):
        super()._make_gates()
        self.gates["bonus"] = _Vector(self.head_dim)

    def arguments(self, q, k, v):
        w = -self.gates["decay"](k).float().clamp_max(4.0).exp()
        u = self.gates["bonus"]().float().expand(q.shape[2], -1)
        return dict(r=q, k=k, v=v, w=w, u=u)

    def run_fla(self, x, scale, before):
        from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6

        f = fused_recurrent_rwkv6 if x["r"].shape[1] <= RECURRENT_TOKENS else chunk_rwkv6
        return f(**x, scale=scale, initial_state=before, output_final_state=True)

    def step(self, S, scale, *, r, k, v, w, u):
        kv = _outer(k, v)
        return _read(r, S + u.unsqueeze(-1) * kv, scale), S * w.exp().unsqueeze(-1) + kv


class RWKV7(RecurrentCore):
    """RWKV-7 (Peng et al. 2025): S_t = diag(exp(w_t)) S_(t-1) + b_t (a_t^T S_(t-1)) + k_t v_t^T.

    a = -k / |k|, b = sigmoid(W_a k) k / |k|, w = -exp(-1/2) sigmoid(W_w k).
    """

    GATES = (("decay", None), ("rate", None))

    def arguments(self, q, k, v):
        direction = F.normalize(k.float(), dim=-1)
        w = -math.exp(-0.5) * self.gates["decay"](k).float().sigmoid()
        b = direction * self.gates["rate"](k).float().sigmoid()
        return dict(r=q, w=w, k=k, v=v, a=-direction.to(k.dtype), b=b.to(k.dtype))

    def run_fla(self, x, scale, before):
        from fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7

        f = fused_recurrent_rwkv7 if x["r"].shape[1] <= RECURRENT_TOKENS else chunk_rwkv7
        return f(**x, scale=scale, initial_state=before, output_final_state=True)

    def step(self, S, scale, *, r, w, k, v, a, b):
        S = S * w.exp().unsqueeze(-1) + _outer(b, torch.einsum("bhd,bhde->bhe", a, S)) + _outer(k, v)
        return _read(r, S, scale), S


class GatedDeltaRule(RecurrentCore):
    """Gated delta rule (Yang et al. 2025): S_t = exp(g_t) S_(t-1) + b_t k_t (v_t - exp(g_t) S_(t-1)^T k_t)^T.

    g = log sigmoid(W_g k) and b = sigmoid(W_b k), a number a head; q and k are normalized to length 1 first.
    """

    GATES = (("decay", 1), ("rate", 1))

    def arguments(self, q, k, v):
        g = F.logsigmoid(self.gates["decay"](k).float()).squeeze(-1)
        beta = self.gates["rate"](k).float().sigmoid().squeeze(-1)
        q, k = (F.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k))
        return dict(q=q, k=k, v=v, g=g, beta=beta)

    def run_fla(self, x, scale, before):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

        f = fused_recurrent_gated_delta_rule if x["q"].shape[1] <= RECURRENT_TOKENS else chunk_gated_delta_rule
        return f(**x, scale=scale, initial_state=before, output_final_state=True)

    def step(self, S, scale, *, q, k, v, g, beta):
        S = S * g.exp()[..., None, None]
        known = torch.einsum("bhd,bhde->bhe", k, S)
        S = S + _outer(k, (v - known) * beta.unsqueeze(-1))
        return _read(q, S, scale), S


def _use_fla(q: Tensor) -> bool:
    """Raises: ImportError or RuntimeError where fla-core should run and cannot."""
    if config.backend == "torch":
        return False
    installed = importlib.util.find_spec("fla") is not None
    if q.device.type != "cuda":
        if config.backend == "triton":
            raise RuntimeError(
                f"DIFFATTN_BACKEND=triton was asked for, and fla-core's kernels need CUDA, not {q.device}"
            )
        return False
    if not installed:
        raise ImportError("fla-core is not installed: pip install diffattn[fla], or take DIFFATTN_BACKEND=torch")
    return q.dtype != torch.float64
