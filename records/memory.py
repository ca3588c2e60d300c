"""GPU memory of a run by formula: how many sequences fit at once. For trainer, evaluator, and --describe.

Peak memory is computed before a run starts: --describe needs no GPU, and a run splits its work in time. The
coefficients list what autograd keeps per token (plain torch) and what torch.compile's partitioner keeps;
tests compare them with counted bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

import train_gpt as tg
from train_gpt import GPT, TTT_MODES, Config

GIB = 1 << 30
MEMORY_FRAC = 0.92  # of a card for tensors: the caching allocator loses some to fragmentation
CUDA_BYTES = GIB // 2  # the CUDA context and library workspaces, outside the allocator
MEMORY_ADVICE = {
    "train": "Lower TRAIN_SEQ_LEN, MODEL_DIM or NUM_LAYERS, or take a larger card.",
    "statistics": "Lower TRAIN_SEQ_LEN, choose QUANT_STEPS=sigmas without GRAD_QUANT, or take a larger card.",
    "score": "Lower EVAL_SEQ_LEN, or take a larger card.",
    "slots": "Lower TTT_SLOTS, which changes the score, or take a larger card.",
}


@lru_cache(maxsize=8)
def parameter_shapes(config: Config) -> dict[str, dict[str, torch.Size]]:
    """Shapes of the model's parameters, by optimizer group and name."""
    with torch.device("meta"):
        groups = tg.group_parameters(GPT(config))
    return {group: {name: p.shape for name, p in members} for group, members in groups.items()}


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank's tensors in each part of a run. itemsize: bytes of the compute dtype."""

    config: Config
    ranks: int = 1
    itemsize: int = 2
    compiled: bool = True

    def kept(self) -> int:
        """Bytes kept per token for the backward pass, without logits."""
        c, s, rows = self.config, self.itemsize, self.config.block_rows
        # stream, keys and values, MLP: in bfloat16 plain torch keeps the float32 input of each norm too
        of_d, of_kv, of_m = (9, 3, 2) if self.compiled else (13, 5, 3) if s == 2 else (9, 3, 3)
        # keys and values are repeated for every query head: attention in float32 has no other kernel
        if s == 4:
            of_d, of_kv = of_d + 2, of_kv - 2
        layer = of_d * c.model_dim + of_kv * c.kv_dim + (of_m + c.star_relu) * c.mlp_dim
        no_xsa = sum(row < c.num_layers - c.xsa_last_n for row in rows)
        gates = 0 if self.compiled else 2 * c.skip_gates * (len(rows) // 2)
        ends = 4 - no_xsa + gates + 2 * c.smear_gate + bool(c.bigram_vocab_size)
        return s * (len(rows) * (layer + 14 * c.num_heads) + ends * c.model_dim)

    def training(self, tokens: int, targets: int) -> int:
        """Bytes of activations as the backward pass begins: kept ones, logits, their copies and gradients."""
        c, heads = self.config, 1 + self.config.mtp_num_heads
        logits = heads * self.itemsize + 6 if self.compiled else 8 * (heads + 1 + bool(c.zloss_weight))
        return tokens * self.kept() + targets * (logits * c.vocab_size + heads * 6 * c.model_dim)

    def inference(self, tokens: int, targets: int) -> int:
        """Bytes of activations of a forward pass: an MLP and the streams kept for skips, or the logits."""
        c, skips = self.config, len(self.config.block_rows) // 2 * self.config.unet_skips
        # compiled, residuals are added late
        streams, hidden = (3 * skips + 3, 2) if self.compiled else (skips + 2, 3)
        layer = self.itemsize * (streams * c.model_dim + hidden * c.mlp_dim + c.kv_dim)
        return max(tokens * layer, targets * c.vocab_size * (self.itemsize if self.compiled else 12))

    def state(self) -> int:
        """Bytes of float32 weights, gradients, averages and optimizer state (momentum: this rank's rows)."""
        c, groups = self.config, parameter_shapes(self.config)
        banks = [*groups["bank"].values(), *groups["mtp"].values()]  # Muon's
        total = sum(n.numel() for group in groups.values() for n in group.values())
        momentum = sum(math.ceil(n[0] / (self.ranks if len(n) == 3 else 1)) * n[1:].numel() for n in banks)
        adamw = 2 * (total - sum(n.numel() for n in banks))
        copies = 3 * bool(c.ema_nesterov_beta)  # the average movement, the weights before, and what moved
        # 1: warm-up's copy
        return 4 * ((2 + copies + max(c.ema_enabled + c.swa_enabled, 1)) * total + momentum + adamw)

    def fused(self) -> int:
        """Bytes of Weights, in float32 and cast."""
        c, d = self.config, self.config.model_dim
        numel = c.num_layers * (d + 2 * c.kv_dim + c.mlp_dim) * d + len(c.block_rows) * (d + c.mlp_dim) * d
        return (4 + self.itemsize) * numel

    def step(self, rows: int) -> int:
        """Bytes for a micro-batch of `rows` sequences; Weights have gradients too."""
        tokens = rows * self.config.row_tokens
        return self.state() + 2 * self.fused() + self.training(tokens, tokens)

    def statistics(self, rows: int) -> int:
        """Bytes for the export's gradients or Hessians of `rows` sequences; always in plain torch."""
        plain, tokens = replace(self, compiled=False), rows * self.config.train_seq_len
        gradients = self.config.wants_gradients
        activations = plain.training(tokens, tokens) if gradients else plain.inference(tokens, tokens)
        return self.state() + self.fused() + activations

    def scoring(self, rows: int) -> int:
        """Bytes for a batch of `rows` windows of EVAL_SEQ_LEN with all their targets."""
        tokens = rows * self.config.eval_seq_len
        return self.state() + self.fused() + self.inference(tokens, tokens)

    def adapting(self) -> dict[str, torch.Size]:
        """Shapes of what adapts in TTT_MODE."""
        c, groups, adapts = self.config, parameter_shapes(self.config), TTT_MODES[self.config.ttt_mode].adapts
        if adapts != "adapters":
            return {name: n for group in adapts.split() for name, n in groups[group].items()}
        shapes, r = tg.adapter_shapes(c), c.ttt_lora_rank
        down = {f"{name}.a": torch.Size((n, r, width)) for name, (n, _, width) in shapes.items()}
        return down | {f"{name}.b": torch.Size((n, out, r)) for name, (n, out, _) in shapes.items()}

    def slots(self, slots: int, rows: int) -> int:
        """Bytes for slots with float32 weights and moments, `rows` of them computed at once."""
        c, s, groups, shapes = self.config, self.itemsize, parameter_shapes(self.config), self.adapting()
        adapted = sum(n.numel() for n in shapes.values())
        weights = sum(n.numel() for group in groups.values() for n in group.values())
        factors = sum(n[:-1].numel() + n[:-2].numel() * n[-1] if tg.is_matrix(name) else n.numel()
                      for name, n in shapes.items())  # fmt: skip
        moments = {"precond": factors, "sgd": adapted * bool(c.ttt_momentum), "adamw": 2 * adapted}[
            c.ttt_optimizer
        ]
        scored = s * rows * adapted + self.inference(rows * c.eval_seq_len, rows * c.doc_chunk)
        activations = self.training(rows * (c.ttt_context + c.doc_chunk), rows * c.doc_chunk)
        temporaries = {"precond": 2, "sgd": 2, "adamw": 8}[c.ttt_optimizer]  # of the largest tensor
        # 2: and clipped
        update = 4 * rows * (2 * adapted + temporaries * max(n.numel() for n in shapes.values()))
        held = 4 * (weights + slots * (adapted + moments) + rows * adapted) + self.fused()
        return held + max(scored, s * rows * adapted + activations, update)

    def parts(self) -> dict[str, tuple[Callable[[int], int], int]]:
        """Part of a run -> (bytes as a function of sequences at once, sequences wanted)."""
        bytes_of = dict(train=self.step, statistics=self.statistics, score=self.scoring)
        bytes_of["slots"] = partial(self.slots, self.config.ttt_slots)
        return {part: (bytes_of[part], n) for part, n in tg.wanted_at_once(self.config, self.ranks).items()}


@lru_cache(maxsize=32)
def sequences_at_once(memory: Memory, limit: float) -> dict[str, int]:
    """Part of a run -> sequences to compute at once:
    those wanted, or as many as `limit` bytes hold. 0: none fits.

    A micro-batch also divides a rank's sequences of a step.
    """
    c, parts = memory.config, memory.parts()
    chosen = {part: wanted if limit == math.inf else sum(bytes_of(n) <= limit for n in range(1, wanted + 1))
              for part, (bytes_of, wanted) in parts.items()}  # fmt: skip
    rows = c.step_seqs // memory.ranks
    chosen["train"] = max((n for n in range(1, chosen["train"] + 1) if rows % n == 0), default=0)
    return chosen


def usable_bytes(card: int) -> float:
    """Bytes that tensors may take of a card with so many bytes."""
    return MEMORY_FRAC * card - CUDA_BYTES


def memory_limit(config: Config) -> float:
    """Bytes that tensors may take on this rank's GPU; infinite on a CPU."""
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return usable_bytes(torch.cuda.get_device_properties().total_memory) if on_gpu else math.inf


def memory_here(config: Config) -> Memory:
    """Memory of this run on this machine."""
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    return Memory(config, tg.world_size(), tg.compute_dtype(device).itemsize, config.use_compile != "0")


def check_memory(config: Config, parts: Sequence[str]) -> list[str]:
    """Log line with the choice for these parts, none on a CPU. UserError if one sequence does not fit."""
    memory, limit, chosen = memory_here(config), memory_limit(config), tg.at_once(config)
    shown, problems = [f"memory: usable_gib:{limit / GIB:.2f}"], []
    for part, (bytes_of, wanted) in memory.parts().items():
        if part in parts and not chosen[part]:
            problems.append(
                f"{part} needs {bytes_of(1) / GIB:.2f} GiB for one sequence. {MEMORY_ADVICE[part]}"
            )
        elif part in parts:
            needed = bytes_of(chosen[part]) / GIB
            shown.append(f"{part}_sequences:{chosen[part]} {part}_wanted:{wanted} {part}_gib:{needed:.2f}")
    if problems:
        raise tg.UserError(
            f"GPU memory is too small, {limit / GIB:.2f} GiB are usable: " + "; ".join(problems)
        )
    return [" ".join(shown)] if limit < math.inf else []
