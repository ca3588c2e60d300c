"""Meta-learning against explicit loops and finite differences,
and against the evaluator; on two ranks; whole runs."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_ttt_runs
import torch
import torch.distributed as dist
from conftest import run_ranks
from test_artifact import make_progress, make_run
from test_cli import write_shard
from test_model import SMALL, random_ids, random_model
from test_scoring import TABLE, TOKENS
from test_training import StepClock, running, sgd, stream, train_here
from test_ttt import Hand, model_of
from test_ttt_runs import documents_by_hand, setup_of
from torch.func import functional_call

import eval_ttt
import train_gpt
from eval_ttt import evaluate, score_plan
from train_gpt import (
    GPT,
    TTT_MODES,
    Config,
    FastWeights,
    MetaRates,
    UserError,
    deployed_step,
    fomaml_step,
    inner_weights,
    load_config,
    meta_sequences,
    reptile_step,
    sample_documents,
)  # fmt: skip

ROOT, CPU, BANKS = Path(__file__).resolve().parent.parent, torch.device("cpu"), GPT.BANKS
FOMAML = replace(SMALL, meta_ttt_enabled=True, meta_ttt_inner_lr=0.05)
# With every lever, three blocks, pieces of five targets, and documents of at most four pieces.
TINY = replace(test_ttt_runs.TINY, eval_seq_len=32, meta_ttt_enabled=True, meta_ttt_objective="deployed",
               meta_ttt_pieces=4)  # fmt: skip


@pytest.fixture
def double():
    """Float64 throughout; conftest.py sets it back."""
    torch.set_default_dtype(torch.float64)


def exact(fast: FastWeights, model: GPT) -> FastWeights:
    """Fast weights of a float64 model in float64;
    their base is the live parameters, as that of a float32 model is."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    fast.base = {name: own.get(name, base.double()) for name, base in fast.base.items()}
    fast.values = {name: torch.stack([fast.base[name]] * len(value)) for name, value in fast.values.items()}
    return fast


def live_model(config: Config, seed: int = 0) -> GPT:
    return model_of(config, seed).requires_grad_()


def random_rates(model: GPT, config: Config) -> MetaRates:
    """Factors between about a half and two."""
    rates, generator = (
        MetaRates(model, replace(config, meta_sgd_enabled=True)),
        torch.Generator().manual_seed(5),
    )
    for log in rates.logs.values():
        log.copy_(0.4 * torch.randn(log.shape, generator=generator))
    return rates


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def assert_close(found, expected, tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def text_rows(count: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(count, length + 1, seed)
    ids[1, 4] = train_gpt.BOS_ID
    return ids[:, :-1], ids[:, 1:]


# ------------------------------------------------------------------------------------------------------------
# By hand
# ------------------------------------------------------------------------------------------------------------


def mean_nll(
    model: GPT, weights: dict, ids: torch.Tensor, targets: torch.Tensor, first: int = 0
) -> torch.Tensor:
    """The mean over the targets from place FIRST on."""
    log_p = functional_call(model, weights, (ids,)).log_softmax(-1)
    return -log_p.gather(-1, targets.unsqueeze(-1))[:, first:].mean()


def tasks(model: GPT, split: str, ids: torch.Tensor, targets: torch.Tensor):
    """Inner and outer loss as functions of the weights."""
    half = ids.shape[1] // 2
    if split == "batch":
        return (lambda w: mean_nll(model, w, ids[0::2], targets[0::2])), (
            lambda w: mean_nll(model, w, ids[1::2], targets[1::2]))  # fmt: skip
    inner = lambda w: mean_nll(model, w, ids[:, :half], targets[:, :half])  # noqa: E731
    if split == "seq":  # the second half reads the whole row
        return inner, lambda w: mean_nll(model, w, ids, targets, half)
    return inner, lambda w: mean_nll(model, w, ids[:, half:], targets[:, half:])


def parameters(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def frozen_mask(c: Config, name: str, count: int, like: torch.Tensor) -> torch.Tensor:
    """Zero for bank rows i and L + i of the first COUNT blocks, and for these blocks' own scales."""
    mask = torch.ones_like(like)
    if name.split(".")[0] in BANKS:
        mask[[row for row in range(len(like)) if row % c.num_layers < count]] = 0.0
    return 0.0 * mask if name.startswith(tuple(f"blocks.{block}." for block in range(count))) else mask


def inner_steps(c: Config, loss, start: dict, factors: dict | None = None) -> dict[str, torch.Tensor]:
    """How far FOMAML's inner steps of plain SGD move each bank."""
    fast = {bank: start[bank].detach().clone() for bank in BANKS}
    for _ in range(c.meta_ttt_inner_steps):
        leaves = {bank: value.clone().requires_grad_() for bank, value in fast.items()}
        found = torch.autograd.grad(loss({**start, **leaves}), list(leaves.values()))
        for (bank, value), g in zip(fast.items(), found, strict=True):
            rate = frozen_mask(c, bank, c.meta_ttt_freeze_blocks, value) * (factors or {}).get(bank, 1.0)
            value -= c.meta_ttt_inner_lr * rate * g
    return {bank: value - start[bank].detach() for bank, value in fast.items()}


def meta_by_hand(model: GPT, c: Config, ids, targets, factors=None):
    """The gradients of every parameter, and the outer loss before and after:
    the steps' displacement is held fixed."""
    params = parameters(model)
    inner, outer = tasks(model, c.meta_ttt_split, ids, targets)
    moved = {bank: params[bank] + move for bank, move in inner_steps(c, inner, params, factors).items()}
    before, after = outer(params), outer({**params, **moved})
    w, delta = c.meta_ttt_loss_weight, c.meta_ttt_delta_weight
    found = torch.autograd.grad(
        (w + delta) * after - delta * before, list(params.values()), allow_unused=True
    )
    found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, params.values(), strict=True)]
    return dict(zip(params, found, strict=True)), before.item(), after.item()


def plain_gradient(model: GPT, loss) -> dict[str, torch.Tensor]:
    params = parameters(model)
    return dict(zip(params, torch.autograd.grad(loss(params), list(params.values())), strict=True))


def adapters_of(fast: FastWeights) -> dict[str, torch.Tensor] | None:
    return fast.base if "qo_bank.a" in fast.base else None


# ------------------------------------------------------------------------------------------------------------
# FOMAML
# ------------------------------------------------------------------------------------------------------------

SEVERAL = dict(meta_ttt_inner_steps=3)
LEVERS = {name: getattr(test_ttt_runs.TINY, name) for name in train_gpt.sections()["model"]}
STEPS = {
    "batch": {},
    "seq": dict(meta_ttt_split="seq"),
    "cut": dict(meta_ttt_split="cut"),
    "frozen": dict(meta_ttt_freeze_blocks=2),
    "several": SEVERAL,
    "several, frozen, seq": dict(**SEVERAL, meta_ttt_freeze_blocks=1, meta_ttt_split="seq"),
    "several, cut": dict(**SEVERAL, meta_ttt_split="cut"),
    "delta": dict(meta_ttt_delta_weight=0.3),
    "delta, seq": dict(meta_ttt_delta_weight=0.3, meta_ttt_split="seq"),
    "delta alone": dict(meta_ttt_delta_weight=0.3, meta_ttt_loss_weight=0.0),
    "accumulated": dict(grad_accum_total=8, meta_ttt_loss_weight=0.9),
    "every lever": LEVERS,
    "every lever, seq": dict(**LEVERS, meta_ttt_split="seq"),
    "settings of the evaluator": dict(ttt_grad_clip=1e-3, ttt_in_lr_mult=9.0, ttt_out_lr_mult=9.0,
                                      ttt_freeze_blocks=4, ttt_layers="1", ttt_lr=9.0, ttt_epochs=5,
                                      ttt_optimizer="adamw", ttt_momentum=0.9),
}  # fmt: skip


@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS)
def test_fomaml_equals_explicit_steps(double, changes):
    """The last case: none of the evaluator's settings of its steps is of importance."""
    c = replace(FOMAML, **changes)
    model, (ids, targets) = live_model(c), text_rows(4, 12, 1)
    fast = exact(inner_weights(model, c, "fomaml"), model)
    expected, before, after = meta_by_hand(model, c, ids, targets)
    found = fomaml_step(model, fast, MetaRates(model, c), ids, targets)
    assert_close(gradients(model), expected)
    assert float(found[1]) == pytest.approx(after, abs=1e-9) and abs(before - after) > 1e-3
    assert (
        found[0] is None
        if not c.meta_ttt_delta_weight
        else float(found[0]) == pytest.approx(before, abs=1e-9)
    )
    still = plain_gradient(
        model, lambda w: c.meta_ttt_loss_weight * tasks(model, c.meta_ttt_split, ids, targets)[1](w)
    )
    for name in (*BANKS, "tok_emb.weight", "smear.gate"):  # otherwise nothing is shown
        assert (still[name] - expected[name]).abs().max() > 1e-5
    for row in range(c.meta_ttt_freeze_blocks):
        for bank in BANKS:
            assert (
                expected[bank][row].abs().max() > 1e-6
                and expected[bank][-c.num_layers + row].abs().max() > 1e-6
            )


def test_the_inner_step_leaves_frozen_rows(double):
    c = replace(FOMAML, meta_ttt_freeze_blocks=2)
    model = live_model(c)
    fast = exact(inner_weights(model, c, "fomaml"), model)
    fomaml_step(model, fast, MetaRates(model, c), *text_rows(4, 12, 1))
    for bank in BANKS:
        still = {row for row, (a, b) in enumerate(zip(fast.values[bank][0], fast.base[bank], strict=True)) if
                 torch.equal(a, b)}  # fmt: skip
        assert still == ({0, 1, 5, 6} if bank in ("qo_bank", "kv_bank") else {0, 1})


def test_fomaml_before_the_loop(double):
    """Blocks that are not used yet have no gradient."""
    c = replace(FOMAML, **LEVERS)
    model, (ids, targets) = live_model(c), text_rows(4, 12, 1)
    model.looped = False
    fast = exact(inner_weights(model, c, "fomaml"), model)
    expected, _, _ = meta_by_hand(model, c, ids, targets)
    fomaml_step(model, fast, MetaRates(model, c), ids, targets)
    assert_close(gradients(model), expected)
    assert model.blocks[3].attn_scale.grad is None and not expected["blocks.3.attn_scale"].any()


def test_heads_of_training_take_no_part(double):
    """They predict further ahead in the main loss alone: the step is that of the model without them."""
    (ids, targets), found = text_rows(4, 12, 1), []
    for heads in (0, 2):
        model = live_model(replace(FOMAML, mtp_num_heads=heads))
        model.load_state_dict(random_model(FOMAML).state_dict(), strict=False)
        fast = exact(inner_weights(model, model.config, "fomaml"), model)
        fomaml_step(model, fast, MetaRates(model, model.config), ids, targets)
        found.append({name: g for name, g in gradients(model).items() if not name.startswith("mtp_heads")})
    assert_close(found[1], found[0])


SPLITS = ("batch", "seq", "cut")
STILL = [
    dict(meta_ttt_inner_lr=0.0),
    dict(meta_control=True),
    dict(meta_control=True, meta_ttt_delta_weight=0.3),
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("changes", STILL, ids=str)
def test_a_step_that_leads_nowhere_is_a_plain_gradient(double, changes, split):
    """META_TTT_LOSS_WEIGHT of the outer loss; the delta loss and the factors' gradients are then zero."""
    c = replace(FOMAML, meta_ttt_split=split, meta_sgd_enabled=True, **changes)
    model, (ids, targets) = live_model(c), text_rows(4, 12, 1)
    rates, fast = MetaRates(model, c), exact(inner_weights(model, c, "fomaml"), model)
    outer = tasks(model, split, ids, targets)[1]
    expected = plain_gradient(model, lambda w: c.meta_ttt_loss_weight * outer(w))
    _, after = fomaml_step(model, fast, rates, ids, targets)
    assert_close(gradients(model), expected)
    assert float(after) == pytest.approx(outer(parameters(model)).item(), abs=1e-9)
    rates.step(1.0)
    assert all((factor == 1).all() for factor in rates.factors().values())


def test_steps_begin_with_the_weights_of_the_moment(double):
    """In float32, where the fast weights' base has to be the live parameters."""
    torch.set_default_dtype(torch.float32)
    c = replace(FOMAML, **SEVERAL)
    model, found = random_model(c, torch.float32), []
    kept = inner_weights(model, c, "fomaml")
    fomaml_step(model, kept, MetaRates(model, c), *text_rows(4, 12, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    for fast in (kept, inner_weights(model, c, "fomaml")):
        model.zero_grad()
        fomaml_step(model, fast, MetaRates(model, c), *text_rows(4, 12, 2))
        found.append(gradients(model))
    assert_close(found[0], found[1], 0.0)


@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_the_gradient_joins_that_of_the_step_and_is_clipped_with_it(double, limit):
    c = replace(FOMAML, grad_clip_norm=limit)
    model, (ids, targets) = live_model(c), text_rows(8, 12, 1)
    rows = [(ids[:4], targets[:4]), (ids[4:], targets[4:])]
    expected, _, _ = meta_by_hand(model, c, *rows[1])
    main = plain_gradient(model, lambda w: mean_nll(model, w, ids, targets))
    expected = {name: g + main[name] for name, g in expected.items()}
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected.values()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fast = exact(inner_weights(model, c, "fomaml"), model)
    fomaml_step(model, fast, MetaRates(model, c), *rows[1])
    train_gpt.train_step(train_gpt.training_loss, model, rows, sgd(model), 1.0, 0.9)
    share = limit / norm if limit else 1.0
    after = {name: p.detach() for name, p in model.named_parameters()}
    assert_close(after, {name: before[name] - share * g for name, g in expected.items()}, 1e-6)


# ------------------------------------------------------------------------------------------------------------
# The rows and the steps
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, accumulate, ranks", [(16, 4, 2), (16, 8, 2), (12, 3, 4), (12, 1, 3), (12, 4, 2)]
)
def test_the_rows_do_not_depend_on_the_ranks(rows, accumulate, ranks):
    """One micro-batch in all: every GRAD_ACCUM_TOTAL-th row of the step; or the ranks are refused."""
    c = replace(FOMAML, grad_accum_total=accumulate, meta_ttt_split="seq")
    ids = torch.arange(rows)[:, None].expand(rows, 3)
    one = meta_sequences(list(zip(ids.chunk(accumulate), (ids + 1).chunk(accumulate), strict=True)), c)
    assert one[0][:, 0].tolist() == list(range(0, rows, accumulate)) and torch.equal(one[1], one[0] + 1)
    try:
        parts = [meta_sequences([(part, part + 1)], c)[0] for part in ids.chunk(ranks)]
    except UserError:
        return
    assert torch.equal(torch.cat(parts), one[0])


def test_one_row_cannot_be_split():
    part = torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(UserError, match=r"META_TTT_SPLIT=batch.*GRAD_ACCUM_TOTAL"):
        meta_sequences([(part, part)], replace(FOMAML, grad_accum_total=4))
    assert (
        len(meta_sequences([(part, part)], replace(FOMAML, grad_accum_total=4, meta_ttt_split="cut"))[0]) == 1
    )


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_weight_is_that_of_the_settings_whatever_the_micro_batches(
    double, tmp_path, accumulate, monkeypatch
):
    c = replace(FOMAML, grad_accum_total=accumulate, meta_ttt_split="seq")
    model, (ids, targets) = random_model(c, torch.float32), text_rows(8, 12, 1)
    batches = list(zip(ids.chunk(accumulate), targets.chunk(accumulate), strict=True))
    monkeypatch.setattr(train_gpt, "Loader", lambda run: SimpleNamespace(batches=lambda step: batches))
    found = []
    monkeypatch.setattr(train_gpt, "train_step", lambda *_: found.append(gradients(model)))
    functions = (train_gpt.training_loss, train_gpt.token_nll)
    phase = train_gpt.training_phase(make_run(tmp_path, c), model, *functions, MetaRates(model, c))
    expected, _, _ = meta_by_hand(live_model(c), c, ids[::accumulate], targets[::accumulate])
    for step in (1, 8):  # META_TTT_EVERY=8
        phase.step(train_gpt.Moment(step, 0.0, 0.0, 1.0))
    assert not any(g.any() for g in found[0].values())
    assert_close({name: g.double() for name, g in found[1].items()}, expected, 1e-4)


def test_meta_steps_are_due_every_few_steps_while_the_rate_is_high(tmp_path):
    """The schedule is 1 until step 5 and 1/2, which is not above META_TTT_MIN_SCALE, at step 8."""
    c = replace(
        FOMAML, iterations=11, warmdown_iters=6, max_wallclock_seconds=0.0, train_log_every=1,
        train_batch_tokens=64, grad_accum_total=2, val_loss_every=0, ema_enabled=False, meta_ttt_every=2,
        meta_sgd_enabled=True, meta_ttt_delta_weight=0.1,
    )  # fmt: skip
    model, functions = random_model(c, torch.float32), (train_gpt.training_loss, train_gpt.token_nll)
    rates = MetaRates(model, c)
    run = make_run(tmp_path, c, train=stream(tmp_path))
    train_gpt.train(run, model, *functions, 0.0, make_progress(run, model, running(StepClock()), rates))
    lines = [
        line for line in (tmp_path / "train.log").read_text().splitlines() if line.startswith("meta_step")
    ]
    assert [int(re.match(r"meta_step:(\d+) ", line)[1]) for line in lines] == [1, 3, 5, 7]  # as `step:`
    number, span = r"\d+\.\d{5}", r"\d\.\d{3}\.\.\d\.\d{3}"
    banks = "".join(f" rates_{bank}:{span}" for bank in BANKS)
    assert all(re.fullmatch(rf"meta_step:\d+ before:{number} after:{number}{banks}", line) for line in lines)
    assert all((factor != 1).all() for factor in rates.factors().values())


@pytest.mark.parametrize(
    "changes", [dict(), dict(meta_ttt_objective="deployed", reptile_enabled=True)], ids=str
)
def test_warm_up_leaves_nothing(tmp_path, changes):
    """It sees no data (there is none here), and leaves weights and gradients as they were."""
    c = replace(TINY, meta_ttt_objective="fomaml", meta_sgd_enabled=True, meta_ttt_docs=2, train_seq_len=16,
                train_batch_tokens=64, grad_accum_total=2, warmup_steps=1, eval_batch_seqs=2,
                gptq_calib_batches=0)  # fmt: skip
    c = replace(c, **changes)
    model = GPT(c, word_start=TABLE.has_leading_space).init_weights(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_gpt.warm_up(make_run(tmp_path, c), model, train_gpt.training_loss, train_gpt.token_nll)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------------------------------
# Meta-SGD
# ------------------------------------------------------------------------------------------------------------


def central_differences(loss, logs: dict[str, torch.Tensor], h: float = 1e-4) -> dict[str, torch.Tensor]:
    """The derivative of LOSS by each entry of the logarithms of the factors."""
    found = {name: torch.zeros_like(log) for name, log in logs.items()}
    for name, log in logs.items():
        for row in range(len(log)):
            ends = []
            for sign in (1, -1):
                moved = log.clone()
                moved[row] += sign * h
                ends.append(float(loss({**logs, name: moved})))
            found[name][row] = (ends[0] - ends[1]) / (2 * h)
    return found


SCALES = {
    "batch": {},
    "seq, frozen": dict(meta_ttt_split="seq", meta_ttt_freeze_blocks=1),
    "cut, delta": dict(meta_ttt_split="cut", meta_ttt_delta_weight=0.3),
}


@pytest.mark.parametrize("changes", SCALES.values(), ids=SCALES)
def test_gradients_of_the_factors_are_finite_differences(double, changes):
    """Of the whole meta loss by the logarithms; the inner gradient does not depend on them."""
    c = replace(FOMAML, num_layers=3, ve_layers="1", meta_sgd_enabled=True, **changes)
    model, (ids, targets) = live_model(c), text_rows(4, 12, 1)
    rates, fast = random_rates(model, c), exact(inner_weights(model, c, "fomaml"), model)
    inner, outer = tasks(model, c.meta_ttt_split, ids, targets)
    start = {name: p.detach() for name, p in model.named_parameters()}
    moved = inner_steps(c, inner, start)  # with factors of 1

    def loss(logs) -> torch.Tensor:
        with torch.no_grad():
            weights = {
                **start,
                **{bank: start[bank] + logs[bank].exp() * move for bank, move in moved.items()},
            }
            delta = c.meta_ttt_delta_weight
            return (c.meta_ttt_loss_weight + delta) * outer(weights) - delta * outer(start)

    expected = central_differences(loss, rates.logs)
    fomaml_step(model, fast, rates, ids, targets)
    assert_close({name: log.grad for name, log in rates.logs.items()}, expected, 1e-7)
    for bank, g in expected.items():
        for row, each in enumerate(g.flatten().tolist()):
            frozen = row % 3 < c.meta_ttt_freeze_blocks
            assert (rates.logs[bank].grad[row] == 0) == frozen and (abs(each) > 1e-8) != frozen


def test_the_delta_loss_by_finite_differences(double):
    """In a random direction of each parameter, the displacement of the inner step held fixed."""
    c, h = replace(FOMAML, meta_ttt_delta_weight=0.3), 1e-5
    model, (ids, targets) = live_model(c), text_rows(4, 12, 1)
    fast = exact(inner_weights(model, c, "fomaml"), model)
    fomaml_step(model, fast, MetaRates(model, c), ids, targets)
    start = {name: p.detach() for name, p in model.named_parameters()}
    moved = {bank: fast.values[bank][0] - start[bank] for bank in BANKS}
    outer, found = tasks(model, c.meta_ttt_split, ids, targets)[1], gradients(model)
    for name, p in start.items():
        direction, ends = torch.randn(p.shape, generator=torch.Generator().manual_seed(3)), []
        for sign in (1, -1):
            there = {**start, name: p + sign * h * direction}
            with torch.no_grad():
                after = outer({**there, **{bank: there[bank] + move for bank, move in moved.items()}})
                ends.append(float(0.8 * after - 0.3 * outer(there)))
        assert float((found[name] * direction).sum()) == pytest.approx(
            (ends[0] - ends[1]) / (2 * h), abs=1e-7
        ), name


def test_factors_multiply_the_inner_rate(double):
    c = replace(FOMAML, **SEVERAL, meta_sgd_enabled=True)
    model, (ids, targets) = live_model(c), text_rows(4, 12, 1)
    rates, fast = random_rates(model, c), exact(inner_weights(model, c, "fomaml"), model)
    expected, _, after = meta_by_hand(model, c, ids, targets, rates.factors())
    assert float(fomaml_step(model, fast, rates, ids, targets)[1]) == pytest.approx(after, abs=1e-9)
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("lr, expected", [(0.0, 0.025), (0.3, 0.3)])
def test_the_first_step_of_the_factors_is_their_rate(double, lr, expected):
    """Adam's; downhill, at a share of META_SGD_LR, or of SCALAR_LR where that is 0.
    Rows without a gradient stay 1."""
    c = replace(FOMAML, meta_sgd_enabled=True, meta_sgd_lr=lr, meta_ttt_freeze_blocks=2)
    model = live_model(c)
    rates, fast = MetaRates(model, c), exact(inner_weights(model, c, "fomaml"), model)
    fomaml_step(model, fast, rates, *text_rows(4, 12, 1))
    g = {name: log.grad.clone() for name, log in rates.logs.items()}
    rates.step(0.5)
    for name, log in rates.logs.items():
        torch.testing.assert_close(log, -0.5 * expected * g[name].sign(), rtol=1e-3, atol=0)
        rows = {row for row in range(len(log)) if log[row] == 0}
        assert rows == ({0, 1, 5, 6} if name in ("qo_bank", "kv_bank") else {0, 1})
    assert all(log.grad is None for log in rates.logs.values())


def test_factors_stay_positive_and_have_no_decay(double):
    c = replace(FOMAML, meta_sgd_enabled=True, meta_sgd_lr=1.0, meta_ttt_freeze_blocks=1, adam_wd=0.5)
    model = live_model(c)
    rates, fast = MetaRates(model, c), exact(inner_weights(model, c, "fomaml"), model)
    for seed in range(8):
        fomaml_step(model, fast, rates, *text_rows(4, 12, seed))
        rates.step(1.0)
    for bank, factor in rates.factors().items():
        assert (
            factor.isfinite().all() and (factor > 0).all() and (factor[1:5] != 1).all() and factor[0] == 1
        ), bank
    still = random_rates(model, c)
    before = {name: log.clone() for name, log in still.logs.items()}
    for log in still.logs.values():
        log.grad = torch.zeros_like(log)
    still.step(1.0)
    assert all(torch.equal(log, before[name]) for name, log in still.logs.items())


def test_factors_are_no_part_of_the_model_and_are_reported():
    c = replace(FOMAML, meta_sgd_enabled=True)
    model = random_model(c, torch.float32)
    rates = random_rates(model, c)
    assert list(model.state_dict()) == list(random_model(SMALL).state_dict())
    report, lengths = rates.report(), dict(qo_bank=10, kv_bank=10, mlp_up_bank=5, mlp_down_bank=5)
    assert {name: len(row) for name, row in report.items()} == lengths
    for name, row in report.items():
        assert row == pytest.approx(rates.factors()[name].flatten().tolist(), abs=1e-5)
        assert f" rates_{name}:{min(row):.3f}..{max(row):.3f}" in train_gpt.rates_text(rates.factors())
    off = MetaRates(model, FOMAML)
    off.step(1.0)
    assert off.factors() == off.report() == {} and train_gpt.rates_text(off.factors()) == ""


@pytest.mark.parametrize("objective", ["fomaml", "deployed"])
def test_factors_of_the_deployed_objective_alone_survive_the_artifact(tmp_path, objective):
    """Those of FOMAML belong to its own inner step, which the evaluator does not take."""
    c = replace(SMALL, meta_ttt_enabled=True, meta_ttt_objective=objective, meta_sgd_enabled=True)
    model, generator = random_model(c, torch.float32), torch.Generator().manual_seed(0)
    given = {b: (8 * torch.rand(len(getattr(model, b)), 1, 1, generator=generator) - 4).exp() for b in BANKS}
    train_gpt.export(make_run(tmp_path, c), model, train_gpt.Statistics(), given)
    artifact = train_gpt.read_artifact(tmp_path / "final_model.int6.ptz")
    assert list(artifact.state) == list(model.state_dict())
    assert_close(dict(artifact.factors), given if objective == "deployed" else {}, 0.02)
    assert "factors" not in "".join(train_gpt.load_model(artifact, CPU).state_dict())
    assert list(torch.load(tmp_path / "final_model.pt", weights_only=True)) == list(model.state_dict())


@pytest.fixture
def precise(monkeypatch):
    """The forward in float64; what learns stays float32."""
    monkeypatch.setattr(train_gpt, "compute_dtype", lambda device: torch.float64)


@pytest.mark.parametrize("mode, lr", [("doc_banks", 0.01), ("doc_lora", 0.3)])
def test_the_evaluator_steps_by_the_factors_of_the_artifact(precise, monkeypatch, mode, lr):
    setup = setup_of(ttt_mode=mode, ttt_optimizer="sgd", ttt_momentum=0.9, ttt_lr=lr, ttt_freeze_blocks=1)
    plain = evaluate(setup, TOKENS).nll
    factors = random_rates(setup.load(), setup.config).factors()

    class Scaled(Hand):
        def rate(self, name: str) -> torch.Tensor:
            return super().rate(name) * factors.get(name.split(".")[0], 1.0)

    monkeypatch.setattr(test_ttt_runs, "Hand", Scaled)
    setup = replace(setup, artifact=setup.artifact._replace(factors=factors))
    found = evaluate(setup, TOKENS).nll
    np.testing.assert_allclose(found, documents_by_hand(setup, TOKENS, TTT_MODES[mode][1]), rtol=0, atol=2e-5)
    assert abs(found - plain).max() > 0.01


# ------------------------------------------------------------------------------------------------------------
# Reptile
# ------------------------------------------------------------------------------------------------------------

REPTILE = replace(SMALL, reptile_enabled=True, reptile_inner_lr=0.2, reptile_outer_lr=0.3, reptile_tasks=4)


def reptile_by_hand(
    model: GPT, c: Config, rows: torch.Tensor, layers: set[int]
) -> tuple[dict[str, torch.Tensor], float]:
    """The MLP banks after a step, and the mean loss of the first inner steps; one task after the other."""
    names, start, ends, first = BANKS[2:], {n: p.detach() for n, p in model.named_parameters()}, [], []
    mask = torch.tensor([float(row in layers) for row in range(c.num_layers)])[:, None, None]
    for task in range(rows.shape[1]):
        w = {name: start[name].clone() for name in names}
        for number, row in enumerate(rows[:, task]):
            at = start if c.meta_control else w
            leaves = {name: at[name].clone().requires_grad_() for name in names}
            loss = mean_nll(model, {**start, **leaves}, row[None, :-1], row[None, 1:])
            first += [loss.item()] if number == 0 else []
            for name, g in zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                w[name] = w[name] - c.reptile_inner_lr * mask * g
        ends.append(w)
    share = c.reptile_outer_lr
    mean = {name: sum(w[name] for w in ends) / len(ends) for name in names}
    return {name: start[name] + share * (mean[name] - start[name]) for name in names}, sum(first) / len(first)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("layers, moving", [("", {4}), ("1,3", {1, 3})])
def test_reptile_equals_an_explicit_loop(double, layers, moving, control):
    """The control is plain SGD on the same rows,
    all of its gradients taken at the weights of the step's start."""
    c = replace(REPTILE, reptile_layers=layers, meta_control=control, ttt_layers="0", ttt_freeze_blocks=5)
    model, rows = live_model(c), random_ids(12, 13, 3).view(3, 4, 13)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fast = exact(inner_weights(model, c, "reptile"), model)
    for _ in range(2):  # the second one starts where the first one ended
        expected, loss = reptile_by_hand(model, c, rows, moving)
        assert float(reptile_step(model, fast, rows)) == pytest.approx(loss, abs=1e-9)
        assert_close({name: model.get_parameter(name).detach() for name in expected}, expected)
    for name, p in model.named_parameters():
        moved = (
            {row for row in range(len(p)) if not torch.equal(p[row], before[name][row])} if p.ndim else set()
        )
        assert moved == (moving if name in expected else set()), name


def test_the_last_quarter_of_the_blocks():
    for count, expected in ((1, [0]), (3, [2]), (8, [6, 7]), (11, [9, 10])):
        c = replace(REPTILE, num_layers=count, ve_layers="0")
        fast = inner_weights(GPT(c), c, "reptile")
        assert set(fast.values) == {"mlp_up_bank", "mlp_down_bank"} and fast.sets == 4
        for rate in fast.rates.values():
            assert [row for row in range(count) if rate[row] != 0] == expected


def test_reptile_reads_the_same_rows_whatever_the_ranks(tmp_path, monkeypatch):
    """Windows of a row and a target from random places."""
    c, text, seen = replace(REPTILE, reptile_tasks=4), stream(tmp_path), []

    def look(model, fast, rows, nll_fn):
        seen.append(rows)
        return torch.zeros(())

    monkeypatch.setattr(train_gpt, "reptile_step", look)
    for ranks in (1, 2):
        monkeypatch.setattr(train_gpt, "world_size", lambda ranks=ranks: ranks)
        for rank in range(ranks):
            monkeypatch.setattr(train_gpt, "rank", lambda rank=rank: rank)
            run, model = make_run(tmp_path, c, train=text), random_model(c, torch.float32)
            phase = train_gpt.reptile_phase(run, model, None, train_gpt.token_nll, None)
            phase.step(train_gpt.Moment(7, 0.0, 0.0, 1.0))
    assert seen[0].shape == (3, 4, 17) and torch.equal(torch.cat(seen[1:], dim=1), seen[0])
    tokens = np.tile(text.shards[0].astype(np.int64), 2)
    places = [
        next(p for p in range(1000) if (tokens[p : p + 17] == row).all())
        for row in seen[0].view(12, 17).numpy()
    ]
    assert len(set(places)) == 12


# ------------------------------------------------------------------------------------------------------------
# Training for the evaluator's steps
# ------------------------------------------------------------------------------------------------------------


def documents_of(sizes: list[int], length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that begin with BOS, of so many targets; the last one is the BOS of the next document."""
    rows = np.full((len(sizes), length + 1), train_gpt.BOS_ID)
    for row, size in enumerate(sizes):
        rows[row, 1:size] = random_ids(1, size - 1, seed + row)[0].numpy()
    return rows, np.array(sizes)


def text_of(*batches: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The documents as the evaluator meets them."""
    parts = [row[:size] for rows, sizes in batches for row, size in zip(rows, sizes.tolist(), strict=True)]
    return np.concatenate([*parts, [train_gpt.BOS_ID]]).astype(np.uint16)


FIRST, SECOND = [20, 15, 13, 10, 7, 6], [20, 16, 11, 10, 9, 5]  # pieces of five, at most four of them
SGD = dict(ttt_optimizer="sgd", ttt_momentum=0.9)
LORA = dict(ttt_mode="doc_lora", ttt_lr=0.3)
DEPLOYED = {
    "precond": dict(ttt_lr=3e-3),
    "precond, shared": dict(ttt_lr=3e-3, ttt_moments="shared"),
    "precond, context, two epochs": dict(ttt_lr=1e-3, ttt_context=3, ttt_epochs=2, ttt_prior_seqs=0),
    "sgd": SGD,
    "sgd, context, two epochs": dict(**SGD, ttt_context=7, ttt_epochs=2, ttt_lr=5e-3),
    "unclipped, frozen": dict(ttt_optimizer="sgd", ttt_grad_clip=0.0, ttt_freeze_blocks=1, ttt_lr=3e-3),
    "adamw, rates of the MLP": dict(ttt_optimizer="adamw", ttt_momentum=0.9, ttt_weight_decay=0.1,
                                    ttt_lr=3e-3, ttt_in_lr_mult=0.5, ttt_out_lr_mult=2.0),
    "low rank": dict(**LORA, **SGD),
    "low rank, precond, context, two epochs": LORA | dict(ttt_lr=3e-3, ttt_context=3, ttt_epochs=2),
    "low rank, warm start": dict(**LORA, **SGD, ttt_warm_start_a=True),
    "no steps": dict(ttt_epochs=0),
}  # fmt: skip


def deployed_and_evaluated(
    c: Config, *sizes: list[int], factors: bool = True
) -> tuple[list[float], list[float]]:
    """The loss of each batch of documents by training's steps,
    and by the evaluator on it as a text of its own."""
    c = replace(c, ttt_slots=len(sizes[0]), ttt_groups=1, meta_ttt_docs=len(sizes[0]))
    batches = [
        documents_of(each, c.meta_ttt_pieces * c.doc_chunk, 100 * n) for n, each in enumerate(sizes, 1)
    ]
    state = random_model(c, torch.float32).state_dict()
    artifact = train_gpt.Artifact(c, state, "hash")
    model = train_gpt.load_model(artifact, CPU, word_start=TABLE.has_leading_space)
    rates = random_rates(model, c) if factors else MetaRates(model, c)
    with train_gpt.fake_quantized_banks(model):
        rounded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    artifact = artifact._replace(state=rounded, factors=rates.factors())
    setup = eval_ttt.Setup(c, artifact, CPU, train_gpt.sdpa_attention, TABLE, train_gpt.token_nll)
    fast = inner_weights(model, c, "deployed")
    if fast.wants_prior:
        fast.moments.start = train_gpt.generated_moments(setup.load(), c, fast.sets)
    found = [float(deployed_step(model, fast, rates, *batch)) for batch in batches]
    assert all(bool(log.grad.any()) != (c.meta_control or c.ttt_epochs == 0) for log in rates.logs.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert name not in BANKS or not torch.equal(tensor, rounded[name])
    texts = [text_of(batch) for batch in batches]
    scores = [score_plan(setup, text) if c.meta_control else evaluate(setup, text) for text in texts]
    return found, [score.nll.mean(dtype=np.float64) for score in scores]


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("changes", DEPLOYED.values(), ids=DEPLOYED)
def test_its_loss_is_the_evaluators(precise, changes, control):
    """Two batches: nothing lasts from one to the next but the prior; the control adapts nothing."""
    found, expected = deployed_and_evaluated(replace(TINY, meta_control=control, **changes), FIRST, SECOND)
    assert found == pytest.approx(expected, abs=2e-6)


def test_steps_and_factors_matter_to_that_loss(precise):
    """The control of the test above."""
    given = [(SGD, True), (SGD, False), (dict(meta_control=True), True)]
    losses = [
        deployed_and_evaluated(replace(TINY, **c), FIRST, factors=factors)[1][0] for c, factors in given
    ]
    assert min(abs(one - two) for one, two in pairwise([*losses, losses[0]])) > 1e-3


@pytest.mark.parametrize("changes", [dict(ttt_lr=3e-3), SGD], ids=["precond", "sgd"])
def test_batches_of_short_documents(precise, changes):
    """Pieces that no document reaches teach nothing: the second moments, above all, do not see them."""
    found, expected = deployed_and_evaluated(replace(TINY, **changes), [6, 9, 8], [18, 11, 20])
    assert found == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("stride", [4, 12], ids=["up to the piece's end", "side by side"])
def test_documents_longer_than_a_window(precise, stride):
    """A window of twelve tokens; the last piece of a document may be a part of one."""
    c = replace(TINY, eval_seq_len=12, ttt_chunk_size=4, eval_stride=stride, meta_ttt_pieces=5, **SGD)
    found, expected = deployed_and_evaluated(c, [20, 18, 16, 13, 9])
    assert found == pytest.approx(expected, abs=2e-6)


def deployed_by_hand(model: GPT, c: Config, rows, sizes, logs, pairs) -> tuple[float, dict, dict]:
    """Loss, gradients of the parameters and of the logarithms of the factors;
    SGD, one document after the other."""
    total, lr, loss = int(sizes.sum()), c.ttt_lr, 0.0
    with train_gpt.fake_quantized_banks(model):
        rounded = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {name: torch.zeros_like(p) for name, p in rounded.items()}
    of_logs = {name: torch.zeros_like(log) for name, log in logs.items()}
    scale = c.ttt_lora_alpha / c.ttt_lora_rank
    for row, size in zip(torch.from_numpy(rows), sizes.tolist(), strict=True):
        start = pairs or rounded
        fast, velocity = (
            {n: v.clone() for n, v in start.items()},
            {n: torch.zeros_like(v) for n, v in start.items()},
        )

        def nats(values: dict, own: dict, left: int, a: int, b: int, row=row) -> torch.Tensor:
            moved = (
                {bank: own[bank] + scale * values[f"{bank}.b"] @ values[f"{bank}.a"] for bank in BANKS}
                if pairs
                else {}
            )
            weights = {**own, **moved} if pairs else values
            return mean_nll(model, weights, row[None, left:b], row[None, left + 1 : b + 1], a - left) * (
                b - a
            )

        for a in range(0, size, c.ttt_chunk_size):
            b = min(a + c.ttt_chunk_size, size)
            leaves = {name: value.clone().requires_grad_() for name, value in fast.items()}
            own = {name: value.clone().requires_grad_() for name, value in rounded.items()}
            part = nats(leaves, own, 0, a, b) / total
            loss += part.item()
            wanted = {**leaves, **(own if pairs else {})}
            g = dict(zip(wanted, torch.autograd.grad(part, list(wanted.values())), strict=True))
            for name in rounded:
                found[name] += g[name]
            for name in fast:
                if name.split(".")[0] in BANKS:
                    of_logs[name.split(".")[0]] += (g[name] * (fast[name] - start[name])).sum(
                        (-2, -1), keepdim=True
                    )
            for _ in range(c.ttt_epochs if b < size else 0):
                leaves = {name: value.clone().requires_grad_() for name, value in fast.items()}
                mean = nats(leaves, rounded, max(0, a - c.ttt_context), a, b) / (b - a)
                for name, each in zip(leaves, torch.autograd.grad(mean, list(leaves.values())), strict=True):
                    velocity[name] = c.ttt_momentum * velocity[name] + each
                    bank = name.split(".")[0]
                    factor = frozen_mask(c, name, c.ttt_freeze_blocks, each) * (
                        logs[bank].exp() if bank in logs else 1.0
                    )
                    fast[name] = fast[name] - lr * factor * velocity[name]
    return loss, found, of_logs


EXACT = replace(SMALL, num_layers=3, ve_layers="1", eval_seq_len=32, ttt_chunk_size=5, meta_ttt_enabled=True,
                meta_ttt_objective="deployed", meta_sgd_enabled=True, ttt_optimizer="sgd", ttt_grad_clip=0.0,
                ttt_lr=0.02, meta_ttt_docs=3, ttt_lora_rank=2)  # fmt: skip
BY_HAND = {
    "doc_banks": dict(meta_ttt_pieces=3, ttt_momentum=0.5, ttt_context=2, ttt_epochs=2),
    "frozen": dict(meta_ttt_pieces=3, ttt_freeze_blocks=1),
    "doc_lora": dict(meta_ttt_pieces=3, ttt_mode="doc_lora", ttt_lr=0.5, ttt_momentum=0.5),
}


def deployed_case(changes: dict):
    """A model in float64, its fast weights, and documents
    of which one ends at a piece's border and one is short."""
    c = replace(EXACT, **changes)
    model, length = live_model(c), c.meta_ttt_pieces * 5
    fast = exact(inner_weights(model, c, "deployed"), model)
    return c, model, fast, random_rates(model, c), documents_of([length, 8, 10], length, 3)


@pytest.mark.parametrize("changes", BY_HAND.values(), ids=BY_HAND)
def test_its_gradient_is_the_sum_over_pieces(double, changes):
    """Those at the fast values, which begin with rounded banks, go straight through to the parameters."""
    c, model, fast, rates, (rows, sizes) = deployed_case(changes)
    loss, expected, of_logs = deployed_by_hand(model, c, rows, sizes, rates.logs, adapters_of(fast))
    found = deployed_step(model, fast, rates, rows, sizes)
    assert float(found) == pytest.approx(loss, abs=1e-6)
    assert_close(gradients(model), expected, 1e-6)
    assert_close({name: log.grad for name, log in rates.logs.items()}, of_logs, 1e-6)
    for log in rates.logs.values():
        assert (
            (log.grad == 0).flatten() == torch.tensor([r % 3 < c.ttt_freeze_blocks for r in range(len(log))])
        ).all()


@pytest.mark.parametrize("mode, lr", [("doc_banks", 0.02), ("doc_lora", 0.5)])
def test_its_factors_have_exact_gradients_after_one_step(double, mode, lr):
    c, model, fast, rates, (rows, sizes) = deployed_case(dict(meta_ttt_pieces=2, ttt_mode=mode, ttt_lr=lr))
    pairs = adapters_of(fast)
    expected = central_differences(
        lambda logs: deployed_by_hand(model, c, rows, sizes, logs, pairs)[0], rates.logs
    )
    deployed_step(model, fast, rates, rows, sizes)
    assert_close({name: log.grad for name, log in rates.logs.items()}, expected, 1e-6)
    assert all(g.abs().max() > 1e-5 for g in expected.values())


def test_heads_of_training_do_not_adapt():
    c = replace(EXACT, mtp_num_heads=1, meta_ttt_pieces=2)
    model = random_model(c, torch.float32)
    deployed_step(
        model, inner_weights(model, c, "deployed"), MetaRates(model, c), *documents_of([10, 8, 9], 10, 3)
    )
    assert model.mtp_heads[0].weight.grad is None or not model.mtp_heads[0].weight.grad.any()


def test_many_pieces_can_be_compiled(monkeypatch):
    """As many as META_TTT_PIECES has by default, beside the shapes of scoring:
    torch.compile has a limit of shapes."""
    c = replace(
        EXACT, num_layers=1, ve_enabled=False, meta_ttt_pieces=Config.meta_ttt_pieces, eval_seq_len=64
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    losses, (rows, sizes) = [], documents_of([40, 31, 22], 40, 3)
    torch._dynamo.reset()
    compiled = train_gpt.maybe_compile(train_gpt.token_nll, replace(c, use_compile="1"), CPU)
    for nll_fn in (train_gpt.token_nll, compiled):
        model = random_model(c, torch.float32)
        with torch.no_grad():
            for width in (64, 16):  # of the two scores
                columns = torch.arange(64 - width, 64).expand(2, -1)
                nll_fn(model, random_ids(2, 64), random_ids(2, width), columns)
        fast = inner_weights(model, c, "deployed")
        losses.append(float(deployed_step(model, fast, MetaRates(model, c), rows, sizes, nll_fn)))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Documents of the training text
# ------------------------------------------------------------------------------------------------------------


def corpus(folder: Path, lengths: list[int]) -> train_gpt.TokenStream:
    rng, parts = np.random.default_rng(1), []
    for length in lengths:
        parts += [np.array([train_gpt.BOS_ID]), rng.integers(2, 40, length - 1)]
    write_shard(folder / "train.bin", np.concatenate(parts))
    return train_gpt.TokenStream(str(folder / "train.bin"), 40)


MIXED, LONG = [3, 17, 5, 6, 1, 40, 20, 21, 9, 4, 30, 15], [150, 19, 130, 90, 7, 300]


@pytest.mark.parametrize("lengths", [MIXED, LONG], ids=["mixed", "long"])
def test_rows_are_stretches_of_documents(tmp_path, lengths):
    """From a document's BOS, or from further in than a row is long,
    to the next BOS or as far as the row goes."""
    text = corpus(tmp_path, lengths)
    c = replace(EXACT, meta_ttt_pieces=4)  # of five
    tokens = np.append(text.shards[0].astype(np.int64), train_gpt.BOS_ID)
    borders, count, found = np.flatnonzero(tokens == train_gpt.BOS_ID), 2000, Counter()
    rows, sizes = sample_documents(text, count, c, np.random.default_rng(2))
    assert rows.shape == (count, 21) and sizes.shape == (count,)
    windows = np.lib.stride_tricks.sliding_window_view(np.append(tokens, np.zeros(21, np.int64)), 21)
    for row, size in zip(rows, sizes.tolist(), strict=True):
        (at,) = np.flatnonzero((windows[:, : size + 1] == row[: size + 1]).all(1))
        document = int(np.searchsorted(borders, at, side="right")) - 1
        assert at == borders[document] or at > borders[document] + 20
        assert size == min(borders[document + 1] - at, 20) > 5
        found[document] += 1
    long = {number: length for number, length in enumerate(np.diff(borders).tolist()) if length > 5}
    assert found.keys() == long.keys()
    # by tokens, but that the last few of a document are too few for a piece
    for (
        number,
        length,
    ) in long.items():
        least, most = (max(length - 5, min(length, 20)) if length > 20 else length), length
        total = sum(long.values())
        assert 0.7 * least / total < found[number] / count < 1.4 * most / (total - 5 * len(long))


def test_documents_are_those_of_the_generator(tmp_path):
    text, c = corpus(tmp_path, MIXED), replace(EXACT, meta_ttt_pieces=4)
    one, two, other = (sample_documents(text, 8, c, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (
        np.array_equal(one[0], two[0])
        and np.array_equal(one[1], two[1])
        and not np.array_equal(one[0], other[0])
    )


def test_no_document_is_long_enough(tmp_path):
    with pytest.raises(UserError, match=r"META_TTT_OBJECTIVE=deployed.* 5 tokens"):
        sample_documents(
            corpus(tmp_path, [5, 3, 4, 5]), 1, replace(EXACT, meta_ttt_pieces=4), np.random.default_rng(1)
        )


# ------------------------------------------------------------------------------------------------------------
# Two ranks
# ------------------------------------------------------------------------------------------------------------

TOGETHER = {
    "batch": FOMAML,
    "seq, delta": replace(FOMAML, meta_ttt_split="seq", meta_ttt_delta_weight=0.3),
    "several, cut": replace(FOMAML, **SEVERAL, meta_ttt_split="cut"),
    "reptile": replace(REPTILE, reptile_layers="1,3"),
    "reptile, control": replace(REPTILE, meta_control=True),
    "deployed": replace(EXACT, meta_ttt_docs=4, meta_ttt_pieces=3),
    "deployed, precond": replace(EXACT, meta_ttt_docs=4, meta_ttt_pieces=3, ttt_optimizer="precond",
                                 ttt_lr=3e-3, ttt_grad_clip=2.0),
    "deployed, lora": replace(EXACT, meta_ttt_docs=4, meta_ttt_pieces=3, ttt_mode="doc_lora", ttt_lr=0.3),
}  # fmt: skip


def take_steps(c: Config) -> dict[str, torch.Tensor]:
    """Two meta-steps on this rank's part of the work: losses, mean gradients, factors, and the weights."""
    ranks, rank, model = train_gpt.world_size(), train_gpt.rank(), live_model(c)
    objective = "reptile" if c.reptile_enabled else c.meta_ttt_objective
    rates, fast = random_rates(model, c), exact(inner_weights(model, c, objective), model)
    found = {}
    for seed in (1, 2):
        if objective == "reptile":
            rows = random_ids(12, 13, seed).view(3, 4, 13).chunk(ranks, dim=1)[rank]
            loss = reptile_step(model, fast, rows) / ranks
        elif objective == "deployed":
            loss = deployed_step(model, fast, rates, *documents_of([15, 7, 10, 13], 15, 9 * seed)) / ranks
        else:
            mine = [part.chunk(ranks)[rank] for part in text_rows(8, 12, seed)]
            loss = fomaml_step(model, fast, rates, *mine)[1] / ranks
        losses = train_gpt.sum_over_ranks([loss])
        sums = train_gpt.sum_over_ranks(list(gradients(model).values()))
        names = [f"gradient {seed} {name}" for name in gradients(model)]
        found |= {f"loss {seed}": losses[0]} | {n: g / ranks for n, g in zip(names, sums, strict=True)}
        if objective != "reptile":
            rates.step(1.0)
            found |= {f"log {seed} {name}": log.clone() for name, log in rates.logs.items()}
        found |= {f"weight {seed} {name}": p.detach().clone() for name, p in model.named_parameters()}
        model.zero_grad()
    return found


def work_of_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({name: take_steps(config) for name, config in TOGETHER.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(work_of_a_rank, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", TOGETHER)
def test_two_ranks_take_the_steps_of_one(double, two_ranks, name):
    alone = take_steps(TOGETHER[name])
    assert_close(two_ranks[0][name], two_ranks[1][name], 0.0)
    assert_close(two_ranks[0][name], alone, 1e-8)
    for kind in ("weight",) if "reptile" in name else ("gradient", "log"):
        assert any((alone[key] - alone[key.replace(" 2 ", " 1 ")]).abs().max() > 1e-6 for key in alone
                   if key.startswith(f"{kind} 2")), kind  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Late phases
# ------------------------------------------------------------------------------------------------------------

LATE = dict(reptile_enabled=True, reptile_time_frac=0.2, meta_ttt_enabled=True, meta_ttt_objective="deployed",
            meta_ttt_time_frac=0.3)  # fmt: skip


@pytest.fixture
def phases(monkeypatch) -> SimpleNamespace:
    """Phases that do nothing: `asked` says which, and what was left. A step takes a second of `clock`."""
    given = SimpleNamespace(clock=running(StepClock()), loss=1.5, asked=[])

    def step(name: str, now: train_gpt.Moment) -> train_gpt.StepMetrics:
        given.asked.append((name, now.left))
        return train_gpt.StepMetrics(torch.tensor([given.loss]), ["loss"])

    fakes = {
        name: lambda *_, name=name: train_gpt.Phase(partial(step, name)) for name in ("reptile", "deployed")
    }
    monkeypatch.setattr(train_gpt, "PHASES", train_gpt.PHASES | fakes)
    return given


def late(tmp_path, phases, reserve: float = 0.0, **changes) -> dict[str, int]:
    c = replace(SMALL, **LATE | changes)
    run, model = make_run(tmp_path, c, train=stream(tmp_path)), random_model(c, torch.float32)
    progress = make_progress(run, model, phases.clock, MetaRates(model, c), trained=phases.clock.seconds())
    train_gpt.train(run, model, None, None, reserve, progress)  # training is done, as `progress` has it
    return steps_of(progress)


def steps_of(progress: train_gpt.Progress) -> dict[str, int]:
    """The steps of the phases after training."""
    return {name: steps for name, (steps, _) in progress.done.items() if name != "train"}


def test_shares_of_the_iterations(tmp_path, phases):
    assert late(tmp_path, phases, iterations=20, max_wallclock_seconds=0.0) == {"reptile": 4, "deployed": 6}
    expected = [("reptile", 1 - n / 4) for n in range(4)] + [("deployed", 1 - n / 6) for n in range(6)]
    assert [name for name, _ in phases.asked] == [name for name, _ in expected]
    assert [left for _, left in phases.asked] == pytest.approx([left for _, left in expected])


@pytest.mark.parametrize("changes, expected", [
    (dict(reptile_enabled=False), {"deployed": 6}), (dict(meta_ttt_enabled=False), {"reptile": 4}),
    (dict(meta_ttt_objective="fomaml"), {"reptile": 4}), (dict(iterations=1), {"reptile": 1, "deployed": 1}),
    (dict(meta_ttt_enabled=False, reptile_enabled=False), {}),
], ids=str)  # fmt: skip
def test_phases_that_are_asked_for(tmp_path, phases, changes, expected):
    assert late(tmp_path, phases, **dict(iterations=20, max_wallclock_seconds=0.0) | changes) == expected


def test_shares_of_the_clock(tmp_path, phases):
    """Training has had 45 of 90 seconds; a fifth are 18,
    and one more step would not have fitted after the 17th."""
    phases.clock.now = 45.0  # as training left it
    steps = late(tmp_path, phases, 10.0, iterations=10**6, max_wallclock_seconds=100.0)
    assert 17 <= steps["reptile"] <= 18 and 44 <= sum(steps.values()) <= 45
    left = [left for name, left in phases.asked if name == "deployed"]
    assert left[0] == 1 and all(a > b > 0 for a, b in pairwise(left)) and left[-1] < 2.5 / steps["deployed"]


def test_preparing_a_phase_is_no_part_of_its_pace(tmp_path, phases, monkeypatch):
    """On an H100 the phase took one step in its thirty seconds, of which preparing it took most of ten."""
    deployed = train_gpt.PHASES["deployed"]

    def prepare(*given):
        phases.clock.now += 20.0
        return deployed(*given)

    monkeypatch.setitem(train_gpt.PHASES, "deployed", prepare)
    changes = dict(iterations=10**6, max_wallclock_seconds=100.0, reptile_enabled=False)
    phases.clock.now = 70.0
    assert late(tmp_path, phases, **changes) == {"deployed": 10}
    assert phases.clock.now <= 100
    assert "step_avg:1000.00ms" in (tmp_path / "train.log").read_text()


def test_training_and_late_phases_fit_the_clock(tmp_path, phases):
    c = replace(SMALL, **LATE, max_wallclock_seconds=40.0, iterations=999, warmdown_iters=4,
                train_batch_tokens=64, grad_accum_total=1, val_loss_every=0, train_log_every=1)  # fmt: skip
    run, model = make_run(tmp_path, c, train=stream(tmp_path)), random_model(c, torch.float32)
    functions, rates = (train_gpt.training_loss, train_gpt.token_nll), MetaRates(model, c)
    progress = make_progress(run, model, phases.clock, rates)
    train_gpt.train(run, model, *functions, 4.0, progress)
    assert progress.done["train"][0] == 18
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["lr_scale"] == pytest.approx(1 / 4)  # it has come down, as if the run ended here
    steps = steps_of(progress)
    assert 6 <= steps["reptile"] <= 7 and 34 <= phases.clock.now <= 36


def test_training_has_its_share_of_the_iterations(tmp_path, phases):
    c = replace(SMALL, **LATE, max_wallclock_seconds=0.0, iterations=10, warmdown_iters=4,
                train_batch_tokens=64, grad_accum_total=1, val_loss_every=0, train_log_every=1)  # fmt: skip
    run, model = make_run(tmp_path, c, train=stream(tmp_path)), random_model(c, torch.float32)
    functions, rates = (train_gpt.training_loss, train_gpt.token_nll), MetaRates(model, c)
    progress = make_progress(run, model, running(StepClock()), rates)
    train_gpt.train(run, model, *functions, 0.0, progress)
    assert progress.done["train"][0] == 5
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr_scale"] for row in rows] == pytest.approx([1, 1, 3 / 4, 2 / 4, 1 / 4])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_phase(tmp_path, phases, loss):
    phases.loss, phases.clock = loss, train_gpt.Clock(torch.device("cpu"))
    phases.clock.start()
    with pytest.raises(FloatingPointError, match="step 1"):
        late(tmp_path, phases, iterations=20, max_wallclock_seconds=0.0)
    assert len(phases.asked) == 1


def test_rates_of_the_deployed_phase_fall_to_zero(tmp_path, monkeypatch):
    """From META_TTT_OUTER_LR of the peak; the factors' rate from its own."""
    c = replace(SMALL, **LATE | dict(reptile_enabled=False), iterations=10, max_wallclock_seconds=0.0,
                ttt_chunk_size=5, meta_ttt_pieces=2, meta_ttt_docs=2, meta_ttt_outer_lr=0.2,
                meta_sgd_enabled=True)  # fmt: skip
    run, model = make_run(tmp_path, c, train=stream(tmp_path)), random_model(c, torch.float32)
    rates, scales, take = MetaRates(model, c), [], train_gpt.train_step
    weights = [p.detach().clone() for p in model.parameters()]

    def watch(loss_fn, model, batches, optimizers, *rest, **named):
        found = take(loss_fn, model, batches, optimizers, *rest, **named)
        groups = [g for o in optimizers for g in o.param_groups]
        shares = {round(group["lr"] / group["peak_lr"], 9) for group in groups}
        scales.append((*shares, rates.adam.param_groups[0]["lr"] / c.scalar_lr))
        return found

    monkeypatch.setattr(train_gpt, "train_step", watch)
    progress = make_progress(run, model, running(StepClock()), rates, trained=0.0)
    train_gpt.train(run, model, None, train_gpt.token_nll, 0.0, progress)
    np.testing.assert_allclose(scales, [(0.2, 1.0), (0.4 / 3, 2 / 3), (0.2 / 3, 1 / 3)], atol=1e-8)
    assert all(not torch.equal(p, before) for p, before in zip(model.parameters(), weights, strict=True))
    assert all((factor != 1).all() for factor in rates.factors().values())


# ------------------------------------------------------------------------------------------------------------
# Settings, and whole runs
# ------------------------------------------------------------------------------------------------------------

ON = dict(META_TTT_ENABLED="1", META_TTT_OBJECTIVE="deployed")
REFUSED = {
    "banks": (dict(ON, TTT_MODE="banks"), ["META_TTT_OBJECTIVE=deployed", "TTT_MODE"]),
    "none": (dict(ON, TTT_MODE="none"), ["META_TTT_OBJECTIVE=deployed", "TTT_MODE"]),
    "cosine": (dict(ON, TTT_LR_SCHEDULE="cosine"), ["by documents", "TTT_LR_SCHEDULE=cosine"]),
    "by loss": (dict(ON, TTT_TOP_FRAC="0.5"), ["by documents", "TTT_TOP_FRAC=0.5"]),
    "layers": (dict(REPTILE_ENABLED="1", REPTILE_LAYERS="9,11"), ["REPTILE_LAYERS='9,11'", "up to 10"]),
    "no layers": (dict(REPTILE_LAYERS="last"), ["REPTILE_LAYERS='last'"]),
    "nothing left": (dict(ON, REPTILE_ENABLED="1", META_TTT_TIME_FRAC="0.6", REPTILE_TIME_FRAC="0.4"),
                     ["META_TTT_TIME_FRAC", "REPTILE_TIME_FRAC"]),
    "one piece": (dict(ON, META_TTT_PIECES="1"), ["META_TTT_PIECES=1"]),
    "objective": (dict(META_TTT_OBJECTIVE="maml"), ["META_TTT_OBJECTIVE='maml'"]),
    "split": (dict(META_TTT_SPLIT="rows"), ["META_TTT_SPLIT='rows'"]),
}  # fmt: skip


@pytest.mark.parametrize("given, words", REFUSED.values(), ids=REFUSED)
def test_what_the_user_can_put_right(given, words):
    with pytest.raises(UserError) as error:
        load_config(given)
    assert all(word in str(error.value) for word in words)


def test_what_is_off_is_not_refused():
    given = dict(
        META_TTT_OBJECTIVE="deployed", TTT_MODE="banks", META_TTT_TIME_FRAC="0.9", REPTILE_TIME_FRAC="0.9"
    )
    config, _, _ = load_config(given)
    assert config.phases == {"train": 1}
    assert load_config({**given, "REPTILE_ENABLED": "1"})[0].phases == {
        "train": pytest.approx(0.1),
        "reptile": 0.9,
    }


@pytest.fixture(scope="module")
def env(demo_data, tmp_path_factory) -> dict[str, str]:
    """The smoke recipe for a moment, with a validation text of 600 tokens."""
    shard = tmp_path_factory.mktemp("val") / "fineweb_val_000000.bin"
    write_shard(shard, np.fromfile(demo_data / "fineweb_val_000000.bin", "<u2")[512 : 512 + 600])
    return dict(
        RECIPE=str(ROOT / "records/recipes/smoke.env"), DATA_PATH=str(demo_data), VAL_FILES=str(shard),
        RUN_ID="run", TOKENIZER_PATH=f"{demo_data}/tokenizer.model", DEVICE="cpu", ITERATIONS="10",
        VAL_LOSS_EVERY="0", GPTQ_CALIB_BATCHES="0", TTT_CHUNK_SIZE="32", TTT_BATCH_SEQS="4",
        EVAL_BUDGET_SECONDS="1000000", META_TTT_ENABLED="1", META_SGD_ENABLED="1", META_SGD_LR="0.1",
    )  # fmt: skip


RUNS = {
    "fomaml": (dict(META_TTT_EVERY="2", META_TTT_FREEZE_BLOCKS="1", META_TTT_DELTA_WEIGHT="0.1"), {}, 10),
    "deployed": (dict(META_TTT_OBJECTIVE="deployed", META_TTT_TIME_FRAC="0.3", META_TTT_DOCS="3",
                      META_TTT_PIECES="3", TTT_FREEZE_BLOCKS="1", REPTILE_ENABLED="1",
                      REPTILE_TIME_FRAC="0.2"),
                 {"reptile": 2, "deployed": 3}, 5),
}  # fmt: skip


@pytest.mark.parametrize("settings, late_steps, steps", RUNS.values(), ids=RUNS)
def test_a_whole_run(env, tmp_path, monkeypatch, settings, late_steps, steps):
    """Train, export, load strictly, evaluate:
    by the factors of the log and the result where they were deployed."""
    folder = train_here({**env, **settings}, tmp_path)
    result, log = json.loads((folder / "result.json").read_text()), (folder / "train.log").read_text()
    assert result["late_steps"] == late_steps and result["steps"] == steps and result["legal"] is True
    rates = result["meta_rates"]
    assert {name: len(row) for name, row in rates.items()} == dict(
        qo_bank=6, kv_bank=6, mlp_up_bank=3, mlp_down_bank=3
    )
    for row in rates.values():  # the first block is frozen
        assert all((x == 1) == (n % 3 == 0) and x > 0 for n, x in enumerate(row))
    spans = "".join(f" rates_{name}:{min(row):.3f}..{max(row):.3f}" for name, row in rates.items())
    lines = [line for line in log.splitlines() if re.match(r"(meta|reptile|deployed)_step:", line)]
    assert lines[-1].endswith(spans)
    names = [line.split(":")[0] for line in lines]
    assert names == [
        f"{name}_step" for name, n in (late_steps or {"meta": len(lines)}).items() for _ in range(n)
    ]
    artifact = train_gpt.read_artifact(folder / "final_model.int6.ptz")
    model = train_gpt.load_model(artifact, CPU)
    model.load_state_dict(torch.load(folder / "final_model.pt", weights_only=True), strict=True)
    stored = rates if "deployed" in late_steps else {}
    assert_close({name: f.flatten() for name, f in artifact.factors.items()},
                 {name: torch.tensor(row) for name, row in stored.items()}, 0.02)  # fmt: skip
    used, learner = [], eval_ttt.Adaptation.__init__

    def watch(self, *args):
        learner(self, *args)
        used.append(self.trainer.fast.rates)

    monkeypatch.setattr(eval_ttt.Adaptation, "__init__", watch)
    monkeypatch.chdir(tmp_path)
    assert eval_ttt.main([], {**env, **settings, "TTT_FREEZE_BLOCKS": "0"}) == 0
    scores = json.loads((folder / "eval_ttt.json").read_text())
    assert math.isfinite(scores["val_loss_ttt"]) and scores["ttt_gain_bpb"] != 0
    assert scores["val_loss_sliding"] == result["val_loss_sliding"]
    for name in BANKS:
        factor = artifact.factors[name] if stored else torch.ones(len(rates[name]), 1, 1)
        torch.testing.assert_close(used[0][name], factor, rtol=1e-6, atol=0)
    assert ("Meta-SGD's factors" in next(folder.glob("eval/*/eval_ttt.log")).read_text()) == bool(stored)
