"""analyze.py --html: its content by an HTML5 parser, its behavior in headless Chromium."""

import json
import math
import re
import shutil
from pathlib import Path

import analyze
import html5lib
import numpy as np
import page
import pytest
from test_analyze import DOCUMENTS, MODES, said, score_modes

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, demo_data) -> dict[str, Path]:
    """Two runs with evaluations, the second of another learning rate; the first has samples."""
    base = tmp_path_factory.mktemp("runs")
    one = score_modes(base / "one", demo_data)
    two = score_modes(base / "two<b>", demo_data, {"doc_banks": "legal"}, muon_wd=0.125)
    (one / "samples.txt").write_text("sample:1 <i>plain</i>\n")
    return {"one": one, "two": two}


@pytest.fixture(scope="module")
def pages(folders, tmp_path_factory) -> dict[str, Path]:
    """The pages of the first run and of both."""
    base, both = tmp_path_factory.mktemp("pages"), list(map(str, folders.values()))
    for name, runs in (("one", both[:1]), ("both", both)):
        assert analyze.main(["--html", str(base / f"{name}.html"), *runs]) == 0
    return {name: base / f"{name}.html" for name in ("one", "both")}


def parsed(path: Path):
    """The tree of a page that a strict parser of the HTML standard accepts."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(path.read_bytes())


def cells(tree, section: str, table: int = 0) -> list[list[str]]:
    """The texts of a table's cells, of the section with this title, its head first."""
    (found,) = [each for each in tree.iter("section") if each.find("h2").text == section]
    rows = list(found.iter("table"))[table].iter("tr")
    return [["".join(cell.itertext()).strip() for cell in row] for row in rows]


def titles(tree) -> list[str]:
    return [each.find("h2").text for each in tree.iter("section")]


def test_content_of_one_run(pages, folders):
    tree = parsed(pages["one"])
    assert titles(tree) == ["Scores", "Curves", "Loss by position and class", "Documents", "Samples",
                            "Settings that differ", "Settings given"]  # fmt: skip
    _, *modes = cells(tree, "Scores", 1)
    assert [row[0] for row in modes] == ["all", "banks *", "doc_banks"]
    for name, *numbers in modes:
        scores = json.loads((folders["one"] / "eval" / name.rstrip(" *") / "eval_ttt.json").read_text())
        legal = "no" if name == "all" else "yes"
        assert (numbers[3], numbers[6]) == (f"{scores['val_bpb_ttt']:.4f}", legal)
    differing = {row[0]: row[1:] for row in cells(tree, "Settings that differ")}
    assert differing["setting"] == list(differing["TTT_MODE"]) == ["all", "banks", "doc_banks"]
    assert differing["TTT_PROTOCOL"] == ["adapt_first", "legal", "legal"] and len(differing) == 3
    assert cells(tree, "Settings given")[1:] == [["SEED", "0"]]
    distribution = json.loads((folders["one"] / "eval/all/distribution.json").read_text())["classes"]
    rows = cells(tree, "Loss by position and class")[1:]
    assert [(row[1], row[2], row[3]) for row in rows] == [
        (str(each["targets"]), f"{each['before']:.4f}", f"{each['after']:.4f}") for each in distribution
    ]
    assert "sample:1 <i>plain</i>\n" in "".join(tree.itertext())


def test_documents_have_their_scores_and_texts(pages, folders):
    tree = parsed(pages["one"])
    head, *rows = cells(tree, "Documents")
    assert head[:6] == ["document", "targets", "bytes", "all: before", "adapted", "gain"] and len(rows) == 3
    losses = {mode: np.load(folders["one"] / "eval" / mode / "nll.npy").astype(float) for mode in MODES}
    ends = np.cumsum([0, *(int(row[1]) for row in sorted(rows))])
    for row in rows:
        number, text = int(row[0]), DOCUMENTS[int(row[0])]
        assert int(row[2]) == len(text.encode())  # the tokenizer is lossless
        assert text.strip().replace("\u202e", "\\u202e") in row[-1]
        for column, mode in enumerate(("all", "banks", "doc_banks")):
            nats = losses[mode][ends[number] : ends[number + 1]].sum()
            assert float(row[4 + 3 * column]) == pytest.approx(nats / math.log(2) / int(row[2]), abs=1e-4)
            before, adapted, gain = map(float, row[3 + 3 * column : 6 + 3 * column])
            assert gain == pytest.approx(before - adapted, abs=1.01e-4)
    assert [float(row[5]) for row in rows] == sorted((float(row[5]) for row in rows), reverse=True)


def test_content_of_two_runs(pages, folders):
    tree = parsed(pages["both"])
    assert "Settings given" not in titles(tree) and tree.find("body/h1").text == "one, two<b>"
    settings = {row[0]: row[1:] for row in cells(tree, "Settings that differ")}
    labels = ["one (banks)", "two<b> (doc_banks)"]
    assert settings["setting"] == labels and settings["MUON_WD"] == ["0.04", "0.125"]
    assert settings["TTT_MODE"] == ["banks", "doc_banks"] and "TTT_LR" not in settings
    # the last legal evaluation of each; texts of the same tokens in two files are one
    heads = [name for name in cells(tree, "Documents")[0] if ":" in name]
    assert heads == [f"{label}: before" for label in labels]
    assert analyze.MODES_DIFFER in "".join(tree.itertext())
    assert len(cells(tree, "Documents")) == 4


def test_settings_whose_types_alone_differ_are_the_same():
    one, other = dict(a=1, b=1337, c="1,2", d=0.1), dict(a=1.0, b="1337", c="12", e=1)
    (table,) = page.settings_section({"one": one, "other": other}).tables
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows == [["C", "1,2", "12"], ["D", "0.1", "-"], ["E", "-", "1"]]


@pytest.mark.parametrize("name", ["one", "both"])
def test_nothing_is_loaded_and_nothing_from_files_is_markup(pages, name):
    tree = parsed(pages[name])
    links = [(e.tag, key, value) for e in tree.iter() for key, value in e.attrib.items()
             if key in ("src", "href", "srcset", "action", "data", "poster")]  # fmt: skip
    assert links and all(re.match(r"#s\d+$|data:", value) for _, _, value in links)
    assert [e.text.strip()[:12] for e in tree.iter("script")] == ['"use strict"']
    assert not [*tree.iter("b"), *tree.iter("i"), *tree.iter("base"), *tree.iter("iframe")]
    assert not [key for e in tree.iter() for key in e.attrib if key.startswith("on") or key == "style"]
    assert all(e.attrib["src"].startswith("data:image/svg+xml;base64,") for e in tree.iter("img"))
    assert "url(" not in page.STYLE and "@import" not in page.STYLE


def test_text_that_is_not_there(folders, tmp_path, capsys):
    run = Path(shutil.copytree(folders["two"], tmp_path / "run"))
    shard, out = run / "fineweb_val_000000.bin", tmp_path / "page.html"
    config = json.loads((run / "config.json").read_text())
    config["config"]["val_files"] = str(shard)
    (run / "config.json").write_text(json.dumps(config))
    content = shard.read_bytes()
    for change, message in ((content[:-2] + b"\x07\x00", "are not the scored"), (b"", "")):
        shard.write_bytes(change)
        assert said(capsys, "--html", out, run)[0] == 0
        section = next(e for e in parsed(out).iter("section") if e.find("h2").text == "Documents")
        note = section.find("p").text
        assert "The text is not shown: " in note and message in note and str(shard) in note
        assert len(cells(parsed(out), "Documents")) == 4 and not list(section.iter("details"))
    (run / "eval/doc_banks/documents.csv").write_text("document,targets\n1,2\n")
    code, text = said(capsys, "--html", out, run)
    assert code == 2 and "documents.csv of eval_ttt.py: its columns are not" in text and text.count("\n") == 1
    (run / "eval/doc_banks/documents.csv").unlink()
    (run / "eval/doc_banks/distribution.json").write_text('{"classes": [{"name": "position 0+"}]}')
    code, text = said(capsys, "--html", out, run)
    assert code == 2 and "classes[0]: targets: None, expected a number" in text and text.count("\n") == 1
    (run / "eval/doc_banks/distribution.json").unlink()
    assert said(capsys, "--html", out, run)[0] == 0
    assert titles(parsed(out)) == ["Scores", "Curves", "Settings given"]


def test_long_validation_sets_show_their_extremes():
    rng = np.random.default_rng(0)
    table = np.zeros((1000, 6))
    table[:, 0], table[:, 2], table[:, 3] = np.arange(1000), 10, 40
    table[:, 5] = rng.permutation(1000) - 500.0  # the gain in nats is minus that
    chosen = page.chosen_documents(table)
    gains = -table[chosen, 5]
    half = page.DOCUMENTS // 2
    assert sorted(gains) == [*range(-499, -499 + half), *range(501 - half, 501)]
    assert all(gains == -np.sort(-gains)) and len(set(chosen)) == 2 * half
    section = page.document_section({"a": table}, {}, "")
    assert len(section.tables[0].rows) == page.DOCUMENTS and "Of 1,000 documents" in section.note
    assert len(page.chosen_documents(table[: page.DOCUMENTS])) == page.DOCUMENTS
    table[:5, 5], table[3, 3:] = [-4, -3, 1, 0, 2], 0
    rows = page.document_section({"a": table[:5]}, {}, "").tables[0].rows
    assert [row[0].text for row in rows] == ["0", "1", "3", "2", "4"]
    assert [cell.text for cell in rows[2][3:6]] == ["-"] * 3  # no bytes, no bits per byte
    with pytest.raises(ValueError, match="different documents in a, b"):
        page.document_section({"a": table, "b": table[:5]}, {}, "")


# ------------------------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium of the system, or the one that playwright has downloaded."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as p:
        if BROWSER is None and not Path(p.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        opened = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """A function that opens a file in a browser without a network; its second value lists all requests."""
    contexts = []

    def open_page(path: Path):
        context = browser.new_context(offline=True)
        contexts.append(context)
        tab, requests, errors = context.new_page(), [], []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(error))
        tab.goto(path.as_uri())
        assert not errors
        return tab, requests

    yield open_page
    for context in contexts:
        context.close()


def column(tab, index: int) -> list[str]:
    """The texts of a column of the table of documents, from 0, from top to bottom."""
    return tab.locator(f"h2:text-is('Documents') ~ .scroll tbody td:nth-child({index + 1})").all_inner_texts()


def test_page_renders_and_sorts(pages, visit):
    tab, requests = visit(pages["one"])
    assert requests == [pages["one"].as_uri()]
    heads = tab.locator("h2:text-is('Documents') ~ .scroll th")
    names = [name.rstrip(" ▲▼") for name in heads.all_inner_texts()]
    for index in (0, 1, 5):
        numbers = sorted((float(text.replace(",", "")) for text in column(tab, index)), reverse=True)
        for wanted, state in ((numbers, "descending"), (numbers[::-1], "ascending")):
            if heads.nth(index).get_attribute("aria-sort") != state:
                heads.nth(index).get_by_role("button").click()
            assert [float(text.replace(",", "")) for text in column(tab, index)] == wanted, names[index]
            states = [head.get_attribute("aria-sort") for head in heads.all()]
            assert states == [state if at == index else None for at in range(len(names))]
    heads.last.get_by_role("button").click()  # texts: ascending first
    texts = [text.strip() for text in column(tab, len(names) - 1)]
    assert [text[:3] for text in texts] == ["<sc", "A s", "The"]
    pictures = tab.locator("img").evaluate_all("all => all.map(i => [i.complete, i.naturalWidth > 300])")
    assert len(pictures) == 4 and all(map(all, pictures))


def test_axis_of_the_curves_is_a_choice(pages, visit):
    tab, _ = visit(pages["both"])
    for name in ("steps", "seconds", "tokens", "steps"):
        tab.get_by_label(f"by {name}").check()
        shown = tab.locator("figure:visible").evaluate_all("all => all.map(f => f.dataset.name)")
        assert shown == [name, "gain"]


def test_text_of_documents_does_not_run(pages, tmp_path, visit):
    """Escaping alone keeps it from running, and so does the page's policy alone."""
    content, policy = pages["one"].read_text(), re.compile(r"<meta http-equiv=[^>]+>")
    assert policy.search(content)
    without, planted, both = (tmp_path / name for name in ("without.html", "planted.html", "both.html"))
    without.write_text(policy.sub("", content))
    planted.write_text(content.replace("<nav>", DOCUMENTS[1] + "<nav>"))
    both.write_text(policy.sub("", planted.read_text()))
    for path, runs in ((pages["one"], False), (without, False), (planted, False), (both, True)):
        tab, _ = visit(path)
        assert tab.evaluate("window.ran !== undefined") == runs, path.name
        assert (tab.title() == "ran") == runs
    tab, _ = visit(pages["one"])
    details = tab.locator("details").filter(has_text="<script>window.ran")
    assert not details.locator("pre").is_visible()
    details.locator("summary").click()
    assert details.locator("pre").inner_text() == DOCUMENTS[1]
