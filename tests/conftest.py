"""Shared fixtures and helpers: the demo corpus, environments for small runs, cleanup of global state."""

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
# Files that take more than 40 CPU seconds. They run first, so that at the end no pytest-xdist worker waits
# for another.
LONGEST = (
    "ranks",
    "graphs",
    "readme",
    "faults",
    "submit",
    "sweep",
    "audit",
    "coding",
    "slots",
    "training",
    "ttt_runs",
)
torch.set_num_threads(1)  # a second thread does not help on matrices as small as in the tests


def inherited() -> dict[str, str]:
    """Return the environment variables that programs started by a test inherit (PYTHONPATH may be needed)."""
    names = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")
    return {name: os.environ[name] for name in names if name in os.environ}


def search_path(folder: Path) -> str:
    """Return PYTHONPATH with `folder` prepended."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_ranks(function: Callable, arguments: tuple, count: int) -> None:
    """Run function(rank, *arguments) in `count` processes and wait for them.

    They are forked from a server that imports torch once for all tests, because an import takes 2 to 3 s. The
    server cannot import this project's modules: Python gives it no sys.path.
    """
    multiprocessing.set_forkserver_preload(["torch._dynamo.testing", "pytest", "sentencepiece"])
    mp.start_processes(function, arguments, nprocs=count, start_method="forkserver")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the longest files first."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


@pytest.fixture(autouse=True)
def clean_process():
    """Reset the global state that a test may have changed."""
    yield
    torch.set_default_dtype(torch.float32)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def demo_data() -> Path:
    """Return data/demo with tokenizer, shards and manifest.json of the demo corpus; build it if missing."""
    folder = ROOT / "data" / "demo"
    command = [sys.executable, "data/demo.py", "--out", str(folder)]
    with open(ROOT / "data" / "demo.py") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker of pytest-xdist builds it
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def smoke_env(demo_data) -> dict[str, str]:
    """Return settings of the smoke recipe (a few seconds on a CPU) with absolute paths."""
    return {
        "RECIPE": str(ROOT / "records/recipes/smoke.env"),
        "DATA_PATH": str(demo_data),
        "TOKENIZER_PATH": str(demo_data / "tokenizer.model"),
        "RUN_ID": "run",
    }


@pytest.fixture
def run_trainer(tmp_path):
    """Return a function that runs train_gpt.py as a user would, in tmp_path: run(env, *args, processes=1)."""

    def run(env: dict[str, str], *args: str, processes: int = 1) -> subprocess.CompletedProcess:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train_gpt.py"), *args]
        env = {"OMP_NUM_THREADS": "1", **inherited(), **env}
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run
