"""Score an artifact on the validation text, plain and with test-time training: every target first scored, then learned.

    MODEL_PATH=runs/NAME/final_model.int6.ptz python eval_ttt.py
    MODEL_PATH=runs/NAME/final_model.int6.ptz torchrun --standalone --nproc_per_node=8 eval_ttt.py
    MODEL_PATH=runs/NAME/final_model.int6.ptz python eval_ttt.py --audit     the checks of legality, with a certificate
    MODEL_PATH=runs/NAME/final_model.int6.ptz python eval_ttt.py --audit=7   the same with the seed 7, not a random one
    python eval_ttt.py --help                                                every setting, its default and unit

The model's settings come from the artifact; TTT_* and EVAL_* say how it is scored. Read top to bottom: plans, learning,
evaluation, the mixture with an order-1 PPM, audit, reports, main. Shapes as in train_gpt.py.
"""

from __future__ import annotations

import heapq
import io
import json
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from sentencepiece import SentencePieceProcessor
from torch import Tensor

import train_gpt as tg
from train_gpt import BOS_ID, TTT_MODES, Chunk, Config, UserError, Windows

# ----------------------------------------------------------------------------------------------------------------------
# Plans
# ----------------------------------------------------------------------------------------------------------------------


def rows_over(begin: int, end: int, length: int, context: int) -> Windows:
    """Windows that cover the targets from BEGIN to END, LENGTH each, reading CONTEXT tokens more to the left."""
    first = np.arange(begin, end, length)
    start = np.maximum(first - context, 0)
    return Windows(start, first - start, np.minimum(first + length, end) - start)


def flat_plan(num_tokens: int, config: Config) -> list[Chunk]:
    """Sliding windows in the order of the text, in chunks of TTT_CHUNK_TOKENS by their first scored target.

    The weights learn from a chunk's targets once, in rows of EVAL_SEQ_LEN, before the next one; not from the last.
    """
    windows = tg.sliding_windows(num_tokens, config.eval_seq_len, config.eval_stride)
    first = windows.start + windows.begin
    number = first // config.ttt_chunk_tokens
    cuts = np.append(np.flatnonzero(np.diff(number, prepend=-1)), len(first))
    plan = []
    for a, b in pairwise(cuts.tolist()):
        scored = windows.take(np.arange(a, b))
        rows = rows_over(int(first[a]), int((scored.start + scored.end)[-1]), config.eval_seq_len, config.ttt_context)
        plan.append(Chunk(scored, rows if b < len(first) else None))
    return plan


def documents(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half-open range of the targets of each document; its last target is the BOS of the next one."""
    begin = np.unique(np.append(0, np.flatnonzero(tokens[:-1] == BOS_ID)))
    return begin, np.append(begin[1:], len(tokens) - 1)


def assign_slots(chunks: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The first step and the slot of documents of so many chunks, (documents,) each.

    They enter in their order; a slot takes the next one in the step after its last one has ended. So where a document
    stands depends on the lengths of earlier ones only.
    """
    free, found = [(0, slot) for slot in range(slots)], []
    for count in chunks.tolist():
        step, slot = heapq.heappop(free)
        found.append((step, slot))
        heapq.heappush(free, (step + count, slot))
    first, slot = np.array(found, np.int64).reshape(-1, 2).T
    return first, slot


def group_plan(low: np.ndarray, high: np.ndarray, group: int, config: Config) -> list[Chunk]:
    """The steps of a group of documents with targets from low to high: the next chunk of the document in each slot."""
    size = config.piece_size
    count = -(-(high - low) // size)
    first, slot = assign_slots(count, config.ttt_slots)
    document = np.repeat(np.arange(len(low)), count)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    step = first[document] + piece
    order = np.lexsort((document, step))  # an earlier document is never younger: the oldest come first
    document, piece, step = document[order], piece[order], step[order]
    scored, learned, lengths = tg.piece_windows(low[document], high[document], piece * size, config)
    plan = []
    for a, b in pairwise(np.flatnonzero(np.diff(step, prepend=-1, append=-1)).tolist()):
        part = np.arange(a, b)
        slots = tg.Slots(group, slot[document[part]], piece[part] == 0, lengths[part], size)
        adapts = learned.take(part) if (learned.end > learned.begin)[part].any() else None
        plan.append(Chunk(scored.take(part), adapts, slots))
    return plan


def document_plan(tokens: np.ndarray, config: Config) -> list[Chunk]:
    """Documents in slots: TTT_GROUPS groups, one after another, each of every TTT_GROUPS-th document of the text.

    TTT_MODE=phased has PHASED_TTT_NUM_PHASES borders, at each of which all slots run empty and the base learns from all
    documents before it; borders beyond the last document are left out.
    """
    c, (begin, end), plan, borders = config, documents(tokens), [], []
    if c.ttt_mode == "phased":
        phases = c.phased_ttt_num_phases
        borders = sorted({c.phased_ttt_prefix_docs * (k + 1) // phases for k in range(phases)})
        borders = [border for border in borders if 0 < border < len(begin)]
    for first, after in pairwise((0, *borders, len(begin))):
        for group in range(c.ttt_groups):
            members = np.arange(first, after)[np.arange(first, after) % c.ttt_groups == group]
            plan += group_plan(begin[members], end[members], group, c) if len(members) else []
        if after < len(begin):
            parts = [rows_over(low, high, c.eval_seq_len, 0) for low, high in zip(begin[:after], end, strict=False)]
            empty = Windows(*(np.zeros(0, np.int64) for _ in range(3)))
            rows = Windows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
            plan.append(Chunk(empty, rows, base=True))
    return plan


# ----------------------------------------------------------------------------------------------------------------------
# Learning from what is scored
# ----------------------------------------------------------------------------------------------------------------------


class Learner:
    """What `score` asks of an adaptation: losses under the weights of the moment, and to learn from a scored chunk."""

    def __init__(self, model: tg.GPT, setup: Setup, plan: Sequence[Chunk], on_learn: Callable[[Chunk], None]):
        config, artifact = setup.config, setup.artifact
        by_documents, learns = TTT_MODES[config.ttt_mode]
        self.model, self.config, self.nll_fn, self.chunks = model, config, setup.nll_fn, len(plan)
        self.rows, self.number, self.base, self.group = setup.batch_seqs(), 0, None, None
        self.on_learn = on_learn
        self.fast = tg.FastWeights(model, config, learns, config.ttt_slots if by_documents else None)
        self.fast.set_factors(artifact.factors)
        if by_documents and self.fast.wants_prior and any(chunk.learned is not None for chunk in plan):
            self.fast.moments.start = setup.prior(model)
        if config.ttt_mode == "phased":
            sgd = dict(ttt_optimizer="sgd", ttt_lr=config.global_ttt_lr, ttt_momentum=config.global_ttt_momentum)
            self.base = tg.FastWeights(model, replace(config, **sgd), TTT_MODES["all"][1])

    def begin(self, number: int, chunk: Chunk) -> None:
        """Reset the slots in which a document begins; all of them where another group does."""
        self.number = number
        if chunk.slots is None:
            self.group = None
            return
        if chunk.slots.group != self.group:
            self.group = chunk.slots.group
            self.fast.begin(self.group)
        if chunk.slots.fresh.any():
            self.fast.reset(self.on_device(chunk.slots.slot[chunk.slots.fresh]), self.config.ttt_warm_start_a)

    def select(self, chunk: Chunk, index: np.ndarray) -> None:
        """Use the weights of the windows `index` of a chunk, and any others to fill a batch."""
        if chunk.slots is not None:
            used = chunk.slots.slot[index]
            others = np.setdiff1d(np.arange(self.config.ttt_slots), used)
            self.fast.rows = self.on_device(np.append(used, others)[: self.rows])

    def token_nll(self, model: tg.GPT, ids: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
        return self.nll_fn(model, ids, targets, columns, *self.fast.weights(self.fast.used()))

    def on_device(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self.device, non_blocking=True)

    def lr(self) -> float:
        share = self.number / max(self.chunks - 1, 1) if self.config.ttt_lr_schedule == "cosine" else 0.0
        return self.config.ttt_lr * (1 + math.cos(math.pi * share)) / 2

    def learn(self, tokens: np.ndarray, chunk: Chunk, nll: Tensor) -> None:
        """TTT_EPOCHS over a chunk: by documents SLOT_ROWS of them at a time, else TTT_BATCH_SEQS rows a step."""
        self.on_learn(chunk)
        weight = None if chunk.slots else self.row_weights(chunk.learned, nll)
        for _ in range(self.config.ttt_epochs):
            if chunk.slots:
                self.step_documents(tokens, chunk)
            else:
                self.pass_over(tokens, chunk.learned, weight, self.base if chunk.base else self.fast)
        if chunk.base:
            with torch.no_grad():
                for name, value in self.base.values.items():
                    self.model.get_parameter(name).copy_(value[0])

    def step_documents(self, tokens: np.ndarray, chunk: Chunk) -> None:
        """A step of every document that goes on, each on its own chunk."""
        c, windows = self.config, chunk.learned
        learns = np.flatnonzero(windows.end > windows.begin)
        for first in range(0, len(learns), self.rows):
            index = learns[first : first + self.rows]
            self.select(chunk, index)
            weight = np.where(np.arange(self.rows) < len(index), 1 / c.piece_size, 0.0)
            part = (windows.take(np.resize(index, self.rows)), weight, c.piece_size, c.ttt_context, self.device)
            tg.adaptation_step(self.model, self.fast, tg.make_lesson(tokens, *part), self.lr(), len(index), self.nll_fn)
        self.fast.moments.end_step()

    def pass_over(self, tokens: np.ndarray, windows: Windows, weight: np.ndarray, fast: tg.FastWeights) -> None:
        """Steps of shared weights on the rows that count, TTT_BATCH_SEQS each."""
        rows, size = np.flatnonzero(weight), self.config.ttt_batch_seqs
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            self.step(tokens, windows.take(part), weight[part], fast)

    def step(self, tokens: np.ndarray, windows: Windows, weight: np.ndarray, fast: tg.FastWeights) -> None:
        """One step of shared weights on rows that the ranks share; weight (rows,)."""
        learned = np.maximum(windows.end - windows.begin, 0)
        per_target = weight / learned.sum()
        mine = np.array_split(np.arange(len(learned)), tg.world_size())[tg.rank()]
        rows = self.config.ttt_batch_seqs if fast is self.base else len(learned)  # documents end anywhere: one shape
        padded = np.resize(mine if len(mine) else 0, math.ceil(rows / tg.world_size()))
        per_target = np.where(np.arange(len(padded)) < len(mine), per_target[padded], 0.0)
        c = self.config
        context, lr = (0, fast.config.ttt_lr) if fast is self.base else (c.ttt_context, self.lr())
        lesson = tg.make_lesson(tokens, windows.take(padded), per_target, c.eval_seq_len, context, self.device)
        tg.adaptation_step(self.model, fast, lesson, lr, None, self.nll_fn)

    @property
    def device(self) -> torch.device:
        return self.model.qo_bank.device

    def row_weights(self, windows: Windows, nll: Tensor) -> np.ndarray:
        """How much each row counts, (rows,): 1, or 0 for those of low scored loss that TTT_TOP_FRAC leaves out.

        The legal form of error-guided adaptation (#294 chose windows by the loss of all of the text, before scoring).
        """
        c, learned = self.config, (windows.end > windows.begin).astype(np.float64)
        if c.ttt_top_frac == 1:
            return learned
        sums = torch.stack([nll[begin:end].sum() for begin, end in windows.ranges()]).double()
        if tg.world_size() > 1:  # each rank holds the losses of its own windows
            dist.all_reduce(sums)
        index, count = np.flatnonzero(learned), (windows.end - windows.begin)[learned > 0]
        loss = sums.cpu().numpy() / count
        kept = np.argsort(-loss, kind="stable")[: math.ceil(c.ttt_top_frac * len(loss))]
        learned[:] = 0.0
        learned[index[kept]] = 1.0
        return learned


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Setup:
    """What an evaluation needs, the text apart: so that warm-up cannot see it, and the audit can change it."""

    config: Config
    artifact: tg.Artifact
    device: torch.device
    kernel: tg.AttentionFn
    byte_table: tg.ByteTable
    nll_fn: Callable
    priors: dict = field(default_factory=dict)  # the same dict in every copy: see `prior`

    def prior(self, model: tg.GPT) -> Tensor:
        """Generated moments, made once for an artifact and its settings: the audit evaluates some thirty times."""
        key = (
            id(self.artifact.state),
            replace(self.config, ttt_lr=0.0, global_ttt_lr=0.0, ttt_epochs=1, eval_stride=1),
        )
        if key not in self.priors:  # the state is kept beside it, so that no other one gets its id
            made = tg.generated_moments(model, self.config, self.batch_seqs(), self.nll_fn)
            self.priors[key] = (made, self.artifact.state)
        return self.priors[key][0]

    def load(self) -> tg.GPT:
        """A fresh model: some ways of learning change it."""
        model = tg.load_model(self.artifact, self.device, self.kernel, self.byte_table.has_leading_space)
        return model.requires_grad_(False)

    def plan(self, tokens: np.ndarray) -> list[Chunk]:
        if TTT_MODES[self.config.ttt_mode][0]:
            return document_plan(tokens, self.config)
        return flat_plan(len(tokens), self.config)

    def batch_seqs(self) -> int:
        """Windows in a batch, as many as the GPU holds."""
        by_documents = TTT_MODES[self.config.ttt_mode][0]
        return max(tg.at_once(self.config)["slots" if by_documents else "score"], 1)


def score_plan(setup: Setup, tokens: np.ndarray) -> tg.Score:
    """The plan's score without adaptation, by the plain forward."""
    plan = [chunk._replace(learned=None) for chunk in setup.plan(tokens)]
    return tg.score(setup.load(), tokens, plan, setup.byte_table, setup.batch_seqs(), setup.nll_fn)


def evaluate(
    setup: Setup,
    tokens: np.ndarray,
    observe: Callable | None = None,
    on_learn: Callable[[Chunk], None] = lambda chunk: None,
    progress: Callable[[int], None] = lambda number: None,
    learns: bool = True,
) -> tg.Score:
    """The score of TOKENS as the settings say; without LEARNS, that of the same plan before any step.

    OBSERVE is called as by `score`, with the model and the learner before; ON_LEARN with a chunk before it is learned
    from; PROGRESS with the number of each of this rank's chunks before it is scored.
    """
    c, model, plan = setup.config, setup.load(), setup.plan(tokens)
    plan = plan if learns else [chunk._replace(learned=None) for chunk in plan]
    learner = None
    if c.ttt_mode != "none":
        learner = Learner(model, setup, plan, on_learn)
    if c.ttt_protocol != "legal":
        plan = learn_first(setup, model, learner, tokens, plan)
    seen = None if observe is None else (lambda *args: observe(model, learner, *args))
    how = (setup.byte_table, setup.batch_seqs(), setup.nll_fn, learner, seen, progress)
    result = tg.score(model, tokens, plan, *how)
    if c.ppm_alpha == 1:
        return result
    nll = mixed_nll(result.nll, ppm_nll(tokens, c.vocab_size), c.ppm_alpha).astype(np.float32)
    loss = float(nll.mean(dtype=np.float64))  # of the losses as nll.npy keeps them
    return result._replace(nll=nll, val_loss=loss, val_bpb=result.val_bpb / result.val_loss * loss)


def learn_first(setup: Setup, model: tg.GPT, learner: Learner, tokens: np.ndarray, plan: list[Chunk]) -> list[Chunk]:
    """INVALID, kept to be reproduced: learn from the text before it is scored; the plan that then scores it.

    adapt_first learns from all of it (#398, #442, #494), two_pass from the rows that a first pass found hardest (#296).
    """
    c = setup.config
    rows = rows_over(0, len(tokens) - 1, c.eval_seq_len, 0)
    if c.ttt_protocol == "two_pass":
        first = tg.score(model, tokens, plan, setup.byte_table, setup.batch_seqs(), setup.nll_fn).nll
        loss = np.array([first[begin:end].mean() for begin, end in rows.ranges()])
        rows = rows.take(np.sort(np.argsort(-loss)[: math.ceil(c.ttt_top_frac * len(loss))]))
    learner.on_learn(Chunk(rows, rows))
    learner.chunks = c.ttt_epochs
    for learner.number in range(c.ttt_epochs):
        learner.pass_over(tokens, rows, np.ones(len(rows.start)), learner.fast)
    return [chunk._replace(learned=None) for chunk in plan]


def warm_up(setup: Setup) -> None:
    """Compile and load all that the adapted score needs, on random documents from a generator of its own.

    A document of a window and a target has every shape; each rank that owns a group gets one.
    """
    c = setup.config
    if TTT_MODES[c.ttt_mode][0]:
        count, size = 2 * min(c.ttt_groups, tg.world_size()), c.eval_seq_len + 1
        setup = replace(setup, config=replace(c, phased_ttt_prefix_docs=count // 2, phased_ttt_num_phases=1))
    else:
        count, size = 2, max(c.ttt_chunk_tokens, c.eval_seq_len)
    tokens = np.random.default_rng(0).integers(BOS_ID + 1, c.vocab_size, (count, size))
    tokens[:, 0] = BOS_ID
    evaluate(setup, tokens.astype(np.uint16).flatten())


def warm_up_windows(setup: Setup) -> None:
    """Compile what `window_scores` needs: on random tokens, a batch with the first window and, on each rank, another.

    The first window of a sliding score has EVAL_SEQ_LEN targets, so that its batch has a shape of its own.
    """
    c = setup.config
    size = c.eval_seq_len + c.eval_stride * tg.world_size() * (c.eval_batch_seqs + 1) + 1
    tokens = np.random.default_rng(0).integers(BOS_ID + 1, c.vocab_size, size)
    window_scores(setup, tokens.astype(np.uint16))


def window_scores(setup: Setup, tokens: np.ndarray) -> dict[str, tg.Score]:
    """The artifact's scores without adaptation: windows side by side, and sliding."""
    c, scores, size = setup.config, {}, max(tg.at_once(setup.config)["score"], 1)
    for name, stride in (("roundtrip", c.eval_seq_len), ("sliding", c.eval_stride)):
        windows = [Chunk(tg.sliding_windows(len(tokens), c.eval_seq_len, stride))]
        scores[name] = tg.score(setup.load(), tokens, windows, setup.byte_table, size, setup.nll_fn)
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# A mixture with PPM, for the negative result of #398
# ----------------------------------------------------------------------------------------------------------------------


def seen_before(key: np.ndarray) -> np.ndarray:
    """How often each entry of KEY has occurred before its place."""
    order = np.argsort(key, kind="stable")
    groups = np.flatnonzero(np.diff(key[order], prepend=key[order[0]] - 1))
    rank = np.arange(len(key)) - np.repeat(groups, np.diff(np.append(groups, len(key))))
    return rank[np.argsort(order, kind="stable")]


def ppm_nll(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Nats of each target under PPM-C of orders 1 and 0 that learns as it goes, without exclusions; normalised.

    An order gives count / (total + distinct) and passes distinct / (total + distinct) on, at last evenly to all tokens.
    """
    previous, target = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    probability, escape = np.zeros(len(target)), np.ones(len(target))
    for context in (previous, np.zeros_like(previous)):
        count = seen_before(context * vocab_size + target)
        total = seen_before(context)
        order = np.argsort(context, kind="stable")
        new = (count == 0)[order].astype(np.int64)
        before = np.cumsum(new) - new  # distinct successors before, counted through all groups
        first = np.flatnonzero(total[order] == 0)
        distinct = np.empty_like(before)
        distinct[order] = before - np.repeat(before[first], np.diff(np.append(first, len(order))))
        mass = np.maximum(total + distinct, 1)
        probability += escape * count / mass
        escape *= np.where(total > 0, distinct / mass, 1.0)
    return -np.log(probability + escape / vocab_size)


def ppm_row(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Nats of every token after `tokens` under that PPM, (V,), from counts of its own."""
    probability, escape = np.zeros(vocab_size), 1.0
    for successors in (tokens[1:][tokens[:-1] == tokens[-1]], tokens[1:]):
        count = np.bincount(successors, minlength=vocab_size)
        distinct = np.count_nonzero(count)
        probability += escape * count / max(count.sum() + distinct, 1)
        escape *= distinct / (count.sum() + distinct) if distinct else 1.0
    return -np.log(probability + escape / vocab_size)


def mixed_nll(nll: np.ndarray, ppm: np.ndarray, alpha: float) -> np.ndarray:
    """-log(alpha * exp(-nll) + (1 - alpha) * exp(-ppm)), both normalised, so their mixture is."""
    return -np.logaddexp(np.log(alpha) - nll, np.log(1 - alpha) - ppm)


# ----------------------------------------------------------------------------------------------------------------------
# Audit
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """An evaluation as the audit sees it, from what was computed, not from what was planned; one entry a target.

    turn: how often something had been learned when it was scored; read_from: the first token that its window read;
    count: how often it was scored; from_row: -log of its entry in the whole, normalised distribution. rows: the
    distributions themselves, (V,) logs, of the targets asked for. events: ("score" or "learn", windows) in order.
    spread: the largest difference of a loss, in nats, between two evaluations of the same text; 0: none is admitted.
    base_turns: the turns that follow a step of the base.
    """

    nll: np.ndarray
    turn: np.ndarray
    read_from: np.ndarray
    count: np.ndarray
    from_row: np.ndarray
    rows: dict[int, np.ndarray]
    events: list[tuple[str, Windows]]
    spread: float = 0.0
    base_turns: Sequence[int] = ()

    def differ(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Where two arrays of nats differ by more than chance: at all, or by four times what a repetition does."""
        return (one != other) & ~(np.abs(one - other) <= 4 * self.spread)


Tracer = Callable[[np.ndarray, Sequence[int], float], Trace]  # tokens, probes, last turn of interest


class Enough(Exception):
    """Ends an evaluation of which the audit has seen what it wants."""


def log_distributions(model: tg.GPT, learner: Learner | None, batch: tg.Batch) -> Tensor:
    """Logs of the distributions of a batch's targets, (B, C, V)."""
    replaced, adapters = learner.fast.weights(learner.fast.used()) if learner else ({}, {})
    extra = dict(adapters=adapters, columns=batch.columns)
    return torch.func.functional_call(model, replaced, (batch.ids,), extra).log_softmax(-1)


def trace_evaluation(setup: Setup, tokens: np.ndarray, probes: Sequence[int] = (), until: float = math.inf) -> Trace:
    """Evaluate `tokens` and watch.

    probes: targets whose whole distributions are wanted; they are computed again, with the weights of the moment, for
    every batch. until: the last turn of interest, later ones may miss. With both, only batches that hold probes are
    computed again, and the evaluation ends with the last of them.
    """
    targets, rows, events, base_turns = len(tokens) - 1, {}, [], []
    turn, read_from, count = (np.zeros(targets, np.int64) for _ in range(3))
    nll, from_row, turns = np.full(targets, np.nan, np.float32), np.full(targets, np.nan), 0

    def watch(chunk: Chunk) -> None:
        nonlocal turns
        turns += 1
        if turns > until and not probes:
            raise Enough
        events.append(("learn", chunk.learned))
        if chunk.base:
            base_turns.append(turns)

    def observe(model: tg.GPT, learner: Learner | None, windows: Windows, batch: tg.Batch, losses: Tensor) -> None:
        held = {*probes} & {t for begin, end in windows.ranges() for t in range(begin, end)}
        log_p = log_distributions(model, learner, batch) if held or (probes and until == math.inf) else None
        for w, (start, begin, end) in enumerate(zip(*(part.tolist() for part in windows), strict=True)):
            at = slice(start + begin, start + end)
            turn[at], read_from[at], nll[at] = turns, start, losses[w, : end - begin].float().cpu().numpy()
            count[at] += 1
            if log_p is not None:
                own = log_p[w].gather(-1, batch.targets[w].unsqueeze(-1)).squeeze(-1)
                from_row[at] = -own[: end - begin].cpu().numpy()
                for t in held & {*range(start + begin, start + end)}:
                    rows[t] = log_p[w, t - start - begin].cpu().numpy()
        events.append(("score", windows))
        if held and until < math.inf and len(rows) == len({*probes}):
            raise Enough

    alpha = setup.config.ppm_alpha
    try:
        nll = evaluate(setup, tokens, observe, watch).nll
    except Enough:  # what was observed is the model's
        if alpha < 1:
            nll = mixed_nll(nll, ppm_nll(tokens, setup.config.vocab_size), alpha).astype(np.float32)
    if alpha < 1:
        from_row = mixed_nll(from_row, ppm_nll(tokens, setup.config.vocab_size), alpha)
        rows = {t: -mixed_nll(-row, ppm_row(tokens[: t + 1], setup.config.vocab_size), alpha)
                for t, row in rows.items()}  # fmt: skip
    return Trace(nll, turn, read_from, count, from_row, rows, events, base_turns=base_turns)


MAX_SPREAD = 0.05  # nats; where a repetition changes a loss by more, T1 can tell nothing and fails


class Check(NamedTuple):
    """One line of the certificate; `ok` None: it says nothing about this evaluation."""

    name: str
    ok: bool | None
    checked: int
    detail: str


def cuts(base: Trace, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    """Turns, and which targets to change: all that are scored later, and in the turn those beyond some place.

    The turns are the first, the middle one, one at random after that, and those that follow a step of the base. The
    place is the third smallest in a window, so that almost all of the turn changes; or the middle of the turn's targets
    in the order of the text, so that the windows before it do not; or the turn's end.
    """
    index, turns = np.arange(len(base.turn)), np.unique(base.turn)
    late = rng.choice(turns[len(turns) // 2 : max(len(turns) - 1, len(turns) // 2 + 1)])
    for turn in sorted({turns[0], turns[len(turns) // 2], late, *(turns[np.isin(turns, base.base_turns)])}):
        here, offset = base.turn == turn, index - base.read_from
        early, middle = offset > np.sort(offset[here])[:3][-1], index > np.flatnonzero(here)[here.sum() // 2]
        for beyond in (early, middle, ~here) if turn in (turns[0], turns[len(turns) // 2]) else (early, ~here):
            later = (base.turn > turn) | here & beyond
            if later.any():
                yield turn, later


def change(tokens: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """TOKENS with all TARGETS (a mask) changed, and where; tokens that begin documents stay, for the windows."""
    changed, places = tokens.copy(), 1 + np.flatnonzero(targets & (tokens[1:] != BOS_ID))
    span = int(tokens.max()) - BOS_ID
    changed[places] = BOS_ID + 1 + (tokens[places] - BOS_ID - 1 + rng.integers(1, span, len(places))) % span
    return changed, places


def check_future(trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> Check:
    """T1: what is scored before all that is changed, or beside it, has the same loss, bit for bit.

    In the turn of the change: where the window reads nothing changed; in earlier turns: whatever it reads.
    """
    compared, wrong, targets = 0, 0, np.arange(len(base.turn))
    for turn, later in cuts(base, rng):
        changed, places = change(tokens, later, rng)
        is_changed = np.zeros(len(tokens) + 1, np.int64)
        is_changed[places + 1] = 1
        before = np.cumsum(is_changed)  # changed tokens before each place, the target's own included in clean
        first = base.turn[later].min()
        clean = (base.turn < first) | (base.turn == turn) & (before[targets + 2] == before[base.read_from])
        after = trace(changed, (), turn)
        compared += int(clean.sum())
        wrong += int(base.differ(after.nll[clean], base.nll[clean]).sum())
    detail = f"{wrong} of {compared} losses changed"
    if base.spread:
        detail += (
            f" by more than 4 x {base.spread:.1e}, what a repetition on this device changes (at most {MAX_SPREAD})"
        )
    return Check("T1 later tokens change no earlier loss", wrong == 0 and base.spread <= MAX_SPREAD, compared, detail)


def check_file_order(setup: Setup, trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> Check:
    """T1c: another text after a random place, where documents end included, changes no loss before it.

    A decoder that reads the file from left to right could follow. TTT_MOMENTS=shared does not have this property by
    documents, and the certificate says so.
    """
    c, other = setup.config, tokens.copy()
    place = max(1, int(len(base.nll) * rng.uniform(1 / 3, 2 / 3)))
    other[place + 1 :] = rng.integers(BOS_ID + 1, int(tokens.max()) + 1, len(tokens) - place - 1)
    other[place + 1 :][rng.random(len(tokens) - place - 1) < 1 / max(c.piece_size, 8)] = BOS_ID
    wrong = int(base.differ(trace(other, (), math.inf).nll[:place], base.nll[:place]).sum())
    shared = shares_moments(c)
    detail = f"{wrong} of {place} losses changed" + ", TTT_MOMENTS=shared" * shared
    return Check("T1c no loss depends on later text", None if shared else wrong == 0, place, detail)


def check_borders(setup: Setup) -> Check:
    """T1b: what follows the beginning of a document has the same first embedding, whatever stands before it."""
    c, rng, read = setup.config, np.random.default_rng(setup.config.seed), setup.config.num_memory_tokens + 2
    ids = np.tile(rng.integers(BOS_ID + 1, c.vocab_size, read + 8), (64, 1))
    ids[:, :read], ids[:, read] = rng.integers(BOS_ID + 1, c.vocab_size, (64, read)), BOS_ID
    with torch.no_grad():
        x = setup.load().embed(torch.from_numpy(ids).to(setup.device))[:, read:]
    apart = float((x - x[:1]).abs().max())
    return Check("T1b no embedding crosses a document border", apart == 0 if c.doc_borders != "published" else None,
                 x[..., 0].numel(), f"largest difference {apart:.1e}, DOC_BORDERS={c.doc_borders}")  # fmt: skip


def probes_of(base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Targets: four of each of the first two turns, one of each later half of the evaluation, two BOS; at least 8."""
    turns, is_bos = np.unique(base.turn), tokens[1:] == BOS_ID
    groups = [(base.turn == turn) & ~is_bos for turn in turns[:2]]
    halves = np.array_split(turns[2:], 2)
    wanted = [(group, 4) for group in groups] + [(np.isin(base.turn, half) & ~is_bos, 1) for half in halves]
    probes = [
        t for group, count in (*wanted, (is_bos, 2)) for t in rng.permutation(np.flatnonzero(group))[:count].tolist()
    ]
    more = [t for t in rng.permutation(np.flatnonzero(~is_bos)).tolist() if t not in probes]
    return probes + more[: max(0, LEAST["T2"] - len(probes))]  # where all is scored in one turn


def check_target(trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator, ends: bool = True) -> Check:
    """T2: the distribution of a target is the same whatever the target is: another token, or the document's end.

    ends: whether BOS are changed, and the last other probe into a BOS. With TTT_MOMENTS=shared the steps of all slots
    depend on where documents end, and nothing is promised.
    """
    probes = [t for t in probes_of(base, tokens, rng) if ends or tokens[t + 1] != BOS_ID]
    until, wrong, inner = base.turn[probes].max(initial=0), 0, [t for t in probes if tokens[t + 1] != BOS_ID]
    rows = trace(tokens, probes, until).rows if probes else {}
    tries = [(t, False) for t in probes] + [(t, True) for t in inner[-1:] if ends]
    for t, into_bos in tries:
        other, places = change(tokens, np.arange(len(base.turn)) == t, rng)
        if into_bos or not len(places):
            other[t + 1] = BOS_ID if into_bos else rng.integers(BOS_ID + 1, int(tokens.max()) + 1)
        wrong += int(base.differ(trace(other, [t], until).rows[t], rows[t]).any())
    return Check("T2 no distribution sees its target", wrong == 0, len(tries), f"{wrong} of {len(tries)} changed; "
                 f"{len(probes) - len(inner)} of a BOS, {len(tries) - len(probes)} by a BOS")  # fmt: skip


def check_normalised(trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> Check:
    """T3: each loss is -log of the target's entry in a whole distribution, and those in BASE.rows add up to one."""
    error = np.abs(base.nll - base.from_row)
    own = [abs(base.nll[t] + row[tokens[t + 1]]) for t, row in base.rows.items()]
    total = [abs(float(np.logaddexp.reduce(row))) for row in base.rows.values()]
    fine = (error < 1e-4).all() and all(x < 1e-4 for x in (*own, *total))
    return Check("T3 losses are of normalised distributions", bool(fine), len(error),
                 f"largest difference {np.max([*error, *own]):.1e}; log of the sum of {len(total)} distributions "
                 f"{max(total, default=0.0):.1e}")  # fmt: skip


def check_once(trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> Check:
    """T4: every target is scored exactly once."""
    wrong = int((base.count != 1).sum())
    return Check("T4 every target is scored once", wrong == 0, len(base.count), f"{wrong} twice or never")


def check_ledger(trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> Check:
    """T5: in the order of events, nothing is learned from that is not scored, and nothing is scored afterwards."""
    scored, learned, wrong, times = set(), set(), 0, 0
    for kind, windows in base.events:
        ranges = windows.ranges(whole=kind == "learn")  # what is read beside it is learned from too
        targets = {t for begin, end in ranges for t in range(begin, end)}
        if kind == "learn":
            wrong, learned, times = wrong + len(targets - scored), learned | targets, times + 1
        else:
            wrong, scored = wrong + len(targets & learned), scored | targets
    return Check("T5 scored first, learned after", wrong == 0 if times else None, len(base.events),
                 f"{wrong} targets out of order, {times} times learned")  # fmt: skip


def check_bytes(tokens: np.ndarray, byte_table: tg.ByteTable, tokenizer: Any) -> Check:
    """T9: the counted bytes are those of the decoded text, over whole documents."""
    begin, end = documents(tokens)
    counted, text = 0, 0
    for a, b in zip(begin[:-1].tolist(), end[:-1].tolist(), strict=True):
        counted += int(byte_table.count(tokens[a:b], tokens[a + 1 : b + 1]).sum())
        text += len(tokenizer.decode(tokens[a + 1 : b].tolist()).encode())
    return Check("T9 counted bytes are the text's", counted == text if text else None, len(begin) - 1,
                 f"{counted} counted, {text} decoded")  # fmt: skip


def check_memory(aligned: Trace, adapted: Trace, plain_aligned: np.ndarray, plain: np.ndarray) -> Check:
    """T10: windows that slide gain over windows side by side; after learning the text by heart they lose.

    The gap may shrink in a legal way, since learning does some of what context does: that alone is no verdict.
    """

    def mean(x: np.ndarray) -> tuple[float, float]:
        return float(x.mean()), 3 * float(x.std()) / math.sqrt(len(x))

    (gap, noise), (left, error) = mean(plain_aligned - plain), mean(aligned.nll - adapted.nll)
    gain = float((plain - adapted.nll).mean())
    lost, doubt = mean((plain_aligned - plain) - (aligned.nll - adapted.nll))
    memory = gain > 0 and left < -max(error, 0.02 * gain)
    shrunk = lost > max(0.1 * gap, doubt)
    detail = f"gap {gap:.4f} nats (within {noise:.4f}), {left:.4f} adapted (within {error:.4f})"
    ok = False if memory else None if shrunk or gap < noise else True
    return Check("T10 no sign of memory", ok, len(plain), detail + ", it shrank" * shrunk)


def float32_nll(setup: Setup, tokens: np.ndarray) -> np.ndarray:
    """The losses of `score_plan` by a float32 forward, with torch's own attention: flash kernels take no float32."""
    kernel = tg.torch_attention() if setup.device.type == "cuda" else setup.kernel
    model = tg.GPT(setup.artifact.config, torch.float32, kernel, setup.byte_table.has_leading_space)
    model.load_state_dict(setup.artifact.state)
    model, plan = model.to(setup.device).requires_grad_(False), [c._replace(learned=None) for c in setup.plan(tokens)]
    return tg.score(model, tokens, plan, setup.byte_table, setup.batch_seqs(), setup.nll_fn).nll


def check_no_op(setup: Setup, tokens: np.ndarray) -> Check:
    """T11: steps of size zero give the loss of no steps, bit for bit; and the plain forward's, but for rounding.

    Rounding is at most 1e-3 nats in float32. In another dtype the plain forward's own distance from a float32 forward
    is the measure: losses of no steps may be twice as far from that (root mean square), and four times that distance
    from the plain ones (largest). On the first half of the text, if that is longer than a window.
    """
    tokens = tokens[: max(len(tokens) // 2, setup.config.eval_seq_len) + 1]
    still = replace(setup, config=replace(setup.config, ttt_lr=0.0, global_ttt_lr=0.0))
    none = replace(setup, config=replace(setup.config, ttt_epochs=0))
    zero, off = evaluate(still, tokens).nll, evaluate(none, tokens).nll
    plain, alpha = score_plan(setup, tokens).nll, setup.config.ppm_alpha
    exact = plain if tg.compute_dtype(setup.device) == torch.float32 else float32_nll(setup, tokens)
    if alpha < 1:
        plain, exact = (mixed_nll(x, ppm_nll(tokens, setup.config.vocab_size), alpha) for x in (plain, exact))
    wrong, apart = int((zero != off).sum()), float(np.abs(off - plain).max())
    limit = 1e-3 + 4 * float(np.abs(plain - exact).max())
    near, far = (float(np.sqrt(np.mean((x - exact) ** 2, dtype=np.float64))) for x in (plain, off))
    ok = wrong == 0 and apart < limit and far < 1e-3 + 2 * near
    return Check("T11 learning rate 0 changes nothing", ok, len(zero),
                 f"{wrong} losses differ from those without steps; the plain forward's within {apart:.1e}, limit "
                 f"{limit:.1e}; from float32 {far:.1e} on average, plain {near:.1e}")  # fmt: skip


def check_parity(setup: Setup, tokens: np.ndarray) -> Check:
    """T14: adapters with zero output sides give the plain logits."""
    model = setup.load()
    ids = torch.from_numpy(tokens[: setup.config.eval_seq_len].astype(np.int64)).to(setup.device).unsqueeze(0)
    fast = tg.FastWeights(model, setup.config, "adapters", 1)
    _, adapters = fast.weights(fast.values)
    with torch.no_grad():
        apart = float((model(ids) - model(ids, adapters=adapters)).abs().max())
    return Check("T14 zero adapters give the plain logits", apart == 0, ids.numel(), f"largest difference {apart:.1e}")


def check_warm_up(setup: Setup, trace: Tracer, base: Trace, tokens: np.ndarray) -> Check:
    """T7: warm-up, which is not given the text, changes no loss of the first quarter of the evaluation."""
    warm_up(setup)
    until = float(np.quantile(base.turn, 0.25))
    compared = base.turn <= until
    wrong = int(base.differ(trace(tokens, (), until).nll[compared], base.nll[compared]).sum())
    return Check("T7 warm-up changes nothing", wrong == 0, int(compared.sum()), f"{wrong} losses changed")


def check_files(opened: Sequence[str], train_pattern: str, val_pattern: str = "", began: int = 0) -> Check:
    """T6: no training shard is opened, and no validation shard once the evaluations have begun.

    opened: the files that the process opened, in order; from index `began` on, by the evaluations.
    """
    train, val = ({os.path.realpath(path) for path in glob(pattern)} for pattern in (train_pattern, val_pattern))
    real = [(path, os.path.realpath(path)) for path in opened]
    found = {path for path, file in real if file in train or "fineweb_train" in path + file}
    found |= {path for path, file in real[began:] if file in val}
    return Check("T6 no training data is opened", not found, len({*opened}), ", ".join(sorted(found)) or "none was")


def check_order(base: Trace, tokens: np.ndarray, config: Config) -> Check:
    """T15: targets are scored in the file's order; by documents, the documents of each group begin in that order."""
    first = np.full(len(tokens) - 1, len(base.events))
    for number, (kind, windows) in reversed([*enumerate(base.events)]):
        for begin, end in windows.ranges() if kind == "score" else ():
            first[begin:end] = number
    if not TTT_MODES[config.ttt_mode][0]:
        parts = [first]
    else:
        begins = first[documents(tokens)[0]]
        parts = [begins[group :: config.ttt_groups] for group in range(config.ttt_groups)]
    wrong = sum(int((np.diff(part) < 0).sum()) for part in parts)
    return Check("T15 scored in the file's order", wrong == 0, sum(map(len, parts)), f"{wrong} out of order")


def shares_moments(c: Config) -> bool:
    """Whether documents in different slots share second moments, so that losses depend on text later in the file."""
    by_documents, learns = TTT_MODES[c.ttt_mode]
    return by_documents and bool(learns) and c.ttt_optimizer == "precond" and c.ttt_moments == "shared"


def settled(setup: Setup, tokens: np.ndarray) -> int:
    """How many targets of `tokens`, the first ones, keep their losses bit for bit when more text follows.

    By flat chunks not those of the last chunk: the last window begins where its end says.
    """
    c, (by_documents, learns) = setup.config, TTT_MODES[setup.config.ttt_mode]
    if c.ttt_protocol != "legal" or shares_moments(c) or (learns and c.ttt_lr_schedule == "cosine"):
        return 0
    if by_documents:
        return len(tokens) - 1
    last = setup.plan(tokens)[-1].scored
    return int((last.start + last.begin).min())


def check_unwatched(
    setup: Setup, base: Trace, tokens: np.ndarray, whole: np.ndarray, rng: np.random.Generator
) -> Iterator[Check]:
    """T16: the losses are the same where nobody watches and, up to `settled`, where the text goes on as it does in
    `whole`, to a random length. T17: the score of that evaluation follows from its losses."""
    count, longer = settled(setup, tokens), tokens
    if count:
        longer = whole[: max(int(len(tokens) * rng.uniform(1.3, 2)), len(tokens))]
    count = count if len(longer) > len(tokens) else len(tokens) - 1
    result = evaluate(setup, longer)
    wrong = int(base.differ(result.nll[:count], base.nll[:count]).sum())
    yield Check("T16 unwatched, the losses are the same", wrong == 0, count,
                f"{wrong} of {count} losses changed in an evaluation of {len(longer) - 1} targets")  # fmt: skip
    nats, num_bytes = result.nll.astype(np.float64), setup.byte_table.count(longer[:-1], longer[1:]).sum()
    loss, bpb = float(nats.mean()), float(nats.sum() / math.log(2) / num_bytes)
    fine = same_score(result.val_loss, loss) and same_score(result.val_bpb, bpb)
    yield Check(
        "T17 the score follows from the losses",
        fine,
        len(nats),
        f"val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}, from the losses {loss:.8f} {bpb:.8f}",
    )


def check_weights(setup: Setup) -> Check:
    """T18: what is evaluated begins with the artifact's weights."""
    state, kept = setup.load().state_dict(), setup.artifact.state
    wrong = [name for name in state if name not in kept or not torch.equal(state[name].cpu(), kept[name].cpu())]
    return Check("T18 the weights are the artifact's", not wrong, len(state), ", ".join(wrong) or "none differs")


def audit(
    setup: Setup,
    tokens: np.ndarray,
    opened: Sequence[str],
    trace: Tracer | None = None,
    whole: np.ndarray | None = None,
    seed: int = 0,
) -> list[Check]:
    """All checks on `tokens`, with which the text `whole` begins.

    trace: replaces the evaluation, so that cheats can be tried. seed: of the places, targets and tokens changed.
    """
    trace, began = trace or (lambda text, probes, until: trace_evaluation(setup, text, probes, until)), len(opened)
    c, whole, rng = setup.config, tokens if whole is None else whole, np.random.default_rng(seed)
    tokenizer = SentencePieceProcessor(model_proto=Path(c.tokenizer_path).read_bytes())
    base = trace(tokens, rng.permutation(len(tokens) - 1)[:8].tolist(), math.inf)
    if setup.device.type == "cuda":  # some gradients are summed by atomics, in any order
        base.spread = float(np.abs(trace(tokens, (), math.inf).nll - base.nll).max())
    checks = [check_future(trace, base, tokens, rng), check_borders(setup),
              check_file_order(setup, trace, base, tokens, rng),
              check_target(trace, base, tokens, rng, not shares_moments(c))]  # fmt: skip
    checks += [check(trace, base, tokens, rng) for check in (check_normalised, check_once, check_ledger)]
    checks += [check_warm_up(setup, trace, base, tokens), check_bytes(tokens, setup.byte_table, tokenizer)]
    aligned = replace(setup, config=replace(c, eval_stride=c.eval_seq_len))
    plain = [score_plan(each, tokens).nll for each in (aligned, setup)]
    checks.append(check_memory(trace_evaluation(aligned, tokens), base, *plain))
    checks += [check_no_op(setup, tokens), check_parity(setup, tokens), check_order(base, tokens, c)]
    checks += [*check_unwatched(setup, base, tokens, whole, rng), check_weights(setup)]
    return [*checks, check_files(opened, c.shards("train"), c.shards("val"), began)]


# ----------------------------------------------------------------------------------------------------------------------
# The certificate
# ----------------------------------------------------------------------------------------------------------------------

T19, T20 = "T19 the printed score is that of nll.npy", "T20 the run's first losses, evaluated alone"
# A check passes where it looked at enough; without those of ESSENTIAL nothing is certified.
LEAST = dict(T1=256, T1c=64, T2=8, T3=256, T4=256, T6=0, T15=2, T16=64, T17=64)
ESSENTIAL = ("T1", "T2", "T3", "T4")
MIN_REFILLS = 3  # documents that enter a slot after another one
NOT_COMPARED = {"audit_tokens", "model_path", "eval_budget_seconds"}  # settings that change no loss


def too_few(check: Check) -> bool:
    """Whether a check did not fail and did not look at enough either."""
    return check.ok is not False and check.checked < LEAST.get(check.name.split()[0], 1)


def refills(plan: Sequence[Chunk]) -> int:
    """How many documents enter a slot that another one has left, in a plan by documents."""
    count, group = 0, None
    for chunk in plan:
        if chunk.slots is not None and chunk.slots.group == group:
            count += int(chunk.slots.fresh.sum())
        group = None if chunk.slots is None else chunk.slots.group
    return count


def audited_config(c: Config, tokens: np.ndarray) -> Config:
    """The settings, where needed with smaller chunks, fewer slots, groups and phases, so that little text has them all.

    By flat chunks at least four chunks; by documents a chunk to adapt on, three refills, and steps of the base.
    """
    if not TTT_MODES[c.ttt_mode][0]:
        return replace(c, ttt_chunk_tokens=min(c.ttt_chunk_tokens, max(1, (len(tokens) - 1) // 4)))
    begin, end = documents(tokens)
    count, prefix = len(begin), 0
    if c.ttt_mode == "phased":
        prefix = min(c.phased_ttt_prefix_docs, max(1, count // 4))
        c = replace(c, phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=min(c.phased_ttt_num_phases, 2, prefix))
    groups = min(c.ttt_groups, max(1, (count - prefix) // 4))
    last = (count - prefix) // groups  # documents of a group after the last border
    slots = max(1, min(c.ttt_slots, last // 2, last - MIN_REFILLS))
    chunk = min(c.ttt_chunk_size, max(1, int((end - begin).max()) // 2))
    return replace(c, ttt_groups=groups, ttt_slots=slots, ttt_chunk_size=chunk)


def reading(c: Config) -> str:
    """What a loss may depend on beyond the text before it in the file, and what documents share, in one line.

    The names, and what each is worth: records/legality.md.
    """
    by_documents, learns = TTT_MODES[c.ttt_mode]
    if c.ttt_protocol != "legal":
        return f"invalid: TTT_PROTOCOL={c.ttt_protocol} adapts on text that it scores later"
    shared, cosine = shares_moments(c), bool(learns) and c.ttt_lr_schedule == "cosine"
    known = [words for holds, words in (
        (shared, "squared gradients of documents that stand later in the file, in other slots (TTT_MOMENTS=shared)"),
        (cosine, "the length of the text (TTT_LR_SCHEDULE=cosine)"),
        (not by_documents, "the end of the text, in the last window, which is as long as the others"),
    ) if holds]  # fmt: skip
    moments = by_documents and bool(learns) and c.ttt_optimizer == "precond"
    kept = [words for holds, words in (
        (not by_documents and learns, "all weights that adapt"),
        (not by_documents, "the context of windows"),
        (moments and c.ttt_moments in ("prefix", "shared"), "second moments"),
        (c.ttt_mode == "phased", "the base, from border to border"),
        (by_documents and learns == "adapters" and c.ttt_warm_start_a, "input sides of adapters"),
        (c.ppm_alpha < 1, "counts of the PPM"),
    ) if holds]  # fmt: skip
    ends = "" if by_documents else "knows the end"
    name = "shared statistics" if shared else "knows the length" if cosine else ends or "causal"
    beyond = "; ".join(known) or "nothing, not even where documents end"
    return f"{name}: of later text a loss knows {beyond}; documents share {', '.join(kept) or 'nothing'}"


def shortfalls(setup: Setup, tokens: np.ndarray) -> list[str]:
    """What the evaluation of `tokens` is too short to show."""
    c, plan, (by_documents, learns) = setup.config, setup.plan(tokens), TTT_MODES[setup.config.ttt_mode]
    adapts = any(chunk.learned is not None and not chunk.base for chunk in plan)
    return [words for holds, words in (
        (learns and c.ttt_protocol == "legal" and not adapts, "adaptation: nothing is adapted on"),
        (by_documents and refills(plan) < MIN_REFILLS, f"slots: {refills(plan)} refills, {MIN_REFILLS} are needed"),
        (c.ttt_mode == "phased" and not any(chunk.base for chunk in plan), "the base: it does not learn"),
    ) if holds]  # fmt: skip


def audited_beginning(setup: Setup, tokens: np.ndarray) -> np.ndarray:
    """A beginning of the text that has no shortfalls with the settings as they are, or is as long as is bearable."""
    c, last = setup.config, len(tokens) - 1
    size, most = max(c.audit_tokens, c.eval_seq_len), min(max(4 * c.audit_tokens, last // 4), last)
    while size < most and (shortfalls(setup, tokens[: size + 1]) or not settled(setup, tokens[: size + 1])):
        size = min(size * 5 // 4 + 1, most)
    return tokens[: size + 1]


def read_report(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A JSON object that another command wrote; None, and why, where there is none."""
    try:
        if not path.is_file():
            return None, f"{path}: no such file"
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{path} cannot be read: {error}"
    return (content, "") if isinstance(content, dict) else (None, f"{path} is no JSON object")


def same_score(one: Any, other: Any) -> bool:
    """Whether two scores are finite and agree to 1e-9 relative."""
    numbers = all(isinstance(x, (int, float)) for x in (one, other))
    return bool(numbers and math.isfinite(other) and abs(one - other) <= 1e-9 * abs(other))


def check_kept_score(path: Path, told: Mapping[str, Any], config: Config, shards: Sequence[str], targets: int) -> Check:
    """T19: the score in eval_ttt.json is that of the losses in nll.npy (`path`), by code of its own."""
    try:
        nll = np.load(path)
        if not isinstance(nll, np.ndarray) or nll.shape != (targets,) or nll.dtype != np.float32:
            raise ValueError(f"not the float32 losses of {targets} targets")
        loss, bpb = tg.recomputed_score(nll, shards, config.tokenizer_path)
    except Exception as error:  # whatever broken bytes lead to
        return Check(T19, False, 0, f"{path.name}: {error}")
    fine = same_score(told.get("val_loss_ttt"), loss) and same_score(told.get("val_bpb_ttt"), bpb)
    fine = fine and told.get("sha256_nll") in (None, tg.sha256_file(path)) and bool(np.isfinite(nll).all())
    return Check(T19, fine, nll.size, f"val_loss:{loss:.8f} val_bpb:{bpb:.8f}, eval_ttt.json has "
                 f"{told.get('val_loss_ttt')} and {told.get('val_bpb_ttt')}")  # fmt: skip


def check_kept_losses(setup: Setup, tokens: np.ndarray, nll: np.ndarray, told: Mapping[str, Any]) -> Check:
    """T20: the first losses of the run, `nll`, are those of the beginning of the text evaluated alone.

    With the same versions on a CPU bit for bit. Otherwise within what T11 admits as rounding, and 1e-3 on average.
    """
    if not settled(setup, tokens):
        return Check(T20, None, 0, "every loss depends on how the text goes on: see the reading")
    part = audited_beginning(setup, tokens)
    if not (count := settled(setup, part)):
        return Check(T20, None, 0, f"{len(part) - 1} targets are no chunk. Raise AUDIT_TOKENS")
    apart = evaluate(setup, part).nll[:count].astype(np.float64) - nll[:count]
    versions = tg.library_versions(setup.device, "given by the log")
    exact = setup.device.type == "cpu" and setup.nll_fn is tg.token_nll and told.get("world_size") == 1
    if exact and told.get("versions") == versions:
        wrong = int((apart != 0).sum())
        detail = f"{wrong} of {count} losses differ, within {np.abs(apart).max():.1e} (the processor must be the run's)"
        return Check(T20, wrong == 0, count, detail)
    still = replace(setup, nll_fn=tg.token_nll)
    rounding = score_plan(still, part).nll - float32_nll(still, part)
    limit = 1e-3 + 2 * float(np.sqrt(np.mean(rounding**2, dtype=np.float64)))
    root, mean = float(np.sqrt(np.mean(apart**2))), float(apart.mean())
    return Check(T20, root < limit and abs(mean) < 1e-3, count, f"of {count} losses: root mean square difference "
                 f"{root:.1e}, limit {limit:.1e}, mean {mean:+.1e}")  # fmt: skip


def check_run(setup: Setup, tokens: np.ndarray, shards: Sequence[str], path: Path) -> Iterator[Check]:
    """T19 and T20 of the evaluation beside the artifact `path`; without a count where it cannot be compared."""
    (told, why), kept = read_report(path.with_name("eval_ttt.json")), path.with_name("nll.npy")
    if told is None or not kept.is_file():
        why = f"{why or f'{kept}: no such file'}. Run eval_ttt.py without --audit first"
    elif told.get("sha256_artifact") != tg.sha256_file(path):
        why = f"eval_ttt.json is of another artifact than {path.name}"
    if why:
        yield Check(T19, None, 0, why)
        return
    yield (scored := check_kept_score(kept, told, setup.config, shards, len(tokens) - 1))
    given, used = tg.settings_of(setup.config, "scoring", "evaluator"), told.get("settings")
    used = used if isinstance(used, dict) else {}
    other = sorted(k.upper() for k in given if k not in NOT_COMPARED and used.get(k) != given[k])
    if other:
        yield Check(T20, None, 0, f"the run has other settings: {', '.join(other)}")
    elif scored.ok:
        yield check_kept_losses(setup, tokens, np.load(kept), told)


def check_training_text(setup: Setup, shards: Sequence[str], folder: Path) -> Check:
    """T21: no shard that the run in `folder` was trained on is a validation shard."""
    name, (trained, why) = "T21 not trained on the validation text", read_report(folder / "config.json")
    settings = (trained or {}).get("config")
    known = {k: settings.get(k) for k in ("data_path", "train_files")} if isinstance(settings, dict) else {}
    if not all(isinstance(text, str) for text in known.values()) or not known:
        return Check(name, None, 0, why or "config.json does not name the training shards")
    pattern = replace(setup.config, **known).shards("train")
    if not (count := len(glob(pattern))):
        return Check(name, None, 0, f"the training shards are not here: {pattern}")
    try:
        tg.check_disjoint(tg.TokenStream(pattern, setup.config.vocab_size), shards)
    except UserError as error:
        return Check(name, False, count, str(error))
    return Check(name, True, count, f"none of {pattern} is a validation shard")


def certificate_text(report: Mapping[str, Any], first: str) -> str:
    lines = [
        first,
        f"  reading: {report['reading']}",
        f"  seed: {report['seed']} (--audit={report['seed']} repeats it)",
    ]
    if report["audited_settings"]:
        lines.append("  audited with " + " ".join(f"{k.upper()}={v}" for k, v in report["audited_settings"].items()))
    lines += [f"  not audited: {words}" for words in report["not_audited"]]
    for check in report["checks"]:
        verdict = {True: "pass", False: "FAIL", None: "none"}[check["ok"]]
        lines.append(f"  {verdict}  {check['name']:45} {check['detail']} ({check['checked']} checked)")
    lines += [f"  sha256 {name} {value}" for name, value in report["sha256"].items()]
    return tg.shown("\n".join([*lines, f"  {report['seconds']:.1f}s"])) + "\n"


def run_checks(
    setup: Setup, small: Config, tokens: np.ndarray, path: Path, shards: Sequence[str], opened: Sequence[str], seed: int
) -> tuple[list[Check], list[str]]:
    """All checks, those of `audit` with the settings `small`, and what they leave out."""
    part, beside = tokens[: small.audit_tokens + 1], [*check_run(setup, tokens, shards, path)]
    inner = replace(setup, config=small, nll_fn=tg.token_nll)  # as the checks compute it
    if setup.device.type == "cuda":  # gradients without atomics, wherever torch has such kernels
        torch.use_deterministic_algorithms(True, warn_only=True)
        inner = replace(inner, kernel=tg.torch_attention())
    try:
        checks = [*audit(inner, part, opened, None, tokens, seed), *beside]
    except tg.LedgerError as error:
        checks = [Check("T4 T5 the ledger", False, 0, str(error)), *beside]
    checks.append(check_training_text(setup, shards, path.parent))  # may read training shards: after T6
    few = [check for check in checks if too_few(check)]
    checks = [check._replace(ok=None) if check in few else check for check in checks]
    return checks, [*shortfalls(inner, part), *(f"{check.name}: {check.detail}" for check in few)]


def run_audit(
    setup: Setup, tokens: np.ndarray, path: Path, shards: Sequence[str], opened: Sequence[str], seed: int | None = None
) -> int:
    """Run the checks, print the certificate and write it; exit code 0 where nothing failed and enough was checked.

    seed: of what is changed in the text; None: one that nobody knows beforehand.
    """
    c, began = setup.config, time.time()
    seed, small = secrets.randbits(32) if seed is None else seed, audited_config(c, tokens[: c.audit_tokens + 1])
    for name in ("certificate.json", "certificate.txt"):  # what an earlier audit left says nothing of this one
        path.with_name(name).unlink(missing_ok=True)
    checks, left_out = run_checks(setup, small, tokens, path, shards, opened, seed)
    passed = {check.name.split()[0] for check in checks if check.ok}
    failed = c.ttt_protocol != "legal" or any(check.ok is False for check in checks)
    legal = not failed and passed.issuperset(ESSENTIAL)
    verdict = "legal as far as audited" if left_out else "legal"
    verdict = "NOT LEGAL" if failed else verdict if legal else "NOT CERTIFIED, too little was audited"
    hashes = {"artifact": tg.sha256_file(path), "tokenizer": tg.sha256_file(c.tokenizer_path)}
    if any(check.name == T19 and check.checked for check in checks):
        hashes["nll.npy"] = tg.sha256_file(path.with_name("nll.npy"))
    hashes |= {Path(name).name: tg.sha256_file(name) for name in [*tg.code_files(), *shards]}
    settings, audited = asdict(c), asdict(small)
    report = dict(
        legal=legal,
        targets=min(c.audit_tokens, len(tokens) - 1),
        reading=reading(c),
        not_audited=left_out,
        seed=seed,
        checks=[check._asdict() for check in checks],
        sha256=hashes,
        settings=settings,
        audited_settings={name: value for name, value in audited.items() if value != settings[name]},
        seconds=time.time() - began,
    )
    text = certificate_text(report, f"certificate of {path.name} on the first {report['targets']} targets, "
                            f"TTT_MODE={c.ttt_mode} TTT_PROTOCOL={c.ttt_protocol}: {verdict}")  # fmt: skip
    print(text, end="", flush=True)
    tg.write_atomically(path.with_name("certificate.json"), json.dumps(report, indent=1).encode())
    tg.write_atomically(path.with_name("certificate.txt"), text.encode())
    return 0 if report["legal"] else 1


# ----------------------------------------------------------------------------------------------------------------------
# Reports
# ----------------------------------------------------------------------------------------------------------------------

REPORTS = ("eval_ttt.log", "eval_ttt.json", "nll.npy", "documents.csv", "distribution.json", "distribution.png")
LOSS_BORDERS = (1, 3, 5, 7, 10)  # nats
PLACE_BORDERS = (0, 128, 256, 512, 1024, 2048)  # targets after the beginning of the document


def loss_shares(nll: np.ndarray) -> list[dict[str, float]]:
    """For each border: how many targets lose more, as a share of the targets and of the whole loss."""
    total = float(nll.sum(dtype=np.float64))
    return [dict(above=b, targets=float((nll > b).mean()), loss=float(nll[nll > b].sum(dtype=np.float64)) / total)
            for b in LOSS_BORDERS]  # fmt: skip


def classes(tokens: np.ndarray, byte_table: tg.ByteTable) -> dict[str, np.ndarray]:
    """Masks over the targets: by what the target is, and by its place in its document."""
    target, (begin, end) = tokens[1:], documents(tokens)
    place = np.arange(len(target)) - np.repeat(begin, end - begin)
    border = target == BOS_ID
    starts = byte_table.has_leading_space[target]
    masks = {"document end": border, "word start": ~border & starts, "within a word": ~border & ~starts}
    for low, high in pairwise((*PLACE_BORDERS, len(target) + 1)):
        masks[f"place {low}+"] = (place >= low) & (place < high)
    return masks


def distribution(tokens: np.ndarray, before: np.ndarray, after: np.ndarray, byte_table: tg.ByteTable) -> dict[str, Any]:
    """Where the loss is, before and after adaptation, in nats: by size, by class and by place."""
    table = []
    for name, mask in classes(tokens, byte_table).items():
        if mask.any():
            means = dict(before=float(before[mask].mean()), after=float(after[mask].mean()))
            table.append(dict(name=name, targets=int(mask.sum()), **means))
    return dict(before=loss_shares(before), after=loss_shares(after), classes=table)


def distribution_text(report: Mapping[str, Any]) -> str:
    lines = [f"{'nats above':>12} {'targets':>9} {'of the loss':>12} {'adapted':>9} {'of the loss':>12}"]
    for one, other in zip(report["before"], report["after"], strict=True):
        lines.append(f"{one['above']:>12} {one['targets']:>9.2%} {one['loss']:>12.2%} {other['targets']:>9.2%} "
                     f"{other['loss']:>12.2%}")  # fmt: skip
    lines.append(f"{'class':>14} {'targets':>9} {'before':>8} {'after':>8} {'gain':>8}  nats")
    for row in report["classes"]:
        lines.append(f"{row['name']:>14} {row['targets']:>9} {row['before']:>8.4f} {row['after']:>8.4f} "
                     f"{row['before'] - row['after']:>8.4f}")  # fmt: skip
    return "\n".join(lines)


def plot_distribution(path: Path, before: np.ndarray, after: np.ndarray, report: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    bins = np.linspace(0, 14, 57)
    for nll, name in ((before, "before"), (after, "adapted")):
        left.hist(nll, bins, weights=nll / len(nll), histtype="step", label=name)
    left.set(xlabel="nats of a target", ylabel="share of the mean loss", title="where the loss is")
    left.legend()
    places = [row for row in report["classes"] if row["name"].startswith("place")]
    right.bar([row["name"][6:] for row in places], [row["before"] - row["after"] for row in places])
    right.set(xlabel="targets after the document's beginning", ylabel="nats gained", title="gain by place")
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    tg.write_atomically(path, picture.getvalue())
    plt.close(figure)


def document_table(tokens: np.ndarray, before: np.ndarray, after: np.ndarray, byte_table: tg.ByteTable) -> str:
    """CSV: one line a document, in the order of the text; sums of nats."""
    begin, end = documents(tokens)
    num_bytes = byte_table.count(tokens[:-1], tokens[1:])
    lines = ["document,first_target,targets,bytes,nats,nats_adapted"]
    for number, (a, b) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        sums = (float(x[a:b].sum(dtype=np.float64)) for x in (before, after))
        lines.append(f"{number},{a},{b - a},{int(num_bytes[a:b].sum())}," + ",".join(f"{x:.4f}" for x in sums))
    return "\n".join(lines) + "\n"


def running_bpb(plan: Sequence[Chunk], nll: np.ndarray, num_bytes: np.ndarray, points: int = 20) -> Iterator[str]:
    """Lines with the score of everything up to some chunks of the plan."""
    loss = total = 0.0
    shown = {round(x) for x in np.linspace(0, len(plan) - 1, points)}
    for number, chunk in enumerate(plan):
        for begin, end in chunk.scored.ranges():
            loss += float(nll[begin:end].sum(dtype=np.float64))
            total += float(num_bytes[begin:end].sum())
        if number in shown and total:
            yield f"chunk:{number + 1}/{len(plan)} running_bpb:{loss / math.log(2) / total:.6f}"


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def weights_of(path: Path) -> str:
    """How the labels of scores name the weights in `path`: float as trained, or an artifact's."""
    return "float" if path.suffix == ".pt" else "int6"


def read_model(config: Config, given: Mapping[str, Any]) -> tuple[Config, tg.Artifact, Path]:
    """The configuration with the artifact's model in it, the artifact, and its path.

    final_model.pt holds weights only, so the settings must describe the model then. UserError where the settings
    contradict the artifact, or where there is none.
    """
    config = replace(config, mtp_num_heads=0)  # a part of training
    path = Path(config.model_path or f"runs/{config.run_id}/final_model.int6.ptz")
    if not config.model_path and not config.run_id:
        raise UserError("MODEL_PATH is not set: an artifact, a final_model.pt, or RUN_ID of a run that has one")
    if weights_of(path) == "float":
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            tg.GPT(config).load_state_dict(state)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"MODEL_PATH={path}: {error}") from error
        return config, tg.Artifact(config, state, tg.sha256_file(config.tokenizer_path)), path
    artifact = tg.read_artifact(path)
    model = tg.settings_of(artifact.config, "model")
    wrong = [f"{name.upper()}={given[name]}, but {value} in the artifact" for name, value in model.items()
             if name in given and given[name] != value]  # fmt: skip
    if wrong:
        raise UserError(f"the settings contradict {path}:\n" + "\n".join(f"  {line}" for line in wrong))
    return replace(config, **model), artifact, path


def prepare(config: Config, given: Mapping[str, Any], environ: Mapping[str, str]):
    """Everything that can be wrong with the input is found here: setup, validation tokens, path of the model."""
    device = tg.start_ranks(config, environ)
    attention, kernel, notices = tg.choose_attention(config.attention, device)
    config, artifact, path = tg.on_rank_0(lambda: read_model(config, given))
    step = dict(train_batch_tokens=config.train_seq_len, grad_accum_total=1)  # of no interest here
    problems = tg.inconsistencies(replace(config, **step))
    if problems:
        raise UserError("\n".join(problems))
    memory = tg.check_memory(config, ("score", "slots"))
    byte_table = tg.load_byte_table(config.tokenizer_path, config.vocab_size)
    if tg.sha256_file(config.tokenizer_path) != artifact.tokenizer_sha256:
        raise UserError(
            f"TOKENIZER_PATH={config.tokenizer_path} is not the tokenizer that the artifact was trained with"
        )
    tokens, shards = tg.read_validation(config, byte_table, artifact.tokenizer_sha256)
    nll_fn = tg.maybe_compile(tg.token_nll, config, device)
    setup = Setup(config, artifact, device, kernel, byte_table, nll_fn)
    if attention == "sdpa":
        attention = f"sdpa, by torch's {tg.attention_backend(config, kernel, device)} kernel"
    return setup, tokens, path, [*notices, f"attention: {attention}", *memory], shards


class Budget:
    """Says early, and once, when the evaluation will not fit EVAL_BUDGET_SECONDS."""

    def __init__(self, config: Config, began: float, log: tg.RunLog, plan_length: int):
        self.config, self.began, self.log, self.chunks = config, began, log, plan_length
        self.first = time.time()
        self.said = not config.eval_budget_seconds

    def __call__(self, number: int) -> None:
        share, now = number / self.chunks, time.time()
        if not self.said and share > 0.02 and now - self.first > 2:
            needed = self.first - self.began + (now - self.first) / share
            if needed > self.config.eval_budget_seconds:
                self.log.line(f"WARNING: at this pace the evaluation takes {needed:.0f}s of EVAL_BUDGET_SECONDS="
                              f"{self.config.eval_budget_seconds:.0f}")  # fmt: skip
                self.said = True


def check_losses_finite(name: str, score: tg.Score) -> None:
    """Raise FloatingPointError where a loss is not finite."""
    if (wrong := np.flatnonzero(~np.isfinite(score.nll))).size:
        raise FloatingPointError(
            f"{name} score: {len(wrong)} of {len(score.nll)} losses are not finite, the first at target {wrong[0]}. "
            "Look for NaN in the artifact, or lower TTT_LR"
        )


def write_reports(path: Path, tokens: np.ndarray, scores: Mapping[str, tg.Score], setup: Setup, log: tg.RunLog) -> None:
    """Log where the loss is and write what `path` has beside it; nll.npy last."""
    before, after = scores["plan"].nll, scores["ttt"].nll
    report = distribution(tokens, before, after, setup.byte_table)
    for line in distribution_text(report).splitlines():
        log.line(line)
    if tg.rank() == 0:
        folder, array = path.parent, io.BytesIO()
        np.save(array, after)
        tg.write_atomically(folder / "distribution.json", json.dumps(report, indent=1).encode())
        table = document_table(tokens, before, after, setup.byte_table)
        tg.write_atomically(folder / "documents.csv", table.encode())
        try:
            plot_distribution(folder / "distribution.png", before, after, report)
        except Exception as error:  # no matplotlib, or no folder for its fonts: no reason to lose a score
            log.line(f"WARNING: distribution.png is not drawn: {error}. distribution.json has its numbers.")
        tg.write_atomically(folder / "nll.npy", array.getvalue())


def run_scores(
    setup: Setup, tokens: np.ndarray, path: Path, log: tg.RunLog, began: float, shards: Sequence[str]
) -> dict[str, Any]:
    """Warm up, score with adaptation, then the scores to compare it with; writes the reports, returns the result.

    Raises FloatingPointError where a loss is not finite, ArithmeticError where the score is not that of the losses.
    """
    c, num_bytes = setup.config, setup.byte_table.count(tokens[:-1], tokens[1:])
    compiled = setup.nll_fn is not tg.token_nll
    if compiled:
        warm_up(setup)
    plan = setup.plan(tokens)
    label = "legal_ttt" if c.ttt_protocol == "legal" else "invalid_ttt"
    adapted = evaluate(setup, tokens, progress=Budget(c, began, log, sum(chunk.is_mine for chunk in plan)))
    seconds = time.time() - began
    check_losses_finite("adapted", adapted)
    for line in running_bpb(plan, adapted.nll, num_bytes):
        log.line(line)
    if compiled:
        warm_up_windows(setup)
    scores = {"ttt": adapted, **window_scores(setup, tokens)}
    by_documents = TTT_MODES[c.ttt_mode][0]  # then by the learner, whose graphs are there
    scores["plan"] = evaluate(setup, tokens, learns=False) if by_documents else scores["sliding"]
    weights = weights_of(path)
    for name, dialect in (("roundtrip", f"final_{weights}_roundtrip"), ("sliding", f"final_{weights}_sliding_window"),
                          ("plan", "same_plan_without_ttt"), ("ttt", label)):  # fmt: skip
        check_losses_finite(name, scores[name])
        log.line(f"{dialect}_exact val_loss:{scores[name].val_loss:.8f} val_bpb:{scores[name].val_bpb:.8f} "
                 f"time:{scores[name].seconds:.1f}s")  # fmt: skip
    write_reports(path, tokens, scores, setup, log)
    kept = path.with_name("nll.npy")
    tg.on_rank_0(lambda: tg.check_score(adapted.val_loss, adapted.val_bpb, np.load(kept), shards, c.tokenizer_path))
    sha256_nll = tg.on_rank_0(lambda: tg.sha256_file(kept))
    result = {f"val_{unit}_{name}": getattr(s, f"val_{unit}") for name, s in scores.items() for unit in ("loss", "bpb")}
    return result | dict(ttt_gain_bpb=scores["plan"].val_bpb - adapted.val_bpb, sha256_nll=sha256_nll,
                         weights=weights, eval_seconds=seconds,
                         fits_budget=not c.eval_budget_seconds or seconds <= c.eval_budget_seconds)  # fmt: skip


def run_all(
    config: Config, given: Mapping[str, Any], notices: list[str], argv: Sequence[str], environ: Mapping[str, str]
) -> int:
    """Prepare, lock the folder of the model, then audit or score; returns the exit code."""
    began, opened = tg.process_start(), []
    if argv:
        sys.addaudithook(lambda event, what: opened.append(str(what[0])) if event == "open" else None)
    setup, tokens, path, more, shards = prepare(config, given, environ)
    if argv and tg.world_size() > 1:
        raise UserError("--audit runs in one process")
    lock, holds = tg.on_rank_0(lambda: tg.lock_folder(path.parent, 0.0)), tg.rank() == 0  # afterwards all are rank 0
    try:
        if argv:
            seed = argv[0].partition("=")[2]
            return run_audit(setup, tokens, path, shards, opened, int(seed) if seed else None)
        return run_evaluation(setup, tokens, path, shards, given, [*notices, *more], began)
    finally:
        if holds:
            os.close(lock)


def run_evaluation(
    setup: Setup,
    tokens: np.ndarray,
    path: Path,
    shards: Sequence[str],
    given: Mapping[str, Any],
    notices: Sequence[str],
    began: float,
) -> int:
    """Score the model of `path`, log it and write eval_ttt.json; returns the exit code."""
    c, (trained, why) = setup.config, tg.on_rank_0(lambda: read_report(path.with_name("result.json")))
    trained_on = tg.on_rank_0(lambda: check_training_text(setup, shards, path.parent))
    if trained_on.ok is False:
        raise UserError(trained_on.detail)
    log = tg.RunLog(path.parent, "eval_ttt.log")
    if tg.rank() == 0:
        for name in REPORTS:  # what an earlier evaluation left is no score of this
            (path.parent / name).unlink(missing_ok=True)
    for notice in notices:
        log.line(f"note: {notice}")
    if path.with_name("result.json").exists() and trained is None:
        log.line(f"WARNING: {why}. It counts as absent.")
    for name, value in tg.settings_of(c, "model", "scoring", "evaluator").items():
        log.line(f"  {name.upper()}={value}" + (" (given)" if name in given else ""))
    by_documents = TTT_MODES[c.ttt_mode][0]
    slots = f"documents of the file in {c.ttt_groups} groups of {c.ttt_slots} slots" if by_documents else "the file's"
    log.line(f"evaluation order: {slots}; targets:{len(tokens) - 1} world_size:{tg.world_size()}")
    if setup.artifact.factors:
        log.line(f"Meta-SGD's factors of the step size, by bank row:{tg.rates_text(setup.artifact.factors)}")
    if c.ttt_protocol != "legal":
        log.line(f"WARNING: TTT_PROTOCOL={c.ttt_protocol} learns from what it scores later: THIS SCORE IS INVALID")
    result = run_scores(setup, tokens, path, log, began, shards)
    if not result["fits_budget"]:
        log.line(f"WARNING: {result['eval_seconds']:.0f}s is over EVAL_BUDGET_SECONDS={c.eval_budget_seconds:.0f}")
    bytes_code = sum(file.stat().st_size for file in tg.code_files())
    sizes = dict(bytes_code=bytes_code, bytes_model=path.stat().st_size, bytes_total=bytes_code + path.stat().st_size)
    result |= dict(
        **sizes,
        fits=sizes["bytes_total"] <= tg.SIZE_CAP,
        strict_seconds=time.time() - began,
        legal=c.ttt_protocol == "legal",
        seed=c.seed,
        world_size=tg.world_size(),
        settings=tg.settings_of(c, "scoring", "evaluator"),
        sha256_artifact=tg.sha256_file(path),
        sha256_tokenizer=setup.artifact.tokenizer_sha256,
        sha256_code=tg.code_hashes(),
        sha256_shards={Path(shard).name: tg.sha256_file(shard) for shard in shards},
        trainer=trained,
        versions=tg.library_versions(setup.device, "given by the log"),
    )
    log.line("RESULT " + json.dumps(result))
    if tg.rank() == 0:
        tg.write_atomically(path.with_name("eval_ttt.json"), json.dumps(result, indent=1).encode())
    tg.leave_ranks()
    return 0


def main(argv: list[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Exit code 0: done (with --audit: legal), 1: failed or not legal, 2: the user's input."""
    argv, environ = sys.argv[1:] if argv is None else argv, os.environ if environ is None else environ
    try:
        if argv == ["--help"]:
            print(tg.described("help_text", __doc__))
            return 0
        if argv and not (len(argv) == 1 and re.fullmatch(r"--audit(=\d{1,18})?", argv[0])):
            raise UserError(f"unknown arguments {' '.join(argv)}: settings are environment variables, see --help")
        config, given, notices = tg.load_config(environ)
        return run_all(config, given, notices, argv, environ)
    except (UserError, ArithmeticError, OSError) as error:
        print(f"error: {tg.shown(error)}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("stopped: SIGINT", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
