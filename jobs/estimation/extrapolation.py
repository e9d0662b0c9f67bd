"""From costs at one or two depths to those of the whole model. Pure arithmetic.

Times and files are lines in the number of blocks; of the certificate, whose time is mostly that of starting a program, a small
difference is doubted. Memory of a walk over the blocks grows by what the process keeps of memory that it has given back, which
stops after some blocks: on a model of 16 blocks, GPTQ and FLAP came to keep 2 to 5 times as much as the second block had added.
What a later stage finds resident differs between equal runs by up to a factor of two; it is taken as it was at the deepest. On
top of that, nothing but a tuning needs more than a few float32 copies a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from algorithms.workload import ModelShapes
from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Basis, Prediction

_COPIES_A_BLOCK = 4  # of a block in float32, which is two models at once and as much again
_KEPT_BLOCKS = 4  # so many times what the second block added is kept in the end
_DOUBTFUL = 0.3  # share of a closing line's cost below which a difference may be noise
_FLOAT = 4
_CLOSING = (CERTIFICATE, EVALUATION)


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


def linear(costs: Mapping[int, float], depth: int, *, doubtful: float = 0.0) -> float:
    """The line through one or two points (number of blocks -> cost) at ``depth``; nothing gets cheaper with more blocks.

    One point is all of it: a constant. A growth of less than ``doubtful`` of the cost counts for less, the smaller it is.
    """
    low, high = min(costs), max(costs)
    growth = max(costs[high] - costs[low], 0.0)
    if not growth or depth == high:
        return costs[high] if depth == high else max(costs.values())
    least = doubtful * costs[low]
    believed = growth * min(1.0, growth / least) if least else growth
    return costs[high] + (depth - high) * believed / (high - low)


def at_depth(costs: Mapping[int, Mapping[str, Measured]], shapes: ModelShapes, stages: Sequence[str]) -> dict[str, Prediction]:
    """What the ``stages`` that run, in order, and the closing lines cost on a model of these shapes.

    A process keeps some of what its earlier stages have used; where these do not run, later peaks are lower by that much.
    """
    deepest, kept = costs[max(costs)], 0
    if stages and stages[0] in deepest:
        kept = max(0, deepest[stages[0]].resident_bytes - next(iter(deepest.values())).resident_bytes)
    found = {}
    for name in (*stages, CERTIFICATE, EVALUATION):
        points = {blocks: _resident(lines, name) for blocks, lines in costs.items() if name in lines}
        if points:
            found[name] = _at(points, shapes, kept, doubtful=0.0 if name in stages else _DOUBTFUL)
    return found


def _resident(lines: Mapping[str, Measured], name: str) -> Measured:
    """A cost; a closing line starts with about what the last stage did."""
    stages = [line for other, line in lines.items() if other not in _CLOSING]
    return replace(lines[name], resident_bytes=stages[-1].resident_bytes) if name in _CLOSING and stages else lines[name]


def _at(points: Mapping[int, Measured], shapes: ModelShapes, kept: int, *, doubtful: float) -> Prediction:
    def expected(name: str) -> float:
        """One of the costs, at the depth of the whole model."""
        return linear({blocks: vars(cost)[name] for blocks, cost in points.items()}, shapes.blocks, doubtful=doubtful)

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
    """Peak memory on the whole model."""
    deepest = max(points)
    if points[deepest].kind == Kind.WALK:
        settled = min(shapes.blocks, deepest + _KEPT_BLOCKS)
        return linear({blocks: cost.peak_memory_bytes for blocks, cost in points.items()}, settled)
    before = points[deepest].resident_bytes
    on_top = {blocks: cost.peak_memory_bytes - cost.resident_bytes for blocks, cost in points.items()}
    grown = linear(on_top, shapes.blocks)
    if points[deepest].kind == Kind.TUNING:
        return before + grown
    most = _COPIES_A_BLOCK * _FLOAT * shapes.block_parameters * (shapes.blocks - deepest)
    return before + min(grown, max(on_top.values()) + most)
