"""THE block loop: every method that compresses a model block by block runs through it.

Blocks are visited in order. The inputs of a block come from the compressed prefix, so that later blocks see, and can make up
for, the errors of earlier ones; what a block should produce comes from the original model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from algorithms.modeling.activations import Activations
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.input_capture import linear_at, listening, paired_statistics, plain_statistics
from algorithms.modeling.source import ModelSource
from algorithms.numerics.statistics import InputStatistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlockData:
    """What a compressor sees of one block's data: inputs from the compressed prefix and the outputs to reproduce."""

    inputs: Activations
    targets: Activations
    validation_inputs: Activations
    validation_targets: Activations


class BlockCompressor(Protocol):
    """What the block loop asks of a method."""

    def compress_linear(self, index: int, name: str, linear: nn.Linear, statistics: InputStatistics) -> nn.Module:
        """A module that takes the place of ``linear`` in block ``index``."""
        ...

    def finish_block(self, index: int, block: nn.Module, data: BlockData) -> Mapping[str, object]:
        """Work on the block as a whole once its linears are replaced (tuning); returns figures for its report."""
        ...

    def freeze_block(self, block: nn.Module) -> dict[str, Tensor]:
        """The tensors to store, named relative to the block; afterwards the block holds plain linears of these values."""
        ...

    def restore_block(self, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Give an original block the values that ``freeze_block`` stored."""
        ...


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Hidden states before the current block: of the compressed prefix and, where ``reference`` is set, of the original model.

    With a reference, layers and blocks are asked for what the original model computes, and so undo the error they are handed.
    Without, for what they would have made of the compressed prefix. Either way two sets of hidden states are held.
    """

    training: Activations
    validation: Activations
    reference: tuple[Activations, Activations] | None = None

    def advance(self, block: nn.Module, index: int) -> None:
        """Pass the compressed block."""
        self.training.advance(block, index)
        self.validation.advance(block, index)

    def advance_reference(self, block: nn.Module, index: int) -> None:
        """Pass the original block, where there is a reference."""
        for activations in self.reference or ():
            activations.advance(block, index)


def compress_blockwise(
    source: ModelSource,
    compressor: BlockCompressor,
    streams: Streams,
    *,
    store: BlockStore,
    sequential: bool,
    on_block: Callable[[int, Mapping[str, object]], None],
) -> None:
    """Compress every block that ``store`` does not hold yet, in order, and store it.

    ``sequential`` gathers each input group's statistics after the earlier groups of the same block were replaced, which a
    reference implies. Targets are original outputs all the same. ``on_block`` hears of each block with its report.
    """
    device = streams.training.device
    for index in range(source.num_blocks):
        block = source.load_block(index, device=device)
        stored = store.load(index)
        if stored is None:
            report = _compress_block(source, compressor, streams, block, index, sequential)
            store.save(index, compressor.freeze_block(block), report)
        else:
            tensors, report = stored
            streams.advance_reference(block, index)
            compressor.restore_block(block, {name: tensor.to(device) for name, tensor in tensors.items()})
        streams.advance(block, index)
        on_block(index, report)


def _compress_block(
    source: ModelSource, compressor: BlockCompressor, streams: Streams, block: nn.Module, index: int, sequential: bool
) -> Mapping[str, object]:
    if streams.reference is not None:
        data = _compress_against_original(source, compressor, streams, block, index)
    else:
        data = _compress_against_prefix(source, compressor, streams, block, index, sequential)
    return compressor.finish_block(index, block, data)


def _compress_against_original(
    source: ModelSource, compressor: BlockCompressor, streams: Streams, block: nn.Module, index: int
) -> BlockData:
    assert streams.reference is not None
    original = copy.deepcopy(block)
    for group in source.architecture.input_groups:
        statistics = paired_statistics(group[0], index, (block, streams.training), (original, streams.reference[0]))
        _replace(compressor, block, index, group, statistics)
    streams.advance_reference(original, index)
    training, validation = streams.reference
    # The lists are copied, not the tensors: the next block advances the reference while these targets are long done with.
    return _data(streams, training.copy(), validation.copy())


def _compress_against_prefix(
    source: ModelSource, compressor: BlockCompressor, streams: Streams, block: nn.Module, index: int, sequential: bool
) -> BlockData:
    groups = source.architecture.input_groups
    validation = streams.validation.through(block, index)
    with listening(() if sequential else groups, block) as gathered:
        targets = streams.training.through(block, index)
    for place, group in enumerate(groups):
        statistics = plain_statistics(group[0], index, block, streams.training) if sequential else gathered[place]
        _replace(compressor, block, index, group, statistics)
    return _data(streams, targets, validation)


def _data(streams: Streams, targets: Activations, validation_targets: Activations) -> BlockData:
    return BlockData(
        inputs=streams.training,
        targets=targets,
        validation_inputs=streams.validation,
        validation_targets=validation_targets,
    )


def _replace(
    compressor: BlockCompressor, block: nn.Module, index: int, group: Sequence[str], statistics: InputStatistics
) -> None:
    if statistics.num_skipped:
        logger.warning(
            "block %d: %d tokens with infinite or NaN inputs of %s left out", index, statistics.num_skipped, ", ".join(group)
        )
    for name in group:
        block.set_submodule(name, compressor.compress_linear(index, name, linear_at(block, name), statistics))


@torch.no_grad()
def relative_output_error(block: nn.Module, index: int, inputs: Activations, targets: Activations) -> float:
    """Mean squared error of the block's outputs over the mean square of the targets."""
    error = power = 0.0
    for batch, target in zip(inputs, targets, strict=True):
        output = inputs.arguments.run(block, index, batch).float()
        error += torch.sum((output - target.float()).square(), dtype=torch.float64).item()
        power += torch.sum(target.float().square(), dtype=torch.float64).item()
    return error / power if power else 0.0
