"""The operators `diffattn::block_sparse_attention` and `diffattn::block_sparse_sum`: schemas, fakes, autograd.

Lists of blocks come as the fields of `Blocks`; the checks are the public functions'.
"""

import torch

from diffattn.kernels import _backend
from diffattn.kernels._autograd import refuse_second_derivative
from diffattn.kernels.block_sparse_attention.blocks import Blocks

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_QKV = "Tensor q, Tensor k, Tensor v, "
_LISTS = "Tensor index, Tensor full, Tensor count, int rows, int keys, "
_CHECKS = "Tensor? q_places, Tensor? k_places, Tensor? bias, "

torch.library.define(
    "diffattn::block_sparse_attention",
    f"({_QKV}{_LISTS}{_CHECKS}float scale, bool training) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "diffattn::block_sparse_attention_backward",
    f"(Tensor grad, {_QKV}{_LISTS}{_CHECKS}Tensor out, Tensor stats, Tensor residual, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define("diffattn::block_sparse_sum", f"({_QKV}{_LISTS}float scale) -> (Tensor, Tensor)", tags=_TAGS)
torch.library.define(
    "diffattn::block_sparse_sum_backward",
    f"(Tensor grad, Tensor grad_total, {_QKV}{_LISTS}float scale) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _check_device(q):
    if q.device.type == "cpu" and not _backend.interpreting():
        raise RuntimeError("diffattn::block_sparse_attention: the kernels need a CUDA device, and q is on the CPU")


@torch.library.impl("diffattn::block_sparse_attention", ("cpu", "cuda"))
def _forward(q, k, v, index, full, count, rows, keys, q_places, k_places, bias, scale, training):
    _check_device(q)
    from diffattn.kernels.block_sparse_attention.triton_fwd import block_sparse_attention_fwd

    blocks = Blocks(index, full, count, rows, keys)
    out, stats, residual = block_sparse_attention_fwd(q, k, v, blocks, q_places, k_places, bias, scale, training)
    # An operator returns tensors, not None.
    stats = q.new_empty((0,), dtype=torch.float32) if stats is None else stats
    return out, stats, q.new_empty((0,)) if residual is None else residual


@torch.library.register_fake("diffattn::block_sparse_attention")
def _(q, k, v, index, full, count, rows, keys, q_places, k_places, bias, scale, training):
    B, N, H, _ = q.shape
    out = q.new_empty(B, N, H, v.shape[-1])
    stats = q.new_empty((2, B, H, N) if training else (0,), dtype=torch.float32)
    residual = torch.empty_like(out) if training and q.dtype.itemsize < 4 else q.new_empty((0,))
    return out, stats, residual


@torch.library.impl("diffattn::block_sparse_attention_backward", ("cpu", "cuda"))
def _backward(grad, q, k, v, index, full, count, rows, keys, q_places, k_places, bias, out, stats, residual, scale):
    _check_device(q)
    from diffattn.kernels.block_sparse_attention.triton_bwd import block_sparse_attention_bwd

    blocks = Blocks(index, full, count, rows, keys)
    return block_sparse_attention_bwd(grad, q, k, v, blocks, q_places, k_places, bias, out, stats, residual, scale)


@torch.library.register_fake("diffattn::block_sparse_attention_backward")
def _(grad, q, k, v, index, full, count, rows, keys, q_places, k_places, bias, out, stats, residual, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@torch.library.impl("diffattn::block_sparse_sum", ("cpu", "cuda"))
def _sum(q, k, v, index, full, count, rows, keys, scale):
    _check_device(q)
    from diffattn.kernels.block_sparse_attention.triton_fwd import block_sparse_sum_fwd

    return block_sparse_sum_fwd(q, k, v, Blocks(index, full, count, rows, keys), scale)


@torch.library.register_fake("diffattn::block_sparse_sum")
def _(q, k, v, index, full, count, rows, keys, scale):
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl("diffattn::block_sparse_sum_backward", ("cpu", "cuda"))
def _sum_backward(grad, grad_total, q, k, v, index, full, count, rows, keys, scale):
    _check_device(q)
    from diffattn.kernels.block_sparse_attention.triton_bwd import block_sparse_sum_bwd

    return block_sparse_sum_bwd(grad, grad_total, q, k, v, Blocks(index, full, count, rows, keys), scale)


@torch.library.register_fake("diffattn::block_sparse_sum_backward")
def _(grad, grad_total, q, k, v, index, full, count, rows, keys, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.rows, ctx.keys, q_places, k_places, bias, ctx.scale, ctx.training = inputs
    out, stats, residual = output
    if any(ctx.needs_input_grad[8:11]):
        raise RuntimeError("diffattn::block_sparse_attention has no gradient for places or bias")
    ctx.mark_non_differentiable(stats, residual)
    ctx.save_for_backward(*tensors, q_places, k_places, bias, out, stats, residual)


def _autograd_backward(ctx, grad, _stats, _residual):
    *tensors, q_places, k_places, bias, out, stats, residual = ctx.saved_tensors
    arguments = (*tensors, ctx.rows, ctx.keys, q_places, k_places, bias)
    if not ctx.training:
        # What the backward needs was not asked for: make it now.
        out, stats, residual = torch.ops.diffattn.block_sparse_attention(*arguments, ctx.scale, True)
    grads = torch.ops.diffattn.block_sparse_attention_backward(grad, *arguments, out, stats, residual, ctx.scale)
    return *grads, *(None,) * 10


torch.library.register_autograd("diffattn::block_sparse_attention", _autograd_backward, setup_context=_setup_context)


def _sum_setup_context(ctx, inputs, output):
    *tensors, ctx.rows, ctx.keys, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _sum_autograd_backward(ctx, grad, grad_total):
    arguments = (*ctx.saved_tensors, ctx.rows, ctx.keys, ctx.scale)
    return *torch.ops.diffattn.block_sparse_sum_backward(grad, grad_total, *arguments), *(None,) * 6


torch.library.register_autograd("diffattn::block_sparse_sum", _sum_autograd_backward, setup_context=_sum_setup_context)

for _name in ("diffattn::block_sparse_attention", "diffattn::block_sparse_sum"):
    refuse_second_derivative(
        _name, "diffattn.kernels.block_sparse_attention.reference has the same functions with one"
    )
