"""`diffattn::causal_linear_attention`, its backward and its step in place as torch operators.

States go in and out as flat tensors (B, Hkv, D E + D) or, without a normalizer, (B, Hkv, D E): a graph keeps no state.
"""

import torch

from diffattn.kernels._autograd import refuse_second_derivative
from diffattn.kernels._backend import interpreting

_OPTIONS = "str? feature_map, bool normalize, float eps, int block"
torch.library.define(
    "diffattn::causal_linear_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? state, {_OPTIONS})"
    " -> (Tensor out, Tensor state, Tensor residual, Tensor inverse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "diffattn::causal_linear_attention_backward",
    "(Tensor? grad, Tensor? grad_state, Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? state, Tensor final,"
    f" Tensor residual, Tensor inverse, Tensor out, {_OPTIONS}, bool rate)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor ddecay, Tensor dstate)",
    tags=torch.Tag.pt2_compliant_tag,
)
# For calls that want no gradient; nothing is kept, and no state is made that nobody asked for.
torch.library.define(
    "diffattn::causal_linear_attention_inference",
    f"(Tensor q, Tensor k, Tensor v, Tensor? decay, {_OPTIONS}, bool recurrent) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "diffattn::causal_linear_attention_step",
    f"(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor(a!) state, {_OPTIONS}, bool recurrent) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _launchers(q):
    if q.device.type == "cpu" and not interpreting():
        raise RuntimeError(
            "diffattn::causal_linear_attention got CPU tensors and needs a CUDA device (or TRITON_INTERPRET=1, set "
            "before triton is imported); diffattn.kernels.causal_linear_attention runs plain torch on a CPU"
        )
    from diffattn.kernels.causal_linear_attention import triton

    return triton


def _state_shape(q, v, normalize):
    return v.shape[0], v.shape[2], q.shape[3] * v.shape[3] + (q.shape[3] if normalize else 0)


@torch.library.impl("diffattn::causal_linear_attention", ("cpu", "cuda"))
def _forward(q, k, v, decay, state, feature_map, normalize, eps, block):
    launchers = _launchers(q)
    final = q.new_empty(_state_shape(q, v, normalize), dtype=torch.float32)
    out, residual, inverse = launchers.causal_linear_attention_fwd(
        q, k, v, decay, state, final, feature_map, normalize, eps, block, True
    )
    return out, final, residual, inverse


@torch.library.impl("diffattn::causal_linear_attention_backward", ("cpu", "cuda"))
def _backward(
    grad, grad_state, q, k, v, decay, state, final, residual, inverse, out, feature_map, normalize, eps, block, rate
):
    launchers = _launchers(q)
    if grad is None:
        grad = out.new_zeros(1).expand(out.shape)
    dq, dk, dv, ddecay, dstate = launchers.causal_linear_attention_bwd(
        grad, grad_state, q, k, v, decay, state, final, residual, inverse, out, feature_map, normalize, eps, block,
        rate,
    )  # fmt: skip
    return dq, dk, dv, q.new_empty(0) if ddecay is None else ddecay, q.new_empty(0) if dstate is None else dstate


@torch.library.impl("diffattn::causal_linear_attention_inference", ("cpu", "cuda"))
def _inference(q, k, v, decay, feature_map, normalize, eps, block, recurrent):
    return _run(q, k, v, decay, None, None, feature_map, normalize, eps, block, recurrent)


@torch.library.impl("diffattn::causal_linear_attention_step", ("cpu", "cuda"))
def _step(q, k, v, decay, state, feature_map, normalize, eps, block, recurrent):
    return _run(q, k, v, decay, state, state, feature_map, normalize, eps, block, recurrent)


def _run(q, k, v, decay, state, final, feature_map, normalize, eps, block, recurrent):
    launchers = _launchers(q)
    if recurrent and launchers.recurrent_fits(q.shape[3], v.shape[3], normalize):
        return launchers.causal_linear_attention_recurrent(
            q, k, v, decay, state, final, feature_map, normalize, eps, block
        )
    return launchers.causal_linear_attention_fwd(
        q, k, v, decay, state, final, feature_map, normalize, eps, block, False
    )[0]


@torch.library.register_fake("diffattn::causal_linear_attention")
def _(q, k, v, decay, state, feature_map, normalize, eps, block):
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    final = q.new_empty(_state_shape(q, v, normalize), dtype=torch.float32)
    residual = q.new_empty(out.shape if normalize and q.dtype != torch.float32 else (0,))
    if residual.dim() == 1:
        residual = residual.float()
    return out, final, residual, q.new_empty(q.shape[:3] if normalize else (0,), dtype=torch.float32)


@torch.library.register_fake("diffattn::causal_linear_attention_backward")
def _(
    grad, grad_state, q, k, v, decay, state, final, residual, inverse, out, feature_map, normalize, eps, block, rate
):
    ddecay = decay.new_empty(decay.shape) if rate and decay is not None else q.new_empty(0)
    dstate = q.new_empty(0) if state is None else state.new_empty(state.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ddecay, dstate


@torch.library.register_fake("diffattn::causal_linear_attention_inference")
def _(q, k, v, decay, feature_map, normalize, eps, block, recurrent):
    return q.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.register_fake("diffattn::causal_linear_attention_step")
def _(q, k, v, decay, state, feature_map, normalize, eps, block, recurrent):
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _setup_context(ctx, inputs, output):
    q, k, v, decay, state, *ctx.options = inputs
    out, final, residual, inverse = output
    ctx.save_for_backward(q, k, v, decay, state, final, residual, inverse, out)
    ctx.mark_non_differentiable(residual, inverse)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, grad_state, _, __):
    if grad is None and grad_state is None:
        return (None,) * 9
    rate = ctx.needs_input_grad[3]
    dq, dk, dv, ddecay, dstate = torch.ops.diffattn.causal_linear_attention_backward(
        grad, grad_state, *ctx.saved_tensors, *ctx.options, rate
    )
    dstate = dstate if ctx.needs_input_grad[4] else None
    return dq, dk, dv, ddecay if rate else None, dstate, None, None, None, None


torch.library.register_autograd("diffattn::causal_linear_attention", _autograd, setup_context=_setup_context)
refuse_second_derivative("diffattn::causal_linear_attention")
