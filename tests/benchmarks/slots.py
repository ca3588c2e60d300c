"""Measure per-document evaluation: the work in its plan, and the score of each form of second moments.

    python tests/benchmarks/slots.py --data DIR                    graphs, steps, padding of validation shards
    python tests/benchmarks/slots.py --data DIR --resample 50000   for 50000 documents with these lengths,
                                                                   by rank
    python tests/benchmarks/slots.py --data DIR --models A.ptz B.ptz --out FILE.jsonl      scores, by form

Settings are environment variables (RECIPE, TOKENIZER_PATH, TTT_SLOTS, TTT_GROUPS, TTT_CHUNK_SIZE,
EVAL_SEQ_LEN). Counting runs no model; padding is the number of tokens in all batches divided by the tokens in
their windows. Scores are for the first --documents documents; each is written to FILE as it arrives, and
later calls skip existing lines. Ends with `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import eval_ttt as ev  # noqa: E402
import train_gpt as tg  # noqa: E402

FORMS = {  # name: settings for the second moments of a document
    "own": dict(ttt_moments="own"),
    "prefix": dict(ttt_moments="prefix"),
    "shared": dict(ttt_moments="shared"),
    "own, no prior": dict(ttt_moments="own", ttt_prior_seqs=0),
    "prefix, no prior": dict(ttt_moments="prefix", ttt_prior_seqs=0),
    "shared, no prior": dict(ttt_moments="shared", ttt_prior_seqs=0),
}


def count_plan(tokens: np.ndarray, config: tg.Config, ranks: int = 1) -> dict[str, Any]:
    """Count documents, graphs, steps and batches of the busiest rank, padding of scoring and adaptation."""
    plan, rows = ev.document_plan(tokens, config), min(tg.SLOT_ROWS, config.ttt_slots)
    width, steps, batches, shapes = config.ttt_context + config.doc_chunk, [0] * ranks, [0] * ranks, set()
    read, computed, learned, stepped = 0, 0, 0, 0
    for chunk in plan:
        rank = chunk.slots.group % ranks
        steps[rank] += 1
        for index, columns, length in tg.batches_of(chunk, rows):
            batches[rank] += 1
            shapes.add(("score", rows, length, columns))
            read, computed = read + int(chunk.scored.end[index].sum()), computed + rows * length
        if chunk.adapted is not None:
            ends = chunk.adapted.end[chunk.adapted.end > chunk.adapted.begin]
            shapes.add(("adapt", rows, width, config.doc_chunk))
            learned, stepped = learned + int(ends.sum()), stepped + -(-len(ends) // rows) * rows * width
    return dict(documents=len(ev.documents(tokens)[0]), targets=len(tokens) - 1, graphs=len(shapes),
                steps=max(steps), batches=max(batches), padding_of_scoring=computed / read,
                padding_of_adaptation=stepped / learned, tokens_scored=computed,
                tokens_adapted=stepped)  # fmt: skip


def resampled(tokens: np.ndarray, count: int) -> np.ndarray:
    """Return `count` documents with lengths sampled from a text's (fixed seed) and constant content."""
    begin, end = ev.documents(tokens)
    lengths = np.random.default_rng(0).choice(end - begin, count)
    text = np.full(int(lengths.sum()) + 1, tg.BOS_ID + 1, np.uint16)
    text[np.cumsum(np.append(0, lengths))[:-1]] = tg.BOS_ID
    return text


def score_forms(
    models: list[str], environ: Mapping[str, str], documents: int, out: Path
) -> list[dict[str, Any]]:
    """Score each artifact with each of FORMS, and with the same windows without adaptation."""
    found = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["sha256"], row["form"], row["documents"]) for row in found}
    for path in models:
        config, given, _ = tg.load_config({**environ, "MODEL_PATH": path})
        setup, tokens, *_ = ev.prepare(config, given, environ)
        begin, end = ev.documents(tokens)
        count = min(documents or len(begin), len(begin))
        tokens, digest = tokens[: int(end[count - 1]) + 1], tg.sha256_file(path)
        for form, changes in ({"no adaptation": {}} | FORMS).items():
            if (digest, form, count) in done:
                continue
            changed = replace(setup, config=replace(setup.config, **changes))
            result = ev.evaluate(changed, tokens, adapts=form != "no adaptation")
            row = dict(model=Path(path).parent.name, sha256=digest, form=form, documents=count,
                       targets=len(tokens) - 1, val_bpb=result.val_bpb, val_loss=result.val_loss,
                       ttt_lr=config.ttt_lr, seconds=round(result.seconds, 1))  # fmt: skip
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['model']:24} {form:18} {result.val_bpb:.6f} {row['seconds']:7.1f}s", flush=True)
            found.append(row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of the validation shards")
    parser.add_argument("--resample", type=int, default=0, help="number of documents; 0: the text itself")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--models", nargs="*", default=[], help="artifacts to score")
    parser.add_argument("--documents", type=int, default=0, help="first documents to score; 0: all")
    parser.add_argument("--out", type=Path, default=Path("slots.jsonl"), help="file of scores, one per line")
    arguments = parser.parse_args()
    environ = {**os.environ, "TTT_MODE": "doc_banks", "DATA_PATH": arguments.data}
    if arguments.models:
        rows = score_forms(arguments.models, environ, arguments.documents, arguments.out)
        print("BENCH " + json.dumps(dict(benchmark="slots", rows=rows)))
        return 0
    config, _, _ = tg.load_config(environ)
    paths = sorted(path for path in glob(f"{arguments.data}/fineweb_val_*.bin") if "bytes" not in path)
    tokens = np.concatenate([tg.open_shard(path) for path in paths])
    tokens = resampled(tokens, arguments.resample) if arguments.resample else tokens
    found = count_plan(tokens, config, arguments.ranks)
    settings = {
        name: getattr(config, name) for name in ("eval_seq_len", "ttt_chunk_size", "ttt_slots", "ttt_groups")
    }
    for name, value in (settings | dict(ranks=arguments.ranks) | found).items():
        print(f"{name:22} {value:.3f}" if isinstance(value, float) else f"{name:22} {value}")
    print("BENCH " + json.dumps(dict(benchmark="slots", ranks=arguments.ranks, settings=settings, **found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
