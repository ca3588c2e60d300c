"""Real torchrun jobs that lose a process at a seeded random moment: nothing is lost, nothing is half-written.

Each case starts train_gpt.py on two CPU processes, waits until the run is where the plan says (a line of its
log, a file being written), kills what the plan names, waits until every process is gone, looks at the files,
and goes on with RESUME=auto. In the end weights, artifact, losses and scores are those of a run that nobody
touched, bit for bit.

Nothing is patched in these jobs. Linux only:
inotify says when a file is being written, /proc who belongs to a job.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import inherited
from test_cli import snapshot, write_shard
from test_training import train_here

import train_gpt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify and /proc")
ROOT = Path(__file__).resolve().parent.parent
STARTS, ENDS = 120, 60  # seconds that a job may take to reach a moment of the plan, and to end after a kill

# ------------------------------------------------------------------------------------------------------------
# Jobs
# ------------------------------------------------------------------------------------------------------------


class Watch:
    """What happens to the files of a folder, as the kernel tells it; nothing is missed between two looks."""

    CREATE, MODIFY, MOVED_TO, CLOSED = 0x100, 0x2, 0x80, 0x8

    def __init__(self, folder: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        mask = self.CREATE | self.MODIFY | self.MOVED_TO | self.CLOSED
        if self.descriptor < 0 or libc.inotify_add_watch(self.descriptor, os.fsencode(folder), mask) < 0:
            raise OSError(ctypes.get_errno(), f"inotify on {folder}")

    def names(self, seconds: float) -> set[str]:
        """The files that were made, written to or renamed since the last call;
        waits up to SECONDS for the first."""
        if not select.select([self.descriptor], [], [], seconds)[0]:
            return set()
        data, names = os.read(self.descriptor, 1 << 16), set()
        while data:
            _, _, _, length = struct.unpack_from("iIII", data)
            names.add(os.fsdecode(data[16 : 16 + length].rstrip(b"\0")))
            data = data[16 + length :]
        return names

    def close(self) -> None:
        os.close(self.descriptor)


def processes_in(folder: Path) -> list[int]:
    """The living processes whose working directory is FOLDER or lies in it."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{os.readlink(entry / 'cwd')}/".startswith(f"{folder}/"):
                found.append(int(entry.name))
        except OSError:
            pass  # gone by now, a zombie, or not ours
    return found


def rank_of(pid: int) -> int | None:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(entry[5:]) for entry in environ if entry.startswith(b"RANK=")), None)


@cache
def ports() -> Iterator[int]:
    return itertools.count(random.SystemRandom().randrange(20_000, 32_000))


def free_port() -> int:
    """A port below 32768, where the kernel gives none to gloo's listeners in the other tests' processes."""
    for port in ports():
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


class Job:
    """train_gpt.py in a folder of its own, as LAUNCH says:

    alone      one process torchrun   two, started by one agent agents     two agents of one process each, as
    on two machines: the second has another folder, and no runs in it bare       two processes without an
    agent, so that each one's exit code and errors can be seen
    """

    def __init__(self, work: Path, env: dict[str, str], launch: str = "torchrun"):
        self.work, self.run, self.launch = work.resolve(), work.resolve() / "runs" / env["RUN_ID"], launch
        log = self.run / "train.log"
        found = log.stat() if log.exists() else None
        self.old_log, self.seen = (found.st_ino, found.st_size) if found else (None, 0)
        base, trainer = {"OMP_NUM_THREADS": "1", **inherited(), **env}, str(ROOT / "train_gpt.py")
        torchrun, port = ["-m", "torch.distributed.run"], free_port()
        meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=faults"]
        own = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
        starts = {
            "alone": [([], {})],
            "torchrun": [([*torchrun, "--standalone", "--nproc_per_node=2"], {})],
            "agents": [([*torchrun, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={n}", *meeting], {})
                       for n in (0, 1)],
            "bare": [([], dict(own, RANK=str(n), LOCAL_RANK=str(n))) for n in (0, 1)],
        }[launch]  # fmt: skip

        def begin() -> None:
            # which a shell's background jobs ignore, and so would the run
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.started, self.outputs = [], []
        for number, (arguments, more) in enumerate(starts):
            place = self.work / "machine 2" if launch == "agents" and number else self.work
            place.mkdir(exist_ok=True)
            self.outputs.append(self.work / f"output_{time.monotonic_ns()}.txt")
            with open(self.outputs[-1], "wb") as output:
                self.started.append(subprocess.Popen(
                    [sys.executable, *arguments, trainer], env={**base, **more}, cwd=place, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=begin,
                ))  # fmt: skip

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.outputs)

    def log(self) -> str:
        """What this job added to train.log."""
        try:
            with (self.run / "train.log").open("rb") as file:
                is_old = os.fstat(file.fileno()).st_ino == self.old_log  # a run without a step gets a new one
                file.seek(self.seen if is_old else 0)
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def rank(self, rank: int) -> int | None:
        """The process of a rank, once it is there; None where the job ended before."""
        if self.launch == "alone":
            return self.started[0].pid
        while not self.over():
            for pid in processes_in(self.work):
                if rank_of(pid) == rank:
                    return pid
            time.sleep(0.001)
        return None

    def over(self) -> bool:
        return all(process.poll() is not None for process in self.started)

    def wait_for(
        self, moment: Callable[[set[str], str], bool], act: Callable[[], None] = lambda: None
    ) -> bool:
        """Wait until MOMENT(files touched since the last look,
        log of this job), and ACT; False: the job ended before.

        To close a watch takes longer than to write a checkpoint.
        """
        deadline = time.monotonic() + STARTS
        while not self.run.is_dir():
            if self.over():
                return False
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.001)
        watch, touched = Watch(self.run), set()
        try:
            while not moment(touched, self.log() if not touched or "train.log" in touched else ""):
                if self.over():
                    return False
                assert time.monotonic() < deadline, self.output()
                touched = watch.names(0.2)
            act()
        finally:
            watch.close()
        return True

    def pids(self, whom: str) -> list[int]:
        """Process ids of `rank N`, `agent` (the first), `second agent`, or `all` (a machine loses power)."""
        if whom == "all":
            return processes_in(self.work)
        if whom.startswith("rank"):
            pid = self.rank(int(whom.split()[1]))
            return [] if pid is None else [pid]
        return [self.started[-1 if whom == "second agent" else 0].pid]

    def kill(self, whom: str | list[int], how: signal.Signals) -> None:
        """Signal `whom`: as for `pids`, or what `pids` returned, which saves the search for processes."""
        for pid in self.pids(whom) if isinstance(whom, str) else whom:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(pid, how)

    def wait(self, seconds: float = ENDS) -> list[int]:
        """Exit codes, once all processes of the job are gone; they must be within SECONDS."""
        deadline = time.monotonic() + seconds
        while processes_in(self.work) or not self.over():
            assert time.monotonic() < deadline, f"still there: {processes_in(self.work)}\n{self.output()}"
            time.sleep(0.02)
        return [process.returncode for process in self.started]

    def clean(self) -> None:
        self.kill("all", signal.SIGKILL)
        for process in self.started:
            process.wait()


@pytest.fixture
def start():
    """A function that starts a Job; whatever is left of it is killed after the test."""
    jobs = []

    def begin(*args, **kwargs) -> Job:
        jobs.append(Job(*args, **kwargs))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.clean()


# ------------------------------------------------------------------------------------------------------------
# Runs that nobody touches
# ------------------------------------------------------------------------------------------------------------

STEPS = 24
# everything that has a state of its own; ten steps of training, four of Reptile, six for deployment
LATE = dict(
    ITERATIONS="20", DATA_ORDER="shuffled", BLOCK_ORDER="0,1,2,1", LOOP_START_FRAC="0.4", WARMDOWN_ITERS="6",
    SWA_ENABLED="1", SWA_EVERY="2", SWA_THRESHOLD="0.9", LATE_QAT="1", LATE_QAT_THRESHOLD="0.5",
    CAUTIOUS_MUON="1", DECODER_LR_MULT="0.5", META_SGD_ENABLED="1", META_SGD_LR="0.1", META_TTT_ENABLED="1",
    META_TTT_OBJECTIVE="deployed", META_TTT_TIME_FRAC="0.3", META_TTT_DOCS="4", META_TTT_PIECES="3",
    REPTILE_ENABLED="1", REPTILE_TIME_FRAC="0.2", TTT_CHUNK_SIZE="32", TTT_BATCH_SEQS="4",
)  # fmt: skip
FOMAML = dict(META_TTT_ENABLED="1", META_TTT_EVERY="2", META_SGD_ENABLED="1", META_SGD_LR="0.1",
              MTP_NUM_HEADS="1", DATA_ORDER="shuffled")  # fmt: skip
KINDS = {"plain": {}, "late": LATE, "fomaml": FOMAML}


@pytest.fixture(scope="module")
def settings(demo_data, tmp_path_factory) -> dict[str, str]:
    """The smoke recipe, lighter, on a validation text of 1,000 tokens."""
    shard = tmp_path_factory.mktemp("val") / "fineweb_val_000000.bin"
    write_shard(shard, np.fromfile(demo_data / "fineweb_val_000000.bin", "<u2")[512 : 512 + 1000])
    return dict(
        RECIPE=str(ROOT / "records/recipes/smoke.env"), DATA_PATH=str(demo_data), VAL_FILES=str(shard),
        RUN_ID="run", TOKENIZER_PATH=f"{demo_data}/tokenizer.model", DEVICE="cpu", ITERATIONS=str(STEPS),
        VAL_LOSS_EVERY="8", GPTQ_CALIB_BATCHES="2", GPTQ_GRAD_BATCHES="2", RESUME="auto",
        CHECKPOINT_EVERY="3",
    )  # fmt: skip


class Outcome(NamedTuple):
    """What must not depend on what happened on the way."""

    rows: list[tuple]
    weights: dict[str, torch.Tensor]
    artifact: bytes
    scores: list[float]
    result: dict


def outcome(run: Path) -> Outcome:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [(row["step"], row.get("train_loss"), row.get("val_loss"), row.get("lr_scale")) for row in rows]
    result = json.loads((run / "result.json").read_text())
    scores = [result[f"val_{what}_{which}"] for what in ("loss", "bpb") for which in ("roundtrip", "sliding")]
    weights = torch.load(run / "final_model.pt", weights_only=True)
    return Outcome(rows, weights, (run / "final_model.int6.ptz").read_bytes(), scores, result)


def assert_same(got: Outcome, expected: Outcome) -> None:
    assert got.rows == expected.rows
    assert list(got.weights) == list(expected.weights)
    for name, tensor in expected.weights.items():
        assert torch.equal(got.weights[name], tensor), name
    assert got.artifact == expected.artifact and got.scores == expected.scores
    for key in ("steps", "late_steps", "meta_rates", "world_size", "sha256_artifact", "bytes_model"):
        assert got.result[key] == expected.result[key], key


@pytest.fixture(scope="module")
def untouched(settings, tmp_path_factory):
    """A function that returns the Outcome of a run without checkpoints and without faults;
    each is trained once."""
    kept: dict[tuple[str, bool], Outcome] = {}

    def train(kind: str = "plain", alone: bool = False) -> Outcome:
        if (kind, alone) not in kept:
            work = tmp_path_factory.mktemp("untouched")
            env = {**settings, **KINDS[kind], "RESUME": "never", "CHECKPOINT_EVERY": "0"}
            if alone:
                train_here(env, work)
            else:
                job = Job(work, env)
                try:
                    assert job.wait(300) == [0], job.output()
                finally:
                    job.clean()
            kept[kind, alone] = outcome(work / "runs/run")
        return kept[kind, alone]

    return train


# ------------------------------------------------------------------------------------------------------------
# Kills
# ------------------------------------------------------------------------------------------------------------


def step_begun(step: int) -> Callable[[set[str], str], bool]:
    return logged(rf"^step:{step}/\d+ train_loss")


def logged(pattern: str) -> Callable[[set[str], str], bool]:
    found = re.compile(pattern, re.M)
    return lambda touched, log: bool(found.search(log))


def writing(name: str) -> Callable[[set[str], str], bool]:
    def moment(touched: set[str], log: str) -> bool:
        return name not in touched and any(
            re.fullmatch(rf"{re.escape(name)}\.\w+\.tmp", file) for file in touched
        )

    return moment  # begun, and not renamed yet


def started() -> Callable[[set[str], str], bool]:
    return lambda touched, log: True


MOMENTS = {
    "start": started,  # the run folder has just been made
    "warm-up": partial(logged, r"^model_params"),
    "first step": partial(logged, r"^gptq:reserving"),
    "checkpoint": partial(writing, "checkpoint.pt"),
    "reptile": partial(logged, r"^reptile_step:2/"),
    "deployed": partial(logged, r"^deployed_step:3/"),
    "statistics": partial(logged, r"^average: |^resumed: phase:after train"),
    "weights": partial(writing, "final_model.pt"),
    "artifact": partial(writing, "final_model.int6.ptz"),
    "scoring": partial(logged, r"^Total submission size"),
    "second score": partial(logged, r"^final_int6_roundtrip_exact"),
    "result": partial(writing, "result.json"),
}


class Kill(NamedTuple):
    """At a moment (`step`: a random one) and up to DELAY seconds later, a signal to somebody.

    The job that is hit has CHECKPOINT_EVERY=`every`, where that is given.
    """

    at: str
    whom: str
    how: signal.Signals = signal.SIGKILL
    delay: float = 0.0
    every: str | None = None


def check_files(run: Path, expected: Outcome) -> None:
    """What stands under a final name is whole, and is what it would have been."""
    for file in run.glob("*.json"):
        json.loads(file.read_text())
    if (run / "checkpoint.pt").exists():
        checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
        assert checkpoint["step"] >= 0 and "phase" in checkpoint
    if (run / "final_model.pt").exists():
        weights = torch.load(run / "final_model.pt", weights_only=True)
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.weights.items())
    if (run / "final_model.int6.ptz").exists():
        assert (run / "final_model.int6.ptz").read_bytes() == expected.artifact
        train_gpt.read_artifact(run / "final_model.int6.ptz")
    for line in (
        (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").exists() else []
    ):
        json.loads(line)


def resumed_steps(log: str) -> list[int]:
    return [
        int(n) for n in re.findall(r"^resumed: phase:.+ step:(\d+) world_size:\d+ \(was \d+\)$", log, re.M)
    ]


def strike(job: Job, kill: Kill, dice: random.Random, done: int, more: int = 0) -> bool:
    """Wait for the moment, kill, wait for the end; True where the job was still running when it was hit.

    DONE steps lie behind it, and MORE kills come after this one: they need steps too.
    """
    if kill.at == "step":
        moment = step_begun(dice.randint(done + 1, max(done + 1, STEPS - 4 - 7 * more)))
    else:
        moment = MOMENTS[kill.at]()
    whom: str | list[int] = kill.whom
    if kill.at in ("checkpoint", "weights", "artifact", "result") and job.wait_for(MOMENTS["first step"]()):
        whom = job.pids(kill.whom)

    def act() -> None:
        time.sleep(dice.uniform(0, kill.delay))
        job.kill(whom, kill.how)

    job.wait_for(moment, act)
    job.wait()
    return not (job.run / "result.json").exists()


def survive(
    start, work: Path, env: dict[str, str], kills: list[Kill], seed: int, expected: Outcome, launch: str
):
    """Run under KILLS, then to the end.

    Returns how often a kill hit a running job, the files
    that were cut short under a temporary name, and the log.
    """
    dice, hits, done, cut = random.Random(seed), 0, 0, set()
    for number, kill in enumerate(kills, 1):
        every = kill.every or env["CHECKPOINT_EVERY"]
        job = start(work, {**env, "CHECKPOINT_EVERY": every}, launch)
        hits += strike(job, kill, dice, done, len(kills) - number)
        check_files(job.run, expected)
        cut |= {file.with_suffix("").stem for file in job.run.glob("*.tmp")}
        found = re.findall(r"^stopped: (\S+) after step:(\d+)\b", job.log(), re.M)
        if found:  # an orderly stop loses nothing
            assert len(found) == 1
            done = int(found[0][1])
            assert torch.load(job.run / "checkpoint.pt", weights_only=True)["step"] == done
        elif (job.run / "checkpoint.pt").exists():
            done = torch.load(job.run / "checkpoint.pt", weights_only=True)["step"]
        last = [int(n) for n in re.findall(r"^step:(\d+)/\d+ train_loss", job.log(), re.M)]
        if last and not found and every != "0" and not (job.run / "result.json").exists():
            assert done >= last[-1] - int(every), "more was lost than since the last checkpoint"
    job = start(work, env, launch)
    assert set(job.wait(300)) == {0}, job.output()
    got, log = outcome(job.run), (job.run / "train.log").read_text()
    assert_same(got, expected)
    resumed = resumed_steps(log)  # those that came to a checkpoint, and the last
    assert (
        sorted(set(got.result["resumed"])) == sorted(set(resumed))
        and got.result["resumed"][-1:] == resumed[-1:]
    )
    left = {
        file.name for file in job.run.iterdir() if file.suffix == ".tmp" or file.name.startswith("checkpoint")
    }
    assert not left, left
    return hits, cut, log


TERM, INT = signal.SIGTERM, signal.SIGINT
FIRST = [Kill("step", "rank 1", delay=0.1), Kill("step", "agent", TERM, 0.1, "0"),
         Kill("step", "agent", delay=0.1, every="0")]  # fmt: skip


def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(start, settings, untouched, tmp_path):
    """SIGKILL of a rank, SIGTERM to the agent, SIGKILL of the agent, one after the other.

    Without periodic checkpoints a stop in good order, also that of workers without an agent, loses no step.
    """
    hits, _, log = survive(start, tmp_path, settings, FIRST, 10, untouched(), "torchrun")
    stops, resumed = re.findall(r"^stopped: (\S+) after step:(\d+)\b", log, re.M), resumed_steps(log)
    assert hits == len(resumed) == 3 and resumed[0] % int(settings["CHECKPOINT_EVERY"]) == 0
    assert [int(step) for _, step in stops] == resumed[1:] and stops[0][0] == "SIGTERM"


SLOW = {
    "rank 0 mid-step": [Kill("step", "rank 0", delay=0.1)],
    "rank 1 mid-step": [Kill("step", "rank 1", delay=0.1)],
    "both ranks and the agent": [Kill("step", "all", delay=0.1)],
    "SIGTERM to rank 0": [Kill("step", "rank 0", TERM, 0.1)],
    "SIGTERM to rank 1": [Kill("step", "rank 1", TERM, 0.1)],
    "SIGINT to the agent": [Kill("step", "agent", INT, 0.1)],
    "agent, three times": [Kill("step", "agent", delay=0.1)] * 3,
    "one after the other": [Kill("step", "rank 1"), Kill("step", "agent", TERM), Kill("step", "all")],
    "at the start": [
        Kill("start", "all"),
        Kill("start", "all", delay=3.0),
        Kill("start", "rank 0", delay=1.0),
    ],
    "in the warm-up": [Kill("warm-up", "all", delay=0.3), Kill("warm-up", "rank 1", delay=0.3)],
    "in the warm-up, SIGTERM": [Kill("warm-up", "agent", TERM, 0.3), Kill("warm-up", "rank 0", TERM, 0.3)],
    "before the first checkpoint": [
        Kill("first step", "rank 0", delay=0.1),
        Kill("first step", "all", delay=0.1),
    ],
    "in the statistics": [Kill("statistics", "all", delay=0.05), Kill("statistics", "rank 1", delay=0.05)],
    "in the statistics, SIGTERM": [Kill("statistics", "agent", TERM, 0.05)],
    "while the weights are written": [Kill("weights", "rank 0"), Kill("weights", "all")],
    "while the artifact is written": [Kill("artifact", "rank 0"), Kill("artifact", "all")],
    "while the artifact is made": [
        Kill("weights", "rank 0", delay=0.05),
        Kill("weights", "agent", TERM, 0.05),
    ],
    "while it is scored": [Kill("scoring", "rank 0", delay=0.1), Kill("scoring", "rank 1", delay=0.1)],
    "while it is scored, SIGTERM": [Kill("scoring", "agent", TERM, 0.1), Kill("second score", "agent", TERM)],
    "while the result is written": [Kill("result", "rank 0"), Kill("result", "all")],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_kills_at_any_moment(start, settings, untouched, tmp_path, name):
    kills, expected = SLOW[name], untouched()
    hits, cut, log = survive(
        start, tmp_path, settings, kills, 100 + list(SLOW).index(name), expected, "torchrun"
    )
    assert hits == len(kills) or kills[0].at == "result"  # which is written in an instant
    if name == "while the weights are written":
        assert cut == {"final_model.pt"}
    trained = [int(n) for n in re.findall(r"^step:(\d+)/\d+ train_loss", log, re.M)]
    if kills[0].at in ("statistics", "weights", "artifact", "scoring", "second score", "result"):
        assert trained == list(range(1, STEPS + 1)), "an export that is repeated repeats no training"
        assert set(resumed_steps(log)) == ({STEPS} if hits else set())
    if kills[0].at in ("start", "warm-up", "first step"):
        assert not [n for n in resumed_steps(log) if n >= 6]


@pytest.mark.slow
@pytest.mark.parametrize("whom, how", [("rank 0", signal.SIGKILL), ("agent", TERM), ("agent", signal.SIGKILL),
                                       ("all", signal.SIGKILL)])  # fmt: skip
def test_kills_while_a_checkpoint_is_written(start, settings, untouched, tmp_path, whom, how):
    """The file under its temporary name shows that the moment was hit;
    the one before it is whole and is used."""
    env, dice, halves = {**settings, "CHECKPOINT_EVERY": "1"}, random.Random(7), 0
    for _ in range(4):
        job, whole, part = start(tmp_path, env), [dice.randint(2, 4)], [dice.randint(1, 8)]

        def nth(touched: set[str], log: str, whole=whole, part=part) -> bool:
            whole[0] -= "checkpoint.pt" in touched  # renamed
            part[0] -= whole[0] <= 0 and writing("checkpoint.pt")(touched, log)
            return part[0] <= 0

        assert job.wait_for(MOMENTS["first step"]())
        pids = job.pids(whom)
        assert job.wait_for(nth, partial(job.kill, pids, how))
        job.wait()
        check_files(job.run, untouched())
        assert (job.run / "checkpoint.pt").exists()
        halves += bool(list(job.run.glob("checkpoint.pt.*.tmp")))
    if how == signal.SIGKILL and whom != "agent":
        assert halves >= 2
    assert start(tmp_path, env).wait(300) == [0]
    assert_same(outcome(tmp_path / "runs/run"), untouched())
    assert not list((tmp_path / "runs/run").glob("*.tmp"))
    resumed = resumed_steps((tmp_path / "runs/run/train.log").read_text())
    assert len(resumed) == 4 and resumed == sorted(resumed) and resumed[0] >= 1


STATES = {
    "late, in training": ("late", [Kill("step", "rank 0", delay=0.1)]),
    "late, in Reptile": ("late", [Kill("reptile", "rank 1", delay=0.05), Kill("reptile", "agent", TERM)]),
    "late, for deployment": ("late", [Kill("deployed", "rank 0", delay=0.05), Kill("deployed", "agent")]),
    "late, checkpoint after checkpoint": ("late", [Kill("checkpoint", "all", delay=0.5)] * 5),
    "late, export": ("late", [Kill("artifact", "all")]),
    "fomaml": ("fomaml", [Kill("step", "rank 1", delay=0.1), Kill("step", "agent", TERM, 0.1)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_every_kind_of_state_comes_back(start, settings, untouched, tmp_path, name):
    """Averages, snapshots, factors, generators, a later loop and rounding, in every phase."""
    kind, kills = STATES[name]
    env = {**settings, **KINDS[kind], "CHECKPOINT_EVERY": "2"}
    if kills[0].at == "step" and kind == "late":
        env["CHECKPOINT_EVERY"] = "1"
    expected, dice = untouched(kind), random.Random(300 + list(STATES).index(name))
    for kill in kills:
        job = start(tmp_path, env)
        moment = step_begun(dice.randint(3, 8)) if kill.at == "step" and kind == "late" else None
        if moment is not None:
            assert job.wait_for(moment)
            job.kill(kill.whom, kill.how)
            job.wait()
        else:
            strike(job, kill, dice, 0 if not job.run.exists() else 8)
        check_files(job.run, expected)
    job = start(tmp_path, env)
    assert job.wait(300) == [0], job.output()
    assert_same(outcome(job.run), expected)
    assert resumed_steps((job.run / "train.log").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "whom, how", [("second agent", signal.SIGKILL), ("agent", TERM), ("rank 1", signal.SIGKILL)]
)
def test_two_agents_of_which_one_is_killed(start, settings, untouched, tmp_path, whom, how):
    hits, _, _ = survive(start, tmp_path, settings, [Kill("step", whom, how, 0.1)], 11, untouched(), "agents")
    assert hits == 1 and not list((tmp_path / "machine 2").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_storms(start, settings, untouched, tmp_path, seed):
    """Six kills of anything at any moment, then peace."""
    dice, kills = random.Random(1000 + seed), []
    for _ in range(6):
        at = dice.choice(["step", "step", "step", "checkpoint", "warm-up", "first step"])
        whom = dice.choice(["rank 0", "rank 1", "agent", "all"])
        kills.append(Kill(at, whom, dice.choice([signal.SIGKILL, TERM]), dice.choice([0.0, 0.02, 0.2])))
    survive(start, tmp_path, settings, kills, 2000 + seed, untouched(), "torchrun")


# ------------------------------------------------------------------------------------------------------------
# One process
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how, code", [(TERM, 143), (INT, 130)])
def test_a_process_that_is_asked_to_stop(start, settings, untouched, tmp_path, how, code):
    job = start(tmp_path, {**settings, "CHECKPOINT_EVERY": "0"}, "alone")
    assert job.wait_for(step_begun(5))
    job.kill("rank 0", how)
    assert job.wait() == [code], job.output()
    (name, step), = re.findall(r"^stopped: (\S+) after step:(\d+)\b", job.log(), re.M)  # fmt: skip
    assert name == how.name and "Traceback" not in job.output()
    checkpoint = torch.load(job.run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == int(step) >= 5
    assert start(tmp_path, settings, "alone").wait(300) == [0]
    assert_same(outcome(job.run), untouched(alone=True))
    assert resumed_steps((job.run / "train.log").read_text()) == [int(step)]


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["alone", "torchrun"])
def test_a_signal_in_the_last_validation_is_not_forgotten(start, settings, demo_data, tmp_path, launch):
    """No step comes after it, and training is not over:
    the run stops, or the agent would kill it in its export."""
    env = {**settings, "VAL_FILES": f"{demo_data}/fineweb_val_000000.bin", "CHECKPOINT_EVERY": "0"}
    job = start(tmp_path, env, launch)
    assert job.wait_for(step_begun(STEPS))
    job.kill("agent", TERM)
    codes = job.wait()
    assert (
        not (job.run / "result.json").exists()
        and codes == ([143] if launch == "alone" else codes)
        and codes != [0]
    )
    assert f"stopped: SIGTERM after step:{STEPS}" in job.log() and "final_int6" not in job.log()
    job = start(tmp_path, env, launch)
    assert job.wait(300) == [0] and resumed_steps(job.log()) == [STEPS]
    assert "train_loss" not in job.log()


@pytest.mark.slow
def test_the_clock_goes_on_where_it_was(start, settings, tmp_path):
    """Under MAX_WALLCLOCK_SECONDS the seconds before the stop count, those between do not."""
    env = {**settings, "MAX_WALLCLOCK_SECONDS": "4", "ITERATIONS": "1000000", "VAL_LOSS_EVERY": "0"}
    job = start(tmp_path, env, "alone")
    assert job.wait_for(step_begun(30))
    job.kill("rank 0", TERM)
    assert job.wait() == [143]
    before = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()][-1]
    assert 0.2 < before["seconds"] < 3.5
    time.sleep(4)
    job = start(tmp_path, env, "alone")
    assert job.wait(300) == [0], job.output()
    rows = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(rows))
    result = json.loads((job.run / "result.json").read_text())
    assert result["train_seconds"] < 4.3 and rows[-1]["seconds"] > 3 and rows[before["step"]]["seconds"] < 3.9
    assert result["strict_seconds"] > result["train_seconds"] and result["steps"] == len(rows)


@pytest.mark.slow
def test_two_thousand_steps_keep_memory_and_open_files_flat(tmp_path):
    command = [sys.executable, str(ROOT / "tests/benchmarks/scaling.py"), "--soak", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    soak = json.loads(done.stdout.splitlines()[-1].removeprefix("BENCH "))["soak"]
    assert soak["flat"] is True and soak["steps"] == 2000 and soak["grown_mib"] < 1


def test_a_signal_to_one_rank_stops_both_after_the_same_step(start, settings, tmp_path):
    """Without an agent that would pass it on."""
    job = start(tmp_path, {**settings, "CHECKPOINT_EVERY": "0"}, "bare")
    assert job.wait_for(step_begun(3))
    job.kill("rank 1", TERM)
    assert job.wait() == [143, 143], job.output()
    stops = re.findall(r"^stopped: SIGTERM after step:(\d+)\b", job.log(), re.M)
    assert len(stops) == 1
    assert torch.load(job.run / "checkpoint.pt", weights_only=True)["step"] == int(stops[0]) >= 3


# ------------------------------------------------------------------------------------------------------------
# A disk that is full
# ------------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def longest_file(size: int):
    """A write beyond `size` bytes fails with EFBIG: Python ignores the signal that would kill."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full(settings, stopped, untouched, tmp_path, capsys):
    """RLIMIT_FSIZE makes the writes fail: first those of checkpoints,
    which are longer, alone, then the export's too.

    The checkpoint that is there outlives both, and from it the run comes to its end.
    """
    run = copy_of(stopped, tmp_path)
    checkpoint, log, old = run / "checkpoint.pt", run / "train.log", (run / "train.log").stat().st_size
    before, size = sha256(checkpoint), checkpoint.stat().st_size
    model = sum(4 * p.numel() for p in untouched(alone=True).weights.values())
    assert model + 50_000 < size / 2
    capsys.readouterr()
    with longest_file(model // 2):
        train_here(settings, tmp_path, 1)
    error, added = capsys.readouterr().err, log.read_text()[old:]
    assert re.search(r"^error: ", error, re.M) and "Traceback" not in error
    assert re.search(r"^WARNING: no checkpoint: ", added, re.M)
    assert f"step:{STEPS}/{STEPS} train_loss" in added
    assert sha256(checkpoint) == before
    assert not [
        name for name in ("final_model.pt", "final_model.int6.ptz", "result.json") if (run / name).exists()
    ]
    assert not list(run.glob("*.tmp"))
    old = log.stat().st_size
    with longest_file((model + 50_000 + size) // 2):
        train_here(settings, tmp_path)
    assert re.search(r"^WARNING: no checkpoint: ", log.read_text()[old:], re.M)
    assert_same(outcome(run), untouched(alone=True))


# ------------------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory) -> Path:
    """The working folder of a run of one process that was stopped after some steps."""
    work = tmp_path_factory.mktemp("stopped")
    job = Job(work, settings, "alone")
    try:
        assert job.wait_for(step_begun(5))
        job.kill("rank 0", TERM)
        assert job.wait() == [143], job.output()
    finally:
        job.clean()
    return work


def copy_of(stopped: Path, work: Path) -> Path:
    """A copy that may be spoiled."""
    subprocess.run(["cp", "-r", f"{stopped}/runs", str(work)], check=True)
    return work / "runs/run"


REFUSED = {
    "another rate": (dict(MATRIX_LR="0.011"), ["MATRIX_LR", "0.011"]),
    "two other settings": (dict(SEED="5", TRAIN_SEQ_LEN="32"), ["SEED", "TRAIN_SEQ_LEN"]),
    "fewer steps": (dict(ITERATIONS="23"), ["ITERATIONS", "23", "24"]),
    "another order": (dict(DATA_ORDER="shuffled"), ["DATA_ORDER"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_settings_are_refused(settings, stopped, tmp_path, monkeypatch, capsys, name):
    changes, words = REFUSED[name]
    run = copy_of(stopped, tmp_path)
    before = {file.name: sha256(file) for file in run.iterdir() if file.is_file()}
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "other.env"  # with the same settings
    recipe.write_text(Path(settings["RECIPE"]).read_text() + "# changed\n")
    source = snapshot(run / "source")
    assert train_gpt.main([], {**settings, **changes, "RECIPE": str(recipe)}) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert "GRAD_CLIP_NORM" not in error
    after = {file.name: sha256(file) for file in run.iterdir() if file.is_file()}
    assert after | {"train.log": before["train.log"]} == before and snapshot(run / "source") == source


def test_other_data_are_refused(settings, stopped, tmp_path, monkeypatch, capsys, demo_data):
    """As many tokens in as many shards, but one token is another."""
    run, data = copy_of(stopped, tmp_path), tmp_path / "data"
    data.mkdir()
    for shard in sorted(demo_data.glob("fineweb_train_*.bin")):
        (data / shard.name).write_bytes(shard.read_bytes())
    first = min(data.iterdir())
    tokens = np.fromfile(first, "<u2")
    tokens[600] = tokens[600] % 1000 + 3
    tokens.tofile(first)
    monkeypatch.chdir(tmp_path)
    before = sha256(run / "checkpoint.pt")
    assert train_gpt.main([], {**settings, "TRAIN_FILES": f"{data}/fineweb_train_*.bin"}) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and ("TRAIN_FILES" in error or "data" in error)
    assert sha256(run / "checkpoint.pt") == before


def test_another_tokenizer_is_refused(settings, stopped, tmp_path, monkeypatch, capsys):
    """The same pieces, another file: what its ids stand for is not compared, its bytes are."""
    copy_of(stopped, tmp_path)
    monkeypatch.chdir(tmp_path)
    blob = Path(settings["TOKENIZER_PATH"]).read_bytes()
    # an unknown field of protobuf, which is skipped
    (tmp_path / "other.model").write_bytes(blob + b"\xda\x06\x00")
    given = {**settings, "TOKENIZER_PATH": "other.model", "DATA_PATH": "data"}
    (tmp_path / "data").mkdir()
    for shard in Path(settings["DATA_PATH"]).glob("fineweb_train_*.bin"):
        (tmp_path / "data" / shard.name).symlink_to(shard)
    assert train_gpt.main([], given) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_moved_data_and_what_comes_after_training_may_differ(
    settings, stopped, untouched, tmp_path, monkeypatch
):
    """Contents are compared, not names.
    The weights are those of a run that nobody touched; the log has each change."""
    run = copy_of(stopped, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").mkdir()
    for shard in sorted(Path(settings["DATA_PATH"]).glob("fineweb_train_*.bin")):
        (tmp_path / "moved" / f"part_{shard.name}").write_bytes(shard.read_bytes())
    (tmp_path / "t.model").write_bytes(Path(settings["TOKENIZER_PATH"]).read_bytes())
    (tmp_path / "v.bin").write_bytes(Path(settings["VAL_FILES"]).read_bytes())
    changes = dict(TRAIN_FILES="moved/part_*.bin", TOKENIZER_PATH="t.model", VAL_FILES="v.bin",
                   EVAL_BATCH_SEQS="3", ATTENTION="sdpa", USE_COMPILE="0", COMPRESSOR="ans",
                   EVAL_STRIDE="16")  # fmt: skip
    assert train_gpt.main([], settings | changes) == 0
    log = (run / "train.log").read_text()
    for name, value in changes.items():
        assert re.search(rf"^note: {name}={re.escape(value)}, before the checkpoint ", log, re.M), name
    weights, expected = torch.load(run / "final_model.pt", weights_only=True), untouched(alone=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.weights.items())
    assert json.loads((run / "result.json").read_text())["val_bpb_roundtrip"] == pytest.approx(
        expected.scores[2], rel=1e-6
    )


SCORES = dict.fromkeys("val_loss_roundtrip val_bpb_roundtrip val_loss_sliding val_bpb_sliding".split(), 1.0)
RESULTS = {
    "cut": '{"fits": tr',
    "empty": "",
    "fits alone": '{"fits": true}',
    "no number": json.dumps(SCORES | dict(fits=True, val_bpb_sliding="1")),
    "not finite": json.dumps(SCORES | dict(fits=True, val_bpb_sliding=math.nan)),
    "of another artifact": json.dumps(SCORES | dict(fits=True, sha256_artifact="0")),
    "a list": "[]",
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_that_is_none_is_named_and_nothing_is_trained_over_it(
    settings, stopped, tmp_path, monkeypatch, capsys, name
):
    run = copy_of(stopped, tmp_path)
    (run / "result.json").write_text(RESULTS[name])
    before = sha256(run / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main([], settings) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "result.json" in error
    assert sha256(run / "checkpoint.pt") == before


def test_a_run_that_failed_before_its_first_step_leaves_its_name(settings, tmp_path, monkeypatch, capsys):
    """What it logged becomes failed.log; a folder with anything else in it is left alone."""
    monkeypatch.chdir(tmp_path)
    given = {**settings, "RESUME": "never", "CHECKPOINT_EVERY": "0"}
    (tmp_path / "runs/run/source").mkdir(parents=True)
    for name in ("train.log", "config.json", "train.log.0123456789abcdef.tmp", "mine.tmp"):
        (tmp_path / "runs/run" / name).write_text("model_params:1\n")
    (tmp_path / "runs/run/metrics.jsonl").write_text('{"step": 0, "seconds": 0.0, "val_loss": 6.9}\n')
    before = snapshot(tmp_path)
    assert train_gpt.main([], given) == 2 and "mine.tmp" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    (tmp_path / "runs/run/mine.tmp").unlink()
    assert train_gpt.main([], {**given, "ITERATIONS": "1"}) == 0
    assert "model_params:1\n" not in (tmp_path / "runs/run/train.log").read_text()
    assert (tmp_path / "runs/run/failed.log").read_text() == "model_params:1\n"
    assert not list((tmp_path / "runs/run").glob("*.tmp"))


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl", "source"])
def test_a_link_out_of_the_run_folder_is_not_followed(settings, stopped, tmp_path, monkeypatch, capsys, name):
    run, target = copy_of(stopped, tmp_path), tmp_path / "target"
    if name == "source":
        target.mkdir()
        (run / "source").rename(run / "old")
    else:
        target.write_text("precious")
        (run / name).unlink()
    (run / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main([], settings) == 2
    assert f"{name} is a link" in capsys.readouterr().err
    assert target.read_text() == "precious" if target.is_file() else not list(target.iterdir())


def test_a_write_goes_through_no_link(tmp_path):
    """Neither of the final name nor of any name that could be guessed;
    a link under the final name is replaced."""
    precious, path = tmp_path / "precious", tmp_path / "x.json"
    precious.write_text("precious")
    for name in ("x.json", "x.json.tmp"):
        (tmp_path / name).symlink_to(precious)
    train_gpt.write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and not path.is_symlink() and precious.read_text() == "precious"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ------------------------------------------------------------------------------------------------------------
# What comes after training
# ------------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Stands in for a signal that ends the process where it is."""


@pytest.mark.parametrize("at", ["read_statistics", "quant_specs", "score_artifact"])
def test_training_that_is_done_is_kept_whatever_comes_after(settings, untouched, tmp_path, monkeypatch, at):
    """Without periodic checkpoints too: the same command continues with what is left and retrains nothing."""
    monkeypatch.chdir(tmp_path)
    given = {**settings, "CHECKPOINT_EVERY": "0"}

    def broken(*_, **__):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, at, broken)
        with pytest.raises(Interrupted):
            train_gpt.main([], given)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "train_step", broken)
        patch.setattr(train_gpt, "warm_up", lambda *_: 0.0)  # which takes steps too, and undoes them
        assert train_gpt.main([], given) == 0
    assert_same(outcome(tmp_path / "runs/run"), untouched(alone=True))
    assert outcome(tmp_path / "runs/run").result["resumed"] == [STEPS]


@pytest.mark.parametrize("at", ["warm_up", "read_statistics", "score_artifact"])
def test_an_interrupt_outside_of_training_is_one_line(settings, tmp_path, monkeypatch, capsys, at):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, at, interrupted)
    assert train_gpt.main([], {**settings, "ITERATIONS": "1", "CHECKPOINT_EVERY": "0"}) == 130
    assert capsys.readouterr().err.splitlines() == ["stopped: SIGINT"]
    assert (tmp_path / "runs/run/checkpoint.pt").exists() == (at != "warm_up")


NOT_FINITE = {  # by where the first value that is none turns up
    "Hessians: ": dict(MATRIX_LR="1e38"),
    "gradients: ": dict(MATRIX_LR="1e38", GPTQ_CALIB_BATCHES="0"),
    "after step 1: mlp_up_bank ": dict(GPTQ_CALIB_BATCHES="0", QUANT_STEPS="sigmas"),
}


@pytest.mark.parametrize("where", NOT_FINITE)
def test_what_is_not_finite_after_the_last_step_ends_the_run(settings, tmp_path, monkeypatch, capsys, where):
    """No later step would see it: without this the quantizer never ends,
    or rounds it to numbers that are scored."""
    monkeypatch.chdir(tmp_path)
    if "bank" in where:
        finish = train_gpt.Progress.finish

        def spoiled(self, step: int) -> None:
            self.model.mlp_up_bank.data[1, 2, 3] = math.inf
            finish(self, step)

        monkeypatch.setattr(train_gpt.Progress, "finish", spoiled)
    given = {**settings, "ITERATIONS": "1", "VAL_LOSS_EVERY": "0", **NOT_FINITE[where]}
    assert train_gpt.main([], given) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {where}") and "not finite" in error and error.count("\n") == 1
    assert not (tmp_path / "runs/run/result.json").exists()


RANKS = {
    "rank too high": (
        dict(WORLD_SIZE="2", RANK="5", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"),
        "RANK=5 of WORLD_SIZE=2",
    ),
    "one process, rank 3": (dict(WORLD_SIZE="1", RANK="3"), "RANK=3 of WORLD_SIZE=1"),
    "no process": (dict(WORLD_SIZE="0"), "WORLD_SIZE='0'"),
    "negative": (dict(WORLD_SIZE="-1"), "WORLD_SIZE='-1'"),
    "no rank": (dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"), "without RANK"),
    "no address": (dict(WORLD_SIZE="2", RANK="0"), "without MASTER_ADDR, MASTER_PORT"),
    "no number": (dict(WORLD_SIZE="x"), "WORLD_SIZE='x'"),
    "empty": (dict(WORLD_SIZE=""), "WORLD_SIZE=''"),
    "no local rank": (dict(LOCAL_RANK=""), "LOCAL_RANK=''"),
}


@pytest.mark.parametrize("name", RANKS)
def test_processes_that_nobody_can_be_are_named_at_once(settings, tmp_path, monkeypatch, capsys, name):
    announced, words = RANKS[name]
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main([], settings | announced) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_folder_without_leave_to_resume_and_a_resume_without_a_name_are_refused(
    settings, stopped, tmp_path, monkeypatch, capsys
):
    copy_of(stopped, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main([], {**settings, "RESUME": "never"}) == 2
    assert "runs/run" in capsys.readouterr().err
    assert train_gpt.main([], {k: v for k, v in settings.items() if k != "RUN_ID"}) == 2
    assert "RUN_ID" in capsys.readouterr().err


DAMAGE = {
    "truncated": lambda blob: blob[: len(blob) // 2],
    "one bit": lambda blob: blob[: len(blob) // 2]
    + bytes([blob[len(blob) // 2] ^ 4])
    + blob[len(blob) // 2 + 1 :],
    "one bit of the checksum": lambda blob: blob[:-1] + bytes([blob[-1] ^ 128]),
    "without its checksum": lambda blob: blob[:-32],
    "empty": lambda blob: b"",
    "other bytes": lambda blob: b"not a checkpoint" * 100,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named(settings, stopped, tmp_path, monkeypatch, capsys, name):
    """By a fault of the disk, since we never leave one half-written:
    an error that says which file, not a new start."""
    run = copy_of(stopped, tmp_path)
    (run / "checkpoint.pt").write_bytes(DAMAGE[name]((run / "checkpoint.pt").read_bytes()))
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main([], settings) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "checkpoint.pt" in error and not (run / "result.json").exists()


def test_a_finished_run_is_reported_and_left_alone(settings, stopped, tmp_path, monkeypatch, capsys):
    """Also what may differ: how often it is logged and written, and how long the processes wait."""
    run = copy_of(stopped, tmp_path)
    torn = (run / "metrics.jsonl").read_text() + '{"step": 7, "sec'  # as a kill within the write leaves it
    (run / "metrics.jsonl").write_text(torn)
    monkeypatch.chdir(tmp_path)
    may_differ = dict(TRAIN_LOG_EVERY="2", CHECKPOINT_EVERY="5", DIST_TIMEOUT="100")
    assert train_gpt.main([], {**settings, **may_differ}) == 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    left = {"config.json", "metrics.jsonl", "final_model.pt", "final_model.int6.ptz", "result.json"}
    files = {name: sha256(run / name) for name in left}
    began, source = (run / "result.json").stat().st_mtime_ns, snapshot(run / "source")
    capsys.readouterr()
    recipe = tmp_path / "other.env"  # what was run stays beside its result, whatever is run now
    recipe.write_text(Path(settings["RECIPE"]).read_text() + "# changed\n")
    assert train_gpt.main([], {**settings, "RECIPE": str(recipe)}) == 0
    assert snapshot(run / "source") == source
    assert capsys.readouterr().out.strip()
    assert {name: sha256(run / name) for name in left} == files and not (run / "checkpoint.pt").exists()
    assert (run / "result.json").stat().st_mtime_ns == began
    result = json.loads((run / "result.json").read_text())
    result["fits"] = False
    (run / "result.json").write_text(json.dumps(result))
    assert train_gpt.main([], settings) == 1


@contextlib.contextmanager
def locked(folder: Path):
    """As a run that is still going has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@pytest.mark.slow
def test_two_jobs_do_not_share_a_folder(settings, stopped, tmp_path, start):
    """The second waits for the first to let go of the lock."""
    run = copy_of(stopped, tmp_path)
    with locked(run):
        before = sha256(run / "metrics.jsonl")
        job = start(tmp_path, settings, "alone")
        with pytest.raises(subprocess.TimeoutExpired):
            job.started[0].wait(5)  # a resumed run would have ended or at least taken steps
        assert sha256(run / "metrics.jsonl") == before and not resumed_steps(job.log())
    assert job.wait(120) == [0], job.output()
    assert resumed_steps(job.log())


@pytest.mark.slow
def test_a_folder_that_stays_locked_is_refused(settings, stopped, tmp_path, start):
    run = copy_of(stopped, tmp_path)
    with locked(run):
        before = sha256(run / "checkpoint.pt")
        job = start(tmp_path, settings, "torchrun")
        job.wait(150)
        assert re.search(r"error: .*runs/run", job.output()) and sha256(run / "checkpoint.pt") == before
        alone = start(tmp_path, settings, "alone")
        assert alone.wait(150) == [2]


@pytest.mark.slow
def test_two_jobs_that_start_together(settings, tmp_path, start, untouched):
    """One of them trains, the other one waits and reports."""
    jobs = [start(tmp_path, settings, "alone") for _ in range(2)]
    while not all(job.over() for job in jobs):
        time.sleep(0.1)
    assert [job.started[0].returncode for job in jobs] == [0, 0], [job.output() for job in jobs]
    assert_same(outcome(jobs[0].run), untouched(alone=True))
    trained = re.findall(r"^step:(\d+)/\d+ train_loss", (jobs[0].run / "train.log").read_text(), re.M)
    assert [int(n) for n in trained] == list(range(1, STEPS + 1))
