"""Derivatives that the kernels do not have: an error or plain torch's, and never silently 0."""

import pytest
import torch

from diffattn.kernels import (
    bidirectional_linear_attention,
    block_sparse_attention,
    causal_linear_attention,
    frame_delta_rule,
    gqa_attention,
    linear_attention,
    linear_attention_outside,
    qk_norm_rope,
    ray_encoding,
)
from diffattn.kernels.block_sparse_attention import top_blocks

B, N, H, D = 1, 20, 2, 8


def functions(device, dtype=torch.float32):
    """name -> a function of q, k and v alone."""
    torch.manual_seed(0)
    decay, beta, kept = -torch.rand(B, N, H), torch.rand(B, N, H), torch.rand(B, 2, H)
    decay, beta, kept, matrices = (x.to(device, dtype) for x in (decay, beta, kept, torch.randn(B, N, 4, 4)))
    blocks = top_blocks(torch.rand(B, H, 2, 2, device=device), 1, 16, 16)
    return {
        "linear": lambda q, k, v: linear_attention(q, k, v, feature_map="elu1"),
        "causal": lambda q, k, v: causal_linear_attention(q, k, v, feature_map="elu1", decay=decay),
        "bidirectional": lambda q, k, v: bidirectional_linear_attention(q, k, v, feature_map="elu1", decay=decay),
        "gqa": lambda q, k, v: gqa_attention(q, k, v),
        "sparse": lambda q, k, v: block_sparse_attention(q, k, v, blocks),
        "outside": lambda q, k, v: linear_attention_outside(q.exp(), k.exp(), v, blocks),
        "delta rule": lambda q, k, v: frame_delta_rule(q, k, v, beta, kept, normalize=False),
        "norm": lambda q, k, v: qk_norm_rope(q, k, norms=((None, 1e-6), (None, 1e-6)))[0] * v,
        "rays": lambda q, k, v: ray_encoding(q, matrices)[0] * v,
    }


def qkv(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, N, H, D, generator=generator).to(device, dtype) for _ in range(3)]


@pytest.mark.parametrize("name", ["linear", "causal", "bidirectional", "gqa", "sparse", "outside"])
def test_second_derivative_is_refused(name, device, triton_backend):
    inputs = [x.requires_grad_() for x in qkv(device)]
    out = functions(device)[name](*inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("name", [*functions("cpu")])
def test_forward_mode(name, device, any_backend):
    q, k, v = qkv(device)
    tangent = qkv(device)[2]

    def derivative():
        return torch.func.jvp(lambda q: functions(device)[name](q, k, v), (q,), (tangent,))[1]

    if any_backend == "triton":
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            derivative()
        return
    actual, step = derivative(), 1e-6
    function = functions(device, torch.float64)[name]
    q, k, v, tangent = (x.double() for x in (q, k, v, tangent))
    expected = (function(q + step * tangent, k, v) - function(q - step * tangent, k, v)) / (2 * step)
    assert expected.norm() > 0.01
    assert (actual - expected).norm() <= 1e-4 * expected.norm()
