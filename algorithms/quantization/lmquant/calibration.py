"""The codes of LMQuant: uniform ones in rows or groups, progressive ones, or none, by the column sweep or to nearest."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from algorithms.blockwise.coded import FreshBlock
from algorithms.formats.plain import PlainWeight, plain
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.numerics.grids.nearest_codes import nearest_codes
from algorithms.numerics.grids.progressive import ProgressiveCodes
from algorithms.numerics.grids.progressive_grid import fit_progressive
from algorithms.numerics.grids.uniform_sweep import SweepSettings, fit_uniform
from algorithms.numerics.spread import Spread
from algorithms.numerics.statistics import InputStatistics
from algorithms.numerics.uniform import Grid, RangeSearch, UniformCodes
from algorithms.quantization.lmquant.preparation import Preparation
from algorithms.quantization.lmquant.settings import ROW, Settings, WeightSetting, role_of

_WEIGHTED = ("OutputsError", "ProductsError")


def has_exact_products(weights: WeightSetting) -> bool:
    """Whether QServe stores the product of scale and zero in float16: with few digits in the scale nothing of it is lost."""
    return weights.group_size == ROW and not weights.symmetric and weights.bits <= 4


class Coder:
    """Prepares blocks and codes their weights as ``settings`` say, which may leave linears of some roles out of a step."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._preparation = Preparation(settings, self._nearest)

    def prepare(self, fresh: FreshBlock) -> Mapping[str, object]:
        """See :class:`algorithms.quantization.lmquant.preparation.Preparation`."""
        return self._preparation.prepare(fresh)

    def fit_uniform(
        self,
        wanted: Mapping[str, Tensor],
        statistics: InputStatistics | None,
        spread: Spread,
        *,
        architecture: ModelArchitecture,
    ) -> Mapping[str, UniformCodes]:
        """Uniform codes for weights [O, I] that share an input; see :class:`algorithms.blockwise.coded.Method`."""
        assert statistics is not None
        role, hessian = role_of(architecture, next(iter(wanted))), statistics.hessian()
        sweep = self._sweep(role)
        if self._uses_sweep(role):
            return fit_uniform(wanted, hessian, sweep)
        search = self._settings.range_search
        metric = hessian if search is not None and search.objective in _WEIGHTED else None
        size = sweep.group_size
        return {
            name: nearest_codes(matrix, group_size=matrix.shape[1] if size == ROW else size, grid=sweep.grid, metric=metric)
            for name, matrix in wanted.items()
        }

    def fit_progressive(
        self,
        wanted: Mapping[str, Tensor],
        statistics: InputStatistics | None,
        spread: Spread,
        *,
        architecture: ModelArchitecture,
    ) -> Mapping[str, ProgressiveCodes]:
        """Progressive codes for weights [O, I] that share an input."""
        assert statistics is not None
        role = role_of(architecture, next(iter(wanted)))
        return fit_progressive(wanted, statistics.hessian() if self._uses_sweep(role) else None, self._sweep(role))

    def keep(
        self,
        wanted: Mapping[str, Tensor],
        statistics: InputStatistics | None,
        spread: Spread,
        *,
        architecture: ModelArchitecture,
    ) -> Mapping[str, PlainWeight]:
        """The weights in float16."""
        return {name: plain(matrix, f"{name}.weight") for name, matrix in wanted.items()}

    def _uses_sweep(self, role: str) -> bool:
        return self._settings.gptq is not None and role not in self._settings.gptq.skips

    def _sweep(self, role: str) -> SweepSettings:
        weights, gptq = self._settings.weights, self._settings.gptq
        assert weights is not None
        return SweepSettings(
            grid=self._grid(role), group_size=weights.group_size, damping=0.01 if gptq is None else gptq.damping
        )

    def _grid(self, role: str) -> Grid:
        weights, search = self._settings.weights, self._settings.range_search
        assert weights is not None
        searched = None
        if search is not None and role not in search.skips and search.ratios != (1.0,):
            searched = RangeSearch(factors=search.ratios, degree=search.degree, weighted=search.objective in _WEIGHTED)
        return Grid(bits=weights.bits, symmetric=weights.symmetric, search=searched, exact_products=has_exact_products(weights))

    def _nearest(self, matrix: Tensor) -> Tensor:
        """W as rounding to nearest would store it; itself where weights stay numbers."""
        weights = self._settings.weights
        if weights is None:
            return matrix
        size = matrix.shape[1] if weights.group_size == ROW else weights.group_size
        grid = Grid(bits=weights.bits, symmetric=weights.symmetric)
        return nearest_codes(matrix, group_size=size, grid=grid).dequantize()
