"""`diffattn::linear_attention` and its backward as torch operators: schemas, fake versions, autograd."""

import torch

from diffattn.kernels._autograd import refuse_second_derivative
from diffattn.kernels._backend import interpreting

torch.library.define(
    "diffattn::linear_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, str? feature_map, str normalizer, float eps)"
    " -> (Tensor out, Tensor state)",
    tags=torch.Tag.pt2_compliant_tag,
)
# For calls that want no gradient: no state to keep, and one pass through Python less.
torch.library.define(
    "diffattn::linear_attention_inference",
    "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, str? feature_map, str normalizer, float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "diffattn::linear_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor state,"
    " str? feature_map, str normalizer, float eps) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _check_device(q):
    if q.device.type == "cpu" and not interpreting():
        raise RuntimeError(
            "diffattn::linear_attention got CPU tensors and needs a CUDA device (or TRITON_INTERPRET=1, set before "
            "triton is imported); diffattn.kernels.linear_attention runs plain torch on a CPU"
        )


def _summed_eps(eps, normalizer, k):
    """The eps that goes with z as a sum; for "mean" numerator and denominator both are multiplied by M."""
    return eps * k.shape[1] if normalizer == "mean" else eps


@torch.library.impl("diffattn::linear_attention", ("cpu", "cuda"))
def _forward(q, k, v, cos, sin, feature_map, normalizer, eps):
    _check_device(q)
    from diffattn.kernels.linear_attention.triton import linear_attention_fwd

    return linear_attention_fwd(q, k, v, cos, sin, feature_map, _summed_eps(eps, normalizer, k))


@torch.library.impl("diffattn::linear_attention_inference", ("cpu", "cuda"))
def _inference(q, k, v, cos, sin, feature_map, normalizer, eps):
    _check_device(q)
    from diffattn.kernels.linear_attention.triton import linear_attention_inference

    return linear_attention_inference(q, k, v, cos, sin, feature_map, _summed_eps(eps, normalizer, k))


@torch.library.impl("diffattn::linear_attention_backward", ("cpu", "cuda"))
def _backward(grad, q, k, v, cos, sin, state, feature_map, normalizer, eps):
    _check_device(q)
    from diffattn.kernels.linear_attention.triton import linear_attention_bwd

    return linear_attention_bwd(grad, q, k, v, cos, sin, state, feature_map, _summed_eps(eps, normalizer, k))


@torch.library.register_fake("diffattn::linear_attention")
def _(q, k, v, cos, sin, feature_map, normalizer, eps):
    D, E = q.shape[3], v.shape[3]
    out = q.new_empty((*q.shape[:3], E))
    state = q.new_empty((k.shape[0], k.shape[2], D * E + D), dtype=torch.float32)
    return out, state


@torch.library.register_fake("diffattn::linear_attention_inference")
def _(q, k, v, cos, sin, feature_map, normalizer, eps):
    return q.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.register_fake("diffattn::linear_attention_backward")
def _(grad, q, k, v, cos, sin, state, feature_map, normalizer, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, cos, sin, *ctx.options = inputs
    state = output[1]
    ctx.save_for_backward(q, k, v, cos, sin, state)
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    return (*torch.ops.diffattn.linear_attention_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 5)


torch.library.register_autograd("diffattn::linear_attention", _autograd, setup_context=_setup_context)
refuse_second_derivative("diffattn::linear_attention")
