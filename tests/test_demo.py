"""`diffattn demo` on the pipeline that the repository carries."""

import os
import subprocess
import sys

import pytest
import transformers
from PIL import Image

import diffattn
from diffattn import demo
from diffattn.cli import main

needs_the_pipeline = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="the shipped pipeline's tokenizer is of transformers 5"
)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from diffattn.cli import main; main()", *arguments]
    # A wide terminal, so that no cell of the table is broken into lines.
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "140"})


@needs_the_pipeline
def test_draws_a_labelled_grid_and_a_table(tmp_path):
    out = tmp_path / "pictures.png"
    result = run("demo", "pizza", "red heart", "--steps", "1", "--out", str(out))
    assert result.returncode == 0, result.stderr
    for title in ("stock", "exact", "linear", "multi-query", "not distilled", "ms / step", "memory"):
        assert title in result.stdout
    exact = next(line for line in result.stdout.splitlines() if "exact" in line and "│" in line)
    assert " 0 of" in exact or " 1 of" in exact  # the same pictures
    assert Image.open(out).width > 4 * 160


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["demo", "  "], "a prompt is empty"),
        pytest.param(["demo", "cat " * 50], "longer than the 32 tokens", marks=needs_the_pipeline),
        (["demo", "--model", "no/such/folder"], "--model: no/such/folder is no folder or hub id"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--out", "nowhere/demo.png"], "there is no folder nowhere"),
        (["demo", "--out", "demo.txt"], "--out: got demo.txt"),
        (["demo", "--out", "."], "--out: . is a folder"),
        (["dmeo"], "dmeo"),
        (["export", "UNet2DConditionModel"], "UNet2DConditionModel: no folder here and no hub id"),
        (["export", ".", "--out", "nowhere/model.onnx"], "--out: there is no folder nowhere"),
    ],
)
def test_what_is_wrong_gets_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffattn", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert not printed.out
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_a_pipeline_that_this_diffusers_lacks_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "PipelineOfTomorrow"}')
    (tmp_path / "prompts.txt").write_text("owl")
    model = ["--model", str(tmp_path)]
    runs = ["--core", "mqa", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    for arguments in (["demo", "owl", *model], ["distill", *model, *runs]):
        monkeypatch.setattr(sys, "argv", ["diffattn", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert "PipelineOfTomorrow" in capsys.readouterr().err.splitlines()[-1]


def test_prints_its_version(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["diffattn", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0, capfd.readouterr().out) == (0, f"diffattn {diffattn.__version__}\n")


def test_a_process_ends_with_the_exit_code():
    result = run("dmeo")
    assert (result.returncode, result.stdout) == (2, "") and len(result.stderr.splitlines()) == 1


@needs_the_pipeline
def test_the_pipeline_gets_its_stock_attention_back():
    pipe = demo.load_pipeline(demo.emoji_model())
    before = dict(pipe.unet.attn_processors)
    drawings = demo.run(pipe, ["pizza"], progress=lambda *_: None, seed=0, num_inference_steps=1)
    distilled = [f"{folder.name}, distilled" for folder in demo.distilled(pipe)]
    assert [d.title for d in drawings] == ["stock", "exact", "linear", "multi-query", *distilled]
    assert all(pipe.unet.attn_processors[name] is p for name, p in before.items())
    assert "not distilled" in drawings[2].note and "not distilled" in drawings[3].note


@needs_the_pipeline
@pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")
def test_weights_that_were_distilled_for_the_pipeline_have_their_rows(tmp_path):
    pipe = demo.load_pipeline(demo.emoji_model())
    (tmp_path / "distilled").mkdir()
    with diffattn.patched(pipe, "mqa-svd"):
        diffattn.save_weights(pipe, tmp_path / "distilled" / "mqa")
    pipe.register_to_config(_name_or_path=str(tmp_path))
    drawings = demo.run(pipe, ["pizza"], progress=lambda *_: None, seed=0, num_inference_steps=1)
    assert drawings[-1].title == "mqa, distilled" and drawings[-1].note == "converted, distilled\n7 layers"
    assert drawings[-1].difference < drawings[3].difference  # not distilled, and pooled by the mean
    (tmp_path / "distilled" / "mqa" / "diffattn.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="mqa"):
        demo.run(pipe, ["pizza"], progress=lambda *_: None, seed=0, num_inference_steps=1)


@needs_the_pipeline
def test_self_attention_of_the_emoji_pipeline_sees_1024_tokens_or_more():
    pipe = demo.load_pipeline(demo.emoji_model())
    assert pipe.unet.config.sample_size**2 >= 1024
    assert pipe.unet.config.down_block_types[0] == "CrossAttnDownBlock2D"
