"""The frontier's levers (#1855 and the public training improvements) against formulas written from their
specification in numpy; causality, the cache, ranks, checkpoints."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import frontier_oracle as oracle
import numpy as np
import pytest
import torch
from formats import shard_header
from test_bytes import train_tokenizer  # noqa: F401
from test_model import random_ids, random_model

import eval_ttt
import train_gpt
from train_gpt import BOS_ID, GPT, Cache, Config

TINY = Config(
    vocab_size=20, num_layers=5, model_dim=16, num_heads=4, num_kv_heads=2, mlp_mult=1.5, logit_softcap=5.0,
    rope_dims=2, rope_base=50.0, rope_ntk_len=0, train_seq_len=12, xsa_last_n=5, bigram_vocab_size=0,
    ve_enabled=False, smear_gate=False,
)  # fmt: skip
LOOP = dict(block_order="0,1,2,1,2,1,2,3,4", skip_gates=True)
LEVERS = {
    "nothing": {},
    "loop": LOOP,
    "shared loop": LOOP | dict(loop_shared=True),
    "smear": dict(smear_gate=True, smear_inputs=6),
    "gate": dict(attn_gate=5, attn_gate_scale=0.7),
    "lanes": dict(parallel_start_layer=3),
    "lanes, ungated skips": dict(parallel_start_layer=3, skip_gates=False),
    "lanes without skips": dict(parallel_start_layer=4, unet_skips=False),
    "key offset": dict(key_offset=2),
    "learned XSA": dict(xsa_learned=True, xsa_last_n=3),
    "documents": dict(doc_borders="attention", key_offset=3, smear_gate=True, smear_inputs=4),
}
ALL = LOOP | dict(loop_shared=True, smear_gate=True, smear_inputs=6, attn_gate=5, parallel_start_layer=3,
                  key_offset=3, xsa_learned=True, doc_borders="attention")  # fmt: skip
LEVERS["all"] = ALL


def numpy_state(model: GPT) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def documents(rows: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Token ids with documents that begin in the middle."""
    ids = random_ids(rows, length, seed, TINY.vocab_size)
    ids[:, 0], ids[0, 4], ids[1, 7:9] = BOS_ID, BOS_ID, BOS_ID
    return ids


# ------------------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looped", [True, False])
@pytest.mark.parametrize("changes", LEVERS.values(), ids=LEVERS)
def test_logits_are_those_of_the_specification(changes, looped):
    c = replace(TINY, **changes)
    assert not train_gpt.inconsistencies(c)
    model, ids = random_model(c), documents()
    model.looped = looped
    expected = oracle.forward(numpy_state(model), c, ids.numpy(), looped)
    assert np.abs(model(ids).detach().numpy() - expected).max() < 1e-9


def test_the_published_count_of_parameters():
    c = Config(
        vocab_size=8192, mlp_mult=4, bigram_vocab_size=0, ve_enabled=False, skip_gates=True,
        block_order="0,1,2,3,4,5,3,4,5,3,4,5,6,7,8,9,10", loop_shared=True, smear_inputs=12, attn_gate=12,
        parallel_start_layer=8,
    )  # fmt: skip
    with torch.device("meta"):
        assert train_gpt.count_parameters(GPT(c)) == 35_945_671


def test_gradients_by_finite_differences():
    c = replace(TINY, **ALL)
    model, ids, targets = random_model(c), documents(), random_ids(2, 11, 5, TINY.vocab_size)
    train_gpt.nll(model(ids), targets).mean().backward()
    state = numpy_state(model)
    names = ("blocks.2.attn_scale blocks.1.mlp_scale blocks.2.resid_mix blocks.3.attn.attn_gate_w "
             "blocks.1.attn.xsa_alpha blocks.2.attn.q_gain smear_gate.weight smear_lambda skip_weights "
             "skip_gates parallel_post_lambdas parallel_resid_lambdas").split()  # fmt: skip
    rng = np.random.default_rng(0)

    def loss(name, values):
        logits = oracle.forward(state | {name: values}, c, ids.numpy())
        lse = np.log(np.exp(logits).sum(-1))
        return (lse - np.take_along_axis(logits, targets.numpy()[..., None], -1)[..., 0]).mean()

    for name in names:
        some = rng.choice(state[name].size, min(3, state[name].size), replace=False)
        expected = oracle.gradient(lambda x, name=name: loss(name, x), state[name], indices=some)
        found = model.get_parameter(name).grad.numpy().flatten()[some]
        assert np.allclose(found, np.ravel(expected)[-len(some):] if np.size(expected) == len(some)
                           else np.ravel(expected)[some], atol=1e-7), name  # fmt: skip


def test_initial_levers_change_little():
    """Gates begin half open, or closed for smear; XSA begins near the whole."""
    plain, model = (GPT(replace(TINY, **changes)).double() for changes in ({}, dict(attn_gate=5)))
    plain.init_weights(0), model.init_weights(0)
    with torch.no_grad():
        plain.qo_bank[5:].normal_(generator=torch.Generator().manual_seed(1))
        model.qo_bank.copy_(plain.qo_bank)
        model.qo_bank[5:] *= 2
    assert torch.allclose(plain(documents()), model(documents()), atol=1e-12)
    smear = GPT(replace(TINY, smear_gate=True, smear_inputs=6)).double().init_weights(0)
    smear.load_state_dict(smear.state_dict() | plain.state_dict())
    assert torch.equal(smear(documents()), plain(documents()))


@pytest.mark.parametrize("changes", LEVERS.values(), ids=LEVERS)
def test_logits_do_not_depend_on_what_follows(changes):
    model, ids = random_model(replace(TINY, **changes)), documents()
    other = ids.clone()
    other[:, 6:] = random_ids(2, 5, 9, TINY.vocab_size)
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before, after)


@pytest.mark.parametrize("changes", [LEVERS["key offset"], LEVERS["shared loop"], ALL], ids=str)
def test_the_cache_gives_the_logits_of_the_whole(changes):
    model, ids = random_model(replace(TINY, **changes)), documents()
    cache, parts = Cache(), []
    for begin, end in ((0, 1), (1, 4), (4, 5), (5, 11)):
        parts.append(model.head(model.stream(ids[:, begin:end], cache=cache)))
    assert torch.allclose(torch.cat(parts, 1), model(ids), atol=1e-12)


def test_positions_choose_among_the_logits_of_lanes():
    model, ids = random_model(replace(TINY, **ALL)), documents()
    positions = torch.tensor([[3, 7], [0, 10]])
    expected = model(ids).gather(1, positions.unsqueeze(-1).expand(-1, -1, TINY.vocab_size))
    assert torch.allclose(model(ids, positions=positions), expected, atol=1e-12)


OF_LEVERS = [
    "blocks.2.attn.attn_gate_w",
    "blocks.1.attn.xsa_alpha",
    "blocks.2.attn_scale",
    "skip_gates",
    "smear_gate.weight",
    "smear_lambda",
    "parallel_post_lambdas",
    "parallel_resid_lambdas",
]


@pytest.mark.parametrize("name", OF_LEVERS)
def test_weights_of_each_document(name):
    """A model whose parameter differs between rows gives each row the logits of its own model."""
    model, ids = random_model(replace(TINY, **ALL)), documents()
    fast = train_gpt.FastWeights(model, replace(model.config, ttt_optimizer="sgd"), name, sets=2)
    fast.values = {name: value.double() for name, value in fast.values.items()}
    fast.values[name][1] += 0.3
    replaced, _ = fast.weights(fast.used())
    together = torch.func.functional_call(model, replaced, (ids,))
    for row in (0, 1):
        alone = torch.func.functional_call(model, {name: fast.values[name][row]}, (ids[row : row + 1],))
        assert torch.allclose(together[row], alone[0], atol=1e-6)
    assert not torch.allclose(together[1], model(ids)[1], atol=1e-3)


def test_signs_of_bigrams():
    c = replace(TINY, bigram_vocab_size=7, bigram_dim=6, bigram_signs=True)
    model, ids = random_model(c), documents()
    signs = model.bigram_signs
    assert signs.shape == (8192, 6) and set(signs.unique().tolist()) == {-1, 1} and abs(signs.mean()) < 0.02
    assert "bigram_signs" not in model.state_dict() and torch.equal(
        signs, random_model(c, seed=3).bigram_signs
    )
    first = model.without_predecessor(ids)
    rows = train_gpt.bigram_rows(c, ids, first, None)
    table, proj = model.bigram.embed.weight, model.bigram.proj.weight
    x = model.tok_emb.weight[ids].clone()
    for b in range(2):
        for t in range(ids.size(1)):
            pair = 0 if first[b, t] else int(ids[b, t - 1]) ^ int(ids[b, t])
            x[b, t] += model.bigram.scale * (proj @ (table[rows[b, t]] * signs[pair]))
    assert torch.allclose(model.embed(ids), train_gpt.rms_norm(x), atol=1e-12)


@pytest.mark.parametrize("changes, words", [
    (dict(loop_shared=True), "LOOP_SHARED needs a BLOCK_ORDER"),
    (dict(parallel_start_layer=5), "PARALLEL_START_LAYER=5"),
    (dict(parallel_start_layer=3, block_order="0,1,2,3,4,2"), "PARALLEL_START_LAYER=3"),
    (dict(key_offset=1), "KEY_OFFSET=1"), (dict(key_offset=4), "KEY_OFFSET=4"),
    (dict(attn_gate=17), "ATTN_GATE=17"), (dict(smear_inputs=4), "SMEAR_INPUTS needs SMEAR_GATE"),
    (dict(bigram_signs=True), "BIGRAM_SIGNS needs"), (dict(xsa_learned=True, xsa_last_n=0), "XSA_LEARNED"),
    (dict(mtp_weights="0.5,x"), "MTP_WEIGHTS"),
    (dict(ttt_chunk_by_length="9:8", ttt_mode="all"), "by documents"),
    (dict(data_order="packed", doc_borders="attention", train_batch_tokens=4), "is less than TRAIN_SEQ_LEN"),
    (dict(data_order="packed", train_seq_schedule="0:0.5"), "TRAIN_SEQ_SCHEDULE=0:0.5"),
    (dict(data_order="packed", train_seq_schedule="8:0.5,"), "TRAIN_SEQ_SCHEDULE=8:0.5,"),
    (dict(meta_sgd_enabled=True, ttt_lora_form="parallel"), "META_SGD_ENABLED"),
    (dict(parallel_start_layer=3, block_order="0,1,4,3,2,0,1,2,3,4", loop_start_frac=0.3), "PARALLEL_START"),
    (dict(muon_coeffs="polar", muon_backend_steps=6), "Polar"),
    (dict(ema_export_share=0.5, ema_enabled=False), "EMA_EXPORT_SHARE"),
], ids=str)  # fmt: skip
def test_contradictions(changes, words):
    assert any(words in text for text in train_gpt.inconsistencies(replace(TINY, **changes)))


# ------------------------------------------------------------------------------------------------------------
# Muon
# ------------------------------------------------------------------------------------------------------------


def muon_of(bank: torch.Tensor, steps: int = 1, lr: float = 0.1, decay: float = 0.0, **changes) -> list:
    """Gradients that were drawn, and the bank after each step."""
    p = torch.nn.Parameter(bank.clone())
    muon = train_gpt.Muon([dict(params=[p], lr=lr, weight_decay=decay, momentum=0.9)], Config(**changes),
                          torch.float64, {})  # fmt: skip
    generator, found = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        p.grad = torch.randn(bank.shape, generator=generator, dtype=torch.float64)
        gradient = p.grad.clone()
        muon.step()
        found.append((gradient, p.detach().clone()))
    return found


BANK = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("coeffs", ["quintic", "polar"])
@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize("beta2", [0.0, 0.95])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
def test_updates_are_those_of_the_specification(coeffs, row_norm, beta2, wide, cautious):
    bank = BANK.mT.contiguous() if wide else BANK
    found = muon_of(bank, 3, decay=0.5, muon_coeffs=coeffs, muon_row_norm=row_norm, normuon_beta2=beta2,
                    muon_cautious_wd=cautious)  # fmt: skip
    table = oracle.POLAR_EXPRESS if coeffs == "polar" else oracle.QUINTIC
    for row in (0, 1):
        p, buffer, s = bank[row].numpy(), np.zeros(bank.shape[1:]), 0.0
        s = np.zeros(bank.shape[1]) if not wide else np.zeros(bank.shape[2])
        for gradient, after in found:
            update, buffer = oracle.muon_update(gradient[row].numpy(), buffer, 0.9, row_norm, table)
            if beta2:
                update, s = oracle.normuon(update, s, beta2)
            update = update * math.sqrt(max(1, bank.shape[1] / bank.shape[2]))
            p = oracle.cautious_decay(p, update, 0.1, 0.5) if cautious else p * (1 - 0.1 * 0.5) - 0.1 * update
            assert np.abs(after[row].numpy() - p).max() < 1e-6


def test_the_range_of_polar_express():
    """Singular values from 0.001 to 1 of the norm come to 0.859 to 1.141, in exact arithmetic."""
    u, v = (torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q for _ in range(2))
    values = torch.logspace(-2.9, 0, 9, dtype=torch.float64)
    matrix = u @ torch.diag(values) @ v
    found = train_gpt.zeropower_via_newtonschulz5(matrix, train_gpt.POLAR_EXPRESS, dtype=torch.float64)
    assert torch.all((torch.linalg.svdvals(found) > 0.8588) & (torch.linalg.svdvals(found) < 1.1412))
    assert torch.equal(
        train_gpt.zeropower_via_newtonschulz5(0 * matrix, train_gpt.POLAR_EXPRESS), 0 * matrix.bfloat16()
    )


def test_decay_and_schedule_of_1855():
    levers = ALL | dict(block_order="", loop_shared=False, bigram_vocab_size=9)
    rates = dict(muon_wd=0.095, embed_wd=0.085, scalar_wd=0.02, adam_wd=0.3)
    schedule = dict(min_lr=0.1, min_lr_shape="floor", warmdown_frac=0.85, iterations=1000)
    c = replace(TINY, **levers, **rates, **schedule)
    scales = [train_gpt.lr_scale(c, round(1000 * done), 0.0, 0.0) for done in (0, 0.15, 0.5, 0.915, 1)]
    assert scales == pytest.approx([1, 1, 0.5 / 0.85, 0.1, 0.1])
    model = GPT(c)
    groups = [group for optimizer in train_gpt.make_optimizers(model, c) for group in optimizer.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = {"tok_emb.weight": 0.085, "bigram.embed.weight": 0.085, "bigram.proj.weight": 0.3}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.095 if name.endswith("_bank") else named.get(name, 0.02)), name


# ------------------------------------------------------------------------------------------------------------
# Averages
# ------------------------------------------------------------------------------------------------------------


def test_movement_drives_the_weights():
    """A quadratic, against the specification's steps by hand; inactive at both ends of the run."""
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    c = Config(ema_nesterov_beta=0.6)
    start, nesterov = model.p.detach().numpy().astype(np.float64), train_gpt.EMANesterov(model, c)
    curvature, scales = np.array([0.3, 1.0, 2.0]), [1.0, 1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2]
    found = []
    for number, scale in enumerate(scales):
        nesterov.move(number / len(scales))
        with torch.no_grad():
            model.p -= 0.2 * scale * torch.tensor(curvature, dtype=torch.float32) * model.p
        nesterov.observe(scale)
        found.append(model.p.detach().clone().numpy())
    steps = [lambda x, scale=scale: x - 0.2 * scale * curvature * x for scale in scales]

    def beta(number):
        return 0.6 * scales[number - 1] if 0.16 <= number / len(scales) < 0.76 else 0.0

    for ours, theirs in zip(found, oracle.ema_nesterov(start, steps, beta, 0.99), strict=True):
        assert np.abs(ours - theirs).max() < 1e-6
    again = train_gpt.EMANesterov(model, c)
    again.load_state_dict(nesterov.state_dict())
    assert torch.equal(again.movement[0], nesterov.movement[0]) and again.scale == 0.2


def test_a_share_of_the_average_is_exported():
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.zeros(3))
    average = train_gpt.WeightAverage(model, Config(ema_decay=0.5, ema_export_share=0.6))
    with torch.no_grad():
        model.p += 1
    average.update(1, 1.0)
    average.apply()
    assert torch.allclose(model.p, torch.full((3,), 0.4 * 1 + 0.6 * 0.5))


# ------------------------------------------------------------------------------------------------------------
# Further targets
# ------------------------------------------------------------------------------------------------------------


def test_further_targets():
    """Against cross-entropies by loops: prefixes, and targets that follow in the same document."""
    c = replace(TINY, prefix_loss_weight=0.25, mtp_weights="0.5,0.2")
    model, ids = random_model(c), documents(2, 12)
    prefixes = torch.tensor([-1 if i % 3 else i // 2 for i in range(c.vocab_size)])
    model.prefixes.copy_(prefixes)
    model.loss_weights.copy_(torch.tensor([0.25, 0.5, 0.2]))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    log_p = model(inputs).log_softmax(-1)
    total = 0.0
    for b in range(2):
        for t in range(11):
            y = targets[b]
            total -= log_p[b, t, y[t]]
            if prefixes[y[t]] >= 0:
                total -= 0.25 * log_p[b, t, prefixes[y[t]]]
            for k, weight in ((1, 0.5), (2, 0.2)):
                if t + k < 11 and BOS_ID not in y[t : t + k]:
                    total -= weight * log_p[b, t, y[t + k]]
    assert float(train_gpt.training_loss(model, inputs, targets)) == pytest.approx(
        float(total) / 22, abs=1e-6
    )
    model.loss_weights.zero_()
    plain = random_model(TINY)
    assert float(train_gpt.training_loss(model, inputs, targets)) == float(
        train_gpt.training_loss(plain, inputs, targets)
    )


def test_weights_of_further_targets_fall_part_by_part():
    c = Config(prefix_loss_weight=0.25, mtp_weights="0.5,0.25")
    found = [train_gpt.loss_weights(c, done) for done in (0, 1 / 6, 1 / 3, 0.5, 2 / 3, 0.9)]
    expected = [(0.25, 0.5, 0.25), (0.25, 0.5, 0.125), (0.25, 0.5, 0), (0.125, 0.25, 0), (0, 0, 0), (0, 0, 0)]
    assert np.allclose(found, expected)


def test_prefixes_of_a_tokenizer(train_tokenizer):  # noqa: F811
    sp, path = train_tokenizer(byte_fallback=True)
    texts = []
    for i in range(sp.vocab_size()):
        piece = sp.id_to_piece(i)
        special = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        texts.append(b"" if special else bytes([int(piece[1:-1], 16)]) if sp.is_byte(i)
                     else piece.replace("\u2581", " ").encode())  # fmt: skip
    assert train_gpt.prefix_tokens(path).tolist() == oracle.prefix_table(texts)
    assert (train_gpt.prefix_tokens(path) >= 0).sum() > 20


# ------------------------------------------------------------------------------------------------------------
# Adapters of #1855
# ------------------------------------------------------------------------------------------------------------

PARALLEL = dict(ttt_lora_form="parallel", ttt_lora_rank=3, ttt_lora_alpha=4.5, ttt_mode="doc_lora")


@pytest.mark.parametrize(
    "matrices, count", [("qkvomh", 6_963_200), ("komh", 4_526_080), ("qvomh", 5_918_720)]
)
def test_the_published_count_of_adapters(matrices, count):
    order = "0,1,2,3,4,5,3,4,5,3,4,5,6,7,8,9,10"
    c = Config(vocab_size=8192, block_order=order, ttt_matrices=matrices, **PARALLEL | dict(ttt_lora_rank=80))
    shapes = train_gpt.adapter_shapes(c).values()
    assert sum(n * 80 * (out + width) for n, out, width in shapes) == count


def adapted_by_hand(model: GPT, ids: torch.Tensor, pairs: dict, s: float) -> torch.Tensor:
    """Logits of a model without skips; the adapters stand where #1855 has them, beside W_O and the MLP."""
    plain = model.block_weights(model.weights(), {}, None)
    x0 = x = model.embed(ids)
    context = model.attention_context(ids, x)
    d, kv, cap = model.config.model_dim, model.config.kv_dim, model.config.logit_softcap

    def low_rank(name, depth, h, out):
        if name not in pairs:
            return h.new_zeros(*h.shape[:-1], out)
        return s * (h @ pairs[name][0][depth].T) @ pairs[name][1][depth].T

    for depth, block in enumerate(model.used_blocks()):
        x = block.mix(x, x0)
        h, matrices = train_gpt.rms_norm(x, block.norm_scale), plain[depth].matrices
        added = torch.cat(
            [low_rank(name, depth, h, out) for name, out in (("q", d), ("k", kv), ("v", kv))], -1
        )
        given = SimpleNamespace(product=lambda name, y, qkv=h @ matrices["qkv"].T + added, o=matrices["o"]:
                                qkv if name == "qkv" else y @ o.T)  # fmt: skip
        x = x + block.attn(h, given, context, None) + block.attn_scale * low_rank("o", depth, h, d)
        h = train_gpt.rms_norm(x, block.norm_scale)
        hidden = torch.nn.functional.leaky_relu(h @ matrices["up"].T, block.slope).square()
        x = x + hidden @ matrices["down"].T + block.mlp_scale * low_rank("mlp", depth, h, d)
    h = train_gpt.rms_norm(x)
    return cap * torch.tanh(
        (h @ model.tok_emb.weight.T + low_rank("head", 0, h, model.config.vocab_size)) / cap
    )


@pytest.mark.parametrize("matrices", ["qkvomh", "komh", "vh", "o", "m", "h"])
def test_parallel_adapters(matrices):
    changes = LOOP | dict(loop_shared=True, unet_skips=False, skip_gates=False, **PARALLEL)
    c = replace(TINY, **changes, ttt_matrices=matrices)
    model, ids = random_model(c), documents()
    fast = train_gpt.FastWeights(model, c, "adapters", sets=2)
    assert {name[0] for name in fast.values} == set(matrices)
    replaced, adapters = fast.weights({name: value.double() for name, value in fast.used().items()})
    assert not replaced and torch.equal(model(ids, adapters=adapters), model(ids))  # B is zero
    generator = torch.Generator().manual_seed(0)
    fast.values = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
                   for name, value in fast.values.items()}  # fmt: skip
    _, adapters = fast.weights(fast.used())
    names = {name.split(".")[0] for name in fast.values}
    for row in (0, 1):
        pairs = {name: [fast.values[f"{name}.{side}"][row] for side in "ab"] for name in names}
        expected = adapted_by_hand(model, ids[row : row + 1], pairs, 1.5)[0]
        assert torch.allclose(model(ids, adapters=adapters)[row], expected, atol=1e-9)


def test_frozen_blocks_of_parallel_adapters():
    c = replace(TINY, **LOOP | PARALLEL, ttt_freeze_blocks=2)
    fast = train_gpt.FastWeights(random_model(c), c, "adapters", sets=2)
    assert fast.rates["q.a"].flatten().tolist() == [0, 0, 1, 0, 1, 0, 1, 1, 1]
    assert fast.rates["head.b"].flatten().tolist() == [1]


# ------------------------------------------------------------------------------------------------------------
# Rounding of #1855
# ------------------------------------------------------------------------------------------------------------

ROUNDING = dict(quant_steps="sigmas", attn_clip_sigmas=13.0, mlp_clip_sigmas=11.5, embed_bits=7,
                embed_clip_sigmas=14.0, gptq_embed=True)  # fmt: skip


def test_the_hessian_of_the_head():
    model, ids = random_model(replace(TINY, gptq_embed=True), torch.float32), documents()
    found = train_gpt.collect_hessians(model, [ids[:1], ids[1:]])
    read = train_gpt.rms_norm(model.stream(ids)).flatten(0, 1)
    assert torch.allclose(found["head"][0], read.T @ read / ids.numel(), atol=1e-5)
    assert "head" not in train_gpt.collect_hessians(random_model(TINY, torch.float32), [ids])


@pytest.mark.parametrize("tied", [True, False])
def test_scales_and_codes_by_kind(tied):
    c = replace(TINY, **ROUNDING, attn_gate=5, smear_gate=True, smear_inputs=6, tie_embeddings=tied)
    model, ids = random_model(c, torch.float32), random_ids(8, 12, 1, TINY.vocab_size)
    statistics = train_gpt.Statistics(train_gpt.collect_hessians(model, [ids]))
    state, head = model.state_dict(), "tok_emb.weight" if tied else "lm_head.weight"
    found = {t.name: t for t in train_gpt.quantize_state_dict(state, statistics, c)}
    kinds = dict(qo_bank=(13.0, 31), kv_bank=(13.0, 31), mlp_up_bank=(11.5, 31), mlp_down_bank=(11.5, 31))
    for name, (sigmas, largest) in (kinds | {head: (14.0, 63)}).items():
        expected = state[name].std(-1, keepdim=True) * sigmas / largest
        ratio = train_gpt.decode_scale(found[name].row_scale) / expected
        assert (ratio.log2().abs() <= 1 / 16 + 1e-6).all() and found[name].codes.abs().max() <= largest, name
    assert found["blocks.0.attn.attn_gate_w"].codes.abs().max() > 110
    assert found["smear_gate.weight"].row_scale is None

    def error(tensor: train_gpt.QuantizedTensor) -> float:
        """Squared error of the logits, summed over the vocabulary."""
        wrong = train_gpt.dequantize(tensor) - state[head]
        return float(torch.einsum("vi,ij,vj->", wrong, statistics.hessians["head"][0], wrong))

    nearest = {t.name: t for t in train_gpt.quantize_state_dict(state, train_gpt.Statistics(), c)}
    assert error(found[head]) < 0.95 * error(nearest[head])


# ------------------------------------------------------------------------------------------------------------
# Packed rows
# ------------------------------------------------------------------------------------------------------------

PACKED = dict(data_order="packed", doc_borders="attention", train_batch_tokens=8 * 40, grad_accum_total=4)


def segments(ids: list[int], cut: int) -> list[tuple[int, int]]:
    """Pieces of documents in a row: from each BOS and from the row's start, at most `cut` tokens long."""
    borders = sorted({0, *(t for t, token in enumerate(ids) if token == BOS_ID), len(ids)})
    return [(a, min(a + cut, end)) for begin, end in pairwise(borders) for a in range(begin, end, cut)]


@pytest.mark.parametrize("changes", [{}, LOOP, dict(attn_gate=5, parallel_start_layer=3)], ids=str)
def test_attention_stays_within_the_pieces_of_a_row(changes):
    """Each piece on its own, one after the other, gives the losses of the packed row."""
    c = replace(TINY, **PACKED | changes)
    model, rng = random_model(c), np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(2, TINY.vocab_size, (2, 40)))
    ids[0, [3, 4, 30]], ids[1, [0, 15]] = BOS_ID, BOS_ID
    packed = model(ids, piece=model.piece)
    whole, lengths = model(ids), set()
    for row in (0, 1):
        for a, b in segments(ids[row].tolist(), c.train_seq_len):
            lengths.add(b - a)
            assert torch.allclose(packed[row, a:b], model(ids[row : row + 1, a:b])[0], atol=1e-9)
    assert 12 in lengths and 1 in lengths and not torch.allclose(packed, whole)
    targets = torch.from_numpy(rng.integers(2, TINY.vocab_size, (2, 40)))
    expected = train_gpt.nll(packed, targets).mean()
    assert torch.allclose(train_gpt.training_loss(model, ids, targets), expected, atol=1e-6)


def test_the_schedule_of_pieces():
    """#2014: 1,024 to a tenth of the run, 2,048 to seven, then 3,072; 32 steps of warm-up after a change."""
    c = Config(data_order="packed", train_seq_schedule="1024:.1,2048:0.7", train_seq_len=3072,
               seq_change_warmup_steps=32)  # fmt: skip
    model = SimpleNamespace(piece=torch.tensor(0))
    schedule, found = train_gpt.PieceSchedule(model, c), []
    for step in range(1000):
        factor = schedule.begin_step(step, step / 1000)
        found.append((int(model.piece), factor))
        if step == 110:
            again = train_gpt.PieceSchedule(model, c)
            again.load_state_dict(schedule.state_dict())
            schedule = again
    assert [found[step] for step in (0, 100, 101, 116, 132, 700)] == [
        (1024, 1), (1024, 1), (2048, 1 / 32), (2048, 16 / 32), (2048, 1), (2048, 1)]  # fmt: skip
    assert found[701] == (3072, 1 / 32) and found[-1] == (3072, 1)


class PackedStream:
    """Shards of 1,000, 700 and 90 tokens; the first document of each begins at 5, 0 and 3."""

    runs = np.array([[5, 1000], [1000, 1700], [1703, 1790]])

    def __len__(self) -> int:
        return 1790


def test_packed_rows_lie_side_by_side_within_shards():
    """A step of 328 tokens: three in the first shard, two in the second, none in the third; then again."""
    runs, row = PackedStream.runs, 41
    found = train_gpt.packed_starts(runs, 40, np.arange(6 * 8)).reshape(6, 8)
    firsts = [5, 5 + 328, 5 + 2 * 328, 1000, 1000 + 328, 5]
    assert found.tolist() == [[first + row * r for r in range(8)] for first in firsts]
    with pytest.raises(train_gpt.UserError, match="3208"):
        train_gpt.packed_starts(runs, 400, np.arange(1))


def test_the_runs_of_shards(tmp_path):
    shards = ([7, 7, 1, 8, 9], [1, 5], [4, 4])
    for number, tokens in enumerate(shards):
        blob = shard_header(len(tokens)) + np.array(tokens, "<u2").tobytes()
        (tmp_path / f"fineweb_train_{number:06d}.bin").write_bytes(blob)
    stream = train_gpt.TokenStream(f"{tmp_path}/fineweb_train_*.bin", 20)
    assert stream.runs.tolist() == [[2, 5], [5, 7], [9, 9]]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_share_the_rows_of_a_step(ranks, monkeypatch):
    c, stream = replace(TINY, **PACKED), PackedStream()
    whole = train_gpt.sequence_starts(c, stream, 8, 8).tolist()
    monkeypatch.setattr(train_gpt, "world_size", lambda: ranks)
    rows, parts = train_gpt.split_batch(c)
    assert rows == 8 // ranks and rows % parts == 0
    shared = [train_gpt.sequence_starts(c, stream, 8 + rank * rows, rows).tolist() for rank in range(ranks)]
    assert [start for part in shared for start in part] == whole


def test_a_packed_run_with_every_lever(smoke_env, tmp_path, monkeypatch):
    """Trained, exported, scored, stopped and resumed; then adapted as #1855 does."""
    monkeypatch.chdir(tmp_path)
    text = np.fromfile(f"{smoke_env['DATA_PATH']}/fineweb_val_000000.bin", "<u2", 3000, offset=1024)
    (tmp_path / "fineweb_val_000000.bin").write_bytes(shard_header(3000) + text.tobytes())
    model = """NUM_LAYERS=4 BLOCK_ORDER=0,1,2,1,2,3 LOOP_SHARED=1 SKIP_GATES=1 SMEAR_INPUTS=12 ATTN_GATE=12
        PARALLEL_START_LAYER=3 XSA_LEARNED=1 BIGRAM_SIGNS=1 VE_ENABLED=0 DOC_BORDERS=attention"""
    training = """DATA_ORDER=packed TRAIN_BATCH_TOKENS=2048 GRAD_ACCUM_TOTAL=2 ITERATIONS=6
        LOOP_START_FRAC=0.3 TRAIN_SEQ_SCHEDULE=32:0.5 SEQ_CHANGE_WARMUP_STEPS=2
        MUON_ROW_NORM=1 MUON_COEFFS=polar NORMUON_BETA2=0.95 MUON_CAUTIOUS_WD=1 EMA_NESTEROV_BETA=0.3
        MTP_WEIGHTS=0.5 PREFIX_LOSS_WEIGHT=0.25 WARMUP_STEPS=0 VAL_LOSS_EVERY=0 EVAL_STRIDE=64"""
    rounding = """QUANT_STEPS=sigmas EMBED_BITS=7 GPTQ_EMBED=1 ATTN_CLIP_SIGMAS=13 MLP_CLIP_SIGMAS=11.5
        EMBED_CLIP_SIGMAS=14"""
    adaptation = """TTT_MODE=phased TTT_OPTIMIZER=adamw TTT_LORA_FORM=parallel TTT_MATRICES=komh
        TTT_LORA_RANK=4
        TTT_WARM_START_A=1 TTT_CHUNK_SIZE=64 TTT_CHUNK_BY_LENGTH=500:32 TTT_LR=1e-3 PHASED_TTT_PREFIX_DOCS=1
        PHASED_TTT_NUM_PHASES=1 TTT_LR_SCHEDULE=cosine GLOBAL_TTT_GRAD_CLIP=1"""
    words = f"{model} {training} {rounding} {adaptation} VAL_FILES={tmp_path}/fineweb_val_*.bin".split()
    env = smoke_env | dict(word.split("=") for word in words)
    assert train_gpt.main([], env) == 0
    result = json.loads((tmp_path / "runs/run/result.json").read_text())
    assert result["steps"] == 6 and result["val_loss_sliding"] < 8
    assert "depth_recurrence:on" in (tmp_path / "runs/run/train.log").read_text()
    assert eval_ttt.main([], env) == 0
    evaluated = json.loads((tmp_path / "runs/run/eval_ttt.json").read_text())
    assert evaluated["legal"] is True and evaluated["ttt_gain_bpb"] != 0
