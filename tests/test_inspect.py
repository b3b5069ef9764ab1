"""`inspect_model` and `diffattn inspect`: from configs alone, no weights."""

import json
import sys

import pytest
import torch
from torch import nn

import diffattn
from diffattn.cli import main
from diffattn.cli_inspect import alike
from diffattn.demo import emoji_model
from diffattn.inspect import AttentionRow, build, inspect_model
from diffattn.inspect_cost import BANDWIDTH, MATMUL, MATMUL_16, SOFTMAX, Layers
from tests.models import BY_NAME

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


def by_name(inspection):
    return {row.name: row for row in inspection.rows}


@pytest.mark.parametrize("core", [None, "linear"])
@pytest.mark.parametrize(
    "name",
    [
        "UNet2DConditionModel",
        "Lumina2Transformer2DModel",
        "AnyFlowFARTransformer3DModel",
        "SanaWMTransformer3DModel",
        "SanaWMTransformer3DModel-softmax",
    ],
)
def test_says_what_patch_does(name, core, tmp_path):
    model = BY_NAME[name].model()
    model.save_config(tmp_path)
    rows = by_name(inspect_model(tmp_path, core))
    try:
        handle = diffattn.patch(model, core)
    except ValueError as refused:  # patch has nothing to do at all and says so
        assert core == "linear" and "fits no layer" in str(refused)
        assert not any(row.installs for row in rows.values())
        assert all(f"{name}: {row.why}" in str(refused) for name, row in rows.items() if row.processor)
        return
    assert {name: row.installs for name, row in rows.items() if row.installs} == {
        name: str(processor.core) for name, processor in handle.installed.items()
    }
    assert {name: row.why for name, row in rows.items() if not row.installs} == handle.skipped


def test_sana_at_two_sizes():
    for pixels, tokens in ((1024, 1024), (4096, 16384)):
        found = inspect_model("SanaTransformer2DModel", height=pixels, width=pixels)
        rows = by_name(found)
        row = rows["transformer_blocks.0.attn1"]
        assert (row.heads, row.kv_heads, row.head_dim, row.tokens) == (70, 70, 32, (tokens, tokens))
        assert (row.mechanism, row.context) == ("relu linear", "itself")
        assert row.installs.startswith("LinearAttention") and row.why == "computes what stock computes"
        text = rows["transformer_blocks.0.attn2"]
        assert (text.tokens, text.mechanism, text.context) == ((tokens, 300), "softmax", "text")
        assert text.installs is None and "stock is the fast path" in text.why
        assert 0 < text.share < row.share < 1
        assert found.share[""] == pytest.approx(sum(r.share for r in rows.values()))


def test_a_larger_picture_is_more_attention():
    shares = [inspect_model("UNet2DConditionModel", height=n, width=n).share[""] for n in (512, 1024, 2048)]
    assert 0 < shares[0] < shares[1] < shares[2] < 1


@pytest.mark.parametrize(
    "name, layer, tokens",
    [
        ("FluxTransformer2DModel", "transformer_blocks.0.attn", (64 * 64 + 512,) * 2),
        ("WanTransformer3DModel", "blocks.0.attn1", (21 * 30 * 52,) * 2),
        ("WanTransformer3DModel", "blocks.0.attn2", (21 * 30 * 52, 512)),
        ("LTXVideoTransformer3DModel", "transformer_blocks.0.attn1", (11 * 15 * 26,) * 2),
        ("CogVideoXTransformer3DModel", "transformer_blocks.0.attn1", (13 * 30 * 45 + 226,) * 2),
        ("ConsisIDTransformer3DModel", "transformer_blocks.0.attn1", (13 * 30 * 45 + 226,) * 2),
        ("CogView4Transformer2DModel", "transformer_blocks.0.attn1", (64 * 64 + 512,) * 2),
        ("WanVACETransformer3DModel", "vace_blocks.0.attn1", (21 * 30 * 52,) * 2),
        ("AnyFlowTransformer3DModel", "blocks.0.attn1", (21 * 30 * 52,) * 2),
        ("StableAudioDiTModel", "transformer_blocks.0.attn2", (1025, 512)),
        ("FluxControlNetModel", "transformer_blocks.0.attn", (64 * 64 + 512,) * 2),
        ("SD3ControlNetModel", "transformer_blocks.0.attn", (64 * 64 + 333,) * 2),
        ("SanaControlNetModel", "transformer_blocks.0.attn1", (32 * 32,) * 2),
        ("SparseControlNetModel", "down_blocks.0.attentions.0.transformer_blocks.0.attn2", (60 * 104, 77)),
        ("UNetMotionModel", "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1", (16, 16)),
        (
            "UNetSpatioTemporalConditionModel",
            "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1",
            (25, 25),
        ),
        ("I2VGenXLUNet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2", (60 * 104, 77 + 64 + 4)),
        ("Kandinsky3UNet", "down_blocks.1.attentions.0.attention", (64 * 64,) * 2),
    ],
)
def test_tokens_at_the_default_size(name, layer, tokens):
    BY_NAME[name].needed()
    assert by_name(inspect_model(name))[layer].tokens == tokens


def test_shared_heads_are_named():
    row = by_name(inspect_model("Lumina2Transformer2DModel"))["layers.0.attn"]
    assert (row.heads, row.kv_heads, row.head_dim, row.mechanism) == (24, 8, 96, "softmax, GQA")
    assert row.installs.startswith("GroupedQueryAttention")


def test_a_pipeline_folder_needs_no_weights(tmp_path):
    source = emoji_model()
    for name in ("model_index.json", "unet/config.json", "vae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((source / name).read_text())
    models, compression = build(tmp_path)
    assert list(models) == ["unet", "vae"] and compression == 4
    assert all(t.is_meta for m in models.values() for t in (*m.parameters(), *m.buffers()))
    rows = by_name(inspect_model(tmp_path))
    first, second = (f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.attn1" for i in (0, 1))
    assert rows[first].tokens == (32 * 32, 32 * 32) and rows[second].tokens == (16 * 16, 16 * 16)


def test_what_cannot_be_run_has_no_tokens_but_a_plan():
    BY_NAME["MochiTransformer3DModel"].needed()
    found = inspect_model("MochiTransformer3DModel", "linear")
    assert "could not be run" in found.inputs[""] and not found.share
    row = by_name(found)["transformer_blocks.0.attn1"]
    assert row.tokens is None and row.share is None
    assert (row.heads, row.head_dim) == (24, 128) and row.installs


@pytest.mark.parametrize("source", [None, 3, torch.nn.Linear(1, 1)], ids=lambda source: type(source).__name__)
def test_a_source_of_another_type(source):
    with pytest.raises(
        TypeError, match=rf"source: got {type(source).__name__}, expected a class name, a folder or a hub"
    ):
        inspect_model(source)


def test_layers_chooses_as_in_patch():
    rows = inspect_model("UNet2DConditionModel", "mqa", layers="mid_block*").rows
    assert {row.why for row in rows if "mid_block" not in row.name} == {"not chosen by `layers`"}
    assert all(row.installs for row in rows if "mid_block" in row.name)


class Attends(nn.Module):
    def forward(self, q, k):
        return nn.functional.scaled_dot_product_attention(q, k, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_costs_are_those_of_the_rates(dtype):
    """Large matmuls take their operations, small ones their bytes; fused attention writes no weights."""
    n, d, rate = 4096, 128, MATMUL.get(dtype, MATMUL_16)
    big = torch.empty(n, n, dtype=dtype, device="meta")
    thin = torch.empty(n, 1, dtype=dtype, device="meta")
    q = torch.empty(1, 2, n, d, dtype=dtype, device="meta")
    attention = Attends()
    with Layers(nn.ModuleDict({"attn": attention}), {"attn": "attn"}) as layers:
        big @ big
        big.view(-1).detach()
        assert layers.seconds[None] == pytest.approx(2 * n**3 / rate)
        big @ thin
        moved = (n * n + 2 * n) * dtype.itemsize
        assert layers.seconds[None] == pytest.approx(2 * n**3 / rate + moved / BANDWIDTH)
        attention(q, q[:, :, :100])
    assert layers.seen["attn"] == [(2, d, n, 100)]
    operations = 4 * 2 * n * 100 * d / (SOFTMAX if dtype == torch.bfloat16 else rate)
    moved = (2 * 2 * n * d + 2 * 2 * 100 * d) * dtype.itemsize
    assert layers.fused["attn"] == layers.seconds["attn"] == pytest.approx(max(operations, moved / BANDWIDTH))


def test_layers_that_are_alike_are_one_row_with_a_glob_that_fits():
    rows = [AttentionRow(f"blocks.{i}.attn{j}", "Attention", heads=j, share=0.1) for i in range(3) for j in (1, 2)]
    assert [(row.name, n, row.share) for row, n in alike(rows)] == [
        ("blocks.*.attn1", 3, pytest.approx(0.3)),
        ("blocks.*.attn2", 3, pytest.approx(0.3)),
    ]
    # A glob over the blocks of one size would take the other's, too.
    rows = [AttentionRow(f"blocks.{i}.attn", "Attention", heads=1 + i % 2) for i in range(4)]
    assert [(row.name, n) for row, n in alike(rows)] == [(f"blocks.{i}.attn", 1) for i in (0, 2, 1, 3)]


@pytest.fixture
def run(monkeypatch, capsys):
    """In this process: importing diffusers anew takes seconds."""

    def command(*arguments: str, columns: int = 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["diffattn", "inspect", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, *capsys.readouterr()

    return command


def test_prints_a_table(run):
    code, out, err = run("SanaTransformer2DModel", "--size", "2048")
    assert not code and not err
    lines = out.splitlines()
    assert "40 attention layers, of which patch would take 20" in lines[0]
    assert "2048 x 2048 pixels, latents 32 x 64 x 64, 300 text tokens" in lines[1]
    row = next(line for line in lines if "transformer_blocks.*.attn1" in line)
    assert row.split()[:6] == ["20", "transformer_blocks.*.attn1", "Attention", "70", "x", "32"]
    assert "4096" in row and "patched [1]" in row
    assert any(line.startswith("[1] LinearAttention(feature_map='relu'") for line in lines)
    assert any(line.startswith("[2] stock stays: softmax") for line in lines)
    assert "An estimate, not measured" in out


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_a_narrow_table_is_broken_between_words(width, run):
    _, out, _ = run("StableAudioDiTModel", columns=width)
    table = out[out.index("───") : out.index("\n[1] ")].splitlines()[1:]
    assert all(len(line) <= width for line in table)
    words = " ".join(table).split()
    assert words.count("Attention") == words.count("patched") * 2 == words.count("stock") * 2 == 2
    assert ("transformer_blocks.*.attn1" in words) == (width > 80)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["FluxTransformer2DModle"], "did you mean FluxTransformer2DModel?"),
        (["DDIMScheduler"], "DDIMScheduler: no model class of diffusers"),
        (["StableDiffusionPipeline"], "no model class of diffusers; of a pipeline, name a folder or a hub id"),
        ([""], "'': no model class of diffusers"),
        (["AutoencoderDC"], "no attention in AutoencoderDC with this config"),
        (
            ["FluxTransformer2DModel", "--frames", "3"],
            "frames: got 3, expected none: FluxTransformer2DModel takes no video",
        ),
        (["no/such/folder"], "no/such/folder: no model class of diffusers, no folder and no hub id"),
        (["tests"], "tests: the folder has neither a model_index.json nor a config.json"),
        (["HunyuanDiT2DModel"], "HunyuanDiT2DModel cannot be built from its default config"),
        (["SanaTransformer2DModel", "--size", "1000"], "height: got 1000, expected a multiple of 32"),
        (["SanaTransformer2DModel", "--size", "1024", "--height", "512"], "--size: name it, or --height and --width"),
        (["SanaTransformer2DModel", "--core", "linaer"], "core: got 'linaer', expected one of linear, mqa"),
        (
            ["SanaTransformer2DModel", "--layers", "attn3"],
            "layers: ['attn3'] matches none of these attention layers: transformer_blocks.0.attn1, "
            "transformer_blocks.0.attn2, transformer_blocks.1.attn1 and 37 more",
        ),
    ],
)
def test_what_is_wrong_gets_one_line_and_exit_code_2(arguments, message, run):
    code, out, err = run(*arguments)
    assert code == 2
    assert not out
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_hub_out_of_reach_is_named(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = run("someone/model-that-was-never-here")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "someone/model-that-was-never-here: no folder here, and the hub did not answer" in err


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config.json": "{"}, "config.json is no JSON"),
        ({"config.json": "[]"}, "config.json holds a list, expected an object"),
        ({"model_index.json": "3"}, "model_index.json holds a int, expected an object"),
        ({"config.json": '{"_class_name": 5}'}, "its _class_name is 5, no model of diffusers"),
        (
            {"config.json": '{"_class_name": "CLIPTextModel"}'},
            "its _class_name is 'CLIPTextModel', no model of diffusers",
        ),
        ({"model_index.json": '{"scheduler": ["diffusers", "DDIMScheduler"]}'}, "names no model of diffusers"),
        (
            {"config.json": json.dumps({"_class_name": "UNet2DModel", "down_block_types": ["DownBlock2D"]})},
            "UNet2DModel",
        ),
    ],
)
def test_broken_folders_are_named(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        inspect_model(tmp_path)
