"""The artifact: against a reader of its documented layout, damaged in every way, and never half-written."""

import json
import lzma
import pickle
import struct
import sys
from dataclasses import fields, replace
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
import torch
import zstandard
from test_model import SMALL, random_ids, random_model

import train_gpt
from train_gpt import (
    Config,
    Statistics,
    UserError,
    encode_artifact,
    load_model,
    quantize_state_dict,
    read_artifact,
    write_atomically,
)

CPU = torch.device("cpu")
TOKENIZER = sha256(b"a tokenizer").hexdigest()


def make_blob(config: Config = SMALL) -> bytes:
    model = random_model(config, torch.float32)
    return encode_artifact(config, quantize_state_dict(model.state_dict(), Statistics(), config), TOKENIZER)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "final_model.int6.ptz"
    file.write_bytes(make_blob())
    return file


def signed(body: bytes, coder: bytes = b"zstd") -> bytes:
    """An artifact of this version around BODY, with the right checksum."""
    version = struct.pack("<I", 2)
    return b"PGOLFQ6\0" + version + coder + sha256(version + coder + body).digest() + body


def unpacked(data: bytes, coder: bytes) -> bytes:
    """Unpack the head or another side part: zstd where the codes are zstd, else the lzma of Python."""
    if coder == b"zstd":
        return zstandard.decompress(data)
    return lzma.decompress(
        data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26, "lc": 0}]
    )


def split_body(blob: bytes) -> tuple[dict, bytes, bytes]:
    """Header, the rest of the head, and the coded codes, by the layout in words."""
    body = blob[48:]
    assert blob == signed(body, blob[12:16])
    length = int.from_bytes(body[:4], "little")
    head = unpacked(body[4 : 4 + length], blob[12:16])
    text = int.from_bytes(head[:4], "little")
    return json.loads(head[4 : 4 + text]), head[4 + text :], body[4 + length :]


def join_body(header: dict, rest: bytes, coded: bytes) -> bytes:
    """A body with a zstd head, which older versions wrote with any coder."""
    text = json.dumps(header).encode()
    head = zstandard.compress(struct.pack("<I", len(text)) + text + rest)
    return struct.pack("<I", len(head)) + head + coded


def parse(blob: bytes) -> tuple[dict, dict[str, tuple[np.ndarray, ...]]]:
    """Header and name -> (float16 values,) or (codes, row steps[, column steps]), by the layout in words.

    Prefix; head: JSON, float16 tensors, steps of each tensor, widths of each; then the codes of all
    tensors, stably sorted by the sum of the widths of row and column, zstd frames of which the first 64
    numbers give the lengths.
    """
    header, rest, coded = split_body(blob)

    def take(shape, dtype="i1"):
        nonlocal rest
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        values, rest = np.frombuffer(rest[:size], dtype).reshape(shape), rest[size:]
        return values

    tensors = {row["name"]: (take(row["shape"], "<f2"),) for row in header["tensors"] if not row["coded"]}
    rows = [row for row in header["tensors"] if row["coded"]]
    sides = [([*row["shape"][:-1], 1], [*row["shape"][:-2], 1, row["shape"][-1]]) for row in rows]
    steps = [
        [take(side) for side in both[: 1 + row["columns"]]] for row, both in zip(rows, sides, strict=True)
    ]
    widths = [take(by_row).astype(int) + take(by_column) for by_row, by_column in sides]
    assert not rest
    widths = np.concatenate([np.clip(width + 24, 0, 63).flatten() for width in widths])
    ends = 256 + np.cumsum([0, *struct.unpack_from("<64I", coded)])
    assert ends[-1] == len(coded)
    frames = [zstandard.decompress(coded[low:high]) for low, high in pairwise(ends)]
    assert [len(frame) for frame in frames] == np.bincount(widths, minlength=64).tolist()
    assert header["sha256_codes"] == sha256(b"".join(frames)).hexdigest()
    codes = np.empty(len(widths), np.int8)
    codes[np.argsort(widths, kind="stable")] = np.frombuffer(b"".join(frames), np.int8)
    ends = np.cumsum([0, *(np.prod(row["shape"]) for row in rows)])
    for row, step, (low, high) in zip(rows, steps, pairwise(ends), strict=True):
        tensors[row["name"]] = (codes[low:high].reshape(row["shape"]), *step)
    return header, {row["name"]: tensors[row["name"]] for row in header["tensors"]}


# ------------------------------------------------------------------------------------------------------------
# Round trip
# ------------------------------------------------------------------------------------------------------------

OTHER = replace(
    SMALL, tie_embeddings=False, num_layers=2, ve_enabled=False, doc_borders="published", rope_dims=0
)


@pytest.mark.parametrize("config", [SMALL, OTHER])
def test_round_trip(config, tmp_path):
    model = random_model(config, torch.float32)
    made = quantize_state_dict(model.state_dict(), Statistics(), config)
    blob = encode_artifact(config, made, TOKENIZER)
    (tmp_path / "a").write_bytes(blob)
    header, stored = parse(blob)
    artifact = read_artifact(tmp_path / "a")
    assert list(stored) == list(artifact.state) == list(model.state_dict())
    for record in made:
        codes, *steps = stored[record.name]
        np.testing.assert_array_equal(codes, record.codes.numpy())
        values = codes.astype(np.float32)
        assert (
            len(steps) == (record.row_scale is not None) and record.col_scale is None and not record.trellis
        )
        if steps:
            np.testing.assert_array_equal(steps[0], record.row_scale.numpy())
            values = values * (2.0 ** (steps[0].astype(np.float64) / 8)).astype(np.float32)
        got = artifact.state[record.name]
        assert got.dtype == torch.float32 and got.numpy().tobytes() == values.astype(np.float32).tobytes(), (
            record.name
        )
    assert artifact.tokenizer_sha256 == header["tokenizer_sha256"] == TOKENIZER
    for f in fields(Config):
        if f.name in train_gpt.sections()["model"]:
            assert getattr(artifact.config, f.name) == getattr(config, f.name)
    read, ids = load_model(artifact, CPU), random_ids(2, 12)
    fresh = train_gpt.GPT(config)
    fresh.load_state_dict({r.name: train_gpt.dequantize(r) for r in made}, strict=True)
    assert torch.equal(read(ids), fresh(ids)) and not torch.equal(read(ids), model(ids))


CODERS = ("zstd", "ans")


def statistics_of(model) -> Statistics:
    batches = [(random_ids(4, 16, seed), random_ids(4, 16, seed + 1)) for seed in (1, 2)]
    hessians = train_gpt.collect_hessians(model, [ids for ids, _ in batches])
    return Statistics(hessians, train_gpt.collect_gradients(model, batches))


def two_sided_blob(coder: str, trellis: bool) -> tuple[bytes, list[train_gpt.QuantizedTensor]]:
    config = replace(SMALL, quant_steps="two_sided", quant_loss=0.05, quant_trellis=trellis, compressor=coder)
    model = random_model(config, torch.float32)
    records = quantize_state_dict(model.state_dict(), statistics_of(model), config)
    return encode_artifact(config, records, TOKENIZER), records


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("trellis", [None, False, True], ids=["one step a row", "two-sided", "trellis"])
def test_every_coder_gives_back_every_tensor(tmp_path, coder, trellis):
    if trellis is None:
        config = replace(SMALL, compressor=coder)
        records = quantize_state_dict(random_model(config, torch.float32).state_dict(), Statistics(), config)
        blob = encode_artifact(config, records, TOKENIZER)
    else:
        blob, records = two_sided_blob(coder, trellis)
    assert blob[12:16] == coder.encode().ljust(4, b"\0")
    (tmp_path / "a").write_bytes(blob)
    artifact = read_artifact(tmp_path / "a")
    assert list(artifact.state) == [record.name for record in records]
    for record in records:
        assert record.trellis == (trellis is True and record.row_scale is not None)
        assert (record.col_scale is not None) == (trellis is not None and record.row_scale is not None)
        got, expected = artifact.state[record.name], train_gpt.dequantize(record)
        assert got.dtype == torch.float32 and torch.equal(got, expected), record.name
    header, found = train_gpt.decode_tensors(blob[48:], coder)
    for record, other in zip(records, found, strict=True):
        for one, two in zip(record, other, strict=True):
            assert (
                torch.equal(one, two) and one.dtype == two.dtype
                if isinstance(one, torch.Tensor)
                else one == two
            )
    ids = random_ids(2, 12)
    fresh = train_gpt.GPT(header["config"])
    fresh.load_state_dict({r.name: train_gpt.dequantize(r) for r in records}, strict=True)
    assert torch.equal(load_model(artifact, CPU)(ids), fresh(ids))


def test_the_coders_differ_in_bytes_alone():
    blobs = {coder: two_sided_blob(coder, True)[0] for coder in CODERS}
    heads = {coder: split_body(blob)[:2] for coder, blob in blobs.items()}
    assert heads["ans"] == heads["zstd"] and len(blobs["ans"]) != len(blobs["zstd"])


def test_two_sided_steps_are_in_the_layout_in_words():
    blob, records = two_sided_blob("zstd", True)
    _, stored = parse(blob)
    for record in records:
        if record.row_scale is not None:
            codes, rows, columns = stored[record.name]
            np.testing.assert_array_equal(codes, record.codes.numpy())
            np.testing.assert_array_equal(rows, record.row_scale.numpy())
            np.testing.assert_array_equal(columns, record.col_scale.numpy())


def test_the_same_weights_make_the_same_bytes():
    assert make_blob() == make_blob()


def test_settings_of_the_model_alone_travel(tmp_path):
    """Settings that do not build the model take their defaults, so the reader's own settings score it."""
    header, _ = parse(make_blob(replace(SMALL, iterations=7, eval_stride=3)))
    assert "iterations" not in header["config"] and "eval_stride" not in header["config"]
    assert header["config"]["model_dim"] == 24 and header["config"]["doc_borders"] == "respect"


def test_a_model_that_lacks_a_tensor_does_not_load(path):
    artifact = read_artifact(path)
    state = {name: tensor for name, tensor in artifact.state.items() if name != "smear.gate"}
    with pytest.raises(RuntimeError, match=r"smear\.gate"):
        load_model(artifact._replace(state=state), CPU)


# ------------------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------------------


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
    for length in (0, 1, 7, 8, 12, 16, 47, 48, 49, 52, 100, len(blob) // 2, len(blob) - 1):
        assert refused(path, blob[:length]), length
    assert refused(path, blob + b"\0")


def test_any_flipped_bit(path):
    blob = path.read_bytes()
    positions = [*range(52), *range(52, len(blob), len(blob) // 40), len(blob) - 1]
    for position in positions:
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[position] ^= 1 << bit
            assert refused(path, bytes(damaged)), (position, bit)


def damage(blob: bytes, generator: np.random.Generator) -> bytes:
    """BLOB with a bit flipped, a byte replaced, inserted or left out,
    two exchanged, or cut off at a random place."""
    place, kind, byte = (
        int(generator.integers(len(blob))),
        int(generator.integers(6)),
        int(generator.integers(1, 256)),
    )
    before, here, after = blob[:place], blob[place], blob[place + 1 :]
    if kind == 0:
        return before + bytes([here ^ 1 << byte % 8]) + after
    if kind == 1:
        return before + bytes([here ^ byte]) + after
    if kind == 2:
        return before + bytes([byte, here]) + after
    if kind == 3:
        return before + after
    if kind == 4:
        return before
    return before + after[:1] + bytes([here]) + after[1:]


@pytest.mark.parametrize("coder", CODERS)
def test_damage_of_any_kind_at_any_place_is_refused_with_the_path(tmp_path, coder):
    """Half of the places in the first 600 bytes: prefix, head and the lengths of frames."""
    blob, _ = two_sided_blob(coder, True)
    generator, path = np.random.default_rng(1), tmp_path / "a"
    assert not refused(path, blob)
    for turn in range(300):
        damaged = damage(blob[:600], generator) + blob[600:] if turn % 2 else damage(blob, generator)
        assert damaged == blob or refused(path, damaged), turn


@pytest.mark.parametrize("coder", CODERS)
def test_codes_that_are_not_those_that_went_in_are_refused(tmp_path, coder):
    """With the right checksum around them: as another version of a coder might decode them."""
    blob, records = two_sided_blob(coder, True)
    coded = [record for record in records if record.row_scale is not None]
    order, counts = train_gpt.lay_out([train_gpt.code_widths(record.codes) for record in coded])
    codes = np.concatenate([record.codes.flatten().numpy() for record in coded])[order]
    header, rest, data = split_body(blob)
    assert data == train_gpt.encode_codes(codes, counts, coder)
    place = len(codes) // 2
    codes[place] += 1 if codes[place] < 127 else -1
    others = train_gpt.encode_codes(codes, counts, coder)
    path = tmp_path / "a"
    path.write_bytes(signed(join_body(header, rest, data), blob[12:16]))
    read_artifact(path)
    path.write_bytes(signed(join_body(header, rest, others), blob[12:16]))
    with pytest.raises(UserError, match="codes"):
        read_artifact(path)


def test_another_path_through_an_ans_stream_is_refused(tmp_path):
    """Any bytes decode to some codes: the hash in the head tells.
    The last bits of the first word mean nothing."""
    blob, _ = two_sided_blob("ans", True)
    header, rest, data = split_body(blob)
    (side,) = struct.unpack_from("<I", data)
    for place in range(4 + side + 4, len(data), 97):
        altered = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        (tmp_path / "a").write_bytes(signed(join_body(header, rest, altered), b"ans\0"))
        with pytest.raises(UserError, match="codes"):
            read_artifact(tmp_path / "a")


def test_a_coder_that_is_not_there_is_named(tmp_path, monkeypatch):
    blob, _ = two_sided_blob("ans", False)
    (tmp_path / "a").write_bytes(blob)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match=r"constriction==\d"):
        read_artifact(tmp_path / "a")


@pytest.mark.parametrize("coder, package", [("zstd", "zstandard"), ("ans", "constriction")])
def test_each_coder_needs_its_own_package_and_no_other(coder, package, tmp_path, monkeypatch):
    for name in {"zstandard", "constriction"} - {package}:
        monkeypatch.setitem(sys.modules, name, None)
    blob, _ = two_sided_blob(coder, True)
    (tmp_path / "a").write_bytes(blob)
    read_artifact(tmp_path / "a")


def test_a_zstd_head_of_an_older_version_is_read(tmp_path):
    """Both the head and the tables of the ans coder were packed by zstd."""
    blob, _ = two_sided_blob("ans", True)
    header, rest, data = split_body(blob)
    (side,) = struct.unpack_from("<I", data)
    tables = zstandard.compress(unpacked(data[4 : 4 + side], b"ans\0"))
    data = struct.pack("<I", len(tables)) + tables + data[4 + side :]
    (tmp_path / "new").write_bytes(blob)
    (tmp_path / "old").write_bytes(signed(join_body(header, rest, data), blob[12:16]))
    new, old = read_artifact(tmp_path / "new"), read_artifact(tmp_path / "old")
    assert new.config == old.config and new.state.keys() == old.state.keys()
    assert all(torch.equal(new.state[name], tensor) for name, tensor in old.state.items())


@pytest.mark.parametrize(
    "prefix, says",
    [
        (b"PK\x03\x04\0\0\0\0\x01\0\0\0", "magic"),
        (b"PGOLFQ6\0\x01\0\0\0", "version 1"),
        (b"PGOLFQ6\0\x03\0\0\0", "version 3"),
        (b"PGOLFQ6\0\0\0\0\x02", "version 33554432"),  # big-endian
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


@pytest.mark.parametrize("coder", [b"lzma", b"\xff\0\0\0"])
def test_a_coder_of_another_version(path, coder):
    path.write_bytes(signed(path.read_bytes()[48:], coder))
    with pytest.raises(UserError, match="of another version; this one reads zstd, ans"):
        read_artifact(path)


def test_settings_from_another_version(path):
    header, rest, coded = split_body(path.read_bytes())
    header["config"]["lever_of_tomorrow"] = 1
    path.write_bytes(signed(join_body(header, rest, coded)))
    with pytest.raises(UserError, match="lever_of_tomorrow"):
        read_artifact(path)


# ------------------------------------------------------------------------------------------------------------
# Writing, and no pickle
# ------------------------------------------------------------------------------------------------------------


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
    length = int.from_bytes(blob[48:52], "little")
    for data in (blob, zstandard.decompress(blob[52 : 52 + length]), blob[52 + length :]):
        assert not data.startswith((b"\x80", b"PK"))
        with pytest.raises(
            (pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError, IndexError)
        ):
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
        log=train_gpt.RunLog(folder),
        tokenizer_sha256=TOKENIZER,
    )
    return train_gpt.Run(**{**dict.fromkeys(f.name for f in fields(train_gpt.Run)), **given, **parts})


def make_progress(run, model, clock, rates, trained: float | None = None) -> train_gpt.Progress:
    """The progress of a run at its beginning, or after training to TRAINED seconds."""
    progress = train_gpt.Progress(run, model, rates, clock, train_gpt.StopSignals({}), lambda: 0.0)
    progress.done = {} if trained is None else {"train": [1, trained]}
    return progress


def test_export_writes_a_plain_state_dict_and_counts_every_byte(tmp_path, monkeypatch):
    model = random_model(SMALL, torch.float32)
    sizes = train_gpt.export(make_run(tmp_path), model, Statistics())
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
        assert train_gpt.export(make_run(tmp_path), model, Statistics())["fits"] is fits
    assert "over the cap" in (tmp_path / "train.log").read_text()
