"""Finished blocks on disk: the unit at which an interrupted job resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from algorithms.modeling.files import atomic_save_tensors, atomic_write_json, file_digest

logger = logging.getLogger(__name__)


class BlockStore:
    """One safetensors file a block, ``<index>.safetensors``, and its report with the file's digest, ``<index>.json``.

    The report is written last: a block counts as finished when both are there and the digest agrees.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, index: int, tensors: Mapping[str, Tensor], report: Mapping[str, object]) -> None:
        """Keep a finished block: its tensors, named relative to the block, and a report of plain JSON values."""
        path = self._tensor_file(index)
        atomic_save_tensors(path, tensors)
        atomic_write_json(self._report_file(index), {**report, "sha256": file_digest(path)})

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, object]] | None:
        """Tensors and report of a block, or None where it is not finished. A damaged one is reported and removed."""
        path, report_path = self._tensor_file(index), self._report_file(index)
        if not (path.is_file() and report_path.is_file()):
            return None
        try:
            report = json.loads(report_path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            report = {}
        if report.pop("sha256", None) != file_digest(path):  # no part of what the method reported
            logger.warning("%s does not match the digest in %s; block %d is computed again", path, report_path.name, index)
            self.discard(index)
            return None
        return load_file(path), report

    def shapes(self, index: int) -> dict[str, tuple[int, ...]] | None:
        """Shapes of a block's tensors, from the head of its file alone, or None where the block is not finished."""
        path = self._tensor_file(index)
        if not (path.is_file() and self._report_file(index).is_file()):
            return None
        with safe_open(path, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118

    def discard(self, index: int) -> None:
        """Forget a block."""
        self._report_file(index).unlink(missing_ok=True)
        self._tensor_file(index).unlink(missing_ok=True)

    def _tensor_file(self, index: int) -> Path:
        return self.directory / f"{index}.safetensors"

    def _report_file(self, index: int) -> Path:
        return self.directory / f"{index}.json"
