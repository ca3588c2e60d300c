"""Measure what adaptation is worth as models grow and train longer.

    python records/ladder/ladder.py data --corpus DIR     shards of weblab, and of three texts to score
    python records/ladder/ladder.py train                 every rung and seed; hours
    python records/ladder/ladder.py tune                  the learning rate of each form, on tuning documents
    python records/ladder/ladder.py measure               forms on a text, controls on `report`, once

A rung is a width, a depth, and a number of training tokens per parameter outside tables. Every run is bounded
by steps and every result is kept in a file of its own, so each command continues where it stopped, and other
work on the machine changes no score. Seconds are CPU time of one thread.

Texts: `tuning`, documents 0 to 199 of weblab's validation text, chooses learning rates; `report`, documents
of the same source (FineWeb-Edu) that nothing has seen; `mixture`, documents of the training mixture, held out
by a hash of their text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import prepare  # noqa: E402
from formats import shard_header  # noqa: E402

import eval_ttt as ev  # noqa: E402
import train_gpt as tg  # noqa: E402

RECIPE, KEPT = HERE / "ladder.env", HERE / "kept"
BATCH = 4096  # tokens of a step
COMPILE = "1"  # training, one thread: 298 to 200 ms a step at 0.1 M parameters, 433 to 369 at 0.3 M


class Rung(NamedTuple):
    """A size of model and a length of training, for each of `seeds`."""

    width: int
    layers: int
    tokens_per_parameter: int
    seeds: tuple[int, ...] = (1337, 42, 2025)
    length: int = 512

    @property
    def settings(self) -> dict[str, str]:
        last = f"{self.layers - 2},{self.layers - 1}"
        sizes = dict(MODEL_DIM=self.width, NUM_LAYERS=self.layers, NUM_HEADS=self.width // 32,
                     XSA_LAST_N=self.layers, VE_LAYERS=last, TRAIN_SEQ_LEN=self.length,
                     EVAL_SEQ_LEN=self.length)  # fmt: skip
        return {name: str(value) for name, value in sizes.items()}

    @property
    def longer(self) -> tuple[int, ...]:
        """Contexts to score without adaptation; to save time, none where T or the model is large."""
        return LONGER if self.length == 512 and self.parameters < 500_000 else ()

    @property
    def parameters(self) -> int:
        """Of the matrices of all blocks: what tokens per parameter count."""
        c, _, _ = tg.load_config({"RECIPE": str(RECIPE), **self.settings})
        return self.layers * (2 * c.model_dim**2 + 2 * c.kv_dim * c.model_dim + 2 * c.mlp_dim * c.model_dim)

    @property
    def steps(self) -> int:
        return round(self.tokens_per_parameter * self.parameters / BATCH)


RUNGS = {
    "0.1M_20": Rung(64, 3, 20),
    "0.1M_80": Rung(64, 3, 80),
    "0.3M_20": Rung(96, 4, 20),
    "0.1M_80_2048": Rung(64, 3, 80, length=2048),
    "1M_20": Rung(160, 4, 20, seeds=(1337, 42)),
    "0.1M_320": Rung(64, 3, 320),
    "0.3M_80": Rung(96, 4, 80),
}
TUNING_DOCUMENTS, MIXTURE_DOCUMENTS = 200, 600
TUNING_TARGETS = 4096  # of each document: two of the 200 would be a fifth of the text, and rule the rates

# Form of adaptation -> its settings, and the learning rate that its search begins with. `chunks` is #549's;
# `adapters` is #1855's without the phases of its base weights, and with the rank that these widths allow.
FORMS: dict[str, tuple[dict[str, Any], float]] = {
    "chunks": (
        dict(ttt_mode="all", ttt_optimizer="sgd", ttt_momentum=0.9, ttt_epochs=3, ttt_grad_clip=1.0,
             ttt_chunk_tokens=32768, ttt_lr_schedule="cosine"), 0.05,
    ),
    "adapters": (  # at T = 2,048, too, with the context of 512
        dict(ttt_mode="doc_lora", ttt_optimizer="adamw", ttt_lora_form="parallel", ttt_chunk_size=48,
             ttt_context=464, ttt_lora_alpha=14.4, ttt_warm_start_a=True, ttt_weight_decay=0.5,
             ttt_grad_clip=0.0), 8e-3,
    ),
    "slots": (dict(ttt_mode="doc_banks", ttt_optimizer="precond"), 2e-3),
}  # fmt: skip
# Scores without adaptation -> the form whose plan they share: context differs by chunk.
UNADAPTED = {"none": "slots", "none, adapters": "adapters", "none, chunks": "chunks"}
LONGER = (2, 4)  # contexts without adaptation, as multiples of T = 512
OTHER = {"another document": 1.0, "another document, quarter rate": 0.25}  # by the rate of `slots`
MIXED = (0.5, 0.75, 0.9)  # weights of the adapted prediction in a mixture with the unadapted one
POSITIONS = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # first targets of the bins within a document


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> list[str]:
    """The documents of a JSONL file, .xz or plain."""
    opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8")
    with opened as lines:
        return [json.loads(line)["text"] for line in lines]


def write_texts(path: Path, texts: list[str]) -> Path:
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def make_data(corpus: Path, data: Path) -> str:
    """Write all shards to `data`/all, and the texts to score to `data`/tuning, mixture, and report."""
    data.mkdir(parents=True, exist_ok=True)
    train = read_texts(corpus / "weblab_train.jsonl.xz")
    distinct = dict.fromkeys(train)
    held_out = sorted(distinct, key=lambda text: hashlib.sha256(text.encode()).digest())[:MIXTURE_DOCUMENTS]
    texts = {
        "tuning": read_texts(corpus / "weblab_val.jsonl.xz")[:TUNING_DOCUMENTS],
        "mixture": held_out,
        "report": read_texts(corpus / "weblab_report.jsonl.xz"),
    }
    out_of_training = {*held_out}
    kept = [text for text in train if text not in out_of_training]
    scored = [text for part in texts.values() for text in part]
    inputs = [write_texts(data / f"{name}.jsonl", part) for name, part in (("train", kept), ("val", scored))]
    job = prepare.Job((inputs[0],), data / "all", "weblab", tokenizer=corpus / "fineweb_1024_bpe.model",
                      val_inputs=(inputs[1],), workers=os.cpu_count() or 1, overwrite=True)  # fmt: skip
    prepare.prepare(job)
    tokens = tg.open_shard(str(data / "all/fineweb_val_000000.bin"))
    begin, _ = ev.documents(tokens)
    assert len(begin) == len(scored), f"{len(scored)} documents, {len(begin)} in the shard"
    borders, first = [*begin, len(tokens)], 0
    for name, part in texts.items():
        folder, last = data / name, first + len(part)
        folder.mkdir(exist_ok=True)
        for path in [*(data / "all").glob("fineweb_train_*.bin"), data / "all/tokenizer.model"]:
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)
        longest = TUNING_TARGETS if name == "tuning" else len(tokens)
        documents = [tokens[a : min(a + longest + 1, b)] for a, b in pairwise(borders[first : last + 1])]
        text = np.concatenate(documents).astype("<u2")
        (folder / "fineweb_val_000000.bin").write_bytes(shard_header(len(text)) + text.tobytes())
        first = last
    return f"{len(kept)} documents to train on; to score: " + ", ".join(
        f"{n} {len(t)}" for n, t in texts.items()
    )


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def run(name: str, seed: int, settings: Mapping[str, str], data: Path, out: Path) -> dict[str, Any]:
    """Train and export `out`/runs/`name` unless that is done; keep its log and result, and return this."""
    kept, folder = KEPT / name, out / "runs" / name
    if not (folder / "result.json").exists():
        for link, target in ((out / "data", data), (out / RECIPE.name, RECIPE)):  # logs keep relative paths
            with suppress(FileExistsError):
                link.symlink_to(target)
        known = {field.upper() for field in tg.Config.__dataclass_fields__} | {"RECIPE"}
        env = {key: value for key, value in os.environ.items() if key not in known} | dict(settings) | {
            "RECIPE": RECIPE.name, "DATA_PATH": "data/tuning", "RUN_ID": name, "SEED": str(seed),
            "TOKENIZER_PATH": "data/tuning/tokenizer.model", "RESUME": "auto",
            "CHECKPOINT_EVERY": "200", "DEVICE": "cpu", "OMP_NUM_THREADS": "1", "USE_COMPILE": COMPILE,
        }  # fmt: skip
        with open(out / f"{name}.txt", "a") as log:
            subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=env, cwd=out, check=True,
                           stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("train.log", "result.json"):
        tg.write_atomically(kept / file, (folder / file).read_bytes())
    return json.loads((kept / "result.json").read_text())


def train(name: str, seed: int, data: Path, out: Path) -> str:
    """Train a rung with a seed unless that is done; what came of it."""
    rung, run_id = RUNGS[name], f"{name}_seed{seed}"
    result = run(run_id, seed, rung.settings | {"ITERATIONS": str(rung.steps)}, data, out)
    return f"{run_id}: {rung.steps} steps, {result['val_bpb_sliding']:.4f} sliding on tuning documents"


# ------------------------------------------------------------------------------------------------------------
# Adaptation
# ------------------------------------------------------------------------------------------------------------


class OtherDocument(ev.Setup):
    """A control: every step of a document is taken on the same chunk of another, its partner.

    A partner is drawn with a fixed seed from the documents that begin no later and have at least as many
    chunks, so that its chunk is scored by then. Where there is none, the longest serves over and over.
    """

    def plan(self, tokens: np.ndarray) -> list[ev.Chunk]:
        begin, end = ev.documents(tokens)
        count = -(-(end - begin) // self.config.doc_chunk)
        steps = count - 1  # nothing adapts on the last chunk
        first, _ = ev.assign_slots(count, self.config.ttt_slots)
        generator, partner = np.random.default_rng(0), np.zeros(len(begin), np.int64)
        for one in range(len(begin)):
            earlier = np.flatnonzero((first <= first[one]) & (np.arange(len(begin)) != one) & (steps > 0))
            enough = earlier[steps[earlier] >= steps[one]]
            partner[one] = generator.choice(enough) if len(enough) else earlier[steps[earlier].argmax()]

        def moved(windows: ev.Windows) -> ev.Windows:
            own = np.searchsorted(begin, windows.start, side="right") - 1
            offset = (windows.start - begin[own]) % (steps[partner[own]] * self.config.doc_chunk)
            return windows._replace(start=begin[partner[own]] + offset)

        return [chunk if chunk.adapted is None else chunk._replace(adapted=moved(chunk.adapted))
                for chunk in super().plan(tokens)]  # fmt: skip


class Text(NamedTuple):
    """Tokens to score; of each target its document, its position there, and its bytes."""

    tokens: np.ndarray
    document: np.ndarray
    position: np.ndarray
    num_bytes: np.ndarray


def load(run: Path, folder: Path, rung: Rung) -> tuple[ev.Setup, Text]:
    """The artifact of a run and the text of a folder, ready to be scored by documents."""
    environ = {"RECIPE": str(RECIPE), **rung.settings, "MODEL_PATH": str(run / "final_model.int6.ptz"),
               "DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer.model"),
               "DEVICE": "cpu"}  # fmt: skip
    config, given, _ = tg.load_config(environ)
    setup, tokens, *_ = ev.prepare(config, given, environ)
    begin, end = ev.documents(tokens)
    document = np.repeat(np.arange(len(begin)), end - begin)
    position = np.arange(len(document)) - begin[document]
    return setup, Text(tokens, document, position, setup.byte_table.of_text(tokens))


def losses(
    setup: ev.Setup, text: Text, changes: Mapping[str, Any], trainer: Callable | None = None
) -> tuple[np.ndarray, float]:
    """Nats of each target under changed settings, with a trainer of its own if given, and CPU seconds."""
    config, plugin = replace(setup.config, **changes), None
    if trainer is not None:
        config, plugin = replace(config, ttt_mode="own"), ev.Plugin(trainer, Path(__file__).name, b"")
    began = time.process_time()
    nll = ev.evaluate(replace(setup, config=config, plugin=plugin), text.tokens).nll
    return nll, time.process_time() - began


def unadapted(setup: ev.Setup, text: Text, changes: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Nats of each target in the plan of changed settings, by the plain forward, and CPU seconds."""
    began = time.process_time()
    nll = ev.score_plan(replace(setup, config=replace(setup.config, **changes)), text.tokens).nll
    return nll, time.process_time() - began


def with_context(
    setup: ev.Setup, text: Text, rung: Rung, times: int, scaled: bool
) -> tuple[np.ndarray, float]:
    """`unadapted` with a longer context, its rotary base as trained or scaled with the context (NTK)."""
    c = setup.artifact.config
    base = c.rope_base * times ** (c.rotary_dims / (c.rotary_dims - 2)) if scaled else c.rope_base
    artifact = setup.artifact._replace(config=replace(c, rope_base=base))
    return unadapted(replace(setup, artifact=artifact), text, dict(eval_seq_len=times * rung.length))


def write_json(path: Path, content: Any) -> None:
    tg.write_atomically(path, json.dumps(content).encode())


def bpb(nll: np.ndarray, text: Text) -> float:
    return float(nll.sum(dtype=np.float64) / math.log(2) / text.num_bytes.sum())


def mixed(adapted: np.ndarray, plain: np.ndarray, weight: float) -> np.ndarray:
    """Nats of each target under `weight` * adapted + (1 - weight) * plain prediction."""
    return ev.mixed_nll(adapted.astype(np.float64), plain.astype(np.float64), weight)


def finite_bpb(setup: ev.Setup, text: Text, changes: Mapping[str, Any]) -> float:
    """The score under changed settings, infinite if adaptation diverges."""
    nll, _ = losses(setup, text, changes)
    return bpb(nll, text) if np.isfinite(nll).all() else math.inf


def summary(nll: np.ndarray, seconds: float, text: Text) -> dict[str, Any]:
    """What is kept of a score: nats by document and by position, from which the page is derived."""
    bins = np.searchsorted(POSITIONS, text.position, side="right") - 1
    by_position, by_document = (np.bincount(index, nll.astype(np.float64)) for index in (bins, text.document))
    return dict(bpb=bpb(nll, text), seconds=round(seconds, 2), nats_by_position=by_position.tolist(),
                nats_by_document=np.round(by_document, 4).tolist())  # fmt: skip


def sizes(text: Text) -> dict[str, Any]:
    """What the nats of a summary are divided by, and the hash of the text."""
    return dict(bytes_by_document=np.bincount(text.document, text.num_bytes).astype(int).tolist(),
                targets_by_position=np.histogram(text.position, [*POSITIONS, 1 << 30])[0].tolist(),
                sha256_text=hashlib.sha256(text.tokens.tobytes()).hexdigest())  # fmt: skip


def search(first: float, score: Callable[[float], float], found: dict[str, float], keep: Callable) -> None:
    """Fill `found`, rate -> score, by factors of two until the lowest lies between two others, then of 2^0.5.

    `keep()` after each. Stops at 256 times or a 256th of `first`: then the lowest is at an edge.
    """

    def scored(power: float) -> float:
        rate = f"{first * 2**power:.4g}"
        if rate not in found:
            found[rate] = score(float(rate))
            keep()
        return found[rate]

    best = 0
    while (better := min((best, best - 1, best + 1), key=scored)) != best and abs(better) <= 8:
        best = better
    for power in (best - 0.5, best + 0.5):
        scored(power)


def tune(name: str, data: Path, out: Path) -> str:
    """Choose on tuning documents, with a rung's first seed: rates, rotary bases of contexts, the mixture."""
    rung, kept = RUNGS[name], KEPT / f"{name}_rates.json"
    tried = json.loads(kept.read_text()) if kept.exists() else {}
    setup, text = load(out / f"runs/{name}_seed{rung.seeds[0]}", data / "tuning", rung)

    def score(form: str, rate: float) -> float:
        return finite_bpb(setup, text, FORMS[form][0] | dict(ttt_lr=rate))

    for form, (_, first) in FORMS.items():
        found = tried.setdefault(form, {})
        search(first, partial(score, form), found, partial(write_json, kept, tried))
    for times in rung.longer:
        plain, scaled = (with_context(setup, text, rung, times, scaled)[0] for scaled in (False, True))
        tried[f"context x{times}"] = {"as trained": bpb(plain, text), "scaled": bpb(scaled, text)}
    settings = FORMS["slots"][0]
    adapted, _ = losses(setup, text, settings | dict(ttt_lr=float(best_rate(tried["slots"]))))
    plain, _ = unadapted(setup, text, settings)
    tried["mixture"] = {str(weight): bpb(mixed(adapted, plain, weight), text) for weight in MIXED}
    write_json(kept, tried)
    return f"{name}: " + ", ".join(f"{what} {best_rate(found)}" for what, found in tried.items())


def best_rate(found: Mapping[str, float]) -> str:
    return min(found, key=found.__getitem__)


def measure(name: str, seed: int, data: Path, out: Path, part: str) -> str:
    """Score a run's artifact: no adaptation, every form at its rate, and, except on `mixture`, controls."""
    rung, path = RUNGS[name], KEPT / f"{name}_seed{seed}" / f"{part}.json"
    rates = json.loads((KEPT / f"{name}_rates.json").read_text())
    chosen = {what: best_rate(found) for what, found in rates.items()}
    setup, text = load(out / f"runs/{name}_seed{seed}", data / part, rung)
    kept = json.loads(path.read_text()) if path.exists() else dict(chosen=chosen, **sizes(text), scores={})
    scores = kept["scores"]

    def add(score: str, nll: np.ndarray, seconds: float) -> None:
        scores[score] = summary(nll, seconds, text)
        write_json(path, kept)

    for score, form in UNADAPTED.items():
        if score not in scores:
            add(score, *unadapted(setup, text, FORMS[form][0]))
    controls = part != "mixture"  # that text is itself a control: of the shift of domain
    for times in rung.longer if controls else ():
        if (score := f"context x{times}") not in scores:
            add(score, *with_context(setup, text, rung, times, chosen[score] == "scaled"))
    for form in ("chunks", "adapters"):
        if form not in scores:
            add(form, *losses(setup, text, FORMS[form][0] | dict(ttt_lr=float(chosen[form]))))
    settings, rate = FORMS["slots"][0], float(chosen["slots"])
    if "mixture" not in scores:
        nll, seconds = losses(setup, text, settings | dict(ttt_lr=rate))
        plain, more = unadapted(setup, text, settings)
        add("slots", nll, seconds)
        add("mixture", mixed(nll, plain, float(chosen["mixture"])), seconds + more)
    for score, factor in OTHER.items() if controls else ():
        if score not in scores:
            add(score, *losses(OtherDocument(**vars(setup)), text, settings | dict(ttt_lr=rate * factor)))
    gains = ", ".join(f"{form} {scores['none']['bpb'] - one['bpb']:+.4f}" for form, one in scores.items())
    return f"{path.parent.name}, {part}: {scores['none']['bpb']:.4f}; gains: {gains}"


def work(given: argparse.Namespace) -> list[partial]:
    """The independent jobs of a command."""
    if given.what == "data":
        return [partial(make_data, given.corpus, given.data)]
    if given.what == "tune":
        return [partial(tune, name, given.data, given.out) for name in given.rungs]
    job = {"train": train, "measure": partial(measure, part=given.part)}[given.what]
    runs = ((name, seed) for name in given.rungs for seed in RUNGS[name].seeds)
    return [partial(job, *run, data=given.data, out=given.out) for run in runs]


def main(commands: Sequence[str], about: str, work: Callable[[argparse.Namespace], list[partial]]) -> int:
    """Do what a command line asks for, jobs in parallel, and print what each says at its end."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=commands)
    parser.add_argument(
        "--corpus", type=Path, help="data: folder of the three weblab files and the tokenizer"
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data/ladder", help="folder of shards")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ladder", help="folder of models")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument(
        "--part", choices=("tuning", "mixture", "report"), default="report", help="text to measure"
    )
    parser.add_argument("--workers", type=int, default=2, help="parallel jobs, one thread each")
    given = parser.parse_args()
    given.data, given.out = given.data.resolve(), given.out.resolve()
    for folder in (given.out, KEPT):
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(job) for job in work(given)]:
            print(done.result(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(("data", "train", "tune", "measure"), __doc__, work))
