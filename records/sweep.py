"""Sweeps of the trainer's settings, a paired comparison of two of them, and a ledger of single experiments.

    python records/sweep.py run SPACE.toml [--set NAME=8,11,13] [--set MATRIX_LR=0.01..0.1:log] [--trials 40]
        [--launcher "torchrun --standalone --nproc_per_node=8"] [--seeds 1,2] [--workers 4 --gpus 0,1,2,3]
    python records/sweep.py compare A.env B.env --seeds 1,2,3,4
    python records/sweep.py one --note "what changed and why" [--seconds 300]

A trial is one setting, run for each seed; its value is the artifact's sliding val_bpb, the mean over the seeds. The
same command goes on after an interruption and runs what is missing; several machines share a study by --storage URL.
SPACE.toml: recipe (a path from the file's folder), seeds, sampler, trials, prune; [space] with NAME = value, [values]
or {low, high, log}; [rows] with NAME = {settings that belong together}. Settings of the environment override the
recipe's, those of the space both. Exit code 0: done, 1: a run failed or the sweep was stopped, 2: the user's input.
records/README.md has the rules for experiments by `one`.
"""

from __future__ import annotations

import argparse
import ast
import csv
import glob
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import datetime
from math import prod, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from scipy import optimize, stats
from sqlalchemy.exc import SQLAlchemyError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
try:
    import train_gpt as tg
except Exception as error:  # whoever iterates on it breaks it now and then
    sys.exit(f"error: train_gpt.py cannot be imported: {error!r}")
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

TRAINER = ROOT / "train_gpt.py"
METRIC = "val_bpb_sliding"
POLL = 0.2  # seconds between two looks at a run
SEED_STEPS = 10_000_000  # intermediate values of the second seed stand at this step and after it
VAL_LINE = re.compile(r"^step:(\d+)/(\d+) val_loss:\S+ val_bpb:(\S+)", re.MULTILINE)
SAMPLERS = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}  # grid draws nothing
ALPHA, POWER = 0.01, 0.8  # of the smallest effect that a comparison sees
SCORER = ("nll", "token_nll", "Windows", "Chunk", "Score", "Ledger", "sliding_windows", "power_of_two", "Batch",
          "make_batch", "rank_share", "score", "Run.score", "score_artifact", "open_shard", "ByteTable",
          "load_byte_table", "check_fingerprint", "check_manifest", "read_validation",
          "SIZE_CAP", "BOS_ID")  # fmt: skip
COLUMNS = ("date", "commit", "config", "bpb", "bytes", "seconds", "verdict", "note", "scorer", "text", "budget", "run")


class Crash(RuntimeError):
    """A run ended without a result."""


class Stopped(Exception):
    """The user ends the sweep."""


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def config_hash(environ: Mapping[str, str], *, code: bool = True) -> str:
    """Hash of the settings but for seed and name, and of the CODE that reads them. UserError for a wrong setting."""
    config = asdict(tg.load_config(environ)[0]) | dict(seed=0, run_id="")
    return digest(config, [tg.sha256_file(path) for path in tg.code_files()] if code else [])


def train(
    run_id: str,
    environ: Mapping[str, str],
    launcher: Sequence[str],
    logs: Path,
    watch: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """result.json of a run, which is started unless it is there; a folder that an earlier start left half stays.

    WATCH is called every POLL seconds with the run's folder; what it raises ends the run. Crash where no result comes.
    """
    for attempt in itertools.count(1):
        folder = Path("runs") / (run_id if attempt == 1 else f"{run_id}_start{attempt}")
        if (folder / "result.json").exists() or not folder.exists():
            break
    code = 0
    if not folder.exists():
        logs.mkdir(parents=True, exist_ok=True)
        output = logs / f"{folder.name}.out"
        with open(output, "wb") as file:
            process = subprocess.Popen([*launcher, str(TRAINER)], env={**environ, "RUN_ID": folder.name},
                                       stdout=file, stderr=subprocess.STDOUT)  # fmt: skip
            try:
                while (code := process.poll()) is None:
                    watch(folder)
                    time.sleep(POLL)
            except BaseException:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
    if not (folder / "result.json").exists():
        last = output.read_text(errors="replace").strip().rpartition("\n")[2]
        raise Crash(f"{folder}: exit code {code}, see {output}: {last[:200]}")
    return json.loads((folder / "result.json").read_text())


# ----------------------------------------------------------------------------------------------------------------------
# The space
# ----------------------------------------------------------------------------------------------------------------------


class Space(NamedTuple):
    """What is swept. A setting has one value (fixed), several (choices) or a range; rows are settings by name."""

    name: str
    recipe: str
    fixed: dict[str, str]
    choices: dict[str, list[str]]
    ranges: dict[str, dict[str, Any]]
    rows: dict[str, dict[str, str]]
    seeds: list[int]
    sampler: str
    trials: int | None
    prune: int

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        choices = {"row": list(self.rows), **self.choices} if self.rows else self.choices
        kinds = {name: CategoricalDistribution(values) for name, values in choices.items()}
        for name, given in self.ranges.items():
            whole = isinstance(given["low"], int) and isinstance(given["high"], int)
            kinds[name] = (IntDistribution if whole else FloatDistribution)(**given)
        return kinds

    def settings(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The environment variables of a point."""
        own = {name: as_text(value) for name, value in values.items() if name != "row"}
        return self.fixed | own | self.rows.get(values.get("row", ""), {})

    def grid(self) -> Iterator[dict[str, str]]:
        """Every point of a space without ranges, once."""
        kinds = {name: kind.choices for name, kind in self.distributions.items()}
        return (dict(zip(kinds, values, strict=True)) for values in itertools.product(*kinds.values()))

    def points(self) -> list[dict[str, str]]:
        """What each trial is given: a point of the grid, or nothing, for the sampler to choose."""
        return list(self.grid()) if self.sampler == "grid" else [{} for _ in range(self.trials)]


def as_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else str(value)


def parse_set(text: str) -> tuple[str, Any]:
    """NAME=a,b,c or NAME=low..high[:log] as a space file would have it."""
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise tg.UserError(f"--set {text}: NAME=value,value or NAME=low..high or NAME=low..high:log")
    if match := re.fullmatch(r"([^,:]+?)\.\.([^,:]+)(:log)?", values):
        try:
            low, high = (int(end) if re.fullmatch(r"-?\d+", end) else float(end) for end in match.groups()[:2])
        except ValueError as error:
            raise tg.UserError(f"--set {text}: {error}") from error
        return name, dict(low=low, high=high, log=bool(match[3]))
    return name, values.split(",")


def read_space(path: Path | None, sets: Sequence[str], given: Mapping[str, Any]) -> Space:
    """The space of a file with what the command line adds. UserError for what it cannot mean."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise tg.UserError(f"{path}: {error}") from error
    kinds = dict(recipe=str, seeds=list, sampler=str, trials=int, prune=int, space=dict, rows=dict)
    if unknown := sorted(set(table) - set(kinds)):
        raise tg.UserError(f"{path}: unknown {', '.join(unknown)}; there are {', '.join(kinds)}")
    if wrong := [f"{key} is no {kinds[key].__name__}" for key in table if not isinstance(table[key], kinds[key])]:
        raise tg.UserError(f"{path}: {', '.join(wrong)}")
    table |= {key: given[key] for key in ("seeds", "sampler", "trials", "prune") if given.get(key) is not None}
    fixed, choices, ranges = {}, {}, {}
    for name, value in {**table.get("space", {}), **dict(map(parse_set, sets))}.items():
        if isinstance(value, dict):
            if not {"low", "high"} <= set(value) <= {"low", "high", "log"} or not value["low"] < value["high"]:
                raise tg.UserError(f"{name}: a range is {{low, high, log}}, low below high")
            ranges[name] = value
        else:
            values = [as_text(each) for each in (value if isinstance(value, list) else [value])]
            if not values or len(set(values)) < len(values):
                raise tg.UserError(f"{name}: no value, or one twice")
            fixed, choices = (
                (fixed, choices | {name: values}) if len(values) > 1 else (fixed | {name: values[0]}, choices)
            )
    rows = {row: {name: as_text(value) for name, value in own.items()} for row, own in table.get("rows", {}).items()}
    recipe = str(path.parent / table["recipe"]) if "recipe" in table else ""
    seeds = table.get("seeds", [1337])
    if len(set(seeds)) < len(seeds) or not seeds:
        raise tg.UserError(f"seeds {seeds}: one at least, each once")
    name = given.get("study") or (path.stem if path else "sweep")
    sampler = table.get("sampler") or ("tpe" if ranges else "grid")
    space = Space(
        name, recipe, fixed, choices, ranges, rows, seeds, sampler, table.get("trials"), table.get("prune", 5)
    )
    return with_trials(space)


def with_trials(space: Space) -> Space:
    """SPACE with its number of trials. UserError where sampler, ranges and number do not go together."""
    if space.sampler not in (*SAMPLERS, "grid"):
        raise tg.UserError(f"sampler {space.sampler}: tpe, random or grid")
    if not space.distributions:
        raise tg.UserError("nothing to sweep: a setting with several values, a range, or rows")
    if space.sampler != "grid":
        return space if space.trials else space._replace(trials=20)
    if space.ranges:
        raise tg.UserError(f"a grid needs values, and {', '.join(space.ranges)} has a range")
    points = prod(len(kind.choices) for kind in space.distributions.values())
    if space.trials not in (None, points):
        raise tg.UserError(f"the grid has {points} points: leave --trials out, or choose another sampler")
    return space._replace(trials=points)


def check_space(space: Space, environ: Mapping[str, str]) -> None:
    """UserError, naming every problem, for a name or value that the trainer would refuse.

    Of a grid every point is tried; else every value for itself, and the first of each together.
    """
    by_name, problems = {f.name.upper(): f for f in fields(tg.Config)}, []
    values = [(name, each) for name, several in space.choices.items() for each in several]
    values += [(name, as_text(given[end])) for name, given in space.ranges.items() for end in ("low", "high")]
    for name, text in [*values, *space.fixed.items(), *(pair for own in space.rows.values() for pair in own.items())]:
        if name in ("SEED", "RUN_ID") or name not in by_name:
            near = tg.likely_name(name, set(by_name))
            problems.append(f"{name}: the sweep's own" if name in by_name else
                            f"{name} is no setting" + (f", did you mean {near}?" if near else ""))  # fmt: skip
            continue
        try:
            tg.parse_value(by_name[name], text)
        except ValueError as error:
            problems.append(str(error))
    swept = {*space.choices, *space.ranges, *space.fixed}
    problems += [f"row {row}: {name} is swept too" for row, own in space.rows.items() for name in swept & set(own)]
    first = {
        name: getattr(kind, "choices", [getattr(kind, "low", "")])[0] for name, kind in space.distributions.items()
    }
    for point in space.grid() if not problems and space.sampler == "grid" else [first]:
        try:
            tg.load_config({**environ, **(space.settings(point) if not problems else {}), "RUN_ID": space.name})
        except tg.UserError as error:
            problems.append(f"{point}: {error}")
    if problems:
        raise tg.UserError("the space has problems:\n" + "\n".join(f"  {p}" for p in dict.fromkeys(problems)))


# ----------------------------------------------------------------------------------------------------------------------
# A sweep
# ----------------------------------------------------------------------------------------------------------------------
#
# Every trial of a study is a ticket: a waiting trial of Optuna with its number, its point (empty: the sampler chooses)
# and its attempt. Whoever pops it runs it. A ticket whose last attempt was killed gets another, with the same point and
# the same runs, of which those that have a result are not run again. Several processes may add the same attempt; the
# first in the study counts.


class Sweep:
    """A study, opened or made, and what is needed to run its trials."""

    def __init__(self, space: Space, environ: Mapping[str, str], launcher: Sequence[str], storage: str, grace: int):
        self.space, self.environ, self.launcher = space, environ, launcher
        self.folder = Path("runs") / space.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.beat, self.stop, self.lock = max(grace // 4, 1), threading.Event(), threading.Lock()
        url = storage or f"sqlite:///{self.folder / 'study.db'}"
        engine = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else None
        for attempt in range(4):
            try:
                self.storage = optuna.storages.RDBStorage(
                    url, engine_kwargs=engine, heartbeat_interval=self.beat, grace_period=grace
                )
                break
            except (ImportError, ValueError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                if attempt == 3 or isinstance(error, ImportError | ValueError):
                    raise tg.UserError(f"--storage {url.partition('://')[0]}: {error}") from error
                time.sleep(1 + random.random())  # a new database, whose tables two processes make at once
        sampler = SAMPLERS.get(space.sampler, optuna.samplers.RandomSampler)()
        pruner = optuna.pruners.MedianPruner(space.prune) if space.prune else optuna.pruners.NopPruner()
        self.study = optuna.create_study(
            storage=self.storage, study_name=space.name, sampler=sampler, pruner=pruner, load_if_exists=True
        )
        base = config_hash({**environ, **space.fixed})
        told = digest(space._replace(name="", recipe="", trials=0 if space.sampler != "grid" else space.trials), base)
        if self.study.user_attrs.get("space", told) != told:
            raise tg.UserError(f"study {space.name} was made with another space, base or code: choose another --study")
        self.study.set_user_attr("space", told)

    def attempts(self) -> dict[int, list[FrozenTrial]]:
        """The trials of each ticket, by attempt; of one that was added twice the first."""
        found: dict[int, dict[int, FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            own = found.setdefault(trial.user_attrs["ticket"], {})
            own.setdefault(trial.user_attrs["attempt"], trial)
        return {ticket: [own[attempt] for attempt in sorted(own)] for ticket, own in found.items()}

    def add_tickets(self) -> None:
        """Put into the queue what is new, and what was killed: it failed without saying why."""
        optuna.storages.fail_stale_trials(self.study)
        found = self.attempts()
        for ticket, point in enumerate(self.space.points()):
            tried = found.get(ticket, [])
            if not tried or (tried[-1].state == TrialState.FAIL and "why" not in tried[-1].user_attrs):
                known = next(
                    (t.params for t in reversed(tried) if len(t.params) == len(self.space.distributions)), point
                )
                self.study.enqueue_trial(known, user_attrs=dict(ticket=ticket, attempt=len(tried)))

    def claim(self) -> Trial | None:
        """A waiting trial that is now ours, or None."""
        for waiting in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            ticket, attempt, trial_id = (*(waiting.user_attrs[key] for key in ("ticket", "attempt")), waiting._trial_id)
            self.storage.record_heartbeat(trial_id)  # first: one that dies right after the claim must be found
            try:
                if not self.storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                    continue
            except UpdateFinishedTrialError:
                continue
            if self.attempts()[ticket][attempt].number == waiting.number:
                return Trial(self.study, trial_id)
            self.tell(trial_id, TrialState.FAIL)  # added twice
        return None

    def tell(self, trial_id: int, state: TrialState, value: float | None = None) -> None:
        try:
            self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])
        except UpdateFinishedTrialError:
            print(f"trial {trial_id} was given up while it ran: --grace is too short for this machine")

    def work(self, gpus: str) -> None:
        """Run trials until none is left, here or elsewhere; an error ends the other workers too."""
        try:
            self.work_on(gpus)
        except BaseException:
            self.stop.set()
            raise

    def work_on(self, gpus: str) -> None:
        while not self.stop.is_set():
            with self.lock:
                self.add_tickets()
                trial = self.claim()
            if trial is not None:
                self.run_trial(trial, {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
            elif any(not tried[-1].state.is_finished() for tried in self.attempts().values()):
                self.stop.wait(1)  # another process has them; should it die, they are ours
            else:
                return

    def run_trial(self, trial: Trial, devices: Mapping[str, str]) -> None:
        """Run the point of a trial for each seed and tell the study how it ended."""
        values = {name: trial._suggest(name, kind) for name, kind in self.space.distributions.items()}
        environ, results = {**self.environ, **self.space.settings(values), **devices}, []
        name = f"{self.space.name}_{trial.user_attrs['ticket']:03d}"
        try:
            key = config_hash(environ)
            for index, seed in enumerate(self.space.seeds):
                watch = self.watcher(trial, index * SEED_STEPS)
                own = {**environ, "SEED": str(seed)}
                results.append(train(f"{name}_{key}_seed{seed}", own, self.launcher, self.folder, watch))
                trial.set_user_attr(
                    "results", [{k: r.get(k) for k in (METRIC, "bytes_total", "fits")} for r in results]
                )
            value = mean(result[METRIC] for result in results)
            self.tell(trial._trial_id, TrialState.COMPLETE, value)
            print(f"trial {name}: {value:.4f} {self.space.settings(values)}", flush=True)
        except optuna.TrialPruned:
            steps = trial.storage.get_trial(trial._trial_id).intermediate_values
            self.tell(trial._trial_id, TrialState.PRUNED, steps[max(steps)])
            print(f"trial {name}: pruned {self.space.settings(values)}", flush=True)
        except Stopped:
            self.tell(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            print(f"trial {name} was given up while it ran: --grace is too short for this machine")
        except (Crash, tg.UserError) as error:
            if not self.stop.wait(1):  # an interrupt reaches the runs before us
                trial.set_user_attr("why", str(error))
            self.tell(trial._trial_id, TrialState.FAIL)
            print(f"trial {name}: {error}", flush=True)

    def watcher(self, trial: Trial, offset: int) -> Callable[[Path], None]:
        """A function for `train` that shows signs of life, reports val_bpb lines, and ends what is to be ended."""
        due, told = 0.0, 0

        def watch(folder: Path) -> None:
            nonlocal due, told
            if self.stop.is_set():
                raise Stopped
            if time.monotonic() > due:
                self.storage.record_heartbeat(trial._trial_id)
                due = time.monotonic() + self.beat
            log = folder / "train.log"
            lines = VAL_LINE.findall(log.read_text(errors="replace")) if log.exists() else []
            for step, last, bpb in lines[told:]:
                if 0 < int(step) < int(last):  # before the first step all are alike, after the last nothing is saved
                    trial.report(float(bpb), offset + int(step))
                    if trial.should_prune():
                        raise optuna.TrialPruned
            told = len(lines)

        return watch

    def run(self, workers: int, gpus: Sequence[str]) -> int:
        """Run all trials with WORKERS threads, then report; returns the exit code."""
        if gpus and len(gpus) % workers:
            raise tg.UserError(f"{len(gpus)} GPUs cannot be shared by {workers} workers")
        share = len(gpus) // workers
        sets = [",".join(gpus[share * worker : share * (worker + 1)]) for worker in range(workers)]
        signals = {
            number: signal.signal(number, lambda *_: self.stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            with ThreadPoolExecutor(workers) as pool:
                for done in [pool.submit(self.work, each) for each in sets]:
                    done.result()
        finally:
            self.stop.set()
            for number, handler in signals.items():
                signal.signal(number, handler)
        return report(self.space, {k: tried[-1] for k, tried in self.attempts().items()}, self.study, self.folder)


def report(space: Space, trials: Mapping[int, FrozenTrial], study: optuna.Study, folder: Path) -> int:
    """Print the trials, best first, and write them as trials.csv and pictures; 1 where one has failed or is missing."""
    rows = []
    for ticket, trial in trials.items():
        results = trial.user_attrs.get("results", [])
        rows.append(
            dict(trial=ticket, state=trial.state.name.lower(), val_bpb=trial.value, row=trial.params.get("row", ""))
            | {f"seed_{seed}": result[METRIC] for seed, result in zip(space.seeds, results, strict=False)}
            | dict(bytes_total=max((r["bytes_total"] or 0 for r in results), default=""))
            | dict(fits=all(r["fits"] for r in results) if results else "", why=trial.user_attrs.get("why", ""))
            | {name: as_text(value) for name, value in trial.params.items() if name != "row"}
        )
    order = ("complete", "pruned", "running", "waiting", "fail")
    rows.sort(key=lambda row: (order.index(row["state"]), row["val_bpb"] if row["val_bpb"] is not None else 0.0))
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "trials.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{'trial':>5} {'state':9}{'bpb':>9} {'bytes':>11}  setting")
    for row in rows:
        params = trials[row["trial"]].params
        bpb = "-" if row["val_bpb"] is None else f"{row['val_bpb']:.4f}"
        size = f"{row['bytes_total'] or '-'}{'' if row['fits'] in (True, '') else ' over'}"
        setting = " ".join(f"{name}={as_text(value)}" for name, value in params.items())
        print(f"{row['trial']:>5} {row['state']:9}{bpb:>9} {size:>11}  {setting}")
    print(f"table: {folder / 'trials.csv'}")
    draw(study, folder)
    states = [trial.state for trial in trials.values()]
    return 0 if all(state in (TrialState.COMPLETE, TrialState.PRUNED) for state in states) else 1


def draw(study: optuna.Study, folder: Path) -> None:
    """parallel_coordinate.png and importance.png, or a line that says what they lack."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as plots

    values = {trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    if len(values) < 2:
        print("no pictures: they need two finished trials of different value")
        return
    for name, plot in (
        ("parallel_coordinate", plots.plot_parallel_coordinate),
        ("importance", plots.plot_param_importances),
    ):
        axes = plot(study)
        axes.figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close(axes.figure)
        print(f"picture: {folder / name}.png")


# ----------------------------------------------------------------------------------------------------------------------
# Two settings
# ----------------------------------------------------------------------------------------------------------------------


class Paired(NamedTuple):
    """Differences B less A by seed: mean, 95 % interval, two-sided p, and the smallest effect that n of them see."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    visible: float


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Student's paired test of B against A; `visible` is found at ALPHA with probability POWER, at this spread."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n, middle, error = len(differences), mean(differences), stdev(differences) / sqrt(len(differences))
    if error == 0:
        return Paired(n, middle, middle, middle, 1.0 if middle == 0 else 0.0, 0.0)
    t, edge = stats.t(n - 1), stats.t.ppf(1 - ALPHA / 2, n - 1)
    half = t.ppf(0.975) * error
    found = optimize.brentq(lambda shift: stats.nct.sf(edge, n - 1, shift) - POWER, 0.0, 100 + 10 * edge)
    return Paired(n, middle, middle - half, middle + half, 2 * t.sf(abs(middle / error)), found * error)


def compare(files: Sequence[Path], seeds: Sequence[int], launcher: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run both settings for each seed, then say what the differences say; nothing is said before all have run."""
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise tg.UserError("--seeds: two at least, each once")
    arms = [{**environ, "RECIPE": str(path)} for path in files]
    keys = [config_hash(arm) for arm in arms]
    if keys[0] == keys[1]:
        raise tg.UserError(f"{files[0]} and {files[1]} are the same setting")
    folder = Path("runs") / f"compare_{files[0].stem}_{files[1].stem}_{digest(keys)}"
    plan = folder / "seeds.json"
    if plan.exists() and json.loads(plan.read_text()) != sorted(seeds):
        raise tg.UserError(f"{plan} fixed the seeds at {plan.read_text()} before the first run; to stop earlier "
                           "or to go on because of what was seen would make the p-value wrong")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps(sorted(seeds)))
    scores: list[list[float]] = [[], []]
    for turn, seed in enumerate(seeds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):  # ABBA: what drifts with time hits both alike
            name = f"{folder.name}_{'ab'[side]}_seed{seed}"
            scores[side].append(train(name, {**arms[side], "SEED": str(seed)}, launcher, folder)[METRIC])
            print(f"run {len(scores[0] + scores[1])} of {2 * len(seeds)}: {name}", flush=True)
    found = paired(*scores)
    print(f"{'seed':>10} {files[0].stem:>14} {files[1].stem:>14} {'difference':>12}")
    for seed, a, b in zip(seeds, *scores, strict=True):
        print(f"{seed:>10} {a:>14.5f} {b:>14.5f} {b - a:>+12.5f}")
    print(f"{files[1].stem} less {files[0].stem}: {found.mean:+.5f} bpb, 95 % interval {found.low:+.5f} to "
          f"{found.high:+.5f}, p = {found.p:.2g} (paired t-test, two-sided; n = {found.n}, fixed before)")  # fmt: skip
    print(f"smallest effect that {found.n} seeds see, p < {ALPHA} four times in five: {found.visible:.5f}")
    (folder / "result.json").write_text(
        json.dumps(dict(seeds=list(seeds), a=scores[0], b=scores[1], **found._asdict()))
    )
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# The ledger
# ----------------------------------------------------------------------------------------------------------------------


def scorer_hash(source: str) -> str:
    """Hash of the syntax trees of what scores, without docstrings; comments and layout do not count."""
    found = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            names += [each.id for each in getattr(node, "targets", []) if isinstance(each, ast.Name)]
            for name in names:
                found.setdefault(prefix + name, []).append(node)  # a second definition replaces the first: it counts
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")

    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    collect(tree.body, "")
    return digest([(name, [ast.dump(node) for node in found.get(name, [])]) for name in SCORER])


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def read_ledger(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def experiment(note: str, seconds: int, launcher: Sequence[str], environ: Mapping[str, str], ledger: Path) -> int:
    """Run the working tree for SECONDS of training and append a line to the ledger; returns the exit code.

    UserError, and no line, where scorer, validation text or budget are not those of the ledger's first line.
    """
    if not note.strip() or re.search(r"[\t\r\n]", note):
        raise tg.UserError("--note: one line, without tabs, on what was changed and why")
    environ = {**environ, "MAX_WALLCLOCK_SECONDS": str(seconds)}
    config, lines = tg.load_config(environ)[0], read_ledger(ledger)
    texts = sorted(glob.glob(config.val_files or f"{config.data_path}/fineweb_val_*.bin"))
    fixed = dict(scorer=scorer_hash(TRAINER.read_text(encoding="utf-8")), budget=str(seconds),
                 text=digest([tg.sha256_file(path) for path in texts]))  # fmt: skip
    for key, value in fixed.items():
        if lines and lines[0][key] != value:
            raise tg.UserError(f"{key} is {value}, and {lines[0][key]} in the first line of {ledger}: such scores "
                               "cannot be compared; put it back, or start another --ledger")  # fmt: skip
    line = dict(
        date=f"{datetime.now():%Y-%m-%dT%H:%M:%S}", commit=git("rev-parse", "--short", "HEAD") or "-", note=note
    )
    line["commit"] += "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    line |= fixed | dict(config=config_hash(environ, code=False), bpb="-", bytes="-", verdict="crash")
    line["run"], began = f"one_{line['date'].replace(':', '-')}", time.monotonic()

    def watch(folder: Path) -> None:
        if time.monotonic() - began > 4 * seconds + 600:  # export and scoring have taken leave of their senses
            raise Crash(f"{folder}: not done after {4 * seconds + 600} s")

    try:
        result = train(line["run"], environ, launcher, ledger.parent, watch)
        best = min((float(old["bpb"]) for old in lines if old["verdict"] == "keep"), default=float("inf"))
        kept = result[METRIC] < best and result["fits"] and result.get("legal", True)
        line |= dict(bpb=f"{result[METRIC]:.6f}", bytes=result["bytes_total"], verdict="keep" if kept else "discard")
    except Crash as error:
        print(f"error: {error}", file=sys.stderr)
    line["seconds"] = f"{time.monotonic() - began:.0f}"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with open(ledger, "a", encoding="utf-8") as file:
        head = "" if lines else "\t".join(COLUMNS) + "\n"
        file.write(head + "\t".join(str(line[name]) for name in COLUMNS) + "\n")
    print(" ".join(f"{name}={line[name]}" for name in COLUMNS))
    return 1 if line["verdict"] == "crash" else 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def int_list(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="a sweep, begun or gone on with")
    run.add_argument("space", nargs="?", type=Path, help="a TOML file; or all by --set")
    run.add_argument("--set", action="append", default=[], help="NAME=a,b,c or NAME=low..high[:log]; adds or replaces")
    run.add_argument("--trials", type=int, help="of the whole study; default: 20, or every point of the grid")
    run.add_argument("--seeds", type=int_list, help="of each trial; default: 1337")
    run.add_argument(
        "--sampler", choices=["tpe", "random", "grid"], help="default: tpe where there is a range, else grid"
    )
    run.add_argument(
        "--prune", type=int, help="end trials above the median, once so many finished; 0: none; default: 5"
    )
    run.add_argument("--workers", type=int, default=1, help="trials at a time; default: 1")
    run.add_argument("--gpus", help="their numbers, shared evenly by the workers; default: CUDA_VISIBLE_DEVICES")
    run.add_argument("--storage", default="", help="URL of the database; default: SQLite in runs/STUDY/study.db")
    run.add_argument("--study", help="default: name of the file")
    run.add_argument("--grace", type=int, default=60, help="seconds without a sign of life: it was killed; default: 60")
    two = commands.add_parser("compare", help="two settings, paired by seed")
    two.add_argument("files", nargs=2, type=Path, metavar="ENV", help="recipes; the environment overrides both")
    two.add_argument("--seeds", type=int_list, required=True, help="all of them, fixed before the first run")
    one = commands.add_parser("one", help="one experiment with the working tree, for the ledger")
    one.add_argument("--note", required=True, help="what was changed, and why")
    one.add_argument("--seconds", type=int, default=300, help="of training; default: 300")
    one.add_argument("--ledger", type=Path, default=Path("runs/ledger.tsv"), help="default: runs/ledger.tsv")
    for each in (run, two, one):
        each.add_argument(
            "--launcher", type=shlex.split, default=[sys.executable], help="before train_gpt.py; default: python"
        )
    return parser


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    given, environ = make_parser().parse_args(argv), dict(os.environ if environ is None else environ)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats and these plots
    try:
        if given.command == "compare":
            return compare(given.files, given.seeds, given.launcher, environ)
        if given.command == "one":
            return experiment(given.note, given.seconds, given.launcher, environ, given.ledger)
        space = read_space(given.space, given.set, vars(given))
        environ |= {"RECIPE": space.recipe} if space.recipe else {}
        check_space(space, environ)
        if given.workers < 1 or space.prune < 0:
            raise tg.UserError("--workers from 1, --prune from 0")
        gpus = given.gpus or environ.get("CUDA_VISIBLE_DEVICES") or ""
        sweep = Sweep(space, environ, given.launcher, given.storage, given.grace)
        return sweep.run(given.workers, gpus.split(",") if gpus else [])
    except tg.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Crash as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
