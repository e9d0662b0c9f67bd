"""The float16 values in which every format stores what is not codes."""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.modeling.source import ModelError

STORAGE = torch.float16


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
