"""A process that has imported everything and forks a child for each run of main.py: a run costs no imports.

``WarmProcess`` starts it and talks to it; ``python -m tests.faults.warm_process SOCKET`` is it. The client of a certificate is
forked from it too, so that it starts as fresh as a process of its own does, and outlives a job that is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
CLIENT = "algorithms.formats.client"
NEEDED = ("aqlm", "datasets", "jobs.runner", "jobs.reporting.html.report", "algorithms.quantization.aqlm.tuning", "main")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a child does: ``argv`` of main.py, or of ``module``.

    ``limits`` are names of resource limits with their bytes, and ``spare`` the bytes of address space beyond what the child has
    when it starts. ``watch`` is the folder whose file operations are counted; at number ``stop_at`` the child gets
    ``stop_with``, ``delay`` seconds later, and once more ``again`` seconds after that. Where ``fail_with`` is a number of
    ``errno``, that operation fails with it instead. ``trace`` names a file for the times of all operations.
    """

    argv: Sequence[str]
    module: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    spare: int = 0
    watch: str = ""
    stop_at: int = 0
    stop_with: int = signal.SIGKILL
    delay: float = 0.0
    again: float = 0.0
    fail_with: int = 0
    trace: str = ""
    seconds: float = 120.0
    output: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a child ended: its exit code, negative for a signal, and all that it said."""

    code: int
    said: str
    seconds: float


class WarmProcess:
    """A context manager; :meth:`run` may be called by one caller at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._socket = Path(self._folder.name) / "socket"

    def __enter__(self) -> Self:
        self._log = (Path(self._folder.name) / "log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm_process", str(self._socket)],
            cwd=ROOT, env={**os.environ, **ONE_THREAD}, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                raise RuntimeError(self._log.read().decode(errors="replace"))
            time.sleep(0.02)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def run(self, *argv: str, **options: object) -> Outcome:
        """Run main.py with ``argv`` in a child; ``options`` are those of :class:`Order`."""
        with tempfile.NamedTemporaryFile(dir=self._folder.name) as output:
            begin = time.monotonic()
            code = send(self._socket, Order(argv=argv, output=output.name, **options))
            return Outcome(code=code, said=Path(output.name).read_text(errors="replace"), seconds=time.monotonic() - begin)


def send(place: Path, order: Order) -> int:
    """Have an order done; the exit code of the child that did it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(place))
        connection.sendall(json.dumps(asdict(order)).encode() + b"\n")
        return int(connection.makefile().readline())


def serve(place: Path) -> None:
    """Import what a job needs, then fork a child for each order, until killed."""
    for name in NEEDED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.with_suffix(".new")))
        listener.listen()
        place.with_suffix(".new").rename(place)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that attend
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _attend(connection, place)


def _attend(connection: socket.socket, place: Path) -> None:
    """Read one order, fork the child that does it, and answer with its exit code."""
    with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        order = Order(**json.loads(connection.makefile().readline()))
        child = os.fork()
        if child == 0:
            connection.close()
            os._exit(_obey(order, place))
        connection.sendall(f"{_exit_code(child, order.seconds)}\n".encode())
    os._exit(0)


def _exit_code(child: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 124
        time.sleep(0.005)


def _obey(order: Order, place: Path) -> int:
    """What the child does, to its exit code."""
    output = os.open(order.output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(order.environment)
    try:
        if order.module == CLIENT:
            from algorithms.formats.client import main as run_client

            code = run_client(list(order.argv))
        else:
            code = _run_main(order, place)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what Python does with an error that nobody caught
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def _run_main(order: Order, place: Path) -> int:
    import main
    from jobs.execution.interruption import ignore_stops
    from jobs.reporting import certificate
    from tests.faults.moments import stop_at

    certificate.subprocess = _Errands(place)
    for name, limit in order.limits.items():
        resource.setrlimit(getattr(resource, name), (limit, resource.RLIM_INFINITY))
    if order.spare:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + order.spare, resource.RLIM_INFINITY))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background processes ignore it
    if order.watch:
        stop_at(order)
    code = main.main(list(order.argv))
    ignore_stops()  # as main.py does when it is the program
    return code


class _Errands:
    """Stands for the module ``subprocess`` where a certificate starts its clients: each is forked from the warm process."""

    STDOUT = subprocess.STDOUT

    def __init__(self, place: Path) -> None:
        self._place = place

    def run(self, command: Sequence[str], **options: object) -> subprocess.CompletedProcess:
        """Have the client do its work; ``-m CLIENT`` stands before its own words."""
        words = list(command)
        at = words.index(CLIENT)
        environment = {name: text for name, text in options["env"].items() if os.environ.get(name) != text}
        order = Order(argv=words[at + 1 :], module=CLIENT, output=options["stdout"].name, environment=environment)
        return subprocess.CompletedProcess(words, send(self._place, order))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
