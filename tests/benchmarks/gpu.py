"""Profile one recipe on one GPU: the time of a step by component, and of export, scoring and adaptation.

    python tests/benchmarks/gpu.py --data DIR --tokenizer FILE --out DIR      pr1019, under ten minutes
    python tests/benchmarks/gpu.py --phases step,profile --steps 20           some phases only
    python tests/benchmarks/gpu.py --quick                                    two steps per arm, demo corpus

It needs only this repository's files. Arms are plain torch and torch.compile, side by side, and on request
autotuned, where the compiler also tries its own matrix products with fused epilogues. Phases:

floors     lower bound in ms per step: operations and bytes, counted from the shapes, at the rates of a large
           matrix product and of H200 memory; activation passes are a guess, 40 per layer (traffic.py counts
           57.7 compiled)
step       ms per step of TRAIN_BATCH_TOKENS, tokens/s, MFU, peak memory, seconds of the first step (which
           compiles)
pieces     ms per step of each component alone, forward and backward, at the step's shapes; the rest is norms,
           gates, mixing
profile    the kernels of a step by device time, and their fractions by kind
losses     losses over --loss-steps from one seed: each arm against plain torch, and plain bfloat16 against
           float32
attention  every available kernel, forward and backward, with its error against float32, on whole sequences
           and within the documents of the text
export     seconds of Hessians and gradients, quantization and coding
score      sliding windows per second, and the seconds for 62 million targets on 8 such GPUs
ttt        the same for chunk and per-document adaptation

MFU is flops_per_token * tokens/s / 989e12, the datasheet's bfloat16 rate of H100 and H200, causal attention
counted. Results are written as they arrive; the last line is `BENCH {json}`. It also runs on a CPU, as a
test. If a phase raises an exception, it is recorded, the next phase runs, and the exit code is 1. No phase
starts after --seconds. `gpu_minutes.py` runs this and everything else in one command.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]
from gpu_parts import PEAK_FLOPS, full_seconds  # noqa: E402

import eval_ttt as ev  # noqa: E402
import train_gpt as tg  # noqa: E402

MATMUL_FLOPS, ATTENTION_FLOPS, MEMORY_BYTES = 790e12, 395e12, 4.4e12  # per second, as reached on such a chip
ACTIVATION_PASSES = 40  # per layer, forward and backward: norms, gates, residuals, rotation
REGIONS = (  # kinds of kernels by name; the first match counts
    ("attention", r"flash|fmha|sdpa|sdp_|attention|mha_"),
    ("communication", r"nccl"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|::mm$|::bmm$|::addmm"),
    ("optimizer", r"multi_tensor|adam|foreach|lerp"),
    ("loss", r"nll|softmax|cross_entropy"),
    ("copies", r"mem(cpy|set)|copy|cat"),
    ("pointwise", r"triton|elementwise|reduce|vectorized|::"),
)
TTT_MODES = {  # name -> settings, and how many thousandths of the tokens are enough to time it
    "chunks, banks": (dict(ttt_mode="banks"), 400),
    "documents, adapters": (dict(ttt_mode="doc_lora", ttt_groups=1), 200),
    "documents, all weights": (dict(ttt_mode="doc_banks", ttt_groups=1), 100),
}


def float32_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """`sdpa_attention` with K and V repeated to as many heads as Q.

    With fewer K/V heads no fused torch kernel accepts float32, and the math kernel stores (B, H, T, T): 6.4
    GB per layer of pr1019.
    """
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    return tg.sdpa_attention(q, k, v, documents)


@dataclass
class Bench:
    """State shared by all phases."""

    config: tg.Config
    stream: tg.TokenStream
    table: tg.ByteTable
    device: torch.device
    steps: int
    windows: int
    quick: bool
    loss_steps: int = 10
    backend: str = "inductor"
    initial: dict[str, Tensor] = field(default_factory=dict)  # cached: initialization takes seconds in LAPACK

    def model(self, dtype: torch.dtype | None = None) -> tuple[str, tg.GPT]:
        """Return the name of the attention kernel and the initialized model."""
        attention, kernel, _ = tg.choose_attention(self.config.attention, self.device)
        kernel = float32_attention if dtype == torch.float32 else kernel  # flash kernels are for 16 bits
        model = tg.GPT(
            self.config, dtype or tg.compute_dtype(self.device), kernel, self.table.has_leading_space
        )
        if not self.initial:
            made = model.init_weights(self.config.seed).state_dict()
            self.initial |= {name: value.clone() for name, value in made.items()}
        model.load_state_dict(self.initial)
        return attention, model.to(self.device)

    def run(self, function: Callable, arm: str) -> Callable:
        """Return `function` unchanged in arm `plain`, else compiled as in the trainer or autotuned."""
        if arm == "autotuned":
            mode = "max-autotune-no-cudagraphs" if self.backend == "inductor" else None
            return torch.compile(function, dynamic=False, fullgraph=True, mode=mode, backend=self.backend)
        if arm == "compiled" and self.backend != "inductor":
            return torch.compile(function, dynamic=False, fullgraph=True, backend=self.backend)
        return tg.maybe_compile(
            function, replace(self.config, use_compile=str(int(arm == "compiled"))), self.device
        )

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        return tg.step_batches(
            SimpleNamespace(config=self.config, train=self.stream, device=self.device), step
        )

    def timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that `function` took, device time included, and its result."""
        tg.synchronize(self.device)
        began = time.perf_counter()
        result = function()
        tg.synchronize(self.device)
        return time.perf_counter() - began, result

    def median_ms(self, function: Callable[[], Any], repeats: int = 10) -> float:
        """Return the median milliseconds of `function` after three warm-up calls; one call with --quick."""
        for _ in range(0 if self.quick else 3):
            function()
        return 1000 * float(np.median([self.timed(function)[0] for _ in range(1 if self.quick else repeats)]))


# ------------------------------------------------------------------------------------------------------------
# Training step
# ------------------------------------------------------------------------------------------------------------


def count_floors(config: tg.Config) -> dict[str, tuple[float, float, float]]:
    """Return region -> operations per step, bytes through memory, peak operations per second."""
    c, N, L = config, config.train_batch_tokens, len(config.block_rows)
    d, m, kv = c.model_dim, c.mlp_dim, c.kv_dim
    side = c.bigram_dim * d * bool(c.bigram_vocab_size) + c.ve_dim * kv * bool(c.value_layers)
    banks = {(d, d): 2 * c.num_layers, (kv, d): 2 * c.num_layers, (m, d): c.num_layers, (d, m): c.num_layers}
    iteration = sum(n * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s, n in banks.items())
    weights = sum(n * a * b for (a, b), n in banks.items())
    return {
        "projections": (6.0 * N * L * (2 * d * d + 2 * kv * d), 0.0, MATMUL_FLOPS),
        "MLP": (6.0 * N * L * 2 * m * d, 0.0, MATMUL_FLOPS),
        "attention": (6.0 * N * L * c.train_seq_len * d, 0.0, ATTENTION_FLOPS),
        "head and side tables": (
            6.0 * N * (c.vocab_size * d * (1 + c.mtp_num_heads) + side),
            0.0,
            MATMUL_FLOPS,
        ),
        "norms, gates, mixing": (0.0, 2.0 * N * d * L * ACTIVATION_PASSES, 1.0),
        "loss": (0.0, 3.0 * 4 * N * c.vocab_size, 1.0),
        "Newton-Schulz": (float(c.muon_backend_steps * iteration), 0.0, MATMUL_FLOPS),
        "optimizer's memory": (0.0, 4.0 * weights * 12, 1.0),
    }


def bench_floors(b: Bench) -> dict:
    """Return the lower bounds in milliseconds, their sum, and the resulting MFU."""
    floors = {name: 1000 * max(flops / rate, moved / MEMORY_BYTES)
              for name, (flops, moved, rate) in count_floors(b.config).items()}  # fmt: skip
    total = sum(floors.values())
    mfu = (
        tg.project_module("describe").flops_per_token(b.config)
        * b.config.train_batch_tokens
        / (total / 1000)
        / PEAK_FLOPS
    )
    return dict(ms=floors, total_ms=total, mfu=mfu)


def bench_step(b: Bench, arm: str) -> dict:
    """Measure the median milliseconds of training steps after three warm-up steps."""
    torch.cuda.reset_peak_memory_stats() if b.device.type == "cuda" else None
    (attention, model), c = b.model(), b.config
    count = b.steps if arm != "plain" else max(2, b.steps // 2)  # slow and less important
    optimizers, average = tg.make_optimizers(model, c), tg.WeightAverage(model, c)
    loss_fn = b.run(tg.training_loss, arm)
    loader, clock = tg.Loader(SimpleNamespace(config=c, train=b.stream, device=b.device)), tg.Clock(b.device)

    def step(index: int) -> tg.StepMetrics:
        measured = tg.train_step(loss_fn, model, loader.batches(index), optimizers, 1.0, c.muon_momentum)
        average.update(index + 1, 1.0)
        clock.step_done(index, measured)
        return measured

    first, _ = b.timed(lambda: step(0))
    losses = [step(index).loss for index in (1, 2)]
    times = []
    for index in range(3, 3 + count):
        seconds, measured = b.timed(lambda index=index: step(index))
        times.append(seconds)
        losses.append(measured.loss)
    together, _ = b.timed(lambda: [step(index) for index in range(3 + count, 3 + 2 * count)])
    rate = c.train_batch_tokens * count / together
    peak = torch.cuda.max_memory_allocated() / 2**20 if b.device.type == "cuda" else 0.0
    return dict(attention=attention, ms_per_step=1000 * together / count,
                ms_alone=1000 * float(np.median(times)), ms_min=1000 * min(times), ms_max=1000 * max(times),
                steps=count, tokens_per_second=rate,
                mfu=tg.project_module("describe").flops_per_token(c) * rate / PEAK_FLOPS,
                first_step_seconds=first, peak_mib=peak,
                data_wait_ms=1000 * loader.waited / (3 + 2 * count), last_loss=losses[-1].item())  # fmt: skip


def pieces(b: Bench, model: tg.GPT) -> dict[str, tuple[int, Callable, tuple[Tensor, ...]]]:
    """Return name -> number of runs per step, the component, and its inputs at the step's shapes."""
    c, (rows, parts) = b.config, tg.split_batch(b.config)
    B, T, d, L = rows // parts, c.train_seq_len, c.model_dim, len(c.block_rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=b.device, dtype=model.dtype).requires_grad_()

    ids = torch.randint(c.vocab_size, (B, T), device=b.device)
    q, k, v = random(B, T, c.num_heads, c.head_dim), *(random(B, T, c.num_kv_heads, c.head_dim) for _ in "kv")
    fused = model.weights()._asdict()
    matrices = {name: part[0].detach().to(model.dtype).requires_grad_() for name, part in fused.items()}

    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(x @ up.mT, c.mlp_leaky_slope).square() @ down.mT

    def projections(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        return torch.cat((x @ qkv.mT, x @ out.mT), dim=-1)

    def block(x: Tensor, x0: Tensor) -> Tensor:
        weights = tg.BlockWeights(matrices, {})
        return model.blocks[0](x, x0, weights, model.attention_context(ids, x), None, None)

    def head(x: Tensor) -> Tensor:
        return tg.nll(model.head(x), ids).mean()

    return {
        "blocks": (L * parts, block, (random(B, T, d), random(B, T, d))),
        "  attention kernel": (L * parts, model.blocks[0].attn.kernel, (q, k, v)),
        "  projections": (L * parts, projections, (random(B, T, d), matrices["qkv"], matrices["o"])),
        "  MLP": (L * parts, mlp, (random(B, T, d), matrices["up"], matrices["down"])),
        "embedding": (parts, lambda: model.embed(ids), ()),
        "head and loss": (parts, head, (random(B, T, d),)),
    }


def bench_pieces(b: Bench, arm: str) -> dict:
    """Measure the milliseconds per step of each component, the optimizers, averaging and data loading."""
    (_, model), c = b.model(), b.config
    optimizers, average = tg.make_optimizers(model, c), tg.WeightAverage(model, c)
    found = {}
    for name, (times, function, inputs) in pieces(b, model).items():
        run = b.run(function, arm)

        def both_ways(run: Callable = run, inputs: tuple[Tensor, ...] = inputs) -> None:
            out = run(*inputs)
            out.backward(torch.ones_like(out))

        found[name] = times * b.median_ms(both_ways)
    muon, adamw = optimizers
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    found |= {"Muon": b.median_ms(muon.step), "AdamW": b.median_ms(adamw.step)}
    found["average"] = b.median_ms(lambda: average.update(c.ema_update_every, 1.0))
    found["reading a batch, in its thread"] = b.median_ms(lambda: b.batches(7))
    return dict(ms=found)


def region(kernel: str) -> str:
    """Return the kind of a kernel from its name."""
    return next((name for name, pattern in REGIONS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def bench_profile(b: Bench, arm: str) -> dict:
    """Measure the device time by kind of kernel, as fractions, and the twelve largest kernels."""
    (_, model), c = b.model(), b.config
    optimizers, loss_fn = tg.make_optimizers(model, c), b.run(tg.training_loss, arm)
    batches = b.batches(0)

    def step() -> None:
        tg.train_step(loss_fn, model, batches, optimizers, 1.0, c.muon_momentum)

    for _ in range(1 if b.quick else 3):
        step()
    on_gpu = b.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        b.timed(step)
    events = profile.key_averages()
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events
    }
    total, shares = sum(spent.values()), {}
    for name, microseconds in spent.items():
        shares[region(name)] = shares.get(region(name), 0.0) + microseconds / total
    first = sorted(spent, key=spent.get, reverse=True)[:12]
    return dict(device_ms=total / 1000, shares=dict(sorted(shares.items(), key=lambda item: -item[1])),
                kernels={name[:80]: spent[name] / 1000 for name in first})  # fmt: skip


def bench_losses(b: Bench, arm: str) -> dict:
    """Compare the losses of some steps with plain torch in bfloat16; arm `plain` runs in float32."""
    c, steps, found = b.config, 2 if b.quick else b.loss_steps, []
    for way, dtype in (("plain", torch.bfloat16), (arm, torch.float32 if arm == "plain" else torch.bfloat16)):
        _, model = b.model(dtype)
        optimizers, loss_fn, losses = tg.make_optimizers(model, c), b.run(tg.training_loss, way), []
        for step in range(steps):
            momentum = tg.momentum_at(c, step)
            losses.append(
                tg.train_step(loss_fn, model, b.batches(step), optimizers, 1.0, momentum).loss.item()
            )
        found.append(np.array(losses))
    apart = np.abs(found[0] - found[1])
    return dict(steps=steps, nats_apart_max=float(apart.max()), nats_apart_mean=float(apart.mean()),
                last_loss_plain=found[0][-1], last_loss=found[1][-1])  # fmt: skip


def attention_kernels(b: Bench) -> dict[str, Callable]:
    """Return every attention kernel that this machine may have, by name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend: SDPBackend) -> Callable:
        def attention(*arguments: Tensor | None) -> Tensor:
            with sdpa_kernel(backend):
                return tg.sdpa_attention(*arguments)

        return attention

    kernels: dict[str, Callable] = {"masks": tg.sdpa_attention}
    kernels |= {
        f"masks, {kind.name.lower()}": by(kind)
        for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    }
    for name in ("fa3", "fa2", "sdpa"):
        with contextlib.suppress(tg.UserError):
            kernels[name] = tg.choose_attention(name, b.device)[1]
    return kernels


def bench_attention(b: Bench) -> dict:
    """Measure the milliseconds per step of each kernel and its error on two sequences against float32."""
    (_, model), found = b.model(), {}
    times, _, inputs = pieces(b, model)["  attention kernel"]
    documents = (b.batches(0)[0][0] == tg.BOS_ID).cumsum(1)
    pairs = torch.nn.functional.one_hot(documents).sum(1).double().square().sum() / documents.numel()
    for part, given in (("rows", None), ("documents", documents)):
        few = [x.detach()[:2] for x in inputs]
        exact = tg.sdpa_attention(*(x.float() for x in few), None if given is None else given[:2])
        for name, kernel in attention_kernels(b).items():

            def both_ways(kernel: Callable = kernel, given: Tensor | None = given) -> None:
                kernel(*inputs, given).sum().backward()

            try:
                got = kernel(*few, None if given is None else given[:2])
                error = float((got.float() - exact).norm() / exact.norm())
                found[f"{part}, {name}"] = dict(ms=times * b.median_ms(both_ways), error=error)
            except (RuntimeError, TypeError) as failure:  # older torch versions have other arguments
                found[f"{part}, {name}"] = dict(ms=None, note=str(failure).splitlines()[0][:120])
    return dict(pairs_within_documents=float(pairs / documents.size(1)), kernels=found)


# ------------------------------------------------------------------------------------------------------------
# Export and evaluation
# ------------------------------------------------------------------------------------------------------------


def bench_export(b: Bench) -> dict:
    """Measure seconds of statistics, quantization and coding, and artifact bytes, for initial weights."""
    (_, model), c = b.model(), b.config
    run = SimpleNamespace(config=c, train=b.stream, device=b.device)
    statistics_seconds, statistics = b.timed(lambda: tg.read_statistics(run, model))
    rounding_seconds, records = b.timed(lambda: tg.quantize_state_dict(model.state_dict(), statistics, c))
    result = dict(batches=c.gptq_calib_batches, gradient_batches=c.gptq_grad_batches * c.wants_gradients,
                  statistics_seconds=statistics_seconds, rounding_seconds=rounding_seconds)  # fmt: skip
    try:
        coding_seconds, blob = b.timed(lambda: tg.encode_artifact(c, records, "0" * 64))
        return result | dict(coding_seconds=coding_seconds, bytes_model=len(blob))
    except tg.UserError as error:
        return result | dict(coding_seconds=None, bytes_model=None, note=str(error))


def bench_score(b: Bench, arm: str) -> dict:
    """Measure sliding windows per second at EVAL_STRIDE; the first batch is timed separately."""
    (_, model), c, nll_fn = b.model(), b.config, b.run(tg.token_nll, arm)
    tokens = b.stream.read(0, c.eval_seq_len + b.windows * c.eval_stride + 1).astype(np.uint16)
    windows = tg.sliding_windows(len(tokens), c.eval_seq_len, c.eval_stride)
    head = tokens[: c.eval_seq_len + 1]
    first = tg.sliding_windows(len(head), c.eval_seq_len, c.eval_seq_len)
    warm, _ = b.timed(lambda: tg.score(model, head, [tg.Chunk(first)], b.table, c.eval_batch_seqs, nll_fn))
    seconds, _ = b.timed(
        lambda: tg.score(model, tokens, [tg.Chunk(windows)], b.table, c.eval_batch_seqs, nll_fn)
    )
    rate = (len(tokens) - 1) / seconds
    return dict(windows=len(windows.start), windows_per_second=len(windows.start) / seconds,
                targets_per_second=rate, full_seconds=full_seconds(rate),
                first_batch_seconds=warm)  # fmt: skip


def bench_ttt(b: Bench, arm: str) -> dict:
    """Measure targets per second of each TTT mode after a warm-up, on the artifact of the initial weights."""
    (_, model), found = b.model(), {}
    rounded = tg.quantize_state_dict(
        model.state_dict(), tg.Statistics(), replace(b.config, quant_steps="sigmas")
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "final_model.int6.ptz"
        path.write_bytes(tg.encode_artifact(b.config, rounded, tg.sha256_file(b.config.tokenizer_path)))
        config = replace(b.config, model_path=str(path), use_compile="1" if arm == "compiled" else "0")
        setup, tokens, *_ = ev.prepare(config, {}, {})
    for name, (settings, thousands) in TTT_MODES.items():
        mode = replace(setup, config=replace(setup.config, **settings))
        part = tokens[: min(len(tokens), 3000 if b.quick else 1000 * thousands)]
        warm, _ = b.timed(lambda mode=mode: None if b.quick else ev.warm_up(mode))
        seconds, _ = b.timed(lambda mode=mode, part=part: ev.evaluate(mode, part))
        rate = (len(part) - 1) / seconds
        found[name] = dict(targets_per_second=rate, full_seconds=full_seconds(rate), warm_up_seconds=warm)
    return dict(modes=found)


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

ARMS = ("plain", "compiled", "autotuned")
PHASES = {  # by value: name -> function, arms (empty: no arms)
    "floors": (bench_floors, ()),
    "step": (bench_step, ARMS),
    "profile": (bench_profile, ARMS),
    "attention": (bench_attention, ()),
    "losses": (bench_losses, ARMS),
    "score": (bench_score, ARMS),
    "export": (bench_export, ()),
    "pieces": (bench_pieces, ARMS),
    "ttt": (bench_ttt, ARMS[:2]),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=str(ROOT / "records/recipes/pr1019.env"))
    parser.add_argument("--data", type=Path, help="folder of shards; default: the demo corpus")
    parser.add_argument(
        "--tokenizer", type=Path, help="SentencePiece model; default: tokenizer.model beside the shards"
    )
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--arms", default="compiled,plain")
    parser.add_argument(
        "--steps", type=int, default=20, help="timed steps in phase step; half of them in arm plain"
    )
    parser.add_argument("--loss-steps", type=int, default=10, help="steps in phase losses")
    parser.add_argument(
        "--seconds", type=float, default=0, help="no phase starts after this time; 0: no limit"
    )
    parser.add_argument("--backend", default="inductor", help="torch.compile backend; eager only traces")
    parser.add_argument("--windows", type=int, default=20000)
    parser.add_argument("--quick", action="store_true", help="two steps and 256 windows per arm")
    parser.add_argument("--out", type=Path, help="folder for gpu.json")
    return parser.parse_args()


def make_bench(arguments: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """Return the bench and the header of its report."""
    data = arguments.data or ROOT / "data/demo"
    if arguments.data is None:
        subprocess.run(
            [sys.executable, "data/demo.py", "--out", str(data)], cwd=ROOT, check=True, stdout=sys.stderr
        )
    paths = dict(DATA_PATH=str(data), TOKENIZER_PATH=str(arguments.tokenizer or data / "tokenizer.model"))
    config, _, _ = tg.load_config({**os.environ, "RECIPE": arguments.recipe, **paths})
    device = tg.start_ranks(config, {})
    steps, windows = (2, 256) if arguments.quick else (arguments.steps, arguments.windows)
    stream = tg.TokenStream(config.shards("train"), config.vocab_size)
    table = tg.load_byte_table(config.tokenizer_path, config.vocab_size)
    versions = tg.library_versions(device, tg.choose_attention(config.attention, device)[0])
    head = dict(
        benchmark="gpu", recipe=Path(arguments.recipe).name, data=data.name, versions=versions, results=[]
    )
    how = (steps, windows, arguments.quick, arguments.loss_steps, arguments.backend)
    return Bench(config, stream, table, device, *how), head


def shown(result: dict[str, Any], indent: str = "") -> str:
    """Format a result as lines: numbers side by side, nested results below."""

    def number(value: Any) -> str:
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    flat = [f"{key}:{number(value)}" for key, value in result.items() if not isinstance(value, dict)]
    lines = [indent + " ".join(flat)] if flat else []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", shown(value, indent + "  ")]
    return "\n".join(lines)


def run_phase(bench: Bench, phase: str, arm: str | None) -> dict[str, Any]:
    """Run a phase and return its result, or on an exception the error and the last lines of its traceback.

    Memory, the compiler or a missing package can break one phase without affecting later ones.
    """
    began, function = time.perf_counter(), PHASES[phase][0]
    try:
        result = function(bench, arm) if arm else function(bench)
    except Exception as failure:
        traceback.print_exc()
        text = str(failure).strip().splitlines() or [""]
        result = dict(
            error=f"{type(failure).__name__}: {text[0][:200]}", traceback=traceback.format_exc()[-2000:]
        )
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return dict(phase=phase, arm=arm, **result, phase_seconds=time.perf_counter() - began)


def main() -> int:
    """Run the phases; exit code 0 if all have a result, 1 if one failed or had no time, 2 on a user error."""
    began, arguments = time.perf_counter(), parse_arguments()
    phases, arms = arguments.phases.split(","), arguments.arms.split(",")
    if unknown := {*phases} - {*PHASES} | {*arms} - {*ARMS}:
        known = f"known phases: {', '.join(PHASES)}; arms: {', '.join(ARMS)}"
        raise tg.UserError(f"unknown: {', '.join(sorted(unknown))}; {known}")
    bench, report = make_bench(arguments)
    for phase in phases:
        possible = PHASES[phase][1]
        for arm in [arm for arm in arms if arm in possible] if possible else [None]:
            if 0 < arguments.seconds < time.perf_counter() - began:
                result = dict(
                    phase=phase, arm=arm, error=f"not started: --seconds {arguments.seconds:g} used up"
                )
            else:
                result = run_phase(bench, phase, arm)
            print(shown(result), flush=True)
            report["results"].append(result)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                tg.write_atomically(arguments.out / "gpu.json", json.dumps(report, indent=1).encode())
    print("BENCH " + json.dumps(report))
    return int(any("error" in result for result in report["results"]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except tg.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
