"""Names that become folders, data sets, devices and text templates: what they may be, and what they may not reach."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from string import Formatter

from configs.values import Whole, expected, text

TOKEN_FILES = (".pt", ".pth")  # a data set name that ends like this is a file of token tensors
TOKEN_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
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


def model_name(value: object) -> str:
    """Reads a hub id such as org/name, or the path of a local folder (absolute, or starting with ./ or ../)."""
    name = text(value).strip()
    if not name.startswith(EXPLICIT_PATH) and _leaves(name):
        raise expected("a hub id such as org/name, or a local folder written with a leading /, ./ or ../")
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
