"""Read files that others may have written, and write files that are never half-written under their name.

For data/ and records/. All input goes through open_input or read_file: a regular file behind any link, within
a limit of bytes. Then come a decoder, whose errors may be of any type, and the form that the content must
have. What is wrong becomes one InputError with file, place, value and what was expected.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES = 1 << 24  # of a manifest, a result or settings
FORMS: dict[type, tuple[str, Callable[[Any], bool]]] = {  # what is expected, and whether a value is that
    int: ("a whole number from 0 to 2^53", lambda value: type(value) is int and 0 <= value <= 1 << 53),
    float: ("a number below 1e15", lambda value: type(value) in (int, float) and not abs(value) >= 1e15),
}
BRIEF = reprlib.Repr()
BRIEF.maxstring = BRIEF.maxother = 80
# C0, DEL, C1, soft hyphen, bidirectional controls, separators, surrogates, BOM
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)


class InputError(ValueError):
    """User error in a file, a folder, an option or a variable. Exit code 2."""


def escaped(text: str) -> str:
    """Return `text` with non-UTF-8 bytes and nonprinting characters as \\xNN or \\uNNNN."""

    def code(match: re.Match) -> str:
        number = ord(match[0])
        number -= 0xDC00 if 0xDC80 <= number <= 0xDCFF else 0  # os.fsdecode's surrogate of a byte
        return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"

    return UNSEEN.sub(code, text)


def exit_code(body: Callable[[], None], *failures: type[Exception]) -> int:
    """Run the body of a program and return its exit code; an error becomes one line.

    0: done. 1: OSError or one of `failures`. 2: InputError. 130: Ctrl-C.
    """
    try:
        body()
    except (InputError, OSError, *failures) as error:
        print(f"error: {escaped(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


# ------------------------------------------------------------------------------------------------------------
# Input
# ------------------------------------------------------------------------------------------------------------


def open_input(path: str | Path, limit: float = math.inf) -> BinaryIO:
    """Open a regular file, behind any link, of at most `limit` bytes. A FIFO is not waited for."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return file
    file.close()
    if stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: {status.st_size:,} bytes, expected at most {limit:,}")
    raise InputError(f"{path}: not a regular file")


def read_file(path: str | Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes."""
    with open_input(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


@contextlib.contextmanager
def decoding(place: str | Path, expected: str) -> Iterator[None]:
    """Turn any error inside, where a library decodes what `place` holds, into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of the system; libraries raise OSError without it
            raise InputError(f"{place}: cannot be read: {error.strerror}") from error
        raise InputError(f"{place} is not {expected}: {' '.join(str(error).split())[:300]}") from error


def check_form(value: Any, form: Any, place: str | Path) -> None:
    """Raise InputError at the first place in a decoded file that lacks its form.

    `form` is a type (int and float as in FORMS), [form] for all entries of a list, {str: form} for all values
    of an object, or {name: form} for some of them, where "name?" may be absent or null.
    """
    kind = form if isinstance(form, type) else type(form)
    expected, is_right = FORMS.get(kind, (kind.__name__, lambda value: isinstance(value, kind)))
    if not is_right(value):
        raise InputError(f"{place}: {BRIEF.repr(value)}, expected {expected}")
    if isinstance(form, list):
        for number, entry in enumerate(value):
            check_form(entry, form[0], f"{place}[{number}]")
    for name, inner in form.items() if isinstance(form, dict) else ():
        for key in value if name is str else (name.removesuffix("?"),):
            if name in (str, key) or value.get(key) is not None:
                check_form(value.get(key), inner, f"{place}: {key}")


def parse_json(text: bytes, form: Any, place: str | Path) -> Any:
    """Return the value of a JSON text, with or without a byte order mark, which must have `form`."""
    with decoding(place, "JSON"):
        value = json.loads(text.decode("utf-8-sig"))
    check_form(value, form, place)
    return value


def read_json(path: Path, form: Any) -> Any:
    """Return the value in a JSON file, which must have `form`."""
    return parse_json(read_file(path, JSON_BYTES), form, path)


def digest_of(path: Path, algorithm: str = "sha256", prefix: bytes = b"") -> str:
    """Return the hash, in hexadecimal, of `prefix` and a file's content."""
    digest = hashlib.new(algorithm, prefix)
    with open_input(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`: renamed to `path` at the end of the block, deleted on an error."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as stream:  # never through an existing link
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file and its folder; characters that UTF-8 cannot encode become JSON escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        stream.write(text.encode("utf-8", "backslashreplace") + b"\n")
