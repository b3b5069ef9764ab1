"""Launchers of the bidirectional form.

For steps of a token with one decay or none, a walk back over keys and values writes the states that a walk forth reads
with its own; else it is a walk each way, the second on top of the first.
"""

import torch

from diffattn.kernels.causal_linear_attention.triton import _quotient, _steps_first, _walk


def bidirectional_linear_attention_fwd(q, k, v, decay, feature_map, normalize, eps, block, keep):
    """(o, residual, inverse); the last two, what a backward needs, are empty unless `keep`."""
    decay = _steps_first(decay, q.shape[0], q.shape[1] // block)
    common = dict(decay=decay, block=block, maps=(feature_map, feature_map, None), norm=normalize)
    if block == 1 and (decay is None or decay.shape[3] == 1):
        return _walk(q, k, v, eps=eps, keep=keep, both=True, **common)[:3]
    # The second walk adds to what rounding took from the first one's output, or two roundings would be in the sum.
    o, residual, inverse, _ = _walk(q, k, v, eps=eps, keep=True, **common)
    o, residual, inverse, _ = _walk(
        q, k, v, flip=True, strict=True, a=inverse if normalize else None, onto=(o, residual), keep=True, **common
    )
    if not keep:
        residual = inverse = residual.new_empty(0)
    return o, residual, inverse


def bidirectional_linear_attention_bwd(
    grad, q, k, v, decay, residual, inverse, out, feature_map, normalize, eps, block, rate
):
    """(dq, dk, dv, dg); dg is None unless `rate`. Both ways share their denominators, so each way's gradients are
    those of a causal pass (`triton.py`) with these, and they add up."""
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    steps = q.shape[1] // block
    rate = rate and decay is not None
    a, b = (inverse, _quotient(grad, out, residual, inverse)) if normalize else (None, None)
    common = dict(decay=_steps_first(decay, q.shape[0], steps), block=block, a=a, out_dtype=torch.float32)
    values = dict(decay_on="values", maps=(None, None, feature_map), map_x=feature_map, b=b, rate=rate, **common)
    maps = (feature_map, feature_map, None)
    readers, sources = (1, 2) if normalize else (0, 0)
    gradients, dg = [], None
    for way in (dict(flip=False, strict=False), dict(flip=True, strict=True)):
        back = dict(flip=not way["flip"], strict=way["strict"], post=True)
        dq, _, _, r = _walk(grad, v, k, x=q, weigh=readers, **way, **values)
        dk, _, _, s = _walk(v, grad, q, x=k, weigh=sources, **back, **values)
        dv, _, _, _ = _walk(k, q, grad, maps=maps, weigh=sources, **back, **common)
        gradients.append((dq, dk, dv))
        if rate:
            part = _decay_gradient_of_way(r, s, decay, kv_heads, steps, way["flip"])
            dg = part if dg is None else dg + part
    dq, dk, dv = (forth.add_(back) for forth, back in zip(*gradients, strict=True))
    if group > 1:
        dk, dv = (x.unflatten(2, (kv_heads, group)).sum(3) for x in (dk, dv))
    if rate:
        dg = (dg.sum((0, 1)) if decay.dim() == 1 else dg).to(decay.dtype)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dg


def _decay_gradient_of_way(r, s, decay, kv_heads, steps, flip):
    if decay.dim() < 4 or decay.shape[3] == 1:
        r, s = r.double().sum(0).unsqueeze(-1), s.double().sum(0).unsqueeze(-1)
    B, N, H, C = r.shape
    dg = (r - s).reshape(B, steps, N // steps if steps else 1, kv_heads, H // kv_heads, C).sum((2, 4))
    dg = dg.cumsum(1) if flip else dg.flip(1).cumsum(1).flip(1)
    return dg if decay.dim() == 4 else dg.squeeze(-1)
