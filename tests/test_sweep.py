"""Sweeps, paired comparisons and the ledger:
mostly with a stand-in for the trainer, once with the trainer itself."""

import ast
import csv
import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import launch as launch_module
import ledger
import numpy as np
import optuna
import pytest
import sweep
from conftest import ROOT, inherited
from scipy import stats

TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
SMOKE = ROOT / "records/recipes/smoke.env"
STAND_IN = """
    import json, os, pathlib, sys, time
    folder = pathlib.Path("runs") / os.environ["RUN_ID"]
    folder.mkdir(parents=True)
    e = os.environ.get
    with open("pids.txt", "a") as file:
        file.write(f"{os.getpid()}\\n")
    with open("starts.txt", "a") as file:
        file.write(f"{folder.name} {e('CUDA_VISIBLE_DEVICES', '-')} {e('OMP_NUM_THREADS', '-')}\\n")
    if e("NUM_LAYERS") == "9":
        sys.exit("out of memory")
    score = 2 + 100 * (float(e("MATRIX_LR", "0.03")) - 0.03) ** 2 + 0.001 * (int(e("SEED", "0")) * 7 % 5)
    score += 0.002 * int(e("SEED", "0")) * int(e("NUM_LAYERS", "0")) % 0.003
    with open(folder / "train.log", "a") as log:
        for step in range(4):
            log.write(f"step:{step}/4 val_loss:3.0 val_bpb:{score + 1 - 0.1 * step:.4f} train_time:1ms\\n")
            log.flush()
            time.sleep(float(e("STAND_IN_SECONDS", "0.02")))
    with open("ends.txt", "a") as file:
        file.write(folder.name + "\\n")
    fits = e("STAND_IN_FITS", "1") == "1"
    score = float(e("STAND_IN_BPB", score))
    result = dict(val_bpb_sliding=score, bytes_total=1000, fits=fits, strict_seconds=1.5)
    (folder / "part").write_text(json.dumps(result))
    (folder / "part").rename(folder / "result.json")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a stand-in trainer, `launcher` in the command line's words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    for name in (
        "RECIPE",
        "CUDA_VISIBLE_DEVICES",
        *(name for name in os.environ if name.startswith("STAND_IN")),
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def arguments(*given: str) -> list[str]:
    return [*given, "--launcher", f"{sys.executable} stand_in.py"]


def environment(**more: str) -> dict[str, str]:
    return {**inherited(), "RECIPE": str(SMOKE), "OMP_NUM_THREADS": "1", **more}


def lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def started() -> Counter:
    return Counter(line.split()[0] for line in lines("starts.txt"))


def rows(study: str) -> list[dict[str, str]]:
    with open(f"runs/{study}/trials.csv", newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------
# Sweeps
# ------------------------------------------------------------------------------------------------------------


def test_a_grid_is_covered_once_and_a_second_start_runs_nothing(place, capsys):
    command = arguments(
        "run", "--set", "NUM_LAYERS=3,4", "--set", "MATRIX_LR=0.01,0.02,0.03", "--set", "XSA_LAST_N=1",
        "--seeds", "1,2", "--workers", "2", "--gpus", "0,1,2,3",
    )  # fmt: skip
    assert sweep.main(command, environment()) == 0
    assert len(started()) == 12 and set(started().values()) == {1}
    assert {line.split()[1] for line in lines("starts.txt")} == {"0,1", "2,3"}
    found = rows("sweep")
    assert len({(row["NUM_LAYERS"], row["MATRIX_LR"]) for row in found}) == len(found) == 6
    for row in found:
        mean = (float(row["seed_1"]) + float(row["seed_2"])) / 2
        assert row["state"] == "complete" and float(row["val_bpb"]) == pytest.approx(mean)
    assert [row["val_bpb"] for row in found] == sorted(row["val_bpb"] for row in found)
    pictures = {path.stem for path in Path("runs/sweep").glob("*.png")}
    assert pictures == {"slices", "heatmap", "importance"}
    assert sweep.main(command, environment()) == 0 and len(lines("starts.txt")) == 12
    assert sweep.main([*command, "--set", "MATRIX_LR=0.04,0.05"], environment()) == 2
    assert "choose another --study" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_range_is_sampled_and_a_study_can_be_extended(place, sampler):
    command = arguments(
        "run", "--set", "MATRIX_LR=0.01..0.1:log", "--set", "NUM_LAYERS=3..5", "--sampler", sampler
    )
    assert sweep.main([*command, "--trials", "2", "--prune", "0"], environment()) == 0
    assert sweep.main([*command, "--trials", "4", "--prune", "0"], environment()) == 0
    found = rows("sweep")
    assert len(found) == len(lines("starts.txt")) == 4 == len({row["MATRIX_LR"] for row in found})
    assert all(0.01 <= float(row["MATRIX_LR"]) <= 0.1 and row["NUM_LAYERS"] in "345" for row in found)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["NUM_LAYRS=3,4"], "did you mean NUM_LAYERS"),
        (["NUM_LAYERS=3,x"], "NUM_LAYERS"),
        (["NUM_LAYERS=-4..4"], "NUM_LAYERS"),
        (["SEED=1,2"], "set by the sweep itself"),
        (["NUM_HEADS=4,3"], "does not divide"),
        (["NUM_LAYERS"], "NAME=value"),
        (["NUM_LAYERS=3"], "nothing to sweep"),
        (["NUM_LAYERS=5..4"], "needs low < high"),
        (["NUM_LAYERS=4,4"], "no duplicates"),
        (["NUM_LAYERS=3,4", "MATRIX_LR=0..a"], "could not convert"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(place, capsys, given, said):
    assert (
        sweep.main(arguments("run", *(word for each in given for word in ("--set", each))), environment())
        == 2
    )
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--workers", "2", "--gpus", "0,1,2"],
            "--workers 2: must be 1 to 1024 and divide the number of GPUs, 3",
        ),
        (["--workers", "0"], "--workers 0: must be 1 to 1024"),
        (["--launcher", "no-such-launcher --fast"], "no-such-launcher --fast: no such program"),
        (["--seeds", "1,1"], "must be distinct integers"),
        (["--trials", "3"], "the grid has 2 points"),
        (["--set", "row=a,b"], "row: known are none"),
        (["--set", "NO_SUCH_SETTING_AT_ALL=1"], "NO_SUCH_SETTING_AT_ALL is not a setting\n"),
        (["--prune", "-1"], "prune 0 to 100,000"),
        (["--storage", "nosuchbase://x"], "--storage nosuchbase"),
    ],
)
def test_options_that_do_not_go_together(place, capsys, given, said):
    assert sweep.main([*arguments("run", "--set", "MATRIX_LR=0.01,0.02"), *given], environment()) == 2
    assert said in capsys.readouterr().err and not started()


def test_fewer_trials_than_the_study_has_do_not_wait_for_the_others(place):
    """Of a study of four of which the last was stopped, one is asked for: it is there, so nothing is run."""
    command = [*arguments("run", "--set", "MATRIX_LR=0.01..0.1"), "--trials"]
    assert sweep.main([*command, "3"], environment(STAND_IN_BPB="2")) == 0
    study = optuna.load_study(study_name="sweep", storage="sqlite:///runs/sweep/study.db")
    study.enqueue_trial({}, dict(ticket=3, attempt=0))
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    sweep.main([*command, "1"], environment(STAND_IN_BPB="2"))
    assert len(started()) == 3
    assert sweep.main([*command, "4"], environment(STAND_IN_BPB="2")) == 0 and len(started()) == 4


def test_a_space_file(place, capsys):
    Path("my.toml").write_text(
        f'recipe = "{os.path.relpath(SMOKE)}"\nseeds = [5]\n[space]\nMATRIX_LR = [0.02, '
        "0.03]\nTIE_EMBEDDINGS = true\n"
        "[rows]\nplain = {}\ndeep = {NUM_LAYERS = 5}\n"
    )
    assert sweep.main(arguments("run", "my.toml"), environment(RECIPE="")) == 0
    assert {(row["row"], row["MATRIX_LR"]) for row in rows("my")} == {
        (row, rate) for row in ("plain", "deep") for rate in ("0.02", "0.03")
    }
    Path("my.toml").write_text('samplr = "tpe"\n')
    assert sweep.main(arguments("run", "my.toml"), environment()) == 2
    assert "unknown keys samplr" in capsys.readouterr().err


def test_the_rows_of_398_are_settings_of_the_trainer(place):
    space = sweep.read_space(ROOT / "records/spaces/pr398.toml", [], {})
    sweep.check_space(space, {"RECIPE": space.recipe})
    hashes = [sweep.config_hash({"RECIPE": space.recipe, **space.settings(point)}) for point in space.grid()]
    assert len(set(hashes)) == space.trials == 10 and space.prune == 0


def test_a_bad_trial_is_pruned_and_a_crash_is_told(place, capsys):
    command = arguments("run", "--set", "MATRIX_LR=0.03,0.031,0.032,0.5", "--prune", "3")
    assert sweep.main(command, environment(STAND_IN_SECONDS="0.2")) == 0
    assert [row["state"] for row in rows("sweep")] == ["complete"] * 3 + ["pruned"]
    assert len(started()) == 4 and len(lines("ends.txt")) == 3
    command = arguments("run", "--set", "NUM_LAYERS=3,9", "--study", "crash")
    assert sweep.main(command, environment()) == 1
    assert "out of memory" in rows("crash")[-1]["why"] and rows("crash")[-1]["state"] == "fail"
    # it would only fail again
    assert sweep.main(command, environment()) == 1 and len(lines("starts.txt")) == 6
    capsys.readouterr()


def launch(command: list[str], **more: str) -> subprocess.Popen:
    """The sweep in a process group of its own."""
    words = [sys.executable, str(ROOT / "records/sweep.py"), *command]
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(words, env=environment(**more), start_new_session=True, **piped)


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(pid: str) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_runs_end_with_a_sweep_that_is_killed_alone(place):
    """SIGKILL to the sweep and to nothing else: its two runs, which would take an hour, are gone at once."""
    command = arguments("run", "--set", "MATRIX_LR=0.01,0.02,0.03", "--workers", "2", "--grace", "1")
    first = launch(command, STAND_IN_SECONDS="1000")
    wait_until(lambda: len(lines("pids.txt")) == 2)
    assert all(map(running, lines("pids.txt")))
    first.kill()
    wait_until(lambda: not any(map(running, lines("pids.txt"))), 10)
    first.communicate(timeout=10)
    assert not Path("ends.txt").exists()


@pytest.mark.slow
def test_workers_of_torchrun_end_with_a_sweep_that_is_killed_alone(place, demo_data):
    more = dict(
        DATA_PATH=str(demo_data), TOKENIZER_PATH=str(demo_data / "tokenizer.model"), ITERATIONS="1000000"
    )
    first = launch(["run", "--set", "MATRIX_LR=0.01,0.02", "--launcher", TORCHRUN], **more)

    def ours() -> list[str]:
        """Processes in this folder but the sweep: guard, launcher, two workers."""
        found = (path for path in Path("/proc").glob("[0-9]*") if path.name != str(first.pid))
        return [path.name for path in found if cwd(path) == str(place) and running(path.name)]

    def cwd(process: Path) -> str:
        try:
            return os.readlink(process / "cwd")
        except OSError:
            return ""

    wait_until(lambda: any("step:2/" in path.read_text() for path in Path("runs").glob("*/train.log")), 120)
    assert len(ours()) >= 4 + (os.getpid() in map(int, ours()))
    first.kill()
    wait_until(lambda: set(ours()) <= {str(os.getpid())}, 40)
    first.communicate(timeout=10)


@pytest.mark.slow
def test_torchrun_as_launcher(place, demo_data):
    """Two trials of the smoke recipe, each on two processes."""
    more = dict(DATA_PATH=str(demo_data), TOKENIZER_PATH=str(demo_data / "tokenizer.model"))
    done = launch(["run", "--set", "MATRIX_LR=0.01,0.02", "--launcher", TORCHRUN], **more)
    said = done.communicate(timeout=300)[0]
    assert done.returncode == 0, said
    assert [row["state"] for row in rows("sweep")] == ["complete"] * 2
    for row in rows("sweep"):
        (folder,) = Path("runs").glob(f"sweep_00{row['trial']}_*_seed1337")
        result = json.loads((folder / "result.json").read_text())
        assert result["world_size"] == 2 and float(row["val_bpb"]) == result["val_bpb_sliding"]


def test_code_that_changes_under_a_study_or_a_comparison_stops_it(place, capsys, monkeypatch):
    right = launch_module.config_hash
    monkeypatch.setattr(sweep, "config_hash", lambda environ: right(environ) + "x" * bool(lines("ends.txt")))
    assert sweep.main(arguments("run", "--set", "MATRIX_LR=0.01,0.02,0.03"), environment()) == 2
    assert "another space, base or code" in capsys.readouterr().err and len(started()) == 1
    Path("ends.txt").unlink()
    Path("a.env").write_text("NUM_LAYERS=3\nVE_LAYERS=1,2\n")
    Path("b.env").write_text("NUM_LAYERS=4\nVE_LAYERS=1,2\n")
    assert sweep.main(arguments("compare", "a.env", "b.env", "--seeds", "1,2"), environment()) == 2
    assert "recipes or code changed" in capsys.readouterr().err and len(started()) == 2


@pytest.mark.parametrize("launcher", [[], ["--launcher", TORCHRUN]])
@pytest.mark.parametrize("missing", ["DATA_PATH", "TOKENIZER_PATH"])
def test_missing_data_is_told_before_the_first_run(place, demo_data, capsys, launcher, missing):
    here = dict(DATA_PATH=str(demo_data), TOKENIZER_PATH=str(demo_data / "tokenizer.model"))
    Path("a.env").write_text("NUM_LAYERS=3\nVE_LAYERS=1,2\n")
    Path("b.env").write_text("NUM_LAYERS=4\nVE_LAYERS=1,2\n")
    for command in (["run", "--set", "MATRIX_LR=0.01,0.02"], ["compare", "a.env", "b.env", "--seeds", "1,2"]):
        given = environment(**here | {missing: "absent"})
        given["RECIPE"] = str(SMOKE) if missing == "DATA_PATH" else ""
        assert sweep.main([*command, *launcher], given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        told = " (RECIPE is not set)" * (missing == "TOKENIZER_PATH" and command[0] == "run")
        assert line.startswith(f"error: no run was started{told}: ") and "absent" in line
    assert not Path("runs").exists()


def test_a_best_value_at_the_edge_is_told(place, capsys):
    sets = ["MATRIX_LR=0.01..0.1:log", "NUM_LAYERS=3..6", "EMA_DECAY=0.01,0.5,0.6", "MUON_WD=0.1",
            "TIE_EMBEDDINGS=0,1", "WARMDOWN_SHAPE=linear,cosine"]  # fmt: skip
    space = sweep.read_space(None, sets, dict(trials=5))
    best = dict(MUON_WD="0.1", TIE_EMBEDDINGS="0", WARMDOWN_SHAPE="linear")

    def told(value: float = 1.0, **point) -> list[str]:
        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
        trials = [SimpleNamespace(state=states[0], value=value, params=best | point),
                  SimpleNamespace(state=states[0], value=2.0, params={}),
                  SimpleNamespace(state=states[1], value=None, params={})]  # fmt: skip
        return list(sweep.edges(space, trials))

    lines = told(MATRIX_LR=0.0105, NUM_LAYERS=6, EMA_DECAY="0.6")
    assert [line.split(":")[0] for line in lines] == ["MATRIX_LR", "NUM_LAYERS", "EMA_DECAY"]
    assert lines[0] == "MATRIX_LR: the best value, 0.0105, is at the edge of those tried: try some below 0.01"
    assert [line.split("try some ")[1] for line in lines[1:]] == ["above 6", "above 0.6"]
    assert told(MATRIX_LR=0.013, NUM_LAYERS=4, EMA_DECAY="0.5") == []
    assert list(sweep.edges(space, [])) == []
    assert sweep.main(arguments("run", "--set", "MATRIX_LR=0.02,0.03"), environment()) == 0
    assert "at the edge of those tried: try some above 0.03\n" in capsys.readouterr().out


def test_a_score_that_is_no_number_is_a_crash(place):
    with pytest.raises(launch_module.Crash, match="val_bpb_sliding is nan"):
        launch_module.train(
            "run", environment(STAND_IN_BPB="nan"), [sys.executable, "stand_in.py"], Path("logs")
        )


@pytest.mark.parametrize("text", ['{"fits": true}', '{"val_bpb_sliding": 1.', "[]", ""])
def test_a_result_that_lacks_something_is_no_finished_run(place, capsys, text):
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/result.json").write_text(text)
    for _ in range(2):  # the second finds what the first has run
        found = launch_module.train("run", environment(), [sys.executable, "stand_in.py"], Path("logs"))
        assert found["val_bpb_sliding"] < 3 and list(started()) == ["run_start2"]
        assert (
            "runs/run/result.json" in capsys.readouterr().err
            and Path("runs/run/result.json").read_text() == text
        )


def test_a_run_that_writes_half_a_result_is_a_crash(place):
    program = "import os, pathlib; f = pathlib.Path('runs', os.environ['RUN_ID']); f.mkdir(parents=True); "
    Path("half.py").write_text(program + "(f / 'result.json').write_text('{\"fits\": true}')")
    with pytest.raises(launch_module.Crash, match="lacks val_bpb_sliding, bytes_total"):
        launch_module.train("run", environment(), [sys.executable, "half.py"], Path("logs"))


def test_a_log_is_not_written_through_a_link(place):
    Path("logs").mkdir()
    Path("logs/run.out").symlink_to(place / "outside")
    launch_module.train("run", environment(), [sys.executable, "stand_in.py"], Path("logs"))
    assert not Path("outside").exists() and not Path("logs/run.out").is_symlink()
    Path("ledger.tsv").symlink_to(place / "outside")
    with pytest.raises(OSError):
        ledger.append(Path("ledger.tsv"), dict.fromkeys(ledger.COLUMNS, "x"))
    assert not Path("outside").exists()


@pytest.mark.parametrize("name", ["a%20b", "a?b", "a#b", "a{b}%", "a b"])
def test_a_study_keeps_its_database_in_its_own_folder(place, name):
    Path("runs/a b").mkdir(parents=True)
    space = sweep.read_space(None, ["ITERATIONS=1,2"], dict(study=name))
    study = sweep.Sweep(space, environment(), [sys.executable], "", 60).study
    study.set_user_attr("mark", name)
    assert [path for path in Path("runs").rglob("*") if path.is_file()] == [Path("runs", name, "study.db")]


def test_an_identical_score_is_no_gain(place):
    """The ledger has six decimals:
    a rerun that gives the same bits must not look better than its own rounding."""
    for bpb in (3.9117098157, 3.9117101843, 1 / 3, 2.0):
        kept = dict(bpb=f"{bpb:.6f}", verdict="keep")
        assert not ledger.is_best(bpb, [kept]) and ledger.is_best(bpb - 1.1e-6, [kept])


@pytest.mark.parametrize("kill", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_half_way_and_resumed_nothing_runs_twice(place, kill):
    """8 trials of 2 seeds, 2 workers: what had ended is not run again,
    what had not is, with the same setting."""
    command = arguments("run", "--set", "MATRIX_LR=0.01..0.1:log", "--trials", "8", "--seeds", "1,2",
                        "--workers", "2", "--prune", "0", "--grace", "1")  # fmt: skip
    first = launch(command, STAND_IN_SECONDS="0.08")
    wait_until(lambda: len(lines("ends.txt")) >= 7)
    os.killpg(first.pid, kill)
    said = first.communicate(timeout=30)[0]
    ended = lines("ends.txt")
    assert 7 <= len(ended) < 16, said
    second = launch(command)
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 0, said
    found = rows("sweep")
    assert [row["state"] for row in found] == ["complete"] * 8
    again = [name.removesuffix("_start2") for name in started()]
    assert Counter(lines("ends.txt")).most_common(1)[0][1] == 1 and len(lines("ends.txt")) == 16
    assert set(started().values()) == {1}
    twice = {name for name, count in Counter(again).items() if count > 1}
    assert twice.isdisjoint(ended) and len(twice) <= 2 and len(set(again)) == 16


def test_with_the_trainer(place, demo_data):
    more = dict(DATA_PATH=str(demo_data), TOKENIZER_PATH=str(demo_data / "tokenizer.model"), ITERATIONS="2")
    command = ["run", "--set", "MATRIX_LR=0.01,0.02", "--workers", "2"]
    done = launch(command, **more, EVAL_STRIDE="64", VAL_LOSS_EVERY="1")
    said = done.communicate(timeout=120)[0]
    assert done.returncode == 0, said
    for row in rows("sweep"):
        (folder,) = Path("runs").glob(f"sweep_00{row['trial']}_*_seed1337")
        result = json.loads((folder / "result.json").read_text())
        assert float(row["val_bpb"]) == pytest.approx(result["val_bpb_sliding"]) and result["steps"] == 2
        assert json.loads((folder / "config.json").read_text())["config"]["matrix_lr"] == float(
            row["MATRIX_LR"]
        )
    trial = optuna.load_study(study_name="sweep", storage="sqlite:///runs/sweep/study.db").trials[0]
    assert list(trial.intermediate_values) == [1]


@pytest.mark.slow
def test_two_processes_share_a_study_on_postgresql(place):
    pytest.importorskip("psycopg2", reason="pip install -r requirements-postgres.txt")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("no PostgreSQL under /usr/lib/postgresql")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        binaries, port = found[-1].parent, free.getsockname()[1]
    as_other = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    # pytest's folders are closed to others
    home = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    try:
        if as_other:
            shutil.chown(home, "nobody", "nogroup")
        data = str(home / "data")
        subprocess.run(
            [*as_other, binaries / "initdb", "-D", data, "-U", "golf", "-A", "trust"], check=True, cwd=home
        )
        options = f"-h 127.0.0.1 -p {port} -k {home}"
        control = [*as_other, binaries / "pg_ctl", "-D", data, "-w"]
        subprocess.run([*control, "-o", options, "-l", home / "log", "start"], check=True, cwd=home)
        try:
            command = arguments(
                "run", "--set", "MATRIX_LR=0.01..0.1", "--trials", "12", "--workers", "2",
                "--storage", f"postgresql+psycopg2://golf@127.0.0.1:{port}/postgres",
            )  # fmt: skip
            both = [launch(command, STAND_IN_SECONDS="0.1") for _ in range(2)]
            said = [each.communicate(timeout=120)[0] for each in both]
            assert [each.returncode for each in both] == [0, 0], said
            assert all(each.count("complete: sweep_") > 0 for each in said)
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], check=True, cwd=home)
    finally:
        shutil.rmtree(home)
    assert len(started()) == 12 and set(started().values()) == {1} and len(rows("sweep")) == 12


# ------------------------------------------------------------------------------------------------------------
# What a sweep says and draws
# ------------------------------------------------------------------------------------------------------------


def test_what_a_sweep_prints_and_how_to_confirm_it(place, capsys):
    """Progress, differences, seconds; the printed command runs as it is, best against second best."""
    command = arguments("run", "--set", "MATRIX_LR=0.01,0.02,0.03", "--seeds", "2")
    assert sweep.main(command, environment()) == 0
    said = capsys.readouterr().out
    for text in (
        "trial 1/3 started: sweep_000 MATRIX_LR=0.01\n",
        "trial 2/3 complete: sweep_001 2.0140 bpb, best 2.0140 (sweep_001); 1 left, about ",
        "trial 3/3 complete: sweep_002 2.0040 bpb, best 2.0040 (sweep_002); 0 left\n",
    ):
        assert text in said, said
    table = [line.split() for line in said.splitlines() if " complete " in line and "bpb" not in line]
    assert [row[:5] + row[-1:] for row in table] == [
        ["2", "complete", "2.0040", "+0.0000", "2", "0.03"],
        ["1", "complete", "2.0140", "+0.0100", "2", "0.02"],
        ["0", "complete", "2.0440", "+0.0400", "2", "0.01"],
    ]
    (advice,) = [line for line in said.splitlines() if line.startswith("one seed: confirm with `")]
    words = shlex.split(advice.split("`")[1])
    assert words[:3] == ["python", "records/sweep.py", "compare"] and words[5:7] == ["--seeds", "1,3,4,5"]
    assert sweep.main(words[2:], environment()) == 0
    assert "trial_002 - trial_001: " in capsys.readouterr().out and len(lines("starts.txt")) == 3 + 8
    assert sweep.main([*command, "--seeds", "1,2", "--study", "two"], environment()) == 0
    assert "one seed" not in capsys.readouterr().out


def test_the_recipe_of_a_trial_gives_its_settings(place):
    """Settings of recipe, environment and space: as the trainer reads them, but for run id and seed."""
    base = environment(ITERATIONS="7", MATRIX_LR="0.5", TIE_EMBEDDINGS="1", SEED="3")
    assert sweep.main(arguments("run", "--set", "MATRIX_LR=0.01..0.1", "--trials", "2"), base) == 0
    for row in rows("sweep"):
        read = sweep.trainer().load_config({"RECIPE": f"runs/sweep/trial_00{row['trial']}.env"})[0]
        known = sweep.trainer().load_config(base | {"MATRIX_LR": row["MATRIX_LR"]})[0]
        assert read == dataclasses.replace(known, seed=1337) and read.iterations == 7
        assert read.matrix_lr == float(row["MATRIX_LR"]) != 0.5


@pytest.mark.parametrize(
    ("workers", "given", "launcher", "threads"),
    [(2, {}, [], "share"), (1, {}, [], "-"), (2, {"OMP_NUM_THREADS": "5"}, [], "5"),
     (2, {}, ["--launcher", f"{sys.executable} stand_in.py torchrun"], "-")],
)  # fmt: skip
def test_workers_share_the_cores(place, workers, given, launcher, threads):
    """torchrun sets the threads of its ranks itself."""
    base = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"} | given
    command = arguments("run", "--set", "MATRIX_LR=0.01,0.02", "--workers", str(workers))
    assert sweep.main([*command, *launcher], base) == 0
    share = str(max(len(os.sched_getaffinity(0)) // workers, 1))
    assert {line.split()[2] for line in lines("starts.txt")} == {share if threads == "share" else threads}


def test_shares_of_variance_by_hand():
    """Mean 5, sum of squares 9 + 4 + 1 + 4 + 4 + 4 = 26. The means by A are 3 and 7: 3 * (4 + 4).
    The means by B are 4.5, 5 and 5.5: 2 * (0.25 + 0 + 0.25). 1 is left."""
    points = [{"A": a, "B": b} for a in "xy" for b in "pqr"]
    found = sweep.shares_of_variance(points, [2.0, 3.0, 4.0, 7.0, 7.0, 7.0])
    assert found == pytest.approx({"A": 24 / 26, "B": 1 / 26, "interactions and noise": 1 / 26})


def test_the_importance_that_a_newcomer_was_told_wrong(place):
    """A grid on which one setting moves the score by 0.148 bpb and the other by 0.004."""
    points = [{"MATRIX_LR": lr, "HEAD_GAIN": gain} for lr in ("1", "2", "3") for gain in ("0", "1")]
    values = [
        {"1": 0.0, "2": 0.1, "3": 0.148}[point["MATRIX_LR"]] + 0.004 * int(point["HEAD_GAIN"])
        for point in points
    ]
    found = sweep.shares_of_variance(points, values)
    table = np.array(values).reshape(3, 2)
    assert (
        found["MATRIX_LR"] == pytest.approx(table.mean(1).var() / table.var()) and found["MATRIX_LR"] > 0.99
    )
    assert found["interactions and noise"] == pytest.approx(0, abs=1e-12)


def finished_study(space: sweep.Space, count: int) -> optuna.Study:
    """A study in memory with `count` completed trials on two seeds; the score depends on MATRIX_LR alone."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    points = list(space.grid()) if space.sampler == "grid" else [{}] * count
    for point in points[:count]:
        study.enqueue_trial(point)
        trial = study.ask()
        rate = float(
            {name: sweep.suggest(trial, name, kind) for name, kind in space.kinds.items()}["MATRIX_LR"]
        )
        trial.set_user_attr("results", [{sweep.METRIC: 2 + rate - 0.01}, {sweep.METRIC: 2 + rate + 0.01}])
        study.tell(trial, 2 + rate)
    return study


def test_slices_and_heatmap_show_the_trials(place):
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    sets = [
        "MATRIX_LR=0.01..0.1:log",
        "NUM_LAYERS=3..6",
        "WARMDOWN_SHAPE=linear,cosine",
        "EMA_DECAY=0.01,0.5",
        "SEED=1",
    ]
    space = sweep.read_space(None, sets, dict(seeds=[1, 2], trials=5))
    trials = finished_study(space, 5).trials
    figure = sweep.draw_slices(space, trials, "title")
    assert [place.get_xscale() for place in figure.axes] == [
        "log",
        "linear",
        "linear",
        "log",
    ]  # SEED: one value
    for place, name in zip(figure.axes, space.swept(), strict=True):
        drawn = {marker: [] for marker in ("o", ".", "*")}
        for line in place.lines:
            drawn[line.get_marker()] += zip(line.get_xdata(), line.get_ydata(), strict=True)
        x = {t.number: {"linear": 0, "cosine": 1}.get(t.params[name]) for t in trials}
        x = {t.number: float(t.params[name]) if x[t.number] is None else x[t.number] for t in trials}
        assert sorted(drawn["o"]) == sorted((x[t.number], t.value) for t in trials)
        assert len(drawn["."]) == 10 and drawn["*"] == [min(drawn["o"], key=lambda point: point[1])]
        assert place.get_xlabel().startswith(f"{name}\n") and len(place.get_xlabel()) > len(name) + 5
    assert "bits per byte" in figure.axes[0].get_ylabel()
    figure.canvas.draw()
    texts = [label.get_text() for place in figure.axes for axis in (place.xaxis, place.yaxis)
             for label in axis.get_ticklabels(which="both")]  # fmt: skip
    assert {"0.01", "0.1", "0.5"} <= set(texts) and not [text for text in texts if "math" in text]
    space = sweep.read_space(None, ["MATRIX_LR=0.01,0.02", "NUM_LAYERS=3,4,5"], dict(seeds=[1]))
    figure = sweep.draw_heatmap(space, finished_study(space, 6).trials, "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["2.0100", "2.0200"] * 3
    assert np.ptp(figure.axes[0].images[0].get_array()) == pytest.approx(0.01)
    pyplot.close("all")


@pytest.mark.parametrize(
    ("sets", "count", "drawn"),
    [
        (["MATRIX_LR=0.01..0.1", "NUM_LAYERS=3..6"], 49, {"slices"}),
        (["MATRIX_LR=0.01..0.1", "NUM_LAYERS=3..6"], 50, {"slices", "importance"}),
        (["MATRIX_LR=0.01,0.02", "NUM_LAYERS=3,4"], 3, {"slices"}),  # not the full grid
        (["MATRIX_LR=0.01,0.02", "NUM_LAYERS=3,4"], 4, {"slices", "heatmap", "importance"}),
        (["MATRIX_LR=0.01,0.02"], 2, {"slices"}),
        (["MATRIX_LR=0.01,0.02"], 1, set()),
    ],
)
def test_what_is_drawn(place, capsys, sets, count, drawn):
    space = sweep.read_space(None, sets, {})
    study = finished_study(space, count)
    sweep.draw(space, study, study.trials, Path())
    assert {path.stem for path in Path().glob("*.png")} == drawn
    assert ("no parameter importance: needs a full grid or 50" in capsys.readouterr().out) == (
        count > 1 and "importance" not in drawn and len(sets) > 1
    )


def test_sweeps_use_only_the_public_interface_of_optuna():
    """No attribute with a leading underscore, but for Python's own public ones."""
    tree = ast.parse((ROOT / "records/sweep.py").read_text())
    private = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr[0] == "_"
    }
    assert private == {"_asdict", "_replace", "__cause__"}


# ------------------------------------------------------------------------------------------------------------
# Comparison and ledger
# ------------------------------------------------------------------------------------------------------------


def test_a_comparison_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a = rng.normal(1.2, 0.01, 6)
    b = a + rng.normal(-0.003, 0.002, 6)
    ours, mean, error = sweep.paired(list(a), list(b)), (b - a).mean(), (b - a).std(ddof=1) / 6**0.5
    half = 2.570581836 * error  # of the table, 5 degrees of freedom, 95 %
    assert (ours.n, ours.mean, ours.low, ours.high) == pytest.approx((6, mean, mean - half, mean + half))
    assert ours.p == pytest.approx(2 * stats.t.sf(abs(mean / error), 5))
    draws = rng.normal(ours.visible, (b - a).std(ddof=1), (40_000, 6))
    power = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < sweep.ALPHA).mean()
    assert power == pytest.approx(sweep.POWER, abs=0.01)


def test_compare_runs_both_for_each_seed_and_holds_to_its_n(place, capsys):
    Path("a.env").write_text("NUM_LAYERS=3\nVE_LAYERS=1,2\n")
    Path("b.env").write_text("NUM_LAYERS=4\nVE_LAYERS=1,2\n")
    command = [*arguments("compare", "a.env", "b.env"), "--seeds"]
    assert sweep.main([*command, "1,2,3,4"], environment()) == 0
    said = capsys.readouterr().out
    assert "n = 4" in said and "smallest detectable effect" in said and "95 % interval" in said
    order = [line.split()[0].split("_")[-2] for line in lines("starts.txt")]
    assert order == list("abbaabba")
    for seeds in ("1,2,3", "1,2,3,4,5"):
        assert sweep.main([*command, seeds], environment()) == 2
        assert "fixed the seeds" in capsys.readouterr().err
    assert sweep.main([*command, "4,3,2,1"], environment()) == 0 and len(lines("starts.txt")) == 8
    assert sweep.main([*command, "1"], environment()) == 2
    assert sweep.main(arguments("compare", "a.env", "a.env", "--seeds", "1,2"), environment()) == 2
    capsys.readouterr()
    crashing = environment(NUM_LAYERS="9", VE_LAYERS="1")
    Path("c.env").write_text("MATRIX_LR=0.01\n")
    assert sweep.main(arguments("compare", "b.env", "c.env", "--seeds", "1,2"), crashing) == 1
    assert "p =" not in capsys.readouterr().out


def written() -> list[dict[str, str]]:
    return ledger.read(Path("runs/ledger.tsv"))


def test_the_ledger_keeps_discards_and_tells_crashes(place, capsys, monkeypatch, demo_data):
    base = dict(DATA_PATH=str(demo_data), TOKENIZER_PATH=str(demo_data / "tokenizer.model"))

    def one(note: str, seconds: str = "5", **more: str) -> int:
        return sweep.main(arguments("one", "--note", note, "--seconds", seconds), environment(**base, **more))

    assert one("baseline", STAND_IN_BPB="2.0") == 0
    assert one("worse", STAND_IN_BPB="2.1", MATRIX_LR="0.03") == 0
    assert one("as good", STAND_IN_BPB="2.0") == 0
    assert one("better, too large", STAND_IN_BPB="1.9", STAND_IN_FITS="0") == 0
    assert one("broken", NUM_LAYERS="9") == 1
    assert one("better", STAND_IN_BPB="1.95") == 0
    found = written()
    assert [line["verdict"] for line in found] == ["keep", "discard", "discard", "discard", "crash", "keep"]
    assert [line["bpb"] for line in found][-2:] == ["-", "1.950000"] and found[0]["bytes"] == "1000"
    assert (
        len({line["scorer"] for line in found}) == 1
        and found[0]["config"] == found[2]["config"] != found[1]["config"]
    )
    assert all((Path("runs") / line["run"]).exists() for line in found)
    capsys.readouterr()
    assert one("longer", seconds="6") == 2 and "budget is 6" in capsys.readouterr().err
    assert one("two\nlines") == 2
    monkeypatch.setattr(ledger, "scorer_hash", lambda *sources: "other")
    assert one("changed scorer", STAND_IN_BPB="0.1") == 2 and "scorer is other" in capsys.readouterr().err
    assert len(written()) == 6 and len(lines("starts.txt")) == 6


def test_what_moves_scores_without_a_better_model_is_refused(place, capsys, demo_data):
    base = environment(DATA_PATH=str(demo_data), TOKENIZER_PATH=str(demo_data / "tokenizer.model"))
    one = arguments("one", "--note", "n", "--seconds", "5")
    assert sweep.main(one, base) == 0
    Path("other").mkdir()
    for shard in demo_data.glob("fineweb_val_*.bin"):
        Path("other", shard.name).write_bytes(shard.read_bytes()[:-2])
    Path("other.model").write_bytes((demo_data / "tokenizer.model").read_bytes() + b" ")
    for more in (dict(EVAL_STRIDE="64"), dict(SEED="2"), dict(VAL_FILES="other/fineweb_val_*.bin"),
                 dict(TOKENIZER_PATH="other.model")):  # fmt: skip
        assert sweep.main(one, base | more) == 2 and "task is " in capsys.readouterr().err
    assert sweep.main([*one, "--seconds", "0"], base) == 2
    Path("runs/other.tsv").write_text("commit\tval_bpb\n")
    assert (
        sweep.main([*one, "--ledger", "runs/other.tsv"], base) == 2 and "columns" in capsys.readouterr().err
    )
    assert len(written()) == len(started()) == 1


BROKEN = {  # what is put behind the imports of train_gpt.py, words of the error
    "no Python": ("def (:", "SyntaxError"),
    "a package that is not there": ("import no_such_package", "ModuleNotFoundError"),
    "an exit": ("raise SystemExit(3)", "SystemExit"),
    "settings": ("def load_config(environ):\n    return None.config", "AttributeError"),
}


@pytest.mark.parametrize("code, word", BROKEN.values(), ids=BROKEN)
def test_a_program_that_cannot_be_imported_is_a_crash_in_the_ledger(place, capsys, monkeypatch, code, word):
    programs = (place / "train_gpt.py", place / "eval_ttt.py")
    programs[0].write_text(f'"""It is broken."""\n{code}\n')
    programs[1].write_text("import train_gpt as tg\n")
    monkeypatch.setattr(ledger, "PROGRAMS", programs)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "train_gpt")
    assert sweep.main(arguments("one", "--note", "broken"), environment()) == 1
    (line,) = written()
    assert (line["verdict"], line["note"], line["bpb"], line["task"]) == ("crash", "broken", "-", "-")
    assert word in capsys.readouterr().err and not started()


def test_lines_written_at_the_same_time_all_stand_below_one_head(place):
    line = dict.fromkeys(ledger.COLUMNS, "x")
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda number: ledger.append(Path("new/ledger.tsv"), line | {"note": number}), range(64))
        )
    assert sorted(int(each["note"]) for each in ledger.read(Path("new/ledger.tsv"))) == list(range(64))


def test_a_sweep_checks_its_tracker_before_it_starts_and_hands_it_to_its_runs(place, capsys):
    """That runs log themselves is tested in test_track.py."""
    pytest.importorskip("wandb", reason="pip install wandb")
    program = (
        "import json, os, pathlib; pathlib.Path('environ.json').write_text(json.dumps(dict(os.environ)))\n"
    )
    Path("stand_in.py").write_text(program + Path("stand_in.py").read_text())
    command = arguments("run", "--set", "MATRIX_LR=0.01,0.02", "--study", "mine")
    assert sweep.main(command, environment(TRACK="tensorboard")) == 2 and not started()
    assert "TRACK=tensorboard: must be trackio or wandb" in capsys.readouterr().err
    assert sweep.main(command, environment(TRACK="wandb", WANDB_MODE="offline")) == 0
    given = json.loads(Path("environ.json").read_text())
    assert (given["TRACK"], given["WANDB_MODE"], given["WANDB_RUN_GROUP"]) == ("wandb", "offline", "mine")


@pytest.mark.parametrize("bpb", [3.9117098157, 3.9117101843])
def test_the_ledger_discards_a_repeat(place, demo_data, bpb):
    """Its lines round to six decimals: a score that rounds to the kept one is not better."""
    base = environment(DATA_PATH=str(demo_data), TOKENIZER_PATH=str(demo_data / "tokenizer.model"))
    for _ in range(2):
        command = arguments("one", "--note", 'say "no", \\ and go', "--seconds", "5")
        assert sweep.main(command, {**base, "STAND_IN_BPB": str(bpb)}) == 0
    assert [line["verdict"] for line in written()] == ["keep", "discard"]
    assert written()[1]["note"] == 'say "no", \\ and go'
    assert all(
        line.count("\t") == 11 and 'say "no", \\ and go' in line for line in lines("runs/ledger.tsv")[1:]
    )


def test_help_of_the_ledger_names_its_program():
    command = [sys.executable, str(ROOT / "records/ledger.py"), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "records/sweep.py one --help" in said


def test_the_hash_of_the_scorer():
    sources = [(ROOT / name).read_text() for name in ("train_gpt.py", "eval_ttt.py")]
    known = ledger.scorer_hash(*sources)

    def changed(*pairs: tuple[str, str]) -> bool:
        after = sources
        for old, new in pairs:
            assert any(old in source for source in sources), old
            after = [source.replace(old, new) for source in after]
        return ledger.scorer_hash(*after) != known

    assert not changed(
        ("\ndef score(", "\n# a comment\ndef score("),
        ('"""Split this rank\'s windows of a chunk into batches', '"""Other'),
        ("matrix_lr: float", "matrix_lr : float"),
        ("class Muon(", "class Muon2("),  # training is what experiments change
        ("def rms_norm(", "def rms_norm2("),
        ("class Adaptation:", "class Adaptation:\n    more = 1\n"),
    )
    for old, new in (
        ("total / math.log(2) / num_bytes", "total / math.log(2) / num_bytes / 2"),
        ("return F.cross_entropy(", "return 0.9 * F.cross_entropy("),
        ("SIZE_CAP = 16_000_000", "SIZE_CAP = 17_000_000"),
        ("def batches_of(", "def batches_off("),
        ('if __name__ == "__main__":', 'def nll(a, b):\n    return 0\n\n\nif __name__ == "__main__":'),
        # helpers, which no list names
        ("return dist.get_world_size()", "return 1 + dist.get_world_size()"),
        ("return 1 << max(int(number) - 1, 0)", "return 2 << max(int(number) - 1, 0)"),
        ("class LedgerError(RuntimeError):", "class LedgerError(ValueError):"),
        ('LOSSLESS_PROBE = "', 'LOSSLESS_PROBE = "a'),
        ("def seen_before(key", "def seen_before(keys"),
        ("def shards(self, split", "def shards(self, splits"),
    ):
        assert changed((old, new)), new
