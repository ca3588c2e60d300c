"""Training step, export and sliding score of one recipe on one GPU: plain torch against torch.compile, in one run.

    python tests/benchmarks/gpu.py --data DIR --tokenizer FILE --out DIR      pr1019 on any shards
    python tests/benchmarks/gpu.py --quick                                    two steps an arm, on the embedded corpus

It needs this repository's files alone. Phases: step (ms a step of TRAIN_BATCH_TOKENS, tokens/s, share of the chip's
peak, peak memory, seconds of the first step), export (Hessians, GPTQ, coding), score (windows a second). The share is
flops_per_token * tokens/s / peak, with peak 989e12 for bfloat16 on H100 and H200. Results are written as they come; the
last line is `BENCH {json}`. It runs on a CPU too, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402

PEAK_FLOPS = 989e12  # bfloat16, H100 and H200


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that FUNCTION took until the device was done with it, and what it returned."""
    tg.synchronize(device)
    began = time.perf_counter()
    result = function()
    tg.synchronize(device)
    return time.perf_counter() - began, result


def make_model(config: tg.Config, device: torch.device) -> tuple[str, tg.GPT]:
    """The name of the attention kernel, and the model as initialised."""
    attention, kernel, _ = tg.choose_attention(config.attention, device)
    return attention, tg.GPT(config, tg.compute_dtype(device), kernel).init_weights(config.seed).to(device)


def compiled_or_not(function: Callable, arm: str, config: tg.Config, device: torch.device) -> Callable:
    """FUNCTION as the trainer would run it, compiled in arm `compiled` and as it stands in arm `plain`."""
    return tg.maybe_compile(function, replace(config, use_compile="1" if arm == "compiled" else "0"), device)


def bench_step(config: tg.Config, stream: tg.TokenStream, device: torch.device, arm: str, steps: int) -> dict:
    """Median milliseconds of STEPS training steps after three that warm up, with arm `plain` or `compiled`."""
    torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
    attention, model = make_model(config, device)
    optimizers = tg.make_optimizers(model, config)
    loss_fn = compiled_or_not(tg.training_loss, arm, config, device)
    loader = tg.Loader(SimpleNamespace(config=config, train=stream, device=device))

    def step(index: int) -> float:
        batches = loader.batches(index)
        return tg.train_step(loss_fn, model, batches, optimizers, 1.0, config.muon_momentum).loss.item()

    first, _ = timed(lambda: step(0), device)
    losses = [step(index) for index in (1, 2)]
    times = []
    for index in range(3, 3 + steps):
        seconds, loss = timed(lambda index=index: step(index), device)
        times.append(seconds)
        losses.append(loss)
    median = float(np.median(times))
    rate = config.train_batch_tokens / median
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
    return dict(phase="step", arm=arm, attention=attention, ms_per_step=1000 * median, ms_min=1000 * min(times),
                ms_max=1000 * max(times), steps=steps, tokens_per_second=rate,
                share_of_peak=tg.flops_per_token(config) * rate / PEAK_FLOPS, first_step_seconds=first,
                peak_mib=peak, last_loss=losses[-1])  # fmt: skip


def bench_export(config: tg.Config, stream: tg.TokenStream, device: torch.device) -> dict:
    """Seconds of the statistics, of GPTQ and of coding, and the artifact's bytes, for weights as initialised."""
    _, model = make_model(config, device)
    run = SimpleNamespace(config=config, train=stream, device=device)
    hessian_seconds, (statistics, _) = timed(lambda: tg.read_statistics(run, model), device)
    gptq_seconds, records = timed(lambda: tg.quantize(model.state_dict(), statistics, config), device)
    result = dict(phase="export", batches=config.gptq_calib_batches, hessian_seconds=hessian_seconds,
                  gptq_seconds=gptq_seconds)  # fmt: skip
    try:
        coding_seconds, blob = timed(lambda: tg.encode_artifact(config, records, "0" * 64), device)
        return result | dict(coding_seconds=coding_seconds, bytes_model=len(blob))
    except tg.UserError as error:
        return result | dict(coding_seconds=None, bytes_model=None, note=str(error))


def bench_score(
    config: tg.Config, stream: tg.TokenStream, table: tg.ByteTable, device: torch.device, arm: str, count: int
):
    """Sliding windows a second at EVAL_STRIDE, over about COUNT of them, the first batch apart."""
    _, model = make_model(config, device)
    nll_fn = compiled_or_not(tg.token_nll, arm, config, device)
    tokens = stream.read(0, config.eval_seq_len + count * config.eval_stride + 1).astype(np.uint16)
    windows = tg.sliding_windows(len(tokens), config.eval_seq_len, config.eval_stride)
    head = tokens[: config.eval_seq_len + 1]
    first = tg.sliding_windows(len(head), config.eval_seq_len, config.eval_seq_len)
    warm, _ = timed(lambda: tg.score(model, head, [tg.Chunk(first)], table, config.eval_batch_seqs, nll_fn), device)
    seconds, _ = timed(
        lambda: tg.score(model, tokens, [tg.Chunk(windows)], table, config.eval_batch_seqs, nll_fn), device
    )
    return dict(phase="score", arm=arm, windows=len(windows.start), windows_per_second=len(windows.start) / seconds,
                first_batch_seconds=warm)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "records/recipes/pr1019.env"))
    parser.add_argument("--data", type=Path, help="folder of shards; default: the embedded corpus")
    parser.add_argument(
        "--tokenizer", type=Path, help="SentencePiece model; default: tokenizer.model beside the shards"
    )
    parser.add_argument("--phases", default="step,export,score")
    parser.add_argument("--arms", default="plain,compiled")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--windows", type=int, default=20000)
    parser.add_argument("--quick", action="store_true", help="two steps and 256 windows an arm")
    parser.add_argument("--out", type=Path, help="folder for gpu.json")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    data = arguments.data or ROOT / "data/demo"
    if arguments.data is None:
        subprocess.run([sys.executable, "data/demo.py", "--out", str(data)], cwd=ROOT, check=True, stdout=sys.stderr)
    paths = dict(DATA_PATH=str(data), TOKENIZER_PATH=str(arguments.tokenizer or data / "tokenizer.model"))
    config, _, _ = tg.load_config({**os.environ, "RECIPE": arguments.recipe, **paths})
    device = tg.start_ranks(config, {})
    stream = tg.TokenStream(config.shards("train"), config.vocab_size)
    table = tg.load_byte_table(config.tokenizer_path, config.vocab_size)
    steps, windows = (2, 256) if arguments.quick else (arguments.steps, arguments.windows)
    jobs = {
        "step": lambda arm: bench_step(config, stream, device, arm, steps),
        "export": lambda arm: bench_export(config, stream, device) if arm == "plain" else None,
        "score": lambda arm: bench_score(config, stream, table, device, arm, windows),
    }
    versions = tg.library_versions(device, tg.choose_attention(config.attention, device)[0])
    report = dict(benchmark="gpu", recipe=Path(arguments.recipe).name, data=data.name, versions=versions, results=[])
    for phase in arguments.phases.split(","):
        for arm in arguments.arms.split(","):
            result = jobs[phase](arm)
            if result is not None:
                shown = (f"{key}:{v:.5g}" if isinstance(v, float) else f"{key}:{v}" for key, v in result.items())
                print(*shown, flush=True)
                report["results"].append(result)
                if arguments.out:
                    arguments.out.mkdir(parents=True, exist_ok=True)
                    (arguments.out / "gpu.json").write_text(json.dumps(report, indent=1))
    print("BENCH " + json.dumps(report))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except tg.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
