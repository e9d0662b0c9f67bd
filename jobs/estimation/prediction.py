"""What a piece of a job is expected to cost. Plain values: the manifest keeps them beside what it did cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

CERTIFICATE, EVALUATION, TOTAL = "certificate", "evaluation", "total"


class Basis(StrEnum):
    """What a prediction was made from, the most trustworthy first."""

    EARLIER = "an earlier run"
    PROBE = "a probe"
    SHAPES = "shapes, coarse"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Expected cost, measured as :class:`jobs.execution.resources.Usage` does; ``disk_bytes`` stay on disk afterwards."""

    user_cpu_s: float
    wall_s: float
    peak_memory_bytes: int
    disk_bytes: int = 0
    peak_cuda_memory_bytes: int | None = None
    basis: Basis = Basis.SHAPES

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Prediction:
        """Back from what ``dataclasses.asdict`` made of it.

        Raises:
            ValueError: an unknown basis.
            TypeError: other fields than these.
        """
        return cls(**{**record, "basis": Basis(record["basis"])})


def total(predictions: Iterable[Prediction]) -> Prediction:
    """One after the other: times and disk add up, memory is that of the largest; as trustworthy as the least of them."""
    found = list(predictions)
    order = list(Basis)
    cuda = [p.peak_cuda_memory_bytes for p in found if p.peak_cuda_memory_bytes is not None]
    return Prediction(
        user_cpu_s=sum(p.user_cpu_s for p in found),
        wall_s=sum(p.wall_s for p in found),
        peak_memory_bytes=max((p.peak_memory_bytes for p in found), default=0),
        disk_bytes=sum(p.disk_bytes for p in found),
        peak_cuda_memory_bytes=max(cuda, default=None),
        basis=max((p.basis for p in found), key=order.index, default=Basis.SHAPES),
    )
