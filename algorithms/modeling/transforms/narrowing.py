"""Blocks with fewer attention heads and neurons than their model's configuration says.

Heads go by groups: the heads of queries that share a head of keys and values stay or go with it. Legend: K groups, d channels a
head, N neurons of the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.on_demand import BlockTensors, fill_block, on_demand
from algorithms.modeling.source import ModelError, ModelSource


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The groups of heads and the neurons of one block that stay, by their numbers in the original, ascending."""

    groups: tuple[int, ...]
    neurons: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How many groups of heads and neurons a block has, the query heads of a group, and the channels of a head."""

    groups: int
    neurons: int
    heads_a_group: int
    head_dim: int


def attention_output(architecture: ModelArchitecture) -> str:
    """The linear that reads what attention has made of the values."""
    return next(leader for leader, feeder in architecture.feeders.items() if feeder == architecture.qkv[2])


def neuron_output(architecture: ModelArchitecture) -> str:
    """The linear that reads the neurons."""
    return next(leader for leader, feeder in architecture.feeders.items() if feeder != architecture.qkv[2])


def widths(block: nn.Module, architecture: ModelArchitecture) -> Widths:
    """Of a block as it is."""
    queries, _, values = (block.get_submodule(name) for name in architecture.qkv)
    head_dim = block.get_submodule(architecture.attention).head_dim
    groups = values.weight.shape[0] // head_dim
    return Widths(
        groups=groups,
        neurons=block.get_submodule(neuron_output(architecture)).weight.shape[1],
        heads_a_group=queries.weight.shape[0] // (head_dim * groups),
        head_dim=head_dim,
    )


def query_channels(size: Widths, groups: Sequence[int]) -> Tensor:
    """Rows of the queries, and input channels of the linear behind attention, that belong to some groups, int64."""
    width = size.heads_a_group * size.head_dim
    return torch.cat([torch.arange(group * width, (group + 1) * width) for group in groups])


@torch.no_grad()
def narrow(block: nn.Module, architecture: ModelArchitecture, kept: Kept) -> None:
    """Take heads and neurons out of a block, in place: rows of what makes them, columns of what reads them.

    Raises:
        ValueError: nothing of a kind would stay.
    """
    if not kept.groups or not kept.neurons:
        raise ValueError("a block keeps at least one group of heads and one neuron")
    size = widths(block, architecture)
    channels, neurons = query_channels(size, kept.groups), torch.tensor(kept.neurons)
    values = torch.cat([torch.arange(group * size.head_dim, (group + 1) * size.head_dim) for group in kept.groups])
    makers = dict(zip(architecture.qkv, (channels, values, values), strict=True))
    reader = neuron_output(architecture)
    makers |= dict.fromkeys(filter(None, (architecture.feeders[reader], architecture.gates.get(reader))), neurons)
    for name, rows in makers.items():
        linear = block.get_submodule(name)
        bias = None if linear.bias is None else linear.bias[rows.to(linear.weight.device)]
        block.set_submodule(name, linear_of(linear.weight[rows.to(linear.weight.device)], bias))
    for name, columns in ((attention_output(architecture), channels), (reader, neurons)):
        linear = block.get_submodule(name)
        block.set_submodule(name, linear_of(linear.weight[:, columns.to(linear.weight.device)].contiguous(), linear.bias))


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear with the given weight [O, I] and bias [O], without gradients."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear.eval()


def fill_narrowed(block: nn.Module, tensors: Mapping[str, Tensor], architecture: ModelArchitecture) -> None:
    """Give a block the stored tensors of a narrowed one, named relative to the block; its linears take their shapes.

    Raises:
        ModelError: a tensor is missing or unknown.
    """
    for name in architecture.linears:
        if f"{name}.weight" not in tensors:
            raise ModelError(f"weights do not fit the model (missing {name}.weight)")
        block.set_submodule(name, linear_of(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")))
    fill_block(block, tensors)
    block.requires_grad_(False)


def narrowed_on_demand(source: ModelSource, outside: Mapping[str, Tensor], read: BlockTensors) -> nn.Module:
    """A float32 model whose blocks have the widths of their tensors and are read when they compute.

    Args:
        source: of the original configuration.
        outside: tensors that belong to no block, by their full names; a tied head may be left out.
        read: number of a block -> its tensors, named relative to it.

    Raises:
        ModelError: a tensor is missing, once it is read.
    """
    return on_demand(source, outside, read, fill=partial(fill_narrowed, architecture=source.architecture))
