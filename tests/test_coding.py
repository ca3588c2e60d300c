"""Entropy coding: round trips of anything, sizes against entropies, and the search for the size that fits."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_artifact import CPU, make_run
from test_model import SMALL, random_model
from test_optimisers import randn
from test_quantisation import calibrated

import train_gpt
from train_gpt import Statistics, Table, code_widths, decode_codes, encode_codes, fit, lay_out

CODERS = ("zstd", "ans")


def encode(tensors, coder: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Tensors of codes as bytes; then their order and counts, by which alone they are read again."""
    order, counts = lay_out([code_widths(codes) for codes in tensors])
    flat = np.concatenate([codes.flatten().numpy() for codes in tensors])
    return encode_codes(flat[order], counts, coder), order, counts


def decode(data: bytes, order: np.ndarray, counts: np.ndarray, coder: str) -> np.ndarray:
    codes = np.empty(len(order), np.int8)
    codes[order] = decode_codes(data, counts, coder)
    return codes


# ------------------------------------------------------------------------------------------------------------
# Round trips
# ------------------------------------------------------------------------------------------------------------


def draw_codes(kind: str, bits: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Codes of BITS bits: of rows and columns of different widths,
    uniform, rare, of one value, or of both ends."""
    generator, last = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    if kind == "normal":
        rows, columns = (
            np.exp2(2 * generator.standard_normal(s)) for s in ((*shape[:-1], 1), (1, shape[-1]))
        )
        codes = generator.standard_normal(shape) * rows * columns
    elif kind == "uniform":
        codes = generator.integers(-last, last + 1, shape)
    elif kind == "rare":
        codes = last * (generator.random(shape) < 0.01)
    elif kind == "constant":
        codes = np.full(shape, generator.integers(-last, last + 1))
    else:
        codes = last * generator.choice([-1, 1], shape)
    return torch.from_numpy(np.clip(np.round(codes), -last, last).astype(np.int8))


SIDES = st.one_of(st.just(1), st.integers(1, 40))
MATRICES = st.tuples(
    st.sampled_from(["normal", "uniform", "rare", "constant", "ends"]),
    st.integers(2, 8),
    st.one_of(st.tuples(SIDES, SIDES), st.tuples(st.integers(1, 4), SIDES, SIDES)),
    st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize("coder", CODERS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(drawn=st.lists(MATRICES, min_size=1, max_size=5))
def test_any_codes_come_out_as_they_went_in(coder, drawn):
    tensors = [draw_codes(*each) for each in drawn]
    data, order, counts = encode(tensors, coder)
    assert sorted(order.tolist()) == list(range(sum(codes.numel() for codes in tensors)))
    assert counts.sum() == len(order) and counts.shape == (
        64,
        sum(codes[..., 0, 0].numel() for codes in tensors),
    )
    flat = np.concatenate([codes.flatten().numpy() for codes in tensors])
    np.testing.assert_array_equal(decode(data, order, counts, coder), flat)
    assert encode(tensors, coder)[0] == data


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("value", [-127, -1, 0, 1, 127])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 1, 1), (2, 9, 7)])
def test_one_value_alone(coder, value, shape):
    codes = torch.full(shape, value, dtype=torch.int8)
    data, order, counts = encode([codes], coder)
    assert (decode(data, order, counts, coder) == value).all()


@pytest.mark.parametrize("coder", CODERS)
def test_every_code_there_is(coder):
    codes = torch.arange(-127, 128).repeat(8, 1).to(torch.int8)
    data, order, counts = encode([codes, codes.mT.contiguous()], coder)
    expected = np.concatenate([codes.flatten().numpy(), codes.mT.flatten().numpy()])
    np.testing.assert_array_equal(decode(data, order, counts, coder), expected)


def test_the_layout_sorts_codes_by_their_width_and_keeps_their_order_within():
    """Rows of 16, 1 and 4 by columns of 1 and 2;
    widths in quarter octaves of the root mean square, from numpy."""
    codes = torch.from_numpy(np.random.default_rng(0).normal(0, np.outer([16, 1, 4], [1, 2] * 40)).round())
    codes = codes.clamp(-127, 127).to(torch.int8)
    rows, columns = code_widths(codes)
    squares = codes.double().numpy() ** 2 + 2.0**-12
    by_row = squares.mean(1, keepdims=True)
    np.testing.assert_array_equal(rows.numpy(), np.round(4 * np.log2(by_row**0.5)))
    np.testing.assert_array_equal(
        columns.numpy(), np.round(4 * np.log2((squares / by_row).mean(0, keepdims=True) ** 0.5))
    )
    order, counts = lay_out([(rows, columns)])
    widths = (rows.int() + columns.int()).numpy().flatten()[order]
    assert (np.diff(widths) >= 0).all() and len(set(widths)) > 4
    assert all(low < high or widths[i] < widths[i + 1] for i, (low, high) in enumerate(pairwise(order)))
    np.testing.assert_array_equal(counts[:, 0].nonzero()[0], np.unique(widths) + 24)


# ------------------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------------------


def entropy_bytes(codes: np.ndarray) -> float:
    """Bytes of a sequence at its own empirical entropy."""
    number = np.unique(codes, return_counts=True)[1]
    return float((number * np.log2(len(codes) / number)).sum() / 8)


def gaussians() -> list[torch.Tensor]:
    """A million codes of four matrices, of widths that differ by matrix, row and column."""
    tensors = []
    for i in range(4):
        spread = (randn((512, 1), i) / 2).exp() * (randn((1, 512), i + 20) / 2).exp() * 0.7 * 2**i
        tensors.append((randn((512, 512), i + 40) * spread).round().clamp(-127, 127).to(torch.int8))
    return tensors


def test_ans_takes_the_empirical_entropy_by_width_and_matrix():
    tensors = gaussians()
    data, order, counts = encode(tensors, "ans")
    flat = np.concatenate([codes.flatten().numpy() for codes in tensors])
    parts = np.split(flat[order], counts.flatten().cumsum()[:-1])
    entropy = sum(entropy_bytes(part) for part in parts if len(part))
    assert len(flat) > 1e6 and len(data) < 1.01 * entropy + 2000
    np.testing.assert_array_equal(decode(data, order, counts, "ans"), flat)
    whole = sum(entropy_bytes(codes.flatten().numpy()) for codes in tensors)
    assert len(data) < 0.95 * whole  # the widths are worth more than they cost here


def test_ans_is_the_smallest_and_the_layout_helps_every_coder():
    tensors = gaussians()[::2]
    flat = np.concatenate([codes.flatten().numpy() for codes in tensors])
    sizes = {coder: len(encode(tensors, coder)[0]) for coder in CODERS}
    assert sizes["ans"] < sizes["zstd"] < len(train_gpt.pack(flat.tobytes(), "zstd"))


def test_a_matrix_that_is_not_like_the_others_has_a_table_of_its_own():
    """Of one width, but of two values alone: one bit a code in place of several."""
    generator = np.random.default_rng(0)
    plain = [
        torch.from_numpy(generator.normal(0, 20, (100, 200)).round().clip(-127, 127).astype(np.int8))
    ] * 2
    ends = torch.from_numpy(generator.choice([-20, 20], (100, 200)).astype(np.int8))
    grown = len(encode([*plain, ends], "ans")[0]) - len(encode(plain, "ans")[0])
    assert 2500 <= grown < 2500 * 1.1


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_what_the_symbols_of_a_table_cost_adds_up_to_one(sigma):
    """Two to minus the bits that each symbol takes, measured by coding it ten thousand times."""
    codes = (sigma * randn((100_000,), 3)).round().clamp(-127, 127).to(torch.int8).numpy()
    table = Table.of(codes)
    model, total, expected = table.model(), 0.0, 0.0
    # on an empty stack the first symbol is for free
    some = np.arange(1000, dtype=np.int32) % len(table.frequencies)
    for symbol in range(len(table.frequencies)):
        stack = train_gpt.coder_package("ans").stream.stack.AnsCoder()
        stack.encode_reverse(some, model)
        before = stack.num_valid_bits()
        stack.encode_reverse(np.full(10_000, symbol, np.int32), model)
        total += 2.0 ** ((before - stack.num_valid_bits()) / 10_000)
        expected += 2.0 ** (-table.bits(np.array([symbol + table.low], np.int8)))
    assert total == pytest.approx(1, abs=0.01) and expected == pytest.approx(1, abs=1e-9)


def test_tables_are_as_near_to_the_shares_of_their_codes_as_16_bits_are():
    codes = np.repeat(np.array([-3, 0, 5], np.int8), [10, 99_989, 1])
    table = Table.of(codes)
    assert table.low == -3 and len(table.frequencies) == 9 and table.frequencies.min() == 1
    assert table.frequencies[3] == 65528 and table.frequencies[0] == 7
    whole = Table.of(np.full(1000, 127, np.int8))
    assert whole.low == 127 and whole.frequencies.tolist() == [65535, 1]


# ------------------------------------------------------------------------------------------------------------
# Fitting
# ------------------------------------------------------------------------------------------------------------

BUDGET = 200_000


def gaussian_bits(step: float) -> float:
    """Entropy of a rounded standard normal variable."""
    edges = (np.arange(-1500, 1502) - 0.5) * step
    share = np.diff([0.5 * (1 + math.erf(edge / 2**0.5)) for edge in edges])
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def searched(size):
    """What `fit` returns, with the sizes that it asked for."""
    sizes = []

    def build(factor: float) -> bytes:
        sizes.append(int(size(factor)))
        return bytes(sizes[-1])

    blob, factor = fit(build, BUDGET)
    assert len(sizes) <= 12 and len(blob) == int(size(factor))
    return len(blob), factor, sizes


STRAIGHT = {f"straight {at}": lambda f, at=at: BUDGET * (1 - 0.15 * (math.log2(f) - at))
            for at in (-6, -1.5, -0.4, -0.01, 0, 0.01, 0.3, 1.2, 4, 8)}  # fmt: skip
POWER = {f"power {at}": lambda f, at=at: BUDGET * 2**at / f for at in (-6, -1.5, -0.4, 0, 0.3, 1.2, 4)}
NORMAL = {f"normal {s}": lambda f, s=s: BUDGET / 4 * gaussian_bits(s * f) for s in (0.05, 0.2, 1.0, 3.0)}
STEPPY = {f"steps {at}": lambda f, at=at: BUDGET * (1 - 0.0007 * math.floor(200 * (math.log2(f) - at)))
          for at in (-2.3, 0.3, 1.7)}  # fmt: skip
SIZES = STRAIGHT | POWER | NORMAL | STEPPY | {
    "head and codes": lambda f: BUDGET * (0.9 + 0.05 * gaussian_bits(f)),
    "a bend above": lambda f: BUDGET * 1.1 / (1 + 0.2 * max(0, math.log2(f) + 1.5) ** 2),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_the_largest_size_that_fits_is_found_to_a_thousandth(name):
    size, _, sizes = searched(SIZES[name])
    assert 0.999 * BUDGET <= size <= BUDGET and size == max(each for each in sizes if each <= BUDGET)


@pytest.mark.parametrize("share", [0.5, 0.95, 0.9985])
def test_codes_that_have_no_finer_steps_end_the_search(share):
    size, _, sizes = searched(lambda f: BUDGET * share / (1 + 0.2 * max(0, math.log2(f) + 1.5) ** 2))
    assert size == int(share * BUDGET) and len(sizes) <= 5


@pytest.mark.parametrize("limit", [1.0005, 0.98])
def test_sizes_that_level_off_slowly_are_followed_to_a_thousandth(limit):
    """The best that fits is the budget, or what the size tends to."""
    size, _, _ = searched(lambda f: BUDGET * limit / (1 + 0.3 * f**1.5))
    assert 0.999 * min(limit, 1) * BUDGET <= size <= BUDGET


@pytest.mark.parametrize("at", [-2.3, 0.3, 1.7])
def test_a_jump_over_the_budget_leaves_what_is_below_it(at):
    size, factor, _ = searched(lambda f: BUDGET * (1.3 if math.log2(f) < at else 0.8))
    assert size == 0.8 * BUDGET and math.log2(factor) >= at


def test_where_nothing_fits_the_smallest_tried_is_returned():
    size, factor, sizes = searched(lambda f: BUDGET * (2 - 0.01 * math.log2(f)))
    assert size == min(sizes) > BUDGET and factor == 2.0 ** (len(sizes) - 1)


def at_first(folder, config, model, statistics) -> dict:
    folder.mkdir()
    return train_gpt.export(make_run(folder, config), model, statistics)


@pytest.mark.parametrize("how", ["sigmas", "two_sided", "trellis"])
@pytest.mark.parametrize("share", [0.6, 0.8, 1.04])
def test_an_export_that_is_to_fit_fills_the_cap(tmp_path, monkeypatch, how, share):
    """To 0.1% of the artifact: rows have scales in steps of 1/8 octave, but not all change at once."""
    steps = "sigmas" if how == "sigmas" else "two_sided"
    config = replace(SMALL, num_layers=6, model_dim=64, quant_steps=steps, quant_trellis=how == "trellis",
                     quant_loss=0.05, compressor="ans", embed_clip_sigmas=8.0)  # fmt: skip
    if how == "sigmas":
        model, statistics = random_model(config, torch.float32), Statistics()
    else:
        model, statistics = calibrated(config)
    before = at_first(tmp_path / "before", config, model, statistics)
    assert before["step_factor"] == 1.0
    cap = before["bytes_code"] + int(share * before["bytes_model"])
    monkeypatch.setattr(train_gpt, "SIZE_CAP", cap)
    assert at_first(tmp_path / "as it is", config, model, statistics)["fits"] is (share > 1)
    sizes = at_first(tmp_path / "fitted", replace(config, fit_size=True), model, statistics)
    budget = cap - sizes["bytes_code"]
    assert sizes["fits"] and 0.999 * budget <= sizes["bytes_model"] <= budget
    assert (sizes["step_factor"] < 1) == (share > 1)
    assert f"fit_size: scale_mult:{sizes['step_factor']:.4f}" in (tmp_path / "fitted/train.log").read_text()
    artifact = train_gpt.read_artifact(tmp_path / "fitted/final_model.int6.ptz")
    assert train_gpt.load_model(artifact, CPU).config.model_dim == 64


def test_a_cap_that_nothing_fits_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "SIZE_CAP", 10_000)
    model = random_model(SMALL, torch.float32)
    sizes = train_gpt.export(make_run(tmp_path, replace(SMALL, fit_size=True)), model, Statistics())
    assert not sizes["fits"] and "over the cap" in (tmp_path / "train.log").read_text()
