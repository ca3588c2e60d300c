"""Build a record folder from finished runs and check it; or regenerate its pages; or list all records.

    python records/submit.py runs/A runs/B runs/C --name Name [--mode MODE] [--against FOLDER]
    python records/submit.py --regenerate records/TRACK/FOLDER [--run-its-code]
    python records/submit.py --table

The runs must be three or more with the same code and settings and distinct seeds. The submitted score is
that of the last legal evaluation by eval_ttt.py, or of --mode, else the trainer's sliding score. The folder
records/TRACK/DATE_NAME/ gets README.md, submission.json, logs, the code that ran and was counted, its recipe
and requirements.txt. Every number comes from a RESULT line or a file; scores have the eight decimals that
logs print. Runs of another validation text, other GPUs or other times than the challenge's go to
track_non_record_16mb, and title, README and submission.json say so; with --track track_10min_16mb they are
refused. The folder appears only if it passes records/check.py and if train_gpt.py --describe runs in it. The
latter is skipped, with a note, for code that is neither this repository's nor that packed by pack.py, unless
--run-its-code is given: the runs may come from an untrusted source. --against is a record folder, or a
published mean bpb, on the same validation text. The comparison is reported whatever it shows; with
--require-significance a gain below 0.005 nats or without p < 0.01 is refused. --regenerate rewrites
README.md and submission.json of such a folder from its logs; author, name and so on come from its
submission.json unless options override them. It starts no code unless --run-its-code is given. Exit codes: 0
written, 1 refused (all reasons are printed), 2 user error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from datetime import date
from importlib.machinery import all_suffixes
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from textwrap import shorten
from typing import Any, NamedTuple

import check
from finished import TRACKS, Refused, Run, read_logs, read_runs
from launch import Crash, trainer
from pack import PackError, is_packed, packed
from runfiles import escape, escape_lines, links, read_object, read_plain, read_text, sha256_file, write_file
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
CONTEST = "openai/parameter-golf"
MARKERS = ("<!-- records: begin -->", "<!-- records: end -->")
PER_RUN = ("run_id", "seed", "model_path")  # set by the loop in the README's command
DATA = ("data_path", "tokenizer_path", "val_files")  # read by the evaluator but not in its log
KERNELS = {"fa2": "flash-attn"}  # by the attention that ran; FlashAttention 3 has no pinned package
BPB = re.compile(r"\d+(?:\.\d+)?|\.\d+")  # a published mean
SUMMARY = 100  # characters of what changed in a title

# ------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Gain in bpb over the mean of `other`, nats per token of one bpb, tests of the gain less a margin."""

    other: str
    bpb: float
    factor: float
    rows: list[tuple[str, float, check.Test]]  # title, margin in bpb, test

    @property
    def gain(self) -> str:
        """Return the gain in words."""
        return check.better_or_worse(self.bpb * self.factor, self.bpb, self.other)

    @property
    def shown(self) -> bool:
        """Return whether the gain meets the contest's rule, by Welch's test too if `other` has scores."""
        return all(test.p < check.P_WRITTEN for name, _, test in self.rows if "pairs" not in name)

    def verdict(self) -> str:
        tests = "; ".join(f"{name}: p = {test.p:.2g}" for name, _, test in self.rows if "pairs" not in name)
        told = f"A gain of {check.MARGIN_NATS} nats per token at p < {check.P_WRITTEN} is"
        return f"{told} {'' if self.shown else 'not '}shown ({tests})."


def compare(runs: Sequence[Run], against: str) -> Comparison:
    """Compare with a record folder: by its logs, or by submission.json's mean if they have under two scores.

    `against` may also be a published mean in bpb. ValueError if it is neither, or of another text.
    """
    ours = check.Record(Path("this"), "folder", [run.facts for run in runs])
    factor, scores, tests = check.nats_per_bpb(ours), ours.values("val_bpb"), []
    if os.path.isdir(against):
        other = check.read_record(against)
        name, published = other.path.resolve().name, other.claims.get("val_bpb")
        if len(other.values("val_bpb")) > 1:
            published, (_, _, tests) = mean(other.values("val_bpb")), check.compare(ours, other)
        elif other.runs:
            check.require_same_text(ours, other)
    else:
        name = published = against
    counted = os.path.isdir(against) and other.runs
    foreign = os.path.isdir(against) and other.claims.get("challenge_run") is False
    if not counted and (foreign or not all(check.is_challenge_text(run.facts) for run in runs)):
        raise ValueError(f"--against {against}: no log shows that it is of the validation text of these runs")
    threshold = float(published) if BPB.fullmatch(str(published)) else 0.0
    if not 0 < threshold < check.MOST_NATS:
        raise ValueError(f"--against {against}: must be a record folder with scores or a mean in bpb")
    margin = check.MARGIN_NATS / factor
    rows = [(test.name, 0.0, test) for test in tests if not test.name.startswith("against")]
    for title, less in (
        ("one sample against the mean", 0.0),
        (f"the same less {check.MARGIN_NATS} nats", margin),
    ):
        rows.append((title, less, check.one_sample(scores, threshold - less)))
    return Comparison(name, threshold - mean(scores), factor, rows)


def rounded(value: float) -> float | None:
    """Round to four significant digits; None for infinities and NaN, which JSON cannot express."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def comparison_keys(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison entry of submission.json; a negative delta is a gain."""
    deltas = dict(
        delta_bpb=round(-comparison.bpb, 8), delta_nats=round(-comparison.bpb * comparison.factor, 8)
    )
    entry = dict(against=comparison.other, **deltas, nats_per_bpb=round(comparison.factor, 6))
    entry |= dict(margin_nats=check.MARGIN_NATS, significant=comparison.shown, tests=[])
    for name, margin, test in comparison.rows:
        told = dict(t=rounded(test.t), df=rounded(test.df), p_value=rounded(test.p))
        entry["tests"].append(dict(test=name, margin_bpb=round(margin, 8), **told))
    return entry


# ------------------------------------------------------------------------------------------------------------
# Content of the folder
# ------------------------------------------------------------------------------------------------------------


def seed_entry(run: Run) -> dict[str, Any]:
    facts, result = run.facts, run.facts.result
    more = {k: round(run.evaluated[k], 8) for k in ("val_bpb_ttt", "ttt_gain_bpb") if k in run.evaluated}
    return dict(
        val_bpb=facts.val_bpb, val_loss=facts.val_loss, val_bpb_sliding=round(result["val_bpb_sliding"], 8),
        **more, artifact_bytes=facts.bytes_total, bytes_model=facts.bytes_model, bytes_code=facts.bytes_code,
        steps=facts.steps, step_avg_ms=facts.step_avg_ms, train_time_s=facts.train_seconds,
        eval_time_s=facts.eval_seconds, sha256_artifact=result["sha256_artifact"],
    )  # fmt: skip


def submission(
    runs: Sequence[Run], about: Mapping[str, str], comparison: Comparison | None
) -> dict[str, Any]:
    """Return the object of submission.json."""
    versions, facts = runs[0].trained["versions"], [run.facts for run in runs]
    foreign = check.deviations(facts)

    def over(combine: Callable, fact: str, digits: int) -> float:
        return round(combine([getattr(each, fact) for each in facts]), digits)

    return dict(
        **about, blurb=about["technique_summary"].partition("\n")[0] or about["name"],
        challenge_run=not foreign, deviations=foreign,
        val_bpb=over(mean, "val_bpb", 8), val_loss=over(mean, "val_loss", 8),
        val_bpb_std=over(stdev, "val_bpb", 8), val_loss_std=over(stdev, "val_loss", 8),
        seeds=[run.seed for run in runs], seed_results={str(run.seed): seed_entry(run) for run in runs},
        bytes_total=over(max, "bytes_total", 0), bytes_code=over(max, "bytes_code", 0),
        artifact_bytes_mean=over(mean, "bytes_total", 1), artifact_bytes_max=over(max, "bytes_total", 0),
        train_steps_mean=over(mean, "steps", 2), step_avg_ms_mean=over(mean, "step_avg_ms", 3),
        train_time_s_mean=over(mean, "train_seconds", 3), eval_time_s_mean=over(mean, "eval_seconds", 3),
        hardware=check.hardware(facts[0]), python_version=versions["python"],
        pytorch_version=versions["torch"], cuda_version=versions["cuda"],
        sha256_code=runs[0].trained["sha256_code"],
        **(dict(comparison=comparison_keys(comparison)) if comparison else {}),
    )  # fmt: skip


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its header, the first column text, the others numbers."""
    cells = [[escape(cell) for cell in row] for row in rows]
    sides = ("left", *("right",) * (len(rows[0]) - 1))
    return tabulate(cells[1:], cells[0], tablefmt="pipe", disable_numparse=True, colalign=sides)


COLUMNS = (  # of the README's table: heading, key in a seed's entry, format
    ("steps", "steps", ",.0f"),
    ("ms/step", "step_avg_ms", ".2f"),
    ("sliding, bpb", "val_bpb_sliding", ".8f"),
    ("adapted, bpb", "val_bpb_ttt", ".8f"),
    ("gain of TTT, bpb", "ttt_gain_bpb", ".8f"),
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


def comparison_text(comparison: Comparison | None) -> str:
    if comparison is None:
        return (
            f"No comparison was made, so a gain of {check.MARGIN_NATS} nats per token over a record is "
            "not shown."
        )
    rows = [["test, one-sided", "difference, nats", "difference, bpb", "t", "df", "p"]]
    for name, margin, test in comparison.rows:
        bpb = margin - comparison.bpb
        rows.append([name, f"{bpb * comparison.factor:.6f}", f"{bpb:.6f}", f"{test.t:.2f}", f"{test.df:.2f}",
                     f"{test.p:.2g}"])  # fmt: skip
    told = (
        f"A difference below 0 is a gain. One bit per byte is {comparison.factor:.6f} nats per token here; "
        "t, df and p do not depend on the unit."
    )
    return f"{comparison.gain}. {comparison.verdict()} {told}\n\n{markdown(rows)}"


def compliance(runs: Sequence[Run]) -> str:
    """Return the four conditions of validity and the limits, each with its evidence."""
    run, facts = runs[0], [run.facts for run in runs]
    c = run.settings[0] | run.evaluated.get("settings", {})
    learns = bool(run.evaluated) and c["ttt_mode"] != "none"
    how = (
        f"TTT_MODE={c['ttt_mode']}, TTT_PROTOCOL={c['ttt_protocol']}"
        if learns
        else "no adaptation at evaluation"
    )
    audits: dict[str, list[str]] = {}
    for each in (run for run in runs if run.certificate):
        audits.setdefault(each.certificate.splitlines()[0], []).append(str(each.seed))
    told = "; ".join(f"seeds {', '.join(seeds)}: {line}" for line, seeds in audits.items())
    mixes = bool(run.evaluated) and float(c["ppm_alpha"]) != 1
    mixed = f", mixed with an order-1 PPM (PPM_ALPHA={c['ppm_alpha']})" if mixes else ""
    return "\n".join([
        "1. Causal: a target's loss depends on the artifact, read from disk, and on the tokens before it. "
        + (f"Audits: {told}." if audits else "The runs have no audit certificate."),
        f"2. Normalized: a softmax over {c['vocab_size']} tokens{mixed}, fixed before the target is seen.",
        f"3. Score before update: {how}; every RESULT line says legal.",
        f"4. One pass: each of the {facts[0].val_tokens or 'validation'} targets is scored once; the "
        "scorer's ledger raises an error if one is scored twice, or adapted on before it is scored.",
        "",
        f"Bytes: {max(f.bytes_total for f in facts):,} at most, code and model, of {check.SIZE_CAP:,}. "
        f"Training: {max(f.train_seconds for f in facts):.1f} s at most; evaluation: "
        f"{max(f.eval_seconds for f in facts):.1f} s at most; the limit is {check.TIME_LIMIT:.0f} s each. "
        f"Seeds: {len(runs)}.",
    ])  # fmt: skip


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of train_gpt.py as environment variables, except those of a single run.

    A log may name any variable, such as PYTHONPATH or LD_PRELOAD, so only fields of Config are kept.
    """
    own = {field.name for field in fields(trainer().Config)}
    return {name.upper(): value for name, value in given.items() if name in own and name not in PER_RUN}


def recipe_of(folder: Path) -> tuple[str, dict[str, str]]:
    """Return name and settings, as text, of the recipe in a folder; empty without one that we can read."""
    tg = trainer()
    for path in sorted(folder.glob("*.env")):
        with suppress(tg.UserError):
            given = tg.load_config({"RECIPE": str(path)})[1]
            return path.name, {name: str(value) for name, value in given.items()}
    return "", {}


def evaluator_seed(runs: Sequence[Run]) -> str:
    """Return the SEED of the evaluations as a shell word: the loop's, one for all, or the default."""
    if all(run.evaluated.get("seed") == run.seed for run in runs):
        return "SEED=$SEED "
    seed, default = runs[0].evaluated.get("seed"), trainer().Config().seed
    return f"SEED={int(seed)} " if isinstance(seed, int) and seed != default else ""


def command(runs: Sequence[Run], folder: Path) -> str:
    """Return the shell lines that reproduce the runs in the record `folder`.

    They read its recipe, and set what was given otherwise to the first run.
    """
    run, (recipe, known) = runs[0], recipe_of(folder)

    def start(program: str, own: str, part: int, processes: int) -> str:
        data = {name: run.settings[0][name] for name in DATA if name in run.settings[0]}
        logged = data | run.settings[part]
        given = {*known, *run.given[part], *(run.given[0].keys() & data)}
        changed = {
            name: value for name, value in logged.items() if name in given and known.get(name) != value
        }
        words = [f"{name}={shlex.quote(value)}" for name, value in environment(changed).items()]
        launcher = f"torchrun --standalone --nproc_per_node={processes}" if processes > 1 else "python"
        own = f"RECIPE={shlex.quote(recipe)} {own}" if recipe else own
        return " \\\n    ".join([own, *words, f"{launcher} {program}"])

    lines = [start("train_gpt.py", "SEED=$SEED RUN_ID=seed$SEED", 0, run.trained["world_size"])]
    if run.evaluated:
        own = f"{evaluator_seed(runs)}MODEL_PATH=runs/seed$SEED/final_model.int6.ptz"
        lines.append(start("eval_ttt.py", own, 1, run.evaluated["world_size"]))
    seeds = " ".join(str(int(run.seed)) for run in runs)
    return "\n".join([f"for SEED in {seeds}; do", *(f"  {line}" for line in lines), "done"])


def title(claims: Mapping[str, Any]) -> str:
    """Return the record's name, what changed, the score, and the delta to the record compared with."""
    name = claims["name"] + ("" if claims["challenge_run"] else " (not a challenge run)")
    what = f": {shorten(claims['blurb'], SUMMARY, placeholder='...')}" * (claims["blurb"] != claims["name"])
    found = claims.get("comparison")
    delta = f", {found['delta_bpb']:+.5f} against {found['against']}" if found else ""
    return f"{name}{what} - val_bpb {claims['val_bpb']:.5f} ({len(claims['seeds'])}-seed mean{delta})"


def readme(
    claims: Mapping[str, Any], runs: Sequence[Run], comparison: Comparison | None, folder: Path
) -> str:
    spread = f"{claims['val_bpb_std']:.6f} bpb, {claims['val_loss_std']:.6f} nats"
    label = runs[0].facts.headline.label.removesuffix("_exact")
    used = {", ".join(f"{k} {v}" for k, v in run.trained["versions"].items()) for run in runs}
    foreign = f"> **Not a challenge run**, no entry for {CONTEST}: {'; '.join(claims['deviations'])}."
    is_small = any(is_packed(read_plain(path)) for path in folder.glob("*.py"))
    packing = " Packed (minified, bz2) by this project's records/pack.py." * is_small
    code = ", ".join(f"`{name}` {digest[:12]}.." for name, digest in claims["sha256_code"].items())
    sections = {
        "Runs": seed_table(claims["seed_results"]),
        "Comparison": comparison_text(comparison),
        "What changed": claims["technique_summary"],
        "Compliance": compliance(runs),
        "Command": f"    {command(runs, folder)}".replace("\n", "\n    "),
        "Environment": "\n".join(f"{claims['hardware']}; {each}." for each in sorted(used)),
        "Files": f"The code that ran, with SHA-256: {code}.{packing}\n"
        "Logs: training, then evaluation if separate.",
    }
    return escape_lines("\n\n".join([
        f"# {title(claims)}",
        f"**{claims['val_bpb']:.8f} bpb / {claims['val_loss']:.8f} nats per token**, lower is better "
        f"(`{label}`; mean of {len(runs)} seeds, std {spread}) | "
        f"**{claims['bytes_total']:,} bytes** at most | {claims['hardware']}",
        *([foreign] if claims["deviations"] else []),
        *(f"## {heading}\n\n{text}" for heading, text in sections.items() if text),
    ]) + "\n")  # fmt: skip


def requirements(folder: Path, run: Run) -> str:
    """Return the packages that the folder's programs import, in the versions that ran if the log has them."""
    pins = dict(
        pin
        for name in ("requirements.txt", "requirements-gpu.txt")
        for pin in re.findall(r"(?m)^([\w.-]+)==([\w.]+)", (ROOT / name).read_text())
    )
    versions = run.trained["versions"]
    for name in ("torch", "numpy"):
        pins[name] = re.match(r"[\w.]*", str(versions[name]))[0]  # without the local part, +cu128
    wanted = {name for path in folder.glob("*.py") for name in check.read_program(path).modules}
    wanted |= {
        trainer().PACKAGES.get(run.settings[0].get("compressor"), ("",))[0],
        KERNELS.get(str(versions.get("attention"))),
    }
    return "".join(f"{name}=={pinned}\n" for name, pinned in pins.items() if name in wanted)


# ------------------------------------------------------------------------------------------------------------
# Building the folder and the table of records
# ------------------------------------------------------------------------------------------------------------


def write_pages(
    folder: Path, runs: Sequence[Run], about: Mapping[str, str], against: str, significant: bool
) -> None:
    """Write submission.json and README.md. Refused if `significant` is set and the gain is not."""
    comparison = compare(runs, against) if against else None
    if significant and comparison is None:
        raise ValueError("--require-significance needs --against")
    if significant and not comparison.shown:
        raise Refused(comparison.verdict())
    if comparison:
        print(escape(f"comparison: {comparison.gain}. {comparison.verdict()}"))
    claims = submission(runs, about, comparison)
    text = escape_lines(json.dumps(claims, indent=1, ensure_ascii=False))
    write_file(folder / "submission.json", f"{text}\n".encode())
    write_file(folder / "README.md", readme(claims, runs, comparison, folder).encode())


def write_rest(folder: Path, runs: Sequence[Run]) -> None:
    """Write the code that ran, logs, certificates, and requirements.txt."""
    for path in sorted((runs[0].path / "source").iterdir()):
        write_file(folder / path.name, read_plain(path))
    for run in runs:
        write_file(folder / f"train_seed{run.seed}.log", run.log.encode())
        if run.certificate:
            write_file(folder / f"certificate_seed{run.seed}.txt", run.certificate.encode())
        if (data := run.evaluation / "certificate.json").exists():
            write_file(folder / f"certificate_seed{run.seed}.json", read_plain(data))
    write_file(folder / "requirements.txt", requirements(folder, runs[0]).encode())


def smoke_start(folder: Path, run: Run) -> None:
    """Run --describe of the folder's trainer with the settings of `run`. Refused if it fails."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")}
    kept |= environment(run.given[0]) | {"PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "train_gpt.py", "--describe"]
    try:
        subprocess.run(words, cwd=folder, env=kept, capture_output=True, text=True, timeout=300, check=True)
    except subprocess.SubprocessError as error:
        said = str(error.stderr or error).strip()[-500:]
        raise Refused(f"in the folder, train_gpt.py --describe fails: {said}") from error


def is_ours(folder: Path) -> bool:
    """Return whether all files of `folder` that Python can run or import are ours, readable or packed."""
    code = [path for path in folder.iterdir() if path.name.endswith(tuple(all_suffixes()))]
    for path in code:
        ours, digest = ROOT / path.name, sha256_file(path)
        if path.suffix != ".py" or not ours.is_file():
            return False
        try:
            if digest not in (sha256_file(ours), packed(ours).sha256):
                return False
        except PackError:  # without the minifier, nothing packed is known to be ours
            return False
    return True


def refuse_links(folder: Path) -> None:
    """Raise Refused if `folder` holds links, pipes or devices, because only regular files may be copied."""
    if found := sorted(links(folder)):
        raise Refused(
            *(f"{path} is a link or a special file. Replace it with a regular file." for path in found)
        )


def verify(folder: Path, run: Run, run_code: bool) -> list[check.Verdict]:
    """Return check.py's verdicts. Refused for a fault, or if with `run_code` the trainer does not start.

    Without `run_code` a note says that no code was started.
    """
    verdicts = check.check(check.read_record(folder))
    if faults := [f"{v.rule}: {v.evidence}" for v in verdicts if v.status == "fail"]:
        raise Refused(*faults)
    if run_code:
        smoke_start(folder, run)
    else:
        print(f"note: no code of {escape(folder.name)} was run; --run-its-code runs train_gpt.py --describe")
    return verdicts


def describe(arguments: argparse.Namespace, known: Mapping[str, Any]) -> dict[str, str]:
    """Return what only the author knows: from the options, else from `known`. ValueError without a name."""
    what = arguments.what if arguments.what is not None else str(known.get("technique_summary") or "")
    if arguments.what is not None and os.path.isfile(what):
        what = read_text(Path(what), check.TEXT_LIMIT)
    elif arguments.what is not None and re.fullmatch(r"\S+\.(md|txt)", what):
        raise ValueError(f"--what {what}: no such file")
    about = {key: str(known.get(key) or "") for key in ("author", "github_id", "name", "date", "track")}
    about |= {key: getattr(arguments, key) for key in about if getattr(arguments, key, None) is not None}
    if not about["name"]:
        raise ValueError("run folders and --name are required")
    return about | dict(technique_summary=what.strip(), track=about["track"].removeprefix("track_"))


def submit(arguments: argparse.Namespace) -> tuple[Path, list[check.Verdict]]:
    """Build and check the record in a temporary folder, then move it; return the folder and its verdicts."""
    about = describe(arguments, dict(date=f"{date.today()}"))
    name = re.sub(r"\s+", "_", about["name"])
    if not re.fullmatch(r"[\w.+,=-]+", name):
        raise ValueError(f"--name {about['name']!r}: must consist of letters, digits, spaces and _ . + , = -")
    for path in filter(Path.is_dir, arguments.runs):
        refuse_links(path)
    runs, track = read_runs(arguments.runs, arguments.track or "", arguments.mode)
    about["track"] = track.removeprefix("track_")
    target = arguments.out / track / f"{about['date']}_{name}"
    if target.exists():
        raise ValueError(f"{target} already exists. Choose another name.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out, prefix=".building-") as beside:
        folder = Path(beside) / target.name
        folder.mkdir()
        write_rest(folder, runs)
        write_pages(folder, runs, about, arguments.against, arguments.require_significance)
        verdicts = verify(folder, runs[0], arguments.run_its_code or is_ours(folder))
        target.parent.mkdir(exist_ok=True)
        os.rename(folder, target)
    return target, verdicts


def named_record(against: str, records: Path) -> str:
    """Return the folder of a record named by submission.json, or a mean in bpb unchanged.

    It is one of `records` or of this repository's, also of those one level deeper, such as records/example.
    ValueError for anything else: the name is untrusted, and it must not make us read another folder.
    """
    if BPB.fullmatch(against):
        return against
    plain = against not in ("", ".", "..") and not re.search(r"[/\\\0]", against)
    for base, depth in product((records, ROOT / "records"), ("track_*", "*/track_*")) if plain else ():
        for track in sorted(base.glob(depth)):
            folder = track / against
            if folder.is_dir() and folder.resolve().is_relative_to(base):
                return str(folder)
    raise ValueError(
        f"comparison.against is {against}: must be a folder of {records}/track_* or a mean in bpb. "
        "Name another folder with --against."
    )


def regenerate(arguments: argparse.Namespace) -> tuple[Path, list[check.Verdict]]:
    """Rewrite README.md and submission.json of a record from its logs; return the same as `submit`."""
    target = arguments.regenerate.resolve()
    refuse_links(target)
    known = (
        read_object(target / "submission.json", decimals=True)
        if (target / "submission.json").exists()
        else {}
    )
    logs = {path: path.with_name(path.name.replace("train", "certificate")).with_suffix(".txt")
            for path in target.glob("train_seed*.log")}  # fmt: skip
    if not logs:
        raise ValueError(f"{target}: no folder with logs named train_seed*.log")
    runs = sorted((read_logs(path, [path], audit) for path, audit in logs.items()), key=lambda run: run.seed)
    about = describe(arguments, dict(track=target.parent.name, date=target.name[:10]) | known)
    before = known.get("comparison")
    before = str(before.get("against") or "") if isinstance(before, dict) else ""
    against = arguments.against or (named_record(before, target.parent.parent) if before else "")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as beside:
        folder = Path(beside) / target.name
        folder.mkdir()
        for path in (p for p in target.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            (folder / path.relative_to(target)).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / path.relative_to(target), read_plain(path))
        write_pages(folder, runs, about, against, arguments.require_significance)
        verdicts = verify(folder, runs[0], arguments.run_its_code)
        for name in ("submission.json", "README.md"):
            os.replace(folder / name, target / name)
    return target, verdicts


def table(records: Path) -> str:
    """Return the table of all records, the best of each track first; a missing number is a dash."""
    found = []
    for path in records.glob("track_*/*/submission.json"):
        claims, folder = check.read_claims(path, []), path.parent
        seeds = len(check.claimed_seeds(check.Record(folder, "folder", claims=claims))) or None
        numbers = [*map(claims.get, ("val_bpb", "val_bpb_std", "val_loss")), seeds, claims.get("bytes_total")]
        numbers = [float(number) if check.is_number(number) else math.inf for number in numbers]
        forms = (".6f", ".6f", ".6f", ".0f", ",.0f")
        cells = ["-" if n == math.inf else format(n, form) for n, form in zip(numbers, forms, strict=True)]
        name = str(claims.get("name", folder.name)).replace("|", "/")
        name += " (not a challenge run)" * (claims.get("challenge_run") is False)
        link = f"[{name}]({folder.parent.name}/{folder.name})"
        when, who = str(claims.get("date", "-"))[:10], str(claims.get("author") or "-")
        found.append(
            (folder.parent.name, numbers[0], folder.name, [folder.parent.name, when, link, *cells, who])
        )
    head = ["track", "date", "record", "val_bpb", "std", "val_loss, nats", "seeds", "bytes", "author"]
    return markdown([head, *(row for *_, row in sorted(found))]) if found else "No record yet."


def write_table(records: Path) -> Path:
    """Write the table between the markers of `records`/README.md. ValueError if they are missing."""
    path = records / "README.md"
    text = path.read_text() if path.exists() else ""
    if [text.count(marker) for marker in MARKERS] != [1, 1] or text.index(MARKERS[0]) > text.index(
        MARKERS[1]
    ):
        raise ValueError(
            f"{path}: must contain the lines {MARKERS[0]} and {MARKERS[1]}, once each, in this order"
        )
    head, tail = text.partition(MARKERS[0])[0], text.partition(MARKERS[1])[2]
    write_file(path, f"{head}{MARKERS[0]}\n\n{table(records)}\n\n{MARKERS[1]}{tail}".encode())
    return path


def next_step(folder: Path) -> str:
    """Return what to do with a new record: the commands of a pull request, or how to make a challenge run."""
    record = check.read_record(folder)
    if not all(map(check.is_challenge_text, record.runs)):
        return (
            "next: these scores are not on the challenge's text; data/download.py --help says how to get it"
        )
    name, track = shlex.quote(folder.name), folder.parent.name
    heading = shlex.quote(escape(title(record.claims)))
    return "\n".join([
        f"next: a pull request from your fork of https://github.com/{CONTEST}",
        f"  git clone https://github.com/YOUR_NAME/{CONTEST.partition('/')[2]} fork",
        f"  mkdir -p fork/records/{track} && cp -r {shlex.quote(str(folder))} fork/records/{track}/",
        f"  cd fork && git switch -c {name} && git add records && git commit -m {heading}",
        f"  git push -u origin {name} && gh pr create --repo {CONTEST} --title {heading} --body-file "
        f"records/{track}/{name}/README.md",
    ])  # fmt: skip


def packing_hint(folder: Path) -> str:
    """Return a note if packing the programs before training would free bytes for weights."""
    results = [run.result for run in check.read_record(folder).runs]
    counts = [(r.get("bytes_total"), r.get("bytes_total_packed")) for r in results]
    saved = max((a - b for a, b in counts if check.is_number(a) and check.is_number(b)), default=0)
    return f"note: with the packed programs, see records/pack.py, {saved:,} bytes more are free" * (saved > 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("runs", nargs="*", type=Path, default=[], help="folders of finished runs")
    what.add_argument(
        "--regenerate", type=Path, metavar="FOLDER", help="rewrite a record's pages from its logs"
    )
    what.add_argument(
        "--table", action="store_true", help="write the table of all records into OUT/README.md"
    )
    parser.add_argument(
        "--run-its-code", action="store_true", help="start the folder's train_gpt.py --describe"
    )
    parser.add_argument("--name", help="record name; the folder is DATE_NAME")
    parser.add_argument("--track", choices=TRACKS, help="default: by what the runs are")
    parser.add_argument("--mode", default="", help="evaluation to submit; default: each run's last legal one")
    parser.add_argument("--author", help="name of the author")
    parser.add_argument("--github", dest="github_id", help="GitHub id of the author")
    parser.add_argument("--what", metavar="FILE|TEXT", help="what changed; the first line is the blurb")
    parser.add_argument(
        "--against", metavar="FOLDER|BPB", help="record to compare with, or its published mean"
    )
    parser.add_argument("--require-significance", action="store_true", help="refuse without a shown gain")
    parser.add_argument("--out", type=Path, default=ROOT / "records", help="parent folder of the tracks")
    arguments = parser.parse_args(argv)
    try:
        if arguments.table:
            print(write_table(arguments.out))
            return 0
        folder, verdicts = regenerate(arguments) if arguments.regenerate else submit(arguments)
    except Refused as refused:
        print(*(f"refused: {escape(str(reason))}" for reason in refused.args), sep="\n", file=sys.stderr)
        return 1
    except (ValueError, OSError, Crash) as error:
        print(f"error: {escape_lines(error)}", file=sys.stderr)
        return 2
    print(check.report(check.read_record(folder), verdicts))
    if not arguments.regenerate:
        print(*filter(None, (packing_hint(folder), next_step(folder))), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
