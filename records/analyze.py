"""Print a table of finished runs and draw their curves, from what the runs wrote and nothing else.

    python records/analyze.py runs/demo_seed1337 [runs/...] [--out curve.png]

The picture goes to the first run's folder unless --out names another place.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

ROWS = (  # key of result.json, label, format
    ("steps", "steps", "{:,}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("val_bpb_roundtrip", "bpb, int6 artifact, non-overlapping", "{:.4f}"),
    ("val_bpb_sliding", "bpb, int6 artifact, sliding", "{:.4f}"),
    ("val_bpb_ttt", "bpb, test-time training", "{:.4f}"),
    ("ttt_gain_bpb", "  its gain over the same plan", "{:.4f}"),
    ("bytes_model", "artifact bytes", "{:,}"),
    ("bytes_total", "with code (cap 16,000,000)", "{:,}"),
    ("train_seconds", "contest clock, s", "{:.1f}"),
    ("strict_seconds", "process start to result, s", "{:.1f}"),
)


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """result.json, with the evaluator's scores where it has run, and the lines of metrics.jsonl of a run.

    ValueError for a folder that holds no finished run.
    """
    try:
        result = json.loads((folder / "result.json").read_text())
        evaluated = folder / "eval_ttt.json"
        if evaluated.exists():
            scores = json.loads(evaluated.read_text())
            result |= {key: scores[key] for key in ("val_bpb_ttt", "ttt_gain_bpb")}
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"{folder} holds no finished run: {error}") from error
    return result, metrics


def table(results: dict[str, dict]) -> str:
    """One column a run, one row a figure."""
    names = list(results)
    width = max(14, *(len(name) for name in names))
    lines = [" " * 38 + "".join(f"{name:>{width + 2}}" for name in names)]
    for key, label, form in ROWS:
        values = (form.format(results[name][key]) if key in results[name] else "-" for name in names)
        lines.append(f"{label:38}" + "".join(f"{value:>{width + 2}}" for value in values))
    return "\n".join(lines)


def draw(runs: dict[str, tuple[dict, list[dict]]], path: Path) -> None:
    """Training loss and validation bpb against seconds of training; the artifact's sliding score as a dotted line."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (name, (result, metrics)) in enumerate(runs.items()):
        for axis, key in ((left, "train_loss"), (right, "val_bpb")):
            points = [(row["seconds"], row[key]) for row in metrics if key in row]
            axis.plot([x for x, _ in points], [y for _, y in points], color=f"C{number}", label=Path(name).name)
        right.axhline(result["val_bpb_sliding"], color=f"C{number}", linestyle=":")
    left.set(xlabel="seconds of training", ylabel="training loss, nats per token")
    right.set(xlabel="seconds of training", ylabel="validation bits per byte (dotted: artifact, sliding)")
    left.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="the picture; default: curve.png in the first folder")
    arguments = parser.parse_args()
    try:
        runs = {str(folder): read_run(folder) for folder in arguments.runs}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = arguments.out or arguments.runs[0] / "curve.png"
    draw(runs, path)
    print(table({name: result for name, (result, _) in runs.items()}))
    print(f"curve: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
