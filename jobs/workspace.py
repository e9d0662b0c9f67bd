"""Every path of a job, and the lock that keeps two runs out of one job folder.

    <user_folder>/  .cache/  datasets/<name>/  models/<org>/<name>/  logs/<service>/<id>/  jobs/<service>/<id>/

A name that comes from a recipe (JOB_SERVICE, JOB_ID, a data set, a model) must stay inside its folder; a path that the
recipe states (MODEL_PATH, LOGGING_PATH, CACHE_PATH, DATA_PATH) is the user's own and is taken as it stands.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self, TextIO

from configs.errors import DataError
from configs.recipe import Recipe

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
LOCK = ".job.lock"
# A killed process may hold its lock for a moment longer, while its memory is given back.
_SECONDS_TO_DIE, _SECONDS_A_LOOK = 10.0, 0.1
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # it writes a file under such a name first, too
_OF_A_PROCESS = re.compile(r"\.\d+\.partial$")  # algorithms.modeling.files puts the process's number into such a name
_FOLDERS = ("tmp", "exports", "evaluation")  # below a job's own, where it writes
LEGACY_CALIBRATION = "caliberation"  # the spelling that older commands and guides use for tmp/calibration


class JobLockedError(DataError):
    """Another process runs the same job."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The folders and files of one job. Building it touches nothing; :meth:`create` makes the folders."""

    user_folder: Path
    job_service: str
    job_id: str
    job_dir: Path
    logs_dir: Path
    cache_dir: Path

    @property
    def tmp_dir(self) -> Path:
        """Holds the stages' results; may be deleted once the job is certified."""
        return self.job_dir / "tmp"

    @property
    def manifest_path(self) -> Path:
        """Digests, status, versions, times and memory of each stage."""
        return self.job_dir / MANIFEST

    @property
    def metrics_path(self) -> Path:
        """One JSON line a measurement."""
        return self.job_dir / "metrics.jsonl"

    @property
    def recipe_path(self) -> Path:
        """The recipe as it was resolved for the run."""
        return self.job_dir / RECIPE

    @property
    def certificate_path(self) -> Path:
        """The verdict of each format's client."""
        return self.job_dir / "certificate.json"

    @property
    def report_path(self) -> Path:
        """What the job came to, on one page."""
        return self.job_dir / "report.html"

    @property
    def evaluation_dir(self) -> Path:
        """Results of tasks: ``base``, or what the job makes, then the task."""
        return self.job_dir / "evaluation"

    @property
    def lock_path(self) -> Path:
        """The file that a running job holds; outside ``tmp/``, which the job itself may delete."""
        return self.job_dir / LOCK

    @property
    def datasets_dir(self) -> Path:
        """Data sets by name, as ``save_to_disk`` writes them."""
        return self.user_folder / "datasets"

    @property
    def models_dir(self) -> Path:
        """Models by name: ``<org>/<name>``."""
        return self.user_folder / "models"

    @property
    def tokens_dir(self) -> Path:
        """The token cache, one folder a key."""
        return self.tmp_dir / "tokenized_dataset"

    def stage_dir(self, name: str) -> Path:
        """The finished result of the stage whose ``StageSpec.directory`` is ``name``."""
        return self.tmp_dir / name

    def partial_dir(self, name: str) -> Path:
        """The unfinished result of that stage; renamed to :meth:`stage_dir` when the stage returns."""
        return self.tmp_dir / f".{name}.partial"

    def scratch_dir(self, name: str) -> Path:
        """Room for what that stage needs only while it runs."""
        return self.tmp_dir / f".{name}.scratch"

    def create(self) -> None:
        """Makes the folders, and the link ``tmp/caliberation`` to ``tmp/calibration``.

        Raises:
            DataError: A folder cannot be made; names the folder and the key that moves it.
        """
        folders = {
            self.job_dir: "USER_FOLDER or MODEL_PATH",
            self.tmp_dir: "USER_FOLDER or MODEL_PATH",
            self.logs_dir: "LOGGING_PATH",
            self.cache_dir: "CACHE_PATH",
            self.models_dir: "USER_FOLDER",
            self.datasets_dir: "USER_FOLDER",
        }
        for folder, key in folders.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(
                    f"{folder}: the folder cannot be made ({error.strerror}). Choose another place with {key}."
                ) from error
        link = self.tmp_dir / LEGACY_CALIBRATION
        if not link.is_symlink() and not link.exists():
            try:
                link.symlink_to("calibration", target_is_directory=True)
            except OSError as error:  # a file system without links loses only the old spelling
                logger.warning("%s could not be linked to calibration: %s", link, error.strerror)

    def sweep(self) -> None:
        """Remove what a killed run left half written, once the lock is held: files and folders that no later run goes on with.

        A stage's own partial folder stays, since the stage resumes from it. So does everything where no job writes: MODEL_PATH
        may be a folder with much else in it.
        """
        own = [*self.job_dir.glob(".*"), *(path for name in _FOLDERS for path in (self.job_dir / name).rglob(".*"))]
        unfinished = [path for path in own if _OF_SAFETENSORS.fullmatch(path.name)]
        partial = [path for path in own if path.name.endswith(".partial")]
        for path in [*unfinished, *partial, *self.tmp_dir.glob(".*.replaced")]:
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.is_dir() and (path.suffix == ".replaced" or _OF_A_PROCESS.search(path.name)):
                shutil.rmtree(path)


def open_workspace(recipe: Recipe) -> Workspace:
    """The workspace of a recipe, as absolute paths; nothing is created.

    Raises:
        DataError: JOB_SERVICE or JOB_ID lead out of the user folder.
    """
    user_folder = recipe.user_folder.expanduser().absolute()
    name = f"{recipe.job_service}/{recipe.job_id}"
    for key, part in (("JOB_SERVICE", recipe.job_service), ("JOB_ID", recipe.job_id)):
        check_name(part, key)
    job_dir = recipe.model_path.expanduser().absolute() if recipe.model_path else inside(user_folder / "jobs", name, "JOB_ID")
    logs_dir = (
        recipe.logging_path.expanduser().absolute() if recipe.logging_path else inside(user_folder / "logs", name, "JOB_ID")
    )
    cache_dir = recipe.cache_path.expanduser().absolute() if recipe.cache_path else user_folder / ".cache"
    return Workspace(
        user_folder=user_folder,
        job_service=recipe.job_service,
        job_id=recipe.job_id,
        job_dir=job_dir,
        logs_dir=logs_dir,
        cache_dir=cache_dir,
    )


def check_name(name: str, key: str) -> None:
    """Refuses a name that would lead out of the folder it is put under.

    Raises:
        DataError: The name is empty, absolute, starts at a home folder, holds ``..`` or a control character.
    """
    parts = PurePosixPath(name).parts
    unprintable = any(ord(character) < 32 for character in name)
    if not parts or parts[0] in ("/", "//") or parts[0].startswith("~") or ".." in parts or "\\" in name or unprintable:
        raise DataError(
            f"{key}={name!r} is not a name inside the user folder: no '..', no absolute path, not empty. Rename it."
        )


def inside(folder: Path, name: str, key: str) -> Path:
    """``folder/name``, sure to lie inside ``folder`` even where links stand below it; ``folder`` itself may be a link.

    Raises:
        DataError: The name, or a link below ``folder``, leads out of it.
    """
    check_name(name, key)
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"{key}={name!r}: {path} is a link that leads out of {folder}, to {path.resolve()}. Rename it or remove the link."
        )
    return path


class JobLock:
    """Holds a job for one process; used as a context manager.

    The lock is the kernel's (flock), so it ends with its process however that dies: a file left by a killed run is no
    lock. Its text (host, pid, since) only tells a second run who the holder is.

    Args:
        workspace: The job; its folder is made if need be.

    Raises:
        JobLockedError: On entry, when another process holds the job; says which, where and since when.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._path = workspace.lock_path
        self._file: TextIO | None = None
        self._waited = 0.0

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            self._file = self._open()
        left_behind = self._file.read()
        if left_behind:
            logger.info("The last run of this job ended without a goodbye (%s); taking over.", _holder(left_behind))
        self._file.seek(0)
        self._file.truncate()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        self._file.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        self._path.unlink(missing_ok=True)  # before the lock goes, so that a file without text means nothing
        self._file.close()
        self._file = None

    def _open(self) -> TextIO | None:
        """Opens and locks the file; None if its last holder unlinked it between the two steps."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        file = os.fdopen(descriptor, "r+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = file.read()
            file.close()
            if self._waited < _SECONDS_TO_DIE and _is_dying(text):
                self._waited += _SECONDS_A_LOOK
                time.sleep(_SECONDS_A_LOOK)
                return None
            raise JobLockedError(
                f"{self._path.parent}: this job is already running ({_holder(text)}). Wait, end it, or choose another JOB_ID."
            ) from error
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == self._path.stat().st_ino:
                return file
        file.close()
        return None


def _is_dying(text: str) -> bool:
    """Whether the process that a lock names is one of this machine that has been killed, and is only being cleared away."""
    try:
        holder = json.loads(text)
        if holder["host"] != socket.gethostname():
            return False
        known = Path(f"/proc/{int(holder['pid'])}/stat").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return Path("/proc/self").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return known.rpartition(")")[2].split()[:1] in (["Z"], ["X"])


def job_holder(lock: Path) -> str | None:
    """Which process holds a job, in words; None where none does. The lock itself is not touched: a job may be starting.

    A holder on another machine may still live, as far as anybody here can tell.
    """
    try:
        text = lock.read_text(encoding="utf-8")
        holder = json.loads(text)
        host, process = holder["host"], int(holder["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with suppress(PermissionError):  # the process is there, and another user's
        try:
            if host == socket.gethostname():
                os.kill(process, 0)
        except ProcessLookupError:
            return None
    return _holder(text)


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "by a process that has not said its name yet"
