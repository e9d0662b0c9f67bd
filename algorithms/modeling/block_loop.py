"""THE block loop: every method that compresses a model block by block runs through it.

Blocks are visited in order. The inputs of a block come from the compressed prefix, so that later blocks see, and can make up
for, the errors of earlier ones; what a block should produce comes from the original model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from algorithms.modeling.activations import Activations
from algorithms.modeling.block_store import BlockStore
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

    With a reference, the targets of a block are the original model's own hidden states, and a block is asked to undo the error
    it is handed. Without, they are what the original block makes of the compressed prefix, at half the memory.
    """

    training: Activations
    validation: Activations
    reference: tuple[Activations, Activations] | None = None


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

    ``sequential`` gathers each input group's statistics after the earlier groups of the same block were replaced, at the cost
    of one forward a group; targets are the original outputs all the same. ``on_block`` hears of each block with its report.
    """
    device = streams.training.device
    for index in range(source.num_blocks):
        block = source.load_block(index, device=device)
        stored = store.load(index)
        if stored is None:
            with _gather(source, block, active=not sequential) as statistics:
                data = _block_data(streams, block, index)
            report = _compress_block(source, compressor, block, index, data, None if sequential else statistics)
            tensors = compressor.freeze_block(block)
            store.save(index, tensors, report)
        else:
            tensors, report = stored
            if streams.reference is not None:
                for reference in streams.reference:
                    reference.advance(block, index)
            compressor.restore_block(block, {name: tensor.to(device) for name, tensor in tensors.items()})
        streams.training.advance(block, index)
        streams.validation.advance(block, index)
        on_block(index, report)


def _block_data(streams: Streams, block: nn.Module, index: int) -> BlockData:
    inputs, validation = streams.training, streams.validation
    if streams.reference is None:
        return BlockData(
            inputs=inputs,
            targets=inputs.through(block, index),
            validation_inputs=validation,
            validation_targets=validation.through(block, index),
        )
    inputs.visit(block, index)
    with _no_hooks(block):
        for reference in streams.reference:
            reference.advance(block, index)
    return BlockData(
        inputs=inputs,
        targets=streams.reference[0].copy(),
        validation_inputs=validation,
        validation_targets=streams.reference[1].copy(),
    )


def _compress_block(
    source: ModelSource,
    compressor: BlockCompressor,
    block: nn.Module,
    index: int,
    data: BlockData,
    statistics: dict[Sequence[str], InputStatistics] | None,
) -> Mapping[str, object]:
    for group in source.architecture.input_groups:
        if statistics is None:
            with _gather(source, block, active=True, only=group) as gathered:
                data.inputs.visit(block, index)
        else:
            gathered = statistics
        if gathered[group].num_skipped:
            logger.warning(
                "block %d: %d tokens with infinite or NaN inputs of %s left out", index, gathered[group].num_skipped, group
            )
        for name in group:
            replacement = compressor.compress_linear(index, name, _linear(block, name), gathered[group])
            block.set_submodule(name, replacement)
        gathered.pop(group)
    return compressor.finish_block(index, block, data)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"the architecture table lists {name} as a linear, it is a {type(linear).__name__}"
    return linear


@contextmanager
def _gather(
    source: ModelSource, block: nn.Module, *, active: bool, only: Sequence[str] | None = None
) -> Iterator[dict[Sequence[str], InputStatistics]]:
    """Statistics of the inputs of each group (linears that share an input share them), while the block runs."""
    statistics: dict[Sequence[str], InputStatistics] = {}
    handles = []
    for group in source.architecture.input_groups if active else ():
        if only is not None and group != only:
            continue
        linear = _linear(block, group[0])
        statistics[group] = InputStatistics(linear.in_features, linear.weight.device)

        def _observe(_module: nn.Module, arguments: tuple[Tensor, ...], gathered: InputStatistics = statistics[group]) -> None:
            gathered.update(arguments[0])

        handles.append(linear.register_forward_pre_hook(_observe))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _no_hooks(block: nn.Module) -> Iterator[None]:
    """The block without its forward pre-hooks: what runs here must not enter the statistics."""
    held = [(module, module._forward_pre_hooks.copy()) for module in block.modules() if module._forward_pre_hooks]
    try:
        for module, _ in held:
            module._forward_pre_hooks.clear()
        yield
    finally:
        for module, hooks in held:
            module._forward_pre_hooks.update(hooks)


@torch.no_grad()
def relative_output_error(block: nn.Module, index: int, inputs: Activations, targets: Activations) -> float:
    """Mean squared error of the block's outputs over the mean square of the targets."""
    error = power = 0.0
    for batch, target in zip(inputs, targets, strict=True):
        output = inputs.arguments.run(block, index, batch).float()
        error += torch.sum((output - target.float()).square(), dtype=torch.float64).item()
        power += torch.sum(target.float().square(), dtype=torch.float64).item()
    return error / power if power else 0.0
