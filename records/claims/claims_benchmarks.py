"""What the kept files give for the pages of benchmarks on a CPU (see claims.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy.special import stdtr
from stated import Cell, Pages, paired

EVALUATOR, LEVERS, QUANTIZATION = (f"benchmarks/{name}_cpu" for name in (
    "2026-11-20_evaluator", "2026-11-21_levers", "2026-11-21_quantisation"))  # fmt: skip
FRONTIER = "benchmarks/2026-11-28_frontier_levers_cpu"
SMALL = "benchmarks/2026-11-28_frontier_small_cpu"
SINGLE = "benchmarks/2026-11-28_single_levers_cpu"
CODERS, SLOTS = "benchmarks/2026-11-27_coders_cpu", "benchmarks/2026-11-27_slots_cpu"
MODELS = ("half an hour", "demo, 700 steps")  # of the benchmark of quantization
# fmt: off


def evaluator(p: Pages) -> None:
    page, kept = p.page(f"records/{EVALUATOR}.md"), p.json(EVALUATOR)
    speed, modes = kept["speed"], {name.strip(): row for name, row in kept["modes"].items()}
    fast, slow = speed["targets_per_second"], speed["loop_targets_per_second"]
    page.says("stride 64, {} of them: {} targets/s, one by one {}: {} times as fast; peak memory {} MiB",
              speed["windows"], fast, slow, fast / slow, speed["peak_mib"])
    tried = {name: sorted(map(float, row["tuning"])) for name, row in modes.items()}
    best = {name: float(max(row["tuning"], key=row["tuning"].get)) for name, row in modes.items()}
    page.says("For {} of the {} modes the best is at an edge",
              sum(best[name] in (rates[0], rates[-1]) for name, rates in tried.items()), len(modes))
    page.says("0.003 gains {} on the first {} documents, 0.002 gains {}",
              modes["pieces of 64"]["tuning"]["0.003"],
              kept["tuning_documents"], modes["pieces of 64"]["tuning"]["0.002"])
    page.shows(0, {name: [best[name], row["plan_bpb"], row["val_bpb"], row["plan_bpb"] - row["val_bpb"],
                          [row["documents_better"], row["documents"]], row["seconds"], row["plan_seconds"]]
                   for name, row in modes.items()})


def lever_rows(kept: dict[str, Any]) -> dict[str, list[Cell]]:
    """Return the cells of every arm at the steps of the timing, and at equal time."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in sorted(kept["runs"], key=lambda run: run["seed"]):
        runs.setdefault((run["arm"], run["steps"]), []).append(run)
    timing, cells = kept["timing"], {}
    steps, noise, times = timing["run_steps"], timing["noise"], timing["ms"]

    def scores(arm: str, steps: int) -> list[Cell]:
        columns = ([run[f"val_bpb_{name}"] for run in runs[arm, steps]] for name in ("roundtrip", "sliding"))
        plain, sliding = (np.array(column) for column in columns)
        gaps = sliding - [run["val_bpb_sliding"] for run in runs["recipe", timing["run_steps"]]]
        return [plain.mean(), sliding.mean(), [gaps.mean(), gaps.std(ddof=1)]]

    for row in kept["rows"]:
        settings = [f"{key}={value}" for key, value in row["settings"].items()]
        ms = times[max((key for key in times if set(key.split()) <= set(settings)), key=len)]
        fit = steps if abs(times[""] / ms - 1) <= 2 * noise else round(steps * times[""] / ms)
        sizes = [mean(run[key] for run in runs[row["arm"], steps]) for key in ("model_params", "bytes_model")]
        same = scores(row["arm"], steps)
        cells[row["arm"]] = [ms, *sizes, *same, fit, *scores(row["arm"], fit), " ".join(settings)]
    return cells


def levers(p: Pages) -> None:
    page, kept = p.page(f"records/{LEVERS}.md"), p.json(LEVERS)
    timing, cells = kept["timing"], lever_rows(kept)
    gaps = {name: row[5] for name, row in cells.items() if name != "recipe"}
    p_values = [float(2 * stdtr(2, -abs(gap) / (spread / 3**0.5))) for gap, spread in gaps.values()]
    deep = {name: row for name, row in cells.items() if name.startswith("depth")}
    page.shows(0, {name: row for name, row in cells.items() if name not in deep})
    page.shows(1, {"recipe": cells["recipe"], **deep})
    page.says("trained for {} steps, and for as", timing["run_steps"])
    page.says("the median over {} rounds of the mean of {} steps", timing["rounds"], timing["steps_a_round"])
    page.says("which differ by {}%", 100 * timing["noise"])
    page.says("ends {} behind none at all", -cells["no_average"][5][0])
    page.says("Of {} arms at equal steps {} have p < 0.05 (t, n = 3) and {} after Bonferroni", len(p_values),
              *(sum(x < limit for x in p_values) for limit in (0.05, 0.05 / len(p_values))))
    page.says("which took {} to {} steps", *(which(row[6] for row in deep.values()) for which in (min, max)))


def single_levers(p: Pages) -> None:
    page, corpora = p.page(f"records/{SINGLE}.md"), p.json(SINGLE)["corpora"]
    demo, web = (lever_rows(corpora[name]) for name in ("demo", "weblab"))
    page.shows(0, demo)
    page.shows(1, web)
    page.says("trained for {} steps", corpora["demo"]["timing"]["run_steps"])
    page.says("copies of the recipe differ by {} %", 100 * corpora["demo"]["timing"]["noise"])
    page.says("gain on both texts at 250 steps, {} and {} on the demo's, {} and {} on web text",
              *(-rows[name][5][0] for rows in (demo, web) for name in ("bigram_signs", "tail_readout")))
    page.says("`KEY_OFFSET` gains {} on the demo's text", -demo["key_offset"][5][0])
    page.says("were timed {} % and {} % faster", *(100 * (1 - demo[name][0] / demo["recipe"][0])
                                                 for name in ("normuon", "ema_nesterov_3")))


def bytes_at(points: list[dict[str, float]], gap: float) -> float:
    """Return the bytes of a curve at a gap, on straight lines between logarithms; nan outside of it."""
    x, y = zip(*sorted((math.log(point["gap"]), math.log(point["bytes"])) for point in points), strict=True)
    return math.exp(np.interp(math.log(gap), x, np.minimum.accumulate(y), left=math.nan, right=math.nan))


def curves(p: Pages, model: str) -> dict[str, list[dict[str, float]]]:
    return p.json(QUANTIZATION)["points"][model]["curves"]


def is_published(pipeline: str) -> bool:
    return not re.search("two-sided|our layout|clip search|late QAT", pipeline)


def shares(p: Pages, model: str) -> dict[str, dict[float, tuple[float, float]]]:
    """Return bytes and their share of the best published pipeline's, by pipeline and gap."""
    late = curves(p, "demo, 700 steps, late QAT") if model == MODELS[1] else {}
    every = curves(p, model) | {f"late QAT, {name}": curve for name, curve in late.items()}
    published = [name for name in every if is_published(name)]
    found: dict[str, dict[float, tuple[float, float]]] = {name: {} for name in every}
    for gap in (0.001, 0.002, 0.003, 0.004, 0.006):
        at = {name: bytes_at(curve, gap) for name, curve in every.items()}
        best = min((at[name] for name in published if at[name] > 0), default=math.nan)
        for name, size in at.items():
            found[name][gap] = (size, size / best)
    return found


def trellis(p: Pages) -> tuple[float, float]:
    """Return how many percent more bytes the trellis takes at equal gap, and how many fewer, at most."""
    found = [shares(p, model) for model in MODELS]
    more = [100 * (rows[f"two-sided, trellis, {coder}"][gap][0] / size - 1) for rows in found
            for coder in ("zstd", "ans") for gap, (size, _) in rows[f"two-sided, {coder}"].items()]
    return max(more), -min(more)


def quantisation(p: Pages) -> None:
    page, kept = p.page(f"records/{QUANTIZATION}.md"), p.json(QUANTIZATION)
    for index, model in enumerate(MODELS):
        page.shows(index, {name: [[x for x in cell if x > 0] for cell in row.values()]
                           for name, row in shares(p, model).items()})
    half, demo, late = (kept["points"][name] for name in (*MODELS, "demo, 700 steps, late QAT"))
    zstd, k, value = "two-sided, zstd", "k sigma, brotli-11", {}
    for where, model in (("half", half), ("demo", demo), ("late", late)):
        value |= {(where, name, point["value"]): point for name, curve in model["curves"].items()
                  for point in curve}
    page.says("1.06 M parameters, {} bpb", half["base"])
    page.says("700 steps, {} bpb", demo["base"])
    fine, default = (value["demo", zstd, x]["gap"] for x in (3e-4, 1e-3))
    page.says("larger by {} (demo: {} at QUANT_LOSS 0.0003, {} at 0.001)", fine - default, fine, default)
    page.says("at 12.85 sigma the gap is {} for {}, at 17 sigma {} for {}, and the weights themselves are {} "
              "worse", *(value[where, k, x]["gap"] for x in (12.85, 17) for where in ("late", "demo")),
              late["base"] - demo["base"])
    page.says("Two-sided steps: {} and {} for {} and {} at QUANT_LOSS",
              *(value[where, zstd, x]["gap"] for where in ("late", "demo") for x in (1e-3, 3e-3)))

    def against(ours: str, theirs: str, where: str) -> np.ndarray:
        """Gaps and percent of bytes, ours less theirs, at the same values."""
        names = [x for place, name, x in value if (place, name) == (where, ours)]
        rows = [(value[where, ours, x], value[where, theirs, x]) for x in names]
        return np.array([(a["gap"] - b["gap"], 100 * (a["bytes"] / b["bytes"] - 1)) for a, b in rows])

    pruned = {where: against("two-sided, 20 % pruned", zstd, where) for where in ("half", "demo")}
    fewer = -np.concatenate([rows[:, 1] for rows in pruned.values()])
    page.says("the gap is {} (half an hour) and {} (demo) larger, for {} to {} % fewer bytes",
              *(rows[:, 0].mean() for rows in pruned.values()), fewer.min(), fewer.max())
    page.says("takes {} % more (demo, gap 0.001, zstd) to {} % fewer bytes", *trellis(p))
    equal = np.concatenate([against(f"two-sided, trellis, {coder}", f"two-sided, {coder}", where)[:, 1]
                            for where in pruned for coder in ("zstd", "ans")])
    page.says("whose gaps differ, {} % more to {} % fewer", equal.max(), -equal.min())
    labels = {"GPTQ, a plain loop over single matrices, factors given": ["plain_loop"],
              "the same by round_all, batched": ["round"],
              "factors of all Hessians and steps (plan_rounding)": ["plan"],
              "both with two-sided steps; with the trellis": ["quantize two-sided", "quantize trellis"],
              "encode: zstd, lzma, ans": ["encode zstd", "encode lzma", "encode ans"],
              "read back and dequantize: zstd, lzma, ans": ["decode zstd", "decode lzma", "decode ans"],
              "the same with the trellis": [f"decode trellis {name}" for name in ("zstd", "lzma", "ans")],
              "text by the demo model itself, 8 x 256 tokens: with the cache, without":
                  ["generate cached", "generate full prefix"]}
    page.shows(2, {label: [[kept["timing"][name] for name in names]] for label, names in labels.items()})


def frontier(p: Pages) -> None:
    page = p.page(f"records/{FRONTIER}.md")
    runs = sorted(p.json(FRONTIER)["runs"], key=lambda run: run["seed"])
    rows: dict[str, list[Cell]] = {}
    for arm, label in (("before", "without the three"), ("after", "with all three"),
                       ("without_key_offset", "without KEY_OFFSET=16"),
                       ("without_bigram_signs", "without BIGRAM_SIGNS=1"),
                       ("without_tail_readout", "without EMA_EXPORT_SHARE=0.6")):
        found, after = ([[run[f"val_bpb_{key}"] for run in runs if run["arm"] == name]
                         for key in ("roundtrip", "sliding", "ttt")] for name in (arm, "after"))
        steps = next(run["steps"] for run in runs if run["arm"] == arm)
        apart = ["", ""] if arm == "after" else [paired(found[i], after[i])[:3] for i in (1, 2)]
        rows[label] = [steps, *([mean(scores), stdev(scores)] for scores in found), *apart]
    page.shows(0, rows)
    before, after = (sliding[0] - adapted[0] for _, _, sliding, adapted, *_ in list(rows.values())[:2])
    page.says("gains {} over the sliding score with the three levers, {} without", after, before)


def gap_at(points: list[dict[str, float]], size: float) -> float:
    """Return the gap of a curve at a number of bytes, on straight lines between logarithms; nan outside."""
    x, y = zip(*sorted((math.log(point["bytes"]), math.log(point["gap"])) for point in points), strict=True)
    return math.exp(np.interp(math.log(size), x, y, left=math.nan, right=math.nan))


def frontier_small(p: Pages) -> None:
    page, kept = p.page(f"records/{SMALL}.md"), p.json(SMALL)
    systems = {name: [run["curves"][name] for run in kept["curves"].values()] for name in ("#1855", "ours")}
    fewer = {}
    for index, (at, places) in enumerate(((bytes_at, (0.008, 0.012, 0.02)), (gap_at, (4e5, 4.5e5, 5e5)))):
        rows = {}
        for place in places:
            theirs, ours = (np.array([at(curve, place) for curve in curves]) for curves in systems.values())
            less = 100 * (1 - ours / theirs)
            rows[f"{place:,.15g}"] = [theirs.mean(), ours.mean(), [less.min(), less.max()]]
            fewer[place] = less
        page.shows(index, rows)
    every = np.concatenate([fewer[gap] for gap in (0.008, 0.012, 0.02)])
    recipe = p.page("records/recipes/ours.env")
    page.says("trellis, and coder take {} to {} % fewer bytes", every.min(), every.max())
    recipe.says("trellis take {} to {} % fewer bytes", every.min(), every.max())
    forms: dict[str, list[dict[str, Any]]] = {}
    for row in kept["adaptation"]:
        forms.setdefault(row["form"], []).append(row)
    rows: dict[str, list[Cell]] = {}
    for form, runs in forms.items():
        plain, adapted = ([run[f"val_bpb_{key}"] for run in runs] for key in ("plan", "ttt"))
        own = [float(runs[0]["rate"]), paired(plain, adapted)[:2]] if form != "none" else ["", ""]
        rows[form] = [own[0], mean(plain), mean(adapted), own[1], mean(run["eval_seconds"] for run in runs)]
    page.shows(2, rows)
    recipe.says("all weights gain {}, its adapters in phases {}",
                rows["all weights by document (ours)"][3][0], rows["adapters in phases (#1855)"][3][0])
    page.says("Not adapted, the three models score {} in non-overlapping windows and {} sliding",
              *(mean(run[f"val_bpb_{key}"] for run in forms["none"]) for key in ("roundtrip", "sliding")))
    for what, name in (("tuning", "tunes"), ("report", "reports")):
        page.says(f"{{}} documents, {{}} targets, {name}",
                  kept["texts"][what]["documents"], kept["texts"][what]["targets"])
    page.says("{} bytes on average, {} parameters", mean(run["bytes_model"] for run in kept["trained"]),
              kept["trained"][0]["model_params"])


def coders(p: Pages) -> None:
    page, texts = p.page(f"records/{CODERS}.md"), list(p.json(CODERS)["texts"].values())
    rows = [{row["coder"] + f" {row.get('level', '')}".rstrip(): row for row in text["results"]
             if not {"threads", "pool"} & set(row)} for text in texts]
    size = {name: [found[name]["bytes"] for found in rows] for name in rows[0]}
    page.says("{} M Gaussian codes, bytes | CPU s | {} M codes", *(text["codes"] / 1e6 for text in texts[:2]))
    seconds, decode = ({name: row[key] for name, row in rows[0].items()}
                       for key in ("cpu_seconds", "decode_cpu_seconds"))
    page.shows(0, {"lzma, preset 9 extreme" if name == "lzma" else name: [first, seconds[name], *others]
                   for name, (first, *others) in size.items()})

    def more(name: str, other: str = "zstd 22") -> list[float]:
        return [100 * (a / b - 1) for a, b in zip(size[name], size[other], strict=True)]

    page.says("within {} % of level 22's bytes for {} % of its CPU seconds", max(map(abs, more("zstd 16"))),
              100 * seconds["zstd 16"] / seconds["zstd 22"])
    page.says("Levels 3 to 15 lose up to {} %", max(more(f"zstd {level}")[0] for level in (3, 9, 15)))
    two = next(row for row in texts[0]["results"] if row.get("threads") == 2)
    page.says("(two: the same bytes, {} CPU s)", two["cpu_seconds"] if two["bytes"] == size["zstd 16"][0]
              else 0)
    gaussian, demo, weblab = more("ans")
    page.says("`ans` is {} % smaller than zstd 22 on Gaussian codes, {} % on weblab's, {} % larger on",
              -gaussian, -weblab, demo)
    page.says("it takes {} s.", seconds["ans"])
    page.says("`lzma` is {} % larger than zstd 22", more("lzma")[0])
    page.says("Decoding takes {} s by zstd, {} s by lzma and ans", decode["zstd 16"], decode["ans"])


def slot(p: Pages, text: str, form: str, weight: int | None = None, seeds: Sequence[int] = (),
         **more: Any) -> dict[int, float]:
    """Return the scores by seed of the rows with exactly these settings; `weight` of the prior, in chunks."""
    wanted = dict(text=text, form=form, documents="report", order="slots", S=16, groups=1, ttt_lr=0.002,
                  adapts=True)
    wanted |= more
    if weight:
        wanted["prior"] = dict(source="generated", sequences=16, chunks_each=4, temperature=0.8, seed=0,
                               weight_chunks=weight)
    results = ("seed", "bpb", "cpu_seconds", "n_documents", "steps", "targets")
    return {row["seed"]: row["bpb"] for row in p.json(SLOTS)["rows"]
            if row["seed"] in (seeds or range(2001, 2006))
            and {key: value for key, value in row.items() if key not in results} == wanted}


def before(p: Pages, text: str, order: str, form: str = "A, EMA as today",
           seeds: Sequence[int] = ()) -> dict[int, float]:
    """Return the scores of batches, as the evaluator ran before it had slots."""
    return slot(p, text, form, None, seeds, order=order, decay_per_step=0.99)


def slots(p: Pages) -> None:
    page, cells = p.page(f"records/{SLOTS}.md"), {}
    rows = {"shared, no prior": ("A", None), "shared, prior of weight 64": ("A", 4096),
            "what was scored before the document entered, then its own, no prior": ("C", None),
            "the same, prior of weight 64": ("C", 4096), "prefix, no prior": ("D", None),
            "prefix, prior of weight 64": ("D", 4096), "own, prior of weight 64 (default)": ("P", 4096)}
    for text in ("demo", "weblab"):
        base = before(p, text, "batches, file order")
        found = {"batches of 16 in file order, running mean (before)": base,
                 "batches of 16, longest first (before)": before(p, text, "batches, longest first")}
        for name, by_seed in {**found, **{name: slot(p, text, *which)
                                          for name, which in rows.items()}}.items():
            gaps = [by_seed[seed] - base[seed] for seed in base]
            spread = [mean(gaps), stdev(gaps) / len(gaps) ** 0.5] if by_seed is not base else []
            cells.setdefault(name, []).extend([[mean(by_seed.values()), stdev(by_seed.values())], spread])
    page.shows(0, cells)
    page.shows(1, tuning_of_slots(p), keys=6)
    count = {(row["text"], row["documents"]): row["n_documents"] for row in p.json(SLOTS)["rows"]}
    page.says("The demo's {} documents include the {} that ...; weblab's {} do not.", count["demo", "report"],
              count["demo", "tune"], count["weblab", "report"])
    seeds = (1337, 2001)
    running, live = (before(p, "demo", order, seeds=seeds) for order in ("batches, file order", "slots"))
    weighted = before(p, "demo", "batches, file order", "A", seeds)
    page.says("scored {} worse than file-order batches", mean(live[seed] - running[seed] for seed in seeds))
    page.says("Weighted by chunks, batches score {} and {}, slots {} and {}", *weighted.values(),
              *live.values())
    last = {row["name"]: sum(row["nats"][-627:]) / math.log(2) / sum(row["bytes"][-627:])
            for row in p.json(SLOTS)["long"]}
    targets = {row["name"]: row["targets"] for row in p.json(SLOTS)["long"]}
    page.says("seed 2001, {} targets of training text", targets["prefix"])
    page.says("The last {} targets score {} with the sums of everything before them, {} with sums that begin "
              "with them. There `prefix` with the prior and all sums scores {}, `own` {}, no adaptation {}.",
              targets["own, last 400,000"],
              *(last[name] for name in ("prefix, no prior", "prefix, no prior, last 400,000 from scratch",
                                        "prefix",
                                        "own, last 400,000", "no adaptation, last 400,000")))


def tuning_of_slots(p: Pages) -> dict[tuple[str, ...], list[Cell]]:
    """Return the tuning scores of seed 1337 on the two texts, by the settings in the first six columns."""
    names, found = {"D": "prefix", "P": "own", "A, EMA as today": "batches (before)"}, {}
    for row in p.json(SLOTS)["rows"]:
        prior = row.get("prior", {})
        other = {"moments_of", "entry_cap_chunks"} & {*prior, *row} or prior.get("chunks_each", 4) != 4
        if row["documents"] != "tune" or not row["adapts"] or prior.get("source", "generated") != "generated":
            continue
        if (row["S"], row["groups"]) == (16, 1) and not other:
            key = (names[row["form"]], *(f"{prior[x]:,.15g}" if x in prior else "" for x in (
                "sequences", "weight_chunks", "temperature", "seed")), f"{row['ttt_lr']:g}")
            found.setdefault(key, [[], []])[row["text"] == "weblab"] = [row["bpb"]]
    return found
