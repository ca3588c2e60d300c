"""Pack and unpack the stage folder that `gpu_minutes.py` needs on a rented GPU, below 60 MiB with the code.

`prepare` makes it on any machine that has the text or its shards; `unpack` unpacks it on the GPU machine. It
contains

    stage.json           names, token counts and SHA-256 of the files below
    train.bin.xz         one training shard (at most MAX_TRAIN_TOKENS), compressed: 57 M tokens of
                         1,024 take 39 MB
    val_tuning.bin       the validation documents before TUNING_DOCUMENTS, as a shard
    val_reporting.bin    the other validation documents
    tokenizer.model      the tokenizer of all shards
    wheels/*.whl         packages missing from a bare GPU image, for its Python; unpacked beside the data,
                         not installed

Both functions need only the standard library, so a broken torch cannot stop them; `prepare` runs
data/prepare.py if it is given text.
"""

from __future__ import annotations

import json
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from array import array
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))
from files import digest_of  # noqa: E402
from formats import BOS_ID, HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION, shard_header  # noqa: E402

TUNING_DOCUMENTS = 200  # weblab's convention: documents 0 to 199 tune, the rest reports
MAX_TRAIN_TOKENS = 64_000_000
MAX_BYTES = 60 << 20  # repository and folder together
SMALL_TOKENS = dict(train=1_000_000, val=40_000)  # for runs of seconds
# the coders' packages, the fast one first: a bare GPU image lacks both
WHEELS = (
    "constriction",
    "zstandard",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


class StageError(ValueError):
    """User error: a missing or damaged folder, file or wheel. Exit code 2."""


def read_tokens(path: Path, limit: int | None = None) -> array:
    """Return the first `limit` tokens of a shard (None: all). StageError if it is not a shard."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or struct.unpack("<2i", header[:8]) != (SHARD_MAGIC, SHARD_VERSION):
            expected = f"{SHARD_MAGIC} and {SHARD_VERSION}"
            raise StageError(f"{path} is no token shard: magic and version are not {expected}")
        tokens = array("H", file.read() if limit is None else file.read(2 * limit))
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def shard_bytes(tokens: array) -> bytes:
    """A whole shard: header and little-endian uint16 tokens."""
    header = shard_header(len(tokens))
    if sys.byteorder == "big":
        tokens = array("H", tokens)
        tokens.byteswap()
    return header + tokens.tobytes()


def split_documents(tokens: array, count: int) -> tuple[array, array]:
    """Split off the first `count` documents. StageError if either part would be empty."""
    starts = [place for place, token in enumerate(tokens) if token == BOS_ID]
    if not 0 < count < len(starts):
        raise StageError(f"{len(starts)} validation documents cannot be split after {count}")
    return tokens[: starts[count]], tokens[starts[count] :]


# ------------------------------------------------------------------------------------------------------------
# Preparation, on a machine that has the text
# ------------------------------------------------------------------------------------------------------------


def find_shards(folder: Path, split: str) -> list[Path]:
    found = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    if not found:
        raise StageError(f"{folder} has no fineweb_{split}_*.bin. Give a folder made by data/prepare.py.")
    return found


def tokenize(train: Path, val: Path, tokenizer: Path, out: Path) -> None:
    """Tokenize two text files into shards with data/prepare.py."""
    command = [sys.executable, str(ROOT / "data/prepare.py"), str(train), "--val-input", str(val)]
    command += ["--tokenizer", str(tokenizer), "--out", str(out)]
    if subprocess.run(command).returncode:
        raise StageError(f"data/prepare.py failed on {train} and {val}. See its message above.")


def pins() -> dict[str, str]:
    """The version of every package in requirements.txt."""
    return dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))


def fetch_wheels(folder: Path, python: str) -> None:
    """Download the pinned wheels for CPython `python` ("3.12") and x86-64 Linux, as far as that succeeds."""
    for name in WHEELS:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command += [
            "--only-binary=:all:",
            "--python-version",
            python,
            "--implementation",
            "cp",
            "-d",
            str(folder),
        ]
        command += [part for platform in PLATFORMS for part in ("--platform", platform)]
        subprocess.run([*command, f"{name}=={pins()[name]}"])


def tree_bytes() -> int:
    """Return the bytes of the repository's files to be copied: those that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else []
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


def pack(shards: Path, tokenizer: Path, out: Path, tokens: int, tuning: int) -> dict[str, int]:
    """Write the data files of the stage from a folder of shards; return the tokens of each."""
    train = array("H")
    for path in find_shards(shards, "train"):
        train += read_tokens(path, tokens - len(train))
        if len(train) >= tokens:
            break
    val = array("H")
    for path in find_shards(shards, "val"):
        val += read_tokens(path)
    parts = dict(zip(("val_tuning.bin", "val_reporting.bin"), split_documents(val, tuning), strict=True))
    for name, part in parts.items():
        (out / name).write_bytes(shard_bytes(part))
    (out / "train.bin.xz").write_bytes(lzma.compress(shard_bytes(train), preset=6))
    shutil.copyfile(tokenizer, out / "tokenizer.model")
    return {"train.bin.xz": len(train), **{name: len(part) for name, part in parts.items()}}


def prepare(
    out: Path,
    shards: Path | None = None,
    text: tuple[Path, Path] | None = None,
    tokenizer: Path | None = None,
    wheels: Path | None = None,
    python: str = "3.12",
    tokens: int = MAX_TRAIN_TOKENS,
    tuning: int = TUNING_DOCUMENTS,
) -> str:
    """Make the folder `out` from shards, or from a training and a validation text; return a summary.

    `wheels` is a folder to copy wheels from instead of downloading. StageError if something is missing or too
    large.
    """
    if (shards is None) == (text is None):
        raise StageError("--prepare needs --shards DIR, or --train FILE and --val FILE with --tokenizer FILE")
    if text is not None and tokenizer is None:
        raise StageError("--prepare needs --tokenizer FILE with --train and --val")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if text is not None:
            shards = Path(scratch) / "shards"
            tokenize(*text, tokenizer, shards)
        tokenizer = tokenizer or shards / "tokenizer.model"
        if not tokenizer.is_file():
            raise StageError(
                f"{tokenizer} is missing. Give the tokenizer of the shards with --tokenizer FILE."
            )
        counts = pack(shards, tokenizer, out, tokens, tuning)
    carried, tag = out / "wheels", "cp" + python.replace(".", "")
    carried.mkdir(exist_ok=True)
    if wheels is None:
        fetch_wheels(carried, python)
    else:
        for name in WHEELS:
            for path in wheels.glob(f"{name}-*.whl"):
                shutil.copyfile(path, carried / path.name)
    lacking = [
        name for name in WHEELS if not any(fits_python(path, tag) for path in carried.glob(f"{name}-*.whl"))
    ]
    files = {
        name: dict(sha256=digest_of(out / name), tokens=counts.get(name))
        for name in (*counts, "tokenizer.model")
    }
    (out / "stage.json").write_text(json.dumps(dict(version=1, files=files), indent=1))
    size, tree = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()), tree_bytes()
    lines = [f"{name}: {count:,} tokens" for name, count in counts.items()]
    lines += [f"WARNING: {carried} has no wheel of {name}=={pins()[name]} for {tag}. Artifacts need one of "
              f"{' and '.join(WHEELS)}: put it there, unless the GPU machine has it."
              for name in lacking]  # fmt: skip
    lines.append(
        f"{out}: {size / 2**20:.1f} MiB, repository {tree / 2**20:.1f} MiB, limit {MAX_BYTES >> 20} MiB"
    )
    if size + tree > MAX_BYTES:
        raise StageError("\n".join([*lines, "too large together. Lower --tokens."]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Unpacking, on the GPU machine
# ------------------------------------------------------------------------------------------------------------


def read_stage(folder: Path) -> dict:
    """Return stage.json of the folder. StageError names what is missing."""
    again = "Make the folder with `python tests/benchmarks/gpu_minutes.py --prepare FOLDER --shards DIR`."
    if not folder.is_dir():
        raise StageError(f"the stage folder {folder} is missing. {again}")
    if not (folder / "stage.json").is_file():
        raise StageError(f"{folder} has no stage.json. {again}")
    stage = json.loads((folder / "stage.json").read_text())
    missing = [name for name in stage["files"] if not (folder / name).is_file()]
    if missing:
        raise StageError(f"{folder} lacks {', '.join(missing)}. {again}")
    return stage


def fits_python(wheel: Path, tag: str) -> bool:
    """Return whether a wheel's Python tag is `tag` ("cp312"), an older stable ABI, or any Python 3."""
    python, abi = wheel.stem.split("-")[-3:-1]
    return "py3" in python.split(".") or tag in python.split(".") or (abi == "abi3" and python <= tag)


def unpack_wheels(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels for this Python into `site`; return notes about skipped wheels."""
    tag, notes = f"cp{sys.version_info.major}{sys.version_info.minor}", []
    wheels = sorted(folder.glob("*.whl"))
    site.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        if fits_python(wheel, tag):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        else:
            notes.append(f"{wheel.name} does not fit this Python, {tag}")
    return notes if wheels else [f"{folder} has no wheels"]


def write_small(source: Path, target: Path, count: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(shard_bytes(read_tokens(source, count)))


def lay_out(train: Path, report: Path, tuning: Path, tokenizer: Path, work: Path) -> dict[str, str]:
    """Return the paths that the parts use; write small shards, taken from the large ones, for short runs."""
    for split, source in (("train", train), ("val", tuning)):
        write_small(source, work / f"small/fineweb_{split}_000000.bin", SMALL_TOKENS[split])
    shutil.copyfile(tokenizer, work / "small/tokenizer.model")
    paths = dict(train=train, report=report, tuning=tuning, tokenizer=tokenizer, small=work / "small")
    return {name: str(path) for name, path in paths.items()}


def unpack(folder: Path, work: Path) -> tuple[dict[str, str], list[str]]:
    """Unpack the stage under `work`; return its data paths and notes on wheels. StageError if damaged."""
    stage, data = read_stage(folder), work / "data"
    notes = unpack_wheels(folder / "wheels", work / "site")
    for name, entry in stage["files"].items():
        if digest_of(folder / name) != entry["sha256"]:
            raise StageError(
                f"{folder / name} is damaged: its SHA-256 differs from stage.json. Copy it again."
            )
    targets = {split: data / f"{split}/fineweb_{kind}_000000.bin"
               for split, kind in (("train", "train"), ("report", "val"), ("tuning", "val"))}  # fmt: skip
    for target in targets.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(folder / "train.bin.xz") as packed, targets["train"].open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 24)
    shutil.copyfile(folder / "val_tuning.bin", targets["tuning"])
    shutil.copyfile(folder / "val_reporting.bin", targets["report"])
    shutil.copyfile(folder / "tokenizer.model", data / "tokenizer.model")
    return lay_out(
        targets["train"], targets["report"], targets["tuning"], data / "tokenizer.model", work
    ), notes


def embedded(work: Path) -> dict[str, str]:
    """Return the same layout from the demo corpus, with a third of its validation text for tuning."""
    demo = ROOT / "data/demo"
    subprocess.run([sys.executable, str(ROOT / "data/demo.py"), "--out", str(demo)], check=True)
    tokens = read_tokens(demo / "fineweb_val_000000.bin", SMALL_TOKENS["val"])
    documents = tokens.count(BOS_ID)
    parts = split_documents(tokens, documents // 3)
    for split, part in zip(("tuning", "report"), parts, strict=True):
        target = work / f"data/{split}/fineweb_val_000000.bin"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(shard_bytes(part[:4000]))
    report, tuning = (work / f"data/{split}/fineweb_val_000000.bin" for split in ("report", "tuning"))
    return lay_out(demo / "fineweb_train_000000.bin", report, tuning, demo / "tokenizer.model", work)
