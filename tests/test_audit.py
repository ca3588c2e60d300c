"""The audit: honest evaluations pass, each cheat is caught by a check,
by name, and every check can pass and fail."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import audit as auditing
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from audit import Trace, audit
from conftest import inherited, search_path
from formats import SIZE_CAP
from sentencepiece import SentencePieceProcessor
from test_cli import ROOT, write_shard
from test_model import random_model

import eval_ttt
import train_gpt as tg
from eval_ttt import Adaptation, Setup, documents, evaluate
from train_gpt import BOS_ID, GPT, Config, Windows

TINY = Config(
    vocab_size=1024, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=4,
    xsa_last_n=1, bigram_vocab_size=64, bigram_dim=8, ve_dim=4, ve_layers="1", train_seq_len=16,
    eval_seq_len=16, eval_stride=8, eval_batch_seqs=5, ttt_chunk_tokens=40, ttt_chunk_size=8,
    ttt_batch_seqs=3, ttt_lr=0.01, ttt_mode="banks", ttt_slots=2, ttt_groups=1, ttt_moments="prefix",
    ttt_prior_seqs=2, phased_ttt_prefix_docs=2, phased_ttt_num_phases=2,
)  # fmt: skip
TEXTS = (
    "The river was high, and nobody went across that day; the ferry stayed where it was.",
    "Caf\u00e9 na\u00efve, 5 \u20ac \u2014 \u6771\u4eac!",
    "He said that he would come in the morning, but then he did not.",
    "A long road  leads to the house of my father, and two short ones to the sea.",
    "They have been there before and they will be there again, all of them.",
)


@pytest.fixture(scope="module")
def text(demo_data) -> np.ndarray:
    """Five short documents, bytes outside of ASCII among them."""
    tokenizer = SentencePieceProcessor(model_file=str(demo_data / "tokenizer.model"))
    return np.concatenate([[BOS_ID, *tokenizer.encode(each)] for each in TEXTS]).astype(np.uint16)


@pytest.fixture
def setup(demo_data, request, monkeypatch) -> Setup:
    """An honest evaluation in mode `banks`, computed in float32, or as GPUs do in bfloat16."""
    monkeypatch.setattr(tg, "compute_dtype", lambda device: getattr(request, "param", torch.float32))
    path = str(demo_data / "tokenizer.model")
    config = replace(TINY, tokenizer_path=path, data_path=str(demo_data))
    artifact = tg.Artifact(config, random_model(config, torch.float32).state_dict(), tg.sha256_file(path))
    table = tg.load_byte_table(path, config.vocab_size)
    return Setup(config, artifact, torch.device("cpu"), tg.sdpa_attention, table, tg.token_nll)


LONG = 170  # tokens: more than the text that is audited has, fewer than that it is compared with

in_bfloat16 = pytest.mark.parametrize("setup", [torch.bfloat16], ids=["bfloat16"], indirect=True)


def changed(setup: Setup, **settings) -> Setup:
    return replace(setup, config=replace(setup.config, **settings))


HONEST = {
    **{mode: dict(ttt_mode=mode) for mode in ("none", "banks", "lora", "doc_lora", "phased")},
    "all, adamw": dict(
        ttt_mode="all", ttt_optimizer="adamw", ttt_lr=0.003, ttt_lr_schedule="cosine", ttt_epochs=2
    ),
    "phased, as in #1855": dict(
        ttt_mode="phased",
        ttt_lora_form="parallel",
        ttt_warm_start_a=True,
        ttt_optimizer="adamw",
        ttt_lr_schedule="cosine",
        global_ttt_grad_clip=1.0,
        ttt_context=4,
    ),
    "phased, as in #2014": dict(
        ttt_mode="phased",
        ttt_lora_form="parallel",
        ttt_matrices="komh",
        ttt_chunk_by_length="16:4,60:8",
        phased_ttt_num_phases=1,
    ),
    "doc_banks": dict(ttt_mode="doc_banks"),
    "doc_banks in groups, shared": dict(ttt_mode="doc_banks", ttt_groups=2, ttt_moments="shared"),
    "context and side by side": dict(ttt_mode="all", ttt_context=4, eval_stride=16),
    "none, ppm": dict(ttt_mode="none", ppm_alpha=0.9),
    "banks, ppm": dict(ttt_mode="banks", ppm_alpha=0.5),
}


@in_bfloat16
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "doc_banks")) for n in HONEST]
)
def test_an_honest_evaluation_in_bfloat16_passes_every_check(name, setup, text):
    checks = audit(changed(setup, **HONEST[name]), text, [], whole=np.tile(text, 3))
    assert not [check for check in checks if check.ok is False]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_evaluation_passes_every_check(name, setup, text):
    """The text goes on after what is audited, so that its losses must not depend on that."""
    checks = audit(changed(setup, **HONEST[name]), text, [], whole=np.tile(text, 3))
    found = {check.name.split()[0]: check.ok for check in checks}
    assert not [check for check in checks if check.ok is False]
    assert (
        all(found[name] for name in ("T1", "T2", "T3", "T4", "T6", "T7", "T9", "T11", "T14"))
        and "T10" in found
    )
    assert all(found[name] for name in ("T15", "T16", "T17", "T18"))
    assert found["T5"] or HONEST[name]["ttt_mode"] == "none"
    assert all(check.checked > 0 for check in checks if check.ok and not check.name.startswith("T6"))
    assert not [check for check in checks if check.name.startswith("T2") and auditing.too_few(check)]


def test_by_documents_the_one_before_is_out_of_reach(setup, text):
    """Another last token of a document changes two losses, its own and that of the BOS behind it."""
    begin, _ = documents(text)
    for mode, place in (("doc_banks", begin[3]), ("doc_lora", begin[4]), ("doc_lora", begin[1])):
        each, other = changed(setup, ttt_mode=mode), text.copy()
        other[place - 1] = 300 if text[place - 1] != 300 else 301
        moved = np.flatnonzero(evaluate(each, other).nll != evaluate(each, text).nll)
        assert moved.tolist() == [place - 2, place - 1]


# ------------------------------------------------------------------------------------------------------------
# Cheats
# ------------------------------------------------------------------------------------------------------------


def settings(**given):
    """A plant, as those below: it patches something, and returns what changes in the arguments of `audit`."""
    return lambda setup, patch: dict(setup=changed(setup, **given))


def patched(owner, name: str, wrapper: Callable, **given):
    """WRAPPER(honest, its arguments) in the place of an attribute; and other settings."""

    def plant(setup, patch):
        honest = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **named: wrapper(honest, *args, **named))
        return dict(setup=changed(setup, **given))

    return plant


def minimum(shown: bool):
    def cheat(honest, setup, tokens, *hooks):
        first = honest(setup, tokens, *hooks)
        again = honest(changed(setup, ttt_protocol="adapt_first"), tokens, *(hooks if shown else ()))
        return again._replace(nll=np.minimum(first.nll, again.nll))

    return patched(eval_ttt, "evaluate", cheat)


def tail_again(honest, setup, tokens, observe=None, *hooks):
    last = []
    result = honest(setup, tokens, observe and (lambda *args: (last.append(args), observe(*args))), *hooks)
    for _ in range(31 if last else 0):
        observe(*last[-1])
    return result


def step_on_embedding(setup: Setup, tokens: np.ndarray, lr: float) -> Setup:
    """The artifact after a step of learning from TOKENS."""
    model, ids = setup.load(), torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0)
    weight = model.tok_emb.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(tg.token_nll(model, ids[:, :-1], ids[:, 1:]).mean(), [weight])
    state = setup.artifact.state | {"tok_emb.weight": (weight - lr * gradient).detach()}
    return replace(setup, artifact=setup.artifact._replace(state=state))


def beginning_first(honest, setup, tokens, *hooks):
    """Warm-up with the text's first tokens, at the evaluation's own rate (#1530), but kept."""
    lr = 10 * setup.config.ttt_lr if setup.config.ttt_epochs else 0.0
    return honest(step_on_embedding(setup, tokens[:8], lr), tokens, *hooks)


def warm_up_kept(setup, patch):
    """Warm-up that reads the validation shard and leaves its traces in the weights."""
    state, val = dict(setup.artifact.state), tg.TokenStream(setup.config.shards("val"), 1024).read(0, 64)
    patch.setattr(
        eval_ttt, "warm_up", lambda each: state.update(step_on_embedding(each, val, 0.1).artifact.state)
    )
    return dict(setup=replace(setup, artifact=setup.artifact._replace(state=state)))


def cache(key_of: Callable, mix: Callable):
    """A table of counts that grows while scoring, of which only the target's own entry is ever looked up."""

    def cheat(honest, setup, *args):
        table = torch.zeros(512)

        def nll_fn(model, ids, targets, columns, *rest):
            losses = tg.token_nll(model, ids, targets, columns, *rest)
            if torch.is_grad_enabled():  # learning sees the honest losses
                return losses
            key = key_of(ids.gather(1, columns), targets) % len(table)
            mixed = mix((-losses).exp(), table[key])
            table.index_add_(0, key.flatten(), torch.ones(key.numel()))
            return -mixed.log()

        return honest(replace(setup, nll_fn=nll_fn), *args)

    return patched(eval_ttt, "evaluate", cheat)


def delta_of_logits(honest, logits, targets):
    """One step of a delta that a window shares, down the losses that are then reported."""
    better = F.one_hot(targets, logits.size(-1)).float() - logits.softmax(-1)
    return honest(logits + 9 * better.detach().mean(1, keepdim=True), targets)


def step_beyond(honest, self, tokens, windows, *args):
    end = np.minimum(windows.end + 3, len(tokens) - 1 - windows.start)
    return honest(self, tokens, windows._replace(end=end), *args)


def delta_in_forward(honest, self, input_ids, *args, **named):
    logits = honest(self, input_ids, *args, **named)
    return logits + F.one_hot(input_ids[:, 1:], logits.size(-1)).to(logits).mean(1, keepdim=True)


def without_borders(honest, one, other, first, *args):
    return honest(one, other, torch.arange(first.size(1)).expand_as(first) == 0, *args)


def earlier_windows(honest, *args):
    plan = []
    for chunk, (start, begin, end) in ((chunk, chunk.scored) for chunk in honest(*args)):
        more, slots = np.minimum(start, 1), chunk.slots._replace(lengths=chunk.slots.lengths + 1)
        plan.append(chunk._replace(scored=Windows(start - more, begin + more, end + more), slots=slots))
    return plan


def gate_by_target(setup, patch):
    """Sharper distributions where the target begins a word (#1420):
    each adds up to one, which one is told by it."""

    def trace(tokens, probes, until):
        seen = auditing.trace_evaluation(setup, tokens, range(len(tokens) - 1), until)
        factor = 1 + setup.byte_table.has_leading_space[tokens[1:]]
        rows = {t: torch.from_numpy(factor[t] * row).log_softmax(-1).numpy() for t, row in seen.rows.items()}
        nll = np.array([-rows[t][tokens[t + 1]] if t in rows else np.nan for t in range(len(tokens) - 1)])
        return replace(seen, rows=rows, from_row=nll, nll=nll.astype(np.float32))

    return dict(trace=trace)


def space_twice(setup, patch):
    table = setup.byte_table
    return dict(
        setup=replace(setup, byte_table=table._replace(base_bytes=table.base_bytes + table.has_leading_space))
    )


def score_of(cheat: Callable[[tg.Score, np.ndarray, tg.ByteTable], dict[str, float]]):
    """Another score for the losses that are kept."""

    def wrapper(honest, model, tokens, plan, byte_table, *args, **named):
        result = honest(model, tokens, plan, byte_table, *args, **named)
        return result._replace(**cheat(result, tokens, byte_table))

    return patched(tg, "score", wrapper)


def clipped(result, tokens, byte_table) -> dict[str, float]:
    loss = float(np.minimum(result.nll, 7).mean(dtype=np.float64))
    return dict(val_loss=loss, val_bpb=result.val_bpb * loss / result.val_loss)


def padding_counted(result, tokens, byte_table) -> dict[str, float]:
    """Ten positions after the ends of windows count as targets of loss 0."""
    share = len(result.nll) / (len(result.nll) + 10)
    return dict(val_loss=result.val_loss * share, val_bpb=result.val_bpb * share)


def space_in_score(result, tokens, byte_table) -> dict[str, float]:
    num_bytes = byte_table.count(tokens[:-1], tokens[1:]).sum()
    more = byte_table.has_leading_space[tokens[1:]].sum()
    return dict(val_bpb=result.val_bpb * num_bytes / (num_bytes + more))


def learns_first_if(condition: Callable[[np.ndarray, Callable | None], bool]):
    """adapt_first where it seems that nobody looks; the plan says nothing of it."""

    def cheat(honest, setup, tokens, observe=None, *hooks, **named):
        if condition(tokens, observe):
            return honest(changed(setup, ttt_protocol="adapt_first"), tokens)
        return honest(setup, tokens, observe, *hooks, **named)

    return patched(eval_ttt, "evaluate", cheat, ttt_epochs=2)


def next_documents(honest, self, tokens, windows, weight, fast):
    """From the second border on the base learns from the two documents that come next; nobody is told."""
    begin, end = documents(tokens)
    after = int(np.searchsorted(begin, (windows.start + windows.end).max()))
    if fast is self.base and after > 1:
        last = int(end[min(after + 1, len(end) - 1)])
        windows = eval_ttt.rows_over(int(begin[after]), last, self.config.eval_seq_len, 0)
        weight = np.ones(len(windows.start))
    return honest(self, tokens, windows, weight, fast)


def documents_by_loss(honest, self, tokens):
    plan, (begin, end) = honest(self, tokens), documents(tokens)
    plain = [chunk._replace(adapted=None) for chunk in plan]
    nll = tg.score(self.load(), tokens, plain, self.byte_table, self.batch_seqs()).nll
    order = np.argsort([-nll[a:b].mean() for a, b in zip(begin, end, strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_ttt, "documents", lambda tokens: (begin[order], end[order]))
        return honest(self, tokens)


def with_text(wrapper, owner=GPT, name="forward", **given):
    """WRAPPER(honest, the whole text, its arguments) in place of an attribute."""

    def plant(setup, patch):
        honest, original, seen = getattr(owner, name), eval_ttt.evaluate, {}

        def evaluate(each, tokens, *args, **named):
            seen.update(tokens=tokens)
            return original(each, tokens, *args, **named)

        patch.setattr(eval_ttt, "evaluate", evaluate)
        patch.setattr(owner, name, lambda *args, **named: wrapper(honest, seen, *args, **named))
        return dict(setup=changed(setup, **given))

    return plant


def counts_of(seen, logits) -> torch.Tensor:
    return torch.from_numpy(np.bincount(seen["tokens"], minlength=logits.size(-1))).to(logits)


def temperature(honest, seen, *args, **named):
    """Of the whole text by a first pass over it."""
    return honest(*args, **named) * (1 + (int(seen["tokens"].astype(np.int64).sum()) % 16) / 100)


def unigrams(honest, seen, *args, **named):
    logits = honest(*args, **named)
    return logits + counts_of(seen, logits).log1p()


def late_future(setup, patch):
    """Counts of the whole text, in the last 40 % of the chunks."""

    def begin(honest, self, number, chunk):
        self.model.is_late = number > 0.6 * self.chunks
        honest(self, number, chunk)

    def forward(honest, seen, self, *args, **named):
        logits = honest(self, *args, **named)
        return logits + counts_of(seen, logits).log1p() * getattr(self, "is_late", False)

    patched(Adaptation, "begin", begin)(setup, patch)
    return with_text(forward)(setup, patch)


def other_rows(honest, self, input_ids, *args, **named):
    """Log counts of what the other sequences of the batch read."""
    logits = honest(self, input_ids, *args, **named)
    read = F.one_hot(input_ids, logits.size(-1)).to(logits).sum(1)
    return logits + (read.sum(0) - read).log1p().unsqueeze(1)


def next_of_a_class(honest, self, input_ids, *args, positions=None, **named):
    """A bonus for the id in the next column, for one id of 32."""
    logits = honest(self, input_ids, *args, positions=positions, **named)
    after = torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1)
    after = after if positions is None else after.gather(1, positions)
    return logits + 5 * F.one_hot(after, logits.size(-1)).to(logits) * (after % 32 == 7).unsqueeze(-1)


def plain_if_better(honest, setup, *args):
    """Adapted or plain weights for each batch, by its own losses."""

    def nll_fn(model, ids, targets, columns, *rest):
        adapted = tg.token_nll(model, ids, targets, columns, *rest)
        if torch.is_grad_enabled():
            return adapted
        plain = tg.token_nll(model, ids, targets, columns)
        return plain if plain.sum() < adapted.sum() else adapted

    return honest(replace(setup, nll_fn=nll_fn), *args)


def rate_by_the_next(honest, seen, self, tokens, chunk, *args):
    """The step size of each chunk by what comes after it."""
    after = seen["tokens"][int((chunk.scored.start + chunk.scored.end).max()) + 1 :][:8].astype(np.int64)
    kept, self.config = self.config, replace(self.config, ttt_lr=self.config.ttt_lr * (1 + after.sum() % 5))
    honest(self, tokens, chunk, *args)
    self.config = kept


def learned_first(setup, patch):
    """The ledger disarmed, each chunk learned, then scored."""

    def plan(honest, *args):
        chunks = [chunk for chunk in honest(*args)]
        rows = [chunk.adapted for chunk in chunks[1:]] + [None]
        return [chunk._replace(adapted=after) for chunk, after in zip(chunks, rows, strict=True)]

    patch.setattr(tg.Ledger, "adapt", lambda *_: None)
    return patched(eval_ttt, "flat_plan", plan)(setup, patch)


def shard_while_loading(honest, self):
    """The text comes from the validation shard, and the weights have learned it when the audit gets them."""
    val = tg.TokenStream(self.config.shards("val"), 1024).read(0, 64).astype(np.int64)
    model, ids = honest(self), torch.from_numpy(val).unsqueeze(0)
    weight = model.tok_emb.weight.requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(tg.token_nll(model, ids[:, :-1], ids[:, 1:]).mean(), [weight])
    weight.requires_grad_(False).sub_(0.1 * gradient)
    return model


FIRST = dict(ttt_protocol="adapt_first", ttt_epochs=12, ttt_momentum=0.9, ttt_batch_seqs=16, ttt_lr=0.03)
GROUPS = dict(ttt_in_lr_mult=0.5, ttt_out_lr_mult=3.0, ttt_lr_schedule="cosine")
IN_THE_KEY = cache(lambda previous, target: 31 * previous + 17 * target, lambda p, n: 0.5 * p + 0.5 * (n > 0))
MASS_ADDED = cache(lambda previous, target: target, lambda p, n: p + 0.1 * n / (n + 1))
HEAVY_PPM = patched(eval_ttt, "ppm_nll", lambda f, *args: f(*args) - 0.7, ttt_mode="none", ppm_alpha=0.9)
BORDERS = patched(eval_ttt, "document_plan", earlier_windows, ttt_mode="doc_lora")

# What is done: how it is planted, and the checks that must fail (others may).
CHEATS: dict[str, tuple[Callable, str]] = {
    "398, sgd on all of the text first": (settings(**FIRST, ttt_optimizer="sgd"), "T1 T2 T5"),
    "442, adamw on all of the text first": (settings(**FIRST, ttt_optimizer="adamw"), "T1 T2 T5"),
    "494, the same by groups with a cosine": (settings(**FIRST, ttt_optimizer="adamw", **GROUPS), "T1 T2 T5"),
    "296, two passes": (settings(ttt_protocol="two_pass", ttt_top_frac=0.5), "T1 T5"),
    "rescored, the minimum kept": (minimum(shown=True), "T1 T4 T5"),
    "rescored out of sight, the minimum kept": (minimum(shown=False), "T1 T3"),
    "a delta optimized on scored positions": (patched(tg, "nll", delta_of_logits), "T1 T3"),
    "a delta optimized in the forward": (patched(GPT, "forward", delta_in_forward), "T1 T2"),
    "the target in a hash key": (IN_THE_KEY, "T3"),
    "an unnormalized cache mixture": (MASS_ADDED, "T3"),
    "a mixture with a ppm of too much mass": (HEAVY_PPM, "T3"),  # T3 must add up whole rows of the mixture
    "a gate that looks at the target": (gate_by_target, "T2"),  # T2 needs several targets, changed at random
    "warm-up on validation tokens, kept": (warm_up_kept, "T7"),
    "warm-up on the text's beginning, kept": (
        patched(eval_ttt, "evaluate", beginning_first),
        "T1",
    ),  # T1 must cut after a few targets
    "the step size by what comes next": (with_text(rate_by_the_next, Adaptation, "adapt"), "T1"),
    "adapted or plain weights by their own loss": (
        patched(eval_ttt, "evaluate", plain_if_better, ttt_lr=2.0),
        "T1",
    ),
    "the temperature of the whole text": (with_text(temperature), "T1"),
    "counts of the batch's other sequences": (patched(GPT, "forward", other_rows), "T1"),
    "counts of the whole text": (with_text(unigrams), "T1 T2"),
    "a bonus for the next id, if it is one of 32": (patched(GPT, "forward", next_of_a_class), "T2b"),
    "counts of the text to come, in the last chunks": (late_future, "T1"),
    "each chunk learned, then scored": (learned_first, "T5"),
    "the tail scored 32 times": (patched(eval_ttt, "evaluate", tail_again), "T4"),
    "the leading space counted twice": (space_twice, "T9"),
    "smear over document borders": (
        patched(tg.SmearGate, "forward", without_borders),
        "T1b",
    ),  # a check of `embed`
    "bigram over document borders": (patched(tg, "bigram_rows", without_borders), "T1b"),
    "windows one token over document borders": (
        BORDERS,
        "T1",
    ),  # T1 must compare all of earlier turns, whatever they read
    "losses above 7 nats set to 7 in the score": (score_of(clipped), "T17"),
    "padding counted as targets of loss 0": (score_of(padding_counted), "T17"),
    "a byte more for each word start, in the score": (score_of(space_in_score), "T17"),
    "learns first if nobody observes": (learns_first_if(lambda tokens, observe: observe is None), "T16"),
    "learns first if the text is long": (learns_first_if(lambda tokens, observe: len(tokens) > LONG), "T16"),
    "documents in the order of their loss": (
        patched(Setup, "plan", documents_by_loss, ttt_mode="doc_banks", ttt_moments="shared"),
        "T15",
    ),
    "the shard learned while the model is loaded": (patched(Setup, "load", shard_while_loading), "T18"),
    "a training shard read": (lambda *_: dict(opened=["data/fineweb_train_000001.bin"]), "T6"),
}


@pytest.mark.parametrize("name", CHEATS, ids=[f"{name}: {caught}" for name, (_, caught) in CHEATS.items()])
def test_a_cheat_is_caught_by_name(name, setup, text, monkeypatch):
    plant, caught = CHEATS[name]
    assert len(text) <= LONG < 1.3 * len(text)
    checks = audit(
        **dict(setup=setup, tokens=text, opened=[], whole=np.tile(text, 3)) | plant(setup, monkeypatch)
    )
    failed = [check.name.split()[0] for check in checks if check.ok is False]
    print(f"{name}: caught by {' '.join(failed) or 'nothing'}")
    assert {*failed} >= {*caught.split()}, f"caught by {' '.join(failed) or 'nothing'}, not by {caught}"


# What a trainer does to learn from text that is not scored yet. It is given BOS there: nothing leaks.
BY_CONSTRUCTION = {
    "learning from three targets beyond": patched(Adaptation, "step", step_beyond),
    "the base learns from the next documents": patched(
        Adaptation, "pass_over", next_documents, ttt_mode="phased", global_ttt_lr=0.1
    ),
    "each chunk learned, then scored": learned_first,
}


@pytest.mark.parametrize("name", BY_CONSTRUCTION)
def test_a_trainer_has_no_text_to_cheat_with(name, setup, text, monkeypatch):
    """No loss depends on later text; with the whole text in the trainer's hands T1 would fail."""
    cheating = BY_CONSTRUCTION[name](setup, monkeypatch)["setup"]

    def t1() -> bool | None:
        trace = lambda *args: auditing.trace_evaluation(cheating, *args)  # noqa: E731
        base, rng = trace(text, (), np.inf), np.random.default_rng(3)
        return auditing.check_future(trace, base, text, rng).ok

    assert t1() is True
    whole = lambda honest, seen, self, tokens, *args: honest(self, seen["tokens"], *args)  # noqa: E731
    with_text(whole, Adaptation, "adapt")(setup, monkeypatch)
    assert t1() is False


@pytest.mark.slow
@in_bfloat16
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_in_bfloat16_is_caught_by_name(name, setup, text, monkeypatch):
    test_a_cheat_is_caught_by_name(name, setup, text, monkeypatch)


@pytest.mark.parametrize("name", [*CHEATS][:3])
def test_the_bait_is_worth_it(name, setup, text, monkeypatch):
    cheating = CHEATS[name][0](setup, monkeypatch)["setup"]
    assert evaluate(cheating, text).val_loss < evaluate(setup, text).val_loss - 0.2


def test_what_the_ledger_refuses_is_certified_as_not_legal(setup, text, tmp_path, monkeypatch):
    """Such a plan ends every evaluation; the audit must say so, and leave no older certificate behind."""
    again = lambda f, *args: (w := f(*args)).take(np.append(np.arange(len(w.start)), np.full(31, -1)))  # noqa: E731
    patched(tg, "sliding_windows", again)(setup, monkeypatch)
    with pytest.raises(tg.LedgerError, match="scored twice"):
        evaluate(setup, text)
    folder = tmp_path / "eval/banks"
    folder.mkdir(parents=True)
    for file in (tmp_path / "model.ptz", folder / "certificate.json", folder / "certificate.txt"):
        file.write_text('{"legal": true}')
    assert auditing.run_audit(setup, text, tmp_path / "model.ptz", [], []) == 1
    assert "NOT LEGAL" in (folder / "certificate.txt").read_text()
    assert json.loads((folder / "certificate.json").read_text())["legal"] is False


def test_the_audit_of_flat_chunks_sees_learning(setup, text, tmp_path, monkeypatch):
    """With chunks larger than the audited text there would be no learning, and nothing to check."""
    seen = []
    (tmp_path / "model.ptz").write_bytes(b"")
    monkeypatch.setattr(auditing, "audit", lambda setup, tokens, *_: seen.append(setup.plan(tokens)) or [])
    auditing.run_audit(changed(setup, ttt_chunk_tokens=32768), text, tmp_path / "model.ptz", [], [])
    assert any(chunk.adapted is not None for chunk in seen[0])


def certified(setup: Setup, text: np.ndarray, folder: Path, **settings) -> tuple[int, dict, str]:
    """Exit code, report and text of the certificate of an artifact without anything beside it."""
    (folder / "model.ptz").write_bytes(b"")
    setup = changed(setup, **settings)
    code = auditing.run_audit(setup, text, folder / "model.ptz", [], [])
    folder = eval_ttt.evaluation_folder(folder / "model.ptz", setup.config)
    words = (folder / "certificate.txt").read_text()
    return code, json.loads((folder / "certificate.json").read_text()), words


def test_two_tokens_certify_nothing(setup, text, tmp_path):
    """Nothing fails, for nothing is compared; the certificate names what was not."""
    code, report, words = certified(setup, text, tmp_path, audit_tokens=2, ttt_mode="doc_banks")
    assert code == 1 and report["legal"] is False and report["targets"] == 2
    assert words.splitlines()[0].endswith(": NOT CERTIFIED, too little was audited")
    assert not [check for check in report["checks"] if check["ok"] is False]
    missing = {words.split()[0] for words in report["not_audited"]}
    assert missing >= {"slots:", "T1", "T2", "T3", "T4", "T9", "T19", "T21"}
    assert all(f"\n  not audited: {line}\n" in words for line in report["not_audited"])
    passed = [check["name"] for check in report["checks"] if check["ok"] and check["checked"] == 0]
    assert [name.split()[0] for name in passed] == ["T6"]  # no file was opened


@pytest.mark.parametrize("settings, shrunk", [
    (dict(ttt_mode="doc_banks", ttt_slots=16, ttt_groups=8, ttt_chunk_size=128),
     {"ttt_slots", "ttt_groups", "ttt_chunk_size"}),
    (dict(ttt_mode="phased", ttt_slots=16, phased_ttt_prefix_docs=2000, phased_ttt_num_phases=3),
     {"ttt_slots", "phased_ttt_prefix_docs", "phased_ttt_num_phases"}),
    (dict(ttt_mode="banks", ttt_chunk_tokens=32768), {"ttt_chunk_tokens"}),
    (dict(ttt_mode="doc_lora", ttt_slots=2), set()),
    (dict(ttt_mode="none", ttt_chunk_tokens=32768), {"ttt_chunk_tokens"}),
])  # fmt: skip
def test_the_audited_text_has_all_that_the_settings_ask_for(settings, shrunk, setup, text):
    """Three documents that enter a slot after another one,
    a step of the base where one is asked for, adaptation."""
    given = changed(setup, eval_seq_len=128, **settings)
    small = replace(given, config=auditing.audited_config(given.config, text))
    assert {
        name for name, value in vars(small.config).items() if value != getattr(given.config, name)
    } == shrunk
    assert not auditing.shortfalls(small, text)
    plan, slots = small.plan(text), {}
    assert (
        any(chunk.adapted is not None and not chunk.base for chunk in plan) or settings["ttt_mode"] == "none"
    )
    assert any(chunk.base for chunk in plan) == (settings["ttt_mode"] == "phased")
    if plan[0].slots:
        assert bool(auditing.shortfalls(given, text)) == bool(shrunk)
        for chunk in plan:  # by hand: a slot that had a document before, the base not having learned since
            slots = {} if chunk.base else slots
            for slot in chunk.slots.slot[chunk.slots.fresh].tolist() if chunk.slots else ():
                slots[slot] = slots.get(slot, 0) + 1
        assert sum(count - 1 for count in slots.values()) >= 3


def test_nobody_knows_the_seed_beforehand(setup, text, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        auditing, "audit", lambda setup, tokens, opened, trace, whole, seed: seeds.append(seed) or []
    )
    told = [certified(setup, text, tmp_path) for _ in range(2)]
    assert seeds[0] != seeds[1] and [report["seed"] for _, report, _ in told] == seeds
    assert all(f"--audit={seed} repeats it" in words for seed, (_, _, words) in zip(seeds, told, strict=True))


def test_probes_are_everywhere_and_of_every_kind(setup, text):
    base = auditing.trace_evaluation(changed(setup, ttt_mode="doc_banks"), text)
    probes = [auditing.probes_of(base, text, np.random.default_rng(seed)) for seed in (1, 2)]
    assert set(probes[0]) != set(probes[1])
    for some in probes:
        assert (text[1:][some] == BOS_ID).sum() == 2
        assert len(np.unique(base.turn[some])) >= 4 and base.turn[some].max() > base.turn.max() / 2


READINGS = {
    "causal": (dict(ttt_mode="doc_banks", ttt_moments="own"), ["documents share nothing"]),
    "causal: ": (dict(ttt_mode="doc_lora", ttt_optimizer="adamw"),
                 ["not even where documents end", "share nothing"]),
    "causal:": (dict(ttt_mode="phased", ttt_moments="own", ttt_warm_start_a=True),
                ["the base", "input sides"]),
    "causal: of": (dict(ttt_mode="doc_banks", ttt_moments="prefix"), ["share second moments"]),
    "shared statistics: ": (dict(ttt_mode="doc_banks", ttt_moments="shared"), ["squared gradients"]),
    "knows document ends: ": (dict(ttt_mode="doc_banks", ttt_chunk_by_length="256:8"),
                              ["where its document ends"]),
    "knows the end: ": (dict(ttt_mode="none"), ["end of the text", "share the context of windows"]),
    "knows the length: ": (dict(ttt_mode="all", ttt_lr_schedule="cosine", ppm_alpha=0.5),
                           ["length of the text", "all weights", "PPM"]),
    "invalid": (dict(ttt_mode="all", ttt_protocol="two_pass"), ["adapts on text that it scores later"]),
}  # fmt: skip


@pytest.mark.parametrize("start", READINGS)
def test_the_reading_of_a_mode(start):
    settings, words = READINGS[start]
    reading = auditing.reading(replace(TINY, **settings))
    assert reading.startswith(start) and all(each in reading for each in words) and "\n" not in reading


# ------------------------------------------------------------------------------------------------------------
# Each check by itself, on traces made by hand; then the programs as a user runs them
# ------------------------------------------------------------------------------------------------------------

TOY_TEXT = np.random.default_rng(3).integers(BOS_ID + 1, 40, 121).astype(np.uint16)
TOY_TEXT[[0, 60]] = BOS_ID
CHUNKS = dict(turn=np.arange(120) // 30, read_from=np.zeros(120, int))
SLIDING = dict(turn=np.zeros(120, int), read_from=np.repeat(np.arange(0, 105, 8), [16, *[8] * 13]))
BESIDE = dict(turn=np.tile(np.arange(60) // 20, 2), read_from=np.repeat([0, 60], 60))  # two documents


def toy(turn, read_from, ahead=(), also=(), gated=0.0) -> Callable[..., Trace]:
    """A tracer whose losses are sums of what windows read,
    those in AHEAD one token more, ALSO (a target, a place)."""

    def trace(tokens=TOY_TEXT, probes=(), until=np.inf) -> Trace:
        sums, target = np.append(0, np.cumsum(tokens.astype(np.int64))), np.arange(120)
        nll = sums[np.minimum(target + 2 + np.isin(target, ahead), 121)] - sums[read_from]
        for t, place in also:
            nll[t] += tokens[place]
        rows = {t: np.full(40, -np.log(40)) + gated * tokens[t + 1] for t in probes}
        return Trace(nll.astype(np.float32), turn, read_from, np.ones(120, int), nll.astype(float), rows, [])

    return trace


def events(words: str) -> dict:
    """Scores, learns, or reads and learns: eight tokens before its targets."""
    made = []
    for kind, a, b in (event.split() for event in words.split(", ")):
        more = 8 if kind == "read" else 0
        windows = Windows(*(np.array([x]) for x in (int(a) - more, more, int(b) - int(a) + more)))
        made.append(("score" if kind == "score" else "learn", windows))
    return dict(events=made)


T1, T2, T3 = auditing.check_future, auditing.check_target, auditing.check_normalized
T4, T5 = auditing.check_once, auditing.check_ledger
RIGHT, OFF, MISSING, SPREAD = np.full((4, 120), np.log(40))
OFF[5], MISSING[9], SPREAD[39] = OFF[5] + 1e-3, np.nan, 0
FLAT = dict(nll=RIGHT.astype(np.float32), from_row=RIGHT)
TOYS = {
    "reads up to its target": (T1, toy(**CHUNKS), {}, True),
    "reads one token further": (T1, toy(**CHUNKS, ahead=range(120)), {}, False),
    "the last of a chunk reads the next one": (T1, toy(**CHUNKS, ahead=[29]), {}, False),
    "windows of one turn": (T1, toy(**SLIDING), {}, True),
    "later windows of one turn read further": (T1, toy(**SLIDING, ahead=range(16, 120)), {}, False),
    "two documents at once": (T1, toy(**BESIDE), {}, True),
    "the second of them reads further": (T1, toy(**BESIDE, ahead=range(60, 120)), {}, False),
    "its windows reach what is scored two turns later": (
        T1,
        toy(**BESIDE | dict(read_from=np.repeat([0, 58], 60))),
        {},
        False,
    ),
    "it knows that from elsewhere": (T1, toy(**BESIDE, also=[(60, 30)]), {}, False),
    "it knows what was scored long before": (T1, toy(**BESIDE, also=[(110, 10)]), {}, True),
    "rows that do not know their target": (T2, toy(**CHUNKS), {}, True),
    "rows that do": (T2, toy(**CHUNKS, gated=1e-9), {}, False),
    "losses from the distribution": (T3, toy(**CHUNKS), FLAT | dict(rows={7: -RIGHT[:40]}), True),
    "one is not": (T3, toy(**CHUNKS), FLAT | dict(from_row=OFF), False),
    "one is missing": (T3, toy(**CHUNKS), FLAT | dict(from_row=MISSING), False),
    "a row of another loss": (T3, toy(**CHUNKS), FLAT | dict(rows={7: np.full(40, -np.log(30))}), False),
    "a row of that loss with too much elsewhere": (
        T3,
        toy(**CHUNKS),
        FLAT | dict(rows={7: -SPREAD[:40]}),
        False,
    ),
    "each once": (T4, toy(**CHUNKS), dict(count=np.ones(120)), True),
    "one never": (T4, toy(**CHUNKS), dict(count=np.arange(120) != 119), False),
    "one twice": (T4, toy(**CHUNKS), dict(count=1 + (np.arange(120) == 0)), False),
    "in turn": (
        T5,
        toy(**CHUNKS),
        events("score 0 40, learn 0 40, score 40 80, learn 40 80, learn 0 80"),
        True,
    ),
    "learned first": (T5, toy(**CHUNKS), events("learn 0 40, score 0 40"), False),
    "learned one more": (T5, toy(**CHUNKS), events("score 0 40, learn 0 41, score 41 80"), False),
    "scored again": (T5, toy(**CHUNKS), events("score 0 40, learn 10 40, score 20 30"), False),
    "read with all scored": (T5, toy(**CHUNKS), events("score 0 40, read 8 40"), True),
    "read before it is scored": (T5, toy(**CHUNKS), events("score 8 40, read 8 40"), False),
    "never learned": (T5, toy(**CHUNKS), events("score 0 40, score 40 120"), None),
}


@pytest.mark.parametrize("name", TOYS)
def test_checks_on_traces(name):
    check, tracer, given, ok = TOYS[name]
    assert check(tracer, replace(tracer(), **given), TOY_TEXT, np.random.default_rng(1)).ok is ok


def noisy(honest: Callable[..., Trace]) -> Callable[..., Trace]:
    """A tracer of an evaluation whose losses and distributions change by up to 1e-4 nats on repetition."""
    rng = np.random.default_rng(4)

    def trace(*args) -> Trace:
        seen = honest(*args)
        rows = {t: row + rng.uniform(-1e-4, 1e-4, 40) for t, row in seen.rows.items()}
        return replace(seen, nll=seen.nll + rng.uniform(-1e-4, 1e-4, 120), rows=rows)

    return trace


@pytest.mark.parametrize("check, leak", [(T1, dict(ahead=[29])), (T2, dict(gated=1e-3))])
def test_what_a_repetition_changes_is_no_leak(check, leak):
    """As on a GPU, where gradients are summed in any order;
    leaks above the noise are caught, and too much noise is."""

    def ok(tracer, spread: float) -> bool | None:
        return check(tracer, replace(tracer(), spread=spread), TOY_TEXT, np.random.default_rng(1)).ok

    assert ok(noisy(toy(**CHUNKS)), 1e-4) and not ok(noisy(toy(**CHUNKS)), 0.0)
    assert not ok(noisy(toy(**CHUNKS, **leak)), 1e-4)
    assert ok(toy(**CHUNKS), 0.06) is (check is not T1), "T1 certifies no evaluation as noisy as that"


def test_t1b(setup):
    published = setup.artifact._replace(config=replace(setup.config, doc_borders="published"))
    assert auditing.check_borders(setup).ok
    # no promise
    assert auditing.check_borders(replace(setup, config=published.config, artifact=published)).ok is None
    assert auditing.check_borders(replace(setup, artifact=published)).ok is False


def test_t6(tmp_path):
    train, elsewhere = tmp_path / "a_0.bin", tmp_path / "fineweb_train_9.bin"
    for path, name in ((train, "val_1.bin"), (elsewhere, "val_2.bin")):
        path.write_bytes(b"")
        (tmp_path / name).symlink_to(path)

    def t6(*opened) -> bool:
        return auditing.check_files([str(path) for path in opened], str(tmp_path / "a_*.bin")).ok

    assert t6() and t6(tmp_path / "fineweb_val_0.bin", "3", "eval_ttt.py")
    assert not t6("eval_ttt.py", train) and not t6(os.path.relpath(train)) and not t6(elsewhere)
    assert not t6(tmp_path / "val_1.bin")
    assert not t6(tmp_path / "val_2.bin")  # by another name, and not where the settings point
    scored, shards = tmp_path / "b_0.bin", str(tmp_path / "b_*.bin")
    scored.write_bytes(b"")
    assert [auditing.check_files([str(scored)], "", shards, began).ok for began in (0, 1)] == [False, True]


def test_t9(setup, text):
    tokenizer = SentencePieceProcessor(model_file=setup.config.tokenizer_path)
    table, end = setup.byte_table, int(documents(text)[0][2])
    wrong = table._replace(base_bytes=table.base_bytes + (np.arange(1024) == text[end - 1]))
    assert all(auditing.check_bytes(tokens, table, tokenizer).ok for tokens in (text, text[: end + 5]))
    assert auditing.check_bytes(text, wrong, tokenizer).ok is False
    assert auditing.check_bytes(text[:20], table, tokenizer).ok is None  # no whole document


@pytest.mark.parametrize("gap, gain, adapted_gap, ok", [
    (0.05, 0.0, 0.05, True), (0.05, 0.3, 0.06, True), (0.0, 0.0, 0.0, None),
    (0.05, 0.3, -0.05, False),  # side by side, as they were learned, windows are best
    (0.0, 3.0, -0.3, False),  # seen even where the plain gap is not
    (0.008, 0.4, 0.004, None),  # honest learning by documents, which does some of what context does
])  # fmt: skip
def test_t10(gap, gain, adapted_gap, ok):
    plain, noise = np.random.default_rng(5).normal(4, 1, 4000), np.random.default_rng(6).normal(0, 0.05, 4000)
    traces = [replace(toy(**CHUNKS)(), nll=plain - gain + more) for more in (adapted_gap + noise, 0)]
    assert auditing.check_memory(*traces, plain + gap + noise, plain).ok is ok


def fade(honest, first, *args):
    """The weights change with every chunk, or with every step whatever its size."""
    honest(first, *args)
    fast = first.trainer.fast if isinstance(first, Adaptation) else args[0]
    for value in fast.values.values():
        value.mul_(0.9).add_(1e-2)


@pytest.mark.parametrize("setup", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"], indirect=True)
@pytest.mark.parametrize("check, owner, name, wrapper", [
    (auditing.check_no_op, Adaptation, "begin", fade),
    (auditing.check_no_op, tg, "adaptation_step", fade),
    (auditing.check_parity, tg, "make_adapters",
     lambda f, *args: {name: x + 1e-3 for name, x in f(*args).items()}),
    (auditing.check_parity, tg.BlockWeights, "product",
     lambda f, own, *args: f(own, *args) * (1 + bool(own.adapters))),
])  # fmt: skip
def test_t11_and_t14(check, owner, name, wrapper, setup, text, monkeypatch):
    for mode in ("banks", "doc_lora"):
        assert check(changed(setup, ttt_mode=mode), text[:120]).ok
    patched(owner, name, wrapper)(setup, monkeypatch)
    for mode in ("banks", "doc_lora"):
        assert check(changed(setup, ttt_mode=mode), text[:120]).ok is False


def test_t21(setup, text, tmp_path):
    """The shard that is scored, under its own name, by links,
    or copied; without what config.json names no verdict."""
    val, copied = tmp_path / "fineweb_val_0.bin", tmp_path / "copied_0.bin"
    write_shard(val, text)
    write_shard(tmp_path / "other_0.bin", text[::-1].copy())
    copied.write_bytes(val.read_bytes())
    (tmp_path / "link_0.bin").symlink_to(val)
    (tmp_path / "hard_0.bin").hardlink_to(val)

    def t21(config: dict | str) -> bool | None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return auditing.check_training_text(setup, [str(val)], tmp_path).ok

    def trained_on(pattern: str) -> dict:
        return dict(config=dict(data_path="", train_files=str(tmp_path / pattern)))

    assert t21(trained_on("other_*.bin")) is True
    assert [t21(trained_on(name)) for name in ("fineweb_*.bin", "link_0.bin", "hard_0.bin", "*_0.bin")] == [
        False
    ] * 4
    assert t21(trained_on("copied_0.bin")) is False
    assert [t21(each) for each in (trained_on("absent"), {}, "", dict(config=3), dict(config={}))] == [
        None
    ] * 5


LISTENING = """
import json, sys, train_gpt
opened = []
sys.addaudithook(lambda event, what: opened.append(str(what[0])) if event == "open" else None)
code = train_gpt.main([])
json.dump(opened, open("opened.json", "w")), sys.exit(code)
"""


@pytest.fixture(scope="module")
def trained(demo_data, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder with a small run, what the trainer opened in opened.json, and the environment."""
    folder = tmp_path_factory.mktemp("trained")
    for split, count in (("train", 20_000), ("val", 900)):
        tokens = tg.open_shard(str(demo_data / f"fineweb_{split}_000000.bin"))[:count].copy()
        if split == "val":
            tokens[::50] = BOS_ID  # six documents in the text that is audited
        write_shard(folder / f"fineweb_{split}_0.bin", tokens)
    env = inherited()
    env |= dict(PYTHONPATH=search_path(ROOT), RECIPE=str(ROOT / "records/recipes/smoke.env"),
                DATA_PATH=str(folder), TOKENIZER_PATH=str(demo_data / "tokenizer.model"), OMP_NUM_THREADS="1",
                TTT_CHUNK_SIZE="32", TTT_CHUNK_TOKENS="64", EVAL_BATCH_SEQS="4",
                TTT_PRIOR_SEQS="2")  # fmt: skip
    training = env | dict(RUN_ID="run", VAL_LOSS_EVERY="0", ITERATIONS="8")
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], env=training, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, env | dict(MODEL_PATH=str(folder / "runs/run/final_model.int6.ptz"))


def test_t6_training_opens_no_validation_shard_before_the_artifact_is_there(trained):
    opened = json.loads((trained[0] / "opened.json").read_text())
    first = [
        min(i for i, path in enumerate(opened) if name in path) for name in ("_train_0", "int6.ptz", "_val_0")
    ]
    assert first == sorted(first)


@pytest.mark.parametrize("mode, protocol, code", [("doc_banks", "legal", 0), ("banks", "adapt_first", 1)])
def test_audit_as_a_user(mode, protocol, code, trained):
    """After an evaluation, in a process of its own."""
    folder, env = trained
    env = env | dict(TTT_MODE=mode, TTT_PROTOCOL=protocol, TTT_SLOTS="2", AUDIT_TOKENS="300")
    assert eval_ttt.main([], env) == 0
    command = [sys.executable, str(ROOT / "eval_ttt.py"), "--audit=7"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    kept = folder / "runs/run/eval" / (mode if protocol == "legal" else f"{mode}_{protocol}")
    report = json.loads((kept / "certificate.json").read_text())
    words = (kept / "certificate.txt").read_text()
    assert words in done.stdout and words.splitlines()[0].endswith(": NOT LEGAL" if code else ": legal")
    assert report["legal"] is not bool(code) and report["targets"] == 300 and report["seed"] == 7
    failed = {check["name"].split()[0] for check in report["checks"] if check["ok"] is False}
    assert failed >= {"T1", "T2", "T5"} if code else not failed and not report["not_audited"]
    assert all(check["name"] in words for check in report["checks"]) and len(report["checks"]) >= 11
    assert {check["name"].split()[0]: check["ok"] for check in report["checks"]}["T19"] is True
    assert report["reading"].startswith("invalid" if code else "causal") and report["reading"] in words
    assert report["settings"]["ttt_groups"] == 8 and report["settings"]["ttt_slots"] == 2
    assert report["audited_settings"].keys() == (set() if code else {"ttt_groups", "ttt_chunk_size"})
    assert report["sha256"].keys() >= {
        "artifact",
        "tokenizer",
        "train_gpt.py",
        "eval_ttt.py",
        "fineweb_val_0.bin",
    }
    assert report["sha256"]["artifact"] == tg.sha256_file(env["MODEL_PATH"])
    result = json.loads((kept / "eval_ttt.json").read_text())
    beside = json.loads((folder / "runs/run/eval_ttt.json").read_text())
    assert (beside == result) is (protocol == "legal")  # beside the artifact stands the last legal one
    assert report["sha256"]["nll.npy"] == result["sha256_nll"] == tg.sha256_file(kept / "nll.npy")
    assert result["audit"] == (None if code else "certificate.json") and result["legal"] is not bool(code)


def test_the_result_names_the_certificate_that_is_of_it(trained, capsys):
    """A repeated evaluation keeps its certificate; one with other settings, losses or code has none."""
    folder, env = trained
    run = folder / "runs/run/eval/none"
    env = env | dict(TTT_MODE="none", AUDIT_TOKENS="700")

    def named(**changes) -> str | None:
        assert eval_ttt.main([], env | changes) == 0
        result = json.loads((run / "eval_ttt.json").read_text())
        assert json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT ")) == result
        return result["audit"]

    (run / "certificate.json").unlink(missing_ok=True)
    assert named() is None
    config, given, _ = tg.load_config(env)
    setup, tokens, path, _, shards = eval_ttt.prepare(config, given, {})
    assert auditing.run_audit(setup, tokens, path, shards, []) == 0
    assert json.loads((run / "eval_ttt.json").read_text())["audit"] == "certificate.json"
    certificate = json.loads((run / "certificate.json").read_text())
    assert named() == named(EVAL_BUDGET_SECONDS="9999") == "certificate.json"
    assert named(EVAL_STRIDE="16") is None
    for key, value in (("legal", False), ("sha256", {**certificate["sha256"], "eval_ttt.py": "0" * 64}),
                       ("sha256", {**certificate["sha256"], "nll.npy": "0" * 64}),
                       ("settings", 3)):  # fmt: skip
        (run / "certificate.json").write_text(json.dumps(certificate | {key: value}))
        assert named() is None


def in_this_process(environ, output):
    """Stands for auditing.start_program: the plain command itself, without the seconds of a new process."""
    code = eval_ttt.main([], environ)
    return SimpleNamespace(poll=lambda: code, returncode=code)


def table_of_losses(honest, setup, tokens, *hooks, kept=[], **named):  # noqa: B006
    """The losses of the first run come from a table ever after, whatever the text is."""
    result = honest(setup, tokens, *hooks, **named)
    kept[:] = kept or [result.nll]
    nll = np.resize(kept[0], len(tokens) - 1)
    loss = float(nll.mean(dtype=np.float64))
    return result._replace(nll=nll, val_loss=loss, val_bpb=result.val_bpb * loss / result.val_loss)


def shard_while_reading(honest, config, given):
    """The artifact has learned the shard before anybody gets it: T18 compares it with itself."""
    config, artifact, path = honest(config, given)
    val = tg.TokenStream(config.shards("val"), 1024).read_all()
    weight, moved = artifact.state["tok_emb.weight"], torch.zeros_like(artifact.state["tok_emb.weight"])
    moved[:, 0] = torch.from_numpy(np.bincount(val, minlength=len(weight))).to(moved) * 1e-3
    return config, artifact._replace(state=artifact.state | {"tok_emb.weight": weight + moved}), path


BANKS = dict(TTT_MODE="banks")
# What was scored: settings, a plant, and what T19, T20 and T23 say of it.
BESIDE_IT = {
    "honest, flat": (BANKS, None, (True, True, True)),
    "honest, phased": (dict(TTT_MODE="phased", PHASED_TTT_PREFIX_DOCS="3", TTT_SLOTS="2"), None, (True,) * 3),
    "honest, shared moments": (dict(TTT_MOMENTS="shared"), None, (True, True, None)),
    "learns first, for the text is long": (
        BANKS,
        learns_first_if(lambda tokens, observe: len(tokens) > 600),
        (True, False, True),
    ),
    "the shard learned while the artifact is read": (
        BANKS,
        patched(eval_ttt, "read_model", shard_while_reading),
        (True, False, True),
    ),
    "losses from a table": (BANKS, patched(eval_ttt, "evaluate", table_of_losses), (True, True, False)),
    "scored with another rate": (dict(TTT_LR="0.003"), None, (True, None, None)),
}


@pytest.mark.parametrize("name", BESIDE_IT)
def test_the_run_beside_the_artifact(name, trained, monkeypatch):
    """T19, T20 and T23 of what an evaluation without --audit left:
    the plain command must repeat it, on the text's beginning alone."""
    _, env = trained
    changes, plant, expected = BESIDE_IT[name]
    env = env | dict(TTT_GROUPS="1", AUDIT_TOKENS="150", TTT_CHUNK_SIZE="16")
    monkeypatch.setattr(auditing, "start_program", in_this_process)
    if plant:
        plant(Setup(TINY, *[None] * 5), monkeypatch)
    assert eval_ttt.main([], env | changes) == 0
    config, given, _ = tg.load_config(env | ({} if "rate" in name else changes))
    setup, tokens, path, _, shards = eval_ttt.prepare(config, given, {})
    scored, told, why = auditing.check_run(setup, tokens, shards, path)
    kept, found = eval_ttt.evaluation_folder(path, config) / "nll.npy", {}
    nll = np.load(kept)
    if told:
        text = auditing.stand_in(setup, tokens, np.random.default_rng(2))
        with ExitStack() as stack:
            runs = auditing.start_fresh(setup, path, [text], stack)
            checks = auditing.check_fresh(setup, runs, [text], nll, told)
            found = {check.name.split()[0]: check for check in checks}
        assert found["T20"].checked > 100 and found["T22"].checked == 0
        assert (text.documents < len(documents(tokens)[0])) is (expected[2] is not None)
    assert (told is None) == (why != "") == (expected[1] is None)
    assert (scored.ok, *(found[each].ok if found else None for each in ("T20", "T23"))) == expected
    assert scored.checked == len(tokens) - 1
    for wrong in (nll * np.float32(1.0001), nll[:-1], np.append(nll[:-1], np.float32(np.nan))):
        np.save(kept, wrong)
        assert auditing.check_run(setup, tokens, shards, path)[0].ok is False
    kept.write_bytes(b"no array")
    assert auditing.check_run(setup, tokens, shards, path)[0].ok is False


def test_the_whole_text_is_repeated_on_demand(trained, monkeypatch):
    """T24, and a program that has no losses in another process."""
    _, env = trained
    monkeypatch.setattr(auditing, "start_program", in_this_process)
    env = env | dict(TTT_MODE="none", AUDIT_TOKENS="600")
    assert eval_ttt.main([], env) == 0
    config, given, _ = tg.load_config(env)
    setup, tokens, path, _, shards = eval_ttt.prepare(config, given, {})
    told = auditing.check_run(setup, tokens, shards, path)[1]
    nll, text = np.load(path.parent / "eval/none/nll.npy"), auditing.whole_text(tokens)
    assert len(auditing.fresh_texts(setup, tokens, text, False)) == 1
    texts = auditing.fresh_texts(setup, tokens, text, True)
    other = nll.copy()
    other[-1] += 1e-6
    with ExitStack() as stack:
        runs = auditing.start_fresh(setup, path, texts, stack)
        for losses, ok in ((nll, True), (other, False)):
            found = {c.name.split()[0]: c for c in auditing.check_fresh(setup, runs, texts, losses, told)}
            assert found["T24"].ok is ok and found["T24"].checked == len(nll)
        monkeypatch.setattr(
            auditing, "start_program", lambda *_: SimpleNamespace(poll=lambda: 2, returncode=2)
        )
        runs = auditing.start_fresh(setup, path, texts[:1], stack)
        (check,) = auditing.check_fresh(setup, runs, texts[:1], nll, told)
        assert check.ok is False and "no losses: exit code 2" in check.detail


@pytest.mark.parametrize("told, spread, apart, ok", [
    ({}, 0.0, 0.0, True), ({}, 0.0, 1e-6, False), ({}, 1e-3, 2.9e-3, True), ({}, 1e-3, 3.1e-3, False),
    (dict(versions={"torch": "1"}), 0.0, 9e-4, True), (dict(world_size=8), 0.0, 9e-4, True),
    (dict(world_size=8), 0.0, 2e-3, False),
])  # fmt: skip
def test_t20_admits_what_a_repetition_changes(told, spread, apart, ok, setup, text):
    """Nothing on a CPU; on a GPU thrice the difference of two runs; rounding after other versions."""
    nll = np.zeros(len(text) - 1)
    told, fresh = dict(world_size=1, versions={}) | told, nll + apart * (np.arange(len(nll)) % 2 * 2 - 1)
    assert auditing.check_repeated(setup, auditing.whole_text(text), fresh, spread, nll, told).ok is ok


@pytest.mark.parametrize("file, how, kind", [
    ("/own/val/fineweb_val_000000.bin", "read", "shard"), ("/own/run/eval/none/nll.npy", "write", "own"),
    ("/code/eval_ttt.py", "read", "code"), ("/code/eval_ttt.py", "write", ""),
    ("/code/__pycache__/eval_ttt.cpython-311.pyc", "write", "code"), ("/code/cache.npy", "read", ""),
    ("/lib/python/site-packages/torch/x.so", "read", "library"), ("/lib/python/x.npy", "write", ""),
    ("/lib/python/__pycache__/x.cpython-311.pyc.4711", "write", "library"), ("/dev/null", "write", "library"),
    ("/dev/shm/cache", "read", ""), ("/owner/x", "read", ""), ("/tmp/cache", "write", ""),
])  # fmt: skip
def test_t22_names_what_is_outside(file, how, kind):
    libraries = {Path("/lib"), Path("/dev")}
    assert (
        auditing.kind_of(Path(file), how, {Path("/code/eval_ttt.py"): "code"}, Path("/own"), libraries)
        == kind
    )


def test_t22_of_what_is_listed():
    """A file outside fails; a process or a connection may open anything, so nothing is known."""
    used = [dict(kind="shard", how="read", name="val/x.bin")]
    outside, started = (dict(kind="", how=how, name="/tmp/x") for how in ("read", "start"))
    oks = [auditing.check_used(files).ok for files in (used, [*used, started], [*used, started, outside], [])]
    assert oks == [True, None, False, None]


CACHING = """
import socket, subprocess
open({cache!r}, "a").close()
socket.getaddrinfo("127.0.0.1", 80)
subprocess.run(["true"])
"""


def test_a_program_with_a_cache_is_caught(trained, tmp_path, monkeypatch):
    """T22, in a process of its own: a file outside of its folder, another process, a look at the network."""
    _, env = trained
    source, main = (ROOT / "eval_ttt.py").read_text(), 'if __name__ == "__main__":'
    programs = [tmp_path / "train_gpt.py", tmp_path / "eval_ttt.py"]
    programs[0].write_bytes((ROOT / "train_gpt.py").read_bytes())
    programs[1].write_text(source.replace(main, CACHING.format(cache=str(tmp_path / "cache.txt")) + main))
    config, given, _ = tg.load_config(env | dict(TTT_MODE="none"))
    setup, tokens, path, _, _ = eval_ttt.prepare(config, given, {})
    monkeypatch.setattr(tg, "code_files", lambda: programs)
    with auditing.FreshRun(setup, path, tokens) as run:
        assert isinstance(run.losses(), np.ndarray)
        used = auditing.files_used(setup, run)
    check = auditing.check_used(used)
    outside = [each["name"] for each in used if not each["kind"]]
    assert check.ok is False and all(name in check.detail for name in outside)
    assert [name.split("/")[-1].split(" ")[0] for name in outside] == [
        "cache.txt", "socket.getaddrinfo", "subprocess.Popen"
    ]  # fmt: skip
    assert {each["kind"] for each in used} >= {"code", "own", "shard", "tokenizer"}


@pytest.mark.parametrize("budget, fits", [("0", True), ("0.001", False)])
def test_t8_budgets(budget, fits, trained, capsys):
    """Bytes on the disk against the cap; seconds against the budget, with a warning when over it."""
    folder, env = trained
    assert eval_ttt.main([], env | dict(TTT_MODE="none", EVAL_BUDGET_SECONDS=budget)) == 0
    result, trained = (
        json.loads((folder / f"runs/run/{name}.json").read_text()) for name in ("eval_ttt", "result")
    )
    code = sum((ROOT / name).stat().st_size for name in ("train_gpt.py", "eval_ttt.py"))
    for each in (result, trained):
        assert each["bytes_model"] == Path(env["MODEL_PATH"]).stat().st_size and each["bytes_code"] == code
        assert each["bytes_total"] == each["bytes_model"] + code <= SIZE_CAP and each["fits"]
    assert result["fits_budget"] is fits and result["eval_seconds"] > 0
    assert ("over EVAL_BUDGET_SECONDS" in capsys.readouterr().out) is not fits


def trains_before_it_scores(source: str) -> list[str]:
    """T13, functions as the field's reviewers look for: an argument of validation tokens, a loop with steps
    or backward passes in it, and no pass without gradients before."""
    found = []
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        takes = any("val" in argument.arg for argument in function.args.args)
        calls = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
        loops = any(isinstance(node, (ast.For, ast.While)) for node in ast.walk(function))
        learns = {"backward", "step", "grad"} & {*calls}
        if takes and loops and learns and not {"no_grad", "inference_mode"} & {*calls}:
            found.append(function.name)
    return found


def test_t13_no_function_has_the_shape_of_a_cheat():
    planted = (
        "def adapt(model, val_tokens):\n for _ in range(9):\n  loss(model, val_tokens).backward()\n  "
        "opt.step()\n"
    )
    assert trains_before_it_scores(planted) == ["adapt"]
    for name in ("train_gpt.py", "eval_ttt.py"):
        assert trains_before_it_scores((ROOT / name).read_text()) == []
