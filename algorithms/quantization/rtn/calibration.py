"""Rounding to nearest: the column sweep without a Hessian, so that no column makes up for another."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from algorithms.numerics.column_sweep import sweep
from algorithms.numerics.uniform import UniformCodes, UniformColumns
from algorithms.quantization.rtn.config import RtnConfig


def fit(wanted: Mapping[str, Tensor], config: RtnConfig) -> Mapping[str, UniformCodes]:
    """Uniform codes for each weight [O, I], by name."""
    return {name: _rounded(matrix, config) for name, matrix in wanted.items()}


def _rounded(matrix: Tensor, config: RtnConfig) -> UniformCodes:
    columns = matrix.T.contiguous()
    quantizer = UniformColumns(
        columns.shape[0],
        bits=config.bits,
        group_size=columns.shape[0] if config.group_size == -1 else config.group_size,
        symmetric=config.symmetric,
        search=config.range_search,
    )
    sweep(columns, None, quantizer)
    return quantizer.result()
