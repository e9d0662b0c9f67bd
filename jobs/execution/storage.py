"""Places that cannot be written to, full or not ours, as one error that names the place and the key that moves it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from configs.errors import DataError, MissingEnvironmentError
from configs.loader import LoadedRecipe
from jobs.execution.memory import causes
from jobs.workspace import open_workspace

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
BROKEN = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE)
_KEPT = "What is finished is kept, and the same command resumes."


@contextmanager
def naming_places(loaded: LoadedRecipe) -> Iterator[None]:
    """Turn what the system says of a full or failing disk or a closed folder into an error that says which, and what to do.

    Raises:
        MissingEnvironmentError: the disk, the quota or the largest allowed file is full, the disk does not answer, or too many
            files are open.
        DataError: a folder or file may not be written, or read.
    """
    try:
        yield
    except (OSError, SafetensorError, DataError) as error:
        number = next((number for cause in causes(error) if (number := _number(cause)) is not None), None)
        # An error that says already what a user can do has one thing left to say: that the disk was full all the same.
        if number not in FULL and (number not in (*CLOSED, *BROKEN) or isinstance(error, DataError)):
            raise
        place = _place(error) or str(open_workspace(loaded.recipe).job_dir)
        if number in FULL:
            raise MissingEnvironmentError(f"{place}: {os.strerror(number)}{_room(place)}. {_FULL_ADVICE} {_KEPT}") from error
        if number in BROKEN:
            advice = _FILES_ADVICE if number in (errno.EMFILE, errno.ENFILE) else _BROKEN_ADVICE
            raise MissingEnvironmentError(f"{place}: {os.strerror(number)}. {advice} {_KEPT}") from error
        raise DataError(f"{place}: {os.strerror(number)}. {_CLOSED_ADVICE} {_KEPT}") from error


_FULL_ADVICE = (
    "Make room (`tmp/` of jobs that are finished may go), raise the limit, or choose another disk with USER_FOLDER, "
    "MODEL_PATH, CACHE_PATH or LOGGING_PATH."
)
_BROKEN_ADVICE = "The disk, or what connects it, does not answer as it should. See that it does, or choose another place."
_FILES_ADVICE = "Raise the number of files that may be open (`ulimit -n`)."
_CLOSED_ADVICE = "Change the permissions, or choose another place with USER_FOLDER, MODEL_PATH, CACHE_PATH or LOGGING_PATH."


def _number(error: BaseException) -> int | None:
    """The system's number for what went wrong. Libraries that are not Python's pass on its words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = str(error)
    return next((number for number in (*FULL, *CLOSED, *BROKEN) if os.strerror(number) in said), None)


def _place(error: BaseException) -> str | None:
    return str(error.filename) if isinstance(error, OSError) and error.filename else None


def _room(place: str) -> str:
    """How much is left where a file should have gone, in words."""
    folder = next(path for path in (Path(place), *Path(place).absolute().parents) if path.is_dir())
    return f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB free on its disk)"
