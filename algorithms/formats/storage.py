"""The float16 values in which every format stores what is not codes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from algorithms.modeling.source import ModelError

STORAGE = torch.float16
WHOLE_ROW = -1  # the group size that stands for all columns


def to_storage(tensor: Tensor, name: str) -> Tensor:
    """A floating tensor in float16.

    Raises:
        ModelError: a value beyond float16's range.
    """
    stored = tensor.to(STORAGE)
    if not torch.isfinite(stored).all():
        raise ModelError(
            f"{name} reaches {tensor.abs().max().item():.3g}, beyond float16's 65504, in which compressed models are stored"
        )
    return stored


def in_storage(block: nn.Module, left_out: Collection[str]) -> dict[str, Tensor]:
    """A block but for parameters ``left_out``: parameters in float16, buffers that checkpoints have as they are.

    Raises:
        ModelError: a value beyond float16's range.
    """
    parameters = {name for name, _ in block.named_parameters(remove_duplicate=False)}
    return {
        name: to_storage(tensor, name) if name in parameters else tensor.clone()
        for name, tensor in block.state_dict().items()
        if name not in left_out
    }


def column_groups(groups: Tensor | None, columns: int, count: int) -> Tensor:
    """The group of each column, [I] int32: as given, or ``count`` runs of neighbours."""
    if groups is not None:
        return groups.to(torch.int32)
    return torch.arange(columns, dtype=torch.int32) // (columns // count)
