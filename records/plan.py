"""Lay out the seeds of a recipe in the time and money given, and write the script that runs them.

    python records/launch.py plan records/recipes/pr1019.env --gpus 8 --hours 2 --price 2.50 --budget 50
    python records/launch.py plan records/recipes/pr1019.env --preflight runs/plan_pr1019/preflight.log
    python records/launch.py plan records/recipes/pr1019.env --script plan.sh

Durations are estimates: what one H100 took (records/benchmarks/2026-11-27_gpu_h100.json), divided by the
number of GPUs and scaled by FLOPs per token. What a preflight on the machine measured replaces them. Settings
in the environment override the recipe, as in train_gpt.py, and go into the script. The script skips steps
whose result exists, resumes an interrupted training, and stops when a step fails; records/guide/eight_gpus.md
walks through it.
Exit codes: 0 the plan fits, 1 it does not (what to drop is printed), 2 user error.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from launch import ROOT, Crash, trainer
from runfiles import escape_lines, read_object, write_file

sys.path.insert(0, str(ROOT / "data"))
from files import check_form, parse_json, read_file
from formats import PUBLISHED

MEASURED = ROOT / "records/benchmarks/2026-11-27_gpu_h100.json"
MEASURED_RECIPE = ROOT / "records/recipes/pr1019.env"
# Seconds of a compiled first step, with a filled cache (`MEASURED`) and an empty one (the same machine,
# 2026-11-27_rates_h100.json).
CACHED_SHARE = 6.50 / 37.95
CACHE = "runs/compile_cache"
PREFLIGHT_SECONDS = 90.0  # gpu_minutes.py --preflight stops itself then
TRAIN_SHARDS, SHARD_BYTES = 80, 200_001_024  # of published exports, 100 M tokens each
AUDIT_PARTS = 94  # times AUDIT_TOKENS: 30 by the checks, 32 on average by each of two fresh runs
AUDIT_STARTS = 3
CHECKPOINTS = 8  # per run
DISK_BYTES_PER_SECOND = 5e8  # assumed, for checkpoints
RECORD_SEEDS = 3
PACK_SECONDS = 5.0
CHECK_SECONDS = 60.0  # assumed, of check.py and of submit.py for one run
LOG_BYTES = 1 << 28  # of a log of the script
OF_ONE_RUN = ("seed", "run_id", "resume", "checkpoint_every", "model_path")  # set by the script


class Part(NamedTuple):
    """Part of a step: seconds, and where that number is from."""

    name: str
    seconds: float
    source: str


class Step(NamedTuple):
    """Step of the script. It is done if a line of `result` matches `pattern`; empty: if the file exists."""

    name: str
    parts: list[Part]
    command: str
    result: str
    pattern: str = ""
    settings: Mapping[str, str] = {}

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def is_done(self) -> bool:
        """Whether the script would skip it, as `finished` there says."""
        path = Path(self.result)
        if not path.exists() or not self.pattern:
            return path.exists()
        return bool(re.search(self.pattern, read_file(path, LOG_BYTES).decode(errors="replace"), re.M))


class Case(NamedTuple):
    """What is planned. `targets`: of the validation text. `preflight`: its measurements, or empty.
    `flops`: FLOPs per token relative to MEASURED_RECIPE. `given`: settings that override the recipe."""

    recipe: Path
    config: Any
    gpus: int
    seeds: Sequence[int]
    targets: int
    flops: float
    parameters: float
    preflight: Mapping[str, Any]
    given: Mapping[str, str]
    setup_minutes: float
    download_mb_s: float

    @property
    def folder(self) -> str:
        return f"runs/plan_{self.recipe.stem}"

    @property
    def packed(self) -> str:
        """Folder of the programs that train, score, and ship: what is counted is what is submitted."""
        return f"{self.folder}/packed"

    @property
    def adapts(self) -> bool:
        return self.config.ttt_mode != "none"


# ------------------------------------------------------------------------------------------------------------
# Durations
# ------------------------------------------------------------------------------------------------------------


@cache
def h100() -> dict[str, Any]:
    """Results of the parts of `MEASURED`, each with the seconds of its whole process as `process_seconds`."""
    parts = read_object(MEASURED, "parts")["parts"]
    return {name: part["result"] | dict(process_seconds=part["seconds"])
            for name, part in parts.items() if part["state"] == "ok"}  # fmt: skip


def measured_part(config: Any) -> str:
    """Name of the measured adaptation that is most like TTT_MODE."""
    mode = trainer().TTT_MODES[config.ttt_mode]
    if not mode.by_documents:
        return "chunk_sgd"
    return "doc_lora" if mode.adapts == "adapters" else "adapt"


def ms_per_step(case: Case) -> Part:
    """Milliseconds of a training step, as the `seconds` of a Part."""
    if found := case.preflight:
        return Part("ms_per_step", found["ms_per_step"], "preflight")
    step, tokens = h100()["step_compiled"]["step_compiled"], case.config.train_batch_tokens
    ms = tokens / step["tokens_per_second"] * 1000 * case.flops / case.gpus
    return Part("ms_per_step", ms, "one H100, at the same FLOP/s on each GPU and no time for communication")


def steps_on_clock(case: Case) -> tuple[int, float]:
    """Training steps, and the seconds of the contest clock, which includes the export's statistics."""
    c, ms, train = case.config, ms_per_step(case).seconds, h100()["train"]
    statistics = (train["train_seconds"] - train["curve"][-1][1]) * case.flops / case.gpus
    statistics = case.preflight.get("statistics_seconds", statistics)
    steps = c.iterations
    if c.max_wallclock_seconds:
        steps = min(steps, int(1000 * max(c.max_wallclock_seconds - statistics, 0) / ms))
    return steps, steps * ms / 1000 + statistics


def sliding(case: Case) -> Part:
    train, adapt = h100()["train"], h100()["adapt"]
    seconds = train["eval_seconds"] * case.targets / adapt["targets"] * case.flops / case.gpus
    found = case.preflight.get("sliding_seconds")
    return Part("sliding", found or seconds, "preflight" if found else "one H100, targets per second")


def train_parts(case: Case, first: bool) -> list[Part]:
    """Parts of training one seed; only the first one compiles."""
    c, train, (steps, clock) = case.config, h100()["train"], steps_on_clock(case)
    found, window = case.preflight, sliding(case)
    compiling = train["compile_seconds"] * (1 if first else CACHED_SHARE)
    whole_text = window.seconds * c.eval_stride / c.eval_seq_len  # one pass of non-overlapping windows
    passes = 1 + (steps // c.val_loss_every + 1 if c.val_loss_every else 0)
    blob = 16 * case.parameters * train["model_params"]  # weights, average, optimizer: 4 float32
    export = train["export_seconds"] * case.parameters
    export *= (3.5 if c.quant_trellis else 1.0) * (12 if c.fit_size else 1)
    return [
        Part("start", train["start_seconds"], "one H100"),
        Part("compile" if first else "cached compile", compiling,
             "one H100" if first else "one H100, first step with a filled cache to one with an empty cache"),
        Part("contest clock", clock, ms_per_step(case).source),
        Part("validation", passes * whole_text, window.source),
        Part("checkpoints", CHECKPOINTS * blob / DISK_BYTES_PER_SECOND, "assumed: 0.5 GB/s; off the clock"),
        Part("export", found.get("export_seconds", export), "preflight" if found else
             "one H100, by parameters; 3.5 times with a trellis, 12 passes with FIT_SIZE"),
        window._replace(name="score"),
    ]  # fmt: skip


def evaluation_parts(case: Case) -> list[Part]:
    """Parts of the evaluation of one seed. EVAL_BUDGET_SECONDS limits the first two."""
    c, name, parts = case.config, measured_part(case.config), h100()
    like, chunks, window = parts[name], parts["chunk_sgd"], sliding(case)
    by_documents = trainer().TTT_MODES[c.ttt_mode].by_documents
    ranks = min(case.gpus, c.ttt_groups) if by_documents else case.gpus
    adapted = case.targets / like["targets_per_second"] * case.flops / ranks
    source = f"one H100, part {name}"
    shapes = ("ttt_chunk_size", "ttt_slots", "ttt_context") if by_documents else ("ttt_chunk_tokens",)
    differing = [
        f"{key.upper()}={getattr(c, key)} (measured: {like['settings'][key]})"
        for key in ("ttt_mode", "ttt_optimizer", "ttt_epochs", *shapes)
        if getattr(c, key) != like["settings"][key]
    ]
    source += f"; rate not measured for {', '.join(differing)}" if differing else ""
    found = case.preflight.get("adapted_seconds")
    # after the adapted score: sliding windows, then, by documents, the same windows without adaptation
    after = chunks["process_seconds"] - chunks["eval_seconds"]
    plan = (like["process_seconds"] - like["eval_seconds"] - after) if by_documents else 0.0
    plan *= case.targets / like["targets"] * case.flops / ranks
    reports = after - parts["train"]["eval_seconds"]
    return [
        Part("start and prior", like["eval_seconds"] - like["score_seconds"], f"one H100, part {name}"),
        Part("adapted", found or adapted, "preflight" if found else source),
        window,
        Part("unadapted windows", plan, "one H100, by difference"),
        Part("reports", reports, "one H100, by difference"),
    ]


def audit_part(case: Case) -> Part:
    """The audit runs in one process, so one GPU works and the others wait."""
    like = h100()[measured_part(case.config)]
    targets = AUDIT_PARTS * min(case.config.audit_tokens, case.targets)
    seconds = AUDIT_STARTS * (like["eval_seconds"] - like["score_seconds"])
    seconds += targets / like["targets_per_second"] * case.flops
    return Part("audit", seconds, f"{AUDIT_PARTS} times AUDIT_TOKENS at the rate of one H100")


# ------------------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------------------


def setup_steps(case: Case) -> Iterator[Step]:
    """Environment and data; seconds are 0 if the result is here already."""
    if case.setup_minutes:
        yield Step("environment", [Part("install", 60 * case.setup_minutes, "assumed: --setup-minutes")],
                   "make .venv/ready", ".venv/ready")  # fmt: skip
    folder = Path(case.config.data_path)
    if folder == Path("data/demo"):
        yield Step("data", [Part("corpus", 6.0, "two CPU cores")],
                   "python data/demo.py --out data/demo", "data/demo/manifest.json")  # fmt: skip
    elif folder.name.startswith("fineweb10B_"):
        variant = export_name(folder.name.removeprefix("fineweb10B_"))
        size = TRAIN_SHARDS * SHARD_BYTES + 2 * case.targets
        source = f"{size / 1e9:.1f} GB; assumed: --download-mb-s {case.download_mb_s:g}"
        yield Step("data", [Part("download", size / 1e6 / case.download_mb_s, source)],
                   f"python data/download.py --variant {variant} --train-shards {TRAIN_SHARDS}",
                   f"{folder}/source.json")  # fmt: skip


def export_name(variant: str) -> str:
    """Name that data/download.py --variant takes for a published folder fineweb10B_`variant`."""
    from download import EXPORTS  # takes a second: huggingface_hub

    return next((name for name, export in EXPORTS.items() if export.variant == variant), variant)


def seed_steps(case: Case, seed: int, first: bool) -> Iterator[Step]:
    """Train, evaluate with adaptation, and audit one seed. Without adaptation the trainer's score counts."""
    name = f"{case.recipe.stem}_seed{seed}"
    folder, every = f"runs/{name}", max(1, steps_on_clock(case)[0] // CHECKPOINTS)
    settings = dict(SEED=str(seed), RUN_ID=name, RESUME="auto", CHECKPOINT_EVERY=str(every))
    yield Step(f"train_seed{seed}", train_parts(case, first), f"launch {case.packed}/train_gpt.py",
               f"{folder}/result.json", '^ "fits": true', settings)  # fmt: skip
    if not case.adapts:
        return
    settings = dict(MODEL_PATH=f"{folder}/final_model.int6.ptz")
    certificate = f"{folder}/eval/{case.config.ttt_mode}/certificate.json"
    if case.config.use_compile == "auto":
        settings["USE_COMPILE"] = "0"  # as measured: many shapes, each used a few times
    yield Step(f"evaluate_seed{seed}", evaluation_parts(case), f"launch {case.packed}/eval_ttt.py",
               f"{folder}/eval_ttt.json", '^ "fits_budget": true', settings)  # fmt: skip
    yield Step(f"audit_seed{seed}", [audit_part(case)], f"python {case.packed}/eval_ttt.py --audit",
               certificate, '^ "legal": true', settings)  # fmt: skip


def steps_of(case: Case) -> list[Step]:
    """All steps in order."""
    preflight = Step("preflight", [Part("preflight", PREFLIGHT_SECONDS, "its own limit")],
                     "launch tests/benchmarks/gpu_minutes.py --preflight",
                     f"{case.folder}/preflight.log", "^all limits will be kept")  # fmt: skip
    pack = Step("pack", [Part("pack", PACK_SECONDS, "two CPU cores")],
                f"python records/pack.py --out {case.packed}", f"{case.packed}/eval_ttt.py")  # fmt: skip
    steps = [*setup_steps(case), preflight, pack]
    for number, seed in enumerate(case.seeds):
        steps += seed_steps(case, seed, first=number == 0)
    checking = Part("check", CHECK_SECONDS, "assumed")
    for seed in case.seeds:
        folder = f"runs/{case.recipe.stem}_seed{seed}"
        steps.append(Step(f"check_seed{seed}", [checking], f"python records/check.py {folder}",
                          f"{case.folder}/check_seed{seed}.log", ": 0 faults,"))  # fmt: skip
    if len(case.seeds) >= RECORD_SEEDS:
        folders = " ".join(f"runs/{case.recipe.stem}_seed{seed}" for seed in case.seeds)
        command = (f'python records/submit.py {folders} --name "${{NAME:?}}" --author "${{AUTHOR:?}}" '
                   '--github "${GITHUB_ID:?}" --what "${WHAT:?}"')  # fmt: skip
        steps.append(Step("submit", [checking._replace(seconds=len(case.seeds) * CHECK_SECONDS)], command,
                          f"{case.folder}/submit.log", ": 0 faults,"))  # fmt: skip
    done = [Part("done already", 0.0, "its result is here")]
    return [step._replace(parts=done) if step.is_done() else step for step in steps]


def droppable(case: Case, steps: Sequence[Step]) -> list[tuple[str, float]]:
    """What can be left out, the least loss first: (advice, seconds saved)."""

    def total(*prefixes: str) -> float:
        return sum(step.seconds for step in steps if step.name.startswith(prefixes))

    last = f"seed{case.seeds[-1]}"
    return [
        ("install and download on a cheap machine, to a volume that the GPUs mount later",
         total("environment", "data")),
        ("check and submit on another machine: they need no GPU", total("check", "submit")),
        ("audit later on one GPU: copy runs/ there", total("audit")),
        ("no adaptation: TTT_MODE=none, the sliding score counts", total("evaluate")),
        *([(f"{last}: {len(case.seeds) - 1} seeds are no record", total(f"train_{last}"))]
          if len(case.seeds) > 1 else []),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def table(case: Case, steps: Sequence[Step]) -> Iterator[str]:
    """Lines: when each step starts and ends, its parts in seconds, and the source of each number."""
    count, on_clock = steps_on_clock(case)
    ms = ms_per_step(case)
    yield (f"{len(case.seeds)} seeds of {case.recipe.name} on {case.gpus} GPUs: {count:,} steps of "
           f"{ms.seconds:.1f} ms, {on_clock:.0f} s on the contest clock")  # fmt: skip
    yield f"{'start':>8} {'end':>8} {'seconds':>8}  step"
    now = 0.0
    for step in steps:
        parts = ", ".join(f"{part.name} {part.seconds:.0f}" for part in step.parts if part.seconds >= 0.5)
        yield f"{clock(now):>8} {clock(now + step.seconds):>8} {step.seconds:8.0f}  {step.name}: {parts or 0}"
        now += step.seconds
    yield "where the seconds are from (estimates, unless a preflight measured them):"
    sources = {(part.name, part.source): None for step in steps for part in step.parts}
    yield from (f"  {name}: {source}" for name, source in sources)


def problems(case: Case, steps: Sequence[Step], limit: float, price: float, budget: float) -> Iterator[str]:
    """What does not fit, and what to drop."""
    c, total = case.config, sum(step.seconds for step in steps)
    evaluation = sum(part.seconds for part in evaluation_parts(case)[:2]) if case.adapts else 0.0
    if 0 < c.eval_budget_seconds < evaluation:
        yield (f"evaluation: {evaluation:.0f} s of a seed, EVAL_BUDGET_SECONDS={c.eval_budget_seconds:.0f}. "
               f"Estimated to fit: {', '.join([*other_modes(case), 'TTT_MODE=none 0 s'])}")  # fmt: skip
    if case.adapts and trainer().TTT_MODES[c.ttt_mode].by_documents and c.ttt_groups < case.gpus:
        yield (f"evaluation: TTT_GROUPS={c.ttt_groups} leaves {case.gpus - c.ttt_groups} of {case.gpus} "
               f"GPUs without work. Set TTT_GROUPS={case.gpus}.")  # fmt: skip
    affordable = 3600 * budget / (price * case.gpus) if budget and price else math.inf
    cost = total / 3600 * case.gpus * price
    over = {f"time: {clock(total)} of {clock(limit)}": limit,
            f"money: {cost:.2f} of {budget:.2f}": affordable}  # fmt: skip
    yield from (text for text, allowed in over.items() if total > allowed)
    allowed = min(over.values())
    if total <= allowed:
        return
    yield "drop, in this order, until it fits:"
    for advice, saved in droppable(case, steps):
        if saved and total > allowed:
            total -= saved
            yield f"  {advice}: {clock(saved)} less, {clock(total)}{', fits' if total <= allowed else ''}"
    if total > allowed:
        yield "  even then it does not fit"


def other_modes(case: Case) -> Iterator[str]:
    """Measured kinds of adaptation whose score is estimated to fit into EVAL_BUDGET_SECONDS."""
    for mode, recipe in (("all", ", by SGD as in pr549.env,"), ("doc_banks", ""), ("doc_lora", "")):
        other = case._replace(config=replace(case.config, ttt_mode=mode), preflight={})
        seconds = sum(part.seconds for part in evaluation_parts(other)[:2])
        if seconds <= case.config.eval_budget_seconds:
            yield f"TTT_MODE={mode}{recipe} {seconds:.0f} s"


SCRIPT = """\
#!/usr/bin/env bash
# {title}
# Written by {command}
# bash FILE [STEP], in the root folder of the repository; it stops after STEP. Started again, it skips
# finished steps and resumes an interrupted training. To start programs in another way, export a function
# `launch`.
set -euo pipefail
last=${{1:-}}
[ -f train_gpt.py ] || {{ echo "error: train_gpt.py is not here: $PWD. Go to the repository." >&2; exit 2; }}
PATH=$PWD/.venv/bin:$PATH
mkdir -p {folder} {cache}
{exports}
declare -F launch > /dev/null || launch() {{ torchrun --standalone --nproc_per_node={gpus} "$@"; }}

finished() {{ [ -e "$1" ] && {{ [ -z "$2" ] || grep -q -e "$2" "$1"; }}; }}

step() {{  # NAME RESULT PATTERN COMMAND...: run the command, unless a line of the file RESULT has PATTERN
    local name=$1 result=$2 pattern=$3
    shift 3
    if finished "$result" "$pattern"; then
        echo "[$(date +%T)] skip $name: $result is there"
    else
        echo "[$(date +%T)] start $name"
        if ! "$@" 2>&1 | tee -i "{folder}/$name.log" || ! finished "$result" "$pattern"; then
            echo "[$(date +%T)] FAILED $name: see {folder}/$name.log. The same command continues here." >&2
            exit 1
        fi
    fi
    [ "$name" != "$last" ] || exit 0
}}

{steps}
echo "[$(date +%T)] all steps are done"
"""


def script(case: Case, steps: Sequence[Step], argv: Sequence[str]) -> str:
    """The shell script of `steps`."""
    lines = []
    for step in steps:
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in step.settings.items())
        words = f"step {step.name} {shlex.quote(step.result)} {shlex.quote(step.pattern)} {step.command}"
        lines.append(f"{settings} \\\n    {words}" if settings else words)
        if step.name == "submit":
            advice = "to submit: set NAME, AUTHOR, GITHUB_ID and WHAT, and start this again"
            lines[-1] = f'if [ -n "${{NAME:-}}" ]; then\n    {words}\nelse\n    echo "{advice}"\nfi'
    exports = dict(RECIPE=shlex.quote(str(case.recipe)))
    exports |= {name: shlex.quote(value) for name, value in case.given.items()}
    exports |= dict(
        TORCHINDUCTOR_CACHE_DIR=f'"$PWD/{CACHE}/inductor"', TRITON_CACHE_DIR=f'"$PWD/{CACHE}/triton"'
    )
    seconds = sum(step.seconds for step in steps)
    return SCRIPT.format(
        title=f"{len(case.seeds)} seeds of {case.recipe.name} on {case.gpus} GPUs, about {clock(seconds)}",
        command=f"records/launch.py plan {shlex.join(argv)}", folder=case.folder, cache=CACHE,
        exports="\n".join(f"export {name}={value}" for name, value in exports.items()), gpus=case.gpus,
        steps="\n".join(lines),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def read_preflight(path: Path, config: Any, gpus: int) -> dict[str, Any]:
    """Measurements in a preflight's log or in its JSON. ValueError if they are of another run or machine."""
    try:
        lines = read_file(path, LOG_BYTES).splitlines()
        logged = [line.removeprefix(b"PREFLIGHT ") for line in lines if line.startswith(b"PREFLIGHT ")]
        found = parse_json(logged[-1] if logged else b"\n".join(lines), {}, path)
        keys = ["processes", "train_batch_tokens", "flops_per_token", "ms_per_step", "statistics_seconds",
                "export_seconds", "sliding_seconds"]  # fmt: skip
        keys += ["adapted_seconds"] if config.ttt_mode != "none" else []
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"it lacks {', '.join(missing)}. Give it more time: --preflight-seconds")
        check_form(found, dict.fromkeys(keys, float), path)
        if low := [key for key in keys if not found[key] > 0]:
            raise ValueError(f"{', '.join(low)}: not above 0")
    except ValueError as error:
        raise ValueError(f"--preflight {path}: no measurements of a finished preflight: {error}") from error
    wanted = dict(processes=gpus, train_batch_tokens=config.train_batch_tokens, flops_per_token=flops(config))
    if other := [
        f"{key} is {found[key]}, here {value}" for key, value in wanted.items() if found[key] != value
    ]:
        raise ValueError(f"--preflight {path}: it measured another run: {'; '.join(other)}")
    return found


def flops(config: Any) -> int:
    return trainer().project_module("describe").flops_per_token(config)


def validation_targets(config: Any) -> int:
    """Targets of the validation text: of the shards if they are here, else as published."""
    tg = trainer()
    if any(Path(config.data_path).glob("fineweb_val_*.bin")):
        return len(tg.TokenStream(config.shards("val"), config.vocab_size)) - 1
    name = export_name(Path(config.data_path).name.removeprefix("fineweb10B_")).replace("_", " ")
    for known in PUBLISHED:
        if known.name == name:
            return known.tokens - 1
    raise ValueError(f"DATA_PATH={config.data_path}: no validation shards, and no published export of this "
                     "name. Prepare the data first.")  # fmt: skip


def make_case(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Case:
    """Read recipe, settings and preflight. ValueError for what the user can get wrong."""
    tg, recipe = trainer(), arguments.recipe
    if not recipe.is_file():
        raise ValueError(f"{recipe}: no such recipe")
    own = {field.name.upper() for field in fields(tg.Config)} - {name.upper() for name in OF_ONE_RUN}
    given = {name: value for name, value in environ.items() if name in own}
    config, _, _ = tg.load_config({**given, "RECIPE": str(recipe)})
    base, _, _ = tg.load_config({"RECIPE": str(MEASURED_RECIPE)})
    if arguments.gpus < 1 or config.step_seqs % arguments.gpus:
        raise ValueError(f"--gpus {arguments.gpus}: must divide the {config.step_seqs} sequences of a step")
    if arguments.download_mb_s <= 0:
        raise ValueError(f"--download-mb-s {arguments.download_mb_s:g}: must be above 0")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(f"--seeds {','.join(map(str, arguments.seeds))}: a seed occurs twice")
    preflight = arguments.preflight and read_preflight(arguments.preflight, config, arguments.gpus)
    with tg.torch.device("meta"):
        sizes = [tg.count_parameters(tg.GPT(each)) for each in (config, base)]
    return Case(recipe, config, arguments.gpus, arguments.seeds, validation_targets(config),
                flops(config) / flops(base), sizes[0] / sizes[1], preflight or {}, given,
                arguments.setup_minutes, arguments.download_mb_s)  # fmt: skip


def amount(text: str) -> float:
    """Parse a number of hours, money or megabytes: from 0 to a million."""
    if not 0 <= (value := float(text)) <= 1e6:
        raise ValueError
    return value


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "launch.py plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="recipe, such as records/recipes/pr1019.env")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of all machines together (8)")
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--hours", type=amount, default=2.0, help="time limit, hours (2)")
    time.add_argument("--minutes", type=amount, help="time limit, minutes")
    parser.add_argument("--price", type=amount, default=0.0, help="price of a GPU-hour, any currency (0)")
    parser.add_argument(
        "--budget", type=amount, default=0.0, help="money to spend, same currency; 0: no limit"
    )
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")],
                        default=[1337, 42, 2025], help="comma list (1337,42,2025)")  # fmt: skip
    parser.add_argument("--preflight", type=Path, metavar="FILE",
                        help="log or JSON of gpu_minutes.py --preflight; replaces estimates")  # fmt: skip
    parser.add_argument("--setup-minutes", type=amount, default=5.0,
                        help="minutes to install the environment; 0: it is installed (5)")  # fmt: skip
    parser.add_argument("--download-mb-s", type=amount, default=100.0, help="download rate, MB/s (100)")
    parser.add_argument("--script", type=Path, metavar="FILE", help="write the commands as a shell script")
    return parser.parse_args(argv)


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    arguments = parse(argv)
    limit = 60 * arguments.minutes if arguments.minutes else 3600 * arguments.hours
    try:
        case = make_case(arguments, environ)
        steps = steps_of(case)
        found = list(problems(case, steps, limit, arguments.price, arguments.budget))
        if arguments.script:
            write_file(arguments.script, script(case, steps, argv).encode())
    except (ValueError, OSError, Crash) as error:
        print(f"error: {escape_lines(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(*table(case, steps), sep="\n")
    hours = sum(step.seconds for step in steps) / 3600
    print(f"total: {clock(3600 * hours)} of {clock(limit)}, {hours * case.gpus:.2f} GPU-hours, "
          f"{hours * case.gpus * arguments.price:.2f} at {arguments.price:.2f} per GPU-hour")  # fmt: skip
    for line in found:
        print(line if line.startswith((" ", "drop")) else f"DOES NOT FIT {line}")
    if arguments.script:
        print(f"script: {arguments.script}; start it with: bash {arguments.script}")
    return int(bool(found))
