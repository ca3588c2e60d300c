"""data/case_ops.py, the exports of data/prepare.py --case-ops, and the download of the published one."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import struct
from itertools import pairwise
from pathlib import Path

import download
import prepare
import pytest
import sentencepiece as spm
import test_download
from case_ops import ALLCAPS, CAPNEXT, ESC, OPERATORS, TITLE, byte_counts, decode, encode
from formats import shard_header
from hypothesis import given, settings
from hypothesis import strategies as st
from test_download import FOLDER, REPO, Repository, contents
from test_prepare import HOSTILE, make_texts, read_tokens, run, snapshot, write_jsonl

import eval_ttt
import train_gpt

hub = test_download.hub  # the fixture: a stand-in for the hub on 127.0.0.1
TEXTS = st.text() | st.text(st.sampled_from(f"aAzZé\u00c9\u01c5 \n1'\u2581\U0001f600{OPERATORS}"))


def reference(text: str) -> str:
    """The transform as the specification words it, run by run."""
    out = ""
    for part in re.findall(r"[A-Za-z]+|[^A-Za-z]", text):
        if part in OPERATORS:
            out += ESC + part
        elif not (part.isascii() and part.isalpha()) or part == part.lower():
            out += part
        elif len(part) >= 2 and part == part.upper():
            out += ALLCAPS + part.lower()
        elif part[0].isupper() and part[1:] and part[1:] == part[1:].lower():
            out += TITLE + part.lower()
        else:
            marks = [TITLE if part[0].isupper() else "", *(CAPNEXT if c.isupper() else "" for c in part[1:])]
            out += "".join(mark + letter.lower() for mark, letter in zip(marks, part, strict=True))
    return out


def original_bytes(marked: str) -> int:
    """Bytes of the original text behind a beginning of its encoded text, which may end on an operator."""
    try:
        return len(decode(marked).encode())
    except ValueError:
        return len(decode(marked[:-1]).encode())


# ------------------------------------------------------------------------------------------------------------
# Transform
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("the", "the"),
        ("The", f"{TITLE}the"),
        ("THE", f"{ALLCAPS}the"),
        ("I", f"{TITLE}i"),
        ("OK", f"{ALLCAPS}ok"),
        ("McDonald", f"{TITLE}mc{CAPNEXT}donald"),
        ("iPHONEs", f"i{CAPNEXT}p{CAPNEXT}h{CAPNEXT}o{CAPNEXT}n{CAPNEXT}es"),
        ("ABc", f"{TITLE}a{CAPNEXT}bc"),
        ("A1B", f"{TITLE}a1{TITLE}b"),
        ("\u00c9Tat \u01c5\u00e9A", f"\u00c9{TITLE}tat \u01c5\u00e9{TITLE}a"),
        (OPERATORS, "".join(ESC + operator for operator in OPERATORS)),
        (f"A{ESC}B", f"{TITLE}a{ESC}{ESC}{TITLE}b"),
    ],
)
def test_examples(text: str, marked: str) -> None:
    assert encode(text) == marked == reference(text) and decode(marked) == text


@given(TEXTS)
@settings(deadline=None, max_examples=500)
def test_any_text_comes_back(text: str) -> None:
    marked = encode(text)
    assert marked == reference(text) and decode(marked) == text
    assert not re.search("[A-Z]", marked)


def test_long_runs_take_linear_time() -> None:
    for text in ("a" * 300_000 + "A", "aA" * 100_000, "A" * 300_000, ESC * 100_000):
        assert decode(encode(text)) == text


@pytest.mark.parametrize("text", [TITLE, f"a{CAPNEXT}", f"{ALLCAPS} a", f"{TITLE}A", f"x{ESC}y", ESC * 3])
def test_an_operator_without_its_operand_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"operator U\+E00[1-4] at character [0-2] has no operand"):
        decode(text)


# ------------------------------------------------------------------------------------------------------------
# Bytes per token
# ------------------------------------------------------------------------------------------------------------


@given(TEXTS, st.lists(st.floats(0, 1)))
@settings(deadline=None, max_examples=300)
def test_counts_of_any_pieces_add_up(text: str, cuts: list[float]) -> None:
    marked = encode(text).encode()
    ends = sorted(int(cut * len(marked)) for cut in cuts)
    pieces = [marked[start:end] for start, end in zip([0, *ends], [*ends, len(marked)], strict=True)]
    assert sum(byte_counts([b"", *pieces])) == len(text.encode())


def test_where_each_byte_counts() -> None:
    emoji = "\U0001f600".encode()
    pieces = [b"", TITLE, "the", " ", ALLCAPS, "ab\u00e9", ESC, TITLE, "x", ESC, ESC, ESC, "", CAPNEXT]
    pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    pieces += [emoji[:1], emoji[1:3], emoji[3:] + b"a", ESC.encode()[:2], ESC.encode()[2:], b"y"]
    counts = [0, 0, 3, 1, 0, 4, 0, 3, 1, 0, 3, 0, 0, 3, 0, 0, 5, 0, 0, 1]
    assert byte_counts(pieces) == counts
    for pieces in ([b"\xf0\x9f"], [b"\xf0", b"a"], [b"\xff"]):
        with pytest.raises(UnicodeDecodeError):
            byte_counts(pieces)


@pytest.fixture(scope="module")
def normalizing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the options of the published one, but with fewer pieces."""
    path = tmp_path_factory.mktemp("normalizing") / "normalizing.model"
    with path.open("wb") as stream:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(encode(line) for text in make_texts(1, 100) for line in text.split("\n")),
            model_writer=stream,
            model_type="bpe",
            vocab_size=400,
            character_coverage=0.999,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=list(OPERATORS),
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    return path


def test_counts_of_a_normalizing_tokenizer(normalizing: Path) -> None:
    encoder = prepare.Encoder(normalizing.read_bytes(), case_ops=True)
    sp = encoder.sp
    assert [sp.id_to_piece(token) for token in range(4, 8)] == list(OPERATORS) and not encoder.lossless

    def counted(text: str) -> list[tuple[str, int]]:
        tokens, counts = encoder.document(text, "val")
        return [(sp.id_to_piece(token), count) for token, count in zip(tokens.tolist(), counts, strict=True)]

    assert sum(count for _, count in counted("  ba \n\n ba\t ")) == 8  # whitespace at both ends is lost
    assert counted("b   A")[1:] == [("b", 1), ("\u2581", 3), (TITLE, 0), ("a", 1)]
    assert counted("bA")[1:] == [("b", 1), (CAPNEXT, 0), ("a", 1)]
    assert counted("\u6f22") == [("<s>", 0), ("<0xE6>", 0), ("<0xBC>", 0), ("<0xA2>", 3)]
    assert counted(f"{TITLE}{ESC}") == [("<s>", 0), (ESC, 0), (TITLE, 3), (ESC, 0), (ESC, 3)]
    assert counted("\ufb01")[1:] == [("fi", 3)]  # one character before normalization
    for text in ["\u00c9 Ba\n\n  DO ", f"bA{TITLE} {ESC}{ESC}A", *HOSTILE, *make_texts(3, 20)]:
        marked = encode(text)
        spans = sp.encode(marked, out_type="immutable_proto").pieces
        lengths = [
            original_bytes(marked[: span.end]) - original_bytes(marked[: span.begin]) for span in spans
        ]
        assert [count for _, count in counted(text)] == [0, *lengths]


# ------------------------------------------------------------------------------------------------------------
# Exports
# ------------------------------------------------------------------------------------------------------------


def cased(texts: list[str]) -> list[str]:
    """The texts with capitals of all kinds, operators, and one document of nothing but an operator."""
    rng = random.Random(7)
    changes = (str.title, str.upper, str.lower, str.capitalize, str.swapcase)
    words = [[rng.choice(changes)(word) for word in re.split(r"(\s)", text)] for text in texts]
    return [f"{''.join(text)}{rng.choice(['', '', TITLE, ESC, ESC + ALLCAPS])}" for text in words] + [ESC]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return cased(make_texts(0, 150) + HOSTILE[1:])


@pytest.fixture(scope="module")
def source(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("source") / "text.jsonl", texts[::-1])


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    options = ["--case-ops", "--val-docs", "40", "--shard-tokens", "3001", "--name", "n"]
    assert run([source], out, *options) == 0
    return out


def read_export(out: Path) -> tuple[list[int], list[int]]:
    """Tokens and bytes per token of the validation split; read_tokens checks headers and lengths."""
    shards = sorted(out.glob("fineweb_val_[0-9]*.bin"))
    sidecars = sorted(out.glob("fineweb_val_bytes_*.bin"))
    assert [path.name.replace("val_", "val_bytes_") for path in shards] == [path.name for path in sidecars]
    pairs = [
        (read_tokens(shard), read_tokens(sidecar)) for shard, sidecar in zip(shards, sidecars, strict=True)
    ]
    assert all(len(tokens) == len(counts) for tokens, counts in pairs)
    return [token for tokens, _ in pairs for token in tokens], [n for _, counts in pairs for n in counts]


def documents(tokens: list[int], counts: list[int]) -> list[tuple[list[int], list[int]]]:
    """Tokens and bytes of each document, without its BOS."""
    starts = [position for position, token in enumerate(tokens) if token == 1]
    ends = [*starts[1:], len(tokens)]
    assert starts[0] == 0 and all(counts[start] == 0 for start in starts)
    return [(tokens[a + 1 : b], counts[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]


def brute_force(sp: spm.SentencePieceProcessor, tokens: list[int]) -> list[int]:
    """Bytes of the original text behind each prefix of the tokens, less those behind the prefix before.

    A character that a prefix has in part does not count there.
    """
    lengths, text = [0], b""
    for token in tokens:
        piece = sp.id_to_piece(token)
        text += bytes([int(piece[3:5], 16)]) if sp.is_byte(token) else piece.replace("\u2581", " ").encode()
        lengths.append(original_bytes(text.decode(errors="ignore")))
    return [after - before for before, after in pairwise(lengths)]


def test_documents_and_bytes_of_an_export(exported: Path, texts: list[str]) -> None:
    sp = spm.SentencePieceProcessor(model_file=str(exported / "tokenizer.model"))
    assert [sp.id_to_piece(token) for token in (0, 1, 4, 5, 6, 7, 8)] == [
        "<pad>",
        "<s>",
        *OPERATORS,
        "<0x00>",
    ]
    assert sp.vocab_size() == 400 and prepare.is_lossless(sp)
    assert not [piece for piece in map(sp.id_to_piece, range(264, 400)) if re.search("[A-Z]", piece)]
    tokens, counts = read_export(exported)
    assert len(list(exported.glob("fineweb_val_bytes_*.bin"))) > 2  # documents continue in the next shard
    found = documents(tokens, counts)
    assert len(found) == 40
    for text, (own, lengths) in zip(texts[::-1], found, strict=False):
        assert decode(sp.decode(own)) == text and sum(lengths) == len(text.encode())
        assert lengths == brute_force(sp, own)
    assert sum(counts[1:]) == sum(len(text.encode()) for text in texts[-40:])
    train = [token for path in sorted(exported.glob("fineweb_train_*.bin")) for token in read_tokens(path)]
    assert [decode(sp.decode(own)) for own, _ in documents(train, [0] * len(train))] == texts[-41::-1]


def test_manifest_of_an_export(exported: Path, texts: list[str]) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    tokens, counts = read_export(exported)
    entry = manifest["case_ops"]
    assert entry["operators"] == ["U+E001", "U+E002", "U+E003", "U+E004"]
    assert (entry["val_tokens"], entry["val_target_bytes"]) == (len(tokens), sum(counts))
    val = [shard for shard in manifest["shards"] if shard["split"] == "val"]
    for shard, sidecar in zip(val, entry["sidecars"], strict=True):
        content = (exported / sidecar["file"]).read_bytes()
        assert sidecar["file"] == shard["file"].replace("val_", "val_bytes_")
        assert sidecar["sha256"] == hashlib.sha256(content).hexdigest()
        assert sidecar["tokens"] == shard["tokens"] and sidecar["bytes"] == shard["text_bytes"]
        assert content[:1024] == shard_header(shard["tokens"])
    for split, own in (("val", texts[-40:]), ("train", texts[:-40])):
        size = sum(len(text.encode()) for text in own)
        assert manifest["splits"][split]["text_bytes"] == size
        assert sum(shard["text_bytes"] for shard in manifest["shards"] if shard["split"] == split) == size


def test_an_export_does_not_depend_on_workers(exported: Path, source: Path, tmp_path: Path) -> None:
    options = ["--case-ops", "--val-docs", "40", "--shard-tokens", "3001", "--name", "n", "--workers", "2"]
    assert run([source], tmp_path / "out", *options) == 0
    assert snapshot(tmp_path / "out") == snapshot(exported)


def test_export_with_a_normalizing_tokenizer(
    source: Path, texts: list[str], normalizing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--case-ops", "--val-docs", "40", "--tokenizer", str(normalizing)]
    assert run([source], tmp_path, *options) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    tokens, counts = read_export(tmp_path)
    sp = spm.SentencePieceProcessor(model_file=str(normalizing))
    found = documents(tokens, counts)
    assert [own for own, _ in found] == [sp.encode(encode(text)) for text in texts[:-41:-1]]
    assert sum(counts) == manifest["case_ops"]["val_target_bytes"] < manifest["splits"]["val"]["text_bytes"]
    assert f"{len(tokens):,} validation tokens, {sum(counts):,} bytes" in capsys.readouterr().out
    assert {shard["text_bytes"] for shard in manifest["shards"]} == {None, sum(counts)}


def test_tokenizers_without_operators_and_long_tokens_are_errors(
    source: Path, normalizing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain.model"
    plain.write_bytes(prepare.train_tokenizer(make_texts(2, 60), 350))
    assert run([source], tmp_path / "out", "--case-ops", "--tokenizer", str(plain)) == 2
    assert "plain.model: no piece for U+E001, U+E002, U+E003, U+E004" in capsys.readouterr().err
    wide = write_jsonl(tmp_path / "wide.jsonl", [f"ba{' ' * length}Do" for length in (65_535, 65_536)])
    options = ["--case-ops", "--tokenizer", str(normalizing), "--workers", "2"]
    assert run([source], tmp_path / "out", "--val-input", str(wide), *options) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"token \d of the document that begins 'ba  .* stands for 65536 bytes: '\u2581', id", error
    )
    assert snapshot(tmp_path / "out") == {}


def test_earlier_exports_are_noticed_and_replaced(
    source: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, content in snapshot(exported).items():
        (out / name).write_bytes(content)
    assert (
        run([source], out, "--case-ops") == 2 and "already contains manifest.json" in capsys.readouterr().err
    )
    assert run([source], out, "--val-docs", "9", "--overwrite") == 0
    assert sorted(snapshot(out)) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
        "manifest.json",
        "tokenizer.model",
    ]
    assert "case_ops" not in json.loads((out / "manifest.json").read_text())
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "fineweb_val_bytes_000007.bin").write_bytes(b"")
    assert run([source], alone) == 2
    assert "already contains fineweb_val_bytes_000007.bin" in capsys.readouterr().err
    calls = []

    def failing(pieces: list[bytes]) -> list[int]:
        calls.append(pieces)
        if len(calls) == 120:
            assert list(out.glob("fineweb_val_bytes_*"))
            raise OSError(28, "No space left on device")
        return byte_counts(pieces)

    monkeypatch.setattr(prepare.case_ops, "byte_counts", failing)
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1000)
    options = ["--case-ops", "--val-fraction", "0.5", "--shard-tokens", "500", "--overwrite"]
    assert run([source], out, *options) == 1 and snapshot(out) == {}


def test_sidecars_are_not_counted_as_text(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name, content in snapshot(exported).items():
        (tmp_path / "out" / name).write_bytes(content)
    shards = prepare.list_shards(tmp_path / "out", "val")
    assert not [path for path in shards if "_bytes_" in path.name]
    overlap = prepare.count_overlap(tmp_path / "out")
    assert overlap["val_tokens"] == sum(shards.values()) == len(read_export(exported)[0])


# ------------------------------------------------------------------------------------------------------------
# The published export
# ------------------------------------------------------------------------------------------------------------

NAME = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
PUBLISHED_AT = FOLDER.replace("fineweb10B_sp1024", NAME)
MODEL = "datasets/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"


@pytest.fixture
def published(hub: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """The stand-in with a CaseOps export of 4 validation tokens, 9 bytes, and two training shards."""
    hub.files = {
        "README.md": b"hello",
        MODEL: b"model",
        f"{PUBLISHED_AT}/fineweb_val_000000.bin": shard_header(4) + struct.pack("<4H", 1, 4, 300, 301),
        f"{PUBLISHED_AT}/fineweb_val_bytes_000000.bin": shard_header(4) + struct.pack("<4H", 0, 0, 3, 6),
    }
    for index in range(2):
        hub.files[f"{PUBLISHED_AT}/fineweb_train_{index:06d}.bin"] = test_download.shard(index, 50)
    known = download.EXPORTS["sp8192_caseops"]
    totals = known.totals._replace(tokens=4, num_bytes=9)
    monkeypatch.setitem(download.EXPORTS, "sp8192_caseops", known._replace(repo=REPO, totals=totals))
    return hub


def fetch(out: Path, *options: str) -> int:
    return download.main(["--variant", "sp8192_caseops", "--train-shards", "2", "--out", str(out), *options])


def test_the_table_of_exports() -> None:
    options = download.parse_arguments(["--variant", "sp8192_caseops"])
    assert (options.repo, options.train_shards) == ("romeerp/parameter-golf-caseops-v1", 80)
    totals = download.EXPORTS["sp8192_caseops"].totals
    assert (totals.tokens, totals.num_bytes) == (47_853_344, 151_080_645)
    assert download.parse_arguments(["--variant", "sp1024"]).repo == "willdepueoai/parameter-golf"
    assert download.parse_arguments(["--variant", "sp8192_caseops", "--repo", "a/b"]).repo == "a/b"


def test_the_published_export_is_fetched_and_checked(published: Repository, tmp_path: Path) -> None:
    assert fetch(tmp_path) == 0
    names = {f"datasets/{NAME}/{Path(path).name}" for path in published.files if path.endswith(".bin")}
    assert set(contents(tmp_path)) == names | {f"tokenizers/{Path(MODEL).name}"}
    source = json.loads((tmp_path / f"datasets/{NAME}/source.json").read_text())
    assert (source["variant"], source["val_target_bytes"]) == ("sp8192_caseops", 9)
    published.requests.clear()
    assert fetch(tmp_path) == 0 and published.downloads() == []


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("fineweb_val_bytes_000000.bin", "no fineweb_val_bytes_000000.bin in datasets/datasets/"),
        ("fineweb_val_000000.bin", "has no validation shards"),
        ("fineweb_train_000001.bin", "has 1 training shards"),
        (Path(MODEL).name, "no tokenizer beside datasets/datasets/"),
    ],
)
def test_a_missing_file_is_named(
    published: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str, message: str
) -> None:
    published.files = {
        path: content for path, content in published.files.items() if Path(path).name != missing
    }
    assert fetch(tmp_path) == 2 and message in capsys.readouterr().err
    assert published.downloads() == []


def test_another_folder_name_is_listed(
    published: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = {path.replace(NAME, "fineweb10B_sp8192_v2"): content for path, content in published.files.items()}
    published.files = moved
    assert fetch(tmp_path) == 2
    assert f'no variant "{NAME[11:]}"; available: sp8192_v2' in capsys.readouterr().err
    assert download.main(
        ["--repo", REPO, "--variant", "sp8192_v2", "--train-shards", "1", "--out", str(tmp_path)]
    ) == 0  # fmt: skip


def test_other_data_under_the_published_name_are_refused(
    published: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{PUBLISHED_AT}/fineweb_val_bytes_000000.bin"
    published.files[name] = published.files[name][:-2] + struct.pack("<H", 7)
    assert fetch(tmp_path) == 1
    assert "stand for 10 bytes by their sidecars, the published export has 9" in capsys.readouterr().err
    assert not (tmp_path / f"datasets/{NAME}/source.json").exists()
    published.files[name] = published.files[name][:-2]
    assert fetch(tmp_path) == 2
    assert "1030 bytes, but its validation shard has 1032" in capsys.readouterr().err
    for kind in ("val", "val_bytes"):
        published.files[f"{PUBLISHED_AT}/fineweb_{kind}_000000.bin"] = shard_header(2) + bytes(4)
    assert fetch(tmp_path) == 2
    assert "2 validation tokens in datasets/datasets/" in capsys.readouterr().err
    unchecked = [
        "--variant",
        NAME[11:],
        "--repo",
        REPO,
        "--train-shards",
        "0",
        "--out",
        str(tmp_path / "all"),
    ]
    assert download.main(unchecked) == 0


def test_sidecars_match_validation_shards_one_to_one(
    published: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.files[f"{PUBLISHED_AT}/fineweb_val_000001.bin"] = shard_header(1) + bytes(2)
    assert fetch(tmp_path) == 2
    error = capsys.readouterr().err
    assert "fineweb_val_bytes_000001.bin: no bytes, but its validation shard has 1026" in error


# ------------------------------------------------------------------------------------------------------------
# Training and scoring
# ------------------------------------------------------------------------------------------------------------


def smoke_of(folder: Path) -> dict[str, str]:
    vocabulary = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    smoke = Path(train_gpt.__file__).with_name("records") / "recipes/smoke.env"
    return dict(RECIPE=str(smoke), RUN_ID="run",
                DATA_PATH=str(folder), TOKENIZER_PATH=str(folder / "tokenizer.model"), ITERATIONS="2",
                VOCAB_SIZE=str(vocabulary), GPTQ_CALIB_BATCHES="1", GPTQ_GRAD_BATCHES="1", WARMUP_STEPS="0",
                AUDIT_TOKENS="600", IGNORE_ENV="OMP_NUM_THREADS")  # fmt: skip


def test_every_score_counts_the_bytes_of_the_sidecar(exported, tmp_path, monkeypatch, capsys):
    """Trainer, evaluator, and audit, against the bytes of the original text in the manifest."""
    monkeypatch.chdir(tmp_path)
    env = smoke_of(exported)
    assert train_gpt.main([], env) == 0
    result = json.loads(Path("runs/run/result.json").read_text())
    listed = json.loads((exported / "manifest.json").read_text())["case_ops"]
    for kind in ("roundtrip", "sliding"):
        nats = result[f"val_loss_{kind}"] * (listed["val_tokens"] - 1)
        expected = nats / math.log(2) / listed["val_target_bytes"]
        assert result[f"val_bpb_{kind}"] == pytest.approx(expected, rel=1e-9)
    assert eval_ttt.main([], env) == 0 and eval_ttt.main(["--audit"], env) == 0
    assert "pass  T9 counted bytes" in (shown := capsys.readouterr().out), shown[-3000:]
    assert "pass  T19 the printed score" in shown


@pytest.mark.parametrize("change, words", [
    (lambda path: path.unlink(), "has no byte sidecar"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), "fineweb_val_bytes_000000.bin"),
    (lambda path: path.write_bytes(shard_header(20) + bytes(40)), "not the byte sidecar of these shards"),
    (lambda path: path.write_bytes(b"\0" * 1024), "fineweb_val_bytes_000000.bin"),
], ids=["missing", "truncated", "another length", "no header"])  # fmt: skip
def test_a_wrong_sidecar_is_an_error(exported, tmp_path, monkeypatch, capsys, change, words):
    folder = shutil.copytree(exported, tmp_path / "data")
    for shard in list(folder.glob("fineweb_val*_00000[1-9].bin")):
        shard.unlink()
    change(folder / "fineweb_val_bytes_000000.bin")
    (folder / "manifest.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main([], smoke_of(folder)) == 2
    assert words in capsys.readouterr().err
