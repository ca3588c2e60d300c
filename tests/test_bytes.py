"""Bits per byte: counted bytes against real UTF-8 (lossless tokenizers) and the field's rule (all others)."""

from __future__ import annotations

import io
import json
import random
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import prepare
import pytest
import sentencepiece as spm
from formats import CHALLENGE_BYTES, PUBLISHED, TEXT_BYTES
from test_data import write_shard

import train_gpt
from train_gpt import ByteTable, UserError, check_fingerprint, check_score, load_byte_table, recomputed_score

ROOT = Path(__file__).resolve().parent.parent
BOS, SPACE = 1, "\u2581"
ADVERSARIAL = [
    "",
    "plain words",
    " ",
    " one leading space",
    "   three   of   them   ",
    "\ttab\there\t\t and  \t there",
    "line\r\nfeed\r\rand\n\n\n  indented\n",
    "\x00nul\x00\x00 \x01\x1f\x7f",
    SPACE,
    f"{SPACE}a {SPACE}{SPACE} b{SPACE}\U0001f600 {SPACE}",
    "\U0001f600 \U0001f3fd\u200d\U0001f469\ufe0f",
    "e\u0301 \u0301lone \u0327marks\u0301 a\u030a\u0327",
    "\ufb01 \u2460 \u212b \uff21 \u00bd \u3000 \u00a0\u2028 \u2585",
    "\u6f22\u5b57\u4eee\u540d \u0627\u0644\u0639 \u05e2\u05d1 \u0939\u093f\u0928 \u13a0\u13b3 \u16a0 "
    "\U00010330",
    "\ufffd \ufeff \ufdd0 \U0010ffff",
    "<s></s><unk><pad> <0x41><0xE2>",
    "x" * 3000 + " " * 3000,
]


@pytest.fixture(scope="module")
def demo_tokenizer(demo_data) -> tuple[spm.SentencePieceProcessor, ByteTable]:
    path = str(demo_data / "tokenizer.model")
    return spm.SentencePieceProcessor(model_file=path), load_byte_table(path, 1024)


@pytest.fixture
def train_tokenizer(tmp_path):
    """A function that trains a small tokenizer with the given options
    and returns it with the path of its model."""

    def train(**options) -> tuple[spm.SentencePieceProcessor, str]:
        model = io.BytesIO()
        defaults = dict(model_type="bpe", vocab_size=400, hard_vocab_limit=False, minloglevel=2)
        defaults |= dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
        lines = (ROOT / "pyproject.toml").read_text().splitlines() + [
            "the caf\u00e9 sat on the mat, 1 fine day"
        ] * 20
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, **(defaults | options)
        )
        path = tmp_path / "trained.model"
        path.write_bytes(model.getvalue())
        return spm.SentencePieceProcessor(model_proto=model.getvalue()), str(path)

    return train


def counted(table: ByteTable, tokens) -> int:
    """Bytes of all targets of a token sequence."""
    tokens = np.asarray(tokens)
    return int(table.count(tokens[:-1], tokens[1:]).sum())


# ------------------------------------------------------------------------------------------------------------
# Lossless tokenizers: the bytes of the text
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ADVERSARIAL, ids=range(len(ADVERSARIAL)))
def test_counted_bytes_are_those_of_the_text(demo_tokenizer, text):
    sp, table = demo_tokenizer
    assert counted(table, [BOS, *prepare.encode(sp, text)]) == len(text.encode())


def test_several_documents_in_a_row(demo_tokenizer):
    sp, table = demo_tokenizer
    tokens = [token for text in ADVERSARIAL for token in (BOS, *prepare.encode(sp, text))]
    assert counted(table, [*tokens, BOS]) == sum(len(text.encode()) for text in ADVERSARIAL)


def test_random_texts(demo_tokenizer):
    sp, table = demo_tokenizer
    rng = random.Random(0)
    alphabet = " \t\n\r\0aet.\u00e9\u0301\u4e00\u2581\U0001f600"
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 30)))
        assert counted(table, [BOS, *prepare.encode(sp, text)]) == len(text.encode()), repr(text)


def test_each_target_of_a_document(demo_tokenizer):
    sp, table = demo_tokenizer
    ids = [BOS, *sp.encode(" a\t\u00e9"), BOS]
    by_target = table.count(np.array(ids[:-1]), np.array(ids[1:]))
    assert by_target.dtype == np.int64 and by_target[-1] == 0  # BOS is no text
    pieces = [sp.id_to_piece(i) for i in ids[1:-1]]
    lengths = [1 if piece.startswith("<0x") else len(piece.replace(SPACE, " ").encode()) for piece in pieces]
    assert by_target[:-1].tolist() == lengths and sum(lengths) == 5


def test_the_whole_validation_stream_counts_the_bytes_of_its_documents(demo_data, demo_tokenizer):
    manifest = json.loads((demo_data / "manifest.json").read_text())
    shards = sorted(demo_data.glob("fineweb_val_*.bin"))
    tokens = np.concatenate([np.frombuffer(path.read_bytes()[1024:], "<u2") for path in shards])
    assert tokens[0] == BOS and (tokens == BOS).sum() == manifest["splits"]["val"]["documents"]
    assert counted(demo_tokenizer[1], tokens) == manifest["splits"]["val"]["text_bytes"]


# ------------------------------------------------------------------------------------------------------------
# Other tokenizers: the field's rule
# ------------------------------------------------------------------------------------------------------------


def field_bytes(sp: spm.SentencePieceProcessor, previous: int, target: int) -> int:
    """Bytes of a target as the published programs count them."""

    def boundary(i: int) -> bool:
        return sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)

    if boundary(target) or sp.is_byte(target):
        return 0 if boundary(target) else 1
    piece = sp.id_to_piece(target)
    if not piece.startswith(SPACE):
        return len(piece.encode("utf-8"))
    return len(piece[1:].encode("utf-8")) + (0 if boundary(previous) else 1)


def assert_field_rule(sp: spm.SentencePieceProcessor, path: str) -> None:
    """Every target after BOS, after the unknown token, and after an ordinary piece."""
    vocab = sp.vocab_size()
    table, targets = load_byte_table(path, vocab), np.arange(vocab)
    for previous in (BOS, sp.unk_id(), vocab - 1):
        expected = [field_bytes(sp, previous, target) for target in range(vocab)]
        assert table.count(np.full(vocab, previous), targets).tolist() == expected


FIELD = dict(normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, split_digits=True)


def assert_recomputed(sp: spm.SentencePieceProcessor, path: str, folder: Path) -> None:
    """The score of random losses on all pairs of some tokens,
    over two shards, by the field's rule piece by piece."""
    rng = np.random.default_rng(0)
    tokens = [
        BOS,
        *rng.integers(0, sp.vocab_size(), 500).tolist(),
        BOS,
        *range(sp.vocab_size()),
        sp.unk_id(),
        BOS,
    ]
    nll, cut = rng.gamma(2.0, size=len(tokens) - 1).astype(np.float32), len(tokens) // 3
    shards = [
        str(write_shard(folder / f"{i}.bin", part)) for i, part in enumerate((tokens[:cut], tokens[cut:]))
    ]
    num_bytes = sum(field_bytes(sp, a, b) for a, b in pairwise(tokens))
    val_loss, val_bpb = recomputed_score(nll, shards, path)
    total = sum(float(x) for x in nll)
    assert val_loss == pytest.approx(total / len(nll), rel=1e-12)
    assert val_bpb == pytest.approx(total / np.log(2) / num_bytes, rel=1e-12)
    check_score(val_loss, val_bpb, nll, shards, path)
    for wrong in (
        (val_loss * (1 + 2e-9), val_bpb),
        (val_loss, val_bpb * (1 - 2e-9)),
        (float("nan"), val_bpb),
    ):
        with pytest.raises(ArithmeticError, match="disagrees with its losses"):
            check_score(*wrong, nll, shards, path)
    nll[7] = np.nan
    with pytest.raises(ArithmeticError, match=f"1 of {len(nll)} losses"):
        check_score(val_loss, val_bpb, nll, shards, path)


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("dummy", [True, False])
def test_the_score_is_derived_a_second_time(train_tokenizer, tmp_path, byte_fallback, dummy):
    sp, path = train_tokenizer(**FIELD | dict(add_dummy_prefix=dummy), byte_fallback=byte_fallback)
    assert_recomputed(sp, path, tmp_path)


def test_the_score_of_a_lossless_tokenizer_is_that_of_the_bytes_of_the_text(
    demo_tokenizer, demo_data, tmp_path
):
    sp, _ = demo_tokenizer
    texts = [text for text in ADVERSARIAL if text]
    tokens = [token for text in texts for token in (BOS, *prepare.encode(sp, text))]
    nll = np.ones(len(tokens) - 1, np.float32)
    shard = str(write_shard(tmp_path / "0.bin", tokens))
    _, val_bpb = recomputed_score(nll, [shard], str(demo_data / "tokenizer.model"))
    assert val_bpb == pytest.approx(
        len(nll) / np.log(2) / sum(len(text.encode()) for text in texts), rel=1e-12
    )


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_field_rule_piece_by_piece(train_tokenizer, byte_fallback):
    sp, path = train_tokenizer(**FIELD, byte_fallback=byte_fallback)
    assert_field_rule(sp, path)


@pytest.mark.parametrize("vocab", [1024, 8192])
def test_field_rule_with_the_official_tokenizers(vocab):
    path = ROOT.parent / "shared" / "corpus" / f"fineweb_{vocab}_bpe.model"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside this checkout")
    sp = spm.SentencePieceProcessor(model_file=str(path))
    assert sp.vocab_size() == vocab
    assert_field_rule(sp, str(path))


def test_field_rule_on_text(train_tokenizer):
    sp, path = train_tokenizer(**FIELD, byte_fallback=True)
    table = load_byte_table(path, sp.vocab_size())
    text = "the caf\u00e9 \ufb01ne \u2460 mat"  # a ligature and a circled digit, which the tokenizer rewrites
    normal = unicodedata.normalize("NFKC", text)
    assert len(normal.encode()) == 20 and normal != text
    assert counted(table, [BOS, *sp.encode(text)]) == 20


def test_a_space_at_document_start_is_not_counted(train_tokenizer):
    sp, path = train_tokenizer(**FIELD, byte_fallback=True)
    table, space, letter = load_byte_table(path, sp.vocab_size()), sp.piece_to_id(SPACE), sp.piece_to_id("t")
    assert counted(table, [BOS, space, letter]) == 1
    assert counted(table, [letter, space, letter]) == 2
    assert counted(table, [BOS, letter, space, letter, BOS, space, letter]) == 4


def test_a_space_that_the_tokenizer_adds_itself_is_not_counted(train_tokenizer):
    options = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)
    sp, path = train_tokenizer(**options, add_dummy_prefix=True)
    tokens = [BOS, *sp.encode("the mat")]
    assert sp.id_to_piece(tokens[1]).startswith(SPACE)
    assert counted(load_byte_table(path, sp.vocab_size()), tokens) == len("the mat")


# ------------------------------------------------------------------------------------------------------------
# Fingerprints and refusals
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "known", [known for known in PUBLISHED if known.num_bytes], ids=lambda known: known.tokens
)
def test_fingerprint_of_published_validation_sets(known):
    tokens, text_bytes = known.tokens, known.num_bytes
    check_fingerprint(tokens, text_bytes, "")
    for wrong in (round(1.01 * text_bytes), round(0.99 * text_bytes)):
        with pytest.raises(UserError, match=f"{tokens}.*{(tokens - 1) / wrong:.5f}"):
            check_fingerprint(tokens, wrong, "")
        check_fingerprint(tokens + 1, wrong, "")  # a size that nobody published has no fingerprint


FOREIGN_BYTES = (
    150_638_137,
    CHALLENGE_BYTES[0] - 1,
    CHALLENGE_BYTES[1] + 1,
    155_770_000,
    182_800_000,
    30_500_000,
)


@pytest.mark.parametrize("num_bytes", FOREIGN_BYTES)
def test_a_folder_that_claims_the_challenge_has_its_bytes(num_bytes):
    """151,073,604 to 151,080,891 by the field's ways of counting;
    155.8 million in the first baseline's export."""
    for right in (151_073_604, TEXT_BYTES, *CHALLENGE_BYTES):
        check_fingerprint(60_000_000, right, "data/datasets/fineweb10B_sp2048/fineweb_val_*.bin")
    with pytest.raises(UserError, match=f"{num_bytes} bytes"):
        check_fingerprint(60_000_000, num_bytes, "data/datasets/fineweb10B_sp2048/fineweb_val_*.bin")
    check_fingerprint(60_000_000, num_bytes, "data/datasets/another_text/fineweb_val_*.bin")


def test_a_text_without_bytes_is_named():
    with pytest.raises(UserError, match="no byte of text"):
        check_fingerprint(70, 0, "here/fineweb_val_*.bin")


def write_wrong(kind: str, path: Path, train_tokenizer) -> tuple[dict[str, str], list[str]]:
    """Put a wrong tokenizer at PATH; the settings that go with it, and what the message must say."""
    if kind == "not a model":
        path.write_bytes(b"Once upon a time " * 100)
        return {}, []
    if kind == "another vocabulary":
        vocab = train_tokenizer(**FIELD, byte_fallback=True)[0].vocab_size()
        return {"VOCAB_SIZE": str(vocab + 1)}, [f"{vocab} tokens", f"VOCAB_SIZE={vocab + 1}"]
    if kind == "another BOS":
        vocab = train_tokenizer(**FIELD | dict(bos_id=2, eos_id=1), byte_fallback=True)[0].vocab_size()
        return {"VOCAB_SIZE": str(vocab)}, ["BOS 2", "BOS 1"]
    if kind == "no lone space":
        sp, _ = train_tokenizer(model_type="word", vocab_size=12)
        assert SPACE not in [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        return {"VOCAB_SIZE": str(sp.vocab_size())}, ["lone space"]
    return {}, []


@pytest.mark.parametrize(
    "kind", ["missing", "not a model", "another vocabulary", "another BOS", "no lone space"]
)
def test_wrong_tokenizers(smoke_env, tmp_path, monkeypatch, capsys, train_tokenizer, kind):
    path = tmp_path / "trained.model"
    settings, words = write_wrong(kind, path, train_tokenizer)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main([], smoke_env | {"TOKENIZER_PATH": str(path)} | settings) == 2
    message = capsys.readouterr().err
    assert [word for word in ["error: ", str(path), *words] if word not in message] == []
    assert sorted(tmp_path.iterdir()) == before
