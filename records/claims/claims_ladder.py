"""What the kept scores of the ladder give for its page (see claims.py)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
from scipy.special import stdtrit
from stated import Cell, Page, Pages

REPORT, KEPT = "records/ladder/report.md", "records/ladder/kept"
# Score -> what it is compared with, where that is not `none`: the same windows without adaptation.
SAME_WINDOWS = {"adapters": "none, adapters", "chunks": "none, chunks"}
FULL_SIZE = {
    "pr1019": (26.0e6, 208),
    "pr1855": (31.7e6, 122),
}  # stated in tables.py: parameters, tokens for each
Runs = Sequence[dict[str, Any]]
# fmt: off


def tables_of(page: Page, title: str) -> list[int]:
    """Return the indices of the tables of a section."""
    found, section = [], ""
    for match in re.finditer(r"(?m)^#+ (.*)|(?:^\|.*\n?)+", page.text):
        section = match[1] or section
        found += [section] if not match[1] else []
    return [index for index, name in enumerate(found) if name == title]


def runs_of(p: Pages, part: str) -> dict[str, Runs]:
    """Return the kept scores of a text by rung or arm, in the order of their seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((p.root / KEPT).glob(f"*_seed*/{part}.json")):
        found.setdefault(path.parent.name.rsplit("_seed", 1)[0], []).append(json.loads(path.read_text()))
    return found


def bits(runs: Runs, score: str) -> np.ndarray:
    """Return bits by seed and document."""
    return np.array([run["scores"][score]["nats_by_document"] for run in runs]) / math.log(2)


def difference(
    worse: np.ndarray, better: np.ndarray, size: Sequence[int], level: float = 0.95
) -> list[float]:
    """Return the mean difference in bits per byte and half of its interval over seeds and documents."""
    gap, (seeds, documents), total = worse - better, worse.shape, sum(size)
    middle = gap.sum() / seeds / total
    seed = [row.sum() / total for row in gap]
    seed_part = sum((x - middle) ** 2 for x in seed) / (seeds - 1) / seeds
    residual = [gap[:, n].mean() - middle * size[n] for n in range(documents)]
    document_part = documents / (documents - 1) * sum(x**2 for x in residual) / total**2
    both = seed_part + document_part
    freedom = both**2 / (seed_part**2 / (seeds - 1) + document_part**2 / (documents - 1) + 1e-300)
    return [middle, stdtrit(max(freedom, 1), 0.5 + level / 2) * math.sqrt(both)]


def gain(runs: Runs, score: str) -> list[float]:
    before = bits(runs, SAME_WINDOWS.get(score, "none"))
    return difference(before, bits(runs, score), runs[0]["bytes_by_document"])


def gains(page: Page, title: str, rungs: dict[str, Runs], scores: Sequence[str]) -> None:
    for index in tables_of(page, title):
        page.shows(index, {
            name: [len(runs), mean(run["scores"]["none"]["bpb"] for run in runs),
                   *(gain(runs, score) if score in runs[0]["scores"] else "" for score in scores)]
            for name, runs in rungs.items()})


def positions(page: Page, title: str, rungs: dict[str, Runs]) -> None:
    for index in tables_of(page, title):
        rows: dict[str, list[Cell]] = {}
        for name, runs in rungs.items():
            before, after = (np.mean([run["scores"][score]["nats_by_position"] for run in runs], axis=0)
                             for score in ("none", "slots"))
            rows[name] = [(a - b) / max(count, 1) for a, b, count in
                          zip(before, after, runs[0]["targets_by_position"], strict=True)]
        page.shows(index, rows)


def meta(page: Page, arms: dict[str, Runs]) -> None:
    """The cells, then the comparisons, whose names say which cells they compare."""
    indices = tables_of(page, "Meta-learning on the report text")
    if not indices:
        return
    arms = {name.removeprefix("meta_"): runs for name, runs in arms.items()}
    size = arms["plain"][0]["bytes_by_document"]
    scores = ("none", "slots", "factors")
    page.shows(indices[0], {
        name: [*(mean(run["scores"][score]["bpb"] for run in runs) for score in scores),
               *(gain(runs, score) for score in scores[1:])] for name, runs in arms.items()})
    rows: dict[str, list[Cell]] = {}
    lines = re.findall(r"(?m)^\| *(\w+ - [^|]+?) *\|[^|]*\| *(primary)? *\|", page.text)
    primary = sum(bool(label) for _, label in lines)
    for name, label in lines:
        cells = [("longer", "factors"), ("longer", "slots")]
        if not name.startswith("factors"):
            score = "factors" if "factors" in name and "no factors" not in name else "slots"
            score = "none" if "not adapted" in name else score
            cells = [(arm, score) for arm in name.split(",")[0].split(" - ")]
        ours, theirs = (bits(arms[arm], score) for arm, score in cells)
        rows[name] = [difference(ours, theirs, size, 1 - 0.05 / primary if label else 0.95), label]
    page.shows(indices[1], rows)


def extrapolated(found: dict[str, float], size: dict[str, tuple[float, float]], target: tuple[float, float],
                 shift: tuple[float, float] = (0, 0)) -> list[Cell]:
    """Return the gain of a power law at a size and length, and its interval, as two cells."""
    x = np.array([[1, math.log(size[name][0]), math.log(size[name][1])] for name in found])
    y, inverse = np.log(list(found.values())), np.linalg.pinv(x)
    weights, rest, df = np.array([1, *map(math.log, target)]) @ inverse, y - x @ (inverse @ y), len(y) - 3
    half = stdtrit(df, 0.975) * math.sqrt(rest @ rest / df * (1 + weights @ weights) + shift[1])
    middle = weights @ y + shift[0]
    return [math.exp(middle), [math.exp(middle - half), math.exp(middle + half)]]


def power_law(page: Page, title: str, rungs: dict[str, Runs]) -> None:
    """Sizes are those of the page's first table, which the trainer counts."""
    for index in tables_of(page, title):
        counted = [re.findall(r"[^|\s]+", line) for line in page.text.splitlines()]
        size = {row[0]: (float(row[3].replace(",", "")), float(row[5])) for row in counted
                if len(row) == 7 and row[0] in rungs}
        rows: dict[tuple[str, str], list[Cell]] = {}
        for form in ("adapters", "slots"):
            found = {name: gain(runs, form)[0] for name, runs in rungs.items()}
            if min(found.values()) <= 0:
                rows[form, ""] = ["none: a rung has no gain", "", ""]
                continue
            found = {name: value for name, value in found.items() if "2048" not in name}
            short, long = (gain(rungs[name], form) for name in ("0.1M_80", "0.1M_80_2048"))
            shift = math.log(long[0] / short[0]), sum((half / 1.96 / x) ** 2 for x, half in (short, long))
            for name, target in FULL_SIZE.items():
                rows[form, name] = [*extrapolated(found, size, target, shift), ""]
            last = max(found, key=lambda name: size[name][0])
            others = {name: value for name, value in found.items() if name != last}
            if len(others) > 3:
                name = f"{last}, by the other rungs"
                rows[form, name] = [*extrapolated(others, size, size[last]), found[last]]
        page.shows(index, rows, keys=2)


def ladder(p: Pages) -> None:
    if not (p.root / REPORT).exists():
        return
    page = p.page(REPORT)
    report, mixture, ideas = (runs_of(p, part) for part in ("report", "mixture", "report_ideas"))
    arms = {name: runs for name, runs in report.items() if name.startswith("meta_")}
    rungs = {name: runs for name, runs in report.items() if name not in arms}
    forms = ("chunks", "adapters", "slots")
    contexts = ("context x2", "context x4")
    gains(page, "Gains on the report text", rungs, (*forms, "mixture"))
    gains(page, "Controls on the report text", rungs,
          (*contexts, "another document", "another document, quarter rate"))
    gains(page, "Gains on text of the training mixture", mixture, forms)
    for index in tables_of(page, "CPU milliseconds a target"):
        page.shows(index, {
            name: [1e3 * mean(run["scores"][score]["seconds"] for run in runs)
                   / sum(runs[0]["targets_by_position"]) if score in runs[0]["scores"] else ""
                   for score in ("none", *forms, "mixture", *contexts)] for name, runs in rungs.items()})
    positions(page, "Gain of slots by position on the report text, nats a target", rungs)
    positions(page, "The same on text of the training mixture", mixture)
    for index in tables_of(page, "Ideas on the report text"):
        [runs] = ideas.values()
        size, scores = runs[0]["bytes_by_document"], runs[0]["scores"]
        seconds = {name: mean(run["scores"][name]["seconds"] for run in runs) for name in scores}
        page.shows(index, {
            name: [mean(run["scores"][name]["bpb"] for run in runs),
                   "" if name == "slots" else difference(bits(runs, "slots"), bits(runs, name), size),
                   seconds[name] / seconds["slots"]] for name in scores})
    for index in tables_of(page, "Chosen on tuning documents: rates, and how many were tried"):
        tried = {name: json.loads((p.root / KEPT / f"{name}_rates.json").read_text()) for name in rungs}
        page.shows(index, {name: [[float(min(rates[form], key=rates[form].get)), len(rates[form])]
                                  for form in forms] for name, rates in tried.items()})
    meta(page, arms)
    power_law(page, "Prediction from the report text, an extrapolation", rungs)
    power_law(page, "Prediction from text of the training mixture", mixture)
