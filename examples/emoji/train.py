"""Train the emoji pipeline from nothing: first the VAE, then the UNet together with its text encoder.

    python examples/emoji/train.py     # renders the font if need be, then about 9 minutes on one H100

A run that is cut off, or ended by --run-minutes, goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from captions import vary
from data import DATA, FONT, HERE, Emoji, build, load, save
from diffusers import AutoencoderKL, StableDiffusionPipeline
from loop import fit
from networks import (
    assemble,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    normalise_latents,
)
from score import score
from torch import Tensor

VARIATIONS = 64  # captions tokenised ahead for each picture
CAPTION_DROPOUT = 0.1  # for classifier-free guidance
KL_WEIGHT = 1e-3


def to_unit_range(pictures: Tensor) -> Tensor:
    """(B, 128, 128, 3) uint8 to (B, 3, 128, 128) float in [-1, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def edges(x: Tensor) -> Tensor:
    """Differences of neighbouring pixels, right and down, of (B, C, H, W)."""
    return torch.cat([x.diff(dim=2)[..., :-1], x.diff(dim=3)[..., :-1, :]], dim=1)


def train_vae(accelerator: Accelerator, vae: AutoencoderKL, pictures: Tensor, *, batch: int, **options) -> dict | None:
    """Pixels and edges by L1, and a small KL term that keeps the latents smooth."""

    def loss_of_step() -> Tensor:
        chosen = torch.randint(len(pictures), (batch,), device=pictures.device)
        x = to_unit_range(pictures[chosen])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(y, x) + F.l1_loss(edges(y), edges(x)) + KL_WEIGHT * kl

    summary = fit(accelerator, {"vae": vae}, loss_of_step, label="vae", **options)
    if summary:
        latents = encode(vae, pictures)
        normalise_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    return summary


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The latents of all pictures, (count, 4, 32, 32), float32."""
    parts = [vae.encode(to_unit_range(part)).latent_dist.mode() for part in pictures.split(128)]
    return torch.cat(parts).float()


def tokenise(tokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def sampling_weights(emoji: list[Emoji]) -> Tensor:
    """How often to draw each picture: up to 25 skin tones of one emoji together count twice as much as it."""
    tones: dict[str, int] = {}
    for e in emoji:
        tones[e.family] = tones.get(e.family, 0) + (e.skin_tones > 0)
    return torch.tensor([min(0.35, 2 / tones[e.family]) if e.skin_tones else 1.0 for e in emoji])


def train_unet(
    accelerator: Accelerator,
    unet,
    text_encoder,
    tokenizer,
    emoji: list[Emoji],
    latents: Tensor,
    *,
    batch: int,
    **options,
) -> dict | None:
    """v-prediction on latents that stay on the GPU, captions tokenised ahead: a step waits for nothing."""
    device = latents.device
    rng = random.Random(0)
    varied = [vary(e.captions, rng) for e in emoji for _ in range(VARIATIONS)]
    tokens = tokenise(tokenizer, varied).view(len(emoji), VARIATIONS, -1).to(device)
    no_caption = tokenise(tokenizer, [""]).to(device)
    weights = sampling_weights(emoji).to(device)
    signal_power = make_scheduler().alphas_cumprod.to(device)

    def loss_of_step() -> Tensor:
        chosen = torch.multinomial(weights, batch, replacement=True)
        words = tokens[chosen, torch.randint(VARIATIONS, (batch,), device=device)]
        words = torch.where(torch.rand(batch, 1, device=device) < CAPTION_DROPOUT, no_caption, words)
        t = torch.randint(len(signal_power), (batch,), device=device)
        alpha = signal_power[t].sqrt()[:, None, None, None]
        sigma = (1 - signal_power[t]).sqrt()[:, None, None, None]
        x, noise = latents[chosen], torch.randn(batch, *latents.shape[1:], device=device)
        noisy = (alpha * x + sigma * noise).to(memory_format=torch.channels_last)
        v = unet(noisy, t, text_encoder(words).last_hidden_state).sample.float()
        return F.mse_loss(v, alpha * noise - sigma * x)

    return fit(accelerator, {"unet": unet, "text_encoder": text_encoder}, loss_of_step, label="unet", **options)


def export(path: Path, vae, unet, text_encoder, tokenizer) -> None:
    """Write the pipeline with float16 weights, to load as float32 unless asked otherwise."""
    assemble(vae.half(), unet.half(), text_encoder.half(), tokenizer).save_pretrained(path)
    # diffusers loads its models as float32 by default, transformers as what the configuration says.
    config_path = path / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=DATA)
    add("--runs", type=Path, default=HERE / "runs", help="checkpoints, removed by hand")
    add("--model", type=Path, default=HERE / "model", help="where the finished pipeline goes")
    add("--init-from", type=Path, help="a finished pipeline: keep its VAE, train its UNet and text encoder on")
    add("--vae-minutes", type=float, default=1.7)
    add("--unet-minutes", type=float, default=6.4)
    add("--run-minutes", type=float, default=math.inf, help="end this run early; start again to go on")
    add("--batch", type=int, default=256)
    add("--vae-batch", type=int, default=64)
    add("--learning-rate", type=float, default=1e-3)
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    add("--captions", type=int, default=500, help="how many captions to score at the end; 0 for none")
    add("--tiny", action="store_true", help="a smoke test: tiny networks, 16 pictures, 2 steps")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    deadline = time.monotonic() + 60 * args.run_minutes
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    # A graph that fails to compile runs uncompiled instead of ending the run.
    torch._dynamo.config.suppress_errors = True
    torch.manual_seed(0)

    if not args.data.exists() and FONT.exists():
        save(args.data, *build(FONT))
    emoji, arrays = load(args.data)
    if args.tiny:
        emoji, arrays = emoji[:16], arrays[:16]
        args.batch, args.vae_batch, args.captions = 4, 2, min(args.captions, 2)
    pictures = torch.from_numpy(np.ascontiguousarray(arrays)).to(accelerator.device)
    if args.init_from:
        start = StableDiffusionPipeline.from_pretrained(args.init_from, dtype=torch.float32)
        vae, unet, text_encoder, tokenizer = start.vae, start.unet, start.text_encoder, start.tokenizer
    else:
        tokenizer = make_tokenizer([caption for e in emoji for caption in e.captions])
        vae, unet = make_vae(tiny=args.tiny), make_unet(tiny=args.tiny)
        text_encoder = make_text_encoder(tokenizer, tiny=args.tiny)
    for model in (vae, unet):
        model.to(accelerator.device, memory_format=torch.channels_last)
    text_encoder.to(accelerator.device)
    if args.compile:  # the VAE trains too shortly to pay for compiling it
        unet.compile(dynamic=False)

    args.runs.mkdir(parents=True, exist_ok=True)
    options = {"deadline": deadline, "learning_rate": args.learning_rate, "max_steps": 2 if args.tiny else None}
    summary = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch": torch.__version__}
    if not args.init_from:
        summary["vae"] = train_vae(
            accelerator,
            vae,
            pictures,
            batch=args.vae_batch,
            checkpoint=args.runs / "vae.pt",
            minutes=args.vae_minutes,
            **options,
        )
    if args.init_from or summary["vae"]:
        summary["unet"] = train_unet(
            accelerator,
            unet,
            text_encoder,
            tokenizer,
            emoji,
            encode(vae, pictures),
            batch=args.batch,
            checkpoint=args.runs / "unet.pt",
            minutes=args.unet_minutes,
            **options,
        )
    if not summary.get("unet"):
        print("The time for this run is over; start it again to go on.")
        return

    export(args.model, vae, unet, text_encoder, tokenizer)
    (args.model / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"Saved {args.model}: {sum(f.stat().st_size for f in args.model.rglob('*') if f.is_file()) / 1e6:.1f} MB")
    if args.captions:
        score(args.model, args.data, captions=args.captions, steps=2 if args.tiny else 20)


if __name__ == "__main__":
    main()
