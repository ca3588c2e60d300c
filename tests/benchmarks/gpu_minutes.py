"""Run all GPU measurements in nine minutes of one rented GPU, most valuable first, tolerating failures.

    python tests/benchmarks/gpu_minutes.py --prepare FOLDER --train FILE --val FILE --tokenizer FILE   locally
    python tests/benchmarks/gpu_minutes.py --stage FOLDER --out DIR --minutes 9       on the GPU machine
    python tests/benchmarks/gpu_minutes.py --stage FOLDER --out DIR --minutes 3       later: continues
    python tests/benchmarks/gpu_minutes.py --rehearse                                 toy size, on a CPU
    python tests/benchmarks/gpu_minutes.py --page DIR/gpu_minutes.json PAGE.md        results and predictions
    torchrun --standalone --nproc_per_node=8 tests/benchmarks/gpu_minutes.py --preflight   before 8-GPU runs

The parts (gpu_parts.py): the experiment (a recipe trained, exported, scored, adapted), correctness,
milliseconds per step, the quantization curve, the rest. Each runs in its own process group with a time limit.
A part that fails or hangs is recorded and killed with all its children, and the next one starts. After each
part DIR has gpu_minutes.json, summary.txt, logs.tgz and the artifact, each below 16 MiB, so that killing the
command loses at most one part.

A later call with the same DIR (or --kept DIR) runs what has no result for the current code and data, by
content hash: first what was never measured, then what was measured with other code. Exit codes: 0 every part
has a result, 1 some have none, 2 user error. This process imports neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_parts  # noqa: E402
import gpu_stage  # noqa: E402
from gpu_parts import PARTS, Context, Part  # noqa: E402

LOG_TAIL = 40  # last lines of a failed part's log, copied to the JSON
START_SHARE = 0.6  # a part starts only if at least this fraction of its expected seconds is left
TRAIN_SECONDS = 150.0  # on the contest clock
RESERVE_SECONDS = 5.0  # for writing the last files
REHEARSAL_SECONDS = dict(limit=120.0, expected=8.0)  # for every part
TOKEN = "GPU_MINUTES_PART"  # environment variable of a part and all its children
DONE = ("ok", "not needed")
LOGGED = (".log", ".json", ".jsonl", ".txt", ".csv", ".png", ".npy")
REQUIRED = {  # module: what still runs without it
    "torch": "",
    "numpy": "",
    "sentencepiece": "",
    "pytest": "all but part kernels",
    "matplotlib": "all but the plots of evaluations, which stop with an error",
    "tqdm": "",
}


# ------------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------------


def marked(token: str) -> list[int]:
    """Return the processes with `token` in their environment, including any outside the process group."""
    wanted, found = f"{TOKEN}={token}".encode(), []
    for entry in Path("/proc").iterdir() if Path("/proc/self").exists() else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end_group(process: subprocess.Popen, token: str, patience: float = 3.0) -> bool:
    """Stop a process, its group and all with its token (SIGTERM, SIGKILL); return whether all are gone."""
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        for pid in marked(token):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        until = time.monotonic() + wait
        while time.monotonic() < until and (process.poll() is None or marked(token)):
            time.sleep(0.05)
        if process.poll() is not None and not marked(token):
            return True
    return False


class Running:
    """The process of a part, started by the constructor and stopped by `finish`."""

    def __init__(
        self,
        part: Part,
        command: Sequence[str],
        log: Path,
        result: Path,
        limit: float,
        environ: dict[str, str],
    ):
        self.part, self.log, self.result, self.limit = part, log, result, limit
        self.token, self.began = uuid.uuid4().hex, time.monotonic()
        result.unlink(missing_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                            start_new_session=True,
                                            env={**environ, TOKEN: self.token})  # fmt: skip

    def finish(self) -> dict[str, Any]:
        """Wait until the part ends or reaches its limit, stop all its processes, and return its entry."""
        try:
            code = self.process.wait(max(0.1, self.began + self.limit - time.monotonic()))
            state = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, state = None, "limit"
        gone = end_group(self.process, self.token, 3.0 if state == "limit" else 0.5)
        entry = dict(state=state, exit_code=code, seconds=round(time.monotonic() - self.began, 2),
                     limit=round(self.limit, 1), result=self.read_result())  # fmt: skip
        if state != "ok":
            entry["log_tail"] = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        if not gone:
            entry["left_running"] = marked(self.token)
        return entry

    def read_result(self) -> dict[str, Any]:
        try:
            return json.loads(self.result.read_text())
        except (OSError, ValueError):
            return {}

    def stop(self) -> None:
        end_group(self.process, self.token)


# ------------------------------------------------------------------------------------------------------------
# Choosing the next part
# ------------------------------------------------------------------------------------------------------------


def is_kept(entry: dict[str, Any] | None, digest: str) -> bool:
    """Return whether a part has a result for the current code and data."""
    return bool(entry) and entry["state"] in DONE and entry["digest"] == digest


def due_parts(
    parts: Sequence[Part], kept: dict[str, dict], digests: dict[str, str], has_model: bool
) -> list[Part]:
    """Return the parts to run: first those that never had a result, each time the most valuable first.

    A part that failed twice on the same code and data goes to the end. Training is first if a part needs its
    artifact and there is none.
    """
    due = [part for part in parts if not is_kept(kept.get(part.name), digests[part.name])]
    missing = not has_model and any(part.needs for part in due)
    due = [part for part in parts if part in due or (missing and part.name == "train")]

    def order(part: Part) -> tuple[bool, bool]:
        entry = kept.get(part.name, {})
        hopeless = entry.get("failures", 0) >= 2 and entry["digest"] == digests[part.name]
        measured_before = entry.get("state") in DONE or "last_good" in entry
        return hopeless, measured_before and not (missing and part.name == "train")

    return sorted(due, key=order)


def choose(queue: Sequence[Part], left: float, seconds: Callable[[Part], float]) -> Part | None:
    """Return the most valuable part that has time; a spare part only if parts a to c have time after it."""
    for number, part in enumerate(queue):
        if part.fallback:
            continue
        others = sum(
            seconds(other) for other in queue[number + 1 :] if other.kind in "abc" and not other.spare
        )
        needed = seconds(part) + others if part.spare else START_SHARE * seconds(part)
        if left >= needed:
            return part
    spare = [part for part in queue if part.spare and left >= seconds(part)]
    return spare[0] if spare else None


class Driver:
    """One call: runs the due parts until the time is used up, and saves all results after each."""

    def __init__(
        self,
        out: Path,
        work: Path,
        seconds: float,
        context: Context,
        parts: Sequence[Part] = PARTS,
        data_digest: str = "",
        command: Callable[[Part, Path], list[str]] | None = None,
        breaks: dict[str, str] | None = None,
        began: float | None = None,
    ):
        self.out, self.work, self.context, self.parts = out, work, context, parts
        self.began, self.seconds = time.monotonic() if began is None else began, seconds
        self.command, self.breaks, self.running = command or part_command, breaks or {}, []
        self.data_digest = data_digest
        self.digests = {part.name: part.digest(data_digest) for part in parts}
        self.path = out / "gpu_minutes.json"
        self.report = self.read_report()
        self.call = dict(date=f"{datetime.now():%Y-%m-%d %H:%M}", host_cores=os.cpu_count(), seconds=seconds,
                         python=platform.python_version(), order=[])  # fmt: skip
        self.report["calls"].append(self.call)
        for folder in (out, work / "logs", work / "results", work / "contexts"):
            folder.mkdir(parents=True, exist_ok=True)

    def read_report(self) -> dict[str, Any]:
        fresh = dict(benchmark="gpu_minutes", rehearsal=self.context.rehearse, calls=[], parts={})
        if not self.path.exists():
            return fresh
        report = json.loads(self.path.read_text())
        if report.get("rehearsal") != self.context.rehearse:
            raise gpu_stage.StageError(
                f"{self.path} is from a {'rehearsal' if report.get('rehearsal') else 'GPU'}. Choose another "
                "--out."
            )
        return report

    def left(self) -> float:
        return self.seconds - RESERVE_SECONDS - (time.monotonic() - self.began)

    def expected(self, part: Part) -> float:
        return REHEARSAL_SECONDS["expected"] if self.context.rehearse else part.expected

    def limit(self, part: Part) -> float:
        limit = REHEARSAL_SECONDS["limit"] if self.context.rehearse else part.limit
        return min(limit, self.left())

    def has_model(self) -> bool:
        return (self.out / "final_model.int6.ptz").exists() or self.has_weights()

    def has_weights(self) -> bool:
        return any(path.exists() for path in self.context.weights_paths())

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f}] {text}", flush=True)

    def start(self, part: Part) -> Running:
        """Write the context of a part to disk and start it."""
        left = self.left()
        train_seconds = min(self.context.train_seconds, max(20.0, left - 120.0))
        kept = self.report["parts"].get("train", {}).get("result", {}).get("clock_seconds", 0.0)
        result = self.work / f"results/{part.name}.json"
        context = Context(**json.loads(gpu_parts.context_json(self.context)) | dict(
            result_path=str(result), train_seconds=train_seconds, kept_train_seconds=kept,
            break_how=self.breaks.get(part.name, "")))  # fmt: skip
        path = self.work / f"contexts/{part.name}.json"
        path.write_text(gpu_parts.context_json(context))
        environ = {**gpu_parts.clean_environ(), "PYTHONUNBUFFERED": "1"}
        if self.context.rehearse:
            environ.setdefault("OMP_NUM_THREADS", "1")  # more threads do not help on small matrices
        environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.work / "inductor")  # shared by all parts
        places = [str(self.work / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environ["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
        log = self.work / f"logs/{part.name}.log"
        running = Running(part, self.command(part, path), log, result, self.limit(part), environ)
        self.running.append(running)
        self.call["order"].append(part.name)
        self.say(f"{part.name} starts, limit {running.limit:.0f} s: {part.title}")
        return running

    def record(self, part: Part, entry: dict[str, Any]) -> None:
        """Add an entry to the report. A failed entry keeps the last good one beside it."""
        before = self.report["parts"].get(part.name)
        entry |= dict(
            digest=self.digests[part.name], kind=part.kind, title=part.title, date=self.call["date"]
        )
        if entry["state"] not in DONE:
            same = before is not None and before["digest"] == entry["digest"]
            entry["failures"] = 1 + (before.get("failures", 0) if same else 0)
            good = (
                before if before is not None and before["state"] == "ok" else (before or {}).get("last_good")
            )
            if good:
                entry["last_good"] = good
        self.report["parts"][part.name] = entry
        self.save()

    def finish(self, running: Running) -> None:
        part, entry = running.part, running.finish()
        gpu_parts.keep_artifact(self.context, part.name)
        self.running.remove(running)
        if len(self.running):
            entry["beside"] = [other.part.name for other in self.running]
        self.say(f"{part.name} {entry['state']} after {entry['seconds']:.1f} s: {headline(entry['result'])}")
        for line in entry.get("log_tail", [])[-12:]:
            print(f"         | {line[:200]}", flush=True)
        self.record(part, entry)

    def may_run_beside(self, running: Running, other: Part) -> bool:
        """Return whether `other` may run now: on a GPU if marked so, in a rehearsal if it needs no model."""
        if running.process.poll() is not None or self.left() < self.expected(other):
            return False
        if self.context.rehearse:
            return not other.needs and not other.fallback
        compiling = gpu_parts.CLOCK_STARTS not in running.log.read_text(errors="replace")
        return other.beside == running.part.name and compiling

    def run_with_companions(self, part: Part, queue: list[Part]) -> None:
        """Run a part, and in parallel other due parts, one at a time."""
        running = self.start(part)
        for other in list(queue):
            if self.may_run_beside(running, other):
                queue.remove(other)
                self.finish(self.start(other))
        self.finish(running)

    def run(self) -> int:
        """Run the due parts; return exit code 0 if every part has a result."""
        queue = due_parts(self.parts, self.report["parts"], self.digests, self.has_model())
        self.say(f"due: {' '.join(part.name for part in queue) or 'nothing'}")
        fallbacks = [part for part in queue if part.fallback]
        while (part := choose(queue, self.left(), self.expected)) is not None:
            queue.remove(part)
            if (part.needs == "model" and not self.has_model()) or (
                part.needs == "weights" and not self.has_weights()
            ):
                self.skip(part, f"needs {part.needs}, but training left none on this machine")
                continue
            self.run_with_companions(part, queue)
            for other in [other for other in fallbacks if other.fallback == part.name]:
                self.fall_back(other, part)
        for part in queue:
            if not part.fallback:
                self.skip(
                    part, f"no time: {max(self.left(), 0):.0f} s left, {self.expected(part):.0f} s expected"
                )
        self.call["used_seconds"] = round(time.monotonic() - self.began, 1)
        self.save()
        lacking = [part.name for part in self.parts if not self.has_result(part)]
        self.say("every part has a result" if not lacking else f"without a result: {' '.join(lacking)}")
        return int(bool(lacking))

    def has_result(self, part: Part) -> bool:
        return is_kept(self.report["parts"].get(part.name), self.digests[part.name])

    def fall_back(self, part: Part, first: Part) -> None:
        """Run the fallback of a part that left no model; otherwise record that it was not needed."""
        if self.has_model():
            self.record(part, dict(state="not needed", seconds=0.0, result={}))
        elif self.left() > START_SHARE * self.expected(part):
            self.finish(self.start(part))
        else:
            self.skip(part, f"no time after {first.name}")

    def skip(self, part: Part, why: str) -> None:
        """Record why a part was skipped, unless it already has an entry."""
        self.say(f"{part.name} skipped: {why}")
        if part.name not in self.report["parts"] or self.report["parts"][part.name]["state"] == "skipped":
            self.report["parts"][part.name] = dict(state="skipped", why=why, seconds=0.0, result={},
                                                   digest="", kind=part.kind, title=part.title)  # fmt: skip
            self.save()

    def without_paths(self, text: str) -> str:
        """Remove the machine's own folders: the file is made to be published."""
        for folder in (os.path.relpath(ROOT, self.work), self.work, ROOT, Path(sys.prefix)):
            text = text.replace(f"{folder}/", "")
        return text

    def save(self) -> None:
        """Write the JSON atomically, then the summary and the logs; a full disk only causes a warning."""
        try:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(self.without_paths(json.dumps(self.report, indent=1)))
            os.replace(temporary, self.path)
            (self.out / "summary.txt").write_text(summary(self.report) + "\n")
            self.save_logs()
        except OSError as error:
            self.say(f"WARNING: cannot write to {self.out}: {error}")

    def save_logs(self, most: int = 12 << 20) -> None:
        """Write logs and small reports to logs.tgz, smallest first, up to `most` bytes before compression."""
        files = [path for folder in ("logs", "runs", *(f"bench_{p.name}" for p in self.parts))
                 for path in (self.work / folder).rglob("*")
                 if path.suffix in LOGGED and path.is_file()]  # fmt: skip
        target, total = self.out / "logs.tgz", 0
        with tarfile.open(target.with_suffix(".tmp"), "w:gz", compresslevel=1) as archive:
            for path in sorted(files, key=lambda path: path.stat().st_size):
                total += path.stat().st_size
                if total <= most and "source" not in path.parts:
                    archive.add(path, path.relative_to(self.work))
        os.replace(target.with_suffix(".tmp"), target)

    def stop(self) -> None:
        for running in self.running:
            running.stop()


def part_command(part: Part, context: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--run-part", part.name, str(context)]


def headline(result: dict[str, Any], most: int = 6) -> str:
    """Return the first numbers of a result, nested ones included."""
    return " ".join(islice(numbers(result), most))


def numbers(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{name}:{value:.5g}"


def summary(report: dict[str, Any]) -> str:
    """Return one line per part."""
    lines = [f"{name:14} {entry['kind']} {entry['state']:10} {entry['seconds']:7.1f} s  "
             f"{entry.get('why') or headline(entry['result'])}"
             for name, entry in report["parts"].items()]  # fmt: skip
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def can_import(name: str, site: Path) -> bool:
    with suppress(ValueError):
        return importlib.util.find_spec(name) is not None or bool(list(site.glob(f"{name}*")))
    return False


def choose_coder(site: Path) -> tuple[str, list[str]]:
    """The coder that the artifact can have here, and notes about what is missing. StageError where there is
    none."""
    lacking = [name for name in gpu_stage.WHEELS if not can_import(name, site)]
    if len(lacking) == len(gpu_stage.WHEELS):
        wheels = " or ".join(f"{name}=={gpu_stage.pins()[name]}" for name in lacking)
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        raise gpu_stage.StageError(
            f"nothing here codes artifacts: neither {' nor '.join(lacking)} can be imported. "
            f"Put a wheel of {wheels} for {tag} into wheels/ of the carried folder, or install it."
        )
    coder = "zstd" if "constriction" in lacking else "ans"
    notes = [f"{name} cannot be imported; artifacts are coded with {coder}" for name in lacking]
    missing = [name for name in REQUIRED if not can_import(name, site)]
    notes += [f"{name} cannot be imported; still runs: {REQUIRED[name] or 'nothing'}" for name in missing]
    return coder, notes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="minutes for the whole call")
    parser.add_argument("--stage", type=Path, help="folder made by --prepare")
    parser.add_argument("--out", type=Path, help="result folder; default: runs/gpu_minutes")
    parser.add_argument(
        "--kept", type=Path, help="result folder of an earlier call, copied to --out if that has none"
    )
    parser.add_argument("--work", type=Path, help="folder for data, runs and logs; default: a temporary one")
    parser.add_argument(
        "--train-seconds", type=float, default=TRAIN_SECONDS, help="contest clock of the experiment, s"
    )
    parser.add_argument("--only", default="", help="comma list of parts; default: all")
    parser.add_argument(
        "--rehearse", action="store_true", help="run a toy recipe on the demo corpus, on a CPU"
    )
    parser.add_argument("--break", dest="breaks", action="append", default=[], metavar="PART=crash|hang",
                        help="with --rehearse: make a part fail")  # fmt: skip
    parser.add_argument(
        "--rehearsal-limit", type=float, default=REHEARSAL_SECONDS["limit"], help="seconds per part"
    )
    parser.add_argument("--list", action="store_true", help="print the parts in order of value")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="make the stage folder")
    parser.add_argument("--shards", type=Path, help="--prepare: folder of token shards")
    parser.add_argument("--train", type=Path, help="--prepare: training text, for data/prepare.py")
    parser.add_argument("--val", type=Path, help="--prepare: validation text")
    parser.add_argument(
        "--tokenizer", type=Path, help="--prepare: SentencePiece model; default: the shards' own"
    )
    parser.add_argument("--wheels", type=Path, help="--prepare: folder of wheels; default: downloaded by pip")
    parser.add_argument("--python", default="3.12", help="--prepare: Python of the GPU machine")
    parser.add_argument(
        "--tokens", type=int, default=gpu_stage.MAX_TRAIN_TOKENS, help="--prepare: training tokens"
    )
    parser.add_argument("--tuning", type=int, default=gpu_stage.TUNING_DOCUMENTS, help="--prepare: number of "
                        "validation documents for tuning; the others are for reporting")  # fmt: skip
    parser.add_argument(
        "--page", nargs=2, type=Path, metavar=("JSON", "PAGE"), help="write the page of a result file"
    )
    parser.add_argument(
        "--preflight", action="store_true", help="check the machine before a run; use with torchrun"
    )
    parser.add_argument(
        "--preflight-seconds", type=float, default=90.0, help="--preflight: seconds for the check"
    )
    parser.add_argument("--run-part", nargs=2, metavar=("PART", "CONTEXT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def make_driver(arguments: argparse.Namespace, began: float) -> Driver:
    """Unpack the data, find earlier results, and print missing packages."""
    rehearse = arguments.rehearse
    out = arguments.out or ROOT / ("runs/gpu_rehearsal" if rehearse else "runs/gpu_minutes")
    out = out.resolve()
    if arguments.kept and not (out / "gpu_minutes.json").exists() and arguments.kept.is_dir():
        shutil.copytree(arguments.kept, out, dirs_exist_ok=True)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="gpu_minutes_"))
    work = work.resolve()
    if rehearse:
        REHEARSAL_SECONDS["limit"] = arguments.rehearsal_limit
        data, digest, notes = gpu_stage.embedded(work), "demo corpus", []
    elif arguments.stage is None:
        raise gpu_stage.StageError(
            "--stage FOLDER is missing: give the folder made by --prepare, or --rehearse"
        )
    else:
        data, notes = gpu_stage.unpack(arguments.stage.resolve(), work)
        digest = gpu_stage.digest_of(arguments.stage / "stage.json")
    coder, lacking = choose_coder(work / "site")
    if not rehearse and not list(Path("/dev").glob("nvidia[0-9]*")):
        lacking.append("no GPU found (/dev/nvidia0): parts will run on the CPU until their limits")
    for note in [*notes, *lacking]:
        print(f"note: {note}", flush=True)
    names = [name for name in arguments.only.split(",") if name] or [part.name for part in PARTS]
    breaks = dict(text.split("=", 1) for text in arguments.breaks)
    if unknown := {*names, *breaks} - {part.name for part in PARTS}:
        raise gpu_stage.StageError(
            f"unknown part: {', '.join(sorted(unknown))}. Parts: {' '.join(p.name for p in PARTS)}"
        )
    if breaks and (not rehearse or {*breaks.values()} - {"crash", "hang"}):
        raise gpu_stage.StageError("--break PART=crash or PART=hang needs --rehearse")
    context = Context(str(work), str(out), rehearse, data, coder, arguments.train_seconds)
    parts = [part for part in PARTS if part.name in names]
    return Driver(out, work, 60 * arguments.minutes, context, parts, digest, breaks=breaks, began=began)


def measure(arguments: argparse.Namespace, began: float) -> int:
    driver = make_driver(arguments, began)

    def end(number: int, frame: Any) -> None:  # preempted: results are already on disk
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        code = driver.run()
    finally:
        driver.stop()
        driver.save()
    print(summary(driver.report), flush=True)
    return code


def main() -> int:
    began, arguments = time.monotonic(), parse_arguments()
    if arguments.run_part:
        name, context = arguments.run_part
        gpu_parts.run_part(next(part for part in PARTS if part.name == name), Path(context))
        return 0
    if arguments.list:
        for part in PARTS:
            print(
                f"{part.kind} {part.name:14} {part.expected:4.0f} s, limit {part.limit:4.0f} s  {part.title}"
            )
        return 0
    if arguments.preflight:
        import preflight

        return preflight.main(arguments.preflight_seconds)
    if arguments.page:
        import gpu_page

        gpu_page.write(*arguments.page)
        return 0
    if arguments.prepare:
        text = (arguments.train, arguments.val) if arguments.train and arguments.val else None
        print(gpu_stage.prepare(arguments.prepare, arguments.shards, text, arguments.tokenizer,
                                arguments.wheels, arguments.python, arguments.tokens,
                                arguments.tuning))  # fmt: skip
        return 0
    return measure(arguments, began)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except gpu_stage.StageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except gpu_parts.PartFailed:
        traceback.print_exc()
        sys.exit(1)
