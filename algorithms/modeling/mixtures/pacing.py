"""Forwards over many batches that go through the experts of a block together: all halt before each expert.

An expert's weights are then needed for all batches at once, and not again: a block larger than the memory can be read expert by
expert, once for all batches instead of once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from greenlet import getcurrent, greenlet
from torch import Tensor

_PAUSED = object()


class PacedForward(greenlet):
    """A forward on its way, which hands over at every :func:`pause` and wherever its own code does."""


def pause() -> None:
    """Let the other forwards come as far as this one; nothing where it runs alone."""
    here = getcurrent()
    if isinstance(here, PacedForward):
        assert here.parent is not None
        here.parent.switch(_PAUSED)


def paced(forwards: Sequence[PacedForward], on_switch: Callable[[int], None] = lambda place: None) -> Iterator[Tensor]:
    """What each of ``forwards`` hands over next, or returns, in order, once all have passed the same pauses.

    ``on_switch`` hears the number of each before it goes on.
    """
    waiting = list(enumerate(forwards))
    while waiting:
        paused = []
        for place, forward in waiting:
            on_switch(place)
            handed = forward.switch()
            if handed is _PAUSED:
                paused.append((place, forward))
            else:
                yield handed
        assert len(paused) in (0, len(waiting)), "forwards of one block do not halt at different places"
        waiting = paused


def run_paced(runs: Sequence[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """The results of ``runs``, in order, computed together."""
    return paced([PacedForward(run) for run in runs])
