"""What the trainer says before it trains: what a person may have overlooked in settings, text, or machine.

Only explains, so it does not ship: without records/ the trainer trains the same, and is silent about these.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path

import numpy as np
import torch

import train_gpt as tg
from train_gpt import BOS_ID, GPT, Run, TokenStream

FEW_STEPS = 50  # a run that ends by the clock before these has not begun to learn
LONG_WARM_UP = 60.0  # seconds
ENOUGH = 3.0  # seconds of timing


def merged_documents(train: TokenStream, seq_len: int, samples: int = 1000) -> tuple[int, int]:
    """Documents that begin inside sampled sequences, and those that varlen kernels merge with another.

    Pieces of documents, under DATA_ORDER=packed, are not counted.
    """
    starts = np.linspace(0, len(train) - 1, samples).astype(int).tolist()
    inner = np.array([np.count_nonzero(train.read(start, seq_len)[1:] == BOS_ID) for start in starts])
    return int(inner.sum()), int((inner - tg.room_for_documents(seq_len)).clip(min=0).sum())


def overlap_line(train: TokenStream, val_paths: Sequence[str]) -> str:
    """Log line with the overlap counts that the listing has for these training and validation shards."""
    listing = tg.read_listing(train.paths[0])
    folders = {Path(path).parent for path in (train.paths[0], *val_paths)}
    found = listing.overlap if listing else {}
    counts = [found.get(key) for key in ("documents_inside", "documents", "documents_touched")]
    is_counted = all(type(count) is int for count in counts)
    if len(folders) > 1 or found.get("train_tokens") != len(train) or not is_counted:
        return "overlap: not counted for these shards; data/prepare.py --overlap counts it"
    return (
        f"overlap: {counts[0]} of {counts[1]} validation documents occur inside training shards, "
        f"{counts[2]} in part"
    )


def seconds_per_step(run: Run, model: GPT) -> float:
    """Estimate of a training step: the fastest forward and backward of one random sequence, of 2 to 8.

    The first ones are slow: memory is allocated, and threads and kernels start.
    """
    c, seconds = run.config, []
    tokens = tg.RandomTokens(c.vocab_size).read(0, c.row_tokens + 1)
    ids = torch.from_numpy(tokens)[None].to(run.device)
    while len(seconds) < 2 or (len(seconds) < 8 and sum(seconds) < ENOUGH):
        began = time.perf_counter()
        tg.training_loss(model, *tg.shifted(ids)).backward()
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return min(seconds) * tg.split_batch(c)[0]


def pace_lines(run: Run, model: GPT) -> Iterator[str]:
    """Whether a run on a CPU gets anywhere in its time; GPUs are fast enough, and cost time to measure."""
    c = run.config
    if run.device.type != "cpu":
        return
    step = seconds_per_step(run, model)
    count = min(c.iterations, c.max_wallclock_seconds / step) if c.max_wallclock_seconds else c.iterations
    takes = f"a step of {c.train_batch_tokens:,} tokens takes about {step:.3g} s on this CPU"
    if c.warmup_steps * step > LONG_WARM_UP:
        yield f"WARNING: {takes} and warm-up {c.warmup_steps * step:.0f} s. WARMUP_STEPS=1 is enough."
    if count < min(c.iterations, FEW_STEPS):
        yield (
            f"WARNING: {takes}: {int(count)} of {c.iterations} steps in {c.max_wallclock_seconds:.0f} s. "
            "RECIPE=records/recipes/demo.env is for CPUs."
        )


def before_training(run: Run, model: GPT) -> Iterator[str]:
    """Log lines: notes and warnings about settings, text, and machine."""
    c = run.config
    if run.versions.get("attention_backend") == "math" and run.device.type == "cuda":
        rows = tg.split_batch(c)[0] // tg.split_batch(c)[1]
        stored = rows * c.num_heads * c.row_tokens**2 * tg.compute_dtype(run.device).itemsize / 1e9
        yield f"WARNING: torch has only its math kernel for attention: {stored:.1f} GB of scores per layer"
    if c.doc_borders == "attention" and run.device.type == "cuda":
        inner, merged = merged_documents(run.train, c.row_tokens)
        yield f"note: attention's kernels merge {merged} of {inner} documents in 1000 sampled sequences"
    if (c.late_qat or "deployed" in c.phases) and c.quant_steps == "two_sided":
        yield "note: training rounds the banks per row, the export by two-sided scales"
    yield overlap_line(run.train, glob(c.shards("val")))
    if len(run.train) < c.train_batch_tokens:
        yield (
            f"WARNING: the training text has {len(run.train):,} tokens and a step reads "
            f"{c.train_batch_tokens:,}, so that each step repeats it. Lower TRAIN_BATCH_TOKENS."
        )
    yield from pace_lines(run, model)
