"""Models with channels that are much louder than others, as large ones have them, and that compute what they did."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from algorithms.modeling.source import ModelSource
from tests.support.models import save_family

FACTOR = 30.0
LOUD = 6  # channels of each norm


def plant(source: ModelSource, folder: Path) -> ModelSource:
    """Multiply gains of norms in a few channels, and divide the columns that read them."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    architecture = source.architecture
    for index in range(source.num_blocks):
        prefix = source.block_prefix(index)
        for leader, norm in architecture.input_norms.items():
            gain = tensors[f"{prefix}{norm}.weight"]
            loud = torch.randperm(len(gain), generator=generator)[:LOUD]
            gain[loud] = (gain[loud] + architecture.norm_offset) * FACTOR - architecture.norm_offset
            for name in next(group for group in architecture.input_groups if group[0] == leader):
                tensors[f"{prefix}{name}.weight"][:, loud] /= FACTOR
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelSource(folder)


def plain_and_planted(folder: Path, family: str = "llama", **changes: object) -> tuple[ModelSource, ModelSource]:
    """A tiny model, and the same function with loud channels."""
    plain = ModelSource(save_family(folder / "plain", family, **changes))
    return plain, plant(plain, save_family(folder / "planted", family, **changes))
