import socket
from dataclasses import replace

import pytest

from configs.errors import ExitCode, RankFailedError, RankLostError
from jobs.processes.board import Dismissed, Failure
from tests.support.ranks.boards import ORDER, Boards


@pytest.fixture
def boards():
    return Boards()


def test_orders_reach_every_follower_as_they_were_written(boards):
    boards.leader.put_order(1, ORDER)
    boards.leader.put_order(2, replace(ORDER, stage="other"))
    assert [board.next_order(1) for board in (boards.first, boards.second)] == [ORDER, ORDER]
    assert boards.first.next_order(2).stage == "other"
    assert str(ORDER.given.directory) == "/jobs/b"


@pytest.mark.parametrize("well", [True, False])
def test_the_end_sends_followers_away_and_only_the_first_counts(boards, well):
    boards.leader.end(well=well)
    boards.leader.end(well=not well)
    if well:
        assert boards.first.next_order(1) is None
        return
    with pytest.raises(Dismissed):
        boards.first.next_order(1)


def test_the_leader_waits_for_all_and_names_who_is_missing(boards):
    boards.second.say_ready(1)
    with pytest.raises(RankLostError, match="No sign of rank 1 in 30 seconds"):
        boards.leader.await_ready(1, 30)
    assert boards.now == pytest.approx(30, abs=0.2)
    boards.first.say_ready(1)
    boards.leader.await_ready(1, 30)
    with pytest.raises(RankLostError, match="rank 1, 2 in"):
        boards.leader.await_ready(2, 1)


def test_a_failure_ends_the_leaders_wait_with_what_it_says(boards):
    boards.second.put_failure(Failure(rank=2, exit_code=ExitCode.INTERRUPTED, message="stopped by SIGTERM"))
    with pytest.raises(RankLostError, match=r"Rank 2: stopped by SIGTERM\. What is finished is kept"):
        boards.leader.await_ready(1, 30)
    failure = Failure(rank=1, exit_code=ExitCode.OUT_OF_MEMORY, message="no memory")
    boards.first.put_failure(failure)
    for _ in range(2):
        with pytest.raises(RankFailedError, match=r"Rank 1 of the job failed\. no memory") as caught:
            boards.leader.raise_failure()
        assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY
        boards.first.put_failure(replace(failure, said_on="another machine"))
    boards.first.put_failure(replace(failure, said_on=socket.gethostname()))
    with pytest.raises(RankFailedError, match=r"^$"):
        boards.leader.raise_failure()


def test_the_leader_waits_for_goodbyes_but_not_for_ever(boards):
    boards.first.say_goodbye()
    boards.leader.await_goodbyes(3)
    assert boards.now == pytest.approx(3, abs=0.2)
    boards.second.say_goodbye()
    boards.leader.await_goodbyes(3)
    assert boards.now == pytest.approx(3, abs=0.2)
