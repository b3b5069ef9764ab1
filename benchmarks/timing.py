"""How everything here is timed: CUDA events, cold L2 cache, the candidates in turn, medians; and the ceilings."""

import fnmatch
import math
import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache


class Deadline:
    """Benchmarks start nothing new after this many seconds; what is left out is listed, not forgotten."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.monotonic(), seconds

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def passed(self) -> bool:
        return self.elapsed > self.seconds


def interleave(
    calls: dict[str, Callable], seconds: float = 0.5, rounds: tuple[int, int] = (5, 50), queued: bool = False
) -> dict[str, dict]:
    """Time each call once a round, every round beginning with another one, for about so many seconds.

    Args:
        queued: the GPU is kept busy until the CPU has launched the whole call, so that a call's time is its kernels'
            alone. Otherwise, as triton.testing.do_bench takes it, launches that come slower than kernels run show.

    Returns: for each name `median`, `p20`, `p80` (GPU milliseconds from the call's first launch to its last kernel's
        end) and `cpu_ms`, the median time until the call returned.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    names = list(calls)
    gpu: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    fills = dict.fromkeys(names, 1)

    def round_of(order: list[str]) -> list[tuple]:
        marks = []
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(fills[name]):
                flush.zero_()
            start.record()
            before = time.perf_counter()
            calls[name]()
            marks.append((name, start, end, 1e3 * (time.perf_counter() - before)))
            end.record()
        torch.cuda.synchronize()
        return marks

    round_of(names)
    if queued:
        # A fill takes a GPU 0.06 to 0.3 ms and the CPU a tenth of it: twice the call's time and more.
        fills = {name: 1 + min(200, math.ceil(40 * milli)) for name, *_, milli in round_of(names)}
    before = time.perf_counter()
    round_of(names)
    duration = time.perf_counter() - before
    for i in range(min(max(int(seconds / duration), rounds[0]), rounds[1])):
        turn = i % len(names)
        for name, start, end, milli in round_of(names[turn:] + names[:turn]):
            gpu[name].append(start.elapsed_time(end))
            cpu[name].append(milli)
    return {name: summary(gpu[name]) | {"cpu_ms": digits(statistics.median(cpu[name]))} for name in names}


def summary(milliseconds: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(milliseconds, n=10)
    return {name: digits(deciles[i]) for name, i in (("median", 4), ("p20", 1), ("p80", 7))}


def digits(x: float, n: int = 4) -> float:
    """x with n significant digits: more would be noise in a result file."""
    return x if x == 0 or not math.isfinite(x) else round(x, n - 1 - math.floor(math.log10(abs(x))))


def peak_bytes(call: Callable) -> int:
    """How far above what was allocated before it one call goes, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def ceilings() -> dict[str, float]:
    """What this GPU reaches now: GB/s of a copy (read and written bytes) and TFLOP/s of a bfloat16 product."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    times = interleave(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=out)}, rounds=(30, 60)
    )
    return {
        "copy_gb_s": digits(2 * source.numel() / times["copy"]["median"] / 1e6),
        "matmul_tflop_s": digits(2 * 8192**3 / times["matmul"]["median"] / 1e9),
    }


def reason(error: BaseException) -> str:
    """An exception as a result file keeps it: its class and its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:240]


def chosen(name: str, only: list[str] | None) -> bool:
    """Whether any of the globs takes the name; without any, every name is taken."""
    return not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)
