"""`diffattn::frame_delta_rule` as a torch operator, for calls that want no gradient: schema and fake version."""

import torch

from diffattn.kernels._backend import interpreting

torch.library.define(
    "diffattn::frame_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor kept, Tensor? cos, Tensor? sin, bool normalize, float scale,"
    " float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("diffattn::frame_delta_rule", ("cpu", "cuda"))
def _forward(q, k, v, beta, kept, cos, sin, normalize, scale, eps):
    if q.device.type == "cpu" and not interpreting():
        raise RuntimeError(
            "diffattn::frame_delta_rule got CPU tensors and needs a CUDA device (or TRITON_INTERPRET=1, set before "
            "triton is imported); diffattn.kernels.frame_delta_rule runs plain torch on a CPU"
        )
    from diffattn.kernels.frame_delta_rule.triton import frame_delta_rule_fwd

    return frame_delta_rule_fwd(q, k, v, beta, kept, cos, sin, normalize, scale, eps)


@torch.library.register_fake("diffattn::frame_delta_rule")
def _(q, k, v, beta, kept, cos, sin, normalize, scale, eps):
    return q.new_empty((*q.shape[:3], v.shape[3]))
