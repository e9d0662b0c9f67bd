import errno
import os

import pytest
from safetensors import SafetensorError

from configs.errors import DataError, MissingEnvironmentError
from jobs.execution.storage import naming_places
from tests.support.recipes import SMALL, load


@pytest.fixture
def loaded(tmp_path):
    return load(SMALL, tmp_path, f"USER_FOLDER={tmp_path / 'user'}")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_file_and_the_room(loaded, tmp_path, number):
    place = tmp_path / "deep" / "file"
    with (
        pytest.raises(MissingEnvironmentError, match=rf"^{place}: {os.strerror(number)} \([\d.]+ MB free"),
        naming_places(loaded),
    ):
        raise OSError(number, os.strerror(number), str(place))


def test_a_library_that_passes_on_the_words_alone_is_understood(loaded, tmp_path):
    with pytest.raises(MissingEnvironmentError, match=f"^{tmp_path / 'user'}/jobs/.*No space left"), naming_places(loaded):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_closed_folder_names_the_keys_that_move_it(loaded, number):
    with pytest.raises(DataError, match=f"^/there: {os.strerror(number)}.*USER_FOLDER"), naming_places(loaded):
        raise OSError(number, os.strerror(number), "/there")


@pytest.mark.parametrize(("number", "advice"), [(errno.EIO, "does not answer"), (errno.EMFILE, "ulimit -n")])
def test_a_failing_disk_and_too_many_files_are_no_traceback(loaded, number, advice):
    with pytest.raises(MissingEnvironmentError, match=f"^/there: {os.strerror(number)}.*{advice}"), naming_places(loaded):
        raise OSError(number, os.strerror(number), "/there")


def unreadable(number):
    """An error with advice that was made from one of the system's."""
    error = DataError("the text cannot be read")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


def test_a_full_disk_behind_another_error_counts_and_a_closed_folder_does_not(loaded):
    with pytest.raises(MissingEnvironmentError, match="No space left"), naming_places(loaded):
        raise unreadable(errno.ENOSPC)
    with pytest.raises(DataError, match="the text cannot be read"), naming_places(loaded):
        raise unreadable(errno.EACCES)


def test_other_errors_pass(loaded):
    with pytest.raises(FileNotFoundError), naming_places(loaded):
        raise FileNotFoundError(errno.ENOENT, "no such file", "/x")
