"""Sharing out a budget of bits: for every matrix one of its options, so that the sum of errors is least.

A knapsack with one choice a matrix. Dynamic programming over the budget in small units is exact up to the rounding of bits to
units; what the rounding leaves of the budget goes, exactly counted, to the upgrades that gain most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_UNITS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one way to code a matrix costs in bits, and its error."""

    bits: int
    error: float


def allocate(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The number of the chosen option of every matrix; together they take no more bits than the budget.

    Args:
        options: of every matrix.
        budget: bits.

    Raises:
        ValueError: not even the cheapest options fit.
    """
    kept = [_worth_their_bits(found) for found in options]
    least = sum(found[places[0]].bits for found, places in zip(options, kept, strict=True))
    if least > budget:
        raise ValueError(f"{least} bits are the least, and the budget is {budget}")
    # What all take in any case is taken off, so that units divide what there is to choose about.
    unit = max(1, -(-(budget - least) // _UNITS))
    room = (budget - least) // unit
    tables: list[Tensor] = []
    lowest = torch.zeros(room + 1, dtype=torch.float64)
    for found, places in zip(options, kept, strict=True):
        best = torch.full_like(lowest, torch.inf)
        choice = torch.zeros(room + 1, dtype=torch.int16)
        for number, place in enumerate(places):
            units = -(-(found[place].bits - found[places[0]].bits) // unit)
            if units > room:
                break
            total = lowest[: room + 1 - units] + found[place].error
            better = total < best[units:]
            best[units:] = torch.where(better, total, best[units:])
            choice[units:] = torch.where(better, number, choice[units:])
        lowest = best
        tables.append(choice)
    chosen = _walked_back(options, kept, tables, room, unit)
    return _filled(options, kept, chosen, budget)


def _worth_their_bits(options: Sequence[Option]) -> list[int]:
    """Numbers of the options that are better than all cheaper ones, by rising bits."""
    kept: list[int] = []
    for place in sorted(range(len(options)), key=lambda place: (options[place].bits, options[place].error)):
        if not kept or options[place].error < options[kept[-1]].error:
            kept.append(place)
    return kept


def _walked_back(
    options: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]], tables: Sequence[Tensor], room: int, unit: int
) -> list[int]:
    chosen = [0] * len(options)
    for matrix in range(len(options) - 1, -1, -1):
        found, places = options[matrix], kept[matrix]
        chosen[matrix] = places[int(tables[matrix][room])]
        room -= -(-(found[chosen[matrix]].bits - found[places[0]].bits) // unit)
    return chosen


def _filled(options: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]], chosen: list[int], budget: int) -> list[int]:
    """Spend what is left: the upgrade that gains most, again and again."""
    left = budget - sum(found[place].bits for found, place in zip(options, chosen, strict=True))
    while True:
        gains = [
            (options[matrix][now].error - options[matrix][place].error, matrix, place)
            for matrix, now in enumerate(chosen)
            for place in kept[matrix]
            if 0 < options[matrix][place].bits - options[matrix][now].bits <= left
        ]
        gain, matrix, place = max(gains, default=(0.0, 0, 0))
        if gain <= 0:
            return chosen
        left -= options[matrix][place].bits - options[matrix][chosen[matrix]].bits
        chosen[matrix] = place
