"""Both stages on a GPU, in bfloat16, through the Triton kernels and their backward."""

import pytest
import torch

import diffattn
from tests.distill import tiny
from tests.distill.test_autocast import CORES

pytestmark = pytest.mark.gpu
SAMPLING = dict(steps=2, guidance=2.0, height=64, width=64, batch=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CORES)
def test_every_core_learns(run, name, dtype):
    pipe = tiny.pipeline(sample_size=32).to("cuda", dtype)
    options = dict(train="projections", mixed_precision="bf16", batch=8, steps=(60, 20), learning_rate=(3e-3, 1e-3))
    result = run(model=pipe, core=CORES[name], sampling=SAMPLING, **options)
    stage_1 = result.losses[:60]
    assert sum(stage_1[-5:]) < sum(stage_1[:5])
    assert result.pipe.unet.device.type == "cuda"
    other = tiny.pipeline(sample_size=32).to("cuda", dtype)
    diffattn.patch(other, weights=str(result.folder))
    sample = torch.randn(2, 4, 32, 32, device="cuda", dtype=dtype)
    text = torch.randn(2, 7, 16, device="cuda", dtype=dtype)
    with torch.no_grad():
        outputs = [p.unet(sample, 500, text).sample for p in (other, result.pipe)]
    assert torch.equal(*outputs)


def test_a_run_that_was_cut_off_goes_on(run):
    pipe = tiny.pipeline().to("cuda")
    options = dict(core="linfusion", train="lora", mixed_precision="bf16", rank=2)
    assert not run(model=pipe, minutes=1e-6, **options).finished
    result = run(model=tiny.pipeline().to("cuda"), **options)
    assert result.finished and all(0 < loss < 10 for loss in result.losses)


def test_float16_scales_its_losses_and_resumes(run):
    options = dict(core="hedgehog", train="projections", mixed_precision="fp16", batch=8, steps=(40, 20))
    pipe = tiny.pipeline().to("cuda")
    assert not run(model=pipe, minutes=1e-6, **options).finished
    result = run(model=tiny.pipeline().to("cuda"), **options)
    assert result.finished and sum(result.losses[35:40]) < sum(result.losses[:5])
    state = torch.load(result.folder / "run" / "checkpoint.pt", weights_only=True)
    assert state["scaler"]["scale"] >= 1
