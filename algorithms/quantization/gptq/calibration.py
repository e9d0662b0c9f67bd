"""GPTQ's calibration: one sweep for all linears that share an input, and passes of coordinate descent over it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from algorithms.numerics.column_sweep import inverse_factor, refine, sweep
from algorithms.numerics.statistics import InputStatistics
from algorithms.numerics.uniform import UniformCodes, UniformColumns
from algorithms.quantization.gptq.config import GptqConfig


def fit(wanted: Mapping[str, Tensor], statistics: InputStatistics | None, config: GptqConfig) -> Mapping[str, UniformCodes]:
    """Uniform codes for linears that share an input.

    Args:
        wanted: weights [O, I] by name, the same I for all.
        statistics: of the common input.
        config: bits, groups and order.
    """
    assert statistics is not None
    matrix = torch.cat(list(wanted.values()))
    hessian = statistics.hessian()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if config.act_order else None
    factor = inverse_factor(hessian, config.damping, order)
    columns = (matrix if order is None else matrix[:, order]).T.contiguous()
    quantizer = UniformColumns(
        columns.shape[0],
        bits=config.bits,
        group_size=columns.shape[0] if config.group_size == -1 else config.group_size,
        symmetric=config.symmetric,
        search=config.range_search,
        order=order,
    )
    if config.static_groups:
        quantizer.fix_groups(columns, factor.pivots)
    result = sweep(columns, factor, quantizer)
    for _ in range(config.refinements):
        refine(columns, result, factor.hessian, quantizer)
    return split(quantizer.result(), wanted)


def split(codes: UniformCodes, wanted: Mapping[str, Tensor]) -> dict[str, UniformCodes]:
    """The rows of a stack of matrices, by the name of each."""
    parts, start = {}, 0
    for name, matrix in wanted.items():
        parts[name] = codes.rows(start, start + matrix.shape[0])
        start += matrix.shape[0]
    return parts
