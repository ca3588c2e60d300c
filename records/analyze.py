"""Plot runs, compare two scores of the same text, or compare two trained models.

    python records/analyze.py runs/demo_seed1337 [runs/...] [--by seconds] [--out curve.png]
    python records/analyze.py --html report.html runs/demo_seed1337 [runs/...]
    python records/analyze.py nll runs/A runs/B/eval/doc_lora [--out DIR]
    python records/analyze.py weights runs/A runs/B [--null runs/C] [--out DIR]

The first prints a table of finished runs and one of their evaluations, and plots the curves by steps, seconds
or tokens. --html writes one page instead, readable offline: curves, scores, loss by position and class,
documents with their text, samples (samples*.txt in the run folder) and settings that differ. `nll` compares
the losses of the same targets from two evaluations: runs/ID is the last legal one of the run's artifact,
runs/ID/eval/MODE a named one. TTT_EPOCHS=0 scores the same windows without adaptation. `weights` compares two
checkpoints. --null is a repeat of A with the same settings and the same or another seed; each number then
stands beside the one for A and the repeat. Plots and their JSON (of nll and weights also text) go to the
first folder or to --out. Exit codes: 0 done, 2 user error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from runfiles import escape, escape_lines, read_nll, read_object, read_result, save_figure, write_file
from scipy.ndimage import gaussian_filter1d
from sentencepiece import SentencePieceProcessor
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import page  # noqa: E402
from files import check_form, decoding, parse_json, read_file  # noqa: E402
from report import (  # noqa: E402
    LOSS_BORDERS,
    Estimate,
    class_label,
    classes,
    clustered,
    documents_of,
    figure_style,
)

import eval_ttt as ev  # noqa: E402
import train_gpt as tg  # noqa: E402

ROWS = (  # key of result.json, label, format
    ("steps", "steps", "{:,}"),
    ("step_avg_ms", "ms/step", "{:,.1f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("val_bpb_roundtrip", "bpb, int6 artifact, non-overlapping", "{:.4f}"),
    ("val_bpb_sliding", "bpb, int6 artifact, sliding", "{:.4f}"),
    ("val_bpb_ttt", "bpb, adapted, last legal evaluation", "{:.4f}"),
    ("ttt_gain_bpb", "gain over the same windows, bpb", "{:.4f}"),
    ("bytes_model", "artifact, bytes", "{:,}"),
    ("bytes_total", "with code (cap 16,000,000)", "{:,}"),
    ("bytes_total_packed", "with packed code", "{:,}"),
    ("train_seconds", "contest clock, s", "{:.1f}"),
    ("strict_seconds", "process start to result, s", "{:.1f}"),
)
MODE_ROWS = (  # key of eval_ttt.json, label, format
    ("val_bpb_roundtrip", "non-overlapping", "{:.4f}"),
    ("val_bpb_sliding", "sliding", "{:.4f}"),
    ("val_bpb_plan", "same windows, not adapted", "{:.4f}"),
    ("val_bpb_ttt", "adapted", "{:.4f}"),
    ("ttt_gain_bpb", "gain", "{:+.4f}"),
    ("eval_seconds", "seconds", "{:.1f}"),
)
RESULT = {f"{key}?": float for key, _, _ in ROWS}
ADAPTED = ("val_bpb_ttt", "ttt_gain_bpb")  # every eval_ttt.json has them
EVALUATION = {f"{key}?": float for key, _, _ in MODE_ROWS} | dict.fromkeys(ADAPTED, float)
EVALUATION |= {"settings?": dict, "sha256_shards?": {str: str}}
METRICS_BYTES = 1 << 28  # of metrics.jsonl
MODE_CELLS = len(MODE_ROWS) + 2  # columns after the names of run and mode: these, legal and audited
AXES = {  # --by: label of the x axis
    "steps": "training step",
    "seconds": "training time on the contest clock, s",
    "tokens": "training tokens, millions",
}
LAST_LEGAL = "the last legal evaluation of the run's artifact"
OTHER_WEIGHTS = "MODE of FILE: FILE is not the run's artifact (other SHA-256), so no score of the run"
MODES_DIFFER = "adapted in different modes: these scores differ by more than the models"
SKIPPED = 0.1  # of a run: what comes before does not set the range of the y axis
LABELED = 4  # with more runs, the plot leaves the values of the scores to the table
NAME_LENGTH = 28  # characters of a run's name in legends and heads of tables
BLOCK = 2048  # targets per block, the cluster for standard errors if there are too few documents
MIN_DOCUMENTS = 20  # with fewer documents, standard errors are clustered by block
NLL_NOTES = {
    "the gain, nats a target": "By the cluster used for errors; the tables below use the first. ± is a "
    "standard error, from and to are 95 % intervals: for these weights, on text "
    "like this. The training seed changes the gain too: compare trainings over "
    "seeds, with sweep.py compare.",
    "position in the document": "No share of the gain is given where the 95 % interval of the whole gain "
    "includes zero.",
    "loss, mean of both": "In nats. Binned by the loss of one model, the other would look better in the high "
    "bins (regression to the mean).",
}
RESAMPLES = 2000  # bootstrap resamples
TOP = 8  # the leading 1 / TOP of the singular directions are compared
FRACTIONS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the line from A to the other model
STEPS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # multiples of the evaluator's step
CURVATURE_ROWS = 8  # sequences for the Hessian, the first of the sample
BATCH_TOKENS = 2048  # per batch: second derivatives keep every attention matrix
TENSORS_TOLD = 4  # of two models of different shapes, in the error message
LANCZOS, PROBES = 24, 16  # Hessian-vector products for the eigenvalues and for the trace
SHOWN = (2, 4, 8, 16, LANCZOS)  # reported Lanczos steps

Table = dict[str, dict[str, Estimate]]  # row -> column -> number


# ------------------------------------------------------------------------------------------------------------
# Reading and writing
# ------------------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """A finished evaluation: its mode, its folder, and the content of eval_ttt.json.

    `other` names what was scored, if that is not the artifact of the run.
    """

    mode: str
    folder: Path
    scores: dict[str, Any]
    other: str = ""

    @property
    def name(self) -> str:
        """Return the mode, and what was scored if that is not the artifact of the run."""
        return escape(f"{self.mode} of {self.other}" if self.other else self.mode)

    @property
    def counts(self) -> bool:
        """Return whether its score is one of the run: legal, and of the run's artifact."""
        return self.scores.get("legal") is not False and not self.other


class Run(NamedTuple):
    """A finished run: result.json (with the adapted score of `legal`), metrics.jsonl, settings, evaluations.

    `given` has the settings that recipe and environment gave. `legal` is the last legal evaluation of the
    artifact, or None.
    """

    folder: Path
    result: dict[str, Any]
    metrics: list[dict[str, float]]
    config: dict[str, Any]
    given: dict[str, Any]
    evaluations: list[Evaluation]
    legal: Evaluation | None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def checked(content: dict[str, Any], form: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return `content`, which must have `form`, without the nulls that it allows."""
    check_form(content, form, path)
    return {key: value for key, value in content.items() if value is not None or f"{key}?" not in form}


def run_of(evaluation: Path) -> Path:
    """Return the folder of the run that an evaluation's folder belongs to."""
    return evaluation.parent.parent if evaluation.parent.name == "eval" else evaluation


def read_evaluation(folder: Path) -> Evaluation:
    """Read eval_ttt.json in `folder`: eval/MODE or a run folder. ValueError if it is bad."""
    path, run = folder / "eval_ttt.json", run_of(folder)
    scores = dict(settings={}, sha256_shards={}) | checked(read_object(path, *ADAPTED), EVALUATION, path)
    named = folder.name.removesuffix("_float")  # which `other` says
    mode = str(scores["settings"].get("ttt_mode", "?")) if folder == run else named
    result = read_object(run / "result.json") if (run / "result.json").exists() else {}
    hashes = {str(each["sha256_artifact"]) for each in (result, scores) if "sha256_artifact" in each}
    kind = "unquantized" if scores.get("weights") == "float" else "another" if len(hashes) > 1 else ""
    name = Path(str(scores["settings"].get("model_path") or "final_model.int6.ptz")).name
    return Evaluation(mode, folder, scores, f"{kind} {name}" if kind else "")


def read_evaluations(run: Path) -> tuple[list[Evaluation], Evaluation | None]:
    """Return all evaluations of a run, and the last legal one of its artifact.

    They are in eval/MODE; eval_ttt.json in the run folder is a copy of the last legal one, or, in runs of
    earlier versions, the only one, whether legal or not. If that is of other weights, the newest file among
    the legal evaluations of the artifact counts.
    """
    found = [read_evaluation(path.parent) for path in sorted(run.glob("eval/*/eval_ttt.json"))]
    if not (run / "eval_ttt.json").exists():
        return found, None
    last, identity = read_evaluation(run), ("sha256_nll", "settings", "eval_seconds", "val_bpb_ttt")
    same = [each for each in found if all(each.scores.get(k) == last.scores.get(k) for k in identity)]
    found, last = (found, same[0]) if same else ([last, *found], last)
    if not last.other:
        return found, last if last.counts else None
    counted = [each for each in found if each.counts]
    age = {each.folder: (each.folder / "eval_ttt.json").stat().st_mtime_ns for each in counted}
    return found, max(counted, key=lambda each: age[each.folder], default=None)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl. InputError for a line without step and seconds or with a text."""
    rows = []
    for number, line in enumerate(read_file(path, METRICS_BYTES).splitlines(), 1):
        place = f"{path}, line {number}"
        rows.append(parse_json(line, {str: float}, place))
        check_form(rows[-1], {"step": int, "seconds": float}, place)
    return rows


def read_run(folder: Path) -> Run:
    """Read the results of a run. ValueError if the folder has no finished run."""
    try:
        path = folder / "result.json"
        result = checked(read_result(path), RESULT, path)
        evaluations, legal = read_evaluations(folder)
        if legal:
            result |= {key: legal.scores[key] for key in ADAPTED}
        path = folder / "config.json"
        known = read_object(path) if path.exists() else {}
        check_form(known, {"config?": {"train_batch_tokens?": int}, "given?": dict}, path)
        config, settings = (known.get(key) or {} for key in ("config", "given"))
        metrics = read_metrics(folder / "metrics.jsonl")
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} has no finished run: {error}") from error
    return Run(folder, result, metrics, config, settings, evaluations, legal)


def elided(name: str, length: int = NAME_LENGTH) -> str:
    """Return `name` with its middle left out if it is longer than `length`."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}\u2026{name[-half:]}"


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """Return folders, each once, by the shortest ends of their paths that tell them apart."""
    parts = {Path(os.path.abspath(folder)).parts: folder for folder in folders}
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts):
        depth += 1
    names = [escape("/".join(each[-depth:])) for each in parts]
    short = [elided(name) for name in names]
    return dict(zip(short if len(set(short)) == len(names) else names, parts.values(), strict=True))


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
    settings |= dict(mtp_num_heads=0)  # MTP heads are used in training only
    texts = {name.upper(): str(int(value) if isinstance(value, bool) else value)
             for name, value in settings.items()}  # fmt: skip
    try:
        return tg.load_config(texts)[0]
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error


def read_text(config: tg.Config) -> tuple[np.ndarray, list[str], tg.ByteTable]:
    """Return the validation tokens, their shards, and the byte table. UserError if they do not match."""
    table = tg.load_byte_table(config.tokenizer_path, config.vocab_size)
    table = table.with_sidecars(tg.find_shards(config.shards("val")))
    return *tg.read_validation(config, table, tg.sha256_file(config.tokenizer_path)), table


def plain_table(
    rows: Sequence[Sequence[str]], head: Sequence[str], left: int = 1, form: str = "simple"
) -> str:
    """Return a text table of strings as they are; the first `left` columns are aligned left, others right."""
    width = max(map(len, [head, *rows]))
    align = ["left"] * left + ["right"] * (width - left)
    return tabulate(rows, head, form, colalign=align[:width], disable_numparse=True)


def table_text(title: str, note: str, tables: Mapping[str, Table], form: str) -> str:
    """Return `tables` as one text table, with a line per row and table name."""
    rows = list(dict.fromkeys(row for each in tables.values() for row in each))
    columns = list(
        dict.fromkeys(column for each in tables.values() for row in each.values() for column in row)
    )
    body = []
    for row in rows:
        for number, (name, each) in enumerate(tables.items()):
            cells = [
                each[row][column].text(form) if column in each.get(row, {}) else "" for column in columns
            ]
            body.append(["" if number else row, name, *cells])
    lines = plain_table(body, ["", "", *columns], 2, "plain").splitlines() if body else []
    return "\n".join(
        ["", title, *textwrap.wrap(note, 116, initial_indent="  ", subsequent_indent="  "),
         *(f"  {line}".rstrip() for line in lines)]
    )  # fmt: skip


def as_json(table: Table) -> dict[str, Any]:
    return {row: {column: dict(value=cell.value, error=cell.error) for column, cell in cells.items()}
            for row, cells in table.items()}  # fmt: skip


def new_figure(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `width` x `height` inches that needs no display, and its axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flatten())


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure in the project's style, which ticks take only when they are drawn."""
    with figure_style():
        save_figure(figure, path, dpi=110)


def offsets(count: int, width: float) -> np.ndarray:
    """Return positions of `count` things side by side, centered on 0, within `width`."""
    return width * (np.arange(count) - (count - 1) / 2) / max(count, 1)


def write_report(given: argparse.Namespace, text: str, report: Any, figure: Figure) -> None:
    """Print `text`, and write it with the JSON and the plot to --out or to the folder of A."""
    folder = given.out or (given.a if given.a.is_dir() else given.a.parent)
    folder.mkdir(parents=True, exist_ok=True)
    stem, text = folder / given.command, escape_lines(text)
    print(text)
    write_file(stem.with_suffix(".txt"), (text + "\n").encode())
    write_file(stem.with_suffix(".json"), json.dumps(report, indent=1).encode())
    save_plot(figure, stem.with_suffix(".png"))
    print(f"written: {stem}.txt, .json, .png")


# ------------------------------------------------------------------------------------------------------------
# Curves of runs
# ------------------------------------------------------------------------------------------------------------


def run_rows(runs: Mapping[str, Run]) -> list[list[str]]:
    """Return the rows of the table of runs, one per number that any of them has: label, then run by run.

    The adapted score stands behind its mode.
    """

    def cell(run: Run, key: str, form: str) -> str:
        mode = f"{run.legal.name} " if key == "val_bpb_ttt" and run.legal else ""
        return mode + form.format(run.result[key]) if key in run.result else "-"

    return [
        [label, *(cell(run, key, form) for run in runs.values())]
        for key, label, form in ROWS
        if any(key in run.result for run in runs.values())
    ]


def modes_of(runs: Mapping[str, Run]) -> dict[str, str]:
    """Return the mode of each run's adapted score, of runs that have one."""
    return {name: run.legal.name for name, run in runs.items() if run.legal}


def modes_differ(runs: Mapping[str, Run]) -> bool:
    """Return whether the adapted scores are of different modes."""
    return len(set(modes_of(runs).values())) > 1


def labels_of(runs: Mapping[str, Run]) -> list[str]:
    """Return the names of the runs; where modes differ, with the mode of the adapted score."""
    modes = modes_of(runs) if modes_differ(runs) else {}
    return [f"{name} ({modes[name]})" if name in modes else name for name in runs]


def score_notes(runs: Mapping[str, Run]) -> list[str]:
    """Return what must be known to compare the scores: the star, other weights, different modes."""
    starred = any(len(run.evaluations) > 1 and run.legal for run in runs.values())
    others = any(each.other for run in runs.values() for each in run.evaluations)
    notes = {f"*: {LAST_LEGAL}": starred, OTHER_WEIGHTS: others, MODES_DIFFER: modes_differ(runs)}
    return [note for note, applies in notes.items() if applies]


def mode_cells(run: Run, evaluation: Evaluation) -> list[str]:
    """Return the row of an evaluation in the table of modes; a star marks the last legal of several."""
    scores = evaluation.scores
    star = " *" if evaluation is run.legal and len(run.evaluations) > 1 else ""
    numbers = [form.format(scores[key]) if key in scores else "-" for key, _, form in MODE_ROWS]
    legal = {"True": "yes", "False": "no"}.get(str(scores.get("legal")), "-")
    audited = ("yes" if scores["audit"] else "no") if "audit" in scores else "-"
    return [evaluation.name + star, *numbers, legal, audited]


def mode_rows(runs: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of all evaluations; with one run, it is not named."""
    rows = [[name, *mode_cells(run, each)] for name, run in runs.items() for each in run.evaluations]
    head = ["run", "mode", *(label for _, label, _ in MODE_ROWS), "legal", "audited"]
    first = 1 if len(runs) == 1 else 0
    return head[first:], [row[first:] for row in rows]


def print_tables(runs: Mapping[str, Run]) -> None:
    """Print the table of runs, and that of their evaluations if there are any."""
    print(escape_lines(plain_table(run_rows(runs), ["", *runs])))
    head, rows = mode_rows(runs)
    if rows:
        print(
            escape_lines(
                "\nbits per byte of each evaluation:\n" + plain_table(rows, head, len(head) - MODE_CELLS)
            )
        )
    if notes := score_notes(runs):
        print(escape_lines("\n".join(["", *notes])))


def smoothed(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return `values` (n,) averaged with a Gaussian that is cut off at the ends, and its sigma in points."""
    sigma = max(1, len(values) // 40)
    weight = gaussian_filter1d(np.ones(len(values)), sigma, mode="constant")
    return gaussian_filter1d(values, sigma, mode="constant") / weight, sigma


def series(run: Run, key: str, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Return x by steps, seconds or millions of tokens, and the values of `key` in metrics.jsonl."""
    rows = [row for row in run.metrics if key in row]
    if by == "tokens" and not is_number(run.config.get("train_batch_tokens")):
        raise ValueError(f"--by tokens: {run.folder}/config.json has no train_batch_tokens. Use --by steps.")
    scale = run.config["train_batch_tokens"] / 1e6 if by == "tokens" else 1.0
    x = [row["seconds"] if by == "seconds" else row["step"] * scale for row in rows]
    return np.array(x, float), np.array([row[key] for row in rows], float)


def focus(axis: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], also: Sequence[float] = ()) -> None:
    """Set the y range to `also` and to the points after the first tenth of each curve, if any."""
    late = [y[(x > SKIPPED * x.max(initial=0.0)) & np.isfinite(y)] for x, y in curves]
    if shown := [*np.concatenate([np.zeros(0), *late]).tolist(), *also]:
        pad = 0.06 * (max(shown) - min(shown)) or 0.1
        axis.set_ylim(min(shown) - pad, max(shown) + pad)


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Return positions for labels at `values`, in their order but at least `gap` apart."""
    found, below = list(values), -math.inf
    for i in np.argsort(values, kind="stable").tolist():
        found[i] = below = max(values[i], below + gap)
    return found


def draw_scores(axis: Axes, runs: Mapping[str, Run]) -> None:
    """Plot the scores of the artifacts, one marker per run, with their values if the runs are few."""
    modes = modes_of(runs)
    adapted = "\n".join(["adapted", *dict.fromkeys(modes.values())])
    keys = {"val_bpb_roundtrip": "non-\noverlapping", "val_bpb_sliding": "sliding", "val_bpb_ttt": adapted}
    low, high = axis.get_ylim()
    for x, key in enumerate(keys):
        found = {color: run.result[key] for color, run in enumerate(runs.values()) if key in run.result}
        for (color, bpb), y in zip(
            found.items(), apart(list(found.values()), 0.045 * (high - low)), strict=True
        ):
            axis.plot(x, bpb, "D", color=f"C{color}", markersize=6)
            if len(runs) <= LABELED:
                axis.text(x + 0.13, y, f"{bpb:.4f}", color=f"C{color}", va="center")
    axis.set_xticks(range(len(keys)), list(keys.values()))
    axis.set_xlim(-0.4, len(keys) - 0.2)
    axis.set(title="Scores of the artifact, read back from disk", xlabel="how it is scored")


def draw_curves(runs: Mapping[str, Run], by: str) -> Figure:
    """Plot training loss, validation bpb while training if there is any, and the scores of the artifacts."""
    validated = any("val_bpb" in row for run in runs.values() for row in run.metrics)
    widths = (5, 4, 4) if validated else (5, 4)
    with figure_style():
        figure, axes = new_figure(1, len(widths), 13.5 if validated else 9.5, 4.8, width_ratios=widths)
        left, middle, right = axes[0], axes[1], axes[-1]
        losses, scores, sigmas = [], [], []
        for number, run in enumerate(runs.values()):
            x, y = series(run, "train_loss", by)
            left.plot(x, y, color=f"C{number}", linewidth=0.7, alpha=0.3)
            curve, sigma = smoothed(y)
            left.plot(x, curve, color=f"C{number}", linewidth=1.6)
            losses.append((x, y))
            sigmas.append(sigma)
            scores.append(series(run, "val_bpb", by))
            middle.plot(*scores[-1], color=f"C{number}", marker="o", markersize=4)
        focus(left, losses)
        keys = ("val_bpb_roundtrip", "val_bpb_sliding", "val_bpb_ttt")
        focus(middle, scores, [run.result[key] for run in runs.values() for key in keys if key in run.result])
        spans = " and ".join(map(str, sorted(set(sigmas))))
        left.set(xlabel=AXES[by], ylabel="nats per token", title="Training loss of the step's batch\n"
                 f"light: raw; dark: smoothed, Gaussian, sigma {spans} points")  # fmt: skip
        middle.set(xlabel=AXES[by], ylabel="bits per byte, lower is better",
                   title="Validation of the current weights\nnon-overlapping windows")  # fmt: skip
        for axis in (left, middle):
            axis.xaxis.set_major_formatter("{x:,g}")
        if validated:
            right.sharey(middle)
        draw_scores(right, runs)
        handles = [
            Line2D([], [], color=f"C{number}", marker="o", markersize=4) for number in range(len(runs))
        ]
        note = f"y axes: the range of what comes after the first {SKIPPED:.0%} of each run"
        note = f"{MODES_DIFFER}\n{note}" if modes_differ(runs) else note
        labels = labels_of(runs)
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), title=note)
    return figure


def curves(given: argparse.Namespace) -> None:
    """Print the tables of runs and of their evaluations; write the curves as a plot and JSON, or a page."""
    runs = {name: read_run(folder) for name, folder in named(given.runs).items()}
    if given.html:
        given.html.parent.mkdir(parents=True, exist_ok=True)
        write_file(given.html, html_page(runs, given))
        written = f"page: {given.html}"
    else:
        path = given.out or given.runs[0] / "curve.png"
        save_plot(draw_curves(runs, given.by), path)
        modes = modes_of(runs)
        report = {str(run.folder): dict(result=run.result, ttt_mode=modes.get(name), metrics=run.metrics)
                  for name, run in runs.items()}  # fmt: skip
        write_file(path.with_suffix(".json"), json.dumps(report, indent=1).encode())
        written = f"curve: {path}"
    print_tables(runs)
    print(escape_lines(f"\n{written}"))


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------


def draw_gain(folders: Mapping[str, Path]) -> Figure:
    """Plot the gain of adaptation by position and by kind of target, of evaluations (label -> folder)."""
    with figure_style():
        figure, axes = new_figure(1, 2, 12, 4, width_ratios=(3, 2))
        for (label, folder), offset in zip(folders.items(), offsets(len(folders), 0.6), strict=True):
            rows = page.class_rows(folder)
            for axis, wanted in zip(axes, (True, False), strict=True):
                part = [row for row in rows if row["name"].startswith("position") == wanted]
                gains = [row["before"] - row["after"] for row in part]
                errors = [2 * (row.get("gain_error") or 0.0) for row in part]
                axis.errorbar(np.arange(len(part)) + offset, gains, errors, fmt="o", capsize=3, label=label)
                axis.set_xticks(range(len(part)), [class_label(row["name"]) for row in part])
        axes[0].set(title="Gain of adaptation by position", xlabel="position in the document, targets",
                    ylabel="nats per target")  # fmt: skip
        axes[1].set(title="Gain of adaptation by kind of target", xlabel="kind of target")
        for axis in axes:
            axis.axhline(0, color="black", linewidth=0.8)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)),
                      title="error bars: 2 standard errors, by document")  # fmt: skip
    return figure


def shown_evaluations(runs: Mapping[str, Run]) -> dict[str, tuple[Run, Evaluation]]:
    """Return what a page compares: all evaluations of one run, or the last legal one of each run."""
    if len(runs) > 1:
        labeled = zip(labels_of(runs), runs.values(), strict=True)
        return {label: (run, run.legal) for label, run in labeled if run.legal}
    (run,) = runs.values()
    return {each.name: (run, each) for each in run.evaluations}


def document_texts(
    run: Run, scored: Mapping[str, str], documents: Sequence[int], given: argparse.Namespace
) -> dict[int, str]:
    """Return the beginning of each of `documents` of the validation text. ValueError if it is not `scored`.

    `scored` has the SHA-256 of each shard by its name.
    """
    config = read_config(run.folder, given.data, given.tokenizer)
    tokens, shards, _ = read_text(config)
    if set(scored.values()) != {tg.sha256_file(shard) for shard in shards}:
        raise ValueError(f"{', '.join(shards)} are not the scored {', '.join(scored)}. Use --data.")
    with decoding(config.tokenizer_path, "a SentencePiece model"):  # read_text has opened it
        model = SentencePieceProcessor(model_file=config.tokenizer_path)
    begin, end = ev.documents(tokens)
    ids = {i: tokens[begin[i] : min(end[i], begin[i] + page.EXCERPT) + 1].tolist() for i in documents}
    return {i: model.decode(each)[: page.EXCERPT] for i, each in ids.items()}


def document_sections(
    shown: Mapping[str, tuple[Run, Evaluation]], given: argparse.Namespace
) -> Iterator[page.Section]:
    """Yield one section for each validation text that the evaluations scored."""
    groups: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for label, (_, evaluation) in shown.items():
        if (evaluation.folder / "documents.csv").exists():
            scored = evaluation.scores["sha256_shards"]
            groups.setdefault(tuple(sorted(scored.values())), {})[label] = page.read_documents(
                evaluation.folder
            )
    for number, found in enumerate(groups.values(), 1):
        run, evaluation = shown[next(iter(found))]
        first, texts, missing = next(iter(found.values())), {}, ""
        try:
            wanted = page.chosen_documents(first).tolist()
            texts = document_texts(run, evaluation.scores["sha256_shards"], wanted, given)
        except (ValueError, OSError, IndexError) as error:
            missing = str(error)
        title = "Documents" if len(groups) == 1 else f"Documents of validation text {number}"
        yield page.document_section(found, texts, missing, title)


def score_section(runs: Mapping[str, Run]) -> page.Section:
    """Return the tables of runs and of their evaluations."""
    tables = [page.Table(["", *runs], page.plain_cells(run_rows(runs)))]
    head, rows = mode_rows(runs)
    if rows:
        caption = "; ".join(["evaluations, bits per byte", *score_notes(runs)])
        tables.append(
            page.Table(head, page.plain_cells(rows), range(len(head) - MODE_CELLS), caption=caption)
        )
    return page.Section("Scores", tables=tables)


def html_page(runs: Mapping[str, Run], given: argparse.Namespace) -> bytes:
    """Return the page of a run or of several: see page.py."""
    order = [given.by, *(by for by in AXES if by != given.by)]
    if not all(is_number(run.config.get("train_batch_tokens")) for run in runs.values()):
        order = [by for by in order if by != "tokens" or by == given.by]
    plots = {by: page.data_uri(draw_curves(runs, by)) for by in order}
    sections = [score_section(runs), page.Section("Curves", figures=plots)]
    shown = shown_evaluations(runs)
    folders = {label: evaluation.folder for label, (_, evaluation) in shown.items()}
    classed = {label: path for label, path in folders.items() if (path / "distribution.json").exists()}
    if classed:
        sections.append(page.class_section(classed, page.data_uri(draw_gain(classed))))
    sections += document_sections(shown, given)
    sections.append(page.sample_section({name: run.folder for name, run in runs.items()}))
    labeled = zip(labels_of(runs), runs.values(), strict=True)
    settings = {label: run.config for label, run in labeled} if len(runs) > 1 else {}
    for label, (run, evaluation) in shown.items():
        settings[label] = run.config | evaluation.scores["settings"]
    if len(settings) > 1:
        sections.append(page.settings_section(settings))
    if len(runs) == 1:
        sections.append(page.given_section(next(iter(runs.values())).given))
    return page.render(", ".join(runs), sections)


# ------------------------------------------------------------------------------------------------------------
# Two scores of the same targets
# ------------------------------------------------------------------------------------------------------------


def nll_file(path: Path) -> Path:
    """Return the nll.npy of `path`: itself, in eval/MODE of a run, or of a run's last legal evaluation.

    ValueError if the run has no legal evaluation of its artifact.
    """
    if not path.exists():
        raise ValueError(f"{path}: cannot be read: no such file or folder")
    if not path.is_dir():
        return path
    if any(path.glob("eval/*/eval_ttt.json")):
        evaluations, legal = read_evaluations(path)
        if not legal:
            names = ", ".join(str(each.folder) for each in evaluations)
            raise ValueError(f"{path} has no legal evaluation of its artifact. Name one of {names}.")
        path = legal.folder
    return path / "nll.npy"


def evaluation_of(losses: Path) -> Evaluation | None:
    """Return the evaluation that an nll.npy is of, if its eval_ttt.json stands beside it."""
    return read_evaluation(losses.parent) if (losses.parent / "eval_ttt.json").exists() else None


def require_same_text(paths: Sequence[Path], evaluations: Sequence[Evaluation | None]) -> None:
    """Raise ValueError if the two evaluations of `paths` (nll.npy) name different shards."""
    texts = [each.scores["sha256_shards"] for each in evaluations if each]
    if len(texts) == 2 and all(texts) and sorted(texts[0].values()) != sorted(texts[1].values()):
        names = (", ".join(f"{name} (SHA-256 {sha[:12]}..)" for name, sha in text.items()) for text in texts)
        told = " and ".join(f"{path} scored {name}" for path, name in zip(paths, names, strict=True))
        raise ValueError(f"the two evaluations are of different texts: {told}")


def read_losses(
    paths: Sequence[Path], evaluations: Sequence[Evaluation | None], given: argparse.Namespace
) -> tuple[list[np.ndarray], np.ndarray, tg.ByteTable]:
    """Return the two nll arrays, (targets,), and their text. ValueError if the three do not match."""
    require_same_text(paths, evaluations)
    folders = [folder for path in paths if ((folder := run_of(path.parent)) / "config.json").exists()]
    if not folders:
        raise ValueError(
            f"neither {given.a} nor {given.b} is in a run folder, and config.json names the scored text"
        )
    tokens, shards, byte_table = read_text(read_config(folders[0], given.data, given.tokenizer))
    losses = []
    for path, evaluation in zip(paths, evaluations, strict=True):
        losses.append(read_nll(path))
        scored = evaluation.scores["sha256_shards"] if evaluation else {}
        if scored and set(scored.values()) != {tg.sha256_file(shard) for shard in shards}:
            raise ValueError(f"{path} scored {', '.join(scored)}, which are not {', '.join(shards)}")
        if losses[-1].shape != (len(tokens) - 1,) or not np.isfinite(losses[-1]).all():
            raise ValueError(f"{path}: shape {losses[-1].shape}, but {len(tokens) - 1} targets in "
                             f"{', '.join(shards)}, or not all finite")  # fmt: skip
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
            found["position in the document"][class_label(name)] = mask
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


def bootstrap(x: np.ndarray, units: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `x` from a bootstrap over whole units."""
    sums, counts, rng = np.bincount(units, x), np.bincount(units), np.random.default_rng(seed)
    drawn = (rng.integers(0, len(sums), len(sums)) for _ in range(RESAMPLES))
    low, high = np.quantile([sums[index].sum() / counts[index].sum() for index in drawn], (0.025, 0.975))
    return float(low), float(high)


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
    """Return the gain of B over A (A - B) in nats per target: its mean, its errors, and its breakdown.

    Buckets have their share of the gain only if the 95 % interval of the whole gain excludes zero.
    """
    gain, units = a.astype(np.float64) - b, independent_units(tokens)
    first, errors = next(iter(units.values())), {}
    interval = clustered(gain, first).interval() or (0.0, 0.0)
    is_sure = interval[0] > 0 or interval[1] < 0  # shares of a gain that may be zero mean nothing
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
            plain = {"share of targets": mask.mean(), "A": ours, "B": theirs}
            plain |= {"share of the gain": gain[mask].sum() / gain.sum()} if is_sure else {}
            report[kind][name] = {column: Estimate(float(x)) for column, x in plain.items()} | {"gain": here}
    return report


def draw_nll(report: Mapping[str, Table], gain: np.ndarray, tokens: np.ndarray, title: str) -> Figure:
    """Plot the gain in each bucket with two standard errors, by document, and accumulated over the text."""
    with figure_style():
        figure, axes = new_figure(2, 3, 15, 8)
        _, *parts = report.items()
        for axis, (kind, table) in zip(axes, parts, strict=False):
            shares = [cells.get("share of the gain") for cells in table.values()]
            percents = ["" if share is None else f"\n{share.value:.0%}" for share in shares]
            names = [name.replace(" ", "\n") + more for name, more in zip(table, percents, strict=True)]
            found = [cells["gain"] for cells in table.values()]
            errors = [2 * (each.error or 0.0) for each in found]
            axis.bar(names, [each.value for each in found], yerr=errors, capsize=3, color="C0", ecolor="0.3")
            below = "" if None in shares else "; percent: share of the whole gain"
            axis.set(title=f"Gain by {kind}", xlabel=kind + below, ylabel="nats per target")
            axis.tick_params(axis="x", labelsize=8)
        document = documents_of(tokens)
        axes[4].scatter(
            np.bincount(document), np.bincount(document, gain) / np.bincount(document), s=12, alpha=0.6
        )
        axes[4].set(title="Gain of each document", xscale="log", xlabel="targets in the document",
                    ylabel="nats per target")  # fmt: skip
        drawn = np.unique(np.linspace(0, len(gain) - 1, 2000).astype(np.int64))
        axes[5].plot(drawn, np.cumsum(gain)[drawn])
        axes[5].set(title="Cumulative gain", xlabel="targets, in the order of the text", ylabel="nats")
        axes[5].xaxis.set_major_formatter("{x:,g}")
        for axis in axes:
            axis.axhline(0, color="black", linewidth=0.8)
        figure.suptitle(f"{title}\nabove zero: B is better; error bars: 2 standard errors")
    return figure


def nll(given: argparse.Namespace) -> None:
    """Compare the losses of two evaluations of the same text."""
    paths = [nll_file(path) for path in (given.a, given.b)]
    evaluations = [evaluation_of(path) for path in paths]
    modes = [each.name if each else "" for each in evaluations]
    (a, b), tokens, byte_table = read_losses(paths, evaluations, given)
    gain, num_bytes = a.astype(np.float64) - b, int(byte_table.of_text(tokens).sum())
    report, sums = compare_nll(a, b, tokens, byte_table), np.bincount(documents_of(tokens), gain)
    bits, differ = float(gain.sum()) / math.log(2) / num_bytes, all(modes) and modes[0] != modes[1]
    head = [
        f"A {given.a}" + f": {modes[0]}" * bool(modes[0]),
        f"B {given.b}" + f": {modes[1]}" * bool(modes[1]),
        *[f"note: {MODES_DIFFER}"] * differ,
        f"gain of B over A: {gain.mean():+.5f} nats/target, {bits:+.5f} bits per byte of {num_bytes:,}; "
        f"B is better in {(sums > 0).sum()} of {len(sums)} documents",
    ]
    parts = [table_text(kind, NLL_NOTES.get(kind, ""), {"": table}, ".5f") for kind, table in report.items()]
    about = dict(a=str(given.a), b=str(given.b), targets=len(gain), bytes=num_bytes, gain_bpb=bits)
    about |= dict(a_mode=modes[0], b_mode=modes[1])
    a_name, b_name = (elided(str(path), 50) + f" ({mode})" * bool(mode)
                      for path, mode in zip((given.a, given.b), modes, strict=True))  # fmt: skip
    title = f"A: {a_name}   B: {b_name}   gain of B: {bits:+.4f} bits per byte"
    title += f"\n{MODES_DIFFER}" * differ
    content = about | {kind: as_json(table) for kind, table in report.items()}
    write_report(given, "\n".join(head + parts), content, draw_nll(report, gain, tokens, title))


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


def shapes_apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """Return the first tensors whose shapes differ, and how many more do; empty if none."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (ours, theirs)]
    told = [f"{name} {' -> '.join(str(each.get(name, 'absent')) for each in shapes)}"
            for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]  # fmt: skip
    more = len(told) - TENSORS_TOLD
    return ", ".join(told[:TENSORS_TOLD]) + f" and {more} more" * (more > 0)


def require_own_model(path: Path, config: tg.Config) -> None:
    """Raise ValueError if a checkpoint has other tensors than the settings of its run describe."""
    with tg.decoding(path, "a checkpoint"), tg.open_input(path, tg.STATE_FILE) as file:
        apart = shapes_apart(tg.GPT(config).state_dict(), tg.load_tensors(file))
    if apart:
        raise ValueError(f"{path} is not the model of its config.json here: {apart}. Another version of "
                         f"train_gpt.py trained it: see {path.parent / 'source'}")  # fmt: skip


def read_side(folder: Path, config: tg.Config, table: tg.ByteTable, device: torch.device) -> Side:
    """Load the checkpoint of a run in float32, and any artifact. ValueError without a checkpoint."""
    path = folder / "final_model.pt"
    require_own_model(path, config)
    config, weights, _ = ev.read_model(replace(config, model_path=str(path)), {})
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
        inputs, weights = (batch.ids, batch.targets, batch.positions), adaptation.replacements()
        found = adaptation.nll_fn(adaptation.model, *inputs, *weights).double().cpu().numpy()
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


TRAINED_BY = ("model", "training", "meta", "export")  # sections that shape a checkpoint or its artifact
ASIDE = ("chance", "barrier", "residual", "loss", "weights", "artifact")  # columns and rows not plotted
COLORS = {"A": "C0", "B": "C1", "null": "0.55", "A to B": "C1", "A to null": "0.55"}


def draw_layers(axis: Axes, found: Mapping[str, Table]) -> None:
    """Plot one group per row, with the layers from left to right, and the value expected by chance."""
    first = next(table for table in found.values() if table)
    start, ticks = 0, []
    for row, cells in first.items():
        layers = [column for column in cells if column not in ASIDE]
        x = start + np.arange(len(layers))
        for name, table in found.items():
            axis.plot(x, [table[row][layer].value for layer in layers], ".-", color=COLORS[name], linewidth=1)
        if "chance" in cells:
            axis.hlines(cells["chance"].value, x[0] - 0.4, x[-1] + 0.4, color="black", linewidth=1)
        ticks.append((x.mean(), row.replace(" ", "\n")))
        start += len(layers) + 1
    axis.set_xticks(*zip(*ticks, strict=True))
    axis.grid(axis="x", visible=False)


def draw_lines(axis: Axes, found: Mapping[str, Table]) -> None:
    """Plot each row over its columns as numbers; rows differ by line style."""
    for name, table in found.items():
        lines = [cells for row, cells in table.items() if row not in ASIDE]
        for cells, line in zip(lines, ("-", "--"), strict=False):
            shown = {float(column): cell for column, cell in cells.items() if column not in ASIDE}
            errors = [2 * (cell.error or 0.0) for cell in shown.values()]
            axis.errorbar(list(shown), [cell.value for cell in shown.values()], errors, color=COLORS[name],
                          linestyle=line, marker=".", capsize=2, linewidth=1)  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.8)


def draw_columns(axis: Axes, found: Mapping[str, Table]) -> None:
    """Plot the columns of the only row side by side, one marker with its error for each model."""
    for (name, table), offset in zip(found.items(), offsets(len(found), 0.5), strict=True):
        (cells,) = table.values()
        shown = {column: cell for column, cell in cells.items() if column not in ASIDE}
        errors = [2 * (cell.error or 0.0) for cell in shown.values()]
        axis.errorbar(np.arange(len(shown)) + offset, [cell.value for cell in shown.values()], errors,
                      color=COLORS[name], linestyle="none", marker="o", markersize=4, capsize=3)  # fmt: skip
        axis.set_xticks(
            range(len(shown)), [column.removesuffix("_bank").replace("_", "\n") for column in shown]
        )
    axis.set_xlim(-0.6, len(shown) - 0.4)
    axis.axhline(0, color="black", linewidth=0.8)


class Analysis(NamedTuple):
    """An analysis of a pair of models, or of each model (`pair` False), and how it is printed and drawn."""

    measure: Callable[..., Table]
    pair: bool
    title: str
    note: str = ""
    form: str = ".3f"
    empty: str = ""
    draw: Callable[[Axes, Mapping[str, Table]], None] = draw_layers
    x: str = "matrix; its layers from left to right"
    y: str = ""


ANALYSES = {
    "cosines": Analysis(
        cosines, True, "cosine of the weights, by layer", "0: unrelated", y="cosine, 1: identical"),
    "outputs": Analysis(
        partial(subspaces, right=False), True,
        "overlap of leading left singular subspaces (outputs), by layer",
        f"Mean squared cosine of the principal angles, one direction in {TOP}; 1: identical. Muon leaves "
        "flat spectra, so which directions are leading is partly noise.",
        y="overlap, 1: identical; black: by chance"),
    "inputs": Analysis(
        partial(subspaces, right=True), True,
        "overlap of leading right singular subspaces (inputs), by layer",
        y="overlap, 1: identical; black: by chance"),
    "cka": Analysis(
        cka, True, "linear CKA of the inputs of the matrices, by layer",
        "1: equal up to a rotation (including a permutation of units) and a scale.",
        x="site; its layers from left to right", y="CKA, 1: equal up to a rotation"),
    "path": Analysis(
        path_loss, True, "loss under linear interpolation, by fraction of the other model, nats per token",
        "All parameters. Permutations of hidden units and heads are not removed: runs with different seeds "
        "have a barrier whatever their settings.", ".4f",
        draw=draw_lines, x="fraction of the way from A", y="loss above the straight line, nats per token"),
    "eigenvalues": Analysis(
        eigenvalues, False, "extreme eigenvalues of the Hessian, by Lanczos step",
        f"Of the mean training loss of the first {CURVATURE_ROWS} sequences, in all parameters.", ".4g",
        draw=draw_lines, x="Lanczos step; solid: smallest, dashed: largest", y="eigenvalue, nats per token"),
    "trace": Analysis(
        trace, False, "trace of the Hessian, by parameter group",
        f"Of the same loss; {PROBES} probes, equal for all models; errors are over probes, not over text.",
        ".4g", draw=draw_columns, x="parameter group", y="trace, nats per token"),
    "step": Analysis(
        along_step, False,
        "change of the loss along the evaluator's first step, by multiple, nats per target",
        "All with A's evaluator settings.", ".4f", "TTT_MODE=none, or too little text to adapt",
        draw=draw_lines, x="multiple of the step; solid: the next chunk, dashed: the chunk adapted on",
        y="change of the loss, nats per target"),
    "rounding": Analysis(
        rounding, False, "loss of weights and artifact, nats per token", "", ".5f", "no artifact",
        draw=draw_columns, x="by quantization", y="loss added by quantization, nats per token"),
    "rounded_weights": Analysis(
        partial(quantization_error, outputs=False), False, "quantization error, |W - Q| / |W|, by layer",
        "Large where it costs little: scales follow the loss, and GPTQ's later columns compensate earlier "
        "ones.", ".4f", "no artifact", y="|W - Q| / |W|"),
    "rounded_outputs": Analysis(
        partial(quantization_error, outputs=True), False, "output error, |(W - Q) x| / |W x|, by layer", "",
        ".4f", "no artifact", y="|(W - Q) x| / |W x|"),
    "meta_rates": Analysis(
        meta_rates, False, "Meta-SGD learning rate factors, by layer", empty="META_SGD_ENABLED was off",
        y="factor of TTT_LR"),
}  # fmt: skip


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


def draw_weights(report: Mapping[str, Mapping[str, Table]], title: str) -> Figure:
    """Plot one panel per analysis that has numbers; colors are models or pairs."""
    shown = {key: {name: table for name, table in found.items() if table} for key, found in report.items()}
    shown = {key: found for key, found in shown.items() if found}
    columns = len(shown) if 0 < len(shown) < 4 else min((4, 3), key=lambda n: -len(shown) % n)
    with figure_style():
        rows = math.ceil(len(shown) / columns) or 1
        figure, axes = new_figure(rows, columns, max(4.4 * columns, 9), 3.4 * rows + 1)
        for axis, (key, found) in zip(axes, shown.items(), strict=False):
            analysis = ANALYSES[key]
            analysis.draw(axis, found)
            name = analysis.title.split(", by ")[0]
            axis.set_title(textwrap.fill(name[0].upper() + name[1:], 48))
            axis.set(xlabel=textwrap.fill(analysis.x, 44), ylabel=analysis.y)
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        names = dict.fromkeys(name for found in shown.values() for name in found)
        legend: dict[str, list[str]] = {}
        for name in sorted(names, key=list(COLORS).index):
            legend.setdefault(COLORS[name], []).append(name)
        handles = [Line2D([], [], color=color, marker="o") for color in legend]
        labels = [", or ".join(group) for group in legend.values()]
        figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1))
        figure.suptitle(f"{title}\nerror bars: 2 standard errors")
    return figure


def settings_apart(a: tg.Config, b: tg.Config, parts: Sequence[str] = TRAINED_BY) -> list[str]:
    """Return the settings that differ, of the sections that shape a checkpoint or its artifact."""
    names = [name for part in parts for name in tg.sections()[part]]
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
    for name, side in sides.items():
        if apart := shapes_apart(sides["A"].model.state_dict(), side.model.state_dict()):
            told = ", ".join(settings_apart(configs["A"], configs[name], ["model"]))
            raise ValueError(f"{folders['A']} and {folders[name]} are different models: {told}. "
                             f"Their tensors: {apart}")  # fmt: skip
    return sides, tokens


def weights_head(sides: Mapping[str, Side], given: argparse.Namespace) -> list[str]:
    """Return the header lines: the models compared and the sample."""
    config, lines = sides["A"].setup.config, []
    for name, side in sides.items():
        theirs = side.setup.config
        apart = ", ".join(settings_apart(config, theirs)) or "same settings"
        lines.append(f"{name:5}{side.folder}")
        seed = "same SEED" if theirs.seed == config.seed else f"SEED {config.seed} -> {theirs.seed}"
        lines[-1] += "" if name == "A" else f": {apart}; {seed}"
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
    title = "   ".join(f"{name}: {elided(str(side.folder), 40)}" for name, side in sides.items())
    write_report(given, "\n".join(parts), about | plain, draw_weights(report, title))


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
    runs.add_argument("--by", choices=AXES, default="steps", help="x axis; default: steps")
    runs.add_argument("--out", type=Path, help="plot file; default: curve.png in the first folder")
    runs.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page instead")
    runs.add_argument("--data", type=Path, help="--html: folder of the validation shards; default: DATA_PATH")
    runs.add_argument("--tokenizer", type=Path, help="--html: default: TOKENIZER_PATH")
    losses = commands.add_parser("nll", help="compare the losses of the same targets")
    models = commands.add_parser("weights", help="compare two checkpoints")
    for each, what in ((losses, "run folder, its eval/MODE, or nll.npy"), (models, "run folder")):
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
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
