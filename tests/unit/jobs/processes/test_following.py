import logging

import pytest

from configs.errors import DataError, ExitCode, MemoryShortageError, RankFailedError, RankLostError
from jobs.execution.interruption import JobInterrupted
from jobs.processes.board import Dismissed
from jobs.processes.following import _Report, follow
from tests.support.fake_job import parts, recipe
from tests.support.ranks.boards import Boards

BROKEN = RuntimeError("[/x/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically caused by much.")


@pytest.fixture
def boards():
    return Boards()


def reported(boards, error):
    """What becomes of an error of rank 1."""
    with pytest.raises(BaseException) as caught, _Report(boards.first) as report, report:  # noqa: PT011
        raise error
    return caught.value


@pytest.mark.parametrize("well", [True, False])
def test_a_job_without_shared_stages_asks_nothing_of_followers(tmp_path, boards, well):
    boards.leader.end(well=well)
    handlers = list(logging.getLogger().handlers)
    assert follow(recipe(tmp_path), 1, parts=parts(tmp_path), board=boards.first) is well
    assert boards.leader.store.check(["gone/1"])
    assert logging.getLogger().handlers == handlers
    assert not list(tmp_path.iterdir()), "not even a log"


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("no data"), 2), (MemoryShortageError("no memory"), 4), (ZeroDivisionError("a bug"), 1)],
)
def test_an_error_is_posted_and_said_here_if_the_leader_does_not(boards, error, code):
    assert reported(boards, error) is error
    failure = boards.leader.failure()
    assert (failure.rank, failure.exit_code) == (1, code)
    assert str(error) in failure.message
    assert ("Traceback" in failure.message) == (code == ExitCode.FAILED)
    with pytest.raises(RankFailedError, match=r"^$"):
        boards.leader.raise_failure()


def test_an_error_that_the_leader_has_heard_of_is_its_to_say(boards, monkeypatch):
    report = _Report(boards.first)
    with pytest.raises(RankFailedError, match=r"^$") as caught, report:  # noqa: PT012
        with pytest.raises(DataError), report:
            raise DataError("no data")
        boards.leader.end(well=False)
        raise DataError("no data")
    assert caught.value.exit_code is ExitCode.RECIPE
    assert boards.leader.store.check(["gone/1"])


def test_what_follows_from_the_leaders_end_is_no_error(boards):
    boards.leader.end(well=False)
    for error in (BROKEN, DataError("no data"), JobInterrupted("stopped by SIGTERM"), Dismissed()):
        assert isinstance(reported(boards, error), Dismissed)
    assert boards.leader.failure() is None


def test_a_connection_that_broke_for_no_known_reason_is_a_lost_rank(boards):
    assert isinstance(reported(boards, BROKEN), RankLostError)
    assert boards.leader.failure() is None, "the leader finds its own words"


def test_a_stop_of_one_rank_alone_is_told_to_the_leader(boards):
    assert isinstance(reported(boards, JobInterrupted("stopped by SIGTERM")), JobInterrupted)
    with pytest.raises(RankLostError, match="Rank 1: stopped by SIGTERM"):
        boards.leader.raise_failure()
