"""Mean and variance of channels over tokens that come in batches, exact whatever the batches are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.statistics import is_usable


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of I channels over ``count`` tokens: ``mean`` and ``deviation`` [I] float64, the sum of squared distances from it."""

    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def none(cls, channels: int, device: torch.device | str = "cpu") -> Moments:
        """Of no token."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(count=0, mean=zeros, deviation=zeros)

    @classmethod
    def of(cls, tokens: Tensor) -> Moments:
        """Of tokens [..., I]; those whose squares cannot be added up are left out."""
        rows = tokens.detach().reshape(-1, tokens.shape[-1])
        rows = rows[is_usable(rows.float())].double()
        if not rows.shape[0]:
            return cls.none(tokens.shape[-1], tokens.device)
        mean = rows.mean(0)
        return cls(count=rows.shape[0], mean=mean, deviation=(rows - mean).square_().sum(0))

    def with_(self, other: Moments) -> Moments:
        """Of both sets of tokens (Chan, Golub and LeVeque's update)."""
        count = self.count + other.count
        if count == 0:
            return self
        distance, share = other.mean - self.mean, other.count / count
        return Moments(
            count=count,
            mean=self.mean + distance * share,
            deviation=self.deviation + other.deviation + distance.square() * (self.count * share),
        )

    @property
    def variance(self) -> Tensor:
        """Mean squared distance from the mean, [I] float32."""
        return (self.deviation / max(1, self.count)).float()

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2, [I] float32."""
        return (self.deviation / max(1, self.count) + self.mean.square()).float()


def together(parts: Sequence[Moments]) -> Moments:
    """Of all sets of tokens."""
    total = parts[0]
    for part in parts[1:]:
        total = total.with_(part)
    return total
