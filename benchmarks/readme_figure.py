"""Draw the README's picture: the demo's grid, and below it the times of results/<gpu>/models.json.

diffattn demo --out demo.png
python benchmarks/readme_figure.py --results benchmarks/results/<gpu> --grid demo.png --out docs/overview.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STOCK, PATCHED = "#b8bcc4", "#2a6fdb"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    content = json.loads((args.results / "models.json").read_text())
    rows = [row for row in content["rows"] if "failed" not in row]

    grid = plt.imread(args.grid)
    width, below = 12, 3.8
    above = width * grid.shape[0] / grid.shape[1]
    figure = plt.figure(figsize=(width, above + below), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=(above, below))
    top, bottom = (part.add_subplot() for part in parts)
    top.imshow(grid, interpolation="lanczos")
    top.axis("off")

    # Relative to stock, since the cases differ a hundredfold in time.
    labels = []
    for i, row in enumerate(rows):
        stock, patched = row["stock"]["median"], row["patched"]["median"]
        bottom.barh(i - 0.19, 1, height=0.34, color=STOCK, label="stock" if i == 0 else None)
        bottom.barh(i + 0.19, patched / stock, height=0.34, color=PATCHED, label="patched" if i == 0 else None)
        bottom.text(1.01, i - 0.19, f"{stock:.1f} ms", va="center", fontsize=9, color="#555555")
        bottom.text(
            patched / stock + 0.01, i + 0.19, f"{patched:.1f} ms, {stock / patched:.2f}x", va="center", fontsize=9
        )
        batch = "" if row["batch"] == content["batch"] else f", batch {row['batch']}"
        labels.append(f"{row['case'].split(',')[0]}, {row['kind']}{batch}")
    bottom.set_yticks(range(len(rows)), labels, fontsize=9)
    bottom.invert_yaxis()
    bottom.set_xlim(0, 1.25)
    bottom.set_xticks([])
    bottom.spines[["top", "right", "bottom"]].set_visible(False)
    bottom.legend(loc="lower right", frameon=False, fontsize=9)
    machine = content["environment"]
    bottom.set_title(
        f"One forward, batch {content['batch']}, {content['dtype']}, eager; {machine['gpu']}, "
        f"torch {machine['torch'].split('+')[0]}, median",
        fontsize=10,
        loc="left",
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
