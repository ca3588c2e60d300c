"""What the trainer says before it trains, and what it shows while it runs."""

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import advice
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_artifact import make_run
from test_model import SMALL, random_model
from test_training import stream

import train_gpt


def advised(run: train_gpt.Run, monkeypatch, step: float = 1e-4) -> list[str]:
    """The advice where a step takes `step` seconds."""
    monkeypatch.setattr(advice, "seconds_per_step", lambda run, model: step)
    return list(advice.before_training(run, None))


@pytest.mark.parametrize("tokens, said", [(SMALL.train_batch_tokens - 1, 1), (SMALL.train_batch_tokens, 0)])
def test_a_text_shorter_than_a_step_is_a_warning_with_the_numbers(tokens, said, tmp_path, monkeypatch):
    run = make_run(tmp_path, train=stream(tmp_path, tokens), versions={})
    lines = [line for line in advised(run, monkeypatch) if "repeats it" in line]
    assert len(lines) == said
    assert all(f"{tokens:,} tokens" in line and f"{tokens + 1:,}" in line for line in lines)


PACE = {  # settings, seconds per step -> steps that fit, seconds of warm-up; None: not said
    "27 M parameters on a CPU": (dict(max_wallclock_seconds=600.0, warmup_steps=20), 400.0, 1, 8000),
    "slow warm-up only": (dict(max_wallclock_seconds=0.0, iterations=30, warmup_steps=20), 4.0, None, 80),
    "short, by steps": (dict(max_wallclock_seconds=600.0, iterations=20, warmup_steps=0), 2.0, None, None),
    "the demo": (dict(max_wallclock_seconds=120.0, warmup_steps=2), 0.2, None, None),
    "too slow by the clock": (dict(max_wallclock_seconds=10.0, warmup_steps=0), 1.0, 10, None),
}  # fmt: skip


@pytest.mark.parametrize("changes, step, fits, warm_up", PACE.values(), ids=PACE)
def test_a_run_that_a_cpu_cannot_finish_is_announced(changes, step, fits, warm_up, tmp_path, monkeypatch):
    config = replace(SMALL, **changes)
    run = make_run(tmp_path, config, train=stream(tmp_path, 50_000), versions={})
    lines = "\n".join(line for line in advised(run, monkeypatch, step) if "on this CPU" in line)
    assert (f"{fits} of {config.iterations} steps in" in lines) is (fits is not None)
    assert (f"warm-up {warm_up} s" in lines) is (warm_up is not None)
    assert bool(lines) is (fits is not None or warm_up is not None)
    on_gpu = replace(run, device=torch.device("cuda"))
    assert not [line for line in advised(on_gpu, monkeypatch, step) if "on this CPU" in line]


def test_a_step_is_timed_without_a_trace(tmp_path):
    """Neither weights, nor gradients, nor the global generator, nor text; and for all sequences of a step."""
    run, model = make_run(tmp_path), random_model(SMALL, torch.float32)
    state, before = torch.get_rng_state(), {name: p.clone() for name, p in model.state_dict().items()}
    calls, honest = [], train_gpt.training_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "training_loss", lambda *args: calls.append(args[1].shape) or honest(*args))
        for durations, count in (([5.0, 0.5], 2), ([1.0, 0.25, *[0.5] * 6], 6), ([0.25] * 8, 8)):
            clock = iter(np.repeat(np.cumsum([0.0, *durations]), 2)[1:].tolist())
            patch.setattr(advice.time, "perf_counter", lambda clock=clock: next(clock))
            assert advice.seconds_per_step(run, model) == min(durations) * SMALL.step_seqs
            assert len(calls) == count and calls.clear() is None
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_all_settings_are_in_the_file_and_those_given_on_the_terminal(tmp_path, capsys):
    train_gpt.RunLog(tmp_path).settings(dict(seed=7, num_layers=11, run_id="a"), {"seed"})
    assert (tmp_path / "train.log").read_text() == "  SEED=7 (given)\n  NUM_LAYERS=11\n  RUN_ID=a\n"
    assert capsys.readouterr().out == "  SEED=7 (given)\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_what_is_done_and_left_and_makes_room_for_lines(tmp_path, monkeypatch):
    """On a terminal only; a line of the log clears the bar first, so that each has its own row."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    log = train_gpt.RunLog(tmp_path)
    log.bar = train_gpt.progress_bar("train", 1.0)
    log.bar.mininterval = 0.0
    log.bar.set_postfix_str("loss 3.000, 12,000 tokens/s")
    log.bar.update(0.25)
    shown = screen.getvalue()
    assert "train  25%" in shown and "loss 3.000, 12,000 tokens/s" in shown and " < " in shown
    log.line("step:1/4")
    after = screen.getvalue()[len(shown) :]
    assert after.endswith("\rstep:1/4\n") and not after.replace("\r", "").replace("step:1/4\n", "").strip()
    log.bar.close()
    silent = io.StringIO()
    monkeypatch.setattr(sys, "stderr", silent)
    train_gpt.progress_bar("train", 1.0).update(0.5)
    assert silent.getvalue() == ""


def test_without_tqdm_nothing_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    log = train_gpt.RunLog(tmp_path)
    log.bar = train_gpt.progress_bar("train", 1.0)
    log.bar.update(0.5 - log.bar.n)
    log.bar.set_postfix_str("loss")
    log.line("a line")
    log.bar.close()
    assert capsys.readouterr() == ("a line\n", "")


@pytest.mark.parametrize(
    "announced, cores, expected",
    [({}, 8, 4), ({"LOCAL_WORLD_SIZE": "4"}, 8, 2), ({"LOCAL_WORLD_SIZE": "16"}, 8, 1), ({}, 2, 2)],
)
def test_ranks_of_a_machine_share_its_cores(announced, cores, expected, monkeypatch):
    """Where nobody said otherwise: never more threads than torch would take, four here."""
    asked = []
    monkeypatch.setattr(train_gpt.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    config = SimpleNamespace(device="cpu", dist_timeout=1.0)
    train_gpt.start_ranks(config, announced)
    train_gpt.start_ranks(config, {**announced, "OMP_NUM_THREADS": "3"})
    assert asked == [expected]


def test_metrics_are_json(tmp_path):
    train_gpt.RunLog(tmp_path).step(1, 2, 0.5, dict(lr_scale=1.0), train_loss=3.0)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == dict(step=1, seconds=0.5, train_loss=3.0, lr_scale=1.0)


@pytest.mark.parametrize(
    "name, expected",
    [("NVIDIA H100 80GB HBM3", ", MFU 0.30"), ("NVIDIA H100 PCIe", ", MFU 0.39"), ("NVIDIA GeForce", "")],
)
def test_the_bar_shows_the_share_of_a_gpus_peak(monkeypatch, name, expected):
    """Throughput and MFU (0.295) of the kept step on an H100; nothing for a GPU without a known peak."""
    kept = json.loads((ROOT / "records/benchmarks/2026-11-27_gpu_h100.json").read_text())
    step = kept["parts"]["step_compiled"]["result"]["step_compiled"]
    config, *_ = train_gpt.load_config({"RECIPE": str(ROOT / "records/recipes/pr1019.env")})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = train_gpt.mfu(config, torch.device("cuda"), step["tokens_per_second"])
    assert found == expected
    assert train_gpt.mfu(config, torch.device("cpu"), step["tokens_per_second"]) == ""
