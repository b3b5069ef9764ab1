import pytest
import transformers

import diffattn
from diffattn.distill import distill
from diffattn.distill import run as module
from tests.distill import tiny

if int(transformers.__version__.split(".")[0]) < 5:  # the tokenizer is the emoji pipeline's
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Also where there is a GPU: bit for bit is a promise of the CPU. accelerate remembers what it was first."""
    from accelerate.state import AcceleratorState

    if "gpu" not in request.keywords:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def pipe():
    return tiny.pipeline()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`distill` at a tiny size, whose recordings stay in the test's folder; keywords change its arguments.

    Without loss curves, which take longer to draw than all the rest, unless `curve` is true.
    """
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    draw_curve = module.draw_curve

    def run(out="out", *, model=None, core=None, prompts=tiny.PROMPTS, curve=False, **changes):
        monkeypatch.setattr(module, "draw_curve", draw_curve if curve else lambda *_: True)
        options = dict(
            train="core",
            steps=(4, 4),
            batch=2,
            sampling=tiny.SAMPLING,
            preview_every=100,
            preview_prompts=1,
            checkpoint_every=2,
            progress=False,
        )
        model = tiny.pipeline() if model is None else model
        core = diffattn.LinearAttention(tiny.LearnedMap()) if core is None else core
        return distill(model, core, prompts, tmp_path / out, **options | changes)

    return run
