"""Statistics for one input group of a block after another, each taken when everything before it is compressed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from algorithms.modeling.activations import Activations
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.lockstep import BlockWalk
from algorithms.modeling.mixtures.deferred import take
from algorithms.modeling.mixtures.routing import Routing, stops
from algorithms.numerics.statistics import InputStatistics
from algorithms.parallel.ranks import ALONE, Ranks


def linear_at(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by the architecture table's path, with its weights."""
    take(block, name)
    return _checked(name, block.get_submodule(name))


def _checked(name: str, module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear), f"the architecture table lists {name}, which is a {type(module).__name__}"
    return module


class GroupWalk:
    """A block on its way from original to compressed, with the calibration tokens inside it.

    With ``reference``, the original block runs beside it on the original model's hidden states. A linear whose output is added
    to the residual stream is then asked for W r + d: its output in the original model, plus the distance d that separates the
    two residual streams at that point. If it could give that, all errors so far would be gone.

    Args:
        architecture: which linears share an input, and which write to the residual stream.
        index: number of the block.
        block: the block; its linears are replaced one by one.
        original: a copy of the block that stays as it is.
        current: hidden states of the compressed prefix.
        reference: those of the original model for the same tokens, for the first batches at least; or None.
        ranks: which walk the same block, each with its own part of the tokens.
        min_expert_tokens: see :func:`algorithms.modeling.mixtures.routing.count_routed`.
    """

    def __init__(
        self,
        architecture: ModelArchitecture,
        index: int,
        *,
        block: nn.Module,
        original: nn.Module,
        current: Activations,
        reference: Activations | None,
        ranks: Ranks = ALONE,
        min_expert_tokens: int | None = None,
    ) -> None:
        self._ranks, self._architecture, self._min_expert_tokens = ranks, architecture, min_expert_tokens
        self.groups = architecture.groups_in(block)
        self.routing: Routing | None = None  # of the block's mixture, once the walk is there
        leaders = stops(self.groups, architecture)
        writers = [name for name in leaders if name in architecture.residual_writers]
        self._writers = () if reference is None else writers
        self._is_behind_writer = False
        self._current, self._reference = current, reference
        name = architecture.residual_multiplier
        factor = 1.0 if name is None else float(getattr(block, name))
        self._distances = _Distances(current, reference, factor) if reference is not None and writers else None
        self._walk = BlockWalk(block, index, current, leaders, on_output=self._subtract)
        self._original = None if reference is None else BlockWalk(original, index, reference, writers, behind=True)
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._exits.enter_context(self._walk)
        if self._original is not None:
            self._exits.enter_context(self._original)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exits.__exit__(kind, error, trace)

    def statistics(self, group: Sequence[str]) -> InputStatistics:
        """Statistics of the next group's input over the tokens of all ranks; the groups are asked for in their order."""
        architecture = self._architecture
        if self.routing is None and architecture.experts is not None and architecture.is_expert(group[0]):
            self.routing = self._walk.route(architecture.experts, self._ranks, self._min_expert_tokens)
        linear = _checked(group[0], self._walk.peek(group[0]))
        corrects = group[0] in self._writers
        statistics = InputStatistics(
            linear.in_features, self._current.device, out_features=linear.out_features if corrects else None
        )
        # The reference may have fewer batches; the original's walk is consumed to its end whichever ends first.
        wanted = self._wanted() if corrects else iter(())
        # What a bias gives, no weight has to.
        bias = 0.0 if linear.bias is None else linear.bias
        for inputs, outputs in zip_longest(self._walk.next_stop(), wanted):
            statistics.update(inputs, None if outputs is None else outputs - bias)
        self._is_behind_writer = corrects
        self._ranks.meet()
        statistics.add_up(self._ranks.sum_)
        return statistics

    def linear(self, name: str) -> nn.Linear:
        """A linear that is not compressed yet."""
        return _checked(name, self._walk.linear(name))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a compressed module in the place of a linear."""
        self._walk.replace(name, module)

    def outputs(self) -> Iterator[Tensor]:
        """The compressed block's outputs, batch by batch."""
        return self._walk.outputs()

    def reference_outputs(self) -> Iterator[Tensor]:
        """The original block's outputs for the original model's hidden states, batch by batch."""
        assert self._original is not None
        return self._original.outputs()

    def _wanted(self) -> Iterator[Tensor]:
        assert self._original is not None
        assert self._distances is not None
        for place, output in enumerate(self._original.next_stop()):
            yield self._distances.add(place, output)

    def _subtract(self, place: int, output: Tensor) -> None:
        if self._is_behind_writer and self._distances is not None and place in self._distances:
            self._distances.subtract(place, output)


class _Distances:
    """Residual stream of the original model minus that of the compressed one, batch by batch, at one point of a block.

    Outputs of linears come to the stream times ``factor``.
    """

    def __init__(self, current: Activations, reference: Activations, factor: float) -> None:
        self._current, self._reference, self._factor = current, reference, factor
        self._kept: dict[int, Tensor] = {}

    def __contains__(self, place: int) -> bool:
        return place in self._kept

    def add(self, place: int, output: Tensor) -> Tensor:
        """The original stream moves on by a linear's output; returns the output [b, length, hidden] that joins both."""
        if place not in self._kept:
            original = self._reference.compute(self._reference.batches[place])
            distance = original - self._current.compute(self._current.batches[place])
        else:
            distance = self._kept[place].to(output.device)
        # Some models put all tokens of a batch behind one another.
        distance = distance + self._factor * output.view_as(distance)
        self._keep(place, distance)
        return distance / self._factor

    def subtract(self, place: int, output: Tensor) -> None:
        """The compressed stream has followed by its own output of that linear."""
        before = self._kept[place].to(output.device)
        self._keep(place, before - self._factor * output.view_as(before))

    @torch.no_grad()
    def _keep(self, place: int, distance: Tensor) -> None:
        self._kept[place] = distance.to(self._current.storage)
