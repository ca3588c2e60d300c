"""The model against an independent one of loops in float64;
causality, document borders, banks, adapters, names."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt
from train_gpt import GPT, Config, UserError

# Small, odd in every number, with every lever on; positions beyond ROPE_NTK_LEN and document borders occur.
SMALL = Config(
    vocab_size=40, num_layers=5, model_dim=24, num_heads=4, num_kv_heads=2, mlp_mult=1.5, logit_softcap=8.0,
    rope_dims=4, rope_base=100.0, rope_ntk_len=8, train_seq_len=16, xsa_last_n=3, bigram_vocab_size=13,
    bigram_dim=6, ve_dim=5, ve_layers="1,3", ttt_moments="prefix", ttt_prior_weight=1.0,
)  # fmt: skip


def random_model(config: Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> GPT:
    """A model with every parameter random (at initialisation the output matrices are zero,
    and hide what is wrong)."""
    model, generator = GPT(config, dtype).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, p.shape[-1] ** -0.5 if p.ndim > 2 else 1.0, generator=generator)
    return model if dtype == torch.float64 else model.float()


def random_ids(rows: int, length: int, seed: int = 0, vocab: int = 40) -> torch.Tensor:
    return torch.randint(2, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------
# The reference
# ------------------------------------------------------------------------------------------------------------


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def int32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def reference_rotate(x: np.ndarray, position: int, config: Config) -> np.ndarray:
    """One head at one position: pairs (i, i + r/2) turned by position * base^(-2i/r)."""
    r, out, base = config.rope_dims or len(x), x.copy(), config.rope_base
    if config.rope_ntk_len and config.train_seq_len > config.rope_ntk_len:
        base *= (config.train_seq_len / config.rope_ntk_len) ** (r / (r - 2))
    for i in range(r // 2):
        angle = position * base ** (-2 * i / r)
        a, b = x[i], x[i + r // 2]
        out[i], out[i + r // 2] = (
            a * np.cos(angle) + b * np.sin(angle),
            -a * np.sin(angle) + b * np.cos(angle),
        )
    return out


def reference_embedding(c: Config, p: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    borders, tokens = c.doc_borders == "respect", []
    for t, token in enumerate(ids):
        e = p["tok_emb.weight"][token]
        if c.bigram_vocab_size:
            bucket = buckets = c.bigram_vocab_size - 1
            if t > 0 and not (borders and token == 1):
                bucket = (int32(36313 * token) ^ int32(27191 * ids[t - 1])) % buckets
            e = e + p["bigram.scale"] * p["bigram.proj.weight"] @ p["bigram.embed.weight"][bucket]
        tokens.append(norm(e))
    if not c.smear_gate:
        return np.array(tokens)
    gate = 1 / (1 + np.exp(-p["smear.gate"]))
    alone = [t == 0 or (borders and token == 1) for t, token in enumerate(ids)]
    return np.array(
        [(1 - gate) * x + (0 if alone[t] else gate * tokens[t - 1]) for t, x in enumerate(tokens)]
    )


def reference_attention(c: Config, p: dict, layer: int, h: np.ndarray, value: np.ndarray) -> np.ndarray:
    """h (T, d) and the value embedding (T, K * D) -> (T, d), one query at a time."""
    L, D, T = c.num_layers, c.model_dim // c.num_heads, len(h)
    q, k, v = h @ p["qo_bank"][layer].T, h @ p["kv_bank"][layer].T, h @ p["kv_bank"][L + layer].T + value
    heads = np.zeros((T, c.num_heads, D))
    for head in range(c.num_heads):
        shared = head // (c.num_heads // c.num_kv_heads)
        part, shared = slice(head * D, head * D + D), slice(shared * D, shared * D + D)
        keys = [reference_rotate(norm(k[t, shared]), t, c) for t in range(T)]
        for t in range(T):
            query = reference_rotate(norm(q[t, part]), t, c) * p[f"blocks.{layer}.attn.q_gain"][head]
            weights = np.exp([query @ keys[s] / np.sqrt(D) for s in range(t + 1)])
            y = sum(w * v[s, shared] for s, w in enumerate(weights / weights.sum()))
            if layer >= L - c.xsa_last_n:
                own = v[t, shared] / np.linalg.norm(v[t, shared])
                y = y - (y @ own) * own
            heads[t, head] = y
    return heads.reshape(T, -1) @ p["qo_bank"][L + layer].T


def reference_logits(model: GPT, ids: list[int]) -> np.ndarray:
    """Logits (T, V) of one row, from the published formulas, in float64."""
    c, p = model.config, {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    x = x0 = reference_embedding(c, p, ids)
    encoder, value_layers = [], [int(n) for n in c.ve_layers.split(",")] if c.ve_enabled else []
    for layer in range(c.num_layers):
        if c.unet_skips and layer >= c.num_layers // 2 and encoder:
            x = x + p["skip_weights"][layer - c.num_layers // 2] * encoder.pop()
        if c.resid_mix:
            x = p[f"blocks.{layer}.resid_mix"][0] * x + p[f"blocks.{layer}.resid_mix"][1] * x0
        value = np.zeros(1)
        if layer in value_layers:
            scale = p[f"ve_layer_scales.{value_layers.index(layer)}"] * p["ve_shared.scale"]
            value = scale * p["ve_shared.embed.weight"][ids] @ p["ve_shared.proj.weight"].T
        factor = 1 / np.sqrt(layer + 1) if c.ln_scale else 1.0
        x = x + p[f"blocks.{layer}.attn_scale"] * reference_attention(c, p, layer, norm(x) * factor, value)
        u = norm(x) * factor @ p["mlp_up_bank"][layer].T
        u = np.where(u < 0, c.mlp_leaky_slope * u, u) ** 2
        x = x + p[f"blocks.{layer}.mlp_scale"] * (u @ p["mlp_down_bank"][layer].T)
        if layer < c.num_layers // 2:
            encoder.append(x)
    logits = norm(x) @ p["tok_emb.weight" if c.tie_embeddings else "lm_head.weight"].T
    return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


@pytest.fixture
def exact_rotary(monkeypatch):
    """Rotary tables in float64 (the trainer's are float32 at any dtype; they have a test of their own)."""

    def tables(length, dims, base, like):
        angles = torch.arange(length).double().outer(base ** (-torch.arange(0, dims, 2).double() / dims))
        return angles.cos().unsqueeze(1).to(like.dtype), angles.sin().unsqueeze(1).to(like.dtype)

    monkeypatch.setattr(train_gpt, "rotary_tables", tables)


VARIANTS = {
    "every lever": {},
    "published borders": dict(doc_borders="published"),
    "untied head": dict(tie_embeddings=False),
    "relu squared": dict(mlp_leaky_slope=0.0),
    "all dimensions rotated": dict(rope_dims=0),
    "a third of the dimensions rotated": dict(rope_dims=2, rope_ntk_len=0),
    "no stretch of the base": dict(rope_ntk_len=0),
    "even depth": dict(num_layers=4),
    "one layer": dict(num_layers=1, ve_layers="0"),
    "exclusive everywhere": dict(xsa_last_n=5),
    "not exclusive": dict(xsa_last_n=0),
    "no value embedding": dict(ve_enabled=False),
    "no skips": dict(unet_skips=False),
    "no mix": dict(resid_mix=False),
    "no norm scale": dict(ln_scale=False),
    "no smear": dict(smear_gate=False),
    "no bigram": dict(bigram_vocab_size=0),
    "no softcap": dict(logit_softcap=0.0),
    "one kv head": dict(num_kv_heads=1),
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_the_reference(changes, exact_rotary):
    model, ids = random_model(replace(SMALL, **changes)), random_ids(2, 11)
    ids[0, 4] = ids[0, 5] = ids[1, 0] = ids[1, 8] = train_gpt.BOS_ID
    logits = model(ids)
    assert logits.dtype == torch.float64
    for row, got in zip(ids.tolist(), logits.detach().numpy(), strict=True):
        np.testing.assert_allclose(got, reference_logits(model, row), rtol=0, atol=1e-9)


def test_each_variant_changes_the_logits():
    """The control of the test above: no lever is without effect on these weights."""
    ids = random_ids(1, 11)
    ids[0, 4] = train_gpt.BOS_ID
    rows = [
        reference_logits(random_model(replace(SMALL, **changes)), ids[0].tolist())
        for changes in VARIANTS.values()
    ]
    for i, row in enumerate(rows[1:], 1):
        assert abs(row - rows[0]).max() > 1e-3, list(VARIANTS)[i]


def test_every_parameter_matters():
    model = random_model(SMALL)
    model(random_ids(2, 12)).square().sum().backward()
    for name, p in model.named_parameters():
        gradient = p.grad.abs().flatten(1).amax(1) if name.endswith("_bank") else p.grad.abs().max()
        assert (gradient > 1e-6).all(), name


def test_the_hash_of_large_ids_wraps_at_32_bits():
    config = replace(SMALL, vocab_size=65536)
    model, ids = random_model(config), [60000, 65535, 59200, 2]
    assert 36313 * ids[0] > 2**31
    expected = reference_embedding(config, {k: v.numpy() for k, v in model.state_dict().items()}, ids)
    np.testing.assert_allclose(
        model.embed(torch.tensor([ids])).detach().numpy()[0], expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("base", [10000.0, 22081.8])
def test_rotary_tables(base):
    cos, sin = train_gpt.rotary_tables(2048, 16, base, torch.zeros((), dtype=torch.float64))
    angles = np.arange(2048)[:, None] * base ** (-np.arange(0, 16, 2) / 16)
    assert cos.shape == sin.shape == (2048, 1, 8)
    np.testing.assert_allclose(cos[:, 0], np.cos(angles), rtol=0, atol=2e-4)  # float32 angles up to 2047
    np.testing.assert_allclose(sin[:, 0], np.sin(angles), rtol=0, atol=2e-4)
    np.testing.assert_allclose(cos[:32, 0], np.cos(angles[:32]), rtol=0, atol=4e-6)


def test_rotary_base_of_the_published_models():
    assert train_gpt.rotary_base(Config()) == pytest.approx(22081.8, abs=0.05)
    assert train_gpt.rotary_base(replace(Config(), train_seq_len=1024)) == 10000
    assert train_gpt.rotary_base(replace(Config(), train_seq_len=512)) == 10000  # never squeezed
    assert train_gpt.rotary_base(replace(Config(), rope_ntk_len=0)) == 10000
    assert train_gpt.rotary_base(replace(Config(), rope_dims=0)) == pytest.approx(10000 * 2 ** (64 / 62))


def test_logits_do_not_depend_on_the_length_of_the_window():
    """The base of the frequencies is that of training on both sides of ROPE_NTK_LEN."""
    model, ids = random_model(SMALL), random_ids(1, 24)
    whole = model(ids)
    for length in (4, 8, 9, 16, 17):
        torch.testing.assert_close(model(ids[:, :length]), whole[:, :length], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_lower_precision_is_close_and_its_logits_are_float32(dtype, tolerance):
    model, exact, ids = random_model(SMALL, dtype), random_model(SMALL), random_ids(2, 12)
    logits = model(ids)
    assert logits.dtype == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    error = (logits.double() - exact(ids)).square().mean().sqrt()
    assert 0 < error < tolerance


def test_rows_longer_than_the_kept_angles():
    model, ids = random_model(SMALL), random_ids(1, 24)
    whole = model(ids)
    model.cos, model.sin = model.cos[:20], model.sin[:20]
    torch.testing.assert_close(model(ids), whole, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Causality and document borders
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, cuts", [(14, range(1, 14)), (600, (1, 31, 32, 64, 511, 512, 599))])
@pytest.mark.parametrize("borders", ["respect", "published", "attention"])
def test_no_logit_depends_on_a_later_token(length, cuts, borders):
    """Bit for bit: all tokens from the cut on are replaced,
    borders among them, and what is before must not move."""
    model = random_model(replace(SMALL, doc_borders=borders), torch.float32)
    ids, other = random_ids(2, length), random_ids(2, length, seed=1)
    ids[0, length // 2] = other[1, length // 3] = train_gpt.BOS_ID
    with torch.no_grad():
        before = model(ids)
        for cut in cuts:
            changed = torch.cat((ids[:, :cut], other[:, cut:]), dim=1)
            changed[:, cut] = torch.where(
                changed[:, cut] == ids[:, cut], ids[:, cut] % 38 + 2, changed[:, cut]
            )
            after = model(changed)
            assert torch.equal(before[:, :cut], after[:, :cut]), cut
            assert (before[:, cut] != after[:, cut]).any(-1).all(), cut


def test_a_document_of_a_row_is_read_as_if_it_stood_alone():
    """DOC_BORDERS=attention, in float64:
    rotary positions only count by their differences, which stay the same."""
    model = random_model(replace(SMALL, doc_borders="attention"))
    across = GPT(replace(model.config, doc_borders="respect"), torch.float64).double()
    across.load_state_dict(model.state_dict())
    ids, sizes = random_ids(2, 23), (4, 1, 7, 11)
    for start in np.cumsum((0, *sizes))[:-1]:
        ids[0, start] = train_gpt.BOS_ID
    ids[1, 9] = train_gpt.BOS_ID  # and what stands before the first border is a document too
    for row, parts in ((0, sizes), (1, (9, 14))):
        whole, other = model(ids[row : row + 1])[0].split(parts), across(ids[row : row + 1])[0].split(parts)
        for number, part in enumerate(ids[row].split(parts)):
            alone = model(part[None])[0]
            torch.testing.assert_close(whole[number], alone, rtol=0, atol=1e-9)
            assert number == 0 or (other[number] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("smear, bigram", [(True, 13), (True, 0), (False, 13)])
def test_documents_touch_through_smear_and_bigram_only_where_asked(smear, bigram):
    """With attention's outputs zero, only the smear and the bigram look back: at BOS they must not."""
    respect = random_model(replace(SMALL, smear_gate=smear, bigram_vocab_size=bigram))
    with torch.no_grad():
        respect.qo_bank[SMALL.num_layers :].zero_()
    published = GPT(replace(respect.config, doc_borders="published"), torch.float64).double()
    published.load_state_dict(respect.state_dict())
    first = torch.tensor([[1, 5, 9, 30, 1, 7, 8, 20]])
    second = torch.tensor([[1, 6, 3, 12, 1, 7, 8, 20]])
    assert torch.equal(respect(first)[:, 4:], respect(second)[:, 4:])
    assert not torch.equal(published(first)[:, 4], published(second)[:, 4])
    # and within a document it does look back, by one token
    inside = torch.tensor([[1, 5, 9, 30, 1, 17, 8, 20]])
    difference = (respect(first) != respect(inside)).any(-1)[0]
    assert difference[6] and not difference[:5].any()


def test_attention_crosses_borders_in_both_ways():
    """Rows are packed without a document mask, as published."""
    model = random_model(SMALL)
    first, second = torch.tensor([[1, 5, 9, 1, 7]]), torch.tensor([[1, 6, 3, 1, 7]])
    assert not torch.equal(model(first)[:, 4], model(second)[:, 4])


# ------------------------------------------------------------------------------------------------------------
# Banks, adapters, tap
# ------------------------------------------------------------------------------------------------------------


def banks_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: getattr(model, name).detach() for name in GPT.BANKS}


def matrices_of(model: GPT, block, product: str, y: torch.Tensor) -> list[tuple[str, int, torch.Tensor]]:
    """Bank, row and part of the output y, without residual scale, of each matrix of a product (see Tap)."""
    parts = train_gpt.PRODUCTS[product][1]
    scale = {"o": block.attn_scale, "down": block.mlp_scale}.get(product, torch.ones(()))
    sizes = [getattr(model, bank).size(1) for bank, _ in parts]
    rows = [half * model.config.num_layers + block.layer for _, half in parts]
    split = (y / scale).split(sizes, dim=-1)
    return [(bank, row, part) for (bank, _), row, part in zip(parts, rows, split, strict=True)]


def random_adapters(model: GPT, seed: int, leading: tuple[int, ...] = (), rank: int = 3) -> dict:
    generator, adapters = torch.Generator().manual_seed(seed), {}
    for name, bank in banks_of(model).items():
        rows, out, width = bank.shape
        a = torch.randn(*leading, rows, rank, width, generator=generator, dtype=torch.float64) * width**-0.5
        adapters[name] = (a, torch.randn(*leading, rows, out, rank, generator=generator, dtype=torch.float64))
    return adapters


def test_clones_of_the_banks_change_nothing_and_other_banks_do():
    model, ids = random_model(SMALL), random_ids(2, 9)
    clones = {name: bank.clone() for name, bank in banks_of(model).items()}
    assert torch.equal(model(ids), model(ids, model.weights(clones)))
    for name, bank in clones.items():
        assert torch.equal(model(ids), model(ids, model.weights({name: bank})))
        assert not torch.allclose(model(ids), model(ids, model.weights({name: bank * 1.5})), atol=1e-3), name


@pytest.mark.parametrize("names", [GPT.BANKS, ("kv_bank",), ("qo_bank", "mlp_down_bank")])
def test_banks_with_a_document_axis_equal_a_pass_for_each_document(names):
    model, ids = random_model(SMALL), random_ids(3, 9)
    each = [random_model(SMALL, seed=seed) for seed in (1, 2, 3)]
    stacked = {name: torch.stack([banks_of(other)[name] for other in each]) for name in names}
    together = model(ids, model.weights(stacked))
    for b in range(3):
        alone = model(ids[b : b + 1], model.weights({name: stacked[name][b] for name in names}))
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-10)
    assert not torch.allclose(together[:1], model(ids[:1]), atol=1e-3)


@pytest.mark.parametrize("per_document", [False, True])
@pytest.mark.parametrize("names", [GPT.BANKS, ("mlp_up_bank",)])
def test_adapters_equal_their_product_added_to_the_weights(per_document, names):
    model, ids = random_model(SMALL), random_ids(3, 9)
    adapters = {
        n: pair for n, pair in random_adapters(model, 4, (3,) if per_document else ()).items() if n in names
    }
    adapted = model(ids, adapters=adapters)
    for b in range(3):
        pairs = {n: (a[b], o[b]) if per_document else (a, o) for n, (a, o) in adapters.items()}
        merged = {n: banks_of(model)[n] + o @ a for n, (a, o) in pairs.items()}
        torch.testing.assert_close(
            adapted[b : b + 1], model(ids[b : b + 1], model.weights(merged)), rtol=0, atol=1e-9
        )
    assert not torch.allclose(adapted, model(ids), atol=1e-3)


def test_adapters_and_banks_of_documents_together():
    model, ids = random_model(SMALL), random_ids(2, 9)
    other, adapters = random_model(SMALL, seed=5), random_adapters(model, 6, (2,))
    banks = {name: torch.stack((bank, banks_of(other)[name])) for name, bank in banks_of(model).items()}
    merged = {name: bank + adapters[name][1] @ adapters[name][0] for name, bank in banks.items()}
    got, expected = model(ids, model.weights(banks), adapters), model(ids, model.weights(merged))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_the_tap_sees_every_bank_row_once_with_its_input_and_output():
    model, ids, seen = random_model(SMALL), random_ids(2, 9), {}

    def tap(block, product, x, y):
        for bank, row, part in matrices_of(model, block, product, y):
            assert (bank, row) not in seen
            seen[bank, row] = (x, part)

    assert torch.equal(model(ids, tap=tap), model(ids))
    assert set(seen) == {(name, row) for name, bank in banks_of(model).items() for row in range(len(bank))}
    for (name, row), (x, y) in seen.items():
        weight = banks_of(model)[name][row]
        assert x.shape == (2, 9, weight.size(1)) and y.shape == (2, 9, weight.size(0))
        torch.testing.assert_close(y, x @ weight.T, rtol=0, atol=1e-12)
    for layer in range(SMALL.num_layers):  # Q, K and V read the same
        inputs = [seen["qo_bank", layer], seen["kv_bank", layer], seen["kv_bank", SMALL.num_layers + layer]]
        assert all(torch.equal(x, inputs[0][0]) for x, _ in inputs)


def test_gradients_reach_replaced_banks_and_adapters():
    model, ids = random_model(SMALL), random_ids(2, 9)
    banks = {name: bank.clone().requires_grad_() for name, bank in banks_of(model).items()}
    adapters = {
        n: (a.requires_grad_(), b.requires_grad_()) for n, (a, b) in random_adapters(model, 7).items()
    }
    model(ids, model.weights(banks), adapters).square().sum().backward()
    for tensor in [*banks.values(), *(factor for pair in adapters.values() for factor in pair)]:
        assert (tensor.grad.abs().flatten(1).amax(1) > 0).all()
    assert all(getattr(model, name).grad is None for name in GPT.BANKS)


# ------------------------------------------------------------------------------------------------------------
# Names, shapes, initial weights
# ------------------------------------------------------------------------------------------------------------


def lineage_shapes(bigram: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The state dict of the banked line with 11 layers, as its checkpoints have it."""
    blocks = {
        f"blocks.{layer}.{name}": shape
        for layer in range(11)
        for name, shape in [
            ("attn_scale", (512,)),
            ("mlp_scale", (512,)),
            ("resid_mix", (2, 512)),
            ("attn.q_gain", (8,)),
        ]
    }
    return {
        "qo_bank": (22, 512, 512),
        "kv_bank": (22, 256, 512),
        "mlp_up_bank": (11, 1536, 512),
        "mlp_down_bank": (11, 512, 1536),
        "tok_emb.weight": (1024, 512),
        "bigram.embed.weight": bigram,
        "bigram.proj.weight": (512, bigram[1]),
        "bigram.scale": (),
        "smear.gate": (512,),
        "skip_weights": (5, 512),
        "ve_shared.embed.weight": (1024, 128),
        "ve_shared.proj.weight": (256, 128),
        "ve_shared.scale": (),
        "ve_layer_scales.0": (1,),
        "ve_layer_scales.1": (1,),
        **blocks,
    }


@pytest.mark.parametrize(
    "recipe, bigram, parameters", [("pr1019", (3072, 112), 27_067_484), ("pr549", (1536, 128), 26_928_220)]
)
def test_a_state_dict_of_the_lineage_loads_strictly(recipe, bigram, parameters, request):
    config, _, _ = train_gpt.load_config(
        {"RECIPE": str(request.config.rootpath / f"records/recipes/{recipe}.env")}
    )
    shapes, generator = lineage_shapes(bigram), torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = GPT(config)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    model = model.to_empty(device="cpu")
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    for wrong in (
        {**state, "word_start_boost": torch.ones(())},
        {k: v for k, v in state.items() if k != "smear.gate"},
    ):
        with pytest.raises(RuntimeError, match=r"word_start_boost|smear\.gate"):
            model.load_state_dict(wrong, strict=True)


@pytest.mark.parametrize(
    "changes, absent",
    [
        (dict(smear_gate=False), {"smear.gate"}),
        (dict(bigram_vocab_size=0), {"bigram.embed.weight", "bigram.proj.weight", "bigram.scale"}),
        (dict(unet_skips=False), {"skip_weights"}),
        (dict(resid_mix=False), {f"blocks.{i}.resid_mix" for i in range(5)}),
        (
            dict(ve_enabled=False),
            {
                *(f"ve_shared.{n}" for n in ("embed.weight", "proj.weight", "scale")),
                *(f"ve_layer_scales.{j}" for j in (0, 1)),
            },
        ),
        (
            dict(
                xsa_last_n=0, ln_scale=False, doc_borders="published", logit_softcap=0.0, mlp_leaky_slope=0.0
            ),
            set(),
        ),
    ],
)
def test_levers_that_are_off_have_no_parameters(changes, absent):
    assert set(GPT(SMALL).state_dict()) - set(GPT(replace(SMALL, **changes)).state_dict()) == absent
    assert set(GPT(replace(SMALL, **changes)).state_dict()) < set(GPT(SMALL).state_dict()) or not absent


def test_an_untied_head_is_one_more_matrix():
    assert set(GPT(replace(SMALL, tie_embeddings=False)).state_dict()) - set(GPT(SMALL).state_dict()) == {
        "lm_head.weight"
    }


def test_initial_weights():
    config = replace(SMALL, vocab_size=1000, tie_embeddings=False)
    model, L = GPT(config).init_weights(7), config.num_layers
    assert model.qo_bank[L:].abs().max() == 0 and model.mlp_down_bank.abs().max() == 0
    orthogonal = [*model.qo_bank[:L], *model.kv_bank, *model.mlp_up_bank, model.bigram.proj.weight]
    for matrix in [*orthogonal, model.ve_shared.proj.weight]:
        values = np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)
        np.testing.assert_allclose(values, 1, atol=1e-5)
    for one, other in zip(model.qo_bank[: L - 1], model.qo_bank[1:L], strict=True):
        assert not torch.equal(one, other)
    assert float(model.tok_emb.weight.detach().std()) == pytest.approx(config.tied_embed_init_std, rel=0.05)
    assert float(model.ve_shared.embed.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert model.bigram.embed.weight.abs().max() == 0 and model.lm_head.weight.abs().max() == 0
    state = model.state_dict()
    for layer in range(L):
        assert torch.equal(state[f"blocks.{layer}.resid_mix"], torch.stack((torch.ones(24), torch.zeros(24))))
        assert torch.equal(state[f"blocks.{layer}.attn.q_gain"], torch.full((4,), 1.5))
        assert (state[f"blocks.{layer}.attn_scale"] == 1).all() and (
            state[f"blocks.{layer}.mlp_scale"] == 1
        ).all()
    assert (state["skip_weights"] == 1).all() and (state["smear.gate"] == 0).all()
    assert float(state["bigram.scale"]) == pytest.approx(0.05) and float(
        state["ve_shared.scale"]
    ) == pytest.approx(0.1)
    assert state["ve_layer_scales.0"] == 1 and state["ve_layer_scales.1"] == 1


def test_initial_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    one = GPT(SMALL).init_weights(7).state_dict()
    torch.manual_seed(2)
    same, other = GPT(SMALL).init_weights(7).state_dict(), GPT(SMALL).init_weights(8).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(
        torch.equal(one[name], other[name])
        for name in ("qo_bank", "kv_bank", "mlp_up_bank", "tok_emb.weight")
    )


def test_attention_kernels_are_found_or_refused():
    cpu = torch.device("cpu")
    assert train_gpt.choose_attention("auto", cpu) == ("sdpa", train_gpt.sdpa_attention, [])
    assert train_gpt.choose_attention("sdpa", cpu)[0] == "sdpa"
    for name in ("fa3", "fa2"):
        with pytest.raises(UserError, match=f"ATTENTION={name}: {name} does not run on this device"):
            train_gpt.choose_attention(name, cpu)


@pytest.mark.parametrize(
    ("generation", "modules", "expected", "words"),
    [
        ((9, 0), {"flash_attn_interface": True, "flash_attn": True}, "fa3", []),
        ((9, 0), {"flash_attn_interface": False, "flash_attn": True}, "fa2", ["fa3 cannot be imported"]),
        ((8, 0), {"flash_attn_interface": True, "flash_attn": True}, "fa2", ["fa3 does not run"]),
        ((9, 0), {"flash_attn_interface": False, "flash_attn": False}, "sdpa", ["fa3 cannot", "fa2 cannot"]),
    ],
)
def test_attention_kernels_on_a_gpu(monkeypatch, generation, modules, expected, words):
    """With stand-ins for the GPU and the packages; the log learns why each better kernel was passed over."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: generation)
    for module, there in modules.items():
        stand_in = SimpleNamespace(flash_attn_func=lambda q, k, v, causal: (q + k, "log-sum-exp"),
                                   flash_attn_varlen_func=by_documents)  # fmt: skip
        monkeypatch.setitem(sys.modules, module, stand_in if there else None)
    name, kernel, notices = train_gpt.choose_attention("auto", torch.device("cuda"))
    assert name == expected and len(notices) == len(words)
    assert all(word in notice for word, notice in zip(words, notices, strict=True))
    q, k, v, documents = attention_inputs(2, 300, 0.005)
    if name != "sdpa":
        assert torch.equal(kernel(q, q, v), 2 * q)
        expected = train_gpt.sdpa_attention(q, k, v, documents)
        torch.testing.assert_close(kernel(q, k, v, documents), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "generation, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)]
)
def test_a_gpu_without_bfloat16_computes_in_float32_and_says_so(monkeypatch, generation, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: generation)
    for module in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    device = torch.device("cuda")
    assert (
        train_gpt.compute_dtype(device) == dtype
        and train_gpt.compute_dtype(torch.device("cpu")) == torch.float32
    )
    notices = [notice for notice in train_gpt.choose_attention("auto", device)[2] if "bfloat16" in notice]
    assert len(notices) == (dtype == torch.float32) and all("7.5" in notice for notice in notices)
    with pytest.raises(UserError, match="ATTENTION=fa3: fa3 "):
        train_gpt.choose_attention("fa3", device)


@pytest.mark.parametrize("allowed", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, None])
@pytest.mark.parametrize("borders", ["respect", "attention"])
def test_the_backend_that_is_named_is_the_one_that_runs(allowed, borders):
    """Against the operators that torch's profiler sees in a whole forward and backward pass of the model."""
    config = replace(SMALL, doc_borders=borders)
    model, ids = random_model(config, torch.float32), random_ids(2, config.train_seq_len)
    with nullcontext() if allowed is None else sdpa_kernel([allowed]):
        named = train_gpt.attention_backend(config, train_gpt.sdpa_attention, torch.device("cpu"))
        with torch.profiler.profile() as profile:
            train_gpt.training_loss(model, ids, ids).backward()
    ran = {event.key for event in profile.key_averages()}
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in ran) == (named == "flash")
    assert ("aten::_scaled_dot_product_attention_math" in ran) == (named == "math")
    assert named == ("math" if allowed == SDPBackend.MATH else "flash")


def by_documents(q, k, v, begins_q, begins_k, longest_q, longest_k, causal):
    """What flash_attn_varlen_func does, one document at a time:
    (tokens, heads, D), and the log-sum-exp beside it."""
    assert causal and torch.equal(begins_q, begins_k) and begins_q.dtype == torch.int32
    assert begins_q[0] == 0 and begins_q[-1] == len(q) and longest_q == longest_k
    parts = []
    for begin, end in pairwise(begins_q.tolist()):
        assert end - begin <= longest_q
        if end > begin:
            parts.append(train_gpt.sdpa_attention(*(x[None, begin:end] for x in (q, k, v)))[0])
    return torch.cat(parts), "log-sum-exp"


def attention_inputs(rows: int, length: int, often: float = 0.2, seed: int = 0):
    """q (rows, length, 4, 8), k and v with two heads,
    and the documents of texts: OFTEN of the places begin one."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(rows, length, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    return q, k, v, (torch.rand(rows, length, generator=generator) < often).cumsum(1)


CUTS = [(1, 9, 0.0), (3, 300, 0.004), (2, 300, 0.01), (4, 64, 0.3), (2, 40, 1.0)]


@pytest.mark.parametrize("rows, length, often", CUTS)
def test_documents_are_cut_as_a_kernel_of_any_length_wants_them(rows, length, often):
    """The borders by brute force.
    Where a row has too many its first ones are kept, whatever the other rows have."""
    q, k, v, documents = attention_inputs(rows, length, often, seed=rows)
    begins, room, kept = train_gpt.document_begins(documents), length // 128 + 1, []
    assert begins.shape == (rows * (1 + room) + 1,)  # whatever the text
    for row, text in enumerate(documents.tolist()):
        borders = [place for place in range(1, length) if text[place] != text[place - 1]]
        kept += [row * length + place for place in [0, *borders[:room]]]
    assert begins.tolist() == kept + [rows * length] * (len(begins) - len(kept))
    attention = train_gpt.flash_attention(None, by_documents)
    merged = torch.bucketize(torch.arange(rows * length), torch.tensor(kept), right=True).view(rows, length)
    expected = train_gpt.sdpa_attention(q, k, v, merged)
    torch.testing.assert_close(attention(q, k, v, documents), expected, rtol=0, atol=1e-12)
    few = all(len(set(text)) - 1 <= room for text in documents.tolist())
    exact = torch.allclose(expected, train_gpt.sdpa_attention(q, k, v, documents), rtol=0, atol=1e-12)
    assert exact == few
    assert torch.equal(
        attention(q[:, -3:], k, v, documents), train_gpt.sdpa_attention(q[:, -3:], k, v, documents)
    )


def test_a_model_by_a_kernel_of_any_length_is_the_model_by_masks():
    """Logits and gradients; and what torch itself has for it takes the arguments, in one graph."""
    config, ids = replace(SMALL, doc_borders="attention", train_seq_len=300), random_ids(2, 300)
    ids[0, 50] = ids[1, 170] = ids[1, 200] = train_gpt.BOS_ID
    results = []
    for kernel in (train_gpt.sdpa_attention, train_gpt.flash_attention(None, by_documents)):
        model = random_model(config)
        for block in model.blocks:
            block.attn.kernel = kernel
        logits = model(ids)
        logits.square().mean().backward()
        results.append((logits.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)


def test_torch_has_a_kernel_of_any_length():
    """Under fake tensors, since it needs a GPU: it takes what we give it, and is part of one graph."""
    torch._dynamo.reset()
    attention, counter = train_gpt.torch_attention(), CompileCounterWithBackend("aot_eager")
    with torch._subclasses.FakeTensorMode():
        q, k, v = (
            torch.empty(2, 300, heads, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 4, 4)
        )
        documents = torch.zeros(2, 300, dtype=torch.long)
        y = torch.compile(attention, backend=counter, dynamic=False, fullgraph=True)(q, k, v, documents)
        y.sum().backward()
    assert y.shape == q.shape and k.grad.shape == k.shape and counter.frame_count == 1


def varlen_of_torch_2_11(*args, window_size):
    assert window_size == (-1, 0)
    return by_documents(*args, causal=True)[0]


def varlen_of_torch_2_13(*args, window_size, enable_gqa=False):
    assert enable_gqa
    return varlen_of_torch_2_11(*args, window_size=window_size)


@pytest.mark.parametrize("stand_in", [varlen_of_torch_2_11, varlen_of_torch_2_13])
def test_the_kernel_of_torch_is_asked_for_what_masks_do(stand_in, monkeypatch):
    """Its window (-1, 0) is all that is before a place; with a stand-in that works document by document."""
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    q, k, v, documents = attention_inputs(2, 300, 0.005)
    attention = train_gpt.torch_attention()
    for given in (None, documents):
        expected = train_gpt.sdpa_attention(q, k, v, given)
        torch.testing.assert_close(attention(q, k, v, given), expected, rtol=0, atol=1e-12)


def test_in_float32_torch_is_asked_for_kernels_that_take_it(monkeypatch):
    """varlen_attn takes 16 bits only, and the fast kernels no fewer K/V heads then:
    none must be asked for these."""
    attention, asked, honest = train_gpt.torch_attention(), [], F.scaled_dot_product_attention

    def record(q, k, v, **how):
        asked.append((q.size(1), k.size(1), v.size(1)))
        return honest(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    q, k, v, documents = (x if x.dtype == torch.long else x.float() for x in attention_inputs(2, 300, 0.005))
    for given in (None, documents):
        found = attention(q, k, v, given)
        assert asked.pop() == (q.size(2),) * 3
        torch.testing.assert_close(found, train_gpt.sdpa_attention(q, k, v, given))


def test_a_value_of_zero_has_no_direction_to_leave_out():
    y = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.zeros(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    left = train_gpt.exclude_self(y, v)
    left.square().sum().backward()
    assert torch.equal(left, y) and torch.isfinite(v.grad).all()


@pytest.mark.gpu
@pytest.mark.parametrize("requested", ["fa3", "fa2", "sdpa"])
def test_attention_on_a_gpu(requested):
    """Each kernel that is there, with and without documents:
    results and gradients in bfloat16 near float32's."""
    device = torch.device("cuda")
    try:
        kernel = train_gpt.choose_attention(requested, device)[1]
    except UserError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 512, heads, 64, generator=generator).to(device) for heads in (8, 4, 4)]
    documents = (torch.rand(2, 512, generator=generator) < 0.005).cumsum(1).to(device)
    for given in (None, documents):
        results = []
        for attention, dtype in ((train_gpt.sdpa_attention, torch.float32), (kernel, torch.bfloat16)):
            inputs = [x.to(dtype, copy=True).requires_grad_() for x in exact]
            y = attention(*inputs, given)
            y.float().square().sum().backward()
            results.append([y, *(x.grad for x in inputs)])
        for found, expected in zip(results[1], results[0], strict=True):
            assert (found.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("allowed", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_the_backend_of_a_gpu_is_named(allowed):
    config, device = replace(Config(), train_seq_len=256), torch.device("cuda")
    with sdpa_kernel([allowed]):
        named = train_gpt.attention_backend(config, train_gpt.torch_attention(), device)
    assert named == allowed.name.split("_")[0].lower()


@pytest.mark.parametrize(
    "given", [{"banks": {"qo": torch.zeros(1)}}, {"adapters": {"lm_head": (torch.zeros(1),) * 2}}]
)
def test_a_replacement_under_a_wrong_name_is_an_error(given):
    with pytest.raises(AssertionError, match="nothing would use"):
        model = random_model(SMALL)
        model(torch.tensor([[1, 2, 3]]), model.weights(given.get("banks")), given.get("adapters"))
