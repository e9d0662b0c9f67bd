"""Other programs: whether they are there, and running one with its words in a log file."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from algorithms.base import StageError
from configs.errors import MissingEnvironmentError

logger = logging.getLogger(__name__)

_LAST_LINES = 12
_PATIENCE_SECONDS = 10.0


def require(programs: Sequence[str], files: Sequence[Path], remedy: str) -> None:
    """Check that programs are on the PATH and files are there.

    Raises:
        MissingEnvironmentError: names all that are missing, and says ``remedy``.
    """
    absent = [f"{name} is not on the PATH" for name in programs if shutil.which(name) is None]
    absent += [f"{file} is not there" for file in files if not file.is_file()]
    if absent:
        raise MissingEnvironmentError(f"{'; '.join(absent)}. {remedy}")


def run_program(command: Sequence[str], log: Path, *, working_dir: Path) -> None:
    """Run a program to its end; what it writes goes into ``log`` as it comes.

    Raises:
        StageError: it ended with another code than 0; has its last lines and where the log is.
    """
    logger.info("Running %s", shlex.join(command))
    with log.open("w", encoding="utf-8") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            list(command),
            cwd=working_dir,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its workers end with it where this program is stopped
        )
        try:
            code = process.wait()
        finally:
            _stop(process)
    if code != 0:
        raise StageError(_failure(command, code, log))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a program that is still running, and all that it has started."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _failure(command: Sequence[str], code: int, log: Path) -> str:
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if line.strip()]
    last = "\n".join(f"  {line}" for line in said[-_LAST_LINES:]) or "  nothing"
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{shlex.join(command)}\n{how}. All that it wrote is in {log}; the last lines:\n{last}"
