"""What the README says was measured is what the kept results say."""

import importlib.util
import json
import re
from statistics import mean, stdev

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

ROWS = {
    "levers": r"`demo.env`, everything on",
    "plain": "plain transformer, as many parameters",
    "narrow": "plain transformer, the same block matrices",
}


@pytest.mark.parametrize("arm", ROWS)
def test_the_table_of_the_readme(arm):
    kept = json.loads((ROOT / "records/benchmarks/2026-11-20_trainer_cpu.json").read_text())
    runs = [run for run in kept["runs"] if run["run"].startswith(arm)]
    assert sorted(run["seed"] for run in runs) == [42, 1337, 2025]
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {ROWS[arm]}")]
    numbers = [float(text.replace(",", "")) for text in re.findall(r"[\d,]+\.?\d*", row.split("|", 2)[2])]
    keys = ("model_params", "steps", "bytes_model", "val_bpb_roundtrip", "val_bpb_sliding")
    expected = [round(mean(run[key] for run in runs), 4 if "bpb" in key else 0) for key in keys]
    evaluated = json.loads((ROOT / "records/benchmarks/2026-11-20_ttt_cpu.json").read_text())["runs"]
    adapted = [run["val_bpb_ttt"] for run in evaluated if run["run"].startswith(arm)]
    spreads = [stdev(run["val_bpb_sliding"] for run in runs), mean(adapted), stdev(adapted)]
    assert numbers == [*expected, *(round(value, 4) for value in spreads)] and len(adapted) == 3
    assert max(run["train_seconds"] for run in runs) <= 120


FORMS = {  # rows of the slots page: form, order, prior
    "batches of 16 in file order": ("A, EMA as today", "batches, file order", False),
    "batches of 16, longest first": ("A, EMA as today", "batches, longest first", False),
    "`shared`, no prior": ("A", "slots", False),
    "`shared`, prior": ("A", "slots", True),
    "what was scored before": ("C", "slots", False),
    "the same, prior": ("C", "slots", True),
    "`prefix`, no prior": ("D", "slots", False),
    "`prefix`, prior": ("D", "slots", True),
    "**`own`, prior": ("P", "slots", True),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_table_of_the_slots_page(name):
    """Mean and standard deviation over the reporting seeds, and the paired difference with its standard error."""
    folder = ROOT / "records/benchmarks"
    rows = json.loads((folder / "2026-11-27_slots_cpu.json").read_text())["rows"]

    def scores(text: str, form: str, order: str, prior: bool) -> np.ndarray:
        found = {row["seed"]: row["bpb"] for row in rows if row["documents"] == "report" and row["seed"] != 1337
                 and row["text"] == text and row["adapts"] and (row["form"], row["order"]) == (form, order)
                 and ("prior" in row) == prior and not any(key.startswith("batch_begins") for key in row)}  # fmt: skip
        assert sorted(found) == [2001, 2002, 2003, 2004, 2005]
        return np.array([found[seed] for seed in sorted(found)])

    expected = []
    for text in ("demo", "weblab"):
        ours, base = scores(text, *FORMS[name]), scores(text, *FORMS["batches of 16 in file order"])
        difference = ours - base
        expected += [ours.mean(), ours.std(ddof=1)]
        expected += [difference.mean(), difference.std(ddof=1) / 5**0.5] if difference.any() else []
    lines = (folder / "2026-11-27_slots_cpu.md").read_text().partition("## What tuning")[0].splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {name}")]
    told = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]
    assert told == pytest.approx(expected, abs=0.6e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The meta-learning experiment
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("experiment", ROOT / "records/meta_learning/experiment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_kept_runs_give_the_kept_report(experiment):
    assert experiment.make_report()[0] == (ROOT / "records/meta_learning/report.md").read_text()


def test_a_paired_comparison(experiment):
    """Against the one-sample test and the confidence interval of scipy; the visible effect by simulation."""
    ours, theirs = np.array([1.1, 1.4, 0.9, 1.6, 1.3]), np.array([1.0, 1.2, 0.8, 1.3, 1.3])
    found, known = experiment.compare(list(ours), list(theirs)), stats.ttest_1samp(ours - theirs, 0.0)
    interval = known.confidence_interval(0.95)
    assert (found.n, found.mean, found.p) == (5, pytest.approx((ours - theirs).mean()), pytest.approx(known.pvalue))
    assert found.half == pytest.approx((interval.high - interval.low) / 2)
    spread = (ours - theirs).std(ddof=1)
    draws = np.random.default_rng(0).normal(found.visible, spread, (20_000, 5))
    assert 0.7 < (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.01).mean() < 0.9


def test_holm_by_hand(experiment):
    found = experiment.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert experiment.holm({"a": 0.7, "b": 0.6}) == pytest.approx({"b": 1.0, "a": 1.0})


def test_arms_are_equal_in_time(experiment):
    """What the steps of an arm cost, counted step by step, comes to the plain arm's, to within one step of a phase."""
    cost = {name: row["ms"] for name, row in json.loads(experiment.TIMING.read_text())["steps"].items()}
    for name, settings in experiment.ARMS.items():
        count = experiment.iterations(settings)
        c, _, _ = experiment.tg.load_config({"RECIPE": str(experiment.RECIPE), **settings, "ITERATIONS": str(count)})
        main, total = round(count * c.main_frac), 0.0
        for step in range(main):
            schedule = experiment.replace(c, iterations=main)
            due = c.meta_ttt_enabled and not c.late_fracs and step % c.meta_ttt_every == 0
            due = due and experiment.tg.lr_scale(schedule, step, 0.0, 0.0) > c.meta_ttt_min_scale
            kind = "fomaml, rows, delta, Meta-SGD" if c.meta_sgd_enabled else "fomaml, halves of rows"
            total += cost[kind] if due else cost["plain"]
        for phase, frac in c.late_fracs.items():
            total += round(count * frac) * cost["reptile" if phase == "reptile" else f"deployed, {c.ttt_mode}"]
        assert total / cost["plain"] == pytest.approx(experiment.PLAIN_STEPS, abs=4), name
