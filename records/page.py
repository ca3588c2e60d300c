"""One self-contained HTML page from results of runs: analyze.py --html.

The page makes no request: figures, style and script are inside it, and its Content-Security-Policy allows
nothing else. Everything that comes from files (names, settings, text of documents) goes through Jinja's
autoescaping.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from report import class_label, figure_style
from runfiles import escape_lines, read_object

# isort: split
from files import check_form, decoding, read_file

DOCUMENTS = 400  # rows of a table of documents; of longer validation sets those that change the score most
EXCERPT = 2000  # characters of a document's text
SUMMARY = 70  # characters of it that show before it is unfolded
CSV_BYTES, SAMPLE_BYTES = 1 << 28, 1 << 24  # of documents.csv, of a file of samples
CLASS = {"name": str, "targets": float, "before": float, "after": float, "gain_error?": float}
COLUMNS = ("document", "first_target", "targets", "bytes", "nats", "nats_adapted")  # of documents.csv


class Cell(NamedTuple):
    """A table cell: its text, the number to sort by (None: the text), and longer text to unfold."""

    text: str
    value: float | None = None
    more: str = ""


class Table(NamedTuple):
    """A table that sorts by a click on a column head.

    `left` has the columns that are aligned left, `order` the column by which `rows` descend, from 0.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: Collection[int] = (0,)
    order: int | None = None
    caption: str = ""


class Section(NamedTuple):
    """A headed part of the page. Several `figures` (name -> SVG data URI) are shown one at a time."""

    title: str
    note: str = ""
    figures: Mapping[str, str] = {}
    tables: Sequence[Table] = ()
    texts: Mapping[str, str] = {}


def data_uri(figure: Figure) -> str:
    """Return a figure as the data URI of an SVG picture, the same for the same figure."""
    picture = io.BytesIO()
    with figure_style(), rc_context({"svg.hashsalt": "page"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()


def number(value: float | None, form: str = ".4f") -> Cell:
    """Return the cell of a number; None and numbers that are not finite: a dash."""
    known = value is not None and math.isfinite(value)
    return Cell(f"{value:{form}}", value) if known else Cell("-")


def plain_cells(rows: Iterable[Iterable[str]]) -> list[list[Cell]]:
    """Return the cells of rows of text, sorted as numbers where they are numbers."""
    found = []
    for row in rows:
        found.append([])
        for text in row:
            try:
                found[-1].append(Cell(text, float(text.replace(",", ""))))
            except ValueError:
                found[-1].append(Cell(text))
    return found


# ------------------------------------------------------------------------------------------------------------
# Sections
# ------------------------------------------------------------------------------------------------------------


def class_section(folders: Mapping[str, Path], figure: str) -> Section:
    """Return the loss by position and by class of target, of evaluations (label -> folder).

    ValueError for a distribution.json that is not one.
    """
    rows: dict[str, list[Cell]] = {}
    head = ["targets of", "number"]
    for column, (label, folder) in enumerate(folders.items()):
        head += [f"{label}: before", "adapted", "gain", "±"]
        for each in class_rows(folder):
            row = rows.setdefault(
                each["name"], [Cell(class_label(each["name"])), number(each["targets"], ",")]
            )
            row += [Cell("-")] * (2 + 4 * column - len(row))
            gain = number(each["before"] - each["after"], "+.4f")
            row += [number(each["before"]), number(each["after"]), gain, number(each.get("gain_error"))]
    note = "Nats per target. ± is one standard error of the gain, clustered by document."
    return Section("Loss by position and class", note, {"gain": figure}, [Table(head, list(rows.values()))])


def class_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the classes of distribution.json. InputError if they lack a name or a number."""
    path = folder / "distribution.json"
    content = read_object(path)
    check_form(content, {"classes": [CLASS]}, path)
    with decoding(path, "a distribution of eval_ttt.py"):
        [class_label(each["name"]) for each in content["classes"]]
    return content["classes"]


def read_documents(folder: Path) -> np.ndarray:
    """Return documents.csv of an evaluation, (documents, columns) float64. ValueError if it is not one."""
    path = folder / "documents.csv"
    with decoding(path, "the documents.csv of eval_ttt.py"):
        head, _, body = read_file(path, CSV_BYTES).decode().partition("\n")
        if tuple(head.strip().split(",")) != COLUMNS:
            raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
        found = np.loadtxt(io.StringIO(body), delimiter=",", ndmin=2).reshape(-1, len(COLUMNS))
        if not (np.abs(found) < 1e15).all():
            raise ValueError("numbers that are not below 1e15")
    return found


def gain_bpb(documents: np.ndarray) -> np.ndarray:
    """Return the gain of each document in bits per byte, 0 where it has no bytes."""
    has_bytes = documents[:, 3] > 0
    gain = (documents[:, 4] - documents[:, 5]) / math.log(2)
    return np.divide(gain, documents[:, 3], out=np.zeros(len(gain)), where=has_bytes)


def chosen_documents(documents: np.ndarray) -> np.ndarray:
    """Return which documents are listed, by descending gain in bits per byte.

    Of more than DOCUMENTS, those with the largest and the smallest gain in nats.
    """
    half, by_nats = DOCUMENTS // 2, np.argsort(documents[:, 5] - documents[:, 4], kind="stable")
    chosen = by_nats if len(by_nats) <= DOCUMENTS else np.concatenate([by_nats[:half], by_nats[-half:]])
    return chosen[np.argsort(-gain_bpb(documents[chosen]), kind="stable")]


def document_cells(documents: np.ndarray, i: int) -> list[Cell]:
    """Return the scores of a document in bits per byte: before, adapted, gain."""
    per_byte = math.log(2) * documents[i, 3] or math.nan
    before, adapted = documents[i, 4:6] / per_byte
    return [number(before), number(adapted), number(before - adapted, "+.4f")]


def document_section(
    found: Mapping[str, np.ndarray], texts: Mapping[int, str], missing: str, title: str = "Documents"
) -> Section:
    """Return the documents of one validation text with their scores, in the order of the first one's gain.

    `found` has documents.csv by label of the evaluation, `texts` the text by document, `missing` why there is
    none. ValueError if the evaluations list different documents.
    """
    first = next(iter(found.values()))
    if any(not np.array_equal(each[:, :4], first[:, :4]) for each in found.values()):
        raise ValueError(f"documents.csv lists different documents in {', '.join(found)}")
    rows, chosen = [], chosen_documents(first)
    for i in chosen.tolist():
        text = " ".join(texts.get(i, "").split())
        rows.append([number(x, ",.0f") for x in first[i, [0, 2, 3]]])
        rows[-1] += [cell for each in found.values() for cell in document_cells(each, i)]
        rows[-1].append(Cell(text[:SUMMARY] + "\u2026" * (len(text) > SUMMARY), more=texts.get(i, "")))
    note = "Bits per byte of each document, before and after adaptation. A click on a column head sorts. "
    if len(chosen) < len(first):
        note += f"Of {len(first):,} documents, those with the largest and the smallest gain in nats. "
    note += f"The text is not shown: {missing}" if missing else f"Texts end after {EXCERPT:,} characters."
    head = ["document", "targets", "bytes"]
    head += [name for label in found for name in (f"{label}: before", "adapted", "gain")]
    return Section(title, note, tables=[Table([*head, "text"], rows, (len(head),), order=5)])


def settings_section(settings: Mapping[str, Mapping[str, Any]]) -> Section:
    """Return the settings that differ between the columns (label -> settings)."""
    names = sorted({name for each in settings.values() for name in each} - {"run_id", "model_path"})
    rows = []
    for name in names:
        first, *others = (each.get(name, "-") for each in settings.values())
        if any(other != first and str(other) != str(first) for other in others):  # 1 is 1.0, and "1"
            rows.append([name.upper(), *map(str, (first, *others))])
    note = "" if rows else "None differ."
    tables = [Table(["setting", *settings], plain_cells(rows), range(len(settings) + 1))] if rows else []
    return Section("Settings that differ", note, tables=tables)


def given_section(given: Mapping[str, Any]) -> Section:
    """Return the settings that a run was given by its recipe and environment."""
    rows = plain_cells([name.upper(), str(value)] for name, value in sorted(given.items()))
    table = Table(["setting", "value"], rows, (0, 1))
    return Section(
        "Settings given", "By the recipe and the environment; all others are defaults.", tables=[table]
    )


def sample_section(folders: Mapping[str, Path]) -> Section:
    """Return what samples*.txt in the run folders (label -> folder) has."""
    texts = {}
    for label, folder in folders.items():
        for path in sorted(folder.glob("samples*.txt")):
            texts[f"{label}: {path.name}"] = read_file(path, SAMPLE_BYTES).decode(errors="replace")
    return Section("Samples", texts=texts)


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; }
body { max-width: 1280px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #ddd; }
nav a { margin-right: 1.2em; } a { color: #0b5cad; }
.note { color: #555; max-width: 60em; }
.scroll { overflow: auto; max-height: 80vh; margin: 1em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding-bottom: .3em; }
th, td { padding: .25em .7em; text-align: right; vertical-align: top; border-bottom: 1px solid #eee; }
th { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #999; white-space: nowrap; }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
.left { text-align: left; } tbody tr:hover { background: #f6f8fa; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 48em; text-align: left; margin: .4em 0; }
img { max-width: 100%; height: auto; display: block; }
.choice label { margin-right: 1em; } [hidden] { display: none; }
"""

SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0], rows = [...body.rows];
    const cell = row => row.cells[head.cellIndex], key = row => cell(row).dataset.value;
    const previous = head.getAttribute("aria-sort");
    const down = previous ? previous === "ascending" : rows.some(row => key(row) !== undefined);
    const sign = down ? -1 : 1;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x !== undefined && y !== undefined) return sign * (x - y);
      if (x === undefined && y === undefined)
        return sign * cell(a).textContent.localeCompare(cell(b).textContent);
      return x === undefined ? 1 : -1;  // rows without a number stay last
    };
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows.sort(compare));
  });
}
for (const choice of document.querySelectorAll(".choice")) {
  const figures = choice.parentElement.querySelectorAll("figure");
  const show = () => figures.forEach(f => { f.hidden = f.dataset.name !== choice.elements.by.value; });
  choice.addEventListener("change", show);
  show();
}
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src '{{ style_hash }}'; script-src '{{ script_hash }}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<h1>{{ title }}</h1>
<nav>{% for s in sections %}<a href="#s{{ loop.index }}">{{ s.title }}</a>{% endfor %}</nav>
{% for s in sections %}
<section id="s{{ loop.index }}">
<h2>{{ s.title }}</h2>
{% if s.note %}<p class="note">{{ s.note }}</p>{% endif %}
{% if s.figures|length > 1 %}<form class="choice">
{% for name in s.figures %}<label><input type="radio" name="by" value="{{ name }}"\
{% if loop.first %} checked{% endif %}> by {{ name }}</label>{% endfor %}
</form>{% endif %}
{% for name, uri in s.figures.items() %}
<figure data-name="{{ name }}"><img src="{{ uri }}" alt="{{ s.title }}: {{ name }}"></figure>
{% endfor %}
{% for t in s.tables %}
<div class="scroll"><table>
{% if t.caption %}<caption>{{ t.caption }}</caption>{% endif %}
<thead><tr>{% for name in t.head %}<th scope="col"{% if loop.index0 in t.left %} class="left"{% endif %}\
{% if loop.index0 == t.order %} aria-sort="descending"{% endif %}>\
<button type="button">{{ name }}</button></th>{% endfor %}</tr></thead>
<tbody>
{% for row in t.rows %}<tr>{% for cell in row %}\
<td{% if loop.index0 in t.left %} class="left"{% endif %}\
{% if cell.value is not none %} data-value="{{ cell.value }}"{% endif %}>\
{% if cell.more %}<details><summary>{{ cell.text }}</summary><pre>{{ cell.more }}</pre></details>\
{% else %}{{ cell.text }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
{% for name, text in s.texts.items() %}<h3>{{ name }}</h3><pre>{{ text }}</pre>{% endfor %}
</section>
{% endfor %}
<script>{{ script }}</script>
</body>
</html>
"""


def content_hash(text: str) -> str:
    """Return the source expression of an inline style or script for a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def shown(value: object) -> object:
    """Escape control characters, such as those that reverse the direction of text, in what is printed."""
    return escape_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(title: str, sections: Sequence[Section]) -> bytes:
    """Return the page as UTF-8; sections without content are left out."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=shown)
    own = {"style": Markup(STYLE), "script": Markup(SCRIPT)}
    hashes = {"style_hash": content_hash(STYLE), "script_hash": content_hash(SCRIPT)}
    used = [each for each in sections if each.note or each.figures or each.tables or each.texts]
    return environment.from_string(TEMPLATE).render(title=title, sections=used, **own, **hashes).encode()
