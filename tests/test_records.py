"""What the README says was measured is what the kept results say."""

import json
import re
from statistics import mean, stdev

import pytest
from conftest import ROOT

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
