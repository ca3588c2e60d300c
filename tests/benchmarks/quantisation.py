"""Benchmark quantization: bytes against bits per byte for our scales and coders and for published ones.

    python tests/benchmarks/quantisation.py --run runs/NAME --out runs/bench_quantisation   curve, table, plot
    python tests/benchmarks/quantisation.py --run runs/NAME --quick                         a minute, coarser
    python tests/benchmarks/quantisation.py --timing                                        27 M random codes

Every pipeline quantizes the weights of a run's final_model.pt at several scales. The gap is the bits per byte
of the model read back from the bytes minus that of the float weights, on the same validation targets, with
non-overlapping windows. The published pipelines keep their own layout: codes in weight order, float16 row
scales, float16 projections of the tables. Points are stored under --out as they arrive and reused by later
calls. Ends with a table, a plot (curves.png) and one line `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import brotli
import matplotlib
import numpy as np
import torch
import zstandard
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402

LOSSES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SIGMAS = (6, 8, 10, 12.85, 17)
TWO = dict(quant_steps="two_sided")


class Pipeline(NamedTuple):
    """Settings, the one that is varied and its values, and the packer of a rival's codes; None: our artifact.

    fixed: every bank row has the scale of `with_fixed_scales`.
    """

    settings: dict[str, Any]
    varied: str
    values: tuple[float, ...]
    pack: Callable[[bytes], bytes] | None = None
    ours: bool = False
    fixed: bool = False


def brotli_11(data: bytes) -> bytes:
    return brotli.compress(data, quality=11, lgwin=24)


def zstd_22(data: bytes) -> bytes:
    return zstandard.compress(data, 22)


def lzma_9(data: bytes) -> bytes:
    return lzma.compress(data, preset=9)


PIPELINES = {
    "step 1/31, lzma-9 (#1019)": Pipeline({}, "factor", (0.7, 1, 1.4, 2, 2.8), lzma_9, fixed=True),
    "int6 by row, zstd-22": Pipeline(dict(matrix_clip_sigmas=4.0), "matrix_bits", (3, 4, 5, 6, 7), zstd_22),
    "k sigma, brotli-11": Pipeline({}, "matrix_clip_sigmas", SIGMAS, brotli_11),
    "k sigma, tables 12 sigma, brotli-11": Pipeline(
        dict(embed_clip_sigmas=12.0), "matrix_clip_sigmas", SIGMAS, brotli_11
    ),
    "k sigma, tables 20 sigma, brotli-11 (#1394)": Pipeline(
        dict(embed_clip_sigmas=20.0), "matrix_clip_sigmas", SIGMAS, brotli_11
    ),
    "two-sided, zstd": Pipeline(TWO, "quant_loss", LOSSES, ours=True),
    "two-sided, ans": Pipeline(dict(TWO, compressor="ans"), "quant_loss", LOSSES, ours=True),
    "two-sided, trellis, zstd": Pipeline(dict(TWO, quant_trellis=True), "quant_loss", LOSSES, ours=True),
    "two-sided, trellis, ans": Pipeline(
        dict(TWO, quant_trellis=True, compressor="ans"), "quant_loss", LOSSES, ours=True
    ),
    "sigmas, our layout, zstd": Pipeline({}, "matrix_clip_sigmas", SIGMAS),
    "sigmas, bits by gradient (#398), our layout": Pipeline(
        dict(grad_quant=True), "matrix_clip_sigmas", SIGMAS
    ),
    "clip search, our layout": Pipeline(dict(quant_steps="clip"), "matrix_bits", (4, 5, 6, 7)),
    "two-sided, brotli-11, order of the weights": Pipeline(TWO, "quant_loss", LOSSES, brotli_11),
    "two-sided, damping 0.001": Pipeline(dict(TWO, gptq_damp=0.001), "quant_loss", LOSSES),
    "two-sided, damping 0.1": Pipeline(dict(TWO, gptq_damp=0.1), "quant_loss", LOSSES),
    "two-sided, self-generated text": Pipeline(dict(TWO, calib_source="self"), "quant_loss", LOSSES),
    "two-sided, 5 % pruned": Pipeline(dict(TWO, prune_frac=0.05), "quant_loss", LOSSES),
    "two-sided, 20 % pruned": Pipeline(dict(TWO, prune_frac=0.2), "quant_loss", LOSSES),
    "k sigma, 5 % pruned, brotli-11": Pipeline(
        dict(prune_frac=0.05), "matrix_clip_sigmas", SIGMAS, brotli_11
    ),
}
REFERENCE_GAPS = (0.001, 0.002, 0.003, 0.004, 0.006)


class Weights:
    """A trained model, its export statistics, and its scores."""

    def __init__(self, run: Path, data: Path, targets: int):
        given = {name.upper(): str(int(v) if isinstance(v, bool) else v)
                 for name, v in json.loads((run / "config.json").read_text())["given"].items()}  # fmt: skip
        given |= {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model"), "RUN_ID": "read"}
        self.config, _, _ = tg.load_config({name: value for name, value in given.items() if name != "RECIPE"})
        self.table = tg.load_byte_table(self.config.tokenizer_path, self.config.vocab_size)
        self.model = tg.GPT(self.config, word_start=self.table.has_leading_space)
        self.state = torch.load(run / "final_model.pt")
        self.model.load_state_dict(self.state)
        tokens = [
            tg.open_shard(path)
            for path in tg.TokenStream(self.config.shards("val"), self.config.vocab_size).paths
        ]
        self.tokens = np.concatenate(tokens)[: targets + 1]
        self.found: dict[str, tg.Statistics] = {}

    def statistics(self, source: str) -> tg.Statistics:
        if source not in self.found:
            config = replace(self.config, quant_steps="two_sided", calib_source=source)
            stream = tg.TokenStream(config.shards("train"), config.vocab_size)
            parts = dict.fromkeys(f.name for f in tg.fields(tg.Run))
            run = tg.Run(**parts | dict(config=config, device=torch.device("cpu"), train=stream))
            self.found[source] = tg.read_statistics(run, self.model)
        return self.found[source]

    def bpb(self, state: dict[str, Tensor]) -> float:
        self.model.load_state_dict(state)
        length = self.config.eval_seq_len
        plan = [tg.Chunk(tg.sliding_windows(len(self.tokens), length, length))]
        score = tg.score(self.model, self.tokens, plan, self.table, self.config.eval_batch_seqs)
        self.model.load_state_dict(self.state)
        return score.val_bpb


def with_fixed_scales(plans: dict[str, tg.QuantSpec]) -> dict[str, tg.QuantSpec]:
    """The plans with a scale of 1/31 for every bank row, as #1019 has them."""
    return {name: plan._replace(row_scale=torch.full_like(plan.row_scale, 1 / 31))
            if name in tg.GPT.BANKS else plan for name, plan in plans.items()}  # fmt: skip


def baseline_bytes(records: list[tg.QuantizedTensor], pack: Callable[[bytes], bytes]) -> int:
    """Bytes of codes in the order of the weights, and of their float16 scales and all other tensors, packed
    apart."""
    codes = b"".join(r.codes.numpy().tobytes() for r in records if r.row_scale is not None)
    steps = [
        part
        for r in records
        if r.row_scale is not None
        for part in (r.row_scale, r.col_scale)
        if part is not None
    ]
    side = [tg.decode_scale(part).half().numpy().tobytes() for part in steps]
    side += [r.codes.numpy().tobytes() for r in records if r.row_scale is None]
    return len(pack(codes)) + len(pack(b"".join(side)))


def point(weights: Weights, pipeline: Pipeline, value: float, base: float) -> dict[str, float]:
    """Return bytes and gap of a pipeline at one value of its varied setting."""
    factor = value if pipeline.varied == "factor" else 1.0
    settings = {} if pipeline.varied == "factor" else {pipeline.varied: value}
    config = replace(weights.config, **{"quant_steps": "sigmas", **pipeline.settings, **settings})
    began = time.perf_counter()
    plans = tg.quant_specs(weights.state, weights.statistics(config.calib_source), config)
    if pipeline.fixed:
        plans = with_fixed_scales(plans)
    if pipeline.pack is not None and config.quant_steps != "two_sided":
        plans = {name: plan for name, plan in plans.items() if ".proj." not in name}  # float16 there
    records = tg.quantize_by(weights.state, plans, config, factor)
    if pipeline.pack is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "artifact"
            path.write_bytes(tg.encode_artifact(config, records, "0" * 64))
            size, state = path.stat().st_size, tg.read_artifact(path).state
    else:
        size, state = baseline_bytes(records, pipeline.pack), {r.name: tg.dequantize(r) for r in records}
    seconds = time.perf_counter() - began
    return dict(value=value, bytes=size, gap=weights.bpb(state) - base, seconds=seconds)


def bytes_at(points: list[dict[str, float]], gap: float) -> float:
    """Return a curve's bytes at a gap by log-log interpolation; nan outside the curve."""
    usable = sorted((math.log(max(p["gap"], 1e-6)), math.log(p["bytes"])) for p in points)
    x, y = (np.array(column) for column in zip(*usable, strict=True))
    hull = np.minimum.accumulate(y)  # ignore points that are larger and worse
    return math.exp(np.interp(math.log(gap), x, hull)) if x[0] <= math.log(gap) <= x[-1] else math.nan


def is_published(name: str) -> bool:
    """Return whether a pipeline is a published one."""
    return PIPELINES[name].pack is not None and PIPELINES[name].settings.get("quant_steps") != "two_sided"


def table(curves: dict[str, list[dict[str, float]]]) -> tuple[str, dict[str, dict[str, float]]]:
    """Return Markdown: bytes of every pipeline at the reference gaps, relative to the best published one."""
    sizes = {name: {gap: bytes_at(points, gap) for gap in REFERENCE_GAPS} for name, points in curves.items()}
    best = {gap: min((sizes[name][gap] for name in sizes
                      if is_published(name) and not math.isnan(sizes[name][gap])),
                     default=math.nan) for gap in REFERENCE_GAPS}  # fmt: skip
    lines = ["| pipeline | " + " | ".join(f"gap {gap} bpb" for gap in REFERENCE_GAPS) + " |",
             "|---|" + "---:|" * len(REFERENCE_GAPS)]  # fmt: skip
    shares: dict[str, dict[str, float]] = {}
    for name, found in sizes.items():
        shares[name] = {
            str(gap): round(size / best[gap], 4) for gap, size in found.items() if size / best[gap] > 0
        }
        cells = ["" if math.isnan(size) else f"{size:,.0f}" for size in found.values()]
        cells = [f"{cell} ({shares[name][str(gap)]:.3f})" if str(gap) in shares[name] else cell
                 for gap, cell in zip(REFERENCE_GAPS, cells, strict=True)]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", shares


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot every curve, the published ones dashed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for name, points in curves.items():
        points = sorted(points, key=lambda p: p["bytes"])
        style = "-o" if PIPELINES[name].ours else "--s" if PIPELINES[name].pack else ":"
        axis.plot(
            [p["bytes"] for p in points],
            [max(p["gap"], 1e-5) for p in points],
            style,
            label=name,
            markersize=3,
        )
    axis.set(
        xlabel="bytes", ylabel="gap, bits per byte", yscale="log", title="quantized model minus float weights"
    )
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def curves_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compute the points missing from --out, then write table, plot and result."""
    weights = Weights(arguments.run, arguments.data, arguments.targets)
    path = arguments.out / "points.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    base = kept.setdefault("base", weights.bpb(weights.state))
    curves = kept.setdefault("curves", {})
    for name, pipeline in PIPELINES.items():
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        values = pipeline.values[1:-1:2] if arguments.quick else pipeline.values
        for value in values:
            points = curves.setdefault(name, [])
            if value in [p["value"] for p in points]:
                continue
            points.append(point(weights, pipeline, value, base))
            print(
                f"{name:48} {value:8g}  gap {points[-1]['gap']:+.5f}  {points[-1]['bytes']:,} bytes",
                flush=True,
            )
            tg.write_atomically(path, json.dumps(kept, indent=1).encode())
    text, shares = table(curves)
    tg.write_atomically(arguments.out / "table.md", text.encode())
    plot(curves, arguments.out / "curves.png")
    print(text)
    return dict(base=base, parameters=tg.count_parameters(weights.model), shares=shares)


# ------------------------------------------------------------------------------------------------------------
# Timing
# ------------------------------------------------------------------------------------------------------------


def plain_loop(W: Tensor, U: Tensor, order: Tensor, step: Tensor, levels: int, block: int = 128) -> Tensor:
    """Run GPTQ on one matrix (out, in) as in the published code: a block column by column, then the rest."""
    W, codes = W[:, order], torch.zeros_like(W)
    for start in range(0, W.size(1), block):
        end = min(start + block, W.size(1))
        part, errors, inner = (
            W[:, start:end].clone(),
            torch.zeros_like(W[:, start:end]),
            U[start:end, start:end],
        )
        for j in range(end - start):
            column = part[:, j]
            code = torch.clamp(torch.round(column / step), -levels, levels)
            error = (column - code * step) / inner[j, j]
            part[:, j:] -= error.unsqueeze(1) * inner[j, j:].unsqueeze(0)
            codes[:, start + j], errors[:, j] = code, error
        W[:, end:] -= errors @ U[start:end, end:]
    return codes[:, order.argsort()]


def timed(work: Callable[[], Any], turns: int = 3) -> tuple[float, Any]:
    """Return the minimum seconds over `turns` runs, and the last result."""
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result


def random_problem(config: tg.Config) -> tuple[dict[str, Tensor], tg.Statistics]:
    """Return Gaussian weights, Hessians of correlated inputs, gradients over three octaves."""
    generator = torch.Generator().manual_seed(0)
    model = tg.GPT(config)
    state = {name: torch.randn(p.shape, generator=generator) * 0.15 for name, p in model.state_dict().items()}
    widths = {stack: getattr(model, name).size(-1) for name in tg.GPT.BANKS for stack in tg.bank_sites(name)}
    hessians = {}
    for stack, width in widths.items():
        mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
        inputs = torch.randn(config.num_layers, 2 * width, width, generator=generator) @ mix
        inputs *= torch.randn(config.num_layers, 1, width, generator=generator).exp()
        hessians[stack] = inputs.mT @ inputs / inputs.size(1)
    gradients = {}
    for name, p in state.items():
        if tg.is_coded(name):
            columns = p.shape[0] if name in tg.GPT.BANKS else p.shape[1]
            gradients[name] = (torch.rand(p.shape[:-1], generator=generator).exp(), torch.ones(columns))
    return state, tg.Statistics(hessians, gradients)


def timing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of rounding, coding and reading 27 M codes, and of text by the model itself with and without a
    cache."""
    config, _, _ = tg.load_config(
        {"RECIPE": str(ROOT / "records/recipes/pr1019.env"), "QUANT_STEPS": "sigmas"}
    )
    state, statistics = random_problem(config)
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    stacked = {
        name: torch.cat([statistics.hessians[s] for s in tg.bank_sites(name)]) for name in tg.GPT.BANKS
    }
    factor = [
        (name, i, tg.factor_hessian(stacked[name][i : i + 1], 0.01))
        for name in stacked
        for i in range(len(stacked[name]))
    ]

    def loop() -> None:
        for name, i, (order, U, _) in factor:
            plain_loop(state[name][i], U[0], order[0], torch.full((state[name].size(1),), 1 / 31), 31)

    found["plain_loop"], _ = timed(loop, 1)
    found["plan"], plans = timed(lambda: with_fixed_scales(tg.quant_specs(state, statistics, config)))
    banks = {name: plan for name, plan in plans.items() if name in tg.GPT.BANKS}
    found["round"], _ = timed(lambda: tg.quantize_by({name: state[name] for name in banks}, banks, config))
    print(json.dumps(found), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for trellis in (False, True):
            for coder in ("zstd", "ans"):
                ours = replace(
                    config, quant_steps="two_sided", quant_loss=0.002, compressor=coder, quant_trellis=trellis
                )
                if coder == "zstd":
                    began = time.perf_counter()
                    records = tg.quantize_state_dict(state, statistics, ours)
                    found["quantize trellis" if trellis else "quantize two-sided"] = (
                        time.perf_counter() - began
                    )
                name, path = f"{'trellis ' if trellis else ''}{coder}", Path(folder) / "artifact"
                found[f"encode {name}"], blob = timed(
                    lambda ours=ours, r=records: tg.encode_artifact(ours, r, "0" * 64), 1
                )
                path.write_bytes(blob)
                found[f"decode {name}"], _ = timed(lambda path=path: tg.read_artifact(path), 2)
                found[f"bytes {name}"] = len(blob)
                print(json.dumps(found), flush=True)
    demo, _, _ = tg.load_config({"RECIPE": str(ROOT / "records/recipes/demo.env")})
    model = tg.GPT(demo).init_weights(0)
    found["generate cached"], _ = timed(lambda: tg.generate(model, 8, 256), 2)
    found["generate full prefix"], _ = timed(lambda: full_prefix(model, 8, 256), 1)
    return found


@torch.no_grad()
def full_prefix(model: tg.GPT, rows: int, length: int, temperature: float = 0.8) -> Tensor:
    """Generate text, recomputing the whole prefix for each token, as in the published code."""
    ids, generator = torch.full((rows, 1), tg.BOS_ID), torch.Generator().manual_seed(0)
    for _ in range(length - 1):
        shares = (model(ids)[:, -1] / temperature).softmax(-1)
        ids = torch.cat((ids, torch.multinomial(shares, 1, generator=generator)), dim=1)
    return ids


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="finished run folder: config.json, final_model.pt")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data/demo", help="shards and tokenizer of the run"
    )
    parser.add_argument("--targets", type=int, default=150_000, help="maximum number of validation targets")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_quantisation"))
    parser.add_argument("--only", nargs="+", help="run only pipelines whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="fewer points")
    parser.add_argument("--timing", action="store_true", help="measure times instead of curves")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = timing(arguments) if arguments.timing else curves_of(arguments)
    print("BENCH " + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
