"""Keys and values kept between forward passes, and the text that a model writes by them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import SMALL, random_adapters, random_ids, random_model

import train_gpt
from train_gpt import BOS_ID, GPT, Cache, generate

WORD_START = np.arange(40) % 3 == 0
VARIANTS = {
    "the default levers": {},
    "bare": dict(smear_gate=False, bigram_vocab_size=0, ve_enabled=False, xsa_last_n=0, unet_skips=False,
                 resid_mix=False),
    "bigram by word starts": dict(pos_conditional_bigram=True, word_start_boost=True),
    "linear bigram": dict(bigram_hash="linear"),
    "published borders": dict(doc_borders="published"),
    "attention by documents": dict(doc_borders="attention"),
    "memory tokens": dict(num_memory_tokens=2),
    "recurrence": dict(block_order="0,1,2,3,1,2,4,4,0"),
    "recurrence and gates": dict(block_order="4,3,2,1,0,4,4", skip_gates=True, star_relu=True,
                                 phase_resid_mix=True),
    "untied head": dict(tie_embeddings=False, logit_softcap=0.0),
    "all dimensions rotated": dict(rope_dims=0, rope_ntk_len=0),
    "one layer": dict(num_layers=1, ve_layers="0"),
    "as many keys as queries": dict(num_kv_heads=4, xsa_last_n=5),
}  # fmt: skip


def cached_model(changes: dict, dtype: torch.dtype = torch.float64) -> GPT:
    """A random model that knows the tokens that begin a word."""
    model = random_model(replace(SMALL, **changes), dtype)
    model.register_buffer("word_start", torch.tensor(WORD_START), persistent=False)
    return model


def ids_with_borders() -> torch.Tensor:
    """Rows of 14 tokens, with documents that begin at, before and after the borders of pieces."""
    ids = random_ids(4, 14, seed=3)
    for row, places in enumerate(([0], [1, 4], [3, 5, 13], [2, 3, 4])):
        ids[row, places] = BOS_ID
    return ids


def in_pieces(model: GPT, ids: torch.Tensor, sizes) -> torch.Tensor:
    """Logits of IDS fed in pieces of SIZES and then the rest."""
    cache, sizes = Cache(), [*sizes, ids.size(1) - sum(sizes)]
    return torch.cat([model(piece, cache=cache) for piece in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_pieces_with_a_cache_give_the_logits_of_the_whole(name):
    model, ids = cached_model(VARIANTS[name]), ids_with_borders()
    whole = model(ids)
    for sizes in ([1, 3], [3, 1, 1], [13], [1] * 13, [7]):
        torch.testing.assert_close(in_pieces(model, ids, sizes), whole, rtol=0, atol=1e-10)
    without = torch.cat([model(piece) for piece in ids.split([4, 10], dim=1)], dim=1)
    assert (without - whole).abs().max() > 1e-3  # the past matters


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_pieces_with_a_cache_in_float32(name):
    model, ids = cached_model(VARIANTS[name], torch.float32), ids_with_borders()
    torch.testing.assert_close(in_pieces(model, ids, [1, 3]), model(ids), rtol=0, atol=2e-4)


@torch.no_grad()
def test_blocks_before_the_loop_starts_keep_their_own_keys():
    """With LOOP_START_FRAC the forward pass has fewer blocks at first."""
    model, ids = cached_model(dict(block_order="0,1,2,3,1,2,4,4,0")), ids_with_borders()
    looped = model(ids)
    model.looped = False
    torch.testing.assert_close(in_pieces(model, ids, [1, 3]), model(ids), rtol=0, atol=1e-10)
    assert not torch.allclose(model(ids), looped)


@torch.no_grad()
def test_a_cache_holds_the_tokens_it_was_given_and_changes_nothing_else():
    model, ids = cached_model({}), ids_with_borders()
    before, cache = ids.clone(), Cache()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for piece in ids.split([2, 5, 7], dim=1):
        model(piece, cache=cache)
    assert torch.equal(cache["ids"][0], ids) and torch.equal(ids, before)
    assert set(cache) == {"ids", *range(len(model.blocks))} and all(
        part.size(1) == 14 for parts in cache.values() for part in parts
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids), model(ids))


# ------------------------------------------------------------------------------------------------------------
# Text by the model itself
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def from_whole_prefixes(model: GPT, rows: int, length: int, temperature: float, seed: int) -> torch.Tensor:
    """Every token from the softmax of a forward pass over all before it,
    by Gumbel's maximum of the same noise."""
    generator, ids = torch.Generator().manual_seed(seed), torch.full((rows, 1), 1)
    while ids.size(1) < length:
        logits = model(ids)[:, -1]
        gumbel = -torch.empty(logits.shape).exponential_(generator=generator).log()
        ids = torch.cat((ids, (logits / temperature + gumbel).argmax(-1)[:, None]), dim=1)
    return ids


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_text_is_that_of_sampling_from_whole_prefixes(name, temperature):
    model = cached_model(VARIANTS[name])
    texts = generate(model, 3, 14, temperature, seed=5)
    assert torch.equal(texts, from_whole_prefixes(model, 3, 14, temperature, 5))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_prompt_is_continued_as_by_whole_prefixes(adapted):
    """The likeliest tokens after a prompt, with or without adapters, against a forward pass over all."""
    model, prompt = cached_model({}), [BOS_ID, 5, 9, 9, 30, 2]
    adapters = random_adapters(model, 3) if adapted else {}
    texts = generate(model, 2, 14, 1e-6, 0, prompt, adapters)
    assert texts.shape == (2, 14) and (texts[:, :6] == torch.tensor(prompt)).all()
    with torch.no_grad():
        logits = model(texts, adapters=adapters)
        assert torch.equal(texts[:, 6:], logits[:, 5:-1].argmax(-1))
        assert not adapted or not torch.allclose(logits, model(texts), atol=1e-3)


def test_texts_begin_documents_and_differ_by_row_and_seed():
    model = cached_model({})
    texts = [generate(model, 4, 12, 0.8, seed) for seed in (0, 1, 0)]
    assert texts[0].shape == (4, 12) and texts[0].dtype == torch.int64 and not texts[0].requires_grad
    assert all((text[:, 0] == BOS_ID).all() and text.max() < 40 and text.min() >= 0 for text in texts)
    assert torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[1])
    assert len({tuple(row) for row in texts[0].tolist()}) == 4


def test_at_a_low_temperature_the_likeliest_token_is_chosen():
    model = cached_model({})
    texts = generate(model, 3, 12, 1e-6, seed=2)
    with torch.no_grad():
        assert torch.equal(texts[:, 1:], model(texts)[:, :-1].argmax(-1))
    hot = generate(model, 64, 12, 1e6, seed=2)[:, 1:]
    assert torch.bincount(hot.flatten(), minlength=40).float().std() < 8  # about 18 of each


def test_tokens_are_drawn_by_their_probabilities():
    """Second tokens of 20,000 texts against the softmax after the first one."""
    model = cached_model({})
    with torch.no_grad():
        model.tok_emb.weight.mul_(0.3)
        shares = (model(torch.tensor([[BOS_ID]]))[0, 0] / 0.8).softmax(-1).numpy()
    counts = np.bincount(generate(model, 20_000, 2, 0.8, seed=4)[:, 1].numpy(), minlength=40)
    often = shares * 20_000 > 5
    chi2 = ((counts - 20_000 * shares) ** 2 / (20_000 * shares))[often].sum()
    assert often.sum() > 10 and chi2 < often.sum() + 5 * (2 * often.sum()) ** 0.5


def test_calibration_on_the_models_own_text_is_shared_by_ranks_and_never_repeats(monkeypatch):
    # two sequences a micro-batch
    config = replace(SMALL, calib_source="self", train_batch_tokens=256, seed=3)
    model = random_model(config, torch.float32)
    run = SimpleNamespace(config=config, train=None, device=torch.device("cpu"))
    whole = list(train_gpt.calibration_batches(run, model, 5))
    for ids, targets in whole:
        assert ids.shape == targets.shape == (2, 16) and (ids[:, 0] == BOS_ID).all()
        assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert len({tuple(ids.flatten().tolist()) for ids, _ in whole}) == 5
    run.config = replace(config, seed=4)
    other = [ids for ids, _ in train_gpt.calibration_batches(run, model, 5)]
    assert not any(torch.equal(one, ids) for one in other for ids, _ in whole)
    run.config = config
    monkeypatch.setattr(train_gpt, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(train_gpt, "rank", lambda rank=rank: rank)
        shares.append([ids for ids, _ in train_gpt.calibration_batches(run, model, 5)])
    assert [len(share) for share in shares] == [3, 2]
    assert all(torch.equal(shares[i % 2][i // 2], whole[i][0]) for i in range(5))
