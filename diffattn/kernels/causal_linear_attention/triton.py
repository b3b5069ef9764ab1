"""Launchers of the Triton kernels: what each pass is in terms of one walk over the tokens, block sizes, segments.

With W the weights of pairs of tokens that decay and order leave, a_n = 1 / d_n and b_n the gradient of d_n (without a
normalizer a = 1, b = 0), g the gradient of o, every gradient is a walk of its own (`triton_tiles.py` for the roles):

    o_n  = a_n sum_m W_nm (q_n . k_m) v_m                     from the first token to the last
    dq_n = sum_m W_nm (a_n (g_n . v_m) + b_n) k_m             the same way
    dk_m = sum_n W_nm (a_n (v_m . g_n) + b_n) q_n             from the last token to the first
    dv_m = sum_n W_nm a_n (k_m . q_n) g_n                     from the last token to the first

Those from the last to the first carry the gradient of the state. With r_n and s_n the parts of q_n . dq_n and
k_n . dk_n that decayed, the gradient of g_t is the sum of r_n - s_n over all tokens from step t on, plus the product
of the last state with its gradient: each pair of tokens counts in the steps between the two.
"""

import functools

import torch

from diffattn.kernels._backend import small_shared_memory
from diffattn.kernels._launch import PARTS, Launch, Step, aligned, cdiv, multiprocessors, on_device, padded
from diffattn.kernels.causal_linear_attention.reference import split_state
from diffattn.kernels.causal_linear_attention.triton_channels import causal_linear_attention_channels_kernel
from diffattn.kernels.causal_linear_attention.triton_frames import causal_linear_attention_frames_kernel
from diffattn.kernels.causal_linear_attention.triton_scan import (
    causal_linear_attention_quotient_kernel,
    causal_linear_attention_recurrent_kernel,
    causal_linear_attention_scan_kernel,
    causal_linear_attention_sums_kernel,
)
from diffattn.kernels.causal_linear_attention.triton_walk import causal_linear_attention_walk_kernel

# By kernel, then by the padded width of a tile: the first entry at least as wide is taken. "both" is the walk that
# reads the state of all later tokens with each tile, "later" the one that writes it, in tiles of the same size.
CONFIGS = {
    "walk": {32: Launch(64, 4, 3, 2), 64: Launch(64, 4, 3, 2), 128: Launch(64, 8, 3, 1), 256: Launch(32, 8, 1, 1)},
    "both": {32: Launch(64, 4, 3, 2), 64: Launch(64, 4, 3, 2), 128: Launch(64, 8, 2, 1), 256: Launch(64, 8, 1, 1)},
    "later": {64: Launch(64, 4, 3, 2), 128: Launch(64, 8, 3, 1), 256: Launch(64, 8, 1, 1)},
    "frames": {32: Launch(64, 4, 2, 4), 64: Launch(64, 4, 2, 2), 128: Launch(64, 8, 1, 1), 256: Launch(32, 8, 1, 1)},
    "channels": {64: Launch(16, 4, 1, 4), 128: Launch(16, 4, 1, 2), 256: Launch(16, 8, 1, 1)},
}
# The most elements of one D x BE block of the state, by the bytes of its parts: larger heads are cut along E.
STATE_BLOCK = {2: 128 * 128, 4: 64 * 128}
# The recurrence keeps a whole state in one program up to this size; it multiplies no matrices.
RECURRENT_STATE = 128 * 128
# Costs in tiles of a program that has a multiprocessor to itself: of a program's start and end, and of two more
# launches. The pass for the states of segments reads two tensors of four. From this part of the programs that fit the
# device on, memory is busy and more of them are no faster.
TILES_PER_PROGRAM = 3
TILES_FOR_LAUNCHES = 10
SEGMENTED_COST = 1.5
SATURATED = 0.8


def _launch(kernel: str, width: int, dtype: torch.dtype, block: int, small: bool) -> Launch:
    table = CONFIGS[kernel]
    launch = table[min(w for w in table if w >= width)]
    if dtype != torch.bfloat16 and width > 64:
        launch = launch._replace(warps=8, stages=1, resident=1)
    if dtype == torch.float32:
        launch = launch._replace(block=max(16, launch.block // 2), stages=1)
    if small:
        # Compiled for such GPUs, measured on none.
        launch = launch._replace(stages=1 if width > 64 else min(2, launch.stages))
    if kernel == "frames":
        launch = launch._replace(block=min(launch.block, padded(block)))
    return launch


@functools.lru_cache(1024)
def _segments(launch: Launch, heads: int, steps: int, device: torch.device, tiles: int = 1) -> int:
    """How many segments to cut `steps` of `tiles` tiles of each of `heads` heads into, so that all finish soonest."""
    slots = multiprocessors(device) * launch.resident

    def finish(n):
        full, rest = divmod(heads * n, slots)
        waves = full / SATURATED + (max(1.0, rest / (SATURATED * slots)) if rest else 0)
        cost = waves * (cdiv(steps, n) * tiles + TILES_PER_PROGRAM)
        return cost if n == 1 else cost * SEGMENTED_COST + TILES_FOR_LAUNCHES

    n = min(range(1, max(1, min(steps, cdiv(4 * slots, heads))) + 1), key=finish)
    return cdiv(steps, cdiv(steps, n))


def _sums(decay, tile, ways, post, rounds):
    """Sums of a decay (B, N, H, 1) within tiles, and their strides as the walk reads them."""
    B, N, H, _ = decay.shape
    tiles = cdiv(N, tile)
    shape = (2 if ways == 2 else 1, 1 if rounds else 2, B, H, tiles * (tile + 1))
    sums = torch.empty(shape, dtype=torch.float32, device=decay.device)
    with on_device(decay):
        causal_linear_attention_sums_kernel[(tiles * B * H,)](
            decay, sums, *decay.stride()[:3], N, H, BN=tile, WAYS=ways, POST=post, ROUND=rounds, num_warps=1,
        )  # fmt: skip
    return sums, (sums.stride(2), sums.stride(1), sums.stride(3), sums.stride(0) if ways == 2 else 0)


def _states(parts: torch.Tensor, transpose: bool = False) -> torch.Tensor:
    """A state (B, H, D, E), transposed or not, flat as a walk keeps it."""
    return (parts.transpose(-1, -2) if transpose else parts).flatten(2)


def _join(S: torch.Tensor, tail: torch.Tensor | None) -> torch.Tensor:
    return (S if tail is None else torch.cat((S, tail), -1)).contiguous()


def _walk(
    q, k, v, *, decay=None, decay_on="keys", block=1, maps=(None, None, None), x=None, map_x=None, out_dtype=None,
    flip=False, post=False, strict=False, both=False, norm=False, weigh=0, a=None, b=None, eps=0.0, rate=False,
    keep=False, init=None, final=None, onto=None,
):  # fmt: skip
    """(o, residual, inverse, rate) of one walk. Tensors in the roles of q (B, N, Hq, D), k (B, N, Hk, D) and v
    (B, N, Hk, E): the head h of the result reads q's h // (H / Hq) and k's h // (H / Hk).

    decay: (B, T, Hg, 1 or features) or None. init: the flat state before, or None. final: where the flat state after
    goes, or None; it may be init. keep: return what a backward needs: what rounding took from o, and with `norm` one
    over the denominators. both: the walk and, strict, that the other way, added up, where the kernel can; else
    onto: (o, residual) of a walk the other way, to which this one is added in place; with `norm`, a is one over its
    denominators.
    """
    B, N, Hq, D = q.shape
    Hk, E = v.shape[2:]
    H = max(Hq, Hk)
    dtype, device = q.dtype, q.device

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    kind = 0
    if decay is not None:
        kind = 1 if decay.shape[3] == 1 else {"keys": 2, "values": 3}[decay_on]
    tail = D if norm else E if weigh and b is not None else 0
    size = D * E + tail
    if onto is None:
        o = empty(B, N, H, E, dtype=out_dtype or dtype)
        residual = empty(B, N, H, E, dtype=dtype) if keep and dtype != torch.float32 else empty(0)
    else:
        o, residual = onto
    inverse = empty(B, N, H) if keep and norm else empty(0)
    if N == 0 or B == 0 or E == 0:
        if final is not None and final is not init:
            final.copy_(init) if init is not None else final.zero_()
        shape = (1, B, N, H) if kind == 1 else (B, N, H, E)
        return o, residual, inverse, empty(*shape).zero_() if rate else empty(0)

    name = "frames" if block > 1 else "channels" if kind > 1 else "walk"
    kernel = {
        "frames": causal_linear_attention_frames_kernel,
        "channels": causal_linear_attention_channels_kernel,
        "walk": causal_linear_attention_walk_kernel,
    }[name]
    width = max(padded(D), padded(E))
    # Tiles of one swizzle, which is that of 64 elements for all wider ones: of two, ptxas 12.8 mixes up the addresses.
    BD = max(padded(D), min(width, 64))
    limit = STATE_BLOCK[2 if dtype == torch.bfloat16 else 4] // (2 if name == "frames" and rate else 1)
    BE = max(min(width, 64), min(padded(E), limit // BD))
    e_blocks = cdiv(E, BE)
    rates = empty(0)
    if rate:
        rates = empty(e_blocks, B, N, H) if kind == 1 else empty(B, N, H, E)
    launch = _launch("both" if both else name, width, dtype, block, small_shared_memory(device))
    steps = cdiv(N, launch.block) if block == 1 else N // block
    n_segments = _segments(launch, B * H * e_blocks, steps, device, cdiv(block, launch.block))
    # A state that several programs read none of them may write: then the scan does.
    shared = final is not None and (H != Hk or (norm and e_blocks > 1 and final is init))
    segmented = n_segments > 1 or shared
    segment = cdiv(steps, n_segments) * (launch.block if block == 1 else 1)
    group_q, group_k = H // Hq, H // Hk
    Hg = decay.shape[2] if decay is not None else H
    decay_strides = (0, 0, 0, 0) if decay is None else decay.stride()
    # Where sums cancel, as in a backward with a normalizer and in what it keeps, nothing is rounded on the way.
    rounds = PARTS[dtype] == "bf16" and not weigh and not rate and not (norm and keep)
    if name == "walk" and kind:
        decay, decay_strides = _sums(decay, launch.block, 2 if both else int(flip), post, rounds)
    constants = dict(
        D=D, E=E, BD=BD, BE=BE, BN=launch.block, MAP_Q=maps[0], MAP_K=maps[1], MAP_V=maps[2], MAP_X=map_x,
        X=x is not None, DECAY=kind, STRICT=strict, NORM=norm, WEIGH=weigh, BIAS=bool(weigh) and b is not None,
        ALIGN=aligned(q, k, v, *(() if x is None else (x,))), PARTS=PARTS[dtype],
        STAGES=launch.stages, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if name == "walk":
        constants |= dict(WAYS=2 if both else int(flip), TILES=False, ROUND=rounds)
    else:
        constants |= dict(FLIP=flip, POST=post, ADD=onto is not None)
    x = q if x is None else x

    ways, tiles, tails, later = 1, rates, rates, {}
    if both:
        ways = 2
        later = _launch("later", width, dtype, block, small_shared_memory(device))
        later = dict(num_warps=later.warps, STAGES=later.stages, num_stages=later.stages)
        tiles = empty(B, Hk, steps, D * E, dtype=dtype if rounds else torch.float32)
        tails = empty(B, Hk, steps, D) if norm else rates

    def run(heads, group_q, group_k, group_g, p_in, p_out, total, **flags):
        kernel[(B * heads * n_segments, e_blocks)](
            q, k, v, x, q if decay is None else decay, q if a is None else a, q if b is None else b, p_in, p_out,
            total, o, residual, inverse, rates, *((tiles, tails) if name == "walk" else ()), *q.stride(), *k.stride(),
            *v.stride(), *x.stride(), *decay_strides, N, heads, n_segments, segment, block, group_q, group_k, group_g,
            eps, **constants | flags,
        )  # fmt: skip

    with on_device(q):
        first = init
        # the heads of passes for states are those of k and v; weights a, b come with as many
        per_state = (Hk, max(1, Hk // Hq), 1, Hk // Hg if Hk > Hg else 1)
        states = dict(OUT=False, RATE=0, RESIDUAL=0, **later)
        if segmented:
            first = empty(ways, B, Hk, n_segments, size)
            total = empty(ways, B, Hk, n_segments, {0: 0, 1: 1, 2: D, 3: E}[kind])
            run(*per_state, first, first, total, INIT=False, SAVE=True, **states)
            width = 256
            causal_linear_attention_scan_kernel[(ways * B * Hk, cdiv(size, width))](
                first, total, first if init is None else init, first if final is None else final, n_segments,
                D, E, SIZE=size, DECAY=kind, INIT=init is not None, SAVE=final is not None, BX=width, num_warps=4,
            )  # fmt: skip
        residuals = 2 if residual.numel() else 1 if inverse.numel() else 0
        if both:
            back = rates if first is None else first[1]
            run(*per_state, back, back, rates, INIT=first is not None, SAVE=False, WAYS=1, TILES=True, **states)
        save = final is not None and not segmented
        run(H, group_q, group_k, H // Hg, first if first is not None else rates, final if save else rates, rates,
            OUT=True, INIT=first is not None, SAVE=save, RATE=kind if rate and kind < 2 else 2 if rate else 0,
            RESIDUAL=residuals)  # fmt: skip
    return o, residual, inverse, rates


def _steps_first(decay: torch.Tensor | None, B: int, steps: int) -> torch.Tensor | None:
    """(B, T, Hkv, 1 or D) of a decay (Hkv,), (B, T, Hkv) or (B, T, Hkv, D)."""
    if decay is None:
        return None
    if decay.dim() == 1:
        decay = decay.expand(B, steps, -1)
    return decay.unsqueeze(-1) if decay.dim() == 3 else decay


def causal_linear_attention_fwd(q, k, v, decay, state, final, feature_map, normalize, eps, block, keep):
    """(o, residual, inverse). The last state goes to `final`, which may be `state`; either may be None.

    keep: for a backward, with `normalize`: what rounding took from o, and one over the denominators.
    """
    decay = _steps_first(decay, q.shape[0], q.shape[1] // block)
    maps = (feature_map, feature_map, None)
    return _walk(
        q, k, v, decay=decay, block=block, maps=maps, norm=normalize, eps=eps, keep=keep and normalize, init=state,
        final=final,
    )[:3]  # fmt: skip


def recurrent_fits(D: int, E: int, normalize: bool) -> bool:
    """Whether one program holds a state, or what it holds can be cut."""
    return padded(D) * (padded(E) if normalize else 16) <= RECURRENT_STATE


@functools.lru_cache(1024)
def _recurrent_step(device, dtype, q, k, v, decay, feature_map, normalize, block, init, save) -> Step:
    """The launch for tensors of these (shape, strides), and of decay (shape, strides, dtype) or None."""
    (B, N, H, D), (_, _, kv_heads, E) = q[0], v[0]
    BD, BE = padded(D), padded(E)
    warps = 4 if BD * BE <= 8192 else 8
    if not normalize:
        # columns of the state are independent: more programs, of fewer warps, read it sooner
        BE = min(BE, max(16, 1024 // BD))
        warps = min(warps, 2 if BD * BE <= 1024 else 4)
    kind, decay_strides = 0, (0, 0, 0, 0)
    if decay is not None:
        shape, strides, _ = decay
        kind = 2 if len(shape) == 4 and D > 1 else 1
        decay_strides = {1: (0, 0, *strides, 1), 3: (*strides, 1), 4: strides}[len(shape)]
    return Step(
        causal_linear_attention_recurrent_kernel, (B * kv_heads, cdiv(E, BE)),
        (*q[1], *k[1], *v[1], *decay_strides, N // block, block, kv_heads, H // kv_heads),
        dict(D=D, E=E, BD=BD, BE=BE, MAP=feature_map, DECAY=kind, NORM=normalize, INIT=init, SAVE=save,
             ONE=block == 1 and H == kv_heads),
        num_warps=warps,
    )  # fmt: skip


def causal_linear_attention_recurrent(q, k, v, decay, state, final, feature_map, normalize, eps, block):
    """o, and the state to `final`, which may be `state`; either may be None. One token after the other."""
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        if final is not None and final is not state:
            final.copy_(state) if state is not None else final.zero_()
        return o
    step = _recurrent_step(
        q.device, q.dtype, (q.shape, q.stride()), (k.shape, k.stride()), (v.shape, v.stride()),
        None if decay is None else (decay.shape, decay.stride(), decay.dtype), feature_map, normalize, block,
        state is not None, final is not None,
    )  # fmt: skip
    some = o if state is None else state
    with on_device(q):
        step(q, k, v, q if decay is None else decay, some, some if final is None else final, o, numbers=(eps,))
    return o


def causal_linear_attention_bwd(
    grad, grad_state, q, k, v, decay, state, final, residual, inverse, out, feature_map, normalize, eps, block, rate
):
    """(dq, dk, dv, dg, dstate) from the gradients of o and of the last state, which may be None.

    dg is None unless `rate`, dstate unless there is a `state`. final: the last state, needed with both `rate` and
    `grad_state`. residual, inverse, out: what the forward returned, needed with `normalize`.
    """
    B, N, H, D = q.shape
    kv_heads, E = v.shape[2:]
    group = H // kv_heads
    steps = N // block
    g = _steps_first(decay, B, steps)
    a, b, weigh = None, None, 0
    if normalize:
        a, b, weigh = inverse, _quotient(grad, out, residual, inverse), 1
    common = dict(decay=g, block=block, eps=eps, a=a)
    rate = rate and decay is not None
    per_head = torch.float32 if group > 1 else q.dtype

    S = z = dS = dz = None
    if state is not None:
        S, z = split_state(state, D, E)
    if grad_state is not None:
        # each query head carries a gradient of the state on; the heads of a group add up, so one takes it all
        grad_state = grad_state.float()
        if group > 1:
            grad_state = torch.cat((grad_state.unsqueeze(2), grad_state.new_zeros(B, kv_heads, group - 1, 1).expand(
                -1, -1, -1, grad_state.shape[-1])), 2).flatten(1, 2)  # fmt: skip
        dS, dz = split_state(grad_state, D, E)

    dq, _, _, r = _walk(
        grad, v, k, decay_on="values", maps=(None, None, feature_map), x=q, map_x=feature_map, weigh=weigh, b=b,
        rate=rate, init=None if S is None else _join(_states(S, True), z), **common,
    )  # fmt: skip
    back = dict(flip=True, post=True, **common)
    weigh = 2 if normalize else 0
    first_S = first_tail = None
    if state is not None:
        first_S = torch.empty((B, H, D * E), dtype=torch.float32, device=q.device)
        if normalize:
            first_tail = torch.empty((B, H, E * D + D), dtype=torch.float32, device=q.device)
    dk, _, _, s = _walk(
        v, grad, q, decay_on="values", maps=(None, None, feature_map), x=k, map_x=feature_map, out_dtype=per_head,
        weigh=weigh, b=b, rate=rate, init=None if dS is None else _join(_states(dS, True), dz), final=first_tail,
        **back,
    )  # fmt: skip
    dv, _, _, _ = _walk(
        k, q, grad, maps=(feature_map, feature_map, None), out_dtype=per_head, weigh=weigh,
        init=None if dS is None else _states(dS).contiguous(), final=first_S, **back,
    )  # fmt: skip
    if group > 1:
        dk, dv = (x.unflatten(2, (kv_heads, group)).sum(3).to(q.dtype) for x in (dk, dv))
    dstate = None
    if state is not None:
        dstate = first_S if first_tail is None else torch.cat((first_S, first_tail[..., E * D :]), -1)
        if group > 1:
            dstate = dstate.unflatten(1, (kv_heads, group)).sum(2)
    dg = None
    if rate:
        dg = _decay_gradient(r, s, final, grad_state, D, E, decay, kv_heads, steps)
    return dq, dk, dv, dg, dstate


def _quotient(grad, out, residual, inverse):
    B, N, H, E = out.shape
    b = torch.empty_like(inverse)
    if b.numel() == 0 or E == 0:
        return b.zero_()
    BE = padded(E)
    BN = max(1, 4096 // BE)
    with on_device(out):
        causal_linear_attention_quotient_kernel[(cdiv(N, BN) * B * H,)](
            grad, out, residual, inverse, b, *grad.stride(), N, H, E=E, BE=BE, BN=BN,
            RESIDUAL=2 if residual.numel() else 1, num_warps=4,
        )  # fmt: skip
    return b


def _decay_gradient(r, s, final, grad_state, D, E, decay, kv_heads, steps):
    channels = decay.dim() == 4 and D > 1  # as `_walk` takes them
    if not channels:
        r, s = r.sum(0).unsqueeze(-1), s.sum(0).unsqueeze(-1)  # (B, N, H, 1)
    B, N, H, C = r.shape
    if not channels:
        # small: sums over all tokens of differences, whose size they do not have
        r, s = r.double(), s.double()
    dg = (r - s).reshape(B, steps, N // steps if steps else 1, kv_heads, H // kv_heads, C).sum((2, 4))
    if grad_state is not None:
        if H > kv_heads:
            grad_state = grad_state.unflatten(1, (kv_heads, -1)).sum(2)
        S, z = split_state(final * grad_state, D, E)
        last = S.sum(-1) if z is None else S.sum(-1) + z  # (B, Hkv, D)
        dg = torch.cat((dg[:, :-1], dg[:, -1:] + (last if channels else last.sum(-1, keepdim=True)).unsqueeze(1)), 1)
    dg = dg.flip(1).cumsum(1).flip(1)
    if decay.dim() < 4:
        dg = dg.squeeze(-1)
    if decay.dim() == 1:
        dg = dg.sum((0, 1))
    return dg.to(decay.dtype)
