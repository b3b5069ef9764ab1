"""Sparse-linear and window attention beside dense softmax attention and flex_attention, at the sizes of real models.

    python benchmarks/sparse.py

Each row is one call of a core in bfloat16, forward and, where it fits, forward and backward; whole cores, with what
chooses the blocks, moves the tokens and adds the linear part. Beside them dense attention by torch and, for the
window, torch's flex_attention over the same pairs, its tokens in the order of our kernel already. Writes sparse.json
to results/<gpu>: median, p20 and p80 ms, peak memory, and the share of the blocks of keys that a block of queries
visits.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from report import environment, gpu_name, results_folder, write_json
from timing import Deadline, ceilings, chosen, digits, interleave, peak_bytes, reason
from torch import Tensor, nn

from diffattn import SparseLinearAttention, WindowAttention
from diffattn.cores import LayerInfo
from diffattn.kernels.block_sparse_attention import number_of_blocks, window


@dataclass(frozen=True)
class Case:
    """Self-attention of a picture, `side` x `side` tokens, and of `text` tokens before it."""

    name: str
    B: int
    side: int
    H: int
    D: int
    text: int = 0
    train: bool = True

    @property
    def N(self) -> int:
        return self.side**2 + self.text


CASES = [
    Case("Flux 1024px", 1, 64, 24, 128, text=512),
    Case("Flux 2048px", 1, 128, 24, 128, text=512),
    Case("Flux 4096px", 1, 256, 24, 128, text=512, train=False),
    Case("SDXL 1024px, 64 x 64", 2, 64, 10, 64),
    Case("SDXL 2048px", 2, 128, 10, 64),
    Case("SD 1.5 2048px", 2, 256, 8, 40, train=False),
]
SPARSE, WINDOW = (0.05, 0.125, 0.25), (8, 16, 32)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def cores(case: Case, device: str) -> dict[str, Callable]:
    """Candidates on (B, N, H, D), by name."""
    made: dict[str, Callable] = {"dense": dense}
    for keep in SPARSE:
        core = SparseLinearAttention(keep)
        core.prepare(LayerInfo(case.H, case.H, case.D))
        nn.init.normal_(core.linear_out.weight, std=0.02)  # at 0 as otherwise
        made[f"sparse-linear, keep {keep}"] = core.to(device, torch.bfloat16)
    for radius in WINDOW:
        made[f"window, radius {radius}"] = WindowAttention(radius, text=(case.text, 0))
    return made


def plan_of(case: Case, radius: float, blocks: tuple[int, int], device: str) -> window.Plan:
    return window._plan((case.side, case.side), (case.text, 0), radius, blocks, torch.device(device))


def flex(case: Case, radius: float, q: Tensor, k: Tensor, v: Tensor) -> Callable:
    """torch's flex_attention over the pairs of a window, as a call of no arguments."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    plan = plan_of(case, radius, (128, 128), "cuda")
    (y, x, own), other = plan.q_places, plan.k_places[2]

    def near(batch, head, n, m):
        return (y[n] - y[m]) ** 2 + (x[n] - x[m]) ** 2 <= own[n] + other[m]

    mask = create_block_mask(near, None, None, case.N, case.N, device="cuda", BLOCK_SIZE=128)
    tensors = [t.detach().index_select(1, plan.order).transpose(1, 2).contiguous() for t in (q, k, v)]
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*tensors, block_mask=mask)


def with_gradients(core: Callable, *tensors: Tensor) -> Callable:
    grad = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(core(*tensors), tensors, grad)


def measure(case: Case, seconds: float) -> dict:
    q, k, v = (torch.randn(case.B, case.N, case.H, case.D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    made = cores(case, "cuda")
    calls = {name: lambda core=core: core(q, k, v) for name, core in made.items()}
    row: dict = {"visited": {}}
    for radius in WINDOW:
        count = plan_of(case, radius, (window.ROWS, window.KEYS), "cuda").blocks.count
        visited = count.float().mean() / number_of_blocks(case.N, window.KEYS)
        row["visited"][f"window, radius {radius}"] = digits(visited.item())
    try:
        calls["flex_attention, radius 16"] = flex(case, 16, q, k, v)
        with torch.no_grad():
            calls["flex_attention, radius 16"]()
    except Exception as error:  # a peer that cannot run is a row with its reason
        calls.pop("flex_attention, radius 16", None)
        row["flex_attention"] = reason(error)
    with torch.no_grad():
        row["forward"] = interleave(calls, seconds)
        for name, call in calls.items():
            row["forward"][name]["peak_bytes"] = peak_bytes(call)
    if case.train:
        tensors = [x.requires_grad_() for x in (q, k, v)]
        row["train"] = interleave({name: with_gradients(core, *tensors) for name, core in made.items()}, seconds)
    return row


def run(out: Path, only: list[str] | None, seconds: float, each: float) -> None:
    torch.manual_seed(0)
    deadline, rows, left_out = Deadline(seconds), [], []
    head = {"environment": environment(), "ceilings": ceilings(), "dtype": "bfloat16", "left_out": left_out}
    for case in CASES:
        if not chosen(case.name, only):
            continue
        if deadline.passed:
            left_out.append(case.name)
            continue
        try:
            row = asdict(case) | measure(case, each)
            print(f"{case.name}, {case.N} tokens", flush=True)
            for way in ("forward", "train"):
                for name, time in row.get(way, {}).items():
                    faster = row[way]["dense"]["median"] / time["median"]
                    print(f"  {way:<8} {name:<28} {time['median']:9.3f} ms  {faster:6.2f}x dense", flush=True)
        except Exception as error:  # a case that cannot run is a row with its reason
            row = asdict(case) | {"failed": reason(error)}
            print(f"{case.name}: {row['failed']}", flush=True)
        rows.append(row)
        torch.cuda.empty_cache()
        write_json(out / "sparse.json", head | {"rows": rows, "seconds": round(deadline.elapsed, 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for sparse.json; results/<gpu> if not given")
    parser.add_argument("--only", action="append", help="glob over the cases' names; may be repeated")
    parser.add_argument("--seconds", type=float, default=240, help="start no case after this long")
    parser.add_argument("--each", type=float, default=2, help="seconds for a case's forward, and for its training")
    args = parser.parse_args()
    if not any(chosen(case.name, args.only) for case in CASES):
        parser.error(f"--only: {args.only} matches none of {', '.join(case.name for case in CASES)}")
    run(args.out or results_folder(gpu_name()), args.only, args.seconds, args.each)


if __name__ == "__main__":
    main()
