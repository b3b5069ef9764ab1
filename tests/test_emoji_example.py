"""The emoji example goes through all its stages, at a size for a smoke test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def test_captions_are_lower_case_words_and_skin_tones_fold(example):
    import captions

    names = {"en": ":Thumbs_Up_Light_Skin_Tone:", "alias": [":+1:", ":yes_hand:"]}
    assert captions.captions_of("\U0001f44d", names) == ["thumbs up light skin tone", "yes hand"]
    assert captions.without_skin_tone("thumbs up medium-dark skin tone") == "thumbs up"
    assert captions.captions_of("\U0001f1f3\U0001f1f4", {"en": ":Norway:"}) == ["flag of norway", "norway"]


@pytest.mark.slow
def test_every_stage_of_the_training_runs(example, tmp_path):
    import data

    records = [data.Emoji(chr(0x1F600 + i), [f"colour {i}"], f"colour {i}", 0) for i in range(16)]
    data.save(tmp_path / "emoji.zip", records, [Image.new("RGB", (128, 128), (16 * i, 99, 0)) for i in range(16)])
    command = [sys.executable, str(EXAMPLE / "train.py"), "--tiny", "--data", str(tmp_path / "emoji.zip")]
    command += ["--runs", str(tmp_path / "runs"), "--model", str(tmp_path / "model")]
    subprocess.run(command, check=True, capture_output=True)
    score = json.loads((tmp_path / "model" / "score.json").read_text())
    assert score[0]["captions"] == 2 and 0 <= score[0]["top1"] <= score[0]["top5"] <= 1
    assert "top-1" in (tmp_path / "model" / "README.md").read_text()
    # Started again, a finished run has nothing left to train.
    again = subprocess.run([*command, "--captions", "0"], check=True, capture_output=True, text=True).stdout
    assert "vae: goes on from step 2" in again and "unet: goes on from step 2" in again
