"""Where a job talks: log.log, the console and progress displays. The only module that writes to the terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import StringIO
from pathlib import Path
from statistics import median
from typing import IO, TextIO, cast

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from algorithms.base import Process
from configs.errors import visible
from jobs.reporting.library_bars import library_bars_off
from jobs.reporting.secrets import without_secrets
from jobs.reporting.streams import Steady

FORMAT = "%(asctime)s - %(levelname)s - %(name)s - %(message)s"
DATE_FORMAT = "%m/%d/%Y %H-%M-%S"
EVERY_STEP = 200  # steps; a display with more of them is no display of blocks
_LONGEST_SILENCE = 60.0  # seconds
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

    On a terminal, progress is a bar with the time left and tables are drawn; otherwise it is plain lines. With ``quiet``, the
    error stream has warnings and errors alone.
    """

    def __init__(self, *, messages: Console | None = None, results: Console | None = None, quiet: bool = False) -> None:
        self.quiet = quiet
        self.messages = messages or Console(file=_steady(sys.stderr), soft_wrap=True)
        self.results = results or Console(file=_steady(sys.stdout), soft_wrap=True)

    @property
    def interactive(self) -> bool:
        """Whether a person watches."""
        return self.messages.is_terminal

    def show(self, result: RenderableType, plain: str) -> None:
        """Write a result: drawn on a terminal, as ``plain`` text otherwise."""
        if self.results.is_terminal:
            self.results.print(result)
        else:
            self.results.out(visible(without_secrets(plain, os.environ)), highlight=False)

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
            _TimeLeft(steps),
            TextColumn("{task.fields[note]}"),
        )
        with library_bars_off(), RichProgress(*columns, console=self.messages, transient=True) as bar:
            task = bar.add_task(description, total=total, note="")

            def step(note: str) -> None:
                """Move the bar, and note the step in the log file."""
                steps(note)
                bar.update(task, advance=1, note=note)

            yield step


def _steady(stream: TextIO | None) -> IO[str]:
    """The stream, or where the process was started without it, nowhere."""
    return cast("IO[str]", Steady(stream) if stream is not None else StringIO())


class _Steps:
    """Lines with the time left, as the steps so far foretell it.

    Up to ``EVERY_STEP`` steps each have a line: they may be blocks. More have a line for each hundredth of them, and one after
    a minute of silence.
    """

    def __init__(self, description: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.description, self.total, self.done, self._clock = description, total, 0, clock
        self._started = self._last_step = self._last_line = clock()
        self._newest: deque[float] = deque(maxlen=3)  # seconds of a step

    def __call__(self, note: str) -> None:
        now, self.done = self._clock(), self.done + 1
        self._newest.append(now - self._last_step)
        self._last_step = now
        if self._is_said(now):
            self._last_line = now
            message = f"{self.description} {self.done}/{self.total}" + (f": {note}" if note else "")
            _PROGRESS.info("%s (%s so far, about %s left)", message, duration(now - self._started), duration(self.left()))

    def left(self) -> float:
        """Seconds until the last step is done, counted down since the newest one.

        A step takes the mean of all so far, which knows of evaluations between them; or what the newest take, where that is
        more: those that a resumed stage finds done take no time.
        """
        if not self.done:
            return 0.0
        each = max((self._last_step - self._started) / self.done, median(self._newest))
        return max(each * (self.total - self.done) - (self._clock() - self._last_step), 0.0)

    def _is_said(self, now: float) -> bool:
        if self.total <= EVERY_STEP or self.done in (1, self.total):
            return True
        reached = self.done * 100 // self.total > (self.done - 1) * 100 // self.total
        return reached or now - self._last_line >= _LONGEST_SILENCE


class _TimeLeft(ProgressColumn):
    """The time left by the account of the steps: rich's own forgets a step that took more than half a minute."""

    def __init__(self, steps: _Steps) -> None:
        super().__init__()
        self._steps = steps

    def render(self, task: Task) -> Text:
        """What the column shows."""
        left = f"about {duration(self._steps.left())} left" if self._steps.done else ""
        return Text(left, style="progress.remaining")


@contextmanager
def logging_to(directory: Path, process: Process, terminal: Terminal) -> Iterator[Path]:
    """Send every record to ``<directory>/log.log`` and, from rank 0, to the console; undone on leaving.

    Other ranks write ``rank_<n>.log`` and stay off the console. Libraries draw their bars only where a person watches. Yields
    the path of the file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("log.log" if process.is_main else f"rank_{process.rank}.log")
    file_handler = _LogFile(path, encoding="utf-8")
    file_handler.setFormatter(_Visible(FORMAT, DATE_FORMAT))
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
    is_watched = process.is_main and terminal.interactive and not terminal.quiet
    try:
        with nullcontext() if is_watched else library_bars_off():
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


class _LogFile(logging.FileHandler):
    """The log file. Where its disk is full, the console has its lines, and the job's own error says what is wrong."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Leave a line out that cannot be written."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Visible(logging.Formatter):
    """Text of recipes and models reaches the log: none of it may steer the terminal that shows it, or be a secret."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, traceback included."""
        return visible(without_secrets(super().format(record), os.environ))


def _console_handler(terminal: Terminal) -> logging.Handler:
    if terminal.interactive:
        handler: logging.Handler = RichHandler(console=terminal.messages, show_path=False, show_time=False, markup=False)
        handler.setFormatter(_Visible())
        handler.addFilter(lambda record: record.name != _PROGRESS.name)  # the bar shows the same
    else:
        handler = logging.StreamHandler(terminal.messages.file)
        handler.setFormatter(_Visible(FORMAT, DATE_FORMAT))
    handler.addFilter(_for_the_console)
    handler.setLevel(logging.WARNING if terminal.quiet else logging.NOTSET)
    return handler


def _for_the_console(record: logging.LogRecord) -> bool:
    return not _FILE_ONLY.items() <= vars(record).items()
