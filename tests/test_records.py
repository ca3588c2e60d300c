"""What the README says was measured is what the kept results say."""

import fnmatch
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from statistics import mean, stdev

import numpy as np
import pack
import pytest
import torch
from conftest import ROOT, inherited, search_path
from matplotlib.image import imread
from scipy import stats
from test_cli import write_shard

import train_gpt

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import figure

ROWS = {
    "levers": r"`demo.env`, everything on",
    "plain": "plain transformer, as many parameters",
    "narrow": "plain transformer, the same block matrices",
}


@pytest.mark.parametrize("arm", ROWS)
def test_the_table_of_the_readme(arm):
    *_, newest = sorted((ROOT / "records/benchmarks").glob("*_demo_cpu.json"))
    kept = json.loads(newest.read_text())
    runs = [run for run in kept["runs"] if run["arm"] == arm]
    assert sorted(run["seed"] for run in runs) == [21, 22, 23, 24, 25]
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


def test_the_figure_is_that_of_the_script(tmp_path):
    """Its numbers in README are derived by claims.py."""
    figure.draw(tmp_path / "bytes.png")
    drawn, stored = (imread(path) for path in (tmp_path / "bytes.png", ROOT / "records/guide/bytes.png"))
    assert drawn.shape == stored.shape and np.abs(drawn - stored).mean() < 0.02


def test_bytes_that_packing_frees():
    """README and the page on quantization say thousands of bytes, as packed now."""
    programs = [ROOT / name for name in ("train_gpt.py", "eval_ttt.py")]
    freed = sum(path.stat().st_size for path in programs) - pack.packed_bytes(programs)
    for page in ("README.md", "records/guide/quantization.md"):
        [said] = re.findall(r"frees (\d+) kB", (ROOT / page).read_text())
        assert abs(int(said) - freed / 1e3) < 5, (page, freed)


def test_the_recipe_table_has_every_recipe_and_its_parameters():
    """Counted by the trainer; published scores stand in the recipes' own headers, in other words."""
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| recipe | source |") : readme.index("## Measured")]
    rows = {
        tuple(re.findall(r"`([\w*]+)\.env`", row)): row for row in table.splitlines()[2:] if ".env`" in row
    }
    names = {path.stem for path in (ROOT / "records/recipes").glob("*.env")}
    shown = {name for row in rows for pattern in row for name in fnmatch.filter(names, f"{pattern}*")}
    assert shown == names
    for patterns, row in rows.items():
        counts = [int(n.replace(",", "")) for n in re.findall(r"\| (\d\d?,\d{3},\d{3}|\d,\d{3},\d{3}) ", row)]
        if patterns[0] in names and counts:
            config = train_gpt.load_config({"RECIPE": str(ROOT / f"records/recipes/{patterns[0]}.env")})[0]
            with torch.device("meta"):
                assert train_gpt.count_parameters(train_gpt.GPT(config)) == counts[-1], row
        for score in re.findall(r"\| (1\.\d{4}),", row):
            headers = [(ROOT / f"records/recipes/{name}.env").read_text() for name in names
                       if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]  # fmt: skip
            said = {f"{float(number):.4f}" for number in re.findall(r"\b1\.\d{4,5}\b", "".join(headers))}
            assert score in said, row


@pytest.mark.parametrize("page", ["README.md", *(f"records/guide/{path.name}" for path in
                                                 sorted((ROOT / "records/guide").glob("*.md")))])  # fmt: skip
def test_links_within_the_project_lead_somewhere(page):
    """Files exist, and headings that are linked to; a page is README's or linked from it."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"(?m)^#+ (.+)$", file.read_text())
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert page == "README.md" or f"({page})" in (ROOT / "README.md").read_text()
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_an_idea_in_four_lines(tmp_path, demo_data):
    """README's example, put where it says, trains, is exported, and adapts."""
    readme = (ROOT / "README.md").read_text()
    block = readme[readme.index("## Your own idea") : readme.index("Check that the parameter")]
    setting, made, used, pattern = re.findall(r"(?m)^    (?!#)(.+)$", block)
    for name in ("train_gpt.py", "eval_ttt.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    source = (tmp_path / "train_gpt.py").read_text()
    for place, line, text in (
        (r"\n    xsa_learned: bool.*", rf"\g<0>\n    {setting}", "Config"),
        (r"\n( +)self\.xsa_alpha = .*", rf"\g<0>\n\g<1>{made}", "Attention.__init__"),
        (r"\n( +)(return weights\.product\(\"o\")", rf"\n\g<1>{used}\n\g<1>\g<2>", "Attention.forward"),
        (r"(?s)(ParamGroup\(\"scalar\".*?)\),\n", lambda m: f"{m[1]}\n{pattern}),\n", "PARAM_GROUPS"),
    ):
        source, count = re.subn(place, line, source, count=1)
        assert count == 1, text
    (tmp_path / "train_gpt.py").write_text(source)
    write_shard(
        tmp_path / "fineweb_val_0.bin", np.fromfile(demo_data / "fineweb_val_000000.bin", "<u2")[512:900]
    )
    env = inherited() | dict(
        RECIPE=str(ROOT / "records/recipes/smoke.env"), DATA_PATH=str(demo_data), HEAD_GAIN="1", RUN_ID="run",
        TOKENIZER_PATH=str(demo_data / "tokenizer.model"), ITERATIONS="2", WARMUP_STEPS="0", TTT_LR="0.002",
        VAL_LOSS_EVERY="0", GPTQ_CALIB_BATCHES="0", OMP_NUM_THREADS="1", PYTHONPATH=search_path(tmp_path),
        TTT_PRIOR_SEQS="2", VAL_FILES=str(tmp_path / "fineweb_val_0.bin"),
    )  # fmt: skip
    for program in ("train_gpt.py", "eval_ttt.py"):
        command = [sys.executable, str(tmp_path / program)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "runs/run/final_model.pt")
    gains = [value for name, value in weights.items() if name.endswith("attn.head_gain")]
    assert len(gains) == 3 and all((gain != 1).any() for gain in gains)


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
