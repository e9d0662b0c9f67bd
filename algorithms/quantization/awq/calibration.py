"""AWQ's calibration: weights whose input channels are scaled, rounded to nearest with clipped ranges or by the column sweep."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from algorithms.numerics.grids.nearest_codes import nearest_codes
from algorithms.numerics.grids.uniform_sweep import SweepSettings, fit_uniform
from algorithms.numerics.statistics import InputStatistics
from algorithms.numerics.uniform import Grid, RangeSearch, UniformCodes
from algorithms.quantization.awq.config import AwqConfig


def fit(wanted: Mapping[str, Tensor], statistics: InputStatistics | None, config: AwqConfig) -> Mapping[str, UniformCodes]:
    """Uniform codes for linears that share an input.

    Args:
        wanted: weights [O, I] by name, the same I for all, the factors of their input channels in them.
        statistics: of the common input, which is divided by the factors.
        config: bits, groups, and whether errors are spread over other columns.
    """
    assert statistics is not None
    grid = Grid(bits=config.bits, symmetric=not config.zero_point, search=RangeSearch() if config.apply_clip else None)
    hessian = statistics.hessian()
    if config.gptq:
        settings = SweepSettings(
            grid=grid, group_size=config.group_size, damping=config.damping, refinements=config.refinements
        )
        return fit_uniform(wanted, hessian, settings)
    return {
        name: nearest_codes(
            matrix,
            group_size=matrix.shape[1] if config.group_size == -1 else config.group_size,
            grid=grid,
            metric=hessian,
        )
        for name, matrix in wanted.items()
    }
