"""A data set of questions and answers as one text a row, for calibration: what the guide's create_dataset.py makes of GSM8K."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from configs.errors import DataError

TEMPLATE = "Question: {question}\nAnswer: {answer}"
COLUMNS = ("question", "answer")


def restructure(name: str, subname: str | None, output: Path, *, cache_dir: Path | None = None) -> Mapping[str, int]:
    """Write a data set with the single column ``text`` to ``output``, as ``save_to_disk`` does.

    Args:
        name: a data set on the hub, a folder of one, or a ``.jsonl`` file, which becomes the split ``train``.
        subname: which configuration of it; None for those that have one.
        output: the folder that DATA_PATH then names.
        cache_dir: where ``datasets`` keeps what it downloads.

    Returns:
        Rows of every split.

    Raises:
        DataError: the data set cannot be read, or lacks the columns question and answer.
    """
    place, options = Path(name).expanduser(), {"cache_dir": None if cache_dir is None else str(cache_dir)}
    try:
        if place.is_file():
            found = datasets.load_dataset("json", data_files={"train": str(place)}, **options)
        else:
            found = datasets.load_dataset(str(place) if place.exists() else name, subname, **options)
    except (OSError, ValueError, StopIteration, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: the data set cannot be read ({reason}). Name another, or a .jsonl file of it.") from error
    for split, table in found.items():
        missing = [column for column in COLUMNS if column not in (table.column_names or ())]
        if missing:
            raise DataError(f"{name}, split {split}: no column {missing[0]!r}; it has {', '.join(table.column_names or ())}.")
        for column in COLUMNS:
            empty = next((row for row, value in enumerate(table[column]) if value is None), None)
            if empty is not None:
                raise DataError(f"{name}, split {split}: row {empty} has no {column}.")
    made = datasets.DatasetDict({split: table.map(_text, remove_columns=table.column_names) for split, table in found.items()})
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        made.save_to_disk(str(output))
    except OSError as error:
        raise DataError(f"{output}: the data set cannot be written ({error.strerror or error}).") from error
    return {split: len(table) for split, table in made.items()}


def _text(row: Mapping[str, Any]) -> dict[str, str]:
    return {"text": TEMPLATE.format(question=row["question"], answer=row["answer"])}
