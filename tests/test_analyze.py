"""records/analyze.py: errors against simulation and scipy,
curvature against whole Hessians, a model against itself."""

import json
import re
import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace

import analyze
import numpy as np
import pytest
import scipy
import torch
from analyze import Estimate, Side, Text, clustered
from scipy import stats
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
    assert found["position in the document"]["0+"].tolist() == [p < 128 for p in positions]


def test_gain_by_hand():
    rng = np.random.default_rng(4)
    a, b = (rng.uniform(0, 8, len(TOKENS) - 1).astype(np.float32) for _ in range(2))
    report = analyze.compare_nll(a, b, TOKENS, TABLE)
    gain = a.astype(float) - b
    for row in report["the gain, nats a target"].values():
        assert row["gain"].value == pytest.approx(gain.mean())
    assert len(report["the gain, nats a target"]) == 3
    for kind, masks in analyze.buckets(TOKENS, (a.astype(float) + b) / 2, TABLE).items():
        rows = report[kind]
        assert [row["gain"].value for row in rows.values()] == pytest.approx(
            [gain[m].mean() for m in masks.values()]
        )
        assert sum(row["share of the gain"].value for row in rows.values()) == pytest.approx(1)
        assert sum(row["share of targets"].value for row in rows.values()) == pytest.approx(1)
    same = analyze.compare_nll(a, a, TOKENS, TABLE)
    assert all(row["gain"] == (0, pytest.approx(0 * row["gain"].influence)) for rows in same.values()
               for row in rows.values())  # fmt: skip


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


@pytest.fixture
def make_run(tmp_path, demo_data):
    """A function that writes the folder of a run, of random weights: make_run(name, seed, **settings)."""

    def make(name: str, seed: int = 0, **settings):
        c = replace(
            RUN,
            data_path=str(demo_data),
            tokenizer_path=str(demo_data / "tokenizer.model"),
            seed=seed,
            **settings,
        )
        folder, model = tmp_path / name, random_model(c, torch.float32, seed)
        folder.mkdir()
        torch.save(model.state_dict(), folder / "final_model.pt")
        records = train_gpt.quantize_state_dict(model.state_dict(), train_gpt.Statistics(), c)
        blob = train_gpt.encode_artifact(c, records, train_gpt.sha256_file(c.tokenizer_path))
        (folder / "final_model.int6.ptz").write_bytes(blob)
        (folder / "config.json").write_text(json.dumps(dict(config=asdict(c))))
        (folder / "result.json").write_text(
            json.dumps(dict(steps=7 + seed, val_bpb_sliding=2.5, bytes_model=1234))
        )
        lines = [dict(step=i, seconds=i, train_loss=7 - i, val_bpb=3 - i / 9) for i in range(4)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        tokens = train_gpt.open_shard(str(demo_data / "fineweb_val_000000.bin"))
        np.save(
            folder / "nll.npy", np.random.default_rng(seed).uniform(0, 6, len(tokens) - 1).astype(np.float32)
        )
        return folder

    return make


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
    assert (
        "only one of B and null has A's seed"
        in said(capsys, "weights", a, twin, "--null", null, "--only", "cosines")[1]
    )


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
    no_model = make_run("no_model")
    (no_model / "final_model.pt").unlink()
    for argv, message in (
        ((a, other, "--null", other), "is not a repeat of .*MUON_WD 0.04 -> 0.1"),
        ((a, wide), r"different tensors: qo_bank \(4, 16, 16\) -> \(4, 24, 24\)"),
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
    assert code == 0 and "final_model.int6.ptz: No such file" in text


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
    a, b = make_run("a"), make_run("b")
    loose = tmp_path / "loose.npy"
    np.save(loose, np.zeros(5, np.float32))
    (b / "eval_ttt.json").write_text(
        json.dumps(dict(settings={}, sha256_shards={"fineweb_val_000000.bin": "0" * 64}))
    )
    for argv, message in (
        ((loose, loose), "config.json names the scored text"),
        ((a, loose), f"shape (5,), but {len(np.load(a / 'nll.npy'))} targets"),
        ((a, b), "scored fineweb_val_000000.bin, which are not"),
        ((a, a / "config.json"), "is not an nll.npy"),
        ((a, tmp_path / "missing"), "is not an nll.npy"),
    ):
        code, text = said(capsys, "nll", *argv)
        assert code == 2 and message in text, text


def test_curves_of_runs(make_run, tmp_path, capsys):
    a, b = make_run("a"), make_run("b", 5)
    code, text = said(capsys, a, b)
    assert code == 0 and text.endswith(f"curve: {a / 'curve.png'}\n") and plotted(a / "curve.png")
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
        ("metrics.jsonl", "[]\n", "line 1 of metrics.jsonl"),
        ("eval_ttt.json", '{"val_bpb_ttt": 1}', "lacks ttt_gain_bpb"),
        ("result.json", '{"fits": true}', "lacks val_bpb_sliding"),
        ("result.json", '{"val_bpb', "not a JSON object"),
    ):
        (b / name).write_text(content)
        code, text = said(capsys, b)
        assert code == 2 and words in text and len(text.splitlines()) == 1
    (a / "config.json").write_text('{"config": 1}')
    assert said(capsys, "nll", a, a)[0] == 2
