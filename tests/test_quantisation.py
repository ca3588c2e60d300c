"""GPTQ against a dense float64 elimination and on real inputs; Hessians, scales and the scheme of each tensor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_model import SMALL, random_ids, random_model
from test_optimisers import randn

import train_gpt
from train_gpt import GPT, STACKS, collect_hessians, dequantize, gptq, quantize


def random_problem(n: int, out: int, width: int, samples: int, seed: int = 0):
    """Weights (n, out, width), Hessians of correlated inputs of very different size, and steps (n, out, 1), float32."""
    inputs = randn((n, samples, width), seed) @ randn((n, width, width), seed + 1)
    inputs = inputs * (3 * randn((n, 1, width), seed + 2)).exp2()
    W = randn((n, out, width), seed + 3).float()
    return W, (inputs.mT @ inputs).float(), train_gpt.row_scales(4 * W.std(-1), 31)


def dense_gptq(W, H, step, levels=31, damp=0.01):
    """One matrix by plain elimination: (codes, rows that came nowhere near a tie, where float32 may round otherwise).

    In the order of falling diag(H): round a column, move the rest by its error times its row of the inverse Hessian,
    and eliminate it from the inverse.
    """
    W, H, step = W.double().numpy().copy(), H.double().numpy().copy(), step.double().numpy()[:, 0]
    order, dead = np.argsort(-np.diag(H), kind="stable"), np.diag(H) == 0
    H[dead, dead], W[:, dead] = 1.0, 0.0
    inverse = np.linalg.inv(H + damp * np.diag(H).mean() * np.eye(len(H)))
    codes, safe = np.zeros(W.shape), np.ones(len(W), bool)
    for j in order:
        ideal = W[:, j] / step
        safe &= abs(ideal - np.floor(ideal) - 0.5) > 1e-3
        codes[:, j] = np.clip(np.round(ideal), -levels, levels)
        W -= np.outer((W[:, j] - codes[:, j] * step) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, safe


def weighted_error(W, codes, scales, H):
    difference = W.double() - codes.double() * scales.double()
    return (difference @ H.double() * difference).sum((-2, -1))


# ----------------------------------------------------------------------------------------------------------------------
# GPTQ
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out, width, samples", [(24, 32, 200), (16, 48, 20), (40, 7, 50)])
@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_gptq_equals_dense_elimination(out, width, samples, damp):
    W, H, scales = random_problem(3, out, width, samples)
    H[1, 4], H[1, :, 4] = 0, 0  # an input that is always zero
    codes = gptq(W, H, scales, damp=damp)
    assert codes.dtype == torch.int8 and codes.shape == W.shape
    plain = torch.round(W / scales.float()).clamp(-31, 31)
    for i in range(3):
        expected, safe = dense_gptq(W[i], H[i], scales[i], damp=damp)
        assert safe.mean() > 0.5
        np.testing.assert_array_equal(codes[i].numpy()[safe], expected[safe])
        assert (plain[i].numpy()[safe] != expected[safe]).any()  # rounding alone is something else
    assert (codes[1, :, 4] == 0).all() and (plain[1, :, 4] != 0).any()


def test_gptq_order_and_damping_show_in_the_codes():
    """The control of the test above: the reference is not blind to the order nor to the damping."""
    W, H, scales = random_problem(1, 40, 32, 200)
    expected, _ = dense_gptq(W[0], H[0], scales[0])
    less_damped, _ = dense_gptq(W[0], H[0], scales[0], damp=0.005)
    swapped = torch.arange(32).flip(0)
    other_order = gptq(W[:, :, swapped], H[:, swapped][:, :, swapped], scales)[0][:, swapped]
    assert (other_order.numpy() != expected).mean() < 0.01  # the order is that of diag(H), not of the columns
    assert (less_damped != expected).any()


@pytest.mark.parametrize("block", [1, 4, 16, 33, 128])
def test_block_size_changes_nothing(block):
    W, H, scales = random_problem(2, 24, 48, 200, seed=10)
    codes = gptq(W, H, scales, block=block)
    for i in range(2):
        expected, safe = dense_gptq(W[i], H[i], scales[i])
        assert safe.mean() > 0.5
        np.testing.assert_array_equal(codes[i].numpy()[safe], expected[safe])


def test_a_batch_equals_one_matrix_at_a_time_and_nothing_given_is_changed():
    W, H, scales = random_problem(5, 16, 32, 100, seed=20)
    given = [tensor.clone() for tensor in (W, H, scales)]
    together = gptq(W, H, scales)
    assert all(torch.equal(one, other) for one, other in zip(given, (W, H, scales), strict=True))
    for i in range(5):
        assert torch.equal(gptq(W[i : i + 1], H[i : i + 1], scales[i : i + 1])[0], together[i])


def test_codes_stay_within_31_and_the_rest_makes_up_for_what_is_clipped():
    W, H, scales = random_problem(2, 24, 32, 200, seed=30)
    scales = scales / 8  # half a standard deviation falls on 31
    codes = gptq(W, H, scales)
    assert codes.min() == -31 and codes.max() == 31
    plain = torch.round(W / scales.float()).clamp(-31, 31)
    assert plain.min() == -31 and plain.max() == 31
    assert (weighted_error(W, codes, scales, H) < weighted_error(W, plain, scales, H)).all()


@pytest.mark.parametrize("samples", [1, 5])
def test_hessians_of_few_samples(samples):
    """Rank 1 of 32: only the damping makes it invertible."""
    W, H, scales = random_problem(2, 8, 32, samples, seed=40)
    codes = gptq(W, H, scales)
    error, plain = (weighted_error(W, c, scales, H) for c in (codes, torch.round(W / scales.float())))
    assert (error < 0.1 * plain).all()


def test_inverse_cholesky():
    _, H, _ = random_problem(3, 4, 24, 100, seed=50)
    U = train_gpt.inverse_cholesky(H, 0.05).numpy()
    assert U.dtype == np.float64
    for matrix, factor in zip(H.double().numpy(), U, strict=True):
        assert (np.tril(factor, -1) == 0).all()
        damped = matrix + 0.05 * np.diag(matrix).mean() * np.eye(24)
        np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(24), atol=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# Hessians
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, num_layers=2, ve_layers="0")])
def test_hessians_are_sums_over_tokens_of_the_inputs_of_every_row(config):
    """Against X^T X in float64 from a tap, which also shows that STACKS names the right stack for every row."""
    model, batches = random_model(config, torch.float32), [random_ids(3, 12, seed) for seed in (1, 2)]
    explicit = {}

    def tap(bank, row, x, y):
        flat = x.detach().double().flatten(0, 1).numpy()
        explicit[bank, row] = explicit.get((bank, row), 0) + flat.T @ flat

    for batch in batches:
        model(batch, tap=tap)
    hessians = collect_hessians(model, iter(batches))
    L, d, m = config.num_layers, config.model_dim, config.mlp_dim
    widths = {"attn_in": d, "attn_out": d, "mlp_in": d, "mlp_mid": m}
    assert {name: tuple(H.shape) for name, H in hessians.items()} == {n: (L, w, w) for n, w in widths.items()}
    assert len(explicit) == sum(len(getattr(model, bank)) for bank in GPT.BANKS)
    used = set()
    for (bank, row), expected in explicit.items():
        stack, layer = STACKS[bank][row // L], row % L
        used.add((stack, layer))
        got = hessians[stack][layer].double().numpy()
        assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected), (bank, row)
    assert used == {(name, layer) for name in widths for layer in range(L)}
    assert all(not H.requires_grad for H in hessians.values())


def test_calibration_reads_training_data_spread_over_the_stream_and_ranks_share_it(demo_data, monkeypatch):
    config = train_gpt.Config(train_seq_len=64, train_batch_tokens=1024, grad_accum_total=4, gptq_calib_batches=5)
    stream = train_gpt.TokenStream(f"{demo_data}/fineweb_train_*.bin", 1024)
    whole = list(train_gpt.calibration_batches(stream, config, torch.device("cpu")))
    tokens = np.array(stream.shards[0]).astype(np.int64)
    for i, batch in enumerate(whole):
        start = i * len(tokens) // 5
        np.testing.assert_array_equal(batch.numpy(), tokens[start : start + 256].reshape(4, 64))
    monkeypatch.setattr(train_gpt, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(train_gpt, "rank", lambda rank=rank: rank)
        shares.append(list(train_gpt.calibration_batches(stream, config, torch.device("cpu"))))
    assert [len(share) for share in shares] == [3, 2]
    mixed = [shares[i % 2][i // 2] for i in range(5)]
    assert all(torch.equal(one, other) for one, other in zip(whole, mixed, strict=True))


def test_on_real_inputs_gptq_beats_rounding_in_every_matrix(demo_data):
    """Inputs from the demo text through a random model, weighted error of every bank row against plain rounding."""
    config = replace(SMALL, vocab_size=1024, model_dim=48, num_layers=3, ve_layers="1", train_seq_len=64)
    model = random_model(config, torch.float32)
    stream = train_gpt.TokenStream(f"{demo_data}/fineweb_train_*.bin", 1024)
    batches = [stream.rows(start, 8, 64, torch.device("cpu"))[0] for start in (0, 200_000, 400_000)]
    hessians = collect_hessians(model, batches)
    state = model.state_dict()
    fine, plain = (quantize(state, given, config) for given in (hessians, None))
    ratios = []
    for one, other in zip(fine, plain, strict=True):
        if one.scheme == "int6":
            assert torch.equal(one.scales, other.scales)
            H = torch.cat([hessians[stack] for stack in STACKS[one.name]])
            errors = [weighted_error(state[one.name], r.codes, r.scales, H) for r in (one, other)]
            assert (errors[0] < errors[1]).all(), one.name
            ratios += (errors[0] / errors[1]).tolist()
        else:
            assert torch.equal(one.codes, other.codes)
    assert len(ratios) == 6 + 6 + 3 + 3 and np.mean(ratios) < 0.8


# ----------------------------------------------------------------------------------------------------------------------
# Scales and schemes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return random_model(replace(SMALL, tie_embeddings=False), torch.float32).state_dict()


def records(state, config=SMALL, hessians=None) -> dict[str, train_gpt.Record]:
    return {record.name: record for record in quantize(state, hessians, config)}


def test_scheme_of_every_tensor(state):
    found = records(state)
    assert list(found) == list(state)
    int6 = {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}
    int8 = {f"{name}.weight" for name in ("tok_emb", "lm_head", "bigram.embed", "ve_shared.embed")}
    for name, r in found.items():
        assert r.scheme == ("int6" if name in int6 else "int8" if name in int8 else "fp16")
        assert r.codes.shape == state[name].shape
        if r.scheme == "fp16":
            assert r.codes.dtype == torch.float16 and r.scales is None
            assert torch.equal(dequantize(r), state[name].half().float())
        else:
            limit = 31 if r.scheme == "int6" else 127
            assert r.codes.dtype == torch.int8 and abs(r.codes.int()).max() <= limit
            assert r.scales.dtype == torch.float16 and r.scales.shape == (*state[name].shape[:-1], 1)
            values = r.codes.numpy().astype(np.float32) * r.scales.numpy().astype(np.float32)
            np.testing.assert_array_equal(dequantize(r).numpy(), values)


@pytest.mark.parametrize("sigmas", [6.0, 12.85])
def test_row_scales_of_the_banks_have_no_floor(state, sigmas):
    """One step a row, MATRIX_CLIP_SIGMAS standard deviations over 31 to the precision of float16, however small."""
    wanted = torch.tensor([1e-2, 1e-3, 1.0, 100.0]).repeat(6)[:, None]
    state["qo_bank"] = state["qo_bank"] / state["qo_bank"].std(-1, keepdim=True) * wanted
    r = records(state, replace(SMALL, matrix_clip_sigmas=sigmas))["qo_bank"]
    expected = np.std(state["qo_bank"].double().numpy(), axis=-1, ddof=1, keepdims=True) * sigmas / 31
    np.testing.assert_allclose(r.scales.double().numpy(), expected, rtol=2**-10)
    assert float(r.scales[0, 1]) == pytest.approx(1e-3 * sigmas / 31, rel=2**-10) and float(r.scales[0, 1]) < 1 / 31
    error = (dequantize(r) - state["qo_bank"]).abs() / r.scales.float()
    assert error.max() < 0.51 + (state["qo_bank"].abs() / r.scales.float() - 31).clamp(min=0).max()


@pytest.mark.parametrize("with_hessians", [True, False])
def test_zero_rows_survive(with_hessians):
    model = random_model(SMALL, torch.float32)
    with torch.no_grad():
        model.qo_bank[3].zero_()
        model.mlp_up_bank[1, 5].zero_()
        model.tok_emb.weight[7].zero_()
    hessians = collect_hessians(model, [random_ids(4, 12)]) if with_hessians else None
    values = {name: dequantize(r) for name, r in records(model.state_dict(), SMALL, hessians).items()}
    assert all(value.isfinite().all() for value in values.values())
    assert (values["qo_bank"][3] == 0).all() and (values["mlp_up_bank"][1, 5] == 0).all()
    assert (values["tok_emb.weight"][7] == 0).all() and (values["qo_bank"][2] != 0).any()


def test_an_outlier_is_clipped_to_31_steps(state):
    state["kv_bank"][2, 3] = 0.01
    state["kv_bank"][2, 3, 5], state["kv_bank"][2, 4, 5] = -50.0, 50.0
    r = records(state, replace(SMALL, matrix_clip_sigmas=2.0))["kv_bank"]
    assert r.codes[2, 3, 5] == -31 and r.codes[2, 4, 5] == 31 and abs(r.codes[2, 3].int()).max() == 31


def test_int8_error_is_at_most_half_a_step(state):
    for name, r in records(state).items():
        if r.scheme == "int8":
            step = state[name].double().abs().amax(-1, keepdim=True) / 127
            torch.testing.assert_close(r.scales.double(), step, rtol=2**-10, atol=0)
            error = (dequantize(r).double() - state[name].double()).abs() / r.scales.double()
            assert error.max() <= 0.5 + 1e-6 and error.max() > 0.45
            assert (r.codes.int().abs().amax(-1) == 127).all()


def test_quantising_changes_nothing_that_is_given():
    model = random_model(SMALL, torch.float32)
    hessians = collect_hessians(model, [random_ids(4, 12)])
    before = {name: tensor.clone() for name, tensor in {**model.state_dict(), **hessians}.items()}
    quantize(model.state_dict(), hessians, SMALL)
    after = {**model.state_dict(), **hessians}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_each_bank_row_is_rounded_with_its_own_hessian():
    """Row by row, against gptq alone with the X^T X of that row's inputs."""
    model, ids, explicit = random_model(SMALL, torch.float32), random_ids(6, 16), {}
    model(ids, tap=lambda bank, row, x, y: explicit.update({(bank, row): x.detach().double().flatten(0, 1)}))
    found = records(model.state_dict(), SMALL, collect_hessians(model, [ids]))
    for (bank, row), x in explicit.items():
        W, r = model.state_dict()[bank][row], found[bank]
        codes, safe = dense_gptq(W, x.T @ x, r.scales[row])
        assert safe.any()
        assert (r.codes[row].numpy()[safe] == codes[safe]).mean() > 0.99, (bank, row)
