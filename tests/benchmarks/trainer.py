"""The demo recipe against plain transformers, every arm for the same time: does what the model adds pay for itself?

    python tests/benchmarks/trainer.py --out runs/bench_trainer     three arms, three seeds, 21 minutes on 2 cores
    python tests/benchmarks/trainer.py --quick                      five seconds of training an arm, one seed

Arms: `levers`, the demo recipe; `plain`, everything switched off and the MLP widened to as many parameters; `narrow`,
everything switched off and the same block matrices. Same optimisers, data, export and scoring. Each run leaves
its folder under --out; a finished one is not run again. Ends with a table and one line `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

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
}
SEEDS = (1337, 42, 2025)  # fixed before the recipe was tuned, on others
COLUMNS = (  # key of the result, format
    ("model_params", ",d"),
    ("steps", ",d"),
    ("step_avg_ms", ".1f"),
    ("bytes_model", ",d"),
    ("val_bpb_roundtrip", ".4f"),
    ("val_bpb_sliding", ".4f"),
)


def count_parameters(settings: dict[str, str]) -> int:
    config, _, _ = train_gpt.load_config(settings)
    with torch.device("meta"):
        return sum(p.numel() for p in train_gpt.GPT(config).parameters())


def make_arms() -> dict[str, dict[str, str]]:
    """The settings of each arm; MLP_MULT of the plain one is what comes nearest to the recipe's parameter count."""
    target = count_parameters(RECIPE)
    widths = [f"{tenth / 10}" for tenth in range(10, 200)]
    width = min(widths, key=lambda m: abs(count_parameters({**RECIPE, **PLAIN, "MLP_MULT": m}) - target))
    return {"levers": {}, "plain": {**PLAIN, "MLP_MULT": width}, "narrow": dict(PLAIN)}


def run_arm(name: str, settings: dict[str, str], seed: int, out: Path, extra: dict[str, str]) -> dict:
    """The result of one run, trained now or found finished under OUT."""
    folder = out / "runs" / f"{name}_seed{seed}"
    if not (folder / "result.json").exists():
        names = {field.upper() for field in train_gpt.Config.__dataclass_fields__}
        clean = {k: v for k, v in os.environ.items() if k not in names and k != "RECIPE"}
        env = {**clean, **RECIPE, **settings, **extra, "SEED": str(seed), "RUN_ID": folder.name}
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        print(f"{name} seed {seed} ...", file=sys.stderr, flush=True)
        with open(out / f"{folder.name}.txt", "w") as log:
            command = [sys.executable, str(ROOT / "train_gpt.py")]
            subprocess.run(command, env=env, cwd=out, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads((folder / "result.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five seconds of training an arm, one seed")
    parser.add_argument("--out", type=Path, help="folder for the runs; default: a temporary one")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "data/demo.py", "--out", "data/demo"], cwd=ROOT, check=True, stdout=sys.stderr)
    seeds, extra = (SEEDS[:1], {"MAX_WALLCLOCK_SECONDS": "5"}) if arguments.quick else (SEEDS, {})
    arms, results = make_arms(), {}
    for turn, seed in enumerate(seeds):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:  # forth and back, so that a drifting machine is fair
            results[name, seed] = run_arm(name, arms[name], seed, out, extra)
    print(f"{'arm':8} {'seed':>6}" + "".join(f"{column:>18}" for column, _ in COLUMNS))
    for (name, seed), result in sorted(results.items()):
        print(f"{name:8} {seed:>6}" + "".join(f"{result[c]:>18{form}}" for c, form in COLUMNS))
    summary = {}
    for name in arms:
        scores = [results[name, seed]["val_bpb_sliding"] for seed in seeds]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        summary[name] = dict(mean=statistics.mean(scores), sd=spread, n=len(scores), settings=arms[name])
        print(f"{name:8} sliding bpb of the artifact: mean {summary[name]['mean']:.4f} sd {spread:.4f} n {len(scores)}")
    versions = results["levers", seeds[0]]["versions"]
    print("BENCH " + json.dumps(dict(benchmark="trainer", quick=arguments.quick, arms=summary, versions=versions)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
