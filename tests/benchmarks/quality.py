"""Recipes trained for the same time on the same text: all three scores of each, from the artifact.

    python tests/benchmarks/quality.py --data DIR --seconds 120 --out DIR
    python tests/benchmarks/quality.py --arms default,pr549 --seeds 1,2 --set WARMDOWN_FRAC=0.5 --out DIR

An arm is a recipe of records/recipes, or `default`: the trainer without one. Every arm gets the same --set NAME=VALUE;
a run of minutes needs some, since the recipes' schedules count the steps of ten minutes on eight GPUs. Runs go one seed
at a time through the arms, each in OUT/runs/ARM_SEED, and one that has its result is not run again. --nproc N starts
them by torchrun. `epochs` is how often the text was read. The table is printed after each run; the last line is
`BENCH {json}`.
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
    "arm seed steps epochs tokens_per_second bytes_total val_bpb_roundtrip val_bpb_sliding val_bpb_ttt legal".split()
)


def start(program: str, environ: dict[str, str], out: Path, nproc: int, result: Path) -> None:
    """Run a program of this tree in OUT, whose RESULT decides: exit code 1 may only say that a run is over the cap."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    command = [sys.executable, *launcher, str(ROOT / program)]
    done = subprocess.run(command, cwd=out, env={**os.environ, **environ}, stdout=subprocess.DEVNULL)
    if not result.exists():
        raise subprocess.CalledProcessError(done.returncode, command)


def run(arm: str, seed: int, settings: dict[str, str], out: Path, nproc: int) -> dict[str, Any]:
    """One row of the table; what has been run before, by the same settings, is read."""
    recipe = {} if arm == "default" else {"RECIPE": str(ROOT / f"records/recipes/{arm}.env")}
    folder = out / "runs" / f"{arm}_{seed}"
    environ = {**recipe, **settings, "SEED": str(seed), "RUN_ID": folder.name, "RESUME": "auto"}
    config, _, _ = tg.load_config({**os.environ, **environ})
    trained, scored = folder / "result.json", folder / "eval_ttt.json"
    if not trained.exists():
        start("train_gpt.py", environ, out, nproc, trained)
    if json.loads((folder / "config.json").read_text())["config"] != asdict(config):
        raise tg.UserError(f"{folder} is of other settings: choose another --out")
    if not scored.exists():
        start("eval_ttt.py", {**environ, "MODEL_PATH": str(folder / "final_model.int6.ptz")}, out, nproc, scored)
    row = {**json.loads(trained.read_text()), **json.loads(scored.read_text()), "arm": arm, "seed": seed}
    tokens = len(tg.TokenStream(config.shards("train"), config.vocab_size))
    row["epochs"] = round(row["steps"] * config.train_batch_tokens / tokens, 2)
    return {name: row[name] for name in (*COLUMNS, "train_seconds", "eval_seconds", "versions")}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    cells = [[f"{row[name]:.4f}" if name.startswith("val_bpb") else f"{row[name]:.6g}" if isinstance(row[name], float)
              else str(row[name]) for name in COLUMNS] for row in rows]  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *cells])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="default,pr1019,pr549,pr398")
    parser.add_argument("--seeds", default="1", help="comma list")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training a run, on the contest clock")
    parser.add_argument("--data", type=Path, help="folder of shards with tokenizer.model; default: data/demo")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="for every arm")
    parser.add_argument("--nproc", type=int, default=1, help="processes of a run")
    parser.add_argument("--quick", action="store_true", help="the smoke recipe, for its twenty steps")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench_quality")
    arguments = parser.parse_args()
    if not arguments.data:
        command = [sys.executable, "data/demo.py", "--out", "data/demo"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    data = (arguments.data or ROOT / "data/demo").resolve()
    settings = dict(DATA_PATH=str(data), TOKENIZER_PATH=str(data / "tokenizer.model"), VAL_LOSS_EVERY="0",
                    MAX_WALLCLOCK_SECONDS=str(arguments.seconds))  # fmt: skip
    settings |= dict(pair.split("=", 1) for pair in arguments.set)
    arms, rows = ["smoke"] if arguments.quick else arguments.arms.split(","), []
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for seed in tg.int_list(arguments.seeds):
        for arm in arms:
            rows.append(run(arm, seed, settings, out, arguments.nproc))
            tg.write_atomically(out / "quality.json", json.dumps(rows, indent=1).encode())
            print(table(rows), flush=True)
    print("BENCH " + json.dumps(dict(benchmark="quality", data=data.name, settings=settings, rows=rows)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except tg.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
