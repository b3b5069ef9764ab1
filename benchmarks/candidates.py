"""What a section times: candidates, ours or a peer's, each with what it is checked against."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from timing import digits
from torch import Tensor

# Relative Frobenius errors that bfloat16 may make: ours as in the tests; what rounds its state to bfloat16, or its
# scores to 8 bits, makes more. Beyond it, a candidate does not compute the formula, and its time is not compared.
OURS_LIMIT, PEER_LIMIT, INT8_LIMIT = 2.5e-3, 2e-2, 1.3e-2


@dataclass
class Candidate:
    """One way to compute a case.

    Attributes:
        build: from the case's tensors to (function, its arguments); raises where the candidate cannot run.
        options: of the reference that it is checked against.
        same: whether it computes the case's formula; what does not is timed, and not compared.
        low_precision: 8-bit arithmetic, which is not compared with bfloat16 either.
        slow: to start; the section leaves it to cases with `every_peer`.
    """

    build: Callable[..., tuple[Callable, tuple[Tensor, ...]]]
    options: dict = field(default_factory=dict)
    limit: float = PEER_LIMIT
    ours: bool = False
    same: bool = True
    low_precision: bool = False
    slow: bool = False


def eager(function: Callable, **options) -> Candidate:
    return Candidate(lambda *tensors: (function, tensors), options)


def compiled(function: Callable, slow: bool = False, **options) -> Candidate:
    return Candidate(
        lambda *tensors: (torch.compile(function, fullgraph=True, dynamic=False), tensors), options, slow=slow
    )


def ours(function: Callable, arguments: Callable | None = None, **options) -> Candidate:
    def build(*tensors):
        return function, tensors if arguments is None else arguments(*tensors)

    return Candidate(build, options, OURS_LIMIT, ours=True)


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator, dtype=torch.float32).to(torch.bfloat16)


def relative(out: Tensor, expected: Tensor) -> float:
    return digits(((out.double() - expected).norm() / expected.norm()).item(), 3)


class Section:
    """What is timed for one kind of case. Subclasses say of a case its `inputs`, its `candidates`, the `error` of one,
    the `floor_ms` and what a time `measured` means against it."""

    training = False

    def call(self, case, function: Callable, tensors: tuple[Tensor, ...]) -> Callable:
        """What one timing runs."""
        return functools.partial(function, *tensors)

    def more_calls(self, case, function: Callable, tensors: tuple[Tensor, ...]) -> dict[str, Callable]:
        """Other ways to run the same candidate, by name."""
        return {}
