"""`Step` keeps what Triton compiled only for calls that it was compiled for."""

import pytest
import torch

from diffattn.kernels._launch import Step

GRID = (7, 1, 1)


class Kernel:
    """Stands in for a kernel p_x, p_o, n, eps, A, B: notes who was asked to launch, and with what."""

    arg_names = ("p_x", "p_o", "n", "eps", "A", "B")

    def __init__(self, compiles=True):
        self.compiles, self.asked, self.launched = compiles, [], []

    def __getitem__(self, grid):
        def ask(*args, **constants):
            self.asked.append((grid, args, constants))
            return Found(self) if self.compiles else None

        return ask


class Found:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append((grid, args))


@pytest.fixture
def tensors():
    x, o = torch.zeros(64), torch.zeros(64)
    assert x.data_ptr() % 16 == 0 and o.data_ptr() % 16 == 0
    return x, o


def make(kernel):
    # constants in another order than the kernel's
    return Step(kernel, (7,), (3,), dict(B=2, A=1), num_warps=4)


def test_aligned_calls_ask_once_and_launch_what_was_found(tensors):
    kernel = Kernel()
    step = make(kernel)
    for eps in (0.5, 0.25, 0.125):
        step(*tensors, numbers=(eps,))
    assert kernel.asked == [(GRID, (*tensors, 3, 0.5), dict(A=1, B=2, num_warps=4))]
    assert kernel.launched == [(GRID, (*tensors, 3, eps, 1, 2)) for eps in (0.25, 0.125)]


def test_unaligned_calls_always_ask(tensors):
    x, o = tensors
    kernel = Kernel()
    step = make(kernel)
    step(x[1:], o, numbers=(0.5,))
    step(x, o[1:], numbers=(0.5,))
    assert len(kernel.asked) == 2 and not kernel.launched
    # what was found for those was not kept
    step(x, o, numbers=(0.5,))
    assert len(kernel.asked) == 3 and not kernel.launched
    step(x[1:], o, numbers=(0.5,))
    assert len(kernel.asked) == 4 and not kernel.launched
    step(x[4:], o, numbers=(0.5,))
    assert len(kernel.asked) == 4 and len(kernel.launched) == 1


def test_nothing_of_the_interpreter_is_kept(tensors):
    kernel = Kernel(compiles=False)
    step = make(kernel)
    for _ in range(3):
        step(*tensors, numbers=(0.5,))
    assert len(kernel.asked) == 3 and step.compiled is None
