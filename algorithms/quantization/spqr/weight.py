"""SpQR weights: what they cost to store, under training, and as plain uniform codes where they are that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from algorithms.finetuning.learned_rounding import RoundingLinear
from algorithms.formats.spqr import packed as spqr
from algorithms.numerics.sparse_quantized import SparseQuantized, Statistics
from algorithms.numerics.uniform import UniformCodes, stored_scales


def stored_bits(weight: SparseQuantized) -> Mapping[str, int]:
    """Bits of one linear by component, all that its packed form holds: row pointers, permutation and header included."""
    return spqr.stored_bits(spqr.pack(weight, "a linear"), "a linear")


def tunable(weight: SparseQuantized, target: Tensor, bias: Tensor | None) -> RoundingLinear:
    """A linear under training: codes and outliers move, and scales where each row has its own in float16."""
    order = None if weight.order is None else weight.order.long()
    outliers = weight.outliers
    shape = (weight.codes.shape[0], weight.codes.shape[1] // weight.group_size)
    return RoundingLinear(
        target if order is None else target[:, order].contiguous(),
        weight.codes,
        weight.scales.decode().expand(shape).contiguous(),
        weight.zeros.decode().expand(shape).contiguous(),
        bits=weight.bits,
        bias=bias,
        inverse=None if order is None else torch.argsort(order),
        scales_are_fixed=not _has_free_scales(weight),
        outliers=(outliers.rows, outliers.columns.long(), outliers.values) if outliers.values.numel() else None,
    )


def tuned(linear: RoundingLinear, before: SparseQuantized) -> SparseQuantized:
    """The stored weight of a tuned linear."""
    codes, outliers, scales = linear.current_codes(), before.outliers, before.scales
    if linear.outliers is not None:
        places = outliers.rows, outliers.columns.long()
        codes[places] = before.codes[places]
        outliers = replace(outliers, values=linear.outliers.detach().half().float())
    if _has_free_scales(before):
        scales = Statistics(values=stored_scales(linear.scales.detach()))
    return replace(before, codes=codes, scales=scales, outliers=outliers)


def as_uniform(weight: SparseQuantized) -> UniformCodes:
    """The same weight as uniform codes; it has no outliers, whole zeros and plain scales."""
    order = None if weight.order is None else weight.order.long()
    columns = weight.codes.shape[1]
    groups = torch.arange(columns, dtype=torch.int32) // weight.group_size
    shape = (weight.codes.shape[0], columns // weight.group_size)
    inverse = None if order is None else torch.argsort(order)
    return UniformCodes(
        codes=weight.codes if inverse is None else weight.codes[:, inverse],
        scales=weight.scales.decode().expand(shape).contiguous(),
        zeros=weight.zeros.decode().expand(shape).contiguous(),
        bits=weight.bits,
        groups=None if inverse is None or shape[1] == 1 else groups[inverse],
    )


def _has_free_scales(weight: SparseQuantized) -> bool:
    return weight.scales.values is not None and weight.scales.values.shape[0] == weight.codes.shape[0]
