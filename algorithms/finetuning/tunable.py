"""Linears whose weight is computed from other, trainable tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


class TunableLinear(nn.Module):
    """A linear layer whose weight [out_features, in_features] is decoded from this module's parameters.

    Args:
        bias: the layer's bias [out_features], or None; trained along with the rest.
    """

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._leaf: Tensor | None = None

    @abstractmethod
    def decode(self) -> Tensor:
        """The weight [out_features, in_features], differentiable in this module's parameters."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., in_features] to [..., out_features]."""
        return F.linear(inputs, self.decode() if self._leaf is None else self._leaf, self.bias)

    @contextmanager
    def shared_weight(self) -> Iterator[None]:
        """Decode once for all micro-batches of a step; on leaving, the weight's gradient flows on to the parameters."""
        weight = self.decode()
        self._leaf = weight.detach().requires_grad_(True)
        try:
            yield
            if self._leaf.grad is not None:
                weight.backward(self._leaf.grad)
        finally:
            self._leaf = None
