"""docs/graphs.md and onnx.md are what their scripts write, and in them diffattn is never worse than stock alone."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.graphs.cases import FAMILY

DOCS = Path(__file__).parents[2] / "docs"
DATA = json.loads((DOCS / "graphs.json").read_text())


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_onnx_table():
    content = json.loads((DOCS / "onnx.json").read_text())
    text = script("make_onnx").render(content)
    assert text == (DOCS / "onnx.md").read_text()
    results = content["models"].values()
    assert all(result["diffattn"] == "works" for result in results if result["stock"] == "works")
    ours, stock = (sum(result[kind] == "works" for result in results) for kind in ("diffattn", "stock"))
    claim = (
        f"{ours} of {len(results)} tiny models of diffusers' classes export without a patch, where torch alone exports"
    )
    assert f"{claim} {stock}\n" in (DOCS.parent / "README.md").read_text()


def test_table_is_of_these_families():
    assert script("make_graphs").render(DATA) == (DOCS / "graphs.md").read_text()
    assert DATA["families"] and set(DATA["families"]) <= set(FAMILY)


@pytest.mark.parametrize("name", DATA["families"])
def test_patched_is_never_worse_than_stock(name):
    stock, patched = DATA["families"][name]["stock"], DATA["families"][name]["patched"]
    assert stock.keys() == patched.keys()
    for column, cell in stock.items():
        assert patched[column]["result"] == cell["result"] or patched[column]["result"] == "works", column
        if "graphs" in cell:
            assert all(a <= b for a, b in zip(patched[column]["graphs"], cell["graphs"], strict=True))
