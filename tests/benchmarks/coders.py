"""Bytes and seconds of the coders of int6 codes: zstd by level and number of threads, and ans.

    python tests/benchmarks/coders.py --artifact runs/NAME/final_model.int6.ptz   codes of a trained model
    python tests/benchmarks/coders.py                                             27 M Gaussian codes,
                                                                                  pr1019's shapes

All coders get the codes in the artifact's order, sorted by expected width. CPU seconds are those of the whole
process; wall seconds depend on the machine's load. Ends with one line `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import json
import platform
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402

LEVELS, THREADS = (1, 3, 9, 15, 16, 18, 19, 22), 2


def artifact_codes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of an artifact in the order of `lay_out`, and their counts by width and matrix."""
    magic, _, coder, _ = tg.ARTIFACT_PREFIX.unpack_from(blob := path.read_bytes())
    assert magic == tg.ARTIFACT_MAGIC
    _, records = tg.decode_tensors(blob[tg.ARTIFACT_PREFIX.size :], coder.rstrip(b"\0").decode())
    return laid_out([record.codes for record in records if record.row_scale is not None])


def gaussian_codes() -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian codes with pr1019's bank shapes and log-normal deviations, so that widths vary."""
    config, _, _ = tg.load_config({"RECIPE": str(ROOT / "records/recipes/pr1019.env")})
    generator, codes = torch.Generator().manual_seed(0), []
    for bank in tg.GPT(config).banks().values():
        *lead, rows, columns = bank.shape
        spread = torch.randn(*lead, rows, 1, generator=generator) + torch.randn(
            *lead, 1, columns, generator=generator
        )
        x = torch.randn(bank.shape, generator=generator) * 5 * (0.3 * spread).exp()
        codes.append(x.round().clamp(-127, 127).to(torch.int8))
    return laid_out(codes)


def laid_out(codes: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    order, counts = tg.lay_out([tg.code_widths(each) for each in codes])
    return np.concatenate([each.flatten().numpy() for each in codes])[order], counts


def zstd_frames(
    codes: np.ndarray, counts: np.ndarray, level: int, threads: int = 0, pool: int = 1
) -> list[bytes]:
    """Return one zstd frame per width, as in the artifact; `threads` per frame, `pool` frames in parallel."""
    parts = [part.tobytes() for part in np.split(codes, counts.sum(1).cumsum()[:-1])]
    with ThreadPoolExecutor(pool) as workers:
        return list(
            workers.map(
                lambda part: zstandard.ZstdCompressor(level=level, threads=threads).compress(part), parts
            )
        )


def measured(
    encode: Callable[[], bytes], decode: Callable[[bytes], np.ndarray], codes: np.ndarray
) -> dict[str, Any]:
    """Measure bytes and seconds of encoding and decoding; the round trip must be exact."""
    cpu, wall = time.process_time(), time.perf_counter()
    data = encode()
    found = dict(
        bytes=len(data), cpu_seconds=time.process_time() - cpu, wall_seconds=time.perf_counter() - wall
    )
    cpu = time.process_time()
    assert np.array_equal(decode(data), codes)
    return {
        key: round(value, 2)
        for key, value in (found | {"decode_cpu_seconds": time.process_time() - cpu}).items()
    }


def compare(codes: np.ndarray, counts: np.ndarray) -> list[dict[str, Any]]:
    """Return one row per coder, level and number of threads."""
    rows: list[dict[str, Any]] = []

    def add(coder: str, encode: Callable[[], bytes], **how: int) -> None:
        decode = lambda data: tg.decode_codes(data, counts, coder)  # noqa: E731
        rows.append(dict(coder=coder, **how, **measured(encode, decode, codes)))
        print(json.dumps(rows[-1]), flush=True)

    def zstd(level: int, **how: int) -> bytes:
        frames = zstd_frames(codes, counts, level, **how)
        return b"".join([struct.pack(f"<{tg.NUM_WIDTHS}I", *map(len, frames)), *frames])

    add("ans", lambda: tg.encode_codes(codes, counts, "ans"))
    for level in LEVELS:
        add("zstd", lambda level=level: zstd(level), level=level)
    add("zstd", lambda: zstd(tg.ZSTD_LEVEL, threads=THREADS), level=tg.ZSTD_LEVEL, threads=THREADS)
    add("zstd", lambda: zstd(tg.ZSTD_LEVEL, pool=THREADS), level=tg.ZSTD_LEVEL, pool=THREADS)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--artifact", type=Path, help="use the codes of this artifact; default: Gaussian codes"
    )
    arguments = parser.parse_args()
    codes, counts = artifact_codes(arguments.artifact) if arguments.artifact else gaussian_codes()
    shares = np.bincount(codes.astype(np.int16) + 128) / len(codes)
    entropy = -float((shares[shares > 0] * np.log2(shares[shares > 0])).sum())
    print(f"{len(codes)} codes, {entropy:.3f} bits each (zeroth-order entropy)", flush=True)
    report = dict(codes=len(codes), entropy_bits=round(entropy, 3), results=compare(codes, counts),
                  python=platform.python_version(), zstandard=zstandard.__version__,
                  zstd=".".join(map(str, zstandard.ZSTD_VERSION)))  # fmt: skip
    print("BENCH " + json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
