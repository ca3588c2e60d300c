"""Build the demo corpus: the English text that ships with every CPython, without downloading anything.

    python data/demo.py [--out data/demo]

A document is either the docstrings of one module of the standard library, in the order of the file, or one topic of
the language reference behind Python's help(). The files are parsed, never imported or run. A paragraph of 80 or more
characters is kept only where it first appears, since topics quote each other; so validation text is not in the
training text. The result has the format of prepare.py, with a tokenizer of 1,024 pieces, and depends on the Python
version only. Where DIR already holds the corpus of this Python, it is kept.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import platform
import random
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from prepare import InputError, Job, describe, prepare, sha256_of

NAME, VOCAB_SIZE, SEED = "demo", 1024, 1337
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TOPICS_FILE = "pydoc_data/topics.py"
MIN_DOCUMENT_CHARACTERS, MIN_REPEATED_CHARACTERS = 200, 80
VAL_SHARE, VAL_MIN_BYTES, VAL_MAX_BYTES = 0.05, 150_000, 250_000
VAL_MAX_DOCUMENT_BYTES = 15_000  # one long document would otherwise be half of the validation text


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


def parse_file(path: Path) -> ast.Module | None:
    """Return the syntax tree of a Python file, or None where it cannot be read or parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files have escapes that newer versions warn about
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def docstrings(tree: ast.Module) -> list[str]:
    """Return the docstrings of a module, its classes and functions, in the order of the file, each one once."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, owners) and (text := ast.get_docstring(node, clean=False)):
            found.setdefault(inspect.cleandoc(text), node.body[0].lineno)
    return [text for text in sorted(found, key=lambda text: found[text]) if text]


def help_topics(tree: ast.Module) -> list[str]:
    """Return the texts of the literal dictionary `topics` of a module, in its order."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "topics" for target in targets):
            return list(ast.literal_eval(node.value).values())
    return []


def raw_documents(library: Path) -> Iterator[str]:
    """Yield the docstrings of each module below `library`, in the order of the paths, then the help topics."""
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts) and (tree := parse_file(path)):
            yield "\n\n".join(docstrings(tree))
    if tree := parse_file(library / TOPICS_FILE):
        yield from help_topics(tree)


def without_repeats(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts without paragraphs that stood in an earlier one, and without those then too short."""
    seen: set[str] = set()
    for text in texts:
        kept = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                kept.append(paragraph)
            if len(key) >= MIN_REPEATED_CHARACTERS:
                seen.add(key)
        document = "\n\n".join(kept).strip()
        if len(document) >= MIN_DOCUMENT_CHARACTERS:
            yield document


def demo_documents(library: Path) -> tuple[list[str], list[str]]:
    """Return the training and the validation documents, shuffled; InputError where `library` has no Python sources."""
    documents = sorted(set(without_repeats(raw_documents(library))))
    if not documents:
        raise InputError(f"{library}: no Python sources with docstrings; this Python ships without its library's text")
    random.Random(SEED).shuffle(documents)
    sizes = [len(document.encode()) for document in documents]
    target = min(max(VAL_SHARE * sum(sizes), VAL_MIN_BYTES), VAL_MAX_BYTES)
    train, val, val_bytes = [], [], 0
    for document, size in zip(documents, sizes, strict=True):
        if val_bytes < target and size <= VAL_MAX_DOCUMENT_BYTES:
            val.append(document)
            val_bytes += size
        else:
            train.append(document)
    return train, val


# ----------------------------------------------------------------------------------------------------------------------
# Corpus
# ----------------------------------------------------------------------------------------------------------------------


def existing_demo(out: Path) -> dict | None:
    """Return the manifest in `out` where it is this Python's demo corpus and every file of it is intact.

    Raises InputError where the folder holds another data set, which must not be replaced.
    """
    path = out / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        name, python = manifest["name"], manifest["python"]
        hashes = {entry["file"]: entry["sha256"] for entry in (manifest["tokenizer"], *manifest["shards"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest ({error!r}); remove the folder or choose another --out") from error
    if name != NAME:
        raise InputError(f'{out}: holds the data set "{name}"; choose another --out')
    intact = all((out / file).exists() and sha256_of(out / file) == digest for file, digest in hashes.items())
    return manifest if intact and python == platform.python_version() else None


def build_demo(out: Path) -> dict:
    """Build the demo corpus of the running Python in `out`, replacing an older one, and return its manifest."""
    train, val = demo_documents(Path(sysconfig.get_paths()["stdlib"]))
    with tempfile.TemporaryDirectory() as folder:
        files = {"train": Path(folder, "train.jsonl"), "val": Path(folder, "val.jsonl")}
        for path, documents in zip(files.values(), (train, val), strict=True):
            lines = [json.dumps({"text": document}) for document in documents]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        job = Job(
            inputs=(files["train"],),
            val_inputs=(files["val"],),
            out=out,
            name=NAME,
            vocab_size=VOCAB_SIZE,
            seed=SEED,
            overwrite=True,
        )
        return prepare(job)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a failure, 2 for something the user can correct."""
    parser = argparse.ArgumentParser(description="Build the demo corpus from the text that ships with Python.")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), metavar="DIR", help="default: data/demo")
    options = parser.parse_args(arguments)
    try:
        manifest = existing_demo(options.out)
        print(f"{options.out}: {'kept' if manifest else 'building'}, demo corpus of Python {platform.python_version()}")
        print(describe(manifest or build_demo(options.out)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
