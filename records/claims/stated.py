"""Compare the numbers that a page states, in sentences and tables, with numbers derived elsewhere.

Numbers agree within half a unit of the last printed digit. Line breaks and Markdown's emphasis do not matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.special import stdtr, stdtrit

NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
Cell = float | str | Sequence[float] | None  # a number, text, numbers in their order; None: not compared


class Claim(NamedTuple):
    """A sentence, a table or a cell of a page, and what the kept files give."""

    page: str
    what: str
    stated: str
    derived: str
    agrees: bool


def agrees(stated: str, derived: float) -> bool:
    """Return whether a printed number is `derived` to within half a unit of its last digit."""
    digits, _, exponent = stated.replace(",", "").partition("e")
    scale = 10.0 ** int(exponent or 0)
    unit = scale * 10.0 ** -len(digits.partition(".")[2])
    return abs(float(digits) * scale - derived) <= 0.5 * unit * (1 + 1e-6) + 1e-14 * abs(derived)


def shown(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


class Page:
    """A page, and the claims that were made about it."""

    def __init__(self, path: str, text: str):
        self.path, self.text = path, text
        if path.endswith(".env"):  # the sentences of its comments
            self.text = "\n".join(re.findall(r"(?m)^# (.*)", text))
        self.claims: list[Claim] = []
        self.spans: list[tuple[int, int]] = []  # what the claims cover

    def add(self, what: str, stated: str, derived: str, same: bool) -> None:
        self.claims.append(Claim(self.path, what, stated, derived, same))

    def says(self, sentence: str, *values: float, nth: int | None = None) -> None:
        """Compare the numbers at {} in a sentence, where it stands or at its nth place; ...: any words."""
        pattern = r"\s+".join(map(re.escape, sentence.split())).replace(r"\{\}", f"({NUMBER})")
        pattern = pattern.replace(r"\.\.\.", r"[^|]{1,150}?")
        found = list(re.finditer(pattern, self.text))
        found = found if nth is None else found[nth : nth + 1]
        if not found:
            self.add(sentence, "not on the page", shown(values), False)
        for match in found:
            self.spans.append(match.span())
            same = len(values) == len(match.groups()) and all(map(agrees, match.groups(), values))
            self.add(sentence, ", ".join(match.groups()), shown(values), same)

    def shows(self, index: int, rows: dict[Any, Sequence[Cell]], keys: int = 1) -> None:
        """Compare the table with this index, cell by cell; rows are named by their first `keys` cells."""
        table = list(re.finditer(r"(?m)(?:^\|.*\n?)+", self.text))[index]
        self.spans.append(table.span())
        lines = [[re.sub(r"[*`]|&emsp;", "", cell).strip() for cell in line.split("|")[1:-1]]
                 for line in table[0].splitlines()]  # fmt: skip
        head, stated = lines[0], {tuple(line[:keys]): line[keys:] for line in lines[2:]}
        wanted = {key if isinstance(key, tuple) else (key,): cells for key, cells in rows.items()}
        title, wrong, count = " | ".join(head[: keys + 2]), [], 0
        for key in {**wanted, **stated}:
            if len(wanted.get(key, ())) != len(stated.get(key, ())):
                wrong.append((key, "", *(f"{len(cells.get(key, ()))} cells" for cells in (stated, wanted))))
                continue
            for name, cell, value in zip(head[keys:], stated[key], wanted[key], strict=True):
                numbers = re.findall(NUMBER, cell)
                if isinstance(value, str):
                    same, derived = cell == value, value
                else:
                    given = [value] if isinstance(value, int | float) else value
                    same = given is None or (len(numbers) == len(given) and all(map(agrees, numbers, given)))
                    derived = shown(given or ())
                count += 0 if value is None else len(numbers)
                if not same:
                    wrong.append((key, name, cell, derived))
        self.add(
            f"table {title}", f"{count} numbers", f"{len(wrong)} differ" if wrong else "the same", not wrong
        )
        for key, name, cell, derived in wrong:
            self.add(" | ".join((title, *key, name)), cell, derived, False)

    def unclaimed(self) -> Iterator[str]:
        """Yield the lines with a number that no claim covers."""
        start = 0
        for line in self.text.splitlines(keepends=True):
            places = [start + match.start() for match in re.finditer(r"(?<![\w#/_.,-])\d", line)]
            if any(not any(first <= place < end for first, end in self.spans) for place in places):
                yield line.strip()
            start += len(line)


class Pages:
    """The pages and the kept files below a folder."""

    def __init__(self, root: Path):
        self.root = root
        self.opened: dict[str, Page] = {}
        self.json = cache(lambda name: json.loads((root / "records" / f"{name}.json").read_text()))

    def page(self, path: str) -> Page:
        if path not in self.opened:
            self.opened[path] = Page(path, (self.root / path).read_text())
        return self.opened[path]


class Paired(NamedTuple):
    """Mean difference over seeds, half of its 95 % interval, p; effect with power 0.8 at p < 0.01."""

    mean: float
    half: float
    p: float
    visible: float


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    df, error = len(gaps) - 1, stdev(gaps) / len(gaps) ** 0.5
    p = float(2 * stdtr(df, -abs(mean(gaps)) / error))
    return Paired(
        mean(gaps), float(stdtrit(df, 0.975)) * error, p, float(stdtrit(df, 0.995) + stdtrit(df, 0.8)) * error
    )
