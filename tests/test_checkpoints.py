"""Weights that do not fit, or are none: the error says what came and what would fit, and the model is as it was."""

import json
import pickle
from pathlib import Path

import pytest
import torch

import diffattn
from tests.plugins.common import UNET, out, processors
from tests.test_linfusion import layers_of, tensors_of, write

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def unet():
    return UNET.model()


@pytest.fixture
def linfusion(unet, tmp_path):
    """Writes a LinFusion folder, changed."""

    def make(change=lambda config, tensors: None):
        mids = [None] * len(layers_of(unet))
        return Path(write(tmp_path / "linfusion", unet, tensors_of(unet, mids), mids, change))

    return make


@pytest.fixture
def ours(tmp_path):
    other = UNET.model()
    diffattn.patch(other, "hedgehog")
    return diffattn.save_weights(other, tmp_path / "ours")


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def refused(model, weights, match, core=None, error=ValueError):
    """By `patch` on a stock model, and on one that has the core already, whose weights stay too."""
    had, stock = processors(model), out(UNET, model)
    with pytest.raises(error, match=match):
        diffattn.patch(model, core, weights=str(weights))
    assert processors(model) == had and not diffattn.status(model).installed
    assert torch.equal(out(UNET, model), stock)
    diffattn.patch(model, core or "linfusion")
    for load in (diffattn.load_weights, lambda target, path: diffattn.patch(target, core, weights=path)):
        had, before = processors(model), out(UNET, model)
        with pytest.raises(error, match=match):
            load(model, str(weights))
        assert processors(model) == had and torch.equal(out(UNET, model), before)


def test_cut_off_files(unet, linfusion, ours):
    folder = linfusion()
    cut(folder / FILE)
    refused(unet, folder, rf"{FILE} \(\d+ bytes\) is cut off or no safetensors")
    diffattn.unpatch(unet)
    cut(ours / "diffattn.safetensors")
    refused(unet, ours, r"diffattn.safetensors \(\d+ bytes\) is cut off", "hedgehog")


def test_wrong_folders(unet, tmp_path, linfusion):
    refused(unet, tmp_path / "nothing", "which is no folder here, expected a folder with", error=FileNotFoundError)
    diffattn.unpatch(unet)
    (tmp_path / "note.txt").write_text("")
    refused(unet, tmp_path, r"no diffattn.json and no diffattn.safetensors.*it has note.txt", error=FileNotFoundError)
    diffattn.unpatch(unet)
    unet.save_pretrained(tmp_path / "unet")
    refused(unet, tmp_path / "unet", r"config.json \(UNet2DConditionModel\) has no LinFusion modules_list")
    diffattn.unpatch(unet)
    file = linfusion() / FILE
    refused(unet, file, "got the file .*, expected its folder")


def test_pickles(unet, tmp_path):
    file = tmp_path / "diffusion_pytorch_model.bin"
    file.write_bytes(pickle.dumps({}))
    (tmp_path / "config.json").write_text("{}")
    refused(unet, tmp_path, "has diffusion_pytorch_model.bin, pickles, which can run any code")
    diffattn.unpatch(unet)
    refused(unet, file, "a pickle, which can run any code")


def test_broken_configs(unet, linfusion, ours):
    folder = linfusion()
    (folder / "config.json").write_text('{"modules_list": [')
    refused(unet, folder, r"config.json is no JSON")
    diffattn.unpatch(unet)
    (ours / "diffattn.json").write_text(json.dumps({"format_version": 1, "layers": [1]}))
    refused(unet, ours, r"diffattn.json names no layers")


def test_a_core_that_is_not_known(unet, ours):
    config = json.loads((ours / "diffattn.json").read_text())
    config["layers"][FIRST]["core"] = "QuantumAttention"
    (ours / "diffattn.json").write_text(json.dumps(config))
    refused(unet, ours, f"QuantumAttention.*|but layer {FIRST}")


def test_another_architecture(unet, linfusion, ours):
    def rename(config, tensors):
        config["modules_list"][0]["module_name"] = "down_blocks.7.attentions.0.transformer_blocks.0.attn1"

    refused(unet, linfusion(rename), r"another model or other layers: down_blocks.7\S+ not found among down_blocks.0")
    from tests.plugins.common import FLUX

    model = FLUX.model()
    with pytest.raises(ValueError, match=rf"another model or other layers: {FIRST}.* and 1 more not found among"):
        diffattn.patch(model, weights=str(ours))
    assert not diffattn.status(model).installed


def test_another_number_of_heads(unet, linfusion):
    def change(config, tensors):
        config["modules_list"][0]["heads"] *= 2

    refused(unet, linfusion(change), rf"layer {FIRST} was saved with 8 heads, the model's has 4")


@pytest.mark.parametrize("name", ["to_q.weight", "to_out.0.bias", "to_k_.0.weight"])
def test_shapes_that_differ(unet, linfusion, name):
    def change(config, tensors):
        tensors[f"0.{name}"] = torch.zeros([n + 1 for n in tensors[f"0.{name}"].shape])

    there = r"\(17, 17\)" if name.endswith("weight") else r"\(17,\)"
    here = r"\(16, 16\)" if name.endswith("weight") else r"\(16,\)"
    refused(unet, linfusion(change), rf"of layer {FIRST} was saved with shape {there}, the model has {here}")


@pytest.mark.parametrize("change", ["missing", "extra", "unknown", "empty"])
def test_tensors_that_are_too_few_or_too_many(unet, linfusion, change):
    def changed(config, tensors):
        if change == "missing":
            del tensors["0.to_v.weight"], tensors["0.to_q_.3.bias"]
        if change == "extra":
            tensors["0.to_q.bias"] = torch.zeros(16)
        if change == "unknown":
            tensors["99.to_q.weight"] = torch.zeros(1)
        if change == "empty":
            for name in [name for name in tensors if name.startswith("0.")]:
                del tensors[name]

    match = {
        "missing": f"parameters of layer {FIRST} differ: .*only in the model: core.input_maps.q.3.bias",
        "extra": f"parameters of layer {FIRST} differ: only in .*: core.projections.q.bias",
        "unknown": "tensors that LinFusion has not: 99.to_q.weight",
        "empty": f"no tensors of its module 0, {FIRST}",
    }[change]
    refused(unet, linfusion(changed), match)


def test_a_core_that_the_weights_are_not_for(unet, linfusion):
    folder = linfusion()
    refused(unet, folder, rf"core: got LinearAttention\(feature_map='relu'.*but layer {FIRST} .*'elu1'", "linear")


def test_a_model_whose_projections_cannot_be_replaced(unet, linfusion):
    folder = linfusion()
    unet.fuse_qkv_projections()
    had, stock = processors(unet), out(UNET, unet)
    with pytest.raises(ValueError, match=f"{FIRST}: input_map: .* fused"):
        diffattn.patch(unet, weights=str(folder))
    assert processors(unet) == had and torch.equal(out(UNET, unet), stock)


def test_projections_for_a_model_that_hands_none_over(unet, tmp_path):
    """Weights of `"hedgehog"` need none, but these were saved with projections of their own."""
    other = UNET.model()
    for name, processor in diffattn.patch(other, "hedgehog").installed.items():
        attn = other.get_submodule(name)
        processor.core.own(type(processor).layer_info(attn), ["v"])
    folder = diffattn.save_weights(other, tmp_path)
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"cannot have its own 'v' here: .* hands over none.* not fused"):
        diffattn.patch(unet, weights=str(folder))
    assert not diffattn.status(unet).installed


def test_offloaded_models(unet, linfusion):
    from accelerate import cpu_offload

    folder = linfusion()
    cpu_offload(unet, execution_device=torch.device("cpu"))
    diffattn.patch(unet, weights=str(folder))  # onto an offloaded model: read from where it is kept
    other = UNET.model()
    diffattn.patch(other, weights=str(folder))
    assert torch.equal(out(UNET, unet), out(UNET, other))
    cpu_offload(other, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"layer {FIRST} is offloaded: load weights first"):
        diffattn.load_weights(other, folder)
    with pytest.raises(ValueError, match=r"is offloaded: save the weights before"):
        diffattn.save_weights(other, folder)


def test_sharded_and_variant_files(unet, linfusion):
    from safetensors.torch import load_file, save_file

    folder = linfusion()
    diffattn.patch(unet, weights=str(folder))
    expected = out(UNET, unet)
    tensors = load_file(folder / FILE)
    (folder / FILE).rename(folder / FILE.replace(".safe", ".fp32.safe"))
    other = UNET.model()
    diffattn.patch(other, weights=str(folder))
    assert torch.equal(out(UNET, other), expected)
    (folder / FILE.replace(".safe", ".fp32.safe")).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / (FILE + ".index.json")).write_text(json.dumps(index))
    other = UNET.model()
    diffattn.patch(other, weights=str(folder))
    assert torch.equal(out(UNET, other), expected)
    (folder / "b.safetensors").unlink()
    refused(UNET.model(), folder, "no diffattn.json", error=FileNotFoundError)


def test_saved_from_a_pipeline_and_loaded_into_its_model(tmp_path):
    class Pipeline:
        def __init__(self):
            self.components = {"unet": UNET.model(), "controlnet": UNET.model()}

    pipe, unet = Pipeline(), UNET.model()
    diffattn.patch(pipe, "hedgehog")
    with torch.no_grad():
        for parameter in pipe.components["unet"].get_submodule(FIRST).processor.parameters():
            parameter += 0.1
    expected = out(UNET, pipe.components["unet"])
    folder = str(diffattn.save_weights(pipe, tmp_path / "pipe"))
    diffattn.patch(unet, weights=folder)
    assert torch.equal(out(UNET, unet), expected)
    folder = str(diffattn.save_weights(unet, tmp_path / "unet"))
    other = Pipeline()
    handle = diffattn.patch(other, weights=folder)
    assert torch.equal(out(UNET, other.components["unet"]), expected)
    assert all(name.startswith("unet.") for name in handle.installed)  # not the ControlNet of the same layers


def test_layers_of_the_weights_can_be_chosen(unet, ours):
    handle = diffattn.patch(unet, weights=str(ours), layers="mid*")
    assert list(handle.installed) == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert "not among the weights" not in handle.skipped[FIRST]
    diffattn.unpatch(unet)
    handle = diffattn.patch(unet, weights=str(ours))
    assert handle.skipped["mid_block.attentions.0.transformer_blocks.0.attn2"] == "not among the weights"


def test_hub_ids(unet, linfusion, monkeypatch):
    """Asked for safetensors and configs alone; what the hub cannot give is said."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    folder, asked = linfusion(), {}

    def download(repo, allow_patterns):
        asked[repo] = allow_patterns
        if repo == "user/missing":
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # it is made of a response of the server
        if repo == "user/offline":
            raise LocalEntryNotFoundError("no connection\nand more")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    diffattn.patch(unet, "linfusion", weights="user/linfusion")
    assert not any(".bin" in pattern or pattern == "*" for pattern in asked["user/linfusion"])
    for repo, match in (("user/missing", "'user/missing', expected a folder"), ("user/offline", "no connection$")):
        with pytest.raises(FileNotFoundError, match=match):
            diffattn.patch(UNET.model(), weights=repo)
