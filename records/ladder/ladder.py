"""Measure what adaptation is worth as models grow and train longer.

    python records/ladder/ladder.py data --corpus DIR     shards of weblab, and of three texts to score
    python records/ladder/ladder.py train                 every rung and seed; hours
    python records/ladder/ladder.py tune                  the learning rate of each form, on tuning documents
    python records/ladder/ladder.py measure               forms and controls on a text; `report` once, last

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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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

# Form of adaptation -> its settings, and the learning rate that its search begins with.
FORMS: dict[str, tuple[dict[str, Any], float]] = {
    "chunks": (
        dict(ttt_mode="banks", ttt_optimizer="sgd", ttt_momentum=0.9, ttt_epochs=3,
             ttt_chunk_tokens=32768, ttt_lr_schedule="cosine"), 0.01,
    ),
    "adapters": (dict(ttt_mode="doc_lora", ttt_optimizer="adamw", ttt_lora_form="parallel"), 1e-3),
    "slots": (dict(ttt_mode="doc_banks", ttt_optimizer="precond"), 2e-3),
}  # fmt: skip
LONGER = (2, 4, 8)  # contexts without adaptation, as multiples of the rung's length
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
        text = np.ascontiguousarray(tokens[borders[first] : borders[last]], "<u2")
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
    kept = KEPT / name
    if not (kept / "result.json").exists():
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
            (kept / file).write_bytes((out / "runs" / name / file).read_bytes())
    return json.loads((kept / "result.json").read_text())


def train(name: str, seed: int, data: Path, out: Path) -> str:
    """Train a rung with a seed unless that is done; what came of it."""
    rung, run_id = RUNGS[name], f"{name}_seed{seed}"
    result = run(run_id, seed, rung.settings | {"ITERATIONS": str(rung.steps)}, data, out)
    return f"{run_id}: {rung.steps} steps, {result['val_bpb_sliding']:.4f} sliding on tuning documents"


# ------------------------------------------------------------------------------------------------------------
# Adaptation
# ------------------------------------------------------------------------------------------------------------


class Slots(ev.TestTimeTrainer):
    """The trainer of `slots`, for classes that change its steps."""

    def __init__(self, model: tg.GPT, config: tg.Config) -> None:
        super().__init__(model, replace(config, ttt_mode="doc_banks"), tg.token_nll, {})
        self.fast.moments.start = tg.generated_moments(model, self.config, self.config.ttt_slots)


class OtherDocument(Slots):
    """A control: the steps of `slots`, as many and at the same moments, each on a chunk of another document.

    Chunks are drawn from all that were scored before, with a fixed seed.
    """

    def __init__(self, model: tg.GPT, config: tg.Config) -> None:
        super().__init__(model, config)
        self.documents, self.generator = np.zeros(self.config.ttt_slots, np.int64), np.random.default_rng(0)
        self.count, self.seen, self.owners = 0, [], np.zeros(0, np.int64)

    def reset(self, slots: Tensor) -> None:
        super().reset(slots)
        self.documents[slots.numpy()] = self.count + np.arange(len(slots))
        self.count += len(slots)

    def adapt(self, batch: ev.ScoredBatch) -> None:
        own = self.documents[batch.slots.numpy()]
        self.seen += zip(*(part[: len(own)] for part in batch.text), strict=True)
        self.owners = np.append(self.owners, own)
        chosen = [self.generator.choice(np.flatnonzero(self.owners != one)) for one in own]
        rows = [self.seen[index] for index in np.resize(chosen, len(batch.rows))]
        text = tg.TTTBatch(*map(torch.stack, zip(*rows, strict=True)))
        text.loss_weight[len(own) :] = 0.0  # rows that fill the batch
        super().adapt(batch._replace(text=text))


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
    setup: ev.Setup,
    text: Text,
    changes: Mapping[str, Any],
    adapts: bool = True,
    trainer: Callable[[tg.GPT, tg.Config], Slots] | None = None,
) -> tuple[np.ndarray, float]:
    """Nats of each target under changed settings, with a trainer of its own if given, and CPU seconds."""
    config, plugin = replace(setup.config, **changes), None
    if trainer is not None:
        config, plugin = replace(config, ttt_mode="own"), ev.Plugin(trainer, Path(__file__).name, b"")
    began = time.process_time()
    nll = ev.evaluate(replace(setup, config=config, plugin=plugin), text.tokens, adapts=adapts).nll
    return nll, time.process_time() - began


def write_json(path: Path, content: Any) -> None:
    tg.write_atomically(path, json.dumps(content).encode())


def bpb(nll: np.ndarray, text: Text) -> float:
    return float(nll.sum(dtype=np.float64) / math.log(2) / text.num_bytes.sum())


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


def search(
    first: float, factor: float, score: Callable[[float], float], found: dict[str, float], keep: Callable
) -> None:
    """Fill `found`, rate -> score, until its lowest score lies between two others; `keep()` after each."""

    def scored(power: int) -> float:
        rate = f"{first * factor**power:.4g}"
        if rate not in found:
            found[rate] = score(float(rate))
            keep()
        return found[rate]

    best = 0
    while (better := min((best, best - 1, best + 1), key=scored)) != best:
        best = better


def tune(name: str, data: Path, out: Path) -> str:
    """Bracket the best learning rate of each form by factors of two, with the first seed of a rung."""
    rung, kept = RUNGS[name], KEPT / f"{name}_rates.json"
    tried = json.loads(kept.read_text()) if kept.exists() else {}
    setup, text = load(out / f"runs/{name}_seed{rung.seeds[0]}", data / "tuning", rung)

    def score(form: str, rate: float) -> float:
        return finite_bpb(setup, text, FORMS[form][0] | dict(ttt_lr=rate))

    for form, (_, first) in FORMS.items():
        found = tried.setdefault(form, {})
        search(first, 2, partial(score, form), found, partial(write_json, kept, tried))
    return f"{name}: " + ", ".join(f"{form} {best_rate(found)}" for form, found in tried.items())


def best_rate(found: Mapping[str, float]) -> str:
    return min(found, key=found.__getitem__)


def measure(name: str, seed: int, data: Path, out: Path, part: str) -> str:
    """Score a run's artifact on a text: no adaptation, every form at its rate, and the controls."""
    rung, kept = RUNGS[name], KEPT / f"{name}_seed{seed}" / f"{part}.json"
    if kept.exists():
        return f"{kept.parent.name}, {part}: kept"
    rates = json.loads((KEPT / f"{name}_rates.json").read_text())
    setup, text = load(out / f"runs/{name}_seed{seed}", data / part, rung)
    forms = {form: settings | dict(ttt_lr=float(best_rate(rates[form])))
             for form, (settings, _) in FORMS.items()}  # fmt: skip
    forms["another document"] = forms["slots"]
    plain, seconds = losses(setup, text, {}, adapts=False)
    found = {"none": summary(plain, seconds, text)}
    for times in LONGER:
        longer = losses(setup, text, dict(eval_seq_len=times * rung.length), adapts=False)
        found[f"context x{times}"] = summary(*longer, text)
    for form, settings in forms.items():
        trainer = OtherDocument if form == "another document" else None
        nll, seconds = losses(setup, text, settings, trainer=trainer)
        found[form] = summary(nll, seconds, text)
        for weight in MIXED if form == "slots" else ():
            mixed = ev.mixed_nll(nll.astype(np.float64), plain.astype(np.float64), weight)
            found[f"{form}, {weight} of the mixture"] = summary(mixed, seconds, text)
    write_json(
        kept, dict(rates={form: s["ttt_lr"] for form, s in forms.items()}, **sizes(text), scores=found)
    )
    gains = ", ".join(f"{form} {found['none']['bpb'] - one['bpb']:+.4f}" for form, one in found.items())
    return f"{kept.parent.name}, {part}: {found['none']['bpb']:.4f}; gains: {gains}"


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
