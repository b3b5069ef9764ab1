"""The model card, written from training.json and score.json so that its figures cannot go stale."""

from __future__ import annotations

import json
from pathlib import Path

CARD = """---
license: ofl-1.1
library_name: diffusers
pipeline_tag: text-to-image
---
# Emoji from text, 128x128

A small `StableDiffusionPipeline` that draws emoji, for demonstrations and tests of attention processors
without a download. Do not expect it to draw anything else.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("examples/emoji/model")
pipe("smiling cat with heart eyes", num_inference_steps=20, guidance_scale={guidance}).images[0]
```

## Parts
| part | class | parameters |
|---|---|---|
{parts}

Pictures of 128x128 become latents of 32x32x4; the UNet's self-attention runs on 1,024 tokens at its largest
level, in 3 heads of 32. Weights are float16 safetensors, {megabytes:.1f} MB in all.

## Data and licence
Every emoji that Noto Color Emoji (Debian's `fonts-noto-color-emoji` 2.042) draws as one glyph, on white:
3,798 pictures of 1,895 emoji and their skin tones. Captions are the English names and aliases of the PyPI
package `emoji` 2.16 (BSD), with words left out, shuffled and put into templates. The font is Google's, under the
SIL Open Font License 1.1; these weights reproduce its pictures and carry the same licence.

## Training
{training}

Repeat it with `python examples/emoji/train.py`.

## Figures
The generated picture's nearest neighbour among all 3,798 pictures, as 32x32 pixels, is the emoji asked for, in
any skin tone. Captions are drawn at random with fixed seeds; `score.json` lists those missed, and `sheet.png`
shows pictures of the first row, each with the true one to its right.

| captions | steps | guidance | top-1 | top-5 | top-1, no skin tone named | top-1, skin tone named |
|---|---|---|---|---|---|---|
{scores}
"""


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def write_card(model: Path) -> None:
    """Write README.md beside the weights in `model`."""
    from safetensors import safe_open

    parts = []
    for name, weights in (
        ("UNet2DConditionModel", "unet"),
        ("AutoencoderKL", "vae"),
        ("CLIPTextModel", "text_encoder"),
    ):
        with safe_open(next((model / weights).glob("*.safetensors")), "pt") as file:
            count = sum(file.get_tensor(key).numel() for key in file.keys())
        parts.append(f"| {weights} | `{name}` | {count / 1e6:.2f} M |")
    summary = json.loads((model / "training.json").read_text())
    stages = [
        f"{stage}: {summary[stage]['steps']:,} steps in {summary[stage]['seconds'] / 60:.1f} minutes"
        for stage in ("vae", "unet")
        if summary.get(stage)
    ]
    rows = json.loads((model / "score.json").read_text())
    scores = [
        f"| {r['captions']} | {r['steps']} | {r['guidance']} | {percent(r['top1'])} | {percent(r['top5'])} "
        f"| {percent(r['top1_without_skin_tone'])} | {percent(r['top1_with_skin_tone'])} |"
        for r in rows
    ]
    card = CARD.format(
        guidance=max(rows, key=lambda row: row["top1"])["guidance"],
        parts="\n".join(parts),
        megabytes=sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 1e6,
        training=f"On one {summary['gpu']}, torch {summary['torch']}. " + "; ".join(stages) + ".",
        scores="\n".join(scores),
    )
    (model / "README.md").write_text(card)
