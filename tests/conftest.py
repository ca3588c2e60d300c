"""Shared by all tests: the embedded corpus, environments for small runs, and a clean process afterwards."""

import fcntl
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parent.parent
# Files of more than 40 CPU seconds. They come first, so that in the end no worker of pytest-xdist waits for another.
LONGEST = ("ranks", "graphs", "faults", "submit", "sweep", "audit", "coding", "slots", "training", "ttt_runs")
torch.set_num_threads(1)  # a second thread only waits on matrices as small as the tests'


def inherited() -> dict[str, str]:
    """Return the environment variables that a program started by a test inherits: PYTHONPATH may hold packages."""
    names = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")
    return {name: os.environ[name] for name in names if name in os.environ}


def search_path(folder: Path) -> str:
    """PYTHONPATH with `folder` before what stands there."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_ranks(function: Callable, arguments: tuple, count: int) -> None:
    """Run function(rank, *arguments) in `count` processes, and wait for them.

    They are forks of a server that has imported torch, once for all tests: an import takes 2 to 3 s. The server cannot
    import the modules of this project: Python gives it no sys.path.
    """
    multiprocessing.set_forkserver_preload(["torch._dynamo.testing", "pytest", "sentencepiece"])
    mp.start_processes(function, arguments, nprocs=count, start_method="forkserver")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


@pytest.fixture(autouse=True)
def clean_process():
    """Nothing that a test sets globally outlives it."""
    yield
    torch.set_default_dtype(torch.float32)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def demo_data() -> Path:
    """data/demo: tokenizer.model, shards and manifest.json of the embedded corpus, built where it is missing."""
    folder = ROOT / "data" / "demo"
    command = [sys.executable, "data/demo.py", "--out", str(folder)]
    with open(ROOT / "data" / "demo.py") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker of pytest-xdist builds it
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def smoke_env(demo_data) -> dict[str, str]:
    """Settings of the smoke recipe (a few seconds on a CPU) with absolute paths, so that any working folder will do."""
    return {
        "RECIPE": str(ROOT / "records/recipes/smoke.env"),
        "DATA_PATH": str(demo_data),
        "TOKENIZER_PATH": str(demo_data / "tokenizer.model"),
        "RUN_ID": "run",
    }


@pytest.fixture
def run_trainer(tmp_path):
    """A function that starts train_gpt.py as a user would, in tmp_path: run(env, *args, processes=1)."""

    def run(env: dict[str, str], *args: str, processes: int = 1) -> subprocess.CompletedProcess:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train_gpt.py"), *args]
        env = {"OMP_NUM_THREADS": "1", **inherited(), **env}
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run
