"""Does the pipeline draw what it is asked for? Each picture's nearest emoji should be that one.

    python examples/emoji/score.py

Captions and seeds are fixed. Pictures are compared as 32x32 pixels with all emoji of the font; a
match with another skin tone of the same emoji counts. Writes score.json, a sheet of pictures beside
the truth, and the figures into the model card.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from card import write_card
from data import DATA, HERE, load
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

MODEL = HERE / "model"


def thumbnails(pictures: np.ndarray, device: torch.device) -> Tensor:
    """(B, S, S, 3) in 0..255, S a multiple of 32, to (B, 3072): the mean colours of a 32 x 32 grid."""
    x = torch.from_numpy(np.asarray(pictures, dtype=np.float32)).to(device)
    cell = x.shape[1] // 32
    return x.view(len(x), 32, cell, 32, cell, 3).mean((2, 4)).flatten(1)


def draw(pipe, prompts: list[str], *, steps: int, guidance: float, batch: int = 100, **size: int) -> np.ndarray:
    """One picture a prompt, (B, H, W, 3) uint8; the i-th prompt's noise comes from seed i on any device.

    Args:
        size: height and width, where they are not 128.
    """
    parts = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        seeds = [torch.Generator("cpu").manual_seed(first + i) for i in range(len(part))]
        options = dict(num_inference_steps=steps, guidance_scale=guidance, output_type="np", **size)
        images = pipe(part, generator=seeds, **options).images
        parts.append((images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def contact_sheet(drawn: np.ndarray, truth: np.ndarray, rows: int = 8, pairs: int = 6) -> Image.Image:
    """Each drawn picture with the true one to its right."""
    count = min(rows * pairs, len(drawn))
    sheet = np.full((rows * pairs, 128, 2 * 128, 3), 255, dtype=np.uint8)
    sheet[:count] = np.concatenate([drawn[:count], truth[:count]], axis=2)
    sheet = sheet.reshape(rows, pairs, 128, 256, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(sheet.reshape(rows * 128, pairs * 256, 3))


def score(
    model: Path = MODEL,
    data: Path = DATA,
    *,
    captions: int = 500,
    guidance: tuple[float, ...] = (3.0, 2.0, 1.5),
    steps: int = 20,
    dtype: torch.dtype = torch.float32,
) -> list[dict]:
    """One row of figures for each guidance scale; the sheet shows the first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    emoji, pictures = load(data)
    chosen = random.Random(0).sample(range(len(emoji)), captions)
    prompts = [emoji[i].captions[0] for i in chosen]
    families = np.array([e.family for e in emoji])
    toned = np.array([emoji[i].skin_tones > 0 for i in chosen])
    truth = thumbnails(pictures, device)

    rows = []
    for scale in guidance:
        start = time.monotonic()
        drawn = draw(pipe, prompts, steps=steps, guidance=scale)
        seconds = time.monotonic() - start
        order = torch.cdist(thumbnails(drawn, device), truth).topk(5, largest=False).indices.cpu().numpy()
        hits = families[order] == families[chosen][:, None]  # [captions, 5]
        first, five = hits[:, 0], hits.any(1)
        row = {
            "captions": captions,
            "steps": steps,
            "guidance": scale,
            "top1": round(float(first.mean()), 4),
            "top5": round(float(five.mean()), 4),
            "top1_without_skin_tone": round(float(first[~toned].mean()), 4) if (~toned).any() else None,
            "top1_with_skin_tone": round(float(first[toned].mean()), 4) if toned.any() else None,
            "seconds": round(seconds, 1),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "dtype": str(dtype).removeprefix("torch."),
            "missed": [prompt for prompt, hit in zip(prompts, first, strict=True) if not hit],
        }
        print({key: value for key, value in row.items() if key != "missed"}, flush=True)
        if not rows:
            contact_sheet(drawn, pictures[chosen]).save(model / "sheet.png")
        rows.append(row)
    (model / "score.json").write_text(json.dumps(rows, indent=1) + "\n")
    write_card(model)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 2.0, 1.5])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    score(args.model, args.data, captions=args.captions, guidance=tuple(args.guidance), steps=args.steps)
