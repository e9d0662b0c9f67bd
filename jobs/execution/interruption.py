"""Signals that ask a job to stop, as one exception that ends it tidily."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from jobs.processes.environment import is_one_of_many

_ALONE = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on whatever it is asked to stop with.
_LAUNCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class JobInterrupted(KeyboardInterrupt):
    """The job was asked to stop. The message says how to resume it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into :class:`JobInterrupted` while the block runs; a second one does not disturb the tidying up.

    Where such a block stands in another, the tidying up ends with the outer one. In a process that a launcher started, the
    other signals that ask for an end do the same. A signal that the process was started to ignore stays ignored. Outside the
    main thread signals are left alone: Python hands them to no other.
    """
    if not _in_main_thread():
        yield
        return
    wanted = _LAUNCHED if is_one_of_many() else [each for each in _ALONE if signal.getsignal(each) is not signal.SIG_IGN]
    stop = _Stop(wanted)
    before = {each: signal.signal(each, stop) for each in wanted}
    try:
        yield
    finally:
        for each, handler in before.items():
            if stop.was_asked and isinstance(handler, _Stop):
                handler.was_asked = True  # the block around this one is what tidies up now
            else:
                signal.signal(each, handler)


class _Stop:
    """A handler that raises once; what tidies up afterwards is not disturbed."""

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self._signals, self.was_asked = signals, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        for each in self._signals:
            signal.signal(each, signal.SIG_IGN)
        raise JobInterrupted(f"stopped by {signal.Signals(number).name}")


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
