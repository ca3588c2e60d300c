"""What the kept files give for the pages on GPUs: counted, predicted and measured (see claims.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from stated import NUMBER, Page, Pages, agrees

HOPPER, TRAFFIC = "benchmarks/2026-11-26_hopper", "benchmarks/2026-11-28_traffic_pr1855"
H100, RATES = "benchmarks/2026-11-27_gpu_h100", "benchmarks/2026-11-27_rates_h100"
TOKENS = 786_432  # of a step
# fmt: off


def parts(p: Pages) -> dict[str, Any]:
    """Return the results of the nine minutes on an H100, by part."""
    return {name: part["result"] for name, part in p.json(H100)["parts"].items()}


def operations(layers: int, mlp: int, vocab: int, side: int = 0) -> dict[str, float]:
    """Return the operations of a step at d = 512: six for each weight and token, half of all pairs."""
    return {name: 6.0 * TOKENS * count for name, count in (
        ("MLP", layers * 2 * 512 * mlp), ("projections", layers * (2 * 512 * 512 + 2 * 512 * 256)),
        ("head", 512 * vocab + side), ("attention", layers * 2048 * 512))}


PR1019 = operations(11, 1536, 1024, 112 * 512 + 128 * 256)  # side tables: bigrams and values


def fused(traffic: dict[str, Any], key: str = "passes", kind: str = "fused") -> float:
    return sum(row[key] for name, row in traffic["kinds"].items() if name.endswith(kind))


def gigabytes(traffic: dict[str, Any]) -> float:
    """Return what the fused kernels of a step read and write; a pass is an activation in bfloat16."""
    return fused(traffic) * TOKENS * 512 * 2 / 1e9


def predicted_steps(p: Pages) -> dict[str, list[float]]:
    """Return products, attention and fused kernels of a step in ms, of pr1019 and of #1855.

    Assumed rates: 790 and 395 TFLOP/s, 2.9 TB/s; measured ones: 680 TFLOP/s, and as pr1019 did on an H100.
    """
    within, counted = parts(p)["kernels"]["attention"], p.json(HOPPER)["traffic"]
    slower = measured(p)["pointwise, norms, copies"] / (gigabytes(counted) / 2.9)
    found = {"pr1019": [(sum(PR1019.values()) - PR1019["attention"]) / 790e9, PR1019["attention"] / 395e9,
                        gigabytes(counted) / 2.9], "slower": [slower]}
    for name, run in zip(("plain", "looped"), p.json(TRAFFIC)["runs"], strict=True):
        work, ms = operations(run["layers"], 2048, 8192), gigabytes(run) / 2.9
        attention = work.pop("attention") / 395e9 * within["pairs_within_documents"]
        found[f"{name}, assumed rates"] = [sum(work.values()) / 790e9, attention, ms]
        slow = within["kernels"]["documents, sdpa"]["ms"] * run["layers"] / 11
        found[f"{name}, measured rates"] = [sum(work.values()) / 680e9, slow, ms * round(slower, 2)]
    return found


def measured(p: Pages) -> dict[str, float]:
    """Return the ms of a step of pr1019 on an H100, by kind of kernel."""
    step, profile = (parts(p)["step_compiled"][f"{name}_compiled"] for name in ("step", "profile"))
    ms = {name: share * profile["device_ms"] for name, share in profile["shares"].items()}
    return {"matrix products": ms["matrix products"], "attention, cuDNN": ms["attention"],
            "pointwise, norms, copies": ms["pointwise"] + ms["copies"],
            "loss, optimizer": ms["loss"] + ms["optimizer"],
            "between kernels": step["ms_per_step"] - profile["device_ms"], "step": step["ms_per_step"]}


def hopper(p: Pages) -> None:
    page, counted = p.page(f"records/{HOPPER}.md"), p.json(HOPPER)["traffic"]
    floor = parts(p)["step_compiled"]["floors"]["ms"]
    flops = PR1019 | {"Newton": floor["Newton-Schulz"] * 790e9}
    ms = {name: work / (395e9 if name == "attention" else 790e9) for name, work in flops.items()}
    gb = {"norms": 40 * 11 * TOKENS * 512 * 2 / 1e9, "loss": 3 * TOKENS * 1024 * 4 / 1e9,
          "optimizer": floor["optimizer's memory"] * 4.4}
    memory, total = sum(gb.values()), sum(ms.values()) + sum(gb.values()) / 4.4
    page.shows(0, {
        **{label: [flops[name], None, ms[name]] for name, label in (
            ("MLP", "MLP"), ("attention", "attention, causal, head width 64"), ("projections", "Q, K, V, O"),
            ("head", "head and side tables"), ("Newton", "Newton-Schulz, five iterations"))},
        "norms, gates, mixing, rotation": [gb["norms"], None, gb["norms"] / 4.4],
        "loss at V = 1,024": [[gb["loss"], 32], None, gb["loss"] / 4.4],
        "optimizer's memory": [gb["optimizer"], None, gb["optimizer"] / 4.4],
        "one after the other": [sum(flops.values()), None,
                                [total, 100 * sum(flops.values()) / total / 989e9, 989]]})
    params = parts(p)["train"]["model_params"]
    page.says("`pr1019`: {} M parameters, {} layers", params / 1e6, counted["layers"])
    page.says("in place of 4.4 the same sum is {} ms", total + memory * (1 / 2.9 - 1 / 4.4))
    passes, size = counted["kinds"], gigabytes(counted)
    page.shows(1, {
        "passes of pointwise kernels, norms and reductions, forward": [passes["forward, fused"]["passes"]],
        "backward": [passes["backward, fused"]["passes"]], "a layer, both ways": [fused(counted) / 11],
        "GB a step": [size], "ms at 4.4 TB/s (H200)": [size / 4.4], "ms at 2.9 TB/s (H100)": [size / 2.9],
        "matrix products of a micro-batch": [fused(counted, "kernels", "product")],
        "passes of theirs": [fused(counted, kind="product")], "other kernels": [fused(counted, "kernels")],
        "of these small, below a tenth of a pass": [fused(counted, "small")]})
    page.says("which is a guess; {} are counted below", fused(counted) / 11)
    products, attention, _ = predicted_steps(p)["pr1019"]
    h200, h100 = (products + attention + 2 + size / rate for rate in (4.4, 2.9))
    page.says("at {} ms of products, {} of attention, {} of the rest", products, attention, size / 4.4)
    page.says("**{} ms on one H200** ({} on an H100)", h200, h100)
    page.says("if {} of the causal pairs ...: -{} ms of attention's {} and {} % of the step", 0.51,
              attention * 0.49, attention, 100 * attention * 0.49 / h100)
    plain, compiled = p.json(HOPPER)["losses"]["results"]
    page.says("losses {} nats apart on the average and {} at most; ... and in float32 {} and {}",
              *(row[f"nats_apart_{key}"] for row in (compiled, plain) for key in ("mean", "max")))
    page.says("**Predicted at {} ms on an H100, measured at {}**", h100, measured(p)["step"])
    hopper_measured(p, page, h100)


def hopper_measured(p: Pages, page: Page, predicted: float) -> None:
    """The part of the page that was measured on an H100."""
    gpu, ms, (products, attention, rest) = parts(p), measured(p), predicted_steps(p)["pr1019"]
    step, profile = (gpu["step_compiled"][f"{name}_compiled"] for name in ("step", "profile"))
    flash = [next(ms for name, ms in profile["kernels"].items() if f"flash_{way}" in name)
             for way in ("fprop", "bprop")]
    reached = [round(products * 790 / ms["matrix products"], -1), attention * 395 / ms["attention, cuDNN"]]
    beside = {"matrix products": [products, [reached[0], 790]], "pointwise, norms, copies": [rest, []],
              "attention, cuDNN": [attention, [reached[1], 395, *flash]], "loss, optimizer": [4, []],
              "between kernels": [[], []],
              "step": [predicted, [step["mfu"], gpu["step_plain"]["step_plain"]["ms_per_step"]]]}
    page.shows(3, {name: [first, ms[name], last] for name, (first, last) in beside.items()})
    page.says("n = {} steps in one run", step["steps"])
    page.says("product ran at {} TFLOP/s and a copy at {} TB/s", gpu["probe"]["matmul_tflops"],
              gpu["probe"]["copy_tb_s"])
    page.says("a profile of {} ms", profile["device_ms"])
    page.says("a step takes {} and {} ms on the same machine",
              *(p.json(RATES)["step"][when]["ms_per_step"] for when in ("before", "after")))
    kernels, documents = gpu["kernels"]["attention"]["kernels"], gpu["documents"]["step_compiled"]
    page.says("take {} ms over rows, by torch's own choice of kernel; within documents {} ms by torch's "
              "kernel ... and {} ms with masks",
              *(kernels[name]["ms"] for name in ("rows, sdpa", "documents, sdpa", "documents, masks")))
    page.says("The whole step then takes {} ms (n = {})", documents["ms_per_step"], documents["steps"])
    first, late = gpu["train"], gpu["meta"]["train"]["compile_seconds"]
    page.says("Its graphs add {} s to the {} s of compilation", late - first["compile_seconds"],
              first["compile_seconds"])
    log = "\n".join(p.json(H100)["parts"]["meta"]["log_tail"])
    begin, end = (int(re.search(rf"{line}.*train_time:(\d+)ms", log)[1]) for line in
                  ("step:364/16000 val_loss", "deployed_step:1/"))
    page.says("after step 1, which ended {} s into the phase", (end - begin) / 1000)
    page.says("compiles for {} s before its clock starts, after {} s of start", first["compile_seconds"],
              first["start_seconds"])
    page.says("are {} nats apart on average and {} at most; bfloat16 and float32 {} and {}",
              *(gpu["losses"][f"losses_{name}"][f"nats_apart_{key}"] for name in ("compiled", "plain")
                for key in ("mean", "max")))


def traffic(p: Pages) -> None:
    page, runs, steps = p.page(f"records/{TRAFFIC}.md"), p.json(TRAFFIC)["runs"], predicted_steps(p)
    three, kernels = [p.json(HOPPER)["traffic"], *runs], parts(p)["kernels"]["attention"]
    page.shows(0, {
        "applications of a block": [run["layers"] for run in three],
        "passes of fused kernels, a layer, both ways": [fused(run) / run["layers"] for run in three],
        "GB a step": [gigabytes(run) for run in three],
        "peak memory of a micro-batch without weights, GiB": [[], *(run["peak_gib"] for run in runs)],
        "products, operations a step": [790e9 * steps[name][0] for name in (
            "pr1019", "plain, assumed rates", "looped, assumed rates")]})
    page.shows(1, {name: [*row, sum(map(round, row))] for name, row in steps.items() if "rates" in name})
    page.says("{} of the pairs within documents", kernels["pairs_within_documents"])
    page.says("fused kernels {} times the count, attention within documents {} ms for", *steps["slower"],
              kernels["kernels"]["documents, sdpa"]["ms"])
    page.says("over whole rows the same attention took {} ms", kernels["kernels"]["rows, sdpa"]["ms"])
    page.says("they are {} passes in bfloat16", 8192 / 512)


def h100(p: Pages) -> None:
    page, kept, gpu = p.page(f"records/{H100}.md"), p.json(H100), parts(p)
    paths = {  # the predictions are no measurements, and stand on the page only
        "matrix product, 8192 cubed, TFLOP/s": "probe.matmul_tflops",
        "device-to-device copy, TB/s": "probe.copy_tb_s",
        "step of 786,432 tokens, compiled, ms": "step_compiled.step_compiled.ms_per_step",
        "the same, MFU": "step_compiled.step_compiled.mfu",
        "step of 393,216 tokens, ms": "train.ms_per_step_late",
        "the same, peak memory, MiB": "step_compiled.step_compiled.peak_mib",
        "chunk SGD, s": "chunk_sgd.score_seconds",
        "fraction of attention kernels": "step_compiled.profile_compiled.shares.attention",
        "fraction of matrix products": "step_compiled.profile_compiled.shares.matrix products",
        "step, plain torch, ms": "step_plain.step_plain.ms_per_step",
        "per-document adaptation, s": "adapt.score_seconds",
        "step within documents, compiled, ms": "documents.step_compiled.ms_per_step",
        "compilation before training, s": "train.compile_seconds",
        "per-document LoRA, s": "doc_lora.score_seconds",
        "peak memory of training and export, MiB": "train.peak_mib",
        "statistics, quantization, coding, s": "train.export_seconds",
        "the same for 62 M targets on 8 GPUs, s": "adapt.full_seconds",
        "compiled and plain, mean nats apart": "losses.losses_compiled.nats_apart_mean",
        "bfloat16 and float32, mean nats apart": "losses.losses_plain.nats_apart_mean"}
    values = dict(flat(gpu))
    cells = {"compiling five graphs of the evaluator, s": [None, "not measured", [], None]}
    for label, path in paths.items():
        predicted = re.search(rf"\| {re.escape(label)} \| ({NUMBER}) \|", page.text)
        missed = 100 * (values[path] / float(predicted[1].replace(",", "")) - 1) if predicted else math.nan
        cells[label] = [None, values[path], missed, None]
    page.shows(0, cells)
    modes = {"Adapt all weights per document": "adapt", "Adapt a LoRA per document": "doc_lora",
             "Adapt by SGD on chunks, weights carried over, as in #549": "chunk_sgd"}
    scores = {f"{name}, no adaptation": [gpu["train"][f"val_bpb_{name}"], *[""] * 4]
              for name in ("roundtrip", "sliding")}
    for name, part in modes.items():
        row = gpu[part]
        scores[name] = [row["val_bpb_ttt"], row["val_bpb_plan"] - row["val_bpb_ttt"],
                        *(row[key] for key in ("score_seconds", "targets_per_second", "full_seconds"))]
    page.shows(1, scores)
    page.shows(2, {row["name"].split()[1]: [row["targets"], row["before"], row["after"],
                                            row["before"] - row["after"]]
                   for row in gpu["adapt"]["gain_by_position"]})
    page.says("; " + " and ".join(f"{{}} minutes ({call['date']})" for call in kept["calls"]),
              *(call["used_seconds"] / 60 for call in kept["calls"]))
    tails = [line[:160] for part in kept["parts"].values() for line in part.get("log_tail", [])]
    for quoted in re.finditer(r"(?m)^  > (.*)", page.text):
        page.spans.append(quoted.span())
        same = quoted[1] in tails
        page.add("line of a log", quoted[1], "the same" if same else "in no log", same)
    for name, part in kept["parts"].items():
        why = f", {part['why']}" if "why" in part else ""
        page.says(f"- **{name}** ({part['title'].rstrip('.')}): {part['state']}{why}, {{}} s",
                  part["seconds"])
        if numbers := list(flat(part["result"]))[:30]:
            line = re.search(rf"- \*\*{name}\*\* .*\n  `(.*)`", page.text)
            stated = re.findall(rf"(.+?):(true|false|{NUMBER})(?: |$)", line[1])
            same = [key for key, _ in stated] == [key for key, _ in numbers] and all(
                text == str(value).lower()
                or agrees(text, float(f"{value:.4g}") if abs(value) < 1000 else value)
                for (_, text), (_, value) in zip(stated, numbers, strict=True))
            page.spans.append(line.span())
            page.add(f"numbers of the part {name}", " ".join(x for _, x in stated),
                     " ".join(f"{x:.5g}" for _, x in numbers), same)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a nested result with their paths."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value
