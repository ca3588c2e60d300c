"""Benchmark several ranks: throughput, communication, data loading, and a long run.

    python tests/benchmarks/scaling.py --out runs/bench_scaling   about five minutes on 2 cores
    python tests/benchmarks/scaling.py --quick                    about a minute
    python tests/benchmarks/scaling.py --soak                     2,000 toy steps; exit code 1: memory grew

Scaling: tokens per second of train_gpt.py on one and on two ranks with one thread each, alternating: the same
batch split in two (strong), and a batch twice as large (weak). Two independent processes show what the
machine can reach for two. Efficiency is relative to one process and to those two.

Bytes: bytes that a rank sends per step. `counted` is the input of the collectives of a real step, as a ring
sends it: of N bytes (W - 1) / W for a reduce-scatter or an all-gather, twice that for an all-reduce. `bound`
is 2 (W - 1) / W of all gradients, counted from the shapes of the model. `loopback` is the kernel's count on
`lo` (/proc/net/dev) while the steps ran on gloo, minus its count in the same time without them; gloo
implements reduce-scatter as an all-reduce of which it keeps a part. For pr1019 on GPUs, where updates are
gathered in bfloat16, only `counted` is given.

Loader: tokens per second of one rank's batches of pr1019 on eight ranks, on one core, from random shards in
the page cache, sequential and shuffled, against the 2 million per second that an H100 consumes.

Ends with one line `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from formats import shard_header  # noqa: E402

import train_gpt as tg  # noqa: E402

DATA = {"DATA_PATH": str(ROOT / "data/demo"), "TOKENIZER_PATH": str(ROOT / "data/demo/tokenizer.model")}
DEMO = {"RECIPE": str(ROOT / "records/recipes/demo.env"), **DATA}
LEAN = dict(  # a run that does little apart from its steps
    MAX_WALLCLOCK_SECONDS="0", VAL_LOSS_EVERY="0", TRAIN_LOG_EVERY="1", WARMUP_STEPS="0",
    GPTQ_CALIB_BATCHES="0", QUANT_STEPS="sigmas", EVAL_STRIDE="256", DEVICE="cpu", EMA_ENABLED="0",
)  # fmt: skip
NEEDED = 2_000_000  # tokens per second and rank
SETTLED = 4  # first timed step


def write_shard(path: Path, tokens: np.ndarray) -> None:
    path.write_bytes(shard_header(len(tokens)) + tokens.astype("<u2").tobytes())


def clean_environment() -> dict[str, str]:
    """Return the environment without settings, with one thread."""
    names = {field.upper() for field in tg.Config.__dataclass_fields__}
    return {k: v for k, v in os.environ.items() if k not in names and k != "RECIPE"} | {
        "OMP_NUM_THREADS": "1"
    }


# ------------------------------------------------------------------------------------------------------------
# Throughput
# ------------------------------------------------------------------------------------------------------------


def start_run(work: Path, settings: dict[str, str], processes: int) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "train_gpt.py")]
    env = {**clean_environment(), **DEMO, **LEAN, **settings, "RUN_ID": "run"}
    work.mkdir()
    with open(work / "output.txt", "wb") as output:
        return subprocess.Popen(command, env=env, cwd=work, stdout=output, stderr=subprocess.STDOUT)


def speed(work: Path, batch: int) -> float:
    """Return the tokens per second of a finished run, from its median step."""
    rows = [json.loads(line) for line in (work / "runs/run/metrics.jsonl").read_text().splitlines()]
    times = np.diff([row["seconds"] for row in rows if row["step"] >= SETTLED])
    return batch / float(np.median(times))


def scaling(quick: bool, work: Path) -> dict[str, Any]:
    """Return medians over rounds; each round runs every arm once, in alternating order."""
    batch, rounds, steps = 8192, 1 if quick else 3, 12 if quick else 24
    shard = work / "val.bin"
    write_shard(shard, np.random.default_rng(0).integers(2, 1000, 600))
    settings = {"VAL_FILES": str(shard), "ITERATIONS": str(steps), "GRAD_ACCUM_TOTAL": "2"}
    large = {**settings, "TRAIN_BATCH_TOKENS": str(2 * batch), "GRAD_ACCUM_TOTAL": "4"}
    settings["TRAIN_BATCH_TOKENS"] = str(batch)
    arms = {  # settings, processes, runs at once, tokens of a step of each run
        "one process": (settings, 1, 1, batch),
        "two apart": (settings, 1, 2, batch),
        "two, strong": (settings, 2, 1, batch),
        "two, weak": (large, 2, 1, 2 * batch),
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            given, processes, copies, tokens = arms[name]
            print(f"scaling: {name}, round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
            folders = [work / f"{name}_{turn}_{copy}" for copy in range(copies)]
            runs = [start_run(folder, given, processes) for folder in folders]
            for run, folder in zip(runs, folders, strict=True):
                if run.wait():
                    raise RuntimeError((folder / "output.txt").read_text())
            found[name].append(sum(speed(folder, tokens) for folder in folders))
    medians = {name: statistics.median(values) for name, values in found.items()}
    one, apart = medians["one process"], medians["two apart"]
    print(f"{'arm':14} {'tokens/s':>10} {'of 2 x one':>11} {'of two apart':>13}   rounds")
    for name, value in medians.items():
        rest = " ".join(f"{x:,.0f}" for x in found[name])
        share = f"{value / (2 * one):>11.2f} {value / apart:>13.2f}" if name != "one process" else f"{'':>25}"
        print(f"{name:14} {value:>10,.0f} {share}   {rest}")
    efficiency = {name: dict(of_one=medians[name] / (2 * one), of_apart=medians[name] / apart)
                  for name in ("two, strong", "two, weak")}  # fmt: skip
    return dict(tokens_per_second=found, medians=medians, efficiency=efficiency, batch=batch, steps=steps)


# ------------------------------------------------------------------------------------------------------------
# Bytes per step
# ------------------------------------------------------------------------------------------------------------


def loopback_bytes() -> int | None:
    """Return the bytes sent over `lo` by this machine so far, or None if the kernel does not report them."""
    try:
        found = re.search(r"^\s*lo:(.*)$", Path("/proc/net/dev").read_text(), re.M)
    except OSError:
        return None
    return int(found[1].split()[8]) if found else None


@contextmanager
def counted(sent: dict[str, float]):
    """Add the bytes that a ring sends for each collective to `sent`, by torch.distributed name."""

    def size(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    rules = {  # name -> (multiple of (W - 1) / W, bytes of the full tensor)
        "all_reduce": (2, lambda args: size(args[0])),
        "reduce_scatter_tensor": (1, lambda args: size(args[1])),
        "reduce_scatter_single": (1, lambda args: size(args[1])),
        "all_gather_into_tensor": (1, lambda args: size(args[0])),
        "all_gather_single": (1, lambda args: size(args[0])),
    }
    kept = {name: getattr(dist, name) for name in rules if hasattr(dist, name)}

    def wrapper(name: str):
        times, whole = rules[name]

        def collective(*args, **kwargs):
            ranks = dist.get_world_size()
            sent[name] = sent.get(name, 0.0) + times * (ranks - 1) / ranks * whole(args)
            return kept[name](*args, **kwargs)

        return collective

    for name in kept:
        setattr(dist, name, wrapper(name))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def step_maker(config: tg.Config):
    """Return a function that takes a step on random sequences of this rank."""
    model = tg.GPT(config).init_weights(0)
    optimizers, generator = tg.make_optimizers(model, config), torch.Generator().manual_seed(tg.rank())

    def step() -> None:
        rows = torch.randint(2, config.vocab_size, (1, config.train_seq_len + 1), generator=generator)
        tg.train_step(tg.training_loss, model, [(rows[:, :-1], rows[:, 1:])], optimizers, 1.0, 0.9)

    return step


def bytes_of_a_rank(rank: int, ranks: int, steps: int, config: tg.Config, out: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=rank, world_size=ranks)
    step, sent = step_maker(config), {}
    for _ in range(2):
        step()
    dist.barrier()
    first, began = loopback_bytes(), time.perf_counter()
    dist.barrier()
    for _ in range(steps):
        step()
    dist.barrier()
    seconds, last = time.perf_counter() - began, loopback_bytes()
    with counted(sent):
        step()
    dist.barrier()
    if rank == 0:
        quiet = loopback_bytes()
        time.sleep(seconds)
        idle = loopback_bytes()
        lo = None if first is None else (last - first - (idle - quiet)) / steps / ranks
        Path(out).write_text(json.dumps(dict(counted=sent, loopback=lo, seconds=seconds / steps)))
    dist.barrier()
    dist.destroy_process_group()


def gradient_bytes(config: tg.Config) -> tuple[int, int]:
    """Return the bytes of all gradients and of the banks' gradients in float32."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in tg.GPT(config).named_parameters()}
    sizes = {name: 4 * shape.numel() for name, shape in shapes.items()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if len(shapes[name]) == 3)


def by_the_shapes(config: tg.Config, ranks: int, update_bytes: int) -> float:
    """Return the bytes that a ring sends per rank and step, with padded banks sharded by row.

    Gradients have four bytes per number, updates `update_bytes`.
    """
    whole, _ = gradient_bytes(config)
    with torch.device("meta"):
        shapes = [p.shape for p in tg.GPT(config).parameters() if p.dim() == 3]
    banks = sum(shape.numel() for shape in shapes)
    padded = sum(-(-shape[0] // ranks) * ranks * shape[1] * shape[2] for shape in shapes)
    return (ranks - 1) / ranks * (padded * (4 + update_bytes) + 2 * (whole - 4 * banks))


def communication(quick: bool, work: Path) -> dict[str, Any]:
    config, _, _ = tg.load_config({**DEMO, "DEVICE": "cpu", "TRAIN_SEQ_LEN": "16", "GRAD_ACCUM_TOTAL": "1"})
    whole, banks = gradient_bytes(config)
    print(
        f"\ndemo: {whole / 1e6:.2f} MB of gradients, {banks / 1e6:.2f} of them banks; MB sent per rank and "
        "step"
    )
    print(f"{'ranks':>5} {'bound':>8} {'shapes':>8} {'counted':>8} {'loopback':>9} {'of bound':>9}")
    table = []
    for ranks in (1, 2, 4, 8):
        bound, shapes = 2 * (ranks - 1) / ranks * whole, by_the_shapes(config, ranks, 4)
        out = work / f"bytes_{ranks}.json"
        mp.start_processes(
            bytes_of_a_rank, (ranks, 3 if quick else 10, config, str(out)), nprocs=ranks, start_method="spawn"
        )
        found = json.loads(out.read_text())
        row = dict(ranks=ranks, bound=bound, shapes=shapes, counted=sum(found["counted"].values()))
        row |= dict(parts=found["counted"], loopback=found["loopback"], seconds=found["seconds"])
        table.append(row)
        lo = "none" if row["loopback"] is None else f"{row['loopback'] / 1e6:.3f}"
        share = f"{row['counted'] / bound:.3f}" if bound else ""
        print(
            f"{ranks:>5} {bound / 1e6:>8.3f} {shapes / 1e6:>8.3f} {row['counted'] / 1e6:>8.3f} {lo:>9} "
            f"{share:>9}"
        )
    large, _, _ = tg.load_config({"RECIPE": str(ROOT / "records/recipes/pr1019.env"), **DATA})
    whole, banks = gradient_bytes(large)
    print(
        f"pr1019: {whole / 1e6:.1f} MB of gradients, {banks / 1e6:.1f} of them banks; MB sent, updates in "
        "bfloat16"
    )
    counts = []
    for ranks in (1, 2, 4, 8):
        row = dict(
            ranks=ranks, all_reduce=2 * (ranks - 1) / ranks * whole, shapes=by_the_shapes(large, ranks, 2)
        )
        counts.append(row)
        print(f"{ranks:>5} all-reduce of everything {row['all_reduce'] / 1e6:>7.1f}, banks sharded by row "
              f"{row['shapes'] / 1e6:>7.1f}")  # fmt: skip
    return dict(demo=table, pr1019=counts)


# ------------------------------------------------------------------------------------------------------------
# Loader
# ------------------------------------------------------------------------------------------------------------


def loader(quick: bool, work: Path) -> dict[str, Any]:
    """Return the tokens per second of step_batches in this thread, by wall clock and by CPU time."""
    seconds, ranks = 1.0 if quick else 5.0, 8
    for index in range(2 if quick else 10):
        write_shard(
            work / f"fineweb_train_{index:06d}.bin",
            np.random.default_rng(index).integers(2, 1000, 10_000_000),
        )
    config, _, _ = tg.load_config({"RECIPE": str(ROOT / "records/recipes/pr1019.env"), **DATA})
    stream = tg.TokenStream(f"{work}/fineweb_train_*.bin", config.vocab_size)
    for path in stream.paths:
        Path(path).read_bytes()  # into the page cache
    kept, found = tg.world_size, {}
    tg.world_size = lambda: ranks
    tokens = config.train_batch_tokens // ranks
    print(
        f"\nloader: {tokens:,} tokens of {config.train_seq_len} per rank and step, {len(stream):,} total, "
        "one core"
    )
    try:
        for order in ("sequential", "shuffled"):
            run = SimpleNamespace(
                config=replace(config, data_order=order), train=stream, device=torch.device("cpu")
            )
            began, steps = time.perf_counter(), 1
            tg.step_batches(run, 0)  # samples the order of the first epoch
            first, began, own = time.perf_counter() - began, time.perf_counter(), time.thread_time()
            while time.perf_counter() - began < seconds:
                tg.step_batches(run, steps)
                steps += 1
            wall, own = time.perf_counter() - began, time.thread_time() - own
            rates = dict(
                wall=(steps - 1) * tokens / wall, core=(steps - 1) * tokens / own, first_step_seconds=first
            )
            found[order] = rates
            wall, own = (rates[clock] / 1e6 for clock in ("wall", "core"))
            print(f"{order:11} {wall:>8.1f} million tokens/s by wall clock, {own:.1f} by CPU time; "
                  f"{1e6 * wall / NEEDED:.0f} times the 2 million; first step {first:.3f} s")  # fmt: skip
    finally:
        tg.world_size = kept
    for path in stream.paths:
        Path(path).unlink()
    return found


# ------------------------------------------------------------------------------------------------------------
# Long run
# ------------------------------------------------------------------------------------------------------------

SOAK = dict(  # many epochs of a short text with periodic checkpoints and validation
    RECIPE=str(ROOT / "records/recipes/smoke.env"), NUM_LAYERS="2", MODEL_DIM="32", ROPE_DIMS="8",
    BIGRAM_VOCAB_SIZE="64", BIGRAM_DIM="8", VE_DIM="8", VE_LAYERS="1", TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="128", GRAD_ACCUM_TOTAL="1", WARMUP_STEPS="1", WARMDOWN_ITERS="500",
    TRAIN_LOG_EVERY="10", VAL_LOSS_EVERY="500",
    CHECKPOINT_EVERY="100", GPTQ_CALIB_BATCHES="1", DATA_ORDER="shuffled", DEVICE="cpu", RUN_ID="run",
)  # fmt: skip
GROWTH = 1.0  # MiB of allowed memory growth, from the second quarter of the run to the last


def status_of(pid: int) -> tuple[float, int, int] | None:
    """Return resident MiB, open files and threads of a process, or None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return (
            int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024,
            files,
            int(re.search(r"Threads:\s+(\d+)", text)[1]),
        )
    except (OSError, TypeError):
        return None


def soak(steps: int, work: Path) -> dict[str, Any]:
    """Train for `steps` steps, sample memory, files and threads, and compare the minimum of each quarter.

    The minimum shows leaks but not memory held briefly to write a file or to score. Large blocks are returned
    to the system when freed, so that allocator caching does not show either.
    """
    write_shard(work / "val.bin", np.random.default_rng(0).integers(2, 1000, 500))
    write_shard(work / "train.bin", np.random.default_rng(1).integers(2, 1000, 20_000))
    files = {"VAL_FILES": str(work / "val.bin"), "TRAIN_FILES": str(work / "train.bin")}
    env = {
        **clean_environment(),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        **DATA,
        **SOAK,
        **files,
        "ITERATIONS": str(steps),
    }
    samples, began = [], time.perf_counter()
    with open(work / "output.txt", "wb") as output:
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "train_gpt.py")],
            env=env,
            cwd=work,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    metrics, text = work / "runs/run/metrics.jsonl", ""
    while run.poll() is None:
        if f'"step": {steps},' not in text:  # while it trains
            text = metrics.read_text() if metrics.exists() else ""
            sample, step = status_of(run.pid), re.findall(r'^\{"step": (\d+)', text, re.M)
            if sample and step:
                samples.append((int(step[-1]), *sample))
        time.sleep(0.05)
    if run.returncode:
        raise RuntimeError((work / "output.txt").read_text())
    quarters = [[s for s in samples if low * steps < 4 * s[0] <= (low + 1) * steps] for low in range(4)]
    if not all(len(quarter) >= 5 for quarter in quarters):
        raise RuntimeError(f"too few samples per quarter: {[len(quarter) for quarter in quarters]}")
    print(f"\nsoak: {steps} steps in {time.perf_counter() - began:.0f} s, {len(samples)} samples")
    table = [
        {name: min(s[n] for s in q) for n, name in enumerate(("memory", "files", "threads"), 1)}
        for q in quarters
    ]
    for number, row in enumerate(table, 1):
        print(f"quarter {number}: {row['memory']:.1f} MiB, {row['files']} files, {row['threads']} threads")
    grown = table[3]["memory"] - table[1]["memory"]
    same = all(table[3][what] <= max(table[0][what], table[1][what]) for what in ("files", "threads"))
    flat = grown <= GROWTH and same
    print(f"memory growth from the second quarter to the last: {grown:.2f} MiB, limit {GROWTH}: "
          f"{'flat' if flat else 'NOT FLAT'}")  # fmt: skip
    return dict(steps=steps, quarters=table, grown_mib=grown, allowed_mib=GROWTH, flat=flat)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of everything, about a minute")
    parser.add_argument("--out", type=Path, help="folder for scaling.json; default: not written")
    parser.add_argument("--soak", action="store_true", help="only the long run")
    parser.add_argument("--steps", type=int, default=2000, help="with --soak: number of steps")
    parser.add_argument("--only", choices=("scaling", "bytes", "loader"), help="only one part")
    arguments = parser.parse_args()
    subprocess.run(
        [sys.executable, "data/demo.py", "--out", "data/demo"], cwd=ROOT, check=True, stdout=sys.stderr
    )
    torch.set_num_threads(1)
    parts = {"scaling": scaling, "bytes": communication, "loader": loader}
    report: dict[str, Any] = dict(benchmark="soak" if arguments.soak else "scaling", quick=arguments.quick)
    work = Path(tempfile.mkdtemp())
    try:
        if arguments.soak:
            report["soak"] = soak(arguments.steps, work)
        for name, part in parts.items():
            if not arguments.soak and arguments.only in (None, name):
                folder = work / name
                folder.mkdir()
                report[name] = part(arguments.quick, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report |= dict(date=date.today().isoformat(), cores=os.cpu_count())
    report["versions"] = tg.library_versions(torch.device("cpu"), "sdpa")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tg.write_atomically(
            arguments.out / f"{report['benchmark']}.json", json.dumps(report, indent=1).encode()
        )
    print("BENCH " + json.dumps(report))
    return 1 if arguments.soak and not report["soak"]["flat"] else 0


if __name__ == "__main__":
    sys.exit(main())
