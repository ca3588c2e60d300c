"""data/download.py against a stand-in for the hub on 127.0.0.1, through the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import download
import files
import pytest
from formats import SHARD_MAGIC, shard_header
from huggingface_hub import constants

REPO, COMMIT = "owner/export", "a" * 40
FOLDER = "datasets/datasets/fineweb10B_sp1024"


def shard(first: int, tokens: int) -> bytes:
    numbers = (((first + i) % 1000) + 4 for i in range(tokens))
    return shard_header(tokens) + struct.pack(f"<{tokens}H", *numbers)


class Repository:
    """Files of the stand-in and the faults that it commits; `requests` records (method, path, Range)."""

    def __init__(self) -> None:
        self.commit = COMMIT
        self.files: dict[str, bytes] = {
            "README.md": b"hello",
            "datasets/tokenizers/fineweb_1024_bpe.model": b"model 1024",
            "datasets/tokenizers/fineweb_1024_bpe.vocab": b"vocab 1024",
            "datasets/tokenizers/fineweb_8192_bpe.model": b"model 8192",
            "datasets/datasets/fineweb10B_sp8192_caps/fineweb_val_000000.bin": shard(7, 20),
            "datasets/datasets/fineweb10B_sp8192_caps/fineweb_val_bytes_000000.bin": shard(9, 20),
            f"{FOLDER}/fineweb_val_000000.bin": shard(1, 300),
            f"{FOLDER}/fineweb_val_000001.bin": shard(2, 40),
        }
        for index in range(4):
            self.files[f"{FOLDER}/fineweb_train_{index:06d}.bin"] = shard(100 + index, 500)
        self.manifest(1)
        self.listed: dict[str, bytes] = {}  # content that the listing claims where it differs
        self.cut_once: dict[str, int] = {}
        self.wrong_once: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []

    def manifest(self, version: int) -> None:
        self.files["datasets/manifest.json"] = json.dumps(
            {
                "version": version,
                "datasets": [
                    {"name": "fineweb10B_sp1024", "tokenizer_name": "t", "stats": {"version": version}}
                ],
                "tokenizers": [{"name": "t", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
            }
        ).encode()

    def downloads(self) -> list[str]:
        return [
            path
            for method, path, _ in self.requests
            if method == "GET" and not path.endswith("manifest.json")
        ]

    def tree(self) -> list[dict]:
        entries = []
        for path, content in (self.files | self.listed).items():
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
            if path.endswith(".bin"):
                entry["lfs"] = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 130,
                }
            entries.append(entry)
        return entries


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repository: Repository

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path, api = unquote(urlsplit(self.path).path), f"/api/datasets/{REPO}"
        if path.startswith(f"{api}/tree/"):
            self.send(200, json.dumps(self.repository.tree()).encode(), {"Content-Type": "application/json"})
        elif path == api or path == f"{api}/revision/main":
            body = {"id": REPO, "sha": self.repository.commit, "siblings": []}
            self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif path.startswith(start := f"/datasets/{REPO}/resolve/{self.repository.commit}/"):
            self.send_file(path.removeprefix(start))
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str) -> None:
        wanted, repository = self.headers.get("Range"), self.repository
        repository.requests.append((self.command, name, wanted))
        content = repository.files[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": repository.commit}
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and name in repository.wrong_once:
            repository.wrong_once.remove(name)
            content = content[:-1] + bytes([content[-1] ^ 1])
        cut = repository.cut_once.pop(name, None) if self.command == "GET" else None
        self.send(206 if start else 200, content[start:], headers, cut)

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    repository = Repository()
    handler = type("BoundHandler", (Handler,), {"repository": repository})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)
    # what arrives in part is kept in multiples of this
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    yield repository
    server.shutdown()
    server.server_close()


def run(out: Path, *options: str, variant: str = "sp1024") -> int:
    return download.main(
        ["--repo", REPO, "--variant", variant, "--train-shards", "2", "--out", str(out), *options]
    )


def contents(out: Path) -> dict[str, bytes]:
    """All files of a folder but the downloader's own notes."""
    files = [path for path in out.rglob("*") if path.is_file() and ".download" not in path.parts]
    return {
        path.relative_to(out).as_posix(): path.read_bytes() for path in files if path.name != "source.json"
    }


def source(out: Path) -> dict:
    return json.loads((out / "datasets/fineweb10B_sp1024/source.json").read_text())


def expected(hub: Repository, train_shards: int = 2) -> dict[str, bytes]:
    names = [f"fineweb_val_{index:06d}.bin" for index in range(2)]
    names += [f"fineweb_train_{index:06d}.bin" for index in range(train_shards)]
    shards = {f"datasets/fineweb10B_sp1024/{name}": hub.files[f"{FOLDER}/{name}"] for name in names}
    return shards | {
        "tokenizers/fineweb_1024_bpe.model": hub.files["datasets/tokenizers/fineweb_1024_bpe.model"]
    }


def test_layout_and_source(hub: Repository, tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert contents(tmp_path) == expected(hub)
    record = source(tmp_path)
    assert (record["repo"], record["revision"], record["variant"]) == (REPO, COMMIT, "sp1024")
    assert record["published"]["stats"] == {"version": 1}
    for entry in record["files"]:
        content = contents(tmp_path)[entry["file"]]
        assert entry["size"] == len(content) and entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["tokens"] == ((len(content) - 1024) // 2 if entry["file"].endswith(".bin") else None)


def test_folders_that_are_links_to_another_disk(hub: Repository, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if os.stat(other).st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is on the disk of the temporary files")
        (tmp_path / "datasets").symlink_to(other)
        assert run(tmp_path) == 0
        found = {f"datasets/{name}": content for name, content in contents(Path(other)).items()}
        assert found | contents(tmp_path / "tokenizers") == {
            name.removeprefix("tokenizers/"): content for name, content in expected(hub).items()
        }
        assert not list(tmp_path.rglob("*.tmp")) and source(tmp_path)["revision"] == COMMIT


def test_second_run_downloads_nothing_and_more_shards_only_the_new_ones(
    hub: Repository, tmp_path: Path
) -> None:
    assert run(tmp_path) == 0
    hub.requests.clear()
    assert run(tmp_path) == 0 and hub.downloads() == []
    assert run(tmp_path, "--verify", "--train-shards", "3") == 0
    assert hub.downloads() == [f"{FOLDER}/fineweb_train_000002.bin"]
    assert contents(tmp_path) == expected(hub, 3)
    assert run(tmp_path, "--train-shards", "1") == 0  # those beyond the first one stay and are recorded
    assert len(source(tmp_path)["files"]) == 6


def test_interrupted_download_resumes(
    hub: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{FOLDER}/fineweb_val_000000.bin"
    hub.cut_once[name] = 700
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    assert run(tmp_path) == 1
    assert "datasets/fineweb10B_sp1024/fineweb_val_000000.bin" not in contents(tmp_path)
    assert not (tmp_path / "datasets/fineweb10B_sp1024/source.json").exists()
    hub.requests.clear()
    assert run(tmp_path) == 0
    assert ("GET", name, "bytes=700-") in hub.requests
    assert contents(tmp_path) == expected(hub)


def test_lost_connection_resumes_within_a_run(hub: Repository, tmp_path: Path) -> None:
    name = f"{FOLDER}/fineweb_train_000001.bin"
    hub.cut_once[name] = 1500
    assert run(tmp_path) == 0
    assert ("GET", name, "bytes=1500-") in hub.requests
    assert contents(tmp_path) == expected(hub)


def test_damage_on_the_way_is_fetched_again(hub: Repository, tmp_path: Path) -> None:
    name = f"{FOLDER}/fineweb_train_000000.bin"
    hub.wrong_once.add(name)
    assert run(tmp_path) == 0
    assert hub.downloads().count(name) == 2
    assert contents(tmp_path) == expected(hub)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_local_file_is_fetched_again(hub: Repository, tmp_path: Path, damage: str) -> None:
    assert run(tmp_path) == 0
    path = tmp_path / "datasets/fineweb10B_sp1024/fineweb_train_000001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "flip" else content[:-10])
    hub.requests.clear()
    assert run(tmp_path) == 0
    assert hub.downloads() == [f"{FOLDER}/fineweb_train_000001.bin"]
    assert contents(tmp_path) == expected(hub)


@pytest.mark.parametrize(
    "name", [f"{FOLDER}/fineweb_val_000001.bin", "datasets/tokenizers/fineweb_1024_bpe.model"]
)
def test_wrong_hash_is_refused(
    hub: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    hub.listed[name] = hub.files[name][:-1] + b"\xff"
    assert run(tmp_path) == 1
    assert Path(name).name in capsys.readouterr().err
    assert Path(name).name not in {Path(file).name for file in contents(tmp_path)}
    assert not (tmp_path / "datasets/fineweb10B_sp1024/source.json").exists()


def test_bad_shard_header_is_refused(
    hub: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{FOLDER}/fineweb_train_000000.bin"
    hub.files[name] = struct.pack("<i", SHARD_MAGIC + 1) + shard_header(500)[4:] + bytes(1000)
    assert run(tmp_path) == 1
    assert "20240521" in capsys.readouterr().err
    assert "datasets/fineweb10B_sp1024/fineweb_train_000000.bin" not in contents(tmp_path)


def test_source_follows_the_repository(hub: Repository, tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    hub.commit = "b" * 40
    hub.manifest(2)
    hub.files[f"{FOLDER}/fineweb_train_000001.bin"] = shard(5, 123)
    assert run(tmp_path) == 0
    assert source(tmp_path)["revision"] == "b" * 40
    assert source(tmp_path)["published"]["stats"] == {"version": 2}
    assert contents(tmp_path) == expected(hub)


def test_counts_of_the_overlap_stay_while_the_files_do(hub: Repository, tmp_path: Path) -> None:
    path = tmp_path / "datasets/fineweb10B_sp1024/source.json"
    assert run(tmp_path) == 0
    first = source(tmp_path)
    path.write_text(json.dumps({**first, "overlap": {"documents": 7}}))
    assert run(tmp_path) == 0 and source(tmp_path) == {**first, "overlap": {"documents": 7}}
    assert run(tmp_path, "--train-shards", "3") == 0 and "overlap" not in source(tmp_path)
    for content in ("[]", "{", '{"files": [], "overlap": 1}'):
        path.write_text(content)
        assert run(tmp_path, "--train-shards", "3") == 0 and "overlap" not in source(tmp_path)


def test_json_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(TypeError):
        download.write_json(tmp_path / "a.json", {1, 2})
    monkeypatch.setattr(files.os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        download.write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (
        tmp_path / "a.json"
    ).read_text() == "old"


def test_shards_of_another_export_are_not_mixed_in(
    hub: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--train-shards", "4") == 0
    del hub.files[f"{FOLDER}/fineweb_train_000003.bin"]
    assert run(tmp_path) == 2
    assert "fineweb_train_000003.bin" in capsys.readouterr().err


def test_too_many_shards(hub: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--train-shards", "5") == 2
    assert "has 4 training shards" in capsys.readouterr().err
    assert contents(tmp_path) == {}


def test_unknown_variant_lists_the_known_ones(
    hub: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, variant="sp4096") == 2
    assert "sp1024, sp8192_caps" in capsys.readouterr().err


def test_any_variant_name_and_byte_counts(hub: Repository, tmp_path: Path) -> None:
    assert run(tmp_path, "--train-shards", "0", variant="sp8192_caps") == 0
    folder = "datasets/fineweb10B_sp8192_caps"
    assert set(contents(tmp_path)) == {
        f"{folder}/fineweb_val_000000.bin",
        f"{folder}/fineweb_val_bytes_000000.bin",
        "tokenizers/fineweb_8192_bpe.model",
    }


def test_dry_run_touches_nothing(hub: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "new", "--dry-run") == 0
    total = sum(len(content) for content in expected(hub).values())
    assert f"{total:,} bytes to download" in capsys.readouterr().out
    assert hub.downloads() == [] and not (tmp_path / "new").exists()


def test_unknown_repository_and_silent_hub(
    hub: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "--repo", "owner/nothing") == 2
    assert "owner/nothing" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run(tmp_path) == 1
    assert "Check the connection" in capsys.readouterr().err
