"""Size and shape of train_gpt.py and eval_ttt.py: a table of counts, then what was counted.

    python tests/shape.py           this checkout
    python tests/shape.py FOLDER    another checkout, for a comparison

tests/test_shape.py holds each count to a budget. Statements come from ast, comments from tokenize, and uses
of global names from compiled bytecode, because the compiler resolves Python's scopes. The measured code is
never run, so torch is not needed.
"""

from __future__ import annotations

import ast
import dis
import io
import re
import sys
import tokenize
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("train_gpt.py", "eval_ttt.py")
MODULES = {"tg": "train_gpt.py", "train_gpt": "train_gpt.py", "ev": "eval_ttt.py", "eval_ttt": "eval_ttt.py"}
MAX_LINE, MAX_NAMES, MAX_FUNCTION = 110, 3, 60
LONGER = {"train_step": 120, "train": 120, "main": 120}  # read from top to bottom in one screen, DESIGN 4
RULE = re.compile(r"# -{20,}")
FORMATTER = re.compile(r"#\s*fmt:\s*(off|skip|on)\b")
GLOBAL_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


class Use(NamedTuple):
    """A global name, or an attribute of an imported module of ours, that the code at a line reads."""

    name: str
    line: int
    user: str  # the outermost function or method around it; empty: no function
    file: str  # of the module whose attribute it is; empty: a global name


class Source:
    """A Python file: its lines, statements, comments by line, and sections, which boxes of comments title."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self.lines, self.tree = text.splitlines(), ast.parse(text)
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
        full = {n for n in self.comments if self.lines[n - 1].lstrip().startswith("#")}
        rules = {n for n in full if RULE.fullmatch(self.comments[n])}
        boxes = sorted(n for n in rules if n + 1 in full and n + 2 in rules)
        self.starts = [0, *boxes]
        self.titles = ["header", *(self.comments[n + 1].strip("# ") for n in boxes)]
        marks = {n for n in full if FORMATTER.match(self.comments[n])}
        self.prose = full - marks - {n + i for n in boxes for i in range(3)}  # lines of nothing but a comment

    def section(self, line: int) -> int:
        """Index of the section that a line is in; 0: before the first title."""
        return bisect_right(self.starts, line) - 1

    @cached_property
    def code(self) -> CodeType:
        """The compiled file. Annotations stay strings there, so a name in one is not a use."""
        return compile(self.text, self.name, "exec", annotations.compiler_flag, dont_inherit=True)

    @cached_property
    def uses(self) -> list[Use]:
        return list(uses(self.code))

    @cached_property
    def statement(self) -> dict[int, ast.stmt]:
        """The innermost statement of each line."""
        found = {}
        for node in ast.walk(self.tree):  # breadth first: inner statements come last
            if isinstance(node, ast.stmt):
                found.update(dict.fromkeys(range(node.lineno, node.end_lineno + 1), node))
        return found


class Measure(NamedTuple):
    """A count, and a line of text for each thing that was counted."""

    value: float
    found: Sequence[str] = ()


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------


def instructions(code: CodeType) -> Iterator[tuple[int, str, str]]:
    """Line, operation and name of each bytecode instruction; the name is empty where the argument is none."""
    starts, line = dict(dis.findlinestarts(code)), code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = starts.get(instruction.offset) or line
        yield line, instruction.opname, instruction.argval if isinstance(instruction.argval, str) else ""


def uses(code: CodeType, scope: str = "", user: str = "") -> Iterator[Use]:
    """Every Use in compiled code and in all that it contains. scope: prefix of the classes around it."""
    steps, loaded = list(instructions(code)), ""
    in_class = scope and not code.co_flags & CO_OPTIMIZED
    own = {name for _, op, name in steps if op == "STORE_NAME"} if in_class else ()
    for line, op, name in steps:
        if op in ("LOAD_ATTR", "LOAD_METHOD") and loaded in MODULES:
            yield Use(name, line, user, MODULES[loaded])
        elif op in GLOBAL_LOADS and name not in own:
            yield Use(name, line, user, "")
        loaded = name if op.startswith("LOAD_") else ""
    for inner in filter(lambda each: isinstance(each, CodeType), code.co_consts):
        if not inner.co_flags & CO_OPTIMIZED:
            yield from uses(inner, f"{scope}{inner.co_name}.", user)
        else:  # a lambda or comprehension outside functions is no user of its own
            named = f"{scope}{inner.co_name}" if not inner.co_name.startswith("<") else ""
            yield from uses(inner, scope, user or named)


def forward_references(source: Source) -> Measure:
    """Names that a section uses and a later section defines, each once a section."""
    defined = {}
    for line, op, name in instructions(source.code):
        if op == "STORE_NAME":
            defined.setdefault(name, line)
    found = {}
    for use in source.uses:
        here, there = source.section(use.line), source.section(defined.get(use.name, 0))
        if not use.file and there > here:
            text = f"{source.titles[here]} uses {use.name} of {source.titles[there]}"
            found.setdefault(text, f"line {use.line}: {text}")
    return Measure(len(found), list(found.values()))


def callers(source: Source, files: Sequence[Source]) -> dict[str, set[tuple[str, str]]]:
    """For each name of source: the file and function of every use in files; no function: the empty string."""
    found = defaultdict(set)
    for file in files:
        imports = [node for node in ast.walk(file.tree) if isinstance(node, ast.ImportFrom)]
        aliases = [each for node in imports if MODULES.get(node.module) == source.name for each in node.names]
        names = {each.asname or each.name: each.name for each in aliases}
        for use in file.uses:
            if use.file == source.name or (file is source and not use.file):
                found[use.name].add((file.name, use.user))
            elif not use.file and use.name in names:
                found[names[use.name]].add((file.name, use.user))
    return found


def single_callers(source: Source, files: Sequence[Source]) -> tuple[Measure, Measure]:
    """Module-level functions of source that exactly one function of files uses, and their lines in all."""
    users, found, lines = callers(source, files), [], 0
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef):
            others = users[node.name] - {(source.name, node.name)}
            if len(others) == 1 and (caller := min(others))[1]:
                place = caller[1] if caller[0] == source.name else ": ".join(caller)
                found.append(f"line {node.lineno}: {node.name}, {length(node)} lines, for {place}")
                lines += length(node)
    return Measure(len(found), found), Measure(lines)


# ------------------------------------------------------------------------------------------------------------
# Statements, lines and comments
# ------------------------------------------------------------------------------------------------------------


def length(node: ast.stmt) -> int:
    return node.end_lineno - node.lineno + 1


def class_body(source: Source, name: str) -> list[ast.stmt] | None:
    """Statements of a module-level class; None where there is none of this name."""
    classes = (node for node in source.tree.body if isinstance(node, ast.ClassDef))
    return next((node.body for node in classes if node.name == name), None)


def settings(source: Source) -> Measure | None:
    """Fields of Config; None in a file that defines no Config."""
    body = class_body(source, "Config")
    return None if body is None else Measure(sum(isinstance(node, ast.AnnAssign) for node in body))


def functions(node: ast.AST, scope: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Functions and methods below a node, inner ones too, by their qualified names."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f"{scope}{child.name}" if named else ""
        if named and not isinstance(child, ast.ClassDef):
            yield name, child
        yield from functions(child, f"{name}." if named else scope)


def longest(source: Source) -> list[tuple[int, str]]:
    """Lines and name of each function, longest first; signature and docstring count, decorators do not."""
    return sorted(((length(node), name) for name, node in functions(source.tree)), reverse=True)


def long_functions(source: Source) -> Measure:
    too_long = [each for each in longest(source) if each[0] > LONGER.get(each[1], MAX_FUNCTION)]
    return Measure(len(too_long), [f"{lines} lines: {name}" for lines, name in too_long])


def long_lines(source: Source) -> Measure:
    return Measure(sum(len(line) > MAX_LINE for line in source.lines))


def width(target: ast.expr) -> int:
    """How many names, attributes or items an assignment's target sets."""
    return sum(map(width, target.elts)) if isinstance(target, (ast.Tuple, ast.List)) else 1


def wide_assignments(source: Source) -> tuple[Measure, Measure]:
    """Assignments to more than MAX_NAMES targets: of values side by side, and of the parts of one value."""
    packed, unpacked = [], []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assign) and sum(map(width, node.targets)) > MAX_NAMES:
            several = len(node.targets) > 1 or isinstance(node.value, (ast.Tuple, ast.List))
            line = source.lines[node.lineno - 1].strip()
            (packed if several else unpacked).append(f"line {node.lineno}: {line}")
    return Measure(len(packed), packed), Measure(len(unpacked), unpacked)


def formatted_by_hand(source: Source) -> Measure:
    """`fmt: off` and `fmt: skip` around anything but a table: one name = a literal, or a field of Config."""
    fields, found = class_body(source, "Config") or [], []

    def is_table(node: ast.stmt) -> bool:
        if isinstance(node, ast.AnnAssign) and node in fields:
            return True
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        literal = isinstance(getattr(node, "value", None), (ast.Dict, ast.Tuple, ast.List, ast.Set))
        return literal and isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(target, ast.Name)

    marks = {n: match[1] for n, comment in source.comments.items() if (match := FORMATTER.search(comment))}
    for line, kind in marks.items():
        until = min((n for n in marks if n > line and marks[n] == "on"), default=len(source.lines) + 1)
        lines = {"off": range(line, until), "skip": [line], "on": []}[kind]
        code = [n for n in lines if not re.match(r"\s*(#|$)", source.lines[n - 1])]
        if not all(is_table(source.statement[n]) for n in code):
            found.append(f"line {line}: {source.lines[line - 1].strip()}")
    return Measure(len(found), found)


def comments_per_100_lines(source: Source) -> Measure:
    """Full-line comments, without title boxes and marks for the formatter, to one decimal."""
    return Measure(round(100 * len(source.prose) / len(source.lines), 1))


def bare_sections(source: Source) -> Measure:
    """Titles of sections without a comment of at least two lines right behind the title box."""
    found = []
    for start, title in zip(source.starts[1:], source.titles[1:], strict=True):
        below = range(start + 3, len(source.lines) + 1)
        first = next((n for n in below if source.lines[n - 1].strip()), 0)
        if not {first, first + 1} <= source.prose:
            found.append(title)
    return Measure(len(found), found)


# ------------------------------------------------------------------------------------------------------------
# Table
# ------------------------------------------------------------------------------------------------------------


def measure(source: Source, files: Sequence[Source]) -> dict[str, Measure | None]:
    """All measures of a file by name. files: those whose functions count as callers, source among them."""
    helpers, helper_lines = single_callers(source, files)
    packed, unpacked = wide_assignments(source)
    return {
        "lines": Measure(len(source.lines)),
        "settings": settings(source),
        "long functions": long_functions(source),
        "forward references": forward_references(source),
        "one-caller helpers": helpers,
        "lines of one-caller helpers": helper_lines,
        f"lines over {MAX_LINE} characters": long_lines(source),
        f"packed assignments of over {MAX_NAMES} names": packed,
        f"unpacked assignments of over {MAX_NAMES} names": unpacked,
        "fmt: off or skip outside tables": formatted_by_hand(source),
        "comments per 100 lines": comments_per_100_lines(source),
        "sections without an opening comment": bare_sections(source),
    }


def read_sources(root: Path = ROOT) -> list[Source]:
    """The shipped programs first, then the tools that call them."""
    tools = sorted(path for folder in ("records", "data") for path in (root / folder).glob("*.py"))
    names = [*SHIPPED, *(path.relative_to(root).as_posix() for path in tools)]
    return [Source(name, (root / name).read_text(encoding="utf-8")) for name in names]


def main(root: Path) -> None:
    files = read_sources(root)
    shipped = files[: len(SHIPPED)]
    measured = [measure(source, files) for source in shipped]
    print(f"{'':44}", *(f"{name:>13}" for name in SHIPPED))
    for name in measured[0]:
        print(f"{name:44}", *(f"{row[name].value if row[name] else '-':>13}" for row in measured))
    for source, row in zip(shipped, measured, strict=True):
        print(f"\n{source.name}\n  ten longest functions")
        print(*(f"    {lines} lines: {name}" for lines, name in longest(source)[:10]), sep="\n")
        for name, each in row.items():
            if each and each.found:
                print(f"  {name}", *(f"    {text}" for text in each.found), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
