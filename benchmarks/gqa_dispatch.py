"""Which attention `gqa_attention` should run for which call: torch's own kernels beside the Triton ones.

    python benchmarks/gqa_dispatch.py --out benchmarks/results/<gpu>

Times every candidate on the same tensors, and says for each shape which one `DIFFATTN_BACKEND=auto` takes and how
its time compares with the best. A candidate that cannot run is an entry with its reason. Takes about a minute,
most of it compilation; cases that would start after --seconds are left out, and listed. Writes gqa_dispatch.json.
"""

import argparse
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from report import environment, write_json
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffattn import config
from diffattn.kernels import gqa_attention
from diffattn.kernels.gqa_attention import _sdpa_is_faster


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    N: int
    M: int
    H: int
    Hkv: int
    D: int
    dtype: str = "bfloat16"
    mask: str | None = None  # "keys": boolean (B, 1, 1, M), "rows": additive (1, H, N, M)
    backward: bool = False


# DreamLite's own blocks have 10 or 20 heads of 64; its configuration class gives 64 of 5, 10 and 20 if left alone.
CASES = [
    Case("Lumina 2", 2, 4352, 4352, 24, 8, 96),
    Case("DreamLite, 4096 tokens", 2, 4096, 4096, 10, 1, 64),
    Case("DreamLite, 1024 tokens", 2, 1024, 1024, 20, 1, 64),
    Case("32760 tokens, one kv head", 1, 32760, 32760, 12, 1, 128),
    Case("16384 tokens, one kv head", 1, 16384, 16384, 32, 1, 128),
    Case("16384 tokens, 8 kv heads", 1, 16384, 16384, 32, 8, 64),
    Case("DreamLite, cross-attention", 2, 4096, 77, 10, 1, 64),
    Case("default heads, D 5", 2, 4096, 4096, 64, 1, 5),
    Case("default heads, D 10", 2, 4096, 4096, 64, 1, 10),
    Case("default heads, D 10", 2, 1024, 1024, 64, 1, 10),
    Case("default heads, D 20", 2, 1024, 1024, 64, 1, 20),
    Case("default heads, D 10, cross", 2, 4096, 77, 64, 1, 10),
    Case("D 40", 2, 4096, 4096, 8, 1, 40),
    Case("D 160", 2, 4096, 4096, 8, 1, 160),
    Case("Lumina 2, padded text", 2, 4352, 4352, 24, 8, 96, mask="keys"),
    Case("additive mask", 1, 2048, 2048, 10, 1, 64, mask="rows"),
    Case("float32", 1, 4096, 4096, 10, 1, 64, dtype="float32"),
    Case("Lumina 2", 2, 4352, 4352, 24, 8, 96, backward=True),
    Case("DreamLite, 4096 tokens", 2, 4096, 4096, 10, 1, 64, backward=True),
]


def inputs(case: Case):
    generator = torch.Generator("cuda").manual_seed(0)

    def rand(*shape):
        x = torch.randn(shape, device="cuda", generator=generator)
        return x.to(getattr(torch, case.dtype)).requires_grad_(case.backward)

    q = rand(case.B, case.N, case.H, case.D)
    k, v = (rand(case.B, case.M, case.Hkv, case.D) for _ in range(2))
    mask = None
    if case.mask == "keys":
        mask = (torch.arange(case.M, device="cuda") < case.M - 100).expand(case.B, 1, 1, case.M).contiguous()
    if case.mask == "rows":
        mask = torch.randn(1, case.H, case.N, case.M, device="cuda", generator=generator).to(q.dtype)
    return q, k, v, mask


def shared(q, k, v, mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def forced(backend: SDPBackend):
    def run(q, k, v, mask):
        with sdpa_kernel(backend):
            return shared(q, k, v, mask)

    return run


def efficient(q, k, v, mask):
    """This kernel shares no heads; with one key/value head, the query heads can be more queries, as a view."""
    B, N, H, D = q.shape
    if k.shape[2] > 1 or (mask is not None and mask.shape[2] > 1):
        raise RuntimeError("has no shared heads; one kv head and a mask without rows would do")
    q, k, v = (x.transpose(1, 2) for x in (q.reshape(B, N * H, 1, D), k, v))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, N, H, D)


def ours(q, k, v, mask):
    config.backend = "triton"
    return gqa_attention(q, k, v, mask=mask)


CANDIDATES = {
    "torch": shared,
    "flash": forced(SDPBackend.FLASH_ATTENTION),
    "cudnn": forced(SDPBackend.CUDNN_ATTENTION),
    "efficient": efficient,
    "triton": ours,
}


def measure(candidate, case: Case, q, k, v, mask) -> dict:
    """Milliseconds, or why there are none."""
    try:
        if case.backward:
            grad = torch.randn_like(q)
            run = lambda: torch.autograd.grad(candidate(q, k, v, mask), (q, k, v), grad)  # noqa: E731
        else:
            run = lambda: candidate(q, k, v, mask)  # noqa: E731
        with torch.set_grad_enabled(case.backward):
            median, p20, p80 = triton.testing.do_bench(run, warmup=10, rep=50, quantiles=[0.5, 0.2, 0.8])
        return {"median": round(median, 4), "p20": round(p20, 4), "p80": round(p80, 4)}
    except Exception as error:
        torch.cuda.empty_cache()
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"}


def row(case: Case) -> dict:
    try:
        q, k, v, mask = inputs(case)
        auto = "torch" if _sdpa_is_faster(q, k, v, mask, case.D**-0.5, case.backward) else "triton"
        times = {name: measure(candidate, case, q, k, v, mask) for name, candidate in CANDIDATES.items()}
    except Exception as error:
        return asdict(case) | {"failed": f"{type(error).__name__}: {error}"[:300]}
    medians = {name: t["median"] for name, t in times.items() if "median" in t}
    best = min(medians, key=medians.get, default=None)
    ratio = round(medians[auto] / medians[best], 3) if auto in medians else None
    products = 2 * (1 if not case.backward else 3.5)  # of N x M x D; the backward has five, with scores made again
    flops = 2 * products * case.B * case.H * case.N * case.M * case.D
    return asdict(case) | {
        "ms": times,
        "auto": auto,
        "best": best,
        "auto_over_best": ratio,
        "best_tflops": best and round(flops / medians[best] / 1e9, 1),
    }


def line(r: dict) -> str:
    shape = f"B{r['B']} H{r['H']}/{r['Hkv']} N{r['N']} M{r['M']} D{r['D']}"
    head = f"{r['name'] + (', with backward' if r['backward'] else ''):38s} {shape:30s}"
    if "ms" not in r:
        return f"{head} {r['failed']}"
    cells = (f"{name} {t['median']:.3f}" if "median" in t else f"{name} -" for name, t in r["ms"].items())
    return f"{head} {'  '.join(cells)}  | auto {r['auto']}, {r['auto_over_best']} of {r['best']}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gqa_dispatch.json")
    parser.add_argument("--seconds", type=float, default=55, help="start no case after this long")
    args = parser.parse_args()
    # torch warns at length about every kernel that a call cannot take; the reason is in the row.
    warnings.simplefilter("ignore")
    start, before, rows = time.monotonic(), config.backend, []
    result = {"environment": environment(), "cases": rows}
    try:
        for case in CASES:
            late = time.monotonic() - start > args.seconds
            rows.append(asdict(case) | {"failed": "left out, no time"} if late else row(case))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
            write_json(args.out / "gqa_dispatch.json", result | {"seconds": round(time.monotonic() - start, 1)})
    finally:
        config.backend = before


if __name__ == "__main__":
    main()
