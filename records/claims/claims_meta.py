"""What the kept runs give for the pages on meta-learning (see claims.py)."""

from __future__ import annotations

import csv
import json
import math
from functools import cache
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy.special import stdtrit
from stated import Page, Pages, Paired, paired

BANKS, LORA = "doc_banks", "doc_lora"  # adaptation of all parameters, of adapters
# a late phase of a twentieth of the steps
LATE = ",META_TTT_TIME_FRAC=0.05,WARMDOWN_FRAC=0.4737,MIN_LR=0.1,META_TTT_OUTER_LR=0.1"
SCORES = ("flat", "sliding", "adapted", "gain")
# fmt: off


class Part:
    """The kept runs of a part of the experiment: scores, steps and factors by arm, adaptation and seed."""

    def __init__(self, p: Pages, name: str):
        self.runs: dict[tuple[str, str, int], dict[str, Any]] = {}
        for folder in sorted((p.root / "records/meta_learning/kept" / name).iterdir()):
            arm, seed = folder.name.rsplit("_seed", 1)
            run = json.loads((folder / "result.json").read_text())
            for path in folder.glob("*/eval_ttt.json"):
                ours = json.loads(path.read_text())
                self.runs[arm, path.parent.name, int(seed)] = dict(
                    flat=run["val_bpb_roundtrip"], sliding=run["val_bpb_sliding"],
                    adapted=ours["val_bpb_ttt"], gain=ours["val_bpb_plan"] - ours["val_bpb_ttt"],
                    lr=ours["settings"]["ttt_lr"],
                    steps=run["steps"], late=sum(run["late_steps"].values()), seconds=run["train_seconds"],
                    factors=[x for rates in run.get("meta_rates", {}).values() for x in rates],
                    params=run["model_params"], folder=path.parent)
        self.seeds = sorted({seed for arm, _, seed in self.runs if arm == "control"})  # more of plain runs

    def column(self, arm: str, key: str, way: str = BANKS) -> list[Any]:
        return [self.runs[arm, way, seed][key] for seed in self.seeds]

    def compare(self, ours: str, theirs: str, key: str) -> Paired:
        way = LORA if ours == "deployed_lora" else BANKS
        return paired(self.column(ours, key, way), self.column(theirs, key, way))

    def spread(self, key: str) -> float:
        """Return the standard deviation of all plain seeds."""
        return stdev(run[key] for (arm, way, _), run in self.runs.items() if (arm, way) == ("none", BANKS))

    def holm(self) -> dict[tuple[str, str], float]:
        """Return p of the four tests after Holm's correction, by arm and score."""
        ps = {(arm, key): self.compare(arm, "control", key).p for arm in ("deployed_banks", "deployed_lora")
              for key in ("gain", "adapted")}
        least = 0.0
        return {name: (least := max(least, p * (4 - i))) for i, (name, p) in
                enumerate(sorted(ps.items(), key=lambda pair: pair[1]))}

    def documents(self, arm: str, key: str, way: str = BANKS) -> np.ndarray:
        """Return a column of documents.csv for each seed."""
        files = [(folder / "documents.csv").read_text().splitlines()
                 for folder in self.column(arm, "folder", way)]
        return np.array([[float(row[key]) for row in csv.DictReader(lines)] for lines in files])

    def clustered(self, ours: str) -> list[float]:
        """Return the interval of the adapted score less the control's, clustered by documents and seeds."""
        way = LORA if ours == "deployed_lora" else BANKS
        size, theirs = (self.documents("control", key, way) for key in ("bytes", "nats_adapted"))
        gap = (self.documents(ours, "nats_adapted", way) - theirs) / math.log(2)
        ratio = gap.sum() / size.sum()
        left = (gap - ratio * size) / size.sum()
        error = ((left.sum(0) ** 2).sum() + (left.sum(1) ** 2).sum() - (left**2).sum()) ** 0.5
        half = float(stdtrit(len(self.seeds) - 1, 0.975)) * error
        return [ratio - half, ratio + half]


part = cache(Part)


def training(p: Pages) -> None:
    page = p.page("records/guide/training.md")
    first, second = part(p, "first_confirmation"), part(p, "report")
    page.says("{} parameters, {} documents", second.column("none", "params")[0],
              second.documents("none", "bytes").shape[1])
    adapted = second.compare("deployed_banks", "control", "adapted")
    page.says("scores {} ± {} bpb lower after adaptation than its control", -adapted.mean, adapted.half)
    page.says("the gain from adaptation is the same ({} ± {})",
              *second.compare("deployed_banks", "none", "gain")[:2])
    page.says("changes the gain by {} ± {} and {} ± {}", *first.compare("exp101", "none", "gain")[:2],
              *first.compare("exp106", "none", "gain")[:2])
    page.says("its phase costs {}", first.compare("reptile", "none", "sliding").mean)


def readme(p: Pages) -> None:
    page = p.page("records/meta_learning/README.md")
    first, second = part(p, "first_confirmation"), part(p, "report")
    arms, size = ("none", "control", "deployed_banks", "deployed_lora"), second.documents("none", "bytes")
    page.says("{} parameters, {} M training tokens, about {} s on one core",
              second.column("none", "params")[0], 800 * 2048 / 1e6,
              round(mean(second.column("none", "seconds")), -1))
    page.says("**{} fixed documents of at most {} kB.**", size.shape[1], size.max() / 1000)
    factors = [np.concatenate(second.column(arm, "factors")) for arm in arms[2:]]
    page.says("factors, {} to {} for `deployed_banks` and {} to {} for `deployed_lora`",
              *(x for found in factors for x in (found.min(), found.max())))
    probe(p, page)
    tuning(p, page)
    page.shows(1, {arm: [*(mean(second.column(arm, key)) for key in ("flat", "sliding")),
                         *(mean(second.column(arm, "adapted", way)) for way in (BANKS, LORA))]
                   for arm in arms})
    page.shows(2, {f"{ours} - {theirs}, {'adapters' if ours == 'deployed_lora' else 'all parameters'}": [
        second.compare(ours, theirs, key)[:2] for key in ("adapted", "gain", "sliding")] for ours, theirs in (
            ("deployed_banks", "control"), ("deployed_lora", "control"), ("deployed_banks", "none"),
            ("deployed_lora", "none"), ("control", "none"))})
    page.says("p is at most {} after Holm correction", max(second.holm().values()))
    page.says("differ in {} steps", second.column("control", "late")[0])
    page.says("the intervals are [{}, {}] and [{}, {}]", *second.clustered("deployed_banks"),
              *second.clustered("deployed_lora"))
    gain, control = (second.compare(arm, "none", "gain") for arm in ("deployed_banks", "control"))
    page.says("all of the {} except {} ± {} (p = {}) exists",
              -second.compare("deployed_banks", "none", "adapted").mean, *gain[:3])
    page.says("reduces the gain of TTT ({} ± {})", *control[:2])
    page.says("Adapters gain {} more than after plain training",
              second.compare("deployed_lora", "none", "gain").mean)
    page.says("standard deviation of {} sliding, {} adapted, {} gain (first confirmation: {}, {}, {})",
              *(which.spread(key) for which in (second, first) for key in ("sliding", "adapted", "gain")))
    gap = round(1.11624 - 1.11588, 4)  # published by #1501: without and with meta-learning
    seeds = [2 * ((2.5758 + 0.8416) * which.spread("gain") / gap) ** 2 for which in (second, first)]
    page.says("published gain ({}, one seed) ... takes {} to {} seeds per arm", gap,
              *(round(x, -2) for x in seeds))
    first_confirmation(page, first)


def probe(p: Pages, page: Page) -> None:
    """The effect of an inner step on the outer loss."""
    kept, types = p.json("meta_learning/probe"), ("float32", "bfloat16")
    arms = ("exp101", "exp106", "deployed_banks", "deployed_lora")
    page.shows(0, {arm: [kept[f"{arm}, {kind}"][key] for kind in types for key in ("mean", "error")]
                   for arm in arms})
    published = kept["exp101, float32"]
    page.says("one plainly trained model, {} tasks each", published["tasks"])
    page.says("by {} nats: {} and {} standard errors in float32, {} and {} in bfloat16.", -published["mean"],
              *(-kept[f"{arm}, {kind}"]["mean"] / kept[f"{arm}, {kind}"]["error"] for kind in types
                for arm in arms[:2]))
    page.says("change it {} times (all parameters) and {} times (adapters) as much",
              *(kept[f"{arm}, float32"]["mean"] / published["mean"] for arm in arms[2:]))


def tuning(p: Pages, page: Page) -> None:
    """The runs on the tuning documents, and those of an earlier model."""
    runs, early = part(p, "tuning").runs, part(p, "first_model").runs
    old = {arm: run["adapted"] for (arm, way, _), run in early.items() if way == BANKS}
    more = ",META_TTT_OUTER_LR=1.0,WARMDOWN_FRAC=0.2"
    trained = [{(arm, seed) for arm, _, seed in found} for found in (runs, early)]
    plain = [sum(arm.startswith("none") for arm, _ in found) for found in trained]
    page.says("{} without Meta-SGD, {} with it, control {}", old[f"deployed_banks{more}"],
              old[f"deployed_banks{more},META_SGD_ENABLED=1"], old[f"control{more}"])
    for way, text in ((BANKS, "tried at {} ({}) and {} ({}), seed 1"),
                      (LORA, "adapters, {} ({}) and {} ({}")):
        page.says(text, *(runs[arm, way, 1][key] for arm in ("none,TTT_LR=0.004", "none")
                          for key in ("lr", "adapted")))
    page.says("Of {} kept tuning runs {} are plain training, of {} earlier ones {}.", len(trained[0]),
              plain[0], len(trained[1]), plain[1])
    page.says("the {} runs of an earlier model", len(trained[1]))
    score = {(arm, way, seed): run["adapted"] for (arm, way, seed), run in runs.items()}
    page.says("all parameters {} and {}, `deployed_lora` with adapters {}",
              *(score[f"deployed_banks{LATE}", BANKS, seed] - score["none", BANKS, seed] for seed in (1, 2)),
              score[f"deployed_lora{LATE}", LORA, 1] - score["none", LORA, 1])
    page.says("(plain training: {})", score["none", BANKS, 1])
    page.says("At 0.05 the second seed has {} against {}, plain training {}",
              *(score[arm, BANKS, 2] for arm in (f"deployed_banks{LATE}", f"control{LATE}", "none")))
    lengths = {"0.05": LATE, "0.2": ",new_sampler",
               "0.1": ",META_TTT_TIME_FRAC=0.1,WARMDOWN_FRAC=0.444,MIN_LR=0.2,META_TTT_OUTER_LR=0.2",
               "0.3": ",META_TTT_TIME_FRAC=0.3,WARMDOWN_FRAC=0.2857,MIN_LR=0.6,META_TTT_OUTER_LR=0.6"}
    page.shows(3, {name: [score[f"{arm}{more}", BANKS, 1] for arm in ("deployed_banks", "control")]
                   for name, more in lengths.items()})


def first_confirmation(page: Page, first: Part) -> None:
    fomaml, factors = ("exp101", "exp106"), np.concatenate(first.column("exp106", "factors"))
    page.says("change the gain of TTT by {} ± {} and {} ± {}; the time they take costs {} and {} sliding",
              *(x for arm in fomaml for x in first.compare(arm, "none", "gain")[:2]),
              *(first.compare(arm, "none", "sliding").mean for arm in fomaml))
    page.says("grow to between {} and {}; used by the evaluator, they ruin the score (gain {})",
              factors.min(), factors.max(), mean(first.column("exp106", "gain", "with_factors")))
    apart = [np.subtract(first.column("reptile", key), first.column("reptile_plain", key)) for key in SCORES]
    page.says("every score is within {} of plain SGD on its sequences, and the phase costs {} sliding",
              np.abs(apart).max(), first.compare("reptile", "none", "sliding").mean)
    ours, lora = (first.compare(arm, "control", "adapted") for arm in ("deployed_banks", "deployed_lora"))
    page.says("The control was {} worse than plain training; ... {} ± {} below ... was still {} worse",
              first.compare("control", "none", "sliding").mean, -ours.mean, ours.half,
              first.compare("deployed_banks", "none", "adapted").mean)
    page.says("adapted {} ± {} (p = {}; {} after Holm correction for the four tests), sliding {} ± {}",
              *lora[:3], first.holm()["deployed_lora", "adapted"],
              *first.compare("deployed_lora", "control", "sliding")[:2])


def report(p: Pages) -> None:
    page, pairs = p.page("records/meta_learning/report.md"), [
        ("deployed_banks", "control"), ("deployed_lora", "control"), ("deployed_banks", "none"),
        ("deployed_lora", "none"), ("control", "none"), ("exp101", "none"), ("exp106", "none"),
        ("reptile", "reptile_plain"), ("reptile", "none")]
    for index, kept in enumerate((part(p, "report"), part(p, "first_confirmation"))):
        have, holm, cells, rows = {name[:2] for name in kept.runs}, kept.holm(), {}, {}
        for arm, way in have:
            column = {key: kept.column(arm, key, way) for key in ("steps", "late", "seconds", *SCORES)}
            cells[arm, way] = [[mean(column["steps"]), mean(column["late"])], mean(column["seconds"]),
                               *([mean(column[key]), stdev(column[key])] for key in SCORES)]
        for ours, theirs in pairs:
            way = LORA if ours == "deployed_lora" else BANKS
            for key in ("gain", "adapted", "sliding") if {(ours, way), (theirs, way)} <= have else ():
                found = kept.compare(ours, theirs, key)
                tested = theirs == "control" and key != "sliding"
                rows[ours, theirs, way, key] = [*found[:3], holm[ours, key] if tested else [], found.visible]
        page.shows(2 * index, cells, keys=2)
        page.shows(2 * index + 1, rows, keys=4)
        seeds = sum(name[:2] == ("none", BANKS) for name in kept.runs)
        page.says("Standard deviation of {} plain seeds: sliding {}, adapted {}, gain {} bpb.", seeds,
                  *(kept.spread(key) for key in ("sliding", "adapted", "gain")), nth=index)
    page.shows(4, {(arm.replace(",", ", "), str(seed), way): [
        run["lr"], [run["steps"], run["late"]], run["sliding"], run["adapted"]]
        for (arm, way, seed), run in part(p, "tuning").runs.items()}, keys=3)
