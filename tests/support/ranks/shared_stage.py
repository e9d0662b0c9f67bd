"""What every rank does in the fake algorithm's shared stage, and how one of them can be made to fail in it."""

from __future__ import annotations

import os
import signal
import time

import torch

from algorithms.base import StageContext
from configs.errors import DataError

STEPS = 3


def share(context: StageContext, trouble: str, note) -> float:
    """The sum over ranks of rank + 1 and of the tokens that each was given, once a step.

    ``trouble`` is ``rank:what``, where what is ``die`` (SIGKILL), ``data``, ``bug``, ``memory``, ``wait`` (to be killed by the
    test, alone or all of them with ``*:wait``) or ``alone`` (the error comes while the others wait to meet).
    """
    ranks, total = context.ranks, torch.zeros(1)
    who, _, what = trouble.partition(":")
    for step in range(STEPS):
        ranks.meet()
        if step == 1 and who in (str(ranks.rank), "*"):
            meet_trouble(what, f"{ranks.rank} {os.getpid()}", note)
        part = torch.tensor([float(ranks.rank + 1 + sum(int(tokens.sum()) for tokens in context.tokens))])
        if what != "alone":
            ranks.sum_(part)
        total += part
    return float(total)


def meet_trouble(what: str, name: str, note) -> None:
    """Go wrong in the way that was asked for."""
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what in ("data", "alone"):
        raise DataError(f"DATA_PATH: rank {name.split()[0]} cannot read it")
    if what == "bug":
        raise ZeroDivisionError(f"a bug on rank {name.split()[0]}")
    if what == "memory":
        raise MemoryError
    if what == "wait":
        note(f"waiting {name}")
        time.sleep(60)
