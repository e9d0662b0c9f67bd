"""Rounding to nearest for all groups at once: the range of each chosen by what it costs, no column making up for another.

Legend: O out_features, I in_features, G groups a row, g columns a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.numerics.uniform import Grid, UniformCodes, powers


def nearest_codes(matrix: Tensor, *, group_size: int, grid: Grid, metric: Tensor | None = None) -> UniformCodes:
    """Uniform codes of W [O, I], whose groups are runs of neighbours.

    Without a ``metric``, ranges are searched to the least sum of |error|^degree.

    Args:
        matrix: W.
        group_size: g, a divisor of I.
        grid: bits, and which ranges are tried.
        metric: H [I, I], whose diagonal blocks then measure the error of each group: that of the group's part of the output.
    """
    tiles = matrix.view(matrix.shape[0], -1, group_size)
    full, zeros = grid.full(tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0))
    scales = grid.stored(full)
    if grid.search is not None:
        blocks = None if metric is None else _diagonal_blocks(metric, group_size)
        least = torch.full_like(scales, torch.inf)
        for factor in grid.search.factors:
            tried = grid.stored(full * factor)
            difference = _steps(tiles, tried, zeros, grid).mul_(tried[:, :, None]).sub_(tiles)
            if blocks is None:
                errors = powers(difference, grid.search.degree).sum(-1)
            else:
                errors = torch.einsum("ogi,gij,ogj->og", difference, blocks, difference)
            better = errors < least
            least = torch.where(better, errors, least)
            scales = torch.where(better, tried, scales)
    codes = _steps(tiles, scales, zeros, grid).add_(zeros[:, :, None])
    return UniformCodes(codes=codes.view_as(matrix).to(torch.uint8), scales=scales, zeros=zeros, bits=grid.bits)


def _steps(tiles: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """Codes less zeros, [O, G, g]."""
    codes = torch.div(tiles, scales[:, :, None]).add_(zeros[:, :, None]).round_().clamp_(0, grid.top)
    return codes.sub_(zeros[:, :, None])


def _diagonal_blocks(metric: Tensor, size: int) -> Tensor:
    """The blocks [G, g, g] on the diagonal of a matrix [I, I]."""
    return torch.stack([metric[first : first + size, first : first + size] for first in range(0, metric.shape[0], size)])
