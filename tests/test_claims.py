"""Every number of the pages is what the kept files give; a changed page or a changed file is named."""

import math
import re
import sys
from pathlib import Path

import claims
import numpy as np
import pytest
import stated
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats


def wrong(root: Path) -> list[stated.Claim]:
    return [claim for page in claims.check(root).opened.values() for claim in page.claims if not claim.agrees]


def altered(root: Path, path: str, change) -> Path:
    """Return a copy of the project below `root`, all links but the file at `path`, whose text is changed."""
    here, there = ROOT, root
    for name in Path(path).parts:
        for entry in here.iterdir():
            if entry.name != name:
                (there / entry.name).symlink_to(entry)
        here, there = here / name, there / name
        if here.is_dir():
            there.mkdir()
    text = change(here.read_text())
    assert text != here.read_text()
    there.write_text(text)
    return root


def test_every_claim_agrees(capsys, monkeypatch):
    """By the command itself; no page of a benchmark is without claims."""
    monkeypatch.setattr(sys, "argv", ["claims.py"])
    assert claims.main() == 0
    said = capsys.readouterr().out
    assert re.search(r"\n\d{3} claims, 0 of them differ\n$", said)
    pages = {*(ROOT / "records/benchmarks").glob("*.md"), *(ROOT / "records/meta_learning").glob("*.md")}
    for page in {"README.md", "records/legality.md", *(str(page.relative_to(ROOT)) for page in pages)}:
        assert f"\n{page} " in said, page
    monkeypatch.setattr(sys, "argv", ["claims.py", "--unclaimed"])
    assert claims.main() == 0
    assert "python3` (3.10 to 3.13)" in capsys.readouterr().out


BENCHMARKS, META = "records/benchmarks/2026-11-", "records/meta_learning/"
CHANGES = {  # file, what is replaced, by what, and what is said of it: page and claim
    "a digit of a sentence": ("README.md", "takes 616 ms", "takes 617 ms", "README.md", "takes {} ms"),
    "a digit of a table": (f"{BENCHMARKS}27_coders_cpu.md", "| 14,210,366 |", "| 14,210,367 |",
                           f"{BENCHMARKS}27_coders_cpu.md", "| ans | 26.0 M Gaussian codes, bytes"),
    "a row that is gone": (f"{META}report.md", "| none | doc_lora | 800 + 0 | 91 |", "",
                           f"{META}report.md", "none | doc_lora"),
    "a sentence that is gone": ("records/legality.md", "1.7 hours of one H100", "hours of one H100",
                                "records/legality.md", "{} hours of one H100"),
    "a sentence of a recipe": ("records/recipes/ours.env", "0.70 to 0.75", "0.70 to 0.76",
                               "records/recipes/ours.env", "two-sided scales and ANS"),
    "a kept score": (f"{META}kept/report/control_seed203/doc_banks/eval_ttt.json", '"val_bpb_ttt": 2.2',
                     '"val_bpb_ttt": 2.3', f"{META}report.md", "control | doc_banks | adapted"),
    "a kept time": (f"{BENCHMARKS}27_gpu_h100.json", '"ms_per_step": 616.', '"ms_per_step": 618.',
                    "README.md", "takes {} ms"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named(name, tmp_path):
    path, old, new, page, claim = CHANGES[name]
    found = wrong(altered(tmp_path, path, lambda text: text.replace(old, new, 1)))
    assert [row for row in found if row.page == page and claim in row.what]
    assert "kept" in name or {row.page for row in found} == {page}


def test_the_command_fails(tmp_path, capsys, monkeypatch):
    root = altered(tmp_path, "README.md", lambda text: text.replace("1.3828 sliding", "1.3829 sliding"))
    monkeypatch.setattr(sys, "argv", ["claims.py"])
    monkeypatch.setattr(claims, "__file__", str(root / "records/claims/claims.py"))
    monkeypatch.setattr(Path, "resolve", lambda path: path)  # links lead to the real pages
    assert claims.main() == 1
    assert re.search(r"1\.3829.* 1\.3828\d.*DIFFERS", capsys.readouterr().out)


@given(st.floats(-1e7, 1e7).map(lambda value: round(value, 9)), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_numbers_agree_as_printed(value, digits):
    """As rounded by Python, and not two units of the last digit beside it."""
    assert stated.agrees(f"{value:,.{digits}f}", value)
    assert stated.agrees(f"{value:.{digits}e}", value)
    assert not stated.agrees(f"{round(value, digits) + 2 * 10.0**-digits:.{digits}f}", value)
    assert not stated.agrees("0.50", math.nan)


def test_a_page_by_hand():
    page = stated.Page(
        "page", "It takes **1,234 ms**, or\n2e-3 h.\n\n| a | b |\n|---|---:|\n| `x` | 1.5 (3) |\n"
    )
    page.says("takes **{} ms**, or {} h", 1234.4, 0.0024)
    page.shows(0, {"x": [[1.46, 3]]})
    assert [claim.agrees for claim in page.claims] == [True, True]
    assert list(page.unclaimed()) == []
    for rows in ({"x": [[1.56, 3]]}, {"x": [[1.46]]}, {"x": []}, {"y": [1]}, {}, {"x": ["1.5 (4)"]}):
        page.claims.clear()
        page.shows(0, rows)
        assert not page.claims[0].agrees, rows
    page.claims.clear()
    page.says("takes {} s", 1)
    page.says("takes **{} ms**", 1234, 5)
    assert [claim.agrees for claim in page.claims] == [False, False]


def test_a_paired_comparison():
    """Against scipy's tests; the visible effect is found by four of five experiments."""
    ours, theirs = np.array([1.1, 1.4, 0.9, 1.6, 1.3]), np.array([1.0, 1.2, 0.8, 1.3, 1.3])
    found, known = stated.paired(ours, theirs), stats.ttest_1samp(ours - theirs, 0.0)
    interval = known.confidence_interval(0.95)
    assert found.p == pytest.approx(known.pvalue)
    assert [found.mean - found.half, found.mean + found.half] == pytest.approx([*interval])
    draws = np.random.default_rng(0).normal(found.visible, (ours - theirs).std(ddof=1), (20_000, 5))
    assert 0.7 < (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.01).mean() < 0.9
