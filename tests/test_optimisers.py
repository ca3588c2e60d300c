"""Newton-Schulz against an SVD, Muon against torch's and its formula,
parameter groups, schedules, weight averages."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_levers import ALL, LOSSES, lever_model
from test_model import SMALL
from torch import nn

from train_gpt import (
    GPT,
    QUINTIC,
    Config,
    Muon,
    UserError,
    WeightAverage,
    group_parameters,
    lr_scale,
    make_optimizers,
    momentum_at,
    short_run_warning,
    zeropower_via_newtonschulz5,
)

SHAPES = [(4, 64, 32), (4, 32, 64), (2, 48, 48)]


def randn(shape, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def svd_oracle(G: torch.Tensor, steps: int = 5) -> np.ndarray:
    """U f(S) V^T for each matrix: the quintic applied to the singular values of G / (|G| + 1e-7)."""
    out = []
    for matrix in G.double().numpy():
        U, s, Vt = np.linalg.svd(matrix, full_matrices=False)
        s = s / (np.sqrt((s**2).sum()) + 1e-7)
        for _ in range(steps):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        out.append(U * s @ Vt)
    return np.array(out)


# ------------------------------------------------------------------------------------------------------------
# Newton-Schulz and Muon
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_newton_schulz_equals_the_svd(shape, steps, size):
    G = size * randn(shape)
    untouched = G.clone()
    X = zeropower_via_newtonschulz5(G, QUINTIC[:1] * steps, dtype=torch.float64)
    assert X.dtype == torch.float64 and torch.equal(G, untouched)
    np.testing.assert_allclose(X.numpy(), svd_oracle(G, steps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_in_bfloat16(shape):
    G = randn(shape, 1, torch.float32)
    X, exact = zeropower_via_newtonschulz5(G), svd_oracle(G)
    assert X.dtype == torch.bfloat16
    for got, expected in zip(X.double().numpy(), exact, strict=True):
        assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(expected)
        values = np.linalg.svd(got, compute_uv=False)
        assert 0.2 < values.min() and values.max() < 1.3  # from 0.001 to 0.3 before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_newton_schulz_keeps_zero_and_its_input(dtype):
    G = randn((3, 16, 8), 2, dtype)
    G[1] = 0
    untouched = G.clone()
    X = zeropower_via_newtonschulz5(G, dtype=dtype)
    assert torch.equal(G, untouched)
    assert (X[1] == 0).all() and (X[0] != 0).any() and X.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("rates", [None, (0.5, 2.0, 1.0, 0.0)])
def test_muon_equals_its_formula(shape, cautious, rates):
    """Momentum, Nesterov, orthogonalisation by SVD, sqrt(max(1, out / in)) and decoupled decay, in float64.

    Cautious: the entries that go along with the gradient, over their share of the matrix. A row has its rate.
    """
    lr, decay, W, buffer = 0.03, 0.2, randn(shape, 3).numpy(), np.zeros(shape)
    factor = np.array(rates or (1.0,) * 4)[: shape[0], None, None]
    p = nn.Parameter(torch.from_numpy(W.copy()))
    row_rates = {p: torch.from_numpy(factor)} if rates else {}
    c = Config(cautious_muon=cautious)
    muon = Muon([dict(params=[p], lr=lr, weight_decay=decay)], c, torch.float64, row_rates)
    for step, momentum in enumerate((0.85, 0.9, 0.95, 0.99)):
        gradient = randn(shape, 10 + step)
        p.grad, muon.param_groups[0]["momentum"] = gradient.clone(), momentum
        muon.step()
        buffer = momentum * buffer + gradient.numpy()
        update = svd_oracle(torch.from_numpy(gradient.numpy() + momentum * buffer))
        along = (update * gradient.numpy() > 0) | (not cautious)
        update = update * along / along.mean((1, 2), keepdims=True)
        W = W * (1 - lr * factor * decay) - lr * factor * np.sqrt(max(1, shape[1] / shape[2])) * update
        assert torch.equal(p.grad, gradient) and (along.mean() < 0.9) == cautious
        np.testing.assert_allclose(p.detach().numpy(), W, rtol=0, atol=1e-6 if cautious else 1e-10)


def test_cautious_muon_without_any_entry_to_take():
    """A gradient of zero against a momentum that is none: nothing divides by zero."""
    p = nn.Parameter(randn((2, 8, 4)))
    muon = Muon([dict(params=[p], lr=0.1)], Config(cautious_muon=True), torch.float64, {})
    for seed in (1, 2):
        p.grad, before = randn((2, 8, 4), seed), p.detach().clone()
        p.grad[1] *= seed % 2
        muon.step()
    assert p.isfinite().all() and torch.equal(p[1], before[1]) and not torch.equal(p[0], before[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_on_a_bank_equals_torch_muon_on_each_row(shape):
    """torch's buffer is (1 - momentum) times ours, and the update keeps only the direction.
    Both run in bfloat16."""
    settings, start = dict(lr=0.05, weight_decay=0.1, momentum=0.9375), randn(shape, 4, torch.float32)
    bank = nn.Parameter(start.clone())
    rows = [nn.Parameter(matrix.clone()) for matrix in start]
    ours = Muon([dict(params=[bank], **settings)], Config(), torch.bfloat16, {})
    theirs = torch.optim.Muon(rows, nesterov=True, ns_steps=5, **settings)
    for step in range(4):
        bank.grad = randn(shape, 20 + step, torch.float32)
        for row, gradient in zip(rows, bank.grad, strict=True):
            row.grad = gradient.clone()
        ours.step()
        theirs.step()
    moved, expected = bank.detach() - start, torch.stack([row.detach() for row in rows]) - start
    assert (moved - expected).norm() < 0.05 * expected.norm()
    assert (moved - expected).abs().max() < 0.02


# ------------------------------------------------------------------------------------------------------------
# Groups
# ------------------------------------------------------------------------------------------------------------

RATES = dict(
    matrix_lr=0.001,
    scalar_lr=0.002,
    tied_embed_lr=0.003,
    embed_lr=0.004,
    head_lr=0.005,
    muon_wd=0.5,
    adam_wd=0.25,
)
GROUPS = {  # name -> rate when tied, rate when not, decay
    **{name: (0.001, 0.001, 0.5) for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")},
    **{f"{name}.weight": (0.003, 0.004, 0.25) for name in ("tok_emb", "bigram.embed", "ve_shared.embed")},
    "lm_head.weight": (None, 0.005, 0.25),
    **{name: (0.002, 0.002, 0.25) for name in ("bigram.proj.weight", "ve_shared.proj.weight")},
    **{
        name: (0.002, 0.002, 0.0)
        for name in ("bigram.scale", "ve_shared.scale", "smear.gate", "skip_weights")
    },
    **{f"ve_layer_scales.{j}": (0.002, 0.002, 0.0) for j in range(2)},
    **{
        f"blocks.{i}.{name}": (0.002, 0.002, 0.0)
        for i in range(5)
        for name in ("attn_scale", "mlp_scale", "resid_mix", "attn.q_gain")
    },
}


def found_groups(model: GPT) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter; none is in two groups, and Muon has those with a rate of 0.001."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for optimizer in make_optimizers(model, model.config):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                assert group["lr"] == group["peak_lr"]
                found[names[id(p)]] = (group["lr"], group["weight_decay"])
                assert isinstance(optimizer, Muon) == (group["lr"] == 0.001)
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_group_with_its_rate_and_decay(tied):
    expected = {name: (row[0] if tied else row[1], row[2]) for name, row in GROUPS.items()}
    found = found_groups(GPT(replace(SMALL, tie_embeddings=tied, **RATES)))
    assert found == {name: row for name, row in expected.items() if row[0] is not None}


DEPTH = dict(decoder_lr_mult=3.0)


def test_every_parameter_of_the_levers_has_one_group_with_its_rate_and_decay():
    """The rates of a block's scales go by its place in the forward pass
    of eight layers, its halves being four each."""
    expected = {
        name: (rate, decay) for name, (rate, _, decay) in GROUPS.items() if rate and name[:7] != "blocks."
    }
    expected |= {f"mtp_heads.{k}.weight": (0.001, 0.5) for k in range(2)}
    expected |= {"memory_tokens": (0.003, 0.25), "skip_gates": (0.002, 0.0), "word_start_boost": (0.002, 0.0)}
    for n in range(8):
        for part in ("attn_scale", "mlp_scale", "resid_mix", "attn.q_gain", "mlp.scale", "mlp.bias"):
            expected[f"blocks.{n}.{part}"] = (0.002 * (1 if n < 4 else 3.0), 0.0)
    assert found_groups(GPT(replace(ALL, **RATES, **DEPTH, **LOSSES))) == expected


def test_banks_take_the_rate_of_the_half_of_their_first_use():
    """Of eight layers, the first four use the rows 3, 1, 4 and 0."""
    model = lever_model(replace(ALL, **RATES, **DEPTH, **LOSSES))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i, p in enumerate(model.parameters()):
        p.grad = randn(p.shape, i)
    make_optimizers(model, model.config)[0].step()
    for name in (*GPT.BANKS, "mtp_heads.1.weight"):
        p = model.get_parameter(name)
        for i, W in enumerate(p.detach().view(-1, *p.shape[-2:]).numpy()):
            lr = 0.001 * (3.0 if i % 5 == 2 and name in GPT.BANKS else 1)
            update = svd_oracle(p.grad.view(-1, *W.shape)[i : i + 1])[0] * np.sqrt(
                max(1, W.shape[0] / W.shape[1])
            )
            start = before[name].view(-1, *W.shape)[i].numpy()
            np.testing.assert_allclose(W, start * (1 - lr * 0.5) - lr * update, rtol=0, atol=1e-7)


def test_a_parameter_that_no_group_knows_is_refused():
    model = GPT(SMALL)
    assert sum(len(members) for members in group_parameters(model).values()) == len(list(model.parameters()))
    model.blocks[2].new_gate = nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match=r"blocks\.2\.new_gate"):
        make_optimizers(model, model.config)


def test_decay_shrinks_matrices_and_leaves_gates_scales_and_vectors():
    """With zero gradients the decay is the whole update."""
    model = GPT(replace(SMALL, tie_embeddings=False, **RATES))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(p.shape, i))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in make_optimizers(model, model.config):
        optimizer.step()
    for name, p in model.named_parameters():
        _, rate, decay = GROUPS[name]
        if decay:
            assert not torch.equal(p, before[name])
            torch.testing.assert_close(p.detach(), before[name] * (1 - rate * decay), rtol=1e-6, atol=0)
        else:
            assert torch.equal(p, before[name]), name
        assert (p.ndim > 1 and decay) or name == "skip_weights" or name.endswith("resid_mix") or not decay


def test_adamw_equals_its_formula():
    model = GPT(replace(SMALL, beta1=0.8, beta2=0.7, adam_eps=1e-3, **RATES)).double()
    start = randn(model.tok_emb.weight.shape, 5)
    with torch.no_grad():
        model.tok_emb.weight.copy_(start)
    _, adamw = make_optimizers(model, model.config)
    W, m, v = start.numpy(), 0.0, 0.0
    for step in range(1, 4):
        for p in model.parameters():
            p.grad = randn(p.shape, 100 + step)
        adamw.step()
        g = model.tok_emb.weight.grad.numpy()
        m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g**2
        W = W * (1 - 0.003 * 0.25) - 0.003 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.7**step)) + 1e-3)
        np.testing.assert_allclose(model.tok_emb.weight.detach().numpy(), W, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Schedules
# ------------------------------------------------------------------------------------------------------------


def test_lr_by_steps():
    config = Config(iterations=100, warmdown_iters=20, min_lr=0.1)
    expected = {0: 1.0, 50: 1.0, 80: 1.0, 85: 0.775, 90: 0.55, 95: 0.325, 100: 0.1, 130: 0.1}
    for step, scale in expected.items():
        assert lr_scale(config, step, 12.0, 0.0) == pytest.approx(scale, abs=1e-12), step
    by_share = replace(config, warmdown_frac=0.2, warmdown_iters=7)
    assert [lr_scale(by_share, s, 0.0, 0.0) for s in range(110)] == pytest.approx(
        [lr_scale(config, s, 0.0, 0.0) for s in range(110)]
    )
    assert {lr_scale(replace(config, warmdown_iters=0), s, 0.0, 0.0) for s in range(101)} == {1.0}
    assert lr_scale(replace(config, warmdown_iters=200), 0, 0.0, 0.0) == pytest.approx(0.1 + 0.9 * 0.5)


@pytest.mark.parametrize("iterations", [50, 100, 10**6])
@pytest.mark.parametrize("pace", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("min_lr", [0.0, 0.2])
def test_lr_by_the_clock(iterations, pace, min_lr):
    """Against the published rule in seconds: min(1, r / W),
    with r what remains and W = WARMDOWN_ITERS * pace."""
    config, budget = Config(iterations=iterations, warmdown_iters=30, min_lr=min_lr), 100 * pace
    scales = []
    for step in range(1, 140):
        left = max(0.0, min(budget - step * pace, (iterations - step) * pace))
        expected = min_lr + (1 - min_lr) * min(1.0, left / (30 * pace))
        scales.append(lr_scale(config, step, step * pace, budget))
        assert scales[-1] == pytest.approx(expected, abs=1e-9)
    assert scales == sorted(scales, reverse=True)
    end = min(iterations, 100)
    assert scales[0] == 1 and scales[end - 1] == pytest.approx(min_lr) and scales[-1] == pytest.approx(min_lr)
    assert lr_scale(config, 0, 0.0, budget) == 1


def test_lr_follows_the_pace_of_the_run():
    """At step 50 after 60 of 100 s, 33 steps are left: a share of the run counts 83 steps, not 10,000."""
    config = Config(iterations=10_000, warmdown_frac=0.5)
    assert lr_scale(config, 50, 60.0, 100.0) == pytest.approx((40 / 1.2) / (0.5 * 100 / 1.2))
    assert lr_scale(config, 50, 30.0, 100.0) == 1
    assert lr_scale(config, 50, 101.0, 100.0) == 0


@pytest.mark.parametrize("iterations, budget", [(300, 0.0), (300, 1e9), (20_000, 465.0)])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_run_shorter_than_its_warmdown_is_told(iterations, budget, shape):
    """300 steps, by number or by the clock at 1.55 s each:
    the share that is named is the largest that a step has."""
    config = Config(iterations=iterations, warmdown_iters=4000, warmdown_shape=shape)
    said = short_run_warning(config, 10, 15.5, budget)
    highest = max(lr_scale(config, step, 1.55 * step, budget) for step in range(1, 300))
    assert "WARMDOWN_ITERS=4000" in said and "about 300 steps" in said and "Set WARMDOWN_FRAC" in said
    assert float(re.search(r"starts at (\d+)%", said)[1]) == pytest.approx(100 * highest, abs=0.6)
    for changes in (dict(warmdown_frac=0.5), dict(warmdown_iters=300), dict(warmdown_iters=0)):
        assert short_run_warning(replace(config, **changes), 10, 15.5, budget) == ""


@pytest.mark.parametrize("budget", [0.0, 100.0])
@pytest.mark.parametrize("min_lr", [0.0, 0.2])
def test_a_cosine_falls_from_one_to_the_floor(budget, min_lr):
    """(1 + cos(pi u)) / 2, u being the share of the fall that is over;
    here it takes the last 40 of 100 steps."""
    config = Config(
        iterations=10**6 if budget else 100, warmdown_iters=40, warmdown_shape="cosine", min_lr=min_lr
    )
    scales = [lr_scale(config, step, float(step), budget) for step in range(1, 120)]
    over = np.clip((np.arange(1, 120) - 60) / 40, 0, 1)
    np.testing.assert_allclose(
        scales, min_lr + (1 - min_lr) * (1 + np.cos(np.pi * over)) / 2, rtol=0, atol=1e-12
    )
    assert (
        scales[59] == 1
        and scales[79] == pytest.approx((1 + min_lr) / 2)
        and scales[99] == pytest.approx(min_lr)
    )


@pytest.mark.parametrize(
    "step, momentum", [(0, 0.92), (375, 0.9375), (750, 0.955), (1500, 0.99), (20000, 0.99)]
)
def test_momentum(step, momentum):
    assert momentum_at(Config(), step) == pytest.approx(momentum, abs=1e-12)


def test_momentum_rises_monotonically_or_is_constant_without_a_warm_up():
    values = [momentum_at(Config(), step) for step in range(0, 1600, 7)]
    assert values == sorted(values) and values[0] < values[-1]
    constant = Config(muon_momentum_warmup_steps=0)
    assert {momentum_at(constant, step) for step in (0, 1, 100)} == {constant.muon_momentum}


# ------------------------------------------------------------------------------------------------------------
# Weight averaging
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("swa", [True, False])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_weight_average(ema, swa, every):
    """Against a float64 recurrence from the initial weights;
    snapshots at steps 6, 9, 12: every third one below 0.5.

    An update every so many steps takes the live weights of its own step, by the decay of all of them.
    """
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    config = Config(
        ema_enabled=ema,
        ema_decay=0.8,
        ema_update_every=every,
        swa_enabled=swa,
        swa_every=3,
        swa_threshold=0.5,
    )
    average = WeightAverage(model, config)
    running = [p.detach().double().numpy().copy() for p in model.parameters()]
    snapshots = []
    for step in range(1, 14):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(randn(p.shape, 10 * step + i))
        live = [p.detach().double().numpy().copy() for p in model.parameters()]
        if step % every == 0:
            running = [0.8**every * e + (1 - 0.8**every) * p for e, p in zip(running, live, strict=True)]
        average.update(step, 1.0 if step < 5 else 0.5 if step == 5 else 0.49)
        if step in (6, 9, 12):
            snapshots.append(running if ema else live)
    said = average.apply()
    if swa:
        expected = [np.mean(parts, axis=0) for parts in zip(*snapshots, strict=True)]
        assert said == "swa of 3 snapshots"
    else:
        expected = running if ema else live
        assert said == ("ema 0.8" if ema else "none")
    for p, value, last in zip(model.parameters(), expected, live, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), value, rtol=0, atol=2e-6)
        assert (abs(p.detach().numpy() - last).max() > 1e-2) == (ema or swa)


@pytest.mark.parametrize("ema, said", [(True, "ema 0.5"), (False, "none")])
def test_swa_without_a_snapshot_falls_back(ema, said):
    model = nn.Linear(3, 2)
    average = WeightAverage(model, Config(ema_enabled=ema, ema_decay=0.5, swa_enabled=True, swa_every=50))
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(1, 0.1)  # low enough, but not the fiftieth step
    average.update(50, 0.2)  # the fiftieth step, but not below SWA_THRESHOLD
    assert average.apply() == said
    torch.testing.assert_close(model.weight.detach(), start + (0.75 if ema else 1.0))
