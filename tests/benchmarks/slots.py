"""What evaluation by documents computes, counted from its plan: graphs, steps, padding. Nothing is computed.

    python tests/benchmarks/slots.py --data DIR                    of validation shards as the settings say
    python tests/benchmarks/slots.py --data DIR --resample 50000   of so many documents of these lengths, by rank

Settings are environment variables (TTT_SLOTS, TTT_GROUPS, TTT_CHUNK_SIZE, EVAL_SEQ_LEN). Padding is the tokens of all
batches over those that their windows read. Ends with `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import eval_ttt as ev  # noqa: E402
import train_gpt as tg  # noqa: E402


def count_plan(tokens: np.ndarray, config: tg.Config, ranks: int = 1) -> dict[str, Any]:
    """Documents, graphs, steps of the busiest rank, its batches, and padding of scoring and adaptation."""
    plan, rows = ev.document_plan(tokens, config), min(tg.SLOT_ROWS, config.ttt_slots)
    width, steps, batches, shapes = config.ttt_context + config.piece_size, [0] * ranks, [0] * ranks, set()
    read, computed, learned, stepped = 0, 0, 0, 0
    for chunk in plan:
        rank = chunk.slots.group % ranks
        steps[rank] += 1
        for index, columns, length in tg.batches_of(chunk, rows):
            batches[rank] += 1
            shapes.add(("score", rows, length, columns))
            read, computed = read + int(chunk.scored.end[index].sum()), computed + rows * length
        if chunk.learned is not None:
            ends = chunk.learned.end[chunk.learned.end > chunk.learned.begin]
            shapes.add(("adapt", rows, width, config.piece_size))
            learned, stepped = learned + int(ends.sum()), stepped + -(-len(ends) // rows) * rows * width
    return dict(documents=len(ev.documents(tokens)[0]), targets=len(tokens) - 1, graphs=len(shapes), steps=max(steps),
                batches=max(batches), padding_of_scoring=computed / read, padding_of_adaptation=stepped / learned,
                tokens_scored=computed, tokens_adapted=stepped)  # fmt: skip


def resampled(tokens: np.ndarray, count: int) -> np.ndarray:
    """As many documents, of lengths drawn from those of a text with a fixed seed; every other token is the same."""
    begin, end = ev.documents(tokens)
    lengths = np.random.default_rng(0).choice(end - begin, count)
    text = np.full(int(lengths.sum()) + 1, tg.BOS_ID + 1, np.uint16)
    text[np.cumsum(np.append(0, lengths))[:-1]] = tg.BOS_ID
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the validation shards")
    parser.add_argument("--resample", type=int, default=0, help="documents; 0: the text as it is")
    parser.add_argument("--ranks", type=int, default=8)
    arguments = parser.parse_args()
    config, _, _ = tg.load_config({**os.environ, "TTT_MODE": "doc_banks"})
    paths = sorted(path for path in glob(f"{arguments.data}/fineweb_val_*.bin") if "bytes" not in path)
    tokens = np.concatenate([tg.open_shard(path) for path in paths])
    tokens = resampled(tokens, arguments.resample) if arguments.resample else tokens
    found = count_plan(tokens, config, arguments.ranks)
    settings = {name: getattr(config, name) for name in ("eval_seq_len", "ttt_chunk_size", "ttt_slots", "ttt_groups")}
    for name, value in (settings | dict(ranks=arguments.ranks) | found).items():
        print(f"{name:22} {value:.3f}" if isinstance(value, float) else f"{name:22} {value}")
    print("BENCH " + json.dumps(dict(benchmark="slots", ranks=arguments.ranks, settings=settings, **found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
