"""Calls in any order leave a model that can be taken back; a failure half-way leaves it as it was."""

import importlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import diffattn
from diffattn.processors import CoreAttnProcessor
from tests.plugins.common import FLUX, UNET, error, learned, load_lora, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


class AnyOrder(RuleBasedStateMachine):
    """Two models get the same calls of diffusers; one is patched and unpatched in between.

    Whenever it is unpatched, the two give the same bits.
    """

    @initialize(tiny=st.sampled_from([UNET, FLUX]))
    def start(self, tiny):
        self.tiny, self.ours, self.stock = tiny, tiny.model(), tiny.model()
        self.before = processors(self.ours)
        self.lora = self.fused = self.swapped = False

    def both(self, call, *arguments):
        for model in (self.ours, self.stock):
            getattr(model, call)(*arguments)

    @rule(core=st.sampled_from(["softmax", "linear", "mqa", "learned"]), one=st.booleans())
    def patch(self, core, one):
        features = 16 if self.tiny is FLUX else 4
        core = {"softmax": diffattn.SoftmaxAttention(), "learned": learned(features)}.get(core, core)
        layers = next(name for name in self.before) if one else None
        try:
            self.handle = diffattn.patch(self.ours, core, layers=layers)
        except ValueError as refused:  # sliced layers only
            assert self.swapped and "Sliced" in str(refused)

    @rule()
    def unpatch(self):
        diffattn.unpatch(self.ours)

    @precondition(lambda self: hasattr(self, "handle"))
    @rule()
    def undo(self):
        self.handle.undo()

    @rule()
    def run(self):
        assert out(self.tiny, self.ours).isfinite().all()

    @precondition(lambda self: not self.lora and not self.fused)
    @rule()
    def load_lora(self):
        self.lora = True
        for model in (self.ours, self.stock):
            load_lora(model, self.tiny)

    @precondition(lambda self: self.lora)
    @rule()
    def unload_lora(self):
        self.lora = False
        self.both("unload_lora")

    @precondition(lambda self: not self.fused and not self.lora and not self.swapped)
    @rule()
    def fuse(self):
        self.fused = True
        self.both("fuse_qkv_projections")

    @precondition(lambda self: self.fused)
    @rule()
    def unfuse(self):
        self.fused = False
        self.both("unfuse_qkv_projections")

    @precondition(lambda self: self.tiny is UNET and not self.fused)
    @rule(size=st.sampled_from(["auto", None]))
    def slice(self, size):
        self.swapped = True
        self.both("set_attention_slice", size)

    @rule()
    def backend(self):
        self.both("set_attention_backend", "native")

    @rule(steps=st.booleans())
    def switch_mode(self, steps):
        self.both("train", steps)
        self.both("eval")

    @invariant()
    def a_patch_is_known(self):
        """No processor of diffattn is there that unpatch does not see."""
        if not hasattr(self, "ours"):
            return
        here = {name for name, p in processors(self.ours).items() if isinstance(p, CoreAttnProcessor)}
        assert here == diffattn.status(self.ours).installed.keys()

    def teardown(self):
        if not hasattr(self, "ours"):
            return
        diffattn.unpatch(self.ours)
        assert not any(isinstance(p, CoreAttnProcessor) for p in processors(self.ours).values())
        assert list(self.ours.state_dict()) == list(self.stock.state_dict())
        if self.fused:
            self.unfuse()
            assert not diffattn.status(self.ours).installed
        if not self.swapped:
            assert processors(self.ours) == self.before
        assert torch.equal(out(self.tiny, self.ours), out(self.tiny, self.stock))


TestAnyOrder = pytest.mark.filterwarnings("ignore")(AnyOrder.TestCase)
TestAnyOrder.settings = settings(
    max_examples=12, stateful_step_count=8, deadline=None, derandomize=True, database=None
)


class Failing(diffattn.SoftmaxAttention):
    """Raises when the third copy is made: half-way through a patch."""

    copies = 0
    error: type[BaseException] = KeyboardInterrupt

    def __deepcopy__(self, memo):
        Failing.copies += 1
        if Failing.copies == 3:
            raise self.error
        return Failing()


@pytest.fixture(params=[KeyboardInterrupt, torch.OutOfMemoryError, MemoryError], ids=lambda e: e.__name__)
def interruption(request):
    return request.param


def unchanged(unet, had, stock):
    assert processors(unet) == had
    assert torch.equal(out(UNET, unet), stock)


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_an_interruption_while_cores_are_made(interruption, patched, monkeypatch):
    unet = UNET.model()
    if patched:
        diffattn.patch(unet, learned())
    had, result = processors(unet), out(UNET, unet)
    monkeypatch.setattr(Failing, "copies", 0)
    monkeypatch.setattr(Failing, "error", interruption)
    with pytest.raises(interruption):
        diffattn.patch(unet, Failing())
    assert Failing.copies == 3
    unchanged(unet, had, result)


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_while_processors_are_swapped(interruption, patched, when, monkeypatch):
    """In the third swap, before it or once the processor is in its place."""
    module = importlib.import_module("diffattn.layers")
    unet = UNET.model()
    if patched:
        diffattn.patch(unet, learned())
    had, result, calls = processors(unet), out(UNET, unet), []
    swap = module.set_processor

    def interrupted(attn, *rest):
        calls.append(attn)
        if len(calls) == 3 and when == "before":
            raise interruption
        swap(attn, *rest)
        if len(calls) == 3:
            raise interruption

    monkeypatch.setattr(module, "set_processor", interrupted)
    with pytest.raises(interruption):
        diffattn.patch(unet, diffattn.SoftmaxAttention())
    unchanged(unet, had, result)
    diffattn.unpatch(unet)
    assert torch.equal(out(UNET, unet), out(UNET, UNET.model()))


def test_a_processor_that_raises_in_a_call_leaves_the_model_patched_and_usable():
    class Raises(diffattn.SoftmaxAttention):
        def forward(self, q, k, v, **options):
            if Raises.on:
                raise KeyboardInterrupt
            return super().forward(q, k, v, **options)

    Raises.on = True
    unet = UNET.model()
    had, stock = processors(unet), out(UNET, unet)
    with pytest.raises(KeyboardInterrupt), diffattn.patched(unet, Raises()):
        out(UNET, unet)
    unchanged(unet, had, stock)
    diffattn.patch(unet, Raises())
    with pytest.raises(KeyboardInterrupt):
        out(UNET, unet)
    Raises.on = False
    assert error(out(UNET, unet), stock) <= 1e-5
    diffattn.unpatch(unet)
    unchanged(unet, had, stock)
