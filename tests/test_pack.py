"""records/pack.py: the packed programs do what the readable ones do, and any source survives packing.

The packed files come from one call of the command with another hash seed than this process has. What they do
is held against the readable programs, what they contain against Python's own reading of sources.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import evidence
import pack
import pytest
from conftest import inherited
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_ttt
import train_gpt

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("train_gpt.py", "eval_ttt.py")
AWKWARD = (
    b"\\\r\n\0\"'07x{}%#\t\x0c\x1a\x85\xa0\xc3\xff"  # escapes, ends, what follows an escape, halves of UTF-8
)


def python(*args: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env={"OMP_NUM_THREADS": "1", **inherited(), **environ}, capture_output=True
    )


@pytest.fixture(scope="module")
def packing(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder that the command fills and the lines that it prints."""
    folder = tmp_path_factory.mktemp("shipped")
    done = python(ROOT / "records" / "pack.py", "--out", folder, cwd=folder, PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr.decode()
    return folder, done.stdout.decode().splitlines()


@pytest.fixture(scope="module")
def shipped(packing) -> Path:
    return packing[0]


@pytest.fixture(scope="module")
def packed_trainer(shipped, tmp_path_factory) -> ModuleType:
    """The packed trainer, imported beside the readable one, as in a record: without tools."""
    alone = tmp_path_factory.mktemp("alone") / "train_gpt.py"
    alone.write_bytes((shipped / "train_gpt.py").read_bytes())
    spec = importlib.util.spec_from_file_location("packed_trainer", alone)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setitem(sys.modules, "packed_trainer", module)
        spec.loader.exec_module(module)
        yield module


# ------------------------------------------------------------------------------------------------------------
# The programs
# ------------------------------------------------------------------------------------------------------------


def test_files_sizes_and_table(packing):
    shipped, (_, *table, last) = packing
    readable = {"train_gpt_readable.py", "eval_ttt_readable.py"}
    assert {p.name for p in shipped.iterdir()} == {*NAMES, *readable, "records"}
    assert (shipped / "records").resolve() == ROOT / "records"
    rows = {name: [int(n.replace(",", "")) for n in row] for name, *row in map(str.split, table)}
    for name in NAMES:
        readable, minified, packed = rows[name]
        assert (shipped / name.replace(".py", "_readable.py")).read_bytes() == (ROOT / name).read_bytes()
        assert (readable, packed) == tuple((folder / name).stat().st_size for folder in (ROOT, shipped))
        assert packed < minified < readable and packed < 0.4 * readable
    assert rows["together"] == [sum(column) for column in zip(*(rows[name] for name in NAMES), strict=True)]
    assert last.startswith(f"CODE_BYTES={rows['together'][2]}: ")
    assert pack.packed_bytes(pack.PROGRAMS) == rows["together"][2]


def test_what_a_program_would_be_packed_as(shipped, tmp_path, monkeypatch):
    """Size and hash are those of the file that the command writes, packed again or from the cache."""
    monkeypatch.setattr(pack, "CACHE", tmp_path / "cache" / "packed.json")
    blob = (shipped / "eval_ttt.py").read_bytes()
    expected = (len(blob), hashlib.sha256(blob).hexdigest())
    assert pack.packed(ROOT / "eval_ttt.py") == pack.packed(shipped / "eval_ttt.py") == expected
    with monkeypatch.context() as patch:
        patch.setattr(pack, "minify", None)  # the second time it is not called
        assert pack.packed(ROOT / "eval_ttt.py") == expected
    other = tmp_path / "other.py"
    for value in range(pack.CACHED + 2):  # other content is packed anew, and the cache stays small
        other.write_text(f"value = {value}\n")
        assert pack.packed(other).size == len(pack.pack(f"value={value}"))
    assert len(json.loads(pack.CACHE.read_text())) == pack.CACHED
    pack.CACHE.write_text("[")
    assert pack.packed(ROOT / "eval_ttt.py") == expected  # a damaged cache counts as empty


def test_packed_bytes_without_the_minifier(shipped, monkeypatch):
    def missing(name: str) -> str:
        raise pack.PackageNotFoundError(name)

    monkeypatch.setattr(pack, "version", missing)
    assert pack.packed_bytes(pack.PROGRAMS) is None
    packed_already = [shipped / name for name in NAMES]
    assert pack.packed_bytes(packed_already) == sum(path.stat().st_size for path in packed_already)


def test_the_tools_are_linked_only_where_nothing_stands(tmp_path):
    (tmp_path / "records").mkdir()
    pack.link_tools(tmp_path)
    assert not (tmp_path / "records").is_symlink()


@pytest.mark.parametrize("name", NAMES)
def test_packing_again_gives_the_same_bytes(shipped, name):
    assert pack.pack(pack.minify((ROOT / name).read_text(encoding="utf-8"))) == (shipped / name).read_bytes()


def test_a_run_of_the_packed_trainer(shipped, smoke_env, tmp_path):
    """Losses, scores and artifact are those of the readable trainer to the last bit;
    code is counted as shipped."""
    env = smoke_env | dict(
        ITERATIONS="5", VAL_LOSS_EVERY="0", GPTQ_CALIB_BATCHES="1", EVAL_STRIDE="64", DEVICE="cpu"
    )
    done = python(shipped / "train_gpt.py", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr.decode()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as readable:
        patch.chdir(tmp_path)
        assert train_gpt.main([], env | {"RUN_ID": "readable"}) == 0
    logs = done.stdout.decode(), readable.getvalue()
    losses, expected = (re.findall(r"^(?:step:)?(\d+)/5 train_loss:(\S+)", log, re.M) for log in logs)
    assert losses == expected and [int(step) for step, _ in losses] == [1, 2, 3, 4, 5]

    folders = [tmp_path / "runs" / name for name in ("run", "readable")]
    metrics = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    exact, expected = ([row["train_loss"] for row in rows if "train_loss" in row] for rows in metrics)
    assert exact == expected and len(exact) == 5
    artifact, expected = ((folder / "final_model.int6.ptz").read_bytes() for folder in folders)
    assert artifact == expected
    result, expected = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert all(
        result[key] == expected[key] for key in expected if key.startswith(("val_", "sha256_artifact"))
    )

    (size,) = re.findall(r"^Code size: (\d+) bytes$", logs[0], re.M)
    assert int(size) == sum((shipped / name).stat().st_size for name in NAMES) == result["bytes_code"]
    for name in NAMES:
        assert (folders[0] / "source" / name).read_bytes() == (shipped / name).read_bytes()


def test_the_packed_evaluator_runs_with_the_packed_trainer(shipped, tmp_path, capsys):
    code = (
        "import eval_ttt as e; print(e.__file__, e.tg.__file__, sep='\\n'); raise "
        "SystemExit(e.main(['--help']))"
    )
    done = python("-B", "-c", code, cwd=tmp_path, PYTHONPATH=str(shipped))
    assert done.returncode == 0, done.stderr.decode()
    *files, head = done.stdout.decode().split("\n", 2)
    assert files == [str(shipped / name) for name in ("eval_ttt.py", "train_gpt.py")]
    assert eval_ttt.main(["--help"]) == 0
    assert head == capsys.readouterr().out  # the settings come from records/, by the link


@pytest.mark.parametrize("option", ["--help", "--describe"])
def test_what_the_packed_trainer_says_of_itself(packed_trainer, smoke_env, capsys, option):
    """Its usage or its parameter count. Tables come from records/describe.py, which a record lacks."""
    packed, readable = (
        (module.main([option], smoke_env), capsys.readouterr().out) for module in (packed_trainer, train_gpt)
    )
    assert packed[0] == readable[0] == 0
    if option == "--help":
        assert packed[1].startswith(readable[1][:500]) and "Config in train_gpt.py" in packed[1]
    else:
        assert packed[1].strip() in readable[1]


def test_what_other_files_use_of_the_trainer(packed_trainer):
    """Globals, settings with their types, and the arguments of every function are those of the readable
    trainer."""
    # torch.compile adds some
    own = {name: value for name, value in vars(train_gpt).items() if not name.startswith("__")}
    assert {name for name in vars(packed_trainer) if not name.startswith("__")} - {"bz2"} == own.keys()
    ours, theirs = (
        [(f.name, f.type, f.default, f.metadata) for f in fields(m.Config)]
        for m in (packed_trainer, train_gpt)
    )
    assert ours == theirs
    functions = {name: value for name, value in own.items() if inspect.isfunction(value)}

    def arguments(function) -> list[tuple]:
        found = inspect.signature(function).parameters.values()
        # what * collects is nobody's to name
        return [(a.kind, a.kind is a.VAR_POSITIONAL or a.name) for a in found]

    for name, function in functions.items():
        assert arguments(getattr(packed_trainer, name)) == arguments(function), name
    assert len(functions) > 100


@pytest.mark.parametrize("name", NAMES)
def test_the_check_of_records_reads_packed_programs(shipped, name):
    program = evidence.read_program(shipped / name)
    assert program.problem == "" and ast.dump(program.tree) == ast.dump(
        ast.parse(pack.minify((ROOT / name).read_text(encoding="utf-8")))
    )
    assert list(evidence.find_shapes(program.tree)) == []


# ------------------------------------------------------------------------------------------------------------
# Any source
# ------------------------------------------------------------------------------------------------------------


def test_minified_code_does_the_same():
    source = '''"""Say what this is."""
from __future__ import annotations
from dataclasses import dataclass, fields
from typing import NamedTuple

@dataclass
class Settings:
    """Gone."""
    width: int = 3  # gone
    name: "str" = "\\r\\0'\\u2028"

class Pair(NamedTuple):
    first: int
    second: float = 0.5

class Plain:
    depth: int = 1

class Failure(Exception):
    """A class of a docstring alone."""

def padded(values: dict[str, int], *, long_keyword: int = 2) -> str:
    """Gone too."""
    assert values, "nothing to pad"
    one_long_local: int = long_keyword
    return f"{values['a']:>{values['w']}} {', '.join(values)!r} {one_long_local=}"

def refused() -> str:
    try:
        padded({})
    except AssertionError as error:
        return str(error)

RESULT = [__doc__, [f.type for f in fields(Settings)], Settings(), Pair(1), Pair.__annotations__.keys(),
          Plain.__annotations__, Failure.__mro__[1], padded({"a": 1, "w": 4}, long_keyword=7), refused()]
'''
    small = pack.minify(source)
    spaces = [{"__name__": __name__}, {"__name__": __name__}]
    for text, space in zip((source, small), spaces, strict=True):
        exec(compile(text, "text", "exec", dont_inherit=True), space)
    assert [repr(value) for value in spaces[0]["RESULT"]] == [repr(value) for value in spaces[1]["RESULT"]]
    assert not re.search("gone|one_long_local[^=]|alone", small, re.I) and len(small) < 0.8 * len(source)


def test_minified_code_is_for_every_python():
    """The quotes inside an f-string differ from those around it, as Python 3.10 and 3.11 require."""
    source = """def f(d): return f"{d['a']:>{d['w']}} {', '.join(d)}" """
    assert pack.minify(source) == """def f(d):return f"{d['a']:>{d['w']}} {', '.join(d)}\""""


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(st.sampled_from([bytes([b]) for b in AWKWARD]) | st.binary(max_size=3), max_size=40).map(
        b"".join
    )
)
def test_a_literal_holds_any_bytes(blob):
    space: dict[str, str] = {}
    exec(compile(b"#coding:l1\nTEXT = " + pack.literal(blob), "literal", "exec"), space)
    assert space["TEXT"].encode("latin-1") == blob


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.text(
        st.sampled_from(AWKWARD.decode("latin-1") + "\u2028\U0001d11e")
        | st.characters(exclude_categories=["Cs"])
    )
)
def test_any_source_survives_packing(source):
    """What a packed file hands to exec is the source."""
    handed: list[bytes] = []
    exec(compile(pack.pack(source), "packed", "exec", dont_inherit=True), {"exec": handed.append})
    assert handed == [source.encode()]


def test_a_file_holds_any_bytes(tmp_path):
    """Python reads a program from a file otherwise than from memory: in lines."""
    blob = b"".join(map(bytes, itertools.product(AWKWARD, repeat=3))) + bytes(range(256))
    program = b"#coding:l1\nimport sys\nsys.stdout.buffer.write(%s.encode('l1'))"
    (tmp_path / "bytes.py").write_bytes(program % pack.literal(blob))
    done = python("bytes.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout == blob


def test_a_packed_file_runs_in_its_own_place(tmp_path):
    """Same names for itself, the exit code of its own, a line number in its traceback."""
    source = (
        '"""\u00c4 \\\\ doc."""\nimport sys\nprint(ascii([__doc__, __name__, __file__, '
        "sys.argv]))\nraise KeyError"
    )
    said = []
    for name, content in (("plain", source.encode()), ("packed", pack.pack(source))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program.py").write_bytes(content)
        said.append(python("program.py", "one", cwd=tmp_path / name))
    assert said[0].stdout.replace(b"plain", b"packed") == said[1].stdout != b""
    assert said[0].returncode == said[1].returncode == 1 and b"line 4, in <module>" in said[1].stderr


# ------------------------------------------------------------------------------------------------------------
# What the user can put right
# ------------------------------------------------------------------------------------------------------------


def refused(capsys, *args: Path | str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pack.py", *map(str, args)])
        assert pack.main() == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    return captured.err


def test_what_cannot_be_packed_is_refused(tmp_path, capsys, monkeypatch):
    bad = tmp_path / "bad.py"
    bad.write_text("def f(:\n")
    assert "bad.py" in refused(capsys, bad, "--out", tmp_path / "out")
    bad.write_bytes(b"x = '\xff'\n")
    assert "bad.py" in refused(capsys, bad, "--out", tmp_path / "out")
    assert "missing.py" in refused(capsys, tmp_path / "missing.py", "--out", tmp_path / "out")
    bad.write_text("x = 1\n")
    assert "overwritten" in refused(capsys, bad, "--out", tmp_path) and bad.read_text() == "x = 1\n"
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    assert "pip install -r requirements.txt" in refused(capsys, bad, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_library_named_in_the_message_is_pinned():
    assert re.search(r"^python-minifier==\d", (ROOT / "requirements.txt").read_text(), re.M)
