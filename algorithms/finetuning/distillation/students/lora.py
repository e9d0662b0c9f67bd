"""Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha/r · B A beside frozen linears, merged into their weights at the end.

Legend: O out_features, I in_features, r rank, b sequences of L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from algorithms.finetuning.distillation.sharding import local, whole
from algorithms.finetuning.distillation.students.dense_student import DenseSettings, DenseStudent
from algorithms.numerics.randomness import keyed_generator
from algorithms.parallel.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Rank, scale (alpha/r) and dropout of adapters. ``keeps_zeros`` adds nothing to rows and columns that are all zero."""

    rank: int
    alpha: float
    dropout: float = 0.0
    keeps_zeros: bool = False
    seed: int = 0


class LoraLinear(nn.Module):
    """A frozen linear with an adapter, which starts at zero.

    Args:
        base: the linear, with its whole weight [O, I].
        settings: see there.
        name: keys what is random, with the seed.
    """

    def __init__(self, base: nn.Linear, settings: LoraSettings, name: str) -> None:
        super().__init__()
        self.base, self.name, self._settings = base.requires_grad_(False), name, settings
        self.scale = settings.alpha / settings.rank
        self.step: int | None = None  # in which sequences pass; None: nothing is dropped
        self.sequences: Sequence[int] = ()
        weight = base.weight
        bound = base.in_features**-0.5
        down = torch.rand(settings.rank, base.in_features, generator=keyed_generator(settings.seed, "lora", name))
        down = down.mul_(2 * bound).sub_(bound).to(weight.device)
        rows, columns = (torch.ones(size, device=weight.device) for size in weight.shape)
        if settings.keeps_zeros:
            rows, columns = weight.any(1).float(), weight.any(0).float()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(base.out_features, settings.rank, device=weight.device))
        self.register_buffer("rows", rows[:, None], persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [b, L, I] to [b, L, O]."""
        low = linear(self._dropped(inputs), self.down * self.columns)
        return self.base(inputs) + self.scale * linear(low, self.up * self.rows)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The linear with the adapter in its weight, in place; every rank has to come along."""
        down, up = whole(self.down) * self.columns, local(self.up)
        first = self._first_row()
        delta = (up * self.rows[first : first + len(up)]) @ down
        local(self.base.weight.detach()).add_(delta, alpha=self.scale)
        return self.base

    def _first_row(self) -> int:
        """Of those that this rank holds."""
        if local(self.up) is self.up:
            return 0
        return -(-self.up.shape[0] // self.up.device_mesh.size()) * self.up.device_mesh.get_local_rank()

    def _dropped(self, inputs: Tensor) -> Tensor:
        """Inputs without a share of their channels, drawn anew for every token: by step and sequence, whoever computes them."""
        share = self._settings.dropout
        if share == 0 or self.step is None:
            return inputs
        place = ("dropout", self.name, self.step)
        drawn = [self._noise(inputs.shape[1:], *place, number) for number in self.sequences]
        return inputs * torch.stack(drawn).to(inputs) / (1 - share)

    def _noise(self, shape: torch.Size, *place: object) -> Tensor:
        device = self.rows.device
        generator = keyed_generator(self._settings.seed, *place, device=device)
        return torch.rand(shape, generator=generator, device=device) >= self._settings.dropout


def adapt(linears: Mapping[str, nn.Linear], root: nn.Module, settings: LoraSettings, prefix: str = "") -> None:
    """Put adapters beside linears of ``root``, in place; ``prefix`` and their names key what is random."""
    for name, module in linears.items():
        root.set_submodule(name, LoraLinear(module, settings, prefix + name))


class LoraStudent(DenseStudent):
    """A model whose adapters move.

    Args:
        model: with :class:`LoraLinear` layers, nothing else of which wants gradients.
        settings: how adapters move.
        ranks: the processes that the model is sharded over.
    """

    def __init__(self, model: nn.Module, settings: DenseSettings, ranks: Ranks) -> None:
        super().__init__(model, settings, ranks)
        self._adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}

    def passing(self, step: int | None, sequences: Sequence[int]) -> None:
        """Key what is dropped."""
        for module in self._adapted.values():
            module.step, module.sequences = step, sequences

    def finish(self) -> None:
        """Put plain linears back, which compute what the adapters did."""
        super().finish()
        for name, module in self._adapted.items():
            self.model.set_submodule(name, module.merge())
