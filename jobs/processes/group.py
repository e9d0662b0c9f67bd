"""A process group for the time of one stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from algorithms.base import Process
from algorithms.parallel.ranks import Ranks

# A rank that works while others wait in a collective is a mistake of the stage; this only bounds how long it can last.
LONGEST_COLLECTIVE = timedelta(minutes=30)


class WatchedStore(dist.Store):
    """A store whose counters are watched: whoever waits for one to rise also hears that it never will.

    Args:
        store: the store.
        watch: raises where the wait is in vain.
    """

    def __init__(self, store: dist.Store, watch: Callable[[], None]) -> None:
        super().__init__()
        self._store, self._watch = store, watch

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, and return its new value."""
        count = self._store.add(key, amount)
        self._watch()
        return count


@contextmanager
def opened_group(store: dist.Store, process: Process, device: torch.device, watch: Callable[[], None]) -> Iterator[Ranks]:
    """All ranks as one group; each has to open it. After the block they meet, so that none closes it on another's work.

    Args:
        store: for this group alone.
        process: which of the ranks this is.
        device: where this rank computes.
        watch: raises when another rank will not come to a meeting any more.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend(device, os.environ),
        store=store,
        rank=process.rank,
        world_size=process.world_size,
        timeout=LONGEST_COLLECTIVE,
    )
    try:
        ranks = Ranks(dist.group.WORLD, WatchedStore(store, watch), device)
        yield ranks
        ranks.meet()
    finally:
        dist.destroy_process_group()


def backend(device: torch.device, environment: Mapping[str, str]) -> str:
    """Nccl for CUDA tensors, gloo for all others; gloo alone where ranks share a device, which nccl refuses."""
    local_ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda" or local_ranks > torch.cuda.device_count():
        return "gloo"
    return "cpu:gloo,cuda:nccl"
