"""From runs to a record folder: end to end on small runs,
every refusal, the numbers, the statistics, the table."""

import contextlib
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import check
import finished
import numpy as np
import pytest
import submit
from conftest import ROOT
from scipy import stats
from test_check import LOGS, PR549, PR1019, RATIO, TARGETS, real_logs
from test_cli import snapshot, write_shard

import eval_ttt
import train_gpt

SEEDS = (7, 42, 1337)
EVALUATED = "eval/doc_banks/eval_ttt.log"  # below a run
TRACK, OLD = "track_non_record_16mb", "2026-01-01_Old"
TEST = ("--author", "A", "--github", "a", "--name", "A test")


def quiet(main, argv, env=None) -> SimpleNamespace:
    """A program run in this process: exit code, output, errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv) if env is None else main(argv, env)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module")
def env(demo_data, tmp_path_factory) -> dict[str, str]:
    """The smoke recipe for a moment, on a short validation text."""
    shard = tmp_path_factory.mktemp("val") / "fineweb_val_000000.bin"
    write_shard(shard, np.fromfile(demo_data / "fineweb_val_000000.bin", "<u2")[512 : 512 + 400])
    return dict(
        RECIPE=str(ROOT / "records/recipes/smoke.env"), DATA_PATH=str(demo_data), VAL_FILES=str(shard),
        DEVICE="cpu", TOKENIZER_PATH=str(demo_data / "tokenizer.model"), EVAL_BUDGET_SECONDS="1000000",
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(env, tmp_path_factory) -> Path:
    """A folder of finished runs, trained and evaluated, named by their seeds.

    Their seconds are put in by hand:
    the clock of an evaluation counts from the start of the process, here the tests'.
    """
    folder = tmp_path_factory.mktemp("made")
    short = dict(ITERATIONS="4", WARMUP_STEPS="0", VAL_LOSS_EVERY="0", GPTQ_CALIB_BATCHES="0")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in map(str, SEEDS):
            trained = quiet(train_gpt.main, [], env | short | dict(SEED=seed, RUN_ID=seed))
            adapting = dict(
                MODEL_PATH=f"runs/{seed}/final_model.int6.ptz", TTT_CHUNK_SIZE="32", TTT_LR="0.002"
            )
            evaluated = quiet(eval_ttt.main, [], env | adapting)
            assert (trained.code, evaluated.code) == (0, 0), trained.err + evaluated.err
    for run in (folder / "runs").iterdir():
        change(run, r'"(eval|strict)_seconds": [\d.]+', r'"\1_seconds": 12.5')
    return folder / "runs"


def change(run: Path, pattern: str, new: str, names: str = "*.json train.log eval_ttt.log") -> None:
    """Replace what matches PATTERN in files of a run."""
    for path in (path for name in names.split() for path in run.rglob(name)):
        path.write_text(re.sub(pattern, new, path.read_text()))


@pytest.fixture
def runs(made, tmp_path) -> list[Path]:
    """Copies of the runs, to do things to."""
    folder = Path(shutil.copytree(made, tmp_path / "runs", ignore=shutil.ignore_patterns("final_model.pt")))
    return [folder / str(seed) for seed in SEEDS]


def start(runs, out: Path, *more: str) -> SimpleNamespace:
    return quiet(submit.main, [*map(str, runs), "--out", str(out), *TEST, *more])


# ------------------------------------------------------------------------------------------------------------
# End to end
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(made, tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("records")
    what = out / "what.md"
    what.write_text("Fewer steps.\n\nThan before.\n")
    for seed in SEEDS:
        certify(made / str(seed))
    (out / TRACK).mkdir()
    old = write_logs(out / TRACK / OLD, dict(zip(SEEDS, (3.49, 3.5, 3.51), strict=True)), text_of(made / "7"))
    done = start([made / "42", made / "7", made / "1337"], out, "--against", old, "--what", str(what))
    for path in made.glob("*/eval/*/certificate.*"):
        path.unlink()
    assert done.code == 0, done.err
    (folder,) = (out / TRACK).glob("*_A_test")
    results = {
        seed: [last_result(made / f"{seed}/{name}") for name in ("train.log", EVALUATED)] for seed in SEEDS
    }
    claims = json.loads((folder / "submission.json").read_text())
    return SimpleNamespace(
        folder=folder,
        results=results,
        claims=claims,
        readme=(folder / "README.md").read_text(),
        done=done,
        out=out,
    )


def text_of(run: Path) -> tuple[int, float]:
    """Targets of a run's validation text, and its tokens per byte."""
    result = last_result(run / EVALUATED)
    return 399, result["val_bpb_ttt"] * math.log(2) / result["val_loss_ttt"]


def last_result(log: Path) -> dict:
    return json.loads(log.read_text().splitlines()[-1].removeprefix("RESULT "))


def certify(run: Path) -> None:
    """The certificate of a run, as --audit writes it, of an audit that found nothing."""
    folder = run / Path(EVALUATED).parent
    result = json.loads((run / "eval_ttt.json").read_text())
    hashes = dict(artifact=result["sha256_artifact"], tokenizer=result["sha256_tokenizer"])
    hashes |= (
        {"nll.npy": train_gpt.sha256_file(folder / "nll.npy")}
        | result["sha256_code"]
        | result["sha256_shards"]
    )
    lines = ["certificate of it: legal", *(f"  sha256 {name} {digest}" for name, digest in hashes.items())]
    (folder / "certificate.txt").write_text("\n".join(lines) + "\n")
    checks = [dict(name=name, ok=True, checked=9) for name in ("T1", "T2", "T3", "T4")]
    found = dict(legal=True, targets=399, checks=checks, sha256=hashes, not_audited=[])
    (folder / "certificate.json").write_text(json.dumps(found | dict(settings=result["settings"])))


def test_the_folder(record, made):
    names = {path.name for path in record.folder.iterdir()}
    assert names == {"README.md", "submission.json", "requirements.txt", "train_gpt.py", "eval_ttt.py",
                     "smoke.env", *(f"train_seed{seed}.log" for seed in SEEDS),
                     *(f"certificate_seed{seed}.{end}" for seed in SEEDS
                       for end in ("txt", "json"))}  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_A_test", record.folder.name)
    assert {path.name for path in record.out.iterdir()} == {"what.md", TRACK}
    for seed in SEEDS:
        logs = [(made / f"{seed}/{name}").read_text() for name in ("train.log", EVALUATED)]
        assert (record.folder / f"train_seed{seed}.log").read_text() == "".join(logs)
    for name in ("train_gpt.py", "eval_ttt.py", "smoke.env"):
        assert (record.folder / name).read_bytes() == (made / "7/source" / name).read_bytes()


def test_the_folder_passes_the_check(record):
    verdicts = check.check(check.read_record(record.folder))
    assert not [verdict for verdict in verdicts if verdict.status == "fail"]
    assert "0 faults" in record.done.out and len(check.read_record(record.folder).runs) == 3


def test_the_numbers_of_the_json_are_those_of_the_result_lines(record):
    claims, results = record.claims, record.results
    for unit in ("bpb", "loss"):
        scores = [round(evaluated[f"val_{unit}_ttt"], 8) for _, evaluated in results.values()]
        assert claims[f"val_{unit}"] == pytest.approx(mean(scores), abs=5.1e-9)
        assert claims[f"val_{unit}_std"] == pytest.approx(stdev(scores), abs=5.1e-9)
        assert [entry[f"val_{unit}"] for entry in claims["seed_results"].values()] == scores
    assert claims["seeds"] == list(SEEDS) and list(claims["seed_results"]) == [str(seed) for seed in SEEDS]
    for seed, (trained, evaluated) in results.items():
        entry = claims["seed_results"][str(seed)]
        assert entry["val_bpb_sliding"] == round(evaluated["val_bpb_sliding"], 8)
        assert entry["ttt_gain_bpb"] == round(evaluated["ttt_gain_bpb"], 8) != 0
        assert entry["artifact_bytes"] == evaluated["bytes_total"] == trained["bytes_total"]
        assert (
            (entry["steps"], entry["eval_time_s"])
            == (trained["steps"], evaluated["eval_seconds"])
            == (4, 12.5)
        )
        assert (entry["step_avg_ms"], entry["train_time_s"]) == (
            trained["step_avg_ms"],
            trained["train_seconds"],
        )
    totals = [trained["bytes_total"] for trained, _ in results.values()]
    assert (claims["bytes_total"], claims["artifact_bytes_mean"]) == (max(totals), round(mean(totals), 1))
    assert claims["train_steps_mean"] == 4 and claims["pytorch_version"] == results[7][0]["versions"]["torch"]
    fixed = {key: claims[key] for key in ("author", "github_id", "name", "blurb", "track")}
    assert fixed == dict(
        author="A", github_id="a", name="A test", blurb="Fewer steps.", track="non_record_16mb"
    )


def test_the_numbers_of_the_readme_are_those_of_the_result_lines(record):
    rows = {cells[0]: cells[1:] for cells in table_rows(record.readme) if len(cells) == 11}
    columns = (
        (0, "steps", ",d"), (1, "step_avg_ms", ".2f"), (2, "val_bpb_sliding", ".8f"),
        (3, "val_bpb_ttt", ".8f"), (4, "ttt_gain_bpb", ".8f"), (5, "val_loss_ttt", ".8f"),
        (6, "bytes_model", ",d"), (7, "bytes_total", ",d"), (8, "train_seconds", ".1f"),
        (9, "eval_seconds", ".1f"),
    )  # fmt: skip
    for seed, (trained, evaluated) in record.results.items():
        both = trained | evaluated
        assert rows[str(seed)] == [format(both[key], form) for _, key, form in columns]
    adapted = [evaluated["val_bpb_ttt"] for _, evaluated in record.results.values()]
    nats = [evaluated["val_loss_ttt"] for _, evaluated in record.results.values()]
    assert float(rows["mean"][3]) == pytest.approx(mean(adapted), abs=1.1e-8)
    assert float(rows["std"][3]) == pytest.approx(stdev(adapted), abs=2e-8)
    head = re.search(r"\*\*([\d.]+) bpb / ([\d.]+) nats per token\*\*", record.readme)
    assert [float(text) for text in head.groups()] == pytest.approx([mean(adapted), mean(nats)], abs=1.1e-8)


def table_rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:2] == "| "
    ]


def test_what_the_readme_says(record):
    # fmt: off
    for said in ("Fewer steps.\n\nThan before.", "1. Causal", "2. Normalized",
                 "3. Score before", "4. One pass: each of the 399 targets",
                 "Audits: seeds 7, 42, 1337: certificate of it: legal.", "TTT_MODE=doc_banks",
                 f"bpb worse than {OLD}. A gain of 0.005 nats per token at p < 0.01 is not shown (Welch: "):
        assert said in record.readme
    # fmt: on
    (line,) = [line for line in record.done.out.splitlines() if line.startswith("comparison: ")]
    assert f"## Comparison\n\n{line.removeprefix('comparison: ')} A difference below 0" in record.readme
    delta = mean(evaluated["val_bpb_ttt"] for _, evaluated in record.results.values()) - 3.5
    name = f"A test (not a challenge run): Fewer steps. - val_bpb {delta + 3.5:.5f}"
    assert record.readme.startswith(f"# {name} (3-seed mean, {delta:+.5f} against {OLD})\n") and delta > 0


def test_a_record_of_other_runs_says_so(record):
    """In the track, the title, the README and submission.json, with the reasons and their numbers."""
    seconds = [trained["train_seconds"] for trained, _ in record.results.values()]
    targets, ratio = (
        399,
        record.results[7][1]["val_bpb_ttt"] * math.log(2) / record.results[7][1]["val_loss_ttt"],
    )
    reasons = [
        f"validation text of {targets / ratio:,.0f} bytes (the challenge's: 151,080,891)",
        "CPU, 1 process (the challenge's: 8 x H100)",
        f"training of {min(seconds):.1f} to {max(seconds):.1f} s (the challenge's: up to 600 s)",
    ]
    claims, (first, *_) = record.claims, record.readme.splitlines()
    assert (claims["challenge_run"], claims["track"]) == (False, "non_record_16mb")
    if f"{min(seconds):.1f}" != f"{max(seconds):.1f}":
        assert claims["deviations"] == reasons
    assert claims["deviations"][:2] == reasons[:2] and "(not a challenge run)" in first
    assert f"> **Not a challenge run**, no entry for openai/parameter-golf: {reasons[0]}; " in record.readme
    assert "next: these scores are not on the challenge's text" in record.done.out


def test_other_runs_are_refused_in_the_main_track(runs, tmp_path, no_tree):
    done = start(runs, tmp_path / "out", "--track", "track_10min_16mb")
    assert done.code == 1 and not (tmp_path / "out").exists()
    for said in ("validation text of ", "CPU, 1 process", "training of "):
        assert f"refused: not a challenge run: {said}" in done.err


def as_challenge(run: Path) -> None:
    """Let a run's logs tell of the challenge's text, machines and times."""
    bytes_now = text_of(run)[0] / text_of(run)[1]
    result = last_result(run / EVALUATED)
    change(run, "targets:399", "targets:62021845")
    scale = 62021845 / 151_080_891 / (399 / bytes_now)  # of the tokens per byte
    for name in ("train.log", EVALUATED, "result.json", "eval_ttt.json", "eval/doc_banks/eval_ttt.json"):
        text = (run / name).read_text()
        text = re.sub(r'("?val_bpb\w*"?: ?)([\d.]+)', lambda m: f"{m[1]}{float(m[2]) * scale:.16g}", text)
        (run / name).write_text(text)
    change(run, r'"train_seconds": [\d.]+', '"train_seconds": 598.5')
    change(run, r'"world_size": 1', '"world_size": 8')
    change(run, r'"gpu": "none"', '"gpu": "NVIDIA H100 80GB HBM3"')
    (run / EVALUATED).with_name("nll.npy").unlink()
    scaled = last_result(run / EVALUATED)["val_bpb_ttt"]
    assert scaled == pytest.approx(result["val_bpb_ttt"] * scale)


def test_a_challenge_run_ends_with_the_commands_of_a_pull_request(runs, tmp_path, no_tree, no_start):
    for run in runs:
        as_challenge(run)
    done = start(runs, tmp_path / "out", "--against", "9.5", "--what", "It's new")
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "out/track_10min_16mb").iterdir()
    claims = json.loads((folder / "submission.json").read_text())
    assert (claims["challenge_run"], claims["deviations"], claims["hardware"]) == (
        True, [], "8 x NVIDIA H100 80GB HBM3")  # fmt: skip
    assert "challenge run" not in (folder / "README.md").read_text()
    _, commands = done.out.split(
        "next: a pull request from your fork of https://github.com/openai/parameter-golf\n"
    )
    # run them with git and gh that only tell their arguments
    tell = 'git() { printf "git"; printf " <%s>" "$@"; echo; [ "$1" != clone ] || mkdir "$3"; }\n'
    shell = tell + tell.replace("git", "gh").replace("clone", "-") + commands
    told = subprocess.run(
        ["bash", "-ec", shell], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    title = (folder / "README.md").read_text().splitlines()[0].removeprefix("# ")
    assert f"<-m> <{title}>" in told and f"<--title> <{title}>" in told and "It's new" in title
    copied = tmp_path / "fork/records/track_10min_16mb" / folder.name
    assert snapshot(copied) == snapshot(folder)
    assert f"<--body-file> <records/track_10min_16mb/{folder.name}/README.md>" in told


def test_unpacked_programs_are_told_of_the_bytes_they_waste(runs, tmp_path, no_tree, no_start):
    for run in runs:
        change(run, r'"bytes_total_packed": \d+', '"bytes_total_packed": null')
    assert "packed programs" not in start(runs, tmp_path / "out").out
    for run in runs:
        total = json.loads((run / "result.json").read_text())["bytes_total"]
        change(run, '"bytes_total_packed": null', f'"bytes_total_packed": {total - 12_345}')
    done = start(runs, tmp_path / "again")
    assert done.code == 0 and "12,345 bytes more are free" in done.out, done.err


def test_the_command_makes_the_same_settings_again(record, env, made):
    """The README's loop with a program in python's place that tells its environment."""
    block = "\n".join(line for line in record.readme.splitlines() if line.startswith("    "))
    tell = (
        f"{shlex.quote(sys.executable)} -c 'import json,os,sys; print(json.dumps([sys.argv[1], "
        "dict(os.environ)]))'"
    )
    shell = f'python() {{ {tell} "$@"; }}\n{block}'
    told = subprocess.run(
        ["bash", "-c", shell], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    starts = [json.loads(line) for line in told.stdout.splitlines()]
    assert [name for name, _ in starts] == ["train_gpt.py", "eval_ttt.py"] * 3, told.stderr
    recipe = {"RECIPE": str(record.folder / "smoke.env")}
    for seed, (_, training), (_, evaluation) in zip(SEEDS, starts[::2], starts[1::2], strict=True):
        settings = json.loads((made / f"{seed}/config.json").read_text())["config"]
        assert training["RECIPE"] == evaluation["RECIPE"] == "smoke.env"
        again = recipe | {k: v for k, v in training.items() if k.lower() in settings}
        config = vars(train_gpt.load_config(again)[0])
        assert config == settings | {"run_id": f"seed{seed}"}
        again = recipe | {k: v for k, v in evaluation.items() if k.lower() in settings}
        config, wanted = (
            vars(train_gpt.load_config(again)[0]),
            last_result(made / f"{seed}/{EVALUATED}")["settings"],
        )
        assert {k: config[k] for k in wanted} == wanted | {
            "model_path": f"runs/seed{seed}/final_model.int6.ptz"
        }
        assert (config["val_files"], config["tokenizer_path"]) == (env["VAL_FILES"], env["TOKENIZER_PATH"])


def test_the_command_names_the_recipe_and_what_was_given_otherwise(record, env):
    """The recipe's settings are not repeated."""
    (block,) = re.findall(r"(?s)## Command\n\n(.*?)\n\n##", record.readme)
    training, evaluation = block.split("train_gpt.py")
    assert "RECIPE=smoke.env SEED=$SEED RUN_ID=seed$SEED" in training
    assert "RECIPE=smoke.env MODEL_PATH=runs/seed$SEED/final_model.int6.ptz" in evaluation
    paths = {"DATA_PATH", "TOKENIZER_PATH", "VAL_FILES"}
    given = [set(re.findall(r"(?m)^ +([A-Z_]+)=", part)) - {"RECIPE"} for part in (training, evaluation)]
    short = {"ITERATIONS", "WARMUP_STEPS", "VAL_LOSS_EVERY", "GPTQ_CALIB_BATCHES"}
    assert given[0] == paths | short | {"DEVICE", "EVAL_BUDGET_SECONDS"}
    assert given[1] == paths | {"TTT_CHUNK_SIZE", "TTT_LR", "EVAL_BUDGET_SECONDS"}


def test_the_requirements_are_what_the_programs_import_in_the_versions_that_ran(record, made):
    lines = (record.folder / "requirements.txt").read_text().splitlines()
    versions = record.results[7][0]["versions"]
    pinned = dict(re.findall(r"(?m)^(\w+)==(\S+)", (ROOT / "requirements.txt").read_text()))
    torch = versions["torch"].partition("+")[0]
    others = [f"{name}=={pinned[name]}" for name in ("sentencepiece", "zstandard", "tqdm")]
    assert lines == [f"torch=={torch}", f"numpy=={versions['numpy']}", *others]
    run = finished.read_run(made / "7")
    run.settings[0]["compressor"] = "ans"
    run.trained["versions"] |= dict(torch="2.9.1+cu128", numpy="1.2.3", attention="fa2")
    names = [line.partition("==")[0] for line in submit.requirements(record.folder, run).splitlines()]
    assert submit.requirements(record.folder, run).startswith("torch==2.9.1\nnumpy==1.2.3\n")
    assert sorted(names) == ["constriction", "flash-attn", "numpy", "sentencepiece", "torch", "tqdm"]


def test_runs_without_an_evaluator_in_the_other_track(runs, tmp_path):
    """The trainer's sliding score; times over the limit are allowed there."""
    for run in runs:
        for path in run.rglob("eval_ttt.[jl]*"):
            path.unlink()
        change(run, r'"train_seconds": [\d.]+', '"train_seconds": 700.5')
    done = start(runs, tmp_path / "out", "--track", "track_non_record_16mb")
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "out/track_non_record_16mb").iterdir()
    claims, readme = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    scores = [round(last_result(run / "train.log")["val_bpb_sliding"], 8) for run in runs]
    assert (
        claims["val_bpb"] == pytest.approx(mean(scores), abs=5.1e-9) and claims["track"] == "non_record_16mb"
    )
    assert "0.005 nats per token over a record is not shown" in readme and "comparison" not in claims
    assert (
        "no adaptation at evaluation" in readme and "eval_ttt.py \\" not in readme and "## What" not in readme
    )


# ------------------------------------------------------------------------------------------------------------
# Refusals
# ------------------------------------------------------------------------------------------------------------


def resize(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    # the whole number: another may begin with its digits
    change(run, rf"\b{result['bytes_total']}\b", "16000001")
    change(run, rf"\b{result['bytes_model']}\b", str(16_000_001 - result["bytes_code"]))


def recode(run: Path) -> None:
    """Other code, which the run's files know of."""
    path = run / "source/train_gpt.py"
    before = train_gpt.sha256_file(path)
    path.write_bytes(path.read_bytes().replace(b"bits per byte", b"bytes per bit", 1))
    change(run, before, train_gpt.sha256_file(path))


def illegal(run: Path) -> None:
    change(run, "legal_ttt_exact", "invalid_ttt_exact")
    change(run, '"legal": true', '"legal": false', "eval_ttt.json eval_ttt.log")


REFUSED = {  # what is done to the run of seed 42, words of the reason
    "failed": (lambda run: (run / "result.json").unlink(), "42 is not a finished run: no result.json"),
    "evaluation died": (lambda run: [path.unlink() for path in run.rglob("eval_ttt.json")],
        "42 is not a finished run: no eval/doc_banks/eval_ttt.json"),
    "no log": (lambda run: (run / "train.log").unlink(), "not a finished run: no train.log"),
    "a part of a result": (lambda run: (run / "result.json").write_text('{"fits": true}'),
        "lacks val_bpb_sliding"),
    "cut JSON": (lambda run: (run / "result.json").write_text("{"),
        "result.json is not a JSON object: Expecting"),
    "no RESULT": (lambda run: change(run, "(?m)^RESULT .*", "", "train.log"),
        "its log does not report seed, world"),
    "older result": (lambda run: change(run, '"world_size"', '"ranks"'),
        "its log does not report world_size"),
    "edited": (lambda run: change(run, '"steps": 4', '"steps": 5', "result.json"), "matches result.json"),
    "over the cap": (resize, "42: sizes: 16000001 bytes (in the log), 1 over 16000000"),
    "training too long for the main track": (
        lambda run: change(run, r'"train_seconds": [\d.]+', '"train_seconds": 600.1'),
        "42: train time: over 600 s: 600.100 s"),
    "evaluation too long for the main track": (
        lambda run: change(run, r'"eval_seconds": [\d.]+', '"eval_seconds": 600.1'),
        "42: eval time: over 600 s: 600.1 s"),
    "illegal": (illegal, "42: legality: "),
    "audit failed": (
        lambda run: (run / EVALUATED).with_name("certificate.txt").write_text("certificate: NOT LEGAL\n"),
        "legality"),
    "audited with another rate": (
        lambda run: [certify(run), change(run, '"ttt_lr": 0.002', '"ttt_lr": 0.5', "certificate.json")],
        "audited with ttt_lr 0.5, scored with 0.002"),
    "one certificate": (lambda run: certify(run.with_name("7")) or shutil.copyfile(*(
        (each / EVALUATED).with_name("certificate.json") for each in (run.with_name("7"), run))),
        "another artifact"),
    "the artifact of another seed": (lambda run: change(
        run, train_gpt.sha256_file(run / "final_model.int6.ptz"),
        train_gpt.sha256_file(run.with_name("7") / "final_model.int6.ptz")),
        "seeds 7, 42 have the same artifact"),
    "losses altered": (
        lambda run: np.save(path := (run / EVALUATED).with_name("nll.npy"), np.load(path) + np.float32(1e-4)),
        "nll.npy"),
    "other code": (recode, "differ in code: train_gpt.py "),
    "code edited later": (lambda run: (run / "source/eval_ttt.py").write_text("pass\n"),
        "42: code: eval_ttt.py as shipped is not what ran"),
    "no code": (lambda run: shutil.rmtree(run / "source"), "42 is not a finished run: no source"),
    "other settings": (lambda run: change(run, "MATRIX_LR=0.025", "MATRIX_LR=0.5"),
        "differ in settings: matrix_lr 0.025 and 0.5"),
    "other evaluation": (lambda run: change(run, '"ttt_lr": 0.002', '"ttt_lr": 0.5', "eval_ttt.*"),
        "differ in evaluation: ttt_lr 0.002 and 0.5"),
    "not evaluated": (
        lambda run: [path.unlink() for path in run.rglob("eval_ttt.[jl]*")], "differ in evaluation"),
    "other text": (
        lambda run: change(run, r'(?s)\A(.*?"val_bpb_roundtrip": )[\d.]+', r"\g<1>9.5", "eval_ttt.*"),
        "42: log: trainer and evaluator scored different texts, val_bpb_roundtrip is "),
    "another text": (lambda run: change(run, r'("fineweb_val_000000.bin": ")[0-9a-f]', r"\1x"),
        "differ in text: "),
    "another seed's": (lambda run: shutil.rmtree(run) or shutil.copytree(run.with_name("7"), run),
        "seed 7 occurs twice"),
}  # fmt: skip


@pytest.fixture
def no_tree(monkeypatch):
    """Leave out the scan of the programs: it takes most of a check's time, and no fault here concerns it."""
    monkeypatch.setattr(check, "RULES", tuple(rule for rule in check.RULES if rule[0] != "syntax tree"))


@pytest.mark.parametrize("fault, words", REFUSED.values(), ids=REFUSED)
def test_refused(runs, tmp_path, no_tree, request, fault, words):
    fault(runs[1])
    track = ["--track", "track_10min_16mb"] if "main track" in request.node.callspec.id else []
    done = start(runs, tmp_path / "out", *track)
    assert done.code == 1 and words in done.err and not (tmp_path / "out").exists()
    assert all(line.startswith("refused: ") for line in done.err.splitlines())


def test_too_few_and_the_same_run_twice(runs, tmp_path, no_tree):
    done = start([*runs[:2], runs[0]], tmp_path / "out")
    assert (
        done.code == 1
        and "seed 7 occurs twice: " in done.err
        and "2 finished runs with distinct seeds; at least 3" in done.err
    )


def test_every_reason_is_said(runs, tmp_path, no_tree):
    illegal(runs[0])
    resize(runs[1])
    (runs[2] / "result.json").unlink()
    done = start(runs, tmp_path / "out")
    for said in (
        "7: legality",
        "42: sizes",
        "1337 is not a finished run",
        "2 finished runs with distinct seeds",
    ):
        assert said in done.err


def test_a_run_over_the_cap_that_would_fit_packed_is_told_how(runs, tmp_path, no_tree):
    resize(runs[1])
    change(runs[1], r'"bytes_total_packed": \d+', '"bytes_total_packed": 15900000')
    done = start(runs, tmp_path / "out")
    assert (
        done.code == 1 and "42: sizes: packed it would be 15900000 bytes. Train with the packed" in done.err
    )


def test_an_evaluation_that_is_not_there(runs, tmp_path, no_tree):
    done = start(runs, tmp_path / "out", "--mode", "lora")
    assert done.code == 1 and f"refused: {runs[0]}: no evaluation lora. There is: doc_banks." in done.err


def into_modes(run: Path) -> None:
    """Beside the evaluation in eval/doc_banks put one of doc_lora, its losses 1.25 times as high."""
    certify(run)
    other = shutil.copytree(run / "eval/doc_banks", run / "eval/doc_lora")
    for name in ("eval_ttt.log", "eval_ttt.json", "certificate.json"):
        text = (other / name).read_text().replace('"ttt_mode": "doc_banks"', '"ttt_mode": "doc_lora"')
        for score in (
            '"val_\\w+_ttt": ',
            "legal_ttt\\w* val_loss:",
            r"legal_ttt\w* val_loss:[\d.]+ val_bpb:",
        ):
            text = re.sub(rf"({score})([\d.]+)", lambda m: f"{m[1]}{1.25 * float(m[2]):.12f}", text)
        (other / name).write_text(text)


def test_the_named_evaluation_is_submitted_or_the_last_legal_one(runs, tmp_path, no_tree, no_start):
    scores = [last_result(run / EVALUATED)["val_bpb_ttt"] for run in runs]
    for run in runs:
        into_modes(run)
    for mode, factor in (("", 1), ("doc_banks", 1), ("doc_lora", 1.25)):
        out = tmp_path / f"out_{mode}"
        if mode == "doc_lora":
            assert "nll.npy gives" in start(runs, out, "--mode", mode).err  # its losses are doc_banks'
            for run in runs:
                (run / "eval/doc_lora/nll.npy").unlink()
        done = start(runs, out, "--mode", mode)
        assert done.code == 0, done.err
        claims = json.loads(next(out.glob("*/*/submission.json")).read_text())
        found = [entry["val_bpb"] for entry in claims["seed_results"].values()]
        assert found == pytest.approx([factor * score for score in scores], abs=1e-8)
        assert len(list(out.glob("*/*/certificate_seed*.json"))) == 3
        assert f"TTT_MODE={mode or 'doc_banks'}, " in next(out.glob("*/*/README.md")).read_text()


INPUT = {
    "name with a slash": (["--name", "../x"], "--name '../x'"),
    "nothing to compare with": (["--against", "absent"], "--against absent: no log shows"),
    "no score": (["--against", "nan"], "--against nan: no log shows"),
    "a mean on another text": (["--against", "1.1147"], "--against 1.1147: no log shows that it is of the"),
    "no name": (["--name", ""], "--name are required"),
    "no such text": (["--what", "notes/what.md"], "--what notes/what.md: no such file"),
    "significant against nothing": (["--require-significance"], "needs --against"),
}


@pytest.mark.parametrize("more, words", INPUT.values(), ids=INPUT)
def test_what_the_user_can_put_right(runs, tmp_path, no_tree, more, words):
    done = start(runs, tmp_path / "out", *more)
    assert done.code == 2 and done.err.startswith("error: ") and words in done.err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_absent_run(runs, tmp_path, no_tree):
    done = start([*runs, tmp_path / "absent"], tmp_path / "out")
    assert done.code == 2 and "absent: no such folder" in done.err


# ------------------------------------------------------------------------------------------------------------
# All or nothing
# ------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(record, made):
    before = snapshot(record.out)
    done = start([made / str(seed) for seed in SEEDS], record.out)
    assert done.code == 2 and "already exists" in done.err and snapshot(record.out) == before


@pytest.mark.parametrize("stage", ["readme", "smoke_start", "requirements"])
def test_what_dies_half_way_leaves_nothing(runs, tmp_path, no_tree, monkeypatch, stage):
    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, stage, die)
    with pytest.raises(KeyboardInterrupt):
        start(runs, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_fails_the_check_is_not_put_in_place(runs, tmp_path, no_tree, monkeypatch):
    right = submit.submission
    monkeypatch.setattr(submit, "submission", lambda *args: right(*args) | {"val_bpb": 1.0})
    done = start(runs, tmp_path / "out")
    assert (
        done.code == 1
        and "refused: claims: val_bpb is 1.0" in done.err
        and not list((tmp_path / "out").iterdir())
    )


def test_a_folder_whose_trainer_does_not_start(record, made, tmp_path):
    run = finished.read_run(made / "7")
    (tmp_path / "train_gpt.py").write_text("import os\nraise SystemExit(os.environ['ITERATIONS'])")
    with pytest.raises(finished.Refused, match="--describe fails: 4"):
        submit.smoke_start(tmp_path, run)
    assert "__pycache__" not in {path.name for path in record.folder.iterdir()}


# ------------------------------------------------------------------------------------------------------------
# Pages written again
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_start(monkeypatch):
    """Without the start of the folder's program, which other tests see."""
    monkeypatch.setattr(submit, "smoke_start", lambda folder, run: None)


@pytest.fixture
def copy(record, tmp_path, no_tree) -> Path:
    """The record, to do things to, beside the one that it is compared with."""
    return Path(shutil.copytree(record.folder.parent, tmp_path / "records" / TRACK), record.folder.name)


def regenerate(folder: Path, *more: str) -> SimpleNamespace:
    return quiet(submit.main, ["--regenerate", str(folder), *more])


def test_pages_are_written_again_from_the_logs(record, copy):
    """Whatever a hand has done to them, and though the runs are gone; nothing else is touched."""
    (copy / "README.md").unlink()
    spoilt = json.loads((copy / "submission.json").read_text()) | {
        "val_bpb": 1.0,
        "seeds": [1],
        "bytes_total": None,
    }
    (copy / "submission.json").write_text(json.dumps(spoilt))
    done = regenerate(copy)
    assert done.code == 0 and snapshot(copy) == snapshot(record.folder), done.err
    assert {path.name for path in copy.parent.iterdir()} == {copy.name, OLD}


def test_what_a_person_says_can_be_changed(record, made, copy, no_start):
    scores, text = dict(zip(SEEDS, (9.1, 9.2, 9.3), strict=True)), text_of(made / "7")
    old = write_logs(copy.parent / "2026-01-02_Old", scores, text)
    changed = ("--author", "B", "--what", "Other words.\n\nAnd more.", "--against", old)
    assert regenerate(copy, *changed, "--require-significance").code == 0
    claims, text = json.loads((copy / "submission.json").read_text()), (copy / "README.md").read_text()
    same = {
        key: value for key, value in record.claims.items() if key not in ("author", "comparison", "blurb")
    }
    assert claims == same | {
        key: claims[key] for key in ("author", "comparison", "blurb", "technique_summary")
    }
    assert (claims["author"], claims["blurb"], claims["date"]) == ("B", "Other words.", record.claims["date"])
    assert claims["comparison"]["against"] == "2026-01-02_Old" and claims["comparison"]["significant"] is True
    assert "at p < 0.01 is shown (Welch: p = " in text and "And more." in text
    before = snapshot(copy)
    assert regenerate(copy).code == 0 and snapshot(copy) == before  # finds the other record by its name
    shutil.rmtree(old)
    done = regenerate(copy)
    assert done.code == 2 and "2026-01-02_Old: must be a folder" in done.err and snapshot(copy) == before


def test_the_other_record_may_be_the_example(copy, tmp_path):
    """One level deeper than the records, of this repository too: submission.json has the name alone."""
    before, example = snapshot(copy), tmp_path / "records/example" / TRACK
    example.mkdir(parents=True)
    (copy.parent / OLD).rename(example / OLD)
    assert regenerate(copy).code == 0 and snapshot(copy) == before
    example = ROOT / "records/example" / TRACK / "2026-11-28_Example"
    assert submit.named_record(example.name, tmp_path / "records") == str(example)


def altered(folder: Path) -> None:
    change(folder, r'"val_bpb_ttt": [\d.]+', '"val_bpb_ttt": 1.5', "train_seed42.log")


UNWRITTEN = {  # what is done to the record, exit code, words
    "a score altered": (altered, 1, "refused: log: train_seed42.log: RESULT has val_bpb_ttt 1.5"),
    "a log less": (lambda folder: (folder / "train_seed42.log").unlink(), 1,
        "refused: legality: certificate_seed42: for another artifact"),
    "other code": (lambda folder: (folder / "train_gpt.py").write_text("pass\n"), 1,
        "refused: code: train_gpt.py"),
    "another program's log": (lambda folder: write_logs(folder / "logs", {42: 1.2}) and shutil.copy(
        folder / "logs/train_seed42.log", folder), 1, "train_seed42.log: its log does not report seed"),
    "no logs": (lambda folder: [path.unlink() for path in folder.glob("*.log")], 2, "no folder with logs"),
    "no name": (lambda folder: (folder / "submission.json").unlink(), 2, "--name"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, code, words", UNWRITTEN.values(), ids=UNWRITTEN)
def test_pages_that_cannot_be_written_again_stay(copy, no_start, spoil, code, words):
    spoil(copy)
    before = snapshot(copy)
    done = regenerate(copy)
    assert done.code == code and words in done.err and snapshot(copy) == before


# ------------------------------------------------------------------------------------------------------------
# A stranger's folder
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def starts(monkeypatch) -> list[SimpleNamespace]:
    """The processes that submit.py would start, with their environment; none is started."""
    found = []
    monkeypatch.setattr(
        submit.subprocess, "run", lambda words, **how: found.append(SimpleNamespace(words=words, **how))
    )
    return found


def test_a_strangers_program_is_started_only_when_asked(copy, starts):
    assert regenerate(copy).code == 0 and not starts
    assert regenerate(copy, "--run-its-code").code == 0 and len(starts) == 1
    assert starts[0].words[1:] == ["train_gpt.py", "--describe"]


OWN = {  # what is done to the runs, and whether their code is still this repository's
    "ours": (lambda run: None, True),
    "other code": (recode, False),
    "a module beside it": (lambda run: (run / "source/torch.pyc").write_bytes(b"x"), False),
}


@pytest.mark.parametrize("spoil, own", OWN.values(), ids=OWN)
def test_a_strangers_runs_are_started_only_when_asked(runs, tmp_path, no_tree, starts, spoil, own):
    for run in runs:
        spoil(run)
    done = start(runs, tmp_path / "out")
    assert done.code == 0 and len(starts) == own and ("note: no code" in done.out) == (not own), done.err
    done = start(runs, tmp_path / "again", "--run-its-code")
    assert done.code == 0 and len(starts) == own + 1 and "note: no code" not in done.out


FOREIGN_NAMES = (
    "PYTHONPATH",
    "LD_PRELOAD",
    "PATH",
    "PYTHONSTARTUP",
    "BASH_ENV",
    "IGNORE_ENV",
    "RECIPE",
    "path",
)


def test_only_our_own_settings_are_taken_from_a_log(copy, starts):
    lines = "".join(f"  {name}=/x/{name} (given)\n" for name in FOREIGN_NAMES)
    for log in copy.glob("train_seed*.log"):
        log.write_text(lines + log.read_text())
    assert regenerate(copy, "--run-its-code").code == 0
    ours = {name.upper() for name in vars(train_gpt.Config())}
    assert set(starts[0].env) - ours <= {
        "PATH",
        "HOME",
        "LANG",
        "TMPDIR",
        "VIRTUAL_ENV",
        "PYTHONDONTWRITEBYTECODE",
    }
    assert "ITERATIONS" in starts[0].env and not [value for value in starts[0].env.values() if "/x/" in value]
    assert "ITERATIONS=" in (text := (copy / "README.md").read_text()) and "/x/" not in text


@pytest.mark.parametrize(
    "against", ["/usr", "..", ".", "../..", "../../outside", "out", "*", "2026*", "\x1b[2J", 7, []]
)
def test_a_comparison_reads_nothing_outside_the_records(copy, tmp_path, no_start, against):
    write_logs(tmp_path / "outside", dict(zip(SEEDS, (9.1, 9.2, 9.3), strict=True)))
    (copy.parent / "out").symlink_to(tmp_path / "outside")
    claims = json.loads((copy / "submission.json").read_text())
    claims["comparison"]["against"] = against
    (copy / "submission.json").write_text(json.dumps(claims))
    before = snapshot(copy)
    done = regenerate(copy)
    if against == []:  # nothing
        assert done.code == 0
    else:  # 7 is a mean
        words = "no log shows that it is of" if against == 7 else "must be a folder of"
        assert done.code == 2 and words in done.err and "\x1b" not in done.err
        assert snapshot(copy) == before


def test_links_are_not_packed(runs, tmp_path, no_tree):
    (tmp_path / "secret").write_text("secret")
    (runs[1] / "source/more.env").symlink_to(tmp_path / "secret")
    (runs[2] / EVALUATED).with_name("certificate.txt").symlink_to(tmp_path / "secret")
    for run, name in ((runs[1], "more.env"), (runs[2], "certificate.txt")):
        done = start(runs, tmp_path / "out")
        assert done.code == 1 and f"{name} is a link" in done.err and not (tmp_path / "out").exists()
        next(run.rglob(name)).unlink()


def test_links_of_a_record_are_not_copied(copy, tmp_path):
    (copy / "all").symlink_to("/")
    done = regenerate(copy)
    assert done.code == 1 and "all is a link" in done.err


def test_escape_codes_reach_neither_terminal_nor_page(copy, no_start):
    for log in copy.glob("train_seed*.log"):
        log.write_text(
            log.read_text()
            .replace("(given)", "\x1b[2J (given)", 3)
            .replace('"gpu": "', '"gpu": "\\u001b[2J\u202e')
        )
    claims = json.loads((copy / "submission.json").read_text())
    claims |= dict(author="A\x1b]0;x\x07", name="N\x9b", technique_summary="one\ntwo\r\x08")
    (copy / "submission.json").write_text(json.dumps(claims))
    done = regenerate(copy)
    assert done.code == 0, done.err
    written = [(copy / name).read_text() for name in ("README.md", "submission.json")]
    for text in (done.out, done.err, *written):
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"]
    assert "one\ntwo\\u000d" in written[0] and json.loads(written[1])["name"] == "N\x9b"
    assert "\\u001b" in submit.table(copy.parent.parent)


def test_a_page_names_no_file_that_is_read(copy, no_start):
    claims = json.loads((copy / "submission.json").read_text()) | dict(
        technique_summary=str(ROOT / "pyproject.toml")
    )
    (copy / "submission.json").write_text(json.dumps(claims))
    assert regenerate(copy).code == 0 and "[tool." not in (copy / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------


def facts(seed: int, bpb: float) -> SimpleNamespace:
    score = check.Score("legal_ttt_exact", bpb * math.log(2) / RATIO, bpb, 1.0, 8, "line")
    return SimpleNamespace(facts=check.LogFacts([Path("log")], seed=seed, headline=score, val_tokens=TARGETS))


def write_logs(folder: Path, scores: dict[int, float], text: tuple[int, float] = (TARGETS, RATIO)) -> str:
    """Write a record's logs, with scores on a text of so many targets and tokens per byte."""
    folder.mkdir()
    targets, ratio = text
    for seed, bpb in scores.items():
        head = f"model_params:1\nseed:{seed}\nevaluation order: the file's; targets:{targets}\n"
        step = "step:1/1 train_loss:1.0 train_time:9ms step_avg:9.00ms\n"
        line = f"legal_ttt_exact val_loss:{bpb * math.log(2) / ratio:.8f} val_bpb:{bpb:.8f}\n"
        (folder / f"train_seed{seed}.log").write_text(head + step + line)
    return str(folder)


def test_statistics_against_scipy(tmp_path):
    """#1019 against #549 with seeds that partly match; bpb and nats."""
    old = dict(zip((314, 42, 2025), PR549, strict=True))
    new = dict(zip((314, 42, 999), PR1019, strict=True))
    found = submit.compare([facts(*pair) for pair in new.items()], write_logs(tmp_path / "old", old))
    rows = {name: (margin, test) for name, margin, test in found.rows}
    assert found.bpb == pytest.approx(mean(PR549) - mean(PR1019), abs=1e-12)
    assert found.factor == pytest.approx(math.log(2) / RATIO) and found.other == "old"
    margin = 0.005 / found.factor
    for unit in (1.0, found.factor):
        ours, theirs = unit * np.array(PR1019), unit * np.array(PR549)
        expected = {
            "Welch": stats.ttest_ind(ours, theirs, equal_var=False, alternative="less"),
            "2 pairs of seeds": stats.ttest_rel(ours[:2], theirs[:2], alternative="less"),
            "one sample against the mean": stats.ttest_1samp(ours, theirs.mean(), alternative="less"),
            "the same less 0.005 nats": stats.ttest_1samp(
                ours, theirs.mean() - unit * margin, alternative="less"
            ),
        }
        assert list(rows) == list(expected)
        for name, known in expected.items():
            assert rows[name][1][1:] == pytest.approx((known.statistic, known.df, known.pvalue))
    welch = rows["Welch"][1]
    assert (round(welch.t, 2), round(welch.df, 2)) == (-11.83, 3.31)
    assert [margin for margin, _ in rows.values()] == pytest.approx([0, 0, 0, 0.005 * RATIO / math.log(2)])
    entry, text = submit.comparison_keys(found), submit.comparison_text(found)
    assert (entry["delta_bpb"], entry["tests"][0]["t"]) == (pytest.approx(-found.bpb, abs=1e-8), -11.83)
    assert text.startswith("0.00784 nats = 0.00464 bpb better than old. A gain of ")
    assert ["Welch", "-0.007842", "-0.004645", "-11.83", "3.31", "0.0004"] in table_rows(text)
    worse = submit.compare([facts(*pair) for pair in old.items()], write_logs(tmp_path / "new", new))
    text = submit.comparison_text(worse)
    assert text.startswith("0.00784 nats = 0.00464 bpb worse than new. A gain of ")
    for _, nats, bpb, t, _, p in table_rows(text)[1:]:
        assert min(float(nats), float(bpb), float(t)) > 0 and float(p) > 0.5


def test_the_checkers_words_have_the_sign_of_the_gain(tmp_path, capsys):
    old, new = (write_logs(tmp_path / name, dict(zip(SEEDS, scores, strict=True)))
                for name, scores in (("old", PR549), ("new", PR1019)))  # fmt: skip
    for paths, words in (((new, old), "better than old"), ((old, new), "worse than new")):
        check.main([paths[0], "--against", paths[1], "--json"])
        (found,) = json.loads(capsys.readouterr().out)
        (verdict,) = [each for each in found["verdicts"] if each["rule"] == "significance"]
        sign = "-" * words.startswith("better")
        assert f"0.00784 nats = 0.00464 bpb {words} (t below 0: better)" in verdict["evidence"]
        assert f"Welch t={sign}11.83 " in verdict["evidence"]


@real_logs
def test_statistics_against_a_real_record():
    new = [
        SimpleNamespace(facts=check.read_log(path)) for path in next(LOGS.glob("2026-03-25*")).glob("*.log")
    ]
    found = submit.compare(new, str(next(LOGS.glob("2026-03-23*"))))
    assert [(name, round(test.t, 2), round(test.df, 2)) for name, _, test in found.rows[:1]] == [
        ("Welch", -11.83, 3.31)
    ]
    assert "2 pairs" not in submit.comparison_text(found)  # one seed in common is no pair to test


def test_a_published_mean(tmp_path):
    """As a number, or of a folder whose logs have one score or none."""
    ours = [facts(*pair) for pair in zip(SEEDS, PR1019, strict=True)]
    known = stats.ttest_1samp(PR1019, 1.1194, alternative="less")
    folder = write_logs(tmp_path / "one", {1: 1.2})
    (tmp_path / "one/submission.json").write_text('{"val_bpb": 1.1194}')
    for against in ("1.1194", folder):
        found = submit.compare(ours, against)
        assert found.rows[0][2][1:] == pytest.approx((known.statistic, known.df, known.pvalue))
        assert len(found.rows) == 2 and found.bpb == pytest.approx(1.1194 - mean(PR1019))
    (tmp_path / "one/submission.json").unlink()
    for words in ("must be a record folder with scores", "is no record"):  # one score, or none, and no mean
        with pytest.raises(ValueError, match=words):
            submit.compare(ours, folder)
        (tmp_path / "one/train_seed1.log").unlink(missing_ok=True)
    for claims in ("{}", '{"val_bpb": 1.1194, "challenge_run": false}'):
        (tmp_path / "one/submission.json").write_text(claims)
        with pytest.raises(ValueError, match=r"must be a record folder|no log shows"):
            submit.compare(ours, folder)


def test_records_of_different_texts_are_not_compared(tmp_path):
    ours = [facts(*pair) for pair in zip(SEEDS, PR1019, strict=True)]
    demo = write_logs(tmp_path / "demo", {1: 1.2, 2: 1.3}, (60_700, 0.37))
    words = "this and demo were scored on different validation texts: 151,080,8.. and 164,054 bytes"
    with pytest.raises(ValueError, match=words):
        submit.compare(ours, demo)


def test_significance_is_the_margin_passed_in_nats(tmp_path):
    ours = [facts(*pair) for pair in zip(SEEDS, PR1019, strict=True)]
    factor, verdicts = math.log(2) / RATIO, set()
    for against in np.linspace(mean(PR1019), mean(PR1019) + 0.008, 60):
        test = stats.ttest_1samp(factor * np.array(PR1019), factor * against - 0.005, alternative="less")
        found = submit.compare(ours, f"{against:.12f}")
        assert found.shown == submit.comparison_keys(found)["significant"] == (test.pvalue < 0.01)
        assert f"is {'' if found.shown else 'not '}shown" in submit.comparison_text(found)
        verdicts.add(found.shown)
    assert verdicts == {True, False}
    # its mean is beaten, by luck for all we know
    noisy = write_logs(tmp_path / "noisy", {1: 1.12, 2: 1.18, 3: 1.24})
    test = stats.ttest_1samp(PR1019, 1.18 - 0.005 / factor, alternative="less")
    assert (
        test.pvalue
        < 0.01
        < stats.ttest_ind(PR1019, (1.12, 1.18, 1.24), equal_var=False, alternative="less").pvalue
    )
    assert not submit.compare(ours, noisy).shown


def test_a_gain_that_is_not_shown_is_refused_when_it_is_required(runs, tmp_path, no_tree, no_start):
    for name, bpb, code, said in (
        ("good", 3.5, 1, "refused: A gain of 0.005 nats per token at p < 0.01 is not shown"),
        ("bad", 9, 0, ""),
    ):
        scores = {seed: bpb + seed / 1e5 for seed in SEEDS}
        old = write_logs(tmp_path / name, scores, text_of(runs[0]))
        done = start(runs, tmp_path / "out", "--against", old, "--require-significance")
        assert done.code == code and said in done.err
        assert (not list((tmp_path / "out").iterdir())) == bool(code)


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_equal_scores_are_no_number_in_json():
    found = submit.compare([facts(seed, 1.1) for seed in SEEDS], "1.1")
    told = json.dumps(submit.comparison_keys(found))
    assert "NaN" not in told and "Infinity" not in told


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------


def test_the_table(record, tmp_path):
    out = tmp_path / "records"
    shutil.copytree(record.folder, out / "track_non_record_16mb" / record.folder.name)
    better = out / "track_non_record_16mb/2026-01-01_Better"
    better.mkdir()
    for name, text in (
        ("Broken", "{"),
        ("Odd", '{"val_bpb": null, "seeds": {"1": {}, "2": {}}, "bytes_total": "?"}'),
    ):
        other = out / f"track_non_record_16mb/2026-01-01_{name}"
        other.mkdir()
        (other / "submission.json").write_text(text)
    (better / "submission.json").write_text('{"name": "a|b", "val_bpb": 1.5, "date": "2026-01-01T10:00:00Z"}')
    page = "# Records\n\nBefore.\n\n{}\nold\n{}\n\nAfter.\n"
    (out / "README.md").write_text(page.format(*submit.MARKERS))
    for _ in range(2):  # the second changes nothing
        assert quiet(submit.main, ["--table", "--out", str(out)]).code == 0
        text = (out / "README.md").read_text()
        head, first, second, *rest = table_rows(text)
        assert (
            text.startswith("# Records\n\nBefore.\n\n<!--")
            and text.endswith("-->\n\nAfter.\n")
            and "old" not in text
        )
    assert first == ["track_non_record_16mb", "2026-01-01", "[a/b](track_non_record_16mb/2026-01-01_Better)",
                     "1.500000", "-", "-", "-", "-", "-"]  # fmt: skip
    assert [(row[2].partition("]")[0], row[3:8]) for row in rest] == [
        ("[2026-01-01_Broken", ["-"] * 5), ("[2026-01-01_Odd", ["-", "-", "-", "2", "-"])
    ]  # fmt: skip
    named = dict(zip(head, second, strict=True))
    claims = record.claims
    assert (
        float(named["val_bpb"]) == round(claims["val_bpb"], 6)
        and named["bytes"] == f"{claims['bytes_total']:,}"
    )
    assert (named["seeds"], named["author"]) == ("3", "A") and record.folder.name in named["record"]


@pytest.mark.parametrize("text", [None, "no markers", "{1} {0}", "{0} {0} {1}"])
def test_a_page_without_a_place_for_the_table(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text.format(*submit.MARKERS))
    before = snapshot(tmp_path)
    done = quiet(submit.main, ["--table", "--out", str(tmp_path)])
    assert done.code == 2 and "must contain the lines" in done.err and snapshot(tmp_path) == before


def test_the_page_of_this_repository_is_up_to_date():
    text = (ROOT / "records/README.md").read_text()
    assert f"{submit.MARKERS[0]}\n\n{submit.table(ROOT / 'records')}\n\n{submit.MARKERS[1]}" in text
