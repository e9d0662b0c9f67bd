"""Random weights as SpQR leaves them, with statistics that float16 holds exactly."""

from __future__ import annotations

import torch

from algorithms.numerics.sparse_quantized import Outliers, SparseQuantized, Statistics


def statistics(rows: int, groups: int, *, bits: int, run: int, low: float, high: float, seed: int) -> Statistics:
    """Values between low and high: two-level, or plain for 16 bits."""
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
        scales=statistics(rows, columns // group_size, low=0.1 / top, high=0.5 / top, seed=seed + 1, **shape),
        zeros=statistics(rows, columns // group_size, low=0.3 * top, high=0.7 * top, seed=seed + 2, **shape),
        outliers=Outliers.of(mask, values),
        order=None if ordered else torch.randperm(columns, generator=generator).to(torch.int32),
        bits=bits,
    )
