"""The parts of `gpu_minutes.py`: what each runs, its priority and its time limit.

A part runs in its own process and writes results with `Context.put` as they arrive, so that a part that
crashes or is killed keeps its results so far. Importing this file needs only the standard library; the parts
import torch. `PARTS` is sorted by value, the order in which a call starts them; see `gpu_minutes.choose`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RECIPE, TINY = "records/recipes/pr1019.env", "records/recipes/smoke.env"
PEAK_FLOPS = 989e12  # bfloat16, from the datasheet of H100 and H200
FULL_TARGETS, FULL_GPUS = 62_021_845, 8  # of the challenge's validation text
RUNS = dict(train="first", train_plain="plain")  # part -> RUN_ID
CLOCK_STARTS = "gptq:reserving"  # the trainer's log line between compilation and training
MICRO_BATCH_TOKENS = 98_304  # pr1019's micro-batch: one graph for all its runs here
# Published schedules count steps of ten minutes on eight GPUs; a run of minutes needs fractions of its own
# length.
SHORT_RUN = dict(TRAIN_BATCH_TOKENS="393216", GRAD_ACCUM_TOTAL="4", WARMUP_STEPS="2", WARMDOWN_FRAC="0.5",
                 MUON_MOMENTUM_WARMUP_STEPS="100", EMA_DECAY="0.98", DATA_ORDER="shuffled",
                 VAL_LOSS_EVERY="200", TRAIN_LOG_EVERY="20")  # fmt: skip
REHEARSED = dict(NUM_LAYERS="2", VE_LAYERS="1", ITERATIONS="10")  # toy recipe: everything runs, in seconds
SGD_CHUNKS = dict(
    TTT_MODE="all",
    TTT_OPTIMIZER="sgd",
    TTT_LR_SCHEDULE="cosine",
    TTT_LR="0.002",
    TTT_EPOCHS="3",  # as pr549.env
    TTT_MOMENTUM="0.9",
    TTT_CHUNK_TOKENS="32768",
    TTT_GRAD_CLIP="1.0",
)
DOC_BANKS = dict(TTT_MODE="doc_banks", TTT_GROUPS="1")  # one group: the work of one of eight GPUs
DOC_LORA = dict(
    TTT_MODE="doc_lora",
    TTT_GROUPS="1",
    TTT_OPTIMIZER="adamw",
    TTT_BETA2="0.999",
    TTT_GRAD_CLIP="1.0",
    TTT_LR="1e-4",
)
META = dict(META_TTT_ENABLED="1", META_TTT_OBJECTIVE="deployed", META_TTT_PIECES="4",  # one graph per chunk
            TTT_LR="1e-4")  # fmt: skip  # above 3e-5, the best rate of weights that were not trained for it
META_RATES = (1e-9, 3e-5, 1e-4, 3e-4)  # the first: no adaptation
KEPT_VARIABLES = re.compile(  # kept from the environment, where DEVICE or SEED would act as a setting
    r"PATH|HOME|USER|LANG|LC_.*|TMPDIR|TZ|VIRTUAL_ENV|LD_LIBRARY_PATH|LIBRARY_PATH|CPATH|CC|CXX|"
    r"OMP_NUM_THREADS|"
    r"GPU_MINUTES_PART|(CUDA|NVIDIA|NCCL|TORCH|TORCHINDUCTOR|TRITON|PYTHON|XDG)_?[A-Z0-9_]*"
)


def clean_environ() -> dict[str, str]:
    """Return the environment without variables that a program could read as settings."""
    return {name: value for name, value in os.environ.items() if KEPT_VARIABLES.fullmatch(name)}


def full_seconds(targets_per_second: float) -> float:
    """Return the seconds for the challenge's validation text on eight GPUs, given the rate of one."""
    return FULL_TARGETS / targets_per_second / FULL_GPUS


class PartFailed(RuntimeError):
    """A program started by a part failed, or its result is wrong."""


@dataclass
class Context:
    """Input of a part: paths, the kind of call, path of its result. Stored as JSON."""

    work: str
    out: str
    rehearse: bool
    data: dict[str, str]
    coder: str
    train_seconds: float
    kept_train_seconds: float = 0.0  # of the kept plain run, the baseline
    result_path: str = ""
    break_how: str = ""  # crash or hang, to test failures in a rehearsal
    result: dict[str, Any] = field(default_factory=dict)

    def put(self, **values: Any) -> None:
        """Add values to the result and write it to disk at once."""
        self.result |= values
        path = Path(self.result_path)
        path.with_suffix(".tmp").write_text(json.dumps(self.result, indent=1))
        os.replace(path.with_suffix(".tmp"), path)

    @property
    def recipe(self) -> str:
        return str(ROOT / (TINY if self.rehearse else RECIPE))

    def environ(self, small: bool = False, **settings: str) -> dict[str, str]:
        """Return the environment of a program: data, recipe, settings. `small`: toy recipe and shards."""
        train, val = self.data["train"], self.data["report"]
        if small:
            train, val = (f"{self.data['small']}/fineweb_{split}_*.bin" for split in ("train", "val"))
        paths = dict(TRAIN_FILES=train, VAL_FILES=val, TOKENIZER_PATH=self.data["tokenizer"])
        recipe = dict(RECIPE=str(ROOT / TINY) if small else self.recipe, COMPRESSOR=self.coder)
        return {**clean_environ(), **recipe, **(REHEARSED if self.rehearse else {}), **paths, **settings}

    def program(
        self,
        command: Sequence[str],
        environ: dict[str, str],
        accepted: Sequence[int] = (0,),
        on_line: Callable[[str, subprocess.Popen], None] | None = None,
    ) -> list[tuple[float, str]]:
        """Run a program in `work`, copying its output; return its lines with the seconds since its start.

        PartFailed if its exit code is not accepted.
        """
        began, lines = time.monotonic(), []
        print(f"$ {' '.join(command)}", flush=True)
        process = subprocess.Popen(command, cwd=self.work, env=environ, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, errors="replace")  # fmt: skip
        for line in process.stdout:
            lines.append((time.monotonic() - began, line.rstrip("\n")))
            print(line, end="", flush=True)
            if on_line:
                on_line(lines[-1][1], process)
        if process.wait() not in accepted:
            raise PartFailed(f"{' '.join(command[1:3])}: exit code {process.returncode}")
        return lines

    def model(self) -> Path:
        """Return the artifact of this call, else its weights (export failed), else an earlier artifact."""
        artifacts = [path.with_name("final_model.int6.ptz") for path in self.weights_paths()]
        for path in (*artifacts, *self.weights_paths(), Path(self.out) / "final_model.int6.ptz"):
            if path.exists():
                return path
        raise PartFailed("no artifact and no weights from the training part")

    def weights_paths(self) -> list[Path]:
        return [Path(self.work) / f"runs/{name}/final_model.pt" for name in RUNS.values()]


def load_modules() -> tuple[Any, Any]:
    """Import train_gpt and eval_ttt."""
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("train_gpt"), importlib.import_module("eval_ttt")


# ------------------------------------------------------------------------------------------------------------
# Reading logs
# ------------------------------------------------------------------------------------------------------------

Lines = list[tuple[float, str]]


def last_json(lines: Lines, label: str) -> dict[str, Any]:
    """Return the object of the last line `LABEL {json}`. PartFailed if there is none."""
    for _, line in reversed(lines):
        if line.startswith(label + " {"):
            return json.loads(line[len(label) :])
    raise PartFailed(f"no {label} line in the log")


def when(lines: Lines, start: str) -> float | None:
    """Return the seconds until the first line that starts with `start`."""
    return next((seconds for seconds, line in lines if line.startswith(start)), None)


def between(lines: Lines, first: str, last: str) -> float | None:
    begin, end = when(lines, first), when(lines, last)
    return None if begin is None or end is None else end - begin


def found(lines: Lines, pattern: str) -> list[tuple[str, ...]]:
    return [match.groups() for _, line in lines for match in re.finditer(pattern, line)]


def shard_targets(path: str) -> int:
    return (Path(path).stat().st_size - 1024) // 2 - 1


def find_file(folder: Path, name: str) -> Path | None:
    """Return the newest file of that name: the evaluator writes beside the artifact or in a mode's folder."""
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime, default=None)


# ------------------------------------------------------------------------------------------------------------
# a. The experiment
# ------------------------------------------------------------------------------------------------------------


def train_run(ctx: Context, name: str, seconds: float, **settings: str) -> dict[str, Any]:
    """Train, export and score a run with that name; return the facts from its log and files."""
    folder = Path(ctx.work) / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    short = {} if ctx.rehearse else SHORT_RUN | dict(MAX_WALLCLOCK_SECONDS=f"{seconds:.0f}")
    environ = ctx.environ(RUN_ID=name, **{**short, **settings})
    command, so_far = [sys.executable, str(ROOT / "train_gpt.py")], {}

    def salvage(line: str, process: subprocess.Popen) -> None:  # in case the run is killed later
        if match := re.match(r"final_int6_(roundtrip|sliding)\w*_exact .*val_bpb:(\S+)", line):
            so_far[f"val_bpb_{match[1]}"] = float(match[2])
        elif match := re.match(r"step:(\d+)/\d+ train_loss:\S+ train_time:\d+ms step_avg:(\S+)ms", line):
            so_far.update(steps=int(match[1]), step_avg_ms=float(match[2]))
        else:
            return
        ctx.put(so_far=so_far)

    lines = ctx.program(command, environ, (0, 1), salvage)  # 1: over the size cap, which does not matter here
    result = last_json(lines, "RESULT")
    ctx.result.pop("so_far", None)
    tg, _ = load_modules()
    config, _, _ = tg.load_config(environ)
    flops = tg.project_module("describe").flops_per_token(config)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in steps if "train_loss" in row]
    late = [row for row in losses if row["step"] >= losses[-1]["step"] // 2]
    pace = (late[-1]["seconds"] - late[0]["seconds"]) / max(late[-1]["step"] - late[0]["step"], 1)
    peak = found(lines, r"peak memory allocated: (\d+) MiB reserved: (\d+)") or [(None, None)]
    kept = (
        "steps step_avg_ms tokens_per_second val_bpb_roundtrip val_bpb_sliding bytes_model bytes_total fits "
        "versions "
        "train_seconds strict_seconds eval_seconds model_params late_steps sha256_artifact"
    ).split()
    return {key: result[key] for key in kept if key in result} | dict(
        clock_seconds=seconds,
        ms_per_step_late=1000 * pace,
        mfu=flops * result["tokens_per_second"] / PEAK_FLOPS,
        start_seconds=when(lines, "seed:"),
        compile_seconds=between(lines, "seed:", CLOCK_STARTS),
        export_seconds=between(lines, "average:", "Total submission size"),
        peak_mib=peak[-1][0] and int(peak[-1][0]),
        reserved_mib=peak[-1][1] and int(peak[-1][1]),
        batch_tokens=config.train_batch_tokens,
        use_compile=environ.get("USE_COMPILE", "auto"),
        epochs=result["steps"] * config.train_batch_tokens / shard_targets(ctx.data["train"]),
        data_wait_seconds=sum(row.get("data_wait", 0.0) for row in losses),
        curve=[(row["step"], round(row["seconds"], 2), row["val_bpb"]) for row in steps if "val_bpb" in row],
    )


def keep_artifact(ctx: Context, part: str) -> None:
    """Copy the artifact of a training part for later calls. The driver calls this: the part may be dead."""
    source, target = (
        Path(ctx.work) / f"runs/{RUNS.get(part)}/final_model.int6.ptz",
        Path(ctx.out) / "final_model.int6.ptz",
    )
    if part in RUNS and source.exists():
        shutil.copyfile(source, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)


def part_train(ctx: Context) -> None:
    """Train the recipe compiled, export it, read it back, score it twice."""
    ctx.put(**train_run(ctx, RUNS["train"], ctx.train_seconds))


def part_train_plain(ctx: Context) -> None:
    """Train without compiler and cuDNN attention, if the first training left no model."""
    os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
    ctx.put(**train_run(ctx, RUNS["train_plain"], 0.7 * ctx.train_seconds, USE_COMPILE="0"))


def gains_by_position(folder: Path) -> list[dict[str, Any]]:
    """Return targets, nats before and after, and gain of each class of positions in a document."""
    path = find_file(folder, "distribution.json")
    rows = json.loads(path.read_text())["classes"] if path else []
    rows = [row for row in rows if row["name"].startswith("position")]
    return [{**row, "gain": row["before"] - row["after"]} for row in rows]


def adapted_scores(ctx: Context, name: str, model: Path, **settings: str) -> None:
    """Score a model with adaptation on the reporting documents; plain torch: compiling does not pay here."""
    folder = Path(ctx.work) / "runs" / f"adapt_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = shutil.copyfile(model, folder / model.name)
    environ = ctx.environ(MODEL_PATH=str(own), USE_COMPILE="0", **settings)
    targets = shard_targets(ctx.data["report"])

    def salvage(line: str, process: subprocess.Popen) -> None:  # score of a run that is killed later
        if match := re.match(r"chunk:(\d+)/\1 running_bpb:(\S+)", line):
            ctx.put(val_bpb_ttt=float(match[2]))

    lines = ctx.program([sys.executable, str(ROOT / "eval_ttt.py")], environ, (0, 1), salvage)
    result = last_json(lines, "RESULT")
    seconds = found(lines, r"legal_ttt_exact .*time:([\d.]+)s")
    seconds = float(seconds[-1][0]) if seconds else result["eval_seconds"]
    kept = ("val_bpb_ttt val_bpb_plan val_bpb_roundtrip val_bpb_sliding ttt_gain_bpb eval_seconds legal "
            "settings "
            "sha256_artifact").split()  # fmt: skip
    rate = targets / max(seconds, 1e-9)
    ctx.put(**{key: result[key] for key in kept if key in result}, model=model.name, targets=targets,
            score_seconds=seconds, targets_per_second=rate, full_seconds=full_seconds(rate),
            gain_by_position=gains_by_position(folder))  # fmt: skip


def tiny_evaluation(ctx: Context) -> dict[str, str]:
    return dict(TTT_CHUNK_SIZE="64", TTT_PRIOR_SEQS="2", EVAL_STRIDE="64") if ctx.rehearse else {}


def part_adapt(ctx: Context) -> None:
    """Adapt all weights per document."""
    adapted_scores(ctx, "documents", ctx.model(), **DOC_BANKS, **tiny_evaluation(ctx))


def part_chunk_sgd(ctx: Context) -> None:
    """Adapt by SGD on chunks, weights carried over, as in #549."""
    tiny = dict(TTT_CHUNK_TOKENS="2048", EVAL_STRIDE="64") if ctx.rehearse else {}
    adapted_scores(ctx, "chunks", ctx.model(), **{**SGD_CHUNKS, **tiny})


def part_doc_lora(ctx: Context) -> None:
    """Adapt a LoRA per document."""
    adapted_scores(ctx, "lora", ctx.model(), **DOC_LORA, **tiny_evaluation(ctx))


def part_meta(ctx: Context) -> None:
    """Train a final phase for the deployed update, in the time of the plain run; adapt at four rates."""
    tiny = tiny_evaluation(ctx)
    settings = META | tiny | (dict(META_TTT_DOCS="2", META_TTT_PIECES="2") if ctx.rehearse else {})
    ctx.put(train=train_run(ctx, "meta", ctx.kept_train_seconds or ctx.train_seconds, **settings))
    model = Path(ctx.work) / "runs/meta/final_model.int6.ptz"
    _, ev, setup, tokens = slots_setup(ctx, model, USE_COMPILE="0")
    for rate in META_RATES:
        changed = ev.replace(setup, config=ev.replace(setup.config, ttt_lr=rate))
        ctx.put(**{f"rate {rate:g}": throughput(tokens[:40_000], ev.evaluate(changed, tokens[:40_000]))})
    adapted_scores(ctx, "meta", model, **DOC_BANKS, **tiny, TTT_LR=META["TTT_LR"])


# ------------------------------------------------------------------------------------------------------------
# b. Correctness
# ------------------------------------------------------------------------------------------------------------


def bench(ctx: Context, name: str, phases: str, arms: str, *more: str, **settings: str) -> dict[str, Any]:
    """Run phases of gpu.py; return results by phase and arm. PartFailed if one failed; others are kept."""
    out = Path(ctx.work) / f"bench_{name}"
    shutil.rmtree(out, ignore_errors=True)
    quick = ["--quick", "--backend", "eager"] if ctx.rehearse else []
    environ = ctx.environ(**settings)
    command = [
        sys.executable,
        str(ROOT / "tests/benchmarks/gpu.py"),
        "--recipe",
        ctx.recipe,
        "--phases",
        phases,
    ]
    command += [
        "--arms",
        arms,
        "--out",
        str(out),
        "--data",
        str(Path(ctx.data["train"]).parent),
        *more,
        *quick,
    ]
    command += ["--tokenizer", ctx.data["tokenizer"]]
    try:
        ctx.program(command, environ)
    finally:
        report = (
            json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else dict(results=[])
        )
        ctx.put(
            **{
                f"{row['phase']}_{row['arm']}" if row["arm"] else row["phase"]: row
                for row in report["results"]
            }
        )
    return report


def part_kernels(ctx: Context) -> None:
    """Compare attention kernels with float32: outputs and gradients by the tests, then times and errors."""
    counts: dict[str, int] = {}
    chosen = ["-m", "gpu"]
    if ctx.rehearse:  # plain kernels instead of CUDA's
        chosen = ["-k", "test_the_kernel_of_torch_is_asked_for_what_masks_do"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/test_model.py"),
    ]
    try:
        lines = ctx.program([*command, *chosen], clean_environ(), accepted=(0, 1))
        told = found(lines, r"(\d+) (passed|failed|skipped)")
        counts |= {word: int(number) for number, word in told}
        ctx.put(tests=counts, skipped=[line for _, line in lines if line.startswith("SKIPPED")])
    finally:
        bench(ctx, "attention", "attention", "compiled")
    if counts.get("failed") or not counts.get("passed"):
        raise PartFailed(f"tests of the kernels failed: {counts}")


def part_losses(ctx: Context) -> None:
    """Compare losses over ten steps of one micro-batch: compiled and plain torch, bfloat16 and float32."""
    tiny = {} if ctx.rehearse else dict(TRAIN_BATCH_TOKENS=str(MICRO_BATCH_TOKENS), GRAD_ACCUM_TOTAL="1")
    bench(ctx, "losses", "losses", "compiled,plain", "--loss-steps", "10", **tiny)


def part_ranks(ctx: Context) -> None:
    """Run the collectives of a step in a group of one rank: NCCL on a GPU, gloo without one."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    began = time.perf_counter()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    x = torch.arange(1 << 20, dtype=torch.float32, device=device) / 7
    results = {}
    for name, collective in (
        ("all_reduce", lambda y: dist.all_reduce(y, async_op=True)),
        ("reduce_scatter", lambda y: dist.reduce_scatter_tensor(y, x.clone(), async_op=True)),
        ("all_gather", lambda y: dist.all_gather_into_tensor(y, x.clone(), async_op=True)),
        ("broadcast", lambda y: dist.broadcast(y, 0, async_op=True)),
    ):
        y = x.clone() if name in ("all_reduce", "broadcast") else torch.zeros_like(x)
        collective(y).wait()
        results[name] = bool(torch.equal(y, x))
    host = torch.ones(3, dtype=torch.float64)
    dist.all_reduce(host)  # by gloo, beside NCCL
    results["all_reduce on the host"] = host.tolist() == [1.0] * 3
    dist.destroy_process_group()
    ctx.put(backend=backend, seconds=time.perf_counter() - began, equal=results)
    if not all(results.values()):
        raise PartFailed(f"collectives of one rank must return their input: {results}")


def part_resume(ctx: Context) -> None:
    """Stop a small run with SIGTERM and resume it, against the same run uninterrupted."""
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    common = dict(USE_COMPILE="0", VAL_LOSS_EVERY="0", RESUME="auto")
    for name in ("straight", "stopped"):
        shutil.rmtree(Path(ctx.work) / "runs" / name, ignore_errors=True)
    straight = ctx.program(command, ctx.environ(True, RUN_ID="straight", **common), (0, 1))

    def stop(line: str, process: subprocess.Popen) -> None:
        if line.startswith("step:2/"):
            process.send_signal(signal.SIGTERM)

    stopped = ctx.environ(True, RUN_ID="stopped", **common)
    first = ctx.program(command, stopped, (128 + signal.SIGTERM,), stop)
    second = ctx.program(command, stopped, (0, 1))
    results = [last_json(lines, "RESULT") for lines in (straight, second)]
    apart = abs(results[0]["val_loss_roundtrip"] - results[1]["val_loss_roundtrip"])
    resumed = results[1]["resumed"]
    ctx.put(nats_apart=apart, resumed=resumed, steps=results[1]["steps"],
            checkpoint=[line for _, line in first
                        if line.startswith(("checkpoint:", "stopped:"))])  # fmt: skip
    # sums are reordered on a GPU
    if not resumed or results[1]["steps"] != results[0]["steps"] or apart > 0.02:
        raise PartFailed(f"resumed at {resumed}, {apart:.4f} nats apart from the uninterrupted run")


# ------------------------------------------------------------------------------------------------------------
# c. Milliseconds per step, d. Quantization, e. The rest
# ------------------------------------------------------------------------------------------------------------


def part_probe(ctx: Context) -> None:
    """Probe the machine: versions, packages, matrix product and memory rates, torch's attention backend."""
    import importlib.metadata as metadata
    import platform

    import torch

    names = (
        "numpy triton sentencepiece zstandard constriction matplotlib scipy pytest flash_attn "
        "flash_attn_interface"
    )
    versions = {}
    for name in names.split():
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    ctx.put(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
            cores=os.cpu_count(), packages=versions,
            missing=[name for name in names.split() if name not in versions])  # fmt: skip
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        ctx.put(gpu=torch.cuda.get_device_name(), gpus=torch.cuda.device_count(), free_mib=free >> 20,
                total_mib=total >> 20, capability=torch.cuda.get_device_capability(),
                cudnn=torch.backends.cudnn.version())  # fmt: skip

    def seconds(function: Callable[[], Any], repeats: int) -> float:
        for _ in range(3):
            function()
        torch.cuda.synchronize() if on_gpu else None
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        torch.cuda.synchronize() if on_gpu else None
        return (time.perf_counter() - began) / repeats

    n, elements, repeats = (8192, 1 << 30, 10) if on_gpu else (256, 1 << 20, 2)
    x = torch.randn(n, n, device=device, dtype=dtype)
    ctx.put(matmul_tflops=2 * n**3 / seconds(lambda: x @ x, repeats) / 1e12)
    source, target = (
        torch.ones(elements, device=device, dtype=dtype),
        torch.empty(elements, device=device, dtype=dtype),
    )
    ctx.put(copy_tb_s=2 * source.nbytes / seconds(lambda: target.copy_(source), repeats) / 1e12)
    ctx.put(attention=attention_choices(device, dtype))


def attention_choices(device: Any, dtype: Any) -> dict[str, str]:
    """Return the attention backend that torch picks for the recipe's shapes, in 16 bits and in float32."""
    import torch

    chosen = {}
    for kind in dict.fromkeys((dtype, torch.float32)):
        q, k, v = (torch.randn(2, heads, 256, 64, device=device, dtype=kind) for heads in (8, 4, 4))
        with suppress(RuntimeError, AttributeError, TypeError):  # private torch function
            number = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
            chosen[str(kind)] = torch.nn.attention.SDPBackend(number).name
    return chosen


def part_step_compiled(ctx: Context) -> None:
    """Time a whole published step, compiled, with its lower bound and its breakdown by region."""
    bench(ctx, "compiled", "floors,step,profile", "compiled", "--steps", "8")


def part_step_plain(ctx: Context) -> None:
    """Time a whole published step in plain torch."""
    bench(ctx, "plain", "step,profile", "plain", "--steps", "8")


def part_quantization(ctx: Context) -> None:
    """Measure bytes against bits per byte: the weights, then the artifact at several target losses."""
    import torch

    tg, _ = load_modules()
    environ = ctx.environ()
    config, _, _ = tg.load_config(environ)
    device = tg.start_ranks(config, {})
    _, kernel, _ = tg.choose_attention(config.attention, device)
    table = tg.load_byte_table(config.tokenizer_path, config.vocab_size)
    path = next((path for path in ctx.weights_paths() if path.exists()), None)
    if path is None:
        raise PartFailed("no final_model.pt on this machine. Run the training part again.")
    model = tg.GPT(config, tg.compute_dtype(device), kernel, table.has_leading_space)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    state = model.to(device).state_dict()
    tokens = tg.read_validation(config, table, tg.sha256_file(config.tokenizer_path))[0][: 1 << 18]
    plan = [tg.Chunk(tg.sliding_windows(len(tokens), config.eval_seq_len, config.eval_seq_len))]
    stream = tg.TokenStream(config.shards("train"), config.vocab_size)
    run = SimpleNamespace(config=config, train=stream, device=device)

    def bpb(scored: Any) -> float:
        return tg.score(scored, tokens, plan, table, config.eval_batch_seqs).val_bpb

    base = bpb(model)
    ctx.put(weights_bpb=base, targets=len(tokens) - 1, curve=[])
    statistics = tg.read_statistics(run, model)
    for loss in (1e-3,) if ctx.rehearse else (1e-3, 3e-4, 3e-3, 1e-2):
        settings = tg.replace(config, quant_steps="two_sided", quant_loss=loss)
        began = time.perf_counter()
        blob = tg.encode_artifact(settings, tg.quantize_state_dict(state, statistics, settings), "0" * 64)
        seconds = time.perf_counter() - began
        artifact = Path(ctx.work) / "curve.int6.ptz"
        artifact.write_bytes(blob)
        again = tg.load_model(tg.read_artifact(artifact), device, kernel, table.has_leading_space)
        point = dict(quant_loss=loss, bytes=len(blob), gap_bpb=bpb(again) - base, seconds=seconds)
        ctx.put(curve=[*ctx.result["curve"], point])


def part_documents(ctx: Context) -> None:
    """Time a compiled step with attention within documents."""
    bench(ctx, "documents", "step", "compiled", "--steps", "5", DOC_BORDERS="attention")


def part_autotuned(ctx: Context) -> None:
    """Time a step with the compiler's own matrix products autotuned."""
    bench(ctx, "autotuned", "step", "autotuned", "--steps", "8")


def slots_setup(ctx: Context, model: Path, **settings: str) -> tuple[Any, Any, Any, Any]:
    """Return the modules, a per-document evaluation setup of a model, and the text to time it on."""
    tg, ev = load_modules()
    environ = ctx.environ(MODEL_PATH=str(model), **{**DOC_BANKS, **tiny_evaluation(ctx), **settings})
    config, given, _ = tg.load_config(environ)
    setup, tokens, *_ = ev.prepare(config, given, {})
    return tg, ev, setup, tokens[: 2000 if ctx.rehearse else 200_000]


def throughput(tokens: Any, score: Any) -> dict[str, float]:
    rate = (len(tokens) - 1) / score.seconds
    return dict(val_bpb=score.val_bpb, targets_per_second=rate, full_seconds=full_seconds(rate))


def part_slots(ctx: Context) -> None:
    """Measure targets per second of per-document adaptation by number of slots, in plain torch."""
    tg, ev, setup, tokens = slots_setup(ctx, ctx.model(), USE_COMPILE="0")
    for number, count in enumerate((2, 4) if ctx.rehearse else (16, 32, 64, 8)):
        changed = tg.replace(setup, config=tg.replace(setup.config, ttt_slots=count))
        if not number:
            ev.evaluate(changed, tokens[: max(len(tokens) // 20, setup.config.eval_seq_len + 1)])  # warm-up
        ctx.put(**{f"slots {count}": throughput(tokens, ev.evaluate(changed, tokens))})


def part_slots_compiled(ctx: Context) -> None:
    """Measure the same compiled; compile time is reported separately."""
    tg, ev, setup, tokens = slots_setup(ctx, ctx.model(), USE_COMPILE="0" if ctx.rehearse else "1")
    if ctx.rehearse:  # trace only, no code generation
        import torch

        traced = torch.compile(tg.token_nll, dynamic=False, fullgraph=True, backend="eager")
        setup = tg.replace(setup, nll_fn=traced)
    began = time.perf_counter()
    ev.warm_up(setup)
    ctx.put(warm_up_seconds=time.perf_counter() - began)
    ctx.put(**throughput(tokens, ev.evaluate(setup, tokens)))


# ------------------------------------------------------------------------------------------------------------
# Table of parts
# ------------------------------------------------------------------------------------------------------------


def own_code(function: Callable) -> list[str]:
    """Return the source of a function and of the functions and constants of this file that it uses."""
    seen: dict[str, str] = {}

    def visit(name: str, value: Any) -> None:
        if name in seen or not (inspect.isfunction(value) or isinstance(value, str | int | dict)):
            return
        code = value.__code__ if inspect.isfunction(value) else None
        if code is not None and value.__module__ != __name__:
            return
        seen[name] = repr(value) if code is None else inspect.getsource(value)
        pending = [code] if code is not None else []
        while pending:
            block = pending.pop()
            pending += [constant for constant in block.co_consts if inspect.iscode(constant)]
            for used in block.co_names:
                visit(used, globals().get(used))

    visit(function.__name__, function)
    return [f"{name}={seen[name]}" for name in sorted(seen) if not name.startswith("__")]


class Part(NamedTuple):
    """A part: `run` in its own process, at most `limit` seconds, `expected` seconds on an H100.

    `files`: a kept result is valid while their content is unchanged. `needs`: model (artifact or weights) or
    weights. `spare`: starts only if the parts after it still have time. `beside`: may run while that part
    compiles. `fallback`: runs only if that part left no model.
    """

    name: str
    kind: str
    run: Callable[[Context], None]
    limit: float
    expected: float
    files: tuple[str, ...]
    needs: str = ""
    spare: bool = False
    beside: str = ""
    fallback: str = ""

    @property
    def title(self) -> str:
        return (inspect.getdoc(self.run) or "").split("\n")[0]

    def digest(self, data: str = "") -> str:
        """Return a hash of the part's files, code, settings and data."""
        hashed = hashlib.sha256("\0".join([data, *own_code(self.run)]).encode())
        for name in self.files:
            hashed.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
        return hashed.hexdigest()[:16]


TRAINER, EVALUATOR, BENCH = "train_gpt.py", "eval_ttt.py", "tests/benchmarks/gpu.py"
PARTS = (
    Part("train", "a", part_train, 360, 260, (TRAINER, RECIPE)),
    Part("train_plain", "a", part_train_plain, 240, 180, (TRAINER, RECIPE), fallback="train"),
    Part("adapt", "a", part_adapt, 150, 100, (TRAINER, EVALUATOR, RECIPE), needs="model"),
    Part("chunk_sgd", "a", part_chunk_sgd, 90, 40, (TRAINER, EVALUATOR, RECIPE), needs="model", spare=True),
    Part("doc_lora", "a", part_doc_lora, 110, 60, (TRAINER, EVALUATOR, RECIPE), needs="model", spare=True),
    Part("meta", "a", part_meta, 520, 420, (TRAINER, EVALUATOR, RECIPE), needs="model", spare=True),
    Part("probe", "b", part_probe, 45, 10, (), beside="train"),
    Part("kernels", "b", part_kernels, 80, 40, (TRAINER, BENCH, "tests/test_model.py"), beside="train"),
    Part("losses", "b", part_losses, 100, 35, (TRAINER, BENCH, RECIPE)),
    Part("ranks", "b", part_ranks, 40, 5, (), beside="train"),
    Part("resume", "b", part_resume, 90, 40, (TRAINER, TINY)),
    Part("step_compiled", "c", part_step_compiled, 110, 60, (TRAINER, BENCH, RECIPE)),
    Part("step_plain", "c", part_step_plain, 90, 45, (TRAINER, BENCH, RECIPE)),
    Part("quantization", "d", part_quantization, 80, 35, (TRAINER, RECIPE), needs="weights"),
    Part("documents", "e", part_documents, 110, 60, (TRAINER, BENCH, RECIPE)),
    Part("autotuned", "e", part_autotuned, 200, 120, (TRAINER, BENCH, RECIPE)),
    Part("slots", "e", part_slots, 120, 60, (TRAINER, EVALUATOR, RECIPE), needs="model"),
    Part("slots_compiled", "e", part_slots_compiled, 260, 160, (TRAINER, EVALUATOR, RECIPE), needs="model"),
)


def run_part(part: Part, context_path: Path) -> None:
    """Run a part in the child process: read the context, fail on purpose if rehearsed, run."""
    ctx = Context(**json.loads(context_path.read_text()))
    site = str(Path(ctx.work) / "site")
    sys.path.insert(0, site)
    if ctx.break_how == "crash":
        raise PartFailed("broken on purpose")
    if ctx.break_how == "hang":  # with a child in its own session that ignores SIGTERM
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
        subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)
        time.sleep(3600)
    part.run(ctx)


def context_json(ctx: Context) -> str:
    return json.dumps(asdict(ctx))
