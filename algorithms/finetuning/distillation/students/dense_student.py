"""The student whose tensors follow their gradients as they are, by AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from algorithms.finetuning.distillation.adam import AdamRule, adam_step
from algorithms.finetuning.distillation.sharding import local, reshard
from algorithms.finetuning.distillation.student import StepReport
from algorithms.finetuning.distillation.students.moving import Moving, are_finite, clip
from algorithms.parallel.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """How tensors move.

    A step shrinks matrices by ``weight_decay`` times the rate, vectors never. ``max_grad_norm`` clips all gradients together.
    ``keeps_zeros`` leaves entries of matrices that are exactly zero as they are: what has been padded or pruned in place.
    """

    rule: AdamRule
    lr: float
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    keeps_zeros: bool = False


class DenseStudent:
    """A model of which what wants gradients moves; see :class:`algorithms.finetuning.distillation.student.Student`.

    Args:
        model: its moving parameters are float32: they are rounded once, by whoever stores them.
        settings: how they move.
        ranks: the processes that the model is sharded over.
    """

    def __init__(self, model: nn.Module, settings: DenseSettings, ranks: Ranks) -> None:
        self.model, self._settings, self._ranks = model, settings, ranks
        self._moving = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._moments = {name: settings.rule.moments(parameter.detach()) for name, parameter in self._moving.items()}

    def values(self) -> dict[str, Tensor]:
        """The tensors that move, by their names in the model."""
        return dict(self._moving)

    def state(self) -> dict[str, Tensor]:
        """Values and moments."""
        state = {f"model.{name}": tensor for name, tensor in self._moving.items()}
        for name, moments in self._moments.items():
            state |= {f"moment.{kind}.{name}": tensor for kind, tensor in moments.items()}
        return state

    def loaded(self) -> None:
        """Let go of copies of the tensors that were changed."""
        reshard(self.model)

    def passing(self, step: int | None, sequences: Sequence[int]) -> None:
        """All sequences pass alike."""

    def set_summing(self, sums: bool) -> None:
        """The sharded model sums by itself."""

    def discard_gradients(self) -> None:
        """Forget what backward passes have left."""
        for parameter in self._moving.values():
            parameter.grad = None

    def gradients_are_finite(self) -> bool:
        """Whether every rank can step."""
        return are_finite((tensor.gradient for tensor in self._with_gradients()), self._ranks)

    @torch.no_grad()
    def step(self, number: int, factor: float) -> StepReport:
        """Move everything against the gradients that backward passes have left, and forget these.

        Args:
            number: of the step, from 1.
            factor: of the learning rate.
        """
        settings, rate = self._settings, self._settings.lr * factor
        moving = self._with_gradients()
        if settings.keeps_zeros:
            for tensor in moving:
                _stop_at_zeros(tensor)
        norm = clip(moving, settings.max_grad_norm, self._ranks)
        for tensor in moving:
            if settings.weight_decay > 0 and tensor.part.dim() > 1:
                tensor.part.mul_(1 - rate * settings.weight_decay)
            moments = {kind: local(moment) for kind, moment in self._moments[tensor.name].items()}
            adam_step(tensor.part, tensor.gradient, moments, rule=settings.rule, rate=rate, step=number, sum_=self._ranks.sum_)
        self.discard_gradients()
        return StepReport(gradient_norm=norm)

    def complaint(self) -> str:
        """Nothing that could be wrong shows so early."""
        return ""

    def finish(self) -> None:
        """Leave the result in the model, which moves no more."""
        reshard(self.model)

    def _with_gradients(self) -> list[Moving]:
        found = self._moving.items()
        return [Moving(name, local(tensor.detach()), local(tensor.grad)) for name, tensor in found if tensor.grad is not None]


def _stop_at_zeros(tensor: Moving) -> None:
    """Take the gradient of a matrix's zeros away: moments that stay zero move nothing."""
    if tensor.part.dim() > 1:
        tensor.gradient.masked_fill_(tensor.part == 0, 0.0)
