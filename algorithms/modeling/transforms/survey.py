"""What flows through a block before any of it is compressed: statistics of every input group's channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from algorithms.modeling.activations import Activations
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.lockstep import BlockWalk
from algorithms.modeling.mixtures.routing import stops
from algorithms.modeling.source import NOTHING_FINITE, ModelError
from algorithms.numerics.statistics import InputStatistics, is_usable
from algorithms.parallel.ranks import ALONE, Ranks

_SAMPLED = 256  # tokens of all ranks that a sample has, about


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Of the I input channels of a group, over tokens: ``hessian`` [I, I], mean of |x| [I] and largest |x| [I], float32.

    ``sample`` [n, I] are some of the tokens, at even distances.
    """

    hessian: Tensor
    mean_size: Tensor
    largest: Tensor
    sample: Tensor

    def reordered(self, channels: Tensor) -> ChannelStatistics:
        """Of the same inputs, the channel [I] of each place given by its number."""
        return ChannelStatistics(
            hessian=self.hessian[channels][:, channels],
            mean_size=self.mean_size[channels],
            largest=self.largest[channels],
            sample=self.sample[:, channels],
        )


def survey(
    block: nn.Module,
    index: int,
    inputs: Activations,
    architecture: ModelArchitecture,
    ranks: Ranks = ALONE,
    *,
    min_expert_tokens: int | None = None,
) -> Iterator[tuple[str, ChannelStatistics, list[Tensor]]]:
    """The first linear of each group, statistics of its input over the sequences of all ranks, and the group's weights.

    The block stays as it is, and is not to be computed before the last group has come: its forwards are on their way. Tokens
    that no statistics can be made of (``is_usable``) are left out.

    Raises:
        ModelError: none was left.
    """
    few = -(-_SAMPLED // max(1, len(inputs.batches) * ranks.size))
    groups = architecture.groups_in(block)
    with BlockWalk(block, index, inputs, stops(groups, architecture)) as walk:
        for group in walk.in_turn(groups, architecture, ranks, min_expert_tokens):
            width = walk.peek(group[0]).weight.shape[1]
            found = _statistics(walk, width, index, inputs.device, few, ranks)
            yield group[0], found, [walk.linear(name).weight for name in group]


def _statistics(walk: BlockWalk, width: int, index: int, device: torch.device, few: int, ranks: Ranks) -> ChannelStatistics:
    statistics = InputStatistics(width, device)
    sizes, largest = (torch.zeros(width, device=device, dtype=torch.float64) for _ in range(2))
    sampled = [largest.new_empty(0, width, dtype=torch.float32)]
    for batch in walk.next_stop():
        statistics.update(batch)
        tokens = batch.flatten(0, -2)
        tokens = tokens[is_usable(tokens.float())]
        sizes += tokens.abs().sum(0, dtype=torch.float64)
        if tokens.shape[0]:
            largest = torch.maximum(largest, tokens.abs().amax(0).double())
        sampled.append(tokens[:: max(1, tokens.shape[0] // few)][:few])
    ranks.meet()
    statistics.add_up(ranks.sum_)
    if not statistics.num_tokens:
        raise ModelError(NOTHING_FINITE.format(index=index))
    ranks.sum_(sizes)
    parts = ranks.exchange((largest, torch.cat(sampled)))
    largest = torch.stack([part[0] for part in parts]).amax(0)
    return ChannelStatistics(
        hessian=statistics.hessian(),
        mean_size=(sizes / statistics.num_tokens).float(),
        largest=largest.float(),
        sample=torch.cat([part[1] for part in parts]),
    )


def whole_survey(
    block: nn.Module, index: int, inputs: Activations, architecture: ModelArchitecture, ranks: Ranks = ALONE
) -> dict[str, ChannelStatistics]:
    """What :func:`survey` finds of all groups, by their first linears."""
    return {leader: statistics for leader, statistics, _ in survey(block, index, inputs, architecture, ranks)}


def first_tokens(inputs: Activations, count: int) -> Activations:
    """The first batches, so many that they hold ``count`` tokens, or all there are."""
    chosen, tokens = [], 0
    for batch in inputs.batches:
        if tokens >= count:
            break
        chosen.append(batch)
        tokens += batch.shape[0] * batch.shape[1]
    return replace(inputs, batches=chosen)
