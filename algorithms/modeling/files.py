"""Files and folders that are either whole or absent, and digests that name their content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_CHUNK_BYTES = 1 << 20


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that a reader, or the next run after a kill, sees the old file or the new one, never a part."""
    partial = _partial_name(path)
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def atomic_write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically.

    Raises:
        TypeError: a value that JSON cannot express; nothing is written.
    """
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def atomic_save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically. Names are sorted, so equal content gives equal bytes."""
    partial = _partial_name(path)
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    save_file(ordered, str(partial), metadata={"format": "pt", **(metadata or {})})
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)


@contextmanager
def atomic_folder(place: Path) -> Iterator[Path]:
    """An empty folder to fill, which appears at ``place`` when the block ends well; a block that fails leaves nothing.

    Where another process has put the same files there in the meantime, its folder stays.

    Raises:
        OSError: something else stands at ``place``.
    """
    partial = _partial_name(place)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(place)
        except OSError:
            if any(not (place / entry.name).exists() for entry in partial.iterdir()):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def visible_files(directory: Path) -> list[Path]:
    """Every file below ``directory``, in order, but those whose name, or that of a folder on the way, begins with a dot."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(directory).parts))


def folder_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of the :func:`visible_files` below ``directory``."""
    digest = hashlib.sha256()
    for path in visible_files(directory):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0" + file_digest(path).encode() + b"\n")
    return digest.hexdigest()


def fingerprint(path: Path, whole_below: int = 256 << 20) -> str:
    """A digest that stays cheap for huge files: the whole content below ``whole_below`` bytes, else size and samples.

    Meant for inputs that users own (model weights, data sets), where the aim is to notice another file, not an attacker.
    """
    size = path.stat().st_size
    if size < whole_below:
        return file_digest(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for offset in (0, size // 2, size - _CHUNK_BYTES):
            stream.seek(offset)
            digest.update(stream.read(_CHUNK_BYTES))
    return digest.hexdigest()


def _partial_name(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
