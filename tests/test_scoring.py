"""Scoring: plans that count every target once,
and a score that equals brute force whatever the batch and the ranks."""

import math

import numpy as np
import pytest
import torch
from test_model import SMALL, random_model

import train_gpt
from train_gpt import ByteTable, Chunk, LedgerError, UserError, Windows, score, sliding_windows

TOKENS = np.random.default_rng(0).integers(0, 40, 75).astype(np.uint16)
TOKENS[[0, 20, 21, 50]] = train_gpt.BOS_ID
TABLE = ByteTable(
    np.random.default_rng(1).integers(1, 6, 40), np.arange(40) % 3 == 0, np.isin(np.arange(40), [0, 1, 2])
)
PLANS = [(16, 16), (16, 4), (16, 7), (16, 1), (74, 5), (30, 30)]


# ------------------------------------------------------------------------------------------------------------
# Plans
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [2, 3, 8, 33])
@pytest.mark.parametrize("extra", [1, 2, 3, 7, 8, 9, 31, 64, 65, 100])
def test_windows_score_every_target_once_with_enough_context(seq_len, extra):
    num_tokens = seq_len + extra
    for stride in {1, 2, seq_len // 2, seq_len - 1, seq_len} - {0}:
        plan, count = sliding_windows(num_tokens, seq_len, stride), np.zeros(num_tokens - 1, int)
        assert (plan.end == seq_len).all()
        for w, (start, first) in enumerate(zip(plan.start.tolist(), plan.begin.tolist(), strict=True)):
            assert start >= 0 and start + seq_len <= num_tokens - 1 and 0 <= first < seq_len
            assert first == 0 if w == 0 else first >= seq_len - stride
            count[start + first : start + seq_len] += 1  # target t is tokens[t + 1]
        assert (count == 1).all()
        assert len(plan.start) == 1 + math.ceil((num_tokens - 1 - seq_len) / stride)
        # the tail, with a full window
        assert plan.start[0] == 0 and plan.start[-1] + seq_len == num_tokens - 1
        assert (np.diff(plan.start) > 0).all() and (np.diff(plan.start)[:-1] == stride).all()


def test_the_plan_in_numbers():
    plan = sliding_windows(2048 + 64 * 2 + 10 + 1, 2048, 64)
    assert plan.start.tolist() == [0, 64, 128, 138] and plan.begin.tolist() == [0, 1984, 1984, 2038]
    plan = sliding_windows(62_021_633, 2048, 64)  # the published validation set without its last tokens
    assert len(plan.start) == 969_057  # the sources scored 969,088 windows, the last targets 32 times
    plan = sliding_windows(62_021_633, 2048, 2048)
    assert len(plan.start) == 30_284 and (plan.begin == 0).all()


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16])
def test_text_shorter_than_a_window(num_tokens):
    with pytest.raises(UserError, match="EVAL_SEQ_LEN=16"):
        sliding_windows(num_tokens, 16, 4)
    assert len(sliding_windows(17, 16, 4).start) == 1


# ------------------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL, torch.float32)


def brute_force(seq_len: int, stride: int, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Nats of each target, one at a time in float64:
    the first window from 0, then windows that end STRIDE later."""
    model, nll, end = random_model(SMALL), [], seq_len
    for target in range(1, len(tokens)):
        while target > end:
            end = min(end + stride, len(tokens) - 1)
        context = torch.from_numpy(tokens[end - seq_len : target].astype(np.int64))
        logits = model(context[None])[0, -1].detach().numpy()
        nll.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[target]])
    return np.array(nll)


def brute_bytes(tokens: np.ndarray) -> int:
    total = 0
    for previous, target in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        total += int(TABLE.base_bytes[target])
        total += 1 if target % 3 == 0 and previous not in (0, 1, 2) else 0
    return total


@pytest.mark.parametrize("seq_len, stride", PLANS)
def test_score_equals_brute_force(model, seq_len, stride):
    result = score(model, TOKENS, [Chunk(sliding_windows(len(TOKENS), seq_len, stride))], TABLE, 4)
    expected = brute_force(seq_len, stride)
    assert result.nll.dtype == np.float32 and result.nll.shape == expected.shape
    np.testing.assert_allclose(result.nll, expected, rtol=0, atol=5e-5)
    assert result.val_loss == pytest.approx(result.nll.astype(np.float64).mean(), abs=1e-12)
    assert result.val_loss == pytest.approx(expected.mean(), abs=2e-5)
    assert result.val_bpb == pytest.approx(expected.sum() / np.log(2) / brute_bytes(TOKENS), abs=2e-5)


def test_the_stride_matters():
    """The control of the test above: more context is another score."""
    assert abs(brute_force(16, 16) - brute_force(16, 4)).max() > 1e-2


@pytest.mark.parametrize("batch", [1, 3, 7, 64])
def test_the_batch_changes_nothing(model, batch):
    plan = sliding_windows(len(TOKENS), 16, 5)
    one, other = (
        score(model, TOKENS, [Chunk(plan)], TABLE, 5),
        score(model, TOKENS, [Chunk(plan)], TABLE, batch),
    )
    np.testing.assert_allclose(one.nll, other.nll, rtol=0, atol=2e-5)
    assert one.val_bpb == pytest.approx(other.val_bpb, abs=1e-6)


class Collected(Exception):
    pass


@pytest.mark.parametrize("ranks", [2, 3, 40])
def test_ranks_share_the_windows(model, monkeypatch, ranks):
    """Each rank's part is caught where the ranks would add up; together they are the score of one process."""
    plan = sliding_windows(len(TOKENS), 16, 5)
    whole = score(model, TOKENS, [Chunk(plan)], TABLE, 4)
    parts = []

    def collect(tensor):
        parts.append(tensor.double().numpy().copy())
        if len(parts) % 2 == 0:
            raise Collected

    for rank in range(ranks):
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt, "rank", lambda rank=rank: rank)
            patch.setattr(train_gpt, "world_size", lambda: ranks)
            patch.setattr(train_gpt.dist, "all_reduce", collect)
            with pytest.raises(Collected):
                score(model, TOKENS, [Chunk(plan)], TABLE, 4)
    np.testing.assert_allclose(sum(parts[::2]), whole.nll, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(sum(parts[1::2]), 1)
    work = [part.sum() for part in parts[1::2]]
    assert ranks > len(plan.start) or min(work) > 0


def twice(plan: Windows, copies: int) -> Windows:
    """The plan with its last window repeated, COPIES times in all."""
    repeat = np.append(np.arange(len(plan.start)), np.full(copies - 1, len(plan.start) - 1))
    return plan.take(repeat)


@pytest.mark.parametrize("copies", [2, 257])
def test_a_target_scored_more_than_once_is_an_error(model, copies):
    plan = sliding_windows(len(TOKENS), 16, 5)
    score(model, TOKENS, [Chunk(twice(plan, 1))], TABLE, 64)
    with pytest.raises(LedgerError, match="scored twice"):
        score(model, TOKENS, [Chunk(twice(plan, copies))], TABLE, 64)


@pytest.mark.parametrize("change", ["overlap", "gap", "missing window", "missing tail"])
def test_a_plan_that_is_not_exact_is_an_error(model, change):
    plan = sliding_windows(len(TOKENS), 16, 5)
    if change == "overlap":
        plan.begin[3] -= 1
    elif change == "gap":
        plan.begin[3] += 1
    else:
        keep = np.arange(len(plan.start)) != (2 if change == "missing window" else len(plan.start) - 1)
        plan = plan.take(keep)
    with pytest.raises(LedgerError, match="scored twice"):
        score(model, TOKENS, [Chunk(plan)], TABLE, 4)


def test_bpb_by_hand():
    """Four targets at ln 2 nats each, 1 + 2 + (3 + 1) + 1 bytes: half a bit a byte."""
    table = ByteTable(np.array([1, 2, 3]), np.array([False, False, True]), np.array([False, True, False]))
    tokens = np.array([1, 0, 1, 2, 2, 0], np.uint16)  # after 1, a boundary, the space of 2 does not count
    model = random_model(SMALL, torch.float32)

    def nll_fn(_, ids, targets, columns):
        return torch.full(targets.shape, math.log(2))

    result = score(model, tokens, [Chunk(sliding_windows(6, 5, 5))], table, 2, nll_fn)
    assert result.val_loss == pytest.approx(math.log(2))
    assert result.val_bpb == pytest.approx(5 / (1 + 2 + 3 + (3 + 1) + 1))


def test_scores_do_not_depend_on_later_tokens(model):
    """Bit for bit, for a plan whose windows move over the change."""
    plan = sliding_windows(len(TOKENS), 16, 5)
    before = score(model, TOKENS, [Chunk(plan)], TABLE, 4).nll
    for cut in (1, 2, 15, 16, 17, 40, 74):
        changed = TOKENS.copy()
        changed[cut:] = (changed[cut:] + 7) % 40
        after = score(model, changed, [Chunk(plan)], TABLE, 4).nll
        np.testing.assert_array_equal(after[: cut - 1], before[: cut - 1])  # target i is tokens[i + 1]
        assert after[cut - 1] != before[cut - 1]
