"""Train, average, quantize, and package a Parameter Golf language model, and score it from disk.

On two cores of an AMD EPYC (torch 2.13.0, Python 3.11.7, 2026-11-27) the demo recipe reaches 1.707 bits per
byte after 120 s of training (artifact, sliding windows, mean of three seeds, sd 0.014); plain transformers
1.855 (as many parameters) and 1.767 (as wide). Bytes and learning rates are not matched.

    python train_gpt.py --help                                        every setting, its default and unit
    RECIPE=records/recipes/pr1019.env python train_gpt.py --describe  the model of a recipe
    RECIPE=records/recipes/demo.env torchrun --standalone --nproc_per_node=1 train_gpt.py
    RECIPE=records/recipes/pr1019.env torchrun --standalone --nproc_per_node=8 train_gpt.py

Read top to bottom: input files, settings, ranks and log, data, bytes per token, model, parameter groups and
optimizers, averaging, scoring, test-time training, calibration, quantization, coding, artifact, GPU memory,
meta-learning, training, main. No section uses one below it, and importing the file only defines things.

Bank: a 3-D parameter with one kind of matrix of all blocks, a row each. Window: tokens of one forward pass,
of which some targets are scored. Chunk: windows that are scored before anything adapts on them. Fast weights:
what adapts at test time, or in an inner loop. Shapes: B batch rows, T tokens of a row, d = model_dim, H query
heads, K key/value heads, D = d / H, L bank rows, A applications of blocks (more than L with depth
recurrence), m = MLP width, V vocabulary.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import importlib
import inspect
import io
import json
import lzma
import math
import os
import platform
import re
import reprlib
import secrets
import signal
import stat
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import cache, cached_property, lru_cache, partial, wraps
from glob import escape, glob
from itertools import islice, pairwise, takewhile
from pathlib import Path
from types import MappingProxyType, SimpleNamespace, UnionType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SIZE_CAP = 16_000_000  # bytes of code and model together, decimal
BOS_ID = 1  # first token of every document in every published export
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """User error: a bad setting, file, or folder. Exit code 2."""


def shown(text: object) -> str:
    """Escape control characters, which may come from any file that is read, for terminals and logs."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))


# ------------------------------------------------------------------------------------------------------------
# Input files
# ------------------------------------------------------------------------------------------------------------

# What a user, a cluster, or another program can write is read by these alone: a regular file within a limit
# of bytes, then a decoder, whose errors are of any type, then the form that the content must have. Sizes are
# checked before memory is allocated. What is wrong is one UserError: file, place, value, what is expected.

TEXT_FILE, METRICS_FILE, STATE_FILE = 1 << 24, 1 << 30, 1 << 33  # most bytes of a text, a log, a torch.save
NO_TEXT = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # what no name of a file contains
BRIEF = reprlib.Repr()
BRIEF.maxstring = BRIEF.maxother = 160
FORMS = {  # what is expected, and whether a value is that
    int: ("a whole number from 0 on", lambda value: type(value) is int and 0 <= value < 1 << 48),
    float: ("a finite number", lambda value: type(value) in (int, float) and abs(value) < 1e300),
    str: ("text", lambda value: isinstance(value, str) and not NO_TEXT.search(value)),
}


def open_input(path: str | Path, limit: float = math.inf) -> BinaryIO:
    """Open a regular file, behind any link, of at most `limit` bytes. A FIFO is not waited for."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}") from error
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return file
    file.close()
    raise UserError(f"{path}: {status.st_size} bytes, expected a regular file of at most {limit} bytes")


def read_file(path: str | Path, limit: int = TEXT_FILE) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    with open_input(path, limit) as file:
        return file.read()


@contextmanager
def decoding(place: str | Path, expected: str) -> Iterator[None]:
    """Turn any error inside, where other libraries decode what `place` holds, into a UserError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(f"{place} cannot be read: {error.__cause__.strerror}") from error
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{place} is not {expected}: {kind}{' '.join(str(error).split())[:400]}") from error


def check_form(value: Any, form: Any, place: str) -> None:
    """UserError at the first place in a decoded file that lacks its form.

    form: a type, see FORMS; [form] of all entries of a list; {str: form} of all values of a dict, or
    {name: form} of some, where "name?" may be absent or null.
    """
    kind = form if isinstance(form, (type, UnionType)) else type(form)
    expected, is_right = FORMS.get(kind, (kind, lambda value: isinstance(value, kind)))
    if not is_right(value):
        raise UserError(f"{place}: {BRIEF.repr(value)}, expected {getattr(expected, '__name__', expected)}")
    if isinstance(form, list):
        for number, entry in enumerate(value):
            check_form(entry, form[0], f"{place}[{number}]")
    for name, inner in form.items() if isinstance(form, dict) else ():
        for key in value if name is str else (name.removesuffix("?"),):
            if name in (str, key) or value.get(key) is not None:
                check_form(value.get(key), inner, f"{place}: {key}")


def parse_json(text: bytes, form: Any, place: str | Path) -> Any:
    """The value of a JSON text, which must have `form`."""
    with decoding(place, "JSON"):
        value = json.loads(text.decode("utf-8-sig"))
    check_form(value, form, str(place))
    return value


def load_tensors(file: BinaryIO) -> Any:
    """What torch.save wrote: tensors and plain values. It compresses nothing: the file bounds the memory."""
    records = zipfile.ZipFile(file).infolist()
    if (needed := sum(record.file_size for record in records)) > file.seek(0, os.SEEK_END):
        raise UserError(f"{needed} bytes of records in a file of {file.tell()}")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------

# One frozen dataclass holds every setting, the evaluator's too; names and meanings are the lineage's where it
# has them. The environment variable is the field's name in capitals. Whatever is wrong is said at once,
# before anything starts: a typo in a sweep costs money.

MAX_NUMBERS = 1 << 27  # parameters and rotary tables of a model, at one bit each as many as the cap holds
PACKED_ROWS = 8  # of a step under DATA_ORDER=packed, whatever the number of ranks
ALL_WEIGHTS = "bank embed memory head proj gate smear scalar"  # groups of PARAM_GROUPS, as in the artifact


class TTTMode(NamedTuple):
    """What adapts at test time, and whether each document has weights of its own.

    by_documents: each document starts from the artifact's weights, with a set of its own; otherwise one set
    adapts over the whole text. adapts: groups of PARAM_GROUPS, "adapters", or "" for nothing.
    """

    by_documents: bool
    adapts: str


TTT_MODES = {
    "none": TTTMode(False, ""),
    "banks": TTTMode(False, "bank"),
    "all": TTTMode(False, ALL_WEIGHTS),
    "lora": TTTMode(False, "adapters"),
    "doc_banks": TTTMode(True, ALL_WEIGHTS),
    "doc_lora": TTTMode(True, "adapters"),
    "phased": TTTMode(True, "adapters"),
}


def setting(default: Any, text: str, low: float | tuple | None = None, high: float | None = None) -> Any:
    """A field of Config: default, one line of help with the unit, and its range or a tuple of choices."""
    choices, low = (low, None) if isinstance(low, tuple) else ((), low)
    high = 2**31 - 1 if type(default) is int and high is None else high
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


def int_list(text: str) -> list[int]:
    """The numbers of a comma list."""
    return [int(part) for part in text.split(",") if part.strip()]


@dataclass(frozen=True)
class Config:
    """Every setting of trainer and evaluator. The environment variable is the field's name in capitals."""

    # fmt: off
    # run
    run_id: str = setting("", "folder of the run under runs/; empty: date, time, and seed")
    seed: int = setting(1337, "seed of initial weights, data order, and sampling", 0, 2**64 - 1)
    device: str = setting("auto", "compute device; auto: a GPU if there is one", ("auto", "cpu", "cuda"))
    attention: str = setting("auto", "attention kernel; auto: first usable", ("auto", "fa3", "fa2", "sdpa"))
    use_compile: str = setting("auto", "torch.compile; auto: on GPUs only", ("auto", "0", "1"))
    train_log_every: int = setting(500, "steps between training log lines", 1)
    val_loss_every: int = setting(4000, "steps between validations; 0: none before the export", 0)
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: on a signal and after each phase", 0)
    resume: str = setting("never", "auto: resume from a checkpoint of RUN_ID if any", ("never", "auto"))
    dist_timeout: float = setting(600.0, "timeout of collectives, seconds", 1)
    # data
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of the token shards")
    train_files: str = setting("", "glob of the training shards; empty: DATA_PATH/fineweb_train_*.bin")
    val_files: str = setting("", "glob of the validation shards; empty: DATA_PATH/fineweb_val_*.bin")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    data_order: str = setting("sequential", "order of training sequences; shuffled: anew every epoch; "
                              "packed: 8 long rows a step, documents in pieces of TRAIN_SEQ_LEN",
                              ("sequential", "shuffled", "packed"))
    # model
    vocab_size: int = setting(1024, "vocabulary size (V)", 4, 65536)
    num_layers: int = setting(11, "transformer blocks (L)", 1, 1024)
    model_dim: int = setting(512, "width of the residual stream (d)", 8)
    num_heads: int = setting(8, "query heads (H)", 1)
    num_kv_heads: int = setting(4, "key/value heads (K)", 1)
    mlp_mult: float = setting(3.0, "MLP width m = int(MLP_MULT * MODEL_DIM)", 0.1)
    mlp_hidden: int = setting(0, "MLP width m; 0: by MLP_MULT", 0)
    mlp_leaky_slope: float = setting(0.5, "activation LeakyReLU(slope)^2; 0: ReLU^2", 0, 1)
    star_relu: bool = setting(False, "learned scale and bias per hidden channel after the activation")
    block_order: str = setting("", "comma list: bank row of each layer (depth recurrence); empty: each once")
    loop_shared: bool = setting(False, "repeats in BLOCK_ORDER share gates and scales, not only matrices")
    parallel_start_layer: int = setting(0, "second half: bank row from which attention and MLP have residual "
                                        "lanes of their own; 0: one lane", 0)
    tie_embeddings: bool = setting(True, "share one matrix between embedding and output head")
    logit_softcap: float = setting(30.0, "softcap: logits = cap * tanh(logits / cap); 0: off", 0)
    rope_base: float = setting(10000.0, "base of the rotary frequencies", 1)
    rope_dims: int = setting(16, "rotated dimensions per head; 0: all", 0)
    rope_ntk_len: int = setting(1024, "TRAIN_SEQ_LEN above which ROPE_BASE is scaled (NTK); 0: never", 0)
    qk_gain_init: float = setting(1.5, "initial query gain per head", 0)
    xsa_last_n: int = setting(11, "number of last bank rows with exclusive self-attention", 0)
    xsa_learned: bool = setting(False, "learn the fraction of exclusive self-attention of each head")
    attn_gate: int = setting(0, "inputs of a gate per head after attention; 0: no gate", 0)
    attn_gate_scale: float = setting(0.5, "factor of the attention gate's inputs", 0)
    key_offset: int = setting(0, "dimension from which keys are those of the token before; 0: none", 0)
    ln_scale: bool = setting(True, "scale the norms of bank row l by 1 / sqrt(l + 1)")
    resid_mix: bool = setting(True, "mix the first embedding into the input of every block, per channel")
    phase_resid_mix: bool = setting(False, "initial mix: first embedding (early layers) to stream (late)")
    unet_skips: bool = setting(True, "U-Net skips: first-half outputs feed the second half, last to first")
    skip_gates: bool = setting(False, "blend skips in by a sigmoid gate per channel instead of adding them")
    smear_gate: bool = setting(True, "SmearGate: blend each embedding with its left neighbor's")
    smear_inputs: int = setting(0, "inputs of a SmearGate before the norm; 0: after it, by channel", 0)
    bigram_vocab_size: int = setting(3072, "rows of the hashed bigram table; 0: no table", 0)
    bigram_dim: int = setting(112, "width of the bigram table", 1)
    bigram_hash: str = setting("xor", "bigram hash: of #198 (xor) or #494 (linear)", ("xor", "linear"))
    pos_conditional_bigram: bool = setting(False, "give word-start tokens one half of the bigram rows")
    word_start_boost: bool = setting(False, "learned factor of the bigram embedding at word starts")
    bigram_signs: bool = setting(False, "fixed random signs per bigram, so that collisions cancel")
    doc_borders: str = setting("respect", "what stays within a document: smear and bigram (respect), "
                               "attention too, or nothing (published)", ("respect", "attention", "published"))
    ve_enabled: bool = setting(True, "shared value embeddings in VE_LAYERS")
    ve_dim: int = setting(128, "width of the value embedding", 1)
    ve_layers: str = setting("9,10", "comma list of the bank rows that add the value embedding")
    num_memory_tokens: int = setting(0, "learned vectors in place of the first embeddings of a window", 0)
    train_seq_len: int = setting(2048, "tokens per sequence (T); packed: of a piece at the end", 2, 1 << 20)
    tied_embed_init_std: float = setting(0.005, "standard deviation of the initial token embedding", 0)
    overtone_init: bool = setting(False, "initial embedding with singular values falling as 1 / sqrt(k)")
    # training
    iterations: int = setting(20000, "maximum number of steps", 1)
    max_wallclock_seconds: float = setting(600.0, "limit of the contest clock, seconds; 0: none", 0)
    train_batch_tokens: int = setting(786432, "tokens per step, all ranks together", 2)
    train_seq_schedule: str = setting("", "packed: LENGTH:FRACTION pairs, pieces to a fraction of a run, as "
                                      "1024:0.1,2048:0.7; then TRAIN_SEQ_LEN")
    seq_change_warmup_steps: int = setting(0, "packed: steps of LR warm-up after a change of length", 0)
    grad_accum_total: int = setting(8, "micro-batches per step, all ranks together; more on a small GPU", 1)
    warmup_steps: int = setting(20, "warm-up steps on random tokens, off the clock and undone", 0)
    warmdown_iters: int = setting(4000, "LR warmdown, steps", 0)
    warmdown_frac: float = setting(0.0, "LR warmdown, fraction of the run; 0: WARMDOWN_ITERS", 0, 1)
    warmdown_shape: str = setting("linear", "LR warmdown shape", ("linear", "cosine"))
    min_lr: float = setting(0.0, "LR floor, fraction of the peak", 0, 1)
    min_lr_shape: str = setting("blend", "blend: fall to MIN_LR; floor: cut off there", ("blend", "floor"))
    matrix_lr: float = setting(0.025, "Muon LR of the banks", 0)
    scalar_lr: float = setting(0.025, "AdamW LR of gates, scales, and small projections", 0)
    tied_embed_lr: float = setting(0.035, "AdamW LR of the embeddings with a tied head", 0)
    embed_lr: float = setting(0.6, "AdamW LR of the embeddings with an untied head", 0)
    head_lr: float = setting(0.008, "AdamW LR of an untied head", 0)
    decoder_lr_mult: float = setting(1.0, "LR factor of the second half of the blocks", 0)
    muon_momentum: float = setting(0.99, "Muon momentum (Nesterov)", 0, 0.9999)
    muon_momentum_warmup_start: float = setting(0.92, "Muon momentum of the first step", 0, 0.9999)
    muon_momentum_warmup_steps: int = setting(1500, "steps until MUON_MOMENTUM is reached", 0)
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", 1)
    muon_coeffs: str = setting("quintic", "Newton-Schulz: fixed, or of Polar Express", ("quintic", "polar"))
    muon_row_norm: bool = setting(False, "normalize the rows of an update before Newton-Schulz (MuonEq-R)")
    normuon_beta2: float = setting(0.0, "NorMuon: decay of the rows' second moments; 0: off", 0, 0.9999)
    muon_wd: float = setting(0.04, "decoupled weight decay of the banks", 0)
    muon_cautious_wd: bool = setting(False, "decay only entries that the update also shrinks")
    cautious_muon: bool = setting(False, "drop update entries whose sign is not the gradient's")
    adam_wd: float = setting(0.04, "decoupled weight decay of AdamW's matrices", 0)
    embed_wd: float = setting(-1.0, "decoupled weight decay of the embeddings; below 0: ADAM_WD", -1)
    scalar_wd: float = setting(0.0, "decoupled weight decay of gates, gains, and scales", 0)
    beta1: float = setting(0.9, "AdamW beta1", 0, 0.9999)
    beta2: float = setting(0.95, "AdamW beta2", 0, 0.999999)
    adam_eps: float = setting(1e-8, "AdamW epsilon", 0)
    grad_clip_norm: float = setting(0.3, "maximum global gradient norm; 0: no clipping", 0)
    ema_enabled: bool = setting(True, "export the exponential moving average of the weights")
    ema_decay: float = setting(0.997, "EMA decay per step", 0, 0.999999)
    ema_export_share: float = setting(1.0, "share of the average, not the last weights, in the export", 0, 1)
    ema_nesterov_beta: float = setting(0.0, "before a step, move along the average movement of the weights, "
                                       "times so much and the LR scale; 0: off", 0, 0.9999)
    ema_update_every: int = setting(1, "steps between EMA updates, each with EMA_DECAY to that power", 1)
    swa_enabled: bool = setting(False, "export the mean of late snapshots (of the EMA, if that is on)")
    swa_every: int = setting(50, "steps between SWA snapshots", 1)
    swa_threshold: float = setting(0.2, "LR scale below which snapshots are taken", 0, 1)
    loop_start_frac: float = setting(0.0, "fraction of the run before BLOCK_ORDER's repeats switch on", 0, 1)
    mtp_num_heads: int = setting(0, "multi-token prediction heads, in training only", 0)
    mtp_loss_weight: float = setting(0.2, "weight of the mean multi-token prediction loss", 0)
    mtp_weights: str = setting("", "comma list: loss weights of the targets after the next one, by the same "
                               "head; each falls to 0 in its part of the run, the last one first")
    prefix_loss_weight: float = setting(0.0, "loss weight of the target's longest prefix, to 2/3 of a run", 0)
    zloss_weight: float = setting(0.0, "z-loss: weight of the mean squared log partition function", 0)
    late_qat: bool = setting(False, "QAT: round the banks per row in late steps, not as the export does")
    late_qat_threshold: float = setting(0.15, "LR scale below which LATE_QAT rounds", 0, 1)
    # meta
    meta_ttt_enabled: bool = setting(False, "train for the weights that test-time steps lead to")
    meta_ttt_objective: str = setting("fomaml", "fomaml: a term in some steps; deployed: a last phase of the "
                                      "evaluator's own steps on averaged weights", ("fomaml", "deployed"))
    meta_ttt_every: int = setting(8, "fomaml: steps between meta-steps", 1)
    meta_ttt_min_scale: float = setting(0.5, "fomaml: LR scale above which meta-steps are taken", 0, 1)
    meta_ttt_loss_weight: float = setting(0.5, "fomaml: weight of the loss after the inner loop", 0)
    meta_ttt_delta_weight: float = setting(0.0, "fomaml: weight of the loss after minus before the loop", 0)
    meta_ttt_split: str = setting("batch", "fomaml: support/query split by sequence (batch), or first/second "
                                  "half of each, with (seq) or without (cut) attention across",
                                  ("batch", "seq", "cut"))
    meta_ttt_freeze_blocks: int = setting(0, "fomaml: first blocks that the inner loop does not change", 0)
    meta_ttt_inner_lr: float = setting(0.002, "fomaml: inner learning rate (SGD)", 0)
    meta_ttt_inner_steps: int = setting(1, "fomaml: inner steps", 1)
    meta_ttt_time_frac: float = setting(0.2, "deployed: fraction of the run, at its end", 0.001, 0.9)
    meta_ttt_outer_lr: float = setting(0.1, "deployed: outer LR, fraction of the peak rates, falling to 0", 0)
    meta_ttt_docs: int = setting(16, "deployed: documents per step, all ranks together", 1)
    meta_ttt_pieces: int = setting(8, "deployed: maximum chunks of TTT_CHUNK_SIZE per document", 2)
    meta_sgd_enabled: bool = setting(False, "Meta-SGD: learn a factor of the inner LR per bank row; with the "
                                     "deployed objective, stored in the artifact and applied to TTT_LR")
    meta_sgd_lr: float = setting(0.0, "Adam LR of the log factors; 0: SCALAR_LR", 0)
    reptile_enabled: bool = setting(False, "a last phase of Reptile on the MLPs, on averaged weights")
    reptile_time_frac: float = setting(0.2, "Reptile: fraction of the run, at its end", 0.001, 0.9)
    reptile_layers: str = setting("", "Reptile: comma list of the blocks that learn; empty: the last quarter")
    reptile_tasks: int = setting(8, "Reptile: inner loops per step, all ranks together", 1)
    reptile_inner_steps: int = setting(3, "Reptile: SGD steps, each on a sequence of its own", 1)
    reptile_inner_lr: float = setting(0.1, "Reptile: inner learning rate", 0)
    reptile_outer_lr: float = setting(0.01, "Reptile: step toward the mean of the adapted weights", 0, 1)
    meta_control: bool = setting(False, "ablation, same cost: inner LR 0; Reptile: no inner progress")
    # export
    quant_steps: str = setting("two_sided", "quantizer scales: by row and column, k sigmas per row, "
                             "or a clip search per row", ("two_sided", "sigmas", "clip"))
    quant_loss: float = setting(0.001, "two_sided: target loss increase, nats per token (predicted)", 1e-9)
    quant_trellis: bool = setting(False, "two_sided: trellis-coded quantization")
    matrix_bits: int = setting(6, "bits per code of the banks, in sigmas, clip, and late rounding", 3, 8)
    matrix_clip_sigmas: float = setting(6.0, "clip range of a bank row, sigmas and late rounding, in sd", 0.5)
    attn_clip_sigmas: float = setting(0.0, "sigmas: that of attention's banks; 0: MATRIX_CLIP_SIGMAS", 0)
    mlp_clip_sigmas: float = setting(0.0, "sigmas: that of the MLP's banks; 0: MATRIX_CLIP_SIGMAS", 0)
    embed_bits: int = setting(8, "bits per code of the embeddings, in sigmas and clip", 3, 8)
    gptq_embed: bool = setting(False, "GPTQ on the matrix of the head, by the Hessian of what it reads")
    embed_clip_sigmas: float = setting(0.0, "clip range of a table row, in sd; 0: its largest entry", 0)
    grad_quant: bool = setting(False, "one bit more or less by mean squared gradient (#398)")
    grad_quant_int7_frac: float = setting(0.1, "fraction of matrices with one bit more", 0, 1)
    grad_quant_int5_frac: float = setting(0.2, "fraction of matrices with one bit less", 0, 1)
    calib_source: str = setting("train", "calibration text: training or self-generated", ("train", "self"))
    gptq_calib_batches: int = setting(16, "calibration micro-batches for GPTQ; 0: round to nearest", 0)
    gptq_grad_batches: int = setting(8, "calibration micro-batches for gradients, if needed", 1)
    gptq_damp: float = setting(0.01, "Hessian damping, fraction of the mean diagonal", 1e-9, 1)
    prune_frac: float = setting(0.0, "fraction of weights zeroed per matrix before rounding", 0, 0.99)
    compressor: str = setting("zstd", "entropy coder of the codes", ("zstd", "ans"))
    fit_size: bool = setting(False, "scale all quantizer scales by one factor to just fit the size cap")
    code_bytes: int = setting(0, "bytes of the programs that will ship, for FIT_SIZE; 0: of these files", 0)
    # scoring
    eval_seq_len: int = setting(2048, "tokens per scoring window", 2, 1 << 20)
    eval_stride: int = setting(64, "targets scored per sliding window", 1)
    eval_batch_seqs: int = setting(128, "windows per forward pass and rank", 1)
    # evaluator
    model_path: str = setting("", "artifact or final_model.pt; empty: the artifact of runs/RUN_ID")
    eval_budget_seconds: float = setting(600.0, "time limit of the adapted score, seconds; 0: none", 0)
    audit_tokens: int = setting(8192, "targets that --audit evaluates, a 24th of a short text's", 2)
    ttt_mode: str = setting("doc_banks", "what adapts at test time, see TTT_MODES", tuple(TTT_MODES))
    ttt_protocol: str = setting("legal", "legal: score, then adapt; the others are marked invalid",
                                ("legal", "adapt_first", "two_pass"))
    ttt_optimizer: str = setting("precond", "precond: gradient over the root of its second moment",
                                 ("precond", "sgd", "adamw"))
    ttt_moments: str = setting("own", "second moments by documents: of prior and document (own), also of "
                               "earlier documents (prefix), or of all slots so far (shared)",
                               ("own", "prefix", "shared"))
    ttt_prior_seqs: int = setting(16, "generated sequences for the prior of the moments; 0: no prior", 0)
    ttt_prior_chunks: int = setting(4, "chunks of TTT_CHUNK_SIZE tokens per generated sequence", 1)
    ttt_prior_weight: float = setting(64.0, "weight of a generated chunk, in scored chunks", 1e-6)
    ttt_lr: float = setting(3e-5, "learning rate; the default suits 27 M parameters, 1e-3 suits 1 M", 0)
    ttt_lr_schedule: str = setting("flat", "LR schedule; phased: of the base's steps", ("flat", "cosine"))
    ttt_in_lr_mult: float = setting(1.0, "LR factor of the MLP input matrices", 0)
    ttt_out_lr_mult: float = setting(1.0, "LR factor of the MLP output matrices", 0)
    ttt_freeze_blocks: int = setting(0, "first blocks that do not adapt", 0)
    ttt_layers: str = setting("", "comma list of the blocks that adapt; empty: all that are not frozen")
    ttt_momentum: float = setting(0.0, "SGD momentum; AdamW beta1", 0, 0.9999)
    ttt_beta2: float = setting(0.99, "AdamW beta2; moment decay of precond by flat chunks", 0, 0.999999)
    ttt_weight_decay: float = setting(0.0, "AdamW decoupled weight decay", 0)
    ttt_grad_clip: float = setting(2.0, "maximum gradient norm per set of weights; 0: no clipping", 0)
    ttt_epochs: int = setting(1, "passes over each scored chunk", 0)
    ttt_chunk_tokens: int = setting(32768, "targets per chunk, by flat chunks", 1)
    ttt_chunk_size: int = setting(128, "targets per chunk, by documents; at most EVAL_SEQ_LEN", 1)
    ttt_chunk_by_length: str = setting("", "chunks of short documents, as 256:8,2000:24 (up to 256 targets: "
                                       "8); empty: all alike, since a length is known only at the end")
    ttt_slots: int = setting(16, "documents of a group that adapt at once, by documents", 1, 4096)
    ttt_groups: int = setting(8, "groups of documents with own slots; a rank owns whole groups", 1, 4096)
    ttt_context: int = setting(0, "left context of the tokens adapted on", 0)
    ttt_batch_seqs: int = setting(32, "sequences per step, by flat chunks", 1)
    ttt_top_frac: float = setting(1.0, "fraction of a scored chunk to adapt on, highest loss first", 0.001, 1)
    ttt_lora_rank: int = setting(8, "adapter rank", 1)
    ttt_lora_alpha: float = setting(8.0, "adapter scale is alpha / rank", 0)
    ttt_lora_form: str = setting("series", "series: adapters by bank row; parallel: by application of a "
                                 "block, those of O and MLP beside them", ("series", "parallel"))
    ttt_matrices: str = setting("qkvomh", "parallel adapters: of q, k, v, o, MLP, head")
    ttt_warm_start_a: bool = setting(False, "keep the adapters' A when a new document begins")
    phased_ttt_prefix_docs: int = setting(2000, "phased: documents before the last phase boundary", 1)
    phased_ttt_num_phases: int = setting(3, "phased: boundaries at which the base weights adapt", 1)
    global_ttt_lr: float = setting(0.001, "phased: SGD learning rate of the base", 0)
    global_ttt_momentum: float = setting(0.9, "phased: SGD momentum of the base", 0, 0.9999)
    global_ttt_grad_clip: float = setting(-1.0, "phased: TTT_GRAD_CLIP of the base; below 0: the same", -1)
    ppm_alpha: float = setting(1.0, "model weight in a mixture with an order-1 PPM; 1: no mixture", 0, 1)
    # fmt: on

    head_dim = property(lambda self: self.model_dim // self.num_heads)
    kv_dim = property(lambda self: self.num_kv_heads * self.head_dim)
    mlp_dim = property(lambda self: self.mlp_hidden or int(self.mlp_mult * self.model_dim))
    rotary_dims = property(lambda self: self.rope_dims or self.head_dim)
    value_layers = property(lambda self: int_list(self.ve_layers) if self.ve_enabled else [])
    token_lr = property(lambda self: self.tied_embed_lr if self.tie_embeddings else self.embed_lr)
    token_wd = property(lambda self: self.adam_wd if self.embed_wd < 0 else self.embed_wd)
    step_seqs = property(lambda self: self.train_batch_tokens // self.row_tokens)  # rows, of all ranks
    doc_chunk = property(lambda self: min(self.ttt_chunk_size, self.eval_seq_len))  # targets, by documents
    wants_gradients = property(lambda self: self.quant_steps == "two_sided" or self.grad_quant)  # to export

    @property
    def block_rows(self) -> list[int]:
        """The bank row of each layer of the forward pass."""
        return int_list(self.block_order) or list(range(self.num_layers))

    @property
    def block_layers(self) -> list[int]:
        """The bank row of each module in GPT.blocks: one a row, or one a layer of the forward pass."""
        return list(range(self.num_layers)) if self.loop_shared else self.block_rows

    @property
    def lanes_last(self) -> bool:
        """Whether the second half of the layers ends with those from PARALLEL_START_LAYER on."""
        rows = self.block_rows
        orders = [rows, list(dict.fromkeys(rows)) if self.loop_start_frac else rows]  # also before the loop
        halves = [[row >= self.parallel_start_layer for row in order[len(order) // 2 :]] for order in orders]
        return all(any(half) and half == sorted(half) for half in halves)

    @property
    def ahead_weights(self) -> list[float]:
        """Loss weights of the targets after the next one."""
        return [float(part) for part in self.mtp_weights.split(",") if part.strip()]

    @property
    def row_tokens(self) -> int:
        """Tokens of a training row: a sequence, or an eighth of the step (DATA_ORDER=packed)."""
        packed = max(1, self.train_batch_tokens // PACKED_ROWS)
        return packed if self.data_order == "packed" else self.train_seq_len

    @property
    def piece_lengths(self) -> list[tuple[float, int]]:
        """Fraction of the run, and the longest piece of a document up to there; ascending."""
        pairs = re.findall(r"(\d+)[:@]([\d.]+)", self.train_seq_schedule)
        found = sorted((float(fraction), int(length)) for length, fraction in pairs)
        return [*found, (math.inf, self.train_seq_len)]

    @property
    def phases(self) -> dict[str, float]:
        """The phases of a run in their order, and the fraction of the run that each takes."""
        deployed = self.meta_ttt_enabled and self.meta_ttt_objective == "deployed"
        late = {"reptile": self.reptile_time_frac} if self.reptile_enabled else {}
        late |= {"deployed": self.meta_ttt_time_frac} if deployed else {}
        return {"train": 1 - sum(late.values()), **late}

    @property
    def chunks_by_length(self) -> list[tuple[int, int]]:
        """Largest number of targets of a document, and the size of its chunks; ascending."""
        pairs = re.findall(r"(\d+):(\d+)", self.ttt_chunk_by_length)
        return sorted((int(length), int(size)) for length, size in pairs)

    def shards(self, split: str) -> str:
        """The glob of the shards of a split, train or val."""
        return getattr(self, f"{split}_files") or f"{escape(self.data_path)}/fineweb_{split}_*.bin"


SECTIONS = dict(run="run_id", data="data_path", model="vocab_size", training="iterations",
                meta="meta_ttt_enabled",
                export="quant_steps", scoring="eval_seq_len", evaluator="model_path")  # fmt: skip


@cache
def sections() -> dict[str, list[str]]:
    """The names of the settings by section; SECTIONS has the first of each."""
    names = [f.name for f in fields(Config)]
    starts = [names.index(first) for first in SECTIONS.values()]
    ends = pairwise([*starts, len(names)])
    return {section: names[a:b] for section, (a, b) in zip(SECTIONS, ends, strict=True)}


def settings_of(config: Config, *names: str) -> dict[str, Any]:
    """The settings of some sections; those of "model" build the model, and travel in the artifact."""
    return {name: getattr(config, name) for section in names for name in sections()[section]}


ALIASES = {  # the families of #494 and #1855
    "BIGRAM_BUCKETS": "BIGRAM_VOCAB_SIZE", "BIGRAM_EMBED_DIM": "BIGRAM_DIM", "XSA_LAYERS": "XSA_LAST_N",
    "QAT_THRESHOLD": "LATE_QAT_THRESHOLD", "SWA_START_FRAC": "SWA_THRESHOLD", "GATE_WINDOW": "ATTN_GATE",
    "GPTQ_CALIBRATION_BATCHES": "GPTQ_CALIB_BATCHES", "SPARSE_ATTN_GATE_SCALE": "ATTN_GATE_SCALE",
    "SMEAR_GATE_ENABLED": "SMEAR_GATE", "MUON_ROW_NORMALIZE": "MUON_ROW_NORM",
    "ENABLE_LOOPING_AT": "LOOP_START_FRAC",
}  # fmt: skip

# Variables of the lineage, or of earlier versions, that this trainer lacks: names, the values that mean the
# same here ("*": any), and why.
ABSENT = (
    ("VALUE_RESIDUAL GATED_ATTENTION DTG_ENABLED", "0", "off in every published run of this line"),
    ("META_TTT_SAM_ENABLED", "0", "an inner step against a neighbor's gradient; no run of it was finished"),
    ("QAT_ENABLED", "0", "rounding from the first step on; LATE_QAT rounds in the last ones"),
    ("LAWA_ENABLED", "0", "EMA and SWA replace it"),
    ("MOMENTUM_CYCLIC", "0", "dropped by its own authors"),
    ("ADAPTIVE_WARMDOWN", "0", "its trigger was noise; set WARMDOWN_FRAC"),
    ("ADAPTIVE_WARMDOWN_EMA ADAPTIVE_WARMDOWN_THRESHOLD ADAPTIVE_WARMDOWN_MIN_STEPS", "*",
     "they tune ADAPTIVE_WARMDOWN"),
    ("TARGET_MB", "*", "the cap is 16,000,000 bytes; the sources compared with MiB"),
    ("VAL_BATCH_SIZE", "*", "EVAL_BATCH_SEQS sets the batch of every scoring pass"),
    ("TTT_QAT", "0", "adapted weights are never quantized"),
    ("TTT_ENABLED", "*", "the trainer never adapts to the validation text; TTT_MODE is the evaluator's"),
    ("TRIGRAM", "0", "hashed trigrams in the bigram table lost 0.062 bpb at equal time"),
    ("ENCODER_LR_MULT", "1 1.0", "no published run sets it; DECODER_LR_MULT is relative to the first half"),
    ("META_TTT_PARAMS", "banks", "FOMAML's inner loop changes the banks"),
    ("META_TTT_INNER_OPTIMIZER", "sgd", "FOMAML's inner loop is plain SGD, as published"),
    ("META_TTT_INNER_MOMENTUM", "0 0.0", "FOMAML's inner loop is plain SGD, as published"),
    ("GPTQ_BLOCK_SIZE", "*", "it changes speed only, and 64 columns are fast everywhere"),
    ("CALIB_TEMPERATURE", "0.8", "the temperature of #1019"),
    ("TTT_PULL", "0 0.0", "never gained"),
    ("TTT_LOSS_POWER", "0 0.0", "gained 0.0003 bpb"),
    ("LQER_ENABLED AWQ_LITE_ENABLED", "0", "they correct the error of rounding; not built"),
    ("LQER_RANK LQER_TOP_K LQER_FACTOR_BITS LQER_ASYM_ENABLED LQER_ASYM_GROUP", "*", "they tune it"),
    ("CASEOPS_ENABLED", "*", "a CaseOps export is known by its byte sidecars"),
    ("PHASED_TTT_ENABLED", "*", "TTT_MODE=phased"),
    ("SPARSE_ATTN_GATE_ENABLED", "*", "ATTN_GATE is the number of its inputs; 0: off"),
    ("GATED_ATTN_QUANT_GATE", "*", "gates are int8 by row"),
    ("FUSED_CE_ENABLED GPTQ_RESERVE_SECONDS", "*", "it changes speed only, or is measured"),
    ("ASYM_LOGIT_RESCALE", "*", "it is the symmetric softcap, since its scales have no gradient"),
    ("TTT_META_RATES", "*", "Meta-SGD's factors act at test time where the deployed objective learned them"),
)  # fmt: skip

KINDS = {  # annotation: pattern of the text, conversion, and what was expected
    "str": (r"[^\0]{0,4096}", str, "text of at most 4096 characters"),
    "int": (r"[+-]?[0-9]{1,20}", int, "a whole number"),
    "bool": (r"(?i)0|1|false|true", lambda text: text.lower() in ("1", "true"), "0 or 1"),
    "float": (r"(?i)[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(e[+-]?[0-9]{1,2})?", float, "a number"),
}
MAX_PROBLEMS = 40  # that are shown: looking for likely names takes time
COMMENT = re.compile(r"""(?P<quoted>"[^"]*"|'[^']*')|(^|\s)#.*""")  # of a recipe
NEEDED = {"smear_inputs": "smear_gate", "xsa_learned": "xsa_last_n", "phase_resid_mix": "resid_mix",
          "skip_gates": "unet_skips", "bigram_signs": "bigram_vocab_size",
          "word_start_boost": "bigram_vocab_size", "pos_conditional_bigram": "bigram_vocab_size"}  # fmt: skip


def parse_value(f: Field, text: str) -> Any:
    """Convert the text of a field of Config; UserError for a wrong type, value, or range."""
    name = f.name.upper()
    pattern, convert, expected = KINDS[f.type]
    low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    if not re.fullmatch(pattern, text):
        raise UserError(f"{name}={BRIEF.repr(text)}: expected {expected}")
    value = convert(text)
    if choices and value not in choices:
        raise UserError(f"{name}={BRIEF.repr(text)}: expected one of {', '.join(choices)}")
    if (low is not None and value < low) or (high is not None and value > high):
        limit = "" if high is None else f", at most {high}"
        raise UserError(f"{name}={text}: must be at least {low}{limit}")
    return value


def likely_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is a near miss of, where over four fifths of the letters agree."""
    return next(iter(difflib.get_close_matches(name, known, 1, cutoff=0.81)), None)


def did_you_mean(name: str, known: set[str]) -> str:
    """Hint at the setting that a wrong name is close to, "" without one."""
    return f", did you mean {near}?" if (near := likely_name(name, known)) else ""


def read_recipe(path: str, known: set[str]) -> tuple[dict[str, str], list[str]]:
    """Read KEY=VALUE lines, `#`, `~`, quotes, and `export` as in a shell; returns values and problems."""
    values: dict[str, str] = {}
    problems: list[str] = []
    try:
        with decoding(f"RECIPE={path}", "UTF-8 text"):  # read as the names of files in the environment are
            text = os.fsdecode(read_file(path, 1 << 20).decode("utf-8-sig").encode())
    except UserError as error:
        return {}, [str(error)]
    for number, line in enumerate(re.split("\r\n?|\n", text), 1):
        line = COMMENT.sub(lambda found: found["quoted"] or "", line).strip().removeprefix("export ").strip()
        if not line:
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            problems.append(f"{path}:{number}: expected KEY=VALUE, found {BRIEF.repr(line)}")
        elif key not in known:
            meant = did_you_mean(key, known) if len(problems) < MAX_PROBLEMS else ""
            problems.append(f"{path}:{number}: unknown setting {BRIEF.repr(key)}{meant}")
        elif key in values:
            problems.append(f"{path}:{number}: {key} is given twice")
        else:
            values[key] = value.strip("'\"") if value[:1] in ("'", '"') else os.path.expanduser(value)
    return values, problems


def lineage_names(given: Mapping[str, str], problems: list[str], notices: list[str]) -> dict[str, str]:
    """Rename aliases and take out absent variables, which adds to the problems or to the notices."""
    values = dict(given)
    for alias, name in ALIASES.items():
        if alias in values:
            if values.setdefault(name, values[alias]) != values[alias]:
                problems.append(f"{alias}={values[alias]} contradicts {name}={values[name]}")
            del values[alias]
    for names, accepted, why in ABSENT:
        for name in set(names.split()) & values.keys():
            value = values.pop(name)
            if accepted == "*" or value in accepted.split():
                notices.append(f"{name}={value} has no effect here: {why}")
            else:
                problems.append(f"{name}={value} is not supported ({why}); accepted: {accepted}")
    return values


def is_block_list(text: str, num_layers: int) -> bool:
    """Whether a text is empty or a comma list of blocks."""
    is_list = re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text) is not None
    return not text or (is_list and max(int_list(text)) < num_layers)


def model_rules(c: Config) -> list[tuple[Any, str]]:
    """Rules for the settings of the model: whether they agree, and what to say where they do not."""
    ve_ok = not c.ve_enabled or (c.ve_layers and is_block_list(c.ve_layers, c.num_layers))
    ve_ok = ve_ok and len(set(c.value_layers)) == len(c.value_layers)
    order_ok = is_block_list(c.block_order, c.num_layers) and set(c.block_rows) == set(range(c.num_layers))
    last, repeats = c.num_layers - 1, not order_ok or len(c.block_rows) > c.num_layers
    rows = c.vocab_size * (2 + c.mtp_num_heads) + c.bigram_dim + c.num_memory_tokens
    numbers = c.model_dim * (2 * c.num_layers * (c.model_dim + c.kv_dim + c.mlp_dim + 8) + rows)
    numbers += c.bigram_vocab_size * c.bigram_dim + c.ve_dim * (c.vocab_size + c.kv_dim)
    numbers += 2 * c.head_dim * max(c.row_tokens, 8192)  # of the rotary tables
    return [
        (c.model_dim % c.num_heads == 0, f"NUM_HEADS={c.num_heads} does not divide MODEL_DIM={c.model_dim}"),
        (c.num_heads % c.num_kv_heads == 0,
         f"NUM_KV_HEADS={c.num_kv_heads} does not divide NUM_HEADS={c.num_heads}"),
        (c.head_dim % 2 == 0, f"MODEL_DIM / NUM_HEADS = {c.head_dim} is odd"),
        (c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim,
         f"ROPE_DIMS={c.rope_dims}: even, at most {c.head_dim}"),
        (c.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1 leaves no bucket beside the one for first tokens"),
        (not c.pos_conditional_bigram or c.bigram_vocab_size != 2, "BIGRAM_VOCAB_SIZE=2 has no two halves"),
        (c.bigram_hash == "xor" or not c.pos_conditional_bigram,
         "POS_CONDITIONAL_BIGRAM needs BIGRAM_HASH=xor"),
        (order_ok, f"BLOCK_ORDER={c.block_order!r}: must list every bank row from 0 to {last} at least once"),
        (c.loop_start_frac == 0 or repeats, "LOOP_START_FRAC needs a BLOCK_ORDER with repeats"),
        (not c.loop_shared or repeats, "LOOP_SHARED needs a BLOCK_ORDER with repeats"),
        (not c.parallel_start_layer or not order_ok or c.lanes_last,
         f"PARALLEL_START_LAYER={c.parallel_start_layer}: a lower bank row follows in BLOCK_ORDER, or none "
         "of the second half is as high"),
        (not c.key_offset or c.rotary_dims <= c.key_offset < c.head_dim,
         f"KEY_OFFSET={c.key_offset}: from ROPE_DIMS={c.rotary_dims} to {c.head_dim - 1}"),
        (max(c.attn_gate, c.smear_inputs) <= c.model_dim,
         f"ATTN_GATE={c.attn_gate} and SMEAR_INPUTS={c.smear_inputs}: at most MODEL_DIM={c.model_dim}"),
        *((getattr(c, b) or not getattr(c, a), f"{a.upper()} needs {b.upper()}") for a, b in NEEDED.items()),
        (c.num_memory_tokens + c.mtp_num_heads < min(c.train_seq_len, c.eval_seq_len), "NUM_MEMORY_TOKENS="
         f"{c.num_memory_tokens} and MTP_NUM_HEADS={c.mtp_num_heads} leave no target in a sequence"),
        (c.doc_borders != "attention" or not c.num_memory_tokens, "DOC_BORDERS=attention would hide "
         "NUM_MEMORY_TOKENS from all but the first document of a sequence"),
        (ve_ok, f"VE_LAYERS={c.ve_layers!r}: must list distinct bank rows from 0 to {last}"),
        (c.mlp_dim > 0, f"MLP_MULT={c.mlp_mult} of MODEL_DIM={c.model_dim} leaves no MLP"),
        (numbers <= MAX_NUMBERS, f"MODEL_DIM={c.model_dim} NUM_LAYERS={c.num_layers} and the other settings "
         f"of the model make {numbers:.2g} numbers, more than {MAX_NUMBERS}"),
    ]  # fmt: skip


def run_rules(c: Config) -> list[tuple[Any, str]]:
    """Rules for the settings of training, export, and evaluation."""
    blocks_ok, last = partial(is_block_list, num_layers=c.num_layers), c.num_layers - 1
    by_documents = TTT_MODES[c.ttt_mode].by_documents
    flat = c.ttt_lr_schedule == "flat" or c.ttt_mode == "phased"  # where it is the base's
    row = "an eighth of it" if c.data_order == "packed" else f"TRAIN_SEQ_LEN={c.train_seq_len}"
    return [
        (re.fullmatch(r"(?!\.{1,2}$)[^/\\\x00-\x1f\x7f]*", c.run_id) and c.run_id == c.run_id.strip(),
         f"RUN_ID={c.run_id!r}: must be a folder of runs/"),
        (c.run_id or c.resume == "never", f"RESUME={c.resume} needs a RUN_ID"),
        (re.fullmatch(r"\s*|(\s*(\d+(\.\d*)?|\.\d+)\s*(,(?!$)|$))+", c.mtp_weights),
         f"MTP_WEIGHTS={c.mtp_weights!r}: must list numbers from 0 on"),
        (c.mtp_weights.count(",") + 2 < min(c.train_seq_len, c.eval_seq_len) - c.num_memory_tokens,
         f"MTP_WEIGHTS={c.mtp_weights} leaves no target in a sequence"),
        (c.muon_coeffs == "quintic" or c.muon_backend_steps <= 5,
         f"MUON_BACKEND_STEPS={c.muon_backend_steps}: Polar Express has 5 steps"),
        (c.ema_export_share == 1 or c.ema_enabled or c.swa_enabled, "EMA_EXPORT_SHARE needs an average"),
        (c.data_order != "packed" or c.doc_borders == "attention",
         "DATA_ORDER=packed needs DOC_BORDERS=attention"),
        (re.fullmatch(r"([1-9]\d{0,6}[:@](\d+(\.\d*)?|\.\d+)(,(?!$)|$))*", c.train_seq_schedule),
         f"TRAIN_SEQ_SCHEDULE={c.train_seq_schedule}: LENGTH:FRACTION pairs"),
        (c.data_order == "packed" or not c.train_seq_schedule, "TRAIN_SEQ_SCHEDULE needs DATA_ORDER=packed"),
        (c.row_tokens >= c.train_seq_len, "DATA_ORDER=packed: an eighth of TRAIN_BATCH_TOKENS="
         f"{c.train_batch_tokens} is less than TRAIN_SEQ_LEN={c.train_seq_len}"),
        (c.train_batch_tokens % c.row_tokens == 0 and c.step_seqs % c.grad_accum_total == 0,
         f"TRAIN_BATCH_TOKENS={c.train_batch_tokens} is no multiple of GRAD_ACCUM_TOTAL={c.grad_accum_total} "
         f"sequences of {row}"),
        (c.quant_steps == "two_sided" or not c.quant_trellis, "QUANT_TRELLIS needs QUANT_STEPS=two_sided"),
        (c.quant_steps != "two_sided" or not c.grad_quant, "GRAD_QUANT needs QUANT_STEPS=sigmas or clip: "
         "two-sided scales give every weight its bits"),
        (c.phases["train"] > 0.05, "META_TTT_TIME_FRAC and REPTILE_TIME_FRAC leave under 5 % to train"),
        (not by_documents or (flat and c.ttt_top_frac == 1),
         f"TTT_MODE={c.ttt_mode} adapts by documents, and no step may depend on later ones or on the text's "
         f"length: TTT_LR_SCHEDULE={c.ttt_lr_schedule}, TTT_TOP_FRAC={c.ttt_top_frac:g}. Set flat and 1"),
        ("deployed" not in c.phases or by_documents,
         "META_TTT_OBJECTIVE=deployed needs a TTT_MODE by documents"),
        (blocks_ok(c.ttt_layers), f"TTT_LAYERS={c.ttt_layers!r}: must list numbers up to {last}"),
        (blocks_ok(c.reptile_layers), f"REPTILE_LAYERS={c.reptile_layers!r}: must list numbers up to {last}"),
        (re.fullmatch(r"(\d+:[1-9]\d*(,\d+:[1-9]\d*)*)?", c.ttt_chunk_by_length)
         and all(size <= c.doc_chunk for _, size in c.chunks_by_length),
         f"TTT_CHUNK_BY_LENGTH={c.ttt_chunk_by_length}: pairs LENGTH:SIZE, sizes up to {c.doc_chunk}"),
        (by_documents or not c.ttt_chunk_by_length, "TTT_CHUNK_BY_LENGTH needs a TTT_MODE by documents"),
        ("deployed" not in c.phases or not c.ttt_chunk_by_length,
         "META_TTT_OBJECTIVE=deployed trains for chunks of one size, not TTT_CHUNK_BY_LENGTH"),
        (not c.meta_sgd_enabled or c.ttt_lora_form == "series",
         "META_SGD_ENABLED learns rates of bank rows, not of TTT_LORA_FORM=parallel"),
        (re.fullmatch(r"(?!.*(.).*\1)[qkvomh]+", c.ttt_matrices),
         f"TTT_MATRICES={c.ttt_matrices}: letters of qkvomh, each once"),
        (c.ttt_lora_form == "parallel" or c.ttt_matrices == "qkvomh",
         "TTT_MATRICES needs TTT_LORA_FORM=parallel"),
        (c.ttt_protocol == "legal" or (TTT_MODES[c.ttt_mode].adapts and not by_documents),
         f"TTT_PROTOCOL={c.ttt_protocol} needs TTT_MODE=banks, all, or lora"),
        (c.ppm_alpha == 1 or not by_documents,
         "PPM_ALPHA needs the order of the text, so a TTT_MODE that is not by documents"),
        (c.eval_stride <= c.eval_seq_len, f"EVAL_STRIDE={c.eval_stride} > EVAL_SEQ_LEN={c.eval_seq_len}"),
    ]  # fmt: skip


def inconsistencies(c: Config) -> list[str]:
    """Contradictions between settings that are each valid on their own, one message each."""
    return [message for ok, message in (*model_rules(c), *run_rules(c)) if not ok]


def known_names() -> set[str]:
    """Names that a recipe or the command line may give: settings, aliases, and those that we lack."""
    absent = (name for names, _, _ in ABSENT for name in names.split())
    return {*(f.name.upper() for f in fields(Config)), *ALIASES, *absent}


def with_arguments(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Take NAME=VALUE off the head of the arguments into the environment, over what is there."""
    pairs = list(takewhile(lambda word: re.match("[A-Z][A-Z0-9_]*=", word), argv))
    given = dict(pair.split("=", 1) for pair in pairs)
    if unknown := sorted(given.keys() - (known := known_names()) - {"RECIPE", "IGNORE_ENV", "TRACK"}):
        named = "; ".join(name + did_you_mean(name, known) for name in unknown)
        raise UserError(f"unknown setting in the arguments: {named}")
    return list(argv[len(pairs) :]), {**environ, **given}


def load_config(environ: Mapping[str, str]) -> tuple[Config, dict[str, Any], list[str]]:
    """Read the settings: RECIPE=FILE first, other variables override it.

    Returns the configuration, the given fields, and notices to log. UserError for all problems at once: keys,
    types, ranges, contradictions, and names that are near misses of ours (IGNORE_ENV=A,B excuses some).
    """
    by_name, known = {f.name.upper(): f for f in fields(Config)}, known_names()
    notices: list[str] = []
    recipe, problems = read_recipe(environ["RECIPE"], known) if environ.get("RECIPE") else ({}, [])
    ours = {name: text for name, text in environ.items() if name in known}
    given = lineage_names(recipe, problems, notices) | lineage_names(ours, problems, notices)
    # OMP_NUM_THREADS is set everywhere, and close to MTP_NUM_HEADS
    excused = {*known, "RECIPE", "OMP_NUM_THREADS", "IGNORE_ENV", *environ.get("IGNORE_ENV", "").split(",")}
    for name in (n for n in environ if n not in excused and re.fullmatch(r"[A-Z][A-Z0-9_]*", n)):
        if near := likely_name(name, known):
            problems.append(f"{name} is set, did you mean {near}? (IGNORE_ENV={name} if not)")
    values = {}
    for name, text in given.items():
        try:
            values[by_name[name].name] = parse_value(by_name[name], text)
        except ValueError as error:
            problems.append(str(error))
    if len(values) == len(given):
        problems += inconsistencies(Config(**values))
    if problems:
        more = len(problems) - MAX_PROBLEMS
        problems[MAX_PROBLEMS:] = [f"and {more} more"] * (more > 0)
        raise UserError("the settings have problems:\n" + "\n".join(f"  {p}" for p in problems))
    return Config(**values), values, notices


# ------------------------------------------------------------------------------------------------------------
# Ranks, files, and the log
# ------------------------------------------------------------------------------------------------------------

# What every later section may use: collectives that are no-ops on one process, compilation, atomic files, and
# the log. World size changes memory and speed, not mathematics: sums run over ranks, and random draws depend
# on seed and step.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def max_over_ranks(*values: float) -> list[float]:
    """Maximum of each value over all ranks, reduced on the CPU so that no GPU waits for it."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def sum_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Sum the tensors over the ranks in one all-reduce; on one process they are returned as they are."""
    if world_size() == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)]


@lru_cache(maxsize=1)
def long_timeout_group(world: Any) -> Any:
    """All ranks with a timeout of one hour: an export takes longer than a step."""
    return dist.new_group(backend="gloo", timeout=timedelta(hours=1))


def cleanup_distributed() -> None:
    """Destroy all process groups, on all ranks together; after a failure this would wait for the others.

    Gloo's threads release tensors, which needs the interpreter, and would abort the process after its end.
    """
    long_timeout_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def on_rank_0(function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0 and return its result on every rank; its exception is raised on all."""
    if world_size() == 1:
        return function()
    box, group = [None], long_timeout_group(dist.group.WORLD)
    if rank() == 0:
        try:
            box = [function()]
        except Exception as error:
            box = [error]
    dist.broadcast_object_list(box, group=group)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def differing_parameters(model: nn.Module) -> list[str]:
    """Names of parameters that differ between ranks, by a hash of their bits; a collective."""
    if world_size() == 1:
        return []
    names, hashes = [name for name, _ in model.named_parameters()], []
    for p in model.parameters():
        bits = p.detach().flatten().view(torch.int32).long()
        factors = torch.arange(len(bits), device=p.device) * 0x1E3779B97F4A7C15 | 1  # one per position
        hashes.append((bits * factors).sum())  # modulo 2^64
    hashes = torch.stack(hashes).cpu()
    extremes = torch.cat((hashes, -hashes))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, lowest = extremes[: len(hashes)], -extremes[len(hashes) :]
    return [name for name, low, high in zip(names, lowest, highest, strict=True) if low != high]


def progress_bar(what: str, total: float) -> Any:
    """A tqdm bar on rank 0's terminal, or one that does nothing where tqdm is not installed."""
    try:
        from tqdm import tqdm as bar
    except ImportError:
        ignore = lambda *args: None  # noqa: E731
        return SimpleNamespace(n=0, update=ignore, set_postfix_str=ignore, clear=ignore, close=ignore)
    shape = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed} < {remaining}{postfix}"
    return bar(total=total, desc=what, bar_format=shape, leave=False, disable=None if rank() == 0 else True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs of compute capability 8.0 and up, else float32: CPUs only emulate bfloat16."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


RECOMPILE_LIMIT = 64  # graphs per function; torch allows eight, and an evaluation may need more


def maybe_compile(
    function: Callable, config: Config, device: torch.device, warn: Callable[[str], None] = warnings.warn
) -> Callable:
    """Compile `function` for static shapes, one graph each, if USE_COMPILE says so.

    With fullgraph torch raises once RECOMPILE_LIMIT is reached. A call that would need another graph then
    runs uncompiled, with one warning; calls that have a graph keep it.
    """
    wanted = device.type == "cuda" if config.use_compile == "auto" else config.use_compile == "1"
    if not wanted:
        return function
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    compiled, warned = torch.compile(function, dynamic=False, fullgraph=True), False

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        nonlocal warned
        try:
            return compiled(*args, **named)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            if not warned:
                shapes = ", ".join(str(tuple(x.shape)) for x in args if isinstance(x, Tensor))
                told = f"{function.__name__}: torch.compile has made {RECOMPILE_LIMIT} graphs, its limit here"
                warn(f"{told}. New shapes run uncompiled, first {shapes}. Use fewer, or USE_COMPILE=0.")
            warned = True
            return function(*args, **named)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # no compiler, or its path has a space
            why = " ".join(str(error).split())[:400]
            raise UserError(f"torch.compile failed: {why}. Set USE_COMPILE=0.") from error

    return call


def check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """FloatingPointError that names the first tensor with a value that is not finite; `what` they are."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FloatingPointError(f"{what}: {name} has values that are not finite")


def library_versions(device: torch.device, attention: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, gpu=gpu,
                attention=attention, dtype=str(compute_dtype(device)).removeprefix("torch."),
                numpy=np.__version__, threads=torch.get_num_threads())  # fmt: skip


def sha256_file(path: str | Path) -> str:
    with open_input(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def code_files() -> list[Path]:
    """The files whose bytes count: this one, and the evaluator if it is beside it."""
    here = Path(__file__).resolve()
    return [path for path in (here, here.with_name("eval_ttt.py")) if path.exists()]


def code_hashes() -> dict[str, str]:
    return {path.name: sha256_file(path) for path in code_files()}


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a random name, then rename: `path` is never half-written, no link is written through."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def saved_bytes(content: Any) -> bytes:
    """What torch.save writes; to a file it would turn a full disk's OSError into a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class RunLog:
    """train.log, metrics.jsonl, and standard output of rank 0; other ranks are silent."""

    def __init__(self, folder: Path, name: str = "train.log"):
        self.folder, self.name, self.bar = folder, name, None

    def line(self, text: str, printed: bool = True) -> None:
        text = shown(text)
        if rank() == 0:
            with suppress(OSError, UnicodeError):  # a closed or ASCII terminal is no reason to lose a run
                if self.bar is not None:
                    self.bar.clear()
                if printed:
                    print(text, flush=True)
            self._append(self.name, text)

    def settings(self, values: Mapping[str, Any], given: Container[str]) -> None:
        """All settings to the file; on standard output those that were given."""
        for name, value in values.items():
            self.line(f"  {name.upper()}={value}" + " (given)" * (name in given), printed=name in given)

    def _append(self, name: str, text: str) -> None:
        try:
            # never through a link out of the folder, nor into a FIFO that nobody reads
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
            with open(os.open(self.folder / name, flags, 0o666), "a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:  # nor is a full disk, until the artifact is written
            with suppress(OSError):
                print(f"WARNING: {self.folder / name}: {error.strerror}", file=sys.stderr, flush=True)

    def forget_after(self, step: int) -> None:
        """Drop rows of metrics.jsonl after training step `step`, from which the run is resumed."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            rows = []
            for line in read_file(path, METRICS_FILE).splitlines():
                with suppress(UserError):  # a line cut short by a full disk
                    rows.append(parse_json(line, {"step": int}, path))
            kept = [row for row in rows if row["step"] < step + ("train_loss" in row)]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def step(
        self, step: int, count: int, seconds: float, also: Mapping[str, float] | None = None, **values: float
    ) -> None:
        """One line of the lineage's dialect, and the same as JSON together with `also`."""
        pairs = " ".join(f"{name}:{value:.4f}" for name, value in values.items())
        times = f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"
        self.line(f"step:{step}/{count} {pairs} {times}")
        if rank() == 0:
            row = dict(step=step, seconds=seconds, **values, **(also or {}))
            self._append("metrics.jsonl", json.dumps(row))


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------

# Shards as published: a header of 256 int32, then uint16 tokens, BOS before each document. They are
# memory-mapped, so a shard that changes during a run would change the training text, or end the process with
# SIGBUS: every read checks for that. What decides a score (tokenizer, split, content of the validation
# shards) is checked against the files that list it, and training shards against validation shards.


def open_shard(path: str) -> np.ndarray:
    """Memory-map the tokens of a shard, uint16. UserError for a wrong magic number, version, or length."""
    with open_input(path) as file:
        size, header = os.fstat(file.fileno()).st_size, np.fromfile(file, dtype="<i4", count=256)
        if len(header) < 256:
            raise UserError(f"{path}: {size} bytes, shorter than the {SHARD_HEADER_BYTES}-byte header")
        magic, version, count = (int(x) for x in header[:3])
        if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
            expected = f"{SHARD_MAGIC} version {SHARD_VERSION}"
            raise UserError(f"{path}: magic {magic} version {version}, expected {expected}")
        if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
            raise UserError(f"{path}: {size} bytes, its {count} tokens need {SHARD_HEADER_BYTES + 2 * count}")
        return np.memmap(file, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def shifted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows (B, T + 1) into inputs and targets, (B, T) each."""
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def sample_hash(shard: np.ndarray) -> str:
    """SHA-256 of 64 spread blocks of 1,024 tokens: shards are too large to hash at every start."""
    starts = np.linspace(0, max(len(shard) - 1024, 0), 64).astype(int)
    return hashlib.sha256(b"".join(shard[start : start + 1024].tobytes() for start in starts)).hexdigest()


def file_state(path: str) -> tuple[int, int, int]:
    """Size, inode, and modification time of a file. UserError if it is gone."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return status.st_size, status.st_ino, status.st_mtime_ns


def first_document(shard: np.ndarray) -> int:
    """Position of the first BOS of a shard, or its length; reads no more than it takes to find it."""
    for begin in range(0, len(shard), 1 << 16):
        found = np.flatnonzero(shard[begin : begin + (1 << 16)] == BOS_ID)
        if len(found):
            return begin + int(found[0])
    return len(shard)


class Listing(NamedTuple):
    """Contents of manifest.json (data/prepare.py) or source.json (data/download.py) beside the shards."""

    path: Path
    tokenizer_sha256: str | None
    shards: dict[str, dict[str, Any]]  # name -> split, tokens, and sha256 where it is listed
    overlap: dict[str, int]  # counts of `data/prepare.py --overlap`


SHARD_ROW = {"file": str, "split?": str, "tokens?": int, "sha256?": str}
LISTINGS = {
    "manifest.json": {"shards": [SHARD_ROW], "tokenizer": {"sha256": str}, "overlap?": {str: int}},
    "source.json": {"files": [SHARD_ROW], "overlap?": {str: int}},
}


def read_listing(shard: str) -> Listing | None:
    """Read the listing beside a shard, None without one. UserError for a file that is neither of the two."""
    for name, form in LISTINGS.items():
        path = Path(shard).with_name(name)
        if not os.path.lexists(path):
            continue
        content, shards = parse_json(read_file(path), form, path), {}
        for row in content["shards" if "shards" in form else "files"]:
            file = Path(row["file"]).name
            named = re.fullmatch(r"fineweb_(train|val)_\d+\.bin", file)
            if split := row.get("split") or (named and named[1]):
                shards[file] = dict(split=split, tokens=row.get("tokens"), sha256=row.get("sha256"))
        made_with = content["tokenizer"]["sha256"] if "tokenizer" in form else None
        return Listing(path, made_with, shards, content.get("overlap") or {})
    return None


SIDECAR = re.compile(r"(?<![a-z])bytes(?![a-z]).*\.bin$")  # of CaseOps exports: the bytes of each token


def find_shards(pattern: str) -> list[str]:
    """Shards that match a glob, sorted by name, without byte sidecars, which have the shape of shards.

    UserError if there are none, or for a sidecar without its shard beside it: bpb would be wrong.
    """
    paths = sorted(glob(pattern)) or [pattern] * os.path.exists(pattern)  # a name may contain brackets
    paths = [path for path in paths if not SIDECAR.search(os.path.basename(path))]
    if not paths:
        raise UserError(f"no shards match {pattern}. Make some with data/prepare.py or data/download.py.")
    for folder in sorted({os.path.dirname(path) for path in paths}):
        for name in filter(SIDECAR.search, sorted(os.listdir(folder or "."))):
            shard = os.path.join(folder, name.replace("_val_bytes_", "_val_"))
            if "_val_bytes_" not in name or not os.path.exists(shard):
                raise UserError(f"{os.path.join(folder, name)}: a byte sidecar of no validation shard")
    return paths


def sidecar_of(shard: str) -> str:
    """Path of the byte sidecar that a validation shard would have."""
    folder, name = os.path.split(shard)
    return os.path.join(folder, name.replace("_val_", "_val_bytes_"))


def find_sidecars(shards: Sequence[str]) -> tuple[str, ...]:
    """Byte sidecars of validation shards, or none. UserError if some have one and others have none."""
    found = [sidecar_of(path) for path in shards]
    lacking = [path for path in found if path in shards or not os.path.exists(path)]
    if lacking and len(lacking) < len(found):
        raise UserError(f"{lacking[0]}: no such byte sidecar, but other validation shards have theirs")
    return () if lacking else tuple(found)


class TokenStream:
    """The shards that match a glob, in the order of their names, as one stream that repeats after its end."""

    def __init__(self, pattern: str, vocab_size: int):
        self.paths = find_shards(pattern)
        self.pattern, self.vocab_size = pattern, vocab_size
        self.shards = [open_shard(path) for path in self.paths]
        self.states = [file_state(path) for path in self.paths]
        self.samples = [sample_hash(shard) for shard in self.shards]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        for index in range(len(self.paths)):
            self._part(index, 0, 1 << 16)  # a wrong vocabulary shows at once

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _part(self, index: int, offset: int, count: int) -> np.ndarray:
        """Up to `count` tokens of a shard, checked to be unchanged and within the vocabulary."""
        path, state = self.paths[index], file_state(self.paths[index])
        if state != self.states[index]:
            self._check_content(index, state)
        tokens = self.shards[index][offset : offset + count]
        if tokens.max(initial=0) >= self.vocab_size:
            raise UserError(f"{path}: token id {tokens.max()}, but VOCAB_SIZE={self.vocab_size}")
        return tokens

    def _check_content(self, index: int, state: tuple[int, int, int]) -> None:
        """A shard whose state has changed must have the same content: network mounts renumber their inodes.

        The mapping stays with the file that was opened; only a write into that file reaches it. Such a file
        must have the SHA-256 listed beside it. UserError for other content: truncated, it leads to SIGBUS.
        """
        path, opened = self.paths[index], self.states[index]
        same = state[0] == opened[0] and sample_hash(open_shard(path)) == self.samples[index]
        if same and state[1] == opened[1]:  # written in place
            listing = read_listing(path)
            listed = listing.shards.get(Path(path).name, {}) if listing else {}
            same = sha256_file(path) == listed.get("sha256")
        if not same:
            raise UserError(f"{path} has changed: (bytes, inode, ns) {opened} when opened, now {state}")
        self.states[index] = state

    def fingerprint(self) -> str:
        """Hash of the lengths and samples of the shards."""
        parts = [f"{len(shard)} {sample} " for shard, sample in zip(self.shards, self.samples, strict=True)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def read(self, start: int, count: int) -> np.ndarray:
        """Copy `count` tokens from position `start` modulo the length, int64."""
        parts, position = [], start % len(self)
        while count > 0:
            index = int(np.searchsorted(self.ends, position, side="right"))
            offset = position - (int(self.ends[index - 1]) if index else 0)
            part = self._part(index, offset, count)
            parts.append(part)
            count -= len(part)
            position = (position + len(part)) % len(self)
        return np.concatenate(parts).astype(np.int64)

    def read_all(self) -> np.ndarray:
        """Every token once, uint16."""
        return np.concatenate([self._part(index, 0, len(shard)) for index, shard in enumerate(self.shards)])

    @cached_property
    def runs(self) -> np.ndarray:
        """First document and end of every shard, as positions of the stream, (shards, 2)."""
        firsts = [first_document(shard) for shard in self.shards]
        begins = self.ends - [len(shard) for shard in self.shards]
        return np.stack((begins + firsts, self.ends), axis=1)

    def sequences(self, starts: np.ndarray, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (len(starts), seq_len) each, of the sequences that begin at `starts`."""
        tokens = torch.from_numpy(np.stack([self.read(int(start), seq_len + 1) for start in starts]))
        if device.type == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        return shifted(tokens)


@lru_cache(maxsize=2)
def shuffled_starts(num_tokens: int, seq_len: int, seed: int, epoch: int) -> np.ndarray:
    """Starts of an epoch's sequences in random order: side by side from a random offset, around the end."""
    generator = np.random.default_rng([seed, epoch])
    offset = generator.integers(num_tokens)
    return (offset + seq_len * generator.permutation(num_tokens // seq_len)) % num_tokens


def packed_starts(runs: np.ndarray, row_tokens: int, numbers: np.ndarray) -> np.ndarray:
    """Starts of packed rows: 8 a step, side by side from the first document of a shard on (#1855).

    runs as in TokenStream. The rest of a shard after its last whole step is left out. UserError without one.
    """
    step, lengths = PACKED_ROWS * (row_tokens + 1), runs[:, 1] - runs[:, 0]
    counts = lengths // step
    if not counts.sum():
        raise UserError(f"DATA_ORDER=packed: no shard of {lengths.max()} tokens has {step}, a step")
    steps, rows = np.divmod(numbers, PACKED_ROWS)
    steps, ends = steps % counts.sum(), np.cumsum(counts)
    shard = np.searchsorted(ends, steps, side="right")
    return runs[shard, 0] + (steps - (ends - counts)[shard]) * step + rows * (row_tokens + 1)


def sequence_starts(config: Config, stream: TokenStream, first: int, count: int) -> np.ndarray:
    """Starts of the training rows [first, first + count), which depend on seed and DATA_ORDER only."""
    numbers, num_tokens, T = np.arange(first, first + count), len(stream), config.train_seq_len
    if config.data_order == "packed":
        return packed_starts(stream.runs, config.row_tokens, numbers)
    if config.data_order == "sequential":
        return numbers * T
    epochs, positions = np.divmod(numbers, num_tokens // T)
    order = partial(shuffled_starts, num_tokens, T, config.seed)
    orders = {epoch: order(epoch) for epoch in np.unique(epochs).tolist()}
    return np.array([orders[epoch][at] for epoch, at in zip(epochs.tolist(), positions, strict=True)])


def check_listing(stream: TokenStream, tokenizer_sha256: str, split: str) -> None:
    """Compare the shards of a split (train or val) with the listing beside them, if there is one.

    UserError for another tokenizer, split, or token count, shards not listed, and missing or altered
    validation shards.
    """
    listing = read_listing(stream.paths[0])
    if listing is None:
        return
    path, made_with, listed = listing[:3]
    if made_with not in (None, tokenizer_sha256):
        raise UserError(f"{path}: shards made with tokenizer {made_with[:12]}, not {tokenizer_sha256[:12]}")
    for name, shard in zip(stream.paths, stream.shards, strict=True):
        row = listed.pop(Path(name).name, None)
        if row is None:
            raise UserError(f"{name}: {len(shard)} tokens, not listed in {path}. Remove it, or prepare it.")
        if row["split"] != split:
            raise UserError(f"{name}: split {row['split']} by {path}, but it is to be the {split} text")
        if row["tokens"] != len(shard):
            raise UserError(f"{name}: {len(shard)} tokens, but {path} says {row['tokens']}")
        if split == "val" and row["sha256"] not in (None, sha256_file(name)):
            raise UserError(f"{name}: its content is not what {path} lists. Prepare or download it again.")
    if missing := sorted(name for name, row in listed.items() if row["split"] == split == "val"):
        raise UserError(f"{path} lists validation shards that are not there: {', '.join(missing)}")


def check_disjoint(stream: TokenStream, val_paths: Sequence[str]) -> None:
    """UserError if a training shard is a validation shard: by real path, by inode, or by size and SHA-256.

    Contents are read only of equal sizes. `data/prepare.py --overlap` looks for single documents.
    """
    sizes, train_sizes = ({os.path.getsize(path) for path in paths} for paths in (val_paths, stream.paths))
    known: dict[Any, str] = {}
    for paths in (val_paths, stream.paths):
        for path in paths:
            status = os.stat(path)
            marks = [os.path.realpath(path), (status.st_dev, status.st_ino)]
            marks += [sha256_file(path)] if status.st_size in sizes & train_sizes else []
            if paths is val_paths:
                known |= dict.fromkeys(marks, path)
            elif found := next((known[mark] for mark in marks if mark in known), None):
                raise UserError(f"{path} is validation text, as {found}. Change TRAIN_FILES or VAL_FILES.")


# ------------------------------------------------------------------------------------------------------------
# Bytes per token
# ------------------------------------------------------------------------------------------------------------

# bpb = nats / ln 2 / bytes, so a wrong byte count is a wrong score that nothing else would show. The field's
# counting rule holds for its tokenizers; ours are lossless, and count the bytes of the text. Two derivations
# that share no code must agree on every printed score, and published validation sets must have their known
# totals.

MAX_VAL_TOKENS = 1 << 28  # the challenge's text has 151 million bytes, so no more tokens
# Tokens and tokens per byte of the published validation sets.
PUBLISHED_VAL = {
    62_021_846: 0.41052,
    45_508_608: 0.30125,
    45_514_752: 0.30125,
    40_540_802: 0.26834,
    47_853_344: 0.31674,  # CaseOps, 151,080,645 bytes by its sidecar
}

# A tokenizer that returns this unchanged keeps every byte. NFKC would change the ligature, the circled one,
# and the accent; SentencePiece's usual defaults would change spaces, tabs, and line ends.
LOSSLESS_PROBE = "  \ufb01\u2460 e\u0301\ta \r\n\n  x \U0001f600 "


CASE_OPERATORS = "\ue001\ue002\ue003\ue004"  # of CaseOps: tokens that stand for no byte


class ByteTable(NamedTuple):
    """Bytes of text per target, as three arrays of the vocabulary's length.

    A piece counts its UTF-8 bytes without the leading space, and the space counts one more unless the token
    before is a boundary (control, unknown, or unused): the field's rule. Under a lossless tokenizer nothing
    is a boundary, and the counted bytes are those of the text. Sidecars of the validation text, where it has
    some, count instead: the tokens of a CaseOps export stand for another text than their own.
    """

    base_bytes: np.ndarray  # int64
    has_leading_space: np.ndarray  # bool
    is_boundary: np.ndarray  # bool
    is_case_ops: bool = False  # the tokenizer has the operators of CaseOps
    sidecars: tuple[str, ...] = ()

    def with_sidecars(self, shards: Sequence[str]) -> ByteTable:
        """The table for these validation shards. UserError if a CaseOps export has no sidecars."""
        sidecars = find_sidecars(shards)
        if self.is_case_ops and not sidecars:
            raise UserError(f"{shards[0]} has no byte sidecar, but its tokenizer is of a CaseOps export")
        return self._replace(sidecars=sidecars)

    def of_text(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of each target of the validation text or of its beginning, tokens (n,) -> (n - 1,)."""
        if self.sidecars:
            return sidecar_bytes(self.sidecars)[1 : len(tokens)]
        return self.count(tokens[:-1], tokens[1:])

    def count(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Bytes of each target, int64; previous: the token before it."""
        return self.base_bytes[target] + (self.has_leading_space[target] & ~self.is_boundary[previous])


@lru_cache(maxsize=1)
def sidecar_bytes(paths: tuple[str, ...]) -> np.ndarray:
    """Bytes of each token by the sidecars of all shards, int32 (tokens,)."""
    return np.concatenate([open_shard(path) for path in paths]).astype(np.int32)


def load_byte_table(path: str, vocab_size: int) -> ByteTable:
    """ByteTable of a SentencePiece model. UserError if it is missing, broken, or not for this vocabulary."""
    import sentencepiece as spm

    if not os.path.lexists(path):
        raise UserError(f"TOKENIZER_PATH={path}: no such file. Set RECIPE, or make it with a tool of data/")
    with decoding(f"TOKENIZER_PATH={path}", f"a SentencePiece model of {vocab_size} tokens"):
        if not (blob := read_file(path)):  # over which SentencePiece aborts the process
            raise UserError("an empty file")
        sp = spm.SentencePieceProcessor(model_proto=blob)  # its own open() takes UTF-8 names only
        if sp.vocab_size() != vocab_size or sp.bos_id() != BOS_ID:
            expected = f"VOCAB_SIZE={vocab_size} with BOS {BOS_ID}"
            raise UserError(f"{sp.vocab_size()} tokens with BOS {sp.bos_id()}, expected {expected}")
        others = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(vocab_size)]
        adds_space = sp.encode("a", out_type=str)[0].startswith("\u2581")  # decoding would hide it again
        lossless = not adds_space and sp.decode(sp.encode(LOSSLESS_PROBE)) == LOSSLESS_PROBE
        if not lossless and sp.piece_to_id("\u2581") == sp.unk_id():
            raise UserError("without a piece for a lone space, bytes are miscounted (issue #897)")
        boundary, base, space = np.array(others), np.zeros(vocab_size, np.int64), np.zeros(vocab_size, bool)
        for i in np.flatnonzero(~boundary).tolist():
            piece = sp.id_to_piece(i)
            space[i] = piece.startswith("\u2581") and not sp.is_byte(i)
            text = piece.removeprefix("\u2581").replace("\u2581", " ")
            base[i] = 1 if sp.is_byte(i) else len(text.encode())
        is_case_ops = sp.piece_to_id(CASE_OPERATORS[0]) != sp.unk_id()
    return ByteTable(base, space, np.zeros(vocab_size, bool) if lossless else boundary, is_case_ops)


def prefix_tokens(path: str) -> np.ndarray:
    """For each token of a SentencePiece model the longest other token that begins its bytes, int64 (V,).

    -1 where there is none. Sorted by bytes, a token's prefixes are those still open when it comes.
    """
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    found, texts, opened = np.full(sp.vocab_size(), -1), {}, []
    for i in range(sp.vocab_size()):
        piece = sp.id_to_piece(i)
        if sp.is_byte(i):
            texts[i] = bytes.fromhex(piece[3:5])
        elif not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) or piece in CASE_OPERATORS):
            texts[i] = piece.replace("\u2581", " ").encode()
    for text, i in sorted((text, i) for i, text in texts.items() if text):
        while opened and not text.startswith(opened[-1][0]):
            opened.pop()
        if opened and opened[-1][0] == text:  # a byte piece and a character
            found[i] = found[opened[-1][1]]
        else:
            found[i] = opened[-1][1] if opened else -1
            opened.append((text, i))
    return found


def recomputed_score(nll: np.ndarray, shards: Sequence[str], tokenizer_path: str) -> tuple[float, float]:
    """val_loss (nats per target) and val_bpb of losses nll (targets,), from shards and tokenizer alone.

    It shares no code with `score` and ByteTable: it counts the pieces of the whole text, then subtracts the
    leading spaces that the field does not count, those after a boundary.
    """
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor(model_proto=Path(tokenizer_path).read_bytes())
    tokens = np.concatenate([np.fromfile(path, "<u2", offset=SHARD_HEADER_BYTES) for path in shards])
    text = {i: sp.id_to_piece(i).replace("\u2581", " ") for i in np.unique(tokens[1:]).tolist()}
    plain = {i for i in text if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))}
    sidecars = [sidecar_of(path) for path in shards]
    occurs = np.bincount(tokens[1:])
    num_bytes = sum(int(occurs[i]) * (1 if sp.is_byte(i) else len(text[i].encode())) for i in plain)
    adds_space = sp.encode_as_pieces("a")[0].startswith("\u2581")
    if adds_space or sp.decode(sp.encode(LOSSLESS_PROBE)) != LOSSLESS_PROBE:
        spaced, ids = [i for i in plain if text[i].startswith(" ")], range(sp.vocab_size())
        boundary = [i for i in ids if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)]
        num_bytes -= int((np.isin(tokens[1:], spaced) & np.isin(tokens[:-1], boundary)).sum())
    if sidecars[0] not in shards and os.path.exists(sidecars[0]):
        entries = [np.fromfile(path, "<u2", offset=SHARD_HEADER_BYTES) for path in sidecars]
        num_bytes = int(np.concatenate(entries)[1:].sum())
    total = float(np.sum(nll, dtype=np.longdouble))
    return total / (len(tokens) - 1), total / math.log(2) / num_bytes


def check_score(
    val_loss: float, val_bpb: float, nll: np.ndarray, shards: Sequence[str], tokenizer_path: str
) -> None:
    """ArithmeticError if a score is not finite, or not within 1e-9 of recomputed_score of its losses."""
    again = recomputed_score(nll, shards, tokenizer_path)
    if not all(abs(x / y - 1) < 1e-9 for x, y in zip((val_loss, val_bpb), again, strict=True)):
        bad = int((~np.isfinite(nll)).sum())
        printed = f"the printed score disagrees with its losses: val_loss:{val_loss} val_bpb:{val_bpb}"
        raise ArithmeticError(f"{printed}, recomputed {again}; {bad} of {len(nll)} losses are not finite")


def check_fingerprint(num_tokens: int, num_bytes: int, pattern: str) -> None:
    """UserError if a validation set is not what its token count or its folder's name claims.

    pattern: the glob of its shards. A published set has a known number of tokens per byte; any export of the
    challenge's 50,000 documents (folder fineweb10B_*) has 151.0 to 151.1 million bytes.
    """
    if num_bytes == 0:
        raise UserError(f"{pattern}: {num_tokens} validation tokens, but no byte of text")
    expected, measured = PUBLISHED_VAL.get(num_tokens), (num_tokens - 1) / num_bytes
    if expected and abs(measured / expected - 1) > 2e-4:
        found = f"{num_tokens} validation tokens make {measured:.5f} tokens per byte, published {expected}"
        raise UserError(f"{found}: the tokenizer is not the one that made these shards")
    if "fineweb10B_" in Path(pattern).parent.name and not 151_000_000 <= num_bytes <= 151_100_000:
        found = f"{pattern}: {num_bytes} bytes of validation text, the challenge's has 151.0 to 151.1 million"
        raise UserError(f"{found}. Complete it by data/download.py, or rename the folder of another text.")


def check_length(num_tokens: int, seq_len: int) -> None:
    """UserError if a text has no window of seq_len tokens and a target."""
    if num_tokens <= seq_len:
        raise UserError(f"{num_tokens} validation tokens: fewer than EVAL_SEQ_LEN={seq_len} and a target")


def read_validation(
    config: Config, byte_table: ByteTable, tokenizer_sha256: str
) -> tuple[np.ndarray, list[str]]:
    """Validation tokens and the paths of their shards. UserError for whatever can be wrong with them."""
    stream = TokenStream(config.shards("val"), config.vocab_size)
    if len(stream) > MAX_VAL_TOKENS:
        raise UserError(f"{stream.pattern}: {len(stream)} validation tokens, over {MAX_VAL_TOKENS}")
    check_listing(stream, tokenizer_sha256, "val")
    tokens = stream.read_all()
    check_length(len(tokens), config.eval_seq_len)
    if byte_table.sidecars:
        counted, name = sidecar_bytes(byte_table.sidecars), byte_table.sidecars[0]
        if len(counted) != len(tokens) or counted[tokens == BOS_ID].any():
            found = f"{len(counted)} entries for {len(tokens)} tokens, or bytes for a BOS"
            raise UserError(f"{name}: not the byte sidecar of these shards: {found}")
    check_fingerprint(len(tokens), int(byte_table.of_text(tokens).sum()), config.shards("val"))
    return tokens, stream.paths


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------

# An 11-layer transformer with banked weights (#399, #549, #1019): all matrices of one kind in one 3-D
# parameter, so that Muon works on few large batches and ranks share them by rows. One forward pass serves
# training, late QAT, fast weights, calibration, and generation: all of them pass the same form of the
# weights. Parameters are float32, cast once a step.

AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Tap = Callable[["Block", str, Tensor, Tensor], None]  # block, product, its input and its output
Adapters = Mapping[str, tuple[Tensor, Tensor]]  # by adapter_shapes: A (..., n, r, in) and B (..., n, out, r)

# The four products of a block: the site whose activations they read, and the matrices that make them, each a
# row of the first or second half of a bank. Calibration statistics are kept by site, adapters by matrix.
PRODUCTS = {
    "qkv": ("attn_in", (("qo_bank", 0), ("kv_bank", 0), ("kv_bank", 1))),
    "o": ("attn_out", (("qo_bank", 1),)),
    "up": ("mlp_in", (("mlp_up_bank", 0),)),
    "down": ("mlp_mid", (("mlp_down_bank", 0),)),
}


PARALLEL_ADAPTERS = ("q", "k", "v", "o", "mlp", "head")  # of an application of a block, and of the head


def bank_sites(bank: str) -> list[str]:
    """The site that each half of a bank reads; the MLP's banks have one half."""
    return [site for half in (0, 1) for site, parts in PRODUCTS.values() if (bank, half) in parts]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal attention in plain torch, the reference for the other kernels.

    q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D).
    k and v may begin earlier than q: they end with it. documents (B, past + T): a number per position; only
    positions with the same number see each other.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
    past, mask = k.size(2) - q.size(2), None
    if past or documents is not None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(past)
        # with a mask no fast kernel takes fewer K/V heads: repeat them
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    if documents is not None:
        mask = mask & (documents[:, None, past:, None] == documents[:, None, None, :])  # (B, 1, T, past + T)
    plain = dict(is_causal=mask is None, enable_gqa=mask is None)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **plain)
    return y.transpose(1, 2)


def room_for_documents(seq_len: int) -> int:
    """Documents that may begin inside a sequence before the kernels for documents merge the rest into one."""
    return seq_len // 128 + 1


def document_begins(documents: Tensor) -> Tensor:
    """Start offsets of the documents of rows (B, T) in the flattened batch, int32, padded with B * T.

    The number of offsets is fixed, so that shapes do not depend on the text. Documents of a row beyond
    room_for_documents are merged, never with another row.
    """
    (B, T), device = documents.shape, documents.device
    room, tokens = room_for_documents(T), torch.arange(B * T, dtype=torch.int32, device=device)
    inner = F.pad(documents.diff(dim=1) != 0, (1, 0))  # begins, but not with its row
    begins = (tokens % T == 0) | (inner & (inner.cumsum(1) <= room)).flatten()
    ends = torch.full((B * (1 + room) + 1,), B * T, dtype=torch.int32, device=device)
    return ends.scatter_reduce(0, begins.cumsum(0) - 1, tokens, "amin")


def flash_attention(dense: Callable, varlen: Callable) -> AttentionFn:
    """Attention by flash-attn's functions for whole rows (dense) and for documents (varlen).

    Some versions return the log-sum-exp beside the output. Documents with a past are left to masks.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        if documents is None:
            out = dense(q, k, v, causal=True)
        elif k.size(1) > q.size(1):
            return sdpa_attention(q, k, v, documents)
        else:
            begins, longest = document_begins(documents), q.size(1)
            flat = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, D)
            out = varlen(*flat, begins, begins, longest, longest, causal=True)
        return (out[0] if isinstance(out, tuple) else out).view(q.shape)

    return attention


def torch_attention() -> AttentionFn:
    """torch's own attention on GPUs, with its varlen kernel for documents.

    float32, in which cards without bfloat16 compute, has no kernel for documents, and for fewer K/V heads
    only the one that stores (B, H, T, T) scores, 6.4 GB per layer of pr1019: K/V heads are repeated,
    documents are masked.
    """
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11's kernel takes fewer K/V heads as they are; 2.13's needs a flag
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    flash = flash_attention(
        lambda q, k, v, causal: sdpa_attention(q, k, v),
        lambda *flat, causal: varlen_attn(*flat, window_size=(-1, 0), **gqa),  # (-1, 0): causal
    )

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        if q.dtype != torch.float32:
            return flash(q, k, v, documents)
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
        return sdpa_attention(q, k, v, documents)

    return attention


def choose_attention(requested: str, device: torch.device) -> tuple[str, AttentionFn, list[str]]:
    """Choose the requested attention kernel, or the first usable one: name, function, and notices.

    The order is fa3, fa2, sdpa; notices are about those that cannot be used.
    The flash kernels need a GPU, fa3 a Hopper one. UserError if the requested one cannot run.
    """
    notices = []
    if device.type == "cuda" and compute_dtype(device) == torch.float32:
        generation = ".".join(map(str, torch.cuda.get_device_capability(device)))
        notices.append(f"this GPU of compute capability {generation} has no bfloat16: it computes in float32")
    for name, module, generation in (("fa3", "flash_attn_interface", 9), ("fa2", "flash_attn", 8)):
        if requested not in ("auto", name) or (requested == "auto" and device.type != "cuda"):
            continue
        if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < generation:
            notices.append(f"{name} does not run on this device")
            continue
        try:
            package = importlib.import_module(module)
            return name, flash_attention(package.flash_attn_func, package.flash_attn_varlen_func), notices
        except (ImportError, OSError) as error:
            notices.append(f"{name} cannot be imported: {error}")
    if requested not in ("auto", "sdpa"):
        raise UserError(f"ATTENTION={requested}: {notices[-1]}")
    return "sdpa", torch_attention() if device.type == "cuda" else sdpa_attention, notices


def attention_backend(config: Config, kernel: AttentionFn, device: torch.device) -> str:
    """Find which operator torch chooses inside `kernel` for the attention of a training sequence.

    flash, cudnn, efficient, varlen, or math, which stores (B, H, T, T) scores. It runs one sequence and
    watches: the choice depends on version, card, and shapes (torch 2.11 on Hopper: cuDNN before
    FlashAttention 2).
    """
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    shapes = ((1, config.train_seq_len, n, config.head_dim) for n in heads)
    q, k, v = (torch.zeros(shape, device=device, dtype=compute_dtype(device)) for shape in shapes)
    documents = torch.zeros(1, config.train_seq_len, dtype=torch.long, device=device)
    with Watch():  # the choice depends on whether there will be a backward pass
        kernel(q.requires_grad_(), k, v, documents if config.doc_borders == "attention" else None)
    found = re.search(r"_scaled_dot_product_([a-z]+)_attention|(varlen)", " ".join(seen))
    return next(filter(None, found.groups())) if found else "math"


def rms_norm(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """gain * x / sqrt(mean(x^2) + eps) over the last axis; eps is that of float32 for every dtype.

    A gain (..., 1) is part of each vector's factor, so that its gradient takes no further pass over x.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = (exact.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt() * gain
    return (exact * factor).to(x.dtype)


def rotary_base(config: Config) -> float:
    """Base of the rotary frequencies, scaled once for TRAIN_SEQ_LEN and then the same at every length.

    base * (T / ntk_len)^(r / (r - 2)) for r rotated dimensions and T = TRAIN_SEQ_LEN > ntk_len (NTK-aware
    scaling).
    """
    r, stretch = config.rotary_dims, config.train_seq_len / (config.rope_ntk_len or config.train_seq_len)
    return config.rope_base * max(1.0, stretch) ** (r / (r - 2)) if r > 2 else config.rope_base


def rotary_tables(length: int, dims: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i / dims), (length, 1, dims / 2) each; dtype and device of `like`."""
    exact = dict(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    frequencies = base ** (-torch.arange(0, dims, 2, **exact) / dims)
    angles = torch.outer(torch.arange(length, **exact), frequencies)
    return angles.cos().to(like.dtype).unsqueeze(1), angles.sin().to(like.dtype).unsqueeze(1)


class AttentionContext(NamedTuple):
    """Inputs of attention that depend on positions: rotary tables, documents, and the KV cache.

    cos and sin (T, 1, D), and half of the number of rotated dimensions.
    """

    cos: Tensor
    sin: Tensor
    half: int
    documents: Tensor | None  # (B, past + T)
    first: Tensor | None  # (B, past + T), for KEY_OFFSET: the token has no predecessor
    cache: Cache | None
    depth: int = 0  # of the layer, which has keys and values of its own in the cache


def rotate(x: Tensor, context: AttentionContext) -> Tensor:
    """Rotate the first 2 * half dimensions of x (B, T, heads, D) in pairs (i, i + half): x cos + partner sin.

    The other dimensions have cos 1 and sin 0. If they are a multiple, all of x is swapped in pairs of parts:
    one kernel forward and one backward, where concatenated parts are a kernel each.
    """
    half = context.half
    if x.size(-1) % (2 * half):
        partner = torch.cat((x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]), dim=-1)
    else:
        partner = x.unflatten(-1, (-1, 2, half)).flip(-2).flatten(-3)
    return x * context.cos + partner * context.sin


def exclude_self(y: Tensor, v: Tensor, share: Tensor | None = None) -> Tensor:
    """Exclusive self-attention (arXiv 2603.09078): y minus its component along the token's own value.

    y (B, T, H, D), v (B, T, K, D); query head h belongs to value head h // (H / K). share (..., H): how much
    of the component; None: all of it.
    """
    y = y.unflatten(2, (v.size(2), -1))  # (B, T, K, H / K, D)
    v = v.unsqueeze(3).expand_as(y)
    projection = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-24)
    if share is not None:
        projection = projection * share.to(y.dtype).unflatten(-1, y.shape[2:4]).unsqueeze(-1)
    return (y - projection * v).flatten(2, 3)


def offset_keys(k: Tensor, begin: int, first: Tensor) -> Tensor:
    """Keys (B, T, K, D) whose dimensions from `begin` on are those of the token before: an induction head
    in one layer (modded-nanogpt, PR 169). first (B, T): a token without predecessor, which gets zeros."""
    before = F.pad(k[..., begin:], (0, 0, 0, 0, 1, -1)).masked_fill(first[..., None, None], 0)
    return torch.cat((k[..., :begin], before), dim=-1)


def adapter_shapes(config: Config) -> dict[str, tuple[int, int, int]]:
    """(n, out, in) of what TTT_LORA_FORM adapts by name: n bank rows, or n applications of a block."""
    c, d, n = config, config.model_dim, len(config.block_rows)
    if c.ttt_lora_form == "series":
        rows, m = c.num_layers, c.mlp_dim
        attention = dict(qo_bank=(2 * rows, d, d), kv_bank=(2 * rows, c.kv_dim, d))
        return attention | dict(mlp_up_bank=(rows, m, d), mlp_down_bank=(rows, d, m))
    outputs = zip(PARALLEL_ADAPTERS, (d, c.kv_dim, c.kv_dim, d, d, c.vocab_size), strict=True)
    return {name: (1 if name == "head" else n, out, d) for name, out in outputs if name[0] in c.ttt_matrices}


class Weights(NamedTuple):
    """All block matrices in the one form that every forward pass reads, made by GPT.weights.

    qkv (..., L, d + 2 K D, d) and up (..., L, m, d) by bank row. o (..., A, d, d) and down (..., A, d, m) by
    application of a block: they carry attn_scale and mlp_scale, whose gradient is then a pass over weights,
    not two over tokens. Leading axis: none, or one set of weights per batch row.
    """

    qkv: Tensor
    o: Tensor
    up: Tensor
    down: Tensor


class BlockWeights(NamedTuple):
    """What one application of a block multiplies by, in the compute dtype.

    matrices: product -> (..., out, in). adapters: product -> pairs A (..., r, in), B (..., out, r), whose
    outputs are concatenated (three for qkv); "attn" and "mlp" are in parallel to a whole sublayer. Adapters
    that end in the residual stream carry its scale, as o and down do. tap: sees the input and output of every
    product.
    """

    matrices: Mapping[str, Tensor]
    adapters: Mapping[str, Sequence[tuple[Tensor, Tensor]]]
    tap: Callable[[str, Tensor, Tensor], None] | None = None

    def product(self, name: str, x: Tensor) -> Tensor:
        """x (B, T, in) -> (B, T, out)."""
        y = x @ self.matrices[name].mT
        if self.tap is not None:
            self.tap(name, x, y)
        return self.adapted(name, x, y)

    def adapted(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y (B, T, out) plus the low-rank products of x (B, T, in) under this name."""
        if name not in self.adapters:
            return y
        return y + torch.cat([(x @ a.mT) @ b.mT for a, b in self.adapters[name]], dim=-1)


def lookup(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of an embedding (V, d) at ids (B, T) -> (B, T, d); weight (B, V, d): a table per batch row."""
    if weight.dim() == 2:
        return F.embedding(ids, weight)
    tables = torch.arange(len(weight), device=ids.device).unsqueeze(-1)
    return F.embedding(ids + tables * weight.size(1), weight.flatten(0, 1))


SIGN_ROWS = 8192  # of BIGRAM_SIGNS


class FactorizedEmbedding(nn.Module):
    """An embedding of its own width, projected to `out` features and scaled: hashed bigrams, values."""

    def __init__(self, rows: int, width: int, out: int, scale: float | None):
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        self.proj = nn.Linear(width, out, bias=False)
        self.scale = None if scale is None else nn.Parameter(torch.tensor(scale))

    def forward(self, ids: Tensor, dtype: torch.dtype, signs: Tensor | None = None) -> Tensor:
        """ids (B, T) -> (B, T, out) of `dtype`; signs (B, T, width): factors of the embedding."""
        out = lookup(self.embed.weight, ids).to(dtype)
        out = (out if signs is None else out * signs) @ self.proj.weight.to(dtype).mT
        return out if self.scale is None else self.scale.to(dtype) * out


def bigram_rows(config: Config, input_ids: Tensor, first: Tensor, word_start: Tensor | None) -> Tensor:
    """Rows (B, T) in the bigram table of every pair (previous token, this token).

    first (B, T): the token has no predecessor; its row is the last one. word_start (V,): the token begins a
    word.
    """
    ids, rows = input_ids.int(), config.bigram_vocab_size  # the published hashes wrap at 32 bits
    previous = F.pad(ids, (1, -1))
    if config.bigram_hash == "linear":
        return (1009 * previous.masked_fill(first, 0) + ids) % rows
    pair, buckets = torch.bitwise_xor(36313 * ids, 27191 * previous), rows - 1
    if not config.pos_conditional_bigram:
        return (pair % buckets).masked_fill(first, buckets)
    half = buckets // 2
    return (pair % half + half * (~word_start[input_ids])).masked_fill(first, buckets)


class SmearGate(nn.Module):
    """(1 - g) x_t + g x_{t-1} with a learned gate g = sigmoid(gate) per channel."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.model_dim))

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        """x (B, T, d); first (B, T), True where a token has no predecessor."""
        gate = self.gate.sigmoid().to(x.dtype)
        previous = F.pad(x, (0, 0, 1, -1)).masked_fill(first.unsqueeze(-1), 0)
        return (1 - gate) * x + gate * previous


class Cache(dict):
    """State of the tokens read so far: "ids" (B, T), and keys and values by depth."""

    def append(self, of: str | int, *new: Tensor) -> tuple[Tensor, ...]:
        """Add tensors (B, T, ...) under the key `of`; returns all that is kept there."""
        old = self.get(of, [part[:, :0] for part in new])
        self[of] = tuple(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))
        return self[of]


class Attention(nn.Module):
    """Grouped-query attention with normalized queries and keys. Its matrices are rows of the banks."""

    def __init__(self, config: Config, layer: int, kernel: AttentionFn):
        super().__init__()
        self.kernel, self.head_dim = kernel, config.head_dim
        self.exclusive = layer >= config.num_layers - config.xsa_last_n
        self.gate_scale, self.key_offset = config.attn_gate_scale, config.key_offset
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        gate = torch.zeros(config.num_heads, config.attn_gate)
        self.attn_gate_w = nn.Parameter(gate) if config.attn_gate else None
        # tanh(2) is 0.96: it begins near the whole, which XSA without a fraction takes
        alpha = torch.full((config.num_heads,), 2.0)
        self.xsa_alpha = nn.Parameter(alpha) if config.xsa_learned and self.exclusive else None

    def forward(
        self, x: Tensor, weights: BlockWeights, context: AttentionContext, value: Tensor | None
    ) -> Tensor:
        """x (B, T, d), value (B, T, K * D) or None: added to the values -> (B, T, d)."""
        qkv, d = weights.product("qkv", x), x.size(-1)  # (B, T, d + 2 K D)
        q, k, v = qkv.split([d, (qkv.size(-1) - d) // 2, (qkv.size(-1) - d) // 2], dim=-1)
        v = v if value is None else v + value
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # (B, T, heads, D)
        q, k = rotate(rms_norm(q, self.q_gain.unsqueeze(-1)), context), rotate(rms_norm(k), context)
        keys, values = (k, v) if context.cache is None else context.cache.append(context.depth, k, v)
        if self.key_offset:
            keys = offset_keys(keys, self.key_offset, context.first)
        y = self.kernel(q, keys, values, context.documents)  # (B, T, H, D)
        if self.exclusive:
            y = exclude_self(y, v, None if self.xsa_alpha is None else self.xsa_alpha.tanh())
        if self.attn_gate_w is not None:
            gate = x[..., : self.attn_gate_w.size(-1)] @ self.attn_gate_w.to(x.dtype).mT  # (B, T, H)
            y = y * (self.gate_scale * gate).sigmoid().unsqueeze(-1)
        return weights.product("o", y.flatten(2))


class StarReLU(nn.Module):
    """A learned scale and bias per hidden channel (arXiv 2210.13452, per channel as in #494)."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.to(x.dtype) * x + self.bias.to(x.dtype)


class Block(nn.Module):
    """Attention, then MLP, each on the scaled norm of the stream and added back per channel.

    layer: the bank row of its matrices.
    """

    def __init__(self, config: Config, layer: int, kernel: AttentionFn):
        super().__init__()
        self.layer, self.slope = layer, config.mlp_leaky_slope
        self.norm_scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
        self.attn = Attention(config, layer, kernel)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        keep_first = torch.tensor([[1.0], [0.0]]).repeat(1, config.model_dim)
        self.resid_mix = nn.Parameter(keep_first) if config.resid_mix else None
        self.mlp = StarReLU(config.mlp_dim) if config.star_relu else None

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        weights: BlockWeights,
        context: AttentionContext,
        value: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """x, x0 (B, T, d): the stream and the first embedding; value as for Attention -> (B, T, d).

        positions (B, C) or None: those that go on after attention -> (B, C, d).
        """
        x = self.mix(x, x0)
        x = x + self.attention_update(x, weights, context, value)  # times attn_scale, which weights.o carries
        if positions is not None:
            x = x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.size(-1)))
        return x + self.mlp_update(x, weights)  # times mlp_scale, which weights.down carries

    def forward_lanes(
        self,
        lanes: tuple[Tensor, Tensor],
        x0: Tensor,
        weights: BlockWeights,
        context: AttentionContext,
        value: Tensor | None,
        positions: Tensor | None,
        lambdas: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """As forward, on two lanes (#1855): attention reads the first, the MLP the second, neither the other.

        lambdas: how much of a lane (..., lane), and of what attention and the MLP add (producer, ..., lane),
        is in the new lanes.
        """
        updates = [self.attention_update(self.mix(lanes[0], x0), weights, context, value)]
        if positions is not None:
            index = positions.unsqueeze(-1).expand(-1, -1, x0.size(-1))
            lanes, updates = [x.gather(1, index) for x in lanes], [x.gather(1, index) for x in updates]
        updates.append(self.mlp_update(lanes[1], weights))
        kept, added = (part.to(x0.dtype) for part in lambdas)
        first, second = (
            kept[..., i : i + 1] * lanes[i] + sum(added[n][..., i : i + 1] * updates[n] for n in (0, 1))
            for i in (0, 1)
        )
        return first, second

    def mix(self, x: Tensor, x0: Tensor) -> Tensor:
        """The stream with some of the first embedding x0 mixed back in, per channel."""
        if self.resid_mix is None:
            return x
        mix = self.resid_mix.to(x.dtype)
        return mix[0] * x + mix[1] * x0

    def attention_update(
        self, x: Tensor, weights: BlockWeights, context: AttentionContext, value: Tensor | None
    ) -> Tensor:
        """What attention adds to the stream x (B, T, d)."""
        h = rms_norm(x, self.norm_scale)
        return weights.adapted("attn", h, self.attn(h, weights, context, value))

    def mlp_update(self, x: Tensor, weights: BlockWeights) -> Tensor:
        """What the MLP adds to the stream x (B, T, d)."""
        h = rms_norm(x, self.norm_scale)
        hidden = F.leaky_relu(weights.product("up", h), self.slope).square()  # (B, T, m)
        hidden = hidden if self.mlp is None else self.mlp(hidden)
        return weights.adapted("mlp", h, weights.product("down", hidden))


class GPT(nn.Module):
    """The model: one forward for training, scoring, calibration, adaptation, and generation.

    Bank row i has W_Q = qo_bank[i], W_O = qo_bank[L + i], W_K = kv_bank[i], W_V = kv_bank[L + i],
    mlp_up_bank[i], and mlp_down_bank[i]. State-dict names are those of the banked line (#399, #549, #1019).
    BLOCK_ORDER may apply a bank row again, by a block of its own or, under LOOP_SHARED, by the same one;
    `looped` False leaves that out. word_start (V,): tokens that begin a word, for POS_CONDITIONAL_BIGRAM and
    WORD_START_BOOST.
    """

    BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype = torch.float32,
        kernel: AttentionFn = sdpa_attention,
        word_start: np.ndarray | None = None,
    ):
        super().__init__()
        self.config, self.dtype = config, dtype
        L, d, m = config.num_layers, config.model_dim, config.mlp_dim
        self.qo_bank = nn.Parameter(torch.empty(2 * L, d, d))
        self.kv_bank = nn.Parameter(torch.empty(2 * L, config.kv_dim, d))
        self.mlp_up_bank = nn.Parameter(torch.empty(L, m, d))
        self.mlp_down_bank = nn.Parameter(torch.empty(L, d, m))
        self.tok_emb = nn.Embedding(config.vocab_size, d)
        self.lm_head = None if config.tie_embeddings else nn.Linear(d, config.vocab_size, bias=False)
        self.bigram = None
        if config.bigram_vocab_size:
            scale = 0.05 if config.bigram_hash == "xor" else None
            self.bigram = FactorizedEmbedding(config.bigram_vocab_size, config.bigram_dim, d, scale)
        self.word_start_boost = nn.Parameter(torch.tensor(1.0)) if config.word_start_boost else None
        starts = None if word_start is None else torch.tensor(word_start)
        self.register_buffer("word_start", starts, persistent=False)
        if config.bigram_signs:
            heads = torch.rand(SIGN_ROWS, config.bigram_dim, generator=torch.Generator().manual_seed(0)) < 0.5
            self.register_buffer("bigram_signs", (2 * heads - 1).to(dtype), persistent=False)
        self.smear = SmearGate(config) if config.smear_gate and not config.smear_inputs else None
        self.smear_gate = nn.Linear(config.smear_inputs, 1, bias=False) if config.smear_inputs else None
        self.smear_lambda = nn.Parameter(torch.zeros(1)) if config.smear_inputs else None
        memory = (1, config.num_memory_tokens, d)
        self.memory_tokens = nn.Parameter(torch.empty(memory)) if config.num_memory_tokens else None
        skips = len(config.block_rows) // 2
        self.skip_weights = nn.Parameter(torch.ones(skips, d)) if config.unet_skips and skips else None
        self.skip_gates = nn.Parameter(torch.zeros(skips, d)) if config.skip_gates and skips else None
        lanes = config.parallel_start_layer > 0
        self.parallel_post_lambdas = nn.Parameter(torch.ones(L, 2, 2)) if lanes else None
        self.parallel_resid_lambdas = nn.Parameter(torch.full((L, 2), 1.1)) if lanes else None
        self.blocks = nn.ModuleList(Block(config, row, kernel) for row in config.block_layers)
        self.looped, self.first_uses = True, [config.block_layers.index(row) for row in range(L)]
        self.value_layers = config.value_layers
        self.ve_shared = None
        if self.value_layers:
            self.ve_shared = FactorizedEmbedding(config.vocab_size, config.ve_dim, config.kv_dim, scale=0.1)
        self.ve_layer_scales = nn.ParameterList(torch.ones(1) for _ in self.value_layers)
        terms = len(config.ahead_weights) + 1 if config.mtp_weights or config.prefix_loss_weight else 0
        self.register_buffer("loss_weights", torch.zeros(terms) if terms else None, persistent=False)
        piece = torch.tensor(config.train_seq_len) if config.data_order == "packed" else None
        self.register_buffer("piece", piece, persistent=False)
        no_prefix = torch.full((config.vocab_size,), -1) if config.prefix_loss_weight else None
        self.register_buffer("prefixes", no_prefix, persistent=False)
        heads = range(config.mtp_num_heads)
        self.mtp_heads = nn.ModuleList(nn.Linear(d, config.vocab_size, bias=False) for _ in heads)
        for name, table in zip(("cos", "sin"), self.rotary(max(config.row_tokens, 8192)), strict=True):
            self.register_buffer(name, table, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> GPT:
        """Set initial weights by `seed` alone: orthogonal inputs, zero outputs, small embeddings."""
        generator = torch.Generator().manual_seed(seed)
        L = self.config.num_layers
        inputs = [*self.qo_bank[:L], *self.kv_bank, *self.mlp_up_bank]
        inputs += [part.proj.weight for part in (self.bigram, self.ve_shared) if part is not None]
        for matrix in inputs:
            nn.init.orthogonal_(matrix, generator=generator)
        self.qo_bank[L:].zero_()
        self.mlp_down_bank.zero_()
        if self.smear_gate is not None:
            self.smear_gate.weight.zero_()
        self.tok_emb.weight.normal_(0, self.config.tied_embed_init_std, generator=generator)
        # the k-th singular value, from 1, becomes the first one / sqrt(k) (#60)
        if self.config.overtone_init:
            U, S, Vh = torch.linalg.svd(self.tok_emb.weight, full_matrices=False)
            self.tok_emb.weight.copy_(U * (S[0] / torch.arange(1, len(S) + 1).sqrt()) @ Vh)
        for head in (self.lm_head, *self.mtp_heads):
            if head is not None:
                head.weight.zero_()
        if self.bigram is not None and self.bigram.scale is not None:
            self.bigram.embed.weight.zero_()
        elif self.bigram is not None:  # as #494: of the table and the projection, the latter is zero
            self.bigram.embed.weight.normal_(0, 0.01, generator=generator)
            self.bigram.proj.weight.zero_()
        if self.ve_shared is not None:
            self.ve_shared.embed.weight.normal_(0, 0.01, generator=generator)
        if self.memory_tokens is not None:
            self.memory_tokens.normal_(0, 0.02, generator=generator)
        if self.config.phase_resid_mix:
            for layer, block in enumerate(self.blocks):
                stream = 1 / (1 + math.exp(-3 * (layer / max(len(self.blocks) - 1, 1) - 0.5)))
                block.resid_mix[0], block.resid_mix[1] = stream, 1 - stream
        return self

    @torch.no_grad()
    def start_loop(self) -> None:
        """Use all of BLOCK_ORDER from now on; a repeat begins with the scales of its row's first use."""
        for block, row in zip(self.blocks, self.config.block_layers, strict=True):
            block.load_state_dict(self.blocks[self.first_uses[row]].state_dict())
        self.looped = True

    def forward(
        self, input_ids: Tensor, weights: Weights | None = None, adapters: Adapters | None = None, **how: Any
    ) -> Tensor:
        """input_ids (B, T) -> logits (B, T, V), or (B, C, V) with `positions`; float32, or float64."""
        return self.head(self.stream(input_ids, weights, adapters, **how), adapters=adapters)

    def stream(
        self,
        input_ids: Tensor,
        weights: Weights | None = None,
        adapters: Adapters | None = None,
        tap: Tap | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        piece: Tensor | None = None,
    ) -> Tensor:
        """input_ids (B, T) -> what the head reads, (B, T, d).

        weights: made by GPT.weights, if the caller has them. adapters: low-rank additions, see Adapters. tap:
        sees every product, see Tap. positions (B, C): those whose logits are wanted -> (B, C, d). cache: of
        the tokens before these, which are added to it. piece: tokens of a document that attention stays
        within, (); None: the whole document.
        """
        applications = self.block_weights(self.weights() if weights is None else weights, adapters or {}, tap)
        x0 = x = self.embed(input_ids) if cache is None else self.embed_more(input_ids, cache)
        context = self.attention_context(input_ids, x, cache, piece)
        values = None if self.ve_shared is None else self.ve_shared(input_ids, self.dtype)  # (B, T, K * D)
        skips: list[Tensor] = []
        half, lane = len(applications) // 2, None
        for depth, (block, block_weights) in enumerate(zip(self.used_blocks(), applications, strict=True)):
            in_lanes = depth >= half and 0 < self.config.parallel_start_layer <= block.layer
            lane = x if in_lanes and lane is None else lane
            if self.skip_weights is not None and depth >= half and skips:
                x = self.add_skip(x, skips.pop(), depth - half)
            value = None
            if block.layer in self.value_layers:
                value = self.ve_layer_scales[self.value_layers.index(block.layer)].to(x.dtype) * values
            context = context._replace(depth=depth)
            given = (x0, block_weights, context, value, positions if depth == len(applications) - 1 else None)
            if in_lanes:
                lambdas = (self.parallel_resid_lambdas, self.parallel_post_lambdas)
                x, lane = block.forward_lanes((x, lane), *given, tuple(part[block.layer] for part in lambdas))
            else:
                x = block(x, *given)
            if depth < half:
                skips.append(x)
        return x if lane is None else (x + lane) / 2

    def banks(self) -> dict[str, Tensor]:
        """The four banks by name."""
        return {name: getattr(self, name) for name in self.BANKS}

    def used_blocks(self) -> list[Block]:
        """The blocks of a forward pass, in their order."""
        rows, shared = self.config.block_rows, self.config.loop_shared
        used = [depth for depth, row in enumerate(rows) if self.looped or row not in rows[:depth]]
        return [self.blocks[rows[depth] if shared else depth] for depth in used]

    def weights(self, banks: Mapping[str, Tensor] | None = None) -> Weights:
        """Fuse the four banks (banks: others, by name) and the blocks' residual scales into Weights."""
        given = self.banks() | dict(banks or {})
        assert [*given] == [*self.BANKS], "a bank that nothing would use"
        qo, kv = given["qo_bank"], given["kv_bank"]
        up, down = given["mlp_up_bank"], given["mlp_down_bank"]
        L, rows = self.config.num_layers, [block.layer for block in self.used_blocks()]
        lead = torch.broadcast_shapes(qo.shape[:-3], kv.shape[:-3])
        qo, kv = (bank.expand(*lead, *bank.shape[-3:]) for bank in (qo, kv))
        o = qo[..., L:, :, :]
        if rows != list(range(L)):  # no index: the host would wait
            o, down = (torch.stack([bank.unbind(-3)[row] for row in rows], dim=-3) for bank in (o, down))
        qkv = torch.cat((qo[..., :L, :, :], kv[..., :L, :, :], kv[..., L:, :, :]), dim=-2)
        return Weights(qkv, self.scales("attn_scale") * o, up, self.scales("mlp_scale") * down)

    def scales(self, name: str) -> Tensor:
        """attn_scale or mlp_scale of every application, (..., A, d, 1); adapted ones are (B, 1, d) each."""
        each = [torch.atleast_2d(getattr(block, name)) for block in self.used_blocks()]
        lead = torch.broadcast_shapes(*(scale.shape[:-2] for scale in each))
        return torch.cat([scale.expand(*lead, 1, -1) for scale in each], dim=-2).unsqueeze(-1)

    def block_weights(self, weights: Weights, adapters: Adapters, tap: Tap | None) -> list[BlockWeights]:
        """Weights of each application, in `dtype`."""
        assert {*adapters} <= {*self.BANKS, *PARALLEL_ADAPTERS}, "an adapter that nothing would use"
        assert ("qo_bank" in adapters) == ("kv_bank" in adapters), "Q, K and V are adapted together"
        # unbind, not indexing: its gradient is one stack, where each index would fill a bank of zeros
        cast = Weights(*(part.to(self.dtype).unbind(-3) for part in weights))
        lora = {name: [part.to(self.dtype).unbind(-3) for part in pair] for name, pair in adapters.items()}
        scales = [self.scales(name).to(self.dtype) for name in ("attn_scale", "mlp_scale")] if lora else []
        found = []
        for depth, block in enumerate(self.used_blocks()):
            row, pairs = block.layer, self.adapter_pairs(lora, depth, block.layer)
            for name, scale in zip(("o", "down", "attn", "mlp"), 2 * scales, strict=False):
                if name in pairs:  # it ends in the residual stream
                    pairs[name] = [(a, scale.select(-3, depth) * b) for a, b in pairs[name]]
            matrices = dict(qkv=cast.qkv[row], o=cast.o[depth], up=cast.up[row], down=cast.down[depth])
            found.append(BlockWeights(matrices, pairs, None if tap is None else partial(tap, block)))
        return found

    def adapter_pairs(
        self, lora: Mapping[str, Sequence[Sequence[Tensor]]], depth: int, row: int
    ) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Pairs A, B of an application by product, as in BlockWeights.

        lora: name -> A of every bank row, which serves all its uses, or of every application, and B.
        """
        pairs = {}
        for name, (_, parts) in PRODUCTS.items():
            if parts[0][0] in lora:
                at = [(bank, half * self.config.num_layers + row) for bank, half in parts]
                pairs[name] = [(lora[bank][0][i], lora[bank][1][i]) for bank, i in at]
        names = [name for name in PARALLEL_ADAPTERS if name in lora and name != "head"]
        own = {name: (lora[name][0][depth], lora[name][1][depth]) for name in names}
        if own.keys() & {"q", "k", "v"}:
            c, like = self.config, next(iter(own.values()))[0]
            absent = {name: (like.new_zeros(0, c.model_dim), like.new_zeros(out, 0))  # of rank 0
                      for name, out in (("q", c.model_dim), ("k", c.kv_dim), ("v", c.kv_dim))}  # fmt: skip
            pairs["qkv"] = [own.get(name, pair) for name, pair in absent.items()]
        return pairs | {place: [own[name]] for name, place in (("o", "attn"), ("mlp", "mlp")) if name in own}

    def attention_context(
        self, input_ids: Tensor, like: Tensor, cache: Cache | None = None, piece: Tensor | None = None
    ) -> AttentionContext:
        """Context of input_ids (B, T), which the cache has already, with dtype and device of `like`."""
        ids, count = input_ids if cache is None else cache["ids"][0], input_ids.size(1)
        length = ids.size(1)
        tables = (self.cos, self.sin) if length <= len(self.cos) else self.rotary(length, like.device)
        cos, sin = (table[length - count : length].to(like.dtype) for table in tables)
        documents = (ids == BOS_ID).cumsum(1) if self.config.doc_borders == "attention" else None
        if piece is not None:
            at = torch.arange(length, device=ids.device).expand_as(ids)
            begin = at.where(ids == BOS_ID, 0).cummax(1).values  # of the document
            documents = ((at - begin) % piece == 0).cumsum(1)
        first = self.without_predecessor(ids) if self.config.key_offset else None
        return AttentionContext(cos, sin, self.config.rotary_dims // 2, documents, first, cache)

    def without_predecessor(self, ids: Tensor) -> Tensor:
        """Whether each token (B, T) is the first of its row, or of its document where that counts."""
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 0] = True
        return first if self.config.doc_borders == "published" else first | (ids == BOS_ID)

    def rotary(self, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin (length, 1, D) for `rotate`, stored: compiled kernels would recompute the angles."""
        r, like = self.config.rotary_dims, torch.empty((), dtype=self.dtype, device=device)
        cos, sin = rotary_tables(length, r, rotary_base(self.config), like)
        rest = (0, self.config.head_dim - r)
        return F.pad(torch.cat((cos, cos), -1), rest, value=1.0), F.pad(torch.cat((sin, -sin), -1), rest)

    def add_skip(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        """Add the output of the mirror block, (B, T, d), to the stream, or blend it in by a gate."""
        skip = self.skip_weights[index].to(x.dtype) * skip
        if self.skip_gates is None:
            return x + skip
        return skip.lerp(x, self.skip_gates[index].sigmoid().to(x.dtype))

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) -> the first embedding (B, T, d): token, hashed bigram, norm, smear."""
        first = self.without_predecessor(input_ids)
        x = lookup(self.tok_emb.weight, input_ids).to(self.dtype)
        if self.bigram is not None:
            rows, signs = bigram_rows(self.config, input_ids, first, self.word_start), None
            if self.config.bigram_signs:
                pairs = torch.bitwise_xor(F.pad(input_ids, (1, -1)), input_ids).masked_fill(first, 0)
                signs = self.bigram_signs[pairs % SIGN_ROWS]
            hashed = self.bigram(rows, self.dtype, signs)
            if self.word_start_boost is not None:
                starts = self.word_start[input_ids].unsqueeze(-1)  # (B, T, 1)
                hashed = (1 + starts * (self.word_start_boost - 1)).to(x.dtype) * hashed
            x = x + hashed
        if self.smear_gate is not None:
            before = F.pad(x, (0, 0, 1, -1)).masked_fill(first.unsqueeze(-1), 0)
            opened = (x[..., : self.config.smear_inputs] @ self.smear_gate.weight.to(x.dtype).mT).sigmoid()
            x = x + self.smear_lambda.to(x.dtype) * opened * before
        x = rms_norm(x)
        x = x if self.smear is None else self.smear(x, first)
        if self.memory_tokens is not None:
            memory = self.memory_tokens.to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat((memory[:, : x.size(1)], x[:, memory.size(1) :]), dim=1)
        return x

    def embed_more(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """The first embedding (B, T, d) of ids that follow those of the cache, which gets them."""
        (whole,), new = cache.append("ids", input_ids), input_ids.size(1)
        back = new + 3  # smear and bigram look back two positions, and the first of `near` counts as a border
        near = whole if self.memory_tokens is not None else whole[:, -back:]
        return self.embed(near)[:, -new:]

    def head(self, x: Tensor, weight: Tensor | None = None, adapters: Adapters | None = None) -> Tensor:
        """The stream (B, T, d) -> softcapped logits (B, T, V); weight (V, d): another head."""
        if weight is None:
            weight = self.tok_emb.weight if self.lm_head is None else self.lm_head.weight
        x = rms_norm(x)
        logits = x @ weight.to(x.dtype).mT
        if adapters and "head" in adapters:
            a, b = (part.to(x.dtype).squeeze(-3) for part in adapters["head"])
            logits = logits + (x @ a.mT) @ b.mT
        logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats of targets (B, T) under logits (B, T, V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def token_nll(
    model: GPT,
    input_ids: Tensor,
    targets: Tensor,
    positions: Tensor | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    adapters: Adapters | None = None,
) -> Tensor:
    """nll of targets at positions of input_ids, all three (B, C), or at every position.

    replaced: other values of any parameters by name, as FastWeights makes them; adapters as in GPT.stream.
    """
    extra = dict(adapters=adapters, positions=positions)
    return nll(torch.func.functional_call(model, dict(replaced or {}), (input_ids,), extra), targets)


def softer_targets(model: GPT, logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    """Loss (B, T) of further targets under the logits (B, T, V) of the next one, times model.loss_weights.

    Further targets are the longest token that begins the target (modded-nanogpt, PR 337), then those after
    it in the same document (PR 178). losses (B, T): of the target; all share its normalizer.
    """
    prefix_weight, *weights = model.loss_weights
    own = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (B, T)
    total, inside = torch.zeros_like(losses), torch.ones_like(targets, dtype=torch.bool)

    def of(other: Tensor, exists: Tensor) -> Tensor:
        reached = logits.gather(-1, other.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (losses + own - reached).masked_fill(~exists, 0)

    if model.prefixes is not None:
        prefix = model.prefixes[targets]
        total = prefix_weight * of(prefix, prefix >= 0)
    for k, weight in enumerate(weights, 1):
        inside = inside & (F.pad(targets, (1 - k, k - 1), value=BOS_ID) != BOS_ID)
        ahead = F.pad(targets, (-k, k), value=-1)
        total = total + weight * of(ahead, inside & (ahead >= 0))
    return total


def training_loss(model: GPT, input_ids: Tensor, targets: Tensor, weights: Weights | None = None) -> Tensor:
    """Mean nll of all targets but those at memory tokens, plus the terms that the settings ask for.

    Those are z-loss, multi-token prediction (head k, from 1, predicts at each position the target k positions
    later), and `softer_targets`. weights as in GPT.stream.
    """
    c = model.config
    stream = model.stream(input_ids, weights, piece=model.piece)
    x, targets = stream[:, c.num_memory_tokens :], targets[:, c.num_memory_tokens :]
    logits = model.head(x)
    losses = nll(logits, targets)
    if model.loss_weights is not None:
        losses = losses + softer_targets(model, logits, targets, losses)
    loss = losses.mean()
    if c.zloss_weight:
        loss = loss + c.zloss_weight * logits.logsumexp(-1).square().mean()
    for k, head in enumerate(model.mtp_heads, 1):
        ahead = nll(model.head(x[:, :-k], head.weight), targets[:, k:]).mean()
        loss = loss + c.mtp_loss_weight / c.mtp_num_heads * ahead
    return loss


@torch.no_grad()
def generate(
    model: GPT,
    rows: int,
    length: int,
    temperature: float = 0.8,
    seed: int = 0,
    prompt: Sequence[int] = (BOS_ID,),
    adapters: Adapters | None = None,
) -> Tensor:
    """Texts (rows, length) by the model, each from the same prompt on, sampled at `temperature`."""
    device = model.tok_emb.weight.device
    generator, cache = torch.Generator().manual_seed(seed), Cache()
    weights = Weights(*(part.to(model.dtype) for part in model.weights()))
    new = ids = torch.tensor([[*prompt]] * rows, device=device)
    for _ in range(length - len(prompt)):
        stream = model.stream(new, weights, adapters, cache=cache)[:, -1:]
        logits = model.head(stream, adapters=adapters)[:, -1]  # (rows, V)
        noise = torch.empty(logits.shape).exponential_(generator=generator).to(device)
        new = (logits / temperature - noise.log()).argmax(-1, keepdim=True)  # the Gumbel trick
        ids = torch.cat((ids, new), dim=1)
    return ids


# ------------------------------------------------------------------------------------------------------------
# Parameter groups, optimizers, schedules
# ------------------------------------------------------------------------------------------------------------

# One table answers for every parameter. Banks go to Muon, whose work the ranks share by bank rows (#399):
# gradients are reduce-scattered, updates all-gathered, the largest bank first, so that communication hides
# behind computation. Everything else goes to AdamW. Schedules follow the run's pace, since the clock ends it
# and not a number of steps.


class ParamGroup(NamedTuple):
    """What happens to the parameters whose whole name matches a pattern."""

    name: str  # of the group; TTT_MODES names groups by it
    optimizer: str
    lr: str  # the setting, or a property of Config
    decay: str  # the setting, or a property of Config
    stored: str  # in the artifact: as int8 codes, as float16, or "": not at all
    is_matrix: bool  # the last two axes; otherwise it is a stack of vectors, or a number
    pattern: str


# Gates, gains, and scales have no decay by default: it would pull them to zero, whatever they learn.
PARAM_GROUPS = (
    ParamGroup("bank", "muon", "matrix_lr", "muon_wd", "codes", True, r"(qo|kv|mlp_up|mlp_down)_bank"),
    ParamGroup("mtp", "muon", "matrix_lr", "muon_wd", "", True, r"mtp_heads\.\d+\.weight"),
    ParamGroup("embed", "adamw", "token_lr", "token_wd", "codes", True,
               r"(tok_emb|(bigram|ve_shared)\.embed)\.weight"),
    ParamGroup("memory", "adamw", "token_lr", "adam_wd", "float16", True, r"memory_tokens"),
    ParamGroup("head", "adamw", "head_lr", "adam_wd", "codes", True, r"lm_head\.weight"),
    ParamGroup("proj", "adamw", "scalar_lr", "adam_wd", "codes", True, r"(bigram|ve_shared)\.proj\.weight"),
    ParamGroup("gate", "adamw", "scalar_lr", "scalar_wd", "codes", True, r"blocks\.\d+\.attn\.attn_gate_w"),
    ParamGroup("smear", "adamw", "scalar_lr", "scalar_wd", "float16", True, r"smear_gate\.weight"),
    ParamGroup("scalar", "adamw", "scalar_lr", "scalar_wd", "float16", False,
               r"(bigram|ve_shared)\.scale|ve_layer_scales\.\d+|word_start_boost|skip_(weights|gates)"
               r"|smear\.gate|smear_lambda|parallel_(post|resid)_lambdas"
               r"|blocks\.\d+\.(attn_scale|mlp_scale|resid_mix|attn\.(q_gain|xsa_alpha)|mlp\.(scale|bias))"),
)  # fmt: skip


@cache
def param_group(name: str) -> ParamGroup:
    """The group whose pattern the whole name of a parameter matches. UserError if there is none."""
    for group in PARAM_GROUPS:
        if re.fullmatch(group.pattern, name):
            return group
    raise UserError(f"parameter {name} is in no group: add it to PARAM_GROUPS, for example to scalar")


def is_coded(name: str) -> bool:
    """Whether a tensor is stored as int8 codes; others are float16."""
    return any(re.fullmatch(group.pattern, name) for group in PARAM_GROUPS if group.stored == "codes")


def is_matrix(name: str) -> bool:
    """Whether the last two axes of a parameter or adapter are a matrix."""
    return name.endswith((".a", ".b")) or param_group(name).is_matrix


def group_parameters(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters by group; UserError if one belongs to none."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {group.name: [] for group in PARAM_GROUPS}
    for name, parameter in model.named_parameters():
        groups[param_group(name).name].append((name, parameter))
    return groups


def count_parameters(model: GPT) -> int:
    """Number of parameters in the artifact: without the multi-token prediction heads."""
    return sum(p.numel() for name, p in model.named_parameters() if param_group(name).stored)


QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (  # arXiv 2505.16932, as in #1855
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def zeropower_via_newtonschulz5(
    G: Tensor,
    coefficients: Sequence[tuple[float, float, float]] = QUINTIC,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Push the singular values of each matrix of G (..., rows, cols) toward 1, keeping its singular vectors.

    A Newton-Schulz step per coefficients (of x, x^3, x^5) on G / |G|_F, batched over leading axes, computed
    and returned in `dtype`. QUINTIC is tuned for slope at zero; after five steps singular values lie between
    about 0.7 and 1.2 (https://kellerjordan.github.io/posts/muon), by POLAR_EXPRESS between 0.86 and 1.14. A
    zero matrix stays zero.
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


class BankShard:
    """This rank's rows of a bank (rows, out, in): equally many on each rank, padded with zeros.

    On one process it is the whole bank, and nothing is copied. A single matrix is whole on every rank, and
    its gradient is reduced with the small ones.
    """

    def __init__(self, bank: Tensor):
        self.bank, self.ranks = bank, world_size() if bank.dim() == 3 else 1
        self.rows = math.ceil(len(bank) / self.ranks)
        self.reduced: Tensor | None = None

    def padded(self, tensor: Tensor) -> Tensor:
        """Pad a tensor (rows, out, in) with zeros to a multiple of the ranks."""
        missing = self.ranks * self.rows - len(tensor)
        return F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor.contiguous()

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor of the bank's shape."""
        return tensor if self.ranks == 1 else self.padded(tensor)[rank() * self.rows :][: self.rows]

    def start_reduce(self) -> Callable[[], None]:
        """Start averaging the gradient over the ranks; the returned function waits for it."""
        sent = self.padded(self.bank.grad)
        self.reduced = torch.empty_like(sent[: self.rows])
        # the second name is for torch < 2.13
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work = reduce_scatter(self.reduced, sent, async_op=True)
        self.bank.grad = None

        def finish() -> None:
            work.wait()
            self.reduced.div_(self.ranks)

        return finish

    def start_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Start collecting every rank's part; the returned function waits for the whole, (rows, out, in)."""
        if self.ranks == 1:
            return lambda: part
        sent, whole = part.contiguous(), part.new_empty(self.ranks * self.rows, *part.shape[1:])
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch < 2.13
        work = all_gather(whole, sent, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return whole[: len(self.bank)]

        return finish

    @property
    def gradient(self) -> Tensor:
        """This rank's rows of the reduced gradient."""
        return self.bank.grad if self.ranks == 1 else self.reduced


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then orthogonalization of each matrix of each bank; decoupled weight decay.

    Parameters are (rows, out, in) banks, or single matrices. The update is scaled by sqrt(max(1, out / in)),
    and by row_rates[bank] (rows, 1, 1) if there are some. CAUTIOUS_MUON drops the entries of an update whose
    sign is not the gradient's, and rescales the others to the same mean (arXiv 2411.16085);
    MUON_CAUTIOUS_WD spares weights that the update moves away from 0 (modded-nanogpt).
    """

    def __init__(
        self, groups: list[dict], config: Config, dtype: torch.dtype, row_rates: Mapping[Tensor, Tensor]
    ):
        super().__init__(groups, dict(lr=0.02, weight_decay=0.0, momentum=0.95))
        self.config, self.dtype, self.row_rates = config, dtype, row_rates
        table = POLAR_EXPRESS if config.muon_coeffs == "polar" else QUINTIC[:1] * config.muon_backend_steps
        self.coefficients = table[: config.muon_backend_steps]
        shards = [BankShard(p) for group in self.param_groups for p in group["params"]]
        self.shards = sorted(shards, key=lambda shard: -shard.bank.numel())

    @torch.no_grad()
    def step(self, overlap_fn: Callable[[], Any] = lambda: None) -> None:
        """Update banks, largest first; each gather overlaps the next update, overlap_fn the first."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        apply_last: Callable[[], Any] = overlap_fn
        for shard in (shard for shard in self.shards if shard.gradient is not None):
            arrived = shard.start_gather(self._update(shard, groups[shard.bank]["momentum"]))
            apply_last()
            apply_last = partial(self._apply, shard.bank, groups[shard.bank], arrived)
        apply_last()

    def _update(self, shard: BankShard, momentum: float) -> Tensor:
        """Direction of this rank's rows, (rows, out, in)."""
        state, gradient = self.state[shard.bank], shard.gradient
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
        update = gradient.add(buffer, alpha=momentum)
        if self.config.muon_row_norm:
            update /= update.norm(dim=-1, keepdim=True).clamp(min=1e-7)
        update = zeropower_via_newtonschulz5(update, self.coefficients, dtype=self.dtype)
        if self.config.normuon_beta2:
            update = self._equalize(update.to(buffer.dtype), state).to(self.dtype)
        if self.config.cautious_muon:
            along = update * gradient > 0
            update *= along / along.float().mean((-2, -1), keepdim=True).clamp(min=1e-3)
        return update

    def _equalize(self, update: Tensor, state: dict[str, Tensor]) -> Tensor:
        """NorMuon (arXiv 2510.05491): equal running sizes of a tall matrix' rows or a wide one's columns."""
        along = -1 if update.size(-2) >= update.size(-1) else -2
        square = update.square().mean(along, keepdim=True)
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(square)
        moment = state["second_moment"].lerp_(square, 1 - self.config.normuon_beta2)
        equal = update * moment.clamp(min=1e-10).rsqrt()
        sizes = (part.norm(dim=(-2, -1), keepdim=True) for part in (update, equal))
        return equal * (next(sizes) / next(sizes).clamp(min=1e-10))

    def _apply(self, p: Tensor, group: dict, arrived: Callable[[], Tensor]) -> None:
        rates, decay = self.row_rates.get(p, 1.0), group["lr"] * group["weight_decay"]
        if self.config.muon_cautious_wd:
            decay = decay * (arrived() * p >= 0)
        p.mul_(1 - decay * rates)
        p.add_(rates * arrived(), alpha=-group["lr"] * max(1.0, p.size(-2) / p.size(-1)) ** 0.5)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the state of whole banks; a collective."""
        shards = {shard.bank: shard for shard in self.shards}
        order = [p for group in self.param_groups for p in group["params"]]
        whole = {
            number: {name: shards[p].start_gather(part)() for name, part in self.state[p].items()}
            for number, p in enumerate(order)
            if self.state.get(p)
        }
        return super().state_dict() | dict(state=whole)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load the state of any number of ranks: each takes its rows."""
        super().load_state_dict(saved)
        for shard in self.shards:
            for name, part in self.state.get(shard.bank, {}).items():
                self.state[shard.bank][name] = shard.own(part).clone()


def make_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the banks, one AdamW for the rest, by PARAM_GROUPS; each group keeps its peak LR as `peak_lr`.

    If learning rates depend on depth, a bank row has that of its first use.
    """
    groups, rows = group_parameters(model), config.block_rows
    by_layer = [1.0] * (len(rows) // 2) + [config.decoder_lr_mult] * (len(rows) - len(rows) // 2)
    if config.loop_shared:
        by_layer = [by_layer[rows.index(row)] for row in config.block_layers]
    tables: dict[str, list[dict]] = {"muon": [], "adamw": []}
    for group in PARAM_GROUPS:
        members: dict[float, list[Tensor]] = {}
        for name, p in groups[group.name]:
            block = re.match(r"blocks\.(\d+)\.", name)
            members.setdefault(by_layer[int(block[1])] if block else 1.0, []).append(p)
        for factor, params in members.items():
            lr = factor * getattr(config, group.lr)
            decay = getattr(config, group.decay)
            tables[group.optimizer].append(dict(params=params, lr=lr, peak_lr=lr, weight_decay=decay))
    row_rates = {}
    if set(by_layer) != {1.0}:
        by_row = torch.tensor([by_layer[layer] for layer in model.first_uses], device=model.qo_bank.device)
        for bank in model.banks().values():
            row_rates[bank] = by_row.repeat(len(bank) // len(by_row)).view(-1, 1, 1)
    muon = Muon(tables["muon"], config, model.dtype, row_rates)
    betas = (config.beta1, config.beta2)
    return [muon, torch.optim.AdamW(tables["adamw"], betas=betas, eps=config.adam_eps, fused=True)]


def run_length(config: Config, step: int, elapsed: float, budget: float) -> tuple[float, float]:
    """Remaining steps before step `step`, and total steps.

    The end is ITERATIONS, or `budget` seconds (0: no clock) at the pace of `elapsed` seconds for `step`
    steps, whichever comes first.
    """
    remaining, total = float(config.iterations - step), float(config.iterations)
    if budget and step:
        pace = elapsed / step
        remaining, total = min(remaining, (budget - elapsed) / pace), min(total, budget / pace)
    return max(0.0, remaining), total


def lr_scale(config: Config, step: int, elapsed: float, budget: float) -> float:
    """LR before step `step` as a fraction of its peak: 1, then falling to MIN_LR, as MIN_LR_SHAPE says.

    Arguments as for run_length.
    The warmdown takes WARMDOWN_FRAC of the run, or WARMDOWN_ITERS steps, and is linear or half a cosine.
    """
    remaining, total = run_length(config, step, elapsed, budget)
    window = config.warmdown_frac * total or config.warmdown_iters
    scale = min(1.0, remaining / window) if window else 1.0
    if config.warmdown_shape == "cosine":
        scale = (1 - math.cos(math.pi * scale)) / 2
    if config.min_lr_shape == "floor":
        return max(scale, config.min_lr)
    return config.min_lr + (1 - config.min_lr) * scale


def loss_weights(config: Config, done: float) -> list[float]:
    """model.loss_weights at a fraction `done` of the run: PREFIX_LOSS_WEIGHT, then MTP_WEIGHTS.

    n weights divide the run into n + 1 equal parts: the last one falls to 0 in the first part, and so on.
    """
    ahead = config.ahead_weights
    left = [len(ahead) - k - (len(ahead) + 1) * done for k in range(len(ahead))]
    falling = [weight * min(1.0, max(0.0, part)) for weight, part in zip(ahead, left, strict=True)]
    return [config.prefix_loss_weight * min(1.0, max(0.0, 2 - 3 * done)), *falling]


def short_run_warning(config: Config, step: int, elapsed: float, budget: float) -> str:
    """Warning that WARMDOWN_ITERS is longer than the run, so that no step has the peak LR, or "".

    Arguments as for lr_scale.
    """
    _, total = run_length(config, step, elapsed, budget)
    if config.warmdown_frac or total >= config.warmdown_iters:
        return ""
    start = lr_scale(replace(config, iterations=max(1, round(total))), 0, 0.0, 0.0)
    told = f"WARMDOWN_ITERS={config.warmdown_iters} is longer than this run of about {total:.0f} steps"
    return f"{told}: the LR starts at {start:.0%} of its peak. Set WARMDOWN_FRAC, a share of it, to 0.5."


class PieceSchedule:
    """Sets the longest piece of a document by TRAIN_SEQ_SCHEDULE; after a change the LR warms up (#2014)."""

    def __init__(self, model: nn.Module, config: Config):
        self.model, self.config = model, config
        self.length, self.since = 0, 0

    def begin_step(self, step: int, done: float) -> float:
        """Before step `step`, at a fraction `done` of the run; returns a factor of its LR."""
        length = next(length for fraction, length in self.config.piece_lengths if done <= fraction)
        if length != self.length:
            self.length, self.since = length, step
            self.model.piece.fill_(length)
        warmup = self.config.seq_change_warmup_steps if self.since else 0
        return min(1.0, (step - self.since + 1) / warmup) if warmup else 1.0

    def state_dict(self) -> dict[str, int]:
        return dict(length=self.length, since=self.since)

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.length, self.since = saved["length"], saved["since"]
        self.model.piece.fill_(self.length or self.config.train_seq_len)


def momentum_at(config: Config, step: int) -> float:
    """Muon's momentum at step `step`: linear from start to end over MUON_MOMENTUM_WARMUP_STEPS."""
    steps = config.muon_momentum_warmup_steps
    reached = min(1.0, step / steps) if steps else 1.0
    return config.muon_momentum_warmup_start * (1 - reached) + config.muon_momentum * reached


# ------------------------------------------------------------------------------------------------------------
# Weight averaging
# ------------------------------------------------------------------------------------------------------------

# The exported weights are an average: an EMA, the mean of late snapshots (tight SWA), or snapshots of the
# EMA. Another average, of the weights' movement, can drive them. All are float32, and each update is one pass
# over the weights.


def start_repeats(model: GPT, averages: Sequence[Tensor]) -> None:
    """Begin averages (one a parameter) of repeats as their row's first use has it, as GPT.start_loop does."""
    named = dict(zip((name for name, _ in model.named_parameters()), averages, strict=False))
    for name, average in named.items():
        if block := re.fullmatch(r"blocks\.(\d+)(\..+)", name):
            first = model.first_uses[model.config.block_layers[int(block[1])]]
            average.copy_(named[f"blocks.{first}{block[2]}"])


class WeightAverage:
    """EMA of the weights, and the mean of late snapshots; `apply` copies the result into the model."""

    def __init__(self, model: nn.Module, config: Config):
        self.config, self.live = config, [p.detach() for p in model.parameters()]
        self.ema = [p.clone() for p in self.live] if config.ema_enabled else None
        self.swa: list[Tensor] = []
        self.snapshots = 0

    @torch.no_grad()
    def update(self, step: int, scale: float) -> None:
        """After step `step` (from 1), taken at `scale` of the peak learning rate."""
        c = self.config
        if self.ema is not None and step % c.ema_update_every == 0:
            torch._foreach_lerp_(self.ema, self.live, 1 - c.ema_decay**c.ema_update_every)
        if c.swa_enabled and scale < c.swa_threshold and step % c.swa_every == 0:
            self.snapshots += 1
            source = self.live if self.ema is None else self.ema
            self.swa = self.swa or [torch.zeros_like(p) for p in source]
            torch._foreach_lerp_(self.swa, source, 1 / self.snapshots)

    def state_dict(self) -> dict[str, Any]:
        return dict(ema=self.ema, swa=self.swa, snapshots=self.snapshots)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if self.ema is not None:
            torch._foreach_copy_(self.ema, saved["ema"])
        self.swa = [part.to(p.device) for part, p in zip(saved["swa"], self.live, strict=False)]
        self.snapshots = saved["snapshots"]

    @torch.no_grad()
    def apply(self) -> str:
        """Copy the average into the model; returns what it was, for the log."""
        average = self.swa or self.ema
        if not average:
            return "none"
        if (share := self.config.ema_export_share) < 1:
            average = torch._foreach_lerp(self.live, average, share)
        torch._foreach_copy_(self.live, average)
        return f"swa of {self.snapshots} snapshots" if self.swa else f"ema {self.config.ema_decay}"


class EMANesterov:
    """Moves the weights along the average of their past movement before each step (modded-nanogpt, track 3).

    Persistent drift is multiplied by 1 / (1 - EMA_NESTEROV_BETA), noise is not. Active between two fractions
    of the run; the published 500 and N - 750 of 3,125 steps.
    """

    ACTIVE = (0.16, 0.76)

    def __init__(self, model: GPT, config: Config):
        self.config, self.live = config, [p.detach() for p in model.parameters()]
        self.movement = [torch.zeros_like(p) for p in self.live]
        self.before = [p.clone() for p in self.live]
        self.scale = 1.0  # of the LR in the last step

    @torch.no_grad()
    def start_loop(self, model: GPT) -> None:
        """Repeats begin as their row's first use, and have not moved since."""
        start_repeats(model, self.movement)
        torch._foreach_copy_(self.before, self.live)

    @torch.no_grad()
    def move(self, done: float) -> None:
        """Before a step, at a fraction `done` of the run."""
        if self.ACTIVE[0] <= done < self.ACTIVE[1]:
            torch._foreach_add_(self.live, self.movement, alpha=self.config.ema_nesterov_beta * self.scale)

    @torch.no_grad()
    def observe(self, scale: float) -> None:
        """After a step, taken at `scale` of the peak learning rate."""
        moved = torch._foreach_sub(self.live, self.before)
        torch._foreach_lerp_(self.movement, moved, 0.01)  # decay 0.99 per step, as in modded-nanogpt
        torch._foreach_copy_(self.before, self.live)
        self.scale = scale

    def state_dict(self) -> dict[str, Any]:
        return dict(movement=self.movement, before=self.before, scale=self.scale)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        torch._foreach_copy_(self.movement, saved["movement"])
        torch._foreach_copy_(self.before, saved["before"])
        self.scale = saved["scale"]


# ------------------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------------------

# One scorer for validation, the artifact, test-time training, and the audit. A plan says which windows are
# scored with the same weights before anything adapts on them; a ledger inside raises if a target would be
# scored twice, or adapted on before it is scored. So what is legal does not depend on the code that adapts.


class LedgerError(RuntimeError):
    """An evaluation would score a target twice, or adapt on one that it has not scored."""


class Windows(NamedTuple):
    """Window w reads tokens[start : start + end]; its targets with index [begin, end) count. (W,) int64 each.

    Target t of a text is tokens[t + 1], so window w scores the targets [start + begin, start + end).
    """

    start: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    def take(self, index: np.ndarray) -> Windows:
        return Windows(self.start[index], self.begin[index], self.end[index])

    def ranges(self, whole: bool = False) -> Iterator[tuple[int, int]]:
        """Half-open range of targets of each window that has any; whole: of all that it reads."""
        for start, begin, end in zip(*(part.tolist() for part in self), strict=True):
            if end > begin:
                yield (start if whole else start + begin), start + end


class Slots(NamedTuple):
    """Which document's weights the windows of a chunk use; they stand in document order, (W,) each.

    group: of documents, whose chunks one rank takes. slot: where a window's document has its weights. fresh:
    whether the document begins here. lengths: tokens that a batch with this window has at least; the first
    window needs most, unless TTT_CHUNK_BY_LENGTH makes chunks differ. width: positions of every batch.
    """

    group: int
    slot: np.ndarray
    fresh: np.ndarray
    lengths: np.ndarray
    width: int


class Chunk(NamedTuple):
    """A part of a plan: windows that are scored with the same weights, then windows that may be adapted on.

    slots: if each window's document has weights of its own; there are then as many windows to adapt on, some
    of them empty. base: the base weights adapt, not the fast weights.
    """

    scored: Windows
    adapted: Windows | None = None
    slots: Slots | None = None
    base: bool = False

    @property
    def is_mine(self) -> bool:
        """Whether this rank takes part in it."""
        return self.slots is None or self.slots.group % world_size() == rank()


class Score(NamedTuple):
    """Result of a scoring pass: nll (targets,) float32 in nats, its float64 mean, bits per byte, seconds."""

    nll: np.ndarray
    val_loss: float
    val_bpb: float
    seconds: float


class Ledger:
    """Record of scored targets. Raises LedgerError before one is scored again, or adapted on unscored."""

    def __init__(self, targets: int):
        self.scored = np.zeros(targets, bool)

    def score(self, windows: Windows) -> None:
        for begin, end in windows.ranges():
            if self.scored[begin:end].any():
                raise LedgerError(f"targets {begin} to {end - 1} would be scored twice")
            self.scored[begin:end] = True

    def adapt(self, windows: Windows) -> None:
        for begin, end in windows.ranges(whole=True):
            if not self.scored[begin:end].all():
                raise LedgerError(f"targets {begin} to {end - 1} would be adapted on before they are scored")


def sliding_windows(num_tokens: int, seq_len: int, stride: int) -> Windows:
    """Windows of seq_len that together score each of the num_tokens - 1 targets exactly once.

    The first scores all its targets, each later one the next `stride`, and the last one the rest, with a full
    window of context. stride = seq_len gives non-overlapping windows except for the last.
    """
    targets = num_tokens - 1
    check_length(num_tokens, seq_len)
    ends = np.append(np.arange(seq_len, targets, stride), targets)
    return Windows(ends - seq_len, seq_len - np.diff(ends, prepend=0), np.full(len(ends), seq_len))


def window_lengths(config: Config) -> list[int]:
    """The lengths that windows by documents are padded to, at most four: EVAL_SEQ_LEN and halves of it."""
    halves = [math.ceil(config.eval_seq_len / 2**k) for k in (3, 2, 1, 0)]
    return [length for length in halves if length >= config.doc_chunk]


def chunk_windows(
    low: np.ndarray,
    high: np.ndarray,
    first: np.ndarray | int,
    config: Config,
    size: np.ndarray | None = None,
) -> tuple[Windows, Windows, np.ndarray]:
    """Windows that score and that adapt on one chunk of each document, and the length of each.

    Documents have targets [low, high); their chunk of `size` targets (None: TTT_CHUNK_SIZE) starts at target
    low + first. lengths: one of window_lengths for each.
    It is scored with up to EVAL_SEQ_LEN tokens of its own document; EVAL_STRIDE = EVAL_SEQ_LEN puts windows
    side by side. Windows start, and have the length, that they would have if the document went on: where it
    ends is known only when that is scored. Nothing adapts on a document's last chunk; one that has ended has
    empty windows.
    """
    c, a = config, np.minimum(low + first, high)
    nominal = low + first + (config.doc_chunk if size is None else size)
    b, left = np.minimum(nominal, high), np.maximum(low, a - c.ttt_context)
    start = np.maximum(low, np.minimum(nominal - c.eval_seq_len, a))
    if c.eval_stride == c.eval_seq_len:
        start = np.maximum(start, low + (a - low) // c.eval_seq_len * c.eval_seq_len)
    lengths = np.array(window_lengths(c))
    # lengths never shrink as a document goes on
    lengths = lengths[np.searchsorted(lengths, np.minimum(nominal - low, c.eval_seq_len))]
    adapted = Windows(left, a - left, np.where(nominal < high, b - left, a - left))
    return Windows(start, a - start, b - start), adapted, lengths


def power_of_two(number: int) -> int:
    """Smallest power of two that is at least `number`: few shapes, so that little is compiled."""
    return 1 << max(int(number) - 1, 0).bit_length()


class Batch(NamedTuple):
    """Windows as tensors: ids (B, T), targets and positions (B, C); counts (B, C): which targets count."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    counts: np.ndarray


def make_batch(
    tokens: np.ndarray, windows: Windows, width: int, device: torch.device, length: int | None = None
) -> Batch:
    """Make a batch of windows, padded with BOS to `length` tokens or to one of a few lengths."""
    start, begin, end = windows
    most = int((end - begin).max(initial=1))
    if length is None:
        length = int(end[0]) if end.min() == end.max() > 0 else power_of_two(end.max(initial=1))
    width = min(width if most <= width else length, length)
    offsets = np.arange(length + 1)
    rows = tokens[np.minimum(start[:, None] + offsets, len(tokens) - 1)].astype(np.int64)  # (B, length + 1)
    rows[offsets > end[:, None]] = BOS_ID
    positions = np.minimum(begin[:, None] + np.arange(width), length - 1)  # (B, width)
    counts = np.arange(width) < (end - begin)[:, None]
    arrays = rows[:, :-1], np.take_along_axis(rows, positions + 1, axis=1), positions
    sent = (torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True) for x in arrays)
    return Batch(*sent, counts)


def batches_of(chunk: Chunk, size: int | None) -> Iterator[tuple[np.ndarray, int, int | None]]:
    """Split this rank's windows of a chunk into batches of `size` (None: one batch).

    Yields indices, width, and length if the plan sets it.
    """
    all_of_them, slots = np.arange(len(chunk.scored.start)), chunk.slots
    mine = np.array_split(all_of_them, world_size())[rank()] if slots is None else all_of_them
    usual = power_of_two(np.median(chunk.scored.end - chunk.scored.begin)) if len(mine) else 1
    for first in range(0, len(mine), size or max(len(mine), 1)):
        index = mine[first : first + (size or len(mine))]
        yield (index, usual, None) if slots is None else (index, slots.width, int(slots.lengths[index].max()))


@torch.no_grad()
def score(
    model: GPT,
    tokens: np.ndarray,
    plan: Sequence[Chunk],
    byte_table: ByteTable,
    batch_seqs: int | None,
    nll_fn: Callable = token_nll,
    adaptation: Any = None,
    observe: Callable[[Windows, Batch, Tensor], None] | None = None,
    progress: Callable[[int], None] = lambda number: None,
) -> Score:
    """Score tokens (uint16, on the host) chunk by chunk of a plan; every rank gets the whole result.

    The ranks share a chunk's windows, or take groups of documents, batch_seqs windows at a time (None: all).
    adaptation: scores a chunk, then adapts on it, and gets scored tokens only. observe: sees windows, batch
    and losses before that. progress: called with the number of each of this rank's chunks. LedgerError if
    a target would be scored twice, never, or after it was adapted on.
    """
    device, began, number = model.tok_emb.weight.device, time.perf_counter(), 0
    known = np.append(tokens[:1], np.full_like(tokens[1:], BOS_ID))  # to adapt on: what is scored, else BOS
    nll = torch.zeros(len(tokens) - 1, dtype=torch.float32, device=device)
    count = torch.zeros_like(nll, dtype=torch.int32)
    ledger, bar = Ledger(len(nll)), progress_bar("score", len(nll))
    for chunk in plan:
        ledger.score(chunk.scored)
        if chunk.is_mine:
            progress(number)
            if adaptation is not None:
                adaptation.begin(number, chunk)
            number += 1
        for index, width, length in batches_of(chunk, batch_seqs) if chunk.is_mine else ():
            windows, padded = chunk.scored.take(index), np.resize(index, batch_seqs or len(index))
            batch = make_batch(tokens, chunk.scored.take(padded), width, device, length)  # of a fixed shape
            if adaptation is not None:
                adaptation.select(chunk, index)
            weights = () if adaptation is None else adaptation.replacements()
            losses = nll_fn(model, batch.ids, batch.targets, batch.positions, *weights)
            row, column = np.nonzero(batch.counts[: len(index)])  # on the host: a GPU would wait for a mask
            targets = torch.from_numpy((windows.start + windows.begin)[row] + column).to(device)
            nll[targets] = losses.take(torch.from_numpy(row * losses.size(1) + column).to(device)).float()
            count.index_add_(0, targets, torch.ones_like(targets, dtype=torch.int32))
            if observe is not None:
                observe(windows, batch, losses)
            bar.update(len(row) * world_size())
        for begin, end in chunk.scored.ranges():
            known[begin + 1 : end + 1] = tokens[begin + 1 : end + 1]
        if adaptation is not None and chunk.adapted is not None:
            ledger.adapt(chunk.adapted)
            if chunk.is_mine:
                adaptation.adapt(known, chunk, nll)
    bar.close()
    if world_size() > 1:
        dist.all_reduce(nll)
        dist.all_reduce(count)
    if not bool((count == 1).all()):
        raise LedgerError(f"{int((count != 1).sum())} targets were scored twice or never")
    losses = nll.cpu().numpy()
    total = float(losses.sum(dtype=np.float64))
    num_bytes = int(byte_table.of_text(tokens).sum())
    return Score(losses, total / len(losses), total / math.log(2) / num_bytes, time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------------------
# Test-time training
# ------------------------------------------------------------------------------------------------------------

# `adaptation_step` is the update that the evaluator deploys and meta-learning trains. It moves one set of
# weights, or one per document, all in one batch. The default preconditioner divides by the root of the second
# moment of the gradient; which text the moments cover decides whether a loss can depend on later text.

TTT_MOMENT_FLOOR = 1e-3  # of a tensor's mean square: the row of a rare token must not take a huge step


def make_adapters(model: GPT, config: Config) -> dict[str, Tensor]:
    """Low-rank pairs, see adapter_shapes: NAME.a (n, r, in), uniform within 1 / sqrt(in), NAME.b, zero."""
    generator, pairs = torch.Generator().manual_seed(config.seed), {}
    for name, (n, out, width) in adapter_shapes(config).items():
        a = torch.rand(n, config.ttt_lora_rank, width, generator=generator) * 2 - 1
        pairs[f"{name}.a"] = (a / math.sqrt(width)).to(model.qo_bank.device)
        pairs[f"{name}.b"] = torch.zeros(n, out, config.ttt_lora_rank, device=model.qo_bank.device)
    return pairs


class SecondMoments:
    """Sums and counts of squared gradients, whose means precondition the update.

    A row holds `size` sums and, last, the number of gradients. `total` (size + 1,) is over everything adapted
    on in earlier steps, including the prior; each set of weights has a row in `own`. form: "own", where that
    is of the prior and the set's document; "prefix", also of documents earlier in the file, so that no step
    depends on what stands later; "shared", of `total` and the set's present chunk. A prefix is a running sum
    over sets in document order: nothing is masked, since 0 times a later document's NaN would be NaN. Shared
    sums decay just enough to hold their count at `memory`.
    """

    def __init__(self, form: str, size: int, sets: int, memory: float, device: torch.device):
        self.form, self.memory, self.across_ranks = form, memory, False
        self.start, self.total, self.step = torch.zeros(3, size + 1, device=device)
        self.own = torch.zeros(sets, size + 1, device=device)
        self.totals: dict[int, Tensor] = {}

    def begin(self, group: int | None) -> None:
        """Continue a group of documents where it stopped; a new one, or None, begins from the prior."""
        fresh = self.start.clone()
        self.total = fresh if group is None else self.totals.setdefault(group, fresh)

    def enter(self, sets: Any) -> None:
        """The sets begin documents: what has been adapted on by now stands earlier in the file."""
        self.own[sets] = self.start if self.form == "own" else self.total

    def kept(self, count: Tensor | int) -> Tensor:
        """What is left of `total` when the squares of `count` gradients are added."""
        factor = ((self.memory - count) / self.total[-1].clamp(min=1e-9)).clamp(max=1.0)
        return factor * self.total if self.form == "shared" else self.total

    def observe(self, squares: Tensor, sets: Any) -> None:
        """Add squared gradients (n, size + 1) of the sets, in document order, as a step's batches are."""
        earlier, everyone = self.step, squares.sum(0)
        # documents of lower ranks stand earlier
        if self.across_ranks and self.form != "own" and world_size() > 1:
            each = torch.zeros(world_size(), len(everyone), device=everyone.device)
            each[rank()] = everyone
            [each] = sum_over_ranks([each])
            earlier, everyone = each[: rank()].sum(0), each.sum(0)
        if self.form == "own":
            self.own[sets] += squares
        elif self.form == "prefix":
            self.own[sets] += earlier + squares.cumsum(0)
        elif self.form == "shared":
            self.own[sets] = self.kept(1) + squares
        self.step = self.step + everyone

    def end_step(self) -> None:
        """All sets have taken the step: now it counts for documents that enter."""
        self.total.copy_(self.kept(self.step[-1]) + self.step)
        self.step = torch.zeros_like(self.step)

    def means(self, sets: Any) -> Tensor:
        """Mean squares (n, size) of the sets."""
        rows = self.own[sets]
        return rows[:, :-1] / rows[:, -1:]


def inverse_root(square: Tensor, column: Tensor | None = None) -> Tensor:
    """1 / sqrt of mean squared gradients (n, ...), or of the product of their row and column means.

    The outer product of the two is exact if the mean square has rank one. TTT_MOMENT_FLOOR of the set's mean
    is added. 0 where a set has none: adapters' A has no gradient while B is zero.
    """
    floor = TTT_MOMENT_FLOOR * square.reshape(len(square), math.prod(square.shape[1:])).mean(1)
    floor = torch.where(floor > 0, floor, math.inf).view(-1, *[1] * (square.dim() - 1))
    if column is None:
        return (square + floor).rsqrt()
    square = (square / square.mean(-1, keepdim=True).clamp(min=1e-30)).unsqueeze(-1)
    # in place: this product has the size of the banks of all sets
    return (square * column.unsqueeze(-2)).add_(floor.unsqueeze(-1)).rsqrt_()


class FastWeights:
    """The tensors that adapt, float32, with a leading axis: one set of weights, or one per document.

    adapts: groups or names of parameters, or "adapters". `base` is what they start from, the live parameters;
    `rates` scales the learning rate: the MLP's factors, zero for frozen blocks, and factors by bank row,
    (rows, 1, 1). `rows`: indices of the sets in use, or all. `moments` holds mean squared gradients: every
    entry of a vector, row and column means of a matrix (arXiv 1804.04235).
    """

    def __init__(self, model: GPT, config: Config, adapts: str, sets: int | None = None):
        self.config, self.device, self.shared = config, model.qo_bank.device, sets is None
        if adapts == "adapters":
            self.base = make_adapters(model, config)
        else:
            words, groups = {*adapts.split()}, group_parameters(model)
            chosen = [pair for group, pairs in groups.items() for pair in pairs if {group, pair[0]} & words]
            self.base = {name: p.detach().float() for name, p in chosen}
        self.sets, self.rows = sets or 1, slice(None)
        self.values = {name: torch.stack([base] * self.sets) for name, base in self.base.items()}
        self.own_rates = {name: self._rate(name, base) for name, base in self.base.items()}
        self.set_factors({})
        self.state: dict[str, list[Tensor]] = {}
        form = "shared" if self.shared else config.ttt_moments
        memory = 1 / (1 - config.ttt_beta2) if self.shared else math.inf
        self.sizes = [math.prod(shape) for shapes in self._moment_shapes().values() for shape in shapes]
        self.moments = SecondMoments(form, sum(self.sizes), self.sets, memory, self.device)

    def _moment_shapes(self) -> dict[str, list[torch.Size]]:
        def of(name: str, n: torch.Size) -> list[torch.Size]:
            return [n[:-1], n[:-2] + n[-1:]] if is_matrix(name) else [n]

        return {name: of(name, base.shape) for name, base in self.base.items()}

    def named(self, means: Tensor) -> dict[str, list[Tensor]]:
        """Parts of `moments.means` by parameter, each with its leading axis."""
        parts = iter(means.split(self.sizes, dim=1))
        return {name: [next(parts).reshape(len(means), *shape) for shape in shapes]
                for name, shapes in self._moment_shapes().items()}  # fmt: skip

    @property
    def wants_prior(self) -> bool:
        """Whether moments begin with a prior. Adapters have none: while B is zero, A has no gradient."""
        wanted = self.config.ttt_optimizer == "precond" and self.config.ttt_prior_seqs > 0
        return wanted and not any(name.endswith(".a") for name in self.base)

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Scale the rates by new factors per bank, from any device."""
        near = {bank: factor.to(self.device) for bank, factor in factors.items()}
        self.rates = {name: rate * near.get(name.split(".")[0], 1.0) for name, rate in self.own_rates.items()}

    def _rate(self, name: str, base: Tensor) -> float | Tensor:
        c, (bank, *_) = self.config, name.split(".")
        rate = {"mlp_up_bank": c.ttt_in_lr_mult, "mlp_down_bank": c.ttt_out_lr_mult}.get(bank, 1.0)
        adapts = [row >= c.ttt_freeze_blocks for row in range(c.num_layers)]
        if c.ttt_layers:
            adapts = [adapts[row] and row in int_list(c.ttt_layers) for row in range(c.num_layers)]
        if bank in GPT.BANKS:
            mask = torch.tensor(adapts * (len(base) // c.num_layers), device=base.device)
            return rate * mask.float().view(-1, 1, 1)
        if name.endswith((".a", ".b")):  # of applications, or of the head, which always adapts
            kept = [adapts[row] for row in c.block_rows] if bank != "head" else [True]
            return torch.tensor(kept, device=base.device).float().view(-1, 1, 1)
        block = re.match(r"blocks\.(\d+)\.", name)
        return rate if not block or adapts[c.block_layers[int(block[1])]] else 0.0

    @torch.no_grad()
    def reset(self, sets: Any = slice(None), warm: bool = False) -> None:
        """Sets begin documents: back to the base, with a new optimizer state. warm: keep the adapters' A.

        Shared moments stay; a set's own become those of the documents before.
        """
        for name, value in self.values.items():
            if not (warm and name.endswith(".a")):
                value[sets] = self.base[name]
        for parts in self.state.values():
            for part in parts:
                part[sets] = 0.0
        self.moments.enter(sets)

    def begin(self, group: int | None = None) -> None:
        """Begin or continue a group of documents: all sets start over, with the group's moments."""
        self.moments.begin(group)
        self.reset()

    def used(self) -> dict[str, Tensor]:
        """The sets in use: copies of chosen ones, or views of all."""
        return {name: value[self.rows] for name, value in self.values.items()}

    def weights(
        self, values: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Replaced parameters and adapters for token_nll, with the sets' axis moved to the batch axis."""
        scale, replaced, adapters = self.config.ttt_lora_alpha / self.config.ttt_lora_rank, {}, {}
        for name, value in values.items():
            if self.shared:
                value = value[0]
            elif value.dim() == 1:
                value = value.view(-1, 1, 1)
            elif not is_matrix(name):
                value = value.movedim(0, -2).unsqueeze(-2)  # (..., sets, 1, d)
            elif name == "memory_tokens":
                value = value.squeeze(1)
            adapted, _, side = name.rpartition(".")
            if side in ("a", "b"):
                adapters[adapted] = (value,) if side == "a" else (*adapters[adapted], scale * value)
            else:
                replaced[name] = value
        return replaced, adapters

    def state_dict(self) -> dict[str, Any]:
        """What outlives a reset of all sets."""
        return dict(start=self.moments.start, total=self.moments.total)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.moments.start, self.moments.total = (saved[name].to(self.device) for name in ("start", "total"))

    def observe(self, gradients: Mapping[str, Tensor], sets: Any, count: int) -> None:
        """Add the squared gradients of the first `count` sets in use, `sets`, to the moments."""
        parts, n = [], len(next(iter(gradients.values())))
        for name, g in gradients.items():
            squares = g.square()
            parts += [squares.mean(-1), squares.mean(-2)] if is_matrix(name) else [squares]
        rows = [part.reshape(n, size) for part, size in zip(parts, self.sizes, strict=True)]
        squares = torch.cat([*rows, torch.ones(n, 1, device=self.device)], 1).float()
        self.moments.observe(squares[:count], sets)

    def directions(
        self, gradients: Mapping[str, Tensor], sets: Any, count: int
    ) -> Iterator[tuple[str, Tensor]]:
        """TTT_OPTIMIZER's update direction for the first `count` sets in use, (count, ...) by name.

        gradients: of all sets in use, whatever `count` is; they may be overwritten.
        """
        c = self.config
        means = self.named(self.moments.means(self.rows)) if c.ttt_optimizer == "precond" else {}
        for name, g in gradients.items():
            if c.ttt_optimizer == "precond":
                yield name, g.mul_(inverse_root(*means[name]))[:count]
            elif c.ttt_optimizer == "sgd" and not c.ttt_momentum:
                yield name, g[:count]
            else:
                yield name, self._momentum_direction(name, g[:count], sets)

    def _momentum_direction(self, name: str, g: Tensor, sets: Any) -> Tensor:
        """SGD with momentum, or AdamW; state by set: momentum, and for AdamW squares and steps."""
        c, value = self.config, self.values[name]
        if name not in self.state:
            kept = 1 if c.ttt_optimizer == "sgd" else 2
            self.state[name] = [*(torch.zeros_like(value) for _ in range(kept)), g.new_zeros(len(value))]
        state = self.state[name]
        if c.ttt_optimizer == "sgd":
            state[0][sets] = momentum = state[0][sets].mul_(c.ttt_momentum).add_(g)
            return momentum
        momentum, square, steps = state[0][sets], state[1][sets], state[2][sets] + 1
        momentum, square = momentum.lerp(g, 1 - c.ttt_momentum), square.lerp(g.square(), 1 - c.ttt_beta2)
        state[0][sets], state[1][sets], state[2][sets] = momentum, square, steps
        steps = steps.view(-1, *[1] * (g.dim() - 1))
        mean, root = momentum / (1 - c.ttt_momentum**steps), (square / (1 - c.ttt_beta2**steps)).sqrt()
        return mean / (root + 1e-10) + c.ttt_weight_decay * value[sets]


class TTTBatch(NamedTuple):
    """Text to adapt on or to take an outer gradient of: loss = sum(loss_weight * nll)."""

    input_ids: Tensor  # (B, T)
    targets: Tensor  # (B, C)
    positions: Tensor  # (B, C)
    loss_weight: Tensor  # (B, C)


def make_ttt_batch(
    tokens: np.ndarray, windows: Windows, weight: np.ndarray, width: int, context: int, device: torch.device
) -> TTTBatch:
    """Make a TTTBatch of windows of up to `context` + `width` tokens; weight (windows,): of each nll."""
    *batch, counts = make_batch(tokens, windows, width, device, context + width)
    return TTTBatch(*batch, torch.from_numpy((weight[:, None] * counts).astype(np.float32)).to(device))


def weighted_nll(
    model: GPT, fast: FastWeights, batch: TTTBatch, nll_fn: Callable
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted nll of this rank's batch under `fast`, and the leaves by which it can be differentiated."""
    values = {name: value.detach().requires_grad_() for name, value in fast.used().items()}
    *inputs, loss_weight = batch
    with torch.enable_grad():
        return (nll_fn(model, *inputs, *fast.weights(values)) * loss_weight).sum(), values


def adaptation_step(
    model: GPT,
    fast: FastWeights,
    batch: TTTBatch,
    lr: float,
    count: int | None = None,
    nll_fn: Callable = token_nll,
) -> Tensor:
    """Take one step of `fast` down its weighted nll; returns that loss as it was before.

    count: how many sets in use adapt, the first ones, in document order; the rest fill the batch. None: all.
    Gradients are summed over the ranks if they share the weights, then clipped at TTT_GRAD_CLIP per set.
    """
    c, (loss, values) = fast.config, weighted_nll(model, fast, batch, nll_fn)
    found = torch.autograd.grad(loss, list(values.values()))
    with torch.no_grad():
        if fast.shared:
            found = sum_over_ranks(list(found))
        count = len(found[0]) if count is None else count
        sets = slice(count) if isinstance(fast.rows, slice) else fast.rows[:count]
        # Every sum is over gradients of all sets in use: how many of them adapt depends on later documents,
        # and a reduction of fewer rows may add in another order, which moves earlier losses by a rounding.
        if c.ttt_grad_clip:
            flat = [g.reshape(len(g), math.prod(g.shape[1:])) for g in found]
            norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in flat])
            factor = (c.ttt_grad_clip / (norms.norm(dim=0) + 1e-6)).clamp(max=1.0)  # (sets,)
            found = [g * factor.view(-1, *[1] * (g.dim() - 1)) for g in found]
        gradients = dict(zip(values, found, strict=True))
        if c.ttt_optimizer == "precond":
            fast.observe(gradients, sets, count)
        for name, direction in fast.directions(gradients, sets, count):
            value = values[name].detach()[:count]  # a copy of the sets, or all of them in place
            value.add_(direction * fast.rates[name], alpha=-lr)
            if not isinstance(sets, slice):
                fast.values[name][sets] = value
        if fast.shared:
            fast.moments.end_step()
    return loss.detach()


@torch.no_grad()
def generated_moments(model: GPT, config: Config, rows: int, nll_fn: Callable = token_nll) -> Tensor:
    """Prior of the second moments, (size + 1,), from generated text; identical on all ranks.

    Computed in batches of `rows` sequences with a fixed seed; no other text is read. Each chunk counts as
    TTT_PRIOR_WEIGHT scored ones.
    """
    size, context = config.doc_chunk, config.ttt_context
    settings = replace(config, ttt_optimizer="precond", ttt_moments="shared")
    texts = generate(model, config.ttt_prior_seqs, config.ttt_prior_chunks * size + 1).split(rows)
    fast = FastWeights(model, settings, TTT_MODES[config.ttt_mode].adapts, len(texts[0]))
    for ids in texts:  # the last batch may have fewer rows
        text, low = ids.cpu().numpy(), np.arange(len(ids)) * ids.size(1)
        filled = np.resize(np.arange(len(ids)), fast.sets)
        for first in range(0, ids.size(1) - 1, size):
            left, end = low + max(0, first - context), min(first + size, ids.size(1) - 1)
            windows = Windows(left, low + first - left, low + end - left).take(filled)
            weight = np.where(np.arange(fast.sets) < len(ids), 1 / (end - first), 0.0)
            batch = make_ttt_batch(text.flatten(), windows, weight, size, context, ids.device)
            adaptation_step(model, fast, batch, 0.0, len(ids), nll_fn)
            fast.moments.end_step()
    if world_size() > 1:
        dist.broadcast(fast.moments.total, 0)
    return config.ttt_prior_weight * fast.moments.total


# ------------------------------------------------------------------------------------------------------------
# Calibration
# ------------------------------------------------------------------------------------------------------------

# Two statistics of text decide the rounding: Hessians of the inputs, by which GPTQ spreads an error over
# columns that are rounded later, and mean squared gradients, by which the scales spend bits where they
# matter. Both come through taps of the ordinary forward pass, as means over tokens of all ranks.


class Statistics(NamedTuple):
    """Calibration statistics of a text, as means over its tokens.

    hessians: site of PRODUCTS -> (L, in, in), E[x x^T] of what is read there. gradients: tensor -> (rows,
    columns); of a bank E[(dL/dy)^2] of its outputs (n, out) and E[(dL/dW)^2] by matrix (n,), of a table
    E[(dL/dW)^2] by row and by column.
    """

    hessians: Mapping[str, Tensor] = MappingProxyType({})
    gradients: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})


@torch.no_grad()
def collect_hessians(model: GPT, batches: Iterable[Tensor], most: int = 1 << 30) -> dict[str, Tensor]:
    """E[x x^T] of the inputs of every product over the tokens of batches (input ids) of all ranks.

    Returns site -> (L, in, in), float32; "head" -> (1, d, d) for GPTQ_EMBED. If BLOCK_ORDER uses a bank row
    twice, the mean of its uses. most: sequences that memory admits in a forward pass.
    """
    device, config = model.tok_emb.weight.device, model.config
    d, L = config.model_dim, config.num_layers
    widths = {"attn_in": d, "attn_out": d, "mlp_in": d, "mlp_mid": config.mlp_dim}
    hessians = {site: torch.zeros(L, width, width, device=device) for site, width in widths.items()}
    by_row = torch.tensor([config.block_rows.count(row) for row in range(L)], device=device)
    uses = dict.fromkeys(widths, by_row)
    if config.gptq_embed:
        hessians["head"], uses["head"] = torch.zeros(1, d, d, device=device), torch.ones(1, device=device)
    tokens = torch.zeros((), device=device)

    def tap(block: Block, product: str, x: Tensor, _: Tensor) -> None:
        flat = x.flatten(0, 1).float()  # (B * T, in)
        hessians[PRODUCTS[product][0]][block.layer].addmm_(flat.mT, flat)

    for input_ids in batches:
        for part in input_ids.split(most):
            read = rms_norm(model.stream(part, tap=tap)).flatten(0, 1).float()  # by the head
            if config.gptq_embed:
                hessians["head"][0].addmm_(read.mT, read)
        tokens += input_ids.numel()
    *sums, tokens = sum_over_ranks([*hessians.values(), tokens])
    means = zip(hessians, sums, strict=True)
    return {site: total / (tokens * uses[site])[:, None, None] for site, total in means}


def collect_gradients(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], most: int = 1 << 30
) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of Statistics over batches (input ids, targets) of all ranks, float32.

    E[(dL/dW)^2] comes from the gradients of whole batches: the square of the sum over tokens, divided by
    their number. most: sequences that memory admits in a backward pass; gradients of a batch add up over
    passes.
    """
    device, L, outputs = model.tok_emb.weight.device, model.config.num_layers, []
    weights = {name: p for name, p in model.named_parameters() if is_coded(name)}
    rows = {name: torch.zeros(p.shape[:-1], device=device) for name, p in weights.items()}
    columns = {name: torch.zeros(len(p) if name in GPT.BANKS else p.size(-1), device=device)
               for name, p in weights.items()}  # fmt: skip
    tokens = torch.zeros((), device=device)

    def tap(block: Block, product: str, _: Tensor, y: Tensor) -> None:
        y.retain_grad()
        outputs.append((block, product, y))

    for input_ids, targets in batches:
        for ids, wanted in zip(input_ids.split(most), targets.split(most), strict=True):
            nll(model(ids, tap=tap), wanted).sum().backward()
            while outputs:
                block, product, y = outputs.pop()
                # (out,), of outputs that carry the residual scale
                squares = y.grad.float().square().sum((0, 1))
                if product in ("o", "down"):
                    squares *= (block.attn_scale if product == "o" else block.mlp_scale).detach().square()
                parts = PRODUCTS[product][1]
                widths = [weights[bank].size(1) for bank, _ in parts]
                for (bank, half), part in zip(parts, squares.split(widths), strict=True):
                    rows[bank][half * L + block.layer] += part
        for name, p in weights.items():
            squares = p.grad.square()
            columns[name] += squares.mean((1, 2) if name in GPT.BANKS else 0)
            if name not in GPT.BANKS:
                rows[name] += squares.mean(1)
        model.zero_grad(set_to_none=True)
        tokens += input_ids.numel()
    *sums, tokens = sum_over_ranks([*rows.values(), *columns.values(), tokens])
    means = [total / tokens for total in sums]
    return dict(zip(weights, zip(means[: len(rows)], means[len(rows) :], strict=True), strict=True))


# ------------------------------------------------------------------------------------------------------------
# Quantization
# ------------------------------------------------------------------------------------------------------------

# A coded tensor is int8 codes times a scale per row, and per column with two-sided scales; everything else is
# float16. The file is named int6 after the lineage; two-sided codes reach +-127, and the entropy coder
# charges what they carry. Scales are stored as eighths of an octave, one byte each, and GPTQ rounds against
# the stored ones. All matrices of a bank are rounded in one batch.

INT8_MAX = 127  # the largest code there is

# Mean squares of a gradient's rows or columns below this fraction of their mean count as this much: rows of a
# table are few tokens.
BANK_FLOOR, TABLE_FLOOR = 1e-3, 0.1


class QuantizedTensor(NamedTuple):
    """One stored tensor: int8 codes with encoded scales, or float16 values as `codes` without scales.

    The scale of a code is 2^((row + column) / 8): row_scale (..., out, 1) int8, col_scale (..., 1, in) int8
    or None.
    """

    name: str
    codes: Tensor
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None
    trellis: bool = False


class HessianFactor(NamedTuple):
    """How GPTQ compensates the error of a column in the columns rounded later (arXiv 2210.17323).

    order (n, in): the columns as they are rounded. U (n, in, in), upper triangular: U^T U is the inverse of
    the damped Hessian, with rows and columns in that order. dead (n, in): inputs that are always zero and
    need no weight.
    """

    order: Tensor
    U: Tensor
    dead: Tensor

    def column_cost(self) -> Tensor:
        """u (n, in): compensated by later columns, an error e of column j costs (e / u_j)^2."""
        return torch.zeros_like(self.U[:, 0]).scatter_(1, self.order, self.U.diagonal(dim1=-2, dim2=-1))


def identity_factor(W: Tensor) -> HessianFactor:
    """For W (n, out, in) without a Hessian: every column is rounded on its own."""
    n, _, columns = W.shape
    order = torch.arange(columns, device=W.device).expand(n, -1)
    U = torch.eye(columns, device=W.device).expand(n, -1, -1)
    return HessianFactor(order, U, torch.zeros_like(order, dtype=torch.bool))


def factor_hessian(
    H: Tensor, damp: float, order: Tensor | None = None, warn: Callable[[str], None] = warnings.warn
) -> HessianFactor:
    """Factor Hessians (n, in, in), with columns in `order` (n, in) or by descending diagonal; in float64.

    `damp` times the mean of the diagonal is added to it; damp grows tenfold, with a warning, while one is not
    positive definite. FloatingPointError once a damp of ten or more has failed: H is no sum of squares.
    """
    dead = H.diagonal(dim1=-2, dim2=-1) == 0
    order = H.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True) if order is None else order
    batch = torch.arange(len(H), device=H.device).unsqueeze(-1)
    H = H.double()[batch.unsqueeze(-1), order.unsqueeze(-1), order.unsqueeze(-2)]
    H.diagonal(dim1=-2, dim2=-1)[dead.gather(1, order)] = 1.0
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(H.size(-1), dtype=H.dtype, device=H.device)
    while True:
        # J the reversal, J H J = L L^T: then H = R R^T with R = J L J upper triangular, and U = R^-1
        lower, failed = torch.linalg.cholesky_ex((H + damp * mean * eye).flip(-1, -2))
        if not failed.any():
            U = torch.linalg.solve_triangular(lower.flip(-1, -2), eye.expand_as(H), upper=True)
            return HessianFactor(order, U.float(), dead)
        if not damp < 10:  # not >=: NaN raises, too
            raise FloatingPointError(f"gptq: {int((failed > 0).sum())} Hessians are not positive definite")
        damp *= 10
        warn(f"gptq: {int((failed > 0).sum())} Hessians are not positive definite, damping {damp:g}")


@torch.no_grad()
def gptq(
    W: Tensor,
    factor: HessianFactor,
    row_scale: Tensor,
    col_scale: Tensor | None = None,
    qmax: int | Tensor = INT8_MAX,
    block: int = 64,
    trellis: bool = False,
) -> Tensor:
    """Round W to codes so that the Hessian-weighted error is small, all matrices of the batch at once.

    W (n, out, in); row_scale (n, out, 1) and col_scale (n, 1, in) or None, whose product is the scale; qmax:
    the largest code, or one per matrix (n, 1, 1). Column by column in the order of `factor`; the error of
    each is spread over those not yet rounded. Without trellis a weight of zero (a pruned one) stays zero.
    Returns int8 codes (n, out, in): W is about codes * scale, or trellis_values(codes) * scale.
    """
    order, U, dead = factor
    qmax = qmax.squeeze(-1) if isinstance(qmax, Tensor) else qmax
    # In units of the scales, the error of column j moves column k by its share V_jk: no scale is left in the
    # loop.
    V, W = U / U.diagonal(dim1=-2, dim2=-1).unsqueeze(-1), W.float() / row_scale
    if col_scale is not None:
        scales = col_scale.squeeze(1).gather(1, order)  # (n, in)
        W, V = W / col_scale, V * (scales.unsqueeze(-1) / scales.unsqueeze(-2))
    columns = order.unsqueeze(-1).expand(-1, -1, W.size(1))
    W = W.masked_fill(dead.unsqueeze(1), 0.0).mT.gather(1, columns)  # (n, in, out), in order
    pruned, codes, errors = W == 0, torch.empty_like(W, dtype=torch.int8), torch.empty_like(W)
    state = torch.zeros_like(W[:, 0], dtype=torch.long)  # of the trellis

    def visit(low: int, high: int) -> None:
        if high - low > block:  # halves, so that most of the work is in large matrix products
            middle = (low + high) // 2
            visit(low, middle)
            W[:, middle:high].baddbmm_(V[:, low:middle, middle:high].mT, errors[:, low:middle], alpha=-1)
            visit(middle, high)
            return
        part = slice(low, high)
        if trellis:
            codes[:, part], errors[:, part] = trellis_block(W[:, part], V[:, part, part], state)
        else:
            codes[:, part], errors[:, part] = round_block(W[:, part], V[:, part, part], qmax, pruned[:, part])

    visit(0, W.size(1))
    return torch.empty_like(codes).scatter_(1, columns, codes).mT


def round_block(W: Tensor, V: Tensor, qmax: int | Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """Round the columns of W (n, b, out), in units of the scale, to nearest; returns codes and errors."""
    W, codes = W.clone(), torch.empty_like(W)
    for j in range(W.size(1)):
        codes[:, j] = W[:, j].round().clamp_(-qmax, qmax).masked_fill_(pruned[:, j], 0.0)
        error = (W[:, j] - codes[:, j]).unsqueeze(1)
        W[:, j + 1 :].addcmul_(V[:, j, j + 1 :].unsqueeze(-1), error, value=-1)
    return codes, W - codes


# Trellis-coded quantization as in video coding (dependent quantization, the eight states of the ECM): codes k
# mean 2k in even states and 2k - sign(k) in odd ones, and a code's parity leads from state s to
# TRELLIS[s][parity]. The best path through both grids errs as a finer grid does, at the codes of a coarser
# one; at the error of a plain grid the unit of the two is TRELLIS_SCALE of the plain scale.
TRELLIS = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))
TRELLIS_SCALE = 0.606


def trellis_values(codes: Tensor) -> Tensor:
    """Values of trellis codes (..., out, in) in units of the scale, float32; columns are decoded in order."""
    table, columns = torch.tensor(TRELLIS, device=codes.device), codes.mT.contiguous()  # (..., in, out)
    values = torch.empty(columns.shape, device=codes.device)
    state = torch.zeros_like(codes[..., 0], dtype=torch.long)
    for j, code in enumerate(columns.long().unbind(-2)):
        values[..., j, :] = 2 * code - (state & 1) * code.sign()
        state = table[state, code & 1]
    return values.mT


def trellis_candidates(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest code of either parity from every state, and its value: x (S, n, out) -> (S, 2, n, out)."""
    even, odd = x[0::2], x[1::2]
    codes, values = (torch.empty(len(x), 2, *x.shape[1:], device=x.device) for _ in range(2))
    codes[0::2, 0], codes[0::2, 1] = 2 * (even / 4).round(), 2 * (even / 4 - 0.5).round() + 1
    # codes 0, 2, 4, ... have values 0, 3, 7, ...
    codes[1::2, 0] = 2 * ((odd.abs() + 1) / 4).round().masked_fill_(odd.abs() < 1.5, 0.0)
    codes[1::2, 1] = 2 * ((odd.abs() - 1) / 4).round() + 1  # codes 1, 3, ... have values 1, 5, ...
    codes[1::2] *= torch.where(odd < 0, -1.0, 1.0).unsqueeze(1)
    codes[:, 0].clamp_(1 - INT8_MAX, INT8_MAX - 1)  # an even number
    codes[:, 1].clamp_(-INT8_MAX, INT8_MAX)
    values[0::2], values[1::2] = 2 * codes[0::2], 2 * codes[1::2] - codes[1::2].sign()
    return codes, values


def trellis_block(W: Tensor, V: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and errors of some columns W (n, b, out) along the best path through the trellis (Viterbi).

    Every state keeps the rest of W as its own path leaves it. state (n, out): where the path begins; then its
    end.
    """
    S, b = len(TRELLIS), W.size(1)
    targets = torch.tensor(TRELLIS, device=W.device).flatten()
    before = torch.stack([(targets == s).nonzero().flatten() for s in range(S)])  # (S, 2): 2 * state + parity
    states = torch.arange(S, device=W.device).view(S, 1, 1)
    rest = W.expand(S, *W.shape).clone()  # (S, n, b, out)
    cost = torch.full((S, *state.shape), math.inf, device=W.device).scatter_(0, state.unsqueeze(0), 0.0)
    steps = []
    for j in range(b):
        codes, values = trellis_candidates(rest[:, :, j])  # (S, 2, n, out)
        errors = rest[:, :, j].unsqueeze(1) - values
        cost, choice = (cost.unsqueeze(1) + errors.square()).flatten(0, 1)[before].min(1)  # (S, n, out)
        arrow = before[states, choice]
        error, origin = errors.flatten(0, 1).gather(0, arrow), arrow >> 1
        steps.append((codes.flatten(0, 1).gather(0, arrow), error, origin))
        later = rest[:, :, j + 1 :].gather(0, origin.unsqueeze(2).expand(-1, -1, b - j - 1, -1))
        rest[:, :, j + 1 :] = later.addcmul_(V[:, j, j + 1 :].unsqueeze(-1), error.unsqueeze(2), value=-1)
    at = cost.argmin(0, keepdim=True)
    state.copy_(at[0])
    codes, errors = torch.empty_like(W), torch.empty_like(W)
    for j in range(b - 1, -1, -1):
        code, error, origin = steps[j]
        codes[:, j], errors[:, j], at = code.gather(0, at)[0], error.gather(0, at)[0], origin.gather(0, at)
    return codes, errors


def encode_scale(scale: Tensor) -> Tensor:
    """The nearest int8 eighths of an octave."""
    return (8 * scale.clamp(min=2.0**-16).log2()).round().clamp(-128, 127).to(torch.int8)


def decode_scale(encoded: Tensor) -> Tensor:
    """The scales that int8 eighths of an octave stand for."""
    # a table, since exp2 differs between processors
    eighths = torch.tensor([2 ** (k / 8) for k in range(8)], device=encoded.device)
    return torch.ldexp(eighths[encoded.long() % 8], encoded // 8)


def sigma_scale(W: Tensor, qmax: int | Tensor, sigmas: float) -> Tensor:
    """Scales (n, out, 1) whose largest code is `sigmas` standard deviations of the row (#1394).

    With sigmas = 0, the largest code is the row's largest entry.
    """
    return (W.std(-1, keepdim=True) * sigmas if sigmas else covering_scale(W, 1)) / qmax


def covering_scale(W: Tensor, max_value: int) -> Tensor:
    """Scales (n, out, 1), rounded up for storage, at which no entry of a row exceeds `max_value`."""
    return W.abs().amax(-1, keepdim=True) * (2 ** (1 / 16) / max_value)


def clip_search_scale(W: Tensor, qmax: int | Tensor, weights: Tensor, tried: int = 12) -> Tensor:
    """Scales (n, out, 1) with the least rounding error among clips at 0.3 to 1 of the row's maximum.

    The squared error is weighted by weights (n, 1, in), the diagonal of the Hessian.
    """
    largest = W.abs().amax(-1, keepdim=True).clamp(min=2.0**-16)
    best, least = largest, torch.full_like(largest, math.inf)
    for scale in (fraction * largest / qmax for fraction in torch.linspace(1.0, 0.3, tried).tolist()):
        codes = (W / scale).round().clamp(-qmax, qmax)
        error = ((W - codes * scale).square() * weights).sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def two_sided_scales(W: Tensor, g: Tensor, u: Tensor, scale: float, max_value: int) -> tuple[Tensor, Tensor]:
    """Scales (n, out, 1) and stored column scales (n, 1, in), whose product is about scale * u_j / sqrt(g_i).

    W (n, out, in), g (n, out), u (n, in). The scale of a column grows if half of its entries would be beyond
    `max_value`.
    """
    row = scale * g.rsqrt().unsqueeze(-1)
    u = u.unsqueeze(1)
    u = u * (W.abs() / (row * u * max_value)).median(1, keepdim=True).values.clamp(min=1.0)
    mean = u.log().mean(-1, keepdim=True).exp()  # goes to the rows: one byte has to hold the rest
    return row * mean, encode_scale(u / mean)


def floor_at(squares: Tensor, fraction: float) -> Tensor:
    """Mean squares (..., n), none below this fraction of their mean."""
    return squares.maximum(fraction * squares.mean(-1, keepdim=True)).clamp(min=1e-30)


def qmax_by_gradient(gradients: Mapping[str, tuple[Tensor, Tensor]], config: Config) -> dict[str, Tensor]:
    """Bank -> largest code per matrix (n, 1, 1): one bit more or less by its mean squared gradient (#398)."""
    order = torch.cat([gradients[name][1] for name in GPT.BANKS]).argsort()
    bits = torch.full((len(order),), config.matrix_bits, device=order.device)
    bits[order[: int(config.grad_quant_int5_frac * len(order))]] -= 1
    bits[order[len(order) - int(config.grad_quant_int7_frac * len(order)) :]] += 1
    qmax = (2 ** (bits.clamp(max=8) - 1) - 1)[:, None, None]
    return dict(zip(GPT.BANKS, qmax.split([len(gradients[name][1]) for name in GPT.BANKS]), strict=True))


def prune_smallest(tensor: Tensor, fraction: float) -> Tensor:
    """Zero the given fraction of entries of each matrix of (..., out, in), smallest magnitude first."""
    magnitude = tensor.abs()
    count = int(fraction * tensor.size(-2) * tensor.size(-1))
    if not count:
        return tensor
    limit = magnitude.flatten(-2).kthvalue(count, dim=-1).values
    return tensor.masked_fill(magnitude <= limit[..., None, None], 0.0)


class QuantSpec(NamedTuple):
    """How to round a tensor: W (n, out, in), factor, scales (n, out, 1), stored column scales (n, 1, in)."""

    W: Tensor
    factor: HessianFactor
    row_scale: Tensor
    col_scale: Tensor | None
    qmax: int | Tensor
    least: Tensor | float  # scales (n, out, 1) that leave nothing beyond the last code: they become no finer


def hessian_factors(
    hessians: Mapping[str, Tensor], config: Config, warn: Callable[[str], None]
) -> dict[str, tuple[HessianFactor, Tensor]]:
    """Map each tensor that has Hessians to their factor and diagonal, (n, 1, in).

    A factor is computed once for what Q, K, and V share.
    """
    made = {}
    for site, H in hessians.items():  # the trellis keeps the stored order, in which its decoder reads
        order = torch.arange(H.size(-1), device=H.device).expand(len(H), -1) if config.quant_trellis else None
        made[site] = (*factor_hessian(H, config.gptq_damp, order, warn), H.diagonal(dim1=-2, dim2=-1))
    found = {}
    for bank in GPT.BANKS if made else ():
        read = [made[site] for site in bank_sites(bank)]
        *factor, diagonal = (torch.cat(parts) for parts in zip(*read, strict=True))
        found[bank] = (HessianFactor(*factor), diagonal.unsqueeze(1))
    if "head" in made:
        *factor, diagonal = made["head"]
        name = "tok_emb.weight" if config.tie_embeddings else "lm_head.weight"
        found[name] = (HessianFactor(*factor), diagonal.unsqueeze(1))
    return found


@torch.no_grad()
def quant_specs(
    state: Mapping[str, Tensor],
    statistics: Statistics,
    config: Config,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, QuantSpec]:
    """How to round every coded tensor of a state dict, pruned by PRUNE_FRAC before.

    QUANT_STEPS=two_sided: a compensated error e_ij costs g_i (e_ij / u_j)^2 / 2 nats, g_i the mean squared
    gradient of output i. One more bit divides the cost of a weight by four, so the fewest bits for a loss
    make all costs equal: scale_ij = lambda u_j / sqrt(g_i), one lambda for the whole model. With N weights
    the loss is N lambda^2 / 24 = QUANT_LOSS. For tables, which have no Hessian, the factors of E[(dL/dW)^2]
    stand in; a tensor without gradients has one scale per row.
    """
    c = config
    tensors = {name: tensor.float() for name, tensor in state.items() if is_coded(name)}
    factors = hessian_factors(statistics.hessians, c, warn)
    guided = qmax_by_gradient(statistics.gradients, c) if c.grad_quant else {}
    scale = math.sqrt(24 * c.quant_loss / sum(tensor.numel() for tensor in tensors.values()))
    scale, max_value = (scale * TRELLIS_SCALE, 2 * INT8_MAX - 2) if c.quant_trellis else (scale, INT8_MAX)
    specs = {}
    for name, tensor in tensors.items():
        W = tensor.reshape(-1, *tensor.shape[-2:])
        factor, weights = factors.get(name) or (identity_factor(W), torch.ones_like(W[:, :1]))
        bank, columns = name in GPT.BANKS, None
        kind = param_group(name).name
        bits = c.matrix_bits if bank else c.embed_bits if kind in ("embed", "head") else 8
        qmax: int | Tensor = guided.get(name, 2 ** (bits - 1) - 1)
        if c.quant_steps == "two_sided" and name in statistics.gradients:
            g, by_column = statistics.gradients[name]  # (n, out) and (n,), or of a table (out,) and (in,)
            if bank:
                g, u = floor_at(g, BANK_FLOOR), factor.column_cost()
            else:
                g = floor_at(g / g.mean(), TABLE_FLOOR)[None]
                u = floor_at(by_column, BANK_FLOOR).rsqrt()[None]
            row, columns = two_sided_scales(W, g, u, scale, max_value)
        elif c.quant_steps == "clip" and bank:
            row = clip_search_scale(W, qmax, weights)
        else:
            own = c.mlp_clip_sigmas if name.startswith("mlp_") else c.attn_clip_sigmas
            tables = 0.0 if kind == "gate" else c.embed_clip_sigmas
            row = sigma_scale(W, qmax, own or c.matrix_clip_sigmas if bank else tables)
        least: Tensor | float = 0.0
        if columns is not None or c.fit_size:  # the scale decides, the codes have room
            qmax = INT8_MAX
            least = covering_scale(W if columns is None else W / decode_scale(columns), max_value)
        specs[name] = QuantSpec(prune_smallest(W, c.prune_frac), factor, row, columns, qmax, least)
    return specs


def quantize_by(
    state: Mapping[str, Tensor], specs: Mapping[str, QuantSpec], config: Config, scale_mult: float = 1.0
) -> list[QuantizedTensor]:
    """Quantize a state dict by its specs, all scales multiplied by scale_mult; results on the CPU."""
    found = []
    for name, tensor in state.items():
        if name not in specs:
            found.append(QuantizedTensor(name, tensor.to(torch.float16).cpu()))
            continue
        spec, columns = specs[name], specs[name].col_scale
        rows = encode_scale((spec.row_scale * scale_mult).clamp(min=spec.least))
        col_scale = None if columns is None else decode_scale(columns)
        trellis = config.quant_trellis and columns is not None
        codes = gptq(spec.W, spec.factor, decode_scale(rows), col_scale, spec.qmax, trellis=trellis)
        lead = tensor.shape[:-2]  # the banks have three axes, the tables two
        columns = None if columns is None else columns.view(*lead, 1, -1).cpu()
        rows = rows.view(*lead, -1, 1).cpu()
        found.append(QuantizedTensor(name, codes.reshape(tensor.shape).cpu(), rows, columns, trellis))
    return found


def quantize_state_dict(
    state: Mapping[str, Tensor], statistics: Statistics, config: Config
) -> list[QuantizedTensor]:
    """Quantize every tensor of a state dict; results on the CPU."""
    return quantize_by(state, quant_specs(state, statistics, config), config)


def dequantize(tensor: QuantizedTensor) -> Tensor:
    """The float32 tensor that a quantized one stands for."""
    if tensor.row_scale is None:
        return tensor.codes.float()
    values = trellis_values(tensor.codes) if tensor.trellis else tensor.codes.float()
    scale = decode_scale(tensor.row_scale)
    return values * (scale if tensor.col_scale is None else scale * decode_scale(tensor.col_scale))


@torch.no_grad()
def fake_quantize(bank: Tensor, config: Config) -> Tensor:
    """Round a bank to nearest, per row, by MATRIX_BITS and MATRIX_CLIP_SIGMAS.

    This is not the export's rounding, which uses Hessians and gradients that training does not have: it
    trains for coarse weights in general. LATE_QAT gained 0.0000 bpb.
    """
    qmax = 2 ** (config.matrix_bits - 1) - 1
    scale = decode_scale(encode_scale(sigma_scale(bank, qmax, config.matrix_clip_sigmas)))
    return (bank / scale).round().clamp(-qmax, qmax) * scale


@contextmanager
def fake_quantized_banks(model: GPT) -> Iterator[None]:
    """Within the context the banks hold their `fake_quantize`d values.

    Gradients taken inside and applied afterwards are straight-through (arXiv 1308.3432).
    """
    banks = [bank.detach() for bank in model.banks().values()]
    saved = [bank.clone() for bank in banks]
    for bank in banks:
        bank.copy_(fake_quantize(bank, model.config))
    try:
        yield
    finally:
        torch._foreach_copy_(banks, saved)


# ------------------------------------------------------------------------------------------------------------
# Coding
# ------------------------------------------------------------------------------------------------------------

# A code says more about its width than about its neighbors, so codes are laid out by their expected width:
# every coder then meets one width at a time. The widths are stored as quarter octaves, by row and by column,
# and 64 sums of the two are told apart. Encoders stand beside their decoders.

NUM_WIDTHS, NARROWEST = 64, -24
LZMA2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0}
LZMA = dict(format=lzma.FORMAT_RAW, filters=[LZMA2])
# 40 % of the time of level 22, within 0.04 % of its bytes: records/benchmarks/2026-11-27_coders_cpu.md
ZSTD_LEVEL = 16
TABLES_LIMIT = 1 << 24  # bytes of all tables of an entropy coder
# a frame begins so; LZMA2 data begins with a byte of 0 to 2, or 0x80 and more
ZSTD_MAGIC = bytes.fromhex("28b52ffd")
PACKAGES = {"zstd": ("zstandard", "0.25.0"), "ans": ("constriction", "0.5.0")}


def coder_package(coder: str) -> Any:
    """Import the package that a value of COMPRESSOR needs. UserError if it cannot be imported."""
    name, version = PACKAGES[coder]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        told = f"COMPRESSOR={coder} needs the package {name}: {error}"
        raise UserError(f"{told}. Install it: pip install {name}=={version}") from None


def pack(data: bytes, coder: str) -> bytes:
    """Compress side information with zstd, or with lzma under COMPRESSOR=ans, to need one package only."""
    return coder_package(coder).compress(data, ZSTD_LEVEL) if coder == "zstd" else lzma.compress(data, **LZMA)


def unpack(data: bytes, most: int) -> bytes:
    """Undo `pack`, of at most `most` bytes; the first bytes tell which of the two it was."""
    if data.startswith(ZSTD_MAGIC):
        size = coder_package("zstd").frame_content_size(data)
        if 0 <= size <= most:
            return coder_package("zstd").decompress(data)
    else:
        decoder = lzma.LZMADecompressor(**LZMA)
        content = decoder.decompress(data, most + 1)
        if (size := len(content)) <= most and decoder.eof:
            return content
    raise UserError(f"{len(data)} packed bytes: {size} unpacked, expected a whole stream of at most {most}")


def code_widths(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Log2 RMS of codes in quarter octaves, int8: by row, and by column relative to the rows."""
    squares = codes.float().square() + 2.0**-12
    rows = squares.mean(-1, keepdim=True)
    columns = (squares / rows).mean(-2, keepdim=True)
    # quarter octaves of the root
    return tuple((2 * part.log2()).round().to(torch.int8) for part in (rows, columns))


def lay_out(widths: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Order of all codes by expected width, and their counts by width and matrix."""
    sums = [(row.int() + column - NARROWEST).clamp(0, NUM_WIDTHS - 1).byte() for row, column in widths]
    matrices = [matrix.flatten().numpy() for part in sums for matrix in part.view(-1, *part.shape[-2:])]
    counts = np.stack([np.bincount(matrix, minlength=NUM_WIDTHS) for matrix in matrices], axis=1)
    return np.concatenate(matrices).argsort(kind="stable"), counts


class Table(NamedTuple):
    """Frequencies of the codes low, low + 1, ... for an entropy coder: uint16, never zero."""

    low: int
    frequencies: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray) -> Table:
        low = int(codes.min())
        counts = np.bincount(codes.astype(np.int16) - low, minlength=2)  # the coder needs two symbols
        return cls(low, np.ceil(counts * (65535 / len(codes))).clip(1, 65535).astype("<u2"))

    def dump(self) -> bytes:
        return struct.pack("<bB", self.low, len(self.frequencies) - 1) + self.frequencies.tobytes()

    def bits(self, codes: np.ndarray) -> float:
        """Size of the codes under this table, in bits."""
        probabilities = self.frequencies / self.frequencies.sum(dtype=np.int64)
        return -float(np.log2(probabilities)[codes.astype(np.int16) - self.low].sum())

    def model(self) -> Any:
        """For the coder: quotients of whole numbers, so the same on every machine."""
        weights = self.frequencies / self.frequencies.sum(dtype=np.int64)
        return coder_package("ans").stream.model.Categorical(weights, perfect=False)


def choose_tables(codes: np.ndarray, counts: np.ndarray) -> tuple[list[Table], list[int]]:
    """A table per width, and one for those of its matrices that save more by it than it takes: tables, uses.

    codes: int8 in the order of `lay_out`; the uses, numbers of tables, are of its segments by width and by
    matrix.
    """
    tables: list[Table] = []
    uses: list[int] = []
    parts = iter(np.split(codes, counts.flatten().cumsum()[:-1]))
    for row in counts:
        segments = [part for part in islice(parts, len(row)) if len(part)]
        if not segments:
            continue
        shared, common = Table.of(np.concatenate(segments)), len(tables)
        tables.append(shared)
        for segment in segments:
            own = Table.of(segment)
            pays = shared.bits(segment) - own.bits(segment) > 8 * len(own.dump())
            uses.append(len(tables) if pays else common)
            tables += [own] if pays else []
    return tables, uses


def encode_codes(codes: np.ndarray, counts: np.ndarray, coder: str) -> bytes:
    """Encode codes (int8) in the order of `lay_out`; ans: an asymmetric numeral system (arXiv 1311.2540)."""
    if coder == "zstd":  # width by width: it does not always see where one ends
        parts = [part.tobytes() for part in np.split(codes, counts.sum(1).cumsum()[:-1])]
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # the bytes do not depend on it
            frames = list(pool.map(partial(pack, coder=coder), parts))
        return b"".join([struct.pack(f"<{NUM_WIDTHS}I", *map(len, frames)), *frames])
    tables, uses = choose_tables(codes, counts)
    sizes, stack = counts[counts > 0], coder_package("ans").stream.stack.AnsCoder()
    # the coder is a stack: encode in reverse order
    for part, use in zip(np.split(codes, sizes.cumsum()[:-1])[::-1], uses[::-1], strict=True):
        stack.encode_reverse(part.astype(np.int32) - tables[use].low, tables[use].model())
    dumped = b"".join(table.dump() for table in tables)
    packed = pack(struct.pack("<H", len(tables)) + dumped + np.array(uses, "<u2").tobytes(), coder)
    return struct.pack("<I", len(packed)) + packed + stack.get_compressed().astype("<u4").tobytes()


def take(file: BinaryIO, shape: Sequence[int] = (), dtype: str = "<i1") -> np.ndarray:
    """The next bytes of a file as an array. UserError if it has fewer."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if len(part := file.read(size)) < size:
        raise UserError(f"{len(part)} bytes are left, expected {size} of an array {BRIEF.repr(shape)}")
    return np.frombuffer(part, dtype).reshape(shape)


def decode_codes(data: bytes, counts: np.ndarray, coder: str) -> np.ndarray:
    """Undo `encode_codes`. UserError for other than as many codes as counted."""
    file, parts = io.BytesIO(data), [np.zeros(0, np.int8)]
    if coder == "zstd":
        lengths = take(file, (NUM_WIDTHS,), "<u4").tolist()
        for length, count in zip(lengths, counts.sum(1).tolist(), strict=True):
            parts.append(np.frombuffer(unpack(take(file, (length,)).tobytes(), count), np.int8))
    else:
        side, tables = io.BytesIO(unpack(file.read(take(file, (), "<u4").item()), TABLES_LIMIT)), []
        for _ in range(take(side, (), "<u2").item()):
            low, last = take(side).item(), take(side, (), "<u1").item()
            tables.append(Table(low, take(side, (last + 1,), "<u2")))
        sizes = counts[counts > 0]
        uses, words = take(side, (len(sizes),), "<u2"), np.frombuffer(file.read(), "<u4")
        stack = coder_package("ans").stream.stack.AnsCoder(words)
        for size, use in zip(sizes.tolist(), uses.tolist(), strict=True):
            parts.append((stack.decode(tables[use].model(), size) + tables[use].low).astype(np.int8))
    codes, left = np.concatenate(parts), len(file.read())
    if left or len(codes) != counts.sum():
        raise UserError(f"{len(codes)} codes and {left} bytes behind, expected {counts.sum()} and 0")
    return codes


def fit(build: Callable[[float], bytes], budget: int, passes: int = 12) -> tuple[bytes, float]:
    """The largest of the artifacts build(scale_mult) within `budget` bytes, to 0.1 %, and its scale_mult.

    If none fits, the last one tried, which is the smallest. Bytes fall about evenly with the logarithm of the
    factor: two sizes tell where to look, halving where that is slow.
    """
    below: tuple[float, int] | None = None  # log2 of the factor and bytes, of the best that fits
    above: tuple[float, int] | None = None  # of the closest that does not
    best, at = (b"", 1.0), 0.0
    for turn in range(passes):
        blob = build(2.0**at)
        if len(blob) <= budget:
            finer = below is None or above is not None or len(blob) > below[1]
            below, best = (at, len(blob)), (blob, 2.0**at)
            if len(blob) >= 0.999 * budget or not finer:  # full, or the scales have become no finer
                break
        else:
            above = (at, len(blob))
            best = best if below else (blob, 2.0**at)
        if below is None or above is None:
            at += 1.0 if below is None else -1.0
        else:
            fraction = (0.9995 * budget - below[1]) / (above[1] - below[1]) if turn % 3 else 0.5
            at = below[0] + (above[0] - below[0]) * min(max(fraction, 0.05), 0.95)
    return best


# ------------------------------------------------------------------------------------------------------------
# Artifact
# ------------------------------------------------------------------------------------------------------------

# The file: magic, uint32 version, name of the coder, SHA-256 of these two and what follows: uint32 length of
# a packed head, the head, the coded codes. The head: uint32 length of a JSON text (model settings, hashes,
# table of tensors), the text, and what is not a code: float16 tensors, scales, widths. Nothing is executed to
# read it.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLFQ6\0", 2
ARTIFACT_LIMIT, HEAD_LIMIT, TEXT_LIMIT = 1 << 28, 1 << 26, 1 << 20  # most bytes: file, head, its JSON text
ARTIFACT_PREFIX = struct.Struct("<8sI4s32s")
TENSOR = {"name": str, "shape": [int], "coded": bool, "columns": bool, "trellis": bool}
HEADER = {"config": {}, "tokenizer_sha256": str, "sha256_codes": str, "tensors": [TENSOR]}


def checksum(coder: bytes, body: bytes) -> bytes:
    return hashlib.sha256(struct.pack("<I", ARTIFACT_VERSION) + coder + body).digest()


def encode_artifact(config: Config, tensors: list[QuantizedTensor], tokenizer_sha256: str) -> bytes:
    """The bytes of the artifact: model settings, tensors, and codes by the coder that COMPRESSOR names."""
    coded = [tensor for tensor in tensors if tensor.row_scale is not None]
    widths = [code_widths(tensor.codes) for tensor in coded]
    order, counts = lay_out(widths)
    codes = np.concatenate([tensor.codes.flatten().numpy() for tensor in coded])[order]
    table = [dict(name=t.name, shape=list(t.codes.shape), coded=t.row_scale is not None,
                  columns=t.col_scale is not None, trellis=t.trellis) for t in tensors]  # fmt: skip
    header = dict(config=settings_of(config, "model"), tokenizer_sha256=tokenizer_sha256, tensors=table)
    header["sha256_codes"] = hashlib.sha256(codes).hexdigest()
    text = json.dumps(header, separators=(",", ":")).encode()
    side = [tensor.codes for tensor in tensors if tensor.row_scale is None]
    side += [scale for tensor in coded for scale in (tensor.row_scale, tensor.col_scale) if scale is not None]
    side += [part for pair in widths for part in pair]
    plain = [struct.pack("<I", len(text)), text, *(part.contiguous().numpy().tobytes() for part in side)]
    head = pack(b"".join(plain), config.compressor)
    body = struct.pack("<I", len(head)) + head + encode_codes(codes, counts, config.compressor)
    coder = config.compressor.encode().ljust(4, b"\0")
    return ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, coder, checksum(coder, body)) + body


def read_model_settings(values: Mapping[str, Any]) -> Config:
    """The settings of a model from the header of an artifact, each of the type and range of its field."""
    deleted = {name.lower() for names, *_ in ABSENT for name in names.split()}
    by_name, read = {f.name: f for f in fields(Config) if f.name in settings_of(Config(), "model")}, {}
    for name, value in values.items():
        if name in by_name:
            read[name] = parse_value(by_name[name], value if isinstance(value, str) else json.dumps(value))
        elif value or name not in deleted:
            raise UserError(f"unknown model setting {BRIEF.repr(name)}, written by another version")
    if problems := [message for right, message in model_rules(Config(**read)) if not right]:
        raise UserError("; ".join(problems))
    return Config(**read)


def decode_tensors(body: bytes, coder: str) -> tuple[dict[str, Any], list[QuantizedTensor]]:
    """Header, with its settings as a Config, and tensors of the body of an artifact.

    UserError for what `encode_artifact` does not write, or if other codes come out than went in.
    """
    file = io.BytesIO(body)
    head = io.BytesIO(unpack(take(file, (take(file, (), "<u4").item(),)).tobytes(), HEAD_LIMIT))
    if (length := take(head, (), "<u4").item()) > TEXT_LIMIT:
        raise UserError(f"header: {length} bytes, expected at most {TEXT_LIMIT}")
    header = parse_json(head.read(length), HEADER, "header")
    header["config"] = read_model_settings(header["config"])
    sizes = {row["name"]: math.prod(row["shape"]) for row in header["tensors"]}
    if sum(sizes.values()) > MAX_NUMBERS or len(sizes) < len(header["tensors"]):
        raise UserError(f"{sum(sizes.values())} numbers, expected at most {MAX_NUMBERS}, or a tensor twice")

    def tensor(shape: Sequence[int], dtype: str = "<i1") -> Tensor:
        return torch.from_numpy(take(head, shape, dtype).copy())

    found = {}
    for row in header["tensors"]:
        if not row["coded"]:
            found[row["name"]] = QuantizedTensor(row["name"], tensor(row["shape"], "<f2"))
    rows = [row for row in header["tensors"] if row["coded"]]
    sides = [([*lead, out, 1], [*lead, 1, columns]) for *lead, out, columns in (row["shape"] for row in rows)]
    two_sided = [row["columns"] for row in rows]
    scales = [(tensor(a), tensor(b) if two else None) for (a, b), two in zip(sides, two_sided, strict=True)]
    order, counts = lay_out([(tensor(by_row), tensor(by_column)) for by_row, by_column in sides])
    if rest := head.read():
        raise UserError(f"{len(rest)} bytes are left over in the head")
    laid_out = decode_codes(file.read(), counts, coder)
    if hashlib.sha256(laid_out).hexdigest() != header["sha256_codes"]:
        raise UserError("its codes do not come out as they went in, another version of the coder?")
    codes = np.empty_like(laid_out)
    codes[order] = laid_out
    parts = torch.from_numpy(codes).split([sizes[row["name"]] for row in rows])
    for row, part, pair in zip(rows, parts, scales, strict=True):
        found[row["name"]] = QuantizedTensor(row["name"], part.view(row["shape"]), *pair, row["trellis"])
    return header, [found[row["name"]] for row in header["tensors"]]


class Artifact(NamedTuple):
    """What an artifact holds: the model's configuration, its float32 weights, and what else scoring needs."""

    config: Config
    state: dict[str, Tensor]
    tokenizer_sha256: str
    factors: Mapping[str, Tensor] = {}  # Meta-SGD's, by bank


def read_artifact(path: str | Path) -> Artifact:
    """Read and verify an artifact. UserError if it is missing, truncated, altered, or of another format."""
    with decoding(f"artifact {path}", "readable"):
        blob = read_file(path, ARTIFACT_LIMIT)
        prefix, body = blob[: ARTIFACT_PREFIX.size], blob[ARTIFACT_PREFIX.size :]
        *kind, coder, digest = ARTIFACT_PREFIX.unpack(prefix)
        if kind != (expected := [ARTIFACT_MAGIC, ARTIFACT_VERSION]):
            raise UserError("magic {!r} version {}".format(*kind) + f", expected {expected}")
        if checksum(coder, body) != digest:
            raise UserError("the checksum does not match, the file is truncated or altered")
        name = coder.rstrip(b"\0").decode(errors="replace")
        if name not in PACKAGES:
            raise UserError(f"codes by {name!r}, of another version; this one reads {', '.join(PACKAGES)}")
        header, stored = decode_tensors(body, name)
        tensors = {tensor.name: dequantize(tensor) for tensor in stored}
        names = {bank: f"factors.{bank}" for bank in GPT.BANKS}
        factors = {bank: tensors.pop(name).exp2() for bank, name in names.items() if name in tensors}
        check_finite("its tensors", tensors | factors)
        GPT(header["config"]).load_state_dict(tensors)  # every tensor is there, in its shape
        if any(factor.shape != (len(tensors[bank]), 1, 1) for bank, factor in factors.items()):
            raise UserError("a factor of Meta-SGD for other than the rows of its bank")
    return Artifact(header["config"], tensors, header["tokenizer_sha256"], factors)


def load_model(
    artifact: Artifact,
    device: torch.device,
    kernel: AttentionFn = sdpa_attention,
    word_start: np.ndarray | None = None,
) -> GPT:
    """A new model with an artifact's weights, every tensor accounted for; arguments as for GPT."""
    model = GPT(artifact.config, compute_dtype(device), kernel, word_start)
    model.load_state_dict(artifact.state, strict=True)
    return model.to(device)


# ------------------------------------------------------------------------------------------------------------
# Batch sizes and GPU memory
# ------------------------------------------------------------------------------------------------------------

# How many sequences one pass computes: this decides speed and memory, never the result. The settings request
# a number; on a GPU, records/memory.py, where present, computes how many fit.

TRAINING_PARTS = ("train", "statistics", "score")
# Slots computed at once. Enough to fill a GPU, and their gradients fit beside the weights of all slots; a CPU
# is full with one, and a batch has all its rows even if few documents are left.
SLOT_ROWS, CPU_SLOT_ROWS = 16, 4


@cache
def project_module(name: str) -> Any:
    """Import records/`name`.py, which plans, checks, or explains, and does not ship; None without it."""
    folder = Path(__file__).resolve().parent / "records"
    if not (folder / f"{name}.py").is_file():
        return None
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def wanted_at_once(config: Config, ranks: int) -> dict[str, int]:
    """Part of a run -> sequences to compute at once by the settings."""
    c = config
    wanted = {
        "train": max(c.step_seqs // max(c.grad_accum_total, ranks), 1),
        "statistics": c.train_batch_tokens // c.grad_accum_total // c.train_seq_len,
        "score": c.eval_batch_seqs,
    }
    if TTT_MODES[c.ttt_mode].by_documents:
        wanted["slots"] = min(SLOT_ROWS, c.ttt_slots)
    return wanted


def at_once(config: Config) -> dict[str, int]:
    """Part of a run -> sequences to compute at once on this machine: those wanted, or as many as a GPU holds.

    A micro-batch also divides a rank's sequences of a step. 0: not even one fits.
    """
    memory = project_module("memory")
    if memory is not None and (limit := memory.memory_limit(config)) < math.inf:
        return memory.sequences_at_once(memory.memory_here(config), limit)
    chosen, rows = wanted_at_once(config, world_size()), config.step_seqs // world_size()
    if "slots" in chosen and (config.device == "cpu" or not torch.cuda.is_available()):
        chosen["slots"] = min(chosen["slots"], CPU_SLOT_ROWS)
    return chosen | {"train": max(n for n in range(1, chosen["train"] + 1) if rows % n == 0)}


def check_memory(config: Config, parts: Sequence[str]) -> list[str]:
    """The choice for these parts as a line for the log, on a GPU. UserError if one sequence does not fit."""
    memory = project_module("memory")
    return memory.check_memory(config, parts) if memory else []


# ------------------------------------------------------------------------------------------------------------
# Meta-learning
# ------------------------------------------------------------------------------------------------------------

# Three ways to train for the weights that test-time steps lead to. FOMAML (#1501, #1502) adds the gradient
# after inner steps to some training steps, Reptile (#294) moves toward the mean of adapted weights, the
# deployed objective takes the evaluator's own steps on whole documents. All are episodes of `adaptation_step`
# and `outer_gradients`, first order throughout: the derivative of the inner steps is left out. Nothing here
# is part of the model.


class MetaRates:
    """Meta-SGD (arXiv 1707.09835): a positive factor of the inner learning rate for each bank row.

    They are exponentials, so they stay positive, learned by Adam without decay. One whose row is frozen has
    no gradient and stays 1.
    """

    def __init__(self, model: GPT, config: Config):
        banks = model.banks() if config.meta_sgd_enabled else {}
        self.logs = {name: torch.zeros(len(bank), 1, 1, device=bank.device) for name, bank in banks.items()}
        logs, lr = list(self.logs.values()), config.meta_sgd_lr or config.scalar_lr
        self.adam = torch.optim.Adam(logs, lr=lr, betas=(0.9, 0.95)) if logs else None

    def factors(self) -> dict[str, Tensor]:
        """By bank, (rows, 1, 1)."""
        return {name: log.exp() for name, log in self.logs.items()}

    def add_gradients(self, fast: FastWeights, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of the outer loss: a row's displacement is proportional to its factor."""
        for name, g in gradients.items():
            if (log := self.logs.get(name.split(".")[0])) is not None:
                each = (g * (fast.used()[name] - fast.base[name])).sum((-2, -1)).sum(0).view_as(log)
                log.grad = each if log.grad is None else log.grad + each

    def step(self, scale: float) -> None:
        """Average the gradients over the ranks and take a step at `scale` of the learning rate."""
        if self.adam is None:
            return
        logs = list(self.logs.values())
        for log, g in zip(logs, sum_over_ranks([log.grad for log in logs]), strict=True):
            log.grad = g / world_size()
        self.adam.param_groups[0]["lr"] = scale * self.adam.defaults["lr"]
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return dict(logs=self.logs, adam=self.adam.state_dict() if self.adam else {})

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for name, log in self.logs.items():
            log.copy_(saved["logs"][name])
        if self.adam:
            self.adam.load_state_dict(saved["adam"])

    def report(self) -> dict[str, list[float]]:
        """The factors by bank and row."""
        return {name: [round(x, 5) for x in f.flatten().tolist()] for name, f in self.factors().items()}


def rates_text(factors: Mapping[str, Tensor]) -> str:
    """For the log: the smallest and the largest factor of each bank; "" without any."""
    return "".join(f" rates_{name}:{f.min().item():.3f}..{f.max().item():.3f}" for name, f in factors.items())


def inner_weights(model: GPT, config: Config, objective: str) -> FastWeights:
    """What an objective's inner steps change: one set for all ranks (fomaml), or one for each task."""
    c, ranks = config, world_size()
    if objective == "deployed":  # the evaluator's own
        fast = FastWeights(model, c, TTT_MODES[c.ttt_mode].adapts, math.ceil(c.meta_ttt_docs / ranks))
        fast.moments.across_ranks = True
        return fast
    sgd = dict(ttt_optimizer="sgd", ttt_momentum=0.0, ttt_weight_decay=0.0, ttt_grad_clip=0.0, ttt_layers="")
    sgd |= dict(ttt_in_lr_mult=1.0, ttt_out_lr_mult=1.0, ttt_freeze_blocks=c.meta_ttt_freeze_blocks)
    if objective == "fomaml":
        return FastWeights(model, replace(c, **sgd), "bank")
    last_quarter = range(c.num_layers - max(1, c.num_layers // 4), c.num_layers)
    sgd |= dict(ttt_freeze_blocks=0, ttt_layers=c.reptile_layers or ",".join(map(str, last_quarter)))
    sets = math.ceil(c.reptile_tasks / ranks)
    return FastWeights(model, replace(c, **sgd), "mlp_up_bank mlp_down_bank", sets)


def outer_gradients(
    model: GPT, fast: FastWeights, rates: MetaRates, batch: TTTBatch, nll_fn: Callable
) -> Tensor:
    """Add the gradients of weighted_nll to the parameters' and the rates', and return the loss.

    The gradients at the fast values go to the parameters that these started from.
    """
    loss, values = weighted_nll(model, fast, batch, nll_fn)
    loss.backward()
    gradients = {name: value.grad for name, value in values.items() if value.grad is not None}
    rates.add_gradients(fast, gradients)
    for name, g in gradients.items():
        if not name.endswith((".a", ".b")):  # adapters start from nothing that is kept
            p = model.get_parameter(name)
            p.grad = g.sum(0) if p.grad is None else p.grad + g.sum(0)
    return loss.detach()


class Event(NamedTuple):
    """A batch to score (lr None), or to adapt on: the first `count` of the sets `rows` take a step."""

    batch: TTTBatch
    lr: float | None = None
    rows: Any = slice(None)
    count: int | None = None


def episode(
    model: GPT, fast: FastWeights, rates: MetaRates | None, events: Iterable[Event], nll_fn: Callable
) -> tuple[list[Tensor], list[Tensor]]:
    """Go through the events: adapt the fast weights, and add outer gradients where a batch is scored.

    Returns the weighted losses of the batches that were scored and adapted on, each before its step.
    """
    scored: list[Tensor] = []
    adapted: list[Tensor] = []
    for event in events:
        fast.rows = event.rows
        if event.lr is None:
            scored.append(outer_gradients(model, fast, rates, event.batch, nll_fn))
            continue
        adapted.append(adaptation_step(model, fast, event.batch, event.lr, event.count, nll_fn))
        if not fast.shared:
            fast.moments.end_step()
    return scored, adapted


def split_task(ids: Tensor, targets: Tensor, split: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Support and query part of sequences (B, T): ids, targets and positions each, see META_TTT_SPLIT."""
    B, T = ids.shape
    positions, half = torch.arange(T, device=ids.device).expand(B, T), T // 2
    if split == "batch":
        return (ids[0::2], targets[0::2], positions[0::2]), (ids[1::2], targets[1::2], positions[1::2])
    support = (ids[:, :half], targets[:, :half], positions[:, :half])
    if split == "seq":
        return support, (ids, targets[:, half:], positions[:, half:])
    return support, (ids[:, half:], targets[:, half:], positions[:, : T - half])


def meta_sequences(batches: list[tuple[Tensor, Tensor]], config: Config) -> tuple[Tensor, Tensor]:
    """FOMAML's part of a step's batches: one micro-batch, the same sequences for any number of ranks."""
    ids, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    every = config.grad_accum_total * (2 if config.meta_ttt_split == "batch" else 1)
    if len(ids) % every:
        told = f"META_TTT_SPLIT={config.meta_ttt_split} and GRAD_ACCUM_TOTAL={config.grad_accum_total}"
        raise UserError(f"{told} need a multiple of {every} sequences of a step per rank, not {len(ids)}")
    return ids[:: config.grad_accum_total], targets[:: config.grad_accum_total]


def fomaml_step(
    model: GPT,
    fast: FastWeights,
    rates: MetaRates,
    ids: Tensor,
    targets: Tensor,
    nll_fn: Callable = token_nll,
) -> tuple[Tensor | None, Tensor]:
    """Add the first-order gradient of the loss after inner steps (FOMAML, arXiv 1703.03400).

    ids, targets (B, T): this rank's sequences, as many on each. The outer loss counts META_TTT_LOSS_WEIGHT,
    whatever the ranks and micro-batches; its excess over the loss without inner steps META_TTT_DELTA_WEIGHT
    more (#1502). Returns this rank's outer loss before (None where it is not needed) and after.
    """
    c, delta, before = model.config, model.config.meta_ttt_delta_weight, None
    support, query = split_task(ids, targets, c.meta_ttt_split)
    fast.reset()
    fast.set_factors(rates.factors())
    if delta:
        before = nll_fn(model, *query).mean()
        (-delta * before).backward()
    total = c.meta_ttt_loss_weight + delta
    mean = torch.full(support[1].shape, 1 / support[1].numel() / world_size(), device=ids.device)
    weight = torch.full(query[1].shape, total / query[1].numel(), device=ids.device)
    inner = Event(TTTBatch(*support, mean), 0.0 if c.meta_control else c.meta_ttt_inner_lr)
    events = [inner] * c.meta_ttt_inner_steps + [Event(TTTBatch(*query, weight))]
    [loss], _ = episode(model, fast, rates, events, nll_fn)
    return before, loss / max(total, 1e-12)


def sample_documents(
    stream: TokenStream, count: int, config: Config, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` parts of documents that are longer than a chunk, up to META_TTT_PIECES chunks of each.

    Each contains a random position of the training text, so that long documents count as they do in training:
    it begins with the BOS before that position, or there if none is near. Returns rows (count, length + 1)
    and the number of targets of each (count,).
    """
    length, found = config.meta_ttt_pieces * config.doc_chunk, 0
    rows, sizes = np.full((count, length + 1), BOS_ID, np.int64), np.zeros(count, np.int64)
    for _ in range(1000 * count):
        text = stream.read(int(generator.integers(len(stream))), 2 * length + 1)
        borders = np.flatnonzero(text == BOS_ID)
        begin = int(max(borders[borders <= length], default=length))
        size = int(min(borders[borders > begin], default=len(text))) - begin
        if (size := min(size, length)) > config.doc_chunk:
            rows[found, : size + 1], sizes[found] = text[begin : begin + size + 1], size
            found += 1
            if found == count:
                return rows, sizes
    few = f"too few documents of over {config.doc_chunk} tokens"
    raise UserError(f"META_TTT_OBJECTIVE=deployed finds {few}. Lower TTT_CHUNK_SIZE.")


def deployed_events(
    config: Config, rows: np.ndarray, sizes: np.ndarray, device: torch.device
) -> Iterator[Event]:
    """Yield the events of this rank's documents, rows (documents, length + 1): score a chunk, then adapt."""
    c, size = config, config.doc_chunk
    text, ends = (np.array_split(part, world_size())[rank()] for part in (rows, sizes))
    low, weight = np.arange(len(text)) * rows.shape[1], world_size() / int(sizes.sum())
    text = text.flatten()
    for first in range(0, int(sizes.max()), size):
        scored, adapted, lengths = chunk_windows(low, low + ends, first, c)
        context = int(lengths.min()) - size
        yield Event(make_ttt_batch(text, scored, np.full(len(low), weight), size, context, device))
        order = np.argsort(ends <= first + size, kind="stable")  # those that go on first, in document order
        count = int((ends > first + size).sum())
        mean = np.full(len(low), 1 / size)
        batch = make_ttt_batch(text, adapted.take(order), mean, size, c.ttt_context, device)
        lr = 0.0 if c.meta_control else c.ttt_lr
        for _ in range(c.ttt_epochs if (sizes > first + size).any() else 0):
            yield Event(batch, lr, torch.from_numpy(order).to(device), count)


def deployed_step(
    model: GPT,
    fast: FastWeights,
    rates: MetaRates,
    rows: np.ndarray,
    sizes: np.ndarray,
    nll_fn: Callable = token_nll,
) -> Tensor:
    """Add gradients of the loss of documents that are scored and adapted on as the evaluator does it.

    rows (documents, length + 1) and sizes (documents,) are those of all ranks; each takes its part. Together
    they are one group, in this order, whose moments begin from the prior. The banks are rounded by
    `fake_quantize`. Returns this rank's part of the loss, of which the mean is the whole.
    """
    fast.set_factors(rates.factors())
    with fake_quantized_banks(model):
        fast.begin()
        events = deployed_events(model.config, rows, sizes, fast.device)
        scored, _ = episode(model, fast, rates, events, nll_fn)
    return torch.stack(scored).sum()


def reptile_step(model: GPT, fast: FastWeights, rows: Tensor, nll_fn: Callable = token_nll) -> Tensor:
    """Inner SGD from the same weights for each task, then a part of the way to their mean (arXiv 1803.02999).

    rows (inner steps, tasks, T + 1): this rank's. Under META_CONTROL each inner step starts from the same
    weights: it is plain SGD on the same rows. Returns the mean loss of the first inner step.
    """
    c = model.config
    _, tasks, length = rows.shape
    positions = torch.arange(length - 1, device=rows.device).expand(tasks, -1)
    weight = torch.full(positions.shape, 1 / (length - 1), device=rows.device)
    batches = [TTTBatch(part[:, :-1], part[:, 1:], positions, weight) for part in rows]
    events = [Event(batch, c.reptile_inner_lr) for batch in batches]
    moved = [torch.zeros_like(base) for base in fast.base.values()]
    losses = []
    for loop in [[event] for event in events] if c.meta_control else [events]:
        fast.reset()
        losses += episode(model, fast, None, loop, nll_fn)[1]
        for move, (name, base) in zip(moved, fast.base.items(), strict=True):
            move += fast.values[name].mean(0) - base
    *moved, first = sum_over_ranks([*moved, losses[0] / tasks])
    with torch.no_grad():
        for name, move in zip(fast.base, moved, strict=True):
            model.get_parameter(name).add_(move, alpha=c.reptile_outer_lr / world_size())
    return first / world_size()


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------

# A run is a list of phases with one loop, `train`: training, then Reptile or the deployed meta-phase where
# they are on. The loop owns the clock, validation, finite checks, logging and checkpoints; a phase is a step
# function and the state that a checkpoint must hold. Batches and draws depend on the seed and the step alone,
# so that a run resumes on any number of ranks, on a CPU bit for bit.


@dataclass
class Run:
    """What every part of a run needs: settings, folder, device and the checked data."""

    config: Config
    device: torch.device
    kernel: AttentionFn
    versions: dict[str, Any]
    folder: Path
    lock: int  # the folder as an open file of rank 0's process, and of no other
    log: RunLog
    train: TokenStream
    byte_table: ByteTable
    tokenizer_sha256: str

    @cached_property
    def val_tokens(self) -> np.ndarray:
        """Validation text, read on first use: with VAL_LOSS_EVERY=0 after the artifact is written."""
        return read_validation(self.config, self.byte_table, self.tokenizer_sha256)[0]

    def score(self, model: GPT, stride: int, nll_fn: Callable = token_nll) -> Score:
        """Score the validation tokens by windows of EVAL_SEQ_LEN, `stride` apart."""
        plan = [Chunk(sliding_windows(len(self.val_tokens), self.config.eval_seq_len, stride))]
        return score(model, self.val_tokens, plan, self.byte_table, at_once(self.config)["score"], nll_fn)


class StepMetrics(NamedTuple):
    """Loss and gradient norms (before clipping) of one step, identical on all ranks."""

    values: Tensor  # (1 + gradients,), on the device
    names: list[str]
    lr_scale: float = 1.0

    @property
    def loss(self) -> Tensor:
        return self.values[0]


class Clock:
    """Training time in seconds, with pauses. On a GPU, steps are checked one step late (`lag`)."""

    def __init__(self, device: torch.device):
        self.device, self.total, self.began = device, 0.0, None
        self.lag = 1 if device.type == "cuda" else 0
        self.pending: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None = None

    def start(self) -> None:
        synchronize(self.device)
        self.began = time.perf_counter()

    def stop(self) -> None:
        synchronize(self.device)
        self.total, self.began = self.seconds(), None

    def seconds(self) -> float:
        return self.total + (time.perf_counter() - self.began if self.began is not None else 0.0)

    def step_done(self, step: int, metrics: StepMetrics) -> None:
        """Check the last step that is certainly done, without waiting for `step` itself.

        Raises FloatingPointError if its loss or a gradient was not finite.
        """
        values, event = metrics.values, None
        if self.lag:
            values, event = torch.empty(values.shape, pin_memory=True), torch.cuda.Event()
            values.copy_(metrics.values, non_blocking=True)
            event.record()
            self.settle()
        self.pending = step, metrics.names, values, event
        if not self.lag:
            self.settle()

    def settle(self) -> None:
        """Wait for the last step, and check it."""
        if self.pending is None:
            return
        step, names = self.pending[:2]
        values, event = self.pending[2:]
        self.pending = None
        if event is not None:
            event.synchronize()
        for name, value in zip(names, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"step {step}: {name} is {value}")


def split_batch(config: Config) -> tuple[int, int]:
    """Sequences per rank and step, and micro-batches. UserError if the ranks do not divide the sequences.

    If the GPU holds fewer sequences, there are more micro-batches than GRAD_ACCUM_TOTAL: the same step.
    """
    rows, ranks = config.step_seqs, world_size()
    if rows % ranks:
        step = f"the {rows} sequences of a step (TRAIN_BATCH_TOKENS / {config.row_tokens})"
        raise UserError(f"world_size={ranks} must divide {step}")
    mine = rows // ranks
    return mine, mine // max(at_once(config)["train"], 1)


def step_batches(run: Run, step: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of a step: inputs and targets (B, T) each."""
    c = run.config
    rows, parts = split_batch(c)
    first = step * c.step_seqs + rank() * rows
    starts = sequence_starts(c, run.train, first, rows)
    inputs, targets = run.train.sequences(starts, c.row_tokens, run.device)
    return list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))


class Loader:
    """Batches of one step after the other, read and sent to the device a step ahead by a thread."""

    def __init__(self, run: Run):
        on_gpu = run.device.type == "cuda"
        # a new thread would use GPU 0
        start = partial(torch.cuda.set_device, run.device) if on_gpu else None
        self.run, self.pool, self.waited = run, ThreadPoolExecutor(1, initializer=start), 0.0
        self.ahead: dict[int, Future] = {}
        self.stream = torch.cuda.Stream(run.device) if on_gpu else None

    def _read(self, step: int) -> list[tuple[Tensor, Tensor]]:
        with torch.cuda.stream(self.stream):  # of None: nothing
            return step_batches(self.run, step)

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """step_batches of a step; `waited` adds up the seconds until they are there."""
        began = time.perf_counter()
        batches = (self.ahead.pop(step, None) or self.pool.submit(self._read, step)).result()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
            for tensor in (tensor for batch in batches for tensor in batch):
                tensor.record_stream(torch.cuda.current_stream())
        self.waited += time.perf_counter() - began
        self.ahead = {step + 1: self.pool.submit(self._read, step + 1)}
        return batches

    def failure(self) -> Exception | None:
        """The error in which reading ahead ended, if it did."""
        return next((future.exception() for future in self.ahead.values() if future.done()), None)


class Stopped(Exception):
    """The run has stopped on a signal; its argument is the number."""


class StopSignals:
    """Note SIGTERM, SIGINT, SIGHUP, and a torchrun that is gone, to be obeyed after a step."""

    def __init__(self, environ: Mapping[str, str]):
        self.noted, self.parent = 0, os.getppid() if "TORCHELASTIC_RUN_ID" in environ else 0

    def __enter__(self) -> StopSignals:
        wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self.before = {number: signal.getsignal(number) for number in wanted}
        for number, before in self.before.items():
            if before != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        for number, before in self.before.items():
            signal.signal(number, before)
        if self.noted and kind is None:  # after the last step that could obey
            os.kill(os.getpid(), self.noted)

    def _note(self, number: int, _: Any) -> None:
        self.noted = number

    def number(self) -> int:
        """The signal to obey; 0: none."""
        return signal.SIGTERM if self.parent and os.getppid() != self.parent else self.noted


CHECKPOINT = "checkpoint.pt"  # torch.save's bytes, which torch.load reads, and their SHA-256 behind them
CHECKPOINT_FORM = {
    "config": {str: str | float | int}, "code": {str: str}, "data": str, "tokenizer": str, "ranks": int,
    "phase": str, "step": int, "done": {str: [float]}, "seconds": float, "strict": float, "resumed": [int],
    "earlier_code?": [{"until_step": int}], "model": {str: Tensor}, "looped": bool, "rates": {}, "parts": {},
}  # fmt: skip
IGNORED_ON_RESUME = "run_id resume checkpoint_every dist_timeout train_log_every val_loss_every".split()
MAY_CHANGE_ON_RESUME = (  # with a note: contents are compared in place of names, or they act afterwards
    "data_path train_files val_files tokenizer_path attention use_compile compressor eval_stride "
    "eval_batch_seqs model_path eval_budget_seconds audit_tokens"
).split()
DATA_FAILED = 255  # beside the numbers of signals


class Progress:
    """Progress of a run, and its checkpoint.

    `done`: steps of each finished phase, and the clock's seconds at its end. A checkpoint is for any number
    of ranks: the phase's parts (whatever has a state_dict), the model, Meta-SGD's factors, and the clock.
    """

    def __init__(
        self, run: Run, model: GPT, rates: MetaRates, clock: Any, signals: StopSignals, strict: Callable
    ):
        self.run, self.model, self.rates = run, model, rates
        self.clock, self.signals, self.strict = clock, signals, strict
        self.done: dict[str, list] = {}
        self.resumed: list[int] = []  # steps of the checkpoints from which the run was resumed
        self.earlier_code: list[dict[str, Any]] = []  # hashes of other versions that trained up to a step
        self.saved: dict[str, Any] | None = None  # the checkpoint, until its phase begins
        self.phase, self.parts = "", {}
        self.first, self.checked = 0, 0.0
        self.asked, self.failure = 0, None
        self.origin = dict(
            config=asdict(run.config), code=code_hashes(), data=run.train.fingerprint(), ranks=world_size(),
            tokenizer=run.tokenizer_sha256,
        )  # fmt: skip

    def resume(self, saved: dict[str, Any] | None) -> None:
        """Continue from what read_checkpoint returned, or begin."""
        run = self.run
        if saved is None or saved["phase"] == "train":
            on_rank_0(lambda: run.log.forget_after(saved["step"] if saved else 0))
        if saved is None:
            return
        self.saved, self.done, self.clock.total = saved, saved["done"], saved["seconds"]
        self.resumed = [*saved["resumed"], saved["step"]]
        with decoding(run.folder / CHECKPOINT, "a checkpoint of this model"):
            self.model.load_state_dict(saved["model"])
            self.rates.load_state_dict(saved["rates"])
        self.model.looped = saved["looped"]
        phase = saved["phase"] or f"after {', '.join(self.done)}"
        ranks = f"world_size:{world_size()} (was {saved['ranks']})"
        run.log.line(f"resumed: phase:{phase} step:{saved['step']} {ranks}")
        for name in MAY_CHANGE_ON_RESUME:
            if (then := saved["config"].get(name)) != (now := getattr(run.config, name)):
                run.log.line(f"note: {name.upper()}={now}, before the checkpoint {then}")
        self.earlier_code = saved.get("earlier_code", [])
        if saved["code"] != self.origin["code"]:
            earlier = dict(until_step=saved["step"], phase=phase, sha256=saved["code"])
            self.earlier_code = [*self.earlier_code, earlier]
            run.log.line("WARNING: other code wrote the checkpoint; its source is kept in source_until_*")

    def begin(self, phase: str, parts: Mapping[str, Any]) -> int:
        """Begin a phase, or load its parts from the checkpoint. Returns the steps done."""
        self.phase, self.parts, self.checked = phase, parts, self.clock.seconds()
        if self.saved is None or self.saved["phase"] != phase:
            return 0
        with decoding(self.run.folder / CHECKPOINT, f"a checkpoint of phase {phase}"):
            for name, part in parts.items():
                part.load_state_dict(self.saved["parts"][name])
        self.first, self.saved = self.saved["step"], None
        return self.first

    def finish(self, step: int) -> None:
        """End the phase after `step` steps, with a checkpoint in case export or scoring fails."""
        self.check_replicas(step)
        check_finite(f"after step {step}", dict(self.model.named_parameters()))
        self.done[self.phase] = [step, self.seconds()]
        self.phase, self.parts = "", {}
        self.checkpoint(step, due=True)

    def seconds(self, failure: Exception | None = None) -> float:
        """Clock seconds, identical on all ranks, and whether any rank has to stop; a collective.

        A rank has to stop after a signal, or if reading its next batch raised `failure`.
        """
        self.failure = failure
        asked = DATA_FAILED if failure else self.signals.number()
        elapsed, asked = max_over_ranks(self.clock.seconds(), asked)
        self.asked = int(asked)
        return elapsed

    def checkpoint(self, step: int, due: bool) -> None:
        """Write a checkpoint if it is due, or if any rank has to stop.

        Raises Stopped for a signal, and the error of the rank whose data failed (on the others a UserError).
        """
        saved = self.save(step) if due or self.asked else True
        if self.asked == DATA_FAILED:
            raise self.failure or UserError(f"step {step}: another process could not read its data")
        if self.asked:
            then = ". RESUME=auto goes on from there" if saved else ", WITHOUT a checkpoint of it"
            self.run.log.line(f"stopped: {signal.Signals(self.asked).name} after step:{step}{then}")
            raise Stopped(self.asked)

    @contextmanager
    def kept(self, step: int) -> Iterator[None]:
        """Write a checkpoint of one rank if data cannot be read after `step` steps; several save together.

        They write theirs if the error was known at their last collective (`seconds`).
        """
        try:
            yield
        except (UserError, OSError):
            if step > 0 and world_size() == 1:
                self.save(step)
            raise

    def check_replicas(self, step: int) -> None:
        """RuntimeError if the ranks do not hold the same weights."""
        if names := differing_parameters(self.model):
            raise RuntimeError(f"step {step}: the ranks differ in {', '.join(names)}")

    def check_loader(self, step: int, waited: float) -> None:
        """Warn if training waited for data for much of the time since the last call."""
        now = self.clock.seconds()
        seconds, self.checked = now - self.checked, now
        if step > self.first + 10 and waited > 0.05 * seconds:
            share = f"{waited / seconds:.0%} of the last {seconds:.1f} s"
            self.run.log.line(f"WARNING: data loading stalled training for {share}")

    def save(self, step: int) -> bool:
        """Write the checkpoint, all ranks together. Returns False if it could not be written."""
        self.clock.settle()
        self.check_replicas(step)
        self.clock.stop()
        began = time.perf_counter()
        content = dict(
            **self.origin, phase=self.phase, step=step, done=self.done, seconds=self.clock.seconds(),
            strict=self.strict(), resumed=self.resumed, earlier_code=self.earlier_code,
            model=self.model.state_dict(), looped=self.model.looped, rates=self.rates.state_dict(),
            parts={name: part.state_dict() for name, part in self.parts.items()},
        )  # fmt: skip
        path = self.run.folder / CHECKPOINT

        def write() -> str:
            try:
                blob = saved_bytes(content)
                write_atomically(path, blob + hashlib.sha256(blob).digest())
            except OSError as error:
                return f"WARNING: no checkpoint: {error}"
            return f"checkpoint: step:{step} {path.stat().st_size} bytes {time.perf_counter() - began:.2f}s"

        line = on_rank_0(write)
        self.run.log.line(line)
        self.clock.start()
        return line.startswith("checkpoint")


def check_same_settings(theirs: Mapping[str, Any], config: Config, path: Path) -> None:
    """UserError if what `path` holds, of a run with the settings `theirs`, is not what `config` asks for."""
    free = {*IGNORED_ON_RESUME, *MAY_CHANGE_ON_RESUME}
    ours = ((name, value) for name, value in asdict(config).items() if name not in free)
    if other := [f"{k.upper()}={theirs.get(k)} there, {v} here" for k, v in ours if theirs.get(k) != v]:
        raise UserError(f"{path} was saved with different settings: {'; '.join(other)}")


def read_checkpoint(run: Run) -> dict[str, Any] | None:
    """The run's checkpoint, None without one or for RESUME=never. UserError: broken, or of another run."""
    path, c = run.folder / CHECKPOINT, run.config
    if c.resume == "never" or not os.path.lexists(path):
        return None
    with decoding(path, "a valid checkpoint"):
        blob = read_file(path, STATE_FILE)
        if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
            raise UserError("its checksum does not match, the file is truncated or altered")
        saved = load_tensors(io.BytesIO(blob[:-32]))
        check_form(saved, CHECKPOINT_FORM, "content")
        if saved["phase"] not in ("", *c.phases) or any(len(pair) != 2 for pair in saved["done"].values()):
            raise UserError(f"phase {BRIEF.repr(saved['phase'])}, {BRIEF.repr(saved['done'])}")
    check_same_settings(saved["config"], c, path)
    if saved["data"] != run.train.fingerprint():
        raise UserError(f"{path} was saved with other training shards than {run.train.pattern} has now")
    if saved["tokenizer"] != run.tokenizer_sha256:
        raise UserError(f"{path} was saved with another tokenizer than TOKENIZER_PATH={c.tokenizer_path}")
    return saved


def train_step(
    loss_fn: Callable,
    model: GPT,
    batches: Sequence[tuple[Tensor, Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    scale: float,
    momentum: float,
    round_banks: bool = False,
    loss: Tensor | None = None,
) -> StepMetrics:
    """Take one optimizer step on micro-batches of equal size; returns the mean loss and gradient norms.

    Gradients are averaged over micro-batches and ranks and added to those that are there (of a meta-step),
    then clipped, so that the number of ranks changes nothing. loss: of a step without micro-batches, all of
    whose gradients are there.
    """
    muon, adamw = optimizers
    total = torch.zeros((), device=model.tok_emb.weight.device) if loss is None else loss

    # Loss and backward. The banks are cast, fused and, with round_banks, rounded once for all micro-batches,
    # whose gradients are added up in float32: in bfloat16 the last of many would be lost.
    if batches:
        banks = model.banks()
        if round_banks:  # straight through: the gradients are those of the banks (arXiv 1308.3432)
            banks = {n: b + (fake_quantize(b, model.config) - b.detach()) for n, b in banks.items()}
        weights = model.weights(banks)
        leaves = Weights(*(part.detach().to(model.dtype).requires_grad_() for part in weights))
        sums = [torch.zeros_like(part) for part in weights]
        for input_ids, targets in batches:
            loss = loss_fn(model, input_ids, targets, leaves) / len(batches)
            loss.backward()
            total += loss.detach()
            for gradient, leaf in zip(sums, leaves, strict=True):
                gradient += leaf.grad
                leaf.grad = None
        torch.autograd.backward(weights, sums)

    # Reduction: banks by rows, a reduce-scatter each; everything else in one all-reduce. Nothing waits before
    # all is on its way. Parameters without a gradient (scales of blocks that are not yet used) are left out.
    names = {p: name for name, p in model.named_parameters() if p.grad is not None}
    shards = [shard for shard in muon.shards if shard.ranks > 1]
    waits = [shard.start_reduce() for shard in shards]
    small = [p for p in names if p.grad is not None]
    *reduced, total = sum_over_ranks([*(p.grad for p in small), total])
    for p, gradient in zip(small, reduced, strict=True):
        p.grad = gradient.div_(world_size())
    for wait in waits:
        wait()

    # Clip by the norm of the whole reduced gradient, of which each rank has its rows of the banks.
    gradients = [*(shard.gradient for shard in shards), *(p.grad for p in small)]
    norms = torch.stack(torch._foreach_norm(gradients))
    if shards:
        squares = norms[: len(shards)].square()
        dist.all_reduce(squares)
        norms = torch.cat((squares.sqrt(), norms[len(shards) :]))
    if limit := model.config.grad_clip_norm:
        torch._foreach_mul_(gradients, (limit / (torch.linalg.vector_norm(norms) + 1e-6)).clamp(max=1.0))

    # Muon, and AdamW while the banks' first updates are gathered.
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
            if "momentum" in group:
                group["momentum"] = momentum
    muon.step(overlap_fn=adamw.step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    told = [f"the gradient of {names[p]}" for p in [*(shard.bank for shard in shards), *small]]
    return StepMetrics(torch.cat(((total / world_size()).view(1), norms)), ["train_loss", *told], scale)


class Moment(NamedTuple):
    """Position in a phase before a step: its number from 0, and `elapsed` of `budget` seconds (0: no clock).

    left: fraction of the phase that is left by steps or by the clock, the lesser, with time for a step more.
    """

    step: int
    elapsed: float
    budget: float
    left: float


def moment(step: int, count: int, elapsed: float, budget: float, ahead: int, prepared: float = 0.0) -> Moment:
    """The Moment before step `step` of `count`.

    ahead: steps started but not yet in `elapsed`; prepared: seconds of `elapsed` before the first step.
    """
    timed = (elapsed + ahead * (elapsed - prepared) / step) / budget if step and budget else 0.0
    return Moment(step, elapsed, budget, 1 - max(step / count, timed - 1e-9))  # what just fits is taken


class Phase(NamedTuple):
    """A part of a run, as the loop of `train` sees it.

    parts: what has a state_dict, for the checkpoint. finish: called after the last step. loader: reads ahead.
    """

    step: Callable[[Moment], StepMetrics]
    parts: Mapping[str, Any] = MappingProxyType({})
    finish: Callable[[], None] = lambda: None
    loader: Loader | None = None


def training_phase(run: Run, model: GPT, loss_fn: Callable, nll_fn: Callable, rates: MetaRates) -> Phase:
    """Training itself: schedules, FOMAML's term if it is due, the step, the average of the weights."""
    c = replace(run.config, iterations=max(1, round(run.config.iterations * run.config.phases["train"])))
    optimizers, average, loader = make_optimizers(model, c), WeightAverage(model, c), Loader(run)
    parts = dict(muon=optimizers[0], adamw=optimizers[1], average=average)
    if c.ema_nesterov_beta:
        parts["nesterov"] = EMANesterov(model, c)
    if model.piece is not None:
        parts["pieces"] = PieceSchedule(model, c)
    if c.meta_ttt_enabled and c.meta_ttt_objective == "fomaml":
        parts["fomaml"] = inner_weights(model, c, "fomaml")

    def step(now: Moment) -> StepMetrics:
        number, *clock = now[:3]
        remaining, total = run_length(c, number, *clock)
        done = 1 - remaining / total
        if not model.looped and done >= c.loop_start_frac - 1e-9:
            model.start_loop()
            start_repeats(model, average.ema or ())
            if "nesterov" in parts:
                parts["nesterov"].start_loop(model)
            run.log.line(f"depth_recurrence:on step:{number + 1}")
        pace_known = 10 if now.budget and c.iterations >= c.warmdown_iters else 0
        if number == pace_known and (short := short_run_warning(c, number, *clock)):
            run.log.line(f"WARNING: {short}")
        scale = lr_scale(c, number, *clock)
        rewarm = parts["pieces"].begin_step(number, done) if "pieces" in parts else 1.0
        batches = loader.batches(number)
        if model.loss_weights is not None:
            model.loss_weights.copy_(torch.tensor(loss_weights(c, done)), non_blocking=True)
        if "nesterov" in parts:
            parts["nesterov"].move(done)
        if "fomaml" in parts and number % c.meta_ttt_every == 0 and scale > c.meta_ttt_min_scale:
            losses = fomaml_step(model, parts["fomaml"], rates, *meta_sequences(batches, c), nll_fn)
            rates.step(scale)
            if number < 3 * c.meta_ttt_every or number % c.train_log_every < c.meta_ttt_every:
                means = sum_over_ranks([loss.view(1) / world_size() for loss in losses if loss is not None])
                named = zip(("before", "after")[-len(means) :], means, strict=True)
                losses = " ".join(f"{name}:{mean.item():.5f}" for name, mean in named)
                run.log.line(f"meta_step:{number + 1} {losses}{rates_text(rates.factors())}")
        round_banks = c.late_qat and scale < c.late_qat_threshold
        rate, momentum = scale * rewarm, momentum_at(c, number)
        metrics = train_step(loss_fn, model, batches, optimizers, rate, momentum, round_banks)
        if "nesterov" in parts:
            parts["nesterov"].observe(rate)
        average.update(number + 1, scale)
        return metrics

    def finish() -> None:
        run.log.line(f"average: {average.apply()}")
        if not model.looped:
            model.start_loop()  # the artifact's model is the whole one

    return Phase(step, parts, finish, loader)


def phase_generator(config: Config, phase: int, step: int) -> np.random.Generator:
    """Random generator of a step of a late phase: the same wherever the run was resumed."""
    return np.random.default_rng([config.seed, 1 + phase, step])


def reptile_phase(run: Run, model: GPT, loss_fn: Callable, nll_fn: Callable, rates: MetaRates) -> Phase:
    """Reptile's step on sequences from random positions of the text, at a constant rate as in #294."""
    c, fast = run.config, inner_weights(model, run.config, "reptile")

    def step(now: Moment) -> StepMetrics:
        size = (c.reptile_inner_steps, world_size() * fast.sets)
        starts = phase_generator(c, 0, now.step).integers(len(run.train), size=size)
        mine = np.split(starts, world_size(), axis=1)[rank()]
        read = partial(run.train.read, count=c.train_seq_len + 1)
        rows = np.array([[read(int(start)) for start in line] for line in mine])
        loss = reptile_step(model, fast, torch.from_numpy(rows).to(run.device), nll_fn)
        return StepMetrics(loss.view(1), ["the loss of Reptile"])

    return Phase(step)


def deployed_phase(run: Run, model: GPT, loss_fn: Callable, nll_fn: Callable, rates: MetaRates) -> Phase:
    """Training for the evaluator's steps, with optimizers of its own, at rates that fall to zero."""
    c, optimizers = run.config, make_optimizers(model, run.config)
    fast = inner_weights(model, c, "deployed")
    if fast.wants_prior:
        fast.moments.start = generated_moments(model, c, fast.sets, nll_fn)

    def step(now: Moment) -> StepMetrics:
        generator = phase_generator(c, 1, now.step)
        rows, sizes = sample_documents(run.train, world_size() * fast.sets, c, generator)
        loss = deployed_step(model, fast, rates, rows, sizes, nll_fn)
        rates.step(now.left)
        scale = c.meta_ttt_outer_lr * now.left
        return train_step(loss_fn, model, [], optimizers, scale, c.muon_momentum, loss=loss)

    return Phase(step, dict(muon=optimizers[0], adamw=optimizers[1], fast=fast))


def mfu(config: Config, device: torch.device, tokens_per_second: float) -> str:
    """For the bar: the share of a GPU's peak, if records/describe.py is there and knows the GPU."""
    describe = project_module("describe") if device.type == "cuda" else None
    return describe.mfu_text(config, device, tokens_per_second) if describe else ""


PHASES = {"train": training_phase, "reptile": reptile_phase, "deployed": deployed_phase}


def train(
    run: Run, model: GPT, loss_fn: Callable, nll_fn: Callable, reserve: float, progress: Progress
) -> None:
    """Run the phases that are left, each for its fraction of the steps and of the clock less `reserve`.

    The model then holds what is exported. The clock runs on, for what else reads training data.
    """
    c, clock, log = run.config, progress.clock, run.log
    began, share = 0.0, 0.0
    for name, frac in c.phases.items():
        share += frac
        if name in progress.done:
            began = progress.done[name][1]
            continue
        is_main, count = name == "train", max(1, round(c.iterations * frac))
        usable = (c.max_wallclock_seconds - reserve) * share - began
        budget = max(usable, 1e-9) if c.max_wallclock_seconds else 0.0
        entered = progress.seconds()
        phase = PHASES[name](run, model, loss_fn, nll_fn, progress.rates)
        step, log.bar = progress.begin(name, phase.parts), progress_bar(name, 1.0)
        prepared = progress.seconds() - entered  # such as for generated text: no part of a step's time
        now = moment(step, count, progress.seconds() - began, budget, 1 + clock.lag, prepared)
        while True:
            if is_main and now.left <= 0 and step < count:
                seconds = began + now.elapsed
                at = f"train_time:{1000 * seconds:.0f}ms step:{step}/{count}"
                log.line(f"stopping_early: wallclock_cap {at}")
            if is_main and c.val_loss_every and (now.left <= 0 or step % c.val_loss_every == 0):
                clock.stop()
                result = run.score(model, c.eval_seq_len, nll_fn)
                log.step(step, count, progress.seconds(), val_loss=result.val_loss, val_bpb=result.val_bpb)
                clock.start()
                progress.checkpoint(step, due=False)
            if now.left <= 0:
                break
            with progress.kept(step):  # every kind of step reads its data before it changes anything
                metrics = phase.step(now)
            step += 1
            clock.step_done(step, metrics)
            reads_on = phase.loader is not None and step < count
            elapsed = progress.seconds(phase.loader.failure() if reads_on else None) - began
            now = moment(step, count, elapsed, budget, 1 + clock.lag, prepared)
            if is_main and (step <= 10 or step % c.train_log_every == 0):
                [waited], phase.loader.waited = max_over_ranks(phase.loader.waited), 0.0
                loss, norm = metrics.loss.item(), metrics.values[1:].norm().item()
                also = dict(lr_scale=metrics.lr_scale, data_wait=waited, grad_norm=norm)
                log.step(step, count, elapsed, also, train_loss=loss)
                pace = step * c.train_batch_tokens / max(elapsed, 1e-9)
                log.bar.set_postfix_str(f"loss {loss:.3f}, {pace:,.0f} tokens/s{mfu(c, run.device, pace)}")
                log.bar.update(1 - max(now.left, 0) - log.bar.n)
                progress.check_replicas(step)
                progress.check_loader(step, waited)
            elif not is_main and (step <= 3 or step % c.train_log_every == 0 or now.left <= 0):
                average = 1000 * (elapsed - prepared) / step
                times = f"train_time:{1000 * (began + elapsed):.0f}ms step_avg:{average:.2f}ms"
                loss, factors = metrics.loss.item(), rates_text(progress.rates.factors())
                log.line(f"{name}_step:{step}/{count} loss:{loss:.5f} {times}{factors}")
            progress.checkpoint(step, due=c.checkpoint_every > 0 and step % c.checkpoint_every == 0)
        log.bar.close()
        clock.settle()
        phase.finish()
        progress.finish(step)
        began = progress.done[name][1]


class RandomTokens:
    """Random tokens in place of training text: warm-up must not see the data."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.generator = vocab_size, np.random.default_rng(0)

    runs = np.array([[0, 1 << 40]])  # one shard without an end

    def __len__(self) -> int:
        return 1 << 20

    def read(self, start: int, count: int) -> np.ndarray:
        return self.generator.integers(BOS_ID + 1, self.vocab_size, count)

    sequences = TokenStream.sequences


def warm_up(run: Run, model: GPT, loss_fn: Callable, nll_fn: Callable) -> float:
    """Compile and load everything, then undo it; returns the seconds to keep for the statistics.

    It runs outside the clock: some steps of every phase on random tokens. They are cut as real ones are,
    since torch.compile guards on shapes, strides and whether two arguments are one tensor.
    """
    c, silent = run.config, SimpleNamespace(line=lambda text: None)
    random = replace(run, train=RandomTokens(c.vocab_size), log=silent)
    saved = [p.detach().clone() for p in model.parameters()]
    for model.looped in (False, True) if c.loop_start_frac else (True,):
        for name in c.phases if c.warmup_steps else ():
            if name == "train" or model.looped:
                phase = PHASES[name](random, model, loss_fn, nll_fn, MetaRates(model, c))
                for number in range(c.warmup_steps if name == "train" else 1):
                    phase.step(Moment(number, 0.0, 0.0, 1.0))
        if c.warmup_steps:
            warm_up_scoring(model, c, nll_fn)
    seconds = statistics_seconds(random, model)
    torch._foreach_copy_([p.detach() for p in model.parameters()], saved)
    model.looped = not c.loop_start_frac
    return seconds


@torch.no_grad()
def warm_up_scoring(model: GPT, config: Config, nll_fn: Callable) -> None:
    """One pass of non-overlapping windows, and one of sliding ones."""
    c, tokens = config, RandomTokens(config.vocab_size).read(0, config.eval_seq_len + 1)
    start = np.zeros(at_once(c)["score"], np.int64)
    for scored in (c.eval_seq_len, c.eval_stride):
        windows = Windows(start, start + c.eval_seq_len - scored, start + c.eval_seq_len)
        batch = make_batch(tokens, windows, power_of_two(scored), model.qo_bank.device)
        nll_fn(model, batch.ids, batch.targets, batch.positions)


def calibration_rows(config: Config) -> int:
    """Sequences of a calibration batch: those of a micro-batch."""
    return config.train_batch_tokens // config.grad_accum_total // config.train_seq_len


def calibration_batches(run: Run, model: GPT, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of `count` calibration batches (input ids, targets) from CALIB_SOURCE.

    Spread evenly over the training stream, or generated by the model; the validation text is not read.
    """
    c, length, rows = run.config, run.config.train_seq_len, calibration_rows(run.config)
    for batch in range(rank(), count, world_size()):
        if c.calib_source == "self":
            ids = generate(model, rows, length + 1, seed=(c.seed * count + batch) % 2**64)
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        else:
            starts = batch * len(run.train) // count + length * np.arange(rows)
            yield run.train.sequences(starts, length, run.device)


def read_statistics(run: Run, model: GPT) -> Statistics:
    """Collect the statistics that the export needs."""
    c, most = run.config, max(at_once(run.config)["statistics"], 1)
    hessians: dict[str, Tensor] = {}
    gradients: dict[str, tuple[Tensor, Tensor]] = {}
    if c.gptq_calib_batches:
        batches = calibration_batches(run, model, c.gptq_calib_batches)
        hessians = collect_hessians(model, (ids for ids, _ in batches), most)
    if c.wants_gradients:
        gradients = collect_gradients(model, calibration_batches(run, model, c.gptq_grad_batches), most)
    check_finite("Hessians", hessians)
    check_finite("gradients", {f"{name}, {side}": part for name, parts in gradients.items()
                               for side, part in zip(("rows", "columns"), parts, strict=True)})  # fmt: skip
    return Statistics(hessians, gradients)


def statistics_seconds(run: Run, model: GPT) -> float:
    """Seconds to reserve for the statistics: measured time per batch times batches, plus 50 % to read."""
    c, most, total = run.config, max(at_once(run.config)["statistics"], 1), 0.0
    rows, written = calibration_rows(c), min(c.train_seq_len, 32)
    gradients = c.gptq_grad_batches if c.wants_gradients else 0
    texts = (c.gptq_calib_batches + gradients) * c.train_seq_len / written if c.calib_source == "self" else 0
    ids, targets = run.train.sequences(np.arange(rows), c.train_seq_len, run.device)
    for count, work in (
        (c.gptq_calib_batches, lambda: collect_hessians(model, [ids], most)),
        (gradients, lambda: collect_gradients(model, [(ids, targets)], most)),
        (texts, lambda: generate(model, rows, written)),
    ):
        seconds = []
        for _ in range(3 if count else 0):
            began = time.perf_counter()
            work()
            synchronize(run.device)
            seconds.append(time.perf_counter() - began)
        total += max(seconds[1:], default=0.0) * math.ceil(count / world_size())  # the first loads kernels
    [slowest] = max_over_ranks(1.5 * total)
    return slowest


# ------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------

# From the environment to result.json: checks before anything is trained, the folder and its lock, the head of
# the log, export, and the score of the artifact as it is read back from disk. Every user error is one line.

TORCHRUN = dict(WORLD_SIZE=1, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_PORT=0)  # least, and default
SCORES = ("val_loss_roundtrip", "val_loss_sliding", "val_bpb_roundtrip", "val_bpb_sliding")
RESULT = dict.fromkeys(SCORES, float) | {"fits": bool, "sha256_artifact": str}


def process_start() -> float:
    """When the kernel started this process, on the clock of time.time(); now, if it does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - age
    except (OSError, AttributeError):
        return time.time()


def announced_ranks(environ: Mapping[str, str]) -> dict[str, int]:
    """The numbers that torchrun sets, by name. UserError for an incomplete or contradictory set."""
    found = {}
    for name, least in TORCHRUN.items():
        text = environ.get(name, str(least))
        if not re.fullmatch("[0-9]{1,5}", text) or not least <= int(text) < 1 << 16:
            raise UserError(f"{name}={BRIEF.repr(text)}: expected a whole number from {least} to 65535")
        found[name] = int(text)
    rank, size = found["RANK"], found["WORLD_SIZE"]
    if rank >= size:
        raise UserError(f"RANK={rank} of WORLD_SIZE={size}: ranks are 0 to WORLD_SIZE - 1")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if size > 1 and missing:
        raise UserError(f"WORLD_SIZE={size} without {', '.join(missing)}: start with torchrun")
    return found


def usable_cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: by its affinity, and by the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0))
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup 2 and 1
        with suppress(OSError, ValueError, ArithmeticError):  # no such file, "max", or a period of 0
            quota, period = map(int, " ".join((groups / name).read_text() for name in names).split())
            cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores


def start_ranks(config: Config, environ: Mapping[str, str]) -> torch.device:
    """Join the process group that torchrun announces, if any; returns this rank's device."""
    announced = announced_ranks(environ)
    device, local_rank = torch.device("cpu"), announced["LOCAL_RANK"]
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("DEVICE=cuda, but torch sees no GPU")
    if "OMP_NUM_THREADS" not in environ:  # the ranks of a machine share its cores
        threads = min(torch.get_num_threads(), usable_cores() // announced["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, threads))
    if config.device != "cpu" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"process {local_rank} of this machine has no GPU: there are {gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # TF32, exact for the Hessians' products of bfloat16 inputs
        torch.set_float32_matmul_precision("high")
    if announced["WORLD_SIZE"] > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        place = f"MASTER_ADDR={environ['MASTER_ADDR']} MASTER_PORT={environ['MASTER_PORT']}"
        with decoding(place, "where all processes meet"):
            dist.init_process_group(backend, timeout=timedelta(seconds=config.dist_timeout))
    return device


def make_run_folder(config: Config) -> tuple[Path, int]:
    """Make runs/RUN_ID; returns it, and it as an open file, which locks it.

    UserError if it cannot be made, has work in it (unless RESUME=auto), has links where the run writes, or is
    locked by a running job. A run that failed before its first step makes room: its log becomes failed.log.
    """
    folder = Path("runs") / (config.run_id or f"{datetime.now():%Y-%m-%d_%H-%M-%S}_seed{config.seed}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, 60.0 if config.resume == "auto" else 0.0)
        try:
            stale = [path for path in folder.iterdir() if re.fullmatch(r".+\.[0-9a-f]{16}\.tmp", path.name)]
            found = {path.name for path in folder.iterdir()} - {path.name for path in stale}
            metrics = folder / "metrics.jsonl"
            if metrics.name in found and b'"train_loss"' not in read_file(metrics, METRICS_FILE):
                found.remove(metrics.name)  # of a validation before the first step
            fresh = {"train.log", "config.json", "source", "failed.log", "track"}
            work = sorted(found - fresh if "source" in found else found)
            if work and config.resume == "never":
                raise UserError(f"{folder} already has {work[0]}: choose another RUN_ID, or RESUME=auto")
            if not work and (folder / "train.log").exists():
                os.replace(folder / "train.log", folder / "failed.log")
            for name in ("train.log", "metrics.jsonl", "source"):
                if (folder / name).is_symlink():
                    raise UserError(f"{folder / name} is a link out of the run's folder. Remove it.")
            for path in stale:  # of a process that was killed
                path.unlink()
        except BaseException:
            os.close(lock)
            raise
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}") from error
    return folder, lock


def lock_folder(folder: Path, seconds: float = 60.0) -> int:
    """Lock a folder, waiting up to `seconds`; returns the open file descriptor that holds the lock."""
    lock, began = os.open(folder, os.O_RDONLY), time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() - began > seconds:
                os.close(lock)
                raise UserError(f"{folder} is locked by a running job") from None
            time.sleep(0.2)
        except OSError as error:  # some network file systems
            told = f"{folder} cannot be locked ({error.strerror}): start no second job in it"
            print(f"WARNING: {told}", file=sys.stderr)
            return lock


def prepare_run(config: Config, notices: list[str], environ: Mapping[str, str]) -> Run:
    """Check everything that can be wrong with the data and the machine, then make the run folder."""
    device = start_ranks(config, environ)
    attention, kernel, attention_notices = choose_attention(config.attention, device)
    split_batch(config)
    check_memory(config, TRAINING_PARTS)
    byte_table = load_byte_table(config.tokenizer_path, config.vocab_size)
    tokenizer_sha256 = sha256_file(config.tokenizer_path)
    stream = TokenStream(config.shards("train"), config.vocab_size)
    shards = find_shards(config.shards("val"))
    byte_table = byte_table.with_sidecars(shards)
    check_listing(stream, tokenizer_sha256, "train")
    if config.data_order == "packed":
        sequence_starts(config, stream, 0, 1)  # UserError where no shard has a step
    if config.data_order == "shuffled" and len(stream) < config.train_seq_len:
        needed = f"a sequence of TRAIN_SEQ_LEN={config.train_seq_len}"
        raise UserError(f"{stream.pattern}: {len(stream)} tokens, fewer than {needed}")
    check_disjoint(stream, shards)
    early = read_validation(config, byte_table, tokenizer_sha256) if config.val_loss_every else None
    coder_package(config.compressor)  # or a UserError, before anything is trained
    folder, lock = on_rank_0(lambda: make_run_folder(config))
    log = RunLog(folder)
    for notice in [*notices, *attention_notices]:
        log.line(f"note: {notice}")
    used = library_versions(device, attention)
    if attention == "sdpa":
        used["attention_backend"] = attention_backend(config, kernel, device)
    run = Run(config, device, kernel, used, folder, lock, log, stream, byte_table, tokenizer_sha256)
    if early is not None:
        run.val_tokens = early[0]
        log.line(f"val_loader:shards pattern={config.shards('val')} tokens:{len(run.val_tokens) - 1}")
    return run


def keep_source(folder: Path, environ: Mapping[str, str], saved: dict[str, Any] | None) -> None:
    """Copy the running code and the recipe to source/, keeping the code that wrote the checkpoint."""
    source = folder / "source"
    if saved and saved["code"] != code_hashes() and source.is_dir():
        until = folder / f"source_until_{len(saved.get('earlier_code', [])) + 1}"
        if not until.exists():  # a resume that ended before its first checkpoint has moved it already
            os.replace(source, until)
    source.mkdir(exist_ok=True)
    for path in [*code_files(), *([Path(environ["RECIPE"])] if environ.get("RECIPE") else [])]:
        write_atomically(source / path.name, path.read_bytes())


def log_setup(run: Run, model: GPT, given: Mapping[str, Any]) -> None:
    """Log versions, settings, advice, data, and model in the lineage's dialect; write config.json."""
    c, log = run.config, run.log
    log.line(" ".join(f"{name}:{value}" for name, value in run.versions.items()))
    log.settings(asdict(c), given)
    advice = project_module("advice")
    for line in advice.before_training(run, model) if advice else ():
        log.line(line)
    log.line(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={c.tokenizer_path}")
    dataset = Path(c.shards("train")).parent.name
    log.line(f"train_loader:dataset:{dataset} train_shards:{len(run.train.paths)}")
    log.line(f"model_params:{count_parameters(model)}")
    log.line(f"world_size:{world_size()} grad_accum_steps:{split_batch(c)[1]}")
    for line in check_memory(c, TRAINING_PARTS):
        log.line(line)
    log.line(f"seed:{c.seed}")
    if rank() == 0:
        settings = dict(config=asdict(c), given=dict(given), versions=run.versions)
        write_atomically(run.folder / "config.json", json.dumps(settings, indent=1).encode())


def submission_sizes(config: Config, bytes_model: int, bytes_more: int = 0) -> dict[str, Any]:
    """Bytes of code and model: as the files stand, and packed (None without records/pack.py).

    bytes_more: of a mode of your own. fits: with CODE_BYTES, if that is set, for the code.
    """
    bytes_code = sum(file.stat().st_size for file in code_files()) + bytes_more
    packed = packer.packed_bytes(code_files()) if (packer := project_module("pack")) else None
    sizes = dict(bytes_code=bytes_code, bytes_model=bytes_model, bytes_total=bytes_code + bytes_model)
    sizes["bytes_total_packed"] = packed and packed + bytes_more + bytes_model
    return sizes | dict(fits=(config.code_bytes or bytes_code) + bytes_model <= SIZE_CAP)


def export(
    run: Run, model: GPT, statistics: Statistics, factors: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, Any]:
    """Write final_model.pt and the artifact on rank 0; returns and logs sizes and the artifact's hash."""
    c, state = run.config, {name: p for name, p in model.state_dict().items() if param_group(name).stored}
    write_atomically(run.folder / "final_model.pt", saved_bytes({name: p.cpu() for name, p in state.items()}))
    if c.meta_ttt_objective == "deployed":  # other objectives learn factors of an update that is not deployed
        logs = {f"factors.{bank}": factor.clamp(min=2.0**-100).log2() for bank, factor in factors.items()}
        state |= logs  # binary logarithms, which float16 keeps to 2 %
    specs = quant_specs(state, statistics, c, run.log.line)

    def build(scale_mult: float) -> bytes:
        return encode_artifact(c, quantize_by(state, specs, c, scale_mult), run.tokenizer_sha256)

    budget = SIZE_CAP - (c.code_bytes or submission_sizes(c, 0)["bytes_code"])
    blob, scale_mult = fit(build, budget) if c.fit_size else (build(1.0), 1.0)
    if c.fit_size:
        run.log.line(f"fit_size: scale_mult:{scale_mult:.4f}")
    write_atomically(run.folder / "final_model.int6.ptz", blob)
    sizes = submission_sizes(c, len(blob))
    run.log.line(f"Code size: {sizes['bytes_code']} bytes")
    run.log.line(f"Serialized model int6+{c.compressor}: {len(blob)} bytes")
    run.log.line(f"Total submission size int6+{c.compressor}: {sizes['bytes_total']} bytes")
    if not sizes["fits"]:
        run.log.line(f"WARNING: over the cap of {SIZE_CAP} bytes by {len(blob) - budget}")
    return sizes | dict(step_factor=scale_mult, sha256_artifact=hashlib.sha256(blob).hexdigest())


def score_artifact(run: Run, nll_fn: Callable) -> dict[str, Any]:
    """Read the artifact back from disk into a new model and score it: non-overlapping, then sliding.

    eval_seconds: reading and the sliding score, without the score it is compared with.
    """
    began, values = time.perf_counter(), {}
    artifact = on_rank_0(lambda: read_artifact(run.folder / "final_model.int6.ptz"))
    model = load_model(artifact, run.device, run.kernel, run.byte_table.has_leading_space)
    loaded = time.perf_counter() - began
    for name, label, stride in (
        ("roundtrip", "final_int6_roundtrip", run.config.eval_seq_len),
        ("sliding", "final_int6_sliding_window", run.config.eval_stride),
    ):
        result = run.score(model, stride, nll_fn)
        tokenizer, shards = run.config.tokenizer_path, find_shards(run.config.shards("val"))
        on_rank_0(lambda r=result: check_score(r.val_loss, r.val_bpb, r.nll, shards, tokenizer))  # noqa: B023
        run.log.line(f"{label}_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}")
        values |= {f"val_loss_{name}": result.val_loss, f"val_bpb_{name}": result.val_bpb}
    return values | dict(eval_seconds=loaded + result.seconds)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Result of a finished run; None without one. UserError if it is not of the artifact beside it."""
    path = folder / "result.json"
    if not os.path.lexists(path):
        return None
    with decoding(path, "the result of a finished run (delete it to go on from the checkpoint, or to begin)"):
        result = parse_json(read_file(path), RESULT, "content")
        if result["sha256_artifact"] != sha256_file(folder / "final_model.int6.ptz"):
            raise UserError("sha256_artifact is not that of final_model.int6.ptz")
    return result


def run_all(config: Config, given: Mapping[str, Any], notices: list[str], environ: Mapping[str, str]) -> int:
    """Run, or say that the run is finished; returns the exit code."""
    began, signals, track = process_start(), StopSignals(environ), nullcontext
    if environ.get("TRACK"):
        if (module := project_module("track")) is None:
            raise UserError("TRACK needs records/track.py beside train_gpt.py: unset it")
        track = module.tracker(environ)
    run = prepare_run(config, notices, environ)
    try:
        result = on_rank_0(lambda: read_result(run.folder))
        if result is not None:
            path = run.folder / "config.json"
            theirs = on_rank_0(lambda: parse_json(read_file(path), {"config": {}}, path))
            check_same_settings(theirs["config"], config, path)
            run.log.line(f"note: {run.folder}: run already finished, nothing to do")
        else:
            with track(run.folder):
                result = finish_run(run, given, environ, signals, began)
    finally:
        if rank() == 0:
            os.close(run.lock)
    return 0 if result["fits"] else 1


def finish_run(
    run: Run, given: Mapping[str, Any], environ: Mapping[str, str], signals: StopSignals, began: float
) -> dict[str, Any]:
    """Train, export, read back, score, report, or what a checkpoint has left of that; returns the result.

    began: start of the process, time.time().
    """
    config, saved = run.config, on_rank_0(lambda: read_checkpoint(run))
    on_rank_0(partial(keep_source, run.folder, environ, saved))
    model = GPT(config, compute_dtype(run.device), run.kernel, run.byte_table.has_leading_space)
    model = model.init_weights(config.seed).to(run.device)
    if model.prefixes is not None:
        model.prefixes.copy_(torch.from_numpy(prefix_tokens(config.tokenizer_path)))
    if world_size() > 1:
        # the initial matrices come from LAPACK, which differs between processors
        for parameter in model.parameters():
            dist.broadcast(parameter.detach(), 0)
    log_setup(run, model, given)
    if config.warmup_steps:
        run.log.line(f"warm-up: {config.warmup_steps} steps on random tokens, outside the clock")
    warn = lambda text: run.log.line(f"WARNING: {text}")  # noqa: E731
    loss_fn = maybe_compile(training_loss, config, run.device, warn)
    nll_fn = maybe_compile(token_nll, config, run.device, warn)
    reserve = warm_up(run, model, loss_fn, nll_fn)
    run.log.line(f"gptq:reserving {reserve:.2f}s")
    clock, rates, earlier = Clock(run.device), MetaRates(model, config), saved["strict"] if saved else 0.0
    progress = Progress(run, model, rates, clock, signals, lambda: earlier + time.time() - began)
    progress.resume(saved)
    del saved
    clock.start()
    with signals:
        train(run, model, loss_fn, nll_fn, reserve, progress)
    statistics = read_statistics(run, model)
    clock.stop()
    if run.device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        run.log.line(f"peak memory allocated: {peak >> 20} MiB reserved: {reserved >> 20} MiB")
    sizes = on_rank_0(lambda: export(run, model, statistics, rates.factors()))
    return report(run, progress, score_artifact(run, nll_fn) | sizes)


def report(run: Run, progress: Progress, measured: dict[str, Any]) -> dict[str, Any]:
    """Log, write, and return the result: `measured` scores and sizes, and times, steps, and hashes."""
    config, (steps, loop_seconds) = run.config, progress.done["train"]
    [train_seconds] = max_over_ranks(progress.clock.seconds())
    late = {name: done for name, (done, _) in progress.done.items() if name != "train"}
    pace = dict(step_avg_ms=1000 * loop_seconds / steps)
    pace["tokens_per_second"] = steps * config.train_batch_tokens / loop_seconds
    result = dict(**measured, train_seconds=train_seconds, strict_seconds=progress.strict(), steps=steps)
    result |= pace | dict(
        model_params=count_parameters(progress.model), late_steps=late, versions=run.versions
    )
    result |= dict(meta_rates=progress.rates.report(), seed=config.seed, world_size=world_size())
    result |= dict(resumed=progress.resumed, earlier_code=progress.earlier_code, legal=True)
    result |= dict(sha256_code=progress.origin["code"], sha256_tokenizer=run.tokenizer_sha256)
    if 0 < config.max_wallclock_seconds < train_seconds:
        run.log.line(f"WARNING: {train_seconds:.3f} s is over MAX_WALLCLOCK_SECONDS")
    run.log.line(f"clocks: contest {train_seconds:.1f}s strict {result['strict_seconds']:.1f}s")
    run.log.line("RESULT " + json.dumps(result))
    if rank() == 0:
        write_atomically(run.folder / "result.json", json.dumps(result, indent=1).encode())
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
    return result


def described(what: str, subject: Any) -> str:
    """Text of records/describe.py; without it (in a record's folder) a short form of the same."""
    if (describe := project_module("describe")) is not None:
        return getattr(describe, what)(subject)
    if what == "help_text":
        return subject + "\nEvery setting: Config in train_gpt.py, or --help in the project."
    with torch.device("meta"):
        return f"model_params:{count_parameters(GPT(subject))}"


def exits(main: Callable[..., int]) -> Callable[..., int]:
    """Give a program exit codes, and one line on standard error, in place of what it raises.

    0: done, 1: failed or over the cap, 2: user error, 128 + n: signal.
    """

    @wraps(main)
    def call(argv: list[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if argv is None else argv, os.environ if environ is None else environ)
        except Stopped as stopped:
            cleanup_distributed()
            return 128 + stopped.args[0]
        except KeyboardInterrupt:  # outside of training, which notes it
            code, line = 128 + signal.SIGINT, "stopped: SIGINT"
        except (ArithmeticError, MemoryError, OSError, RuntimeError, UnicodeError, UserError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):  # as torch is out of memory
                raise
            code = 2 if isinstance(error, (UserError, UnicodeError)) else 1
            line = f"error: {str(error) or 'out of memory'}"
        print(shown(line), file=sys.stderr, flush=True)
        return code

    return call


@exits
def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command line, sys.argv and os.environ by default."""
    argv, environ = with_arguments(argv, environ)
    if argv not in ([], ["--help"], ["--describe"]):
        raise UserError(f"unknown arguments {' '.join(argv)}: settings are NAME=VALUE, see --help")
    if argv == ["--help"]:
        print(described("help_text", __doc__ or ""))
        return 0
    config, given, notices = load_config(environ)
    if argv:
        print(described("describe", config))
        return 0
    code = run_all(config, given, notices, environ)
    cleanup_distributed()
    return code


if __name__ == "__main__":
    sys.modules["train_gpt"] = sys.modules["__main__"]  # one module, whoever in records/ imports it
    sys.exit(main())
