"""Whether a job fits the machine, said before its first stage: refused where it certainly does not, warned of where it may not.

A refusal that is wrong costs more than a warning that is. So a job is refused only where what was measured exceeds what the
machine could give at best, with room for the error of the measurement; a guess from shapes refuses next to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from algorithms.workload import ModelShapes
from configs.errors import DataError, MemoryShortageError
from configs.loader import LoadedRecipe
from jobs.estimation.forecast import Forecast
from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Basis, Prediction
from jobs.estimation.room import Room
from jobs.execution.memory import overrides_that_help
from jobs.reporting.summary import size

logger = logging.getLogger(__name__)

# Shares of what was measured that are needed beyond doubt. Files repeat to the byte, memory within a third.
_SURE_DISK, _SURE_MEMORY = 0.9, 0.67
_CLOSING = (CERTIFICATE, EVALUATION)


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Too little of something. ``error`` ends the job with this sentence; without, it is a warning."""

    text: str
    error: type[DataError] | type[MemoryShortageError] | None = None


def require(loaded: LoadedRecipe, forecast: Forecast, room: Room, shapes: ModelShapes, *, written: int = 0) -> None:
    """Warn of what may not fit.

    Raises:
        DataError: the disk is certainly too small; names the keys that move things elsewhere.
        MemoryShortageError: the memory is; names the overrides that need less.
    """
    found = list(shortages(loaded, forecast, room, shapes, written=written))
    for shortage in found:
        if shortage.error is not None:
            raise shortage.error(shortage.text)
    for shortage in found:
        logger.warning("%s", shortage.text)


def shortages(
    loaded: LoadedRecipe, forecast: Forecast, room: Room, shapes: ModelShapes, *, written: int = 0
) -> Iterator[Shortage]:
    """What is too small for a job.

    Args:
        loaded: the recipe.
        forecast: of what will run.
        room: what there is.
        shapes: of the model.
        written: bytes that an interrupted run has written already.
    """
    yield from _of_disk(forecast.predictions, room, written)
    yield from _of_memory(loaded, forecast.predictions, room, shapes)


def _of_disk(predictions: Mapping[str, Prediction], room: Room, written: int) -> Iterator[Shortage]:
    needed = sum(p.disk_bytes for p in predictions.values()) - written
    sure = _SURE_DISK * sum(p.disk_bytes for p in predictions.values() if p.basis is not Basis.SHAPES) - written
    if max(needed, sure) <= room.disk:
        return
    certain = sure > room.disk
    yield Shortage(
        text=f"The stages write {'' if certain else 'up to '}{size(needed)}, and {size(room.disk)} of disk are free. "
        "Make room, or move the job to another disk with USER_FOLDER or MODEL_PATH=<folder>.",
        error=DataError if certain else None,
    )


def _of_memory(
    loaded: LoadedRecipe, predictions: Mapping[str, Prediction], room: Room, shapes: ModelShapes
) -> Iterator[Shortage]:
    kinds = (
        ("memory", {name: p.peak_memory_bytes for name, p in predictions.items()}, room.memory, room.memory_limit),
        (
            "the device's memory",
            {name: p.peak_cuda_memory_bytes or 0 for name, p in predictions.items()},
            room.device,
            room.device_limit,
        ),
    )
    for what, needed, free, limit in kinds:
        short = {name: count for name, count in needed.items() if free is not None and count > free}
        if not short:
            continue
        worst = max(short, key=lambda name: short[name])
        certain = any(
            limit is not None and _least(name, predictions[name], count, shapes) > limit for name, count in short.items()
        )
        yield Shortage(
            text=_memory_text(loaded, what, short, predictions[worst].basis, free if not certain else limit, certain=certain),
            error=MemoryShortageError if certain else None,
        )


def _least(name: str, prediction: Prediction, needed: int, shapes: ModelShapes) -> float:
    """Bytes that a stage needs beyond doubt. What follows the stages needs none: they are worth having without it."""
    if name in _CLOSING:
        return 0.0
    if prediction.basis is Basis.SHAPES:
        return 4.0 * shapes.block_parameters * shapes.held  # one block in float32, of a mixture with one expert
    return _SURE_MEMORY * needed


def _memory_text(
    loaded: LoadedRecipe, what: str, short: Mapping[str, int], basis: Basis, there: int | None, *, certain: bool
) -> str:
    listed = ", ".join(f"{name} {size(count)}" for name, count in short.items())
    lines = [
        f"{loaded.file}: expected to need more of {what} than {'there is' if certain else 'is free'}, {size(there or 0)}: "
        f"{listed} (from {basis.value})."
    ]
    overrides = overrides_that_help(loaded)
    if any(name not in _CLOSING for name in short):
        lines.append(
            "One of these overrides needs less, the first that you can:" if overrides else "It takes a larger machine."
        )
        lines.extend(f"  {override}" for override in overrides)
    if EVALUATION in short:
        lines.append("EVALUATION=null leaves the figures out; EVALUATION.max_tokens takes fewer.")
    return "\n".join(lines)
