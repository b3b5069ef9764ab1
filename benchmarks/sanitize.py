"""Every kernel once at odd sizes, for compute-sanitizer; and many times, to see the same bits.

    python benchmarks/sanitize.py --repeat 100
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py
    TRITON_INSTRUMENTATION_MODE=consan python benchmarks/sanitize.py --only "gqa_attention D64"

PyTorch's own pool of memory would hide from memcheck what is read or written past a tensor's end. The last is Triton's
check of what barriers order, for the kernel in Gluon, which racecheck cannot follow. Exits with 1 if a repetition
differs.
"""

import argparse
import fnmatch
import functools
from collections.abc import Callable, Iterator

import torch
import triton

from diffattn import config
from diffattn.cores import Rotary
from diffattn.kernels import (
    block_sparse_attention,
    gqa_attention,
    linear_attention,
    linear_attention_outside,
    qk_norm_rope,
    window_attention,
)
from diffattn.kernels.block_sparse_attention import blocks_of_layout


def rand(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def angles(N: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(N, pairs, device="cuda")
    return x.cos(), x.sin()


def with_gradients(function: Callable, *tensors: torch.Tensor, **options) -> Callable[[], tuple]:
    tensors = [x.requires_grad_() for x in tensors]

    @torch.enable_grad()
    def run():
        out = function(*tensors, **options)
        return out.detach(), *torch.autograd.grad(out, tensors, out.detach().cos())

    return run


def calls() -> Iterator[tuple[str, Callable]]:
    for D, E, dtype in ((32, 32, torch.bfloat16), (40, 40, torch.bfloat16), (65, 20, torch.float16)):
        for feature_map in ("relu", "elu1", "softmax"):
            q, k, v = rand(2, 333, 4, D, dtype=dtype), rand(2, 301, 4, D, dtype=dtype), rand(2, 301, 4, E, dtype=dtype)
            name = f"linear_attention {feature_map} D{D} E{E} {dtype}"
            yield name, lambda q=q, k=k, v=v, f=feature_map: (linear_attention(q, k, v, feature_map=f),)
            yield f"{name}, gradients", with_gradients(linear_attention, q, k, v, feature_map=feature_map)
    q, k, v = rand(1, 333, 4, 112), rand(1, 333, 2, 112), rand(1, 333, 2, 112)
    rotary = angles(333, 56)
    yield "linear_attention rotary D112, gradients", with_gradients(linear_attention, q, k, v, rotary=rotary)
    q, k, v = rand(2, 1999, 4, 128), rand(2, 2001, 4, 128), rand(2, 2001, 4, 128)
    yield "linear_attention elu1 D128, gradients", with_gradients(linear_attention, q, k, v, feature_map="elu1")
    q, k, v = rand(2, 3001, 6, 32), rand(2, 3001, 6, 32), rand(2, 3001, 6, 32)
    yield "linear_attention, packed heads", lambda q=q, k=k, v=v: (linear_attention(q, k, v),)

    for D in (64, 96, 20):
        q, k, v = rand(2, 301, 6, D), rand(2, 333, 2, D), rand(2, 333, 2, D)
        keys = torch.rand(2, 1, 1, 333, device="cuda") > 0.3
        rows = torch.randn(1, 6, 301, 333, device="cuda")
        for title, mask in (("", None), (" mask over keys", keys), (" mask", rows)):
            yield f"gqa_attention D{D}{title}", lambda q=q, k=k, v=v, m=mask: (gqa_attention(q, k, v, mask=m),)
        yield f"gqa_attention D{D}, gradients", with_gradients(gqa_attention, q, k, v, mask=keys)
        q, k, v = (x.detach() for x in (q, k, v))
        int8 = functools.partial(gqa_attention, precision="int8")
        yield f"gqa_attention int8 D{D}", lambda q=q, k=k, v=v, f=int8: (f(q, k, v),)
    for D, rows, keys in ((64, 128, 64), (128, 64, 64), (40, 16, 32)):
        q, k, v = rand(2, 301, 6, D), rand(2, 333, 2, D), rand(2, 333, 2, D)
        layout = torch.rand(2, 6, -(-301 // rows), -(-333 // keys), device="cuda") > 0.5
        lists = {"blocks": blocks_of_layout(layout, rows, keys)}
        name = f"D{D} {rows} x {keys}, gradients"
        yield f"block_sparse_attention {name}", with_gradients(block_sparse_attention, q, k, v, **lists)
        outside = functools.partial(linear_attention_outside, **lists)
        q, k = q.detach().float().softmax(-1).bfloat16(), k.detach().float().softmax(-1).bfloat16()
        yield f"linear_attention_outside {name}", with_gradients(outside, q, k, v.detach())
    q, k, v = (rand(2, 333, 2, 96) for _ in range(3))
    window = functools.partial(window_attention, radius=4.5, grid=(17, 19), text=(7, 3))
    yield "window_attention D96, gradients", with_gradients(window, q, k, v)
    q, k = rand(2, 301, 6, 96), rand(2, 301, 2, 96)
    weight = rand(96)
    for interleaved in (True, False):
        rotary = Rotary(*angles(301, 48), interleaved)
        norms = ((weight, 1e-6), (weight, 1e-6))
        yield (
            f"qk_norm_rope interleaved={interleaved}",
            lambda n=norms, r=rotary: qk_norm_rope(q, k, norms=n, rotate=(r, r)),
        )


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", default="*", help="glob over the names of the calls")
    args = parser.parse_args()
    torch.manual_seed(0)
    config.backend = "triton"
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    different = 0
    for name, run in calls():
        if not fnmatch.fnmatch(name, args.only):
            continue
        first = run()
        same = all(all(map(torch.equal, first, run())) for _ in range(args.repeat - 1))
        torch.cuda.synchronize()
        different += not same
        print(f"{'same' if same else 'DIFFERENT'}  {name}", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
