"""Runs one stage: its folders, its tokens, its context, and its line in the manifest whatever happens."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from algorithms.base import Artifact, CompressionAlgorithm, StageContext, StageError, StageSpec
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelError, ModelSource
from configs.errors import DataError, RankLostError
from configs.recipe import Recipe
from jobs.estimation.prediction import Prediction
from jobs.execution.collaborators import Collaborators, Tokens
from jobs.execution.resources import Meter, Usage
from jobs.execution.stage_texts import evaluation_on, stage_texts
from jobs.logs import duration
from jobs.manifest import ManifestFile, StageRecord, Status, now
from jobs.planning import PlannedStage
from jobs.processes.board import Order
from jobs.processes.crew import Crew
from jobs.reporting.secrets import without_secrets
from jobs.results.artifacts import describe_folder, remove_folder, replace_folder, table_digest
from jobs.results.keys import request_record
from jobs.workspace import Workspace

logger = logging.getLogger(__name__)

KEY_FILE = ".key.json"  # a dot, so that it is no part of the artifact
_HEARTBEAT_SECONDS = 10.0
_MAX_WARNINGS = 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that is being run: what it was made from, and where it stands.

    ``predictions`` are by stage, certificate and evaluation included, made before the first of them.
    """

    recipe: Recipe
    workspace: Workspace
    source: ModelSource
    algorithm: CompressionAlgorithm
    manifest: ManifestFile
    parts: Collaborators
    crew: Crew
    device: torch.device
    run_id: str
    data: str
    track: Callable[[Mapping[str, object]], None] = lambda line: None
    predictions: Mapping[str, Prediction] = field(default_factory=dict)

    def metrics(self, values: Mapping[str, object]) -> None:
        """Append one line to metrics.jsonl, where figures that are not finite become their names, and hand it to tracking."""
        line = without_secrets({"time": now(), **values}, os.environ)
        with self.workspace.metrics_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({name: _jsonable(value) for name, value in line.items()}, ensure_ascii=False) + "\n")
        self.track(line)


def run_stage(job: Job, planned: PlannedStage, given: Artifact) -> Artifact:
    """Run a stage and put its result in place.

    The manifest says ``running`` before and ``finished``, ``failed`` or ``interrupted`` after; what the stage had written when
    it was stopped stays in its partial folder, for the next run with the same key.

    Args:
        job: the job.
        planned: the stage's line of the plan.
        given: the artifact of the stage before, or the model.

    Returns:
        The finished artifact, below ``tmp/``.
    """
    spec = planned.spec
    output, scratch = job.workspace.partial_dir(spec.directory), job.workspace.scratch_dir(spec.directory)
    resumed = _prepare_folder(job, planned, output)
    remove_folder(scratch)
    scratch.mkdir(parents=True)
    tokens = None if spec.tokens is None else job.parts.load_tokens(job.recipe, spec.tokens, job.source, job.workspace)
    record = _opening_record(job, planned, tokens, resumed)
    logger.info("Stage %s: %s", spec.name, "resumes" if resumed else "starts")
    try:
        with _Attempt(job.manifest, spec.name, record) as attempt:
            _run(job, spec, _context(job, spec, tokens, output, scratch, attempt), given)
    finally:
        remove_folder(scratch)
    return _finish(job, planned, attempt.closed(Status.FINISHED), output)


def _run(job: Job, spec: StageSpec, context: StageContext, given: Artifact) -> None:
    """On this process alone, or on all of them if the stage can."""
    texts = stage_texts(spec, job.recipe, job.source, job.workspace, job.parts) if spec.evaluates else {}
    crew = job.crew if spec.distributed else Crew()
    with crew.stage(_order(job, spec, context, given), job.device) as ranks:
        if ranks.size > 1:
            logger.info("Stage %s: %d processes, this one on %s", spec.name, ranks.size, job.device)
        evaluate = evaluation_on(spec, ranks.from_main(texts), job.parts) if spec.evaluates else None
        run_spec(spec, replace(context, ranks=ranks, evaluate=evaluate), given)


def _order(job: Job, spec: StageSpec, context: StageContext, given: Artifact) -> Order:
    return Order(
        stage=spec.name,
        model_directory=str(job.source.directory),
        model_name=job.source.name,
        trust_remote_code=job.source.trust_remote_code,
        given_kind=given.kind,
        given_directory=str(given.directory),
        given_digest=given.digest,
        output_dir=str(context.output_dir),
        scratch_dir=str(context.scratch_dir),
    )


def run_spec(spec: StageSpec, context: StageContext, given: Artifact) -> None:
    """Call the plugin.

    Raises:
        DataError: the model, or the recipe, cannot be used as it is.
    """
    try:
        spec.run(context, given)
    except (ModelError, StageError) as error:
        raise DataError(str(error)) from error


def _finish(job: Job, planned: PlannedStage, record: StageRecord, output: Path) -> Artifact:
    spec = planned.spec
    files = describe_folder(output)
    if not files:
        raise RuntimeError(f"stage {spec.name!r} returned without writing a file into {output}")
    place = job.workspace.stage_dir(spec.directory)
    replace_folder(output, place)
    job.manifest.record(spec.name, replace(record, files=files, artifact_digest=table_digest(files)))
    logger.info("Stage %s: finished in %s, %s of CPU", spec.name, duration(record.wall_s), duration(record.user_cpu_s))
    gc.collect()
    return Artifact(kind=spec.kind, directory=place, digest=planned.key)


def _prepare_folder(job: Job, planned: PlannedStage, output: Path) -> bool:
    """Empty the partial folder unless it holds an earlier attempt at the same result; whether it does."""
    place = job.workspace.stage_dir(planned.spec.directory)
    _check_own(job, place)
    if not output.exists() and not planned.forced and _key_of(place).get("key") == planned.key:
        _take_back(job, planned, place, output)
    key = _key_of(output)
    same = key.get("key") == planned.key and (not planned.forced or key.get("run") == job.run_id)
    if same:
        return True
    remove_folder(output)
    output.mkdir(parents=True)
    atomic_write_json(output / KEY_FILE, {"key": planned.key, "run": job.run_id})
    return False


def _check_own(job: Job, place: Path) -> None:
    """Whether the folder that a result is to replace is one of this job's: MODEL_PATH may be a folder with much else in it.

    Raises:
        DataError: it is somebody else's.
    """
    known = {record.directory for record in job.manifest.current.stages.values()}
    if place.is_dir() and any(place.iterdir()) and place.name not in known and not (place / KEY_FILE).is_file():
        raise DataError(f"{place} holds files that this job did not write. Move it away, or choose another MODEL_PATH.")


def _take_back(job: Job, planned: PlannedStage, place: Path, output: Path) -> None:
    """Go on from a result that was put in place under the same key: unrecorded because of a kill, or damaged since.

    Files that are not those that the manifest knows are removed, so that the stage makes them again and no others.
    """
    record = job.manifest.current.stages.get(planned.spec.name)
    place.rename(output)
    if record is None or record.key != planned.key or record.status is not Status.FINISHED:
        return
    for name, found in describe_folder(output).items():
        if record.files.get(name) != found:
            (output / name).unlink()


def _key_of(directory: Path) -> Mapping[str, object]:
    try:
        found = json.loads((directory / KEY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _opening_record(job: Job, planned: PlannedStage, tokens: Tokens | None, resumed: bool) -> StageRecord:
    spec, before = planned.spec, job.manifest.current.stages.get(planned.spec.name)
    earlier = before if resumed and before is not None and before.key == planned.key else None
    return StageRecord(
        key=planned.key,
        algorithm=job.algorithm.name,
        version=spec.version,
        settings=without_secrets(dict(spec.settings), os.environ),
        input_key=planned.input_key,
        tokens_key=planned.tokens_key,
        request=request_record(spec),
        data=job.data if spec.tokens is not None else "none",
        kind=spec.kind,
        directory=spec.directory,
        status=Status.RUNNING,
        started=earlier.started if earlier else now(),
        attempts=earlier.attempts + 1 if earlier else 1,
        user_cpu_s=earlier.user_cpu_s if earlier else 0.0,
        wall_s=earlier.wall_s if earlier else 0.0,
        peak_memory_bytes=earlier.peak_memory_bytes if earlier else 0,
        peak_cuda_memory_bytes=earlier.peak_cuda_memory_bytes if earlier else None,
        tokens=without_secrets(dict(tokens.record), os.environ) if tokens else {},
        predicted=job.predictions.get(spec.name),
    )


def _context(job: Job, spec: StageSpec, tokens: Tokens | None, output: Path, scratch: Path, attempt: _Attempt) -> StageContext:
    return StageContext(
        source=job.source,
        tokens=tokens.train if tokens else (),
        validation_tokens=tokens.validation if tokens else (),
        output_dir=output,
        scratch_dir=scratch,
        device=job.device,
        seed=spec.tokens.seed if spec.tokens else 0,
        metrics=lambda values: job.metrics({"stage": spec.name, **values}),
        progress=lambda description, total: _beating(job.parts.terminal.progress(description, total), attempt.beat),
    )


class _Attempt:
    """The time a stage runs: its line in the manifest says so, and what it cost, whatever ends it.

    The cost so far is also written now and then, so that a killed stage loses only seconds of its account.
    """

    def __init__(self, manifest: ManifestFile, name: str, record: StageRecord) -> None:
        self._manifest, self._name, self._record = manifest, name, record
        self._meter, self._warnings, self._last = Meter(), _WarningCollector(), time.monotonic()

    def __enter__(self) -> Self:
        self._manifest.record(self._name, self._record)
        logging.getLogger().addHandler(self._warnings)
        self._meter.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._meter.__exit__(kind, error, trace)
        logging.getLogger().removeHandler(self._warnings)
        if kind is not None:
            status = Status.INTERRUPTED if issubclass(kind, KeyboardInterrupt | RankLostError) else Status.FAILED
            self._manifest.record(self._name, self.closed(status))

    def beat(self) -> None:
        """Called at every step of the stage's progress."""
        if time.monotonic() - self._last >= _HEARTBEAT_SECONDS:
            self._last = time.monotonic()
            self._manifest.record(self._name, _costed(self._record, self._meter.usage()))

    def closed(self, status: Status) -> StageRecord:
        """The record of the ended attempt."""
        record = _costed(self._record, self._meter.usage())
        return replace(record, status=status, finished=now(), warnings=tuple(self._warnings.found))


class _WarningCollector(logging.Handler):
    """Keeps the distinct warnings that are logged while it is attached."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        message = record.getMessage()
        if message not in self.found and len(self.found) < _MAX_WARNINGS:
            self.found.append(message)


@contextmanager
def _beating(
    display: AbstractContextManager[Callable[[str], None]], beat: Callable[[], None]
) -> Iterator[Callable[[str], None]]:
    with display as step:

        def step_and_beat(note: str) -> None:
            """One step of the display and one of the account."""
            step(note)
            beat()

        yield step_and_beat


def _costed(record: StageRecord, usage: Usage) -> StageRecord:
    """The record with this attempt's cost added to that of the attempts before."""
    cuda = [peak for peak in (record.peak_cuda_memory_bytes, usage.peak_cuda_memory_bytes) if peak is not None]
    return replace(
        record,
        user_cpu_s=round(record.user_cpu_s + usage.user_cpu_s, 3),
        wall_s=round(record.wall_s + usage.wall_s, 3),
        peak_memory_bytes=max(record.peak_memory_bytes, usage.peak_memory_bytes),
        peak_cuda_memory_bytes=max(cuda, default=None),
    )


def _jsonable(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
