"""SpQR's calibration: one sweep for all linears that share an input, with outliers by threshold or under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from algorithms.numerics.column_order import column_order
from algorithms.numerics.column_sweep import Factor, inverse_factor, refine, sweep
from algorithms.numerics.sparse_columns import SparseColumns, SparseSettings, leave_one_out_gain, saliency_scale
from algorithms.numerics.sparse_quantized import SparseQuantized
from algorithms.numerics.statistics import InputStatistics
from algorithms.quantization.spqr.config import SpqrConfig

# A first sweep at a threshold estimated from uncompensated weights misses its budget by a few percent.
_MOST_SWEEPS = 8
_LEAST_USE = 0.95  # of the outliers that a number of bits pays for


def fit(wanted: Mapping[str, Tensor], statistics: InputStatistics | None, config: SpqrConfig) -> Mapping[str, SparseQuantized]:
    """SpQR weights for linears that share an input.

    Args:
        wanted: weights [O, I] by name, the same I for all.
        statistics: of the common input.
        config: bits, groups, order and outliers.
    """
    assert statistics is not None
    hessian = statistics.hessian()
    # Runs of rows with common statistics must not reach from one matrix into the next, nor must a common order or grid.
    together = config.permutation_order != "spearman" and config.per_channel
    if together and all(matrix.shape[0] % config.run == 0 for matrix in wanted.values()):
        return _fit_stack(wanted, hessian, config)
    return {name: _fit_stack({name: matrix}, hessian, config)[name] for name, matrix in wanted.items()}


def settings(config: SpqrConfig, columns: int) -> SparseSettings:
    """The recipe's keys as the column quantizer understands them."""
    return SparseSettings(
        bits=config.bits,
        group_size=columns if config.group_size == -1 else config.group_size,
        symmetric=config.symmetric,
        round_zero=config.round_zero,
        per_channel=config.per_channel,
        scale_bits=config.scale_bits,
        zero_bits=config.zero_bits,
        run=config.run,
        zero_symmetric=config.zero_symmetric,
        leave_one_out=not config.simplified_outliers,
    )


def _fit_stack(wanted: Mapping[str, Tensor], hessian: Tensor, config: SpqrConfig) -> dict[str, SparseQuantized]:
    matrix = torch.cat(list(wanted.values()))
    order = column_order(config.permutation_order, matrix, hessian)
    factor = inverse_factor(hessian, config.damping, order)
    columns = (matrix if order is None else matrix[:, order]).T.contiguous()
    rows, start = {}, 0
    for name, part in wanted.items():
        rows[name] = slice(start, start + part.shape[0])
        start += part.shape[0]
    quantizer, result = _sweep_in_budget(columns, factor, list(rows.values()), order, config)
    if not config.nearest:
        for _ in range(config.refinements):
            refine(columns, result, factor.hessian, quantizer)
    return {name: quantizer.result(place) for name, place in rows.items()}


def _sweep_in_budget(
    columns: Tensor, factor: Factor, rows: list[slice], order: Tensor | None, config: SpqrConfig
) -> tuple[SparseColumns, Tensor]:
    """Sweep at the recipe's threshold; where a matrix misses its budget of outliers, again at a better one."""
    grid = settings(config, columns.shape[0])
    share = config.outlier_share(grid.group_size)
    # Without compensation an error costs its square, whichever the column.
    pivots = torch.ones_like(factor.pivots) if config.nearest else factor.pivots
    thresholds = _thresholds(columns, pivots, rows, grid, config, share)
    searches = [] if share is None else [_ThresholdSearch(place, share, fills=config.target_bits is not None) for place in rows]
    for _ in range(_MOST_SWEEPS):
        quantizer = SparseColumns(columns.shape[0], grid, thresholds.clone(), order)
        result = sweep(columns, None if config.nearest else factor, quantizer)
        moved = [search.step(quantizer, thresholds) for search in searches]
        if not any(moved):
            break
    return quantizer, result


class _ThresholdSearch:
    """Looks for the threshold at which one matrix has as many outliers as it may, or 95 % of that.

    With ``fills`` from any threshold; without, one that makes no more than that to begin with stays.
    What every weight would have cost is known after a sweep; the threshold that this puts at the budget is tried first, then
    the place between one that lets too many pass and one that does not where a straight line in logarithms meets the budget.
    An end of that line that stays counts half as much each time (the Illinois rule): lines through a far one hardly move.
    """

    def __init__(self, place: slice, share: float, *, fills: bool) -> None:
        self._place, self._share, self._fills = place, share, fills
        # Thresholds with the outliers that they make.
        self._too_low, self._holds = (0.0, 0), (math.inf, 0)
        self._sweeps = self._in_a_row = 0  # above the budget; below it where negative

    def step(self, quantizer: SparseColumns, thresholds: Tensor) -> bool:
        """Judge a sweep; whether another is needed, for which ``thresholds`` [O] is then changed."""
        outliers = quantizer.outliers[:, self._place]
        count, allowed = int(outliers.sum()), int(self._share * outliers.numel())
        used = thresholds[self._place][0].item()
        self._sweeps += 1
        if count > allowed:
            self._too_low = max(self._too_low, (used, count))
            self._in_a_row = max(self._in_a_row, 0) + 1
        else:
            self._holds = min(self._holds, (used, count))
            self._in_a_row = min(self._in_a_row, 0) - 1
            stays = self._sweeps == 1 and not self._fills
            if stays or count >= _LEAST_USE * allowed or self._sweeps >= _MOST_SWEEPS // 2:
                return self._settle(thresholds, used)
        thresholds[self._place] = self._next(quantizer.saliencies[:, self._place], allowed)
        return True

    def _settle(self, thresholds: Tensor, used: float) -> bool:
        """Stay with the lowest threshold that holds; a sweep more where that is not the one just used."""
        thresholds[self._place] = self._holds[0]
        return self._holds[0] != used

    def _next(self, saliencies: Tensor, allowed: int) -> float:
        (too_low, above), (holds, below) = self._too_low, self._holds
        if self._sweeps >= _MOST_SWEEPS - 1:
            return holds  # without one that holds, infinite: no outliers rather than too many
        if self._sweeps == 1:
            return _largest(saliencies, allowed)
        if too_low == 0.0:
            return holds / 2
        if holds == math.inf:
            return 2 * too_low
        wanted = max(0.5, (1 + _LEAST_USE) / 2 * allowed)
        down, up = math.log(above / wanted), math.log(wanted / max(0.25, min(below, 0.9 * wanted)))
        stale = 0.5 ** (abs(self._in_a_row) - 1)
        down, up = (down, up * stale) if self._in_a_row > 0 else (down * stale, up)
        return too_low * (holds / too_low) ** (down / (down + up))


def _thresholds(
    columns: Tensor, pivots: Tensor, rows: list[slice], grid: SparseSettings, config: SpqrConfig, share: float | None
) -> Tensor:
    """The threshold of every row to begin with, [O]: the recipe's, relative to its own matrix, or an estimate for the share."""
    thresholds = columns.new_full((columns.shape[1],), torch.inf)
    for place in rows:
        part = columns[:, place]
        if config.target_bits is not None and share is not None:
            thresholds[place] = _threshold_for_share(part, pivots, grid, share)
        elif config.outlier_threshold is not None:
            thresholds[place] = config.outlier_threshold * saliency_scale(part, pivots)
    return thresholds


def _threshold_for_share(columns: Tensor, pivots: Tensor, grid: SparseSettings, share: float) -> float:
    gains = [
        leave_one_out_gain(columns[start : start + grid.group_size], pivots[start : start + grid.group_size], grid)
        for start in range(0, columns.shape[0], grid.group_size)
    ]
    return _largest(torch.cat(gains), int(share * columns.numel()))


def _largest(values: Tensor, count: int) -> float:
    """The value that only ``count`` of the others exceed; infinite for none."""
    if count <= 0:
        return math.inf
    return values.flatten().kthvalue(max(1, values.numel() - count)).values.item()
