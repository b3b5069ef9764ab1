"""`diffattn::ray_encoding` as a torch operator, for calls that want no gradient: schema and fake version."""

import torch

from diffattn.kernels._backend import interpreting

torch.library.define(
    "diffattn::ray_encoding",
    "(Tensor x, Tensor matrices, Tensor? cos, Tensor? sin, float scale, bool limit) -> (Tensor y, Tensor growth)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("diffattn::ray_encoding", ("cpu", "cuda"))
def _forward(x, matrices, cos, sin, scale, limit):
    if x.device.type == "cpu" and not interpreting():
        raise RuntimeError(
            "diffattn::ray_encoding got CPU tensors and needs a CUDA device (or TRITON_INTERPRET=1, set before triton "
            "is imported); diffattn.kernels.ray_encoding runs plain torch on a CPU"
        )
    from diffattn.kernels.ray_encoding.triton import ray_encoding_fwd

    return ray_encoding_fwd(x, matrices, cos, sin, scale, limit)


@torch.library.register_fake("diffattn::ray_encoding")
def _(x, matrices, cos, sin, scale, limit):
    return x.new_empty(x.shape), x.new_empty(x.shape[:3] if limit else (0,), dtype=torch.float32)
