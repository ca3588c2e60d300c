"""Read and write files of runs and records without following planted links or printing control characters.

Folders of runs and records may come from untrusted sources. All tools write through `write_file` or `create`,
which never write through a link planted under a predictable name. Reading follows links, except when a file
is copied into a record.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import sys
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "data"))
from files import atomic_file, decoding, digest_of, open_input, read_file

METRIC = "val_bpb_sliding"
JSON_LIMIT, JSON_DEPTH, JSON_DIGITS = 16 << 20, 32, 40  # bytes, levels of nesting, digits of a number
BOMS = {BOM_UTF8: "utf-8-sig", BOM_UTF16_LE: "utf-16", BOM_UTF16_BE: "utf-16"}
COLOR = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # escape sequence of a terminal
# C0 except tab and newline, DEL, C1, soft hyphen, bidirectional controls, separators, surrogates, BOM
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)


def escape(text: str, keep: str = "") -> str:
    r"""Return `text` with control characters, tab and newline as \uXXXX (valid in JSON),
    except those in `keep`."""
    for character in set("\t\n") - set(keep):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def escape_lines(text: object) -> str:
    """Return `text` for a terminal or a page: control characters escaped, line breaks kept."""
    return escape(str(text), keep="\t\n")


def create(path: Path) -> IO[bytes]:
    """Open an empty file at `path`. An existing file or link there is replaced, never opened."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    file = os.fdopen(os.open(temporary, flags, 0o666), "wb")
    try:
        os.replace(temporary, path)
    except BaseException:
        file.close()
        temporary.unlink(missing_ok=True)
        raise
    return file


def write_file(path: Path, content: bytes) -> None:
    """Write `content` under a random name beside `path`, then rename it to `path`, so the write is atomic."""
    with atomic_file(path) as file:
        file.write(content)


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a matplotlib figure with `write_file`, in the format given by the suffix of `path`."""
    picture = BytesIO()
    figure.savefig(picture, format=path.suffix[1:] or "png", **options)
    write_file(path, picture.getvalue())


def links(folder: Path) -> Iterator[Path]:
    """Yield the entries below `folder` that are neither folders nor regular files: links, pipes, devices."""
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if not stat.S_ISDIR(mode := path.lstat().st_mode) and not stat.S_ISREG(mode):
                yield path


def read_plain(path: Path) -> bytes:
    """Return the bytes of a regular file. OSError for a link, ValueError for a pipe or a device."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        return file.read()


def read_text(path: Path, limit: int) -> str:
    """Return the text of a file in UTF-8 or UTF-16, without byte order mark and terminal colors.

    Bytes that are no UTF-8 become U+FFFD. ValueError as for `read_file`.
    """
    content = read_file(path, limit)
    codec = next((codec for mark, codec in BOMS.items() if content.startswith(mark)), "utf-8")
    if codec == "utf-8" and len(content) > 3 and not any(content[1:200:2]):  # ASCII in UTF-16, little-endian
        codec = "utf-16-le"
    return COLOR.sub("", content.decode(codec, errors="replace"))


def read_nll(path: Path) -> np.ndarray:
    """Return the losses in an nll.npy, mapped: the file bounds the memory. ValueError for anything else."""
    with open_input(path), decoding(path, "an nll.npy of eval_ttt.py"):
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.dtype not in (np.float32, np.float64):
            raise ValueError(f"{getattr(found, 'dtype', 'several arrays')}, not one array of floats")
    return found


def parse_object(text: str, decimals: bool = False) -> dict[str, Any]:
    """Return the JSON object in `text`, with floats as Decimal if `decimals`; infinities and NaN stay floats.

    ValueError for anything else, for nesting beyond JSON_DEPTH and whole numbers beyond JSON_DIGITS.
    """

    def real(digits: str) -> float | Decimal:
        value = float(digits)
        return Decimal(digits) if decimals and abs(value) < 1e300 and len(digits) < 1000 else value

    def whole(digits: str) -> int:
        if len(digits) > JSON_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    try:
        level = [content := json.loads(text, parse_float=real, parse_int=whole)]
    except RecursionError as error:
        raise ValueError(f"nested more than {JSON_DEPTH} levels deep") from error
    if not isinstance(content, dict):
        raise ValueError(escape(str(content))[:80])
    for _ in range(JSON_DEPTH):
        level = [each for value in level if isinstance(value, dict | list)
                 for each in (value.values() if isinstance(value, dict) else value)]  # fmt: skip
    if level:
        raise ValueError(f"nested more than {JSON_DEPTH} levels deep")
    return content


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    return digest_of(path)


def is_below(path: str | Path, *roots: str | Path) -> bool:
    """Return whether `path`, with `..` removed and links unresolved, is one of `roots` or below one."""
    place = Path(os.path.abspath(path))
    return any(place.is_relative_to(os.path.abspath(root)) for root in roots)


def read_object(path: Path, *keys: str, decimals: bool = False) -> dict[str, Any]:
    """Return the JSON object of a file, with floats as Decimal if `decimals`.

    Raises a one-line ValueError for anything else, for an object that lacks one of `keys`, and for a link to
    a pipe or a device.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    text = read_file(path, JSON_LIMIT)
    try:
        content = parse_object(text.decode("utf-8-sig"), decimals)
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object: {escape(str(error))[:200]}") from error
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return content


def object_of(result: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the object under a key of a JSON object; an empty one if there is none."""
    return value if isinstance(value := result.get(key), dict) else {}


def read_result(path: Path, *keys: str) -> dict[str, Any]:
    """Return result.json of a finished run. ValueError if it lacks its sliding score or one of `keys`."""
    result = read_object(path)
    numbers = {key for key in (METRIC, *keys) if key.startswith(("val_", "bytes_")) or key == "steps"}
    missing = [key for key in (METRIC, *keys) if key not in result]
    missing += [
        f"{key} as a number, not {escape(str(result[key]))[:40]}"
        for key in sorted(numbers & result.keys())
        if not isinstance(result[key], int | float) or isinstance(result[key], bool)
    ]
    if missing:
        raise ValueError(f"{path} is not the result of a finished run: it lacks {', '.join(missing)}")
    return result
