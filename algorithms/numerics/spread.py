"""Rows that lie on several processes, a part on each: what mathematics on all of them has to know.

Every process runs the same function on its own rows, draws the same random numbers, and adds up what concerns all rows with a
callable that it is handed. In one process nothing of this does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _add_nothing(*tensors: Tensor) -> None:
    """A process alone has all there is."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Process ``index`` of ``count``; rows lie on them in the order of processes.

    ``sum_`` replaces each tensor that it is given by its sum over the processes, and gives every one the same bits: a loop that
    all have to leave together may only look at such sums. All processes call it in the same order.
    """

    index: int = 0
    count: int = 1
    sum_: Callable[..., None] = _add_nothing

    def run_of(self, count: int, together: int = 1) -> slice:
        """Where this process's rows stand among ``count`` rows, shared out evenly in multiples of ``together`` and a rest."""
        first, last = (together * (count // together * index // self.count) for index in (self.index, self.index + 1))
        return slice(first, count if self.index == self.count - 1 else last)

    def number(self, rows: Tensor) -> tuple[int, int]:
        """The number of this process's first row among those of all, and how many those are."""
        if self.count == 1:
            return 0, rows.shape[0]
        counts = torch.zeros(self.count, dtype=torch.int64, device=rows.device)
        counts[self.index] = rows.shape[0]
        self.sum_(counts)
        return int(counts[: self.index].sum()), int(counts.sum())

    def own(self, chosen: Tensor, rows: Tensor, first: int) -> Tensor:
        """Places in ``rows``, which begin with number ``first``, of those among the ``chosen`` numbers that lie here."""
        chosen = chosen.to(rows.device)
        return chosen if self.count == 1 else chosen[self._lies_here(chosen, rows, first)] - first

    def fetch(self, chosen: Tensor, rows: Tensor, first: int) -> Tensor:
        """The rows of the ``chosen`` numbers, wherever they lie, on every process."""
        chosen = chosen.to(rows.device)
        if self.count == 1:
            return rows[chosen]
        here = self._lies_here(chosen, rows, first)
        fetched = rows.new_zeros(chosen.shape[0], *rows.shape[1:])
        fetched[here] = rows[chosen[here] - first]
        self.sum_(fetched)
        return fetched

    def _lies_here(self, chosen: Tensor, rows: Tensor, first: int) -> Tensor:
        return (chosen >= first) & (chosen < first + rows.shape[0])


WHOLE = Spread()
