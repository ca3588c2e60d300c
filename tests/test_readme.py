"""Every command of the READMEs runs: as it stands, or on small inputs, or with --describe where it needs GPUs."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TRAIN_SMOKE = "RECIPE=records/recipes/smoke.env python train_gpt.py"
GPU_SMOKE = "python tests/benchmarks/gpu.py --quick --arms plain --recipe records/recipes/smoke.env"
CHECKS = (  # what the README says, what is run (None: that), exit code, and a word of the output
    (r"torchrun --standalone --nproc_per_node=\d train_gpt.py", "python train_gpt.py --describe", 0, "27067484"),
    (r"(RUN_ID=.*|.*--nnodes=2 .*)train_gpt.py", "python train_gpt.py --describe", 0, "27067484"),
    (r"make (demo|test|rehearse)", "make -n demo test test-slow rehearse", 0, "train_gpt.py"),  # CI runs them for real
    (r"torchrun .*gpu_minutes.py --preflight", "python tests/benchmarks/gpu_minutes.py --help", 0, "--preflight"),
    (r"python tests/benchmarks/gpu_minutes.py .*", "python tests/benchmarks/gpu_minutes.py --list", 0, "step_compiled"),
    (r"python data/download.py .*", None, 1, "error:"),  # the arguments are right, the network is closed
    (
        r"python data/prepare.py FILE_OR_FOLDER --out data/mine",
        "python data/prepare.py text --out mine",
        0,
        "train: 40",
    ),
    (r"python data/prepare.py .*", None, 2, "no such file"),  # the arguments are right, the files are the reader's
    (r"DATA_PATH=data/mine TOKENIZER_PATH=data/mine/tokenizer.model python train_gpt.py", TRAIN_SMOKE, 0, "RESULT"),
    (r"python train_gpt.py --(help|describe)", None, 0, "model"),
    (r"python data/demo.py", None, 0, "kept"),
    (r".*python eval_ttt.py.*", "python eval_ttt.py --help", 0, "TTT_MODE"),
    (r".*torchrun .* eval_ttt.py", "python eval_ttt.py --help", 0, "TTT_MODE"),
    (r"python records/submit.py .*", "python records/submit.py --help", 0, "--against"),
    (r"python records/sweep.py run .*", "python records/sweep.py run --help", 0, "--storage"),
    (r"python records/sweep.py .*", "python records/sweep.py --help", 0, "ledger"),
    (r"python records/check.py .*", "python records/check.py --help", 0, "--against"),
    (r"python tests/benchmarks/evaluator.py .*", "python tests/benchmarks/evaluator.py --help", 0, "--model"),
    (r"python tests/benchmarks/quantisation.py .*", "python tests/benchmarks/quantisation.py --help", 0, "--timing"),
    (r"python records/pack.py --out DIR", None, 0, "together"),
    (r"python tests/benchmarks/trainer.py .*", "python tests/benchmarks/trainer.py --help", 0, "--out"),
    (r"python tests/benchmarks/scaling.py .*", "python tests/benchmarks/scaling.py --help", 0, "--soak"),
    (r"python tests/benchmarks/gpu.py --data DIR --tokenizer FILE --out .*", GPU_SMOKE, 0, "BENCH {"),
    (r"python tests/benchmarks/traffic.py", "python tests/benchmarks/traffic.py --help", 0, "--kernels"),
    (r"python tests/benchmarks/quality.py .*", "python tests/benchmarks/quality.py --help", 0, "--seconds"),
)


def commands() -> list[str]:
    """The indented lines of the READMEs that start programs, without their comments."""
    lines = [
        line
        for name in ("README.md", "data/README.md", "records/README.md")
        for line in (ROOT / name).read_text().splitlines()
    ]
    found = [
        line.split("  #")[0].strip() for line in lines if re.match(r"    (\w+=\S+ )*(python|torchrun|make) ", line)
    ]
    return list(dict.fromkeys(found))


@pytest.fixture
def checkout(tmp_path, demo_data):
    """A folder that looks like the root of the project, in which what the commands write stays."""
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "runs"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "text").mkdir()
    for n in range(42):
        words = " ".join(f"{chr(97 + (n * k) % 26) * (k % 7 + 1)}{n * k}" for k in range(300))
        (tmp_path / "text" / f"{n}.txt").write_text(f"Document {n}. {words}\n")
    return tmp_path


def run_here(line: str, checkout: Path, monkeypatch, capsys) -> tuple[int, str]:
    """Run `NAME=value ... python PROGRAM ARGUMENTS` in this process; return its exit code and what it printed."""
    words = shlex.split(line)
    program = words.index("python") + 1
    for word in words[: program - 1]:
        monkeypatch.setenv(*word.split("=", 1))
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "argv", words[program:])
    monkeypatch.setattr(sys, "path", [str((checkout / words[program]).parent), *sys.path])
    try:
        runpy.run_path(words[program], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("command", commands())
def test_command(command, checkout, monkeypatch, capsys):
    """What only prints runs in this process: the start of another, with torch, takes 2 s."""
    plain = re.sub(r"^(RECIPE=\S+ )", "", command)
    replacement, code, word = next(check[1:] for check in CHECKS if re.fullmatch(check[0], plain))
    shown = re.sub(re.escape(plain) + "$", replacement, command) if replacement else command
    shown = shown.replace("--out mine", "--out mine --val-docs 2 --vocab-size 320")
    if re.search(r"python \S+ (run )?--(help|list|describe)$", shown):
        found, said = run_here(shown, checkout, monkeypatch, capsys)
        assert found == code and word in said, said
        return
    line = re.sub(r"\bpython\b(?! -)", sys.executable, shown, count=1)
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(line, shell=True, env=env, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    assert word in result.stdout + result.stderr


def test_every_kind_of_command_is_there():
    for pattern, *_ in CHECKS:
        assert any(re.search(pattern, command) for command in commands()), pattern
