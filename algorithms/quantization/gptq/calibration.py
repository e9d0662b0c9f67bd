"""GPTQ's calibration: one sweep for all linears that share an input, and passes of coordinate descent over it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from algorithms.numerics.grids.uniform_sweep import SweepSettings, fit_uniform
from algorithms.numerics.statistics import InputStatistics
from algorithms.numerics.uniform import Grid, RangeSearch, UniformCodes
from algorithms.quantization.gptq.config import GptqConfig


def fit(wanted: Mapping[str, Tensor], statistics: InputStatistics | None, config: GptqConfig) -> Mapping[str, UniformCodes]:
    """Uniform codes for linears that share an input.

    Args:
        wanted: weights [O, I] by name, the same I for all.
        statistics: of the common input.
        config: bits, groups and order.
    """
    assert statistics is not None
    search = RangeSearch() if config.range_search else None
    settings = SweepSettings(
        grid=Grid(bits=config.bits, symmetric=config.symmetric, search=search),
        group_size=config.group_size,
        act_order=config.act_order,
        static_groups=config.static_groups,
        damping=config.damping,
        refinements=config.refinements,
    )
    return fit_uniform(wanted, statistics.hessian(), settings)
