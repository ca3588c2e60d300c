"""One, two and four processes: the same steps, statistics,
losses and scores, replicas without a different bit.

Each number of processes is started once, and does everything there; what one process does alone is the
reference. Forms that are compared closely run in float64, so that the order of additions does not show.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import run_ranks
from prepare import Job, prepare
from test_artifact import make_run
from test_cli import write_shard
from test_faults import free_port, outcome, start, step_begun  # noqa: F401 (a fixture)
from test_model import SMALL, random_ids, random_model
from test_scoring import TOKENS
from test_training import stream
from test_ttt_runs import RANKS as ADAPTATIONS
from test_ttt_runs import setup_of

import eval_ttt
import train_gpt

ROOT, WORLDS = Path(__file__).resolve().parent.parent, (2, 4)

# ------------------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------------------

CLIPPED = replace(SMALL, grad_clip_norm=0.3)
STEPPED = {  # rows of the banks: twice or once as many as layers
    "five layers": CLIPPED,
    "four layers": replace(CLIPPED, num_layers=4),
    "one layer, fewer rows than ranks": replace(CLIPPED, num_layers=1, ve_layers="0", xsa_last_n=1),
    "cautious, rates by depth, single matrices": replace(CLIPPED, cautious_muon=True, decoder_lr_mult=3.0,
                                                         mtp_num_heads=2),
    "levers, single matrices": replace(CLIPPED, muon_row_norm=True, muon_coeffs="polar", normuon_beta2=0.9,
                                       muon_cautious_wd=True, scalar_wd=0.1, attn_gate=7, smear_inputs=5,
                                       parallel_start_layer=3, mtp_num_heads=1),
    "unclipped": replace(SMALL, grad_clip_norm=0.0),
}  # fmt: skip
RATES = dict(matrix_lr=0.02, scalar_lr=0.01, tied_embed_lr=0.01, muon_wd=0.1, adam_wd=0.1)


def stepper(config) -> tuple[train_gpt.GPT, list[torch.optim.Optimizer], Callable[[int], dict]]:
    """A model, its optimisers, and a step on this rank's part of the rows of a step;
    it returns loss and weights."""
    model = random_model(replace(config, **RATES))
    optimizers = train_gpt.make_optimizers(model, model.config)

    def step(number: int) -> dict[str, torch.Tensor]:
        ids, targets = (random_ids(8, 12, 10 * number + k).chunk(train_gpt.world_size()) for k in (0, 1))
        batches = [(ids[train_gpt.rank()], targets[train_gpt.rank()])]
        scale, momentum = 1.0 - 0.1 * number, 0.8 + 0.03 * number
        measured = train_gpt.train_step(train_gpt.training_loss, model, batches, optimizers, scale, momentum)
        return dict(loss=measured.loss.clone()) | {
            name: p.detach().clone() for name, p in model.named_parameters()
        }

    return model, optimizers, step


def saved(model, optimizers) -> dict:
    """What a checkpoint has of them, by way of a file."""
    parts = dict(model=model.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers])
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def all_steps(other: dict | None) -> dict:
    """Four steps of each of STEPPED, and the state after two;
    the two that follow, from the state of OTHER ranks."""
    found = {}
    for name, config in STEPPED.items():
        model, optimizers, step = stepper(config)
        states = [step(0), step(1)]
        parts = saved(model, optimizers)
        states += [step(2), step(3)]
        found[name] = dict(states=states, saved=parts)
        if other is not None:
            model, optimizers, step = stepper(config)
            model.load_state_dict(other[name]["saved"]["model"])
            for optimizer, state in zip(optimizers, other[name]["saved"]["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            found[name]["went on"] = [step(2), step(3)]
        muon = optimizers[0]
        found[name]["shares"] = {key: list(muon.state[p]["momentum_buffer"].shape) for key, p in
                                 model.named_parameters() if p in muon.state}  # fmt: skip
    return found


def differing() -> list[list[str]]:
    """What comparing replicas names: first nothing, then after each change of the model on the last rank."""
    model, last = random_model(SMALL, torch.float32), train_gpt.rank() == train_gpt.world_size() - 1
    found = [train_gpt.differing_parameters(model)]

    def swap(p: torch.Tensor) -> None:
        p[[0, 1]] = p[[1, 0]]

    def up_and_down(p: torch.Tensor) -> None:
        bits = p.view(torch.int32).flatten()
        bits[3] += 1
        bits[4] -= 1

    for name, change in CHANGES:
        p = model.get_parameter(name).detach()
        before = p.clone()
        if last:
            {
                "swap": swap,
                "up and down": up_and_down,
                "one bit": lambda p: p.view(torch.int32).bitwise_xor_(1),
                "sign of zero": lambda p: p.flatten()[:1].zero_().neg_(),
                "nan": lambda p: p.fill_(math.nan),
            }[change](p)
        elif change == "sign of zero":
            p.flatten()[:1].zero_()
        found.append(train_gpt.differing_parameters(model))
        p.copy_(before)
    return found


CHANGES = [("qo_bank", "one bit"), ("smear.gate", "one bit"), ("ve_shared.scale", "one bit"),
           ("mlp_up_bank", "nan"), ("tok_emb.weight", "sign of zero"), ("kv_bank", "up and down"),
           ("mlp_down_bank", "swap")]  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# Statistics and adaptation
# ------------------------------------------------------------------------------------------------------------

STATISTICS = {  # batches: a multiple of no number of ranks, and fewer than four
    count: replace(SMALL, gptq_calib_batches=count, gptq_grad_batches=count, train_batch_tokens=8 * 16,
                   grad_accum_total=2)
    for count in (5, 3)
}  # fmt: skip


def statistics(folder: Path) -> dict:
    found = {}
    for count, config in STATISTICS.items():
        run = make_run(folder, config, train=stream(folder, 4000))
        given = train_gpt.read_statistics(run, random_model(config, torch.float32))
        found |= {f"{count} H {name}": [tensor] for name, tensor in given.hessians.items()}
        found |= {f"{count} g {name}": list(pair) for name, pair in given.gradients.items()}
    return found


def adaptation(name: str) -> tuple[np.ndarray, list[str]]:
    """The losses of an evaluation and, where all ranks learn one thing, a hash of it before each chunk."""
    setup, learners, hashes, init = setup_of(**ADAPTATIONS[name]), [], [], eval_ttt.Adaptation.__init__

    def keep(self, *args) -> None:
        init(self, *args)
        learners.append(self)

    def note(number: int) -> None:
        tensors = [value for learner in learners for value in learner.trainer.weights().values()]
        hashes.append(
            sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()
        )

    eval_ttt.Adaptation.__init__ = keep
    try:
        nll = eval_ttt.evaluate(setup, TOKENS, progress=note).nll
    finally:
        eval_ttt.Adaptation.__init__ = init
    return nll, hashes if setup.config.ttt_mode in ("all", "banks", "lora") else []


def in_float64(function: Callable, *args):
    """FUNCTION under float64 forwards."""
    before, train_gpt.compute_dtype = train_gpt.compute_dtype, lambda device: torch.float64
    try:
        return function(*args)
    finally:
        train_gpt.compute_dtype = before


# ------------------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------------------

WHOLE = {
    "plain": dict(CAUTIOUS_MUON="1", SWA_ENABLED="1", SWA_EVERY="2", SWA_THRESHOLD="0.7",
                  DATA_ORDER="shuffled", EMA_NESTEROV_BETA="0.3"),
    "fomaml": dict(META_TTT_ENABLED="1", META_TTT_EVERY="2", META_SGD_ENABLED="1", META_SGD_LR="0.1",
                   MTP_NUM_HEADS="1", PREFIX_LOSS_WEIGHT="0.25", MTP_WEIGHTS="0.5,0.25"),
    "late": dict(META_TTT_ENABLED="1", META_TTT_OBJECTIVE="deployed", META_TTT_TIME_FRAC="0.3",
                 META_TTT_DOCS="4", META_TTT_PIECES="3", REPTILE_ENABLED="1", REPTILE_TIME_FRAC="0.2",
                 REPTILE_TASKS="4", META_SGD_ENABLED="1", META_SGD_LR="0.1"),
}  # fmt: skip
EVALUATED = {"doc_banks": {}, "all": dict(TTT_MODE="all", TTT_CHUNK_TOKENS="256", TTT_LR="0.001")}
STOP_AFTER = 4
NO_GPTQ = dict(GPTQ_CALIB_BATCHES="0", GPTQ_GRAD_BATCHES="1")  # for runs that are not about it


class Place(NamedTuple):
    """Which process of how many this is; the port where they meet, for each program they run together."""

    rank: int
    world: int
    ports: list[int]


def whole_run(place: Place, folder: Path, env: dict[str, str], program: Callable = train_gpt.main) -> int:
    """The exit code of a program in FOLDER as one of the processes; standard output is dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    before, kept, ranks = os.getcwd(), dict(os.environ), {}
    if place.world > 1:
        ranks = dict(RANK=str(place.rank), WORLD_SIZE=str(place.world), LOCAL_RANK=str(place.rank),
                     MASTER_ADDR="localhost", MASTER_PORT=str(place.ports.pop()))  # fmt: skip
    os.chdir(folder)
    os.environ.update(ranks)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return program([], {**env, **ranks})
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(kept)
        if dist.is_initialized():
            dist.destroy_process_group()


def hash_of(model) -> str:
    return sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


@contextlib.contextmanager
def patched(name: str, value):
    before = getattr(train_gpt, name)
    setattr(train_gpt, name, value)
    try:
        yield before
    finally:
        setattr(train_gpt, name, before)


def hashed_run(place: Place, folder: Path, env: dict[str, str]) -> list[str]:
    """A run to its end; the hash of this rank's weights after training and of those that are scored."""
    hashes, read, load = [], train_gpt.read_statistics, train_gpt.load_model

    def after_training(run, model):
        hashes.append(hash_of(model))
        return read(run, model)

    def before_scoring(*args):
        model = load(*args)
        hashes.append(hash_of(model))
        return model

    with patched("read_statistics", after_training), patched("load_model", before_scoring):
        assert whole_run(place, folder, env) == 0
    return hashes


def stopped_run(place: Place, folder: Path, env: dict[str, str]) -> int:
    """The exit code of a run whose last rank has a SIGTERM in step STOP_AFTER of training."""
    calls, step = [0], train_gpt.train_step

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == STOP_AFTER and place.rank == place.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    with patched("train_step", counted):
        return whole_run(place, folder, env)


def differing_run(place: Place, folder: Path, env: dict[str, str]) -> str:
    """The error of a run in which the last rank's gates change by themselves in the third step."""
    calls, step = [0], train_gpt.train_step

    def spoiled(loss_fn, model, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 3 and place.rank == place.world - 1:
            model.smear.gate.data[5] += 1e-3
        return step(loss_fn, model, *args, **kwargs)

    with patched("train_step", spoiled), pytest.raises(RuntimeError) as error:
        whole_run(place, folder, {**env, **NO_GPTQ, "CHECKPOINT_EVERY": "1", "TRAIN_LOG_EVERY": "1"})
    return str(error.value)


POISONED = ("mlp_up_bank", "bigram.scale")


def poisoned_run(place: Place, folder: Path, env: dict[str, str], name: str) -> tuple[int, str]:
    """Exit code and error of a run in which the last rank has no number for a gradient in its third step."""
    calls, loss_of, errors = [0], train_gpt.training_loss, io.StringIO()

    def poisoned(model, *args):
        calls[0] += len(args) == 3  # with weights: a step, not the timing before the first
        loss = loss_of(model, *args)
        if calls[0] == 3 and place.rank == place.world - 1:
            loss = loss + (0 * model.get_parameter(name).flatten()[-1]).sqrt()  # 0, and its slope is 0 / 0
        return loss

    settings = {**env, **NO_GPTQ, "CHECKPOINT_EVERY": "1", "GRAD_ACCUM_TOTAL": "1", "TRAIN_LOG_EVERY": "9"}
    with patched("training_loss", poisoned), contextlib.redirect_stderr(errors):
        return whole_run(place, folder, settings), errors.getvalue()


STEP_SECONDS = (0.01, 0.07)  # by the clocks of the fast rank and of the slow one


def uneven_run(place: Place, folder: Path, env: dict[str, str]) -> int:
    """Return the number of steps that this rank takes until one second has passed by the ranks' clocks.

    The clocks count steps instead of seconds, and no measured time is reserved for GPTQ.
    """
    calls, step, seconds = [0], train_gpt.train_step, train_gpt.Clock.seconds

    def counted(*args, **kwargs):
        calls[0] += 1
        return step(*args, **kwargs)

    settings = {**env, **NO_GPTQ, "MAX_WALLCLOCK_SECONDS": "1.0", "ITERATIONS": "100000"}
    train_gpt.Clock.seconds = lambda clock: calls[0] * STEP_SECONDS[place.rank]
    try:
        with patched("train_step", counted), patched("statistics_seconds", lambda *args: 0.0):
            assert whole_run(place, folder, settings) == 0
    finally:
        train_gpt.Clock.seconds = seconds
    return calls[0]


def runs(place: Place, work: Path, env: dict[str, str]) -> dict:
    """Whole runs, of each kind by one and two processes; a run that is stopped;
    runs that go on where another number of processes stopped."""
    names = WHOLE if place.world <= 2 else ("plain",)
    found = {name: hashed_run(place, work / name, {**env, **WHOLE[name]}) for name in names}
    if place.world == 1:
        for name in EVALUATED:
            hand_over(work / "plain/runs/run", work / name)
    for name, changes in EVALUATED.items():
        given = {**env, **changes, "MODEL_PATH": f"{work}/{name}/final_model.int6.ptz"}
        found[f"evaluated {name}"] = whole_run(place, work / name, given, eval_ttt.main)
    going_on = {**env, **WHOLE["plain"], "RESUME": "auto"}
    found["stopped"] = in_float64(stopped_run, place, work / "stopped", going_on)
    for folder in sorted(work.glob("from_*")):
        found[folder.name] = hashed_run(place, folder, going_on)
    if place.world == 2:
        rates, errors = (
            dict(SCALAR_LR="1e38", TIED_EMBED_LR="1e38", MATRIX_LR="1e38", CHECKPOINT_EVERY="1"),
            io.StringIO(),
        )
        with contextlib.redirect_stderr(errors):
            code = whole_run(place, work / "no number", {**env, **NO_GPTQ, **rates})
        found["no number"] = code, errors.getvalue()
        found["differing run"] = differing_run(place, work / "differing", env)
        for name in POISONED:
            found[f"poisoned {name}"] = poisoned_run(place, work / f"poisoned_{name}", env, name)
        found["uneven"] = uneven_run(place, work / "uneven", env)
    return found


def hand_over(folder: Path, to: Path) -> None:
    shutil.copytree(folder, to)


def worker(rank: int, world: int, work: Path, env: dict[str, str], ports: list[int], one: Path) -> None:
    """All that one of WORLD processes does."""
    torch.set_num_threads(1)
    place = Place(rank, world, list(ports))
    dist.init_process_group("gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=world)
    other, mine = torch.load(one, weights_only=False), work / f"data{rank}"
    mine.mkdir()
    found = dict(steps=all_steps(other), differing=differing(), statistics=statistics(mine))
    found["adaptation"] = in_float64(lambda: {name: adaptation(name) for name in ADAPTATIONS})
    dist.destroy_process_group()
    torch.save(found | runs(place, work, env), work / f"{rank}.pt")


def made_documents(count: int) -> list[str]:
    """Return `count` documents of made-up words, each word followed by one of eight:
    the same under every Python."""
    draw = random.Random(1337)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))) for _ in range(500)]
    frequencies = [1 / rank for rank in range(1, len(words) + 1)]
    following = {word: draw.choices(words, frequencies, k=8) for word in words}

    def sentence() -> str:
        said = draw.choices(words, frequencies)
        while len(said) < 5 or draw.random() < 0.9:
            said += draw.choices(following[said[-1]], [8, 7, 6, 5, 4, 3, 2, 1])
        return " ".join(said).capitalize() + "."

    return [" ".join(sentence() for _ in range(draw.randrange(4, 24))) for _ in range(count)]


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """The smoke recipe for ten steps on a text of its own, with a validation text of 300 tokens."""
    base = tmp_path_factory.mktemp("text")
    documents, data = made_documents(300), base / "data"
    for name, part in (("train", documents[20:]), ("val", documents[:20])):
        (base / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    prepare(Job((base / "train.jsonl",), data, "made", val_inputs=(base / "val.jsonl",)))
    shard = base / "fineweb_val_000000.bin"
    write_shard(shard, np.fromfile(data / "fineweb_val_000000.bin", "<u2")[512 : 512 + 300])
    return dict(
        RECIPE=str(ROOT / "records/recipes/smoke.env"), DATA_PATH=str(data), VAL_FILES=str(shard),
        RUN_ID="run", TOKENIZER_PATH=f"{data}/tokenizer.model", DEVICE="cpu", ITERATIONS="10",
        VAL_LOSS_EVERY="0", GPTQ_CALIB_BATCHES="3", TRAIN_SEQ_LEN="32", TRAIN_BATCH_TOKENS="512",
        TTT_CHUNK_SIZE="32", TTT_BATCH_SEQS="4", EVAL_BUDGET_SECONDS="1000000", WARMUP_STEPS="0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(env, tmp_path_factory) -> dict[int, list[dict]]:
    """What each rank of 1, 2 and 4 processes found.
    One process hands a stopped run over to two, two to one and four.

    The folders of their runs are in `works`.
    """
    base = tmp_path_factory.mktemp("ranks")
    works, one = {world: base / str(world) for world in (1, *WORLDS)}, Place(0, 1, [])
    for work in works.values():
        work.mkdir()
    steps = all_steps(None)
    torch.save(steps, base / "one.pt")
    alone = dict(steps=steps, statistics=statistics(works[1]))
    alone["adaptation"] = in_float64(lambda: {name: adaptation(name) for name in ADAPTATIONS})
    found = {1: [alone | runs(one, works[1], env)]}
    hand_over(works[1] / "stopped", works[2] / "from_1")
    for world in WORLDS:
        for name in EVALUATED:  # the same artifact everywhere
            hand_over(works[1] / "plain/runs/run", works[world] / name)
        ports = [free_port() for _ in range(20)]
        run_ranks(worker, (world, works[world], env, ports, base / "one.pt"), world)
        found[world] = [torch.load(works[world] / f"{rank}.pt", weights_only=False) for rank in range(world)]
        if world == 2:
            hand_over(works[2] / "stopped", works[4] / "from_2")
            hand_over(works[2] / "stopped", works[1] / "from_2")
            found[1][0]["from_2"] = hashed_run(
                one, works[1] / "from_2", {**env, **WHOLE["plain"], "RESUME": "auto"}
            )
    return found | {"works": works}


# ------------------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------------------


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        # which is kept in float32
        limit = max(tolerance, 2e-6) if tolerance and name == "loss" else tolerance
        torch.testing.assert_close(
            got[name], tensor, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", STEPPED)
def test_ranks_take_the_steps_of_one_process(done, world, name):
    """Different rows on each rank; the gradients are clipped, so that the norm is that of the mean."""
    alone = done[1][0]["steps"][name]["states"]
    moved = {key: (alone[3][key] - alone[2][key]).abs().max() for key in alone[0]}
    assert all(moved[key] > 1e-4 for key in ("qo_bank", "mlp_down_bank", "tok_emb.weight", "loss"))
    if name == "five layers":  # the limit bites
        free = done[1][0]["steps"]["unclipped"]["states"]
        assert (free[0]["tok_emb.weight"] - alone[0]["tok_emb.weight"]).abs().max() > 1e-10
        assert (free[3]["qo_bank"] - alone[3]["qo_bank"]).abs().max() > 1e-6
    for part in done[world]:
        for got, expected in zip(part["steps"][name]["states"], alone, strict=True):
            assert_near(got, expected, 1e-9)
    for part in done[world][1:]:
        for got, first in zip(
            part["steps"][name]["states"], done[world][0]["steps"][name]["states"], strict=True
        ):
            assert_near(got, first, 0.0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", STEPPED)
def test_each_rank_keeps_the_momentum_of_its_rows_alone(done, world, name):
    whole = done[1][0]["steps"][name]["shares"]
    for part in done[world]:
        shares = part["steps"][name]["shares"]
        assert list(shares) == list(whole)
        for key, shape in whole.items():
            rows = [math.ceil(shape[0] / world)] if len(shape) == 3 else [shape[0]]
            assert shares[key] == rows + shape[1:], key
    assert any(len(shape) == 2 for shape in whole.values()) == ("single matrices" in name)


def flattened(tree, path: str = "") -> dict[str, object]:
    if isinstance(tree, dict):
        return {k: v for key, part in tree.items() for k, v in flattened(part, f"{path}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for key, part in enumerate(tree) for k, v in flattened(part, f"{path}/{key}").items()}
    return {path: tree}


def assert_same_tree(got, expected, tolerance: float) -> None:
    got, expected = flattened(got), flattened(expected)
    assert sorted(got) == sorted(expected)
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                got[path], value, rtol=0, atol=tolerance, msg=lambda m, path=path: f"{path} {m}"
            )
        else:
            assert got[path] == value, path


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", STEPPED)
def test_the_state_that_ranks_save_is_that_of_one_process(done, world, name):
    for part in done[world]:
        assert_same_tree(part["steps"][name]["saved"], done[1][0]["steps"][name]["saved"], 1e-9)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", STEPPED)
def test_a_state_goes_from_any_number_of_ranks_to_any_other(done, world, name):
    """From one process to several there; from several to one here."""
    expected = done[1][0]["steps"][name]["states"][2:]
    for part in done[world]:
        for got, state in zip(part["steps"][name]["went on"], expected, strict=True):
            assert_near(got, state, 1e-9)
    model, optimizers, step = stepper(STEPPED[name])
    parts = done[world][0]["steps"][name]["saved"]
    model.load_state_dict(parts["model"])
    for optimizer, state in zip(optimizers, parts["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for number, state in zip((2, 3), expected, strict=True):
        assert_near(step(number), state, 1e-9)


@pytest.mark.parametrize("world", WORLDS)
def test_replicas_that_differ_are_named_on_every_rank(done, world):
    """A bit, a number that is none, a sign, and changes that leave a sum as it is."""
    for part in done[world]:
        assert part["differing"][0] == []
        for (name, change), found in zip(CHANGES, part["differing"][1:], strict=True):
            assert found == [name], (name, change, found)


# ------------------------------------------------------------------------------------------------------------
# Statistics and adaptation
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_share_the_statistics_of_one_process(done, world):
    """Five batches and three: one rank has more than another, or one has none."""
    alone = done[1][0]["statistics"]
    assert {key[:3] for key in alone} == {f"{count} {kind}" for count in STATISTICS for kind in "Hg"}
    for part in done[world]:
        assert list(part["statistics"]) == list(alone)
        for key, expected in alone.items():
            first = done[world][0]["statistics"][key]
            for got, tensor, same in zip(part["statistics"][key], expected, first, strict=True):
                assert (got - tensor).norm() <= 1e-4 * tensor.norm() and tensor.norm() > 0, key
                assert torch.equal(got, same), key


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ADAPTATIONS)
def test_ranks_adapt_as_one_process_and_stay_the_same(done, world, name):
    alone, hashes = done[1][0]["adaptation"][name]
    for part in done[world]:
        nll, seen = part["adaptation"][name]
        np.testing.assert_array_equal(nll, done[world][0]["adaptation"][name][0])
        np.testing.assert_allclose(nll, alone, rtol=0, atol=1e-5)
        assert seen == done[world][0]["adaptation"][name][1] and len(seen) == len(hashes)
    if name in ("all", "banks by loss", "lora"):
        assert len(hashes) > 2 and len(set(hashes)) == len(hashes)  # something is learned from every chunk


# ------------------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------------------


def curve(folder: Path) -> list[float]:
    """Every loss of training and of later phases, in order."""
    log = (folder / "runs/run/train.log").read_text()
    steps = re.findall(
        r"^(?:step|reptile_step|deployed_step|meta_step):\d+.*?(?:loss|after):([\d.]+)", log, re.M
    )
    return [float(loss) for loss in steps]


def result_of(folder: Path) -> dict:
    return json.loads((folder / "runs/run/result.json").read_text())


TOLERANCE = 5e-4  # nats of a loss after ten steps in float32, whatever the number of processes


@pytest.mark.parametrize(("world", "name"), [*((2, name) for name in WHOLE), (4, "plain")])
def test_whole_runs_do_not_depend_on_the_number_of_processes(done, world, name):
    one, other = (done["works"][n] / name for n in (1, world))
    losses = curve(one)
    assert len(losses) >= 10 and max(losses) - min(losses) > 0.5
    np.testing.assert_allclose(curve(other), losses, rtol=0, atol=TOLERANCE)
    first, second = result_of(one), result_of(other)
    assert second["world_size"] == world and second["late_steps"] == first["late_steps"]
    for key in ("val_loss_roundtrip", "val_loss_sliding"):
        assert second[key] == pytest.approx(first[key], abs=4 * TOLERANCE)
    for key, factors in first["meta_rates"].items():
        assert second["meta_rates"][key] == pytest.approx(factors, abs=1e-3)
    assert len({tuple(part[name]) for part in done[world]}) == 1 and len(done[world][0][name]) == 2


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", EVALUATED)
def test_the_evaluator_does_not_depend_on_the_number_of_processes(done, world, name):
    first, second = (json.loads((done["works"][n] / name / "eval_ttt.json").read_text()) for n in (1, world))
    assert [part[f"evaluated {name}"] for part in done[world]] == [0] * world
    assert first["ttt_gain_bpb"] != 0 and second["world_size"] == world
    for key in ("val_loss_ttt", "val_loss_sliding", "val_loss_roundtrip"):
        assert second[key] == pytest.approx(first[key], abs=1e-5), key


def test_a_checkpoint_goes_on_on_any_number_of_processes(done):
    expected = curve(done["works"][1] / "plain")
    assert [part["stopped"] for world in (1, *WORLDS) for part in done[world]] == [143] * 7
    for world, before in ((2, 1), (1, 2), (4, 2)):
        folder = done["works"][world] / f"from_{before}"
        log = (folder / "runs/run/train.log").read_text()
        assert re.search(rf"^stopped: SIGTERM after step:{STOP_AFTER}\b", log, re.M)
        assert re.search(
            rf"^resumed: phase:train step:{STOP_AFTER} world_size:{world} \(was {before}\)$", log, re.M
        )
        np.testing.assert_allclose(curve(folder), expected, rtol=0, atol=TOLERANCE)
        assert result_of(folder)["resumed"] == [STOP_AFTER] and result_of(folder)["world_size"] == world
        assert len({tuple(part[folder.name]) for part in done[world]}) == 1


def test_checkpoints_of_any_number_of_processes_hold_the_same(done):
    """Runs whose forwards are in float64.

    In float32 the gradients of one and four processes differ by 1e-7, and Cautious Muon adds or leaves
    out a whole entry of the update (0.18) where the gradient's sign does: one entry (-6e-9, 7e-9)
    moved a weight by 3.5e-3.
    """
    contents = [
        torch.load(done["works"][world] / "stopped/runs/run/checkpoint.pt", weights_only=True)
        for world in (1, *WORLDS)
    ]
    times = {"seconds", "strict", "ranks"}
    for content in contents[1:]:
        assert set(content) == set(contents[0])
        kept = [{key: value for key, value in c.items() if key not in times} for c in (content, contents[0])]
        assert_same_tree(*kept, 1e-4)


def test_replicas_that_differ_stop_the_run(done):
    for part in done[2]:
        assert re.search(r"\bstep 3\b", part["differing run"]) and "smear.gate" in part["differing run"]
    checkpoint = torch.load(done["works"][2] / "differing/runs/run/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2


@pytest.mark.parametrize("name", POISONED)
def test_a_gradient_that_is_no_number_on_one_rank_stops_all_and_is_named(done, name):
    for part in done[2]:
        code, error = part[f"poisoned {name}"]
        assert code == 1 and re.fullmatch(
            rf"error: step 3: the gradient of {re.escape(name)} is (nan|inf)\n", error
        )
    run = done["works"][2] / f"poisoned_{name}/runs/run"
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2 and all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert not (run / "result.json").exists() and not (run / "final_model.pt").exists()


def test_ranks_whose_clocks_differ_take_as_many_steps(done):
    """A fifteenth step would end at 1.05 s on the slow rank's clock; the fast rank alone would take 99."""
    steps = [part["uneven"] for part in done[2]]
    assert steps == [14, 14] and result_of(done["works"][2] / "uneven")["steps"] == 14


# ------------------------------------------------------------------------------------------------------------
# Processes that die, wait, or lie on two machines
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "whom, how, timeout, within",
    [
        ("rank 0", signal.SIGKILL, "600", 30),
        ("rank 1", signal.SIGSTOP, "3", 40),
        pytest.param("rank 1", signal.SIGKILL, "600", 30, marks=pytest.mark.slow),
        pytest.param("rank 0", signal.SIGSTOP, "3", 40, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_ends_the_other_within_a_bounded_time(
    start,  # noqa: F811
    env,
    tmp_path,
    whom,
    how,
    timeout,
    within,
):
    """Killed: at once, whatever DIST_TIMEOUT. Stopped, as on a machine that hangs: after DIST_TIMEOUT."""
    job = start(tmp_path, {**env, "ITERATIONS": "100000", "DIST_TIMEOUT": timeout}, "bare")
    assert job.wait_for(step_begun(3))
    victim, other = job.started[:: 1 if whom == "rank 0" else -1]
    victim.send_signal(how)
    code = other.wait(within)
    assert code not in (0, 143)
    victim.kill()
    assert not (job.run / "result.json").exists()


def test_a_loss_that_is_no_number_stops_every_rank(done):
    (code, error), other = (part["no number"] for part in done[2])
    assert (code, error) == other and code == 1
    step = re.fullmatch(r"error: step (\d+): train_loss is (?:nan|inf)\n", error)
    checkpoint = done["works"][2] / "no number/runs/run/checkpoint.pt"
    if checkpoint.exists():
        assert torch.load(checkpoint, weights_only=True)["step"] < int(step[1])


def test_two_agents_on_one_machine_train_what_one_agent_trains(start, env, tmp_path, done):  # noqa: F811
    """`--nnodes=2 --rdzv_backend=c10d`, as on two machines:
    the same weights as two processes of one, bit for bit.

    The machine without rank 0 needs no run folder, and is left nothing.
    """
    settings = {**env, **WHOLE["plain"]}
    job = start(tmp_path, settings, "agents")
    assert job.wait(120) == [0, 0], job.output()
    assert not list((tmp_path / "machine 2").iterdir())
    got, expected = outcome(job.run), outcome(done["works"][2] / "plain/runs/run")
    assert got.rows == expected.rows and got.artifact == expected.artifact and got.scores == expected.scores
    assert all(torch.equal(got.weights[name], tensor) for name, tensor in expected.weights.items())


def leave_after_work(rank: int, folder: str) -> None:
    """Native threads before, with, and after a process group, to FOLDER."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    counts = [threads()]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    train_gpt.on_rank_0(lambda: "a word")
    train_gpt.max_over_ranks(1.0)
    counts.append(threads())
    train_gpt.cleanup_distributed()
    counts.append(threads())
    Path(folder, f"{rank}.json").write_text(json.dumps(counts))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that does may meet the end of the interpreter, and abort a run that is done."""
    run_ranks(leave_after_work, (str(tmp_path),), 2)
    for rank in range(2):
        before, within, after = json.loads((tmp_path / f"{rank}.json").read_text())
        assert within > before == after
