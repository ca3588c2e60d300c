"""Inputs of the tools for runs that another program may have written: mutated, they are read or refused.

INPUT_CASES=N runs N mutations of each kind instead of a few.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import analyze
import launch
import ledger
import numpy as np
import optuna
import pack
import page
import plan
import pytest
import runfiles
import sweep
import track
from conftest import ROOT
from files import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inputs_data import CASES, FEW, altered, bounded, changed, edits, write_altered
from test_sweep import environment

SOME = settings(FEW, max_examples=max(CASES // 4, 4))  # of slow ones
RESULT = {"val_bpb_sliding": 1.5, "val_bpb_roundtrip": 1.6, "steps": 20, "step_avg_ms": 3.5, "bytes_model": 9,
          "tokens_per_second": 7.5, "bytes_total": 12, "train_seconds": 3.0, "strict_seconds": 4.5,
          "bytes_total_packed": None, "fits": True, "legal": True}  # fmt: skip
EVALUATION = {"val_bpb_ttt": 1.4, "ttt_gain_bpb": 0.1, "val_bpb_plan": 1.5, "eval_seconds": 2.0,
              "legal": True, "audit": None, "settings": {"ttt_mode": "banks"}, "sha256_nll": "0" * 64,
              "sha256_shards": {"fineweb_val_000000.bin": "0" * 64}}  # fmt: skip
CONFIG = {"config": {"train_batch_tokens": 1024, "ttt_mode": "none", "muon_wd": 0.1}, "given": {"seed": 3},
          "versions": {"python": "3"}}  # fmt: skip
CLASSES = {"classes": [
    {"name": "position 0+", "targets": 90, "before": 3.5, "after": 3.25, "gain_error": 0.1},
    {"name": "word start", "targets": 50, "before": 4.5, "after": 4.25, "gain_error": None},
]}  # fmt: skip
METRICS = [{"step": 0, "seconds": 0.1, "val_loss": 7.0, "val_bpb": 3.0}] + [
    {"step": i, "seconds": i + 0.5, "train_loss": 7 - i / 9, "lr_scale": 1.0, "grad_norm": 0.5}
    for i in range(1, 9)
]
DOCUMENTS = f"{','.join(page.COLUMNS)}\n0,0,98,147,314.25,311.5\n1,98,35,71,117.5,117.25\n".encode()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run with an evaluation, as far as tables, curves and pages read it."""
    folder = tmp_path / "run [1]"
    evaluation = folder / "eval/banks"
    evaluation.mkdir(parents=True)
    for path, content in ((folder / "result.json", RESULT), (folder / "config.json", CONFIG),
                          (folder / "eval_ttt.json", EVALUATION), (evaluation / "eval_ttt.json", EVALUATION),
                          (evaluation / "distribution.json", CLASSES)):  # fmt: skip
        path.write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, METRICS)) + "\n")
    (evaluation / "documents.csv").write_bytes(DOCUMENTS)
    return folder


def use_all(folder: Path) -> None:
    """Do with a run what tables, plots and pages do with its numbers, but for the drawing."""
    found = {"a": analyze.read_run(folder)}
    analyze.run_rows(found), analyze.mode_rows(found)
    for by in analyze.AXES:
        if by != "tokens" or analyze.is_number(found["a"].config.get("train_batch_tokens")):
            analyze.series(found["a"], "train_loss", by)
    page.class_section({"a": folder / "eval/banks"}, "")
    page.document_section({"a": page.read_documents(folder / "eval/banks")}, {}, "")
    list(track.rows(folder, {"train_batch_tokens": 8, "matrix_lr": 0.5})), track.scores(folder)


FILES = {"result.json": RESULT, "config.json": CONFIG, "metrics.jsonl": METRICS,
         "eval/banks/eval_ttt.json": EVALUATION, "eval/banks/distribution.json": CLASSES,
         "eval/banks/documents.csv": None}  # fmt: skip


def mutate(folder: Path, name: str, change: tuple, changes: list[tuple]) -> bool:
    """Write a changed file into a run; return whether it is as it was."""
    value, same = change
    if name == "metrics.jsonl":
        text = b"\n".join(json.dumps(row).encode() for row in value)
        (folder / name).write_bytes(changed(text, changes))
    elif value is None:
        (folder / name).write_bytes(changed(DOCUMENTS, changes))
    else:
        write_altered(folder / name, value, changes)
        if name.endswith("eval_ttt.json"):
            shutil.copy(folder / name, folder / "eval_ttt.json")
    return same and not changes


@pytest.mark.parametrize("name", FILES)
def test_mutated_runs_are_read_or_refused(run: Path, name: str) -> None:
    @FEW
    @given(altered(FILES[name]), edits())
    def check(change: tuple, changes: list[tuple]) -> None:
        is_same = mutate(run, name, change, changes)
        try:
            use_all(run)
        except ValueError as error:
            assert not is_same and Path(name).name in str(error), error

    with bounded():
        check()


def test_what_can_be_read_of_a_mutated_run_can_be_drawn(run: Path, tmp_path: Path, capsys) -> None:
    kept = {name: (run / name).read_bytes() for name in FILES}

    @SOME
    @given(st.data(), st.sampled_from(list(FILES)), edits(), st.booleans())
    def check(data: st.DataObject, name: str, changes: list[tuple], as_page: bool) -> None:
        is_same = mutate(run, name, data.draw(altered(FILES[name])), changes)
        option = ["--html", str(tmp_path / "a.html")] if as_page else ["--out", str(tmp_path / "a.png")]
        code, said = analyze.main([*option, str(run)]), capsys.readouterr().err
        assert code == 0 or (code == 2 and not is_same and said.startswith("error: ")), said
        (run / name).write_bytes(kept[name])
        (run / "eval_ttt.json").write_bytes(kept["eval/banks/eval_ttt.json"])

    with bounded():
        check()


def test_mutated_losses_are_read_or_refused(tmp_path: Path) -> None:
    path, losses = tmp_path / "nll.npy", np.linspace(0, 9, 50, dtype=np.float32)
    np.save(path, losses)
    content = path.read_bytes()

    @FEW
    @given(edits())
    def check(changes: list[tuple]) -> None:
        path.write_bytes(changed(content, changes))
        try:
            found = runfiles.read_nll(path)
        except InputError as error:
            assert changes and str(path) in str(error)
        else:
            assert found.dtype in (np.float32, np.float64) and (changes or np.array_equal(found, losses))

    with bounded():
        check()


def test_losses_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "nll.npy"
    huge = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    for write in (
        lambda file: np.save(file, np.array([{}], object), allow_pickle=True),
        lambda file: np.savez(file, a=np.zeros(3, np.float32)),
        lambda file: np.save(file, np.array(["text"])),
        lambda file: np.save(file, np.zeros(3, np.int64)),
        lambda file: file.write(huge.ljust(127) + b"\n" + bytes(400)),
        lambda file: file.write(b"\x93NUMPY\x01\x00v\x00" + b"(" * 118),
    ):
        with open(path, "wb") as file:
            write(file)
        with bounded(), pytest.raises(InputError, match=r"nll\.npy is not an nll\.npy of eval_ttt\.py"):
            runfiles.read_nll(path)


# ------------------------------------------------------------------------------------------------------------
# Sweeps, ledgers, plans
# ------------------------------------------------------------------------------------------------------------

LEDGER = "\t".join(ledger.COLUMNS) + "\n" + "".join(
    "\t".join(["x", "x", "x", bpb, "9", "9", verdict, "note", "x", "x", "9", "x"]) + "\n"
    for bpb, verdict in (("1.500000", "keep"), ("-", "crash"), ("1.600000", "discard"))
)  # fmt: skip
PREFLIGHT = {"processes": 8, "train_batch_tokens": 786432, "flops_per_token": 9, "ms_per_step": 70.5,
             "statistics_seconds": 3.5, "export_seconds": 4.5, "sliding_seconds": 30,
             "adapted_seconds": 90}  # fmt: skip
SPACE = b"""trials = 20
seeds = [1, 2]
[space]
ITERATIONS = [1, 2]
MATRIX_LR = {low = 0.01, high = 0.1, log = true}
[rows]
small = {NUM_LAYERS = 2, XSA_LAST_N = 1}
large = {NUM_LAYERS = 3, XSA_LAST_N = 0}
"""


def read_preflight(path: Path) -> dict:
    config = type("Config", (), dict(ttt_mode="banks", train_batch_tokens=786432))
    return plan.read_preflight(path, config, 8)


READERS: dict[str, tuple[bytes, Callable, Callable]] = {  # content, reader, whether that was read
    "ledger.tsv": (
        LEDGER.encode(), ledger.read,
        lambda lines: (ledger.is_best(1.4, lines), ledger.is_best(1.5, lines)) == (True, False)),
    "preflight.log": (
        b"warming up\nPREFLIGHT " + json.dumps(PREFLIGHT).encode() + b"\nall limits will be kept\n",
        read_preflight, PREFLIGHT.__eq__),
    "space.toml": (
        SPACE, lambda path: sweep.read_space(path, [], {}),
        lambda space: list(space.kinds) == ["row", "ITERATIONS", "MATRIX_LR"] and space.seeds == [1, 2]),
    "result.json": (
        json.dumps(RESULT).encode(), lambda path: launch.finished_result(path.parent), RESULT.__eq__),
    "packed.json": (
        json.dumps({"key": {"size": 3, "sha256": "0"}}).encode(), lambda path: pack.read_cache(),
        {"key": {"size": 3, "sha256": "0"}}.__eq__),
    "program.py": (
        b"def f(x):\n    return f'{x}'\n", lambda path: pack.pack_file(path, path.parent / "out"),
        lambda sizes: sizes[0] == 28),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_or_refused(tmp_path: Path, name: str, monkeypatch) -> None:
    content, read, is_right = READERS[name]
    path = tmp_path / name
    monkeypatch.setattr(plan, "flops", lambda config: 9)
    monkeypatch.setattr(pack, "CACHE", tmp_path / "packed.json")

    @FEW
    @given(edits())
    def check(changes: list[tuple]) -> None:
        path.write_bytes(changed(content, changes))
        try:
            assert is_right(read(path)) or changes
        except ValueError as error:
            assert changes and (name == "space.toml" or name in str(error)), error

    with bounded():
        check()


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> bytes:
    """The database of a study with a complete trial, one that failed, and one of another tool."""
    path = tmp_path_factory.mktemp("study") / "study.db"
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    made = optuna.create_study(storage=storage, study_name="s")
    scored = {"val_bpb_sliding": 1.5, "bytes_total": 9, "fits": True, "strict_seconds": 2.5}
    choices = optuna.distributions.CategoricalDistribution(["1", "2"])
    for ticket, (state, more) in enumerate(
        (("COMPLETE", {"results": [scored]}), ("FAIL", {"why": "memory"}))
    ):
        attributes = {"ticket": ticket, "attempt": 0} | more
        made.add_trial(optuna.trial.create_trial(
            state=optuna.trial.TrialState[state], value=1.5 if state == "COMPLETE" else None,
            params={"ITERATIONS": str(ticket + 1)}, distributions={"ITERATIONS": choices},
            user_attrs=attributes))  # fmt: skip
    made.add_trial(optuna.trial.create_trial(value=7.0))
    storage.remove_session()
    return path.read_bytes()


def overwrite(path: Path, table: str, column: int, value: object) -> None:
    """Set one column of all rows of a table."""
    with closing(sqlite3.connect(path)) as database, suppress(sqlite3.IntegrityError), database:
        names = [row[1] for row in database.execute(f"pragma table_info({table})")]
        database.execute(f"update or ignore {table} set {names[column % len(names)]} = ?", (value,))


TABLES = ("alembic_version", "version_info", "studies", "study_directions", "study_user_attributes", "trials",
          "trial_params", "trial_user_attributes", "trial_values")  # fmt: skip


def test_mutated_studies_are_used_or_refused(study: bytes, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)  # before another try to open it
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = sweep.read_space(None, ["ITERATIONS=1,2"], {"study": "s"})
    path = tmp_path / "runs/s/study.db"
    path.parent.mkdir(parents=True)
    cell = st.tuples(st.sampled_from(TABLES), st.integers(0, 9),
                     st.sampled_from([None, -1, 2**62, "x", "{", "[3]", "", b"\xff", 1e308]))  # fmt: skip

    @SOME
    @given(st.one_of(edits(), st.lists(cell, min_size=1, max_size=2)))
    def check(changes: list[tuple]) -> None:
        in_cells = bool(changes) and changes[0][0] in TABLES
        path.write_bytes(study if in_cells else changed(study, changes))
        for change in changes if in_cells else ():
            overwrite(path, *change)
        try:
            made = sweep.Sweep(space, environment(), [], "", 60)
            found = {ticket: tried[-1] for ticket, tried in made.attempts().items()}
            sweep.report(space, found, path.parent)
        except ValueError as error:
            assert changes and str(error).startswith("runs/s/study.db is no study") and "\n" not in str(error)
        else:
            assert changes or [trial.state.name for trial in found.values()] == ["COMPLETE", "FAIL"]

    with bounded():
        check()


def test_a_read_only_study_is_refused(study: bytes, tmp_path: Path, monkeypatch, capsys) -> None:
    """As from a storage URL of SQLite itself: a superuser may write to any file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    (tmp_path / "study.db").write_bytes(study)
    url = "sqlite:///file:study.db?mode=ro&uri=true"
    arguments = ["run", "--set", "ITERATIONS=1,2", "--study", "s", "--storage", url, "--launcher", "true"]
    assert sweep.main(arguments, environment()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --storage sqlite is no study") and error.count("\n") == 1
    assert "readonly database" in error


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_not_waited_for(run: Path, kind: str, tmp_path: Path, capsys) -> None:
    readers = {run / name: lambda: use_all(run) for name in FILES}
    readers |= {tmp_path / name: lambda name=name: READERS[name][1](tmp_path / name)
                for name in ("ledger.tsv", "preflight.log", "space.toml", "program.py")}  # fmt: skip
    readers[tmp_path / "nll.npy"] = lambda: runfiles.read_nll(tmp_path / "nll.npy")
    for path, read in readers.items():
        kept = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
        with bounded(), pytest.raises(ValueError, match=r"not a regular file|no such file"):
            read()
        path.unlink()
        path.write_bytes(kept)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("rows = 3", "rows: 3, expected dict"),
        ("[rows]\na = 3", "rows: a: 3, expected dict"),
        ("[space]\nITERATIONS = {low = true, high = 3}", "a range must be"),
        ("[space]\nITERATIONS = {low = 1, high = 3, log = 'x'}", "a range must be"),
        ("[space]\nMATRIX_LR = {low = 0.1, high = inf}", "a range must be"),
        ("seeds = [-1]\n[space]\nITERATIONS = [1, 2]", "must be distinct integers from 0"),
        ("seeds = [18446744073709551616]\n[space]\nITERATIONS = [1, 2]", "must be distinct integers from 0"),
        ("trials = 1000000\n[space]\nMATRIX_LR = {low = 0.1, high = 1.0}", "trials must be 1 to 100,000"),
        ("\n".join(["[space]", *(f"{name} = {list(range(400))}" for name in "ABCD")]), "trials must be 1 to"),
        ("a = " + "[" * 100_000, "is not a TOML file"),
        (f"trials = {'9' * 5000}", "is not a TOML file"),
    ],
    ids=range(11),
)  # fmt: skip
def test_spaces_that_cannot_be_searched(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "space.toml").write_text(content)
    with bounded(), pytest.raises(ValueError, match=said):
        sweep.read_space(tmp_path / "space.toml", [], {})


def test_amounts_of_a_plan(capsys) -> None:
    recipe = str(ROOT / "records/recipes/smoke.env")
    for option in ("--hours", "--price", "--setup-minutes", "--download-mb-s"):
        for value in ("nan", "inf", "-1", "1e400", "9" * 5000):
            with pytest.raises(SystemExit) as stopped:
                plan.main([recipe, option, value], {})
            assert stopped.value.code == 2 and f"argument {option}: invalid" in capsys.readouterr().err
