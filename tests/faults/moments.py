"""The moments of a job at which it can be stopped: each time it opens, renames, links or deletes something in its folders."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.warm_process import Order

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "shutil.rmtree"}


def stop_at(order: Order) -> None:
    """Count this process's operations below ``order.watch``, and signal it as the order says. Undone by its end alone."""
    me, begin, count = os.getpid(), time.monotonic(), 0
    trace = os.open(order.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if order.trace else None

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in EVENTS or os.getpid() != me or not _touches(arguments, order.watch):
            return
        count += 1
        if trace is not None:
            what = [event, *(str(word) for word in arguments[:2] if isinstance(word, str | os.PathLike))]
            os.write(trace, (json.dumps([count, time.monotonic() - begin, *what]) + "\n").encode())
        if order.fail_with and count == order.stop_at:
            raise OSError(order.fail_with, os.strerror(order.fail_with), next(map(str, arguments), None))
        if order.fail_with or count != order.stop_at:
            return
        waits = [order.delay] if order.delay else []
        waits += [order.again] if order.again else []
        if waits:
            _signal_later(me, order.stop_with, waits)
        if not order.delay:
            os.kill(me, order.stop_with)

    sys.addaudithook(hook)


def _signal_later(process: int, number: int, waits: list[float]) -> None:
    """Signal a process, waiting so many seconds before each time; not while it is still busy with this fork."""
    ready, go = os.pipe()
    if os.fork() == 0:
        os.read(ready, 1)
        for seconds in waits:
            time.sleep(seconds)
            if os.getppid() == process:
                os.kill(process, number)
        os._exit(0)
    os.write(go, b"x")
    os.close(go)
    os.close(ready)


def _touches(arguments: tuple, folder: str) -> bool:
    return any(isinstance(word, str | os.PathLike) and os.fspath(word).startswith(folder) for word in arguments[:2])


def read_trace(path: Path) -> list[tuple[int, float, str]]:
    """Number, time and description of each operation of a run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(number, seconds, " ".join(words)) for number, seconds, *words in lines]
