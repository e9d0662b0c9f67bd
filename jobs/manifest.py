"""manifest.json: what a job has done, with which versions, on which data, in how much time and memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from algorithms.modeling.files import atomic_write_json
from configs.errors import DataError
from jobs.estimation.prediction import Prediction
from jobs.results.artifacts import FileRecord, canonical_digest

logger = logging.getLogger(__name__)

FORMAT = 1
_DIGEST = "digest"  # of everything else in the file
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)


class Status(StrEnum):
    """How far a stage, or the whole run, has come. ``running`` in a file that nobody writes means that it was killed."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    CERTIFICATE_FAILED = "certificate failed"  # said of a run: its stages are finished, but a client reads a format differently

    @property
    def is_end(self) -> bool:
        """Whether a run that ended so has nothing left to go on with."""
        return self in (Status.FINISHED, Status.CERTIFICATE_FAILED)


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage's line: what shaped it (key, settings, input, tokens), what it left, and what it cost.

    Times are UTC. ``user_cpu_s`` and ``wall_s`` add up over the attempts that a resumed stage took, as far as they are known;
    ``peak_memory_bytes`` is the largest resident memory of this process while the stage ran. ``predicted`` is what it was
    expected to cost, before it started; None in manifests from before there were predictions.
    """

    key: str
    algorithm: str
    version: int
    settings: Mapping[str, object]
    input_key: str
    tokens_key: str | None
    request: Mapping[str, object] | None
    data: str
    kind: str
    directory: str
    status: Status
    started: str
    finished: str | None = None
    attempts: int = 1
    user_cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_memory_bytes: int = 0
    peak_cuda_memory_bytes: int | None = None
    artifact_digest: str | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    tokens: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    predicted: Prediction | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The last call of the runner. ``redone`` lists the stages it re-ran on the recipe's ``overwrite`` so far."""

    id: str
    status: Status
    started: str
    finished: str | None = None
    redone: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Publication:
    """The files that stand in the job folder: relative path -> record, and the key of the stage that wrote them."""

    key: str
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """How a model came about that earlier jobs have made.

    ``model`` is what the first of them started from, ``methods`` are their algorithms in order, ``folder`` is where the last
    one's result stands.
    """

    model: str
    methods: tuple[str, ...]
    folder: str

    def __str__(self) -> str:
        return f"{self.model} by {', then '.join(self.methods)}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of manifest.json. A value: every change makes a new one.

    ``lineage`` is None for a model that no job has made, ``uploaded`` for a result that none has uploaded. ``certificate``,
    ``evaluation`` and ``bits`` hold, under ``key``, the result that they speak of. ``sizes`` are bytes of weights: ``before``
    and, by format, ``after``.
    """

    job: str = ""
    algorithm: str = ""
    recipe_digest: str = ""
    model: Mapping[str, object] = field(default_factory=dict)
    lineage: Lineage | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, object] = field(default_factory=dict)
    run: RunRecord | None = None
    stages: Mapping[str, StageRecord] = field(default_factory=dict)
    published: Publication | None = None
    certificate: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    bits: Mapping[str, Any] | None = None
    sizes: Mapping[str, Any] | None = None
    uploaded: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()


class ManifestFile:
    """The manifest on disk: ``current`` is what it says, every change is written at once and atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.current = read_manifest(path)

    def update(self, **changes: object) -> None:
        """Replace fields of the manifest and write it."""
        self.current = replace(self.current, **changes)  # type: ignore[arg-type]  # replace itself refuses other fields
        content = {"format": FORMAT, **asdict(self.current)}
        for path in (self.path, copy_of(self.path)):
            atomic_write_json(path, {**content, _DIGEST: canonical_digest(content)})

    def record(self, name: str, record: StageRecord) -> None:
        """Replace one stage's record and write the manifest."""
        self.update(stages={**self.current.stages, name: record})

    def note_redone(self, name: str) -> None:
        """Note that the run in progress has made a stage again."""
        self.update(run=replace(self._run, redone=(*self._run.redone, name)))

    def close_run(self, status: Status) -> None:
        """Write how the run in progress ended. The first end counts: a verdict outlives the end of the work."""
        if self._run.finished is not None:
            return
        self.update(run=replace(self._run, status=status, finished=now()))

    @property
    def _run(self) -> RunRecord:
        assert self.current.run is not None, "the runner records a run before anything else happens in it"
        return self.current.run


def read_manifest(path: Path) -> Manifest:
    """The manifest at ``path``, or an empty one where there is none. A damaged one is read from its copy.

    Raises:
        DataError: neither is a manifest that this version can read.
    """
    if not path.is_file():
        return Manifest()
    try:
        return _read(path)
    except _UNREADABLE as error:
        try:
            manifest = _read(copy_of(path))
        except (OSError, *_UNREADABLE):
            raise DataError(
                f"{path} cannot be read as a manifest: {error}. Choose another JOB_ID, or move the whole folder "
                f"{path.parent} away: every stage of the job then runs again."
            ) from error
        logger.warning("%s is damaged (%s); its copy %s is used.", path, error, copy_of(path).name)
        return manifest


def copy_of(path: Path) -> Path:
    """Where the same is written once more: all that a job knows of its results hangs on this file."""
    return path.with_name(f".{path.name}.copy")


def _read(path: Path) -> Manifest:
    raw = json.loads(path.read_text(encoding="utf-8"))
    digest = raw.pop(_DIGEST, None)  # manifests from before there was one lack the key
    if digest is not None and digest != canonical_digest(raw):
        raise ValueError("it is not what was written")
    if raw.pop("format") != FORMAT:
        raise ValueError("it was written by another version of Bitpress")
    return _manifest(raw)


def now() -> str:
    """The time as the manifest writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _manifest(raw: dict) -> Manifest:
    known = {f.name for f in fields(Manifest)}
    values = {name: value for name, value in raw.items() if name in known}
    values["stages"] = {name: _stage(record) for name, record in raw["stages"].items()}
    values["warnings"] = tuple(raw["warnings"])
    if raw["run"] is not None:
        run = raw["run"]
        values["run"] = RunRecord(**{**run, "status": Status(run["status"]), "redone": tuple(run["redone"])})
    if values.get("lineage") is not None:  # manifests from before there was one lack the key
        values["lineage"] = Lineage(**{**raw["lineage"], "methods": tuple(raw["lineage"]["methods"])})
    if raw["published"] is not None:
        values["published"] = Publication(key=raw["published"]["key"], files=_files(raw["published"]["files"]))
    return Manifest(**values)


def _stage(raw: dict) -> StageRecord:
    predicted = raw.get("predicted")
    fixed = {
        "status": Status(raw["status"]),
        "files": _files(raw["files"]),
        "warnings": tuple(raw["warnings"]),
        "predicted": None if predicted is None else Prediction.from_record(predicted),
    }
    return StageRecord(**{**raw, **fixed})


def _files(raw: Mapping[str, dict]) -> dict[str, FileRecord]:
    """Records by relative path; files are removed by these names, so none may lead out of its folder."""
    outside = [name for name in raw if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise ValueError(f"{outside[0]!r} is no path inside the job folder")
    return {name: FileRecord(**record) for name, record in raw.items()}
