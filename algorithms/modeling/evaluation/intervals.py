"""How far a figure on a text may lie from that on all texts of its kind: bootstrap intervals over windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from algorithms.numerics.randomness import keyed_generator

RESAMPLES = 2000
LEVEL = 0.95
_SEED = 0

Interval = tuple[float, float]


def bootstrap(statistic: Callable[[Tensor], Tensor], *per_window: Tensor) -> Interval | None:
    """The percentile interval, at ``LEVEL``, of a statistic of windows that are drawn again with replacement.

    Windows are the units, since tokens of a window are no independent draws (Efron and Tibshirani 1993, chapters 13 and 8.5).

    Args:
        statistic: means [resamples, values] over windows -> figures [resamples].
        per_window: one float64 tensor [windows] for each value; all are drawn together, so that differences stay paired.

    Returns:
        The two ends; None for fewer than two windows, which say nothing about their spread.
    """
    values = torch.stack(per_window, dim=1).double()
    count = values.shape[0]
    if count < 2:
        return None
    generator = keyed_generator(_SEED, "bootstrap", count)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    means = torch.stack([values[rows].mean(dim=0) for rows in drawn])
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(statistic(means).double(), ends).tolist()
    return low, high
