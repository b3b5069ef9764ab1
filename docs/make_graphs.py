"""Write docs/graphs.json and docs/graphs.md: what compilers and exporters make of each family, stock beside patched.

    python docs/make_graphs.py                       # all columns that a CPU can fill: 15 minutes on 2 free cores
    python docs/make_graphs.py --only Sana Lumina2   # these families again, the others stay as they are
    python docs/make_graphs.py --gpu --out FOLDER    # the column of CUDA graphs alone, about 3 minutes, to FOLDER
    python docs/make_graphs.py --merge FILE          # put that column in
    python docs/make_graphs.py --render              # write graphs.md from graphs.json again

Each family runs in a process of its own, each column by itself: what fails is a cell.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
KINDS = ("stock", "patched")
ON_CPU = ("eager", "compile", "dynamic", "export", "AOTI", "ONNX")
COLUMNS = ("eager", "compile", "dynamic", "CUDA graphs", "export", "AOTI", "ONNX")
# A minute each, for inductor's C++.
COMPILED_AHEAD = ("UNet2DConditionModel", "DreamLiteUNetModel", "SanaTransformer2DModel", "Lumina2Transformer2DModel")
BAR = 1e-5  # relative Frobenius error against eager, float32

HEAD = """\
Written by `docs/make_graphs.py` from a run on tiny random models, one layer of each kind, float32 (CPU; torch {torch},
diffusers {diffusers}, onnxscript {onnxscript}, ONNX Runtime {onnxruntime}){gpu}. A cell is what stock does / what the
patched model does, one of them where both do the same. "Works" are the numbers of eager: within 1e-5, in ONNX Runtime
within 1e-4 of the largest. Patched is the exact core where stock has a formula of its own, and diffattn's softmax in
every other layer.

- **compile**: `torch.compile(fullgraph=True)`, forward and backward; `torch._dynamo.explain` finds no graph break.
- **dynamic**: graphs that Dynamo has made after three resolutions, after another batch, and after 20 timesteps.
- **CUDA graphs**: `mode="reduce-overhead"` on a GPU: recorded, replayed with other inputs, none skipped.
- **export**: `torch.export.export` with batch, text and resolution dynamic, run at other sizes.
- **AOTI**: that program through `torch._inductor.aoti_compile_and_package`, loaded and run at other sizes.
- **ONNX**: `to_onnx` and its check at three sizes that were not traced, with a head whose queries are 0 in linear
  attention. Stock: the same tracing, with stock's attention and stock's forward.
"""


def run_family(name: str, columns: list[str]) -> dict:
    """In its own process: kind -> column -> {"result": "works", "fails" or "not run", ...}."""
    import logging
    import warnings

    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    import torch._dynamo
    import torch._dynamo.testing

    from tests.graphs.cases import FAMILY

    functions = {"eager": eager, "compile": compiled, "dynamic": dynamic, "CUDA graphs": cuda_graphs}
    functions |= {"export": export, "AOTI": ahead, "ONNX": onnx}
    found = {}
    for kind in KINDS:
        cells = found[kind] = {}
        for column in columns:
            started = time.perf_counter()
            try:
                torch._dynamo.reset()
                cells[column] = {"result": "works"} | functions[column](FAMILY[name], kind)
            except Exception as error:  # whatever a compiler raises is what the table is about
                cells[column] = {"result": "fails", "error": told(error)}
            cells[column]["seconds"] = round(time.perf_counter() - started, 1)
    return found


class Differs(Exception):
    """A result that is not eager's."""


def told(error: Exception) -> str:
    """The sentence of an error, without paths and torch's advice."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(cause)).split())
    text = re.sub(r"(Explanation|Hint|Caused by|For more information|\(Size-like|Suggested fixes).*", "", text)
    text = re.sub(r"/\S+/", "", text).split(" File ")[0].strip()[:160].rstrip()
    return text if isinstance(cause, Differs) else f"{type(cause).__name__}: {text}"


def compare(ours, expected) -> float:
    error = ((ours - expected).norm() / expected.norm()).item()
    if not error <= BAR:
        raise Differs(f"differs from eager by {error:.0e}")
    return error


def model_of(family, kind):
    return family.model() if kind == "stock" else family.patched()


def first(out):
    import torch

    return out if isinstance(out, torch.Tensor) else out[0]


def eager(family, kind):
    import torch

    with torch.no_grad():
        out = first(model_of(family, kind)(**family.inputs()))
        return {"error": compare(out, first(family.model()(**family.inputs())))}


def compiled(family, kind):
    import torch

    model = model_of(family, kind)
    call, inputs = family.traceable(model), family.inputs()

    def both(call):
        model.zero_grad()
        out = first(call(**inputs))
        out.square().mean().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return out.detach(), torch.cat([g.flatten() for g in grads])

    expected = both(model)
    ours = both(torch.compile(call, fullgraph=True, backend="aot_eager"))
    errors = [compare(a, b) for a, b in zip(ours, expected, strict=True)]
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(call)(**inputs)
    if (found.graph_count, found.graph_break_count) != (1, 0):
        raise Differs(f"{found.graph_count} graphs, {found.graph_break_count} breaks")
    return {"error": max(errors)}


def dynamic(family, kind):
    import torch

    model = family.traceable(model_of(family, kind))
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    call = torch.compile(model, fullgraph=True, backend=counter)
    counts = []
    with torch.no_grad():
        for resolution, batch in ((0, 2), (1, 2), (2, 2), (2, 3)):
            inputs = family.inputs(resolution, batch)
            compare(first(call(**inputs)), first(model(**inputs)))
            counts.append(counter.frame_count)
        if "timestep" in inputs:
            for step in range(20):
                call(**inputs | dict(timestep=torch.full_like(inputs["timestep"], 1 - step / 20)))
    return {"graphs": [counts[2], counts[3], counter.frame_count]}


def cuda_graphs(family, kind):
    import torch
    from torch._dynamo.utils import counters
    from torch.utils._pytree import tree_map

    torch.backends.cudnn.allow_tf32 = False
    counters.clear()
    model = model_of(family, kind).cuda()
    inputs = tree_map(lambda t: t.cuda() if isinstance(t, torch.Tensor) else t, family.inputs())
    model = family.traceable(model)  # after the move: it may have tables of its own
    call = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    changing = next(name for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.dim() > 2)
    errors = []
    with torch.no_grad():
        for _ in range(4):  # warm up, record, replay twice
            inputs[changing] = torch.randn_like(inputs[changing])
            torch.compiler.cudagraph_mark_step_begin()
            errors.append(compare(first(call(**inputs)).clone(), first(model(**inputs))))
    if skipped := counters["inductor"]["cudagraph_skips"]:
        raise Differs(f"{skipped} CUDA graphs were skipped")
    return {"error": max(errors)}


def export(family, kind):
    import torch

    from tests.graphs.cases import exported

    model = family.traceable(model_of(family, kind))
    program = exported(family, model).module()
    with torch.no_grad():
        return {"error": max(compare(first(program(**x)), first(model(**x))) for x in family.other_inputs())}


def ahead(family, kind):
    import torch
    import torch._inductor

    from tests.graphs.cases import exported

    if str(family) not in COMPILED_AHEAD:
        return {"result": "not run"}
    model = family.traceable(model_of(family, kind))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = exported(family, model)
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        run = torch._inductor.aoti_load_package(path)
        return {"error": max(compare(first(run(**x)), first(model(**x))) for x in family.other_inputs())}


def onnx(family, kind):
    import unittest.mock

    import diffattn.export as ours

    model, options = dead_rows(family.model()), {}
    if type(model).__name__ not in ours.SAMPLE_INPUTS:
        inputs = family.inputs()
        # as in tests.graphs.cases.exported: tensors in a dictionary have a row for each sample
        given = [x for x in inputs.values() if isinstance(x, dict)]
        rows = {name: {0: "batch"} for x in given for name, t in x.items() if t is not None}
        options = dict(sample_inputs=inputs, dynamic=family.free_axes() | rows)
    stock = contextlib.ExitStack()
    if kind == "stock":
        stock.enter_context(
            unittest.mock.patch.object(ours, "_our_processors", lambda model: contextlib.nullcontext())
        )
        stock.enter_context(unittest.mock.patch.object(ours, "traceable", lambda model: model))
    with tempfile.TemporaryDirectory() as folder, stock:
        try:
            ours.to_onnx(model, f"{folder}/model.onnx", progress=None, **options)
        except ours.ExportError as error:
            wrong = re.findall(r"[^:\n]*: (differs by [^\n]*|ONNX Runtime failed[^\n]*)", str(error))
            raise Differs(wrong[0]) if wrong else error from error.__cause__
    return {}


def dead_rows(model):
    """Queries of 0 in the first head of layers with linear attention: trained models have such rows."""
    import torch

    from diffattn.layers import find_layers
    from tests.models.stock import is_linear

    for layer in find_layers(model):
        if layer.family and is_linear(layer):
            dim = getattr(layer.attn, "attention_head_dim", None) or layer.attn.inner_dim // layer.attn.heads
            with torch.no_grad():
                layer.attn.to_q.weight[:dim] = 0
    return model


def collect(families: list[str], columns: tuple[str, ...], workers: int, save) -> None:
    def one(name):
        command = [sys.executable, __file__, "--family", name, *columns]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
            return name, json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
            ended = {"result": "fails", "error": f"the process ended: {type(error).__name__}"}
            return name, {kind: dict.fromkeys(columns, ended) for kind in KINDS}

    with ThreadPoolExecutor(workers) as pool:
        for job in as_completed([pool.submit(one, name) for name in families]):
            name, kinds = job.result()
            for kind, cells in kinds.items():
                print(name, kind, {c: x.get("error", "") if x["result"] == "fails" else x["result"]
                                   for c, x in cells.items()}, file=sys.stderr, flush=True)  # fmt: skip
                save(name, kind, cells)


def versions() -> dict:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime")}


def render(data: dict) -> str:
    gpu = data.get("gpu")
    paragraph, _, legend = HEAD.format(
        **data["versions"], gpu=f"; CUDA graphs: {gpu['name']}, torch {gpu['torch']}" if gpu else ""
    ).partition("\n\n")
    lines = ["# Compilers and exporters", "", *textwrap.wrap(paragraph, 119), "", legend.rstrip(), ""]
    lines += ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    notes: list[str] = []
    for name, kinds in data["families"].items():
        lines.append("| " + " | ".join([name, *(_cell(kinds, column, notes) for column in COLUMNS)]) + " |")
    return "\n".join([*lines, "", *(f"{i}. `{note}`" for i, note in enumerate(notes, 1))]).rstrip() + "\n"


def _cell(kinds: dict, column: str, notes: list[str]) -> str:
    stock, patched = (_word(kinds.get(kind, {}).get(column), notes) for kind in KINDS)
    return stock if stock == patched else f"{stock} / {patched}"


def _word(cell: dict | None, notes: list[str]) -> str:
    if cell is None or cell["result"] == "not run":
        return "not run"
    if cell["result"] == "fails":
        if cell["error"] not in notes:
            notes.append(cell["error"])
        return f"**fails** [{notes.index(cell['error']) + 1}]"
    return ", ".join(map(str, cell["graphs"])) if "graphs" in cell else "works"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--only", nargs="+", help="parts of names of families")
    parser.add_argument("--columns", nargs="+", default=list(ON_CPU), choices=ON_CPU)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--merge", type=Path)
    parser.add_argument("--family", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.family:
        name, *columns = options.family
        print(json.dumps(run_family(name, columns)))
        return

    from tests.graphs.cases import FAMILIES

    path = DOCS / "graphs.json"
    data = json.loads(path.read_text()) if path.exists() else {"versions": {}, "families": {}}
    names = [str(f) for f in FAMILIES if not options.only or any(part in str(f) for part in options.only)]
    if options.gpu:
        import torch

        found = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "families": {}}

        def keep(name, kind, cells):
            found["families"].setdefault(name, {})[kind] = cells["CUDA graphs"]
            (options.out / "cuda_graphs.json").write_text(json.dumps(found, indent=1) + "\n")

        collect(names, ("CUDA graphs",), options.workers or 10, keep)
        return
    if options.merge:
        found = json.loads(options.merge.read_text())
        data["gpu"] = {key: found[key] for key in ("name", "torch")}
        for name, kinds in found["families"].items():
            for kind, cell in kinds.items():
                data["families"].setdefault(name, {}).setdefault(kind, {})["CUDA graphs"] = cell
    elif not options.render:
        data["versions"] = versions()

        def save(name, kind, cells):
            data["families"].setdefault(name, {}).setdefault(kind, {}).update(cells)
            data["families"] = {str(f): data["families"][str(f)] for f in FAMILIES if str(f) in data["families"]}
            path.write_text(json.dumps(data, indent=1) + "\n")

        collect(names, tuple(options.columns), options.workers or 2, save)
    path.write_text(json.dumps(data, indent=1) + "\n")
    (DOCS / "graphs.md").write_text(render(data))


if __name__ == "__main__":
    main()
