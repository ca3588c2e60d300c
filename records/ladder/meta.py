"""Separate what meta-learning adds to adaptation: weights, factors of the learning rate, and training time.

    python records/ladder/meta.py cost        what a late step costs; run it before `train`
    python records/ladder/meta.py train       every arm and seed
    python records/ladder/meta.py factors     factors of the test-time rate for each run, its weights frozen
    python records/ladder/meta.py tune        the test-time rate of each cell, on tuning documents
    python records/ladder/meta.py measure     every cell on a text; `report` once

A cell is an arm, with or without factors. The arms train one rung of the ladder with the same seeds, two
of which choose the rates of the cells and are not reported:

    plain        ordinary training
    longer       ordinary training for the time that `deployed` takes
    deployed     the last steps train for the weights that test-time steps lead to
    control      the same steps on the same documents, with an inner learning rate of 0
    horizon      as `deployed`, over up to 32 chunks of a document instead of 8
    longer_still ordinary training for the time that `horizon` takes

Their learning rates fall in the same way; `deployed` and `control` are bit-identical up to the last phase.
Factors of the test-time rate, one for each bank row, are learned afterwards, in the same way for all arms,
with weights frozen. So arms differ in weights alone, and cells of an arm in factors alone.

Fixed before the first run. Endpoint: bpb with adaptation by `slots`, on the report text, each cell at its own
rate, paired by seed and document. Three primary comparisons, with intervals of 95 % for all three together:
deployed - control, both with factors (what the inner steps add to the same documents and schedule);
deployed - longer, both with factors (what is left at equal time); factors - no factors, within `longer` (what
factors add without any meta-learned weights). Meta-learning of weights pays if the first two are below 0. All
others are exploratory.

The last two arms are the one attempt to make it work where it falls short, chosen before: its steps see up to
32 chunks, as most documents have fewer. It is judged once, by horizon - longer_still with factors; a gain
would still need a control of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ladder
import numpy as np
import torch
from ladder import (
    KEPT,
    RECIPE,
    RUNGS,
    best_rate,
    finite_bpb,
    load,
    losses,
    summary,
    tg,
    unadapted,
    write_json,
)

RUNG = "0.1M_80"
SEEDS, TUNING_SEEDS = tuple(range(201, 209)), (199, 200)
SHARE = 0.05  # of the steps, at the end
DEPLOYED = {
    "META_TTT_ENABLED": "1", "META_TTT_OBJECTIVE": "deployed", "META_TTT_TIME_FRAC": str(SHARE),
    "META_TTT_DOCS": "4", "META_TTT_PIECES": "8", "META_TTT_OUTER_LR": "0.1",
    "WARMDOWN_FRAC": "0.4737", "MIN_LR": "0.1",  # of the first phase: the plain schedule up to its end
}  # fmt: skip
ARMS: dict[str, dict[str, str]] = {
    "plain": {}, "longer": {}, "control": {**DEPLOYED, "META_CONTROL": "1"}, "deployed": DEPLOYED,
    "horizon": {**DEPLOYED, "META_TTT_DOCS": "2", "META_TTT_PIECES": "32"}, "longer_still": {},
}  # fmt: skip
TIME_OF = {"longer": "deployed", "longer_still": "horizon"}  # plain training for the time of another arm
FACTOR_STEPS, FACTOR_LR = 100, "0.03"


def run_id(arm: str, seed: int) -> str:
    return f"meta_{arm}_seed{seed}"


def rates_file(arm: str, factors: bool) -> Path:
    """Where a cell's test-time rates and their scores are kept."""
    return KEPT / f"meta_{arm}{'_factors' * factors}_rates.json"


def deployed_form() -> dict[str, Any]:
    """The form of adaptation of all cells, at the rate that is best for the rung."""
    rates = json.loads((KEPT / f"{RUNG}_rates.json").read_text())
    return ladder.FORMS["slots"][0] | dict(ttt_lr=float(best_rate(rates["slots"])))


def settings(arm: str) -> dict[str, str]:
    """What an arm sets, its steps included."""
    rung, form = RUNGS[RUNG], {name.upper(): str(value) for name, value in deployed_form().items()}
    steps = rung.steps
    if arm in TIME_OF:
        late = json.loads((KEPT / "meta_cost.json").read_text())["late_step"][TIME_OF[arm]]
        steps = round(steps * (1 - SHARE + SHARE * late))
    return rung.settings | form | ARMS[arm] | {"ITERATIONS": str(steps)}


class Late:
    """The last phase of an arm on a model: its documents, inner steps, and their gradients."""

    def __init__(self, seed: int, weights: Path | None, data: Path, arm: str = "deployed") -> None:
        environ = {"RECIPE": str(RECIPE), **settings(arm), "META_SGD_ENABLED": "1",
                   "META_SGD_LR": FACTOR_LR, "DATA_PATH": str(data / "tuning"), "SEED": str(seed),
                   "TOKENIZER_PATH": str(data / "tuning/tokenizer.model"), "DEVICE": "cpu",
                   "USE_COMPILE": ladder.COMPILE}  # fmt: skip
        self.config, _, _ = tg.load_config(environ)
        table = tg.load_byte_table(self.config.tokenizer_path, self.config.vocab_size)
        self.model = tg.GPT(self.config, torch.float32, word_start=table.has_leading_space)
        if weights is None:
            self.model.init_weights(seed)
        else:
            self.model.load_state_dict(torch.load(weights))
        self.stream = tg.TokenStream(self.config.shards("train"), self.config.vocab_size)
        self.rates = tg.MetaRates(self.model, self.config)
        self.fast = tg.inner_weights(self.model, self.config, "deployed")
        self.fast.moments.start = tg.generated_moments(self.model, self.config, self.fast.sets)

    def gradients(self, step: int, nll_fn: Callable = tg.token_nll) -> torch.Tensor:
        """Add the gradients of a step's documents, which no phase of training draws; returns their loss."""
        generator = np.random.default_rng([self.config.seed, 9, step])
        task = tg.sample_documents(self.stream, self.fast.sets, self.config, generator)
        return tg.deployed_step(self.model, self.fast, self.rates, *task, nll_fn)

    def learn(self) -> dict[str, torch.Tensor]:
        """Factors by bank, (rows, 1, 1), after FACTOR_STEPS steps at a rate that falls to 0."""
        for step in range(FACTOR_STEPS):
            self.gradients(step)
            self.model.zero_grad(set_to_none=True)
            self.rates.step(1 - step / FACTOR_STEPS)
        return self.rates.factors()


def late_step(arm: str, data: Path, rounds: int) -> float:
    """CPU seconds of a step of an arm's last phase, as a multiple of an ordinary step's; one thread.

    Compiled as in training. Of two passes over the same documents the second counts, when all is compiled.
    """
    late = Late(0, None, data, arm)
    c, optimizers = late.config, tg.make_optimizers(late.model, late.config)
    loss_fn, nll_fn = (tg.maybe_compile(f, c, torch.device("cpu")) for f in (tg.training_loss, tg.token_nll))
    starts = c.train_seq_len * np.arange(c.train_batch_tokens // c.train_seq_len)
    for _ in range(2):
        spent = {"plain": 0.0, "late": 0.0}
        for step in range(rounds):
            batch = late.stream.sequences(starts + step, c.train_seq_len, torch.device("cpu"))
            for name in spent:
                began = time.process_time()
                loss = late.gradients(step, nll_fn) if name == "late" else None
                batches = [] if name == "late" else [batch]
                tg.train_step(loss_fn, late.model, batches, optimizers, 0.1, c.muon_momentum, loss=loss)
                spent[name] += time.process_time() - began
    return round(spent["late"] / spent["plain"], 2)


def measure_cost(data: Path, rounds: int = 30) -> str:
    """Keep what late steps cost, in ordinary steps."""
    found = {arm: late_step(arm, data, rounds) for arm in TIME_OF.values()}
    write_json(KEPT / "meta_cost.json", dict(late_step=found, rounds=rounds))
    return ", ".join(f"a late step of {arm} costs {ratio} plain steps" for arm, ratio in found.items())


def train(arm: str, seed: int, data: Path, out: Path) -> str:
    result = ladder.run(run_id(arm, seed), seed, settings(arm), data, out)
    return f"{run_id(arm, seed)}: {result['val_bpb_sliding']:.4f} sliding on tuning documents"


def learn_factors(arm: str, seed: int, data: Path, out: Path) -> str:
    kept = KEPT / run_id(arm, seed) / "factors.json"
    if not kept.exists():
        found = Late(seed, out / f"runs/{run_id(arm, seed)}/final_model.pt", data).learn()
        write_json(kept, {name: factor.flatten().tolist() for name, factor in found.items()})
    found = json.loads(kept.read_text())
    low, high = (each(map(each, found.values())) for each in (min, max))
    return f"{run_id(arm, seed)}: factors from {low:.2f} to {high:.2f}"


def opened(arm: str, seed: int, factors: bool, folder: Path, out: Path) -> tuple[Any, ladder.Text]:
    """A cell's artifact, with or without factors, and the text of a folder."""
    setup, text = load(out / f"runs/{run_id(arm, seed)}", folder, RUNGS[RUNG])
    kept = json.loads((KEPT / run_id(arm, seed) / "factors.json").read_text()) if factors else {}
    tensors = {name: torch.tensor(values).view(-1, 1, 1) for name, values in kept.items()}
    return replace(setup, artifact=setup.artifact._replace(factors=tensors)), text


def tune(arm: str, factors: bool, data: Path, out: Path) -> str:
    """Bracket a cell's best test-time rate by the mean score of the tuning seeds."""
    kept = rates_file(arm, factors)
    found = json.loads(kept.read_text()) if kept.exists() else {}
    cells = [opened(arm, seed, factors, data / "tuning", out) for seed in TUNING_SEEDS]
    form = deployed_form()

    def score(rate: float) -> float:
        return statistics.fmean(finite_bpb(setup, text, form | dict(ttt_lr=rate)) for setup, text in cells)

    ladder.search(form["ttt_lr"], score, found, partial(write_json, kept, found))
    return f"{arm}{', factors' * factors}: {best_rate(found)}, {min(found.values()):.4f}"


def measure(arm: str, seed: int, data: Path, out: Path, part: str) -> str:
    """Score a run on a text: not adapted, and adapted without and with factors."""
    kept, scores = KEPT / run_id(arm, seed) / f"{part}.json", {}
    if kept.exists():
        return f"{run_id(arm, seed)}, {part}: kept"
    for factors in (False, True):
        rates = json.loads(rates_file(arm, factors).read_text())
        setup, text = opened(arm, seed, factors, data / part, out)
        if not factors:
            scores["none"] = summary(*unadapted(setup, text, {}), text)
        form = deployed_form() | dict(ttt_lr=float(best_rate(rates)))
        scores["factors" if factors else "slots"] = summary(*losses(setup, text, form), text)
    write_json(kept, dict(ladder.sizes(text), scores=scores))
    told = ", ".join(f"{name} {one['bpb']:.4f}" for name, one in scores.items())
    return f"{run_id(arm, seed)}, {part}: {told}"


def work(given: argparse.Namespace) -> list[partial]:
    """The independent jobs of a command."""
    places = given.data, given.out
    if given.what == "cost":
        return [partial(measure_cost, given.data)]
    if given.what == "tune":
        return [partial(tune, arm, factors, *places) for arm in ARMS for factors in (False, True)]
    job = {"train": train, "factors": learn_factors, "measure": partial(measure, part=given.part)}[given.what]
    seeds = SEEDS if given.what == "measure" else TUNING_SEEDS + SEEDS
    return [partial(job, arm, seed, data=given.data, out=given.out) for arm in ARMS for seed in seeds]


if __name__ == "__main__":
    sys.exit(ladder.main(("cost", "train", "factors", "tune", "measure"), __doc__, work))
