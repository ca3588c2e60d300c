"""Pack the programs for submission: strip comments, shorten names, compress; each stays one file.

    python records/pack.py --out DIR [FILES...]     default: train_gpt.py and eval_ttt.py

For each NAME.py, DIR receives the packed program under that name, which runs and imports like the readable
one, and the readable one as NAME_readable.py. DIR/records links to this folder, so that the packed evaluator
can audit. Code counts toward the 16,000,000 bytes; every byte saved is available for weights. Train a
submission with DIR/train_gpt.py: then the packed bytes are counted, and submit.py ships them. A sweep runs
the readable programs; with the CODE_BYTES that this command prints, its FIT_SIZE=1 fits the packed ones.

A packed file is a Latin-1 source with one string literal: each character is one byte of the compressed
program, and only characters that a literal cannot hold are escaped. Measured on 2026-11-21
(python-minifier 3.4.0; LZMA with its best lc, lp, pb) on train_gpt.py and eval_ttt.py together, then 209,781
bytes readable and 113,310 minified:

    bz2, Latin-1          38,914   chosen
    LZMA, Latin-1         39,613   as .lzma; raw LZMA2, which needs an explicit filter: 39,667
    zip                   42,369   Python runs a zip file of any name, but cannot import it as train_gpt.py
    bz2, base 85          47,996
    LZMA, base 85         48,844
    bz2, not minified     55,815   Latin-1

Tracebacks name function and line of the minified source but do not show it:
that would take 96 bytes per file.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from runfiles import write_file

# isort: split
from files import InputError, decoding, exit_code, read_file, read_json

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
PROGRAMS = (ROOT / "train_gpt.py", ROOT / "eval_ttt.py")
CACHE = TOOLS / "__pycache__" / "packed.json"  # program and packer -> what they give: packing takes seconds
SOURCE_BYTES = 1 << 24  # of a program
CACHED = 50  # entries kept
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
UNPACK = b"#coding:l1\nimport bz2\nexec(bz2.decompress(%s.encode('l1')))"  # l1: Latin-1
MINIFIER = "python-minifier"


class PackError(InputError):
    """User error: a bad file or folder, or a missing package. Exit code 2."""


def without_docstrings(source: str) -> str:
    """Remove comments and docstrings, except the module's, which --help prints."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def minify(source: str) -> str:
    """Return a shorter equivalent program.

    Names that another file or a keyword argument may use are kept: globals, attributes, arguments. So are
    annotations in class bodies, which dataclasses and NamedTuples read, and the module's docstring. String
    literals are not hoisted into variables: that shortens the text but not its compressed size. The result is
    the same on every Python version and runs on 3.10: from 3.12 on, the library would write nested quotes
    into f-strings, which older versions reject.
    """
    from unittest import mock

    try:
        import python_minifier as library
        from python_minifier.expression_printer import ExpressionPrinter
        from python_minifier.f_string import OuterFString
    except ImportError as error:
        raise PackError("python-minifier is missing: pip install -r requirements.txt") from error

    def print_fstring(printer: ExpressionPrinter, node: ast.JoinedStr) -> None:
        printer.printer.fstring(str(OuterFString(node, pep701=False)))

    bare, kept = (
        without_docstrings(source),
        library.RemoveAnnotationsOptions(remove_class_attribute_annotations=False),
    )
    with mock.patch.object(ExpressionPrinter, "visit_JoinedStr", print_fstring):
        return library.minify(
            bare, remove_annotations=kept, hoist_literals=False, convert_posargs_to_args=False
        )


def literal(blob: bytes) -> bytes:
    """Return a string literal, in Latin-1 source, whose characters are the bytes of `blob`.

    NUL ends a source file and a carriage return is read as a newline, so both are escaped; so are
    backslashes, and quotes that could form a triple quote.
    """
    text = blob.replace(b"\\", rb"\\").replace(b"\r", rb"\r")
    text = re.sub(rb"\0(?=[0-7])", rb"\\x00", text).replace(b"\0", rb"\0")
    return b'"""' + re.sub(rb'"(?="|\Z)', rb'\\"', text) + b'"""'


def pack(source: str) -> bytes:
    """Return a file that behaves like `source`, with the same globals, __name__ and __file__.

    `source` is stored as UTF-8, so it must not declare another encoding.
    """
    return UNPACK % literal(bz2.compress(source.encode()))


def is_packed(source: bytes) -> bool:
    return source.startswith(UNPACK.partition(b"%s")[0])


class Packed(NamedTuple):
    """A packed program, by its content."""

    size: int
    sha256: str


def packed(path: Path) -> Packed:
    """Return size and hash of a program as this tool packs it; a packed program is itself.

    The result is cached by content, for packing both programs takes 4 CPU seconds. PackError without the
    minifier.
    """
    source = read_file(path, SOURCE_BYTES)
    if is_packed(source):
        return measure(source)
    known = read_cache().get(cache_key(source))
    return Packed(**known) if known else remember(source, pack(minify(source.decode())))


def measure(blob: bytes) -> Packed:
    return Packed(len(blob), hashlib.sha256(blob).hexdigest())


def cache_key(source: bytes) -> str:
    """Return a hash of a program and of what packs it."""
    try:
        parts = (source, Path(__file__).read_bytes(), version(MINIFIER).encode())
    except PackageNotFoundError as error:
        raise PackError(f"{MINIFIER} is missing: pip install -r requirements.txt") from error
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def read_cache() -> dict[str, dict]:
    """Return the cached results, none if the cache is missing or broken."""
    with suppress(InputError):
        known = read_json(CACHE, {str: {"size": int, "sha256": str}})
        return {key: {name: entry[name] for name in Packed._fields} for key, entry in known.items()}
    return {}


def remember(source: bytes, blob: bytes) -> Packed:
    """Cache what a program is packed as."""
    found, latest = measure(blob), list(read_cache().items())[1 - CACHED :]
    with suppress(OSError):  # a read-only tree packs every time
        CACHE.parent.mkdir(exist_ok=True)
        write_file(CACHE, json.dumps(dict(latest) | {cache_key(source): found._asdict()}).encode())
    return found


def packed_bytes(paths: Sequence[Path]) -> int | None:
    """Return the bytes of programs when packed; None without the minifier. For train_gpt.py's result."""
    try:
        return sum(packed(path).size for path in paths)
    except PackError:
        return None


def pack_file(path: Path, out: Path) -> tuple[int, int, int]:
    """Write `path` packed and readable into `out`; return its bytes readable, minified and packed."""
    target = out / path.name
    if target.resolve() == path.resolve():
        raise PackError(f"{path} would be overwritten. Choose another folder.")
    source = read_file(path, SOURCE_BYTES)
    with decoding(path, "a Python program"):
        small = minify(source.decode())
    blob = pack(small)
    out.mkdir(parents=True, exist_ok=True)
    write_file(target, blob)
    write_file(out / f"{path.stem}_readable.py", source)
    size = remember(source, blob).size
    return len(source), len(small.encode()), size


def link_tools(out: Path) -> None:
    """Link this folder into `out`, where the programs look for audit, reports and memory plans."""
    if not os.path.lexists(out / "records"):
        (out / "records").symlink_to(TOOLS, target_is_directory=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", type=Path, default=PROGRAMS, help="default: train_gpt.py, eval_ttt.py"
    )
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    arguments = parser.parse_args()
    from tabulate import tabulate  # not needed by the programs that call packed_bytes

    def body() -> None:
        sizes = {path.name: pack_file(path, arguments.out) for path in arguments.files}
        link_tools(arguments.out)
        columns = [sum(column) for column in zip(*sizes.values(), strict=True)]
        rows = [(name, *row) for name, row in [*sizes.items(), ("together", columns)]]
        print(tabulate(rows, ["bytes", "readable", "minified", "packed"], tablefmt="plain", intfmt=","))
        print(f"CODE_BYTES={columns[2]}: set it where FIT_SIZE=1 exports from the readable programs")

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
