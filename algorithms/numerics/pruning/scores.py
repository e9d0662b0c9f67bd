"""What an input channel is worth to the linear that reads it (FLAP, arXiv 2312.11983, section 3.2).

    IFV   Var(x_j)      WIFV   Var(x_j) |W_:j|^2      WIFN   mean_o |W_oj| sqrt(E x_j^2)

The fluctuation of a channel is what its mean, put into a bias, cannot make up for. Legend: O out_features, I in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.numerics.pruning.moments import Moments

METRICS = ("IFV", "WIFV", "WIFN")


def channel_scores(metric: str, matrix: Tensor, moments: Moments) -> Tensor:
    """Scores [I] of the input channels of W [O, I]."""
    if metric == "IFV":
        return moments.variance
    if metric == "WIFV":
        return moments.variance * matrix.float().square().sum(0)
    return matrix.float().abs().mean(0) * moments.mean_square.sqrt()


def standardised(scores: Tensor) -> Tensor:
    """Scores of a block's channels on a scale that all blocks share: mean 0 and deviation 1; zeros where all are equal."""
    deviation = scores.std() if scores.numel() > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
