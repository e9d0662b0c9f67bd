"""Tells a connection that another process has closed from the errors of this one."""

from __future__ import annotations

import torch.distributed as dist

# gloo raises a plain RuntimeError for all of these.
_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection was closed",
    "broken pipe",
    "socket closed",
    "socket timeout",
    "gloo/transport",
    "connectfullmesh failed",
    "application timeout",
    "timed out waiting",
)


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error means that another rank, or the store that the ranks share, is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
