"""Verdicts of check.py on folders with the shapes of published records, right and wrong ones.

    python tests/test_check_field.py [FOLDER_OF_LOGS]    prints the table of verdicts

Every log line and program here is made up. With FOLDER_OF_LOGS (default: RECORD_LOGS), the table also covers
real logs that are not part of this repository.
"""

import base64
import json
import lzma
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import check
import pytest

RATIO = 0.41052084  # tokens per byte of the sp1024 validation set
SCORES = {7: 1.15861696, 8: 1.15790214, 9: 1.15912377}
CODE, MODEL = 60_000, 15_900_000
PROGRAM = "import torch\n\n\ndef main():\n    print(torch.__version__)\n".ljust(CODE - 1, "#") + "\n"
TOKENIZER = "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./tokenizers/fineweb_1024_bpe.model"
ROUNDTRIP, SLIDING = "final_int6_roundtrip_exact", "final_int6_sliding_window_exact"


def score(label: str, bpb: float, tail: str = "", ratio: float = RATIO) -> str:
    return f"{label} val_loss:{bpb * math.log(2) / ratio:.8f} val_bpb:{bpb:.8f}{tail}"


def head(seed: int, tokens: int = 62_021_632, code: int = CODE) -> list[str]:
    """The lines of a training run up to its sizes."""
    return [
        TOKENIZER,
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        f"val_loader:shards pattern=./datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{tokens}",
        "model_params:26993756",
        "train_batch_tokens:786432 train_seq_len:2048 iterations:20000",
        f"seed:{seed}",
        "step:1/20000 train_loss:6.9300 train_time:90ms step_avg:90.00ms",
        "step:6900/20000 val_loss:1.9400 val_bpb:1.1490 train_time:599900ms step_avg:86.94ms",
        "stopping_early: wallclock_cap train_time:599900ms step:6900/20000",
        f"Code size: {code} bytes",
        f"Serialized model int6+zstd: {MODEL} bytes",
        f"Total submission size int6+zstd: {code + MODEL} bytes",
    ]


def run(seed: int, bpb: float | None = None, more: Iterable[str] = (), code: int = CODE) -> str:
    """A log with its final score, and `more` lines after it."""
    bpb = SCORES[seed] if bpb is None else bpb
    return "\n".join([*head(seed, code=code), score(SLIDING, bpb, " eval_time:76000ms"), *more]) + "\n"


def claims(**changes: Any) -> str:
    """submission.json of the three runs."""
    values = list(SCORES.values())
    found = (
        dict(
            author="A",
            github_id="a",
            name="Test",
            blurb="A test.",
            date="2026-04-01",
            track="10min_16mb",
            val_bpb=round(mean(values), 8),
            val_loss=round(mean(values) * math.log(2) / RATIO, 8),
            val_bpb_std=round(stdev(values), 8),
            seeds=list(SCORES),
            bytes_total=CODE + MODEL,
            seed_results={str(seed): dict(val_bpb=bpb) for seed, bpb in SCORES.items()},
        )
        | changes
    )
    return json.dumps({key: value for key, value in found.items() if value is not None})


def good(**more: str | bytes | None) -> dict[str, str | bytes | None]:
    """Files of a record without a fault; `more` replaces or (None) removes files."""
    logs = {f"train_seed{seed}.log": run(seed) for seed in SCORES}
    return {"README.md": "# Record\n", "submission.json": claims(), "train_gpt.py": PROGRAM} | logs | more


def packed(source: str, size: int = CODE) -> str:
    """A program that unpacks and runs `source`, padded to `size` bytes."""
    text = base64.b85encode(lzma.compress(source.encode())).decode()
    return (
        f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({text!r})))\n".ljust(size - 1, "#")
        + "\n"
    )


def edited(old: str, new: str, seeds: Iterable[int] = SCORES) -> dict[str, str]:
    """The logs of `seeds` with `new` for `old`."""
    assert all(old in run(seed) for seed in seeds)
    return {f"train_seed{seed}.log": run(seed).replace(old, new) for seed in seeds}


def sized(program: str) -> dict[str, str]:
    """A program, and logs that count it."""
    size = len(program.encode())
    logs = {f"train_seed{seed}.log": run(seed, code=size) for seed in SCORES}
    return {"train_gpt.py": program, **logs, "submission.json": claims(bytes_total=size + MODEL)}


class Case(NamedTuple):
    """Files of a folder, and the verdicts on it: exit code, and "STATUS RULE: WORDS" that must be told.

    `never` are words of no verdict. `facts` are values of the first run by name.
    """

    files: dict[str, str | bytes | None]
    code: int = 0
    told: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    facts: dict[str, Any] = {}  # noqa: RUF012


OPTIMIZER_STEP = """
class Muon(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self): pass
def eval_ttt(model, val_tokens, opt, epochs):
    for chunk in val_tokens.split(9):
        with torch.inference_mode():
            total = model.forward_logits(chunk).sum()
        for _ in range(epochs):
            loss = model(chunk); loss.backward(); opt.step()
"""
CALLER_SCORES = """
def learn(model, val_tokens, opt):
    for x in val_tokens.split(9):
        loss = model(x); loss.backward(); opt.step()
def evaluate(model, val_data, opt):
    done = []
    for doc in val_data.docs:
        with torch.no_grad(): total = model.forward_logits(doc).sum()
        done.append(doc)
        if len(done) == 100: learn(model, torch.cat(done), opt)
"""
NEEDS_312 = 'import torch\nkey = {"a": 1}\nprint(f"{key["a"]} {"\\n".join([])}")\n'
ADAPT_IN_MAIN = """
def main():
    val_tokens = load_validation_tokens("fineweb_val_*.bin")
    for epoch in range(30):
        for x in val_tokens.split(9):
            loss = model(x); loss.backward(); opt.step()
    print(eval_val_sliding(model, val_tokens))
"""
DEAD_SLOT = """
def eval_slot(model, val_tokens):
    for window in val_tokens.unfold(0, 64, 64):
        delta = torch.zeros(512, requires_grad=True)
        model(window, delta).backward()
if SLOT_ENABLED:
    eval_slot(model, val_tokens)
"""
INSERTED = score("final_roundtrip_exact sliding", 1.1964).replace(" val_bpb", " sliding val_bpb")
WORSE_LAST = [score("final_ttt", 1.42140000, " eval_time:405000ms")]
SHORT_LINES = [
    "params:26993756 L:10 d:768 ws:8 ga:1 s:{seed}",
    "max_wallclock_seconds=599.0 seed={seed} tokenizer_path=./t/fineweb_1024_bpe.model x=1",
]


def one_line_settings(ratio: float = RATIO) -> dict[str, str]:
    """Logs whose settings stand in one line, with that many tokens per byte."""
    logs = {}
    for seed, bpb in SCORES.items():
        lines = [line.format(seed=seed) for line in SHORT_LINES] + head(seed)[6:]
        logs[f"train_seed{seed}.log"] = "\n".join([*lines, score(SLIDING, bpb, ratio=ratio)]) + "\n"
    return logs


def evaluated(tail: str) -> dict[str, str]:
    return {f"train_seed{s}.log": run(s).replace(" eval_time:76000ms", tail) for s in SCORES}


def single(text: str, **changes: Any) -> dict[str, str | bytes | None]:
    """A record of one log in the other track."""
    own = dict(track="non_record_16mb", seeds=None, seed_results=None, val_bpb_std=None) | changes
    return good(**{f"train_seed{s}.log": None for s in SCORES}) | {
        "train.log": text,
        "submission.json": claims(**(dict(val_bpb=SCORES[7], val_loss=None) | own)),
    }


def experiments() -> dict[str, str | bytes | None]:
    """A study: two runs of the claimed setting, and four of others."""
    logs = {}
    for number, (length, seed, bpb) in enumerate(
        (
            (1024, 7, 1.21),
            (1024, 8, 1.22),
            (32768, 7, 1.471),
            (32768, 8, 1.4708),
            (4096, 7, 1.3),
            (4096, 8, 1.31),
        )
    ):
        logs[f"run{number}.log"] = run(seed, bpb).replace("train_seq_len:2048", f"train_seq_len:{length}")
    return single("", val_bpb=1.4709) | {"train.log": None} | logs


TWO_RUNS = run(7) + "\n".join(
    [*head(7)[2:6], "step:10/20000 train_loss:3.0 train_time:60000ms step_avg:6000.00ms\n"]
)
BYTE_MODEL = [line for line in head(8) if not line.startswith(("val_bpb:", "val_loader"))]
BYTE_LOG = "\n".join([*BYTE_MODEL, score(SLIDING, 1.21, ratio=1.0)]) + "\n"
UNCOUNTED = "import torch\nimport ngram_tilt\n" + NEEDS_312
UNLABELED = {
    f"train_seed{s}.log": run(s).replace(" int6+zstd", "").replace(f"{CODE + MODEL}", "16580000")
    for s in SCORES
}
TWO_SIZES = f"Code size (uncompressed): {{}} bytes\nCode size (compressed): {CODE} bytes"
SHARDS = "dataset:fineweb10B_sp1024 train_shards:80"
RULER = "=" * 100
PRINTED = "import torch\n" + "".join(f"if x:\n    y = {i}\n" for i in range(30))


def printing(**sources: str) -> dict[str, str]:
    """Logs that print a program first."""
    return {
        f"train_seed{s}.log": f"{source}{RULER}\nRunning\n{RULER}\n{run(s)}"
        for s, source in zip(SCORES, sources.values(), strict=True)
    }


def mean_off(**changes: Any) -> dict[str, str | bytes | None]:
    return good(**{"submission.json": claims(**changes)})


M = mean(SCORES.values())
CASES: dict[str, Case] = {
    "honest record": Case(good()),
    "F1 legal code, an optimizer's step under no_grad": Case(good(**sized(OPTIMIZER_STEP))),
    "F2 legal code, the caller has scored": Case(good(**sized(CALLER_SCORES))),
    "F3 packed program of Python 3.12": Case(
        good(**{"train_gpt.py": packed(NEEDS_312)}), never=("cannot be read", "does not compile")
    ),
    "F3 program of Python 3.12": Case(good(**sized(NEEDS_312)), never=("does not compile",)),
    "F4 a worse evaluation follows": Case(
        good(**{f"train_seed{s}.log": run(s, more=WORSE_LAST) for s in SCORES}),
        facts=dict(val_bpb=SCORES[7], eval_seconds=76.0),
    ),
    "F4 the same without claims by seed": Case(
        good(**{f"train_seed{s}.log": run(s, more=WORSE_LAST) for s in SCORES})
        | {"submission.json": claims(seed_results=None)},
        facts=dict(val_bpb=SCORES[7], eval_seconds=76.0),
    ),
    "F5 sliding between label and loss": Case(
        single(
            "\n".join([*head(7), score("final_roundtrip_exact", 1.2141), INSERTED]) + "\n", val_bpb=1.1964
        ),
        facts=dict(val_bpb=1.1964),
    ),
    "F5 sliding_val_bpb is wrong": Case(
        single(
            "\n".join([*head(7), score("final_roundtrip_exact", 1.2141), INSERTED]) + "\n",
            val_bpb=1.2141,
            sliding_val_bpb=1.1864,
        ),
        1,
        ("fail claims: sliding_val_bpb",),
    ),
    "F6 originals and reruns": Case(
        good(**{f"rerun_seed{s}.log": run(s, bpb + 0.01) for s, bpb in SCORES.items()}),
        told=("warn seeds: rerun_seed7.log",),
    ),
    "F6 a study": Case(experiments(), told=("warn seeds: run0.log",)),
    "F6 a byte model beside another": Case(
        single(run(7), val_bpb=SCORES[7]) | {"bytes.log": BYTE_LOG}, never=("0 bytes",)
    ),
    "F6 a summary among the logs": Case(good(**{"summary.log": "three runs, all done\nmean 1.1585\n"})),
    "F6 the shipped program under another name": Case(
        good(**{"train_gpt.py": "import torch\n", "train_gpt_gdn.py": PROGRAM})
    ),
    "F7 settings in printed source": Case(
        {
            **good(),
            **{
                f"train_seed{s}.log": f"    smear=args.smear, res={s},\n    x=f({s})\n  depth: {s} layers\n"
                + run(s)
                for s in SCORES
            },
        }
    ),
    "F8 settings in one line": Case(
        good(**one_line_settings()), facts=dict(seed=7, tokenizer="./t/fineweb_1024_bpe.model")
    ),
    "F9 time after other words": Case(
        good(**evaluated(" stride:64 eval_seq_len:2048 eval_time:356614ms")), facts=dict(eval_seconds=356.614)
    ),
    "F9 time after brackets, over 600 s": Case(
        good(**evaluated(" (stride=16, T=0.90) eval_time:768782ms")), 1, ("fail eval time: 768.8 s",)
    ),
    "F9 time after a mode": Case(
        good(**evaluated(" eval_mode:online_ttt eval_time:580248ms")), facts=dict(eval_seconds=580.248)
    ),
    "F9 time without eval, over 600 s": Case(
        good(**evaluated(" (stride=16) time:1762005ms")), 1, ("fail eval time: 1762.0 s",)
    ),
    "F10 a second run without a score": Case(
        single(TWO_RUNS, val_bpb=None, val_loss=None), 1, ("fail log: no line with a final score",)
    ),
    "F10 two runs, the claimed is the first": Case(
        single(TWO_RUNS), told=("warn seeds: train.log",), facts=dict(steps=6900, train_seconds=599.9)
    ),
    "F10 an evaluator after a trainer that evaluated": Case(
        good(
            **{
                f"eval_seed{s}.log": f"seed:{s}\n{score(SLIDING, b, ' eval_time:560000ms')}\n"
                for s, b in SCORES.items()
            }
        ),
        never=("over 600 s",),
    ),
    "F11 a mean off by a digit": Case(
        mean_off(val_bpb=math.floor(1e5 * M) / 1e5), told=("off claims: val_bpb",)
    ),
    "F11 milliseconds rounded": Case(
        mean_off(seed_results={"7": dict(val_bpb=SCORES[7], train_time_ms=600000)}),
        told=("off claims: 600000",),
    ),
    "F11 a deviation off by a digit": Case(
        mean_off(val_bpb_std=round(stdev(SCORES.values()) + 1e-6, 6)), told=("off claims: val_bpb_std",)
    ),
    "F11 a seed that only its log's name tells": Case(
        good(**{"train_seed7.log": run(7).replace("seed:7\n", "")}), facts=dict(seed=7)
    ),
    "F12 a total without a label": Case(
        good(**UNLABELED, **{"submission.json": claims(bytes_total=16580000)}),
        1,
        ("fail sizes: Total submission size: 16580000",),
        ("RESULT",),
    ),
    "F12 a name's seed and no other": Case(
        good(**{"train_seed7.log": run(7).replace("seed:7\n", "")}), never=("RESULT seed",)
    ),
    "F13 a dead path of SLOT": Case(good(**sized(DEAD_SLOT))),
    "F13 a space in printed source": Case(
        good(**printing(a=PRINTED, b=PRINTED.replace("    y = 9\n", "     y = 9\n"), c=PRINTED)),
        told=("off code: only in blanks",),
    ),
    "other source printed": Case(
        good(**printing(a=PRINTED, b=PRINTED + "z = 1\n", c=PRINTED)), 1, ("fail code: printed in the logs",)
    ),
    "M1 over the cap with a module and its kernel": Case(
        good(
            **{
                "train_gpt.py": packed(UNCOUNTED),
                "ngram_tilt.py": "open('fused.cpp')\n".ljust(25_000, "#"),
                "fused.cpp": "//".ljust(20_000),
            }
        ),
        1,
        ("fail sizes: fused.cpp", "fail sizes: ngram_tilt.py"),
    ),
    "M2 bytes of an unpublished export": Case(
        good(
            **{
                f"train_seed{s}.log": "\n".join(
                    [
                        "val_loader:shards pattern=fineweb_val_*.bin tokens:62363648",
                        *head(s)[3:],
                        score(SLIDING, b, ratio=0.34114),
                    ]
                )
                + "\n"
                for s, b in SCORES.items()
            }
        )
        | {"submission.json": claims(val_loss=None)},
        1,
        ("fail bytes: 182,8",),
    ),
    "M3 adapts first in main": Case(good(**sized(ADAPT_IN_MAIN)), told=("note syntax tree: train_gpt.py:6",)),
    "M4 n-gram keys of the target": Case(
        good(**sized("h ^= targets * primes[3]\nk = h ^ (tokens[pos] * primes[3])\n")),
        told=("note syntax tree: train_gpt.py:1", "note syntax tree: train_gpt.py:2"),
    ),
    "M5 other code than ran, packed": Case(
        good(
            **{
                f"train_seed{s}.log": run(s).replace(f"Code size: {CODE} bytes", TWO_SIZES.format(146673))
                for s in SCORES
            },
            **{"train_gpt.py": "#".ljust(148031, "#") + "\n"},
        ),
        1,
        ("fail code: 148032",),
    ),
    "M5 three bytes, packed": Case(
        good(
            **{
                f"train_seed{s}.log": run(s).replace(f"Code size: {CODE} bytes", TWO_SIZES.format(125670))
                for s in SCORES
            },
            **{"train_gpt.py": "#".ljust(125672, "#") + "\n"},
        ),
        told=("off code: 125673",),
    ),
    "M7 one shard of training text": Case(
        good(**edited(SHARDS, "dataset:fineweb10B_sp1024_valonly train_shards:1")),
        told=("warn validation set: valonly",),
    ),
    "M8 an empty program": Case(good(**{"train_gpt.py": ""}), 1, ("fail files: train_gpt.py is empty",)),
    "M9 a part of the text, by its ratio": Case(
        good(**one_line_settings(0.38627), **{"submission.json": claims(val_loss=None)}),
        1,
        ("fail bytes: 0.38627",),
    ),
    "M10 size of code": Case(mean_off(code_bytes=50651), 1, ("fail claims: code_bytes",)),
    "M10 size of the model": Case(mean_off(bytes_model_int8_zlib=15827986), 1, ("fail claims: bytes_model",)),
    "M10 parameters": Case(mean_off(model_params=26501720), 1, ("fail claims: model_params",)),
    "M10 milliseconds": Case(mean_off(ms_per_step=121.54), 1, ("fail claims: ms_per_step",)),
    "M10 mean": Case(mean_off(mean_val_bpb=1.1), 1, ("fail claims: mean_val_bpb",)),
    "M11 calibration in other words": Case(
        good(**edited("Code size", "gptq:calibrated 66 layers in 6.7s\nCode size")),
        told=("warn train time: 606.6 s with calibration",),
    ),
    "M11 Hessians in other words": Case(
        good(**edited("Code size", "gptq:collected hessians for 33 layers in 199.6s\nCode size")),
        told=("warn train time: 799.5 s with calibration",),
    ),
    "M12 adapts under another label": Case(
        good(**evaluated(" eval_mode:online_ttt eval_time:80248ms")), told=("warn legality: no certificate",)
    ),
    "a loss that is not printed": Case(
        single("\n".join([*head(7), f"sliding_window_eval val_bpb:{SCORES[7]}"]) + "\n", val_loss=None),
        told=("warn bytes: no loss",),
        facts=dict(val_bpb=SCORES[7]),
    ),
    "short names of a score": Case(
        single("\n".join([*head(7), "ttt_x vl:2.8200 bpb:1.0020"]) + "\n", val_bpb=1.002, val_loss=None),
        1,
        ("fail bytes: tokens per byte",),
        facts=dict(val_bpb=1.002),
    ),
    "a score in capitals": Case(
        single("\n".join([*head(7), "Quantized BPB: 1.0268"]) + "\n", val_bpb=1.0268, val_loss=None),
        facts=dict(val_bpb=1.0268),
    ),
    "the only score is a diagnostic": Case(
        single("\n".join([*head(7), score("diagnostic quantized", SCORES[7])]) + "\n", val_loss=None),
        facts=dict(val_bpb=SCORES[7]),
    ),
    "the first baseline's export": Case(
        single(
            "\n".join([*head(7, tokens=63_779_840), score(SLIDING, 1.2244, ratio=0.409453)]) + "\n",
            val_bpb=1.2244,
            val_loss=None,
        ),
        told=("warn validation set: not comparable",),
    ),
    "no submission.json is one fault": Case(
        good(**{"submission.json": None}), 1, ("fail files: submission.json",), ("github_id",)
    ),
    "submission.json under another name": Case(
        good(**{"submission.json": None, "submission_jepa.json": claims(val_bpb=1.0)}),
        1,
        ("fail files: submission_jepa.json is read", "fail claims: val_bpb"),
    ),
    "rulers in a log that prints no program": Case(
        good(**{f"train_seed{s}.log": f"from scratch\n{run(s)}" + "x\n" * 60 + RULER + "\n" for s in SCORES})
    ),
    "a folder of folders": Case({"a/submission.json": "{}", "b/train_gpt.py": ""}, 2),
    "a folder of nothing": Case({}, 2),
}
LOGS: dict[str, tuple[str | bytes, int]] = {  # files given as a log, exit code
    "a log": (run(7), 0),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), 2),
    "submission.json": (claims(), 2),
    "text": ("three runs, all done\n", 2),
    "nothing": ("", 2),
    "UTF-16 with its mark": (run(7).encode("utf-16"), 0),
    "UTF-16 without": (run(7).encode("utf-16-le"), 0),
    "UTF-8 with its mark": (run(7).encode("utf-8-sig"), 0),
    "colors": ("".join(f"\x1b[32m{line}\x1b[0m\n" for line in run(7).splitlines()), 0),
    "Windows": (run(7).replace("\n", "\r\n"), 0),
    "a path with blanks and brackets": (run(7).replace("./datasets", "/my data/[v2]"), 0),
}


def write(folder: Path, files: dict[str, str | bytes | None]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def judged(path: Path) -> tuple[int, list[tuple[str, str, str]], dict[str, Any]]:
    """Return check.py's exit code on a path, its verdicts, and the first run's facts."""
    try:
        record = check.read_record(path)
        verdicts = check.check(record)
    except ValueError:
        return 2, [], {}
    failed = check.status_of(verdicts) == "fail"
    first = min(record.runs, key=lambda each: each.seed or 0, default=None)
    names = ("seed", "tokenizer", "val_bpb", "eval_seconds", "steps", "train_seconds", "val_tokens")
    return int(failed), [tuple(v) for v in verdicts], {name: getattr(first, name, None) for name in names}


def wrong(case: Case, folder: Path) -> list[str]:
    """Return how the verdicts on a case differ from the right ones."""
    code, verdicts, facts = judged(folder)
    faults = [f"{rule}: {told}" for rule, status, told in verdicts if status == "fail"]
    found = [f"exit code {code} instead of {case.code}: {faults}"] if code != case.code else []
    for each in case.told:
        (status, rule), words = each.partition(": ")[0].split(" ", 1), each.partition(": ")[2]
        if not any(v[:2] == (rule, status) and words in v[2] for v in verdicts):
            found.append(f"not told: {each}")
    told = [text for _, status, text in verdicts if status != "pass"]
    found += [f"{words!r} in {text!r}" for words in case.never for text in told if words in text]
    found += [
        f"{name} is {facts.get(name)}, not {value}"
        for name, value in case.facts.items()
        if facts.get(name) != value
        and not (isinstance(value, float) and facts.get(name) and math.isclose(facts[name], value))
    ]
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_verdicts_on_a_folder(tmp_path, name):
    assert not wrong(CASES[name], write(tmp_path / "2026-04-01_Name", CASES[name].files))


@pytest.mark.parametrize("name", LOGS)
def test_the_verdicts_on_a_log(tmp_path, name):
    text, code = LOGS[name]
    path = write(tmp_path / "logs", {"x.log": text}) / "x.log"
    found, _, facts = judged(path)
    assert found == code and (code or (facts["val_bpb"], facts["val_tokens"]) == (SCORES[7], 62_021_632))


def log_faults(path: Path, code: int) -> list[str]:
    """Return how the verdict on a log differs from the right one."""
    found, _, facts = judged(path)
    if found != code:
        return [f"exit code {found} instead of {code}"]
    return ["val_bpb or val_tokens is not read"] * (
        not code and None in (facts["val_bpb"], facts["val_tokens"])
    )


def guarded(function: Callable[..., list[str]], *arguments: Any) -> list[str]:
    try:
        return function(*arguments)
    except Exception as error:  # the table is also made of versions that raise
        return [f"{type(error).__name__}: {error}"]


def table(logs: Path) -> list[tuple[str, list[str]]]:
    """Return the name of every case, and of every log below a folder, and what is wrong in its verdict."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for number, (name, case) in enumerate(CASES.items()):
            folder = write(Path(place, f"{number}/2026-04-01_Name"), case.files)
            rows.append((name, guarded(wrong, case, folder)))
        for number, (name, (text, code)) in enumerate(LOGS.items()):
            path = write(Path(place, f"log{number}"), {"x.log": text}) / "x.log"
            rows.append((f"log: {name}", guarded(log_faults, path, code)))
    rows += [
        (f"real: {path.parent.name[:20]} {path.name}", guarded(log_faults, path, 0))
        for path in sorted(logs.glob("*/*.log"))
    ]
    return rows


if __name__ == "__main__":
    rows = table(Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("RECORD_LOGS", "nowhere")))
    for name, faults in rows:
        print(f"{'WRONG' if faults else 'right':6} {name:55} {'; '.join(faults)[:150]}")
    print(f"{sum(not faults for _, faults in rows)} right, {sum(bool(faults) for _, faults in rows)} wrong")
