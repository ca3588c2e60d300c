"""Check a record folder, a run or a log against the contest rules, using only its files.

    python records/check.py records/track_10min_16mb/2026-12-01_Name [--against FOLDER] [--json]
    python records/check.py runs/NAME [--mode MODE] [--data FOLDER --tokenizer FILE] [--verbose]
    python records/check.py train_seed42.log

Every number is recomputed: steps, times, sizes, scores, seeds, tokens per byte, significance. Each rule
reports, with the line or file that supports it: fail (a rule is broken, or a claim is wrong), off (a claim
differs from the logs by its last digit), warn, note, or pass (listed with --verbose). Logs, sizes, seeds and
hashes decide. Notes name lines of the programs for a reviewer to read; they fail nothing, because a syntax
tree shows neither which branch ran nor what a caller scored before.
Of several runs and evaluations in the logs, those that submission.json claims are judged, and the others are
named. Of a run that was evaluated in several modes, the last legal evaluation counts, or that of --mode. If
nll.npy exists, val_loss is recomputed from it. If shards and tokenizer are available too, by the log's paths
inside this repository or by the options, so is val_bpb. A record in track_10min_16mb must be of the
challenge: its validation text, 8 x H100, its time limits; elsewhere a record of other runs passes with a
warning. Each path is judged in a process of its own, within 120 s and 2 GiB. Exit codes: 0 passed (all but
faults allowed), 1 failed, 2 user error, or a path that cannot be judged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import re
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from functools import partial
from itertools import islice, pairwise, product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import Any, NamedTuple

from evidence import (
    TEXT_LIMIT,
    Finding,
    check_certificates,
    check_losses,
    check_tree,
    digest,
    evaluation,
    read_program,
    trained_on_validation,
    unpack,
)
from runfiles import escape, object_of, parse_object, read_file, read_object, read_text
from scipy import stats
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from formats import ARTIFACT_MAGIC, CHALLENGE_BYTES, PUBLISHED, SIZE_CAP, TEXT_BYTES, Published

LIMIT_SECONDS, LIMIT_BYTES = 120.0, 2 << 30  # to judge one path
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
MANY_TOKENS = 30_000_000  # a validation text of more is the challenge's, whatever its export
MANY_EPOCHS, SHARD_TOKENS = 20, 10**8  # of the training text; tokens of a published shard
TAIL_TOKENS = 8192  # more than dropping a partial last window loses

# ------------------------------------------------------------------------------------------------------------
# Reading a log
# ------------------------------------------------------------------------------------------------------------

# Digits are followed by what is no digit, so that every expression takes linear time.
NUM = r"(?:[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|nan|inf)"
INT = r"\d[\d,]*"
AT_STEP = r"(?:step:)?(?P<steps>\d+)/\d+ "
LINES = tuple(  # of all log formats, anchored to the start of a line; the last matching line counts
    (where, re.compile(pattern))
    for where, pattern in (
        # anywhere: settings precede model_params in some formats and follow it in others
        ("any", r" *seed: ?(?P<seed>\d+)$"),
        ("any", r"(?:train_loader:dataset:(?P<dataset>\S+) )? *train_shards: ?(?P<train_shards>\d+)"),
        ("any", r"val_loader:\S* pattern=.* tokens:(?P<val_tokens>\d+)"),
        ("any", r" *val_tokens: ?(?P<val_tokens>\d+)"),
        ("any", r"evaluation order: .*targets:(?P<val_tokens>\d+)"),
        ("any", r"val_bpb:enabled .*?tokenizer_path=(?P<tokenizer>.+)"),
        ("any", r" *tokenizer_path[=:] ?(?P<tokenizer>[^\s\"'(]+)$"),
        ("any", r"model_params: ?(?P<model_params>\d+)"),
        # only after model_params: before it a log may contain the program's source
        ("body", rf"{AT_STEP}(?:train_)?loss: ?{NUM}(?: \S+)*? (?:train_time|t): ?(?P<train_ms>{NUM})ms"),
        ("body", rf"{AT_STEP}(?:train_)?loss: ?{NUM} train_time: ?(?P<train_minutes>{NUM})m\b"),  # from #1218
        ("body", rf"{AT_STEP}val_loss: ?{NUM} val_bpb: ?{NUM}(?: train_time: ?(?P<train_ms>{NUM})ms)?"),
        ("body", rf"stopping_early: ?(?P<stopped>\w+) train_time: ?(?P<train_ms>{NUM})ms "
                 r"step: ?(?P<steps>\d+)/\d+"),
        ("body", rf"Code size(?: \(uncompressed\))?: (?P<bytes_source>{INT}) bytes"),
        ("body", rf"Code size \(compressed\): (?P<bytes_packed>{INT}) bytes"),
        ("body", rf"Serialized model [^:]+: (?P<bytes_model>{INT}) bytes"),
        ("body", rf"Total submission size [^:]+: (?P<bytes_total>{INT}) bytes"),
        ("body", rf"Total submission size: (?P<bytes_unlabeled>{INT}) bytes"),  # some: of raw weights
        ("body", rf"artifact:\S+ .*\bcode:(?P<bytes_source>{INT})"),  # ternary
        ("body", rf"budget:(?P<bytes_total>{INT})/\d+"),  # ternary
        ("body", rf"(?i:gptq: ?(?:collected|calibrated)) \D*\d+ \w+ in (?P<hessian_seconds>{NUM})s"),
        ("body", rf"ttt_lora:compile warmup done \((?P<compile_seconds>{NUM})s\)"),
        ("body", rf"total_eval_time: ?(?P<total_eval_seconds>{NUM})s"),
        ("body", r"ttt_phased: total_docs:(?P<val_documents>\d+)"),
    )
)  # fmt: skip
SCORE_LINE = re.compile(
    rf"(?P<label>[A-Za-z][\w +.-]*?)(?: stride:\d+)? (?:val_loss|vl): ?(?P<loss>{NUM})"
    rf"(?: sliding)? (?:val_bpb|bpb): ?(?P<bpb>{NUM})(?P<tail>.*)"
)
BPB_LINE = re.compile(
    rf"(?P<label>[A-Za-z][^:%\[]*?)[ _](?i:(?:val_|mix_)?bpb)[:=] ?(?P<bpb>{NUM})(?P<tail>.*)"
)
EVAL_TIME = re.compile(rf"(?<![a-z_])(?:eval_)?time: ?({NUM})(ms|s)\b")
STAMP = re.compile(r"(?:\[[^\]]*\]:? ?|\d+\.\d+ |\d{4}-\d\d-\d\d[T ][\d:.,]+Z? )*")  # rank, time
START = re.compile(r"model_params: ?\d|params:\d+ ")  # of the body
STEP = re.compile(r"(?:step:)?(\d{1,15})/\d+ ")
END = re.compile(
    r"(?:step:)?\d+/\d+ |stopping_early|Serialized|Total sub|Code size|RESULT |.* (?:val_)?bpb: ?\d"
)
SETTING = re.compile(r"  (?:([A-Z]\w*)=(.*?)(?: \(given\))?|([a-z]\w*): (\S*))$")  # ours, from #1218 on
# the baseline's settings: name:value pairs on a few lines; others print name=value pairs on one
PAIRS = re.compile(r"\w+:\S+(?: \w+:\S+)*$|\w+=[^\s(),'\"]+(?: \w+=[^\s(),'\"]+)+$")
# per-run settings
OWN_SETTINGS = re.compile(
    r"s|seed|rank|run_\w+|warmup_step|host\w*|date|timestamp|wandb\w*|.*(path|dir|file|files)", re.IGNORECASE
)
IN_MEMORY = re.compile(r"pre.?quant|post.?ema", re.IGNORECASE)  # scores of weights other than the artifact's
RESULT_SCORES = (
    ("ttt", "legal_ttt"),
    ("sliding", "final_int6_sliding_window"),
    ("roundtrip", "final_int6_roundtrip"),
)
COUNTS = ("seed", "steps", "model_params", "bytes_source", "bytes_code", "bytes_model", "bytes_total",
          "train_shards", "val_tokens", "val_documents", "bytes_packed", "bytes_unlabeled")  # fmt: skip
TEXTS = ("tokenizer", "stopped", "dataset")
LOG_LIMIT, MOST_LINES, LINE_LIMIT, MOST_SCORES = 32 << 20, 500_000, 4096, 100
MOST_NATS = 1e6  # a larger score is infinite


class Field(NamedTuple):
    """What a value of RESULT or submission.json must be."""

    words: str
    accepts: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Return whether a value is a number, and not so large that arithmetic could overflow."""
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and abs(value) < 1e18


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64


def of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


COUNT = Field("a whole number from 0 to 2^64", is_whole)
SECONDS = Field("seconds", lambda value: is_number(value) and 0 <= value <= 1e9)
NUMBER = Field(  # or NaN, which is a score too, of a run that failed
    "a number below 10^6", lambda value: isinstance(value, int | float) and not abs(value) >= MOST_NATS
)
TEXT = Field("text", lambda value: isinstance(value, str))
FLAG = Field("true or false", lambda value: isinstance(value, bool))
OBJECT = Field("an object", lambda value: isinstance(value, dict))
TEXTS_BY_NAME = Field("an object of texts", of_texts)
RESULT_FIELDS = {  # regular expression of the key: what its value must be
    f"{'|'.join(COUNTS)}|world_size": COUNT,
    r"(?:train|eval|strict)_seconds|step_avg_ms": SECONDS,
    r"val_(?:loss|bpb)_\w+|ttt_gain_bpb": NUMBER,
    "sha256_(?:artifact|nll|tokenizer)": TEXT,
    "sha256_(?:code|shards)": TEXTS_BY_NAME,
    "settings|versions|trainer": OBJECT,
    "legal|fits": FLAG,
}


def conform(found: dict[str, Any], fields: Mapping[str, Field], where: str) -> list[str]:
    """Remove the entries of an object that are not what `fields` say; return a line about each."""
    problems = []
    for key in list(found):
        field = next((field for name, field in fields.items() if re.fullmatch(name, key)), None)
        if field and not field.accepts(found[key]):
            problems.append(f"{where} has {key} {str(found.pop(key))[:80]}, expected {field.words}")
    return problems


@dataclass
class Score:
    """One evaluation: nats per token, bits per byte, seconds (None: not logged), printed decimals.

    `adapts` says that its line, not only its label, tells of adaptation; `source` is the name of its log.
    """

    label: str
    val_loss: float | None
    val_bpb: float
    seconds: float | None
    decimals: int
    line: str
    source: str = ""
    adapts: bool = False

    @property
    def tokens_per_byte(self) -> float:
        return self.val_bpb * math.log(2) / self.val_loss if self.val_loss else math.nan

    @property
    def rounding(self) -> float:
        """Return the relative error of the tokens per byte from the printed digits."""
        return 10.0**-self.decimals * (1 / self.val_bpb + 1 / self.val_loss)


@dataclass
class LogFacts:
    """Facts from the logs of one training run and its evaluator; None if the logs lack a fact.

    `train_seconds` is the contest clock: from RESULT, else from the training loop. `eval_seconds` is the pass
    of the headline score, `eval_all_seconds` includes all passes over the artifact and compilation.
    `bytes_code` is the code as counted, `bytes_source` before packing. `evidence` has the line of each fact,
    `conflicts` the contradictions. `part` and `parts` say which of the runs in the first log this is.
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
    part: int = 0
    parts: int = 1
    headline: Score | None = None
    scores: list[Score] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        names = " + ".join(path.name for path in self.paths)
        return f"{names} (run {self.part + 1} of {self.parts})" if self.parts > 1 else names

    @property
    def val_bpb(self) -> float | None:
        return self.headline.val_bpb if self.headline else None

    @property
    def val_loss(self) -> float | None:
        return self.headline.val_loss if self.headline else None

    def cite(self, key: str) -> str:
        """Return the line that supports a fact."""
        return self.evidence.get(key) or f"{self.name}: " + (f"RESULT {key}" if key in self.result else key)

    def final_scores(self) -> list[Score]:
        """Return the scores of the artifact: with a loss, else without, else those called diagnostic."""
        scores = [score for score in self.scores if not IN_MEMORY.search(score.label)]
        final = [score for score in scores if "diagnostic" not in score.label.lower()]
        return [s for s in final if s.val_loss is not None] or final or [s for s in scores if s.val_loss]

    def choose(self, score: Score) -> None:
        """Make a score the headline, and its pass the evaluation whose time counts."""
        self.headline = score
        if "eval_seconds" in self.result:
            self.eval_seconds = self.eval_all_seconds = self.result["eval_seconds"]
            return
        self.eval_seconds = self.found.get("total_eval_seconds") if score.seconds is None else score.seconds
        if self.eval_seconds is not None:
            passes = [each.seconds or 0.0 for each in self.scores
                      if each.source == score.source and not IN_MEMORY.search(each.label)]  # fmt: skip
            total = sum(passes) + self.found.get("compile_seconds", 0.0)
            self.eval_all_seconds = max(self.eval_seconds, total)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a log without ranks and times; of a progress bar's line only the final text.

    ValueError if the file is none, too large, or no text.
    """
    text = read_text(path, LOG_LIMIT)
    if text.count("\n") > MOST_LINES:
        raise ValueError(f"{path} has more than {MOST_LINES} lines, which are not read")
    return [STAMP.sub("", line.rstrip().rpartition("\r")[2], count=1) for line in text.split("\n")]


def printed_programs(lines: Sequence[str]) -> list[range]:
    """Return the lines of the programs that a log prints; the baseline's stand before or between rulers."""
    rulers = [i for i, line in enumerate(lines) if len(line) >= 20 and not line.strip("=")]
    blocks = [range(a + 1, b) for a, b in pairwise([-1, *rulers]) if b - a > 51]
    imports = re.compile(r"(?:import|from [\w.]+ import) \w")
    return [block for block in blocks if any(imports.match(lines[i]) for i in block)
            and not any(STEP.match(lines[i][:LINE_LIMIT]) for i in block)]  # fmt: skip


def split_runs(lines: Sequence[str]) -> list[int]:
    """Return the first line of each run in a log: some programs append to the log of an earlier run.

    A run starts at its settings. A resumed one, which goes on with its steps, is no other run.
    """
    starts, end, seen, waiting = [0], 0, -1, None
    for index, line in enumerate(lines):
        if START.match(line) and seen >= 0:
            waiting = waiting if waiting is not None else end
        elif line.startswith("resumed:"):
            waiting = None
        elif match := STEP.match(line[:LINE_LIMIT]):
            step = int(match[1])
            if waiting is not None and step <= seen:
                starts.append(waiting)
            seen, waiting = step, None
        if END.match(line[:LINE_LIMIT]):
            end = index + 1
    return starts


def read_log(path: str | Path, *more: str | Path, part: int = -1) -> LogFacts:
    """Read a log, with `more` the other logs of the same training run.

    Of several runs in the first log, `part` is read, by default the last. ValueError if a log cannot be read.
    """
    facts = LogFacts([Path(path), *map(Path, more)])
    for each in facts.paths:
        lines = read_lines(each)
        starts = split_runs(lines) if each == facts.paths[0] else [0]
        if len(starts) > 1:
            facts.part, facts.parts = range(len(starts))[part], len(starts)
        read_run(lines, [*starts, len(lines)], each.name, facts)
    facts.result = fold_results(facts)
    set_facts(facts)
    choose_headline(facts)
    facts.conflicts += contradictions(facts, facts.found)
    del facts.conflicts[MOST_SCORES:]
    return facts


def read_run(lines: list[str], bounds: Sequence[int], name: str, facts: LogFacts) -> None:
    """Collect the facts of the run `facts.part` of a log, whose runs begin and end at `bounds`."""
    part = range(*bounds[facts.part : facts.part + 2]) if len(bounds) > 2 else range(len(lines))
    for program in printed_programs(lines):
        if program.start in part:
            facts.sources.append("\n".join(lines[i] for i in program).strip())
        for index in program:
            lines[index] = ""
    start = next((i for i in part if START.match(lines[i])), part.start)
    for index in part:
        line, body = lines[index], index >= start
        cited = f"{name}:{index + 1}: {line.strip()[:140]}"
        if line.startswith("RESULT "):
            try:
                result = parse_object(line.removeprefix("RESULT "))
                facts.conflicts += conform(result, RESULT_FIELDS, f"{name}: RESULT")
                facts.conflicts += conform(
                    object_of(result, "trainer"), RESULT_FIELDS, f"{name}: RESULT trainer"
                )
                facts.results.append(result)
            except ValueError as error:
                facts.conflicts.append(f"{cited}: not JSON, so truncated or altered ({str(error)[:60]})")
        elif len(line) <= LINE_LIMIT:
            read_line(line, body, cited, facts)


def read_line(line: str, body: bool, cited: str, facts: LogFacts) -> None:
    """Collect the facts of a line; `body` says whether it follows the line with model_params."""
    found = facts.found
    if body and (scored := SCORE_LINE.match(line) or BPB_LINE.match(line)):
        add_score(facts, scored, cited)
        return
    for where, pattern in LINES:
        if (body or where == "any") and (match := pattern.match(line)):
            told = {key: value for key, value in match.groupdict().items() if value is not None}
            try:
                told = {key: value_of(key, value) for key, value in told.items()}
            except ValueError:
                facts.conflicts.append(f"{cited}: a number that is out of range")
                continue
            if told.get("seed", found.get("seed")) != found.get("seed", told.get("seed")):
                facts.conflicts.append(f"two seeds in one log: {facts.cite('seed')}; {cited}")
            found |= told
            facts.evidence |= dict.fromkeys(told, cited)
    if "steps" not in found and (match := SETTING.match(line)):
        facts.settings[(match[1] or match[3]).lower()] = match[2] if match[1] else match[4]
    elif "steps" not in found and body and PAIRS.match(line):
        facts.settings |= dict(re.split("[:=]", pair, maxsplit=1) for pair in line.split(" "))


def value_of(name: str, text: str) -> int | float | str:
    """Return the value of a fact. ValueError if it is out of range."""
    if name in TEXTS:
        return text
    digits = text.replace(",", "")
    value = int(digits) if name in COUNTS and len(digits) <= 20 else float(digits)
    if not (is_whole(value) if name in COUNTS else 0 <= value <= 1e12):
        raise ValueError(f"{name} {text[:40]} is out of range")
    return value


def add_score(facts: LogFacts, match: re.Match, cited: str) -> None:
    """Append a score, or merge it with the same evaluation printed earlier with other digits."""
    told, source = match.groupdict(), cited.partition(":")[0]
    timed = EVAL_TIME.search(told["tail"])
    seconds = float(timed[1].replace(",", "")) / (1000 if timed[2] == "ms" else 1) if timed else None
    seconds = seconds if seconds is None or 0 <= seconds < 1e9 else None
    loss, bpb = (told.get(key) and float(told[key].replace(",", "")) for key in ("loss", "bpb"))
    loss, bpb = (math.inf if value and value > MOST_NATS else value for value in (loss, bpb))
    decimals, adapts = len(told["bpb"].partition(".")[2]), "ttt" in f"{told['label']}{told['tail']}".lower()
    new = Score(told["label"].strip(), loss, bpb, seconds, min(decimals, 16), cited, source, adapts)
    for index, old in enumerate(facts.scores):
        if (
            new.label.removesuffix("_exact") != old.label.removesuffix("_exact")
            or loss is old.val_loss is None
        ):
            continue
        losses = abs(old.val_loss - loss) if loss is not None and old.val_loss is not None else math.inf
        if max(losses, abs(old.val_bpb - bpb)) < 0.51 * 10.0 ** -min(old.decimals, new.decimals):
            better = max(old, new, key=lambda score: score.decimals)
            facts.scores[index] = replace(better, seconds=old.seconds if seconds is None else seconds)
            return
    facts.scores.append(new)
    del facts.scores[:-MOST_SCORES]


def set_facts(facts: LogFacts) -> None:
    """Set the facts from RESULT, else from the lines; what no line says, from others."""
    found, settings, result = facts.found, facts.settings, facts.result
    for key, *names in (("seed", "seed", "s"), ("model_params", "params")):
        told = next((settings[name] for name in names if settings.get(name, "").isdecimal()), "")
        if key not in found and 0 < len(told) <= 18:
            found[key] = int(told)
    counted = "bytes_packed" if "bytes_packed" in found else "bytes_source"
    found["bytes_code"], facts.evidence["bytes_code"] = found.get(counted), facts.evidence.get(counted, "")
    if "bytes_total" not in found and "bytes_unlabeled" in found:
        found["bytes_total"], facts.evidence["bytes_total"] = (
            found["bytes_unlabeled"], facts.evidence["bytes_unlabeled"])  # fmt: skip
    if "train_minutes" in found and "stopped" not in found:
        found["train_ms"] = 60_000 * found["train_minutes"]
    for key in COUNTS:
        if hasattr(facts, key):
            setattr(facts, key, result.get(key, found.get(key)))
    facts.seed = file_seed(facts) if facts.seed is None else facts.seed
    facts.stopped, facts.dataset = found.get("stopped"), found.get("dataset")
    facts.tokenizer = found.get("tokenizer") or settings.get("tokenizer_path")
    facts.hessian_seconds, loop_ms = found.get("hessian_seconds"), found.get("train_ms")
    facts.train_seconds = result.get("train_seconds", loop_ms / 1000 if loop_ms else None)
    facts.step_avg_ms = result.get("step_avg_ms", loop_ms / facts.steps if loop_ms and facts.steps else None)
    code, model, total = facts.bytes_code, facts.bytes_model, facts.bytes_total
    if total is None and None not in (code, model):
        facts.bytes_total = code + model
        facts.evidence["bytes_total"] = f"{facts.cite('bytes_code')}; {facts.cite('bytes_model')}"
    elif model is None and None not in (code, total):
        facts.bytes_model = max(total - code, 0)


def file_seed(log: LogFacts) -> int | None:
    match = re.search(r"seed[_-]?(\d{1,18})", log.paths[0].name)
    return int(match[1]) if match else None


def fold_results(facts: LogFacts) -> dict[str, Any]:
    """Merge the evaluator's RESULT into the trainer's; a lone evaluator's RESULT contains the trainer's."""
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


def choose_headline(facts: LogFacts) -> None:
    """Choose the last score of the artifact; a label with the values of an earlier one is its alias."""
    for name, label in RESULT_SCORES:
        loss, bpb = facts.result.get(f"val_loss_{name}"), facts.result.get(f"val_bpb_{name}")
        if not facts.scores and loss is not None and bpb is not None:
            facts.scores = [Score(label, loss, bpb, None, 16, f"{facts.name}: RESULT val_bpb_{name}",
                                  adapts=name == "ttt")]  # fmt: skip
    first: dict[tuple[float | None, float], Score] = {}
    for score in facts.final_scores():
        known = first.setdefault((score.val_loss, score.val_bpb), score)
        facts.choose(known)
        if known is not score:
            facts.aliases[score.label] = known.label


def contradictions(facts: LogFacts, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences between the RESULT line and other lines of the log."""
    result, name = facts.result, facts.name
    for key in ("seed", "model_params", "bytes_code", "bytes_model", "bytes_total"):
        if key in result and found.get(key) is not None and result[key] != found[key]:
            yield f"{name}: RESULT has {key} {result[key]}, but {facts.cite(key)}"
    if found.get("steps", 0) > result.get("steps", math.inf):
        yield f"{name}: RESULT has steps {result['steps']}, but {facts.cite('steps')}"
    if found.get("train_ms", 0) / 1000 > result.get("train_seconds", math.inf) + 0.5:
        yield f"{name}: RESULT has train_seconds {result['train_seconds']:.3f}, but {facts.cite('train_ms')}"
    for key, label in (*RESULT_SCORES, ("ttt", "invalid_ttt")):
        for unit in ("val_bpb", "val_loss"):
            told = result.get(f"{unit}_{key}")
            for score in facts.scores if told is not None else ():
                value = getattr(score, unit)
                if score.label == f"{label}_exact" and (value is None or not abs(told - value) <= 1e-7):
                    yield f"{name}: RESULT has {unit}_{key} {told:.8f}, but {score.line}"


# ------------------------------------------------------------------------------------------------------------
# Reading a record
# ------------------------------------------------------------------------------------------------------------

MOST_FILES = 10_000  # of a folder
CLAIM_FIELDS = {
    "seed_results": OBJECT,
    "seeds": Field("a list or an object", lambda value: isinstance(value, list | dict)),
    "name|author|github_id|date|track": TEXT,
    "challenge_run": FLAG,
}
MANIFEST_FIELDS = {
    "splits": OBJECT,
    "shards": Field("a list of objects of texts and numbers", lambda value: isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("sha256", ""), str) for each in value)),
}  # fmt: skip


@dataclass
class Record:
    """A record folder, a run of this repository, or a single log.

    `claims` is submission.json with floats as Decimal; `claimed_in` is the file they are from. `unused` has a
    line about each log, and each run in a log, that is not one of `runs`.
    """

    path: Path
    kind: str  # "folder", "run" or "log"
    runs: list[LogFacts] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    claims: dict[str, Any] = field(default_factory=dict)
    claimed_in: str = ""
    problems: list[str] = field(default_factory=list)
    readme: str = ""
    files: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)
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
        return Record(path, "log", [read_lone_log(path)])
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    record = Record(path, "folder")
    list_files(record)
    names = {each.name for each in record.files if each.parent == path}
    if not any(re.search(r"\.(log|txt)$|^submission.*\.json$|^train_gpt\.py$", name) for name in names):
        raise ValueError(
            f"{path} is no record, run or log: no log, train_gpt.py or submission.json lies in it"
        )
    manifest = path / "manifest.json"
    record.manifest = read_claims(manifest, record.problems, MANIFEST_FIELDS) if manifest.exists() else {}
    if "train.log" in names and {"config.json", "result.json"} & {each.name for each in record.files}:
        read_run_folder(record, mode)
        return record
    record.runs = gather_runs(record)
    found = sorted(path.glob("submission*.json"), key=lambda p: p.name != "submission.json")
    if found:
        record.claims, record.claimed_in = read_claims(found[0], record.problems, CLAIM_FIELDS), found[0].name
    pages = [each for each in record.files if each.name.lower() == "readme.md"]
    record.readme = "\n".join(
        read_text(each, TEXT_LIMIT) for each in pages if each.stat().st_size <= TEXT_LIMIT
    )
    select_runs(record)
    return record


def read_lone_log(path: Path) -> LogFacts:
    """Read a file given as a log. ValueError if it is none."""
    with open(path, "rb") as file:
        content = file.read(4096)
    if content.startswith(b"\x89PNG") or (content.lstrip()[:1] == b"{" and path.suffix == ".json"):
        raise ValueError(f"{path} is not a training log. Pass a log, or a record's or a run's folder.")
    facts = read_log(path)
    if not (facts.evidence.keys() & LOGGED or facts.scores or facts.results or facts.conflicts):
        raise ValueError(
            f"{path} has no line of a training log. Pass a log, or a record's or a run's folder."
        )
    return facts


LOGGED = {"steps", "model_params", "train_ms", "bytes_model", "bytes_total", "bytes_source", "val_tokens"}


def list_files(record: Record) -> None:
    """List the files of a record's folder. ValueError if there are too many."""
    for each in record.path.rglob("*"):
        if each.is_file():
            record.files.append(each)
        elif not each.is_dir():
            record.special.append(each)
        if len(record.files) > MOST_FILES:
            raise ValueError(
                f"{record.path} has more than {MOST_FILES} files. Pass the folder of one record."
            )
    record.files.sort()
    record.code = [p for p in record.files if p.suffix == ".py"]
    record.artifacts = [p for p in record.files if p.suffix == ".ptz"]


def read_run_folder(record: Record, mode: str) -> None:
    """Read the logs of a run of this repository, with its evaluation in `mode`."""
    record.kind, path = "run", record.path
    evaluated = evaluation_folder(path, mode)
    logs = [path / "train.log", evaluated / "eval_ttt.log"]
    record.runs = [read_log(*(log for log in logs if log.exists()))]
    others = path / "eval"
    record.files = [f for f in record.files if not f.is_relative_to(others) or f.is_relative_to(evaluated)]


def read_claims(
    path: Path, problems: list[str], fields: Mapping[str, Field] = CLAIM_FIELDS
) -> dict[str, Any]:
    """Return the JSON object of a file without what is not what `fields` say, and append the problems."""
    try:
        found = read_object(path, decimals=True)
    except ValueError as error:
        problems.append(str(error))
        return {}
    problems += conform(found, fields, path.name)
    return found


def gather_runs(record: Record) -> list[LogFacts]:
    """Return one LogFacts per training run: evaluator logs join the trainer log of their artifact or seed."""
    not_logs = re.compile(r"requirements|certificate|readme|license", re.IGNORECASE)
    runs, evaluations = [], []
    for path in (p for p in record.files if p.suffix in (".log", ".txt") and not not_logs.match(p.name)):
        try:
            last = read_log(path)
        except ValueError as error:
            record.problems.append(str(error))
            continue
        parts = [*(read_log(path, part=i) for i in range(last.parts - 1)), last]
        runs += [log for log in parts if "steps" in log.evidence or (log.result and not log.scores)]
        evaluations += [log for log in parts if "steps" not in log.evidence and log.scores]
        if path.suffix == ".log" and not any(log in runs or log in evaluations for log in parts):
            record.unused.append(f"{path.name} is no log of a run")
    for log in evaluations:
        key = log.result.get("sha256_artifact")
        waiting = [r for r in runs if "val_bpb_ttt" not in r.result]
        same = [r for r in waiting if key and r.result.get("sha256_artifact") == key]
        same = same or [r for r in waiting if log.seed is not None and r.seed == log.seed
                        and not r.result.get("sha256_artifact")]  # fmt: skip
        if same:
            runs[runs.index(same[0])] = read_log(*same[0].paths, *log.paths, part=same[0].part)
        elif key or log.seed is not None or not runs:
            runs.append(log)
        else:
            record.unused.append(f"{log.name} has scores of no run: no seed, no artifact")
    return runs


def select_runs(record: Record) -> None:
    """Choose, among runs and evaluations, those that submission.json claims; name the others in `unused`.

    Reruns, other experiments and other passes are kept apart in this way. Runs of a claimed setting are never
    left out by their scores: a choice is by seed, if submission.json has a score for each, or by settings.
    """
    runs: list[LogFacts] = []
    for run in record.runs:
        same = [r for r in runs if run.headline and (r.seed, r.val_bpb) == (run.seed, run.val_bpb)]
        record.unused += [f"{run.name} repeats {twin.name}: seed {run.seed}" for twin in same]
        runs += [] if same else [run]
    record.runs = runs
    claimed = {
        seed: entry["val_bpb"]
        for seed, entry in seed_claims(record).items()
        if is_number(entry.get("val_bpb"))
    }
    fits = {run.name for run in runs if run.seed in claimed and claim_pass(run, claimed[run.seed])}
    settled = {run.seed for run in runs if run.name in fits}
    keep(record, [run for run in runs if run.seed not in settled or run.name in fits])
    claim = record.claims.get("val_bpb")
    if is_number(claim):  # an attempt without a score, in the log of a run with one
        scored = {run.paths[0] for run in record.runs if run.headline}
        keep(record, [run for run in record.runs if run.headline or run.paths[0] not in scored])
    values = record.values("val_bpb")
    if not is_number(claim) or not values or agrees(claim, mean(values), decimals=4):
        return
    for group in groups_of_runs(record.runs):
        for label in {score.label: None for run in group for score in run.final_scores()}:
            passes = [next((s for s in run.final_scores() if s.label == label), None) for run in group]
            if None not in passes and agrees(claim, mean(s.val_bpb for s in passes), decimals=4):
                for run, score in zip(group, passes, strict=True):
                    run.choose(score)
                keep(record, group)
                return


def claim_pass(run: LogFacts, claim: Any) -> bool:
    """Make the score that agrees with a claim the headline; return whether there is one."""
    scores = [score for score in run.final_scores() if agrees(claim, score.val_bpb, decimals=4)]
    if scores and run.headline not in scores:
        run.choose(scores[-1])
    return bool(scores)


def keep(record: Record, runs: Sequence[LogFacts]) -> None:
    """Keep some runs of a record and name the others."""
    for run in record.runs:
        if not any(run is each for each in runs):
            shown = "no score" if run.val_bpb is None else f"val_bpb {run.val_bpb:.5f}"
            record.unused.append(f"{run.name} is not what submission.json claims: seed {run.seed}, {shown}")
    record.runs = list(runs)


def groups_of_runs(runs: Sequence[LogFacts]) -> Iterator[Sequence[LogFacts]]:
    """Yield all runs, then those of equal settings, then one run of each seed in every combination."""
    yield runs
    groups: dict[tuple, list[LogFacts]] = {}
    for run in runs:
        shared = {key: value for key, value in run.settings.items() if not OWN_SETTINGS.fullmatch(key)}
        groups.setdefault((run.model_params, *sorted(shared.items())), []).append(run)
    yield from groups.values()
    by_seed: dict[int | None, list[LogFacts]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    if math.prod(map(len, by_seed.values())) <= 64:
        yield from map(list, product(*by_seed.values()))


# ------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------


class Test(NamedTuple):
    """Result of a one-sided test that the new scores are lower; `t` is below 0 if their mean is."""

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


def better_or_worse(nats: float, bpb: float, other: str) -> str:
    """Return a gain over `other` in words; a negative gain is a loss."""
    return f"{abs(nats):.5f} nats = {abs(bpb):.5f} bpb {'better' if nats >= 0 else 'worse'} than {other}"


def text_bytes(run: LogFacts) -> tuple[float, float] | None:
    """Return the bytes of a run's validation text and their relative error; None if the log lacks them."""
    score = run.headline
    if (
        not run.val_tokens
        or not score
        or not all(0 < (v or 0) < math.inf for v in (score.val_loss, score.val_bpb))
    ):
        return None
    return run.val_tokens / score.tokens_per_byte, RATIO_TOLERANCE + score.rounding


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
    return math.log(2) / mean(run.headline.tokens_per_byte for run in record.runs if run.val_loss)


# ------------------------------------------------------------------------------------------------------------
# Rules on files and claims
# ------------------------------------------------------------------------------------------------------------

STATUSES = ("fail", "off", "warn", "note", "pass")  # broken rule or claim, claim off by its last digit, ...
REQUIRED_KEYS = {"name": str, "author": str, "github_id": str, "date": str, "val_bpb": (int, Decimal)}
USUAL_KEYS = ("blurb", "bytes_total", "track", "seeds", "val_loss")
CLAIMS = {  # key of submission.json or of a seed's entry, without mean, max, std: fact, factor, slack
    "val_bpb": ("val_bpb", 1, 0), "val_loss": ("val_loss", 1, 0),
    "artifact_bytes": ("bytes_total", 1, 0), "bytes_total": ("bytes_total", 1, 0),
    "bytes_code": ("bytes_code", 1, 0), "code_bytes": ("bytes_code", 1, 0),
    "bytes_model": ("bytes_model", 1, 0), "model_params": ("model_params", 1, 0),
    "steps": ("steps", 1, 0), "train_steps": ("steps", 1, 0), "step_stop": ("steps", 1, 0),
    "step_avg_ms": ("step_avg_ms", 1, 0), "ms_per_step": ("step_avg_ms", 1, 0),
    "train_time_s": ("train_seconds", 1, 0.05), "train_time_ms": ("train_seconds", 1000, 50),
    "wallclock_seconds": ("train_seconds", 1, 0.05),
    "eval_time_s": ("eval_seconds", 1, 0.05), "eval_time_ms": ("eval_seconds", 1000, 50),
    "ttt_eval_time_s": ("eval_seconds", 1, 0.05), "ttt_time_ms": ("eval_seconds", 1000, 50),
}  # fmt: skip
SCORE_DECIMALS = 4  # a score with fewer digits counts as exact


class Derived(NamedTuple):
    """What the logs say of a claim: the value, how it is derived, other values that support the claim."""

    value: float
    words: str
    others: list[float] = []  # noqa: RUF012


def digits_of(claim: Any, decimals: int) -> int:
    """Return the power of ten of the last digit that a claim gives, of at least `decimals` decimals."""
    return min(claim.as_tuple().exponent if isinstance(claim, Decimal) else 0, -decimals)


def agrees(claim: Any, value: float, slack: float = 0.0, decimals: int = 0) -> bool:
    """Return whether a claim is `value` rounded to the claim's digits, or to `decimals` if that is more."""
    return abs(float(claim) - value) <= 0.501 * 10.0 ** digits_of(claim, decimals) + slack


def is_near(claim: Any, value: float, decimals: int = 0) -> bool:
    """Return whether a claim is off by its last digit (a score by one, others by two), or rounded."""
    zeros = len(str(claim)) - len(str(claim).rstrip("0")) if isinstance(claim, int) and claim else 0
    rounded, units = 0.501 * 10.0**zeros if zeros else 0.0, 1.01 if decimals else 2.01
    return abs(float(claim) - value) <= max(units * 10.0 ** digits_of(claim, decimals), rounded)


def seed_claims(record: Record) -> dict[int, dict[str, Any]]:
    """Return the per-seed entries of submission.json."""
    for entries in (record.claims.get("seed_results"), record.claims.get("seeds")):
        if isinstance(entries, dict):
            return {int(key): entry for key, entry in entries.items()
                    if re.fullmatch(r"\d{1,20}", key) and isinstance(entry, dict)}  # fmt: skip
    return {}


def claimed_seeds(record: Record) -> list[int]:
    seeds = record.claims.get("seeds")
    return (
        [seed for seed in seeds if is_whole(seed)] if isinstance(seeds, list) else list(seed_claims(record))
    )


def check_files(record: Record) -> Iterator[Finding]:
    names, folder = {p.name for p in record.path.iterdir()}, record.path.resolve().name
    files = {p.name: p for p in record.files if p.parent == record.path}
    for name in ("README.md", "submission.json", "train_gpt.py"):
        if name not in files:
            stem, suffix = name.split(".")
            others = sorted(other for other in files if re.fullmatch(rf"{stem}\w+\.{suffix}", other))
            told = f"; {', '.join(others)} is read" if others else ""
            yield "fail", f"{folder}/ has no {name}" + (" that is a regular file" * (name in names)) + told
        elif not files[name].stat().st_size:
            yield "fail", f"{name} is empty"
    if not record.runs:
        yield "fail", f"no training log in {folder}/"
    if special := [str(path.relative_to(record.path)) for path in record.special]:
        yield "warn", f"links to nothing, pipes or devices, which are not read: {', '.join(special[:9])}"
    if not re.fullmatch(r"\d{4}-(0\d|1[0-2])-([0-2]\d|3[01])_.+", folder):
        yield "fail", f"the folder name {folder} does not have the form YYYY-MM-DD_Description"
    elif re.search(r"[^\w.+,=-]", folder):
        yield "warn", f"the folder name {folder!r} contains spaces or special characters"
    yield "pass", ", ".join(sorted(names))


def check_json(record: Record) -> Iterator[Finding]:
    yield from (("fail", problem) for problem in record.problems)
    if not record.claimed_in or (record.problems and not record.claims):  # check_files or a problem says so
        return
    name = record.claimed_in
    for key, kind in REQUIRED_KEYS.items():
        value = record.claims.get(key)
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or (key == "val_bpb" and not is_number(value))
        ):
            yield "fail", f"{name}: {key} is {record.claims.get(key, 'missing')}"
    if not re.match(r"\d{4}-\d\d-\d\d", str(record.claims.get("date", "2026-01-01"))):
        yield "fail", f"{name}: date {record.claims['date']} is not an ISO date"
    if missing := [key for key in USUAL_KEYS if key not in record.claims]:
        yield "warn", f"{name} lacks usual keys: {', '.join(missing)}"
    yield "pass", f"{name}: {len(record.claims)} keys"


def core_of(key: str) -> tuple[str, Callable]:
    """Return a claim's key without mean, max and std, and how the values of the seeds are combined."""
    core = re.sub("^mean_|_(mean|max|std)$", "", key)
    core = "bytes_model" if core.startswith("bytes_model_") else core  # the rest is the coder's name
    largest = core.removeprefix("artifact_").startswith(("bytes", "code_bytes", "model_params"))
    if key.endswith("_std"):
        return core, stdev
    return core, max if key.endswith("_max") or (largest and "mean" not in key) else mean


def value_claimed(run: LogFacts, core: str) -> Derived | None:
    """Return what a run's logs say of a claim; None if they say nothing."""
    if match := re.fullmatch(r"(\w+)_val_(bpb|loss)", core):  # of a pass that the key names
        plain = {score.label.lower().replace("-", "_"): score for score in run.scores}
        passes = [getattr(score, f"val_{match[2]}") for label, score in plain.items() if match[1] in label]
        passes = [value for value in passes if value is not None]
        return Derived(passes[-1], run.name, passes) if passes else None
    fact, factor, _ = CLAIMS.get(core, ("", 1, 0))
    value = getattr(run, fact, None)
    if value is None or not math.isfinite(value):
        return None
    others = (
        [score.seconds for score in run.scores] + [run.eval_all_seconds] if fact == "eval_seconds" else []
    )
    others += [TIME_LIMIT] if core == "wallclock_seconds" else []  # the key may mean the limit
    return Derived(factor * value, run.name, [factor * other for other in others if other is not None])


def judge(key: str, claim: Any, derived: Derived) -> Finding:
    """Compare a claim with what the logs say."""
    core, _ = core_of(key)
    decimals = SCORE_DECIMALS if re.search("val_(bpb|loss)$", core) and not key.endswith("std") else 0
    slack = CLAIMS.get(core, ("", 1, 0))[2]
    if any(agrees(claim, value, slack, decimals) for value in (derived.value, *derived.others)):
        return "pass", f"{key} {claim}: {derived.words}"
    status = "off" if is_near(claim, derived.value, decimals) else "fail"
    return status, f"{key} is {claim} in submission.json, {derived.value:.10g} in {derived.words}"


def check_claims(record: Record) -> Iterator[Finding]:
    """Check each number of submission.json against the logs, rounded to its digits."""
    if record.claims.get("challenge_run") is True and (found := deviations(record.runs)):
        yield "fail", f"challenge_run is true in submission.json, but the logs show: {'; '.join(found)}"
    entries, by_seed = seed_claims(record), {run.seed: run for run in record.runs}
    for seed, entry in entries.items():
        for key, claim in entry.items():
            derived = value_claimed(by_seed[seed], core_of(key)[0]) if seed in by_seed else None
            if derived and is_number(claim):
                status, told = judge(key, claim, derived)
                yield status, f"seed {seed}: {told}"
    for key, claim in record.claims.items():
        core, combine = core_of(key)
        derived = [value_claimed(run, core) for run in record.runs] if is_number(claim) else []
        if derived and None not in derived and len(derived) > (combine is stdev):
            yield compare_claim(record, key, claim, derived)


def compare_claim(record: Record, key: str, claim: Any, derived: Sequence[Derived]) -> Finding:
    """Compare a claim about all seeds with the logs, and say which other number it is."""
    core, combine = core_of(key)
    values, entries = [each.value for each in derived], seed_claims(record)
    words = f"{combine.__name__} of {len(values)} logs"
    others = [other for each in derived for other in each.others if each.value != other]
    others += [mean(values)] if combine is max else []
    lost = sorted(set(claimed_seeds(record)) - {run.seed for run in record.runs})
    fact = CLAIMS.get(core, ("",))[0]
    keys = [name for name, (its, factor, _) in CLAIMS.items() if its == fact and factor == 1]
    unlogged = [[entry[key] for key in keys if is_number(entry.get(key))][:1] for seed in lost
                if (entry := entries.get(seed))]  # fmt: skip
    if unlogged := [value for values in unlogged for value in values]:
        others.append(combine([*values, *map(float, unlogged)]))
    status, told = judge(key, claim, Derived(combine(values), words, others))
    if status != "fail":
        return status, told
    if combine is stdev and agrees(claim, pstdev(values)):
        return (
            "warn",
            f"{key} {claim} is the population standard deviation; the sample one is {stdev(values):.6f}",
        )
    if lost:
        return "warn", f"{told}; seeds {lost} have no log, so it cannot be recomputed"
    if combine is not stdev and any(judge(key, claim, each)[0] == "pass" for each in derived):
        return "warn", f"{told}; it is the value of a single seed"
    if core in ("bytes_code", "code_bytes") and (
        same := [p.name for p in record.code if p.stat().st_size == claim]
    ):
        return "warn", f"{told}; it is the size of {same[0]} as shipped"
    return status, told


def check_seeds(record: Record) -> Iterator[Finding]:
    runs, claimed = record.runs, claimed_seeds(record)
    seeds = sorted({run.seed for run in runs} - {None})
    if len(seeds) < MIN_SEEDS:
        yield "fail", f"{len(seeds)} distinct seeds in the logs, at least {MIN_SEEDS} are required: {seeds}"
    for seed, count in Counter(run.seed for run in runs if run.seed is not None).items():
        if count > 1:
            names = ", ".join(run.name for run in runs if run.seed == seed)
            yield "fail", f"seed {seed} occurs twice, with different scores: {names}"
    if unknown := [run.name for run in runs if run.seed is None]:
        yield "warn", f"no line and no name tells the seed of {', '.join(unknown)}"
    for bpb, count in Counter(record.values("val_bpb")).items():
        if count > 1:
            names = ", ".join(run.name for run in runs if run.val_bpb == bpb)
            yield "fail", f"several seeds have the same score {bpb:.8f}, so one is a copy: {names}"
    for run in runs:
        if file_seed(run) not in (None, run.seed):
            yield "fail", f"{run.name} is named for seed {file_seed(run)}, but {run.cite('seed')}"
    yield from (("warn", told) for told in record.unused)
    if len(set(claimed)) < len(claimed):
        yield "fail", f"submission.json lists a seed twice: {claimed[:99]}"
    if seeds and (lost := sorted(set(claimed) - set(seeds))):
        yield "fail", f"submission.json lists seeds {lost[:99]}, but the logs have {seeds}"
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
    "bytes_code",
    "bytes_model",
    "val_tokens",
)


def check_log(record: Record) -> Iterator[Finding]:
    for run in record.runs:
        yield from (("fail", conflict) for conflict in run.conflicts)
        if missing := [key for key in WANTED if getattr(run, key) is None]:
            yield "warn", f"{run.name}: the log does not report {', '.join(missing)}"
        if record.kind != "folder" and run.parts > 1:
            yield "warn", f"{run.name}: the log holds {run.parts} runs, and this one is judged"
        if run.headline is None:
            yield "fail", f"{run.name}: no line with a final score"
        elif not 0 < run.headline.val_bpb < math.inf:
            yield "fail", run.headline.line
        else:
            also = "".join(f"; {label} is an alias of {first}" for label, first in run.aliases.items())
            yield "pass", run.headline.line + also
            last = run.final_scores()[-1]
            if last.val_bpb > run.headline.val_bpb and run.headline.label not in run.aliases.values():
                yield "warn", f"the claimed pass is not the last one: {run.headline.line}; then {last.line}"
            if "diagnostic" in run.headline.label:
                yield "warn", f"the only score of the artifact is called diagnostic: {run.headline.line}"


def check_settings(record: Record) -> Iterator[Finding]:
    for run in record.runs[1:]:
        first, own = record.runs[0].settings, run.settings
        other = sorted(
            k for k in first.keys() & own.keys() if first[k] != own[k] and not OWN_SETTINGS.fullmatch(k)
        )
        if other:
            shown = ", ".join(f"{key} {first[key]} and {own[key]}" for key in other[:20])
            yield "fail", f"{record.runs[0].name} and {run.name} have different settings: {shown}"
    yield "pass", f"{len(record.runs[0].settings) if record.runs else 0} settings are the same in all logs"


def check_code(record: Record) -> Iterator[Finding]:
    """Check that all logs have the same code and that the shipped files are that code."""
    hashed = [(run.name, r["sha256_code"]) for run in record.runs for r in run.results if "sha256_code" in r]
    shipped = {p.name: digest(p) for p in record.code}
    for name, code in hashed:
        if changed := sorted(k for k in code if code[k] != hashed[0][1].get(k)):
            yield "fail", f"{', '.join(changed)} changed between {hashed[0][0]} and {name} (sha256_code)"
        for file in code if shipped or record.kind == "folder" else ():
            if shipped.get(file) != code[file]:
                what = "as shipped is not what" if file in shipped else "is not shipped, but"
                yield "fail", f"{file} {what} ran in {name} (sha256 {code[file][:12]}..)"
    if len({tuple(run.sources) for run in record.runs if run.sources}) > 1:
        plain = {"".join("".join(run.sources).split()) for run in record.runs if run.sources}
        status, how = ("fail", "") if len(plain) > 1 else ("off", ", only in blanks")
        yield status, f"the source printed in the logs changed between seeds{how}"
    sizes = sorted(set(record.values("bytes_source")))
    if len(sizes) > 1:
        told = "; ".join(run.cite("bytes_source") for run in record.runs)
        yield ("off" if sizes[-1] - sizes[0] <= FEW_BYTES else "fail"), f"code changed between seeds: {told}"
    if record.code and record.kind == "folder" and not hashed:
        yield from check_code_size(record)
    yield "pass", f"{len(hashed)} logs have the same code, size {sizes}"


FEW_BYTES = 16  # of difference between two versions of a program that count as the same but for a detail


def check_code_size(record: Record) -> Iterator[Finding]:
    """Check that a shipped program has the size that logs without hashes count."""
    programs = {path.name: read_program(path).sizes for path in record.code}
    sizes = {size: f"{name} has {size}" for name, own in programs.items() for size in own}
    sizes.setdefault(sum(own[0] for own in programs.values()), "all of them have more or less")
    for run in record.runs:
        nearest = min(sizes, key=lambda own: abs(own - (run.bytes_source or own)))
        if run.bytes_source not in (None, nearest):
            told = f"no shipped program has the bytes that the log counts, {sizes[nearest]}"
            status = "off" if abs(nearest - run.bytes_source) <= FEW_BYTES else "fail"
            yield status, f"{told}: {run.cite('bytes_source')}"


def main_programs(record: Record) -> list[Path]:
    """Return the programs that logs count: hashed in RESULT, else of the logged size, else train_gpt.py."""
    named = {name for run in record.runs for r in run.results for name in r.get("sha256_code", ())}
    files = {path.name: path for path in record.code}
    if not named and record.kind == "folder":
        sizes = {size for run in record.runs for size in (run.bytes_code, run.bytes_source)}
        same = [path for path in record.code if path.stat().st_size in sizes]
        named = {path.name for path in same[:1]}
    return [files[name] for name in sorted(named or {"train_gpt.py"}) if name in files]


def imported_files(record: Record, programs: Sequence[Path]) -> list[Path]:
    """Return the other Python files of the record that programs import, directly or through one another."""
    files, reached = {path.stem: path for path in record.code}, list(programs)
    for path in reached:
        reached += [
            files[name]
            for name in sorted(read_program(path).modules & files.keys())
            if files[name] not in reached
        ]
    return [path for path in reached if path not in programs]


def read_files(record: Record) -> tuple[list[Path], list[Path]]:
    """Return the files that count too, because the programs import or name them, and all other files.

    Neither list contains the programs themselves or artifacts hashed in the logs. Logs, pages,
    submission.json and certificates are in the first list if a program names them, otherwise in neither.
    """
    root = record.path / "source" if record.kind == "run" else record.path
    main, scored = main_programs(record), {run.result.get("sha256_artifact") for run in record.runs}
    modules_of = imported_files(record, main)
    programs = [read_program(path) for path in (*main, *modules_of)]
    modules, said = (
        {name for each in programs for name in each.modules},
        [t for each in programs for t in each.texts],
    )
    told = {path.name for run in record.runs for path in run.paths} | {"README.md", "submission.json"}
    told |= {line.partition(" ")[0] for line in record.unused}
    used, others = [], []
    for path in (p for p in record.files if p.is_relative_to(root) and p not in main):
        inside = path.relative_to(root)
        if path in record.artifacts and digest(path) in scored:
            continue
        module = inside.parts[0].partition(".")[0]
        code = len(inside.parts) > 1 or inside.suffix in (".py", ".pyc", ".so", ".pyd")
        spelled = re.compile(rf"(?<![\w-]){re.escape(path.name)}(?![\w-])")
        taken = (code and (module in modules or module in said)) or any(
            path.name in text and spelled.search(text) for text in said
        )
        page = inside.parts[0] in told or re.fullmatch(
            r"certificate.*\.(txt|json)|requirements\.txt", inside.parts[0]
        )
        if taken or path in modules_of:
            used.append(path)
        elif not page:
            others.append(path)
    return used, others


def check_sizes(record: Record) -> Iterator[Finding]:
    """Check that logged sizes add up, match the files, and stay under the cap however they are counted."""
    programs, (used, others) = main_programs(record), read_files(record)
    for what, group in (("not counted, but the programs name or import", used), ("not counted", others)):
        if group:
            shown = [f"{p.relative_to(record.path)} ({p.stat().st_size} bytes)" for p in group[:50]]
            yield "warn", f"{what}: {', '.join(shown)}" + f" and {len(group) - 50} more" * (len(group) > 50)
    for program in map(read_program, programs):
        if others and not (program.tree or program.texts or program.modules):
            yield "warn", f"{program.problem}, so whether it reads the files that are not counted is unknown"
    for run in record.runs:
        if run.bytes_total is None or (run.bytes_model is None and record.kind == "run"):
            lacking = "code" if run.bytes_code is None else "the model"
            yield "warn", f"{run.name}: the log does not report the size of {lacking}"
            continue
        yield from check_sums(run, programs, used)


def check_sums(run: LogFacts, programs: Sequence[Path], used: Sequence[Path]) -> Iterator[Finding]:
    """Check the sizes of one run: `programs` are counted, `used` are other files that they name or import."""
    code, model, total = run.bytes_code, run.bytes_model, run.bytes_total
    shipped, is_packed = sum(p.stat().st_size for p in programs), run.bytes_source not in (None, code)
    sums = {"in the log": total}
    if is_packed:
        shown = f"; the shipped programs have {shipped} bytes" * bool(programs)
        yield "warn", f"counted packed{shown}: {run.cite('bytes_code')}"
    elif programs and code is not None and shipped != code:
        told = f"{', '.join(p.name for p in programs)} have {shipped} bytes, but the log counts {code}"
        yield "off" if abs(shipped - code) <= FEW_BYTES else "fail", f"{told}: {run.cite('bytes_code')}"
    if None not in (code, model):
        counted = code if is_packed else max(shipped, code)
        sums |= {"code and model in the log": code + model, "code as shipped and model": counted + model}
        if used:
            ways = f"with {', '.join(p.name for p in used)}, which the programs name or import"
            sums[ways] = counted + model + sum(p.stat().st_size for p in used)
        if code + model != total:
            labeled = run.evidence.get("bytes_total") != run.evidence.get("bytes_unlabeled")
            yield "fail" if labeled else "warn", f"{code} + {model} != {total}: {run.cite('bytes_total')}"
    way, worst = max(sums.items(), key=lambda item: item[1])
    if worst > SIZE_CAP:
        yield "fail", f"{worst} bytes ({way}), {worst - SIZE_CAP} over {SIZE_CAP}: {run.cite('bytes_total')}"
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
        passes = f"with all passes and compilation {run.eval_all_seconds:.1f} s"
        cited = f"{run.eval_seconds:.1f} s, {passes}: {run.name}"
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
    val = object_of(object_of(record.manifest, "splits"), "val")
    tokens, size = val.get("tokens"), val.get("text_bytes")
    return float(tokens / size) if is_whole(tokens) and is_whole(size) and tokens and size else None


def check_bytes(record: Record) -> Iterator[Finding]:
    """Check the tokens per byte implied by a score's two units against the validation set."""
    for run in record.runs:
        if run.headline and run.headline.val_loss is None:
            told = "no loss beside the score, so neither tokens per byte nor the text can be checked"
            yield "warn", f"{told}: {run.headline.line}"
        yield from check_ratios(record, run)


def check_ratios(record: Record, run: LogFacts) -> Iterator[Finding]:
    """Check the tokens per byte of one run: published, else of the manifest, else equal in all scores."""
    scores = [s for s in run.scores if s.val_loss is not None and 0 < min(s.val_loss, s.val_bpb)
              and max(s.val_loss, s.val_bpb) < math.inf]  # fmt: skip
    known, own = published(run), own_ratio(record)
    for score in scores:
        ratio = score.tokens_per_byte
        expected = known.tokens_per_byte if known else own or scores[0].tokens_per_byte
        source = known.name if known else "manifest.json" if own else scores[0].line
        if abs(ratio / expected - 1) > RATIO_TOLERANCE + score.rounding:
            told = f"{ratio:.5f} tokens per byte, but {source} has {expected:.5f}"
            if tokens := run.val_tokens or (known.tokens if known else 0):
                told += f": {tokens / ratio:,.0f} bytes were counted instead of {tokens / expected:,.0f}"
            yield "fail", f"{told}: {score.line}"
        elif score is run.headline:
            shown = f"{ratio:.5f} tokens per byte: {run.name}"
            compared = ("pass", f"{source} has {shown}")
            yield compared if known or own else ("warn", f"nothing to compare with {shown}")
        if score is run.headline:
            yield from challenge_bytes(run, known, score)
            if known and own and abs(own / known.tokens_per_byte - 1) > RATIO_TOLERANCE:
                told = f"manifest.json has {own:.5f} tokens per byte, but {known.name}"
                yield "fail", f"{told} has {known.tokens_per_byte:.5f}"


def challenge_bytes(run: LogFacts, known: Published | None, score: Score) -> Iterator[Finding]:
    """Check the bytes of a text that is the challenge's by its tokens, its folder's name or its size."""
    named = "fineweb10B" in f"{run.dataset} {run.settings.get('data_path')} {run.settings.get('val_files')}"
    if run.val_tokens is None or not (known or named or run.val_tokens > MANY_TOKENS):
        return
    if known and known.num_bytes is None and is_challenge_text(run):
        return  # the first baseline's export, which check_validation warns of
    count, (low, high) = run.val_tokens / score.tokens_per_byte, CHALLENGE_BYTES
    if not low * (1 - score.rounding) <= count <= high * (1 + score.rounding):
        told = f"{run.val_tokens} tokens of {known.name if known else run.dataset or 'the validation text'}"
        limits = f"but the challenge's text has {low:,} to {high:,}"
        yield "fail", f"{told} are {count:,.0f} bytes, {limits}: {run.name}"


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
        yield from repeated_text(run)
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


def repeated_text(run: LogFacts) -> Iterator[Finding]:
    """Warn of training on few shards, as on the validation shard alone."""
    batch = run.settings.get("train_batch_tokens", "")
    if re.search("val_?only", run.dataset or ""):
        yield "warn", f"trained on {run.dataset}: {run.cite('dataset')}"
    if run.steps and run.train_shards and batch.isdecimal() and len(batch) < 12:
        epochs = run.steps * int(batch) / (run.train_shards * SHARD_TOKENS)
        if epochs > MANY_EPOCHS:
            yield "warn", f"{epochs:.0f} epochs of {run.train_shards} shards: {run.cite('train_shards')}"


def is_challenge_text(run: LogFacts) -> bool:
    """Return whether a run was scored on the challenge's text, by its bytes; True if the log lacks them.

    The first baseline's export of it has other bytes.
    """
    known, low, high = published(run), *CHALLENGE_BYTES
    if known and known.num_bytes is None and run.val_loss and run.headline:
        return abs(run.headline.tokens_per_byte / known.tokens_per_byte - 1) <= (
            RATIO_TOLERANCE + run.headline.rounding
        )
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
    if not record.values("val_loss") or not all(
        0 < v for u in ("val_bpb", "val_loss") for v in record.values(u)
    ):
        return
    factor, claims = nats_per_bpb(record), record.claims
    allowed = [factor, *(math.log(2) / p.tokens_per_byte for p in PUBLISHED)]
    text = f"{record.readme}\n{json.dumps(claims, default=str)[:TEXT_LIMIT]}"
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
    told = f"{better_or_worse(nats, bpb, against.path.name)} (t below 0: better)"
    shown = "; ".join([told, *map(str, tests)])
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
# Rules on artifact and legality
# ------------------------------------------------------------------------------------------------------------


ARTIFACT_LIMIT = 4 * SIZE_CAP


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
    for sha256 in scored:
        if len(same := [run.name for run in record.runs if run.result.get("sha256_artifact") == sha256]) > 1:
            yield "fail", f"several seeds have the same artifact {sha256[:12]}..: {', '.join(same)}"
    for path in record.artifacts:
        try:
            blob = read_file(path, ARTIFACT_LIMIT)
        except ValueError as error:
            yield "fail", str(error)
            continue
        size, sha256 = len(blob), hashlib.sha256(blob).hexdigest()
        if blob.startswith(ARTIFACT_MAGIC):
            first = blob[8:12] == b"\1\0\0\0"  # from version 2 on, the checksum covers version and coder too
            body, kept = (blob[44:], blob[12:44]) if first else (blob[8:16] + blob[48:], blob[16:48])
            if hashlib.sha256(body).digest() != kept:
                yield "fail", f"{path.name}: the checksum does not match, so the file is truncated or altered"
        elif is_pickle(blob):
            yield "fail" if scored else "warn", f"{path.name} is a pickle: reading it can execute code"
        if scored and sha256 not in scored:
            yield "fail", f"{path.name} is not the artifact that the logs scored (sha256 {sha256[:12]}..)"
        models = [scored[sha256].bytes_model] if sha256 in scored else record.values("bytes_model")
        if models and size not in models:
            yield "fail", f"{path.name} has {size} bytes, but the logs count {models}"
        yield "pass", f"{path.name}: {size} bytes, sha256 {sha256[:12]}.."


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
        if run.headline and run.headline.adapts and record.kind != "log" and not certified:
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


MOST_FINDINGS, MOST_LETTERS = 1000, 600  # of a rule, of a finding


class Verdict(NamedTuple):
    """Result of a rule: one of STATUSES, and the line or file that supports it."""

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
        own = [
            Verdict(name, status, shorten(told))
            for status, told in dict.fromkeys(islice(found, MOST_FINDINGS))
        ]
        if other_track and name in RECORD_RULES:
            own = [v._replace(status="warn") if v.status == "fail" else v for v in own]
        nothing = ("pass", "nothing to check") if record.runs else ("warn", "nothing to check without a log")
        own = own or [Verdict(name, *nothing)]
        verdicts += [verdict for verdict in own if verdict.status != "pass"] or own
    return verdicts


def shorten(evidence: str) -> str:
    return evidence if len(evidence) <= MOST_LETTERS else evidence[:MOST_LETTERS] + " ..."


def status_of(verdicts: Iterable[Verdict]) -> str:
    """Return the worst status: "fail", "off", "warn" or "pass"; notes are for the reader alone."""
    return min((v.status for v in verdicts if v.status != "note"), key=STATUSES.index, default="pass")


def alike(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return the verdicts with those that differ only in numbers and hashes, as of several seeds, as one."""
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for verdict in verdicts:
        pattern = re.sub(r"[0-9a-f]{12}\.\.|[\d.,]*\d", "0", verdict.evidence)
        groups.setdefault((verdict.rule, verdict.status, pattern), []).append(verdict)
    more = {id(group[0]): f" (and {len(group) - 1} more)" * (len(group) > 1) for group in groups.values()}
    return [v._replace(evidence=v.evidence + more[id(v)]) for v, *_ in groups.values()]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}" + ("es" if noun.endswith("s") else "s") * (number != 1)


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
    told.sort(key=lambda v: STATUSES.index(v.status))
    counts = Counter(verdict.status for verdict in verdicts)
    told_of = [counted(counts["fail"], "fault"), counted(counts["warn"], "warning")]
    told_of += [f"{counted(counts['off'], 'claim')} off by a digit"] * (counts["off"] > 0)
    told_of += [counted(counts["note"], "note")] * (counts["note"] > 0)
    told_of += [counted(counts["pass"], "pass") + " (--verbose lists them)" * (not verbose)]
    lines = [
        str(record.path),
        *tabulate([[escape(cell) for cell in row] for row in rows], headings, tablefmt="plain",
                  disable_numparse=True, colalign=sides if rows else None).splitlines(),
        *(f"{v.status}  {v.rule:14}  {v.evidence}" for v in told),
        f"{status_of(verdicts).upper()}: {', '.join(told_of)}",
    ]  # fmt: skip
    return "\n".join(map(escape, lines))


def plain(value: Any) -> Any:
    """Return facts and verdicts as JSON has them; infinities and NaN, which it has not, as text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    kept = isinstance(value, int | str | None) or (isinstance(value, float) and math.isfinite(value))
    return value if kept else str(value)


def judge_path(path: Path, arguments: argparse.Namespace, against: Record | None) -> tuple[str, Any]:
    """Return the status of a record and its report, as text or for JSON. ValueError if it is no record."""
    record = read_record(path, arguments.mode)
    record.data, record.tokenizer = arguments.data, arguments.tokenizer
    verdicts = check(record, against)
    status = status_of(verdicts)
    if not arguments.json:
        return status, report(record, verdicts, arguments.verbose)
    runs = [{key: value for key, value in asdict(run).items() if key != "sources"} for run in record.runs]
    found = [verdict._asdict() for verdict in verdicts]
    return status, plain(dict(path=record.path, kind=record.kind, status=status, runs=runs, verdicts=found))


def apart(function: Callable[[Path], Any], path: Path, seconds: float, num_bytes: int) -> tuple[Any, str]:
    """Return function(path) of a child process within limits of time and memory, and an empty text.

    In case of an error the text says what is wrong with `path`. So one bad folder cannot hide the others.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=answer, args=(function, path, num_bytes, sender), daemon=True)
    child.start()
    sender.close()
    try:
        return (
            receiver.recv() if receiver.poll(seconds) else (None, f"{path} takes more than {seconds:.0f} s")
        )
    except EOFError:
        return None, f"{path} cannot be read: the process that read it ended without an answer"
    finally:
        child.kill()
        child.join()
        receiver.close()


def answer(function: Callable[[Path], Any], path: Path, num_bytes: int, sender: Connection) -> None:
    """Send what `apart` returns."""
    if sys.platform == "linux":  # others do not limit the address space
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limits = [limit for limit in (soft, hard, used + num_bytes) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        sender.send((function(path), ""))
    except (ValueError, OSError) as error:
        sender.send((None, str(error)))
    except MemoryError:
        sender.send((None, f"{path} takes more than {num_bytes / 2**30:.0f} GiB of memory"))
    except Exception as error:  # a fault of this program, which must not hide the other records
        place = traceback.extract_tb(error.__traceback__)[-1]
        sender.send(
            (None, f"{path}: {error!r} in {Path(place.filename).name}:{place.lineno}. Please report it.")
        )


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
    limits = LIMIT_SECONDS, LIMIT_BYTES
    against, problem = apart(read_record, arguments.against, *limits) if arguments.against else (None, "")
    judge_each = partial(judge_path, arguments=arguments, against=against)
    answers = [apart(judge_each, path, *limits) for path in (() if problem else arguments.paths)]
    for _, told in [(None, problem), *answers]:
        if told:
            print(f"error: {escape(told)}", file=sys.stderr)
    judged = [answer for answer, told in answers if not told]
    if arguments.json:
        print(json.dumps([found for _, found in judged], indent=1).replace("\x7f", "\\u007f"))
    elif judged:
        print("\n\n".join(text for _, text in judged))
    if problem or len(judged) < len(answers):
        return 2
    return 1 if any(status == "fail" for status, _ in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
