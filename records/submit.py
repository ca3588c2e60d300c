"""Build a record folder from finished runs, check it, and start its program; or list all records.

    python records/submit.py runs/A runs/B runs/C --name Name --track track_10min_16mb [--against FOLDER] [...]
    python records/submit.py --table

The runs are three or more of one code, one set of settings and distinct seeds. Where eval_ttt.py scored them, that is
submitted, else the trainer's sliding score. records/TRACK/DATE_NAME/ gets README.md, submission.json, logs, the code
that ran and requirements.txt; every number is of a RESULT line or a file, scores to the eight decimals that logs print.
It appears only if all of it passed records/check.py and train_gpt.py started in it. --against is a record folder, or
the mean bpb that one published; the comparison is reported whatever it shows.
Exit code 0: written; 1: refused, every reason said; 2: the user's input.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import check

ROOT = Path(__file__).resolve().parent.parent
TRACKS = ("track_10min_16mb", "track_non_record_16mb")
MARKERS = ("<!-- records: begin -->", "<!-- records: end -->")
PER_RUN = ("run_id", "seed", "model_path")  # the loop of the README's command sets them
DATA = ("data_path", "tokenizer_path", "val_files")  # the evaluator reads them but its log does not say them
TEXT_TOLERANCE = 1e-3  # bpb; trainer and evaluator differ by far less on the same artifact, text and windows


class SubmitError(ValueError):
    """What the user can put right on the command line."""


class Refused(Exception):
    """The runs or the folder made of them break rules; the arguments are the reasons."""


# ----------------------------------------------------------------------------------------------------------------------
# Reading runs
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run: what its logs say, and its JSON files; `evaluated` is empty where eval_ttt.py did not run."""

    folder: Path
    facts: check.LogFacts
    trained: dict[str, Any]
    evaluated: dict[str, Any]
    settings: dict[str, Any]  # config.json: config, given, versions

    @property
    def seed(self) -> int:
        return self.trained["seed"]


def read_run(folder: Path) -> Run:
    """Read a run's files. Refused where they are not those of a finished run."""
    if not folder.is_dir():
        raise SubmitError(f"{folder}: no such folder")
    names = ["train.log", "result.json", "config.json"]
    names += ["eval_ttt.log", "eval_ttt.json"] if (folder / "eval_ttt.log").exists() else []
    if missing := [name for name in names if not (folder / name).exists()]:
        raise Refused(f"{folder} did not finish: it has no {', '.join(missing)}")
    try:
        read = {name: json.loads((folder / name).read_text()) for name in names if name.endswith(".json")}
        facts = check.read_record(folder).runs[0]
    except ValueError as error:
        raise Refused(f"{folder}: {error}") from error
    run = Run(folder, facts, read["result.json"], read.get("eval_ttt.json", {}), read["config.json"])
    for name in ("result.json", "eval_ttt.json"):
        if name in read and read[name] not in facts.results:
            raise Refused(f"{folder}: no RESULT line of its logs is what {name} says")
    if unsaid := [key for key in ("seed", "world_size", "sha256_code", "versions") if key not in run.trained]:
        raise Refused(f"{folder}: result.json does not say {', '.join(unsaid)}")
    return run


def own_faults(run: Run, track: str) -> list[str]:
    """What breaks a rule in one run: every fault that check.py finds, and code or scores that are not the run's."""
    record = check.read_record(run.folder)
    record.claims = {"track": track}
    faults = [f"{v.rule}: {v.evidence}" for v in check.check(record) if v.status == "fail"]
    for name, digest in run.trained["sha256_code"].items():
        path = run.folder / "source" / name
        if not path.exists() or sha256(path.read_bytes()).hexdigest() != digest:
            faults.append(f"code: source/{name} is not what ran (sha256_code)")
    same_windows = run.evaluated and run.evaluated["settings"]["eval_seq_len"] == run.settings["config"]["eval_seq_len"]
    key = "val_bpb_roundtrip"
    if same_windows and abs(run.evaluated[key] - run.trained[key]) > TEXT_TOLERANCE:
        shown = f"{run.trained[key]:.6f} and {run.evaluated[key]:.6f}"
        faults.append(f"log: trainer and evaluator scored different texts, {key} is {shown}")
    return [f"{run.folder}: {fault}" for fault in dict.fromkeys(faults)]


def differences(runs: Sequence[Run], kind: str, what: Callable[[Run], Mapping[str, Any]]) -> list[str]:
    """How WHAT differs between the first run and the others, but for names that each run has its own values of."""
    found, first = [], what(runs[0])
    for run in runs[1:]:
        other = what(run)
        names = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))
        shown = [f"{k} {first.get(k)} and {other.get(k)}" for k in names if not check.OWN_SETTINGS.fullmatch(k)]
        found += [f"{runs[0].folder} and {run.folder} differ in {kind}: {', '.join(shown)}"] if shown else []
    return found


def read_runs(folders: Sequence[Path], track: str) -> list[Run]:
    """The runs, by seed. Refused with every reason that they are no record."""
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
            reasons.append(f"seed {run.seed} twice: {before.folder} and {run.folder}")
    if (distinct := len({run.seed for run in runs})) < check.MIN_SEEDS:
        reasons.append(f"{distinct} finished runs of distinct seeds, {check.MIN_SEEDS} are needed")
    if runs:
        reasons += differences(runs, "code", lambda run: run.trained["sha256_code"])
        reasons += differences(runs, "settings", lambda run: run.settings["config"])
        reasons += differences(runs, "evaluation", lambda run: run.evaluated.get("settings", {}))
    if reasons:
        raise Refused(*reasons)
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """How much lower than OTHER's mean the runs' is, nats a bit per byte, and tests of the gain less a margin."""

    other: str
    bpb: float
    factor: float
    rows: list[tuple[str, float, check.Test]]  # what is tested, the margin in bpb, the test


def compare(runs: Sequence[Run], against: str) -> Comparison:
    """Compare with a record folder: by its logs, or by submission.json's mean where they have fewer than two scores.

    AGAINST may be a published mean in bpb instead. SubmitError where it is neither.
    """
    ours = check.Record(Path("this"), "folder", [run.facts for run in runs])
    factor, scores, tests = check.nats_per_bpb(ours), ours.values("val_bpb"), []
    if os.path.isdir(against):
        other = check.read_record(against)
        name, published = other.path.resolve().name, other.claims.get("val_bpb")
        if len(other.values("val_bpb")) > 1:
            published, (_, _, tests) = mean(other.values("val_bpb")), check.compare(ours, other)
    else:
        name = published = against
    try:
        threshold = float(published)
        if not 0 < threshold < math.inf:
            raise ValueError
    except (TypeError, ValueError):
        raise SubmitError(f"--against {against}: neither a folder with scores nor a mean in bpb") from None
    margin = check.MARGIN_NATS / factor
    rows = [(test.name, 0.0, test) for test in tests if not test.name.startswith("against")]
    for title, less in (("one sample against the mean", 0.0), (f"the same less {check.MARGIN_NATS} nats", margin)):
        rows.append((title, less, check.one_sample(scores, threshold - less)))
    return Comparison(name, threshold - mean(scores), factor, rows)


def rounded(value: float) -> float | None:
    """Four significant digits; None for what JSON has no number for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def comparison_keys(comparison: Comparison) -> dict[str, Any]:
    """What submission.json says of it; a negative delta is a gain."""
    deltas = dict(delta_bpb=round(-comparison.bpb, 8), delta_nats=round(-comparison.bpb * comparison.factor, 8))
    entry = dict(against=comparison.other, **deltas, nats_per_bpb=round(comparison.factor, 6), tests=[])
    for name, margin, test in comparison.rows:
        told = dict(t=rounded(test.t), df=rounded(test.df), p_value=rounded(test.p))
        entry["tests"].append(dict(test=name, margin_bpb=round(margin, 8), **told))
    return entry


# ----------------------------------------------------------------------------------------------------------------------
# What the folder says
# ----------------------------------------------------------------------------------------------------------------------


def seed_entry(run: Run) -> dict[str, Any]:
    facts, result = run.facts, run.facts.result
    more = {k: round(run.evaluated[k], 8) for k in ("val_bpb_ttt", "ttt_gain_bpb") if k in run.evaluated}
    return dict(
        val_bpb=facts.val_bpb, val_loss=facts.val_loss, val_bpb_sliding=round(result["val_bpb_sliding"], 8), **more,
        artifact_bytes=facts.bytes_total, bytes_model=facts.bytes_model, bytes_code=facts.bytes_code,
        steps=facts.steps, step_avg_ms=round(facts.step_avg_ms, 3), train_time_s=round(facts.train_seconds, 3),
        eval_time_s=round(facts.eval_seconds, 3), sha256_artifact=result["sha256_artifact"],
    )  # fmt: skip


def hardware(run: Run) -> str:
    versions, processes = run.trained["versions"], run.trained["world_size"]
    return f"{processes} x {versions['gpu']}" if versions["gpu"] != "none" else f"CPU, processes: {processes}"


def submission(runs: Sequence[Run], arguments: argparse.Namespace, what: str) -> dict[str, Any]:
    """The object of submission.json."""
    versions, facts = runs[0].trained["versions"], [run.facts for run in runs]

    def over(combine: Callable, fact: str, digits: int) -> float:
        return round(combine([getattr(each, fact) for each in facts]), digits)

    return dict(
        author=arguments.author, github_id=arguments.github, name=arguments.name,
        blurb=what.strip().partition("\n")[0] or arguments.name, date=f"{date.today()}",
        track=arguments.track.removeprefix("track_"),
        val_bpb=over(mean, "val_bpb", 8), val_loss=over(mean, "val_loss", 8),
        val_bpb_std=over(stdev, "val_bpb", 8), val_loss_std=over(stdev, "val_loss", 8),
        seeds=[run.seed for run in runs], seed_results={str(run.seed): seed_entry(run) for run in runs},
        bytes_total=over(max, "bytes_total", 0), bytes_code=over(max, "bytes_code", 0),
        artifact_bytes_mean=over(mean, "bytes_total", 1), artifact_bytes_max=over(max, "bytes_total", 0),
        train_steps_mean=over(mean, "steps", 2), step_avg_ms_mean=over(mean, "step_avg_ms", 3),
        train_time_s_mean=over(mean, "train_seconds", 3), eval_time_s_mean=over(mean, "eval_seconds", 3),
        hardware=hardware(runs[0]), python_version=versions["python"], pytorch_version=versions["torch"],
        cuda_version=versions["cuda"], sha256_code=runs[0].trained["sha256_code"],
    )  # fmt: skip


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


COLUMNS = (  # of the README's table: heading, key of a seed's entry, format
    ("steps", "steps", ",.0f"),
    ("ms/step", "step_avg_ms", ".2f"),
    ("sliding, bpb", "val_bpb_sliding", ".8f"),
    ("adapted, bpb", "val_bpb_ttt", ".8f"),
    ("its gain, bpb", "ttt_gain_bpb", ".8f"),
    ("submitted, nats", "val_loss", ".8f"),
    ("model, bytes", "bytes_model", ",.0f"),
    ("with code, bytes", "artifact_bytes", ",.0f"),
    ("training, s", "train_time_s", ".1f"),
    ("evaluation, s", "eval_time_s", ".1f"),
)


def seed_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    columns = {key: [entry[key] for entry in entries.values() if key in entry] for _, key, _ in COLUMNS}
    rows = {seed: {key: entry.get(key) for key in columns} for seed, entry in entries.items()}
    for name, combine in (("mean", mean), ("std", stdev)):
        rows[name] = {key: combine(values) if values else None for key, values in columns.items()}
    cells = [[name, *("-" if row[key] is None else format(row[key], form) for _, key, form in COLUMNS)]
             for name, row in rows.items()]  # fmt: skip
    return markdown([["seed", *(heading for heading, _, _ in COLUMNS)], *cells])


def comparison_table(comparison: Comparison) -> str:
    rows = [["test, one-sided", "gain, nats", "gain, bpb", "t", "df", "p"]]
    for name, margin, test in comparison.rows:
        bpb = comparison.bpb - margin
        rows.append([name, f"{bpb * comparison.factor:.6f}", f"{bpb:.6f}", f"{test.t:.2f}", f"{test.df:.2f}",
                     f"{test.p:.2g}"])  # fmt: skip
    told = f"A bit per byte is {comparison.factor:.6f} nats a token here; t, df and p are the same in either unit."
    return f"Against {comparison.other}. {told}\n\n{markdown(rows)}"


def compliance(runs: Sequence[Run]) -> str:
    """The four conditions of validity and the limits, each with what it rests on."""
    run, config = runs[0], runs[0].settings["config"]
    c, facts = run.evaluated.get("settings", config), [run.facts for run in runs]
    learns = bool(run.evaluated) and c["ttt_mode"] != "none"
    how = f"TTT_MODE={c['ttt_mode']}, TTT_PROTOCOL={c['ttt_protocol']}" if learns else "nothing learns at evaluation"
    audits = [f"seed {r.seed}: {text.splitlines()[0]}" for r in runs if (text := certificate(r))]
    mixed = f", mixed with an order-1 PPM (PPM_ALPHA={c['ppm_alpha']})" if learns and c["ppm_alpha"] != 1 else ""
    return "\n".join([
        "1. Causal: a target's loss depends on the artifact, read back from disk, and on the tokens before it. "
        + (f"Audits: {'; '.join(audits)}." if audits else "No certificate of an audit lies with the runs."),
        f"2. Normalised: a softmax over all {config['vocab_size']} tokens{mixed}, fixed before the target is seen.",
        f"3. Score before update: {how}; every RESULT line says legal.",
        f"4. One pass: each of the {facts[0].val_tokens or 'validation'} targets is scored once; the scorer's ledger"
        " raises where one is scored twice, or learned from before it is scored.",
        "",
        f"Bytes: {max(f.bytes_total for f in facts):,} at most, code and model, of {check.SIZE_CAP:,}. Training:"
        f" {max(f.train_seconds for f in facts):.1f} s at most; evaluation: {max(f.eval_seconds for f in facts):.1f} s"
        f" at most; the limit is {check.TIME_LIMIT:.0f} s each. Seeds: {len(runs)}.",
    ])  # fmt: skip


def certificate(run: Run) -> str:
    path = run.folder / "certificate.txt"
    return path.read_text() if path.exists() else ""


def environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as environment variables, but for those of a single run."""
    kept = {k.upper(): v for k, v in settings.items() if k not in PER_RUN}
    return {name: str(int(v)) if isinstance(v, bool) else str(v) for name, v in kept.items()}


def command(runs: Sequence[Run]) -> str:
    """The shell lines that make the runs again, with the environment that the first was given."""
    run = runs[0]

    def start(program: str, own: str, settings: Mapping[str, Any], processes: int) -> str:
        launcher = f"torchrun --standalone --nproc_per_node={processes}" if processes > 1 else "python"
        words = [f"{name}={shlex.quote(value)}" for name, value in environment(settings).items()]
        return " \\\n    ".join([own, *words, f"{launcher} {program}"])

    given = run.settings["given"]
    lines = [start("train_gpt.py", "SEED=$SEED RUN_ID=seed$SEED", given, run.trained["world_size"])]
    if run.evaluated:
        told = re.findall(r"(?m)^  (\w+)=(.*) \(given\)$", (run.folder / "eval_ttt.log").read_text())
        told = {k: given[k] for k in DATA if k in given} | {name.lower(): value for name, value in told}
        own = "MODEL_PATH=runs/seed$SEED/final_model.int6.ptz"
        lines.append(start("eval_ttt.py", own, told, run.evaluated["world_size"]))
    seeds = " ".join(str(run.seed) for run in runs)
    return "\n".join([f"for SEED in {seeds}; do", *(f"  {line}" for line in lines), "done"])


def readme(claims: Mapping[str, Any], runs: Sequence[Run], what: str, comparison: Comparison | None) -> str:
    bpb, nats, n = claims["val_bpb"], claims["val_loss"], len(runs)
    spread = f"{claims['val_bpb_std']:.6f} bpb, {claims['val_loss_std']:.6f} nats"
    label = runs[0].facts.headline.label.removesuffix("_exact")
    used = {", ".join(f"{k} {v}" for k, v in run.trained["versions"].items()) for run in runs}
    code = ", ".join(f"`{name}` {digest[:12]}.." for name, digest in claims["sha256_code"].items())
    sections = {
        "Runs": seed_table(claims["seed_results"]),
        "Comparison": comparison_table(comparison) if comparison else "",
        "What changed": what.strip(),
        "Compliance": compliance(runs),
        "Command": f"    {command(runs)}".replace("\n", "\n    "),
        "Environment": "\n".join(f"{hardware(runs[0])}: {each}." for each in sorted(used)),
        "Files": f"The code that ran, by SHA-256: {code}. Logs: training, then evaluation where separate.",
    }
    return "\n\n".join([
        f"# {claims['name']}: val_bpb {bpb:.5f} ({n}-seed mean)",
        f"**{bpb:.8f} bpb / {nats:.8f} nats a token** (`{label}`; mean of {n} seeds, std {spread}) | "
        f"**{claims['bytes_total']:,} bytes** at most | {claims['hardware']}",
        *(f"## {title}\n\n{text}" for title, text in sections.items() if text),
    ]) + "\n"  # fmt: skip


def requirements(versions: Mapping[str, Any]) -> str:
    """The project's requirements, with the versions that ran where RESULT says them."""
    text = (ROOT / "requirements.txt").read_text()
    for name in ("torch", "numpy"):
        text = re.sub(rf"(?m)^{name}==.*$", f"{name}=={versions[name].partition('+')[0]}", text)
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Building the folder, and the table of all
# ----------------------------------------------------------------------------------------------------------------------


def build(folder: Path, runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Write every file of the record into FOLDER."""
    is_file = len(arguments.what) < 256 and os.path.isfile(arguments.what)
    what = Path(arguments.what).read_text() if is_file else arguments.what
    claims = submission(runs, arguments, what)
    comparison = compare(runs, arguments.against) if arguments.against else None
    claims |= {"comparison": comparison_keys(comparison)} if comparison else {}
    folder.mkdir()
    for path in sorted((runs[0].folder / "source").iterdir()):
        shutil.copyfile(path, folder / path.name)
    for run in runs:
        joined = b"\n".join(path.read_bytes().rstrip(b"\n") for path in run.facts.paths) + b"\n"
        (folder / f"train_seed{run.seed}.log").write_bytes(joined)
        if text := certificate(run):
            (folder / f"certificate_seed{run.seed}.txt").write_text(text)
    (folder / "requirements.txt").write_text(requirements(runs[0].trained["versions"]))
    (folder / "submission.json").write_text(json.dumps(claims, indent=1, ensure_ascii=False) + "\n")
    (folder / "README.md").write_text(readme(claims, runs, what, comparison))


def smoke_start(folder: Path, run: Run) -> None:
    """Let the folder's trainer describe the model of the settings that RUN was given. Refused where it cannot."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")}
    kept |= environment(run.settings["given"]) | {"PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "train_gpt.py", "--describe"]
    done = subprocess.run(words, cwd=folder, env=kept, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Refused(f"in the folder, train_gpt.py --describe fails: {done.stderr.strip()[-500:]}")


def submit(arguments: argparse.Namespace) -> tuple[Path, list[check.Verdict]]:
    """Build, check and start the record beside its place, then put it there; returns the folder and its verdicts."""
    name = re.sub(r"\s+", "_", arguments.name)
    if not re.fullmatch(r"[\w.+,=-]+", name):
        raise SubmitError(f"--name {arguments.name!r}: letters, digits, spaces and _ . + , = - only")
    place = arguments.out / arguments.track / f"{date.today()}_{name}"
    if place.exists():
        raise SubmitError(f"{place} is there already: choose another name")
    runs = read_runs(arguments.runs, arguments.track)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out, prefix=".building-") as beside:
        folder = Path(beside) / place.name
        build(folder, runs, arguments)
        verdicts = check.check(check.read_record(folder))
        if faults := [f"{v.rule}: {v.evidence}" for v in verdicts if v.status == "fail"]:
            raise Refused(*faults)
        smoke_start(folder, runs[0])
        place.parent.mkdir(exist_ok=True)
        os.rename(folder, place)
    return place, verdicts


def table(records: Path) -> str:
    """All records, the best of each track first."""
    found = []
    for path in sorted(records.glob("track_*/*/submission.json")):
        claims = json.loads(path.read_text(encoding="utf-8-sig"))
        found.append((path.parent.parent.name, claims.get("val_bpb", math.inf), path.parent, claims))
    rows = [["track", "date", "record", "val_bpb", "std", "val_loss, nats", "seeds", "bytes", "author"]]
    for track, bpb, folder, claims in sorted(found, key=lambda row: row[:3]):
        numbers = [(bpb, ".6f")] + [(claims.get(k), ".6f") for k in ("val_bpb_std", "val_loss")]
        numbers += [(len(claims.get("seeds", ())) or None, "d"), (claims.get("bytes_total"), ",d")]
        cells = ["-" if value is None else format(value, form) for value, form in numbers]
        name = str(claims.get("name", folder.name)).replace("|", "/")
        rows.append([track, str(claims.get("date", "-"))[:10], f"[{name}]({track}/{folder.name})", *cells,
                     str(claims.get("author") or "-")])  # fmt: skip
    return markdown(rows) if found else "No record yet."


def write_table(records: Path) -> Path:
    """Put the table between the markers of RECORDS/README.md. SubmitError where they are not there."""
    path = records / "README.md"
    text = path.read_text() if path.exists() else ""
    if [text.count(marker) for marker in MARKERS] != [1, 1] or text.index(MARKERS[0]) > text.index(MARKERS[1]):
        raise SubmitError(f"{path} has no place for the table: {MARKERS[0]} and {MARKERS[1]}, once each, in this order")
    head, tail = text.partition(MARKERS[0])[0], text.partition(MARKERS[1])[2]
    beside = path.with_name(".README.md.new")
    beside.write_text(f"{head}{MARKERS[0]}\n\n{table(records)}\n\n{MARKERS[1]}{tail}")
    os.replace(beside, path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--name", help="of the record; its folder is DATE_NAME")
    parser.add_argument("--track", choices=TRACKS, default=TRACKS[0])
    parser.add_argument("--author", default="", help="who submits it")
    parser.add_argument("--github", default="", help="GitHub id of the author")
    parser.add_argument("--what", default="", metavar="FILE|TEXT", help="what changed; its first line is the blurb")
    parser.add_argument("--against", metavar="FOLDER|BPB", help="the record to compare with, or its published mean")
    parser.add_argument("--out", type=Path, default=ROOT / "records", help="folder of the tracks")
    parser.add_argument("--table", action="store_true", help="write the table of all records into OUT/README.md")
    arguments = parser.parse_args(argv)
    try:
        if arguments.table:
            print(write_table(arguments.out))
            return 0
        if not arguments.runs or not arguments.name:
            raise SubmitError("folders of runs and --name are needed, or --table")
        folder, verdicts = submit(arguments)
    except Refused as refused:
        print(*(f"refused: {reason}" for reason in refused.args), sep="\n", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(check.report(check.read_record(folder), verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
