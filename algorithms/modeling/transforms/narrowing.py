"""Blocks with fewer attention heads and neurons than their model's configuration says.

Heads go by groups: the heads of queries that share a head of keys and values stay or go with it. Legend: K groups, d channels a
head, N neurons of the feed-forward part.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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


def obstacle(architecture: ModelArchitecture) -> str | None:
    """Why blocks of a family cannot be narrowed, in a sentence; None where they can."""
    if architecture.experts is not None:
        return f"{architecture.model_type} is a mixture, whose experts each see tokens of their own."
    if not architecture.gates:
        return f"{architecture.model_type} has no gated feed-forward part."
    if architecture.qkv is None:
        return f"{architecture.model_type} mixes the rows of queries, keys and values."
    return None


def row_parts(architecture: ModelArchitecture, size: Widths) -> dict[str, tuple[int, ...]]:
    """Of every linear that makes heads or neurons: the rows of what it holds, one below the other; one number if not fused."""
    values = size.groups * size.head_dim
    counts = (size.heads_a_group * values, values, values, size.neurons, size.neurons)
    parts: dict[str, tuple[int, ...]] = {}
    for name, rows in zip(_makers(architecture), counts, strict=True):
        parts[name] = (*parts.get(name, ()), rows)
    return parts


def _makers(architecture: ModelArchitecture) -> tuple[str, str, str, str, str]:
    """The linears of queries, keys, values, gates and ups, which may be fused."""
    assert architecture.qkv is not None
    reader = neuron_output(architecture)
    return (*architecture.qkv, architecture.gates[reader], architecture.feeders[reader])


def widths(block: nn.Module, architecture: ModelArchitecture) -> Widths:
    """Of a block as it is."""
    assert architecture.qkv is not None
    channels = block.get_submodule(attention_output(architecture)).weight.shape[1]
    values = block.get_submodule(architecture.qkv[2]).weight.shape[0]
    if architecture.qkv[2] in architecture.fused:
        values = (values - channels) // 2
    head_dim = block.get_submodule(architecture.attention).head_dim
    return Widths(
        groups=values // head_dim,
        neurons=block.get_submodule(neuron_output(architecture)).weight.shape[1],
        heads_a_group=channels // values,
        head_dim=head_dim,
    )


def query_channels(size: Widths, groups: Sequence[int]) -> Tensor:
    """Rows of the queries, and input channels of the linear behind attention, that belong to some groups, int64."""
    width = size.heads_a_group * size.head_dim
    return torch.cat([torch.arange(group * width, (group + 1) * width) for group in groups])


@torch.no_grad()
def narrow(block: nn.Module, architecture: ModelArchitecture, kept: Kept) -> None:
    """Take heads and neurons out of a block, in place: rows of what makes them, columns of what reads them.

    Where norms are over the queries and keys of all heads, heads stay and give zeros: without them, the norms would be others.

    Raises:
        ValueError: nothing of a kind would stay.
    """
    if not kept.groups or not kept.neurons:
        raise ValueError("a block keeps at least one group of heads and one neuron")
    size = widths(block, architecture)
    if architecture.norms_all_heads:
        _silence(block, architecture, size, kept.groups)
        kept = replace(kept, groups=tuple(range(size.groups)))
    channels, neurons = query_channels(size, kept.groups), torch.tensor(kept.neurons)
    values = torch.cat([torch.arange(group * size.head_dim, (group + 1) * size.head_dim) for group in kept.groups])
    rows: dict[str, list[Tensor]] = {}
    parts = row_parts(architecture, size)
    for name, stay in zip(_makers(architecture), (channels, values, values, neurons, neurons), strict=True):
        found = rows.setdefault(name, [])
        found.append(stay + sum(parts[name][: len(found)]))
    for name, places in rows.items():
        linear = block.get_submodule(name)
        stay = torch.cat(places).to(linear.weight.device)
        block.set_submodule(name, linear_of(linear.weight[stay], None if linear.bias is None else linear.bias[stay]))
    for name, columns in ((attention_output(architecture), channels), (neuron_output(architecture), neurons)):
        linear = block.get_submodule(name)
        block.set_submodule(name, linear_of(linear.weight[:, columns.to(linear.weight.device)].contiguous(), linear.bias))
    _tell_attention(block, architecture)


def _silence(block: nn.Module, architecture: ModelArchitecture, size: Widths, groups: Sequence[int]) -> None:
    """Zeros in the rows of the values, and the columns that read them, of all groups but these."""
    assert architecture.qkv is not None
    values, reader = (block.get_submodule(name) for name in (architecture.qkv[2], attention_output(architecture)))
    for group in set(range(size.groups)) - set(groups):
        values.weight[group * size.head_dim : (group + 1) * size.head_dim] = 0
        if values.bias is not None:
            values.bias[group * size.head_dim : (group + 1) * size.head_dim] = 0
        reader.weight[:, query_channels(size, (group,)).to(reader.weight.device)] = 0


def _tell_attention(block: nn.Module, architecture: ModelArchitecture) -> None:
    """Where queries end in a fused linear, attention takes from its configuration and its own attributes."""
    if architecture.qkv is None or architecture.qkv[0] not in architecture.fused:
        return
    size, attention = widths(block, architecture), block.get_submodule(architecture.attention)
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads = size.groups * size.heads_a_group
    attention.num_key_value_heads = size.groups


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
    _tell_attention(block, architecture)


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
