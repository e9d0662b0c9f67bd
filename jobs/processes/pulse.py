"""Signs of life between nodes.

A launcher sees the ranks of its own node end, and stops the others there; of the ranks on other nodes it learns nothing, and a
rank that waits for one of them to meet would wait for ever. So followers beat, and the leader listens while it waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from configs.errors import RankLostError
from jobs.processes.connection import is_lost_connection

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 40.0  # until a rank counts as lost; its beats come from a thread that no computation holds up for long


class Pulse:
    """Listens to the beats of ranks.

    Args:
        store: where they beat.
        ranks: those that do.
        clock: time in seconds.
    """

    def __init__(self, store: dist.Store, ranks: Sequence[int], clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._heard = dict.fromkeys(ranks, (0, clock()))
        self._looked = clock()

    def check(self) -> None:
        """Listen, at most once a beat.

        Raises:
            RankLostError: a rank has been silent for too long while this one listened.
        """
        now = self._clock()
        gap, self._looked = now - self._looked, now if now - self._looked >= BEAT_SECONDS else self._looked
        if gap < BEAT_SECONDS:
            return
        for rank, (count, heard) in self._heard.items():
            beats = self._store.add(_key(rank), 0)
            # After work of its own the leader has heard nothing for long; that says nothing about the others.
            if beats != count or gap > SILENCE_SECONDS / 2:
                self._heard[rank] = (beats, now)
            elif now - heard > SILENCE_SECONDS:
                raise RankLostError(
                    f"Rank {rank} has given no sign of life for {now - heard:.0f} seconds. What is finished is kept; "
                    "the same command resumes."
                )


@contextmanager
def beating(store: dist.Store, rank: int) -> Iterator[None]:
    """Give signs of life while the block runs, over a connection of their own: others may be held up by a wait."""
    own, done = store.clone(), threading.Event()

    def beat() -> None:
        """Until the block ends or nobody can hear."""
        try:
            while not done.wait(BEAT_SECONDS):
                own.add(_key(rank), 1)
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(BEAT_SECONDS)


def spans_nodes(environment: Mapping[str, str]) -> bool:
    """Whether the ranks of this job are on several nodes."""
    size = environment.get("WORLD_SIZE", "1")
    return environment.get("LOCAL_WORLD_SIZE", size) != size


def _key(rank: int) -> str:
    return f"pulse/{rank}"
