"""Quantization of quantization statistics: scales and zeros of neighbouring rows share a small grid (SpQR, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.numerics.sparse_quantized import Statistics

_SMALLEST = 2.0**-24  # float16's smallest number above zero
_LARGEST = 65504.0
# Half of what float16 reaches, and a power of two: where all rows of a run are one power of two, as the zeros of symmetric
# grids are, it is exact.
LARGEST_ZERO = 2.0**15


def quantize_statistics(values: Tensor, *, bits: int, run: int, symmetric: bool = False) -> Statistics:
    """Two-level statistics of one group of columns.

    Every run of neighbouring rows gets the grid that spans its minimum and maximum, its scale and zero rounded to float16
    before codes are chosen. With ``symmetric`` the grid spans as far below zero as above, or begins at zero.

    Args:
        values: scales or zeros [O].
        bits: of a code.
        run: rows a run; a last one that is shorter repeats its last value.
        symmetric: as above.

    Returns:
        Codes [O, 1], run scales and zeros [R, 1].
    """
    rows = values.shape[0]
    padding = -rows % run
    runs = torch.cat([values, values[-1:].expand(padding)]).view(-1, run)
    top = (1 << bits) - 1
    low, high = runs.amin(1), runs.amax(1)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, torch.zeros_like(high))
    # A spread that is small beside the values would give a zero beyond float16.
    least = torch.maximum(low.abs(), high.abs()).div(LARGEST_ZERO).clamp(min=_SMALLEST)
    scales = torch.maximum((high - low) / top, least).half().float().clamp(min=_SMALLEST)
    zeros = (-low / scales).clamp(-_LARGEST, _LARGEST).half().float()
    codes = torch.round(runs / scales[:, None] + zeros[:, None]).clamp_(0, top)
    return Statistics(
        codes=codes.view(-1)[:rows, None].to(torch.uint8),
        run_scales=scales[:, None],
        run_zeros=zeros[:, None],
        bits=bits,
        run=run,
    )


def join_groups(parts: list[Statistics]) -> Statistics:
    """The statistics of all groups from those of each."""
    first = parts[0]
    if first.codes is None:
        return Statistics(values=torch.cat([part.values for part in parts if part.values is not None], 1))
    return Statistics(
        codes=torch.cat([part.codes for part in parts if part.codes is not None], 1),
        run_scales=torch.cat([part.run_scales for part in parts if part.run_scales is not None], 1),
        run_zeros=torch.cat([part.run_zeros for part in parts if part.run_zeros is not None], 1),
        bits=first.bits,
        run=first.run,
    )
