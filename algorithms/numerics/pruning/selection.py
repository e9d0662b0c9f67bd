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

_MISSED = 0.005  # of all parameters; a larger distance from the ratio is worth a warning
STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")
Pair = tuple[int, int]
Item = tuple[float, int, int, int]  # negative score, kind (0 a group, 1 a neuron), block, place
Places = tuple[set[int], set[int]]  # the groups and the neurons of a block


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
    What whole groups cannot express is made up with neurons. Every block keeps one of each; a ratio that this does not allow is
    not met, with a warning.
    """
    if structure == "AL-AM":
        chosen = _adaptive(blocks, budget)
    elif structure == "AL-MM":
        chosen = _separate(blocks, budget)
    else:
        chosen = _uniform(blocks, budget, proportional=structure == "UL-UM")
    _say_what_is_missed(chosen, blocks, budget)
    return chosen


def _say_what_is_missed(chosen: Sequence[Selection], blocks: Sequence[BlockScores], budget: Budget) -> None:
    """A warning, where what stays is not the ratio's."""
    total = sum(budget.cost(block.groups.numel(), block.neurons.numel()) for block in blocks)
    stays = sum(budget.cost(len(one.groups), len(one.neurons)) for one in chosen)
    if abs(stays - budget.left(blocks)) > max(_MISSED * total, len(blocks) * budget.neuron_cost):
        logger.warning(
            "%.1f%% of the weights stay instead of %.1f%%: only whole groups of heads and whole neurons can go, and every "
            "block keeps one of each",
            100 * stays / total,
            100 * (1 - budget.ratio),
        )


def _uniform(blocks: Sequence[BlockScores], budget: Budget, *, proportional: bool) -> list[Selection]:
    groups, neurons = blocks[0].groups.numel(), blocks[0].neurons.numel()
    removed = int(budget.ratio * groups + 0.5) if proportional else round(budget.removed_groups / len(blocks))
    kept, wanted = _balanced(max(1, groups - removed), (1, groups), (1, neurons), budget.left(blocks[:1]), budget)
    return [Selection(groups=_best(block.groups, kept), neurons=_best(block.neurons, wanted)) for block in blocks]


def _separate(blocks: Sequence[BlockScores], budget: Budget) -> list[Selection]:
    least = len(blocks)
    groups = sum(block.groups.numel() for block in blocks)
    neurons = sum(block.neurons.numel() for block in blocks)
    told = max(least, groups - budget.removed_groups)
    kept, wanted = _balanced(told, (least, groups), (least, neurons), budget.left(blocks), budget)
    chosen = _best_of_all([block.common_groups for block in blocks], kept)
    others = _best_of_all([block.common_neurons for block in blocks], wanted)
    return [Selection(groups=some, neurons=rest) for some, rest in zip(chosen, others, strict=True)]


def _balanced(told: int, groups: Pair, neurons: Pair, left: int, budget: Budget) -> Pair:
    """How many groups and neurons stay: the number of groups moves only where neurons alone cannot make up for the rest.

    Args:
        told: groups that are to stay.
        groups: the least and the most that can.
        neurons: the least and the most that can.
        left: parameters that are to stay.
        budget: what a group and a neuron cost.
    """
    kept = told
    while kept > groups[0] and budget.cost(kept, neurons[0]) > left:
        kept -= 1
    while kept < groups[1] and budget.cost(kept, neurons[1]) < left - budget.neuron_cost / 2:
        kept += 1
    if kept != told:
        logger.warning("%d groups of heads stay instead of %d: neurons alone cannot make up for the rest", kept, told)
    wanted = round((left - kept * budget.group_cost) / budget.neuron_cost)
    return kept, min(neurons[1], max(neurons[0], wanted))


def _adaptive(blocks: Sequence[BlockScores], budget: Budget) -> list[Selection]:
    """Groups and neurons of all blocks in one order; the best stay as long as they fit, neurons fill what is left."""
    left = budget.left(blocks)
    items: list[Item] = sorted(
        (-score, kind, index, place)
        for index, block in enumerate(blocks)
        for kind, scores in enumerate((block.common_groups, block.common_neurons))
        for place, score in enumerate(scores.tolist())
    )
    costs = (budget.group_cost, budget.neuron_cost)
    kept: list[Places] = [({int(block.groups.argmax())}, {int(block.neurons.argmax())}) for block in blocks]
    spent = len(blocks) * sum(costs)
    is_full = [False, False]
    for _, kind, index, place in items:
        if place in kept[index][kind] or is_full[kind]:
            continue
        if spent + costs[kind] > left:
            is_full[kind] = True  # a worse one of this kind does not overtake a better one that was too large
            continue
        kept[index][kind].add(place)
        spent += costs[kind]
    if left - spent >= budget.neuron_cost:
        _trade(items, kept, left - spent, costs)
    return [Selection(groups=tuple(sorted(groups)), neurons=tuple(sorted(neurons))) for groups, neurons in kept]


def _trade(items: Sequence[Item], kept: Sequence[Places], spare: int, costs: Pair) -> None:
    """All neurons stay and the next group is too large for what is left: it stays, and the worst neurons pay for it.

    Args:
        items: the best first.
        kept: what stays of every block, changed in place.
        spare: parameters that are left.
        costs: of a group and of a neuron.
    """
    group = next(((index, place) for _, kind, index, place in items if not kind and place not in kept[index][0]), None)
    payable = sum(len(neurons) - 1 for _, neurons in kept)
    number = -((spare - costs[0]) // costs[1])  # neurons, rounded up
    if group is None or number > payable:
        return
    kept[group[0]][0].add(group[1])
    for _, kind, index, place in reversed(items):
        if number and kind and len(kept[index][1]) > 1:
            kept[index][1].remove(place)
            number -= 1


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
