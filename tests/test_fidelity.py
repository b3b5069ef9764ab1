"""How near converted layers are to the softmax ones: the measure itself, and what each core starts with."""

import contextlib
import io

import pytest
import torch
import transformers

import diffattn
from diffattn.demo import emoji_model
from diffattn.fidelity import add_fidelity, load, measure_fidelity, noise_for, runner
from diffattn.inspect import inspect_model
from tests.models import BY_NAME
from tests.plugins.common import UNET, error, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def test_is_the_error_of_a_layers_output_on_what_the_stock_model_gives_it():
    unet = UNET.model()
    stock, had = out(UNET, unet), processors(unet)
    errors = measure_fidelity(unet, lambda: out(UNET, unet), "linear")
    seen = {}

    def output_of_each(core):
        names = errors if core is None else [core[0]]
        with contextlib.ExitStack() as stack:
            if core is not None:
                stack.enter_context(diffattn.patched(unet, core[1], layers=core[0]))
            for name in names:
                keep = lambda m, a, o, name=name: seen.__setitem__((name, core is None), o)  # noqa: E731
                stack.callback(unet.get_submodule(name).register_forward_hook(keep).remove)
            out(UNET, unet)

    output_of_each(None)
    for name in errors:  # alone, a converted layer gets what the stock model gives it
        output_of_each((name, "linear"))
        assert errors[name] == pytest.approx(error(seen[name, False], seen[name, True]), rel=1e-4)
    assert len(errors) == 4 and FIRST in errors
    assert processors(unet) == had and torch.equal(out(UNET, unet), stock)


def test_an_exact_core_has_no_error_and_a_pair_of_streams_is_one_layer():
    flux = BY_NAME["FluxTransformer2DModel"]
    model = flux.model()
    errors = measure_fidelity(model, lambda: flux.run(model), diffattn.SoftmaxAttention())
    assert errors and max(errors.values()) <= 1e-6
    assert min(measure_fidelity(model, lambda: flux.run(model), "mqa").values()) > 1e-3


def test_a_run_that_fails_leaves_the_model_stock():
    unet = UNET.model()
    had = processors(unet)
    with pytest.raises(ZeroDivisionError):
        measure_fidelity(unet, lambda: out(UNET, unet) / (1 // 0), "linear")
    assert processors(unet) == had and not diffattn.status(unet).installed
    assert all(not m._forward_hooks for m in unet.modules())


def test_weights_that_were_trained_are_measured(tmp_path):
    unet = UNET.model()
    diffattn.patch(unet, "hedgehog")
    before = measure_fidelity(unet, lambda: out(UNET, unet), "hedgehog")
    diffattn.patch(unet, "hedgehog")
    for parameter in unet.get_submodule(FIRST).processor.parameters():
        parameter.data += 0.3
    folder = str(diffattn.save_weights(unet, tmp_path))
    after = measure_fidelity(unet, lambda: out(UNET, unet), weights=folder)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [FIRST]


@pytest.fixture(scope="module")
def emoji():
    if emoji_model() is None:
        pytest.skip("the emoji pipeline comes with a checkout")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the shipped pipeline's tokenizer is of transformers 5")
    with contextlib.redirect_stderr(io.StringIO()):
        return load(emoji_model())


def test_cores_start_near_on_the_emoji_model(emoji):
    """One step of a real picture. The order is what each form allows: what it adds brings it nearer."""
    run, words = runner(emoji, "a cat with heart eyes", None, None)
    assert words == "4 steps of 'a cat with heart eyes'"
    cores = {
        "softmax": diffattn.SoftmaxAttention(),
        "hedgehog": "hedgehog",
        "relu": "linear",
        "elu1": diffattn.LinearAttention("elu1", normalizer="mean", eps=1e-4),
        "linfusion": "linfusion",
        "mqa-svd": "mqa-svd",
        "mqa": "mqa",
    }
    mean = {}
    for name, core in cores.items():
        errors = measure_fidelity(emoji, run, core)
        assert len(errors) == (14 if name == "softmax" else 7)
        assert all(0 <= e < 1 for e in errors.values())
        mean[name] = sum(errors.values()) / len(errors)
    assert mean["softmax"] <= 1e-5
    assert mean["hedgehog"] < mean["relu"] < mean["elu1"]
    assert mean["linfusion"] == pytest.approx(mean["elu1"], rel=1e-4)  # its MLPs start as nothing
    assert mean["mqa-svd"] < mean["mqa"] / 2


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SanaTransformer2DModel", "PixArtTransformer2DModel"])
def test_models_run_on_noise(name):
    tiny = BY_NAME[name]
    model = tiny.model()
    with torch.no_grad():
        results = model(**noise_for(model, None, None), return_dict=False)
    assert results[0].isfinite().all()


def test_the_command_prints_a_column(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from diffattn.cli import app

    monkeypatch.setenv("COLUMNS", "160")
    UNET.model().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--core", "mqa-svd", "--fidelity"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    row = next(line for line in lines if FIRST in line)
    assert "rel. error" in result.output and "noise in place of latents and text" in result.output
    assert 0 < float(row.split()[-1]) < 1
    assert next(line for line in lines if FIRST.replace("attn1", "attn2") in line).rstrip().endswith("[2]")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["UNet2DConditionModel", "--fidelity"], "--fidelity: name what replaces softmax attention"),
        (["UNet2DConditionModel", "--prompt", "a"], "--weights and --prompt are for --fidelity"),
        (["UNet2DConditionModel", "--core", "mqa", "--fidelity"], "name a folder or hub id, not a class"),
    ],
)
def test_what_is_wrong_is_said(arguments, message):
    from typer.testing import CliRunner

    from diffattn.cli import app

    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 2 and message in result.output


def test_a_config_without_weights_is_named(tmp_path):
    model = UNET.model()
    model.save_config(tmp_path)
    found = inspect_model(tmp_path, "mqa-svd")  # planned on the meta device
    assert sum("pooling='svd'" in (row.installs or "") for row in found.rows) == 4
    with pytest.raises(ValueError, match="its weights cannot be loaded"):
        add_fidelity(found, tmp_path, "mqa-svd")
