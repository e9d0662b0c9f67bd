"""Uniform quantization: integer codes on an evenly spaced grid, with a scale and a zero point for every group of columns.

Legend: O out_features, I in_features, G groups a row, g columns a group; b bits, codes 0 .. 2^b - 1.

    W_hat[o, i] = scales[o, group(i)] * (codes[o, i] - zeros[o, group(i)])
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Below float16's smallest normal number a stored scale loses its precision; a group of zeros needs some scale.
SMALLEST_SCALE = 2.0**-14
_SHRINKAGES = 24
_SHRINK_RANGE = 0.6


@dataclass(frozen=True, kw_only=True)
class UniformCodes:
    """Codes [O, I] uint8, scales [O, G] and zeros [O, G] float32 of one matrix, all on one device, columns in model order.

    ``zeros`` are in units of the scale and may lie between codes; a symmetric grid has 2^(bits - 1) in every place.
    ``groups`` [I] int32 is the group of each column; None stands for runs of I / G neighbours.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    groups: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """The matrix [O, I] in float32."""
        if self.groups is None:
            O, I = self.codes.shape
            tiles = self.codes.view(O, -1, self.group_size).float() - self.zeros[:, :, None]
            return (tiles * self.scales[:, :, None]).view(O, I)
        groups = self.groups.long()
        return self.scales[:, groups] * (self.codes.float() - self.zeros[:, groups])

    def rows(self, start: int, stop: int) -> UniformCodes:
        """The codes of some output rows."""
        return replace(
            self, codes=self.codes[start:stop], scales=self.scales[start:stop], zeros=self.zeros[start:stop]
        )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One grid a row: scales [O, 1] and zeros [O, 1], for codes 0 .. ``top``."""

    scales: Tensor
    zeros: Tensor
    top: int

    def codes(self, values: Tensor) -> Tensor:
        """The nearest codes of values [O, n], as float32 whole numbers."""
        return torch.round(values / self.scales + self.zeros).clamp_(0, self.top)

    def decode(self, codes: Tensor) -> Tensor:
        """The values [O, n] that codes [O, n] stand for."""
        return (codes - self.zeros) * self.scales

    def nearest(self, values: Tensor) -> Tensor:
        """Values [O, n] rounded to the grid."""
        return self.decode(self.codes(values))
