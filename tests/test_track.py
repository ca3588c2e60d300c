"""Tracking with the real wandb package, offline: what it writes is read back from its .wandb files."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import track
from conftest import ROOT, inherited

import train_gpt as tg

wandb_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="pip install wandb")
OFFLINE = {"TRACK": "wandb", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
BLOCK = 32768  # bytes of a block of LevelDB's log format, in which a .wandb file is written


def records(path: Path) -> list:
    """Return the records of a .wandb file: LevelDB's framing, then wandb's own message class.

    wandb 0.31 has no reader in Python any more.
    """
    content, place, found, part = path.read_bytes(), 7, [], b""
    assert content[:4] == b":W&B"
    while place < len(content):
        if BLOCK - place % BLOCK < 7:  # too little for a header: padding
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_pb2.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def read_back(folder: Path) -> dict:
    """Return id, config, history {step: values}, summary and exit codes of all tracker files of a run."""
    told = dict(id=set(), config={}, history={}, summary={}, exit=[])
    for path in sorted(folder.glob("track/wandb/offline-run-*/*.wandb")):
        for record in records(path):
            name = record.WhichOneof("record_type")
            if name == "run":
                told["id"].add(record.run.run_id)
                told["config"] |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            elif name == "history":
                items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
                assert items["_step"] not in told["history"], "a step was sent twice"
                told["history"][items["_step"]] = {k: v for k, v in items.items() if k[0] != "_"}
            elif name == "summary":
                told["summary"] |= {
                    (i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.summary.update
                }
            elif name == "exit":
                told["exit"].append(record.exit.exit_code)
    return told


def by_step(folder: Path) -> dict[int, dict[str, float]]:
    """Return the rows of metrics.jsonl, those of one step merged."""
    found: dict[int, dict[str, float]] = {}
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        found.setdefault(row.pop("step"), {}).update(row)
    return found


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A run folder with two rows, as the trainer writes it."""
    folder = tmp_path / "runs" / "made up: 1"
    folder.mkdir(parents=True)
    config = dict(train_batch_tokens=1000, matrix_lr=0.02)
    (folder / "config.json").write_text(json.dumps(dict(config=config, given={}, versions={"torch": "2"})))
    write_rows(folder, dict(step=0, seconds=0.0, val_loss=5.0, val_bpb=3.0), training_row(1))
    monkeypatch.chdir(tmp_path)
    return folder


def training_row(step: int) -> dict[str, float]:
    return dict(step=step, seconds=0.5 * step, train_loss=4.0 - 0.1 * step, lr_scale=1 / step)


def write_rows(folder: Path, *rows: dict[str, float]) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def environment(**more: str) -> dict[str, str]:
    return {**inherited(), "OMP_NUM_THREADS": "1", **OFFLINE, **more}


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_trainer_sends_its_curves_and_scores(run_trainer, smoke_env, tmp_path):
    """A real run of the trainer: curves, settings and scores in wandb's file are those of the run folder."""
    more = dict(ITERATIONS="4", VAL_LOSS_EVERY="2", EVAL_STRIDE="64", WARMDOWN_ITERS="2")
    done = run_trainer({**smoke_env, **OFFLINE, **more})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: TRACK") == 1 and "wandb sync runs/run/track/wandb/" in done.stderr
    folder = tmp_path / "runs" / "run"
    told, rows = read_back(folder), by_step(folder)
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config.items() <= told["config"].items() and config["iterations"] == 4
    assert list(told["history"]) == sorted(rows) == [0, 1, 2, 3, 4]
    for step, row in rows.items():
        sent = told["history"][step]
        assert row.items() <= sent.items() and sent["tokens"] == 1024 * step
        assert step in (0, 2, 4) or "val_bpb" not in sent
        if step:
            assert sent["matrix_lr"] == pytest.approx(config["matrix_lr"] * row["lr_scale"])
            assert sent["step_tokens_per_second"] > 0 and sent["grad_norm"] > 0
    result = json.loads((folder / "result.json").read_text())
    scored = {key: value for key, value in result.items() if isinstance(value, int | float)}
    assert scored.items() <= told["summary"].items() and "val_bpb_sliding" in scored and told["exit"] == [0]


def test_rows_are_sent_while_the_run_is_going_on_and_a_resumed_run_continues(run_folder):
    """The rate is by hand: 1000 tokens in 0.5 s. Rows written again after the resume are not sent again."""
    memory = run_folder / "track" / "wandb.json"
    with track.following(run_folder, environment()):
        wait_until(lambda: memory.exists() and json.loads(memory.read_text())["last"] == [1, 0])
        write_rows(run_folder, training_row(2), training_row(3))
        wait_until(lambda: json.loads(memory.read_text())["last"] == [3, 0])
    assert read_back(run_folder)["exit"] == [1]  # no result yet: stopped
    (run_folder / "metrics.jsonl").write_text("")
    write_rows(
        run_folder, *map(training_row, range(1, 6)), dict(step=5, seconds=2.5, val_bpb=2.0, val_loss=3.0)
    )
    (run_folder / "result.json").write_text(
        json.dumps(dict(val_bpb_sliding=1.5, fits=True, seed=1, name="x"))
    )
    with track.following(run_folder, environment()):
        pass
    told = read_back(run_folder)
    assert len(told["id"]) == 1 and told["id"].pop().startswith("made-up--1-") and told["exit"] == [1, 0]
    assert sorted(told["history"]) == [0, 1, 2, 3, 4, 5]
    assert all(told["history"][step]["step_tokens_per_second"] == 2000 for step in range(1, 6))
    assert told["history"][4]["matrix_lr"] == 0.02 / 4 and told["history"][5]["val_bpb"] == 2.0
    assert told["summary"]["val_bpb_sliding"] == 1.5 and told["config"]["versions"] == {"torch": "2"}


def test_a_run_that_is_killed_ends_as_failed_in_the_tracker(run_folder):
    """SIGKILL to the run and its whole process group: the sender still closes the tracker's run."""
    program = "import sys, time, pathlib, os; sys.path.insert(0, sys.argv[1]); import track\n"
    program += "with track.following(pathlib.Path(sys.argv[2]), os.environ): time.sleep(1000)"
    command = [sys.executable, "-c", program, str(ROOT / "records"), str(run_folder)]
    run = subprocess.Popen(command, env=environment(), start_new_session=True)
    wait_until(lambda: (run_folder / "track" / "wandb.json").exists())
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(10)
    wait_until(lambda: read_back(run_folder)["exit"] == [1], 30)
    assert sorted(read_back(run_folder)["history"]) == [0, 1]


def test_a_server_that_is_not_there_costs_one_note(run_folder, capfd):
    """wandb online, nobody listens: the run is not told, and the rows can be sent later."""
    nobody = dict(WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40)
    with track.following(run_folder, environment(**nobody, WANDB_INIT_TIMEOUT="1")):
        time.sleep(0.1)
    said = capfd.readouterr()
    notes = [line for line in (said.out + said.err).splitlines() if line.startswith("note: TRACK")]
    assert len(notes) == 1 and f"TRACK=wandb python records/track.py {run_folder}" in notes[0], said
    command = [sys.executable, str(ROOT / "records/track.py"), str(run_folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and sorted(read_back(run_folder)["history"]) == [0, 1], done.stderr


def test_a_disk_that_refuses_costs_one_note(run_folder, capsys):
    (run_folder / "track").write_text("a file where the folder should be")
    with track.following(run_folder, environment()):
        done = True
    assert done and capsys.readouterr().err.startswith("note: TRACK: cannot start the sender")


def test_evaluations_are_sent_afterwards(run_folder, monkeypatch, capsys):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    for mode, bpb in (("doc_banks", 1.2), ("banks", 1.3)):
        (run_folder / "eval" / mode).mkdir(parents=True)
        (run_folder / "eval" / mode / "eval_ttt.json").write_text(
            json.dumps(dict(val_bpb_ttt=bpb, mode=mode))
        )
    (run_folder / "eval_ttt.json").write_text(json.dumps(dict(val_bpb_ttt=1.3)))
    (run_folder / "result.json").write_text(json.dumps(dict(val_bpb_sliding=1.5)))
    found = track.scores(run_folder)
    assert found == {"val_bpb_sliding": 1.5, "eval/val_bpb_ttt": 1.3, "eval/doc_banks/val_bpb_ttt": 1.2,
                     "eval/banks/val_bpb_ttt": 1.3}  # fmt: skip
    command = [sys.executable, str(ROOT / "records/track.py"), str(run_folder)]
    for _ in range(2):  # the second start sends the scores again, and no row twice
        assert subprocess.run(command, capture_output=True).returncode == 0
    told = read_back(run_folder)
    assert found.items() <= told["summary"].items() and sorted(told["history"]) == [0, 1]


def test_without_a_tracker_the_trainer_stops_before_training(smoke_env, tmp_path, monkeypatch, capsys):
    """No such tracker, no package, no login, no records/: one line, exit code 2, no run folder."""
    monkeypatch.chdir(tmp_path)
    base = {**inherited(), **smoke_env, "HOME": str(tmp_path)}
    cases = [("tensorboard", "must be trackio or wandb"), ("wandb", "No API key configured")]
    if importlib.util.find_spec("trackio") is None:
        cases.append(("trackio", "the package is not installed. pip install trackio"))
    for name, said in cases:
        assert tg.main([], {**base, "TRACK": name}) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: TRACK={name}: ") and said in line
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**base, **OFFLINE})  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: TRACK needs records/track.py")
    assert not (tmp_path / "runs").exists()


def test_trackio(run_folder, monkeypatch):
    """The same rows in Trackio's own database; a resumed run continues."""
    reason = "Trackio 0.43 needs huggingface_hub 1.10 or later, and requirements.txt pins 1.2.3"
    monkeypatch.setenv("TRACKIO_DIR", str(run_folder.parent / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage", reason=reason).SQLiteStorage
    monkeypatch.setenv("TRACK", "trackio")
    assert track.main([str(run_folder)]) == 0
    write_rows(run_folder, training_row(2))
    (run_folder / "result.json").write_text(json.dumps(dict(val_bpb_sliding=1.5)))
    assert track.main([str(run_folder)]) == 0
    (name,) = storage.get_runs("parameter-golf")
    assert name == json.loads((run_folder / "track" / "trackio.json").read_text())["id"]
    found: dict[int, dict] = {}
    for row in storage.get_logs("parameter-golf", name):
        found.setdefault(row["step"], {}).update(row)
    assert sorted(found) == [0, 1, 2] and found[0]["val_bpb"] == 3.0 and found[2]["val_bpb_sliding"] == 1.5
    assert found[2]["step_tokens_per_second"] == 2000
