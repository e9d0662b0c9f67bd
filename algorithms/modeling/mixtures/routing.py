"""How many calibration tokens each expert of a block is given, and what is done for those that are given too few."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.mixtures.experts import Experts
from algorithms.parallel.ranks import Ranks

# Of the tokens that a mixture gives an expert on the average: with fewer, statistics of an expert are taken from all tokens. As
# many tokens as there are input features are never too few.
_FLOOR_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Tokens of all ranks that each expert of a block is given, and the experts that are given fewer than ``floor``."""

    tokens: tuple[int, ...]
    floor: int

    @property
    def starved(self) -> frozenset[int]:
        """Numbers of the experts that see all tokens while statistics are gathered."""
        return frozenset(number for number, count in enumerate(self.tokens) if count < self.floor)

    def report(self) -> Mapping[str, object]:
        """For the block's report."""
        return {"tokens": list(self.tokens), "floor": self.floor, "calibrated_on_all_tokens": sorted(self.starved)}


def count_routed(experts: Experts, chosen: Iterable[Tensor], ranks: Ranks, floor: int | None = None) -> Routing:
    """Count the tokens of each expert.

    Args:
        experts: of the block.
        chosen: the numbers of the experts [n, k] of each token, batch by batch.
        ranks: which have other tokens.
        floor: the least number of tokens that statistics of an expert may be made of; None for a quarter of what an expert has
            on the average, and no more than it has input features.
    """
    counts = torch.zeros(len(experts), dtype=torch.int64, device=ranks.device)
    for batch in chosen:
        # Some models send a token nowhere by a number beyond the last expert's.
        counts += torch.bincount(batch.flatten().to(ranks.device), minlength=len(experts))[: len(experts)]
    ranks.meet()
    ranks.sum_(counts)
    average = int(counts.sum()) // max(1, len(experts))
    least = min(experts.hidden, max(1, int(_FLOOR_SHARE * average))) if floor is None else floor
    return Routing(tokens=tuple(counts.tolist()), floor=least)


def stops(groups: Sequence[Sequence[str]], architecture: ModelArchitecture) -> list[str]:
    """Where a walk over a block stops: at the first linear of each group, and at a mixture before the first of its experts."""
    leaders = [group[0] for group in groups]
    inside = [leader for leader in leaders if architecture.is_expert(leader)]
    if inside:
        assert architecture.experts is not None
        leaders.insert(leaders.index(inside[0]), architecture.experts)
    return leaders
