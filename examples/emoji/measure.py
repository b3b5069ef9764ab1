"""How good are a pipeline's pictures? Is each the emoji asked for, and how far is it from the teacher's?"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import DATA, load
from score import draw, thumbnails
from torch import Tensor

GUIDANCE = 3.0  # the pipeline's best, see its card
STEPS = 20


@dataclass
class Task:
    """Captions with fixed seeds, and what their pictures are compared with."""

    prompts: list[str]
    wanted: np.ndarray  # of each prompt, its family
    families: np.ndarray  # of each emoji
    truth: Tensor  # thumbnails of all emoji

    @classmethod
    def load(cls, captions: int, data: Path = DATA) -> Task:
        """The first of the captions that score.py draws, with its seeds."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        emoji, pictures = load(data)
        chosen = random.Random(0).sample(range(len(emoji)), min(500, len(emoji)))[:captions]
        families = np.array([e.family for e in emoji])
        return cls([emoji[i].captions[0] for i in chosen], families[chosen], families, thumbnails(pictures, device))

    def draw(self, pipe, *, size: int = 128, steps: int = STEPS, batch: int = 100) -> np.ndarray:
        """(captions, size, size, 3) uint8."""
        return draw(pipe, self.prompts, steps=steps, guidance=GUIDANCE, batch=batch, height=size, width=size)

    def top1(self, pictures: np.ndarray) -> float:
        """Share of pictures whose nearest emoji, as 32 x 32 pixels, is of the family asked for."""
        nearest = torch.cdist(thumbnails(pictures, self.truth.device), self.truth).argmin(1).cpu().numpy()
        return float((self.families[nearest] == self.wanted[: len(pictures)]).mean())


def difference(pictures: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Mean squared error of pixels in 0..1, and mean SSIM, from the teacher's pictures of the same seeds."""
    mse, ssim = [], []
    for first in range(0, len(pictures), 50):
        one, other = (_unit(x[first : first + 50]) for x in (pictures, teacher))
        mse.append((one - other).square().mean((1, 2, 3)))
        ssim.append(structural_similarity(one, other))
    return {"mse": float(torch.cat(mse).mean()), "ssim": float(torch.cat(ssim).mean())}


def structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of (B, 3, H, W) in 0..1, (B,): Wang et al. 2004, eq. 13, an 11 x 11 Gaussian window of deviation 1.5.

    Of each colour channel, averaged. In float64: a variance is a small difference of two large means, which a GPU's
    convolution of float32 in TF32 loses.
    """
    x, y = x.double(), y.double()
    offsets = torch.arange(11, device=x.device, dtype=x.dtype) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    line = (line / line.sum()).expand(3, 1, 1, 11)

    def blur(image):
        return F.conv2d(F.conv2d(image, line, groups=3), line.mT, groups=3)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def _unit(pictures: np.ndarray) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255
