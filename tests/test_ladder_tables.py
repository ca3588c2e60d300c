"""What the ladder's page derives from kept results, against calculations of other kinds."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

sys.path += [str(ROOT / "records/ladder"), str(ROOT / "records/claims")]
import claims_ladder
import ideas
import ladder
import meta
import stated
import tables

SIZE = np.array([100, 300, 50, 4000, 900, 1200, 70, 800])  # bytes of eight documents


def kept_run(path, gains, rng, noise=1.0):
    """A kept file in which each score is `none` less its gain, in bpb of every document, and noise."""
    none = 0.9 * SIZE + rng.normal(0, noise, len(SIZE))
    scores = {}
    for name, gain in {"none": 0.0, **gains}.items():
        nats = none - gain * math.log(2) * SIZE
        by_position = np.append(np.full(len(ladder.POSITIONS) - 1, nats.sum() / 10), 0.0)
        score = dict(bpb=nats.sum() / math.log(2) / SIZE.sum(), seconds=2.0)
        scores[name] = score | dict(nats_by_position=by_position.tolist(), nats_by_document=nats.tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(rates={}, bytes_by_document=SIZE.tolist(), sha256_text="same", scores=scores,
                   targets_by_position=[10] * len(ladder.POSITIONS))  # fmt: skip
    path.write_text(json.dumps(content))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Rungs whose gains of `slots` are a power law, 2 P^-0.2 t^-0.3, without noise; and all cells of meta."""
    folder = tmp_path / "records/ladder/kept"
    for module in (ladder, meta, tables):
        monkeypatch.setattr(module, "KEPT", folder)
    rng = np.random.default_rng(0)
    for name, rung in ladder.RUNGS.items():
        gain = 2 * rung.parameters**-0.2 * rung.tokens_per_parameter**-0.3
        gains = dict.fromkeys((*tables.CONTROLS, "mixture", "chunks", "adapters"), 0.001) | dict(slots=gain)
        gains |= {"none, adapters": 0.0, "none, chunks": 0.0}
        for seed in rung.seeds:
            for part in ("report", "mixture"):
                kept_run(folder / f"{name}_seed{seed}/{part}.json", gains, rng)
        (folder / f"{name}_rates.json").write_text(json.dumps({f: {"0.01": 1.0} for f in tables.FORMS}))
    for seed in ladder.RUNGS[ideas.RUNG].seeds:
        kept_run(folder / f"{ideas.RUNG}_seed{seed}/report_ideas.json", dict(slots=0.1, twice=0.12), rng)
    for number, arm in enumerate(meta.ARMS):
        for seed in meta.SEEDS:
            gains = dict(slots=0.1 + 0.01 * number, factors=0.2 + 0.01 * number)
            kept_run(folder / meta.run_id(arm, seed) / "report.json", gains, np.random.default_rng(seed))
    return folder


def test_interval_is_a_t_test_where_one_side_does_not_vary():
    seeds = np.array([0.02, 0.03, 0.05])
    alike = np.outer(seeds, SIZE) * math.log(2)  # documents have the same bpb
    found = tables.interval(alike, SIZE)
    low, high = stats.t.interval(0.95, 2, seeds.mean(), stats.sem(seeds))
    assert found == pytest.approx((seeds.mean(), (high - low) / 2), rel=1e-9)
    equal = np.full(8, 10)  # documents of equal size, whose mean is the score; seeds are alike
    documents = np.array([0.1, 0.2, 0.3, 0.1, 0.5, 0.4, 0.2, 0.2])
    found = tables.interval(np.tile(documents * equal * math.log(2), (3, 1)), equal)
    low, high = stats.t.interval(0.95, 7, documents.mean(), stats.sem(documents))
    assert found == pytest.approx((documents.mean(), (high - low) / 2), rel=1e-9)


def test_interval_covers_at_its_rate():
    """Differences of 3 seeds and 60 documents with both kinds of noise: 95 % of intervals hold the mean."""
    rng = np.random.default_rng(1)
    size, hits, draws = np.full(60, 100), 0, 2000
    for _ in range(draws):
        noise = rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.2, 60) + rng.normal(0, 0.05, (3, 60))
        found = tables.interval((0.1 + noise) * size * math.log(2), size)
        hits += abs(found.mean - 0.1) < found.half
    assert 0.93 < hits / draws < 0.995  # never too narrow; the sum of both variances is a little too wide


def test_prediction_finds_a_power_law(kept):
    gains = {name: tables.gain(tables.of_rung(name, "report"), "slots").mean for name in ladder.RUNGS}
    middle, low, high = tables.predicted(gains, 27e6, 200)
    assert middle == pytest.approx(2 * 27e6**-0.2 * 200**-0.3, rel=1e-6) and low <= middle <= high
    noisy = {name: value * factor for (name, value), factor in
             zip(gains.items(), (1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.1), strict=True)}  # fmt: skip
    design = np.array([tables.features(ladder.RUNGS[n].parameters, ladder.RUNGS[n].tokens_per_parameter)
                       for n in noisy])  # fmt: skip
    at = np.array(tables.features(27e6, 200))
    hat = np.linalg.pinv(design)
    y = np.log(list(noisy.values()))
    spread = math.sqrt(((y - design @ (hat @ y)) ** 2).sum() / 4)
    half = stats.t.ppf(0.975, 4) * spread * math.sqrt(1 + ((at @ hat) ** 2).sum())
    middle, low, high = tables.predicted(noisy, 27e6, 200)
    assert (math.log(low), math.log(middle), math.log(high)) == pytest.approx(
        (at @ hat @ y - half, at @ hat @ y, at @ hat @ y + half), rel=1e-6
    )


def test_page_has_every_comparison(kept):
    text = tables.make_report()
    for line in ("deployed - longer, both with factors |", "deployed |", "pr1019", "gain of context x4"):
        assert line in text
    row = next(line for line in text.splitlines() if "deployed - control, no factors" in line)
    assert "-0.0100 ± 0.0000" in row  # arms are in the order plain, longer, control, deployed
    by_plan = next(line.split("|") for line in text.splitlines() if "pr1019 |" in line and " 89 |" in line)
    assert [cell.strip() for cell in by_plan[3:6]] == ["276", "882", "825"]  # as plan prints it
    tables.plot(kept / "plot.png")
    assert (kept / "plot.png").stat().st_size > 10_000


def test_texts_that_differ_are_refused(kept):
    path = kept / "0.1M_20_seed42/report.json"
    path.write_text(path.read_text().replace('"same"', '"other"'))
    with pytest.raises(ValueError, match="not the same text"):
        tables.of_rung("0.1M_20", "report")


def test_a_script_of_its_own_derives_the_same_page(kept):
    """With noise over seeds and documents in every score; and a changed digit is found."""
    rng = np.random.default_rng(2)
    for path in sorted(kept.glob("*/*.json")):
        content = json.loads(path.read_text())
        for score in content["scores"].values():
            nats = (
                np.array(score["nats_by_document"]) * rng.normal(1, 0.003, len(SIZE)) * rng.normal(1, 0.001)
            )
            score |= dict(nats_by_document=nats.tolist(), bpb=nats.sum() / math.log(2) / SIZE.sum(),
                          seconds=rng.uniform(1, 9))  # fmt: skip
        path.write_text(json.dumps(content))
    root, report = kept.parents[2], kept.parents[2] / claims_ladder.REPORT
    report.write_text(text := tables.make_report())
    claims = page_claims(root)
    assert [claim for claim in claims if not claim.agrees] == []
    numbers = [int(claim.stated.split()[0]) for claim in claims]
    assert len(claims) == 12 and min(numbers) >= 6 and sum(numbers) > 300
    for section in (
        "Gains on the report text",
        "Controls on",
        "Meta-learning",
        "Prediction from the report",
        "Ideas",
    ):
        first = text.index(f"## {section}")
        last = text[: text.find("##", first + 5) % len(text)].rstrip()
        digit = max(n for n, letter in enumerate(last) if letter.isdigit())
        report.write_text(text[:digit] + str((int(text[digit]) + 5) % 10) + text[digit + 1 :])
        assert any(not claim.agrees for claim in page_claims(root)), section


def page_claims(root):
    pages = stated.Pages(root)
    claims_ladder.ladder(pages)
    return pages.page(claims_ladder.REPORT).claims


def test_the_last_attempt_may_be_missing_and_no_other_arm(kept):
    def cells() -> list[list[str]]:
        lines = (line.split("|") for line in tables.meta_table("report").splitlines() if "---" not in line)
        return [[cell.strip() for cell in line] for line in lines]

    whole = cells()
    (kept / meta.run_id("horizon", meta.SEEDS[-1]) / "report.json").unlink()
    without = [row for row in whole if not any("horizon" in cell for cell in row)]
    assert cells() == without and len(without) == len(whole) - 2
    (kept / meta.run_id("control", meta.SEEDS[0]) / "report.json").unlink()
    assert tables.meta_table("report") == ""
