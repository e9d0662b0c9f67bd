"""Which groups of heads and which neurons stay, so that a given number of parameters is left (FLAP, section 3.3).

Legend: L blocks, K groups of heads a block, N neurons a block. Numbers of parameters are those of the linears: a group of heads
costs ``group_cost``, a neuron ``neuron_cost``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")


@dataclass(frozen=True, kw_only=True)
class BlockScores:
    """Of one block: ``groups`` [K] and ``neurons`` [N], larger is better; the same on a scale common to all blocks."""

    groups: Tensor
    neurons: Tensor
    common_groups: Tensor
    common_neurons: Tensor


@dataclass(frozen=True, kw_only=True)
class Budget:
    """``ratio`` is the share of parameters that goes; ``removed_groups`` are those of all blocks for MM structures."""

    ratio: float
    group_cost: int
    neuron_cost: int
    removed_groups: int = 0

    def left(self, blocks: Sequence[BlockScores]) -> int:
        """Parameters that stay in these blocks together."""
        total = sum(self.cost(block.groups.numel(), block.neurons.numel()) for block in blocks)
        return round(total * (1 - self.ratio))

    def cost(self, groups: int, neurons: int) -> int:
        """Parameters of so many groups and neurons."""
        return groups * self.group_cost + neurons * self.neuron_cost


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Numbers of the groups and neurons of a block that stay, ascending."""

    groups: tuple[int, ...]
    neurons: tuple[int, ...]


def select(structure: str, blocks: Sequence[BlockScores], budget: Budget) -> list[Selection]:
    """What stays of each block.

    ``UL`` gives every block the same widths, ``AL`` lets blocks compete. ``UM`` takes the same share of groups and neurons,
    ``MM`` as many groups as it is told and neurons to make up the rest, ``AM`` compares groups and neurons by their scores.
    What whole groups cannot express is made up with neurons. Every block keeps one of each.
    """
    if structure == "AL-AM":
        return _adaptive(blocks, budget)
    if structure == "AL-MM":
        return _separate(blocks, budget)
    return [_uniform(block, budget, len(blocks), proportional=structure == "UL-UM") for block in blocks]


def _uniform(block: BlockScores, budget: Budget, count: int, *, proportional: bool) -> Selection:
    groups, neurons = block.groups.numel(), block.neurons.numel()
    removed = int(budget.ratio * groups + 0.5) if proportional else round(budget.removed_groups / count)
    kept = max(1, groups - removed)
    left = budget.left([block])
    # Where too few groups go, neurons alone cannot make up for it.
    while kept > 1 and budget.cost(kept, 1) > left:
        kept -= 1
    wanted = round((left - kept * budget.group_cost) / budget.neuron_cost)
    return Selection(groups=_best(block.groups, kept), neurons=_best(block.neurons, min(neurons, max(1, wanted))))


def _separate(blocks: Sequence[BlockScores], budget: Budget) -> list[Selection]:
    total = sum(block.groups.numel() for block in blocks)
    removed = budget.removed_groups
    left, least = budget.left(blocks), len(blocks) * budget.neuron_cost
    while removed < total - len(blocks) and (total - removed) * budget.group_cost + least > left:
        removed += 1
    groups = _best_of_all([block.common_groups for block in blocks], total - removed)
    kept = sum(len(chosen) for chosen in groups)
    wanted = round((left - kept * budget.group_cost) / budget.neuron_cost)
    neurons = _best_of_all([block.common_neurons for block in blocks], wanted)
    return [Selection(groups=chosen, neurons=others) for chosen, others in zip(groups, neurons, strict=True)]


def _adaptive(blocks: Sequence[BlockScores], budget: Budget) -> list[Selection]:
    """Groups and neurons of all blocks in one order; the best stay as long as they fit, neurons fill what is left."""
    left = budget.left(blocks)
    items = [
        (-score, kind, index, place)
        for index, block in enumerate(blocks)
        for kind, scores in enumerate((block.common_groups, block.common_neurons))
        for place, score in enumerate(scores.tolist())
    ]
    costs = (budget.group_cost, budget.neuron_cost)
    kept: list[tuple[set[int], set[int]]] = [({int(block.groups.argmax())}, {int(block.neurons.argmax())}) for block in blocks]
    spent = len(blocks) * sum(costs)
    is_full = [False, False]
    for _, kind, index, place in sorted(items):
        if place in kept[index][kind] or is_full[kind]:
            continue
        if spent + costs[kind] > left:
            is_full[kind] = True  # a worse one of this kind does not overtake a better one that was too large
            continue
        kept[index][kind].add(place)
        spent += costs[kind]
    return [Selection(groups=tuple(sorted(groups)), neurons=tuple(sorted(neurons))) for groups, neurons in kept]


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist()))


def _best_of_all(blocks: Sequence[Tensor], count: int) -> list[tuple[int, ...]]:
    """The best places of all blocks together, at least one of each."""
    kept = [{int(scores.argmax())} for scores in blocks]
    order = sorted((-score, index, place) for index, scores in enumerate(blocks) for place, score in enumerate(scores.tolist()))
    spare: Iterable[tuple[float, int, int]] = (entry for entry in order if entry[2] not in kept[entry[1]])
    for _, (_, index, place) in zip(range(max(0, count - len(blocks))), list(spare), strict=False):
        kept[index].add(place)
    return [tuple(sorted(places)) for places in kept]
