"""Rounding to nearest for all groups at once: the range of each chosen by what it costs, no column making up for another.

Legend: O out_features, I in_features, G groups a row, g columns a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.numerics.uniform import Grid, UniformCodes, powers

_MEASURED = 128  # columns of a group between which errors count: whole rows would cost I^2 a row and range
_ELEMENTS = 1 << 19  # of a matrix that are tried together: few enough to stay in the cache, which halves the time


def nearest_codes(matrix: Tensor, *, group_size: int, grid: Grid, metric: Tensor | None = None) -> UniformCodes:
    """Uniform codes of W [O, I], whose groups are runs of neighbours.

    Without a ``metric``, ranges are searched to the least sum of |error|^degree.

    Args:
        matrix: W.
        group_size: g, a divisor of I.
        grid: bits, and which ranges are tried.
        metric: H [I, I], whose diagonal blocks then measure the error of each group: that of the group's part of the output.
            Of a group of more than 128 columns, runs of at most so many are measured each on its own, and added up.
    """
    blocks = None if metric is None else _diagonal_blocks(metric, _run_length(group_size))
    rows = max(1, _ELEMENTS // matrix.shape[1])
    return UniformCodes.joined([_nearest(part, group_size, grid, blocks) for part in matrix.split(rows)])


def _nearest(matrix: Tensor, group_size: int, grid: Grid, blocks: Tensor | None) -> UniformCodes:
    tiles = matrix.reshape(matrix.shape[0], -1, group_size)
    full, zeros = grid.full(tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0))
    scales = grid.stored(full)
    if grid.search is not None:
        least = torch.full_like(scales, torch.inf)
        for factor in grid.search.factors:
            tried = grid.stored(full * factor)
            difference = _steps(tiles, tried, zeros, grid).mul_(tried[:, :, None]).sub_(tiles)
            errors = powers(difference, grid.search.degree).sum(-1) if blocks is None else _measured(difference, blocks)
            better = errors < least
            least = torch.where(better, errors, least)
            scales = torch.where(better, tried, scales)
    codes = _steps(tiles, scales, zeros, grid).add_(zeros[:, :, None])
    return UniformCodes(codes=codes.view_as(matrix).to(torch.uint8), scales=scales, zeros=zeros, bits=grid.bits)


def _steps(tiles: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """Codes less zeros, [O, G, g]."""
    codes = torch.div(tiles, scales[:, :, None]).add_(zeros[:, :, None]).round_().clamp_(0, grid.top)
    return codes.sub_(zeros[:, :, None])


def _measured(difference: Tensor, blocks: Tensor) -> Tensor:
    """The squared error [O, G] of each group's part of the output, from differences [O, G, g] and metrics [runs, r, r]."""
    O, G, _ = difference.shape
    runs = difference.view(O, blocks.shape[0], -1).transpose(0, 1)
    return torch.linalg.vecdot(runs @ blocks, runs).T.reshape(O, G, -1).sum(-1)


def _run_length(group_size: int) -> int:
    """The longest run of columns, a divisor of the group size, that is measured at once."""
    return max(length for length in range(1, min(group_size, _MEASURED) + 1) if group_size % length == 0)


def _diagonal_blocks(metric: Tensor, size: int) -> Tensor:
    """The blocks [I / r, r, r] on the diagonal of a matrix [I, I]."""
    return torch.stack([metric[first : first + size, first : first + size] for first in range(0, metric.shape[0], size)])
