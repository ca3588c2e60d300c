"""Audit: check that an evaluation is legal.

`eval_ttt.py --audit[=SEED]` or `--audit-whole[=SEED]` runs it and writes certificate.json and .txt.

The evaluation of an artifact is traced on the beginning of the text and on altered texts, and the losses are
compared; the plain command is repeated in a process of its own. Checks T1 to T24 look at what was computed,
not at the plan; records/legality.md says what each mode knows in advance, and what no program can see.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from runfiles import object_of, read_nll
from sentencepiece import SentencePieceProcessor
from torch import Tensor

import eval_ttt as ev
import train_gpt as tg
from eval_ttt import Adaptation, Setup, mode_of
from train_gpt import BOS_ID, TTT_MODES, Chunk, Config, Windows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from formats import shard_header

# ------------------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """An evaluation as computed, not as planned; arrays have one entry per target.

    turn: how often something had been learned when it was scored; read_from: the first token that its window
    read; count: how often it was scored; from_row: -log of its entry in the whole, normalized distribution.
    rows: the distributions themselves, (V,) logs, of the targets asked for. events: ("score" or "learn",
    windows) in order. spread: the largest difference of a loss, in nats, between two evaluations of the same
    text; 0: none is admitted. base_turns: the turns that follow a step of the base. ahead: the largest
    difference of a log probability where what stands after it in its window is replaced, and of how many.
    inner: targets at random, one in each document that enters a slot after another one.
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
    ahead: tuple[float, int] = (0.0, 0)
    inner: Sequence[int] = ()

    def differ(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Where two arrays of nats differ by more than chance:
        at all, or by four times what a repetition does."""
        return (one != other) & ~(np.abs(one - other) <= 4 * self.spread)


Tracer = Callable[[np.ndarray, Sequence[int], float], Trace]  # tokens, probes, last turn of interest


class Enough(Exception):
    """Ends an evaluation of which the audit has seen what it wants."""


def log_distributions(model: tg.GPT, adaptation: Adaptation | None, batch: tg.Batch) -> Tensor:
    """Logs of the distributions of a batch's targets, (B, C, V)."""
    replaced, adapters = adaptation.replacements() if adaptation else ({}, {})
    extra = dict(adapters=adapters, positions=batch.positions)
    return torch.func.functional_call(model, replaced, (batch.ids,), extra).log_softmax(-1)


def read_ahead(
    model: tg.GPT, adaptation: Adaptation | None, batch: tg.Batch, log_p: Tensor, rng: np.random.Generator
) -> tuple[float, int]:
    """Largest change of the log_p (B, C, V) of the first targets of each window, where all that stands after
    a random one of them is another text; and how many distributions were compared. BOS stays."""
    positions, vocab_size = batch.positions.cpu().numpy(), log_p.size(-1)
    last = positions[np.arange(len(positions)), rng.integers(0, positions.shape[1], len(positions))]
    other = torch.from_numpy(rng.integers(BOS_ID + 1, vocab_size, tuple(batch.ids.shape))).to(batch.ids)
    after = torch.from_numpy(np.arange(batch.ids.size(1)) > last[:, None]).to(batch.ids.device)
    ids = torch.where(after & (batch.ids != BOS_ID), other, batch.ids)
    same = torch.from_numpy(positions <= last[:, None]).to(ids.device)
    apart = (log_distributions(model, adaptation, batch._replace(ids=ids)) - log_p).abs().amax(-1)
    return float(apart[same].max()), int(same.sum())


def ppm_row(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Nats of every token after `tokens` under that PPM, (V,), from counts of its own."""
    probability, escape = np.zeros(vocab_size), 1.0
    for successors in (tokens[1:][tokens[:-1] == tokens[-1]], tokens[1:]):
        count = np.bincount(successors, minlength=vocab_size)
        distinct = np.count_nonzero(count)
        probability += escape * count / max(count.sum() + distinct, 1)
        escape *= distinct / (count.sum() + distinct) if distinct else 1.0
    return -np.log(probability + escape / vocab_size)


def trace_evaluation(
    setup: Setup, tokens: np.ndarray, probes: Sequence[int] = (), until: float = math.inf
) -> Trace:
    """Evaluate `tokens` and watch.

    probes: targets whose whole distributions are wanted; they are computed again, with the weights of the
    moment, for every batch. until: the last turn of interest, later ones may miss. With both, only batches
    that hold probes are computed again, and the evaluation ends with the last of them.
    """
    targets, rows, rng = len(tokens) - 1, {}, np.random.default_rng([*probes])
    events, base_turns, ahead = [], [], []
    turn, read_from, count = (np.zeros(targets, np.int64) for _ in range(3))
    nll, from_row, turns = np.full(targets, np.nan, np.float32), np.full(targets, np.nan), 0

    def watch(chunk: Chunk) -> None:
        nonlocal turns
        turns += 1
        if turns > until and not probes:
            raise Enough
        events.append(("learn", chunk.adapted))
        if chunk.base:
            base_turns.append(turns)

    def observe(model: tg.GPT, adaptation: Any, windows: Windows, batch: tg.Batch, losses: Tensor) -> None:
        held = {*probes} & {t for begin, end in windows.ranges() for t in range(begin, end)}
        log_p = (
            log_distributions(model, adaptation, batch) if held or (probes and until == math.inf) else None
        )
        for w, (start, begin, end) in enumerate(zip(*(part.tolist() for part in windows), strict=True)):
            at = slice(start + begin, start + end)
            turn[at], read_from[at], nll[at] = turns, start, losses[w, : end - begin].float().cpu().numpy()
            count[at] += 1
            if log_p is not None:
                own = log_p[w].gather(-1, batch.targets[w].unsqueeze(-1)).squeeze(-1)
                from_row[at] = -own[: end - begin].cpu().numpy()
                for t in held & {*range(start + begin, start + end)}:
                    rows[t] = log_p[w, t - start - begin].cpu().numpy()
        if log_p is not None and until == math.inf:
            ahead.append(read_ahead(model, adaptation, batch, log_p, rng))
        events.append(("score", windows))
        if held and until < math.inf and len(rows) == len({*probes}):
            raise Enough

    alpha = setup.config.ppm_alpha
    try:
        nll = ev.evaluate(setup, tokens, observe, watch).nll
    except Enough:  # what was observed is the model's
        if alpha < 1:
            nll = ev.mixed_nll(nll, ev.ppm_nll(tokens, setup.config.vocab_size), alpha).astype(np.float32)
    if alpha < 1:
        from_row = ev.mixed_nll(from_row, ev.ppm_nll(tokens, setup.config.vocab_size), alpha)
        rows = {t: -ev.mixed_nll(-row, ppm_row(tokens[: t + 1], setup.config.vocab_size), alpha)
                for t, row in rows.items()}  # fmt: skip
    worst = max((apart for apart, _ in ahead), default=0.0), sum(compared for _, compared in ahead)
    return Trace(nll, turn, read_from, count, from_row, rows, events, base_turns=base_turns, ahead=worst)


MAX_SPREAD = 0.05  # nats; where a repetition changes a loss by more, T1 can tell nothing and fails


class Check(NamedTuple):
    """One line of the certificate; `ok` None: it says nothing about this evaluation."""

    name: str
    ok: bool | None
    checked: int
    detail: str


def cuts(base: Trace, rng: np.random.Generator, places: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Turns, and which targets to change: all that are scored later, and in the turn those beyond some place.

    The turns are the first, the middle one, one at random after that, and those that follow a step of the
    base. The place is the third smallest in a window, so that almost all of the turn changes; or the middle
    of the turn's targets in the order of the text, so that the windows before it do not; or the turn's end.
    Then the turns of the targets `places`, which are changed with all beyond them.
    """
    index, turns = np.arange(len(base.turn)), np.unique(base.turn)
    half = len(turns) // 2
    main = {turns[0], turns[half], rng.choice(turns[min(half + 1, len(turns) - 1) :])}
    for turn in sorted(main | {*turns[np.isin(turns, base.base_turns)]}):
        here, offset = base.turn == turn, index - base.read_from
        early, middle = offset > np.sort(offset[here])[:3][-1], index > np.flatnonzero(here)[here.sum() // 2]
        for beyond in (early, middle, ~here) if turn in main else (early, ~here):
            later = (base.turn > turn) | here & beyond
            if later.any():
                yield turn, later
    for place in places:
        yield (
            base.turn[place],
            (base.turn > base.turn[place]) | (base.turn == base.turn[place]) & (index >= place),
        )


def change(
    tokens: np.ndarray, targets: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens with all `targets` (a mask) changed, and where. BOS stays, since windows follow from it."""
    changed, places = tokens.copy(), 1 + np.flatnonzero(targets & (tokens[1:] != BOS_ID))
    span = int(tokens.max()) - BOS_ID
    changed[places] = BOS_ID + 1 + (tokens[places] - BOS_ID - 1 + rng.integers(1, span, len(places))) % span
    return changed, places


def check_future(
    trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator, places: Sequence[int] = ()
) -> Check:
    """T1: what is scored before all that is changed, or beside it, has the same loss, bit for bit.

    In the turn of the change: where the window reads nothing changed; in earlier turns: whatever it reads.
    """
    compared, wrong, targets = 0, 0, np.arange(len(base.turn))
    for turn, later in cuts(base, rng, places):
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
            f" by more than 4 x {base.spread:.1e}, what a repetition on this device changes (at most "
            f"{MAX_SPREAD})"
        )
    return Check(
        "T1 later tokens change no earlier loss", wrong == 0 and base.spread <= MAX_SPREAD, compared, detail
    )


def other_endings(
    c: Config, base: Trace, tokens: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Texts that go on otherwise after places at random, and which of their losses must not change.

    After a place in each document that enters a used slot, or in the middle third of the text, all is another
    text, where documents end included; under TTT_CHUNK_BY_LENGTH they keep their ends. If documents share
    nothing, that is so after one of these places; another text has a place in every document, ends kept.
    """
    index, middle = np.arange(len(base.turn)), int(len(base.turn) * rng.uniform(1 / 3, 2 / 3))
    places = list(base.inner) or [max(1, middle)]
    if not kept_between(c):
        begin, end = ev.documents(tokens)
        later = index >= np.repeat(rng.integers(begin, end), end - begin)
        yield change(tokens, later, rng)[0], ~later
        places = [rng.choice(places)]
    for place in [max(1, middle)] if shares_moments(c) else places:
        other = tokens.copy()
        other[place + 1 :] = rng.integers(BOS_ID + 1, int(tokens.max()) + 1, len(tokens) - place - 1)
        ends = rng.random(len(tokens) - place - 1) < 1 / max(c.doc_chunk, 8)
        if knows_lengths(c):
            ends = tokens[place + 1 :] == BOS_ID
        other[place + 1 :][ends] = BOS_ID
        yield other, index < place


def check_file_order(
    setup: Setup, trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator
) -> Check:
    """T1c: another text after a random place, where documents end included, changes no loss before it.

    A decoder that reads the file from left to right could follow. TTT_MOMENTS=shared does not have this
    property by documents, and the certificate says so.
    """
    c, wrong, compared, texts = setup.config, 0, 0, 0
    shared, kept = shares_moments(c), ", with the ends of documents kept" * knows_lengths(c)
    for other, same in other_endings(c, base, tokens, rng):
        again = trace(other, (), float(base.turn[same].max(initial=0))).nll
        wrong += int(base.differ(again[same], base.nll[same]).sum())
        compared, texts = compared + int(same.sum()), texts + 1
    detail = f"{wrong} of {compared} losses changed in {texts} texts{kept}"
    return Check("T1c no loss depends on later text", None if shared else wrong == 0, compared,
                 detail + ", TTT_MOMENTS=shared" * shared)  # fmt: skip


def check_borders(setup: Setup) -> Check:
    """T1b: the first embedding after a document begins does not depend on what stands before the document."""
    c, rng, read = setup.config, np.random.default_rng(setup.config.seed), setup.config.num_memory_tokens + 2
    ids = np.tile(rng.integers(BOS_ID + 1, c.vocab_size, read + 8), (64, 1))
    ids[:, :read], ids[:, read] = rng.integers(BOS_ID + 1, c.vocab_size, (64, read)), BOS_ID
    with torch.no_grad():
        x = setup.load().embed(torch.from_numpy(ids).to(setup.device))[:, read:]
    apart = float((x - x[:1]).abs().max())
    return Check("T1b no embedding crosses a document border",
                 apart == 0 if c.doc_borders != "published" else None, x[..., 0].numel(),
                 f"largest difference {apart:.1e}, DOC_BORDERS={c.doc_borders}")  # fmt: skip


def probes_of(base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Targets to probe: four of each of the first two turns, those of base.inner or one of each later half,
    two BOS; at least 8."""
    turns, is_bos = np.unique(base.turn), tokens[1:] == BOS_ID
    groups = [(base.turn == turn) & ~is_bos for turn in turns[:2]]
    halves = [] if base.inner else np.array_split(turns[2:], 2)
    wanted = [(group, 4) for group in groups] + [(np.isin(base.turn, half) & ~is_bos, 1) for half in halves]
    probes = [
        t
        for group, count in (*wanted, (is_bos, 2))
        for t in rng.permutation(np.flatnonzero(group))[:count].tolist()
    ]
    probes += [t for t in base.inner if t not in probes]
    more = [t for t in rng.permutation(np.flatnonzero(~is_bos)).tolist() if t not in probes]
    return probes + more[: max(0, LEAST["T2"] - len(probes))]  # where all is scored in one turn


def rounds_of(probes: Sequence[int], tokens: np.ndarray, alone: bool) -> list[list[int]]:
    """Probes that are changed together, at most one of a document; alone: one at a time. BOS always are."""
    number = np.searchsorted(ev.documents(tokens)[0], probes, side="right").tolist()
    rounds: list[dict[int, int]] = []
    for t, document in zip(probes, number, strict=True):
        free = (each for each in rounds if document not in each and -1 not in each)
        if alone or tokens[t + 1] == BOS_ID:
            rounds.append({-1: t})
        elif (found := next(free, None)) is None:
            rounds.append({document: t})
        else:
            found[document] = t
    return [[*each.values()] for each in rounds]


def check_target(
    trace: Tracer,
    base: Trace,
    tokens: np.ndarray,
    rng: np.random.Generator,
    ends: bool = True,
    alone: bool = True,
) -> Check:
    """T2: the distribution of a target is the same whatever the target is:
    another token, or the document's end.

    ends: whether BOS are changed, and the last other probe into a BOS. With TTT_MOMENTS=shared the steps of
    all slots depend on where documents end, and nothing is promised. alone: one probe at a time; otherwise
    one of each document, if documents share nothing.
    """
    probes = [t for t in probes_of(base, tokens, rng) if ends or tokens[t + 1] != BOS_ID]
    until, wrong, inner = base.turn[probes].max(initial=0), 0, [t for t in probes if tokens[t + 1] != BOS_ID]
    rows = trace(tokens, probes, until).rows if probes else {}
    tries = [(each, False) for each in rounds_of(probes, tokens, alone)]
    tries += [([t], True) for t in inner[-1:] if ends]
    for each, into_bos in tries:
        other, places = change(tokens, np.isin(np.arange(len(base.turn)), each), rng)
        if into_bos or not len(places):
            other[each[0] + 1] = BOS_ID if into_bos else rng.integers(BOS_ID + 1, int(tokens.max()) + 1)
        found = trace(other, each, until).rows
        wrong += sum(int(base.differ(found[t], rows[t]).any()) for t in each)
    tried = sum(len(each) for each, _ in tries)
    return Check("T2 no distribution sees its target", wrong == 0, tried,
                 f"{wrong} of {tried} changed; {len(probes) - len(inner)} of a BOS, "
                 f"{tried - len(probes)} by a BOS")  # fmt: skip


def check_ahead(trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> Check:
    """T2b: within a window no distribution depends on what stands after it, its target included."""
    largest, compared = base.ahead
    return Check("T2b no window is read ahead", largest <= 4 * base.spread, compared,
                 f"{compared} distributions with another text after them, largest difference {largest:.1e}"
                 )  # fmt: skip


def check_normalized(trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> Check:
    """T3: each loss is -log of its target's probability, and the rows in base.rows sum to one."""
    error = np.abs(base.nll - base.from_row)
    own = [abs(base.nll[t] + row[tokens[t + 1]]) for t, row in base.rows.items()]
    total = [abs(float(np.logaddexp.reduce(row))) for row in base.rows.values()]
    fine = (error < 1e-4).all() and all(x < 1e-4 for x in (*own, *total))
    return Check("T3 losses are of normalized distributions", bool(fine), len(error),
                 f"largest difference {np.max([*error, *own]):.1e}; log of the sum of {len(total)} "
                 f"distributions {max(total, default=0.0):.1e}")  # fmt: skip


def check_once(trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> Check:
    """T4: every target is scored exactly once."""
    wrong = int((base.count != 1).sum())
    return Check("T4 every target is scored once", wrong == 0, len(base.count), f"{wrong} twice or never")


def check_ledger(trace: Tracer, base: Trace, tokens: np.ndarray, rng: np.random.Generator) -> Check:
    """T5: nothing is adapted on before it is scored, and nothing is scored after that."""
    scored, learned = set(), set()
    wrong, times = 0, 0
    for kind, windows in base.events:
        ranges = windows.ranges(whole=kind == "learn")  # what is read beside it is learned from too
        targets = {t for begin, end in ranges for t in range(begin, end)}
        if kind == "learn":
            wrong, learned, times = wrong + len(targets - scored), learned | targets, times + 1
        else:
            wrong, scored = wrong + len(targets & learned), scored | targets
    return Check("T5 scored before it is adapted on", wrong == 0 if times else None, len(base.events),
                 f"{wrong} targets out of order, {times} times adapted")  # fmt: skip


def check_bytes(tokens: np.ndarray, byte_table: tg.ByteTable, tokenizer: Any) -> Check:
    """T9: the counted bytes are those of the decoded text, over whole documents."""
    begin, end = ev.documents(tokens)
    num_bytes, text = byte_table.of_text(tokens), 0
    for a, b in zip(begin[:-1].tolist(), end[:-1].tolist(), strict=True):
        decoded = tokenizer.decode(tokens[a + 1 : b].tolist())
        if byte_table.sidecars:  # CaseOps: operators stand for no byte, unless escaped
            decoded = re.sub("\ue004(.)|[\ue001-\ue003]", r"\1", decoded, flags=re.S)
        text += len(decoded.encode())
    counted = sum(int(num_bytes[a:b].sum()) for a, b in zip(begin[:-1], end[:-1], strict=True))
    # a tokenizer that normalizes loses bytes which a sidecar counts
    exact = counted == text or not (byte_table.sidecars and byte_table.is_boundary.any())
    verdict = counted == text if text and exact else None
    return Check("T9 counted bytes are the text's", verdict, len(begin) - 1,
                 f"{counted} counted, {text} decoded")  # fmt: skip


def check_memory(aligned: Trace, adapted: Trace, plain_aligned: np.ndarray, plain: np.ndarray) -> Check:
    """T10: windows that slide gain over windows side by side; after learning the text by heart they lose.

    The gap may shrink in a legal way, since learning does some of what context does:
    that alone is no verdict.
    """

    def mean(x: np.ndarray) -> tuple[float, float]:
        return float(x.mean()), 3 * float(x.std()) / math.sqrt(len(x))

    gap, noise = mean(plain_aligned - plain)
    left, error = mean(aligned.nll - adapted.nll)
    gain = float((plain - adapted.nll).mean())
    lost, doubt = mean((plain_aligned - plain) - (aligned.nll - adapted.nll))
    memory = gain > 0 and left < -max(error, 0.02 * gain)
    shrunk = lost > max(0.1 * gap, doubt)
    detail = f"gap {gap:.4f} nats (within {noise:.4f}), {left:.4f} adapted (within {error:.4f})"
    ok = False if memory else None if shrunk or gap < noise else True
    return Check("T10 no sign of memory", ok, len(plain), detail + ", it shrank" * shrunk)


def float32_nll(setup: Setup, tokens: np.ndarray) -> np.ndarray:
    """Losses of `score_plan` in float32 with torch's attention: flash kernels take no float32."""
    kernel = tg.torch_attention() if setup.device.type == "cuda" else setup.kernel
    model = tg.GPT(setup.artifact.config, torch.float32, kernel, setup.byte_table.has_leading_space)
    model.load_state_dict(setup.artifact.state)
    model, plan = (
        model.to(setup.device).requires_grad_(False),
        [c._replace(adapted=None) for c in setup.plan(tokens)],
    )
    return tg.score(model, tokens, plan, setup.byte_table, setup.batch_seqs(), setup.nll_fn).nll


def check_no_op(setup: Setup, tokens: np.ndarray) -> Check:
    """T11: with learning rate 0 the losses equal those without steps, and the plain ones up to rounding.

    Rounding is at most 1e-3 nats in float32. In another dtype the plain forward's own distance from a
    float32 forward is the measure: losses of no steps may be twice as far from that (root mean square),
    and four times that distance from the plain ones (largest). On the first half of the text, if that
    is longer than a window.
    """
    tokens = tokens[: max(len(tokens) // 2, setup.config.eval_seq_len) + 1]
    still = replace(setup, config=replace(setup.config, ttt_lr=0.0, global_ttt_lr=0.0))
    none = replace(setup, config=replace(setup.config, ttt_epochs=0))
    zero, off = ev.evaluate(still, tokens).nll, ev.evaluate(none, tokens).nll
    plain, alpha = ev.score_plan(setup, tokens).nll, setup.config.ppm_alpha
    exact = plain if tg.compute_dtype(setup.device) == torch.float32 else float32_nll(setup, tokens)
    if alpha < 1:
        plain, exact = (
            ev.mixed_nll(x, ev.ppm_nll(tokens, setup.config.vocab_size), alpha) for x in (plain, exact)
        )
    wrong, apart = int((zero != off).sum()), float(np.abs(off - plain).max())
    limit = 1e-3 + 4 * float(np.abs(plain - exact).max())
    near, far = (float(np.sqrt(np.mean((x - exact) ** 2, dtype=np.float64))) for x in (plain, off))
    ok = wrong == 0 and apart < limit and far < 1e-3 + 2 * near
    return Check("T11 learning rate 0 changes nothing", ok, len(zero),
                 f"{wrong} losses differ from those without steps; the plain forward's within {apart:.1e}, "
                 f"limit {limit:.1e}; from float32 {far:.1e} on average, plain {near:.1e}")  # fmt: skip


def check_parity(setup: Setup, tokens: np.ndarray) -> Check:
    """T14: adapters with zero output sides give the plain logits."""
    model = setup.load()
    ids = torch.from_numpy(tokens[: setup.config.eval_seq_len].astype(np.int64)).to(setup.device).unsqueeze(0)
    fast = tg.FastWeights(model, setup.config, "adapters", 1)
    _, adapters = fast.weights(fast.values)
    with torch.no_grad():
        apart = float((model(ids) - model(ids, adapters=adapters)).abs().max())
    return Check(
        "T14 zero adapters give the plain logits", apart == 0, ids.numel(), f"largest difference {apart:.1e}"
    )


def check_warm_up(setup: Setup, trace: Tracer, base: Trace, tokens: np.ndarray) -> Check:
    """T7: warm-up, which is not given the text, changes no loss of the first quarter of the evaluation."""
    ev.warm_up(setup)
    until = float(np.quantile(base.turn, 0.25))
    compared = base.turn <= until
    wrong = int(base.differ(trace(tokens, (), until).nll[compared], base.nll[compared]).sum())
    return Check("T7 warm-up changes nothing", wrong == 0, int(compared.sum()), f"{wrong} losses changed")


def check_files(opened: Sequence[str], train_pattern: str, val_pattern: str = "", began: int = 0) -> Check:
    """T6: no training shard is opened, and no validation shard once the evaluations have begun.

    opened: the files that the process opened, in order; from index `began` on, by the evaluations.
    """
    train, val = (
        {os.path.realpath(path) for path in glob(pattern)} for pattern in (train_pattern, val_pattern)
    )
    real = [(path, os.path.realpath(path)) for path in opened]
    found = {path for path, file in real if file in train or "fineweb_train" in path + file}
    found |= {path for path, file in real[began:] if file in val}
    return Check(
        "T6 no training data is opened", not found, len({*opened}), ", ".join(sorted(found)) or "none was"
    )


def check_order(base: Trace, tokens: np.ndarray, config: Config) -> Check:
    """T15: targets are scored in file order; by documents, each group's documents begin in that order."""
    first = np.full(len(tokens) - 1, len(base.events))
    for number, (kind, windows) in reversed([*enumerate(base.events)]):
        for begin, end in windows.ranges() if kind == "score" else ():
            first[begin:end] = number
    if not mode_of(config).by_documents:
        parts = [first]
    else:
        begins = first[ev.documents(tokens)[0]]
        parts = [begins[group :: config.ttt_groups] for group in range(config.ttt_groups)]
    wrong = sum(int((np.diff(part) < 0).sum()) for part in parts)
    return Check("T15 scored in the file's order", wrong == 0, sum(map(len, parts)), f"{wrong} out of order")


def refills(plan: Sequence[Chunk]) -> list[int]:
    """First targets of the documents that enter a slot that another one has left, in a plan by documents."""
    found, group = [], None
    for chunk in plan:
        if chunk.slots is not None and chunk.slots.group == group:
            found += (chunk.scored.start + chunk.scored.begin)[chunk.slots.fresh].tolist()
        group = None if chunk.slots is None else chunk.slots.group
    return found


def inner_targets(tokens: np.ndarray, plan: Sequence[Chunk], rng: np.random.Generator) -> list[int]:
    """A random target of each document in a slot that another one has left, of MOST_REFILLS such documents
    at most; by flat chunks one of each quarter of the text."""
    if plan[0].slots is None:
        quarters = np.linspace(1, len(tokens) - 1, 5).astype(int)
        return rng.integers(quarters[:-1], np.maximum(quarters[1:], quarters[:-1] + 1)).tolist()
    begin, end = ev.documents(tokens)
    number = np.searchsorted(begin, rng.permutation(refills(plan))[:MOST_REFILLS])
    return sorted(rng.integers(begin[number], end[number]).tolist())


def has_moments(c: Config) -> bool:
    """Whether each document has second moments: of a class of one's own nothing is known."""
    by_documents, adapts = mode_of(c)
    return c.ttt_mode in TTT_MODES and by_documents and bool(adapts) and c.ttt_optimizer == "precond"


def shares_moments(c: Config) -> bool:
    """Whether slots share second moments, so that losses depend on text later in the file."""
    return has_moments(c) and c.ttt_moments == "shared"


def knows_lengths(c: Config) -> bool:
    """Whether a loss depends on where its own document ends."""
    return mode_of(c).by_documents and bool(c.ttt_chunk_by_length)


def kept_between(c: Config) -> list[str]:
    """What goes on from one document to the next."""
    by_documents, adapts = mode_of(c)
    return [words for holds, words in (
        (not by_documents and adapts, "all weights that adapt"),
        (not by_documents, "the context of windows"),
        (has_moments(c) and c.ttt_moments in ("prefix", "shared"), "second moments"),
        (c.ttt_mode == "phased", "the base, from border to border"),
        (by_documents and adapts == "adapters" and c.ttt_warm_start_a, "input sides of adapters"),
        (c.ttt_mode not in TTT_MODES, f"what {c.ttt_mode} keeps when a slot is reset"),
        (c.ppm_alpha < 1, "counts of the PPM"),
    ) if holds]  # fmt: skip


def settled(setup: Setup, tokens: np.ndarray) -> int:
    """How many targets of `tokens`, the first ones, keep their losses bit for bit when more text follows.

    By flat chunks not those of the last chunk: the last window begins where its end says.
    """
    c, (by_documents, adapts) = setup.config, mode_of(setup.config)
    cosine = adapts and c.ttt_lr_schedule == "cosine" and not by_documents
    if c.ttt_protocol != "legal" or shares_moments(c) or cosine:
        return 0
    if knows_lengths(c):  # the last document may go on
        return int(ev.documents(tokens)[0][-1])
    if by_documents:
        return len(tokens) - 1
    last = setup.plan(tokens)[-1].scored
    return int((last.start + last.begin).min())


def check_unwatched(
    setup: Setup, base: Trace, tokens: np.ndarray, whole: np.ndarray, rng: np.random.Generator
) -> Iterator[Check]:
    """T16: the losses are the same where nobody watches and, up to `settled`, where the text goes on as it
    does in `whole`, to a random length. T17: the score of that evaluation follows from its losses."""
    count, longer = settled(setup, tokens), tokens
    if count:
        longer = whole[: max(int(len(tokens) * rng.uniform(1.3, 1.6)), len(tokens))]
    count = count if len(longer) > len(tokens) else len(tokens) - 1
    result = ev.evaluate(setup, longer)
    wrong = int(base.differ(result.nll[:count], base.nll[:count]).sum())
    yield Check("T16 unwatched, the losses are the same", wrong == 0, count,
                f"{wrong} of {count} losses changed in an evaluation of "
                f"{len(longer) - 1} targets")  # fmt: skip
    nats, num_bytes = result.nll.astype(np.float64), setup.byte_table.of_text(longer).sum()
    loss, bpb = float(nats.mean()), float(nats.sum() / math.log(2) / num_bytes)
    fine = np.isclose([result.val_loss, result.val_bpb], [loss, bpb], rtol=1e-9, atol=0).all()
    yield Check(
        "T17 the score follows from the losses",
        bool(fine),
        len(nats),
        f"val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}, from the losses {loss:.8f} {bpb:.8f}",
    )


def check_weights(setup: Setup) -> Check:
    """T18: what is evaluated begins with the artifact's weights."""
    state, kept = setup.load().state_dict(), setup.artifact.state
    wrong = [
        name for name in state if name not in kept or not torch.equal(state[name].cpu(), kept[name].cpu())
    ]
    return Check(
        "T18 the weights are the artifact's", not wrong, len(state), ", ".join(wrong) or "none differs"
    )


def audit(
    setup: Setup,
    tokens: np.ndarray,
    opened: Sequence[str],
    trace: Tracer | None = None,
    whole: np.ndarray | None = None,
    seed: int = 0,
) -> list[Check]:
    """All checks on `tokens`, with which the text `whole` begins.

    trace: replaces the evaluation, so that cheats can be tried.
    seed: of the places, targets and tokens changed.
    """
    trace, began = (
        trace or (lambda text, probes, until: trace_evaluation(setup, text, probes, until)),
        len(opened),
    )
    c, whole, rng = setup.config, tokens if whole is None else whole, np.random.default_rng(seed)
    tokenizer = SentencePieceProcessor(model_proto=Path(c.tokenizer_path).read_bytes())
    base = trace(tokens, rng.permutation(len(tokens) - 1)[:8].tolist(), math.inf)
    if setup.device.type == "cuda":  # some gradients are summed by atomics, in any order
        base.spread = float(np.abs(trace(tokens, (), math.inf).nll - base.nll).max())
    base.inner = inner_targets(tokens, setup.plan(tokens), rng)
    checks = [
        check_future(trace, base, tokens, rng, base.inner if shares_moments(c) else ()),
        check_borders(setup),
        check_file_order(setup, trace, base, tokens, rng),
        check_target(
            trace, base, tokens, rng, not (shares_moments(c) or knows_lengths(c)), bool(kept_between(c))
        ),
    ]
    same = (check_ahead, check_normalized, check_once, check_ledger)
    checks += [check(trace, base, tokens, rng) for check in same]
    checks += [check_warm_up(setup, trace, base, tokens), check_bytes(tokens, setup.byte_table, tokenizer)]
    aligned = replace(setup, config=replace(c, eval_stride=c.eval_seq_len))
    plain = [ev.score_plan(each, tokens).nll for each in (aligned, setup)]
    checks.append(check_memory(trace_evaluation(aligned, tokens), base, *plain))
    checks += [check_no_op(setup, tokens), check_parity(setup, tokens), check_order(base, tokens, c)]
    checks += [*check_unwatched(setup, base, tokens, whole, rng), check_weights(setup)]
    return [*checks, check_files(opened, c.shards("train"), c.shards("val"), began)]


# ------------------------------------------------------------------------------------------------------------
# The plain command in a process of its own
# ------------------------------------------------------------------------------------------------------------

# What T1 to T18 look at runs in the audit's process, and a program could tell. Here eval_ttt.py runs as users
# start it, beside a copy of the artifact and nothing else of the run. It is given the first documents of the
# text, a random number of them, and other content after those: the losses of the former must be the run's,
# the losses of the latter must not. Python loads the listener before any program, so it sees all files.

T20, T22 = "T20 a fresh process repeats the losses", "T22 no file but those named is used"
T23, T24 = "T23 other content has other losses", "T24 a fresh process repeats the whole"
OF_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
CACHES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME")
SYSTEM = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev")
LISTENER = """
import json, os, sys

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty")
REACHES = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo")
into = os.open({into!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def listen(event, what):
    found = []
    if event == "open":
        found = [("write" if (what[2] or 0) & WRITES else "read", what[0])]
    elif event in ("os.rename", "os.link", "os.symlink"):
        found = [("read", what[0]), ("write", what[1])]
    elif event in ("os.truncate", "sqlite3.connect") or event == "os.remove" and what[1] == -1:
        found = [("write", what[0])]
    elif event in ("import", "ctypes.dlopen"):  # of compiled modules and libraries
        found = [("read", what[event == "import"])]
        found = [each for each in found if "/" in str(each[1])]
    elif event in STARTS + REACHES:
        os.write(into, (json.dumps(["start", event + " " + repr(what)[:200]]) + "\\n").encode())
    for how, path in found:
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.path.join(os.getcwd(), os.fsdecode(path))
            os.write(into, (json.dumps([how, path]) + "\\n").encode())


sys.addaudithook(listen)
"""


class StandIn(NamedTuple):
    """A text that begins with the first documents of the real one, and goes on with other content.

    kept: how many of its losses, the first ones, must be the real text's; documents: how many it begins with.
    other: targets from `end` on stand for those of the real text from `source` on, changed; 0: none follow.
    """

    tokens: np.ndarray
    kept: int
    documents: int
    end: int
    source: int
    other: int


def whole_text(tokens: np.ndarray) -> StandIn:
    """The text itself: nothing is replaced."""
    return StandIn(tokens, len(tokens) - 1, len(ev.documents(tokens)[0]), len(tokens) - 1, 0, 0)


def stand_in(setup: Setup, tokens: np.ndarray, rng: np.random.Generator) -> StandIn:
    """A stand-in whose first documents end at random, beyond what the other checks look at.

    The text itself, where every loss depends on all of it.
    """
    c, last, end = setup.config, len(tokens) - 1, ev.documents(tokens)[1]
    place = int(rng.integers(min(c.audit_tokens, last), min(MOST_PARTS * c.audit_tokens, last) + 1))
    count = max(1, int(np.searchsorted(end, place, side="right")))
    if knows_lengths(c) and len(end) > 1:  # the last document would be longer by its end
        count = min(count, len(end) - 1)
    stop, is_all = int(end[count - 1]), count == len(end)
    size = max(c.eval_seq_len, c.audit_tokens // 4, 0 if mode_of(c).by_documents else c.ttt_chunk_tokens)
    source = 0 if is_all else stop
    following = np.resize(np.append(tokens[source + 1 :], tokens), size)
    other = change(np.append(tokens[:1], following), np.ones(size, bool), rng)[0][1:]
    head = np.append(tokens, tokens.dtype.type(BOS_ID)) if is_all else tokens[: stop + 1]
    text = np.append(head, other)
    if not (kept := min(stop, settled(setup, text))):
        return whole_text(tokens)
    return StandIn(text, kept, count, len(head) - 1, source, min(size, last - source))


def plain_environment(setup: Setup, model: Path, shards: Path, listener: Path) -> dict[str, str]:
    """The environment in which the plain command scores `model` on `shards` with the settings of `setup`."""
    c = setup.config
    sections = ("scoring", "evaluator") + ("model",) * (ev.weights_of(model) == "float")
    given = {name: getattr(c, name) for name in ("seed", "device", "attention", "use_compile")}
    given |= tg.settings_of(c, *sections)
    given |= dict(model_path=model, val_files=f"{shards}/fineweb_val_*.bin", data_path=shards,
                  tokenizer_path=os.path.abspath(c.tokenizer_path))  # fmt: skip
    if c.ttt_mode not in TTT_MODES:
        given["ttt_mode"] = os.path.abspath(c.ttt_mode)
    texts = {name.upper(): str(int(value) if isinstance(value, bool) else value)
             for name, value in given.items() if value != getattr(Config, name)}  # fmt: skip
    known = {*tg.known_names(), *OF_RANKS, "RECIPE", "TRACK", *CACHES}
    kept = {name: text for name, text in os.environ.items() if name not in known}
    path = os.pathsep.join([str(listener), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = str(shards.with_name("tmp"))
    folders = dict(PYTHONPATH=path, PYTHONUSERBASE=site.getuserbase(), HOME=own, TMPDIR=own)
    # threads that spin while they wait would take the cores from the checks
    return kept | texts | folders | dict(OMP_WAIT_POLICY="passive")


def start_program(environ: Mapping[str, str], output: Any) -> subprocess.Popen:
    """Start the plain command: `python eval_ttt.py`."""
    command = [sys.executable, str(tg.code_files()[-1])]
    return subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


class FreshRun:
    """The plain command on a text, in a process of its own, with a copy of the artifact in its own folder."""

    def __init__(self, setup: Setup, path: Path, tokens: np.ndarray):
        self.targets, self.temporary = len(tokens) - 1, tempfile.TemporaryDirectory()
        self.home = Path(self.temporary.name).resolve()
        model, shards = self.home / "run" / path.name, self.home / "val"
        self.list = self.home / "x"
        for folder in (model.parent, shards, self.home / "tmp", self.list):
            folder.mkdir()
        shutil.copyfile(path, model)
        texts = {"val": tokens}
        if sidecars := setup.byte_table.sidecars:
            num_bytes = np.resize(tg.sidecar_bytes(sidecars), len(tokens))
            texts["val_bytes"] = np.where(tokens == BOS_ID, 0, num_bytes)
        for name, entries in texts.items():
            content = shard_header(len(entries)) + entries.astype("<u2").tobytes()
            (shards / f"fineweb_{name}_000000.bin").write_bytes(content)
        (self.list / "sitecustomize.py").write_text(LISTENER.format(into=str(self.list / "files")))
        self.kept = ev.evaluation_folder(model, setup.config) / "nll.npy"
        self.output = open(self.list / "output", "w+")
        self.process = start_program(plain_environment(setup, model, shards, self.list), self.output)
        self.watcher = threading.Thread(target=self.end_with_losses, daemon=True)
        self.watcher.start()

    def __enter__(self) -> FreshRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.watcher.join()
        self.output.close()
        self.temporary.cleanup()

    def end(self) -> None:
        """End the command."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def end_with_losses(self) -> None:
        """End the command once it has written its losses: the other scores are not compared."""
        while not self.kept.exists() and self.process.poll() is None:
            time.sleep(0.1)
        self.end()

    def losses(self) -> np.ndarray | str:
        """Wait for the losses; the last line of what the command printed if it has none."""
        self.watcher.join()
        if not self.kept.exists():
            self.output.seek(0)
            return (self.output.read().strip().splitlines() or [f"exit code {self.process.returncode}"])[-1]
        nll = read_nll(self.kept)
        return nll if nll.shape == (self.targets,) else f"losses of shape {nll.shape}"

    def events(self) -> list[list[str]]:
        """What it read, wrote, or started, as [how, what], each once."""
        file = self.list / "files"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [json.loads(line) for line in dict.fromkeys(lines)]


def library_folders(code: Path) -> set[Path]:
    """Folders of Python, of its packages, and of the system; what PYTHONPATH adds, but not around `code`."""
    added = [Path(part).resolve() for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    added = [part for part in added if not code.is_relative_to(part) and not part.is_relative_to(code)]
    packages = [*sysconfig.get_paths().values(), site.getusersitepackages()]
    return {Path(part).resolve() for part in (sys.prefix, sys.base_prefix, *packages, *SYSTEM, *added)}


def kind_of(path: Path, how: str, named: Mapping[Path, str], home: Path, libraries: set[Path]) -> str:
    """What a file is to an evaluation in the folder `home`; "" for one that it has no business with.

    Other folders than its own are read only, but for compiled Python files, which may be written anywhere.
    """
    if path.is_relative_to(home):
        return {"val": "shard", "x": "listener", "tmp": "temporary"}.get(
            path.relative_to(home).parts[0], "own"
        )
    compiled = path.parent.name == "__pycache__" and ".pyc" in path.name
    source = path.parent.parent / f"{path.name.split('.')[0]}.py" if compiled else path
    kind = named.get(source, "")
    shared_memory = path.is_relative_to("/dev/shm")  # which any program writes
    if not kind and not shared_memory and any(path.is_relative_to(folder) for folder in libraries):
        kind = "library"
    return kind if how == "read" or compiled or path == Path(os.devnull) else ""


def files_used(setup: Setup, run: FreshRun) -> list[dict[str, str]]:
    """What a fresh run used: its kind, how (read, write, start), and its name; libraries not by name."""
    code, found = [*tg.code_files(), *Path(__file__).resolve().parent.glob("*.py")], {}
    if setup.plugin:
        code.append(Path(setup.config.ttt_mode.rpartition(":")[0]).resolve())
    named = {Path(setup.config.tokenizer_path).resolve(): "tokenizer"} | dict.fromkeys(code, "code")
    libraries = library_folders(tg.code_files()[-1].parent)
    roots = run.home, Path(__file__).resolve().parents[1]  # names below them say nothing of the machine
    for how, what in run.events():
        if how == "start":
            found[how, what] = ""
        elif (path := Path(os.path.realpath(what))).is_file() or how == "write":
            kind = kind_of(path, how, named, run.home, libraries)
            root = next((root for root in roots if path.is_relative_to(root)), None)
            name = str(path.relative_to(root)) if root else os.path.relpath(path)
            found[how, re.sub(r"\.[0-9a-f]{16}\.tmp$", "", name)] = kind  # of tg.write_atomically
    return [dict(kind=kind, how=how, name=name)
            for (how, name), kind in found.items() if kind not in ("library", "listener")]  # fmt: skip


def check_used(files: Sequence[Mapping[str, str]]) -> Check:
    """T22: the evaluation used files that it has a business with, and libraries, and nothing else."""
    if not any(each["kind"] == "shard" for each in files):
        return Check(T22, None, 0, "Python did not load the listener")
    outside = [f"{each['how']} {each['name']}" for each in files if not each["kind"]]
    only_starts = all(words.startswith("start ") for words in outside)  # nobody lists what these open
    return Check(T22, (None if only_starts else False) if outside else True, len(files),
                 "; ".join(outside[:5]) + f" and {len(outside) - 5} more" * (len(outside) > 5)
                 or "no other file, process or connection")  # fmt: skip


def check_repeated(
    setup: Setup, text: StandIn, fresh: np.ndarray, spread: float, nll: np.ndarray, told: Mapping[str, Any]
) -> Check:
    """T20: a fresh process gives the first documents of the text alone the losses of the run, `nll`.

    With the versions of the run in one process bit for bit on a CPU, elsewhere within three times the largest
    difference of two identical runs, `spread`. Otherwise within what T11 admits as rounding, on average.
    """
    count, whole = text.kept, f"{text.documents} documents of the text"
    apart = fresh[:count].astype(np.float64) - nll[:count]
    largest = float(np.abs(apart).max())
    if told.get("world_size") == 1 and told.get("versions") == setup.versions:
        wrong = int((np.abs(apart) > 3 * spread).sum())
        limit = f"3 x {spread:.1e}, of two identical runs" if spread else "0 (on the run's processor)"
        return Check(T20, wrong == 0, count, f"{whole}: {wrong} of {count} losses differ, within "
                     f"{largest:.1e}, limit {limit}")  # fmt: skip
    still, part = replace(setup, nll_fn=tg.token_nll), text.tokens
    rounding = ev.score_plan(still, part).nll - float32_nll(still, part)
    limit = 1e-3 + 2 * float(np.sqrt(np.mean(rounding**2, dtype=np.float64)))
    root, mean = float(np.sqrt(np.mean(apart**2))), float(apart.mean())
    return Check(T20, root < limit and abs(mean) < 1e-3, count,
                 f"{whole}, of {count} losses: root mean square difference {root:.1e}, limit {limit:.1e}, "
                 f"mean {mean:+.1e}, for the run had other versions or ranks")  # fmt: skip


def check_other_content(text: StandIn, fresh: np.ndarray, nll: np.ndarray) -> Check:
    """T23: where other content stands for the text, a fresh process has other losses than the run."""
    if not text.other:
        return Check(T23, None, 0, "every loss depends on the whole text: none was replaced")
    there = fresh[text.end : text.end + text.other]
    same = int((there == nll[text.source : text.source + text.other]).sum())
    return Check(T23, same <= text.other // 20, text.other, f"{same} of {text.other} losses stay the same")


def is_repeatable(setup: Setup) -> bool:
    """Whether two runs on the same machine have the same losses, bit for bit."""
    return setup.device.type == "cpu" and setup.nll_fn is tg.token_nll


def fresh_texts(setup: Setup, tokens: np.ndarray, text: StandIn, whole: bool) -> list[StandIn]:
    """The texts of the fresh runs: the stand-in, twice where a repetition changes losses; or also `whole`."""
    return [text] * (1 if is_repeatable(setup) else 2) + [whole_text(tokens)] * whole


def start_fresh(setup: Setup, path: Path, texts: Sequence[StandIn], stack: ExitStack) -> list[FreshRun]:
    """A fresh run on each text, which `stack` will end; on a GPU one after the other, since they share it."""
    runs = []
    for text in texts:
        runs.append(stack.enter_context(FreshRun(setup, path, text.tokens)))
        if setup.device.type == "cuda":
            runs[-1].losses()
    return runs


def check_fresh(
    setup: Setup,
    runs: Sequence[FreshRun],
    texts: Sequence[StandIn],
    nll: np.ndarray,
    told: Mapping[str, Any],
) -> Iterator[Check]:
    """T20 and T22 to T24, of the runs on `fresh_texts` and the losses and the report of the run."""
    found = [run.losses() for run in runs]
    if wrong := [each for each in found if isinstance(each, str)]:
        yield Check(T20, False, 0, f"the plain command has no losses: {wrong[0]}")
        return
    again = 0 if is_repeatable(setup) else 1
    spread = float(np.abs(found[0] - found[again]).max())
    yield check_repeated(setup, texts[0], found[0], spread, nll, told)
    yield check_used(files_used(setup, runs[0]))
    yield check_other_content(texts[0], found[0], nll)
    for text, fresh in zip(texts[again + 1 :], found[again + 1 :], strict=True):
        yield check_repeated(setup, text, fresh, spread, nll, told)._replace(name=T24)


# ------------------------------------------------------------------------------------------------------------
# The certificate
# ------------------------------------------------------------------------------------------------------------

T19 = "T19 the printed score is that of nll.npy"
# A check passes where it looked at enough; without those of ESSENTIAL nothing is certified.
LEAST = dict(T1=256, T1c=64, T2=8, T3=256, T4=256, T6=0, T15=2, T16=64, T17=64)
ESSENTIAL = ("T1", "T2", "T3", "T4")
CERTIFICATE = "certificate.json"
CHANGE_NO_LOSS = {"audit_tokens", "model_path", "eval_budget_seconds"}  # settings
# documents that enter a slot after another one, and at most so many get a change of their own
MIN_REFILLS, MOST_REFILLS = 3, 8
SHORT, MANY = 2048, 6  # targets that any audit looks at, and documents that are enough
MOST_PARTS = 64  # times AUDIT_TOKENS: where the documents of T20 end at the latest, minutes of one GPU


def too_few(check: Check) -> bool:
    """Whether a check did not fail and did not look at enough either."""
    return check.ok is not False and check.checked < LEAST.get(check.name.split()[0], 1)


def audited_place(setup: Setup, tokens: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """First token of the part that is altered and watched, and its number of targets.

    These are AUDIT_TOKENS, but a 24th of a short text, so that an audit takes no longer than its
    evaluation. The part begins at a random one of the documents with which at least MANY begin in it, or as
    many as there are. With byte sidecars, which are of the whole text, it is the text's beginning.
    """
    last, wanted = len(tokens) - 1, setup.config.audit_tokens
    if setup.byte_table.sidecars:
        return 0, min(wanted, last)
    size = min(wanted, max(last // 24, SHORT), last)
    begin = ev.documents(tokens)[0]
    count = np.searchsorted(begin, begin + size) - np.arange(len(begin))
    count[begin + size > last] = 0
    return int(rng.choice(begin[count >= min(int(count.max()), MANY)])), size


def audited_config(c: Config, tokens: np.ndarray) -> Config:
    """Settings with smaller chunks and fewer slots, groups and phases, so that little text covers all.

    By flat chunks at least four chunks;
    by documents a chunk to adapt on, three refills, and steps of the base.
    """
    if not mode_of(c).by_documents:
        return replace(c, ttt_chunk_tokens=min(c.ttt_chunk_tokens, max(1, (len(tokens) - 1) // 4)))
    begin, end = ev.documents(tokens)
    count, prefix = len(begin), 0
    if c.ttt_mode == "phased":
        prefix = min(c.phased_ttt_prefix_docs, max(1, count // 4))
        c = replace(
            c, phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=min(c.phased_ttt_num_phases, 2, prefix)
        )
    groups = min(c.ttt_groups, max(1, (count - prefix) // 4))
    last = (count - prefix) // groups  # documents of a group after the last border
    slots = max(1, min(c.ttt_slots, last // 2, last - MIN_REFILLS))
    chunk = min(c.ttt_chunk_size, max(1, int((end - begin).max()) // 2))
    return replace(c, ttt_groups=groups, ttt_slots=slots, ttt_chunk_size=chunk)


def reading(c: Config) -> str:
    """What a loss may depend on beyond the text before it in the file, and what documents share, in one line.

    The names, and what each is worth: records/legality.md.
    """
    by_documents, adapts = mode_of(c)
    if c.ttt_protocol != "legal":
        return f"invalid: TTT_PROTOCOL={c.ttt_protocol} adapts on text that it scores later"
    shared, lengths = shares_moments(c), knows_lengths(c)
    cosine = not by_documents and bool(adapts) and c.ttt_lr_schedule == "cosine"
    known = [words for holds, words in (
        (shared, "squared gradients of documents that stand later in the file, in other slots "
                 "(TTT_MOMENTS=shared)"),
        (cosine, "the length of the text (TTT_LR_SCHEDULE=cosine)"),
        (lengths, "where its document ends (TTT_CHUNK_BY_LENGTH)"),
        (not by_documents, "the end of the text, in the last window, which is as long as the others"),
    ) if holds]  # fmt: skip
    ends = "knows document ends" if lengths else "" if by_documents else "knows the end"
    name = "shared statistics" if shared else "knows the length" if cosine else ends or "causal"
    beyond = "; ".join(known) or "nothing, not even where documents end"
    shared_words = ", ".join(kept_between(c)) or "nothing"
    return f"{name}: of later text a loss knows {beyond}; documents share {shared_words}"


def shortfalls(setup: Setup, tokens: np.ndarray) -> list[str]:
    """What the evaluation of `tokens` is too short to show."""
    c, plan = setup.config, setup.plan(tokens)
    by_documents, adapts = mode_of(c)
    adapted_on = any(chunk.adapted is not None and not chunk.base for chunk in plan)
    return [words for holds, words in (
        (adapts and c.ttt_protocol == "legal" and not adapted_on, "adaptation: nothing is adapted on"),
        (by_documents and len(refills(plan)) < MIN_REFILLS,
         f"slots: {len(refills(plan))} refills, {MIN_REFILLS} are needed"),
        (c.ttt_mode == "phased" and not any(chunk.base for chunk in plan), "the base: it does not adapt"),
    ) if holds]  # fmt: skip


def check_kept_score(
    path: Path, told: Mapping[str, Any], config: Config, shards: Sequence[str], targets: int
) -> Check:
    """T19: the score in eval_ttt.json is that of the losses in nll.npy (`path`), by code of its own."""
    try:
        nll = read_nll(path)
        if nll.shape != (targets,) or nll.dtype != np.float32:
            raise ValueError(f"not the float32 losses of {targets} targets")
        loss, bpb = told["val_loss_ttt"], told["val_bpb_ttt"]
        tg.check_score(loss, bpb, nll, shards, config.tokenizer_path)
        told_of_it = told.get("sha256_nll") in (None, tg.sha256_file(path))
    except Exception as error:  # another score, or whatever broken bytes lead to
        return Check(T19, False, 0, f"{path.name}: {error!r}")
    detail = f"val_loss:{loss:.8f} val_bpb:{bpb:.8f}" + ", but sha256_nll is of another file" * (
        not told_of_it
    )
    return Check(T19, told_of_it, nll.size, detail)


def check_run(
    setup: Setup, tokens: np.ndarray, shards: Sequence[str], path: Path
) -> tuple[Check, dict[str, Any] | None, str]:
    """T19 of the mode's evaluation of the artifact `path`; its report if its losses can be compared, else why
    they cannot."""
    c, folder = setup.config, ev.evaluation_folder(path, setup.config)
    (told, why), kept = ev.read_report(folder / "eval_ttt.json"), folder / "nll.npy"
    if told is None or not kept.is_file():
        why = f"{why or f'{kept}: no such file'}. Run eval_ttt.py without --audit first"
    elif told.get("sha256_artifact") != tg.sha256_file(path):
        why = f"eval_ttt.json is of another artifact than {path.name}"
    if why:
        return Check(T19, None, 0, why), None, why
    scored = check_kept_score(kept, told, c, shards, len(tokens) - 1)
    given, used = tg.settings_of(c, "scoring", "evaluator"), object_of(told, "settings")
    other = sorted(k.upper() for k in given if k not in CHANGE_NO_LOSS and used.get(k) != given[k])
    if other:
        why = f"the run has other settings: {', '.join(other)}"
    elif c.ttt_protocol != "legal":
        why = f"TTT_PROTOCOL={c.ttt_protocol}"
    elif not scored.ok:
        why = "see T19"
    return scored, None if why else told, why


def check_training_text(setup: Setup, shards: Sequence[str], folder: Path) -> Check:
    """T21: no shard that the run in `folder` was trained on is a validation shard."""
    return Check(
        "T21 not trained on the validation text", *ev.trained_on_other_text(setup.config, shards, folder)
    )


class Findings(NamedTuple):
    """All checks; what they leave out; the text of the fresh run, if there was one, and the files it used."""

    checks: list[Check]
    left_out: list[str]
    text: StandIn | None
    files: list[dict[str, str]]


# What a program on a folder cannot see. The certificate says so; records/legality.md has examples.
UNSEEN = (
    "rates and other settings that were tuned on the validation text",
    "seeds that were run and not shipped",
    "text in the weights, where config.json does not name the shards of the training",
    "logs, losses and reports that were made up together with a program that repeats them",
    "a program that recognizes this audit, by the listener of the fresh run for example",
    "files that compiled code, another process or a library opens by itself, or data inside of a library",
    "what happens after the documents of the fresh run only (another seed draws another number of them)",
)


def coverage(findings: Findings, place: tuple[int, int], tokens: np.ndarray) -> str:
    """How much of the text the checks looked at, in one line."""
    documents, (start, size) = len(ev.documents(tokens)[0]), place
    words = f"of {len(tokens) - 1} targets {size} from {start} on changed and watched; in a fresh process "
    if findings.text is None:
        return words + "none"
    return words + f"the first {findings.text.kept}, {findings.text.documents} of {documents} documents"


def certificate_text(report: Mapping[str, Any], first: str) -> str:
    lines = [
        first,
        f"  reading: {report['reading']}",
        f"  seed: {report['seed']} (--audit={report['seed']} repeats it)",
        f"  coverage: {report['coverage']}",
        f"  tolerance: {report['tolerance']}",
    ]
    if report["audited_settings"]:
        lines.append(
            "  audited with " + " ".join(f"{k.upper()}={v}" for k, v in report["audited_settings"].items())
        )
    lines += [f"  not audited: {words}" for words in report["not_audited"]]
    for check in report["checks"]:
        verdict = {True: "pass", False: "FAIL", None: "none"}[check["ok"]]
        lines.append(f"  {verdict}  {check['name']:45} {check['detail']} ({check['checked']} checked)")
    lines += [f"  {each['how']:5}  {each['kind'] or 'OUTSIDE':9}  {each['name']}" for each in report["files"]]
    lines += [f"  sha256 {name} {value}" for name, value in report["sha256"].items()]
    lines += [f"  no program sees {words}" for words in report["unseen"]]
    return tg.shown("\n".join([*lines, f"  {report['seconds']:.1f}s"])) + "\n"


def run_checks(
    setup: Setup,
    small: Config,
    tokens: np.ndarray,
    place: tuple[int, int],
    path: Path,
    shards: Sequence[str],
    opened: Sequence[str],
    seed: int,
    whole: bool,
) -> Findings:
    """All checks, those of `audit` with the settings `small` at the `place`, and what they leave out."""
    rest, (scored, told, why) = tokens[place[0] :], check_run(setup, tokens, shards, path)
    part = rest[: place[1] + 1]
    inner = replace(setup, config=small, nll_fn=tg.token_nll)  # as the checks compute it
    text, texts, files = None, [], []
    if told:
        text = stand_in(setup, tokens, np.random.default_rng([seed, len(tokens)]))
        texts = fresh_texts(setup, tokens, text, whole)
    with ExitStack() as stack:
        runs = start_fresh(setup, path, texts, stack)  # while they run, the checks here do
        if runs and setup.device.type == "cpu":  # the fresh run has all, to repeat the run bit for bit
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        if setup.device.type == "cuda":  # gradients without atomics, wherever torch has such kernels
            torch.use_deterministic_algorithms(True, warn_only=True)
            inner = replace(inner, kernel=tg.torch_attention())
        try:
            checks = audit(inner, part, opened, None, rest, seed)
        except tg.LedgerError as error:
            checks = [Check("T4 T5 the ledger", False, 0, str(error))]
        checks.append(scored)
        if runs:
            nll = read_nll(ev.evaluation_folder(path, setup.config) / "nll.npy")
            checks += check_fresh(setup, runs, texts, nll, told)
            files = files_used(setup, runs[0])
        else:
            checks.append(Check(T20, None, 0, why))
    checks.append(check_training_text(setup, shards, path.parent))  # may read training shards: after T6
    few = [check for check in checks if too_few(check)]
    checks = [check._replace(ok=None) if check in few else check for check in checks]
    left_out = [*shortfalls(inner, part), *(f"{check.name}: {check.detail}" for check in few)]
    left_out += [f"{T22}: {each.detail}" for each in checks
                 if each.name == T22 and each.ok is None and each.checked]  # fmt: skip
    if not whole and len(tokens) - 1 > (most := MOST_PARTS * setup.config.audit_tokens):
        left_out.append(f"{T24}: documents after target {most}, which --audit-whole repeats too")
    return Findings(checks, left_out, text, files)


def legal_certificate(folder: Path, result: Mapping[str, Any]) -> str | None:
    """File name of the certificate in `folder` that calls the evaluation with this `result` legal, or None.

    It must name the same artifact, tokenizer, code, shards and,
    where it knows any, losses, and the same settings.
    """
    found = ev.read_report(folder / CERTIFICATE)[0] or {}
    hashes, settings = object_of(found, "sha256"), object_of(found, "settings")
    wanted = {"artifact": result.get("sha256_artifact"), "tokenizer": result.get("sha256_tokenizer")}
    wanted |= object_of(result, "sha256_code") | object_of(result, "sha256_shards")
    wanted |= {"nll.npy": result.get("sha256_nll")} if "nll.npy" in hashes else {}
    used = {
        name: value for name, value in object_of(result, "settings").items() if name not in CHANGE_NO_LOSS
    }
    same = wanted.items() <= hashes.items() and used.items() <= settings.items()
    return CERTIFICATE if same and found.get("legal") is True else None


def name_certificate(path: Path, folder: Path) -> None:
    """Set `audit` in the eval_ttt.json of `folder`: the certificate, if that calls it legal.

    So too in the copy beside the artifact `path`, where that is of the same evaluation.
    """
    files = folder / "eval_ttt.json", path.with_name("eval_ttt.json")
    told, beside = (ev.read_report(file)[0] for file in files)
    if told and told.get("sha256_artifact") == tg.sha256_file(path):
        text = json.dumps(told | dict(audit=legal_certificate(folder, told)), indent=1).encode()
        for file in files if beside == told else files[:1]:
            tg.write_atomically(file, text)


def run_audit(
    setup: Setup,
    tokens: np.ndarray,
    path: Path,
    shards: Sequence[str],
    opened: Sequence[str],
    seed: int | None = None,
    whole: bool = False,
) -> int:
    """Run the checks, print and write the certificate; exit code 0 if legal.

    seed: of what is changed in the text; None: one that nobody knows beforehand. whole: repeat the whole text
    in a fresh process, as long as an evaluation in one process.
    """
    c, began = setup.config, time.time()
    seed = secrets.randbits(32) if seed is None else seed
    start, size = place = audited_place(setup, tokens, np.random.default_rng([seed, 1]))
    small = audited_config(c, tokens[start : start + size + 1])
    folder = ev.evaluation_folder(path, c)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CERTIFICATE, "certificate.txt"):  # what an earlier audit left says nothing of this one
        (folder / name).unlink(missing_ok=True)
    findings = run_checks(setup, small, tokens, place, path, shards, opened, seed, whole)
    checks, left_out = findings[:2]
    passed = {check.name.split()[0] for check in checks if check.ok}
    failed = c.ttt_protocol != "legal" or any(check.ok is False for check in checks)
    legal = not failed and passed.issuperset(ESSENTIAL)
    verdict = "legal as far as audited" if left_out else "legal"
    verdict = "NOT LEGAL" if failed else verdict if legal else "NOT CERTIFIED, too little was audited"
    hashes = {"artifact": tg.sha256_file(path), "tokenizer": tg.sha256_file(c.tokenizer_path)}
    if any(check.name == T19 and check.checked for check in checks):
        hashes["nll.npy"] = tg.sha256_file(folder / "nll.npy")
    hashes |= setup.code_hashes() | {Path(shard).name: tg.sha256_file(shard) for shard in shards}
    settings, shrunk = asdict(c), asdict(small)
    report = dict(
        legal=legal,
        targets=size,
        reading=reading(c),
        coverage=coverage(findings, place, tokens),
        tolerance="none, losses are compared bit for bit"
        if setup.device.type == "cpu"
        else "in each check, from the largest difference of two identical evaluations",
        not_audited=left_out,
        seed=seed,
        checks=[check._asdict() for check in checks],
        sha256=hashes,
        settings=settings,
        audited_settings={name: value for name, value in shrunk.items() if value != settings[name]},
        files=findings.files,
        unseen=UNSEEN,
        seconds=time.time() - began,
    )
    text = certificate_text(report, f"certificate of {path.name} on {size} targets, "
                            f"TTT_MODE={c.ttt_mode} TTT_PROTOCOL={c.ttt_protocol}: {verdict}")  # fmt: skip
    print(text, end="", flush=True)
    tg.write_atomically(folder / CERTIFICATE, json.dumps(report, indent=1).encode())
    tg.write_atomically(folder / "certificate.txt", text.encode())
    name_certificate(path, folder)
    return 0 if report["legal"] else 1
