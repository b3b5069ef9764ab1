"""Context parallelism: tokens split over two ranks, which are two processes on one CPU, or on a GPU each."""

import multiprocessing
import sys
import traceback

import diffusers
import pytest
import torch
import torch.distributed as dist

import diffattn
from diffattn.layers import find_layers
from tests.models import BY_NAME
from tests.models.base import Rand, flat
from tests.plugins.common import error, out, processors

pytestmark = [
    pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism"),
    pytest.mark.skipif(sys.platform == "win32" or not dist.is_available(), reason="needs fork and torch.distributed"),
]


def in_two_processes(work, folder):
    """Call `work(rank)` in two forked processes that can talk to each other; an error in one is raised here."""
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()

    def rank(number):
        try:
            # diffusers counts accelerators, of which a CPU has none.
            torch.accelerator.device_count = lambda: 2
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
            work(number)
        except BaseException:
            errors.put(traceback.format_exc())
            raise

    ranks = [context.Process(target=rank, args=(number,), daemon=True) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert errors.empty(), errors.get()
    assert [process.exitcode for process in ranks] == [0, 0]


def enable(model):
    model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))


def cut(text):
    return text[:, :6]


#: As many tokens of text on each rank, and coordinates in the form that diffusers splits.
SPLIT = {
    "FluxTransformer2DModel": dict(encoder_hidden_states=cut, txt_ids=lambda ids: ids[:6]),
    "Flux2Transformer2DModel": dict(
        encoder_hidden_states=cut,
        txt_ids=lambda ids: ids[None, :6].expand(2, -1, -1),
        img_ids=lambda ids: ids[None].expand(2, -1, -1),
    ),
    "QwenImageTransformer2DModel": dict(encoder_hidden_states=cut, encoder_hidden_states_mask=cut),
}


@pytest.mark.parametrize("name", SPLIT)
def test_softmax_goes_through_the_dispatch_of_diffusers(name, tmp_path):
    """Either order; unpatched, the model runs on as stock does."""
    if not hasattr(diffusers, "ContextParallelConfig"):
        pytest.skip(f"diffusers {diffusers.__version__} has no ContextParallelConfig")
    tiny, inputs = BY_NAME[name], SPLIT[name] | dict(return_dict=False)
    alone = out(tiny, tiny.model(), **inputs)

    def work(rank):
        stock, before, after = tiny.model(), tiny.model(), tiny.model()
        enable(stock)
        expected = out(tiny, stock, **inputs)
        assert error(expected, alone) <= 1e-5

        diffattn.patch(before, diffattn.SoftmaxAttention())
        enable(before)
        enable(after)
        had = processors(after)
        diffattn.patch(after, diffattn.SoftmaxAttention())
        for model in (before, after):
            assert error(out(tiny, model, **inputs), expected) <= 1e-5
            diffattn.unpatch(model)
            assert torch.equal(out(tiny, model, **inputs), expected)
        assert processors(after) == had
        # Another core would attend to this rank's tokens alone.
        with pytest.raises(ValueError, match=r"core: LinearAttention.* on .*attn.*: the model runs with context par"):
            diffattn.patch(after, "linear")
        assert processors(after) == had
        # Where stock is the best there is, nothing is in its way.
        assert not diffattn.patch(after).installed

    in_two_processes(work, tmp_path)


@pytest.mark.parametrize("name", SPLIT)
def test_a_refused_split_is_taken_back(name, tmp_path):
    """By unpatch(), or by a patch that can be split; until then the model does not run half set."""
    if not hasattr(diffusers, "ContextParallelConfig"):
        pytest.skip(f"diffusers {diffusers.__version__} has no ContextParallelConfig")
    tiny, inputs = BY_NAME[name], SPLIT[name] | dict(return_dict=False)
    alone = out(tiny, tiny.model(), **inputs)

    def work(rank):
        stock, model = tiny.model(), tiny.model()
        enable(stock)
        expected, had = out(tiny, stock, **inputs), processors(model)
        # The layers before it are stock's, and diffusers sets them.
        last = list(had)[-1]
        for able in (False, True):
            diffattn.patch(model, "linear", layers=last)
            with pytest.raises(NotImplementedError, match=r"LinearAttention.*unpatch\(model\).* enable_parallelism"):
                enable(model)
            with pytest.raises(RuntimeError, match=r"parts of this model.*LinearAttention.*unpatch\(model\)"):
                out(tiny, model, **inputs)
            if able:
                diffattn.patch(model, diffattn.SoftmaxAttention())
                assert error(out(tiny, model, **inputs), alone) <= 1e-5
            else:
                diffattn.unpatch(model)
                assert processors(model) == had and torch.equal(out(tiny, model, **inputs), alone)
        enable(model)
        assert error(out(tiny, model, **inputs), expected) <= 1e-5
        diffattn.unpatch(model)
        assert processors(model) == had and torch.equal(out(tiny, model, **inputs), expected)

    in_two_processes(work, tmp_path)


@pytest.mark.parametrize("core", ["linear", "mqa"])
def test_a_core_that_cannot_be_split_is_refused(core):
    """In the assignment that enable_parallelism() makes of every processor."""
    model = BY_NAME["FluxTransformer2DModel"].model()
    diffattn.patch(model, core)
    for layer in find_layers(model):
        with pytest.raises(NotImplementedError, match=r"with (Linear|GroupedQuery)Attention.*parallelism.*unpatch"):
            layer.attn.processor._parallel_config = object()
        layer.attn.processor._parallel_config = None


def test_softmax_that_may_attend_to_other_keys_is_refused():
    """Wan's cross-attention has all of the text on every rank: there stock alone knows what is split."""
    model = BY_NAME["WanTransformer3DModel"].model()
    diffattn.patch(model, diffattn.SoftmaxAttention())
    for layer in find_layers(model):
        with pytest.raises(NotImplementedError, match=r"context parallelism.*unpatch"):
            layer.attn.processor._parallel_config = object()


def test_the_exact_patch_leaves_a_split_model_to_stock():
    """Nothing says that stock can split its own linear or grouped-query attention, but ours cannot."""
    model = BY_NAME["AceStepTransformer1DModel"].model()
    installed = diffattn.patch(model).installed.keys()
    diffattn.unpatch(model)
    for layer in find_layers(model):
        layer.attn.processor._parallel_config = object()
    handle = diffattn.patch(model)
    assert not handle.installed
    assert all("context parallelism" in handle.skipped[name] for name in installed) and installed


def on_a_gpu(rank, name, degrees, folder):
    """A rank of two, in float16: `_native_cudnn` gives the sums of exponentials that a ring needs."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    tiny = BY_NAME[name]
    inputs = tiny.inputs(Rand(torch.Generator().manual_seed(1)))
    inputs |= {key: change(inputs[key]) for key, change in SPLIT[name].items()}

    def on_device(x, dtype):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to("cuda", dtype if x.is_floating_point() else None)

    def run(model, dtype=torch.float16):
        with torch.no_grad():
            return flat(model(**{key: on_device(x, dtype) for key, x in inputs.items()}, return_dict=False))

    def half():
        model = tiny.model().to("cuda", torch.float16)
        model.set_attention_backend("_native_cudnn")
        return model

    exact = run(tiny.model().to("cuda"), torch.float32)
    config = diffusers.ContextParallelConfig(**degrees)
    stock, before, after = half(), half(), half()
    stock.enable_parallelism(config=config)
    rounding = error(run(stock), exact)
    assert rounding <= 1e-2

    diffattn.patch(before, diffattn.SoftmaxAttention())
    before.enable_parallelism(config=config)
    after.enable_parallelism(config=config)
    diffattn.patch(after, diffattn.SoftmaxAttention())
    for model in (before, after):
        # no further from float32 than stock, up to what two roundings differ by
        assert error(run(model), exact) <= 1.5 * rounding
        diffattn.unpatch(model)
        assert torch.equal(run(model), run(stock))
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("degrees", [dict(ring_degree=2), dict(ulysses_degree=2)], ids=["ring", "ulysses"])
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_softmax_on_two_gpus(name, degrees, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.multiprocessing.spawn(on_a_gpu, (name, degrees, str(tmp_path)), nprocs=2)
