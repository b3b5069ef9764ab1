"""docs/graphs.md is what docs/make_graphs.py writes, and in it a patched model is never worse than the stock one."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.graphs.cases import FAMILY

DOCS = Path(__file__).parents[2] / "docs"
DATA = json.loads((DOCS / "graphs.json").read_text())


def test_table_is_of_these_families():
    spec = importlib.util.spec_from_file_location("make_graphs", DOCS / "make_graphs.py")
    make_graphs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_graphs)
    assert make_graphs.render(DATA) == (DOCS / "graphs.md").read_text()
    assert DATA["families"] and set(DATA["families"]) <= set(FAMILY)


@pytest.mark.parametrize("name", DATA["families"])
def test_patched_is_never_worse_than_stock(name):
    stock, patched = DATA["families"][name]["stock"], DATA["families"][name]["patched"]
    assert stock.keys() == patched.keys()
    for column, cell in stock.items():
        assert patched[column]["result"] == cell["result"] or patched[column]["result"] == "works", column
        if "graphs" in cell:
            assert all(a <= b for a, b in zip(patched[column]["graphs"], cell["graphs"], strict=True))
