"""Configuration: types, ranges, contradictions, misspelt names,
recipes, aliases, absent variables, --help, --describe.

The expected numbers are those of the published systems:
their environments, and their parameter counts by shape.
"""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

import train_gpt
from train_gpt import Config, UserError, load_config

RECIPES = Path(__file__).resolve().parent.parent / "records" / "recipes"

# What a shell, a job scheduler, CUDA, torchrun and the usual libraries put into an environment.
ORDINARY = """
    PATH HOME LANG LC_ALL LANGUAGE TERM TERM_PROGRAM COLORTERM SHELL SHLVL USER LOGNAME MAIL PWD OLDPWD
    HOSTNAME TZ TMPDIR TEMP TMP EDITOR VISUAL PAGER LESS LS_COLORS DISPLAY PS1 XDG_RUNTIME_DIR
    DBUS_SESSION_BUS_ADDRESS CI SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK PYTHONPATH PYTHONHASHSEED
    PYTHONUNBUFFERED VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV LD_LIBRARY_PATH LIBRARY_PATH CUDA_HOME
    CUDA_PATH CUDA_VERSION CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING CUDA_DEVICE_MAX_CONNECTIONS
    NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NCCL_DEBUG NCCL_IB_DISABLE NCCL_P2P_DISABLE NCCL_NET
    NCCL_SOCKET_IFNAME NCCL_VERSION GLOO_SOCKET_IFNAME OMP_NUM_THREADS MKL_NUM_THREADS TOKENIZERS_PARALLELISM
    PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF TORCH_HOME TORCH_LOGS TORCH_CUDA_ARCH_LIST
    TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR HF_HOME HF_TOKEN HF_HUB_CACHE HF_HUB_ENABLE_HF_TRANSFER
    WANDB_API_KEY WANDB_PROJECT WANDB_MODE RUNPOD_POD_ID SLURM_JOB_ID SLURM_PROCID SLURM_LOCALID SLURM_NTASKS
    SLURM_NODEID SLURM_MEM_PER_NODE GITHUB_RUN_ID RUNNER_OS BUILD_ID JOB_NAME USERNAME MASTER_ADDR MASTER_PORT
    RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE
    ROLE_WORLD_SIZE TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID
    TORCHELASTIC_ERROR_FILE TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_SIGNALS_TO_HANDLE
    TORCH_NCCL_ASYNC_ERROR_HANDLING TEST_TMPDIR MATCHED_FINEWEB_REPO_ID
""".split()

THREE = "NUM_LAYERS=3 VE_LAYERS=1"

# Settings of the published programs that belong to parts which this trainer leaves to others, or ignores.
LINEAGE = """
    TTT_ENABLED LAWA_K LAWA_FREQ CONTROL_TENSOR_NAME_PATTERNS INT7_PATTERNS SKIP_TTT TRAIN_GPT_DIR
""".split()

PR549 = """
    NUM_LAYERS=11 BIGRAM_VOCAB_SIZE=1536 XSA_LAST_N=4 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=1 SWA_EVERY=50
    ROPE_DIMS=16 LN_SCALE=1 LATE_QAT=1 LATE_QAT_THRESHOLD=0.15 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10
    TTT_ENABLED=1 TTT_LR=0.002 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=0 TTT_MOMENTUM=0.9
    TTT_BATCH_SEQS=32 TTT_GRAD_CLIP=1.0 MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025
    TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
    WARMDOWN_ITERS=3500 ITERATIONS=9000 MAX_WALLCLOCK_SECONDS=600 EVAL_STRIDE=64 SEED=1337
"""
PR1019 = """
    BIGRAM_VOCAB_SIZE=3072 BIGRAM_DIM=112 WARMDOWN_ITERS=4000 TARGET_MB=15.9 SEED=314 XSA_LAST_N=11
    EMA_ENABLED=1 MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 LAWA_ENABLED=0 VALUE_RESIDUAL=0
    GATED_ATTENTION=0 DTG_ENABLED=0 MTP_NUM_HEADS=0 QAT_ENABLED=0 VAL_BATCH_SIZE=524288
"""


def environment(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


def problems(environ: dict[str, str]) -> str:
    """The message with which the settings are refused."""
    with pytest.raises(UserError) as error:
        load_config(environ)
    return str(error.value)


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe and returns the environment that names it."""

    def write(text: str | bytes) -> dict[str, str]:
        path = tmp_path / "x.env"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return {"RECIPE": str(path)}

    return write


# ------------------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_published_line():
    config, given, notices = load_config({})
    assert given == {} and notices == []
    expected = dict(
        num_layers=11, model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=3.0, vocab_size=1024,
        tie_embeddings=True, tied_embed_init_std=0.005, rope_base=10000, rope_dims=16, logit_softcap=30,
        qk_gain_init=1.5, ln_scale=True, ve_enabled=True, ve_dim=128, ve_layers="9,10", train_seq_len=2048,
        eval_seq_len=2048, train_batch_tokens=786432, iterations=20000, max_wallclock_seconds=600,
        matrix_lr=0.025, scalar_lr=0.025, tied_embed_lr=0.035, muon_momentum=0.99, muon_wd=0.04, adam_wd=0.04,
        beta1=0.9, beta2=0.95, adam_eps=1e-8, grad_clip_norm=0.3, eval_stride=64, grad_accum_total=8,
        warmup_steps=20,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("LN_SCALE=0", False),
        ("LN_SCALE=1", True),
        ("LN_SCALE=false", False),
        ("LN_SCALE=True", True),
        ("SEED=0", 0),
        ("SEED=+7", 7),
        ("ADAM_EPS=1e-10", 1e-10),
        ("MLP_MULT=2", 2.0),
        ("MIN_LR=.5", 0.5),
        ("MIN_LR=1", 1.0),
        ("DEVICE=cpu", "cpu"),
        ("VE_LAYERS=0, 10", "0, 10"),
        ("VAL_FILES=", ""),
    ],
)
def test_values_taken(text, value):
    name, _, raw = text.partition("=")
    config, given, _ = load_config({name: raw})
    assert getattr(config, name.lower()) == value and type(getattr(config, name.lower())) is type(value)
    assert given == {name.lower(): value}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("NUM_LAYERS=2.5", "whole number"),
        ("NUM_LAYERS=", "whole number"),
        ("NUM_LAYERS=eleven", "whole number"),
        ("NUM_LAYERS=1_1", "whole number"),
        ("TIE_EMBEDDINGS=no", "0 or 1"),
        ("TIE_EMBEDDINGS=2", "0 or 1"),
        ("TIE_EMBEDDINGS=", "0 or 1"),
        ("MATRIX_LR=nan", "a number"),
        ("MATRIX_LR=inf", "a number"),
        ("MATRIX_LR=", "a number"),
        ("MATRIX_LR=0,025", "a number"),
        ("NUM_LAYERS=0", "at least 1"),
        ("SEED=-1", "at least 0"),
        ("VOCAB_SIZE=65537", "at most 65536"),
        ("MIN_LR=1.5", "at most 1"),
        ("MUON_MOMENTUM=1", "at most 0.9999"),
        ("GRAD_CLIP_NORM=-0.3", "at least 0"),
        ("EVAL_STRIDE=0", "at least 1"),
        ("DEVICE=tpu", "auto, cpu, cuda"),
        ("DEVICE=", "auto, cpu, cuda"),
        ("ATTENTION=flash", "auto, fa3, fa2, sdpa"),
        ("USE_COMPILE=yes", "auto, 0, 1"),
        ("DOC_BORDERS=off", "respect, attention, published"),
        ("MATRIX_BITS=9", "at most 8"),
        ("MATRIX_BITS=2", "at least 3"),
        ("QUANT_STEPS=fixed", "two_sided, sigmas, clip"),
        ("QUANT_LOSS=0", "at least 1e-09"),
        ("COMPRESSOR=lzma", "zstd, ans"),
        ("CALIB_SOURCE=val", "train, self"),
        ("TTT_MOMENTS=artifact", "own, prefix, shared"),
    ],
)
def test_values_refused(text, words):
    name, _, raw = text.partition("=")
    message = problems({name: raw})
    assert name in message and raw in message and words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MODEL_DIM=500", "MODEL_DIM=500 NUM_HEADS=8"),
        ("NUM_HEADS=6 MODEL_DIM=384", "NUM_HEADS=6 NUM_KV_HEADS=4"),
        ("MODEL_DIM=24 ROPE_DIMS=0", "MODEL_DIM NUM_HEADS 3"),
        ("ROPE_DIMS=15", "ROPE_DIMS=15"),
        ("ROPE_DIMS=66", "ROPE_DIMS=66 64"),
        ("BIGRAM_VOCAB_SIZE=1", "BIGRAM_VOCAB_SIZE=1"),
        ("VE_LAYERS=9,11", "VE_LAYERS 9,11 10"),
        ("VE_LAYERS=9,-1", "VE_LAYERS 9,-1"),
        ("VE_LAYERS=", "VE_LAYERS"),
        ("VE_LAYERS=nine", "VE_LAYERS nine"),
        ("VE_LAYERS=9,9", "VE_LAYERS 9,9"),
        ("NUM_LAYERS=9", "VE_LAYERS 9,10 8"),
        ("TRAIN_BATCH_TOKENS=786433", "TRAIN_BATCH_TOKENS=786433"),
        ("TRAIN_BATCH_TOKENS=20480 GRAD_ACCUM_TOTAL=8", "TRAIN_BATCH_TOKENS=20480 GRAD_ACCUM_TOTAL=8"),
        ("TRAIN_BATCH_TOKENS=1024", "TRAIN_BATCH_TOKENS=1024 TRAIN_SEQ_LEN=2048"),
        ("EVAL_STRIDE=2049", "EVAL_STRIDE=2049 EVAL_SEQ_LEN=2048"),
        ("BIGRAM_VOCAB_SIZE=0 POS_CONDITIONAL_BIGRAM=1", "POS_CONDITIONAL_BIGRAM BIGRAM_VOCAB_SIZE"),
        ("BIGRAM_VOCAB_SIZE=0 WORD_START_BOOST=1", "WORD_START_BOOST BIGRAM_VOCAB_SIZE"),
        ("BIGRAM_VOCAB_SIZE=2 POS_CONDITIONAL_BIGRAM=1", "BIGRAM_VOCAB_SIZE=2"),
        ("BIGRAM_HASH=linear POS_CONDITIONAL_BIGRAM=1", "POS_CONDITIONAL_BIGRAM BIGRAM_HASH=xor"),
        ("RESID_MIX=0 PHASE_RESID_MIX=1", "PHASE_RESID_MIX RESID_MIX"),
        ("UNET_SKIPS=0 SKIP_GATES=1", "SKIP_GATES UNET_SKIPS"),
        (f"{THREE} BLOCK_ORDER=0,1", "BLOCK_ORDER 0,1 2"),
        (f"{THREE} BLOCK_ORDER=0,1,2,3", "BLOCK_ORDER 0,1,2,3 2"),
        (f"{THREE} BLOCK_ORDER=0,1,-2", "BLOCK_ORDER 0,1,-2"),
        (f"{THREE} BLOCK_ORDER=0,1,2,", "BLOCK_ORDER 0,1,2,"),
        (f"{THREE} BLOCK_ORDER=0;1;2 LOOP_START_FRAC=0.5", "BLOCK_ORDER 0;1;2"),
        ("LOOP_START_FRAC=0.5", "LOOP_START_FRAC BLOCK_ORDER"),
        (f"{THREE} LOOP_START_FRAC=0.5 BLOCK_ORDER=2,1,0", "LOOP_START_FRAC BLOCK_ORDER"),
        ("QUANT_TRELLIS=1 QUANT_STEPS=sigmas", "QUANT_TRELLIS QUANT_STEPS=two_sided"),
        ("GRAD_QUANT=1", "GRAD_QUANT QUANT_STEPS=sigmas"),
        ("QUANT_TRELLIS=1 QUANT_STEPS=clip", "QUANT_TRELLIS QUANT_STEPS=two_sided"),
        ("NUM_MEMORY_TOKENS=2048", "NUM_MEMORY_TOKENS=2048"),
        ("NUM_MEMORY_TOKENS=2000 MTP_NUM_HEADS=48", "NUM_MEMORY_TOKENS=2000 MTP_NUM_HEADS=48"),
    ],
)
def test_contradictions_refused(text, words):
    message = problems(environment(text))
    assert [word for word in words.split() if word not in message] == []


@pytest.mark.parametrize(
    "text",
    [
        "VE_ENABLED=0 VE_LAYERS=77",
        "NUM_LAYERS=3 VE_LAYERS=2",
        "ROPE_DIMS=64",
        "BIGRAM_VOCAB_SIZE=0",
        "EVAL_STRIDE=2048",
        "QUANT_STEPS=two_sided QUANT_TRELLIS=1 GPTQ_CALIB_BATCHES=1",
        "QUANT_STEPS=clip GPTQ_CALIB_BATCHES=0",
        "BIGRAM_HASH=linear WORD_START_BOOST=1",
        "BIGRAM_VOCAB_SIZE=3 POS_CONDITIONAL_BIGRAM=1",
        f"{THREE} BLOCK_ORDER=2,1,0",
        f"{THREE} BLOCK_ORDER=2,1,0,2 LOOP_START_FRAC=0.5",
        "NUM_MEMORY_TOKENS=2000 MTP_NUM_HEADS=47",
    ],
)
def test_near_contradictions_taken(text):
    load_config(environment(text))


def test_every_problem_is_named_at_once(recipe):
    environ = recipe("NUM_LAYERS=11\nNO_SUCH_THING=1\nEMA_DECAY=high\n")
    environ |= environment(
        "MATRX_LR=0.02 SEED=x MIN_LR=2 DEVICE=tpu GATED_ATTENTION=1 XSA_LAYERS=3 XSA_LAST_N=4"
    )
    message = problems(environ)
    wanted = [
        "NO_SUCH_THING",
        "EMA_DECAY='high'",
        "MATRX_LR",
        "SEED='x'",
        "MIN_LR=2",
        "tpu",
        "GATED_ATTENTION=1",
    ]
    assert [word for word in [*wanted, "XSA_LAYERS=3"] if word not in message] == []
    assert "NUM_LAYERS" not in message  # nothing is wrong with it


def test_a_contradiction_is_named_beside_a_misspelt_name():
    message = problems(environment("MATRX_LR=0.02 NUM_HEADS=7"))
    assert "MATRIX_LR" in message and "NUM_HEADS=7" in message


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MATRX_LR", "MATRIX_LR"),
        ("MARTIX_LR", "MATRIX_LR"),
        ("MATRIX_LRS", "MATRIX_LR"),
        ("ITERATION", "ITERATIONS"),
        ("MAX_WALLCLOK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("WARMDWON_ITRES", "WARMDOWN_ITERS"),
        ("BIGRAM_BUKETS", "BIGRAM_BUCKETS"),
        ("LAWA_ENABLE", "LAWA_ENABLED"),
        ("SED", "SEED"),
        ("EMBD_R", "EMBED_LR"),
        ("MAX_WALCLOK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("SEEDS", "SEED"),
        ("DEVCE", "DEVICE"),
        ("MIN_RL", "MIN_LR"),
        ("RUNID", "RUN_ID"),
    ],
)
def test_misspelt_names_are_refused_and_can_be_excused(name, meant):
    message = problems({name: "1"})
    assert re.search(rf"\b{name}\b", message) and re.search(rf"\b{meant}\b", message)
    load_config({name: "1", "IGNORE_ENV": name})
    load_config({name: "1", "IGNORE_ENV": f"OTHER,{name}"})
    assert name in problems({name: "1", "IGNORE_ENV": "OTHER"})


@pytest.mark.parametrize("name", ["SEXX", "DEVYZE", "MN_R", "seeed", "ITERAONSXY"])
def test_names_further_away_are_somebody_elses(name):
    assert load_config({name: "1"})[0] == Config()


def starts(environ: dict[str, str]) -> bool:
    try:
        return load_config(environ)[0] == Config()
    except UserError:
        return False


@pytest.mark.parametrize("names", [ORDINARY, LINEAGE], ids=["ordinary", "lineage"])
def test_unrelated_names_do_not_trip(names):
    assert [name for name in names if not starts({name: "1"})] == []


# ------------------------------------------------------------------------------------------------------------
# Recipes, aliases, absent variables
# ------------------------------------------------------------------------------------------------------------


def test_environment_overrides_recipe_overrides_default(recipe):
    environ = recipe("SEED=1\nITERATIONS=100\n") | {"SEED": "2"}
    config, given, _ = load_config(environ)
    assert (config.seed, config.iterations, config.num_layers) == (2, 100, 11)
    assert given == {"seed": 2, "iterations": 100}


def test_recipe_syntax(recipe):
    text = """# a comment
    export SEED=7
  ITERATIONS = 30   # blanks and a comment behind

export EMA_DECAY="0.5"
DATA_PATH='a folder'
VE_LAYERS=9,10\r
TRAIN_FILES=x=y
"""
    config, given, _ = load_config(recipe(text))
    assert given == dict(
        seed=7, iterations=30, ema_decay=0.5, data_path="a folder", ve_layers="9,10", train_files="x=y"
    )
    assert (config.seed, config.data_path) == (7, "a folder")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SEED=1\n\n# comment\nMATRX_LR=1\n", [":4:", "MATRX_LR", "MATRIX_LR"]),
        ("\nWHATEVER=1\n", [":2:", "WHATEVER"]),
        ("SEED=1\nSEED=1\n", [":2:", "SEED", "twice"]),
        ("SEED\n", [":1:", "SEED"]),
        ("SEED=1\nNUM_LAYERS=x\n", ["NUM_LAYERS", "whole number"]),
        (b"SEED=1\n\xff\xfe\x00\n", ["x.env"]),
    ],
)
def test_recipe_problems(recipe, text, words):
    message = problems(recipe(text))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("what", ["missing", "a folder"])
def test_recipe_unreadable(tmp_path, what):
    path = tmp_path if what == "a folder" else tmp_path / "none.env"
    assert str(path) in problems({"RECIPE": str(path)})


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.env")), ids=lambda path: path.name)
def test_every_recipe_loads(path):
    config, given, _ = load_config({"RECIPE": str(path)})
    assert given and config == Config(**given)


def test_aliases():
    text = "BIGRAM_BUCKETS=2048 BIGRAM_EMBED_DIM=96 XSA_LAYERS=4 QAT_THRESHOLD=0.25 SWA_START_FRAC=0.5"
    expected = dict(
        bigram_vocab_size=2048, bigram_dim=96, xsa_last_n=4, late_qat_threshold=0.25, swa_threshold=0.5
    )
    config, given, _ = load_config(environment(text))
    assert given == expected and {name: getattr(config, name) for name in expected} == expected
    assert load_config(environment("XSA_LAYERS=4 XSA_LAST_N=4"))[0].xsa_last_n == 4


@pytest.mark.parametrize("text", [
    "XSA_LAYERS=4 XSA_LAST_N=5", "BIGRAM_VOCAB_SIZE=64 BIGRAM_BUCKETS=65",
    "BIGRAM_DIM=64 BIGRAM_EMBED_DIM=65", "QAT_THRESHOLD=0.1 LATE_QAT_THRESHOLD=0.2",
    "SWA_START_FRAC=0.1 SWA_THRESHOLD=0.2",
])  # fmt: skip
def test_an_alias_that_contradicts_its_name(text):
    message = problems(environment(text))
    assert [word for word in text.split() if word not in message] == []


def test_an_alias_in_the_environment_overrides_the_recipe(recipe):
    assert (
        load_config(recipe("BIGRAM_VOCAB_SIZE=3072\n") | {"BIGRAM_BUCKETS": "2048"})[0].bigram_vocab_size
        == 2048
    )
    assert load_config(recipe("XSA_LAYERS=11\n") | {"XSA_LAST_N": "4"})[0].xsa_last_n == 4


@pytest.mark.parametrize(
    ("name", "off", "on"),
    [
        *((name, "0", "1") for name in ("LAWA_ENABLED", "VALUE_RESIDUAL", "GATED_ATTENTION", "DTG_ENABLED")),
        *((name, "0", "1") for name in ("MOMENTUM_CYCLIC", "ADAPTIVE_WARMDOWN", "TTT_QAT", "QAT_ENABLED")),
        ("TARGET_MB", "15.9", None),
        ("TRIGRAM", "0", "1"),
        *(("ENCODER_LR_MULT", off, "0.5") for off in ("1", "1.0")),
        ("META_TTT_PARAMS", "banks", "lora"),
        ("META_TTT_INNER_OPTIMIZER", "sgd", "precond"),
        *(("META_TTT_INNER_MOMENTUM", off, "0.9") for off in ("0", "0.0")),
        ("CALIB_TEMPERATURE", "0.8", "1"),
        *((name, off, "0.5") for name in ("TTT_PULL", "TTT_LOSS_POWER") for off in ("0", "0.0")),
        *((name, value, None) for name in ("GPTQ_BLOCK_SIZE", "TTT_META_RATES") for value in ("1", "128")),
    ],
)
def test_absent_variables(name, off, on):
    """The value that changes nothing, or any where none would, is taken with a notice; others are refused."""
    config, given, notices = load_config({name: off})
    assert config == Config() and given == {}
    assert len(notices) == 1 and f"{name}={off}" in notices[0]
    if on is not None:
        assert f"{name}={on}" in problems({name: on})
        assert f"{name}= " in problems({name: ""})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PR549, dict(num_layers=11, bigram_vocab_size=1536, xsa_last_n=4, swa_enabled=True, iterations=9000)),
        (PR1019, dict(bigram_vocab_size=3072, bigram_dim=112, warmdown_iters=4000, seed=314)),
    ],
    ids=["pr549", "pr1019"],
)
def test_published_environments_start(text, expected, recipe, capsys):
    config, _, notices = load_config(environment(text))
    assert {name: getattr(config, name) for name in expected} == expected
    for name in ("TARGET_MB", "LAWA_ENABLED", "DTG_ENABLED", "VAL_BATCH_SIZE"):
        assert any(notice.startswith(f"{name}=") for notice in notices) == (f" {name}=" in text)
    assert train_gpt.main(["--describe"], environment(text)) == 0
    assert "model_params:" in capsys.readouterr().out
    exports = "".join(f"export {word}\n" for word in text.split() if word != "TTT_ENABLED=1")
    assert load_config(recipe(exports))[0] == config


def test_arguments_override_the_environment_and_the_recipe(recipe):
    environ = recipe("SEED=1\nITERATIONS=100\nWARMUP_STEPS=9\n") | {"SEED": "2", "ITERATIONS": "200"}
    rest, environ = train_gpt.with_arguments(["SEED=3", "RUN_ID=a=b", "--describe", "SEED=4"], environ)
    config, given, _ = load_config(environ)
    assert rest == ["--describe", "SEED=4"]  # what stands behind an option belongs to it
    assert (config.seed, config.iterations, config.warmup_steps, config.run_id) == (3, 200, 9, "a=b")
    assert given == dict(seed=3, iterations=200, warmup_steps=9, run_id="a=b")


def test_arguments_as_a_user(capsys):
    """Aliases and a recipe too; a name that nobody knows is an error there, as it is in a recipe."""
    tiny = f"RECIPE={RECIPES / 'smoke.env'}"
    assert train_gpt.main([tiny, "NUM_LAYERS=1", "VE_LAYERS=0", "XSA_LAST_N=1", "--describe"], {}) == 0
    assert "2x64x64" in capsys.readouterr().out
    assert train_gpt.main([tiny, "NUM_LAYER=1"], {}) == 2
    assert capsys.readouterr().err == (
        "error: unknown setting in the arguments: NUM_LAYER, did you mean NUM_LAYERS?\n"
    )
    assert train_gpt.main(["--num-layers", "3"], {}) == 2
    assert capsys.readouterr().err == (
        "error: unknown arguments --num-layers 3: settings are NAME=VALUE, see --help\n"
    )


# ------------------------------------------------------------------------------------------------------------
# --help and --describe
# ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_setting_with_its_default(capsys):
    assert train_gpt.main(["--help"], {"SEED": "not read"}) == 0
    found = re.findall(r"^  ([A-Z][A-Z0-9_]*)=(\S*) +(\S.*)$", capsys.readouterr().out, re.M)
    assert [name for name, _, _ in found] == [f.name.upper() for f in fields(Config)]
    printed = {name: default for name, default, _ in found}
    config, given, _ = load_config(printed)  # taken back, the printed defaults change nothing
    assert config == Config() and given == asdict(Config())
    assert {
        name: printed[name] for name in ("NUM_LAYERS", "TIE_EMBEDDINGS", "MATRIX_LR", "VE_LAYERS", "RUN_ID")
    } == {
        "NUM_LAYERS": "11", "TIE_EMBEDDINGS": "1", "MATRIX_LR": "0.025", "VE_LAYERS": "9,10", "RUN_ID": ""
    }  # fmt: skip


def count_parameters(
    bigram: tuple[int, int], *, L=11, d=512, H=8, K=4, m=1536, V=1024, ve=(128, 2), tied=True
) -> int:
    """Parameters of the bank model, summed over the published shapes."""
    kv = K * d // H
    banks = 2 * L * d * d + 2 * L * kv * d + L * m * d + L * d * m
    hashed = bigram[0] * bigram[1] + bigram[1] * d + 1 if bigram[0] else 0
    values = V * ve[0] + ve[0] * kv + 1 + ve[1] if ve else 0
    blocks = L * (d + d + 2 * d + H)
    return banks + V * d * (1 if tied else 2) + hashed + d + (L // 2) * d + blocks + values


@pytest.mark.parametrize(
    ("recipe_name", "more", "by_shape", "published"),
    [
        ("pr1019", "", count_parameters((3072, 112)), 27_067_484),
        ("pr549", "", count_parameters((1536, 128)), 26_928_220),
        ("pr549", "TIE_EMBEDDINGS=0", count_parameters((1536, 128), tied=False), 26_928_220 + 1024 * 512),
        ("pr549", "VE_LAYERS=7,8,9,10", count_parameters((1536, 128), ve=(128, 4)), 26_928_220 + 2),
        ("pr549", "VE_ENABLED=0 BIGRAM_VOCAB_SIZE=0", count_parameters((0, 0), ve=None), 26_502_232),
    ],
)
def test_describe(recipe_name, more, by_shape, published, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environ = {"RECIPE": str(RECIPES / f"{recipe_name}.env"), "DATA_PATH": "nowhere"} | environment(more)
    assert train_gpt.main(["--describe"], environ) == 0
    lines = capsys.readouterr().out.splitlines()
    assert by_shape == published and lines[0] == f"model_params:{published}"
    table = [row.groups() for line in lines if (row := re.match(r"  (\S+) +(\S+) +([\d,]+)  (\w+)$", line))]
    assert sum(int(count.replace(",", "")) for _, _, count, _ in table) == published
    shapes = {name: (shape, group) for name, shape, _, group in table}
    assert len(shapes) == len(table)
    assert shapes["qo_bank"] == ("22x512x512", "bank") and shapes["mlp_down_bank"] == ("11x512x1536", "bank")
    assert shapes["tok_emb.weight"] == ("1024x512", "embed") and shapes["blocks.10.attn.q_gain"] == (
        "8",
        "scalar",
    )
    assert ("lm_head.weight" in shapes) == ("TIE_EMBEDDINGS=0" in more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order, heads", [("", 0), ("0,1,2,3,4,5,4,5,6,7,8,9,10", 2)])
def test_describe_operations_a_token(capsys, order, heads):
    settings = {"RECIPE": str(RECIPES / "pr1019.env"), "BLOCK_ORDER": order, "MTP_NUM_HEADS": str(heads)}
    assert train_gpt.main(["--describe"], settings) == 0
    # forward and backward: 3 times 2 for each weight of a product;
    # attention: QK^T and AV over half of 2048 positions
    layers = 13 if order else 11
    products = 25_952_256 // 11 * layers + 112 * 512 + 128 * 256 + (1 + heads) * 1024 * 512
    attention = layers * 2 * 512 * 2048 // 2
    assert f"flops_per_token:{6 * (products + attention)}" in capsys.readouterr().out


def test_files_that_are_not_there_say_so(recipe, tmp_path, capsys):
    """Of a recipe, and of a tokenizer without one: no word of formats, and what to do."""
    assert train_gpt.main(["RECIPE=none.env"], {}) == 2
    assert capsys.readouterr().err == (
        "error: the settings have problems:\n  RECIPE=none.env cannot be read: No such file or directory\n"
    )
    with pytest.raises(train_gpt.UserError, match=r"no such file\. Set RECIPE, or make it"):
        train_gpt.load_byte_table(str(tmp_path / "none.model"), 1024)


def test_a_parameter_without_a_group_is_named():
    model = torch.nn.Module()
    model.head_gain = torch.nn.Parameter(torch.ones(3))
    for work in (train_gpt.group_parameters, train_gpt.count_parameters):
        with pytest.raises(
            train_gpt.UserError, match="parameter head_gain is in no group: add it to PARAM_GR"
        ):
            work(model)
    assert not train_gpt.is_coded("factors.qo_bank") and train_gpt.is_coded("qo_bank")
