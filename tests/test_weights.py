"""save_weights and load_weights for cores that own parameters."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import diffattn
from tests.models.unets import build_unet, run_unet

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


class LearnedMap(nn.Module):
    def __init__(self, features: int = 4, width: int = 6):
        super().__init__()
        self.proj = nn.Linear(features, width)

    def forward(self, x):
        return self.proj(x).relu()


def patched_unet(seed: int, core=None):
    torch.manual_seed(0)
    unet = build_unet(attention_head_dim=(4, 8)).eval()
    handle = diffattn.patch(unet, core or diffattn.LinearAttention(LearnedMap()))
    torch.manual_seed(seed)
    for processor in handle.installed.values():
        for parameter in processor.parameters():
            nn.init.normal_(parameter)
    return unet


def run(unet):
    with torch.no_grad():
        return run_unet(unet, torch.Generator().manual_seed(1))


def test_round_trip(tmp_path):
    one, two = patched_unet(1), patched_unet(2)
    assert not torch.equal(run(one), run(two))
    folder = diffattn.save_weights(one, tmp_path / "weights")
    assert sorted(p.name for p in folder.iterdir()) == ["diffattn.json", "diffattn.safetensors"]
    diffattn.load_weights(two, folder)
    assert torch.equal(run(one), run(two))


def test_patch_loads_weights_without_a_warning(tmp_path, recwarn):
    one = patched_unet(1)
    diffattn.save_weights(one, tmp_path)
    torch.manual_seed(0)
    other = build_unet(attention_head_dim=(4, 8)).eval()
    recwarn.clear()
    diffattn.patch(other, diffattn.LinearAttention(LearnedMap()), weights=str(tmp_path))
    assert not [w for w in recwarn if "distilled" in str(w.message)]
    assert torch.equal(run(one), run(other))


def test_only_what_was_added_is_saved(tmp_path):
    from safetensors.torch import load_file

    diffattn.save_weights(patched_unet(1), tmp_path)
    names = load_file(tmp_path / "diffattn.safetensors").keys()
    assert len(names) == 8 and all(".attn1.core.feature_map.proj." in name for name in names)


@pytest.mark.parametrize("change", ["layers", "core", "shape", "version"])
def test_weights_that_do_not_fit_change_nothing(tmp_path, change):
    diffattn.save_weights(patched_unet(1), tmp_path)
    core = {
        "core": diffattn.LinearAttention(LearnedMap(), eps=1e-4),
        "shape": diffattn.LinearAttention(LearnedMap(width=8)),
    }.get(change)
    unet = patched_unet(2, core)
    if change == "layers":
        diffattn.patch(unet, layers="mid*attn1")
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(_stock())
    if change == "version":
        config = json.loads((tmp_path / "diffattn.json").read_text())
        (tmp_path / "diffattn.json").write_text(json.dumps(config | {"format_version": 99}))
    before = run(unet)
    match = {
        "layers": r"mid_block\S* not found among down_blocks",
        "core": r"got LinearAttention\(.*eps=0.0001\), but layer down_blocks.* was saved with .*'eps': 1e-15",
        "shape": r"weight of layer down_blocks\S* was saved with shape \(6, 4\), the model has \(8, 4\)",
        "version": "99",
    }
    with pytest.raises(ValueError, match=match[change]):
        diffattn.load_weights(unet, tmp_path)
    assert torch.equal(run(unet), before)


def _stock():
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()


def test_missing_files_and_unpatched_models_are_named(tmp_path):
    unet = patched_unet(1)
    with pytest.raises(FileNotFoundError, match=r"diffattn.json and no diffattn.safetensors"):
        diffattn.load_weights(unet, tmp_path)
    diffattn.unpatch(unet)
    with pytest.raises(ValueError, match="no diffattn processor installed"):
        diffattn.save_weights(unet, tmp_path)
    assert not list(tmp_path.iterdir())


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x).relu()).relu()


def test_a_map_with_tied_weights(tmp_path):
    core = diffattn.LinearAttention(Tied())
    one, other = patched_unet(1, core), patched_unet(2, core)
    diffattn.save_weights(one, tmp_path)
    diffattn.load_weights(other, tmp_path)
    assert torch.equal(run(one), run(other))


def test_arguments_that_are_numbers_of_numpy_are_saved(tmp_path):
    core = diffattn.LinearAttention("elu1", eps=np.float32(1e-4))
    one = patched_unet(1, core)
    diffattn.save_weights(one, tmp_path)
    other = build_unet(attention_head_dim=(4, 8)).eval()
    diffattn.patch(other, weights=tmp_path)
    assert {p.core.eps for p in diffattn.status(other).installed.values()} == {float(np.float32(1e-4))}
