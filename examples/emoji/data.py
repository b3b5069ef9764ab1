"""Render every emoji of Noto Color Emoji to 128x128 on white, with captions, into one zip file.

    apt-get install fonts-noto-color-emoji && pip install emoji pillow
    python examples/emoji/data.py

The zip holds `emoji.json` and one lossless WebP a picture, so that training needs neither the font nor `emoji`.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from captions import SKIN_TONE, captions_of, without_skin_tone
from PIL import Image, ImageDraw, ImageFont, features

HERE = Path(__file__).parent
DATA = HERE / "data" / "emoji.zip"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the one size of the font's bitmaps: 136 x 128 pixels
SIZE = 128


@dataclass(frozen=True)
class Emoji:
    character: str
    captions: list[str]  # the first is its name
    family: str  # shared by all skin tones of one emoji and by emoji drawn alike
    skin_tones: int  # how many skin tones the name gives: 0, 1 or 2


def render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The picture of one emoji, or None if the font has no single glyph for it."""
    left, top, right, bottom = font.getbbox(character)
    # A sequence that the font cannot join comes out as several glyphs, an unknown emoji as an empty one.
    if right - left > 140 or bottom == top:
        return None
    canvas = Image.new("RGBA", (136, 136), "white")
    glyph = Image.new("RGBA", canvas.size)
    ImageDraw.Draw(glyph).text((-left, 4 - top), character, font=font, embedded_color=True)
    canvas.alpha_composite(glyph)
    return canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def build(font_path: Path) -> tuple[list[Emoji], list[Image.Image]]:
    import emoji

    if not features.check("raqm"):
        raise RuntimeError("Pillow has no raqm here, without which joined emoji come apart: pip install pillow")
    font = ImageFont.truetype(str(font_path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    whole = {emoji.STATUS["fully_qualified"], emoji.STATUS["component"]}
    captions = {c: captions_of(c, names) for c, names in emoji.EMOJI_DATA.items() if names["status"] in whole}
    by_name = {texts[0]: texts for texts in captions.values()}

    records, pictures, family_of = [], [], {}
    for character, texts in captions.items():
        picture = render(character, font)
        if picture is None:
            continue
        tones = "".join(SKIN_TONE.findall(texts[0]))
        base = without_skin_tone(texts[0]) if tones else texts[0]
        if tones:  # only the untoned emoji has aliases
            texts = texts + [alias + tones for alias in by_name.get(base, [])[1:]]
        # An alias must not be another emoji's name: "sunrise" is one, and an alias of another.
        texts = texts[:1] + [t for t in texts[1:] if t not in by_name]
        family = family_of.setdefault(picture.tobytes(), without_skin_tone(base))
        records.append(Emoji(character, texts, family, tones.count("skin tone")))
        pictures.append(picture)
    return records, pictures


def save(path: Path, records: list[Emoji], pictures: list[Image.Image]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with zipfile.ZipFile(partial, "w") as file:
        file.writestr("emoji.json", json.dumps([vars(r) for r in records], ensure_ascii=False, indent=0))
        for i, picture in enumerate(pictures):
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", lossless=True)
            file.writestr(f"{i:04}.webp", buffer.getvalue())
    partial.replace(path)


def load(path: Path = DATA) -> tuple[list[Emoji], np.ndarray]:
    """The records and their pictures, (count, 128, 128, 3) uint8."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run {HERE / 'data.py'} first (it needs {FONT})")
    with zipfile.ZipFile(path) as file:
        records = [Emoji(**fields) for fields in json.loads(file.read("emoji.json"))]
        pictures = [Image.open(io.BytesIO(file.read(f"{i:04}.webp"))) for i in range(len(records))]
        return records, np.stack([np.asarray(picture) for picture in pictures])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--out", type=Path, default=DATA)
    args = parser.parse_args()
    records, pictures = build(args.font)
    save(args.out, records, pictures)
    families = len({record.family for record in records})
    print(f"{len(records)} pictures of {families} emoji in {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")
