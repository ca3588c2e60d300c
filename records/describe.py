"""What `--help`, `--describe` and the bar print: settings by section, parameters, FLOPs, GPU memory, MFU."""

from __future__ import annotations

from dataclasses import fields

import torch
from memory import GIB, Memory, sequences_at_once, usable_bytes

import train_gpt as tg
from train_gpt import GPT, Config

CARD_SIZES = (12, 16, 24, 80)  # GB, as sold
# By a part of the GPU's name: dense bfloat16 FLOPs per second, from the datasheets
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def help_text(head: str) -> str:
    """The docstring `head`, then every setting with its default and one line, by section."""
    lines = [head.strip(), "", "Settings (environment variables; RECIPE=FILE reads KEY=VALUE lines first):"]
    starts = {first: section for section, first in tg.SECTIONS.items()}
    for f in fields(Config):
        if f.name in starts:
            lines += ["", f"{starts[f.name]}:"]
        default = int(f.default) if f.type == "bool" else f.default
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        lines.append(f"  {f.name.upper() + '=' + str(default):42} {f.metadata['help']}{choices}")
    return "\n".join(lines)


def flops_per_token(config: Config) -> int:
    """FLOPs per training token: 6 per weight of a matrix product, 6 T d per layer for causal attention."""
    c, layers = config, len(config.block_rows)
    block = 2 * c.model_dim**2 + 2 * c.kv_dim * c.model_dim + 2 * c.mlp_dim * c.model_dim
    small = c.bigram_dim * c.model_dim * bool(c.bigram_vocab_size) + c.ve_dim * c.kv_dim * bool(
        c.value_layers
    )
    heads = (1 + c.mtp_num_heads) * c.vocab_size * c.model_dim
    return 6 * (layers * block + small + heads) + 6 * layers * c.train_seq_len * c.model_dim


def mfu_text(config: Config, device: torch.device, tokens_per_second: float) -> str:
    """Return ", MFU 0.29" by the operations that all processes count, "" for a GPU that is not in PEAKS."""
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    if peak is None:
        return ""
    return f", MFU {flops_per_token(config) * tokens_per_second / (peak * tg.world_size()):.2f}"


def memory_table(config: Config) -> list[str]:
    """For --describe: GiB of each part in bfloat16, and what each of CARD_SIZES computes at once."""
    lines, plain = [], Memory(config, compiled=False)
    for part, (bytes_of, wanted) in Memory(config).parts().items():
        compiled, eager = (one / GIB for one in (bytes_of(wanted), plain.parts()[part][0](wanted)))
        lines.append(
            f"memory part:{part} sequences:{wanted} compiled_gib:{compiled:.2f} plain_gib:{eager:.2f}"
        )
    for size in CARD_SIZES:
        limit = usable_bytes(size * 10**9)
        for memory in (Memory(config), plain):
            chosen = " ".join(f"{part}:{n or 'none'}" for part, n in sequences_at_once(memory, limit).items())
            lines.append(
                f"card_gb:{size} compiled:{int(memory.compiled)} usable_gib:{limit / GIB:.1f} {chosen}"
            )
    return lines


def describe(config: Config) -> str:
    """Parameter count, parameters by optimizer group, FLOPs per token, and GPU memory."""
    with torch.device("meta"):
        model = GPT(config)
    lines = [f"model_params:{tg.count_parameters(model)}"]
    for group, members in tg.group_parameters(model).items():
        for name, parameter in members:
            shape = "x".join(str(n) for n in parameter.shape) or "scalar"
            lines.append(f"  {name:28} {shape:>16} {parameter.numel():>12,}  {group}")
    return "\n".join([*lines, f"flops_per_token:{flops_per_token(config)}", *memory_table(config)])
