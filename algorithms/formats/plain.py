"""How a calibration stores weights that stay numbers: ``P.weight`` [O, I] in float16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.formats.storage import to_storage


@dataclass(frozen=True, kw_only=True)
class PlainWeight:
    """A matrix [O, I] with float16 values, in float32."""

    matrix: Tensor

    def dequantize(self) -> Tensor:
        """The matrix itself."""
        return self.matrix

    @classmethod
    def joined(cls, parts: Sequence[PlainWeight]) -> PlainWeight:
        """The matrix whose rows are those of the parts, one part after another."""
        return cls(matrix=torch.cat([part.matrix for part in parts]))


def plain(matrix: Tensor, name: str) -> PlainWeight:
    """A matrix, rounded to float16.

    Raises:
        ModelError: a value beyond float16's range.
    """
    return PlainWeight(matrix=to_storage(matrix, name).float())


def pack(weight: PlainWeight, prefix: str) -> dict[str, Tensor]:
    """The tensor of one linear."""
    return {f"{prefix}.weight": to_storage(weight.matrix, f"{prefix}.weight")}


def dense_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in float32."""
    return {name: tensor.float() for name, tensor in tensors.items()}


def stored_bits(weight: PlainWeight) -> Mapping[str, int]:
    """Bits of one linear: 16 a weight."""
    return {"weights": 16 * weight.matrix.numel()}
