"""records/analyze.py: errors against simulation and scipy,
curvature against whole Hessians, a model against itself."""

import json
import re
import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import analyze
import matplotlib.text
import numpy as np
import pytest
import report
import scipy
import torch
from analyze import Estimate, Side, Text, clustered
from matplotlib import style
from scipy import stats
from sentencepiece import SentencePieceProcessor
from test_cli import write_shard
from test_model import SMALL, random_ids, random_model
from test_scoring import TABLE, TOKENS

import eval_ttt
import train_gpt
from train_gpt import GPT, Artifact, Config

CPU = torch.device("cpu")
LEARNS = replace(SMALL, eval_seq_len=12, eval_stride=4, eval_batch_seqs=4, ttt_chunk_size=5,
                 ttt_chunk_tokens=16, ttt_batch_seqs=4, ttt_slots=4, ttt_groups=1, ttt_prior_seqs=2,
                 ttt_lr=0.01)  # fmt: skip
TINY = Config(vocab_size=6, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, mlp_hidden=4,
              bigram_vocab_size=0, ve_enabled=False, rope_dims=4, train_seq_len=6,
              logit_softcap=4.0)  # fmt: skip


def side_of(model: GPT, config: Config = SMALL, rounded: Artifact | None = None, **learned) -> Side:
    artifact = Artifact(config, model.state_dict(), "hash", **learned)
    setup = eval_ttt.Setup(config, artifact, CPU, train_gpt.sdpa_attention, TABLE, train_gpt.token_nll)
    return Side(None, model, setup, rounded, "")


def text_of(rows: int = 6, length: int = 10, vocab: int = 40, tokens: np.ndarray = TOKENS) -> Text:
    ids = random_ids(rows, length + 1, seed=3, vocab=vocab)
    return Text(tokens, ids[:, :-1], ids[:, 1:], seed=5)


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    """Four rows of ten tokens, or six of six, are a batch."""
    monkeypatch.setattr(analyze, "BATCH_TOKENS", 40)


@pytest.fixture
def few(monkeypatch):
    """Few steps, probes and draws, where it is not their precision that is looked at."""
    for name, small in (
        ("LANCZOS", 4),
        ("SHOWN", (2, 4)),
        ("PROBES", 3),
        ("CURVATURE_ROWS", 2),
        ("RESAMPLES", 200),
    ):
        monkeypatch.setattr(analyze, name, small)


def values(table: analyze.Table) -> list[float]:
    return [cell.value for cells in table.values() for cell in cells.values()]


# ------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------


def test_units_of_equal_size_are_their_means():
    """Then the error, the interval and the bootstrap are those of the units' means, as scipy has them."""
    x, units = np.random.default_rng(0).normal(1.0, 2.0, 240), np.repeat(np.arange(24), 10)
    found, means = clustered(x, units), x.reshape(24, 10).mean(1)
    interval = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
    assert (found.value, found.error) == (pytest.approx(means.mean()), pytest.approx(stats.sem(means)))
    assert found.interval() == pytest.approx((interval.low, interval.high))
    theirs = stats.bootstrap((means,), np.mean, method="percentile", rng=1).confidence_interval
    assert analyze.bootstrap(x, units) == pytest.approx((theirs.low, theirs.high), abs=0.1 * found.error)


def test_errors_of_unequal_units_by_simulation():
    """Units of 1 to 40 targets that share an effect:
    the error is the spread of the mean over draws of whole texts."""
    rng = np.random.default_rng(1)
    means, errors, naive, inside = [], [], [], []
    for _ in range(600):
        sizes = rng.integers(1, 41, 80)
        units = np.repeat(np.arange(80), sizes)
        x = 3 + rng.normal(0, 1, 80)[units] + rng.normal(0, 1, len(units))
        found = clustered(x, units)
        means.append(found.value)
        errors.append(found.error)
        naive.append(clustered(x, np.arange(len(x))).error)
        inside.append(found.interval()[0] < 3 < found.interval()[1])
    spread = np.std(means)
    assert np.mean(errors) == pytest.approx(spread, rel=0.08)
    assert np.mean(naive) < 0.4 * spread  # what is wrong with an error by targets
    assert 0.92 < np.mean(inside) < 0.98
    assert analyze.bootstrap(x, units) == pytest.approx(found.interval(), abs=0.3 * found.error)


def test_what_two_estimates_share_cancels():
    rng = np.random.default_rng(2)
    units = np.sort(rng.integers(0, 9, 200))
    a, b = rng.normal(size=200), rng.normal(size=200)
    difference, direct = clustered(a, units).less(clustered(b, units)), clustered(a - b, units)
    assert (difference.value, difference.error) == pytest.approx((direct.value, direct.error))
    assert Estimate(3.0).less(Estimate(1.0)) == (2.0, pytest.approx([])) and Estimate(3.0).error is None
    assert clustered(a, np.zeros(200, int)).error is None  # one unit says nothing of its own spread


# ------------------------------------------------------------------------------------------------------------
# Two scores of the same targets
# ------------------------------------------------------------------------------------------------------------


def test_buckets_by_hand():
    loss = np.random.default_rng(0).uniform(0, 12, len(TOKENS) - 1)
    found = analyze.buckets(TOKENS, loss, TABLE)
    for kind, masks in found.items():
        # each target is in one bucket of each kind
        assert (np.sum(list(masks.values()), axis=0) == 1).all(), kind
    counts = {token: int((TOKENS[1:] == token).sum()) for token in TOKENS[1:].tolist()}
    for one, other in pairwise(found["frequency of the token"].values()):
        assert min(counts[t] for t in TOKENS[1:][one].tolist()) >= max(
            counts[t] for t in TOKENS[1:][other].tolist()
        )
    assert found["loss, mean of both"]["3-5"].tolist() == ((loss >= 3) & (loss < 5)).tolist()
    begins = [i for i in range(len(TOKENS) - 1) if i == 0 or TOKENS[i] == 1]
    positions = [i - max(b for b in begins if b <= i) for i in range(len(TOKENS) - 1)]
    assert found["position in the document"]["0-127"].tolist() == [p < 128 for p in positions]


def test_gain_by_hand():
    rng, tokens = np.random.default_rng(4), np.tile(TOKENS, 20)
    a, b = (rng.uniform(0, 8, len(tokens) - 1).astype(np.float32) for _ in range(2))
    a += 3  # far beyond the noise
    report = analyze.compare_nll(a, b, tokens, TABLE)
    gain = a.astype(float) - b
    for row in report["the gain, nats a target"].values():
        assert row["gain"].value == pytest.approx(gain.mean())
    assert len(report["the gain, nats a target"]) == 3
    for kind, masks in analyze.buckets(tokens, (a.astype(float) + b) / 2, TABLE).items():
        rows = report[kind]
        assert [row["gain"].value for row in rows.values()] == pytest.approx(
            [gain[m].mean() for m in masks.values()]
        )
        assert sum(row["share of the gain"].value for row in rows.values()) == pytest.approx(1)
        assert sum(row["share of targets"].value for row in rows.values()) == pytest.approx(1)
        assert [row["share of the gain"].value for row in rows.values()] == pytest.approx(
            [gain[m].sum() / gain.sum() for m in masks.values()]
        )
    same = analyze.compare_nll(a, a, tokens, TABLE)
    assert all(row["gain"] == (0, pytest.approx(0 * row["gain"].influence)) for rows in same.values()
               for row in rows.values())  # fmt: skip


def test_no_shares_of_a_gain_that_may_be_zero():
    rng = np.random.default_rng(6)
    tokens = np.where(np.arange(20_001) % 50 == 0, 1, rng.integers(2, 40, 20_001)).astype(np.uint16)
    a = rng.uniform(1, 9, 20_000)
    noise = rng.normal(0, 1, 20_000)
    for shift, shown in ((0.0, False), (0.3, True), (-0.3, True)):
        tables = analyze.compare_nll(a, a + shift + noise - noise.mean(), tokens, TABLE)
        rows = [row for kind in list(tables)[1:] for row in tables[kind].values()]
        assert {"share of the gain" in row for row in rows} == {shown}
        figure = analyze.draw_nll(tables, a - a, tokens, "title")
        ticks = [tick.get_text() for axis in figure.axes[:4] for tick in axis.get_xticklabels()]
        assert all(("%" in tick) == shown for tick in ticks) and len(ticks) == len(rows)
        assert figure.axes[5].get_title() == "Cumulative gain"
        assert all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes)


def test_sorting_by_the_mean_of_both_shows_no_gain_where_there_is_none():
    """Two scores that differ by noise alone: no part gains, while sorted by A's loss hard targets seem to."""
    rng = np.random.default_rng(5)
    tokens = np.where(np.arange(40_001) % 50 == 0, 1, rng.integers(2, 40, 40_001)).astype(np.uint16)
    true = rng.uniform(1, 9, 40_000)
    a, b = (true + rng.normal(0, 1, 40_000) for _ in range(2))
    rows = analyze.compare_nll(a, b, tokens, TABLE)["loss, mean of both"].values()
    z = [row["gain"].value / row["gain"].error for row in rows if row["share of targets"].value > 0.01]
    assert len(z) >= 4 and max(map(abs, z)) < 4
    hard = a > 7
    assert clustered((a - b)[hard], analyze.documents_of(tokens)[hard]).value > 0.3


def test_few_documents_are_not_what_errors_rest_on():
    many, few = np.tile([1, 5, 6, 7], 30).astype(np.uint16), np.full(9000, 5, np.uint16)
    assert [name.split()[1] for name in analyze.independent_units(many)] == [
        "documents",
        "blocks",
        "targets:",
    ]
    assert [name.split()[:2] for name in analyze.independent_units(few)][:2] == [
        ["5", "blocks"],
        ["1", "documents"],
    ]


# ------------------------------------------------------------------------------------------------------------
# Weights and activations
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_overlap_is_of_the_principal_angles(shape):
    rng = np.random.default_rng(6)
    a = rng.normal(size=shape)
    b = a + 0.5 * rng.normal(size=shape)
    k = min(shape) // analyze.TOP
    (u, _, vh), (x, _, yh) = (np.linalg.svd(m) for m in (a, b))
    for right, one, other in ((False, u[:, :k], x[:, :k]), (True, vh[:k].T, yh[:k].T)):
        expected = (np.cos(scipy.linalg.subspace_angles(one, other)) ** 2).mean()
        assert analyze.overlap(torch.tensor(a), torch.tensor(b), right) == pytest.approx(expected)


def test_chance_is_what_unrelated_matrices_have():
    a, b = (side_of(random_model(SMALL, seed=seed)) for seed in (0, 1))
    for right in (False, True):
        table = analyze.subspaces(a, b, text_of(), right)
        rng, expected = (
            torch.Generator().manual_seed(0),
            {row: cells["chance"].value for row, cells in table.items()},
        )
        for name, bank, _ in analyze.MATRICES:
            shape = getattr(a.model, bank).shape[1:]
            drawn = [
                analyze.overlap(
                    *(torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2)), right
                )
                for _ in range(300)
            ]
            assert np.mean(drawn) == pytest.approx(expected[name], rel=0.25)


def test_cka_against_the_formula():
    rng = np.random.default_rng(7)
    x, y = rng.normal(1, 1, (50, 6)), rng.normal(size=(50, 9))
    y[:, :6] += x
    sums = analyze.Products()
    for part in (slice(0, 20), slice(20, 50)):
        sums.add(torch.tensor(x[part]), torch.tensor(y[part]))
    H = np.eye(50) - 1 / 50
    K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
    assert sums.cka() == pytest.approx((K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum()))
    turned = analyze.Products()
    turned.add(torch.tensor(x), torch.tensor(3 * x @ stats.ortho_group.rvs(6, random_state=0) + 2))
    assert turned.cka() == pytest.approx(1)


def test_a_model_with_its_units_in_another_order():
    """The same function: CKA sees no difference; weights and the straight path do, as the notes say."""
    a, permuted = random_model(SMALL), random_model(SMALL)
    order = torch.randperm(SMALL.mlp_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        permuted.mlp_up_bank.copy_(a.mlp_up_bank[:, order])
        permuted.mlp_down_bank.copy_(a.mlp_down_bank[:, :, order])
    one, other, text = side_of(a), side_of(permuted), text_of()
    assert values(analyze.cka(one, other, text)) == pytest.approx([1] * 20)
    assert max(cell.value for cell in analyze.cosines(one, other, text)["up"].values()) < 0.3
    path = analyze.path_loss(one, other, text)
    assert path["loss"]["1"].value == pytest.approx(path["loss"]["0"].value, abs=1e-10)
    assert abs(path["above the line"]["0.5"].value) > 0.01


def test_activations_are_what_the_matrices_read():
    model, ids = random_model(SMALL), text_of().ids
    found = analyze.activations(model, ids)
    hessians = train_gpt.collect_hessians(model, [ids])
    assert len(found) == 4 * SMALL.num_layers
    for (stack, layer), x in found.items():
        assert torch.allclose(x.mT @ x / len(x), hessians[stack][layer].double(), rtol=1e-4, atol=1e-5)


def test_losses_of_rows_are_those_of_training():
    """Places of memory tokens predict nothing, and count for nothing."""
    model, text = random_model(replace(SMALL, num_memory_tokens=2)), text_of()
    losses = analyze.row_losses(model, text)
    assert losses.shape == (6, 8)
    assert losses.mean() == pytest.approx(train_gpt.training_loss(model, text.ids, text.targets).item())


def test_path_against_the_scores_of_the_models():
    """The ends are `score`'s of A and B on the same text; the middle that of the averaged state dict."""
    a, b = (random_model(SMALL, torch.float32, seed) for seed in (0, 1))
    ids, targets = analyze.sample_rows(TOKENS, (len(TOKENS) - 1) // 10, 10, 0, CPU)
    tokens = TOKENS[: ids.numel() + 1]
    table = analyze.path_loss(side_of(a), side_of(b), Text(TOKENS, ids, targets, 0))
    plan = [train_gpt.Chunk(train_gpt.sliding_windows(len(tokens), 10, 10))]
    middle = random_model(SMALL, torch.float32)
    middle.load_state_dict({name: (p + b.state_dict()[name]) / 2 for name, p in a.state_dict().items()})
    for column, model in (("0", a), ("1", b), ("0.5", middle)):
        losses = train_gpt.score(model, tokens, plan, TABLE, 4)
        assert table["loss"][column].value == pytest.approx(losses.val_loss, rel=1e-5)
        assert table["loss"][column].error == pytest.approx(
            stats.sem(losses.nll.reshape(-1, 10).mean(1)), rel=1e-4
        )
    above = [cell.value for name, cell in table["above the line"].items() if name != "barrier"]
    assert table["above the line"]["barrier"].value == max(above) > min(above)
    ends = table["loss"]["0"].value + table["loss"]["1"].value
    assert table["above the line"]["0.5"].value == pytest.approx(table["loss"]["0.5"].value - ends / 2)
    # nothing was changed
    assert a.state_dict()["qo_bank"].equal(random_model(SMALL, torch.float32, 0).qo_bank)


def test_sampled_rows_are_windows_of_the_text():
    ids, targets = analyze.sample_rows(TOKENS, 3, 7, 1, CPU)
    text = TOKENS.tolist()
    for row, next_row in zip(ids.tolist(), targets.tolist(), strict=True):
        assert (
            any(text[at : at + 8] == [*row, next_row[-1]] for at in range(0, len(text), 7))
            and row[1:] == next_row[:-1]
        )
    with pytest.raises(ValueError, match="--rows 1000: must be 2 to"):
        analyze.sample_rows(TOKENS, 1000, 7, 1, CPU)


# ------------------------------------------------------------------------------------------------------------
# Curvature
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curved():
    """A tiny model in float64, a text, and the whole Hessian by central differences of the gradient."""
    model, text = random_model(TINY), text_of(10, 6, vocab=6)
    parameters = list(model.parameters())
    flat = torch.nn.utils.parameters_to_vector(parameters).detach()

    def gradient(at: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(at, parameters)
        rows = analyze.CURVATURE_ROWS
        loss = train_gpt.nll(model(text.ids[:rows]), text.targets[:rows]).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    step, H = 1e-5, []
    for i in range(len(flat)):
        shift = torch.zeros_like(flat)
        shift[i] = step
        H.append((gradient(flat + shift) - gradient(flat - shift)) / (2 * step))
    torch.nn.utils.vector_to_parameters(flat, parameters)
    H = torch.stack(H)
    return SimpleNamespace(side=side_of(model, TINY), text=text, H=(H + H.T) / 2)


def test_hessian_product_against_differences(curved):
    v = analyze.normal_numbers(curved.side.model, 0)
    found = analyze.hessian_product(curved.side.model, curved.text)(v)
    assert float((found - curved.H @ v).norm() / found.norm()) < 1e-6


def test_eigenvalues_against_the_whole_hessian(curved):
    known = np.linalg.eigvalsh(curved.H.numpy())
    table = analyze.eigenvalues(curved.side, curved.text)
    for name in ("smallest", "largest"):
        row = table[name]
        near = np.abs(known - row[str(analyze.LANCZOS)].value).min()
        assert near <= row["residual"].value + 1e-6
    assert table["largest"][str(analyze.LANCZOS)].value == pytest.approx(known[-1], rel=1e-4)
    steps = [table["largest"][str(step)].value for step in analyze.SHOWN]
    assert steps == sorted(steps) and steps[-1] <= known[-1] * (1 + 1e-6)  # Ritz values rise to it


def test_trace_against_the_whole_hessian(curved, monkeypatch):
    H, model = curved.H, curved.side.model
    draw, probes = analyze.normal_numbers, []
    monkeypatch.setattr(analyze, "PROBES", 100)
    monkeypatch.setattr(analyze, "normal_numbers", lambda *args: probes.append(draw(*args)) or probes[-1])
    found = analyze.trace(curved.side, curved.text)["trace"]
    ends = np.cumsum([0, *(p.numel() for p in model.parameters())])
    for (name, _), (a, b) in zip(model.named_parameters(), pairwise(ends), strict=True):
        if name in GPT.BANKS:
            assert abs(found[name].value - float(H.diagonal()[a:b].sum())) < 4 * found[name].error
    assert abs(found["all"].value - float(H.trace())) < 4 * found["all"].error
    signs = torch.stack(probes).sign()
    assert len(signs.unique(dim=0)) == 100  # no probe twice
    assert found["all"].value == pytest.approx(float(((signs @ H) * signs).sum()) / 100, rel=1e-6)
    variance = 2 * float(H.square().sum() - H.diagonal().square().sum())  # of z^T H z
    assert found["all"].error == pytest.approx((variance / 100) ** 0.5, rel=0.25)
    assert sum(cell.value for group, cell in found.items() if group != "all") == pytest.approx(
        found["all"].value
    )


def test_lanczos_on_a_matrix():
    """All eigenvalues lie as near as the residuals say at every step, and the last step has the extremes."""
    rng = np.random.default_rng(8)
    A = rng.normal(size=(30, 30))
    A = torch.tensor(A + A.T)
    known = np.linalg.eigvalsh(A.numpy())
    found = analyze.lanczos(lambda v: A @ v, torch.tensor(rng.normal(size=30)), 100)
    assert len(found) == 30
    for ritz, residuals in found:
        for value, residual in zip(ritz, residuals, strict=True):
            assert np.abs(known - value).min() <= residual + 1e-9
    assert found[-1][0] == pytest.approx(known[[0, -1]])
    # two different eigenvalues: two steps
    two = torch.diag(torch.tensor([2.0, 2.0, 5.0, 5.0], dtype=torch.float64))
    assert len(analyze.lanczos(lambda v: two @ v, torch.ones(4, dtype=torch.float64), 4)) == 2


# ------------------------------------------------------------------------------------------------------------
# The evaluator's first step, rounding, factors
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "size"), [("doc_banks", 5), ("doc_lora", 5), ("all", 5), ("phased", 5), ("doc_banks", 14)]
)
def test_the_whole_step_is_the_evaluators(mode, size):
    """At the whole step the next chunk has the evaluation's own losses,
    at none those of the plan without learning.

    Half a step is a step of half the size. With chunks of 14 targets, most documents have no second one.
    """
    c = replace(LEARNS, ttt_mode=mode, ttt_chunk_size=size, eval_seq_len=max(12, size))
    side = side_of(random_model(c, torch.float32), c)
    table = analyze.along_step(side, text_of())
    plan = side.setup.plan(TOKENS)
    scored, learned = (np.concatenate([np.arange(a, b) for a, b in plan[i].scored.ranges()]) for i in (1, 0))
    adapted, plain = eval_ttt.evaluate(side.setup, TOKENS).nll, eval_ttt.score_plan(side.setup, TOKENS).nll
    change = adapted[scored].astype(float) - plain[scored]
    row = table["what comes next"]
    assert row["0"].value == 0 and row["1"].value == pytest.approx(change.mean(), abs=1e-5) != 0
    assert row["1"].error == pytest.approx(
        clustered(change, analyze.documents_of(TOKENS)[scored]).error, rel=1e-2
    )
    slow = eval_ttt.evaluate(replace(side.setup, config=replace(c, ttt_lr=c.ttt_lr / 2)), TOKENS).nll
    assert row["0.5"].value == pytest.approx((slow[scored].astype(float) - plain[scored]).mean(), abs=1e-5)
    small = table["what was learned"]["0.25"]
    assert small.value < 0 and len(small.influence) == len(np.unique(analyze.documents_of(TOKENS)[learned]))
    assert list(row) == [f"{step:g}" for step in analyze.STEPS]


def test_no_step_where_nothing_is_learned():
    model = random_model(LEARNS, torch.float32)
    assert analyze.along_step(side_of(model, replace(LEARNS, ttt_mode="none")), text_of()) == {}
    short = text_of(tokens=np.array([1, 5, 6, 7, 8], np.uint16))
    assert analyze.along_step(side_of(model, replace(LEARNS, ttt_chunk_size=12)), short) == {}


def test_rounding_against_the_tensors():
    model, text = random_model(SMALL, torch.float32), text_of()
    state = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    side = side_of(model, rounded=Artifact(SMALL, state, "hash"))
    by_weights, by_outputs = (analyze.quantization_error(side, text, outputs) for outputs in (False, True))
    read, L = analyze.activations(model, text.ids), SMALL.num_layers
    for (name, bank, second), stack in zip(
        analyze.MATRICES, ("attn_in", "attn_out", "attn_in", "attn_in", "mlp_in", "mlp_mid"), strict=True
    ):
        for layer in range(L):
            W, Q = (part[bank][second * L + layer] for part in (model.state_dict(), state))
            x = read[stack, layer]
            assert by_weights[name][str(layer)].value == pytest.approx(
                float((W - Q).norm() / W.norm()), rel=1e-5
            )
            expected = float((x @ (W - Q).T).norm() / (x @ W.T).norm())
            assert by_outputs[name][str(layer)].value == pytest.approx(expected, rel=1e-3)
    other = random_model(SMALL, torch.float32)
    other.load_state_dict(state)
    losses = [train_gpt.token_nll(each, text.ids, text.targets).mean().item() for each in (model, other)]
    added = analyze.rounding(side, text)["nats"]["added"].value
    assert added == pytest.approx(losses[1] - losses[0], abs=1e-5)


def test_factors_stand_at_their_rows():
    L = SMALL.num_layers
    factors = {bank: torch.arange(float(n)).view(-1, 1, 1) for bank, n in
               zip(GPT.BANKS, (2 * L, 2 * L, L, L), strict=True)}  # fmt: skip
    table = analyze.meta_rates(side_of(random_model(SMALL), factors=factors), text_of())
    assert [cell.value for cell in table["O"].values()] == list(range(L, 2 * L))
    assert [cell.value for cell in table["V"].values()] == list(range(L, 2 * L)) == [
        cell.value + L for cell in table["down"].values()]  # fmt: skip


def test_a_model_and_itself(few):
    """Nothing differs: similarities are one, differences and barriers zero, also in the printed lines."""
    c = replace(LEARNS, ttt_mode="doc_banks")
    model = random_model(c, torch.float32)
    side = side_of(model, c, Artifact(c, model.state_dict(), "hash"))
    for key, analysis in analyze.ANALYSES.items():
        if analysis.pair:
            table = analysis.measure(side, side, text_of())
            table = {row: {k: v for k, v in cells.items() if k != "chance"} for row, cells in table.items()}
            if key == "path":
                assert values({"": table["above the line"]}) == pytest.approx([0] * 8, abs=1e-6)
            else:
                assert values(table) == pytest.approx([1] * len(values(table)), abs=1e-6), key
        elif key != "meta_rates":
            table = analysis.measure(side, text_of())
            lines = analyze.analysis_text(analysis, {"A": table, "B": table}).splitlines()
            numbers = [
                float(word.split("±")[0])
                for line in lines
                if "B - A" in line
                for word in line.split("A", 1)[1].split()
            ]
            assert (
                table and numbers and not any(numbers if key != "eigenvalues" else numbers[:2] + numbers[3:5])
            ), key
    assert values(analyze.quantization_error(side, text_of(), True)) == [0] * 30


def test_differences_are_what_the_others_have_more():
    one, three = ({"row": {"column": Estimate(value)}} for value in (1.0, 3.0))
    pair, single = analyze.ANALYSES["cka"], analyze.ANALYSES["meta_rates"]
    lines = analyze.analysis_text(single, {"A": one, "B": three}).splitlines()
    assert lines[-2].split() == ["row", "A", "1.000"] and lines[-1].split() == ["B", "-", "A", "2.000"]
    lines = analyze.analysis_text(pair, {"A to B": one, "A to null": three}).splitlines()
    assert lines[-1].split() == ["A", "to", "null", "3.000"]
    assert single.empty in analyze.analysis_text(single, {"A": {}, "B": {}})


# ------------------------------------------------------------------------------------------------------------
# As a user meets it
# ------------------------------------------------------------------------------------------------------------

RUN = Config(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_hidden=24, bigram_vocab_size=32,
             bigram_dim=8, ve_dim=8, ve_layers="1", rope_dims=4, xsa_last_n=1, train_seq_len=16,
             eval_seq_len=16, eval_stride=8, ttt_chunk_size=8, ttt_slots=4, ttt_groups=1)  # fmt: skip


def write_run(folder: Path, demo_data: Path, seed: int = 0, **settings) -> Path:
    """Write the folder of a run of random weights."""
    data = dict(data_path=str(demo_data), tokenizer_path=str(demo_data / "tokenizer.model"))
    c = replace(RUN, **data, seed=seed, **settings)
    model = random_model(c, torch.float32, seed)
    folder.mkdir()
    torch.save(model.state_dict(), folder / "final_model.pt")
    records = train_gpt.quantize_state_dict(model.state_dict(), train_gpt.Statistics(), c)
    blob = train_gpt.encode_artifact(c, records, train_gpt.sha256_file(c.tokenizer_path))
    (folder / "final_model.int6.ptz").write_bytes(blob)
    (folder / "config.json").write_text(json.dumps(dict(config=asdict(c), given=dict(seed=seed))))
    result = dict(steps=7 + seed, val_bpb_sliding=2.5, bytes_model=1234)
    result |= dict(sha256_artifact=train_gpt.sha256_file(folder / "final_model.int6.ptz"))
    (folder / "result.json").write_text(json.dumps(result))
    lines = [dict(step=i, seconds=i, train_loss=7 - i, val_bpb=3 - i / 9) for i in range(4)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokens = train_gpt.open_shard(str(demo_data / "fineweb_val_000000.bin"))
    losses = np.random.default_rng(seed).uniform(0, 6, len(tokens) - 1)
    np.save(folder / "nll.npy", losses.astype(np.float32))
    return folder


@pytest.fixture
def make_run(tmp_path, demo_data):
    """A function that writes the folder of a run, of random weights: make_run(name, seed, **settings)."""
    return lambda name, seed=0, **settings: write_run(tmp_path / name, demo_data, seed, **settings)


def said(capsys, *argv) -> tuple[int, str]:
    code = analyze.main([str(word) for word in argv])
    streams = capsys.readouterr()
    return code, streams.out + streams.err


def strict_json(path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_weights_of_three_runs(make_run, tmp_path, capsys, few):
    a, b, null = make_run("a", 0), make_run("b", 1, muon_wd=0.1, ttt_mode="none"), make_run("null", 2)
    out = tmp_path / "out"
    code, text = said(capsys, "weights", a, b, "--null", null, "--rows", 4, "--out", out)
    assert code == 0 and (out / "weights.txt").read_text() in text
    assert "MUON_WD 0.04 -> 0.1; SEED 0 -> 1" in text and "same settings; SEED 0 -> 2" in text
    assert "no --null" not in text and "Permutations of hidden units and heads are not removed" in text
    assert all(len(line) <= 180 for line in text.splitlines() if "/" not in line)
    report = strict_json(out / "weights.json")
    for key, analysis in analyze.ANALYSES.items():
        assert list(report[key]) == (["A to B", "A to null"] if analysis.pair else ["A", "B", "null"]), key
        tables = list(report[key].values())
        assert all(table.keys() == tables[0].keys() for table in tables) and any(tables) == (
            key != "meta_rates"
        )
        block = text.split(f"\n{analysis.title}\n")[1].split("\n\n")[0].splitlines()
        lines = ("A to B", "A to null") if analysis.pair else ("A ", "B - A", "null - A")
        assert all(any(name in line for line in block) for name in lines) or key == "meta_rates"
    assert report["path"]["A to B"]["above the line"]["0.5"]["error"] > 0
    assert report["step"]["B"]["what comes next"]["1"]["value"] != 0  # evaluated as A is
    assert plotted(out / "weights.png") and said(capsys, "weights", a, b, "--only", "cosines")[0] == 0
    assert "no --null" in (a / "weights.txt").read_text() and "only one of B and null" not in text
    twin = make_run("twin", 0, muon_wd=0.1)
    text = said(capsys, "weights", a, twin, "--null", null, "--only", "cosines")[1]
    assert "only one of B and null has A's seed" in text and "MUON_WD 0.04 -> 0.1; same SEED\n" in text


def plotted(path) -> bool:
    """Whether a picture has something on it."""
    from matplotlib import image

    return path.exists() and image.imread(path)[..., :3].std() > 0.02


def test_runs_that_cannot_be_compared(make_run, tmp_path, capsys):
    a, other, wide = make_run("a"), make_run("other", 1, muon_wd=0.1), make_run("wide", model_dim=24)
    empty = tmp_path / "empty"
    empty.mkdir()
    unknown = make_run("unknown")
    (unknown / "config.json").write_text(json.dumps(dict(config=dict(no_such_setting=1))))
    foreign = make_run("foreign")
    (foreign / "result.json").write_text(json.dumps(dict(sha256_tokenizer="0" * 64)))
    other_code = make_run("other_code")
    state = torch.load(other_code / "final_model.pt")
    torch.save(state | {f"gain.{i}": torch.ones(4) for i in range(6)}, other_code / "final_model.pt")
    no_model = make_run("no_model")
    (no_model / "final_model.pt").unlink()
    for argv, message in (
        ((a, other, "--null", other), "is not a repeat of .*MUON_WD 0.04 -> 0.1"),
        (
            (a, wide),
            r"a and .*wide are different models: MODEL_DIM 16 -> 24. "
            r"Their tensors: .*qo_bank \(4, 16, 16\) -> \(4, 24, 24\).* and \d+ more",
        ),
        (
            (a, other_code),
            r"other_code/final_model.pt is not the model of its config.json here: "
            r"gain.0 absent -> \(4,\).* and 2 more. Another version of train_gpt.py",
        ),
        ((a, empty), "empty is not a run folder"),
        ((a, unknown), "unknown settings no_such_setting"),
        ((a, no_model), "final_model.pt"),
        ((a, foreign), "foreign was trained with another tokenizer than .*tokenizer.model"),
        ((a, other, "--only", "cka,kca"), "--only kca: unknown; known are cosines"),
        ((a, other, "--rows", "1"), "--rows 1: must be 2 to"),
        ((a, other, "--data", empty), "no shards match"),
        ((a, other, "--tokenizer", empty), "TOKENIZER_PATH=.*empty"),
    ):
        code, text = said(capsys, "weights", *argv)
        assert code == 2, argv
        assert re.search(message, text.splitlines()[-1]), text
    (a / "final_model.int6.ptz").unlink()
    code, text = said(capsys, "weights", a, other, "--only", "rounding", "--out", tmp_path / "out")
    assert code == 0 and "final_model.int6.ptz cannot be read: No such file" in text


def test_settings_are_the_evaluators_where_it_has_run(make_run):
    folder = make_run("a", ttt_lr=0.5)
    (folder / "eval_ttt.json").write_text(json.dumps(dict(settings=dict(ttt_lr=0.25, ttt_mode="lora"))))
    found = analyze.read_config(folder, None, None)
    assert (found.ttt_lr, found.ttt_mode, found.num_layers) == (0.25, "lora", RUN.num_layers)


def test_losses_of_two_runs(make_run, demo_data, tmp_path, capsys, few):
    a, b = make_run("a", 0), make_run("b", 1)
    documents = int((np.fromfile(demo_data / "fineweb_val_000000.bin", "<u2")[512:] == 1).sum())
    code, text = said(capsys, "nll", a, b)
    losses = [np.load(folder / "nll.npy").astype(float) for folder in (a, b)]
    gain = (losses[0] - losses[1]).mean()
    assert code == 0 and f"gain of B over A: {gain:+.5f} nats/target" in text and plotted(a / "nll.png")
    assert f"{documents} documents" in text and "sweep.py compare" in text
    report = strict_json(a / "nll.json")
    assert report["gain_bpb"] == pytest.approx(gain * report["targets"] / np.log(2) / report["bytes"])
    before = tmp_path / "before.npy"
    shutil.copy(b / "nll.npy", before)
    code, text = said(capsys, "nll", before, a / "nll.npy", "--out", tmp_path / "out")
    assert code == 0 and f"gain of B over A: {-gain:+.5f}" in text and plotted(tmp_path / "out" / "nll.png")
    code, text = said(capsys, "nll", a, a, "--out", tmp_path / "same")
    assert code == 0 and "gain of B over A: +0.00000" in text and f"B is better in 0 of {documents}" in text


def test_losses_that_cannot_be_compared(make_run, tmp_path, capsys):
    a, b, c = (make_run(name) for name in "abc")
    loose = tmp_path / "loose.npy"
    np.save(loose, np.zeros(5, np.float32))
    for folder, hashed in ((b, "0" * 64), (c, "1" * 64)):
        scores = dict(val_bpb_ttt=1, ttt_gain_bpb=0, sha256_shards={"fineweb_val_000000.bin": hashed})
        (folder / "eval_ttt.json").write_text(json.dumps(scores))
    for argv, message in (
        ((loose, loose), "config.json names the scored text"),
        ((a, loose), f"shape (5,), but {len(np.load(a / 'nll.npy'))} targets"),
        ((a, b), "scored fineweb_val_000000.bin, which are not"),
        (
            (b, c),
            f"of different texts: {b}/nll.npy scored fineweb_val_000000.bin (SHA-256 000000000000..) "
            f"and {c}/nll.npy scored fineweb_val_000000.bin (SHA-256 111111111111..)",
        ),
        ((a, a / "config.json"), "is not an nll.npy"),
        ((tmp_path / "missing", tmp_path / "missing"), "missing: cannot be read: no such file or folder"),
    ):
        code, text = said(capsys, "nll", *argv)
        assert code == 2 and message in text, text


# ------------------------------------------------------------------------------------------------------------
# Curves and evaluations
# ------------------------------------------------------------------------------------------------------------

DOCUMENTS = (
    "The modules described in this chapter provide a wide range of services. " * 5,
    "<script>window.ran = 1; document.title = 'ran'</script><img src=x onerror='window.ran = 2'> &amp; " * 2,
    "A short one with \u202ereversed text and <b>bold</b> letters.",
)
MODES = {"doc_banks": "legal", "banks": "legal", "all": "adapt_first"}  # in the order of their evaluation


def score_in(folder: Path, weights: str, mode: str, protocol: str = "legal") -> None:
    """Score the artifact or the checkpoint of a run with eval_ttt.py."""
    config = json.loads((folder / "config.json").read_text())["config"]
    names = "eval_seq_len eval_stride ttt_chunk_size ttt_slots ttt_groups tokenizer_path val_files".split()
    env = {name.upper(): str(config[name]) for name in names}
    env |= {name.upper(): str(int(config[name]) if config[name] in (True, False) else config[name])
            for name in train_gpt.sections()["model"]}  # fmt: skip
    env |= {"MODEL_PATH": str(folder / weights), "TTT_CHUNK_TOKENS": "64", "TTT_LR": "0.01"}
    assert eval_ttt.main([], env | {"TTT_MODE": mode, "TTT_PROTOCOL": protocol}) == 0


def score_modes(folder: Path, demo_data: Path, modes: dict[str, str] = MODES, **settings) -> Path:
    """Write a run of random weights, and score it with eval_ttt.py on DOCUMENTS in each of `modes`.

    The reports of each are in eval/MODE; eval_ttt.json of the last legal one is in the folder of the run too.
    """
    tokenizer = SentencePieceProcessor(model_file=str(demo_data / "tokenizer.model"))
    shard = folder / "fineweb_val_000000.bin"
    write_run(folder, demo_data, val_files=str(shard), **settings)
    ids = [token for text in DOCUMENTS for token in [1, *tokenizer.encode(text)]]
    write_shard(shard, np.array(ids, np.uint16))
    for mode, protocol in modes.items():
        score_in(folder, "final_model.int6.ptz", mode, protocol)
        if protocol != "legal":  # the name of a folder may be any
            (folder / "eval" / f"{mode}_{protocol}").rename(folder / "eval" / mode)
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory, demo_data):
    """The folder of a run that was scored in all MODES, to be copied and not changed."""
    return score_modes(tmp_path_factory.mktemp("scored") / "run", demo_data)


@pytest.fixture
def modes_run(scored, tmp_path):
    """A copy of the scored run that a test may change."""
    return Path(shutil.copytree(scored, tmp_path / "run"))


def table_rows(text: str, head: str) -> list[list[str]]:
    """The rows of the printed table whose head begins with `head`, split at two or more spaces."""
    lines = text[text.index(f"\n{head} ") + 1 :].split("\n\n")[0].splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in lines if not line.startswith(("-", "*"))]


def test_table_of_modes(modes_run, capsys):
    folder = modes_run
    code, text = said(capsys, folder)
    assert code == 0
    head, *rows = table_rows(text, "mode")
    assert head == ["mode", "non-overlapping", "sliding", "same windows, not adapted", "adapted", "gain",
                    "seconds", "legal", "audited"]  # fmt: skip
    assert [row[0] for row in rows] == ["all", "banks *", "doc_banks"] and "*: the last legal" in text
    for name, *cells, seconds, legal, audited in rows:
        scores = json.loads((folder / "eval" / name.rstrip(" *") / "eval_ttt.json").read_text())
        wanted = [scores[f"val_bpb_{key}"] for key in ("roundtrip", "sliding", "plan", "ttt")]
        assert [float(cell) for cell in cells] == pytest.approx([*wanted, wanted[2] - wanted[3]], abs=1.01e-4)
        assert float(seconds) == pytest.approx(scores["eval_seconds"], abs=0.051)
        assert (legal, audited) == ("no" if name == "all" else "yes", "no")
    (row,) = [line for line in text.splitlines() if line.startswith("bpb, adapted")]
    banks = json.loads((folder / "eval/banks/eval_ttt.json").read_text())
    assert row.split()[-1] == f"{banks['val_bpb_ttt']:.4f}"
    # an audit is named in the evaluation's own folder
    (folder / "eval/banks/eval_ttt.json").write_text(json.dumps(banks | {"audit": "certificate.json"}))
    assert table_rows(said(capsys, folder)[1], "mode")[2][-1] == "yes"


def test_evaluations_of_earlier_versions(modes_run, capsys):
    """Their files are in the run folder. An illegal one is in the table of modes, not among the scores."""
    folder = modes_run
    for name in eval_ttt.REPORTS:
        shutil.copy(folder / "eval/banks" / name, folder)
    shutil.move(folder / "eval", folder / "elsewhere")
    text = said(capsys, folder)[1]
    assert [row[0] for row in table_rows(text, "mode")] == ["mode", "banks"] and "bpb, adapted" in text
    assert "gain of B over A: +0.00000" in said(capsys, "nll", folder, folder / "nll.npy")[1]
    shutil.copy(folder / "elsewhere/all/eval_ttt.json", folder)
    text = said(capsys, folder)[1]
    assert table_rows(text, "mode")[1][::7] == ["all", "no"] and "bpb, adapted" not in text


def test_losses_of_modes(modes_run, tmp_path, capsys, few):
    folder = modes_run
    losses = {mode: np.load(folder / "eval" / mode / "nll.npy").astype(float) for mode in MODES}
    for a, b, names in ((folder, folder / "eval/all", ("banks", "all")),
                        (folder / "eval/doc_banks", folder, ("doc_banks", "banks"))):  # fmt: skip
        code, text = said(capsys, "nll", a, b, "--out", tmp_path / "out")
        assert text.startswith(f"A {a}: {names[0]}\nB {b}: {names[1]}\nnote: {analyze.MODES_DIFFER}\n")
        report = strict_json(tmp_path / "out" / "nll.json")
        assert (report["a_mode"], report["b_mode"]) == names
        gain = (losses[names[0]] - losses[names[1]]).mean()
        assert code == 0 and f"gain of B over A: {gain:+.5f} nats/target" in text and gain != 0
    for mode in ("banks", "doc_banks"):
        shutil.rmtree(folder / "eval" / mode)
    (folder / "eval_ttt.json").unlink()
    code, text = said(capsys, "nll", folder, folder)
    assert code == 2
    assert text.endswith(f"has no legal evaluation of its artifact. Name one of {folder / 'eval/all'}.\n")
    assert "bpb, adapted" not in said(capsys, folder)[1]


def test_scores_of_other_weights_are_named_and_do_not_count(modes_run, capsys):
    folder = modes_run
    score_in(folder, "final_model.pt", "none")
    text = said(capsys, folder)[1]
    banks = json.loads((folder / "eval/banks/eval_ttt.json").read_text())["val_bpb_ttt"]
    (row,) = [line for line in text.splitlines() if line.startswith("bpb, adapted")]
    assert row.split()[-2:] == ["banks", f"{banks:.4f}"]
    names = [row[0] for row in table_rows(text, "mode")[1:]]
    assert names == ["all", "banks *", "doc_banks", "none of unquantized final_model.pt"]
    assert analyze.OTHER_WEIGHTS in text
    assert analyze.nll_file(folder) == folder / "eval/banks/nll.npy"
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | dict(sha256_artifact="0" * 64)))
    text = said(capsys, folder)[1]  # the run was trained again
    assert "banks of another final_model.int6.ptz" in text and "bpb, adapted" not in text


def test_smoothing_by_hand():
    y = np.random.default_rng(0).normal(size=200)
    found, sigma = analyze.smoothed(y)
    assert sigma == 5
    i = np.arange(200)
    for at in (0, 3, 100, 199):
        weight = np.exp(-((i - at) ** 2) / (2 * sigma**2)) * (abs(i - at) <= 4 * sigma)
        assert found[at] == pytest.approx((weight * y).sum() / weight.sum())
    assert analyze.smoothed(np.full(7, 2.5))[0] == pytest.approx(np.full(7, 2.5))
    assert analyze.smoothed(np.zeros(0))[0].shape == (0,)


def test_labels_keep_apart():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.integers(0, 12, 8).astype(float).tolist()
        found = analyze.apart(values, 1.5)
        order = np.argsort(values, kind="stable")
        assert min(np.diff(np.array(found)[order])) >= 1.5 - 1e-9
        assert all(at >= value for at, value in zip(found, values, strict=True))
    assert analyze.apart([3.0, 1.0], 0.5) == [3.0, 1.0]


def test_names_in_legends_are_short_and_different(tmp_path):
    paths = [tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "y" / "a" / ".." / "a"]
    assert analyze.named(paths) == {"x/a": paths[0], "y/a": paths[2]}
    long = [tmp_path / f"demo_2026-11-2{day}_12-00-00_seed1337" for day in (7, 8)]
    names = list(analyze.named(long))
    assert len(set(names)) == 2 and all(len(name) <= 40 for name in names)
    assert list(analyze.named(long[:1])) == ["demo_2026-11-\u20260-00_seed1337"]


@pytest.fixture
def two_runs(make_run):
    """Two runs of 40 steps with a loss of 50 - step at the start, one of them adapted."""
    found = {}
    for number, name in enumerate(("one", "two")):
        folder = make_run(name, number, train_batch_tokens=2048)
        lines = [dict(step=0, seconds=0.0, val_bpb=40.0)]
        lines += [dict(step=i, seconds=2.0 * i, train_loss=50.0 - i if i < 4 else 4 - i / 40)
                  for i in range(1, 41)]  # fmt: skip
        lines += [dict(step=i, seconds=2.0 * i, val_bpb=3 - i / 40) for i in (20, 40)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        result = dict(steps=40, val_bpb_roundtrip=2.1, val_bpb_sliding=2.05)
        (folder / "result.json").write_text(json.dumps(result))
        found[name] = folder
    scores = dict(val_bpb_ttt=1.8, ttt_gain_bpb=0.2, legal=True, settings=dict(ttt_mode="banks"))
    (found["one"] / "eval_ttt.json").write_text(json.dumps(scores))
    return found


@pytest.mark.parametrize(("by", "end", "unit"), [("steps", 40, "step"), ("seconds", 80, "s"),
                                                 ("tokens", 40 * 2048 / 1e6, "millions")])  # fmt: skip
def test_what_curves_show(two_runs, by, end, unit):
    runs = {name: analyze.read_run(folder) for name, folder in two_runs.items()}
    figure = analyze.draw_curves(runs, by)
    left, middle, right = figure.axes
    raw, smooth = left.lines[:2]
    assert raw.get_alpha() < 0.5 and raw.get_color() == smooth.get_color() == "C0"
    assert raw.get_xdata()[-1] == pytest.approx(end) and raw.get_ydata()[-1] == 3.0
    assert left.get_ylim()[0] < 3 and 3.9 < left.get_ylim()[1] < 5  # not the first steps, of 50 nats
    assert middle.lines[0].get_marker() == "o" and middle.lines[0].get_ydata().tolist() == [40, 2.5, 2]
    assert middle.get_ylim()[0] < 1.8 and 2.5 < middle.get_ylim()[1] < 3
    assert right.get_ylim() == middle.get_ylim()
    scores = sorted((line.get_xdata()[0], line.get_ydata()[0], line.get_color()) for line in right.lines)
    assert scores == [(0, 2.1, "C0"), (0, 2.1, "C1"), (1, 2.05, "C0"), (1, 2.05, "C1"), (2, 1.8, "C0")]
    names = [label.get_text() for label in right.get_xticklabels()]
    assert names == ["non-\noverlapping", "sliding", "adapted\nbanks"]
    numbers = sorted(text.get_text() for text in right.texts)
    assert numbers == ["1.8000", "2.0500", "2.0500", "2.1000", "2.1000"]
    assert left.get_xlabel().endswith(unit) and middle.get_xlabel().endswith(unit)
    assert left.get_ylabel() == "nats per token" and "bits per byte" in middle.get_ylabel()
    assert all(axis.get_title() and axis.xaxis.get_gridlines()[0].get_visible() for axis in figure.axes)


def test_runs_without_validation_have_two_panels(two_runs):
    for folder in two_runs.values():
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        kept = [line for line in lines if "val_bpb" not in line]
        (folder / "metrics.jsonl").write_text("\n".join(kept))
    figure = analyze.draw_curves(
        {name: analyze.read_run(folder) for name, folder in two_runs.items()}, "steps"
    )
    losses, scores = figure.axes
    assert losses.get_xlabel() == "training step" and losses.get_ylabel() == "nats per token"
    assert "Scores" in scores.get_title() and "bits per byte" in scores.get_ylabel()
    assert scores.get_ylim()[0] < 1.8 and 2.1 < scores.get_ylim()[1] < 2.2
    assert sum(len(line.get_xdata()) for line in scores.lines) == 5
    assert [t.get_text() for t in scores.get_xticklabels()][1] == "sliding"


def test_modes_of_adapted_scores_are_named(two_runs, capsys):
    same = json.loads((two_runs["one"] / "eval_ttt.json").read_text())
    for mode, differ in (("banks", False), ("doc_banks", True)):
        (two_runs["two"] / "eval_ttt.json").write_text(json.dumps(same | dict(settings=dict(ttt_mode=mode))))
        text = said(capsys, *two_runs.values())[1]
        (row,) = [line for line in text.splitlines() if line.startswith("bpb, adapted")]
        assert row.split()[-4:] == ["banks", "1.8000", mode, "1.8000"]
        assert (analyze.MODES_DIFFER in text) == differ
        kept = strict_json(two_runs["one"] / "curve.json")
        assert [run["ttt_mode"] for run in kept.values()] == ["banks", mode]
        runs = {name: analyze.read_run(folder) for name, folder in two_runs.items()}
        figure = analyze.draw_curves(runs, "steps")
        (legend,) = figure.legends
        assert (analyze.MODES_DIFFER in legend.get_title().get_text()) == differ
        labels = [label.get_text() for label in legend.texts]
        assert labels == (["one (banks)", "two (doc_banks)"] if differ else ["one", "two"])
        tick = figure.axes[2].get_xticklabels()[2].get_text()
        assert tick == "adapted\nbanks" + "\ndoc_banks" * differ


def overlapping(figure, boxes, others) -> list:
    """The pairs of things drawn in `figure` that overlap."""
    figure.canvas.draw()
    found = [[each.get_window_extent() for each in group] for group in (boxes, others)]
    return [(a, b) for a in found[0] for b in found[1] if a is not b and a.overlaps(b)]


def test_legends_lie_off_the_data(two_runs):
    runs = {name * 9: analyze.read_run(folder) for name, folder in two_runs.items()}
    figure = analyze.draw_curves(runs, "steps")
    assert [text.get_text() for text in figure.legends[0].texts] == list(runs)
    assert not overlapping(figure, figure.legends, figure.axes)
    assert not any(axis.get_legend() for axis in figure.axes)
    labels = figure.axes[2].texts
    assert len(overlapping(figure, labels, labels)) == len(labels)  # each only itself


def test_figures_do_not_depend_on_the_style_of_the_process(two_runs, tmp_path):
    runs = {"a $x$ b": analyze.read_run(two_runs["one"])}  # no formula
    pictures = []
    for name in ("default", "ggplot"):
        with style.context(name):
            analyze.save_plot(analyze.draw_curves(runs, "steps"), tmp_path / "picture.png")
        pictures.append((tmp_path / "picture.png").read_bytes())
    assert pictures[0] == pictures[1] and plotted(tmp_path / "picture.png")


def drawn_texts(figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_logarithmic_axes_have_plain_labels():
    """Math text is off in the project's style, so its markup would be printed as it is."""
    for span, labels in (((90, 2e4), {"100", "1000", "10000"}), ((3, 7), {"3", "4", "6"}),
                         ((2e-3, 0.5), {"0.01", "0.1"})):  # fmt: skip
        with report.figure_style():
            figure, (axis,) = analyze.new_figure(1, 1, 5, 3)
            axis.set(yscale="log", ylim=span)
            texts = drawn_texts(figure)
        assert labels <= set(texts) and not [text for text in texts if "math" in text]
    tokens = np.tile(TOKENS, 20)
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0, 8, len(tokens) - 1).astype(np.float32) for _ in range(2))
    with report.figure_style():
        figure = analyze.draw_nll(analyze.compare_nll(a, b, tokens, TABLE), a - b, tokens, "a $x$ title")
        texts = drawn_texts(figure)
    assert figure.axes[4].get_xscale() == "log" and not [text for text in texts if "math" in text]
    with style.context("default"):  # the scale of other figures is as before
        figure, (axis,) = analyze.new_figure(1, 1, 5, 3)
        axis.set(yscale="log")
        assert "$\\mathdefault{10^{0}}$" in drawn_texts(figure)


def test_axes_of_the_weights(few):
    """The path and the step are drawn at their true distances; every panel has labels, none a legend."""
    c = replace(LEARNS, ttt_mode="doc_banks")
    sides = [side_of(random_model(c, torch.float32, seed), c) for seed in (0, 1)]
    report = {}
    for key in ("cosines", "outputs", "path", "trace", "step"):
        analysis = analyze.ANALYSES[key]
        report[key] = ({"A to B": analysis.measure(*sides, text_of())} if analysis.pair else
                       {"A": analysis.measure(sides[0], text_of())})  # fmt: skip
    figure = analyze.draw_weights(report, "title")
    axes = dict(zip(report, figure.axes, strict=False))
    assert all(axis.get_xlabel() and axis.get_ylabel() and axis.get_title() for axis in axes.values())
    assert [axis.get_visible() for axis in figure.axes] == [True] * 5 + [False]
    assert axes["path"].lines[0].get_xdata().tolist() == list(analyze.FRACTIONS)
    assert axes["step"].lines[0].get_xdata().tolist() == list(analyze.STEPS)
    drawn = np.concatenate([line.get_ydata() for line in axes["cosines"].lines]).tolist()
    assert drawn == pytest.approx(values(report["cosines"]["A to B"]))
    groups = [tick.get_text() for tick in axes["outputs"].get_xticklabels()]
    assert groups == [row for row, _, _ in analyze.MATRICES]
    lines = [path for each in axes["outputs"].collections for path in each.get_paths()]
    chance = np.unique([path.vertices[:, 1] for path in lines])
    assert set(chance) == {cells["chance"].value for cells in report["outputs"]["A to B"].values()}
    assert not overlapping(figure, figure.legends, [axis for axis in figure.axes if axis.get_visible()])


def test_gains_by_position_have_errors_by_document(tmp_path):
    """Of documents of equal length, the error is that of their means."""
    rng = np.random.default_rng(3)
    tokens = np.array([1 if i % 300 == 0 else 2 + i % 7 for i in range(6001)], np.uint16)
    before, after = (rng.uniform(0, 6, 6000).astype(np.float32) for _ in range(2))
    found = report.distribution(tokens, before, after, TABLE)
    for row in found["classes"]:
        if row["name"].startswith("position"):
            low = int(row["name"].split()[1].rstrip("+"))
            high = {0: 128, 128: 256, 256: 300}[low]
            gains = (before.astype(float) - after).reshape(20, 300)[:, low:high].mean(1)
            assert row["gain_error"] == pytest.approx(stats.sem(gains), rel=1e-4)
            assert row["before"] - row["after"] == pytest.approx(gains.mean(), abs=1e-5)
    report.plot_distribution(tmp_path / "distribution.png", before, after, found)
    assert plotted(tmp_path / "distribution.png")
    labels = [report.class_label(f"position {low}+") for low in report.POSITION_BORDERS]
    assert labels == ["0-127", "128-255", "256-511", "512-1023", "1024-2047", "2048+"]
    assert report.class_label("word start") == "word start"


def test_curves_of_runs(make_run, tmp_path, capsys):
    a, b = make_run("a"), make_run("b", 5)
    code, text = said(capsys, a, b)
    assert code == 0 and text.endswith(f"curve: {a / 'curve.png'}\n") and plotted(a / "curve.png")
    assert text.split()[:2] == ["a", "b"] and "bits per byte of each evaluation" not in text
    assert [line.split()[-2:] for line in text.splitlines() if line.startswith(("steps", "artifact"))] == [
        ["7", "12"], ["1,234", "1,234"]]  # fmt: skip
    assert strict_json(a / "curve.json")[str(b)]["metrics"][3] == dict(
        step=3, seconds=3, train_loss=4, val_bpb=3 - 1 / 3
    )
    code, _ = said(capsys, "--out", tmp_path / "picture.png", b)
    assert code == 0 and plotted(tmp_path / "picture.png")
    code, text = said(capsys, tmp_path / "missing")
    assert code == 2 and "missing has no finished run" in text
    (a / "outside").write_text("kept")
    for name in ("curve.png", "curve.json"):
        (a / name).unlink()
        (a / name).symlink_to(a / "outside")
    assert said(capsys, a)[0] == 0 and plotted(a / "curve.png") and (a / "outside").read_text() == "kept"
    for name, content, words in (
        ("metrics.jsonl", "[]\n", "metrics.jsonl, line 1: [], expected dict"),
        (
            "metrics.jsonl",
            '{"step": 1, "seconds": 2, "train_loss": "3"}',
            "line 1: train_loss: '3', expected a number",
        ),
        (
            "eval_ttt.json",
            '{"val_bpb_ttt": "low", "ttt_gain_bpb": 1}',
            "val_bpb_ttt: 'low', expected a number",
        ),
        ("eval_ttt.json", '{"val_bpb_ttt": 1}', "lacks ttt_gain_bpb"),
        (
            "eval_ttt.json",
            '{"val_bpb_ttt": 1, "ttt_gain_bpb": 1, "settings": 3}',
            "settings: 3, expected dict",
        ),
        ("result.json", '{"fits": true}', "lacks val_bpb_sliding"),
        ("result.json", '{"val_bpb', "not a JSON object"),
    ):
        (b / name).write_text(content)
        code, text = said(capsys, b)
        assert code == 2 and words in text and len(text.splitlines()) == 1
    (a / "config.json").write_text('{"config": {}}')
    code, text = said(capsys, a, "--by", "tokens")
    assert code == 2 and "has no train_batch_tokens. Use --by steps." in text
    (a / "config.json").write_text('{"config": 1}')
    assert said(capsys, "nll", a, a)[0] == 2
