"""Turn any text into a tokenizer, token shards and a manifest.

    python data/prepare.py INPUT [INPUT ...] --out DIR
    python data/prepare.py INPUT [INPUT ...] --out DIR --case-ops
    python data/prepare.py --overlap FOLDER

Inputs are .txt files (one document each), .jsonl files (one JSON object per line, its text under --text-key),
plain or compressed (.gz, .xz, .zst), or folders of such files. Written to DIR:

    tokenizer.model         SentencePiece BPE, trained on a sample of the training documents, or the one given
    fineweb_train_%06d.bin  256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then
    fineweb_val_%06d.bin    little-endian uint16 tokens; BOS (id 1) precedes each document, nothing follows it
    manifest.json           counts and hashes of all the above; written last: if it exists, all is complete

With --case-ops the tokens are those of the text in lower case with operators for its capitals
(data/case_ops.py), and each validation shard has a sidecar with the bytes of the original text that each of
its tokens stands for:

    fineweb_val_bytes_%06d.bin  the header of the shard, then one little-endian uint16 per token

The last command counts the validation documents of a folder that occur in its training shards
(count_overlap).

The input is read twice: the first pass checks, counts and samples all of it, the second encodes
it. Memory use does not depend on the length of the input, and the output does not depend on the
number of worker processes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import heapq
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import stat
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import case_ops
import numpy as np
import sentencepiece as spm
from cores import core_count
from files import (
    InputError,
    atomic_file,
    decoding,
    digest_of,
    escaped,
    exit_code,
    open_input,
    read_file,
    read_json,
    write_json,
)
from formats import BOS_ID, HEADER_BYTES, HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, shard_header
from tqdm import tqdm

SHARD_NAME, SHARD_FILE = "fineweb_{split}_{index:06d}.bin", r"fineweb_(train|val)_\d+\.bin"
MANIFEST_VERSION = 1
MAX_TOKENS = (1 << 31) - 1  # of a shard, whose header has 32 bits for them
PAD_ID, EOS_ID, UNK_ID = 0, 2, 3
SPACE = "\u2581"  # SentencePiece writes a space as this character
SPLITS = ("train", "val")

# Limits of the input, so that a small file cannot take all memory, or hours: 3 GB for each worker.
FORMATS = {".txt": 1 << 27, ".jsonl": 1 << 26}  # bytes of a document: a whole file, a line
CASE_OPS_BYTES = 1 << 26  # of a document under --case-ops, which keeps the bytes of each token
LOSSY_BYTES = 1 << 23  # of a document for a tokenizer that changes text: it cannot be encoded in parts
MODEL_BYTES = 1 << 25  # of a tokenizer
WINDOW_BYTES = 1 << 27  # memory for decompression, zstd's own limit without --long=31
EXPANSION, ALWAYS_READ = 1000, 1 << 26  # a file may expand to 1,000 times its bytes and 64 MiB

# A smaller validation split gets a warning. The demo's 51 documents and 161,848 bytes vary by 0.014 bpb over
# seeds; with fewer than 20 documents, analyze.py clusters errors by blocks of text instead.
TRUSTED = {"documents": 20, "bytes": 100_000}

OPENERS: dict[str, Callable[[Path], BinaryIO]] = {
    "": open_input,
    ".gz": lambda path: open_gz(path),
    ".xz": lambda path: open_xz(path),
    ".zst": lambda path: open_zst(path),
}
BYTE_ORDER_MARK = "\ufeff".encode()


@dataclass(frozen=True)
class Job:
    """The inputs, output folder and split of one preparation.

    Validation documents are `val_inputs` if given, else the first `val_docs` documents if given, else the
    fraction `val_fraction` of the documents, selected by a hash of their text so that equal documents go to
    the same split.
    """

    inputs: tuple[Path, ...]
    out: Path
    name: str
    vocab_size: int = 1024
    tokenizer: Path | None = None
    val_inputs: tuple[Path, ...] = ()
    val_docs: int | None = None
    val_fraction: float = 0.02
    text_key: str = "text"
    shard_tokens: int = 100_000_000
    workers: int = 1
    tokenizer_sample_bytes: int = 64_000_000
    seed: int = 1337
    overwrite: bool = False
    case_ops: bool = False
    document_bytes: float = math.inf  # a further limit beside FORMATS
    entries: dict[str, Any] = field(default_factory=dict)  # added to the manifest

    def __post_init__(self) -> None:
        if not 320 <= self.vocab_size <= 65536:
            raise InputError(f"--vocab-size must be between 320 and 65536, not {self.vocab_size}")
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"--val-fraction must be at least 0 and below 1, not {self.val_fraction}")
        if self.val_docs is not None and self.val_docs < 0:
            raise InputError(f"--val-docs must be at least 0, not {self.val_docs}")
        for option, most in (
            ("shard_tokens", MAX_TOKENS),
            ("workers", 1024),
            ("tokenizer_sample_bytes", 1 << 40),
        ):
            if not 1 <= getattr(self, option) <= most:
                raise InputError(
                    f"--{option.replace('_', '-')} must be between 1 and {most}, not {getattr(self, option)}"
                )

    @property
    def wants_validation(self) -> bool:
        """Whether this job asks for any validation documents."""
        if self.val_inputs or self.val_docs is not None:
            return bool(self.val_inputs or self.val_docs)
        return self.val_fraction > 0


# ------------------------------------------------------------------------------------------------------------
# Documents
# ------------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """A text, its UTF-8 bytes, and the split it belongs to."""

    split: str
    text: str
    utf8: bytes


def import_zstandard() -> Any:
    """Return the zstandard module, which only .zst files need. InputError if it cannot be imported."""
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            f".zst files need the package zstandard: {error}. Install it (pip install zstandard) or "
            "decompress them."
        ) from None
    return zstandard


class FrameReader(io.RawIOBase):
    """Decompressed content of a file of one or more frames (zst), streams (xz) or members (gz).

    `new_frame` returns a decompressor, which raises `error` for damaged data. Between and after frames there
    may be zero bytes, their number a multiple of `padding`; 0: none. Raises EOFError if the last frame is
    truncated, OSError if a frame is damaged or the file expands beyond EXPANSION. The readers of the packages
    silently return only the beginning of such a file: zstandard's if the last frame is truncated, lzma's if
    padding or a damaged header follows a stream.
    """

    CHUNK = 1 << 12  # compressed bytes per read; they expand to at most 7,000 times as much in memory

    def __init__(
        self, path: Path, new_frame: Callable[[], Any], error: type[Exception], padding: int = 0
    ) -> None:
        self._file, self._new_frame, self._error, self._multiple = open_input(path), new_frame, error, padding
        self._left = EXPANSION * os.fstat(self._file.fileno()).st_size + ALWAYS_READ
        self._frame: Any = None  # decompressor of the current frame
        self._compressed, self._plain = b"", memoryview(b"")  # a slice of a view copies nothing
        self._frames = self._padding = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(self.CHUNK)
            if not self._compressed and self._frame is None:
                self._check_padding()
                return 0
            if not self._compressed:
                raise EOFError("the compressed file ends before its end-of-stream marker")
            self._decompress()
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _check_padding(self) -> None:
        if self._padding and self._padding % self._multiple:
            raise OSError(f"{self._padding} zero bytes after a stream, not a multiple of {self._multiple}")

    def _decompress(self) -> None:
        if self._frame is None:
            is_padded = self._multiple and self._frames
            content = self._compressed.lstrip(b"\0") if is_padded else self._compressed
            self._padding += len(self._compressed) - len(content)
            self._compressed = content
            if not content:
                return
            self._check_padding()
            self._frame, self._padding, self._frames = self._new_frame(), 0, self._frames + 1
        try:
            self._plain = memoryview(self._frame.decompress(self._compressed))
        except self._error as error:
            raise OSError(f"{error} (frame {self._frames})") from error
        self._left -= len(self._plain)
        if self._left < 0:
            raise OSError(f"it expands to more than {EXPANSION} times its size. Decompress it yourself.")
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame

    def close(self) -> None:
        self._file.close()
        super().close()


def open_frames(*arguments: Any) -> BinaryIO:
    """Open a compressed file; arguments as for FrameReader."""
    return io.BufferedReader(FrameReader(*arguments), 1 << 20)


def open_gz(path: Path) -> BinaryIO:
    """Open a .gz file of one or more members, with or without zero bytes between and after them."""
    return open_frames(path, partial(zlib.decompressobj, 16 + zlib.MAX_WBITS), zlib.error, 1)


def open_xz(path: Path) -> BinaryIO:
    """Open an .xz file of one or more streams, with or without padding between and after them."""
    memory = WINDOW_BYTES + (1 << 20)  # a dictionary, and the decoder itself
    return open_frames(path, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memory), lzma.LZMAError, 4)


def open_zst(path: Path) -> BinaryIO:
    """Open a .zst file of one or more frames."""
    zstd = import_zstandard()
    decompressor = zstd.ZstdDecompressor(max_window_size=WINDOW_BYTES)
    return open_frames(path, decompressor.decompressobj, zstd.ZstdError)


@dataclass
class LeftOut:
    """Skipped input: `files` with the reason, empty documents, blank lines of .jsonl."""

    files: list[tuple[Path, str]] = field(default_factory=list)
    empty_documents: int = 0
    blank_lines: int = 0

    def describe(self) -> str:
        """Return one line per kind of skipped input, with the file names; empty if nothing was skipped."""
        counts = ((self.empty_documents, "empty documents"), (self.blank_lines, "blank lines"))
        lines = [f"note: {count} {what} skipped" for count, what in counts if count]
        if self.files:
            names = [f"{escaped(str(path))} ({reason})" for path, reason in self.files[:50]]
            more = f", and {len(self.files) - 50} more" if len(self.files) > 50 else ""
            lines.append(f"note: {len(self.files)} files or links skipped: {', '.join(names)}{more}")
        return "\n".join(lines)

    def counts(self) -> dict[str, int]:
        """Return the entry of the manifest."""
        return {
            "files": len(self.files),
            "empty_documents": self.empty_documents,
            "blank_lines": self.blank_lines,
        }


def split_suffix(path: Path) -> tuple[str, str] | None:
    """Return (format, compression) of a file name, such as (".jsonl", ".gz"), or None if unsupported."""
    name = Path(path.name.lower())
    compression = name.suffix if name.suffix in OPENERS else ""
    kind = Path(name.stem if compression else name).suffix
    return (kind, compression) if kind in FORMATS else None


def list_inputs(paths: Iterable[Path], left_out: LeftOut | None = None) -> list[Path]:
    """Return the input files in order: files as given; folders recursively, sorted, following links.

    Skipped entries of a folder are added to `left_out`, including a link to a file that is read
    anyway. Raises InputError for an input that does not exist, cannot be read, has an unsupported
    extension, or is given twice.
    """
    left_out = left_out or LeftOut()
    found: list[tuple[Path, bool]] = []
    for path in paths:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file or folder") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
        if stat.S_ISDIR(mode):
            files = sorted(walk_folder(path, left_out))
            if not files:
                raise InputError(f"{path}: no .txt or .jsonl file (plain, .gz, .xz, .zst) in this folder")
            found += files
        elif split_suffix(path) is None:
            raise InputError(
                f"{path}: unsupported extension; supported are .txt and .jsonl, plain or .gz, .xz, .zst"
            )
        elif not stat.S_ISREG(mode):
            raise InputError(
                f"{path}: not a regular file; the input is read twice. Write its content to a file."
            )
        else:
            found.append((path, False))
    targets = [path.resolve() for path, _ in found]
    counts = Counter(target for target, (_, linked) in zip(targets, found, strict=True) if not linked)
    if repeated := [target for target, count in counts.items() if count > 1]:
        raise InputError(f"{repeated[0]}: given more than once")
    files = []
    for target, (path, linked) in zip(targets, found, strict=True):
        if linked and counts[target]:
            left_out.files.append((path, "link to a file that is already an input"))
        else:
            files.append(path)
            counts[target] += linked
    if any(split_suffix(path)[1] == ".zst" for path in files):
        import_zstandard()
    return files


def walk_folder(root: Path, left_out: LeftOut) -> Iterator[tuple[Path, bool]]:
    """Yield each input file below a folder and whether a link led to it; add the others to `left_out`.

    A folder is read once, before any link to it. Raises InputError for folders and links that cannot be read.
    """
    entered = set(root.resolve().parents)
    folders, links = [(root, False)], []
    while folders or links:
        folder, linked = folders.pop() if folders else links.pop()
        if folder.resolve() in entered:
            left_out.files.append((folder, "folder that was already read, or link back into the input"))
            continue
        entered.add(folder.resolve())
        try:
            paths = sorted(folder.iterdir(), reverse=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be read: {error.strerror}") from error
        for path in paths:
            try:
                mode = path.stat().st_mode
            except OSError as error:
                if split_suffix(path) or not path.suffix:  # a text file, or possibly a folder of text files
                    raise InputError(
                        f"{path}: cannot be read: {error.strerror}. Fix or remove it."
                    ) from error
                left_out.files.append((path, error.strerror))
                continue
            if stat.S_ISDIR(mode):
                (links if path.is_symlink() else folders).append((path, linked or path.is_symlink()))
            elif not split_suffix(path):
                left_out.files.append((path, "unsupported extension"))
            elif not stat.S_ISREG(mode):
                left_out.files.append((path, "not a regular file"))
            else:
                yield path, linked or path.is_symlink()


def read_texts(
    path: Path, text_key: str = "text", left_out: LeftOut | None = None, limit: float = math.inf
) -> Iterator[tuple[str, bytes]]:
    """Yield (text, UTF-8 bytes) of every document of one input file, including empty ones.

    Blank lines of .jsonl are counted in `left_out`. Byte order marks before a line are dropped: Windows
    programs write them, and concatenating files leaves them in the middle. Raises InputError, with file name
    and line, for text that is not UTF-8, a line that is not a JSON object with exactly one string under
    `text_key`, a document of more bytes than `limit` or FORMATS, and a damaged, truncated or empty compressed
    file.
    """
    left_out = left_out or LeftOut()
    kind, compression = split_suffix(path) or ("", "")
    limit = min(limit, FORMATS[kind])
    too_long = f"a document of more than {limit:,} bytes. Split it or leave it out."
    try:
        if compression and path.stat().st_size == 0:  # FrameReader would return an empty text
            raise EOFError("0 bytes, not a compressed file")
        with OPENERS[compression](path) as stream:
            if kind == ".txt":
                if len(content := stream.read(limit + 1)) > limit:
                    raise InputError(f"{path}: {too_long}")
                yield _decode(content, path, 1), content
                return
            for number, line in enumerate(iter(partial(stream.readline, limit + 2), b""), 1):
                if len(line) > limit + 1:
                    raise InputError(f"{path}, line {number}: {too_long}")
                line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    yield _parse_line(line, path, number, text_key)
                else:
                    left_out.blank_lines += 1
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _decode(content: bytes, path: Path, first_line: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}, line {line}: not valid UTF-8 ({error.reason}, byte {error.start})"
        ) from error


def _parse_line(line: bytes, path: Path, number: int, text_key: str) -> tuple[str, bytes]:
    content = _decode(line, path, number)
    with decoding(f"{path}, line {number}", "JSON"):
        record = json.loads(content)
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{path}, line {number}: no string under the key "{text_key}" (see --text-key)')
    if content.count(f'"{text_key}"') > 1:
        pairs = json.loads(content, object_pairs_hook=list)
        if sum(key == text_key for key, _ in pairs) > 1:  # json.loads keeps the last one
            raise InputError(f'{path}, line {number}: the key "{text_key}" occurs more than once')
    try:
        return text, text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"{path}, line {number}: lone surrogate U+{code:04X} at character {error.start}"
        ) from error


def read_documents(job: Job, left_out: LeftOut | None = None) -> Iterator[Document]:
    """Yield every nonempty document with its split; skipped input is added to `left_out`."""
    left_out = left_out or LeftOut()
    for paths in (job.val_inputs, job.inputs):
        count = 0
        for path in list_inputs(paths, left_out):
            before = count
            for text, utf8 in read_texts(path, job.text_key, left_out, job.document_bytes):
                if utf8:
                    split = "val" if paths is job.val_inputs else _choose_split(job, count, utf8)
                    yield Document(split, text, utf8)
                    count += 1
                else:
                    left_out.empty_documents += 1
            if count == before:
                left_out.files.append((path, "no text"))


def _choose_split(job: Job, index: int, utf8: bytes) -> str:
    if job.val_inputs:
        return "train"
    if job.val_docs is not None:
        return "val" if index < job.val_docs else "train"
    digest = hashlib.sha256(f"{job.seed}\n".encode() + utf8).digest()
    return "val" if int.from_bytes(digest[:8], "big") < job.val_fraction * 2**64 else "train"


# ------------------------------------------------------------------------------------------------------------
# Survey: the first pass
# ------------------------------------------------------------------------------------------------------------


class Sampler:
    """Uniform random sample of text passages, bounded in bytes and deterministic given texts and seed."""

    PASSAGE = 16_000  # characters; SentencePiece's BPE trainer fails on a word of 65,536 or more

    def __init__(self, budget: int, seed: int) -> None:
        self._budget, self._bytes, self._index = budget, 0, 0
        self._random = random.Random(seed)
        self._heap: list[tuple[float, int, str]] = []  # (-draw, ...): the largest draw on top

    def add(self, text: str) -> None:
        """Offer a text to the sample."""
        for start in range(0, len(text), self.PASSAGE):
            draw = self._random.random()
            self._index += 1
            if self._bytes >= self._budget and draw >= -self._heap[0][0]:
                continue
            passage = text[start : start + self.PASSAGE]
            heapq.heappush(self._heap, (-draw, self._index, passage))
            self._bytes += len(passage.encode())
            while len(self._heap) > 1 and self._bytes - len(self._heap[0][2].encode()) >= self._budget:
                self._bytes -= len(heapq.heappop(self._heap)[2].encode())

    def passages(self) -> list[str]:
        """Return the sampled passages in text order."""
        return [passage for _, _, passage in sorted(self._heap, key=lambda entry: entry[1])]


@dataclass
class Survey:
    """Result of the first pass: documents and UTF-8 bytes per split, a training sample, skipped input."""

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: LeftOut = field(default_factory=LeftOut)
    sample: list[str] = field(default_factory=list)


def survey(job: Job) -> Survey:
    """Read, check and count the whole input; sample the training documents if a tokenizer must be trained.

    Raises InputError if the input is damaged or empty, or if one split would have no documents.
    """
    found = Survey()
    sampler = Sampler(job.tokenizer_sample_bytes, job.seed)
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None) as progress:
        for document in read_documents(job, found.left_out):
            found.documents[document.split] += 1
            found.text_bytes[document.split] += len(document.utf8)
            if document.split == "train" and job.tokenizer is None:
                sampler.add(case_ops.encode(document.text) if job.case_ops else document.text)
            progress.update(len(document.utf8))
    _check_split(job, found)
    found.sample = sampler.passages()
    return found


def _check_split(job: Job, found: Survey) -> None:
    total = sum(found.documents.values())
    if total == 0:
        raise InputError(f"the input contains no text: {found.left_out.empty_documents} documents, all empty")
    if found.documents["train"] == 0:
        raise InputError(
            f"no training documents: all {total} are validation; lower --val-docs or --val-fraction"
        )
    if found.documents["val"] == 0 and job.wants_validation:
        raise InputError(
            f"no validation documents: all {total} are training; use --val-docs, a larger --val-fraction or "
            "--val-input (--val-fraction 0 for a training split only)"
        )


def warn_of_split(job: Job, found: Survey) -> str:
    """Return a warning if the validation split is too small to trust its score; empty if it is not."""
    has = {"documents": found.documents["val"], "bytes": found.text_bytes["val"]}
    if not job.wants_validation or all(has[unit] >= least for unit, least in TRUSTED.items()):
        return ""
    documents, size = sum(found.documents.values()), sum(found.text_bytes.values())
    return (
        f"WARNING: the validation split has {has['documents']:,} of {documents:,} documents and "
        f"{has['bytes']:,} of {size:,} bytes: with fewer than {TRUSTED['documents']} documents or "
        f"{TRUSTED['bytes']:,} bytes, scores are too noisy to compare. Use a larger --val-fraction or "
        "--val-docs, or more text with --val-input."
    )


# ------------------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------------------

SEGMENT = 1 << 16  # characters per SentencePiece call, which takes about 100 bytes of memory per character
HOSTILE_TEXT = (
    " \t  leading, double  and trailing spaces \r\n\n\n \x00\x01\x7f\ufeff<s></s><unk><pad><0x41> \ufb01 "
    "\u212b e\u0301 \u0301\u0327 \u2585 \u2047 \u00a0\u3000\u200d\u2028 0123 "
    "\u6f22\u5b57\U0001f600\U0001f3fd \U0010ffff  "
)


def train_tokenizer(passages: list[str], vocab_size: int, symbols: str = "") -> bytes:
    """Train a lossless SentencePiece BPE of exactly `vocab_size` pieces and return its serialized model.

    Ids: pad 0, bos 1, eos 2, unk 3, then `symbols`, characters that never become part of another piece, then
    the 256 bytes, then learned pieces. Raises InputError if the text is too small for that many pieces.
    """
    sentences = _trainable(passages, vocab_size, symbols)
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            character_coverage=1.0,
            max_sentence_length=4 * Sampler.PASSAGE,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            user_defined_symbols=list(symbols),
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"too high.*<= (\d+)", str(error))
        reason = f"it yields at most {limit[1]} pieces" if limit else str(error)
        raise InputError(f"the training text is too small for --vocab-size {vocab_size}: {reason}") from error
    return model.getvalue()


def _trainable(passages: list[str], vocab_size: int, symbols: str) -> list[str]:
    """Split the text at `symbols`, at rare characters, and at characters that the trainer cannot handle.

    The last two become byte tokens. The trainer reserves tab, U+2585 and NUL and reads a literal U+2581 as a
    space. Characters with their own piece cover 99.9 % of the text or take half of the learned pieces,
    whichever is fewer: scripts with many characters need pieces for merges too.
    """
    counts: Counter[str] = Counter()
    for passage in passages:
        counts.update(passage)
    common, missing = " ", 0.999 * counts.total()  # always the space: else it becomes U+2581's bytes
    for character, count in counts.most_common((vocab_size - 260 - len(symbols)) // 2):
        if missing > 0 and character not in f"\0\t{SPACE}\u2585{symbols}":
            common += character
        missing -= count
    pattern = re.compile(f"[{re.escape(common)}]+")
    return [*(part for passage in passages for part in pattern.findall(passage)), " "]


def load_tokenizer(model: bytes, name: str, symbols: str = "") -> spm.SentencePieceProcessor:
    """Return the tokenizer of a serialized model.

    Raises InputError unless BOS is id 1, ids fit in 16 bits, and each of `symbols` has a piece.
    """
    if not model:  # SentencePiece would abort the process
        raise InputError(f"{name}: an empty file, not a SentencePiece model")
    with decoding(name, "a SentencePiece model"):
        sp = spm.SentencePieceProcessor(model_proto=model)
        bos_id, vocab_size = sp.bos_id(), sp.vocab_size()
        is_lossless(sp), token_bytes(sp)  # a damaged model fails here, not at the first rare text
    if bos_id != BOS_ID:
        raise InputError(f"{name}: its BOS id is {bos_id}; the shards need {BOS_ID}")
    if vocab_size > 65536:
        raise InputError(f"{name}: {vocab_size} pieces; 16-bit shards hold ids up to 65535")
    if missing := [f"U+{ord(symbol):04X}" for symbol in symbols if sp.piece_to_id(symbol) == sp.unk_id()]:
        raise InputError(
            f"{name}: no piece for {', '.join(missing)}. --case-ops needs a tokenizer that was trained with "
            "these operators as user-defined symbols."
        )
    return sp


def encode(sp: spm.SentencePieceProcessor, text: str) -> list[int]:
    """Return the token ids of a text, without BOS.

    Lossless with a tokenizer that keeps every character (identity normalization, no dummy prefix, byte
    fallback): SentencePiece alone would turn a literal U+2581 into a space, so its three bytes are encoded
    instead. With any other tokenizer this is plain sp.encode.
    """
    if len(text) <= SEGMENT and SPACE not in text:
        return sp.encode(text)
    if not _keeps_text(sp):
        return sp.encode(text)
    ids: list[int] = []
    literal = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
    for number, part in enumerate(text.split(SPACE)):
        ids += literal if number else []
        for segment in _segments(part):
            ids += sp.encode(segment)
    return ids


def _segments(text: str) -> Iterator[str]:
    """Split a long text before a space that follows a non-space: no learned piece crosses that boundary."""
    start = 0
    while len(text) - start > SEGMENT:
        stop = start + SEGMENT
        space = text.rfind(" ", start, stop)
        before = len(text[start : max(start, space)].rstrip(" "))
        yield text[start : start + before if before else stop]
        start = start + before if before else stop
    yield text[start:]


def is_lossless(sp: spm.SentencePieceProcessor) -> bool:
    """Return whether `encode` keeps every byte of any text, tested by a round trip of adversarial strings.

    If so, a token stands for `token_bytes(sp)[id]` bytes, and these add up exactly to the bytes of the text.
    """
    text = f"{SPACE}{HOSTILE_TEXT}{SPACE}{SPACE} {SPACE}"
    return _keeps_text(sp) and _detokenize(sp, encode(sp, text)) == text.encode()


def _keeps_text(sp: spm.SentencePieceProcessor) -> bool:
    probes = (HOSTILE_TEXT, HOSTILE_TEXT.strip(), "a", " ", "\n", "\u2580")
    return all(_detokenize(sp, sp.encode(text)) == text.encode() for text in probes)


def _detokenize(sp: spm.SentencePieceProcessor, ids: list[int]) -> bytes:
    return b"".join(_piece_bytes(sp, token) for token in ids)


def _piece_bytes(sp: spm.SentencePieceProcessor, token: int) -> bytes:
    piece = sp.id_to_piece(token)
    if sp.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
        return b""
    return piece.replace(SPACE, " ").encode()


def token_bytes(sp: spm.SentencePieceProcessor) -> np.ndarray:
    """Return the bytes of text that each token id of a lossless tokenizer stands for (int64)."""
    return np.array([len(_piece_bytes(sp, token)) for token in range(sp.vocab_size())], dtype=np.int64)


# ------------------------------------------------------------------------------------------------------------
# Encoding on all cores
# ------------------------------------------------------------------------------------------------------------

BATCH_CHARACTERS = 1 << 20
MAX_COUNT = 0xFFFF  # bytes of one token; a sidecar holds uint16
_worker_encoder: Encoder | None = None  # one per process, set by _start_worker


class Batch(NamedTuple):
    """Consecutive documents of one split."""

    split: str
    texts: list[str]


def make_batches(documents: Iterable[Document]) -> Iterator[Batch]:
    """Group documents by split, in order, into batches of about a million characters."""
    pending = {split: Batch(split, []) for split in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    for split, text, _ in documents:
        pending[split].texts.append(text)
        characters[split] += len(text)
        if characters[split] >= BATCH_CHARACTERS:
            yield pending[split]
            pending[split], characters[split] = Batch(split, []), 0
    yield from (batch for batch in pending.values() if batch.texts)


class Encoder:
    """A tokenizer that counts the bytes of the original text in each token, where they are known.

    `lossless` tells whether they are known for all tokens. With `case_ops` the text is encoded by
    case_ops.encode first, and validation tokens are counted for the sidecar under any tokenizer.
    """

    def __init__(self, model: bytes, case_ops: bool) -> None:
        self.sp, self.case_ops = spm.SentencePieceProcessor(model_proto=model), case_ops
        self.lossless = is_lossless(self.sp)
        self._lengths = token_bytes(self.sp).astype("<u4")
        self._pieces = [_piece_bytes(self.sp, token) for token in range(self.sp.vocab_size())]

    def document(self, text: str, split: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the tokens of a document, uint16, BOS first, and the bytes of each, uint32 or None.

        Raises InputError if a validation token stands for more bytes than a sidecar can hold.
        """
        if not self.case_ops:
            ids = np.array([BOS_ID, *encode(self.sp, text)], dtype="<u2")
            return ids, self._lengths[ids] if self.lossless else None
        marked = case_ops.encode(text)
        if self.lossless:
            tokens = [BOS_ID, *encode(self.sp, marked)]
            pieces = [self._pieces[token] for token in tokens]
        elif split == "val":
            proto = self.sp.encode(marked, out_type="immutable_proto").pieces
            tokens = [BOS_ID, *(piece.id for piece in proto)]
            pieces = [b"", *(piece.surface.encode() for piece in proto)]
        else:
            return np.array([BOS_ID, *encode(self.sp, marked)], dtype="<u2"), None
        counts = case_ops.byte_counts(pieces)
        if split == "val" and max(counts) > MAX_COUNT:
            token = counts.index(max(counts))
            raise InputError(
                f"token {token} of the document that begins {text[:30]!r} stands for {counts[token]} bytes: "
                f"{self.sp.id_to_piece(tokens[token])!r}, id {tokens[token]}; a sidecar holds at most "
                f"{MAX_COUNT}. Shorten the run of characters that this token stands for."
            )
        return np.array(tokens, dtype="<u2"), np.array(counts, dtype="<u4")


def encode_batch(encoder: Encoder, batch: Batch) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the tokens of a batch, uint16, and the bytes of each, uint32 or None. BOS begins a document."""
    tokens, counts = zip(*(encoder.document(text, batch.split) for text in batch.texts), strict=True)
    return np.concatenate(tokens), None if counts[0] is None else np.concatenate(counts)


def encode_batches(
    model: bytes, case_ops: bool, batches: Iterable[Batch], workers: int
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray | None]]:
    """Yield every batch with its tokens and their bytes, in order, encoded by `workers` processes.

    With one worker this process encodes.
    """
    if workers == 1:
        encoder = Encoder(model, case_ops)
        for batch in batches:
            yield batch, *encode_batch(encoder, batch)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(model, case_ops)
    ) as pool:
        # Bounded prefetch: the executor's own map would read the whole input ahead of the workers.
        window: deque = deque()
        try:
            for batch in batches:
                window.append((batch, pool.submit(_encode_in_worker, batch)))
                if len(window) >= 3 * workers:
                    batch, future = window.popleft()
                    yield batch, *future.result()
            while window:
                batch, future = window.popleft()
                yield batch, *future.result()
        finally:
            for _, future in window:
                future.cancel()


def _start_worker(model: bytes, case_ops: bool) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops this one
    _worker_encoder = Encoder(model, case_ops)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent does: otherwise workers of a killed parent would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: Batch) -> tuple[np.ndarray, np.ndarray | None]:
    assert _worker_encoder is not None
    return encode_batch(_worker_encoder, batch)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writer of one split's tokens as shards of `shard_tokens` tokens, the last one shorter.

    `shards` holds the manifest entries of the finished shards. With `sidecar` the bytes of each token are
    written to a file of the same form beside each shard, and `sidecars` holds the entries of these files.
    """

    def __init__(self, out: Path, split: str, shard_tokens: int, sidecar: bool = False) -> None:
        self._out, self._split, self._shard_tokens = out, split, shard_tokens
        self._kinds = (split, f"{split}_bytes") if sidecar else (split,)
        self._files = contextlib.ExitStack()
        self._streams: list[BinaryIO] = []
        self._tokens = self._documents = 0
        self._text_bytes: int | None = 0
        self.shards: list[dict] = []
        self.sidecars: list[dict] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    def write(self, tokens: np.ndarray, counts: np.ndarray | None) -> None:
        """Append tokens and the bytes of each, or None if unknown, and finish each shard that is full."""
        while len(tokens):
            room = self._shard_tokens - self._tokens
            self._append(tokens[:room], None if counts is None else counts[:room])
            tokens, counts = tokens[room:], None if counts is None else counts[room:]
            if self._tokens == self._shard_tokens:
                self.finish()

    def _append(self, tokens: np.ndarray, counts: np.ndarray | None) -> None:
        if not self._streams:
            # Files get their final names in reverse order: no shard is ever without its sidecar.
            self._streams = [self._files.enter_context(atomic_file(self._path(kind))) for kind in self._kinds]
            for stream in self._streams:
                stream.write(bytes(HEADER_BYTES))
        for stream, numbers in zip(self._streams, (tokens, counts), strict=False):
            stream.write(numbers.astype("<u2").tobytes())
        self._tokens += len(tokens)
        self._documents += int((tokens == BOS_ID).sum())
        self._text_bytes = (
            None if counts is None or self._text_bytes is None else self._text_bytes + int(counts.sum())
        )

    def finish(self) -> None:
        """Write the header of the open shard and give it its final name; no-op if none is open."""
        if not self._streams:
            return
        for stream in self._streams:
            stream.seek(0)
            stream.write(shard_header(self._tokens))
        self._files.close()
        paths = [self._path(kind) for kind in self._kinds]
        entry = {
            "file": paths[0].name,
            "split": self._split,
            "tokens": self._tokens,
            "documents": self._documents,
            "text_bytes": self._text_bytes,
            "sha256": digest_of(paths[0]),
        }
        self.sidecars += [
            {
                "file": path.name,
                "tokens": self._tokens,
                "bytes": self._text_bytes,
                "sha256": digest_of(path),
            }
            for path in paths[1:]
        ]
        self.shards.append(entry)
        self._streams, self._tokens, self._documents, self._text_bytes = [], 0, 0, 0

    def _path(self, kind: str) -> Path:
        return self._out / SHARD_NAME.format(split=kind, index=len(self.shards))


def earlier_output(job: Job) -> list[Path]:
    """Return earlier output in the job's folder, including unfinished files, the manifest first.

    A tokenizer in that folder that this job uses is not included.
    """
    pattern = re.compile(
        r"(fineweb_(train|val|val_bytes)_\d{6}\.bin|tokenizer\.model|manifest\.json)((\.[0-9a-f]{8,16})?\.tmp)?"
    )
    found = sorted(path for path in job.out.glob("*") if pattern.fullmatch(path.name))
    own = job.tokenizer.resolve() if job.tokenizer else None
    return sorted(
        (path for path in found if path.resolve() != own), key=lambda path: path.name != "manifest.json"
    )


# ------------------------------------------------------------------------------------------------------------
# The whole preparation
# ------------------------------------------------------------------------------------------------------------


def prepare(job: Job) -> dict:
    """Run a job and return its manifest.

    Raises InputError for user errors. After any exception before the last shard is complete, no file of this
    job is left. Once all shards are complete they stay, even if the manifest cannot be written. An earlier
    preparation in the same folder is replaced only with `overwrite`, and only after the whole input has
    passed its checks.
    """
    if job.out.exists() and not job.out.is_dir():
        raise InputError(f"{job.out}: not a folder")
    earlier = earlier_output(job)
    if earlier and not job.overwrite:
        raise InputError(f"{job.out}: already contains {earlier[0].name}. Replace it with --overwrite.")
    list_inputs([*list_inputs(job.inputs), *list_inputs(job.val_inputs)])  # no file twice or in both splits
    symbols = case_ops.OPERATORS if job.case_ops else ""
    given = read_file(job.tokenizer, MODEL_BYTES) if job.tokenizer else None
    is_lossy = given is not None and not is_lossless(load_tokenizer(given, str(job.tokenizer), symbols))
    limit = LOSSY_BYTES if is_lossy else CASE_OPS_BYTES if job.case_ops else math.inf
    job = replace(job, document_bytes=limit)
    found = survey(job)
    for told in filter(None, (found.left_out.describe(), warn_of_split(job, found))):
        print(told, file=sys.stderr)
    model = given or train_tokenizer(found.sample, job.vocab_size, symbols)
    found.sample = []
    job.out.mkdir(parents=True, exist_ok=True)
    try:
        for path in earlier:
            path.unlink()
        manifest = _write_tokens(job, model, found)
    except BaseException:
        for path in earlier_output(job):
            path.unlink()
        raise
    try:
        write_json(job.out / "manifest.json", manifest)
    except OSError as error:
        raise OSError(
            f"{job.out}: all shards are complete, but manifest.json cannot be written: {error}"
        ) from error
    return manifest


def _write_tokens(job: Job, model: bytes, found: Survey) -> dict:
    """Write the tokenizer and all shards and return the manifest."""
    with atomic_file(job.out / "tokenizer.model") as stream:
        stream.write(model)
    sp = load_tokenizer(model, "tokenizer.model")
    lossless = is_lossless(sp)
    shards, sidecars = _write_shards(job, model, sum(found.text_bytes.values()))
    splits = {split: _total(split, shards, found, lossless) for split in SPLITS}
    return {
        "version": MANIFEST_VERSION,
        "name": escaped(job.name),
        **job.entries,
        **({"case_ops": _case_ops_entry(sidecars)} if job.case_ops else {}),
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": hashlib.sha256(model).hexdigest(),
            "vocab_size": sp.vocab_size(),
            "lossless": lossless,
            "bos_id": BOS_ID,
        },
        "splits": splits,
        "shards": shards,
        "source": [escaped(path.resolve().name) for path in (*job.inputs, *job.val_inputs)],
        "left_out": found.left_out.counts(),
        "python": platform.python_version(),
        "sentencepiece": spm.__version__,
    }


def _case_ops_entry(sidecars: list[dict]) -> dict:
    """Return the manifest's account of a CaseOps export.

    The bytes of all tokens are those of all targets: the first token is BOS and stands for none.
    """
    return {
        "operators": [f"U+{ord(operator):04X}" for operator in case_ops.OPERATORS],
        "val_tokens": sum(sidecar["tokens"] for sidecar in sidecars),
        "val_target_bytes": sum(sidecar["bytes"] for sidecar in sidecars),
        "sidecars": sidecars,
    }


def _write_shards(job: Job, model: bytes, total_bytes: int) -> tuple[list[dict], list[dict]]:
    """Write all shards and sidecars and return their manifest entries."""
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(job.out, split, job.shard_tokens, sidecar=job.case_ops and split == "val")
            )
            for split in SPLITS
        }
        progress = stack.enter_context(
            tqdm(desc="encoding", total=total_bytes, unit="B", unit_scale=True, disable=None)
        )
        batches = make_batches(read_documents(job))
        encoded = stack.enter_context(
            contextlib.closing(encode_batches(model, job.case_ops, batches, job.workers))
        )
        for batch, tokens, counts in encoded:
            writers[batch.split].write(tokens, counts)
            progress.update(sum(len(text.encode()) for text in batch.texts))
        for writer in writers.values():
            writer.finish()
        shards = [shard for writer in writers.values() for shard in writer.shards]
        return shards, writers["val"].sidecars


def _total(split: str, shards: list[dict], found: Survey, lossless: bool) -> dict:
    """Add up a split's shards and compare the totals with those of the first pass."""
    own = [shard for shard in shards if shard["split"] == split]
    counted = {key: sum(shard[key] or 0 for shard in own) for key in ("documents", "text_bytes", "tokens")}
    expected = {"documents": found.documents[split], "text_bytes": found.text_bytes[split]}
    for key, number in expected.items():
        if counted[key] != number and (lossless or key != "text_bytes"):
            raise InputError(
                f"{split}: {number} {key} in the first pass, {counted[key]} encoded. Did an input file "
                "change?"
            )
    return {**counted, **expected}


# ------------------------------------------------------------------------------------------------------------
# Overlap of validation and training shards
# ------------------------------------------------------------------------------------------------------------

# Validation text is looked up in the training shards by 64-bit hashes of 32-token spans, taken at every
# position of the training tokens and at every 32nd position of a document. Expected false hits at 2,000,000
# spans and 8,000,000,000 positions: 0.001.
SPAN, CHUNK_TOKENS = 32, 1 << 20
MARGIN = 8  # tokens: the first and last words of a document are tokenized differently inside a longer text


def count_overlap(folder: Path) -> dict:
    """Count the validation documents of a folder that occur in its training shards, and write the counts.

    A document is covered by 32-token spans; of a document of 48 or more tokens the first and last 8 are left
    out. It is inside if all its spans occur anywhere in the training tokens, and touched if one does. A
    document of fewer than 32 tokens is inside, and touched, if a training document equals it. The counts go
    into manifest.json under "overlap", or into source.json if there is no manifest. Memory: 2 bytes per
    validation token, 64 bytes per span, and 100 MB. InputError if shards are missing or malformed.
    """
    record = next(
        (folder / name for name in ("manifest.json", "source.json") if (folder / name).exists()), None
    )
    content = read_json(record, {}) if record else {}
    val, train = (list_shards(folder, split) for split in ("val", "train"))
    tokens = np.concatenate([*read_chunks(val)])
    starts, lengths = document_bounds(tokens)
    if not len(starts):
        raise InputError(
            f"{folder}: no document in the validation shards: {len(tokens)} tokens, BOS is id {BOS_ID}"
        )
    owners, hashes = span_hashes(tokens, starts, lengths)
    keys, inverse = np.unique(hashes, return_inverse=True)
    found = find_hashes(train, keys, bool((lengths < SPAN).any()))[inverse]
    spans = np.bincount(owners, minlength=len(starts))
    hits = np.bincount(owners, weights=found, minlength=len(starts)).astype(np.int64)
    overlap = {
        "documents": len(starts),
        "documents_inside": int((hits == spans).sum()),
        "documents_touched": int((hits > 0).sum()),
        "documents_short": int((lengths < SPAN).sum()),
        "spans": len(owners),
        "spans_found": int(found.sum()),
        "span_tokens": SPAN,
        "val_tokens": len(tokens),
        "train_tokens": sum(train.values()),
        "train_shards": len(train),
    }
    if record:
        write_json(record, {**content, "overlap": overlap})
    return {**overlap, "record": record and record.name}


def list_shards(folder: Path, split: str) -> dict[Path, int]:
    """Return the shards of a split with their token counts, in order. InputError for a malformed shard."""
    paths = sorted(
        path for path in folder.glob(f"fineweb_{split}_*.bin") if re.fullmatch(SHARD_FILE, path.name)
    )
    if not paths:
        raise InputError(f"{folder}: no {SHARD_NAME.format(split=split, index=0)} in this folder")
    shards = {}
    for path in paths:
        with open_input(path) as stream:
            size, header = os.fstat(stream.fileno()).st_size, np.fromfile(stream, "<i4", HEADER_INTS)
        start, count = HEADER_BYTES, int(header[2]) if len(header) == HEADER_INTS else 0
        if count < 1 or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION) or size != start + 2 * count:
            raise InputError(f"{path}: not a shard: {size} bytes, header {header[:3].tolist()}")
        shards[path] = count
    return shards


def document_bounds(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first position of each nonempty document, after its BOS, and its length in tokens."""
    starts = np.flatnonzero(tokens == BOS_ID) + 1
    lengths = np.diff(starts, append=len(tokens) + 1) - 1
    return starts[lengths > 0], lengths[lengths > 0]


@cache
def token_hashes() -> np.ndarray:
    """Return a random number for each token id, uint64, identical in every run."""
    return np.random.default_rng(SPAN).integers(1 << 64, size=1 << 16, dtype=np.uint64)


def rolling_hashes(tokens: np.ndarray) -> np.ndarray:
    """Return the hash of every 32 consecutive tokens, uint64: a polynomial modulo 2**64, by doubling."""
    hashes, factor, width = token_hashes()[tokens], 0x9E3779B97F4A7C15, 1
    while width < SPAN:
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        factor, width = factor * factor % (1 << 64), 2 * width
    return hashes


def short_hashes(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a hash for each whole document of fewer than 32 tokens, uint64."""
    places = np.arange(SPAN - 1)
    rows = token_hashes()[tokens[np.minimum(starts[:, None] + places, len(tokens) - 1)]]
    factors = np.random.default_rng(SPAN + 1).integers(1 << 64, size=SPAN - 1, dtype=np.uint64) | np.uint64(1)
    return np.where(places < lengths[:, None], rows * factors, np.uint64(0)).sum(axis=1, dtype=np.uint64)


def span_hashes(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the document index and the hash of each span; count_overlap defines the spans."""
    margin = np.where(lengths >= SPAN + 2 * MARGIN, MARGIN, 0)
    first, last = starts + margin, starts + lengths - margin - SPAN
    counts = np.where(lengths < SPAN, 1, -(-(last - first) // SPAN) + 1)
    owners = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    positions = np.minimum(first[owners] + SPAN * number, last[owners])
    hashes, short = np.empty(len(owners), np.uint64), lengths < SPAN
    hashes[short[owners]] = short_hashes(tokens, starts[short], lengths[short])
    long = np.flatnonzero(~short[owners])
    for begin in range(0, len(tokens), CHUNK_TOKENS):
        own = long[slice(*np.searchsorted(positions[long], (begin, begin + CHUNK_TOKENS)))]
        if len(own):
            hashes[own] = rolling_hashes(tokens[begin : begin + CHUNK_TOKENS + SPAN - 1])[
                positions[own] - begin
            ]
    return owners, hashes


def find_hashes(shards: dict[Path, int], keys: np.ndarray, short: bool) -> np.ndarray:
    """Return which of the sorted `keys` occur in the shards, as spans or, if `short`, as whole documents."""
    bits = min(26, max(16, len(keys).bit_length() + 5))  # a table of 1 byte per entry, one entry in 32 set
    table, shift = np.zeros(1 << bits, bool), np.uint64(64 - bits)
    table[keys >> shift] = True
    found = np.zeros(len(keys), bool)
    with tqdm(
        desc="comparing", total=sum(shards.values()), unit="token", unit_scale=True, disable=None
    ) as progress:
        kept = np.zeros(0, "<u2")
        # the BOS ends a short document
        for chunk in itertools.chain(read_chunks(shards), [np.array([BOS_ID], "<u2")]):
            tokens = np.concatenate([kept, chunk])
            kept = tokens[-SPAN - 1 :]  # a span, or BOS, a short document and BOS, may cross chunks
            hashes = rolling_hashes(tokens)
            if short:
                starts, lengths = document_bounds(tokens[:-1])
                whole = (lengths < SPAN) & (tokens[starts + lengths] == BOS_ID)
                hashes = np.concatenate([hashes, short_hashes(tokens, starts[whole], lengths[whole])])
            candidates = hashes[table[hashes >> shift]]
            places = np.minimum(np.searchsorted(keys, candidates), len(keys) - 1)
            found[places[keys[places] == candidates]] = True
            progress.update(len(chunk))
    return found


def read_chunks(shards: dict[Path, int]) -> Iterator[np.ndarray]:
    """Yield the tokens of the shards, uint16, at most CHUNK_TOKENS at a time; not mapped, to bound memory."""
    for path, count in shards.items():
        with open_input(path) as stream:
            stream.seek(HEADER_BYTES)
            while count > 0:
                chunk = np.fromfile(stream, "<u2", min(count, CHUNK_TOKENS))
                if not len(chunk):
                    raise InputError(f"{path}: the file became shorter while it was read")
                count -= len(chunk)
                yield chunk


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


TOTALS = {  # what describe reads of a manifest
    "splits": {str: dict.fromkeys(("documents", "text_bytes", "tokens"), int)},
    "case_ops?": {"val_tokens": int, "val_target_bytes": int, "sidecars": list},
}


def describe(manifest: dict) -> str:
    """Return one line of text per split of a manifest."""
    lines = []
    for split, total in manifest["splits"].items():
        ratio = f", {total['text_bytes'] / total['tokens']:.4f} bytes/token" if total["tokens"] else ""
        size = f"{total['documents']:,} documents, {total['text_bytes']:,} bytes"
        lines.append(f"{split}: {size}, {total['tokens']:,} tokens{ratio}")
    if totals := manifest.get("case_ops"):
        lines.append(
            f"case_ops: {totals['val_tokens']:,} validation tokens, {totals['val_target_bytes']:,} bytes of "
            f"their targets, {len(totals['sidecars'])} sidecars"
        )
    return "\n".join(lines)


def describe_overlap(overlap: dict, seconds: float) -> str:
    """Return two lines of text for the result of count_overlap."""
    rate = (
        f"{overlap['train_tokens']:,} training tokens in {seconds:.2f} s, "
        f"{overlap['train_tokens'] / seconds:,.0f}"
    )
    written = (
        f"written to {overlap['record']}"
        if overlap["record"]
        else "no manifest.json or source.json to write to"
    )
    return (
        f"overlap: {overlap['documents_inside']:,} of {overlap['documents']:,} validation documents occur in "
        f"the training shards, {overlap['documents_touched']:,} share a span of {SPAN} tokens with them; "
        f"{overlap['documents_short']:,} documents of fewer than {SPAN} tokens were compared whole\n"
        f"overlap: {overlap['spans_found']:,} of {overlap['spans']:,} spans found; {rate} tokens/s; {written}"
    )


def parse_arguments(arguments: list[str] | None) -> Job | Path:
    """Return the job that the command line describes, or the folder of --overlap."""
    parser = argparse.ArgumentParser(
        description="Turn any text into a tokenizer, token shards and a manifest."
    )
    parser.add_argument(
        "inputs", nargs="*", type=Path, metavar="INPUT", help=".txt, .jsonl (.gz, .xz, .zst) or folder"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the result")
    parser.add_argument(
        "--overlap",
        type=Path,
        metavar="FOLDER",
        help="only count FOLDER's validation documents that occur in its training shards",
    )
    parser.add_argument("--name", help="dataset name in the manifest (default: name of the folder)")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key of the text in .jsonl objects")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--vocab-size", type=int, default=1024, help="pieces of the new tokenizer (default: 1024)"
    )
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="FILE.model", help="use this SentencePiece model instead"
    )
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--val-docs", type=int, metavar="N", help="use the first N documents for validation")
    split.add_argument(
        "--val-fraction", type=float, default=0.02, metavar="F", help="split by hash (default: 0.02)"
    )
    split.add_argument(
        "--val-input", type=Path, nargs="+", default=[], metavar="PATH", help="separate validation text"
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens per shard (default: 100000000)",
    )
    parser.add_argument(
        "--tokenizer-sample-bytes",
        type=int,
        default=64_000_000,
        metavar="N",
        help="bytes of text that the tokenizer is trained on (default: 64000000)",
    )
    parser.add_argument(
        "--workers", type=int, default=core_count(), metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument(
        "--seed", type=int, default=1337, help="seed of the hash split and the tokenizer sample"
    )
    parser.add_argument(
        "--case-ops",
        action="store_true",
        help="lower-case text with operators for capitals, and the bytes of each validation token",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier preparation in DIR")
    options = vars(parser.parse_args(arguments))
    if overlap := options.pop("overlap"):
        if options["inputs"] or options["out"]:
            parser.error("--overlap takes neither INPUT nor --out")
        return overlap
    if not options["inputs"] or not options["out"]:
        parser.error("INPUT and --out are required, or --overlap")
    options["inputs"], options["val_inputs"] = tuple(options["inputs"]), tuple(options.pop("val_input"))
    options["name"] = options["name"] or options["out"].resolve().name
    return Job(**options)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a failure, 2 for a user error."""

    def body() -> None:
        job = parse_arguments(arguments)
        if isinstance(job, Path):
            started = time.perf_counter()
            print(describe_overlap(count_overlap(job), time.perf_counter() - started))
        else:
            print(describe(prepare(job)))

    return exit_code(body, BrokenProcessPool)


if __name__ == "__main__":
    sys.exit(main())
