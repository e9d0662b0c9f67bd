"""Input channels taken out one after another, the cheapest first, while those that are left make up for them.

The structured form of optimal brain surgery (ZipLM, arXiv 2302.04089). With C the covariance of the inputs and P = C^-1,
taking channels S out of W costs tr(W_S (P_SS)^-1 W_S^T) in the squared error of the outputs if the others take their best
values, which are W - W_S (P_SS)^-1 P_S; P then loses P_.S (P_SS)^-1 P_S. Legend: O out_features, I in_features, U units, each
of I / U neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 256  # units that go between two looks at what all the others cost are so many that this many looks are enough

_LEAST = 1e-6  # of the mean variance, in the ridge of a channel that has none


def removal_losses(matrix: Tensor, covariance: Tensor, *, width: int, ridge: float) -> Tensor:
    """What each unit costs when its turn comes, [U] float64, and never less than what went before it.

    So the units that are worth more than some number are those that a greedy elimination up to it leaves.

    Args:
        matrix: W [O, I].
        covariance: C [I, I], positive semi-definite up to rounding; float64.
        width: channels of a unit.
        ridge: share of each channel's own variance that C gets before it is inverted: a constant channel then costs nothing.
    """
    weight, precision = matrix.detach().double().clone(), _precision(covariance, ridge)
    count = weight.shape[1] // width
    losses = torch.zeros(count, dtype=torch.float64, device=weight.device)
    alive = torch.ones(count, dtype=torch.bool, device=weight.device)
    together, reached = max(1, count // _ROUNDS), torch.zeros((), dtype=torch.float64, device=weight.device)
    while alive.any():
        costs = _costs(weight, precision, width).masked_fill_(~alive, torch.inf)
        chosen = torch.argsort(costs, stable=True)[: min(together, int(alive.sum()))]
        losses[chosen] = torch.maximum(costs[chosen], reached)
        reached = losses[chosen].max()
        alive[chosen] = False
        _take_out(weight, precision, chosen, width)
    return losses


def _precision(covariance: Tensor, ridge: float) -> Tensor:
    """(C + ridge)^-1 [I, I]. The ridge grows where rounding has left C indefinite: means far larger than deviations do that."""
    diagonal = covariance.diagonal().double().abs()
    least = (_LEAST * diagonal.mean()).clamp(min=torch.finfo(torch.float32).tiny)
    assert least.isfinite(), "statistics leave out what is not finite"
    while True:
        damped = covariance.double().clone()
        damped.diagonal().add_(ridge * (diagonal + least))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return torch.cholesky_inverse(factor)
        ridge *= 10


def _costs(weight: Tensor, precision: Tensor, width: int) -> Tensor:
    """What taking out each unit alone costs, [U]."""
    if width == 1:
        return weight.square().sum(0) / precision.diagonal()
    costs = []
    for first in range(0, weight.shape[1], width):
        inside = slice(first, first + width)
        solved = torch.linalg.solve(precision[inside, inside], weight[:, inside].T)
        costs.append(torch.sum(solved.T * weight[:, inside]))
    return torch.stack(costs)


def _take_out(weight: Tensor, precision: Tensor, units: Tensor, width: int) -> None:
    """Let the other channels make up for some units, in place; what is gone has a weight of zero and a precision of one."""
    gone = (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
    shares = torch.linalg.solve(precision[gone][:, gone], precision[gone])
    weight.addmm_(weight[:, gone], shares, alpha=-1)
    precision.addmm_(precision[:, gone], shares, alpha=-1)
    weight[:, gone] = 0.0
    precision[gone] = 0.0
    precision[:, gone] = 0.0
    precision[gone, gone] = 1.0
