"""An order of columns for every block of rows in which neighbours are alike (ReALLM's code, block-wise permutation)."""

from __future__ import annotations

import torch
from torch import Tensor

_NEIGHBOURS = 16


def similar_columns(matrix: Tensor, rows: int) -> Tensor:
    """Columns in an order for every block of rows, [blocks, I] int64.

    Each column is followed by that of the rest which is nearest to the mean of the last 16 that were taken; the first is the
    model's first.

    Args:
        matrix: [O, I].
        rows: of a block; the last may be smaller.
    """
    return torch.stack([_order(block) for block in matrix.split(rows)])


def _order(block: Tensor) -> Tensor:
    columns = block.T.contiguous()
    count = columns.shape[0]
    order = torch.empty(count, dtype=torch.int64, device=block.device)
    squares = columns.square().sum(1)
    current = 0
    for place in range(count):
        order[place] = current
        squares[current] = torch.inf  # it is taken
        mean = columns[order[max(0, place + 1 - _NEIGHBOURS) : place + 1]].mean(0)
        current = int(torch.addmv(squares, columns, mean, alpha=-2).argmin())
    return order
