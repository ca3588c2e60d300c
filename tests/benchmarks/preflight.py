"""Check in at most 90 s whether a machine is ready for a run: rates, kernels, memory and step time.

    torchrun --standalone --nproc_per_node=8 tests/benchmarks/gpu_minutes.py --preflight
    RECIPE=FILE DATA_PATH=DIR torchrun --nproc_per_node=8 tests/benchmarks/gpu_minutes.py --preflight

Settings are those of the run (environment variables; RECIPE defaults to pr1019.env). All ranks measure
together; the slowest counts. Weights are random, the text is that of the run. Exit codes: 0 the run will keep
all limits; 1 a line `LIMIT BROKEN` names each limit that it would break; 2 user error.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_parts
import numpy as np
import torch
import torch.distributed as dist
from gpu import ev, tg

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
MEMORY_SHARE = 0.95  # fraction of GPU memory that a step may use
FREE_DISK_BYTES = 1 << 30
PACKAGES = dict(zstd="zstandard", ans="constriction")  # compressor -> package


class Preflight:
    """The measurements, in order; `found` has the results so far."""

    def __init__(self, environ: dict[str, str], began: float):
        self.began, self.found, self.lock = began, {}, threading.Lock()
        environ = {"RECIPE": str(ROOT / gpu_parts.RECIPE), **environ}
        self.config, _, _ = tg.load_config(environ)
        self.device = tg.start_ranks(self.config, environ)
        c = self.config
        self.table = tg.load_byte_table(c.tokenizer_path, c.vocab_size)
        stream = tg.TokenStream(c.shards("train"), c.vocab_size)
        self.val = tg.TokenStream(c.shards("val"), c.vocab_size)
        self.bench = gpu.Bench(c, stream, self.table, self.device, STEPS, 0, False)
        self.on_gpu = self.device.type == "cuda"

    def put(self, **values: Any) -> None:
        """Store measurements, and print them on rank 0."""
        with self.lock:
            self.found |= values
        if tg.rank() == 0:
            for name, value in values.items():
                shown = f"{value:.4g}" if isinstance(value, float) else value
                print(f"[{self.elapsed():5.1f}] {name}:{shown}", flush=True)

    def elapsed(self) -> float:
        return time.time() - self.began

    def seconds(self, function: Callable[[], Any], repeats: int = 5) -> float:
        """Return the seconds of a call on the slowest rank, after one warm-up call."""
        function()
        total, _ = self.bench.timed(lambda: [function() for _ in range(repeats)])
        return tg.max_over_ranks(total / repeats)[0]

    # -- measurements
    # -------------------------------------------------------------------------------------------------

    def machine(self) -> None:
        c = self.config
        name, _, notices = tg.choose_attention(c.attention, self.device)
        self.put(processes=tg.world_size(), device=torch.cuda.get_device_name() if self.on_gpu else "CPU",
                 attention=name)  # fmt: skip
        flops = tg.project_module("describe").flops_per_token(
            c
        )  # records/plan.py compares both with its recipe
        self.put(train_batch_tokens=c.train_batch_tokens, flops_per_token=flops)
        for notice in notices:
            self.put(**{f"not {notice.split()[0]}": notice})
        if name == "sdpa":
            chosen = gpu_parts.attention_choices(self.device, tg.compute_dtype(self.device))
            self.put(**{f"torch's choice for {kind}": backend for kind, backend in chosen.items()})
        self.put(free_disk_gb=shutil.disk_usage(".").free / 1e9)
        package = PACKAGES.get(c.compressor)
        self.put(missing="" if package is None or importlib.util.find_spec(package) else package)

    def collectives(self) -> None:
        """Measure the bytes per second of each rank's buffer, at the size of all banks in float32."""
        ranks = tg.world_size()
        if ranks == 1:
            self.put(collectives="one rank, nothing to exchange")
            return
        c = self.config
        size = 2 * c.num_layers * (c.model_dim + c.kv_dim + c.mlp_dim) * c.model_dim
        whole = torch.zeros(size - size % ranks, device=self.device)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 renames it
        part, repeats = whole[: len(whole) // ranks].clone(), 5 if self.on_gpu else 2
        for name, run in (
            ("all_reduce", lambda: dist.all_reduce(whole)),
            ("all_gather", lambda: gather(whole, part)),
        ):
            self.put(**{f"{name}_gb_s": whole.nbytes / self.seconds(run, repeats) / 1e9})

    def reading(self) -> None:
        """Measure the milliseconds to read one rank's batch, from a different position each time."""
        places = iter(range(1000, 10**9, 997))
        self.put(read_ms=1000 * self.seconds(lambda: self.bench.batches(next(places)), 3))

    def steps(self, deadline: float) -> None:
        """Measure the milliseconds per step over STEPS steps, or fewer if time is short, and peak memory."""
        c, (_, model) = self.config, self.bench.model()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        optimizers, average = tg.make_optimizers(model, c), tg.WeightAverage(model, c)
        loss_fn = tg.maybe_compile(tg.training_loss, c, self.device)
        loader = tg.Loader(SimpleNamespace(config=c, train=self.bench.stream, device=self.device))

        def step(index: int) -> None:
            tg.train_step(loss_fn, model, loader.batches(index), optimizers, 1.0, c.muon_momentum)
            average.update(index + 1, 1.0)

        first, _ = self.bench.timed(lambda: step(0))
        self.put(first_step_seconds=tg.max_over_ranks(first)[0])
        step(1)
        done, total = 0, 0.0
        while done < STEPS and (done < 2 or tg.max_over_ranks(self.elapsed())[0] < deadline):
            count = min(4, STEPS - done)
            took, _ = self.bench.timed(
                lambda first=2 + done, count=count: [step(first + i) for i in range(count)]
            )
            done, total = done + count, total + tg.max_over_ranks(took)[0]
        self.put(timed_steps=done, ms_per_step=1000 * total / done)
        run = SimpleNamespace(config=c, device=self.device, train=tg.RandomTokens(c.vocab_size))
        self.put(statistics_seconds=tg.statistics_seconds(run, model))
        if self.on_gpu:
            peak, total = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
            self.put(peak_gib=tg.max_over_ranks(peak / 2**30)[0], card_gib=total / 2**30)
        self.model = model

    def export(self) -> None:
        """Measure the seconds of quantization and coding on rank 0 for two layers, scaled to all layers."""
        layers = min(2, self.config.num_layers)
        c = replace(self.config, num_layers=layers, block_order="", ve_enabled=False)

        if self.found["missing"]:
            return
        _, kernel, _ = tg.choose_attention(c.attention, self.device)
        model = tg.GPT(c, tg.compute_dtype(self.device), kernel, self.table.has_leading_space)
        model = model.init_weights(0).to(self.device)
        ids = torch.randint(c.vocab_size, (2, c.train_seq_len), device=self.device)
        # all ranks together
        gradients = tg.collect_gradients(model, [(ids, ids)]) if c.wants_gradients else {}
        statistics = tg.Statistics(tg.collect_hessians(model, [ids]), gradients)

        def work() -> float:
            began = time.perf_counter()
            tg.encode_artifact(c, tg.quantize_state_dict(model.state_dict(), statistics, c), "0" * 64)
            return (time.perf_counter() - began) * self.config.num_layers / layers

        self.put(export_seconds=tg.on_rank_0(work))

    def evaluation(self, deadline: float) -> None:
        """Predict the seconds of sliding windows and adaptation on the whole text from a part of it.

        Plain torch, without compilation. Slots are fuller on the whole text, so it is faster than predicted.
        """
        c, targets = self.config, len(self.val) - 1
        ids = torch.randint(c.vocab_size, (c.eval_batch_seqs, c.eval_seq_len), device=self.device)
        columns = torch.arange(c.eval_seq_len - c.eval_stride, c.eval_seq_len, device=self.device)
        columns = columns.expand(c.eval_batch_seqs, -1)
        self.model.requires_grad_(False)
        with torch.no_grad():
            batch = self.seconds(lambda: tg.token_nll(self.model, ids, ids[:, -c.eval_stride :], columns), 3)
        batches = (
            math.ceil(max(targets - c.eval_seq_len, 0) / c.eval_stride / c.eval_batch_seqs / tg.world_size())
            + 1
        )
        self.put(validation_targets=targets, sliding_seconds=batches * batch)
        if c.ttt_mode == "none":
            return
        state = {
            name: value.cpu() for name, value in self.model.state_dict().items() if "mtp_heads" not in name
        }
        _, kernel, _ = tg.choose_attention(c.attention, self.device)
        # one per rank, however short the text
        scored = replace(c, mtp_num_heads=0, ttt_groups=tg.world_size())
        artifact = tg.Artifact(scored, state, "")
        setup = ev.Setup(scored, artifact, self.device, kernel, self.table, tg.token_nll)
        count, rate = min(targets, max(1000 * tg.world_size(), c.eval_seq_len + 1)), 0.0
        while True:  # the first round loads kernels; each is as long as time allows
            text = self.val.read(0, count + 1).astype(np.uint16)
            rate = count / tg.max_over_ranks(ev.evaluate(setup, text).seconds)[0]
            left = deadline - tg.max_over_ranks(self.elapsed())[0]
            longer = min(targets, 8 * count)
            if longer == count or longer / rate > 0.5 * left:
                break
            count = longer
        self.put(adapted_targets=count, adapted_targets_per_second=rate, adapted_seconds=targets / rate)

    # -- predictions
    # --------------------------------------------------------------------------------------------------

    def predict(self) -> None:
        """Predict the steps on the contest clock, and the epochs over the training text."""
        c, f = self.config, self.found
        if c.max_wallclock_seconds:
            steps = int(1000 * max(c.max_wallclock_seconds - f["statistics_seconds"], 0) / f["ms_per_step"])
            self.put(predicted_steps=min(steps, c.iterations))
        else:
            self.put(predicted_steps=c.iterations)
        tokens = self.found["predicted_steps"] * c.train_batch_tokens
        self.put(predicted_epochs=tokens / len(self.bench.stream))


def broken_limits(found: dict[str, Any], config: Any) -> list[str]:
    """Return a sentence with numbers for each limit that would break; a missing measurement counts."""
    c, broken = config, []

    def check(name: str, ok: Callable[[], bool], text: Callable[[], str]) -> None:
        try:
            if not ok():
                broken.append(f"{name}: {text()}")
        except KeyError as missing:
            broken.append(f"{name}: {missing.args[0]} was not measured in time")

    f = found
    check("package", lambda: not f["missing"], lambda: f"COMPRESSOR={c.compressor} needs {f['missing']}")
    check(
        "disk",
        lambda: f["free_disk_gb"] * 1e9 > FREE_DISK_BYTES,
        lambda: f"{f['free_disk_gb']:.2f} GB are free",
    )
    check("data", lambda: f["read_ms"] <= f["ms_per_step"],
          lambda: f"reading a batch takes {f['read_ms']:.1f} ms, "
                  f"a step {f['ms_per_step']:.1f} ms")  # fmt: skip
    if "card_gib" in f:
        check("memory", lambda: f["peak_gib"] <= MEMORY_SHARE * f["card_gib"],
              lambda: f"{f['peak_gib']:.1f} of {f['card_gib']:.1f} GiB reserved. "
                      "Raise GRAD_ACCUM_TOTAL.")  # fmt: skip
    check("clock", lambda: not c.max_wallclock_seconds or f["predicted_steps"] > 0,
          lambda: f"the statistics alone take {f['statistics_seconds']:.0f} s of MAX_WALLCLOCK_SECONDS="
                  f"{c.max_wallclock_seconds:.0f}")  # fmt: skip
    check("export", lambda: f["export_seconds"] > 0, lambda: "no artifact")
    for name in ("sliding_seconds", *(["adapted_seconds"] if c.ttt_mode != "none" else [])):
        check(name, lambda name=name: not c.eval_budget_seconds or f[name] <= c.eval_budget_seconds,
              lambda name=name: f"{f[name]:.0f} s, "
                                f"EVAL_BUDGET_SECONDS={c.eval_budget_seconds:.0f}")  # fmt: skip
    return broken


def conclude(check: Preflight, late: bool = False) -> int:
    """Print the conclusions from the measurements and return the exit code."""
    with check.lock:
        found = dict(check.found)
    broken = broken_limits(found, check.config)
    if late:
        broken.append(f"time: the check itself took {check.elapsed():.0f} s")
    if tg.rank() == 0:
        for line in broken:
            print(f"LIMIT BROKEN {line}")
        if not broken:
            print("all limits will be kept")
        print("PREFLIGHT " + json.dumps(dict(**found, broken=broken, seconds=check.elapsed())), flush=True)
    return int(bool(broken))


def main(seconds: float) -> int:
    """Measure until `seconds` after the process started; return the exit code."""
    try:
        began = tg.process_start()
        check = Preflight(dict(os.environ), began)
    except tg.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def give_up() -> None:  # a hanging compiler or collective cannot be interrupted
        conclude(check, late=True)
        os._exit(1)

    watchdog = threading.Timer(max(seconds - check.elapsed(), 1.0), give_up)
    watchdog.daemon = True
    watchdog.start()
    check.machine()
    check.collectives()
    check.reading()
    check.steps(deadline=seconds - 35)
    check.predict()
    check.export()
    check.evaluation(deadline=seconds - 5)
    watchdog.cancel()
    code = conclude(check)
    tg.cleanup_distributed()
    return code
