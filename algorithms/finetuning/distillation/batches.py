"""Batches of token sequences in an order that the seed alone decides, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.randomness import keyed_generator
from algorithms.parallel.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences that pass the model together: tokens [b, length] int64, which of them count [b, length] bool, their numbers.

    Sequences that are shorter than the longest are padded on the right, where a causal model cannot see them.
    """

    tokens: Tensor
    mask: Tensor
    numbers: tuple[int, ...]

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(tokens=self.tokens.to(device), mask=self.mask.to(device), numbers=self.numbers)


def stack(sequences: Sequence[Tensor], numbers: Sequence[int]) -> MicroBatch:
    """Sequences [1, length] by number, padded to the longest; pads are zeros that never count."""
    chosen = [sequences[number][0] for number in numbers]
    length = max(tokens.numel() for tokens in chosen)
    tokens = torch.zeros(len(chosen), length, dtype=torch.int64)
    mask = torch.zeros(len(chosen), length, dtype=torch.bool)
    for row, sequence in enumerate(chosen):
        tokens[row, : sequence.numel()] = sequence
        mask[row, : sequence.numel()] = True
    return MicroBatch(tokens=tokens, mask=mask, numbers=tuple(numbers))


def steps_per_epoch(num_sequences: int, batch_size: int) -> int:
    """Steps in which every sequence is seen once."""
    return -(-num_sequences // min(batch_size, num_sequences))


class Batches:
    """The training sequences, [1, length] each, in steps of ``batch_size``; the last step of an epoch may be smaller.

    Args:
        sequences: all of them, on every rank.
        batch_size: sequences a step, over all ranks.
        micro_batch_size: sequences that pass the model together; None for all of a rank's share.
        seed: of the order.
        ranks: who takes part.
    """

    def __init__(
        self, sequences: Sequence[Tensor], *, batch_size: int, micro_batch_size: int | None, seed: int, ranks: Ranks
    ) -> None:
        self._sequences, self._seed, self._ranks = sequences, seed, ranks
        self._batch_size = min(batch_size, len(sequences))
        self._micro = micro_batch_size or self._batch_size

    @property
    def steps_per_epoch(self) -> int:
        """See :func:`steps_per_epoch`."""
        return steps_per_epoch(len(self._sequences), self._batch_size)

    def step(self, number: int) -> tuple[list[MicroBatch], int]:
        """This rank's micro-batches of a step (from 0), and the number of tokens of all ranks' together.

        Every rank has the same number of micro-batches, since a sharded model passes on all at once; one that has run out of
        sequences repeats one of which no token counts.
        """
        epoch, place = divmod(number, self.steps_per_epoch)
        order = torch.randperm(len(self._sequences), generator=keyed_generator(self._seed, "epoch", epoch)).tolist()
        chosen = order[place * self._batch_size : (place + 1) * self._batch_size]
        micros = list(_micro_batches(self._sequences, chosen, self._micro, self._ranks))
        return micros, sum(self._sequences[index].numel() for index in chosen)


def in_micro_batches(sequences: Sequence[Tensor], size: int, ranks: Ranks, *, first: int = 0) -> Iterator[MicroBatch]:
    """This rank's share of the sequences [1, length] from ``first`` on, in order, with as many micro-batches on every rank."""
    return _micro_batches(sequences, range(first, len(sequences)), size, ranks)


def _micro_batches(sequences: Sequence[Tensor], chosen: Sequence[int], size: int, ranks: Ranks) -> Iterator[MicroBatch]:
    own, longest_share = ranks.mine(chosen), -(-len(chosen) // ranks.size)
    for start in range(0, longest_share, size):
        part = own[start : start + size]
        yield stack(sequences, part) if part else _uncounted(stack(sequences, chosen[:1]))


def _uncounted(batch: MicroBatch) -> MicroBatch:
    return MicroBatch(tokens=batch.tokens, mask=torch.zeros_like(batch.mask), numbers=batch.numbers)
