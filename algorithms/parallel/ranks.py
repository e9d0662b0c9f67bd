"""The processes that work on one stage together, and the few things they say to each other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Newer releases of torch warn of the older name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_FIRST_NAP, _LONGEST_NAP = 0.0005, 0.05  # seconds between two looks at who has arrived
_NAP_SHARE = 1 / 16  # of the time waited so far: nobody oversleeps by more
_FEW = 1 << 16  # elements of several tensors that travel in one message: its latency costs more than its length


class Ranks:
    """Ranks 0 .. size-1 of one process group, in step: each calls the same methods in the same order.

    A process alone needs no group; every method is then trivial.

    Args:
        group: the process group; None for a process alone.
        store: the group's key-value store, where ranks say that they have arrived; needed with a group.
        device: where tensors are computed.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        store: dist.Store | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.group, self._store, self.device = group, store, torch.device(device)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._meetings = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def key(self) -> tuple[int, ...]:
        """What keys randomness in which ranks should differ: nothing for rank 0, which draws what a process alone does."""
        return (self.rank,) if self.rank else ()

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks; every rank sees the same bits. Whole numbers stay below 2^53."""
        if self.group is None:
            return
        if len(tensors) == 1 or sum(tensor.numel() for tensor in tensors) > _FEW:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)
            return
        together = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        dist.all_reduce(together, group=self.group)
        for tensor, total in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def scatter_sum(self, matrix: Tensor, rows: int) -> Tensor:
        """This rank's rows of the sum of all ranks' matrices [n, m]: those from rank * rows on, at most ``rows``."""
        if self.group is None:
            return matrix
        padded = torch.nn.functional.pad(matrix, (0, 0, 0, rows * self.size - matrix.shape[0]))
        summed = matrix.new_empty(rows, matrix.shape[1])
        _reduce_scatter(summed, padded, group=self.group)
        return summed[: max(0, min(rows, matrix.shape[0] - self.rank * rows))]

    def sum_numbers(self, *numbers: float) -> list[float]:
        """The sum of each number over all ranks, in float64."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self._meeting_device)
        self.sum_(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks. Tensors inside have to be on the CPU."""
        if self.group is None:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def exchange(self, value: T) -> list[T]:
        """Every rank's value after work of unequal length, in the order of ranks, with its tensors on this rank's device."""
        if self.group is None:
            return [value]
        self.meet()
        return [moved(other, self.device) for other in self.gather(moved(value, torch.device("cpu")))]

    def from_main(self, value: T) -> T:
        """Rank 0's value. Tensors inside have to be on the CPU."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def mine(self, items: Sequence[T]) -> list[T]:
        """This rank's share of the items: every size-th, so that shares differ by one item at most."""
        return list(items[self.rank :: self.size])

    def meet(self) -> None:
        """Wait until every rank has come here, however long the slowest works.

        No collective is open meanwhile, so that none can run into its time-out: call this before one that follows work of
        unequal length.
        """
        self._meetings += 1
        if self.group is None:
            return
        assert self._store is not None, "a group comes with its store"
        key, came = f"meeting/{self._meetings}", time.monotonic()
        arrived = self._store.add(key, 1)
        while arrived < self.size:
            time.sleep(min(max(_FIRST_NAP, _NAP_SHARE * (time.monotonic() - came)), _LONGEST_NAP))
            arrived = self._store.add(key, 0)

    @property
    def _meeting_device(self) -> torch.device:
        """The CPU wherever the group can talk about CPU tensors."""
        return torch.device("cpu") if self.group is None or "gloo" in dist.get_backend_config(self.group) else self.device


ALONE = Ranks()


def moved(value: T, device: torch.device) -> T:
    """The value with every tensor in it on ``device``; looks into mappings, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value


def share_out(sizes: Mapping[str, int], count: int) -> Mapping[str, int]:
    """An owner below ``count`` for every item: the largest first, each to whoever has the least; ties go by name and number."""
    loads = [0] * count
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = min(range(count), key=loads.__getitem__)
        loads[owners[name]] += sizes[name]
    return owners
