"""Send the curves and scores of runs to an experiment tracker: Weights & Biases (wandb) or Trackio.

    TRACK=wandb RECIPE=... python train_gpt.py         # live; with WANDB_MODE=offline into local files
    TRACK=wandb python records/track.py runs/NAME ...  # afterwards: untracked runs, or new evaluations

The tracker gets every setting as config, each row of metrics.jsonl at its step, and the numbers of
result.json and of all evaluations as summary. train_gpt.py starts this program beside itself if TRACK is set.
It only reads the run folder, so a tracker can neither stop nor slow a run, and an error here is one note.
runs/NAME/track/ keeps the tracker's id of the run: a resumed run continues its curves. WANDB_PROJECT or
TRACKIO_PROJECT names the project (default: parameter-golf); the trackers' other variables apply too.
Exit codes: 0 sent, 1 not sent, 2 user error.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from runfiles import escape, read_object, write_file

# isort: split
from files import read_file

TRACKERS = ("trackio", "wandb")
METRICS_BYTES = 1 << 28  # of metrics.jsonl
POLL = 1.0  # seconds between looks at the run folder
WAIT = 30.0  # seconds that a finished run waits for the upload, which then continues in the background
GIVE_UP = 600  # seconds after the end of the run until an upload that hangs is ended
LOG = "track/sender.log"  # in the run folder: what the sender and the tracker print


def check(environ: Mapping[str, str]) -> None:
    """Raise ValueError if TRACK is set but is no tracker, is not installed, or is wandb without a login."""
    if not (name := environ.get("TRACK")):
        return
    if name not in TRACKERS:
        raise ValueError(f"TRACK={name}: must be {' or '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"TRACK={name}: the package is not installed. pip install {name}, or unset TRACK.")
    needs_login = name == "wandb" and environ.get("WANDB_MODE", "online") == "online"
    if needs_login and environ.get("RANK", "0") == "0":  # in a process of its own: wandb installs hooks
        command = [sys.executable, "-c", "import wandb; wandb.login(verify=False)"]
        with suppress(subprocess.TimeoutExpired):  # a slow network is not a user error
            done = subprocess.run(command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True,
                                  text=True, timeout=30)  # fmt: skip
            if done.returncode:
                said = done.stderr.strip().rpartition("\n")[2]
                raise ValueError(f"TRACK=wandb: {escape(said)} Or set WANDB_MODE=offline, or unset TRACK.")


def tracker(environ: Mapping[str, str]) -> Callable[[Path], Any]:
    """Return `following` for a program that calls it on all ranks: rank 0 follows. UserError as `check`."""
    import train_gpt as tg

    try:
        check(environ)
    except ValueError as error:
        raise tg.UserError(str(error)) from error
    return lambda folder: following(folder, environ) if tg.rank() == 0 else nullcontext()


def start_sender(folder: Path, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start `track.py --follow`, in its own session: signals to the run do not reach it."""
    (folder / "track").mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--follow", str(folder)]
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with open(os.open(folder / LOG, flags, 0o666), "ab") as log:
        return subprocess.Popen(command, env=dict(environ), stdin=subprocess.PIPE, stdout=2, stderr=log,
                                start_new_session=True)  # fmt: skip


@contextmanager
def following(folder: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Send what is written to a run folder meanwhile, then wait up to WAIT seconds for the upload.

    The sender ends when the pipe to it is closed, as it is by whatever ends this process.
    """
    try:
        sender = start_sender(folder, environ)
    except OSError as error:
        note(f"cannot start the sender: {error}")
        yield
        return
    with sender.stdin:
        yield
    try:
        if sender.wait(WAIT):
            note((folder / LOG).read_text(errors="replace").strip().rpartition("\n")[2])
    except subprocess.TimeoutExpired:
        note(f"the upload takes more than {WAIT:.0f} s and continues in the background, see {folder / LOG}")
    except OSError as error:
        note(f"{error}")


def note(text: str) -> None:
    with suppress(OSError):  # of a closed terminal
        print(f"note: TRACK: {escape(text)}", file=sys.stderr, flush=True)


def numbers(content: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in content.items() if isinstance(value, int | float)}


def rows(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[list[int], dict[str, float]]]:
    """Yield [step, 1 for validation] and the values of each row of metrics.jsonl, in order.

    Added are tokens, step_tokens_per_second since the last training row, and matrix_lr, Muon's learning rate.
    """
    path, step, seconds = folder / "metrics.jsonl", 0, 0.0
    for line in read_file(path, METRICS_BYTES).splitlines() if path.exists() else ():
        with suppress(ValueError):  # of a line that is not yet complete
            row = json.loads(line)
            values = numbers(row) | {"tokens": row["step"] * config["train_batch_tokens"]}
            if "lr_scale" in row:
                values["matrix_lr"] = row["lr_scale"] * config["matrix_lr"]
            if "train_loss" in row:
                if row["seconds"] > seconds:
                    tokens = (row["step"] - step) * config["train_batch_tokens"]
                    values["step_tokens_per_second"] = tokens / (row["seconds"] - seconds)
                step, seconds = row["step"], row["seconds"]
            yield [values.pop("step"), int("val_loss" in row)], values


def scores(folder: Path) -> dict[str, float]:
    """Return the numbers of result.json, and those of each evaluation as eval/NAME or eval/MODE/NAME."""
    found = {}
    for path in (folder / "result.json", folder / "eval_ttt.json", *folder.glob("eval/*/eval_ttt.json")):
        if path.exists():
            own = "" if path.name == "result.json" else "eval/"
            own += f"{path.parent.name}/" if path.parent != folder else ""
            found |= {own + name: value for name, value in numbers(read_object(path)).items()}
    return found


class Tracked:
    """The tracker's run of a run folder, created or continued."""

    def __init__(self, name: str, folder: Path):
        self.folder, self.package = folder, importlib.import_module(name)
        self.memory = folder / "track" / f"{name}.json"
        written = read_object(folder / "config.json", "config", "versions")
        self.config = written["config"]
        unique = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', folder.name)[:80]}-{secrets.token_hex(4)}"
        self.sent = read_object(self.memory) if self.memory.exists() else dict(id=unique, last=[-1, 0])
        common = dict(config=self.config | dict(versions=written["versions"]), resume="allow",
                      project=os.environ.get(f"{name.upper()}_PROJECT", "parameter-golf"))  # fmt: skip
        if name == "wandb":
            settings = self.package.Settings(console="off", save_code=False, symlink=False)
            self.run = self.package.init(id=self.sent["id"], name=folder.name, settings=settings, **common,
                                         dir=os.environ.get("WANDB_DIR", folder / "track"))  # fmt: skip
            self.place = self.run.url or f"offline, to upload: wandb sync {Path(self.run.dir).parent}"
        else:
            self.run = self.package.init(name=self.sent["id"], **common)  # the name is the identity
            self.place = f"trackio show --project {common['project']}"

    def send(self) -> None:
        """Send the rows of metrics.jsonl that have not been sent."""
        before = self.sent["last"]
        for position, values in rows(self.folder, self.config):
            if position > self.sent["last"]:
                self.package.log(values, step=position[0])
                self.sent["last"] = position
        if self.sent["last"] != before or not self.memory.exists():
            write_file(self.memory, json.dumps(self.sent).encode())

    def finish(self) -> None:
        """Send the scores and close the run, as failed if it has no result."""
        if self.package.__name__ == "wandb":
            self.run.summary.update(scores(self.folder))
            self.package.finish(exit_code=0 if (self.folder / "result.json").exists() else 1)
        else:  # has no summary
            self.package.log(scores(self.folder), step=max(self.sent["last"][0], 0))
            self.package.finish()


def send_run(name: str, folder: Path, is_over: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Send a run folder until `is_over`, which may wait, and then its scores; `say` tells where it goes."""
    tracked, over = None, False
    while not over:
        over = is_over()
        if tracked is None and (folder / "config.json").exists():
            tracked = Tracked(name, folder)
            say(f"note: TRACK={name}: {tracked.place}")
        if tracked is not None:
            tracked.send()
    if tracked is not None:
        tracked.finish()


def follow(name: str, folder: Path) -> int:
    """Send a run until standard input is closed; notes go to standard output, all else to standard error.

    Returns 1 for an error after the end of the run, which the waiting run tells.
    """
    os.nice(19)  # the run comes first
    terminal = os.fdopen(os.dup(1), "w")  # not inherited by what a tracker starts, which may hang
    os.dup2(2, 1)

    def is_over() -> bool:
        if select.select([0], [], [], POLL)[0]:
            terminal.close()
            signal.alarm(GIVE_UP)
        return terminal.closed

    def say(text: str) -> None:
        print(text, file=sys.stderr if terminal.closed else terminal, flush=True)

    try:
        lock = os.open(folder / "track", os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # the sender of an earlier start may still be uploading
        send_run(name, folder, is_over, say)
    except Exception as error:
        text = f"{name} does not log this run: {escape(repr(error))}. To send it later: TRACK={name} python "
        say(("" if terminal.closed else "note: TRACK: ") + f"{text}records/track.py {folder}")
        signal.alarm(GIVE_UP)  # for what a tracker does at exit
        return int(terminal.closed)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, runs/NAME")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    given, name = parser.parse_args(argv), os.environ.get("TRACK", "")
    if given.follow:
        return follow(name, given.runs[0])
    try:
        check(os.environ)
        if not name:
            raise ValueError(f"TRACK is not set: must be {' or '.join(TRACKERS)}")
        for folder in given.runs:
            read_object(folder / "config.json", "config", "versions")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder in given.runs:
        try:
            (folder / "track").mkdir(exist_ok=True)
            send_run(name, folder, lambda: True, print)
        except Exception as error:  # of the tracker
            print(f"error: {folder}: {name} does not log this run: {error!r}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
