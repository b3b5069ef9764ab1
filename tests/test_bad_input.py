"""What does not fit is one error that names the argument, what came and what would fit."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import diffattn
from diffattn import GroupedQueryAttention, LinearAttention, LinearAttnProcessor, MQAAttnProcessor, SoftmaxAttention
from diffattn.layers import find_layers
from tests.models import BY_NAME
from tests.models.unets import build_unet

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

#: Public functions whose bad input other files test.
ELSEWHERE = {"streaming": "its own tests"}


def test_every_public_function_is_here():
    text = Path(__file__).read_text().partition("def test_every_public_function_is_here")[2]
    functions = [name for name in diffattn.__all__ if inspect.isfunction(getattr(diffattn, name))]
    missing = [name for name in functions if name not in ELSEWHERE and not re.search(rf'"{name}"|\.{name}\(', text)]
    assert not missing, "give each new public function a case of bad input here, or name the file that has it"


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return build_unet(attention_head_dim=(4, 8)).eval()


def learned(features=4):
    return LinearAttention(nn.Sequential(nn.Linear(features, features), nn.ReLU()))


TARGETS = {
    "nothing": None,
    "a number": 3,
    "a hub id": "user/model",
    "a list": [nn.Linear(1, 1)],
    "a dict": {"unet": nn.Linear(1, 1)},
    "a class": nn.Linear,
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", ["patch", "unpatch", "patched", "status", "save_weights", "finalize", "set_grid"])
def test_a_target_of_another_type(name, target, tmp_path):
    more = {"save_weights": [tmp_path / "weights"], "set_grid": [(2, 3)]}.get(name, [])
    came = type(target).__name__
    with pytest.raises(TypeError, match=rf"^target: got {came}, expected a diffusers pipeline or model$"):
        result = getattr(diffattn, name)(target, *more)
        result.__enter__()  # of patched
    assert not list(tmp_path.iterdir())


def test_load_weights_into_a_target_of_another_type(unet, tmp_path):
    diffattn.patch(unet, learned())
    diffattn.save_weights(unet, tmp_path)
    with pytest.raises(TypeError, match=r"^target: got str, expected a diffusers pipeline or model$"):
        diffattn.load_weights("user/model", tmp_path)


@pytest.mark.parametrize("target", [nn.Linear(1, 1), nn.ModuleDict()], ids=str)
def test_models_without_attention(target, tmp_path):
    for call in (diffattn.patch, lambda model: diffattn.patched(model).__enter__()):
        with pytest.raises(ValueError, match=r"^target: no attention layer of \w+ can be patched; found none$"):
            call(target)
    assert not diffattn.status(target).installed
    diffattn.unpatch(target)  # nothing to put back is no error
    with pytest.raises(ValueError, match="no diffattn processor installed"):
        diffattn.save_weights(target, tmp_path / "weights")


NAMES = "one of linear, mqa.* or a core instance"
LAYERS = r"expected a glob, a list of globs or a function \(name, attn\) -> bool"
BAD_ARGUMENTS = {
    "core: a misspelt name": (dict(core="linaer"), ValueError, rf"core: got 'linaer', expected {NAMES}"),
    "core: no name": (dict(core=""), ValueError, rf"core: got '', expected {NAMES}"),
    "core: a number": (dict(core=3), TypeError, "core: got int, expected None, a name or an AttentionCore instance"),
    "core: a class": (dict(core=LinearAttention), TypeError, "core: got type, expected None, a name or"),
    "core: a module": (dict(core=nn.ReLU()), TypeError, "core: got ReLU, expected None, a name or"),
    "core: heads that do not divide": (
        dict(core=GroupedQueryAttention(kv_heads=3)),
        ValueError,
        r"\S*attn1: kv_heads: got 3, expected a divisor of the layer's 4 key/value heads",
    ),
    "layers: a glob that matches nothing": (
        dict(layers="attn3"),
        ValueError,
        r"layers: 'attn3' matches none of these attention layers:.*mid_block",
    ),
    "layers: no globs": (dict(layers=[]), ValueError, r"layers: \[\] matches none of these.*mid_block"),
    "layers: a function that takes none": (
        dict(layers=lambda name, attn: False),
        ValueError,
        r"layers: .* matches none of these.*mid_block",
    ),
    "layers: a number": (dict(layers=3), TypeError, f"layers: got 3, {LAYERS}"),
    "layers: a number among globs": (dict(layers=["mid*", 3]), TypeError, rf"layers: got \['mid\*', 3\], {LAYERS}"),
    "layers: bytes": (dict(layers=b"mid*"), TypeError, f"layers: got b'mid.*', {LAYERS}"),
    "weights: a number": (dict(weights=3), TypeError, "weights: got int, expected a folder or a hub id"),
    "weights: tensors": (dict(weights={}), TypeError, "weights: got dict, expected a folder or a hub id"),
    "weights: no folder": (
        dict(weights="/no/such"),
        FileNotFoundError,
        "weights: got '/no/such', .*expected a folder",
    ),
    "compile: another word": (
        dict(compile="fast"),
        ValueError,
        r"compile: got 'fast', expected one of \(None, 'regional', 'full'\)",
    ),
    "compile: True": (dict(compile=True), ValueError, r"compile: got True, expected one of \(None, 'regional'"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
@pytest.mark.parametrize("call", ["patch", "patched"])
def test_arguments_of_patch(unet, call, case):
    arguments, error, match = BAD_ARGUMENTS[case]
    had = {layer.name: layer.attn.processor for layer in find_layers(unet)}
    with pytest.raises(error, match=f"(?s)^{match}"):
        result = getattr(diffattn, call)(unet, **dict(core="linear") | arguments)
        result.__enter__()
    assert {layer.name: layer.attn.processor for layer in find_layers(unet)} == had


def test_weights_for_another_model(unet, tmp_path):
    diffattn.patch(unet, learned())
    diffattn.save_weights(unet, tmp_path)
    flux = BY_NAME["FluxTransformer2DModel"].model()
    with pytest.raises(ValueError, match=r"^weights: .* is for another model or other layers: .* not found among"):
        diffattn.patch(flux, learned(), weights=tmp_path)
    assert not diffattn.status(flux).installed
    diffattn.patch(flux, learned(16))
    before = {name: t.clone() for name, t in flux.state_dict().items()}
    with pytest.raises(ValueError, match=r"^weights: .* is for another model or other layers"):
        diffattn.load_weights(flux, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in flux.state_dict().items())


@pytest.mark.parametrize("path", [3, {}, torch.ones(1)], ids=lambda path: type(path).__name__)
def test_a_path_of_another_type(unet, path):
    diffattn.patch(unet, learned())
    with pytest.raises(TypeError, match=rf"^weights: got {type(path).__name__}, expected a folder or a hub id$"):
        diffattn.load_weights(unet, path)
    with pytest.raises(TypeError, match=rf"^path: got {type(path).__name__}, expected a string or a path$"):
        diffattn.save_weights(unet, path)


MAPS = "one of relu, elu1, softmax"
CONSTRUCTORS = {
    "feature_map: unknown": (lambda: LinearAttention("gelu"), ValueError, f"feature_map: got 'gelu', .*{MAPS}"),
    "feature_map: a function": (lambda: LinearAttention(torch.relu), ValueError, f"feature_map: got .*{MAPS}"),
    "feature_map: a class": (lambda: LinearAttention(nn.ReLU), ValueError, f"feature_map: got .*{MAPS}"),
    "normalizer": (
        lambda: LinearAttention(normalizer=None),
        ValueError,
        "normalizer: got None, expected 'sum' or 'mean",
    ),
    "eps: text": (lambda: LinearAttention(eps="1"), TypeError, "eps: got str, expected a number"),
    "eps: negative": (lambda: LinearAttention(eps=-1.0), ValueError, "eps: got -1.0, expected 0 or more"),
    "eps: no number": (lambda: LinearAttention(eps=float("nan")), ValueError, "eps: got nan, expected 0 or more"),
    "kv_heads: text": (
        lambda: GroupedQueryAttention("2"),
        ValueError,
        "kv_heads: got '2', expected a positive integer",
    ),
    "kv_heads: none left": (
        lambda: GroupedQueryAttention(0),
        ValueError,
        "kv_heads: got 0, expected a positive integer",
    ),
    "kv_heads: a switch": (
        lambda: GroupedQueryAttention(kv_heads=True),
        ValueError,
        "kv_heads: got True, expected a positive integer",
    ),
    "precision": (lambda: GroupedQueryAttention(precision=8), ValueError, "precision: got 8, expected None or 'int8'"),
    "softmax has no arguments": (lambda: SoftmaxAttention(3), TypeError, "takes 1 positional argument"),
    "by hand: a module": (
        lambda: LinearAttnProcessor(nn.ReLU()),
        TypeError,
        "feature_map: got ReLU, expected a name.*diffattn.patch",
    ),
    "by hand: unknown": (lambda: LinearAttnProcessor("gelu"), ValueError, f"feature_map: got 'gelu', .*{MAPS}"),
    "by hand: heads": (lambda: MQAAttnProcessor(0), ValueError, "kv_heads: got 0, expected a positive integer"),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_arguments_of_cores_and_processors(case):
    make, error, match = CONSTRUCTORS[case]
    with pytest.raises(error, match=match):
        make()


CORES = pytest.mark.parametrize("core", [LinearAttention(), GroupedQueryAttention(), SoftmaxAttention()], ids=str)
Q = torch.randn(2, 5, 4, 8)
BAD_TENSORS = {
    "a list": (dict(q=[1]), TypeError, r"q: got list, expected a tensor \(B, N, H, D\)"),
    "integers": (dict(q=Q.long()), TypeError, "q: got torch.int64, expected one of"),
    "three axes": (dict(q=Q[0]), ValueError, r"q: got shape \(5, 4, 8\), expected \(B, N, H, D\)"),
    "heads that do not divide": (
        dict(k=Q[:, :, :3], v=Q[:, :, :3]),
        ValueError,
        "k: got 3 heads, expected a divisor of the 4 heads of q",
    ),
    "another dtype": (dict(k=Q.half()), ValueError, "k: got torch.float16, expected torch.float32 as q"),
    "another head dim": (dict(k=Q[..., :4]), ValueError, r"k: got shape .*, expected \(2, M, Hkv, 8\)"),
    "another length": (dict(v=Q[:, :3]), ValueError, r"v: got shape \(2, 3, 4, 8\), expected \(2, 5, 4\)"),
    "mask: a list": (dict(mask=[True] * 5), TypeError, "mask: got list, expected a tensor or None"),
    "mask: of numpy": (dict(mask=np.ones(5, bool)), TypeError, "mask: got ndarray, expected a tensor or None"),
    "mask: integers": (dict(mask=torch.ones(5).long()), TypeError, "mask: got torch.int64, expected torch.bool or"),
    "mask: another length": (
        dict(mask=torch.ones(2, 1, 1, 4)),
        ValueError,
        r"mask: got shape \(2, 1, 1, 4\), expected one that broadcasts to \(B, H, N, M\) = \(2, 4, 5, 5\)",
    ),
    "mask: another batch": (
        dict(mask=torch.ones(3, 1, 1, 5)),
        ValueError,
        r"mask: got shape \(3, 1, 1, 5\), expected",
    ),
    "scale: text": (dict(scale="1"), TypeError, "scale: got str, expected a number or None"),
    "scale: no number": (dict(scale=float("inf")), ValueError, "scale: got inf, expected a finite number or None"),
}


@CORES
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_arguments_of_a_core(core, case):
    arguments, error, match = BAD_TENSORS[case]
    with pytest.raises(error, match=f"^{match}"):
        core(**dict(q=Q, k=Q, v=Q) | arguments)


@CORES
def test_the_smallest_mask_is_one_over_keys(core):
    mask = torch.tensor([True, True, False, True, False])
    torch.testing.assert_close(core(Q, Q, Q, mask=mask), core(Q, Q, Q, mask=mask[None, None, None]))


@pytest.mark.parametrize("mask", [[1] * 9, "all", np.ones((2, 1, 9))], ids=lambda mask: type(mask).__name__)
@pytest.mark.parametrize(
    "name, layer, width",
    [
        ("UNet2DConditionModel", "mid_block.attentions.0.transformer_blocks.0.attn1", 32),
        ("FluxTransformer2DModel", "single_transformer_blocks.0.attn", 32),
    ],
)
def test_masks_of_layers_that_are_no_tensors(name, layer, width, mask):
    model = BY_NAME[name].model()
    diffattn.patch(model, SoftmaxAttention())
    came = type(mask).__name__
    with pytest.raises(TypeError, match=rf"^attention_mask: got {came}, expected a tensor or None$"):
        model.get_submodule(layer)(torch.randn(2, 9, width), attention_mask=mask)
