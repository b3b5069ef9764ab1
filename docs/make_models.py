"""Write docs/models.json and docs/models.md: what is tested on each model class of diffusers, from a run of the tests.

    python docs/make_models.py            # runs tests/models, about a minute, then writes both
    python docs/make_models.py --render   # writes models.md from models.json again

A cell of the table says yes only if the tests behind it passed in that run.
"""

import json
import sys
import textwrap
import warnings
from collections import defaultdict
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))


HEAD = """\
Every class of diffusers {diffusers} that has attention, {classes}, and a text conditioner. In {covered} of them
each layer with a processor has one here too; in {missed} some layer keeps its own, and {without} attend without a
processor. Written by `docs/make_models.py` from a run of `tests/models` on tiny random models (CPU, torch {torch});
what real ones gain is in the README.

- **layers**: attention layers with a processor, or a module in its place, that have one here. These compute what stock
  computes, within 1e-6 in float32 and at most twice stock's own error in bfloat16.
- **exact**: layers of the tiny model that `patch(model)` puts into fused kernels. None, where torch's own attention is
  the fast path.
- **converted**: layers that `patch(model, "linear")` and `patch(model, "mqa")` take by default; `layers=` takes more.
  `"mqa"` makes key and value projections of the core's own, which `diffattn.finalize` keeps alone. Outputs of the
  layer's are pooled of keys where norms or rotations need all heads (Wan and its kin, LTX, HiDream, Mochi,
  Lumina-Next, LongCat-Audio), of both where one module makes q, k and v (Flux 2's single-stream blocks, JoyImage,
  Stable Audio 3); `print(handle)` says so.
- **padding**: text behind the mask reaches no image token, with a softmax and with a linear core. `pairs`: a mask over
  pairs of tokens, which a linear core refuses with an error.
- **compile**: each of its processors is one graph under `torch.compile(fullgraph=True)`.
"""


class Outcomes:
    """A pytest plugin: test name -> {id: outcome}."""

    def __init__(self):
        self.of = defaultdict(dict)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name, _, case = report.nodeid.split("::")[-1].partition("[")
            self.of[name][case.rstrip("]")] = report.outcome

    def passed(self, test, case):
        return self.of[test].get(case) == "passed"


def collect() -> dict:
    import pytest

    outcomes = Outcomes()
    code = pytest.main(["-q", str(DOCS.parent / "tests/models")], plugins=[outcomes])
    if code:
        sys.exit(f"tests/models failed ({code}): the table is made from a run that passes")
    # Only now: tests/conftest.py sets what has to be set before triton is imported.
    import diffusers
    import torch

    warnings.simplefilter("ignore")
    from tests.models import GROUPS

    rows = [row(tiny, group, outcomes) for group, models in GROUPS.items() for tiny in models]
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"versions": versions, "models": rows}


def row(tiny, group, outcomes) -> dict:
    import diffattn
    from diffattn.patch import find_layers, find_unreachable
    from tests.models.stock import built, is_linear, is_softmax

    model = built(tiny).model
    found = find_layers(model)
    known = [layer for layer in found if layer.family]
    exact, linear, kept = [], [], {}
    if known:
        with diffattn.patched(model) as handle:
            exact = list(handle.installed)
        try:
            with diffattn.patched(model, "linear") as handle:
                linear, kept = [n for n in handle.installed if n not in exact or tiny.converts], handle.skipped
        except ValueError:
            kept = {layer.name: reason(layer) for layer in known}
    case = str(tiny)
    computes = outcomes.passed("test_softmax_core_computes_what_stock_softmax_computes", case)
    computes &= outcomes.passed("test_exact_patch_computes_what_stock_computes", case)
    computes &= outcomes.passed("test_each_layer_returns_what_stock_returns", case)
    computes &= outcomes.passed("test_in_bfloat16_each_layer_errs_as_little_as_stock", case)
    stock = {type(layer.stock).__name__ for layer in known}
    of_linear, of_softmax = ([layer.name for layer in known if f(layer)] for f in (is_linear, is_softmax))
    return {
        "group": group,
        "class": tiny.cls,
        "name": case,
        "layers": len(found),
        "reached": len(known) if computes else 0,
        "exact": {
            "linear": sum(name in of_linear for name in exact),
            "grouped": sum(name in of_softmax for name in exact),
            "delta": sum(name not in of_linear + of_softmax for name in exact),
        },
        "linear_already": len(of_linear),
        "converted": [n for n in linear if n not in of_linear]
        if outcomes.passed("test_a_converted_core_takes_what_attends_to_itself", case)
        else [],
        "kept": sorted({r for n, r in kept.items() if "no processor" not in r}),
        "pairs_refused": tiny.pair_mask != (),
        "padding": [
            core
            for core in ("softmax", "linear")
            if outcomes.passed("test_padded_text_does_not_reach_the_image", f"{case}-{core}")
        ],
        "compiles": all(outcomes.passed("test_each_processor_compiles_to_one_graph", name) for name in stock),
        "unreached": sorted(
            {_why(layer) for layer in found if not layer.family} | {w for w in find_unreachable(model).values()}
        ),
    }


def reason(layer):
    from diffattn.processors.unsupported import NOT_CONVERTED

    if not layer.denoises:
        return "not part of the denoiser"
    return NOT_CONVERTED.get(layer.model, layer.family.kept)


def _why(layer):
    from diffattn.processors.unsupported import BY_REASON

    name = type(layer.stock).__name__
    return f"{name}: {BY_REASON[name]}"


def render(data: dict) -> str:
    rows = data["models"]
    classes = {r["class"] for r in rows} - {"AnimaTextConditioner"}
    missed = {r["class"] for r in rows if r["reached"] < r["layers"]}
    without = {r["class"] for r in rows if not r["layers"]}
    covered = len(classes - missed - without)
    head = HEAD.format(
        **data["versions"], classes=len(classes), covered=covered, missed=len(missed), without=len(without)
    )
    paragraph, _, legend = head.partition("\n\n")
    lines = ["# Models", "", *textwrap.wrap(paragraph, 119), "", legend.rstrip()]
    for group in dict.fromkeys(r["group"] for r in rows):
        lines += ["", f"## {group}", "", "| model | layers | exact | converted | padding | compile | notes |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [_line(r) for r in rows if r["group"] == group]
    return "\n".join(lines) + "\n"


def _line(r) -> str:
    layers = f"{r['reached']} of {r['layers']}" if r["reached"] < r["layers"] else "all" if r["layers"] else "none"
    exact = [f"{count} {kind}" for kind, count in r["exact"].items() if count]
    padding = " ".join(r["padding"]) + (" pairs" if r["pairs_refused"] else "")
    compiles = "yes" if r["compiles"] and r["reached"] else ""
    converted = str(len(r["converted"])) if r["converted"] else ""
    notes = [] if r["converted"] or not r["reached"] else [f"not converted: {reason}" for reason in r["kept"]]
    notes += r["unreached"]
    cells = [r["name"], layers, ", ".join(exact), converted, padding.strip(), compiles, "; ".join(notes)]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    path = DOCS / "models.json"
    if "--render" not in sys.argv:
        path.write_text(json.dumps(collect(), indent=1) + "\n")
    (DOCS / "models.md").write_text(render(json.loads(path.read_text())))
