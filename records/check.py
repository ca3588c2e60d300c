"""Check a record folder, a run or a log against the contest rules, using only its files.

    python records/check.py records/track_10min_16mb/2026-12-01_Name [--against FOLDER] [--json]
    python records/check.py runs/NAME [--mode MODE] [--data FOLDER --tokenizer FILE] [--verbose]
    python records/check.py train_seed42.log

Every number is recomputed: steps, times, sizes, scores, seeds, tokens per byte, significance. Each rule
reports pass, warn or fail with the line or file that supports it; passes are listed with --verbose. Of a run
that was evaluated in several modes, the last legal evaluation counts, or that of --mode. If nll.npy exists,
val_loss is recomputed from it. If shards and tokenizer are available too, by the log's paths inside this
repository or by the options, so is val_bpb. A record in track_10min_16mb must be of the challenge: its
validation text, 8 x H100, its time limits; elsewhere a record of other runs passes with a warning. Exit
codes: 0 passed (warnings allowed), 1 failed, 2 user error.
"""

from __future__ import annotations

import argparse
import ast
import base64
import bz2
import hashlib
import json
import lzma
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import Any, NamedTuple

import zstandard
from evidence import check_certificates, check_losses, evaluation, object_of, trained_on_validation
from runfiles import escape, read_object, sha256_file
from scipy import stats
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from formats import ARTIFACT_MAGIC, CHALLENGE_BYTES, PUBLISHED, SIZE_CAP, TEXT_BYTES, Published

TIME_LIMIT = 600.0  # seconds, for training and for evaluation
SHORTEST = 60.0  # seconds; a training below this tests the programs
GPUS, GPU = 8, "H100"  # of the challenge
MARGIN_NATS = 0.005  # gain required of a record, nats per token
P_WRITTEN, P_APPLIED = 0.01, 0.25  # p of the written rule; p that the maintainers accepted from 2026-04-28
MIN_SEEDS = 3
LEAKY_SHARDS = 1499  # of an export with 10,000 validation documents that trains on the other 40,000
VAL_DOCUMENTS = 50_000
RATIO_TOLERANCE = 2e-4  # relative; dropping a partial last window changes tokens per byte by up to 1e-4
EXPORT_TOLERANCE = 0.02  # relative; token counts of other exports of all documents differ by less
TAIL_TOKENS = 8192  # more than dropping a partial last window loses
UNPACK_LIMIT = 1 << 28  # bytes read from a compressed file

# ------------------------------------------------------------------------------------------------------------
# Reading a log
# ------------------------------------------------------------------------------------------------------------

NUM = r"(?:[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf)"
INT = r"\d[\d,]*"
AT_STEP = r"(?:step:)?(?P<steps>\d+)/\d+ "
LINES = tuple(  # of all log formats, anchored to the start of a line; the last matching line counts
    (where, re.compile(pattern))
    for where, pattern in (
        # anywhere: settings precede model_params in some formats and follow it in others
        ("any", r" *seed: ?(?P<seed>\d+)$"),
        ("any", r"(?:train_loader:dataset:(?P<dataset>\S+) )? *train_shards: ?(?P<train_shards>\d+)"),
        ("any", r"val_loader:\S* pattern=\S+ tokens:(?P<val_tokens>\d+)"),
        ("any", r" *val_tokens: ?(?P<val_tokens>\d+)"),
        ("any", r"evaluation order: .*targets:(?P<val_tokens>\d+)"),
        ("any", r"(?:val_bpb:enabled \S+ | *)tokenizer_path[=:] ?(?P<tokenizer>[^\s\"'(]+)$"),
        ("any", r"model_params: ?(?P<model_params>\d+)"),
        # only after model_params: before it a log may contain the program's source
        ("body", rf"{AT_STEP}(?:train_)?loss: ?{NUM}(?: \S+)*? (?:train_time|t): ?(?P<train_ms>{NUM})ms"),
        (
            "body",
            rf"{AT_STEP}(?:train_)?loss: ?{NUM} train_time: ?(?P<train_minutes>{NUM})m\b",
        ),  # from #1218 on
        ("body", rf"{AT_STEP}val_loss: ?{NUM} val_bpb: ?{NUM}(?: train_time: ?(?P<train_ms>{NUM})ms)?"),
        (
            "body",
            rf"stopping_early: ?(?P<stopped>\w+) train_time: ?(?P<train_ms>{NUM})ms step: "
            r"?(?P<steps>\d+)/\d+",
        ),
        ("body", rf"Code size(?: \(uncompressed\))?: (?P<bytes_source>{INT}) bytes"),
        ("body", rf"Code size \(compressed\): (?P<bytes_packed>{INT}) bytes"),
        ("body", rf"Serialized model [^:]+: (?P<bytes_model>{INT}) bytes"),
        ("body", rf"Total submission size [^:]+: (?P<bytes_total>{INT}) bytes"),
        ("body", rf"artifact:\S+ .*\bcode:(?P<bytes_source>{INT})"),  # ternary
        ("body", rf"budget:(?P<bytes_total>{INT})/\d+"),  # ternary
        ("body", rf"GPTQ:collected \d+ Hessians in (?P<hessian_seconds>{NUM})s"),
        ("body", rf"ttt_lora:compile warmup done \((?P<compile_seconds>{NUM})s\)"),
        ("body", rf"total_eval_time: ?(?P<total_eval_seconds>{NUM})s"),
        ("body", r"ttt_phased: total_docs:(?P<val_documents>\d+)"),
    )
)
SCORE_LINE = re.compile(
    rf"(?P<label>[A-Za-z][\w +.-]*?)(?: stride:\d+)? val_loss: ?(?P<loss>{NUM}) val_bpb: ?(?P<bpb>{NUM})"
    rf"(?: stride:\d+)?(?: eval_time: ?(?P<ms>{NUM})ms| time: ?(?P<s>{NUM})s)?"
)
STAMP = re.compile(r"(?:\[[^\]]*\]:? ?|\d+\.\d+ |\d{4}-\d\d-\d\d[T ][\d:.,]+Z? )*")  # rank, time
SETTING = re.compile(r" +(?P<key>\w+)(?:=|: )(?P<value>.*?)(?: \(given\))?$")  # ours, from #1218 on
PAIRS = re.compile(r"\w+:\S+(?: \w+:\S+)*$")  # the baseline's settings: name:value pairs on a few lines
# per-run settings
OWN_SETTINGS = re.compile(r"seed|rank|run_id|warmup_step|.*(path|dir|file|files)", re.IGNORECASE)
IN_MEMORY = re.compile(r"pre.?quant|post.?ema", re.IGNORECASE)  # scores of weights other than the artifact's
NO_RESULT = re.compile(r"diagnostic|" + IN_MEMORY.pattern, re.IGNORECASE)
RESULT_SCORES = (
    ("ttt", "legal_ttt"),
    ("sliding", "final_int6_sliding_window"),
    ("roundtrip", "final_int6_roundtrip"),
)
COUNTS = ("seed", "steps", "model_params", "bytes_source", "bytes_code", "bytes_model", "bytes_total",
          "train_shards", "val_tokens", "val_documents")  # fmt: skip


@dataclass
class Score:
    """One evaluation: nats per token, bits per byte, seconds (None: not logged), printed decimals."""

    label: str
    val_loss: float
    val_bpb: float
    seconds: float | None
    decimals: int
    line: str

    @property
    def tokens_per_byte(self) -> float:
        return self.val_bpb * math.log(2) / self.val_loss if self.val_loss else math.nan


@dataclass
class LogFacts:
    """Facts from the logs of one training run and its evaluator; None if the logs lack a fact.

    `train_seconds` is the contest clock: from RESULT, else from the training loop. `eval_seconds` is the pass
    of the headline score, `eval_all_seconds` includes all passes over the artifact and compilation.
    `bytes_code` is the code as counted, `bytes_source` before packing. `evidence` has the line of each fact,
    `conflicts` the contradictions.
    """

    paths: list[Path]
    seed: int | None = None
    steps: int | None = None
    step_avg_ms: float | None = None
    train_seconds: float | None = None
    hessian_seconds: float | None = None
    eval_seconds: float | None = None
    eval_all_seconds: float | None = None
    bytes_source: int | None = None
    bytes_code: int | None = None
    bytes_model: int | None = None
    bytes_total: int | None = None
    model_params: int | None = None
    train_shards: int | None = None
    val_tokens: int | None = None
    val_documents: int | None = None
    tokenizer: str | None = None
    dataset: str | None = None
    stopped: str | None = None
    headline: Score | None = None
    scores: list[Score] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    source_sha256: list[str] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return " + ".join(path.name for path in self.paths)

    @property
    def val_bpb(self) -> float | None:
        return self.headline.val_bpb if self.headline else None

    @property
    def val_loss(self) -> float | None:
        return self.headline.val_loss if self.headline else None

    def cite(self, key: str) -> str:
        """Return the line that supports a fact."""
        return self.evidence.get(key) or f"{self.name}: RESULT {key}"


def read_log(path: str | Path, *more: str | Path) -> LogFacts:
    """Read a log, with `more` the other logs of the same training run. ValueError if one cannot be read."""
    facts, found = LogFacts([Path(path), *map(Path, more)]), {}
    for each in facts.paths:
        try:
            text = each.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            raise ValueError(f"{each}: {error.strerror}") from error
        read_text(text, each.name, facts, found)
    facts.result = fold_results(facts)
    counted = "bytes_packed" if "bytes_packed" in found else "bytes_source"
    found["bytes_code"], facts.evidence["bytes_code"] = found.get(counted), facts.evidence.get(counted, "")
    if "train_minutes" in found and "stopped" not in found:
        found["train_ms"] = 60_000 * found["train_minutes"]
    loop_ms = found.get("train_ms")
    for key in COUNTS:
        value = facts.result.get(key, found.get(key))
        setattr(facts, key, None if value is None else int(value))
    facts.stopped, facts.tokenizer = found.get("stopped"), found.get("tokenizer")
    facts.dataset = found.get("dataset")
    facts.hessian_seconds = found.get("hessian_seconds")
    facts.train_seconds = facts.result.get("train_seconds", loop_ms / 1000 if loop_ms else None)
    facts.step_avg_ms = facts.result.get(
        "step_avg_ms", loop_ms / facts.steps if loop_ms and facts.steps else None
    )
    if facts.bytes_total is None and None not in (facts.bytes_code, facts.bytes_model):
        facts.bytes_total = facts.bytes_code + facts.bytes_model
    elif facts.bytes_model is None and None not in (facts.bytes_code, facts.bytes_total):
        facts.bytes_model = facts.bytes_total - facts.bytes_code
    choose_headline(facts, found)
    facts.conflicts += contradictions(facts, found)
    return facts


def read_text(text: str, name: str, facts: LogFacts, found: dict[str, Any]) -> None:
    """Collect the facts of one log; of a line overwritten by a progress bar, only the final text counts."""
    lines = [STAMP.sub("", line.rstrip().rpartition("\r")[2], count=1) for line in text.split("\n")]
    start = next((i for i, line in enumerate(lines) if re.match(r"model_params: ?\d", line)), 0)
    for index, line in enumerate(lines):
        body, cited = index >= start, f"{name}:{index + 1}: {line.strip()[:140]}"
        if line.startswith("RESULT {"):
            try:
                facts.results.append(json.loads(line.removeprefix("RESULT ")))
            except ValueError:
                facts.conflicts.append(f"{cited}: not JSON, so truncated or altered")
        elif body and (scored := SCORE_LINE.match(line)):
            add_score(facts.scores, scored, cited)
        else:
            for where, pattern in LINES:
                if (body or where == "any") and (match := pattern.match(line)):
                    told = {key: value for key, value in match.groupdict().items() if value is not None}
                    if told.get("seed", found.get("seed")) != found.get("seed", told.get("seed")):
                        facts.conflicts.append(f"two seeds in one log: {facts.cite('seed')}; {cited}")
                    found |= {
                        k: v if k in ("tokenizer", "stopped", "seed", "dataset") else number(v)
                        for k, v in told.items()
                    }
                    facts.evidence |= dict.fromkeys(told, cited)
        if "steps" not in found and (match := SETTING.match(line)):
            facts.settings[match["key"].lower()] = match["value"]
        elif "steps" not in found and body and PAIRS.match(line):
            facts.settings |= dict(pair.split(":", 1) for pair in line.split(" "))
    blocks = re.split(r"(?m)^={20,}$", "\n".join(lines))  # the baseline prints its program between rulers
    programs = (b for b in blocks if b.count("\n") > 50 and re.search(r"(?m)^(import|from) \w", b))
    facts.source_sha256 += [hashlib.sha256(program.strip().encode()).hexdigest() for program in programs]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def add_score(scores: list[Score], match: re.Match, cited: str) -> None:
    """Append a score, or merge it with the same evaluation printed earlier with other digits."""
    seconds = number(match["ms"]) / 1000 if match["ms"] else number(match["s"]) if match["s"] else None
    decimals = len(match["bpb"].partition(".")[2])
    new = Score(match["label"].strip(), number(match["loss"]), number(match["bpb"]), seconds, decimals, cited)
    for index, old in enumerate(scores):
        apart = max(abs(old.val_loss - new.val_loss), abs(old.val_bpb - new.val_bpb))
        same = old.label.removesuffix("_exact") == new.label.removesuffix("_exact")
        if same and apart < 0.51 * 10.0 ** -min(old.decimals, new.decimals):
            better = max(old, new, key=lambda score: score.decimals)
            scores[index] = replace(better, seconds=old.seconds if seconds is None else seconds)
            return
    scores.append(new)


def fold_results(facts: LogFacts) -> dict[str, Any]:
    """Merge the evaluator's RESULT into the trainer's; a lone evaluator's RESULT contains the trainer's."""
    for result in facts.results:
        broken = [
            k for k in (*COUNTS, "train_seconds", "eval_seconds") if k in result and not is_number(result[k])
        ]
        facts.conflicts += [f"{facts.name}: RESULT has {key} {result.pop(key)!r}" for key in broken]
    trained = next((r for r in reversed(facts.results) if "train_seconds" in r), None)
    evaluated = next((r for r in reversed(facts.results) if "val_bpb_ttt" in r), None)
    if evaluated is None:
        return dict(trained or {})
    trained = trained or evaluated.get("trainer") or {}
    if trained.get("sha256_artifact", evaluated.get("sha256_artifact")) != evaluated.get("sha256_artifact"):
        facts.conflicts.append(
            f"{facts.name}: the evaluator scored another artifact than the trainer wrote (sha256_artifact)"
        )
    kept = re.compile("val_|bytes_|eval_seconds|sha256_artifact")
    legal = bool(evaluated.get("legal") and trained.get("legal", True))
    return trained | {key: value for key, value in evaluated.items() if kept.match(key)} | dict(legal=legal)


def choose_headline(facts: LogFacts, found: Mapping[str, Any]) -> None:
    """Choose the last score of the artifact; a label with the values of an earlier one is its alias."""
    for name, label in RESULT_SCORES:
        loss, bpb = facts.result.get(f"val_loss_{name}"), facts.result.get(f"val_bpb_{name}")
        if not facts.scores and loss is not None and bpb is not None:
            facts.scores = [Score(label, loss, bpb, None, 16, f"{facts.name}: RESULT val_bpb_{name}")]
    first: dict[tuple[float, float], Score] = {}
    for score in facts.scores:
        if not NO_RESULT.search(score.label):
            facts.headline = first.setdefault((score.val_loss, score.val_bpb), score)
            if facts.headline is not score:
                facts.aliases[score.label] = facts.headline.label
    if "eval_seconds" in facts.result:
        facts.eval_seconds = facts.eval_all_seconds = facts.result["eval_seconds"]
        return
    facts.eval_seconds = facts.headline.seconds if facts.headline else None
    if facts.eval_seconds is None:
        facts.eval_seconds = found.get("total_eval_seconds")
    if facts.eval_seconds is not None:
        passes = (score.seconds or 0.0 for score in facts.scores if not IN_MEMORY.search(score.label))
        facts.eval_all_seconds = max(facts.eval_seconds, sum(passes) + found.get("compile_seconds", 0.0))


def contradictions(facts: LogFacts, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences between the RESULT line and other lines of the log."""
    result, name = facts.result, facts.name
    for key in ("seed", "model_params", "bytes_code", "bytes_model", "bytes_total"):
        if key in result and found.get(key) is not None and result[key] != int(found[key]):
            yield f"{name}: RESULT has {key} {result[key]}, but {facts.cite(key)}"
    if found.get("steps", 0) > result.get("steps", math.inf):
        yield f"{name}: RESULT has steps {result['steps']}, but {facts.cite('steps')}"
    if found.get("train_ms", 0) / 1000 > result.get("train_seconds", math.inf) + 0.5:
        yield f"{name}: RESULT has train_seconds {result['train_seconds']:.3f}, but {facts.cite('train_ms')}"
    for key, label in (*RESULT_SCORES, ("ttt", "invalid_ttt")):
        for unit in ("val_bpb", "val_loss"):
            told = result.get(f"{unit}_{key}")
            for score in facts.scores if told is not None else ():
                if score.label == f"{label}_exact" and abs(told - getattr(score, unit)) > 1e-7:
                    yield f"{name}: RESULT has {unit}_{key} {told:.8f}, but {score.line}"


# ------------------------------------------------------------------------------------------------------------
# Reading a record
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """A record folder, a run of this repository, or a single log.

    `claims` is submission.json with floats as Decimal.
    """

    path: Path
    kind: str  # "folder", "run" or "log"
    runs: list[LogFacts] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    claims: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    readme: str = ""
    files: list[Path] = field(default_factory=list)
    code: list[Path] = field(default_factory=list)
    artifacts: list[Path] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    data: Path | None = None
    tokenizer: Path | None = None

    def values(self, fact: str) -> list[Any]:
        """Return the finite values of a fact, in the order of the runs."""
        return [
            value for run in self.runs if (value := getattr(run, fact)) is not None and math.isfinite(value)
        ]


def without_audit(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without the key that an audit fills in after the line was logged."""
    return {key: value for key, value in result.items() if key != "audit"}


def evaluation_folder(run: Path, mode: str = "") -> Path:
    """Return the folder with a run's evaluation: eval/MODE, or the last legal one, or the run's own.

    The last legal evaluation is the one whose eval_ttt.json stands in the run's folder too; without that,
    whatever else was begun. Older runs have a single evaluation, with all its files in the run's folder.
    ValueError if there is none of that mode.
    """
    found = {path.parent.name: path.parent for path in sorted(run.glob("eval/*/eval_ttt.log"))}
    last = run / "eval_ttt.json"
    result = without_audit(read_object(last)) if last.exists() else {}
    own = object_of(result, "settings").get("ttt_mode")
    if mode and mode not in found and (mode != own or not (run / "eval_ttt.log").exists()):
        there = ", ".join(found) or own or "none"
        raise ValueError(f"{run}: no evaluation {mode}. There is: {there}.")
    if mode:
        return found.get(mode, run)
    copies = ((folder, folder / "eval_ttt.json") for folder in found.values())
    same = (f for f, path in copies if path.exists() and without_audit(read_object(path)) == result)
    return next(same, run if result else next(iter(found.values()), run))


def read_record(path: str | Path, mode: str = "") -> Record:
    """Read a record folder, a run folder with its evaluation in `mode`, or a log.

    ValueError if `path` is none of these.
    """
    path = Path(path)
    if path.is_file():
        return Record(path, "log", [read_log(path)])
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file())
    is_run = (path / "train.log").exists() and bool({"config.json", "result.json"} & {p.name for p in files})
    record = Record(path, "run" if is_run else "folder")
    record.code = [p for p in files if p.suffix == ".py"]
    record.artifacts = [p for p in files if p.suffix == ".ptz"]
    record.files = files
    record.manifest = (
        read_claims(path / "manifest.json", record.problems) if (path / "manifest.json").exists() else {}
    )
    if is_run:
        evaluated = evaluation_folder(path, mode)
        logs = [path / "train.log", evaluated / "eval_ttt.log"]
        record.runs = [read_log(*(log for log in logs if log.exists()))]
        others = path / "eval"
        record.files = [f for f in files if not f.is_relative_to(others) or f.is_relative_to(evaluated)]
        return record
    not_logs = re.compile(r"requirements|certificate|readme|license", re.IGNORECASE)
    for run in gather_runs(p for p in files if p.suffix in (".log", ".txt") and not not_logs.match(p.name)):
        same = [r for r in record.runs if run.headline and (r.seed, r.val_bpb) == (run.seed, run.val_bpb)]
        record.copies += [f"{run.name} repeats {twin.name}: seed {run.seed}" for twin in same]
        record.runs += [] if same else [run]
    named = sorted(path.glob("submission*.json"), key=lambda p: p.name != "submission.json")
    record.claims = read_claims(named[0], record.problems) if named else {}
    record.readme = "\n".join(p.read_text(errors="replace") for p in files if p.name.lower() == "readme.md")
    return record


def read_claims(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return the JSON object of a file; if there is none, append a problem and return an empty object."""
    try:
        return read_object(path, decimals=True)
    except ValueError as error:
        problems.append(str(error))
        return {}


def gather_runs(paths: Iterable[Path]) -> list[LogFacts]:
    """Return one LogFacts per training run: evaluator logs join the trainer log of their artifact or seed."""
    logs = [log for log in map(read_log, paths) if log.paths[0].suffix == ".log" or log.scores or log.steps]
    runs = [log for log in logs if "steps" in log.evidence or not log.scores]
    for log in [log for log in logs if "steps" not in log.evidence and log.scores]:
        key, seeds = log.result.get("sha256_artifact"), {log.seed, file_seed(log)} - {None}
        waiting = [r for r in runs if "val_bpb_ttt" not in r.result]
        same = [r for r in waiting if key and r.result.get("sha256_artifact") == key]
        same = same or [r for r in waiting if r.seed in seeds and not r.result.get("sha256_artifact")]
        if same:
            runs[runs.index(same[0])] = read_log(*same[0].paths, *log.paths)
        else:
            runs.append(log)
    return runs


def file_seed(log: LogFacts) -> int | None:
    match = re.search(r"seed[_-]?(\d+)", log.paths[0].name)
    return int(match[1]) if match else None


# ------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------


class Test(NamedTuple):
    """Result of a one-sided test that the new scores are lower."""

    name: str
    t: float
    df: float
    p: float

    def __str__(self) -> str:
        return f"{self.name} t={self.t:.2f} df={self.df:.2f} p={self.p:.2g}"


def welch(new: Sequence[float], old: Sequence[float]) -> Test:
    """Run Welch's t-test on two samples, in any unit."""
    result = stats.ttest_ind(new, old, equal_var=False, alternative="less")
    return Test("Welch", float(result.statistic), float(result.df), float(result.pvalue))


def paired(new: Mapping[int, float], old: Mapping[int, float]) -> Test:
    """Run a paired t-test on the seeds that both have."""
    seeds = sorted(new.keys() & old.keys())
    result = stats.ttest_rel([new[s] for s in seeds], [old[s] for s in seeds], alternative="less")
    return Test(
        f"{len(seeds)} pairs of seeds", float(result.statistic), float(result.df), float(result.pvalue)
    )


def one_sample(scores: Sequence[float], threshold: float) -> Test:
    """Run a one-sample t-test against a threshold in the same unit."""
    result = stats.ttest_1samp(scores, threshold, alternative="less")
    return Test(f"against {threshold:.5f}", float(result.statistic), float(result.df), float(result.pvalue))


def compare(new: Record, old: Record) -> tuple[float, float, list[Test]]:
    """Return the gain of `new` over `old` in nats per token and in bpb, and tests of the bpb.

    The tests are Welch's, one-sample against the mean of `old` less the margin, and paired if both share at
    least two seeds. ValueError if either record has fewer than two scores, or if the texts differ.
    """
    ours, theirs = new.values("val_bpb"), old.values("val_bpb")
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(
            f"{new.path.name} and {old.path.name} need at least two scores each for a comparison"
        )
    require_same_text(new, old)
    gain, factor = mean(theirs) - mean(ours), nats_per_bpb(new)
    seeds = [{run.seed: run.val_bpb for run in record.runs if run.headline} for record in (new, old)]
    pairs = [paired(*seeds)] if len(seeds[0].keys() & seeds[1].keys()) > 1 else []
    return (
        gain * factor,
        gain,
        [welch(ours, theirs), one_sample(ours, mean(theirs) - MARGIN_NATS / factor), *pairs],
    )


def text_bytes(run: LogFacts) -> tuple[float, float] | None:
    """Return the bytes of a run's validation text and their relative error; None if the log lacks them."""
    score = run.headline
    if not run.val_tokens or not score or not all(0 < v < math.inf for v in (score.val_loss, score.val_bpb)):
        return None
    rounding = 10.0**-score.decimals * (1 / score.val_bpb + 1 / score.val_loss)
    return run.val_tokens / score.tokens_per_byte, RATIO_TOLERANCE + rounding


def require_same_text(new: Record, old: Record) -> None:
    """Raise ValueError unless two records were scored on the same text, under whatever tokenizers.

    That is judged by the bytes of the text and, under one tokenizer, by the hashes of the shards.
    """
    sides = []
    for record in (new, old):
        runs = [run for run in record.runs if run.headline]
        if not runs or not (count := text_bytes(runs[0])):
            raise ValueError(f"{record.path.name}: no log reports the validation tokens of its score")
        told = evaluation(runs[0])
        sides.append((*count, told.get("sha256_tokenizer"), object_of(told, "sha256_shards")))
    (ours, error, tokenizer, shards), (theirs, other_error, other_tokenizer, other_shards) = sides
    hashed = tokenizer == other_tokenizer and shards and other_shards
    if abs(ours / theirs - 1) > error + other_error or (hashed and shards != other_shards):
        told = f"{ours:,.0f} and {theirs:,.0f} bytes" + (", other shards" if hashed else "")
        raise ValueError(
            f"{new.path.name} and {old.path.name} were scored on different validation texts: {told}. "
            "Their scores cannot be compared."
        )


def nats_per_bpb(record: Record) -> float:
    """Return the nats per token of one bit per byte, from a record's own scores."""
    return math.log(2) / mean(run.headline.tokens_per_byte for run in record.runs if run.headline)


# ------------------------------------------------------------------------------------------------------------
# Rules on files and claims
# ------------------------------------------------------------------------------------------------------------

Finding = tuple[str, str]  # "pass", "warn" or "fail", and the evidence for it
REQUIRED_KEYS = {"name": str, "author": str, "github_id": str, "date": str, "val_bpb": (int, Decimal)}
USUAL_KEYS = ("blurb", "bytes_total", "track", "seeds", "val_loss")
SCORE_DECIMALS = {"val_bpb": 4, "val_loss": 4}  # a score with fewer digits counts as exact
SEED_CLAIMS = (  # key of a seed's entry in submission.json, fact, factor, tolerance beyond the given digits
    ("val_bpb", "val_bpb", 1, 0),
    ("val_loss", "val_loss", 1, 0),
    ("artifact_bytes", "bytes_total", 1, 0),
    ("bytes_total", "bytes_total", 1, 0),
    ("steps", "steps", 1, 0),
    ("step_avg_ms", "step_avg_ms", 1, 0),
    ("train_time_s", "train_seconds", 1, 0.05),
    ("train_time_ms", "train_seconds", 1000, 50),
    ("eval_time_s", "eval_seconds", 1, 0.05),
    ("eval_time_ms", "eval_seconds", 1000, 50),
    ("ttt_time_ms", "eval_seconds", 1000, 50),
)
MEAN_CLAIMS = (  # key of submission.json, fact, function of the seeds' values
    ("val_bpb", "val_bpb", mean),
    ("val_loss", "val_loss", mean),
    ("val_bpb_std", "val_bpb", stdev),
    ("val_loss_std", "val_loss", stdev),
    ("bytes_code", "bytes_code", max),
    ("bytes_total", "bytes_total", max),
    ("artifact_bytes_max", "bytes_total", max),
    ("artifact_bytes_mean", "bytes_total", mean),
    ("train_steps_mean", "steps", mean),
    ("step_avg_ms_mean", "step_avg_ms", mean),
    ("train_time_s_mean", "train_seconds", mean),
    ("eval_time_s_mean", "eval_seconds", mean),
)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)


def agrees(claim: Any, value: float, slack: float = 0.0, decimals: int = 0) -> bool:
    """Return whether a claim is `value` rounded to the claim's digits, or to `decimals` if that is more."""
    digits = claim.as_tuple().exponent if isinstance(claim, Decimal) else 0
    return abs(float(claim) - value) <= 0.501 * 10.0 ** min(digits, -decimals) + slack


def seed_claims(record: Record) -> dict[int, dict[str, Any]]:
    """Return the per-seed entries of submission.json."""
    for entries in (record.claims.get("seed_results"), record.claims.get("seeds")):
        if isinstance(entries, dict):
            return {int(k): v for k, v in entries.items() if k.isdigit() and isinstance(v, dict)}
    return {}


def claimed_seeds(record: Record) -> list[int]:
    seeds = record.claims.get("seeds")
    return (
        [seed for seed in seeds if isinstance(seed, int)]
        if isinstance(seeds, list)
        else list(seed_claims(record))
    )


def check_files(record: Record) -> Iterator[Finding]:
    names, folder = {p.name for p in record.path.iterdir()}, record.path.resolve().name
    for name in ("README.md", "submission.json", "train_gpt.py"):
        if name not in names:
            yield "fail", f"{folder}/ has no {name}"
    if not record.runs:
        yield "fail", f"no training log in {folder}/"
    if not re.fullmatch(r"\d{4}-(0\d|1[0-2])-([0-2]\d|3[01])_.+", folder):
        yield "fail", f"the folder name {folder} does not have the form YYYY-MM-DD_Description"
    elif re.search(r"[^\w.+,=-]", folder):
        yield "warn", f"the folder name {folder!r} contains spaces or special characters"
    yield "pass", ", ".join(sorted(names))


def check_json(record: Record) -> Iterator[Finding]:
    yield from (("fail", problem) for problem in record.problems)
    for key, kind in REQUIRED_KEYS.items():
        if not isinstance(record.claims.get(key), kind) or isinstance(record.claims[key], bool):
            yield "fail", f"submission.json: {key} is {record.claims.get(key, 'missing')}"
    if not re.match(r"\d{4}-\d\d-\d\d", str(record.claims.get("date", "2026-01-01"))):
        yield "fail", f"submission.json: date {record.claims['date']} is not an ISO date"
    if missing := [key for key in USUAL_KEYS if key not in record.claims]:
        yield "warn", f"submission.json lacks usual keys: {', '.join(missing)}"
    yield "pass", f"submission.json: {len(record.claims)} keys"


def check_claims(record: Record) -> Iterator[Finding]:
    """Check each number of submission.json against the logs, rounded to its digits."""
    if record.claims.get("challenge_run") is True and (found := deviations(record.runs)):
        yield "fail", f"challenge_run is true in submission.json, but the logs show: {'; '.join(found)}"
    claims, entries, by_seed = record.claims, seed_claims(record), {run.seed: run for run in record.runs}
    for seed, entry in entries.items():
        for key, fact, factor, slack in SEED_CLAIMS:
            value, digits = getattr(by_seed.get(seed), fact, None), SCORE_DECIMALS.get(key, 0)
            if value is None or not is_number(entry.get(key)):
                continue
            if not agrees(entry[key], factor * value, slack, digits):
                told = f"{entry[key]} in submission.json, {factor * value:.10g} in {by_seed[seed].name}"
                yield "fail", f"seed {seed}: {key} is {told}"
    for key, fact, combine in MEAN_CLAIMS:
        keys = [name for name, its, factor, _ in SEED_CLAIMS if its == fact and factor == 1]
        unlogged = [
            next((e[k] for k in keys if is_number(e.get(k))), None)
            for s, e in entries.items()
            if s not in by_seed
        ]
        values = record.values(fact) + [float(value) for value in unlogged if value is not None]
        if is_number(claims.get(key)) and len(values) > (combine is stdev):
            lost = [seed for seed in claimed_seeds(record) if seed not in by_seed]
            yield compare_claim(key, claims[key], values, combine, lost)


def compare_claim(key: str, claim: Any, values: list[float], combine: Callable, lost: list[int]) -> Finding:
    derived, decimals = (
        f"{combine.__name__} {combine(values):.10g} of {len(values)}",
        SCORE_DECIMALS.get(key, 0),
    )
    if agrees(claim, combine(values), 0, decimals) or (key == "bytes_total" and agrees(claim, mean(values))):
        return "pass", f"{key} {claim}: logs give {derived}"
    if combine is stdev and agrees(claim, pstdev(values)):
        return (
            "warn",
            f"{key} {claim} is the population standard deviation; the sample one is {stdev(values):.6f}",
        )
    if lost:
        return (
            "warn",
            f"{key} {claim} cannot be recomputed: seeds {lost} have no log; the others give {derived}",
        )
    if combine is not stdev and any(agrees(claim, value, 0, decimals) for value in values):
        return "warn", f"{key} {claim} is the value of a single seed; logs give {derived}"
    return "fail", f"{key} is {claim} in submission.json; logs give {derived}"


def check_seeds(record: Record) -> Iterator[Finding]:
    runs, claimed = record.runs, claimed_seeds(record)
    seeds = sorted({run.seed for run in runs} - {None})
    if len(seeds) < MIN_SEEDS:
        yield "fail", f"{len(seeds)} distinct seeds in the logs, at least {MIN_SEEDS} are required: {seeds}"
    for seed, count in Counter(run.seed for run in runs).items():
        if count > 1:
            names = ", ".join(run.name for run in runs if run.seed == seed)
            yield "fail", f"seed {seed} occurs twice, with different scores: {names}"
    for bpb, count in Counter(record.values("val_bpb")).items():
        if count > 1:
            names = ", ".join(run.name for run in runs if run.val_bpb == bpb)
            yield "fail", f"several seeds have the same score {bpb:.8f}, so one is a copy: {names}"
    for run in runs:
        if file_seed(run) not in (None, run.seed):
            yield "fail", f"{run.name} is named for seed {file_seed(run)}, but {run.cite('seed')}"
    yield from (("warn", copy) for copy in record.copies)
    if len(set(claimed)) < len(claimed):
        yield "fail", f"submission.json lists a seed twice: {claimed}"
    if lost := sorted(set(claimed) - set(seeds)):
        yield "fail", f"submission.json lists seeds {lost}, but the logs have {seeds}"
    if claimed and (more := sorted(set(seeds) - set(claimed))):
        yield "warn", f"submission.json omits seeds {more} that have logs: were the best seeds selected?"
    yield "pass", f"seeds {seeds}"


# ------------------------------------------------------------------------------------------------------------
# Rules on logs
# ------------------------------------------------------------------------------------------------------------

WANTED = (
    "seed",
    "steps",
    "step_avg_ms",
    "train_seconds",
    "eval_seconds",
    "bytes_code",
    "bytes_model",
    "val_tokens",
)


def check_log(record: Record) -> Iterator[Finding]:
    for run in record.runs:
        yield from (("fail", conflict) for conflict in run.conflicts)
        if missing := [key for key in WANTED if getattr(run, key) is None]:
            yield "warn", f"{run.name}: the log does not report {', '.join(missing)}"
        if run.headline is None:
            yield "fail", f"{run.name}: no line with a final score"
        elif not 0 < run.headline.val_bpb < math.inf:
            yield "fail", run.headline.line
        else:
            also = "".join(f"; {label} is an alias of {first}" for label, first in run.aliases.items())
            yield "pass", run.headline.line + also


def check_settings(record: Record) -> Iterator[Finding]:
    for run in record.runs[1:]:
        first, own = record.runs[0].settings, run.settings
        other = sorted(
            k for k in first.keys() & own.keys() if first[k] != own[k] and not OWN_SETTINGS.fullmatch(k)
        )
        if other:
            shown = ", ".join(f"{key} {first[key]} and {own[key]}" for key in other)
            yield "fail", f"{record.runs[0].name} and {run.name} have different settings: {shown}"
    yield "pass", f"{len(record.runs[0].settings) if record.runs else 0} settings are the same in all logs"


def check_code(record: Record) -> Iterator[Finding]:
    """Check that all logs have the same code and that the shipped files are that code."""
    hashed = [(run.name, r["sha256_code"]) for run in record.runs for r in run.results if "sha256_code" in r]
    shipped = {p.name: sha256_file(p) for p in record.code}
    for name, code in hashed:
        if changed := sorted(k for k in code if code[k] != hashed[0][1].get(k)):
            yield "fail", f"{', '.join(changed)} changed between {hashed[0][0]} and {name} (sha256_code)"
        for file in code if shipped or record.kind == "folder" else ():
            if shipped.get(file) != code[file]:
                what = "as shipped is not what" if file in shipped else "is not shipped, but"
                yield "fail", f"{file} {what} ran in {name} (sha256 {code[file][:12]}..)"
    if len({tuple(run.source_sha256) for run in record.runs if run.source_sha256}) > 1:
        yield "fail", "the source printed in the logs changed between seeds"
    if len(set(record.values("bytes_source"))) > 1:
        yield (
            "fail",
            "code changed between seeds: " + "; ".join(run.cite("bytes_source") for run in record.runs),
        )
    yield "pass", f"{len(hashed)} logs have the same code, size {sorted(set(record.values('bytes_source')))}"


def counted_files(record: Record) -> list[Path]:
    """Return the shipped files that count: those hashed in RESULT, else train_gpt.py, and their imports."""
    named = {n for run in record.runs for r in run.results for n in r.get("sha256_code", ())} or {
        "train_gpt.py"
    }
    files, names = {p.name: p for p in record.code}, sorted(named)
    for name in names:
        more = (
            {f"{module}.py" for module in imports(parse_python(files[name])[0])} if name in files else set()
        )
        names += sorted((more & files.keys()) - set(names))
    return [files[name] for name in names if name in files]


def read_files(record: Record) -> tuple[list[Path], list[Path]]:
    """Return the files that count too, because the programs import or name them, and all other files.

    Neither list contains the programs themselves or artifacts hashed in the logs. Logs, pages,
    submission.json and certificates are in the first list if a program names them, otherwise in neither.
    """
    root = record.path / "source" if record.kind == "run" else record.path
    programs, scored = counted_files(record), {run.result.get("sha256_artifact") for run in record.runs}
    trees = [parse_python(path)[0] for path in programs]
    modules = {module for tree in trees for module in imports(tree)}
    said = [text for tree in trees if tree for text in strings(tree)]
    told = {path.name for run in record.runs for path in run.paths} | {"README.md", "submission.json"}
    used, others = [], []
    for path in (p for p in record.files if p.is_relative_to(root) and p not in programs):
        inside = path.relative_to(root)
        if path in record.artifacts and sha256_file(path) in scored:
            continue
        module = inside.parts[0].partition(".")[0]
        code = len(inside.parts) > 1 or inside.suffix in (".py", ".pyc", ".so", ".pyd")
        taken = (code and (module in modules or module in said)) or any(path.name in text for text in said)
        page = inside.parts[0] in told or re.fullmatch(
            r"certificate.*\.(txt|json)|requirements\.txt", inside.parts[0]
        )
        if page and not taken:
            continue
        (used if taken else others).append(path)
    return used, others


def strings(tree: ast.Module) -> list[str]:
    """Return the string literals of a program, except docstrings and other bare string statements."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in bare]
    texts = [text for text in found if isinstance(text, str | bytes)]
    return [text if isinstance(text, str) else text.decode("latin-1") for text in texts]


def check_sizes(record: Record) -> Iterator[Finding]:
    """Check that logged sizes add up, match the files, and stay under the cap however they are counted."""
    files = counted_files(record)
    shipped = sum(p.stat().st_size for p in files)
    used, others = read_files(record)
    for what, group in (("not counted, but the programs name or import", used), ("not counted", others)):
        if group:
            shown = ", ".join(f"{p.relative_to(record.path)} ({p.stat().st_size} bytes)" for p in group)
            yield "warn", f"{what}: {shown}"
    for run in record.runs:
        code, model, total = run.bytes_code, run.bytes_model, run.bytes_total
        if None in (code, model, total):
            yield (
                "warn",
                f"{run.name}: the log does not report the size of {'code' if code is None else 'the model'}",
            )
            continue
        sums = {"in the log": total, "code and model in the log": code + model}
        if code + model != total:
            yield "fail", f"{code} + {model} != {total}: {run.cite('bytes_total')}"
        if run.bytes_source not in (None, code):
            yield (
                "warn",
                f"counted packed, but shipped with {shipped or run.bytes_source}: {run.cite('bytes_code')}",
            )
        elif files:
            sums["code as shipped and model"] = shipped + model
            if shipped != code:
                names = ", ".join(p.name for p in files)
                yield (
                    "fail",
                    f"{names} have {shipped} bytes, but the log counts {code}: {run.cite('bytes_code')}",
                )
        if used:
            ways = f"with {', '.join(p.name for p in used)}, which the programs name or import"
            sums[ways] = (shipped or code) + model + sum(p.stat().st_size for p in used)
        way, worst = max(sums.items(), key=lambda item: item[1])
        if worst > SIZE_CAP:
            yield (
                "fail",
                f"{worst} bytes ({way}), {worst - SIZE_CAP} over {SIZE_CAP}: {run.cite('bytes_total')}",
            )
        yield "pass", f"{worst} bytes of {SIZE_CAP}: {run.cite('bytes_total')}"


def check_train_time(record: Record) -> Iterator[Finding]:
    for run in record.runs:
        if run.train_seconds is None:
            yield "warn", f"{run.name}: the log does not report the training time"
            continue
        own_clock = "train_seconds" in run.result
        cited = f"{run.train_seconds:.3f} s: {f'{run.name}: RESULT' if own_clock else run.cite('train_ms')}"
        over = run.train_seconds - TIME_LIMIT
        late = over + (run.hessian_seconds or 0)
        if over > 0 and not own_clock and run.stopped and over <= 2 * (run.step_avg_ms or 0) / 1000:
            yield "warn", f"over {TIME_LIMIT:.0f} s by at most two steps, as in merged records: {cited}"
        elif over > 0:
            yield "fail", f"over {TIME_LIMIT:.0f} s: {cited}"
        elif late > 0:
            calibrated = f"{TIME_LIMIT + late:.1f} s with calibration, which counts if it reads training data"
            yield "warn", f"{calibrated}: {run.cite('hessian_seconds')}"
        yield "pass", cited


def check_eval_time(record: Record) -> Iterator[Finding]:
    for run in record.runs:
        if run.eval_seconds is None:
            yield "warn", f"{run.name}: the log does not report the evaluation time"
            continue
        cited = (
            f"{run.eval_seconds:.1f} s, with all passes and compilation {run.eval_all_seconds:.1f} s: "
            f"{run.name}"
        )
        status = (
            "fail"
            if run.eval_seconds > TIME_LIMIT
            else "warn"
            if run.eval_all_seconds > TIME_LIMIT
            else "pass"
        )
        yield status, f"over {TIME_LIMIT:.0f} s: {cited}" if status != "pass" else cited


# ------------------------------------------------------------------------------------------------------------
# Rules on scores
# ------------------------------------------------------------------------------------------------------------


def published(run: LogFacts) -> Published | None:
    """Return the published validation set with a log's number of tokens, or else with its tokenizer."""
    if run.val_tokens is None:
        return by_tokenizer(run)
    near = [p for p in PUBLISHED if 0 <= p.tokens - run.val_tokens <= TAIL_TOKENS]
    return min(near, key=lambda p: p.tokens - run.val_tokens, default=None)


def by_tokenizer(run: LogFacts) -> Published | None:
    match = re.search(r"fineweb_(\d+)_bpe(.*caseops)?", run.tokenizer or "")
    name = f"sp{match[1]}{' caseops' if match[2] else ''}" if match else ""
    return next((p for p in PUBLISHED if p.name == name), None)


def own_ratio(record: Record) -> float | None:
    """Return the tokens per byte of the validation text, from a manifest.json of data/prepare.py."""
    splits = record.manifest.get("splits")
    val = splits.get("val") if isinstance(splits, dict) else None
    return val["tokens"] / val["text_bytes"] if val and val.get("text_bytes") and val.get("tokens") else None


def check_bytes(record: Record) -> Iterator[Finding]:
    """Check the tokens per byte implied by a score's two units against the validation set."""
    rows = [(run, s) for run in record.runs for s in run.scores if 0 < min(s.val_loss, s.val_bpb) < math.inf]
    for run, score in rows:
        known, ratio, own = published(run), score.tokens_per_byte, own_ratio(record)
        expected = known.tokens_per_byte if known else own or rows[0][1].tokens_per_byte
        source = known.name if known else "manifest.json" if own else rows[0][1].line
        rounding = 10.0**-score.decimals * (1 / score.val_bpb + 1 / score.val_loss)
        if abs(ratio / expected - 1) > RATIO_TOLERANCE + rounding:
            tokens = run.val_tokens or (known.tokens if known else 0)
            counted = f"{tokens / ratio:,.0f} bytes were counted instead of {tokens / expected:,.0f}"
            yield (
                "fail",
                f"{ratio:.5f} tokens per byte, but {source} has {expected:.5f}: {counted}: {score.line}",
            )
        elif score is run.headline:
            shown = f"{ratio:.5f} tokens per byte: {run.name}"
            yield (
                ("pass", f"{source} has {shown}")
                if known or own
                else ("warn", f"nothing to compare with {shown}")
            )
        if score is run.headline:
            old_log = record.kind == "log" and known  # the first baseline's log can no longer be corrected
            for status, told in challenge_bytes(run, known, ratio, rounding):
                yield "warn" if old_log else status, told
            if known and own and abs(own / expected - 1) > RATIO_TOLERANCE:
                yield (
                    "fail",
                    f"manifest.json has {own:.5f} tokens per byte, but {known.name} has {expected:.5f}",
                )


def challenge_bytes(
    run: LogFacts, known: Published | None, ratio: float, rounding: float
) -> Iterator[Finding]:
    """Check the bytes of a validation set that is the challenge's by its number of tokens or folder name."""
    claims = (
        known
        or "fineweb10B" in f"{run.dataset} {run.settings.get('data_path')} {run.settings.get('val_files')}"
    )
    if not claims or run.val_tokens is None:
        return
    count, (low, high) = run.val_tokens / ratio, CHALLENGE_BYTES
    if not low * (1 - rounding) <= count <= high * (1 + rounding):
        told = f"{run.val_tokens} tokens of {known.name if known else run.dataset or 'fineweb10B'}"
        yield (
            "fail",
            f"{told} are {count:,.0f} bytes, but the challenge's text has {low:,} to {high:,}: {run.name}",
        )


def check_validation(record: Record) -> Iterator[Finding]:
    """Check that the whole validation set is scored and none of it was trained on, as far as logs show."""
    shards = [s for s in record.manifest.get("shards") or () if isinstance(s, dict)]
    train, val = ({s.get("sha256") for s in shards if s.get("split") == split} for split in ("train", "val"))
    if both := train & val - {None}:
        yield "fail", f"manifest.json has a shard in both splits: {sorted(map(str, both))}"
    for run in record.runs:
        yield from trained_on_validation(record, run)
        known, named = published(run), by_tokenizer(run)
        if run.train_shards == LEAKY_SHARDS:
            yield "fail", f"an export that trains on 40,000 validation documents: {run.cite('train_shards')}"
        if known and run.val_documents not in (None, VAL_DOCUMENTS):
            yield (
                "fail",
                f"only part of the {VAL_DOCUMENTS} validation documents: {run.cite('val_documents')}",
            )
        if re.fullmatch(r"0?\.\d+", run.settings.get("val_doc_fraction", "1.0")):
            yield "fail", f"{run.name}: val_doc_fraction {run.settings['val_doc_fraction']}"
        if named and (not known or known.name.split(" (")[0] != named.name):
            what = f"{known.name}'s" if known else f"not the {named.tokens:,}"
            other_export = not known and abs(run.val_tokens / named.tokens - 1) < EXPORT_TOLERANCE
            told = f"{what} validation tokens with the tokenizer of {named.name}: {run.cite('val_tokens')}"
            yield "warn" if other_export else "fail", told
        elif known and known.name != known.name.split(" (")[0]:
            yield "warn", f"{known.name}, not comparable with later scores: {run.cite('val_tokens')}"
        elif run.val_tokens is None or not known:
            yield "warn", f"not a published validation set, or its size is not logged: {run.name}"
        else:
            yield "pass", f"{known.name}: {run.cite('val_tokens')}"


def is_challenge_text(run: LogFacts) -> bool:
    """Return whether a run was scored on the challenge's text, by its bytes; True if the log lacks them."""
    low, high = CHALLENGE_BYTES
    count, error = text_bytes(run) or (TEXT_BYTES, 0.0)
    return low * (1 - error) <= count <= high * (1 + error)


def hardware(run: LogFacts) -> str:
    """Return the accelerators of a run, such as 8 x NVIDIA H100; empty if the log lacks them."""
    gpu, ranks = object_of(run.result, "versions").get("gpu"), run.result.get("world_size")
    if not gpu or not isinstance(ranks, int):
        return ""
    return f"{ranks} x {gpu}" if gpu != "none" else f"CPU, {ranks} process{'es' * (ranks > 1)}"


def deviations(runs: Sequence[LogFacts]) -> list[str]:
    """Return how runs differ from the challenge: validation text, accelerators, seconds; empty if nowhere.

    What a log does not report counts as the challenge's: older logs report little.
    """
    found = []
    if texts := {round(text_bytes(run)[0]) for run in runs if not is_challenge_text(run)}:
        found.append(f"validation text of {spread(texts, ',')} bytes (the challenge's: {TEXT_BYTES:,})")
    wrong = re.compile(rf"(?!{GPUS} x .*{GPU}).+")
    if machines := {hardware(run) for run in runs if wrong.match(hardware(run))}:
        found.append(f"{' and '.join(sorted(machines))} (the challenge's: {GPUS} x {GPU})")
    seconds = [run.result.get("train_seconds", TIME_LIMIT) for run in runs]
    if any(not SHORTEST <= each <= TIME_LIMIT for each in seconds):
        found.append(f"training of {spread(seconds, '.1f')} s (the challenge's: up to {TIME_LIMIT:.0f} s)")
    seconds = [run.result.get("eval_seconds", 0.0) for run in runs]
    if max(seconds, default=0.0) > TIME_LIMIT:
        found.append(f"evaluation of {spread(seconds, '.1f')} s (the challenge's: up to {TIME_LIMIT:.0f} s)")
    return found


def spread(values: Iterable[float], form: str) -> str:
    """Return the smallest and the largest value as text, or the only one."""
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def check_challenge(record: Record) -> Iterator[Finding]:
    """Check that a record of the challenge's track is of the challenge."""
    for told in deviations(record.runs):
        yield "fail", f"not a challenge run: {told}"
    yield "pass", "nothing in the logs is outside the challenge"


def check_units(record: Record) -> Iterator[Finding]:
    """Check that nats per token and bits per byte are not confused: 0.005 nats is fewer bits per byte."""
    if not record.values("val_bpb") or not all(0 < loss < math.inf for loss in record.values("val_loss")):
        return
    factor, claims = nats_per_bpb(record), record.claims
    allowed = [factor, *(math.log(2) / p.tokens_per_byte for p in PUBLISHED)]
    text = f"{record.readme}\n{json.dumps(claims, default=str)}"
    pairs = [
        (m[1], m[2], m[0])
        for m in re.finditer(r"(\d\.\d+)\s*bpb\W{1,8}(\d\.\d+)\s*nats", text, re.IGNORECASE)
    ]
    for key in (key for key in claims if key.endswith("_nats")):
        bpb, nats = claims.get(key.removesuffix("_nats") + "_bpb"), claims[key]
        if is_number(bpb) and is_number(nats):
            pairs.append((str(abs(bpb)), str(abs(nats)), f"{key} {nats} beside {bpb} bpb"))
    for bpb, nats, shown in pairs:
        error = [10.0 ** Decimal(value).as_tuple().exponent for value in (bpb, nats)]
        if all(abs(float(nats) - float(bpb) * f) > error[1] + f * error[0] for f in allowed):
            confused = any(math.isclose(float(nats), float(bpb) * f, rel_tol=0.03) for f in (1, math.log(2)))
            told = f"one bit per byte is {factor:.4f} nats per token here: {shown}"
            yield ("fail", f"units confused, {told}") if confused else ("warn", f"units do not agree, {told}")
    margin = f"0.005 nats per token are {MARGIN_NATS / factor:.5f} bpb here"
    for match in re.finditer(r".{0,60}0\.005\s*(?:val_)?bpb.{0,40}", text, re.IGNORECASE):
        yield "warn", f"{margin}: {match[0].strip()}"
    yield "pass", f"{margin}; {len(pairs)} pairs of units agree"


def check_significance(record: Record, against: Record) -> Iterator[Finding]:
    """Check the gain over the record to beat, and the statistics claimed in submission.json."""
    nats, bpb, tests = compare(record, against)
    shown = f"{nats:.5f} nats = {bpb:.5f} bpb better than {against.path.name}; {'; '.join(map(str, tests))}"
    if nats >= MARGIN_NATS and tests[0].p < P_WRITTEN:
        yield "pass", shown
    elif nats > 0 and tests[0].p < P_APPLIED:
        yield (
            "warn",
            f"short of {MARGIN_NATS} nats at p<{P_WRITTEN}, but p<{P_APPLIED}, as accepted later: {shown}",
        )
    else:
        yield "fail", shown
    for key, value in (("t_statistic", tests[0].t), ("welch_df", tests[0].df), ("p_value", tests[0].p)):
        if is_number(record.claims.get(key)) and not agrees(record.claims[key], value):
            yield "fail", f"{key} is {record.claims[key]} in submission.json; Welch's test gives {value:.6g}"


# ------------------------------------------------------------------------------------------------------------
# Rules on code
# ------------------------------------------------------------------------------------------------------------

VAL_NAME = re.compile(
    r"(val|valid|validation)_(toks?|tokens|token_ids|data|ids|loader|stream|batch(es)?|seqs|docs)$"
)
TARGET_NAME = re.compile(r"(targets?|tgts?|labels?|y|next_tok\w*)(_np|_ids?|_tok\w*)?$")
SCORING_CALL = re.compile(r"model$|forward|logits|cross_entropy|loss|nll|score|bpb")
CHANGE_NAME = re.compile(r"slot|delta|bias|shift|logit")
CALIBRATION_CALL = re.compile(r"hessian|calib|gptq|quantize")
NETWORK = {"requests", "urllib", "urllib3", "httpx", "aiohttp", "huggingface_hub"}
QUIET, GRADIENTS = {"no_grad", "inference_mode"}, {"backward", "grad"}
LZMA2 = [{"id": lzma.FILTER_LZMA2}]
UNPACKERS = (
    lambda blob: zlib.decompressobj().decompress(blob, UNPACK_LIMIT),
    lambda blob: lzma.LZMADecompressor().decompress(blob, UNPACK_LIMIT),
    lambda blob: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA2).decompress(blob, UNPACK_LIMIT),
    lambda blob: zstandard.ZstdDecompressor().stream_reader(blob).read(UNPACK_LIMIT),
    lambda blob: bz2.BZ2Decompressor().decompress(blob, UNPACK_LIMIT),
)


def unpack(blob: bytes) -> Iterator[bytes]:
    """Yield the output of every decompressor that accepts a blob."""
    for unpacker in UNPACKERS:
        try:
            yield unpacker(blob)
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, OSError):
            continue


def bytes_of(text: str | bytes) -> bytes:
    """Return the bytes of a literal in which each character is a byte; see pack.py."""
    return text if isinstance(text, bytes) else text.encode("latin-1")


def parse_python(path: Path) -> tuple[ast.Module | None, str]:
    """Return the syntax tree of a program, or of the program packed in it; None and the reason on failure."""
    return parse_source(path.read_bytes(), path.name)


@lru_cache(8)
def parse_source(source: bytes, name: str) -> tuple[ast.Module | None, str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        return None, f"{name} does not compile: {error}"
    if "exec" not in {name for _, name, _ in called(tree)}:
        return tree, ""
    texts = (
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, (str, bytes))
    )
    longest = max(texts, key=len, default="")
    for decode in (base64.b85decode, base64.a85decode, base64.b64decode, bytes_of):
        try:
            for source in unpack(decode(longest)):
                return ast.parse(source), ""
        except (ValueError, SyntaxError):
            continue
    return (None, f"{name} is packed in a way that cannot be read") if len(longest) > 2000 else (tree, "")


def called(tree: ast.AST) -> list[tuple[int, str, ast.Call]]:
    """Return line, function name and node of every call."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [(call.lineno, getattr(call.func, "attr", getattr(call.func, "id", "")), call) for call in calls]


def names_in(*trees: ast.AST) -> set[str]:
    """Return the variable and attribute names in code."""
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name)))
    return {getattr(node, "attr", getattr(node, "id", "")) for node in nodes}


def imports(tree: ast.Module | None) -> set[str]:
    nodes = list(ast.walk(tree)) if tree else []
    found = {
        alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    return found | {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}


def inputs_of(call: ast.Call) -> set[str]:
    return names_in(*call.args, *(keyword.value for keyword in call.keywords))


def quiet_calls(tree: ast.AST) -> list[tuple[int, str, ast.Call]]:
    """Return the calls under no_grad or inference_mode."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.With) and names_in(*node.items) & QUIET)
    return [call for block in blocks for call in called(block)]


def scoring_lines(tree: ast.AST, scorers: Iterable[str] = ()) -> list[int]:
    """Return the lines that compute losses without gradients, or that call one of `scorers`, which do."""
    quiet = [line for line, name, _ in quiet_calls(tree) if SCORING_CALL.search(name)]
    return quiet + [line for line, name, _ in called(tree) if name in scorers]


def made_from(function: ast.AST, sources: set[str]) -> set[str]:
    """Return the variables of a function that depend on `sources`."""
    made, before = set(sources), set()
    while made != before:
        before = set(made)
        for node in ast.walk(function):
            origin = getattr(node, "iter", getattr(node, "value", None))
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(origin, ast.AST) and names_in(origin) & made:
                stored = (
                    n for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)
                )
                made |= {name.id for name in stored if isinstance(name.ctx, ast.Store)}
    return made


def learning_lines(function: ast.AST, sources: set[str], scorers: Iterable[str] = ()) -> list[int]:
    """Return lines that take gradients, in the innermost loop, of losses on `sources` (empty: on any)."""
    made, quiet = made_from(function, sources), {id(call) for _, _, call in quiet_calls(function)}
    loops = [node for node in ast.walk(function) if isinstance(node, (ast.For, ast.While))]
    takes = {id(loop): [line for line, name, _ in called(loop) if name in GRADIENTS] for loop in loops}
    lines = []
    for loop in loops:
        losses = [c for _, name, c in called(loop) if SCORING_CALL.search(name) and name not in scorers]
        fed = not sources or any(id(call) not in quiet and inputs_of(call) & made for call in losses)
        if fed and not any(takes.get(id(inner)) for inner in ast.walk(loop) if inner is not loop):
            lines += takes[id(loop)]
    return sorted(lines)


def find_shapes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and meaning of each code pattern that reviewers reject."""
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    scorers = {f.name for f in functions if names_in(*f.decorator_list) & QUIET}
    scorers |= {f.name for f in functions if scoring_lines(f) and not learning_lines(f, set())}
    for function in functions:
        yield from learning_shapes(function, scorers - {function.name})
    for node in ast.walk(tree):
        xor = isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor)
        if xor or (isinstance(node, ast.Call) and called(node)[0][1] == "bitwise_xor"):
            for name in sorted(filter(TARGET_NAME.match, names_in(node)))[:1]:
                yield node.lineno, f"n-gram cache: a hash of {name!r}, the token to be predicted"
    for line, name, call in called(tree):
        if CALIBRATION_CALL.search(name) and (val := sorted(filter(VAL_NAME.match, inputs_of(call)))):
            yield line, f"calibration on the validation set: {name} receives {val[0]}"
        if name == "exec" and {inner for _, inner, _ in called(call)} & {"open", "read_text", "read_bytes"}:
            yield line, "uncounted code: exec of another file"


@lru_cache(8)  # the programs of several runs are one tree: see parse_source
def shapes_of(tree: ast.Module) -> tuple[tuple[int, str], ...]:
    return tuple(find_shapes(tree))


def learning_shapes(function: ast.FunctionDef, scorers: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the ways in which a function adapts on its validation tokens in the wrong order."""
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    val = {a.arg for a in arguments if VAL_NAME.match(a.arg)}
    learned = learning_lines(function, val, scorers)
    if val and learned and not any(line < learned[0] for line in scoring_lines(function, scorers)):
        yield learned[0], f"adapts first: {function.name} adapts on {min(val)} before scoring it"
    for loop in (n for n in ast.walk(function) if isinstance(n, ast.For) and val):
        repeats = any(re.search("epoch|pass", name) for name in names_in(loop.target, loop.iter))
        inside = range(loop.lineno, (loop.end_lineno or 0) + 1)
        if repeats and scoring_lines(loop, scorers) and any(line in inside for line in learned):
            yield (
                loop.lineno,
                f"several passes: {function.name} scores {min(val)} in every epoch that adapts on it",
            )
    for node in ast.walk(function) if val or re.match("eval|score|slot", function.name) else ():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, calls = node.targets[0].id, called(node.value)
            free = any(k.arg == "requires_grad" for _, _, call in calls for k in call.keywords)
            free = free or bool({"Parameter", "requires_grad_"} & {call for _, call, _ in calls})
            if free and CHANGE_NAME.search(name) and any(line > node.lineno for line in learned):
                yield node.lineno, f"SLOT: {function.name} optimizes {name!r} on the targets it scores"


def check_tree(record: Record) -> Iterator[Finding]:
    """Check the syntax trees of the programs: this is evidence, not proof, in either direction."""
    for path in record.code:
        tree, problem = parse_python(path)
        if tree is None:  # nested quotes in f-strings need Python 3.12
            yield "warn" if "packed" in problem or "f-string" in problem else "fail", problem
            continue
        yield from (("fail", f"{path.name}:{line}: {meaning}") for line, meaning in shapes_of(tree))
        if path.name in ("train_gpt.py", "eval_ttt.py") and (network := sorted(imports(tree) & NETWORK)):
            yield "warn", f"{path.name} imports {', '.join(network)}: evaluation must not use the network"
    yield (
        "pass",
        f"no known illegal pattern in {', '.join(path.name for path in record.code) or 'no program'}",
    )


# ------------------------------------------------------------------------------------------------------------
# Rules on artifact and legality
# ------------------------------------------------------------------------------------------------------------


def is_pickle(blob: bytes, packed: bool = True) -> bool:
    """Return whether a file is a pickle: plain, zipped by torch.save, or (if `packed`) compressed."""
    if blob[:1] == b"\x80" and blob[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if blob[:4] == b"PK\x03\x04":
        return b".pkl" in blob
    return packed and any(is_pickle(inner, False) for inner in unpack(blob))


def check_artifact(record: Record) -> Iterator[Finding]:
    """Check that artifacts are those that the logs scored, unaltered, and readable without running code."""
    scored = {run.result["sha256_artifact"]: run for run in record.runs if "sha256_artifact" in run.result}
    for digest in scored:
        if len(same := [run.name for run in record.runs if run.result.get("sha256_artifact") == digest]) > 1:
            yield "fail", f"several seeds have the same artifact {str(digest)[:12]}..: {', '.join(same)}"
    for path in record.artifacts:
        blob = path.read_bytes()
        size, digest = len(blob), hashlib.sha256(blob).hexdigest()
        if blob.startswith(ARTIFACT_MAGIC):
            first = blob[8:12] == b"\1\0\0\0"  # from version 2 on, the checksum covers version and coder too
            body, kept = (blob[44:], blob[12:44]) if first else (blob[8:16] + blob[48:], blob[16:48])
            if hashlib.sha256(body).digest() != kept:
                yield "fail", f"{path.name}: the checksum does not match, so the file is truncated or altered"
        elif is_pickle(blob):
            yield "fail" if scored else "warn", f"{path.name} is a pickle: reading it can execute code"
        if scored and digest not in scored:
            yield "fail", f"{path.name} is not the artifact that the logs scored (sha256 {digest[:12]}..)"
        models = [scored[digest].bytes_model] if digest in scored else record.values("bytes_model")
        if models and size not in models:
            yield "fail", f"{path.name} has {size} bytes, but the logs count {models}"
        yield "pass", f"{path.name}: {size} bytes, sha256 {digest[:12]}.."


def check_legality(record: Record) -> Iterator[Finding]:
    """Check that no score is labeled invalid and that certificates are legal and match code and artifacts."""
    certified = any(re.fullmatch(r"certificate.*\.(txt|json)", path.name) for path in record.files)
    for run in record.runs:
        if run.headline and run.headline.label.startswith("invalid"):
            yield "fail", run.headline.line
        if run.result.get("legal") is False:
            yield "fail", f'{run.name}: RESULT has "legal": false'
        if isinstance(others := run.result.get("earlier_code"), list) and others:
            yield "warn", f"{run.name}: resumed; other code trained it before, versions: {len(others)}"
        modes = [str(object_of(result, "settings").get("ttt_mode")) for result in run.results]
        for mode in (mode for mode in modes if ".py:" in mode):
            yield (
                "fail",
                f"{run.name}: TTT_MODE={mode} is code beside the two programs. Build it into eval_ttt.py",
            )
        if run.headline and "ttt" in run.headline.label and record.kind != "log" and not certified:
            yield (
                "warn",
                f"no certificate of an audit, so score-first rests on the log alone: {run.headline.line}",
            )
    yield from check_certificates(record)


# ------------------------------------------------------------------------------------------------------------
# Verdicts
# ------------------------------------------------------------------------------------------------------------

EVERY = ("folder", "run", "log")
RULES = (  # name, kinds of record it applies to, function
    ("files", ("folder",), check_files),
    ("json", ("folder",), check_json),
    ("log", EVERY, check_log),
    ("claims", ("folder",), check_claims),
    ("seeds", ("folder",), check_seeds),
    ("settings", ("folder",), check_settings),
    ("code", EVERY, check_code),
    ("sizes", EVERY, check_sizes),
    ("artifact", ("folder", "run"), check_artifact),
    ("train time", EVERY, check_train_time),
    ("eval time", EVERY, check_eval_time),
    ("bytes", EVERY, check_bytes),
    ("validation set", EVERY, check_validation),
    ("challenge", ("folder",), check_challenge),
    ("units", ("folder",), check_units),
    ("syntax tree", ("folder", "run"), check_tree),
    ("losses", ("folder", "run"), check_losses),
    ("legality", EVERY, check_legality),
)
RECORD_RULES = {"seeds", "train time", "eval time", "challenge"}
COLUMNS = (  # heading, fact, format
    ("seed", "seed", "d"),
    ("val_bpb", "val_bpb", ".8f"),
    ("val_loss", "val_loss", ".8f"),
    ("steps", "steps", "d"),
    ("ms/step", "step_avg_ms", ".2f"),
    ("train s", "train_seconds", ".1f"),
    ("eval s", "eval_seconds", ".1f"),
    ("code", "bytes_code", "d"),
    ("model", "bytes_model", "d"),
    ("total", "bytes_total", "d"),
)


class Verdict(NamedTuple):
    """Result of a rule: status "pass", "warn" or "fail", and the line or file that supports it."""

    rule: str
    status: str
    evidence: str


def check(record: Record, against: Record | None = None) -> list[Verdict]:
    """Return the verdicts of all rules that apply; if a rule has faults, only the faults.

    `against` is the record to beat. In the non-record track, faults in times, seeds and what is not of the
    challenge are warnings.
    """
    findings = [(name, rule(record)) for name, kinds, rule in RULES if record.kind in kinds]
    if against is not None:
        findings.append(("significance", check_significance(record, against)))
    verdicts = []
    other_track = "non_record" in f"{record.path.resolve()} {record.claims.get('track')}".replace("-", "_")
    for name, found in findings:
        own = [Verdict(name, status, evidence) for status, evidence in dict.fromkeys(found)]
        if other_track and name in RECORD_RULES:
            own = [v._replace(status="warn") if v.status == "fail" else v for v in own]
        own = own or [Verdict(name, "pass", "nothing to check")]
        verdicts += [verdict for verdict in own if verdict.status != "pass"] or own
    return verdicts


def status_of(verdicts: Iterable[Verdict]) -> str:
    """Return the worst status: "fail", "warn" or "pass"."""
    return min((verdict.status for verdict in verdicts), key=("fail", "warn", "pass").index, default="pass")


def alike(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return the verdicts with those that differ only in numbers and hashes, as of several seeds, as one."""
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for verdict in verdicts:
        pattern = re.sub(r"[0-9a-f]{12}\.\.|[\d.,]*\d", "0", verdict.evidence)
        groups.setdefault((verdict.rule, verdict.status, pattern), []).append(verdict)
    more = {id(group[0]): f" (and {len(group) - 1} more)" * (len(group) > 1) for group in groups.values()}
    return [v._replace(evidence=v.evidence + more[id(v)]) for v, *_ in groups.values()]


def report(record: Record, verdicts: Sequence[Verdict], verbose: bool = False) -> str:
    """Return the recomputed numbers as a table, then faults and warnings, and all verdicts if `verbose`."""
    rows = []
    for run in record.runs:
        values = [(getattr(run, fact), form) for _, fact, form in COLUMNS]
        cells = ["-" if value is None else format(value, form) for value, form in values]
        rows.append([*cells, run.headline.label if run.headline else "no score", run.name])
    headings = [*(heading for heading, _, _ in COLUMNS), "score", "log"]
    sides = ("right",) * len(COLUMNS) + ("left", "left")
    told = [v for v in verdicts if v.status != "pass"]
    told = list(verdicts) if verbose else alike(told)
    told.sort(key=lambda v: ("fail", "warn", "pass").index(v.status))
    counts = Counter(verdict.status for verdict in verdicts)
    passed = f"{counts['pass']} passes" + ("" if verbose else " (--verbose lists them)")
    lines = [
        str(record.path),
        *tabulate([[escape(cell) for cell in row] for row in rows], headings, tablefmt="plain",
                  disable_numparse=True, colalign=sides if rows else None).splitlines(),
        *(f"{v.status}  {v.rule:14}  {v.evidence}" for v in told),
        f"{status_of(verdicts).upper()}: {counts['fail']} faults, {counts['warn']} warnings, {passed}",
    ]  # fmt: skip
    return "\n".join(map(escape, lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, help="record folders, run folders or logs")
    parser.add_argument("--against", type=Path, help="record to beat: a folder with its logs")
    parser.add_argument(
        "--data", type=Path, help="folder of the validation shards; default: from the log's settings"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer model; default: from the log's settings")
    parser.add_argument("--mode", default="", help="evaluation of a run; default: the last legal one")
    parser.add_argument("--verbose", action="store_true", help="list passes and every seed's lines too")
    parser.add_argument("--json", action="store_true", help="print facts and verdicts as JSON")
    arguments = parser.parse_args(argv)
    try:
        against = read_record(arguments.against) if arguments.against else None
        records = [read_record(path, arguments.mode) for path in arguments.paths]
        for record in records:
            record.data, record.tokenizer = arguments.data, arguments.tokenizer
        checked = [(record, check(record, against)) for record in records]
    except (ValueError, OSError) as error:
        print(f"error: {escape(str(error))}", file=sys.stderr)
        return 2
    if arguments.json:
        objects = [
            dict(path=record.path, kind=record.kind, status=status_of(verdicts),
                 runs=[asdict(r) for r in record.runs], verdicts=[verdict._asdict() for verdict in verdicts])
            for record, verdicts in checked
        ]  # fmt: skip
        print(json.dumps(objects, indent=1, default=str).replace("\x7f", "\\u007f"))
    else:
        print("\n\n".join(report(record, verdicts, arguments.verbose) for record, verdicts in checked))
    return 1 if any(status_of(verdicts) == "fail" for _, verdicts in checked) else 0


if __name__ == "__main__":
    sys.exit(main())
