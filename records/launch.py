"""How a run of train_gpt.py is started, watched, ended with whoever started it, and told to a tracker.

`records/sweep.py` and its ledger start all their runs here. TRACK=trackio or TRACK=wandb logs each there too.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any

from runfiles import METRIC, create, escape, read_result

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = (ROOT / "train_gpt.py", ROOT / "eval_ttt.py")
POLL = 0.2  # seconds between two looks at a run
ANY_RUN = dict(seed=0, run_id="")  # in the place of what each run has its own of

# A run is the child of this guard, which ends it when its own input closes: by us, or by our death, even by SIGKILL.
# Launcher and run have a session of their own; torchrun's workers each have one too, so it gets the time to end them.
GUARD = """
import os, select, signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
run = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
while run.poll() is None and not select.select([0], [], [], 0.05)[0]:
    pass
for number in (signal.SIGTERM, signal.SIGKILL):
    try:
        if run.poll() is None or number == signal.SIGKILL:
            os.killpg(run.pid, number)
        run.wait(45)
    except (OSError, subprocess.TimeoutExpired):
        pass
sys.exit(run.returncode if run.returncode >= 0 else 128 - run.returncode)
"""


class Crash(RuntimeError):
    """A run ended without a result."""


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def trainer() -> ModuleType:
    """train_gpt.py of this tree. Crash where it cannot be imported: who iterates on it breaks it now and then."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("train_gpt")
    except (Exception, SystemExit) as error:
        raise Crash(f"train_gpt.py cannot be imported: {error!r}") from error


def config_hash(environ: Mapping[str, str]) -> str:
    """Hash of the settings, but for seed and name, and of the code that reads them. ValueError for a wrong setting."""
    tg = trainer()
    return digest(asdict(tg.load_config(environ)[0]) | ANY_RUN, [tg.sha256_file(path) for path in PROGRAMS])


def finished_result(folder: Path) -> dict[str, Any]:
    """result.json with what sweeps and ledger need of it. ValueError that says what is missing."""
    return read_result(folder / "result.json", "bytes_total", "fits")


def train(
    run_id: str,
    environ: Mapping[str, str],
    launcher: Sequence[str],
    logs: Path,
    watch: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """result.json of a run, which is started unless it is there; a folder that an earlier start left half stays.

    So does one whose result.json lacks something: a line says what, and the run is started beside it.
    WATCH is called every POLL seconds with the run's folder; what it raises ends the run. Crash where no result comes.
    """
    for attempt in itertools.count(1):
        folder, result = Path("runs") / (run_id if attempt == 1 else f"{run_id}_start{attempt}"), {}
        if not os.path.lexists(folder):
            break
        if (folder / "result.json").exists():
            try:
                result = finished_result(folder)
                break
            except ValueError as error:
                print(f"note: {error}; the run is started again", file=sys.stderr, flush=True)
    if started := not result:
        logs.mkdir(parents=True, exist_ok=True)
        output = logs / f"{folder.name}.out"
        command = [sys.executable, "-I", "-c", GUARD, *launcher, str(PROGRAMS[0])]
        with (
            create(output) as file,
            subprocess.Popen(command, env={**environ, "RUN_ID": folder.name}, stdin=subprocess.PIPE, stdout=file,
                             stderr=subprocess.STDOUT, start_new_session=True) as guard,
        ):  # fmt: skip
            while guard.poll() is None:
                watch(folder)
                with suppress(subprocess.TimeoutExpired):
                    guard.wait(POLL)
        if not (folder / "result.json").exists():
            last = output.read_text(errors="replace").strip().rpartition("\n")[2]
            raise Crash(f"{folder}: exit code {guard.returncode}, see {output}: {escape(last)[:200]}")
        try:
            result = finished_result(folder)
        except ValueError as error:
            raise Crash(str(error)) from error
    if not isfinite(result[METRIC]):
        raise Crash(f"{folder}: {METRIC} is {result[METRIC]}")
    if started:
        track(folder.name, environ, result)
    return result


TRACKERS = ("trackio", "wandb")
TRACKING = threading.Lock()  # they know one run at a time


def tracker(environ: Mapping[str, str]) -> ModuleType | None:
    """The package that TRACK asks for. ValueError where it is another than TRACKERS, or not installed."""
    if not (name := environ.get("TRACK")):
        return None
    if name not in TRACKERS:
        raise ValueError(f"TRACK={name}: {' or '.join(TRACKERS)}")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"TRACK={name} asks for a package that is missing, pip install {name}: {error}") from error


def track(name: str, environ: Mapping[str, str], result: Mapping[str, Any]) -> None:
    """Log the settings and the numbers of a run where TRACK asks for it; what goes wrong with that is only told."""
    if package := tracker(environ):
        config = asdict(trainer().load_config(environ)[0])
        numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
        try:
            with TRACKING:
                package.init(project="parameter-golf", name=name, config=config)
                package.log(numbers)
                package.finish()
        except Exception as error:
            print(f"note: {package.__name__} did not take {name}: {error!r}", file=sys.stderr)
