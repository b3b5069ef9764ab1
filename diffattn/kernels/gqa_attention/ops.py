"""The operators `diffattn::gqa_attention`, `_inference`, `_int8` and `_backward`: schemas, fakes, autograd.

They take a mask of 4 axes, each 1 or the full size, and their checks are the public function's.
"""

import torch

from diffattn.kernels import _backend
from diffattn.kernels._autograd import refuse_second_derivative

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

torch.library.define(
    "diffattn::gqa_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool training) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
# For calls that want no gradient: an autograd formula costs every call one more pass through Python, about 8 us.
torch.library.define(
    "diffattn::gqa_attention_inference",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "diffattn::gqa_attention_int8",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "diffattn::gqa_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor stats, Tensor residual, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _check_device(q):
    if q.device.type == "cpu" and not _backend.interpreting():
        raise RuntimeError("diffattn::gqa_attention: the kernels need a CUDA device, and q is on the CPU")


@torch.library.impl("diffattn::gqa_attention", ("cpu", "cuda"))
def _forward(q, k, v, mask, scale, training):
    _check_device(q)
    from diffattn.kernels.gqa_attention.triton_fwd import gqa_attention_fwd

    out, stats, residual = gqa_attention_fwd(q, k, v, mask, scale, training)
    # An operator returns tensors, not None.
    stats = q.new_empty((0,), dtype=torch.float32) if stats is None else stats
    return out, stats, q.new_empty((0,)) if residual is None else residual


@torch.library.register_fake("diffattn::gqa_attention")
def _(q, k, v, mask, scale, training):
    B, N, H, _ = q.shape
    out = q.new_empty(B, N, H, v.shape[-1])
    stats = q.new_empty((2, B, H, N) if training else (0,), dtype=torch.float32)
    residual = torch.empty_like(out) if training and q.dtype.itemsize < 4 else q.new_empty((0,))
    return out, stats, residual


@torch.library.impl("diffattn::gqa_attention_inference", ("cpu", "cuda"))
def _inference(q, k, v, mask, scale):
    _check_device(q)
    from diffattn.kernels.gqa_attention.triton_fwd import gqa_attention_fwd

    return gqa_attention_fwd(q, k, v, mask, scale, training=False)[0]


@torch.library.register_fake("diffattn::gqa_attention_inference")
def _(q, k, v, mask, scale):
    return q.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.impl("diffattn::gqa_attention_int8", ("cpu", "cuda"))
def _int8(q, k, v, mask, scale):
    _check_device(q)
    from diffattn.kernels.gqa_attention.triton_int8 import gqa_attention_int8_fwd

    return gqa_attention_int8_fwd(q, k, v, mask, scale)


@torch.library.register_fake("diffattn::gqa_attention_int8")
def _(q, k, v, mask, scale):
    return q.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.impl("diffattn::gqa_attention_backward", ("cpu", "cuda"))
def _backward(grad, q, k, v, mask, out, stats, residual, scale):
    _check_device(q)
    from diffattn.kernels.gqa_attention.triton_bwd import gqa_attention_bwd

    return gqa_attention_bwd(grad, q, k, v, mask, out, stats, residual, scale)


@torch.library.register_fake("diffattn::gqa_attention_backward")
def _(grad, q, k, v, mask, out, stats, residual, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, mask, ctx.scale, ctx.training = inputs
    out, stats, residual = output
    if ctx.needs_input_grad[3]:
        raise RuntimeError("diffattn::gqa_attention has no gradient for mask; diffattn.kernels.gqa_attention has")
    ctx.mark_non_differentiable(stats, residual)
    ctx.save_for_backward(q, k, v, mask, out, stats, residual)


def _autograd_backward(ctx, grad, _stats, _residual):
    q, k, v, mask, out, stats, residual = ctx.saved_tensors
    if not ctx.training:
        # What the backward needs was not asked for: make it now.
        out, stats, residual = torch.ops.diffattn.gqa_attention(q, k, v, mask, ctx.scale, True)
    grads = torch.ops.diffattn.gqa_attention_backward(grad, q, k, v, mask, out, stats, residual, ctx.scale)
    return *grads, None, None, None


torch.library.register_autograd("diffattn::gqa_attention", _autograd_backward, setup_context=_setup_context)

refuse_second_derivative("diffattn::gqa_attention")
