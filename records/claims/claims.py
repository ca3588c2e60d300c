"""Recalculate every measured number that the pages state from the kept files, and compare.

    python records/claims/claims.py              one line per sentence or table; exit code 1 if one differs
    python records/claims/claims.py --unclaimed  lines of the pages with numbers that no claim covers

A claim is a sentence of a page with {} for its numbers, or a table, and what the kept files give for them.
Nothing is imported from the scripts that wrote the pages. Not covered: settings, limits, dates, published
numbers (their source stands in the sentence), what the trainer counts, and README's table of the demo (the
tests compare both).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

import claims_benchmarks as bench
import claims_gpu as on_gpu
import claims_ladder
import claims_meta
import numpy as np
from stated import Pages, paired
from tabulate import tabulate

COMMANDS = "benchmarks/2026-11-28_commands_cpu"
# fmt: off


def demo(p: Pages, arm: str) -> list[dict[str, Any]]:
    """Return the runs of an arm of the newest demo, by seed."""
    *_, path = sorted((p.root / "records/benchmarks").glob("*_demo_cpu.json"))
    runs = [run for run in p.json(f"benchmarks/{path.stem}")["runs"] if run["arm"] == arm]
    return sorted(runs, key=lambda run: run["seed"])


def readme(p: Pages) -> None:
    page, gpu, rates = p.page("README.md"), on_gpu.parts(p), p.json(on_gpu.RATES)
    step, train, adapt = gpu["step_compiled"]["step_compiled"], gpu["train"], gpu["adapt"]
    gaps, curves = np.geomspace(0.0015, 0.012, 200), bench.curves(p, bench.MODELS[0])
    at = {name: [bench.bytes_at(curves[name], gap) for gap in gaps] for name in curves}
    published = [at[name] for name in curves if bench.is_published(name)]
    part = at["two-sided, trellis, ans"] / np.nanmin(published, axis=0)
    fewer = [100 * (1 - part.max()), 100 * (1 - part.min())]
    minutes = {name: run["seconds"] / 60 for name, run in p.json(COMMANDS)["commands"].items()}
    page.says("export, scores, audit: {} min", minutes["make demo"])
    page.says("# the tests, {} min; make test-slow", minutes["make test"])
    page.says("at equal loss ours is {} to {} % smaller", *fewer)
    page.says("{} to {} % fewer bytes than the best of them where rounding costs {} to {} bpb", *fewer,
              gaps[0], gaps[-1])
    page.says("One trained model of {} M parameters", demo(p, "levers")[0]["model_params"] / 1e6)
    page.says("takes {} ms: {} M parameters, {} M tokens/s, MFU {}", step["ms_per_step"],
              train["model_params"] / 1e6, step["tokens_per_second"] / 1e6, step["mfu"])
    page.says("Trained for {} s ({} steps of {} tokens, {} epochs", train["clock_seconds"], train["steps"],
              train["batch_tokens"], train["epochs"])
    page.says("{} bytes scores {} non-overlapping and {} sliding on {} targets", train["bytes_model"],
              train["val_bpb_roundtrip"], train["val_bpb_sliding"], adapt["targets"])
    best = max(rates["rows"], key=lambda row: row["gain"])
    page.says("at the best rate tried, {}, it is {} on the first {} targets", best["lr"], best["gain"],
              rates["targets"])
    page.says("at {}, the default until then, the adapted score is {}, a loss of {}",
              adapt["settings"]["ttt_lr"], adapt["val_bpb_ttt"], adapt["val_bpb_ttt"] - adapt["val_bpb_plan"])
    page.says("| {} ms/step on one H100 |", step["ms_per_step"])
    page.says("counted: {} ms looped on one H100",
              sum(map(round, on_gpu.predicted_steps(p)["looped, measured rates"])))
    ours, narrow = demo(p, "levers"), demo(p, "narrow")
    steps = [run["steps"] for run in ours]
    page.says("Five of our runs took {} to {} steps", min(steps), max(steps))
    page.says("on {} held-out bytes ({} documents)", sum(row[0] for row in ours[0]["documents"]),
              len(ours[0]["documents"]))
    lower = [paired([run[key] for run in narrow], [run[key] for run in ours])
             for key in ("val_bpb_sliding", "val_bpb_ttt")]
    page.says("the first row scores {} ± {} lower sliding and {} ± {} lower adapted (95 %, n = {})",
              *(x for row in lower for x in row[:2]), len(ours))
    levers = p.json(bench.FRONTIER)["runs"]
    without, after = (mean(run["val_bpb_sliding"] for run in levers if run["arm"] == arm)
                      for arm in ("without_key_offset", "after"))
    page.says("it gains {} on this text", without - after)


def legality(p: Pages) -> None:
    page = p.page("records/legality.md")
    size, targets, count = 151_080_891, 62_021_632, 50_000  # bytes, targets and documents of the challenge
    chunks, order = math.ceil(targets / 32_768), math.lgamma(count + 1) / math.log(2)
    length = math.log2(math.e * targets / count)  # entropy of a geometric distribution
    page.says("bound {} ({} bits at a stride of 64)", 6 / size, math.log2(64))
    page.says("bound {} (log2 3 bits for each of 50,000 documents)", count * math.log2(3) / size)
    page.says("bound {} ({} bits for {} chunks)", math.log2(chunks) / size, math.log2(chunks), chunks)
    page.says("{}: log2(50,000!) = {} bits", order / size, order)
    page.says("{}: at most {} bits each, for a mean of {} targets", count * length / size, length,
              targets / count)
    shared, prefix = ([mean(bench.slot(p, text, form, weight).values()) for weight in (None, 4096)
                       for text in ("demo", "weblab")] for form in "AD")
    page.says("without a prior {} (demo) and {} (weblab) better than `prefix`, ... {} and {} worse",
              *np.abs(np.subtract(shared, prefix)))
    longest, file = (mean(bench.before(p, "demo", f"batches, {order}").values())
                     for order in ("longest first", "file order"))
    page.says("scored {} *worse* than file order", longest - file)
    page.says("{} hours of one H100", targets / on_gpu.parts(p)["adapt"]["targets_per_second"] / 3600)


def guides(p: Pages) -> None:
    smoke = p.json("benchmarks/2026-11-28_compile_cache_cpu")["runs"]
    gpu, rates = on_gpu.parts(p), p.json(on_gpu.RATES)
    page = p.page("records/guide/eight_gpus.md")
    page.says("whole run, s | {} | {} | {} |", *(run["seconds"] for run in smoke))
    page.says("files in the cache after it | {} | {} | {} |", *(run["files"] for run in smoke))
    page.says("on one H100, 2026-11-27, s | {} | {} |", rates["step"]["before"]["first_step_seconds"],
              gpu["step_compiled"]["step_compiled"]["first_step_seconds"])
    _, best = max((row["gain"], row["lr"]) for row in rates["rows"] if row["optimizer"] == "precond")
    small = [row["ttt_lr"] for row in p.json(bench.EVALUATOR)["modes"].values()
             if row["settings"]["ttt_mode"] == "doc_banks" and "ttt_optimizer" not in row["settings"]]
    p.page("records/guide/evaluation.md").says(
        "the default, {}, is for ... on all weights of a model of {} M parameters; models of 1 M take {} "
        "to {}", best, gpu["train"]["model_params"] / 1e6, min(small), max(small))
    page, steps = p.page("records/guide/measuring.md"), p.json("benchmarks/2026-11-21_meta_cpu")["steps"]
    cost = {name: row["ms"] / steps["plain"]["ms"] for name, row in steps.items()}
    page.says("FOMAML adds {} to {} plain steps, a deployed step takes {} to {} plain steps per token",
              *(cost[f"fomaml, {name}"] - 1 for name in ("halves of rows", "rows, delta, Meta-SGD")),
              *(cost[f"deployed, {name}"] * 2048 / 8192 for name in ("doc_lora", "doc_banks")))
    page.says("was predicted at {} ms on an H100, by counting, and takes {}",
              sum(on_gpu.predicted_steps(p)["pr1019"]) + 2,
              gpu["step_compiled"]["step_compiled"]["ms_per_step"])


def quantizing(p: Pages) -> None:
    page, kept, gpu = p.page("records/guide/quantization.md"), p.json(bench.QUANTIZATION), on_gpu.parts(p)
    seconds, found = kept["timing"], [bench.shares(p, model) for model in bench.MODELS]
    part = {coder: [[x for _, x in rows[f"two-sided, {coder}"].values() if x > 0] for rows in found]
            for coder in ("zstd", "ans")}
    long, short = ({point["value"]: point for point in bench.curves(p, model)["two-sided, zstd"]}
                   for model in bench.MODELS)
    late = next(row for row in p.json(bench.LEVERS)["rows"]
                if row["arm"] == "late_qat")["equal_steps"]["mean"]
    curve = sorted(gpu["quantization"]["curve"], key=lambda point: point["bytes"])
    gaps, sizes = [point["gap_bpb"] for point in curve], [point["bytes"] / 1e6 for point in curve]
    page.says("Measured on two models of {} M parameters", demo(p, "levers")[0]["model_params"] / 1e6)
    page.says("at {} times the quantization time",
              seconds["quantize trellis"] / seconds["quantize two-sided"])
    page.says("it gained nothing so far: {} bpb", abs(late))
    every = np.concatenate(part["zstd"] + part["ans"])
    page.says("two-sided scales take {} to {} of the bytes of the best published pipeline", every.min(),
              every.max())
    page.says("the trellis takes between {} % more and {} % less", *bench.trellis(p))
    page.says("costs the demo {} ± {} bpb ({} bytes) and the longer-trained model {}", short[0.001]["gap"],
              short[0.0003]["gap"] - short[0.001]["gap"], short[0.001]["bytes"], long[0.001]["gap"])
    page.says("takes {} s on two cores ({} s with the trellis), reading them {} s",
              *(seconds[name] for name in ("quantize two-sided", "quantize trellis", "decode zstd")))
    page.says("costs {}, {}, and {} bpb at {}, {}, and {} MB", *gaps, *sizes)
    page = p.page("records/recipes/ours.env")
    best = max(p.json(on_gpu.RATES)["rows"], key=lambda row: row["gain"])
    page.says("two-sided scales and ANS: {} to {} of the bytes", min(part["ans"][0]), max(part["ans"][0]))
    page.says("the trellis takes between {} % more and {} % less", *bench.trellis(p))
    page.says("{}, {}, and {} MB cost {}, {}, and {} bpb on an H100", *sizes, *gaps)
    page.says("{} bpb at {} on 27 M parameters after {} s", best["gain"], best["lr"],
              gpu["train"]["clock_seconds"])
    gains = [run["val_bpb_plan"] - run["val_bpb_ttt"] for run in demo(p, "levers")]
    page.says("n = 1), {} on the demo", mean(gains))


# fmt: on
def check(root: Path) -> Pages:
    """Return the pages below a folder with the claims that are made about them."""
    pages = Pages(root)
    for derive in (readme, legality, guides, quantizing):
        derive(pages)
    for derive in (bench.evaluator, bench.levers, bench.quantisation, bench.coders):
        derive(pages)
    for derive in (bench.slots, bench.frontier, bench.frontier_small, bench.single_levers):
        derive(pages)
    for derive in (on_gpu.hopper, on_gpu.h100, on_gpu.traffic):
        derive(pages)
    for derive in (claims_meta.training, claims_meta.readme, claims_meta.report, claims_ladder.ladder):
        derive(pages)
    return pages


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--unclaimed", action="store_true", help="list lines with numbers that no claim covers"
    )
    unclaimed, pages = parser.parse_args().unclaimed, check(Path(__file__).resolve().parents[2]).opened
    claims = [claim for page in pages.values() for claim in page.claims]
    wrong = sum(not claim.agrees for claim in claims)
    if unclaimed:
        rows = [[page.path, line] for page in pages.values() for line in page.unclaimed()]
    else:
        rows = [
            [
                claim.page,
                fill(claim.what, 60),
                fill(claim.stated, 30),
                fill(claim.derived, 30),
                "" if claim.agrees else "DIFFERS",
            ]
            for claim in claims
        ]
    head = ["page", "line"] if unclaimed else ["page", "claim", "stated", "derived", ""]
    print(tabulate(rows, head, "plain", disable_numparse=True))
    print(f"{len(claims)} claims, {wrong} of them differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
