"""The recipes of published systems: parameter counts,
settings, published environments, settings of later parts.

Expected values are written from the sources: the environment of each published run, with the defaults of its
script where they are not ours, and what its code fixes under the name that it has here.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_config import PR549, PR1019, environment, problems

import train_gpt
from train_gpt import Config, load_config

PR1501 = """
    VAL_BATCH_SIZE=262144 VAL_LOSS_EVERY=3000 TRAIN_LOG_EVERY=500 ITERATIONS=7500 WARMDOWN_ITERS=2500
    WARMUP_STEPS=20 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 EVAL_SEQ_LEN=2048 MAX_WALLCLOCK_SECONDS=4800
    GRAD_ACCUM_TOTAL=8 SEED=42 VOCAB_SIZE=1024 NUM_LAYERS=11 NUM_KV_HEADS=4 MODEL_DIM=512 NUM_HEADS=8
    MLP_MULT=3.0 TIE_EMBEDDINGS=1 ROPE_BASE=10000 ROPE_DIMS=16 LOGIT_SOFTCAP=30 QK_GAIN_INIT=1.5 XSA_LAST_N=11
    LN_SCALE=1 DTG_ENABLED=0 GATED_ATTENTION=0 VALUE_RESIDUAL=0 MTP_NUM_HEADS=0 MTP_LOSS_WEIGHT=0.2
    BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=64 TRIGRAM=0 POS_CONDITIONAL_BIGRAM=1 VE_ENABLED=1 VE_DIM=128
    VE_LAYERS=7,8,9,10 EMBED_LR=0.6 HEAD_LR=0.008 TIED_EMBED_LR=0.035 TIED_EMBED_INIT_STD=0.005
    MATRIX_LR=0.025 SCALAR_LR=0.025 MUON_MOMENTUM=0.99 MUON_BACKEND_STEPS=5 MUON_MOMENTUM_WARMUP_START=0.92
    MUON_MOMENTUM_WARMUP_STEPS=1500 MOMENTUM_CYCLIC=0 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 GRAD_CLIP_NORM=0.3
    MUON_WD=0.04 ADAM_WD=0.04 EMA_ENABLED=1 EMA_DECAY=0.998 EMA_UPDATE_EVERY=10 SWA_ENABLED=1 SWA_EVERY=50
    LAWA_ENABLED=0 LAWA_K=10 LAWA_FREQ=100 ADAPTIVE_WARMDOWN=1 ADAPTIVE_WARMDOWN_EMA=0.99
    ADAPTIVE_WARMDOWN_THRESHOLD=0.0005 ADAPTIVE_WARMDOWN_MIN_STEPS=2000 QAT_ENABLED=0 LATE_QAT_THRESHOLD=0.25
    GPTQ_CALIB_BATCHES=256 GPTQ_BLOCK_SIZE=128 TARGET_MB=15.9 EVAL_STRIDE=64 EVAL_BATCH_SEQS=128 TTT_ENABLED=1
    TTT_LR=0.004 TTT_EPOCHS=4 TTT_CHUNK_TOKENS=65536 TTT_FREEZE_BLOCKS=2 TTT_MOMENTUM=0.9 TTT_BATCH_SEQS=16
    TTT_GRAD_CLIP=1.0 META_TTT_ENABLED=1 META_TTT_INNER_LR=0.002 META_TTT_EVERY=4 META_TTT_LOSS_WEIGHT=0.5
    META_TTT_FREEZE_BLOCKS=2 WORD_START_BOOST=1
"""
PR398 = """
    NUM_LAYERS=11 BIGRAM_VOCAB_SIZE=2048 XSA_LAST_N=0 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=0 ROPE_DIMS=16
    LN_SCALE=1 LATE_QAT=0 TTT_ENABLED=1 TTT_LR=0.008 TTT_EPOCHS=20 TTT_MOMENTUM=0.9 TTT_FREEZE_BLOCKS=0
    MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99
    MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 WARMDOWN_ITERS=3000 ITERATIONS=9000
    MAX_WALLCLOCK_SECONDS=600 EVAL_STRIDE=64 BIGRAM_DIM=128 TTT_BATCH_SEQS=32 TTT_GRAD_CLIP=1.0
"""
PR494 = """
    TRAIN_SEQ_LEN=1024 TRAIN_BATCH_TOKENS=524288 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=8
    MLP_HIDDEN=1792 BIGRAM_BUCKETS=8192 BIGRAM_EMBED_DIM=128 ROPE_DIMS=16 ROPE_BASE=10000 LN_SCALE=1
    QK_GAIN_INIT=1.5 LOGIT_SOFTCAP=30 TIED_EMBED_LR=0.035 MATRIX_LR=0.025 SCALAR_LR=0.025 DECODER_LR_MULT=2.0
    MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_WD=0.04
    ADAM_WD=0.04 GRAD_CLIP_NORM=0.0 WARMDOWN_ITERS=6000 EMA_DECAY=0.9985 SWA_START_FRAC=0.5 SWA_EVERY=50
    LATE_QAT=1 QAT_THRESHOLD=0.15 XSA_LAYERS=11 EVAL_STRIDE=64 EVAL_BATCH_SEQS=32 SEED=42 TTT_ENABLED=1
    TTT_LR=0.0005 TTT_EPOCHS=30 TTT_BATCH_SEQS=32 TTT_FREEZE_BLOCKS=0 TTT_MLP_ONLY=0 TTT_COSINE_DECAY=1
"""
PLAIN = (
    " MLP_LEAKY_SLOPE=0 VE_ENABLED=0"  # ReLU^2, no value embeddings: neither script has variables for them
)
PR294 = """
    MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 TRAIN_SEQ_LEN=1024 TRAIN_BATCH_TOKENS=524288 ITERATIONS=20000
    WARMDOWN_ITERS=3000 WARMUP_STEPS=20 MAX_WALLCLOCK_SECONDS=600 TIED_EMBED_LR=0.03 MATRIX_LR=0.02
    SCALAR_LR=0.02 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
    MUON_WD=0 ADAM_WD=0 GRAD_CLIP_NORM=0 EVAL_STRIDE=64 EVAL_SEQ_LEN=1024 SWA_ENABLED=1 SWA_START_FRAC=0.5
    SWA_EVERY=50 EMA_ENABLED=0 ROPE_DIMS=0 ROPE_NTK_LEN=0 LN_SCALE=0 XSA_LAST_N=0
""" + PLAIN  # fmt: skip
REPTILE = """
    REPTILE_ENABLED=1 REPTILE_TIME_FRAC=0.2 REPTILE_INNER_STEPS=3 REPTILE_INNER_LR=0.1 REPTILE_OUTER_LR=0.01
    REPTILE_LAYERS=9,10
    TTT_ENABLED=1 TTT_LR=0.01 TTT_STEPS_PER_CHUNK=1 TTT_VAL_FRAC=1.0
"""
RECYCLED = """
    NUM_LAYERS=3 BLOCK_ORDER=0,1,2,0,1,2,0,1,2,0,1,2 MODEL_DIM=768 NUM_HEADS=12 NUM_KV_HEADS=6 MLP_MULT=2
    OVERTONE_INIT=1 PHASE_RESID_MIX=1 ROPE_DIMS=0 ROPE_NTK_LEN=0 LN_SCALE=0 XSA_LAST_N=0 BIGRAM_VOCAB_SIZE=0
    SMEAR_GATE=0 TIED_EMBED_LR=0.06 MATRIX_LR=0.025 SCALAR_LR=0.025 MUON_MOMENTUM=0.95
    MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=500 ADAM_WD=0.01 MUON_WD=0.02
    WARMDOWN_ITERS=2500 TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=1024 GRAD_CLIP_NORM=0 EMA_ENABLED=0
    EVAL_SEQ_LEN=1024
""" + PLAIN  # fmt: skip
PR1855 = """
    VOCAB_SIZE=8192 CASEOPS_ENABLED=1 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 PHASED_TTT_ENABLED=1
    PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=3 EMBED_BITS=7 MATRIX_LR=0.026 MIN_LR=0.1
    MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=13.0 EMBED_CLIP_SIGMAS=14.0 GRAD_CLIP_NORM=0.3 TTT_CHUNK_SIZE=48
    WARMUP_STEPS=20 MUON_BACKEND_STEPS=5 GLOBAL_TTT_MOMENTUM=0.9 WARMDOWN_FRAC=0.85 BETA2=0.99 TTT_BETA2=0.99
    TTT_WEIGHT_DECAY=0.5 TTT_LORA_RANK=80 SPARSE_ATTN_GATE_SCALE=0.5 GPTQ_RESERVE_SECONDS=0.5
    GPTQ_CALIBRATION_BATCHES=16 VAL_LOSS_EVERY=0 GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1
    GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 LQER_ENABLED=1 LQER_ASYM_ENABLED=1 LQER_RANK=4 LQER_FACTOR_BITS=4
    LQER_ASYM_GROUP=64 LQER_TOP_K=3 FUSED_CE_ENABLED=1 COMPRESSOR=pergroup
"""
EXPORT = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
FIXED_1855 = f"""
    DATA_PATH=./data/datasets/{EXPORT} QK_GAIN_INIT=5 MLP_MULT=4 ROPE_NTK_LEN=0 BIGRAM_VOCAB_SIZE=0
    VE_ENABLED=0
    TOKENIZER_PATH=./data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model
    BLOCK_ORDER=0,1,2,3,4,5,3,4,5,3,4,5,6,7,8,9,10 LOOP_SHARED=1 ENABLE_LOOPING_AT=0.35 SKIP_GATES=1
    PARALLEL_START_LAYER=8 SMEAR_INPUTS=12 DOC_BORDERS=attention DATA_ORDER=packed MUON_MOMENTUM=0.97
    MUON_ROW_NORMALIZE=1 MUON_COEFFS=polar MUON_WD=0.095 TIED_EMBED_LR=0.03 EMBED_WD=0.085 SCALAR_LR=0.02
    SCALAR_WD=0.02 MIN_LR_SHAPE=floor EMA_DECAY=0.9965 QUANT_STEPS=sigmas GPTQ_EMBED=1 GLOBAL_TTT_GRAD_CLIP=1
"""
CHANGED_2014 = """
    QK_GAIN_INIT=5.25 TRAIN_SEQ_SCHEDULE=1024@.100,2048@.700,3072@1.000 SEQ_CHANGE_WARMUP_STEPS=32
    TRAIN_SEQ_LEN=3072 EVAL_SEQ_LEN=3072 PHASED_TTT_NUM_PHASES=1
"""
META_101 = " META_TTT_SPLIT=cut META_TTT_DELTA_WEIGHT=0 META_SGD_ENABLED=0"
META_106 = " META_TTT_SPLIT=batch META_TTT_DELTA_WEIGHT=0.3 META_SGD_ENABLED=1 META_SGD_LR=0.0"
SMEAR = " MLP_MULT=3 BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=128"
BARE = " MLP_MULT=2 BIGRAM_VOCAB_SIZE=0 SMEAR_GATE=0"

SYSTEMS = {  # the published variables, and what the code of the system fixes under the names that it has here
    "pr549": environment(PR549 + " BIGRAM_DIM=128"),
    "pr1019": environment(PR1019),
    "pr1501": environment(PR1501 + META_101),
    "pr1501_no_meta": {k: v for k, v in environment(PR1501).items() if k[:5] != "META_"}
                      | {"META_TTT_ENABLED": "0"},
    "pr1502": environment(PR1501 + META_106),
    "pr398": environment(PR398 + PLAIN + " TTT_PROTOCOL=adapt_first TTT_MODE=all"),
    "pr494": environment(PR494 + PLAIN + " TTT_PROTOCOL=adapt_first TTT_MODE=all STAR_RELU=1 SKIP_GATES=1 "
                         "BIGRAM_HASH=linear ROPE_NTK_LEN=0 EVAL_SEQ_LEN=1024"),
    "pr294_reptile": environment(PR294 + SMEAR + " NUM_LAYERS=11" + REPTILE),
    "pr294_depth10": environment(PR294 + BARE + " NUM_LAYERS=10"),
    "pr294_depth11": environment(PR294 + SMEAR + " NUM_LAYERS=11"),
    "pr294_depth13": environment(PR294 + BARE + " NUM_LAYERS=13"),
    "pr294_recycled": environment(RECYCLED),
    "pr1855": environment(PR1855 + FIXED_1855),
    "pr2014": environment(PR1855 + FIXED_1855) | environment(CHANGED_2014),
}  # fmt: skip
REFUSED = {  # of these variables, those of parts that are not here
    "pr1501": {"ADAPTIVE_WARMDOWN=1"},
    "pr1501_no_meta": {"ADAPTIVE_WARMDOWN=1"},
    "pr1502": {"ADAPTIVE_WARMDOWN=1"},
    "pr1855": {"LQER_ENABLED=1", "COMPRESSOR=pergroup"},
    "pr2014": {"LQER_ENABLED=1", "COMPRESSOR=pergroup"},
}
# What a recipe corrects. In the banked line late QAT and SWA did nothing, the trigger of the warmdown was
# noise, and calibration was on other text. A threshold, a number of steps or a block is left out where it
# would have no effect.
INERT = dict(late_qat=False, swa_enabled=False)
NOISE = dict(warmdown_shape="cosine", warmdown_frac=0.68, swa_enabled=False) | {
    name: getattr(Config, name) for name in ("warmdown_iters", "late_qat_threshold", "gptq_calib_batches")
}
CORRECTED = dict(
    pr549=INERT,
    pr1501=NOISE,
    pr1501_no_meta=NOISE,
    pr1502=NOISE,
    pr494=dict(swa_threshold=Config.swa_threshold),
    pr1855=dict(compressor="ans"),
    pr2014=dict(compressor="ans"),
)


def path(name: str) -> str:
    return str(ROOT / f"records/recipes/{name}.env")


def recipe(name: str) -> Config:
    return load_config({"RECIPE": path(name)})[0]


def test_every_published_recipe_is_here():
    assert {file.stem for file in (ROOT / "records/recipes").glob("pr*.env")} == set(SYSTEMS)


def matrices(d: int, kv: int, m: int) -> int:
    """Q and O, K and V, up and down of a block."""
    return 2 * d * d + 2 * kv * d + 2 * m * d


def gates(d: int, heads: int) -> int:
    """attn_scale, mlp_scale, resid_mix and q_gain of a layer of the forward pass."""
    return d + d + 2 * d + heads


COUNT_1501 = (
    matrices(512, 256, 1536) * 11 + 524_288 + 262_144 + 32_768 + 1 + 1 + 512 + 2560 + gates(512, 8) * 11
)
COUNT_1501 += 131_072 + 32_768 + 1 + 4


@pytest.mark.parametrize(
    ("name", "by_shape", "count"),
    [
        ("pr398", 1024 * 512 + 2048 * 128 + 512 * 128 + 1 + 512 + 5 * 512 + 11 * 2_361_352, 26_829_913),
        ("pr494", 1024 * 512 + 8192 * 128 + 512 * 128 + 512 + 2 * 5 * 512 + 11 * 2_889_224, 33_425_496),
        ("pr1501", COUNT_1501, 26_960_991),
        ("pr1501_no_meta", COUNT_1501, 26_960_991),
        ("pr1502", COUNT_1501, 26_960_991),
        ("pr294_reptile", 26_829_913 + (4096 - 2048) * 128, 27_092_057),
        ("pr294_depth10", 1024 * 512 + 5 * 512 + 10 * (matrices(512, 256, 1024) + gates(512, 8)), 18_897_488),
        ("pr294_depth11", 26_829_913 + (4096 - 2048) * 128, 27_092_057),
        ("pr294_depth13", 1024 * 512 + 6 * 512 + 13 * (matrices(512, 256, 1024) + gates(512, 8)), 24_409_192),
        (
            "pr294_recycled",
            1024 * 768 + 6 * 768 + 3 * matrices(768, 384, 1536) + 12 * gates(768, 12),
            13_214_352,
        ),
    ],
)
def test_parameter_counts(name, by_shape, count, capsys):
    assert train_gpt.main(["--describe"], {"RECIPE": path(name)}) == 0
    assert by_shape == count and capsys.readouterr().out.startswith(f"model_params:{count}\n")


@pytest.mark.parametrize("name", SYSTEMS)
def test_published_settings_are_the_recipe_and_what_is_refused_is_named(name):
    environ, refused = SYSTEMS[name], REFUSED.get(name, set())
    lines = problems(environ).splitlines()[1:] if refused else []
    named = [line.split()[0].rstrip(":").replace("'", "") for line in lines]
    assert sorted(named) == sorted(refused)
    published = load_config({k: v for k, v in environ.items() if f"{k}={v}" not in refused})[0]
    ours, elsewhere = recipe(name), r"train_log_every|val_loss_every|seed|eval_batch_seqs|ttt_\w+"
    compared = [f.name for f in fields(Config) if not re.fullmatch(elsewhere, f.name)]
    differing = {
        name: getattr(ours, name) for name in compared if getattr(ours, name) != getattr(published, name)
    }
    assert differing == CORRECTED.get(name, {})
    assert ours.late_qat == (name == "pr494") and not (ours.ema_enabled and ours.swa_enabled)


def test_the_control_differs_by_meta_learning_alone():
    given = [load_config({"RECIPE": path(name)})[1] for name in ("pr1501", "pr1501_no_meta")]
    ours, control = ({k: v for k, v in each.items() if not k.startswith("meta_")} for each in given)
    assert ours == control


@pytest.mark.parametrize("name", [name for name in SYSTEMS if "TTT_LR" in SYSTEMS[name]])
def test_published_adaptation(name):
    """As published, except that freezing by name freezes nothing and a batch spans all processes."""
    ours, published = recipe(name), SYSTEMS[name]
    for key in ("TTT_LR", "TTT_EPOCHS", "TTT_MOMENTUM", "TTT_CHUNK_TOKENS", "TTT_GRAD_CLIP"):
        if key in published:
            assert getattr(ours, key.lower()) == float(published[key]), key
    assert ours.ttt_freeze_blocks == (9 if name == "pr294_reptile" else 0)
    assert ours.ttt_optimizer == ("adamw" if name == "pr494" else "sgd")
    assert ours.ttt_protocol == ("adapt_first" if name in ("pr398", "pr494") else "legal")


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_of_the_shrunk_model(name):
    c = recipe(name)
    c = replace(
        c, model_dim=16 * c.num_heads, mlp_hidden=c.mlp_hidden and 64, vocab_size=64, train_seq_len=16
    )
    c = replace(c, bigram_vocab_size=min(c.bigram_vocab_size, 32))
    model = train_gpt.GPT(c, word_start=np.arange(64) % 2 == 0).init_weights(1)
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))
    train_gpt.training_loss(model, ids[:, :-1], ids[:, 1:]).backward()
    for optimizer in train_gpt.make_optimizers(model, c):
        optimizer.step()
    for parameter, p in model.named_parameters():
        assert p.grad is not None and p.isfinite().all(), parameter
