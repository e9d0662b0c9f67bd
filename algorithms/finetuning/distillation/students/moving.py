"""Tensors that follow their gradients, each rank with its part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.finetuning.distillation.sharding import local
from algorithms.parallel.ranks import Ranks


@dataclass
class Moving:
    """A tensor under a name: this rank's part, and the gradient of that."""

    name: str
    part: Tensor
    gradient: Tensor


def are_finite(gradients: Iterable[Tensor], ranks: Ranks) -> bool:
    """Whether every rank can step against its gradients."""
    finite = all(bool(torch.isfinite(local(gradient)).all()) for gradient in gradients)
    (others,) = ranks.sum_numbers(float(not finite))
    return others == 0


def clip(tensors: Sequence[Moving], limit: float | None, ranks: Ranks) -> float | None:
    """Shorten all gradients together to a norm of ``limit``, in place; returns the norm they had, or None without a limit."""
    if limit is None or not tensors:
        return None
    squares = torch.stack([tensor.gradient.float().square().sum(dtype=torch.float64) for tensor in tensors])
    (total,) = ranks.sum_numbers(squares.sum().item())
    norm = math.sqrt(total)
    if norm > limit:
        for tensor in tensors:
            tensor.gradient.mul_(limit / norm)
    return norm
