import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from algorithms.base import Process
from configs.errors import DataError, RankFailedError, RankLostError
from jobs.execution.interruption import JobInterrupted
from jobs.processes import crew as leading
from jobs.processes.board import Failure
from jobs.processes.connection import is_lost_connection
from jobs.processes.crew import Crew
from jobs.processes.group import WatchedStore, backend
from tests.support.ranks.boards import ORDER, Boards

CPU = torch.device("cpu")
BROKEN = RuntimeError("[/x/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically caused by much.")


@pytest.fixture
def boards():
    return Boards()


@pytest.fixture
def crew(boards, monkeypatch):
    """The crew of three ranks whose groups are not opened."""
    monkeypatch.setattr(leading, "SECONDS_TO_GET_READY", 1)
    return Crew(Process(world_size=3), boards.leader)


def test_a_process_alone_needs_no_board():
    with Crew() as crew, crew.stage(ORDER, CPU) as ranks:
        assert (crew.size, ranks.size, ranks.is_main) == (1, 1, True)


def test_the_leader_ends_the_job_for_all(boards, crew):
    with crew:
        assert boards.first.ended() is None
    assert boards.first.ended() is True
    with pytest.raises(DataError), Crew(Process(world_size=3), Boards().leader) as other:
        raise DataError("no data")
    assert other._board.ended() is False


def test_followers_that_do_not_come_are_lost(boards, crew):
    boards.first.say_ready(1)
    with pytest.raises(RankLostError, match="No sign of rank 2"), crew, crew.stage(ORDER, CPU):
        pytest.fail("the stage must not start")
    assert boards.first.next_order(1) == ORDER
    assert boards.first.ended() is False


def under_guard(crew, error):
    """What becomes of an error that a stage ends with."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with pytest.raises(BaseException) as caught, crew, crew._guard, crew._guard:  # noqa: PT011
        raise error
    assert {name: signal.getsignal(name) for name in before} == before
    return caught.value


def test_a_broken_connection_is_a_lost_rank_and_followers_are_sent_away(boards, crew):
    found = under_guard(crew, BROKEN)
    assert isinstance(found, RankLostError)
    assert str(found).startswith(
        "Another rank of the job is gone, or does not answer (Connection closed by peer [127.0.0.1]:1)."
    )
    assert boards.first.ended() is False


@pytest.mark.parametrize("error", [BROKEN, JobInterrupted("stopped by SIGTERM")])
def test_what_a_follower_has_noted_explains_how_it_ended(boards, crew, error):
    boards.first.put_failure(Failure(rank=1, exit_code=2, message="no such file"))
    found = under_guard(crew, error)
    assert isinstance(found, RankFailedError)
    assert (found.exit_code, str(found)) == (2, "Rank 1 of the job failed. no such file")


def test_other_errors_stay_what_they_are(boards, crew):
    boards.first.put_failure(Failure(rank=1, exit_code=75, message="stopped by SIGTERM"))
    for error in (DataError("no data"), JobInterrupted("stopped"), RuntimeError("a bug")):
        assert under_guard(crew, error) is error


@pytest.mark.parametrize("error", [BROKEN, JobInterrupted("stopped by SIGTERM")])
def test_a_store_that_is_gone_as_well_changes_nothing(boards, crew, error, monkeypatch):
    def gone(keys):
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(boards.leader, "store", SimpleNamespace(check=gone))
    found = under_guard(crew, error)
    assert isinstance(found, RankLostError) if error is BROKEN else found is error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (BROKEN, True),
        (dist.DistNetworkError("failed to recv"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (DataError("Connection closed by peer"), False),
        (None, False),
    ],
)
def test_a_lost_connection_is_known_by_its_words(error, lost):
    assert is_lost_connection(error) is lost


def test_a_wait_on_a_watched_store_ends_when_it_is_in_vain():
    def watch():
        raise RankLostError("in vain")

    store = dist.HashStore()
    assert WatchedStore(store, lambda: None).add("x", 2) == 2
    with pytest.raises(RankLostError, match="in vain"):
        WatchedStore(store, watch).add("x", 0)
    assert store.add("x", 0) == 2


def test_ranks_that_share_a_device_talk_over_gloo(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda", 0)
    assert backend(CPU, {"LOCAL_WORLD_SIZE": "2"}) == "gloo"
    assert backend(cuda, {"LOCAL_WORLD_SIZE": "2"}) == "cpu:gloo,cuda:nccl"
    assert backend(cuda, {"LOCAL_WORLD_SIZE": "3"}) == "gloo"
