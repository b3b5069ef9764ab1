"""Write docs/onnx.json and docs/onnx.md: which classes of diffusers `to_onnx` exports, stock's own export beside it.

    python docs/make_onnx.py                  # every tiny model of tests/models: 10 minutes on 2 free cores
    python docs/make_onnx.py --only Flux      # these classes again, the others stay as they are
    python docs/make_onnx.py --render         # write onnx.md from onnx.json again

Sizes are fixed here. docs/graphs.md has a model of each family with sizes that change.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import re
import signal
import sys
import tempfile
import textwrap
import unittest.mock
import warnings
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
KINDS = ("stock", "diffattn")
SECONDS = 180  # for one export

HEAD = """\
# Which models export to ONNX

Written by `docs/make_onnx.py` from a run on tiny random models of fixed sizes, float32 (CPU; torch {torch}, diffusers
{diffusers}, onnxscript {onnxscript}, ONNX Runtime {onnxruntime}): {ours} of {all} export with
`diffattn.export.to_onnx`, which needs no patch for it, and {stock} with stock's attention and forward and torch's
translations alone. "Works": ONNX Runtime loads the file, and with inputs that were not traced it computes what the
stock model computes, within 1e-4 of the largest number.

Models that are called with images or latents to encode and decode, most autoencoders, are not in the table. What may
change in size follows from the model: `dynamic=` of `to_onnx`; [graphs.md](graphs.md) has a model of each family with
batch, resolution and text that change.
"""


def export(name: str, kind: str) -> str:
    """The word "works", or what stands in the way, in one line."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    import diffattn.export as ours
    from tests.models import BY_NAME
    from tests.models.base import Rand

    torch.set_num_threads(1)
    tiny = BY_NAME[name]
    with contextlib.ExitStack() as context:
        context.enter_context(tiny.reference())
        if kind == "stock":
            for what, plain in (
                ("_our_processors", lambda model: contextlib.nullcontext()),
                ("traceable", lambda model: model),
                ("translations", lambda opset: {}),
            ):
                context.enter_context(unittest.mock.patch.object(ours, what, plain))
        folder = context.enter_context(tempfile.TemporaryDirectory())
        signal.signal(signal.SIGALRM, _stop)
        signal.alarm(SECONDS)
        try:
            inputs = tiny.inputs(Rand(torch.Generator().manual_seed(1)))
            ours.to_onnx(tiny.model(), f"{folder}/m.onnx", sample_inputs=inputs, dynamic=False, progress=None)
        except Exception as error:
            return _reason(str(error).replace(folder, ""))
        finally:
            signal.alarm(0)
    return "works"


def _task(task: tuple[str, str]) -> tuple[str, str, str]:
    return *task, export(*task)


def _stop(*_):
    raise TimeoutError(f"not done after {SECONDS} s")


def _reason(message: str) -> str:
    if wrong := re.search(r"differs by [\w.+-]+", message):
        finite = re.search(r"[1-9]\d* numbers are not finite", message)
        return wrong[0] + (f", {finite[0]}" if finite else "")
    if node := re.search(r"target=torch\.ops\.([\w.]+)", message):
        return f"no translation of {node[1]}"
    if message.startswith("ONNX Runtime cannot load") and (node := re.search(r"Op \((\w+)\)|for (\w+)\(", message)):
        return f"ONNX Runtime refuses {node[1] or node[2]}"
    message = re.sub(r"^\w+ cannot be exported: ", "", message)
    return textwrap.shorten(message.splitlines()[0], 110, placeholder=" ...")


def run(only: list[str]) -> None:
    from tests.models import MODELS

    path = DOCS / "onnx.json"
    names = [str(m) for m in MODELS if m.inputs and not m.run_model and m.absent() is None]
    known = json.loads(path.read_text())["models"] if only else {}
    chosen = [name for name in names if not only or any(part in name for part in only)]
    results = {name: known.get(name, {}) for name in names}
    tasks = [(name, kind) for name in chosen for kind in KINDS]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=20) as pool:
        for name, kind, result in pool.imap_unordered(_task, tasks):
            results[name][kind] = result
            print(name, kind, result, flush=True)
    path.write_text(json.dumps(dict(environment=versions(), models=results), indent=1) + "\n")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("torch", "diffusers", "onnxscript", "onnxruntime")}


def render(content: dict) -> str:
    """The text of onnx.md."""
    models = content["models"]
    counts = {kind: sum(result[kind] == "works" for result in models.values()) for kind in KINDS}
    head = HEAD.format(**content["environment"], all=len(models), stock=counts["stock"], ours=counts["diffattn"])
    rows = [f"| {name} | {cell(result['stock'])} | {cell(result['diffattn'])} |" for name, result in models.items()]
    table = "\n".join(["| model | stock | diffattn |", "|---|---|---|", *rows])
    return f"{head}\n{table}\n"


def cell(result: str) -> str:
    return result if result == "works" else f"**fails**: {result.replace('|', '/')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of classes")
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    if not args.render:
        run(args.only)
    (DOCS / "onnx.md").write_text(render(json.loads((DOCS / "onnx.json").read_text())))


if __name__ == "__main__":
    main()
