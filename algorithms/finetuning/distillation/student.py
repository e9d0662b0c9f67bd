"""What the loop asks of a model that is tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did: the norm of the gradient where that is clipped, further counts over all ranks, and a note of them."""

    gradient_norm: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


class Student(Protocol):
    """A model that is tuned, with the optimizer that tunes it."""

    model: nn.Module

    def values(self) -> dict[str, Tensor]:
        """The tensors that are the result."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, ``values`` among them."""
        ...

    def loaded(self) -> None:
        """Hear that tensors were changed from outside."""
        ...

    def passing(self, step: int | None, sequences: Sequence[int]) -> None:
        """Hear the numbers of the sequences that pass the model next: in which step, from 0, or None where it is judged."""
        ...

    def set_summing(self, sums: bool) -> None:
        """Whether backward passes sum over ranks at once."""
        ...

    def discard_gradients(self) -> None:
        """Forget what backward passes have left."""
        ...

    def gradients_are_finite(self) -> bool:
        """Whether the gradients that backward passes have left can be stepped against, on every rank."""
        ...

    def step(self, number: int, factor: float) -> StepReport:
        """Move against the gradients; ``number`` counts from 1, ``factor`` is that of the learning rates."""
        ...

    def complaint(self) -> str:
        """What is wrong with the first epoch's steps, and what to change; empty where nothing is."""
        ...
