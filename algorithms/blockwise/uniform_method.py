"""What methods with uniform codes have in common: storage, exports, and the linear that is tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from algorithms.blockwise.coded import FreshBlock, Method
from algorithms.blockwise.config import BlockwiseParameters
from algorithms.blockwise.pipeline import Pipeline
from algorithms.blockwise.uniform_exports import Setting, exporters, read_export
from algorithms.finetuning.learned_rounding import RoundingLinear
from algorithms.formats import uniform
from algorithms.numerics.spread import Spread
from algorithms.numerics.statistics import InputStatistics
from algorithms.numerics.uniform import UniformCodes, stored_scales

Fit = Callable[[Mapping[str, Tensor], InputStatistics | None, Spread], Mapping[str, UniformCodes]]


def uniform_pipeline(
    *,
    name: str,
    config: BlockwiseParameters,
    fit: Fit,
    setting: Setting,
    exports: Sequence[str],
    needs_text: bool = True,
    prepare: Callable[[FreshBlock], Mapping[str, object]] | None = None,
) -> Pipeline[UniformCodes]:
    """The stages of a method that turns weights into uniform codes by ``fit``; ``prepare``: see :class:`Method`."""
    method = Method(
        name=name,
        fit=fit,
        pack=uniform.pack,
        dense_state=uniform.dense_state,
        stored_bits=uniform.stored_bits,
        tunable=tunable,
        tuned=tuned,
        join=UniformCodes.joined,
        prepare=prepare,
    )
    return Pipeline(
        config=config,
        method=method,
        exports=exports,
        exporters=exporters(setting),
        read_export=read_export,
        needs_text=needs_text,
        export_settings={"awq_version": setting.awq_version} if "awq" in exports else {},
    )


def tunable(weight: UniformCodes, target: Tensor, bias: Tensor | None, *, scales_are_fixed: bool = False) -> RoundingLinear:
    """A linear under training whose codes start as ``weight``'s and which knows the wanted weight [O, I]."""
    order = None if weight.groups is None else torch.argsort(weight.groups, stable=True)
    return RoundingLinear(
        target if order is None else target[:, order],
        weight.codes if order is None else weight.codes[:, order],
        weight.scales,
        weight.zeros,
        bits=weight.bits,
        bias=bias,
        inverse=None if order is None else torch.argsort(order),
        scales_are_fixed=scales_are_fixed,
    )


def tuned(linear: RoundingLinear, before: UniformCodes) -> UniformCodes:
    """The stored weight of a tuned linear."""
    codes = linear.current_codes()
    if before.groups is not None:
        codes = codes[:, torch.argsort(torch.argsort(before.groups, stable=True))]
    return replace(before, codes=codes, scales=stored_scales(linear.scales.detach()))
