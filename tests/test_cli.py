"""The program as a user meets it: exit codes, messages, what a run leaves behind, and the dialect of its log.

One short run on two small shards serves all checks of a run that ends well.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import inherited, search_path
from formats import shard_header
from test_model import SMALL, random_model

import train_gpt
from train_gpt import Config

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "records" / "recipes" / "smoke.env"
PROGRAMS = [path for path in (ROOT / "train_gpt.py", ROOT / "eval_ttt.py") if path.exists()]
TRAIN_TOKENS, VAL_TOKENS = 20_000, 2_000

# The patterns by which the field's tools read a log.
START = r"^(?:\d+\.\d+ )?"
PATTERNS = {
    "train": r"(?:step:)?(\d+)/(\d+) (?:train_)?loss: ?([\d.]+) (?:train_time|t): ?([\d.]+)(ms|m)"
    r" step_avg:([\d.]+)ms",
    "val": r"(?:step:)?(\d+)/(\d+) val_loss: ?([\d.]+) val_bpb: ?([\d.]+)",
    "stop": r"stopping_early: wallclock_cap train_time: ?(\d+)ms step: ?(\d+)/(\d+)",
    "scored": r"([A-Za-z][\w -]*?)(?: stride:\d+)? val_loss:([\d.]+) val_bpb:([\d.]+)(?: eval_time:(\d+)ms)?",
    "size": r"(Serialized model(?: \S+)?|Code size(?: \(\w+\))?|Total submission size(?: \S+)?): (\d+) bytes",
}


def find(pattern: str, log: str) -> list[tuple[str, ...]]:
    return re.findall(START + PATTERNS[pattern], log, re.M)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    path.write_bytes(shard_header(len(tokens)) + tokens.astype("<u2").tobytes())


def snapshot(folder: Path) -> dict[str, str]:
    """Every file under a folder with its hash, every other thing with a word."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {
        n: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for n, p in found.items()
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices of this size gain nothing from more, and lose much on a machine that others use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def settings(demo_data, tmp_path_factory) -> dict[str, str]:
    """The smoke recipe, shortened to three steps on the first tokens of the embedded corpus."""
    data = tmp_path_factory.mktemp("data")
    for split, count in (("train", TRAIN_TOKENS), ("val", VAL_TOKENS)):
        tokens = np.fromfile(demo_data / f"fineweb_{split}_000000.bin", "<u2")[512 : 512 + count]
        write_shard(data / f"fineweb_{split}_000000.bin", tokens)
    return dict(
        RECIPE=str(RECIPE), DATA_PATH=str(data), TOKENIZER_PATH=str(demo_data / "tokenizer.model"),
        RUN_ID="run", ITERATIONS="3", VAL_LOSS_EVERY="2", WARMUP_STEPS="1", GPTQ_CALIB_BATCHES="1",
        TARGET_MB="15.9", DEVICE="cpu",
    )  # fmt: skip


class Finished(NamedTuple):
    """A run that is over: its exit code, its working directory,
    its folder, log and result, and what it printed."""

    code: int
    work: Path
    folder: Path
    log: str
    result: dict
    out: str


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Finished:
    work, out = tmp_path_factory.mktemp("work"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(work)
        code = train_gpt.main([], settings)
    folder = work / "runs" / "run"
    log = (folder / "train.log").read_bytes().decode()
    result = json.loads((folder / "result.json").read_text())
    return Finished(code, work, folder, log, result, out.getvalue())


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that runs main and expects exit code 2, one message,
    and nothing written; returns the message."""

    def run(argv: list[str], environ: dict[str, str]) -> str:
        monkeypatch.chdir(tmp_path)
        before = snapshot(tmp_path)
        assert train_gpt.main(argv, environ) == 2
        captured = capsys.readouterr()
        assert (
            captured.err.startswith("error: ") and captured.err.count("error: ") == 1 and captured.out == ""
        )
        assert snapshot(tmp_path) == before
        return captured.err

    return run


# ------------------------------------------------------------------------------------------------------------
# A run that ends well
# ------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(finished):
    assert finished.code == 0
    names = [
        "train.log",
        "config.json",
        "metrics.jsonl",
        "final_model.pt",
        "final_model.int6.ptz",
        "result.json",
    ]
    names += [f"source/{path.name}" for path in (*PROGRAMS, RECIPE)]
    found = snapshot(finished.work)
    assert sorted(n for n, what in found.items() if what != "folder") == sorted(
        f"runs/run/{name}" for name in names
    )
    for path in (*PROGRAMS, RECIPE):
        assert found[f"runs/run/source/{path.name}"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_log_is_what_was_printed(finished):
    logged = finished.log.splitlines()
    silent = {line for line in logged if re.fullmatch(r"  [A-Z_0-9]+=.*(?<! \(given\))", line)}
    assert [line for line in logged if line not in silent] == finished.out.splitlines() and len(silent) > 100
    assert "\r" not in finished.log and "def main" not in finished.log and finished.log.endswith("}\n")


def test_steps_in_the_log(finished):
    steps = find("train", finished.log)
    assert [(int(step), int(total)) for step, total, *_ in steps] == [(1, 3), (2, 3), (3, 3)]
    times = [float(time) for *_, time, unit, _ in steps if unit == "ms"]
    assert len(times) == 3 and times == sorted(times)
    for step, _, _, time, _, average in steps:
        assert float(average) * int(step) == pytest.approx(float(time), abs=0.5 + 0.005 * int(step) + 1e-6)
    validations = find("val", finished.log)
    assert [(int(step), int(total)) for step, total, *_ in validations] == [(0, 3), (2, 3), (3, 3)]
    assert float(validations[0][2]) == pytest.approx(math.log(1024), abs=0.02)  # an untrained model guesses
    assert find("stop", finished.log) == []


def test_metrics_are_those_of_the_log(finished):
    metrics = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    train = [(str(m["step"]), f"{m['train_loss']:.4f}") for m in metrics if "train_loss" in m]
    val = [
        (str(m["step"]), f"{m['val_loss']:.4f}", f"{m['val_bpb']:.4f}") for m in metrics if "val_loss" in m
    ]
    assert train == [(step, loss) for step, _, loss, *_ in find("train", finished.log)]
    assert val == [(step, loss, bpb) for step, _, loss, bpb in find("val", finished.log)]


def test_scores_in_the_log(finished):
    scored = find("scored", finished.log)
    names = ["final_int6_roundtrip_exact", "final_int6_sliding_window_exact"]
    assert [name for name, *_ in scored] == names
    for (_, loss, bpb, _), kind in zip(scored, ("roundtrip", "sliding"), strict=True):
        values = (finished.result[f"val_loss_{kind}"], finished.result[f"val_bpb_{kind}"])
        assert (loss, bpb) == tuple(f"{value:.8f}" for value in values)


def test_bits_per_byte_follow_from_the_loss_and_the_bytes_of_the_text(finished, settings):
    sp = spm.SentencePieceProcessor(model_file=settings["TOKENIZER_PATH"])
    targets = np.fromfile(Path(settings["DATA_PATH"]) / "fineweb_val_000000.bin", "<u2")[513:].tolist()
    pieces = [sp.id_to_piece(i) for i in targets if not sp.is_control(i)]
    num_bytes = sum(
        1 if piece.startswith("<0x") else len(piece.replace("\u2581", " ").encode()) for piece in pieces
    )
    assert len(targets) == VAL_TOKENS - 1
    for kind in ("roundtrip", "sliding"):
        nats = finished.result[f"val_loss_{kind}"] * len(targets)
        assert finished.result[f"val_bpb_{kind}"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-12)


def test_sizes_in_the_log_are_those_of_the_files(finished):
    code = sum(path.stat().st_size for path in PROGRAMS)
    model = (finished.folder / "final_model.int6.ptz").stat().st_size
    sizes = {name: int(count) for name, count in find("size", finished.log)}
    assert sizes == {
        "Code size": code,
        "Serialized model int6+zstd": model,
        "Total submission size int6+zstd": code + model,
    }
    result = finished.result
    assert (result["bytes_code"], result["bytes_model"], result["bytes_total"]) == (code, model, code + model)
    assert result["fits"] is True and "over the cap" not in finished.log


def test_head_of_the_log(finished):
    """Readers skip all before the first model_params: value: it must precede the first step and score."""
    (params,) = re.findall(r"^model_params:(\d+)$", finished.log, re.M)
    state = torch.load(finished.folder / "final_model.pt", weights_only=True)
    assert int(params) == sum(tensor.numel() for tensor in state.values()) == finished.result["model_params"]
    head, tail = finished.log.split(f"model_params:{params}\n")
    assert re.findall(r"train_shards: ?(\d+)", head) == ["1"]
    assert re.findall(r"(?:val_tokens: |tokens:)(\d+)", head) == [str(VAL_TOKENS - 1)]
    assert not any(find(pattern, head) for pattern in PATTERNS)
    assert re.search(r"^seed:1337$", tail, re.M) and re.search(
        r"^world_size:1 grad_accum_steps:2$", tail, re.M
    )
    notes = [line for line in head.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "TARGET_MB=15.9" in notes[0]


def recipe_values() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in RECIPE.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if line)


def test_resolved_settings_in_log_and_config(finished, settings):
    given = recipe_values() | settings
    names = {f.name.upper() for f in fields(Config)}
    given = {name: value for name, value in given.items() if name in names}
    lines = re.findall(r"^  ([A-Z][A-Z0-9_]*)=(.*?)( \(given\))?$", finished.log, re.M)
    assert [name for name, _, _ in lines] == [f.name.upper() for f in fields(Config)]
    assert {name for name, _, mark in lines if mark} == set(given)
    saved = json.loads((finished.folder / "config.json").read_text())
    assert set(saved["config"]) == {f.name for f in fields(Config)}
    assert {name.upper() for name in saved["given"]} == set(given)
    for name, text in given.items():
        value = saved["config"][name.lower()]
        assert value == saved["given"][name.lower()]
        assert str(value) == text or float(value) == float(text)
    assert (saved["config"]["iterations"], saved["config"]["num_layers"], saved["config"]["adam_wd"]) == (
        3,
        3,
        0.04,
    )
    assert saved["versions"]["torch"] == torch.__version__


def test_a_finished_run_refuses_other_settings(finished, settings, monkeypatch, capsys):
    monkeypatch.chdir(finished.work)
    before = snapshot(finished.folder)
    assert train_gpt.main(["RESUME=auto", "CHECKPOINT_EVERY=7"], settings) == finished.code
    assert "run already finished, nothing to do" in capsys.readouterr().out
    assert train_gpt.main(["RESUME=auto", "MATRIX_LR=0.125", "ITERATIONS=4"], settings) == 2
    error = capsys.readouterr().err
    assert "MATRIX_LR=" in error and "0.125 here" in error and "ITERATIONS=3 there, 4 here" in error
    changed = {name for name, digest in snapshot(finished.folder).items() if before.get(name) != digest}
    assert changed <= {"train.log"}  # the note that it is finished


def test_the_last_line_is_the_result(finished):
    last = finished.log.splitlines()[-1]
    assert finished.log.count("RESULT ") == 1 and last.startswith("RESULT ")
    assert json.loads(last.removeprefix("RESULT ")) == finished.result


def test_the_result_has_what_tools_expect(finished):
    result = finished.result
    numbers = """
        val_bpb_roundtrip val_bpb_sliding val_loss_roundtrip val_loss_sliding bytes_code bytes_model
        bytes_total train_seconds eval_seconds strict_seconds steps step_avg_ms tokens_per_second model_params
        seed world_size
    """.split()
    assert [name for name in numbers if type(result.get(name)) not in (int, float)] == []
    assert [name for name in numbers if not (math.isfinite(result[name]) and result[name] > 0)] == []
    assert (result["steps"], result["seed"], result["world_size"], result["legal"]) == (3, 1337, 1, True)
    assert result["strict_seconds"] >= result["train_seconds"] + result["eval_seconds"]
    assert result["tokens_per_second"] == pytest.approx(1024 * 1000 / result["step_avg_ms"])
    hashed = [finished.folder / "final_model.int6.ptz", *PROGRAMS]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in hashed]
    assert [digest for digest in hashes if digest not in json.dumps(result)] == []
    assert result["versions"]["torch"] == torch.__version__


def test_the_result_names_the_tokenizer(finished, settings):
    assert hashlib.sha256(Path(settings["TOKENIZER_PATH"]).read_bytes()).hexdigest() in json.dumps(
        finished.result
    )


# ------------------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------------------


def test_a_second_run_with_the_same_name_is_refused(finished, settings, monkeypatch, capsys):
    monkeypatch.chdir(finished.work)
    before = snapshot(finished.work)
    assert train_gpt.main([], settings) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "runs/run" in captured.err and captured.out == ""
    assert snapshot(finished.work) == before


@pytest.mark.parametrize("what", ["a folder", "a file"])
def test_whatever_stands_at_the_name_is_left_alone(tmp_path, refused, settings, what):
    path = tmp_path / "runs" / "run"
    path.parent.mkdir()
    if what == "a folder":
        path.mkdir()
    (path / "train.log" if what == "a folder" else path).write_text("mine")
    assert "runs/run" in refused([], settings)


def test_control_characters_of_a_file_are_shown_escaped(tmp_path, refused, settings):
    """A terminal obeys them, so that a file could hide or forge lines."""
    data = tmp_path / "data"
    data.mkdir()
    for shard in Path(settings["DATA_PATH"]).glob("*.bin"):
        (data / shard.name).symlink_to(shard)
    (data / "manifest.json").write_text(
        json.dumps(dict(shards=[], tokenizer=dict(sha256="\x1b[2J\u202eevil")))
    )
    message = refused([], {**settings, "DATA_PATH": str(data)})
    assert "\\u001b[2J\\u202e" in message and "\x1b" not in message and "\u202e" not in message


def test_runs_cannot_be_made(tmp_path, refused, settings):
    (tmp_path / "runs").write_text("a file")
    assert "runs/run" in refused([], settings)


@pytest.mark.parametrize("run_id", ["../outside", "{tmp_path}/outside", "..", "."])
def test_a_name_that_leads_out_of_runs_is_refused(tmp_path, refused, settings, run_id):
    run_id = run_id.format(tmp_path=tmp_path)
    assert "RUN_ID" in refused([], settings | {"RUN_ID": run_id})


def test_without_a_name_the_folder_has_date_and_seed(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    assert (
        train_gpt.main([], settings | {"RUN_ID": "", "ITERATIONS": "1", "VAL_LOSS_EVERY": "0", "SEED": "7"})
        == 0
    )
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_seed7", folder.name)
    log = (folder / "train.log").read_text()
    assert find("val", log) == [] and len(find("scored", log)) == 2


# ------------------------------------------------------------------------------------------------------------
# Over the cap, the clock, failure
# ------------------------------------------------------------------------------------------------------------


def test_over_the_cap_all_is_written_and_the_exit_code_is_1(tmp_path, monkeypatch, settings, finished):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "SIZE_CAP", 1000)
    assert train_gpt.main([], settings | {"MAX_WALLCLOCK_SECONDS": "0.000001"}) == 1
    assert set(snapshot(tmp_path)) == set(snapshot(finished.work))
    log = (tmp_path / "runs/run/train.log").read_text()
    result = json.loads((tmp_path / "runs/run/result.json").read_text())
    total = sum(path.stat().st_size for path in (*PROGRAMS, tmp_path / "runs/run/final_model.int6.ptz"))
    assert result["fits"] is False and result["bytes_total"] == total
    advised, *warnings = [line for line in log.splitlines() if line.startswith("WARNING")]
    assert "on this CPU: 0 of 3 steps in 0 s" in advised
    assert len(warnings) == 3 and "WARMDOWN_ITERS=10" in warnings[0] and "about 3 steps" in warnings[0]
    assert "1000 bytes" in warnings[1] and str(total - 1000) in warnings[1]
    # one step was taken
    assert f"{result['train_seconds']:.3f} s is over MAX_WALLCLOCK_SECONDS" in warnings[2]
    ((_, step, iterations),) = find("stop", log)  # the clock was over after one step
    assert (step, iterations, result["steps"]) == ("1", "3", 1)


@pytest.mark.parametrize(("cap", "fits"), [(0, True), (-1, False)])
def test_exactly_at_the_cap_it_fits(tmp_path, monkeypatch, cap, fits):
    """The cap counts bytes of code and model together, and a total equal to it fits."""
    monkeypatch.setattr(train_gpt, "encode_artifact", lambda *_: b"x" * 500)
    code = sum(path.stat().st_size for path in PROGRAMS)
    monkeypatch.setattr(train_gpt, "SIZE_CAP", code + 500 + cap)
    log = SimpleNamespace(line=lambda _: None)
    run = SimpleNamespace(folder=tmp_path, config=Config(), tokenizer_sha256="", log=log)
    assert train_gpt.export(run, random_model(SMALL, torch.float32), train_gpt.Statistics())["fits"] is fits


def test_a_model_half_written_never_has_its_final_name(tmp_path, monkeypatch):
    def fail(_, target) -> None:
        if hasattr(target, "write"):
            target.write(b"half")
        else:
            Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    log = SimpleNamespace(line=lambda _: None)
    run = SimpleNamespace(folder=tmp_path, config=Config(), tokenizer_sha256="", log=log)
    with pytest.raises(OSError):
        train_gpt.export(run, random_model(SMALL, torch.float32), train_gpt.Statistics())
    assert not (tmp_path / "final_model.pt").exists() and not (tmp_path / "final_model.int6.ptz").exists()


# ------------------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MATRX_LR": "0.02", "SEED": "x"}, ["MATRIX_LR", "SEED='x'"]),
        ({"RECIPE": "none.env"}, ["none.env"]),
        ({"DATA_PATH": "nowhere"}, ["nowhere/fineweb_train_*.bin"]),
        ({"VAL_FILES": "nowhere/*.bin"}, ["nowhere/*.bin"]),
        ({"VOCAB_SIZE": "1000"}, ["VOCAB_SIZE=1000", "1024"]),
        ({"EVAL_SEQ_LEN": "2000"}, ["2000 validation tokens", "EVAL_SEQ_LEN=2000"]),
        ({"NUM_HEADS": "3"}, ["MODEL_DIM=64", "NUM_HEADS=3"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_leave_nothing(refused, settings, changes, words):
    message = refused([], settings | changes)
    assert [word for word in words if word not in message] == []


def test_validation_of_exactly_one_window_runs(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    assert (
        train_gpt.main([], settings | {"EVAL_SEQ_LEN": "1999", "EVAL_BATCH_SEQS": "1", "ITERATIONS": "1"})
        == 0
    )
    assert json.loads((tmp_path / "runs/run/result.json").read_text())["steps"] == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_shard_leaves_nothing(tmp_path_factory, refused, settings, split):
    data = tmp_path_factory.mktemp("broken")
    for path in Path(settings["DATA_PATH"]).iterdir():
        content = path.read_bytes()
        (data / path.name).write_bytes(content[:-100] if split in path.name else content)
    message = refused([], settings | {"DATA_PATH": str(data)})
    assert f"fineweb_{split}_000000.bin" in message


def test_shards_of_another_tokenizer_leave_nothing(tmp_path_factory, refused, settings):
    data = tmp_path_factory.mktemp("other")
    for path in Path(settings["DATA_PATH"]).iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    shards = [{"file": "fineweb_train_000000.bin", "tokens": TRAIN_TOKENS, "split": "train"}]
    shards += [{"file": "fineweb_val_000000.bin", "tokens": VAL_TOKENS, "split": "val"}]
    (data / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": "0" * 64}, "shards": shards}))
    message = refused([], settings | {"DATA_PATH": str(data)})
    assert "manifest.json" in message and "000000000000" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_and_missing(refused, settings):
    assert "DEVICE=cuda" in refused([], settings | {"DEVICE": "cuda"})


def test_an_attention_kernel_asked_for_on_a_cpu(refused, settings):
    assert "ATTENTION=fa3" in refused([], settings | {"ATTENTION": "fa3"})


@pytest.mark.parametrize(
    "argv", [["--steps", "5"], ["train"], ["--help", "--describe"], ["--describe", "x"], ["-h"], [""]]
)
def test_unknown_arguments(refused, argv):
    assert "--help" in refused(argv, {})


def test_help_needs_no_right_settings(capsys):
    assert train_gpt.main(["--help"], {"SEED": "x", "RECIPE": "none.env"}) == 0
    assert "NUM_LAYERS=11" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["nothing", "a folder", "a text", "an empty file"])
def test_a_tokenizer_that_is_none_leaves_nothing(tmp_path_factory, refused, settings, kind):
    """The SentencePiece library aborts the process that it is in when given some of these."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "empty").touch()
    path = {"nothing": "", "a folder": folder, "a text": RECIPE, "an empty file": folder / "empty"}[kind]
    assert refused([], settings | {"TOKENIZER_PATH": str(path)}).startswith("error: TOKENIZER_PATH=")


def test_describe_refuses_wrong_settings(refused):
    assert "SEED='x'" in refused(["--describe"], {"SEED": "x"})


# ------------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_process_with_1(run_trainer, tmp_path, settings):
    changes = {"MATRIX_LR": "1e38", "TIED_EMBED_LR": "1e38", "OMP_NUM_THREADS": "1"}
    done = run_trainer(settings | changes)
    assert done.returncode == 1
    assert re.search(r"step:? ?[23]\b.*nan", done.stderr)
    assert {path.name for path in (tmp_path / "runs/run").iterdir()} & {
        "result.json",
        "final_model.int6.ptz",
    } == set()


# ------------------------------------------------------------------------------------------------------------
# An image that lacks packages
# ------------------------------------------------------------------------------------------------------------

BARE = """
import sys
sys.modules.update(dict.fromkeys(("zstandard", "matplotlib", "tqdm", "scipy", "brotli")))
import eval_ttt, train_gpt
sys.exit(train_gpt.main([]) or eval_ttt.main([]))
"""


def test_torch_numpy_sentencepiece_and_a_coder_are_enough(settings, tmp_path):
    """COMPRESSOR=ans trains, exports, scores and adapts; a plot that cannot be drawn costs one warning."""
    env = {
        **inherited(),
        **settings,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": search_path(ROOT),
        "COMPRESSOR": "ans",
    }
    env |= dict(
        ITERATIONS="1", VAL_LOSS_EVERY="0", TTT_MODE="banks", MODEL_PATH="runs/run/final_model.int6.ptz"
    )
    done = subprocess.run([sys.executable, "-c", BARE], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Serialized model int6+ans" in done.stdout and done.stdout.count("WARNING: distribution.png") == 1
    assert json.loads((tmp_path / "runs/run/eval_ttt.json").read_text())["val_bpb_ttt"] > 0
    assert np.isfinite(np.load(next(tmp_path.glob("runs/run/eval/*/nll.npy")))).all()


@pytest.mark.parametrize("coder, package", [("zstd", "zstandard"), ("ans", "constriction")])
def test_a_coder_whose_package_is_missing_is_refused_before_training(
    coder, package, settings, refused, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    said = refused([], {**settings, "COMPRESSOR": coder})
    assert f"COMPRESSOR={coder}" in said and f"pip install {package}==" in said
