"""The levers: each against a few lines from its formula,
in float64; causality, switches during a run, whole runs.

That they change nothing when off is for test_model.py and the stored losses of test_training.py to say.
"""

import inspect
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from formats import shard_header
from sentencepiece import SentencePieceProcessor
from test_artifact import TOKENIZER, make_progress, make_run
from test_model import SMALL, int32, matrices_of, norm, random_ids, random_model, reference_attention
from test_training import StepClock, flat, gradient_of, running, sgd, stream, train_here

import train_gpt
from train_gpt import (
    GPT,
    Config,
    Statistics,
    decode_scale,
    dequantize,
    fake_quantized_banks,
    prune_smallest,
    quantize_state_dict,
    training_loss,
)

CPU, L, V = torch.device("cpu"), SMALL.num_layers, SMALL.vocab_size
WORD_START = np.arange(V) % 3 == 0
REPEATS = dict(block_order="0,1,2,3,4,2,3")
SHUFFLED = dict(block_order="3, 1,4,0,4,2,1,2")
FAMILY = dict(pos_conditional_bigram=True, word_start_boost=True)

# Every lever that the model can have at once, and those of the loss.
ALL = replace(SMALL, **SHUFFLED, **FAMILY, mlp_hidden=31, star_relu=True, skip_gates=True,
              num_memory_tokens=3, num_kv_heads=4, phase_resid_mix=True, overtone_init=True)  # fmt: skip
LOSSES = dict(mtp_num_heads=2, mtp_loss_weight=0.4, zloss_weight=0.01)


def lever_model(
    config: Config, dtype: torch.dtype = torch.float64, looped: bool = True, seed: int = 0
) -> GPT:
    """A model with every parameter random, that knows which tokens begin a word."""
    state, word_start = (
        random_model(config, dtype, seed).state_dict(),
        np.resize(WORD_START, config.vocab_size),
    )
    model = GPT(config, dtype, word_start=word_start).to(dtype)
    model.load_state_dict(state, strict=True)
    model.looped = looped
    return model


def ids_with_borders() -> torch.Tensor:
    """Two rows of eleven tokens, in which documents begin
    at the first place, elsewhere, and right after another."""
    ids = random_ids(2, 11)
    ids[0, 4] = ids[0, 5] = ids[1, 0] = ids[1, 8] = train_gpt.BOS_ID
    return ids


def numbers(model: GPT) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------
# The reference
# ------------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def table_row(c: Config, ids: list[int], t: int) -> int:
    """The row of the hashed table that place T reads."""
    size, half = c.bigram_vocab_size, (c.bigram_vocab_size - 1) // 2
    first = [s == 0 or (c.doc_borders == "respect" and token == 1) for s, token in enumerate(ids)]
    if c.bigram_hash == "linear":
        return (1009 * (0 if first[t] else ids[t - 1]) + ids[t]) % size
    pair = int32(36313 * ids[t]) ^ int32(27191 * ids[t - 1])
    hashed = pair % (size - 1)
    if c.pos_conditional_bigram:
        hashed = pair % half + (0 if WORD_START[ids[t] % V] else half)
    return size - 1 if first[t] else hashed


def lever_embedding(c: Config, p: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    x, alone = [], [t == 0 or (c.doc_borders == "respect" and token == 1) for t, token in enumerate(ids)]
    for t, token in enumerate(ids):
        hashed = p["bigram.proj.weight"] @ p["bigram.embed.weight"][table_row(c, ids, t)]
        hashed = hashed * (1 if c.bigram_hash == "linear" else p["bigram.scale"])
        boost = p["word_start_boost"] if c.word_start_boost and WORD_START[token % V] else 1
        x.append(norm(p["tok_emb.weight"][token] + boost * hashed))
    g = sigmoid(p["smear.gate"])
    x = np.array([(1 - g) * e + (0 if alone[t] else g * x[t - 1]) for t, e in enumerate(x)])
    for k in range(min(c.num_memory_tokens, len(x))):
        x[k] = p["memory_tokens"][0, k]
    return x


def lever_stream(model: GPT, ids: list[int]) -> np.ndarray:
    """The input of the head, (T, d): layer by layer, each with its own scales and bank rows."""
    c, p = model.config, numbers(model)
    order = [int(n) for n in c.block_order.split(",")] if c.block_order else [*range(c.num_layers)]
    layers = [(n, row) for n, row in enumerate(order) if model.looped or row not in order[:n]]
    x, outputs, ve_layers = lever_embedding(c, p, ids), [], [int(n) for n in c.ve_layers.split(",")]
    x0 = x
    for depth, (n, row) in enumerate(layers):
        own, half, second = f"blocks.{n}.", len(layers) // 2, depth - len(layers) // 2
        if 0 <= second < half:
            skip = p["skip_weights"][second] * outputs[half - 1 - second]
            g = sigmoid(p["skip_gates"][second]) if c.skip_gates else None
            x = x + skip if g is None else g * x + (1 - g) * skip
        x, value, factor = (
            p[own + "resid_mix"][0] * x + p[own + "resid_mix"][1] * x0,
            0.0,
            1 / np.sqrt(row + 1),
        )
        if row in ve_layers:
            value = p["ve_shared.scale"] * p["ve_shared.embed.weight"][ids] @ p["ve_shared.proj.weight"].T
            value = value * p[f"ve_layer_scales.{ve_layers.index(row)}"]
        gains = {f"blocks.{row}.attn.q_gain": p[own + "attn.q_gain"]}
        x = x + p[own + "attn_scale"] * reference_attention(
            c, p | gains, row, norm(x) * factor, value + np.zeros(1)
        )
        u = norm(x) * factor @ p["mlp_up_bank"][row].T
        u = np.where(u < 0, c.mlp_leaky_slope * u, u) ** 2
        u = p[own + "mlp.scale"] * u + p[own + "mlp.bias"] if c.star_relu else u
        x = x + p[own + "mlp_scale"] * (u @ p["mlp_down_bank"][row].T)
        outputs.append(x)
    return x


def lever_logits(c: Config, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return c.logit_softcap * np.tanh(norm(x) @ weight.T / c.logit_softcap)


# ------------------------------------------------------------------------------------------------------------
# The forward pass
# ------------------------------------------------------------------------------------------------------------

FORWARD = {
    "all": ({}, ALL),
    "all but the repeats": (dict(looped=False), ALL),
    "MLP width": dict(mlp_hidden=31),
    "star": dict(star_relu=True),
    "star of ReLU^2": dict(star_relu=True, mlp_leaky_slope=0.0),
    "gated skips": dict(skip_gates=True),
    "gated skips, even": dict(skip_gates=True, num_layers=4),
    "repeats": REPEATS,
    "shuffled": SHUFFLED,
    "repeats left out": (dict(looped=False), replace(SMALL, **SHUFFLED)),
    "one block": dict(num_layers=1, ve_layers="0", block_order="0,0,0"),
    "one block once": (dict(looped=False), replace(SMALL, num_layers=1, ve_layers="0", block_order="0,0,0")),
    "linear hash": dict(bigram_hash="linear"),
    "linear hash across borders": dict(bigram_hash="linear", doc_borders="published"),
    "linear hash, boosted": dict(bigram_hash="linear", word_start_boost=True),
    "two halves": dict(pos_conditional_bigram=True),
    "two halves of an even number": dict(pos_conditional_bigram=True, bigram_vocab_size=16),
    "across borders": dict(doc_borders="published"),
    "boost": dict(word_start_boost=True),
    "hashes": FAMILY,
    "memory": dict(num_memory_tokens=3),
    "nothing but memory": dict(num_memory_tokens=15),
    "as many kv heads": dict(num_kv_heads=4),
}
CASES = {
    name: case if isinstance(case, tuple) else ({}, replace(SMALL, **case)) for name, case in FORWARD.items()
}


@pytest.mark.parametrize("how, config", CASES.values(), ids=CASES.keys())
def test_logits_equal_the_reference(how, config):
    model, ids = lever_model(config, **how), ids_with_borders()
    for row, got in zip(ids.tolist(), model(ids).detach().numpy(), strict=True):
        expected = lever_logits(config, lever_stream(model, row), numbers(model)["tok_emb.weight"])
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def test_each_case_has_its_own_logits():
    """The control of the test above; a model without the lever has the same weights otherwise."""
    model, row = lever_model(SMALL), ids_with_borders()[0].tolist()
    seen = {"off": lever_logits(SMALL, lever_stream(model, row), numbers(model)["tok_emb.weight"])}
    for name, (how, config) in CASES.items():
        model, state = lever_model(config, **how), lever_model(SMALL).state_dict()
        own = {key: state[key] if key in state and state[key].shape == p.shape else p
               for key, p in model.state_dict().items()}  # fmt: skip
        model.load_state_dict(own)
        seen[name] = lever_logits(config, lever_stream(model, row), numbers(model)["tok_emb.weight"])
        assert all(abs(seen[name] - other).max() > 1e-3 for key, other in seen.items() if key != name), name


@pytest.mark.parametrize("how, config", CASES.values(), ids=CASES.keys())
def test_no_logit_depends_on_a_later_token(how, config):
    """Bit for bit: all tokens from the cut on are replaced,
    borders among them, and what is before must not move."""
    model, ids, other = (
        lever_model(config, torch.float32, **how),
        ids_with_borders(),
        random_ids(2, 11, seed=1),
    )
    other[0, 7] = train_gpt.BOS_ID
    with torch.no_grad():
        before = model(ids)
        for cut in range(1, 11):
            changed = torch.cat((ids[:, :cut], other[:, cut:]), dim=1)
            changed[:, cut] = torch.where(
                changed[:, cut] == ids[:, cut], ids[:, cut] % 38 + 2, changed[:, cut]
            )
            after = model(changed)
            assert torch.equal(before[:, :cut], after[:, :cut]), cut
            assert not torch.equal(before[:, cut:], after[:, cut:]), cut


@pytest.mark.parametrize("changes", [dict(bigram_hash="linear"), {}, FAMILY], ids=str)
@pytest.mark.parametrize("rows", [4096, 6151])
def test_hashes_of_large_ids_wrap_at_32_bits(changes, rows):
    config = replace(SMALL, vocab_size=65536, bigram_vocab_size=rows, **changes)
    model, ids = lever_model(config), [60000, 65535, 59200, 2, 1, 41000, 64321, 50000, 7, 8, 65000, 65001]
    expected = lever_embedding(config, numbers(model), ids)
    np.testing.assert_allclose(
        model.embed(torch.tensor([ids])).detach().numpy()[0], expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("changes", [dict(bigram_hash="linear"), {}], ids=str)
def test_hashes_look_back_across_a_border_only_as_published(changes):
    """With zero attention and no smear, the next position depends on a token, but not across a border."""
    model = lever_model(replace(SMALL, smear_gate=False, **changes))
    with torch.no_grad():
        model.qo_bank[L:].zero_()
    published = GPT(replace(model.config, doc_borders="published"), torch.float64).double()
    published.load_state_dict(model.state_dict())
    ids, others = (
        torch.tensor([[1, 5, 9, 30, 1, 7, 8, 20, 21]]),
        torch.tensor([[1, 5, 9, 12, 1, 7, 17, 20, 21]]),
    )

    def places(one: GPT) -> list[int]:
        return torch.nonzero((one(ids) != one(others)).any(-1)[0]).flatten().tolist()

    assert places(model) == [3, 6, 7] and places(published) == [3, 4, 6, 7]


@pytest.mark.parametrize("config", [ALL, CASES["linear hash, boosted"][1]])
def test_lower_precision_is_close_and_stays_in_the_stream(config):
    exact, ids = lever_model(config)(ids_with_borders()).detach(), ids_with_borders()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.15)):
        model = GPT(config, dtype, word_start=WORD_START)
        model.load_state_dict(lever_model(config).state_dict())
        assert model.stream(ids).dtype == dtype and model(ids).dtype == torch.float32
        assert (model(ids).double() - exact).square().mean().sqrt() < tolerance


def test_gradients_reach_every_parameter():
    model, ids = lever_model(replace(ALL, **LOSSES)), random_ids(2, 16)
    training_loss(model, ids, random_ids(2, 16, 1)).backward()
    for name, p in model.named_parameters():
        gradient = p.grad.abs().flatten(1).amax(1) if name.endswith("_bank") else p.grad.abs().max()
        assert (gradient > 1e-9).all(), name


# ------------------------------------------------------------------------------------------------------------
# Shared blocks and initial weights
# ------------------------------------------------------------------------------------------------------------


def test_statistics_of_a_bank_row_are_means_over_its_uses():
    """Layer by layer the rows i and L + i of the order; X^T X of all uses of a row, in float64."""
    model, ids, seen, explicit = lever_model(ALL), random_ids(3, 12), [], {}

    def tap(block, product, x, y):
        for bank, row, part in matrices_of(model, block, product, y):
            seen.append((bank, row))
            torch.testing.assert_close(part, x @ getattr(model, bank)[row].mT, rtol=0, atol=1e-12)
            flat_x = x.detach().flatten(0, 1).numpy()
            explicit[bank, row] = explicit.get((bank, row), 0) + flat_x.T @ flat_x

    model(ids, tap=tap)
    used = [3, 1, 4, 0, 4, 2, 1, 2]
    pattern = [
        ("qo_bank", 0),
        ("kv_bank", 0),
        ("kv_bank", L),
        ("qo_bank", L),
        ("mlp_up_bank", 0),
        ("mlp_down_bank", 0),
    ]
    assert seen == [(bank, offset + row) for row in used for bank, offset in pattern]
    hessians = train_gpt.collect_hessians(model, [ids[:1], ids[1:]])
    stacks = {
        "attn_in": ("qo_bank", 0),
        "attn_out": ("qo_bank", L),
        "mlp_in": pattern[4],
        "mlp_mid": pattern[5],
    }
    for stack, (bank, offset) in stacks.items():
        for row in range(L):
            expected = explicit[bank, offset + row] / (ids.numel() * used.count(row))
            difference = hessians[stack][row].double().numpy() - expected
            assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(expected), (stack, row)


def test_the_loop_starts_with_the_scales_of_the_first_uses():
    model = lever_model(ALL, looped=False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.start_loop()
    assert model.looped
    for name, p in model.state_dict().items():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        first = {"4": "2", "6": "1", "7": "5"}.get(block, block) if name.startswith("blocks.") else None
        assert torch.equal(p, before[name if first is None else f"blocks.{first}.{rest}"]), name
    assert not torch.equal(before["blocks.7.mlp.bias"], before["blocks.5.mlp.bias"])


def test_the_averages_of_repeats_start_with_the_loop():
    """Before, the EMA of a repeat is that of its first values."""
    model = lever_model(ALL, looped=False)
    average = train_gpt.WeightAverage(model, replace(model.config, ema_enabled=True, ema_decay=0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update(1, 1.0)
    before = dict(
        zip((name for name, _ in model.named_parameters()), map(torch.clone, average.ema), strict=True)
    )
    model.start_loop()
    train_gpt.start_repeats(model, average.ema)
    average.apply()
    for name, p in model.named_parameters():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        first = {"4": "2", "6": "1", "7": "5"}.get(block, block) if name.startswith("blocks.") else None
        assert torch.equal(p, before[name if first is None else f"blocks.{first}.{rest}"]), name


def test_scales_of_repeats_learn_nothing_before_the_loop():
    model = lever_model(ALL, looped=False)
    training_loss(model, random_ids(2, 16), random_ids(2, 16, 1)).backward()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is None} == {"4", "6", "7"}
    assert all((bank.grad.abs().amax((1, 2)) > 0).all() for bank in map(model.get_parameter, GPT.BANKS))


@pytest.mark.parametrize("vocab", [16, 300])
def test_overtone(vocab):
    """The k-th singular value becomes the first / sqrt(k); the singular vectors stay."""
    config = replace(SMALL, vocab_size=vocab)
    plain = GPT(config).init_weights(3).tok_emb.weight.detach().double().numpy()
    weight = GPT(replace(config, overtone_init=True)).init_weights(3).tok_emb.weight.detach().double().numpy()
    U, s, Vt = np.linalg.svd(plain, full_matrices=False)
    k = np.arange(1, min(vocab, 24) + 1)
    np.testing.assert_allclose(np.linalg.svd(weight, compute_uv=False), s[0] / np.sqrt(k), rtol=1e-5)
    np.testing.assert_allclose(weight, U * (s[0] / np.sqrt(k)) @ Vt, rtol=0, atol=1e-5 * s[0])
    assert s[3] > 1.1 * s[0] / 2 or vocab == 16  # another spectrum than before


@pytest.mark.parametrize(
    "changes, layers", [({}, 5), (dict(block_order=",".join("012" * 4), num_layers=3), 12)]
)
def test_phase_transition(changes, layers):
    """From 0.182 of the stream and 0.818 of the first embedding to the reverse, along a sigmoid."""
    config = replace(SMALL, ve_layers="1", phase_resid_mix=True, **changes)
    mixes = np.array([block.resid_mix.detach().numpy() for block in GPT(config).init_weights(0).blocks])
    assert mixes.shape == (layers, 2, 24) and (mixes == mixes[..., :1]).all()
    np.testing.assert_allclose(mixes[[0, -1], :, 0], [[0.18243, 0.81757], [0.81757, 0.18243]], atol=1e-5)
    share = sigmoid(3 * (np.arange(layers) / (layers - 1) - 0.5))
    np.testing.assert_allclose(mixes[:, :, 0], np.stack((share, 1 - share), 1), atol=1e-6)


def test_initial_weights():
    config = replace(ALL, bigram_hash="linear", pos_conditional_bigram=False, bigram_vocab_size=2000,
                     num_memory_tokens=100, **LOSSES)  # fmt: skip
    state = GPT(config).init_weights(7).state_dict()
    assert "bigram.scale" not in state and not state["bigram.proj.weight"].any()
    assert float(state["bigram.embed.weight"].std()) == pytest.approx(0.01, rel=0.05)
    assert float(state["memory_tokens"].std()) == pytest.approx(0.02, rel=0.05)
    assert state["memory_tokens"].shape == (1, 100, 24) and state["skip_gates"].shape == (4, 24)
    assert state["word_start_boost"] == 1 and not state["skip_gates"].any()
    for n in range(8):
        assert (
            torch.equal(state[f"blocks.{n}.mlp.scale"], torch.ones(31))
            and not state[f"blocks.{n}.mlp.bias"].any()
        )
    for k in range(2):
        assert state[f"mtp_heads.{k}.weight"].shape == (V, 24) and not state[f"mtp_heads.{k}.weight"].any()


# ------------------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------------------

LOSS_CASES = [
    {},
    dict(zloss_weight=0.01),
    dict(mtp_num_heads=1),
    dict(mtp_num_heads=3, mtp_loss_weight=0.7),
    dict(num_memory_tokens=4),
    dict(num_memory_tokens=2, **LOSSES),
    dict(num_memory_tokens=7, mtp_num_heads=3),
]


@pytest.mark.parametrize("changes", LOSS_CASES, ids=str)
def test_training_loss_equals_its_formula(changes):
    """Means over the rows of 11 targets but those of memory tokens; head k looks k targets further."""
    c = replace(SMALL, **changes)
    model, ids, targets = lever_model(c), ids_with_borders(), random_ids(2, 11, 5).numpy()
    p, kept = numbers(model), range(c.num_memory_tokens, 11)
    streams = [lever_stream(model, row) for row in ids.tolist()]

    def cross_entropy(weight: np.ndarray, ahead: int) -> float:
        losses = []
        for b, x in enumerate(streams):
            z = lever_logits(c, x, weight)
            losses += [
                np.logaddexp.reduce(z[t]) - z[t, targets[b, t + ahead]] for t in kept if t + ahead < 11
            ]
        return np.mean(losses)

    expected = plain = cross_entropy(p["tok_emb.weight"], 0)
    z = np.array([lever_logits(c, x, p["tok_emb.weight"])[kept] for x in streams])
    expected += c.zloss_weight * np.mean(np.logaddexp.reduce(z, -1) ** 2)
    heads = [cross_entropy(p[f"mtp_heads.{k}.weight"], k + 1) for k in range(c.mtp_num_heads)]
    expected += c.mtp_loss_weight * np.mean(heads) if heads else 0.0
    loss = float(training_loss(model, ids, torch.from_numpy(targets)).detach())
    assert loss == pytest.approx(expected, abs=1e-9)
    assert (abs(expected - plain) > 1e-2) == bool(c.zloss_weight or heads)


def test_heads_and_z_loss_leave_evaluation_alone():
    model, ids, targets = lever_model(replace(SMALL, **LOSSES)), ids_with_borders(), random_ids(2, 11, 5)
    plain = GPT(SMALL, torch.float64).double()
    state = model.state_dict()
    plain.load_state_dict(
        {name: tensor for name, tensor in state.items() if not name.startswith("mtp_heads.")}
    )
    assert len(state) == len(plain.state_dict()) + 2
    assert torch.equal(model(ids), plain(ids))
    assert torch.equal(train_gpt.token_nll(model, ids, targets), train_gpt.token_nll(plain, ids, targets))
    assert training_loss(model, ids, targets) > training_loss(plain, ids, targets) + 0.1
    assert torch.equal(training_loss(plain, ids, targets), train_gpt.token_nll(plain, ids, targets).mean())


# ------------------------------------------------------------------------------------------------------------
# Late rounding
# ------------------------------------------------------------------------------------------------------------


def rounded(bank: np.ndarray) -> np.ndarray:
    """int6 codes within +-31, of one float32 step a row,
    in eighths of an octave: six standard deviations on 31."""
    eighths = np.round(8 * np.log2(bank.std(-1, ddof=1, keepdims=True) * 6 / 31))
    step = (2.0 ** (eighths / 8)).astype(np.float32).astype(np.float64)
    return np.clip(np.round(bank / step), -31, 31) * step


@pytest.mark.parametrize("parts", [1, 2])
def test_a_rounded_step_is_the_gradient_at_the_rounded_banks_applied_to_the_others(parts):
    model, ids, targets = (
        lever_model(replace(SMALL, grad_clip_norm=0.0)),
        random_ids(4, 12, 1),
        random_ids(4, 12, 2),
    )
    at_rounded, before = lever_model(model.config), flat(model)
    with torch.no_grad():
        for bank in map(at_rounded.get_parameter, GPT.BANKS):
            bank.copy_(torch.from_numpy(rounded(bank.numpy())))
    batches = list(zip(ids.chunk(parts), targets.chunk(parts), strict=True))
    gradient = gradient_of(at_rounded, training_loss, ids, targets)
    assert np.linalg.norm(gradient - gradient_of(model, training_loss, ids, targets)) > 1e-2
    step = train_gpt.train_step(training_loss, model, batches, sgd(model), 0.5, 0.9, round_banks=True)
    assert float(step.loss) == pytest.approx(
        float(training_loss(at_rounded, ids, targets).detach()), abs=1e-5
    )
    np.testing.assert_allclose(flat(model), before - 0.5 * gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sigmas", [6.0, 2.0])
def test_the_grid_of_late_rounding_is_that_of_the_export(sigmas):
    """Bit for bit what plain rounding stores, on the steps that GPTQ takes;
    afterwards the banks are what they were."""
    model = lever_model(replace(SMALL, matrix_clip_sigmas=sigmas), torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = {r.name: dequantize(r) for r in quantize_state_dict(state, Statistics(), model.config)}
    hessians = train_gpt.collect_hessians(model, [random_ids(4, 12)])
    fine = quantize_state_dict(state, Statistics(hessians), model.config)
    steps = {r.name: decode_scale(r.row_scale) for r in fine if r.name in GPT.BANKS}
    with fake_quantized_banks(model):
        for name, p in model.state_dict().items():
            assert torch.equal(p, plain[name] if name in steps else state[name]), name
            assert name not in steps or not torch.equal(p, state[name])
        for name, step in steps.items():
            codes = getattr(model, name).detach() / step
            assert (codes - codes.round()).abs().max() < 1e-5 and codes.abs().max() < 31.001
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_compiled_steps_equal_eager_ones_rounded_or_not():
    """One graph, whole, serves both: a switch that the compiler had folded into it would do nothing."""
    config = replace(ALL, num_layers=2, block_order="0,1,0", ve_layers="1", num_memory_tokens=1, **LOSSES)
    graphs, backend, model = [], torch._dynamo.lookup_backend("aot_eager"), lever_model(config, torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def count(module, inputs):
        graphs.append(module)
        return backend(module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(training_loss, backend=count, dynamic=False, fullgraph=True)
    batches, ends = [(random_ids(2, 12), random_ids(2, 12, 1))], []
    for loss_fn in (training_loss, compiled):
        for round_banks in (False, True):
            model.load_state_dict(state)
            train_gpt.train_step(loss_fn, model, batches, sgd(model), 1.0, 0.9, round_banks)
            ends.append(flat(model))
    np.testing.assert_allclose(ends[2:], ends[:2], rtol=0, atol=1e-5)
    assert len(graphs) == 1 and np.linalg.norm(ends[2] - ends[3]) > 1e-3


# ------------------------------------------------------------------------------------------------------------
# Switches during a run
# ------------------------------------------------------------------------------------------------------------


def watch(monkeypatch, name: str) -> list[tuple[bool, bool]]:
    """A list that each call of train_gpt.NAME extends
    by whether the loop runs and the banks are to be rounded."""
    calls, function = [], getattr(train_gpt, name)

    def watched(*given, **named):
        arguments = inspect.signature(function).bind(*given, **named).arguments
        calls.append((arguments["model"].looped, arguments.get("round_banks", False)))
        return function(*given, **named)

    monkeypatch.setattr(train_gpt, name, watched)
    return calls


def train_and_watch(folder, monkeypatch, **changes) -> tuple[GPT, list[tuple[bool, bool]]]:
    """Train unscored, one second a step; return the model and, per step, whether it looped and rounded."""
    c = replace(
        ALL, train_batch_tokens=64, grad_accum_total=1, val_loss_every=0, warmdown_iters=5, ema_enabled=False
    )
    c = replace(c, **{"iterations": 10, "max_wallclock_seconds": 0.0, **changes})
    model, seen = (
        lever_model(c, torch.float32, looped=not c.loop_start_frac),
        watch(monkeypatch, "train_step"),
    )
    run = make_run(folder, c, train=stream(folder))
    progress = make_progress(run, model, running(StepClock()), train_gpt.MetaRates(model, c))
    train_gpt.train(run, model, training_loss, None, 0.0, progress)
    return model, seen


@pytest.mark.parametrize(
    "limits", [{}, dict(iterations=99, max_wallclock_seconds=10.0)], ids=["steps", "clock"]
)
@pytest.mark.parametrize("share, step", [(0.5, 5), (0.45, 5), (0.35, 4), (0.0, 0)])
def test_the_loop_starts_at_its_share_of_the_run(tmp_path, monkeypatch, limits, share, step):
    _, seen = train_and_watch(tmp_path, monkeypatch, loop_start_frac=share, **limits)
    assert [looped for looped, _ in seen] == [False] * step + [True] * (10 - step)
    log = (tmp_path / "train.log").read_text()
    assert re.findall("depth_recurrence:.*", log) == [f"depth_recurrence:on step:{step + 1}"] * (step > 0)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_the_trained_model_is_the_one_that_its_weights_make(tmp_path, monkeypatch, share):
    """Also where the last step comes before the loop: who reads the artifact runs all of BLOCK_ORDER."""
    model, _ = train_and_watch(tmp_path, monkeypatch, loop_start_frac=share)
    fresh, ids = GPT(model.config, word_start=WORD_START), ids_with_borders()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids), model(ids))


@pytest.mark.parametrize("steps", [2, 3])
def test_warm_up_steps_with_and_without_the_loop_and_times_statistics_with_it(tmp_path, monkeypatch, steps):
    """The export takes its statistics when the loop has begun. Afterwards everything is as before."""
    config = replace(ALL, loop_start_frac=0.5, warmup_steps=steps, train_batch_tokens=64, grad_accum_total=1,
                     eval_seq_len=16, eval_stride=8, eval_batch_seqs=2)  # fmt: skip
    model = lever_model(config, torch.float32)
    stepped, counted, before = (
        watch(monkeypatch, "train_step"),
        watch(monkeypatch, "collect_hessians"),
        flat(model),
    )
    train_gpt.warm_up(make_run(tmp_path, config), model, training_loss, train_gpt.token_nll)
    assert np.array_equal(flat(model), before) and not model.looped
    assert len(stepped) == 2 * steps and set(stepped) == {(False, False), (True, False)}
    assert set(counted) == {(True, False)}


@pytest.mark.parametrize(
    "on, threshold, steps", [(1, 0.5, 2), (1, 0.4, 1), (1, 0.05, 0), (1, 1.0, 4), (0, 1.0, 0)]
)
def test_rounding_is_late(tmp_path, monkeypatch, on, threshold, steps):
    """The rate falls over the last five of ten steps: 1, 0.8, 0.6, 0.4, 0.2."""
    _, seen = train_and_watch(tmp_path, monkeypatch, late_qat=bool(on), late_qat_threshold=threshold)
    assert [bool(late) for _, late in seen] == [False] * (10 - steps) + [True] * steps


# ------------------------------------------------------------------------------------------------------------
# Export
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 24, 31), (1, 40, 24)])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_pruning_zeroes_the_smallest_of_each_matrix(shape, share):
    tensor = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-1, 1, shape[0])[:, None, None]
    )
    pruned = prune_smallest(tensor if shape[0] > 1 else tensor[0], share).view(shape)
    for W, got in zip(tensor.numpy(), pruned.numpy(), strict=True):
        expected = W.copy()
        expected.flat[np.argsort(abs(W), axis=None)[: int(share * W.size)]] = 0
        np.testing.assert_array_equal(got, expected)


def test_pruned_weights_are_stored_as_zero_on_unchanged_steps():
    state = random_model(SMALL, torch.float32).state_dict()
    pruned = quantize_state_dict(state, Statistics(), replace(SMALL, prune_frac=0.3))
    for record, whole in zip(pruned, quantize_state_dict(state, Statistics(), SMALL), strict=True):
        if record.row_scale is None:
            assert torch.equal(record.codes, whole.codes)
            continue
        assert torch.equal(record.row_scale, whole.row_scale) and record.col_scale is None
        matrices = state[record.name].view(-1, *record.codes.shape[-2:])
        for W, codes, others in zip(
            matrices, *(r.codes.view(matrices.shape) for r in (record, whole)), strict=True
        ):
            small = W.abs() <= W.abs().flatten().sort().values[int(0.3 * W.numel()) - 1]
            assert (codes[small] == 0).all() and torch.equal(codes[~small], others[~small])
            assert (others[small] != 0).any()


def test_the_artifact_carries_every_lever_of_the_model_and_no_heads(tmp_path):
    config = replace(ALL, **LOSSES)
    model, ids = lever_model(config, torch.float32), ids_with_borders()
    train_gpt.export(make_run(tmp_path, config), model, Statistics())
    names = {name for name in model.state_dict() if not name.startswith("mtp_heads.")}
    assert len(names) == len(model.state_dict()) - 2
    state = torch.load(tmp_path / "final_model.pt", weights_only=True)
    artifact = train_gpt.read_artifact(tmp_path / "final_model.int6.ptz")
    assert set(state) == set(artifact.state) == names and artifact.tokenizer_sha256 == TOKENIZER
    loaded = train_gpt.load_model(artifact, CPU, word_start=WORD_START)
    assert loaded.config.block_order == ALL.block_order and loaded.looped
    model.load_state_dict(
        {r.name: dequantize(r) for r in quantize_state_dict(state, Statistics(), config)}, strict=False
    )
    assert torch.equal(loaded(ids), model(ids))
    fresh = GPT(ALL, word_start=WORD_START)
    fresh.load_state_dict(state, strict=True)
    assert not torch.equal(fresh(ids), model(ids))


# ------------------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------------------

MODEL = """
    BLOCK_ORDER=0,1,2,1,2 LOOP_START_FRAC=0.4 MLP_HIDDEN=96 STAR_RELU=1 SKIP_GATES=1 PHASE_RESID_MIX=1
    OVERTONE_INIT=1 POS_CONDITIONAL_BIGRAM=1 WORD_START_BOOST=1 NUM_MEMORY_TOKENS=2 NUM_KV_HEADS=4
    MTP_NUM_HEADS=2 ZLOSS_WEIGHT=0.0001 DECODER_LR_MULT=2 EMA_ENABLED=0
"""
TRAINING = """
    LATE_QAT=1 QAT_THRESHOLD=0.8 PRUNE_FRAC=0.05 CAUTIOUS_MUON=1 WARMDOWN_SHAPE=cosine EMA_UPDATE_EVERY=2
    SWA_ENABLED=1 SWA_EVERY=2 SWA_START_FRAC=0.9 BIGRAM_HASH=linear
"""


@pytest.mark.parametrize("text", [MODEL, TRAINING], ids=["model", "training"])
def test_a_whole_run_with_many_levers(smoke_env, tmp_path, text):
    """Eight steps of the smoke recipe, scored on a thousand tokens; exit code 0 is asserted on the way."""
    tokens = np.array(train_gpt.open_shard(smoke_env["DATA_PATH"] + "/fineweb_val_000000.bin"))[:1000]
    (tmp_path / "val.bin").write_bytes(shard_header(len(tokens)) + tokens.tobytes())
    short = {"ITERATIONS": "8", "VAL_LOSS_EVERY": "8", "VAL_FILES": str(tmp_path / "val.bin")}
    settings = dict(word.split("=") for word in text.split())
    folder = train_here({**smoke_env, **short, **settings}, tmp_path)
    result, log = json.loads((folder / "result.json").read_text()), (folder / "train.log").read_text()
    scores = [
        result[f"{what}_{kind}"] for what in ("val_loss", "val_bpb") for kind in ("roundtrip", "sliding")
    ]
    assert result["steps"] == 8 and all(map(math.isfinite, scores))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert len(losses) == 8 and losses[-1] < losses[0]
    live = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    assert scores[0] == pytest.approx(live, abs=0.5 if "SWA" in text else 0.01)  # that of the artifact
    assert ("depth_recurrence:on step:5" in log) == ("LOOP" in text) and ("average: swa of" in log) == (
        "SWA" in text
    )
    pieces = SentencePieceProcessor(model_file=smoke_env["TOKENIZER_PATH"])
    word_start = np.array([pieces.id_to_piece(i).startswith("\u2581") for i in range(1024)])
    table, plan = (
        train_gpt.load_byte_table(smoke_env["TOKENIZER_PATH"], 1024),
        train_gpt.sliding_windows(1000, 64, 64),
    )
    for given in (word_start, ~word_start):
        model = train_gpt.load_model(
            train_gpt.read_artifact(folder / "final_model.int6.ptz"), CPU, word_start=given
        )
        scores.append(train_gpt.score(model, tokens, [train_gpt.Chunk(plan)], table, 64).val_loss)
    assert scores[4] == pytest.approx(scores[0], abs=1e-6)
    assert (abs(scores[5] - scores[0]) > 1e-4) == ("WORD_START" in text)
