"""The emoji pipeline is distilled, and the example's scripts go through all their stages at a tiny size."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from diffattn.distill import distill

needs_the_pipeline = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="the pipeline's tokenizer is of transformers 5"
)
EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Also where there is a GPU. accelerate remembers what it was first."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@needs_the_pipeline
def test_a_few_steps_on_the_emoji_pipeline_lower_the_loss_of_both_stages(tmp_path):
    result = distill(
        EXAMPLE / "model",
        "linear",
        ["owl"],
        tmp_path / "out",
        steps=(8, 6),
        batch=1,
        learning_rate=(3e-3, 1e-3),
        sampling=dict(steps=2, guidance=3.0),
        cache=str(tmp_path / "cache"),
        preview_prompts=0,
        progress=False,
    )
    stage_1, stage_2 = result.losses[:8], result.losses[8:]
    assert sum(stage_1[-2:]) < 0.8 * sum(stage_1[:2])
    assert sum(stage_2[-2:]) < 0.8 * sum(stage_2[:2])


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise(example):
    import measure

    rand = np.random.default_rng(0)
    pictures = rand.integers(0, 255, (2, 32, 32, 3)).astype(np.uint8)
    assert measure.difference(pictures, pictures) == {"mse": 0.0, "ssim": pytest.approx(1)}
    other = rand.integers(0, 255, (2, 32, 32, 3)).astype(np.uint8)
    found = measure.difference(pictures, other)
    assert found["mse"] == pytest.approx(((pictures / 255.0 - other / 255.0) ** 2).mean(), rel=1e-4)
    assert abs(found["ssim"]) < 0.1
    # Two flat pictures: the second factor of eq. 13 is 1, the first (2 m n + C1) / (m^2 + n^2 + C1).
    flat = [torch.full((1, 3, 16, 16), value) for value in (0.2, 0.6)]
    assert measure.structural_similarity(*flat).item() == pytest.approx((0.24 + 1e-4) / (0.4 + 1e-4), rel=1e-3)


@needs_the_pipeline
@pytest.mark.slow
def test_the_scripts_distil_score_and_compare(example, tmp_path, monkeypatch, capsys):
    import compare
    import data
    import distill as script
    import networks
    import variants

    for name in ("mqa", "sparse"):
        monkeypatch.delitem(variants.VARIANTS, name)
    records = [data.Emoji(chr(0x1F600 + i), [f"colour {i}"], f"colour {i}", 0) for i in range(4)]
    data.save(tmp_path / "emoji.zip", records, [Image.new("RGB", (128, 128), (60 * i, 99, 0)) for i in range(4)])
    tokenizer = networks.make_tokenizer([r.captions[0] for r in records])
    torch.manual_seed(0)
    parts = networks.make_vae(tiny=True), networks.make_unet(tiny=True)
    text_encoder = networks.make_text_encoder(tokenizer, tiny=True)
    networks.assemble(*parts, text_encoder, tokenizer).save_pretrained(tmp_path / "model")

    common = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "emoji.zip")]
    run = ["window", "linear", *common, "--runs", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    run += ["--steps", "1", "2", "--batch", "2", "--sampling-steps", "1", "--captions", "2", "--previews", "1"]
    monkeypatch.setattr(sys, "argv", ["distill.py", *run])
    script.main()
    assert script.from_repository(script.HERE / "model") == "examples/emoji/model"
    for name in ("window", "linear"):
        folder = tmp_path / "model" / "distilled" / name
        assert {"diffattn.safetensors", "diffattn.json", "README.md", "grid.png"} <= {p.name for p in folder.iterdir()}
        (row,) = json.loads((folder / "quality.json").read_text())
        assert row["step"] == 3 and row["captions"] == 2 and 0 <= row["top1"] <= 1 and row["ssim"] > 0
    script.main()
    assert "linear: finished before" in capsys.readouterr().out

    sizes = ["--sizes", "128", "--captions", "2", "--steps", "2", "--pictures", str(tmp_path / "pictures")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *common, *sizes])
    compare.main()
    folder = tmp_path / "model" / "distilled"
    rows = json.loads((folder / "compare.json").read_text())
    kinds = [("softmax", False), ("linear", False), ("linear", True), ("window", False), ("window", True)]
    assert [(r["variant"], r["distilled"]) for r in rows] == kinds
    assert rows[0]["mse"] == 0 and all(r["ms_per_step_of_8"] > 0 for r in rows)
    assert {"quality.png", "grid-128.png"} <= {p.name for p in folder.iterdir()}
    text = (folder / "README.md").read_text()
    assert text.count("| 128 |") == len(rows) and f"| {rows[2]['top1']:.1%} | {rows[2]['mse']:.4f} |" in text
    before = (folder / "compare.json").stat().st_mtime_ns
    compare.main()  # nothing is measured twice
    assert (folder / "compare.json").stat().st_mtime_ns == before
