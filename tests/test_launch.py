"""The plan of launch.py: its numbers against hand-computed ones, and its script run for real on a CPU."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import launch
import plan
import pytest
from conftest import ROOT, inherited
from torch.distributed.run import get_args_parser

PAGE = ROOT / "records/guide/eight_gpus.md"
RECIPES = ROOT / "records/recipes"
TARGETS = 62_021_845  # of the published validation text, sp1024
ALONE = 'launch() { python "$@"; }\nexport -f launch\n'  # one process, without torchrun


def started(*arguments: str, cwd: Path = ROOT, **settings: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "records/launch.py"), *arguments]
    environ = {**inherited(), "OMP_NUM_THREADS": "1", **settings}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture
def printed(capsys, monkeypatch):
    """A function that runs launch.py's command line in this process; returns its exit code and output."""

    def printed(*arguments: str, **settings: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            code = launch.main(list(arguments))
        return code, capsys.readouterr().out

    return printed


def planned(*arguments: str, **settings: str) -> tuple[plan.Case, list[plan.Step]]:
    case = plan.make_case(plan.parse(arguments), settings)
    return case, plan.steps_of(case)


def part(steps, step: str, name: str) -> float:
    (seconds,) = [p.seconds for s in steps if s.name == step for p in s.parts if p.name == name]
    return seconds


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Plan in an empty folder: what is in this checkout's runs/ and data/ must not count as done."""
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# The numbers
# ------------------------------------------------------------------------------------------------------------


def test_the_plan_of_pr1019_by_hand():
    case, steps = planned(str(RECIPES / "pr1019.env"))
    assert plan.ms_per_step(case).seconds == pytest.approx(616.0616 / 8, abs=1e-3)
    # statistics: 147.307 s on the clock less 143.09 s at the last step, on one GPU
    assert plan.steps_on_clock(case)[0] == int((600 - 4.217445 / 8) / 0.0770077) == 7784
    assert part(steps, "train_seed1337", "compile") == pytest.approx(79.146, abs=1e-3)
    assert part(steps, "train_seed42", "cached compile") == pytest.approx(79.146 * 6.5 / 37.95, abs=1e-3)
    assert part(steps, "train_seed1337", "score") == pytest.approx(4.09944 * TARGETS / 356_341 / 8, rel=1e-4)
    # validation at steps 0 and 4000, and the artifact's: three passes of 1/32 of the sliding windows
    assert part(steps, "train_seed1337", "validation") == pytest.approx(3 * 89.19 / 32, abs=0.01)
    adapted = TARGETS / 9898.361 / 8
    assert part(steps, "evaluate_seed42", "adapted") == pytest.approx(adapted, rel=1e-5)
    assert part(steps, "evaluate_seed42", "start and prior") == pytest.approx(78.2341 - 36, abs=1e-3)
    # 99.81 - 78.23 s after the adapted score; without documents 33.9 - 23.03
    unadapted = (99.81 - 78.23413) - (33.9 - 23.02761)
    assert part(steps, "evaluate_seed42", "unadapted windows") == pytest.approx(
        unadapted * TARGETS / 356_341 / 8, rel=1e-4
    )
    assert part(steps, "audit_seed42", "audit") == pytest.approx(
        3 * 42.2341 + (30 + 64) * 8192 / 9898.361, abs=1e-2
    )
    assert part(steps, "data", "download") == pytest.approx(
        (80 * (200_000_000 + 1024) + 2 * TARGETS) / 100e6, rel=1e-4
    )


def test_gpus_groups_and_parameters_scale_the_estimates():
    def adapted(*arguments, **settings):
        return part(planned(*arguments, **settings)[1], "evaluate_seed42", "adapted")

    pr1019 = str(RECIPES / "pr1019.env")
    assert adapted(pr1019, "--gpus", "4") == pytest.approx(2 * adapted(pr1019))
    assert adapted(pr1019, TTT_GROUPS="4") == pytest.approx(2 * adapted(pr1019))  # four GPUs have no work
    assert adapted(pr1019, TTT_MODE="all", TTT_GROUPS="1") == pytest.approx(TARGETS / 29_208.28 / 8, rel=1e-4)
    one, two = (
        plan.ms_per_step(planned(str(RECIPES / name))[0]).seconds for name in ("pr1019.env", "grown.env")
    )
    tg = launch.trainer()
    described = [tg.described("describe", tg.load_config({"RECIPE": str(RECIPES / name)})[0])
                 for name in ("pr1019.env", "grown.env")]  # fmt: skip
    flops = [int(re.search(r"flops_per_token:(\d+)", text)[1]) for text in described]
    assert two / one == pytest.approx(flops[1] / flops[0])


def test_the_rows_of_the_table_follow_each_other_and_add_up(printed):
    code, said = printed("plan", str(RECIPES / "pr549.env"), "--price", "2.50", "--budget", "30")
    assert code == 0
    rows = re.findall(r"(?m)^ +(\d+:\d\d:\d\d) +(\d+:\d\d:\d\d) +(\d+)  (\w+):", said)
    assert [row[3] for row in rows[:4]] == ["environment", "data", "preflight", "pack"]
    assert [row[3] for row in rows[-4:]] == ["check_seed1337", "check_seed42", "check_seed2025", "submit"]

    def seconds(text: str) -> int:
        hours, minutes, rest = map(int, text.split(":"))
        return 3600 * hours + 60 * minutes + rest

    for before, row in pairwise(rows):
        assert row[0] == before[1]
    for start, end, took, _ in rows:
        assert abs(seconds(end) - seconds(start) - int(took)) <= 1  # rounded
    total = seconds(rows[-1][1])
    hours, cost = re.search(r"total: \S+ of 2:00:00, ([\d.]+) GPU-hours, ([\d.]+) at 2.50", said).groups()
    assert float(hours) == pytest.approx(8 * total / 3600, abs=0.01)
    assert float(cost) == pytest.approx(2.5 * 8 * total / 3600, abs=0.02)


def test_what_does_not_fit_and_what_to_drop(printed):
    arguments = ("plan", str(RECIPES / "pr1019.env"), "--minutes", "70", "--price", "3", "--budget", "20")
    code, said = printed(*arguments)
    assert code == 1
    assert re.search(r"DOES NOT FIT evaluation: 825 s of a seed, EVAL_BUDGET_SECONDS=600", said)
    assert "TTT_MODE=all, by SGD as in pr549.env, 276 s" in said and "doc_lora" not in said
    assert re.search(r"DOES NOT FIT time: 2:01:\d\d of 1:10:00", said)
    assert re.search(r"DOES NOT FIT money: 48\.\d\d of 20\.00", said)
    # 20 at 3 per GPU-hour are 50 minutes of eight GPUs: less than the 70
    dropped = re.findall(r"(?m)^  \S.*: \S+ less, (\d):(\d\d):(\d\d)(, fits)?$", said)
    totals = [3600 * int(h) + 60 * int(m) + int(s) for h, m, s, _ in dropped]
    assert totals == sorted(totals, reverse=True)
    assert [bool(row[3]) for row in dropped] == [total <= 3000 for total in totals]
    _, without = printed(*arguments, "--setup-minutes", "0", TTT_MODE="none")
    assert "evaluate_seed42" not in without and "DOES NOT FIT evaluation" not in without
    assert "audit_seed42" not in without
    assert printed("plan", str(RECIPES / "pr1019.env"), TTT_MODE="none")[0] == 0
    _, few = printed("plan", str(RECIPES / "pr1019.env"), TTT_GROUPS="4")
    assert "TTT_GROUPS=4 leaves 4 of 8 GPUs without work" in few


def test_a_preflight_wins_over_the_estimates(tmp_path):
    recipe = str(RECIPES / "pr549.env")
    flops = plan.flops(planned(recipe)[0].config)
    found = dict(processes=8, train_batch_tokens=786_432, flops_per_token=flops, ms_per_step=90.0,
                 statistics_seconds=6.0, export_seconds=11.0, sliding_seconds=70.0,
                 adapted_seconds=300.0)  # fmt: skip
    log = tmp_path / "preflight.log"
    log.write_text(f"[ 80.0] ms_per_step:90\nall limits will be kept\nPREFLIGHT {json.dumps(found)}\n")
    case, steps = planned(recipe, "--preflight", str(log))
    assert plan.steps_on_clock(case) == (6600, 600.0)  # (600 - 6) / 0.09
    assert part(steps, "train_seed42", "export") == 11 and part(steps, "train_seed42", "score") == 70
    assert part(steps, "evaluate_seed42", "adapted") == 300
    plain = tmp_path / "preflight.json"
    plain.write_text(json.dumps(found))
    assert planned(recipe, "--preflight", str(plain))[1] == steps
    for change, said in (
        (dict(processes=4), "processes is 4, here 8"),
        (dict(flops_per_token=1), "another run"),
    ):
        plain.write_text(json.dumps(found | change))
        with pytest.raises(ValueError, match=said):
            planned(recipe, "--preflight", str(plain))
    del found["adapted_seconds"]
    plain.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="lacks adapted_seconds"):
        planned(recipe, "--preflight", str(plain))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "no.env"], "error: no.env: no such recipe"),
        (
            ["plan", str(RECIPES / "pr549.env"), "--gpus", "7"],
            "error: --gpus 7: must divide the 384 sequences",
        ),
        (["plan", str(RECIPES / "pr549.env"), "--seeds", "1,1"], "error: --seeds 1,1: a seed occurs twice"),
        (
            ["plan", str(RECIPES / "pr549.env"), "--download-mb-s", "0"],
            "error: --download-mb-s 0: must be above 0",
        ),
        (["plan", str(RECIPES / "pr549.env"), "--preflight", "none.log"], "error: --preflight none.log: "),
        (["plan", str(RECIPES / "smoke.env")], "error: DATA_PATH=data/demo: no validation shards"),
        (["plan", str(RECIPES / "pr549.env"), "--script", "no/plan.sh"], "error: "),
        (["paln"], "error: unknown command: paln. Commands: plan"),
    ],
)
def test_user_errors_are_one_line(arguments, said, capsys):
    assert launch.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith(said) and message.count("\n") == 1


def test_help():
    assert "launch.py plan RECIPE" in started("--help").stdout
    said = started("plan", "--help").stdout
    assert "--preflight FILE" in said and "Exit codes: 0 the plan fits" in said


# ------------------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.env")), ids=lambda path: path.stem)
def test_bash_parses_the_script_of_every_recipe(recipe, demo_data, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # two recipes read data/demo
    arguments = [str(recipe), "--gpus", "1"]
    case, steps = planned(*arguments, TRAIN_FILES="a folder/*.bin; $(touch x)")
    text = plan.script(case, steps, arguments)
    (tmp_path / "train_gpt.py").touch()  # the script runs where that is
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    shown = subprocess.run(["bash", "-c", f"{text.split('declare -F')[0]}\nprintf %s \"$TRAIN_FILES\""],
                           cwd=tmp_path, capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert shown == "a folder/*.bin; $(touch x)"


@pytest.fixture
def checkout(tmp_path, demo_data) -> Path:
    """A folder that looks like the root of the project, with an environment and the demo corpus."""
    for name in ("train_gpt.py", "eval_ttt.py", "records", "data", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/ready").touch()
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv/bin/torchrun").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    )
    for program in (tmp_path / ".venv/bin").iterdir():
        program.chmod(0o755)
    return tmp_path


def write_plan(folder: Path, *arguments: str, **settings: str) -> None:
    done = started(
        "plan", "records/recipes/smoke.env", "--script", "plan.sh", *arguments, cwd=folder, **settings
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_script(folder: Path, text: str, **more: str) -> tuple[int, str]:
    """Run shell text in `folder`; return its exit code and output."""
    environ = {**inherited(), "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=environ, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=900)  # fmt: skip
    return done.returncode, done.stdout


def events(output: str) -> list[str]:
    """`start NAME`, `skip NAME` and `FAILED NAME` of a script's output, in order."""
    return re.findall(r"(?m)^\[\d\d:\d\d:\d\d\] ((?:start|skip|FAILED) \w+)", output)


def measured_before(folder: Path) -> None:
    """Leave the log of a good preflight, so that the script skips it."""
    (folder / "runs/plan_smoke").mkdir(parents=True)
    (folder / "runs/plan_smoke/preflight.log").write_text("all limits will be kept\n")


@pytest.mark.slow
def test_a_killed_training_resumes_and_a_failed_step_stops_the_rest(checkout):
    measured_before(checkout)
    write_plan(checkout, "--gpus", "1", "--seeds", "7", TTT_MODE="none", ITERATIONS="400", VAL_LOSS_EVERY="0",
               GPTQ_CALIB_BATCHES="0", EVAL_STRIDE="64")  # fmt: skip
    environ = {**inherited(), "OMP_NUM_THREADS": "1"}
    with open(checkout / "first.out", "wb") as output:
        script = subprocess.Popen(["bash", "-c", f"{ALONE} bash plan.sh"], cwd=checkout, env=environ,
                                  stdout=output, stderr=subprocess.STDOUT)  # fmt: skip
        saved = checkout / "runs/smoke_seed7/checkpoint.pt"
        deadline = time.monotonic() + 120
        while not saved.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (trainer,) = [
            int(process.name) for process in Path("/proc").glob("[0-9]*")
            if is_trainer(process) and Path(os.readlink(process / "cwd")) == checkout
        ]  # fmt: skip
        os.kill(trainer, signal.SIGKILL)
        assert script.wait(60) == 1
    assert events((checkout / "first.out").read_text())[-2:] == ["start train_seed7", "FAILED train_seed7"]
    assert not (checkout / "runs/smoke_seed7/result.json").exists()
    code, said = run_script(checkout, f"{ALONE} bash plan.sh")
    assert code == 0, said
    assert events(said)[-2:] == ["start train_seed7", "start check_seed7"]
    result = json.loads((checkout / "runs/smoke_seed7/result.json").read_text())
    assert result["resumed"][0] >= 50 and result["steps"] == 400  # CHECKPOINT_EVERY is an eighth of the steps
    assert "resumed: phase:train" in said
    code, said = run_script(checkout, f"{ALONE} bash plan.sh train_seed7")
    assert (code, set(event.split()[0] for event in events(said))) == (0, {"skip"})
    assert "check_seed7" not in said  # it stops after the named step


def is_trainer(process: Path) -> bool:
    try:
        return process.joinpath("cmdline").read_bytes().endswith(b"/packed/train_gpt.py\0")
    except OSError:
        return False


def test_a_run_that_a_rule_forbids_stops_the_script(checkout):
    measured_before(checkout)
    (checkout / "runs/smoke_seed7").mkdir(parents=True)
    (checkout / "runs/smoke_seed7/result.json").write_text(
        '{\n "fits": false,\n "trainer": {\n  "fits": true\n }\n}'
    )
    write_plan(checkout, "--gpus", "1", "--seeds", "7", TTT_MODE="none")
    code, said = run_script(checkout, 'launch() { echo "$@"; return 1; }; export -f launch; bash plan.sh')
    assert code == 1 and events(said)[-2:] == ["start train_seed7", "FAILED train_seed7"]
    code, said = run_script(checkout, 'launch() { echo "$@"; }; export -f launch; bash plan.sh')  # no result
    assert code == 1 and events(said)[-1] == "FAILED train_seed7"


@pytest.mark.slow
def test_two_seeds_for_real(checkout):
    """Preflight, training, evaluation, audit and check; then all is skipped; then the preflight plans."""
    write_plan(checkout, "--gpus", "1", "--seeds", "7,8")
    code, said = run_script(checkout, f"{ALONE} bash plan.sh")
    assert code == 0, said
    names = [f"{name}_seed{seed}" for seed in (7, 8) for name in ("train", "evaluate", "audit")]
    names = ["preflight", "pack", *names, "check_seed7", "check_seed8"]
    assert events(said) == ["skip environment", "skip data", *(f"start {name}" for name in names)]
    for seed in (7, 8):
        evaluated = json.loads((checkout / f"runs/smoke_seed{seed}/eval_ttt.json").read_text())
        assert evaluated["audit"] == "certificate.json" and evaluated["legal"]
        assert json.loads((checkout / f"runs/smoke_seed{seed}/result.json").read_text())["seed"] == seed
    code, said = run_script(checkout, f"{ALONE} bash plan.sh")
    assert code == 0 and events(said) == [f"skip {name}" for name in ("environment", "data", *names)]
    log = checkout / "runs/plan_smoke/preflight.log"
    found = json.loads(re.search(r"(?m)^PREFLIGHT (.*)$", log.read_text())[1])
    done = started("plan", "records/recipes/smoke.env", "--gpus", "1", "--preflight", str(log), cwd=checkout)
    assert f"20 steps of {found['ms_per_step']:.1f} ms" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_second_seed_compiles_nothing(checkout):
    measured_before(checkout)
    write_plan(checkout, "--gpus", "1", "--seeds", "7,8", TTT_MODE="none", USE_COMPILE="1", NUM_LAYERS="1",
               XSA_LAST_N="1", VE_ENABLED="0", ITERATIONS="2")  # fmt: skip

    def compiled() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in checkout.glob("runs/compile_cache/**/*.so")}

    code, said = run_script(checkout, f"{ALONE} bash plan.sh train_seed7")
    assert code == 0, said
    first = compiled()
    code, said = run_script(checkout, f"{ALONE} bash plan.sh train_seed8")
    assert code == 0 and "start train_seed8" in said, said
    assert first and compiled() == first


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------


def blocks() -> dict[str, str]:
    """The shell scripts of the page, by the name in their second line."""
    found = re.findall(r"(?s)```bash\n(.*?)```", PAGE.read_text())
    return {re.search(r"\n# ([\w.]+):", text)[1]: text for text in found}


def commands() -> list[str]:
    text = re.sub(r"(?s)```.*?```", "", PAGE.read_text()).replace("\\\n", "")
    return re.findall(r"(?m)^    (\S.*)$", text)


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_page(command, checkout, monkeypatch, capsys):
    subprocess.run(["bash", "-n"], input=command, text=True, check=True)
    words = shlex.split(command)
    own = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(own) :]
    known = {field.name.upper() for field in plan.fields(launch.trainer().Config)} | {"RECIPE"}
    assert own.keys() <= known
    for recipe in re.findall(r"records/recipes/\w+\.env", command):
        assert (ROOT / recipe).exists()
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        assert (given.nnodes, given.node_rank, given.master_addr) == ("2", 0, "HOST")
        assert (ROOT / given.training_script).exists()
        launch.trainer().load_config({name: value for name, value in own.items() if name != "RECIPE"})
    elif "plan" in words:
        monkeypatch.chdir(checkout)
        arguments = plan.parse([w for w in words[words.index("plan") + 1 :] if w not in ("--preflight",)
                                and not w.endswith("preflight.log")])  # fmt: skip
        assert plan.make_case(arguments, own).seeds == [1337, 42, 2025]
        assert started("plan", *words[words.index("plan") + 1 :], "--help").returncode == 0
    elif words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:], "--no-such-option"], cwd=ROOT, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.stderr.endswith("error: unrecognized arguments: --no-such-option\n"), done.stderr
    elif words[0] in ("bash", "sbatch"):
        assert words[1] in {"plan.sh", *blocks()}
    else:
        assert command in ("git clone URL golf", "cd golf", "make .venv/ready", ". .venv/bin/activate")


def test_numbers_of_the_page(printed):
    said = " ".join(PAGE.read_text().split())
    sample = re.search(r"(?s)```text\n(.*?)```", PAGE.read_text())[1].splitlines()
    _, output = printed("plan", str(RECIPES / "pr549.env"), "--price", "2.50", "--budget", "30")
    assert [line for line in sample if line not in output.splitlines()] == ["       ..."]
    case, _ = planned(str(RECIPES / "pr1019.env"))
    adapted = sum(each.seconds for each in plan.evaluation_parts(case)[:2])
    assert f"estimated at {adapted:.0f} s of 600" in said
    rates = json.loads((ROOT / "records/benchmarks/2026-11-27_rates_h100.json").read_text())
    empty, filled = rates["step"]["before"]["first_step_seconds"], plan.h100()["step_compiled"]
    filled = filled["step_compiled"]["first_step_seconds"]
    assert f"| {empty} | {filled:.2f} |" in said
    assert plan.CACHED_SHARE == pytest.approx(filled / empty, rel=1e-3)


STAND_INS = {
    # starts the command once per node, as srun does; the options are srun's own
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
""",
    "scontrol": '#!/bin/bash\n[ "$*" = "show hostnames two" ] && printf "localhost\\nlocalhost\\n"\n',
    # a login on another machine: nothing of this environment is there
    "ssh": """#!/bin/bash
[ "$1 $2" = "-tt other" ] || exit 255
exec env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "$3"
""",
}


@pytest.fixture
def cluster(checkout, monkeypatch) -> Path:
    """A checkout with the page's scripts, and stand-ins for the programs of a cluster on PATH."""
    (checkout / "bin").mkdir()
    for name, text in STAND_INS.items():
        (checkout / "bin" / name).write_text(text)
        (checkout / "bin" / name).chmod(0o755)
    for name, text in blocks().items():
        (checkout / name).write_text(text)
    monkeypatch.setenv("PATH", f"{checkout / 'bin'}:{os.environ['PATH']}")
    measured_before(checkout)
    write_plan(checkout, "--gpus", "2", "--seeds", "7", TTT_GROUPS="2")
    return checkout


def check_two_ranks(folder: Path, code: int, said: str) -> None:
    assert code == 0, said
    expected = [f"start {name}" for name in
                ("pack", "train_seed7", "evaluate_seed7", "audit_seed7", "check_seed7")]  # fmt: skip
    assert [event for event in events(said) if event.startswith("start")] == expected
    for name in ("result.json", "eval_ttt.json"):
        assert json.loads((folder / "runs/smoke_seed7" / name).read_text())["world_size"] == 2


def test_bash_parses_the_scripts_of_the_page():
    assert blocks().keys() == {"ssh_plan.sh", "plan.sbatch"}
    for text in blocks().values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.slow
def test_the_sbatch_script_on_two_nodes(cluster):
    """Two torchrun agents of one process each meet over TCP; only Slurm's own programs are replaced."""
    slurm = dict(SLURM_SUBMIT_DIR=str(cluster), SLURM_JOB_NODELIST="two", SLURM_JOB_ID=str(os.getpid()),
                 SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1", SLURM_CPUS_PER_TASK="1")  # fmt: skip
    check_two_ranks(cluster, *run_script(cluster, "cd / && bash $SLURM_SUBMIT_DIR/plan.sbatch", **slurm))


@pytest.mark.slow
def test_the_script_for_ssh_on_two_machines(cluster):
    check_two_ranks(cluster, *run_script(cluster, "bash ssh_plan.sh localhost other", GPUS="1"))
