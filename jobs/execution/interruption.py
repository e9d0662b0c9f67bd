"""SIGTERM and Ctrl-C as one exception that ends a job tidily."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class JobInterrupted(KeyboardInterrupt):
    """The job was asked to stop. The message says how to resume it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM into :class:`JobInterrupted` while the block runs; a second one does not disturb the tidying up.

    Outside the main thread signals are left alone: Python hands them to no other.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        """Raise once; what tidies up afterwards is not disturbed."""
        signal.signal(number, signal.SIG_IGN)
        raise JobInterrupted(f"stopped by {signal.Signals(number).name}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
