"""Hostile records: check.py ends with one line each, within its limits, and judges the others.

The same for generated ones, by hypothesis. CASES=10000 python tests/test_check_limits.py runs that many.
"""

import json
import math
import os
import re
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import check
import evidence
import finished
import pytest
import runfiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_check import good_files
from test_check_field import claims, good, run, score, write

FEW = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


# ------------------------------------------------------------------------------------------------------------
# Folders apart
# ------------------------------------------------------------------------------------------------------------


def test_a_bad_folder_hides_no_other(tmp_path, capsys):
    """Neither one that is none nor a broken run; exit code 2, and the others' verdicts are printed."""
    honest = write(tmp_path / "2026-04-01_Name", good())
    broken = write(
        tmp_path / "run", {"train.log": run(7), "config.json": "{}", "eval_ttt.json": "[" * 10_000}
    )
    assert check.main([str(honest), str(tmp_path / "none"), str(broken), str(honest)]) == 2
    out, err = capsys.readouterr()
    assert out.count("PASS: 0 faults") == 2
    assert [line[:7] for line in err.splitlines()] == ["error: "] * 2 and "nested more than" in err
    assert check.main([str(honest), str(tmp_path / "none"), "--json"]) == 2
    (found,) = json.loads(capsys.readouterr().out)
    assert found["status"] == "pass"


def hang(path: Path) -> None:
    time.sleep(60)


def swell(path: Path) -> int:
    return len(bytearray(1 << 31)) + len(bytearray(1 << 31))


def vanish(path: Path) -> None:
    os._exit(11)


def stumble(path: Path) -> None:
    raise KeyError("x")


LIMITS = {
    hang: "takes more than 1 s",
    swell: "takes more than 1 GiB of memory",
    vanish: "ended without an answer",
    stumble: "KeyError('x') in test_check_limits.py",
}


@pytest.mark.parametrize("function", LIMITS, ids=lambda function: function.__name__)
def test_limits_of_time_and_memory(tmp_path, function):
    before = time.monotonic()
    found, told = check.apart(function, tmp_path, 1.0, 1 << 30)
    assert found is None and LIMITS[function] in told and str(tmp_path) in told
    assert time.monotonic() - before < 30


# ------------------------------------------------------------------------------------------------------------
# Files of a folder
# ------------------------------------------------------------------------------------------------------------


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def long_line(folder: Path) -> None:
    text = run(7).replace(
        "step:1/20000", "step:1/2 train_loss: " + "1" * 30_000 + "x\n" + "[" * 30_000 + "\nstep:1/20000"
    )
    (folder / "train_seed7.log").write_text(text)


def assignments(folder: Path) -> None:
    lines = "".join(f"    a{i} = a{i + 1}\n" for i in range(3000))
    (folder / "train_gpt.py").write_text(f"def f(val_tokens):\n{lines}    a3000 = val_tokens\n")


HOSTILE = {  # what is done to the folder of an honest record, rule and words of the verdict
    "FIFO for a certificate": (lambda f: os.mkfifo(f / "certificate.txt"), "files", "certificate.txt"),
    "FIFO for a manifest": (lambda f: os.mkfifo(f / "manifest.json"), "json", "manifest.json: no such file"),
    "FIFO for a program": (
        lambda f: ((f / "train_gpt.py").unlink(), os.mkfifo(f / "train_gpt.py")),
        "files",
        "no train_gpt.py that is a regular file",
    ),
    "device for claims": (
        lambda f: ((f / "submission.json").unlink(), (f / "submission.json").symlink_to("/dev/zero")),
        "json",
        "submission.json: no such file",
    ),
    "device for a log": (
        lambda f: (f / "train_seed1.log").symlink_to("/dev/zero"),
        "files",
        "train_seed1.log",
    ),
    "a log of 3 GB": (lambda f: sparse(f / "train_seed1.log", 3 << 30), "json", "at most"),
    "claims of 1 GB": (lambda f: sparse(f / "submission.json", 1 << 30), "json", "at most"),
    "an artifact of 3 GB": (lambda f: sparse(f / "final_model.int6.ptz", 3 << 30), "artifact", "at most"),
    "a page of 3 GB": (lambda f: sparse(f / "README.md", 3 << 30), "files", "README.md"),
    "a program of 3 GB": (lambda f: sparse(f / "train_gpt.py", 3 << 30), "code", "no shipped program"),
    "a log of lines": (lambda f: (f / "train_seed7.log").write_text("\n" * 600_000), "json", "500000 lines"),
    "a long line": (long_line, "log", "final_int6_sliding_window_exact"),
    "assignments in the wrong order": (assignments, "syntax tree", "nothing to read again"),
    "many scores": (
        lambda f: (f / "train_seed7.log").write_text(
            run(7) + "\n".join(score(f"x{i}", 1.2) for i in range(5_000))
        ),
        "log",
        "x",
    ),
    "a folder named like a log": (lambda f: (f / "x.log").mkdir(), "files", "x.log"),
    "numbers beyond all": (
        lambda f: (f / "submission.json").write_text(claims(val_bpb=1.5).replace("1.5", "1e999999999999")),
        "json",
        "val_bpb is inf",
    ),
    "a number of 5000 digits": (
        lambda f: (f / "submission.json").write_text('{"val_bpb": ' + "9" * 5000 + "}"),
        "json",
        "a number of 5000 digits",
    ),
    "nested claims": (
        lambda f: (f / "submission.json").write_text('{"a":' * 500 + "1" + "}" * 500),
        "json",
        "nested",
    ),
    "claims of other types": (
        lambda f: (f / "submission.json").write_text(
            json.dumps(dict(name=[1], val_bpb=True, seeds=3, seed_results=[1], date={}, track=None))
        ),
        "json",
        "expected",
    ),
    "empty claims": (lambda f: (f / "submission.json").write_text("{}"), "json", "github_id is missing"),
    "a manifest of other types": (
        lambda f: (f / "manifest.json").write_text('{"splits": 3, "shards": [{"sha256": []}]}'),
        "json",
        "manifest.json has shards",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_verdict(tmp_path, name):
    spoil, rule, words = HOSTILE[name]
    folder = write(tmp_path / "2026-04-01_Name", good())
    spoil(folder)
    before = time.process_time()
    verdicts = check.check(check.read_record(folder))
    assert any(v.rule == rule and words in v.evidence for v in verdicts), verdicts
    assert all(len(v.evidence) < 700 for v in verdicts)
    assert check.report(check.read_record(folder), verdicts) and time.process_time() - before < 10


def test_too_many_files_are_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "MOST_FILES", 5)
    with pytest.raises(ValueError, match="more than 5 files"):
        check.read_record(write(tmp_path / "2026-04-01_Name", good()))


BRACKETS = "/my data/[v2] x"


def test_paths_with_blanks_and_brackets(tmp_path, monkeypatch):
    """Of the folder itself, and in the settings of a log: equal folders are seen as equal."""
    folder = write(tmp_path / "[a] b" / "2026-04-01_Name", good())
    assert check.status_of(check.check(check.read_record(folder))) == "pass"
    facts = check.LogFacts(
        [Path("x.log")],
        settings=dict(val_files=f"{BRACKETS}/part_*.bin", train_files=f"{BRACKETS}/part_0.bin"),
        results=[dict(val_bpb_ttt=1.0, sha256_shards={"part_0.bin": "0"})],
    )
    record = SimpleNamespace(data=None, tokenizer=None, path=tmp_path)
    assert [status for status, _ in evidence.trained_on_validation(record, facts)] == ["fail"]
    facts.settings["train_files"] = f"{BRACKETS}y/part_0.bin"
    assert not list(evidence.trained_on_validation(record, facts))


# ------------------------------------------------------------------------------------------------------------
# Generated logs, results and claims
# ------------------------------------------------------------------------------------------------------------

ODD_NUMBERS = [
    "0",
    "-1",
    "9" * 400,
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "1.5",
    "1e-400",
    "18446744073709551616",
    "1" * 5000,
    "0.1e9999999999999999999999",
]
texts = st.text(max_size=20) | st.sampled_from(
    ["", "\x1b[2J", "../../x", "/dev/zero", "a\0b", "\ud800", "²", "[*"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
RESULT_KEYS = [
    "seed",
    "steps",
    "model_params",
    "bytes_code",
    "bytes_model",
    "bytes_total",
    "val_tokens",
    "world_size",
    "train_seconds",
    "eval_seconds",
    "step_avg_ms",
    "val_bpb_sliding",
    "val_loss_sliding",
    "val_bpb_ttt",
    "val_loss_ttt",
    "val_bpb_roundtrip",
    "sha256_artifact",
    "sha256_code",
    "sha256_shards",
    "sha256_nll",
    "sha256_tokenizer",
    "settings",
    "versions",
    "trainer",
    "legal",
    "earlier_code",
    "ttt_gain_bpb",
    "bytes_total_packed",
]


def objects(keys: list[str]) -> st.SearchStrategy[str]:
    """JSON with some of those keys, of any value; raw numbers that Python's own writer never writes."""
    entries = st.dictionaries(st.sampled_from(keys) | texts, values, max_size=8).map(json.dumps)
    raw = st.tuples(st.sampled_from(keys), st.sampled_from(ODD_NUMBERS)).map('{{"{0[0]}": {0[1]}}}'.format)
    deep = st.integers(1, 3000).map(lambda depth: '{"a":' * depth + "1" + "}" * depth)
    return entries | raw | deep


LINES = [
    *run(7).splitlines(),
    "  MATRIX_LR=0.1 (given)",
    "  seed: 42",
    "params:1 s:3",
    "resumed: phase:train step:1",
    "=" * 100,
    "import torch",
    "GPTQ:collected 3 Hessians in 2s",
    "ttt_phased: total_docs:50000",
    "Quantized BPB: 1.2",
    "legal_ttt_exact val_loss:nan val_bpb:inf time:1s",
    "x vl:1 bpb:2 (a=1) time:3ms",
    "budget:1/2",
    "100/200 train_loss: 2.0 train_time: 8.7m tok/s: 1",
    "total_eval_time:329.0s",
]


@st.composite
def changed_lines(draw) -> str:
    """A line of a log, some of its characters or numbers replaced."""
    line = draw(st.sampled_from(LINES))
    at = draw(st.integers(0, len(line)))
    middle = draw(
        texts | st.sampled_from(ODD_NUMBERS) | st.sampled_from([":", " ", "\t", "\r", ",,,,", "[" * 99])
    )
    return line[:at] + middle + line[at + draw(st.integers(0, 9)) :]


log_lines = st.sampled_from(LINES) | changed_lines() | objects(RESULT_KEYS).map("RESULT {}".format) | texts
ENCODERS = [
    lambda text: text.encode("utf-8", "surrogatepass"),
    lambda text: text.encode("utf-16", "surrogatepass"),
    lambda text: text.encode("utf-8-sig", "surrogatepass")[:-3],
]
logs = st.tuples(st.sampled_from(ENCODERS), st.lists(log_lines, max_size=30)).map(
    lambda pair: pair[0]("\n".join(pair[1]))
)


@st.composite
def altered(draw, content: bytes) -> bytes:
    """A file with another value of one of its JSON keys."""
    text = content.decode()
    keys = sorted(set(re.findall(r'"([a-z_0-9]+)": ', text)))
    if not keys:
        return draw(logs)
    value = draw(values.map(json.dumps) | st.sampled_from(ODD_NUMBERS))
    found = re.compile(rf'"{draw(st.sampled_from(keys))}": ("[^"]*"|[^,}}]*)')
    return found.sub(lambda match: match[0].partition(":")[0] + f": {value}", text).encode()


FIELD = {name: text.encode() for name, text in good().items()}
OWN = {name: content for name, content in good_files().items() if not name.endswith(".ptz")}
OTHERS = [
    "certificate.json",
    "certificate.txt",
    "manifest.json",
    "x.py",
    "eval_ttt.py",
    "nll.npy",
    "a.ptz",
    "summary.log",
    "sub/x.log",
]
MORE_KEYS = [*RESULT_KEYS, "checks", "targets", "sha256", "splits", "shards", "legal"]


@st.composite
def records(draw) -> dict[str, bytes]:
    """The files of a record in the field's format or ours, some replaced by generated ones."""
    files = dict(draw(st.sampled_from([FIELD, OWN])))
    for name in draw(st.lists(st.sampled_from(sorted(files)), max_size=3, unique=True)):
        files[name] = draw(logs if name.endswith(".py") else logs | altered(files[name]))
    as_bytes = objects(MORE_KEYS).map(lambda text: text.encode("utf-8", "surrogatepass"))
    contents = st.binary(max_size=60) | logs | as_bytes
    return files | draw(st.dictionaries(st.sampled_from(OTHERS), contents, max_size=2))


def judge_record(files: dict[str, bytes]) -> None:
    judge_files(files)


def judge_files(files: dict[str, bytes]) -> str:
    """Return the status of a folder with those files; anything but a ValueError of one line is a fault."""
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place, "2026-04-01_Name"), files)
        try:
            record = check.read_record(folder)
            verdicts = check.check(record)
            told = check.report(record, verdicts, True) + check.report(record, verdicts)
            json.dumps(check.plain([vars(run) for run in record.runs]), allow_nan=False)
            assert not runfiles.CONTROL.search(told)
            return check.status_of(verdicts)
        except ValueError as error:
            assert not isinstance(error, UnicodeError) and "\n" not in str(error), error
            return "error"


def judge_log(content: bytes) -> None:
    """Read a log alone, and as the log of a run that submit.py reads."""
    with tempfile.TemporaryDirectory() as place:
        path = write(Path(place, "x"), {"train_seed7.log": content}) / "train_seed7.log"
        try:
            finished.read_logs(path, [path], path.with_name("certificate.txt"))
            record = check.read_record(path)
            check.report(record, check.check(record))
        except (ValueError, finished.Refused):
            pass


def judge_result(text: str) -> None:
    """Facts are numbers or None whatever RESULT says, and each value of another type is a conflict."""
    try:
        problems = check.conform(runfiles.parse_object(text), check.RESULT_FIELDS, "x")
    except ValueError:
        problems = ["not JSON"]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "x.log")
        path.write_bytes(f"RESULT {text}".encode("utf-8", "surrogatepass"))
        facts = check.read_log(path)
    assert len(facts.conflicts) >= len(problems)
    for key in ("seed", "steps", "bytes_total", "train_seconds", "step_avg_ms"):
        value = getattr(facts, key)
        assert value is None or (not isinstance(value, bool) and math.isfinite(value) and value >= 0)


GENERATED = {
    "records": (judge_record, records()),
    "logs": (judge_log, logs),
    "results": (judge_result, objects(RESULT_KEYS)),
}


@pytest.mark.parametrize("name", GENERATED)
def test_no_generated_file_ends_in_a_traceback(name):
    function, strategy = GENERATED[name]
    FEW(given(strategy)(function))()


def test_honest_records_are_accepted_among_them():
    for encode in (*ENCODERS[:2], lambda text: text.replace("\n", "\r\n").encode()):
        files = {
            name: encode(text) if name.endswith(".log") else text.encode() for name, text in good().items()
        }
        assert judge_files(files) == "pass"


def main() -> None:
    """Run CASES cases in all, within 4 GiB of address space; print the peak of the resident memory."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    count = int(os.environ.get("CASES", "10000")) // len(GENERATED) + 1
    many = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for name, (function, strategy) in GENERATED.items():
        before = time.monotonic()
        many(given(strategy)(function))()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name}: {count} cases, {time.monotonic() - before:.0f} s, peak {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
