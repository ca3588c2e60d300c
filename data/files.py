"""Hash files, and write them so that they are never half-written under their name; for data/ and records/."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def digest_of(path: Path, algorithm: str = "sha256", prefix: bytes = b"") -> str:
    """Return the hash, in hexadecimal, of `prefix` and a file's content."""
    digest = hashlib.new(algorithm, prefix)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
