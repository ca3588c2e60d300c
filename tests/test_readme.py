"""Every command of the READMEs runs, with the options that stand there, on files and sizes that take seconds.

Files exist under the names that the READMEs use. A Case adds arguments and settings that make a command
small; the last of two equal options counts. torchrun's options go through its own parser, then one process
runs the rest. A program that takes more than ten seconds even so only parses its command line.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import check
import pytest
import submit
import zstandard
from conftest import ROOT
from test_download import FOLDER, hub, shard  # noqa: F401
from test_gpu_minutes import entry, wheels  # noqa: F401
from test_submit import SEEDS, env, made, start  # noqa: F401
from test_sweep import STAND_IN
from torch.distributed.run import get_args_parser

import train_gpt
from train_gpt import Config

PAGES = ("README.md", "data/README.md", "records/README.md", *(f"records/guide/{name}.md" for name in (
    "training", "evaluation", "quantization", "frontier", "measuring")))  # fmt: skip
SMOKE = "records/recipes/smoke.env"
SHORT = dict(ITERATIONS="2", WARMUP_STEPS="0", VAL_LOSS_EVERY="0", GPTQ_CALIB_BATCHES="0")
RECORD = "track_non_record_16mb/2026-12-01_Ours"
ADAPT = dict(TTT_CHUNK_SIZE="32", TTT_LR="0.002")
STAND_IN_RUNS = f"--launcher '{sys.executable} stand_in.py'"  # in milliseconds


class Case(NamedTuple):
    """How a command of a README is run."""

    pattern: str  # that its whole line matches
    said: str  # in its output
    code: int = 0
    more: str = ""  # arguments behind its own
    settings: Mapping[str, str] = {}
    swap: Mapping[str, str] = {}  # words of the line -> what stands in their place


def parsed(pattern: str) -> Case:
    """A command that is parsed and not run: argparse knows all its options and misses none."""
    return Case(pattern, "error: unrecognized arguments: --no-such-option\n", 2, "--no-such-option")


CASES = (  # the first whose pattern matches
    Case(r".*make (demo|test|rehearse)", ".venv/bin/python "),  # what it would run; CI runs it
    Case(r"(RECIPE=\S+pr1019.env|SEED=1 RUN_ID=A) torchrun .*train_gpt.py", "27067484", more="--describe",
         settings=dict(RECIPE="records/recipes/pr1019.env"), swap={"packed/": ""}),  # no small model
    parsed(r"RECIPE=\S+ torchrun .*gpu_minutes.py.*"),  # 40 s with two processes: test_gpu_minutes.py
    Case(r"RUN_ID=\S+ .*torchrun .*train_gpt.py", "RESULT {", settings=SHORT),
    Case(r"DATA_PATH=\S+ .*python train_gpt.py", "RESULT {", settings=SHORT,
         swap={"data/mine": "data/demo", "demo.env": "smoke.env"}),
    Case(r".*python train_gpt.py .*--(help|describe)", "model", swap={"HEAD_GAIN=1 ": ""}),  # of an idea
    Case(r".*python (packed/)?eval_ttt.py --audit", "NOT CERTIFIED, too little was audited", 1,
         settings=ADAPT | {"AUDIT_TOKENS": "40"}, swap={"demo.env": "smoke.env", "packed/": ""}),
    Case(r".*python eval_ttt.py --sample.*", "sample:1 adapted: ",
         settings=ADAPT, more="--length 4", swap={"demo.env": "smoke.env", "--document 3": "--document 0"}),
    Case(r".*eval_ttt.py", "legal_ttt_exact", settings=ADAPT,
         swap={"demo.env": "smoke.env", "packed/": ""}),
    Case(r"python data/demo.py", "kept"),
    Case(r"python data/prepare.py --overlap FOLDER", "documents"),
    Case(r"python data/prepare.py .*--tokenizer.*", "train: 40", more="--val-docs 2 --workers 1"),
    Case(r"python data/prepare.py .*--val-input.*", "train: 42", more="--vocab-size 320 --workers 1"),
    Case(r"python data/prepare.py .*", "train: 40", more="--val-docs 2 --vocab-size 320 --workers 1"),
    Case(r"python data/download.py .*--dry-run", "bytes to download", more="--out downloads"),
    Case(r"python data/download.py .*", "bytes downloaded", more="--out downloads", swap={"COMMIT": "main"}),
    Case(r"python records/pack.py --out packed", "CODE_BYTES="),
    Case(r"python records/launch.py plan .*", "total: "),
    Case(r"python records/claims/claims.py", "claims, 0 of them differ"),
    Case(r"python records/check.py runs/.*", "0 faults"),
    Case(r"python records/check.py .*", "bpb better than OTHER_FOLDER", 1, swap={"TRACK/FOLDER": RECORD}),
    Case(r"python records/submit.py --table", "records/README.md", more="--out records"),
    Case(r"python records/submit.py --regenerate.*", "0 faults",
         swap={"TRACK/FOLDER": RECORD, "[": "", "]": ""}),
    Case(r"python records/submit.py .*--require-significance", "refused: A gain of 0.005 nats", 1,
         swap={"against FOLDER": "against OTHER_FOLDER"}),
    Case(r"python records/submit.py .*", "0 faults", more="--out .",
         swap={"against FOLDER": "against OTHER_FOLDER", "FILE": "what.md"}),
    Case(r"python records/analyze.py nll .*", "gain of B over A"),
    Case(r"python records/analyze.py weights .*", "cosine of the weights", more="--rows 2 --only cosines"),
    Case(r"python records/analyze.py .*--html report.html", "page: report.html"),
    Case(r"python records/analyze.py runs/.*", "curve.png", swap={"<RUN_ID>": "NAME", "[...]": "runs/A"}),
    Case(r"python records/sweep.py run .*pr398.toml.*", "trials.csv",
         more=f"--sampler random --trials 1 --seeds 1 {STAND_IN_RUNS}"),
    Case(r".*python records/sweep.py run .*--trials 20 .*", "trials.csv", more="--trials 1", settings=SHORT,
         swap={"demo.env": "smoke.env"}),
    Case(r".*python records/sweep.py run .*", "trials.csv", more=f"--trials 1 {STAND_IN_RUNS}"),
    Case(r"python records/sweep.py compare .*", "paired t-test", more=f"--seeds 1,2 {STAND_IN_RUNS}",
         swap={f"records/recipes/{name}.env": f"{name}.env" for name in "AB"}),
    Case(r".*python records/sweep.py one .*", "verdict=keep", more=STAND_IN_RUNS),
    Case(r"python tests/benchmarks/gpu_minutes.py --prepare .*", "stage",
         more="--wheels wheels --tokens 2000 --tuning 1", swap={"--val TEXT": "--val val.jsonl"}),
    Case(r"python tests/benchmarks/gpu_minutes.py --stage .*", "stage is missing", 2),  # minutes of a GPU
    Case(r"python tests/benchmarks/gpu_minutes.py --page .*", "| 711 |"),
    parsed(r"python tests/benchmarks/trainer.py .*"),  # half a minute with --quick
    Case(r"python tests/benchmarks/evaluator.py .*", "BENCH {",
         more="--quick --seq-len 64 --modes 'banks, sgd as'"),
    Case(r"python tests/benchmarks/quantisation.py --run .*", "BENCH {",
         more="--quick --targets 300 --only 'k sigma, brotli'"),
    parsed(r"python tests/benchmarks/quantisation.py --timing .*"),  # 27 M weights
    parsed(r"python tests/benchmarks/scaling.py .*"),  # a minute with --quick
    Case(r"python tests/benchmarks/gpu.py .*", "BENCH {", more=f"--quick --arms plain --recipe {SMOKE}"),
    parsed(r"python tests/benchmarks/traffic.py.*"),  # test_graphs.py runs it
    parsed(r"python tests/benchmarks/quality.py .*"),  # both programs, which other lines run
    parsed(r"python tests/benchmarks/frontier.py .*"),  # hours
)  # fmt: skip


def commands() -> list[str]:
    """The lines and spans of code in the READMEs that start programs, without their comments."""
    start, found = r"(?:\w+=\S+ )*(?:python|torchrun|make) ", []
    for page in PAGES:
        text = re.sub(r" \\\n +", " ", (ROOT / page).read_text())  # a command may go on in the next line
        found += [line.split("  #")[0].strip() for line in re.findall(rf"(?m)^    ({start}.*)", text)]
        found += [" ".join(span.split()) for span in re.findall(rf"`({start}[^`]*)`", text)]
    return list(dict.fromkeys(found))


def case_of(command: str) -> Case:
    return next(case for case in CASES if re.fullmatch(case.pattern, command))


@pytest.fixture
def checkout(tmp_path, demo_data) -> Path:
    """A folder that looks like the root of the project; what programs write into it stays in it."""
    for each in ROOT.iterdir():
        if each.name in ("data", "records"):
            (tmp_path / each.name).mkdir()
            for inner in each.iterdir():
                (tmp_path / each.name / inner.name).symlink_to(inner)
        elif each.name not in (".git", ".venv", "runs"):
            (tmp_path / each.name).symlink_to(each)
    return tmp_path


@pytest.fixture
def readers_files(checkout, demo_data) -> None:
    """Texts, tokenizers, recipes and a report under the names that the READMEs give a reader's own."""
    texts = []
    for n in range(42):
        words = " ".join(f"{chr(97 + (n * k) % 26) * (k % 7 + 1)}{n * k}" for k in range(300))
        texts.append(f"Document {n}. {words}\n")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (checkout / "corpus.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    for name in ("docs_selected.jsonl", "val.jsonl"):
        (checkout / name).write_text(lines)
    for name in ("FILE_OR_FOLDER", "TEXT", "train"):
        (checkout / name).mkdir()
        (checkout / name / "texts.jsonl").write_text(lines)
    (checkout / "DIR").symlink_to(demo_data)
    for name in ("FILE", "fineweb_1024_bpe.model"):
        (checkout / name).symlink_to(demo_data / "tokenizer.model")
    for name, rate in (("A", 0.03), ("B", 0.04), ("gain", 0.05)):
        (checkout / f"{name}.env").write_text((ROOT / SMOKE).read_text() + f"MATRIX_LR={rate}\n")
    report = dict(rehearsal=True, calls=[dict(date="2027-01-01 10:00", seconds=9, used_seconds=8)],
                  parts=dict(probe=entry(gpu="a card", matmul_tflops=711.0)))  # fmt: skip
    (checkout / "runs/gpu_minutes").mkdir(parents=True)
    (checkout / "runs/gpu_minutes/gpu_minutes.json").write_text(json.dumps(report))
    (checkout / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    (checkout / "what.md").write_text("Fewer steps.\n")


def leave_out_the_scan(monkeypatch) -> None:
    """Let records/submit.py check a record without the scan of its programs, which check.py does too."""
    monkeypatch.setattr(check, "RULES", tuple(rule for rule in check.RULES if rule[0] != "syntax tree"))


@pytest.fixture(scope="module")
def record(made, tmp_path_factory) -> Path:  # noqa: F811
    """A record folder of the three runs."""
    out = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_the_scan(patch)
        patch.setattr(submit, "smoke_start", lambda *_: None)
        done = start([made / str(seed) for seed in SEEDS], out)
    assert done.code == 0, done.err
    return next(out.glob("track_*/*"))


@pytest.fixture
def run(checkout, readers_files, env, request, monkeypatch, capsys):  # noqa: F811
    """A function that runs a command in `checkout`, in this process, and returns its exit code and output."""

    def lay_out(command: str) -> None:
        """What takes seconds to make, or a copy, where the command reads it."""
        if re.search(r"runs/(A\b|NAME|<RUN_ID>)", command):
            for name, seed in (("A", "7"), ("B", "42"), ("C", "1337"), ("NAME", "7")):
                shutil.copytree(request.getfixturevalue("made") / seed, checkout / "runs" / name)
        if "records/TRACK" in command or "--against FOLDER" in command:
            for name in (f"records/{RECORD}", "OTHER_FOLDER"):
                shutil.copytree(request.getfixturevalue("record"), checkout / name)
        if "submit.py" in command:
            leave_out_the_scan(monkeypatch)
        if "--overlap FOLDER" in command:
            shutil.copytree(checkout / "DIR", checkout / "FOLDER")
        if "--prepare" in command:
            request.getfixturevalue("wheels")
        if "download.py" in command:
            files = request.getfixturevalue("hub").files
            name = re.search(r"--repo (\S+)", command)
            monkeypatch.setattr("test_download.REPO", name[1] if name else "willdepueoai/parameter-golf")
            for folder in (FOLDER, FOLDER.replace("1024", "8192")):
                names = ["fineweb_val_000000.bin", *(f"fineweb_train_{index:06d}.bin" for index in range(80))]
                files.update((f"{folder}/{name}", shard(1, 20)) for name in names)

    def run(command: str, case: Case) -> tuple[int, str]:
        lay_out(command)
        for options in re.findall(r"torchrun((?: --[^\s\"]+)+)", command):
            get_args_parser().parse_args([*options.split(), "program.py"])
        for old, new in case.swap.items():
            command = command.replace(old, new)
        command = re.sub(r"\btorchrun (--\S+ )+(?=\S+\.py)", "python ", command)
        words = shlex.split(f"{command} {case.more}")
        if "make" in words:
            made_by = ["make", "-n", *words[words.index("make") + 1 :]]
            done = subprocess.run(made_by, cwd=checkout, capture_output=True, text=True)
            return done.returncode, done.stdout + done.stderr
        program = words.index("python") + 1
        own = dict(word.split("=", 1) for word in words[: program - 1])
        if unknown := own.keys() - {"RECIPE", *(each.name.upper() for each in fields(Config))}:
            return 2, f"no settings of ours: {unknown}"
        for name, value in {**env, "OMP_NUM_THREADS": "1", **case.settings, **own}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(checkout)
        monkeypatch.setattr(sys, "argv", words[program:])
        monkeypatch.setattr(sys, "path", [str((checkout / words[program]).parent), *sys.path])
        monkeypatch.setitem(sys.modules, "train_gpt", train_gpt)  # a main program takes the name
        try:
            runpy.run_path(words[program], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out + said.err + "".join(page.read_text() for page in checkout.glob("PAGE.md"))

    return run


@pytest.mark.parametrize("command", commands())
def test_command(run, command):
    case = case_of(command)
    code, said = run(command, case)
    assert code == case.code and case.said in said, said


def test_every_case_is_of_a_command():
    assert {case_of(command).pattern for command in commands()} == {case.pattern for case in CASES}


@pytest.mark.parametrize(
    ("program", "right", "wrong"),
    [
        ("prepare.py train/", "--val-input", "--val-inputs"),
        ("sweep.py compare", "--seeds", "--seed-list"),
        ("trainer.py --levers", "--levers", "--lever-all"),  # only parsed
        ("--nproc_per_node=8 train_gpt.py", "--nproc_per_node", "--nprocs"),  # torchrun's own
        ("eval_ttt.py --audit", "--audit", "--audits"),
        ("eval_ttt.py --audit", "MODEL_PATH", "MODEL_PAHT"),
        ("gpu_minutes.py --preflight", "RECIPE", "RECIEP"),
    ],
)
def test_a_wrong_option_is_noticed(run, program, right, wrong):
    command = next(command for command in commands() if program in command)
    case = case_of(command)
    try:
        code, said = run(command.replace(right, wrong, 1), case)
    except SystemExit as stop:
        code, said = stop.code, ""
    assert code == 2 and not (case.code == 2 and case.said in said)
