"""Adam and LAMB as PV-Tuning uses them, on tensors that may be one rank's part of a larger one.

With gradient g, m and v its running mean and mean square, the step is u = m / (sqrt(v) + eps), times the rate, times
sqrt(1 - beta2^t) / (1 - beta1^t) where that is debiased; LAMB (arXiv 1904.00962) multiplies by |w| / |u|, so that the rate is a
share of the tensor's own size whatever that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdamRule:
    """How a kind of tensors is stepped. ``sixteen_bit`` keeps m in float16 and v in bfloat16."""

    beta1: float
    beta2: float
    lamb: bool = False
    amsgrad: bool = False
    debias: bool = True
    sixteen_bit: bool = False
    eps: float = 1e-6

    def moments(self, like: Tensor) -> dict[str, Tensor]:
        """Fresh running means for a tensor; without beta1 there is no first, with amsgrad the largest second is kept too."""
        first, second = (torch.float16, torch.bfloat16) if self.sixteen_bit else (torch.float32, torch.float32)
        found = {"second": torch.zeros_like(like, dtype=second)}
        if self.beta1 > 0:
            found["first"] = torch.zeros_like(like, dtype=first)
        if self.amsgrad:
            found["largest"] = torch.zeros_like(like, dtype=second)
        return found


@torch.no_grad()
def adam_step(
    tensor: Tensor,
    gradient: Tensor,
    moments: dict[str, Tensor],
    *,
    rule: AdamRule,
    rate: float,
    step: int,
    sum_: Callable[[Tensor], None] = lambda sums: None,
) -> None:
    """Move a tensor, in place, against its gradient; both are this rank's part.

    Args:
        tensor: what moves, any floating dtype.
        gradient: of the same shape.
        moments: from :meth:`AdamRule.moments`, updated in place.
        rule: betas and variants.
        rate: the learning rate of this step.
        step: how many steps the moments will have seen with this one, from 1.
        sum_: adds up squared norms [2] over the ranks that hold the other parts, in place.
    """
    gradient = gradient.float()
    update = _running(moments["first"], gradient, rule.beta1) if "first" in moments else gradient.clone()
    second = _running(moments["second"], gradient.square(), rule.beta2)
    if "largest" in moments:
        second = torch.maximum(second, moments["largest"].float())
        moments["largest"].copy_(second)
    update /= second.sqrt() + rule.eps
    factor = rate
    if rule.debias:
        factor *= math.sqrt(1 - rule.beta2**step) / (1 - rule.beta1**step)
    if rule.lamb:
        norms = torch.stack([tensor.float().square().sum(dtype=torch.float64), update.square().sum(dtype=torch.float64)])
        sum_(norms)
        ratio = math.sqrt(norms[0].item() / norms[1].item()) if norms.min() > 0 else 1.0
        factor *= ratio
    tensor.add_(update, alpha=-factor)


def _running(mean: Tensor, value: Tensor, beta: float) -> Tensor:
    """The running mean with a new value in it, in float32, stored as ``mean`` can hold it."""
    if mean.dtype == torch.float32:
        return mean.mul_(beta).add_(value, alpha=1 - beta).clone()
    moved = mean.float().mul_(beta).add_(value, alpha=1 - beta)
    mean.copy_(moved)
    return moved
