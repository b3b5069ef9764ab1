"""Without a GPU, Triton kernels run in the interpreter; the variable has to be set before triton loads."""

import gc
import logging
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tiny tensors: more threads only wait for each other, and each pytest worker has a core of its own; the processes that
# tests start have no more.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from diffattn import config


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays():
    """The million objects of torch and diffusers are not walked through in every collection of the tests to come."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quiet_tracer(request):
    """torch's tracers log each step for whoever captures logs, as pytest does: a third of the time of an export."""
    traces = "onnx" in request.keywords or request.path.parent.name == "graphs"
    if traces:
        logging.disable(logging.WARNING)
    yield
    if traces:
        logging.disable(logging.NOTSET)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_backend():
    """Run the Triton kernels: compiled on a GPU, interpreted on a CPU."""
    before, config.backend = config.backend, "triton"
    yield
    config.backend = before


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
