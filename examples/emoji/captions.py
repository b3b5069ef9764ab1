"""What an emoji is called: captions from the names in the `emoji` package, and ways to vary them."""

from __future__ import annotations

import random
import re
import unicodedata

SKIN_TONE = re.compile(r" (?:medium-light|medium-dark|light|medium|dark) skin tone")
TEMPLATES = ("a {}", "an {}", "the {}", "{} emoji", "emoji of {}", "emoji of a {}", "a picture of {}")


def plain(name: str) -> str:
    """`:Åland_Islands:` -> `aland islands`: lower-case ASCII words, as people type them."""
    name = name.strip(":").replace("_", " ").replace("\u2019", "'")
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()


def without_skin_tone(caption: str) -> str:
    """The name that all skin tones of one emoji share, for folding them.

    Couples of two tones are named `kiss person person light skin tone dark skin tone`, their
    one-tone and untoned forms just `kiss`.
    """
    return SKIN_TONE.sub("", caption).replace(" person person", "")


def captions_of(character: str, names: dict) -> list[str]:
    """All captions of one emoji, the one asked for in the score first.

    Args:
        character: the emoji, one or more code points.
        names: its entry in `emoji.EMOJI_DATA`.
    """
    name = plain(names["en"])
    is_flag = "\U0001f1e6" <= character[0] <= "\U0001f1ff"
    captions = [f"flag of {name}", name] if is_flag else [name]
    # One- and two-letter aliases are country codes and blood types: too short to mean one picture.
    captions += [alias for alias in map(plain, names.get("alias", [])) if len(alias) > 2]
    return list(dict.fromkeys(captions))


def vary(captions: list[str], rng: random.Random) -> str:
    """One caption as a person might put it: another name, a word left out, another order, a template."""
    words = (captions[0] if rng.random() < 0.5 else rng.choice(captions)).split()
    if len(words) > 2 and rng.random() < 0.15:
        words.pop(rng.randrange(len(words)))
    if rng.random() < 0.1:
        rng.shuffle(words)
    template = rng.choice(TEMPLATES) if rng.random() < 0.4 else "{}"
    return template.format(" ".join(words))
