"""The score derived from nll.npy, shards and tokenizer, and training text that is validation text."""

import hashlib
import io
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import check
import evidence
import numpy as np
import pytest
import sentencepiece as spm
from test_cli import write_shard

import train_gpt

TOKENS = 3001


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def made(demo_data, tmp_path, monkeypatch) -> SimpleNamespace:
    """The folder of an evaluated run, in two shards,
    with scores counted from the decoded text; write() writes it."""
    monkeypatch.chdir(tmp_path)
    data, run = tmp_path / "data", tmp_path / "runs/a"
    run.mkdir(parents=True)
    data.mkdir()
    tokenizer = shutil.copy(demo_data / "tokenizer.model", data)
    tokens = np.fromfile(demo_data / "fineweb_val_000000.bin", "<u2", offset=1024)[:TOKENS]
    shards = [data / "fineweb_val_000000.bin", data / "fineweb_val_000001.bin"]
    for path, part in zip(shards, np.split(tokens, [1234]), strict=True):
        write_shard(path, part)
    losses = np.random.default_rng(0).uniform(0, 8, TOKENS - 1).astype(np.float32)
    np.save(run / "nll.npy", losses)
    text = spm.SentencePieceProcessor(model_file=str(tokenizer)).decode(tokens[1:].tolist())
    total = math.fsum(losses.tolist())
    result = dict(val_loss_ttt=total / (TOKENS - 1), val_bpb_ttt=total / math.log(2) / len(text.encode()),
                  sha256_nll=sha(run / "nll.npy"), sha256_tokenizer=sha(Path(tokenizer)), settings={},
                  sha256_shards={path.name: sha(path) for path in shards})  # fmt: skip
    logged = dict(DATA_PATH=data, TOKENIZER_PATH=tokenizer, VAL_FILES="", TRAIN_FILES="")
    made = SimpleNamespace(
        run=run, data=data, shards=shards, tokens=tokens, losses=losses, result=result, logged=logged
    )

    def write() -> list[check.Verdict]:
        head = [
            *(f"  {name}={value} (given)" for name, value in made.logged.items()),
            "model_params:1",
            "seed:7",
        ]
        step = "step:1/1 train_loss:1.0 train_time:9ms step_avg:9.00ms"
        (run / "train.log").write_text("\n".join([*head, step, 'RESULT {"train_seconds": 1.0, "seed": 7}\n']))
        (run / "result.json").write_text("{}")
        scores = "val_loss:{val_loss_ttt:.8f} val_bpb:{val_bpb_ttt:.8f}".format(**made.printed or made.result)
        (run / "eval_ttt.log").write_text(
            f"legal_ttt_exact {scores} time:1.0s\nRESULT {json.dumps(made.result)}\n"
        )
        record = check.read_record(run)
        record.data, record.tokenizer = made.options
        rules = {"losses": evidence.check_losses, "validation set": check.check_validation}
        return [check.Verdict(name, *found) for name, rule in rules.items() for found in rule(record)]

    made.write, made.printed, made.options = write, None, (None, None)
    return made


def told(verdicts: list[check.Verdict], status: str, rule: str = "losses") -> str:
    return "\n".join(v.evidence for v in verdicts if (v.rule, v.status) == (rule, status))


def test_the_score_is_that_of_the_losses(made):
    verdicts = made.write()
    assert not told(verdicts, "fail") and not told(verdicts, "warn")
    assert f"val_bpb {made.result['val_bpb_ttt']:.10f} matches nll.npy" in told(verdicts, "pass")


@pytest.mark.parametrize("unit", ["loss", "bpb"])
@pytest.mark.parametrize("factor", [1 - 3e-9, 1 + 3e-9, 0.5, math.nan])
def test_a_score_that_is_not_that_of_the_losses(made, unit, factor):
    made.printed = dict(made.result)
    made.result[f"val_{unit}_ttt"] *= factor
    assert f"RESULT has val_{unit}_ttt" in told(made.write(), "fail")
    made.printed, made.result = made.result, made.printed
    if not abs(factor - 1) < 1e-8:  # the line has eight digits
        assert "the log has eval_ttt.log:1: legal_ttt_exact" in told(made.write(), "fail")


def test_losses_of_a_part_are_not_the_text(made):
    np.save(made.run / "nll.npy", made.losses[:-1])
    made.result["sha256_nll"] = sha(made.run / "nll.npy")
    made.result["val_loss_ttt"] = float(made.losses[:-1].mean(dtype=np.float64))
    assert f"{TOKENS - 2} losses, the shards have {TOKENS - 1} targets" in told(made.write(), "fail")


def test_other_losses_than_the_logs(made):
    np.save(made.run / "nll.npy", made.losses[::-1])
    assert "nll.npy matches the losses of no log" in told(made.write(), "fail")
    del made.result["sha256_nll"]  # as older versions: the same mean is all that can be seen
    assert "RESULT has no sha256_nll" in told(verdicts := made.write(), "warn") and not told(verdicts, "fail")


def zipped() -> bytes:
    content = io.BytesIO()
    np.savez(content, losses=np.zeros(TOKENS - 1, np.float32))
    return content.getvalue()


def headed(header: bytes) -> bytes:
    """A .npy file with that header and no data."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


BROKEN = (zipped(), *map(headed, (
    b"{'a': (", b"", b"[]", b"\xff\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }\n" % 10**30,
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n", b"(" * 9000)))  # fmt: skip


@pytest.mark.parametrize("array", [
    np.zeros((2, 3), np.float32), np.zeros(0, np.float32), np.zeros(5, np.int64), np.array([{}], object),
    b"text", b"", b"PK\x03\x04 no zip", *BROKEN,
])  # fmt: skip
def test_what_holds_no_losses(made, array):
    path = made.run / "nll.npy"
    path.write_bytes(array) if isinstance(array, bytes) else np.save(path, array, allow_pickle=True)
    made.result["sha256_nll"] = sha(path)
    assert "nll.npy" in told(made.write(), "fail")


def test_a_text_that_is_not_at_hand_is_said(made, tmp_path, monkeypatch):
    (made.shards[1]).write_bytes(made.shards[0].read_bytes())
    assert "fineweb_val_000001.bin is missing, or is not the file that was scored" in told(
        made.write(), "warn"
    )
    write_shard(made.shards[1], made.tokens[1234:])
    (tmp_path / "elsewhere").mkdir()
    # now the log's paths lead out of record, repository and working folder
    monkeypatch.chdir(tmp_path / "elsewhere")
    verdicts = made.write()
    assert "not read. Pass --tokenizer FILE" in (words := told(verdicts, "warn")) or "--data FOLDER" in words
    made.options = (made.data, made.data / "tokenizer.model")
    assert "val_bpb" in told(made.write(), "pass") and not told(made.write(), "warn")
    made.result["sha256_shards"] = {"../a/nll.npy": "0" * 64}
    assert "is missing, or is not the file that was scored" in told(made.write(), "warn")


def test_a_missing_file_of_losses_is_said(made):
    (made.run / "nll.npy").unlink()
    assert "no nll.npy" in told(made.write(), "warn")


def trained(path: Path, **options) -> Path:
    """A tokenizer as the field trains them: a dummy prefix, bytes for what has no piece."""
    words = (
        "the cat sat on a mat and the dog ran to it; naïve café at noon in an old town near the sea".split()
    )
    lines = [" ".join(np.random.default_rng(i).permutation(words)) for i in range(60)]
    options = (
        dict(vocab_size=330, byte_fallback=True, hard_vocab_limit=False, minloglevel=2, bos_id=1) | options
    )
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("options", [
    {}, dict(add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False),
], ids=["field", "lossless"])  # fmt: skip
def test_bytes_are_the_fields(tmp_path, options):
    """Against the trainer's table, target by target:
    control tokens before words, bytes, unknown and lone spaces."""
    path = trained(tmp_path / "t.model", **options)
    pieces = spm.SentencePieceProcessor(model_file=str(path))
    size = pieces.vocab_size()
    tokens = np.random.default_rng(1).integers(0, size, 5000).astype("<u2")
    tokens[::7] = 1
    shards = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for shard, part in zip(shards, np.split(tokens, [1777]), strict=True):
        write_shard(shard, part)
    known = int(train_gpt.load_byte_table(str(path), size).count(tokens[:-1], tokens[1:]).sum())
    assert evidence.count_bytes(shards, path) == (4999, known)


@pytest.mark.parametrize("content", [b"", b"\xff", bytes(100)])
def test_a_tokenizer_that_is_none(made, content):
    path = made.data / "t.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="the text cannot be read"):
        evidence.count_bytes(made.shards, path)


def test_a_tokenizer_whose_name_is_not_utf8(made):
    path = made.data / os.fsdecode(b"t\xff.model")
    (made.data / "tokenizer.model").rename(path)
    assert evidence.count_bytes(made.shards, path)[0] == TOKENS - 1


TRAINING = {  # TRAIN_FILES, and whether it is validation text
    "data/fineweb_val_*.bin": True, "data/*.bin": True, "elsewhere/fineweb_val_000001.bin": True,
    "data/copy_*.bin": True, "data/fineweb_train_*.bin": False, "data/fineweb_train_000000.bin": False,
    "": False,
}  # fmt: skip


@pytest.mark.parametrize("pattern, found", TRAINING.items())
def test_training_text_that_is_validation_text(made, pattern, found):
    """By name, and by content under another name, with as many tokens as another shard that is none."""
    shutil.copy(made.shards[0], made.data / "copy_000000.bin")
    write_shard(made.data / "fineweb_train_000000.bin", made.tokens[1234:][::-1])
    made.logged["TRAIN_FILES"] = pattern
    assert ("validation shard" in told(made.write(), "fail", "validation set")) == found


def test_equal_names_in_two_folders_are_two_shards(made):
    """TRAIN_FILES and VAL_FILES of the same pattern in different folders, until the content is the same."""
    for folder, tokens in (("train", made.tokens[::-1]), ("val", made.tokens)):
        (made.data / folder).mkdir()
        write_shard(made.data / folder / "part_0.bin", tokens)
    made.result["sha256_shards"] = {"part_0.bin": sha(made.data / "val/part_0.bin")}
    made.logged |= dict(VAL_FILES="data/val/part_*.bin", TRAIN_FILES="data/train/part_*.bin")
    verdicts = made.write()
    assert not told(verdicts, "fail") and "validation shard" not in told(verdicts, "fail", "validation set")
    for pattern in ("data/val/part_*.bin", "data/*/part_?.bin", "./data/train/../val/*"):
        made.logged["TRAIN_FILES"] = pattern
        assert "are validation shards: part_0.bin" in told(made.write(), "fail", "validation set")
    shutil.copy(made.data / "val/part_0.bin", made.data / "train/part_1.bin")
    made.logged["TRAIN_FILES"] = "data/train/part_*.bin"
    assert "part_1.bin is a validation shard by its content" in told(made.write(), "fail", "validation set")


@pytest.mark.parametrize("pattern", ["", "elsewhere/part_*.bin"])
def test_validation_text_that_is_training_text(made, pattern):
    made.shards[1].rename(made.data / "fineweb_train_000003.bin")
    made.result["sha256_shards"]["fineweb_train_000003.bin"] = made.result["sha256_shards"].pop(
        made.shards[1].name
    )
    made.logged["TRAIN_FILES"] = pattern
    assert "VAL_FILES are training shards: fineweb_train_000003.bin" in told(
        made.write(), "fail", "validation set"
    )
