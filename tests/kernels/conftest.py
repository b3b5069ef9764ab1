"""Fixtures that the tests of every kernel share."""

import pytest
import torch

from diffattn import config


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["auto", "torch", "triton"])
def any_backend(request):
    before, config.backend = config.backend, request.param
    yield request.param
    config.backend = before


@pytest.fixture
def poisoned_memory():
    """`torch.empty` returns NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
