"""Rounding of embeddings and of decoder weights to a few bits, through which gradients pass as if there were none.

Legend: b bits. An embedding is squashed to (-1, 1) and has 2^b values at even distances from -1 to 1, so that it needs no
scales; ``tops``, 2^b - 1, are its largest codes. A row of decoder weights (all that lead to one channel) has whole numbers from
-top to top at a scale, top being 2^(b-1) - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_SCALE = 2.0**-24  # float16's smallest number above zero


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``values``."""
    return values + (rounded - values).detach()


def embedding_codes(values: Tensor, tops: Tensor) -> Tensor:
    """The codes, whole numbers from 0 in float32, of values from -1 to 1; both of one shape."""
    return torch.minimum(((values + 1) * (tops / 2)).round().clamp(min=0), tops)


def embedding_values(codes: Tensor, tops: Tensor) -> Tensor:
    """What the codes stand for."""
    return codes * (2 / tops) - 1


def row_scales(weight: Tensor, tops: Tensor) -> Tensor:
    """The scale of every row of a weight [R, ...], [R] with float16 values: its largest magnitude has the largest code.

    Args:
        weight: of one layer.
        tops: [R].
    """
    largest = weight.detach().flatten(1).abs().amax(1)
    return (largest / tops).half().float().clamp(min=_SMALLEST_SCALE)


def weight_codes(weight: Tensor, scales: Tensor, tops: Tensor) -> Tensor:
    """The codes [R, ...] of a weight, whole numbers in float32."""
    shape = (-1, *[1] * (weight.dim() - 1))
    codes, tops = (weight / scales.view(shape)).round(), tops.view(shape)
    return torch.minimum(torch.maximum(codes, -tops), tops)


def weight_values(codes: Tensor, scales: Tensor) -> Tensor:
    """What the codes stand for."""
    return codes * scales.view(-1, *[1] * (codes.dim() - 1))


def rounded_weight(weight: Tensor, tops: Tensor) -> Tensor:
    """A weight as it is stored, with its own gradient."""
    scales = row_scales(weight, tops)
    return straight_through(weight, weight_values(weight_codes(weight.detach(), scales, tops), scales))
