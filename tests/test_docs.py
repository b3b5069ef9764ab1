"""The documents that scripts write are those that the scripts would write."""

import importlib.util
import json
from pathlib import Path

from tests.models import MODELS

DOCS = Path(__file__).parents[1] / "docs"


def test_table_of_models_is_of_these_models():
    """After a change of tests/models: python docs/make_models.py."""
    spec = importlib.util.spec_from_file_location("make_models", DOCS / "make_models.py")
    make_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_models)
    data = json.loads((DOCS / "models.json").read_text())
    assert [row["name"] for row in data["models"]] == [str(model) for model in MODELS]
    assert make_models.render(data) == (DOCS / "models.md").read_text()
    for row, model in zip(data["models"], MODELS, strict=True):
        assert bool(row["converted"]) == bool(model.converts)
        assert bool(sum(row["exact"].values())) == bool(model.fused)
