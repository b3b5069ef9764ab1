"""docs/plugins.md names tests that exist, and each of them."""

import importlib
import re
from pathlib import Path

TABLE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
FILES = sorted(file.stem for file in Path(__file__).parent.glob("test_*.py") if file.stem != "test_table")


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
