"""From costs at one or two depths to those of the whole model. Pure arithmetic.

Times and files are lines in the number of blocks. Memory is too, but small differences of peaks are mostly memory that a process
keeps for later, which soon stops growing; a line through them would foresee gigabytes. So a walk over the blocks needs what it
needed at the deepest, and nothing but a tuning grows by more than a few float32 copies a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from algorithms.workload import ModelShapes
from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Basis, Prediction

_COPIES_A_BLOCK = 4  # of a block in float32, which is two models at once and as much again
_FLOAT = 4


class Kind(StrEnum):
    """How the memory of a piece of work depends on the number of blocks."""

    WALK = "walk"  # one block at a time
    TUNING = "tuning"  # all of them, with gradients and what these need
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a stage, or a closing line, cost at one depth. ``resident_bytes`` is the memory in use when it started."""

    user_cpu_s: float
    wall_s: float
    peak_memory_bytes: int
    peak_cuda_memory_bytes: int | None = None
    disk_bytes: int = 0
    resident_bytes: int = 0
    kind: str = Kind.OTHER


def linear(costs: Mapping[int, float], depth: int) -> float:
    """The line through one or two points (number of blocks -> cost) at ``depth``; nothing gets cheaper with more blocks.

    One point is all of it: a constant.
    """
    low, high = min(costs), max(costs)
    if low == high:
        return costs[low]
    each = max((costs[high] - costs[low]) / (high - low), 0.0)
    at_high = max(costs.values()) if not each else costs[high]
    return at_high + (depth - high) * each


def at_depth(costs: Mapping[int, Mapping[str, Measured]], shapes: ModelShapes, stages: Sequence[str]) -> dict[str, Prediction]:
    """What the ``stages`` that run, in order, and the closing lines cost on a model of these shapes.

    A process keeps some of what its earlier stages have used; where these do not run, later peaks are lower by that much.
    """
    deepest, kept = costs[max(costs)], 0
    if stages and stages[0] in deepest:
        kept = max(0, deepest[stages[0]].resident_bytes - next(iter(deepest.values())).resident_bytes)
    found = {}
    for name in (*stages, CERTIFICATE, EVALUATION):
        points = {blocks: lines[name] for blocks, lines in costs.items() if name in lines}
        if points:
            found[name] = _at(points, shapes, kept)
    return found


def _at(points: Mapping[int, Measured], shapes: ModelShapes, kept: int) -> Prediction:
    def expected(name: str) -> float:
        """One of the costs, at the depth of the whole model."""
        return linear({blocks: vars(cost)[name] for blocks, cost in points.items()}, shapes.blocks)

    on_device = all(cost.peak_cuda_memory_bytes is not None for cost in points.values())
    return Prediction(
        user_cpu_s=round(expected("user_cpu_s"), 3),
        wall_s=round(expected("wall_s"), 3),
        peak_memory_bytes=round(_peak(points, shapes)) - kept,
        disk_bytes=round(expected("disk_bytes")),
        peak_cuda_memory_bytes=round(expected("peak_cuda_memory_bytes")) if on_device else None,
        basis=Basis.PROBE,
    )


def _peak(points: Mapping[int, Measured], shapes: ModelShapes) -> float:
    """Peak memory on the whole model: what was resident before, as at the deepest, and what came on top."""
    deepest = max(points)
    last = points[deepest]
    if last.kind == Kind.WALK:
        return max(cost.peak_memory_bytes for cost in points.values())
    on_top = {blocks: cost.peak_memory_bytes - cost.resident_bytes for blocks, cost in points.items()}
    grown = last.resident_bytes + linear(on_top, shapes.blocks)
    if last.kind == Kind.TUNING:
        return grown
    most = _COPIES_A_BLOCK * _FLOAT * shapes.block_parameters * (shapes.blocks - deepest)
    return min(grown, max(cost.peak_memory_bytes for cost in points.values()) + most)
