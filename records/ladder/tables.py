"""Write report.md and report.png from the kept results of the ladder alone.

    python records/ladder/tables.py

Intervals are 95 %, and cover documents and seeds: the variances of the mean over documents and over seeds add
up, with Satterthwaite's degrees of freedom. The prediction is an extrapolation: the logarithm of a gain is
taken as linear in the logarithms of the parameters and of the training tokens per parameter, fitted to the
means of the rungs of T = 512, and moved by what T = 2,048 changes on the one rung that has both; with the
interval of a new observation. It supposes that the law holds over a factor of thirty in size.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import ideas
import ladder
import meta
import numpy as np
from ladder import KEPT, POSITIONS, RUNGS, best_rate
from scipy import stats
from tabulate import tabulate

sys.path.append(str(ladder.ROOT / "records"))
import plan
from report import figure_style

HERE = Path(__file__).resolve().parent
Kept = Mapping[str, Any]
FORMS = ("chunks", "adapters", "slots")
CONTROLS = ("context x2", "context x4", *ladder.OTHER)
BASELINE = {form: score for score, form in ladder.UNADAPTED.items()}
# Published systems: unadapted bpb, gain, parameters. #1855's is against windows side by side, so that a part
# of it is context.
FIELD = {
    "#549": ("chunks", 1.1218, 0.0025, 27.0e6),
    "#1413": ("chunks", 1.0849, 0.0021, 35.9e6),
    "#1855": ("adapters", 1.0738, 0.0127, 35.9e6),
}
# Of meta-learning: bpb of (arm, score) less that of another. The first three are what the experiment tests.
PRIMARY = {
    "deployed - control, both with factors": (("deployed", "factors"), ("control", "factors")),
    "deployed - longer, both with factors": (("deployed", "factors"), ("longer", "factors")),
    "factors - no factors, longer": (("longer", "factors"), ("longer", "slots")),
}
EXPLORED = {
    "horizon - longer_still, both with factors": (("horizon", "factors"), ("longer_still", "factors")),
    "deployed - control, no factors": (("deployed", "slots"), ("control", "slots")),
    "deployed - longer, no factors": (("deployed", "slots"), ("longer", "slots")),
    "deployed - longer, not adapted": (("deployed", "none"), ("longer", "none")),
    "control - longer, no factors": (("control", "slots"), ("longer", "slots")),
    "control - plain, no factors": (("control", "slots"), ("plain", "slots")),
}
FULL_SIZE = {"pr1019": (26.0e6, 208), "pr1855": (31.7e6, 122)}  # parameters of blocks, tokens for each


ABOUT = "Written by tables.py from what is kept. Bits per byte; 95 % intervals over seeds and documents."


class Interval(NamedTuple):
    """A mean and half of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def interval(nats: np.ndarray, num_bytes: np.ndarray, level: float = 0.95) -> Interval:
    """Of a difference in bpb: nats (seeds, documents), num_bytes (documents,)."""
    (seeds, documents), total = nats.shape, num_bytes.sum()
    bits = nats / math.log(2)
    by_seed, mean = bits.sum(1) / total, float(bits.sum(1).mean() / total)
    influence = (bits.mean(0) - mean * num_bytes) / total
    of_documents = documents / (documents - 1) * float((influence**2).sum())
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    freedom = (of_documents + of_seeds) ** 2 / (
        of_documents**2 / (documents - 1) + of_seeds**2 / (seeds - 1) + 1e-300
    )
    wide = float(stats.t.ppf((1 + level) / 2, max(freedom, 1)))
    return Interval(mean, wide * math.sqrt(of_documents + of_seeds))


def read(ids: Sequence[str], part: str) -> list[Kept]:
    """What was kept of runs on a text, those that are there; ValueError if their texts differ."""
    paths = [KEPT / name / f"{part}.json" for name in ids]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    if len({each["sha256_text"] for each in found}) > 1:
        raise ValueError(f"{', '.join(ids)}: {part} is not the same text in all")
    return found


def of_rung(name: str, part: str) -> list[Kept]:
    return read([f"{name}_seed{seed}" for seed in RUNGS[name].seeds], part)


def nats(kept: Sequence[Kept], score: str) -> np.ndarray:
    """By document, (seeds, documents)."""
    return np.array([each["scores"][score]["nats_by_document"] for each in kept])


def gain(kept: Sequence[Kept], score: str) -> Interval:
    """Over the same plan of windows without adaptation."""
    before = nats(kept, BASELINE.get(score, "none"))
    return interval(before - nats(kept, score), np.array(kept[0]["bytes_by_document"]))


def mean_of(kept: Sequence[Kept], score: str, what: str = "bpb") -> float:
    return float(np.mean([each["scores"][score][what] for each in kept]))


def measured(part: str) -> dict[str, list[Kept]]:
    """The rungs all of whose seeds are kept."""
    found = {name: of_rung(name, part) for name in RUNGS}
    return {name: kept for name, kept in found.items() if len(kept) == len(RUNGS[name].seeds)}


# ------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------


def table(rows: list[list[Any]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, stralign="right") + "\n"


def gains_table(rungs: Mapping[str, list[Kept]], scores: Sequence[str]) -> str:
    rows = [[name, len(kept), f"{mean_of(kept, 'none'):.4f}",
             *(str(gain(kept, score)) if score in kept[0]["scores"] else "" for score in scores)]
            for name, kept in rungs.items()]  # fmt: skip
    return table(rows, ("rung", "seeds", "not adapted, bpb", *(f"gain of {score}" for score in scores)))


def seconds_table(rungs: Mapping[str, list[Kept]]) -> str:
    """CPU milliseconds of one thread for each target."""
    scores = ("none", *FORMS, "mixture", *CONTROLS[:2])

    def milliseconds(kept: list[Kept], score: str) -> str:
        if score not in kept[0]["scores"]:
            return ""
        return f"{1e3 * mean_of(kept, score, 'seconds') / sum(kept[0]['targets_by_position']):.2f}"

    rows = [[name, *(milliseconds(kept, score) for score in scores)] for name, kept in rungs.items()]
    return table(rows, ("rung", *scores))


def by_position(kept: Sequence[Kept], form: str) -> np.ndarray:
    """Mean gain of a target in nats, for each bin of POSITIONS."""
    before, after = (np.mean([each["scores"][score]["nats_by_position"] for each in kept], 0)
                     for score in (BASELINE[form], form))  # fmt: skip
    return (before - after) / np.maximum(kept[0]["targets_by_position"], 1)


def gpu_table() -> str:
    """Seconds of one evaluation of the challenge's text, by records/plan.py from one measured GPU."""
    rows = []
    for recipe in FULL_SIZE:
        case = plan.make_case(plan.parse([str(ladder.ROOT / f"records/recipes/{recipe}.env")]), {})
        cases = [case._replace(config=replace(case.config, ttt_mode=mode))
                 for mode in ("all", "doc_lora", "doc_banks")]  # fmt: skip
        adapted = [sum(part.seconds for part in plan.evaluation_parts(each)[:2]) for each in cases]
        rows.append([recipe, f"{plan.sliding(case).seconds:.0f}", *(f"{seconds:.0f}" for seconds in adapted)])
    return table(rows, ("recipe", "sliding, not adapted", *FORMS))


def position_table(rungs: Mapping[str, list[Kept]]) -> str:
    names = [f"{low} to {high - 1}" for low, high in pairwise(POSITIONS)]
    rows = [[name, *(f"{value:.3f}" for value in by_position(kept, "slots"))] for name, kept in rungs.items()]
    return table(rows, ("rung", *names, f"{POSITIONS[-1]} on"))


def ideas_table() -> str:
    """Ideas for better adaptation against `slots`, each kind's best of the tuning documents."""
    ids = [f"{ideas.RUNG}_seed{seed}" for seed in RUNGS[ideas.RUNG].seeds]
    kept = read(ids, "report_ideas")
    if len(kept) < len(ids):
        return ""
    num_bytes = np.array(kept[0]["bytes_by_document"])
    rows = []
    for name in kept[0]["scores"]:
        better = "" if name == "slots" else str(interval(nats(kept, "slots") - nats(kept, name), num_bytes))
        ratio = mean_of(kept, name, "seconds") / mean_of(kept, "slots", "seconds")
        rows.append([name, f"{mean_of(kept, name):.4f}", better, f"{ratio:.2f}"])
    return table(rows, ("idea", "adapted, bpb", "gain over slots", "seconds, slots = 1"))


def rates_table(rungs: Mapping[str, list[Kept]]) -> str:
    rows = []
    for name in rungs:
        tried = json.loads((KEPT / f"{name}_rates.json").read_text())
        rows.append([name, *(f"{best_rate(tried[form])} of {len(tried[form])}" for form in FORMS)])
    return table(rows, ("rung", *FORMS))


def meta_table(part: str) -> str:
    """The cells of the arms whose seeds are all there, and the comparisons that were fixed beforehand."""
    found = {arm: read([meta.run_id(arm, seed) for seed in meta.SEEDS], part) for arm in meta.ARMS}
    arms = {arm: kept for arm, kept in found.items() if len(kept) == len(meta.SEEDS)}
    if any(arm not in arms for pair in PRIMARY.values() for arm, _ in pair) or "plain" not in arms:
        return ""
    num_bytes = np.array(arms["plain"][0]["bytes_by_document"])

    def difference(ours: tuple[str, str], theirs: tuple[str, str], level: float = 0.95) -> Interval:
        a, b = (nats(arms[arm], score) for arm, score in (ours, theirs))
        return interval(a - b, num_bytes, level)

    scores = ("none", "slots", "factors")
    cells = [[arm, *(f"{mean_of(kept, score):.4f}" for score in scores), str(gain(kept, "slots")),
              str(gain(kept, "factors"))] for arm, kept in arms.items()]  # fmt: skip
    level = 1 - 0.05 / len(PRIMARY)
    rows = [[name, str(difference(*pair, level)), "primary"] for name, pair in PRIMARY.items()]
    explored = {name: pair for name, pair in EXPLORED.items() if all(arm in arms for arm, _ in pair)}
    rows += [[name, str(difference(*pair)), ""] for name, pair in explored.items()]
    heads = ("arm", "not adapted", "adapted", "with factors", "gain", "gain with factors")
    compared = ("adapted bpb", f"difference, n = {len(meta.SEEDS)}", "primary: 95 % for all three together")
    return table(cells, heads) + "\n" + table(rows, compared)


# ------------------------------------------------------------------------------------------------------------
# Prediction
# ------------------------------------------------------------------------------------------------------------


def features(parameters: float, tokens_per_parameter: float) -> list[float]:
    return [1.0, math.log(parameters), math.log(tokens_per_parameter)]


def predicted(
    gains: Mapping[str, float], parameters: float, tokens: float, shift: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float, float]:
    """Gain at a size and length, and the 95 % interval of a new observation there.

    gains: by rung. shift: added to the logarithm, mean and variance.
    """
    x = np.array([features(RUNGS[name].parameters, RUNGS[name].tokens_per_parameter) for name in gains])
    y, at = np.log(list(gains.values())), np.array(features(parameters, tokens))
    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    freedom = len(y) - x.shape[1]
    variance = float(((y - x @ solution) ** 2).sum()) / freedom
    variance = variance * (1 + at @ np.linalg.inv(x.T @ x) @ at) + shift[1]
    half, middle = stats.t.ppf(0.975, freedom) * math.sqrt(variance), float(at @ solution) + shift[0]
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def longer_training_context(rungs: Mapping[str, list[Kept]], form: str) -> tuple[float, float]:
    """Logarithm of the gain at T = 2,048 over that at T = 512, and its variance, from the rung with both."""
    short, long = (gain(rungs[name], form) for name in ("0.1M_80", "0.1M_80_2048"))
    variance = sum((one.half / 1.96 / one.mean) ** 2 for one in (short, long))
    return math.log(long.mean / short.mean), variance


def spelled(prediction: tuple[float, float, float]) -> tuple[str, str]:
    middle, low, high = prediction
    return f"{middle:.4f}", f"{low:.4f} to {high:.4f}"


def prediction_table(rungs: Mapping[str, list[Kept]]) -> str:
    fitted = {name: kept for name, kept in rungs.items() if RUNGS[name].length == 512}
    if len(fitted) < 5 or "0.1M_80_2048" not in rungs:  # three coefficients, two degrees of freedom
        return ""
    rows = []
    for form in ("adapters", "slots"):  # that of `chunks` depends on the length of the text
        gains = {name: gain(kept, form).mean for name, kept in fitted.items()}
        if min(*gains.values(), gain(rungs["0.1M_80_2048"], form).mean) <= 0:
            rows.append([form, "", "none: a rung has no gain", "", ""])
            continue
        shift, last = longer_training_context(rungs, form), max(gains, key=lambda n: RUNGS[n].parameters)
        targets = {name: (*size, shift) for name, size in FULL_SIZE.items()}
        rows += [[form, name, *spelled(predicted(gains, *target)), ""] for name, target in targets.items()]
        others = {name: value for name, value in gains.items() if name != last}
        if len(others) > 3:
            size = RUNGS[last].parameters, RUNGS[last].tokens_per_parameter
            rows.append([form, f"{last}, by the other rungs", *spelled(predicted(others, *size)),
                         f"{gains[last]:.4f}"])  # fmt: skip
    return table(rows, ("form", "of", "predicted gain, bpb", "95 % interval", "measured"))


# ------------------------------------------------------------------------------------------------------------
# Page
# ------------------------------------------------------------------------------------------------------------


def make_report() -> str:
    report, mixture = measured("report"), measured("mixture")
    shown = {name: [name, RUNGS[name].width, RUNGS[name].layers, f"{RUNGS[name].parameters:,}",
                    RUNGS[name].length, RUNGS[name].tokens_per_parameter, f"{RUNGS[name].steps:,}"]
             for name in report}  # fmt: skip
    heads = ("rung", "width", "layers", "parameters", "T", "tokens a parameter", "steps")
    parts = {
        "Rungs": table(list(shown.values()), heads),
        "Gains on the report text": gains_table(report, (*FORMS, "mixture")),
        "Controls on the report text": gains_table(report, CONTROLS),
        "Gains on text of the training mixture": gains_table(mixture, FORMS),
        "CPU milliseconds a target": seconds_table(report),
        "Seconds of the challenge's text on eight H100, estimated from one": gpu_table(),
        "Gain of slots by position on the report text, nats a target": position_table(report),
        "The same on text of the training mixture": position_table(mixture),
        "Ideas on the report text": ideas_table(),
        "Chosen on tuning documents: rates, and how many were tried": rates_table(report),
        "Meta-learning on the report text": meta_table("report"),
        "Prediction from the report text, an extrapolation": prediction_table(report),
        "Prediction from text of the training mixture": prediction_table(mixture),
    }
    sections = [f"## {title}\n\n{text.rstrip()}" for title, text in parts.items() if text]
    return "\n\n".join(["# The ladder, measured", ABOUT, *sections]) + "\n"


def plot(path: Path) -> None:
    """Gain against unadapted score with the field's points, and gain by position."""
    from matplotlib.figure import Figure

    rungs = measured("report")
    with figure_style():
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, form in enumerate(FORMS):
            gains = [gain(kept, form) for kept in rungs.values()]
            x, color = [mean_of(kept, "none") for kept in rungs.values()], f"C{number}"
            left.errorbar(x, [g.mean for g in gains], yerr=[g.half for g in gains], fmt="o", color=color,
                          capsize=2, label=form)  # fmt: skip
            for name, (kind, score, value, _) in FIELD.items():
                if kind == form:
                    left.plot(score, value, "*", color=color, markersize=11)
                    left.annotate(name, (score, value), xytext=(5, 4), textcoords="offset points")
        left.set(xlabel="not adapted, bits per byte", ylabel="gain of adaptation, bits per byte")
        left.set(yscale="log", title="Gain by how good the model is; stars: published, 27 to 36 M parameters")
        left.legend()
        for name, kept in rungs.items():
            right.plot(range(len(POSITIONS)), by_position(kept, "slots"), "o-", markersize=3, label=name)
        right.set_xticks(range(len(POSITIONS)), [f"{low}" for low in POSITIONS])
        right.set(xlabel="position in the document, targets from", ylabel="gain of slots, nats a target",
                  title="Where in a document the gain is")  # fmt: skip
        right.legend()
        figure.savefig(path, dpi=120)


def main() -> int:
    ladder.tg.write_atomically(HERE / "report.md", make_report().encode())
    if measured("report"):
        plot(HERE / "report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
