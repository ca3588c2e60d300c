"""Inputs of data/ that another program may have written: mutated, they are read or refused, within bounds.

INPUT_CASES=N runs N mutations of each kind instead of a few.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cores
import demo
import download
import numpy as np
import prepare
import pytest
import zstandard
from conftest import ROOT
from files import InputError, escaped, read_json
from huggingface_hub.utils import close_session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prepare import COMPRESS

CASES = int(os.environ.get("INPUT_CASES", 40))
FEW = settings(max_examples=CASES, deadline=None, database=None, derandomize=True,
               suppress_health_check=list(HealthCheck))  # fmt: skip
GROWTH = 1 << 29  # bytes of memory that reading a small file may take
INSERTED = [b"\0" * 4, b"\xef\xbb\xbf", b"9" * 5000, b"[" * 100_000, b'"', b"\n", b"\r\n", b",", b"-",
            b"NaN", b"1e999", b"\xff\xfe"]  # fmt: skip
HOSTILE = [None, True, -1, 2**70, 10**400, 0.5, float("nan"), float("inf"), "", "\x00", "\ud800", "../../x",
           "/dev/zero", "9" * 5000, [], {}, [[]], {"a": 1}]  # fmt: skip


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the address space to what it is and twice GROWTH; no more than GROWTH may have been touched."""
    size = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
    limits, before = (
        resource.getrlimit(resource.RLIMIT_AS),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * GROWTH, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < GROWTH


@st.composite
def edits(draw: st.DrawFn) -> list[tuple]:
    """Changes of a file's bytes: (place in its length, bytes removed, bytes put there); none: as it is."""
    place = st.floats(0, 1, exclude_max=True)
    inserted = st.one_of(st.binary(max_size=8), st.sampled_from(INSERTED))
    return draw(st.lists(st.tuples(place, st.sampled_from([0, 0, 1, 2, 30, 10**6]), inserted), max_size=4))


def changed(content: bytes, changes: list[tuple]) -> bytes:
    for place, removed, inserted in changes:
        start = int(place * len(content))
        content = content[:start] + inserted + content[start + removed :]
    return content


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a JSON value but itself."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def altered(draw: st.DrawFn, value: Any) -> tuple[Any, bool]:
    """`value` with up to three of its values replaced or removed, and whether it is as it was."""
    value, count = json.loads(json.dumps(value)), draw(st.integers(0, 3))
    for _ in range(count):
        if found := list(places(value)):
            *path, last = draw(st.sampled_from(found))
            holder = value
            for key in path:
                holder = holder[key]
            if draw(st.booleans()):
                del holder[last]
            else:
                holder[last] = deepcopy(draw(st.sampled_from(HOSTILE)))
    return value, count == 0


def write_altered(path: Path, value: Any, changes: list[tuple]) -> None:
    path.write_bytes(changed(json.dumps(value).encode(), changes))


# ------------------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------------------

RECORDS = [
    {"text": "one \u00e9\u4eee\U0001f600", "id": 7},
    {"meta": {"text": [1, {"a": None}]}, "text": 'two\nlines \\ "quoted"'},
    {"text": "", "x": 1e-5},
]
LINES = [b"\xef\xbb\xbf" + json.dumps(record).encode() + b"\r\n" for record in RECORDS]


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize("where", ["plain", "stored"])
def test_mutated_text_is_read_or_refused(tmp_path: Path, suffix: str, where: str) -> None:
    """Changes of the text before it is compressed, and of the compressed file."""
    path, pack = tmp_path / f"a.jsonl{suffix}", COMPRESS.get(suffix, bytes)

    @FEW
    @given(edits())
    def check(changes: list[tuple]) -> None:
        parts = [changed(line, changes) for line in LINES] if where == "plain" else LINES
        content = b"".join(map(pack, parts))
        path.write_bytes(content if where == "plain" else changed(content, changes))
        try:
            found = list(prepare.read_texts(path))
        except InputError as error:
            assert changes and str(path) in str(error)
        else:
            assert all(text.encode() == utf8 for text, utf8 in found)
            assert changes or [text for text, _ in found] == [record["text"] for record in RECORDS]

    with bounded():
        check()


def bomb(suffix: str, size: int) -> bytes:
    """A file of a few hundred kilobytes, at most, that holds `size` bytes of "a"."""
    if suffix == ".zst":
        compressor = zstandard.ZstdCompressor(level=19).compressobj()
    else:
        compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = b"a" * (1 << 20)
    return b"".join(compressor.compress(block) for _ in range(size >> 20)) + compressor.flush()


ZSTD = b"\x28\xb5\x2f\xfd"
LIKE_A_BOMB = {  # name of the file, its content or the size of a sparse file, what is said
    "zst": ("a.txt.zst", lambda: bomb(".zst", 1 << 27), "expands to more than 1000 times its size"),
    "gz": ("a.jsonl.gz", lambda: bomb(".gz", 1 << 27), "a document of more than"),
    "window": ("a.txt.zst", lambda: ZSTD + bytes([0, (31 - 10) << 3, 1, 0, 0]), "too much memory"),
    "size": ("a.txt.zst", lambda: ZSTD + b"\xe0" + (6 << 30).to_bytes(8, "little") + b"\1\0\0", "memory"),
    "text": ("a.txt", lambda: 6 << 30, "a document of more than 134,217,728 bytes"),
    "lines": ("a.jsonl", lambda: 6 << 30, "line 1: a document of more than 67,108,864 bytes"),
}


@pytest.mark.parametrize("kind", LIKE_A_BOMB)
def test_what_would_fill_the_memory_is_refused(tmp_path: Path, kind: str) -> None:
    name, make, said = LIKE_A_BOMB[kind]
    path, content = tmp_path / name, make()
    path.write_bytes(b"" if isinstance(content, int) else content)
    if isinstance(content, int):
        os.truncate(path, content)
    with bounded(), pytest.raises(InputError, match=said):
        list(prepare.read_texts(path))


def test_a_document_has_a_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(prepare.FORMATS, ".txt", 10)
    monkeypatch.setitem(prepare.FORMATS, ".jsonl", 14)
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(b"0123456789")
    lines.write_bytes(b'{"text":"abc"}\n{"text":"d"}')
    assert [t for path in (text, lines) for t, _ in prepare.read_texts(path)] == ["0123456789", "abc", "d"]
    text.write_bytes(b"0123456789a")
    lines.write_bytes(b'{"text":"a"}\n{"text":"abcd"}\n')
    for path, place in ((text, "a.txt"), (lines, "a.jsonl, line 2")):
        with pytest.raises(InputError, match=f"{place}: a document of more than"):
            list(prepare.read_texts(path))


def test_a_tokenizer_that_changes_text_takes_shorter_documents(
    tmp_path, demo_data, monkeypatch, capsys
) -> None:
    """It encodes a document at once, with 200 bytes of memory for each byte."""
    monkeypatch.setattr(prepare, "LOSSY_BYTES", 20)
    monkeypatch.setattr(prepare, "is_lossless", lambda sp: False)
    (tmp_path / "a.txt").write_text("0123456789" * 3)
    model = str(demo_data / "tokenizer.model")
    arguments = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", model]
    assert prepare.main([*arguments, "--val-fraction", "0"]) == 2
    assert "a document of more than 20 bytes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Tokenizers, shards, records
# ------------------------------------------------------------------------------------------------------------


def test_mutated_tokenizers_are_used_or_refused(demo_data: Path) -> None:
    model = (demo_data / "tokenizer.model").read_bytes()

    @FEW
    @given(edits())
    def check(changes: list[tuple]) -> None:
        try:
            prepare.load_tokenizer(content := changed(model, changes), "name")
            tokens, counts = prepare.Encoder(content, False).document("Hello \u2581 w\u00f6rld 12\n", "val")
        except InputError as error:
            assert changes and "name" in str(error)
        else:
            assert tokens[0] == 1 and (counts is None or len(counts) == len(tokens))

    with bounded():
        check()


def test_mutated_shards_are_counted_or_refused(tmp_path: Path) -> None:
    shards = {split: tmp_path / f"fineweb_{split}_000000.bin" for split in ("train", "val")}
    tokens = np.array([1, 5, 6, 7, 1, 8, 9], "<u2").tobytes()
    content = prepare.shard_header(7) + tokens

    @FEW
    @given(edits(), st.sampled_from(["train", "val"]))
    def check(changes: list[tuple], split: str) -> None:
        for each, path in shards.items():
            path.write_bytes(changed(content, changes) if each == split else content)
        try:
            found = prepare.count_overlap(tmp_path)
        except InputError as error:
            assert changes and str(tmp_path) in str(error)
        else:
            assert changes or (found["documents"], found["documents_inside"]) == (2, 2)

    with bounded():
        check()


def made_demo(folder: Path) -> dict:
    """Files as of a demo corpus, and their manifest."""
    for name in ("tokenizer.model", "fineweb_val_000000.bin"):
        (folder / name).write_bytes(name.encode())
    entries = {name: {"file": name, "sha256": demo.digest_of(folder / name)} for name in os.listdir(folder)}
    total = {"documents": 1, "text_bytes": 7, "tokens": 3}
    return {"name": "demo", "python": demo.platform.python_version(), "text_version": demo.TEXT_VERSION,
            "tokenizer": entries["tokenizer.model"], "shards": [entries["fineweb_val_000000.bin"]],
            "splits": {"train": total, "val": total},
            "case_ops": {"val_tokens": 1, "val_target_bytes": 2, "sidecars": []}}  # fmt: skip


def test_mutated_manifests_are_read_or_refused(tmp_path: Path) -> None:
    manifest = made_demo(tmp_path)

    @FEW
    @given(altered(manifest), edits())
    def check(change: tuple[dict, bool], changes: list[tuple]) -> None:
        value, same = change
        write_altered(tmp_path / "manifest.json", value, changes)
        try:
            found = demo.existing_demo(tmp_path)
            assert found is None or prepare.describe(found).startswith("train: ") or not same
        except InputError as error:
            assert (changes or not same) and str(tmp_path) in str(error)
        else:
            assert changes or not same or found == manifest
        try:
            assert isinstance(read_json(tmp_path / "manifest.json", {}), dict)  # as --overlap reads it
        except InputError:
            assert changes or not same

    with bounded():
        check()


def test_mutated_sources_and_published_manifests(tmp_path: Path, monkeypatch) -> None:
    """source.json and the hash cache are read or ignored, a repository's manifest is read or refused."""
    files = [{"file": "a", "size": 1}]
    source = {"files": files, "overlap": {"documents": 3}}
    published = {"datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "t", "stats": {}}],
                 "tokenizers": [{"name": "t", "model_path": "tokenizers/a_1024.model"}]}  # fmt: skip
    shard = tmp_path / "shard.bin"
    shard.write_bytes(b"abc")
    status = shard.stat()
    cache = {f"{status.st_size} {status.st_mtime_ns} {shard}": "0" * 64}
    names = ("datasets/fineweb10B_sp1024/fineweb_val_000000.bin", "manifest.json", "tokenizers/a_1024.model")
    listed = [download.RemoteFile(name, 1, None, "") for name in names]
    options = SimpleNamespace(variant="sp1024", prefix="")
    monkeypatch.setattr(download, "fetch_checked", lambda hub, file, staging: tmp_path / "manifest.json")

    @FEW
    @given(altered(source), altered(published), altered(cache), edits())
    def check(of_source, of_published, of_cache, changes) -> None:
        for name, (value, _) in (
            ("source.json", of_source),
            ("manifest.json", of_published),
            ("cache", of_cache),
        ):
            write_altered(tmp_path / name, value, changes)
        kept = download.kept_overlap(tmp_path / "source.json", {"files": files})
        is_same = of_source[1] and not changes
        assert kept == {"overlap": {"documents": 3}} if is_same else isinstance(kept.get("overlap", {}), dict)
        digest = download.HashCache(tmp_path / "cache", True).sha256(shard)
        assert digest == "0" * 64 if of_cache[1] and not changes else isinstance(digest, str)
        try:
            manifest = download.read_manifest(SimpleNamespace(files=listed), options)
            found = download.choose_tokenizer(listed, "datasets/fineweb10B_sp1024", manifest)
        except InputError:
            assert changes or not of_published[1]
        else:
            assert found == listed[2:]

    with bounded():
        check()


# ------------------------------------------------------------------------------------------------------------
# Files that are none, names, variables
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "dangling"])
def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path, demo_data, kind, capsys) -> None:
    folder = tmp_path / "[v2] data"
    shutil.copytree(demo_data, folder)
    text = tmp_path / "a b.txt"
    text.write_text("hello")
    for name, run in (
        ("manifest.json", lambda: prepare.main(["--overlap", str(folder)])),
        ("manifest.json", lambda: demo.main(["--out", str(folder)])),
        ("fineweb_val_000000.bin", lambda: prepare.main(["--overlap", str(folder)])),
        ("tokenizer.model", lambda: prepare.main([str(text), "--out", str(tmp_path / "out"), "--tokenizer",
                                                  str(folder / "tokenizer.model"), "--val-fraction", "0"])),
    ):  # fmt: skip
        path, kept = folder / name, (folder / name).read_bytes()
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "missing")
        if kind != "dangling" or name != "manifest.json":  # without a manifest there is nothing to read
            assert run() == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and str(path) in error and "Traceback" not in error
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(kept)


def test_a_home_that_does_not_exist_and_the_c_locale(tmp_path: Path, demo_data: Path) -> None:
    folder = tmp_path / "d\u00e9mo [1] a"
    folder.mkdir()
    shutil.copy(demo_data / "tokenizer.model", folder)
    (folder / "\u00e9.TXT").write_text("h\u00e9llo\n")
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                   "HOME": "/nonexistent", "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
    out, model = folder / "\u00e0", folder / "tokenizer.model"
    command = [sys.executable, "-OO", str(ROOT / "data/prepare.py"), str(folder), "--out", str(out)]
    command += ["--tokenizer", str(model), "--val-fraction", "0", "--workers", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "train: 1 documents, 7 bytes" in done.stdout, done.stderr
    (name,) = json.loads((out / "manifest.json").read_text())["source"]
    assert name == escaped(os.fsencode(folder.name).decode("ascii", "surrogateescape"))


@pytest.mark.parametrize(
    ("files", "own", "cores_allowed"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 2),  # a container of version 2
        ({"cpu.max": "max 100000\n"}, "0::/\n", 16),
        ({"a/cpu.max": "max 100000", "a/b/cpu.max": "400000 100000", "cpu.max": "x"}, "0::/a/b\n", 4),
        ({"cpu.max": "50000 100000\n"}, "0::/not/seen/from/inside\n", 1),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
         "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n", 3),  # of version 1
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/\n", 16),
        ({"cpu.max": "100000 0"}, "0::/\n", 16),
        ({}, None, 16),
    ],
)  # fmt: skip
def test_cores_of_a_container(tmp_path: Path, monkeypatch, files, own, cores_allowed) -> None:
    groups = tmp_path / "cgroup"
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(content)
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cores, "GROUPS", groups)
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(16)))
    assert cores.core_count() == cores_allowed


@pytest.mark.parametrize(
    ("name", "value", "code", "said"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", 2, "with ALL_PROXY"),
        ("ALL_PROXY", "socks4://127.0.0.1:1", 2, "Unknown scheme"),
        ("HTTP_PROXY", "http://[::1", 2, "with HF_ENDPOINT, HTTP_PROXY: Invalid port"),
        ("NO_PROXY", "[::", 2, "with .*NO_PROXY"),
        ("HTTP_PROXY", "127.0.0.1:1", 1, "does not respond"),
        ("HF_ENDPOINT", "localhost:1", 2, "missing an 'http://' or 'https://' protocol"),
        ("HF_TOKEN", "h\u00e9", 2, "with HF_ENDPOINT, HF_TOKEN: 'ascii'"),
    ],
)  # fmt: skip
def test_proxies_and_tokens_that_cannot_be_used(
    tmp_path, monkeypatch, capsys, name, value, code, said
) -> None:
    for other in [other for other in os.environ if download.NETWORK.fullmatch(other)]:
        monkeypatch.delenv(other)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    close_session()  # the client keeps the variables of its first use
    assert download.main(["--variant", "sp1024", "--dry-run", "--out", str(tmp_path)]) == code
    close_session()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error), error


def test_ctrl_c_is_one_word(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    for module, name, arguments in (
        (prepare, "prepare", ["a.txt", "--out", "b"]),
        (prepare, "count_overlap", ["--overlap", "b"]),
        (demo, "existing_demo", ["--out", str(tmp_path)]),
        (download, "download", ["--variant", "sp1024"]),
    ):
        monkeypatch.setattr(module, name, interrupted)
        assert module.main(arguments) == 130
        assert capsys.readouterr().err == "stopped\n"
