"""Whether every weight of a model is a number, found out before the first block: a NaN in the last one costs a night."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from safetensors import safe_open
from torch import Tensor

from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource
from configs.errors import DataError
from jobs.manifest import now
from jobs.workspace import Workspace

logger = logging.getLogger(__name__)

_FOLDER = "sound_models"  # below the cache folder: one small file for each model that has been read through
_PART = 1 << 26  # values looked at together, so that a large embedding is not held twice

Progress = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]


def check_weights(source: ModelSource, workspace: Workspace, progress: Progress) -> None:
    """Read all weights once, as fast as the disk gives them; a model that was found sound is not read again.

    Raises:
        DataError: a tensor holds NaN or infinity; names it and its file.
    """
    place = workspace.cache_dir / _FOLDER / f"{source.digest}.json"
    if place.is_file():
        return
    files = sorted(set(source.stored_files.values()))
    with progress("checking weights", len(files)) as advance:
        for file in files:
            names = [name for name, holder in source.stored_files.items() if holder == file]
            with safe_open(source.directory / file, framework="pt") as handle:
                for name in names:
                    _check(handle.get_slice(name), name, f"{source.directory / file}")
            advance(file)
    atomic_write_json(place, {"model": source.name, "time": now()})


def _check(stored: object, name: str, file: str) -> None:
    for part in _parts(stored):
        if part.is_floating_point() and not torch.isfinite(part if part.element_size() == 2 else part.float()).all():
            raise DataError(f"MODEL: {name} in {file} holds NaN or infinity; the checkpoint is damaged. Fetch the model again.")


def _parts(stored: object) -> Iterator[Tensor]:
    """A tensor of a file, some rows at a time."""
    shape = stored.get_shape()
    if 0 in shape:
        return
    if not shape:
        yield stored[...]
        return
    rows = max(_PART * shape[0] // torch.Size(shape).numel(), 1)
    for first in range(0, shape[0], rows):
        yield stored[first : first + rows]
