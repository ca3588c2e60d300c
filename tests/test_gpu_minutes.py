"""The nine minutes on a GPU: a failed or hung part costs no later one; a second call goes on by value."""

import importlib
import json
import os
import subprocess
import sys
import time
from array import array
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import train_gpt

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import gpu_minutes
import gpu_page
import gpu_parts
import gpu_stage
from gpu_parts import Context, Part


def part(name, expected=1.0, limit=20.0, **more):
    return Part(name, "a", gpu_parts.part_probe, limit, expected, (), **more)


PROGRAMS = {  # what stands for a part: it reads its context as a part does
    "good": "put(number=7)",
    "crash": "put(before=1); raise ValueError('on purpose')",
    "hang": "put(before=2); signal.signal(signal.SIGTERM, signal.SIG_IGN); subprocess.Popen([sys.executable, "
            "'-c', 'import signal, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[1], "
            "\"w\").write(str(os.getpid())); time.sleep(600)'.replace('import', 'import os, sys,'), "
            "sys.argv[2]], start_new_session=True); time.sleep(600)",
    "last": "put(number=8)",
}  # fmt: skip
PROLOGUE = """
import json, os, signal, subprocess, sys, time
result = json.loads(open(sys.argv[1]).read())["result_path"]
def put(**values): open(result, "w").write(json.dumps(values))
"""


def driver(tmp_path, parts, seconds=60.0, out="out", **more):
    def command(part, context):
        return [sys.executable, "-c", PROLOGUE + PROGRAMS[part.name], str(context), str(tmp_path / "pid")]

    context = Context(str(tmp_path / "work"), str(tmp_path / out), True, {}, "ans", 1.0)
    return gpu_minutes.Driver(
        tmp_path / out, tmp_path / "work", seconds, context, parts, command=command, **more
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_crash_and_a_hang_cost_nothing_after_them(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_minutes.REHEARSAL_SECONDS, "limit", 4.0)
    began = time.monotonic()
    run = driver(tmp_path, [part(name) for name in ("crash", "hang", "good", "last")])
    assert run.run() == 1
    assert time.monotonic() - began < 40
    report = json.loads((tmp_path / "out/gpu_minutes.json").read_text())
    entries = report["parts"]
    assert {name: entry["state"] for name, entry in entries.items()} == {
        "crash": "failed", "hang": "limit", "good": "ok", "last": "ok"}  # fmt: skip
    assert [entries[name]["result"] for name in PROGRAMS] == [
        {"number": 7},
        {"before": 1},
        {"before": 2},
        {"number": 8},
    ]
    assert "ValueError: on purpose" in entries["crash"]["log_tail"][-1]
    assert entries["crash"]["exit_code"] == 1 and "left_running" not in entries["hang"]
    # a child in a session of its own, deaf to SIGTERM
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert (tmp_path / "out/logs.tgz").stat().st_size > 0
    assert "good" in (tmp_path / "out/summary.txt").read_text()


def test_a_second_call_runs_what_has_no_result_of_this_code(tmp_path, monkeypatch):
    parts = [part("good"), part("crash"), part("last")]
    assert driver(tmp_path, parts).run() == 1
    second = driver(tmp_path, parts)
    assert second.run() == 1
    assert second.call["order"] == ["crash"]
    third = driver(tmp_path, parts, data_digest="other data")
    assert third.run() == 1
    assert third.call["order"] == ["crash", "good", "last"]  # crash never had a result
    monkeypatch.setitem(PROGRAMS, "good", "raise SystemExit(3)")
    fourth = driver(tmp_path, parts, data_digest="yet other data")
    fourth.run()
    kept = json.loads((tmp_path / "out/gpu_minutes.json").read_text())["parts"]["good"]
    assert kept["state"] == "failed" and kept["exit_code"] == 3
    assert kept["last_good"]["result"] == {"number": 7}  # a good result outlives a bad attempt


def test_a_result_is_kept_until_a_file_of_the_part_changes(tmp_path, monkeypatch):
    (tmp_path / "used.py").write_text("a = 1\n")
    (tmp_path / "unused.py").write_text("a = 1\n")
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    one = part("good")._replace(files=("used.py",))
    before = one.digest()
    os.utime(tmp_path / "used.py", (1, 1))
    (tmp_path / "unused.py").write_text("a = 2\n")
    assert one.digest() == before
    assert one.digest("other data") != before
    (tmp_path / "used.py").write_text("a = 2\n")
    assert one.digest() != before


def test_what_a_part_calls_and_names_is_part_of_its_hash(monkeypatch):
    by_name = {part.name: part for part in gpu_parts.PARTS}
    before = {name: by_name[name].digest() for name in ("adapt", "chunk_sgd", "ranks")}
    monkeypatch.setattr(gpu_parts, "SGD_CHUNKS", {**gpu_parts.SGD_CHUNKS, "TTT_LR": "0.1"})
    after = {name: by_name[name].digest() for name in before}
    assert [name for name in before if after[name] != before[name]] == ["chunk_sgd"]
    code = "".join(gpu_parts.own_code(gpu_parts.part_adapt))
    assert "def adapted_scores" in code and "def part_meta" not in code


KEPT = dict(state="ok", digest="now", result={})


@pytest.mark.parametrize("kept, has_model, expected", [
    ({}, False, "train adapt ranks step"),
    (dict(train=KEPT, adapt=KEPT), True, "ranks step"),
    (dict(train=KEPT, adapt=KEPT, ranks=KEPT), False, "step"),  # nothing that is due needs the model
    (dict(train=KEPT, ranks=KEPT), False, "train adapt step"),  # the artifact is gone
    (dict(train=KEPT, adapt=dict(KEPT, digest="old")), True, "ranks step adapt"),
    (dict(train=dict(KEPT, digest="old"), ranks=KEPT), True, "adapt step train"),
    (dict(train=dict(KEPT, digest="old"), ranks=KEPT), False, "train adapt step"),  # adapt needs its model
    (dict(train=KEPT, adapt=dict(KEPT, state="limit", last_good=KEPT)), True, "ranks step adapt"),
    (dict(train=KEPT, adapt=dict(KEPT, state="limit", failures=1)), True, "adapt ranks step"),
    (dict(train=KEPT, adapt=dict(KEPT, state="limit", failures=2)), True, "ranks step adapt"),
    (dict(train=KEPT, adapt=dict(KEPT, state="limit", failures=2, digest="old")), True, "adapt ranks step"),
])  # fmt: skip
def test_what_is_due_by_value(kept, has_model, expected):
    parts = [part("train"), part("adapt", needs="model"), part("ranks"), part("step")]
    digests = {p.name: "now" for p in parts}
    assert " ".join(p.name for p in gpu_minutes.due_parts(parts, kept, digests, has_model)) == expected


@pytest.mark.parametrize("left, expected", [(500, "train"), (150, "ranks"), (61, "ranks"), (5, None)])
def test_a_part_starts_only_with_time_for_it(left, expected):
    queue = [part("train", 270), part("ranks", 10), part("step", 40)]
    chosen = gpu_minutes.choose(queue, left, lambda p: p.expected)
    assert (chosen and chosen.name) == expected


@pytest.mark.parametrize("left, expected", [(200, "lora"), (99, "ranks")])
def test_a_spare_part_waits_for_those_that_are_due(left, expected):
    queue = [part("lora", 50, spare=True), part("meta", 400, spare=True), part("ranks", 10), part("step", 40)]
    assert gpu_minutes.choose(queue, left, lambda p: p.expected).name == expected
    assert gpu_minutes.choose(queue[:1], 60, lambda p: p.expected).name == "lora"


def test_a_fallback_runs_only_where_nothing_was_left(tmp_path, monkeypatch):
    parts = [part("good"), part("last", fallback="good")]
    assert driver(tmp_path, parts).run() == 0
    states = json.loads((tmp_path / "out/gpu_minutes.json").read_text())["parts"]
    assert states["last"]["result"] == {"number": 8}  # no artifact: it ran
    monkeypatch.setitem(
        PROGRAMS, "good", "open(os.path.dirname(result) + '/../../second/final_model.int6.ptz', 'w')"
    )
    assert driver(tmp_path, parts, out="second").run() == 0
    states = json.loads((tmp_path / "second/gpu_minutes.json").read_text())["parts"]
    assert states["last"]["state"] == "not needed"


def test_seconds_of_the_whole_text_by_hand():
    """62,021,845 targets at 10,000 a second on each of 8 GPUs are 6,202.1845 s of one, 775.3 s of eight."""
    assert gpu_parts.full_seconds(10_000.0) == pytest.approx(775.2730625)


def test_the_environment_loses_what_could_be_a_setting(monkeypatch):
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("DEVICE", "cuda")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    kept = gpu_parts.clean_environ()
    assert "NCCL_DEBUG" in kept and "PATH" in kept and not {"SEED", "DEVICE"} & kept.keys()


def test_parts_know_their_names():
    names = [part.name for part in gpu_parts.PARTS]
    assert len(set(names)) == len(names) and names[:3] == ["train", "train_plain", "adapt"]
    for one in gpu_parts.PARTS:
        assert one.title.endswith(".") and one.expected < one.limit
        assert all((ROOT / name).is_file() for name in one.files)


class Recorded(Exception):
    """A part has started its first program."""


STARTS = {  # part: program, and settings that its configuration must have
    "train": ("train_gpt.py",
              dict(train_batch_tokens=393_216, warmdown_frac=0.5, compressor="ans", use_compile="auto",
                   max_wallclock_seconds=150.0, ema_decay=0.98, num_layers=11)),
    "train_plain": ("train_gpt.py", dict(use_compile="0", max_wallclock_seconds=105.0)),
    "adapt": ("eval_ttt.py", dict(ttt_mode="doc_banks", ttt_groups=1, eval_seq_len=2048)),
    "chunk_sgd": ("eval_ttt.py",
                  dict(ttt_mode="all", ttt_optimizer="sgd", ttt_epochs=3, ttt_chunk_tokens=32768)),
    "doc_lora": ("eval_ttt.py", dict(ttt_mode="doc_lora", ttt_optimizer="adamw")),
    "meta": ("train_gpt.py",
             dict(meta_ttt_objective="deployed", meta_ttt_enabled=True, max_wallclock_seconds=140.0)),
    "losses": ("gpu.py", dict(train_batch_tokens=98_304, grad_accum_total=1)),
    "resume": ("train_gpt.py", dict(num_layers=3, resume="auto")),
    "step_compiled": ("gpu.py", dict(train_batch_tokens=786_432, grad_accum_total=8)),
    "step_plain": ("gpu.py", dict(train_batch_tokens=786_432)),
    "documents": ("gpu.py", dict(doc_borders="attention")),
    "autotuned": ("gpu.py", {}),
    "kernels": ("-m", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_the_real_parts_start_programs_with_settings_that_they_accept(name, tmp_path, monkeypatch):
    """A misspelt setting would only show on the GPU: every program's arguments and settings, checked here."""
    seen = []

    def record(ctx, command, environ, accepted=(0,), on_line=None):
        seen.append((command, environ))
        raise Recorded

    for folder in ("work", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out/final_model.int6.ptz").write_bytes(b"x")
    report = tmp_path / "report.bin"
    report.write_bytes(gpu_stage.shard_bytes(array("H", [1] * 100)))
    data = dict(
        train="train.bin", report=str(report), tuning="tuning.bin", tokenizer="tokenizer.model", small="small"
    )
    monkeypatch.setattr(Context, "program", record)
    context = Context(str(tmp_path / "work"), str(tmp_path / "out"), False, data, "ans", 150.0, 140.0,
                      str(tmp_path / "result.json"))  # fmt: skip
    one = next(part for part in gpu_parts.PARTS if part.name == name)
    with pytest.raises(Recorded):
        one.run(context)
    command, environ = seen[0]
    program, expected = STARTS[name]
    assert Path(command[1]).name == program
    if program == "gpu.py":
        gpu = importlib.import_module("gpu")
        monkeypatch.setattr(sys, "argv", command[1:])
        arguments = gpu.parse_arguments()
        assert set(arguments.phases.split(",")) <= gpu.PHASES.keys() and set(arguments.arms.split(",")) <= {
            *gpu.ARMS
        }
    if program != "-m":
        config, _, _ = train_gpt.load_config(environ)
        assert {key: getattr(config, key) for key in expected} == expected


# ------------------------------------------------------------------------------------------------------------
# The carried folder
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(tmp_path):
    """Wheels of two packages: for this Python, and for another one."""
    import zipfile

    folder, tag = tmp_path / "wheels", f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder.mkdir()
    for name, python in (("zstandard", tag), ("constriction", "cp27")):
        with zipfile.ZipFile(
            folder / f"{name}-1.0-{python}-{python}-manylinux2014_x86_64.whl", "w"
        ) as archive:
            archive.writestr(f"{name}/__init__.py", "")
    return folder


def test_the_carried_folder_holds_the_same_tokens(tmp_path, demo_data, wheels):
    stage, work = tmp_path / "stage", tmp_path / "work"
    told = gpu_stage.prepare(stage, demo_data, wheels=wheels, tokens=100_000, tuning=20)
    assert "100,000 tokens" in told and "MiB" in told
    data, notes = gpu_stage.unpack(stage, work)
    assert any("constriction" in note for note in notes) and (work / "site/zstandard/__init__.py").exists()
    assert (Path(data["tokenizer"])).read_bytes() == (demo_data / "tokenizer.model").read_bytes()
    train, val = (
        np.fromfile(demo_data / f"fineweb_{split}_000000.bin", "<u2", offset=1024)
        for split in ("train", "val")
    )
    assert np.array_equal(train_gpt.open_shard(data["train"]), train[:100_000])
    tuning, report = (train_gpt.open_shard(data[name]) for name in ("tuning", "report"))
    assert np.array_equal(np.concatenate((tuning, report)), val)
    assert (tuning == 1).sum() == 20 and report[0] == 1  # whole documents on both sides
    assert len(train_gpt.TokenStream(f"{data['small']}/fineweb_val_*.bin", 1024)) == min(40_000, len(tuning))


@pytest.mark.parametrize("damage, words", [
    (lambda stage: (stage / "val_reporting.bin").unlink(), "lacks val_reporting.bin"),
    (lambda stage: (stage / "tokenizer.model").write_bytes(b"x"), "is damaged"),
    (lambda stage: (stage / "stage.json").unlink(), "no stage.json"),
])  # fmt: skip
def test_what_the_folder_lacks_is_named(tmp_path, demo_data, wheels, damage, words):
    gpu_stage.prepare(tmp_path / "stage", demo_data, wheels=wheels, tokens=1000, tuning=20)
    damage(tmp_path / "stage")
    with pytest.raises(gpu_stage.StageError, match=words):
        gpu_stage.unpack(tmp_path / "stage", tmp_path / "work")


def test_a_stage_without_a_wheel_for_the_gpu_machine_says_so(tmp_path, demo_data, wheels):
    """The fixture has zstandard for this Python, and constriction for another one."""
    here, carried = f"{sys.version_info.major}.{sys.version_info.minor}", tmp_path / "stage/wheels"
    for python, lacking in ((here, {"constriction"}), ("3.99", {"constriction", "zstandard"})):
        told = gpu_stage.prepare(
            tmp_path / "stage", demo_data, wheels=wheels, python=python, tokens=1000, tuning=20
        )
        warnings = [line for line in told.splitlines() if line.startswith("WARNING")]
        assert len(warnings) == len(lacking) and all(str(carried) in line for line in warnings)
        for name in lacking:
            wanted = f"{name}=={gpu_stage.pins()[name]} for cp{python.replace('.', '')}"
            assert any(wanted in line for line in warnings)


@pytest.mark.parametrize("carried, coder", [("constriction zstandard", "ans"), ("constriction", "ans"),
                                            ("zstandard", "zstd"), ("", None)])  # fmt: skip
def test_artifacts_are_coded_by_what_the_stage_carries(tmp_path, monkeypatch, carried, coder):
    """On an image that has neither package; where the stage lacks both too, the wheels are named."""
    for name in carried.split():
        (tmp_path / name).mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if coder is None:
        wheels = rf"constriction==\S+ or zstandard==\S+ for cp3{sys.version_info.minor} "
        with pytest.raises(gpu_stage.StageError, match=wheels):
            gpu_minutes.choose_coder(tmp_path)
        return
    found, notes = gpu_minutes.choose_coder(tmp_path)
    lacking = {"constriction", "zstandard"} - {*carried.split()}
    assert found == coder and lacking <= {note.split()[0] for note in notes}
    assert not {note.split()[0] for note in notes} & {*carried.split()}


def test_shards_survive_a_big_endian_reading():
    tokens = array("H", [1, 258, 65535])
    assert np.frombuffer(gpu_stage.shard_bytes(tokens), "<u2")[512:].tolist() == tokens.tolist()
    with pytest.raises(gpu_stage.StageError, match="after 2"):
        gpu_stage.split_documents(array("H", [1, 5, 1, 6]), 2)


@pytest.mark.parametrize("arguments, words", [
    ([], "--stage FOLDER is missing"), (["--stage", "nowhere"], "nowhere is missing"),
    (["--rehearse", "--only", "nonsense"], "unknown part: nonsense"),
])  # fmt: skip
def test_users_mistakes(tmp_path, arguments, words, demo_data):
    command = [
        sys.executable,
        str(ROOT / "tests/benchmarks/gpu_minutes.py"),
        "--out",
        str(tmp_path / "o"),
        *arguments,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------


def entry(kind="a", state="ok", **result):
    return dict(kind=kind, title="It.", state=state, seconds=3.0, result=result, digest="x")


def test_the_kept_page_is_of_the_kept_file(tmp_path):
    source = ROOT / "records/benchmarks/2026-11-27_gpu_h100.json"
    gpu_page.write(source, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == source.with_suffix(".md").read_text()


def test_the_page_sets_the_measured_beside_the_predicted():
    parts = dict(
        probe=entry(gpu="NVIDIA H100 80GB HBM3", matmul_tflops=711.0),
        step_compiled=entry("c", step_compiled=dict(ms_per_step=570.0, mfu=0.3)),
        adapt=entry(val_bpb_ttt=1.30, val_bpb_plan=1.35, score_seconds=20.0, targets_per_second=20_000.0,
                    full_seconds=387.6, gain_by_position=[
                        dict(name="position 0+", targets=100, before=4.0, after=3.5, gain=0.5)]),
        losses=dict(entry("b", "limit"), log_tail=["the last line"]),
    )  # fmt: skip
    report = dict(
        rehearsal=False, calls=[dict(date="2027-01-01 10:00", seconds=540, used_seconds=480)], parts=parts
    )
    page = gpu_page.page(report, "gpu_minutes.json")
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in page.splitlines()
        if line.startswith("|")
    }
    assert rows["step of 786,432 tokens, compiled, ms"] == ["475.4", "570", "+20%"]  # 570 / 475.4 = 1.199
    assert rows["matrix product, 8192 cubed, TFLOP/s"] == ["790", "711", "-10%"]
    assert rows["step, plain torch, ms"] == ["1,550", "not measured", ""]
    assert rows["It"][:2] == ["1.3000", "+0.0500"]
    assert rows["0+"] == ["100", "4.0000", "3.5000"]
    assert "the last line" in page and "8.0 minutes (2027-01-01 10:00)" in page and "rehearsal" not in page
    big = {**report, "parts": {**parts, "probe": entry(gpu="NVIDIA H200")}}
    assert "| 415.2 | 570 |" in gpu_page.page(big, "x")
    assert "A rehearsal" in gpu_page.page({**report, "rehearsal": True}, "x")


def test_a_failed_attempt_hides_no_older_measurement():
    older = entry("c", step_plain=dict(ms_per_step=1600.0))
    report = dict(parts=dict(step_plain=dict(entry("c", "failed"), last_good=older)))
    assert gpu_page.lookup(report, "step_plain.step_plain.ms_per_step") == 1600.0
    assert gpu_page.lookup(report, "adapt.val_bpb_ttt") is None


# ------------------------------------------------------------------------------------------------------------
# --preflight
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget, code", [("600", 0), pytest.param("0.001", 1, marks=pytest.mark.slow)])
def test_preflight_of_two_processes(tmp_path, smoke_env, budget, code):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests/benchmarks/gpu_minutes.py"), "--preflight", "--preflight-seconds", "250"]
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    settings = dict(RUN_ID="", VAL_FILES=str(tmp_path / "val_*.bin"), EVAL_BUDGET_SECONDS=budget,
                    TTT_CHUNK_SIZE="32", TTT_PRIOR_SEQS="0", EVAL_STRIDE="64", NUM_LAYERS="2", VE_LAYERS="1",
                    TRAIN_BATCH_TOKENS="256", ITERATIONS="5000")  # fmt: skip
    tokens = np.fromfile(f"{smoke_env['DATA_PATH']}/fineweb_val_000000.bin", "<u2", 3001, offset=1024)
    (tmp_path / "val_000000.bin").write_bytes(gpu_stage.shard_bytes(array("H", tokens.tolist())))
    env = {**kept, **smoke_env, **settings, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    found = json.loads(done.stdout.split("PREFLIGHT ")[1].splitlines()[0])
    assert found["processes"] == 2 and found["timed_steps"] == 20 and found["validation_targets"] == 3000
    assert min(found[name] for name in ("all_reduce_gb_s", "all_gather_gb_s", "read_ms", "ms_per_step")) > 0
    assert found["predicted_steps"] == 5000  # by ITERATIONS: the recipe has no clock
    broken = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("LIMIT BROKEN")]
    assert broken == ([] if code == 0 else ["sliding_seconds:", "adapted_seconds:"])


def test_each_limit_is_named(capsys):
    import preflight

    config = train_gpt.Config(max_wallclock_seconds=600.0)
    good = dict(missing="", free_disk_gb=100.0, read_ms=5.0, ms_per_step=60.0, peak_gib=30.0, card_gib=79.0,
                predicted_steps=9000, statistics_seconds=10.0, export_seconds=40.0, sliding_seconds=140.0,
                adapted_seconds=400.0)  # fmt: skip
    assert preflight.broken_limits(good, config) == []
    for name, change in (
        ("package", dict(missing="zstandard")), ("disk", dict(free_disk_gb=0.5)),
        ("data", dict(read_ms=61.0)), ("memory", dict(peak_gib=78.0)), ("clock", dict(predicted_steps=0)),
        ("sliding_seconds", dict(sliding_seconds=601.0)), ("adapted_seconds", dict(adapted_seconds=700.0)),
    ):  # fmt: skip
        [line] = preflight.broken_limits({**good, **change}, config)
        assert line.startswith(f"{name}: ")
    check = SimpleNamespace(lock=Lock(), found=good, config=config, elapsed=lambda: 80.0)
    assert preflight.conclude(check) == 0 and "all limits will be kept" in capsys.readouterr().out
    assert preflight.conclude(check, late=True) == 1 and "LIMIT BROKEN time: " in capsys.readouterr().out
    del good["export_seconds"], good["ms_per_step"]
    assert [line.split(":")[0] for line in preflight.broken_limits(good, config)] == ["data", "export"]
