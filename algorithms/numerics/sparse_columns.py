"""SpQR's column quantizer: small groups with two-level statistics, and outliers that stay as they are (arXiv 2306.03078).

Legend: O out_features, I in_features, g columns a group; columns first, [I, O]; d_j = U_jj of the sweep. What an error in
column j costs is its square over d_j squared; a weight whose rounding costs more than its row's threshold is an outlier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from algorithms.numerics.sparse_quantized import Outliers, SparseQuantized, Statistics
from algorithms.numerics.spread import WHOLE, Spread
from algorithms.numerics.two_level import LARGEST_ZERO, join_groups, quantize_statistics
from algorithms.numerics.uniform import SMALLEST_SCALE, stored_scales, whole_zero_grid

_LARGEST_OUTLIER = 65504.0  # in float16


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """How groups are fitted. ``scale_bits`` and ``zero_bits`` None keep those statistics in float16.

    Zeros stay between codes unless ``round_zero``; ``symmetric`` puts them at (2^bits) / 2. ``per_channel`` false gives all
    rows of a matrix one grid a group. ``leave_one_out`` fits a group without the weights that would be outliers.
    """

    bits: int
    group_size: int
    symmetric: bool = False
    round_zero: bool = False
    per_channel: bool = True
    scale_bits: int | None = None
    zero_bits: int | None = None
    run: int = 16
    zero_symmetric: bool = False
    leave_one_out: bool = True

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros of ranges [...]; a range of one point is widened to zero, so that a constant group is exact.

        A grid that is symmetric or has whole zeros holds zero, whatever the range. Where the range is small beside its
        values, steps are widened until float16 can hold the zero.
        """
        if self.symmetric:
            scales = (torch.maximum(low.abs(), high.abs()) * 2 / self.top).clamp(min=SMALLEST_SCALE)
            return scales, torch.full_like(scales, (self.top + 1) / 2)
        if self.round_zero:
            scales, zeros = whole_zero_grid(low.clamp(max=0), high.clamp(min=0), self.top)
            return scales.clamp(min=SMALLEST_SCALE), zeros
        point = low >= high
        low, high = torch.where(point, low.clamp(max=0), low), torch.where(point, high.clamp(min=0), high)
        least = torch.maximum(low.abs(), high.abs()) / LARGEST_ZERO
        scales = torch.maximum((high - low) / self.top, least).clamp(min=SMALLEST_SCALE)
        return scales, -low / scales


def saliency_scale(columns: Tensor, pivots: Tensor, spread: Spread = WHOLE) -> Tensor:
    """What thresholds are relative to: the mean over columns of their variance over rows, divided by d_j^2.

    Args:
        columns: [I, O].
        pivots: d_j, [I].
        spread: over processes, of the rows.
    """
    return (_variance(columns, spread) / pivots.square()).mean()


def _variance(columns: Tensor, spread: Spread) -> Tensor:
    if spread.count == 1:
        return columns.var(1)
    sums, count = columns.sum(1), columns.new_tensor(columns.shape[1])
    spread.sum_(sums, count)
    squares = (columns - (sums / count)[:, None]).square().sum(1)
    spread.sum_(squares)
    return squares / (count - 1)


def leave_one_out_gain(columns: Tensor, pivots: Tensor, settings: SparseSettings) -> Tensor:
    """How much the error of its group falls when a weight is left out of it, [g, O].

    Leaving out a weight inside the range changes nothing but its own error; only without the smallest or the largest is the
    grid another one, and that spans the two smallest and two largest values: three grids a group instead of g.

    Args:
        columns: of one group, [g, O].
        pivots: d_j, [g].
        settings: of the grid.
    """
    values, places = columns.sort(0)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        """Cost of rounding every weight to the grid of a range, [g, O]."""
        scales, zeros = settings.grid(low, high)
        rounded = torch.round(columns / scales + zeros).clamp_(0, settings.top).sub_(zeros).mul_(scales)
        return rounded.sub_(columns).div_(pivots[:, None]).square_()

    gains = errors(values[0], values[-1])
    if columns.shape[0] == 1:
        return gains
    total = gains.sum(0)
    for place, low, high in ((places[:1], values[1], values[-1]), (places[-1:], values[0], values[-2])):
        others = errors(low, high)
        remaining = others.sum(0) - others.gather(0, place)[0]
        gains.scatter_(0, place, (total - remaining)[None])
    return gains


class SparseColumns:
    """See :class:`algorithms.numerics.column_sweep.ColumnQuantizer`.

    Args:
        num_columns: I.
        settings: how groups are fitted.
        thresholds: of each row, [O]; infinite without outliers.
        order: the model column at each place of the sweep, [I] int64, or None.
    """

    def __init__(self, num_columns: int, settings: SparseSettings, thresholds: Tensor, order: Tensor | None) -> None:
        self.group_size = settings.group_size
        self._settings, self._thresholds, self._order = settings, thresholds, order
        self._detects = bool(torch.isfinite(thresholds).any())
        self._scales: list[Statistics] = []
        self._zeros: list[Statistics] = []
        self._grids: list[tuple[Tensor, Tensor]] = []
        self.codes = torch.zeros(num_columns, thresholds.shape[0], device=thresholds.device)
        self.outliers = torch.zeros(num_columns, thresholds.shape[0], dtype=torch.bool, device=thresholds.device)
        self.values = torch.zeros_like(self.codes)
        self.saliencies = torch.zeros_like(self.codes)

    def begin_group(self, start: int, columns: Tensor, pivots: Tensor) -> None:
        """See :class:`algorithms.numerics.column_sweep.ColumnQuantizer`."""
        if self._detects and self._settings.leave_one_out:
            kept = leave_one_out_gain(columns, pivots, self._settings) <= self._thresholds
            mean = (columns * kept).sum(0) / kept.sum(0).clamp(min=1)
            columns = torch.where(kept, columns, mean)
        low, high = columns.amin(0), columns.amax(0)
        if not self._settings.per_channel:
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        self._store(*self._settings.grid(low, high))

    def quantize(self, place: int, column: Tensor, pivot: Tensor) -> Tensor:
        """See :class:`algorithms.numerics.column_sweep.ColumnQuantizer`."""
        rounded = self._round(place, column)
        if not self._detects:
            return rounded
        saliency = torch.sub(rounded, column).div_(pivot).square_()
        # An outlier is stored in float16; a weight beyond that is rounded to its grid like any other.
        outliers = (saliency > self._thresholds) & (column.abs() <= _LARGEST_OUTLIER)
        self.outliers[place], self.saliencies[place] = outliers, saliency
        # The code below an outlier is that of zero, so that a reader that adds outliers to the rest has least to undo.
        plain = self._round(place, torch.where(outliers, torch.zeros_like(column), column))
        self.values[place] = _as_stored(column)
        return torch.where(outliers, self.values[place], plain)

    def requantize(self, place: int, column: Tensor) -> Tensor:
        """See :class:`algorithms.numerics.column_sweep.ColumnQuantizer`; outliers stay what they are and take any value."""
        if not self._detects:
            return self._round(place, column)
        outliers = self.outliers[place]
        plain = self._round(place, torch.where(outliers, torch.zeros_like(column), column))
        self.values[place] = _as_stored(column)
        return torch.where(outliers, self.values[place], plain)

    def result(self, rows: slice = slice(None)) -> SparseQuantized:
        """What the sweep chose for some rows, which begin and end with a run."""
        run = self._settings.run
        runs = slice(None if rows.start is None else rows.start // run, None if rows.stop is None else -(-rows.stop // run))
        return SparseQuantized(
            codes=self.codes[:, rows].T.contiguous().to(torch.uint8),
            scales=self._statistics(self._scales, rows, runs),
            zeros=self._statistics(self._zeros, rows, runs),
            outliers=Outliers.of(self.outliers[:, rows].T, self.values[:, rows].T),
            order=None if self._order is None else self._order.to(torch.int32),
            bits=self._settings.bits,
        )

    def _statistics(self, parts: list[Statistics], rows: slice, runs: slice) -> Statistics:
        joined = join_groups(parts)
        if joined.codes is None or joined.run_scales is None or joined.run_zeros is None:
            assert joined.values is not None
            return Statistics(values=joined.values[rows] if self._settings.per_channel else joined.values[:1])
        codes = joined.codes[rows]
        if joined.run == joined.codes.shape[0]:  # one run for all rows, however many there are
            return replace(joined, codes=codes, run=codes.shape[0])
        return replace(joined, codes=codes, run_scales=joined.run_scales[runs], run_zeros=joined.run_zeros[runs])

    def _store(self, scales: Tensor, zeros: Tensor) -> None:
        settings = self._settings
        kept = Statistics(values=stored_scales(scales)[:, None])
        if settings.scale_bits is not None:
            kept = quantize_statistics(scales, bits=settings.scale_bits, run=settings.run)
        kept_zeros = _stored_zeros(zeros, settings)
        self._scales.append(kept)
        self._zeros.append(kept_zeros)
        self._grids.append((kept.decode()[:, 0], kept_zeros.decode()[:, 0]))

    def _round(self, place: int, column: Tensor) -> Tensor:
        scales, zeros = self._grids[place // self.group_size]
        # A scale whose two-level code stands for nothing, or less, divides nothing.
        divisors = torch.where(scales > 0, scales, torch.full_like(scales, torch.inf))
        codes = torch.div(column, divisors).add_(zeros).round_().clamp_(0, self._settings.top)
        self.codes[place] = codes
        return codes.sub(zeros).mul_(scales)


def _stored_zeros(zeros: Tensor, settings: SparseSettings) -> Statistics:
    """Zeros [O] of one group: known ones in a bit, two-level ones, whole ones in as many bits as a code, others in float16."""
    if settings.per_channel and settings.symmetric:
        return _whole(torch.zeros_like(zeros), bits=1, offset=-zeros[:1])
    is_smaller = settings.zero_bits is not None and (not settings.round_zero or settings.zero_bits < settings.bits)
    if settings.zero_bits is not None and is_smaller and not settings.symmetric:
        return quantize_statistics(zeros, bits=settings.zero_bits, run=settings.run, symmetric=settings.zero_symmetric)
    if settings.per_channel and settings.round_zero:
        return _whole(zeros, bits=settings.bits, offset=torch.zeros_like(zeros[:1]))
    return Statistics(values=zeros.half().float()[:, None])


def _whole(codes: Tensor, *, bits: int, offset: Tensor) -> Statistics:
    """Whole numbers code - offset as statistics of two levels whose second is trivial: one run of all rows, in steps of one."""
    return Statistics(
        codes=codes[:, None].to(torch.uint8),
        run_scales=torch.ones_like(offset)[:, None],
        run_zeros=offset[:, None],
        bits=bits,
        run=codes.shape[0],
    )


def _as_stored(column: Tensor) -> Tensor:
    return column.clamp(-_LARGEST_OUTLIER, _LARGEST_OUTLIER).half().float()
