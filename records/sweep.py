"""Sweep the trainer's settings, compare two settings on paired seeds, or log one experiment in a ledger.

    python records/sweep.py run SPACE.toml [--set NAME=8,11,13] [--set MATRIX_LR=0.01..0.1:log] [--trials 40]
        [--launcher "torchrun --standalone --nproc_per_node=8"] [--seeds 1,2] [--workers 4 --gpus 0,1,2,3]
    python records/sweep.py compare A.env B.env --seeds 1,2,3,4
    python records/sweep.py one --note "what changed and why" [--seconds 300]

A trial is one point of the search space, run on each seed; its value is the mean sliding val_bpb of the
artifacts. After an interruption the same command continues and runs only what is missing. Several machines
share a study through --storage URL. SPACE.toml: recipe (path relative to the file), seeds, sampler, trials,
prune; [space] with NAME = value, [values] or {low, high, log}; [rows] with NAME = {settings that are changed
together}. The environment overrides the recipe, and the space overrides both. runs/STUDY/ gets trials.csv, a
recipe for each trial, and plots. With --workers, each run computes with its share of the CPU cores unless
OMP_NUM_THREADS is set. TRACK=wandb or TRACK=trackio: the runs send their curves there (records/track.py).
Exit codes: 0 done, 1 a run failed or the sweep was stopped, 2 user error. records/README.md has the rules for
experiments with `one`.
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
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from io import TextIOWrapper
from math import log, prod, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import optuna
from launch import ANY_RUN, METRIC, Crash, config_hash, digest, train, trainer
from ledger import experiment
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from runfiles import create, escape_lines, save_figure, write_file
from scipy import optimize, stats
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from tabulate import tabulate
from track import check as check_tracker

# isort: split
from cores import core_count
from files import check_form, decoding, read_file

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

VAL_LINE = re.compile(r"^step:(\d+)/(\d+) val_loss:\S+ val_bpb:(\S+)", re.MULTILINE)


class Stopped(Exception):
    """The user stopped the sweep."""


# ------------------------------------------------------------------------------------------------------------
# Search space
# ------------------------------------------------------------------------------------------------------------

SAMPLERS = {  # grid samples nothing, but Optuna requires a sampler
    "tpe": partial(optuna.samplers.TPESampler, constant_liar=True),  # workers see the other workers' trials
    "random": optuna.samplers.RandomSampler,
    "grid": optuna.samplers.RandomSampler,
}
SPACE_BYTES, LOG_BYTES = 1 << 20, 1 << 28  # of a space file, of a train.log
RANGE, POINTS = 1e15, 100_000  # limits of a value in a range, of the points of a grid and of trials
SPACE_KEYS = dict(recipe=str, seeds=list, sampler=str, trials=int, prune=int, space=dict, rows={str: dict})


class Space(NamedTuple):
    """The search space: settings with their values or range, and `row` if there are rows of settings."""

    name: str
    recipe: str
    kinds: dict[str, BaseDistribution]
    rows: dict[str, dict[str, str]]
    seeds: list[int]
    sampler: str
    trials: int
    prune: int

    def settings(self, point: Mapping[str, Any]) -> dict[str, str]:
        """Return the environment variables of a point."""
        own = {name: as_text(value) for name, value in point.items() if name != "row"}
        return own | self.rows.get(point.get("row", ""), {})

    def grid(self) -> Iterator[dict[str, str]]:
        """Yield every point of a space without ranges, once."""
        values = itertools.product(*(kind.choices for kind in self.kinds.values()))
        return (dict(zip(self.kinds, each, strict=True)) for each in values)

    def swept(self) -> dict[str, BaseDistribution]:
        """Return the settings that have more than one value."""
        return {name: kind for name, kind in self.kinds.items() if not kind.single()}


def as_text(value: Any) -> str:
    return (
        str(int(value))
        if isinstance(value, bool)
        else f"{value:.6g}"
        if isinstance(value, float)
        else str(value)
    )


def ends(kind: BaseDistribution) -> list[Any]:
    """Return the values of a setting, or the ends of its range."""
    return list(kind.choices) if isinstance(kind, CategoricalDistribution) else [kind.low, kind.high]


def parse_set(text: str) -> tuple[str, Any]:
    """Parse NAME=a,b,c or NAME=low..high[:log] into the form of a space file."""
    name, _, values = text.partition("=")
    if not values:
        raise ValueError(f"--set {text}: must be NAME=value,value or NAME=low..high or NAME=low..high:log")
    if match := re.fullmatch(r"([^,:]+?)\.\.([^,:]+)(:log)?", values):
        try:
            low, high = (
                int(end) if re.fullmatch(r"-?\d+", end) else float(end) for end in match.groups()[:2]
            )
        except ValueError as error:
            raise ValueError(f"--set {text}: {error}") from error
        return name, dict(low=low, high=high, log=bool(match[3]))
    return name, values.split(",")


def distribution(name: str, value: Any) -> BaseDistribution:
    """Return the distribution of an entry: a value, a list, or {low, high, log}. ValueError for others."""
    if isinstance(value, dict):
        bounds = [value.get(end) for end in ("low", "high")]
        numbers = all(type(end) in (int, float) and abs(end) < RANGE for end in bounds)
        if (
            not set(value) <= {"low", "high", "log"}
            or not numbers
            or type(value.get("log", False)) is not bool
        ):
            raise ValueError(f"{name}: a range must be {{low, high, log}} below {RANGE:g}, not {value}")
        if not bounds[0] < bounds[1] or (value.get("log") and bounds[0] <= 0):
            raise ValueError(f"{name}: a range needs low < high, and low > 0 if log: {value}")
        return (IntDistribution if all(isinstance(end, int) for end in bounds) else FloatDistribution)(
            **value
        )
    values = [as_text(each) for each in (value if isinstance(value, list) else [value])]
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name}: needs at least one value and no duplicates")
    return CategoricalDistribution(values)


def read_space(path: Path | None, sets: Sequence[str], given: Mapping[str, Any]) -> Space:
    """Return the space of a file and the command line. ValueError if they are invalid."""
    table = {}
    if path:
        with decoding(path, "a TOML file"):
            table = tomllib.loads(read_file(path, SPACE_BYTES).decode("utf-8-sig"))
    if unknown := sorted(set(table) - set(SPACE_KEYS)):
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; known are {', '.join(SPACE_KEYS)}")
    check_form(table, {f"{key}?": form for key, form in SPACE_KEYS.items()}, path)
    table |= {
        key: given[key] for key in ("seeds", "sampler", "trials", "prune") if given.get(key) is not None
    }
    rows = {
        row: {name: as_text(value) for name, value in own.items()}
        for row, own in table.get("rows", {}).items()
    }
    values = ({"row": list(rows)} if rows else {}) | table.get("space", {}) | dict(map(parse_set, sets))
    kinds = {name: distribution(name, value) for name, value in values.items()}
    ranges = [name for name, kind in kinds.items() if not isinstance(kind, CategoricalDistribution)]
    points = 0 if ranges else prod(len(kind.choices) for kind in kinds.values())
    sampler, seeds = table.get("sampler", "tpe" if ranges else "grid"), table.get("seeds", [1337])
    distinct = {seed for seed in seeds if type(seed) is int and 0 <= seed < 1 << 64}
    trials, prune = table.get("trials", points if sampler == "grid" else 20), table.get("prune", 5)
    for wrong, said in (
        (sampler not in SAMPLERS, f"sampler {sampler}: must be one of {', '.join(SAMPLERS)}"),
        (
            all(kind.single() for kind in kinds.values()),
            "nothing to sweep: give several values, a range, or rows",
        ),
        (sampler == "grid" and ranges, f"a grid needs values, but {', '.join(ranges)} has a range"),
        (
            sampler == "grid" and trials != points,
            f"the grid has {points} points: omit --trials or the grid sampler",
        ),
        (
            not 1 <= trials <= POINTS or not 0 <= prune <= POINTS,
            f"trials must be 1 to {POINTS:,} and prune 0 to {POINTS:,}, not {trials} and {prune}",
        ),
        (
            not seeds or len(distinct) < len(seeds),
            f"seeds {seeds}: must be distinct integers from 0 to 2^64 - 1, at least one",
        ),
        (
            "row" in kinds and not set(ends(kinds["row"])) <= set(rows),
            f"row: known are {', '.join(rows) or 'none'}",
        ),
    ):
        if wrong:
            raise ValueError(said)
    name = given.get("study") or (path.stem if path else "sweep")
    return Space(name, str(path.parent / table["recipe"]) if "recipe" in table else "", kinds, rows, seeds,
                 sampler, trials, prune)  # fmt: skip


def check_space(space: Space, environ: Mapping[str, str]) -> list[Mapping[str, str]]:
    """Return the environments that were checked: of every point of a grid, otherwise of the first values.

    Raise ValueError, listing every problem, for names or values that the trainer would reject. Every value
    and end of a range is checked alone too.
    """
    tg, problems, own = trainer(), [], [pair for row in space.rows.values() for pair in row.items()]
    by_name = {f.name.upper(): f for f in fields(tg.Config)}
    for name, value in [
        (name, end) for name, kind in space.kinds.items() if name != "row" for end in ends(kind)
    ] + own:
        try:
            if name in ("SEED", "RUN_ID"):
                raise ValueError(f"{name}: set by the sweep itself")
            if name not in by_name:
                near = tg.likely_name(name, set(by_name))
                raise ValueError(f"{name} is not a setting" + (f", did you mean {near}?" if near else ""))
            tg.parse_value(by_name[name], as_text(value))
        except ValueError as error:
            problems.append(str(error))
    problems += [f"{name} is both swept and in a row" for name in space.kinds.keys() & dict(own).keys()]
    first, checked = {name: ends(kind)[0] for name, kind in space.kinds.items()}, []
    for point in [] if problems else space.grid() if space.sampler == "grid" else [first]:
        try:
            checked.append({**environ, **space.settings(point), "RUN_ID": space.name})
            tg.load_config(checked[-1])
        except tg.UserError as error:
            problems.append(f"{point}: {error}")
    if problems:
        raise ValueError("invalid search space:\n" + "\n".join(f"  {p}" for p in dict.fromkeys(problems)))
    return checked


def check_data(environments: Sequence[Mapping[str, str]], launcher: Sequence[str]) -> None:
    """Raise ValueError if runs on this machine would not find their tokenizer or shards.

    Launchers other than Python and torchrun may start runs where other files are, so nothing is checked.
    """
    if not re.match("python|torchrun", Path(launcher[0]).name) or any(w.endswith(".py") for w in launcher):
        return
    tg = trainer()
    configs = [tg.load_config(each)[0] for each in environments]
    try:
        for path, size in {(c.tokenizer_path, c.vocab_size) for c in configs}:
            tg.load_byte_table(path, size)
        for pattern in {c.shards(split) for c in configs for split in ("train", "val")}:
            tg.find_shards(pattern)
    except tg.UserError as error:
        recipe = "" if environments[0].get("RECIPE") else " (RECIPE is not set)"
        raise ValueError(f"no run was started{recipe}: {error}") from error


# ------------------------------------------------------------------------------------------------------------
# Sweep
# ------------------------------------------------------------------------------------------------------------
#
# A study has one ticket per grid point, or per trial whose point the sampler chooses. An attempt at a ticket
# is an Optuna trial; the process that changes it from waiting to running runs it. If the last attempt at a
# ticket was lost, the ticket gets another attempt with the same point and the same run names; runs that have
# a result are not repeated. Several processes may add the same attempt; the first in the study counts, the
# others stay waiting forever.

EDGE = 0.05  # of a range, in logarithms if it is sampled so: at its edge
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
SEED_STEPS = 10_000_000  # step offset of the intermediate values of each further seed


def open_storage(url: str, grace: int) -> optuna.storages.RDBStorage:
    """Open the database, retrying while another process creates its tables."""
    engine = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else None
    for left in range(3, -1, -1):
        try:
            return optuna.storages.RDBStorage(
                url, engine, heartbeat_interval=max(grace // 4, 1), grace_period=grace
            )
        except (DBAPIError, StorageInternalError):
            if left == 0:
                raise
            time.sleep(1 + random.random())


def suggest(trial: Trial, name: str, kind: BaseDistribution) -> Any:
    """Return the value of a setting in a trial, as enqueued or as sampled."""
    if isinstance(kind, CategoricalDistribution):
        return trial.suggest_categorical(name, kind.choices)
    sample = trial.suggest_int if isinstance(kind, IntDistribution) else trial.suggest_float
    return sample(name, kind.low, kind.high, log=kind.log)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def lost(trial: FrozenTrial) -> bool:
    """Return whether the run of a trial was killed or stopped: it failed without a reason."""
    return trial.state == TrialState.FAIL and "why" not in trial.user_attrs


@contextmanager
def using_study(place: str) -> Iterator[None]:
    """Turn any error inside, of Optuna, SQLAlchemy or a driver, into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        said = " ".join(str(cause).split())[:200] or repr(cause)
        raise ValueError(f"{place} is no study that this sweep and this Optuna can use: {said}") from error


SCORED = {METRIC: float, "bytes_total?": int, "fits?": bool, "strict_seconds?": float}  # of a run
ATTEMPT = {"ticket": int, "attempt": int, "why?": str, "results?": [SCORED]}  # attributes of a trial


class Sweep:
    """An opened or newly created study, with everything needed to run its trials."""

    def __init__(
        self, space: Space, environ: Mapping[str, str], launcher: Sequence[str], storage: str, grace: int
    ):
        self.space, self.environ, self.launcher = space, environ, launcher
        # {}: by the sampler
        self.points = list(space.grid()) if space.sampler == "grid" else [{}] * space.trials
        self.folder, self.stop, self.lock = Path("runs") / space.name, threading.Event(), threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        own = URL.create("sqlite", database=str(self.folder / "study.db"))  # escapes special characters
        # a URL may hold a password
        self.place = f"--storage {storage.partition('://')[0]}" if storage else str(self.folder / "study.db")
        pruner = optuna.pruners.MedianPruner(space.prune) if space.prune else optuna.pruners.NopPruner()
        with using_study(self.place):
            self.storage = open_storage(storage or own.render_as_string(), grace)
            self.study = optuna.create_study(storage=self.storage, study_name=space.name,
                                             sampler=SAMPLERS[space.sampler](), pruner=pruner,
                                             load_if_exists=True)  # fmt: skip
            self.study_id, self.workers = self.storage.get_study_id_from_name(space.name), 1
        self.check_identity()
        with using_study(self.place):
            self.study.set_user_attr("space", self.identity())
        self.attempts()

    def identity(self) -> str:
        """Hash what all trials of a study have in common; the number of sampled trials may grow."""
        base = {name: ends(kind)[0] for name, kind in self.space.kinds.items()}
        common = self.space._replace(name="", recipe="", trials=0)
        return digest(common, config_hash({**self.environ, **self.space.settings(base)}))

    def check_identity(self) -> None:
        if self.study.user_attrs.get("space", told := self.identity()) != told:
            raise ValueError(f"study {self.space.name} was started with another space, base or code. Restore "
                             "them or choose another --study.")  # fmt: skip

    def attempts(self) -> dict[int, list[FrozenTrial]]:
        """Return the trials of each ticket by attempt; of duplicates only the first.

        Trials without a ticket, which another program added to the study, are left out. ValueError if the
        study holds something else than sweeps write.
        """
        found: dict[int, dict[int, FrozenTrial]] = {}
        with using_study(self.place):
            for trial in self.study.get_trials(deepcopy=False):
                if {"ticket", "attempt"} & trial.user_attrs.keys():
                    check_form(trial.user_attrs, ATTEMPT, f"trial {trial.number}")
                    if trial.state in DONE and trial.value is None:
                        raise ValueError(f"trial {trial.number} is {trial.state.name} without a value")
                    ticket, attempt = trial.user_attrs["ticket"], trial.user_attrs["attempt"]
                    found.setdefault(ticket, {}).setdefault(attempt, trial)
        return {ticket: [own[attempt] for attempt in sorted(own)] for ticket, own in found.items()}

    def last_attempts(self) -> list[FrozenTrial]:
        """Return the last attempt at each ticket of this process, ignoring further tickets of the study."""
        found = self.attempts()
        return [found[ticket][-1] for ticket in range(len(self.points))]

    def trial_id(self, trial: Trial | FrozenTrial) -> int:
        """Return the storage's id of a trial."""
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, trial.number)

    def claim(self) -> Trial | None:
        """Claim and return a trial, or None if no ticket is new, waiting or lost.

        Study.ask would take any waiting trial, and create one if another process has taken the last.
        """
        optuna.storages.fail_stale_trials(self.study)
        found = self.attempts()
        for ticket, point in enumerate(self.points):
            tried = found.get(ticket, [])
            if not tried or lost(tried[-1]):
                known = [trial.params for trial in tried if len(trial.params) == len(self.space.kinds)]
                self.study.enqueue_trial([point, *known][-1], dict(ticket=ticket, attempt=len(tried)))
                tried = self.attempts()[ticket]  # may be another process's trial
            if tried[-1].state == TrialState.WAITING:
                trial_id = self.trial_id(tried[-1])
                self.storage.record_heartbeat(trial_id)  # first, so that a later crash is detected
                with suppress(UpdateFinishedTrialError):
                    if self.storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                        return Trial(self.study, trial_id)
        return None

    def work(self, gpus: str) -> None:
        """Run trials until none is left in any process; an error stops the other workers too."""
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
                    self.stop.wait(1)  # other processes run them; we take over if one dies
        except BaseException:
            self.stop.set()
            raise

    def run_trial(self, trial: Trial, devices: Mapping[str, str]) -> None:
        """Run the point of a trial on each seed and record the outcome in the study."""
        point = {name: suggest(trial, name, kind) for name, kind in self.space.kinds.items()}
        ticket, settings = trial.user_attrs["ticket"], self.space.settings(point)
        name, value, trial_id = f"{self.space.name}_{ticket:03d}", None, self.trial_id(trial)
        label = f"trial {ticket + 1}/{len(self.points)}"
        pairs = " ".join(f"{key}={text}" for key, text in settings.items())
        print(f"{label} started: {name} {pairs}", flush=True)
        try:
            try:
                value = self.run_seeds(trial, name, {**self.environ, **settings, **devices})
                state, said = TrialState.COMPLETE, f"complete: {name} {value:.4f} bpb"
            except optuna.TrialPruned:
                steps = self.storage.get_trial(trial_id).intermediate_values
                state, value, said = TrialState.PRUNED, steps[max(steps)], f"pruned: {name}"
            except (Crash, ValueError, Stopped) as error:
                state, said = TrialState.FAIL, f"failed: {name}: {str(error) or 'stopped'}"
                if not self.stop.wait(1):  # a signal that stops us may reach the run first
                    trial.set_user_attr("why", str(error) or "stopped")
            self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])
        except UpdateFinishedTrialError:
            said = f"failed: {name}: declared lost while it ran: --grace is too short for this machine"
        print(f"{label} {said}{self.progress()}", flush=True)

    def progress(self) -> str:
        """Return the best trial so far, the number of trials left, and the time they will take."""
        tickets = dict(sorted(self.attempts().items())[: len(self.points)])
        trials = {ticket: tried[-1] for ticket, tried in tickets.items()}
        done = [trial.duration.total_seconds() for trial in trials.values() if trial.state in DONE]
        complete = [(t.value, ticket) for ticket, t in trials.items() if t.state == TrialState.COMPLETE]
        left = len(self.points) - sum(t.state.is_finished() and not lost(t) for t in trials.values())
        best = f", best {min(complete)[0]:.4f} ({self.space.name}_{min(complete)[1]:03d})" if complete else ""
        time_left = f", about {duration(mean(done) * left / self.workers)}" if done and left else ""
        return f"{best}; {left} left{time_left}"

    def run_seeds(self, trial: Trial, name: str, environ: Mapping[str, str]) -> float:
        """Return the mean score of a setting over the seeds."""
        results, settings = [], config_hash(environ)
        for index, seed in enumerate(self.space.seeds):
            watch, own = self.watcher(trial, index * SEED_STEPS), {**environ, "SEED": str(seed)}
            result = train(f"{name}_{settings}_seed{seed}", own, self.launcher, self.folder, watch)
            kept = (METRIC, "bytes_total", "fits", "strict_seconds")
            results.append({key: result.get(key) for key in kept})
            trial.set_user_attr("results", results)
        return mean(result[METRIC] for result in results)

    def watcher(self, trial: Trial, offset: int) -> Callable[[Path], None]:
        """Return a callback for `train` that sends heartbeats, reports val_bpb, stops or prunes the run."""
        due, read, trial_id = 0.0, 0, self.trial_id(trial)

        def watch(folder: Path) -> None:
            nonlocal due, read
            if self.stop.is_set():
                raise Stopped
            if time.monotonic() > due:
                self.storage.record_heartbeat(trial_id)
                due = time.monotonic() + self.storage.get_heartbeat_interval()
            log = folder / "train.log"
            text = read_file(log, LOG_BYTES).decode(errors="replace") if log.exists() else ""
            new = text[read:].rpartition("\n")[0]
            read += len(new)
            for step, last, bpb in VAL_LINE.findall(new):
                if 0 < int(step) < int(last):  # all are equal at step 0; the last step saves nothing
                    trial.report(float(bpb), offset + int(step))
                    if trial.should_prune():
                        raise optuna.TrialPruned

        return watch

    def run(self, workers: int, gpus: Sequence[str]) -> int:
        """Run all trials in `workers` threads, each with its own GPUs, report, and return the exit code."""
        per_worker, self.workers = len(gpus) // workers, workers
        handlers = {n: signal.signal(n, lambda *_: self.stop.set()) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(workers) as pool:
                own = (",".join(gpus[per_worker * w : per_worker * (w + 1)]) for w in range(workers))
                list(pool.map(self.work, own))
        finally:
            self.stop.set()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        trials = {ticket: tried[-1] for ticket, tried in self.attempts().items()}
        report(self.space, trials, self.folder)
        for ticket, trial in trials.items():
            if len(trial.params) == len(self.space.kinds):
                self.write_recipe(ticket, trial)
        for line in filter(None, (*edges(self.space, trials.values()), self.advice(trials))):
            print(line)
        draw(self.space, self.study, list(trials.values()), self.folder)
        return 0 if all(trial.state in DONE for trial in trials.values()) else 1

    def write_recipe(self, ticket: int, trial: FrozenTrial) -> None:
        """Write the settings of a trial, without seed and run id, to trial_NNN.env in the study's folder."""
        environ = {**self.environ, **self.space.settings(trial.params)}
        given = {k: v for k, v in trainer().load_config(environ)[1].items() if k not in ANY_RUN}
        texts = {k.upper(): int(value) if isinstance(value, bool) else value for k, value in given.items()}
        content = "".join(f"{name}={text}\n" for name, text in texts.items())
        write_file(self.folder / f"trial_{ticket:03d}.env", content.encode())

    def advice(self, trials: Mapping[int, FrozenTrial]) -> str:
        """Return how to confirm the best trial against the second best, if they were run on one seed."""
        ranked = sorted((t.value, n) for n, t in trials.items() if t.state == TrialState.COMPLETE)
        if len(self.space.seeds) > 1 or len(ranked) < 2:
            return ""
        fresh = [str(seed) for seed in range(1, 6) if seed not in self.space.seeds][:4]
        (_, best), (_, second) = ranked[:2]
        files = [str(self.folder / f"trial_{ticket:03d}.env") for ticket in (second, best)]
        launcher = ["--launcher", shlex.join(self.launcher)] if self.launcher != [sys.executable] else []
        words = ["python", "records/sweep.py", "compare", *files, "--seeds", ",".join(fresh), *launcher]
        return f"one seed: confirm with `{shlex.join(words)}`"


def edges(space: Space, trials: Iterable[FrozenTrial]) -> Iterator[str]:
    """Yield a line for each numeric setting whose best value is at an end of its range or of its values."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = min(complete, key=lambda trial: trial.value, default=None)
    kinds = {f.name.upper(): type(f.default) for f in fields(trainer().Config)}
    for name, kind in space.swept().items() if best else ():
        if kinds.get(name) not in (int, float):
            continue
        at, scale = float(best.params[name]), log if getattr(kind, "log", False) else float
        low, high = min(map(float, ends(kind))), max(map(float, ends(kind)))
        near = 0.0 if isinstance(kind, CategoricalDistribution) else EDGE * (scale(high) - scale(low))
        for end, side in ((low, "below"), (high, "above")):
            if abs(scale(at) - scale(end)) <= near:
                told = f"the best value, {at:g}, is at the edge of those tried"
                yield f"{name}: {told}: try some {side} {end:g}"


def report(space: Space, trials: Mapping[int, FrozenTrial], folder: Path) -> None:
    """Print the trials, best first, and write them to trials.csv. A pruned trial has its last val_bpb."""
    order, rows = ("complete", "pruned", "running", "waiting", "fail"), []
    best = min((t.value for t in trials.values() if t.state == TrialState.COMPLETE), default=0.0)
    for ticket, trial in trials.items():
        results, complete = trial.user_attrs.get("results", []), trial.state == TrialState.COMPLETE
        rows.append(
            dict(trial=ticket, state=trial.state.name.lower(), val_bpb=trial.value)
            | dict(difference=trial.value - best if complete else None)
            | {f"seed_{seed}": result[METRIC] for seed, result in zip(space.seeds, results, strict=False)}
            | dict(seconds=sum(result.get("strict_seconds") or 0 for result in results) or None)
            | dict(bytes_total=max((r.get("bytes_total") or 0 for r in results), default=None))
            | dict(fits=all(r.get("fits") for r in results) if results else None)
            | dict(why=trial.user_attrs.get("why", ""))
            | {name: as_text(value) for name, value in trial.params.items()}
        )
    rows.sort(key=lambda row: (order.index(row["state"]), row["val_bpb"] or 0.0))
    with TextIOWrapper(create(folder / "trials.csv"), encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    columns = {"trial": "d", "state": "", "val_bpb": ".4f", "difference": "+.4f", "seconds": ".0f",
               "bytes_total": ",d", "fits": ""}  # fmt: skip
    columns |= dict.fromkeys(space.swept(), "")
    lines = [
        [format(row[n], c) if row.get(n) is not None else "-" for n, c in columns.items()] for row in rows
    ]
    right = ["right" if code else "left" for code in columns.values()]
    print(tabulate(lines, list(columns), colalign=right if lines else None, disable_numparse=True))
    print(f"table: {folder / 'trials.csv'}, settings of each trial: {folder}/trial_NNN.env")


# ------------------------------------------------------------------------------------------------------------
# Plots
# ------------------------------------------------------------------------------------------------------------
#
# Optuna's importance (PED-ANOVA) looks at the best tenth of the trials: on a grid of six it called a setting
# that explains 0.1 % of the variance 44 % important. So: slices always, shares of variance on a full grid.

ENOUGH = 50  # completed trials for Optuna's importance
BPB = "val_bpb, sliding window (bits per byte)"


class Axis(NamedTuple):
    """A setting as an axis: label, scale, and the position of each value of a list ({}: a range)."""

    label: str
    scale: str
    ticks: dict[str, float]

    def at(self, value: Any) -> float:
        return self.ticks[value] if self.ticks else value


def axis_of(name: str, kind: BaseDistribution) -> Axis:
    """Return the axis of a setting: of numbers, by logarithms if the space is, or of names."""
    known = {f.name.upper(): f.metadata["help"] for f in fields(trainer().Config)}
    label = "\n".join([name, *textwrap.wrap(known.get(name, "row of settings"), 44)])
    if not isinstance(kind, CategoricalDistribution):
        return Axis(label, "log" if kind.log else "linear", {})
    try:
        ticks = {text: float(text) for text in kind.choices}
    except ValueError:
        return Axis(label, "linear", {text: float(place) for place, text in enumerate(kind.choices)})
    low, high = min(ticks.values()), max(ticks.values())
    return Axis(label, "log" if 0 < 10 * low <= high else "linear", ticks)


def shares_of_variance(points: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, float]:
    """Return the share of the sum of squares of each setting's main effect on a full grid, and of the rest.

    A main effect is the mean of the values at one level less the mean of all.
    """
    middle = mean(values)
    total = sum((value - middle) ** 2 for value in values)
    shares = {}
    for name in points[0]:
        levels: dict[Any, list[float]] = {}
        for point, value in zip(points, values, strict=True):
            levels.setdefault(point[name], []).append(value)
        shares[name] = sum(len(level) * (mean(level) - middle) ** 2 for level in levels.values()) / total
    return shares | {"interactions and noise": max(0.0, 1 - sum(shares.values()))}


def draw_slice(place: Any, name: str, kind: BaseDistribution, trials: Sequence[FrozenTrial]) -> None:
    """Draw val_bpb against one setting: a dot for each trial, small dots for seeds, a star for the best."""
    from matplotlib import ticker

    axis, best = axis_of(name, kind), min(trials, key=lambda trial: trial.value)
    place.set_xscale(axis.scale)
    for trial in trials:
        x = axis.at(trial.params[name])
        place.plot(x, trial.value, "o", color="tab:blue", alpha=0.6, label="trial")
        if len(results := trial.user_attrs["results"]) > 1:
            place.plot([x] * len(results), [r[METRIC] for r in results], "k.", ms=4, label="one of its seeds")
    place.plot(axis.at(best.params[name]), best.value, "*", ms=13, color="tab:red", label="best trial")
    if axis.ticks:
        place.set_xticks(list(axis.ticks.values()), list(axis.ticks))
        place.minorticks_off()
    elif axis.scale == "log":
        place.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        place.xaxis.set_major_formatter("{x:g}")
        place.minorticks_off()
    else:
        place.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=isinstance(kind, IntDistribution)))
    place.set_xlabel(axis.label)
    place.margins(x=0.12)
    place.grid(alpha=0.3)
    place.ticklabel_format(axis="y", useOffset=False)


def draw_slices(space: Space, trials: Sequence[FrozenTrial], title: str) -> Any:
    """Return a figure of val_bpb against each setting that was swept."""
    from matplotlib import pyplot

    count = len(space.swept())
    width = 2 if count == 4 else min(count, 3)
    height = -(-count // width)
    size = (4.2 * width + 0.8, 3.9 * height + 0.4)
    figure, axes = pyplot.subplots(
        height, width, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for place, (name, kind) in zip(axes.flat, space.swept().items(), strict=False):
        draw_slice(place, name, kind, trials)
    for row in axes:
        row[0].set_ylabel(BPB)
    for place in axes.flat[count:]:
        place.remove()
    shown = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown))
    figure.suptitle(title)
    return figure


def draw_heatmap(space: Space, trials: Sequence[FrozenTrial], title: str) -> Any:
    """Return a figure of val_bpb on a full grid of two settings, colored by the difference to the best."""
    from matplotlib import pyplot

    (x_name, x_kind), (y_name, y_kind) = space.swept().items()
    values = {(t.params[x_name], t.params[y_name]): t.value for t in trials}
    best = min(values.values())
    cells = [[values[x, y] - best for x in x_kind.choices] for y in y_kind.choices]
    size = (1.1 * len(x_kind.choices) + 3.6, 0.6 * len(y_kind.choices) + 2.4)
    figure, place = pyplot.subplots(figsize=size, layout="constrained")
    image = place.imshow(cells, cmap="viridis_r", aspect="auto", origin="lower")
    middle = max(map(max, cells)) / 2
    for row, y in enumerate(y_kind.choices):
        for column, x in enumerate(x_kind.choices):
            color = "white" if cells[row][column] > middle else "black"
            place.text(column, row, f"{values[x, y]:.4f}", ha="center", va="center", color=color)
    place.set_xticks(range(len(x_kind.choices)), x_kind.choices)
    place.set_yticks(range(len(y_kind.choices)), y_kind.choices)
    place.set_xlabel(axis_of(x_name, x_kind).label)
    place.set_ylabel(axis_of(y_name, y_kind).label)
    figure.colorbar(image, label="difference to the best (bits per byte)")
    figure.suptitle(title)
    return figure


def draw_shares(shares: Mapping[str, float], label: str, title: str) -> Any:
    """Return a bar chart of shares, the largest on top."""
    from matplotlib import pyplot

    ordered = sorted(shares.items(), key=lambda share: share[1])
    figure, place = pyplot.subplots(figsize=(7, 0.4 * len(shares) + 1.4), layout="constrained")
    bars = place.barh([name for name, _ in ordered], [share for _, share in ordered])
    place.bar_label(bars, [f"{share:.1%}" for _, share in ordered], padding=3)
    place.set_xlim(0, 1.16)
    place.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    place.set_xlabel(label)
    figure.suptitle(title)
    return figure


def draw(space: Space, study: optuna.Study, trials: Sequence[FrozenTrial], folder: Path) -> None:
    """Write slices.png, heatmap.png of a full grid of two settings, importance.png if it is meaningful."""
    import matplotlib

    matplotlib.use("Agg")
    trials = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    values = [trial.value for trial in trials]
    if len(set(values)) < 2:
        print("no plots: they need two finished trials with different values")
        return
    swept, seeds = list(space.swept()), len(space.seeds)
    title = f"{space.name}: {len(trials)} trials, {seeds} seed{'s' if seeds > 1 else ''}"
    figures = dict(slices=draw_slices(space, trials, title))
    if space.sampler == "grid" and len(trials) == space.trials:
        if len(swept) == 2:
            figures["heatmap"] = draw_heatmap(space, trials, title)
        if len(swept) > 1:
            points = [{name: trial.params[name] for name in swept} for trial in trials]
            label = "share of the variance of val_bpb on the full grid"
            figures["importance"] = draw_shares(shares_of_variance(points, values), label, title)
    elif len(trials) >= ENOUGH:
        found = optuna.importance.get_param_importances(study, params=swept)
        figures["importance"] = draw_shares(found, "parameter importance by PED-ANOVA", title)
    else:
        print(f"no parameter importance: needs a full grid or {ENOUGH} completed trials, not {len(trials)}")
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png", dpi=120)
        matplotlib.pyplot.close(figure)
        print(f"plot: {folder / name}.png")


# ------------------------------------------------------------------------------------------------------------
# Paired comparison
# ------------------------------------------------------------------------------------------------------------

ALPHA, POWER = 0.01, 0.8  # of the smallest detectable effect


class Paired(NamedTuple):
    """Differences B - A paired by seed: mean, 95 % interval, two-sided p, smallest detectable effect."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    visible: float


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Run the paired t-test of B against A; `visible` is the effect with power POWER at level ALPHA."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n, middle, error = len(differences), mean(differences), stdev(differences) / sqrt(len(differences))
    if error == 0:
        return Paired(n, middle, middle, middle, 1.0 if middle == 0 else 0.0, 0.0)
    test, edge = stats.ttest_rel(b, a), stats.t.ppf(1 - ALPHA / 2, n - 1)
    found = optimize.brentq(lambda shift: stats.nct.sf(edge, n - 1, shift) - POWER, 0.0, 100 + 10 * edge)
    return Paired(n, middle, *test.confidence_interval(0.95), test.pvalue, found * error)


def compare(
    files: Sequence[Path], seeds: Sequence[int], launcher: Sequence[str], environ: Mapping[str, str]
) -> int:
    """Run both settings on each seed, then print the test; no result is printed before all runs are done."""
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {seeds}: must be at least two distinct seeds")
    (a, b), arms = (path.stem for path in files), [{**environ, "RECIPE": str(path)} for path in files]
    keys = [config_hash(arm) for arm in arms]
    if keys[0] == keys[1]:
        raise ValueError(f"{files[0]} and {files[1]} have the same settings")
    check_data(arms, launcher)
    folder = Path("runs") / f"compare_{a}_{b}_{digest(keys)}"
    plan = folder / "seeds.json"
    if plan.exists() and (
        fixed := read_file(plan, SPACE_BYTES).decode(errors="replace").strip()
    ) != json.dumps(sorted(seeds)):
        raise ValueError(f"{plan} fixed the seeds at {fixed} before the first run. Changing their number "
                         "after seeing results would invalidate the p-value.")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_file(plan, json.dumps(sorted(seeds)).encode())
    scores: list[list[float]] = [[], []]
    for turn, seed in enumerate(seeds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):  # ABBA: drift over time affects both arms equally
            if [config_hash(arm) for arm in arms] != keys:
                raise ValueError(
                    f"recipes or code changed since {folder} was started. Restore them or start again."
                )
            name = f"{folder.name}_{'ab'[side]}_seed{seed}"
            scores[side].append(train(name, {**arms[side], "SEED": str(seed)}, launcher, folder)[METRIC])
            print(f"run {len(scores[0] + scores[1])} of {2 * len(seeds)}: {name}", flush=True)
    found = paired(*scores)
    lines = [[seed, x, y, y - x] for seed, x, y in zip(seeds, *scores, strict=True)]
    print(tabulate(lines, ["seed", a, b, "difference"], floatfmt=("d", ".5f", ".5f", "+.5f")))
    print(f"{b} - {a}: {found.mean:+.5f} bpb, 95 % interval {found.low:+.5f} to {found.high:+.5f}, "
          f"p = {found.p:.2g} (paired t-test, two-sided; n = {found.n}, fixed in advance)")  # fmt: skip
    print(
        f"smallest detectable effect with {found.n} seeds (p < {ALPHA}, power {POWER}): {found.visible:.5f}"
    )
    result = dict(seeds=seeds, a=scores[0], b=scores[1], **found._asdict())
    write_file(folder / "result.json", json.dumps(result).encode())
    return 0


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def int_list(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="start or continue a sweep")
    run.add_argument("space", nargs="?", type=Path, help="TOML file; or use --set alone")
    run.add_argument(
        "--set", action="append", default=[], help="NAME=a,b,c or NAME=low..high[:log]; adds or replaces"
    )
    run.add_argument("--trials", type=int, help="trials of the whole study; default: 20, or every grid point")
    run.add_argument("--seeds", type=int_list, help="seeds of each trial; default: 1337")
    run.add_argument("--sampler", choices=SAMPLERS, help="default: tpe if there is a range, else grid")
    run.add_argument(
        "--prune", type=int, help="prune trials above the median of this many; 0: never; default: 5"
    )
    run.add_argument("--workers", type=int, default=1, help="parallel trials; default: 1")
    run.add_argument("--gpus", help="split evenly among the workers; default: CUDA_VISIBLE_DEVICES, else all")
    run.add_argument("--storage", default="", help="database URL; default: SQLite in runs/STUDY/study.db")
    run.add_argument("--study", help="study name; default: name of the file")
    run.add_argument(
        "--grace", type=int, default=60, help="seconds without heartbeat until lost; default: 60"
    )
    two = commands.add_parser("compare", help="compare two settings, paired by seed")
    two.add_argument(
        "files", nargs=2, type=Path, metavar="ENV", help="two recipes; the environment overrides both"
    )
    two.add_argument("--seeds", type=int_list, required=True, help="all seeds, fixed before the first run")
    one = commands.add_parser("one", help="run the working tree once and append a line to the ledger")
    one.add_argument("--note", required=True, help="what was changed, and why")
    one.add_argument("--seconds", type=int, default=300, help="seconds of training; default: 300")
    one.add_argument("--ledger", type=Path, default=Path("runs/ledger.tsv"), help="default: runs/ledger.tsv")
    for each in (run, two, one):
        each.add_argument("--launcher", type=shlex.split, default=[sys.executable], help="default: python")
    return parser


def sweep(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Check the space and the machine, run the study, and return the exit code (command `run`)."""
    space = read_space(given.space, given.set, vars(given))
    environ = {**environ, **({"RECIPE": space.recipe} if space.recipe else {})}
    check_data(check_space(space, environ), given.launcher)
    gpus = [gpu for gpu in (given.gpus or environ.get("CUDA_VISIBLE_DEVICES", "")).split(",") if gpu]
    if given.workers > 1 and not gpus:
        gpus = [str(gpu) for gpu in range(trainer().torch.cuda.device_count())]
    if not 1 <= given.workers <= 1024 or len(gpus) % given.workers:
        raise ValueError(
            f"--workers {given.workers}: must be 1 to 1024 and divide the number of GPUs, {len(gpus)}"
        )
    torchrun = any("torch" in word for word in given.launcher)  # sets the threads of its ranks itself
    if given.workers > 1 and not torchrun:
        environ = {"OMP_NUM_THREADS": str(max(core_count() // given.workers, 1)), **environ}
    environ = {"WANDB_RUN_GROUP": space.name, **environ}
    return Sweep(space, environ, given.launcher, given.storage, given.grace).run(given.workers, gpus)


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    given, environ = make_parser().parse_args(argv), dict(os.environ if environ is None else environ)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # for heartbeats and plots
    try:
        check_tracker(environ)
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
    except (StorageInternalError, SQLAlchemyError) as error:  # while trials run, such as a full disk
        print(f"error: the study: {escape_lines(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
