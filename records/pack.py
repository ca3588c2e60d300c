"""Pack the programs for submission: strip comments, shorten names, compress; each stays one file.

    python records/pack.py --out DIR [FILES...]     default: train_gpt.py and eval_ttt.py

For each NAME.py, DIR receives the packed program under that name, which runs and imports like the readable
one, and the readable one as NAME_readable.py. Code counts toward the 16,000,000 bytes; every byte saved is
available for weights.

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
import re
import sys
from pathlib import Path
from unittest import mock

from runfiles import escape_lines, write_file

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = (ROOT / "train_gpt.py", ROOT / "eval_ttt.py")
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
UNPACK = b"#coding:l1\nimport bz2\nexec(bz2.decompress(%s.encode('l1')))"  # l1: Latin-1


class PackError(ValueError):
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


def pack_file(path: Path, out: Path) -> tuple[int, int, int]:
    """Write `path` packed and readable into `out`; return its bytes readable, minified and packed."""
    target = out / path.name
    if target.resolve() == path.resolve():
        raise PackError(f"{path} would be overwritten. Choose another folder.")
    try:
        small = minify(path.read_text(encoding="utf-8"))
        out.mkdir(parents=True, exist_ok=True)
        write_file(target, pack(small))
        write_file(out / f"{path.stem}_readable.py", path.read_bytes())
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise PackError(f"{path}: {error}") from error
    return path.stat().st_size, len(small.encode()), target.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", type=Path, default=PROGRAMS, help="default: train_gpt.py, eval_ttt.py"
    )
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    arguments = parser.parse_args()
    try:
        sizes = {path.name: pack_file(path, arguments.out) for path in arguments.files}
    except PackError as error:
        print(f"error: {escape_lines(error)}", file=sys.stderr)
        return 2
    sizes["together"] = tuple(map(sum, zip(*sizes.values(), strict=True)))
    print(f"{'bytes':20}{'readable':>12}{'minified':>12}{'packed':>12}")
    for name, (readable, minified, packed) in sizes.items():
        print(f"{name:20}{readable:>12,}{minified:>12,}{packed:>12,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
