"""Test whether meta-learning improves test-time training, with arms of equal time, paired by seed.

    python records/meta_learning/experiment.py data --shards data/weblab --out runs/meta_data
    python records/meta_learning/experiment.py probe --data runs/meta_data       effect of one inner step
    python records/meta_learning/experiment.py run --data runs/meta_data         the confirmation's runs
    python records/meta_learning/experiment.py run --data runs/meta_data --part tuning \\
        --arms deployed_banks --set META_TTT_OUTER_LR=0.3                        variant, tuning documents
    python records/meta_learning/experiment.py report                            tables and plot of kept runs

`data` splits the validation documents into a tuning part and a report part. A run is `train_gpt.py`, then
`eval_ttt.py` for each adaptation method; its logs and results go to `kept/PART/ARM_seedN`, and existing runs
are not repeated. The number of steps is chosen for equal time, from timing.json, written by
`tests/benchmarks/trainer.py --meta`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from scipy import stats

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE, TIMING = HERE / "small.env", HERE / "timing.json"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from formats import shard_header  # noqa: E402

import eval_ttt as ev  # noqa: E402
import train_gpt as tg  # noqa: E402

SEEDS = {
    "tuning": (1, 2),
    "first_confirmation": (101, 102, 103, 104, 105, 106),
    "report": (201, 202, 203, 204, 205, 206, 207, 208),
}
MORE_PLAIN = {"first_confirmation": (107, 108, 109, 110), "report": (209, 210)}  # for ten plain seeds
TUNING_DOCUMENTS, REPORT_DOCUMENTS = 24, 60

# one continuous warmdown over both phases
LATE = {
    "META_TTT_TIME_FRAC": "0.05",
    "WARMDOWN_FRAC": "0.4737",
    "MIN_LR": "0.1",
    "META_TTT_OUTER_LR": "0.1",
}
DEPLOYED = {"META_TTT_ENABLED": "1", "META_TTT_OBJECTIVE": "deployed", **LATE}
FOMAML = {
    "META_TTT_ENABLED": "1",
    "META_TTT_EVERY": "4",
    "META_TTT_INNER_LR": "0.002",
    "META_TTT_LOSS_WEIGHT": "0.5",
}
REPTILE = {"REPTILE_ENABLED": "1", "REPTILE_TIME_FRAC": "0.2"}
LORA = {"TTT_MODE": "doc_lora", "TTT_OPTIMIZER": "adamw", "TTT_LR": "0.02", "TTT_GRAD_CLIP": "1.0"}
ARMS = {  # `control` differs from the deployed arms in two settings: it also lacks Meta-SGD factors
    "none": {},
    "control": {**DEPLOYED, "META_CONTROL": "1"},
    "exp101": {**FOMAML, "META_TTT_SPLIT": "cut"},
    "exp106": {**FOMAML, "META_TTT_SPLIT": "batch", "META_TTT_DELTA_WEIGHT": "0.3", "META_SGD_ENABLED": "1"},
    "deployed_banks": {**DEPLOYED, "META_SGD_ENABLED": "1"},
    "deployed_lora": {**DEPLOYED, "META_SGD_ENABLED": "1", **LORA},
    "reptile": {**REPTILE},
    "reptile_plain": {**REPTILE, "META_CONTROL": "1"},
}
WAYS = {"doc_banks": {}, "doc_lora": LORA}  # adaptation methods, one evaluator run each
DEPLOYED_ARMS = ("control", "deployed_banks", "deployed_lora")
WAYS_OF = {
    **{arm: {"doc_banks": {}} for arm in ARMS},
    **{arm: WAYS for arm in ("none", *DEPLOYED_ARMS)},
}
PLAIN_STEPS = 800  # of plain training; the other arms get as many steps as fit in the same time
KEPT = ("train.log", "result.json", "eval_ttt.log", "eval_ttt.json", "documents.csv")


# ------------------------------------------------------------------------------------------------------------
# Probe before training: the effect of an inner step on the outer loss
# ------------------------------------------------------------------------------------------------------------


def probe_kind(arm: str, model_path: Path, data: Path, dtype: torch.dtype, count: int) -> dict[str, float]:
    """Return mean and standard error of the change in outer loss from an arm's inner steps, over tasks."""
    shards = data / "tuning"
    given = {"RECIPE": str(RECIPE), "DATA_PATH": str(shards), **ARMS[arm], "META_TTT_DOCS": "1",
             "TOKENIZER_PATH": str(shards / "tokenizer.model")}  # fmt: skip
    c, _, _ = tg.load_config(given)
    table = tg.load_byte_table(c.tokenizer_path, c.vocab_size)
    model = tg.GPT(c, dtype, word_start=table.has_leading_space)
    model.load_state_dict(torch.load(model_path))
    stream, generator = tg.TokenStream(c.shards("train"), c.vocab_size), np.random.default_rng(0)
    rates, losses = tg.MetaRates(model, c), {True: [], False: []}
    deployed = "deployed" in c.phases
    fast = tg.inner_weights(model, c, "deployed" if deployed else "fomaml")
    if deployed and fast.wants_prior:
        fast.moments.start = tg.generated_moments(model, c, fast.sets)
    for _ in range(count):
        if deployed:
            task = tg.sample_documents(stream, 1, c, generator)
        else:
            rows = c.train_seq_len * np.arange(c.train_batch_tokens // c.train_seq_len)
            task = stream.sequences(
                generator.integers(len(stream)) + rows, c.train_seq_len, torch.device("cpu")
            )
        for control in (True, False):
            model.config = replace(c, meta_control=control)
            found = (tg.deployed_step if deployed else tg.fomaml_step)(model, fast, rates, *task)
            losses[control].append((found if deployed else found[1]).item())
    moved = np.array(losses[False]) - np.array(losses[True])
    return dict(mean=float(moved.mean()), error=float(moved.std(ddof=1) / count**0.5), tasks=count)


def probe(arguments: argparse.Namespace) -> None:
    """Probe every kind of inner step in float32 and bfloat16 on a plainly trained model; write probe.json."""
    found = {
        f"{arm}, {dtype}".replace("torch.", ""): probe_kind(
            arm, arguments.model, arguments.data, dtype, arguments.tasks
        )
        for arm in ("exp101", "exp106", "deployed_banks", "deployed_lora")
        for dtype in (torch.float32, torch.bfloat16)
    }
    for name, row in found.items():
        print(f"{name:28} {row['mean']:+.6f} nats, standard error {row['error']:.6f}, {row['tasks']} tasks")
    tg.write_atomically(HERE / "probe.json", json.dumps(found, indent=1).encode())


# ------------------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------------------


def split_data(shards: Path, out: Path) -> None:
    """Write `out`/tuning and `out`/report: links to the training shards, and a validation shard each."""
    tokens = np.concatenate(
        [tg.open_shard(path) for path in tg.find_shards(str(shards / "fineweb_val_*.bin"))]
    )
    begin, _ = ev.documents(tokens)
    borders = {
        "tuning": (0, TUNING_DOCUMENTS),
        "report": (TUNING_DOCUMENTS, TUNING_DOCUMENTS + REPORT_DOCUMENTS),
    }
    for part, (first, last) in borders.items():
        folder = out / part
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*shards.glob("fineweb_train_*.bin"), shards / "tokenizer.model"]:
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path.resolve())
        text = np.ascontiguousarray(tokens[begin[first] : begin[last] + 1], "<u2")
        (folder / "fineweb_val_000000.bin").write_bytes(shard_header(len(text)) + text.tobytes())


def documents(data: Path, part: str) -> Path:
    """Return the folder below `data` with the documents of a part; both confirmations use the same."""
    return data / ("tuning" if part == "tuning" else "report")


def iterations(settings: dict[str, str]) -> int:
    """Return the ITERATIONS that take as long as PLAIN_STEPS plain steps, by the times in timing.json."""
    c, _, _ = tg.load_config({"RECIPE": str(RECIPE), **settings})
    steps = json.loads(TIMING.read_text())["steps"]
    cost = {name: row["ms"] / steps["plain"]["ms"] for name, row in steps.items()}
    if "reptile" in c.phases:
        mean = c.phases["train"] + c.reptile_time_frac * cost["reptile"]
    elif "deployed" in c.phases:
        mean = c.phases["train"] + c.meta_ttt_time_frac * cost[f"deployed, {c.ttt_mode}"]
    elif c.meta_ttt_enabled:
        kind = "fomaml, rows, delta, Meta-SGD" if c.meta_ttt_delta_weight else "fomaml, halves of rows"
        active = 1 - c.warmdown_frac * c.meta_ttt_min_scale
        mean = 1 + active / c.meta_ttt_every * (cost[kind] - 1)
    else:
        mean = 1.0
    return round(PLAIN_STEPS / mean)


def call(script: str, env: dict[str, str], cwd: Path) -> None:
    """Run a script of the project on one thread; its output goes to a file in `cwd`."""
    names = {name.upper() for name in tg.Config.__dataclass_fields__} | {"RECIPE"}
    clean = {key: value for key, value in os.environ.items() if key not in names}
    with open(cwd / f"{script}.out", "w") as log:
        subprocess.run([sys.executable, str(ROOT / script)], env={**clean, **env, "OMP_NUM_THREADS": "1"},
                       cwd=cwd, check=True, stdout=log, stderr=subprocess.STDOUT)  # fmt: skip


def run(part: str, arm: str, more: dict[str, str], seed: int, data: Path, work: Path) -> str:
    """Train an arm, score it with each of its adaptation methods, unless kept; return a summary line."""
    name = ",".join([arm, *(f"{key}={value}" for key, value in more.items())]) + f"_seed{seed}"
    kept = HERE / "kept" / part / name
    if kept.exists():
        return f"{name}: kept"
    folder = work / part / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = {**ARMS[arm], **more}
    (folder / "shards").symlink_to(documents(data, part))  # relative, because the logs keep the paths
    base = {"RECIPE": str(RECIPE), "SEED": str(seed), "DATA_PATH": "shards",
            "TOKENIZER_PATH": "shards/tokenizer.model"}  # fmt: skip
    call(
        "train_gpt.py", {**base, "ITERATIONS": str(iterations(settings)), **settings, "RUN_ID": "run"}, folder
    )
    trained, temporary = folder / "runs/run", folder / "kept"
    for way, ways_settings in WAYS_OF[arm].items():
        (trained / way).mkdir()
        (trained / way / "shards").symlink_to(documents(data, part))
        shutil.copy(trained / "final_model.int6.ptz", trained / way)
        tuned = {key: value for key, value in more.items() if key.startswith("TTT_")}
        call(
            "eval_ttt.py",
            {**base, **ways_settings, **tuned, "MODEL_PATH": "final_model.int6.ptz"},
            trained / way,
        )
    for file in [path for path in trained.rglob("*") if path.name in KEPT]:
        inside = file.relative_to(trained).parent
        if inside.parent.name == "eval":  # WAY/eval/MODE
            inside = inside.parents[1]
        target = temporary / inside / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(kept)
    scores = json.loads((kept / "doc_banks/eval_ttt.json").read_text())
    return f"{name}: sliding {scores['val_bpb_sliding']:.4f} adapted {scores['val_bpb_ttt']:.4f}"


def run_all(arguments: argparse.Namespace) -> None:
    """Run every requested arm and seed that is not kept, `workers` at a time, seed by seed."""
    more = dict(pair.split("=", 1) for pair in arguments.set)
    seeds = arguments.seeds or list(SEEDS[arguments.part])
    jobs = [(arm, seed) for seed in seeds for arm in arguments.arms]
    if not arguments.seeds and "none" in arguments.arms:
        jobs += [("none", seed) for seed in MORE_PLAIN.get(arguments.part, ())]
    with ThreadPoolExecutor(arguments.workers) as pool:
        where = (arguments.data.resolve(), arguments.work.resolve())
        for done in [pool.submit(run, arguments.part, arm, more, seed, *where) for arm, seed in jobs]:
            print(done.result(), flush=True)


# ------------------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------------------


def read_kept(part: str) -> dict[tuple[str, str, int], dict[str, float]]:
    """Return the scores of every kept run of a part, by arm, adaptation method and seed."""
    scores = {}
    for path in sorted((HERE / "kept" / part).glob("*/*/eval_ttt.json")):
        arm, seed = path.parents[1].name.rsplit("_seed", 1)
        ours, trained = (
            json.loads(path.read_text()),
            json.loads((path.parents[1] / "result.json").read_text()),
        )
        row = {
            name: trained[name] for name in ("val_bpb_roundtrip", "val_bpb_sliding", "train_seconds", "steps")
        }
        row |= dict(adapted=ours["val_bpb_ttt"], gain=ours["ttt_gain_bpb"], eval_seconds=ours["eval_seconds"])
        row |= dict(late_steps=sum(trained["late_steps"].values()), ttt_lr=ours["settings"]["ttt_lr"])
        scores[arm, path.parent.name, int(seed)] = row
    return scores


class Paired(NamedTuple):
    """Paired comparison over seeds: mean difference, half of its 95 % interval, p, detectable effect."""

    n: int
    mean: float
    half: float
    p: float
    visible: float


def compare(ours: list[float], theirs: list[float], alpha: float = 0.01) -> Paired:
    """Compare `ours` - `theirs`; `visible` is the difference with power 0.8 in a two-sided test."""
    differences = np.array(ours) - np.array(theirs)
    n, error = len(differences), float(differences.std(ddof=1) / len(differences) ** 0.5)
    t = stats.t(n - 1)
    visible = float(t.ppf(1 - alpha / 2) + t.ppf(0.8)) * error
    p = float(stats.ttest_rel(ours, theirs).pvalue) if error else 1.0
    return Paired(n, float(differences.mean()), float(t.ppf(0.975)) * error, p, visible)


def holm(ps: dict[str, float]) -> dict[str, float]:
    """Return the p-values adjusted for multiple tests (Holm 1979)."""
    adjusted, least = {}, 0.0
    for index, (name, p) in enumerate(sorted(ps.items(), key=lambda pair: pair[1])):
        least = max(least, min(1.0, p * (len(ps) - index)))
        adjusted[name] = least
    return adjusted


COMPARISONS = (  # arm, reference arm, adaptation method
    ("deployed_banks", "control", "doc_banks"),
    ("deployed_lora", "control", "doc_lora"),
    ("deployed_banks", "none", "doc_banks"),
    ("deployed_lora", "none", "doc_lora"),
    ("control", "none", "doc_banks"),
    ("exp101", "none", "doc_banks"),
    ("exp106", "none", "doc_banks"),
    ("reptile", "reptile_plain", "doc_banks"),
    ("reptile", "none", "doc_banks"),
)
CONFIRMED = COMPARISONS[:2]


def confirmation(part: str) -> tuple[list[str], dict[tuple[str, ...], Paired]]:
    """Return the tables of a confirmation as lines of Markdown, and the comparisons of its arms."""
    scores, seeds = read_kept(part), SEEDS[part]
    have = {(arm, way) for arm, way, _ in scores}

    def column(arm: str, way: str, key: str, of: Sequence[int] = seeds) -> list[float]:
        return [scores[arm, way, seed][key] for seed in of]

    lines = ["| arm | adapted by | steps + late | seconds | non-overlapping | sliding | adapted | gain of "
             "TTT |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for arm, way in dict.fromkeys((arm, way) for arm, way, seed in scores if seed in seeds):
        cells = [f"{np.mean(column(arm, way, key)):.4f} sd {np.std(column(arm, way, key), ddof=1):.4f}"
                 for key in ("val_bpb_roundtrip", "val_bpb_sliding", "adapted", "gain")]  # fmt: skip
        steps = [f"{np.mean(column(arm, way, key)):.0f}" for key in ("steps", "late_steps", "train_seconds")]
        lines.append(f"| {arm} | {way} | {steps[0]} + {steps[1]} | {steps[2]} | {' | '.join(cells)} |")
    lines += ["", "| arm | against | adapted by | score | difference, bpb | 95 % | p | Holm | detectable |",
              "|---|---|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    found = {
        (*names, key): compare(column(names[0], names[2], key), column(names[1], names[2], key))
        for names in COMPARISONS
        for key in ("gain", "adapted", "val_bpb_sliding")
        if {(names[0], names[2]), (names[1], names[2])} <= have
    }
    confirmed = {
        names: r.p for names, r in found.items() if names[:3] in CONFIRMED and names[3] in ("gain", "adapted")
    }
    adjusted = holm(confirmed)
    for names, r in found.items():
        ours, theirs, way, key = names
        corrected = f"{adjusted[names]:.2g}" if names in adjusted else ""
        lines.append(f"| {ours} | {theirs} | {way} | {key.replace('val_bpb_', '')} | {r.mean:+.5f} | "
                     f"±{r.half:.5f} | {r.p:.2g} | {corrected} | {r.visible:.5f} |")  # fmt: skip
    ten = (*seeds, *MORE_PLAIN[part])
    spreads = [f"{np.std(column('none', 'doc_banks', key, ten), ddof=1):.5f}"
               for key in ("val_bpb_sliding", "adapted", "gain")]  # fmt: skip
    lines += ["", f"Standard deviation of {len(ten)} plain seeds: sliding {spreads[0]}, adapted "
                  f"{spreads[1]}, gain {spreads[2]} bpb.", ""]  # fmt: skip
    return lines, found


def make_report() -> tuple[str, dict[tuple[str, ...], Paired]]:
    """Return the tables as Markdown, from the kept runs alone, and the comparisons for the plot."""
    second, found = confirmation("report")
    first, others = confirmation("first_confirmation")
    lines = ["# The confirmation", "", *second, "# The first confirmation, with the fault described in "
                                                "README.md", "",
             *first, "# Tuning seeds and tuning documents", "",
             "| arm, changes | seed | adapted by | TTT_LR | steps + late | sliding | adapted |",
             "|---|---:|---|---:|---:|---:|---:|"]  # fmt: skip
    for (arm, way, seed), row in sorted(read_kept("tuning").items()):
        lines.append(
            f"| {arm.replace(',', ', ')} | {seed} | {way} | {row['ttt_lr']:g} | {row['steps']} + "
            f"{row['late_steps']} | {row['val_bpb_sliding']:.4f} | {row['adapted']:.4f} |"
        )
    return "\n".join(lines) + "\n", others | found


def plot(found: dict[tuple[str, ...], Paired], path: Path) -> None:
    """Plot the differences with their intervals: gain on the left, adapted score on the right."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, key, title in zip(axes, ("gain", "adapted"), ("gain of TTT", "adapted score"), strict=True):
        rows = {names[:3]: r for names, r in found.items() if names[3] == key}
        labels = [f"{ours} - {theirs} ({way})" for ours, theirs, way in rows]
        axis.errorbar(
            [r.mean for r in rows.values()], labels, xerr=[r.half for r in rows.values()], fmt="o", capsize=3
        )
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set(title=title, xlabel="difference, bits per byte, 95 % interval")
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("data", "probe", "run", "report"))
    parser.add_argument("--shards", type=Path, default=ROOT / "data/weblab", help="data: folder of shards")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/meta_data", help="data: output folder of the split"
    )
    parser.add_argument("--data", type=Path, default=ROOT / "runs/meta_data", help="folder written by `data`")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/meta_learning", help="run: folder of models"
    )
    parser.add_argument("--part", choices=SEEDS, default="report", help="run: seeds and documents")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["none", *DEPLOYED_ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, help="run: seeds instead of those of the part")
    parser.add_argument("--set", nargs="+", default=[], help="run: settings of a variant, NAME=VALUE")
    parser.add_argument("--workers", type=int, default=2, help="run: parallel runs, one thread each")
    parser.add_argument("--model", type=Path, help="probe: final_model.pt of a plain run")
    parser.add_argument("--tasks", type=int, default=200, help="probe: tasks per kind of inner step")
    arguments = parser.parse_args()
    if arguments.what == "data":
        split_data(arguments.shards, arguments.out)
    elif arguments.what == "probe":
        probe(arguments)
    elif arguments.what == "run":
        run_all(arguments)
    else:
        text, found = make_report()
        tg.write_atomically(HERE / "report.md", text.encode())
        plot(found, HERE / "report.png")
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
