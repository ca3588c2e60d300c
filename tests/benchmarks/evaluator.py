"""Benchmark the evaluator on an artifact: speed against a loop over windows, and the gain of every TTT mode.

    python tests/benchmarks/evaluator.py --model runs/demo/final_model.int6.ptz --out runs/bench_evaluator
    python tests/benchmarks/evaluator.py --model runs/demo/final_model.int6.ptz --quick     about a minute

Speed: sliding windows by `score`, and the same windows one by one with all their logits, as in the published
code. Modes: the learning rate of each mode is chosen on the tuning documents (the first ones); the gain over
the same windows without adaptation is reported on the others. Results are stored under --out as they arrive
and reused by later calls. Ends with tables and one line `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import eval_ttt as ev  # noqa: E402
import train_gpt as tg  # noqa: E402

SGD = dict(ttt_optimizer="sgd", ttt_momentum=0.9, ttt_grad_clip=1.0, ttt_epochs=3, ttt_lr_schedule="cosine")
ADAMW = dict(ttt_optimizer="adamw", ttt_beta2=0.999, ttt_grad_clip=1.0)
CHUNK, SMALL = dict(ttt_chunk_tokens=2048), dict(ttt_chunk_tokens=512)  # with 32,768 there would be only two
MODES = {  # name: settings, learning rates to choose from
    "all, sgd as #549": (dict(ttt_mode="all", **SGD, **CHUNK), (0.002, 0.005, 0.02)),
    "banks, sgd as #549": (dict(ttt_mode="banks", **SGD, **CHUNK), (0.002, 0.005, 0.02, 0.05)),
    "all, adamw as #456": (dict(ttt_mode="all", **ADAMW, **CHUNK), (2e-5, 1e-4, 5e-4, 1e-3)),
    "all, precond": (dict(ttt_mode="all", **CHUNK), (1e-4, 3e-4, 1e-3)),
    "all, precond, small chunks": (dict(ttt_mode="all", **SMALL), (1e-4, 3e-4, 1e-3, 2e-3)),
    "  hardest half": (dict(ttt_mode="all", **SMALL, ttt_top_frac=0.5), (1e-4, 3e-4, 1e-3)),
    "lora": (dict(ttt_mode="lora", **SMALL, **ADAMW), (1e-4, 1e-3, 3e-3, 1e-2)),
    "doc_lora": (dict(ttt_mode="doc_lora", **ADAMW), (1e-3, 3e-3, 1e-2, 3e-2)),
    "phased": (dict(ttt_mode="phased", phased_ttt_prefix_docs=24, **ADAMW), (1e-3, 3e-3, 1e-2, 3e-2)),
    "doc_banks, sgd": (dict(ttt_mode="doc_banks", ttt_optimizer="sgd"), (0.03, 0.1, 0.3)),
    "doc_banks, precond": (dict(ttt_mode="doc_banks"), (5e-4, 1e-3, 2e-3, 3e-3, 5e-3)),
    "  pieces of 64": (dict(ttt_mode="doc_banks", ttt_chunk_size=64), (5e-4, 1e-3, 2e-3, 3e-3)),
    "  pieces of 32": (dict(ttt_mode="doc_banks", ttt_chunk_size=32), (5e-4, 1e-3, 2e-3)),
    "  left context 128": (dict(ttt_mode="doc_banks", ttt_context=128), (1e-3, 2e-3, 3e-3)),
    "  no prior": (dict(ttt_mode="doc_banks", ttt_prior_seqs=0), (1e-3, 2e-3, 3e-3)),
    "  shared moments": (dict(ttt_mode="doc_banks", ttt_moments="shared"), (1e-3, 2e-3, 3e-3)),
    "  output side 3x": (dict(ttt_mode="doc_banks", ttt_out_lr_mult=3.0, ttt_in_lr_mult=0.5),
                         (1e-3, 2e-3, 3e-3)),
    "  half of the blocks": (dict(ttt_mode="doc_banks", ttt_freeze_blocks=2), (1e-3, 2e-3, 3e-3)),
}  # fmt: skip


def window_loop(setup: ev.Setup, tokens: np.ndarray, windows: tg.Windows) -> tuple[float, float]:
    """Score each window separately (all logits, one `.item()` per window); return mean nats and seconds."""
    model, total, count, began = setup.load(), 0.0, 0, time.perf_counter()
    with torch.no_grad():
        for start, begin, end in zip(*(part.tolist() for part in windows), strict=True):
            row = torch.from_numpy(tokens[start : start + end + 1].astype(np.int64)).to(setup.device)
            losses = F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none")
            total += losses[begin:].double().sum().item()
            count += end - begin
    return total / count, time.perf_counter() - began


def bench_speed(setup: ev.Setup, tokens: np.ndarray, count: int) -> dict:
    """Measure targets per second of `score` and of the loop over the same `count` windows, best of two."""
    c = setup.config
    part = tokens[: c.eval_seq_len + count * c.eval_stride + 1]
    windows = tg.sliding_windows(len(part), c.eval_seq_len, c.eval_stride)
    seconds: dict[str, list[float]] = {"score": [], "loop": []}
    for _ in range(2):
        result = tg.score(
            setup.load(), part, [tg.Chunk(windows)], setup.byte_table, c.eval_batch_seqs, setup.nll_fn
        )
        seconds["score"].append(result.seconds)
        loss, took = window_loop(setup, part, windows)
        seconds["loop"].append(took)
    assert abs(loss - result.val_loss) < (1e-4 if setup.device.type == "cpu" else 1e-2), (
        loss,
        result.val_loss,
    )
    rate = {name: (len(part) - 1) / min(values) for name, values in seconds.items()}
    peak = (torch.cuda.max_memory_allocated() >> 20) if setup.device.type == "cuda" else peak_memory()
    return dict(targets=len(part) - 1, windows=len(windows.start), targets_per_second=rate["score"],
                loop_targets_per_second=rate["loop"], ratio=rate["score"] / rate["loop"],
                peak_mib=peak)  # fmt: skip


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def measure(setup: ev.Setup, tokens: np.ndarray, settings: dict) -> dict:
    """Measure gain, score and seconds of a TTT mode on `tokens`, against the same windows unadapted."""
    setup = replace(setup, config=replace(setup.config, **settings))
    began = time.perf_counter()
    adapted = ev.evaluate(setup, tokens)
    seconds = time.perf_counter() - began
    plain = ev.score_plan(setup, tokens)
    begin, end = ev.documents(tokens)
    gains = [
        float((plain.nll[a:b] - adapted.nll[a:b]).sum())
        for a, b in zip(begin.tolist(), end.tolist(), strict=True)
    ]
    per_token = np.array(gains).sum() / len(plain.nll)
    return dict(val_bpb=adapted.val_bpb, plan_bpb=plain.val_bpb, gain_bpb=plain.val_bpb - adapted.val_bpb,
                gain_nats=per_token, documents=len(gains), documents_better=int(sum(g > 0 for g in gains)),
                seconds=seconds, plan_seconds=plain.seconds, targets=len(plain.nll))  # fmt: skip


def split_documents(tokens: np.ndarray, tuning: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off the first `tuning` documents; each part includes the BOS that ends it."""
    begin, _ = ev.documents(tokens)
    cut = int(begin[tuning])
    return tokens[: cut + 1], tokens[cut:]


def bench_modes(setup: ev.Setup, tokens: np.ndarray, tuning: int, out: Path, modes: dict) -> dict[str, dict]:
    """Run every mode: choose its best learning rate on the tuning documents and report it on the others."""
    parts = dict(zip(("tuning", "report"), split_documents(tokens, tuning), strict=True))
    path = out / "modes.json"
    kept = json.loads(path.read_text()) if path.exists() else {}

    def run(name: str, part: str, settings: dict) -> dict:
        key = f"{name.strip()} | {part} | {len(parts[part])} | {json.dumps(settings, sort_keys=True)}"
        if key not in kept:
            kept[key] = measure(setup, parts[part], settings)
            tg.write_atomically(path, json.dumps(kept, indent=1).encode())
            print(
                f"{name:28} {part:7} lr {settings['ttt_lr']:.0e} {kept[key]['gain_bpb']:+.4f}",
                file=sys.stderr,
                flush=True,
            )
        return kept[key]

    results = {}
    for name, (settings, rates) in modes.items():
        tuned = {lr: run(name, "tuning", {**settings, "ttt_lr": lr})["gain_bpb"] for lr in rates}
        best = max(tuned, key=lambda lr: tuned[lr])
        found = run(name, "report", {**settings, "ttt_lr": best})
        results[name] = dict(
            settings=settings, ttt_lr=best, tuning={f"{lr:g}": gain for lr, gain in tuned.items()}, **found
        )
    return results


def markdown(report: dict) -> str:
    """Return the report as two paragraphs and a table."""
    speed, versions = report["speed"], report["versions"]
    device = versions["gpu"] if versions["gpu"] != "none" else f"a CPU, {versions['threads']} threads"
    lines = [
        f"Sliding windows, stride 64, {speed['windows']} of them: {speed['targets_per_second']:,.0f} "
        "targets/s, one by "
        f"one {speed['loop_targets_per_second']:,.0f}: {speed['ratio']:.2f} times as fast; peak memory "
        f"{speed['peak_mib']} MiB.",
        "",
        f"The learning rate of each mode is chosen on the first {report['tuning_documents']} documents (the "
        "JSON file "
        "has all that were tried). Gain, in bits per byte over the same windows without adaptation, and "
        "seconds "
        f"are for the other documents. torch {versions['torch']}, Python {versions['python']}, {device}.",
        "",
        "| mode | TTT_LR | plan, bpb | adapted, bpb | gain | documents better | seconds | plan alone |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, r in report["modes"].items():
        cells = (name.replace("  ", "&emsp;"), f"{r['ttt_lr']:g}", f"{r['plan_bpb']:.4f}",
                 f"{r['val_bpb']:.4f}", f"{r['gain_bpb']:+.4f}",
                 f"{r['documents_better']} of {r['documents']}",
                 f"{r['seconds']:.0f}", f"{r['plan_seconds']:.0f}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="an artifact")
    parser.add_argument("--data", default=str(ROOT / "data/demo"), help="folder of the validation shards")
    parser.add_argument("--tokenizer", help="SentencePiece model; default: tokenizer.model beside the shards")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per window")
    parser.add_argument("--tuning", type=int, default=30, help="documents for choosing learning rates")
    parser.add_argument("--documents", type=int, default=0, help="total documents; 0: all")
    parser.add_argument("--windows", type=int, default=1000, help="windows in the speed comparison")
    parser.add_argument("--rows", type=int, default=16, help="TTT_SLOTS, TTT_BATCH_SEQS and EVAL_BATCH_SEQS")
    parser.add_argument("--modes", default="", help="substring of the mode names to run; empty: all")
    parser.add_argument(
        "--quick", action="store_true", help="few documents and windows, one learning rate per mode"
    )
    parser.add_argument("--out", type=Path, help="result folder; default: a temporary one")
    return parser.parse_args()


def make_setup(arguments: argparse.Namespace) -> tuple[ev.Setup, np.ndarray]:
    tokenizer = arguments.tokenizer or f"{arguments.data}/tokenizer.model"
    environ = dict(DATA_PATH=arguments.data, TOKENIZER_PATH=tokenizer, MODEL_PATH=arguments.model,
                   EVAL_STRIDE="64", EVAL_SEQ_LEN=str(arguments.seq_len), EVAL_BATCH_SEQS=str(arguments.rows),
                   TTT_BATCH_SEQS=str(arguments.rows), TTT_SLOTS=str(arguments.rows),
                   TTT_GROUPS="1")  # fmt: skip
    config, given, _ = tg.load_config(environ)
    setup, tokens, *_ = ev.prepare(config, given, {})
    return setup, tokens


def main() -> int:
    arguments = parse_arguments()
    out = arguments.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    setup, tokens = make_setup(arguments)
    modes = {name: mode for name, mode in MODES.items() if arguments.modes in name}
    windows, tuning, total = arguments.windows, arguments.tuning, arguments.documents
    if arguments.quick:
        windows, tuning, total = 60, 2, 5
        modes = {name: (settings, rates[:1]) for name, (settings, rates) in modes.items()}
    if total:
        begin, _ = ev.documents(tokens)
        tokens = tokens[: int(begin[total]) + 1] if total < len(begin) else tokens
    speed = bench_speed(setup, tokens, min(windows, (len(tokens) - 1 - setup.config.eval_seq_len) // 64))
    print(f"score {speed['targets_per_second']:,.0f} targets/s, loop "
          f"{speed['loop_targets_per_second']:,.0f}: "
          f"{speed['ratio']:.2f}x, peak {speed['peak_mib']} MiB")  # fmt: skip
    results = bench_modes(setup, tokens, tuning, out, modes)
    print(
        f"{'mode':28} {'lr':>8} {'plan bpb':>9} {'bpb':>8} {'gain':>8} {'better':>8} {'seconds':>8} "
        f"{'plain s':>8}"
    )
    for name, r in results.items():
        better = f"{r['documents_better']}/{r['documents']}"
        print(f"{name:28} {r['ttt_lr']:>8.0e} {r['plan_bpb']:>9.4f} {r['val_bpb']:>8.4f} "
              f"{r['gain_bpb']:>+8.4f} "
              f"{better:>8} {r['seconds']:>8.1f} {r['plan_seconds']:>8.1f}")  # fmt: skip
    versions = tg.library_versions(setup.device, setup.config.attention)
    report = dict(benchmark="evaluator", quick=arguments.quick, model=tg.sha256_file(arguments.model),
                  speed=speed, modes=results, tuning_documents=tuning, versions=versions)  # fmt: skip
    assert all(math.isfinite(r["val_bpb"]) for r in results.values())
    tg.write_atomically(out / "evaluator.json", json.dumps(report, indent=1).encode())
    tg.write_atomically(out / "evaluator.md", markdown(report).encode())
    print("BENCH " + json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
