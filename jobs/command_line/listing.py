"""The jobs below a user folder, as their manifests tell. Reads the JSON alone: listing needs neither torch nor a lock."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.workspace import LOCK, MANIFEST, job_holder

STOPPED = {"tmp", "exports", "packed", "evaluation"}  # folders inside a job, which hold no further jobs
DEEPEST = 6  # a JOB_ID that an earlier version took could have slashes, but not this many


@dataclass(frozen=True, kw_only=True)
class JobEntry:
    """One job: its path below ``jobs/``, its algorithm, how far it has come, and the same for each stage."""

    name: str
    directory: Path
    algorithm: str
    status: str
    stages: Mapping[str, str]


def list_jobs(user_folder: Path) -> tuple[JobEntry, ...]:
    """Every job below ``user_folder``, by name. A manifest that cannot be read is listed as such, never raised."""
    root = user_folder / "jobs"
    return tuple(_entry(manifest, root) for manifest in sorted(_manifests(root, DEEPEST)))


def _manifests(folder: Path, levels: int) -> Iterator[Path]:
    if (folder / MANIFEST).is_file():
        yield folder / MANIFEST
        return
    if levels == 0:
        return
    with suppress(OSError):  # a folder that is closed to this user, or gone by now, has no jobs to show
        for inner in folder.iterdir():
            if inner.is_dir() and inner.name not in STOPPED:
                yield from _manifests(inner, levels - 1)


def _entry(manifest: Path, root: Path) -> JobEntry:
    name, directory = str(manifest.parent.relative_to(root)), manifest.parent
    try:
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        stages = {stage: _status(record, directory) for stage, record in raw["stages"].items()}
        status = _status(raw["run"], directory) if raw["run"] else "not started"
        return JobEntry(name=name, directory=directory, algorithm=str(raw["algorithm"]), status=status, stages=stages)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return JobEntry(name=name, directory=directory, algorithm="?", status="manifest unreadable", stages={})


def _status(record: Mapping[str, object], directory: Path) -> str:
    """The recorded status; what is recorded as running, with nobody there to run it, was killed."""
    status = str(record["status"])
    return "killed" if status == "running" and job_holder(directory / LOCK) is None else status
