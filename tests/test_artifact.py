"""The artifact: against a reader of its documented layout, damaged in every way, and never half-written."""

import json
import pickle
import struct
from dataclasses import fields, replace
from hashlib import sha256

import numpy as np
import pytest
import torch
import zstandard
from test_model import SMALL, random_ids, random_model

import train_gpt
from train_gpt import Config, UserError, encode_artifact, load_model, quantize, read_artifact, write_atomically

CPU = torch.device("cpu")
TOKENIZER = sha256(b"a tokenizer").hexdigest()


def make_blob(config: Config = SMALL) -> bytes:
    model = random_model(config, torch.float32)
    return encode_artifact(config, quantize(model.state_dict(), None, config), TOKENIZER)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "final_model.int6.ptz"
    file.write_bytes(make_blob())
    return file


def parse(blob: bytes) -> tuple[dict, dict[str, tuple[np.ndarray, np.ndarray | None]]]:
    """Header and name -> (codes, scales), by the layout in words: prefix, zstd frame, length, JSON, codes, scales."""
    magic, version, digest, body = blob[:8], blob[8:12], blob[12:44], blob[44:]
    assert magic == b"PGOLFQ6\0" and version == b"\x01\0\0\0" and digest == sha256(body).digest()
    data = zstandard.decompress(body)
    length = int.from_bytes(data[:4], "little")
    header, rest = json.loads(data[4 : 4 + length]), data[4 + length :]
    codes, scales = {}, {}
    for row in header["tensors"]:
        dtype = np.dtype("<f2" if row["scheme"] == "fp16" else "i1")
        size = int(np.prod(row["shape"])) * dtype.itemsize
        codes[row["name"]] = np.frombuffer(rest[:size], dtype).reshape(row["shape"])
        rest = rest[size:]
    for row in header["tensors"]:
        if row["scheme"] != "fp16":
            shape = [*row["shape"][:-1], 1]
            size = int(np.prod(shape)) * 2
            scales[row["name"]] = np.frombuffer(rest[:size], "<f2").reshape(shape)
            rest = rest[size:]
    assert not rest
    return header, {name: (codes[name], scales.get(name)) for name in codes}


# ----------------------------------------------------------------------------------------------------------------------
# Round trip
# ----------------------------------------------------------------------------------------------------------------------

OTHER = replace(SMALL, tie_embeddings=False, num_layers=2, ve_enabled=False, doc_borders="published", rope_dims=0)


@pytest.mark.parametrize("config", [SMALL, OTHER])
def test_round_trip(config, tmp_path):
    model = random_model(config, torch.float32)
    made = quantize(model.state_dict(), None, config)
    blob = encode_artifact(config, made, TOKENIZER)
    (tmp_path / "a").write_bytes(blob)
    header, stored = parse(blob)
    artifact = read_artifact(tmp_path / "a")
    assert list(stored) == list(artifact.state) == list(model.state_dict())
    for record in made:
        codes, scales = stored[record.name]
        np.testing.assert_array_equal(codes, record.codes.numpy())
        values = codes.astype(np.float32)
        if record.scales is not None:
            np.testing.assert_array_equal(scales, record.scales.numpy())
            values = values * scales.astype(np.float32)
        got = artifact.state[record.name]
        assert got.dtype == torch.float32 and got.numpy().tobytes() == values.astype(np.float32).tobytes(), record.name
    assert artifact.tokenizer_sha256 == header["tokenizer_sha256"] == TOKENIZER
    for f in fields(Config):
        if f.metadata["section"] == "model":
            assert getattr(artifact.config, f.name) == getattr(config, f.name)
    read, ids = load_model(artifact, CPU), random_ids(2, 12)
    fresh = train_gpt.GPT(config)
    fresh.load_state_dict({r.name: train_gpt.dequantize(r) for r in made}, strict=True)
    assert torch.equal(read(ids), fresh(ids)) and not torch.equal(read(ids), model(ids))


def test_the_same_weights_make_the_same_bytes():
    assert make_blob() == make_blob()


def test_settings_of_the_model_alone_travel(tmp_path):
    """What does not build the model takes its default, so an artifact scores under the reader's own settings."""
    header, _ = parse(make_blob(replace(SMALL, iterations=7, eval_stride=3)))
    assert "iterations" not in header["config"] and "eval_stride" not in header["config"]
    assert header["config"]["model_dim"] == 24 and header["config"]["doc_borders"] == "respect"


def test_a_model_that_lacks_a_tensor_does_not_load(path):
    artifact = read_artifact(path)
    state = {name: tensor for name, tensor in artifact.state.items() if name != "smear.gate"}
    with pytest.raises(RuntimeError, match=r"smear\.gate"):
        load_model(artifact._replace(state=state), CPU)


# ----------------------------------------------------------------------------------------------------------------------
# Damage
# ----------------------------------------------------------------------------------------------------------------------


def refused(path, blob: bytes) -> bool:
    path.write_bytes(blob)
    try:
        read_artifact(path)
    except UserError as error:
        return str(path) in str(error)
    return False


def test_truncated_and_extended(path):
    blob = path.read_bytes()
    assert not refused(path, blob)
    for length in (0, 1, 7, 8, 12, 43, 44, 45, 100, len(blob) // 2, len(blob) - 1):
        assert refused(path, blob[:length]), length
    assert refused(path, blob + b"\0")


def test_any_flipped_bit(path):
    blob = path.read_bytes()
    positions = [*range(44), *range(44, len(blob), len(blob) // 40), len(blob) - 1]
    for position in positions:
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[position] ^= 1 << bit
            assert refused(path, bytes(damaged)), (position, bit)


@pytest.mark.parametrize(
    "prefix, says",
    [
        (b"PK\x03\x04\0\0\0\0\x01\0\0\0", "magic"),
        (b"PGOLFQ6\0\x02\0\0\0", "version 2"),
        (b"PGOLFQ6\0\0\0\0\x01", "version 16777216"),  # big-endian
    ],
)
def test_another_format(path, prefix, says):
    path.write_bytes(prefix + path.read_bytes()[12:])
    with pytest.raises(UserError, match=says):
        read_artifact(path)


def test_missing_or_a_folder(tmp_path):
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match=str(place)):
            read_artifact(place)


def test_settings_from_another_version(path):
    body = zstandard.decompress(path.read_bytes()[44:])
    (length,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + length])
    header["config"]["lever_of_tomorrow"] = 1
    text = json.dumps(header).encode()
    body = zstandard.compress(struct.pack("<I", len(text)) + text + body[4 + length :])
    path.write_bytes(b"PGOLFQ6\0" + struct.pack("<I", 1) + sha256(body).digest() + body)
    with pytest.raises(UserError, match="lever_of_tomorrow"):
        read_artifact(path)


# ----------------------------------------------------------------------------------------------------------------------
# Writing, and no pickle
# ----------------------------------------------------------------------------------------------------------------------


class HalfWritten:
    """A file that takes half of what it is given and then fails, as a full disk does."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, blob):
        self.file.write(blob[: len(blob) // 2])
        self.file.flush()
        raise OSError(28, "No space left on device")


def fail(*_):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"the artifact of an earlier run"])
def test_a_crash_while_writing_leaves_nothing_new(tmp_path, monkeypatch, moment, before):
    path = tmp_path / "final_model.int6.ptz"
    if before:
        path.write_bytes(before)
    if moment == "write":
        monkeypatch.setattr(train_gpt, "open", lambda *a, **k: HalfWritten(open(*a, **k)), raising=False)
    else:
        monkeypatch.setattr(train_gpt.os, moment, fail)
    with pytest.raises(OSError):
        write_atomically(path, b"new " * 1000)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ([path.name] if before else [])
    assert not before or path.read_bytes() == before
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_reading_needs_no_pickle(path, monkeypatch):
    blob = path.read_bytes()
    for data in (blob, zstandard.decompress(blob[44:])):
        assert not data.startswith((b"\x80", b"PK"))
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError, IndexError)):
            pickle.loads(data)

    def refuse(*_, **__):
        raise AssertionError("pickle was called")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(AssertionError):
        pickle.loads(pickle.dumps(1))
    assert read_artifact(path).config.model_dim == 24


def make_run(folder, config: Config = SMALL, **parts) -> train_gpt.Run:
    """A run with a folder and no more than PARTS, for what needs only those."""
    given = dict(
        config=config,
        device=CPU,
        folder=folder,
        log=train_gpt.RunLog(folder, config.iterations),
        tokenizer_sha256=TOKENIZER,
    )
    return train_gpt.Run(**{**dict.fromkeys(f.name for f in fields(train_gpt.Run)), **given, **parts})


def test_export_writes_a_plain_state_dict_and_counts_every_byte(tmp_path, monkeypatch):
    model = random_model(SMALL, torch.float32)
    sizes = train_gpt.export(make_run(tmp_path), model, None)
    state = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    blob = (tmp_path / "final_model.int6.ptz").read_bytes()
    assert blob == make_blob() and sizes["bytes_model"] == len(blob)
    assert sizes["sha256_artifact"] == sha256(blob).hexdigest()
    source = train_gpt.Path(train_gpt.__file__)
    code = [source, source.with_name("eval_ttt.py")]
    assert sizes["bytes_code"] == sum(len(file.read_bytes()) for file in code if file.exists())
    total = sizes["bytes_code"] + sizes["bytes_model"]
    assert sizes["bytes_total"] == total and sizes["fits"] is True
    log = (tmp_path / "train.log").read_text()
    assert f"Total submission size int6+zstd: {total} bytes" in log and "WARNING" not in log
    for cap, fits in ((total, True), (total - 1, False)):
        monkeypatch.setattr(train_gpt, "SIZE_CAP", cap)
        assert train_gpt.export(make_run(tmp_path), model, None)["fits"] is fits
    assert "over the cap" in (tmp_path / "train.log").read_text()


def test_the_cap_is_decimal():
    assert train_gpt.SIZE_CAP == 16_000_000
