"""data/demo.py: the corpus from Python's own text is disjoint,
reproducible, reused, and imports nothing of it."""

from __future__ import annotations

import json
import platform
import struct
import subprocess
import sys
import sysconfig
from functools import cache
from itertools import pairwise
from pathlib import Path

import demo
import pytest
import sentencepiece as spm
from conftest import search_path

SCRIPT = Path(demo.__file__)
SMOKE = SCRIPT.parent.parent / "records/recipes/smoke.env"
IMPORT_CHECK = """
import runpy, sys
sys.argv = ["demo.py", "--out", sys.argv[2]]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
unwanted = {{"antigravity", "this", "turtle", "tkinter", "pydoc_data.topics", "idlelib"}}
print(sorted(unwanted & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The corpus as the script builds it in a process of its own, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "corpus"
    code = IMPORT_CHECK.format(script=str(SCRIPT))
    command = [sys.executable, "-c", code, "unused", str(out)]
    env = {"PYTHONPATH": search_path(SCRIPT.parent), "PYTHONHASHSEED": "3", "TZ": "Asia/Tokyo"}
    # none of these may matter: see "built again"
    env |= {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@cache
def documents(out: Path, split: str) -> list[str]:
    sp = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    found = []
    for path in sorted(out.glob(f"fineweb_{split}_*.bin")):
        content = path.read_bytes()
        tokens = struct.unpack(f"<{(len(content) - 1024) // 2}H", content[1024:])
        starts = [index for index, token in enumerate(tokens) if token == 1]
        found += [
            sp.decode(list(tokens[a + 1 : b]))
            for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)
        ]
    return found


def test_nothing_of_the_text_is_imported(corpus: tuple[Path, str]) -> None:
    assert corpus[1].splitlines()[-1] == "[]"


def test_manifest_and_sizes(corpus: tuple[Path, str]) -> None:
    manifest = json.loads((corpus[0] / "manifest.json").read_text())
    assert (manifest["name"], manifest["python"]) == ("demo", platform.python_version())
    assert manifest["tokenizer"]["vocab_size"] == 1024 and manifest["tokenizer"]["lossless"]
    assert 150_000 <= manifest["splits"]["val"]["text_bytes"] <= 250_000
    assert manifest["splits"]["train"]["text_bytes"] > 1_000_000
    for split in ("train", "val"):
        texts = documents(corpus[0], split)
        assert len(texts) == manifest["splits"][split]["documents"]
        assert sum(len(text.encode()) for text in texts) == manifest["splits"][split]["text_bytes"]


def test_no_document_or_long_paragraph_is_on_both_sides(corpus: tuple[Path, str]) -> None:
    train, val = documents(corpus[0], "train"), documents(corpus[0], "val")
    assert len(set(train + val)) == len(train + val)

    def paragraphs(texts: list[str]) -> set[str]:
        return {paragraph for text in texts for paragraph in text.split("\n\n") if len(paragraph) >= 200}

    assert paragraphs(val) and not paragraphs(train) & paragraphs(val)


def test_no_step_sees_one_module_alone(corpus: tuple[Path, str]) -> None:
    """No two documents that the smoke recipe reads are of one module; help topics are of none."""
    recipe = dict(
        line.split("#")[0].strip().split("=") for line in SMOKE.read_text().splitlines() if "=" in line
    )
    tokens = int(recipe["ITERATIONS"]) * int(recipe["TRAIN_BATCH_TOKENS"])
    content = (corpus[0] / "fineweb_train_000000.bin").read_bytes()[1024 : 1024 + 2 * tokens]
    starts = [index for index, token in enumerate(struct.unpack(f"<{tokens}H", content)) if token == 1]
    assert starts[0] == 0 and max(b - a for a, b in pairwise([*starts, tokens])) < 0.2 * tokens
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = {path: path.read_bytes() for path in library.rglob("*.py") if "site-packages" not in path.parts}
    modules = []
    for text in documents(corpus[0], "train")[: len(starts)]:
        line = max((line for line in text.splitlines() if "\\" not in line), key=len).strip().encode()
        modules.append(
            {path for path, content in sources.items() if line in content and path.name != "topics.py"}
        )
    assert all(a.isdisjoint(b) for a, b in pairwise(modules))
    found = [min(module) for module in modules if module]
    assert len(set(found)) == len(found) >= 8 and len(starts) >= 14


def test_text_is_that_of_the_library(corpus: tuple[Path, str]) -> None:
    import textwrap

    everything = "\n".join(documents(corpus[0], "train") + documents(corpus[0], "val"))
    assert " ".join(textwrap.__doc__.split()) in " ".join(everything.split())
    assert str(Path.home()) not in everything and "site-packages/" not in sysconfig.get_paths()["stdlib"]


def test_built_again_it_is_the_same_and_built_once_it_is_kept(
    corpus: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((corpus[0] / "manifest.json").read_text())
    # of an earlier demo.py
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "text_version": 1}))
    for name in ("tokenizer.model", "fineweb_train_000000.bin", "fineweb_val_000000.bin"):
        (tmp_path / name).write_bytes((corpus[0] / name).read_bytes())
    assert demo.main(["--out", str(tmp_path)]) == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {path.name: path.read_bytes() for path in corpus[0].iterdir()}
    assert "building" in capsys.readouterr().out
    changed = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert demo.main(["--out", str(tmp_path)]) == 0
    assert "kept" in capsys.readouterr().out
    assert changed == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def small_library(root: Path) -> Path:
    """A stand-in for the standard library whose text is known."""
    words = " ".join(f"word{number}" for number in range(60))
    repeated = "the same paragraph " * 10
    files = {
        "b.py": f'"""Module {words}"""\nraise SystemExit\nclass C:\n    """C."""\n    def f(self):\n        '
        '"""F."""\n',
        "a.py": 'def g():\n    """Dup."""\ndef h():\n    """Dup."""\nasync def i():\n'
        f'    """\n    I {words} x\n    """\n',
        "broken.py": f'"""Broken {words}"""\ndef (\n',
        "short.py": '"""Short."""\n',
        "test/t.py": f'"""Test {words}"""\n',
        "site-packages/p.py": f'"""Package {words}"""\n',
        "tkinter/__init__.py": f'"""Tk {words}"""\n',
        "turtle.py": f'"""Turtle {words}"""\n',
        "pydoc_data/topics.py": f"topics = {{'x': {f'X {words}' + chr(10) * 2 + repeated!r}, "
        f"'y': {f'Y {words}' + chr(10) * 2 + repeated!r}, 'z': {f'X {words}'!r}}}\n",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_choice_of_text(tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(60))
    repeated = ("the same paragraph " * 10).strip()
    train, val = demo.demo_documents(small_library(tmp_path))
    assert sorted(train + val) == [
        f"Dup.\n\nI {words} x",
        f"Module {words}\n\nC.\n\nF.",
        f"X {words}\n\n{repeated}",
        f"Y {words}",
    ]


def test_machines_of_one_python_have_the_same_text(tmp_path: Path) -> None:
    """Line ends, the order of creation and what a distribution adds or leaves out do not matter."""
    first = small_library(tmp_path / "first")
    names = sorted((path.relative_to(first) for path in first.rglob("*.py")), reverse=True)
    for name in (name for name in names if name.name != "turtle.py" and name.parts[0] != "tkinter"):
        path = tmp_path / "second" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((first / name).read_bytes().replace(b"\n", b"\r\n"))
    for name in ("sitecustomize.py", "_sysconfigdata_x.py", "dist-packages/q.py"):
        path = tmp_path / "second" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""{name} {"of this machine " * 40}"""\n')
    modules = {"a", "b", "broken", "short", "pydoc_data", "tkinter", "turtle"}
    expected = demo.demo_documents(first)
    assert (
        demo.demo_documents(first, modules) == demo.demo_documents(tmp_path / "second", modules) == expected
    )


def test_long_documents_are_cut_and_nothing_is_lost() -> None:
    paragraphs = [f"{number} " * (60 + number) for number in range(100)] + ["long " * 2000, "end"]
    texts = ["\n\n".join(paragraphs), *(f"short {number}" for number in range(600))]
    parts = demo.spread(texts)
    cut = [part for part in parts if not part.startswith("short")]
    assert sorted("\n\n".join(cut).split("\n\n")) == sorted(paragraphs)
    assert sorted(set(parts) - set(cut)) == sorted(texts[1:])
    assert sorted(len(part) > demo.MAX_PART_BYTES for part in cut)[-2:] == [False, True]
    places = [index for index, part in enumerate(parts) if part in cut]
    distances = [b - a for a, b in pairwise(places)]
    assert (
        len(cut) > 5
        and 0.5 < min(distances) * len(cut) / len(parts)
        and max(distances) * len(cut) < 2 * len(parts)
    )


def test_a_python_without_sources_and_a_foreign_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no Python sources"):
        demo.demo_documents(tmp_path)
    manifest = {
        "name": "mine\x1b[2J\u202e",
        "python": "3",
        "tokenizer": {"file": "t", "sha256": "0"},
        "shards": [],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert r'"mine\x1b[2J\u202e"' in capsys.readouterr().err
