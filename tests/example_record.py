"""Build a small record from three seeds and prove that its folder stands alone.

    python tests/example_record.py [--out DIR] [--all-text]

Three seeds of smoke.env on the demo corpus are trained, evaluated and audited with the packed programs; then
records/submit.py builds the record. The folder is moved to an empty directory, where check.py must pass it as
no run of the challenge, and where the command of its README must give the score and the artifact of its first
seed again, with the folder's own two programs. Exit code 0 if all of this holds. CI runs it on the
short documents of the validation text; records/example was made by `--out records/example --all-text`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from formats import BOS_ID, HEADER_BYTES, shard_header

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (7, 42, 1337)
SHORT = 256  # tokens of a document
KEPT = dict(ITERATIONS="40")  # settings beside smoke.env's
IN_CI = dict(ITERATIONS="24", TTT_PRIOR_SEQS="4", AUDIT_TOKENS="1024")
DATA = Path("data/demo")
WHAT = """Three seeds of smoke.env on the demo corpus, to show what a record folder holds

The runs train for seconds, on docstrings of Python's standard library, so the score says nothing about the
method. `tests/example_record.py` makes such a folder, moves it away from the repository and runs its command.
"""


def start(*words: str | Path, cwd: Path, **environ: str) -> str:
    """Run a command with a bare environment; return its output, or exit with it if it fails."""
    bare = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=bare | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        sys.exit(f"{text}\nerror: {' '.join(map(str, words))}: exit code {done.returncode}")
    return text


def python(*words: str | Path, cwd: Path, **environ: str) -> str:
    return start(sys.executable, *words, cwd=cwd, **environ)


def cpu_seconds() -> float:
    """Return the CPU seconds of all commands so far."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@contextmanager
def timed(what: str) -> Iterator[None]:
    began, spent = time.perf_counter(), cpu_seconds()
    yield
    print(f"{time.perf_counter() - began:6.1f} s, CPU {cpu_seconds() - spent:5.1f} s: {what}", flush=True)


def copy_data(folder: Path, all_text: bool) -> None:
    """Copy the demo corpus to `folder`, unless `all_text` with only the short documents for validation."""
    if not (ROOT / DATA / "manifest.json").exists():
        python("data/demo.py", "--out", DATA, cwd=ROOT)
    shutil.copytree(ROOT / DATA, folder)
    if not all_text:
        shard = folder / "fineweb_val_000000.bin"
        tokens = np.fromfile(shard, "<u2", offset=HEADER_BYTES)
        documents = np.split(tokens, np.flatnonzero(tokens == BOS_ID)[1:])
        kept = np.concatenate([document for document in documents if len(document) <= SHORT])
        shard.write_bytes(shard_header(len(kept)) + kept.tobytes())
        (folder / "manifest.json").unlink()  # it lists the whole shard


def make_run(work: Path, seed: int, settings: Mapping[str, str]) -> Path:
    """Train, evaluate and audit one seed with the packed programs; return the run's folder."""
    run = Path("runs") / str(seed)
    given = dict(RECIPE=str(ROOT / "records/recipes/smoke.env"), SEED=str(seed), RUN_ID=run.name, **settings)
    python("packed/train_gpt.py", cwd=work, **given)
    given |= dict(MODEL_PATH=str(run / "final_model.int6.ptz"))
    python("packed/eval_ttt.py", cwd=work, **given)
    python("packed/eval_ttt.py", "--audit", cwd=work, **given)
    return run


def build(work: Path, out: Path, settings: Mapping[str, str]) -> Path:
    """Make the runs and the record; return the record's folder."""
    with timed("pack"):
        python(ROOT / "records/pack.py", "--out", "packed", cwd=work)
    with timed(f"train, evaluate and audit {len(SEEDS)} seeds"), ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda seed: make_run(work, seed, settings), SEEDS))
    (work / "what.md").write_text(WHAT)
    about = ("--name", "Example", "--author", "The authors", "--github", "example", "--what", "what.md")
    with timed("submit"):
        print(python(ROOT / "records/submit.py", *runs, *about, "--out", out, cwd=work))
    (folder,) = out.glob("track_non_record_16mb/*_Example")
    return folder


def check_alone(folder: Path) -> list[str]:
    """Return what check.py finds wrong with the moved folder, besides what an example must be warned of."""
    found = json.loads(start(sys.executable, ROOT / "records/check.py", folder, "--json", cwd=folder))
    verdicts = [(v["rule"], v["status"], v["evidence"]) for v in found[0]["verdicts"]]
    faults = [f"{rule}: {evidence}" for rule, status, evidence in verdicts if status == "fail"]
    warned = [evidence for rule, status, evidence in verdicts if (rule, status) == ("challenge", "warn")]
    expected = ("validation text", "CPU", "training of")
    return faults + [f"no warning of {words!r}" for words in expected if words not in "; ".join(warned)]


def run_alone(folder: Path, data: Path) -> list[str]:
    """Run the README's command for the first seed in the folder; return how the result differs."""
    page = (folder / "README.md").read_text().partition("## Command")[2].partition("## ")[0]
    lines = [line for line in page.splitlines() if line.startswith("    ")]
    command = re.sub(r"for SEED in (\d+).*;", r"for SEED in \1;", "\n".join(lines))
    seed = re.search(r"for SEED in (\d+);", command)[1]
    paths = dict(DATA_PATH=str(data), TOKENIZER_PATH=str(data / "tokenizer.model"))
    start("bash", "-ec", command, cwd=folder, **paths)
    claimed = json.loads((folder / "submission.json").read_text())["seed_results"][seed]
    result = json.loads((folder / "runs" / f"seed{seed}" / "eval_ttt.json").read_text())
    found = dict(val_bpb=round(result["val_bpb_ttt"], 8), artifact_bytes=result["bytes_total"],
                 sha256_artifact=result["sha256_artifact"])  # fmt: skip
    return [f"{key}: {claimed[key]} in the record, {value} again"
            for key, value in found.items() if claimed[key] != value]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="parent folder of the record's track; default: it is deleted"
    )
    parser.add_argument("--all-text", action="store_true", help="validate on the whole demo corpus")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, timed("all"):
        work, alone = Path(place, "work"), Path(place, "alone")
        copy_data(work / DATA, arguments.all_text)
        folder = build(work, (arguments.out or Path(place)).resolve(), KEPT if arguments.all_text else IN_CI)
        moved = Path(shutil.copytree(folder, alone / folder.name))
        with timed("check"):
            faults = check_alone(moved)
        with timed("train and score in the moved folder"):
            faults += run_alone(moved, work / DATA)
    print(*(f"error: {fault}" for fault in faults), sep="\n", end="\n" * bool(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
