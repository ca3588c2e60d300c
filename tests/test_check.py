"""The record checker: real logs of the field, a good record with planted faults, statistics, code shapes."""

import base64
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
from decimal import Decimal
from pathlib import Path
from statistics import mean, stdev

import check
import evidence
import numpy as np
import pytest
import torch
from conftest import ROOT
from formats import PUBLISHED, SIZE_CAP, shard_header

import train_gpt

LOGS = Path(os.environ.get("RECORD_LOGS", ROOT.parent / "shared" / "record_logs"))
real_logs = pytest.mark.skipif(not LOGS.exists(), reason="the field's logs are not beside this checkout")


# ------------------------------------------------------------------------------------------------------------
# Real logs: the table was typed from the logs by hand
# ------------------------------------------------------------------------------------------------------------

FACTS = {"seed": int, "steps": int, "step_avg_ms": float, "train_seconds": float, "eval_seconds": float,
         "bytes_code": int, "bytes_model": int, "bytes_total": int, "val_loss": float,
         "val_bpb": float}  # fmt: skip
REAL_TABLE = """
03-17 1337 13780  43.54 600.038   1.401  47642 15815847 15863489 2.07269931 1.22436570 {int8}
03-18 1338 11575  51.84 600.043   1.638  47716 15813523 15861239 2.03657529 1.20617460 {int8}
03-20   42  7385  81.26 600.099 154.937  52243 15865061 15917304 1.93591485 1.14656085 {int8}
03-22   42  7103  84.48 600.059  73.133  67603 15473072 15540675 1.89715168 1.12360306 {int6}
03-23 1337  7179  83.59 600.128 410.268  89458 15887928 15977386 1.88976776 1.11922988 legal_ttt_exact
03-23 2025  7193  83.43 600.110 407.984  89458 15900548 15990006 1.88919190 1.11888882 legal_ttt_exact
03-23   42  7182  83.56 600.128 408.049  89458 15787052 15876510 1.89110239 1.12002032 legal_ttt_exact
03-25  314  6927  86.63 600.109 105.090 101850 15761428 15863278 1.88276292 1.11508120 {int6}
03-25   42  6922  86.69 600.058  77.178 101850 15883000 15984850 1.88156874 1.11437394 {int6}
03-25  999  6917  86.76 600.137  77.150 101850 15774460 15876310 1.88220393 1.11475014 {int6}
04-03    0  5535 106.61 590.081  75.826  21396 15940846 15962242 2.50973163 1.09084142 final_int6_{window}
04-05    1  4988 117.91 588.138  83.990  15516 15972031 15987547 2.80405024 1.08553523 quantized_{window}
04-06   42  5082 115.71 588.015 289.945  16719 15975827 15992546 2.79788378 1.08314800 legal_ttt_exact
04-14   42  4971 119.93 596.148 329.031  27610 15905287 15932897 2.77115720 1.07280131 quantized_ttt_phased
04-27   42  4945 121.25 599.592 508.785  31999 15865260 15897259 2.31944212 1.05989454 quantized_ttt_phased
"""
LABELS = dict(
    int8="final_int8_zlib_roundtrip_exact", int6="final_int6_sliding_window_exact", window="sliding_window"
)
REAL = {tuple(row.split()[:2]): row.split()[1:] for row in REAL_TABLE.format(**LABELS).strip().splitlines()}
REAL_DATA = {  # validation tokens, training shards
    "03-17": (63779840, 25), "04-03": (45514752, 143), "04-05": (40540160, 128), "04-06": (40540160, 80),
    "04-14": (40540160, 80), "04-27": (47851520, 80),
}  # fmt: skip
# Their own keys, in this module's names;
# #1413's 588,009 ms against its log's 588,015 is why times have 50 ms of slack.
THEIR_KEYS = {"artifact_bytes": ("bytes_total", 1), "bytes_total": ("bytes_total", 1), "steps": ("steps", 1),
              "step_avg_ms": ("step_avg_ms", 1), "eval_time_s": ("eval_seconds", 1),
              "val_bpb": ("val_bpb", 1), "val_loss": ("val_loss", 1),
              "train_time_ms": ("train_seconds", 1000),
              "ttt_time_ms": ("eval_seconds", 1000)}  # fmt: skip


def real(date: str, seed: int | str = 42) -> Path:
    folder = next(LOGS.glob(f"2026-{date}*"))
    return folder / ("train.log" if date == "03-17" else f"train_seed{seed}.log")


def name_of(key: tuple[str, str]) -> str:
    return "seed".join(key)


@real_logs
@pytest.mark.parametrize("key", REAL, ids=name_of)
def test_a_real_log(key):
    *values, label = REAL[key]
    facts = check.read_log(real(*key))
    assert facts.headline.label == label and not facts.conflicts
    derived = [getattr(facts, fact) for fact in FACTS]
    expected = [kind(value) for kind, value in zip(FACTS.values(), values, strict=True)]
    assert [round(v, 2) if f == "step_avg_ms" else v for v, f in zip(derived, FACTS, strict=True)] == expected
    assert (facts.val_tokens, facts.train_shards) == REAL_DATA.get(key[0], (62021632, 80))
    statuses = {(v.rule, v.status) for v in check.check(check.read_record(real(*key)))}
    assert not [rule for rule, status in statuses if status == "fail"]
    assert (("train time", "warn") in statuses) == (facts.train_seconds > 600 or key[0] == "04-27")


@real_logs
def test_the_real_logs_are_all_in_the_table():
    assert {real(*key) for key in REAL} == set(LOGS.glob("*/*.log"))


@real_logs
@pytest.mark.parametrize(
    "key", [k for k in REAL if k[0] in ("03-20", "03-25", "04-05", "04-06", "04-14", "04-27")], ids=name_of
)
def test_a_real_log_is_what_its_submission_claims(key):
    claims = json.loads((real(*key).parent / "submission.json").read_text(), parse_float=Decimal)
    entries, facts = claims.get("seed_results", claims["seeds"]), check.read_log(real(*key))
    for name, claim in entries[str(facts.seed)].items():
        fact, factor = THEIR_KEYS[name]
        step = 100 if factor == 1000 else 10.0 ** Decimal(claim).as_tuple().exponent
        assert abs(float(claim) - factor * getattr(facts, fact)) <= 0.501 * step, name


@real_logs
def test_aliases_of_real_logs():
    alias = {"final_int8_zlib_roundtrip_exact": "final_int6_sliding_window_exact"}
    assert [check.read_log(real(f"03-{day}")).aliases for day in (20, 22, 23, 25)] == [
        {}, alias, alias, alias]  # fmt: skip


@real_logs
def test_strict_clocks_of_the_last_record():
    record = check.read_record(real("04-27"))
    assert record.runs[0].eval_all_seconds == pytest.approx(49.995 + 508.785 + 137.6)
    found = {v.rule: v for v in check.check(record)}
    assert found["eval time"].status == "warn" and "696.4" in found["eval time"].evidence
    assert "604.3 s with calibration" in found["train time"].evidence


# ------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------

PR549, PR1019 = (1.11922988, 1.12002032, 1.11888882), (1.11508120, 1.11437394, 1.11475014)


def test_welch_is_the_published_one():
    test = check.welch(PR1019, PR549)
    assert (round(test.t, 2), round(test.df, 2)) == (-11.83, 3.31) and test.p < 0.001


def test_tests_against_their_formulas():
    new, old = np.array(PR1019), np.array(PR549)
    a, b = new.var(ddof=1) / 3, old.var(ddof=1) / 3
    test = check.welch(new, old)
    assert test.t == pytest.approx((new.mean() - old.mean()) / math.sqrt(a + b))
    assert test.df == pytest.approx((a + b) ** 2 / (a**2 / 2 + b**2 / 2))
    one = check.one_sample(PR1019, 1.115)
    assert one.t == pytest.approx((new.mean() - 1.115) / math.sqrt(a)) and one.df == 2
    # Student's with two degrees of freedom
    assert one.p == pytest.approx(0.5 * (1 + one.t / math.sqrt(one.t**2 + 2)))
    difference = np.array([-0.3, -0.1, -0.2])
    pairs = check.paired({1: 0.7, 2: 0.9, 3: 0.8, 9: 5.0}, {3: 1.0, 2: 1.0, 1: 1.0})
    assert (
        pairs.t == pytest.approx(difference.mean() / difference.std(ddof=1) * math.sqrt(3)) and pairs.df == 2
    )
    assert check.welch(old, new).p > 0.99


@real_logs
def test_a_published_claim_of_significance_is_recomputed(capsys):
    paths = [str(next(LOGS.glob(f"2026-03-{day}*"))) for day in (25, 23)]
    check.main([paths[0], "--against", paths[1], "--json"])
    (record,) = json.loads(capsys.readouterr().out)
    (verdict,) = [v for v in record["verdicts"] if v["rule"] == "significance"]
    assert verdict["status"] == "pass" and "Welch t=-11.83 df=3.31 p=0.0004" in verdict["evidence"]
    assert "0.00784 nats = 0.00464 bpb better than" in verdict["evidence"]
    check.main([paths[1], "--against", paths[0], "--json"])
    text = capsys.readouterr().out
    assert '"rule": "significance",\n    "status": "fail"' in text
    assert "0.00784 nats = 0.00464 bpb worse than" in text and "Welch t=11.83" in text


# ------------------------------------------------------------------------------------------------------------
# A good record, and faults planted in copies of it
# ------------------------------------------------------------------------------------------------------------

RATIO = 0.41052084  # tokens per byte of the sp1024 validation set
TARGETS, MODEL = PUBLISHED[0].tokens - 1, "final_model.int6.ptz"
SCORES = {42: (1.1386, 1.1151, 1.1088), 1337: (1.1380, 1.1145, 1.1082), 2025: (1.1391, 1.1155, 1.1094)}
TRAINER = b'"""The trainer."""\nimport torch\n\n\ndef main():\n    print(torch.__version__)\n'
EVALUATOR = b'"""The evaluator."""\nimport train_gpt\n\n\ndef main():\n    train_gpt.main()\n'


def sha(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def artifact(seed: int) -> bytes:
    codes, steps = torch.zeros(8, 8, dtype=torch.int8), torch.zeros(8, 1, dtype=torch.int8)
    records = [
        train_gpt.QuantizedTensor("tok_emb.weight", codes, steps),
        train_gpt.QuantizedTensor("gate", torch.tensor([seed]).half()),
    ]
    return train_gpt.encode_artifact(train_gpt.Config(), records, sha(b"tokenizer"))


def scored(label: str, bpb: float, tail: str = "") -> str:
    return f"{label}_exact val_loss:{bpb * math.log(2) / RATIO:.8f} val_bpb:{bpb:.8f}{tail}"


def results(seed: int) -> tuple[dict, dict]:
    """RESULT of trainer and evaluator, with the keys and the arithmetic of train_gpt.py and eval_ttt.py."""
    names, blob = ("roundtrip", "sliding", "ttt"), artifact(seed)
    values = {f"val_bpb_{n}": b for n, b in zip(names, SCORES[seed], strict=True)}
    values |= {key.replace("bpb", "loss"): bpb * math.log(2) / RATIO for key, bpb in values.items()}
    common = dict(bytes_code=len(TRAINER + EVALUATOR), bytes_model=len(blob), fits=True, world_size=8,
                  legal=True, bytes_total=len(TRAINER + EVALUATOR + blob), sha256_artifact=sha(blob),
                  sha256_code={"train_gpt.py": sha(TRAINER), "eval_ttt.py": sha(EVALUATOR)})  # fmt: skip
    trainer = common | {k: v for k, v in values.items() if "ttt" not in k}
    trainer |= dict(eval_seconds=80.5, train_seconds=598.25, strict_seconds=720.5, steps=6900,
                    step_avg_ms=86.5, tokens_per_second=9.1e6, model_params=27067484, seed=seed)  # fmt: skip
    evaluator = common | values | dict(
        sha256_tokenizer=sha(b"tokenizer"), sha256_shards={"fineweb_val_000000.bin": sha(b"shard")},
        sha256_nll=sha(b"nll %d" % seed),
        settings=dict(ttt_mode="banks", ttt_lr=0.001, audit_tokens=8192))  # fmt: skip
    evaluator |= dict(eval_seconds=412.75, strict_seconds=500.5, ttt_gain_bpb=0.0063, seed=1337,
                      fits_budget=True, trainer=trainer)  # fmt: skip
    return trainer, evaluator


def train_log(seed: int) -> str:
    trainer, _ = results(seed)
    roundtrip, sliding, _ = SCORES[seed]
    return "\n".join([
        "python:3.11.7 torch:2.13.0 cuda:12.8 gpu:H100",
        f"  RUN_ID=record_seed{seed} (given)",
        f"  SEED={seed} (given)",
        "  MATRIX_LR=0.025",
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=data/tokenizers/fineweb_1024_bpe.model",
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        "model_params:27067484",
        "world_size:8 grad_accum_steps:1",
        f"seed:{seed}",
        "gptq:reserving 3.20s",
        "step:1/20000 train_loss:6.9300 train_time:90ms step_avg:90.00ms",
        "step:6900/20000 train_loss:1.9000 train_time:596850ms step_avg:86.50ms",
        "stopping_early: wallclock_cap train_time:596850ms step:6900/20000",
        f"Code size: {trainer['bytes_code']} bytes",
        f"Serialized model int6+zstd: {trainer['bytes_model']} bytes",
        f"Total submission size int6+zstd: {trainer['bytes_total']} bytes",
        scored("final_int6_roundtrip", roundtrip),
        scored("final_int6_sliding_window", sliding),
        "clocks: contest 598.2s strict 720.5s",
        "RESULT " + json.dumps(trainer),
    ])  # fmt: skip


def eval_log(seed: int) -> str:
    roundtrip, sliding, adapted = SCORES[seed]
    return "\n".join([
        "  TTT_MODE=banks (given)",
        f"evaluation order: the file's; targets:{TARGETS} world_size:8",
        "chunk:1/1893 running_bpb:1.1177",
        scored("final_int6_roundtrip", roundtrip, " time:6.1s"),
        scored("final_int6_sliding_window", sliding, " time:74.0s"),
        scored("same_plan_without_ttt", sliding, " time:74.0s"),
        scored("legal_ttt", adapted, " time:409.1s"),
        "RESULT " + json.dumps(results(seed)[1]),
    ])  # fmt: skip


ESSENTIAL = ("T1", "T2", "T3", "T4")  # checks of an audit


def certificate_json(seed: int) -> dict:
    """What eval_ttt.py --audit writes, with the hashes and settings of the evaluation."""
    _, result = results(seed)
    hashes = {"artifact": result["sha256_artifact"], "tokenizer": result["sha256_tokenizer"],
              "nll.npy": result["sha256_nll"], **result["sha256_code"],
              **result["sha256_shards"]}  # fmt: skip
    checks = [
        *(dict(name=f"{name} some words", ok=True, checked=20456, detail="0 changed") for name in ESSENTIAL),
        dict(name="T10 no sign of memory", ok=None, checked=8192, detail="gap 0.0239 nats"),
    ]
    return dict(legal=True, targets=8192, not_audited=[], checks=checks, sha256=hashes,
                settings=result["settings"] | dict(seed=seed, audit_tokens=4096),
                audited_settings={})  # fmt: skip


def certificate(blob: bytes) -> str:
    return "\n".join([
        "certificate of final_model.int6.ptz on the first 8192 targets, TTT_MODE=banks TTT_PROTOCOL=legal: "
        "legal",
        "  pass  T1 later tokens change no earlier loss        0 of 20456 losses changed (20456 checked)",
        "  none  T10 no sign of memory                         gap 0.0239 nats (8192 checked)",
        f"  sha256 artifact {sha(blob)}",
        f"  sha256 train_gpt.py {sha(TRAINER)}",
        f"  sha256 eval_ttt.py {sha(EVALUATOR)}",
        "  22.9s",
    ])  # fmt: skip


def good_files() -> dict[str, bytes]:
    adapted = [row[2] for row in SCORES.values()]
    sizes = [results(seed)[0]["bytes_total"] for seed in SCORES]
    losses = [bpb * math.log(2) / RATIO for bpb in adapted]
    entries = {
        str(seed): dict(val_bpb=round(bpb, 8), val_loss=round(loss, 8), artifact_bytes=size, steps=6900,
                        step_avg_ms=86.5, train_time_s=598.2, eval_time_s=412.8)
        for seed, bpb, loss, size in zip(SCORES, adapted, losses, sizes, strict=True)
    }  # fmt: skip
    claims = dict(
        author="A", github_id="a", name="Test", blurb="A test.", date="2026-12-01", track="10min_16mb",
        val_bpb=round(mean(adapted), 8), val_loss=round(mean(losses), 8),
        val_bpb_std=round(stdev(adapted), 6), seeds=list(SCORES), seed_results=entries,
        bytes_total=max(sizes), bytes_code=len(TRAINER + EVALUATOR),
    )  # fmt: skip
    readme = f"# Record\n\n**{mean(adapted):.6f} BPB / {mean(losses):.6f} nats**, three seeds.\n"
    texts = {
        "README.md": readme,
        "submission.json": json.dumps(claims, indent=1),
        **{f"certificate_seed{seed}.txt": certificate(artifact(seed)) for seed in SCORES},
        **{f"certificate_seed{seed}.json": json.dumps(certificate_json(seed)) for seed in SCORES},
        **{f"train_seed{seed}.log": train_log(seed) for seed in SCORES},
        **{f"eval_ttt_seed{seed}.log": eval_log(seed) for seed in SCORES},
    }
    blobs = {"train_gpt.py": TRAINER, "eval_ttt.py": EVALUATOR, MODEL: artifact(42)}
    return blobs | {name: text.encode() for name, text in texts.items()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def edit(name: str, old: str, new: str):
    """A fault that puts NEW for OLD in the files whose names begin with NAME."""

    def fault(files: dict[str, bytes]) -> None:
        names = [n for n in files if n.startswith(name)]
        assert names and all(old.encode() in files[n] for n in names), f"nothing to change in {names}"
        files |= {n: files[n].replace(old.encode(), new.encode()) for n in names}

    return fault


def edit_json(**changes):
    def fault(files):
        claims = json.loads(files["submission.json"])
        kept = {key: value for key, value in (claims | changes).items() if value is not None}
        files["submission.json"] = json.dumps(kept).encode()

    return fault


def remove(*names: str):
    return lambda files: [files.pop(name) for name in names]


def put(name: str, content: bytes):
    return lambda files: files.update({name: content})


def edit_certificate(**changes):
    """A fault in seed 42's certificate.json: CHANGES of its keys; None takes one away."""

    def fault(files):
        name = "certificate_seed42.json"
        kept = {key: value for key, value in (json.loads(files[name]) | changes).items() if value is not None}
        files[name] = json.dumps(kept).encode()

    return fault


def rehash(name: str, digest: str | None):
    """A fault: certificate.json of seed 42 has another hash of NAME, or (None) none."""
    hashes = {key: value for key, value in (certificate_json(42)["sha256"] | {name: digest}).items() if value}
    return edit_certificate(sha256=hashes)


def cut(name: str, before: str):
    return lambda files: files.update({name: files[name].partition(before.encode())[0]})


def resize(total: int):
    """Seed 1337's model grows until code and model have TOTAL bytes; its logs agree with each other."""

    def fault(files):
        trainer, _ = results(1337)
        for name in ("train_seed1337.log", "eval_ttt_seed1337.log"):
            text = files[name].decode().replace(str(trainer["bytes_total"]), str(total))
            files[name] = text.replace(
                str(trainer["bytes_model"]), str(total - trainer["bytes_code"])
            ).encode()

    return fault


def manifest(factor: float):
    """A manifest.json with FACTOR times the bytes."""
    val = dict(tokens=TARGETS + 1, text_bytes=round(factor * (TARGETS + 1) / RATIO))
    return put("manifest.json", json.dumps(dict(splits=dict(val=val))).encode())


def misadd(files):
    for name in ("train_seed42.log", "eval_ttt_seed42.log"):
        edit(name, str(results(42)[0]["bytes_total"]), "1234567")(files)


def stray(files):
    """The evaluator's own hash of seed 42's artifact is another; the trainer's in its RESULT is not."""
    name = "eval_ttt_seed42.log"
    files[name] = files[name].replace(sha(artifact(42)).encode(), sha(b"x").encode(), 1)


def rescore(seed: int, factor: float):
    """A wrong number of bytes: every bpb of a seed is multiplied, the losses stay."""

    def fault(files):
        for name in (f"train_seed{seed}.log", f"eval_ttt_seed{seed}.log"):
            for bpb in SCORES[seed]:
                new = bpb * factor
                text = files[name].decode().replace(f"val_bpb:{bpb:.8f}", f"val_bpb:{new:.8f}")
                files[name] = text.replace(f'": {bpb},', f'": {new},').encode()

    return fault


def as_seed(seed: int, other: int):
    """The log of SEED is OTHER's, edited to say SEED."""

    def fault(files):
        for kind in ("train", "eval_ttt"):
            text = files[f"{kind}_seed{other}.log"].decode()
            pairs = ((f"seed:{other}", f"seed:{seed}"), (f'"seed": {other}', f'"seed": {seed}'))
            for old, new in (*pairs, (sha(artifact(other)), sha(artifact(seed)))):
                text = text.replace(old, new)
            files[f"{kind}_seed{seed}.log"] = text.encode()

    return fault


def saved_by_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer)
    return buffer.getvalue()


ADAPT_FIRST = b"""
def evaluate(model, optimizer, val_tokens, epochs):
    for epoch in range(epochs):
        for chunk in val_tokens.split(1024):
            loss = model(chunk[:-1], chunk[1:])
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        return sum(model(chunk[:-1], chunk[1:]) for chunk in val_tokens.split(1024))
"""
IMPORTING = TRAINER.replace(b"import torch\n", b"import torch\nimport tricks\n")
FAULTS = {  # name: (fault, rule that must fail, words of its evidence)
    "val_bpb wrong in JSON": (edit_json(val_bpb=1.1086), "claims", "val_bpb is 1.1086"),
    "val_loss wrong in JSON": (edit_json(val_loss=1.9), "claims", "val_loss is 1.9 in"),
    "deviation wrong in JSON": (edit_json(val_bpb_std=0.0001), "claims", "val_bpb_std is 0.0001"),
    "size wrong in JSON": (edit_json(bytes_total=15000000), "claims", "bytes_total is 15000000"),
    "a seed's steps wrong in JSON": (edit("submission.json", '"steps": 6900', '"steps": 6911'),
        "claims", "6911"),
    "a seed's ms wrong in JSON": (edit("submission.json", "86.5", "85.5"), "claims", "step_avg_ms is 85.5"),
    "a seed's eval time wrong": (edit("submission.json", "412.8", "402.8"), "claims", "eval_time_s is 402.8"),
    "key missing in JSON": (edit_json(github_id=None), "json", "github_id is missing"),
    "score as text in JSON": (edit_json(val_bpb="1.1088"), "json", "val_bpb is 1.1088"),
    "JSON broken": (cut("submission.json", "}"), "json", "submission.json is not a JSON object"),
    "no README": (remove("README.md"), "files", "README.md"),
    "no trainer": (remove("train_gpt.py"), "files", "train_gpt.py"),
    "over the cap by a byte": (resize(SIZE_CAP + 1), "sizes", "16000001 bytes (in the log), 1 over"),
    "sizes do not add up": (misadd, "sizes", "!= 1234567"),
    "size in RESULT against a line": (edit("train_seed42.log", "zstd: ", "zstd: 1"),
        "log", "RESULT has bytes_model"),
    "600.1 s of training": (edit("train_seed1337", '"train_seconds": 598.25', '"train_seconds": 600.1'),
        "train time", "over 600 s: 600.100 s"),
    "loop longer than RESULT says": (
        edit("train_seed1337", '"train_seconds": 598.25', '"train_seconds": 500.5'),
        "log", "RESULT has train_seconds 500.500"),
    "600.1 s of evaluation": (edit("eval_ttt_seed1337", '"eval_seconds": 412.75', '"eval_seconds": 600.1'),
        "eval time", "over 600 s: 600.1 s"),
    "two seeds": (remove("train_seed42.log", "eval_ttt_seed42.log"), "seeds", "2 distinct seeds"),
    "duplicate seed": (edit("train_seed42.log", "seed:42", "seed:1337"), "log", 'RESULT has seed 42'),
    "duplicate seed, everywhere": (lambda files: [edit("train_seed42.log", *pair)(files) for pair in (
        ("seed:42", "seed:1337"), ('"seed": 42', '"seed": 1337'))], "seeds", "lists seeds [42], but"),
    "duplicate seed in JSON": (edit_json(seeds=[42, 42, 1337]), "seeds", "a seed twice"),
    "seed without a log": (edit_json(seeds=[42, 1337, 7]), "seeds", "seeds [7], but the logs have"),
    "log named for another seed": (
        lambda files: files.update({"train_seed7.log": files.pop("train_seed42.log")}),
        "seeds", "train_seed7.log + eval_ttt_seed42.log is named for seed 7"),
    "score copied to another seed": (as_seed(2025, 42), "seeds", "the same score 1.10880000"),
    "no final line": (lambda files: [fault(files) for fault in (
        cut("train_seed42.log", "final_int6"), remove("eval_ttt_seed42.log"))],
        "log", "train_seed42.log: no line with a final score"),
    "RESULT cut off": (edit("train_seed42.log", '"seed": 42}', '"se'), "log", "not JSON"),
    "RESULT against a line's loss": (
        edit("eval_ttt_seed42.log", "ttt_exact val_loss:1", "ttt_exact val_loss:2"),
        "log", "RESULT has val_loss_ttt"),
    "RESULT against a line": (edit("train_seed42.log", "val_bpb:1.11510000", "val_bpb:1.11500000"),
        "log", "RESULT has val_bpb_sliding 1.11510000"),
    "score not a number": (edit("eval_ttt_seed42.log", "val_bpb:1.10880000", "val_bpb:nan"),
        "log", "val_bpb:nan"),
    "wrong byte count": (rescore(1337, 1 / 1.167), "bytes", "bytes were counted instead of 151,0"),
    "evaluator read another model": (stray, "log", "the evaluator scored another artifact"),
    "code changed between seeds": (edit("train_seed2025.log", sha(TRAINER), sha(b"x")),
        "code", "train_gpt.py changed between"),
    "other code shipped": (put("train_gpt.py", TRAINER + b"# more\n"),
        "code", "train_gpt.py as shipped is not what"),
    "more code shipped than counted": (put("train_gpt.py", TRAINER + b"# more\n" * 9),
        "sizes", "the log counts"),
    "data in the README": (lambda files: files.update({
        "train_gpt.py": TRAINER + b'\nopen("README.md")\n',
        "README.md": files["README.md"] + bytes(SIZE_CAP)}),
        "sizes", "with README.md, which the programs name or import"),
    "settings differ": (edit("train_seed2025.log", "MATRIX_LR=0.025", "MATRIX_LR=0.03"),
        "settings", "matrix_lr 0.025 and 0.03"),
    "leaky export": (edit("train_seed1337.log", "train_shards:80", "train_shards:1499"),
        "validation set", "40,000"),
    "part of the validation set": (edit("eval_ttt_seed1337.log", f"targets:{TARGETS}", "targets:12404369"),
        "validation set", "not the 62,021,846"),
    "tokens of another tokenizer": (edit("eval_ttt_seed1337.log", f"targets:{TARGETS}", "targets:40540801"),
        "validation set", "sp8192's validation tokens with the tokenizer of sp1024"),
    "bpb given as nats": (edit_json(delta_nats=-0.0051, delta_bpb=-0.0051), "units", "units confused"),
    "units mixed up in README": (put("README.md", b"better by 0.0043 BPB = 0.0030 nats"),
        "units", "0.0030 nats"),
    "pickle for an artifact": (put(MODEL, saved_by_torch()), "artifact", "is a pickle"),
    "compressed pickle": (put(MODEL, lzma.compress(pickle.dumps({"w": 1}))), "artifact", "is a pickle"),
    "artifact cut off": (put(MODEL, artifact(42)[:-1]), "artifact", "truncated or altered"),
    "artifact of no log": (put(MODEL, artifact(43)), "artifact", "not the artifact that the logs scored"),
    "invalid score": (edit("eval_ttt_seed42.log", "legal_ttt", "invalid_ttt"),
        "legality", "invalid_ttt_exact"),
    "calls itself not legal": (edit("eval_ttt_seed42.log", '"legal": true', '"legal": false'),
        "legality", "false"),
    "audit failed": (edit("certificate_seed42.txt", "=legal: legal", "=legal: NOT LEGAL"),
        "legality", "NOT LEGAL"),
    "a check of the audit failed": (edit("certificate_seed42.txt", "  pass  T1", "  FAIL  T1"),
        "legality", "FAIL  T1"),
    "audit of another artifact": (put("certificate_seed42.txt", certificate(b"x").encode()),
        "legality", "another artifact"),
    "audit of other code": (edit("certificate_seed42.txt", sha(EVALUATOR), sha(b"x")),
        "legality", "another eval_ttt.py"),
    "certificate without JSON": (remove("certificate_seed42.json"), "legality", "no certificate_seed42.json"),
    "certificate of broken JSON": (cut("certificate_seed42.json", "checks"), "legality", "not a JSON object"),
    "one certificate for three seeds": (
        remove(*(f"certificate_seed{seed}.{end}" for seed in (1337, 2025) for end in ("txt", "json"))),
        "legality", "eval_ttt_seed2025.log: no certificate for its artifact"),
    "one line of text": (lambda files: [fault(files) for fault in (
        remove("certificate_seed42.json"), put("certificate_seed42.txt", b"certificate: legal"))],
        "legality", "no certificate_seed42.json"),
    "JSON calls it not legal": (edit_certificate(legal=False), "legality", '"legal" is false'),
    "legal in words": (edit_certificate(legal="yes"), "legality", '"legal" is "yes"'),
    "a check of nothing": (edit_certificate(checks=[dict(name="T1", ok=True, checked=0)]),
        "legality", "T1 passed with 0 checked"),
    "a check without a count": (edit_certificate(checks=[dict(name="T1", ok=True)]),
        "legality", "with None checked"),
    "a failed check in JSON": (edit_certificate(checks=[dict(name="T2", ok=False)]), "legality", "T2 failed"),
    "a certificate that is not legal beside one that is": (lambda files: files.update({
        "certificate.json": files["certificate_seed42.json"],
        "certificate.seed42.json": json.dumps(certificate_json(42) | dict(legal=False)).encode()}),
        "legality", 'certificate.seed42: "legal" is false'),
    **{f"{name} is not among the checks": (
        edit_certificate(checks=[dict(name=other, ok=True, checked=9)
                                 for other in ("T1b embeddings", "T10 memory", *ESSENTIAL) if other != name]),
        "legality", f"{name} did not pass") for name in ESSENTIAL},
    "an essential check that says nothing": (
        edit_certificate(checks=[dict(name=name, ok=name != "T2" or None, checked=9) for name in ESSENTIAL]),
        "legality", "T2 did not pass"),
    "no check at all": (edit_certificate(checks=[]), "legality", "no check passed"),
    "checks of another shape": (edit_certificate(checks={"T1": True}), "legality", "not a list of objects"),
    "audit without the targets": (edit_certificate(targets=None), "legality", "lacks targets"),
    "audit of more than was scored": (edit_certificate(targets=TARGETS + 1),
        "legality", f"targets is {TARGETS + 1}"),
    "audit of nothing": (edit_certificate(targets=0), "legality", "targets is 0"),
    "audit of another tokenizer": (rehash("tokenizer", sha(b"x")), "legality", "another tokenizer"),
    "audit of other losses": (rehash("nll.npy", sha(b"x")), "legality", "another nll.npy"),
    "audit of another text": (rehash("fineweb_val_000000.bin", sha(b"x")),
        "legality", "another fineweb_val_0"),
    "audit of a text unnamed": (rehash("fineweb_val_000000.bin", None),
        "legality", "not name fineweb_val_000000.bin"),
    "audit of code unnamed": (rehash("train_gpt.py", None), "legality", "does not name train_gpt.py"),
    "audited JSON of another artifact": (rehash("artifact", sha(b"x")), "legality", "another artifact"),
    "audited with a rate of 0": (edit_certificate(settings=dict(ttt_mode="banks", ttt_lr=0)),
        "legality", "audited with ttt_lr 0, scored with 0.001"),
    "audited in another mode": (edit_certificate(settings=dict(ttt_mode="none", ttt_lr=0.001)),
        "legality", "ttt_mode none, scored with banks"),
    "one artifact under two seeds": (lambda files: [fault(files) for fault in (
        edit("train_seed2025.log", sha(artifact(2025)), sha(artifact(42))),
        edit("eval_ttt_seed2025.log", sha(artifact(2025)), sha(artifact(42))))],
        "artifact", "the same artifact"),
    "inflated bytes with a manifest that says so": (lambda files: [fault(files) for fault in (
        *(rescore(seed, 1 / 1.1) for seed in SCORES), manifest(1.1))], "bytes", "sp1024 has 0.41052"),
    "manifest with more bytes than published": (lambda files: manifest(1.1)(files),
        "bytes", "manifest.json has 0.373"),
    "a large file that is read": (lambda files: files.update({
        "train_gpt.py": TRAINER + b"open('weights.bin')\n", "weights.bin": bytes(SIZE_CAP)}),
        "sizes", "with weights.bin, which the programs name or import"),
    "a large module that is imported": (
        lambda files: files.update({"train_gpt.py": IMPORTING, "tricks.so": bytes(SIZE_CAP)}),
        "sizes", "with tricks.so, which"),
    "a large module by its name": (lambda files: files.update({
        "eval_ttt.py": EVALUATOR + b"__import__('tricks')\n", "tricks.pyc": bytes(SIZE_CAP)}),
        "sizes", "tricks.pyc"),
    "trained on the validation shards": (
        edit("train_seed1337.log", "  MATRIX_LR", "  TRAIN_FILES=d/fineweb_val_*.bin (given)\n  MATRIX_LR"),
        "validation set", "are validation shards"),
    "trained on all shards": (
        edit("train_seed1337.log", "  MATRIX_LR", "  TRAIN_FILES=d/*.bin (given)\n  MATRIX_LR"),
        "validation set", "are validation shards: fineweb_val_000000.bin"),
    "less than the challenge's text": (lambda files: [
        edit(name, old, new)(files) for seed in SCORES for name, old, new in (
            (f"train_seed{seed}.log", "fineweb_1024_bpe", "mine"),
            (f"eval_ttt_seed{seed}.log", f"targets:{TARGETS}", "targets:60000000"))],
        "bytes", "60000000 tokens of fineweb10B_sp1024 are 146,15"),
    "the first baseline's export": (lambda files: [
        edit(f"eval_ttt_seed{seed}.log", f"targets:{TARGETS}", "targets:63779839")(files) for seed in SCORES],
        "bytes", "the challenge's text has 151,000,000"),
}  # fmt: skip


def test_a_good_record_passes(tmp_path, capsys):
    folder = write(tmp_path / "2026-12-01_Good", good_files())
    assert check.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(
        r"PASS: 0 faults, 0 warnings, \d+ passes \(--verbose lists them\)", out.splitlines()[-1]
    )
    assert not re.search("(?m)^pass ", out)
    record = check.read_record(folder)
    assert sorted(run.seed for run in record.runs) == [42, 1337, 2025]
    for run in record.runs:
        trainer, evaluator = results(run.seed)
        assert run.headline.label == "legal_ttt_exact" and run.val_bpb == evaluator["val_bpb_ttt"]
        assert (run.train_seconds, run.eval_seconds, run.val_tokens) == (598.25, 412.75, TARGETS)
        assert (run.steps, run.step_avg_ms, run.bytes_total) == (6900, 86.5, trainer["bytes_total"])
    assert {verdict.rule for verdict in check.check(record)} == {name for name, *_ in check.RULES}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(tmp_path, name):
    fault, rule, words = FAULTS[name]
    files = good_files()
    fault(files)
    verdicts = check.check(check.read_record(write(tmp_path / "2026-12-01_Bad", files)))
    faults = [verdict for verdict in verdicts if verdict.status == "fail"]
    assert any(v.rule == rule and words in v.evidence for v in faults), faults


def test_a_run_resumed_with_other_code_is_named(tmp_path):
    files = good_files()
    edit("train_seed42.log", '"train_seconds"', '"earlier_code": [{"until_step": 3}], "train_seconds"')(files)
    verdicts = check.check(check.read_record(write(tmp_path / "2026-12-01_Resumed", files)))
    warnings = [v.evidence for v in verdicts if v.status == "warn" and v.rule == "legality"]
    assert any("other code trained it before, versions: 1" in words for words in warnings), warnings


PAGES = ("README.md", "submission.json", "requirements.txt", "certificate.txt", "certificate_seed42.json")


@pytest.mark.parametrize("name", [*PAGES, "train_seed42.log"])
@pytest.mark.parametrize("program", ["train_gpt.py", "eval_ttt.py"])
def test_a_page_counts_where_a_program_opens_it(tmp_path, name, program):
    files = good_files()
    files.setdefault(name, b"")
    for folder, more, counted in (("plain", b"", []), ("opened", f"\nopen('{name}')\n".encode(), [name])):
        changed = files | {program: files[program] + more}
        used, others = check.read_files(check.read_record(write(tmp_path / folder, changed)))
        assert [path.name for path in used] == counted and name not in [path.name for path in others]


@pytest.mark.parametrize("name", ["2026-13-01_Month", "Record", "2026-12-01"])
def test_a_folder_with_a_wrong_name(tmp_path, name):
    verdicts = check.check(check.read_record(write(tmp_path / name, good_files())))
    assert [v.rule for v in verdicts if v.status == "fail"] == ["files"]


DOUBTS = {
    "usual key missing": (edit_json(track=None), "json", "track"),
    "best seed's score": (edit_json(val_bpb=1.1082), "claims", "a single seed"),
    "population's deviation": (
        edit_json(val_bpb_std=round(float(np.std([row[2] for row in SCORES.values()])), 6)),
        "claims", "population standard deviation"),
    "a log twice": (lambda files: files.update({
        "copy.log": files["train_seed42.log"] + b"\n" + files["eval_ttt_seed42.log"]}), "seeds", "repeats"),
    "a log's seed not claimed": (edit_json(seeds=[42, 1337]), "seeds", "[2025] that have logs"),
    "another export": (edit("eval_ttt_seed1337.log", f"targets:{TARGETS}", "targets:62500000"),
        "validation set", "not the 62,021,846"),
    "units of another kind": (put("README.md", b"1.0810 bpb, 0.005 nats"), "units", "units do not agree"),
    "margin in bpb": (put("README.md", b"one-sided test against SOTA - 0.005 bpb"),
        "units", "0.00296 bpb here"),
    "no audit": (lambda files: [files.pop(name) for name in list(files) if "cert" in name],
        "legality", "no certificate"),
    "not all was audited": (edit_certificate(not_audited=["phases after the first"]),
        "legality", "not audited: phases after the first"),
    "an older certificate": (edit_certificate(not_audited=None), "legality", "of an older version"),
    "losses not in the certificate": (rehash("nll.npy", None), "legality", "does not name the losses"),
    "an older evaluation": (edit("eval_ttt_seed42", f'"sha256_nll": "{sha(b"nll 42")}", ', ""),
        "legality", "RESULT has no sha256_nll"),
    "a file that no program names": (put("data.bin", bytes(100)),
        "sizes", "not counted: data.bin (100 bytes)"),
    "a file that a program names": (lambda files: files.update({
        "train_gpt.py": TRAINER + b"open('weights.bin')\n", "weights.bin": bytes(100)}),
        "sizes", "weights.bin (100"),
    "code that is not counted": (
        lambda files: files.update({"train_gpt.py": IMPORTING, "tricks.py": b"x = 1\n"}),
        "sizes", "tricks.py"),
    "network": (put("eval_ttt.py", b"import requests\n"), "syntax tree", "requests"),
}  # fmt: skip


def test_times_and_seeds_of_the_non_record_track(tmp_path):
    files = good_files()
    edit("train_seed1337", '"train_seconds": 598.25', '"train_seconds": 6000.5')(files)
    remove("train_seed42.log", "eval_ttt_seed42.log")(files)
    edit_json(track="non-record-16mb", seeds=[1337, 2025], seed_results=None, val_bpb=1.1088, val_loss=None,
              val_bpb_std=None)(files)  # fmt: skip
    verdicts = check.check(check.read_record(write(tmp_path / "2026-12-01_Long", files)))
    assert {v.rule for v in verdicts if v.status == "warn"} >= {"seeds", "train time"}
    assert not [v for v in verdicts if v.status == "fail" and v.rule in ("seeds", "train time")]


NOTES = {
    "adapt-first evaluator": (put("eval_ttt.py", ADAPT_FIRST), "eval_ttt.py:6: gradients on val_tokens"),
    "program that does not compile": (put("train_gpt.py", b"def main(:\n"), "is not parsed by this Python"),
    "a packed program that is not": (
        put("eval_ttt.py", f"exec(secret({'x' * 3000!r}))\n".encode()),
        "packed",
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_the_reading_of_programs_fails_no_record(tmp_path, name):
    fault, words = NOTES[name]
    files = good_files()
    fault(files)
    verdicts = check.check(check.read_record(write(tmp_path / "2026-12-01_Noted", files)))
    found = [(v.status, v.evidence) for v in verdicts if v.rule == "syntax tree"]
    assert any(status == "note" and words in evidence for status, evidence in found)
    assert {status for status, _ in found} == {"note"}


@pytest.mark.parametrize("name", DOUBTS)
def test_what_is_only_warned_of(tmp_path, name):
    fault, rule, words = DOUBTS[name]
    files = good_files()
    fault(files)
    verdicts = check.check(check.read_record(write(tmp_path / "2026-12-01_Doubtful", files)))
    assert any((v.rule, v.status) == (rule, "warn") and words in v.evidence for v in verdicts), verdicts


def test_the_cap_itself_fits(tmp_path):
    files = good_files()
    resize(SIZE_CAP)(files)
    edit_json(bytes_total=SIZE_CAP)(files)
    verdicts = check.check(check.read_record(write(tmp_path / "2026-12-01_Full", files)))
    assert {v.status for v in verdicts if v.rule == "sizes"} == {"pass"}


def test_trainer_and_evaluator_in_one_log(tmp_path):
    log = tmp_path / "train_seed42.log"
    log.write_text(train_log(42) + "\n" + eval_log(42))
    facts = check.read_log(log)
    assert (facts.seed, facts.val_bpb, facts.eval_seconds, facts.conflicts) == (42, 1.1088, 412.75, [])
    log.write_text(eval_log(42))  # the evaluator's log carries the trainer's result
    facts = check.read_log(log)
    assert (facts.seed, facts.steps, facts.train_seconds, facts.result["legal"]) == (42, 6900, 598.25, True)


def test_a_lone_log_and_a_run_need_no_folder_around_them(tmp_path):
    run = write(tmp_path / "run", {"train.log": train_log(42).encode(), "eval_ttt.log": eval_log(42).encode(),
                                   "result.json": b"{}", MODEL: artifact(42)})  # fmt: skip
    (run / "source").mkdir()
    for name, code in (("train_gpt.py", TRAINER), ("eval_ttt.py", EVALUATOR)):
        (run / "source" / name).write_bytes(code)
    assert check.read_record(run).kind == "run" and check.main([str(run), str(run / "train.log")]) == 0
    (run / "source" / "eval_ttt.py").write_bytes(EVALUATOR + b"\n")
    assert check.main([str(run)]) == 1


def test_bytes_of_an_unpublished_validation_set(tmp_path):
    unknown = [(f"targets:{TARGETS}", "targets:60361"), ("fineweb_1024_bpe", "mine"), ("fineweb10B", "mine")]
    log = tmp_path / "x.log"
    text = train_log(42) + "\n" + eval_log(42)
    for old, new in unknown:
        text = text.replace(old, new)
    log.write_text(text)
    assert {v.status for v in check.check(check.read_record(log)) if v.rule == "bytes"} == {"warn"}
    log.write_text(text.replace("val_bpb:1.11510000", "val_bpb:1.21510000"))
    assert {v.status for v in check.check(check.read_record(log)) if v.rule == "bytes"} == {"fail", "warn"}
    files = {"train.log": text.encode(), "config.json": b"{}"}
    for tokens, status in ((60362, "pass"), (70000, "fail")):
        manifest = {"splits": {"val": {"tokens": tokens, "text_bytes": round(60362 / RATIO)}}}
        run = write(tmp_path / str(tokens), files | {"manifest.json": json.dumps(manifest).encode()})
        assert {v.status for v in check.check(check.read_record(run)) if v.rule == "bytes"} == {status}


# ------------------------------------------------------------------------------------------------------------
# Dialects
# ------------------------------------------------------------------------------------------------------------

FOREIGN = """\
model_params:26993756
train_batch_tokens:786432 train_seq_len:2048 max_wallclock_seconds:600.000
seed:42
step:7103/20000 val_loss:1.9253 val_bpb:1.1403 train_time:600059ms step_avg:84.48ms
stopping_early: wallclock_cap train_time:600059ms step:7103/20000
Code size: 67603 bytes
Serialized model int6+zstd: 15473072 bytes
Total submission size int6+zstd: 15540675 bytes
final_int6_roundtrip val_loss:1.9371 val_bpb:1.1473 eval_time:5814ms
final_int6_roundtrip_exact val_loss:1.93712085 val_bpb:1.14727208
"""
MINUTES = """\
  seed: 7
train_shards: 128
val_tokens: 40540160
model_params:35943512
4500/20000 train_loss: 2.8130 train_time: 8.7m tok/s: 6808105
Code size (uncompressed): 122168 bytes
Code size (compressed): 27610 bytes
Serialized model quantized+brotli: 15905287 bytes
diagnostic quantized val_loss:2.80272527 val_bpb:1.08498733 eval_time:9129ms
"""
TERNARY = """\
model_params:73685840
seed:42
step:6500/20000 loss:2.1 t:599123ms
artifact:15.92MB ternary:64000000(14000000B) fp:900000(1800000B) code:70000
budget:15993853/16000000 (15.99/16.00MB) FITS
final_ternary_roundtrip val_loss:2.0000 val_bpb:1.1845 eval_time:9000ms
final_sliding val_loss:1.9600 val_bpb:1.1608 eval_time:90000ms
"""


def read(tmp_path: Path, text: str | bytes) -> check.LogFacts:
    path = tmp_path / "train_seed42.log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return check.read_log(path)


def core(facts: check.LogFacts) -> tuple:
    return (facts.seed, facts.steps, facts.val_bpb, facts.eval_seconds, facts.train_seconds,
            facts.bytes_total, facts.hessian_seconds, facts.settings.get("train_seq_len"))  # fmt: skip


DISGUISES = {
    "Windows": lambda text: text.replace("\n", "\r\n"),
    "epochs": lambda text: "".join(
        f"1776140000.{i:03d} {line}\n" for i, line in enumerate(text.splitlines())
    ),
    "ranks": lambda text: "".join(f"[rank0]: {line}\n" for line in text.splitlines()),
    "dates": lambda text: "".join(f"2026-03-22T00:11:06.893 {line}\n" for line in text.splitlines()),
    "progress bars": lambda text: text.replace(
        "step:7103", "train: 10%|#     \rtrain: 100%|######\rstep:7103"
    ),
    "noise": lambda text: f"W0322 \xff\n\x00\n\n{text}\nunknown: 12\nsliding_eval [ 0.0%] running_bpb=1.2\n",
    "source": lambda text: '"""step:9/9 val_loss:1.0 val_bpb:0.5\nfinal_int6_roundtrip_exact '
                           'val_loss:1.00000000 '
                           'val_bpb:0.50000000\n"""\nGPTQ:collected 9 Hessians in 99.9s\nCode size: 1 '
                           'bytes\n' + text,
}  # fmt: skip


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_log_in_disguise_reads_the_same(tmp_path, disguise):
    plain = core(read(tmp_path, FOREIGN))
    assert plain == (42, 7103, 1.14727208, 5.814, 600.059, 15540675, None, "2048")
    facts = read(tmp_path, DISGUISES[disguise](FOREIGN))
    assert core(facts) == plain and len(facts.scores) == 1 and not facts.conflicts


def test_minutes_and_packed_code(tmp_path):
    facts = read(tmp_path, MINUTES)
    assert (facts.seed, facts.steps, facts.train_seconds) == (7, 4500, pytest.approx(522))
    assert (facts.bytes_source, facts.bytes_code, facts.bytes_total) == (122168, 27610, 15932897)
    assert facts.headline.label == "diagnostic quantized"  # the only score of the artifact
    verdicts = check.check(check.read_record(tmp_path / "train_seed42.log"))
    warned = [v.evidence for v in verdicts if v.status == "warn"]
    assert any("counted packed" in each for each in warned)
    assert any("is called diagnostic" in each for each in warned)


def test_ternary_lines(tmp_path):
    facts = read(tmp_path, TERNARY)
    assert (facts.steps, facts.train_seconds, facts.headline.label) == (6500, 599.123, "final_sliding")
    assert (facts.bytes_code, facts.bytes_total, facts.bytes_model) == (70000, 15993853, 15923853)
    assert (facts.eval_seconds, facts.eval_all_seconds) == (90, 99)


def test_the_source_that_a_log_prints_is_its_code(tmp_path):
    program = "import torch\n" + "x = 1\n" * 60
    ruler = "=" * 100
    sources = [read(tmp_path, f"{source}{ruler}\nRunning PyTorch 2.9\n{ruler}\n{FOREIGN}").sources
               for source in (program, program, program + "y = 2\n")]  # fmt: skip
    assert sources[0] == sources[1] == [program.strip()] and sources[2] != sources[0]
    for seed, source in ((1, program), (2, program), (3, program + "y = 2\n")):
        text = (
            f"{source}{ruler}\n{FOREIGN.replace('seed:42', f'seed:{seed}').replace('84.48', f'84.4{seed}')}"
        )
        (tmp_path / f"train_seed{seed}.log").write_text(text)
    (tmp_path / "train_seed42.log").unlink()
    verdicts = check.check(check.read_record(tmp_path))
    assert any(v.rule == "code" and "printed in the logs changed" in v.evidence for v in verdicts)


SILENT = {  # content of a log, exit code if it is given as a log; none has a score
    b"": 2, b"\n\n": 2, b"\x00\xff\xfe" * 9: 2, b"hello\n": 2, b"RESULT {\n": 1, b'RESULT {"seed": "x"}\n': 1,
    b'RESULT {"train_seconds": null, "steps": [1]}\n': 1, b"seed:99999999999999999999\n": 1,
    b"model_params:1\nstep:" + b"9" * 500 + b"/1 train_loss:1 train_time:1ms\n": 1,
    b"RESULT " + b"[" * 100_000: 1, b'RESULT {"steps": ' + b"9" * 5000 + b"}\n": 1,
    b'RESULT {"train_seconds": 1e400}\n': 1, b'RESULT {"val_bpb_ttt": 1e999, "val_loss_ttt": NaN}\n': 1,
    b"Code size: " + b"9" * 400 + b" bytes\nval_tokens: 1\n": 1,
}  # fmt: skip


@pytest.mark.parametrize("content", SILENT, ids=range(len(SILENT)))
def test_a_log_that_says_nothing_is_reported_not_raised(tmp_path, content):
    facts = read(tmp_path, content)
    assert facts.headline is None and facts.steps is None
    path = str(tmp_path / "train_seed42.log")
    assert check.main([path]) == SILENT[content] and check.main([str(tmp_path)]) == 1


@pytest.mark.parametrize(
    "milliseconds, status", [(599_999, "pass"), (600_100, "warn"), (600_200, "fail"), (601_153, "fail")]
)
def test_a_loop_may_end_with_the_step_that_passes_the_cap(tmp_path, milliseconds, status):
    read(tmp_path, FOREIGN.replace("600059", str(milliseconds)))
    verdicts = check.check(check.read_record(tmp_path / "train_seed42.log"))
    assert [v.status for v in verdicts if v.rule == "train time"] == [status]


def test_two_runs_in_one_log_are_kept_apart(tmp_path):
    """The last counts; settings and shards of the first do not reach it, nor does a resumed run end it."""
    second = FOREIGN.replace("seed:42", "seed:7").replace("1.14727208", "1.14000000")
    facts = read(tmp_path, "  MATRIX_LR=0.1 (given)\n" + FOREIGN + "  MATRIX_LR=0.2 (given)\n" + second)
    assert (facts.seed, facts.val_bpb, facts.parts, facts.conflicts) == (7, 1.14, 2, [])
    assert facts.settings["matrix_lr"] == "0.2" and len(facts.scores) == 2
    first = check.read_log(tmp_path / "train_seed42.log", part=0)
    assert (first.seed, first.val_bpb, first.settings["matrix_lr"]) == (42, 1.14727208, "0.1")
    resumed = "model_params:26993756\nresumed: phase:train step:7000 world_size:8 (was 8)\n"
    resumed += "step:7050/20000 train_loss:1.9 "
    before, after = FOREIGN.split("stopping_early")
    facts = read(tmp_path, f"{before}{resumed}train_time:599000ms step_avg:84.9ms\nstopping_early{after}")
    assert (facts.parts, facts.steps, facts.val_bpb) == (1, 7103, 1.14727208)


# ------------------------------------------------------------------------------------------------------------
# Shapes of code
# ------------------------------------------------------------------------------------------------------------

READ_AGAIN = {  # words of the note on a program
    "gradients on val_tokens": ADAPT_FIRST.decode(),
    "gradients on val_tokens, by position": """
        def ttt(args, base_model, optimizer, val_tokens, epochs):
            for epoch in range(epochs):
                for start in range(0, val_tokens.numel(), 65536):
                    local = val_tokens[start : start + 65537].to(torch.int64)
                    loss = base_model(local[:-1], local[1:])
                    loss.backward()
                    with torch.no_grad():
                        for p in base_model.parameters():
                            p.mul_(1.0)
                    optimizer.step()
    """,
    "gradients on val_tokens, in a function without it": """
        val_tokens = load("fineweb_val_*.bin")
        def main():
            for epoch in range(3):
                for x in val_tokens.split(8):
                    model(x).backward()
    """,
    "a hash of target": "key = (context_hash ^ (target * 2654435761)) & mask\n",
    "a hash of tgt_np": "key = np.bitwise_xor(context, tgt_np * 36313)\n",
    "a hash of targets": "h ^= targets * primes[3]\n",
    "a hash of tokens[pos]": "k = h ^ (tokens[pos] * primes[3])\n",
    "calibration: collect_hessians receives val_tokens": "h = collect_hessians(model, val_tokens[:65536])\n",
    "exec of another file": "exec(open('train_gpt_decode.py').read())\n",
}
NOTHING = {
    "chunks, scored first": """
        def eval_ttt(model, opt, val_tokens, epochs):
            for chunk in val_tokens.split(32768):
                with torch.inference_mode():
                    nll += model(chunk)
                for epoch in range(epochs):
                    for rows in chunk.split(2048):
                        model(rows).backward()
                        opt.step()
    """,
    "scored by a function": """
        @torch.no_grad()
        def measure(model, chunk):
            return model(chunk)
        def eval_ttt(model, opt, val_tokens):
            for chunk in val_tokens.split(32768):
                total += measure(model, chunk)
                model(chunk).backward()
                opt.step()
    """,
    "documents, one forward": """
        def eval_val_lora(model, opt, val_data):
            for chunk in val_data.chunks():
                per_token = model(chunk)
                with torch.no_grad():
                    accumulate_bpb(per_token)
                per_token.mean().backward()
                opt.step()
    """,
    "training": """
        def train(model, loader, opt, val_tokens_path):
            for step in range(10):
                model(loader.next()).backward()
                opt.step()
            with torch.no_grad():
                print(evaluate(model))
    """,
    "validation in the training loop": """
        def train(model, loader, opt, val_tokens):
            for step in range(9):
                model(loader.next()).backward()
                with torch.no_grad():
                    print(model(val_tokens))
    """,
    "training with validation between": """
        def train_model(h, device, val_data):
            def step():
                for micro in range(8):
                    x, y = loader.next_batch()
                    loss = model(x, y)
                    loss.backward()
            for epoch in range(9):
                step()
                val_loss = eval_val(h, device, val_data, model)
        def eval_val(h, device, val_data, model):
            with torch.inference_mode():
                return model(val_data.val_tokens)
    """,
    "bigram hash of inputs": "h = torch.bitwise_xor(36313 * ids[1:], 27191 * ids[:-1]) % buckets\n",
    "calibration on training text": "hessians = collect_hessians(model, calibration_batches(train))\n",
}


def notes(tmp_path: Path, source: str) -> list[tuple[int, str]]:
    (tmp_path / "train_gpt.py").write_text(textwrap.dedent(source))
    program = evidence.read_program(tmp_path / "train_gpt.py")
    return sorted(evidence.find_shapes(program.tree))


@pytest.mark.parametrize("meaning", READ_AGAIN)
def test_what_a_reviewer_should_read_is_noted_plain_and_packed(tmp_path, meaning):
    plain = notes(tmp_path, READ_AGAIN[meaning])
    assert len(plain) == 1 and plain[0][1].startswith(meaning.partition(", ")[0])
    blob = lzma.compress(textwrap.dedent(READ_AGAIN[meaning]).encode())
    packed = (
        "import lzma as L,base64 as "
        f"B\nexec(L.decompress(B.b85decode({base64.b85encode(blob).decode()!r})))\n"
    )
    assert notes(tmp_path, packed) == plain


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_not_noted(tmp_path, name):
    assert notes(tmp_path, NOTHING[name]) == []


@pytest.mark.parametrize("name", ["train_gpt.py", "eval_ttt.py"])
def test_nothing_is_noted_of_our_own_programs(name):
    assert list(evidence.find_shapes(evidence.read_program(ROOT / name).tree)) == []


SPELLED = "import a.b as c, d\nif x: import e; from f.g import (h,\n i)\nfrom . import j\nimport k\n"


@pytest.mark.parametrize("later", ["", 'print(f"{key["a"]} {\'\\n\'.join([])}")\nimport z\n'])
def test_imports_and_literals_come_from_tokens(tmp_path, later):
    """Also those of a program that only Python 3.12 and later parse; a docstring is no literal."""
    path = tmp_path / "x.py"
    path.write_text(f'"""Not a.bin."""\n{SPELLED}x = "b" ".bin"\ny = b"c.bin"\n{later}')
    program = evidence.read_program(path)
    assert program.modules == {"a", "d", "e", "f", "j", "k"} | ({"z"} if later else set())
    assert {"b", ".bin", "c.bin"} <= set(program.texts) and "Not a.bin." not in program.texts
    assert bool(program.tree) == (not later or sys.version_info >= (3, 12))


def packing(source: bytes) -> bytes:
    return b"exec(L.decompress(B.b85decode(%r)))\n" % base64.b85encode(lzma.compress(source))


@pytest.mark.parametrize("source", [
    packing(b"#" * (1 << 26)), b"#" * (3 << 20), b"(" * 5000, b"exec(" + b"-" * 100_000 + b"1)", b"\0" * 100,
    b"\xff\xfe", b'"""' + b"a\n" * 50_000, b"f'" + b"{" * 400, b"x = " + b"9" * 9000 + b"\n",
    b"exec('\\N{x}' 'y')",
], ids=range(10))  # fmt: skip
def test_a_program_that_is_none_is_said(tmp_path, source):
    path = tmp_path / "train_gpt.py"
    path.write_bytes(source)
    program = evidence.read_program(path)
    assert program.sizes[0] == len(source) and program.tree is None and program.problem


# ------------------------------------------------------------------------------------------------------------
# The programs themselves
# ------------------------------------------------------------------------------------------------------------


def test_a_run_of_the_trainer_and_the_evaluator_passes(demo_data, smoke_env, run_trainer, tmp_path, capsys):
    for split, tokens in (("train", 20_000), ("val", 2_000)):
        shard = (demo_data / f"fineweb_{split}_000000.bin").read_bytes()
        content = shard_header(tokens) + shard[1024 : 1024 + 2 * tokens]
        (tmp_path / f"fineweb_{split}_000000.bin").write_bytes(content)
    env = smoke_env | {
        "DATA_PATH": str(tmp_path),
        "ITERATIONS": "3",
        "TTT_MODE": "none",
        "OMP_NUM_THREADS": "1",
    }
    assert run_trainer(env).returncode == 0
    run = tmp_path / "runs" / "run"
    env = {**os.environ, **env, "MODEL_PATH": str(run / "final_model.int6.ptz")}
    command = [sys.executable, str(ROOT / "eval_ttt.py")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert check.main([str(run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    trained, evaluated = (json.loads((run / name).read_text()) for name in ("result.json", "eval_ttt.json"))
    (facts,) = found["runs"]
    assert facts["headline"]["val_bpb"] == pytest.approx(evaluated["val_bpb_ttt"], abs=1e-8)
    for key in ("seed", "steps", "step_avg_ms", "train_seconds", "bytes_code", "bytes_model", "bytes_total"):
        assert facts[key] == trained[key]
    # no published text
    assert facts["eval_seconds"] == evaluated["eval_seconds"] and found["status"] == "warn"


@pytest.mark.parametrize(
    "arguments", [[], ["/nowhere"], ["--frobnicate", "."], [".", "--against", "/nowhere"]]
)
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        sys.exit(check.main(arguments))
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_report_has_faults_first_and_seeds_together(tmp_path, capsys):
    """What differs in numbers only, as the same fault of three seeds, is one line; --verbose lists all."""
    files = good_files()
    for seed in SCORES:
        edit(f"train_seed{seed}.log", '"train_seconds": 598.25', f'"train_seconds": {600 + seed}')(files)
    put("data.bin", bytes(100))(files)
    folder = str(write(tmp_path / "2026-12-01_Late", files))
    lines = {}
    for option in ([], ["--verbose"]):
        assert check.main([folder, *option]) == 1
        found = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        lines[bool(option)] = [word for word in found if word in ("fail", "warn", "pass")]
    assert lines[True] == sorted(lines[True], key=("fail", "warn", "pass").index)
    counts = {word: lines[True].count(word) for word in ("fail", "warn", "pass")}
    assert counts["fail"] > 3 and counts["warn"] == 1 and counts["pass"] > 9
    check.main([folder])
    *_, summary = out = capsys.readouterr().out.splitlines()
    (late,) = [line for line in out if "over 600 s" in line]
    assert late.endswith("(and 2 more)") and "pass" not in lines[False]
    assert summary.startswith(f"FAIL: {counts['fail']} faults, 1 warning, {counts['pass']} passes")


def deviation(file: str, old: str, new: str):
    return lambda files: [edit(f"{file}_seed{seed}.log", old, new)(files) for seed in SCORES]


DEVIATIONS = {  # what is done to the logs of a challenge run, words of the deviation
    "short": (deviation("train", '"train_seconds": 598.25', '"train_seconds": 3.25'), "training of 3.2 s"),
    "late": (deviation("train", '"train_seconds": 598.25', '"train_seconds": 601.5'), "training of 601.5 s"),
    "slow evaluation": (deviation("eval_ttt", '"eval_seconds": 412.75', '"eval_seconds": 612.75'),
        "evaluation of 612.8 s"),
    "one GPU": (deviation("train", '"world_size": 8', '"versions": {"gpu": "NVIDIA H100"}, "world_size": 1'),
        "1 x NVIDIA H100 (the challenge's: 8 x H100)"),
    "other GPUs": (deviation("train", '"world_size"', '"versions": {"gpu": "NVIDIA A100"}, "world_size"'),
        "8 x NVIDIA A100 (the challenge's: 8 x H100)"),
    "CPU": (deviation("train", '"world_size": 8', '"versions": {"gpu": "none"}, "world_size": 2'),
        "CPU, 2 processes"),
    "other text": (deviation("eval_ttt", f"targets:{TARGETS}", "targets:60361"),
        f"validation text of {60361 / RATIO:,.0f} bytes (the challenge's: 151,080,891)"),
}  # fmt: skip


@pytest.mark.parametrize("change, words", DEVIATIONS.values(), ids=DEVIATIONS)
def test_a_record_of_other_runs_than_the_challenges(tmp_path, change, words):
    """A fault in the main track, a warning in the other, and a fault everywhere if it claims otherwise."""
    files = good_files()
    change(files)
    for claims, status in (({}, "fail"), ({"track": "non_record_16mb"}, "warn")):
        edit_json(**claims)(files)
        record = check.read_record(write(tmp_path / f"2026-12-01_{status}", files))
        (told,) = check.deviations(record.runs)
        assert told.startswith(words)
        verdicts = [v for v in check.check(record) if v.rule == "challenge"]
        assert [(v.status, v.evidence) for v in verdicts] == [(status, f"not a challenge run: {told}")]
    edit_json(challenge_run=True)(files)
    record = check.read_record(write(tmp_path / "2026-12-01_claimed", files))
    faults = [v.evidence for v in check.check(record) if v.rule == "claims" and v.status == "fail"]
    assert any("challenge_run is true" in fault and told in fault for fault in faults)


def test_a_run_on_eight_h100_is_of_the_challenge(tmp_path):
    files = good_files()
    deviation("train", '"world_size"', '"versions": {"gpu": "NVIDIA H100 80GB HBM3"}, "world_size"')(files)
    edit_json(challenge_run=True)(files)
    record = check.read_record(write(tmp_path / "2026-12-01_Good", files))
    assert check.deviations(record.runs) == [] and check.status_of(check.check(record)) == "pass"


def test_records_of_different_texts_are_not_compared(tmp_path, capsys):
    """Neither by another number of bytes, nor by other shards under the same tokenizer."""
    same = write(tmp_path / "2026-12-01_Good", good_files())
    assert check.main([str(same), "--against", str(same)]) == 1  # the same scores are no gain
    changes = {
        f"{TARGETS / RATIO:,.0f} and {60361 / RATIO:,.0f} bytes": DEVIATIONS["other text"][0],
        "other shards": deviation("eval_ttt", sha(b"shard"), sha(b"other")),
        "no log reports the validation tokens": deviation("eval_ttt", "evaluation order:", "order:"),
    }
    capsys.readouterr()
    for number, (words, change) in enumerate(changes.items()):
        files = good_files()
        change(files)
        other = write(tmp_path / f"2026-12-02_Other{number}", files)
        for pair in ((same, other), (other, same)):
            assert check.main([str(pair[0]), "--against", str(pair[1])]) == 2
            said = capsys.readouterr().err
            assert (
                said.startswith("error: ") and (words in said or "bytes" in words) and said.count("\n") == 1
            )


def test_records_of_one_text_under_two_tokenizers_are_compared(tmp_path):
    """The published sp1024 and sp8192 validation sets are the same documents."""
    known = next(p for p in PUBLISHED if p.name == "sp8192")
    files = good_files()
    for name in [name for name in files if name.endswith(".log")]:
        text = files[name].decode().replace(f"targets:{TARGETS}", f"targets:{known.tokens - 1}")
        for score in SCORES.values():
            for bpb in score:
                old, new = (bpb * math.log(2) / ratio for ratio in (RATIO, known.tokens_per_byte))
                text = text.replace(f"val_loss:{old:.8f}", f"val_loss:{new:.8f}").replace(f"{old}", f"{new}")
        files[name] = text.replace(sha(b"tokenizer"), sha(b"other")).encode()
    records = [write(tmp_path / name, each) for name, each in (("a", good_files()), ("b", files))]
    check.require_same_text(*map(check.read_record, records))


# ------------------------------------------------------------------------------------------------------------
# A run with evaluations in several modes
# ------------------------------------------------------------------------------------------------------------


def evaluate_in(run: Path, mode: str, bpb: float, last: bool = True) -> None:
    """Write runs/ID/eval/MODE as the evaluator does; the last legal result stands in the run's folder too."""
    folder = run / "eval" / mode
    folder.mkdir(parents=True)
    log, result = eval_log(42), results(42)[1]
    log = log.replace(json.dumps(result), "RESULT").replace("1.10880000", f"{bpb:.8f}")
    result |= dict(val_bpb_ttt=bpb, settings=dict(ttt_mode=mode))
    (folder / "eval_ttt.log").write_text(log.replace("RESULT RESULT", "RESULT " + json.dumps(result)))
    for place in (folder, run) if last else (folder,):
        (place / "eval_ttt.json").write_text(json.dumps(result | dict(audit="legal")))
    np.save(folder / "nll.npy", np.ones(3, np.float32))


def test_the_last_legal_evaluation_of_a_run_counts_or_the_named_one(tmp_path, capsys):
    run = write(tmp_path / "run", {"train.log": train_log(42).encode(), "result.json": b"{}"})
    assert check.evaluation_folder(run) == run and check.read_record(run).runs[0].val_bpb == 1.1151
    evaluate_in(run, "doc_lora", 1.1077)
    evaluate_in(run, "doc_banks", 1.1066)
    evaluate_in(run, "two_pass", 1.0, last=False)  # invalid, so not the run's last legal one
    (run / "eval/died").mkdir()
    (run / "eval/died/eval_ttt.log").write_text("  TTT_MODE=banks (given)\n")
    for mode, bpb in (("", 1.1066), ("doc_lora", 1.1077), ("two_pass", 1.0), ("died", 1.1151)):
        record = check.read_record(run, mode)
        assert record.runs[0].val_bpb == bpb and check.evaluation_folder(run, mode).name == (
            mode or "doc_banks"
        )
        losses = [path.parent.name for path in record.files if path.name == "nll.npy"]
        assert losses == [mode or "doc_banks"] * (mode != "died")
    assert check.main([str(run), "--mode", "lora"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {run}: no evaluation lora. There is: died, doc_banks, doc_lora, two_pass.\n"


def test_the_evaluation_of_an_older_run_has_its_mode(tmp_path, capsys):
    """All files stand in the run's folder; its mode may be named."""
    files = {"train.log": train_log(42), "eval_ttt.log": eval_log(42), "result.json": "{}"}
    files["eval_ttt.json"] = json.dumps(results(42)[1])
    run = write(tmp_path / "run", {name: text.encode() for name, text in files.items()})
    for mode in ("", "banks"):
        assert (
            check.evaluation_folder(run, mode) == run
            and check.read_record(run, mode).runs[0].val_bpb == 1.1088
        )
    assert check.main([str(run), "--mode", "doc_lora"]) == 2
    assert "no evaluation doc_lora. There is: banks." in capsys.readouterr().err


def test_a_comparison_needs_two_scores_each(tmp_path, capsys):
    folder = write(tmp_path / "2026-12-01_Good", good_files())
    assert check.main([str(folder), "--against", str(folder / "train_seed42.log")]) == 2
    assert "two scores" in capsys.readouterr().err
