"""Fuzzing of every reader: valid files with edits, behind a checksum that is right again, in bounded memory.

What a reader says of any bytes is the content, or one UserError. `python tests/test_readers_fuzz.py N` tries
N cases of each reader and prints how many it took, and the memory.
"""

from __future__ import annotations

import copy
import io
import json
import math
import re
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from formats import shard_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_artifact import TOKENIZER, join_body, make_blob, make_progress, make_run, signed, split_body
from test_model import SMALL, random_model

import train_gpt as tg
from train_gpt import Config, UserError

MEMORY = 1 << 30  # bytes that a reader may take
VOCAB, TOKENS = 64, 500
ROOT = Path(__file__).resolve().parent.parent

# What an entry of a decoded file becomes.
HOSTILE = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, math.inf, math.nan, "", "x", "3",
    "\0", "\ud800", "../../x", "moments.", "9" * 5000, "\xe9" * 3000, [], [[]], [1], [-1, -1],
    [2**40] * 2, {},
]  # fmt: skip
TREE_EDITS = st.tuples(
    st.sampled_from(["replace", "remove", "repeat", "rename", "nudge"]),
    st.floats(0, 1),
    st.sampled_from(HOSTILE),
)
BYTE_EDITS = st.tuples(
    st.sampled_from(["flip", "set", "insert", "remove", "cut", "number", "repeat"]),
    st.floats(0, 1), st.integers(1, 255),
)  # fmt: skip


@contextmanager
def bounded_memory(most: int = MEMORY) -> Iterator[None]:
    """Let the process map at most `most` bytes more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def entries(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of nested lists and dicts, as its holder and its key there."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from entries(tree[key])


def edited(tree: Any, edits: list[tuple[str, float, Any]]) -> Any:
    tree = copy.deepcopy(tree)
    for kind, place, value in edits:
        if not (found := list(entries(tree))):
            return copy.deepcopy(value)
        holder, key = found[min(int(place * len(found)), len(found) - 1)]
        if kind == "remove":
            del holder[key]
        elif kind == "repeat" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == "rename" and isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        elif kind == "nudge" and type(holder[key]) in (int, float, str):
            holder[key] += type(holder[key])(1)
        else:
            holder[key] = copy.deepcopy(value)
    return tree


def damaged(blob: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    for kind, place, byte in edits:
        at = int(place * len(blob))
        before, here, after = blob[:at], blob[at : at + 1], blob[at + 1 :]
        number = struct.pack("<I", (0, 1, 2**31 - 1, 2**32 - 1)[byte % 4])
        blob = {
            "flip": before + bytes([(here or b"\0")[0] ^ 1 << byte % 8]) + after,
            "set": before + bytes([byte]) + after,
            "insert": before + bytes([byte]) * (byte % 9) + here + after,
            "remove": before + after,
            "cut": before,
            "number": before + number + blob[at + 4 :],
            "repeat": before + (here + after)[:byte] + here + after,
        }[kind]
    return blob


def write_shard(path: Path, tokens: np.ndarray, edits: list = ()) -> Path:
    path.write_bytes(damaged(shard_header(len(tokens)) + tokens.astype("<u2").tobytes(), edits))
    return path


# ------------------------------------------------------------------------------------------------------------
# Readers
# ------------------------------------------------------------------------------------------------------------


def artifact_reader(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    blobs = {coder: make_blob(replace(SMALL, compressor=coder)) for coder in ("zstd", "ans")}
    parts = {coder: split_body(blob) for coder, blob in blobs.items()}

    def read(coder: str, tree: list, side: list, codes: list, body: list) -> None:
        header, rest, coded = parts[coder]
        whole = join_body(edited(header, tree), damaged(rest, side), damaged(coded, codes))
        (folder / "a").write_bytes(signed(damaged(whole, body), coder.encode().ljust(4, b"\0")))
        artifact = tg.read_artifact(folder / "a")
        tg.load_model(artifact, torch.device("cpu"))

    few = st.lists(BYTE_EDITS, max_size=2)
    return st.tuples(st.sampled_from(["zstd", "ans"]), st.lists(TREE_EDITS, max_size=2), few, few, few), read


def shard_reader(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    tokens = np.arange(TOKENS) % VOCAB

    def read(edits: list) -> None:
        found = tg.TokenStream(str(write_shard(folder / "fineweb_train_000000.bin", tokens, edits)), VOCAB)
        assert len(found.read_all()) == len(found) and found.read(3, 7).max() < VOCAB

    header = BYTE_EDITS.map(lambda edit: (edit[0], edit[1] * 0.008, edit[2]))  # the first twelve bytes
    return st.tuples(st.lists(st.one_of(header, BYTE_EDITS), max_size=3)), read


def sidecar_reader(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    tokens, table = 2 + np.arange(TOKENS) % (VOCAB - 2), np.zeros(VOCAB, np.int64)
    shard = write_shard(folder / "fineweb_val_000000.bin", tokens)
    config = Config(vocab_size=VOCAB, val_files=str(shard), eval_seq_len=64)

    def read(edits: list) -> None:
        write_shard(folder / "fineweb_val_bytes_000000.bin", tokens % 9, edits)
        tg.sidecar_bytes.cache_clear()
        counts = tg.ByteTable(table, table > 0, table > 0, True).with_sidecars([str(shard)])
        found = tg.read_validation(config, counts, TOKENIZER)[0]
        assert len(counts.of_text(found)) == len(found) - 1

    return st.tuples(st.lists(BYTE_EDITS, max_size=3)), read


def listing_reader(name: str, listing: dict) -> Callable[[Path], tuple[st.SearchStrategy, Callable]]:
    def reader(folder: Path) -> tuple[st.SearchStrategy, Callable]:
        stream = tg.TokenStream(str(write_shard(folder / "fineweb_val_000000.bin", np.arange(64))), VOCAB)

        def read(tree: list, text: list) -> None:
            (folder / name).write_bytes(damaged(json.dumps(edited(listing, tree)).encode(), text))
            tg.check_listing(stream, TOKENIZER, "val")

        return st.tuples(st.lists(TREE_EDITS, max_size=3), st.lists(BYTE_EDITS, max_size=1)), read

    return reader


MANIFEST = {
    "tokenizer": {"sha256": TOKENIZER},
    "shards": [{"file": "fineweb_val_000000.bin", "split": "val", "tokens": 64, "documents": 1}],
    "overlap": {"documents": 1, "train_tokens": 5},
}
SOURCE = {
    "repo": "a/b",
    "files": [
        {"file": "datasets/x/fineweb_val_000000.bin", "tokens": 64},
        {"file": "tokenizers/t.model", "tokens": None},
    ],
}
RESULT = dict.fromkeys(tg.SCORES, 1.5) | {"fits": True, "sha256_artifact": sha256(b"a").hexdigest()}


def result_reader(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    (folder / "final_model.int6.ptz").write_bytes(b"a")

    def read(tree: list, text: list) -> None:
        (folder / "result.json").write_bytes(damaged(json.dumps(edited(RESULT, tree)).encode(), text))
        assert all(math.isfinite(tg.read_result(folder)[name]) for name in tg.SCORES)

    return st.tuples(st.lists(TREE_EDITS, max_size=3), st.lists(BYTE_EDITS, max_size=1)), read


def recipe_reader(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    recipe = (ROOT / "records/recipes/smoke.env").read_bytes()
    words = b"\n|=|#|'|~/|\0|\xff|\xef\xbb\xbf|1e9|NUM_LAYERS=|export |VE_LAYERS=|-|\xd9\xa3| ".split(b"|")
    words = st.sampled_from([*words, b"9" * 5000])

    def read(inserted: list, edits: list) -> None:
        text = recipe
        for place, word in inserted:
            at = int(place * len(text))
            text = text[:at] + word + text[at:]
        (folder / "r.env").write_bytes(damaged(text, edits))
        tg.load_config({"RECIPE": str(folder / "r.env")})

    inserted = st.lists(st.tuples(st.floats(0, 1), words), max_size=3)
    return st.tuples(inserted, st.lists(BYTE_EDITS, max_size=1)), read


def checkpoint_reader(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    write_shard(folder / "fineweb_train_000000.bin", np.arange(TOKENS) % VOCAB)
    stream = tg.TokenStream(str(folder / "fineweb_train_000000.bin"), VOCAB)
    config = replace(SMALL, resume="auto", meta_sgd_enabled=True, meta_sgd_lr=0.1, ema_enabled=True)
    run = make_run(folder, config, train=stream)

    def begun() -> tuple[tg.Progress, dict[str, Any]]:
        model = random_model(config, torch.float32)
        clock = SimpleNamespace(total=0.0, seconds=lambda: 3.0, settle=bool, stop=bool, start=bool)
        progress = make_progress(run, model, clock, tg.MetaRates(model, config))
        optimizers = tg.make_optimizers(model, config)
        return progress, {"average": tg.WeightAverage(model, config), "adamw": optimizers[-1]}

    progress, progress.parts = begun()
    progress.phase = "train"
    assert progress.save(3)
    run.log.line = lambda *_, **__: None
    content = tg.load_tensors(io.BytesIO((folder / tg.CHECKPOINT).read_bytes()[:-32]))
    tensors = [
        torch.zeros(3),
        torch.zeros(0),
        torch.ones(2, dtype=torch.int64),
        torch.full((24, 24), math.nan),
    ]
    trees = st.lists(st.tuples(TREE_EDITS, st.sampled_from([None, None, *range(len(tensors))])), max_size=2)

    def read(tree: list, blob: list) -> None:
        edits = [(kind, at, value if i is None else tensors[i]) for (kind, at, value), i in tree]
        stored = damaged(tg.saved_bytes(edited(content, edits)), blob)
        (folder / tg.CHECKPOINT).write_bytes(stored + sha256(stored).digest())
        progress, parts = begun()
        progress.resume(tg.read_checkpoint(run))
        progress.begin("train", parts)

    return st.tuples(trees, st.lists(BYTE_EDITS, max_size=1)), read


READERS = {
    "artifact": artifact_reader, "checkpoint": checkpoint_reader, "shard": shard_reader,
    "sidecar": sidecar_reader, "manifest": listing_reader("manifest.json", MANIFEST),
    "source": listing_reader("source.json", SOURCE), "result": result_reader, "recipe": recipe_reader,
}  # fmt: skip


# What no message names: our code must not fail so. Torch's optimizers load parts of a checkpoint.
UNFORESEEN = ("MemoryError|allocate|(Assertion|Attribute|Key|Index)Error", "MemoryError|allocate")
UNEDITED = {"artifact": ("zstd", [], [], [], []), "shard": ([],), "sidecar": ([],)}


def fuzz(name: str, folder: Path, count: int, derandomize: bool) -> dict[str, int]:
    """Read `count` files with edits; returns how many were taken and refused. Unedited, a file is taken."""
    strategy, read = READERS[name](folder)
    found = dict(taken=0, refused=0)

    @settings(max_examples=count, deadline=None, derandomize=derandomize, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def one(edits: tuple) -> None:
        try:
            read(*edits)
        except UserError as error:
            assert "\n" not in str(error) or name == "recipe"  # which lists all its problems
            assert not re.search(UNFORESEEN[name == "checkpoint"], str(error)), error
            found["refused"] += 1
        else:
            found["taken"] += 1

    with bounded_memory():
        read(*UNEDITED.get(name, ([], [])))
        one()
    return found


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused(name, tmp_path, capsys):
    found = fuzz(name, tmp_path, 40, derandomize=True)
    assert found["taken"] > 0 and found["refused"] > 10, found


if __name__ == "__main__":
    import tempfile

    for each in READERS:
        with tempfile.TemporaryDirectory() as work:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            counts = fuzz(each, Path(work), int(sys.argv[1]), derandomize=False)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(
                f"{each}: {counts}, peak {peak >> 10} MiB, {peak - before >> 10} MiB more than before",
                flush=True,
            )
