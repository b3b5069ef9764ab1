"""Linear attention with decay in both directions, for images: a causal scan each way."""

import torch
from torch import Tensor

from diffattn.kernels._autograd import refuse_second_derivative
from diffattn.kernels._backend import use_triton
from diffattn.kernels._checks import check_qkv
from diffattn.kernels.causal_linear_attention.ops import _launchers
from diffattn.kernels.causal_linear_attention.reference import _map, causal_linear_attention_reference
from diffattn.kernels.linear_attention import linear_attention

_OPTIONS = "str? feature_map, bool normalize, float eps, int block"
torch.library.define(
    "diffattn::bidirectional_linear_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? decay, {_OPTIONS}, bool keep)"
    " -> (Tensor out, Tensor residual, Tensor inverse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "diffattn::bidirectional_linear_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor residual, Tensor inverse, Tensor out,"
    f" {_OPTIONS}, bool rate) -> (Tensor dq, Tensor dk, Tensor dv, Tensor ddecay)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("diffattn::bidirectional_linear_attention", ("cpu", "cuda"))
def _forward(q, k, v, decay, feature_map, normalize, eps, block, keep):
    _launchers(q)
    from diffattn.kernels.causal_linear_attention.triton_bidirectional import bidirectional_linear_attention_fwd

    return bidirectional_linear_attention_fwd(q, k, v, decay, feature_map, normalize, eps, block, keep)


@torch.library.impl("diffattn::bidirectional_linear_attention_backward", ("cpu", "cuda"))
def _backward(grad, q, k, v, decay, residual, inverse, out, feature_map, normalize, eps, block, rate):
    _launchers(q)
    from diffattn.kernels.causal_linear_attention.triton_bidirectional import bidirectional_linear_attention_bwd

    dq, dk, dv, ddecay = bidirectional_linear_attention_bwd(
        grad, q, k, v, decay, residual, inverse, out, feature_map, normalize, eps, block, rate
    )
    return dq, dk, dv, q.new_empty(0) if ddecay is None else ddecay


@torch.library.register_fake("diffattn::bidirectional_linear_attention")
def _(q, k, v, decay, feature_map, normalize, eps, block, keep):
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    kept = keep and q.dtype != torch.float32
    residual = q.new_empty(out.shape) if kept else q.new_empty(0, dtype=torch.float32)
    inverse = q.new_empty(q.shape[:3] if keep and normalize else (0,), dtype=torch.float32)
    return out, residual, inverse


@torch.library.register_fake("diffattn::bidirectional_linear_attention_backward")
def _(grad, q, k, v, decay, residual, inverse, out, feature_map, normalize, eps, block, rate):
    ddecay = decay.new_empty(decay.shape) if rate and decay is not None else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ddecay


def _setup_context(ctx, inputs, output):
    q, k, v, decay, *options, _ = inputs
    out, residual, inverse = output
    ctx.options = options
    ctx.save_for_backward(q, k, v, decay, residual, inverse, out)
    ctx.mark_non_differentiable(residual, inverse)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    rate = ctx.needs_input_grad[3]
    dq, dk, dv, ddecay = torch.ops.diffattn.bidirectional_linear_attention_backward(
        grad, *ctx.saved_tensors, *ctx.options, rate
    )
    return dq, dk, dv, ddecay if rate else None, *(None,) * 5


torch.library.register_autograd("diffattn::bidirectional_linear_attention", _autograd, setup_context=_setup_context)
refuse_second_derivative("diffattn::bidirectional_linear_attention")


def bidirectional_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | None = None,
    normalize: bool = True,
    decay: Tensor | None = None,
    block: int = 1,
    eps: float = 1e-15,
) -> Tensor:
    """Linear attention with decay to both sides: causal linear attention, and the same on the tokens in reverse order.

    o_n = sum_m w_nm (phi(q_n) . phi(k_m)) v_m / (sum_m w_nm phi(q_n) . phi(k_m) + eps)

    w_nm is exp of the sum of g over the steps after m's up to n's where m comes first, and over the steps from n's to
    the one before m's where n does, which is what a scan of the reversed tokens gives; tokens of one step, n itself
    among them, count once, with weight 1. Without decay and with a denominator it is `linear_attention`.

    Arguments, dtypes and errors as in `causal_linear_attention`; there is no state.
    Returns: (B, N, H, E) in the dtype of q.
    """
    from diffattn.kernels.causal_linear_attention import _check_decay, _check_options, kernels_fit

    check_qkv(q, k, v)
    _check_options(q, k, feature_map, "auto", block, eps)
    if decay is not None:
        _check_decay(q, k, decay, block)
    elif normalize:
        return linear_attention(q, k, v, feature_map=feature_map, eps=eps)
    if kernels_fit(q, v, decay, block) and use_triton(q):
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, decay))
        return torch.ops.diffattn.bidirectional_linear_attention(
            q, k, v, decay, feature_map, normalize, float(eps), block, keep
        )[0]
    return bidirectional_linear_attention_reference(
        q, k, v, feature_map=feature_map, normalize=normalize, decay=decay, block=block, eps=eps
    )


def bidirectional_linear_attention_reference(q, k, v, *, feature_map, normalize, decay, block, eps):
    """Numerator and denominator, as columns of one product, of both scans, less what both count."""
    dtype = q.dtype
    if dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    q, k = _map(q, feature_map), _map(k, feature_map)
    if normalize:
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)

    def scan(q, k, v, decay):
        return causal_linear_attention_reference(q, k, v, normalize=False, decay=decay, block=block)[0]

    # one frame alone has no past
    B, N, H, _ = q.shape
    frames = (q, k, v) if N == 0 else (x.reshape(B * (N // block), block, *x.shape[2:]) for x in (q, k, v))
    q1, k1, v1 = frames
    own = causal_linear_attention_reference(q1, k1, v1, normalize=False, block=block)[0].reshape(B, N, H, v.shape[3])
    reverse = decay if decay is None or decay.dim() == 1 else decay.flip(1)
    o = scan(q, k, v, decay) + (scan(q.flip(1), k.flip(1), v.flip(1), reverse).flip(1) - own)
    if normalize:
        o = o[..., :-1] / (o[..., -1:] + eps)
    return o.to(dtype)
