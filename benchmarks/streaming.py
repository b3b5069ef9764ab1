"""Time and memory of a frame, from the first to the ten thousandth: do they stay the same?

    python benchmarks/streaming.py --out benchmarks/results/<gpu> [--plot docs]

A layer of SANA-Video's shape (20 heads of 112, 1560 tokens a frame, one sample) and, with --model, its whole
transformer with random weights at 480p, frame by frame. Writes streaming.json: median microseconds a frame and bytes
allocated, for each hundredth of the frames; --plot draws streaming.png from such a file.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from report import environment, write_json

import diffattn

TOKENS, HEADS, DIM = 1560, 20, 112


def layer(device, dtype):
    core = diffattn.CausalLinearAttention("relu", block=TOKENS)
    q, k, v = torch.randn(3, 1, TOKENS, HEADS, DIM, device=device, dtype=dtype).unbind()
    return core, (q, k, v), {}


def model(device, dtype):
    from diffusers import SanaVideoTransformer3DModel

    net = SanaVideoTransformer3DModel(rope_max_seq_len=1024).to(device, dtype).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights have nothing to lose
        diffattn.patch(net, diffattn.CausalLinearAttention("relu", block=TOKENS), layers="*attn1")
    frame = torch.randn(1, 16, 1, 60, 104, device=device, dtype=dtype)
    text = torch.randn(1, 300, 2304, device=device, dtype=dtype)
    times = torch.tensor([500], device=device)
    return net, (frame,), dict(encoder_hidden_states=text, timestep=times, return_dict=False)


def measure(made, frames: int, device) -> list[dict]:
    net, args, kwargs = made
    gpu = device.type == "cuda"
    lap = max(1, frames // 100)
    rows = []
    with torch.no_grad(), diffattn.streaming(net) as stream:
        for _ in range(3):
            stream(*args, **kwargs)  # what is compiled and allocated once
        for first in range(0, frames, lap):
            times = []
            for _ in range(min(lap, frames - first)):
                started = time.perf_counter()
                stream(*args, **kwargs)
                if gpu:
                    torch.cuda.synchronize()
                times.append(1e6 * (time.perf_counter() - started))
            states = sum(t.numel() * 4 for s in stream.states.values() for t in s.tensors())
            allocated = torch.cuda.memory_allocated() if gpu else states
            rows.append(dict(frame=first, microseconds=statistics.median(times), bytes=allocated, state_bytes=states))
    return rows


def plot(path: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(path.read_text())
    fig, axes = plt.subplots(2, 1, sharex=True, figsize=(7, 4))
    for name, rows in content["rows"].items():
        frames = [row["frame"] for row in rows]
        axes[0].plot(frames, [row["microseconds"] / 1e3 for row in rows], label=name)
        axes[1].plot(frames, [row["bytes"] / 2**20 for row in rows], label=name)
    axes[0].set(ylabel="ms a frame", ylim=(0, None), title=f"A stream on {content['environment']['gpu']}")
    axes[1].set(ylabel="MiB allocated", xlabel="frames seen", ylim=(0, None))
    axes[0].legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(out / "streaming.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--model", action="store_true", help="the whole transformer, for a tenth of the frames, too")
    parser.add_argument("--plot", type=Path, help="folder for streaming.png")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = {"one layer": measure(layer(device, dtype), args.frames, device)}
    if args.model:
        rows["transformer"] = measure(model(device, dtype), max(1, args.frames // 10), device)
    machine = environment() if device.type == "cuda" else dict(gpu="a CPU", torch=torch.__version__)
    write_json(args.out / "streaming.json", dict(environment=machine, dtype=str(dtype), rows=rows))
    for name, lines in rows.items():
        tenth = max(1, len(lines) // 10)
        early, late = (statistics.median(r["microseconds"] for r in part) for part in (lines[:tenth], lines[-tenth:]))
        grown = lines[-1]["bytes"] - lines[0]["bytes"]
        print(f"{name}: {early:.0f} us a frame at first, {late:.0f} at last; {grown} bytes more")
    if args.plot:
        plot(args.out / "streaming.json", args.plot)


if __name__ == "__main__":
    main()
