"""Files of strangers: links are not written through,
control characters are shown, a broken result is one line."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
import runfiles


@pytest.mark.parametrize(
    "write", [runfiles.write_file, lambda path, content: runfiles.create(path).write(content)]
)
def test_nothing_is_written_through_a_link(tmp_path, write):
    outside = tmp_path / "outside"
    outside.write_text("kept")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("nll.npy", "nll.npy.tmp", ".nll.npy.tmp", "nll.npy.new", ".nll.npy.new"):
        (folder / name).symlink_to(outside)
    write(folder / "nll.npy", b"new")
    assert outside.read_text() == "kept" and not (folder / "nll.npy").is_symlink()
    assert (folder / "nll.npy").read_bytes() == b"new" and len(list(folder.iterdir())) == 5


def test_a_write_that_fails_leaves_what_stood_there(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runfiles.write_file(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_random_name_that_is_a_link_already_is_no_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(runfiles.secrets, "token_hex", lambda length: "known")
    (tmp_path / "a.known.tmp").symlink_to(tmp_path / "outside")
    with pytest.raises(FileExistsError):
        runfiles.write_file(tmp_path / "a", b"new")
    assert not (tmp_path / "outside").exists()


def test_control_characters_are_shown():
    everything = "".join(map(chr, range(0x2100))) + "\ufeff\ud800"
    shown = runfiles.escape(everything)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not [
        c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI")
    ]
    coded = "a\x1b[31m\x9b\tb\r\x7f"
    assert json.loads('"' + runfiles.escape(coded) + '"') == coded
    assert runfiles.escape("José ▁ 🙂") == "José ▁ 🙂" and runfiles.escape_lines("a\tb\nc") == "a\tb\nc"


def test_what_is_no_plain_file_is_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file").write_text("x")
    assert not list(runfiles.links(tmp_path)) and runfiles.read_plain(tmp_path / "sub/file") == b"x"
    os.mkfifo(tmp_path / "sub/pipe")
    (tmp_path / "folder").symlink_to("/")
    (tmp_path / "sub/link").symlink_to(tmp_path / "sub/file")
    assert {path.name for path in runfiles.links(tmp_path)} == {"pipe", "folder", "link"}
    for name in ("pipe", "link"):
        with pytest.raises((OSError, ValueError)):
            runfiles.read_plain(tmp_path / "sub" / name)


@pytest.mark.parametrize(
    "path, below", [("a/b", True), ("a", True), ("a/../b", False), ("ab", False), ("/etc", False)]
)
def test_paths_below_a_folder(monkeypatch, tmp_path, path, below):
    monkeypatch.chdir(tmp_path)
    assert runfiles.is_below(path, "a") == below == runfiles.is_below(path, "nowhere", tmp_path / "a")


BROKEN = {  # text of result.json, words of the line
    "nothing": ("", "is not a JSON object"),
    "cut": ('{"val_bpb_sliding": 1.', "is not a JSON object"),
    "a list": ("[1]", "is not a JSON object"),
    "nested": ("[" * 100_000, "is not a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "is not a JSON object"),
    "fits alone": ('{"fits": true}', "lacks val_bpb_sliding, bytes_total"),
    "no size": ('{"fits": true, "val_bpb_sliding": 1.5}', "lacks bytes_total"),
    "a score in words": (
        '{"fits": true, "val_bpb_sliding": "1.5", "bytes_total": 1}',
        "val_bpb_sliding as a number",
    ),
    "a score of null": (
        '{"fits": true, "val_bpb_sliding": null, "bytes_total": 1}',
        "val_bpb_sliding as a number",
    ),
}


@pytest.mark.parametrize("text, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_result_is_one_line(tmp_path, text, words):
    path = tmp_path / "result.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as told:
        runfiles.read_result(path, "bytes_total", "fits")
    assert words in str(told.value) and "\n" not in str(told.value) and str(path) in str(told.value)


def test_a_result_is_read_through_links_but_from_no_device(tmp_path):
    (tmp_path / "a").write_text('{"fits": true, "val_bpb_sliding": 1.5, "bytes_total": 1}')
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert runfiles.read_result(tmp_path / "b", "bytes_total", "fits")["val_bpb_sliding"] == 1.5
    for name, target in (("zero", "/dev/zero"), ("absent", "nowhere")):
        Path(tmp_path / name).symlink_to(target)
        with pytest.raises(ValueError, match="no such file"):
            runfiles.read_object(tmp_path / name)


def test_what_cannot_be_read_is_not_called_malformed(tmp_path, monkeypatch):
    """An error of the system has its own words; a library's OSError is about the content."""
    with (
        pytest.raises(ValueError, match=r"^RECIPE=absent: cannot be read: No such file or directory$"),
        runfiles.decoding("RECIPE=absent", "UTF-8 text"),
    ):
        (tmp_path / "absent").read_text()
    with pytest.raises(ValueError, match=r"^a is not a frame: damaged$"), runfiles.decoding("a", "a frame"):
        raise OSError("damaged")
    (tmp_path / "large.json").write_text('{"a": 1}')
    monkeypatch.setattr(runfiles, "JSON_LIMIT", 5)
    with pytest.raises(ValueError, match=r"large.json: 8 bytes, expected at most 5$"):
        runfiles.read_object(tmp_path / "large.json")
