"""Uniform codes for matrices that share an input, by the column sweep: GPTQ, and what other methods make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.column_sweep import inverse_factor, refine, sweep
from algorithms.numerics.uniform import Grid, GroupGrid, UniformCodes, UniformColumns

WHOLE_ROW = -1


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """``grid`` of every group of ``group_size`` columns (-1: the whole row), and how the sweep goes.

    ``act_order`` visits columns with the largest diagonal of H first; ``static_groups`` keeps groups runs of neighbouring
    columns then. ``refinements`` are passes of coordinate descent after the sweep.
    """

    grid: Grid
    group_size: int
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    refinements: int = 1


def fit_uniform(wanted: Mapping[str, Tensor], hessian: Tensor | None, settings: SweepSettings) -> dict[str, UniformCodes]:
    """Uniform codes for weights [O, I] by name, the same I for all.

    Args:
        wanted: the weights.
        hessian: H [I, I] of their common input; None rounds every weight on its own.
        settings: grid, groups and order.
    """
    codes = sweep_codes(torch.cat(list(wanted.values())), hessian, settings, settings.grid)
    return {name: codes.rows(*place) for name, place in row_places(wanted).items()}


def sweep_codes(matrix: Tensor, hessian: Tensor | None, settings: SweepSettings, grid: GroupGrid) -> UniformCodes:
    """Uniform codes of W [O, I]; ``grid`` takes the place of the settings' own."""
    order, factor = None, None
    if hessian is not None:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if settings.act_order else None
        factor = inverse_factor(hessian, settings.damping, order)
    columns = (matrix if order is None else matrix[:, order]).T.contiguous()
    quantizer = UniformColumns(
        columns.shape[0],
        group_size=columns.shape[0] if settings.group_size == WHOLE_ROW else settings.group_size,
        grid=grid,
        order=order,
    )
    if factor is not None and settings.static_groups:
        quantizer.fix_groups(columns, factor.pivots)
    result = sweep(columns, factor, quantizer)
    if factor is not None:
        for _ in range(settings.refinements):
            refine(columns, result, factor.hessian, quantizer)
    return quantizer.result()


def row_places(matrices: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    """First row and the one after the last of each matrix in a stack of all."""
    places, start = {}, 0
    for name, matrix in matrices.items():
        places[name] = (start, start + matrix.shape[0])
        start += matrix.shape[0]
    return places
