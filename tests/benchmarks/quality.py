"""Train recipes for the same time on the same text and print all three scores of each artifact.

    python tests/benchmarks/quality.py --data DIR --seconds 120 --out DIR
    python tests/benchmarks/quality.py --arms default,pr549 --seeds 1,2 --set WARMDOWN_FRAC=0.5 --out DIR

An arm is a recipe of records/recipes, or `default`: the trainer without a recipe. Every arm gets the same
--set NAME=VALUE; runs of minutes need some, because the recipes' schedules count steps of ten minutes on
eight GPUs. --set-train and --set-eval apply to one program: `--set-eval USE_COMPILE=0` leaves the trainer
compiled. Seeds are the outer loop, arms the inner; each run has the folder OUT/runs/ARM_SEED, and a finished
run with the same settings is not repeated. --nproc N starts runs with torchrun. `epochs` is the number of
passes over the text. A failed run or evaluation leaves its cells empty and does not stop the others; the exit
code is then 1. The table is printed after each run; the last line is `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402

COLUMNS = (
    "arm seed steps epochs tokens_per_second bytes_total val_bpb_roundtrip val_bpb_sliding val_bpb_ttt legal"
).split()


def start(program: str, environ: dict[str, str], out: Path, nproc: int, result: Path) -> None:
    """Run a program of this tree in `out`; RESULT decides success: exit code 1 may just mean over the cap."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    )
    command = [sys.executable, *launcher, str(ROOT / program)]
    before = result.stat().st_mtime_ns if result.exists() else 0
    done = subprocess.run(command, cwd=out, env={**os.environ, **environ}, stdout=subprocess.DEVNULL)
    if not result.exists() or result.stat().st_mtime_ns == before:
        raise subprocess.CalledProcessError(done.returncode, command)


def scored_as(path: Path, config: tg.Config) -> bool:
    """Return whether there is an evaluation with these settings, ignoring the model path."""
    if not path.exists():
        return False
    found, wanted = json.loads(path.read_text())["settings"], tg.settings_of(config, "scoring", "evaluator")
    return {**found, "model_path": ""} == {**wanted, "model_path": ""}


def run(
    arm: str, seed: int, settings: dict[str, str], only: dict[str, dict[str, str]], out: Path, nproc: int
) -> dict[str, Any]:
    """Run one arm and seed; return its row of the table, with `error` if something failed."""
    recipe = {} if arm == "default" else {"RECIPE": str(ROOT / f"records/recipes/{arm}.env")}
    folder = out / "runs" / f"{arm}_{seed}"
    common = {**recipe, **settings, "SEED": str(seed), "RUN_ID": folder.name, "RESUME": "auto"}
    train, score = ({**common, **only[program]} for program in ("train", "eval"))
    config, scoring = (tg.load_config({**os.environ, **environ})[0] for environ in (train, score))
    trained, scored, row = folder / "result.json", folder / "eval_ttt.json", dict(arm=arm, seed=seed)
    try:
        if not trained.exists():
            start("train_gpt.py", train, out, nproc, trained)
        if json.loads((folder / "config.json").read_text())["config"] != asdict(config):
            raise tg.UserError(f"{folder} has other settings. Choose another --out.")
        row |= json.loads(trained.read_text())
        tokens = len(tg.TokenStream(config.shards("train"), config.vocab_size))
        row["epochs"] = round(row["steps"] * config.train_batch_tokens / tokens, 2)
        if not scored_as(scored, scoring):
            start(
                "eval_ttt.py",
                {**score, "MODEL_PATH": str(folder / "final_model.int6.ptz")},
                out,
                nproc,
                scored,
            )
        row |= json.loads(scored.read_text())
    except subprocess.CalledProcessError as failure:
        row["legal"] = None
        row["error"] = f"{Path(failure.cmd[-1]).name}: exit code {failure.returncode}"
        print(f"{folder.name}: {row['error']}", file=sys.stderr, flush=True)
    row |= dict(arm=arm, seed=seed)
    return {name: row.get(name) for name in (*COLUMNS, "train_seconds", "eval_seconds", "versions", "error")}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""

    def cell(name: str, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if name.startswith("val_bpb") else f"{value:.6g}"
        return "" if value is None else str(value)

    cells = [[cell(name, row[name]) for name in COLUMNS] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *cells])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", default="default,pr1019,pr549,pr398")
    parser.add_argument("--seeds", default="1", help="comma list")
    parser.add_argument("--seconds", type=float, default=120.0, help="contest clock of each run, s")
    parser.add_argument("--data", type=Path, help="folder of shards with tokenizer.model; default: data/demo")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="setting of every arm"
    )
    parser.add_argument("--set-train", action="append", default=[], metavar="NAME=VALUE", help="trainer only")
    parser.add_argument(
        "--set-eval", action="append", default=[], metavar="NAME=VALUE", help="evaluator only"
    )
    parser.add_argument("--nproc", type=int, default=1, help="ranks per run")
    parser.add_argument("--quick", action="store_true", help="smoke recipe, twenty steps")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench_quality")
    arguments = parser.parse_args()
    if not arguments.data:
        command = [sys.executable, "data/demo.py", "--out", "data/demo"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    data = (arguments.data or ROOT / "data/demo").resolve()
    settings = dict(DATA_PATH=str(data), TOKENIZER_PATH=str(data / "tokenizer.model"), VAL_LOSS_EVERY="0",
                    MAX_WALLCLOCK_SECONDS=str(arguments.seconds))  # fmt: skip
    settings |= dict(pair.split("=", 1) for pair in arguments.set)
    only = {name: dict(pair.split("=", 1) for pair in pairs)
            for name, pairs in (("train", arguments.set_train), ("eval", arguments.set_eval))}  # fmt: skip
    arms, rows = ["smoke"] if arguments.quick else arguments.arms.split(","), []
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for seed in tg.int_list(arguments.seeds):
        for arm in arms:
            rows.append(run(arm, seed, settings, only, out, arguments.nproc))
            tg.write_atomically(out / "quality.json", json.dumps(rows, indent=1).encode())
            print(table(rows), flush=True)
    print(
        "BENCH "
        + json.dumps(dict(benchmark="quality", data=data.name, settings=settings, only=only, rows=rows))
    )
    return int(any(row["error"] for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except tg.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
