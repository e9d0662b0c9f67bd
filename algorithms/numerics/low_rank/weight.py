"""A weight as coded residual, low-rank part and DoRA magnitudes (arXiv 2402.09353), as it is stored.

Legend: O out_features, I in_features, r rank.

    V = Q + L1 L2,   W_hat[o] = magnitude[o] / |V[o]| * V[o]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.low_rank.alternation import Decomposition
from algorithms.numerics.low_rank.factors import LowRank
from algorithms.numerics.residuals.coder import CodedResidual, stored_bits

_RESIDUAL = "residual_"


@dataclass(frozen=True, kw_only=True)
class LowRankWeight:
    """``residual`` Q, ``low_rank`` L1 L2, ``magnitude`` [O] with float16 values; ``kind`` names the residual's coding."""

    kind: str
    residual: CodedResidual
    low_rank: LowRank
    magnitude: Tensor

    @classmethod
    def of(cls, found: Decomposition, kind: str) -> LowRankWeight:
        """A decomposition with the magnitudes that its rows have."""
        norms = found.dequantize().norm(dim=1)
        return cls(kind=kind, residual=found.residual, low_rank=found.low_rank, magnitude=norms.half().float())

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.low_rank.up.shape[0], self.low_rank.down.shape[1]

    def dequantize(self) -> Tensor:
        """The matrix [O, I] float32."""
        return with_magnitude(self.residual.dequantize() + self.low_rank.dequantize(), self.magnitude)

    def bits(self) -> Mapping[str, int]:
        """Stored bits by component."""
        return {
            **self.residual.bits(), **self.low_rank.bits_by_component(), "magnitudes": stored_bits(self.magnitude.half()),
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, but for the shape, the kind and the bits of the low-rank part."""
        coded = {_RESIDUAL + name: tensor for name, tensor in self.residual.tensors().items()}
        return {**coded, **self.low_rank.tensors(), "magnitude": self.magnitude.half()}

    @classmethod
    def restore(
        cls,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        *,
        kind: str,
        coding: type[CodedResidual],
        factor_bits: int,
    ) -> LowRankWeight:
        """The inverse of :meth:`tensors`; ``coding`` is the class of the residual."""
        inside = {name.removeprefix(_RESIDUAL): tensor for name, tensor in tensors.items() if name.startswith(_RESIDUAL)}
        return cls(
            kind=kind,
            residual=coding.restore(inside, shape),
            low_rank=LowRank.restore(tensors, shape, factor_bits, tensors["magnitude"].device),
            magnitude=tensors["magnitude"].float(),
        )


def with_magnitude(matrix: Tensor, magnitude: Tensor) -> Tensor:
    """Rows of [O, I] at the lengths [O]; a row of zeros stays one."""
    norms = matrix.norm(dim=1)
    return matrix * (magnitude / torch.where(norms > 0, norms, torch.ones_like(norms)))[:, None]
