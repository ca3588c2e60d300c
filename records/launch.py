"""Start a run of train_gpt.py, watch it, and stop it when its parent dies.

    python records/launch.py plan RECIPE [--gpus 8] [--hours 2] [--price 2.50] [--script plan.sh]

`plan` lays out the seeds of a recipe in the time and money given, and writes the script that runs them:
`plan --help`. Exit codes: 0 done, 1 the plan does not fit, 2 user error.

The rest is a module: `records/sweep.py` and its ledger start all their runs here.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any

from runfiles import METRIC, create, escape, read_result

# isort: split
from files import check_form, open_input

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = (ROOT / "train_gpt.py", ROOT / "eval_ttt.py")
TAIL_BYTES = 1 << 16  # of a run's output, for its last line
POLL = 0.2  # seconds between polls of a run
RESULT = {METRIC: float, "bytes_total": int, "fits": bool, "legal?": bool, "strict_seconds?": float}
ANY_RUN = dict(seed=0, run_id="")  # replaces the per-run settings in hashes

# A run is a child of this guard, which stops it when the guard's stdin closes: when we close it, or when we
# die, even by SIGKILL. Launcher and run have their own session. torchrun's workers have one each too, so
# torchrun gets time to stop them.
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
    """A run that ended without a result."""


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def trainer() -> ModuleType:
    """Import train_gpt.py of this tree. Crash if that fails, as it may while somebody edits it."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("train_gpt")
    except (Exception, SystemExit) as error:
        raise Crash(f"train_gpt.py cannot be imported: {error!r}") from error


def config_hash(environ: Mapping[str, str]) -> str:
    """Hash the settings, except seed and run id, and the code that parses them. ValueError if one is bad."""
    tg = trainer()
    return digest(asdict(tg.load_config(environ)[0]) | ANY_RUN, [tg.sha256_file(path) for path in PROGRAMS])


def finished_result(folder: Path) -> dict[str, Any]:
    """Return result.json with what sweeps and the ledger need of it. ValueError names what is missing."""
    result = read_result(folder / "result.json", "bytes_total", "fits")
    check_form(result, RESULT, folder / "result.json")
    return result


def last_line(path: Path) -> str:
    """Return the last line of a run's output that is not empty, without control characters."""
    with open_input(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return escape(file.read(TAIL_BYTES).decode(errors="replace").strip().rpartition("\n")[2])


def train(
    run_id: str,
    environ: Mapping[str, str],
    launcher: Sequence[str],
    logs: Path,
    watch: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """Return result.json of a run, starting the run if there is none.

    The folder of an unfinished run is kept. So is one whose result.json lacks a key: a note names the key,
    and the run is started again in another folder. `watch` is called with the run folder every POLL seconds;
    an exception from it stops the run. Crash if the run produces no result.
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
                print(f"note: {error}; starting the run again", file=sys.stderr, flush=True)
    if not result:
        logs.mkdir(parents=True, exist_ok=True)
        output = logs / f"{folder.name}.out"
        command = [sys.executable, "-I", "-c", GUARD, *launcher, str(PROGRAMS[0])]
        with (
            create(output) as file,
            subprocess.Popen(command, env={**environ, "RUN_ID": folder.name}, stdin=subprocess.PIPE,
                             stdout=file, stderr=subprocess.STDOUT, start_new_session=True) as guard,
        ):  # fmt: skip
            while guard.poll() is None:
                watch(folder)
                with suppress(subprocess.TimeoutExpired):
                    guard.wait(POLL)
        if not (folder / "result.json").exists():
            said = last_line(output)[:200]
            raise Crash(f"{folder}: exit code {guard.returncode}, see {output}: {said}")
        try:
            result = finished_result(folder)
        except ValueError as error:
            raise Crash(str(error)) from error
    if not isfinite(result[METRIC]):
        raise Crash(f"{folder}: {METRIC} is {result[METRIC]}")
    return result


def main(argv: Sequence[str]) -> int:
    if argv in ([], ["-h"], ["--help"]):
        print(__doc__.strip())
        return 0 if argv else 2
    if argv[0] != "plan":
        print(f"error: unknown command: {escape(argv[0])}. Commands: plan", file=sys.stderr)
        return 2
    from plan import main as plan

    return plan(argv[1:], os.environ)


if __name__ == "__main__":
    sys.modules["launch"] = sys.modules["__main__"]  # one module, also for plan.py
    sys.exit(main(sys.argv[1:]))
