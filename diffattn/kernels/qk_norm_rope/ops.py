"""The operator `diffattn::qk_norm_rope`: its schema and fake. It has no autograd and leaves checks to its caller.

An entry without norm has no eps, one without rotation no cos and sin.
"""

import torch

from diffattn.kernels import _backend

torch.library.define(
    "diffattn::qk_norm_rope",
    "(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, float? q_eps, float? k_eps, Tensor? q_cos,"
    " Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, bool q_halves, bool k_halves, bool across_heads) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("diffattn::qk_norm_rope", ("cpu", "cuda"))
def _forward(q, *arguments):
    if q.device.type == "cpu" and not _backend.interpreting():
        raise RuntimeError("diffattn::qk_norm_rope: the kernel needs a CUDA device, and q is on the CPU")
    from diffattn.kernels.qk_norm_rope.triton import qk_norm_rope_fwd

    return qk_norm_rope_fwd(q, *arguments)


@torch.library.register_fake("diffattn::qk_norm_rope")
def _(q, k, *_):
    return [x.new_empty(x.shape) for x in (q, k) if x is not None]
