"""Uniform codes of random matrices and of tiny models, with every code and both ends of the grid in use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from algorithms.modeling.companions import copy_companions
from algorithms.modeling.source import ModelSource
from algorithms.numerics.grids.progressive import ProgressiveCodes
from algorithms.numerics.uniform import UniformCodes
from tests.support.models import save_family


def uniform_codes(
    rows: int, columns: int, *, bits: int, group_size: int = -1, symmetric: bool = True, seed: int = 0
) -> UniformCodes:
    """Random codes, scales that float16 holds exactly, and whole zeros: 2^(bits-1), or 1 to 2^bits - 1."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else columns // group_size
    codes = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0, 0], codes[0, 1] = 0, (1 << bits) - 1
    zeros = torch.full((rows, groups), float(1 << (bits - 1)))
    if not symmetric:
        zeros = torch.randint(1, 1 << bits, (rows, groups), generator=generator).float()
    scales = (torch.rand(rows, groups, generator=generator) + 0.5) / (1 << bits) / columns**0.5
    return UniformCodes(codes=codes, scales=scales.half().float(), zeros=zeros, bits=bits)


def progressive_codes(rows: int, columns: int, *, group_size: int = 128, seed: int = 0) -> ProgressiveCodes:
    """Random 4-bit codes, both ends in use, with group scales of 1 to 16 and all zeros that keep the integers in 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // group_size
    codes = torch.randint(16, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[:, ::group_size], codes[:, 1::group_size] = 0, 15
    scales = torch.randint(1, 17, (rows, groups), generator=generator)
    scales[0, 0], scales[-1, -1] = 1, 16
    least, most = (15 - 127 // scales).clamp(min=0), (128 // scales).clamp(max=15)
    zeros = least + (torch.rand(rows, groups, generator=generator) * (most - least + 1)).long()
    row_scales = (torch.rand(rows, generator=generator) + 0.5) / 127 / columns**0.5
    return ProgressiveCodes(
        codes=codes,
        row_scales=row_scales.half().float(),
        group_scales=scales.to(torch.uint8),
        zeros=zeros.to(torch.uint8),
    )


@dataclass(frozen=True)
class QuantizedModel:
    """A model whose blocks' linears are uniform codes: its folder of origin, the codes by linear, and all other tensors."""

    source: ModelSource
    codes: dict[str, UniformCodes]
    kept: dict[str, Tensor]

    def dense(self) -> torch.nn.Module:
        """The float32 model that the codes stand for."""
        return self.source.model_from(self.kept | {f"{name}.weight": code.dequantize() for name, code in self.codes.items()})

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits of the dense model."""
        with torch.no_grad():
            return self.dense()(input_ids=tokens, use_cache=False).logits

    def keeping(self, linear: str) -> QuantizedModel:
        """The same model with one linear in float16 instead of codes."""
        codes = dict(self.codes)
        weight = codes.pop(linear).dequantize().half().float()
        return QuantizedModel(source=self.source, codes=codes, kept=self.kept | {f"{linear}.weight": weight})

    def save(self, out: Path, packed: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
        """Write a folder with the kept tensors in float16, the packed ones, and a quantization config."""
        out.mkdir()
        kept = {name: tensor.half() for name, tensor in self.kept.items()}
        save_file(kept | dict(packed), out / "model.safetensors", metadata={"format": "pt"})
        config = self.source.raw_config() | {"quantization_config": dict(settings)}
        (out / "config.json").write_text(json.dumps(config))
        copy_companions(self.source.directory, out)


def quantized_llama(
    folder: Path, *, bits: int, group_size: int = -1, symmetric: bool = True, tied: bool = False, **changes: object
) -> QuantizedModel:
    """A tiny llama with grouped-query attention; what is not quantized is representable in float16."""
    save_family(folder, "llama", tied=tied, hidden=64, **changes)
    state = {name: tensor.half().float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    linears = sorted(name.removesuffix(".weight") for name in state if name.endswith("_proj.weight"))
    codes = {
        name: uniform_codes(
            *state.pop(f"{name}.weight").shape, bits=bits, group_size=group_size, symmetric=symmetric, seed=seed
        )
        for seed, name in enumerate(linears)
    }
    return QuantizedModel(source=ModelSource(folder), codes=codes, kept=state)
