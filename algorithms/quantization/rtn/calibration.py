"""Rounding to nearest: the column sweep without a Hessian, so that no column makes up for another."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from algorithms.numerics.grids.uniform_sweep import SweepSettings, fit_uniform
from algorithms.numerics.uniform import Grid, RangeSearch, UniformCodes
from algorithms.quantization.rtn.config import RtnConfig


def fit(wanted: Mapping[str, Tensor], config: RtnConfig) -> Mapping[str, UniformCodes]:
    """Uniform codes for each weight [O, I], by name."""
    search = RangeSearch() if config.range_search else None
    grid = Grid(bits=config.bits, symmetric=config.symmetric, search=search)
    settings = SweepSettings(grid=grid, group_size=config.group_size)
    return fit_uniform(wanted, None, settings)
