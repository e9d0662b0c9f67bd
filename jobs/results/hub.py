"""Uploads a result to the hub, where the recipe asks for it: what was published, and nothing else of the job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HTTPError

from configs.errors import DataError, UploadError
from jobs.manifest import Manifest, ManifestFile, now
from jobs.reporting.certificate import Verdict
from jobs.reporting.summary import size
from jobs.results.artifacts import canonical_digest, check_files
from jobs.results.publishing import count_files
from jobs.workspace import Workspace

logger = logging.getLogger(__name__)

_NEVER = ("tmp", "logs")  # folders of a job; what is published never lies there


class HubApi(Protocol):
    """What is used of ``huggingface_hub.HfApi``."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> object:
        """Make a repository, or see that it is there."""
        ...

    def create_commit(self, repo_id: str, operations: Sequence[CommitOperationAdd], *, commit_message: str) -> object:
        """Upload files in one commit."""
        ...


OpenHub = Callable[[], HubApi]


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What would be sent: files below ``folder`` with their sizes in bytes; ``digest`` names their content."""

    repository: str
    folder: Path
    files: Mapping[str, int]
    digest: str

    @property
    def total(self) -> str:
        """Number and size of all files, in words."""
        return f"{count_files(len(self.files))}, {size(sum(self.files.values()))}"

    def lines(self) -> list[str]:
        """As ``push --dry-run`` lists them."""
        width = max(len(name) for name in self.files)
        listed = [f"  {name:<{width}}  {size(count):>9}" for name, count in self.files.items()]
        return [f"{self.folder} -> https://huggingface.co/{self.repository}", *listed, f"  {self.total}"]


def plan_upload(repository: str | None, workspace: Workspace, manifest: Manifest, *, full: bool = True) -> Upload:
    """The files of a finished result.

    Args:
        repository: the recipe's PUSH_TO_HUB.
        workspace: of the job.
        manifest: of the job.
        full: whether the files are read through, or only looked at.

    Raises:
        DataError: no repository is named, the job has no whole result, or a format of it failed its certificate.
    """
    if repository is None:
        raise DataError("The recipe names no repository: add PUSH_TO_HUB: org/name, or PUSH_TO_HUB=org/name to the command.")
    published, certificate = manifest.published, manifest.certificate
    if published is None or not published.key or certificate is None:
        raise DataError(f"{workspace.job_dir} holds no finished result yet. Run the job first.")
    failed = [entry["format"] for entry in certificate["formats"] if entry["verdict"] == Verdict.FAILED]
    if failed:
        raise DataError(f"{', '.join(failed)} failed the certificate; a result that is not what it should be is not uploaded.")
    records = {name: record for name, record in sorted(published.files.items()) if _may_leave(name)}
    state = check_files(workspace.job_dir, records, full=full)
    if not state.intact:
        lost = "; ".join(state.problems[:3]) or f"{', '.join(list(records)[:3])} gone"
        raise DataError(f"{workspace.job_dir}: {lost} since the job. Run the job again.")
    files = {name: record.size for name, record in records.items()}
    if workspace.certificate_path.is_file():
        files[workspace.certificate_path.name] = workspace.certificate_path.stat().st_size
    digest = canonical_digest([repository, {name: record.digest for name, record in records.items()}])
    return Upload(repository=repository, folder=workspace.job_dir, files=files, digest=digest)


def send(upload: Upload, manifest: ManifestFile, open_api: OpenHub, command: str) -> None:
    """Upload, and note in the manifest that it is done. A new repository is private; one that is there stays as it is.

    Files of the repository that are not among those of the upload stay.

    Args:
        upload: what to send.
        manifest: of the job.
        open_api: gives the hub.
        command: what repeats the upload.

    Raises:
        UploadError: the hub cannot be reached, or does not accept it. The result is complete all the same.
    """
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=upload.folder / name) for name in upload.files]
    try:
        api = open_api()
        api.create_repo(upload.repository, private=True, exist_ok=True)
        api.create_commit(upload.repository, operations, commit_message=f"Bitpress: {upload.total}")
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise UploadError(
            f"PUSH_TO_HUB {upload.repository}: the upload failed ({type(error).__name__}: {error}). The result is complete, in "
            f"{upload.folder}. It takes a token with write access, in HF_TOKEN or from hf auth login. To repeat it: {command}"
        ) from error
    manifest.update(uploaded={"repository": upload.repository, "digest": upload.digest, "time": now()})
    logger.info("Uploaded %s to https://huggingface.co/%s", upload.total, upload.repository)


def send_if_asked(
    repository: str | None, workspace: Workspace, manifest: ManifestFile, open_api: OpenHub, command: str
) -> None:
    """At the end of a job: upload a result that every format's client has passed, unless it is there already.

    Raises:
        UploadError: as :func:`send` does.
    """
    if repository is None:
        return
    certificate = manifest.current.certificate or {"formats": []}
    unchecked = [entry["format"] for entry in certificate["formats"] if entry["verdict"] != Verdict.PASSED]
    if unchecked or not certificate["formats"]:
        what = f"nobody here could check {', '.join(unchecked)}" if unchecked else "the stages that ran leave no result"
        logger.warning("PUSH_TO_HUB %s: not uploaded, because %s. To upload it: %s", repository, what, command)
        return
    upload = plan_upload(repository, workspace, manifest.current)
    if (manifest.current.uploaded or {}).get("digest") == upload.digest:
        logger.info("https://huggingface.co/%s has this result already", repository)
        return
    send(upload, manifest, open_api, command)


def _may_leave(name: str) -> bool:
    """Whether a published file is one of the result: no hidden file, nothing of the job's own folders."""
    parts = PurePosixPath(name).parts
    return parts[0] not in _NEVER and not any(part.startswith(".") for part in parts)
