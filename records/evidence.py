"""What the files beside the logs say: programs, per-target losses, audit certificates, validation text.

The score is recomputed from nll.npy, shards and tokenizer. No code is shared with train_gpt.py's
scorer, so that a bug there cannot hide itself. check.py runs these rules; `record` is its Record,
`run` one of its LogFacts. Nothing here executes a file of a record, and every file has a size limit.
"""

from __future__ import annotations

import ast
import base64
import bz2
import io
import json
import lzma
import math
import re
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from os.path import abspath
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from runfiles import is_below, object_of, read_file, read_nll, read_object, read_text, sha256_file

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-9  # relative, between two computations of a score
PROBE = " a  b\n\tc\u3000\ufb01 \u00e9\u2460\U0001f642"  # a tokenizer that round-trips it is lossless
ESSENTIAL = ("T1", "T2", "T3", "T4")  # checks that every audit must pass
AUDITS_MAY_CHANGE = {"audit_tokens", "eval_budget_seconds", "model_path", "eval_batch_seqs"}
# In certificates without `audited_settings`, these have the smaller values that the audit used.
AUDITS_SHRINK = {"ttt_chunk_tokens", "ttt_slots", "ttt_groups", "ttt_chunk_size", "phased_ttt_prefix_docs",
                 "phased_ttt_num_phases"}  # fmt: skip

PROGRAM_LIMIT = 2 << 20  # bytes of a program, packed or not
TEXT_LIMIT = 1 << 20  # bytes of a certificate or README
TOKENIZER_LIMIT, LOSSES_LIMIT = 64 << 20, 1 << 30  # bytes

Finding = tuple[str, str]  # status (check.STATUSES), and the evidence for it


def digest(path: Path, limit: int = 64 << 20) -> str:
    """Return the SHA-256 of a file, or a text that equals none if the file has more than `limit` bytes."""
    size = path.stat().st_size
    return sha256_file(path) if size <= limit else f"of {size} bytes"


def evaluation(run: Any) -> dict[str, Any]:
    """Return the evaluator's RESULT of a run, empty if there is none."""
    return next((result for result in reversed(run.results) if "val_bpb_ttt" in result), {})


# ------------------------------------------------------------------------------------------------------------
# Programs
# ------------------------------------------------------------------------------------------------------------

UNPACKERS = (
    lambda blob: zlib.decompressobj().decompress(blob, PROGRAM_LIMIT + 1),
    lambda blob: lzma.LZMADecompressor(memlimit=1 << 27).decompress(blob, PROGRAM_LIMIT + 1),
    lambda blob: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]).decompress(
        blob, PROGRAM_LIMIT + 1
    ),
    lambda blob: zstandard.ZstdDecompressor().stream_reader(blob).read(PROGRAM_LIMIT + 1),
    lambda blob: bz2.BZ2Decompressor().decompress(blob, PROGRAM_LIMIT + 1),
)
VAL_NAME = re.compile(
    r"(val|valid|validation)_(toks?|tokens|token_ids|data|ids|loader|stream|batch(es)?|seqs|docs)$"
)
TARGET_NAME = re.compile(r"(targets?|tgts?|labels?|y|next_tok\w*)(_np|_ids?|_tok\w*)?$")
SCORING_CALL = re.compile(r"model$|forward|logits|cross_entropy|loss|nll|score|bpb")
CALIBRATION_CALL = re.compile(r"hessian|calib|gptq|quantize")
NETWORK = {"requests", "urllib", "urllib3", "httpx", "aiohttp", "huggingface_hub"}
QUIET, GRADIENTS = {"no_grad", "inference_mode"}, {"backward", "grad"}


class Program(NamedTuple):
    """What the source of a program says, of the program packed in it where there is one.

    `sizes` are its bytes as shipped and, if packed, unpacked; `modules` what it imports; `texts` its literals
    without docstrings. `tree` is None, for the reason in `problem`, where Python cannot parse it; modules
    and texts come from its tokens, and so do not depend on the version of Python that reads them.
    """

    sizes: tuple[int, ...]
    modules: frozenset[str] = frozenset()
    texts: tuple[str, ...] = ()
    tree: ast.Module | None = None
    problem: str = ""


def unpack(blob: bytes) -> Iterator[bytes]:
    """Yield the first PROGRAM_LIMIT + 1 bytes of every decompressor that accepts a blob."""
    for unpacker in UNPACKERS:
        try:
            yield unpacker(blob)
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, OSError):
            continue


def bytes_of(text: str | bytes) -> bytes:
    """Return the bytes of a literal in which each character is a byte; see pack.py."""
    return text if isinstance(text, bytes) else text.encode("latin-1")


def read_program(path: Path) -> Program:
    """Read a program, or the program packed in it, without running it."""
    try:
        return parse_source(read_file(path, PROGRAM_LIMIT), path.name)
    except ValueError as error:
        return Program((path.stat().st_size,), problem=str(error))


@lru_cache(8)  # several rules read the same programs
def parse_source(source: bytes, name: str) -> Program:
    statements, texts = statements_of(source)
    sizes = (len(source),)
    if any("exec" in words for words in statements):
        longest = max(texts, key=len, default="")
        inner = next((each for each in unpacked(longest) if each), b"")
        if inner:
            source, sizes = inner, (len(source), len(inner))
            statements, texts = statements_of(source)
        elif len(longest) > 2000:
            return Program(sizes, problem=f"{name} is packed in a way that cannot be read")
    if len(source) > PROGRAM_LIMIT:
        return Program(
            sizes, problem=f"{name} unpacks to more than {PROGRAM_LIMIT} bytes, which are not read"
        )
    found = frozenset(imported(statements)), tuple(as_text(text) for text in texts)
    try:
        return Program(sizes, *found, ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Program(sizes, *found, problem=f"{name} is not parsed by this Python: {error}")


def unpacked(literal: str | bytes) -> Iterator[bytes]:
    """Yield what a literal unpacks to, in each of the encodings of packed programs that accepts it."""
    for decode in (base64.b85decode, base64.a85decode, base64.b64decode, bytes_of):
        try:
            yield from unpack(decode(literal))
        except ValueError:
            continue


def statements_of(source: bytes) -> tuple[list[list[str]], list[str | bytes]]:
    """Return the words of each statement of a program, and its literals except lone ones (docstrings).

    What follows an error of the tokens is lost; f-strings of Python 3.12 are none in earlier versions.
    """
    statements, literals, words, strings = [], [], [], []
    ended = (tokenize.NEWLINE, tokenize.ENDMARKER)
    try:
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            if token.type in ended or token.string in (";", ":"):
                literals += strings if words else []
                statements.append(words)
                words, strings = [], []
            elif tokenize.tok_name[token.type] in ("STRING", "FSTRING_MIDDLE"):
                strings.append(literal(token.string))
            elif token.type in (tokenize.NAME, tokenize.OP):
                words.append(token.string)
    except (tokenize.TokenError, SyntaxError, ValueError):
        literals, statements = literals + strings, [*statements, words]
    return statements, literals


def literal(text: str) -> str | bytes:
    """Return the value of a string token, or its text where it has none, as that of an f-string."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, str | bytes) else text


def as_text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("latin-1")


def imported(statements: Iterable[list[str]]) -> Iterator[str]:
    """Yield the top-level modules that statements import."""
    for words in statements:
        if words[:1] == ["from"]:
            yield next((word for word in words[1:] if word.isidentifier() and word != "import"), "")
        elif words[:1] == ["import"]:
            before = ["," if word in ("import", "(") else word for word in words]
            yield from (word for comma, word in zip(before, words[1:], strict=False) if comma == ",")


def names_in(*trees: ast.AST) -> set[str]:
    """Return the variable and attribute names in code."""
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name)))
    return {getattr(node, "attr", getattr(node, "id", "")) for node in nodes}


def calls_in(tree: ast.AST) -> list[tuple[int, str, ast.Call]]:
    """Return line, function name and node of every call."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [(call.lineno, getattr(call.func, "attr", getattr(call.func, "id", "")), call) for call in calls]


def find_shapes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and meaning of code that a reviewer should read: evidence of nothing by itself.

    A syntax tree shows neither which branch runs nor what a caller has scored before.
    """
    scorers = {node.name for node in ast.walk(tree)
               if isinstance(node, ast.FunctionDef) and names_in(*node.decorator_list) & QUIET}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.While)):
            yield from adapting_loop(node, scorers)
        xor = isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.BitXor)
        call = isinstance(node, ast.Call) and calls_in(node)[0]
        if (xor or (call and call[1] == "bitwise_xor")) and (name := hashed_target(node)):
            yield node.lineno, f"a hash of {name}: is it the token to be predicted, as in an n-gram cache?"
        if call and CALIBRATION_CALL.search(call[1]):
            inputs = names_in(*node.args, *(keyword.value for keyword in node.keywords))
            for name in sorted(filter(VAL_NAME.match, inputs))[:1]:
                yield node.lineno, f"calibration: {call[1]} receives {name}"
        if (
            call
            and call[1] == "exec"
            and {"open", "read_text", "read_bytes"} & {n for _, n, _ in calls_in(node)}
        ):
            yield node.lineno, "exec of another file, whose code may be uncounted"


def hashed_target(node: ast.AST) -> str:
    """Return the name in a hash that may be the token to be predicted, or an empty string."""
    names = sorted(filter(TARGET_NAME.match, names_in(node)))
    places = (each for each in ast.walk(node) if isinstance(each, ast.Subscript))
    names += [f"{place.value.id}[{place.slice.id}]" for place in places
              if isinstance(place.value, ast.Name) and isinstance(place.slice, ast.Name)
              and re.search("tok", place.value.id)]  # fmt: skip
    return names[0] if names else ""


def adapting_loop(loop: ast.For | ast.While, scorers: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the gradients that a loop over validation tokens takes before any of its lines scores."""
    read = [loop.iter] if isinstance(loop, ast.For) else []
    inner = [node for node in ast.walk(loop) if isinstance(node, (ast.For, ast.While)) and node is not loop]
    read += [node.value for node in ast.walk(loop) if isinstance(node, ast.Subscript)]
    val = sorted(filter(VAL_NAME.match, names_in(*read)))
    calls = calls_in(loop)
    gradients = [line for line, name, _ in calls if name in GRADIENTS]
    inner = [other for other in inner if isinstance(other, ast.For) and any(
        filter(VAL_NAME.match, names_in(other.iter)))]  # fmt: skip
    nested = any(name in GRADIENTS for other in inner for _, name, _ in calls_in(other))
    if not val or not gradients or nested:
        return
    blocks = (node for node in ast.walk(loop) if isinstance(node, ast.With) and names_in(*node.items) & QUIET)
    scored = [line for block in blocks for line, name, _ in calls_in(block) if SCORING_CALL.search(name)]
    scored += [line for line, name, _ in calls if name in scorers]
    if not any(line < gradients[0] for line in scored):
        yield (
            gradients[0],
            f"gradients on {val[0]}, and no earlier line of the loop scores it: does a caller?",
        )


def check_tree(record: Any) -> Iterator[Finding]:
    """Note what a reviewer should read in the programs; no note fails a record."""
    for path in record.code:
        program = read_program(path)
        notes = [(line, meaning) for line, meaning in find_shapes(program.tree)] if program.tree else []
        yield from (("note", f"{path.name}:{line}: {meaning}") for line, meaning in sorted(set(notes))[:20])
        if program.problem:
            needs = " Python 3.12 may parse it." * ("f-string" in program.problem)
            read = (
                "Its imports and literals were read"
                if program.modules or program.texts
                else "Nothing was read"
            )
            yield "note", f"{program.problem}. {read}.{needs}"
        if path.name in ("train_gpt.py", "eval_ttt.py") and (network := sorted(program.modules & NETWORK)):
            yield "warn", f"{path.name} imports {', '.join(network)}: evaluation must not use the network"
    yield "pass", f"nothing to read again in {', '.join(path.name for path in record.code) or 'no program'}"


# ------------------------------------------------------------------------------------------------------------
# The validation text
# ------------------------------------------------------------------------------------------------------------


def data_folder(record: Any, run: Any) -> Path:
    """Return the validation folder: --data, else from the log. ValueError if it may not be read."""
    if record.data:
        return record.data
    return allowed(record, named_folder(run), "--data FOLDER")


def named_folder(run: Any) -> Path:
    """Return the folder of the validation shards according to the log's settings."""
    named = run.settings.get("val_files")
    return Path(named).parent if named else Path(run.settings.get("data_path") or "")


def allowed(record: Any, path: Path, option: str) -> Path:
    """Return `path`, named by a log. ValueError outside record, repository and working folder."""
    if str(path) in ("", ".") or not is_below(path, record.path, ROOT, Path.cwd()):
        raise ValueError(
            f"the log names {path}, which is outside this repository and not read. Pass {option}."
        )
    return path


def text_files(record: Any, run: Any) -> tuple[list[Path], Path]:
    """Return validation shards and tokenizer that match RESULT's hashes. ValueError if unavailable."""
    result = evaluation(run)
    shards, folder = object_of(result, "sha256_shards"), data_folder(record, run)
    if not shards or "sha256_tokenizer" not in result:
        raise ValueError("RESULT has no sha256_shards and sha256_tokenizer (older version)")
    tokenizer = record.tokenizer or allowed(
        record, Path(run.settings.get("tokenizer_path") or ""), "--tokenizer FILE"
    )
    wanted = [*((folder / Path(name).name, sha256) for name, sha256 in sorted(shards.items())),
              (tokenizer, result["sha256_tokenizer"])]  # fmt: skip
    for path, sha256 in wanted:
        if not path.is_file() or digest(path, LOSSES_LIMIT) != sha256:
            raise ValueError(
                f"{path} is missing, or is not the file that was scored (sha256 {sha256[:12]}..)"
            )
    return [path for path, _ in wanted[:-1]], tokenizer


def count_bytes(shards: list[Path], tokenizer: Path) -> tuple[int, int]:
    """Return the targets of the shards and their bytes, by the field's rule. ValueError for unreadable files.

    Every piece counts its spelled bytes; a leading space counts unless a control token precedes it. A byte
    piece is one byte. With a lossless tokenizer every space counts.
    """
    try:
        import sentencepiece

        if not (
            model := read_file(tokenizer, TOKENIZER_LIMIT)
        ):  # SentencePiece would abort the process at first use
            raise ValueError("the tokenizer is an empty file")
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        texts = [np.fromfile(path, "<u2", offset=1024) for path in shards]
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the text cannot be read: {error}") from error
    size, tokens = pieces.vocab_size(), np.concatenate(texts)
    silent = np.array(
        [pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i) for i in range(size)]
    )
    spelled = [pieces.id_to_piece(i).replace("\u2581", " ") for i in range(size)]
    if len(tokens) < 2 or tokens.max() >= size:
        raise ValueError(f"the text cannot be read: {len(tokens)} tokens do not fit a vocabulary of {size}")
    length = np.array(
        [0 if silent[i] else 1 if pieces.is_byte(i) else len(spelled[i].encode()) for i in range(size)]
    )
    total = int(np.bincount(tokens[1:], minlength=size) @ length)
    adds_space = pieces.encode("a", out_type=str)[0].startswith("\u2581")
    if adds_space or pieces.decode(pieces.encode(PROBE)) != PROBE:
        spaced = np.array([text.startswith(" ") for text in spelled]) & ~silent
        total -= int(spaced[tokens[1:][silent[tokens[:-1]]]].sum())
    return len(tokens) - 1, total


def trained_on_validation(record: Any, run: Any) -> Iterator[Finding]:
    """Find shards both trained on and scored, by the paths in the log and, if readable, by content."""
    pattern, held_out = run.settings.get("train_files") or "", object_of(evaluation(run), "sha256_shards")
    names = [Path(name).name for name in held_out]
    if wrong := [name for name in names if "fineweb_train" in name]:
        yield "fail", f"{run.name}: VAL_FILES are training shards: {', '.join(wrong)}"
    if not pattern:
        return
    own, folder, place = Path(pattern).name, Path(pattern).parent, abspath(named_folder(run))
    known = run.settings.get("val_files") or run.settings.get("data_path")  # else only names can be compared
    same = not known or place == abspath(folder) or Path(place).match(abspath(folder))
    named = [name for name in names if same and fnmatchcase(name, own)]
    if named or own.startswith("fineweb_val") or pattern == run.settings.get("val_files"):
        yield "fail", f"{run.name}: TRAIN_FILES={pattern} are validation shards: {', '.join(named) or own}"
        return
    try:
        folder = allowed(record, folder, "--data FOLDER")
        shards, _ = text_files(record, run)
    except ValueError:
        return
    sizes = {path.stat().st_size for path in shards}
    for path in sorted(path for path in folder.glob("*") if fnmatchcase(path.name, own)):
        if path.is_file() and path.stat().st_size in sizes and sha256_file(path) in held_out.values():
            yield (
                "fail",
                f"{run.name}: TRAIN_FILES={pattern}, and {path.name} is a validation shard by its content",
            )


# ------------------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------------------


def check_losses(record: Any) -> Iterator[Finding]:
    """Check the printed scores and those of RESULT against nll.npy, shards and tokenizer."""
    paths = [path for path in record.files if re.fullmatch(r"nll.*\.npy", path.name)]
    told = [run for run in record.runs if evaluation(run)]
    for path in paths if told else ():
        hashed = digest(path, LOSSES_LIMIT)
        own = [run for run in told if evaluation(run).get("sha256_nll") == hashed]
        if not own and (len(told) > 1 or "sha256_nll" in evaluation(told[0])):
            yield "fail", f"{path.name} matches the losses of no log (sha256_nll is not {hashed[:12]}..)"
            continue
        if not own:
            told_not = "RESULT has no sha256_nll (older version), so this file may be from another evaluation"
            yield "warn", f"{path.name}: {told_not}"
        yield from score_again(record, (own or told)[0], path)
    if told and not paths and record.kind == "run":
        yield "warn", "no nll.npy, so the score rests on the log alone"


def score_again(record: Any, run: Any, path: Path) -> Iterator[Finding]:
    try:
        if (size := path.stat().st_size) > LOSSES_LIMIT:
            raise ValueError(f"{size} bytes, and at most {LOSSES_LIMIT} are read")
        losses = read_nll(path)
    except (OSError, ValueError) as error:
        yield "fail", f"{path.name} cannot be read: {error}"
        return
    if losses.ndim != 1 or not losses.size:
        yield "fail", f"{path.name} has shape {losses.shape}, not one loss per target"
        return
    total = float(np.sum(losses, dtype=np.float64))
    yield from same_score(run, "loss", total / len(losses), path)
    # a log may say tokens or targets
    if run.val_tokens is not None and not 0 <= run.val_tokens - len(losses) <= 1:
        yield "fail", f"{path.name} has {len(losses)} losses, but {run.cite('val_tokens')}"
    try:
        targets, num_bytes = count_bytes(*text_files(record, run))
    except ValueError as error:
        yield "warn", f"val_bpb is not recomputed: {error}"
        return
    if targets != len(losses):
        yield "fail", f"{path.name} has {len(losses)} losses, the shards have {targets} targets"
    elif num_bytes < 1:
        yield "fail", f"the {targets} targets of the shards stand for 0 bytes of text"
    else:
        yield from same_score(run, "bpb", total / math.log(2) / num_bytes, path)


def same_score(run: Any, unit: str, value: float, path: Path) -> Iterator[Finding]:
    """Compare with RESULT to TOLERANCE, and with the lines of the adapted score to their printed digits."""
    key, faults = f"val_{unit}_ttt", []
    told = evaluation(run).get(key)
    if not isinstance(told, int | float) or not abs(told - value) <= TOLERANCE * abs(value):
        faults.append(f"RESULT has {key} {told}")
    for score in run.scores:
        printed = getattr(score, f"val_{unit}")
        slack = 0.501 * 10.0**-score.decimals + TOLERANCE * abs(value)
        if re.match("(legal|invalid)_ttt", score.label) and not abs(printed - value) <= slack:
            faults.append(f"the log has {score.line}")
    yield from (("fail", f"{fault}, but {path.name} gives {value:.12g}") for fault in faults)
    yield "pass", f"val_{unit} {value:.10f} matches {path.name}"


# ------------------------------------------------------------------------------------------------------------
# Certificates
# ------------------------------------------------------------------------------------------------------------


def check_certificates(record: Any) -> Iterator[Finding]:
    """Check that certificates say legal, with passed checks, for what was scored."""
    names = re.compile(r"certificate.*\.(txt|json)")
    stems = sorted({path.with_suffix("") for path in record.files if names.fullmatch(path.name)})
    certified = set()
    for stem in stems:
        artifact, faults, doubts = read_certificate(record, stem)
        certified.add(str(artifact))
        yield from (("fail", f"{stem.name}: {fault}") for fault in faults)
        yield from (("warn", f"{stem.name}: {doubt}") for doubt in doubts)
        yield "pass", f"{stem.name}: legal, for artifact {str(artifact)[:12]}.."
    for run in record.runs if stems else ():
        if str(run.result.get("sha256_artifact", next(iter(certified)))) not in certified:
            yield "fail", f"{run.name}: no certificate for its artifact, though other artifacts have one"


def read_certificate(record: Any, stem: Path) -> tuple[str | None, list[str], list[str]]:
    """Return a certificate's artifact hash, its faults, and its open questions."""
    text, data = Path(f"{stem}.txt"), Path(f"{stem}.json")  # with_suffix would replace a name's .seed1
    faults = []
    try:
        faults += text_faults(record, text) if text in record.files else []
        if not data.exists():
            raise ValueError(
                f"no {stem.name}.json, which lists what was audited: put it beside {stem.name}.txt"
            )
        found = read_object(data, "legal", "targets", "checks", "sha256", "settings")
    except ValueError as error:
        return None, [*faults, str(error)], []
    hashes, doubts = object_of(found, "sha256"), []
    artifact = hashes.get("artifact")
    faults += [] if found["legal"] is True else [f'"legal" is {json.dumps(found["legal"])}']
    faults += check_faults(found["checks"])
    if isinstance(left := found.get("not_audited"), list):
        doubts += [f"not audited: {', '.join(map(str, left))}"] if left else []
    else:
        doubts.append("of an older version, which does not list what was not audited")
    scored = [run for run in record.runs if "sha256_artifact" in run.result]
    own = [run for run in scored if run.result["sha256_artifact"] == artifact]
    if scored and not own:
        faults.append("for another artifact than the one the logs scored")
    for run in own[:1]:
        faults += differences(run, found)
        if (told := evaluation(run)) and "nll.npy" not in hashes:
            doubts.append(f"does not name the losses of {run.name}: audit after the evaluation")
        lacking = [key for key in ("sha256_nll", "sha256_shards", "settings") if told and key not in told]
        doubts += (
            [f"not compared, because RESULT has no {', '.join(lacking)} (older version)"] if lacking else []
        )
    return artifact, faults, doubts


def text_faults(record: Any, path: Path) -> list[str]:
    """Return what certificate.txt itself holds against the record."""
    lines = read_text(path, TEXT_LIMIT).splitlines() or [""]
    faults = [] if re.search(": legal( as far as audited)?$", lines[0]) else lines[:1]
    faults += [line.strip() for line in lines if line.startswith("  FAIL ")]
    hashes = dict(re.findall(r"(?m)^  sha256 (\S+) ([0-9a-f]{64})$", "\n".join(lines)))
    shipped = {path.name: digest(path) for path in record.code}
    faults += [
        f"for another {file}" for file, sha256 in hashes.items() if shipped.get(file, sha256) != sha256
    ]
    scored = {run.result["sha256_artifact"] for run in record.runs if "sha256_artifact" in run.result}
    other = bool(scored) and hashes.get("artifact") not in scored
    return faults + (["for another artifact than the one the logs scored"] if other else [])


def check_faults(checks: Any) -> list[str]:
    """Return checks of an audit that failed, that passed with nothing checked, or that are missing."""
    if not isinstance(checks, list) or not all(isinstance(each, dict) for each in checks):
        return ["its checks are not a list of objects"]
    faults = [f"{each.get('name')} failed" for each in checks if each.get("ok") is False]
    for each in (each for each in checks if each.get("ok") is True):
        count = each.get("checked")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            faults.append(f"{each.get('name')} passed with {count} checked")
    passed = {str(each.get("name")).split(" ")[0] for each in checks if each.get("ok") is True}
    faults += [f"{name} did not pass" for name in ESSENTIAL if passed and name not in passed]
    return faults + ([] if passed else ["no check passed"])


def differences(run: Any, found: Mapping[str, Any]) -> list[str]:
    """Return how a certificate differs from its evaluation: hashes, settings, number of targets."""
    told = evaluation(run) or run.result
    hashes, settings = object_of(found, "sha256"), object_of(found, "settings")
    wanted = object_of(told, "sha256_code") | object_of(told, "sha256_shards")
    wanted |= {"tokenizer": told["sha256_tokenizer"]} if "sha256_tokenizer" in told else {}
    wanted |= {"nll.npy": told["sha256_nll"]} if {"sha256_nll"} <= told.keys() and "nll.npy" in hashes else {}
    faults = [f"does not name {name}" if name not in hashes else f"for another {name}"
              for name, sha256 in wanted.items() if hashes.get(name) != sha256]  # fmt: skip
    free = AUDITS_MAY_CHANGE | (set() if "audited_settings" in found else AUDITS_SHRINK)
    apart = [
        f"{name} {settings.get(name)}, scored with {value}"
        for name, value in object_of(told, "settings").items()
        if name not in free and settings.get(name) != value
    ]
    faults += [f"audited with {', '.join(apart)}"] if apart else []
    targets = found["targets"]
    if (
        isinstance(targets, bool)
        or not isinstance(targets, int)
        or not 1 <= targets <= (run.val_tokens or targets)
    ):
        faults.append(f"targets is {targets}, but {run.val_tokens} were scored")
    return faults
