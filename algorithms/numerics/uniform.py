"""Uniform quantization: integer codes on an evenly spaced grid, with a scale and a zero point for every group of columns.

Legend: O out_features, I in_features, G groups a row, g columns a group; b bits, codes 0 .. 2^b - 1.

    W_hat[o, i] = scales[o, group(i)] * (codes[o, i] - zeros[o, group(i)])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

# A group of zeros needs some scale. One this small has lost most of float16's digits, but codes are chosen for it as stored.
SMALLEST_SCALE = 2.0**-20
_ZERO_BITS = 4  # of zeros whose products with a scale are kept exact


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
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], zeros=self.zeros[start:stop])

    @classmethod
    def joined(cls, parts: Sequence[UniformCodes]) -> UniformCodes:
        """The codes whose rows are those of the parts, one part after another; the inverse of ``rows``."""
        names = ("codes", "scales", "zeros")
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """Which ranges are tried for a group, as factors of the full one, and the power of an error that is summed.

    Not ``weighted``, errors in all columns count alike.
    """

    factors: tuple[float, ...] = tuple(1 - 0.6 * step / 24 for step in range(24))
    degree: float = 2.0
    weighted: bool = True


class GroupGrid(Protocol):
    """How a quantizer of columns gets the grid of a group: codes 0 .. ``top`` of ``bits``."""

    @property
    def bits(self) -> int:
        """Of a code."""
        ...

    @property
    def top(self) -> int:
        """The largest code."""
        ...

    def fit(self, columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros [O] of a group, from its columns [g, O], in which errors count by ``weights`` [g]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Grids whose scales are float16 values and whose zeros are whole; see :class:`GroupGrid`.

    ``search`` chooses each range by its error; None takes minimum and maximum. ``exact_products`` leaves scales so few digits
    that scale times zero is a float16 number, for formats that store this product.
    """

    bits: int
    symmetric: bool
    search: RangeSearch | None = None
    exact_products: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def full(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales, not yet rounded, and whole zeros of grids that span ``low`` (at most 0) to ``high`` (at least 0)."""
        if self.symmetric:
            scales = torch.maximum(-low, high) * 2 / self.top
            return scales, torch.full_like(scales, 1 << (self.bits - 1))
        return whole_zero_grid(low, high, self.top)

    def stored(self, scales: Tensor) -> Tensor:
        """Scales as they are stored."""
        stored = stored_scales(scales)
        return short_scales(stored) if self.exact_products else stored

    def fit(self, columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`fit_grid`."""
        return fit_grid(columns, weights, self)


def fit_grid(columns: Tensor, weights: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and whole zeros [O] of one group, from its columns [g, O]; scales are float16 values.

    The grid spans the range of each row's weights and zero. With a search the range is shrunk to the least error under
    ``weights`` [g]: what clipping a few weights costs, finer steps can give back. A row of zeros gets the smallest scale.
    """
    full, zeros = grid.full(columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0))
    scales = grid.stored(full)
    if grid.search is None:
        return scales, zeros
    weights = weights if grid.search.weighted else torch.ones_like(weights)
    least = torch.full_like(scales, torch.inf)
    for factor in grid.search.factors:
        tried = grid.stored(full * factor)
        rounded = torch.round(columns / tried + zeros).clamp_(0, grid.top).sub_(zeros).mul_(tried)
        errors = weights @ powers(rounded.sub_(columns), grid.search.degree)
        better = errors < least
        least = torch.where(better, errors, least)
        scales = torch.where(better, tried, scales)
    return scales, zeros


def powers(errors: Tensor, degree: float) -> Tensor:
    """|errors|^degree, in place."""
    return errors.square_() if degree == 2 else errors.abs_().pow_(degree)


def whole_zero_grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scales and whole zeros of ranges that hold zero: ``low`` at most 0, ``high`` at least 0, codes 0 .. ``top``.

    A zero of 0 is left out: GPTQ's layout stores zero - 1, and its clients disagree on what -1 means. The code below zero is
    then lost on a range without negative numbers, and the others reach to its end in wider steps; one bit cannot afford that.
    """
    least = min(1, top - 1)
    scales = (high - low) / top
    zeros = torch.round(-low / scales.clamp(min=SMALLEST_SCALE))
    return torch.where(zeros < least, high / (top - least), scales), zeros.clamp(least, top)


def stored_scales(scales: Tensor) -> Tensor:
    """Scales as float16 holds them, none below ``SMALLEST_SCALE``."""
    return scales.clamp(min=SMALLEST_SCALE).half().float()


def short_scales(scales: Tensor) -> Tensor:
    """Float16 scales rounded to so few digits that their products with zeros of 0 to 15 are float16 numbers as well."""
    mantissa, exponent = torch.frexp(scales)
    digits = 1 << (11 - _ZERO_BITS)
    return torch.ldexp(torch.round(mantissa * digits) / digits, exponent)


class UniformColumns:
    """The column quantizer of GPTQ and of rounding to nearest: one grid for each row and group of columns.

    Args:
        num_columns: I.
        group_size: g, a divisor of I.
        grid: how groups get their scales.
        order: with ``static`` groups, the model column at each place of the sweep, [I] int64.
    """

    def __init__(self, num_columns: int, *, group_size: int, grid: GroupGrid, order: Tensor | None = None) -> None:
        self.group_size = group_size
        self._grid, self._order = grid, order
        self._groups = [place // group_size for place in range(num_columns)]
        self._is_static = False
        self._scales: dict[int, Tensor] = {}
        self._zeros: dict[int, Tensor] = {}
        self._codes: list[Tensor] = [torch.empty(0)] * num_columns

    def fix_groups(self, columns: Tensor, pivots: Tensor) -> None:
        """Fit all groups before the sweep (static groups): they are runs of model columns, whatever the order of the sweep.

        Args:
            columns: W transposed, [I, O], in the order of the sweep.
            pivots: U_jj of each, [I].
        """
        places = torch.arange(len(self._groups)) if self._order is None else torch.argsort(self._order)
        for group in range(len(self._groups) // self.group_size):
            inside = places[group * self.group_size : (group + 1) * self.group_size].to(columns.device)
            self._fit(group, columns[inside], pivots[inside])
            for place in inside.tolist():
                self._groups[place] = group
        self._is_static = True

    def begin_group(self, start: int, columns: Tensor, pivots: Tensor) -> None:
        """See :class:`algorithms.numerics.column_sweep.ColumnQuantizer`."""
        if not self._is_static:
            self._fit(start // self.group_size, columns, pivots)

    def quantize(self, place: int, column: Tensor, pivot: Tensor) -> Tensor:
        """See :class:`algorithms.numerics.column_sweep.ColumnQuantizer`."""
        return self.requantize(place, column)

    def requantize(self, place: int, column: Tensor) -> Tensor:
        """See :class:`algorithms.numerics.column_sweep.ColumnQuantizer`."""
        scales, zeros = self._scales[self._groups[place]], self._zeros[self._groups[place]]
        codes = torch.div(column, scales).add_(zeros).round_().clamp_(0, self._grid.top)
        self._codes[place] = codes
        return (codes - zeros).mul_(scales)

    def result(self) -> UniformCodes:
        """What the sweep chose, columns in model order."""
        num_groups = len(self._scales)
        codes = torch.stack(self._codes)
        groups = None
        if self._order is not None:
            inverse = torch.argsort(self._order)
            codes = codes[inverse]
            if not self._is_static and num_groups > 1:
                groups = torch.tensor(self._groups, dtype=torch.int32, device=codes.device)[inverse]
        return UniformCodes(
            codes=codes.T.contiguous().to(torch.uint8),
            scales=torch.stack([self._scales[group] for group in range(num_groups)], 1),
            zeros=torch.stack([self._zeros[group] for group in range(num_groups)], 1),
            bits=self._grid.bits,
            groups=groups,
        )

    def _fit(self, group: int, columns: Tensor, pivots: Tensor) -> None:
        self._scales[group], self._zeros[group] = self._grid.fit(columns, pivots.square().reciprocal())
