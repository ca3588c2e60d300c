"""Reports of an evaluation: where the loss is, what each document lost, the score as it builds up.

`eval_ttt.py` logs and writes them where records/ lies beside it; analyze.py uses the same classes of targets.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import eval_ttt as ev
import train_gpt as tg
from train_gpt import BOS_ID, Chunk

LOSS_BORDERS = (1, 3, 5, 7, 10)  # nats
POSITION_BORDERS = (0, 128, 256, 512, 1024, 2048)  # targets after the beginning of the document
STYLE = {  # of all figures; the rest is matplotlib's default
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.9", "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": "medium", "legend.frameon": False, "font.size": 9,
    "text.parse_math": False,  # a run's name may contain dollar signs
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Estimates with standard errors
# ------------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A number and the influence of each independent unit (document, sequence, probe); no units: exact."""

    value: float
    influence: np.ndarray = np.zeros(0)

    @property
    def error(self) -> float | None:
        """Return the cluster-robust standard error; None with fewer than two units."""
        n = len(self.influence)
        return math.sqrt(n / (n - 1) * float((self.influence**2).sum())) if n > 1 else None

    def less(self, other: Estimate) -> Estimate:
        """Return the difference of two estimates over the same units, with the paired error."""
        return Estimate(self.value - other.value, self.influence - other.influence)

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval by Student's t with (number of units - 1) degrees of freedom."""
        from scipy import stats  # an evaluation needs no intervals, and runs without scipy

        half = None if self.error is None else self.error * float(stats.t.ppf(0.975, len(self.influence) - 1))
        return None if half is None else (self.value - half, self.value + half)

    def text(self, form: str) -> str:
        return f"{self.value:{form}}" + ("" if self.error is None else f"±{self.error:{form}}")


def clustered(x: np.ndarray, units: np.ndarray) -> Estimate:
    """Return the mean of `x` with its cluster-robust error, for units of unequal size.

    `units` has the unit index of each entry. With S_g and n_g the sum and count of unit g, its influence is
    (S_g - n_g mean) / N (Liang and Zeger 1986; for evaluations arXiv 2411.00640).
    """
    _, units = np.unique(units, return_inverse=True)
    mean = float(x.mean(dtype=np.float64))
    sums, counts = np.bincount(units, x), np.bincount(units)
    return Estimate(mean, (sums - counts * mean) / len(x))


def documents_of(tokens: np.ndarray) -> np.ndarray:
    """Return the document index of each target, (targets,)."""
    begin, end = ev.documents(tokens)
    return np.repeat(np.arange(len(begin)), end - begin)


# ------------------------------------------------------------------------------------------------------------
# Where the loss is
# ------------------------------------------------------------------------------------------------------------


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


def class_label(name: str) -> str:
    """Return the name of a class for a reader: the range of a position class, other names unchanged."""
    kind, _, low = name.rstrip("+").partition(" ")
    if kind != "position" or int(low) not in POSITION_BORDERS[:-1]:
        return name.removeprefix("position ")
    return f"{low}-{POSITION_BORDERS[POSITION_BORDERS.index(int(low)) + 1] - 1}"


def distribution(
    tokens: np.ndarray, before: np.ndarray, after: np.ndarray, byte_table: tg.ByteTable
) -> dict[str, Any]:
    """Where the loss is, before and after adaptation, in nats: by size, by class and by position.

    `gain_error` is the standard error of before - after, clustered by document; None within one document.
    """
    table, document = [], documents_of(tokens)
    for name, mask in classes(tokens, byte_table).items():
        if mask.any():
            means = dict(before=float(before[mask].mean()), after=float(after[mask].mean()))
            gain = clustered(before[mask].astype(np.float64) - after[mask], document[mask])
            table.append(dict(name=name, targets=int(mask.sum()), **means, gain_error=gain.error))
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


@contextmanager
def figure_style() -> Iterator[None]:
    """Return the context in which figures are drawn, whatever style the process had before.

    Logarithmic axes get plain labels inside it: matplotlib's own are math text, which STYLE switches off.
    """
    from matplotlib import scale, style, ticker

    class PlainFormatter(ticker.LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # which ticks have a label is matplotlib's

    class PlainLogScale(scale.LogScale):
        def set_default_locators_and_formatters(self, axis: Any) -> None:
            super().set_default_locators_and_formatters(axis)
            axis.set_major_formatter(PlainFormatter(self.base))
            axis.set_minor_formatter(PlainFormatter(self.base, labelOnlyBase=self.subs is not None))

    with style.context(["default", STYLE]):
        scale.register_scale(PlainLogScale)
        try:
            yield
        finally:
            scale.register_scale(scale.LogScale)


def plot_distribution(path: Path, before: np.ndarray, after: np.ndarray, report: Mapping[str, Any]) -> None:
    """Draw the histogram of the loss and the gain by position, with two standard errors, as PNG."""
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        bins = np.linspace(0, 14, 57)
        for nll, name in ((before, "before"), (after, "adapted")):
            label = f"{name}: mean {nll.mean(dtype=np.float64):.4f} nats"
            left.hist(np.minimum(nll, bins[-1]), bins, weights=nll / len(nll), histtype="step", label=label)
        left.set(xlabel="loss of a target, nats", ylabel="part of the mean loss, nats per bin",
                 title="Where the loss is: the bins add up to the mean loss")  # fmt: skip
        ticks = range(0, 15, 2)
        left.set_xticks(ticks, [*map(str, ticks[:-1]), "14+"])
        left.set_ylim(0, 1.25 * left.get_ylim()[1])  # room for the legend above the curves
        left.legend(loc="upper center", ncols=2)
        rows = [row for row in report["classes"] if row["name"].startswith("position")]
        gains, errors = [row["before"] - row["after"] for row in rows], [row["gain_error"] for row in rows]
        bars = right.bar(
            [class_label(row["name"]) for row in rows], gains, yerr=[2 * (e or 0.0) for e in errors],
            capsize=4, ecolor="0.35")  # fmt: skip
        right.bar_label(bars, [f"{gain:+.3f}" for gain in gains], padding=2)
        right.margins(y=0.12)
        right.axhline(0, color="black", linewidth=0.8)
        right.set(xlabel="position in the document, targets", ylabel="gain, nats per target",
                  title="Gain of adaptation by position; bars: 2 standard errors, by document")  # fmt: skip
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format="png")
    tg.write_atomically(path, picture.getvalue())


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


SCORES = dict(
    roundtrip="non-overlapping windows",
    sliding="sliding windows",
    plan="same windows as adapted",
    ttt="adapted",
)


def score_lines(scores: Mapping[str, tg.Score]) -> list[str]:
    """The four scores as a table: bits per byte, nats per token, seconds; last what adaptation gains."""
    lines = [f"{'':24}{'bpb':>9}{'nats':>9}{'seconds':>9}"]
    for name, words in SCORES.items():
        score = scores[name]
        lines.append(f"{words:24}{score.val_bpb:9.4f}{score.val_loss:9.4f}{score.seconds:9.1f}")
    bpb, nats = (
        getattr(scores["plan"], key) - getattr(scores["ttt"], key) for key in ("val_bpb", "val_loss")
    )
    return [*lines, f"{'gain of adaptation':24}{bpb:9.4f}{nats:9.4f}"]


def write_reports(
    folder: Path,
    tokens: np.ndarray,
    scores: Mapping[str, tg.Score],
    byte_table: tg.ByteTable,
    log: tg.RunLog,
) -> None:
    """Log scores and loss distribution; on rank 0 write distribution.json and .png, and documents.csv."""
    before, after = scores["plan"].nll, scores["ttt"].nll
    report = distribution(tokens, before, after, byte_table)
    for line in [*distribution_text(report).splitlines(), *score_lines(scores)]:
        log.line(line)
    if tg.rank() == 0:
        tg.write_atomically(folder / "distribution.json", json.dumps(report, indent=1).encode())
        table = document_table(tokens, before, after, byte_table)
        tg.write_atomically(folder / "documents.csv", table.encode())
        try:
            plot_distribution(folder / "distribution.png", before, after, report)
        except Exception as error:  # no matplotlib, or no folder for its fonts: no reason to lose a score
            log.line(f"WARNING: distribution.png is not drawn: {error}. distribution.json has its numbers.")
