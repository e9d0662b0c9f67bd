"""The float16 values in which every format stores what is not codes."""

from __future__ import annotations

import torch
from torch import Tensor

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


def column_groups(groups: Tensor | None, columns: int, count: int) -> Tensor:
    """The group of each column, [I] int32: as given, or ``count`` runs of neighbours."""
    if groups is not None:
        return groups.to(torch.int32)
    return torch.arange(columns, dtype=torch.int32) // (columns // count)
