"""docs/plugins.md names tests that exist, and each of them."""

import importlib
import re
from pathlib import Path

TABLE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
FILES = ("test_either_order", "test_processor_swaps", "test_pipelines", "test_any_order", "test_threads")


def test_table_names_each_test():
    named = set(re.findall(r"`(test_\w+)\.py::(\w+)`", TABLE))
    modules = {file: importlib.import_module(f"tests.plugins.{file}") for file in FILES}
    there = {
        (file, name)
        for file, module in modules.items()
        for name in vars(module)
        if name.startswith("test_") or name == "TestAnyOrder"
    }
    assert named == there
