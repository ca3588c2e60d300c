"""Read finished runs from their logs, and check whether together they can be a record."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import check
from evidence import TEXT_LIMIT
from runfiles import read_object, read_result, read_text

SETTING = re.compile(r"(?m)^  ([A-Z]\w*)=(.*?)( \(given\))?$")
TRACKS = ("track_10min_16mb", "track_non_record_16mb")
TEXT_TOLERANCE = 1e-3  # bpb; trainer and evaluator differ by far less on the same artifact, text and windows


class Refused(Exception):
    """Runs, or the folder made from them, that break rules; the arguments are the reasons."""


@dataclass
class Run:
    """A finished run: joined text of its logs, RESULT lines, settings as text (trainer, evaluator).

    `evaluation` is the folder of the evaluation's files. `evaluated` is empty if eval_ttt.py did not run.
    """

    path: Path
    evaluation: Path
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


WANTED = {  # what the pages of a record are made of, by the place where a log reports it
    "trained": ("seed", "world_size", "sha256_code", "versions", "sha256_artifact", "val_bpb_sliding",
                "val_bpb_roundtrip"),
    "versions": ("python", "torch", "cuda", "numpy"),
    "evaluated": ("settings", "world_size", "sha256_artifact", "val_bpb_roundtrip", "ttt_gain_bpb"),
    "settings": ("vocab_size", "eval_seq_len"),
    "adaptation": ("ttt_mode", "ttt_protocol", "ppm_alpha"),
}  # fmt: skip
FACTS = ("steps", "step_avg_ms", "train_seconds", "eval_seconds", "bytes_code", "bytes_model", "bytes_total",
         "val_bpb", "val_loss")  # fmt: skip


def unreported(
    facts: check.LogFacts,
    trained: Mapping[str, Any],
    evaluated: Mapping[str, Any],
    settings: Mapping[str, str],
) -> list[str]:
    """Return what the logs of a run lack, or have of another type, of what a record needs."""
    told = dict(trained=trained, settings=settings, versions=check.object_of(trained, "versions"))
    lacking = []
    if evaluated:
        told |= dict(evaluated=evaluated, adaptation=settings | check.object_of(evaluated, "settings"))
    for place, found in told.items():
        ending = " of the evaluation" if place in ("evaluated", "adaptation") else ""
        lacking += [f"{key}{ending}" for key in WANTED[place] if key not in found]
    lacking += [key for key in FACTS if getattr(facts, key) is None and key not in lacking]
    alpha = str(told.get("adaptation", {}).get("ppm_alpha", 1))
    return lacking + [f"ppm_alpha as a number, not {alpha[:40]}"] * (not re.fullmatch(check.NUM, alpha))


def read_logs(path: Path, logs: Sequence[Path], certificate: Path) -> Run:
    """Return the run at `path`. Refused if `logs` are not those of a finished run of this repository."""
    facts = check.read_log(*logs)
    texts = [read_text(each, check.LOG_LIMIT).replace("\r\n", "\n").rstrip("\n") for each in logs]
    log = "\n".join(texts) + "\n"
    trained, evaluated = (
        next((result for result in facts.results if key in result), {})
        for key in ("train_seconds", "val_bpb_ttt")
    )
    parts = [SETTING.findall(part) for part in re.split(r"(?m)^RESULT .*\n", log)]
    settings = [{name.lower(): value for name, value, _ in part} for part in parts]
    given = [{name.lower(): value for name, value, mark in part if mark} for part in parts]
    if unsaid := unreported(facts, trained, evaluated, settings[0]):
        raise Refused(f"{path}: its log does not report {', '.join(unsaid)}")
    text = read_text(certificate, TEXT_LIMIT) if certificate.exists() else ""
    return Run(path, certificate.parent, facts, log, text, trained, evaluated, settings, given)


def read_run(folder: Path, mode: str = "") -> Run:
    """Read a run's files, with its evaluation in `mode` or the last legal one.

    Refused if they are not those of a finished run.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    try:
        own = check.evaluation_folder(folder, mode)
        paths = [folder / name for name in ("train.log", "result.json", "source")]
        if any(own.glob("eval_ttt.*")):
            paths += [own / "eval_ttt.log", own / "eval_ttt.json"]
        if missing := [str(path.relative_to(folder)) for path in paths if not path.exists()]:
            raise Refused(f"{folder} is not a finished run: no {', '.join(missing)}")
        read = {"result.json": read_result(folder / "result.json")}
        read |= {path.name: read_object(path) for path in paths if path.name == "eval_ttt.json"}
        logs = [path for path in paths if path.suffix == ".log"]
        run = read_logs(folder, logs, own / "certificate.txt")
    except ValueError as error:
        told = str(error)
        raise Refused(told if str(folder) in told else f"{folder}: {told}") from error
    logged = [check.without_audit(result) for result in run.facts.results]
    if other := [name for name, said in read.items() if check.without_audit(said) not in logged]:
        raise Refused(f"{folder}: no RESULT line of its logs matches {', '.join(other)}")
    return run


def own_faults(run: Run, track: str, mode: str = "") -> list[str]:
    """Return the faults of one run: those that check.py finds, and scores of different texts."""
    record = check.read_record(run.path, mode)
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
    packed = run.trained.get("bytes_total_packed")
    if run.facts.bytes_total > check.SIZE_CAP and check.is_number(packed) and packed <= check.SIZE_CAP:
        faults.append(
            f"sizes: packed it would be {packed} bytes. Train with the packed programs, see records/pack.py."
        )
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


def validation_text(run: Run) -> dict[str, Any]:
    """Return what identifies the text that a run was scored on, as far as its logs tell."""
    shards = run.evaluated.get("sha256_shards", {})
    return dict(shards, tokenizer=run.trained.get("sha256_tokenizer"), targets=run.facts.val_tokens)


def read_runs(folders: Sequence[Path], track: str = "", mode: str = "") -> tuple[list[Run], str]:
    """Return the runs, sorted by seed, and their track. Refused with every reason against a record.

    Without a given track, runs that are not of the challenge go to the other track.
    """
    reasons, runs = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder, mode))
        except Refused as refused:
            reasons += refused.args
    foreign = check.deviations([run.facts for run in runs])
    if track == TRACKS[0]:
        reasons += [f"not a challenge run: {told}. Leave out --track {track}." for told in foreign]
    track = track or TRACKS[bool(foreign)]
    for run in runs:
        reasons += own_faults(run, track, mode)
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
        reasons += differences(runs, "text", validation_text)
        reasons += differences(runs, "evaluation", lambda run: run.evaluated.get("settings", {}))
    if reasons:
        raise Refused(*reasons)
    return runs, track
