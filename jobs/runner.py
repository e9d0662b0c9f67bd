"""Runs a job: the one loop over its stages, and what has to be true before and after it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import yaml

from algorithms.base import Artifact, Process
from algorithms.modeling.files import atomic_write_json, atomic_write_text
from algorithms.workload import ModelShapes
from configs.errors import CertificateError, DataError, RankLostError, UploadError
from configs.loader import LoadedRecipe
from jobs.earlier_jobs import lineage
from jobs.estimation.forecast import forecast
from jobs.estimation.requirements import require
from jobs.estimation.room import Room
from jobs.evaluation import RESULTS, Questions, Sources, Subject, file_memory, load_questions, placed
from jobs.execution.collaborators import Collaborators
from jobs.execution.conclusion import Outcome, conclude, measure
from jobs.execution.interruption import JobInterrupted, interruptible
from jobs.execution.preparation import Materials, describe_data, gather, push_command, recipe_digest, versions
from jobs.execution.stage import Job, run_stage
from jobs.logs import log_failure, logging_to
from jobs.manifest import ManifestFile, RunRecord, Status, read_manifest
from jobs.model_layout import check_length
from jobs.planning import Action, Plan
from jobs.processes import this_process
from jobs.processes.crew import Crew
from jobs.processes.environment import note_on_processes
from jobs.reporting.plan_text import JobPlan, describe_job
from jobs.reporting.secrets import without_secrets
from jobs.reporting.summary import Summary, as_tables, as_text
from jobs.reporting.tracking import check_tracking, tracking
from jobs.results.hub import plan_upload, send, send_if_asked
from jobs.results.publishing import check_target
from jobs.results.stored_model import StoredModel, load_stored
from jobs.scoring.figures import Figures, describe, describe_task
from jobs.workspace import Workspace, open_workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a job came to. ``plan`` and ``summary`` are None where nothing but an evaluation was asked for."""

    job_dir: Path
    plan: Plan | None = None
    summary: Summary | None = None
    figures: Figures = field(default_factory=Figures)


def run_job(loaded: LoadedRecipe, *, parts: Collaborators | None = None, crew: Crew | None = None) -> JobResult:
    """Run a recipe to its end, from wherever an earlier run of the same job has got to.

    Args:
        loaded: the recipe.
        parts: what the runner works with; the real collaborators by default.
        crew: the processes that share the stages that can be shared; this one alone by default.

    Raises:
        DataError: something in the recipe, the data, the model or the job folder that the user can put right.
        RankLostError: one of several processes is gone.
        RankFailedError: one of several processes met an error of its own.
        CertificateError: an exported format is read differently by its client; everything else was written.
        UploadError: PUSH_TO_HUB asks for an upload, which failed; the result is complete.
        JobInterrupted: SIGTERM or Ctrl-C; a ``KeyboardInterrupt`` whose message says how to resume.
    """
    parts = parts or Collaborators()
    crew = crew or Crew()
    if loaded.parameters.evaluate_only:
        return evaluate_only(loaded, parts=parts)
    with _opened(loaded, parts, crew) as (materials, job), _Run(job, loaded, materials.run):
        questions = _questions(job)
        plan = materials.verified_plan(job.manifest.current)
        materials.preflight(plan)
        _announce(plan)
        job = _foreseen(materials, job, plan)
        if plan.runs:
            parts.check_weights(job.source, job.workspace, parts.terminal.progress)
        outcome = _execute(materials, job, plan, questions)
        summary = conclude(outcome)
        parts.terminal.show(as_tables(summary), as_text(summary))
        command = push_command(loaded)
        send_if_asked(loaded.recipe.push_to_hub, job.workspace, job.manifest, parts.open_hub, command)
        return JobResult(job_dir=job.workspace.job_dir, plan=plan, summary=summary, figures=summary.figures)


def plan_job(loaded: LoadedRecipe, *, parts: Collaborators | None = None, with_probe: bool = False) -> JobPlan:
    """Say what :func:`run_job` would do, without doing it. A model or text that is not there becomes a note.

    ``with_probe`` measures the work on the model's first blocks, so that the expected cost is no guess.

    Raises:
        DataError: STAGES or ``overwrite`` cannot be followed, or the job folder cannot be used.
    """
    parts = parts or Collaborators()
    workspace = open_workspace(loaded.recipe)
    manifest = read_manifest(workspace.manifest_path)
    check_target(workspace.job_dir, manifest.published)
    this_process.apply_visible_devices(loaded.recipe.cuda_id)
    device = this_process.choose_device(Process())
    return describe_job(loaded, workspace, manifest, parts, device, with_probe=with_probe)


def evaluate_only(loaded: LoadedRecipe, directory: Path | None = None, *, parts: Collaborators | None = None) -> JobResult:
    """Score the uncompressed model, or with ``directory`` a job's artifact or any Hugging Face folder beside it.

    Raises:
        DataError: the recipe names no texts under EVALUATION, or the folder holds no model.
    """
    parts = parts or Collaborators()
    with _opened(loaded, parts, Crew()) as (materials, job):
        questions = _questions(job)
        if questions is None:
            raise DataError("EVALUATION names no texts; to evaluate, write for example EVALUATION: {perplexity: [wikitext2]}.")
        stored = None if directory is None else load_stored(directory, materials)
        subject = None if stored is None else _subject(stored, job, questions)
        memory = file_memory(job.workspace.evaluation_dir / "progress.json")
        measured = measure(job, questions, subject, memory=memory, mark={"model": str(directory or job.source.name)})
        record = {
            "model": str(directory or job.source.name),
            "key": questions.key(None if stored is None else stored.digest),
            "versions": versions(job.crew.size),
        }
        atomic_write_json(job.workspace.job_dir / RESULTS, {**record, **measured.record()})
        shown = "\n".join([*map(describe, measured.figures.corpora), *map(describe_task, measured.figures.tasks)])
        parts.terminal.show(shown, shown)
        return JobResult(job_dir=job.workspace.job_dir, figures=measured.figures)


def _subject(stored: StoredModel, job: Job, questions: Questions) -> Subject:
    product, published = (stored.algorithm or job.algorithm).product, job.manifest.current.published
    # Another model than the job's own result has a folder of its own: the job's figures stay what they are.
    label = product if published is not None and published.key == stored.digest else f"{product}-{stored.digest[:8]}"
    return Subject(key=stored.digest, label=label, open=lambda: placed(stored.open(), job.device, questions.settings))


def push_result(loaded: LoadedRecipe, *, is_dry_run: bool = False, parts: Collaborators | None = None) -> tuple[str, ...]:
    """Upload what a job has left to the recipe's PUSH_TO_HUB, or only say what would be sent.

    Returns:
        The lines that list it.

    Raises:
        DataError: the recipe names no repository, or there is no result that may be uploaded.
        UploadError: the hub cannot be reached, or does not accept it.
    """
    parts = parts or Collaborators()
    workspace = open_workspace(loaded.recipe)
    manifest = read_manifest(workspace.manifest_path)
    upload = plan_upload(loaded.recipe.push_to_hub, workspace, manifest, full=not is_dry_run)
    parts.terminal.show("\n".join(upload.lines()), "\n".join(upload.lines()))
    if not is_dry_run:
        with logging_to(workspace.logs_dir, Crew().process, parts.terminal), parts.lock(workspace), interruptible():
            send(upload, ManifestFile(workspace.manifest_path), parts.open_hub, push_command(loaded))
    return tuple(upload.lines())


def _foreseen(materials: Materials, job: Job, plan: Plan) -> Job:
    """The job with what it is expected to cost, once it is known to fit the machine.

    Raises:
        DataError: the disk is too small for it.
        MemoryShortageError: the memory is.
    """
    expected = forecast(materials, plan, job.manifest.current, job.device)
    if expected.predictions:
        room, shapes = Room.here(job.workspace.job_dir, job.device), ModelShapes.of(job.source)
        require(materials.loaded, expected, room, shapes, written=materials.written_bytes())
    return replace(job, predictions=expected.predictions)


def _execute(materials: Materials, job: Job, plan: Plan, questions: Questions | None) -> Outcome:
    """The loop over the stages."""
    source = job.source
    artifact, given = Artifact(kind="model", directory=source.directory, digest=source.digest), None
    for planned in plan.stages:
        if planned.action is Action.SKIP:
            continue
        # The model itself is no earlier form of the result, so the first stage's input does not count.
        given = artifact if planned is not plan.stages[0] and artifact.digest == planned.input_key else None
        if planned.action is Action.REUSE:
            given = given if materials.is_intact(given) else None
            artifact = materials.artifact(planned)
            continue
        artifact = run_stage(job, planned, artifact)
        job.manifest.note_redone(planned.spec.name)
    return Outcome(
        job=job,
        plan=plan,
        artifact=artifact,
        given=given,
        questions=questions,
        loaded=materials.loaded,
    )


@contextmanager
def _opened(loaded: LoadedRecipe, parts: Collaborators, crew: Crew) -> Iterator[tuple[Materials, Job]]:
    """Device, folders, log, lock and manifest of a job; all given back on leaving, the manifest told how it ended."""
    recipe = loaded.recipe
    check_tracking(loaded)
    notes = (note_on_processes(recipe), this_process.apply_visible_devices(recipe.cuda_id))
    workspace = open_workspace(recipe)
    check_target(workspace.job_dir, read_manifest(workspace.manifest_path).published)
    workspace.create()
    with (
        logging_to(workspace.logs_dir, crew.process, parts.terminal),
        parts.lock(workspace),
        interruptible(),
        tracking(loaded, workspace) as track,
    ):
        workspace.sweep()
        for warning in (*loaded.warnings, *(note for note in notes if note)):
            logger.warning("%s", warning)
        if recipe.trust_remote_code:
            logger.warning("TRUST_REMOTE_CODE: code that comes with %s may run on this machine, as you.", recipe.model)
        manifest = ManifestFile(workspace.manifest_path)
        source = parts.resolve_model(recipe, workspace)
        materials = gather(loaded, workspace, source, manifest.current, parts)
        job = Job(
            recipe=recipe,
            workspace=workspace,
            source=source,
            algorithm=materials.algorithm,
            manifest=manifest,
            parts=parts,
            crew=crew,
            device=this_process.choose_device(crew.process),
            run_id=materials.run.id,
            data=without_secrets(describe_data(recipe), os.environ),
            track=track,
        )
        yield materials, job


class _Run:
    """The manifest's line about this call of the runner."""

    def __init__(self, job: Job, loaded: LoadedRecipe, record: RunRecord) -> None:
        self._job, self._loaded, self._record = job, loaded, record

    def __enter__(self) -> None:
        job, recipe = self._job, self._loaded.recipe
        made = lineage(recipe, job.workspace)
        if made is not None:
            logger.info("MODEL %s is %s, in %s", recipe.model, made, made.folder)
        shown = without_secrets(self._loaded.resolved, os.environ)
        atomic_write_text(job.workspace.recipe_path, yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
        job.manifest.update(
            job=f"{recipe.job_service}/{recipe.job_id}",
            algorithm=job.algorithm.name,
            recipe_digest=recipe_digest(self._loaded),
            model={
                "name": without_secrets(job.source.name, os.environ),
                "digest": job.source.digest,
                "parameters": job.source.num_parameters,
            },
            lineage=made,
            paths=without_secrets(_paths(job.workspace, job.source.directory), os.environ),
            versions=versions(job.crew.size),
            run=self._record,
            warnings=self._loaded.warnings,
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = Status.FINISHED
        # A verdict is an end, not a stop on the way, and so is an upload that fails.
        if kind is not None and not issubclass(kind, CertificateError | UploadError):
            stopped = issubclass(kind, KeyboardInterrupt | RankLostError)
            status = Status.INTERRUPTED if stopped else Status.FAILED
        self._job.manifest.close_run(status)
        if status is Status.FAILED and error is not None:
            log_failure(error)
        if isinstance(error, RankLostError):
            log_failure(error)
        elif status is Status.INTERRUPTED:
            message = "Interrupted; what is finished is kept. The same command resumes where it stopped."
            logger.warning("%s", message)
            raise JobInterrupted(message) from error


def _paths(workspace: Workspace, model: Path) -> dict[str, str]:
    return {
        "job": str(workspace.job_dir),
        "logs": str(workspace.logs_dir),
        "cache": str(workspace.cache_dir),
        "model": str(model),
    }


def _questions(job: Job) -> Questions | None:
    """What EVALUATION asks, read before the work starts: a missing text or task should not show after hours."""
    settings = job.recipe.evaluation
    if settings is None or settings.is_empty:
        return None
    positions = job.source.config.to_dict().get("max_position_embeddings")
    if settings.corpora:
        check_length(job.source, settings.sequence_length, "Lower EVALUATION.sequence_length")
    sources = Sources.of(job.parts, job.recipe, job.source, job.workspace)
    return load_questions(settings, job.parts, sources, positions)


def _announce(plan: Plan) -> None:
    for stage in plan.stages:
        logger.info("Plan: %s: %s (%s)", stage.spec.name, stage.action.value, stage.reason)
    for warning in plan.warnings:
        logger.warning("%s", warning)
