"""Factors for input channels that make a matrix easier to round: AWQ's search (arXiv 2306.00978), without a forward.

W x = (W diag(s)) (diag(s)^-1 x): rounding W diag(s) instead of W moves the error from loud channels to quiet ones. With
dW = round(W diag(s)) diag(s)^-1 - W, a candidate costs sum_j d_j |dW_j|^2, d_j being what an error in channel j costs: no token
is looked at again. Errors of different channels have no sign in common, so that their products add up to about nothing.
Legend: O out_features, I in_features, g columns a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 1e-4
_COARSE = 2  # steps of the fine grid between two ratios that are tried first
_ROWS = 512  # rows of a stack of matrices that stand for all, since one number is looked for


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Factors [I], and what says how they were made, for the report."""

    scales: Tensor
    label: str


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The best candidate, its loss, and the loss without any factors."""

    candidate: Candidate
    loss: float
    plain_loss: float


def activation_scales(sizes: Tensor, weights: Tensor | None, ratio: float) -> Tensor:
    """S = a^r, or a^r / w^(1-r) with each channel's share w of its groups' ranges.

    A channel that no token reaches counts as one of middling size, for another text may reach it.

    Args:
        sizes: a, mean size of each input channel, [I].
        weights: w [I] as :func:`weight_shares` gives it, or None.
        ratio: r.
    """
    reached = sizes > 0
    middling = sizes[reached].log().mean().exp() if reached.any() else torch.ones_like(sizes[:1])
    scales = torch.where(reached, sizes, middling).pow(ratio)
    if weights is not None:
        scales = scales / (weights.pow(1 - ratio) + _SMALLEST)
    return normalised(scales)


def normalised(scales: Tensor) -> Tensor:
    """Positive factors whose smallest and largest have a product of 1; channels without a finite one get 1."""
    scales = torch.where(torch.isfinite(scales), scales, torch.ones_like(scales)).clamp(min=_SMALLEST)
    return scales / (scales.max() * scales.min()).sqrt()


def weight_shares(matrix: Tensor, group_size: int) -> Tensor:
    """Mean over rows of |w| over the largest |w| of its group, [I]."""
    sizes = matrix.abs().view(matrix.shape[0], -1, group_size)
    return (sizes / sizes.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).mean(0).flatten()


def search_ratios(
    candidate: Callable[[float], Candidate], loss: Callable[[Tensor], float], *, steps: int
) -> tuple[Candidate, float]:
    """The best of the ratios i / steps, 0 <= i <= steps: every second one, then those beside the best.

    Args:
        candidate: factors for a ratio.
        loss: of factors [I].
        steps: of the fine grid.
    """
    losses: dict[int, tuple[float, Candidate]] = {}

    def _try(places: Iterable[int]) -> int:
        for place in places:
            if 0 <= place <= steps and place not in losses:
                tried = candidate(place / steps)
                losses[place] = (loss(tried.scales), tried)
        return min(losses, key=lambda place: (losses[place][0], place))

    best = _try(range(0, steps + 1, _COARSE))
    best = _try((best - 1, best + 1))
    return losses[best][1], losses[best][0]


def best_candidate(found: Sequence[tuple[Candidate, float]], plain_loss: float, width: int, like: Tensor) -> Chosen:
    """The best of several searches, or no factors where none of them helps."""
    plain = Candidate(scales=torch.ones(width, device=like.device), label="none")
    candidate, loss = min([(plain, plain_loss), *found], key=lambda pair: pair[1])
    return Chosen(candidate=candidate, loss=loss, plain_loss=plain_loss)


def some_rows(matrix: Tensor) -> Tensor:
    """Rows at even distances that stand for all in a search for one number."""
    return matrix[:: max(1, matrix.shape[0] // _ROWS)]
