"""Build the demo corpus from the English text that ships with every CPython, without downloading anything.

    python data/demo.py [--out data/demo]

A document is either the docstrings of one module of the standard library, in file order, or one topic of the
language reference behind Python's help(). The files are parsed, never imported or run. A paragraph of 80 or
more characters is kept only at its first occurrence, because topics quote each other; this keeps validation
text out of the training text. Training documents of more than 5,000 bytes are split between paragraphs. All
documents are shuffled so that neither neighboring modules nor parts of one document are adjacent. The output
has the format of prepare.py, with a tokenizer of 1,024 pieces. The text depends on the Python version.
Modules that distributions package separately are left out, and so is everything outside the standard library.
Distributions that patch docstrings (Debian: `site`) get a slightly different corpus. If DIR already holds the
corpus of this Python, it is kept.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import platform
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Container, Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from files import InputError, check_form, digest_of, exit_code, read_json
from prepare import TOTALS, Job, describe, prepare

NAME, VOCAB_SIZE, SEED = "demo", 1024, 1337
TEXT_VERSION = 2  # in the manifest: a corpus of another version is rebuilt
MADE = {"file": str, "sha256": str}
MANIFEST = TOTALS | {"python": str, "text_version?": int, "tokenizer": MADE, "shards": [MADE]}  # what is read
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Debian and Fedora package these separately or leave them out, so not every machine has their text.
OPTIONAL_MODULES = {
    *(
        "tkinter",
        "turtle",
        "turtledemo",
        "idlelib",
        "lib2to3",
        "distutils",
        "ensurepip",
        "venv",
        "msilib",
        "macholib",
    )
}
TOPICS_FILE = "pydoc_data/topics.py"
MIN_DOCUMENT_CHARACTERS, MIN_REPEATED_CHARACTERS = 200, 80
VAL_FRACTION, VAL_MIN_BYTES, VAL_MAX_BYTES = 0.05, 150_000, 250_000
VAL_MAX_DOCUMENT_BYTES = 15_000  # otherwise one long document could be half of the validation text
MAX_PART_BYTES = 5_000  # small, because smoke.env reads only 50,000 bytes of training text


# ------------------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------------------


def parse_file(path: Path) -> ast.Module | None:
    """Return the syntax tree of a Python file, or None if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files have escapes that newer versions warn about
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return None


def docstrings(tree: ast.Module) -> list[str]:
    """Return the distinct docstrings of a module, its classes and functions, in file order."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, owners) and (text := ast.get_docstring(node, clean=False)):
            found.setdefault(inspect.cleandoc(text), node.body[0].lineno)
    return [text for text in sorted(found, key=lambda text: found[text]) if text]


def help_topics(tree: ast.Module) -> list[str]:
    """Return the values of the literal dictionary `topics` of a module, in order."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "topics" for target in targets):
            return list(ast.literal_eval(node.value).values())
    return []


def raw_documents(library: Path, modules: Container[str] | None = None) -> Iterator[str]:
    """Yield the docstrings of each module below `library`, in path order, then the help topics.

    If `modules` is given, top-level files and folders with other names are left out.
    """
    for name in sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py")):
        parts = name.removesuffix(".py").split("/")
        if not (SKIPPED_FOLDERS | OPTIONAL_MODULES).isdisjoint(parts) or (
            modules and parts[0] not in modules
        ):
            continue
        if tree := parse_file(library / name):
            yield "\n\n".join(docstrings(tree))
    if (library / TOPICS_FILE).exists() and (tree := parse_file(library / TOPICS_FILE)):
        yield from help_topics(tree)


def without_repeats(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts without paragraphs of earlier texts; skip texts that are then too short."""
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


def draw(text: str, purpose: str) -> float:
    """Return a number in [0, 1) from a hash of the arguments, so changing one document moves no other."""
    return int.from_bytes(sha256(f"{SEED} {purpose}\n{text}".encode()).digest()[:8], "big") / 2**64


def demo_documents(library: Path, modules: Container[str] | None = None) -> tuple[list[str], list[str]]:
    """Return shuffled training and validation documents. InputError if `library` has no Python sources."""
    documents = sorted(
        set(without_repeats(raw_documents(library, modules))), key=lambda text: draw(text, "split")
    )
    if not documents:
        raise InputError(
            f"{library}: no Python sources with docstrings: this Python ships without library sources"
        )
    sizes = [len(document.encode()) for document in documents]
    target = min(max(VAL_FRACTION * sum(sizes), VAL_MIN_BYTES), VAL_MAX_BYTES)
    train, val, val_bytes = [], [], 0
    for document, size in zip(documents, sizes, strict=True):
        if val_bytes < target and size <= VAL_MAX_DOCUMENT_BYTES:
            val.append(document)
            val_bytes += size
        else:
            train.append(document)
    return spread(train), val


def spread(documents: Iterable[str]) -> list[str]:
    """Split long documents and shuffle the parts; those of one document are spaced evenly over the text."""
    placed = []
    for document in documents:
        parts, first = cut(document), draw(document, "order")
        placed += [((first + index / len(parts)) % 1, part) for index, part in enumerate(parts)]
    return [part for _, part in sorted(placed)]


def cut(document: str) -> list[str]:
    """Split a document into parts of similar size, at most MAX_PART_BYTES unless one paragraph is longer."""
    total = len(document.encode())
    part_bytes = total / -(-total // MAX_PART_BYTES)
    parts, size = [[]], 0
    for paragraph in document.split("\n\n"):
        more = len(paragraph.encode()) + 2
        if parts[-1] and (size >= part_bytes or size + more > MAX_PART_BYTES + 2):
            parts, size = [*parts, []], 0
        parts[-1].append(paragraph)
        size += more
    return ["\n\n".join(part) for part in parts]


# ------------------------------------------------------------------------------------------------------------
# Corpus
# ------------------------------------------------------------------------------------------------------------


def existing_demo(out: Path) -> dict | None:
    """Return the manifest in `out` if it is this Python's demo corpus and all its files are intact.

    Raises InputError if the folder holds another dataset, which must not be replaced.
    """
    path = out / "manifest.json"
    if not path.exists():
        return None
    manifest = read_json(path, {"name": str})
    if manifest["name"] != NAME:
        raise InputError(f'{out}: contains the dataset "{manifest["name"]}"; choose another --out')
    check_form(manifest, MANIFEST, path)
    made_from = manifest["python"], manifest.get("text_version")
    files = {
        Path(entry["file"]).name: entry["sha256"] for entry in (manifest["tokenizer"], *manifest["shards"])
    }
    intact = all((out / file).is_file() and digest_of(out / file) == digest for file, digest in files.items())
    return manifest if intact and made_from == (platform.python_version(), TEXT_VERSION) else None


def build_demo(out: Path) -> dict:
    """Build the demo corpus of the running Python in `out`, replace an older one, and return its manifest."""
    train, val = demo_documents(Path(sysconfig.get_paths()["stdlib"]), sys.stdlib_module_names)
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
            entries={"text_version": TEXT_VERSION},
        )
        return prepare(job)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a failure, 2 for a user error."""
    parser = argparse.ArgumentParser(
        description="Build the demo corpus from the text that ships with Python."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/demo"), metavar="DIR", help="default: data/demo"
    )
    options = parser.parse_args(arguments)

    def body() -> None:
        manifest = existing_demo(options.out)
        print(
            f"{options.out}: {'kept' if manifest else 'building'}, demo corpus of Python "
            f"{platform.python_version()}"
        )
        print(describe(manifest or build_demo(options.out)))

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
