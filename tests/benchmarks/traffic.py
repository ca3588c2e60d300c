"""Count the GPU memory traffic of the compiled training loss, kernel by kernel, without a GPU.

    python tests/benchmarks/traffic.py                             pr1019, micro-batch of 48 sequences, 30 s
    python tests/benchmarks/traffic.py --recipe FILE --kernels 40  another recipe, with its 40 largest kernels
    python tests/benchmarks/traffic.py --quick                     four layers

torch.compile runs as if a Hopper GPU were present, up to the point where it has decided on the kernels; no
code is generated or run, and Triton is not needed. For each kernel the addresses that it reads and writes are
counted, each once. One pass is one activation (B, T, d) in bfloat16. Attention is one opaque kernel forward
and one backward.

The time at memory bandwidth is a prediction for pointwise kernels, normalizations and reductions; matrix
products and attention overlap their traffic with arithmetic. It relies on the internals of torch 2.13 and
warns on other versions. The last line is `BENCH {json}`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import sympy
import torch
import torch._dynamo
import torch._inductor.compile_fx as compile_fx
import torch._inductor.scheduler as scheduler
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import memory
from torch._inductor.dependencies import Dep, MemoryDep
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._ordered_set import OrderedSet
from torch.utils._pytree import tree_map
from torch.utils._sympy.functions import Identity

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402

MEMORY_BYTES = {"H100": 2.9e12, "H200": 4.4e12}  # per second, as reached by a copy
SAMPLE = 1 << 17  # evaluated points of a kernel's index space
CUDA = torch.device("cuda", 0)
HOPPER = SimpleNamespace(
    name="Hopper", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30,
    L2_cache_size=50 << 20, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, is_integrated=False, gcnArchName="",
)  # fmt: skip


@dataclass
class Kernel:
    """One kernel: its kind, the bytes of the buffers it touches, and the operators it came from."""

    kind: str  # product, attention, fused
    read: int
    written: int
    origins: list[str]

    @property
    def moved(self) -> int:
        return self.read + self.written


class Graph(list):
    """The kernels of a graph in order; `peak` is the peak bytes of its buffers and saved tensors."""

    peak = 0


# ------------------------------------------------------------------------------------------------------------
# Simulated GPU
# ------------------------------------------------------------------------------------------------------------


def on_gpu(value: Any) -> Any:
    """Return a fake CPU tensor as a fake GPU tensor."""
    if not isinstance(value, FakeTensor):
        return value
    shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, shape, CUDA)


def move_graph(module: torch.fx.GraphModule) -> None:
    """Move a traced graph to the simulated GPU."""
    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(on_gpu, node.meta["val"])
        node.meta.pop("tensor_meta", None)
        node.args, node.kwargs = (tree_map(lambda x: CUDA if isinstance(x, torch.device) else x, part)
                                  for part in (node.args, node.kwargs))  # fmt: skip
    module.recompile()


@contextlib.contextmanager
def imagined_gpu(graphs: list[list[Kernel]]) -> Iterator[None]:
    """Plan compiled code for a GPU, append its kernels to `graphs`, and run the CPU graph instead."""
    make, run, original = GraphLowering.__init__, GraphLowering.run, {}

    def init(
        lowering: GraphLowering, gm: torch.fx.GraphModule, example_inputs: Any = None, **kwargs: Any
    ) -> None:
        original[lowering] = copy.deepcopy(gm)
        with unset_fake_temporarily():
            move_graph(gm)
            example_inputs = [on_gpu(x) for x in example_inputs]
        make(lowering, gm, example_inputs=example_inputs, **kwargs)

    def run_on_gpu(lowering: GraphLowering, *inputs: Any) -> Any:
        with unset_fake_temporarily():
            inputs = tuple(on_gpu(x) for x in inputs)
        return run(lowering, *inputs)

    def plan(lowering: GraphLowering) -> SimpleNamespace:
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        graphs.append(Graph(count_kernels(lowering)))
        graphs[-1].peak = peak_bytes(lowering)

        def call(arguments: list) -> Any:
            taken = list(arguments)
            arguments.clear()
            return original[lowering](*taken)

        return SimpleNamespace(call=call, runner=None, __file__="")

    patches = [
        mock.patch.object(GraphLowering, "__init__", init),
        mock.patch.object(GraphLowering, "run", run_on_gpu),
        mock.patch.object(GraphLowering, "compile_to_module", plan),
        mock.patch.object(scheduler, "has_triton", lambda *_: True),
        mock.patch.object(compile_fx, "_check_triton_bf16_support", lambda *_: None),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: HOPPER),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(CudaInterface, "is_available", staticmethod(lambda: True)),
        mock.patch.object(CudaInterface, "get_device_properties", staticmethod(lambda *_: HOPPER)),
        mock.patch.object(CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: HOPPER)),
        mock.patch.object(CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ]
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------
# Counting
# ------------------------------------------------------------------------------------------------------------

INDEXING = {"ModularIndexing": lambda x, by, modulus: x // by % modulus, "FloorDiv": lambda x, by: x // by}


def addresses(index: sympy.Expr, ranges: dict[sympy.Symbol, int]) -> tuple[np.ndarray, float]:
    """Return the values of `index` over `ranges`, or over part of the longest range, and the scale factor."""
    used = {var: int(size) for var, size in ranges.items() if var in index.free_symbols}
    if not used:
        return np.zeros(1, np.int64), 1.0
    longest = max(used, key=used.get)
    others = int(np.prod([size for var, size in used.items() if var != longest]))
    part = max(1, min(used[longest], SAMPLE // others))
    grid = np.meshgrid(
        *(np.arange(part if var == longest else size) for var, size in used.items()), indexing="ij"
    )
    plain = index.replace(Identity, lambda x: x)
    values = sympy.lambdify(list(used), plain, modules=[INDEXING, "numpy"])(*grid)
    return np.unique(values), used[longest] / part


def touched(lowering: GraphLowering, name: str, deps: list[Dep]) -> int:
    """Return the bytes of a buffer that these accesses touch, each element once."""
    if not any(lowering.get_dep_size_hint(dep) for dep in deps):  # container of a kernel's outputs
        return 0
    total: float = lowering.get_numel(name)
    if all(isinstance(dep, MemoryDep) and dep.index.free_symbols <= set(dep.ranges) for dep in deps):
        found = [addresses(dep.index, dep.ranges) for dep in deps]
        together = len(np.unique(np.concatenate([values for values, _ in found])))
        total = min(total, together * max(factor for _, factor in found))
    else:  # an external kernel, or data-dependent rows
        total = min(total, max(lowering.get_dep_size_hint(dep, count_bytes=False) for dep in deps))
    return int(total * lowering.get_dtype(name).itemsize)


def count_kernels(lowering: GraphLowering) -> list[Kernel]:
    """Return the scheduler's kernels in order."""
    kernels, outputs = [], set(lowering.get_output_names())
    for node in lowering.scheduler.nodes:
        members = {part.get_name() for part in node.get_nodes()} | {node.get_name()}
        own = {buffer.get_name(): buffer for buffer in node.get_outputs()}
        leaving = {name for name, buffer in own.items()
                   if name in outputs
                   or any(user.get_name() not in members for user in buffer.users)}  # fmt: skip
        reads: dict[str, list[Dep]] = {}
        writes: dict[str, list[Dep]] = {}
        for dep in node.read_writes.reads:
            reads.setdefault(dep.name, []).append(dep)
        for dep in node.read_writes.writes:
            writes.setdefault(dep.name, []).append(dep)
        origins = {
            o.name for part in node.get_nodes() if part.node is not None for o in part.node.get_origins()
        }
        called = str(getattr(node.node, "python_kernel_name", "") or "") if node.is_extern() else ""
        kind = "fused" if not node.is_extern() else "product" if "mm" in called else "attention"
        if type(node).__name__ == "NopKernelSchedulerNode" or "MultiOutput" in type(node.node).__name__:
            continue
        kernels.append(Kernel(
            kind,
            sum(touched(lowering, name, deps) for name, deps in reads.items() if name not in own),
            sum(touched(lowering, name, deps) for name, deps in writes.items() if name in leaving),
            sorted(origins),
        ))  # fmt: skip
    return kernels


def peak_bytes(lowering: GraphLowering) -> int:
    """Return the compiler's estimate of peak bytes: buffers, and the tensors saved for the backward pass."""
    plan, inputs = lowering.scheduler, OrderedSet(lowering.graph_inputs)
    freeable = memory.get_freeable_input_buf(plan.nodes, inputs)
    memory.assign_memory_planning_info_for_scheduler_buffers(plan.nodes, plan.name_to_buf)
    memory.assign_memory_planning_info_for_scheduler_nodes(
        plan.nodes, plan.name_to_fused_node, plan.name_to_buf, freeable
    )
    peak, *_ = memory.estimate_peak_memory_allocfree(
        plan.nodes, freeable, OrderedSet(lowering.get_output_names())
    )
    return peak


@torch.library.custom_op("traffic::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("traffic::attention_backward", mutates_args=())
def attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


attention.register_autograd(
    lambda ctx, g, _: attention_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def opaque(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Attention as one opaque kernel."""
    return attention(q, k, v)[0]


def count(config: tg.Config, rows: int, looped: bool = True) -> dict[str, list[Kernel]]:
    """Return the kernels of a micro-batch of `rows` sequences, forward and backward."""
    graphs: list[list[Kernel]] = []
    with imagined_gpu(graphs), FakeTensorMode():
        model = tg.GPT(config, torch.bfloat16, opaque, np.zeros(config.vocab_size, bool))
        model.looped = looped
        leaves = [part.detach().to(torch.bfloat16).requires_grad_() for part in model.weights()]
        ids, targets = (torch.zeros(rows, config.train_seq_len, dtype=torch.long) for _ in range(2))
        loss = torch.compile(tg.training_loss, dynamic=False, fullgraph=True)
        loss(model, ids, targets, tg.Weights(*leaves)).backward()
    assert len(graphs) == 2, f"{len(graphs)} graphs"
    return dict(zip(("forward", "backward"), graphs, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def summary(config: tg.Config, rows: int, layers: int, counted: dict[str, list[Kernel]]) -> dict[str, Any]:
    """Return kernels and passes by direction and kind, and the fused kernels' time at memory bandwidth."""
    tokens = rows * config.train_seq_len
    one_pass, steps = 2 * tokens * config.model_dim, config.train_batch_tokens / tokens
    table = {}
    for direction, kernels in counted.items():
        for kind in ("fused", "product", "attention"):
            some = [kernel for kernel in kernels if kernel.kind == kind]
            small = sum(kernel.moved < one_pass / 10 for kernel in some)
            passes = sum(kernel.moved for kernel in some) / one_pass
            table[f"{direction}, {kind}"] = dict(kernels=len(some), small=small, passes=round(passes, 1))
    fused = sum(kernel.moved for kernels in counted.values() for kernel in kernels if kernel.kind == "fused")
    times = {name: round(1000 * steps * fused / rate, 1) for name, rate in MEMORY_BYTES.items()}
    peak = max(graph.peak for graph in counted.values()) / 2**30
    return dict(kinds=table, peak_gib=round(peak, 2),
                fused_passes_a_layer=round(fused / one_pass / layers, 1),
                fused_gb_a_step=round(steps * fused / 1e9, 1), fused_ms_a_step=times)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=str(ROOT / "records/recipes/pr1019.env"))
    parser.add_argument("--rows", type=int, default=48, help="sequences per micro-batch")
    parser.add_argument("--kernels", type=int, default=0, help="number of largest fused kernels to print")
    parser.add_argument("--plain", action="store_true", help="before the repeats of BLOCK_ORDER start")
    parser.add_argument("--quick", action="store_true", help="four layers")
    parser.add_argument("--out", type=Path, help="folder for traffic.json")
    arguments = parser.parse_args()
    if not torch.__version__.startswith("2.13."):
        print(f"warning: written for torch 2.13, running {torch.__version__}", file=sys.stderr)
    shorter = {"NUM_LAYERS": "4", "VE_LAYERS": "2,3"} if arguments.quick else {}
    config, _, _ = tg.load_config({"RECIPE": arguments.recipe, **shorter})
    layers = config.num_layers if arguments.plain else len(config.block_rows)
    counted = count(config, arguments.rows, not arguments.plain)
    report = dict(benchmark="traffic", recipe=Path(arguments.recipe).name, layers=layers,
                  rows=arguments.rows, torch=torch.__version__,
                  **summary(config, arguments.rows, layers, counted))  # fmt: skip
    one_pass = 2 * arguments.rows * config.train_seq_len * config.model_dim
    for name, row in report["kinds"].items():
        print(
            f"{name:22} {row['kernels']:4} kernels, {row['small']:3} of them small {row['passes']:7.1f} "
            "passes"
        )
    print(f"peak memory without weights: {report['peak_gib']} GiB")
    print(f"fused: {report['fused_passes_a_layer']} passes per layer, {report['fused_gb_a_step']} GB per "
          "step, ms at "
          f"memory bandwidth: {report['fused_ms_a_step']}")  # fmt: skip
    for direction, kernels in counted.items():
        fused = [
            (kernel.moved, number, kernel) for number, kernel in enumerate(kernels) if kernel.kind == "fused"
        ]
        for _, number, kernel in sorted(fused, key=lambda row: -row[0])[: arguments.kernels]:
            print(f"{direction} {number:4} reads {kernel.read / one_pass:5.2f} writes "
                  f"{kernel.written / one_pass:5.2f} "
                  f"{' '.join(kernel.origins)[:100]}")  # fmt: skip
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tg.write_atomically(arguments.out / "traffic.json", json.dumps(report, indent=1).encode())
    print("BENCH " + json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
