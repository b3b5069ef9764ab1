"""Several threads: pipelines side by side, and a model that one thread runs while another patches it."""

import contextlib
import threading

import pytest
import torch

import diffattn
from diffattn.layers import set_processor
from tests.plugins.common import UNET, out, processors
from tests.plugins.test_pipelines import draw, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


def test_two_pipelines_at_once():
    """Patched differently, running in two threads: each draws what it draws alone."""
    pipes = [pipeline(), pipeline()]
    diffattn.patch(pipes[0], "linear")
    diffattn.patch(pipes[1], "mqa")
    alone = [draw(pipe) for pipe in pipes]
    assert not torch.equal(*alone)
    drawn = [[], []]

    def work(i):
        for _ in range(3):
            drawn[i].append(draw(pipes[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(drawn[i]) == 3 and all(torch.equal(picture, alone[i]) for picture in drawn[i])


class Pause:
    """Stops the thread that calls it until `go` is set."""

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, *_):
        self.reached.set()
        assert self.go.wait(30)

    @contextlib.contextmanager
    def inside(self, call):
        """The block runs while another thread is at the pause; then `result` has what the call returned."""

        def work():
            self.result = call()

        thread = threading.Thread(target=work, name="painter")
        thread.start()
        try:
            assert self.reached.wait(30)
            yield
        finally:
            self.go.set()
            thread.join()


def refused(call):
    return pytest.raises(RuntimeError, match=f"{call}: thread 'painter' is running UNet2DConditionModel.*Wait until")


def test_patching_a_model_that_another_thread_runs_is_refused():
    unet, pause = UNET.model(), Pause()
    had, stock = processors(unet), out(UNET, unet)
    hook = unet.mid_block.register_forward_hook(pause)
    with pause.inside(lambda: out(UNET, unet)):
        with refused("patch"):
            diffattn.patch(unet, "linear")
        assert processors(unet) == had
    hook.remove()
    assert torch.equal(pause.result, stock)
    assert diffattn.patch(unet, "linear").installed  # it has returned


@pytest.mark.parametrize(
    "undo", [diffattn.unpatch, lambda unet: diffattn.status(unet).undo()], ids=["unpatch", "undo"]
)
def test_unpatching_a_model_that_another_thread_runs_is_refused(undo):
    unet, pause = UNET.model(), Pause()
    stock = out(UNET, unet)
    diffattn.patch(unet, "linear")
    has, patched = processors(unet), out(UNET, unet)
    hook = unet.mid_block.register_forward_hook(pause)
    with pause.inside(lambda: out(UNET, unet)):
        with refused("undo"):
            undo(unet)
        assert processors(unet) == has
    hook.remove()
    assert torch.equal(pause.result, patched)
    undo(unet)
    assert torch.equal(out(UNET, unet), stock)


def test_patching_a_pipeline_between_two_of_its_steps_is_refused():
    """No model runs there, but the next step would go on with other processors."""
    pipe, pause = pipeline(), Pause()
    alone = draw(pipe)

    def at_the_end(pipe, step, time, arguments):
        pause()
        return arguments

    with pause.inside(lambda: draw(pipe, callback_on_step_end=at_the_end)):
        for target in (pipe, pipe.unet):
            with refused("patch"):
                diffattn.patch(target, diffattn.SoftmaxAttention(), layers="*down_blocks*attn1")
        other = pipeline()
        other.vae = pipe.vae  # what two pipelines share, this patch leaves alone
        assert diffattn.patch(other, "linear").installed
    assert torch.equal(pause.result, alone)


def test_a_callback_of_the_pipeline_itself_may_patch():
    pipe = pipeline()

    def unpatch_after_the_first(pipe, step, time, arguments):
        diffattn.unpatch(pipe)
        return arguments

    diffattn.patch(pipe, "linear")
    draw(pipe, callback_on_step_end=unpatch_after_the_first)
    assert not diffattn.status(pipe).installed


def test_a_call_that_begins_while_patch_is_at_work_is_noticed(monkeypatch):
    unet, pause = UNET.model(), Pause()
    had, swapped = processors(unet), []
    hook = unet.mid_block.register_forward_hook(pause)
    running = pause.inside(lambda: out(UNET, unet))

    def swap(attn, *rest):
        set_processor(attn, *rest)
        swapped.append(attn)
        if len(swapped) == 2:
            running.__enter__()

    monkeypatch.setattr("diffattn.layers.set_processor", swap)
    with refused("patch"):
        diffattn.patch(unet, "linear")
    running.__exit__(None, None, None)
    hook.remove()
    assert len(swapped) == 8  # four, and back
    assert processors(unet) == had


def test_a_layer_has_a_processor_at_every_moment_of_a_swap():
    """A thread that runs the layer looks it up as an attribute, whatever kind comes and goes."""
    attn = UNET.model().mid_block.attentions[0].transformer_blocks[0].attn1

    class Watched(dict):
        """Looks the processor up after every change, as a call would."""

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            assert callable(attn.processor)

        def pop(self, *arguments):
            value = super().pop(*arguments)
            assert callable(attn.processor)
            return value

    keys = list(attn.state_dict())
    stock, ours = attn.processor, diffattn.LinearAttnProcessor()
    attn.__dict__["_modules"] = Watched(attn._modules)
    for processor in (ours, diffattn.MQAAttnProcessor(), stock, ours):
        set_processor(attn, processor)
        assert attn.processor is processor
    attn.__dict__["_modules"] = dict(attn._modules)
    set_processor(attn, stock)
    assert list(attn.state_dict()) == keys
