"""Hostile inputs of every reader: what is no regular file, bombs, malformed bodies, names, numbers, ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from formats import shard_header
from test_artifact import make_blob, make_run, signed, split_body
from test_model import SMALL, random_model
from test_readers_fuzz import RESULT, bounded_memory, write_shard

import eval_ttt as ev
import train_gpt as tg
from train_gpt import UserError


@pytest.fixture(autouse=True)
def in_time():
    """End a test that waits, as for a FIFO, with an error."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def refused(function: Callable, *arguments) -> str:
    """The message of the UserError, which is one line, and none of an unforeseen exception."""
    with bounded_memory(), pytest.raises(UserError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message and "MemoryError" not in message and "KeyError" not in message
    return message


# ------------------------------------------------------------------------------------------------------------
# No regular file, or too large
# ------------------------------------------------------------------------------------------------------------


def checkpoint_of(folder: Path) -> None:
    tg.read_checkpoint(make_run(folder, replace(SMALL, resume="auto")))


def weights_of(folder: Path) -> None:
    ev.read_weights(folder / "final_model.pt", SMALL)


def report_of(folder: Path) -> None:
    """The evaluator goes on without one, and says why."""
    found, why = ev.read_report(folder / "config.json", config={})
    assert found is None
    raise UserError(why)


def recipe_of(folder: Path) -> None:
    values, problems = tg.read_recipe(str(folder / "r.env"), tg.known_names())
    assert not values and len(problems) == 1
    raise UserError(problems[0])


READERS = {  # name of the file, and what reads it
    "artifact": ("a", lambda folder: tg.read_artifact(folder / "a")),
    "weights": ("final_model.pt", weights_of),
    "checkpoint": ("checkpoint.pt", checkpoint_of),
    "result": ("result.json", tg.read_result),
    "report": ("config.json", report_of),
    "shard": ("fineweb_val_000000.bin", lambda folder: tg.open_shard(str(folder / "fineweb_val_000000.bin"))),
    "manifest": ("manifest.json", lambda folder: tg.read_listing(str(folder / "x.bin"))),
    "source": ("source.json", lambda folder: tg.read_listing(str(folder / "x.bin"))),
    "recipe": ("r.env", recipe_of),
    "tokenizer": ("t.model", lambda folder: tg.load_byte_table(str(folder / "t.model"), 1024)),
    "metrics": ("metrics.jsonl", lambda folder: tg.RunLog(folder).forget_after(1)),
}


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(40 << 30)


IRREGULAR = {
    "fifo": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "40 GB of holes": sparse,
}


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_within_a_limit_are_read(tmp_path, reader, kind):
    name, read = READERS[reader]
    IRREGULAR[kind](tmp_path / name)
    assert name in refused(read, tmp_path)


def test_a_log_that_is_a_fifo_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "train.log")
    tg.RunLog(tmp_path).line("text")
    said = capsys.readouterr()
    assert said.out == "text\n" and "train.log" in said.err


def test_links_to_files_are_followed(tmp_path):
    (tmp_path / "there").write_bytes(make_blob())
    (tmp_path / "a").symlink_to("there")
    assert tg.read_artifact(tmp_path / "a").config.model_dim == 24


# ------------------------------------------------------------------------------------------------------------
# Artifacts with a right checksum
# ------------------------------------------------------------------------------------------------------------

BLOB = make_blob()
HEADER, REST, CODES = split_body(BLOB)
FIRST = HEADER["tensors"][0]


def body(
    header: object = HEADER, rest: bytes = REST, codes: bytes = CODES, text: bytes | None = None
) -> bytes:
    text = json.dumps(header).encode() if text is None else text
    head = zstandard.compress(struct.pack("<I", len(text)) + text + rest)
    return struct.pack("<I", len(head)) + head + codes


def with_settings(**values: object) -> bytes:
    return body(HEADER | {"config": HEADER["config"] | values})


def with_first(**values: object) -> bytes:
    return body(HEADER | {"tensors": [FIRST | values, *HEADER["tensors"][1:]]})


def without(key: str) -> bytes:
    return body({name: value for name, value in HEADER.items() if name != key})


def zeros(count: int) -> bytes:
    """A zstd frame of so many zeros."""
    packer = zstandard.ZstdCompressor(level=1).compressobj(size=count)
    parts = [packer.compress(bytes(min(1 << 24, count - at))) for at in range(0, count, 1 << 24)]
    return b"".join([*parts, packer.flush()])


def claiming(count: int) -> bytes:
    """A zstd frame whose head says that it has so many bytes."""
    frame = zstandard.compress(b"abc" * 1000)
    assert frame[4] >> 6 == 1  # a content size of two bytes, less 256
    return frame[:4] + bytes([frame[4] & 0x3F | 0xC0]) + struct.pack("<Q", count) + frame[7:]


def packed(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data + CODES


MALFORMED = {
    "empty": (b"", "0 bytes are left"),
    "a head of 4 GB": (struct.pack("<I", 4_000_000_000) + body()[4:], "bytes are left"),
    "a text of 4 GB": (packed(zstandard.compress(struct.pack("<I", 4_000_000_000))), "4000000000 bytes"),
    "a head of 6 GB": (packed(claiming(6 << 30)), f"{6 << 30} unpacked"),
    "a bomb": (packed(zeros(1 << 29)), f"{1 << 29} unpacked"),
    "a bomb of codes": (body(codes=struct.pack("<64I", 100, *[0] * 63) + zeros(1 << 27)), "unpacked"),
    "another head": (packed(b"\x28\xb5\x2f\xfd" + b"\xff" * 9), "ZstdError"),
    "no JSON": (body(text=b"no JSON"), "not JSON"),
    "not UTF-8": (body(text=b"\xff\xfe{}"), "not JSON"),
    "nested": (body(text=b"[" * 100_000 + b"]" * 100_000), "not JSON"),
    "5,000 digits": (body(text=b'{"config": ' + b"9" * 5000 + b"}"), "not JSON"),
    "a list": (body([]), "[], expected dict"),
    "no settings": (without("config"), "config: None"),
    "no tensors": (without("tensors"), "tensors: None, expected list"),
    "no tokenizer": (without("tokenizer_sha256"), "tokenizer_sha256: None, expected text"),
    "no hash": (without("sha256_codes"), "sha256_codes: None"),
    "fewer codes": (body(codes=CODES[:-9]), "bytes are left, expected"),
    "no codes": (body(codes=b""), "256"),
    "other codes": (body(codes=bytes(len(CODES))), "0 packed bytes"),
    "frames of 4 GB": (body(codes=b"\xff" * 256 + CODES[256:]), "bytes are left, expected 4294967295"),
    "more of the head": (body(rest=REST + b"xx"), "2 bytes are left over"),
    "less of the head": (body(rest=REST[:-9]), "bytes are left, expected"),
    "another name": (with_first(name="moments."), "moments."),
    "a path": (with_first(name="../../x"), "../../x"),
    "a name of no text": (with_first(name=3), "tensors[0]: name: 3, expected text"),
    "a name twice": (with_first(name=HEADER["tensors"][1]["name"]), "twice"),
    "factors of another bank": (with_first(name="factors.qo_bank"), "qo_bank"),
    "a huge shape": (with_first(shape=[10**9, 10**9]), "expected at most"),
    "a negative shape": (with_first(shape=[-1, -5]), "shape[0]: -1, expected a whole number"),
    "a shape of text": (with_first(shape="abc"), "shape: 'abc', expected list"),
    "a nested shape": (with_first(shape=[[1]]), "shape[0]: [1]"),
    "a shape of 1,000": (with_first(shape=[1] * 1000), "dimension"),
    "no flag": (with_first(columns="x"), "columns: 'x', expected bool"),
    "plain for coded": (with_first(coded=not FIRST["coded"]), "bytes are left"),
    "NaN in a setting": (with_settings(rope_base=math.nan), "ROPE_BASE='NaN': expected a number"),
    "text for a number": (with_settings(num_layers="x"), "NUM_LAYERS='x': expected a whole number"),
    "a list for a text": (with_settings(ve_layers=[1]), "VE_LAYERS='[1]'"),
    "true for a number": (with_settings(num_layers=True), "NUM_LAYERS='true'"),
    "1e8 layers": (with_settings(num_layers=10**8), "NUM_LAYERS=100000000: must be at least 1, at most 1024"),
    "too many numbers": (with_settings(model_dim=24 * 10**4), "numbers, more than"),
    "a contradiction": (with_settings(num_heads=5), "NUM_HEADS=5 does not divide"),
    "a setting of another part": (with_settings(iterations=7), "unknown model setting 'iterations'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_artifact_is_named_with_place_and_value(tmp_path, name):
    content, words = MALFORMED[name]
    path = tmp_path / "a"
    path.write_bytes(signed(content))
    message = refused(tg.read_artifact, path)
    assert str(path) in message and words in message, message


def test_values_that_are_not_finite_in_an_artifact_are_named(tmp_path):
    model = random_model(SMALL, torch.float32)
    model.skip_weights.data[0, 0] = math.inf
    made = tg.quantize_state_dict(model.state_dict(), tg.Statistics(), SMALL)
    (tmp_path / "a").write_bytes(tg.encode_artifact(SMALL, made, "0"))
    assert "skip_weights has values that are not finite" in refused(tg.read_artifact, tmp_path / "a")


# ------------------------------------------------------------------------------------------------------------
# State dicts
# ------------------------------------------------------------------------------------------------------------


def deflated(path: Path, size: int) -> None:
    """A file by torch.save whose first tensor is so many zeros, compressed, as torch reads it."""
    torch.save(random_model(SMALL, torch.float32).state_dict(), path.with_name("plain"))
    with zipfile.ZipFile(path.with_name("plain")) as plain, zipfile.ZipFile(path, "w", 8) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, bytes(size) if name.endswith("data/0") else plain.read(name))


STATES = {
    "text": lambda path: path.write_text("hello"),
    "empty": lambda path: path.write_text(""),
    "a bomb": lambda path: deflated(path, 1 << 26),
    "a list": lambda path: torch.save([1], path),
    "numbers": lambda path: torch.save({"qo_bank": 3}, path),
    "numbers for names": lambda path: torch.save({3: torch.ones(2)}, path),
    "the old format": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
    "another model": lambda path: torch.save({"qo_bank": torch.zeros(2, 3)}, path),
}


@pytest.mark.parametrize("name", STATES)
def test_other_content_in_final_model_pt_is_named(tmp_path, name):
    STATES[name](tmp_path / "final_model.pt")
    assert "is not the weights of this model" in refused(weights_of, tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Settings, recipes, ranks
# ------------------------------------------------------------------------------------------------------------


def settings_of(text: bytes, path: Path) -> tg.Config:
    path.write_bytes(text)
    return tg.load_config({"RECIPE": str(path)})[0]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"DATA_PATH=data/run#3", "data/run#3"),
        (b"DATA_PATH=data/run #3", "data/run"),
        (b"DATA_PATH='data/run #3' # x", "data/run #3"),
        (b'DATA_PATH="it\'s" # "x"', "it's"),
        (b"DATA_PATH=~/data", "/home/me/data"),
        (b"DATA_PATH='~/data'", "~/data"),
        (b"\xef\xbb\xbfDATA_PATH=x\r\nSEED=1\r\n", "x"),
        ("DATA_PATH=d\u00e9mo".encode(), "d\u00e9mo"),
        (b"#DATA_PATH=y\nDATA_PATH=x", "x"),
    ],
)
def test_values_of_recipes_are_those_of_a_shell(tmp_path, monkeypatch, line, value):
    monkeypatch.setenv("HOME", "/home/me")
    assert settings_of(line, tmp_path / "r.env").data_path == value


HOSTILE_RECIPES = {
    "20,000 unknown names": (
        b"".join(b"NAME_OF_NOTHING_%d=1\n" % i for i in range(20_000)),
        "and 19960 more",
    ),
    "UTF-16": ("SEED=3\n".encode("utf-16"), "is not UTF-8 text"),
    "a NUL": (b"DATA_PATH=a\0b", "expected text of at most 4096 characters"),
    "5,000 digits": (b"SEED=" + b"9" * 5000, "expected a whole number"),
    "5,000 digits of a rate": (b"MATRIX_LR=" + b"9" * 5000, "expected a number"),
    "a number that overflows": (b"MATRIX_LR=1e999", "expected a number"),
    "a long list": (b"VE_LAYERS=" + b"1," * 200_000, "expected text"),
    "numbers that do not end": (b"MTP_WEIGHTS=" + b"1" * 4000 + b"x", "MTP_WEIGHTS"),
    "a seed of 65 bits": (b"SEED=18446744073709551616", "SEED=18446744073709551616: must be at least 0"),
    "1e8 layers": (b"NUM_LAYERS=100000000", "NUM_LAYERS=100000000: must be at least 1, at most 1024"),
    "a model of 1e12 numbers": (b"MODEL_DIM=1000000\nNUM_HEADS=1\nNUM_KV_HEADS=1", "more than"),
    "a window of 1e9": (b"TRAIN_SEQ_LEN=1000000000", "TRAIN_SEQ_LEN=1000000000"),
    "a line break in a name": (b"RUN_ID='a\x0bb'", "RUN_ID"),
    "a name of blanks": (b"RUN_ID=' '", "RUN_ID=' '"),
}


@pytest.mark.parametrize("name", HOSTILE_RECIPES)
def test_hostile_recipes_are_refused_in_few_lines(tmp_path, name):
    text, words = HOSTILE_RECIPES[name]
    with bounded_memory(), pytest.raises(UserError) as error:
        settings_of(text, tmp_path / "r.env")
    assert words in str(error.value) and len(str(error.value)) < 10_000


def test_the_largest_seed_is_taken():
    assert tg.load_config({"SEED": str(2**64 - 1)})[0].seed == 2**64 - 1
    torch.Generator().manual_seed(2**64 - 1)


MEETING = dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MASTER_PORT", "x"),
        ("MASTER_PORT", "99999"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("LOCAL_WORLD_SIZE", "x"),
        ("LOCAL_RANK", "-1"),
        ("WORLD_SIZE", "9" * 5000),
        ("RANK", "\u0663"),
    ],
)
def test_ranks_out_of_range_are_named(name, text):
    assert f"{name}=" in refused(tg.announced_ranks, MEETING | {name: text})


def test_processes_that_do_not_meet_are_named(monkeypatch):
    announced = MEETING | dict(MASTER_PORT="29517")
    for variable, value in announced.items():
        monkeypatch.setenv(variable, value)
    config = replace(tg.Config(), device="cpu", dist_timeout=1.0)
    message = refused(tg.start_ranks, config, announced | {"OMP_NUM_THREADS": "1"})
    assert "MASTER_ADDR=127.0.0.1 MASTER_PORT=29517" in message


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": ""}, 8),
        ({"cpu.max": "100000 0\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "250000\n"}, 8),
        ({}, 8),
    ],
)
def test_threads_follow_the_quota_of_the_container(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert tg.usable_cores(tmp_path) == expected


# ------------------------------------------------------------------------------------------------------------
# Data, results
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[v2] x", "a*b", "d\udce9mo", "\u00e9 ?"])
def test_folders_of_any_name_are_found(tmp_path, name):
    (tmp_path / name).mkdir()
    shard = write_shard(tmp_path / name / "fineweb_train_000000.bin", np.arange(9))
    config = replace(tg.Config(), data_path=str(tmp_path / name))
    assert tg.find_shards(config.shards("train")) == [str(shard)] == tg.find_shards(str(shard))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "is not JSON: RecursionError"),
        (b'{"shards": [{"file": "a", "tokens": ' + b"9" * 5000 + b"}]}", "is not JSON: ValueError"),
        (
            b'{"shards": [{"file": "a", "tokens": 1e400}], "tokenizer": {"sha256": ""}}',
            "shards[0]: tokens: inf",
        ),
        (b'{"shards": [{"file": 3}], "tokenizer": {"sha256": ""}}', "shards[0]: file: 3, expected text"),
        (b'{"shards": [{"file": "a\\u0000"}], "tokenizer": {"sha256": ""}}', "shards[0]: file: 'a\\x00'"),
        (b'{"shards": [{"file": "\\ud800"}], "tokenizer": {"sha256": ""}}', "shards[0]: file: '\\ud800'"),
        (b'{"shards": [], "tokenizer": {"sha256": 7}}', "tokenizer: sha256: 7, expected text"),
        (
            b'{"shards": [], "tokenizer": {"sha256": "7"}, "overlap": {"a": -1}}',
            "overlap: a: -1, expected a whole",
        ),
    ],
)
def test_a_manifest_is_refused_with_place_and_value(tmp_path, text, words):
    (tmp_path / "manifest.json").write_bytes(text)
    message = refused(tg.read_listing, str(tmp_path / "fineweb_val_000000.bin"))
    assert str(tmp_path / "manifest.json") in message and words in message


def test_a_byte_order_mark_and_a_listing_behind_a_dangling_link(tmp_path):
    shard, path = str(tmp_path / "fineweb_val_000000.bin"), tmp_path / "manifest.json"
    path.write_bytes(b'\xef\xbb\xbf{"shards": [], "tokenizer": {"sha256": "7"}}')
    assert tg.read_listing(shard).tokenizer_sha256 == "7"
    path.unlink()
    path.symlink_to("nowhere")
    assert "manifest.json" in refused(tg.read_listing, shard)


def test_validation_texts_have_a_limit(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    with open(path, "wb") as file:
        file.write(shard_header(1 << 29))
        file.truncate(1024 + (2 << 29))
    config = replace(tg.Config(), val_files=str(path))
    with pytest.raises(UserError, match="536870912 validation tokens"):  # mapped, so not within the limit
        tg.read_validation(config, tg.ByteTable(*[np.zeros(1024, np.int64)] * 3), "0")


@pytest.mark.parametrize("value", [10**400, "1", math.nan, None, True])
def test_a_result_has_finite_scores(tmp_path, value):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | {"val_bpb_sliding": value}))
    assert "result.json" in refused(tg.read_result, tmp_path)


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[1]", b'{"step": "x"}', b"[" * 100_000, b'{"a": 1}'])
def test_rows_of_metrics_that_are_none_are_dropped(tmp_path, line):
    row = b'{"step": 0, "val_loss": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n" + row)
    tg.RunLog(tmp_path).forget_after(3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == row


def test_a_tokenizer_with_a_piece_that_is_not_utf_8_is_named(tmp_path, demo_data):
    blob = (demo_data / "tokenizer.model").read_bytes()
    (tmp_path / "t.model").write_bytes(blob.replace(b"the", b"\xff\xfe\xfd"))
    assert "TOKENIZER_PATH=" in refused(tg.load_byte_table, str(tmp_path / "t.model"), 1024)


# ------------------------------------------------------------------------------------------------------------
# The evaluator, and the programs
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--length 99999999999999999999",
        "--count 0",
        "--seed -1",
        f"--seed {2**64}",
        "--temperature nan",
        "--prompt \udce9",
    ],
)
def test_samples_out_of_range_are_refused(words):
    assert "--" in refused(ev.sample_arguments, words.split())


def test_an_evaluation_does_not_write_through_a_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "eval").symlink_to("outside")
    path, config = tmp_path / "a.ptz", replace(tg.Config(), ttt_mode="none")
    assert "link" in refused(ev.evaluation_folder, path, config) and not list(
        (tmp_path / "outside").iterdir()
    )


@pytest.mark.parametrize("program", [tg, ev])
def test_help_without_docstrings(program, monkeypatch, capsys):
    """As under python -OO."""
    monkeypatch.setattr(program, "__doc__", None)
    assert program.main(["--help"], {}) == 0 and "NUM_LAYERS=11" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path):
    """As under a path with a space, which torch does not quote for the linker."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/bin/false",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    settings = replace(tg.Config(), use_compile="1")
    call = tg.maybe_compile(lambda x: (2 * x.sin()).cos(), settings, torch.device("cpu"))
    with pytest.raises(UserError, match="USE_COMPILE=0") as error:
        call(torch.ones(7, 3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2), (MemoryError(), 1), (OSError(5, "x"), 1), (ArithmeticError("x"), 1),
        (UnicodeEncodeError("ascii", "\u00e9", 0, 1, "x"), 2),
        (torch.OutOfMemoryError("Tried to allocate 9"), 1),
    ],
)  # fmt: skip
def test_exit_codes(error, code, capsys):
    @tg.exits
    def program(argv, environ):
        raise error

    assert program([], {}) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) > 8


def test_memory_that_is_not_there_is_one_line_and_other_errors_are_none(capsys):
    @tg.exits
    def program(argv, environ):
        return torch.empty(1 << 45) if argv else [].pop()

    with bounded_memory():
        assert program(["x"], {}) == 1
    assert "can't allocate memory" in capsys.readouterr().err
    with pytest.raises(IndexError):
        program([], {})
