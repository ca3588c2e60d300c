"""Write the page of a gpu_minutes.json: measurements beside predictions, scores, state of every part.

Called by `gpu_minutes.py --page JSON PAGE.md`. Predictions are the counts of
records/benchmarks/2026-11-26_hopper.md and estimates from launches, bytes and CPU seconds, made before
anything ran on a GPU; they are not changed afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TRAFFIC = ROOT / "records/benchmarks/2026-11-26_hopper.json"
PRODUCTS_MS, ATTENTION_MS, REST_MS = 159, 138, 2  # per step, without the pointwise kernels counted in TRAFFIC
STEP_FLOPS, PEAK_FLOPS = 1.8e14, 989e12
PARTS_OF_GROUPS = dict(
    a="the experiment", b="correctness", c="milliseconds per step", d="quantization", e="the rest"
)


class Prediction(NamedTuple):
    """A number predicted for an H100 and an H200, and the path of its measurement in the JSON."""

    label: str
    path: str  # part and keys, separated by dots
    h100: float
    h200: float
    basis: str


def predictions() -> list[Prediction]:
    fused = json.loads(TRAFFIC.read_text())["traffic"]["fused_ms_a_step"]
    h100, h200 = (PRODUCTS_MS + ATTENTION_MS + REST_MS + fused[name] for name in ("H100", "H200"))
    step, share = "step_compiled.step_compiled.", "step_compiled.profile_compiled.shares."
    attention, products = ((part / h100, part / h200) for part in (ATTENTION_MS, PRODUCTS_MS))
    counted, launches, assumed = (
        "counted bytes and operations",
        "counted launches",
        "rate assumed in the counts",
    )
    elsewhere = "CPU seconds on another machine"
    return [
        Prediction("matrix product, 8192 cubed, TFLOP/s", "probe.matmul_tflops", 790, 790, assumed),
        Prediction("device-to-device copy, TB/s", "probe.copy_tb_s", 2.9, 4.4, assumed),
        Prediction("step of 786,432 tokens, compiled, ms", step + "ms_per_step", h100, h200, counted),
        Prediction("the same, MFU", step + "mfu", STEP_FLOPS / (h100 / 1000) / PEAK_FLOPS,
                   STEP_FLOPS / (h200 / 1000) / PEAK_FLOPS, counted),
        Prediction("the same, peak memory, MiB", step + "peak_mib", 20480, 20480, "counted under fake "
                                                                                  "tensors"),
        Prediction("fraction of attention kernels", share + "attention", *attention, counted),
        Prediction("fraction of matrix products", share + "matrix products", *products, counted),
        Prediction("step, plain torch, ms", "step_plain.step_plain.ms_per_step", 1550, 1200, launches),
        Prediction("step within documents, compiled, ms", "documents.step_compiled.ms_per_step",
                   h100 - 68, h200 - 68, "0.51 of the pairs"),
        Prediction("step of 393,216 tokens, ms", "train.ms_per_step_late",
                   h100 / 2 + 1, h200 / 2 + 1, counted),
        Prediction("compilation before training, s", "train.compile_seconds", 60, 60, elsewhere),
        Prediction("peak memory of training and export, MiB", "train.peak_mib", 30720, 30720, "counted, fake "
                                                                                              "tensors"),
        Prediction("statistics, quantization, coding, s", "train.export_seconds", 8, 8, elsewhere),
        Prediction("per-document adaptation, s", "adapt.score_seconds", 20, 20, launches),
        Prediction("the same for 62 M targets on 8 GPUs, s", "adapt.full_seconds", 388, 388, launches),
        Prediction("chunk SGD, s", "chunk_sgd.score_seconds", 10, 9, launches),
        Prediction("per-document LoRA, s", "doc_lora.score_seconds", 20, 20, launches),
        Prediction("compiling five graphs of the evaluator, s", "slots_compiled.warm_up_seconds",
                   100, 100, elsewhere),
        Prediction("compiled and plain, mean nats apart", "losses.losses_compiled.nats_apart_mean",
                   0.0063, 0.0063, "demo recipe on a CPU"),
        Prediction("bfloat16 and float32, mean nats apart", "losses.losses_plain.nats_apart_mean",
                   0.0064, 0.0064, "demo recipe on a CPU"),
    ]  # fmt: skip


def lookup(report: dict[str, Any], path: str) -> Any:
    """Return the value at a path in the last good result of the part, or None."""
    name, *keys = path.split(".")
    entry = report["parts"].get(name, {})
    value = entry.get("result", {})
    if entry.get("state") != "ok":  # an earlier good result may have what a failed one lacks
        value = {**entry.get("last_good", {}).get("result", {}), **value}
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def gpu_name(report: dict[str, Any]) -> str:
    for path in ("probe.gpu", "train.versions"):
        value = lookup(report, path)
        value = value.get("gpu") if isinstance(value, dict) else value
        if value and value != "none":
            return value
    return "none"


def number(value: Any) -> str:
    """Format a number with four digits, or return text."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, align, *rows)]


def compared(report: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table of predictions: label, predicted, measured, error, basis."""
    big = "H200" in gpu_name(report)
    for row in predictions():
        predicted, measured = row.h200 if big else row.h100, lookup(report, row.path)
        comparable = isinstance(measured, int | float) and not report["rehearsal"]
        missed = f"{measured / predicted - 1:+.0%}" if comparable else ""
        shown = number(float(measured)) if isinstance(measured, int | float) else "not measured"
        yield [row.label, number(float(predicted)), shown, missed, row.basis]


def scores(report: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table of scores, bits per byte, with the gain over the same windows unadapted."""
    for stride in ("roundtrip", "sliding"):
        value = lookup(report, f"train.val_bpb_{stride}")
        if value is not None:
            yield [f"{stride}, no adaptation", f"{value:.4f}", "", "", "", ""]
    for part in ("adapt", "chunk_sgd", "doc_lora", "meta"):
        after, before = (lookup(report, f"{part}.val_bpb_{name}") for name in ("ttt", "plan"))
        if after is not None:
            title = report["parts"][part]["title"].rstrip(".")
            rest = [
                lookup(report, f"{part}.{key}")
                for key in ("score_seconds", "targets_per_second", "full_seconds")
            ]
            shown = f"{before - after:+.4f}" if before is not None else ""
            yield [title, f"{after:.4f}", shown, *(number(x) for x in rest)]


def positions(report: dict[str, Any]) -> list[str]:
    rows = lookup(report, "adapt.gain_by_position") or []
    shown = [[row["name"].split()[1], number(row["targets"]), f"{row['before']:.4f}", f"{row['after']:.4f}",
              f"{row['gain']:+.4f}"] for row in rows]  # fmt: skip
    if not shown:
        return []
    head = ["position in the document", "targets", "nats before", "adapted", "gain"]
    return ["", "## Gain by position in the document", "", *table(head, shown)]


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield key:value for the numbers of a result, nested ones with their path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}:{number(value)}"


def part_lines(report: dict[str, Any]) -> Iterator[str]:
    for group, title in PARTS_OF_GROUPS.items():
        yield from ("", f"### {group}. {title}", "")
        for name, entry in report["parts"].items():
            if entry["kind"] != group:
                continue
            state = entry["state"] + (f", {entry['why']}" if "why" in entry else "")
            yield f"- **{name}** ({entry['title'].rstrip('.')}): {state}, {entry['seconds']:.0f} s"
            if shown := list(flat(entry["result"])):
                yield f"  `{' '.join(shown[:30])}`"
            for line in entry.get("log_tail", [])[-3:]:
                yield f"  > {line[:160]}"


def page(report: dict[str, Any], source: str) -> str:
    """Return the page as Markdown."""
    gpu, calls = gpu_name(report), report["calls"]
    minutes = " and ".join(
        f"{call.get('used_seconds', call['seconds']) / 60:.1f} minutes ({call['date']})" for call in calls
    )
    lines = [f"# {'Rehearsed without a GPU' if report['rehearsal'] else f'Measured on one GPU: {gpu}'}",
             "",
             f"Generated by `python tests/benchmarks/gpu_minutes.py --page {source} PAGE.md`; "
             f"{minutes}."]  # fmt: skip
    if report["rehearsal"]:
        lines += [
            "",
            "**A rehearsal with a toy recipe: it shows that every part runs, and says nothing about a GPU.**",
        ]
    versions = lookup(report, "train.versions") or {}
    lines += ["", ", ".join(f"{name} {value}" for name, value in versions.items())] if versions else []
    head = ["", "predicted", "measured", "error", "basis of the prediction"]
    lines += ["", "## Predicted and measured", "", *table(head, list(compared(report)))]
    head = ["bits per byte of the artifact", "score", "gain", "s", "targets/s", "62 M targets on 8 GPUs, s"]
    lines += [
        "",
        "## Scores",
        "",
        *table(head, list(scores(report))),
        *positions(report),
        "",
        "## Every part",
    ]
    return "\n".join([*lines, *part_lines(report)]) + "\n"


def write(source: Path, target: Path) -> None:
    target.write_text(page(json.loads(source.read_text()), source.name))
