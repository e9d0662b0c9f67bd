"""Opens a located text as documents that are read when they are asked for."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError

from configs.errors import DataError
from configs.recipe import Recipe
from jobs.texts.location import TextLocation
from jobs.texts.windows import Texts

logger = logging.getLogger(__name__)

SPLIT_PATTERN = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
SCRIPT_REFUSED = "scripts are no longer supported"
PARQUET_BRANCH = "refs/convert/parquet"  # where the hub keeps its own conversion of data sets that are made by a script


@dataclass(frozen=True)
class TextList:
    """Documents in memory."""

    documents: Sequence[str]

    def __len__(self) -> int:
        return len(self.documents)

    def fetch(self, ids: Sequence[int]) -> list[str]:
        """The documents of these ids, in this order."""
        return [self.documents[index] for index in ids]


@dataclass(frozen=True)
class TableTexts:
    """Documents made from the rows of a data set: one column, or several put into a template."""

    table: datasets.Dataset
    columns: tuple[str, ...]
    template: str | None
    origin: str

    def __len__(self) -> int:
        return len(self.table)

    def fetch(self, ids: Sequence[int]) -> list[str]:
        """The documents of these rows, in this order; an absent value is an empty text.

        Raises:
            DataError: The only column holds something other than text.
        """
        if len(ids) == 0:
            return []
        batch = self.table[list(ids)]
        rows = zip(*(batch[column] for column in self.columns), strict=True)
        if self.template is not None:
            filled = [
                {name: "" if value is None else value for name, value in zip(self.columns, row, strict=True)} for row in rows
            ]
            return [self.template.format(**row) for row in filled]
        return [self._text(row[0]) for row in rows]

    def _text(self, value: object) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        raise DataError(
            f"{self.origin}: the column {self.columns[0]!r} holds {type(value).__name__}, not text. "
            "Name another column in TEXT_COLUMN, or make a text of it with FORMAT_STRING."
        )


def open_documents(location: TextLocation, recipe: Recipe, cache_dir: Path, *, split: str, by_line: bool = False) -> Texts:
    """The documents of one split.

    A ``.txt`` file is one document, or, with ``by_line`` and for corpora known by name, one document a line.

    Args:
        location: Where the text lies; not a token list.
        recipe: Says the columns and the template.
        cache_dir: Where ``datasets`` keeps what it downloads and converts.
        split: A split, a slice of one ("train[:100]"), or several joined by "+".
        by_line: Whether the lines of a text file are documents of their own.

    Raises:
        DataError: No such split or column, or a file that cannot be read.
    """
    if location.kind == "text":
        return _text_files(location, split, by_line=by_line)
    table = _open_table(location, cache_dir, split)
    columns, template = _columns(location, recipe, table.column_names)
    return TableTexts(table.select_columns(list(dict.fromkeys(columns))), columns, template, location.origin)


def _columns(location: TextLocation, recipe: Recipe, there: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """The columns that make a document, and their template: the corpus' own column, or what the recipe says."""
    if location.card is not None:
        own = next((name for name in (location.card.column, "text") if name in there), None)
        if own is not None:
            return (own,), None
    missing = [name for name in recipe.text_column if name not in there]
    if missing and location.from_corpora and "text" in there:
        return ("text",), None  # TEXT_COLUMN describes the calibration text, which need not look like this one
    if missing:
        raise DataError(
            f"{location.origin}: no column {', '.join(map(repr, missing))}; the columns are {', '.join(there)}. "
            "Change TEXT_COLUMN (and FORMAT_STRING)."
        )
    return recipe.text_column, recipe.format_string


def _text_files(location: TextLocation, split: str, *, by_line: bool) -> TextList:
    line = location.card.line if location.card else str.strip
    by_line = by_line or location.card is not None
    documents: list[str] = []
    for name, span in _spans(split):
        found: list[str] = []
        for path in _files_of(location, name):
            try:
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(f"{location.origin}: {path} is not UTF-8 text (byte {error.start}). Convert it.") from error
            found += [line(part) for part in io.StringIO(text)] if by_line else [text]
        documents += found[_slice(span, len(found))]
    return TextList(documents)


def _files_of(location: TextLocation, split: str) -> tuple[Path, ...]:
    """The local files of a split; files that say no split belong to every one."""
    if "" in location.files:
        return location.files[""]
    if split not in location.files:
        raise DataError(f"{location.origin}: no split {split!r}; there are {', '.join(sorted(location.files))}. Change SPLIT.")
    return location.files[split]


def _open_table(location: TextLocation, cache_dir: Path, split: str) -> datasets.Dataset:
    with _readable_errors(location), _quiet():
        if location.kind == "hub":
            return _from_hub(location, cache_dir, split)
        parts = []
        if location.folder is not None:
            saved = datasets.load_from_disk(str(location.folder))
        for name, span in _spans(split):
            if location.folder is not None:
                table = _part_of(saved, name, location.origin)
            else:
                files = [str(path) for path in _files_of(location, name)]
                table = datasets.load_dataset(location.kind, data_files=files, split="train", cache_dir=str(cache_dir))
            parts.append(table.select(range(len(table))[_slice(span, len(table))]))
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _part_of(saved: datasets.Dataset | datasets.DatasetDict, split: str, origin: str) -> datasets.Dataset:
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise DataError(f"{origin}: no split {split!r}; there are {', '.join(sorted(saved))}. Change SPLIT.")
    return saved[split]


def _from_hub(location: TextLocation, cache_dir: Path, split: str) -> datasets.Dataset:
    card = location.card
    options: dict[str, Any] = {"split": split, "cache_dir": str(cache_dir)}
    if card is not None and card.data_files:
        names = {name for name, _ in _spans(split)}
        options["data_files"] = {name: file for name, file in card.data_files.items() if name in names}
    revision = card.revision if card else None
    try:
        return datasets.load_dataset(location.name, location.subname, revision=revision, **options)
    except RuntimeError as error:
        if SCRIPT_REFUSED not in str(error):
            raise
        logger.info("%s is made by a script, which datasets no longer runs; trying the hub's Parquet copy.", location.origin)
        try:
            return datasets.load_dataset(
                location.name, data_dir=location.subname or "default", revision=PARQUET_BRANCH, **options
            )
        except (OSError, ValueError, DatasetsError, HTTPError):
            raise error from None  # the script is what the user has to know about


@contextmanager
def _readable_errors(location: TextLocation) -> Iterator[None]:
    """Turns what ``datasets`` raises into one error that says which key to change."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, StopIteration, DatasetsError, HTTPError) as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        if location.kind != "hub":
            raise DataError(
                f"{location.origin}: cannot be read as {location.kind} ({reason}). Mend or convert the file."
            ) from error
        name = location.card.name if location.card else None
        local = f"a local file under CORPORA: {{{name}: FILE}}" if name else "a local file or folder in DATA_PATH"
        offline = " The hub cannot be reached from here." if isinstance(error, ConnectionError | HTTPError) else ""
        script = " Data sets made by a script cannot be read any more." if SCRIPT_REFUSED in reason else ""
        raise DataError(
            f"{location.origin}: {location.name} could not be loaded from the hub ({reason}).{offline}{script} "
            f"Check the name, DATASET_SUBNAME and SPLIT, or give {local}."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of ``datasets`` among those of the job; what the user had set comes back."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _spans(split: str) -> list[tuple[str, Mapping[str, str | None]]]:
    """Each part of a split expression as (name, its bounds as they were written)."""
    found: list[tuple[str, Mapping[str, str | None]]] = []
    for part in split.split("+"):
        match = SPLIT_PATTERN.fullmatch(part.strip())
        if match is None:
            raise DataError(f'SPLIT={split!r} is no split: write "train", "train[:100]", "train[10%:20%]" or "train+test".')
        found.append((match["name"], {"start": match["start"], "stop": match["stop"]}))
    return found


def _slice(bounds: Mapping[str, str | None], count: int) -> slice:
    """Bounds in rows or percent of ``count`` rows, percent rounded to the nearest row."""

    def _row(bound: str | None) -> int | None:
        if bound is None:
            return None
        return round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)

    return slice(_row(bounds["start"]), _row(bounds["stop"]))
