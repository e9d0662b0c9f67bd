"""Progressive quantization: codes in groups on a grid of 8-bit integers, which is itself a grid of each row's numbers.

Legend: O out_features, I in_features, G groups a row, g columns a group; b bits, codes 0 .. 2^b - 1.

    level 1   N[o, i] = group_scales[o, group(i)] * (codes[o, i] - zeros[o, group(i)])      integers of -128 .. 127
    level 0   W_hat[o, i] = row_scales[o] * N[o, i]

Matrix products can so be taken in 8-bit integers, with one scale a row behind them (QServe, arXiv 2405.04532, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ROWWISE = ("codes", "row_scales", "group_scales", "zeros")


@dataclass(frozen=True, kw_only=True)
class ProgressiveCodes:
    """Codes, group_scales and zeros of one matrix, columns in model order, all on one device.

    ``codes`` [O, I], ``group_scales`` [O, G] and ``zeros`` [O, G] are uint8; groups are runs of I / G neighbours.
    ``row_scales`` [O] are float32, with values that float16 holds.
    """

    codes: Tensor
    row_scales: Tensor
    group_scales: Tensor
    zeros: Tensor
    bits: int = 4

    @property
    def group_size(self) -> int:
        """Columns that share a group scale."""
        return self.codes.shape[1] // self.group_scales.shape[1]

    def intermediate(self) -> Tensor:
        """The integers of level 1, [O, I] int16; a fit keeps them within -128 .. 127, without which no format takes them."""
        O, I = self.codes.shape
        tiles = self.codes.view(O, -1, self.group_size).to(torch.int16) - self.zeros[:, :, None].to(torch.int16)
        return (tiles * self.group_scales[:, :, None].to(torch.int16)).view(O, I)

    def dequantize(self) -> Tensor:
        """The matrix [O, I] in float32."""
        return self.row_scales[:, None] * self.intermediate().float()

    def rows(self, start: int, stop: int) -> ProgressiveCodes:
        """The codes of some output rows."""
        return replace(self, **{name: getattr(self, name)[start:stop] for name in _ROWWISE})

    @classmethod
    def joined(cls, parts: Sequence[ProgressiveCodes]) -> ProgressiveCodes:
        """The codes whose rows are those of the parts, one part after another; the inverse of ``rows``."""
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in _ROWWISE})
