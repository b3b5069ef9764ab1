"""Causal linear attention in plain torch: one equation in three forms, and what runs where Triton does not."""

import math

import torch
from torch import Tensor

from diffattn.kernels._backend import exporting

# Tokens whose weights for one another are written out at a time; a decay per channel gives each pair D weights.
CHUNK = 64
CHANNEL_CHUNK = 16


def _map(x: Tensor, feature_map: str | None) -> Tensor:
    if feature_map == "relu":
        return x.relu()
    if feature_map == "elu1":
        # elu(x) + 1 without the cancellation in exp(x) - 1 + 1
        return x.relu() + x.clamp_max(0).exp()
    return x


def exported_eps(q: Tensor, eps: float) -> tuple[Tensor, float]:
    """(q, eps), both times a power of two where an export would lose eps, which changes no bit of the quotient.

    ONNX optimizers delete "+ eps" below 1e-8, and a row with phi(q) = 0 would become 0 / 0.
    """
    if not exporting() or not 0 < eps < 1e-7:
        return q, eps
    scale = 2.0 ** math.ceil(math.log2(1e-6 / eps))
    return q * scale, eps * scale


def split_state(state: Tensor, D: int, E: int) -> tuple[Tensor, Tensor | None]:
    """S (B, Hkv, D, E) and z (B, Hkv, D), or None where there is none, as views of the flat state."""
    S = state[..., : D * E].unflatten(-1, (D, E))
    return S, state[..., D * E :] if state.shape[-1] > D * E else None


def causal_linear_attention_reference(
    q, k, v, *, feature_map=None, normalize=True, decay=None, state=None, block=1, eps=1e-15, form="chunkwise"
) -> tuple[Tensor, Tensor]:
    """(o, new state): S_t = exp(g_t) S_(t-1) + sum_m k_m v_m^T,  o_n = q_n S_t / (q_n . z_t + eps).

    Arguments as in `diffattn.kernels.causal_linear_attention`, unchecked; `state` is the flat tensor or None. float64
    stays float64; other dtypes are computed in float32 and o is cast back. No exponent is above 0 and none is a
    difference of sums: weights are exact however strong the decay, -inf included.
    """
    if torch.is_autocast_enabled(q.device.type):
        # it would turn the float32 products back into half precision
        with torch.autocast(q.device.type, enabled=False):
            return causal_linear_attention_reference(
                q, k, v, feature_map=feature_map, normalize=normalize, decay=decay, state=state, block=block,
                eps=eps, form=form,
            )  # fmt: skip
    dtype = q.dtype
    working = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(working), k.to(working), v.to(working)
    B, N, H, D = q.shape
    kv_heads, E = v.shape[2:]
    q, k = _map(q, feature_map), _map(k, feature_map)
    if normalize:
        q, eps = exported_eps(q, eps)
    # [B, Hkv, G, N, D]: the G query heads of each key/value head, which is never repeated
    q = q.unflatten(2, (kv_heads, H // kv_heads)).permute(0, 2, 3, 1, 4)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    steps = N // block
    if decay is not None:
        decay = decay.to(working)
        if decay.dim() == 1:
            decay = decay.expand(B, steps, kv_heads)
        if decay.dim() == 3:
            decay = decay.unsqueeze(-1)
        decay = decay.transpose(1, 2)  # [B, Hkv, T, 1 or D]
    if state is None:
        S, z = k.new_zeros(B, kv_heads, D, E), k.new_zeros(B, kv_heads, D)
    else:
        S, z = split_state(state.to(working), D, E)
        if z is None:
            z = k.new_zeros(B, kv_heads, D)
    outputs = [q @ S.unsqueeze(2)] if N == 0 else []  # of no rows, with a gradient
    if form == "parallel" and N != 0:
        # in one piece, which also serves exports, whose N is no number yet
        o, S, z = _parallel(q, k, v, decay, S, z, block, normalize, eps)
        outputs.append(o)
    else:
        channels = decay is not None and decay.shape[-1] > 1
        at_once = max(1, (CHANNEL_CHUNK if channels else CHUNK) // block) if form == "chunkwise" else 1
        step = _one_step if at_once == 1 else _parallel
        for first in range(0, steps, at_once):
            tokens = slice(first * block, (first + at_once) * block)
            g = None if decay is None else decay[:, :, first : first + at_once]
            o, S, z = step(q[..., tokens, :], k[:, :, tokens], v[:, :, tokens], g, S, z, block, normalize, eps)
            outputs.append(o)
    o = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)).permute(0, 3, 1, 2, 4).reshape(B, N, H, E)
    state = torch.cat((S.flatten(2), z), -1) if normalize else S.flatten(2)
    return o.to(dtype), state


def _repeat(x: Tensor, n: int, dim: int) -> Tensor:
    """Each entry n times in a row; not repeat_interleave, which exporters do badly with."""
    if n == 1:
        return x
    sizes = [-1] * (x.dim() + 1)
    sizes[dim + 1] = n
    return x.unsqueeze(dim + 1).expand(sizes).flatten(dim, dim + 1)


def _one_step(q, k, v, g, S, z, block, normalize, eps):
    """The recurrence itself: decay, add the step's keys, read."""
    if g is not None:
        kept = g[:, :, 0].exp()  # [B, Hkv, 1 or D]
        S, z = S * kept.unsqueeze(-1), z * kept
    S, z = S + k.transpose(-1, -2) @ v, z + k.sum(-2)
    o = torch.einsum("bhgnd,bhde->bhgne", q, S)
    if normalize:
        o = o / (torch.einsum("bhgnd,bhd->bhgn", q, z) + eps).unsqueeze(-1)
    return o, S, z


def _parallel(q, k, v, g, S, z, block, normalize, eps):
    """All pairs of tokens at once: o_n = sum_m w(n, m) (q_n . k_m) v_m, and what the state before them gives."""
    n = k.shape[-2]
    steps = torch.arange(n, device=k.device) // block
    seen = steps[:, None] >= steps[None, :]
    if g is None:
        scores = torch.einsum("bhgnd,bhmd->bhgnm", q, k) * seen
        from_state, to_state, kept = q, k, 1.0
    else:
        # sum of g over the steps after m's up to n's, one pair of steps at a time; [B, Hkv, T, T, 1 or D]
        T = g.shape[2]
        after = torch.ones(T, T, dtype=torch.bool, device=g.device).tril(-1)
        spans = torch.where(after[:, :, None], g.unsqueeze(3), 0.0).cumsum(2)
        weights = _repeat(_repeat(spans.exp(), block, 2), block, 3) * seen[:, :, None]
        if g.shape[-1] == 1:
            scores = torch.einsum("bhgnd,bhmd->bhgnm", q, k) * weights.squeeze(-1).unsqueeze(2)
        else:
            scores = torch.einsum("bhgnd,bhmd,bhnmd->bhgnm", q, k, weights)
        before = g.cumsum(2).exp()
        from_state = q * _repeat(before, block, 2).unsqueeze(2)
        to_state = k * _repeat(spans[:, :, -1].exp(), block, 2)
        kept = before[:, :, -1]
    o = scores @ v.unsqueeze(2) + torch.einsum("bhgnd,bhde->bhgne", from_state, S)
    if normalize:
        o = o / (scores.sum(-1) + torch.einsum("bhgnd,bhd->bhgn", from_state, z) + eps).unsqueeze(-1)
    S = S * (kept if g is None else kept.unsqueeze(-1)) + to_state.transpose(-1, -2) @ v
    return o, S, z * kept + to_state.sum(-2)
