"""DIFFATTN_AUTOTUNE: what is searched, kept and taken, with the time of each choice made up."""

import importlib
import json

import pytest
import torch

from diffattn import config
from diffattn.kernels import _autotune, gqa_attention, linear_attention

CHOICES = [(64, 4), (128, 8), (32, 4)]
TIMES = {(64, 4): 2.0, (128, 8): 1.0, (32, 4): 3.0}


@pytest.fixture
def autotune(tmp_path, monkeypatch):
    """A search that keeps its results in `tmp_path`; the calls that were timed are appended to what it yields."""
    timed = []

    def milliseconds(call):
        call()
        timed.append(call.args[0])
        return TIMES.get(call.args[0], float(len(timed)))

    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(_autotune, "_milliseconds", milliseconds)
    config.autotune = True
    yield timed
    config.autotune = False


def search(run=lambda choice: None, key=(1,)):
    return _autotune.tuned("kernel", key, CHOICES[0], CHOICES, run)


def test_nothing_is_searched_unless_asked_for(autotune, tmp_path):
    config.autotune = False
    assert search() == CHOICES[0]
    assert not autotune and not list(tmp_path.iterdir())


def test_the_fastest_is_taken_and_kept(autotune, tmp_path):
    assert search() == (128, 8)
    assert sorted(autotune) == sorted(CHOICES)
    assert search() == (128, 8) and len(autotune) == 3
    assert search(key=(2,)) == (128, 8) and len(autotune) == 6
    assert list(json.loads(_autotune.cache_path().read_text()).values()) == [[128, 8], [128, 8]]
    assert [path.name for path in tmp_path.iterdir()] == ["autotune.json"]


def test_another_process_reads_what_was_kept(autotune):
    search()
    _autotune._known.cache_clear()
    assert search() == (128, 8) and len(autotune) == 3


def test_results_of_another_process_stay(autotune):
    search()
    _autotune.cache_path().write_text(json.dumps({"theirs": [1]}))
    search(key=(2,))
    assert json.loads(_autotune.cache_path().read_text())["theirs"] == [1]


def test_what_does_not_fit_is_left_out(autotune):
    from triton.runtime.errors import OutOfResources

    def run(choice):
        if choice == (128, 8):
            raise OutOfResources(300000, 232448, "shared memory")

    assert search(run) == (64, 4)


def test_if_nothing_fits_the_error_is_shown(autotune, tmp_path):
    from triton.runtime.errors import OutOfResources

    def run(choice):
        raise OutOfResources(300000, 232448, "shared memory")

    with pytest.raises(OutOfResources):
        search(run)
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_named(autotune):
    _autotune.cache_path().write_text("{")
    with pytest.raises(ValueError, match=r"autotune\.json is not what DIFFATTN_AUTOTUNE wrote"):
        search()


@pytest.mark.parametrize("function", [linear_attention, gqa_attention])
def test_results_are_right_during_and_after_a_search(function, autotune, device, triton_backend, monkeypatch):
    if not torch.cuda.is_available():  # the interpreter is slow
        launchers = importlib.import_module("diffattn.kernels.linear_attention.problem")
        monkeypatch.setattr(launchers, "other_launches", lambda launch: [launch])
    q, k, v = (torch.randn(1, 2100, 2, 16, dtype=torch.float16).to(device) for _ in range(3))
    q = q[:, :20]
    config.backend = "torch"
    exact = function(*(x.double() for x in (q, k, v)))
    config.backend = "triton"
    searched = []
    for _ in range(2):
        out = function(q, k, v)
        assert (out - exact).norm() <= 4e-4 * exact.norm()
        searched.append(len(autotune))
    assert searched[0] == searched[1] > 0  # the second call searches nothing
