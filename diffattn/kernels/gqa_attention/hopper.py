"""When the Hopper kernel runs, and its launch."""

import functools

import torch
import triton

from diffattn.kernels._launch import Step, cdiv, on_device
from diffattn.kernels.gqa_attention.triton import LOG2E, head_block, prob_shift, tma_strides

# The kernel is written in what Triton 3.6 has.
if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from diffattn.kernels.gqa_attention.hopper_kernel import gqa_attention_hopper_fwd_kernel
else:
    gqa_attention_hopper_fwd_kernel = None

# (keys, warpgroups, stages, in turns) by the most features, and the time of 64 rows beside the other's. 227 KB
# of shared memory hold no more; three warpgroups have no registers left for biases or scales.
CONFIGS = {
    64: {(128, 3, 4, False): 0.86, (128, 2, 3, False): 1.0},
    96: {(128, 2, 3, True): 1.0},
    128: {(128, 2, 2, False): 1.0},
    192: {(64, 2, 2, False): 1.0},
}
NO_BIAS, BIAS, INT8 = 0, 1, 2


@functools.cache
def _programs(device) -> int:
    """One for each multiprocessor of a Hopper GPU; 0 on another device."""
    if gqa_attention_hopper_fwd_kernel is None or device.type != "cuda":
        return 0
    if torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def takes(q, k, v, mask, scale, row_scales=None) -> bool:
    """Whether `hopper_fwd` can run this call, and has full tiles to run."""
    return (
        _programs(q.device) > 0
        and scale > 0
        and (mask is None or (row_scales is None and mask.shape[1] == mask.shape[2] == 1))
        and _serves(*(_layout(x) for x in (q, k, v)))
        and (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0
    )


def _layout(x):
    return x.dtype, x.shape, x.stride()


@functools.lru_cache(maxsize=1024)
def _serves(q, k, v) -> bool:
    """By the layouts of the tensors."""
    N, M, D, E = q[1][1], k[1][1], q[1][3], v[1][3]
    if N < 128 or M < 128 or D != E or E > max(CONFIGS):
        return False
    return v[0].itemsize == 2 and all(tma_strides(x[0].itemsize, *x[1:]) for x in (q, k, v))


def _bias(mask, B, M):
    """The mask over keys in log2 units, (B, M) float32, rows 16 bytes apart or a multiple."""
    bias = torch.empty((B, cdiv(M, 4) * 4), dtype=torch.float32, device=mask.device)
    if mask.dtype == torch.bool:
        bias[:, :M] = torch.where(mask[:, 0, 0], 0.0, float("-inf"))
    else:
        # The lowest finite numbers overflow when they change to log2 units; they are not -inf, they stay finite.
        added = mask[:, 0, 0].float()
        bias[:, :M] = torch.where(added == float("-inf"), added, (added * LOG2E).clamp_min(-3.4028234e38))
    return bias


def _config(E, kind, N, heads, programs):
    """The configuration that is done first, with as many tiles as the busiest program takes."""
    configs = next(c for most, c in CONFIGS.items() if E <= most)
    if kind != NO_BIAS:
        return next(c for c in configs if c[1] == 2)
    return min(configs, key=lambda c: cdiv(cdiv(N, 64 * c[1]) * heads, programs) * c[1] * configs[c])


def _pieces(D, least):
    """D as a power of two and a padded rest, which may be 0."""
    first = max(least, 1 << (D.bit_length() - 1))
    return first, max(least, head_block(D - first)) if D > first else 0


def _blocks(shape, stride, dtype, rows, D0, D1):
    """(shape, strides, block, layout) of the descriptor of each piece of the head dim, of one or two."""
    # The stride of an axis of size 1 is never used, but has to be a valid one.
    strides = [16 if n == 1 else s for n, s in zip(shape[:3], stride[:3], strict=True)] + [1]
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}[dtype]
    blocks = [[1, rows, 1, width] for width in (D0, D1) if width]
    return [(list(shape), strides, b, gl.NVMMASharedLayout.get_default_for(b, dtype)) for b in blocks]


@functools.lru_cache(maxsize=1024)
def _plan(device, q, k, v, kind, config):
    """(the launch, for q, k, v and the output the blocks of their descriptors, keys a block), by layouts."""
    B, N, H, _ = q[1]
    M, Hkv, E = v[1][1:]
    D0, D1 = _pieces(E, 32 if kind == INT8 else 16)
    keys, groups, stages, turns = config or _config(E, kind, N, B * H, _programs(device))
    out = v[0], (B, N, H, E), (N * H * E, H * E, E, 1)
    blocks = [
        _blocks(shape, stride, dtype, rows, D0, D1)
        for (dtype, shape, stride), rows in ((q, 64), (k, keys), (v, keys), (out, 64))
    ]
    tiles = cdiv(N, 64 * groups) * B * H
    step = Step(
        gqa_attention_hopper_fwd_kernel, (min(_programs(device), tiles),), (N, M, H, H // Hkv, tiles),
        dict(D0=D0, D1=D1, BM=keys, NC=groups, STAGES=stages, SHIFT=prob_shift(v[0]), PINGPONG=turns, KEYS=kind),
        num_warps=4,
    )  # fmt: skip
    return step, blocks, keys


def hopper_fwd(q, k, v, mask, scale, row_scales=None, config=None):
    """Launch the kernel on what it `takes`.

    Args: as `gqa_attention_fwd`; with row_scales, q and k are int8 and there is no mask. config: one of `CONFIGS`.
    Returns: (B, N, H, E) in the dtype of v.
    """
    B, M, Hkv, E = v.shape
    out = v.new_empty(*q.shape[:3], E)
    kind, p_q_scale, p_keys = NO_BIAS, out, out
    if row_scales is not None:
        kind, (p_q_scale, p_keys), heads = INT8, row_scales, B * Hkv
    elif mask is not None:
        kind, p_keys, heads = BIAS, _bias(mask, B, M), B
    step, blocks, keys = _plan(v.device, *(_layout(x) for x in (q, k, v)), kind, config)
    if kind != NO_BIAS:
        layout = gl.NVMMASharedLayout(0, 32, rank=2)
        p_keys = TensorDescriptor(p_keys, [heads, M], [p_keys.shape[-1], 1], [1, keys], layout)
    described = []
    for x, pieces in zip((q, k, v, out), blocks, strict=True):
        described += (2 * [TensorDescriptor(x, *piece) for piece in pieces])[:2]
    scale = 1.0 if row_scales is not None else scale * LOG2E
    with on_device(v):
        step.launch_aligned(*described, p_q_scale, p_keys, numbers=(scale,))
    return out
