"""The benchmark of causal linear attention, on small tensors: its peers' formulas, its check, its floors, its bars."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DECAYS = [(None, False), (None, True), ("head", False), ("token", False), ("channel", False)]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import each other by name, from their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def float32(monkeypatch, device):
    """The sections' tensors are float32, on a CPU where there is no GPU."""
    import sections_causal
    import sections_linear

    def rand(*shape, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

    monkeypatch.setattr(sections_causal, "rand", rand)
    monkeypatch.setattr(sections_linear, "rand", rand)


def scan(q, k, v, g, scale, state=None):
    """Token by token, g the logarithm of what is kept: (B, N, H) or (B, N, H, D)."""
    B, N, H, D = q.shape
    state = q.new_zeros(B, H, D, v.shape[3]) if state is None else state
    g = g.unsqueeze(-1) if g.dim() == 3 else g
    out = []
    for n in range(N):
        state = state * g[:, n].exp().unsqueeze(-1) + k[:, n].unsqueeze(-1) * v[:, n].unsqueeze(-2)
        out.append(scale * (q[:, n].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(out, 1), state


@pytest.fixture
def fla(monkeypatch):
    """Stands in for fla-core: what its documentation says that the functions compute, without its kernels."""

    def linear(q, k, v, scale, normalize=True):
        out = scan(q, k, v, q.new_zeros(q.shape[:3]), scale)[0]
        return (out / ((q * scale * k.cumsum(1)).sum(-1, keepdim=True) + 1e-10) if normalize else out), None

    def retention(q, k, v, scale):
        gamma = 1 - 2.0 ** (-5.0 - torch.arange(q.shape[2], device=q.device))
        return scan(q, k, v, gamma.log().expand(q.shape[:3]), scale)

    def recurrent(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
        out, state = scan(q, k, v, g_gamma.expand(q.shape[:3]) if g is None else g, scale, initial_state)
        return out, state if output_final_state else None

    functions = {
        "linear_attn": {"chunk_linear_attn": linear},
        "retention": {"chunk_retention": retention},
        "simple_gla": {"chunk_simple_gla": scan, "fused_recurrent_simple_gla": recurrent},
        "gla": {"chunk_gla": scan},
    }
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in functions.items():
        module = ModuleType(f"fla.ops.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def errors(section, case):
    inputs = section.inputs(case)
    found = {}
    with torch.set_grad_enabled(section.training):
        for name, candidate in section.candidates(case).items():
            if not candidate.same:
                continue
            function, tensors = candidate.build(*inputs)
            found[name] = section.error(case, function, tensors, inputs, candidate.options)
    return found


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("decay, normalize", DECAYS)
def test_all_candidates_of_a_case_compute_its_formula(training, decay, normalize, float32, fla):
    import cases
    from sections_causal import CausalSection, CausalTrainingSection

    case = cases.Causal("tiny", 2, 6, 3, 8, decay, normalize)
    found = errors(CausalTrainingSection() if training else CausalSection(), case)
    assert {"ours"} < set(found) and sum(name.startswith("fla-core, ") for name in found) == 1
    assert ("ours, both directions" in found) == ("ours, decay checked" in found) == (decay is not None)
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("decay", ["head", "token"])
def test_step_candidates_compute_the_output_and_the_state(decay, float32, fla):
    import cases
    from sections_causal import CausalStepSection

    section, case = CausalStepSection(), cases.Causal("tiny", 2, 1, 3, 16, decay)
    found = errors(section, case)
    assert set(found) == {"ours", "fla-core, fused_recurrent_simple_gla"}
    assert max(found.values()) < 1e-5
    # what they are held to: as many bytes, read and written in place
    inputs = section.inputs(case)
    function, (state,) = section.candidates(case)["the states alone"].build(*inputs)
    assert function(state) is state and state.shape == inputs[-1].shape
    assert torch.equal(inputs[-1], section.inputs(case)[-1]) and not torch.equal(state, inputs[-1])


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_a_decay_that_is_forgotten_is_seen(training, float32):
    import cases
    from candidates import PEER_LIMIT
    from sections_causal import CausalSection, CausalTrainingSection, unchecked

    section = CausalTrainingSection() if training else CausalSection()
    case = cases.Causal("tiny", 2, 20, 3, 16, "head")
    inputs = section.inputs(case)
    options = {"feature_map": None, "normalize": False}
    with torch.set_grad_enabled(training):
        error = section.error(case, lambda q, k, v, g: unchecked(options, q, k, v), inputs, inputs, options)
    assert error > PEER_LIMIT


def test_a_state_that_is_not_written_is_seen(float32):
    import cases
    from candidates import PEER_LIMIT
    from sections_causal import CausalStepSection, step

    section, case = CausalStepSection(), cases.Causal("tiny", 2, 1, 3, 16, "token")
    inputs = section.inputs(case)
    function, tensors = section.candidates(case)["ours"].build(*inputs)

    def stale(*tensors):
        before = tensors[-1].tensor.clone()
        return function(*tensors)[0], before

    assert function is step
    assert section.error(case, stale, tensors, inputs, {}) > PEER_LIMIT
    # ours is given a copy: the candidates begin with one state
    assert torch.equal(inputs[-1], section.inputs(case)[-1])


def test_cases_have_names_of_their_own_and_sizes_of_the_bars():
    import cases

    for group in (cases.CAUSAL, cases.CAUSAL_STEP):
        assert len({case.name for case in group}) == len(group)
        assert all(case.decay is None or not case.normalize for case in group)
    assert {(c.decay, c.normalize) for c in cases.CAUSAL} == set(DECAYS)
    assert {(c.decay, c.normalize) for c in cases.CAUSAL if c.train} == set(DECAYS)
    for case in cases.CAUSAL_STEP:
        assert (case.N, case.B * case.H, case.D) == (1, 256, 64)


def test_floors_count_decays_and_states():
    import cases
    from sections_causal import CausalSection, CausalStepSection, CausalTrainingSection

    token = cases.Causal("x", 2, 100, 3, 16, "token")
    head, channel = (dataclasses.replace(token, decay=decay) for decay in ("head", "channel"))
    assert CausalSection().moved(token) == 4 * 2 * 100 * 3 * 16 * 2 + 2 * 100 * 3 * 4
    assert CausalSection().moved(head) == 4 * 2 * 100 * 3 * 16 * 2 + 3 * 4
    assert CausalTrainingSection().moved(channel) == (11 * 2 + 3 * 4) * 2 * 100 * 3 * 16
    # 256 heads of 64 x 64 float32 numbers, read and written: 8 MiB a layer
    assert CausalStepSection().moved(cases.CAUSAL_STEP[0]) == 64 * 2**23


@pytest.mark.gpu
def test_a_step_is_timed_against_its_states(tmp_path):
    import cases
    import kernels
    from sections_causal import CausalStepSection
    from timing import Deadline

    ceiling = {"copy_gb_s": 1000.0, "matmul_tflop_s": 100.0}
    with torch.no_grad():
        row = kernels.measure(CausalStepSection(), cases.CAUSAL_STEP[1], ceiling, Deadline(60))
    ours = row["candidates"]["ours"]
    assert "wrong" not in ours and ours["median"] > 0 and ours["one_state_ms"] > 0
    assert ours["of_floor"] == pytest.approx(ours["median"] / row["floor_ms"], rel=0.01)


def test_bars_are_judged_by_the_causal_sections(tmp_path, capsys, monkeypatch):
    import bars

    def row(section, case, **candidates):
        entries = {name.replace("_", ", ", 1): {"ours": name.startswith("ours")} | e for name, e in candidates.items()}
        return {"section": section, "case": case, "shape": {}, "candidates": entries}

    simple = {"fla-core_chunk_simple_gla": {"median": 1.0}}
    rows = [
        row("causal", "token", ours={"median": 1.2}, **{"ours_both directions": {"median": 2.4}}, **simple),
        row("causal", "wrong", ours={"median": 9.0, "wrong": "the error may be 0.0025 at most"}, **simple),
        row("causal", "channel", ours={"median": 5.0}, **{"fla-core_chunk_gla": {"median": 1.0}}),
        row("causal-step", "token", ours={"median": 0.28, "of_floor": 1.6}, **{"the states alone": {"median": 0.2}}),
        row("causal-step", "wrong", ours={"median": 0.4, "wrong": "it"}, **{"the states alone": {"median": 0.2}}),
    ]
    (tmp_path / "kernels_causal.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(sys, "argv", ["bars.py", "--results", str(tmp_path)])
    bars.main()
    out = capsys.readouterr().out
    assert "ok  causal forward over fla-core: at most 1.3, 1.2 (token; 1 measured)" in out
    assert "MISS  causal forward, both directions over one: at most 1.8, 2 (token; 1 measured)" in out
    assert "MISS  causal step: times the floor: at most 1.5, 1.6 (token; 1 measured)" in out
    assert "ok  causal step over torch's reading and writing its states: at most 1.5, 1.4 (token; 1 measured)" in out
