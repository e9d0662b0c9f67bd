"""Factors for the input channels of linears, moved into what comes before them: the block computes what it did.

With s for every input channel of a group, W x = (W diag(s)) (diag(s)^-1 x): the linears' columns are multiplied by s, and the
norm or the linear that makes x gives it divided by s. Legend: I input channels of the group, R output rows of the feeder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.mixtures.deferred import change_weight

_STORAGE = torch.float16  # in which norms and biases are stored, so that what a factor becomes in them is known


def group_of(architecture: ModelArchitecture, leader: str) -> tuple[str, ...]:
    """All linears that share the input of a group's first one."""
    return next(group for group in architecture.input_groups if group[0] == leader)


def feeder_rows(block: nn.Module, architecture: ModelArchitecture, leader: str) -> Tensor:
    """The feeder's output row behind each input channel of a group, [I] int64.

    Where a head's values serve several query heads, their channels have the same rows. Of a fused feeder, the last rows count:
    the values behind queries and keys, or the ups behind the gates.

    Raises:
        ValueError: the rows of the feeder do not divide the channels.
    """
    feeder = architecture.feeders[leader]
    held = block.get_submodule(feeder).weight.shape[0]
    channels = block.get_submodule(leader).weight.shape[1]
    rows = held
    if feeder in architecture.fused:  # queries have a row for each channel, keys as many rows as values; gates as many as ups
        rows = (held - channels) // 2 if architecture.qkv is not None and feeder == architecture.qkv[2] else held // 2
    if channels % rows:
        raise ValueError(f"{leader} reads {channels} channels, of which {rows} rows of {feeder} are no part")
    places = torch.arange(held - rows, held)
    if channels == rows:
        return places
    width = block.get_submodule(architecture.attention).head_dim
    return places.view(-1, 1, width).expand(-1, channels // rows, -1).reshape(-1)


def can_fold(architecture: ModelArchitecture, leader: str) -> bool:
    """Whether something before a group takes factors for its input channels."""
    return leader in architecture.input_norms or leader in architecture.feeders


def shared(values: Tensor, rows: Tensor) -> Tensor:
    """Geometric means of positive values [I] over the channels with the same feeder row, for every channel, [I]."""
    count = int(rows.max()) + 1
    logs = torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, rows, values.double().log())
    return (logs / torch.bincount(rows, minlength=count)).exp()[rows].to(values.dtype)


def largest_shared(values: Tensor, rows: Tensor) -> Tensor:
    """The largest of values [I] among the channels with the same feeder row, for every channel, [I]."""
    largest = values.new_zeros(int(rows.max()) + 1).scatter_reduce_(0, rows, values, "amax", include_self=False)
    return largest[rows]


@torch.no_grad()
def fold(block: nn.Module, architecture: ModelArchitecture, leader: str, scales: Tensor) -> None:
    """Multiply the columns of a group's linears by ``scales`` and divide what makes their input.

    A norm's new gain is rounded to float16, and the linears take the factor that it then stands for: only rounding in float32
    is left between the outputs before and after. A feeder's rows are divided as they are; its bias, rounded like a norm, may
    move by one unit of float16. A gain of zero stays, with a factor of one.

    Args:
        block: changed in place.
        architecture: of its model.
        leader: the group's first linear.
        scales: [I], positive; equal for channels with one feeder row.
    """
    if leader in architecture.input_norms:
        norm = block.get_submodule(architecture.input_norms[leader])
        scales = _divide_norm(norm, scales, architecture.norm_offset)
    else:
        feeder = block.get_submodule(architecture.feeders[leader])
        rows = feeder_rows(block, architecture, leader).to(scales.device)
        factors = torch.ones(feeder.weight.shape[0], device=scales.device).index_copy_(0, rows, scales.float())
        change_weight(feeder, lambda weight: weight / factors[:, None])
        if feeder.bias is not None:
            feeder.bias /= factors
    for name in group_of(architecture, leader):
        change_weight(block.get_submodule(name), lambda weight: weight * scales)


def _divide_norm(norm: nn.Module, scales: Tensor, offset: float) -> Tensor:
    """Divide a norm's gains (and its bias, where it has one); returns the factors [I] that the stored gains stand for."""
    before = norm.weight.double() + offset
    stored = (before / scales.double() - offset).to(_STORAGE).to(norm.weight.dtype)
    after = stored.double() + offset
    usable = (after != 0) & (before != 0) & torch.isfinite(after)
    norm.weight.copy_(torch.where(usable, stored, norm.weight))
    factors = torch.where(usable, before / after, torch.ones_like(before))
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(norm.bias.double() / factors)
    return factors.to(norm.weight.dtype)
