"""Runs a job: the one loop over its stages, and what has to be true before and after it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import yaml

from algorithms.base import Artifact, Process
from algorithms.modeling.files import atomic_write_json, atomic_write_text
from algorithms.workload import ModelShapes
from configs.errors import CertificateError, DataError, RankLostError
from configs.loader import LoadedRecipe
from jobs.earlier_jobs import lineage
from jobs.estimation.forecast import forecast
from jobs.estimation.requirements import require
from jobs.estimation.room import Room
from jobs.evaluation import CorpusFigures, Texts, describe, load_texts
from jobs.execution.collaborators import Collaborators
from jobs.execution.conclusion import Outcome, conclude, measure
from jobs.execution.interruption import JobInterrupted, interruptible
from jobs.execution.preparation import Materials, describe_data, gather, recipe_digest, versions
from jobs.execution.stage import Job, run_stage
from jobs.logs import log_failure, logging_to
from jobs.manifest import ManifestFile, RunRecord, Status, read_manifest
from jobs.planning import Action, Plan
from jobs.processes import this_process
from jobs.processes.crew import Crew
from jobs.processes.environment import note_on_processes
from jobs.reporting.plan_text import JobPlan, describe_job
from jobs.reporting.summary import Summary, as_tables, as_text
from jobs.results.publishing import check_target
from jobs.results.stored_model import load_stored
from jobs.workspace import Workspace, open_workspace

logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a job came to. ``plan`` and ``summary`` are None where nothing but an evaluation was asked for."""

    job_dir: Path
    plan: Plan | None = None
    summary: Summary | None = None
    figures: tuple[CorpusFigures, ...] = ()


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
        JobInterrupted: SIGTERM or Ctrl-C; a ``KeyboardInterrupt`` whose message says how to resume.
    """
    parts = parts or Collaborators()
    crew = crew or Crew()
    if loaded.parameters.evaluate_only:
        return evaluate_only(loaded, parts=parts)
    with _opened(loaded, parts, crew) as (materials, job), _Run(job, loaded, materials.run):
        texts = _texts(job)
        plan = materials.verified_plan(job.manifest.current)
        materials.preflight(plan)
        _announce(plan)
        job = _foreseen(materials, job, plan)
        outcome = _execute(materials, job, plan, texts)
        summary = conclude(outcome)
        parts.terminal.show(as_tables(summary), as_text(summary))
        return JobResult(job_dir=job.workspace.job_dir, plan=plan, summary=summary, figures=tuple(summary.figures))


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
        texts = _texts(job)
        if texts is None:
            raise DataError("EVALUATION names no texts; to evaluate, write for example EVALUATION: {perplexity: [wikitext2]}.")
        stored = None if directory is None else load_stored(directory, materials)
        measured = measure(job, texts, None if stored is None else stored.model.to(job.device))
        record = {
            "model": str(directory or job.source.name),
            "key": texts.key(None if stored is None else stored.digest),
            "versions": versions(job.crew.size),
        }
        atomic_write_json(job.workspace.job_dir / EVALUATION_FILE, {**record, **measured.record()})
        shown = "\n".join(describe(figures) for figures in measured.figures)
        parts.terminal.show(shown, shown)
        return JobResult(job_dir=job.workspace.job_dir, figures=measured.figures)


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


def _execute(materials: Materials, job: Job, plan: Plan, texts: Texts | None) -> Outcome:
    """The loop over the stages."""
    source = job.source
    artifact, given = Artifact(kind="model", directory=source.directory, digest=source.digest), None
    for planned in plan.stages:
        if planned.action is Action.SKIP:
            continue
        # The model itself is no earlier form of the result, so the first stage's input does not count.
        given = artifact if planned is not plan.stages[0] and artifact.digest == planned.input_key else None
        if planned.action is Action.REUSE:
            artifact = materials.artifact(planned)
            continue
        artifact = run_stage(job, planned, artifact)
        job.manifest.note_redone(planned.spec.name)
    return Outcome(
        job=job,
        plan=plan,
        artifact=artifact,
        given=given,
        texts=texts,
        keep_intermediate=materials.loaded.parameters.save_intermediate_results,
    )


@contextmanager
def _opened(loaded: LoadedRecipe, parts: Collaborators, crew: Crew) -> Iterator[tuple[Materials, Job]]:
    """Device, folders, log, lock and manifest of a job; all given back on leaving, the manifest told how it ended."""
    recipe = loaded.recipe
    notes = (note_on_processes(recipe), this_process.apply_visible_devices(recipe.cuda_id))
    workspace = open_workspace(recipe)
    check_target(workspace.job_dir, read_manifest(workspace.manifest_path).published)
    workspace.create()
    with logging_to(workspace.logs_dir, crew.process, parts.terminal), parts.lock(workspace), interruptible():
        for warning in (*loaded.warnings, *(note for note in notes if note)):
            logger.warning("%s", warning)
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
            data=describe_data(recipe),
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
        atomic_write_text(job.workspace.recipe_path, yaml.safe_dump(self._loaded.resolved, sort_keys=False, allow_unicode=True))
        job.manifest.update(
            job=f"{recipe.job_service}/{recipe.job_id}",
            algorithm=job.algorithm.name,
            recipe_digest=recipe_digest(self._loaded),
            model={"name": job.source.name, "digest": job.source.digest, "parameters": job.source.num_parameters},
            lineage=made,
            paths=_paths(job.workspace, job.source.directory),
            versions=versions(job.crew.size),
            run=self._record,
            warnings=self._loaded.warnings,
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = Status.FINISHED
        if kind is not None and not issubclass(kind, CertificateError):  # a verdict is an end, not a stop on the way
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


def _texts(job: Job) -> Texts | None:
    """The texts of EVALUATION, read before the work starts: a missing one should not show after hours."""
    settings = job.recipe.evaluation
    if settings is None or not settings.corpora:
        return None
    positions = job.source.config.to_dict().get("max_position_embeddings")
    return load_texts(settings, lambda name: job.parts.corpus_tokens(name, job.recipe, job.source, job.workspace), positions)


def _announce(plan: Plan) -> None:
    for stage in plan.stages:
        logger.info("Plan: %s: %s (%s)", stage.spec.name, stage.action.value, stage.reason)
    for warning in plan.warnings:
        logger.warning("%s", warning)
