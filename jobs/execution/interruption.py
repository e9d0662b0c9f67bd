"""Signals that ask a job to stop, as one exception that ends it tidily."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jobs.processes.environment import is_one_of_many

# A launcher passes on whatever it is asked to stop with; without one, Ctrl-C is Python's own KeyboardInterrupt.
_ALONE = (signal.SIGTERM,)
_LAUNCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class JobInterrupted(KeyboardInterrupt):
    """The job was asked to stop. The message says how to resume it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM into :class:`JobInterrupted` while the block runs; a second one does not disturb the tidying up.

    In a process that a launcher started, the other signals that ask for an end do the same. Outside the main thread signals
    are left alone: Python hands them to no other.
    """
    if not _in_main_thread():
        yield
        return
    signals = _LAUNCHED if is_one_of_many() else _ALONE

    def stop(number: int, frame: FrameType | None) -> None:
        """Raise once; what tidies up afterwards is not disturbed."""
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise JobInterrupted(f"stopped by {signal.Signals(number).name}")

    before = {each: signal.signal(each, stop) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def ignore_stops() -> Callable[[], None]:
    """Let nothing disturb the tidying up of a job that is ending anyway.

    Returns:
        What undoes it.
    """
    if not _in_main_thread():
        return lambda: None
    before = {each: signal.signal(each, signal.SIG_IGN) for each in _LAUNCHED}

    def undo() -> None:
        """Put the earlier handlers back."""
        for each, handler in before.items():
            signal.signal(each, handler)

    return undo


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
