"""From costs at one or two depths to those of the whole model. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Basis, Prediction


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a stage, or a closing line, cost at one depth. ``resident_bytes`` is the memory in use when it started."""

    user_cpu_s: float
    wall_s: float
    peak_memory_bytes: int
    peak_cuda_memory_bytes: int | None = None
    disk_bytes: int = 0
    resident_bytes: int = 0


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


def at_depth(costs: Mapping[int, Mapping[str, Measured]], depth: int, stages: Sequence[str]) -> dict[str, Prediction]:
    """What the ``stages`` that run, in order, and the closing lines cost on ``depth`` blocks.

    A process keeps some of what its earlier stages have used; where these do not run, later peaks are lower by that much.
    """
    shallow = costs[min(costs)]
    kept = 0
    if stages and stages[0] in shallow:
        kept = max(0, shallow[stages[0]].resident_bytes - next(iter(shallow.values())).resident_bytes)
    found = {}
    for name in (*stages, CERTIFICATE, EVALUATION):
        points = {blocks: lines[name] for blocks, lines in costs.items() if name in lines}
        if points:
            found[name] = _at(points, depth, kept)
    return found


def _at(points: Mapping[int, Measured], depth: int, kept: int) -> Prediction:
    def expected(name: str) -> float:
        """One of the costs, at the depth."""
        return linear({blocks: vars(cost)[name] for blocks, cost in points.items()}, depth)

    on_device = all(cost.peak_cuda_memory_bytes is not None for cost in points.values())
    return Prediction(
        user_cpu_s=round(expected("user_cpu_s"), 3),
        wall_s=round(expected("wall_s"), 3),
        peak_memory_bytes=round(expected("peak_memory_bytes")) - kept,
        disk_bytes=round(expected("disk_bytes")),
        peak_cuda_memory_bytes=round(expected("peak_cuda_memory_bytes")) if on_device else None,
        basis=Basis.PROBE,
    )
