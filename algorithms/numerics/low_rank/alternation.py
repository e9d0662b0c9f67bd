"""W = Q + L1 L2: the best low-rank part and the coded residual in turn (LoftQ, arXiv 2310.08659; ReALLM, arXiv 2405.13155)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.low_rank.factors import Geometry, LowRank
from algorithms.numerics.residuals.coder import CodedResidual, ResidualCoder

# A turn that gains less is the last.
_SMALLEST_GAIN = 0.003


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A residual and a low-rank part that make up a matrix, and the errors <dW H, dW> of all turns up to the best, falling."""

    residual: CodedResidual
    low_rank: LowRank
    errors: Sequence[float]

    def dequantize(self) -> Tensor:
        """Q + L1 L2, [O, I]."""
        return self.residual.dequantize() + self.low_rank.dequantize()


def alternate(
    matrix: Tensor,
    hessian: Tensor | None,
    coder: ResidualCoder,
    generator: torch.Generator,
    *,
    rank: int,
    factor_bits: int,
    iterations: int,
    start: Decomposition | None = None,
) -> Decomposition:
    """Alternate until the error rises or hardly falls; the best of all turns is returned.

    Args:
        matrix: W [O, I] float32.
        hessian: H [I, I] of the input; None for squared errors of the weights.
        coder: of the residual; it sees the low-rank part as it is stored, and makes up for its rounding.
        generator: decides all that is random.
        rank: r; more than full rank is full rank.
        factor_bits: of an entry of L1 and L2, 16 for float16.
        iterations: the most turns.
        start: what is known already of this matrix, or of one like it.
    """
    geometry = Geometry(hessian)
    best, errors = start, [] if start is None else [geometry.error(matrix - start.dequantize())]
    for _ in range(iterations):
        coded = matrix if best is None else matrix - best.residual.dequantize()
        low_rank = LowRank.zero((matrix.shape[0], matrix.shape[1]), factor_bits, matrix.device)
        if rank:
            low_rank = LowRank.stored(*geometry.best(coded, min(rank, *matrix.shape), generator), factor_bits)
        left = matrix - low_rank.dequantize()
        residual = coder.encode(left, hessian, generator, None if best is None else best.residual)
        error = geometry.error(left - residual.dequantize())
        if errors and not error < errors[-1]:  # NaN is no fall either
            break
        errors.append(error)
        best = Decomposition(residual=residual, low_rank=low_rank, errors=tuple(errors))
        if len(errors) > 1 and error > (1 - _SMALLEST_GAIN) * errors[-2]:
            break
    assert best is not None
    return best
