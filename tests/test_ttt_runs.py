"""Evaluations with test-time training: against loops by hand,
on two ranks, a control, and as a user meets them."""

import contextlib
import csv
import io
import json
import math
import os
import pickle
import re
import shutil
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import audit
import check
import numpy as np
import pytest
import report
import torch
import torch.distributed as dist
from conftest import run_ranks
from test_cli import snapshot, write_shard
from test_model import random_model
from test_scoring import TABLE, TOKENS
from test_ttt import ALL, LEVERS, Hand, Moments, counted, in_slots, rows, spans

import eval_ttt
import train_gpt
from eval_ttt import Adaptation, Setup, evaluate, score_plan
from train_gpt import TTT_MODES, Artifact, Chunk

ROOT, CPU = Path(__file__).resolve().parent.parent, torch.device("cpu")
TINY = replace(LEVERS, num_layers=3, block_order="0,1,2,1", ve_layers="1", xsa_last_n=2, eval_seq_len=12,
               eval_stride=4, eval_batch_seqs=4, ttt_chunk_size=5, ttt_chunk_tokens=16, ttt_batch_seqs=4,
               ttt_lr=0.01, ttt_slots=3, ttt_groups=1, ttt_prior_seqs=0)  # fmt: skip
SGD = dict(ttt_optimizer="sgd", ttt_momentum=0.9)


def setup_of(**changes) -> Setup:
    config = replace(TINY, **changes)
    artifact = Artifact(config, random_model(config, torch.float32).state_dict(), "hash")
    return Setup(config, artifact, CPU, train_gpt.sdpa_attention, TABLE, train_gpt.token_nll)


@pytest.fixture
def exact(monkeypatch):
    """The forward in float64; what learns stays float32."""
    monkeypatch.setattr(train_gpt, "compute_dtype", lambda device: torch.float64)


# ------------------------------------------------------------------------------------------------------------
# By hand
# ------------------------------------------------------------------------------------------------------------


def cosine(config, number: int, count: int) -> float:
    return (1 + math.cos(math.pi * number / (count - 1))) / 2 if config.ttt_lr_schedule == "cosine" else 1.0


def flat_by_hand(setup: Setup, tokens: np.ndarray, learns: str) -> np.ndarray:
    """Score a chunk of windows, learn from its rows, go on to the next."""
    c, targets, nll = setup.config, len(tokens) - 1, np.full(len(tokens) - 1, np.nan)
    hand = Hand(setup.load(), c, learns, Moments(c))
    ends = [*range(c.eval_seq_len, targets, c.eval_stride), targets]
    firsts = [0, *ends[:-1]]
    chunks = [
        list(group)
        for _, group in groupby(zip(firsts, ends, strict=True), lambda w: w[0] // c.ttt_chunk_tokens)
    ]
    for number, chunk in enumerate(chunks):
        for first, end in chunk:
            nll[first:end] = hand.score(tokens, end - c.eval_seq_len, first, end)
        begin, end = chunk[0][0], chunk[-1][1]
        learned = [(a, min(a + c.eval_seq_len, end)) for a in range(begin, end, c.eval_seq_len)]
        for _ in range(c.ttt_epochs if number < len(chunks) - 1 else 0):
            for first in range(0, len(learned), c.ttt_batch_seqs):
                some = learned[first : first + c.ttt_batch_seqs]
                sums = [hand.losses(tokens, max(0, a - c.ttt_context), a, b).sum() for a, b in some]
                hand.step(sum(sums) / sum(b - a for a, b in some), c.ttt_lr * cosine(c, number, len(chunks)))
    return nll


def documents_by_hand(setup: Setup, tokens: np.ndarray, learns: str, prior: tuple = ()) -> np.ndarray:
    """Step by step of each group, document by document; each begins with the artifact's weights."""
    c, nll, size = setup.config, np.full(len(tokens) - 1, np.nan), setup.config.ttt_chunk_size
    for group in range(c.ttt_groups):
        moments, hands = Moments(c, prior), {}
        for step in in_slots(spans(tokens)[group :: c.ttt_groups], c.ttt_slots, size):
            goes_on = []
            for (low, high), number in sorted(step.values()):
                hand = hands.setdefault(low, Hand(setup.load(), c, learns, moments))
                a, b = low + number * size, min(low + (number + 1) * size, high)
                start = max(low, low + (number + 1) * size - c.eval_seq_len)
                if c.eval_stride == c.eval_seq_len:
                    start = low + (a - low) // c.eval_seq_len * c.eval_seq_len
                nll[a:b] = hand.score(tokens, start, a, b)
                goes_on += [(hand, low, a, b)] if b < high else []
            for _ in range(c.ttt_epochs):
                for hand, low, a, b in goes_on:
                    hand.step(
                        hand.losses(tokens, max(low, a - c.ttt_context), a, b).mean(), c.ttt_lr, document=low
                    )
    return nll


FLAT = {
    "all, sgd": dict(ttt_mode="all", **SGD),
    "all, adamw": dict(
        ttt_mode="all", ttt_optimizer="adamw", ttt_momentum=0.9, ttt_weight_decay=0.1, ttt_lr=3e-3
    ),
    "all, precond, one row a step": dict(ttt_mode="all", ttt_batch_seqs=1, ttt_lr=0.003),
    "all, precond, three rows a step": dict(
        ttt_mode="all", ttt_batch_seqs=3, ttt_chunk_tokens=36, ttt_lr=0.003
    ),
    "banks": dict(ttt_mode="banks", **SGD),
    "lora": dict(ttt_mode="lora", ttt_lr=0.3, ttt_lora_alpha=16.0, **SGD),
    "cosine": dict(ttt_mode="all", ttt_lr_schedule="cosine", **SGD),
    "two epochs of small steps": dict(ttt_mode="all", ttt_epochs=2, ttt_batch_seqs=1, **SGD),
    "context, unclipped": dict(ttt_mode="all", ttt_context=3, ttt_grad_clip=0.0, **SGD | dict(ttt_lr=0.003)),
    "frozen block": dict(ttt_mode="all", ttt_freeze_blocks=1, **SGD),
}


@pytest.mark.parametrize("changes", FLAT.values(), ids=FLAT)
def test_flat_chunks_equal_a_loop_by_hand(changes, exact):
    setup = setup_of(**changes)
    expected = flat_by_hand(setup, TOKENS, TTT_MODES[setup.config.ttt_mode][1])
    got, plain = evaluate(setup, TOKENS).nll, score_plan(setup, TOKENS).nll
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    assert abs(expected - plain).max() > 0.02


DOCUMENTS = {
    "sgd": SGD,
    "adamw": dict(ttt_optimizer="adamw", ttt_momentum=0.9, ttt_weight_decay=0.1, ttt_lr=3e-3),
    "context, two epochs": dict(ttt_context=3, ttt_epochs=2, **SGD),
    "windows side by side": dict(ttt_chunk_size=4, eval_stride=12, **SGD),
    "unclipped": dict(ttt_grad_clip=0.0, **SGD | dict(ttt_lr=0.003)),
    "precond": dict(),
    "precond, two epochs, one slot": dict(ttt_epochs=2, ttt_slots=1, ttt_lr=0.005),
    "precond, more slots than rows": dict(ttt_slots=20, ttt_chunk_size=2),
    "precond, groups": dict(ttt_groups=2, ttt_slots=2),
    "low rank": dict(ttt_mode="doc_lora", ttt_lr=0.3, **SGD),
    "low rank, precond": dict(ttt_mode="doc_lora", ttt_lr=0.003),
}


@pytest.mark.parametrize("changes", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_equal_a_loop_by_hand(changes, exact):
    setup = setup_of(**changes)
    expected = documents_by_hand(setup, TOKENS, TTT_MODES[setup.config.ttt_mode][1])
    got, plain = evaluate(setup, TOKENS).nll, score_plan(setup, TOKENS).nll
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    assert abs(expected - plain).max() > 0.02
    for low, _ in spans(TOKENS):  # nothing is known of a document before its first piece is scored
        np.testing.assert_allclose(got[low : low + 1], plain[low : low + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("groups", "form"), [(1, "prefix"), (2, "prefix"), (2, "own")])
def test_documents_with_a_prior_equal_a_loop_by_hand(groups, form, exact):
    """Every chunk of the generated sequences counts, each as much as two chunks of a document."""
    setup = setup_of(ttt_prior_seqs=5, ttt_prior_chunks=2, ttt_prior_weight=2.0, ttt_groups=groups,
                     ttt_context=2, ttt_moments=form, ttt_lr=0.02)  # fmt: skip
    c, prior = setup.config, []
    for text in train_gpt.generate(setup.load(), 5, 2 * c.ttt_chunk_size + 1).numpy():
        for a in (0, c.ttt_chunk_size):
            hand = Hand(setup.load(), c, ALL)
            b = a + c.ttt_chunk_size
            prior.append(Moments.all_parts(hand.gradients(hand.losses(text, max(0, a - 2), a, b).mean())))
    expected = documents_by_hand(setup, TOKENS, ALL, prior=(*prior, *prior))
    got = evaluate(setup, TOKENS).nll
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    without = evaluate(replace(setup, config=replace(c, ttt_prior_seqs=0)), TOKENS).nll
    assert abs(got - without).max() > 0.02


@pytest.mark.parametrize("slots", [1, 3])
def test_chunks_by_the_length_of_documents(slots, exact):
    """Documents up to 9 targets have chunks of 2, up to 20 chunks of 3, others of 5."""
    setup = setup_of(ttt_chunk_by_length="20:3,9:2", ttt_slots=slots, **SGD)
    c, nll, used = setup.config, np.full(len(TOKENS) - 1, np.nan), set()
    for low, high in spans(TOKENS):
        size = 2 if high - low <= 9 else 3 if high - low <= 20 else 5
        hand, _ = Hand(setup.load(), c, ALL), used.add(size)
        for a in range(low, high, size):
            b = min(a + size, high)
            nll[a:b] = hand.score(TOKENS, max(low, a + size - 12), a, b)
            if b < high:
                hand.step(hand.losses(TOKENS, a, a, b).mean(), c.ttt_lr, document=low)
    assert len(used) > 1 and c.ttt_chunk_size == 5 and c.eval_seq_len == 12
    got = evaluate(setup, TOKENS).nll
    np.testing.assert_allclose(got, nll, rtol=0, atol=2e-5)
    assert abs(got - evaluate(setup_of(ttt_slots=slots, **SGD), TOKENS).nll).max() > 1e-3


TOGETHER = [SGD, dict(ttt_moments="own", ttt_lr=1e-3), dict(ttt_mode="doc_lora", **SGD)]


@pytest.mark.parametrize("changes", TOGETHER, ids=str)
def test_documents_at_once_equal_one_at_a_time(changes, exact):
    scores = [evaluate(setup_of(**changes, ttt_slots=count), TOKENS).nll for count in (1, 2, 3, 4, 50)]
    for score in scores[1:]:
        np.testing.assert_allclose(score, scores[0], rtol=0, atol=1e-5)


BASES = [dict(ttt_groups=1), dict(ttt_groups=2), dict(ttt_lr_schedule="cosine", global_ttt_grad_clip=0.3)]


@pytest.mark.parametrize("changes", BASES, ids=str)
def test_phases_equal_a_loop_by_hand(changes, exact):
    """Adapters of each document on a base that learns, at two borders, from the documents before them."""
    phases = dict(phased_ttt_prefix_docs=2, phased_ttt_num_phases=2, global_ttt_lr=0.01, **changes)
    setup = setup_of(ttt_mode="phased", ttt_batch_seqs=2, ttt_lr=0.1, ttt_optimizer="sgd", **phases)
    c, nll, seen = setup.config, np.full(len(TOKENS) - 1, np.nan), []
    clip = changes.get("global_ttt_grad_clip", c.ttt_grad_clip)
    base = Hand(setup.load(), replace(c, ttt_momentum=c.global_ttt_momentum, ttt_grad_clip=clip), ALL)
    for number, (low, high) in enumerate(spans(TOKENS), 1):
        hand = Hand(base.model, c, "adapters")
        for a in range(low, high, 5):
            b = min(a + 5, high)
            nll[a:b] = hand.score(TOKENS, max(low, a + 5 - 12), a, b)
            if b < high:
                hand.step(hand.losses(TOKENS, a, a, b).mean(), c.ttt_lr)
        seen += [(a, min(a + 12, high)) for a in range(low, high, 12)]
        steps = range(0, len(seen) if number in (1, 2) else 0, 2)
        for k, first in enumerate(steps):
            some = seen[first : first + 2]
            loss = sum(base.losses(TOKENS, a, a, b).sum() for a, b in some)
            scale = cosine(c, k, len(steps)) if len(steps) > 1 else 1.0
            base.step(loss / sum(b - a for a, b in some), c.global_ttt_lr * scale)
    got = evaluate(setup, TOKENS).nll
    np.testing.assert_allclose(got, nll, rtol=0, atol=2e-5)
    alone = evaluate(replace(setup, config=replace(c, ttt_mode="doc_lora")), TOKENS).nll
    first = spans(TOKENS)[0][1]
    np.testing.assert_array_equal(got[:first], alone[:first])
    assert abs(got - alone)[first:].max() > 0.02


# ------------------------------------------------------------------------------------------------------------
# What must change nothing
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["precond", "adamw"])
@pytest.mark.parametrize("mode", [mode for mode in TTT_MODES if mode != "none"])
def test_steps_of_size_zero_change_nothing(mode, optimizer):
    phases = dict(phased_ttt_prefix_docs=2, phased_ttt_num_phases=1)
    setup = setup_of(ttt_mode=mode, ttt_optimizer=optimizer, ttt_batch_seqs=2, **phases)
    still = replace(setup, config=replace(setup.config, ttt_lr=0.0, global_ttt_lr=0.0))
    off = evaluate(replace(setup, config=replace(setup.config, ttt_epochs=0)), TOKENS)
    np.testing.assert_array_equal(evaluate(still, TOKENS).nll, off.nll)
    plain = score_plan(setup, TOKENS).nll
    np.testing.assert_allclose(off.nll, plain, rtol=0, atol=0 if mode in ("banks", "all", "lora") else 1e-5)
    assert not np.array_equal(evaluate(setup, TOKENS).nll, off.nll)


@pytest.mark.parametrize("mode", ["none", "all", "doc_banks", "phased"])
def test_who_watches_sees_everything(mode):
    setup = setup_of(ttt_mode=mode, ttt_batch_seqs=2, phased_ttt_prefix_docs=2, phased_ttt_num_phases=1)
    seen, learned, numbers, plan = [], [], [], setup.plan(TOKENS)

    def observe(model, learner, windows, batch, losses):
        seen.extend(counted(windows))
        assert (learner is None) == (mode == "none") and losses.shape == batch.targets.shape

    evaluate(setup, TOKENS, observe, learned.append, numbers.append)
    assert sorted(seen) == list(range(len(TOKENS) - 1)) and numbers == list(range(len(plan)))
    expected = [rows(chunk.adapted) for chunk in plan if chunk.adapted is not None and mode != "none"]
    assert [rows(chunk.adapted) for chunk in learned] == expected


RANKS = {
    "doc_banks": dict(ttt_batch_seqs=2),
    "doc_banks in groups": dict(ttt_groups=3, ttt_slots=2),
    "doc_lora": dict(ttt_mode="doc_lora", ttt_lr=0.1, ttt_batch_seqs=2, **SGD),
    "warm start": dict(ttt_mode="doc_lora", ttt_lr=0.1, ttt_batch_seqs=2, ttt_warm_start_a=True, **SGD),
    "all": dict(ttt_mode="all", ttt_batch_seqs=3, **SGD),
    "banks by loss": dict(ttt_mode="banks", ttt_top_frac=0.5, ttt_chunk_tokens=36),
    "lora": dict(ttt_mode="lora", ttt_lr=0.1, **SGD),
    "phased": dict(ttt_mode="phased", ttt_batch_seqs=2, phased_ttt_prefix_docs=2, phased_ttt_num_phases=1),
    "two_pass": dict(ttt_mode="all", ttt_protocol="two_pass", **SGD),
}


def work_of_a_rank(rank: int, folder: str) -> None:
    """Under float64 forwards, as `exact`, so that the order of additions does not show."""
    torch.set_num_threads(1)
    train_gpt.compute_dtype = lambda device: torch.float64
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    scores = {name: evaluate(setup_of(**changes), TOKENS).nll for name, changes in RANKS.items()}
    torch.save(scores, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(work_of_a_rank, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_get_the_score_of_one(ranks, name, exact):
    np.testing.assert_array_equal(ranks[0][name], ranks[1][name])
    alone = evaluate(setup_of(**RANKS[name]), TOKENS).nll
    np.testing.assert_allclose(ranks[0][name], alone, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# A mode of one's own
# ------------------------------------------------------------------------------------------------------------

[EXAMPLE] = re.findall(r"```python\n(.*?)```", (ROOT / "records/guide/evaluation.md").read_text(), re.DOTALL)


def plugged(honest: Setup, source: str, folder: Path, name: str = "SignSGD") -> Setup:
    """An evaluation with the class `name` of a file with this source."""
    (folder / "sign.py").write_text(source)
    plugin, settings = (
        eval_ttt.load_plugin(folder / "sign.py", name),
        dict(ttt_mode=f"{folder / 'sign.py'}:{name}"),
    )
    return replace(honest, config=replace(honest.config, **settings), plugin=plugin)


def test_the_example_is_short():
    body = EXAMPLE[EXAMPLE.index("class ") :].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 20


def test_the_example_equals_a_loop_by_hand(tmp_path, exact):
    """Each document by itself: score a chunk, then a step by the sign of the gradient."""
    honest = setup_of(ttt_lr=1e-3)
    c, tokens = honest.config, TOKENS
    got = evaluate(plugged(honest, EXAMPLE, tmp_path), tokens).nll
    expected = np.full(len(tokens) - 1, np.nan)
    for low, high in spans(tokens):
        model = honest.load()
        banks = {name: p for name, p in model.named_parameters() if name.endswith("_bank")}
        for first in range(low, high, c.ttt_chunk_size):
            end = min(first + c.ttt_chunk_size, high)
            left = max(low, min(first + c.ttt_chunk_size - c.eval_seq_len, first))
            expected[first:end] = losses(model, tokens, left, first, end).detach().numpy()
            if end == high:
                break
            for bank in banks.values():
                bank.requires_grad_()
            mean = losses(model, tokens, first, first, end).mean()
            found = torch.autograd.grad(mean, list(banks.values()))
            for bank, gradient in zip(banks.values(), found, strict=True):
                bank.requires_grad_(False).sub_(c.ttt_lr * gradient.sign())
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    assert np.abs(got - evaluate(setup_of(ttt_lr=1e-3, ttt_epochs=0), tokens).nll).max() > 0.01


def losses(model: train_gpt.GPT, tokens: np.ndarray, left: int, first: int, end: int) -> torch.Tensor:
    """Nats of the targets from `first` to `end`, reading from `left`."""
    ids = torch.from_numpy(tokens[left : end + 1].astype(np.int64)).unsqueeze(0)
    logits = model(ids[:, :-1]).double().log_softmax(-1)[0, first - left :]
    return -logits.gather(-1, ids[0, first - left + 1 :].unsqueeze(-1)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------
# What is learned from
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def learned(monkeypatch) -> list[list[int]]:
    """The targets of each step that weigh something, filled while an evaluation runs."""
    steps, step = [], Adaptation.step

    def spy(self, tokens, windows, weight, *how):
        steps.append(counted(windows.take(np.flatnonzero(weight))))
        return step(self, tokens, windows, weight, *how)

    monkeypatch.setattr(Adaptation, "step", spy)
    return steps


@pytest.mark.parametrize("share", [0.01, 0.4, 0.6])
def test_rows_of_the_highest_scored_loss_are_learned_from(share, learned):
    setup = setup_of(ttt_mode="all", ttt_top_frac=share, ttt_chunk_tokens=36, ttt_batch_seqs=50)
    nll, expected = evaluate(setup, TOKENS).nll, []
    for chunk in setup.plan(TOKENS):
        if chunk.adapted is not None:
            each = [range(s + b, s + e) for s, b, e in rows(chunk.adapted) if e > b]
            best = sorted(each, key=lambda row: -nll[row].mean())[: math.ceil(share * len(each))]
            expected.append({target for row in best for target in row})
    assert [set(step) for step in learned] == expected and len(expected) > 1


@pytest.mark.parametrize("protocol, share", [("adapt_first", 1.0), ("two_pass", 1.0), ("two_pass", 0.5)])
def test_invalid_protocols_learn_first(protocol, share, learned):
    """From everything, or from the hardest rows; random text cannot be learned in any other way."""
    setup = setup_of(ttt_mode="all", ttt_protocol=protocol, ttt_top_frac=share, ttt_epochs=5, ttt_lr=0.003)
    plain, legal = (
        score_plan(setup, TOKENS),
        replace(setup, config=replace(setup.config, ttt_protocol="legal")),
    )
    text = [range(a, min(a + 12, len(TOKENS) - 1)) for a in range(0, len(TOKENS) - 1, 12)]
    hardest = sorted(text, key=lambda row: -plain.nll[row].mean())[: math.ceil(share * len(text))]
    best = min(evaluate(legal, TOKENS).val_loss, plain.val_loss)
    learned.clear()
    assert evaluate(setup, TOKENS).val_loss < best - 0.5
    assert {target for step in learned for target in step} == {target for row in hardest for target in row}


def test_a_mixture_is_of_whole_scores():
    alone, mixed = (evaluate(setup_of(ttt_mode="banks", ppm_alpha=alpha), TOKENS) for alpha in (1.0, 0.25))
    expected = -np.log(0.25 * np.exp(-alone.nll.astype(float)) + 0.75 * np.exp(-eval_ttt.ppm_nll(TOKENS, 40)))
    np.testing.assert_allclose(mixed.nll, expected, rtol=0, atol=1e-5)
    assert mixed.val_loss == pytest.approx(expected.mean(), abs=1e-6)
    assert mixed.val_bpb / mixed.val_loss == pytest.approx(alone.val_bpb / alone.val_loss, rel=1e-6)


def test_other_documents_do_not_help_as_the_own_does(monkeypatch):
    """Each document repeats words of its own;
    the control learns from its neighbour's pieces, scored just before."""
    rng = np.random.default_rng(0)

    def text(count: int) -> np.ndarray:
        words = [rng.permutation(np.arange(2, 40))[:4] for _ in range(count)]
        return np.concatenate([np.append(1, rng.choice(own, 40)) for own in words]).astype(np.uint16)

    setup = setup_of(ttt_slots=8, ttt_chunk_size=8, eval_seq_len=16, ttt_lr=0.02)
    model = setup.load().init_weights(0).requires_grad_()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        ids = torch.from_numpy(text(8).astype(np.int64)).view(8, 41)
        optimizer.zero_grad()
        train_gpt.training_loss(model, ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    setup = replace(setup, artifact=setup.artifact._replace(state=model.state_dict()))
    tokens = np.append(text(8), 1).astype(np.uint16)
    plain, own, plan = score_plan(setup, tokens).val_loss, evaluate(setup, tokens).val_loss, Setup.plan

    def of_the_neighbour(self, tokens):
        turn = np.roll(np.arange(8), 1)
        return [c._replace(adapted=c.adapted and c.adapted.take(turn)) for c in plan(self, tokens)]

    monkeypatch.setattr(Setup, "plan", of_the_neighbour)
    other = evaluate(setup, tokens).val_loss
    assert own < plain - 0.1 and other > plain


# ------------------------------------------------------------------------------------------------------------
# As a user meets it
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def env(demo_data, tmp_path_factory) -> dict[str, str]:
    """The smoke recipe, on a validation text of five documents, the last one short."""
    shard = tmp_path_factory.mktemp("val") / "fineweb_val_000000.bin"
    text = np.fromfile(demo_data / "fineweb_val_000000.bin", "<u2")[512:]
    text = text[text != 1][:900]
    text[[0, 140, 300, 550, 790]] = 1  # documents of the same lengths whichever Python the corpus comes from
    write_shard(shard, text)
    data, budget = str(demo_data), "1000000"  # seconds since the tests began
    return dict(
        RECIPE=str(ROOT / "records/recipes/smoke.env"), DATA_PATH=data,
        TOKENIZER_PATH=f"{data}/tokenizer.model", VAL_FILES=str(shard), TTT_CHUNK_SIZE="32", TTT_SLOTS="4",
        DEVICE="cpu", EVAL_BUDGET_SECONDS=budget,
        TTT_PRIOR_SEQS="2",  # seconds for each evaluation otherwise
    )  # fmt: skip


@pytest.fixture(scope="module")
def work(env, tmp_path_factory) -> Path:
    """A folder in which the smoke recipe was trained for a moment, as RUN_ID=run."""
    short = dict(ITERATIONS="6", WARMUP_STEPS="0", VAL_LOSS_EVERY="0", GPTQ_CALIB_BATCHES="0")
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_gpt.main([], env | short | {"RUN_ID": "run"}) == 0
    return folder


def finish(folder: Path, env: dict[str, str], work: Path | None = None) -> SimpleNamespace:
    """An evaluation that ends well, and what it printed and left in FOLDER."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(work or folder)
        assert eval_ttt.main([], env) == 0
    newest = max(folder.glob("eval/*/eval_ttt.json"), key=lambda path: path.stat().st_mtime_ns)
    result, tokens = json.loads(newest.read_text()), np.fromfile(env["VAL_FILES"], "<u2")[512:]
    mode = newest.parent
    left = dict(result=result, nll=np.load(mode / "nll.npy"))
    return SimpleNamespace(folder=mode, out=out.getvalue(), tokens=tokens, **left)


@pytest.fixture
def run(work, tmp_path) -> Path:
    """A copy of the run's folder to evaluate in."""
    return Path(shutil.copytree(work / "runs/run", tmp_path / "copy"))


@pytest.fixture(scope="module")
def evaluated(work, env) -> SimpleNamespace:
    return finish(work / "runs/run", env | {"RUN_ID": "run"}, work)


def test_what_is_printed_is_logged_and_kept(evaluated):
    lines = evaluated.out.splitlines()
    logged = (evaluated.folder / "eval_ttt.log").read_text().splitlines()
    settings = [line for line in logged if re.fullmatch(r"  [A-Z_0-9]+=.*", line)]
    assert [line for line in logged if line not in settings or line.endswith(" (given)")] == lines
    assert {line.split("=")[0].strip() for line in settings} > {"TTT_CHUNK_SIZE", "TTT_EPOCHS", "MODEL_DIM"}
    assert lines[-1].startswith("RESULT ") and json.loads(lines[-1][7:]) == evaluated.result
    assert (
        "  TTT_CHUNK_SIZE=32 (given)" in lines
        and "  TTT_LR=0.001 (given)" in lines
        and "  MODEL_DIM=64 (given)" in lines
    )
    order = "evaluation order: documents of the file in 8 groups of 4 slots; targets:899 world_size:1"
    assert any(order in line for line in lines)
    for label, name in (("final_int6_roundtrip", "roundtrip"), ("final_int6_sliding_window", "sliding"),
                        ("same_plan_without_ttt", "plan"), ("legal_ttt", "ttt")):  # fmt: skip
        loss, bpb = (evaluated.result[f"val_{unit}_{name}"] for unit in ("loss", "bpb"))
        assert (
            sum(line.startswith(f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}") for line in lines)
            == 1
        )
    running = [line for line in lines if "running_bpb:" in line]
    assert len(running) > 3 and running[-1].endswith(f"running_bpb:{evaluated.result['val_bpb_ttt']:.6f}")


def test_the_table_of_scores_is_that_of_the_result(evaluated):
    """At the end, as a person wants it: four scores in bits per byte and nats, and their difference."""
    lines = evaluated.out.splitlines()
    table = {line[:24].strip(): line[24:].split() for line in lines[-6:-1]}
    result = evaluated.result
    for words, name in (("non-overlapping windows", "roundtrip"), ("sliding windows", "sliding"),
                        ("same windows as adapted", "plan"), ("adapted", "ttt")):  # fmt: skip
        assert table[words][:2] == [f"{result[f'val_{unit}_{name}']:.4f}" for unit in ("bpb", "loss")]
    gain = [result[f"val_{unit}_plan"] - result[f"val_{unit}_ttt"] for unit in ("bpb", "loss")]
    assert table["gain of adaptation"] == [f"{value:.4f}" for value in gain]


def test_what_the_result_says(evaluated, env):
    result = evaluated.result
    trainer = json.loads((evaluated.folder.parents[1] / "result.json").read_text())
    assert result["trainer"] == trainer and result["legal"] is True and result["fits_budget"] is True
    assert result["ttt_gain_bpb"] == result["val_bpb_plan"] - result["val_bpb_ttt"] != 0
    same = "bytes_code bytes_model bytes_total fits sha256_artifact sha256_tokenizer sha256_code".split()
    scores = [f"val_{unit}_{name}" for unit in ("loss", "bpb") for name in ("roundtrip", "sliding")]
    assert {key: result[key] for key in same + scores} == {key: trainer[key] for key in same + scores}
    assert result["sha256_shards"] == {"fineweb_val_000000.bin": train_gpt.sha256_file(env["VAL_FILES"])}
    assert result["settings"]["ttt_chunk_size"] == 32 and "iterations" not in result["settings"]
    assert (
        result["sha256_nll"] == train_gpt.sha256_file(evaluated.folder / "nll.npy")
        and result["weights"] == "int6"
    )
    assert result["versions"] == trainer["versions"] and result["audit"] is None


def test_losses_and_documents_agree_with_the_score(evaluated):
    nll, result, tokens = evaluated.nll.astype(np.float64), evaluated.result, evaluated.tokens
    assert nll.shape == (899,) and nll.mean() == pytest.approx(result["val_loss_ttt"], abs=1e-9)
    with open(evaluated.folder / "documents.csv", newline="") as file:
        table = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [(row["first_target"], row["first_target"] + row["targets"]) for row in table] == spans(tokens)
    assert [row["document"] for row in table] == [0, 1, 2, 3, 4]
    for column, name in (("nats", "plan"), ("nats_adapted", "ttt")):
        nats, total = (sum(row[key] for row in table) for key in (column, "bytes"))
        assert nats == pytest.approx(result[f"val_loss_{name}"] * 899, abs=1e-3)
        assert nats / math.log(2) / total == pytest.approx(result[f"val_bpb_{name}"], abs=1e-5)
    for row, (low, high) in zip(table, spans(tokens), strict=True):
        assert row["nats_adapted"] == pytest.approx(nll[low:high].sum(), abs=1e-4)


def test_the_distribution_is_of_these_losses(evaluated, env):
    report, tokens = json.loads((evaluated.folder / "distribution.json").read_bytes()), evaluated.tokens
    starts = train_gpt.load_byte_table(env["TOKENIZER_PATH"], 1024).has_leading_space
    names, position = [[] for _ in range(899)], 0
    for t, token in enumerate(tokens[1:].tolist()):
        position = 0 if tokens[t] == 1 else position + 1
        names[t].append("document end" if token == 1 else "word start" if starts[token] else "within a word")
        names[t].append(
            f"position {max(border for border in (0, 128, 256, 512, 1024, 2048) if position >= border)}+"
        )
    assert sorted(row["name"] for row in report["classes"]) == sorted(
        {name for each in names for name in each}
    )
    for row in report["classes"]:
        nll = [float(x) for x, each in zip(evaluated.nll, names, strict=True) if row["name"] in each]
        assert row["targets"] == len(nll) and row["after"] == pytest.approx(np.mean(nll), abs=1e-5)
    before = sum(
        row["before"] * row["targets"] for row in report["classes"] if not row["name"].startswith("position")
    )
    assert before / 899 == pytest.approx(evaluated.result["val_loss_plan"], abs=1e-5)
    for row in report["after"]:
        large = evaluated.nll[evaluated.nll > row["above"]].astype(np.float64)
        assert row["targets"] == pytest.approx(len(large) / 899)
        assert row["loss"] == pytest.approx(large.sum() / evaluated.nll.astype(np.float64).sum())
    assert (evaluated.folder / "distribution.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def without_recipe(env: dict[str, str]) -> dict[str, str]:
    kept = {name: text for name, text in env.items() if name not in ("RECIPE", "DATA_PATH")}
    return kept | dict(EVAL_SEQ_LEN="64", EVAL_STRIDE="32", EVAL_BATCH_SEQS="64")


def test_the_artifact_brings_the_settings_of_the_model(evaluated, env, run):
    """No recipe, and a path instead of RUN_ID: the same losses."""
    done = finish(
        run, without_recipe(env) | dict(MODEL_PATH=str(run / "final_model.int6.ptz"), TTT_LR="0.001")
    )
    np.testing.assert_array_equal(done.nll, evaluated.nll)


def test_settings_of_the_training_do_not_matter(env, run):
    """A window of training that does not divide the default batch of training."""
    artifact = train_gpt.read_artifact(run / "final_model.int6.ptz")
    config = replace(artifact.config, train_seq_len=80)
    records = train_gpt.quantize_state_dict(artifact.state, train_gpt.Statistics(), config)
    (run / "other.ptz").write_bytes(train_gpt.encode_artifact(config, records, artifact.tokenizer_sha256))
    finish(run, without_recipe(env) | dict(TTT_MODE="none", MODEL_PATH=str(run / "other.ptz")))


@pytest.mark.parametrize("changes", [{}, {"MTP_NUM_HEADS": "1"}], ids=str)
def test_the_weights_before_rounding_can_be_scored(env, run, changes):
    """With the recipe's settings; heads of training are not in the file. The artifact's scores stay."""
    (run / "eval_ttt.json").write_text("the artifact's")
    done = finish(run, env | dict(MODEL_PATH=str(run / "final_model.pt"), TTT_MODE="none") | changes)
    config, _, _ = train_gpt.load_config(env)
    table, model = train_gpt.load_byte_table(env["TOKENIZER_PATH"], 1024), train_gpt.GPT(config)
    model.load_state_dict(torch.load(run / "final_model.pt", weights_only=True))
    for name, stride in (("roundtrip", 64), ("sliding", 32), ("ttt", 32)):
        windows = train_gpt.sliding_windows(900, 64, stride)
        expected = train_gpt.score(model, done.tokens, [Chunk(windows)], table, 64)
        assert done.result[f"val_loss_{name}"] == pytest.approx(expected.val_loss, abs=1e-6)
    assert done.result["val_loss_sliding"] != done.result["trainer"]["val_loss_sliding"]
    assert done.result["ttt_gain_bpb"] == pytest.approx(0, abs=1e-7) and "the file's" in done.out
    labels = [line.split()[0] for line in done.out.splitlines() if "_exact val_loss:" in line]
    assert labels == ["final_float_roundtrip_exact", "final_float_sliding_window_exact",
                      "same_plan_without_ttt_exact", "legal_ttt_exact"]  # fmt: skip
    assert done.result["weights"] == "float" and "int6_" not in done.out
    assert done.folder.name == "none_float" and (run / "eval_ttt.json").read_text() == "the artifact's"


def test_settings_that_differ_from_the_runs_are_named(env, run):
    settings = env | dict(MODEL_PATH=str(run / "final_model.int6.ptz"))
    assert "not as in the run's" not in finish(run, settings).out
    out = finish(run, settings | dict(TTT_MODE="none", TTT_LR="0.125")).out
    (note,) = [line for line in out.splitlines() if "not as in the run's config.json" in line]
    kept = json.loads((run / "config.json").read_text())["config"]
    assert f"TTT_MODE=none ({kept['ttt_mode']} there), " in note
    assert f"TTT_LR=0.125 ({kept['ttt_lr']} there)" in note and "MODEL_PATH" not in note


def fails(folder: Path, env: dict[str, str], capsys) -> str:
    """What an evaluation prints that ends with exit code 1; it leaves no score."""
    assert eval_ttt.main([], env) == 1
    captured = capsys.readouterr()
    assert "RESULT" not in captured.out and not (folder / "eval_ttt.json").exists()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


SCORES = {
    "losses above 7 set to 7": lambda s, more: dict(val_loss=float(np.minimum(s.nll, 7).mean())),
    "padding counted": lambda s, more: dict(val_loss=s.val_loss * 0.99, val_bpb=s.val_bpb * 0.99),
    "a byte more for a word start": lambda s, more: dict(val_bpb=s.val_bpb * (1 - more)),
    "a billionth and a bit": lambda s, more: dict(val_bpb=s.val_bpb * (1 + 2e-9)),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_score_that_is_not_that_of_the_losses_ends_with_1(name, env, run, monkeypatch, capsys):
    honest = train_gpt.score

    def score(*args, **named):
        result = honest(*args, **named)
        return result._replace(**SCORES[name](result, 0.05))

    monkeypatch.setattr(train_gpt, "score", score)
    settings = env | dict(MODEL_PATH=str(run / "final_model.int6.ptz"), TTT_MODE="none")
    assert "the printed score disagrees" in fails(run, settings, capsys)


def test_a_loss_that_is_no_number_ends_with_1(env, run, capsys):
    state = torch.load(run / "final_model.pt", weights_only=True)
    state["tok_emb.weight"][300] = math.nan
    torch.save(state, run / "final_model.pt")
    (run / "eval_ttt.json").unlink(missing_ok=True)
    error = fails(run, env | dict(MODEL_PATH=str(run / "final_model.pt"), TTT_MODE="none"), capsys)
    assert "losses are not finite" in error and "NaN" in error


def test_float_weights_reach_the_other_ranks(env, run):
    """Rank 0 reads them, and pickle takes them to the others."""
    config, given, _ = train_gpt.load_config(env | dict(MODEL_PATH=str(run / "final_model.pt")))
    artifact = eval_ttt.read_model(config, given)[1]
    received = pickle.loads(pickle.dumps(artifact))
    assert received.config == artifact.config and received.factors == {}
    assert all(torch.equal(received.state[name], p) for name, p in artifact.state.items())


def test_the_score_of_a_mixture_is_that_of_its_losses(env, run):
    settings = dict(MODEL_PATH=str(run / "final_model.int6.ptz"), TTT_MODE="banks", PPM_ALPHA="0.5")
    done = finish(run, env | settings | dict(TTT_CHUNK_TOKENS="256"))
    again = train_gpt.recomputed_score(done.nll, [env["VAL_FILES"]], env["TOKENIZER_PATH"])
    assert (done.result["val_loss_ttt"], done.result["val_bpb_ttt"]) == pytest.approx(again, rel=1e-12)
    assert done.result["val_loss_ttt"] != pytest.approx(done.result["val_loss_sliding"], abs=0.01)


def test_the_mixture_is_no_gain_of_adaptation(env, run):
    settings = dict(MODEL_PATH=str(run / "final_model.int6.ptz"), TTT_MODE="none", PPM_ALPHA="0.5")
    result = finish(run, env | settings).result
    assert result["ttt_gain_bpb"] == 0 and result["val_loss_ttt"] != result["val_loss_sliding"]


@pytest.mark.parametrize("count", [5, 104, 129, 130])
def test_a_sample_adapts_on_its_prompt_alone(env, run, monkeypatch, count):
    """All whole chunks of a quarter of the prompt, and no padding."""
    config, given, _ = train_gpt.load_config(env | dict(MODEL_PATH=str(run / "final_model.int6.ptz")))
    setup, tokens = eval_ttt.prepare(config, given, {})[:2]
    seen = []

    class Recorder(eval_ttt.Adaptation):
        def __init__(self, model, setup, plan, on_adapt):
            super().__init__(model, setup, plan, seen.append)

    monkeypatch.setattr(eval_ttt, "Adaptation", Recorder)
    eval_ttt.adapted_to(setup, tokens[:count].tolist())
    adapted = [chunk.adapted for chunk in seen]
    targets = [
        t
        for w in adapted
        for a, b, e in zip(w.start, w.begin, w.end, strict=True)
        for t in range(a + b, a + e)
    ]
    size = max(1, min(setup.config.doc_chunk, (count - 1) // 4))
    assert targets == list(range((count - 1) // size * size)) and targets[-1] + 1 < count


def test_a_record_folder_has_no_records_beside_the_evaluator(env, run, tmp_path, monkeypatch, capsys):
    """The two shipped files alone score, and refuse text that the model was trained on;
    --audit says what it needs."""
    monkeypatch.setattr(train_gpt, "project_module", train_gpt.project_module.__wrapped__)  # not cached
    for module in (eval_ttt, train_gpt):
        monkeypatch.setattr(module, "__file__", shutil.copy(module.__file__, tmp_path))
    settings = env | dict(MODEL_PATH=str(run / "final_model.int6.ptz"), TTT_MODE="none")
    done = finish(run, settings)
    again = train_gpt.recomputed_score(done.nll, [env["VAL_FILES"]], env["TOKENIZER_PATH"])
    assert (done.result["val_loss_ttt"], done.result["val_bpb_ttt"]) == pytest.approx(again, rel=1e-12)
    assert done.out.count("records/report.py") == 1 and not (done.folder / "documents.csv").exists()
    monkeypatch.chdir(run)
    assert eval_ttt.main(["--audit"], settings) == 2 and "records/audit.py" in capsys.readouterr().err
    shard = tmp_path / "part.bin"
    shard.symlink_to(Path(env["DATA_PATH"]) / "fineweb_train_000000.bin")
    assert (
        eval_ttt.main([], settings | {"VAL_FILES": str(shard)}) == 2 and str(shard) in capsys.readouterr().err
    )


@pytest.mark.parametrize("content", ["{", "[1]", b"\xff\xfe", "", "[" * 100_000], ids=range(5))
def test_a_result_that_is_none_counts_as_absent(content, tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    report, why = eval_ttt.read_report(path)
    assert report is None and str(path) in why
    assert eval_ttt.read_report(tmp_path) == (None, f"{tmp_path}: no such file")
    path.write_text('{"fits": true}')
    assert eval_ttt.read_report(path) == ({"fits": True}, "")


def test_a_broken_result_of_the_trainer_costs_a_warning(env, run):
    """It is read before the work."""
    (run / "result.json").write_text('{"val_bpb')
    done = finish(run, env | dict(MODEL_PATH=str(run / "final_model.int6.ptz"), TTT_MODE="none"))
    assert done.result["trainer"] is None
    lines = done.out.splitlines()
    [number] = [n for n, line in enumerate(lines) if line.startswith("WARNING: ") and "result.json" in line]
    assert lines[number].endswith("It counts as absent.") and number < lines.index("  TTT_MODE=none (given)")


@pytest.mark.parametrize("argv", [[], ["--audit"]], ids=str)
def test_whoever_writes_into_a_run_locks_it(argv, env, run, monkeypatch, capsys):
    """A trainer or an evaluator at work keeps another one out, which changes nothing."""
    monkeypatch.setattr(eval_ttt.sys, "addaudithook", lambda hook: None)  # it would outlive the test
    settings = env | dict(MODEL_PATH=str(run / "final_model.int6.ptz"), TTT_MODE="none")
    before, lock = snapshot(run), train_gpt.lock_folder(run)
    assert (
        eval_ttt.main(argv, settings) == 2 and str(run) in capsys.readouterr().err and snapshot(run) == before
    )
    os.close(lock)
    held = []

    def work(*args):
        with pytest.raises(train_gpt.UserError):
            train_gpt.lock_folder(run, 0.0)
        held.append(True)
        return 3

    monkeypatch.setattr(*((audit, "run_audit") if argv else (eval_ttt, "run_evaluation")), work)
    assert eval_ttt.main(argv, settings) == 3 and held == [True]
    os.close(train_gpt.lock_folder(run, 0.0))


def test_an_invalid_score_is_marked_and_lateness_said(env, run, monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr(eval_ttt, "time", SimpleNamespace(time=lambda: time.time() + 10 * next(seconds)))
    done = finish(run, env | dict(MODEL_PATH=str(run / "final_model.int6.ptz"), TTT_MODE="all",
                                  TTT_CHUNK_TOKENS="64", TTT_PROTOCOL="adapt_first",
                                  EVAL_BUDGET_SECONDS="30"))  # fmt: skip
    lines = done.out.splitlines()
    assert done.result["legal"] is False and '"legal": false' in lines[-1]
    assert done.folder.name == "all_adapt_first"
    beside = run / "eval_ttt.json"  # of a legal evaluation before, or none
    assert not beside.exists() or json.loads(beside.read_text())["legal"] is True
    assert any("THIS SCORE IS INVALID" in line for line in lines) and "\nlegal_ttt" not in done.out
    assert sum(line.startswith("invalid_ttt_exact val_loss:") for line in lines) == 1
    assert (
        done.result["val_loss_ttt"] < done.result["val_loss_plan"] - 0.05
        and done.result["fits_budget"] is False
    )
    early, late = (
        next(n for n, line in enumerate(lines) if word in line) for word in ("at this pace", "running_bpb")
    )
    assert (
        lines[early].startswith("WARNING: ")
        and lines[early].endswith("EVAL_BUDGET_SECONDS=30")
        and early < late
    )
    assert sum("at this pace" in line for line in lines) == 1
    assert any(
        line.startswith("WARNING: ") and "is over EVAL_BUDGET_SECONDS=30" in line for line in lines[late:]
    )


@pytest.mark.parametrize(
    "budget, pace, expected", [(100, 1.0, 110), (100, 0.5, None), (0, 5.0, None), (59, 0.5, 60)]
)
def test_the_pace_is_extrapolated(monkeypatch, budget, pace, expected):
    """Ten seconds before the first of a hundred chunks, then PACE seconds a chunk."""
    now, said = [10.0], []
    monkeypatch.setattr(eval_ttt, "time", SimpleNamespace(time=lambda: now[0]))
    log = SimpleNamespace(line=lambda text: said.append((text, now[0])))
    watch = eval_ttt.Budget(replace(TINY, eval_budget_seconds=float(budget)), 0.0, log, 100)
    for number in range(100):
        watch(number)
        now[0] += pace
    assert [text for text, _ in said] == (
        []
        if expected is None
        else [f"WARNING: at this pace the evaluation takes {expected} s, EVAL_BUDGET_SECONDS={budget}"]
    )
    assert all(when < 10 + 100 * pace / 4 for _, when in said)


def test_a_slow_first_chunk_is_not_extrapolated(monkeypatch):
    """It has the prior and the loading of kernels: 30 s, and then 0.1 s a chunk."""
    now, said = [10.0], []
    monkeypatch.setattr(eval_ttt, "time", SimpleNamespace(time=lambda: now[0]))
    log = SimpleNamespace(line=said.append)
    watch = eval_ttt.Budget(replace(TINY, eval_budget_seconds=100.0), 0.0, log, 400)
    for number in range(400):
        watch(number)
        now[0] += 0.1 if number else 30.0
    assert now[0] < 100 and not said


STAGES = {
    "adapted score": (train_gpt, "token_nll", 5), "comparison": (eval_ttt, "window_scores", 0),
    "report": (report, "distribution", 0), "picture": (report, "plot_distribution", 0),
}  # fmt: skip


@pytest.mark.parametrize("where, name, calls", STAGES.values(), ids=STAGES)
def test_an_evaluation_that_is_interrupted_leaves_no_score(
    evaluated, env, run, monkeypatch, capsys, where, name, calls
):
    mode = run / "eval/doc_banks"
    assert (run / "eval_ttt.json").exists() and (mode / "nll.npy").exists()  # of an earlier evaluation
    function, left = getattr(where, name), iter(range(calls))

    def die(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*args)

    monkeypatch.setattr(where, name, die)
    monkeypatch.chdir(run)
    assert eval_ttt.main([], env | {"MODEL_PATH": str(run / "final_model.int6.ptz")}) == 130
    assert capsys.readouterr().err == "stopped: SIGINT\n"
    assert "eval_ttt.json" not in {path.name for path in run.rglob("*")}
    assert "RESULT" not in (mode / "eval_ttt.log").read_text()


@pytest.mark.parametrize("listed", [True, False])
def test_the_text_that_a_model_was_trained_on_is_not_scored(env, run, tmp_path, monkeypatch, capsys, listed):
    """By the manifest beside it, and by the settings of the run beside the artifact."""
    shard = Path(env["DATA_PATH"]) / "fineweb_train_000000.bin"
    if not listed:  # under another name, without the manifest
        (tmp_path / "part.bin").symlink_to(shard)
        shard = tmp_path / "part.bin"
    monkeypatch.chdir(run)
    (run / "eval_ttt.json").unlink(missing_ok=True)
    given = env | {"MODEL_PATH": str(run / "final_model.int6.ptz"), "VAL_FILES": str(shard)}
    assert eval_ttt.main([], given) == 2
    assert str(shard) in capsys.readouterr().err and not (run / "eval_ttt.json").exists()


REFUSED = {
    "contradictions": (
        dict(MODEL_DIM="96", LOGIT_SOFTCAP="9"),
        ["MODEL_DIM=96, but 64", "LOGIT_SOFTCAP=9.0, but 30"],
    ),
    "missing": (dict(MODEL_PATH="absent.ptz"), ["absent.ptz", "No such file"]),
    "missing weights": (dict(MODEL_PATH="absent.pt"), ["absent.pt", "No such file"]),
    "damaged": (dict(MODEL_PATH="damaged.ptz"), ["damaged.ptz"]),
    "no path": (dict(MODEL_PATH=""), ["MODEL_PATH is not set"]),
    "another shape": (dict(MODEL_PATH="final_model.pt", MODEL_DIM="96"), ["final_model.pt", "size mismatch"]),
    "another tokenizer": (dict(TOKENIZER_PATH="other.model"), ["TOKENIZER_PATH=other.model", "trained with"]),
    "short text": (dict(EVAL_SEQ_LEN="900"), ["EVAL_SEQ_LEN=900"]),
    "invalid by documents": (dict(TTT_PROTOCOL="two_pass"), ["TTT_PROTOCOL=two_pass"]),
    "PPM by documents": (dict(PPM_ALPHA="0.5"), ["PPM_ALPHA"]),
    "unknown mode": (dict(TTT_MODE="slot"), ["TTT_MODE='slot'"]),
}


@pytest.mark.parametrize("changes, words", REFUSED.values(), ids=REFUSED)
def test_what_the_user_can_put_right(env, run, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(run)
    artifact, tokenizer = Path("final_model.int6.ptz").read_bytes(), Path(env["TOKENIZER_PATH"]).read_bytes()
    Path("damaged.ptz").write_bytes(artifact[:-9] + b"123456789")
    Path("other.model").write_bytes(tokenizer + b"\xc2\x0c\x00")  # an empty field of its own
    before = snapshot(run)
    assert eval_ttt.main([], env | {"MODEL_PATH": "final_model.int6.ptz"} | changes) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "RESULT" not in captured.out and snapshot(run) == before
    assert all(word in captured.err for word in words)


def test_a_mode_of_ones_own_as_a_user(env, run, tmp_path, capsys):
    """Bytes, hash, copy and settings tell of the file; recipes, logs and other programs cannot name one."""
    (tmp_path / "sign.py").write_text(EXAMPLE)
    mode, artifact = f"{tmp_path / 'sign.py'}:SignSGD", str(run / "final_model.int6.ptz")
    done = finish(run, env | dict(MODEL_PATH=artifact, TTT_MODE=mode))
    trained = json.loads((run / "result.json").read_text())
    assert done.result["bytes_code"] == trained["bytes_code"] + len(EXAMPLE.encode())
    digest = train_gpt.sha256_file(tmp_path / "sign.py")
    assert done.result["sha256_code"] == trained["sha256_code"] | {"sign.py": digest}
    assert (run / "source" / "sign.py").read_text() == EXAMPLE
    assert (
        done.result["settings"]["ttt_mode"] == mode and f"  TTT_MODE={mode} (given)" in done.out.splitlines()
    )
    assert math.isfinite(done.result["ttt_gain_bpb"]) and done.result["ttt_gain_bpb"] != 0
    record = check.read_record(run)
    assert any(
        v.rule == "legality" and v.status == "fail" and mode in v.evidence for v in check.check(record)
    )
    recipe = tmp_path / "other.env"
    recipe.write_text(f"TTT_MODE={mode}\n")
    assert eval_ttt.main([], env | dict(MODEL_PATH=artifact, RECIPE=str(recipe))) == 2
    with pytest.raises(train_gpt.UserError, match="TTT_MODE"):
        train_gpt.load_config(env | dict(TTT_MODE=mode))
    config = replace(train_gpt.load_config(env)[0], ttt_mode=mode)
    with pytest.raises(train_gpt.UserError, match="environment"):
        eval_ttt.Adaptation(SimpleNamespace(), SimpleNamespace(config=config, nll_fn=None, plugin=None,
                                                               batch_seqs=lambda: 1), [], print)  # fmt: skip
    capsys.readouterr()


def saved(value: object) -> bytes:
    blob = io.BytesIO()
    torch.save(value, blob)
    return blob.getvalue()


BROKEN = {
    "text": b"no weights\n", "empty": b"", "another object": saved([1, torch.zeros(3)]), "a number": saved(3),
    "another model": saved({"weight": torch.zeros(3)}), "a program": pickle.dumps(os.system),
    "a zip without data": b"PK\x05\x06" + bytes(18), "cut off": saved(torch.zeros(3000))[:5000],
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_weights_that_cannot_be_read_end_with_2_and_a_line(content, env, run, capsys):
    (run / "broken.pt").write_bytes(content)
    assert eval_ttt.main([], env | {"MODEL_PATH": str(run / "broken.pt")}) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: MODEL_PATH={run / 'broken.pt'} ") and error.count("\n") == 1


def test_arguments(capsys):
    assert eval_ttt.main(["--help"], {}) == 0 and "  TTT_MODE=doc_banks " in capsys.readouterr().out
    for argv in (["--adapt"], ["--audit=x"], ["--audit", "7"]):
        assert eval_ttt.main(argv, {}) == 2 and argv[0] in capsys.readouterr().err
