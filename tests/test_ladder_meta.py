"""The cells of meta-learning: arms that differ in weights alone, factors that change no weight."""

from __future__ import annotations

import json
import re
import shutil
import sys
from itertools import takewhile

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_cli import write_shard

import train_gpt

sys.path.append(str(ROOT / "records/ladder"))
import ladder
import meta

pytestmark = pytest.mark.slow  # trains six arms: a minute
SEED, STEPS = 201, 40  # two of the steps are late


@pytest.fixture(scope="module")
def trained(demo_data, tmp_path_factory):
    """All arms of a tiny rung, trained by the script itself."""
    base = tmp_path_factory.mktemp("meta")
    tokens = train_gpt.open_shard(str(demo_data / "fineweb_val_000000.bin"))[:1500].copy()
    tokens[::250] = train_gpt.BOS_ID
    shutil.copytree(demo_data, base / "data/tuning")
    (base / "data/tuning/manifest.json").unlink()
    write_shard(base / "data/tuning/fineweb_val_000000.bin", tokens)
    with pytest.MonkeyPatch.context() as patch:
        for module in (ladder, meta):
            patch.setattr(module, "KEPT", base / "kept")
        patch.setattr(ladder, "COMPILE", "0")
        patch.setattr(ladder.Rung, "steps", STEPS)
        patch.setitem(ladder.RUNGS, meta.RUNG, ladder.Rung(32, 2, 1, length=64))
        patch.setattr(meta, "FACTOR_STEPS", 3)
        ladder.KEPT.mkdir()
        ladder.write_json(ladder.KEPT / f"{meta.RUNG}_rates.json", {"slots": {"0.01": 2.0, "0.02": 1.0}})
        assert "plain steps" in meta.measure_cost(base / "data", rounds=3)
        for arm in meta.ARMS:
            meta.train(arm, SEED, base / "data", base)
            meta.learn_factors(arm, SEED, base / "data", base)
        yield base


def losses_of(arm: str, what: str = "step") -> list[str]:
    log = (ladder.KEPT / meta.run_id(arm, SEED) / "train.log").read_text()
    return re.findall(rf"^{what}:\d+/\d+ .*?loss:(\S+)", log, re.M)


def weights_of(base, arm: str) -> dict[str, torch.Tensor]:
    return torch.load(base / f"runs/{meta.run_id(arm, SEED)}/final_model.pt")


def test_arms_are_what_they_say(trained):
    results = {arm: json.loads((ladder.KEPT / meta.run_id(arm, SEED) / "result.json").read_text())
               for arm in meta.ARMS}  # fmt: skip
    cost = json.loads((ladder.KEPT / "meta_cost.json").read_text())["late_step"]
    assert min(cost.values()) > 1
    late = {arm: result["late_steps"] for arm, result in results.items()}
    assert late == {arm: {} if arm in ("plain", *meta.TIME_OF) else {"deployed": 2} for arm in meta.ARMS}
    steps = {arm: result["steps"] for arm, result in results.items()}
    told = dict(longer=round(38 + 2 * cost["deployed"]), longer_still=round(38 + 2 * cost["horizon"]))
    assert steps == dict(plain=40, control=38, deployed=38, horizon=38, **told)
    assert losses_of("control") == losses_of("deployed") and losses_of("control")
    first = list(takewhile(lambda pair: pair[0] == pair[1], zip(losses_of("plain"), losses_of("control"),
                                                                strict=False)))  # fmt: skip
    assert len(first) >= 5  # the same trunk, up to rounding of the learning rate
    ours, theirs = (weights_of(trained, arm) for arm in ("deployed", "control"))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_factors_change_no_weight_and_are_used(trained):
    weights = trained / f"runs/{meta.run_id('plain', SEED)}/final_model.pt"
    late = meta.Late(SEED, weights, trained / "data")
    before = {name: p.clone() for name, p in late.model.state_dict().items()}
    found = late.learn()
    assert all(torch.equal(p, before[name]) for name, p in late.model.state_dict().items())
    kept = json.loads((ladder.KEPT / meta.run_id("plain", SEED) / "factors.json").read_text())
    assert kept == {name: factor.flatten().tolist() for name, factor in found.items()}
    assert max(abs(value - 1) for values in kept.values() for value in values) > 1e-3
    cells = [
        meta.opened("plain", SEED, factors, trained / "data/tuning", trained) for factors in (False, True)
    ]
    form = meta.deployed_form()
    assert form["ttt_lr"] == 0.02
    without, with_factors = (ladder.losses(setup, text, form)[0] for setup, text in cells)
    assert np.abs(without - with_factors).max() > 1e-4
    plain, _ = ladder.unadapted(*cells[1], {})
    np.testing.assert_array_equal(plain, ladder.unadapted(*cells[0], {})[0])


def test_each_cell_is_scored_at_its_own_rate(trained, monkeypatch):
    monkeypatch.setattr(meta, "TUNING_SEEDS", (SEED,))
    for factors, rate in ((False, 0.01), (True, 0.03)):
        ladder.write_json(meta.rates_file("plain", factors), {str(rate): 1.0, "9": 2.0})
    meta.measure("plain", SEED, trained / "data", trained, "tuning")
    kept = json.loads((ladder.KEPT / meta.run_id("plain", SEED) / "tuning.json").read_text())["scores"]
    for name, factors, rate in (("slots", False, 0.01), ("factors", True, 0.03)):
        setup, text = meta.opened("plain", SEED, factors, trained / "data/tuning", trained)
        nll, _ = ladder.losses(setup, text, meta.deployed_form() | dict(ttt_lr=rate))
        assert kept[name]["bpb"] == pytest.approx(ladder.bpb(nll, text), abs=1e-12)
    meta.rates_file("plain", False).unlink()
    told = meta.tune("plain", False, trained / "data", trained)
    rates = json.loads(meta.rates_file("plain", False).read_text())
    best = ladder.best_rate(rates)
    assert best in told and float(min(rates, key=float)) < float(best) < float(max(rates, key=float))
