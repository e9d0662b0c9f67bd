"""The errors that a user can cause, and the exit codes they end a command with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

VALUE_LENGTH = 80  # characters of a bad value that a problem repeats
PATH_LENGTH = 1000  # characters of a file's path


class ExitCode(IntEnum):
    """What a finished command tells its caller."""

    DONE = 0
    FAILED = 1
    RECIPE = 2
    ENVIRONMENT = 3
    OUT_OF_MEMORY = 4
    CERTIFICATE = 5
    UPLOAD = 6
    INTERRUPTED = 75


@dataclass(frozen=True, kw_only=True)
class RecipeProblem:
    """One thing that is wrong in a recipe.

    ``key`` is the dotted path of the value; ``line`` counts from 1 and is None where there is none to name. For an override
    ``file`` is "command line" and ``value`` the text as typed. ``nearest`` is the valid spelling that was probably meant.
    """

    file: str
    line: int | None
    key: str
    value: object
    expected: str
    nearest: str | None = None

    def __str__(self) -> str:
        file = _cut(self.file, PATH_LENGTH)
        place = file if self.line is None else f"{file}:{self.line}"
        lines = [f"{place}: {_cut(self.key)}" if self.key else place]
        if self.value is not Absent:
            lines.append(f"  found     {shown(self.value)}")
        lines.append(f"  expected  {self.expected}")
        if self.nearest is not None:
            lines.append(f"  nearest   {self.nearest}")
        return "\n".join(lines)


class Absent:
    """Stands for the value of a problem that is not about a value: a missing key, an unreadable file."""


class RecipeError(ValueError):
    """A recipe that cannot be used, with every problem that was found in it."""

    def __init__(self, problems: Iterable[RecipeProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the recipe:"
        return "\n\n".join([head, *(str(problem) for problem in self.problems)])


class UnknownAlgorithm(KeyError):  # noqa: N818 - the name that the loader's contract gives it
    """A name that no row of the registry has; ``known`` lists what this version offers."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name, self.known = name, tuple(known)
        super().__init__(name)

    def __str__(self) -> str:
        listed = ", ".join(self.known)
        return f"{_cut(self.name)} is no algorithm; this version has: {listed}"


class DataError(ValueError):
    """Data, a model or a path that a user can put right: the message says what, where, and which key to change."""


class MissingEnvironmentError(RuntimeError):
    """Something that this machine lacks: a package, a device. The message says how to get it."""


class MemoryShortageError(RuntimeError):
    """The job did not fit into memory. The message names the overrides that help."""


class CertificateError(RuntimeError):
    """A written format that its own client reads differently, or a quality gate that was not met."""


class UploadError(RuntimeError):
    """A result that did not reach the hub. It is complete here, and the message has the command that sends it again."""


class RankLostError(RuntimeError):
    """One of the processes that share a job is gone, or cannot be reached. What is finished is kept, and a new run resumes."""


class RankFailedError(RuntimeError):
    """One of the processes that share a job ended with an error of its own.

    ``exit_code`` is what that error ends a command with. The message is empty where the error has been said already.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = ExitCode(exit_code) if exit_code in list(ExitCode) else ExitCode.FAILED
        super().__init__(message)


EXIT_CODES: Mapping[type[BaseException], ExitCode] = {
    RecipeError: ExitCode.RECIPE,
    DataError: ExitCode.RECIPE,
    MissingEnvironmentError: ExitCode.ENVIRONMENT,
    MemoryShortageError: ExitCode.OUT_OF_MEMORY,
    CertificateError: ExitCode.CERTIFICATE,
    UploadError: ExitCode.UPLOAD,
    RankLostError: ExitCode.INTERRUPTED,
    KeyboardInterrupt: ExitCode.INTERRUPTED,
}


def exit_code(error: BaseException) -> ExitCode:
    """What an error ends a command with; FAILED for one that no user caused."""
    if isinstance(error, RankFailedError):
        return error.exit_code
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), ExitCode.FAILED)


def shown(value: object) -> str:
    """A value as the problem repeats it: the way a recipe spells it, on one line, cut where it is long."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else repr(value)
    text = " ".join(text.split())
    return _cut(text)


def _cut(text: str, length: int = VALUE_LENGTH) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def visible(text: str) -> str:
    """``text`` with what a terminal would obey (escape codes, marks that turn the direction of writing) spelled out instead."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)
