"""A block's forward over many batches at once, halting every batch at each linear that starts an input group.

Compressing in order needs the inputs of a linear when everything before it in the block is compressed already. Running the
block from its start for every group costs about two and a half forwards; here each batch's forward is held where it stands and
goes on when the group is compressed, so that one forward is enough. What a held forward keeps alive is its residual stream and
the linear's input; where that does not fit the memory, forwards are run again from the start instead, with the same results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from algorithms.modeling.activations import Activations
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.mixtures.deferred import take
from algorithms.modeling.mixtures.experts import Experts, in_step
from algorithms.modeling.mixtures.pacing import PacedForward, paced
from algorithms.modeling.mixtures.routing import Routing, count_routed
from algorithms.parallel.ranks import Ranks

# Share of the memory that is free when a block starts, which held forwards may take.
_HELD_SHARE = 0.25


class _StopReached(Exception):  # noqa: N818 - control flow inside this file, not an error
    pass


class _Gate(nn.Module):
    """Stands in for a linear: hands its input over before, and its output after, ``module`` runs."""

    def __init__(self, module: nn.Module, before: Callable[[Tensor], None], after: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.module = module
        self._before = before
        self._after = after

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - blocks of some families ask a linear for its weight's type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., in_features] to [..., out_features]."""
        self._before(inputs)
        # torch multiplies by a weight that is not there without a word.
        assert not any(parameter.is_meta for parameter in self.module.parameters()), "an expert computes without its weights"
        outputs = self.module(inputs)
        self._after(outputs)
        return outputs


class BlockWalk(AbstractContextManager["BlockWalk"]):
    """Walks all batches of a block from linear to linear.

    Args:
        block: the block; between enter and exit its linears ``names`` are behind gates.
        index: its number.
        activations: its inputs, which stay as they are.
        names: the linears to stop at, in the order of computation, and mixtures of experts, which hand over the experts
            [n, k] that are chosen for each token.
        behind: stop behind each linear, at its output, rather than before it, at its input.
        on_output: hears the number of a batch and the output of the linear that it has stopped at last, once it has run.
        hold: whether forwards wait at their stops; by default, where the memory allows it.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        activations: Activations,
        names: Sequence[str],
        *,
        behind: bool = False,
        on_output: Callable[[int, Tensor], None] = lambda place, output: None,
        hold: bool | None = None,
    ) -> None:
        self._block, self._index, self._activations, self._names = block, index, activations, tuple(names)
        self._behind, self._on_output = behind, on_output
        # Run again from the start, a mixture would compute its experts once for each of them.
        has_experts = any(isinstance(module, Experts) for module in block.modules())
        self._hold = has_experts or fits_held(block, activations, names) if hold is None else hold
        self._gates: dict[str, _Gate] = {}
        self._exits = ExitStack()
        self._held: list[PacedForward] = []
        self._position = 0  # of the next stop
        self._target: int | None = None  # of the forward that runs now; None lets it run to its end
        self._place = 0  # of its batch

    def __enter__(self) -> Self:
        self._exits.enter_context(in_step(self._block))
        for number, name in enumerate(self._names):
            module = self._block.get_submodule(name)
            if isinstance(module, Experts):
                hook = module.register_forward_pre_hook(partial(self._at_experts, number))
                self._exits.callback(hook.remove)
                continue
            gate = _Gate(module, partial(self._at_input, number), partial(self._at_output, number))
            self._gates[name] = gate
            self._block.set_submodule(name, gate)
        if self._hold:
            self._held = [PacedForward(partial(self._run, place)) for place in range(len(self._activations.batches))]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held = []  # what still waits unwinds here, while the gates are in place
        for module in self._block.modules():
            if isinstance(module, Experts):
                module.everywhere = frozenset()
        for name, gate in self._gates.items():
            self._block.set_submodule(name, gate.module)
        self._exits.close()
        # Circles would keep a block, and all its weights, until the collector of garbage comes by.
        self._gates, self._on_output = {}, lambda place, output: None

    @torch.no_grad()
    def next_stop(self) -> Iterator[Tensor]:
        """What the next linear is given (or gives), [b, length, features], batch by batch; to be consumed to the end."""
        yield from self._until(self._position)
        self._position += 1

    @torch.no_grad()
    def outputs(self) -> Iterator[Tensor]:
        """The block's output [b, length, hidden], batch by batch."""
        yield from self._until(None)

    def route(self, name: str, ranks: Ranks, floor: int | None = None) -> Routing:
        """Stop at a mixture, the next of the names, and let experts that are given too few tokens compute all of them."""
        experts = self._block.get_submodule(name)
        assert isinstance(experts, Experts)
        with torch.no_grad():
            routing = count_routed(experts, self.next_stop(), ranks, floor)
        experts.everywhere = routing.starved
        return routing

    def in_turn(
        self, groups: Sequence[tuple[str, ...]], architecture: ModelArchitecture, ranks: Ranks, floor: int | None = None
    ) -> Iterator[tuple[str, ...]]:
        """Each of a block's ``groups`` when its stop is the next, on the way past a mixture with :meth:`route`.

        The names of the walk are those that :func:`algorithms.modeling.mixtures.routing.stops` gives.
        """
        is_routed = False
        for group in groups:
            if architecture.experts is not None and architecture.is_expert(group[0]) and not is_routed:
                self.route(architecture.experts, ranks, floor)
                is_routed = True
            yield group

    def linear(self, name: str) -> nn.Module:
        """The module that computes a linear now, with its weights; of a mixture, only of the expert where the forwards are."""
        take(self._block, name)
        return self.peek(name)

    def peek(self, name: str) -> nn.Module:
        """The module that computes a linear now, perhaps without its weights."""
        return self._gates[name].module if name in self._gates else self._block.get_submodule(name)

    def replace(self, name: str, module: nn.Module) -> None:
        """Let another module compute a linear from here on."""
        if name in self._gates:
            self._gates[name].module = module
        else:
            self._block.set_submodule(name, module)

    def _until(self, target: int | None) -> Iterator[Tensor]:
        if self._hold:
            yield from paced(self._held, partial(self._aim, target))
            return
        for place in range(len(self._activations.batches)):
            self._aim(target, place)
            try:
                yield self._run(place)
            except _StopReached as stop:
                yield stop.args[0]

    def _aim(self, target: int | None, place: int) -> None:
        self._target, self._place = target, place

    def _run(self, place: int) -> Tensor:
        activations = self._activations
        return activations.arguments.run(self._block, self._index, activations.compute(activations.batches[place]))

    def _at_input(self, number: int, inputs: Tensor) -> None:
        if not self._behind and number == self._target:
            self._stop(inputs)

    def _at_experts(self, number: int, experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if number == self._target:
            self._stop(inputs[1])

    def _at_output(self, number: int, outputs: Tensor) -> None:
        if self._behind and number == self._target:
            self._stop(outputs)
        elif number == self._position - 1:  # a forward that is run again also passes the linears before
            self._on_output(self._place, outputs)

    def _stop(self, tensor: Tensor) -> None:
        if not self._hold:
            raise _StopReached(tensor)
        getcurrent().parent.switch(tensor)


def fits_held(block: nn.Module, activations: Activations, names: Sequence[str]) -> bool:
    """Whether held forwards fit the memory: the residual stream twice and the widest of the linears' inputs, in float32."""
    hidden = activations.batches[0].shape[-1] if activations.batches else 0
    linears = [module for module in map(block.get_submodule, names) if not isinstance(module, Experts)]
    widest = max((linear.weight.shape[1] for linear in linears), default=0)
    tokens = sum(batch.shape[0] * batch.shape[1] for batch in activations.batches)
    return tokens * (2 * hidden + widest) * 4 <= _HELD_SHARE * free_bytes(activations.device)


def free_bytes(device: torch.device) -> int:
    """Memory of a device, or of this machine, that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
