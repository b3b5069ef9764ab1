"""The sections about linear attention: forward, training, CUDA graphs, fla-core."""

import functools
from collections.abc import Callable

import cases
import peers
import torch
from candidates import Candidate, Section, compiled, eager, ours, rand, relative
from timing import digits
from torch import Tensor

from diffattn.kernels import linear_attention
from diffattn.kernels.linear_attention import linear_attention_reference


class LinearSection(Section):
    """Forward of linear attention; the floor is three tensors read and one written at the copy rate."""

    passes = 4

    def inputs(self, case: cases.Linear) -> tuple[Tensor, ...]:
        return tuple(rand(case.B, case.N, case.H, case.D, seed=seed) for seed in range(3))

    def candidates(self, case: cases.Linear) -> dict[str, Candidate]:
        found = {
            "ours": ours(linear_attention),
            "ours, (B, H, N, D) memory": ours(linear_attention, head_first),
            "ours, elu1, mean": ours(functools.partial(linear_attention, **peers.LINFUSION), **peers.LINFUSION),
        }
        if case.channel_first:
            found["ours, channel-first memory"] = ours(
                lambda packed: linear_attention(*peers.from_channel_first(packed)), packed
            )
            found["diffusers' DC-AE, eager"] = Candidate(lambda *qkv: (peers.dcae, packed(*qkv)))
        if case.rotary:
            rotary = angles(case)
            found["ours, RoPE"] = ours(functools.partial(linear_attention, rotary=rotary), rotary=rotary)
        return found | {
            "diffusers' Sana, eager": eager(peers.sana()),
            "diffusers' Sana, compiled": compiled(peers.sana(), slow=True),
            "LinFusion, eager": eager(peers.linfusion, **peers.LINFUSION),
            "LinFusion, compiled": compiled(peers.linfusion, slow=True, **peers.LINFUSION),
            "bf16 einsum, compiled": compiled(peers.einsum),
        }

    def error(self, case, function, tensors, qkv, options) -> float:
        """Over the first and the last head of the first batch element: heads do not see each other."""
        out = function(*tensors)
        heads = [0, case.H - 1]
        wide = [x[:1, :, heads].double() for x in qkv]
        return relative(out[:1, :, heads], linear_attention_reference(*wide, **widened(options)))

    def moved(self, case) -> int:
        """Bytes that have to be read or written."""
        return self.passes * case.elements * 2

    def measured(self, case, milliseconds: float, peak: int, ceiling: dict) -> dict:
        rate = self.moved(case) / milliseconds / 1e6
        return {
            "gb_s": digits(rate),
            "of_floor": digits(ceiling["copy_gb_s"] / rate, 3),
            "peak_mb": digits(peak / 1e6),
        }

    def floor_ms(self, case, ceiling: dict) -> float:
        return digits(self.moved(case) / ceiling["copy_gb_s"] / 1e6)


class TrainingSection(LinearSection):
    """Forward and backward: four passes, then q, do, k, v read and dq, dk, dv written."""

    passes, training = 11, True

    def inputs(self, case):
        return tuple(x.requires_grad_() for x in super().inputs(case))

    def candidates(self, case):
        return {
            "ours": ours(linear_attention),
            "ours, (B, H, N, D) memory": ours(linear_attention, head_first_leaves),
            "bf16 einsum, compiled": compiled(peers.einsum),
        }

    def call(self, case, function, tensors) -> Callable:
        grad = rand(case.B, case.N, case.H, case.D, seed=3)
        return lambda: torch.autograd.grad(function(*tensors), tensors, grad)

    def error(self, case, function, tensors, qkv, options) -> float:
        """The largest of the three gradients' errors."""
        heads = [0, case.H - 1]
        grad = rand(case.B, case.N, case.H, case.D, seed=3)
        got = torch.autograd.grad(function(*tensors), tensors, grad)
        wide = [x.detach()[:1, :, heads].double().requires_grad_() for x in qkv]
        out = linear_attention_reference(*wide, **widened(options))
        expected = torch.autograd.grad(out, wide, grad[:1, :, heads].double())
        return max(relative(g[:1, :, heads], e) for g, e in zip(got, expected, strict=True))

    def measured(self, case, milliseconds, peak, ceiling):
        # q, k, v and do were there before the call; a call needs no more than o, dq, dk, dv.
        tensor = case.elements * 2
        memory = digits((4 * tensor + peak) / (8 * tensor), 3)
        return super().measured(case, milliseconds, peak, ceiling) | {"of_least_memory": memory}


class FlaSection(LinearSection):
    def candidates(self, case):
        return {
            "ours": ours(linear_attention),
            "bf16 einsum, compiled": compiled(peers.einsum),
            "fla-core, last causal state": eager(peers.fla_state),
            "fla-core, causal": Candidate(lambda *qkv: (peers.fla_causal, qkv), same=False),
        }


class FlaTrainingSection(TrainingSection):
    candidates = FlaSection.candidates


class GraphSection(LinearSection):
    """Replayed from CUDA graphs, so that no launch from Python is in the time.

    Each candidate twice: one call with a cold cache, and, in a row, eight calls on eight sets of tensors.
    """

    copies = 8

    def candidates(self, case):
        found = {
            "ours": ours(linear_attention),
            "diffusers' Sana, eager": eager(peers.sana()),
            "bf16 einsum, compiled": compiled(peers.einsum),
        }
        if case.channel_first:
            found["ours, channel-first memory"] = ours(
                lambda packed: linear_attention(*peers.from_channel_first(packed)), packed
            )
        return found

    def call(self, case, function, tensors):
        return capture(function, [tensors])

    def more_calls(self, case, function, tensors) -> dict[str, Callable]:
        sets = [tensors] + [tuple(x.clone() for x in tensors) for _ in range(self.copies - 1)]
        return {"in_a_row": capture(function, sets)}


def capture(function: Callable, sets: list[tuple[Tensor, ...]]) -> Callable:
    """The replay of a CUDA graph of one call a set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [function(*tensors) for tensors in sets]

    def replay(kept=(sets, outs)):  # what the graph reads and writes is its caller's to keep
        graph.replay()

    return replay


def head_first(*qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)


def head_first_leaves(*qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in head_first(*qkv))


def packed(*qkv: Tensor) -> tuple[Tensor]:
    return (peers.channel_first(*qkv),)


def angles(case: cases.Linear) -> tuple[Tensor, Tensor]:
    angle = torch.outer(
        torch.arange(case.N, device="cuda"), 10000.0 ** -torch.linspace(0, 1, case.D // 2, device="cuda")
    )
    return angle.cos(), angle.sin()


def widened(options: dict) -> dict:
    """The reference's options in float64."""
    if "rotary" in options:
        return options | {"rotary": tuple(x.double() for x in options["rotary"])}
    return options
