"""Names that become folders, data sets, devices and text templates: what they may be, and what they may not reach."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Formatter

from configs.values import Whole, expected, nearest_name, path, text

SERVICES = ("Kompress", "Adapt")
JOB_SCHEME = "job:"
JOB_FORMS = (
    "job://JOB_ID, job://JOB_SERVICE/JOB_ID, or one of them with /exports/FORMAT behind it; no part empty, none with '..' in it"
)
EXPORTS = "exports"  # the folder of a job's further formats

TOKEN_FILES = (".pt", ".pth")  # a data set name that ends like this is a file of token tensors
TOKEN_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TASK_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
MOST_EXAMPLES = 1000  # before a question: no model reads more
REPOSITORY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
REPOSITORY_LENGTH = 96
EXPLICIT_PATH = ("/", "./", "../", "~")


def _leaves(name: str) -> bool:
    """Whether ``name``, taken as a path inside a folder, could name something outside it."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "~")) or ".." in parts or bool(re.match(r"[A-Za-z]:", name))


def folder_name(value: object) -> str:
    """Reads a name that becomes one folder inside the user folder; with a slash it could lie in the folder of another job."""
    name = text(value).strip()
    unusable = "/" in name or "\\" in name or any(ord(character) < 32 for character in name)
    if _leaves(name) or unusable or PurePosixPath(name) == PurePosixPath():
        raise expected("the name of one folder inside the user folder: no slashes, no ..")
    return name


def token(value: object) -> str:
    """Reads a short name of letters, digits, dots, dashes and underscores."""
    name = text(value)
    if not TOKEN_PATTERN.fullmatch(name):
        raise expected("names of letters, digits, dots, dashes and underscores")
    return name


def service_name(value: object) -> str:
    """Reads JOB_SERVICE in any case and keeps the case: it is a folder of the job's path."""
    if not isinstance(value, str) or value.casefold() not in map(str.casefold, SERVICES):
        raise expected(" or ".join(SERVICES), nearest_name(value, SERVICES) if isinstance(value, str) else None)
    return value


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """A task as lm-eval names it, and how many examples stand before each question; None leaves that to the task."""

    name: str
    num_fewshot: int | None = None

    def __str__(self) -> str:
        return self.name if self.num_fewshot is None else f"{self.name}:{self.num_fewshot}"


def task_request(value: str) -> TaskRequest:
    """Reads ``name`` or ``name:number``."""
    name, colon, shots = value.strip().partition(":")
    if not TASK_PATTERN.fullmatch(name) or (colon and not shots.strip().isdecimal()):
        raise expected("tasks such as gsm8k:5: a name of lm-eval, and behind a colon how many examples stand before a question")
    return TaskRequest(name=name, num_fewshot=Whole(0, MOST_EXAMPLES)(shots.strip()) if colon else None)


@dataclass(frozen=True, kw_only=True)
class JobReference:
    """Another job's output as MODEL names it. Without a service it is the only job of that name, without a format its first."""

    job_id: str
    service: str | None = None
    format: str | None = None

    def __str__(self) -> str:
        parts = (*filter(None, [self.service]), self.job_id, *((EXPORTS, self.format) if self.format else ()))
        return f"{JOB_SCHEME}//{'/'.join(parts)}"


def job_reference(name: str) -> JobReference | None:
    """``job://...`` taken apart; None for every other name of a model.

    Raises:
        PydanticCustomError: it starts like one and is none.
    """
    if not name.casefold().startswith(JOB_SCHEME):
        return None
    parts = name[len(JOB_SCHEME) + 2 :].split("/")
    export = None
    if len(parts) > 2 and parts[-2] == EXPORTS:
        parts, export = parts[:-2], parts[-1]
    if not name.startswith(f"{JOB_SCHEME}//") or len(parts) > 2:
        raise expected(JOB_FORMS)
    try:
        return JobReference(
            service=service_name(parts[0]) if len(parts) == 2 else None,
            job_id=folder_name(parts[-1]),
            format=None if export is None else token(export),
        )
    except ValueError:
        raise expected(JOB_FORMS) from None


def model_name(value: object) -> str:
    """Reads a hub id such as org/name, another job's output, or the path of a local folder (absolute, or with ./ or ../)."""
    name = text(value).strip()
    if job_reference(name) is not None:
        return name
    if not name.startswith(EXPLICIT_PATH) and _leaves(name):
        raise expected("a hub id such as org/name, or a local folder written with a leading /, ./ or ../")
    return name


def custom_model(value: object) -> Path:
    """Reads the path of a model's weights; another job's output has its place in MODEL."""
    if isinstance(value, str) and value.strip().casefold().startswith(JOB_SCHEME):
        raise expected(f"a path; another job's output is named by MODEL: {value.strip()}")
    return path(value)


def hub_repository(value: object) -> str:
    """Reads the name of a repository on the hub, with whose it is."""
    name = text(value).strip()
    if not REPOSITORY_PATTERN.fullmatch(name) or len(name) > REPOSITORY_LENGTH:
        raise expected("a repository of the hub, with its owner: org/name")
    return name


def dataset_reference(value: object) -> str:
    """Reads a hub id, the name of a text, or the path of a .pt or .pth file of tokens."""
    name = text(value).strip()
    if not name.endswith(TOKEN_FILES) and _leaves(name):
        raise expected("a name that stays inside the user folder; give the path of local data as DATA_PATH")
    return name


def devices(value: object) -> tuple[int, ...]:
    """Reads device numbers: 0, "0,1,2,3" or a list. Null and an empty text are no choice."""
    if value is None or value == "":
        return ()
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        found = tuple(Whole(0)(part.strip() if isinstance(part, str) else part) for part in parts)
    except ValueError:
        raise expected('device numbers such as "0,1,2,3"') from None
    if len(set(found)) != len(found):
        raise expected('device numbers such as "0,1,2,3", each once')
    return found


def check_format_string(template: str | None, columns: tuple[str, ...]) -> str | None:
    """``template`` again, if it can be filled from ``columns`` alone.

    Attribute and index access ("{text.__class__}") is refused: a template reads columns and nothing else.
    """
    if template is None:
        if len(columns) > 1:
            raise expected(f"a text with a place for each column, such as {' '.join(f'{{{name}}}' for name in columns)!r}")
        return None
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise expected(f"a text in which {{column}} stands for a column ({error}; a literal brace is written twice)") from None
    listed = ", ".join(f"{{{name}}}" for name in columns)
    if not fields:
        raise expected(f"a text with a place for at least one column of TEXT_COLUMN: {listed}")
    for field in fields:
        if field not in columns:
            raise expected(f"only the columns of TEXT_COLUMN as places: {listed} (not {{{field}}})")
    return template
