"""Sweeps of the trainer's settings, a paired comparison of two of them, and a ledger of single experiments.

    python records/sweep.py run SPACE.toml [--set NAME=8,11,13] [--set MATRIX_LR=0.01..0.1:log] [--trials 40]
        [--launcher "torchrun --standalone --nproc_per_node=8"] [--seeds 1,2] [--workers 4 --gpus 0,1,2,3]
    python records/sweep.py compare A.env B.env --seeds 1,2,3,4
    python records/sweep.py one --note "what changed and why" [--seconds 300]

A trial is one setting, run for each seed; its value is the artifact's sliding val_bpb, the mean over the seeds. The
same command goes on after an interruption and runs what is missing; several machines share a study by --storage URL.
SPACE.toml: recipe (a path from the file's folder), seeds, sampler, trials, prune; [space] with NAME = value, [values]
or {low, high, log}; [rows] with NAME = {settings that belong together}. Settings of the environment override the
recipe's, those of the space both. TRACK=trackio or TRACK=wandb logs every run there too. Exit code 0: done, 1: a run
failed or the sweep was stopped, 2: the user's input. records/README.md has the rules for experiments by `one`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from functools import partial
from io import TextIOWrapper
from math import prod, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import optuna
from launch import METRIC, Crash, config_hash, digest, tracker, train, trainer
from ledger import experiment
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from runfiles import create, escape_lines, save_figure, write_file
from scipy import optimize, stats
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

VAL_LINE = re.compile(r"^step:(\d+)/(\d+) val_loss:\S+ val_bpb:(\S+)", re.MULTILINE)


class Stopped(Exception):
    """The user ends the sweep."""


# ----------------------------------------------------------------------------------------------------------------------
# The space
# ----------------------------------------------------------------------------------------------------------------------

SAMPLERS = {  # grid draws nothing, but Optuna wants one
    "tpe": partial(optuna.samplers.TPESampler, constant_liar=True),  # workers see what the others are trying
    "random": optuna.samplers.RandomSampler,
    "grid": optuna.samplers.RandomSampler,
}
SPACE_KEYS = dict(recipe=str, seeds=list, sampler=str, trials=int, prune=int, space=dict, rows=dict)


class Space(NamedTuple):
    """What is swept: settings with their values or range, `row` among them where there are rows of settings."""

    name: str
    recipe: str
    kinds: dict[str, BaseDistribution]
    rows: dict[str, dict[str, str]]
    seeds: list[int]
    sampler: str
    trials: int
    prune: int

    def settings(self, point: Mapping[str, Any]) -> dict[str, str]:
        """The environment variables of a point."""
        own = {name: as_text(value) for name, value in point.items() if name != "row"}
        return own | self.rows.get(point.get("row", ""), {})

    def grid(self) -> Iterator[dict[str, str]]:
        """Every point of a space without ranges, once."""
        values = itertools.product(*(kind.choices for kind in self.kinds.values()))
        return (dict(zip(self.kinds, each, strict=True)) for each in values)


def as_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else str(value)


def ends(kind: BaseDistribution) -> list[Any]:
    """The values of a setting, or the ends of its range."""
    return list(kind.choices) if isinstance(kind, CategoricalDistribution) else [kind.low, kind.high]


def parse_set(text: str) -> tuple[str, Any]:
    """NAME=a,b,c or NAME=low..high[:log] as a space file would have it."""
    name, _, values = text.partition("=")
    if not values:
        raise ValueError(f"--set {text}: NAME=value,value or NAME=low..high or NAME=low..high:log")
    if match := re.fullmatch(r"([^,:]+?)\.\.([^,:]+)(:log)?", values):
        try:
            low, high = (int(end) if re.fullmatch(r"-?\d+", end) else float(end) for end in match.groups()[:2])
        except ValueError as error:
            raise ValueError(f"--set {text}: {error}") from error
        return name, dict(low=low, high=high, log=bool(match[3]))
    return name, values.split(",")


def distribution(name: str, value: Any) -> BaseDistribution:
    """What a space file says of a setting: a value, several, or {low, high, log}. ValueError for anything else."""
    if isinstance(value, dict):
        bounds = [value.get(end) for end in ("low", "high")]
        if not set(value) <= {"low", "high", "log"} or not all(isinstance(end, int | float) for end in bounds):
            raise ValueError(f"{name}: a range is {{low, high, log}}, not {value}")
        if not bounds[0] < bounds[1] or (value.get("log") and bounds[0] <= 0):
            raise ValueError(f"{name}: a range has its low below high, and above 0 where it is logarithmic: {value}")
        return (IntDistribution if all(isinstance(end, int) for end in bounds) else FloatDistribution)(**value)
    values = [as_text(each) for each in (value if isinstance(value, list) else [value])]
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name}: no value, or one twice")
    return CategoricalDistribution(values)


def read_space(path: Path | None, sets: Sequence[str], given: Mapping[str, Any]) -> Space:
    """The space of a file with what the command line adds. ValueError for what it cannot mean."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if unknown := sorted(set(table) - set(SPACE_KEYS)):
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; there are {', '.join(SPACE_KEYS)}")
    if wrong := [f"{key} is no {kind.__name__}" for key, kind in SPACE_KEYS.items() if key in table
                 and not isinstance(table[key], kind)]:  # fmt: skip
        raise ValueError(f"{path}: {', '.join(wrong)}")
    table |= {key: given[key] for key in ("seeds", "sampler", "trials", "prune") if given.get(key) is not None}
    rows = {row: {name: as_text(value) for name, value in own.items()} for row, own in table.get("rows", {}).items()}
    values = ({"row": list(rows)} if rows else {}) | table.get("space", {}) | dict(map(parse_set, sets))
    kinds = {name: distribution(name, value) for name, value in values.items()}
    ranges = [name for name, kind in kinds.items() if not isinstance(kind, CategoricalDistribution)]
    points = 0 if ranges else prod(len(kind.choices) for kind in kinds.values())
    sampler, seeds = table.get("sampler", "tpe" if ranges else "grid"), table.get("seeds", [1337])
    distinct = {seed for seed in seeds if isinstance(seed, int)}
    trials, prune = table.get("trials", points if sampler == "grid" else 20), table.get("prune", 5)
    for wrong, said in (
        (sampler not in SAMPLERS, f"sampler {sampler}: {', '.join(SAMPLERS)}"),
        (all(kind.single() for kind in kinds.values()), "nothing to sweep: several values, a range, or rows"),
        (sampler == "grid" and ranges, f"a grid needs values, and {', '.join(ranges)} has a range"),
        (sampler == "grid" and trials != points, f"the grid has {points} points: leave --trials out, or no grid"),
        (trials < 1 or prune < 0, f"trials from 1, prune from 0, not {trials} and {prune}"),
        (not seeds or len(distinct) < len(seeds), f"seeds {seeds}: whole numbers, one at least, each once"),
        ("row" in kinds and not set(ends(kinds["row"])) <= set(rows), f"row: there are {', '.join(rows) or 'none'}"),
    ):
        if wrong:
            raise ValueError(said)
    name = given.get("study") or (path.stem if path else "sweep")
    return Space(name, str(path.parent / table["recipe"]) if "recipe" in table else "", kinds, rows, seeds, sampler,
                 trials, prune)  # fmt: skip


def check_space(space: Space, environ: Mapping[str, str]) -> None:
    """ValueError, naming every problem, for a name or value that the trainer would refuse.

    Of a grid every point is tried; else every value for itself, and the first of each together.
    """
    tg, problems, own = trainer(), [], [pair for row in space.rows.values() for pair in row.items()]
    by_name = {f.name.upper(): f for f in fields(tg.Config)}
    for name, value in [(name, end) for name, kind in space.kinds.items() if name != "row" for end in ends(kind)] + own:
        try:
            if name in ("SEED", "RUN_ID"):
                raise ValueError(f"{name}: the sweep's own")
            if name not in by_name:
                near = tg.likely_name(name, set(by_name))
                raise ValueError(f"{name} is no setting" + (f", did you mean {near}?" if near else ""))
            tg.parse_value(by_name[name], as_text(value))
        except ValueError as error:
            problems.append(str(error))
    problems += [f"{name} is swept, and in a row too" for name in space.kinds.keys() & dict(own).keys()]
    first = {name: ends(kind)[0] for name, kind in space.kinds.items()}
    for point in [] if problems else space.grid() if space.sampler == "grid" else [first]:
        try:
            tg.load_config({**environ, **space.settings(point), "RUN_ID": space.name})
        except tg.UserError as error:
            problems.append(f"{point}: {error}")
    if problems:
        raise ValueError("the space has problems:\n" + "\n".join(f"  {p}" for p in dict.fromkeys(problems)))


# ----------------------------------------------------------------------------------------------------------------------
# A sweep
# ----------------------------------------------------------------------------------------------------------------------
#
# A study has a ticket for every point, or for every trial whose point the sampler chooses. An attempt at a ticket is a
# trial of Optuna: whoever turns it from waiting to running runs it. A ticket whose last attempt was lost gets another,
# with the same point and the same runs, of which those that have a result are not run again. Several processes may add
# the same attempt; the first in the study counts, the others wait for ever.

SEED_STEPS = 10_000_000  # intermediate values of the second seed stand at this step and after it


def open_storage(url: str, grace: int) -> optuna.storages.RDBStorage:
    """The database; tried again while another process makes the tables of a new one. ValueError where it cannot be."""
    engine = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else None
    for left in range(3, -1, -1):
        try:
            return optuna.storages.RDBStorage(url, engine, heartbeat_interval=max(grace // 4, 1), grace_period=grace)
        except (ImportError, ValueError, SQLAlchemyError, StorageInternalError) as error:
            if left == 0 or not isinstance(error, DBAPIError | StorageInternalError):
                raise ValueError(f"--storage {url.partition('://')[0]}: {error}") from error
            time.sleep(1 + random.random())


def lost(trial: FrozenTrial) -> bool:
    """Whether its run was killed or stopped: it failed without saying why."""
    return trial.state == TrialState.FAIL and "why" not in trial.user_attrs


class Sweep:
    """A study, opened or made, and what is needed to run its trials."""

    def __init__(self, space: Space, environ: Mapping[str, str], launcher: Sequence[str], storage: str, grace: int):
        self.space, self.environ, self.launcher = space, environ, launcher
        self.points = list(space.grid()) if space.sampler == "grid" else [{}] * space.trials  # {}: the sampler chooses
        self.folder, self.stop, self.lock = Path("runs") / space.name, threading.Event(), threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        own = URL.create("sqlite", database=str(self.folder / "study.db"))  # quotes what a URL would take apart
        self.storage = open_storage(storage or own.render_as_string(), grace)
        pruner = optuna.pruners.MedianPruner(space.prune) if space.prune else optuna.pruners.NopPruner()
        self.study = optuna.create_study(storage=self.storage, study_name=space.name, sampler=SAMPLERS[space.sampler](),
                                         pruner=pruner, load_if_exists=True)  # fmt: skip
        self.check_identity()
        self.study.set_user_attr("space", self.identity())

    def identity(self) -> str:
        """Hash of what all trials of a study have in common; the number of sampled trials may grow."""
        base = {name: ends(kind)[0] for name, kind in self.space.kinds.items()}
        common = self.space._replace(name="", recipe="", trials=0)
        return digest(common, config_hash({**self.environ, **self.space.settings(base)}))

    def check_identity(self) -> None:
        if self.study.user_attrs.get("space", told := self.identity()) != told:
            raise ValueError(f"study {self.space.name} was begun with another space, base or code: put that back, "
                             "or choose another --study")  # fmt: skip

    def attempts(self) -> dict[int, list[FrozenTrial]]:
        """The trials of each ticket, by attempt; of one that was added twice the first."""
        found: dict[int, dict[int, FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            found.setdefault(trial.user_attrs["ticket"], {}).setdefault(trial.user_attrs["attempt"], trial)
        return {ticket: [own[attempt] for attempt in sorted(own)] for ticket, own in found.items()}

    def last_attempts(self) -> list[FrozenTrial]:
        """Of each ticket that this process wants; of one with more trials than that, others may be lost."""
        found = self.attempts()
        return [found[ticket][-1] for ticket in range(len(self.points))]

    def claim(self) -> Trial | None:
        """A ticket's trial that is now ours, or None where no ticket is new, waiting or lost."""
        optuna.storages.fail_stale_trials(self.study)
        found = self.attempts()
        for ticket, point in enumerate(self.points):
            tried = found.get(ticket, [])
            if not tried or lost(tried[-1]):
                known = [trial.params for trial in tried if len(trial.params) == len(self.space.kinds)]
                self.study.enqueue_trial([point, *known][-1], dict(ticket=ticket, attempt=len(tried)))
                tried = self.attempts()[ticket]  # not ours where another process was first to add it
            if tried[-1].state == TrialState.WAITING:
                self.storage.record_heartbeat(tried[-1]._trial_id)  # first: one that dies after it must be found
                with suppress(UpdateFinishedTrialError):
                    if self.storage.set_trial_state_values(tried[-1]._trial_id, TrialState.RUNNING):
                        return Trial(self.study, tried[-1]._trial_id)
        return None

    def work(self, gpus: str) -> None:
        """Run trials until none is left, here or elsewhere; an error ends the other workers too."""
        try:
            while not self.stop.is_set():
                self.check_identity()
                with self.lock:
                    trial = self.claim()
                if trial is not None:
                    self.run_trial(trial, {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
                elif all(trial.state.is_finished() and not lost(trial) for trial in self.last_attempts()):
                    return
                else:
                    self.stop.wait(1)  # another process has them; should it die, they are ours
        except BaseException:
            self.stop.set()
            raise

    def run_trial(self, trial: Trial, devices: Mapping[str, str]) -> None:
        """Run the point of a trial for each seed and tell the study how it ended."""
        point = {name: trial._suggest(name, kind) for name, kind in self.space.kinds.items()}
        name, settings = f"{self.space.name}_{trial.user_attrs['ticket']:03d}", self.space.settings(point)
        value, said = None, str(settings)
        try:
            try:
                value = self.run_seeds(trial, name, {**self.environ, **settings, **devices})
                state, said = TrialState.COMPLETE, f"{value:.4f} {settings}"
            except optuna.TrialPruned:
                steps = self.storage.get_trial(trial._trial_id).intermediate_values
                state, value, said = TrialState.PRUNED, steps[max(steps)], f"pruned {settings}"
            except (Crash, ValueError, Stopped) as error:
                state, said = TrialState.FAIL, str(error) or "stopped"
                if not self.stop.wait(1):  # what stops us may reach the run before us
                    trial.set_user_attr("why", said)
            self.storage.set_trial_state_values(trial._trial_id, state, None if value is None else [value])
        except UpdateFinishedTrialError:
            said = "given up while it ran: --grace is too short for this machine"
        print(f"trial {name}: {said}", flush=True)

    def run_seeds(self, trial: Trial, name: str, environ: Mapping[str, str]) -> float:
        """The mean score of a setting over the seeds."""
        results, settings = [], config_hash(environ)
        for index, seed in enumerate(self.space.seeds):
            watch, own = self.watcher(trial, index * SEED_STEPS), {**environ, "SEED": str(seed)}
            result = train(f"{name}_{settings}_seed{seed}", own, self.launcher, self.folder, watch)
            results.append({key: result.get(key) for key in (METRIC, "bytes_total", "fits")})
            trial.set_user_attr("results", results)
        return mean(result[METRIC] for result in results)

    def watcher(self, trial: Trial, offset: int) -> Callable[[Path], None]:
        """A function for `train` that shows signs of life, reports val_bpb lines, and ends what is to be ended."""
        due, read = 0.0, 0

        def watch(folder: Path) -> None:
            nonlocal due, read
            if self.stop.is_set():
                raise Stopped
            if time.monotonic() > due:
                self.storage.record_heartbeat(trial._trial_id)
                due = time.monotonic() + self.storage.get_heartbeat_interval()
            log = folder / "train.log"
            new = log.read_text(errors="replace")[read:].rpartition("\n")[0] if log.exists() else ""
            read += len(new)
            for step, last, bpb in VAL_LINE.findall(new):
                if 0 < int(step) < int(last):  # before the first step all are alike, after the last nothing is saved
                    trial.report(float(bpb), offset + int(step))
                    if trial.should_prune():
                        raise optuna.TrialPruned

        return watch

    def run(self, workers: int, gpus: Sequence[str]) -> int:
        """Run all trials with WORKERS threads, each with its share of the GPUs, then report; returns the exit code."""
        share = len(gpus) // workers
        handlers = {n: signal.signal(n, lambda *_: self.stop.set()) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(self.work, (",".join(gpus[share * w : share * (w + 1)]) for w in range(workers))))
        finally:
            self.stop.set()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        trials = {ticket: tried[-1] for ticket, tried in self.attempts().items()}
        report(self.space, trials, self.folder)
        draw(self.study, self.folder)
        return 0 if all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials.values()) else 1


def report(space: Space, trials: Mapping[int, FrozenTrial], folder: Path) -> None:
    """Print the trials, best first, and write them as trials.csv. That of a pruned one is its last val_bpb."""
    order, rows = ("complete", "pruned", "running", "waiting", "fail"), []
    for ticket, trial in trials.items():
        results = trial.user_attrs.get("results", [])
        rows.append(
            dict(trial=ticket, state=trial.state.name.lower(), val_bpb=trial.value)
            | {f"seed_{seed}": result[METRIC] for seed, result in zip(space.seeds, results, strict=False)}
            | dict(bytes_total=max((r["bytes_total"] or 0 for r in results), default=""))
            | dict(fits=all(r["fits"] for r in results) if results else "", why=trial.user_attrs.get("why", ""))
            | {name: as_text(value) for name, value in trial.params.items()}
        )
    rows.sort(key=lambda row: (order.index(row["state"]), row["val_bpb"] or 0.0))
    with TextIOWrapper(create(folder / "trials.csv"), encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{'trial':>5} {'state':9}{'bpb':>9} {'bytes':>11}  setting")
    for row in rows:
        bpb = "-" if row["val_bpb"] is None else f"{row['val_bpb']:.4f}"
        size = f"{row['bytes_total'] or '-'}{' over' if row['fits'] is False else ''}"
        setting = " ".join(f"{name}={row[name]}" for name in space.kinds if name in row)
        print(f"{row['trial']:>5} {row['state']:9}{bpb:>9} {size:>11}  {setting}")
    print(f"table: {folder / 'trials.csv'}")


def draw(study: optuna.Study, folder: Path) -> None:
    """parallel_coordinate.png and importance.png, or a line that says what they lack."""
    import matplotlib

    matplotlib.use("Agg")
    from optuna.visualization import matplotlib as plots

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len({trial.value for trial in trials}) < 2:
        print("no pictures: they need two finished trials of different value")
        return
    swept = [name for name in trials[0].params if not trials[0].distributions[name].single()]
    for name, plot in (
        ("parallel_coordinate", plots.plot_parallel_coordinate),
        ("importance", plots.plot_param_importances),
    ):
        figure = plot(study, params=swept).figure
        save_figure(figure, folder / f"{name}.png", dpi=120, bbox_inches="tight")
        matplotlib.pyplot.close(figure)
        print(f"picture: {folder / name}.png")


# ----------------------------------------------------------------------------------------------------------------------
# Two settings
# ----------------------------------------------------------------------------------------------------------------------

ALPHA, POWER = 0.01, 0.8  # of the smallest effect that a comparison sees


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
    test, edge = stats.ttest_rel(b, a), stats.t.ppf(1 - ALPHA / 2, n - 1)
    found = optimize.brentq(lambda shift: stats.nct.sf(edge, n - 1, shift) - POWER, 0.0, 100 + 10 * edge)
    return Paired(n, middle, *test.confidence_interval(0.95), test.pvalue, found * error)


def compare(files: Sequence[Path], seeds: Sequence[int], launcher: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run both settings for each seed, then say what the differences say; nothing is said before all have run."""
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {seeds}: two at least, each once")
    (a, b), arms = (path.stem for path in files), [{**environ, "RECIPE": str(path)} for path in files]
    keys = [config_hash(arm) for arm in arms]
    if keys[0] == keys[1]:
        raise ValueError(f"{files[0]} and {files[1]} are the same setting")
    folder = Path("runs") / f"compare_{a}_{b}_{digest(keys)}"
    plan = folder / "seeds.json"
    if plan.exists() and (fixed := plan.read_text(encoding="utf-8").strip()) != json.dumps(sorted(seeds)):
        raise ValueError(f"{plan} fixed the seeds at {fixed} before the first run; to stop earlier "
                         "or to go on because of what was seen would make the p-value wrong")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_file(plan, json.dumps(sorted(seeds)).encode())
    scores: list[list[float]] = [[], []]
    for turn, seed in enumerate(seeds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):  # ABBA: what drifts with time hits both alike
            if [config_hash(arm) for arm in arms] != keys:
                raise ValueError(f"recipes or code changed since {folder} was begun: put them back, or begin again")
            name = f"{folder.name}_{'ab'[side]}_seed{seed}"
            scores[side].append(train(name, {**arms[side], "SEED": str(seed)}, launcher, folder)[METRIC])
            print(f"run {len(scores[0] + scores[1])} of {2 * len(seeds)}: {name}", flush=True)
    found = paired(*scores)
    print(f"{'seed':>10} {a:>14} {b:>14} {'difference':>12}")
    for seed, x, y in zip(seeds, *scores, strict=True):
        print(f"{seed:>10} {x:>14.5f} {y:>14.5f} {y - x:>+12.5f}")
    print(f"{b} less {a}: {found.mean:+.5f} bpb, 95 % interval {found.low:+.5f} to {found.high:+.5f}, "
          f"p = {found.p:.2g} (paired t-test, two-sided; n = {found.n}, fixed before)")  # fmt: skip
    print(f"smallest effect that {found.n} seeds see, p < {ALPHA} four times in five: {found.visible:.5f}")
    result = dict(seeds=seeds, a=scores[0], b=scores[1], **found._asdict())
    write_file(folder / "result.json", json.dumps(result).encode())
    return 0


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
    run.add_argument("--sampler", choices=SAMPLERS, help="default: tpe where there is a range, else grid")
    run.add_argument("--prune", type=int, help="end trials above the median of so many; 0: none; default: 5")
    run.add_argument("--workers", type=int, default=1, help="trials at a time; default: 1")
    run.add_argument("--gpus", help="shared evenly by the workers; default: CUDA_VISIBLE_DEVICES, else all")
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
        each.add_argument("--launcher", type=shlex.split, default=[sys.executable], help="default: python")
    return parser


def sweep(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """`run`: check the space and the machine, then run the study; returns the exit code."""
    space = read_space(given.space, given.set, vars(given))
    environ = {**environ, **({"RECIPE": space.recipe} if space.recipe else {})}
    check_space(space, environ)
    gpus = [gpu for gpu in (given.gpus or environ.get("CUDA_VISIBLE_DEVICES", "")).split(",") if gpu]
    if given.workers > 1 and not gpus:
        gpus = [str(gpu) for gpu in range(trainer().torch.cuda.device_count())]
    if given.workers < 1 or len(gpus) % given.workers:
        raise ValueError(f"{len(gpus)} GPUs cannot be shared evenly by {given.workers} workers")
    return Sweep(space, environ, given.launcher, given.storage, given.grace).run(given.workers, gpus)


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    given, environ = make_parser().parse_args(argv), dict(os.environ if environ is None else environ)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats and these plots
    try:
        tracker(environ)
        if not given.launcher or not shutil.which(given.launcher[0], path=environ.get("PATH")):
            raise ValueError(f"--launcher {shlex.join(given.launcher)}: no such program")
        if given.command == "compare":
            return compare(given.files, given.seeds, given.launcher, environ)
        if given.command == "one":
            return experiment(given.note, given.seconds, given.launcher, environ, given.ledger)
        return sweep(given, environ)
    except (Crash, ValueError, OSError) as error:
        print(f"error: {escape_lines(error)}", file=sys.stderr)
        return 1 if isinstance(error, Crash) else 2
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
