"""Another order of a group's input channels, so that those of one size share a grid: the block computes what it did.

The columns of the reading linears and the rows of what feeds them move together; nothing is left to do at run time (QServe,
section 4.3.3). Legend: I input channels, R rows of the feeder, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.transforms.folding import feeder_rows, group_of

SEQUENTIAL, TRANSPOSE = "Sequential", "Transpose"


@dataclass(frozen=True, kw_only=True)
class Order:
    """``rows`` [R] and ``channels`` [I] say which row and channel comes to each place, int64."""

    rows: Tensor
    channels: Tensor


def channel_order(
    block: nn.Module, architecture: ModelArchitecture, leader: str, sizes: Tensor, *, index: str, group_size: int
) -> Order:
    """The order of a group's channels by ``sizes`` [I], the largest first.

    Channels of attention heads stay in their head, and heads with common values have a common order. ``Transpose`` deals the
    sorted channels out to the groups of ``group_size`` in turn, where the run to be ordered holds several.
    """
    owners = feeder_rows(block, architecture, leader).to(sizes.device)
    count = int(owners.max()) + 1
    of_rows = torch.zeros(count, device=sizes.device).scatter_reduce_(0, owners, sizes.float(), "amax")
    is_attention = architecture.feeders[leader] == architecture.qkv[2]
    width = block.get_submodule(architecture.attention).head_dim if is_attention else count
    local = _sorted(of_rows.view(-1, width), index, min(group_size, width))
    first = width * torch.arange(count // width, device=sizes.device)[:, None]
    heads = owners.view(-1, width)[:, 0] // width  # the run of rows behind each run of channels
    starts = width * torch.arange(heads.shape[0], device=sizes.device)[:, None]
    return Order(rows=(local + first).flatten(), channels=(local[heads] + starts).flatten())


@torch.no_grad()
def reorder(block: nn.Module, architecture: ModelArchitecture, leader: str, order: Order) -> None:
    """Bring the channels of a group, and what feeds them, into another order."""
    for name in (architecture.feeders[leader], architecture.gates.get(leader)):
        linear = None if name is None else block.get_submodule(name)
        if linear is not None:
            linear.weight.data = linear.weight[order.rows]
            if linear.bias is not None:
                linear.bias.data = linear.bias[order.rows]
    for name in group_of(architecture, leader):
        linear = block.get_submodule(name)
        linear.weight.data = linear.weight[:, order.channels]


def _sorted(sizes: Tensor, index: str, group_size: int) -> Tensor:
    """The order within each run of channels [runs, width]."""
    order = torch.argsort(sizes, dim=-1, descending=True, stable=True)
    if index == TRANSPOSE and sizes.shape[1] % group_size == 0:
        order = order.view(order.shape[0], group_size, -1).transpose(1, 2).reshape(order.shape)
    return order
