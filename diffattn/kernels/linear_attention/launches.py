"""Launch configurations: block sizes, how many programs fit, how the tokens are cut among them."""

import functools
import itertools

import torch

from diffattn.kernels._launch import Launch, cdiv, multiprocessors, padded

# By kernel, then by the padded width of a tile: the first entry at least as wide is taken. Chosen on one H100 in
# bfloat16 (benchmarks/NOTES.md). "queries" is dq and dS in one kernel, "keys" dk and dv; "pieces" and "rotary" are the
# kernels of triton_pieces.py, without rotation and with it, by the widths of both pieces together.
CONFIGS = {
    "fused": {32: Launch(128, 4, 3, 4), 64: Launch(64, 4, 3, 4)},
    "state": {64: Launch(64, 4, 3, 2), 128: Launch(64, 4, 3, 2), 256: Launch(32, 8, 2, 1)},
    "output": {64: Launch(64, 4, 4, 2), 128: Launch(64, 4, 2, 2), 256: Launch(64, 8, 2, 1)},
    "pieces_state": {128: Launch(32, 8, 3, 2), 192: Launch(32, 8, 4, 1), 256: Launch(32, 8, 3, 1)},
    "pieces_output": {128: Launch(64, 4, 3, 2), 192: Launch(128, 8, 2, 1), 256: Launch(64, 8, 2, 1)},
    "rotary_state": {64: Launch(32, 4, 4, 4), 128: Launch(32, 8, 3, 2), 256: Launch(32, 8, 2, 1)},
    "rotary_output": {64: Launch(64, 4, 3, 3), 128: Launch(128, 8, 3, 1), 256: Launch(64, 8, 2, 1)},
    "queries": {64: Launch(64, 4, 3, 2), 128: Launch(64, 8, 3, 1), 256: Launch(64, 8, 1, 1)},
    "keys": {64: Launch(64, 4, 2, 3), 128: Launch(64, 8, 3, 1)},
    "dk": {128: Launch(64, 8, 3, 1), 256: Launch(32, 8, 1, 1)},
    "dv": {128: Launch(64, 4, 3, 1), 256: Launch(64, 8, 1, 1)},
}
# The most elements of one D x BE block of the state, by the bytes of its parts: larger heads are cut along E. Half of
# it where shared memory is small.
STATE_BLOCK = {2: 128 * 128, 4: 64 * 128}
# The same for the kernels in pieces, whose blocks have little padding.
PIECES_BLOCK = {2: 256 * 160, 4: 128 * 160}
# What a program costs besides its tokens, in steps: loading the state, writing a part.
STEPS_PER_PROGRAM = 2
# Narrow heads share a tile of up to this many features.
PACKED_WIDTH = 64
# Up to this many tokens one program takes a whole head; beyond, other multiprocessors would wait for it.
FUSED_TOKENS = 2048


def pieces(features: int, least: int = 64) -> tuple[int, int]:
    """The widths of the one or two tiles that take them with the least padding, none narrower than `least`.

    That is 64 where a tile is so wide: narrower ones lie in shared memory in another order, and where products of both
    kinds meet, ptxas 12.8 mixes up their addresses.
    """
    width = max(padded(features), least)
    rest = max(64, padded(features - width // 2))
    return (width // 2, rest) if width // 2 + rest < width else (width, 0)


@functools.lru_cache(maxsize=1024)
def choose_launch(kernel: str, width: int, dtype: torch.dtype, rotary: bool = False, small: bool = False) -> Launch:
    table = CONFIGS[kernel]
    launch = table[min(w for w in table if w >= width)]
    if dtype != torch.bfloat16:
        # parts of 4 bytes
        launch = launch._replace(stages=min(2, launch.stages), resident=min(2, launch.resident))
        if width > 64:
            launch = launch._replace(block=min(64, launch.block), warps=8, resident=1)
    if dtype == torch.float32:
        launch = launch._replace(block=max(16, launch.block // 2), stages=1)
    if rotary:
        launch = launch._replace(resident=min(2, launch.resident))
    if rotary and width > 64:
        # tables of cos and sin to hold as well
        most = 1 if width > 128 else 3 if kernel in ("queries", "dk", "dv") else 2
        launch = launch._replace(stages=min(launch.stages, most))
        if kernel == "state":
            launch = launch._replace(block=32, warps=8)
    if small and (width > 64 or rotary):
        # Compiled for such GPUs, measured on none.
        most = 16 if kernel.startswith("rotary") and width > 128 else 32
        launch = launch._replace(stages=min(2, launch.stages), block=min(most, launch.block))
    return launch


def registers(launch: Launch, dtype: torch.dtype) -> int | None:
    """The most a thread may take, for `resident` programs to fit a multiprocessor of 65536. Parts of 4 bytes take what
    they need."""
    most = 65536 // (32 * launch.warps * launch.resident) // 8 * 8
    return min(255, max(128, most)) if dtype == torch.bfloat16 else None


def other_launches(launch: Launch) -> list[Launch]:
    """What a search tries beside the table's choice."""
    blocks = (max(16, launch.block // 2), launch.block, 2 * launch.block)
    choices = itertools.product(blocks, (4, 8), (2, 3, 4), (1, 2, 4))
    return [Launch(*choice) for choice in choices]


@functools.lru_cache(maxsize=4096)
def cut(launch: Launch, device: torch.device, tokens: int, heads: int) -> tuple[int, int]:
    """(chunk, n_chunks) of a kernel that walks over the tokens of `heads` heads: n_chunks programs a head, of `chunk`
    blocks each, so that all finish soonest if as many run at a time as fit the device."""
    slots = multiprocessors(device) * launch.resident
    steps = cdiv(tokens, launch.block)

    def finish(chunks):
        return cdiv(heads * chunks, slots) * (cdiv(steps, chunks) + STEPS_PER_PROGRAM)

    chunk = cdiv(steps, min(range(1, min(steps, cdiv(8 * slots, heads)) + 1), key=finish))
    return chunk, cdiv(steps, chunk)
