"""Read finished runs from their logs, and check whether together they can be a record."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import check
from runfiles import read_object, read_result

SETTING = re.compile(r"(?m)^  ([A-Z]\w*)=(.*?)( \(given\))?$")
TEXT_TOLERANCE = 1e-3  # bpb; trainer and evaluator differ by far less on the same artifact, text and windows


class Refused(Exception):
    """Runs, or the folder made from them, that break rules; the arguments are the reasons."""


@dataclass
class Run:
    """A finished run: joined text of its logs, RESULT lines, settings as text (the evaluator's win).

    `evaluated` is empty if eval_ttt.py did not run.
    """

    path: Path
    facts: check.LogFacts
    log: str
    certificate: str
    trained: dict[str, Any]
    evaluated: dict[str, Any]
    settings: list[dict[str, str]]
    given: list[dict[str, str]]

    @property
    def seed(self) -> int:
        return self.trained["seed"]


def read_logs(path: Path, logs: Sequence[Path], certificate: Path) -> Run:
    """Return the run at `path`. Refused if `logs` are not those of a finished run of this repository."""
    facts = check.read_log(*logs)
    log = "\n".join(each.read_bytes().decode().rstrip("\n") for each in logs) + "\n"
    trained, evaluated = (
        next((result for result in facts.results if key in result), {})
        for key in ("train_seconds", "val_bpb_ttt")
    )
    parts = [SETTING.findall(part) for part in re.split(r"(?m)^RESULT .*\n", log)]
    settings = [{name.lower(): value for name, value, _ in part} for part in parts]
    given = [{name.lower(): value for name, value, mark in part if mark} for part in parts]
    said = (
        "seed",
        "world_size",
        "sha256_code",
        "versions",
        "sha256_artifact",
        "val_bpb_sliding",
        "val_bpb_roundtrip",
    )
    unsaid = [key for key in said if key not in trained]
    if evaluated:
        wanted = ("settings", "world_size", "sha256_artifact", "val_bpb_roundtrip", "ttt_gain_bpb")
        unsaid += [f"{key} of the evaluation" for key in wanted if key not in evaluated]
    if unsaid := unsaid + [key for key in ("vocab_size", "eval_seq_len") if key not in settings[0]]:
        raise Refused(f"{path}: its log does not report {', '.join(unsaid)}")
    text = certificate.read_text() if certificate.exists() else ""
    return Run(path, facts, log, text, trained, evaluated, settings, given)


def without_audit(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without the key that an audit fills in after the line was logged."""
    return {key: value for key, value in result.items() if key != "audit"}


def read_run(folder: Path) -> Run:
    """Read a run's files. Refused if they are not those of a finished run."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    evaluated = [name for name in ("eval_ttt.log", "eval_ttt.json") if any(folder.glob("eval_ttt.*"))]
    if missing := [
        n for n in ("train.log", "result.json", "source", *evaluated) if not (folder / n).exists()
    ]:
        raise Refused(f"{folder} is not a finished run: no {', '.join(missing)}")
    try:
        read = {"result.json": read_result(folder / "result.json")}
        read |= {name: read_object(folder / name) for name in evaluated[1:]}
        run = read_logs(
            folder, [folder / name for name in ("train.log", *evaluated[:1])], folder / "certificate.txt"
        )
    except ValueError as error:
        raise Refused(f"{folder}: {error}") from error
    logged = [without_audit(result) for result in run.facts.results]
    if other := [name for name, said in read.items() if without_audit(said) not in logged]:
        raise Refused(f"{folder}: no RESULT line of its logs matches {', '.join(other)}")
    return run


def own_faults(run: Run, track: str) -> list[str]:
    """Return the faults of one run: those that check.py finds, and scores of different texts."""
    record = check.read_record(run.path)
    record.claims = {"track": track}
    faults = [f"{v.rule}: {v.evidence}" for v in check.check(record) if v.status == "fail"]
    windows = str(run.evaluated.get("settings", {}).get("eval_seq_len"))
    key = "val_bpb_roundtrip"
    if (
        windows == run.settings[0]["eval_seq_len"]
        and abs(run.evaluated[key] - run.trained[key]) > TEXT_TOLERANCE
    ):
        shown = f"{run.trained[key]:.6f} and {run.evaluated[key]:.6f}"
        faults.append(f"log: trainer and evaluator scored different texts, {key} is {shown}")
    return [f"{run.path}: {fault}" for fault in dict.fromkeys(faults)]


def differences(runs: Sequence[Run], kind: str, what: Callable[[Run], Mapping[str, Any]]) -> list[str]:
    """Return how the values of `what` differ between the first run and the others, except per-run names."""
    found, first = [], what(runs[0])
    for run in runs[1:]:
        other = what(run)
        names = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))
        shown = [
            f"{k} {first.get(k)} and {other.get(k)}" for k in names if not check.OWN_SETTINGS.fullmatch(k)
        ]
        found += [f"{runs[0].path} and {run.path} differ in {kind}: {', '.join(shown)}"] if shown else []
    return found


def read_runs(folders: Sequence[Path], track: str) -> list[Run]:
    """Return the runs, sorted by seed. Refused with every reason why they cannot be a record."""
    reasons, runs = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
            reasons += own_faults(runs[-1], track)
        except Refused as refused:
            reasons += refused.args
    runs.sort(key=lambda run: run.seed)
    for before, run in pairwise(runs):
        if before.seed == run.seed:
            reasons.append(f"seed {run.seed} occurs twice: {before.path} and {run.path}")
    for digest in dict.fromkeys(run.trained["sha256_artifact"] for run in runs):
        same = [run for run in runs if run.trained["sha256_artifact"] == digest]
        if len({run.seed for run in same}) > 1:
            paths = ", ".join(str(run.path) for run in same)
            reasons.append(
                f"seeds {', '.join(str(run.seed) for run in same)} have the same artifact: {paths}"
            )
    if (distinct := len({run.seed for run in runs})) < check.MIN_SEEDS:
        reasons.append(f"{distinct} finished runs with distinct seeds; at least {check.MIN_SEEDS} are needed")
    if runs:
        reasons += differences(runs, "code", lambda run: run.trained["sha256_code"])
        reasons += differences(runs, "settings", lambda run: run.settings[0])
        reasons += differences(runs, "evaluation", lambda run: run.evaluated.get("settings", {}))
    if reasons:
        raise Refused(*reasons)
    return runs
