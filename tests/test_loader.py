"""The order of training rows, the thread that reads them a step ahead, and shards that change under a run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_artifact import make_run
from test_cli import write_shard
from test_faults import start, step_begun  # noqa: F401 (a fixture)
from test_model import SMALL
from test_training import train_here

import train_gpt
from train_gpt import Loader, TokenStream, UserError, step_batches

ROOT = Path(__file__).resolve().parent.parent
# 62 windows an epoch, 11 tokens more; a step takes 12 rows, and epochs end within
TOKENS, LENGTH, ROWS = (
    1003,
    16,
    12,
)


@pytest.fixture
def text(tmp_path) -> TokenStream:
    """Three shards in which every token is its own position: what was read says where it was."""
    for index, (low, high) in enumerate(((0, 300), (300, 301), (301, TOKENS))):
        write_shard(tmp_path / f"fineweb_train_{index:06d}.bin", np.arange(low, high))
    return TokenStream(f"{tmp_path}/fineweb_train_*.bin", 65536)


def make(folder: Path, text: TokenStream, order: str = "shuffled", **changes) -> train_gpt.Run:
    settings = dict(
        train_seq_len=LENGTH, train_batch_tokens=ROWS * LENGTH, grad_accum_total=1, data_order=order
    )
    return make_run(folder, replace(SMALL, **settings | changes), train=text)


def rows_of(run: train_gpt.Run, steps) -> np.ndarray:
    """The inputs of the steps, row by row; targets are the tokens after them, round the end of the text."""
    found = []
    for step in steps:
        for inputs, targets in step_batches(run, step):
            assert inputs.shape == targets.shape and inputs.shape[1] == LENGTH
            np.testing.assert_array_equal(targets.numpy(), (inputs.numpy() + 1) % TOKENS)
            found.append(inputs.numpy())
    return np.concatenate(found)


# ------------------------------------------------------------------------------------------------------------
# Order
# ------------------------------------------------------------------------------------------------------------

WINDOWS = TOKENS // LENGTH


@pytest.fixture
def epochs(tmp_path, text) -> np.ndarray:
    """The inputs of four epochs, (epoch, window, position)."""
    rows = rows_of(make(tmp_path, text), range(-(-4 * WINDOWS // ROWS)))
    return rows[: 4 * WINDOWS].reshape(4, WINDOWS, LENGTH)


def test_an_epoch_has_every_token_once_but_for_the_rest_of_a_window(epochs):
    for epoch in epochs:
        for row in epoch:
            np.testing.assert_array_equal(row, (row[0] + np.arange(LENGTH)) % TOKENS)
        assert len(np.unique(epoch)) == epoch.size == TOKENS - TOKENS % LENGTH


def test_the_order_is_another_in_every_epoch(epochs):
    """Other windows, since they begin elsewhere, and not in the order of the text."""
    starts = epochs[:, :, 0]
    assert (
        len({int(min(epoch % LENGTH)) for epoch in starts}) > 1 or len({tuple(sorted(e)) for e in starts}) > 1
    )
    for first in range(4):
        for second in range(first):
            ranks = [np.argsort(np.argsort(starts[n])) for n in (first, second)]
            assert abs(np.corrcoef(*ranks)[0, 1]) < 0.5  # 0.13 is the standard deviation of chance
    for epoch in starts:
        assert abs(np.corrcoef(np.arange(WINDOWS), epoch)[0, 1]) < 0.5
        # neighbours in the text are none in the order
        assert np.mean(np.diff(epoch) % TOKENS == LENGTH) < 0.2


def test_every_place_of_the_text_comes_to_begin_a_window(tmp_path, text):
    """Over many epochs: the borders of windows move."""
    run = make(tmp_path, text)
    firsts = {
        int(rows_of(run, [step])[0, 0]) % LENGTH
        for step in range(0, 60 * WINDOWS // ROWS, WINDOWS // ROWS + 1)
    }
    assert len(firsts) > LENGTH / 2


def test_the_order_depends_on_the_seed_and_on_nothing_else(tmp_path, text):
    def order(**changes) -> np.ndarray:
        return rows_of(make(tmp_path, text, **changes), range(7))

    expected = order()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    np.testing.assert_array_equal(order(), expected)
    for changes in (dict(iterations=3), dict(grad_accum_total=4), dict(matrix_lr=0.5)):
        np.testing.assert_array_equal(order(**changes), expected)
    for seed in (1, 2):
        assert not np.array_equal(order(seed=seed), expected)


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 12])
def test_the_ranks_share_the_rows_of_one_process(tmp_path, monkeypatch, text, order, ranks):
    run = make(tmp_path, text, order, grad_accum_total=2)
    steps = (0, 4, 5, 6, 10**6)
    alone = {step: rows_of(run, [step]) for step in steps}
    monkeypatch.setattr(train_gpt, "world_size", lambda: ranks)
    for step in steps:
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(train_gpt, "rank", lambda rank=rank: rank)
            parts.append(rows_of(run, [step]))
        np.testing.assert_array_equal(np.concatenate(parts), alone[step])


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_a_late_step_reads_no_more_than_the_first(tmp_path, monkeypatch, text, order):
    """A run resumes anywhere at once: it reads no earlier batch and draws no earlier epoch's order."""
    run, read, draw = make(tmp_path, text, order), TokenStream.read, np.random.default_rng
    tokens, drawn = [], []
    monkeypatch.setattr(
        TokenStream, "read", lambda self, at, count: tokens.append(count) or read(self, at, count)
    )
    monkeypatch.setattr(np.random, "default_rng", lambda *args: drawn.append(args) or draw(*args))
    for step in (0, 10**6):
        tokens.clear()
        drawn.clear()
        step_batches(run, step)
        assert sum(tokens) <= ROWS * (LENGTH + 1) and len(drawn) <= (2 if order == "shuffled" else 0)
    drawn.clear()
    for step in range(10**6, 10**6 + 100):
        step_batches(run, step)
    assert len(drawn) <= 2 + -(-100 * ROWS // WINDOWS)  # an order is drawn once an epoch, not once a step


def test_sequential_rows_are_those_of_the_text(tmp_path, text):
    rows = rows_of(make(tmp_path, text, "sequential"), range(20))
    np.testing.assert_array_equal(rows.flatten(), np.arange(rows.size) % TOKENS)


@pytest.mark.parametrize("count", [LENGTH, LENGTH + 1])
def test_a_text_of_hardly_a_window_is_repeated(tmp_path, count):
    write_shard(tmp_path / "short.bin", np.arange(count))
    inputs, targets = step_batches(make(tmp_path, TokenStream(f"{tmp_path}/short.bin", 65536)), 3)[0]
    assert inputs.shape == (ROWS, LENGTH)
    np.testing.assert_array_equal(targets.numpy(), (inputs.numpy() + 1) % count)


def test_a_text_shorter_than_a_window_is_refused_in_any_order_but_its_own(env, tmp_path, capsys):
    write_shard(tmp_path / "short.bin", np.arange(63))
    given = {**env, "TRAIN_FILES": f"{tmp_path}/short.bin", "ITERATIONS": "2"}
    train_here({**given, "DATA_ORDER": "shuffled"}, tmp_path, code=2)
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ") and "short.bin" in error and "63" in error and "TRAIN_SEQ_LEN=64" in error
    )
    train_here(given, tmp_path)


# ------------------------------------------------------------------------------------------------------------
# A step ahead
# ------------------------------------------------------------------------------------------------------------


def assert_equal(got, expected) -> None:
    assert len(got) == len(expected)
    for pair, wanted in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, wanted, strict=True))


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_any_sequence_of_steps_gives_the_batches_that_were_asked_for(tmp_path, text, order):
    """In order, as training does; again, back, and far ahead, as no one does."""
    run = make(tmp_path, text, order, grad_accum_total=3)
    loader, dice = Loader(run), random.Random(0)
    steps = [0, 1, 2, 3, 3, 2, 10**6, 10**6 + 1, 0, *(dice.randrange(50) for _ in range(50))]
    for step in steps:
        assert_equal(loader.batches(step), step_batches(run, step))


def test_a_batch_that_was_given_is_not_written_to(tmp_path, text):
    run = make(tmp_path, text)
    loader = Loader(run)
    kept = [loader.batches(step) for step in range(6)]
    for step, batches in enumerate(kept):
        assert_equal(batches, step_batches(run, step))


def test_the_next_step_is_read_meanwhile_and_once(tmp_path, text, monkeypatch):
    read, done = [], threading.Event()

    def watched(run, step):
        read.append((step, threading.get_ident()))
        try:
            return step_batches(run, step)
        finally:
            if step == 1:
                done.set()

    monkeypatch.setattr(train_gpt, "step_batches", watched)
    loader = Loader(make(tmp_path, text))
    loader.batches(0)
    assert done.wait(30), "nobody reads step 1 before it is asked for"
    for step in range(1, 6):
        loader.batches(step)
    assert sorted(step for step, _ in read)[:6] == [0, 1, 2, 3, 4, 5] and len(read) <= 7
    assert all(thread != threading.get_ident() for step, thread in read if step)


@pytest.mark.parametrize(
    "error", [UserError("shard 7"), OSError(5, "Input/output error"), MemoryError("no more")]
)
def test_what_goes_wrong_in_the_thread_reaches_the_caller(tmp_path, text, monkeypatch, error):
    run = make(tmp_path, text)

    def broken(run, step):
        if step == 2:
            raise error
        return step_batches(run, step)

    monkeypatch.setattr(train_gpt, "step_batches", broken)
    loader = Loader(run)
    for step in (0, 1):
        assert_equal(loader.batches(step), step_batches(run, step))
    with pytest.raises(type(error)) as raised:
        loader.batches(2)
    assert str(raised.value) == str(error)


# ------------------------------------------------------------------------------------------------------------
# Shards that change
# ------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0\0")


def overwrite(path: Path) -> None:
    """As many bytes; a moment later, for file systems whose clock is coarse."""
    time.sleep(0.05)
    with open(path, "r+b") as file:
        file.seek(1024 + 100)
        file.write(b"\1\1")


def exchange(path: Path) -> None:
    """Another file with the same content and times under the name."""
    status = path.stat()
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(copy, path)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace_by_another(path: Path) -> None:
    """Another text of the same size and time under the name."""
    status, copy = path.stat(), path.with_name("copy")
    write_shard(copy, np.arange((status.st_size - 1024) // 2)[::-1])
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(copy, path)


CHANGES = [truncate, grow, overwrite, replace_by_another, touch, Path.unlink]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_shard_that_changes_is_named(tmp_path, text, change):
    """When it is read from, that is; the others are as good as before."""
    first, _, last = (Path(path) for path in text.paths)
    expected = text.read(0, 300)
    change(last)
    np.testing.assert_array_equal(text.read(0, 300), expected)
    for start in (295, 400, TOKENS - 5):  # noqa: F402
        with pytest.raises(UserError, match=re.escape(str(last))):
            text.read(start, 50)
    with pytest.raises(UserError, match=re.escape(str(last))):
        text.read_all()
    change(first)
    with pytest.raises(UserError, match=re.escape(str(first))):
        text.read(0, 1)


def list_shards(paths: list[str]) -> None:
    """The manifest.json of the shards, with their hashes."""
    rows = [dict(file=Path(path).name, split="train", tokens=os.path.getsize(path) // 2 - 512,
                 sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest()) for path in paths]  # fmt: skip
    content = dict(shards=rows, tokenizer=dict(sha256=""))
    Path(paths[0]).with_name("manifest.json").write_text(json.dumps(content))


def test_content_decides_where_a_shard_has_another_inode_or_time(tmp_path, text):
    """As on network mounts: the same bytes go on being read, also where the name leads to a copy."""
    expected, last = text.read(0, TOKENS), Path(text.paths[-1])
    for _ in range(3):
        exchange(last)
        np.testing.assert_array_equal(text.read(0, TOKENS), expected)
    list_shards(text.paths)
    touch(last)  # written in place, for all that the clock says: the listed hash says that it was not
    np.testing.assert_array_equal(text.read(0, TOKENS), expected)
    overwrite(last)
    with pytest.raises(UserError, match=re.escape(str(last))):
        text.read(0, TOKENS)


@pytest.fixture(scope="module")
def env(demo_data, tmp_path_factory) -> dict[str, str]:
    """The smoke recipe on a copy of its training shards, with a validation text of 500 tokens."""
    folder = tmp_path_factory.mktemp("data")
    for shard in demo_data.glob("fineweb_train_*.bin"):
        shutil.copyfile(shard, folder / shard.name)
    write_shard(folder / "val.bin", np.fromfile(demo_data / "fineweb_val_000000.bin", "<u2")[512 : 512 + 500])
    return dict(
        RECIPE=str(ROOT / "records/recipes/smoke.env"), TRAIN_FILES=f"{folder}/fineweb_train_*.bin",
        RUN_ID="run", VAL_FILES=str(folder / "val.bin"), TOKENIZER_PATH=f"{demo_data}/tokenizer.model",
        DEVICE="cpu", VAL_LOSS_EVERY="0", GPTQ_CALIB_BATCHES="0", QUANT_STEPS="sigmas",
        TRAIN_BATCH_TOKENS="512", WARMUP_STEPS="0",
    )  # fmt: skip


def test_a_run_under_which_a_shard_changes_stops_and_can_go_on(env, tmp_path, monkeypatch, capsys):
    """With exit code 2, as for all that users can put right,
    and with a checkpoint; the text is the same after all."""
    shard, take_step, steps = Path(env["TRAIN_FILES"].replace("*", "000000")), train_gpt.train_step, []

    def touching(*args):
        steps.append(len(steps))
        if len(steps) == 4:
            touch(shard)
        return take_step(*args)

    monkeypatch.setattr(train_gpt, "train_step", touching)
    given = {**env, "RESUME": "auto"}
    run = train_here(given, tmp_path, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(shard) in error and len(steps) <= 6
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == len(steps)
    train_here(given, tmp_path)
    assert json.loads((run / "result.json").read_text())["resumed"] == [checkpoint["step"]]


@pytest.mark.slow
@pytest.mark.parametrize("change", [touch, Path.unlink], ids=lambda f: f.__name__)
def test_two_processes_under_which_a_shard_changes(env, tmp_path, start, change):  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    for shard in Path(env["TRAIN_FILES"]).parent.glob("fineweb_train_*.bin"):
        shutil.copyfile(shard, data / shard.name)
    given = {**env, "ITERATIONS": "100000", "TRAIN_FILES": f"{data}/fineweb_train_*.bin"}
    job = start(tmp_path, given, "bare")
    assert job.wait_for(step_begun(5))
    for shard in data.iterdir():
        change(shard)
    codes = job.wait()
    assert 2 in codes and 0 not in codes
    assert re.search(rf"^error: {re.escape(str(data))}/fineweb_train_\d+\.bin", job.output(), re.M)


# ------------------------------------------------------------------------------------------------------------
# A loader that is too slow
# ------------------------------------------------------------------------------------------------------------


class LazyPool(ThreadPoolExecutor):
    """Stands in for a pool of threads: work is done when its result is asked for, never behind a step."""

    def submit(self, function, *args):
        future = Future()
        future.result = lambda timeout=None: function(*args)
        return future


@pytest.fixture
def imagined(monkeypatch):
    """A function that makes reads and steps take so many seconds by a clock that only they advance."""
    read, take_step, now = train_gpt.step_batches, train_gpt.train_step, [0.0]
    clock = SimpleNamespace(**{**vars(time), "perf_counter": lambda: now[0]})

    def taking(reading, stepping: float) -> None:
        def reads(run, step):
            now[0] += reading(step)
            return read(run, step)

        def steps(*args):
            now[0] += stepping
            return take_step(*args)

        for name, value in dict(
            step_batches=reads, train_step=steps, time=clock, ThreadPoolExecutor=LazyPool
        ).items():
            monkeypatch.setattr(train_gpt, name, value)

    return taking


def test_a_loader_that_is_slower_than_a_step_is_reported(env, tmp_path, imagined):
    imagined(lambda step: 0.1, 0.3)
    run = train_here({**env, "ITERATIONS": "16"}, tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["data_wait"] for row in rows if "train_loss" in row] == pytest.approx([0.1] * 16)
    warnings = re.findall(r"^WARNING: data loading.*$", (run / "train.log").read_text(), re.M)
    assert len(warnings) == 6 and all(warning.endswith("25% of the last 0.4 s") for warning in warnings)


def test_one_that_is_not_is_not(env, tmp_path, imagined):
    imagined(lambda step: 0.01, 0.3)
    run = train_here({**env, "ITERATIONS": "16"}, tmp_path)
    assert "WARNING: data loading" not in (run / "train.log").read_text()


def test_waits_are_added_up_between_the_rows_of_the_log(env, tmp_path, imagined):
    """From the eleventh step on there is a row for every fourth step, with the waits of four."""
    imagined(lambda step: 0.01 * (step + 1), 0.3)
    run = train_here({**env, "ITERATIONS": "16", "TRAIN_LOG_EVERY": "4"}, tmp_path)
    rows = {
        row["step"]: row["data_wait"]
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    expected = {step: 0.01 * step for step in range(1, 11)} | {12: 0.11 + 0.12, 16: 0.13 + 0.14 + 0.15 + 0.16}
    assert rows == pytest.approx(expected)
