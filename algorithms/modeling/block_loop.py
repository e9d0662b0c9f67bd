"""THE block loop: every method that compresses a model block by block runs through it.

Blocks are visited in order, and in a block the groups of linears that share an input, so that each sees, and can make up for,
the errors of everything before it; what should come out is taken from the original model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from algorithms.modeling.activations import Activations
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.group_walk import GroupWalk, linear_at
from algorithms.modeling.mixtures.routing import Routing
from algorithms.modeling.source import NOTHING_FINITE, ModelError, ModelSource
from algorithms.numerics.statistics import InputStatistics
from algorithms.parallel.ranks import ALONE, Ranks, moved

logger = logging.getLogger(__name__)

_NAMED = 8  # of the experts that are given too few tokens; metrics.jsonl has the tokens of all


@dataclass(frozen=True, kw_only=True)
class BlockData:
    """What a compressor sees of one block's data: inputs from the compressed prefix and the outputs to reproduce.

    Each of the ``ranks`` has its own part of the sequences, which may be none.
    """

    inputs: Activations
    targets: Activations
    validation_inputs: Activations
    validation_targets: Activations
    ranks: Ranks = ALONE

    @property
    def sequence_length(self) -> int:
        """Tokens of the first training sequence that this rank has; 1 where it has none."""
        return self.inputs.batches[0].shape[1] if self.inputs.batches else 1

    def has_validation(self) -> bool:
        """Whether sequences are held out, on whichever rank; all ranks ask at the same time."""
        return self.ranks.sum_numbers(self.validation_inputs.num_sequences)[0] > 0

    def output_error(self, block: nn.Module, index: int) -> float:
        """See :func:`relative_output_error`: of the sequences held out where there are any, else of all."""
        if self.has_validation():
            return relative_output_error(block, index, self.validation_inputs, self.validation_targets, self.ranks)
        return relative_output_error(block, index, self.inputs, self.targets, self.ranks)


class BlockCompressor(Protocol):
    """What the block loop asks of a method.

    ``tunes`` says whether ``finish_block`` works on the block with :class:`BlockData`. Where it does not, the modules of
    ``compress_group`` must compute at once what will be stored: the block's outputs then follow without another pass.
    """

    @property
    def tunes(self) -> bool:
        """Whether a block is worked on as a whole once its linears are replaced."""
        ...

    def prepare_block(self, index: int, block: nn.Module, inputs: Activations | None) -> None:
        """Change a block before its statistics are gathered: rounding of what is not compressed, scales that are folded.

        What it computes must stay the same up to rounding. ``inputs`` are the compressed prefix's hidden states before it, of
        this rank's sequences, to be left as they are; None without data.
        """
        ...

    def compress_group(
        self, index: int, linears: Mapping[str, nn.Linear], statistics: InputStatistics | None
    ) -> Mapping[str, nn.Module]:
        """Modules that take the places of linears that share an input; without data there are no statistics."""
        ...

    def finish_block(self, index: int, block: nn.Module, data: BlockData | None) -> dict[str, object]:
        """Work on the block as a whole if the method tunes; returns figures for the block's report."""
        ...

    def freeze_block(self, block: nn.Module) -> dict[str, Tensor]:
        """The tensors to store, named relative to the block; afterwards the block holds plain linears of these values."""
        ...

    def restore_block(self, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Give a block, original or frozen, the values that ``freeze_block`` stored."""
        ...


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Hidden states before the current block: of the compressed prefix and, where ``reference`` is set, of the original model.

    With a reference, linears that write to the residual stream, and blocks, are asked for what brings the stream back to the
    original model's, and so undo the error they are handed. Without, for what they would have made of the compressed prefix.
    A reference may hold the first batches alone where no block is tuned.
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
    streams: Streams | None,
    *,
    store: BlockStore,
    sequential: bool,
    device: torch.device,
    on_block: Callable[[int, Mapping[str, object]], None],
    ranks: Ranks = ALONE,
    min_expert_tokens: int | None = None,
) -> None:
    """Compress every block that ``store`` does not hold yet, in order, and store it.

    ``sequential`` gathers each input group's statistics after the earlier groups of the same block were replaced, which a
    reference implies. Without ``streams`` no data is used at all. ``on_block`` hears of each block with its report. Of several
    ``ranks``, whose streams are parts of the same text, rank 0 alone reads and writes the store.

    Unless blocks are tuned, experts of a mixture are read, compressed and decoded in turn: a block needs the memory of
    one of them, and of the codes of all. ``min_expert_tokens``: see
    :func:`algorithms.modeling.mixtures.routing.count_routed`.
    """
    last = source.num_blocks - 1
    blocks = _SharedStore(store, ranks, device)
    for index in range(source.num_blocks):
        block, stored = source.load_block(index, device=device, late_experts=not compressor.tunes), blocks.load(index)
        if stored is not None:
            tensors, report = stored
            if streams is not None and index < last:
                streams.advance_reference(block, index)
                compressor.restore_block(block, moved(tensors, device))
                streams.advance(block, index)
        elif streams is None:
            report = _compress_without_data(source.architecture, compressor, block, index, blocks)
        else:
            in_order = sequential or streams.reference is not None
            is_last = index == last
            step = _BlockStep(source.architecture, compressor, streams, index, is_last, in_order, ranks, min_expert_tokens)
            report = step.compress(block, blocks)
        on_block(index, report)


class _SharedStore:
    """The block store of all ranks: rank 0 reads and writes it, the others get from it what they would have read."""

    def __init__(self, store: BlockStore, ranks: Ranks, device: torch.device) -> None:
        self._store, self._ranks, self._device = store, ranks, device

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, object]] | None:
        """See :meth:`algorithms.modeling.block_store.BlockStore.load`."""
        stored = self._store.load(index) if self._ranks.is_main else None
        self._ranks.meet()
        return self._ranks.from_main(stored)

    def freeze(
        self, compressor: BlockCompressor, index: int, block: nn.Module, report: dict[str, object]
    ) -> Mapping[str, object]:
        """Store a finished block. All ranks go on with rank 0's values and report: machines that round differently agree."""
        tensors = compressor.freeze_block(block)
        if self._ranks.is_main:
            self._store.save(index, tensors, report)
        if self._ranks.size > 1:
            self._ranks.meet()
            tensors, report = self._ranks.from_main((moved(tensors, torch.device("cpu")), report))
            if not self._ranks.is_main:
                compressor.restore_block(block, moved(tensors, self._device))
        return report


@dataclass(frozen=True)
class _BlockStep:
    """The work on one block, with data."""

    architecture: ModelArchitecture
    compressor: BlockCompressor
    streams: Streams
    index: int
    is_last: bool
    in_order: bool
    ranks: Ranks
    min_expert_tokens: int | None

    def compress(self, block: nn.Module, store: _SharedStore) -> Mapping[str, object]:
        """Compress and store the block, and let the streams pass it; returns its report."""
        original = copy.deepcopy(block)
        self.compressor.prepare_block(self.index, block, self.streams.training)
        figures = self._compress_all(block, original)
        data = self._data(original) if self.compressor.tunes else None
        report = {**self.compressor.finish_block(self.index, block, data), **figures}
        report = store.freeze(self.compressor, self.index, block, report)
        if not self.is_last:
            if self.compressor.tunes or not self.in_order:
                self.streams.training.advance(block, self.index)
            self.streams.validation.advance(block, self.index)
        return report

    def _compress_all(self, block: nn.Module, original: nn.Module) -> dict[str, object]:
        """Group by group. Unless tuning follows, which would change them, the block's outputs are taken at once."""
        training, reference = self.streams.training, None
        if self.streams.reference is not None:
            reference, held_out = self.streams.reference
        walk = GroupWalk(
            self.architecture,
            self.index,
            block=block,
            original=original,
            current=training.copy(),
            reference=None if reference is None else reference.copy(),
            ranks=self.ranks,
            min_expert_tokens=self.min_expert_tokens,
        )
        with walk:
            # In order, a group's statistics are taken when those before it are compressed; else when none is.
            gathered = (walk.statistics(group) for group in walk.groups)
            for group, statistics in zip(walk.groups, gathered if self.in_order else list(gathered), strict=True):
                for name, module in self._compressed({name: walk.linear(name) for name in group}, statistics).items():
                    walk.replace(name, module)
            routed = self._note_routing(walk.routing)
            if reference is not None:
                for place, output in enumerate(walk.reference_outputs()):
                    reference.take(place, output)
                held_out.advance(original, self.index)
            takes_outputs = self.in_order and not self.compressor.tunes and not (self.is_last and reference is None)
            return {**routed, **(_take_outputs(walk, training, reference, self.ranks) if takes_outputs else {})}

    def _note_routing(self, routing: Routing | None) -> dict[str, object]:
        """For the block's report; experts that had to be given all tokens are named."""
        if routing is None:
            return {}
        if routing.starved:
            fewest = sorted(routing.starved, key=lambda number: (routing.tokens[number], number))
            few = ", ".join(f"{number} ({routing.tokens[number]})" for number in sorted(fewest[:_NAMED]))
            more = f" and {len(fewest) - _NAMED} more" if len(fewest) > _NAMED else ""
            logger.warning(
                "block %d: experts that are given fewer than %d tokens are calibrated on all: %s%s",
                self.index,
                routing.floor,
                few,
                more,
            )
        return {"experts": routing.report()}

    def _compressed(self, linears: Mapping[str, nn.Linear], statistics: InputStatistics) -> Mapping[str, nn.Module]:
        if statistics.num_skipped:
            names, count = ", ".join(linears), statistics.num_skipped
            logger.warning(
                "block %d: %d tokens with infinite, NaN or far too large inputs of %s left out", self.index, count, names
            )
            if not statistics.num_tokens:
                if self.architecture.input_groups[0][0] in linears:  # the norm before them hands on what is finite
                    raise ModelError(NOTHING_FINITE.format(index=self.index))
                logger.warning(
                    "block %d: none was left; all errors of %s count the same. Look at the model.", self.index, names
                )
        return self.compressor.compress_group(self.index, linears, statistics)

    def _data(self, original: nn.Module) -> BlockData:
        streams = self.streams
        if streams.reference is not None:
            # The lists are copied, not the tensors: the next block advances the reference while these are long done with.
            targets, validation_targets = (activations.copy() for activations in streams.reference)
        else:
            passing = (streams.training, streams.validation)
            targets, validation_targets = (activations.through(original, self.index) for activations in passing)
        return BlockData(
            inputs=streams.training,
            targets=targets,
            validation_inputs=streams.validation,
            validation_targets=validation_targets,
            ranks=self.ranks,
        )


def _compress_without_data(
    architecture: ModelArchitecture, compressor: BlockCompressor, block: nn.Module, index: int, store: _SharedStore
) -> Mapping[str, object]:
    compressor.prepare_block(index, block, None)
    for group in architecture.groups_in(block):
        linears = {name: linear_at(block, name) for name in group}
        for name, module in compressor.compress_group(index, linears, None).items():
            block.set_submodule(name, module)
    return store.freeze(compressor, index, block, compressor.finish_block(index, block, None))


def _take_outputs(walk: GroupWalk, training: Activations, reference: Activations | None, ranks: Ranks) -> dict[str, object]:
    """Pass the block; with a reference, returns how far from it the outputs are."""
    error = power = 0.0
    for place, output in enumerate(walk.outputs()):
        training.take(place, output)
        if reference is not None and place < len(reference.batches):
            target = reference.compute(reference.batches[place])
            error += torch.sum((output - target).square(), dtype=torch.float64).item()
            power += torch.sum(target.square(), dtype=torch.float64).item()
    return {} if reference is None else {"output_error": _summed_ratio(error, power, ranks)}


@torch.no_grad()
def relative_output_error(
    block: nn.Module, index: int, inputs: Activations, targets: Activations, ranks: Ranks = ALONE
) -> float:
    """Mean squared error of the block's outputs over the mean square of the targets, over the sequences of all ranks."""
    error = power = 0.0
    for batch, target in zip(inputs, targets, strict=True):
        output = inputs.arguments.run(block, index, batch).float()
        error += torch.sum((output - target.float()).square(), dtype=torch.float64).item()
        power += torch.sum(target.float().square(), dtype=torch.float64).item()
    return _summed_ratio(error, power, ranks)


def _summed_ratio(error: float, power: float, ranks: Ranks) -> float:
    ranks.meet()
    error, power = ranks.sum_numbers(error, power)
    return error / power if power else 0.0
