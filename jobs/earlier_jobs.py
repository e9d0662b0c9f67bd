"""The output of another job as the model of this one: ``MODEL: job://...``, found in the user folder and fit to start from."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from algorithms.registry import config_class
from configs.errors import DataError, UnknownAlgorithm
from configs.names import SERVICES, JobReference
from configs.recipe import Recipe
from jobs.manifest import Lineage, Manifest, Status, read_manifest
from jobs.results.artifacts import FileRecord, check_files
from jobs.results.publishing import CONFIG, format_folder
from jobs.workspace import LOCK, MANIFEST, Workspace, inside, job_holder

PLAIN_FORMATS = ("dense", "padded")  # by name, for advice; whether weights are plain is seen from the files
FAILED = "failed"  # a verdict of a certificate
_STOPPED = {
    Status.RUNNING: "was killed before its end",
    Status.FAILED: "failed in its last run",
    Status.INTERRUPTED: "was interrupted",
}


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A finished job: its folder, its manifest, and the formats it wrote, the first into the folder itself.

    ``failures`` has the formats that failed their certificate, with the reason.
    """

    reference: JobReference
    folder: Path
    manifest: Manifest
    formats: tuple[str, ...]
    failures: Mapping[str, str]

    def place(self, name: str) -> Path:
        """The folder of a format."""
        below = format_folder(name, self.formats)
        return inside(self.folder, below, "MODEL") if below else self.folder

    def files_of(self, name: str) -> dict[str, FileRecord]:
        """The files of a format, without the model card, which is written anew after every evaluation."""
        assert self.manifest.published is not None, "a finished job has published its formats"
        below = PurePosixPath(format_folder(name, self.formats))
        found = {PurePosixPath(file): record for file, record in self.manifest.published.files.items()}
        return {path.name: record for path, record in found.items() if path.parent == below and path.suffix != ".md"}


def earlier_output(reference: JobReference, workspace: Workspace, *, full: bool = False) -> Path:
    """The folder of plain weights that a finished job has left.

    Args:
        reference: the job and its format, as MODEL names them.
        workspace: of the job that wants to start from it.
        full: whether its files are read through, or only looked at.

    Raises:
        DataError: there is no such job, or no single one; it runs, has not finished or has failed its certificate; the format
            is not there, incomplete or not one of plain weights. Says which, and what to do.
    """
    job = _finished(reference, workspace)
    name = reference.format or job.formats[0]
    if name not in job.formats:
        raise _problem(reference, f"that job wrote {', '.join(job.formats)}. {_another_run(job, name)}")
    if name in job.failures:
        raise _problem(reference, f"the certificate of its format {name} failed: {job.failures[name]}")
    folder, files = job.place(name), job.files_of(name)
    state = check_files(folder, files, full=full)
    if not state.intact:
        reason = "; ".join(state.problems[:3]) or f"nothing of it is in {folder}"
        raise _problem(reference, f"its result is not what it wrote ({reason}). Run that job again.")
    if not _is_plain(folder, files):
        raise _problem(reference, f"its format {name} does not hold plain weights. {_plain_way(job, name)}")
    return folder


def lineage(recipe: Recipe, workspace: Workspace) -> Lineage | None:
    """How the recipe's model came about, where an earlier job has made it; that job's result is read through.

    Raises:
        DataError: as :func:`earlier_output`.
    """
    if recipe.model_job is None or recipe.custom_model_path is not None:
        return None
    job, folder = _finished(recipe.model_job, workspace), earlier_output(recipe.model_job, workspace, full=True)
    before, name = job.manifest.lineage, str(job.manifest.model.get("name"))
    model, methods = (name, ()) if before is None else (before.model, before.methods)
    return Lineage(model=model, methods=(*methods, job.manifest.algorithm), folder=str(folder))


def _problem(reference: JobReference, reason: str) -> DataError:
    return DataError(f"MODEL {reference}: {reason}")


def _finished(reference: JobReference, workspace: Workspace) -> _Job:
    folder = _folder(reference, workspace)
    holder = job_holder(folder / LOCK)
    if holder is not None:
        raise _problem(
            reference, f"that job is running ({holder}). Wait for its end; if it has no process any more, run it again."
        )
    manifest = read_manifest(folder / MANIFEST)
    if manifest.run is None:
        raise _problem(reference, f"{folder} holds no finished run. Run that job first.")
    if not manifest.run.status.is_end:
        raise _problem(reference, f"that job {_STOPPED[manifest.run.status]}. Run it to its end first.")
    if manifest.published is None or not manifest.published.key or manifest.certificate is None:
        raise _problem(reference, "that job has ended before its export. Run it without STAGES first.")
    verdicts = manifest.certificate["formats"]
    return _Job(
        reference=reference,
        folder=folder,
        manifest=manifest,
        formats=tuple(entry["format"] for entry in verdicts),
        failures={entry["format"]: entry["reason"] for entry in verdicts if entry["verdict"] == FAILED},
    )


def _folder(reference: JobReference, workspace: Workspace) -> Path:
    """The one folder of a job of this name, other than the folder of the job that asks."""
    root = workspace.user_folder / "jobs"
    services = [reference.service] if reference.service else _services(root)
    places = [inside(root, f"{service}/{reference.job_id}", "MODEL") for service in services]
    found = [place for place in places if (place / MANIFEST).is_file() or (place / LOCK).is_file()]
    others = [place for place in found if place.resolve() != workspace.job_dir.resolve()]
    if len(others) > 1:
        listed = " or ".join(str(JobReference(service=place.parent.name, job_id=reference.job_id)) for place in others)
        raise _problem(reference, f"several jobs have this name. Write {listed}.")
    if others:
        return others[0]
    if found:
        raise _problem(reference, "a job cannot start from its own result. Give this one another JOB_ID, or name another job.")
    raise _problem(reference, f"no job of this name has run below {root}.{_similar(reference, root)} {_ELSEWHERE}")


_ELSEWHERE = "Run it first; if it has a MODEL_PATH, write that folder as MODEL."


def _services(root: Path) -> list[str]:
    known = [service.casefold() for service in SERVICES]
    folders = sorted(root.iterdir()) if root.is_dir() else ()
    return [folder.name for folder in folders if folder.is_dir() and folder.name.casefold() in known]


def _similar(reference: JobReference, root: Path) -> str:
    """A sentence with the jobs whose names come closest, or nothing."""
    jobs = [
        f"{service}/{manifest.parent.name}" for service in _services(root) for manifest in root.glob(f"{service}/*/{MANIFEST}")
    ]
    close = difflib.get_close_matches(reference.job_id, [name.partition("/")[2] for name in jobs], n=3, cutoff=0.5)
    shown = sorted(name for name in jobs if name.partition("/")[2] in close)
    return f" There is {', '.join(shown)}." if shown else ""


def _is_plain(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether a model folder holds weights as its architecture has them: neither coded, nor with a model's code of its own."""
    names = [PurePosixPath(name) for name in files]
    if CONFIG not in files or not any(name.suffix == ".safetensors" for name in names):
        return False
    own_code = any(name.suffix == ".py" for name in names)
    return not own_code and "quantization_config" not in json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _plain_way(job: _Job, name: str) -> str:
    """Where the job has plain weights, or how it comes to write them."""
    for other in job.formats:
        files = job.files_of(other)
        if other != name and check_files(job.place(other), files).intact and _is_plain(job.place(other), files):
            return f"Its format {other} does: MODEL: {_spelled(job, other)}"
    possible = [other for other in PLAIN_FORMATS if other in _writable(job) and other not in job.formats]
    if not possible:
        return f"{job.manifest.algorithm} writes none that does."
    return _another_run(job, possible[0])


def _another_run(job: _Job, name: str) -> str:
    """The advice to let the job write one more format."""
    if name not in _writable(job):
        return f"{job.manifest.algorithm} does not write {name}."
    listed = ", ".join((*job.formats, name))
    return f"Run that job again with EXPORT: [{listed}], then start from MODEL: {_spelled(job, name)}"


def _spelled(job: _Job, name: str) -> JobReference:
    """A format of the job as MODEL names it: a further one by its folder."""
    below = None if name == job.formats[0] else name
    return JobReference(service=job.reference.service, job_id=job.reference.job_id, format=below)


def _writable(job: _Job) -> tuple[str, ...]:
    try:
        return config_class(job.manifest.algorithm).export_formats
    except UnknownAlgorithm:  # a job of another version
        return ()
