"""ReALLM weights as PEFT reads them: a dense model of the residuals, and a LoRA adapter with DoRA magnitudes over it.

In the folder: adapter_config.json and adapter_model.safetensors, and the residual model, an ordinary one, in ``base``. With
lora_alpha = r PEFT's scale is 1, so that B = L1 and A = L2. A linear without a low-rank part gets one of rank 1 that is zero:
PEFT has DoRA magnitudes for no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from algorithms.formats.checkpoint import Calibrated, write_checkpoint
from algorithms.formats.reallm.packed import LAYOUT, unpack
from algorithms.modeling.files import atomic_write_json
from algorithms.numerics.low_rank.weight import LowRankWeight

BASE = "base"
_PREFIX = "base_model.model."


def write_peft(calibrated: Calibrated, directory: Path) -> None:
    """Write base and adapter into an existing folder."""
    base = directory / BASE
    base.mkdir(exist_ok=True)
    # In float32: rounding the base and the sum with the adapter, as a dense export does once, would cost twice.
    write_checkpoint(calibrated, base, residual_state)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for index, stored in calibrated.blocks():
        prefix = calibrated.source.block_prefix(index)
        for linear in LAYOUT.packed_linears(list(stored)):
            adapter = adapter_tensors(unpack(stored, linear))
            ranks[prefix + linear] = adapter["lora_A.weight"].shape[0]
            tensors |= {f"{_PREFIX}{prefix}{linear}.{name}": tensor for name, tensor in adapter.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    atomic_write_json(directory / "adapter_config.json", adapter_config(ranks))


def residual_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block's state dict in float32 whose linears hold their residuals alone."""
    packed = LAYOUT.packed_linears(list(tensors))
    inside = {f"{linear}.{part}" for linear in packed for part in LAYOUT.parts}
    state = {name: tensor.float() for name, tensor in tensors.items() if name not in inside}
    return state | {f"{linear}.weight": unpack(tensors, linear).residual.dequantize() for linear in packed}


def adapter_tensors(weight: LowRankWeight) -> dict[str, Tensor]:
    """One linear's adapter in float32, by PEFT's names."""
    up, down = weight.low_rank.up, weight.low_rank.down
    if weight.low_rank.rank == 0:
        up, down = up.new_zeros(up.shape[0], 1), down.new_zeros(1, down.shape[1])
    return {
        "lora_A.weight": down.contiguous(),
        "lora_B.weight": up.contiguous(),
        "lora_magnitude_vector": weight.magnitude.to(torch.float32),
    }


def adapter_config(ranks: Mapping[str, int]) -> dict[str, object]:
    """PEFT's adapter_config.json for linears of these ranks, by full name."""
    common = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
    }
