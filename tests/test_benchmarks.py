"""The benchmarks' plumbing, on a CPU: cases, peers' formulas, the gate, pictures, `diffattn bench`."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from diffattn import cores, patched
from diffattn.cli import main
from diffattn.kernels.linear_attention import linear_attention_reference
from diffattn.kernels.qk_norm_rope import qk_norm_rope
from tests.models import MODELS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts import each other by name, from their own folder."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def qkv(B=2, N=20, H=3, D=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, N, H, D, generator=generator).to(dtype) for _ in range(3))


def error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


# ---- cases ----


def test_cases_are_of_sizes_that_a_kernel_takes_and_have_names_of_their_own():
    import cases

    for case in (*cases.LINEAR, *cases.SOFTMAX, *cases.NORM_ROPE):
        assert min(case.B, case.N, case.H) > 0 and 4 <= case.D <= 256, case
    for case in (*cases.SOFTMAX, *cases.NORM_ROPE):
        assert case.H % case.Hkv == 0, case
    for case in cases.NORM_ROPE:
        assert case.norm in ("head", "across", None) and case.rotary in ("complex", "interleaved", "half", None), case
        assert case.norm or case.rotary, case
    for group in (cases.LINEAR, cases.SOFTMAX, cases.NORM_ROPE):
        names = [case.name for case in group]
        assert len(set(names)) == len(names)


def test_floors_count_what_has_to_move():
    import cases

    dcae = next(case for case in cases.LINEAR if case.name == "DC-AE 4096px")
    # 0.711 ms of 4 B H N D 2 bytes at 3018 GB/s
    assert 4 * dcae.elements * 2 / 3018e6 == pytest.approx(0.711, abs=1e-3)
    mqa = next(case for case in cases.SOFTMAX if case.name == "16384 tokens, one kv head")
    # 6.84 ms at 643 TFLOP/s
    assert mqa.flops / 643e9 == pytest.approx(6.84, abs=0.01)


def test_every_section_builds_its_candidates():
    import kernels

    for title, section, section_cases in kernels.sections():
        assert section_cases, title
        if title == "norm-rope":
            continue  # its candidates hold weights on the GPU
        for case in section_cases:
            if getattr(case, "rotary", False) or title == "linear":
                case = dataclasses.replace(case, rotary=False)  # the tables are on the GPU
            candidates = section.candidates(case)
            assert candidates["ours"].ours
            assert any(not candidate.ours for candidate in candidates.values())


# ---- peers ----


def test_linear_peers_compute_the_formula():
    import peers

    q, k, v = qkv()
    wide = [x.double() for x in (q, k, v)]
    relu = linear_attention_reference(*wide)
    for peer in (peers.sana(), peers.einsum):
        assert error(peer(q, k, v), relu) < 1e-5
    assert error(peers.linfusion(q, k, v), linear_attention_reference(*wide, **peers.LINFUSION)) < 1e-5
    assert peers.sana()(q, k, v).shape == q.shape


def test_dcae_peer_and_its_memory():
    import peers

    q, k, v = qkv()
    packed = peers.channel_first(q, k, v)
    assert packed.shape == (2, 3, 24, 20) and packed.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(peers.from_channel_first(packed), (q, k, v), strict=True))
    assert error(peers.dcae(packed), linear_attention_reference(*(x.double() for x in (q, k, v)))) < 1e-5


@pytest.mark.parametrize("name", ["sana", "linfusion", "einsum"])
def test_linear_peers_compile_into_one_graph(name):
    import peers

    peer = peers.sana() if name == "sana" else getattr(peers, name)
    whole = torch.compile(peer, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(whole(*qkv()), peer(*qkv()))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("repeat", [False, True])
def test_softmax_peers_share_heads(repeat):
    import peers
    from torch.nn.attention import SDPBackend

    q, k, v = qkv(H=4)
    k, v = k[:, :, :2], v[:, :, :2]
    expected = cores.GroupedQueryAttention()(q.double(), k.double(), v.double())
    assert error(peers.sdpa(SDPBackend.MATH, repeat)(q, k, v), expected) < 1e-5
    assert error(peers.flex(q, k, v), expected) < 1e-5


@pytest.mark.parametrize("i", range(5))
def test_norm_and_rotation_peer_computes_what_ours_does(i):
    import cases
    import peers

    case = dataclasses.replace(cases.NORM_ROPE[i], B=1, N=6)
    q, k = (torch.randn(1, 6, heads, case.D) for heads in (case.H, case.Hkv))
    stock = peers.StockNormRope(case, "cpu").float()
    for theirs, ours in zip(stock(q, k), qk_norm_rope(q, k, **stock.ours()), strict=True):
        assert error(theirs, ours.double()) < 1e-5


# ---- what is reported ----


def test_digits_keeps_what_a_result_file_needs():
    from timing import digits

    assert digits(0.0123456) == 0.01235 and digits(1234567) == 1235000
    assert digits(0) == 0 and math.isnan(digits(math.nan))


def test_comparison_leaves_out_what_does_not_compute_the_same():
    from kernels import comparison

    entries = {
        "ours": {"median": 1.0, "ours": True},
        "wrong": {"median": 0.1, "wrong": "another function"},
        "int8": {"median": 0.5, "low_precision": True},
        "failed": {"failed": "no such kernel"},
        "peer": {"median": 3.0},
        "slower": {"median": 4.0},
    }
    assert comparison(entries) == {"best_peer": "peer", "speedup_over_best_peer": 3.0}
    assert comparison({"ours": {"failed": "x"}, "peer": {"median": 1.0}}) == {}


@pytest.mark.parametrize(
    "gpu, folder",
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "rtx4090")],
)
def test_results_of_a_gpu_have_a_folder(gpu, folder):
    from report import results_folder

    assert results_folder(gpu) == BENCHMARKS / "results" / folder


@pytest.mark.parametrize(
    ("then", "limit", "failed"),
    [
        ("pass", None, None),
        ("time.sleep(60)", 2, "not done after 2 s"),
        ("raise OSError('no space')", None, "no space"),
    ],
)
def test_startup_keeps_what_a_process_printed_before_its_end(then, limit, failed):
    from startup import in_a_process

    code = f"import time; print('a warning'); print('{{\"start_s\": 1.5}}', flush=True); {then}"
    row = in_a_process([sys.executable, "-c", code], {}, limit)
    assert row.pop("start_s") == 1.5
    assert (failed in row.pop("failed") if failed else True) and not row


def test_without_a_gpu_scripts_say_so(monkeypatch):
    import report

    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures an NVIDIA GPU, and torch sees none"):
        report.environment()


@pytest.mark.gpu
def test_a_candidate_that_computes_something_else_is_told_from_one_that_cannot_run():
    import cases
    import kernels
    from candidates import Candidate, eager, ours
    from sections_linear import LinearSection
    from timing import Deadline

    from diffattn.kernels import linear_attention

    def missing(*qkv):
        raise ModuleNotFoundError("No module named 'peer'\n  and more")

    section = LinearSection()
    section.candidates = lambda case: {
        "ours": ours(linear_attention),
        "values": eager(lambda q, k, v: v.clone()),
        "missing": Candidate(missing),
    }
    ceiling = {"copy_gb_s": 1000.0, "matmul_tflop_s": 100.0}
    row = kernels.measure(section, cases.Linear("tiny", 1, 256, 2, 32), ceiling, Deadline(60))
    found = row["candidates"]
    assert found["ours"]["median"] > 0 and "wrong" not in found["ours"] and found["ours"]["peak_mb"] > 0
    assert "wrong" in found["values"] and "best_peer" not in row
    assert found["missing"] == {"failed": "ModuleNotFoundError: No module named 'peer'"}


# ---- models ----


@pytest.mark.filterwarnings("ignore:diffattn")
@pytest.mark.parametrize("family", [m for m in MODELS if m.fused and str(m) != "AutoencoderDC-few-pixels"], ids=str)
def test_a_model_runs_without_its_core(family):
    """Every layer that the patch takes loses its core; the rest of the model runs."""
    from models import NoCore

    model = family.model()
    with torch.no_grad(), patched(model) as handle:
        with patched(model, NoCore(), layers=list(handle.installed)) as bare:
            assert set(bare.installed) == set(handle.installed)
            out = family.run(model, torch.Generator().manual_seed(0))
        assert out.shape == family.run(model, torch.Generator().manual_seed(0)).shape


def test_the_core_that_does_nothing_has_the_shape_of_one_that_does():
    from models import NoCore

    q, k, v = qkv()
    assert NoCore()(q, k, v) is q
    strided = q.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert NoCore()(strided, k, v).is_contiguous()
    assert NoCore()(q, k, v[..., :5]).shape == (*q.shape[:3], 5)
    compiled = torch.compile(NoCore(), backend="eager", fullgraph=True)
    assert compiled(q, k, v).shape == q.shape


# ---- pictures and the command ----


def test_plot_draws_what_the_files_hold(tmp_path):
    import plot
    from PIL import Image

    head = {"environment": {"gpu": "none", "torch": "2.0", "triton": "3.0"}, "dtype": "bfloat16"}
    rows = [
        {
            "section": "linear",
            "case": f"Sana {pixels}px",
            "shape": {"B": 2, "H": 70, "D": 32, "N": tokens},
            "floor_ms": tokens / 1e5,
            "candidates": {
                "ours": {"median": tokens / 8e4},
                "diffusers' Sana, eager": {"failed": "out of memory"} if tokens > 5000 else {"median": tokens / 1e4},
            },
        }
        for pixels, tokens in ((1024, 1024), (2048, 4096), (4096, 16384))
    ]
    (tmp_path / "kernels.json").write_text(json.dumps(head | {"rows": rows}))
    timed = {"stock": {"median": 40.0}, "patched": {"median": 20.0}, "speedup": 2.0}
    model = {"case": "Sana, big", "kind": "exact"} | timed
    older = [model, {"case": "broken", "failed": "no memory"}]
    (tmp_path / "models.json").write_text(json.dumps(head | {"rows": older}))
    pictures = plot.draw(tmp_path, tmp_path / "docs")
    assert [picture.name for picture in pictures] == ["linear_attention.png", "models.png"]
    for picture in pictures:
        assert Image.open(picture).width > 400
    (tmp_path / "models.json").write_text(json.dumps(head | {"rows": [model | {"bound": 2.5, "compiled": timed}]}))
    plot.draw(tmp_path, tmp_path / "docs")


def test_plot_draws_nothing_from_nothing(tmp_path):
    import plot

    (tmp_path / "kernels.json").write_text(json.dumps({"rows": [{"section": "linear", "case": "x", "failed": "y"}]}))
    assert plot.draw(tmp_path, tmp_path / "docs") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench"], "need a CUDA device"),
        (["bench", "kernels"], "need a CUDA device"),
        (["bench", "nothing"], "nothing"),
        (["bench", "--seconds", "0"], "--seconds"),
    ],
)
def test_bench_says_in_one_line_why_it_does_not_run(arguments, message, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["diffattn", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capfd.readouterr()
    assert ended.value.code == 2 and not printed.out
    assert message in printed.err and len(printed.err.strip().splitlines()) == 1


def test_bars_are_judged_by_their_worst_case(tmp_path, capsys, monkeypatch):
    import bars

    def row(section, case, shape, **milliseconds):
        names = {"ours": "ours", "cudnn": "cuDNN", "flash": "flash"}
        candidates = {names[k]: {"median": v, "ours": k == "ours"} for k, v in milliseconds.items()}
        return {"section": section, "case": case, "shape": shape, "candidates": candidates}

    shape = {"N": 4096, "D": 64}
    rows = [
        row("softmax", "near", shape, ours=1.02, cudnn=1.0, flash=3.0),
        row("softmax", "far", shape, ours=2.0, cudnn=1.0),
        row("softmax", "alone", shape, ours=2.0),
    ]
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": rows}))
    models = [{"case": "Lumina 2 1024px", "speedup": 1.3, "bound": 1.6}, {"case": "Sana 1.6B 1024px", "failed": "x"}]
    (tmp_path / "models.json").write_text(json.dumps({"rows": models}))
    compiled = [{"case": "Sana 1.6B 4096px", "speedup": 9.0, "compiled": {"speedup": 1.1, "bound": 1.2}}]
    (tmp_path / "models_compiled_4096px.json").write_text(json.dumps({"rows": compiled}))
    monkeypatch.setattr(sys, "argv", ["bars.py", "--results", str(tmp_path)])
    bars.main()
    out = capsys.readouterr().out
    assert "MISS  gqa_attention over torch's best kernel: at most 1.03, 2 (far; 2 measured)" in out
    assert "ok  Lumina 2 1024px, eager: times as fast as stock: at least 1.25, 1.3 (bound 1.6; 1 measured)" in out
    assert "?   Sana 1.6B 1024px, eager: times as fast as stock: least 1.55, not measured" in out
    assert "?   Sana 1.6B 4096px, eager: times as fast as stock: least 1.25, not measured" in out
    assert "MISS  Sana 1.6B 4096px, compiled: times as fast as stock: at least 1.13, 1.1 (bound 1.2; 1" in out


# ---- LinFusion ----


def test_linfusions_modules_and_ours_are_one_formula(tmp_path):
    import linfusion

    from tests.models.base import Rand
    from tests.models.unets import build_unet, unet_inputs

    unet = build_unet().eval()
    inputs = unet_inputs(Rand(torch.Generator().manual_seed(0)))
    variants = linfusion.Variants(unet, inputs, tmp_path)
    outputs = {}
    for name in (*linfusion.NAMES, "stock"):
        variants.switch(name)
        with torch.no_grad():
            outputs[name] = variants.forward()
    assert error(outputs["diffattn"], outputs["linfusion"]) <= 1e-5
    assert error(outputs["stock"], outputs["linfusion"]) > 1e-3
    own = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").processor
    assert type(own).__module__.startswith("diffusers.")
