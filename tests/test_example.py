"""The record in records/example: complete, small, derived from its logs, and passed as what it is."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check
import example_record
import pack
import pytest
import submit
from conftest import ROOT
from test_cli import snapshot

(FOLDER,) = (ROOT / "records/example").glob("track_non_record_16mb/*_Example")


def test_it_is_small_and_names_no_machine():
    content = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    logs = {f"train_seed{seed}.log" for seed in example_record.SEEDS}
    certificates = {
        f"certificate_seed{seed}.{end}" for seed in example_record.SEEDS for end in ("txt", "json")
    }
    pages = {"README.md", "submission.json", "requirements.txt", "smoke.env", "train_gpt.py", "eval_ttt.py"}
    assert set(content) == pages | logs | certificates
    assert sum(map(len, content.values())) <= 300_000
    texts = [text for name, text in content.items() if not name.endswith(".py")]
    assert not [text for text in texts if re.search(rb"[\s=\"'](/|~/)\w+/", text)]


def test_it_passes_the_check_as_no_run_of_the_challenge(capsys):
    assert check.main([str(FOLDER)]) == 0
    out = capsys.readouterr().out
    for words in ("validation text of ", "CPU, 1 process", "training of "):
        assert f"not a challenge run: {words}" in out
    assert example_record.check_alone(FOLDER) == []


def test_its_pages_follow_from_its_logs(tmp_path):
    copy = Path(shutil.copytree(FOLDER, tmp_path / FOLDER.parent.name / FOLDER.name))
    (copy / "README.md").write_text("")
    claims = json.loads((copy / "submission.json").read_text())
    spoilt = claims | dict(val_bpb=1.0, seeds=[1], deviations=[], challenge_run=True, bytes_total=1)
    (copy / "submission.json").write_text(json.dumps(spoilt))
    assert submit.main(["--regenerate", str(copy)]) == 0
    assert snapshot(copy) == snapshot(FOLDER)


def test_it_ships_the_packed_programs_that_were_counted():
    sizes = [(FOLDER / name).stat().st_size for name in ("train_gpt.py", "eval_ttt.py")]
    assert all(pack.is_packed((FOLDER / name).read_bytes()) for name in ("train_gpt.py", "eval_ttt.py"))
    assert json.loads((FOLDER / "submission.json").read_text())["bytes_code"] == sum(sizes) < 100_000


@pytest.mark.slow
def test_a_record_folder_stands_alone(demo_data):
    """The journey that CI makes: train, evaluate, audit, submit, move away, check, train and score again."""
    command = [sys.executable, ROOT / "tests/example_record.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
