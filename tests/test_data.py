"""Data: shards written by struct and read back, broken shards,
the endless stream, batches by rank, the manifest."""

from __future__ import annotations

import json
import math
import os
import struct
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import advice
import formats
import numpy as np
import pytest
import torch

import train_gpt
from train_gpt import (
    Config,
    TokenStream,
    UserError,
    check_disjoint,
    check_listing,
    open_shard,
    split_batch,
    step_batches,
)

VOCAB = 1024
SHARED = ("SHARD_MAGIC", "SHARD_VERSION", "BOS_ID", "SIZE_CAP", "ARTIFACT_MAGIC")


def write_shard(
    path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None
) -> Path:
    """A shard, byte by byte: 256 little-endian int32, then little-endian uint16."""
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))
    return path


def test_the_constants_of_the_tools_are_the_trainers():
    """And those of the published format, spelled out here: what writes and what reads could both be wrong."""
    assert (formats.SHARD_MAGIC, formats.SHARD_VERSION, formats.HEADER_BYTES) == (20240520, 1, 1024)
    assert (formats.BOS_ID, formats.SIZE_CAP) == (1, 16_000_000)
    for ours, theirs in (("HEADER_BYTES", "SHARD_HEADER_BYTES"), *((n, n) for n in SHARED)):
        assert getattr(formats, ours) == getattr(train_gpt, theirs)
    comparable = {known.tokens: known.tokens_per_byte for known in formats.PUBLISHED if known.num_bytes}
    assert comparable == train_gpt.PUBLISHED_VAL
    for known in formats.PUBLISHED:
        if known.num_bytes:
            assert (known.tokens - 1) / known.num_bytes == pytest.approx(known.tokens_per_byte, rel=2e-4)


def test_a_header_is_256_little_endian_numbers(tmp_path):
    assert formats.shard_header(70_000) == struct.pack("<256i", 20240520, 1, 70_000, *[0] * 253)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


@pytest.fixture
def stream(tmp_path):
    """A function that writes shards of the given lengths
    and returns the stream of them, with its tokens in order."""

    def make(*lengths: int, split: str = "train") -> tuple[TokenStream, np.ndarray]:
        tokens = random_tokens(sum(lengths))
        for index in reversed(range(len(lengths))):  # their names give the order, not their age
            start = sum(lengths[:index])
            write_shard(tmp_path / f"fineweb_{split}_{index:06d}.bin", tokens[start : start + lengths[index]])
        return TokenStream(f"{tmp_path}/fineweb_{split}_*.bin", VOCAB), np.array(tokens)

    return make


def message_of(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------
# Shards
# ------------------------------------------------------------------------------------------------------------


def test_open_shard_reads_what_struct_wrote(tmp_path):
    tokens = [1, 0, 255, 256, 65535, 4660]
    path = write_shard(tmp_path / "a.bin", tokens)
    assert open_shard(str(path)).tolist() == tokens
    assert path.stat().st_size == 1024 + 2 * 6


def test_no_shards(tmp_path):
    assert f"{tmp_path}/x_*.bin" in message_of(TokenStream, f"{tmp_path}/x_*.bin", VOCAB)


def broken_shards() -> dict[str, tuple]:
    tokens = random_tokens(100)
    return {
        "empty": (lambda path: path.write_bytes(b""), ["0 bytes"]),
        "shorter than a header": (lambda path: path.write_bytes(b"\0" * 1023), ["1023 bytes"]),
        "truncated": (
            lambda path: path.write_bytes(write_shard(path, tokens).read_bytes()[:-2]),
            ["1222 bytes", "100 tokens", "1224"],
        ),
        "half a token more": (
            lambda path: path.write_bytes(write_shard(path, tokens).read_bytes() + b"\0"),
            ["1225 bytes", "100 tokens", "1224"],
        ),
        "count too small": (lambda path: write_shard(path, tokens, count=99), ["1224 bytes", "99 tokens"]),
        "count too large": (lambda path: write_shard(path, tokens, count=101), ["1224 bytes", "101 tokens"]),
        "negative count": (lambda path: write_shard(path, tokens, count=-100), ["-100 tokens"]),
        "no tokens": (lambda path: write_shard(path, []), ["0 tokens"]),
        "wrong magic": (lambda path: write_shard(path, tokens, magic=20240521), ["20240521", "20240520"]),
        "wrong version": (lambda path: write_shard(path, tokens, version=2), ["version 2", "version 1"]),
        "a text": (lambda path: path.write_text("Once upon a time. " * 100), ["1701015119", "20240520"]),
        "token beyond the vocabulary": (
            lambda path: write_shard(path, [*tokens, 1024]),
            ["1024", "VOCAB_SIZE=1024"],
        ),
        "a link to nothing": (lambda path: path.symlink_to(path.with_name("gone")), []),
        "a folder": (lambda path: path.mkdir(), []),
    }


@pytest.mark.parametrize("kind", broken_shards())
def test_a_broken_shard_is_named_with_its_numbers(tmp_path, kind):
    write_shard(tmp_path / "fineweb_val_000000.bin", random_tokens(10))
    path = tmp_path / "fineweb_val_000001.bin"
    make, words = broken_shards()[kind]
    make(path)
    message = message_of(TokenStream, f"{tmp_path}/fineweb_val_*.bin", VOCAB)
    assert [word for word in [str(path), *words] if word not in message] == []


def test_a_token_beyond_the_vocabulary_later_in_a_shard_is_found_when_read(tmp_path):
    tokens = [5] * 70_000
    tokens[69_990] = 2000
    path = write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    found = TokenStream(str(path), VOCAB)
    assert found.read(0, 69_990).tolist() == tokens[:69_990]
    assert found.read(69_991, 100).tolist() == [5] * 100  # the last 9, then from the start
    for start, count in ((69_000, 991), (69_990, 1), (69_995, 69_999)):
        message = message_of(found.read, start, count)
        assert str(path) in message and "2000" in message and "VOCAB_SIZE=1024" in message
    assert TokenStream(str(path), 2001).read(69_990, 1).tolist() == [2000]


# ------------------------------------------------------------------------------------------------------------
# Stream and batches
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(37,), (10, 1, 26), (7, 30, 1, 1, 5)])
def test_read_across_borders_and_around_the_end(stream, lengths):
    found, tokens = stream(*lengths)
    total = len(tokens)
    assert len(found) == total
    for start in [*range(total), total, 3 * total + 5, 10**12]:
        for count in (1, 2, 9, total - 1, total, total + 1, 3 * total + 2):
            read = found.read(start, count)
            assert read.dtype == np.int64
            assert np.array_equal(read, tokens[(start + np.arange(count)) % total]), (start, count)


def test_read_gives_an_array_of_its_own(stream):
    found, tokens = stream(20)
    found.read(0, 20)[:] = 0
    assert found.read(0, 20).tolist() == tokens.tolist()


def test_rows_are_inputs_and_the_tokens_after_them(stream):
    found, tokens = stream(11, 20)
    inputs, targets = found.sequences(np.array([5, 11, 17]), 6, torch.device("cpu"))
    assert inputs.tolist() == tokens[5:23].reshape(3, 6).tolist()
    assert targets.tolist() == tokens[6:24].reshape(3, 6).tolist()
    around = found.sequences(np.array([29]), 4, torch.device("cpu"))
    assert around[0].tolist() == [[*tokens[29:], *tokens[:2]]]
    assert around[1].tolist() == [[*tokens[30:], *tokens[:3]]]


def steps_of(run, monkeypatch, ranks: int, step: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The micro-batches of a step, rank by rank."""
    monkeypatch.setattr(train_gpt, "world_size", lambda: ranks)
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(train_gpt, "rank", lambda rank=rank: rank)
        parts.append(step_batches(run, step))
    return parts


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_step_batches_of_all_ranks_are_the_plain_stream(stream, monkeypatch, ranks, accumulate):
    T, rows = 5, 8
    found, tokens = stream(70, 31)
    config = Config(train_seq_len=T, train_batch_tokens=T * rows, grad_accum_total=accumulate)
    run = SimpleNamespace(config=config, train=found, device=torch.device("cpu"))
    for step in range(6):  # 240 tokens: twice around the stream
        by_rank = steps_of(run, monkeypatch, ranks, step)
        assert [len(part) for part in by_rank] == [max(1, accumulate // ranks)] * ranks
        batches = [batch for part in by_rank for batch in part]
        assert len({inputs.shape for inputs, _ in batches}) == 1  # equal sizes: the mean of means is the mean
        positions = step * T * rows + np.arange(T * rows)
        for index, shift in ((0, 0), (1, 1)):
            flat = torch.cat([batch[index].reshape(-1) for batch in batches]).tolist()
            assert flat == tokens[(positions + shift) % len(tokens)].tolist()


@pytest.mark.parametrize(
    ("rows", "accumulate", "ranks", "expected"),
    [
        (8, 8, 1, (8, 8)),
        (8, 8, 8, (1, 1)),
        (384, 8, 8, (48, 1)),
        (384, 8, 2, (192, 4)),
        (6, 2, 3, (2, 1)),
        (6, 3, 2, (3, 3)),  # two micro-batches of 1.5 rows are none: the next number that divides
        (8, 1, 4, (2, 1)),
    ],
)
def test_split_batch(monkeypatch, rows, accumulate, ranks, expected):
    monkeypatch.setattr(train_gpt, "world_size", lambda: ranks)
    mine, parts = split_batch(
        Config(train_seq_len=4, train_batch_tokens=4 * rows, grad_accum_total=accumulate)
    )
    assert (mine, parts) == expected
    assert mine * ranks == rows and mine % parts == 0 and mine / parts <= math.ceil(rows / accumulate)


def test_ranks_that_do_not_divide_the_batch(monkeypatch):
    monkeypatch.setattr(train_gpt, "world_size", lambda: 3)
    message = message_of(split_batch, Config(train_seq_len=4, train_batch_tokens=32, grad_accum_total=1))
    assert "world_size=3" in message and "8 sequences" in message


# ------------------------------------------------------------------------------------------------------------
# Manifest
# ------------------------------------------------------------------------------------------------------------

HASH = "ab" * 32


def manifest_of(shards: dict[str, int], sha256: str | None = HASH) -> str:
    listed = [
        {"file": name, "tokens": tokens, "split": name.split("_")[1]} for name, tokens in shards.items()
    ]
    return json.dumps({"tokenizer": {"sha256": sha256}, "shards": listed})


def test_a_right_manifest_passes_and_none_is_needed(stream, tmp_path):
    found, _ = stream(20, 30)
    check_listing(found, HASH, "train")
    shards = {"fineweb_train_000000.bin": 20, "fineweb_train_000001.bin": 30, "fineweb_val_000000.bin": 7}
    (tmp_path / "manifest.json").write_text(manifest_of(shards))
    check_listing(found, HASH, "train")


def test_a_validation_shard_that_is_listed_but_missing(stream, tmp_path):
    found, _ = stream(20, 30, split="val")
    shards = {"fineweb_val_000000.bin": 20, "fineweb_val_000001.bin": 30, "fineweb_val_000002.bin": 7}
    (tmp_path / "manifest.json").write_text(manifest_of(shards))
    assert "fineweb_val_000002.bin" in message_of(check_listing, found, HASH, "val")


def source_of(folder: Path, files: dict[str, int]) -> None:
    """source.json as data/download.py writes it: files of the data folder, the tokenizer among them."""
    rows = [{"file": f"datasets/{folder.name}/{name}", "tokens": tokens} for name, tokens in files.items()]
    rows.append({"file": "tokenizers/fineweb_1024_bpe.model", "tokens": None})
    (folder / "source.json").write_text(json.dumps({"repo": "a/b", "files": rows}))


def test_what_was_downloaded_must_be_there(stream, tmp_path):
    found, _ = stream(20, 30, split="val")
    right = {"fineweb_val_000000.bin": 20, "fineweb_val_000001.bin": 30, "fineweb_train_000000.bin": 9}
    source_of(tmp_path, right)
    check_listing(found, HASH, "val")
    for wrong, word in ((right | {"fineweb_val_000002.bin": 7}, "fineweb_val_000002.bin"),
                        (right | {"fineweb_val_000001.bin": 31}, "30 tokens"),
                        ({"fineweb_val_000000.bin": 20}, "fineweb_val_000001.bin")):  # fmt: skip
        source_of(tmp_path, wrong)
        message = message_of(check_listing, found, HASH, "val")
        assert word in message and "source.json" in message
    train, _ = stream(9)
    source_of(tmp_path, right | {"fineweb_train_000001.bin": 99})  # training shards may be fewer
    check_listing(train, HASH, "train")


def test_the_overlap_that_was_counted_is_read(stream, tmp_path):
    """The keys of data/prepare.py --overlap; without a count the log says how to get one."""
    found, _ = stream(20, 30)
    path, listed = (
        tmp_path / "manifest.json",
        {"fineweb_train_000000.bin": 20, "fineweb_train_000001.bin": 30},
    )
    path.write_text(manifest_of(listed))
    val = [str(tmp_path / "fineweb_val_000000.bin")]
    assert "prepare.py --overlap" in advice.overlap_line(found, val)
    counted = dict(documents=50, documents_inside=3, documents_touched=8, train_tokens=50)
    path.write_text(json.dumps(json.loads(manifest_of(listed)) | dict(overlap=counted)))
    line = advice.overlap_line(found, val)
    assert line == "overlap: 3 of 50 validation documents occur inside training shards, 8 in part"
    assert "not counted" in advice.overlap_line(found, ["elsewhere/fineweb_val_000000.bin"])
    path.write_text(
        json.dumps(json.loads(manifest_of(listed)) | dict(overlap=counted | dict(train_tokens=51)))
    )
    assert "not counted" in advice.overlap_line(found, val)


def test_the_split_and_the_content_are_those_listed(stream, tmp_path):
    """Training shards are no validation text,
    and a validation shard of as many other tokens is not what was listed."""
    train, _ = stream(20)
    val, _ = stream(30, split="val")
    path = Path(val.paths[0])
    rows = [dict(file=file.name, split=split, tokens=count, sha256=sha256(file.read_bytes()).hexdigest())
            for file, split, count in ((path, "val", 30), (Path(train.paths[0]), "train", 20))]  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(dict(shards=rows, tokenizer=dict(sha256=HASH))))
    check_listing(val, HASH, "val")
    check_listing(train, HASH, "train")
    assert "train" in message_of(check_listing, train, HASH, "val")
    assert "val" in message_of(check_listing, val, HASH, "train")
    write_shard(path, random_tokens(30, seed=9))
    assert "content" in message_of(check_listing, TokenStream(str(path), VOCAB), HASH, "val")


def test_the_fingerprint_sees_more_than_the_beginning_of_a_shard(tmp_path):
    tokens = random_tokens(200_000)
    first = TokenStream(str(write_shard(tmp_path / "a.bin", tokens)), VOCAB).fingerprint()
    assert TokenStream(str(write_shard(tmp_path / "other_name.bin", tokens)), VOCAB).fingerprint() == first
    other = [*tokens[:70_000], *random_tokens(130_000, seed=3)]
    assert TokenStream(str(write_shard(tmp_path / "b.bin", other)), VOCAB).fingerprint() != first


@pytest.mark.parametrize("name", [
    "fineweb_val_bytes_000001.bin", "fineweb_train_bytes_000000.bin", "fineweb_val_000000_bytes.bin",
    "fineweb_val_000000.bytes.bin",
])  # fmt: skip
@pytest.mark.parametrize("pattern", ["fineweb_val_*.bin", "fineweb_val_0*.bin"])
def test_byte_sidecars_without_a_shard_are_refused(stream, tmp_path, name, pattern):
    stream(20, split="val")
    write_shard(tmp_path / name, [3] * 20)
    message = message_of(TokenStream, f"{tmp_path}/{pattern}", VOCAB)
    assert name in message and "sidecar" in message


def test_byte_sidecars_are_never_read_as_text(stream, tmp_path, monkeypatch):
    _, tokens = stream(20, 30, split="val")
    shards = train_gpt.find_shards(f"{tmp_path}/fineweb_val_*.bin")
    assert train_gpt.find_sidecars(shards) == ()
    write_shard(tmp_path / "holdout.bin", [1, 3, 4])
    monkeypatch.chdir(tmp_path)  # a name without _val_ is not its own sidecar
    assert train_gpt.find_sidecars(["./holdout.bin"]) == train_gpt.find_sidecars(["holdout.bin"]) == ()
    for index, length in enumerate((20, 30)):
        write_shard(tmp_path / f"fineweb_val_bytes_{index:06d}.bin", [3] * length)
        if not index:
            message = message_of(train_gpt.find_sidecars, shards)
            assert "fineweb_val_bytes_000001.bin" in message and "no such byte sidecar" in message
    again = TokenStream(f"{tmp_path}/fineweb_val_*.bin", VOCAB)
    assert again.paths == shards and np.array_equal(again.read_all(), tokens)
    assert [Path(path).name for path in train_gpt.find_sidecars(shards)] == [
        "fineweb_val_bytes_000000.bin", "fineweb_val_bytes_000001.bin"]  # fmt: skip


def linked(val: Path, train: Path) -> None:
    train.symlink_to(val)


def hard_linked(val: Path, train: Path) -> None:
    os.link(val, train)


def copied(val: Path, train: Path) -> None:
    train.write_bytes(val.read_bytes())


@pytest.mark.parametrize("lead", [linked, hard_linked, copied], ids=lambda f: f.__name__)
def test_training_shards_that_are_validation_shards(tmp_path, lead):
    val = write_shard(tmp_path / "fineweb_val_000003.bin", random_tokens(3000, seed=1))
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train/fineweb_train_000000.bin", random_tokens(3000, seed=2))
    pattern = f"{tmp_path}/train/*.bin"
    check_disjoint(TokenStream(pattern, VOCAB), [str(val)])
    train = tmp_path / "train/fineweb_train_000001.bin"
    lead(val, train)
    message = message_of(check_disjoint, TokenStream(pattern, VOCAB), [str(val)])
    assert str(train) in message and str(val) in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (manifest_of({"fineweb_train_000000.bin": 20, "fineweb_train_000001.bin": 30}, "cd" * 32),
         ["cdcd", "abab"]),
        (
            manifest_of({"fineweb_train_000000.bin": 20, "fineweb_train_000001.bin": 31}),
            ["fineweb_train_000001.bin", "30 tokens", "31"],
        ),
        (manifest_of({"fineweb_train_000000.bin": 20}), ["fineweb_train_000001.bin", "30 tokens"]),
        (manifest_of({"fineweb_train_000000.bin": 20, "fineweb_train_000001.bin": 30}, None), []),
        ("{", []),
        ("", []),
        ("[]", []),
        ('{"shards": 7, "tokenizer": {"sha256": ""}}', []),
        ('{"shards": [{"file": "a"}], "tokenizer": {"sha256": ""}}', []),
        ('{"shards": []}', []),
        (b"\xff\xfe{}", []),
    ],
    ids=[
        "tokenizer", "count", "unlisted", "no hash", "cut off", "empty", "list", "bad shards",
        "shard without count", "no tokenizer", "not UTF-8",
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit(stream, tmp_path, text, words):
    found, _ = stream(20, 30)
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    message = message_of(check_listing, found, HASH, "train")
    assert [word for word in [str(path), *words] if word not in message] == []
