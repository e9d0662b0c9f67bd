"""Where a job talks: log.log, the console and progress displays. The only module that writes to the terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from algorithms.base import Process

FORMAT = "%(asctime)s - %(levelname)s - %(name)s - %(message)s"
DATE_FORMAT = "%m/%d/%Y %H-%M-%S"
_FILE_ONLY = {"file_only": True}
_PROGRESS = logging.getLogger("jobs.progress")
_QUIET = (
    "httpx",
    "httpcore",
    "urllib3",
    "filelock",
    "fsspec",
    "datasets",
    "transformers",
    "huggingface_hub",
    "numba",
    "matplotlib",
    "wandb",
)


class Terminal:
    """The user's terminal: log lines and progress on the error stream, results on the output stream.

    On a terminal, progress is a bar with the time left and tables are drawn; otherwise every step is one plain line. With
    ``quiet``, the error stream has warnings and errors alone.
    """

    def __init__(self, *, messages: Console | None = None, results: Console | None = None, quiet: bool = False) -> None:
        self.quiet = quiet
        self.messages = messages or Console(stderr=True, soft_wrap=True)
        self.results = results or Console(file=sys.stdout, soft_wrap=True)

    @property
    def interactive(self) -> bool:
        """Whether a person watches."""
        return self.messages.is_terminal

    def show(self, result: RenderableType, plain: str) -> None:
        """Write a result: drawn on a terminal, as ``plain`` text otherwise."""
        if self.results.is_terminal:
            self.results.print(result)
        else:
            self.results.out(plain, highlight=False)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[str], None]]:
        """A progress display of ``total`` steps; the value it yields is called once a step with a short note."""
        steps = _Steps(description, total)
        if self.quiet or not self.interactive:
            yield steps
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=self.messages, transient=True) as bar:
            task = bar.add_task(description, total=total, note="")

            def step(note: str) -> None:
                """Move the bar, and note the step in the log file."""
                steps(note)
                bar.update(task, advance=1, note=note)

            yield step


class _Steps:
    """One line a step, with the time left as the mean of the steps so far foretells it."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done, self.started = description, total, 0, time.monotonic()

    def __call__(self, note: str) -> None:
        self.done += 1
        elapsed = time.monotonic() - self.started
        left = elapsed / self.done * max(self.total - self.done, 0)
        message = f"{self.description} {self.done}/{self.total}" + (f": {note}" if note else "")
        _PROGRESS.info("%s (%s so far, about %s left)", message, duration(elapsed), duration(left))


@contextmanager
def logging_to(directory: Path, process: Process, terminal: Terminal) -> Iterator[Path]:
    """Send every record to ``<directory>/log.log`` and, from rank 0, to the console; undone on leaving.

    Other ranks write ``rank_<n>.log`` and stay off the console. Yields the path of the file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("log.log" if process.is_main else f"rank_{process.rank}.log")
    file_handler = logging.FileHandler(path, encoding="utf-8")
    file_handler.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
    handlers: list[logging.Handler] = [file_handler]
    if process.is_main:
        handlers.append(_console_handler(terminal))
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in _QUIET}
    level = root.level
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    try:
        yield path
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def log_failure(error: BaseException) -> None:
    """Put an error with its traceback into the log file; the console hears of it from whoever ends the command."""
    logging.getLogger(__name__).error("%s", error, exc_info=error, extra=_FILE_ONLY)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _console_handler(terminal: Terminal) -> logging.Handler:
    if terminal.interactive:
        handler: logging.Handler = RichHandler(console=terminal.messages, show_path=False, show_time=False, markup=False)
        handler.addFilter(lambda record: record.name != _PROGRESS.name)  # the bar shows the same
    else:
        handler = logging.StreamHandler(terminal.messages.file)
        handler.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
    handler.addFilter(_for_the_console)
    handler.setLevel(logging.WARNING if terminal.quiet else logging.NOTSET)
    return handler


def _for_the_console(record: logging.LogRecord) -> bool:
    return not _FILE_ONLY.items() <= vars(record).items()
