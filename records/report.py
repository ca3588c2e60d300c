"""Reports of an evaluation: where the loss is, what each document lost, the score as it builds up.

`eval_ttt.py` logs and writes them where records/ lies beside it; analyze.py uses the same classes of targets.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import eval_ttt as ev
import train_gpt as tg
from train_gpt import BOS_ID, Chunk

LOSS_BORDERS = (1, 3, 5, 7, 10)  # nats
POSITION_BORDERS = (0, 128, 256, 512, 1024, 2048)  # targets after the beginning of the document


def loss_shares(nll: np.ndarray) -> list[dict[str, float]]:
    """For each border: how many targets lose more, as a share of the targets and of the whole loss."""
    total = float(nll.sum(dtype=np.float64))
    return [dict(above=b, targets=float((nll > b).mean()),
                 loss=float(nll[nll > b].sum(dtype=np.float64)) / total)
            for b in LOSS_BORDERS]  # fmt: skip


def classes(tokens: np.ndarray, byte_table: tg.ByteTable) -> dict[str, np.ndarray]:
    """Masks over the targets: by what the target is, and by its position in its document."""
    target, (begin, end) = tokens[1:], ev.documents(tokens)
    position = np.arange(len(target)) - np.repeat(begin, end - begin)
    border = target == BOS_ID
    starts = byte_table.has_leading_space[target]
    masks = {"document end": border, "word start": ~border & starts, "within a word": ~border & ~starts}
    for low, high in pairwise((*POSITION_BORDERS, len(target) + 1)):
        masks[f"position {low}+"] = (position >= low) & (position < high)
    return masks


def distribution(
    tokens: np.ndarray, before: np.ndarray, after: np.ndarray, byte_table: tg.ByteTable
) -> dict[str, Any]:
    """Where the loss is, before and after adaptation, in nats: by size, by class and by position."""
    table = []
    for name, mask in classes(tokens, byte_table).items():
        if mask.any():
            means = dict(before=float(before[mask].mean()), after=float(after[mask].mean()))
            table.append(dict(name=name, targets=int(mask.sum()), **means))
    return dict(before=loss_shares(before), after=loss_shares(after), classes=table)


def distribution_text(report: Mapping[str, Any]) -> str:
    lines = [f"{'nats above':>12} {'targets':>9} {'of the loss':>12} {'adapted':>9} {'of the loss':>12}"]
    for one, other in zip(report["before"], report["after"], strict=True):
        lines.append(f"{one['above']:>12} {one['targets']:>9.2%} {one['loss']:>12.2%} "
                     f"{other['targets']:>9.2%} "
                     f"{other['loss']:>12.2%}")  # fmt: skip
    lines.append(f"{'class':>14} {'targets':>9} {'before':>8} {'after':>8} {'gain':>8}  nats")
    for row in report["classes"]:
        lines.append(f"{row['name']:>14} {row['targets']:>9} {row['before']:>8.4f} {row['after']:>8.4f} "
                     f"{row['before'] - row['after']:>8.4f}")  # fmt: skip
    return "\n".join(lines)


def plot_distribution(path: Path, before: np.ndarray, after: np.ndarray, report: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    bins = np.linspace(0, 14, 57)
    for nll, name in ((before, "before"), (after, "adapted")):
        left.hist(np.minimum(nll, bins[-1]), bins, weights=nll / len(nll), histtype="step", label=name)
    left.set(xlabel="nats of a target", ylabel="share of the mean loss", title="where the loss is")
    left.legend()
    positions = [row for row in report["classes"] if row["name"].startswith("position")]
    right.bar(
        [row["name"].split()[1] for row in positions], [row["before"] - row["after"] for row in positions]
    )
    right.set(xlabel="targets after the document's beginning", ylabel="nats gained", title="gain by position")
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    tg.write_atomically(path, picture.getvalue())
    plt.close(figure)


def document_table(
    tokens: np.ndarray, before: np.ndarray, after: np.ndarray, byte_table: tg.ByteTable
) -> str:
    """CSV: one line per document, in the order of the text; sums of nats."""
    begin, end = ev.documents(tokens)
    num_bytes = byte_table.of_text(tokens)
    lines = ["document,first_target,targets,bytes,nats,nats_adapted"]
    for number, (a, b) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        sums = (float(x[a:b].sum(dtype=np.float64)) for x in (before, after))
        lines.append(
            f"{number},{a},{b - a},{int(num_bytes[a:b].sum())}," + ",".join(f"{x:.4f}" for x in sums)
        )
    return "\n".join(lines) + "\n"


def running_bpb(
    plan: Sequence[Chunk], nll: np.ndarray, num_bytes: np.ndarray, points: int = 20
) -> Iterator[str]:
    """Lines with the score of everything up to some chunks of the plan."""
    loss = total = 0.0
    shown = {round(x) for x in np.linspace(0, len(plan) - 1, points)}
    for number, chunk in enumerate(plan):
        for begin, end in chunk.scored.ranges():
            loss += float(nll[begin:end].sum(dtype=np.float64))
            total += float(num_bytes[begin:end].sum())
        if number in shown and total:
            yield f"chunk:{number + 1}/{len(plan)} running_bpb:{loss / math.log(2) / total:.6f}"


def write_reports(
    folder: Path,
    tokens: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    byte_table: tg.ByteTable,
    log: tg.RunLog,
) -> None:
    """Log the loss distribution; on rank 0 write distribution.json, documents.csv and distribution.png."""
    report = distribution(tokens, before, after, byte_table)
    for line in distribution_text(report).splitlines():
        log.line(line)
    if tg.rank() == 0:
        tg.write_atomically(folder / "distribution.json", json.dumps(report, indent=1).encode())
        table = document_table(tokens, before, after, byte_table)
        tg.write_atomically(folder / "documents.csv", table.encode())
        try:
            plot_distribution(folder / "distribution.png", before, after, report)
        except Exception as error:  # no matplotlib, or no folder for its fonts: no reason to lose a score
            log.line(f"WARNING: distribution.png is not drawn: {error}. distribution.json has its numbers.")
