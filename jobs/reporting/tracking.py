"""Figures of a job in wandb, beside metrics.jsonl: the same names, the same numbers, and the line's number as the step.

Only where the recipe asks for it. Nothing that wandb does, or fails to do, ends a job.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from algorithms.modeling.files import atomic_write_json
from configs.errors import DataError, MissingEnvironmentError
from configs.loader import LoadedRecipe
from configs.recipe import TrackingConfig
from jobs.reporting.secrets import has_wandb_key, without_secrets
from jobs.workspace import Workspace

logger = logging.getLogger(__name__)

RUN_FILE = "wandb.json"  # in the job folder: under which id wandb knows the job
PROJECT = "bitpress"
OFFLINE = "offline"
MODES = ("online", OFFLINE, "disabled", "shared", "dryrun", "run")
_SECONDS_TO_START, _SECONDS_TO_END = 30.0, 60.0
_INSTALL = 'pip install "wandb>=0.31,<0.32"'

Track = Callable[[Mapping[str, object]], None]


class _WandbRun(Protocol):
    """What is used of wandb's run."""

    def log(self, data: dict[str, Any], step: int) -> None:
        """Keep one line of figures."""

    def finish(self, exit_code: int) -> None:
        """Write everything and close."""


def wants_tracking(loaded: LoadedRecipe) -> bool:
    """Whether TRACKING asks for wandb or, where it says neither yes nor no, a key of the algorithm's."""
    asked = None if loaded.recipe.tracking is None else loaded.recipe.tracking.wandb
    return loaded.parameters.tracks if asked is None else asked


def check_tracking(loaded: LoadedRecipe, environment: Mapping[str, str] = os.environ) -> None:
    """See to it, before a job starts, that what the recipe asks for is there.

    Raises:
        MissingEnvironmentError: wandb is not installed.
        DataError: WANDB_MODE is none of wandb's modes.
    """
    if not wants_tracking(loaded):
        return
    _wandb()
    mode = environment.get("WANDB_MODE")
    if mode and mode not in MODES:
        raise DataError(f"WANDB_MODE={mode}: wandb knows {', '.join(MODES)}. Change or unset the variable.")


@contextmanager
def tracking(loaded: LoadedRecipe, workspace: Workspace, environment: Mapping[str, str] = os.environ) -> Iterator[Track]:
    """What takes each line that metrics.jsonl has got; it does nothing unless the recipe asks for tracking.

    The job is one run, however often it is resumed. Settings of the recipe come before WANDB_ENTITY, WANDB_PROJECT and
    WANDB_NAME; WANDB_MODE counts, and without it and without a key the run is kept on disk. Yields the function.
    """
    if not wants_tracking(loaded):
        yield lambda line: None
        return
    figures = _Figures(_started(loaded, workspace, environment), _num_lines(workspace.metrics_path))
    ended_well = False
    try:
        yield figures
        ended_well = True
    finally:
        figures.close(0 if ended_well else 1)


class _Figures:
    """Hands lines on, each under its number; the first error ends that, with a warning."""

    def __init__(self, run: _WandbRun | None, num_lines: int) -> None:
        self._run, self._step = run, num_lines

    def __call__(self, line: Mapping[str, object]) -> None:
        if self._run is not None:
            with self._without_trouble():
                self._run.log(dict(line), step=self._step)
        self._step += 1

    def close(self, exit_code: int) -> None:
        """Write what is left; how the job ended is the run's end too."""
        if self._run is not None:
            with self._without_trouble():
                self._run.finish(exit_code=exit_code)

    @contextmanager
    def _without_trouble(self) -> Iterator[None]:
        try:
            yield
        except _troubles() as error:
            logger.warning("Tracking ends here, the job goes on: wandb says: %s", error)
            self._run = None


def _started(loaded: LoadedRecipe, workspace: Workspace, environment: Mapping[str, str]) -> _WandbRun | None:
    """The run, in the mode that was asked for; where that fails, on disk."""
    wandb, mode = _wandb(), environment.get("WANDB_MODE") or None
    if mode is None and not has_wandb_key(environment):
        mode = OFFLINE
    wandb.setup(settings=wandb.Settings(silent=True))  # or it tells the terminal where it has found the key
    for attempt in dict.fromkeys((mode, OFFLINE)):
        try:
            run = wandb.init(**_arguments(wandb, loaded, workspace, environment), mode=attempt)
        except _troubles() as error:
            logger.warning("wandb does not start: %s", error)
            wandb.teardown()  # its process would hold the id
            continue
        _announce(run, attempt)
        return run
    return None


def _arguments(
    wandb: ModuleType, loaded: LoadedRecipe, workspace: Workspace, environment: Mapping[str, str]
) -> dict[str, object]:
    asked = loaded.recipe.tracking or TrackingConfig()
    return {
        "project": asked.project or environment.get("WANDB_PROJECT") or PROJECT,
        "entity": asked.entity or environment.get("WANDB_ENTITY") or None,
        "name": asked.name or environment.get("WANDB_NAME") or workspace.job_id,
        "id": _run_id(workspace),
        "resume": "allow",
        "dir": str(workspace.logs_dir),
        "config": without_secrets(loaded.resolved, environment),
        "settings": wandb.Settings(
            silent=True,
            console="off",  # log.log has it
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # it would hold the command line and the host
            init_timeout=_SECONDS_TO_START,
            finish_timeout=_SECONDS_TO_END,
        ),
    }


def _announce(run: Any, mode: str | None) -> None:  # noqa: ANN401 - wandb's own
    if mode in (OFFLINE, "dryrun"):
        place = Path(run.settings.sync_dir)
        everything = place.parent / f"offline-run-*-{run.id}"
        logger.info("Tracking: wandb writes to %s; to upload the run: wandb sync %s", place, everything)
    else:
        logger.info("Tracking: wandb run %s", run.url or run.id)


def _run_id(workspace: Workspace) -> str:
    """The id of the job's run, from RUN_FILE; made from the job and the time where there is none yet."""
    file = workspace.job_dir / RUN_FILE
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        # wandb never takes an id again whose run was deleted, so the place alone would not do.
        made = f"{socket.gethostname()}:{workspace.job_dir}:{time.time_ns()}"
        run_id = hashlib.sha256(made.encode()).hexdigest()[:12]
        atomic_write_json(file, {"run_id": run_id})
        return run_id


def _num_lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0


def _troubles() -> tuple[type[BaseException], ...]:
    """What wandb's calls raise where it is not this program that is wrong; some stand outside its own hierarchy."""
    known = [_wandb().errors.Error, OSError, RuntimeError, ValueError]
    with suppress(ImportError, AttributeError):
        mailbox, handle = import_module("wandb.sdk.mailbox"), import_module("wandb.sdk.mailbox.mailbox_handle")
        known += [mailbox.MailboxClosedError, handle.HandleAbandonedError, handle.ServerResponseError]
    return tuple(known)


def _wandb() -> ModuleType:
    """wandb, imported when it is first asked for: that takes a second.

    Raises:
        MissingEnvironmentError: it is not installed.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # whoever tracks a job has not asked to report crashes
    try:
        return import_module("wandb")
    except ImportError as error:
        raise MissingEnvironmentError(
            f"The recipe asks for wandb, which is not installed: {_INSTALL}, or TRACKING.wandb=false"
        ) from error
