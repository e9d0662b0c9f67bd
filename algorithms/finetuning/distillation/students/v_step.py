"""The V-step on one layer whose rows may be spread over ranks; the limits hold for the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.finetuning.distillation.sharding import local
from algorithms.finetuning.distillation.students.coded_linear import CodedLinear
from algorithms.numerics.codebooks.additive import group, sum_codewords
from algorithms.numerics.codebooks.constrained_recode import (
    RecodeLimits,
    accepted,
    propose,
    selection_keys,
    squared_distances,
)
from algorithms.numerics.randomness import keyed_generator
from algorithms.parallel.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class VStepCounts:
    """Groups whose codes were looked at, for which the search found others, and which took them."""

    examined: int = 0
    proposed: int = 0
    changed: int = 0

    def __add__(self, other: VStepCounts) -> VStepCounts:
        return VStepCounts(
            examined=self.examined + other.examined,
            proposed=self.proposed + other.proposed,
            changed=self.changed + other.changed,
        )


@torch.no_grad()
def v_step(
    linear: CodedLinear,
    target: Tensor,
    codebooks: Tensor,
    *,
    limits: RecodeLimits,
    place: tuple[object, ...],
    ranks: Ranks,
) -> VStepCounts:
    """Bring codes nearer to a target, in place.

    Args:
        linear: the layer; its codes are changed.
        target: T, this rank's rows [n, I].
        codebooks: all of them, [M*K, d], as they are after the P-step.
        limits: how many groups may follow, and how they are searched.
        place: seed and names that randomness is keyed by.
        ranks: the processes that hold the other rows.

    Returns:
        Counts of this rank's groups.
    """
    stored, scales = local(linear.codes), local(linear.scales).repeat_interleave(linear.num_input_groups)
    codes = linear.unsigned(stored).flatten(0, 1)
    tiles = group(target.float(), linear.group_shape).flatten(0, 1)
    books = codebooks.float()
    unscaled, scales = sum_codewords(linear.rows_of(stored), books), scales.float()
    noise = keyed_generator(*place, "selection", ranks.rank)
    keys = selection_keys(squared_distances(tiles, unscaled, scales), temperature=limits.temperature, generator=noise)
    count = limits.count(linear.num_output_groups * linear.num_input_groups)
    chosen = torch.sort(keys, descending=True, stable=True).indices[:count]
    order = _Order(keys[chosen], count, ranks)
    chosen = chosen[: order.num_own]
    permutation = torch.randperm(linear.num_codebooks, generator=keyed_generator(*place, "order"))
    books = books.view(linear.num_codebooks, linear.num_codewords, -1)
    found, moves = propose(tiles[chosen], codes[chosen], scales[chosen], books, limits=limits, order=permutation)
    differs = torch.any(found != codes[chosen], dim=1)
    taken = chosen.numel()
    if limits.trust_ratio is not None:
        power = (unscaled * scales[:, None]).square().sum(dtype=torch.float64)
        ranks.sum_(power)
        taken = order.own_among(accepted(order.arranged(moves), trust_ratio=limits.trust_ratio, power=power.item()))
    codes[chosen[:taken]] = found[:taken]
    stored.copy_(codes.view_as(stored))
    return VStepCounts(examined=chosen.numel(), proposed=int(differs.sum()), changed=int(differs[:taken].sum()))


class _Order:
    """The order of the furthest groups of all ranks, each of which brings its own in order.

    Args:
        keys: of this rank's furthest groups, descending, at most ``count``.
        count: how many are taken of all.
        ranks: the processes.
    """

    def __init__(self, keys: Tensor, count: int, ranks: Ranks) -> None:
        self._ranks, self._count = ranks, count
        self._positions: Tensor | None = None  # in the table of all ranks' groups, by rank and place, those taken
        self.num_own = min(count, keys.numel())
        if ranks.size > 1:
            table = self._table(keys.double(), missing=-torch.inf)
            self._positions = torch.sort(table, descending=True, stable=True).indices[:count]
            self.num_own = self.own_among(count)

    def arranged(self, values: Tensor) -> Tensor:
        """Values [num_own] of this rank's groups together with the others', in the order of all."""
        if self._positions is None:
            return values
        return self._table(values.double(), missing=0.0)[self._positions]

    def own_among(self, first: int) -> int:
        """How many of the first so many groups are this rank's."""
        if self._positions is None:
            return first
        return int(torch.sum(self._positions[:first] // self._count == self._ranks.rank))

    def _table(self, values: Tensor, *, missing: float) -> Tensor:
        table = torch.zeros(self._ranks.size, self._count, dtype=torch.float64, device=values.device)
        table[self._ranks.rank] = missing
        table[self._ranks.rank, : values.numel()] = values
        self._ranks.sum_(table)
        return table.flatten()
