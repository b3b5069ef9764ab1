"""The model card of a result, written from what the run recorded, and the push to a hub."""

import re
from pathlib import Path
from typing import Any

import yaml

from diffattn.weights import CONFIG_NAME, WEIGHTS_NAME

RESULT_FILES = (WEIGHTS_NAME, CONFIG_NAME, "README.md", "summary.json", "grid.png", "curve.png")

CARD = """---
{front}---
# {base}, with {core} in place of softmax self-attention

Weights for diffattn: attention of {layers} layers, distilled from the model's own. They hold only what was added
or trained, so the base model is needed too.

```python
import diffattn
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
diffattn.patch(pipe, weights="{here}")   # diffattn.unpatch(pipe) takes it back
```

## Training
| | |
|---|---|
| base model | `{base}` |
| core | `{core}` |
| trained | {train}: {parameters:,} parameters in {megabytes:.1f} MB |
| steps | {steps_1:,} of stage 1 (each layer's output), {steps_2:,} of stage 2 (the prediction, and layers' outputs) |
| samples a step | {samples} |
| data | none but {prompts:,} prompts: {trajectories:,} pictures drawn by the teacher |
| pictures | {size}{sampling_steps} steps, guidance {guidance} |
| seed | {seed} |
| cost | {cost} |
| last loss | {loss} |

The loss is a relative squared error: 0 is the teacher, 1 as bad as nothing at all.
{pictures}"""


def front_matter(base: str, license: str | None) -> str:
    """The card's YAML. Without a choice the licence is what the base model's own card says, if there is one here."""
    fields: dict[str, Any] = {}
    own = _front_matter_of(Path(base) / "README.md")
    if license is not None:
        fields["license"] = license
    elif "license" in own:
        fields |= {name: own[name] for name in ("license", "license_name", "license_link") if name in own}
    else:
        fields |= {"license": "other", "license_name": "that-of-the-base-model"}
    # The hub knows models by their ids there; a folder's path means nothing to others.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        fields |= {"base_model": base, "base_model_relation": "adapter"}
    fields |= {"library_name": "diffusers", "tags": ["diffattn", "distillation"]}
    if "pipeline_tag" in own:
        fields["pipeline_tag"] = own["pipeline_tag"]
    return yaml.safe_dump(fields, sort_keys=False)


def _front_matter_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8"), re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def card(summary: dict[str, Any], folder: Path, license: str | None, here: str) -> str:
    """The text of README.md, from summary.json's content."""
    sampling, settings = summary["sampling"], summary["settings"]
    minutes = [summary[name] / 60 for name in ("recording_seconds", "seconds")]
    cost = f"{minutes[0]:.1f} minutes of drawing and {minutes[1]:.1f} of training"
    cost += f" on {summary['processes']} x {summary['device']}"
    if summary["peak_bytes"]:
        cost += f", {summary['peak_bytes'] / 1e9:.1f} GB of GPU memory"
    size = "" if sampling["height"] is None else f"{sampling['width'] or sampling['height']}x{sampling['height']}, "
    pictures = "".join(
        f"\n![{text}]({name})\n"
        for name, text in (("grid.png", "Teacher and student, same seeds"), ("curve.png", "Loss against steps"))
        if (folder / name).exists()
    )
    return CARD.format(
        front=front_matter(summary["base_model"], license),
        base=summary["base_model"],
        here=here,
        core=summary["core"],
        layers=summary["layers"],
        train=settings["train"],
        parameters=summary["trained_parameters"],
        megabytes=(folder / WEIGHTS_NAME).stat().st_size / 1e6,
        steps_1=settings["steps"][0],
        steps_2=settings["steps"][1],
        samples=settings["batch"] * settings["accumulate"] * summary["processes"],
        trajectories=summary["trajectories"],
        prompts=summary["prompts"],
        size=size,
        sampling_steps=sampling["steps"],
        guidance=sampling["guidance"] if sampling["guidance"] is not None else "of the pipeline",
        seed=settings["seed"],
        cost=cost,
        loss=f"{summary['loss']:.4f}",
        pictures=pictures,
    )


def check_push(repo: str) -> None:
    """Raises: ValueError for what is no repository's name or without a login, before anything was trained."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"push_to: got {repo!r}, expected user/name ({error})") from None
    if "/" not in repo:
        raise ValueError(f"push_to: got {repo!r}, expected user/name")
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a stale one, no network: one advice for all
        raise ValueError(f"push_to: the hub does not know you ({error}); log in with `hf auth login`") from None


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a result, and nothing else that lies in its folder, to a hub repository. Returns: its address.

    Raises: FileNotFoundError if the folder holds no result.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    missing = [name for name in (WEIGHTS_NAME, CONFIG_NAME, "README.md") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"folder: {folder} holds no finished result: it has no {', no '.join(missing)}")
    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=str(folder), allow_patterns=list(RESULT_FILES))
    return str(url)
