"""SpQR's calibration: one sweep for all linears that share an input, with outliers by threshold or under a budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from algorithms.numerics.column_order import column_order
from algorithms.numerics.column_sweep import Factor, inverse_factor, refine, sweep
from algorithms.numerics.sparse_columns import SparseColumns, SparseSettings, leave_one_out_gain, saliency_scale
from algorithms.numerics.sparse_quantized import SparseQuantized
from algorithms.numerics.spread import WHOLE, Spread
from algorithms.numerics.statistics import InputStatistics
from algorithms.quantization.spqr.config import SpqrConfig

logger = logging.getLogger(__name__)

# A first sweep at a threshold estimated from uncompensated weights misses its budget by a few percent.
_MOST_SWEEPS = 8
_LEAST_SCALE = 1e-30
_MANY = 0.1  # the share of outliers above which they are more than a few
_CLOSE = 1.02  # the ratio of two thresholds between which none is looked for
_FILLED = 0.95  # the least share of a budget that counts as used


def fit(
    wanted: Mapping[str, Tensor], statistics: InputStatistics | None, config: SpqrConfig, spread: Spread = WHOLE
) -> Mapping[str, SparseQuantized]:
    """SpQR weights for linears that share an input.

    Args:
        wanted: weights [O, I] by name, the same I for all.
        statistics: of the common input.
        config: bits, groups, order and outliers.
        spread: over processes, of the rows of each weight, where :func:`splits` allows that.
    """
    assert statistics is not None
    hessian = statistics.hessian()
    # Runs of rows with common statistics must not reach from one matrix into the next, nor must a common order or grid.
    together = config.permutation_order != "spearman" and config.per_channel
    if together and all(matrix.shape[0] % config.run == 0 for matrix in wanted.values()):
        return _fit_stack(wanted, hessian, config, spread)
    return {name: _fit_stack({name: matrix}, hessian, config, spread)[name] for name, matrix in wanted.items()}


def splits(config: SpqrConfig) -> bool:
    """Whether rows can be fitted apart: no common order or grid looks at all of them, nor does a budget of outliers."""
    has_budget = config.target_bits is not None or config.max_outlier_share is not None
    return config.per_channel and config.permutation_order != "spearman" and not has_budget


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


def _fit_stack(wanted: Mapping[str, Tensor], hessian: Tensor, config: SpqrConfig, spread: Spread) -> dict[str, SparseQuantized]:
    matrix = torch.cat(list(wanted.values()))
    order = column_order(config.permutation_order, matrix, hessian)
    factor = None if config.nearest else inverse_factor(hessian, config.damping, order)
    columns = (matrix if order is None else matrix[:, order]).T.contiguous()
    rows, start = {}, 0
    for name, part in wanted.items():
        rows[name] = slice(start, start + part.shape[0])
        start += part.shape[0]
    quantizer, result = _sweep_in_budget(columns, factor, list(rows.values()), order, config, spread)
    if factor is not None:
        for _ in range(config.refinements):
            refine(columns, result, factor.hessian, quantizer)
    for name, place in rows.items():
        share = quantizer.outliers[:, place].float().mean().item()
        if share > _MANY:
            logger.warning(
                "%s keeps %.0f %% of its weights as outliers, 32 bits each; "
                "a larger outlier_threshold, more wbits or target_bits makes it smaller", name, 100 * share,
            )  # fmt: skip
    return {name: quantizer.result(place) for name, place in rows.items()}


def _sweep_in_budget(
    columns: Tensor,
    factor: Factor | None,
    rows: list[slice],
    order: Tensor | None,
    config: SpqrConfig,
    spread: Spread,
) -> tuple[SparseColumns, Tensor]:
    """Sweep at the recipe's threshold; where a matrix misses its budget of outliers, again at a better one."""
    grid = settings(config, columns.shape[0])
    share = config.outlier_share(grid.group_size)
    # Without compensation an error costs its square, whichever the column.
    pivots = torch.ones_like(columns[:, 0]) if factor is None else factor.pivots
    thresholds = _thresholds(columns, pivots, rows, grid, config, share, spread)
    lowest = [0.0 if config.target_bits is not None else thresholds[place][0].item() for place in rows]
    pairs = [] if share is None else zip(rows, lowest, strict=True)
    searches = [_ThresholdSearch(place, share or 0.0, lowest=least) for place, least in pairs]
    for _ in range(_MOST_SWEEPS):
        quantizer = SparseColumns(columns.shape[0], grid, thresholds.clone(), order)
        result = sweep(columns, factor, quantizer)
        moved = [search.step(quantizer, thresholds) for search in searches]
        if not any(moved):
            break
    return quantizer, result


class _ThresholdSearch:
    """Looks for the threshold at which one matrix has as many outliers as it may, never more, and tries for 95 % of them.

    It never goes below ``lowest``, where fewer outliers are enough. What every weight would have cost is known after a sweep;
    the threshold that this puts at the budget is tried first. From then on the number of outliers is taken for a power of the
    threshold, through the two nearest that were tried.
    """

    def __init__(self, place: slice, share: float, *, lowest: float) -> None:
        self._place, self._share, self._lowest = place, share, lowest
        self._tried: list[tuple[float, int]] = []  # thresholds and how many outliers they gave

    def step(self, quantizer: SparseColumns, thresholds: Tensor) -> bool:
        """Judge a sweep; whether another is needed, for which ``thresholds`` [O] is then changed."""
        outliers = quantizer.outliers[:, self._place]
        count, allowed = int(outliers.sum()), int(self._share * outliers.numel())
        used = thresholds[self._place][0].item()
        self._tried.append((used, count))
        is_enough = count >= _FILLED * allowed or used <= self._lowest or len(self._tried) >= _MOST_SWEEPS
        if count <= allowed and is_enough:
            return False
        holding = min((threshold for threshold, count in self._tried if count <= allowed), default=math.inf)
        passing = max((threshold for threshold, count in self._tried if count > allowed), default=0.0)
        if len(self._tried) >= _MOST_SWEEPS - 1 or holding < _CLOSE * passing:
            better = holding  # without one that holds, infinite: no outliers rather than too many
        elif len(self._tried) == 1:
            better = _largest(quantizer.saliencies[:, self._place], allowed)
        else:
            better = self._interpolated(allowed, passing, holding)
        thresholds[self._place] = max(better, self._lowest)
        return count > allowed or thresholds[self._place][0].item() != used

    def _interpolated(self, allowed: int, passing: float, holding: float) -> float:
        """A threshold for the middle of what is accepted, between one that lets too many pass and one that holds."""
        aim = max((1 + _FILLED) / 2 * allowed, 1.0)
        nearest = sorted(self._tried, key=lambda pair: abs(math.log(max(pair[1], 1) / aim)))[:2]
        (first, many), (second, few) = ((threshold, math.log(max(count, 1))) for threshold, count in nearest)
        if many == few or not min(first, second) > 0.0 or max(first, second) == math.inf:
            guess = math.sqrt(passing * holding) if passing > 0.0 and holding < math.inf else max(2 * passing, holding / 2)
        else:
            guess = first * math.exp(math.log(second / first) / (few - many) * (math.log(aim) - many))
        # Not near either end, or a number of outliers that is no power of the threshold would let it creep.
        inside = 1.5 if passing == 0.0 or holding == math.inf else (holding / passing) ** 0.2
        return min(max(guess, inside * passing), holding / inside)


def _thresholds(
    columns: Tensor,
    pivots: Tensor,
    rows: list[slice],
    grid: SparseSettings,
    config: SpqrConfig,
    share: float | None,
    spread: Spread,
) -> Tensor:
    """The threshold of every row to begin with, [O]: the recipe's, relative to its own matrix, or an estimate for the share."""
    thresholds = columns.new_full((columns.shape[1],), torch.inf)
    for place in rows:
        part = columns[:, place]
        if config.target_bits is not None and share is not None:
            thresholds[place] = _threshold_for_share(part, pivots, grid, share)
        elif config.outlier_threshold is not None:
            scale = saliency_scale(part.double(), pivots.double(), spread).item()
            # Where nothing that is lost could matter (no input, or rows that are all alike) there is nothing to be relative to.
            thresholds[place] = config.outlier_threshold * scale if scale > _LEAST_SCALE else math.inf
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
