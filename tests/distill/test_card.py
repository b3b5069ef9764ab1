"""The model card, and what goes to a hub."""

import re

import pytest
import yaml

from diffattn.distill import card, push
from tests.distill import tiny


def front(text):
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.DOTALL)[1])


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes note."""
    calls = []

    class Api:
        def whoami(self):
            calls.append("whoami")
            return {"name": "someone"}

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, allow_patterns):
            from pathlib import Path

            from huggingface_hub.utils import filter_repo_objects

            names = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
            calls.append(("upload", repo_id, sorted(filter_repo_objects(names, allow_patterns=allow_patterns))))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return calls


def test_the_card_tells_what_was_done(run):
    result = run(core="mqa", license="mit", curve=True)
    text = (result.folder / "README.md").read_text()
    assert front(text)["license"] == "mit" and front(text)["library_name"] == "diffusers"
    for part in (
        "GroupedQueryAttention(kv_heads=1",
        "| steps | 4 of stage 1",
        "none but 4 prompts: 4 pictures",
        "16x16, 2 steps, guidance 2.0",
        f'diffattn.patch(pipe, weights="{result.folder}")',
        "1 x CPU",
        "![Teacher and student, same seeds](grid.png)",
        "![Loss against steps](curve.png)",
    ):
        assert part in text


def test_the_licence_is_the_base_models_unless_it_is_named(tmp_path):
    assert front("---\n" + card.front_matter(str(tiny.EMOJI), None) + "---\n")["license"] == "ofl-1.1"
    of_hub = front("---\n" + card.front_matter("someone/model", None) + "---\n")
    assert of_hub["license"] == "other" and of_hub["base_model"] == "someone/model"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: y\n---\n")
    fields = front("---\n" + card.front_matter(str(tmp_path), None) + "---\n")
    assert (fields["license_name"], fields["license_link"]) == ("x", "y") and "base_model" not in fields
    for broken in ("no front matter", "---\na: [\n---\n", "---\njust text\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert "license: other" in card.front_matter(str(tmp_path), None)


def test_a_result_is_pushed_without_the_runs_files(run, hub):
    result = run(core="mqa", push_to="someone/tiny-mqa")
    assert hub[:2] == ["whoami", ("create", "someone/tiny-mqa", False, True)]
    uploaded = hub[2][2]
    assert {"README.md", "diffattn.json", "diffattn.safetensors"} <= set(uploaded)
    assert not [name for name in uploaded if name.startswith("run")]
    assert 'weights="someone/tiny-mqa"' in (result.folder / "README.md").read_text()
    push(result.folder, "someone/other", private=True)
    assert hub[3] == ("create", "someone/other", True, True)


def test_a_push_that_cannot_work_is_refused_first(run, hub, monkeypatch, tmp_path):
    import huggingface_hub

    with pytest.raises(ValueError, match="push_to: got 'name', expected user/name"):
        run(push_to="name")

    def unknown(self):
        raise OSError("no token")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", unknown)
    with pytest.raises(ValueError, match=r"push_to: the hub does not know you \(no token\)"):
        run(push_to="someone/name")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="no finished result"):
        push(tmp_path, "someone/name")
