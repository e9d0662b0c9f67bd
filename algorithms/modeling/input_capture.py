"""The inputs of a block's linears, batch by batch, while hidden states run through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from algorithms.modeling.activations import Activations
from algorithms.numerics.statistics import InputStatistics


class _InputReached(Exception):  # noqa: N818 - control flow inside this file, not an error
    pass


def linear_at(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by the architecture table's path."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"the architecture table lists {name}, which is a {type(linear).__name__}"
    return linear


@torch.no_grad()
def inputs_of(name: str, block: nn.Module, index: int, activations: Activations) -> Iterator[Tensor]:
    """The input [b, length, in_features] of one linear for every batch; the block runs no further than to that linear."""
    caught: list[Tensor] = []

    def _catch(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])
        raise _InputReached

    handle = block.get_submodule(name).register_forward_pre_hook(_catch)
    try:
        for batch in activations:
            try:
                activations.arguments.run(block, index, batch)
            except _InputReached:
                yield caught.pop()
    finally:
        handle.remove()


def paired_statistics(
    name: str, index: int, current: tuple[nn.Module, Activations], original: tuple[nn.Module, Activations]
) -> InputStatistics:
    """Statistics of a linear's input in the block as it is now, paired with its input in the original model.

    Args:
        name: the linear, by its path in the block.
        index: number of the block.
        current: the block, some of whose linears are compressed already, and the compressed prefix's hidden states.
        original: the original block and the original model's hidden states of the same tokens.
    """
    linear = linear_at(current[0], name)
    statistics = InputStatistics(linear.in_features, linear.weight.device, paired=True)
    streams = (inputs_of(name, block, index, activations) for block, activations in (current, original))
    for inputs, reference in zip(*streams, strict=True):
        statistics.update(inputs, reference)
    return statistics


def plain_statistics(name: str, index: int, block: nn.Module, activations: Activations) -> InputStatistics:
    """Statistics of one linear's input."""
    linear = linear_at(block, name)
    statistics = InputStatistics(linear.in_features, linear.weight.device)
    for inputs in inputs_of(name, block, index, activations):
        statistics.update(inputs)
    return statistics


@contextmanager
def listening(groups: Sequence[Sequence[str]], block: nn.Module) -> Iterator[list[InputStatistics]]:
    """Statistics of the input of every group (linears that share it), while the block runs inside this context."""
    gathered = []
    handles = []
    for group in groups:
        linear = linear_at(block, group[0])
        statistics = InputStatistics(linear.in_features, linear.weight.device)
        gathered.append(statistics)

        def _observe(_module: nn.Module, arguments: tuple[Tensor, ...], statistics: InputStatistics = statistics) -> None:
            statistics.update(arguments[0])

        handles.append(linear.register_forward_pre_hook(_observe))
    try:
        yield gathered
    finally:
        for handle in handles:
            handle.remove()
