"""Constants of the shard format, of the contest and of its published validation sets,
for data/, records/ and tests/.

train_gpt.py ships without this file and has a copy of its own; tests/test_data.py holds the two equal.
Nothing but the standard library is imported, so that tools which read files and logs start without torch.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
HEADER_INTS = 256  # little-endian int32: magic, version, number of tokens, zeros; uint16 tokens follow
HEADER_BYTES = 4 * HEADER_INTS
BOS_ID = 1  # before every document of every published export
SIZE_CAP = 16_000_000  # bytes of code and model, decimal
ARTIFACT_MAGIC = b"PGOLFQ6\0"  # first bytes of the file that train_gpt.py exports
TEXT_BYTES = 151_080_891  # UTF-8 bytes of the 50,000 validation documents
# range for their bytes as tokens, by any tokenizer and way of counting
CHALLENGE_BYTES = (
    151_000_000,
    151_100_000,
)


class Published(NamedTuple):
    """A published validation set: tokens in its shards, and what a score over all of them is divided by."""

    name: str  # of the tokenizer
    tokens: int
    tokens_per_byte: float  # as published, with five digits
    num_bytes: int | None = TEXT_BYTES  # of all targets, to 1e-4 where the tail is cut; None: not published


PUBLISHED = (
    Published("sp1024", 62_021_846, 0.41052),
    Published("sp1024 (the first baseline's export)", 63_779_840, 0.40945, None),
    Published("sp4096", 45_508_608, 0.30125),
    Published("sp4096", 45_514_752, 0.30125),
    Published("sp8192", 40_540_802, 0.26834),
    Published(
        "sp8192 caseops", 47_853_344, 0.31674, 151_080_645
    ),  # bytes of the original text, by its sidecar
)


def shard_header(num_tokens: int) -> bytes:
    """The header of a shard that holds num_tokens tokens."""
    return struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, num_tokens).ljust(HEADER_BYTES, b"\0")
