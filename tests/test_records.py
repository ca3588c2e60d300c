"""What the README says was measured is what the kept results say."""

import importlib.util
import json
import math
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
    kept = json.loads((ROOT / "records/benchmarks/2026-11-27_demo_cpu.json").read_text())
    runs = [run for run in kept["runs"] if run["arm"] == arm]
    assert sorted(run["seed"] for run in runs) == [42, 1337, 2025]
    (row,) = [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {ROWS[arm]}")
    ]
    numbers = [float(text.replace(",", "")) for text in re.findall(r"[\d,]+\.?\d*", row.split("|", 2)[2])]
    keys = ("model_params", "steps", "bytes_model", "val_bpb_roundtrip", "val_bpb_sliding")
    expected = [round(mean(run[key] for run in runs), 4 if "bpb" in key else 0) for key in keys]
    adapted = [run["val_bpb_ttt"] for run in runs]
    spreads = [stdev(run["val_bpb_sliding"] for run in runs), mean(adapted), stdev(adapted)]
    assert numbers == [*expected, *(round(value, 4) for value in spreads)]
    assert max(run["train_seconds"] for run in runs) <= 120
    for run in runs:  # from the kept documents
        num_bytes, before, after = map(sum, zip(*run["documents"], strict=True))
        assert after / math.log(2) / num_bytes == pytest.approx(run["val_bpb_ttt"], abs=1e-6)
        assert before / math.log(2) / num_bytes == pytest.approx(run["val_bpb_plan"], abs=1e-6)


def test_what_the_readme_says_of_the_run_on_a_gpu():
    report, rates = (
        json.loads((ROOT / f"records/benchmarks/2026-11-27_{name}_h100.json").read_text())
        for name in ("gpu", "rates")
    )
    train, adapt, step, quantization = (
        report["parts"][name]["result"] for name in ("train", "adapt", "step_compiled", "quantization")
    )
    assert train["sha256_artifact"] == adapt["sha256_artifact"] == rates["sha256_artifact"]
    step = step["step_compiled"]
    curve = sorted(quantization["curve"], key=lambda point: point["bytes"])
    gaps = [f"{point['gap_bpb']:.4f}" for point in curve]
    sizes = [f"{point['bytes'] / 1e6:.2f}" for point in curve]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for said in (
        f"takes {step['ms_per_step']:.0f} ms: {train['model_params'] / 1e6:.1f} M parameters",
        f"{step['tokens_per_second'] / 1e6:.2f} M tokens/s, MFU {step['mfu']:.3f}",
        f"{train['bytes_model']:,} bytes scores {train['val_bpb_roundtrip']:.4f} non-overlapping and "
        f"{train['val_bpb_sliding']:.4f} sliding on {adapt['targets']:,} targets",
        f"it is {max(row['gain'] for row in rates['rows']):.4f} on the first {rates['targets']:,} targets",
        f"the adapted score is {adapt['val_bpb_ttt']:.4f}, a loss of {-adapt['ttt_gain_bpb']:.2f}",
        f"costs {gaps[0]}, {gaps[1]}, and {gaps[2]} bpb at {sizes[0]}, {sizes[1]}, and {sizes[2]} MB",
    ):
        assert said in readme, said


# ------------------------------------------------------------------------------------------------------------
# The meta-learning experiment
# ------------------------------------------------------------------------------------------------------------


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
    assert (found.n, found.mean, found.p) == (
        5,
        pytest.approx((ours - theirs).mean()),
        pytest.approx(known.pvalue),
    )
    assert found.half == pytest.approx((interval.high - interval.low) / 2)
    spread = (ours - theirs).std(ddof=1)
    draws = np.random.default_rng(0).normal(found.visible, spread, (20_000, 5))
    assert 0.7 < (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.01).mean() < 0.9


def test_holm_by_hand(experiment):
    found = experiment.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert experiment.holm({"a": 0.7, "b": 0.6}) == pytest.approx({"b": 1.0, "a": 1.0})


def test_arms_are_equal_in_time(experiment):
    """What the steps of an arm cost, counted step by step,
    comes to the plain arm's, to within one step of a phase."""
    cost = {name: row["ms"] for name, row in json.loads(experiment.TIMING.read_text())["steps"].items()}
    for name, settings in experiment.ARMS.items():
        count = experiment.iterations(settings)
        c, _, _ = experiment.tg.load_config(
            {"RECIPE": str(experiment.RECIPE), **settings, "ITERATIONS": str(count)}
        )
        main, total = round(count * c.phases["train"]), 0.0
        for step in range(main):
            schedule = experiment.replace(c, iterations=main)
            due = c.meta_ttt_enabled and len(c.phases) == 1 and step % c.meta_ttt_every == 0
            due = due and experiment.tg.lr_scale(schedule, step, 0.0, 0.0) > c.meta_ttt_min_scale
            kind = "fomaml, rows, delta, Meta-SGD" if c.meta_sgd_enabled else "fomaml, halves of rows"
            total += cost[kind] if due else cost["plain"]
        for phase, frac in list(c.phases.items())[1:]:
            total += (
                round(count * frac) * cost["reptile" if phase == "reptile" else f"deployed, {c.ttt_mode}"]
            )
        assert total / cost["plain"] == pytest.approx(experiment.PLAIN_STEPS, abs=4), name
