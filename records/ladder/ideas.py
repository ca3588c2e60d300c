"""Search for better adaptation on one rung: ideas that the published systems leave open.

    python records/ladder/ideas.py tune        each idea at its own rate, on tuning documents, the first seed
    python records/ladder/ideas.py measure     the best of each kind on `report`, once, all seeds

Kinds: `positions` makes chunks small where a document begins, since a step there has all of it still ahead
(#2014 goes by a document's length, which is not known at that point). `twice` takes two steps on each of the
first chunks. The third idea, mixtures of the adapted and the unadapted prediction, is in ladder.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import ladder
import numpy as np
import torch
from ladder import KEPT, RUNGS, best_rate, ev, load, losses, search, summary, tg, write_json

RUNG = "0.1M_80"


class Idea(NamedTuple):
    """sizes: (size, up to this position) of the first chunks; twice: chunks with two steps."""

    sizes: tuple[tuple[int, int], ...] = ()
    twice: int = 0

    @property
    def kind(self) -> str:
        return "positions" if self.sizes else "twice" if self.twice else "slots"


IDEAS = {
    "slots": Idea(),
    "8 to 64": Idea(sizes=((8, 64),)),
    "16 to 64": Idea(sizes=((16, 64),)),
    "32 to 256": Idea(sizes=((32, 256),)),
    "8 to 48, 24 to 192": Idea(sizes=((8, 48), (24, 192))),
    "8 to 48, 24 to 192, 48": Idea(sizes=((8, 48), (24, 192), (48, 1 << 20))),
    "twice on 1": Idea(twice=1),
    "twice on 2": Idea(twice=2),
    "twice on 4": Idea(twice=4),
}


def chunk_starts(sizes: tuple[tuple[int, int], ...], size: int, longest: int) -> np.ndarray:
    """Where the chunks of a document of `longest` targets begin, and the end of the last."""
    starts = [0]
    while starts[-1] < longest:
        now = starts[-1]
        starts.append(now + next((small for small, end in sizes if now < end), size))
    return np.array(starts)


@dataclass
class BySizes(ev.Setup):
    """A setup whose chunks have the sizes of `sizes` by their position in the document."""

    sizes: tuple[tuple[int, int], ...] = ()

    def plan(self, tokens: np.ndarray) -> list[tg.Chunk]:
        """As eval_ttt.group_plan for one group of documents."""
        c, (low, high) = self.config, ev.documents(tokens)
        starts = chunk_starts(self.sizes, c.doc_chunk, int((high - low).max()))
        count = np.searchsorted(starts, high - low)
        first, slot = ev.assign_slots(count, c.ttt_slots)
        document = np.repeat(np.arange(len(low)), count)
        piece = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
        order = np.lexsort((document, step := first[document] + piece))
        document, piece, step = document[order], piece[order], step[order]
        parts = low[document], high[document], starts[piece], c, np.diff(starts)[piece]
        scored, learned, lengths = tg.chunk_windows(*parts)
        plan = []
        for a, b in pairwise(np.flatnonzero(np.diff(step, prepend=-1, append=-1)).tolist()):
            part = np.arange(a, b)
            slots = tg.Slots(0, slot[document[part]], piece[part] == 0, lengths[part], c.doc_chunk)
            adapts = learned.take(part) if (learned.end > learned.begin)[part].any() else None
            plan.append(tg.Chunk(scored.take(part), adapts, slots))
        return plan


class TwoSteps(ev.TestTimeTrainer):
    """The trainer of `slots` with two steps on each of the first `twice` chunks of a document."""

    def __init__(self, model: tg.GPT, config: tg.Config, twice: int) -> None:
        super().__init__(model, replace(config, ttt_mode="doc_banks"), tg.token_nll, {})
        self.fast.moments.start = tg.generated_moments(model, self.config, self.config.ttt_slots)
        self.twice, self.taken = twice, torch.zeros(config.ttt_slots, dtype=torch.int64)

    def reset(self, slots: torch.Tensor) -> None:
        super().reset(slots)
        self.taken[slots] = 0

    def adapt(self, batch: ev.ScoredBatch) -> None:
        super().adapt(batch)
        again = self.taken[batch.slots] < self.twice
        self.taken[batch.slots] += 1
        if again.any():
            others = torch.ones(len(batch.rows), dtype=torch.bool)
            others[: len(again)] = ~again
            order = torch.argsort(others.long(), stable=True)
            text = tg.TTTBatch(*(part[order] for part in batch.text))
            text.loss_weight[int(again.sum()) :] = 0.0
            rows = batch.rows[order]
            super().adapt(batch._replace(text=text, rows=rows, slots=rows[: int(again.sum())]))


def scored(setup: ev.Setup, text: ladder.Text, name: str, rate: float) -> tuple[np.ndarray, float]:
    """Nats of each target under an idea, and CPU seconds."""
    idea, form = IDEAS[name], ladder.FORMS["slots"][0] | dict(ttt_lr=rate)
    setup = BySizes(**vars(setup), sizes=idea.sizes) if idea.sizes else setup
    trainer = partial(TwoSteps, twice=idea.twice) if idea.twice else None
    return losses(setup, text, form, trainer=trainer)


def rates_file(name: str) -> Path:
    return KEPT / f"idea_{name.replace(', ', '_').replace(' ', '_')}_rates.json"


def tune(name: str, data: Path, out: Path) -> str:
    """Bracket the best rate of an idea."""
    kept = rates_file(name)
    found = json.loads(kept.read_text()) if kept.exists() else {}
    setup, text = load(out / f"runs/{RUNG}_seed{RUNGS[RUNG].seeds[0]}", data / "tuning", RUNGS[RUNG])
    first = float(best_rate(json.loads((KEPT / f"{RUNG}_rates.json").read_text())["slots"]))

    def score(rate: float) -> float:
        nll, _ = scored(setup, text, name, rate)
        return ladder.bpb(nll, text) if np.isfinite(nll).all() else math.inf

    search(first, score, found, partial(write_json, kept, found))
    return f"{name}: {best_rate(found)}, {min(found.values()):.4f}"


def chosen() -> list[str]:
    """Of each kind, the idea with the lowest score on tuning documents."""
    lowest = {name: min(json.loads(rates_file(name).read_text()).values()) for name in IDEAS}
    kinds = {idea.kind for idea in IDEAS.values()}
    return sorted(min((name for name in IDEAS if IDEAS[name].kind == kind), key=lowest.get) for kind in kinds)


def measure(seed: int, data: Path, out: Path, part: str) -> str:
    """Score the chosen ideas on a text, with a seed of the rung."""
    run = f"{RUNG}_seed{seed}"
    kept = KEPT / run / f"{part}_ideas.json"
    if not kept.exists():
        setup, text = load(out / f"runs/{run}", data / part, RUNGS[RUNG])
        rates = {name: float(best_rate(json.loads(rates_file(name).read_text()))) for name in chosen()}
        scores = {name: summary(*scored(setup, text, name, rate), text) for name, rate in rates.items()}
        write_json(kept, dict(rates=rates, **ladder.sizes(text), scores=scores))
    scores = json.loads(kept.read_text())["scores"]
    return f"{run}, {part}: " + ", ".join(f"{name} {one['bpb']:.4f}" for name, one in scores.items())


def work(given: argparse.Namespace) -> list[partial]:
    """The independent jobs of a command."""
    if given.what == "tune":
        return [partial(tune, name, given.data, given.out) for name in IDEAS]
    return [partial(measure, seed, given.data, given.out, given.part) for seed in RUNGS[RUNG].seeds]


if __name__ == "__main__":
    sys.exit(ladder.main(("tune", "measure"), __doc__, work))
