"""Draw README's figure from the kept quantization benchmark: bytes against loss of five pipelines.

python tests/benchmarks/figure.py records/guide/bytes.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

KEPT = Path(__file__).resolve().parents[2] / "records/benchmarks/2026-11-21_quantisation_cpu.json"
MODEL = "half an hour"  # of training, 1.06 M parameters
SHOWN = {  # pipeline -> label, color, where the label stands (point of the curve, offset in points)
    "int6 by row, zstd-22": ("int6 by row, zstd\n(#399 to #549)", "#8a8a8a", 1, (8, 2)),
    "step 1/31, lzma-9 (#1019)": ("int6 GPTQ, lzma\n(#1019)", "#b87a2a", 3, (-92, -20)),
    "k sigma, brotli-11": ("k sigma GPTQ, brotli\n(form of #1394)", "#c98bb9", 4, (-20, -34)),
    "k sigma, tables 12 sigma, brotli-11": (
        "the same, embeddings\nclipped at 12 sigma",
        "#b0413e",
        0,
        (-104, 10),
    ),
    "two-sided, trellis, ans": ("row-and-column scales,\ntrellis, ANS (ours)", "#1f5fa8", 2, (-150, -8)),
}
# All of the field's in the benchmark; #1394's own tables, at 20 sigma, lose more than the picture shows.
FIELD = (*list(SHOWN)[:-1], "k sigma, tables 20 sigma, brotli-11 (#1394)", "k sigma, 5 % pruned, brotli-11")


def draw(path: Path) -> None:
    """Write the figure; a curve keeps the points that no smaller and better one beats."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    curves = json.loads(KEPT.read_text())["points"][MODEL]["curves"]
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, (label, color, at, offset) in SHOWN.items():
        points = sorted((point["bytes"] / 1e3, point["gap"]) for point in curves[name])
        best = [point for i, point in enumerate(points) if point[1] < min([1.0, *(p[1] for p in points[:i])])]
        x, y = zip(*best, strict=True)
        width = 2.6 if "ours" in label else 1.6
        axis.plot(x, y, marker="o", markersize=4, color=color, linewidth=width)
        axis.annotate(label, best[at], offset, textcoords="offset points", color=color, fontsize=9)
    axis.set(yscale="log", ylim=(4e-4, 3e-2), xlabel="artifact, kB", ylabel="loss from quantization, bpb")
    axis.set_yticks([0.0005, 0.001, 0.002, 0.005, 0.01, 0.02], minor=False)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_title("The same 1.06 M weights, quantized and coded: left and low is better", fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the picture to write")
    draw(parser.parse_args().path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
