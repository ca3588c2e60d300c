"""Measure the frontier's levers together on the demo, and the systems of #1855 and ours at a small size.

    python tests/benchmarks/frontier.py demo --out DIR           without the frontier's levers, and with them
    python tests/benchmarks/frontier.py small --data DIR --report DIR --out DIR   bytes, bpb, adaptation

demo: the recipe WITHOUT three levers, WITH them, and without each. The first two are tuned with the same
trials of the settings that are no lever (SPACE), on documents cut from the training text; then each arm
trains on all of it with five seeds that nothing was tuned on, for the steps that fit in the time of 690 steps
of the first. Step time is measured as in trainer.py.

small: the model and training of pr1855.env at 128 dimensions, six layers, and 1,024 tokens, on the shards of
--data (their validation text tunes), three seeds, equal steps. Of the same weights, exports of both systems
at several scales: bytes at equal gap from float weights, bpb at equal bytes. Then each form of adaptation on
the artifact, its rate tuned on --data with the first seed, scored on the validation text of --report.

Every run and number is kept under --out, and a later call goes on from there. Ends with `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks"), str(ROOT / "data")]
import formats  # noqa: E402
import quantisation  # noqa: E402
import trainer  # noqa: E402

import train_gpt as tg  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# The demo before and after
# ------------------------------------------------------------------------------------------------------------

WITH = {"KEY_OFFSET": "16", "BIGRAM_SIGNS": "1", "EMA_EXPORT_SHARE": "0.6"}  # the levers
WITHOUT = {"KEY_OFFSET": "0", "BIGRAM_SIGNS": "0", "EMA_EXPORT_SHARE": "1"}
FRESH = (11, 12, 13, 14, 15)  # fixed before tuning, used by nothing else
TUNING_SEED, TRIALS, BASE_STEPS = 1, 12, 690
SPACE = {  # setting -> range on a log scale, or choices; the recipe's values lie inside
    "MATRIX_LR": (0.009, 0.036),
    "TIED_EMBED_LR": (0.0175, 0.07),
    "SCALAR_LR": (0.0125, 0.05),
    "MUON_WD": (0.02, 0.16),
    "WARMDOWN_FRAC": (0.4, 1.0),
    "TRAIN_BATCH_TOKENS": ("1024", "2048"),
    "EMA_DECAY": ("0.96", "0.98", "0.99"),
}
BY_STEPS = {"MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "0", "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}


def trials() -> list[dict[str, str]]:
    """The recipe's own values, then points of a scrambled Sobol sequence over SPACE."""
    points = stats.qmc.Sobol(len(SPACE), rng=0).random(2 ** math.ceil(math.log2(TRIALS)))[: TRIALS - 1]
    found: list[dict[str, str]] = [{}]
    for point in points:
        values = {}
        for (name, (low, *rest)), u in zip(SPACE.items(), point, strict=True):
            choices = (low, *rest)
            if isinstance(low, str):
                values[name] = choices[int(u * len(choices))]
            else:
                values[name] = f"{low * (rest[0] / low) ** u:.4g}"
        found.append(values)
    return found


def cut_for_tuning(demo: Path, out: Path, targets: int = 80_000) -> Path:
    """A copy of the demo's corpus whose validation text is the end of its training text, whole documents."""
    tokens = tg.open_shard(str(demo / "fineweb_train_000000.bin"))
    first = int(np.flatnonzero(tokens[-targets:] == tg.BOS_ID)[0]) + len(tokens) - targets
    out.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", tokens[:first]), ("val", tokens[first:])):
        with open(out / f"fineweb_{split}_000000.bin", "wb") as file:
            file.write(formats.shard_header(len(part)) + part.astype("<u2").tobytes())
    (out / "tokenizer.model").write_bytes((demo / "tokenizer.model").read_bytes())
    return out


def compare_on_demo(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Tune both sides, then train all arms on fresh seeds; returns the report."""
    sides = {"before": WITHOUT, "after": WITH}
    tuning = cut_for_tuning(Path(trainer.RECIPE["DATA_PATH"]), out / "tuning")
    points = trials()
    whole = {f"{side}_t{i}": {**settings, **point} for side, settings in sides.items()
             for i, point in enumerate(points)}  # fmt: skip
    left_out = {f"without_{name.lower()}": WITH | {name: value} for name, value in WITHOUT.items()}
    batches = {f"{name}_{batch}": {**settings, "TRAIN_BATCH_TOKENS": batch}
               for name, settings in {**sides, **left_out}.items()
               for batch in SPACE["TRAIN_BATCH_TOKENS"]}  # fmt: skip
    timing = trainer.get_timing(out / "timing.json", batches, BASE_STEPS, 3, 3)["ms"]
    base = trainer.costly({**WITHOUT, "TRAIN_BATCH_TOKENS": "2048"})

    def steps_of(settings: dict[str, str], point: dict[str, str]) -> int:
        timed = {**settings, "TRAIN_BATCH_TOKENS": point.get("TRAIN_BATCH_TOKENS", "2048")}
        return round(BASE_STEPS * timing[trainer.spell(base)] / timing[trainer.spell(trainer.costly(timed))])

    found = {}
    extra = {**BY_STEPS, "EVAL_STRIDE": "128"}
    apart = {"DATA_PATH": str(tuning), "TOKENIZER_PATH": str(tuning / "tokenizer.model")}
    jobs = [trainer.Job(f"{side}_t{i}", steps_of(sides[side], point), TUNING_SEED)
            for i, point in enumerate(points) for side in sides]  # fmt: skip
    for job, result in trainer.run_jobs(jobs, whole, out, {**extra, **apart}, arguments.workers).items():
        side, trial = job.name.split("_t")
        found.setdefault(side, {})[int(trial)] = result["val_bpb_sliding"]
    best = {side: points[min(scores, key=scores.__getitem__)] for side, scores in found.items()}

    arms = {side: {**settings, **best[side]} for side, settings in sides.items()}
    arms |= {name: {**settings, **best["after"]} for name, settings in left_out.items()}
    plain = {**sides, **left_out}
    jobs = [trainer.Job(name, steps_of(plain[name], arms[name]), seed) for seed in FRESH for name in arms]
    results = trainer.run_jobs(jobs, arms, out, BY_STEPS, arguments.workers, adapt=True)
    rows = [dict(arm=job.name, steps=job.steps, seed=job.seed,
                 **{key: result[key] for key in ("val_bpb_roundtrip", "val_bpb_sliding", "val_bpb_plan",
                                                 "val_bpb_ttt", "bytes_model")})
            for job, result in results.items()]  # fmt: skip
    by_arm = {name: [row["val_bpb_sliding"] for row in rows if row["arm"] == name] for name in arms}
    gains = {}
    for name in arms:  # of `before` and of each arm without a lever, minus `after`: what the levers gain
        if name != "after":
            test = stats.ttest_rel(by_arm[name], by_arm["after"])
            gains[name] = dict(mean=float(np.mean(by_arm[name]) - np.mean(by_arm["after"])),
                               p=float(test.pvalue), n=len(FRESH))  # fmt: skip
    return dict(benchmark="frontier demo", seeds=FRESH, tuning=found, best=best, arms=arms, gains=gains,
                timing=timing, runs=rows)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# #1855 and ours, small
# ------------------------------------------------------------------------------------------------------------

SMALL_SEEDS = (1337, 42, 2025)
SMALL = {
    "MODEL_DIM": "128", "NUM_LAYERS": "6", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "VOCAB_SIZE": "1024",
    "BLOCK_ORDER": "0,1,2,1,2,1,2,3,4,5", "PARALLEL_START_LAYER": "4", "TRAIN_SEQ_LEN": "512",
    "EVAL_SEQ_LEN": "512", "TRAIN_BATCH_TOKENS": "4096", "GRAD_ACCUM_TOTAL": "1", "ITERATIONS": "600",
    "MUON_MOMENTUM_WARMUP_STEPS": "100", "EMA_DECAY": "0.98", "WARMUP_STEPS": "0", "EVAL_BATCH_SEQS": "16",
    "EVAL_STRIDE": "128", "TTT_CONTEXT": "512", **BY_STEPS,
}  # fmt: skip
SYSTEMS = {  # each varies one factor on its scales; #1855's own is 1
    "#1855": quantisation.Pipeline(dict(quant_steps="sigmas"), "factor", (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)),
    "ours": quantisation.Pipeline(
        dict(quant_steps="two_sided", quant_trellis=True, gptq_embed=False), "quant_loss",
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), ours=True,
    ),
}  # fmt: skip
GAPS = (0.008, 0.012, 0.02)  # bpb that rounding costs, on both curves
ADAPTATION = {  # form -> its settings, and the rates that are tried
    "none": ({"TTT_MODE": "none"}, ("0",)),
    "chunks of the text, SGD (#549)": (
        {"TTT_MODE": "banks", "TTT_OPTIMIZER": "sgd", "TTT_MOMENTUM": "0.9", "TTT_CHUNK_TOKENS": "8192"},
        ("1e-1", "3e-1", "1", "3"),
    ),
    "adapters in phases (#1855)": ({"PHASED_TTT_PREFIX_DOCS": "20"}, ("3e-4", "1e-3", "3e-3", "1e-2")),
    "adapters by document": (
        {"TTT_MODE": "doc_lora", "TTT_LR_SCHEDULE": "flat"}, ("3e-4", "1e-3", "3e-3", "1e-2"),
    ),
    "all weights by document (ours)": (
        {"TTT_MODE": "doc_banks", "TTT_OPTIMIZER": "precond", "TTT_LORA_FORM": "series",
         "TTT_WEIGHT_DECAY": "0", "TTT_CHUNK_SIZE": "64", "TTT_SLOTS": "16", "TTT_LR_SCHEDULE": "flat"},
        ("3e-4", "6e-4", "1e-3", "2e-3"),
    ),
}  # fmt: skip


def train_small(seed: int, data: Path, out: Path) -> Path:
    """The folder of a finished run of pr1855.env at the small size."""
    folder = out / f"runs/pr1855_seed{seed}"
    if not (folder / "result.json").exists():
        env = trainer.without_settings() | SMALL | {
            "RECIPE": str(ROOT / "records/recipes/pr1855.env"), "DATA_PATH": str(data), "SEED": str(seed),
            "TOKENIZER_PATH": str(data / "tokenizer.model"), "RUN_ID": folder.name, "RESUME": "auto",
            "CHECKPOINT_EVERY": "100",
        }  # fmt: skip
        with open(out / f"{folder.name}.txt", "a") as log:
            command = [sys.executable, str(ROOT / "train_gpt.py")]
            subprocess.run(command, env=env, cwd=out, check=True, stdout=log, stderr=subprocess.STDOUT)
    return folder


def curves_of(run: Path, data: Path, path: Path) -> dict[str, Any]:
    """Bytes and gap of both systems' exports of a run, at several scales each; kept at `path`."""
    torch.set_num_threads(1)
    weights = quantisation.Weights(run, data, 80_000)
    kept = json.loads(path.read_text()) if path.exists() else {}
    base = kept.setdefault("base", weights.bpb(weights.state))
    for name, pipeline in SYSTEMS.items():
        points = kept.setdefault("curves", {}).setdefault(name, [])
        for value in pipeline.values[len(points) :]:
            points.append(quantisation.point(weights, pipeline, value, base))
            tg.write_atomically(path, json.dumps(kept, indent=1).encode())
    return kept


def adapted(run: Path, form: str, rate: str, data: Path, out: Path) -> dict[str, float]:
    """Scores of one form of adaptation at one rate on the validation text of `data`; kept under `out`."""
    settings, _ = ADAPTATION[form]
    name = f"{run.name}_{list(ADAPTATION).index(form)}_{rate}_{data.name}"
    kept, folder = out / "adapted" / f"{name}.json", out / "adapted" / name
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "final_model.int6.ptz"
        model.unlink(missing_ok=True)
        model.symlink_to(run / "final_model.int6.ptz")
        recipe = trainer.without_settings() | {k: v for k, v in SMALL.items() if k != "ITERATIONS"}
        env = recipe | {
            "RECIPE": str(ROOT / "records/recipes/pr1855.env"), "TTT_GROUPS": "1", "TTT_SLOTS": "16",
            **settings, "MODEL_PATH": str(model), "DATA_PATH": str(data), "TTT_LR": rate,
            "TOKENIZER_PATH": str(data / "tokenizer.model"),
        }  # fmt: skip
        with open(folder / "out.txt", "w") as log:
            command = [sys.executable, str(ROOT / "eval_ttt.py")]
            subprocess.run(command, env=env, cwd=out, check=True, stdout=log, stderr=subprocess.STDOUT)
        result = json.loads((folder / "eval_ttt.json").read_text())
        keys = ("val_bpb_ttt", "val_bpb_plan", "val_bpb_sliding", "val_bpb_roundtrip", "eval_seconds")
        tg.write_atomically(kept, json.dumps({key: result.get(key) for key in keys}).encode())
    return json.loads(kept.read_text())


def compare_small(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Train, export with both systems, adapt in every form; returns the report."""
    data, report = arguments.data.resolve(), arguments.report.resolve()
    with ThreadPoolExecutor(arguments.workers) as pool:
        runs = list(pool.map(lambda seed: train_small(seed, data, out), SMALL_SEEDS))
    curves = {run.name: curves_of(run, data, out / f"{run.name}_curves.json") for run in runs}
    with ThreadPoolExecutor(arguments.workers) as pool:
        grid = [(form, rate) for form, (_, rates) in ADAPTATION.items() for rate in rates]
        tuned = dict(zip(grid, pool.map(lambda each: adapted(runs[0], *each, data, out), grid), strict=True))
        best = {form: min(rates, key=lambda rate, form=form: tuned[form, rate]["val_bpb_ttt"])
                for form, (_, rates) in ADAPTATION.items()}  # fmt: skip
        jobs = [(run, form) for run in runs for form in ADAPTATION]
        scores = list(pool.map(lambda job: adapted(*job, best[job[1]], report, out), jobs))
    forms = [dict(run=run.name, form=form, rate=best[form], **score)
             for (run, form), score in zip(jobs, scores, strict=True)]  # fmt: skip
    at_gap = {name: {str(gap): [quantisation.bytes_at(kept["curves"][name], gap) for kept in curves.values()]
                     for gap in GAPS} for name in SYSTEMS}  # fmt: skip
    texts = {}
    for what, folder in (("tuning", data), ("report", report)):
        tokens = tg.open_shard(str(folder / "fineweb_val_000000.bin"))
        documents = int((tokens == tg.BOS_ID).sum())
        texts[what] = dict(documents=documents, targets=len(tokens) - documents)
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    keys = ("val_bpb_roundtrip", "val_bpb_sliding", "bytes_model", "model_params")
    return dict(benchmark="frontier small", seeds=SMALL_SEEDS, curves=curves, bytes_at_gap=at_gap,
                texts=texts, adaptation=forms,
                tuning=[dict(form=f, rate=r, **s) for (f, r), s in tuned.items()],
                trained=[{key: result[key] for key in keys} for result in results],
                mean_sliding=statistics.mean(r["val_bpb_sliding"] for r in results))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("demo", "small"))
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and results")
    parser.add_argument("--data", type=Path, help="small: shards and tokenizer.model; validation text tunes")
    parser.add_argument("--report", type=Path, help="small: the same with other validation text")
    parser.add_argument("--workers", type=int, default=2, help="parallel runs, one thread each")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    report = (compare_on_demo if arguments.part == "demo" else compare_small)(arguments, out)
    report |= dict(versions=tg.library_versions(torch.device("cpu"), ""))
    tg.write_atomically(out / f"{arguments.part}.json", json.dumps(report, indent=1).encode())
    print("BENCH " + json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
