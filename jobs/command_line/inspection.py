"""``main.py inspect MODEL``: what would be compressed of a model, read from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

from algorithms.modeling.families.overview import Overview, Part, overview
from algorithms.modeling.source import ModelSource
from configs.errors import DataError

CONFIG = "config.json"
Row = tuple[str, ...]


def inspect(model: str, user_folder: Path, *, trust_remote_code: bool = False) -> list[str]:
    """The lines of the answer.

    Args:
        model: a folder with a config.json, or a name on the hub, of which nothing but the configuration is fetched.
        user_folder: whose ``models`` may have it.
        trust_remote_code: whether the model may run code of its own.

    Raises:
        DataError: there is no such model, or nothing of it can be compressed.
    """
    folder = _folder(model, user_folder, trust_remote_code)
    log = logging.getLogger("algorithms.modeling.source")
    log.addFilter(_is_error)  # what it warns of is the answer
    try:
        found = overview(ModelSource(folder, name=model, trust_remote_code=trust_remote_code))
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
    finally:
        log.removeFilter(_is_error)
    return list(_lines(model, found))


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _folder(model: str, user_folder: Path, trust_remote_code: bool) -> Path:
    local = Path(model).expanduser()
    for folder in (local, user_folder / "models" / model):
        if (folder / CONFIG).is_file():
            return folder
    if local.exists() or local.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise DataError(f"MODEL {model}: there is no {CONFIG} in it, so it is no model.")
    patterns = [CONFIG, "*.py"] if trust_remote_code else [CONFIG]
    try:
        fetched = Path(snapshot_download(model, allow_patterns=patterns))
    except GatedRepoError as error:
        raise DataError(f"MODEL {model}: accept its terms at https://huggingface.co/{model}, then set HF_TOKEN.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(f"MODEL {model}: no such folder, and the hub has no such model.") from error
    except (OSError, HTTPError, RuntimeError) as error:
        raise DataError(
            f"MODEL {model}: no such folder, and the hub cannot be reached (offline? {type(error).__name__})."
        ) from error
    if not (fetched / CONFIG).is_file():
        raise DataError(f"MODEL {model}: the hub has no {CONFIG} for it, so it is no model for transformers.")
    return fetched


def _lines(model: str, found: Overview) -> Iterator[str]:
    row = found.architecture
    how = "of the architecture table" if found.basis is None else f"found by inspection, from {found.basis}"
    yield f"{model}: {row.model_type}, row {how}"
    yield f"  blocks   {found.num_blocks}, {row.blocks}"
    if row.experts is not None:
        yield f"  experts  {found.num_experts} a block, {row.experts}"
    yield f"  share    {found.compressed:,} of {found.total:,} parameters are compressed ({found.compressed / found.total:.1%})"
    yield ""
    yield "compressed, in the order of computation; linears of a group share their input"
    yield from _aligned(_group_rows(found))
    for title, parts in (("kept in blocks", found.kept), ("kept around blocks", found.outside)):
        yield ""
        yield title
        yield from _aligned([("", part.name, _shape(part), f"{part.parameters:,}", part.remark) for part in parts])
    if found.basis is not None:
        yield ""
        yield "A row in algorithms/modeling/families/table.py pins this down, and says where scales can be folded."


def _group_rows(found: Overview) -> list[Row]:
    rows = []
    for number, group in enumerate(found.groups, start=1):
        fold = found.folds.get(group[0].name)
        for part in group:
            is_first = part is group[0]
            where = "" if not is_first else "scales stay" if fold is None else f"scales into {fold}"
            rows.append((str(number) if is_first else "", part.name, _shape(part), f"{part.parameters:,}", where))
    return rows


def _shape(part: Part) -> str:
    sizes = " or ".join("x".join(map(str, shape)) for shape in part.shapes)
    return f"{sizes} ({part.count})" if part.count > 1 else sizes


def _aligned(rows: list[Row]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if place == 3 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()
