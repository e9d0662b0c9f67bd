"""Checkpoints of a tuning run, through torch.distributed.checkpoint: they load on another number of ranks.

A checkpoint is a folder of safetensors files and ``progress.json``, which holds what is not a tensor, with the digest of every
file. The folder appears under its name when all of it is written.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from algorithms.modeling.files import atomic_write_json, file_digest
from algorithms.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

_PROGRESS = "progress.json"


class Checkpoints:
    """The checkpoints ``<directory>/<name>-<step>`` of one run, of which the newest counts.

    Args:
        directory: their folder, on storage that every rank sees.
        name: the first part of their names.
        ranks: the processes whose tensors they hold.
    """

    def __init__(self, directory: Path, name: str, ranks: Ranks) -> None:
        self._directory, self._name, self._ranks = directory, name, ranks

    def save(self, step: int, tensors: Mapping[str, Tensor], progress: Mapping[str, object]) -> None:
        """Write a checkpoint. Tensors may be sharded; every rank has to call."""
        place, partial = self._place(step), self._directory / f".{self._name}-{step}.partial"
        if self._ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._ranks.meet()
        with _quiet(), _unwrapped():
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=writer, **self._processes)
        files = sorted(path.name for path in partial.iterdir())
        own = {name: file_digest(partial / name) for name in self._ranks.mine(files)}
        self._ranks.meet()
        digests = {name: digest for part in self._ranks.gather(own) for name, digest in part.items()}
        if self._ranks.is_main:
            atomic_write_json(partial / _PROGRESS, {"step": step, "files": digests, **progress})
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
        self._ranks.meet()

    def keep_only(self, step: int | None) -> None:
        """Remove all checkpoints but one."""
        if self._ranks.is_main:
            for found in self._steps():
                if found != step:
                    shutil.rmtree(self._place(found))

    def newest(self) -> Mapping[str, Any] | None:
        """What is not a tensor of the newest intact checkpoint, with its ``step``; None where there is none."""
        found = None
        if self._ranks.is_main:
            found = next((progress for step in reversed(self._steps()) if (progress := self._intact(step)) is not None), None)
        self._ranks.meet()  # digests of a large checkpoint take minutes
        return self._ranks.from_main(found)

    def is_intact(self, step: int) -> bool:
        """Whether a checkpoint is all there."""
        found = self._ranks.is_main and self._intact(step) is not None
        self._ranks.meet()
        return self._ranks.from_main(found)

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Read a checkpoint into tensors of the same names and shapes, however they are sharded."""
        with _quiet(), _unwrapped():
            reader = HuggingFaceStorageReader(str(self._place(step)))
            dcp.load(dict(tensors), storage_reader=reader, **self._processes)

    @property
    def _processes(self) -> dict[str, Any]:
        """Who takes part, as torch wants it said."""
        is_alone = self._ranks.size == 1
        return {"no_dist": True} if is_alone else {"process_group": self._ranks.group}

    def _intact(self, step: int) -> Mapping[str, Any] | None:
        place = self._place(step)
        try:
            progress = json.loads((place / _PROGRESS).read_text(encoding="utf-8"))
            if all(file_digest(place / name) == digest for name, digest in progress["files"].items()):
                return progress
        except (OSError, ValueError, KeyError, TypeError):
            pass
        logger.warning("%s is damaged and not used", place)
        return None

    def _steps(self) -> list[int]:
        prefix = f"{self._name}-"
        names = [path.name.removeprefix(prefix) for path in self._directory.glob(f"{prefix}*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _place(self, step: int) -> Path:
        return self._directory / f"{self._name}-{step}"


@contextmanager
def _unwrapped() -> Iterator[None]:
    """What ended a step of a checkpoint on any rank as it is: torch wraps even a request to stop, in a class of its own."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, KeyboardInterrupt)), causes[0]) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that torch makes of checkpoints of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process.*")
        warnings.filterwarnings("ignore", message=".*process_group.*")
        yield
