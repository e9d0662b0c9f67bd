"""Output that may lose its reader while something is left to say: a closed pipe, a terminal that is gone, a full disk."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TextIO


def write_all(stream: TextIO | None, text: str) -> OSError | None:
    """Write a text at once; what prevented it, if anything did: then the stream is not tried again, not even at the end.

    Args:
        stream: None where the process was started without it.
        text: what to write.
    """
    if stream is None:
        return None
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _leave(stream)
        return error
    except ValueError:  # closed by whoever reads it in this process
        return None
    return None


class Steady:
    """A stream that a job talks to: what cannot be written is left out, and the job goes on. All else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        try:
            self._stream.write(text)
        except OSError:
            _leave(self._stream)
        except ValueError:  # closed
            pass
        return len(text)

    def flush(self) -> None:
        """Hand on what was written; a stream that takes no more is led to nowhere."""
        try:
            self._stream.flush()
        except OSError:
            _leave(self._stream)
        except ValueError:
            return

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _leave(stream: TextIO) -> None:
    """Lead the stream's descriptor to nowhere: Python writes what is left in its buffer when it ends, and would fail again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
