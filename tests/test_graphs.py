"""The step as a GPU wants it, checked without one: it never waits for the device, it is one graph forward and
backward, and nothing is compiled after warm-up.

A tensor on torch's meta device has no values: whatever would bring one to the host (item, tolist, cpu, a
condition, a mask of unknown size) raises there, as it would make the host wait on a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from describe import flops_per_token
from memory import GIB, Memory
from test_levers import ALL, LOSSES, lever_model
from test_meta import FOMAML, REPTILE, TINY
from test_model import SMALL, random_ids, random_model
from test_training import SHORT, quick, sgd, train_here  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from train_gpt import GPT, PRODUCTS, BlockWeights, Config, MetaRates, inner_weights

META = torch.device("meta")
# Three layers: to trace a graph takes seconds, and the more the more layers it has.
FEW_LAYERS = dict(num_layers=3, ve_layers="1,2", xsa_last_n=2)
SMALL_FEW = replace(SMALL, **FEW_LAYERS)
ALL_FEW = replace(ALL, **FEW_LAYERS, block_order="2,0,1,0,2")

# ------------------------------------------------------------------------------------------------------------
# No wait for the device
# ------------------------------------------------------------------------------------------------------------


def meta_model(config: Config) -> GPT:
    with META:
        return GPT(config, torch.bfloat16, word_start=np.arange(config.vocab_size) % 3 == 0)


def meta_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """Those of the run; torch has the fused AdamW for real devices only,
    so it is the one of many tensors here."""
    muon, adamw = train_gpt.make_optimizers(model, model.config)
    groups = [{key: value for key, value in group.items() if key != "fused"} for group in adamw.param_groups]
    return [muon, torch.optim.AdamW(groups, foreach=True)]


def meta_ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long, device=META)


@pytest.mark.parametrize(
    "look",
    [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, bool, torch.nonzero],
    ids=lambda f: f.__name__,
)
def test_a_look_at_a_value_is_noticed(look):
    """The control of the tests below."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        look(torch.zeros(1, device=META))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(grad_clip_norm=0.0),
        dict(cautious_muon=True, decoder_lr_mult=0.5),
        dict(ema_enabled=False, swa_enabled=True, swa_every=1, swa_threshold=1.0),
        LOSSES,
    ],
    ids=str,
)
def test_a_step_does_not_wait(changes):
    """The first step, without late rounding, makes the optimizers' state; the second rounds."""
    model = meta_model(replace(ALL_FEW, **changes))
    optimizers, average = meta_optimizers(model), train_gpt.WeightAverage(model, model.config)
    batches = [(meta_ids(2, 16), meta_ids(2, 16))] * 2
    for step in (1, 2):
        measured = train_gpt.train_step(
            train_gpt.training_loss, model, batches, optimizers, 0.9, 0.9, step == 2
        )
        average.update(step, 0.9)
    assert measured.values.device == META
    assert measured.values.shape == (len(measured.names),) == (1 + len(list(model.parameters())),)


@pytest.mark.parametrize("objective", ["fomaml", "reptile", "deployed"])
def test_a_meta_step_does_not_wait(objective):
    c = replace({"fomaml": FOMAML, "reptile": REPTILE, "deployed": TINY}[objective], meta_sgd_enabled=True)
    model = meta_model(c)
    fast, rates = inner_weights(model, c, objective), MetaRates(model, c)
    if objective == "fomaml":
        _, loss = train_gpt.fomaml_step(model, fast, rates, meta_ids(4, 16), meta_ids(4, 16))
    elif objective == "reptile":
        loss = train_gpt.reptile_step(model, fast, meta_ids(2, fast.sets, 17))
    else:
        length = c.meta_ttt_pieces * c.doc_chunk
        rows = random_ids(fast.sets, length + 1).numpy()
        loss = train_gpt.deployed_step(model, fast, rates, rows, np.full(fast.sets, length))
    if objective != "reptile":  # which has no rates to learn
        rates.step(1.0)
    assert loss.device == META


def test_what_an_artifact_brings_goes_to_the_device_of_the_model():
    """Factors are read on the host."""
    fast = train_gpt.FastWeights(meta_model(TINY), TINY, "bank embed head proj scalar", 2)
    fast.set_factors({name: torch.ones(len(getattr(GPT(TINY), name)), 1, 1) for name in GPT.BANKS})
    assert {rate.device for rate in fast.rates.values() if isinstance(rate, torch.Tensor)} == {META}


# ------------------------------------------------------------------------------------------------------------
# One graph
# ------------------------------------------------------------------------------------------------------------


def one_graph(function):
    """FUNCTION as one graph forward and one backward, run by torch; and the counter of graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, dynamic=False, fullgraph=True), counter


@pytest.mark.parametrize("config", [SMALL_FEW, replace(ALL_FEW, **LOSSES)], ids=["small", "all levers"])
def test_loss_and_gradients_of_the_graph_are_those_of_plain_torch(config):
    model = lever_model(config)
    compiled, counter = one_graph(train_gpt.training_loss)
    for seed in (0, 1):
        ids, targets, results = random_ids(2, 16, seed), random_ids(2, 16, seed + 5), []
        for loss_fn in (train_gpt.training_loss, compiled):
            loss = loss_fn(model, ids, targets)
            results.append((loss.detach(), torch.autograd.grad(loss, list(model.parameters()))))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0)
        for plain, graph in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(plain, graph, rtol=1e-8, atol=1e-12)
    assert counter.frame_count == 1


def test_rounded_banks_use_the_same_graph():
    model = lever_model(SMALL_FEW)
    compiled, counter = one_graph(train_gpt.training_loss)
    optimizers = train_gpt.make_optimizers(model, SMALL_FEW)
    batch = [(random_ids(2, 16), random_ids(2, 16, 1))]
    losses = [
        float(train_gpt.train_step(compiled, model, batch, optimizers, 0.0, 0.9, rounding).loss)
        for rounding in (False, True, False)
    ]
    assert losses[0] == losses[2] != losses[1] and counter.frame_count == 1


@pytest.fixture
def stand_in_compiler(monkeypatch):
    """Make maybe_compile use a stand-in backend and two graphs at most;
    returns the graphs in the order they ran."""
    ran, honest = [], torch.compile

    def backend(module, inputs):
        def run(*args):
            ran.append(id(module))
            return module(*args)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    monkeypatch.setattr(train_gpt, "RECOMPILE_LIMIT", 2)
    monkeypatch.setattr(torch, "compile", lambda f, **how: honest(f, backend=backend, **how))
    return ran


@pytest.mark.parametrize("function", [train_gpt.training_loss, train_gpt.token_nll])
def test_past_the_limit_of_the_compiler_a_function_runs_plainly(function, stand_in_compiler):
    """Losses, and gradients in training, stay those of plain torch;
    one warning; shapes that have a graph keep it."""
    config, warnings = replace(SMALL, num_layers=1, ve_enabled=False, use_compile="1"), []
    model, trains = random_model(config), function is train_gpt.training_loss
    compiled = train_gpt.maybe_compile(function, config, torch.device("cpu"), warnings.append)
    for rows in (1, 2, 3, 4, 2, 3, 1):
        ids, targets, results = random_ids(rows, 12, rows), random_ids(rows, 12, rows + 9), []
        before = len(stand_in_compiler)
        for each in (function, compiled):
            with torch.set_grad_enabled(trains):
                loss = each(model, ids, targets)
            results.append(
                [loss.detach(), *(torch.autograd.grad(loss, list(model.parameters())) if trains else ())]
            )
        torch.testing.assert_close(*results)
        assert len(stand_in_compiler) - before == (rows <= 2)
    assert len(set(stand_in_compiler)) == 2
    assert len(warnings) == 1 and function.__name__ in warnings[0] and "(3, 12)" in warnings[0]


# ------------------------------------------------------------------------------------------------------------
# Fewer products, and weights cast once a step
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looped", [True, False])
@pytest.mark.parametrize(
    "config", [SMALL, ALL, replace(SMALL, block_order="0,1,2,3,4,2,0")], ids=["small", "all", "loop"]
)
def test_fused_products_are_those_of_the_banks_one_by_one(config, looped, monkeypatch):
    """Logits and every gradient, against products with the rows
    of the banks and scales applied to their outputs."""
    model, ids, results = lever_model(config, looped=looped), random_ids(2, 12), []
    parameters = list(model.parameters())

    def one_by_one(own, block, name, x):
        each = [
            getattr(model, bank)[half * config.num_layers + block.layer] for bank, half in PRODUCTS[name][1]
        ]
        y = torch.cat([x @ matrix.mT for matrix in each], dim=-1)
        return {"o": block.attn_scale, "down": block.mlp_scale}.get(name, 1.0) * y

    for tap in (None, lambda block, product, x, y: None):
        if tap is not None:  # it tells the block
            monkeypatch.setattr(
                BlockWeights, "product", lambda own, name, x: one_by_one(own, own.tap.args[0], name, x)
            )
        logits = model(ids, tap=tap)
        loss = train_gpt.nll(logits, random_ids(2, 12, 1)).mean()
        results.append((logits.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-11)
    for fused, alone in zip(results[0][1], results[1][1], strict=True):
        assert (fused is None) == (alone is None)
        if fused is not None:
            torch.testing.assert_close(fused, alone, rtol=1e-8, atol=1e-12)


def test_gradients_of_micro_batches_add_up_in_float32():
    """In bfloat16, 64 equal ones would lose the last ones: 63 + 1 is 64, but 1 + 1 / 256 is 1."""
    found = []
    for parts in (1, 64):
        model = random_model(SMALL, torch.float32)
        model.dtype = torch.bfloat16
        gradients = {}
        optimizers = sgd(model, lr=0.0)
        optimizers[0].register_step_pre_hook(
            lambda *_, model=model, gradients=gradients: gradients.update(
                {name: bank.grad.clone() for name, bank in model.banks().items()}
            )
        )
        batches = [(random_ids(2, 16), random_ids(2, 16, 1))] * parts
        train_gpt.train_step(train_gpt.training_loss, model, batches, optimizers, 1.0, 0.9)
        found.append(gradients)
    for name in GPT.BANKS:
        assert found[0][name].dtype == torch.float32 and found[0][name].abs().max() > 1e-3
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-7)


def test_a_step_casts_and_fuses_the_banks_once(monkeypatch):
    model, make, calls, seen = lever_model(SMALL), GPT.weights, [], set()
    monkeypatch.setattr(GPT, "weights", lambda self, banks: calls.append(1) or make(self, banks))

    def loss_fn(model, ids, targets, weights):
        seen.add(tuple(id(part) for part in weights))
        return train_gpt.training_loss(model, ids, targets, weights)

    batches = [(random_ids(2, 16), random_ids(2, 16, 1))] * 4
    train_gpt.train_step(loss_fn, model, batches, train_gpt.make_optimizers(model, SMALL), 1.0, 0.9)
    assert len(calls) == len(seen) == 1


# ------------------------------------------------------------------------------------------------------------
# What the GPU benchmarks count
# ------------------------------------------------------------------------------------------------------------


def benchmark(name: str):
    """tests/benchmarks/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"tests/benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu():
    return benchmark("gpu")


@pytest.fixture(scope="module")
def traffic():
    return benchmark("traffic")


def planned(traffic, function, *arguments) -> list[list]:
    """(kind, bytes read, bytes written) of the kernels of each graph of FUNCTION on the imagined GPU."""
    graphs: list[list] = []
    with traffic.imagined_gpu(graphs), torch._subclasses.FakeTensorMode() as mode:
        found = torch.compile(function, dynamic=False, fullgraph=True)(
            *(mode.from_tensor(x) for x in arguments)
        )
        if found.requires_grad:
            found.backward(torch.ones_like(found))
    return [[(kernel.kind, kernel.read, kernel.written) for kernel in graph] for graph in graphs]


def test_traffic_counts_what_a_kernel_must_move(traffic):
    """By hand: each element read or written counts once, in the kernels that the compiler makes of these."""
    x, w, table = torch.randn(4096, 512), torch.randn(256, 512), torch.randn(512)
    n = 4 * x.numel()
    assert planned(traffic, lambda x: x.relu() * 2, x) == [[("fused", n, n)]]
    assert planned(traffic, lambda x: x.sum(-1), x) == [[("fused", n, n // 512)]]
    assert planned(traffic, lambda x: x[:, ::2] + x[:, 1::2], x) == [[("fused", n, n // 2)]]
    assert planned(traffic, lambda x: x[:, :256].relu(), x) == [[("fused", n // 2, n // 2)]]
    assert planned(traffic, lambda x: x + x.flip(-1), x) == [[("fused", n, n)]]
    assert planned(traffic, lambda x, table: x * table, x, table) == [[("fused", n + 4 * 512, n)]]
    assert planned(traffic, lambda x: (x * (x.square().mean(-1, keepdim=True) + 1).rsqrt()), x) == [
        [("fused", n, n)]
    ]
    ((product, (kind, read, written)),) = planned(traffic, lambda x, w: (x @ w.mT).relu(), x, w)
    assert product == ("product", n + 4 * w.numel(), n // 2) and (kind, read, written) == (
        "fused",
        n // 2,
        n // 2,
    )
    forward, backward = planned(traffic, lambda x: x.square(), x.requires_grad_())
    assert forward == [("fused", n, n)] and backward == [("fused", 2 * n, n)]


@pytest.mark.slow  # 35 s: the compiler plans three layers of pr1019
def test_the_step_moves_no_more_than_it_did(traffic):
    """A layer of pr1019 in passes over (B, T, d), by the compiler's plan;
    72 before products and scales were fused.

    Queries and keys: 2 and 1 forward, 3.1 and 1.5 backward; the token's own value 2.5 and 6; each norm with
    what is added before it 4 to 9; the MLP's activation 6 and 9.
    """
    config, _, _ = train_gpt.load_config({
        "RECIPE": str(ROOT / "records/recipes/pr1019.env"), "NUM_LAYERS": "3", "VE_LAYERS": "1,2",
        "XSA_LAST_N": "3",
    })  # fmt: skip
    counted = traffic.count(config, 48)
    report = traffic.summary(config, 48, config.num_layers, counted)
    estimate = Memory(config).training(48 * 2048, 48 * 2048) / GIB  # what a card is fitted by
    assert 0.95 < estimate / report["peak_gib"] < 1.15
    operators = {name for kernels in counted.values() for kernel in kernels for name in kernel.origins}
    # of the logits; no kernel works out angles
    assert "tanh" in operators and not {"cos", "sin", "iota"} & operators
    most = 66 if torch.__version__ >= "2.13" else 68  # the compiler of 2.11 fuses a little less: 67.0 for 65
    assert 40 < report["fused_passes_a_layer"] < most
    assert report["kinds"]["forward, product"]["kernels"] == 3 * 4 + 3
    assert report["kinds"]["backward, product"]["kernels"] == 2 * (3 * 4 + 3)


def products(work) -> int:
    """Operations of the matrix products of WORK, counted by torch as they run."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(
        count for operator, count in counts.items() if str(operator) in ("aten.mm", "aten.bmm", "aten.addmm")
    )


@pytest.mark.parametrize(
    "changes", [{}, dict(bigram_vocab_size=0, ve_enabled=False), dict(block_order="0,1,2,3,4,2")]
)
def test_the_floors_count_the_operations_that_run(gpu, changes):
    c = replace(SMALL, train_batch_tokens=64, grad_accum_total=1, **changes)
    model, ids = random_model(c, torch.float32), random_ids(4, 16)
    counted = gpu.count_floors(c)
    forward_and_backward = products(lambda: train_gpt.training_loss(model, ids, ids).backward())
    regions = ("projections", "MLP", "head and side tables")
    assert sum(counted[name][0] for name in regions) == forward_and_backward
    muon = train_gpt.make_optimizers(model, c)[0]
    assert counted["Newton-Schulz"][0] == products(muon.step)
    total = sum(counted[name][0] for name in (*regions, "attention"))
    assert flops_per_token(c) * c.train_batch_tokens == total


@pytest.mark.parametrize("kernel, kind", [
    ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "matrix products"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
    ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel", "optimizer"),
    ("triton_red_fused__softmax_nll_loss_forward_3", "loss"), ("triton_poi_fused_add_mul_7", "pointwise"),
    ("Memcpy HtoD (Pinned -> Device)", "copies"), ("something_else", "other"),
])  # fmt: skip
def test_kernels_are_told_apart_by_name(gpu, kernel, kind):
    assert gpu.region(kernel) == kind


# ------------------------------------------------------------------------------------------------------------
# Nothing is compiled on the clock
# ------------------------------------------------------------------------------------------------------------

TWO_LAYERS = {"NUM_LAYERS": "2", "XSA_LAST_N": "1", "VE_LAYERS": "1"}
PHASES = {
    "loop and late rounding": {"BLOCK_ORDER": "0,1,0", "LOOP_START_FRAC": "0.5", "LATE_QAT": "1",
                               "LATE_QAT_THRESHOLD": "0.7", "WARMDOWN_ITERS": "6"},
    "fomaml, half rows, loop": {"META_TTT_ENABLED": "1", "META_TTT_EVERY": "2", "META_TTT_MIN_SCALE": "0.1",
                                "META_TTT_SPLIT": "cut", "META_TTT_DELTA_WEIGHT": "0.1",
                                "BLOCK_ORDER": "0,1,0", "LOOP_START_FRAC": "0.5"},
    "reptile": {"REPTILE_ENABLED": "1", "REPTILE_TASKS": "2", "REPTILE_TIME_FRAC": "0.4"},
    "deployed": {"META_TTT_ENABLED": "1", "META_TTT_OBJECTIVE": "deployed", "TTT_MODE": "doc_banks",
                 "META_TTT_DOCS": "2", "META_TTT_PIECES": "2", "TTT_CHUNK_SIZE": "32",
                 "META_TTT_TIME_FRAC": "0.4"},
}  # fmt: skip


@pytest.mark.parametrize("phase", [
    pytest.param(name, marks=pytest.mark.slow if "fomaml" in name else ()) for name in PHASES
])  # fmt: skip
def test_nothing_is_compiled_after_warm_up(quick, tmp_path, monkeypatch, phase):  # noqa: F811
    """All graphs, of phases, validations and the scores
    of the artifact too, are made before the clock starts."""
    made, start = [], train_gpt.Clock.start

    def count(module, inputs):
        made.append("graph")
        return module.forward

    def say(clock):
        made.append("start")
        start(clock)

    monkeypatch.setattr(train_gpt, "maybe_compile", lambda f, *_: torch.compile(
        f, backend=count, dynamic=False, fullgraph=True))  # fmt: skip
    monkeypatch.setattr(train_gpt.Clock, "start", say)
    torch._dynamo.reset()
    settings = {**quick, **SHORT, **TWO_LAYERS, "WARMUP_STEPS": "1", "VAL_LOSS_EVERY": "3", **PHASES[phase]}
    train_here(settings, tmp_path)
    first = made.index("start")
    assert "graph" in made[:first] and "graph" not in made[first:]
