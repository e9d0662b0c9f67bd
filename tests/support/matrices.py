"""Random problems for the additive codebooks, with Hessians that are far from the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.numerics.codebooks.additive import AdditiveCodes


def problem(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A matrix W [rows, columns] and a Hessian [columns, columns] of correlated inputs with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)[:, None]
    inputs = torch.randn(tokens or 4 * columns, columns, generator=generator) @ mixing
    return matrix, inputs.T @ inputs / inputs.shape[0]


def random_codes(
    rows: int, columns: int, *, num_codebooks: int, num_codewords: int, group_shape: tuple[int, int] = (1, 4), seed: int = 0
) -> AdditiveCodes:
    """Additive codes with random codewords and positive scales."""
    generator = torch.Generator().manual_seed(seed)
    og, ig = group_shape
    return AdditiveCodes(
        codes=torch.randint(num_codewords, (rows // og, columns // ig, num_codebooks), generator=generator),
        codebooks=torch.randn(num_codebooks, num_codewords, og, ig, generator=generator),
        scales=torch.rand(rows // og, generator=generator) + 0.5,
    )
