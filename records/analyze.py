"""Plot runs, compare two scores of the same text, or compare two trained models.

    python records/analyze.py runs/demo_seed1337 [runs/...] [--out curve.png]
    python records/analyze.py nll runs/A runs/B [--out DIR]
    python records/analyze.py weights runs/A runs/B [--null runs/C] [--out DIR]

The first prints a table of finished runs and plots their curves. `nll` compares the losses of the same
targets from two runs, or from one run with and without adaptation: evaluate it twice, keep the first nll.npy
under another name, and pass both files; TTT_EPOCHS=0 scores the same windows without adaptation. `weights`
compares two checkpoints. --null is a repeat of A with the same settings and the same or another seed; each
number then stands beside the one for A and the repeat. All write text, JSON and a plot, to the first folder
or to --out. Exit codes: 0 done, 2 user error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from runfiles import escape_lines, read_object, read_result, save_figure, write_file
from scipy import stats
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from report import LOSS_BORDERS, classes  # noqa: E402

import eval_ttt as ev  # noqa: E402
import train_gpt as tg  # noqa: E402

ROWS = (  # key of result.json, label, format
    ("steps", "steps", "{:,}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("val_bpb_roundtrip", "bpb, int6 artifact, non-overlapping", "{:.4f}"),
    ("val_bpb_sliding", "bpb, int6 artifact, sliding", "{:.4f}"),
    ("val_bpb_ttt", "bpb, test-time training", "{:.4f}"),
    ("ttt_gain_bpb", "  gain over the same windows", "{:.4f}"),
    ("bytes_model", "artifact bytes", "{:,}"),
    ("bytes_total", "with code (cap 16,000,000)", "{:,}"),
    ("train_seconds", "contest clock, s", "{:.1f}"),
    ("strict_seconds", "process start to result, s", "{:.1f}"),
)
BLOCK = 2048  # targets per block, the cluster for standard errors if there are too few documents
MIN_DOCUMENTS = 20  # with fewer documents, standard errors are clustered by block
NLL_NOTES = {
    "the gain, nats a target": "By the cluster used for errors; the tables below use the first. ± is a "
    "standard error, from and to are 95 % intervals: for these weights, on text "
    "like this. The training seed changes the gain too: compare trainings over "
    "seeds, with sweep.py compare.",
    "loss, mean of both": "In nats. Binned by the loss of one model, the other would look better in the high "
    "bins (regression to the mean).",
}
RESAMPLES = 2000  # bootstrap resamples
TOP = 8  # the leading 1 / TOP of the singular directions are compared
FRACTIONS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the line from A to the other model
STEPS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # multiples of the evaluator's step
CURVATURE_ROWS = 8  # sequences for the Hessian, the first of the sample
BATCH_TOKENS = 2048  # per batch: second derivatives keep every attention matrix
LANCZOS, PROBES = 24, 16  # Hessian-vector products for the eigenvalues and for the trace
SHOWN = (2, 4, 8, 16, LANCZOS)  # reported Lanczos steps

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
        half = None if self.error is None else self.error * float(stats.t.ppf(0.975, len(self.influence) - 1))
        return None if half is None else (self.value - half, self.value + half)

    def text(self, form: str) -> str:
        return f"{self.value:{form}}" + ("" if self.error is None else f"±{self.error:{form}}")


Table = dict[str, dict[str, Estimate]]  # row -> column -> number


def clustered(x: np.ndarray, units: np.ndarray) -> Estimate:
    """Return the mean of `x` with its cluster-robust error, for units of unequal size.

    `units` has the unit index of each entry. With S_g and n_g the sum and count of unit g, its influence is
    (S_g - n_g mean) / N (Liang and Zeger 1986; for evaluations arXiv 2411.00640).
    """
    _, units = np.unique(units, return_inverse=True)
    mean = float(x.mean(dtype=np.float64))
    sums, counts = np.bincount(units, x), np.bincount(units)
    return Estimate(mean, (sums - counts * mean) / len(x))


def bootstrap(x: np.ndarray, units: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `x` from a bootstrap over whole units."""
    sums, counts, rng = np.bincount(units, x), np.bincount(units), np.random.default_rng(seed)
    drawn = (rng.integers(0, len(sums), len(sums)) for _ in range(RESAMPLES))
    low, high = np.quantile([sums[index].sum() / counts[index].sum() for index in drawn], (0.025, 0.975))
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------------
# Reading and writing
# ------------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """Return result.json, with the evaluator's scores if it ran, and the lines of metrics.jsonl.

    ValueError if the folder has no finished run.
    """
    try:
        result = read_result(folder / "result.json")
        evaluated = folder / "eval_ttt.json"
        if evaluated.exists():
            scores = read_object(evaluated, "val_bpb_ttt", "ttt_gain_bpb")
            result |= {key: scores[key] for key in ("val_bpb_ttt", "ttt_gain_bpb")}
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        if bad := [
            i for i, row in enumerate(metrics, 1) if not isinstance(row, dict) or "seconds" not in row
        ]:
            raise ValueError(f"line {bad[0]} of metrics.jsonl has no time in seconds")
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} has no finished run: {error}") from error
    return result, metrics


def read_config(folder: Path, data: Path | None, tokenizer: Path | None) -> tg.Config:
    """Return the settings of a run, with the evaluator's if it ran; `data` and `tokenizer` override paths.

    ValueError if there is no config.json, or if it has settings unknown to this version.
    """
    try:
        settings = dict(read_object(folder / "config.json", "config")["config"])
        if (folder / "eval_ttt.json").exists():
            settings |= read_object(folder / "eval_ttt.json", "settings")["settings"]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder} is not a run folder: {error}") from error
    if unknown := sorted(set(settings) - {f.name for f in fields(tg.Config)}):
        raise ValueError(
            f"{folder}/config.json: unknown settings {', '.join(unknown)}, written by another version"
        )
    settings |= dict(data_path=str(data), val_files="") if data else {}
    settings |= dict(tokenizer_path=str(tokenizer)) if tokenizer else {}
    return tg.Config(**settings | dict(mtp_num_heads=0))  # MTP heads are used in training only


def read_text(config: tg.Config) -> tuple[np.ndarray, list[str], tg.ByteTable]:
    """Return the validation tokens, their shards, and the byte table. UserError if they do not match."""
    table = tg.load_byte_table(config.tokenizer_path, config.vocab_size)
    table = table.with_sidecars(tg.find_shards(config.shards("val")))
    return *tg.read_validation(config, table, tg.sha256_file(config.tokenizer_path)), table


def documents_of(tokens: np.ndarray) -> np.ndarray:
    """Return the document index of each target, (targets,)."""
    begin, end = ev.documents(tokens)
    return np.repeat(np.arange(len(begin)), end - begin)


def table_text(title: str, note: str, tables: Mapping[str, Table], form: str) -> str:
    """Return `tables` as one text table, with a line per row and table name."""
    rows = list(dict.fromkeys(row for each in tables.values() for row in each))
    columns = list(
        dict.fromkeys(column for each in tables.values() for row in each.values() for column in row)
    )
    body = [["", "", *columns]]
    for row in rows:
        for number, (name, each) in enumerate(tables.items()):
            cells = [
                each[row][column].text(form) if column in each.get(row, {}) else "" for column in columns
            ]
            body.append(["" if number else row, name, *cells])
    body = body if rows else []
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    left = [f"  {row.ljust(widths[0])}  {name.ljust(widths[1])}" for row, name, *_ in body]
    right = [
        (cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True)) for _, _, *cells in body
    ]
    lines = [(start + "  " + "  ".join(cells)).rstrip() for start, cells in zip(left, right, strict=True)]
    return "\n".join(
        ["", title, *textwrap.wrap(note, 116, initial_indent="  ", subsequent_indent="  "), *lines]
    )


def as_json(table: Table) -> dict[str, Any]:
    return {row: {column: dict(value=cell.value, error=cell.error) for column, cell in cells.items()}
            for row, cells in table.items()}  # fmt: skip


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """Return a figure of `width` x `height` inches for a headless backend, and its flattened axes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, axes.flatten()


def write_report(given: argparse.Namespace, text: str, report: Any, paint: Callable[[Path], None]) -> None:
    """Print `text`, and write it with the JSON and the plot to --out or to the folder of A."""
    folder = given.out or (given.a if given.a.is_dir() else given.a.parent)
    folder.mkdir(parents=True, exist_ok=True)
    stem, text = folder / given.command, escape_lines(text)
    print(text)
    write_file(stem.with_suffix(".txt"), (text + "\n").encode())
    write_file(stem.with_suffix(".json"), json.dumps(report, indent=1).encode())
    paint(stem.with_suffix(".png"))
    print(f"written: {stem}.txt, .json, .png")


# ------------------------------------------------------------------------------------------------------------
# Curves of runs
# ------------------------------------------------------------------------------------------------------------


def table(results: dict[str, dict]) -> str:
    """Return the table of runs: one column per run, one row per number."""
    names = list(results)
    width = max(14, *(len(name) for name in names))
    lines = [" " * 38 + "".join(f"{name:>{width + 2}}" for name in names)]
    for key, label, form in ROWS:
        values = (form.format(results[name][key]) if key in results[name] else "-" for name in names)
        lines.append(f"{label:38}" + "".join(f"{value:>{width + 2}}" for value in values))
    return "\n".join(lines)


def draw(runs: dict[str, tuple[dict, list[dict]]], path: Path) -> None:
    """Plot training loss and validation bpb against training time; the artifact's sliding score is dotted."""
    figure, (left, right) = new_figure(1, 2, 10, 4)
    for number, (name, (result, metrics)) in enumerate(runs.items()):
        for axis, key in ((left, "train_loss"), (right, "val_bpb")):
            points = [(row["seconds"], row[key]) for row in metrics if key in row]
            axis.plot(
                [x for x, _ in points], [y for _, y in points], color=f"C{number}", label=Path(name).name
            )
        right.axhline(result["val_bpb_sliding"], color=f"C{number}", linestyle=":")
    left.set(xlabel="training time, s", ylabel="training loss, nats per token")
    right.set(xlabel="training time, s", ylabel="validation bits per byte (dotted: artifact, sliding)")
    left.legend()
    save_figure(figure, path, dpi=120)


def curves(given: argparse.Namespace) -> None:
    """Print the table of several runs and write their curves as a plot and as JSON."""
    runs = {str(folder): read_run(folder) for folder in given.runs}
    path = given.out or given.runs[0] / "curve.png"
    draw(runs, path)
    report = {name: dict(result=result, metrics=metrics) for name, (result, metrics) in runs.items()}
    write_file(path.with_suffix(".json"), json.dumps(report, indent=1).encode())
    print(escape_lines(table({name: result for name, (result, _) in runs.items()})))
    print(f"curve: {path}")


# ------------------------------------------------------------------------------------------------------------
# Two scores of the same targets
# ------------------------------------------------------------------------------------------------------------


def read_losses(given: argparse.Namespace) -> tuple[list[np.ndarray], np.ndarray, tg.ByteTable]:
    """Return the two nll arrays, (targets,), and their text. ValueError if the three do not match."""
    paths = [path / "nll.npy" if path.is_dir() else path for path in (given.a, given.b)]
    folders = [path.parent for path in paths if (path.parent / "config.json").exists()]
    if not folders:
        raise ValueError(
            f"neither {given.a} nor {given.b} is in a run folder, and config.json names the scored text"
        )
    tokens, shards, byte_table = read_text(read_config(folders[0], given.data, given.tokenizer))
    losses = []
    for path in paths:
        try:
            losses.append(np.load(path))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is not an nll.npy of eval_ttt.py: {error}") from error
        if losses[-1].shape != (len(tokens) - 1,) or not np.isfinite(losses[-1]).all():
            raise ValueError(f"{path}: shape {losses[-1].shape}, but {len(tokens) - 1} targets in "
                             f"{', '.join(shards)}, or not all finite")  # fmt: skip
        if (path.parent / "eval_ttt.json").exists():
            scored = read_object(path.parent / "eval_ttt.json", "sha256_shards")["sha256_shards"]
            if set(scored.values()) != {tg.sha256_file(shard) for shard in shards}:
                raise ValueError(f"{path} scored {', '.join(scored)}, which are not {', '.join(shards)}")
    return losses, tokens, byte_table


def buckets(
    tokens: np.ndarray, loss: np.ndarray, byte_table: tg.ByteTable
) -> dict[str, dict[str, np.ndarray]]:
    """Return masks over targets by position, kind, frequency and loss: kind of bucket -> name -> (targets,).

    Frequencies are those of this text, in fifths of its targets. `loss` is the mean of both models: binned by
    the loss of one model, the other would look better in the high bins even if they differed by noise alone.
    """
    found: dict[str, dict[str, np.ndarray]] = {"position in the document": {}, "kind of target": {}}
    for name, mask in classes(tokens, byte_table).items():
        if name.startswith("position "):
            found["position in the document"][name.split()[1]] = mask
        else:
            found["kind of target"][name] = mask
    counts = np.bincount(tokens[1:])
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]  # targets of more frequent tokens
    fifth = np.empty_like(counts)
    fifth[order] = np.minimum(5 * before // (len(tokens) - 1), 4)
    names = ("most frequent", "2nd fifth", "3rd fifth", "4th fifth", "rarest")
    found["frequency of the token"] = {name: fifth[tokens[1:]] == i for i, name in enumerate(names)}
    borders = (0, *LOSS_BORDERS, math.inf)
    found["loss, mean of both"] = {
        f"{low}-{high}" if high < math.inf else f"{low}+": (loss >= low) & (loss < high)
        for low, high in pairwise(borders)
    }
    return {kind: {name: mask for name, mask in masks.items() if mask.any()} for kind, masks in found.items()}


def independent_units(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the clusters for standard errors, the one in use first: name -> unit index of each target."""
    position, document = np.arange(len(tokens) - 1), documents_of(tokens)
    found = {
        f"{document[-1] + 1} documents": document,
        f"{position[-1] // BLOCK + 1} blocks of {BLOCK}": position // BLOCK,
    }
    if document[-1] + 1 < MIN_DOCUMENTS:
        found = dict(reversed(found.items()))
    return found | {f"{len(position)} targets: too small, neighbors correlate": position}


def compare_nll(
    a: np.ndarray, b: np.ndarray, tokens: np.ndarray, byte_table: tg.ByteTable
) -> dict[str, Table]:
    """Return the gain of B over A (A - B) in nats per target: its mean, its errors, and its breakdown."""
    gain, units = a.astype(np.float64) - b, independent_units(tokens)
    first, errors = next(iter(units.values())), {}
    for name, labels in units.items():
        mean = clustered(gain, labels)
        errors[name] = {"gain": mean}
        spans = {
            "t": mean.interval(),
            "bootstrap": bootstrap(gain, labels) if 1 < labels[-1] + 1 < len(gain) else None,
        }
        for kind, span in spans.items():
            ends = zip(("from", "to"), map(Estimate, span or ()), strict=False)
            errors[name] |= {f"{kind}: {end}": number for end, number in ends}
    report: dict[str, Table] = {"the gain, nats a target": errors}
    for kind, masks in buckets(tokens, (a.astype(np.float64) + b) / 2, byte_table).items():
        report[kind] = {}
        for name, mask in masks.items():
            here = clustered(gain[mask], first[mask])
            ours, theirs = (x[mask].mean(dtype=np.float64) for x in (a, b))
            part = gain[mask].sum() / gain.sum() if gain.sum() else 0.0
            plain = {"share of targets": mask.mean(), "A": ours, "B": theirs, "share of the gain": part}
            report[kind][name] = {column: Estimate(float(x)) for column, x in plain.items()} | {"gain": here}
    return report


def draw_nll(
    report: Mapping[str, Table], gain: np.ndarray, tokens: np.ndarray, title: str, path: Path
) -> None:
    """Plot the gain in each bucket with two standard errors, by document, and accumulated over the text."""
    figure, axes = new_figure(2, 3, 15, 8)
    _, *parts = report.items()
    for axis, (kind, table) in zip(axes, parts, strict=False):
        names = [f"{name}\n{cells['share of the gain'].value:.0%}" for name, cells in table.items()]
        found = [cells["gain"] for cells in table.values()]
        errors = [2 * (each.error or 0.0) for each in found]
        axis.bar(names, [each.value for each in found], yerr=errors, capsize=3, color="C0", ecolor="0.3")
        axis.set(
            xlabel=f"{kind}; percent of the total gain",
            ylabel="gain of B, nats per target ± 2 standard errors",
        )
        axis.tick_params(axis="x", labelsize=8)
    document = documents_of(tokens)
    axes[4].scatter(
        np.bincount(document), np.bincount(document, gain) / np.bincount(document), s=12, alpha=0.6
    )
    axes[4].set(xscale="log", xlabel="targets in the document", ylabel="gain of B, nats per target")
    drawn = np.unique(np.linspace(0, len(gain) - 1, 2000).astype(np.int64))
    axes[5].plot(drawn, np.cumsum(gain)[drawn])
    axes[5].set(xlabel="targets, in text order", ylabel="cumulative gain, nats")
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.8)
    figure.suptitle(title)
    save_figure(figure, path, dpi=110)


def nll(given: argparse.Namespace) -> None:
    """Compare the losses of two evaluations of the same text."""
    (a, b), tokens, byte_table = read_losses(given)
    gain, num_bytes = a.astype(np.float64) - b, int(byte_table.of_text(tokens).sum())
    report, sums = compare_nll(a, b, tokens, byte_table), np.bincount(documents_of(tokens), gain)
    bits = float(gain.sum()) / math.log(2) / num_bytes
    head = [
        f"A {given.a}",
        f"B {given.b}",
        f"gain of B over A: {gain.mean():+.5f} nats/target, {bits:+.5f} bits per byte of {num_bytes:,}; "
        f"B is better in {(sums > 0).sum()} of {len(sums)} documents",
    ]
    parts = [table_text(kind, NLL_NOTES.get(kind, ""), {"": table}, ".5f") for kind, table in report.items()]
    about = dict(a=str(given.a), b=str(given.b), targets=len(gain), bytes=num_bytes, gain_bpb=bits)
    title = f"A: {given.a}   B: {given.b}   gain of B: {bits:+.4f} bits per byte"
    paint = partial(draw_nll, report, gain, tokens, title)
    write_report(
        given, "\n".join(head + parts), about | {kind: as_json(t) for kind, t in report.items()}, paint
    )


# ------------------------------------------------------------------------------------------------------------
# Two models: analyses
# ------------------------------------------------------------------------------------------------------------

MATRICES = (  # name, bank, whether its rows are the second L rows of the bank
    ("Q", "qo_bank", 0), ("O", "qo_bank", 1), ("K", "kv_bank", 0), ("V", "kv_bank", 1),
    ("up", "mlp_up_bank", 0), ("down", "mlp_down_bank", 0),
)  # fmt: skip


class Side(NamedTuple):
    """A trained model: float32 weights, evaluation setup, artifact (None: `missing` has the reason)."""

    folder: Path
    model: tg.GPT
    setup: ev.Setup
    rounded: tg.Artifact | None
    missing: str


class Text(NamedTuple):
    """The validation tokens and a sample of sequences from them, ids and targets (rows, T) each."""

    tokens: np.ndarray
    ids: Tensor
    targets: Tensor
    seed: int


def read_side(folder: Path, config: tg.Config, table: tg.ByteTable, device: torch.device) -> Side:
    """Load the checkpoint of a run in float32, and any artifact. UserError without a checkpoint."""
    config, weights, _ = ev.read_model(replace(config, model_path=str(folder / "final_model.pt")), {})
    rounded, missing = None, ""
    try:
        rounded = tg.read_artifact(folder / "final_model.int6.ptz")
        factors = {bank: factor.to(device) for bank, factor in rounded.factors.items()}
        weights = weights._replace(factors=factors)
    except tg.UserError as error:
        missing = str(error)
    model = tg.load_model(weights, torch.device("cpu"), word_start=table.has_leading_space).to(device)
    setup = ev.Setup(config, weights, device, tg.sdpa_attention, table, tg.token_nll)
    return Side(folder, model, setup, rounded, missing)


def sample_rows(
    tokens: np.ndarray, rows: int, length: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (rows, length) each, of distinct windows of the text sampled with `seed`."""
    windows = (len(tokens) - 1) // length
    if not 2 <= rows <= windows:
        raise ValueError(
            f"--rows {rows}: must be 2 to {windows}, the number of {length}-token sequences in the text"
        )
    start = length * np.sort(np.random.default_rng(seed).choice(windows, rows, replace=False))
    part = torch.from_numpy(tokens[start[:, None] + np.arange(length + 1)].astype(np.int64)).to(device)
    return part[:, :-1], part[:, 1:]


def batches(rows: Tensor) -> tuple[Tensor, ...]:
    """Split `rows` (rows, T) into batches of about BATCH_TOKENS tokens."""
    return rows.split(max(1, BATCH_TOKENS // rows.size(1)))


@torch.no_grad()
def row_losses(model: tg.GPT, text: Text) -> np.ndarray:
    """Return the nats of the sample's targets, (rows, T) without the positions of memory tokens."""
    pairs = zip(batches(text.ids), batches(text.targets), strict=True)
    losses = torch.cat([tg.token_nll(model, ids, targets) for ids, targets in pairs])
    return losses[:, model.config.num_memory_tokens :].double().cpu().numpy()


def row_mean(losses: np.ndarray) -> Estimate:
    """Return the mean of losses (rows, T), clustered by row."""
    return clustered(losses.flatten(), np.repeat(np.arange(len(losses)), losses.shape[1]))


def slices(state: Mapping[str, Tensor], config: tg.Config) -> Iterator[tuple[str, str, Tensor]]:
    """Yield name, layer and float64 matrix (out, in) of every bank row."""
    for name, bank, second in MATRICES:
        for layer in range(config.num_layers):
            yield name, str(layer), state[bank][second * config.num_layers + layer].detach().double()


def over_slices(a: Side, number: Callable[..., float], *states: Mapping[str, Tensor]) -> Table:
    """Apply `number` to each bank row of A and the same rows of `states`: matrix -> layer -> number."""
    found: Table = {name: {} for name, _, _ in MATRICES}
    for rows in zip(
        *(slices(state, a.model.config) for state in (a.model.state_dict(), *states)), strict=True
    ):
        name, layer, _ = rows[0]
        found[name][layer] = Estimate(number(*(matrix for _, _, matrix in rows)))
    return found


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-300))


def cosines(a: Side, b: Side, text: Text) -> Table:
    """Return the cosine of each matrix of A with B's; of unrelated matrices 0 to within 1 / sqrt(entries)."""
    found = over_slices(a, cosine, b.model.state_dict())
    ours, theirs = (torch.cat([p.detach().double().flatten() for name, p in side.model.named_parameters()
                               if name not in tg.GPT.BANKS]) for side in (a, b))  # fmt: skip
    return found | {"no bank": {"all": Estimate(cosine(ours, theirs))}}


def overlap(one: Tensor, other: Tensor, right: bool) -> float:
    """Return the mean squared cosine of the principal angles of singular subspaces (Bjorck and Golub 1973).

    The subspaces are spanned by the leading 1 / TOP of the right (input) or left (output) singular vectors.
    Random subspaces of dimension k in n dimensions have k / n.
    """
    k = max(1, min(one.shape) // TOP)
    (u, _, vh), (x, _, yh) = (torch.linalg.svd(matrix, full_matrices=False) for matrix in (one, other))
    product = vh[:k] @ yh[:k].mT if right else u[:, :k].mT @ x[:, :k]
    return float(product.square().sum()) / k


def subspaces(a: Side, b: Side, text: Text, right: bool) -> Table:
    """Return the overlap of every matrix, and the overlap by chance."""
    found = over_slices(a, partial(overlap, right=right), b.model.state_dict())
    for name, bank, _ in MATRICES:
        _, out, width = getattr(a.model, bank).shape
        found[name]["chance"] = Estimate(max(1, min(out, width) // TOP) / (width if right else out))
    return found


class Products:
    """Sums over tokens of x, y, x x^T, y y^T and x y^T, for linear CKA."""

    def __init__(self) -> None:
        self.count, self.sums = 0, None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add x (tokens, p) and y (tokens, q) of the same tokens."""
        x, y = x.double(), y.double()
        new = [x.sum(0), y.sum(0), x.mT @ x, y.mT @ y, x.mT @ y]
        self.sums = (
            new if self.sums is None else [old + part for old, part in zip(self.sums, new, strict=True)]
        )
        self.count += len(x)

    def cka(self) -> float:
        """Return |Y^T X|^2 / (|X^T X| |Y^T Y|), centered, in Frobenius norms (arXiv 1905.00414)."""
        x, y, xx, yy, xy = self.sums
        xx, yy, xy = (s - torch.outer(p, q) / self.count for s, p, q in ((xx, x, x), (yy, y, y), (xy, x, y)))
        return float(xy.square().sum() / (xx.norm() * yy.norm()).clamp(min=1e-300))


@torch.no_grad()
def activations(model: tg.GPT, ids: Tensor) -> dict[tuple[str, int], Tensor]:
    """What each layer reads at each site of train_gpt.PRODUCTS: (tokens, in), of all uses of a bank row."""
    found: dict[tuple[str, int], list[Tensor]] = {}

    def tap(block: tg.Block, product: str, x: Tensor, _: Tensor) -> None:
        found.setdefault((tg.PRODUCTS[product][0], block.layer), []).append(x.flatten(0, 1))

    model(ids, tap=tap)
    return {site: torch.cat(parts) for site, parts in found.items()}


def cka(a: Side, b: Side, text: Text) -> Table:
    """Return linear CKA of A and B on the same tokens; rotations and permutations of units do not matter."""
    products: dict[tuple[str, int], Products] = {}
    for ids in batches(text.ids):
        ours, theirs = (activations(side.model, ids) for side in (a, b))
        for site, x in ours.items():
            products.setdefault(site, Products()).add(x, theirs[site])
    found: Table = {}
    for (stack, layer), each in sorted(products.items()):
        found.setdefault(stack, {})[str(layer)] = Estimate(each.cka())
    return found


def path_loss(a: Side, b: Side, text: Text) -> Table:
    """Return the loss at (1 - t) A + t B, all parameters, and its excess over interpolated losses."""
    ours, theirs = (dict(side.model.named_parameters()) for side in (a, b))
    between, losses = deepcopy(a.model), []
    for t in FRACTIONS:
        with torch.no_grad():
            for name, p in between.named_parameters():
                p.copy_(theirs[name] if t == 1 else ours[name].lerp(theirs[name], t))
        losses.append(row_losses(between, text))
    above = [
        row_mean(x - (1 - t) * losses[0] - t * losses[-1]) for t, x in zip(FRACTIONS, losses, strict=True)
    ]
    columns = [f"{t:g}" for t in FRACTIONS]
    return {
        "loss": dict(zip(columns, map(row_mean, losses), strict=True)),
        "above the line": dict(zip(columns, above, strict=True))
        | {"barrier": max(above, key=lambda each: each.value)},
    }


def hessian_product(model: tg.GPT, text: Text) -> Callable[[Tensor], Tensor]:
    """Return v -> H v for the Hessian of the mean training loss in all parameters, flattened.

    Uses the first CURVATURE_ROWS sequences, batch by batch, with double backward (Pearlmutter 1994).
    """
    parameters = list(model.parameters())
    ids, targets = (batches(rows[:CURVATURE_ROWS]) for rows in (text.ids, text.targets))

    def product(v: Tensor) -> Tensor:
        total, count = torch.zeros_like(v), sum(map(len, ids))
        parts = [
            part.view_as(p)
            for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        for some, theirs in zip(ids, targets, strict=True):
            with sdpa_kernel(SDPBackend.MATH):  # the only backend with second derivatives
                loss = tg.training_loss(model, some, theirs) * (len(some) / count)
                first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
                along = sum((g * part).sum() for g, part in zip(first, parts, strict=True))
                second = torch.autograd.grad(along, parameters, materialize_grads=True)
            total += torch.cat([g.flatten() for g in second])
        return total

    return product


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the smallest and largest Ritz value after each step, and their residuals.

    A residual bounds the distance to an eigenvalue. Each vector is orthogonalized against all
    previous ones (Golub and Van Loan, section 10.3). `start` is (n,). Stops early when the vectors
    span an invariant subspace.
    """
    basis, diagonal, beside, found = [start / start.norm()], [], [], []
    for _ in range(min(steps, len(start))):
        w = product(basis[-1])
        diagonal.append(float(torch.dot(w.double(), basis[-1].double())))
        for q in 2 * basis:  # twice is enough
            w = w - torch.dot(w, q) * q
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        beside.append(float(w.norm()))
        found.append((values[[0, -1]], beside[-1] * np.abs(vectors[-1, [0, -1]])))
        if beside[-1] < 1e-10 * np.abs(values).max():
            break
        basis.append(w / beside[-1])
    return found


def normal_numbers(model: tg.GPT, seed: int) -> Tensor:
    """Return one normal number per parameter, equal for all models of the same shapes and on every device."""
    count = sum(p.numel() for p in model.parameters())
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()))


def eigenvalues(a: Side, text: Text) -> Table:
    """Return the Lanczos estimates of the smallest and the largest eigenvalue of the Hessian, by step."""
    found = lanczos(hessian_product(a.model, text), normal_numbers(a.model, text.seed), LANCZOS)
    table: Table = {}
    for end, name in enumerate(("smallest", "largest")):
        table[name] = {str(step): Estimate(float(found[min(step, len(found)) - 1][0][end])) for step in SHOWN}
        table[name]["residual"] = Estimate(float(found[-1][1][end]))
    return table


def trace(a: Side, text: Text) -> Table:
    """Return the Hessian's trace by parameter group: mean z^T H z over random signs z (Hutchinson 1990)."""
    product, parameters = hessian_product(a.model, text), dict(a.model.named_parameters())
    groups = [name if name in tg.GPT.BANKS else "no bank" for name in parameters]
    draws: dict[str, list[float]] = {name: [] for name in ("all", *tg.GPT.BANKS, "no bank")}
    for probe in range(PROBES):
        z = normal_numbers(a.model, PROBES * text.seed + probe).sign()
        terms = (z * product(z)).double().split([p.numel() for p in parameters.values()])
        for group, own in draws.items():
            own.append(
                sum(float(t.sum()) for name, t in zip(groups, terms, strict=True) if group in ("all", name))
            )
    return {"trace": {group: clustered(np.array(own), np.arange(PROBES)) for group, own in draws.items()}}


@torch.no_grad()
def chunk_losses(adaptation: ev.Adaptation, text: Text, chunk: tg.Chunk) -> tuple[np.ndarray, np.ndarray]:
    """Targets that a chunk scores, and their nats under the adaptation's weights of the moment."""
    losses, targets = [], []
    for index, width, length in tg.batches_of(chunk, adaptation.batch_rows):
        part, padded = chunk.scored.take(index), chunk.scored.take(np.resize(index, adaptation.batch_rows))
        batch = tg.make_batch(text.tokens, padded, width, adaptation.device, length)
        adaptation.select(chunk, index)
        found = (
            adaptation.token_nll(adaptation.model, batch.ids, batch.targets, batch.positions)
            .double()
            .cpu()
            .numpy()
        )
        row, column = np.nonzero(batch.counts[: len(index)])
        targets.append((part.start + part.begin)[row] + column)
        losses.append(found[row, column])
    return np.concatenate(targets), np.concatenate(losses)


def along_step(a: Side, text: Text) -> Table:
    """Return the change of the loss along the evaluator's first step, on the first chunk and on the next.

    In the per-document modes a chunk is the first chunk of each of the first TTT_SLOTS documents of a group.
    All sequences have equal weight, in one pass.
    """
    c = replace(a.setup.config, ttt_epochs=1, ttt_top_frac=1.0)
    plan = a.setup.plan(text.tokens) if c.ttt_mode != "none" else []
    if (
        len(plan) < 2
        or plan[0].adapted is None
        or (plan[0].slots and plan[1].slots.group != plan[0].slots.group)
    ):
        return {}  # no adaptation, or no next chunk
    model = deepcopy(a.model).requires_grad_(False)
    adaptation = ev.Adaptation(
        model, replace(a.setup, config=c, nll_fn=tg.token_nll), plan, lambda chunk: None
    )
    adaptation.begin(0, plan[0])
    adaptation.adapt(text.tokens, plan[0], torch.zeros(0))
    fast, table, document = adaptation.trainer.fast, {}, documents_of(text.tokens)
    moved = {name: value - fast.base[name] for name, value in fast.values.items()}
    for number, name in ((1, "what comes next"), (0, "what was learned")):
        adaptation.begin(number, plan[number])
        losses = []
        for step in STEPS:
            for key, value in fast.values.items():
                value.copy_(fast.base[key] + step * moved[key])
            targets, found = chunk_losses(adaptation, text, plan[number])
            losses.append(found)
        changes = [clustered(found - losses[0], document[targets]) for found in losses]
        table[name] = {f"{step:g}": change for step, change in zip(STEPS, changes, strict=True)}
    return table


def rounding(a: Side, text: Text) -> Table:
    """Return the loss of the sample before and after quantization."""
    if a.rounded is None:
        return {}
    model = deepcopy(a.model)
    model.load_state_dict(a.rounded.state)
    plain, rounded = row_losses(a.model, text), row_losses(model, text)
    return {
        "nats": {
            "weights": row_mean(plain),
            "artifact": row_mean(rounded),
            "added": row_mean(rounded - plain),
        }
    }


def relative_error(W: Tensor, Q: Tensor, H: Tensor | None = None) -> float:
    """Return |W - Q| / |W|, Frobenius; with H (in, in) = E[x x^T], that of outputs: |(W - Q) x| / |W x|."""
    error, whole = (float((M * (M if H is None else M @ H)).sum()) for M in (W - Q, W))
    return math.sqrt(max(error, 0.0) / max(whole, 1e-300))


def quantization_error(a: Side, text: Text, outputs: bool) -> Table:
    """Return the relative error of every quantized matrix, or of its `outputs` on inputs of A's layers."""
    if a.rounded is None:
        return {}
    state = {name: a.rounded.state[name].to(a.setup.device) for name in tg.GPT.BANKS}
    if not outputs:
        return over_slices(a, relative_error, state)
    read = tg.collect_hessians(a.model, batches(text.ids))
    return over_slices(a, relative_error, state, {
        bank: torch.cat([read[site] for site in tg.bank_sites(bank)]) for bank in tg.GPT.BANKS})  # fmt: skip


def meta_rates(a: Side, text: Text) -> Table:
    """Return the Meta-SGD learning rate factors stored in the artifact."""
    factors = a.setup.artifact.factors
    found: Table = {}
    for name, bank, second in MATRICES if factors else ():
        rows = (
            factors[bank]
            .flatten()[second * a.model.config.num_layers :][: a.model.config.num_layers]
            .tolist()
        )
        found[name] = {str(layer): Estimate(value) for layer, value in enumerate(rows)}
    return found


# ------------------------------------------------------------------------------------------------------------
# Two models: the report
# ------------------------------------------------------------------------------------------------------------


class Analysis(NamedTuple):
    """An analysis of a pair of models, or of each model (`pair` False), and how it is printed."""

    measure: Callable[..., Table]
    pair: bool
    title: str
    note: str = ""
    form: str = ".3f"
    empty: str = ""


ANALYSES = {
    "cosines": Analysis(cosines, True, "cosine of the weights, by layer", "0: unrelated"),
    "outputs": Analysis(
        partial(subspaces, right=False), True,
        "overlap of leading left singular subspaces (outputs), by layer",
        f"Mean squared cosine of the principal angles, one direction in {TOP}; 1: identical. Muon leaves "
        "flat spectra, so which directions are leading is partly noise."),
    "inputs": Analysis(
        partial(subspaces, right=True), True,
        "overlap of leading right singular subspaces (inputs), by layer"),
    "cka": Analysis(
        cka, True, "linear CKA of the inputs of the matrices, by layer",
        "1: equal up to a rotation (including a permutation of units) and a scale."),
    "path": Analysis(
        path_loss, True, "loss under linear interpolation, by fraction of the other model, nats per token",
        "All parameters. Permutations of hidden units and heads are not removed: runs with different seeds "
        "have a barrier whatever their settings.", ".4f"),
    "eigenvalues": Analysis(
        eigenvalues, False, "extreme eigenvalues of the Hessian, by Lanczos step",
        f"Of the mean training loss of the first {CURVATURE_ROWS} sequences, in all parameters.", ".4g"),
    "trace": Analysis(
        trace, False, "trace of the Hessian, by parameter group",
        f"Of the same loss; {PROBES} probes, equal for all models; errors are over probes, not over text.",
        ".4g"),
    "step": Analysis(
        along_step, False,
        "change of the loss along the evaluator's first step, by multiple, nats per target",
        "All with A's evaluator settings.", ".4f", "TTT_MODE=none, or too little text to adapt"),
    "rounding": Analysis(rounding, False, "loss of weights and artifact, nats per token", "", ".5f",
                         "no artifact"),
    "rounded_weights": Analysis(
        partial(quantization_error, outputs=False), False, "quantization error, |W - Q| / |W|, by layer",
        "Large where it costs little: scales follow the loss, and GPTQ's later columns compensate earlier "
        "ones.", ".4f", "no artifact"),
    "rounded_outputs": Analysis(
        partial(quantization_error, outputs=True), False, "output error, |(W - Q) x| / |W x|, by layer", "",
        ".4f", "no artifact"),
    "meta_rates": Analysis(
        meta_rates, False, "Meta-SGD learning rate factors, by layer", empty="META_SGD_ENABLED was off"),
}  # fmt: skip
ASIDE = ("chance", "barrier", "residual", "loss")  # columns and rows that are not plotted
STYLES = {"A": "-", "B": "--", "null": ":", "A to B": "--", "A to null": ":"}


def analysis_text(analysis: Analysis, found: Mapping[str, Table]) -> str:
    """Return pairs unchanged; of single models, A's numbers and the differences from A (not of residuals)."""
    shown = {name: table for name, table in found.items() if table}
    if not analysis.pair and "A" in shown:
        first = shown.pop("A")
        more = {f"{name} - A": {row: {column: cell if column == "residual" else cell.less(first[row][column])
                                      for column, cell in cells.items()} for row, cells in table.items()}
                for name, table in shown.items()}  # fmt: skip
        shown = {"A": first} | more
    return table_text(
        analysis.title, analysis.note if shown else f"None: {analysis.empty}.", shown, analysis.form
    )


def draw_weights(report: Mapping[str, Mapping[str, Table]], title: str, path: Path) -> None:
    """Plot one panel per analysis: colors are rows, line styles are models or pairs."""
    curves = {key: found for key, found in report.items() if key != "rounding" and any(found.values())}
    columns, rows = min(len(curves), 3) or 1, math.ceil(len(curves) / 3) or 1
    figure, axes = new_figure(rows, columns, 6 * columns, 4.2 * rows + 0.5)
    for axis, (key, found) in zip(axes, curves.items(), strict=False):
        for name, table in found.items():
            for color, (row, cells) in enumerate(
                (row, cells) for row, cells in table.items() if row not in ASIDE
            ):
                points = {column: cell for column, cell in cells.items() if column not in ASIDE}
                errors = [2 * (cell.error or 0.0) for cell in points.values()]
                label = row if table is next(each for each in found.values() if each) else None
                axis.errorbar(list(points), [cell.value for cell in points.values()], errors,
                              color=f"C{color}", linestyle=STYLES[name], marker=".", capsize=2,
                              label=label)  # fmt: skip
        if ANALYSES[key].pair and key != "path":  # similarities
            axis.set_ylim(min(axis.get_ylim()[0], -0.05), 1.05)
        axis.set_title(ANALYSES[key].title, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.legend(fontsize=7)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"{title}\nsolid: A; dashed: B, or A to B; dotted: null, or A to null; bars: 2 standard errors"
    )
    save_figure(figure, path, dpi=110)


def settings_apart(a: tg.Config, b: tg.Config) -> list[str]:
    """The settings that shape a checkpoint or its artifact and differ."""
    names = [name for part in ("model", "training", "meta", "export") for name in tg.sections()[part]]
    return [f"{name.upper()} {getattr(a, name)} -> {getattr(b, name)}" for name in names
            if getattr(a, name) != getattr(b, name)]  # fmt: skip


def read_sides(given: argparse.Namespace, device: torch.device) -> tuple[dict[str, Side], np.ndarray]:
    """Return A, B and null, all with A's evaluation settings, and the text. ValueError if not comparable."""
    folders = dict(A=given.a, B=given.b) | (dict(null=given.null) if given.null else {})
    configs = {name: read_config(folder, given.data, given.tokenizer) for name, folder in folders.items()}
    tokens, _, table = read_text(configs["A"])
    if given.null and (apart := settings_apart(configs["A"], configs["null"])):
        raise ValueError(f"--null {given.null} is not a repeat of {given.a}: {', '.join(apart)}")
    tokenizer = Path(configs["A"].tokenizer_path)
    for folder in folders.values():
        result = folder / "result.json"
        trained = read_object(result).get("sha256_tokenizer") if result.exists() else None
        if trained and trained != tg.sha256_file(tokenizer):
            raise ValueError(f"{folder} was trained with another tokenizer than {tokenizer}")
    ways = [name for part in ("data", "scoring", "evaluator") for name in tg.sections()[part]]
    same = {name: getattr(configs["A"], name) for name in ways}
    sides = {name: read_side(folders[name], replace(c, **same), table, device) for name, c in configs.items()}
    shapes = {
        name: {key: tuple(p.shape) for key, p in side.model.named_parameters()}
        for name, side in sides.items()
    }
    for name, theirs in shapes.items():
        if apart := [f"{key} {shapes['A'].get(key)} -> {theirs.get(key)}" for key in {**shapes["A"], **theirs}
                     if shapes["A"].get(key) != theirs.get(key)]:  # fmt: skip
            raise ValueError(f"{folders['A']} and {folders[name]} have different tensors: {', '.join(apart)}")
    return sides, tokens


def weights_head(sides: Mapping[str, Side], given: argparse.Namespace) -> list[str]:
    """Return the header lines: the models compared and the sample."""
    config, lines = sides["A"].setup.config, []
    for name, side in sides.items():
        theirs = side.setup.config
        apart = ", ".join(settings_apart(config, theirs)) or "same settings"
        lines.append(f"{name:5}{side.folder}")
        lines[-1] += "" if name == "A" else f": {apart}; SEED {config.seed} -> {theirs.seed}"
        lines += [f"     {side.missing}"] if side.missing else []
    if not given.null:
        lines.append(
            "no --null: the variation between repeats of A is unknown, so no difference here shows an effect"
        )
    elif (sides["B"].setup.config.seed == config.seed) != (sides["null"].setup.config.seed == config.seed):
        lines.append("only one of B and null has A's seed: similarity from equal initial weights, or its "
                     "absence, is not an effect of settings")  # fmt: skip
    return [
        *lines,
        f"sample: {given.rows} sequences of {config.train_seq_len} tokens of the validation text, "
        f"--seed {given.seed}; ± is a standard error over sequences, documents or probes; float32",
    ]


def weights(given: argparse.Namespace) -> None:
    """Compare two checkpoints with every analysis, each number beside that of a repeat."""
    wanted = given.only.split(",") if given.only else list(ANALYSES)
    if unknown := [key for key in wanted if key not in ANALYSES]:
        raise ValueError(f"--only {', '.join(unknown)}: unknown; known are {', '.join(ANALYSES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides, tokens = read_sides(given, device)
    a, others = sides["A"], {f"A to {name}": side for name, side in sides.items() if name != "A"}
    rows = sample_rows(tokens, given.rows, a.setup.config.train_seq_len, given.seed, device)
    text, report, parts = Text(tokens, *rows, given.seed), {}, ["\n".join(weights_head(sides, given))]
    for key in wanted:
        analysis = ANALYSES[key]
        report[key] = {
            name: analysis.measure(a, side, text) if analysis.pair else analysis.measure(side, text)
            for name, side in (others if analysis.pair else sides).items()
        }
        parts.append(analysis_text(analysis, report[key]))
    about = dict(
        runs={name: str(side.folder) for name, side in sides.items()}, rows=given.rows, seed=given.seed
    )
    plain = {key: {name: as_json(table) for name, table in found.items()} for key, found in report.items()}
    title = "   ".join(f"{name}: {side.folder}" for name, side in sides.items())
    write_report(given, "\n".join(parts), about | plain, partial(draw_weights, report, title))


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

COMMANDS = {"curves": curves, "nll": nll, "weights": weights}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("curves", help="table and curves of runs (the default command)")
    runs.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    runs.add_argument("--out", type=Path, help="plot file; default: curve.png in the first folder")
    losses = commands.add_parser("nll", help="compare the losses of the same targets")
    models = commands.add_parser("weights", help="compare two checkpoints")
    for each, what in ((losses, "run folder or nll.npy"), (models, "run folder")):
        each.add_argument("a", type=Path, metavar="A", help=what)
        each.add_argument("b", type=Path, metavar="B", help=what)
        each.add_argument("--data", type=Path, help="folder of the validation shards; default: A's DATA_PATH")
        each.add_argument("--tokenizer", type=Path, help="default: A's TOKENIZER_PATH")
        each.add_argument("--out", type=Path, help="folder for text, JSON and plot; default: folder of A")
    models.add_argument("--null", type=Path, help="repeat of A: same settings, same or another seed")
    models.add_argument("--rows", type=int, default=32, help="sequences in the sample; default: 32")
    models.add_argument("--seed", type=int, default=0, help="seed of the sample and the probes; default: 0")
    models.add_argument("--only", help=f"comma list of {', '.join(ANALYSES)}; default: all")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    named = not argv or argv[0] in (*COMMANDS, "-h", "--help")
    given = make_parser().parse_args(argv if named else ["curves", *argv])
    try:
        COMMANDS[given.command](given)
    except (ValueError, OSError) as error:
        print(f"error: {escape_lines(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
