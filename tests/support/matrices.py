"""Random problems with Hessians far from the identity, random weights as methods leave them, and coders of small residuals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from algorithms.numerics.codebooks.additive import AdditiveCodes
from algorithms.numerics.residuals.aqlm import AdditiveCoder
from algorithms.numerics.residuals.coder import ResidualCoder
from algorithms.numerics.residuals.nf import NormalFloatCoder
from algorithms.numerics.residuals.vq import VectorCoder, VectorSettings
from algorithms.numerics.sparse_quantized import Outliers, SparseQuantized, Statistics

# Of each kind one for every way of storing it.
CODERS: dict[str, Callable[[], ResidualCoder]] = {
    "vq": lambda: VectorCoder(VectorSettings(code_bits=4, bucket=2)),
    "vq of three": lambda: VectorCoder(VectorSettings(code_bits=6, bucket=3)),
    "vq of ten bits": lambda: VectorCoder(VectorSettings(code_bits=10, bucket=2)),
    "vq permuted": lambda: VectorCoder(VectorSettings(code_bits=4, bucket=2, permutes=True)),
    "nf2": lambda: NormalFloatCoder(2),
    "nf3": lambda: NormalFloatCoder(3),
    "aqlm": lambda: AdditiveCoder(6, 4),
    "aqlm of two books": lambda: AdditiveCoder(10, 4),
}


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


def two_level_statistics(rows: int, groups: int, *, bits: int, run: int, low: float, high: float, seed: int) -> Statistics:
    """Values between low and high that float16 holds exactly: two-level, or plain for 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 16:
        return Statistics(values=(torch.rand(rows, groups, generator=generator) * (high - low) + low).half().float())
    runs = -(-rows // run)
    span = (high - low) / (1 << bits)
    scales = (span * (0.5 + 0.5 * torch.rand(runs, groups, generator=generator))).half().float()
    return Statistics(
        codes=torch.randint(1 << bits, (rows, groups), generator=generator, dtype=torch.uint8),
        run_scales=scales,
        run_zeros=(-low / scales).half().float(),
        bits=bits,
        run=run,
    )


def sparse_weight(
    rows: int,
    columns: int,
    *,
    bits: int = 3,
    group_size: int = 16,
    statistic_bits: int = 3,
    run: int = 16,
    outliers: float = 0.02,
    ordered: bool = True,
    seed: int = 0,
) -> SparseQuantized:
    """Codes that use the whole grid, a share of outliers, and a random order of columns where ``ordered`` is not."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    top = float(1 << bits)
    shape = {"bits": statistic_bits, "run": run}
    mask = torch.rand(rows, columns, generator=generator) < outliers
    values = (torch.randn(rows, columns, generator=generator) * columns**-0.5).half().float()
    return SparseQuantized(
        codes=codes,
        scales=two_level_statistics(rows, columns // group_size, low=0.1 / top, high=0.5 / top, seed=seed + 1, **shape),
        zeros=two_level_statistics(rows, columns // group_size, low=0.3 * top, high=0.7 * top, seed=seed + 2, **shape),
        outliers=Outliers.of(mask, values),
        order=None if ordered else torch.randperm(columns, generator=generator).to(torch.int32),
        bits=bits,
    )
