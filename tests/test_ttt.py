"""The parts of test-time training against explicit computations:
plans, ledger, fast weights, steps, moments, PPM."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_model import SMALL, random_ids, random_model
from test_scoring import TABLE, TOKENS

import train_gpt
from eval_ttt import document_plan, documents, flat_plan, mixed_nll, ppm_nll
from train_gpt import (
    GPT,
    TTT_MODES,
    Chunk,
    Config,
    FastWeights,
    Ledger,
    LedgerError,
    Windows,
    adaptation_step,
)

ALL = TTT_MODES["all"][1]
LEVERS = replace(
    SMALL, num_memory_tokens=2, word_start_boost=True, star_relu=True, skip_gates=True, tie_embeddings=False,
    block_order="0,1,2,1,3,4", pos_conditional_bigram=True,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# Plans
# ------------------------------------------------------------------------------------------------------------


def windows(*rows: tuple[int, int, int]) -> Windows:
    return Windows(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))


def rows(given: Windows) -> list[tuple[int, int, int]]:
    return list(zip(given.start.tolist(), given.begin.tolist(), given.end.tolist(), strict=True))


def counted(given: Windows) -> list[int]:
    """The targets that count, in order."""
    return [target for start, begin, end in rows(given) for target in range(start + begin, start + end)]


def spans(tokens: np.ndarray) -> list[tuple[int, int]]:
    """First and last but one target of each document, found one token at a time."""
    return list(pairwise([0, *(i for i in range(1, len(tokens) - 1) if tokens[i] == 1), len(tokens) - 1]))


def text_of(lengths: list[int]) -> np.ndarray:
    """Documents of so many targets each."""
    tokens = np.random.default_rng(len(lengths)).integers(2, 40, sum(lengths) + 1).astype(np.uint16)
    tokens[np.cumsum([0, *lengths])[:-1]] = 1
    return tokens


def follow(plan: list[Chunk], targets: int) -> None:
    """Carry out a plan on sets of targets: each is scored once, and before it is learned from."""
    scored = set()
    for chunk in plan:
        new = counted(chunk.scored)
        assert len(set(new)) == len(new) and not scored & set(new)
        scored |= set(new)
        if chunk.adapted is not None:
            read = {
                t
                for start, begin, end in rows(chunk.adapted)
                if end > begin
                for t in range(start, start + end)
            }
            assert read and read <= scored
    assert scored == set(range(targets))


FLAT = [  # tokens, EVAL_SEQ_LEN, EVAL_STRIDE, TTT_CHUNK_TOKENS, TTT_CONTEXT
    (77, 16, 4, 16, 0), (77, 16, 4, 8, 3), (78, 16, 5, 12, 5), (77, 16, 16, 1, 0), (20, 16, 4, 1000, 0),
    (200, 7, 3, 50, 9), (17, 16, 4, 4, 0),
]  # fmt: skip


@pytest.mark.parametrize("num_tokens, seq_len, stride, chunk_tokens, context", FLAT)
def test_flat_plan(num_tokens, seq_len, stride, chunk_tokens, context):
    config = Config(
        eval_seq_len=seq_len, eval_stride=stride, ttt_chunk_tokens=chunk_tokens, ttt_context=context
    )
    plan = flat_plan(num_tokens, config)
    follow(plan, num_tokens - 1)
    scored = [row for chunk in plan for row in rows(chunk.scored)]
    assert scored == rows(train_gpt.sliding_windows(num_tokens, seq_len, stride))
    numbers = [{(start + begin) // chunk_tokens for start, begin, _ in rows(chunk.scored)} for chunk in plan]
    assert all(len(one) == 1 and min(one) < min(two) for one, two in pairwise([*numbers, {math.inf}]))
    assert plan[-1].adapted is None and not any(chunk.slots or chunk.base for chunk in plan)
    for chunk in plan[:-1]:
        assert counted(chunk.adapted) == counted(chunk.scored)
        lengths = [end - begin for _, begin, end in rows(chunk.adapted)]
        assert all(length == seq_len for length in lengths[:-1]) and 0 < lengths[-1] <= seq_len
        assert all(begin == min(context, start + begin) for start, begin, _ in rows(chunk.adapted))


def test_a_flat_plan_in_numbers():
    """Windows end at 8, 12, 16, 20; the first target that each scores is 0, 8, 12, 16."""
    plan = flat_plan(21, Config(eval_seq_len=8, eval_stride=4, ttt_chunk_tokens=8, ttt_context=2))
    assert [rows(chunk.scored) for chunk in plan] == [[(0, 0, 8)], [(4, 4, 8), (8, 4, 8)], [(12, 4, 8)]]
    assert [rows(chunk.adapted) for chunk in plan[:2]] == [[(0, 0, 8)], [(6, 2, 10)]]


BORDERS = [
    ([1, 5, 6, 1, 7], [(0, 3), (3, 4)]), ([5, 6, 1, 7, 8], [(0, 2), (2, 4)]), ([1, 5, 6, 1], [(0, 3)]),
    ([5, 6, 7], [(0, 2)]), ([1, 1, 1, 5], [(0, 1), (1, 2), (2, 3)]), ([1, 5, 1, 1], [(0, 2), (2, 3)]),
    ([5, 1], [(0, 1)]),
]  # fmt: skip


@pytest.mark.parametrize("tokens, expected", BORDERS, ids=str)
def test_documents_begin_at_their_first_token(tokens, expected):
    begin, end = documents(np.array(tokens, np.uint16))
    assert list(zip(begin.tolist(), end.tolist(), strict=True)) == expected == spans(np.array(tokens))


LENGTHS = [13, 1, 29, 5, 4, 17, 1, 10, 30]
BY_DOCUMENTS = [  # TTT_CHUNK_SIZE, EVAL_SEQ_LEN, EVAL_STRIDE, TTT_SLOTS, TTT_GROUPS, TTT_CONTEXT
    (5, 12, 4, 4, 1, 0), (5, 12, 4, 3, 2, 7), (4, 12, 12, 2, 1, 2), (12, 12, 3, 100, 1, 0),
    (1, 8, 8, 1, 20, 0), (5, 12, 12, 4, 3, 0),
]  # fmt: skip


def in_slots(members: list[tuple[int, int]], slots: int, size: int) -> list[dict[int, tuple]]:
    """By hand, for each step of a group: slot -> (document's targets, chunk), one slot after the other."""
    waiting, held, steps = list(members), [None] * slots, []
    while waiting or any(held):
        for slot in range(slots):
            if held[slot] is None and waiting:
                held[slot] = (waiting.pop(0), 0)
        steps.append({slot: each for slot, each in enumerate(held) if each})
        for slot, each in enumerate(held):
            if each:
                (low, high), chunk = each
                held[slot] = (each[0], chunk + 1) if low + (chunk + 1) * size < high else None
    return steps


@pytest.mark.parametrize("size, seq_len, stride, slots, groups, context", BY_DOCUMENTS)
def test_document_plan(size, seq_len, stride, slots, groups, context):
    """Each step has the next chunk of the document in each slot,
    in document order; it reads no other document."""
    tokens = text_of(LENGTHS)
    config = Config(eval_seq_len=seq_len, eval_stride=stride, ttt_chunk_size=size, ttt_context=context)
    plan = document_plan(tokens, replace(config, ttt_slots=slots, ttt_groups=groups))
    follow(plan, len(tokens) - 1)
    steps = [
        (group, step)
        for group in range(groups)
        for step in in_slots(spans(tokens)[group::groups], slots, size)
    ]
    for chunk, (group, step) in zip(plan, steps, strict=True):
        held = {span: (slot, number) for slot, (span, number) in step.items()}
        expected = [(*held[span], *span) for span in sorted(held)]
        assert chunk.slots.group == group and not chunk.base and chunk.slots.width == size
        assert chunk.slots.fresh.tolist() == [number == 0 for _, number, _, _ in expected]
        learned = rows(chunk.adapted or windows(*[(0, 0, 0)] * len(expected)))
        by_document = zip(expected, chunk.slots.slot.tolist(), rows(chunk.scored), learned, strict=True)
        for (slot, number, low, high), given, (start, begin, end), learn in by_document:
            a, b = low + number * size, min(low + (number + 1) * size, high)
            assert given == slot and (start + begin, start + end) == (a, b) and end <= seq_len
            block = low + (a - low) // seq_len * seq_len if stride == seq_len else low
            assert start == max(block, a + size - seq_len)  # as if the document went on
            left = max(low, a - context)
            assert learn == (left, a - left, b - left) if b < high else learn[2] <= learn[1]
        for length, (_, begin, end) in zip(chunk.slots.lengths.tolist(), rows(chunk.scored), strict=True):
            assert end <= begin + size <= length <= seq_len


def test_windows_and_shapes_know_no_end():
    """The same document, ended a target earlier or later: all that is common to both is planned the same."""
    config = Config(eval_seq_len=12, eval_stride=4, ttt_chunk_size=5, ttt_groups=1)
    for length in range(1, 40):
        short, long = (document_plan(text_of([length + more]), config) for more in (0, 1))
        for one, other in zip(short, long, strict=False):
            assert one.scored.start.tolist() == other.scored.start.tolist()
            assert one.slots.lengths.tolist() == other.slots.lengths.tolist()


@pytest.mark.parametrize(
    "seq_len, size, context", [(2048, 128, 0), (2048, 64, 32), (256, 64, 0), (100, 33, 5), (7, 7, 0)]
)
def test_a_plan_has_few_shapes(seq_len, size, context):
    """Documents of 1 to 100,000 tokens: four lengths at most, and each holds all windows of its batch."""
    lengths = np.unique(np.geomspace(1, 100_000, 60).astype(int))
    tokens = text_of(np.random.default_rng(0).permutation(lengths).tolist())
    config = Config(
        eval_seq_len=seq_len, ttt_chunk_size=size, ttt_context=context, ttt_slots=24, ttt_groups=2
    )
    shapes, plan = set(), document_plan(tokens, config)
    for chunk in plan:
        for index, width, length in train_gpt.batches_of(chunk, train_gpt.SLOT_ROWS):
            shapes.add((width, length))
            assert len(index) <= train_gpt.SLOT_ROWS and (chunk.scored.end[index] <= length).all()
    assert {width for width, _ in shapes} == {size} and {length for _, length in shapes} <= {
        math.ceil(seq_len / 2**k) for k in range(4)
    }


PHASES = [
    (1, 6, 3, [2, 4, 6]),
    (2, 5, 1, [5]),
    (3, 6, 2, [3, 6]),
    (1, 9, 1, []),
    (2, 2000, 3, []),
    (1, 4, 2, [2, 4]),
]


@pytest.mark.parametrize("groups, prefix, phases, expected", PHASES)
def test_phases(groups, prefix, phases, expected):
    """EXPECTED: how many documents are scored at each border,
    where all slots run empty; none after the last one."""
    tokens = text_of(LENGTHS)
    config = Config(eval_seq_len=12, ttt_chunk_size=5, ttt_slots=2, ttt_groups=groups, ttt_mode="phased")
    plan = document_plan(tokens, replace(config, phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=phases))
    follow(plan, len(tokens) - 1)
    borders, done = [], set()
    for chunk in plan:
        if chunk.base:
            borders.append([low for low, _ in spans(tokens)].index(len(done)))
            assert done == set(range(len(done))) and counted(chunk.adapted) == sorted(done)
            assert all(begin == 0 < end <= 12 for _, begin, end in rows(chunk.adapted))
            assert all(
                any(a <= s and s + e <= b for a, b in spans(tokens)) for s, _, e in rows(chunk.adapted)
            )
            assert len(chunk.scored.start) == 0
        done |= {*counted(chunk.scored)}
    assert borders == expected


# ------------------------------------------------------------------------------------------------------------
# Ledger
# ------------------------------------------------------------------------------------------------------------


def test_the_ledger_refuses_a_second_score_and_early_learning():
    ledger = Ledger(20)
    ledger.score(windows((0, 0, 5), (3, 4, 9), (15, 2, 2)))  # 0 to 4 and 7 to 11; the third has no target
    ledger.adapt(windows((0, 0, 5), (8, 2, 4), (0, 9, 9)))
    for again in ((4, 0, 1), (0, 4, 6), (6, 0, 2), (7, 3, 9)):
        with pytest.raises(LedgerError, match="scored twice"):
            ledger.score(windows(again))
    # two of them only as left context
    for early in (
        (0, 0, 6),
        (4, 3, 6),
        (5, 3, 6),
        (11, 0, 2),
        (19, 0, 1),
    ):
        with pytest.raises(LedgerError, match="before they are scored"):
            ledger.adapt(windows(early))
    ledger.score(windows((5, 0, 2)))
    ledger.adapt(windows((0, 0, 12)))


@pytest.mark.parametrize("change, message", [("learn", "before they are scored"), ("score", "scored twice")])
def test_a_plan_that_breaks_the_order_is_stopped_before_it_learns(change, message):
    class Never:
        begin, select = staticmethod(lambda *_: None), staticmethod(lambda *_: None)
        replacements = staticmethod(lambda: ())
        learn = staticmethod(lambda *_: pytest.fail("learned"))

    plan = flat_plan(len(TOKENS), Config(eval_seq_len=16, eval_stride=8, ttt_chunk_tokens=16))
    plan = [chunk._replace(adapted=None) for chunk in plan]
    plan[2] = plan[1] if change == "score" else plan[2]._replace(adapted=windows((10, 4, 16), (32, 0, 17)))
    with pytest.raises(LedgerError, match=message):
        train_gpt.score(random_model(SMALL, torch.float32), TOKENS, plan, TABLE, 4, adaptation=Never())


# ------------------------------------------------------------------------------------------------------------
# Adaptation by hand
# ------------------------------------------------------------------------------------------------------------


class Moments:
    """Mean squared gradients as the settings describe them:
    row and column means of matrices, else every entry.

    By flat chunks a running mean that forgets with TTT_BETA2; by documents a plain mean over the prior, the
    document itself and (prefix) those that stand earlier.
    """

    def __init__(self, config: Config, prior=()):
        self.config, self.steps = config, 0
        self.means: dict[str, list[torch.Tensor]] = {}
        self.seen = [(-1, each) for each in prior]  # document, parts by name

    @staticmethod
    def parts(name: str, g: torch.Tensor) -> list[torch.Tensor]:
        if "_bank" in name or name.endswith(".weight") or name == "memory_tokens":
            return [(g**2).mean(-1), (g**2).mean(-2)]
        return [g**2]

    @classmethod
    def all_parts(cls, gradients: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        return {name: cls.parts(name, g) for name, g in gradients.items()}

    @staticmethod
    def mean(many: list[dict[str, list[torch.Tensor]]]) -> dict[str, list[torch.Tensor]]:
        """By name and part."""
        columns = {name: zip(*(each[name] for each in many), strict=True) for name in many[0]}
        return {name: [sum(column) / len(many) for column in parts] for name, parts in columns.items()}

    def observe(self, gradients: dict[str, torch.Tensor], document: int | None = None) -> None:
        """Of one set of weights for everything, or of a document with its number."""
        self.steps, new = self.steps + 1, self.all_parts(gradients)
        if document is not None:
            self.seen.append((document, new))
            used = {"own": lambda other: other in (-1, document), "prefix": lambda other: other <= document}
            of = used[self.config.ttt_moments]
            self.means = self.mean([each for other, each in self.seen if of(other)])
            return
        keep = min(self.config.ttt_beta2, 1 - 1 / self.steps)
        for name, parts in new.items():
            old = self.means.get(name, parts)
            self.means[name] = [keep * o + (1 - keep) * n for o, n in zip(old, parts, strict=True)]

    def root(self, name: str) -> torch.Tensor:
        parts = self.means[name]
        square = parts[0]
        if len(parts) == 2:
            mean = parts[0].mean(-1, keepdim=True).unsqueeze(-1)
            square = torch.einsum("...i,...j->...ij", *parts) / mean.clamp(min=1e-30)
        return (square + 1e-3 * square.mean()).sqrt().clamp(min=1e-12)


class Hand:
    """One set of weights that learns by torch's own optimisers,
    in float64, each setting as its help text says."""

    def __init__(self, model: GPT, config: Config, learns: str, moments: Moments | None = None):
        self.config, self.moments = config, moments
        self.model = copy.deepcopy(model).double().requires_grad_(False)
        self.model.dtype, self.low_rank = torch.float64, learns == "adapters"
        own = {n: p for n, p in self.model.named_parameters() if learns == ALL or n in GPT.BANKS}
        start = train_gpt.make_adapters(model, config) if self.low_rank else own
        start = {name: tensor.double() for name, tensor in start.items()}
        self.values = {name: tensor.requires_grad_() for name, tensor in start.items()}
        self.optimizer = self.make_optimizer(list(self.values.values()))

    def make_optimizer(self, tensors: list[torch.Tensor]) -> torch.optim.Optimizer:
        c = self.config
        if c.ttt_optimizer == "adamw":
            betas = (c.ttt_momentum, c.ttt_beta2)
            return torch.optim.AdamW(tensors, lr=1.0, betas=betas, eps=1e-10, weight_decay=c.ttt_weight_decay)
        return torch.optim.SGD(tensors, lr=1.0, momentum=c.ttt_momentum if c.ttt_optimizer == "sgd" else 0.0)

    def losses(self, tokens: np.ndarray, start: int, a: int, b: int) -> torch.Tensor:
        """Nats of the targets from A to B, read from START."""
        ids, banks, c = torch.from_numpy(tokens[start : b + 1].astype(np.int64)), None, self.config
        if self.low_rank:
            products = {n: self.values[f"{n}.b"] @ self.values[f"{n}.a"] for n in GPT.BANKS}
            factor = c.ttt_lora_alpha / c.ttt_lora_rank
            banks = {n: getattr(self.model, n) + factor * product for n, product in products.items()}
        log_p = self.model(ids[None, :-1], self.model.weights(banks))[0, a - start :].log_softmax(-1)
        return -log_p[torch.arange(b - a), ids[a - start + 1 :]]

    def score(self, *where) -> np.ndarray:
        with torch.no_grad():
            return self.losses(*where).numpy()

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the loss, clipped."""
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.ttt_grad_clip:
            torch.nn.utils.clip_grad_norm_(self.values.values(), self.config.ttt_grad_clip)
        return {name: value.grad for name, value in self.values.items()}

    @torch.no_grad()
    def apply(self, lr: float) -> None:
        """Go LR along the gradients that `gradients` left, which the moments have seen."""
        c, before = self.config, {name: value.clone() for name, value in self.values.items()}
        for name, value in self.values.items():
            if c.ttt_optimizer == "precond":
                value.grad = value.grad / self.moments.root(name)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for name, value in self.values.items():
            value.copy_(before[name] + self.rate(name) * (value - before[name]))

    def rate(self, name: str) -> torch.Tensor:
        c, bank, rate = self.config, name.split(".")[0], torch.ones_like(self.values[name])
        rate *= {"mlp_up_bank": c.ttt_in_lr_mult, "mlp_down_bank": c.ttt_out_lr_mult}.get(bank, 1.0)
        for frozen in range(c.ttt_freeze_blocks):
            if bank in GPT.BANKS:
                rate[[frozen, c.num_layers + frozen] if bank in ("qo_bank", "kv_bank") else frozen] = 0.0
            for block, row in enumerate(c.block_rows):
                rate *= 0.0 if row == frozen and name.startswith(f"blocks.{block}.") else 1.0
        return rate

    def step(self, loss: torch.Tensor, lr: float, document: int | None = None) -> None:
        gradients = self.gradients(loss)
        if self.config.ttt_optimizer == "precond":
            self.moments.observe(gradients, document)
        self.apply(lr)


# ------------------------------------------------------------------------------------------------------------
# Fast weights
# ------------------------------------------------------------------------------------------------------------


def model_of(config: Config, seed: int = 0) -> GPT:
    """Random weights in float64, and the words' beginnings where a lever asks for them."""
    model = GPT(config, torch.float64, word_start=TABLE.has_leading_space).double()
    model.load_state_dict(random_model(config, seed=seed).state_dict())
    return model.requires_grad_(False)


def fast_of(model: GPT, config: Config, learns: str, sets: int | None) -> FastWeights:
    """Fast weights of a float64 model, in float64 instead of float32, so that many digits can be compared."""
    fast, own = FastWeights(model, config, learns, sets), dict(model.named_parameters())
    assert {value.dtype for value in fast.values.values()} == {torch.float32}
    fast.base = {name: own.get(name, base).detach().double() for name, base in fast.base.items()}
    fast.values = {name: torch.stack([fast.base[name]] * len(value)) for name, value in fast.values.items()}
    return fast


def batch_of(seed: int, weights: tuple[float, ...], length: int = 12):
    """Token rows (for Hand), and for adaptation_step: ids, targets, columns, and each row's mean weights."""
    ids = random_ids(len(weights), length + 1, seed)
    weight = torch.tensor(weights, dtype=torch.float64)[:, None].expand(-1, length) / length
    return ids.numpy(), ids[:, :-1], ids[:, 1:], torch.arange(length).expand(len(weights), -1), weight


@pytest.mark.parametrize("config", [SMALL, LEVERS], ids=["small", "every lever"])
def test_each_row_of_a_batch_reads_its_own_set(config):
    """For every parameter by itself, and for all of them together."""
    model, (_, ids, targets, columns, _) = model_of(config), batch_of(0, (1.0, 1.0, 1.0))
    plain, others = (
        train_gpt.token_nll(model, ids, targets, columns),
        [model_of(config, seed) for seed in (1, 2, 3)],
    )
    names = [name for name, _ in model.named_parameters()]
    fast = fast_of(model, config, ALL, 3)
    assert set(fast.values) == set(names)
    for changed in [*([name] for name in names), names]:
        fast.begin()
        for name in changed:
            fast.values[name].copy_(torch.stack([other.get_parameter(name) for other in others]))
        together = train_gpt.token_nll(model, ids, targets, columns, *fast.weights(fast.used()))
        for row, other in enumerate(others):
            alone = model_of(config)
            alone.load_state_dict({n: other.get_parameter(n) for n in changed}, strict=False)
            part = slice(row, row + 1)
            expected = train_gpt.token_nll(alone, ids[part], targets[part], columns[part])
            torch.testing.assert_close(together[part], expected, rtol=0, atol=1e-9, msg=str(changed))
            assert not torch.allclose(expected, plain[part], atol=1e-6), changed


@pytest.mark.parametrize("sets", [None, 3])
def test_adapters_count_alpha_over_rank(sets):
    config = replace(LEVERS, ttt_lora_rank=3, ttt_lora_alpha=7.0)
    model, (text, ids, targets, columns, _) = model_of(config), batch_of(0, (1.0, 1.0, 1.0))
    fast, hands = (
        fast_of(model, config, "adapters", sets),
        [Hand(model, config, "adapters") for _ in range(3)],
    )
    plain = train_gpt.token_nll(model, ids, targets, columns)
    assert torch.equal(train_gpt.token_nll(model, ids, targets, columns, *fast.weights(fast.used())), plain)
    generator = torch.Generator().manual_seed(1)
    for name, value in fast.values.items():
        value.normal_(generator=generator)
        for row, hand in enumerate(hands):
            hand.values[name].detach().copy_(value[row if sets else 0])
    together = train_gpt.token_nll(model, ids, targets, columns, *fast.weights(fast.used()))
    for row, hand in enumerate(hands):
        np.testing.assert_allclose(together[row].numpy(), hand.score(text[row], 0, 0, 12), rtol=0, atol=1e-9)


def test_initial_adapters():
    """Input sides uniform within 1 / sqrt(in), by the seed; output sides zero."""
    model, config = random_model(SMALL), replace(SMALL, ttt_lora_rank=5, seed=3)
    pairs, same, other = (train_gpt.make_adapters(model, replace(config, seed=seed)) for seed in (3, 3, 4))
    assert set(pairs) == {f"{name}.{side}" for name in GPT.BANKS for side in "ab"}
    for name in GPT.BANKS:
        count, out, width = getattr(model, name).shape
        a, b = pairs[f"{name}.a"], pairs[f"{name}.b"]
        assert a.shape == (count, 5, width) and b.shape == (count, out, 5) and (b == 0).all()
        assert 0.9 * width**-0.5 < a.abs().max() <= width**-0.5 and not torch.equal(a[0], a[1])
        assert float(a.std()) == pytest.approx((3 * width) ** -0.5, rel=0.1) and abs(a.mean()) < 0.1 * a.std()
        assert torch.equal(same[f"{name}.a"], a) and not torch.equal(other[f"{name}.a"], a)


STEPS = {
    "sgd": dict(ttt_optimizer="sgd", ttt_grad_clip=0.0),
    "sgd with momentum": dict(ttt_optimizer="sgd", ttt_momentum=0.9, ttt_grad_clip=0.0),
    "sgd, clipped": dict(ttt_optimizer="sgd", ttt_momentum=0.5, ttt_grad_clip=0.7),
    "adamw": dict(ttt_optimizer="adamw", ttt_momentum=0.9, ttt_weight_decay=0.3),
    "adamw without momentum": dict(ttt_optimizer="adamw", ttt_beta2=0.9),
    "precond": dict(),
    "precond, own moments": dict(ttt_moments="own"),
    "frozen blocks": dict(ttt_freeze_blocks=2),
    "rates of the MLP": dict(
        ttt_in_lr_mult=0.5, ttt_out_lr_mult=3.0, ttt_optimizer="adamw", ttt_weight_decay=0.3
    ),
}
LEARN = [(1.0, 1.0, 1.0), (1.0, 0.5, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, 0.0)]  # the third document ends here


@pytest.mark.parametrize("learns", [ALL, "adapters"], ids=["all", "adapters"])
@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS)
def test_steps_of_documents_equal_steps_by_hand(changes, learns):
    """Documents side by side against each by itself;
    of the moments each has those of the documents before it."""
    config, lr = replace(LEVERS, **changes), 0.01
    model, moments = model_of(config), Moments(config)
    tolerance = 1e-5 if config.ttt_optimizer == "adamw" else 1e-7  # its corrections of the bias are float32
    fast = fast_of(model, config, learns, 3)
    fast.begin()
    hands = [Hand(model, config, learns, moments) for _ in range(3)]
    for number, weights in enumerate(LEARN):
        text, *batch = batch_of(number, weights)
        count = sum(weight > 0 for weight in weights)
        adaptation_step(model, fast, batch, lr, count)
        fast.moments.end_step()
        for row, hand in enumerate(hands[:count]):
            hand.step(weights[row] * hand.losses(text[row], 0, 0, 12).mean(), lr, row)
            for name, value in hand.values.items():
                torch.testing.assert_close(
                    fast.values[name][row], value.detach(), rtol=0, atol=tolerance, msg=name
                )
    moved = [name for name, base in fast.base.items() if not torch.equal(fast.values[name][0], base)]
    frozen = [f"blocks.{block}." for block in (0, 1, 3)] if config.ttt_freeze_blocks else ()
    assert moved == [name for name in fast.base if not name.startswith(tuple(frozen))]


@pytest.mark.parametrize("changes", [STEPS["sgd, clipped"], dict(ttt_beta2=0.6)], ids=["sgd", "precond"])
def test_one_set_for_all_rows_takes_one_gradient(changes):
    config = replace(LEVERS, **changes)
    model, moments = model_of(config), Moments(config)
    fast, hand = fast_of(model, config, ALL, None), Hand(model, config, ALL, moments)
    weights = (0.5, 0.25, 0.25)
    for number in range(3):
        text, *batch = batch_of(number, weights)
        adaptation_step(model, fast, batch, 0.01)
        hand.step(sum(w * hand.losses(text[row], 0, 0, 12).mean() for row, w in enumerate(weights)), 0.01)
    for name, value in hand.values.items():
        torch.testing.assert_close(fast.values[name][0], value.detach(), rtol=0, atol=1e-7, msg=name)


def test_what_a_step_leaves_alone():
    """A rate of zero, and a set that is not in use, stand still; all else moves."""
    config = replace(LEVERS, ttt_freeze_blocks=1, ttt_out_lr_mult=2.0)
    model, batch = model_of(config), batch_of(0, (1.0, 1.0))[1:]
    fast = fast_of(model, config, ALL, 4)
    fast.begin()
    fast.rows = torch.tensor([3, 1])
    adaptation_step(model, fast, batch, 0.01, 2)
    for name, value in fast.values.items():
        moves = torch.as_tensor(Hand(model, config, ALL).rate(name)).bool()
        moved = (value[[1, 3]] - fast.base[name]).abs()
        assert torch.equal(value[[0, 2]], torch.stack([fast.base[name]] * 2)) and not (moved * ~moves).any()
        assert (moved * moves).max() > 1e-7 or not moves.any()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "precond"])
def test_reset_forgets_all_but_the_moments(optimizer):
    """Two documents one after the other in one slot, while a third one is in another."""
    config = replace(LEVERS, ttt_optimizer=optimizer, ttt_momentum=0.9)
    model, moments = model_of(config), Moments(config)
    fast = fast_of(model, config, ALL, 2)
    fast.begin()
    other = Hand(model, config, ALL, moments)
    for document in (0, 2):
        hand = Hand(model, config, ALL, moments)
        fast.reset(torch.tensor([1]))
        fast.rows = torch.tensor([1, 0] if document == 0 else [0, 1])  # in document order
        for number in range(2):
            text, *batch = batch_of(2 * document + number, (1.0, 1.0))
            adaptation_step(model, fast, batch, 0.01, 2)
            fast.moments.end_step()
            for row, (each, name) in enumerate(
                sorted([(hand, document), (other, 1)], key=lambda pair: pair[1])
            ):
                each.step(each.losses(text[row], 0, 0, 12).mean(), 0.01, name)
        for each, slot in ((hand, 1), (other, 0)):
            for name, value in each.values.items():
                torch.testing.assert_close(
                    fast.values[name][slot], value.detach(), rtol=0, atol=1e-5, msg=name
                )
    fast.reset(torch.tensor([0]))
    assert all(torch.equal(value[0], fast.base[name]) for name, value in fast.values.items())
    assert not any(
        torch.equal(value[1], fast.base[name]) for name, value in fast.values.items() if value.numel() > 2
    )


@pytest.mark.parametrize("warm", [False, True])
def test_a_warm_start_keeps_the_input_sides(warm):
    model = model_of(SMALL)
    fast = fast_of(model, SMALL, "adapters", 2)
    fast.begin()
    for number in range(2):  # at the first one the input sides have no gradient
        adaptation_step(model, fast, batch_of(number, (1.0, 1.0))[1:], 0.01, 2)
    before = copy.deepcopy(fast.values)
    fast.reset(warm=warm)
    for name, value in fast.values.items():
        assert not torch.equal(before[name][0], fast.base[name])
        assert torch.equal(
            value, before[name] if warm and name.endswith(".a") else torch.stack([fast.base[name]] * 2)
        )


# ------------------------------------------------------------------------------------------------------------
# The prior of the second moments
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, context, clip", [(5, 0, 0.0), (5, 3, 0.3), (16, 0, 2.0)])
def test_the_prior_is_a_mean_over_chunks_of_generated_text(size, context, clip):
    """Of three sequences of two chunks each, in batches of two and one;
    a chunk counts as much as 7 scored ones."""
    config = replace(LEVERS, ttt_chunk_size=size, ttt_context=context, ttt_grad_clip=clip, ttt_prior_seqs=3,
                     ttt_prior_chunks=2, ttt_prior_weight=7.0)  # fmt: skip
    model, gradients = model_of(config), []
    for text in train_gpt.generate(model, 3, 2 * size + 1).numpy():
        for a in (0, size):
            hand = Hand(model, config, ALL)
            gradients.append(hand.gradients(hand.losses(text, max(0, a - context), a, a + size).mean()))
    prior = train_gpt.generated_moments(model, config, 2)
    assert float(prior[-1]) == 7 * 6
    found = FastWeights(model, config, ALL, 2).named(prior[None, :-1] / prior[-1])
    expected = Moments.mean([Moments.all_parts(each) for each in gradients])
    assert found.keys() == expected.keys()
    for name, parts in found.items():
        for part, mean in zip(parts, expected[name], strict=True):
            torch.testing.assert_close(part[0].double(), mean, rtol=1e-4, atol=1e-12, msg=name)


# ------------------------------------------------------------------------------------------------------------
# PPM
# ------------------------------------------------------------------------------------------------------------


def ppm(tokens: list[int], vocab: int) -> np.ndarray:
    """The distribution of what follows TOKENS:
    what the last one was followed by, then all there was, then evenly."""
    p, left, pairs = np.zeros(vocab), 1.0, list(pairwise(tokens))
    for followers in ([b for a, b in pairs if a == tokens[-1]], [b for _, b in pairs]):
        if followers:
            total, distinct = len(followers), len(set(followers))
            for token in followers:
                p[token] += left / (total + distinct)
            left *= distinct / (total + distinct)
    return p + left / vocab


@pytest.mark.parametrize("vocab, length", [(2, 60), (5, 150), (40, 150), (300, 100)])
def test_ppm_equals_its_definition(vocab, length):
    tokens = (np.random.default_rng(vocab).random(length) ** 2 * vocab).astype(np.uint16)
    expected = [-math.log(ppm(tokens[: t + 1].tolist(), vocab)[tokens[t + 1]]) for t in range(length - 1)]
    np.testing.assert_allclose(ppm_nll(tokens, vocab), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", [0, 1, 7, 30, 58])
def test_ppm_is_normalised_and_looks_back_only(place):
    tokens, vocab = (np.random.default_rng(1).random(60) ** 2 * 9).astype(np.uint16), 11
    before, p = ppm_nll(tokens, vocab), []
    for other in range(vocab):
        changed = tokens.copy()
        changed[place + 1] = other
        p.append(math.exp(-ppm_nll(changed, vocab)[place]))
        np.testing.assert_array_equal(ppm_nll(changed, vocab)[:place], before[:place])
    assert sum(p) == pytest.approx(1, abs=1e-12) and min(p) > 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_mixtures(alpha):
    nll, other = np.random.default_rng(0).uniform(0, 800, (2, 50))
    expected = -np.log(
        alpha * np.exp(-nll.astype(np.longdouble)) + (1 - alpha) * np.exp(-other.astype(np.longdouble))
    )
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(mixed_nll(nll, other, alpha), expected.astype(float), rtol=1e-12)


@pytest.mark.parametrize(
    "layers, frozen, expected",
    [("", 0, {0, 1, 2, 3, 4}), ("1", 0, {1}), ("0, 2", 1, {2}), ("2,0", 0, {0, 2})],
)
def test_only_the_chosen_layers_adapt(layers, frozen, expected):
    config = replace(LEVERS, ttt_layers=layers, ttt_freeze_blocks=frozen)
    fast = fast_of(model_of(config), config, "bank", 2)
    L = config.num_layers
    for name, rate in fast.rates.items():
        moving = {row % L for row in range(len(fast.base[name])) if rate[row] != 0}
        assert moving == expected, name
