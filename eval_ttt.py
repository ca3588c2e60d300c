"""Score an artifact on the validation text, with and without test-time training on scored tokens.

    MODEL_PATH=runs/NAME/final_model.int6.ptz python eval_ttt.py
    MODEL_PATH=runs/NAME/final_model.int6.ptz torchrun --standalone --nproc_per_node=8 eval_ttt.py
    MODEL_PATH=runs/NAME/final_model.int6.ptz python eval_ttt.py --audit    check legality; --audit-whole:
                                                                            repeat all of it; =7: seed 7
    MODEL_PATH=runs/NAME/final_model.int6.ptz python eval_ttt.py --sample --prompt "Once upon a time"
    python eval_ttt.py --help                                               every setting

The model's settings come from the artifact; TTT_* and EVAL_* say how it is scored. Read top to bottom: plans,
test-time training, mixture with PPM, evaluation, inputs, results and main. The audit and the reports are
records/audit.py and records/report.py, imported where they are present. Shapes as in train_gpt.py.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from sentencepiece import SentencePieceProcessor
from torch import Tensor

import train_gpt as tg
from train_gpt import BOS_ID, TTT_MODES, Chunk, Config, UserError, Windows

# ------------------------------------------------------------------------------------------------------------
# Plans
# ------------------------------------------------------------------------------------------------------------

# A plan is a list of chunks: windows that are scored, then windows that are adapted on. It follows from the
# settings and from where documents begin, before any loss is known, so that nothing that is scored can choose
# what is scored.


def rows_over(begin: int, end: int, length: int, context: int) -> Windows:
    """Windows of `length` targets that cover [begin, end), each with `context` more tokens to its left."""
    first = np.arange(begin, end, length)
    start = np.maximum(first - context, 0)
    return Windows(start, first - start, np.minimum(first + length, end) - start)


def flat_plan(num_tokens: int, config: Config) -> list[Chunk]:
    """Sliding windows in the order of the text, in chunks of TTT_CHUNK_TOKENS by their first scored target.

    Each chunk but the last is adapted on after it is scored, in windows of EVAL_SEQ_LEN.
    """
    windows = tg.sliding_windows(num_tokens, config.eval_seq_len, config.eval_stride)
    first = windows.start + windows.begin
    number = first // config.ttt_chunk_tokens
    cuts = np.append(np.flatnonzero(np.diff(number, prepend=-1)), len(first))
    plan = []
    for a, b in pairwise(cuts.tolist()):
        scored = windows.take(np.arange(a, b))
        rows = rows_over(
            int(first[a]), int((scored.start + scored.end)[-1]), config.eval_seq_len, config.ttt_context
        )
        plan.append(Chunk(scored, rows if b < len(first) else None))
    return plan


def documents(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half-open range of the targets of each document; its last target is the BOS of the next one."""
    begin = np.unique(np.append(0, np.flatnonzero(tokens[:-1] == BOS_ID)))
    return begin, np.append(begin[1:], len(tokens) - 1)


def assign_slots(chunks: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """First step and slot of each document, (documents,) each; chunks: how many each document has.

    Documents enter in their order; a free slot takes the next one. So slot and step of a document depend on
    the lengths of earlier documents only.
    """
    free, found = [(0, slot) for slot in range(slots)], []
    for count in chunks.tolist():
        step, slot = heapq.heappop(free)
        found.append((step, slot))
        heapq.heappush(free, (step + count, slot))
    first, slot = np.array(found, np.int64).reshape(-1, 2).T
    return first, slot


def group_plan(low: np.ndarray, high: np.ndarray, group: int, config: Config) -> list[Chunk]:
    """Steps of a group of documents with targets [low, high): the next chunk of the document in each slot."""
    size = np.full(len(low), config.doc_chunk)
    for length, smaller in reversed(config.chunks_by_length):
        size[high - low <= length] = smaller
    count = -(-(high - low) // size)
    first, slot = assign_slots(count, config.ttt_slots)
    document = np.repeat(np.arange(len(low)), count)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    step = first[document] + piece
    # Documents that entered first have the longest windows, if all chunks have one size.
    order = np.lexsort((document, step))
    document, piece, step = document[order], piece[order], step[order]
    ends, size = high[document], size[document]
    scored, learned, lengths = tg.chunk_windows(low[document], ends, piece * size, config, size)
    plan = []
    for a, b in pairwise(np.flatnonzero(np.diff(step, prepend=-1, append=-1)).tolist()):
        part = np.arange(a, b)
        slots = tg.Slots(group, slot[document[part]], piece[part] == 0, lengths[part], config.doc_chunk)
        adapts = learned.take(part) if (learned.end > learned.begin)[part].any() else None
        plan.append(Chunk(scored.take(part), adapts, slots))
    return plan


def document_plan(tokens: np.ndarray, config: Config) -> list[Chunk]:
    """Plan for documents in slots: TTT_GROUPS groups in turn, each of every TTT_GROUPS-th document.

    TTT_MODE=phased has PHASED_TTT_NUM_PHASES borders. At each of them all slots run empty, and the base
    adapts on all documents before it. Borders beyond the last document are left out.
    """
    c, (begin, end) = config, documents(tokens)
    plan, borders = [], []
    if c.ttt_mode == "phased":
        phases = c.phased_ttt_num_phases
        borders = sorted({c.phased_ttt_prefix_docs * (k + 1) // phases for k in range(phases)})
        borders = [border for border in borders if 0 < border < len(begin)]
    for first, after in pairwise((0, *borders, len(begin))):
        for group in range(c.ttt_groups):
            members = np.arange(first, after)[np.arange(first, after) % c.ttt_groups == group]
            plan += group_plan(begin[members], end[members], group, c) if len(members) else []
        if after < len(begin):
            parts = [
                rows_over(low, high, c.eval_seq_len, 0) for low, high in zip(begin[:after], end, strict=False)
            ]
            empty = Windows(*(np.zeros(0, np.int64) for _ in range(3)))
            rows = Windows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
            plan.append(Chunk(empty, rows, base=True))
    return plan


# ------------------------------------------------------------------------------------------------------------
# Test-time training
# ------------------------------------------------------------------------------------------------------------

# Adaptation decides what is scored with which weights and makes batches of scored text; a trainer holds the
# weights and has three methods. So TTT_MODE=path.py:Class replaces the trainer and nothing of what makes a
# score legal. By documents a rank owns whole groups; by flat chunks the ranks share a step's rows, and their
# weights stay alike.


def mode_of(config: Config) -> tg.TTTMode:
    """The mode that TTT_MODE names; path.py:Class adapts by documents."""
    return TTT_MODES.get(config.ttt_mode, tg.TTTMode(by_documents=True, adapts=config.ttt_mode))


class Plugin(NamedTuple):
    """The class that TTT_MODE=path.py:Class names, and the file that it is from."""

    trainer: type
    name: str
    source: bytes


def load_plugin(path: Path, name: str) -> Plugin:
    """Run the file at `path` and take the class `name` from it. UserError where that fails."""
    module = sys.modules["ttt_mode"] = ModuleType("ttt_mode")  # registered, for dataclasses of the file
    try:
        source = path.read_bytes()
        exec(compile(source, str(path), "exec"), module.__dict__)
        trainer = getattr(module, name)
        missing = [
            method for method in ("reset", "weights", "adapt") if not callable(getattr(trainer, method, None))
        ]
    except Exception as error:  # whatever the file does
        raise UserError(f"TTT_MODE={path}:{name}: {type(error).__name__}: {error}") from error
    if missing or path.name in tg.code_hashes():
        wrong = (
            f"it has no {', '.join(missing)}" if missing else "the file's name is that of a shipped program"
        )
        raise UserError(f"TTT_MODE={path}:{name}: {wrong}. See the README for an example")
    return Plugin(trainer, path.name, source)


class ScoredBatch(NamedTuple):
    """Scored text to adapt on: by documents a chunk for each of `slots`, by flat chunks the rows of a step.

    text: ids (B, T), targets, columns and weights of their losses (B, C); 0 for rows that fill the batch.
    rows: slots whose weights the B rows use, those of `slots` first. lr: of this step, which must scale with
    it. last: no other batch belongs to the step. gradients: of the loss, by weights as `weights` returns
    them, (len(slots), ...) each.
    """

    text: tg.TTTBatch
    slots: Tensor | slice
    rows: Tensor | slice
    lr: float
    last: bool
    gradients: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def stand_in(config: Config) -> Config:
    """Settings for rules and memory estimates; a user-defined class counts as doc_banks."""
    return config if config.ttt_mode in TTT_MODES else replace(config, ttt_mode="doc_banks")


class TestTimeTrainer:
    """The built-in modes: steps of TTT_OPTIMIZER on one set of weights for each slot, or on one for all.

    A class of one's own is made with model and config, adapts by documents, and needs `reset`, `weights` and
    `adapt`.
    """

    def __init__(self, model: tg.GPT, config: Config, nll_fn: Callable, factors: Mapping[str, Tensor]):
        self.model, self.config, self.nll_fn = model, config, nll_fn
        by_documents, adapts = mode_of(config)
        self.fast = tg.FastWeights(model, config, adapts, config.ttt_slots if by_documents else None)
        self.fast.set_factors(factors)

    def begin_group(self, group: int) -> None:
        """Reset all slots; second moments go on where this group of documents stopped. Optional."""
        self.fast.begin(group)

    def reset(self, slots: Tensor) -> None:
        """Documents begin in these slots: back to the artifact's weights."""
        self.fast.reset(slots, self.config.ttt_warm_start_a)

    def weights(self) -> dict[str, Tensor]:
        """Weights of all slots, (slots, ...) float32 by parameter, or by BANK.a and BANK.b for adapters."""
        return self.fast.values

    def adapt(self, batch: ScoredBatch) -> None:
        """One step on scored text."""
        self.fast.rows, count = batch.rows, None if self.fast.shared else len(batch.slots)
        tg.adaptation_step(self.model, self.fast, batch.text, batch.lr, count, self.nll_fn)
        if batch.last and not self.fast.shared:
            self.fast.moments.end_step()


class SlotWeights(tg.FastWeights):
    """A trainer's weights as `token_nll` takes them: `rows` are the slots in use, or all."""

    def __init__(self, config: Config, shared: bool):
        self.config, self.shared = config, shared
        self.rows, self.values = slice(None), {}


class Adaptation:
    """What `score` calls: losses under the current weights, and adaptation on a scored chunk."""

    def __init__(self, model: tg.GPT, setup: Setup, plan: Sequence[Chunk], on_adapt: Callable[[Chunk], None]):
        c, by_documents = setup.config, mode_of(setup.config).by_documents
        self.model, self.config, self.nll_fn = model, c, setup.nll_fn
        self.chunks, self.batch_rows, self.on_adapt = len(plan), setup.batch_seqs(), on_adapt
        self.number, self.group, self.base = 0, None, None
        self.in_use = SlotWeights(c, not by_documents)
        if c.ttt_mode not in TTT_MODES:
            if setup.plugin is None:
                raise UserError(
                    f"TTT_MODE={c.ttt_mode}: a user-defined class can only be named in the environment of "
                    "eval_ttt.py. Set TTT_MODE there."
                )
            self.trainer = setup.plugin.trainer(model, c)
            return
        self.trainer = TestTimeTrainer(model, c, self.nll_fn, setup.artifact.factors)
        if (
            by_documents
            and self.trainer.fast.wants_prior
            and any(chunk.adapted is not None for chunk in plan)
        ):
            self.trainer.fast.moments.start = setup.prior(model)
        if c.ttt_mode == "phased":
            clip = c.ttt_grad_clip if c.global_ttt_grad_clip < 0 else c.global_ttt_grad_clip
            sgd = dict(ttt_optimizer="sgd", ttt_momentum=c.global_ttt_momentum, ttt_grad_clip=clip)
            self.base = TestTimeTrainer(model, replace(c, ttt_mode="all", **sgd), self.nll_fn, {})

    def begin(self, number: int, chunk: Chunk) -> None:
        """Reset the slots in which a document begins; all of them where another group does."""
        self.number = number
        group, fresh = (chunk.slots.group, chunk.slots.slot[chunk.slots.fresh]) if chunk.slots else (None, ())
        if group is not None and group != self.group:
            if hasattr(self.trainer, "begin_group"):
                self.trainer.begin_group(group)
            else:
                self.trainer.reset(self.on_device(np.arange(self.config.ttt_slots)))
        self.group = group
        if len(fresh):
            self.trainer.reset(self.on_device(fresh))

    def select(self, chunk: Chunk, index: np.ndarray) -> None:
        """Use the weights of the windows `index` of a chunk, and any others to fill a batch."""
        if chunk.slots is not None:
            used = chunk.slots.slot[index]
            others = np.setdiff1d(np.arange(self.config.ttt_slots), used)
            self.in_use.rows = self.on_device(np.append(used, others)[: self.batch_rows])

    def replacements(self) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """The weights in use, as arguments of `token_nll`: parameters that are replaced, and adapters."""
        self.in_use.values = self.trainer.weights()
        return self.in_use.weights(self.in_use.used())

    def gradients(
        self, text: tg.TTTBatch, rows: Tensor, count: int, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Of the loss of `text` by the first `count` of the `rows` of `values` (slots, ...); by documents."""
        self.in_use.rows, self.in_use.values = rows, values
        loss, leaves = tg.weighted_nll(self.model, self.in_use, text, self.nll_fn)
        found = torch.autograd.grad(loss, list(leaves.values()))
        return {name: gradient[:count] for name, gradient in zip(leaves, found, strict=True)}

    def on_device(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self.device, non_blocking=True)

    @property
    def device(self) -> torch.device:
        return self.model.qo_bank.device

    def lr_scale(self, number: int, count: int) -> float:
        """Of step `number` of `count` by TTT_LR_SCHEDULE."""
        share = number / max(count - 1, 1) if self.config.ttt_lr_schedule == "cosine" else 0.0
        return (1 + math.cos(math.pi * share)) / 2

    def adapt(self, tokens: np.ndarray, chunk: Chunk, nll: Tensor) -> None:
        """Adapt for TTT_EPOCHS on a scored chunk, SLOT_ROWS documents or TTT_BATCH_SEQS windows at a time."""
        self.on_adapt(chunk)
        weight = None if chunk.slots else self.row_weights(chunk.adapted, nll)
        for _ in range(self.config.ttt_epochs):
            if chunk.slots:
                self.step_documents(tokens, chunk)
            else:
                self.pass_over(tokens, chunk.adapted, weight, self.base if chunk.base else self.trainer)
        if chunk.base:
            with torch.no_grad():
                for name, value in self.base.weights().items():
                    self.model.get_parameter(name).copy_(value[0])

    def step_documents(self, tokens: np.ndarray, chunk: Chunk) -> None:
        """A step of every document that goes on, each on its own chunk."""
        c, windows = self.config, chunk.adapted
        goes_on = np.flatnonzero(windows.end > windows.begin)
        for first in range(0, len(goes_on), self.batch_rows):
            index = goes_on[first : first + self.batch_rows]
            self.select(chunk, index)
            rows, count, last = self.in_use.rows, len(index), first + self.batch_rows >= len(goes_on)
            part = windows.take(np.resize(index, self.batch_rows))
            weight = np.where(np.arange(self.batch_rows) < count, 1 / (part.end - part.begin), 0.0)
            text = tg.make_ttt_batch(tokens, part, weight, c.doc_chunk, c.ttt_context, self.device)
            gradients = partial(self.gradients, text, rows, count)
            self.trainer.adapt(ScoredBatch(text, rows[:count], rows, c.ttt_lr, last, gradients))

    def pass_over(
        self, tokens: np.ndarray, windows: Windows, weight: np.ndarray, trainer: TestTimeTrainer
    ) -> None:
        """Steps of shared weights on the windows with a weight, TTT_BATCH_SEQS each."""
        c, rows, size = self.config, np.flatnonzero(weight), self.config.ttt_batch_seqs
        lr = c.ttt_lr * self.lr_scale(self.number, self.chunks)
        for number, first in enumerate(starts := range(0, len(rows), size)):
            part = rows[first : first + size]
            if trainer is self.base:
                lr = c.global_ttt_lr * self.lr_scale(number, len(starts))
            self.step(tokens, windows.take(part), weight[part], trainer, lr)

    def step(
        self, tokens: np.ndarray, windows: Windows, weight: np.ndarray, trainer: TestTimeTrainer, lr: float
    ) -> None:
        """One step of shared weights on windows that the ranks share; weight (windows,)."""
        c, count, is_base = self.config, len(weight), trainer is self.base
        per_target = weight / np.maximum(windows.end - windows.begin, 0).sum()
        mine = np.array_split(np.arange(count), tg.world_size())[tg.rank()]
        rows = c.ttt_batch_seqs if is_base else count  # documents end anywhere: one shape
        padded = np.resize(mine if len(mine) else 0, math.ceil(rows / tg.world_size()))
        per_target = np.where(np.arange(len(padded)) < len(mine), per_target[padded], 0.0)
        context = 0 if is_base else c.ttt_context
        text = tg.make_ttt_batch(
            tokens, windows.take(padded), per_target, c.eval_seq_len, context, self.device
        )
        trainer.adapt(ScoredBatch(text, slice(None), slice(None), lr, True, dict))

    def row_weights(self, windows: Windows, nll: Tensor) -> np.ndarray:
        """Weight of each window, (windows,): 1, or 0 for low-loss windows that TTT_TOP_FRAC leaves out.

        The legal form of error-guided adaptation: #294 chose windows by the loss of the whole text, before
        scoring it.
        """
        c, adapts = self.config, (windows.end > windows.begin).astype(np.float64)
        if c.ttt_top_frac == 1:
            return adapts
        sums = torch.stack([nll[begin:end].sum() for begin, end in windows.ranges()]).double()
        if tg.world_size() > 1:  # each rank holds the losses of its own windows
            dist.all_reduce(sums)
        index, count = np.flatnonzero(adapts), (windows.end - windows.begin)[adapts > 0]
        loss = sums.cpu().numpy() / count
        kept = np.argsort(-loss, kind="stable")[: math.ceil(c.ttt_top_frac * len(loss))]
        adapts[:] = 0.0
        adapts[index[kept]] = 1.0
        return adapts


# ------------------------------------------------------------------------------------------------------------
# Mixture with PPM
# ------------------------------------------------------------------------------------------------------------

# An order-1 PPM that counts as it goes, mixed into the model's distribution with weight 1 - PPM_ALPHA: #398's
# negative result, kept because mixtures of this kind return. It is computed for the whole text at once:
# counts before a target depend on earlier tokens only, and both distributions add up to one, so that their
# mixture does.


def seen_before(key: np.ndarray) -> np.ndarray:
    """How often each entry of `key` occurs before its own position."""
    order = np.argsort(key, kind="stable")
    groups = np.flatnonzero(np.diff(key[order], prepend=key[order[0]] - 1))
    rank = np.arange(len(key)) - np.repeat(groups, np.diff(np.append(groups, len(key))))
    return rank[np.argsort(order, kind="stable")]


def ppm_nll(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Nats of each target under a normalized PPM-C of orders 1 and 0, counted online, no exclusions.

    An order gives count / (total + distinct) and passes distinct / (total + distinct) on; the rest is
    uniform.
    """
    previous, target = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    probability, escape = np.zeros(len(target)), np.ones(len(target))
    for context in (previous, np.zeros_like(previous)):
        count = seen_before(context * vocab_size + target)
        total = seen_before(context)
        order = np.argsort(context, kind="stable")
        new = (count == 0)[order].astype(np.int64)
        before = np.cumsum(new) - new  # distinct successors before, over all contexts
        first = np.flatnonzero(total[order] == 0)
        distinct = np.empty_like(before)
        distinct[order] = before - np.repeat(before[first], np.diff(np.append(first, len(order))))
        mass = np.maximum(total + distinct, 1)
        probability += escape * count / mass
        escape *= np.where(total > 0, distinct / mass, 1.0)
    return -np.log(probability + escape / vocab_size)


def mixed_nll(nll: np.ndarray, ppm: np.ndarray, alpha: float) -> np.ndarray:
    """-log(alpha * exp(-nll) + (1 - alpha) * exp(-ppm)), a mixture of two normalized distributions."""
    return -np.logaddexp(np.log(alpha) - nll, np.log(1 - alpha) - ppm)


def mixed_with_ppm(score: tg.Score, tokens: np.ndarray, config: Config) -> tg.Score:
    """The score of the mixture with PPM_ALPHA; the same score if that is 1."""
    if config.ppm_alpha == 1:
        return score
    nll = mixed_nll(score.nll, ppm_nll(tokens, config.vocab_size), config.ppm_alpha).astype(np.float32)
    loss = float(nll.mean(dtype=np.float64))  # of the losses as nll.npy keeps them
    return score._replace(nll=nll, val_loss=loss, val_bpb=score.val_bpb / score.val_loss * loss)


# ------------------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------------------

# `evaluate` is the adapted score, a function of the setup and the text: the audit calls it with altered
# texts, warm-up with random ones. It loads the model anew each time, since a mode may change its weights.


@dataclass
class Setup:
    """What an evaluation needs, the text apart: so that warm-up cannot see it, and the audit can change it.

    versions: of Python, torch, the device and the attention kernel, with the same keys as in the trainer's
    log. plugin: where TTT_MODE names a class of one's own.
    """

    config: Config
    artifact: tg.Artifact
    device: torch.device
    kernel: tg.AttentionFn
    byte_table: tg.ByteTable
    nll_fn: Callable
    versions: dict[str, Any] = field(default_factory=dict)
    plugin: Plugin | None = None
    priors: dict = field(default_factory=dict)  # the same dict in every copy: see `prior`

    def prior(self, model: tg.GPT) -> Tensor:
        """Second moments of generated text, computed once: an audit evaluates about 30 times."""
        irrelevant = dict(ttt_lr=0.0, global_ttt_lr=0.0, ttt_epochs=1, eval_stride=1)
        irrelevant |= dict(phased_ttt_prefix_docs=1, phased_ttt_num_phases=1)
        key = id(self.artifact.state), replace(self.config, **irrelevant)
        if key not in self.priors:  # the state is kept beside it, so that no other one gets its id
            made = tg.generated_moments(model, self.config, self.batch_seqs(), self.nll_fn)
            self.priors[key] = (made, self.artifact.state)
        return self.priors[key][0]

    def load(self) -> tg.GPT:
        """A fresh model: some modes change its weights."""
        model = tg.load_model(self.artifact, self.device, self.kernel, self.byte_table.has_leading_space)
        return model.requires_grad_(False)

    def plan(self, tokens: np.ndarray) -> list[Chunk]:
        if mode_of(self.config).by_documents:
            return document_plan(tokens, self.config)
        return flat_plan(len(tokens), self.config)

    def batch_seqs(self) -> int:
        """Windows in a batch, as many as the GPU holds."""
        by_documents = mode_of(self.config).by_documents
        return max(tg.at_once(stand_in(self.config))["slots" if by_documents else "score"], 1)

    def code_hashes(self) -> dict[str, str]:
        """SHA-256 of the files that count, by name: the two programs, and that of the class in TTT_MODE."""
        own = {self.plugin.name: hashlib.sha256(self.plugin.source).hexdigest()} if self.plugin else {}
        return tg.code_hashes() | own


def score_plan(setup: Setup, tokens: np.ndarray) -> tg.Score:
    """The plan's score without adaptation, by the plain forward."""
    plan = [chunk._replace(adapted=None) for chunk in setup.plan(tokens)]
    return tg.score(setup.load(), tokens, plan, setup.byte_table, setup.batch_seqs(), setup.nll_fn)


def evaluate(
    setup: Setup,
    tokens: np.ndarray,
    observe: Callable | None = None,
    on_adapt: Callable[[Chunk], None] = lambda chunk: None,
    progress: Callable[[int], None] = lambda number: None,
    adapts: bool = True,
) -> tg.Score:
    """The score of `tokens` as the settings say; without `adapts`, that of the same plan before any step.

    observe: called as by `score`, after the model and the adaptation. on_adapt: called with a chunk before it
    is adapted on. progress: called with the number of each of this rank's chunks before it is scored.
    """
    c, model, plan = setup.config, setup.load(), setup.plan(tokens)
    plan = plan if adapts else [chunk._replace(adapted=None) for chunk in plan]
    adaptation = None if c.ttt_mode == "none" else Adaptation(model, setup, plan, on_adapt)
    if c.ttt_protocol != "legal":
        plan = adapt_first(setup, model, adaptation, tokens, plan)
    seen = None if observe is None else (lambda *args: observe(model, adaptation, *args))
    how = (setup.byte_table, setup.batch_seqs(), setup.nll_fn, adaptation, seen, progress)
    return mixed_with_ppm(tg.score(model, tokens, plan, *how), tokens, c)


def adapt_first(
    setup: Setup, model: tg.GPT, adaptation: Adaptation, tokens: np.ndarray, plan: list[Chunk]
) -> list[Chunk]:
    """INVALID, kept to reproduce published scores: adapt first; return the plan that then scores.

    adapt_first takes all of it (#398, #442, #494), two_pass the rows that a first pass found hardest (#296).
    """
    c = setup.config
    rows = rows_over(0, len(tokens) - 1, c.eval_seq_len, 0)
    if c.ttt_protocol == "two_pass":
        first = tg.score(model, tokens, plan, setup.byte_table, setup.batch_seqs(), setup.nll_fn).nll
        loss = np.array([first[begin:end].mean() for begin, end in rows.ranges()])
        rows = rows.take(np.sort(np.argsort(-loss)[: math.ceil(c.ttt_top_frac * len(loss))]))
    adaptation.on_adapt(Chunk(rows, rows))
    adaptation.chunks = c.ttt_epochs
    for adaptation.number in range(c.ttt_epochs):
        adaptation.pass_over(tokens, rows, np.ones(len(rows.start)), adaptation.trainer)
    return [chunk._replace(adapted=None) for chunk in plan]


def warm_up(setup: Setup) -> None:
    """Compile and load everything that the adapted score needs, on random tokens.

    A document of one window and one target has every shape; each rank that owns a group gets one.
    """
    c = setup.config
    if mode_of(c).by_documents:
        count, size = 2 * min(c.ttt_groups, tg.world_size()), c.eval_seq_len + 1
        setup = replace(setup, config=replace(c, phased_ttt_prefix_docs=count // 2, phased_ttt_num_phases=1))
    else:
        count, size = 2, max(c.ttt_chunk_tokens, c.eval_seq_len)
    tokens = np.random.default_rng(0).integers(BOS_ID + 1, c.vocab_size, (count, size))
    tokens[:, 0] = BOS_ID
    evaluate(setup, tokens.astype(np.uint16).flatten())


def warm_up_windows(setup: Setup) -> None:
    """Compile everything that `window_scores` needs, on random tokens: two batches, on each rank.

    The first window of a sliding score has EVAL_SEQ_LEN targets, so its batch has a shape of its own.
    """
    c = setup.config
    size = c.eval_seq_len + c.eval_stride * tg.world_size() * (c.eval_batch_seqs + 1) + 1
    tokens = np.random.default_rng(0).integers(BOS_ID + 1, c.vocab_size, size)
    window_scores(setup, tokens.astype(np.uint16))


def window_scores(setup: Setup, tokens: np.ndarray) -> dict[str, tg.Score]:
    """The artifact's scores without adaptation: non-overlapping and sliding windows."""
    c, scores, size = setup.config, {}, max(tg.at_once(stand_in(setup.config))["score"], 1)
    for name, stride in (("roundtrip", c.eval_seq_len), ("sliding", c.eval_stride)):
        windows = [Chunk(tg.sliding_windows(len(tokens), c.eval_seq_len, stride))]
        scores[name] = tg.score(setup.load(), tokens, windows, setup.byte_table, size, setup.nll_fn)
    return scores


# ------------------------------------------------------------------------------------------------------------
# Inputs
# ------------------------------------------------------------------------------------------------------------

# Whatever a user can get wrong is found here, before a score is begun. A record's folder has train_gpt.py and
# this file only: modules of records/ are imported where they are present. Files beside the artifact may come
# from anybody.


def read_report(path: Path, **form: Any) -> tuple[dict[str, Any] | None, str]:
    """The JSON object in a file, with entries of some form, and ""; or None, and why there is none."""
    if not path.is_file():
        return None, f"{path}: no such file"
    try:
        return tg.parse_json(tg.read_file(path), form, path), ""
    except UserError as error:
        return None, str(error)


def trained_on_other_text(
    config: Config, shards: Sequence[str], folder: Path
) -> tuple[bool | None, int, str]:
    """Whether the run in `folder` avoided `shards` (None: unknown), how many shards it had, and why.

    Check T21 of the audit. A normal evaluation refuses an artifact that was trained on the validation text.
    """
    trained, why = read_report(folder / "config.json", config={"data_path": str, "train_files": str})
    if trained is None:
        return None, 0, why
    known = {name: trained["config"][name] for name in ("data_path", "train_files")}
    pattern, count = replace(config, **known).shards("train"), 0
    try:
        count = len(tg.find_shards(pattern))
        stream = tg.TokenStream(pattern, config.vocab_size)
    except UserError as error:
        return None, count, f"the training shards cannot be read: {error}"
    try:
        tg.check_disjoint(stream, shards)
    except UserError as error:
        return False, count, str(error)
    return True, count, f"none of {pattern} is a validation shard"


def weights_of(path: Path) -> str:
    """Label of the weights in `path`: float for a final_model.pt, int6 for an artifact."""
    return "float" if path.suffix == ".pt" else "int6"


def read_weights(path: Path, config: Config) -> dict[str, Tensor]:
    """The state dict in a final_model.pt. UserError for a file without this model's weights."""
    with tg.decoding(f"MODEL_PATH={path}", "the weights of this model"):
        with tg.open_input(path, tg.STATE_FILE) as file:
            state = tg.load_tensors(file)
        tg.GPT(config).load_state_dict(state)
    return state


def read_model(config: Config, given: Mapping[str, Any]) -> tuple[Config, tg.Artifact, Path]:
    """The settings with the artifact's model settings, the artifact, and its path.

    final_model.pt holds weights only, so the settings must describe its model. UserError where there is no
    artifact or the settings contradict it.
    """
    config = replace(config, mtp_num_heads=0)  # a part of training
    path = Path(config.model_path or f"runs/{config.run_id}/final_model.int6.ptz")
    if not config.model_path and not config.run_id:
        raise UserError(
            "MODEL_PATH is not set: an artifact, a final_model.pt, or RUN_ID of a run that has one"
        )
    if weights_of(path) == "float":
        tg.load_byte_table(config.tokenizer_path, config.vocab_size)  # UserError if the file is missing
        sha256 = tg.sha256_file(config.tokenizer_path)
        return config, tg.Artifact(config, read_weights(path, config), sha256), path
    artifact = tg.read_artifact(path)
    model = tg.settings_of(artifact.config, "model")
    wrong = [f"{name.upper()}={given[name]}, but {value} in the artifact" for name, value in model.items()
             if name in given and given[name] != value]  # fmt: skip
    if wrong:
        raise UserError(f"the settings contradict {path}:\n" + "\n".join(f"  {line}" for line in wrong))
    return replace(config, **model), artifact, path


def load_settings(
    environ: Mapping[str, str],
) -> tuple[tuple[Config, dict[str, Any], list[str]], Plugin | None]:
    """What tg.load_config returns, and the class that TTT_MODE=path.py:Class names.

    Such a TTT_MODE stands in the environment itself: recipes, logs and folders of runs come from anybody, and
    train_gpt.py, which reads those, knows the built-in modes only.
    """
    mode = environ.get("TTT_MODE", "")
    if not (named := re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", mode)):
        return tg.load_config(environ), None
    config, given, notices = tg.load_config({**environ, "TTT_MODE": "doc_banks"})
    settings = replace(config, ttt_mode=mode), given | {"ttt_mode": mode}, notices
    return settings, load_plugin(Path(named[1]), named[2])


class Inputs(NamedTuple):
    """Input of an evaluation: setup, validation tokens (uint16), model path, notices, shards."""

    setup: Setup
    tokens: np.ndarray
    path: Path
    notices: list[str]
    shards: list[str]


def prepare(
    config: Config, given: Mapping[str, Any], environ: Mapping[str, str], plugin: Plugin | None = None
) -> Inputs:
    """Check and load all input. UserError for whatever the user can get wrong."""
    device = tg.start_ranks(config, environ)
    attention, kernel, notices = tg.choose_attention(config.attention, device)
    config, artifact, path = tg.on_rank_0(lambda: read_model(config, given))
    # training does not matter here
    step = dict(train_batch_tokens=config.train_seq_len, grad_accum_total=1)
    step |= dict(data_order="sequential", train_seq_schedule="")
    problems = tg.inconsistencies(replace(stand_in(config), **step))
    if problems:
        raise UserError("\n".join(problems))
    memory = tg.check_memory(stand_in(config), ("score", "slots"))
    byte_table = tg.load_byte_table(config.tokenizer_path, config.vocab_size)
    if tg.sha256_file(config.tokenizer_path) != artifact.tokenizer_sha256:
        raise UserError(
            f"TOKENIZER_PATH={config.tokenizer_path}: the artifact was trained with another tokenizer"
        )
    byte_table = byte_table.with_sidecars(tg.find_shards(config.shards("val")))
    tokens, shards = tg.read_validation(config, byte_table, artifact.tokenizer_sha256)
    nll_fn = tg.maybe_compile(tg.token_nll, config, device)
    versions = tg.library_versions(device, attention)
    if attention == "sdpa":
        versions["attention_backend"] = tg.attention_backend(config, kernel, device)
    setup = Setup(config, artifact, device, kernel, byte_table, nll_fn, versions, plugin)
    if "attention_backend" in versions:
        attention = f"sdpa, by torch's {versions['attention_backend']} kernel"
    return Inputs(setup, tokens, path, [*notices, f"attention: {attention}", *memory], shards)


# ------------------------------------------------------------------------------------------------------------
# Results and main
# ------------------------------------------------------------------------------------------------------------

# Each mode has its own folder, so that modes can be compared. Files of an earlier evaluation are deleted
# first and eval_ttt.json is written last, so that a folder never mixes two. The printed score is derived
# again from nll.npy, shards and tokenizer before it is believed.

REPORTS = ("eval_ttt.log", "nll.npy", "documents.csv", "distribution.json", "distribution.png")


def evaluation_folder(path: Path, config: Config) -> Path:
    """eval/MODE beside the artifact `path`: the mode or its class, then a protocol that is not legal, then
    `float` for weights that are not of an artifact.

    UserError for a link in its place: an evaluation deletes and writes files there.
    """
    parts = config.ttt_mode.rpartition(":")[2], config.ttt_protocol, weights_of(path)
    folder = path.parent / "eval" / "_".join(part for part in parts if part not in ("legal", "int6"))
    if link := next((part for part in (folder, folder.parent) if part.is_symlink()), None):
        raise UserError(f"{link} is a link, but an evaluation writes beside its artifact only. Remove it.")
    return folder


class Budget:
    """Warns once, and early, that the evaluation will take longer than EVAL_BUDGET_SECONDS."""

    def __init__(self, config: Config, began: float, log: tg.RunLog, plan_length: int):
        self.config, self.log, self.chunks = config, log, plan_length
        self.began, self.first = began, time.time()
        self.said = not config.eval_budget_seconds

    def __call__(self, number: int) -> None:
        now, budget = time.time(), self.config.eval_budget_seconds
        if number == 1:  # the first chunk also takes the time of the prior and of loading kernels
            self.first = now
        share = (number - 1) / max(self.chunks - 1, 1)
        if not self.said and share > 0.02 and now - self.first > 2:
            needed = self.first - self.began + (now - self.first) / share
            if needed > budget:
                told = f"the evaluation takes {needed:.0f} s, EVAL_BUDGET_SECONDS={budget:.0f}"
                self.log.line(f"WARNING: at this pace {told}")
                self.said = True


def check_losses_finite(name: str, score: tg.Score) -> None:
    """Raise FloatingPointError where a loss is not finite."""
    if (wrong := np.flatnonzero(~np.isfinite(score.nll))).size:
        raise FloatingPointError(
            f"{name} score: {len(wrong)} of {len(score.nll)} losses are not finite, the first at target "
            f"{wrong[0]}. Look for NaN in the artifact, or lower TTT_LR."
        )


def run_scores(inputs: Inputs, log: tg.RunLog, began: float) -> dict[str, Any]:
    """Compute the adapted score, then those to compare it with; write nll.npy and reports beside the log.

    `eval_seconds`, as in the trainer's result: from loading the artifact, here the start of the process, to
    the headline score, here the adapted one, with compilation and warm-up. Raises FloatingPointError where a
    loss is not finite, ArithmeticError where the score is not that of the losses.
    """
    setup, tokens, path = inputs[:3]
    c, num_bytes = setup.config, setup.byte_table.of_text(tokens)
    compiled = setup.nll_fn is not tg.token_nll
    if compiled:
        warm_up(setup)
    plan = setup.plan(tokens)
    label = "legal_ttt" if c.ttt_protocol == "legal" else "invalid_ttt"
    adapted = evaluate(setup, tokens, progress=Budget(c, began, log, sum(chunk.is_mine for chunk in plan)))
    seconds = time.time() - began
    check_losses_finite("adapted", adapted)
    kept = log.folder / "nll.npy"  # before the scores to compare with: an audit waits for it
    if tg.rank() == 0:
        array = io.BytesIO()
        np.save(array, adapted.nll)
        tg.write_atomically(kept, array.getvalue())
    if (report := tg.project_module("report")) is None:
        log.line("note: no reports, only the score and nll.npy: records/report.py is not beside eval_ttt.py")
    for line in report.running_bpb(plan, adapted.nll, num_bytes) if report else ():
        log.line(line)
    if compiled:
        warm_up_windows(setup)
    scores = {"ttt": adapted, **window_scores(setup, tokens)}
    if mode_of(c).by_documents:  # the same windows, by the trainer's weights: those graphs are compiled
        scores["plan"] = evaluate(setup, tokens, adapts=False)
    else:
        scores["plan"] = mixed_with_ppm(scores["sliding"], tokens, c)
    weights = weights_of(path)
    dialect = {"roundtrip": f"final_{weights}_roundtrip", "sliding": f"final_{weights}_sliding_window"}
    dialect |= {"plan": "same_plan_without_ttt", "ttt": label}
    for name, words in dialect.items():
        check_losses_finite(name, scores[name])
        log.line(f"{words}_exact val_loss:{scores[name].val_loss:.8f} val_bpb:{scores[name].val_bpb:.8f} "
                 f"time:{scores[name].seconds:.1f}s")  # fmt: skip
    if report:
        report.write_reports(log.folder, tokens, scores, setup.byte_table, log)
    text = inputs.shards, c.tokenizer_path
    tg.on_rank_0(lambda: tg.check_score(adapted.val_loss, adapted.val_bpb, np.load(kept), *text))
    sha256_nll = tg.on_rank_0(lambda: tg.sha256_file(kept))
    result = {
        f"val_{unit}_{name}": getattr(s, f"val_{unit}")
        for name, s in scores.items()
        for unit in ("loss", "bpb")
    }
    fits_budget = not c.eval_budget_seconds or seconds <= c.eval_budget_seconds
    return result | dict(
        ttt_gain_bpb=scores["plan"].val_bpb - adapted.val_bpb,
        sha256_nll=sha256_nll,
        weights=weights,
        eval_seconds=seconds,
        fits_budget=fits_budget,
    )


class SampleArguments(NamedTuple):
    """What --sample is asked for."""

    prompt: str
    document: int | None
    count: int
    length: int
    temperature: float
    seed: int


def sample_arguments(argv: Sequence[str]) -> SampleArguments:
    parser = argparse.ArgumentParser(
        "eval_ttt.py --sample", description="Continue a prompt with the artifact."
    )
    parser.add_argument("--prompt", default="", help="text to continue; empty: a new document")
    parser.add_argument("--document", type=int, help="continue the first half of this validation document")
    parser.add_argument("--count", type=int, default=1, help="continuations")
    parser.add_argument("--length", type=int, default=128, help="tokens per continuation")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the softmax")
    parser.add_argument("--seed", type=int, default=0)
    found = SampleArguments(**vars(parser.parse_args(argv)))
    tg.check_form(found._asdict(), {"seed": int, "temperature": float}, "--sample")
    with tg.decoding("--prompt", "UTF-8 text"):
        found.prompt.encode()
    if not (0 < found.count < 1 << 16 and 0 < found.length < 1 << 16 and found.temperature > 0):
        raise UserError("--count and --length are from 1 to 65535, --temperature is above 0")
    return found


def adapted_to(setup: Setup, ids: Sequence[int]) -> tuple[tg.GPT, tg.Adapters]:
    """A model that has adapted to a prompt as to a document that it has scored, and its adapters, if any.

    A chunk is at most a quarter of the prompt. One token of padding follows the prompt, so every whole chunk
    is adapted on. Nothing adapts on the rest, which is in the document's last chunk.
    """
    size = max(1, min(setup.config.doc_chunk, (len(ids) - 1) // 4))
    c = replace(setup.config, ttt_groups=1, ttt_slots=1, ttt_chunk_size=size)
    setup = replace(setup, config=c, nll_fn=tg.token_nll)
    tokens = np.array([*ids, ids[-1]], np.uint16)
    model, plan = setup.load(), document_plan(tokens, c)
    adaptation = Adaptation(model, setup, plan, lambda chunk: None)
    tg.score(model, tokens, plan, setup.byte_table, 1, setup.nll_fn, adaptation)
    adaptation.in_use.rows = slice(None)
    replaced, adapters = adaptation.replacements()
    with torch.no_grad():
        for name in replaced:
            model.get_parameter(name).copy_(adaptation.trainer.weights()[name][0])
    return model, adapters


def sample(setup: Setup, tokens: np.ndarray, given: SampleArguments) -> Iterator[str]:
    """The prompt and its continuations, without and with adapting to it, with the same random numbers."""
    c = setup.config
    sp = SentencePieceProcessor(model_proto=Path(c.tokenizer_path).read_bytes())
    ids = [BOS_ID, *sp.encode(given.prompt)]
    if given.document is not None:
        begin, end = documents(tokens)
        if not 0 <= given.document < len(begin):
            raise UserError(
                f"--document={given.document}: the validation text has documents 0 to {len(begin) - 1}"
            )
        low, high = int(begin[given.document]), int(end[given.document])
        ids = tokens[low : low + max(1, (high - low) // 2)].tolist()
    models = {"plain": (setup.load(), {})}
    if mode_of(c).by_documents and len(ids) > 1:
        models["adapted"] = adapted_to(setup, ids)
    yield f"prompt: {len(ids)} tokens: {sp.decode(ids)}"
    seen = ids[-max(1, c.eval_seq_len - given.length) :]  # no longer than the windows it is scored with
    for name, (model, adapters) in models.items():
        length = len(seen) + given.length
        found = tg.generate(model, given.count, length, given.temperature, given.seed, seen, adapters)
        for number, row in enumerate(found[:, len(seen) :].tolist()):
            row = row[: row.index(BOS_ID)] if BOS_ID in row else row
            yield f"sample:{number + 1} {name}: {sp.decode(row)}"


def run_all(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Prepare, lock the folder of the model, then audit or score; returns the exit code."""
    began, opened = tg.process_start(), []
    is_audit = bool(argv) and argv[0].startswith("--audit")
    if is_audit and (audit := tg.project_module("audit")) is None:
        raise UserError(
            "--audit needs records/audit.py beside eval_ttt.py: run it in the repository, not in a record"
        )
    if is_audit:
        sys.addaudithook(lambda event, what: opened.append(str(what[0])) if event == "open" else None)
    settings, plugin = load_settings(environ)
    config, given, notices = settings
    inputs = prepare(config, given, environ, plugin)
    if argv and tg.world_size() > 1:
        raise UserError(f"{argv[0]} runs in one process")
    if argv and argv[0] == "--sample":
        for line in sample(inputs.setup, inputs.tokens, sample_arguments(argv[1:])):
            print(tg.shown(line), flush=True)
        return 0
    holds = tg.rank() == 0  # when the process group is gone, every rank is rank 0
    lock = tg.on_rank_0(lambda: tg.lock_folder(inputs.path.parent, 0.0))
    try:
        if argv:
            option, _, seed = argv[0].partition("=")
            how = (inputs.shards, opened, int(seed) if seed else None, option == "--audit-whole")
            return audit.run_audit(inputs.setup, inputs.tokens, inputs.path, *how)
        return run_evaluation(inputs, given, [*notices, *inputs.notices], began)
    finally:
        if holds:
            os.close(lock)


def setup_lines(setup: Setup, targets: int) -> Iterator[str]:
    """The head of the log after the settings: what is scored in which order."""
    c = setup.config
    in_slots = f"documents of the file in {c.ttt_groups} groups of {c.ttt_slots} slots"
    order = in_slots if mode_of(c).by_documents else "the file's"
    yield f"evaluation order: {order}; targets:{targets} world_size:{tg.world_size()}"
    if setup.artifact.factors:
        yield f"Meta-SGD's factors of TTT_LR, range per bank:{tg.rates_text(setup.artifact.factors)}"
    if c.ttt_protocol != "legal":
        yield f"WARNING: TTT_PROTOCOL={c.ttt_protocol} adapts on what it scores later: THIS SCORE IS INVALID"


def run_evaluation(inputs: Inputs, given: Mapping[str, Any], notices: Sequence[str], began: float) -> int:
    """Score, log, write eval_ttt.json, a legal one of an artifact also beside it; returns the exit code."""
    setup, path, shards = inputs.setup, inputs.path, inputs.shards
    legal, folder = setup.config.ttt_protocol == "legal", evaluation_folder(path, setup.config)
    c, (trained, why) = setup.config, tg.on_rank_0(lambda: read_report(path.with_name("result.json")))
    other_text, _, detail = tg.on_rank_0(lambda: trained_on_other_text(c, shards, path.parent))
    if other_text is False:
        raise UserError(detail)
    log, results = tg.RunLog(folder, "eval_ttt.log"), [folder / "eval_ttt.json"]
    if legal and weights_of(path) == "int6":
        results.append(path.with_name("eval_ttt.json"))
    if tg.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [*results, *(folder / name for name in REPORTS)]:
            stale.unlink(missing_ok=True)
    notices = [f"note: {notice}" for notice in notices]
    if path.with_name("result.json").exists() and trained is None:
        notices.append(f"WARNING: {why}. It counts as absent.")
    run, _ = tg.on_rank_0(lambda: read_report(path.with_name("config.json"), config={}))
    there, here = run["config"] if run else {}, tg.settings_of(c, "scoring", "evaluator")
    if other := [n for n, value in here.items() if n != "model_path" and there.get(n, value) != value]:
        pairs = ", ".join(f"{name.upper()}={here[name]} ({there[name]} there)" for name in other)
        notices.append(f"note: not as in the run's config.json: {pairs}")
    for line in notices:
        log.line(line)
    log.settings(tg.settings_of(c, "model", "scoring", "evaluator"), given)
    for line in setup_lines(setup, len(inputs.tokens) - 1):
        log.line(line)
    if setup.plugin and tg.rank() == 0:
        (path.parent / "source").mkdir(exist_ok=True)
        tg.write_atomically(path.parent / "source" / setup.plugin.name, setup.plugin.source)
    result = run_scores(inputs, log, began)
    if not result["fits_budget"]:
        log.line(
            f"WARNING: {result['eval_seconds']:.0f}s is over EVAL_BUDGET_SECONDS={c.eval_budget_seconds:.0f}"
        )
    plugged = len(setup.plugin.source) if setup.plugin else 0
    result |= dict(
        **tg.submission_sizes(c, path.stat().st_size, plugged),
        strict_seconds=time.time() - began,
        legal=legal,
        seed=c.seed,
        world_size=tg.world_size(),
        settings=tg.settings_of(c, "scoring", "evaluator"),
        sha256_artifact=tg.sha256_file(path),
        sha256_tokenizer=setup.artifact.tokenizer_sha256,
        sha256_code=setup.code_hashes(),
        sha256_shards={Path(shard).name: tg.sha256_file(shard) for shard in shards},
        trainer=trained,
        versions=setup.versions,
    )
    audit = tg.project_module("audit")
    result["audit"] = tg.on_rank_0(lambda: audit.legal_certificate(folder, result)) if audit else None
    log.line("RESULT " + json.dumps(result))
    for file in results if tg.rank() == 0 else ():
        tg.write_atomically(file, json.dumps(result, indent=1).encode())
    tg.cleanup_distributed()
    return 0


@tg.exits
def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command line, sys.argv and os.environ by default; of an audit, 1 means not legal."""
    argv, environ = tg.with_arguments(argv, environ)
    if argv == ["--help"]:
        print(tg.described("help_text", __doc__ or ""))
        return 0
    is_audit = len(argv) == 1 and re.fullmatch(r"--audit(-whole)?(=\d{1,18})?", argv[0])
    if argv and argv[0] == "--sample":
        sample_arguments(argv[1:])
    elif argv and not is_audit:
        raise UserError(f"unknown arguments {' '.join(argv)}: settings are NAME=VALUE, see --help")
    return run_all(argv, environ)


if __name__ == "__main__":
    sys.modules["eval_ttt"] = sys.modules["__main__"]  # one module, whoever in records/ imports it
    sys.exit(main())
