"""Draw the pictures of docs/ from result files alone.

    python benchmarks/plot.py --results benchmarks/results/<gpu> --out docs

kernels.json gives linear_attention.png, time against tokens; models.json gives models.png, a bar a model. What a file
lacks is left out of its picture; a file that is not there gives none.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

OURS, FLOOR, BOUND, PALE, TEXT = "#2a6fdb", "#1b1e24", "#c3c8d1", "#e9ebef", "#4a4f59"

# name in kernels.json -> (label, color, line style)
LINES = {
    "ours": ("diffattn", OURS, "-"),
    "diffusers' Sana, eager": ("diffusers' Sana processor", "#d1495b", "-"),
    "diffusers' Sana, compiled": ("diffusers' Sana processor, compiled", "#d1495b", "--"),
    "LinFusion, eager": ("LinFusion's formula", "#c98a1b", "-"),
    "LinFusion, compiled": ("LinFusion's formula, compiled", "#c98a1b", "--"),
    "bf16 einsum, compiled": ("bf16 einsum, compiled", "#3d8f6b", "--"),
}


def machine(content: dict) -> str:
    env = content["environment"]
    return f"{env['gpu']}, torch {env['torch'].split('+')[0]}, triton {env['triton']}, {content['dtype']}, medians"


def size(tokens: float, _=None) -> str:
    return f"{tokens / 1024:g}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:g}"


def linear_panels(content: dict) -> list[tuple[tuple, list[dict]]]:
    """Rows of one (B, H, D) that come at several lengths, shortest first."""
    groups = defaultdict(list)
    for row in content["rows"]:
        if row["section"] == "linear" and "candidates" in row:
            groups[tuple(row["shape"][axis] for axis in "BHD")].append(row)
    panels = [(key, sorted(rows, key=lambda row: row["shape"]["N"])) for key, rows in groups.items()]
    panels = [(key, rows) for key, rows in panels if len({row["shape"]["N"] for row in rows}) > 2]
    return sorted(panels, key=lambda panel: panel[0][2])


def linear_attention(content: dict, path: Path) -> bool:
    """Milliseconds against tokens, both logarithmic, beside the time of the memory traffic alone."""
    panels = linear_panels(content)
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.9), squeeze=False)
    handles = {}
    for axis, ((B, H, D), rows) in zip(axes[0], panels, strict=True):
        tokens = [row["shape"]["N"] for row in rows]
        (line,) = axis.plot(tokens, [row["floor_ms"] for row in rows], color=FLOOR, lw=1.2, ls=":")
        handles.setdefault("floor: q, k, v read and o written once", line)
        for name, (label, color, style) in LINES.items():
            points = [
                (row["shape"]["N"], row["candidates"][name]["median"])
                for row in rows
                if "median" in row["candidates"].get(name, {})
            ]
            if not points:
                continue
            ours = name == "ours"
            (line,) = axis.plot(
                *zip(*points, strict=True),
                color=color,
                ls=style,
                lw=2.4 if ours else 1.4,
                marker="o",
                ms=5 if ours else 3.5,
                zorder=3 if ours else 2,
            )
            handles.setdefault(label, line)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(tokens))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(size))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, which="major", color=PALE)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        names = ", ".join(dict.fromkeys(re.sub(r" \d+px.*", "", row["case"]) for row in rows))
        axis.set_title(f"{names}: batch {B}, {H} heads of {D}", fontsize=10, loc="left")
        axis.set_xlabel("tokens")
    axes[0][0].set_ylabel("ms, forward")
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"Linear attention, {machine(content)}", fontsize=10, x=0.01, ha="left", color=TEXT)
    figure.tight_layout(rect=(0, 0.12, 1, 0.99))
    save(figure, path)
    return True


def model_bars(content: dict) -> list[tuple[str, dict]]:
    bars = []
    for row in content["rows"]:
        if "failed" in row:
            continue
        bars.append((f"{row['case'].split(',')[0]}\n{row['kind']}, eager", row))
        inner = row.get("compiled", {})
        if "stock" in inner:
            bars.append((f"{row['case'].split(',')[0]}\n{row['kind']}, compiled", inner))
    return bars


def models(content: dict, path: Path) -> bool:
    """Speed-up of each model over stock, in front of what it would be if attention took no time."""
    bars = model_bars(content)
    if not bars:
        return False
    figure, axis = plt.subplots(figsize=(9.5, 1.1 + 0.62 * len(bars)))
    widest = max(max(row["speedup"], row.get("bound", 1)) for _, row in bars)
    for i, (_, row) in enumerate(bars):
        speedup, bound = row["speedup"], row.get("bound")
        if bound is not None:
            axis.barh(i, bound - 1, left=1, height=0.62, color=BOUND, label="no core: the bound" if i == 0 else None)
        axis.barh(i, speedup - 1, left=1, height=0.34, color=OURS, label="patched" if i == 0 else None)
        of_bound = "" if bound is None else f" of {bound:.2f}x"
        axis.text(
            max(speedup, bound or 1, 1) * 1.02,
            i,
            f"{speedup:.2f}x{of_bound}   {row['stock']['median']:.1f} → {row['patched']['median']:.1f} ms",
            va="center",
            fontsize=9,
            color=TEXT,
        )
    axis.axvline(1, color=FLOOR, lw=1)
    axis.set_xscale("log")
    low = min(0.9, *(row["speedup"] * 0.97 for _, row in bars))
    axis.set_xlim(low, widest * (widest / low) ** 0.55)
    fine = (1.1, 1.2, 1.3) if widest < 2 else (1.5,)  # more would touch each other
    ticks = [tick for tick in (0.5, 0.7, 1, *fine, 2, 3, 5, 10, 20) if low <= tick <= widest * 1.05]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=9)
    axis.invert_yaxis()
    axis.grid(True, axis="x", color=PALE)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.legend(loc="upper right", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(
        f"One forward of a model, speed-up over stock\n{machine(content)}", fontsize=10, x=0.01, ha="left", color=TEXT
    )
    figure.tight_layout()
    save(figure, path)
    return True


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def draw(results: Path, out: Path) -> list[Path]:
    """Every picture that the files of a folder hold enough for."""
    drawn = []
    for source, picture, draw_one in (
        ("kernels.json", "linear_attention.png", linear_attention),
        ("models.json", "models.png", models),
    ):
        if (results / source).is_file() and draw_one(json.loads((results / source).read_text()), out / picture):
            drawn.append(out / picture)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder with kernels.json, models.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    args = parser.parse_args()
    print("\n".join(map(str, draw(args.results, args.out))) or f"{args.results} holds nothing to draw")


if __name__ == "__main__":
    main()
