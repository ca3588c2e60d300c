"""Evaluation by documents in slots: neither later text nor ranks change a loss; few graphs; the prior."""

import functools
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import run_ranks
from test_cli import write_shard
from test_meta import documents_of, exact, live_model
from test_model import SMALL, random_model
from test_ttt_runs import SGD, TINY, setup_of

import eval_ttt
import train_gpt
from eval_ttt import Setup, evaluate, score_plan
from train_gpt import BOS_ID, MetaRates, deployed_step, inner_weights

# Two plain blocks: half the time of TINY, which has every lever.
PLAIN = dict(num_layers=2, block_order="", model_dim=16, mlp_mult=2.0, ve_enabled=False, xsa_last_n=1,
             bigram_vocab_size=0, num_memory_tokens=0, unet_skips=False, skip_gates=False,
             pos_conditional_bigram=False, word_start_boost=False)  # fmt: skip
PRIOR = dict(ttt_prior_seqs=3, ttt_prior_chunks=1)
LORA = dict(ttt_mode="doc_lora", ttt_lr=0.3)
ADAMW = dict(ttt_optimizer="adamw", ttt_momentum=0.9, ttt_weight_decay=0.1, ttt_lr=3e-3)
PHASED = dict(ttt_mode="phased", phased_ttt_prefix_docs=6, phased_ttt_num_phases=3, ttt_batch_seqs=3,
              ttt_lr=0.1, global_ttt_lr=0.01)  # fmt: skip


def plain_setup(**changes) -> Setup:
    return setup_of(**PLAIN | changes)


def text_of(lengths: list[int], seed: int = 0) -> np.ndarray:
    """Documents of so many targets each, and the BOS that ends the last one."""
    rng = np.random.default_rng(seed)
    parts = [np.append(BOS_ID, rng.integers(2, 38, length - 1)) for length in lengths]
    return np.concatenate([*parts, [BOS_ID]]).astype(np.uint16)


def borders(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Half-open range of the targets of each document."""
    starts = [i for i in range(len(tokens) - 1) if i == 0 or tokens[i] == BOS_ID]
    return list(pairwise([*starts, len(tokens) - 1]))


# ------------------------------------------------------------------------------------------------------------
# What stands later in the file
# ------------------------------------------------------------------------------------------------------------

# Documents of MANY are so short that two groups of them fill a batch each.
FEW, MANY = [13, 1, 22, 6, 2, 17, 9, 11], [9, 3, *[7, 11, 4, 8] * 5, 2, 11]
CAUSAL = {
    "precond": (FEW, {}),
    "precond, every lever": (FEW[:5], {name: getattr(TINY, name) for name in PLAIN}),
    "prior": (FEW, PRIOR),
    "prior, groups": (FEW, PRIOR | dict(ttt_groups=3, ttt_slots=2)),
    "one slot": (FEW, dict(ttt_slots=1, ttt_context=3)),
    "more slots than rows": (MANY, dict(ttt_slots=20, ttt_chunk_size=4, **PRIOR)),
    "more slots than rows, groups, context": (MANY + MANY[:14],
                                              dict(ttt_slots=20, ttt_groups=2, ttt_context=4)),
    "windows side by side, two epochs": (FEW, dict(eval_stride=12, ttt_epochs=2, ttt_lr=0.005, **PRIOR)),
    "own moments": (FEW, dict(PRIOR, ttt_moments="own")),
    "momentum": (FEW, dict(**SGD, ttt_context=7)),
    "momentum, more slots than rows": (MANY, dict(**SGD, ttt_slots=20, ttt_lr=0.003)),
    "adamw, groups": (FEW, dict(**ADAMW, ttt_groups=2)),
    "low rank": (FEW, LORA | dict(ttt_lr=0.003)),
    "low rank, more slots than rows": (MANY, LORA | dict(ttt_lr=0.003, ttt_slots=20, ttt_chunk_size=4)),
    "low rank, momentum, warm start": (FEW, dict(**LORA, **SGD, ttt_warm_start_a=True)),
    "low rank, warm start, groups": (FEW, LORA | dict(ttt_lr=0.003, ttt_warm_start_a=True, ttt_groups=2)),
    "phased": (FEW, dict(**PHASED)),
    "phased, momentum, groups, one slot": (FEW, dict(**PHASED, **SGD, ttt_groups=2, ttt_slots=1)),
    "phased, more slots than rows": (MANY, PHASED | dict(phased_ttt_prefix_docs=22, phased_ttt_num_phases=1,
                                                         ttt_slots=20)),
}  # fmt: skip


def other_ends(tokens: np.ndarray, cut: int, kind: int) -> np.ndarray:
    """A text that has the targets before CUT in common with TOKENS,
    and none of the later borders of documents."""
    more = {
        0: [30, 4, 19, 7],  # the document at the cut goes on for some windows
        1: [1, 1, 3, 25, 2, 1, 14, 8],  # it ends a target later, and so do all slots' documents, soon
        2: [],  # the file ends here
        3: [5, 40, 3, 1, 33, 21, 16, 9],  # a file of more text and more documents
    }[kind]
    tail = text_of(more, 100 * cut + kind) if more else tokens[:0]
    return np.concatenate([tokens[: cut + 1], tail if kind == 1 else tail[1:]])


def cuts_of(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Where texts are cut, and how they go on:
    within the first document, whose age decides shapes, and later."""
    spans = borders(tokens)[1:]
    places = sorted(
        {place for low, high in spans for place in (low, (low + high) // 2 + 1) if place < len(tokens) - 2}
    )
    later = places[1 :: max(1, len(places) // 4)]
    return [(5, 1), (6, 2), (12, 0), *((cut, (number + 3) % 4) for number, cut in enumerate(later))]


def changed_losses(setup: Setup, tokens: np.ndarray) -> list[int]:
    """For each cut: how many losses before it change with what stands after it."""
    whole, counts = evaluate(setup, tokens).nll, []
    assert np.isfinite(whole).all() and abs(whole - score_plan(setup, tokens).nll).max() > 0.01
    for cut, kind in cuts_of(tokens):
        other = other_ends(tokens, cut, kind)
        assert np.array_equal(other[: cut + 1], tokens[: cut + 1])
        counts.append(int((evaluate(setup, other).nll[:cut] != whole[:cut]).sum()))
    return counts


@pytest.mark.parametrize("lengths, changes", CAUSAL.values(), ids=CAUSAL)
def test_no_loss_depends_on_what_stands_later(lengths, changes):
    """Bit for bit; also at a border of phases, where the base learns from earlier documents only."""
    setup, tokens = plain_setup(**changes), text_of(lengths)
    batches = {len(list(train_gpt.batches_of(chunk, train_gpt.SLOT_ROWS))) for chunk in setup.plan(tokens)}
    assert (max(batches) == 2) == (setup.config.ttt_slots > train_gpt.SLOT_ROWS)
    assert changed_losses(setup, tokens) == [0] * len(cuts_of(tokens))


@pytest.mark.parametrize("changes", [{}, dict(ttt_groups=2), dict(ttt_prior_seqs=3)], ids=str)
def test_shared_moments_depend_on_what_stands_later(changes):
    """The control of the test above: it sees it where earlier losses change."""
    assert max(changed_losses(plain_setup(ttt_moments="shared", **changes), text_of(FEW))) > 0


SICK = 39  # a token of no other document
OVERFLOW = {
    "precond, prior, groups": ({**PRIOR, "ttt_groups": 2}, np.nan),
    "precond, squares overflow": (dict(ttt_grad_clip=0.0), 1e25),
    "more slots than rows": (dict(ttt_slots=20, ttt_chunk_size=4), np.nan),
    "momentum": (SGD, np.inf),
    "adamw": (ADAMW, np.nan),
    "low rank": (LORA | dict(ttt_lr=0.003, ttt_groups=2), np.nan),
    "phased": (PHASED, np.nan),
}  # fmt: skip


def with_sick_document(lengths: list[int], number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text, the same with one document of SICK alone, and the document of each target."""
    tokens, (low, high) = text_of(lengths), borders(text_of(lengths))[number]
    other = tokens.copy()
    other[low + 1 : high] = SICK
    return tokens, other, np.repeat(np.arange(len(lengths)), lengths)


@pytest.mark.parametrize("changes, factor", OVERFLOW.values(), ids=OVERFLOW)
def test_a_document_that_overflows_changes_no_earlier_loss(changes, factor):
    """Its losses times FACTOR. No other group sees it,
    and nobody where each document has its own optimizer alone."""

    def sick_nll(model, ids, *rest):
        sick = (ids == SICK).sum(1, keepdim=True) > 2
        return train_gpt.token_nll(model, ids, *rest) * torch.where(sick, factor, 1.0)

    setup, number = replace(plain_setup(**changes), nll_fn=sick_nll), 5
    tokens, other, document = with_sick_document(MANY if changes.get("ttt_slots") else FEW, number)
    healthy, sick = evaluate(setup, tokens).nll, evaluate(setup, other).nll
    assert np.isfinite(healthy).all() and not np.array_equal(
        sick[document == number], healthy[document == number]
    )
    untouched, c = document < number, setup.config
    if c.ttt_mode != "phased":
        untouched |= document % c.ttt_groups != number % c.ttt_groups
    if c.ttt_optimizer != "precond":
        untouched |= document != number
    np.testing.assert_array_equal(sick[untouched], healthy[untouched])
    later = sick[~untouched & (document != number)]
    assert len(later) == 0 or not np.array_equal(later, healthy[~untouched & (document != number)])


@pytest.mark.parametrize(
    "changes", [{}, LORA | dict(ttt_lr=0.003), SGD], ids=["precond", "low rank", "momentum"]
)
def test_infinite_embeddings_of_a_later_document_change_no_earlier_loss(changes):
    setup, (tokens, other, document) = plain_setup(**changes), with_sick_document(FEW, 5)
    setup.artifact.state["tok_emb.weight"][SICK] = np.inf
    healthy, sick = evaluate(setup, tokens).nll, evaluate(setup, other).nll
    assert np.isfinite(healthy).all() and np.isnan(sick[document == 5][1:]).all()
    np.testing.assert_array_equal(sick[document < 5], healthy[document < 5])


def test_shared_moments_see_a_later_document_overflow():
    """The control of the tests above."""
    setup, (tokens, other, document) = (
        plain_setup(ttt_moments="shared", ttt_slots=6),
        with_sick_document(FEW, 5),
    )
    setup.artifact.state["tok_emb.weight"][SICK] = np.inf
    healthy, sick = evaluate(setup, tokens).nll, evaluate(setup, other).nll
    assert (sick != healthy)[document < 5].any()


# ------------------------------------------------------------------------------------------------------------
# Ranks
# ------------------------------------------------------------------------------------------------------------

FOUR = dict(ttt_groups=4, ttt_slots=2)
ON_RANKS = {
    "prior": (FOUR | PRIOR, (2, 4)),
    "low rank": (FOUR | LORA | dict(ttt_lr=0.003), (2, 4)),
    "more slots than rows": (PRIOR | dict(ttt_groups=2, ttt_slots=20, ttt_chunk_size=4), (2,)),
    "a rank without a group": (PRIOR | dict(ttt_groups=2), (3,)),
    "a rank without a group, low rank": (LORA | dict(ttt_groups=2, ttt_lr=0.003), (3,)),
}
RUNS = [(name, world) for name, (_, worlds) in ON_RANKS.items() for world in worlds]


def scores_and_prior(changes: dict) -> tuple[np.ndarray, torch.Tensor]:
    """Losses of the evaluation, and the prior that its learner had."""
    learners = []
    found = evaluate(
        plain_setup(**changes), text_of(MANY), lambda model, learner, *_: learners.append(learner)
    )
    return found.nll, learners[0].trainer.fast.moments.start if learners else torch.zeros(0)


def work_of_a_rank(rank: int, folder: str) -> None:
    """As 4, 3 and 2 ranks, one world after the other; then the deployed episode, in float64."""
    torch.set_num_threads(1)
    for world in (4, 3, 2):
        if rank >= world:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
        found = {name: scores_and_prior(ON_RANKS[name][0]) for name, size in RUNS if size == world}
        if world == 2:
            torch.set_default_dtype(torch.float64)
            found["deployed"] = {last: episode(EPISODE, last) for last in EPISODES}
            torch.set_default_dtype(torch.float32)
        torch.save(found, f"{folder}/{world}.{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, list[dict]]:
    """What each rank of each world found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(work_of_a_rank, (str(folder),), 4)
    files = {world: [folder / f"{world}.{rank}.pt" for rank in range(world)] for world in (2, 3, 4)}
    return {world: [torch.load(path, weights_only=False) for path in paths] for world, paths in files.items()}


@pytest.mark.parametrize("name, world", RUNS)
def test_any_number_of_ranks_gets_the_same_losses(ranks, name, world):
    """Bit for bit, in float32: a group's batches, moments and prior are those of one rank."""
    alone, prior = scores_and_prior(ON_RANKS[name][0])
    for found in ranks[world]:
        losses, start = found[name]
        np.testing.assert_array_equal(losses, alone)
        assert len(start) == 0 or torch.equal(start, prior)  # a rank without a group scores nothing
    assert sum(len(found[name][1]) > 0 for found in ranks[world]) == min(
        world, ON_RANKS[name][0]["ttt_groups"]
    )
    assert bool(prior.any()) == (name != "low rank" and "low rank" not in name)


# ------------------------------------------------------------------------------------------------------------
# The step that training deploys
# ------------------------------------------------------------------------------------------------------------

EPISODE = replace(SMALL, meta_ttt_enabled=True, meta_ttt_objective="deployed", meta_ttt_docs=4,
                  meta_ttt_pieces=4, eval_seq_len=12, ttt_chunk_size=5, ttt_lr=3e-3, ttt_slots=4,
                  ttt_context=2, **PRIOR)  # fmt: skip
SIZES = [15, 7, 20]
# size and seed of the last
EPISODES = {
    "another": (13, 50),
    "shorter": (6, 50),
    "longer": (20, 50),
    "same": (13, 3),
}


def episode(c: train_gpt.Config, last: str, before: int = 0) -> dict[str, torch.Tensor]:
    """Fast weights and moments of this rank's documents after an episode,
    or after the last of BEFORE + 1 of them."""
    model, (size, seed) = live_model(c), EPISODES[last]
    fast = exact(inner_weights(model, c, "deployed"), model)
    if fast.wants_prior:  # as deployed_phase does
        fast.moments.start = train_gpt.generated_moments(model, c, fast.sets)
    rows, sizes = documents_of([*SIZES, size], 20, 9)
    rows[3], sizes[3] = documents_of([size], 20, seed)[0], size
    for number in range(before):
        deployed_step(model, fast, MetaRates(model, c), *documents_of([20, 18, 16, 11], 20, 70 + number))
    loss = deployed_step(model, fast, MetaRates(model, c), rows, sizes)
    found = {name: value.clone() for name, value in fast.values.items()}
    return found | dict(
        own=fast.moments.own.clone(), total=fast.moments.total, start=fast.moments.start, loss=loss
    )


DEPLOYED_AS = {"precond": {}, "low rank": dict(ttt_mode="doc_lora"), "shared": dict(ttt_moments="shared")}


@pytest.fixture
def double():
    """Float64 throughout; conftest.py sets it back."""
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("changes", DEPLOYED_AS.values(), ids=DEPLOYED_AS)
def test_every_episode_begins_with_the_prior(double, changes):
    """Whatever came before it, an episode leaves the same, bit for bit."""
    c = replace(EPISODE, **changes)
    alone, later = episode(c, "same"), episode(c, "same", before=2)
    assert all(torch.equal(later[name], value) for name, value in alone.items())
    assert (
        bool(alone["start"].any()) == (c.ttt_mode == "doc_banks") and alone["total"][-1] > alone["start"][-1]
    )


def test_moments_of_an_episode_count_earlier_documents(double):
    """Of each document and those before it: all chunks except last ones, adapted on by its own end."""
    found, steps = episode(EPISODE, "longer"), [-(-size // 5) - 1 for size in [*SIZES, 20]]
    prior = EPISODE.ttt_prior_seqs * EPISODE.ttt_prior_chunks
    expected = [prior + sum(min(one, own) for one in steps[: number + 1]) for number, own in enumerate(steps)]
    assert found["own"][:, -1].tolist() == expected and found["total"][-1] == prior + sum(steps)


@pytest.mark.parametrize("last", ["another", "shorter", "longer"])
def test_a_later_document_of_an_episode_changes_no_earlier_one(double, ranks, last):
    alone, other = episode(EPISODE, "same"), episode(EPISODE, last)
    for name in (*live_model(EPISODE).state_dict(), "own"):
        assert torch.equal(alone[name][:3], other[name][:3]), name
        first = ranks[2][0]["deployed"]
        assert torch.equal(first[last][name], first["same"][name]), name
    assert not torch.equal(alone["qo_bank"][3], other["qo_bank"][3])


@pytest.mark.parametrize("last", EPISODES)
def test_an_episode_on_two_ranks_is_that_of_one(double, ranks, last):
    """Each rank has half of the documents; the moments of the second's are of the first's too."""
    alone, (first, second) = episode(EPISODE, last), (found["deployed"][last] for found in ranks[2])
    for name in (*live_model(EPISODE).state_dict(), "own"):
        both = torch.cat([first[name], second[name]])
        torch.testing.assert_close(both, alone[name], rtol=1e-6, atol=1e-9, msg=name)
    for name in ("total", "start"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, alone["loss"], rtol=1e-8, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Graphs
# ------------------------------------------------------------------------------------------------------------

COMPILED = {
    "doc_banks": {},
    "doc_lora": {"TTT_MODE": "doc_lora"},
    "phased": {"TTT_MODE": "phased", "PHASED_TTT_PREFIX_DOCS": "9", "PHASED_TTT_NUM_PHASES": "3"},
}


def many_lengths() -> np.ndarray:
    """Documents from one target to several windows of 32."""
    lengths = [40, 1, 7, 70, 3, 2, 33, 64, 9, 5, 31, 4, 12, 1, 17, 24, 6, 32, 11, 2]
    return np.append(text_of(lengths), 5).astype(np.uint16)


@pytest.fixture
def artifact(demo_data, tmp_path) -> dict[str, str]:
    """Settings of an evaluation of a random model with the demo's tokenizer on documents of many lengths."""
    tokenizer, shard = demo_data / "tokenizer.model", tmp_path / "fineweb_val_000000.bin"
    config = replace(SMALL, vocab_size=1024, model_dim=16, num_layers=1, mlp_mult=2.0, ve_enabled=False,
                     bigram_vocab_size=0, xsa_last_n=0)  # fmt: skip
    records = train_gpt.quantize_state_dict(
        random_model(config, torch.float32).state_dict(), train_gpt.Statistics(), config
    )
    content = train_gpt.encode_artifact(config, records, train_gpt.sha256_file(tokenizer))
    (tmp_path / "final_model.int6.ptz").write_bytes(content)
    write_shard(shard, many_lengths())
    return dict(MODEL_PATH=str(tmp_path / "final_model.int6.ptz"), TOKENIZER_PATH=str(tokenizer),
                VAL_FILES=str(shard), DATA_PATH=str(tmp_path), DEVICE="cpu", USE_COMPILE="1",
                EVAL_SEQ_LEN="32", EVAL_STRIDE="8", EVAL_BATCH_SEQS="4", TTT_CHUNK_SIZE="4",
                TTT_BATCH_SEQS="4", TTT_GROUPS="2", TTT_SLOTS="3", TTT_PRIOR_SEQS="2", TTT_LR="0.001",
                TTT_PRIOR_CHUNKS="1")  # fmt: skip


@pytest.mark.parametrize("changes", COMPILED.values(), ids=COMPILED)
def test_few_graphs_and_none_after_warm_up(artifact, monkeypatch, changes):
    """A whole evaluation by a stand-in for the compiler;
    `made`: graphs, and where the parts of it begin and end."""
    made, parts = [], {name: getattr(eval_ttt, name) for name in ("warm_up", "evaluate", "window_scores")}

    def backend(module, inputs):
        made.append("graph")
        return module.forward

    def said(name):
        def part(*args, **kwargs):
            made.append(name)
            found = parts[name](*args, **kwargs)
            made.append(f"{name} done")
            return found

        return part

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for name in parts:
        monkeypatch.setattr(eval_ttt, name, said(name))
    assert eval_ttt.main([], artifact | changes) == 0
    result = json.loads(Path(artifact["MODEL_PATH"]).with_name("eval_ttt.json").read_text())
    assert abs(result["ttt_gain_bpb"]) > 1e-3
    scored = [n for n, what in enumerate(made) if what == "evaluate"][1:]  # the first one is the warm-up's
    ends = [n for n, what in enumerate(made) if what == "evaluate done"][1:]
    windows = [n for n, what in enumerate(made) if what in ("window_scores", "window_scores done")]
    assert made[0] == "warm_up" and len(scored) == 2 and len(windows) == 4
    for begin, end in [*zip(scored, ends, strict=True), windows[2:]]:
        assert "graph" not in made[begin:end], made
    assert made.count("graph") == {"doc_banks": 8, "doc_lora": 7, "phased": 8}[result["settings"]["ttt_mode"]]


# ------------------------------------------------------------------------------------------------------------
# The prior
# ------------------------------------------------------------------------------------------------------------


def priors(setup: Setup, tokens: np.ndarray, monkeypatch) -> list[torch.Tensor]:
    """The moments with which each group begins."""
    found, begin = {}, train_gpt.SecondMoments.begin

    def spy(self, group):
        begin(self, group)
        found.setdefault(group, self.total.clone())

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.SecondMoments, "begin", spy)
        evaluate(setup, tokens)
    return [found[group] for group in range(setup.config.ttt_groups)]


def test_the_prior_is_the_artifacts_alone(monkeypatch):
    """The same for every group, text, seed and state of the process; another artifact has another."""
    setup = plain_setup(ttt_groups=3, ttt_slots=2, **PRIOR)
    first, *others = priors(setup, text_of(FEW), monkeypatch)
    assert first[-1] == 3 and first[:-1].any() and (first >= 0).all()
    torch.manual_seed(1)
    others += priors(setup, text_of(MANY, 1), monkeypatch)
    others += priors(plain_setup(ttt_groups=3, ttt_slots=2, seed=7, **PRIOR), text_of(FEW), monkeypatch)
    assert all(torch.equal(other, first) for other in others) and len(others) == 8
    state = setup.artifact.state | {"qo_bank": setup.artifact.state["qo_bank"] + 0.5}
    other = replace(setup, artifact=setup.artifact._replace(state=state))
    assert not torch.equal(priors(other, text_of(FEW), monkeypatch)[0], first)


NO_PRIOR = {
    "no sequences": dict(ttt_prior_seqs=0),
    "low rank": dict(PRIOR, **LORA),
    "phased": dict(PRIOR, **PHASED),
    "momentum": dict(PRIOR, **SGD),
}


@pytest.mark.parametrize("changes", NO_PRIOR.values(), ids=NO_PRIOR)
def test_who_has_no_prior(changes, monkeypatch):
    """Nothing is generated, and the sums begin with nothing."""
    monkeypatch.setattr(train_gpt, "generate", lambda *_: pytest.fail("generated"))
    assert not any(start.any() for start in priors(plain_setup(**changes), text_of(FEW), monkeypatch))


# ------------------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------------------

REFUSED = {"TTT_LR_SCHEDULE": "cosine", "TTT_TOP_FRAC": "0.5"}


@pytest.mark.parametrize("mode", [mode for mode in train_gpt.TTT_MODES if mode != "none"])
@pytest.mark.parametrize("name, value", REFUSED.items())
def test_what_depends_on_other_documents_is_refused(artifact, capsys, mode, name, value):
    """By documents: the text's length and other documents' losses. By flat chunks both are settings."""
    given = {"TTT_MODE": mode, name: value}
    of_the_base = mode == "phased" and name == "TTT_LR_SCHEDULE"
    if of_the_base or not train_gpt.TTT_MODES[mode][0]:
        train_gpt.load_config(given)
        return
    assert eval_ttt.main([], artifact | given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{name}={value}" in error and f"TTT_MODE={mode}" in error
