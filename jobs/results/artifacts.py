"""What a stage left on disk: a table of its files, whether it still matches, and how a new one takes its place."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from algorithms.modeling.files import file_digest, visible_files
from jobs.workspace import LEGACY_CALIBRATION, Workspace


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of an artifact."""

    size: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Whether a recorded artifact is still there: ``present``, and what is wrong with the files that are."""

    present: bool
    problems: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether the artifact can be used."""
        return self.present and not self.problems

    @property
    def damaged(self) -> bool:
        """Whether the artifact is there but its files are not those that the stage wrote."""
        return self.present and bool(self.problems)


ABSENT = Condition(present=False)


def canonical_digest(value: object) -> str:
    """SHA-256 of ``value`` as JSON with sorted keys: equal values give equal digests in every process.

    Raises:
        TypeError: a value that JSON cannot express.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_folder(directory: Path) -> dict[str, FileRecord]:
    """Relative path -> size and digest of the visible files below ``directory``: no name on the way begins with a dot."""
    files = visible_files(directory)
    return {p.relative_to(directory).as_posix(): FileRecord(size=p.stat().st_size, digest=file_digest(p)) for p in files}


def table_digest(files: Mapping[str, FileRecord]) -> str:
    """What ``algorithms.modeling.files.folder_digest`` gives for the same files, without reading them a second time."""
    digest = hashlib.sha256()
    for name in sorted(files, key=lambda name: Path(name)):
        digest.update(name.encode() + b"\0" + files[name].digest.encode() + b"\n")
    return digest.hexdigest()


def check_files(directory: Path, files: Mapping[str, FileRecord], *, full: bool = False) -> Condition:
    """Compare the recorded files with those below ``directory``: names and sizes, with ``full`` also their content.

    A directory that is absent, or that holds none of the files, is not damaged but absent.
    """
    found = {name: directory / name for name in files if (directory / name).is_file()}
    if not found:
        return ABSENT
    problems = [f"{name} is missing" for name in files if name not in found]
    for name, path in found.items():
        size = path.stat().st_size
        if size != files[name].size:
            problems.append(f"{name} has {size} bytes, {files[name].size} were written")
        elif full and file_digest(path) != files[name].digest:
            problems.append(f"{name} has other content than was written")
    return Condition(present=True, problems=tuple(problems))


def replace_folder(new: Path, place: Path) -> None:
    """Rename ``new`` to ``place``; what stood there is renamed aside first and deleted last, so a kill loses nothing."""
    aside = place.with_name(f".{place.name}.replaced")
    remove_folder(aside)
    if place.exists():
        place.rename(aside)
    new.rename(place)
    remove_folder(aside)


def clear_results(workspace: Workspace, directories: Iterable[str]) -> None:
    """Remove what stages with these ``StageSpec.directory`` have left, and the tokens. The rest of ``tmp/`` is not ours.

    The folder itself goes if nothing else is in it.
    """
    for name in directories:
        for place in (workspace.stage_dir(name), workspace.partial_dir(name), workspace.scratch_dir(name)):
            remove_folder(place)
    remove_folder(workspace.tokens_dir)
    link = workspace.tmp_dir / LEGACY_CALIBRATION
    if link.is_symlink():
        link.unlink()
    if workspace.tmp_dir.is_dir() and not any(workspace.tmp_dir.iterdir()):
        workspace.tmp_dir.rmdir()


def remove_folder(directory: Path) -> None:
    """Delete a folder and all below it; a link is removed, never followed."""
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        shutil.rmtree(directory)
