"""The sections about softmax attention, and about the norm and rotation that go before it."""

import functools
import inspect

import cases
import peers
import torch
from candidates import INT8_LIMIT, OURS_LIMIT, Candidate, Section, compiled, eager, ours, rand, relative
from timing import digits
from torch.nn.attention import SDPBackend

from diffattn import config, kernels
from diffattn.kernels import gqa_attention
from diffattn.kernels.gqa_attention.reference import gqa_attention_reference


class SoftmaxSection(Section):
    """Forward of grouped-query attention; the ceiling is the rate of a bfloat16 product."""

    def inputs(self, case: cases.Softmax):
        q = rand(case.B, case.N, case.H, case.D, seed=0)
        return q, *(rand(case.B, case.M, case.Hkv, case.D, seed=seed) for seed in (1, 2))

    def candidates(self, case):
        flash, cudnn, efficient = (
            getattr(SDPBackend, f"{name}_ATTENTION") for name in ("FLASH", "CUDNN", "EFFICIENT")
        )
        found = {"ours": ours(gqa_attention), "ours, Triton": ours(forced_triton)}
        if "precision" in inspect.signature(gqa_attention).parameters:
            low = ours(functools.partial(gqa_attention, precision="int8"))
            low.limit, low.low_precision = INT8_LIMIT, True
            found["ours, int8"] = low
        return found | {
            "flash": eager(peers.sdpa(flash)),
            "cuDNN": eager(peers.sdpa(cudnn)),
            "efficient": eager(peers.sdpa(efficient)),
            "flash, heads repeated": eager(peers.sdpa(flash, repeat=True)),
            "cuDNN, heads repeated": eager(peers.sdpa(cudnn, repeat=True)),
            "flex, compiled": compiled(peers.flex),
            # a copy of k for itself alone: it changes k
            "SageAttention 1, int8": Candidate(lambda q, k, v: (peers.sage, (q, k.clone(), v)), low_precision=True),
        }

    def error(self, case, function, tensors, qkv, options):
        """Over 256 queries of the first and the last head."""
        q, k, v = qkv
        rows = torch.linspace(0, case.N - 1, min(case.N, 256), device="cuda").long()
        heads, kv_heads = [0, case.H - 1], [0, case.Hkv - 1]
        out = function(*tensors)[:1, rows][:, :, heads]
        k, v = (x[:1, :, kv_heads].double() for x in (k, v))
        return relative(out, gqa_attention_reference(q[:1, rows][:, :, heads].double(), k, v, None, case.D**-0.5))

    def measured(self, case, milliseconds, peak, ceiling):
        rate = case.flops / milliseconds / 1e9
        return {
            "tflop_s": digits(rate),
            "of_matmul": digits(rate / ceiling["matmul_tflop_s"], 3),
            "peak_mb": digits(peak / 1e6),
        }

    def floor_ms(self, case, ceiling):
        return digits(case.flops / ceiling["matmul_tflop_s"] / 1e9)


def forced_triton(q, k, v):
    before, config.backend = config.backend, "triton"
    try:
        return gqa_attention(q, k, v)
    finally:
        config.backend = before


# ---- RMS norm and rotary embedding ----


class NormRopeSection(Section):
    """The floor is q and k read once and written once; the rotation's tables are left out of it."""

    def inputs(self, case: cases.NormRope):
        return tuple(rand(case.B, case.N, heads, case.D, seed=i) for i, heads in enumerate((case.H, case.Hkv)))

    def candidates(self, case):
        stock = peers.StockNormRope(case, "cuda")

        def fused(q, k):
            if not hasattr(kernels, "qk_norm_rope"):
                raise NotImplementedError("diffattn.kernels has no qk_norm_rope")
            return functools.partial(kernels.qk_norm_rope, **stock.ours()), (q, k)

        options = {"stock": stock}
        return {
            "ours": Candidate(fused, options, OURS_LIMIT, ours=True),
            "diffusers', eager": Candidate(lambda q, k: (stock, (q, k)), options),
            "diffusers', compiled": Candidate(
                lambda q, k: (torch.compile(stock, fullgraph=True, dynamic=False), (q, k)), options
            ),
        }

    def error(self, case, function, tensors, qk, options):
        from diffattn.kernels.qk_norm_rope.reference import Rotary, norm_rope_reference

        given = options["stock"].ours()
        errors = []
        for i, (out, x) in enumerate(zip(function(*tensors), qk, strict=True)):
            norm, rotary = (None if pair is None else pair[i] for pair in (given["norms"], given["rotate"]))
            rotary = None if rotary is None else Rotary(*rotary)
            errors.append(relative(out[:1], norm_rope_reference(x[:1].double(), norm, rotary, given["across_heads"])))
        return max(errors)

    def measured(self, case, milliseconds, peak, ceiling):
        rate = 4 * case.elements / milliseconds / 1e6
        return {
            "gb_s": digits(rate),
            "of_floor": digits(ceiling["copy_gb_s"] / rate, 3),
            "peak_mb": digits(peak / 1e6),
        }

    def floor_ms(self, case, ceiling):
        return digits(4 * case.elements / ceiling["copy_gb_s"] / 1e6)
