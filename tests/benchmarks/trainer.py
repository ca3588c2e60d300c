"""Compare the demo recipe with plain transformers, or ablate its features one by one ("levers").

    python tests/benchmarks/trainer.py --out runs/bench_trainer     three arms, five seeds, 45 min on 2 cores
    python tests/benchmarks/trainer.py --quick                      five seconds of training per arm, one seed
    python tests/benchmarks/trainer.py --levers --out runs/levers   every lever separately, three seeds, hours
    python tests/benchmarks/trainer.py --levers --only frontier     those of #1855 and of modded-nanogpt alone
    python tests/benchmarks/trainer.py --levers --quick             four steps of a few levers, one seed
    python tests/benchmarks/trainer.py --meta                       time of plain steps and all meta-steps

Arms, trained for equal time: `levers`, the demo recipe; `plain`, all features off and the MLP widened to the
same parameter count; `narrow`, all features off and the same block matrices. Optimizers, data, export and
scoring are the same; then eval_ttt.py adapts each artifact per document. DIR/demo.json has all scores of
every run, and bytes and nats of every document.

With --levers, each arm is the recipe with one lever changed, trained for --steps steps and for the number of
steps that fit in the recipe's time. Step time is measured first, with all arms alternating in one process, as
CPU time of one thread. Scores come from complete runs with a fixed number of steps on one thread each, so
machine load and --workers do not change them. --data names another folder of shards with its tokenizer.model,
of 1,024 pieces.

With --meta, each kind of step is timed in its own process (for its peak memory) on the recipe's device; on a
CPU as CPU time of one thread.

Each run keeps its folder under --out; a finished run is not repeated. Ends with a table and one line `BENCH
{json}`; --levers also writes timing_STEPS.json, levers.json and levers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

RECIPE = {
    "RECIPE": str(ROOT / "records/recipes/demo.env"),
    "DATA_PATH": str(ROOT / "data/demo"),
    "TOKENIZER_PATH": str(ROOT / "data/demo/tokenizer.model"),
}
PLAIN = {
    "XSA_LAST_N": "0",
    "SMEAR_GATE": "0",
    "BIGRAM_VOCAB_SIZE": "0",
    "VE_ENABLED": "0",
    "UNET_SKIPS": "0",
    "RESID_MIX": "0",
    "LN_SCALE": "0",
    "ROPE_DIMS": "0",
    "QK_GAIN_INIT": "1",
    "MLP_LEAKY_SLOPE": "0",
    "LOGIT_SOFTCAP": "0",
    "KEY_OFFSET": "0",
}
DEMO_SEEDS = (21, 22, 23, 24, 25)  # fixed in advance, used for nothing else
SEEDS = (1337, 42, 2025)  # of the levers; the recipe was tuned on other seeds

SWA = {"SWA_ENABLED": "1", "SWA_EVERY": "5", "SWA_THRESHOLD": "0.2"}
LEVERS = {  # name -> changes to the recipe; first features that it lacks, then features that it has
    "relu2": {"MLP_LEAKY_SLOPE": "0"},
    "star_relu": {"STAR_RELU": "1", "MLP_LEAKY_SLOPE": "0"},
    "mlp_512": {"MLP_HIDDEN": "512"},
    "mha": {"NUM_KV_HEADS": "4"},
    "skip_gates": {"SKIP_GATES": "1"},
    "phase_resid_mix": {"PHASE_RESID_MIX": "1"},
    "linear_hash": {"BIGRAM_HASH": "linear"},
    "pos_conditional": {"POS_CONDITIONAL_BIGRAM": "1"},
    "word_start_boost": {"WORD_START_BOOST": "1"},
    "published_borders": {"DOC_BORDERS": "published"},
    "documents_apart": {"DOC_BORDERS": "attention"},
    "memory_tokens": {"NUM_MEMORY_TOKENS": "4"},
    "overtone": {"OVERTONE_INIT": "1"},
    "recurrence": {"NUM_LAYERS": "2", "BLOCK_ORDER": "0,1,0,1", "VE_LAYERS": "1"},  # VE in two of four layers
    "loop": {"BLOCK_ORDER": "0,1,2,1,2,3", "LOOP_START_FRAC": "0.35"},
    "mtp": {"MTP_NUM_HEADS": "1"},
    "zloss": {"ZLOSS_WEIGHT": "1e-4"},
    "decoder_lr": {"DECODER_LR_MULT": "2"},
    "cosine": {"WARMDOWN_SHAPE": "cosine"},
    "cautious_muon": {"CAUTIOUS_MUON": "1"},
    "ema_every_10": {"EMA_UPDATE_EVERY": "10"},
    "ema_and_swa": SWA,
    "swa": {"EMA_ENABLED": "0", **SWA},
    "late_qat": {"LATE_QAT": "1", "LATE_QAT_THRESHOLD": "0.15"},
    "prune": {"PRUNE_FRAC": "0.03"},
    "no_average": {"EMA_ENABLED": "0"},
    "no_xsa": {"XSA_LAST_N": "0"},
    "no_smear": {"SMEAR_GATE": "0"},
    "no_bigram": {"BIGRAM_VOCAB_SIZE": "0"},
    "no_ve": {"VE_ENABLED": "0"},
    "no_skips": {"UNET_SKIPS": "0"},
    "no_resid_mix": {"RESID_MIX": "0"},
    "no_ln_scale": {"LN_SCALE": "0"},
    "full_rotary": {"ROPE_DIMS": "0", "KEY_OFFSET": "0"},
    "no_softcap": {"LOGIT_SOFTCAP": "0"},
    "qk_gain_1": {"QK_GAIN_INIT": "1"},
    "untied": {"TIE_EMBEDDINGS": "0", "EMBED_LR": "0.035", "HEAD_LR": "0.035"},  # LR of the tied matrix
}
FRONTIER = {  # of #1855 and of modded-nanogpt, at the published values where the demo's size allows them
    "row_norm": {"MUON_ROW_NORM": "1"},
    "polar": {"MUON_COEFFS": "polar"},
    "normuon": {"NORMUON_BETA2": "0.95"},
    "cautious_wd": {"MUON_CAUTIOUS_WD": "1"},
    "ema_nesterov_3": {"EMA_NESTEROV_BETA": "0.3"},
    "ema_nesterov_6": {"EMA_NESTEROV_BETA": "0.6"},
    "tail_readout": {"EMA_EXPORT_SHARE": "0.6"},
    "prefix_loss": {"PREFIX_LOSS_WEIGHT": "0.25"},
    "mtp_one_head": {"MTP_WEIGHTS": "0.5,0.25"},
    "no_key_offset": {"KEY_OFFSET": "0"},
    "xsa_learned": {"XSA_LEARNED": "1"},
    "bigram_signs": {"BIGRAM_SIGNS": "1"},
    "attn_gate": {"ATTN_GATE": "12"},
    "smear_by_token": {"SMEAR_INPUTS": "12"},
    "two_lanes": {"PARALLEL_START_LAYER": "2"},
    "loop_shared": {"BLOCK_ORDER": "0,1,2,1,2,3", "LOOP_START_FRAC": "0.35", "LOOP_SHARED": "1"},
    "packed_rows": {"DATA_ORDER": "packed", "DOC_BORDERS": "attention"},
    "lr_floor": {"MIN_LR": "0.1", "MIN_LR_SHAPE": "floor"},
    "decays_1855": {"MUON_WD": "0.095", "EMBED_WD": "0.085", "SCALAR_WD": "0.02"},
}
DEPTHS = {
    f"depth_{L}": {"NUM_LAYERS": f"{L}", "XSA_LAST_N": f"{L}", "VE_LAYERS": f"{L - 2},{L - 1}"}
    for L in (10, 11, 13)
}
ARMS = {"recipe": {}, **LEVERS, **FRONTIER, **DEPTHS}
COPIES = 4  # timed copies of the recipe: their mean is its time, their spread is the noise
QUICK = ("prune", "depth_10")
# Settings that change values but no operation, so that a training step takes the same time.
FREE = {
    "MLP_LEAKY_SLOPE",
    "PHASE_RESID_MIX",
    "OVERTONE_INIT",
    "WARMDOWN_SHAPE",
    "PRUNE_FRAC",
    "LN_SCALE",
    "QK_GAIN_INIT",
    "MIN_LR",
    "MIN_LR_SHAPE",
    "MUON_WD",
    "EMBED_WD",
    "SCALAR_WD",
    "EMA_EXPORT_SHARE",
}
COLUMNS = (  # key of the result, format
    ("model_params", ",d"),
    ("steps", ",d"),
    ("step_avg_ms", ".1f"),
    ("bytes_model", ",d"),
    ("val_bpb_roundtrip", ".4f"),
    ("val_bpb_sliding", ".4f"),
    ("val_bpb_ttt", ".4f"),
)


def count_parameters(settings: dict[str, str]) -> int:
    config, _, _ = train_gpt.load_config(settings)
    with torch.device("meta"):
        return sum(p.numel() for p in train_gpt.GPT(config).parameters())


def make_arms() -> dict[str, dict[str, str]]:
    """Return the settings of each arm; MLP_MULT of `plain` best matches the recipe's parameter count."""
    target = count_parameters(RECIPE)
    widths = [f"{tenth / 10}" for tenth in range(10, 200)]
    width = min(widths, key=lambda m: abs(count_parameters({**RECIPE, **PLAIN, "MLP_MULT": m}) - target))
    return {"levers": {}, "plain": {**PLAIN, "MLP_MULT": width}, "narrow": dict(PLAIN)}


def without_settings() -> dict[str, str]:
    """The environment, less all that would be a setting of the programs."""
    names = {field.upper() for field in train_gpt.Config.__dataclass_fields__} | {"RECIPE"}
    return {k: v for k, v in os.environ.items() if k not in names}


def run_arm(
    name: str, settings: dict[str, str], seed: int, out: Path, extra: dict[str, str], adapt: bool = True
) -> dict:
    """Return the result of one run, trained and adapted now or found finished under `out`.

    With adapt, it includes val_bpb_plan and val_bpb_ttt of the evaluator, and `documents`: bytes, nats and
    adapted nats of each.
    """
    folder = out / "runs" / f"{name}_seed{seed}"
    env = {**without_settings(), **RECIPE, **settings, **extra, "SEED": str(seed), "RUN_ID": folder.name}
    programs = {"train_gpt.py": "result.json", **({"eval_ttt.py": "eval_ttt.json"} if adapt else {})}
    for program, made in programs.items():
        if (folder / made).exists():
            continue
        if made == "result.json":
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
        print(f"{name} seed {seed}: {program} ...", file=sys.stderr, flush=True)
        with open(out / f"{folder.name}.txt", "a") as log:
            command = [sys.executable, str(ROOT / program)]
            subprocess.run(command, env=env, cwd=out, check=True, stdout=log, stderr=subprocess.STDOUT)
    result = json.loads((folder / "result.json").read_text())
    if not adapt:
        return result
    adapted = json.loads((folder / "eval_ttt.json").read_text())
    rows = [
        line.split(",") for line in next(folder.glob("eval/*/documents.csv")).read_text().splitlines()[1:]
    ]
    documents = [[int(row[3]), float(row[4]), float(row[5])] for row in rows]
    return result | {k: adapted[k] for k in ("val_bpb_plan", "val_bpb_ttt")} | dict(documents=documents)


def compare_with_plain(quick: bool, out: Path) -> None:
    """Run the three arms, each for MAX_WALLCLOCK_SECONDS."""
    seeds, extra = (DEMO_SEEDS[:1], {"MAX_WALLCLOCK_SECONDS": "5"}) if quick else (DEMO_SEEDS, {})
    arms, results = make_arms(), {}
    for turn, seed in enumerate(seeds):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:  # alternating order cancels drift
            results[name, seed] = run_arm(name, arms[name], seed, out, extra)
    print(f"{'arm':8} {'seed':>6}" + "".join(f"{column:>18}" for column, _ in COLUMNS))
    for (name, seed), result in sorted(results.items()):
        print(f"{name:8} {seed:>6}" + "".join(f"{result[c]:>18{form}}" for c, form in COLUMNS))
    summary = {}
    for name in arms:
        scores = [results[name, seed]["val_bpb_sliding"] for seed in seeds]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        summary[name] = dict(mean=statistics.mean(scores), sd=spread, n=len(scores), settings=arms[name])
        print(
            f"{name:8} sliding bpb of the artifact: mean {summary[name]['mean']:.4f} sd {spread:.4f} n "
            f"{len(scores)}"
        )
    kept = ("seed model_params steps step_avg_ms train_seconds strict_seconds bytes_model val_bpb_roundtrip "
            "val_bpb_sliding val_bpb_plan val_bpb_ttt sha256_artifact sha256_code "
            "documents").split()  # fmt: skip
    rows = [
        dict(arm=name, **{key: result[key] for key in kept}) for (name, _), result in sorted(results.items())
    ]
    versions = results["levers", seeds[0]]["versions"]
    report = dict(benchmark="trainer", date=str(date.today()), quick=quick, arms=summary, versions=versions)
    text = json.dumps(report | dict(runs=rows)).replace('{"arm"', '\n{"arm"')
    (out / "demo.json").write_text(text + "\n")
    print("BENCH " + json.dumps(report))


# Levers: step time


class Kind(NamedTuple):
    """The optional work of a training step; steps of one kind take the same time."""

    looped: bool  # uses the whole BLOCK_ORDER
    rounded: bool  # late QAT: quantized banks
    ema: bool  # updates the EMA
    snapshot: bool  # takes a snapshot for SWA
    moved: bool  # moves the weights ahead (EMA-Nesterov)


def step_kinds(c: train_gpt.Config) -> dict[Kind, list[int]]:
    """Return the steps of a run by kind, with the conditions of train_gpt.training_phase."""
    kinds: dict[Kind, list[int]] = {}
    first, last = train_gpt.EMANesterov.ACTIVE
    for step in range(c.iterations):
        scale, (remaining, total) = (
            train_gpt.lr_scale(c, step, 0.0, 0.0),
            train_gpt.run_length(c, step, 0.0, 0.0),
        )
        done = 1 - remaining / total
        kind = Kind(
            looped=done >= c.loop_start_frac,
            rounded=c.late_qat and scale < c.late_qat_threshold,
            ema=c.ema_enabled and (step + 1) % c.ema_update_every == 0,
            snapshot=c.swa_enabled and scale < c.swa_threshold and (step + 1) % c.swa_every == 0,
            moved=c.ema_nesterov_beta > 0 and first <= done < last,
        )
        kinds.setdefault(kind, []).append(step)
    return kinds


class Stepper:
    """An arm that trains for timing only: the steps of a run, grouped by kind instead of in order."""

    def __init__(self, settings: dict[str, str], steps: int):
        fixed = {"ITERATIONS": str(steps), "MAX_WALLCLOCK_SECONDS": "0", "DEVICE": "cpu"}
        self.config, _, _ = train_gpt.load_config({**RECIPE, **settings, **fixed})
        c = self.config
        word_start = train_gpt.load_byte_table(c.tokenizer_path, c.vocab_size).has_leading_space
        self.model = train_gpt.GPT(c, word_start=word_start).init_weights(c.seed)
        stream, log = train_gpt.TokenStream(c.shards("train"), c.vocab_size), SimpleNamespace(line=len)
        run = SimpleNamespace(config=c, train=stream, device=torch.device("cpu"), log=log)
        rates = train_gpt.MetaRates(self.model, c)
        token_nll, training_loss = train_gpt.token_nll, train_gpt.training_loss
        self.phase = train_gpt.training_phase(run, self.model, training_loss, token_nll, rates)
        self.kinds = step_kinds(c)
        self.seconds: dict[Kind, list[float]] = {kind: [] for kind in self.kinds}

    def step(self, kind: Kind, turn: int) -> float:
        """Return the CPU seconds of a step of `kind` including its overhead; `turn` selects the step."""
        began = time.process_time()
        self.model.looped = kind.looped
        step = self.kinds[kind][turn % len(self.kinds[kind])]
        self.phase.step(train_gpt.Moment(step, 0.0, 0.0, 1.0))
        return time.process_time() - began

    def visit(self, count: int) -> None:
        """Run one round: per kind one warm-up step, then `count` timed steps; store their mean."""
        for kind, seconds in self.seconds.items():
            first = len(seconds) * (count + 1)
            self.step(kind, first)
            seconds.append(statistics.mean(self.step(kind, first + 1 + turn) for turn in range(count)))

    def ms(self) -> float:
        """Return the milliseconds of the run's average step: medians over rounds, weighted by kind."""
        total = sum(len(steps) * statistics.median(self.seconds[kind]) for kind, steps in self.kinds.items())
        return 1000 * total / self.config.iterations


def spell(settings: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def costly(settings: dict[str, str]) -> dict[str, str]:
    """Return the settings that change the operations of a training step."""
    return {name: value for name, value in settings.items() if name not in FREE}


def time_steps(arms: list[dict[str, str]], steps: int, rounds: int, count: int) -> list[float]:
    """Return the milliseconds per step of each arm in a run of `steps` steps.

    Arms alternate over `rounds` rounds of `count` steps, in alternating order, so that machine drift affects
    all equally; on one thread, because several threads would wait for each other under load.
    """
    torch.set_num_threads(1)
    steppers = [Stepper(settings, steps) for settings in arms]
    for turn in range(1 + rounds):
        print(f"timing of {len(steppers)} models, round {turn}/{rounds}", file=sys.stderr, flush=True)
        for stepper in steppers[:: 1 if turn % 2 == 0 else -1]:
            stepper.visit(count if turn else 1)
            if not turn:  # allocates and warms up
                stepper.seconds = {kind: [] for kind in stepper.kinds}
    return [stepper.ms() for stepper in steppers]


def get_timing(
    path: Path, arms: dict[str, dict[str, str]], steps: int, rounds: int, count: int
) -> dict[str, Any]:
    """Read the timing at `path`, measure missing arms relative to the recipe, and write it back.

    `ms` has the milliseconds per step, keyed by the settings that change the time, with the recipe at "".
    Arms whose settings are all in FREE have the recipe's time, since any difference would be noise; `noise`
    is the relative standard deviation between copies of the recipe.
    """
    kept = dict(run_steps=steps, rounds=rounds, steps_a_round=count, ms={})
    kept = json.loads(path.read_text()) if path.exists() else kept
    wanted = {spell(costly(settings)): costly(settings) for settings in arms.values()}
    missing = [settings for text, settings in wanted.items() if text and text not in kept["ms"]]
    if missing or not kept["ms"]:
        times = time_steps([*[{}] * COPIES, *missing], steps, rounds, count)
        recipe = statistics.mean(times[:COPIES])
        first = kept["ms"].setdefault("", recipe)
        kept["ms"] |= {spell(s): ms / recipe * first for s, ms in zip(missing, times[COPIES:], strict=True)}
        kept.setdefault("noise", statistics.stdev(times[:COPIES]) / recipe)
        train_gpt.write_atomically(path, json.dumps(kept, indent=1).encode())
    return kept


# Levers: scores


class Job(NamedTuple):
    """One run: an arm, its steps, its seed."""

    name: str
    steps: int
    seed: int


def run_lever(
    job: Job, settings: dict[str, str], out: Path, extra: dict[str, str], adapt: bool = False
) -> dict:
    """Return the result of `job`, trained now or found; ValueError if the found run has other settings."""
    name, settings = f"{job.name}_{job.steps}", {**settings, "ITERATIONS": str(job.steps)}
    result = run_arm(name, settings, job.seed, out, extra, adapt)
    run_id = f"{name}_seed{job.seed}"
    given = json.loads((out / "runs" / run_id / "config.json").read_text())["given"]
    if (
        given
        != train_gpt.load_config({**RECIPE, **settings, **extra, "SEED": str(job.seed), "RUN_ID": run_id})[1]
    ):
        raise ValueError(f"runs/{run_id} has other settings. Remove it or choose another --out.")
    return result


def run_jobs(
    jobs: list[Job],
    arms: dict[str, dict[str, str]],
    out: Path,
    extra: dict[str, str],
    workers: int,
    adapt: bool = False,
) -> dict:
    """Run the jobs, `workers` at a time, and return the results; on failures exit after the others finish."""
    pool = ThreadPoolExecutor(workers)
    try:
        pending = {job: pool.submit(run_lever, job, arms[job.name], out, extra, adapt) for job in jobs}
        wait(pending.values())
    finally:
        pool.shutdown(cancel_futures=True)
    failed = [f"{job}: {future.exception()}" for job, future in pending.items() if future.exception()]
    if failed:
        raise SystemExit(
            "\n".join([f"some runs failed, see {out}/*.txt; the other results are kept:", *failed])
        )
    return {job: future.result() for job, future in pending.items()}


def summarize(results: list[dict], base: list[dict]) -> dict[str, Any]:
    """Return means over seeds and the paired difference from `base`, the recipe's results in seed order."""
    keys = ("model_params", "bytes_model", "val_bpb_roundtrip", "val_bpb_sliding")
    summary = {key: statistics.mean(result[key] for result in results) for key in keys}
    pairs = zip(results, base, strict=True)
    differences = [ours["val_bpb_sliding"] - theirs["val_bpb_sliding"] for ours, theirs in pairs]
    sd = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return summary | dict(
        steps=results[0]["steps"], mean=statistics.mean(differences), sd=sd, n=len(differences)
    )


def make_rows(
    arms: dict[str, dict[str, str]], results: dict[Job, dict], fitting: dict[str, int], timing: dict
) -> list:
    """Return one summary per arm at equal steps and equal time, sorted by sliding bpb at equal time."""
    steps, seeds = timing["run_steps"], list(dict.fromkeys(job.seed for job in results))
    base, rows = [results[Job("recipe", steps, seed)] for seed in seeds], []
    for name, settings in arms.items():
        row = dict(arm=name, settings=settings, ms=timing["ms"][spell(costly(settings))])
        for kind, count in (("equal_steps", steps), ("equal_time", fitting[name])):
            row[kind] = summarize([results[Job(name, count, seed)] for seed in seeds], base)
        rows.append(row)
    return sorted(rows, key=lambda row: row["equal_time"]["mean"])


def scores(summary: dict[str, Any]) -> list[str]:
    """Return the three table cells with the scores of an arm."""
    difference = f"{summary['mean']:+.4f}" + (f" sd {summary['sd']:.4f}" if summary["n"] > 1 else "")
    return [f"{summary['val_bpb_roundtrip']:.4f}", f"{summary['val_bpb_sliding']:.4f}", difference]


def table(rows: list[dict], steps: int) -> str:
    """Return `rows` as a padded Markdown table."""
    header = ["arm", "ms/step", "parameters", "bytes", f"{steps} steps: bpb", "sliding", "difference"]
    header += ["equal time: steps", "bpb", "sliding", "difference", "settings"]
    lines = [header]
    for row in rows:
        ours, timed, settings = row["equal_steps"], row["equal_time"], spell(row["settings"])
        line = [row["arm"], f"{row['ms']:.1f}", f"{ours['model_params']:,.0f}", f"{ours['bytes_model']:,.0f}"]
        line += [*scores(ours), f"{timed['steps']}", *scores(timed), settings and f"`{settings}`"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last = len(header) - 1
    lines.insert(1, ["-" * (w - 1) + ("-" if i in (0, last) else ":") for i, w in enumerate(widths)])
    padded = [
        [
            cell.ljust(w) if i in (0, last) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


METHOD = """# Each lever separately, against the demo recipe on {corpus}

{date}, n = {n} (seeds {seeds}), torch {torch}, Python {python}.

Every arm is `records/recipes/demo.env` with the settings in its last column, trained for {run_steps} steps,
and for the number of steps that fit in the recipe's time for {run_steps} (the same number if the step time
differs by less than twice the noise). Scores are those of the artifact on the whole validation text:
non-overlapping windows of 256 tokens (bpb), and sliding windows with stride {stride} (sliding). The
difference is the arm's sliding bpb minus the recipe's for the same seed, mean and standard deviation over
seeds; below zero the arm is better. Runs use one thread and a fixed number of steps, so machine load changes
no score.

ms/step was measured in one process with alternating arms, as CPU time of one thread: the median over {rounds}
rounds of the mean of {steps_a_round} steps, after one warm-up step. Steps with extra work (late QAT, an
active loop, updates of an average) are timed separately and weighted by their fraction of the run. Settings
that change no operation have the recipe's time, the mean of {copies} copies of it, which differ by
{noise:.1%} (standard deviation). Parameters are the exported ones; bytes are those of the artifact after
{run_steps} steps.
"""


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown: method, levers, depths."""
    timing, seeds, versions = report["timing"], report["seeds"], report["versions"]
    depths = [row for row in report["rows"] if row["arm"] in ("recipe", *DEPTHS)]
    levers = [row for row in report["rows"] if row["arm"] not in DEPTHS]
    steps = timing["run_steps"]
    shown = {**timing, **versions, **{key: report[key] for key in ("corpus", "date", "stride")}}
    how = METHOD.format(n=len(seeds), seeds=", ".join(map(str, seeds)), copies=COPIES, **shown)
    note = "\nThe runs used more than one version of the code.\n" if len(report["sha256_code"]) > 1 else ""
    parts = [how + note, table(levers, steps)]
    if len(depths) > 1:
        parts += ["\n## Depth, at the same width\n", table(depths, steps)]
    return "\n".join(parts) + "\n"


def compare_levers(arguments: argparse.Namespace, out: Path) -> None:
    """Time the arms, run them, and write timing_STEPS.json, levers.json and levers.md; print the report."""
    asked = (arguments.only or "").replace("frontier", ",".join(FRONTIER))
    only = [name for name in asked.split(",") if name]
    if unknown := set(only) - set(ARMS):
        raise SystemExit(f"--only: unknown arms: {', '.join(sorted(unknown))}")
    for settings in ARMS.values():
        train_gpt.load_config({**RECIPE, **settings})  # raises UserError before hours of runs
    only = only or (QUICK if arguments.quick else ARMS)
    arms = {name: ARMS[name] for name in ARMS if name == "recipe" or name in only}
    steps, seeds, rounds, count = (4, SEEDS[:1], 1, 1) if arguments.quick else (arguments.steps, SEEDS, 3, 3)
    timing = get_timing(out / f"timing_{steps}.json", arms, steps, rounds, count)
    base_ms = timing["ms"][""]
    ratio = {name: base_ms / timing["ms"][spell(costly(s))] for name, s in arms.items()}
    resolved = {name: abs(r - 1) > 2 * timing["noise"] for name, r in ratio.items()}  # else noise
    fitting = {name: max(1, round(steps * ratio[name])) if resolved[name] else steps for name in arms}
    jobs = [
        Job(name, n, seed) for seed in seeds for name in arms for n in dict.fromkeys((steps, fitting[name]))
    ]
    stride = "256" if arguments.quick else "128"
    fixed = {"MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "0", "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    results = run_jobs(jobs, arms, out, {**fixed, "EVAL_STRIDE": stride}, arguments.workers)
    report = dict(
        benchmark="levers",
        corpus=arguments.data.name if arguments.data else "the demo's corpus",
        quick=arguments.quick,
        date=date.today().isoformat(),
        seeds=seeds,
        stride=stride,
        versions=results[jobs[0]]["versions"],
        sha256_code=sorted({result["sha256_code"]["train_gpt.py"] for result in results.values()}),
        timing=timing,
        rows=make_rows(arms, results, fitting, timing),
    )
    runs = [dict(arm=job.name, **result) for job, result in results.items()]
    train_gpt.write_atomically(out / "levers.json", json.dumps({**report, "runs": runs}, indent=1).encode())
    train_gpt.write_atomically(out / "levers.md", markdown(report).encode())
    print(markdown(report))
    print("BENCH " + json.dumps(report))


# Meta-steps


META_STEPS = {  # name -> changes to the recipe
    "plain": {},
    "fomaml, halves of rows": {"META_TTT_ENABLED": "1", "META_TTT_SPLIT": "cut"},
    "fomaml, rows, delta, Meta-SGD": {
        "META_TTT_ENABLED": "1", "META_TTT_DELTA_WEIGHT": "0.3", "META_SGD_ENABLED": "1",
    },
    "deployed, doc_banks": {
        "META_TTT_ENABLED": "1", "META_TTT_OBJECTIVE": "deployed", "TTT_MODE": "doc_banks",
    },
    "deployed, doc_lora": {"META_TTT_ENABLED": "1", "META_TTT_OBJECTIVE": "deployed", "TTT_MODE": "doc_lora"},
    "reptile": {"REPTILE_ENABLED": "1"},
}  # fmt: skip


def make_step(c: train_gpt.Config, device: torch.device) -> Callable[[], Any]:
    """Return a step function of the config's kind on random tokens; for FOMAML including the plain step."""
    tg, generator = train_gpt, torch.Generator().manual_seed(0)
    kernel = tg.choose_attention(c.attention, device)[1]
    word_start = tg.load_byte_table(c.tokenizer_path, c.vocab_size).has_leading_space
    model = tg.GPT(c, tg.compute_dtype(device), kernel, word_start).init_weights(c.seed).to(device)
    optimizers, rates = tg.make_optimizers(model, c), tg.MetaRates(model, c)
    loss_fn, nll_fn = (tg.maybe_compile(function, c, device) for function in (tg.training_loss, tg.token_nll))

    def random_ids(*shape: int) -> torch.Tensor:
        return torch.randint(c.vocab_size, shape, generator=generator)

    _, parts = tg.split_batch(c)
    inputs, targets = tg.shifted(
        random_ids(c.train_batch_tokens // c.train_seq_len, c.train_seq_len + 1).to(device)
    )
    batches = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))
    phase = next(iter(c.phases.keys() - {"train"}), "fomaml" if c.meta_ttt_enabled else None)
    fast = phase and tg.inner_weights(model, c, phase)
    length = c.meta_ttt_pieces * c.doc_chunk
    documents, sizes = random_ids(c.meta_ttt_docs, length + 1).numpy(), np.full(c.meta_ttt_docs, length)
    tasks = random_ids(c.reptile_inner_steps, c.reptile_tasks, c.train_seq_len + 1).to(device)

    def step() -> None:
        if phase == "reptile":
            tg.reptile_step(model, fast, tasks, nll_fn)
        elif phase == "deployed":
            loss = tg.deployed_step(model, fast, rates, documents, sizes, nll_fn)
            tg.train_step(loss_fn, model, [], optimizers, 0.1, c.muon_momentum, loss=loss)
        else:
            if phase == "fomaml":
                tg.fomaml_step(model, fast, rates, *tg.meta_sequences(batches, c), nll_fn)
            tg.train_step(loss_fn, model, batches, optimizers, 1.0, c.muon_momentum)
        rates.step(1.0)

    return step


def time_meta_step(settings: dict[str, str], count: int) -> dict[str, float]:
    """Return the median milliseconds over `count` steps, and peak memory in MiB of this dedicated process."""
    torch.set_num_threads(1)
    c, _, _ = train_gpt.load_config(settings)
    device = torch.device("cuda" if torch.cuda.is_available() and c.device != "cpu" else "cpu")
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    step, seconds = make_step(c, device), []
    for turn in range(2 + count):
        train_gpt.synchronize(device)
        began = clock()
        step()
        train_gpt.synchronize(device)
        if turn >= 2:
            seconds.append(clock() - began)
    on_gpu = device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated() / 1024
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return dict(ms=1000 * statistics.median(seconds), peak_mib=peak / 1024)


def compare_meta_steps(arguments: argparse.Namespace, out: Path) -> None:
    """Time each kind of step in its own process; print a table and write meta.json."""
    recipe = {**RECIPE, **({"RECIPE": arguments.recipe} if arguments.recipe else {})}
    rows = {}
    for name, settings in META_STEPS.items():
        given = json.dumps([{**recipe, **settings}, 2 if arguments.quick else 10])
        command = [sys.executable, __file__, "--time-meta-step", given]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:30} {rows[name]['ms']:>9.1f} ms {rows[name]['ms'] / rows['plain']['ms']:>6.2f} of a "
              "plain step "
              f"{rows[name]['peak_mib']:>8.0f} MiB", flush=True)  # fmt: skip
    report = dict(
        benchmark="meta",
        quick=arguments.quick,
        recipe=Path(recipe["RECIPE"]).name,
        date=date.today().isoformat(),
        versions=train_gpt.library_versions(torch.device("cuda" if torch.cuda.is_available() else "cpu"), ""),
        steps=rows,
    )
    train_gpt.write_atomically(out / "meta.json", json.dumps(report, indent=1).encode())
    print("BENCH " + json.dumps(report))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="five seconds per arm, or four steps; one seed")
    parser.add_argument("--out", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--levers", action="store_true", help="ablate every lever separately")
    parser.add_argument("--steps", type=int, default=250, help="with --levers: steps of the recipe's runs")
    parser.add_argument(
        "--workers", type=int, default=2, help="with --levers: parallel runs, one thread each"
    )
    parser.add_argument("--only", help="with --levers: comma list of arms, or frontier")
    parser.add_argument("--data", type=Path, help="shards and tokenizer.model in place of data/demo")
    parser.add_argument("--meta", action="store_true", help="time meta-steps and plain steps")
    parser.add_argument("--recipe", help="with --meta: recipe; default: the demo recipe")
    parser.add_argument("--time-meta-step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time_meta_step:
        print(json.dumps(time_meta_step(*json.loads(arguments.time_meta_step))))
        return 0
    out = arguments.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    if arguments.data:
        data = arguments.data.resolve()
        RECIPE.update(DATA_PATH=str(data), TOKENIZER_PATH=str(data / "tokenizer.model"))
    else:
        command = [sys.executable, "data/demo.py", "--out", "data/demo"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    if arguments.meta:
        compare_meta_steps(arguments, out)
    elif arguments.levers:
        compare_levers(arguments, out)
    else:
        compare_with_plain(arguments.quick, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
