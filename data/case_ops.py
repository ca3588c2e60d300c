"""CaseOps: text without capital letters, whose case is marked by four operator characters, and its bytes.

The transform of PR #1729 and #1855 (lossless_caps_caseops_v1). It lets one piece of a tokenizer stand for
"the", "The" and "THE". The bytes of a token are then no property of its id, so bits per byte need a count for
each token of the validation text: the byte sidecar that data/prepare.py --case-ops writes.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"

_CAPITALS = re.compile(f"[A-Z][A-Za-z]*|[{OPERATORS}]")  # from the first capital of a run to the run's end
_MARKED = re.compile(f"{ESC}([{OPERATORS}])|(?:{ALLCAPS}([a-z]+)|[{TITLE}{CAPNEXT}]([a-z]))|[{OPERATORS}]")


def encode(text: str) -> str:
    """Return `text` in lower case with operators; only ASCII letters are changed.

    By maximal runs of ASCII letters: a capital and lower case is TITLE and the run, two or more capitals are
    ALLCAPS and the run, any other run has TITLE before a capital that begins it and CAPNEXT before each later
    one. An operator that the text contains becomes ESC and itself. decode returns the text.
    """
    return _CAPITALS.sub(_encode_match, text)


def _encode_match(match: re.Match[str]) -> str:
    run, start = match[0], match.start()
    before = match.string[max(0, start - 1) : start]
    if run in OPERATORS:
        return ESC + run
    if before.isascii() and before.islower():  # the run began with lower case
        return _mark_each(run)
    if len(run) > 1 and run.isupper():
        return ALLCAPS + run.lower()
    return TITLE + run[0].lower() + _mark_each(run[1:])


def _mark_each(letters: str) -> str:
    return re.sub("[A-Z]", lambda match: CAPNEXT + match[0].lower(), letters)


def decode(text: str) -> str:
    """Return the text of which `text` is the encode. ValueError at an operator without its operand."""
    return _MARKED.sub(_decode_match, text)


def _decode_match(match: re.Match[str]) -> str:
    literal, run, letter = match.groups()
    if operand := run or letter:
        return operand.upper()
    if not literal:
        raise ValueError(
            f"operator U+{ord(match[0]):04X} at character {match.start()} has no operand: "
            f"{match.string[match.start() : match.start() + 10]!r}"
        )
    return literal


def byte_counts(pieces: Iterable[bytes]) -> list[int]:
    """Return the bytes of the original text that each token of a document stands for.

    `pieces` has for each token the UTF-8 bytes of encode(text) that it covers: b"" for BOS, the bytes of the
    piece of a lossless tokenizer, the surface of any other (SentencePiece's ImmutableProto: a run of spaces
    belongs to the piece that follows it, a character that falls back to byte pieces to the last of them). A
    character counts its UTF-8 bytes where its last byte is, an operator 0, and an operator after ESC its 3.
    If the pieces cover all of encode(text), the counts add up to len(text.encode()). ValueError
    (UnicodeDecodeError) if the pieces together are not UTF-8.
    """
    counts, escaped = [], False
    decoder = codecs.getincrementaldecoder("utf-8")()
    partial = False  # the pieces so far end inside a character
    for piece in pieces:
        if piece.isascii() and not partial:  # nearly all, without operators
            counts.append(len(piece))
            escaped = escaped and not piece
            continue
        count, text = 0, decoder.decode(piece)
        for character in text:
            operator = not escaped and character in OPERATORS
            count += 0 if operator else len(character.encode())
            escaped = operator and character == ESC
        partial = bool(decoder.getstate()[0])
        counts.append(count)
    decoder.decode(b"", final=True)
    return counts
