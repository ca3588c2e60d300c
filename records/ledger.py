"""The ledger of experiments of `records/sweep.py one`, and the hashes that keep its lines comparable.

This is a module, not a program: run `python records/sweep.py one --help`.
"""

from __future__ import annotations

import ast
import csv
import fcntl
import glob
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from launch import ANY_RUN, METRIC, PROGRAMS, ROOT, Crash, digest, train, trainer

# isort: split
from files import decoding, read_file

COLUMNS = (
    "date",
    "commit",
    "config",
    "bpb",
    "bytes",
    "seconds",
    "verdict",
    "note",
    "scorer",
    "task",
    "budget",
    "run",
)
DIALECT = dict(delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
LEDGER_BYTES = 1 << 24
DIGITS = 6  # decimals of the bpb in a line; scores are compared after rounding to them
FIXED = ("scorer", "task", "budget")  # must be equal in all lines, or their scores are not comparable
SCORER = ("nll", "token_nll", "Windows", "Chunk", "Score", "Ledger", "sliding_windows", "Batch", "make_batch",
          "score", "Run.val_tokens", "Run.score", "score_artifact", "ByteTable", "load_byte_table",
          "read_validation", "Config.shards", "SIZE_CAP", "BOS_ID", "score_plan", "evaluate",
          "Setup.plan")  # fmt: skip
BORDER = ("Config", "GPT", "load_model", "read_artifact", "Adaptation", "TTT_MODES")  # may change


def names_used(definition: ast.AST) -> set[str]:
    """Return the names that a definition reads but does not bind, with X of tg.X, without annotations."""
    noted = [getattr(node, name, None) for node in ast.walk(definition) for name in ("annotation", "returns")]
    left_out = {id(part) for note in noted if note is not None for part in ast.walk(note)}
    nodes = [node for node in ast.walk(definition) if id(node) not in left_out]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    members = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    return {node.id for node in names} - bound | {node.attr for node in members if node.value.id == "tg"}


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield the names that a module defines, methods as Class.name, with their syntax trees."""
    for node in tree.body:
        for target in getattr(node, "targets", [getattr(node, "target", node)]):
            yield getattr(target, "id", getattr(target, "name", "")), node
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            yield f"{node.name}.{getattr(part, 'name', '')}", part


def without_docstrings(definition: ast.AST) -> str:
    """Return the syntax tree of a definition as text, without docstrings."""
    for node in ast.walk(definition):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(definition)


def scorer_hash(*sources: str) -> str:
    """Hash the syntax trees of SCORER and of everything in `sources` that it uses, up to BORDER.

    Docstrings, comments and layout are ignored. SyntaxError or ValueError if a source is not valid Python.
    """
    found: dict[str, list[ast.AST]] = {}  # a second definition of a name replaces the first: both count
    for name, node in (pair for source in sources for pair in definitions(ast.parse(source))):
        found.setdefault(name, []).append(node)
    reached, waiting = {}, list(SCORER)
    while waiting:
        if (name := waiting.pop()) in found and name not in reached and name not in BORDER:
            reached[name] = [without_docstrings(node) for node in found[name]]
            waiting += [used for node in found[name] for used in names_used(node)]
    return digest(reached)


def commit(root: Path) -> str:
    """Return the commit of the tree, followed by + if tracked files differ; - without git or a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "-"


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of a ledger. ValueError for other columns, or a kept line without a score."""
    if not path.exists():
        return []
    with decoding(path, "a ledger"):
        text = read_file(path, LEDGER_BYTES).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), **DIALECT)
        lines = list(reader)
    if text and tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{path}: columns are {reader.fieldnames}, not {COLUMNS}. Start another --ledger.")
    for number, line in enumerate(lines, 2):
        is_whole = None not in line and None not in line.values()
        if not is_whole or (line["verdict"] == "keep" and not re.fullmatch(r"\d+(\.\d+)?", line["bpb"])):
            raise ValueError(
                f"{path}, line {number}: expected {len(COLUMNS)} columns, and a bpb if it is kept"
            )
    return lines


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line, writing the header first if the file is new; a lock makes other processes wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # never write through a link
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS, **DIALECT)
        if not path.stat().st_size:
            writer.writeheader()
        writer.writerow(line)


def refuse_changes(path: Path, line: Mapping[str, Any]) -> None:
    """Raise ValueError if `line` is not comparable with the ledger's first line that has a score."""
    first = next((old for old in read(path) if old["verdict"] != "crash"), line)
    for key in FIXED:
        if line[key] != first[key]:
            raise ValueError(
                f"{key} is {line[key]}, but {first[key]} in the first line with a score of {path}: the "
                "scores are not comparable. Undo the change or start another --ledger."
            )


def is_best(bpb: float, lines: Sequence[Mapping[str, str]]) -> bool:
    """Return whether `bpb`, rounded as in a line, is below every kept line."""
    return all(round(bpb, DIGITS) < float(old["bpb"]) for old in lines if old["verdict"] == "keep")


def what_is_tried(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of a line: scoring code; task (validation text, tokenizer, windows, seed); settings.

    ValueError for a bad setting, OSError for a missing file,
    Crash if the programs cannot be parsed or imported.
    """
    try:
        scorer = scorer_hash(*(path.read_text(encoding="utf-8") for path in PROGRAMS))
        tg = trainer()
        config = tg.load_config(environ)[0]
        files = [
            tg.sha256_file(path) for path in (config.tokenizer_path, *sorted(glob.glob(config.shards("val"))))
        ]
        task = digest(files, config.eval_seq_len, config.eval_stride, config.seed)
    except (SyntaxError, AttributeError, TypeError, NameError) as error:
        raise Crash(f"the programs are broken: {error!r}") from error
    return dict(scorer=scorer, task=task, config=digest(asdict(config) | ANY_RUN))


def experiment(
    note: str, seconds: int, launcher: Sequence[str], environ: Mapping[str, str], path: Path
) -> int:
    """Train the working tree for `seconds`, append a line to the ledger at `path`, return the exit code.

    ValueError, and no line, if scorer, task or budget differ from the ledger's first line with a score.
    """
    if not note.strip() or re.search(r"[\t\r\n]", note) or seconds < 1:
        raise ValueError(f"--note {note!r}: must be one line without tabs, with --seconds at least 1")
    line = dict.fromkeys(COLUMNS, "-") | dict(note=note, budget=str(seconds), commit=commit(ROOT))
    line |= dict(date=f"{datetime.now():%Y-%m-%dT%H:%M:%S}", verdict="crash")
    line["run"] = f"one_{len(read(path)):03d}_{line['date'].replace(':', '-')}"
    environ, began = {**environ, "MAX_WALLCLOCK_SECONDS": str(seconds)}, time.monotonic()

    def watch(folder: Path) -> None:
        if time.monotonic() - began > 4 * seconds + 600:  # export or scoring hangs
            raise Crash(f"{folder}: not finished after {4 * seconds + 600} s")

    try:
        line |= what_is_tried(environ)
        refuse_changes(path, line)
        result = train(line["run"], environ, launcher, path.parent, watch)
        better = result["fits"] and result.get("legal", True) and is_best(result[METRIC], read(path))
        line |= dict(
            bpb=f"{result[METRIC]:.{DIGITS}f}",
            bytes=result["bytes_total"],
            verdict="keep" if better else "discard",
        )
    except Crash as error:
        print(f"error: {error}", file=sys.stderr)
    line["seconds"] = f"{time.monotonic() - began:.0f}"
    append(path, line)
    print(" ".join(f"{name}={value}" for name, value in line.items()))
    return 1 if line["verdict"] == "crash" else 0


if __name__ == "__main__":
    print(__doc__)
