"""data/prepare.py: lossless text, shards and manifest re-read independently, determinism, errors, crashes."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import prepare
import pytest
import runfiles
import sentencepiece as spm
import zstandard
from conftest import search_path
from formats import shard_header

SP_SPACE = "\u2581"
HOSTILE = [
    "",
    " ",
    "   leading and trailing   ",
    "tab\there\t\tand\tthere",
    "line\r\nfeed\r\rand\n\n\n",
    "\x00nul\x00\x00 \x01\x1f\x7f",
    SP_SPACE,
    f"{SP_SPACE}a {SP_SPACE}{SP_SPACE} b{SP_SPACE}\U0001f600{SP_SPACE}",
    "\U0001f600\U0001f3fd\u200d\U0001f469\ufe0f",
    "\u0301lone \u0327marks\u0301",
    "\ufb01 \u212b \u00e5 a\u030a \uff21 \u00bd \u3000 \u00a0\u2028",
    "\u6f22\u5b57\u4eee\u540d \u0627\u0644\u0639 \u05e2\u05d1\u05e8 \u0939\u093f\u0928",
    "\u2585 \u2047 \ufffd \ufeff \ufdd0 \U0010ffff",
    "<s></s><unk><pad><0x41><0xE2> <mask>",
    "0123456789 1234567 3.14159",
    "x" * 3000,
]


def make_texts(seed: int, count: int) -> list[str]:
    """Return documents of made-up words, with some repeated, some with rare characters."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]
    texts = []
    for number in range(count):
        lines = [" ".join(rng.choices(words, k=rng.randint(3, 12))) + "." for _ in range(rng.randint(1, 6))]
        texts.append("\n".join(lines) + (f" \u00e9\t{SP_SPACE}\U0001f600{number}" if number % 7 == 0 else ""))
    return texts


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(inputs: list[Path], out: Path, *options: str) -> int:
    """Run the command line with small numbers, in this process unless the options say otherwise."""
    defaults = ["--vocab-size", "400"] if "--tokenizer" not in options else []
    defaults += ["--workers", "1"] if "--workers" not in options else []
    return prepare.main([*map(str, inputs), "--out", str(out), *defaults, *options])


def read_tokens(path: Path) -> list[int]:
    """Read a shard with nothing but struct, checking every field of its header."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header[:2] == (20240520, 1) and set(header[3:]) == {0}
    assert len(content) == 1024 + 2 * header[2]
    return list(struct.unpack(f"<{header[2]}H", content[1024:]))


def to_bytes(sp: spm.SentencePieceProcessor, ids: list[int]) -> bytes:
    """Put text together piece by piece, the independent oracle of losslessness."""
    out = b""
    for token in ids:
        piece = sp.id_to_piece(token)
        assert not sp.is_control(token) and not sp.is_unknown(token)
        out += bytes([int(piece[3:-1], 16)]) if sp.is_byte(token) else piece.replace(SP_SPACE, " ").encode()
    return out


def documents_in(out: Path, split: str) -> list[str]:
    """Decode all documents of a split from its shards."""
    sp = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    tokens = [token for path in sorted(out.glob(f"fineweb_{split}_*.bin")) for token in read_tokens(path)]
    starts = [index for index, token in enumerate(tokens) if token == 1]
    assert not tokens or starts[0] == 0
    ends = [*starts[1:], len(tokens)]
    return [to_bytes(sp, tokens[start + 1 : end]).decode() for start, end in zip(starts, ends, strict=True)]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts(0, 300)


@pytest.fixture(scope="module")
def source(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("source") / "text.jsonl", texts)


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    assert run([source], out, "--val-docs", "30", "--shard-tokens", "3001", "--name", "words") == 0
    return out


@pytest.fixture(scope="module")
def sp(prepared: Path) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))


@pytest.fixture(scope="module")
def lossy_model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as others make them: NFKC, spaces squeezed, a space put in front."""
    path = tmp_path_factory.mktemp("lossy") / "other.model"
    with path.open("wb") as stream:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(" ".join(texts).split(".")),
            model_writer=stream,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    return path


# ------------------------------------------------------------------------------------------------------------
# Text and tokens
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_survives(sp: spm.SentencePieceProcessor, text: str) -> None:
    ids = prepare.encode(sp, text)
    assert to_bytes(sp, ids) == text.encode()
    assert sp.decode(ids) == text
    assert sum(prepare.token_bytes(sp)[ids]) == len(text.encode())


def test_random_unicode_survives(sp: spm.SentencePieceProcessor) -> None:
    rng = random.Random(1)
    ranges = [
        (32, 127),
        (0, 32),
        (0x80, 0x3000),
        (0x2580, 0x2586),
        (0x3000, 0xD800),
        (0xE000, 0x110000),
        (32, 33),
    ]
    for _ in range(2000):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
        ids = prepare.encode(sp, text)
        assert to_bytes(sp, ids) == text.encode() and sp.decode(ids) == text


@pytest.mark.parametrize("filler", ["banana  split\n", "  ", "\u6f22", f"a{SP_SPACE}b "])
def test_long_text_is_encoded_in_parts_without_loss(sp: spm.SentencePieceProcessor, filler: str) -> None:
    text = filler * (3 * prepare.SEGMENT // len(filler))
    assert to_bytes(sp, prepare.encode(sp, text)) == text.encode()


def test_parts_of_a_long_text_have_the_tokens_of_the_whole(sp: spm.SentencePieceProcessor) -> None:
    text = " ".join(make_texts(5, 1500)).replace(SP_SPACE, "")
    assert len(text) > 2 * prepare.SEGMENT
    assert prepare.encode(sp, text) == sp.encode(text)


def test_tokenizer_layout(sp: spm.SentencePieceProcessor) -> None:
    assert sp.vocab_size() == 400
    assert [sp.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [sp.id_to_piece(4 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert prepare.is_lossless(sp)


def test_other_tokenizers_are_used_as_they_are(lossy_model: Path) -> None:
    lossy = spm.SentencePieceProcessor(model_file=str(lossy_model))
    assert not prepare.is_lossless(lossy)
    text = f"  bado  {SP_SPACE} kela\n"
    assert prepare.encode(lossy, text) == lossy.encode(text)


def test_vocabulary_of_a_large_script() -> None:
    """More characters than pieces: the rare ones become bytes, the size is still the one asked for."""
    rng = random.Random(2)
    text = "".join(chr(0x4E00 + int(rng.paretovariate(0.5)) % 6000) for _ in range(30_000))
    model = prepare.load_tokenizer(prepare.train_tokenizer([text[:16_000], text[16_000:]], 512), "test")
    assert model.vocab_size() == 512 and prepare.is_lossless(model)
    assert to_bytes(model, prepare.encode(model, text)) == text.encode()


@pytest.mark.parametrize(
    "text", ["\t", "\x00", SP_SPACE, "x", "]^-\\\\", " " * 20_000, "\n" * 5000, "ab" * 5000]
)
def test_text_without_enough_variety_is_an_error(text: str) -> None:
    with pytest.raises(prepare.InputError, match="it yields at most"):
        prepare.train_tokenizer([text], 400)


def test_sample_is_bounded_uniform_and_reproducible() -> None:
    def sample(seed: int) -> list[str]:
        sampler = prepare.Sampler(budget=20_000, seed=seed)
        for number in range(5000):
            sampler.add(f"{number:04d}" * 25)
        return sampler.passages()

    numbers = [int(text[:4]) for text in sample(1)]
    assert len(numbers) == 200 and numbers == sorted(numbers)
    assert 2000 < sum(numbers) / len(numbers) < 3000
    assert sample(1) == sample(1) != sample(2)


# ------------------------------------------------------------------------------------------------------------
# Shards and manifest
# ------------------------------------------------------------------------------------------------------------


def test_documents_come_back(prepared: Path, texts: list[str]) -> None:
    assert documents_in(prepared, "val") == texts[:30]
    assert documents_in(prepared, "train") == texts[30:]


def test_manifest_numbers(prepared: Path, sp: spm.SentencePieceProcessor, texts: list[str]) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    model = (prepared / "tokenizer.model").read_bytes()
    assert manifest["tokenizer"] == {
        "file": "tokenizer.model",
        "sha256": hashlib.sha256(model).hexdigest(),
        "vocab_size": 400,
        "lossless": True,
        "bos_id": 1,
    }
    assert (manifest["version"], manifest["name"], manifest["source"]) == (1, "words", ["text.jsonl"])
    assert {shard["file"] for shard in manifest["shards"]} == {path.name for path in prepared.glob("*.bin")}
    totals = {split: {"documents": 0, "text_bytes": 0, "tokens": 0} for split in ("train", "val")}
    for shard in manifest["shards"]:
        tokens = read_tokens(prepared / shard["file"])
        text = [token for token in tokens if token != 1]
        found = {
            "documents": len(tokens) - len(text),
            "text_bytes": len(to_bytes(sp, text)),
            "tokens": len(tokens),
        }
        assert found == {key: shard[key] for key in found}
        assert shard["sha256"] == hashlib.sha256((prepared / shard["file"]).read_bytes()).hexdigest()
        totals[shard["split"]] = {key: totals[shard["split"]][key] + number for key, number in found.items()}
    assert manifest["splits"] == totals
    assert totals["val"]["documents"] == 30 and totals["train"]["documents"] == 270
    assert totals["val"]["text_bytes"] == sum(len(text.encode()) for text in texts[:30])


def test_shards_are_full_but_the_last(prepared: Path) -> None:
    sizes = [len(read_tokens(path)) for path in sorted(prepared.glob("fineweb_train_*.bin"))]
    assert len(sizes) > 3 and set(sizes[:-1]) == {3001} and 0 < sizes[-1] <= 3001


def test_given_tokenizer_and_lossy_counts(
    source: Path, texts: list[str], lossy_model: Path, tmp_path: Path
) -> None:
    assert run([source], tmp_path, "--tokenizer", str(lossy_model), "--val-docs", "20") == 0
    assert (tmp_path / "tokenizer.model").read_bytes() == lossy_model.read_bytes()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["tokenizer"]["lossless"] is False
    assert {shard["text_bytes"] for shard in manifest["shards"]} == {None}
    assert manifest["splits"]["val"]["text_bytes"] == sum(len(text.encode()) for text in texts[:20])
    lossy = spm.SentencePieceProcessor(model_file=str(lossy_model))
    expected = [token for text in texts[:20] for token in [1, *lossy.encode(text)]]
    assert read_tokens(tmp_path / "fineweb_val_000000.bin") == expected


def test_output_does_not_depend_on_workers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1500)  # many more batches than the window holds
    for workers in ("1", "2"):
        assert (
            run([source], tmp_path / workers, "--workers", workers, "--shard-tokens", "2000", "--name", "n")
            == 0
        )
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")


def zstd_frames(content: bytes) -> bytes:
    """Compress as two frames, as parallel compressors and concatenation do."""
    half = len(content) // 2
    return zstandard.ZstdCompressor().compress(content[:half]) + zstandard.ZstdCompressor().compress(
        content[half:]
    )


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd_frames)]
)
def test_compressed_input_equals_plain(
    source: Path, tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    packed = tmp_path / f"text.jsonl{suffix}"
    packed.write_bytes(compress(source.read_bytes()))
    assert run([source], tmp_path / "plain") == 0 and run([packed], tmp_path / "packed") == 0
    plain, other = snapshot(tmp_path / "plain"), snapshot(tmp_path / "packed")
    assert {name: plain[name] for name in plain if name != "manifest.json"} == {
        name: other[name] for name in other if name != "manifest.json"
    }
    for cut in (len(packed.read_bytes()) // 2, len(packed.read_bytes()) - 3):
        packed.write_bytes(compress(source.read_bytes())[:cut])
        assert run([packed], tmp_path / "cut") == 2
        assert not (tmp_path / "cut").exists()


def test_a_small_validation_split_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = make_texts(0, 300)
    source, long = tmp_path / "text.jsonl", tmp_path / "long.jsonl"
    write_jsonl(source, texts)
    write_jsonl(long, [" ".join(texts[i : i + 40]) for i in range(40)])
    sizes = [len(text.encode()) for text in texts]
    cases = [("--val-docs", "1", 1), ("--val-docs", "30", 30)]
    cases += [("--val-input", str(long), 0), ("--val-fraction", "0", 0)]
    for number, (*options, few) in enumerate(cases):
        assert run([source], tmp_path / str(number), *options) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: ")]
        assert len(lines) == bool(few)
        numbers = f"has {few} of 300 documents and {sum(sizes[:few]):,} of {sum(sizes):,} bytes"
        assert not few or (numbers in lines[0] and "larger --val-fraction" in lines[0])


def test_folder_of_text_files(texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "c.txt").write_bytes(b"last\r\n document \x00")
    (folder / "a.jsonl").write_text(json.dumps({"body": "first"}) + "\n\n" + json.dumps({"body": ""}) + "\n")
    (folder / "notes.md").write_text("not read")
    for number, text in enumerate(texts[:100]):
        (folder / "b" / f"{number:03d}.txt").write_bytes(text.encode())
    assert run([folder], tmp_path / "out", "--val-docs", "2", "--text-key", "body") == 0
    assert "1 empty documents skipped" in capsys.readouterr().err
    assert documents_in(tmp_path / "out", "val") == ["first", texts[0]]
    assert documents_in(tmp_path / "out", "train") == [*texts[1:100], "last\r\n document \x00"]


def test_split_by_hash_keeps_duplicates_together(texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", texts * 3)
    for seed in ("1", "2"):
        assert run([source], tmp_path / seed, "--val-fraction", "0.2", "--seed", seed) == 0
        train, val = documents_in(tmp_path / seed, "train"), documents_in(tmp_path / seed, "val")
        assert sorted(train + val) == sorted(texts * 3) and not set(train) & set(val)
        assert 0.1 < len(val) / len(texts * 3) < 0.3
    assert documents_in(tmp_path / "1", "val") != documents_in(tmp_path / "2", "val")


def test_separate_validation_text_stays_out_of_the_tokenizer(
    source: Path, texts: list[str], tmp_path: Path
) -> None:
    foreign = write_jsonl(tmp_path / "val.jsonl", ["\u0416\u0416\u0416 " * 500])
    assert run([source], tmp_path / "a", "--val-input", str(foreign)) == 0
    assert documents_in(tmp_path / "a", "train") == texts
    assert documents_in(tmp_path / "a", "val") == ["\u0416\u0416\u0416 " * 500]
    assert run([source], tmp_path / "b", "--val-fraction", "0") == 0
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()
    assert not list((tmp_path / "b").glob("fineweb_val_*"))


# ------------------------------------------------------------------------------------------------------------
# What users get wrong
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"fine\nfine\nb\xffad", "bad.txt, line 3: not valid UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "bad.jsonl, line 2: not valid UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl, line 2 is not JSON"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', 'bad.jsonl, line 2: no string under the key "text"'),
        ("bad.jsonl", b'{"text": 3}\n', "bad.jsonl, line 1: no string"),
        ("bad.jsonl", b'["text"]\n', "bad.jsonl, line 1: no string"),
        (
            "bad.jsonl",
            b'{"text": "a", "m": 1, "text": "b"}\n',
            'line 1: the key "text" occurs more than once',
        ),
        ("bad.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "bad.jsonl, line 1 is not JSON"),
        ("bad.jsonl", b"[" * 100_000 + b"\n", "bad.jsonl, line 1 is not JSON"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": "b\\ud800"}\n', "bad.jsonl, line 3: lone surrogate U+D800"),
        ("bad.jsonl", b"", "no text"),
        ("bad.jsonl", b'{"text": ""}\n', "1 documents, all empty"),
        ("bad.csv", b"a,b\n", "unsupported extension"),
        ("bad.jsonl.gz", b"not gzip", "bad.jsonl.gz: cannot be read"),
        ("bad.jsonl.xz", b"not xz", "bad.jsonl.xz: cannot be read"),
        ("bad.jsonl.zst", b"not zstandard", "bad.jsonl.zst: cannot be read"),
        ("bad.txt", b"one document only", "no validation documents"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "b"}\n', "no training documents"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    options = ["--val-docs", "2"] if "no training" in message else []
    assert run([path], tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_only_zst_files_need_zstandard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """Its absence is said before any other file is read, and stops nothing where no input is a .zst file."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt").write_bytes(b"not UTF-8: \xff")
    (tmp_path / "b.jsonl.zst").write_bytes(zstd_frames(b'{"text": "b"}\n'))
    for names, message in (
        ("a.txt b.jsonl.zst", "pip install zstandard"),
        ("a.txt", "a.txt, line 1: not valid"),
    ):
        assert run([tmp_path / name for name in names.split()], tmp_path / "out") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "9000"], "too small for --vocab-size 9000: it yields at most"),
        (["--vocab-size", "100"], "between 320 and 65536"),
        (["--val-fraction", "1.5"], "--val-fraction"),
        (["--shard-tokens", "0"], "--shard-tokens must be between 1 and 2147483647"),
        (["--val-input", "SOURCE"], "given more than once"),
        (["--tokenizer", "SOURCE"], "not a SentencePiece model"),
        (["--tokenizer", "/nonexistent.model"], "cannot be read"),
    ],
)
def test_bad_options(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run([source], tmp_path / "out", *[str(source) if o == "SOURCE" else o for o in options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_earlier_output_is_replaced_only_on_request(
    source: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run([source], out, "--shard-tokens", "2000") == 0
    before = snapshot(out)
    assert run([source], out) == 2
    assert "--overwrite" in capsys.readouterr().err
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    assert run([source, bad], out, "--overwrite") == 2
    assert snapshot(out) == before
    (out / "mine.txt").write_text("not ours")
    smaller = write_jsonl(tmp_path / "fewer.jsonl", texts[:150])
    assert run([smaller], out, "--overwrite", "--val-docs", "1") == 0
    named = {shard["file"] for shard in json.loads((out / "manifest.json").read_text())["shards"]}
    assert set(snapshot(out)) == named | {"tokenizer.model", "manifest.json", "mine.txt"}
    assert documents_in(out, "train") == texts[1:150]


# ------------------------------------------------------------------------------------------------------------
# No text is lost without a word
# ------------------------------------------------------------------------------------------------------------

LINES = [b'{"text": "one"}\n', b'{"text": "two"}\n', b'{"text": "three"}\n']
COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_stream_is_read_or_the_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text.jsonl{suffix}"
    a, b, c = map(COMPRESS[suffix], LINES)
    zeros = b"" if suffix == ".zst" else bytes(4)
    skippable = struct.pack("<II", 0x184D2A53, 5) + b"hello" if suffix == ".zst" else b""
    for content in (a + b + c, a + zeros + b + c + 2 * zeros, a + skippable + b + c + skippable):
        path.write_bytes(content)
        assert [text for text, _ in prepare.read_texts(path)] == ["one", "two", "three"]
    flipped = b[:2] + bytes([b[2] ^ 4]) + b[3:]  # in the header
    bad = [b"", a + b"junk", a + flipped, a + flipped + c, a + b[:-3] + c]
    bad += [a + b[:cut] for cut in (1, 2, 5, len(b) // 2, len(b) - 1)]
    bad += [a + bytes(3), a + bytes(5) + b, a + bytes(4) + flipped] if suffix == ".xz" else []
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(prepare.InputError, match="cannot be read"):
            list(prepare.read_texts(path))


@pytest.mark.parametrize(("suffix", "zeros"), [(".xz", 2 * prepare.FrameReader.CHUNK + 4), (".zst", 0)])
def test_streams_and_padding_across_chunks(tmp_path: Path, suffix: str, zeros: int) -> None:
    rng = random.Random(3)
    parts = [
        rng.randbytes(10_000).hex().encode(),
        b"a" * 5_000_000,
        b"",
        rng.randbytes(50_000).hex().encode(),
    ]
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](part) + bytes(zeros) for part in parts))
    assert [utf8 for _, utf8 in prepare.read_texts(path)] == [b"".join(parts)]


def test_folders_are_read_through_links_and_the_rest_is_named(tmp_path: Path) -> None:
    folder, other = tmp_path / "in", tmp_path / "other"
    for name in ("in/sub/.hidden", "other/deep"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "in/a.txt",
        "in/B.TXT",
        "in/sub/.c.txt",
        "in/sub/.hidden/d.txt",
        "other/deep/e.txt",
        "other/f.txt",
    ):
        (tmp_path / name).write_text(Path(name).name)
    (folder / "g.JsonL.GZ").write_bytes(gzip.compress(b'{"text": "g"}'))
    for name in ("in/notes.md", "in/no_suffix", "in/x.jsonl.bz2", "in/.txt", "other/h.md"):
        (tmp_path / name).write_text("h")
    os.mkfifo(folder / "pipe.txt")
    links = {
        "0_more": other,
        "1_again": other / "deep",
        "2_loop": folder,
        "sub/up": tmp_path,
        "h.txt": other / "h.md",
    }
    links |= {"same.txt": folder / "a.txt", "sub/f.txt": other / "f.txt", "gone.md": Path("nowhere")}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    left_out = prepare.LeftOut()
    files = prepare.list_inputs([folder], left_out)
    texts = [text for file in files for text, _ in prepare.read_texts(file)]
    assert texts == ["e.txt", "f.txt", "B.TXT", "a.txt", "g", "h", ".c.txt", "d.txt"]
    named = {path.relative_to(folder).as_posix(): reason for path, reason in left_out.files}
    unsupported = {"notes.md", "no_suffix", "x.jsonl.bz2", ".txt", "0_more/h.md"}
    assert {name for name, reason in named.items() if reason == "unsupported extension"} == unsupported
    assert set(named) - unsupported == {
        "pipe.txt",
        "gone.md",
        "1_again",
        "2_loop",
        "sub/up",
        "same.txt",
        "sub/f.txt",
    }
    assert len(left_out.files) == len(named) and all(
        str(path) in left_out.describe() for path, _ in left_out.files
    )


def test_links_and_folders_that_cannot_be_read_are_errors(texts: list[str], tmp_path: Path, capsys) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts)
    for name, target in (
        ("gone.txt", "nowhere"),
        ("disk", "/nonexistent/disk"),
        ("self.jsonl", "self.jsonl"),
    ):
        (folder / name).symlink_to(target)
        assert run([folder], tmp_path / "out") == 2
        assert f"{folder / name}: cannot be read" in capsys.readouterr().err
        (folder / name).unlink()
    assert run([folder], tmp_path / "out", "--val-docs", "9") == 0


def test_a_folder_without_permission_is_an_error() -> None:
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "closed").mkdir()
        (Path(root) / "a.txt").write_text("a")
        os.chmod(root, 0o755)
        os.chmod(Path(root) / "closed", 0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(prepare.InputError, match="closed: cannot be read: Permission denied"):
                prepare.list_inputs([Path(root)])
        finally:
            os.seteuid(user)
            os.chmod(Path(root) / "closed", 0o700)


def test_what_holds_no_text_is_counted(texts: list[str], tmp_path: Path, capsys) -> None:
    folder, mark = tmp_path / "in", b"\xef\xbb\xbf"
    folder.mkdir()
    lines = [
        json.dumps({"m": {"text": 1, '"text"': 2}, "text": text}).encode() for text in ["", *texts[:200], ""]
    ]
    (folder / "a.jsonl").write_bytes(
        mark + b"\r\n".join(lines) + b"\n \n\n" + mark + b'{"text": "after a mark"}'
    )
    for name, content in (
        ("empty.txt", b""),
        ("blank.jsonl", mark + b"\n\n"),
        ("mark.txt", mark),
        ("empty.jsonl", b""),
    ):
        (folder / name).write_bytes(content)
    assert run([folder], tmp_path / "out", "--val-docs", "0") == 0
    assert documents_in(tmp_path / "out", "train") == [*texts[:200], "after a mark", "\ufeff"]
    error = capsys.readouterr().err
    assert "3 empty documents skipped" in error and "4 blank lines skipped" in error
    assert all(f"{folder / name} (no text)" in error for name in ("empty.txt", "blank.jsonl", "empty.jsonl"))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["left_out"] == {"files": 3, "empty_documents": 3, "blank_lines": 4}


# ------------------------------------------------------------------------------------------------------------
# Finished work is kept
# ------------------------------------------------------------------------------------------------------------


def test_what_is_not_shown_is_escaped() -> None:
    """The same characters as in the tools for runs, tab and newline too."""
    for number in (*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10000), 0x1F642):
        shown = prepare.escaped(chr(number))
        assert (shown == chr(number)) == (runfiles.escape(chr(number)) == chr(number)), hex(number)
        assert shown == chr(number) or (shown.isascii() and shown.isprintable())
    assert prepare.escaped("\x9b\u202e\u2028" + os.fsdecode(b"\xe9")) == r"\x9b\u202e\u2028\xe9"


def test_names_that_are_not_utf8(source: Path, texts: list[str], tmp_path: Path, capsys) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path, notes = (folder / os.fsdecode(name) for name in (b"donn\xe9es \xc3\xa9.jsonl", b"\x1b[2J\n\xff.md"))
    path.write_bytes(source.read_bytes())
    notes.write_text("not read")
    out = tmp_path / os.fsdecode(b"out_\xe9")
    assert run([out], out) == 2
    assert capsys.readouterr().err.endswith("/out_\\xe9: no such file or folder\n")
    assert run([path], out) == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["name"], manifest["source"]) == ("out_\\xe9", ["donn\\xe9es \u00e9.jsonl"])
    assert run([folder], tmp_path / "again") == 0
    assert f"{folder}/\\x1b[2J\\x0a\\xff.md (unsupported extension)" in capsys.readouterr().err
    again = snapshot(tmp_path / "again")
    assert {name: again[name] for name in again if name != "manifest.json"} == {
        name: content for name, content in snapshot(out).items() if name != "manifest.json"
    }
    assert sorted(
        documents_in(tmp_path / "again", "train") + documents_in(tmp_path / "again", "val")
    ) == sorted(texts)


def test_shards_stay_where_the_manifest_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([source], tmp_path / "good") == 0
    good = snapshot(tmp_path / "good")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.json, "dumps", lambda *args, **named: "x" * (1 << 20))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))  # as a disk that is full
        try:
            assert run([source], tmp_path / "full") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "all shards are complete, but manifest.json cannot be written" in capsys.readouterr().err
    assert snapshot(tmp_path / "full") == {name: good[name] for name in good if name != "manifest.json"}
    assert run([source], tmp_path / "full", "--overwrite") == 0 and set(snapshot(tmp_path / "full")) == set(
        good
    )


# ------------------------------------------------------------------------------------------------------------
# Overlap of validation and training shards
# ------------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, split: str, tokens: list[int], sizes: int) -> None:
    for index, start in enumerate(range(0, len(tokens), sizes)):
        part = tokens[start : start + sizes]
        content = shard_header(len(part)) + struct.pack(f"<{len(part)}H", *part)
        (folder / f"fineweb_{split}_{index:06d}.bin").write_bytes(content)


def split_at_bos(tokens: list[int]) -> list[list[int]]:
    starts = [index for index, token in enumerate(tokens) if token == 1]
    return [tokens[start + 1 : end] for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def brute_force_overlap(val: list[int], train: list[int]) -> dict[str, int]:
    windows = {tuple(train[start : start + 32]) for start in range(len(train) - 31)}
    whole = {tuple(document) for document in split_at_bos(train)}
    counts = Counter(
        dict.fromkeys(("documents_inside", "documents_touched", "documents_short", "spans_found"), 0)
    )
    for document in filter(None, split_at_bos(val)):
        inner = document[8:-8] if len(document) >= 48 else document
        places = sorted({*range(0, len(inner) - 31, 32), len(inner) - 32})
        found = [tuple(inner[place : place + 32]) in windows for place in places]
        found = [tuple(document) in whole] if len(document) < 32 else found
        counts.update(documents=1, documents_inside=all(found), documents_touched=any(found))
        counts.update(documents_short=len(document) < 32, spans=len(found), spans_found=sum(found))
    return dict(counts)


@pytest.mark.parametrize("seed", range(4))
def test_overlap_is_what_a_brute_force_counts(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of 0 to 150 tokens, a third of them copied into the training text:
    whole, cut, changed, in others."""
    monkeypatch.setattr(prepare, "CHUNK_TOKENS", 97)  # documents and spans lie across chunks and shards
    rng = random.Random(seed)
    val_documents = [[rng.randrange(3, 3 + 2**seed) for _ in range(rng.randrange(150))] for _ in range(60)]
    val_documents += [rng.choices(range(3, 65536), k=length) for length in (*range(28, 52), 96, 97, 500)]
    train_documents = [rng.choices(range(3, 65536), k=rng.randrange(90)) for _ in range(60)]
    for document in val_documents[::3]:
        first = rng.randrange(len(document) + 1) // 3
        copies = [
            document,
            document[first:],
            document[:-1],
            [*document[:40], 2, *document[41:]],
            [7, *document, 8, 9],
        ]
        train_documents.append(rng.choice(copies))
    rng.shuffle(train_documents)
    val, train = (
        [token for document in side for token in (1, *document)] for side in (val_documents, train_documents)
    )
    write_shards(tmp_path, "val", val, 1000)
    write_shards(tmp_path, "train", train, 501)
    (tmp_path / "fineweb_val_bytes_000000.bin").write_bytes(b"not tokens")
    overlap = prepare.count_overlap(tmp_path)
    expected = brute_force_overlap(val, train)
    assert {key: overlap[key] for key in expected} == expected
    assert 0 < expected["documents_inside"] < expected["documents_touched"] < expected["documents"]
    assert (overlap["val_tokens"], overlap["train_tokens"]) == (len(val), len(train))


def test_overlap_of_text_goes_into_the_record(
    prepared: Path, source: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [text for text in texts[:30] if len(text) > 250][:3]
    leak = write_jsonl(
        tmp_path / "leak.jsonl", ["bado kela", f"before it {long[0]} behind it", long[1], "end"]
    )
    val = write_jsonl(tmp_path / "val.jsonl", [*long, "bado kela", "bado"])
    folder, options = (
        tmp_path / "out",
        ["--tokenizer", str(prepared / "tokenizer.model"), "--val-input", str(val)],
    )
    assert run([leak], folder, *options) == 0
    before = json.loads((folder / "manifest.json").read_text())
    assert prepare.main(["--overlap", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (
        "overlap: 3 of 5 validation documents occur in the" in out
        and "tokens/s; written to manifest.json" in out
    )
    after = json.loads((folder / "manifest.json").read_text())
    overlap = after.pop("overlap")
    assert after == before and not list(folder.glob("*.tmp"))
    assert (overlap["documents_inside"], overlap["documents"], overlap["documents_short"]) == (3, 5, 2)
    (folder / "manifest.json").rename(folder / "source.json")
    assert prepare.main(["--overlap", str(folder)]) == 0
    assert json.loads((folder / "source.json").read_text())["overlap"] == overlap
    assert not (folder / "manifest.json").exists()
    (folder / "source.json").write_text("[")
    assert prepare.main(["--overlap", str(folder)]) == 2
    assert (folder / "source.json").read_text() == "["
    (folder / "source.json").unlink()
    assert prepare.main(["--overlap", str(folder)]) == 0
    assert "no manifest.json or source.json" in capsys.readouterr().out
    (folder / "fineweb_train_000000.bin").write_bytes((folder / "fineweb_train_000000.bin").read_bytes()[:-2])
    assert prepare.main(["--overlap", str(folder)]) == 2
    assert "not a shard" in capsys.readouterr().err
    (folder / "fineweb_train_000000.bin").unlink()
    assert prepare.main(["--overlap", str(folder)]) == 2
    assert "no fineweb_train_000000.bin" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Crashes
# ------------------------------------------------------------------------------------------------------------


def test_an_error_in_the_middle_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing(sp: spm.SentencePieceProcessor, text: str) -> list[int]:
        calls.append(text)
        if len(calls) == 200:
            assert len(list(tmp_path.glob("fineweb_train_*.bin"))) > 3
            raise OSError(28, "No space left on device")
        return sp.encode(text)

    monkeypatch.setattr(prepare, "encode", failing)
    monkeypatch.setattr(prepare, "is_lossless", lambda sp: True)
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1000)
    assert run([source], tmp_path, "--shard-tokens", "1000") == 1
    assert snapshot(tmp_path) == {}


KILLED = """
import sys, time, prepare
original = prepare.encode_batch
def slowly(sp, batch):
    time.sleep(0.05)
    return original(sp, batch)
prepare.encode_batch, prepare.BATCH_CHARACTERS = slowly, 1000
sys.exit(prepare.main(sys.argv[1:]))
"""


def test_a_killed_run_leaves_no_manifest_and_no_broken_shard(source: Path, tmp_path: Path) -> None:
    out, options = (
        tmp_path / "out",
        ["--vocab-size", "400", "--workers", "1", "--shard-tokens", "1000", "--name", "n"],
    )
    folder = search_path(Path(prepare.__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), "--out", str(out), *options], env={"PYTHONPATH": folder}
    )
    deadline = time.monotonic() + 15
    while not list(out.glob("fineweb_train_00000[1-9].bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    finished = list(out.glob("*.bin"))
    assert finished and not (out / "manifest.json").exists()
    assert all(len(read_tokens(path)) == 1000 for path in finished)
    assert run([source], out, *options) == 2
    assert run([source], out, *options, "--overwrite") == 0
    assert run([source], tmp_path / "clean", *options) == 0
    assert snapshot(out) == snapshot(tmp_path / "clean")
